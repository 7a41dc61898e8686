"""LoRA's forward and backward pass from plain products, where a GPU runs a call sooner than it is launched.

A fused kernel saves the device passes over its memory, but Triton takes the host some 40 µs to launch it, where a
product of cuBLAS's takes 8. So a call of few rows or of a small layer is faster this way, by how much less the host
has to do. Masks alone are made by kernels of our own.

Where the native extension holds the CUDA passes, `native_serves` such calls in their place: one call from Python, and
launches from C++.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sensilora.ops import _backend
from sensilora.ops._dropout import keep_scale, threshold
from sensilora.ops._lora import padded_rank, seed_of

# FLOPs of the base products, forward and backward, for each multiprocessor, up to which launches take longer.
LAUNCH_BOUND_FLOPS = 2**29
# Rows up to which calls go to the CUDA C++ passes whatever their FLOPs: the smaller calls of the same model keep the
# device waiting.
NATIVE_ROWS = 2048
# Ranks up to which those passes serve (csrc/lora_linear_cuda.cu).
NATIVE_MAX_RANK = 64
NATIVE_TAKES = (
    f"16-bit calls of up to {NATIVE_ROWS:,} rows, or that launches take longer than, outside of CUDA graphs"
)


def serve(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a call on a GPU is left to `forward` and `backward`.

    That is where launches take longer than the work, no CUDA graph is captured that spares their cost, and nobody
    asked for a backend by name.
    """
    return _launched_anew(x) and _launch_bound(x, weights)


def native_serves(x: Tensor, weights: Sequence[Tensor], lora_As: Sequence[Tensor]) -> bool:
    """Whether a call on a GPU is left to the CUDA C++ passes instead; they keep sums in fp32 as `backward` does."""
    return (
        _launched_anew(x)
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(0 < lora_A.shape[0] <= NATIVE_MAX_RANK for lora_A in lora_As)
        and (x.shape[0] <= NATIVE_ROWS or _launch_bound(x, weights))
        and _backend.why_not("lora_linear", "native", "cuda", x.dtype) is None
    )


def _launched_anew(x: Tensor) -> bool:
    return (
        x.is_cuda
        and x.shape[0] > 0
        and _backend.forced_backend() is None
        and not torch.cuda.is_current_stream_capturing()
    )


def _launch_bound(x: Tensor, weights: Sequence[Tensor]) -> bool:
    from sensilora.kernels._common import multiprocessors

    flops = 4 * x.shape[0] * sum(weight.numel() for weight in weights)
    return flops <= LAUNCH_BOUND_FLOPS * multiprocessors(x.device)


def forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout_ps, seeds) -> tuple[list[Tensor], Tensor]:
    """Every x W_iᵀ + b_i + s_i (drop_i(x) A_iᵀ) B_iᵀ, and the h_i = drop_i(x) A_iᵀ side by side, padded.

    Args:
        x: (rows, in_features), contiguous.
        weights, biases, lora_As, lora_Bs, scalings, dropout_ps, seeds: as in `sensilora.ops.lora_group`.
    """
    outputs, hs, dropped = [], [], _dropped(x, dropout_ps, seeds)
    operands = zip(weights, biases, lora_As, lora_Bs, scalings, strict=True)
    for i, (weight, bias, lora_A, lora_B, scaling) in enumerate(operands):
        y = linear(x, weight, bias)
        if lora_A.shape[0] > 0:
            h = torch.mm(dropped(i), _padded(lora_A.to(x.dtype), 0).T)
            y = y.addmm_(h, _padded(lora_B.to(x.dtype), 1).T, alpha=scaling)
            hs.append(h)
        outputs.append(y)
    return outputs, hs[0] if len(hs) == 1 else torch.cat(hs, dim=1) if hs else x.new_empty(x.shape[0], 0)


def backward(
    grads, x, h, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, need_grad_x: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The gradients of x (empty unless needed), of every A and of every B; grads (rows, out_i), h as of `forward`."""
    grad_x, grad_As, grad_Bs, first = x.new_empty(0), [], [], 0
    if need_grad_x:
        grad_x = torch.mm(grads[0], weights[0])
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x.addmm_(grad, weight)
    dropped = _dropped(x, dropout_ps, seeds)
    for i, (grad, lora_A, lora_B, scaling) in enumerate(zip(grads, lora_As, lora_Bs, scalings, strict=True)):
        rank = lora_A.shape[0]
        q = torch.mm(grad, _padded(lora_B.to(x.dtype), 1))
        if need_grad_x and rank > 0:
            if dropout_ps[i] == 0.0:
                grad_x.addmm_(q, _padded(lora_A.to(x.dtype), 0), alpha=scaling)
            else:
                _add_masked(grad_x, q, lora_A, scaling, dropout_ps[i], seed_of(seeds, i))
        columns = h[:, first : first + rank]
        first += padded_rank(rank)
        masked = dropped(i) if rank > 0 else x
        grad_As.append(_sum(q[:, :rank], masked, lora_A.dtype).mul_(scaling))
        grad_Bs.append(_sum(grad, columns, lora_B.dtype).mul_(scaling))
    return grad_x, grad_As, grad_Bs


def _dropped(x: Tensor, dropout_ps: Sequence[float], seeds: Tensor | None) -> Callable[[int], Tensor]:
    """A function that gives drop_i(x); made once where members share a mask."""
    if seeds is None:
        return lambda member: x
    from sensilora.kernels.dropout import launch_dropout

    masks = seeds

    @functools.cache
    def of_mask(mask: int, p: float) -> Tensor:
        return launch_dropout(x, threshold(p), keep_scale(p), masks[mask : mask + 1]) if p > 0.0 else x

    return lambda member: of_mask(member if masks.shape[0] > 1 else 0, dropout_ps[member])


def _add_masked(grad_x: Tensor, q: Tensor, lora_A: Tensor, scaling: float, p: float, seed: Tensor | None) -> None:
    from sensilora.kernels.lora_linear import launch_lora_up

    launch_lora_up(grad_x, q, [lora_A], scaling * keep_scale(p), threshold(p), seed)


def _padded(adapter: Tensor, dim: int) -> Tensor:
    """Its rank, dimension `dim`, padded with zeros as h's columns are, so that products read aligned rows."""
    missing = padded_rank(adapter.shape[dim]) - adapter.shape[dim]
    if missing == 0:
        return adapter
    return pad(adapter, (0, missing) if dim == 1 else (0, 0, 0, missing))


def _sum(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """leftᵀ right, in fp32 where an adapter's gradient is kept in more than the operands' 16 bits."""
    if dtype == left.dtype or left.dtype not in (torch.float16, torch.bfloat16) or not left.is_cuda:
        return torch.mm(left.T, right)
    return torch.mm(left.T, right, out_dtype=torch.float32)
