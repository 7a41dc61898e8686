"""An adapter's forward and backward beside a base product that was computed elsewhere: y = base + s (drop(x) Aᵀ) Bᵀ.

    forward   h = drop(x) Aᵀ            one read of x
              y = base + s h Bᵀ         one read of base and write of y
    backward  q = s dY B                one read of dY
              dB = s dYᵀ h              one read of dY
              dA = qᵀ drop(x)           one read of x
              dx = mask∘(q A)           one write of dx; autograd adds the base's

All but the last step of each pass are kernels of `sensilora.kernels.lora_linear`.
"""

import torch
import triton
import triton.language as tl

from sensilora.kernels._common import drop
from sensilora.kernels.lora_linear import (
    _aligned,
    _bucket,
    _cdiv,
    _config,
    _precision,
    _skinny_tile,
    _stack,
    _update_tile,
    launch_lora_down,
    launch_lora_outer,
    launch_reduce,
    packed,
    padded,
)


@triton.jit(do_not_specialize=["threshold"])
def _lora_add_kernel(
    out,
    base,
    skinny,
    updates,
    seed,
    rows,
    columns,
    skinny_stride,
    stack,
    ranks,
    update_strides_r,
    update_stride_c,
    scale,
    threshold,
    HAS_BASE: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out (rows, columns) = base + scale * mask∘(skinny updates), or without HAS_BASE the latter alone."""
    tiles_c = tl.cdiv(columns, BLOCK_C)
    first_row = (tl.program_id(0) // tiles_c).to(tl.int64) * BLOCK_T
    first_column = tl.program_id(0) % tiles_c * BLOCK_C
    t = first_row + tl.arange(0, BLOCK_T)
    c = first_column + tl.arange(0, BLOCK_C)
    inside = (t < rows)[:, None] & (c < columns)[None, :]
    places = t[:, None] * columns + c[None, :]
    if HAS_BASE:
        base_tile = tl.load(base + places, mask=inside, other=0.0)
    update = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for first_r in tl.range(0, stack, BLOCK_R, num_stages=1):
        r = first_r + tl.arange(0, BLOCK_R)
        left = _skinny_tile(skinny, skinny_stride, t, r, rows, stack)
        right = _update_tile(updates, ranks, update_strides_r, update_stride_c, r, c, columns, ALIGNED)
        update = tl.dot(left, right.to(left.dtype), update, input_precision=PRECISION)
    update *= scale
    if DROPOUT:
        update = drop(update, tl.load(seed), first_row, first_column, threshold)
    if HAS_BASE:
        update += base_tile.to(tl.float32)
    tl.store(out + places, update.to(out.dtype.element_ty), mask=inside)


def launch_lora_add(out, base, skinny, update, scale, threshold, seed):
    """out (rows, columns) = base + scale * mask∘(skinny (rows, padded rank) update (rank, columns)).

    `base` is of any floating dtype, or None for nothing.
    """
    rows, columns = out.shape
    updates = (update,)
    stack, ranks, strides_r, stride_c = _stack(updates)
    block_t, block_c, warps, stages = _config("up", stack, out)
    # In one dimension, since the others of a grid end at 65,535.
    _lora_add_kernel[(_cdiv(columns, block_c) * _cdiv(rows, block_t),)](
        out, base, skinny, updates, seed, rows, columns, skinny.stride(0), stack, ranks, strides_r, stride_c, scale,
        threshold,
        HAS_BASE=base is not None, DROPOUT=threshold > 0, ALIGNED=_aligned(updates),
        PRECISION=_precision(skinny.dtype), BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_R=_bucket(stack),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def launch_lora_update(
    base: torch.Tensor,
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    threshold: int,
    keep_scale: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = base + s (drop(x) Aᵀ) Bᵀ in base's dtype, and h = drop(x) Aᵀ (rows, padded rank) in x's.

    Args:
        base: (rows, out_features), contiguous.
        x: (rows, in_features), contiguous.
        lora_A, lora_B, scaling: as in `sensilora.ops.lora_update`.
        threshold, keep_scale: of the dropout mask; threshold 0 means none.
        seed: int64 tensor of one element on x's device; None without dropout.
    """
    rows, rank = x.shape[0], lora_A.shape[0]
    h = torch.empty(rows, padded(rank), dtype=x.dtype, device=x.device)
    if rows == 0 or rank == 0:
        return base.clone(), h
    y = torch.empty_like(base)
    launch_lora_down(x, [lora_A], h, keep_scale, threshold, seed)
    launch_lora_add(y, base, h, packed(lora_B.T, x), scaling, 0, None)
    return y, h


def launch_lora_update_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    threshold: int,
    keep_scale: float,
    seed: torch.Tensor | None,
    need_grad_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x (empty unless needed), A and B, the last two in their dtypes.

    grad (rows, out_features) is contiguous and of x's dtype.
    """
    grad_A = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
    grad_B = torch.empty_like(lora_B, memory_format=torch.contiguous_format)
    grad_x = torch.empty_like(x) if need_grad_x else x.new_empty(0)
    if x.shape[0] == 0 or lora_A.shape[0] == 0:
        return grad_x.zero_(), grad_A.zero_(), grad_B.zero_()
    q = torch.empty(h.shape, dtype=x.dtype, device=x.device)
    launch_lora_down(grad, [packed(lora_B.T, x)], q, scaling, 0, None)
    pending = launch_lora_outer(grad, h, (grad_B.T,), scaling, 0, None)
    pending += launch_lora_outer(x, q, (grad_A,), keep_scale, threshold, seed)
    if need_grad_x:
        launch_lora_add(grad_x, None, q, lora_A, keep_scale, threshold, seed)
    launch_reduce(pending)
    return grad_x, grad_A, grad_B
