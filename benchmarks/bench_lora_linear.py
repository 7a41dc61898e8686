"""lora_linear, forward and backward: on a GPU against the frozen layer alone, on a CPU against the torch reference.

The frozen layer is forward + backward(dx) of x Wᵀ. Limit: its FLOPs plus 6 T r (in + out).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch

from benchmarks.harness import Case, Cases, captured, native
from benchmarks.lora import (
    PEFT_DTYPES,
    SCALING,
    SEED,
    addmm,
    eager,
    errors,
    formula,
    frozen,
    kept,
    leaves,
    peft_layers,
    step,
    tensors,
)
from sensilora import use_backend
from sensilora.ops import lora_linear

# (in, out, rank, dropout), 8192 tokens
GPU_SHAPES = [
    (in_features, out_features, 16, p)
    for in_features, out_features in ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
    for p in (0.0, 0.05)
] + [(4096, 4096, rank, 0.0) for rank in (6, 11, 17, 32, 33, 48, 64, 128)]
# torch.compile takes seconds a case, so it is a peer of these only.
COMPILED = [(4096, 4096, 16, 0.0), (4096, 4096, 16, 0.05), (4096, 14336, 16, 0.0)]
TOKENS = 8192
CPU_SHAPES = [(2048, 384, 384, 16, 0.0), (2048, 384, 1536, 16, 0.0), (2048, 384, 384, 16, 0.05)]


def cases(device: str) -> Cases:
    if device == "cpu":
        return {
            f"cpu/lora_linear/{in_features}x{out_features}/r{rank}/p{p:g}/{str(dtype).removeprefix('torch.')}": (
                partial(_cpu_case, tokens, in_features, out_features, rank, p, dtype)
            )
            for tokens, in_features, out_features, rank, p in CPU_SHAPES
            for dtype in (torch.float32, torch.bfloat16)
        }
    found: Cases = {
        f"lora_linear/{shape[0]}x{shape[1]}/r{shape[2]}/p{shape[3]:g}": partial(
            _gpu_case, TOKENS, *shape, compiled=shape in COMPILED
        )
        for shape in GPU_SHAPES
    }
    found["lora_linear/4096x4096/r16/T256/graph"] = _graph_case
    found["lora_linear/4096x4096/r16/T256/wall"] = lambda: replace(_gpu_case(256, 4096, 4096, 16, 0.0), wall=True)
    found["lora_linear/4096x14336/r16/p0/native"] = _native_case
    return found


def _gpu_case(
    tokens: int, in_features: int, out_features: int, rank: int, p: float, *, compiled: bool = False, device="cuda"
) -> Case:
    x, weight, lora_A, lora_B, upstream = tensors(device, torch.bfloat16, tokens, in_features, out_features, rank)
    # fp32 adapters are read as they are by ours and by PEFT; the other peers get them cast beforehand, which is to
    # their advantage.
    half = leaves((x, lora_A, lora_B), torch.bfloat16)
    seed = torch.tensor([SEED], device=device)
    forward = partial(eager, weight=weight, p=p)
    peers = {
        "eager": lambda: step(forward, half, upstream),
        "addmm": lambda: step(partial(addmm, weight=weight, p=p), half, upstream),
    }
    for name, dtype in PEFT_DTYPES.items():
        for layer in peft_layers([weight], [lora_A], [lora_B], p, dtype):
            adapter = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            peers[name] = partial(step, lambda x, *_, layer=layer: layer(x), (x, *adapter), upstream)
    if compiled:
        torch._dynamo.reset()
        inductor = torch.compile(forward, dynamic=False, fullgraph=True)
        peers["torch.compile"] = lambda: step(inductor, half, upstream)

    def ours():
        forward = lambda x, a, b: lora_linear(x, weight, None, a, b, SCALING, dropout_p=p, seed=seed)  # noqa: E731
        return step(forward, (x, lora_A, lora_B), upstream)

    def oracle():
        mask = kept(x, p, SEED)
        wide = leaves((x, lora_A, lora_B), torch.float64)
        return step(partial(formula, weight=weight.double(), kept=mask), wide, upstream.double())

    def eager_step():
        return step(partial(formula, weight=weight, kept=kept(x, p, SEED)), half, upstream)

    return Case(
        ours=ours,
        baseline=lambda: step(partial(frozen, weight=weight), (x,), upstream),
        errors=lambda: errors(ours(), oracle()),
        tolerance=1e-2,
        peers=peers,
        eager_errors=lambda: errors(eager_step(), oracle()),
        floor_flops=4 * tokens * in_features * out_features + 6 * tokens * rank * (in_features + out_features),
    )


def _graph_case() -> Case:
    """256 tokens, where launches would cost more than the arithmetic: every arm as a CUDA graph."""
    plain = _gpu_case(256, 4096, 4096, 16, 0.0)
    ours = captured(plain.ours)
    return replace(
        plain,
        ours=ours,
        baseline=captured(plain.baseline),
        errors=lambda: [*plain.errors(), *errors(ours(), plain.ours())],
        peers={name: captured(peer) for name, peer in plain.peers.items()},
        # The replay is compared with the call, which eager has no part in.
        eager_errors=lambda: [*plain.eager_errors(), *[math.inf] * 4],
        floor_bytes=2 * 4096 * 4096 * 2,  # W in bf16, read in forward and in backward
    )


def _native_case() -> Case:
    return native(_gpu_case(TOKENS, 4096, 14336, 16, 0.0), "lora_linear", "lora_linear_backward")


def _cpu_case(tokens: int, in_features: int, out_features: int, rank: int, p: float, dtype: torch.dtype) -> Case:
    x, weight, lora_A, lora_B, upstream = tensors("cpu", dtype, tokens, in_features, out_features, rank)

    def ours():
        forward = lambda x, a, b: lora_linear(x, weight, None, a, b, SCALING, dropout_p=p, seed=SEED)  # noqa: E731
        return step(forward, (x, lora_A, lora_B), upstream)

    def reference():
        with use_backend("torch"):
            return ours()

    def oracle():
        mask = kept(x, p, SEED)
        wide = leaves((x, lora_A, lora_B), torch.float64)
        return step(partial(formula, weight=weight.double(), kept=mask), wide, upstream.double())

    def eager_step(mask=None):
        """With torch's own dropout, or with a mask instead."""

        def forward(x, a, b):
            a, b = a.to(dtype), b.to(dtype)
            return eager(x, a, b, weight=weight, p=p) if mask is None else formula(x, a, b, weight=weight, kept=mask)

        return step(forward, (x, lora_A, lora_B), upstream)

    return Case(
        ours=ours,
        baseline=reference,
        errors=lambda: errors(ours(), oracle()),
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5,
        peers={"eager": eager_step},
        eager_errors=lambda: errors(eager_step(kept(x, p, SEED)), oracle()),
    )


def test_lora_linear(timed) -> None:
    timed()
