"""lora_linear, forward and backward: on a GPU against the frozen layer alone, on a CPU against the torch reference.

The frozen layer is forward + backward(dx) of x Wᵀ. Limit: its FLOPs plus 6 T r (in + out).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from benchmarks.harness import Case, relative_error
from sensilora import use_backend
from sensilora.ops import lora_linear
from sensilora.ops._dropout import keep_mask, keep_scale

SCALING = 2.0
SEED = 17
# (tokens, in, out, rank, dropout)
GPU_SHAPES = [
    (8192, in_features, out_features, 16, p)
    for in_features, out_features in ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
    for p in (0.0, 0.05)
] + [(8192, 4096, 4096, rank, 0.0) for rank in (6, 11, 17, 32, 33, 48, 64, 128)]
CPU_SHAPES = [(2048, 384, 384, 16, 0.0), (2048, 384, 1536, 16, 0.0), (2048, 384, 384, 16, 0.05)]


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [_cpu_case(*shape, dtype) for shape in CPU_SHAPES for dtype in (torch.float32, torch.bfloat16)]
    return [_gpu_case(*shape) for shape in GPU_SHAPES]


def _tensors(device, dtype, tokens, in_features, out_features, rank):
    x = torch.randn(tokens, in_features, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(out_features, in_features, device=device) / in_features**0.5).to(dtype)
    lora_A = (torch.randn(rank, in_features, device=device) / in_features**0.5).requires_grad_()
    lora_B = (torch.randn(out_features, rank, device=device) / rank**0.5).requires_grad_()
    upstream = torch.randn(tokens, out_features, device=device).to(dtype)
    return x, weight, lora_A, lora_B, upstream


def _step(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    y = forward(*inputs)
    return (y, *torch.autograd.grad(y, [tensor for tensor in inputs if tensor.requires_grad], upstream))


def _formula(weight: Tensor, kept: Tensor | float) -> Callable[..., Tensor]:
    """The plain expression with a given dropout factor, in the dtype of its inputs."""
    return lambda x, a, b: linear(x, weight) + SCALING * linear(linear(x * kept, a), b)


def _errors(got, oracle) -> list[float]:
    return [relative_error(*pair) for pair in zip(got, oracle, strict=True)]


def _gpu_case(tokens: int, in_features: int, out_features: int, rank: int, p: float) -> Case:
    x, weight, lora_A, lora_B, upstream = _tensors("cuda", torch.bfloat16, tokens, in_features, out_features, rank)
    # fp32 adapters are read as they are by ours; the peers get them cast beforehand, which is to their advantage.
    half = tuple(tensor.detach().bfloat16().requires_grad_() for tensor in (x, lora_A, lora_B))
    seed = torch.tensor([SEED], device="cuda")

    def ours():
        forward = lambda x, a, b: lora_linear(x, weight, None, a, b, SCALING, dropout_p=p, seed=seed)  # noqa: E731
        return _step(forward, (x, lora_A, lora_B), upstream)

    def eager():
        forward = lambda x, a, b: linear(x, weight) + SCALING * linear(linear(dropout(x, p), a), b)  # noqa: E731
        return _step(forward, half, upstream)

    def addmm():
        forward = lambda x, a, b: torch.addmm(linear(x, weight), linear(dropout(x, p), a), b.T, alpha=SCALING)  # noqa: E731
        return _step(forward, half, upstream)

    def kept():
        return keep_mask(tokens, in_features, p, SEED, "cuda") * keep_scale(p) if p else 1.0

    def oracle():
        wide = tuple(tensor.detach().double().requires_grad_() for tensor in (x, lora_A, lora_B))
        return _step(_formula(weight.double(), kept()), wide, upstream.double())

    return Case(
        id=f"lora_linear/{in_features}x{out_features}/r{rank}/p{p:g}",
        ours=ours,
        baseline=lambda: _step(lambda x: linear(x, weight), (x,), upstream),
        errors=lambda: _errors(ours(), oracle()),
        tolerance=1e-2,
        peers={"eager": eager, "addmm": addmm},
        eager_errors=lambda: _errors(_step(_formula(weight, _bfloat16(kept())), half, upstream), oracle()),
        floor_flops=4 * tokens * in_features * out_features + 6 * tokens * rank * (in_features + out_features),
    )


def _bfloat16(kept: Tensor | float) -> Tensor | float:
    return kept.bfloat16() if isinstance(kept, Tensor) else kept


def _cpu_case(tokens: int, in_features: int, out_features: int, rank: int, p: float, dtype: torch.dtype) -> Case:
    x, weight, lora_A, lora_B, upstream = _tensors("cpu", dtype, tokens, in_features, out_features, rank)

    def ours():
        forward = lambda x, a, b: lora_linear(x, weight, None, a, b, SCALING, dropout_p=p, seed=SEED)  # noqa: E731
        return _step(forward, (x, lora_A, lora_B), upstream)

    def reference():
        with use_backend("torch"):
            return ours()

    def oracle():
        kept = keep_mask(tokens, in_features, p, SEED) * keep_scale(p) if p else 1.0
        wide = tuple(tensor.detach().double().requires_grad_() for tensor in (x, lora_A, lora_B))
        return _step(_formula(weight.double(), kept), wide, upstream.double())

    def eager():
        forward = lambda x, a, b: linear(x, weight) + SCALING * linear(linear(dropout(x, p), a), b)  # noqa: E731
        return _step(lambda x, a, b: forward(x, a.to(dtype), b.to(dtype)), (x, lora_A, lora_B), upstream)

    return Case(
        id=f"cpu/lora_linear/{in_features}x{out_features}/r{rank}/p{p:g}/{str(dtype).removeprefix('torch.')}",
        ours=ours,
        baseline=reference,
        errors=lambda: _errors(ours(), oracle()),
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5,
        peers={"eager": eager},
    )


def test_lora_linear(timed) -> None:
    timed()
