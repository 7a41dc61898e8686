"""lora_linear with several adapters in one batch: every segment of rows has its own rank, scaling and dropout."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import linear

from sensilora.ops import _backend
from sensilora.ops._backend import Implementation
from sensilora.ops._dropout import dropout, keep_scale, threshold
from sensilora.ops._lora import (
    cast_for_autocast,
    check_operands,
    frozen_gradients,
    padded_rank,
    row_count,
    rows,
    seed_tensor,
    unfolded,
)
from sensilora.ops.lora_linear import _TRITON_DTYPES
from sensilora.targets import whole_rank


def lora_segments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    ranks: Sequence[int],
    scalings: Sequence[float],
    offsets: Tensor,
    adapters: Tensor,
    *,
    dropout_ps: float | Sequence[float] = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """y = x Wᵀ + b + s_i (drop_i(x) A_iᵀ) B_iᵀ, where i is the adapter of the row's segment.

    No adapter is padded to the rank of another, and nothing about the segments is read on the host, so a captured
    CUDA graph can be replayed with other `offsets` and `adapters` in the same tensors. A row's result is that of
    `lora_linear` on the whole of `x` with its adapter and the same seed. Rows of one adapter do not touch the
    outputs or gradients of another, not even where they hold NaN. Under autocast, `x`, W and b are cast as
    ``torch.nn.functional.linear`` would cast them.

    Args:
        x: (..., in_features), fp64, fp32, bf16 or fp16; its leading dimensions fold into rows.
        weight: (out_features, in_features), x's dtype; any strides.
        bias: (out_features,) in x's dtype, or None.
        lora_A: (Σ ranks, in_features), the adapters' A one below the other, any floating dtype; cast to x's.
        lora_B: (out_features, Σ ranks), the adapters' B side by side, any floating dtype; cast to x's.
        ranks: each adapter's rank; 0 is the base layer alone.
        scalings: each adapter's effective scale s (alpha / rank in PEFT's terms).
        offsets: int64 (segments + 1,) on x's device, ascending: segment i is rows offsets[i] to offsets[i + 1].
            Rows outside every segment take the base layer alone; offsets before the first row or past the last are
            cut off there.
        adapters: int64 (segments,) on x's device: each segment's adapter, in any order and any number of times. A
            number that is no adapter's, such as -1, stands for the base layer alone.
        dropout_ps: each adapter's probability of dropping an input element, or one for all; rounded to a multiple
            of 2⁻¹⁵.
        seed: the mask's key, as for `lora_linear`; the mask is a function of (seed, row of the whole batch, column).

    Returns:
        (..., out_features) in x's dtype. Differentiable once in `x`, `weight`, `bias`, `lora_A`, `lora_B`; adapters
        without rows get zero gradients.

    Raises:
        ValueError: shapes, dtypes, devices or lengths do not fit, a rank is negative or not whole, a probability is
            outside [0, 1], or `seed` is no whole number.
        BackendError: a backend was asked for that cannot serve.
        RuntimeError: when differentiated twice, or in forward mode.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    ranks = [whole_rank(rank) for rank in ranks]
    scalings = [float(scaling) for scaling in scalings]
    ps = [float(dropout_ps)] * len(ranks) if isinstance(dropout_ps, (float, Real)) else [float(p) for p in dropout_ps]
    _check(x, weight, bias, lora_A, lora_B, ranks, scalings, ps, offsets, adapters)
    if not any(p > 0 and rank > 0 for p, rank in zip(ps, ranks, strict=True)):
        seed = None
    else:
        seed = seed_tensor(seed, x.device)
    ps = [0.0] * len(ranks) if seed is None else ps
    offsets, adapters = offsets.to(torch.int64).contiguous(), adapters.to(torch.int64).contiguous()
    return _lora_segments(x, weight, bias, lora_A, lora_B, ranks, scalings, ps, offsets, adapters, seed)[0]


def _check(x, weight, bias, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters) -> None:
    check_operands(x, weight, bias, lora_A, lora_B, 0.0)
    if any(rank < 0 for rank in ranks):
        raise ValueError(f"ranks must not be negative, not {ranks}")
    if lora_A.shape[0] != sum(ranks):
        raise ValueError(f"shapes do not fit: lora_A {tuple(lora_A.shape)} must have one row a rank of {ranks}")
    if not len(ranks) == len(scalings) == len(dropout_ps):
        raise ValueError(
            f"ranks, scalings and dropout_ps must have one entry an adapter, not {len(ranks)}, {len(scalings)} and "
            f"{len(dropout_ps)}"
        )
    for p in dropout_ps:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout_ps must be in [0, 1], not {p}")
    if offsets.dim() != 1 or adapters.dim() != 1 or offsets.shape[0] != adapters.shape[0] + 1:
        raise ValueError(
            f"offsets must be 1-D with one entry more than adapters, not of shapes {tuple(offsets.shape)} and "
            f"{tuple(adapters.shape)}"
        )
    for name, tensor in (("offsets", offsets), ("adapters", adapters)):
        if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.device != x.device:
            raise ValueError(
                f"{name} must hold integers on x's device {x.device}, not {tensor.dtype} on {tensor.device}"
            )


