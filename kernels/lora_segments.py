"""LoRA forward and backward where every segment of rows has an adapter, and so a rank, of its own.

The passes of kernels/lora_linear.py, with one change: which rows belong to which adapter is read on the device. A
pass over the rows gets one program for every stretch that a row tile and a segment share. There are at most as many
as tiles and segments together, so the grid needs nothing from the device; programs without a stretch end at once.
The gradient of an adapter is summed by programs that walk its segments in order, so results repeat bit for bit.

Adapters are stacked as the caller stacks them: A (Σ ranks, in), B (out, Σ ranks). `ints` holds first row in the
stack, rank and dropout threshold of each, `floats` scaling and keep_scale. Rows of h and q are as wide as the
largest rank; what lies behind a row's own rank is neither written nor read.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from sensilora.kernels._common import drop, multiprocessors
from sensilora.kernels.lora_linear import (
    PRODUCT_CONFIG,
    PRODUCT_REGISTERS,
    _accumulate,
    _bucket,
    _cdiv,
    _config,
    _finish_after_previous,
    _halves,
    _next_power_of_2,
    _overlapping,
    _precision,
    _row_major,
    _splits,
    _tile_order,
    launch_reduce,
    padded,
    product_serves,
)

MAX_BLOCK_RANK = 64
# Row tiles that share their columns in L2: eight adapters took 1.095 of one adapter's time with 8, and 1.106 with 16.
GROUP = 8
# Ranks that are treated as few: read in a block of their own size, and in the product fetched before a tile's sum.
FIRST_RANKS = tl.constexpr(16)
# Rows and columns that a program packs.
PACK_BLOCKS = (32, 64)


@triton.jit
def _starts(offsets, segments, rows, BLOCK_S: tl.constexpr):
    """Where each segment begins and the last one ends, cut off at the last row; behind them what no row reaches."""
    j = tl.arange(0, BLOCK_S)
    starts = tl.load(offsets + j, mask=j <= segments, other=0)
    return tl.where(j <= segments, tl.minimum(tl.maximum(starts, 0), rows), 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _segment(offsets, adapters, ints, segments, count, rows, j):
    """Begin and end of segment j, and its adapter, first row in the stack and rank; rank 0 where there is none."""
    exists = (j >= 0) & (j < segments)
    begin = tl.minimum(tl.load(offsets + j, mask=exists, other=0), rows)
    end = tl.minimum(tl.load(offsets + j + 1, mask=exists, other=0), rows)
    adapter = tl.load(adapters + j, mask=exists, other=-1)
    adapted = (adapter >= 0) & (adapter < count)
    adapter = tl.where(adapted, adapter, 0)
    first = tl.load(ints + 3 * adapter, mask=adapted, other=0)
    rank = tl.load(ints + 3 * adapter + 1, mask=adapted, other=0)
    return begin, end, adapter, first, rank


@triton.jit
def _stretch(offsets, adapters, ints, segments, count, rows, slot, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """The slot-th stretch of rows between one beginning of a tile or segment and the next.

    Returns its tile's first row, its begin and end, and its adapter as `_segment` does.
    """
    starts = _starts(offsets, segments, rows, BLOCK_S)
    # A segment's beginning comes behind those of the segments and tiles before it, and of a tile that begins with it.
    position = tl.where(starts <= rows, tl.arange(0, BLOCK_S) + starts // BLOCK_T + 1, 0x7FFFFFFFFFFFFFFF)
    j = tl.sum((position <= slot).to(tl.int32)) - 1
    first_row = (slot - (j + 1)).to(tl.int64) * BLOCK_T
    begin, end, adapter, first, rank = _segment(offsets, adapters, ints, segments, count, rows, j)
    return first_row, tl.maximum(begin, first_row), tl.minimum(end, first_row + BLOCK_T), adapter, first, rank


@triton.jit
def _segments_pack_kernel(
    matrices, outs, stack, columns, strides_r, strides_c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Each out (stack, columns), contiguous, = its matrix in out's dtype."""
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    for i in tl.static_range(len(matrices)):
        if tl.program_id(2) == i:
            inside = (r < stack)[:, None] & (c < columns[i])[None, :]
            index_r, index_c = r.to(tl.int64)[:, None], c.to(tl.int64)[None, :]
            values = tl.load(matrices[i] + index_r * strides_r[i] + index_c * strides_c[i], mask=inside, other=0.0)
            tl.store(outs[i] + index_r * columns[i] + index_c, values.to(outs[i].dtype.element_ty), mask=inside)


