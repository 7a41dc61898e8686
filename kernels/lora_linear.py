"""LoRA forward and backward around the base product, in few passes over the activations.

    forward   h = drop(x) Aᵀ            one read of x
              y = x Wᵀ + b + s h Bᵀ     one product that adds the update in its accumulator, or cuBLAS and then one
                                        read and write of y
    backward  q = s dY B, dB = s dYᵀ h  one read of dY, partial sums in fp32, then a fixed-order reduction
              dx = dY W + q A           as in forward; with dropout cuBLAS, since the mask sits between the two terms
              dA = qᵀ drop(x)           one read of x; after cuBLAS also dx += mask∘(q A), so the mask is made once

Nothing is atomic, so results repeat bit for bit. The rank is a run-time value: only its bucket (16, 32, 64, 128)
is compiled in and tails are masked; ranks above 128 go in blocks of 128. A and B are read in their own dtype and
rounded to x's in registers.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sensilora.kernels._common import keep_mask, multiprocessors, sum_partials

MAX_BLOCK_RANK = 128


@triton.jit
def _lora_down_kernel(
    x,
    lora_A,
    h,
    seed,
    rows,
    in_features,
    rank,
    x_stride,
    a_stride_r,
    a_stride_k,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h (rows, rank) = drop(x) Aᵀ."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = first_row + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if DROPOUT:
        key = tl.load(seed)
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for first_k in range(0, in_features, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        inside_x = (t < rows)[:, None]
        inside_a = (r < rank)[None, :]
        if not EVEN_K:
            inside_x = inside_x & (k < in_features)[None, :]
            inside_a = inside_a & (k < in_features)[:, None]
        x_tile = tl.load(x + t[:, None] * x_stride + k[None, :], mask=inside_x, other=0.0)
        if DROPOUT:
            kept = keep_mask(key, first_row, first_k, threshold, BLOCK_T, BLOCK_K)
            x_tile = tl.where(kept, x_tile, 0.0)
        a_tile = tl.load(lora_A + k[:, None] * a_stride_k + r[None, :] * a_stride_r, mask=inside_a, other=0.0)
        total = tl.dot(x_tile, a_tile.to(x_tile.dtype), total, input_precision=PRECISION)
    h_tile = h + t[:, None] * rank + r[None, :]
    inside = (t < rows)[:, None] & (r < rank)[None, :]
    tl.store(h_tile, (total * keep_scale).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _lora_product_kernel(
    left,
    matrix,
    out,
    bias,
    skinny,
    update,
    rows,
    columns,
    reduced,
    rank,
    update_stride_c,
    update_stride_r,
    scale,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """out = left matrix + bias + scale * skinny updateᵀ, persistent, tiles by TMA; the update is one more dot.

    matrix (reduced, columns) is stored so, or TRANSPOSED; skinny (rows, rank); update (columns, rank).
    """
    tiles_t, tiles_c = tl.cdiv(rows, BLOCK_T), tl.cdiv(columns, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    for tile in range(tl.program_id(0), tiles_t * tiles_c, PROGRAMS):
        # GROUP row tiles share their columns while these are in L2.
        first = tile // (GROUP * tiles_c) * GROUP
        group = min(tiles_t - first, GROUP)
        first_t = (first + tile % (GROUP * tiles_c) % group) * BLOCK_T
        first_c = tile % (GROUP * tiles_c) // group * BLOCK_C
        total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        for k in range(0, reduced, BLOCK_K):
            right = matrix.load([first_c, k]).T if TRANSPOSED else matrix.load([k, first_c])
            total = tl.dot(left.load([first_t, k]), right, total)
        t = first_t + tl.arange(0, BLOCK_T)
        c = first_c + tl.arange(0, BLOCK_C)
        inside_t, inside_c, inside_r = t < rows, c < columns, r < rank
        skinny_tile = tl.load(
            skinny + t.to(tl.int64)[:, None] * rank + r[None, :],
            mask=inside_t[:, None] & inside_r[None, :],
            other=0.0,
        )
        update_tile = tl.load(
            update + c[None, :] * update_stride_c + r[:, None] * update_stride_r,
            mask=inside_c[None, :] & inside_r[:, None],
            other=0.0,
        )
        total = tl.dot(skinny_tile, (scale * update_tile).to(skinny_tile.dtype), total)
        if HAS_BIAS:
            total += tl.load(bias + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
        # Stored in two halves, which leaves shared memory for one more stage of tiles.
        halves = tl.permute(tl.reshape(total, (BLOCK_T, 2, BLOCK_C // 2)), (0, 2, 1))
        low, high = tl.split(halves)
        out.store([first_t, first_c], low.to(out.dtype))
        out.store([first_t, first_c + BLOCK_C // 2], high.to(out.dtype))


@triton.jit
def _lora_up_kernel(
    out,
    left,
    right,
    seed,
    rows,
    columns,
    rank,
    right_stride_c,
    right_stride_r,
    scale,
    threshold,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out (rows, columns) += scale * mask∘(left (rows, rank) right (columns, rank)ᵀ)."""
    # The last rows first: what the base product wrote last is still in L2.
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64) * BLOCK_T
    first_column = tl.program_id(0) * BLOCK_C
    t = first_row + tl.arange(0, BLOCK_T)
    c = first_column + tl.arange(0, BLOCK_C)
    inside = (t < rows)[:, None] & (c < columns)[None, :]
    tile = out + t[:, None] * columns + c[None, :]
    base = tl.load(tile, mask=inside, other=0.0)
    update = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for first_r in range(0, rank, BLOCK_R):
        r = first_r + tl.arange(0, BLOCK_R)
        left_tile = tl.load(
            left + t[:, None] * rank + r[None, :], mask=(t < rows)[:, None] & (r < rank)[None, :], other=0.0
        )
        right_tile = tl.load(
            right + c[None, :] * right_stride_c + r[:, None] * right_stride_r,
            mask=(c < columns)[None, :] & (r < rank)[:, None],
            other=0.0,
        )
        update = tl.dot(left_tile, right_tile.to(left_tile.dtype), update, input_precision=PRECISION)
    if DROPOUT:
        kept = keep_mask(tl.load(seed), first_row, first_column, threshold, BLOCK_T, BLOCK_C)
        update = tl.where(kept, update, 0.0)
    tl.store(tile, (base.to(tl.float32) + scale * update).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row_tile(turn, row_tiles):
    """The row tile of this program at this turn: neighbours take neighbouring tiles, and the last rows come first.

    What the product before this pass wrote last is still in L2. Below 0 when there is none left.
    """
    return row_tiles - 1 - (turn * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)


@triton.jit
def _lora_grad_b_kernel(
    grad,
    h,
    lora_B,
    q_partial,
    b_partial,
    rows,
    out_features,
    rank,
    b_stride_n,
    b_stride_r,
    row_tiles,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One read of dY: this strip's share of dY B for all its rows, and of dYᵀ h summed over them."""
    strip, split = tl.program_id(0), tl.program_id(1)
    n = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_b = (n < out_features)[:, None] & (r < rank)[None, :]
    b_tile = tl.load(lora_B + n[:, None] * b_stride_n + r[None, :] * b_stride_r, mask=inside_b, other=0.0)
    b_tile = b_tile.to(grad.dtype.element_ty)
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for turn in range(tl.cdiv(row_tiles, tl.num_programs(1))):
        t = _row_tile(turn, row_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside_t = (t >= 0) & (t < rows)
        inside = inside_t[:, None]
        if not EVEN_N:
            inside = inside & (n < out_features)[None, :]
        grad_tile = tl.load(grad + t[:, None] * out_features + n[None, :], mask=inside, other=0.0)
        inside_h = inside_t[:, None] & (r < rank)[None, :]
        h_tile = tl.load(h + t[:, None] * rank + r[None, :], mask=inside_h, other=0.0)
        total = tl.dot(tl.trans(grad_tile), h_tile, total, input_precision=PRECISION)
        q_tile = tl.dot(grad_tile, b_tile, input_precision=PRECISION)
        tl.store(q_partial + (strip.to(tl.int64) * rows + t[:, None]) * rank + r[None, :], q_tile, mask=inside_h)
    b_out = b_partial + (split.to(tl.int64) * out_features + n[:, None]) * rank + r[None, :]
    tl.store(b_out, total, mask=inside_b)


@triton.jit
def _lora_grad_a_kernel(
    x,
    q,
    lora_A,
    grad_x,
    a_partial,
    seed,
    rows,
    in_features,
    rank,
    x_stride,
    a_stride_r,
    a_stride_k,
    threshold,
    keep_scale,
    row_tiles,
    UPDATE_GRAD_X: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One read of x: this split's share of qᵀ drop(x); and grad_x += mask∘(q A) on the way, with the same mask."""
    first_k = tl.program_id(0) * BLOCK_K
    split = tl.program_id(1)
    k = first_k + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_a = (k < in_features)[None, :] & (r < rank)[:, None]
    if UPDATE_GRAD_X:
        a_tile = tl.load(lora_A + r[:, None] * a_stride_r + k[None, :] * a_stride_k, mask=inside_a, other=0.0)
        a_tile = a_tile.to(x.dtype.element_ty)
    if DROPOUT:
        key = tl.load(seed)
    total = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    for turn in range(tl.cdiv(row_tiles, tl.num_programs(1))):
        first_row = _row_tile(turn, row_tiles) * BLOCK_T
        t = first_row + tl.arange(0, BLOCK_T)
        inside_t = (t >= 0) & (t < rows)
        inside = inside_t[:, None]
        if not EVEN_K:
            inside = inside & (k < in_features)[None, :]
        x_tile = tl.load(x + t[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
        q_tile = tl.load(q + t[:, None] * rank + r[None, :], mask=inside_t[:, None] & (r < rank)[None, :], other=0.0)
        if DROPOUT:
            kept = keep_mask(key, first_row, first_k, threshold, BLOCK_T, BLOCK_K)
            x_tile = tl.where(kept, x_tile, 0.0)
        total = tl.dot(tl.trans(x_tile), q_tile, total, input_precision=PRECISION)
        if UPDATE_GRAD_X:
            update = tl.dot(q_tile, a_tile, input_precision=PRECISION)
            if DROPOUT:
                update = tl.where(kept, update, 0.0)
            pointers = grad_x + t[:, None] * in_features + k[None, :]
            base = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            tl.store(pointers, (base + keep_scale * update).to(grad_x.dtype.element_ty), mask=inside)
    a_out = a_partial + (split.to(tl.int64) * rank + r[:, None]) * in_features + k[None, :]
    tl.store(a_out, keep_scale * tl.trans(total), mask=inside_a)


@triton.jit
def _reduce_kernel(
    first_partial, first_out, first_size, first_splits, first_programs, second_partial, second_out, second_size,
    second_splits, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum two stacks of partials over their first dimension, in order, in one launch."""
    program = tl.program_id(0)
    if program < first_programs:
        _reduce_block(first_partial, first_out, first_size, first_splits, program, scale, BLOCK)
    else:
        _reduce_block(second_partial, second_out, second_size, second_splits, program - first_programs, scale, BLOCK)


@triton.jit
def _reduce_block(partial, out, size, splits, program, scale, BLOCK: tl.constexpr):
    index = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = sum_partials(partial, index, size, splits, 16)
    tl.store(out + index, (scale * total).to(out.dtype.element_ty), mask=index < size)


# Tile sizes by kernel and rank bucket: (BLOCK_T, BLOCK of columns, num_warps, num_stages), and for the two gradient
# kernels the programs aimed at a multiprocessor.
CONFIGS: dict[str, dict[int, tuple[int, ...]]] = {
    "down": {16: (32, 128, 4, 4), 32: (32, 128, 4, 4), 64: (64, 128, 4, 4), 128: (32, 64, 4, 4)},
    "up": {16: (64, 128, 4, 2), 32: (64, 128, 4, 2), 64: (128, 64, 4, 2), 128: (128, 64, 4, 2)},
    "grad_b": {16: (64, 512, 8, 3, 1), 32: (64, 256, 4, 3, 1), 64: (64, 256, 8, 4, 1), 128: (64, 128, 4, 4, 1)},
    "grad_a": {16: (64, 64, 4, 3, 4), 32: (64, 128, 4, 3, 2), 64: (128, 64, 4, 3, 2), 128: (64, 64, 4, 3, 2)},
    "grad_a_dropout": {16: (16, 128, 4, 4, 4), 32: (32, 64, 4, 4, 4), 64: (64, 64, 4, 3, 2), 128: (64, 64, 4, 3, 2)},
}
# Bytes of shared memory a block may take for which they were chosen: an A100's; the H100 and H200 have more.
TUNED_SHARED_MEMORY = 160 * 1024
REDUCE_BLOCK = 256
# BLOCK_T, BLOCK_C, BLOCK_K, GROUP, num_warps, num_stages of the product, tuned at 8192 rows. With few rows cuBLAS
# splits the reduction, which this kernel does not; above rank 64 the tile of the update takes the memory of a stage.
PRODUCT_CONFIG = (128, 256, 64, 8, 8, 3)
PRODUCT_MIN_ROWS = 2048
PRODUCT_MAX_RANK = 64


def _config(kernel: str, rank: int, like: torch.Tensor) -> tuple[int, ...]:
    """The entry of CONFIGS; half the columns and two stages where fp32 or a smaller GPU would not fit its tiles."""
    rows, columns, warps, stages, *rest = CONFIGS[kernel][_bucket(rank)]
    if like.dtype == torch.float32 or (like.is_cuda and _shared_memory(like.device) < TUNED_SHARED_MEMORY):
        columns, stages = max(32, columns // 2), 2
    return rows, columns, warps, stages, *rest


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a block may take; as the tuned GPU's where torch does not tell."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", TUNED_SHARED_MEMORY)


def _bucket(rank: int) -> int:
    return min(MAX_BLOCK_RANK, max(16, triton.next_power_of_2(rank)))


def _precision(dtype: torch.dtype) -> str:
    """fp32 products as torch's own: exact unless the user allowed TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _splits(row_tiles: int, strips: int, programs_per_sm: int, device: torch.device) -> int:
    """How many programs share the rows of a strip, so that the gradient kernels fill the device."""
    return max(1, min(row_tiles, multiprocessors(device) * programs_per_sm // strips))


def launch_lora_down(x, lora_A, threshold, keep_scale, seed):
    """h = drop(x) Aᵀ, (rows, rank) in x's dtype."""
    rows, in_features = x.shape
    rank = lora_A.shape[0]
    h = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
    block_t, block_k, warps, stages = _config("down", rank, x)
    _lora_down_kernel[(triton.cdiv(rows, block_t), triton.cdiv(rank, _bucket(rank)))](
        x, lora_A, h, seed, rows, in_features, rank, x.stride(0), lora_A.stride(0), lora_A.stride(1),
        threshold, keep_scale,
        DROPOUT=threshold > 0, EVEN_K=in_features % block_k == 0, PRECISION=_precision(x.dtype),
        BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_R=_bucket(rank), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return h


def _row_major(matrix: torch.Tensor) -> bool:
    """Whether a tensor descriptor can read it: unit column stride, rows and base aligned to 16 bytes."""
    itemsize = matrix.element_size()
    return matrix.stride(1) == 1 and matrix.stride(0) * itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0


def product_serves(left: torch.Tensor, matrix: torch.Tensor, rank: int) -> bool:
    """Whether `launch_lora_product` can compute left matrix + ..., and was measured to beat cuBLAS plus a pass."""
    on_hopper = left.is_cuda and torch.cuda.get_device_capability(left.device) == (9, 0)
    return (
        on_hopper
        and left.dtype in (torch.bfloat16, torch.float16)
        and left.shape[0] >= PRODUCT_MIN_ROWS
        and rank <= PRODUCT_MAX_RANK
        and matrix.shape[1] * left.element_size() % 16 == 0
        and _row_major(left)
        and (_row_major(matrix) or _row_major(matrix.T))
    )


def launch_lora_product(left, matrix, bias, skinny, update, scale):
    """left (rows, reduced) matrix (reduced, columns) + bias + scale * skinny (rows, rank) update (columns, rank)ᵀ."""
    rows, reduced = left.shape
    columns, rank = update.shape
    block_t, block_c, block_k, group, warps, stages = PRODUCT_CONFIG
    transposed = not _row_major(matrix)
    out = torch.empty(rows, columns, dtype=left.dtype, device=left.device)
    programs = multiprocessors(left.device)
    _lora_product_kernel[(programs,)](
        TensorDescriptor.from_tensor(left, [block_t, block_k]),
        TensorDescriptor.from_tensor(
            matrix.T if transposed else matrix, [block_c, block_k] if transposed else [block_k, block_c]
        ),
        TensorDescriptor.from_tensor(out, [block_t, block_c // 2]),
        bias, skinny, update, rows, columns, reduced, rank, update.stride(0), update.stride(1), scale,
        HAS_BIAS=bias is not None, TRANSPOSED=transposed, BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_K=block_k,
        BLOCK_R=_bucket(rank), GROUP=group, PROGRAMS=programs, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def launch_lora_up(out, left, right, scale, threshold, seed):
    """out += scale * mask∘(left rightᵀ) in place; out (rows, columns) contiguous, right (columns, rank)."""
    rows, columns = out.shape
    rank = left.shape[1]
    block_t, block_c, warps, stages = _config("up", rank, out)
    _lora_up_kernel[(triton.cdiv(columns, block_c), triton.cdiv(rows, block_t))](
        out, left, right, seed, rows, columns, rank, right.stride(0), right.stride(1), scale, threshold,
        DROPOUT=threshold > 0, PRECISION=_precision(out.dtype),
        BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_R=_bucket(rank), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def launch_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    threshold: int,
    keep_scale: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ and h = drop(x) Aᵀ.

    Args:
        x: (rows, in_features), unit column stride.
        weight, bias, lora_A, lora_B: as in `sensilora.ops.lora_linear`.
        threshold, keep_scale: of the dropout mask; threshold 0 means none.
        seed: int64 tensor of one element on x's device, or None without dropout.
    """
    rows, rank = x.shape[0], lora_A.shape[0]
    if rows == 0 or rank == 0:
        return torch.nn.functional.linear(x, weight, bias), x.new_empty(rows, rank)
    h = launch_lora_down(x, lora_A, threshold, keep_scale, seed)
    if product_serves(x, weight.T, rank):
        return launch_lora_product(x, weight.T, bias, h, lora_B, scaling), h
    y = torch.nn.functional.linear(x, weight, bias)
    launch_lora_up(y, h, lora_B, scaling, 0, None)
    return y, h


def launch_lora_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    threshold: int,
    keep_scale: float,
    seed: torch.Tensor | None,
    need_grad_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (empty unless needed), A and B, the last two in their dtypes; grad (rows, out) contiguous."""
    rows, rank = x.shape[0], lora_B.shape[1]
    if rows == 0 or rank == 0:
        grad_x = torch.mm(grad, weight) if need_grad_x else x.new_empty(0)
        return grad_x, torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    q, grad_B = launch_lora_grad_b(grad, h, lora_B, scaling)
    pending = False
    if not need_grad_x:
        grad_x = x.new_empty(0)
    elif threshold == 0 and product_serves(grad, weight, rank):
        grad_x = launch_lora_product(grad, weight, None, q, lora_A.T, 1.0)
    else:
        # After grad_b and before grad_a, which then finds the last rows of grad_x in L2.
        grad_x, pending = torch.mm(grad, weight), True
    fused = pending and rank <= MAX_BLOCK_RANK
    grad_A = launch_lora_grad_a(x, q, lora_A, grad_x if fused else None, threshold, keep_scale, seed)
    if pending and not fused:
        launch_lora_up(grad_x, q, lora_A.T, keep_scale, threshold, seed)
    return grad_x, grad_A, grad_B


def launch_lora_grad_b(grad, h, lora_B, scaling):
    """q = s dY B in dY's dtype, and dB = s dYᵀ h in B's dtype."""
    rows, out_features = grad.shape
    rank, bucket = h.shape[1], _bucket(h.shape[1])
    block_t, block_n, warps, stages, per_sm = _config("grad_b", rank, grad)
    strips = triton.cdiv(out_features, block_n)
    row_tiles = triton.cdiv(rows, block_t)
    splits = _splits(row_tiles, strips, per_sm, grad.device)
    q_partial = torch.empty(strips, rows, rank, dtype=torch.float32, device=grad.device)
    b_partial = torch.empty(splits, out_features, rank, dtype=torch.float32, device=grad.device)
    _lora_grad_b_kernel[(strips, splits, triton.cdiv(rank, bucket))](
        grad, h, lora_B, q_partial, b_partial, rows, out_features, rank, lora_B.stride(0),
        lora_B.stride(1), row_tiles,
        EVEN_N=out_features % block_n == 0, PRECISION=_precision(grad.dtype),
        BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_R=bucket, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    q = torch.empty(rows, rank, dtype=grad.dtype, device=grad.device)
    grad_B = torch.empty(out_features, rank, dtype=lora_B.dtype, device=grad.device)
    programs = triton.cdiv(q.numel(), REDUCE_BLOCK)
    _reduce_kernel[(programs + triton.cdiv(grad_B.numel(), REDUCE_BLOCK),)](
        q_partial, q, q.numel(), strips, programs, b_partial, grad_B, grad_B.numel(), splits, scaling,
        BLOCK=REDUCE_BLOCK,
    )  # fmt: skip
    return q, grad_B


def launch_lora_grad_a(x, q, lora_A, grad_x, threshold, keep_scale, seed):
    """dA = qᵀ drop(x) in A's dtype; adds mask∘(q A) to grad_x in place unless it is None."""
    rows, in_features = x.shape
    rank, bucket = q.shape[1], _bucket(q.shape[1])
    block_t, block_k, warps, stages, per_sm = _config("grad_a_dropout" if threshold else "grad_a", rank, x)
    strips = triton.cdiv(in_features, block_k)
    row_tiles = triton.cdiv(rows, block_t)
    splits = _splits(row_tiles, strips, per_sm, x.device)
    a_partial = torch.empty(splits, rank, in_features, dtype=torch.float32, device=x.device)
    _lora_grad_a_kernel[(strips, splits, triton.cdiv(rank, bucket))](
        x, q, lora_A, grad_x, a_partial, seed, rows, in_features, rank, x.stride(0), lora_A.stride(0),
        lora_A.stride(1), threshold, keep_scale, row_tiles,
        UPDATE_GRAD_X=grad_x is not None, DROPOUT=threshold > 0, EVEN_K=in_features % block_k == 0,
        PRECISION=_precision(x.dtype), BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_R=bucket, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    grad_A = torch.empty(rank, in_features, dtype=lora_A.dtype, device=x.device)
    programs = triton.cdiv(grad_A.numel(), REDUCE_BLOCK)
    _reduce_kernel[(programs,)](
        a_partial, grad_A, grad_A.numel(), splits, programs, a_partial, grad_A, 0, 0, 1.0, BLOCK=REDUCE_BLOCK
    )
    return grad_A