def _adapter_of_row(offsets: Tensor, adapters: Tensor, count: int) -> Tensor:
    """int64 (count,): each row's entry of `adapters`, -1 outside every segment."""
    segments = adapters.shape[0]
    if segments == 0:
        return adapters.new_full((count,), -1)
    segment = torch.searchsorted(offsets, torch.arange(count, device=offsets.device), right=True) - 1
    inside = (segment >= 0) & (segment < segments)
    return torch.where(inside, adapters[segment.clamp(0, segments - 1)], -1)


def _stacked(ranks: Sequence[int]) -> Iterator[tuple[int, int, slice]]:
    """(adapter, rank, its rows of lora_A and columns of lora_B) of every adapter with a rank."""
    first = 0
    for adapter, rank in enumerate(ranks):
        if rank > 0:
            yield adapter, rank, slice(first, first + rank)
        first += rank


# torch.where and not a product with the mask: 0 * NaN would carry a NaN from one adapter's rows to another's.
def _reference(x, weight, bias, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters, seed):
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    adapter_of_row = _adapter_of_row(offsets, adapters, x.shape[0])
    y = linear(x, weight, bias)
    h = x.new_zeros(x.shape[0], padded_rank(max(ranks, default=0)))
    for adapter, rank, own in _stacked(ranks):
        mine = (adapter_of_row == adapter).unsqueeze(1)
        own_h = linear(dropout(torch.where(mine, x, 0), dropout_ps[adapter], seed), lora_A[own])
        y = torch.where(mine, y + scalings[adapter] * linear(own_h, lora_B[:, own]), y)
        h[:, :rank] = torch.where(mine, own_h, h[:, :rank])
    return y, h


def _reference_backward(
    grad, x, h, weight, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters, seed, need_grad_x
):
    adapter_A, adapter_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    adapter_of_row = _adapter_of_row(offsets, adapters, x.shape[0])
    grad_x = grad @ weight if need_grad_x else x.new_empty(0)
    grad_A, grad_B = torch.zeros_like(adapter_A), torch.zeros_like(adapter_B)
    for adapter, rank, own in _stacked(ranks):
        mine = (adapter_of_row == adapter).unsqueeze(1)
        own_grad, p, scaling = torch.where(mine, grad, 0), dropout_ps[adapter], scalings[adapter]
        q = torch.where(mine, scaling * (own_grad @ adapter_B[:, own]), 0)
        grad_A[own] = q.T @ dropout(torch.where(mine, x, 0), p, seed)
        grad_B[:, own] = scaling * (own_grad.T @ torch.where(mine, h[:, :rank], 0))
        if need_grad_x:
            grad_x = torch.where(mine, grad_x + dropout(q @ adapter_A[own], p, seed), grad_x)
    return grad_x, grad_A, grad_B


def _native(x, weight, bias, lora_A, lora_B, *segments):
    return torch.ops.sensilora_C.lora_segments(x, weight, bias, lora_A.to(x.dtype), lora_B.to(x.dtype), *segments)


def _native_backward(grad, x, h, weight, lora_A, lora_B, *segments):
    grad_x, grad_A, grad_B = torch.ops.sensilora_C.lora_segments_backward(
        grad, x, h, weight, lora_A.to(x.dtype), lora_B.to(x.dtype), *segments
    )
    return grad_x, _laid_out_as(lora_A, grad_A), _laid_out_as(lora_B, grad_B)