@triton.jit
def _down_stretch(
    x, matrix, h, key, threshold, scale, rows_inside, first_row, in_features, first, rank, first_r, stride_r,
    stride_k, h_stride,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h = scale * drop(x) Aᵀ for the rows inside and BLOCK_R ranks of one adapter, from first_r on."""
    t = first_row + tl.arange(0, BLOCK_T)
    r = first_r + tl.arange(0, BLOCK_R)
    inside_r = r < rank
    a_rows = matrix + (first + r).to(tl.int64) * stride_r
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for first_k in range(0, in_features, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        inside_x, inside_a = rows_inside[:, None], inside_r[None, :]
        if not EVEN_K:
            inside_x = inside_x & (k < in_features)[None, :]
            inside_a = inside_a & (k < in_features)[:, None]
        x_tile = tl.load(x + t[:, None] * in_features + k[None, :], mask=inside_x, other=0.0)
        if DROPOUT:
            x_tile = drop(x_tile, key, first_row, first_k, threshold)
        a_tile = tl.load(a_rows[None, :] + k[:, None].to(tl.int64) * stride_k, mask=inside_a, other=0.0)
        total = tl.dot(x_tile, a_tile.to(x_tile.dtype), total, input_precision=PRECISION)
    h_tile = h + t[:, None] * h_stride + r[None, :]
    tl.store(h_tile, (total * scale).to(h.dtype.element_ty), mask=rows_inside[:, None] & inside_r[None, :])


@triton.jit(do_not_specialize=["segments", "count"])
def _segments_down_kernel(
    x, matrix, h, seed, offsets, adapters, ints, scales, rows, in_features, segments, count, stride_r, stride_k,
    h_stride,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """h = scale * drop(x) Aᵀ, each row with its own adapter's A (stack, in_features), scale and dropout."""
    if OVERLAP:
        # The packed matrices are there, for the product too, which starts from here on.
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.program_id(0)
    first_row, begin, end, adapter, first, rank = _stretch(
        offsets, adapters, ints, segments, count, rows, slot, BLOCK_T, BLOCK_S
    )
    t = first_row + tl.arange(0, BLOCK_T)
    rows_inside = (t >= begin) & (t < end)
    first_r = tl.program_id(1) * BLOCK_R
    key, threshold = 0, 0
    if DROPOUT:
        key, threshold = tl.load(seed), tl.load(ints + 3 * adapter + 2)
    scale = tl.load(scales + 2 * adapter)
    if (begin < end) & (first_r < rank):
        # A small adapter among large ones is not read as one of them.
        if rank <= FIRST_RANKS:
            _down_stretch(
                x, matrix, h, key, threshold, scale, rows_inside, first_row, in_features, first, rank, first_r,
                stride_r, stride_k, h_stride, DROPOUT, EVEN_K, PRECISION, BLOCK_T, BLOCK_K, FIRST_RANKS,
            )  # fmt: skip
        else:
            _down_stretch(
                x, matrix, h, key, threshold, scale, rows_inside, first_row, in_features, first, rank, first_r,
                stride_r, stride_k, h_stride, DROPOUT, EVEN_K, PRECISION, BLOCK_T, BLOCK_K, BLOCK_R,
            )  # fmt: skip


@triton.jit
def _skinny_rows(skinny, skinny_stride, t, r, begin, end, rank):
    inside = ((t >= begin) & (t < end))[:, None] & (r < rank)[None, :]
    return tl.load(skinny + t.to(tl.int64)[:, None] * skinny_stride + r[None, :], mask=inside, other=0.0)


@triton.jit
def _segment_operands(
    skinny, skinny_stride, matrix, stride_r, stride_c, t, c, r, columns, begin, end, first, rank
):  # fmt: skip
    """The rows of skinny that a segment has in a tile, and its columns of the matrix."""
    left = _skinny_rows(skinny, skinny_stride, t, r, begin, end, rank)
    pointers = matrix + (first + r).to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
    right = tl.load(pointers, mask=(r < rank)[:, None] & (c < columns)[None, :], other=0.0)
    return left, right


@triton.jit
def _store_parts(out, total, first_t, first_c, PARTS: tl.constexpr):
    """Store in PARTS column parts, which takes less shared memory, so that the tiles of one more stage have room."""
    BLOCK_C: tl.constexpr = total.shape[1]
    if PARTS == 1:
        out.store([first_t, first_c], total.to(out.dtype))
    else:
        low, high = _halves(total)
        _store_parts(out, low, first_t, first_c, PARTS // 2)
        _store_parts(out, high, first_t, first_c + BLOCK_C // 2, PARTS // 2)


@triton.jit(do_not_specialize=["segments", "count"])
def _segments_product_kernel(
    left, matrix, out, bias, skinny, updates, offsets, adapters, ints, scales, rows, columns, reduced, segments,
    count,
    skinny_stride, update_stride_r, update_stride_c,
    SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = left matrix + bias + scale * skinny updates, each row with its own adapter's updates (stack, columns)."""
    tiles_t, tiles_c = tl.cdiv(rows, BLOCK_T), tl.cdiv(columns, BLOCK_C)
    dtype: tl.constexpr = skinny.dtype.element_ty
    starts = _starts(offsets, segments, rows, BLOCK_S)
    r, few = tl.arange(0, BLOCK_R), tl.arange(0, FIRST_RANKS)
    programs = tl.num_programs(0)
    for tile in range(tl.program_id(0), tiles_t * tiles_c, programs):
        tile_t, tile_c = _tile_order(tile, tiles_t, tiles_c, GROUP)
        first_t, first_c = tile_t * BLOCK_T, tile_c * BLOCK_C
        t, c = first_t + tl.arange(0, BLOCK_T), first_c + tl.arange(0, BLOCK_C)
        # Most tiles lie in one segment, and most ranks fit one block. Where that is is looked up before the product.
        j = tl.maximum(tl.sum((starts <= first_t).to(tl.int32)) - 1, 0)
        last = tl.sum((starts < tl.minimum(first_t + BLOCK_T, rows)).to(tl.int32))
        begin, end, adapter, first, rank = _segment(offsets, adapters, ints, segments, count, rows, j)
        scale = 1.0
        if SCALED:
            scale = tl.load(scales + 2 * adapter)
        # Except for the first tile skinny is there, and the latency of what most segments need hides behind the sum.
        waited = tile >= programs
        skinny_tile, update_tile = _segment_operands(
            skinny, skinny_stride, updates, update_stride_r, update_stride_c, t, c, few, columns, begin,
            tl.where(waited, end, begin), first, rank,
        )  # fmt: skip
        total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        total = _accumulate(total, left, matrix, first_t, first_c, reduced, TRANSPOSED, BLOCK_K)
        if not waited:
            if OVERLAP:
                gdc_wait()
                gdc_launch_dependents()
            skinny_tile = _skinny_rows(skinny, skinny_stride, t, few, begin, end, rank)
        total = tl.dot(skinny_tile, (scale * update_tile).to(dtype), total)
        first_r = tl.full((), FIRST_RANKS, tl.int32)
        while (j < last - 1) | (first_r < rank):
            if first_r >= rank:
                j += 1
                first_r = 0
                begin, end, adapter, first, rank = _segment(offsets, adapters, ints, segments, count, rows, j)
                if SCALED:
                    scale = tl.load(scales + 2 * adapter)
            more_skinny, more_updates = _segment_operands(
                skinny + first_r, skinny_stride, updates, update_stride_r, update_stride_c, t, c, r, columns, begin,
                end, first + first_r, rank - first_r,
            )  # fmt: skip
            total = tl.dot(more_skinny, (scale * more_updates).to(dtype), total)
            first_r += BLOCK_R
        if HAS_BIAS:
            total += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
        _store_parts(out, total, first_t, first_c, PARTS)


@triton.jit(do_not_specialize=["segments", "count"])
def _segments_up_kernel(
    out, skinny, updates, seed, offsets, adapters, ints, scales, rows, columns, segments, count, skinny_stride,
    update_stride_r, update_stride_c,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out (rows, columns) += scale * mask∘(skinny updates), each row from its own adapter's (stack, columns)."""
    # The last rows first: what the base product wrote last is still in L2.
    tiles_c = tl.cdiv(columns, BLOCK_C)
    slot = (tl.num_programs(0) - 1 - tl.program_id(0)) // tiles_c
    first_row, begin, end, adapter, first, rank = _stretch(
        offsets, adapters, ints, segments, count, rows, slot, BLOCK_T, BLOCK_S
    )
    first_column = tl.program_id(0) % tiles_c * BLOCK_C
    t = first_row + tl.arange(0, BLOCK_T)
    c = first_column + tl.arange(0, BLOCK_C)
    if (begin < end) & (rank > 0):
        inside = ((t >= begin) & (t < end))[:, None] & (c < columns)[None, :]
        tile = out + t[:, None] * columns + c[None, :]
        base = tl.load(tile, mask=inside, other=0.0)
        update = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        for first_r in range(0, rank, BLOCK_R):
            r = first_r + tl.arange(0, BLOCK_R)
            left, right = _segment_operands(
                skinny, skinny_stride, updates, update_stride_r, update_stride_c, t, c, r, columns, begin, end, first,
                rank,
            )  # fmt: skip
            update = tl.dot(left, right.to(left.dtype), update, input_precision=PRECISION)
        if DROPOUT:
            threshold = tl.load(ints + 3 * adapter + 2)
            update = drop(update, tl.load(seed), first_row, first_column, threshold)
        scale = tl.load(scales + 2 * adapter)
        tl.store(tile, (base.to(tl.float32) + scale * update).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["segments", "stack"])
def _segments_outer_kernel(
    left, skinny, partial, seed, offsets, adapters, ints, scales, rows, columns, segments, stack, skinny_stride,
    DROPOUT: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, RANK_TILES: tl.constexpr,
):  # fmt: skip
    """One read of left: scale * skinnyᵀ drop(left) over every adapter's rows, a split's share of them.

    To a stack of partial sums (splits, stack, columns), of which adapters own the rows that they own of A.
    """
    if OVERLAP:
        gdc_launch_dependents()
    first_c = tl.program_id(0) * BLOCK_C
    split, splits = tl.program_id(1), tl.num_programs(1)
    owner = tl.program_id(2) // RANK_TILES
    r = tl.program_id(2) % RANK_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    c = first_c + tl.arange(0, BLOCK_C)
    first, rank = tl.load(ints + 3 * owner), tl.load(ints + 3 * owner + 1)
    exists = tl.program_id(2) % RANK_TILES * BLOCK_R < rank
    if DROPOUT:
        key, threshold = tl.load(seed), tl.load(ints + 3 * owner + 2)
    total = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    turn = 0  # tiles of this adapter so far; split i takes every splits-th from the i-th on
    for j in range(tl.where(exists, segments, 0)):
        if tl.load(adapters + j) == owner:
            begin = tl.minimum(tl.maximum(tl.load(offsets + j), 0), rows)
            end = tl.minimum(tl.load(offsets + j + 1), rows)
            tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_T).to(tl.int32)
            own = (split - turn % splits + splits) % splits
            for index in range(own, tiles, splits):
                first_row = begin + index * BLOCK_T
                t = first_row + tl.arange(0, BLOCK_T)
                inside_t = t < end
                inside = inside_t[:, None]
                if not EVEN_C:
                    inside = inside & (c < columns)[None, :]
                left_tile = tl.load(left + t[:, None] * columns + c[None, :], mask=inside, other=0.0)
                skinny_inside = inside_t[:, None] & (r < rank)[None, :]
                skinny_tile = tl.load(skinny + t[:, None] * skinny_stride + r[None, :], mask=skinny_inside, other=0.0)
                if DROPOUT:
                    left_tile = drop(left_tile, key, first_row, first_c, threshold, MOVE_WORDS=True)
                total = tl.dot(tl.trans(left_tile), skinny_tile, total, input_precision=PRECISION)
            turn += tiles
    pointers = partial + (split.to(tl.int64) * stack + (first + r)[None, :]) * columns + c[:, None]
    inside = (c < columns)[:, None] & (r < rank)[None, :]
    tl.store(pointers, tl.load(scales + 2 * owner) * total, mask=inside)
    if OVERLAP:
        _finish_after_previous()


class _Segments:
    """The batch's segments and the adapters' tables, as every launch takes them."""

    def __init__(self, ints, floats, offsets, adapters, seed, max_rank):
        self.ints, self.offsets, self.adapters, self.seed = ints, offsets, adapters, seed
        self.scaling, self.keep_scale = floats, floats[:, 1:]
        self.count, self.segments = ints.shape[0], adapters.shape[0]
        self.max_rank = max_rank
        self.block_r = min(MAX_BLOCK_RANK, _bucket(max_rank))
        self.rank_tiles = _cdiv(max_rank, self.block_r)
        self.block_s = _next_power_of_2(self.segments + 1)

    def slots(self, rows: int, block_t: int) -> int:
        """Programs that surely have one for each stretch of rows that a tile and a segment share."""
        return _cdiv(rows, block_t) + self.segments + 1


def _packed(stacks, like):
    """The stacks (Σ ranks, other) in like's dtype with contiguous rows: every tile of the product reads them.

    The copies are one launch, which does not let the next start early: its programs would be placed around this
    one's, several on a multiprocessor, where the product then finds no room (0.90 ms a step instead of 0.82).
    """
    packed, copied = [], []
    for stack in stacks:
        if stack.dtype != like.dtype or not stack.is_contiguous():
            copied.append(stack)
            stack = torch.empty(stack.shape, dtype=like.dtype, device=like.device)
        packed.append(stack)
    if copied:
        outs = [out for out, stack in zip(packed, stacks, strict=True) if out is not stack]
        ranks, columns = stacks[0].shape[0], [stack.shape[1] for stack in copied]
        strides_r, strides_c = zip(*(stack.stride() for stack in copied), strict=True)
        block_r, block_c = PACK_BLOCKS
        _segments_pack_kernel[(_cdiv(max(columns), block_c), _cdiv(ranks, block_r), len(copied))](
            tuple(copied), tuple(outs), ranks, tuple(columns), strides_r, strides_c, BLOCK_R=block_r, BLOCK_C=block_c
        )
    return packed


def _down(x, matrix, segments, scales, *, dropout, beside):
    """h (rows, max_rank) = scale * drop(x) matrixᵀ for matrix (stack, in_features); padded to have aligned rows."""
    rows, in_features = x.shape
    name = "down_dropout" if dropout else "down_beside" if beside else "down"
    block_t, block_k, warps, stages = _config(name, segments.block_r, x)
    h = torch.empty(rows, padded(segments.max_rank), dtype=x.dtype, device=x.device)
    _segments_down_kernel[(segments.slots(rows, block_t), segments.rank_tiles)](
        x, matrix, h, segments.seed, segments.offsets, segments.adapters, segments.ints, scales, rows, in_features,
        segments.segments, segments.count, matrix.stride(0), matrix.stride(1), h.stride(0),
        DROPOUT=dropout, EVEN_K=in_features % block_k == 0, PRECISION=_precision(x.dtype), OVERLAP=beside,
        BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_R=segments.block_r, BLOCK_S=segments.block_s, num_warps=warps,
        num_stages=stages, **_overlapping(beside),
    )  # fmt: skip
    return h


def _product(left, matrix, bias, skinny, updates, segments, *, scaled):
    """left matrix + bias + scale * skinny updates for updates (stack, columns); the scaling, or 1 unless `scaled`."""
    rows, reduced = left.shape
    columns = matrix.shape[1]
    block_t, block_c, block_k, warps, stages = PRODUCT_CONFIG
    transposed = not _row_major(matrix)
    shape = [block_c, block_k] if transposed else [block_k, block_c]
    out = torch.empty(rows, columns, dtype=left.dtype, device=left.device)
    tiles = _cdiv(rows, block_t) * _cdiv(columns, block_c)
    programs = _cdiv(tiles, _cdiv(tiles, multiprocessors(left.device)))
    overlap = left.is_cuda
    _segments_product_kernel[(programs,)](
        TensorDescriptor.from_tensor(left, [block_t, block_k]),
        TensorDescriptor.from_tensor(matrix.T if transposed else matrix, shape),
        TensorDescriptor.from_tensor(out, [block_t, block_c // 2]),
        bias, skinny, updates, segments.offsets, segments.adapters, segments.ints, segments.scaling, rows, columns,
        reduced, segments.segments, segments.count, skinny.stride(0), updates.stride(0), updates.stride(1),
        SCALED=scaled, HAS_BIAS=bias is not None, TRANSPOSED=transposed, OVERLAP=overlap, BLOCK_T=block_t,
        BLOCK_C=block_c, BLOCK_K=block_k, BLOCK_R=segments.block_r, BLOCK_S=segments.block_s,
        GROUP=GROUP, PARTS=2, num_warps=warps, num_stages=stages, maxnreg=PRODUCT_REGISTERS,
        **_overlapping(overlap),
    )  # fmt: skip
    return out


def _up(out, skinny, updates, segments, scales, *, dropout):
    """out += scale * mask∘(skinny updates) for updates (stack, columns)."""
    rows, columns = out.shape
    block_t, block_c, warps, stages = _config("up", segments.block_r, out)
    _segments_up_kernel[(_cdiv(columns, block_c) * segments.slots(rows, block_t),)](
        out, skinny, updates, segments.seed, segments.offsets, segments.adapters, segments.ints, scales, rows,
        columns,
        segments.segments, segments.count, skinny.stride(0), updates.stride(0), updates.stride(1),
        DROPOUT=dropout, PRECISION=_precision(out.dtype), BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_R=segments.block_r,
        BLOCK_S=segments.block_s, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _outer(left, skinny, stack, segments, scales, *, dropout, overlap):
    """Partial sums (splits, stack, columns) of scale * skinnyᵀ drop(left) by adapter."""
    rows, columns = left.shape
    name = ("outer_dropout" if dropout else "outer") + ("_beside" if overlap else "")
    block_t, block_c, warps, stages, _ = _config(name, segments.block_r, left)
    strips = _cdiv(columns, block_c)
    # By the batch's size alone, as nobody knows here how many rows an adapter has.
    splits = _splits(strips, max(1, _cdiv(rows, block_t) // 8), left.device)
    partial = torch.empty(splits, stack, columns, dtype=torch.float32, device=left.device)
    _segments_outer_kernel[(strips, splits, segments.count * segments.rank_tiles)](
        left, skinny, partial, segments.seed, segments.offsets, segments.adapters, segments.ints, scales, rows,
        columns,
        segments.segments, stack, skinny.stride(0),
        DROPOUT=dropout, EVEN_C=columns % block_c == 0, PRECISION=_precision(left.dtype), OVERLAP=overlap,
        BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_R=segments.block_r, RANK_TILES=segments.rank_tiles, num_warps=warps,
        num_stages=stages, **_overlapping(overlap),
    )  # fmt: skip
    return partial


def launch_lora_segments(
    x, weight, bias, lora_A, lora_B, ints, floats, offsets, adapters, seed, max_rank, any_dropout
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x Wᵀ + b + s_i (drop_i(x) A_iᵀ) B_iᵀ with each row's own adapter i, and h (rows, max_rank padded).

    Args:
        x: (rows, in_features), contiguous.
        weight, bias, lora_A, lora_B, offsets, adapters: as in `sensilora.ops.lora_segments`.
        ints, floats: int32 (adapters, 3) and fp32 (adapters, 2), as this module's docstring says.
        seed: int64 tensor of one element on x's device, or None without dropout.
        max_rank: the largest rank.
        any_dropout: whether any adapter drops anything.
    """
    if x.shape[0] == 0 or max_rank == 0 or adapters.shape[0] == 0:
        h = torch.zeros(x.shape[0], padded(max_rank), dtype=x.dtype, device=x.device)
        return torch.nn.functional.linear(x, weight, bias), h
    segments = _Segments(ints, floats, offsets, adapters, seed, max_rank)
    lora_A, B_T = _packed([lora_A, lora_B.T], x)
    fused = product_serves(x, weight.T, max_rank)
    # With a mask not beside the product, as in launch_lora_group.
    beside = fused and not any_dropout
    h = _down(x, lora_A, segments, segments.keep_scale, dropout=any_dropout, beside=beside)
    if fused:
        bias = None if bias is None else bias.contiguous()
        return _product(x, weight.T, bias, h, B_T, segments, scaled=True), h
    y = torch.nn.functional.linear(x, weight, bias)
    _up(y, h, B_T, segments, segments.scaling, dropout=False)
    return y, h


def launch_lora_segments_backward(
    grad, x, h, weight, lora_A, lora_B, ints, floats, offsets, adapters, seed, max_rank, any_dropout, need_grad_x
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (empty unless needed), A and B, the last two in their dtypes; grad (rows, out) contiguous."""
    if x.shape[0] == 0 or max_rank == 0 or adapters.shape[0] == 0:
        grad_x = torch.mm(grad, weight) if need_grad_x else x.new_empty(0)
        return grad_x, torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    segments = _Segments(ints, floats, offsets, adapters, seed, max_rank)
    stack = lora_A.shape[0]
    A, B_T = _packed([lora_A, lora_B.T], x)
    # With dropout the mask sits between the two terms of grad_x.
    fused = need_grad_x and not any_dropout and product_serves(grad, weight, max_rank)
    q = _down(grad, B_T, segments, segments.scaling, dropout=False, beside=fused)
    grad_x = x.new_empty(0)
    if fused:
        grad_x = _product(grad, weight, None, q, A, segments, scaled=False)
    elif need_grad_x:
        grad_x = torch.mm(grad, weight)
        _up(grad_x, q, A, segments, segments.keep_scale, dropout=any_dropout)
    partial_A = _outer(x, q, stack, segments, segments.keep_scale, dropout=any_dropout, overlap=fused)
    partial_B = _outer(grad, h, stack, segments, segments.scaling, dropout=False, overlap=fused)
    grad_A, grad_B = torch.empty_like(lora_A), torch.empty_like(lora_B)
    launch_reduce([(partial_A, (grad_A,)), (partial_B, (grad_B.T,))])
    return grad_x, grad_A, grad_B
