"""LoRA forward and backward around the base product, for one projection or several that share their input.

    forward   h = drop(x) Aᵀ            one read of x, for all projections together
              y = x Wᵀ + b + s h Bᵀ     one product that adds the update in its accumulator
    backward  q = s dY B                one read of dY
              dx = Σ (dY W + mask∘(q A))  one product over all projections, or one each, likewise
              dA = qᵀ drop(x), dB = s dYᵀ h   one read of x and of dY, while that product runs

On Hopper the product starts while h or q is still being computed, waits for it before its first tile is finished, and
leaves room beside it for the two passes behind it (programmatic dependent launch); these only move bytes, so they
cost little next to a product that only computes. Elsewhere the base product is cuBLAS's, and the update one read and
write of y or dx.

Nothing is atomic, so results repeat bit for bit. The rank is a run-time value: h and q are padded with zero columns
to a multiple of 16, only the bucket (16, 32, 64, 128) is compiled in, and ranks above go in blocks. A and B are read
in their own dtype and rounded to x's in registers.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from sensilora.kernels._common import drop, keep_mask, multiprocessors, sum_partials

MAX_BLOCK_RANK = 128


@triton.jit
def _stacked(matrices, ranks, strides, r, ALIGNED: tl.constexpr):
    """Pointers to row r of matrices stacked with each padded to a multiple of 16, and which r exist.

    ALIGNED: each row begins at a multiple of 16 bytes, which the compiler cannot see through the choice of a matrix.
    """
    if len(matrices) == 1:
        pointers = matrices[0] + r.to(tl.int64) * strides[0]
        inside = r < ranks[0]
    else:
        pointers = matrices[0] + r.to(tl.int64) * 0
        inside = r < 0
        first = 0
        for i in tl.static_range(len(matrices)):
            here = (r >= first) & (r < first + ranks[i])
            pointers = tl.where(here, matrices[i] + (r - first).to(tl.int64) * strides[i], pointers)
            inside = inside | here
            first += (ranks[i] + 15) // 16 * 16
        if ALIGNED:
            pointers = tl.multiple_of(pointers, 16)
    return pointers, inside


@triton.jit
def _finish_after_previous():
    """Make this launch complete only after the one before it, which it overlapped.

    One program that waits is enough.
    """
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        gdc_wait()


@triton.jit(do_not_specialize=["threshold"])
def _lora_down_kernel(
    x,
    matrices,
    h,
    seed,
    rows,
    in_features,
    ranks,
    strides_r,
    stride_k,
    columns,
    h_stride,
    scale,
    threshold,
    split_size,
    DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h (rows, columns) = scale * drop(x) Aᵀ for stacked A; a split adds its share of in_features to a stack of h."""
    if OVERLAP:
        gdc_launch_dependents()
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = first_row + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    a_rows, in_stack = _stacked(matrices, ranks, strides_r, r, ALIGNED)
    if DROPOUT:
        key = tl.load(seed)
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for first_k in range(split * split_size, min(in_features, (split + 1) * split_size), BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        inside_x = (t < rows)[:, None]
        inside_a = in_stack[None, :]
        if not EVEN_K:
            inside_x = inside_x & (k < in_features)[None, :]
            inside_a = inside_a & (k < in_features)[:, None]
        x_tile = tl.load(x + t[:, None] * in_features + k[None, :], mask=inside_x, other=0.0)
        if DROPOUT:
            x_tile = drop(x_tile, key, first_row, first_k, threshold)
        a_tile = tl.load(a_rows[None, :] + k[:, None] * stride_k, mask=inside_a, other=0.0)
        total = tl.dot(x_tile, a_tile.to(x_tile.dtype), total, input_precision=PRECISION)
    h_tile = h + (split.to(tl.int64) * rows + t[:, None]) * h_stride + r[None, :]
    inside = (t < rows)[:, None] & (r < columns)[None, :]
    tl.store(h_tile, (total * scale).to(h.dtype.element_ty), mask=inside)
    if OVERLAP:
        _finish_after_previous()


@triton.jit
def _accumulate(total, left, matrix, first_t, first_c, reduced, TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr):
    """total + left matrix for one tile.

    matrix is stored (reduced, columns), or (columns, reduced) where TRANSPOSED.
    """
    for k in range(0, reduced, BLOCK_K):
        right = matrix.load([first_c, k]).T if TRANSPOSED else matrix.load([k, first_c])
        total = tl.dot(left.load([first_t, k]), right, total)
    return total


@triton.jit
def _tile_order(tile, tiles_t, tiles_c, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP row tiles share their columns while these are in L2."""
    first = tile // (GROUP * tiles_c) * GROUP
    group = min(tiles_t - first, GROUP)
    return first + tile % (GROUP * tiles_c) % group, tile % (GROUP * tiles_c) // group


@triton.jit
def _update_tile(matrices, ranks, strides_r, stride_c, r, c, columns, ALIGNED: tl.constexpr):
    """Rows r and columns c of the stacked matrices, (len(r), len(c)), zero where there are none."""
    pointers, in_stack = _stacked(matrices, ranks, strides_r, r, ALIGNED)
    inside = in_stack[:, None] & (c < columns)[None, :]
    return tl.load(pointers[:, None] + c.to(tl.int64)[None, :] * stride_c, mask=inside, other=0.0)


@triton.jit
def _skinny_tile(skinny, skinny_stride, t, r, rows, stack):
    inside = (t < rows)[:, None] & (r < stack)[None, :]
    return tl.load(skinny + t.to(tl.int64)[:, None] * skinny_stride + r[None, :], mask=inside, other=0.0)


@triton.jit
def _add_update(
    total, skinny, skinny_stride, updates, ranks, strides_r, stride_c, scale, seeds, thresholds, keep_scales, rows,
    columns, first_t, first_c, dtype: tl.constexpr, DROPOUT: tl.constexpr, STACKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """total + scale * Σ mask_i∘(skinny_i update_i).

    One mask for the whole stack, or with STACKS > 1 one an update.
    """
    BLOCK_T: tl.constexpr = total.shape[0]
    BLOCK_C: tl.constexpr = total.shape[1]
    t = first_t + tl.arange(0, BLOCK_T)
    c = first_c + tl.arange(0, BLOCK_C)
    first = 0
    for i in tl.static_range(STACKS):
        if STACKS == 1:
            members, sizes, strides = updates, ranks, strides_r
        else:
            members, sizes, strides = (updates[i],), (ranks[i],), (strides_r[i],)
        stack = 0
        for j in tl.static_range(len(members)):
            stack += (sizes[j] + 15) // 16 * 16
        update = total
        if DROPOUT:
            update = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        for first_r in tl.range(0, stack, BLOCK_R, num_stages=1):
            r = first_r + tl.arange(0, BLOCK_R)
            left = _skinny_tile(skinny + first, skinny_stride, t, r, rows, stack)
            right = _update_tile(members, sizes, strides, stride_c, r, c, columns, ALIGNED)
            update = tl.dot(left, (scale * right).to(dtype), update)
        if DROPOUT:
            if thresholds[i] > 0:
                total = _add_masked(total, update, seeds + i, thresholds[i], keep_scales[i], first_t, first_c)
            else:
                total += update
        else:
            total = update
        first += stack
    return total


@triton.jit
def _add_masked(total, update, seed, threshold, keep_scale, first_t, first_c):
    """total + keep_scale * mask∘update."""
    kept = keep_mask(tl.load(seed), first_t, first_c, threshold, total.shape[0], total.shape[1])
    return tl.where(kept, tl.fma(update, keep_scale, total), total)


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store_tile(
    out, total, left, right, bias, skinny, skinny_stride, updates, ranks, strides_r, stride_c, scale, seeds,
    thresholds, keep_scales, rows, columns, first_t, first_c, dtype: tl.constexpr, HAS_BIAS: tl.constexpr,
    UPDATE: tl.constexpr, DROPOUT: tl.constexpr, STACKS: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
    ADD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store in PARTS column parts, each with its share of the update added, and with ADD what is there already.

    Parts take less shared memory, so that the tiles of one more stage have room, and their updates fewer registers.
    With UPDATE it is fetched for each part. Else left right is added where they are given, under one mask.
    """
    BLOCK_C: tl.constexpr = total.shape[1]
    if PARTS == 1:
        if UPDATE:
            total = _add_update(
                total, skinny, skinny_stride, updates, ranks, strides_r, stride_c, scale, seeds, thresholds,
                keep_scales, rows, columns, first_t, first_c, dtype, DROPOUT, STACKS, BLOCK_R, ALIGNED,
            )  # fmt: skip
        elif left is not None:
            total = _add_masked(total, tl.dot(left, right), seeds, thresholds[0], keep_scales[0], first_t, first_c)
        if HAS_BIAS:
            c = first_c + tl.arange(0, BLOCK_C)
            total += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
        if ADD:
            total += out.load([first_t, first_c]).to(tl.float32)
        out.store([first_t, first_c], total.to(out.dtype))
    else:
        low, high = _halves(total)
        right_low, right_high = None, None
        if right is not None:
            right_low, right_high = _halves(right)
        _store_tile(
            out, low, left, right_low, bias, skinny, skinny_stride, updates, ranks, strides_r, stride_c, scale, seeds,
            thresholds, keep_scales, rows, columns, first_t, first_c, dtype, HAS_BIAS, UPDATE, DROPOUT, STACKS,
            BLOCK_R, ALIGNED, ADD, PARTS // 2,
        )  # fmt: skip
        _store_tile(
            out, high, left, right_high, bias, skinny, skinny_stride, updates, ranks, strides_r, stride_c, scale,
            seeds, thresholds, keep_scales, rows, columns, first_t, first_c + BLOCK_C // 2, dtype, HAS_BIAS, UPDATE,
            DROPOUT, STACKS, BLOCK_R, ALIGNED, ADD, PARTS // 2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["thresholds"])
def _lora_product_kernel(
    left0,
    left1,
    left2,
    matrix0,
    matrix1,
    matrix2,
    out,
    bias,
    skinny,
    updates,
    skinny_tiles,
    update_tiles,
    seeds,
    rows,
    columns,
    reduced0,
    reduced1,
    reduced2,
    skinny_stride,
    stack,
    ranks,
    update_strides_r,
    update_stride_c,
    scale,
    thresholds,
    keep_scales,
    PRODUCTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    STACKS: tl.constexpr,
    UPDATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OVERLAP: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """out = Σ left_i matrix_i + bias + scale * skinny updates, persistent, tiles by TMA; the update is one more dot.

    left_i (rows, reduced_i); matrix_i (reduced_i, columns), or TRANSPOSED; skinny (rows, stack); updates stacked
    (stack, columns), with DROPOUT masked; with ADD all is added to out. UPDATE says when they are fetched: "early",
    before the product, "late", after it, both in one block of ranks and under one mask, for each of the "parts" in
    which the tile is stored, or by TMA as a "product" more of skinny_tiles (rows, stack) and update_tiles, stored as
    the matrices are and scaled already.
    """
    tiles_t, tiles_c = tl.cdiv(rows, BLOCK_T), tl.cdiv(columns, BLOCK_C)
    dtype: tl.constexpr = skinny.dtype.element_ty
    programs = tl.num_programs(0)
    for tile in range(tl.program_id(0), tiles_t * tiles_c, programs):
        tile_t, tile_c = _tile_order(tile, tiles_t, tiles_c, GROUP)
        first_t, first_c = tile_t * BLOCK_T, tile_c * BLOCK_C
        # Except for the first tile skinny is there, and its latency and that of the update hide behind the product.
        waited = tile >= programs
        t, c, r = first_t + tl.arange(0, BLOCK_T), first_c + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
        if UPDATE == "early":
            right = _update_tile(updates, ranks, update_strides_r, update_stride_c, r, c, columns, ALIGNED)
            left = _skinny_tile(skinny, skinny_stride, t, r, tl.where(waited, rows, 0), stack)
        total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        total = _accumulate(total, left0, matrix0, first_t, first_c, reduced0, TRANSPOSED, BLOCK_K)
        if PRODUCTS > 1:
            total = _accumulate(total, left1, matrix1, first_t, first_c, reduced1, TRANSPOSED, BLOCK_K)
        if PRODUCTS > 2:
            total = _accumulate(total, left2, matrix2, first_t, first_c, reduced2, TRANSPOSED, BLOCK_K)
        if not waited:
            if OVERLAP:
                gdc_wait()
                gdc_launch_dependents()
            if UPDATE == "early":
                left = _skinny_tile(skinny, skinny_stride, t, r, rows, stack)
        if UPDATE == "late":
            right = _update_tile(updates, ranks, update_strides_r, update_stride_c, r, c, columns, ALIGNED)
            left = _skinny_tile(skinny, skinny_stride, t, r, rows, stack)
        if UPDATE == "product":
            total = _accumulate(total, skinny_tiles, update_tiles, first_t, first_c, stack, TRANSPOSED, BLOCK_K)
        elif UPDATE != "parts" and not DROPOUT:
            total = tl.dot(left, (scale * right).to(dtype), total)
        masked_left, masked_right = None, None
        if UPDATE != "parts" and DROPOUT:
            masked_left, masked_right = left, (scale * right).to(dtype)
        _store_tile(
            out, total, masked_left, masked_right, bias, skinny, skinny_stride, updates, ranks, update_strides_r,
            update_stride_c, scale, seeds, thresholds, keep_scales, rows, columns, first_t, first_c, dtype, HAS_BIAS,
            UPDATE == "parts", DROPOUT, STACKS, BLOCK_R, ALIGNED, ADD, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def _lora_up_kernel(
    out,
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
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out (rows, columns) += scale * mask∘(skinny updates), where the base product has been computed before."""
    # The last rows first: what the base product wrote last is still in L2.
    tiles_c = tl.cdiv(columns, BLOCK_C)
    first_row = ((tl.num_programs(0) - 1 - tl.program_id(0)) // tiles_c).to(tl.int64) * BLOCK_T
    first_column = tl.program_id(0) % tiles_c * BLOCK_C
    t = first_row + tl.arange(0, BLOCK_T)
    c = first_column + tl.arange(0, BLOCK_C)
    inside = (t < rows)[:, None] & (c < columns)[None, :]
    tile = out + t[:, None] * columns + c[None, :]
    base = tl.load(tile, mask=inside, other=0.0)
    update = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for first_r in tl.range(0, stack, BLOCK_R, num_stages=1):
        r = first_r + tl.arange(0, BLOCK_R)
        left = _skinny_tile(skinny, skinny_stride, t, r, rows, stack)
        right = _update_tile(updates, ranks, update_strides_r, update_stride_c, r, c, columns, ALIGNED)
        update = tl.dot(left, right.to(left.dtype), update, input_precision=PRECISION)
    if DROPOUT:
        update = drop(update, tl.load(seed), first_row, first_column, threshold)
    tl.store(tile, (base.to(tl.float32) + scale * update).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["ranks", "threshold", "row_tiles"])
def _lora_outer_kernel(
    left,
    skinny,
    outs,
    partial,
    matrices,
    grad_x,
    seed,
    rows,
    columns,
    skinny_stride,
    stack,
    ranks,
    out_strides_r,
    out_stride_c,
    matrix_strides_r,
    matrix_stride_c,
    scale,
    threshold,
    row_tiles,
    SPLIT: tl.constexpr,
    UPDATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_C: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One read of left (rows, columns): out_i (columns, rank_i) = scale * drop(left)ᵀ skinny_i, for stacked skinny.

    With SPLIT a program's share of the rows goes to a stack of partial sums (splits, stack, columns). With UPDATE
    also grad_x += scale * mask∘(skinny matrices); the compiler makes the mask once for both.
    """
    if OVERLAP:
        # No wait: q is complete, since the product before starts this launch only after its own wait for q.
        gdc_launch_dependents()
    first_c = tl.program_id(0) * BLOCK_C
    split = tl.program_id(1)
    c = first_c + tl.arange(0, BLOCK_C)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    dtype: tl.constexpr = left.dtype.element_ty
    if UPDATE:
        update_tile = _update_tile(matrices, ranks, matrix_strides_r, matrix_stride_c, r, c, columns, ALIGNED).to(
            dtype
        )
    if DROPOUT:
        key = tl.load(seed)
    total = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for turn in range(tl.cdiv(row_tiles, tl.num_programs(1))):
        # Neighbouring programs take neighbouring tiles, and the last rows come first: what the product before wrote
        # last is still in L2.
        first_row = (row_tiles - 1 - (turn * tl.num_programs(1) + split).to(tl.int64)) * BLOCK_T
        t = first_row + tl.arange(0, BLOCK_T)
        inside_t = (t >= 0) & (t < rows)
        inside = inside_t[:, None]
        if not EVEN_C:
            inside = inside & (c < columns)[None, :]
        left_tile = tl.load(left + t[:, None] * columns + c[None, :], mask=inside, other=0.0)
        skinny_tile = tl.load(
            skinny + t[:, None] * skinny_stride + r[None, :], mask=inside_t[:, None] & (r < stack)[None, :], other=0.0
        )
        if DROPOUT:
            left_tile = drop(left_tile, key, first_row, first_c, threshold, MOVE_WORDS=True)
        total = tl.dot(tl.trans(left_tile), skinny_tile, total, input_precision=PRECISION)
        if UPDATE:
            update = tl.dot(skinny_tile, update_tile, input_precision=PRECISION)
            if DROPOUT:
                update = drop(update, key, first_row, first_c, threshold, MOVE_WORDS=True)
            pointers = grad_x + t[:, None] * columns + c[None, :]
            base = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            tl.store(pointers, (base + scale * update).to(dtype), mask=inside)
    if SPLIT:
        pointers = partial + (split.to(tl.int64) * stack + r[None, :]) * columns + c[:, None]
        tl.store(pointers, scale * total, mask=(c < columns)[:, None] & (r < stack)[None, :])
    else:
        out_rows, in_stack = _stacked(outs, ranks, out_strides_r, r, ALIGNED)
        pointers = out_rows[None, :] + c.to(tl.int64)[:, None] * out_stride_c
        inside = (c < columns)[:, None] & in_stack[None, :]
        tl.store(pointers, (scale * total).to(outs[0].dtype.element_ty), mask=inside)
    if OVERLAP:
        _finish_after_previous()


@triton.jit(do_not_specialize=["first_rows", "stacks", "splits", "ranks"])
def _reduce_kernel(
    partials, first_rows, stacks, splits, columns, outs, ranks, strides_r, strides_c, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each out (rank, columns) = the sum of its partial (splits, stack, columns) over splits, in order."""
    row = tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(outs)):
        if (row >= 0) & (row < ranks[i]):
            index = (first_rows[i] + row).to(tl.int64) * columns[i] + c
            # A size of 1 arrives as a Python number.
            size = tl.cast(stacks[i], tl.int64) * columns[i]
            total = sum_partials(partials[i], index, size, splits[i], SPLITS)
            pointers = outs[i] + row.to(tl.int64) * strides_r[i] + c.to(tl.int64) * strides_c[i]
            tl.store(pointers, total.to(outs[i].dtype.element_ty), mask=c < columns[i])
        row -= ranks[i]


# Tile sizes by kernel and rank bucket: (BLOCK_T, BLOCK of columns, num_warps, num_stages), and for the outer products
# the programs aimed at a multiprocessor. "beside" ones find room beside a product. A long product's tiles leave
# enough idle multiprocessors at its end; "behind" ones wait for those with larger tiles of their own.
CONFIGS: dict[str, dict[int, tuple[int, ...]]] = {
    "down": {16: (32, 128, 4, 4), 32: (32, 128, 4, 4), 64: (64, 128, 4, 4), 128: (32, 64, 4, 4)},
    "down_dropout": {16: (64, 128, 4, 4), 32: (64, 128, 4, 4), 64: (64, 64, 4, 4), 128: (32, 64, 4, 4)},
    "down_beside": {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 32, 4, 4), 128: (32, 64, 4, 3)},
    "up": {16: (64, 128, 4, 2), 32: (64, 128, 4, 2), 64: (128, 64, 4, 2), 128: (128, 64, 4, 2)},
    "outer": {16: (64, 64, 4, 3, 4), 32: (64, 128, 4, 3, 2), 64: (128, 64, 4, 3, 2), 128: (64, 64, 4, 3, 2)},
    "outer_dropout": {16: (32, 64, 4, 4, 4), 32: (32, 64, 4, 4, 4), 64: (64, 64, 4, 3, 2), 128: (64, 64, 4, 3, 2)},
    "outer_dropout_beside": {
        16: (64, 64, 4, 3, 4),
        32: (64, 64, 4, 3, 4),
        64: (64, 64, 4, 3, 4),
        128: (64, 64, 4, 2, 4),
    },
    "outer_behind": {16: (64, 128, 4, 3, 2), 32: (64, 128, 4, 3, 2), 64: (64, 64, 4, 3, 2), 128: (64, 64, 4, 2, 2)},
    "outer_beside": {16: (64, 64, 4, 3, 2), 32: (64, 64, 4, 3, 2), 64: (64, 64, 4, 3, 2), 128: (64, 64, 4, 2, 2)},
}
# Bytes of shared memory a block may take for which they were chosen: an A100's; the H100 and H200 have more.
TUNED_SHARED_MEMORY = 160 * 1024
REDUCE_BLOCK = 256
# BLOCK_T, BLOCK_C, BLOCK_K, num_warps, num_stages of the product, tuned at 8192 rows, and in how many parts a
# tile is stored, without and with dropout. With few rows cuBLAS splits the reduction, which this kernel does not.
PRODUCT_CONFIG = (128, 256, 64, 8, 3)
PRODUCT_PARTS = (2, 4)
PRODUCT_MIN_ROWS = 2048
# The largest rank of an update that it takes as one more product, or else, as with a mask of its own.
PRODUCT_MAX_RANK = 512
PRODUCT_MAX_BLOCK_RANK = 128
PRODUCTS = 3
# The largest stack whose update fits the registers beside the accumulator. The cap leaves registers for the passes
# that run beside the product.
EARLY_RANK = 32
# Stacks from which an update without a mask is one more product by TMA, and the passes for h and q, then those for dA
# and dB, are cuBLAS's.
DENSE_UPDATE = 64
DENSE_DOWN = 65
DENSE_OUTER = 129
# Up to so many rows the passes run beside a product of cuBLAS's in a CUDA graph; it leaves room for them.
FORK_MAX_ROWS = 128
PRODUCT_REGISTERS = 208
# Elements of the weights from which a product counts as long.
LONG_PRODUCT = 2**25
# Row tiles that share their columns in L2 (GROUP), for a reduction of up to LONG_REDUCTION and for a longer one.
PRODUCT_GROUPS = (16, 8)
LONG_REDUCTION = 8192


def _config(kernel: str, stack: int, like: torch.Tensor, *, update: bool = False) -> tuple[int, ...]:
    """The entry of CONFIGS for tensors like this one; `update`: of a pass that adds to grad_x too."""
    return fitted_config(
        kernel,
        _bucket(stack),
        fp32=like.dtype == torch.float32,
        small=like.is_cuda and _shared_memory(like.device) < TUNED_SHARED_MEMORY,
        wgmma=not like.is_cuda or _is_hopper(like.device),
        update=update,
    )


def fitted_config(kernel: str, bucket: int, *, fp32: bool, small: bool, wgmma: bool, update: bool) -> tuple[int, ...]:
    """The entry of CONFIGS, made smaller where fp32 or another GPU than the one it was tuned for would not fit it.

    Args:
        small: whether a block may take less shared memory.
        wgmma: whether products take their operands from shared memory, as Hopper's do, and not from registers.
        update: whether the pass adds an update to grad_x too.
    """
    rows, columns, warps, stages, *rest = CONFIGS[kernel][bucket]
    if fp32 or small:
        columns, stages = max(32, columns // 2), 2
    # Or the tiles would not fit the registers: the operands' in fp32, or that of the update beside the product's.
    if update and fp32 and bucket >= 64:
        rows, columns, warps = 32, 32, 8
    elif fp32 and (bucket == MAX_BLOCK_RANK or (bucket == 64 and not wgmma)):
        rows, columns, warps = min(rows, 64), 32, 8
    elif update and not wgmma:
        rows = max(32, rows // 2)
    return rows, columns, warps, stages, *rest


@functools.lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a block may take; as the tuned GPU's where torch does not tell."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", TUNED_SHARED_MEMORY)


def padded(rank: int) -> int:
    """Columns of h and q that a rank takes: aligned, so that odd ranks are read as fast as even ones."""
    return -(-rank // 16) * 16


def _bucket(stack: int) -> int:
    return min(MAX_BLOCK_RANK, max(16, _next_power_of_2(stack)))


def _cdiv(a: int, b: int) -> int:
    # triton.cdiv takes microseconds on the host.
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _precision(dtype: torch.dtype) -> str:
    """fp32 products as torch's own: exact unless the user allowed TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _stackable(matrices: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The matrices (rank, other) with one dtype and one stride along the other dimension."""
    first = matrices[0]
    if all(m.dtype == first.dtype and m.stride(1) == first.stride(1) for m in matrices):
        return tuple(matrices)
    dtype = functools.reduce(torch.promote_types, (m.dtype for m in matrices))
    return tuple(m.to(dtype).contiguous() for m in matrices)


def _stack(matrices: tuple[torch.Tensor, ...]) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    """Columns of h that the stacked matrices take, their ranks, their strides along the rank, and along the other."""
    ranks = tuple(m.shape[0] for m in matrices)
    return stack_size(ranks), ranks, tuple(m.stride(0) for m in matrices), matrices[0].stride(1)


def packed(matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A matrix (rank, other) as kernels read it fast: itself, or a copy in like's dtype with contiguous rows.

    Bᵀ of a rank that is no multiple of 16 has its elements side by side where vectors cannot be loaded, and at large
    ranks every tile of the product reads much of it. The copy is as small as the matrix.
    """
    rank = matrix.shape[0]
    if rank <= 16 or (rank % 16 == 0 and rank < 64) or matrix.stride(1) == 1:
        return matrix
    return matrix.to(like.dtype, memory_format=torch.contiguous_format).contiguous()


def dense_stack(matrices, scale: float, like: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """scale * the matrices (rank, other) as one (stack, other) in like's dtype, each padded with zero rows.

    Stored as (other, stack) where `transposed`.
    """
    ranks, other = [m.shape[0] for m in matrices], matrices[0].shape[1]
    shape = (other, stack_size(ranks)) if transposed else (stack_size(ranks), other)
    new = torch.empty if all(rank % 16 == 0 for rank in ranks) else torch.zeros
    stored = new(shape, dtype=like.dtype, device=like.device)
    stack, first = stored.T if transposed else stored, 0
    for matrix, rank in zip(matrices, ranks, strict=True):
        torch.mul(matrix, scale, out=stack[first : first + rank])
        first += padded(rank)
    return stack


def _aligned(matrices: tuple[torch.Tensor, ...]) -> bool:
    """Whether every row of the matrices (rank, other) begins at a multiple of 16 bytes and is contiguous."""
    return all(
        m.stride(1) == 1 and m.stride(0) * m.element_size() % 16 == 0 and m.data_ptr() % 16 == 0 for m in matrices
    )


def _splits(tiles: int, steps: int, device: torch.device, programs_per_sm: int = 1) -> int:
    """How many programs share the reduction of a tile, so that few tiles still fill the device."""
    return max(1, min(steps, multiprocessors(device) * programs_per_sm // tiles))


def _overlapping(overlap: bool) -> dict[str, bool]:
    """Launch options of a kernel that may start before the one before it has ended."""
    return {"launch_pdl": True} if overlap else {}


def launch_reduce(pending):
    """For each (partial (splits, stack, columns), outs): the stacked outs (rank, columns) = the sum over splits."""
    if not pending:
        return
    jobs = []
    for partial, outs in pending:
        splits, stack, columns = partial.shape
        first_row = 0
        for out in outs:
            jobs.append((partial, first_row, stack, splits, columns, out, out.shape[0], out.stride(0), out.stride(1)))
            first_row += padded(out.shape[0])
    arguments = tuple(zip(*jobs, strict=True))
    columns, ranks = max(arguments[4]), sum(arguments[6])
    block = min(REDUCE_BLOCK, _next_power_of_2(columns))
    splits = min(16, _next_power_of_2(max(arguments[3])))
    _reduce_kernel[(_cdiv(columns, block), ranks)](*arguments, SPLITS=splits, BLOCK=block)


def launch_lora_down(x, matrices, h, scale, threshold, seed, *, beside=False, overlap=False):
    """h (rows, stack) = scale * drop(x) Aᵀ for stacked A (rank, in_features), h's padding zero.

    `beside` leaves room for a product that is launched next; `overlap` starts beside the launch before.
    """
    rows, in_features = x.shape
    matrices = _stackable(matrices)
    stack, ranks, strides_r, stride_k = _stack(matrices)
    name = "down_dropout" if threshold else "down_beside" if beside else "down"
    block_t, block_k, warps, stages = _config(name, stack, x)
    block_r = _bucket(stack)
    row_tiles, rank_tiles = _cdiv(rows, block_t), _cdiv(stack, block_r)
    # Two steps a program at least, or summing the partial sums costs more than it saves.
    splits = 1 if beside else _splits(row_tiles * rank_tiles, _cdiv(in_features, 2 * block_k), x.device)
    split_size = _cdiv(_cdiv(in_features, splits), block_k) * block_k
    partial = torch.empty(splits, rows, stack, dtype=torch.float32, device=x.device) if splits > 1 else None
    out = h if partial is None else partial
    _lora_down_kernel[(row_tiles, rank_tiles, splits)](
        x, matrices, out, seed, rows, in_features, ranks, strides_r, stride_k, stack, out.stride(-2), scale,
        threshold,
        split_size,
        DROPOUT=threshold > 0, EVEN_K=in_features % block_k == 0, ALIGNED=_aligned(matrices),
        PRECISION=_precision(x.dtype), OVERLAP=beside and x.is_cuda,
        BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=warps, num_stages=stages,
        **_overlapping(overlap),
    )  # fmt: skip
    if partial is not None:
        launch_reduce([(partial, (h,))])


def _down_matrix(matrix, scale, like, beside):
    """A matrix (rank, other) as `_down` takes it."""
    if beside and padded(matrix.shape[0]) >= DENSE_DOWN:
        return dense_stack([matrix], scale, like)
    return packed(matrix, like)


def _down(x, matrix, h, scale, *, beside, overlap):
    """h = scale * x matrixᵀ, by cuBLAS where it is large."""
    if beside and h.shape[1] >= DENSE_DOWN:
        torch.mm(x, matrix.T, out=h)
    else:
        launch_lora_down(x, [matrix], h, scale, 0, None, beside=beside, overlap=overlap)


@functools.lru_cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _row_major(matrix: torch.Tensor) -> bool:
    """Whether a tensor descriptor can read it: unit column stride, rows and base aligned to 16 bytes."""
    itemsize = matrix.element_size()
    return matrix.stride(1) == 1 and matrix.stride(0) * itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0


def product_serves(left: torch.Tensor, matrix: torch.Tensor, rank: int, dense: bool = False) -> bool:
    """Whether `launch_lora_product` can compute left matrix + ..., and was measured to beat cuBLAS plus a pass.

    `dense`: a large update may be one more product.
    """
    return (
        _is_hopper(left.device)
        and left.dtype in (torch.bfloat16, torch.float16)
        and left.shape[0] >= PRODUCT_MIN_ROWS
        and rank <= (PRODUCT_MAX_RANK if dense else PRODUCT_MAX_BLOCK_RANK)
        and matrix.shape[1] * left.element_size() % 16 == 0
        and _row_major(left)
        and (_row_major(matrix) or _row_major(matrix.T))
    )


def product_group(lefts) -> int:
    """GROUP of a product of these lefts (rows, reduced)."""
    return PRODUCT_GROUPS[max(left.shape[1] for left in lefts) > LONG_REDUCTION]


def dense_update(updates, scale: float, like: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """scale * the stacked updates as `launch_lora_product` reads them beside `matrix` (reduced, columns)."""
    return dense_stack(updates, scale, like, transposed=not _row_major(matrix))


def launch_lora_product(
    lefts, matrices, bias, skinny, updates, scale, thresholds, keep_scales, seeds, *, add_to=None
):
    """Σ left_i (rows, reduced_i) matrix_i (reduced_i, columns) + bias + scale * skinny (rows, stack) stacked updates.

    With a threshold above 0 every update is masked and scaled by its keep_scale first, with one mask for all where
    there is one seed. `add_to` (rows, columns) is added, in place. `updates` may be what `dense_update` made of them,
    without a mask; then `scale` is in it.
    """
    rows, columns = lefts[0].shape[0], matrices[0].shape[1]
    dense = isinstance(updates, torch.Tensor)
    updates = (updates,) if dense else _stackable(updates)
    stack, ranks, strides_r, stride_c = _stack(updates)
    block_t, block_c, block_k, warps, stages = PRODUCT_CONFIG
    dropout = any(threshold > 0 for threshold in thresholds)
    parts, overlap = PRODUCT_PARTS[dropout], lefts[0].is_cuda
    stacks = len(updates) if dropout and seeds.numel() > 1 else 1
    transposed = not _row_major(matrices[0])
    shape = [block_c, block_k] if transposed else [block_k, block_c]
    out = add_to
    if out is None:
        out = torch.empty(rows, columns, dtype=lefts[0].dtype, device=lefts[0].device)
    missing = [None] * (PRODUCTS - len(lefts))
    tiles = _cdiv(rows, block_t) * _cdiv(columns, block_c)
    # No more programs than finish together.
    programs = _cdiv(tiles, _cdiv(tiles, multiprocessors(out.device)))
    block_r = min(64, _bucket(stack if stacks == 1 else max(map(padded, ranks))))
    if dense:
        update = "product"
    else:
        fits = stacks == 1 and stack <= (EARLY_RANK if dropout else block_r)
        update = "parts" if not fits else "early" if stack <= EARLY_RANK else "late"
    _lora_product_kernel[(programs,)](
        *(TensorDescriptor.from_tensor(left, [block_t, block_k]) for left in lefts), *missing,
        *(TensorDescriptor.from_tensor(m.T if transposed else m, shape) for m in matrices), *missing,
        TensorDescriptor.from_tensor(out, [block_t, block_c // parts]),
        bias, skinny, updates,
        TensorDescriptor.from_tensor(skinny, [block_t, block_k]) if dense else None,
        TensorDescriptor.from_tensor(updates[0].T if transposed else updates[0], shape) if dense else None,
        seeds, rows, columns, *(left.shape[1] for left in lefts), *missing, skinny.stride(0),
        stack, ranks, strides_r, stride_c, scale, tuple(thresholds), tuple(keep_scales),
        PRODUCTS=len(lefts), HAS_BIAS=bias is not None, DROPOUT=dropout, STACKS=stacks,
        UPDATE=update,
        ALIGNED=_aligned(updates), TRANSPOSED=transposed,
        OVERLAP=overlap, ADD=add_to is not None, BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_K=block_k, BLOCK_R=block_r,
        GROUP=product_group(lefts), PARTS=parts, num_warps=warps, num_stages=stages, maxnreg=PRODUCT_REGISTERS,
        **_overlapping(overlap),
    )  # fmt: skip
    return out


def launch_lora_up(out, skinny, updates, scale, threshold, seed):
    """out (rows, columns) += scale * mask∘(skinny (rows, stack) stacked updates (rank, columns)), in place."""
    rows, columns = out.shape
    updates = _stackable(updates)
    stack, ranks, strides_r, stride_c = _stack(updates)
    block_t, block_c, warps, stages = _config("up", stack, out)
    # In one dimension, since the others of a grid end at 65,535.
    _lora_up_kernel[(_cdiv(columns, block_c) * _cdiv(rows, block_t),)](
        out, skinny, updates, seed, rows, columns, skinny.stride(0), stack, ranks, strides_r, stride_c, scale,
        threshold,
        DROPOUT=threshold > 0, ALIGNED=_aligned(updates), PRECISION=_precision(out.dtype), BLOCK_T=block_t,
        BLOCK_C=block_c,
        BLOCK_R=_bucket(stack), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def launch_lora_outer(left, skinny, outs, scale, threshold, seed, *, update=None, overlap=False, long=False):
    """The stacked outs (rank, columns) = scale * skinnyᵀ drop(left), from left (rows, columns), skinny (rows, stack).

    Returns what `launch_reduce` has to sum up yet, so that one launch can do so for several.

    `update`, (grad_x, matrices), also adds scale * mask∘(skinny matrices) to grad_x in place; its stack must fit one
    block. `overlap` starts beside the product that was launched before, a `long` one or not.
    """
    rows, columns = left.shape
    stack, ranks, strides_r, stride_c = _stack(outs)
    if overlap and not threshold and stack >= DENSE_OUTER:
        _dense_outer(left, skinny, outs, scale)
        return []
    grad_x, matrices = (None, outs) if update is None else (update[0], _stackable(update[1]))
    _, _, matrix_strides_r, matrix_stride_c = _stack(matrices)
    name = "outer_dropout" if threshold else "outer"
    if overlap:
        name = "outer_behind" if long and not threshold else name + "_beside"
    block_t, block_c, warps, stages, per_sm = _config(name, stack, left, update=grad_x is not None)
    row_tiles = _cdiv(rows, block_t)
    if row_tiles <= 8:
        block_c = 32  # few rows: more programs, each still reads whole sectors
    block_r = _bucket(stack)
    strips, rank_tiles = _cdiv(columns, block_c), _cdiv(stack, block_r)
    # Eight tiles a program at least, or summing the partial sums costs more than it saves.
    splits = _splits(strips * rank_tiles, max(1, row_tiles // 8), left.device, per_sm)
    # Outs of several dtypes are left to the reduction, which takes them one by one.
    split = splits > 1 or any(out.dtype != outs[0].dtype for out in outs)
    partial = torch.empty(splits, stack, columns, dtype=torch.float32, device=left.device) if split else None
    _lora_outer_kernel[(strips, splits, rank_tiles)](
        left, skinny, outs, partial, matrices, grad_x, seed, rows, columns, skinny.stride(0), stack, ranks, strides_r,
        stride_c, matrix_strides_r, matrix_stride_c, scale, threshold, row_tiles,
        SPLIT=partial is not None, UPDATE=grad_x is not None, DROPOUT=threshold > 0, EVEN_C=columns % block_c == 0,
        ALIGNED=_aligned(outs) and _aligned(matrices), PRECISION=_precision(left.dtype),
        OVERLAP=overlap and left.is_cuda, BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_R=block_r,
        num_warps=warps, num_stages=stages, **_overlapping(overlap),
    )  # fmt: skip
    return [] if partial is None else [(partial, outs)]


def _dense_outer(left, skinny, outs, scale):
    """`launch_lora_outer` by cuBLAS, where a block of ranks less than all would read left several times."""
    product = torch.mm(skinny.T, left, out_dtype=torch.float32)
    first = 0
    for out in outs:
        torch.mul(product[first : first + out.shape[0]], scale, out=out)
        first += padded(out.shape[0])


def stack_size(ranks) -> int:
    """Columns of h for adapters of these ranks."""
    return sum(map(padded, ranks))


def _masks(ranks, thresholds, keep_scales, seeds):
    """The adapters (rank above 0) that share a mask, with its threshold, keep_scale and seed."""
    members = [i for i, rank in enumerate(ranks) if rank > 0]
    if seeds is None or seeds.numel() == 1:
        return [(members, thresholds[0], keep_scales[0], seeds)] if members else []
    return [([i], thresholds[i], keep_scales[i], seeds[i : i + 1]) for i in members]


def _columns(ranks, members) -> slice:
    """The columns of h from the first of the members to the last."""
    first = stack_size(ranks[: members[0]])
    return slice(first, first + stack_size(ranks[members[0] : members[-1] + 1]))


@functools.lru_cache
def _side_stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # or the base product's tiles would be placed first


def _side_stream(like: torch.Tensor) -> torch.cuda.Stream | None:
    """A stream for passes that may run beside the base product of few rows, where a CUDA graph is being captured.

    Outside of graphs forking costs the host more than it saves the device.
    """
    if not like.is_cuda or like.shape[0] > FORK_MAX_ROWS or not torch.cuda.is_current_stream_capturing():
        return None
    side = _side_stream_of(like.device)
    side.wait_stream(torch.cuda.current_stream(like.device))
    return side


def _on(side: torch.cuda.Stream | None):
    return contextlib.nullcontext() if side is None else torch.cuda.stream(side)


def _join(side: torch.cuda.Stream | None, like: torch.Tensor) -> None:
    if side is not None:
        torch.cuda.current_stream(like.device).wait_stream(side)


def launch_lora_group(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    lora_As: list[torch.Tensor],
    lora_Bs: list[torch.Tensor],
    scalings: list[float],
    thresholds: list[int],
    keep_scales: list[float],
    seeds: torch.Tensor | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """y_i = x W_iᵀ + b_i + s_i (drop_i(x) A_iᵀ) B_iᵀ, and every h_i = drop_i(x) A_iᵀ side by side.

    Args:
        x: (rows, in_features), contiguous.
        weights, biases, lora_As, lora_Bs, scalings: one a projection, as in `sensilora.ops.lora_group`.
        thresholds, keep_scales: of the dropout masks; threshold 0 means none.
        seeds: int64 tensor on x's device of one element a projection, or of one where they share a mask; None
            without dropout.
    """
    ranks = [a.shape[0] for a in lora_As]
    rows = x.shape[0]
    h = torch.empty(rows, stack_size(ranks), dtype=x.dtype, device=x.device)
    served = [
        rows > 0 and rank > 0 and product_serves(x, weight.T, rank, True)
        for weight, rank in zip(weights, ranks, strict=True)
    ]
    # Before the chain of launches that overlap, and held until its end.
    updates = [
        dense_update([lora_B.T], scaling, x, weight.T)
        if serves and padded(rank) >= DENSE_UPDATE
        else [packed(lora_B.T, x)]
        for lora_B, scaling, weight, rank, serves in zip(lora_Bs, scalings, weights, ranks, served, strict=True)
    ]
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    masks = {mask[0][0]: mask for mask in _masks(ranks, thresholds, keep_scales, seeds)} if rows > 0 else {}
    dense_As = {
        first: dense_stack([lora_As[i] for i in members], 1.0, x)
        for first, (members, threshold, *_) in masks.items()
        if any(served) and not threshold and stack_size([ranks[i] for i in members]) >= DENSE_DOWN
    }
    side = None if rows == 0 or any(served) else _side_stream(x)
    ys = []
    overlap = False
    for i in range(len(weights)):
        if i in masks:
            members, threshold, keep_scale, seed = masks[i]
            adapters, columns = [lora_As[j] for j in members], h[:, _columns(ranks, members)]
            # A mask is arithmetic, of which a product beside it loses more than the pass takes by itself.
            beside = any(served) and not threshold
            with _on(side):
                if i in dense_As:
                    torch.mm(x, dense_As[i].T, out=columns)
                else:
                    launch_lora_down(
                        x, adapters, columns, keep_scale, threshold, seed, beside=beside, overlap=overlap and beside
                    )
        skinny = h[:, _columns(ranks, [i])]
        overlap = served[i]
        if served[i]:
            product = launch_lora_product(
                [x], [weights[i].T], biases[i], skinny, updates[i], scalings[i], [0], [1.0], None
            )
            ys.append(product)
        else:
            y = torch.nn.functional.linear(x, weights[i], biases[i])
            if rows > 0 and ranks[i] > 0:
                _join(side, x)
                launch_lora_up(y, skinny, updates[i], scalings[i], 0, None)
            ys.append(y)
    _join(side, x)
    return ys, h


def launch_lora_group_backward(
    grads: list[torch.Tensor],
    x: torch.Tensor,
    h: torch.Tensor,
    weights: list[torch.Tensor],
    lora_As: list[torch.Tensor],
    lora_Bs: list[torch.Tensor],
    scalings: list[float],
    thresholds: list[int],
    keep_scales: list[float],
    seeds: torch.Tensor | None,
    need_grad_x: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The gradient of x, of every A and of every B, the last two in their dtypes; grads (rows, out_i) contiguous.

    That of x is empty unless needed.
    """
    ranks = [a.shape[0] for a in lora_As]
    rows = x.shape[0]
    grad_As = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in lora_As]
    grad_Bs = [torch.empty_like(b, memory_format=torch.contiguous_format) for b in lora_Bs]
    adapted = [i for i, rank in enumerate(ranks) if rank > 0]
    if rows == 0 or not adapted:
        for gradient in (*grad_As, *grad_Bs):
            gradient.zero_()
        return _base_grad_x(grads, weights) if need_grad_x else x.new_empty(0), grad_As, grad_Bs
    dense = not any(thresholds)
    fused = (
        need_grad_x
        and len(grads) <= PRODUCTS
        and len({_row_major(weight) for weight in weights}) == 1  # one kernel reads them all
        and all(
            product_serves(grad, weight, stack_size(ranks), dense)
            for grad, weight in zip(grads, weights, strict=True)
        )
    )
    long = x.shape[1] * sum(grad.shape[1] for grad in grads) >= LONG_PRODUCT
    all_adapted = len(grads) == len(adapted) > 1
    own_masks = seeds is not None and seeds.numel() > 1
    if fused and all_adapted and _one_by_one(weights, own_masks):
        return _backward_one_by_one(
            grads, x, h, weights, lora_As, lora_Bs, scalings, thresholds, keep_scales, seeds, grad_As, grad_Bs
        )
    q = torch.empty(rows, stack_size(ranks), dtype=x.dtype, device=x.device)
    side = None if fused else _side_stream(x)
    pending = []
    # Copies first: a launch of another kind between would keep the passes from overlapping. Those that the product
    # reads are held to the end: a pass beside it would else be given their memory for its partial sums.
    updates: torch.Tensor | tuple[torch.Tensor, ...] = ()
    if fused:
        dense = dense and stack_size(ranks) >= DENSE_UPDATE
        updates = dense_update(lora_As, 1.0, x, weights[0]) if dense else _stackable(lora_As)
    seeds = None if seeds is None else seeds.contiguous()
    B_Ts = [_down_matrix(lora_Bs[i].T, scalings[i], x, fused) for i in adapted]
    with _on(side):
        for i, B_T in zip(adapted, B_Ts, strict=True):
            columns = q[:, _columns(ranks, [i])]
            _down(grads[i], B_T, columns, scalings[i], beside=fused, overlap=fused and i != adapted[0])
        if not fused:
            for i in adapted:
                columns = h[:, _columns(ranks, [i])]
                pending += launch_lora_outer(grads[i], columns, (grad_Bs[i].T,), scalings[i], 0, None)
    masks = _masks(ranks, thresholds, keep_scales, seeds)
    grad_x = x.new_empty(0)
    if fused:
        grad_x = launch_lora_product(grads, weights, None, q, updates, 1.0, thresholds, keep_scales, seeds)
    elif need_grad_x:
        # After the passes over dY and before those over x, which then find the last rows of grad_x in L2.
        grad_x = _base_grad_x(grads, weights)
    # One pass over x also updates grad_x, with the mask that it makes for A's gradient anyway; but not where a graph
    # has it on another stream than that which computes grad_x.
    in_one_pass = need_grad_x and not fused and rows > FORK_MAX_ROWS
    with _on(side):
        for members, threshold, keep_scale, seed in masks:
            columns = q[:, _columns(ranks, members)]
            update = None
            if in_one_pass and columns.shape[1] <= MAX_BLOCK_RANK:
                update = (grad_x, [lora_As[i] for i in members])
            outs = tuple(grad_As[i] for i in members)
            pending += launch_lora_outer(
                x, columns, outs, keep_scale, threshold, seed, update=update, overlap=fused, long=long
            )
    _join(side, x)
    if need_grad_x and not fused:
        for members, threshold, keep_scale, seed in masks:
            columns = q[:, _columns(ranks, members)]
            if not in_one_pass or columns.shape[1] > MAX_BLOCK_RANK:
                launch_lora_up(grad_x, columns, [lora_As[i] for i in members], keep_scale, threshold, seed)
    if fused:
        for i in adapted:
            pending += launch_lora_outer(
                grads[i], h[:, _columns(ranks, [i])], (grad_Bs[i].T,), scalings[i], 0, None, overlap=True, long=long
            )
    launch_reduce(pending)
    return grad_x, grad_As, grad_Bs


def _one_by_one(weights: list[torch.Tensor], own_masks: bool) -> bool:
    """Whether dx is summed up by a product for each projection, or by one for all, as measured.

    One product is slower where it is long, and where a tile has several masks to make before it can be stored.
    """
    return own_masks or min(weight.numel() for weight in weights) >= LONG_PRODUCT


def _backward_one_by_one(
    grads, x, h, weights, lora_As, lora_Bs, scalings, thresholds, keep_scales, seeds, grad_As, grad_Bs
):
    """`launch_lora_group_backward` where each projection's product adds to dx; launches run beside the one before."""
    ranks = [a.shape[0] for a in lora_As]
    q = torch.empty(x.shape[0], stack_size(ranks), dtype=x.dtype, device=x.device)
    masks = _masks(ranks, thresholds, keep_scales, None if seeds is None else seeds.contiguous())
    # Copies first, and held to the end, as in launch_lora_group_backward.
    updates = [
        dense_update([a], 1.0, x, weight) if not any(thresholds) and padded(a.shape[0]) >= DENSE_UPDATE else [a]
        for a, weight in zip(lora_As, weights, strict=True)
    ]
    B_Ts = [_down_matrix(lora_B.T, scaling, x, True) for lora_B, scaling in zip(lora_Bs, scalings, strict=True)]
    grad_x, pending = None, []
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        long = weight.numel() >= LONG_PRODUCT
        columns, (members, threshold, keep_scale, seed) = _columns(ranks, [i]), masks[min(i, len(masks) - 1)]
        _down(grad, B_Ts[i], q[:, columns], scalings[i], beside=True, overlap=i > 0)
        grad_x = launch_lora_product(
            [grad], [weight], None, q[:, columns], updates[i], 1.0, [threshold], [keep_scale], seed, add_to=grad_x
        )
        if i == members[-1]:
            # As soon as all of q is there that one pass over x, with one mask, can take.
            outs = tuple(grad_As[j] for j in members)
            skinny = q[:, _columns(ranks, members)]
            pending += launch_lora_outer(x, skinny, outs, keep_scale, threshold, seed, overlap=True, long=long)
        pending += launch_lora_outer(
            grad, h[:, columns], (grad_Bs[i].T,), scalings[i], 0, None, overlap=True, long=long
        )
    launch_reduce(pending)
    return grad_x, grad_As, grad_Bs


def _base_grad_x(grads, weights):
    grad_x = torch.mm(grads[0], weights[0])
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        grad_x.addmm_(grad, weight)
    return grad_x