def _laid_out_as(matrix: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the strides that the fake promises: stacked adapters are often transposed."""
    expected = torch.empty_like(matrix, dtype=gradient.dtype)
    return gradient if gradient.stride() == expected.stride() else expected.copy_(gradient)


# Never emptied: a captured CUDA graph keeps the tables' addresses. Filled by the first call, so capture after one.
@functools.cache
def _tables(
    ranks: tuple[int, ...], scalings: tuple[float, ...], dropout_ps: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """What the kernels read about each adapter.

    Returns:
        int32 (adapters, 3): first row in the stack, rank, dropout threshold; fp32 (adapters, 2): scaling, keep_scale.
    """
    firsts = [sum(ranks[:adapter]) for adapter in range(len(ranks))]
    ints = list(zip(firsts, ranks, map(threshold, dropout_ps), strict=True))
    floats = list(zip(scalings, map(keep_scale, dropout_ps), strict=True))
    return (
        torch.tensor(ints, dtype=torch.int32, device=device).reshape(-1, 3),
        torch.tensor(floats, dtype=torch.float32, device=device).reshape(-1, 2),
    )


def _triton(x, weight, bias, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters, seed):
    from sensilora.kernels.lora_segments import launch_lora_segments

    ints, floats = _tables(tuple(ranks), tuple(scalings), tuple(dropout_ps), x.device)
    with torch.cuda.device_of(x):
        return launch_lora_segments(
            x, weight, bias, lora_A, lora_B, ints, floats, offsets, adapters, seed,
            max(ranks, default=0), seed is not None,
        )  # fmt: skip


def _triton_backward(
    grad, x, h, weight, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters, seed, need_grad_x
):
    from sensilora.kernels.lora_segments import launch_lora_segments_backward

    ints, floats = _tables(tuple(ranks), tuple(scalings), tuple(dropout_ps), x.device)
    with torch.cuda.device_of(x):
        return launch_lora_segments_backward(
            grad, x, h, weight, lora_A, lora_B, ints, floats, offsets, adapters, seed,
            max(ranks, default=0), seed is not None, need_grad_x,
        )  # fmt: skip


_backend.register(
    "lora_segments",
    triton=Implementation(_triton, _TRITON_DTYPES),
    native=Implementation(_native),
    torch=Implementation(_reference),
)
_backend.register(
    "lora_segments_backward",
    triton=Implementation(_triton_backward, _TRITON_DTYPES),
    native=Implementation(_native_backward),
    torch=Implementation(_reference_backward),
)


@torch.library.custom_op("sensilora::lora_segments", mutates_args=())
def _lora_segments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    ranks: Sequence[int],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    offsets: Tensor,
    adapters: Tensor,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    implementation = _backend.select("lora_segments", x.device, x.dtype)
    y, h = implementation(
        rows(x).contiguous(), weight, bias, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters, seed
    )
    return unfolded(y, x), h


@_lora_segments.register_fake
def _(x, weight, bias, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters, seed):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(row_count(x), padded_rank(max(ranks, default=0)))


@torch.library.custom_op("sensilora::lora_segments_backward", mutates_args=())
def _lora_segments_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    ranks: Sequence[int],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    offsets: Tensor,
    adapters: Tensor,
    seed: Tensor | None,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = _backend.select("lora_segments_backward", x.device, x.dtype)
    grad_x, grad_A, grad_B = implementation(
        rows(grad).contiguous(), rows(x).contiguous(), h, weight, lora_A, lora_B,
        ranks, scalings, dropout_ps, offsets, adapters, seed, need_grad_x,
    )  # fmt: skip
    return grad_x.reshape(x.shape) if need_grad_x else grad_x, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)


@_lora_segments_backward.register_fake
def _(
    grad, x, h, weight, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters, seed, need_grad_x
):  # fmt: skip
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_grad_x else x.new_empty(0)
    return grad_x, torch.empty_like(lora_A), torch.empty_like(lora_B)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _bias, lora_A, lora_B, ctx.ranks, ctx.scalings, ctx.dropout_ps, offsets, adapters, seed = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], offsets, adapters, seed)
    # Or a tensor of zeros would be filled for h, whose gradient nobody asks for.
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, _grad_h):
    if grad is None:
        return (None,) * 11
    x, weight, lora_A, lora_B, h, offsets, adapters, seed = ctx.saved_tensors
    grad_x, grad_A, grad_B = _lora_segments_backward(
        grad, x, h, weight, lora_A, lora_B, ctx.ranks, ctx.scalings, ctx.dropout_ps, offsets, adapters, seed,
        ctx.needs_input_grad[0],
    )  # fmt: skip
    _, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_weight, grad_bias = frozen_gradients(grad, x, need_weight=need_weight, need_bias=need_bias)
    grad_x = grad_x if ctx.needs_input_grad[0] else None
    return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None, None, None, None, None


_lora_segments.register_autograd(_backward, setup_context=_setup_context)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "lora_segments cannot be differentiated twice; for Hessian-vector products calibrate before adding adapters, "
        "or use the plain expression linear(x, W, b) + s * linear(linear(x, A), B) on the rows of each adapter"
    )


_lora_segments_backward.register_autograd(_no_double_backward)
