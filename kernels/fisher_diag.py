"""The Fisher diagonal of a linear layer as one product that squares its own sums in registers.

    per_sequence   out += Σ_n (G_nᵀ X_n)²              2 T in out FLOP, as the weight gradient
    per_position   out += (G∘G)ᵀ (X∘X)                 2 T in out FLOP and what rounding needs, see below

A program owns a tile of out and walks all rows; where a sequence ends, the sum is squared into another accumulator
and starts again, so no gradient of a sequence is ever stored. The walk is one loop over steps of BLOCK_K rows, those
of all sequences one after the other, so that the loads of the next sequence are under way while one ends.

On Hopper tiles come by TMA, and sequences begin at multiples of BLOCK_K rows: a copy padded with zeros is made where
they do not. (Reading each step's first row from a table instead cost 15 to 25% of the product, subtracting what a
tile read of the next sequence 70%.) Elsewhere a table says where each step begins and how many rows it has.

A tensor core cuts off what it adds to a sum, so long sums of one sign fall short; a few steps at a time are summed
there, and those sums in fp32 proper.

per_position squares in every program where the product is small, in three products. The square of a bf16 number has
16 significant bits: it is the sum of two bf16 numbers, of whose four products the smallest is below 2^-18 of the
result. Squares of fp16 and fp32 numbers go to three TF32 products, which drop as little.

Large products on Hopper take squares rounded to fp16 (11 bits), written once, and correct those rows whose rounding
matters:

- A column of squares is multiplied by the power of two that brings its sum below 2^15: no square can overflow, and
  what becomes subnormal is below 2^-28 of the sum.
- Rounding changes out by Σ_t (lost g_t) x_tᵀ + g_t (lost x_t)ᵀ. A factor a row (_row_factor) makes what is lost
  independent between rows, whatever the data, so that the norm of this error follows from norms of rows, which the
  pass knows. With normal data it is 9e-6 of out's norm at 8192 rows and falls with the root of their number.
- Adding (Σ_t lost g_t) (mean x)ᵀ and (mean g) (Σ_t lost x_t)ᵀ, two rows more of the product, leaves of each row only
  its difference from the mean: 8e-6.
- Rows that would bring the error above TOLERANCE are corrected, the largest always: both terms are two rows more of
  the product, of what was lost and of rounded squares. Of few rows all are, which makes three products again.

Nothing is atomic, so results repeat bit for bit.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sensilora.kernels._common import multiprocessors, sum_partials
from sensilora.kernels.autocorrelation_diag import launch_autocorrelation_diag

# BLOCK of out_features, BLOCK of in_features, BLOCK_K, GROUP, num_warps, num_stages. Three fp32 accumulators of
# 128x128 are what 8 warps can hold.
TMA_CONFIG = (128, 128, 64, 8, 8, 5)
CONFIG = (128, 64, 32, 8, 8, 3)
SMALL_CONFIG = (64, 64, 32, 8, 4, 3)
TMA_MIN_FEATURES = 128
# Steps whose sum is left to the tensor cores; fp32 takes six of their instructions where bf16 takes one.
TMA_CHUNK = tl.constexpr(8)
CHUNK = 4
# The same for the product of squares, and the passes that write these.
POSITION_CONFIG = (128, 128, 64, 8, 8, 5)
SQUARES_CONFIG = {"BLOCK_T": 64, "BLOCK_C": 128, "STAGES": 2, "num_warps": 8}
CHOOSE_BLOCK, CHOOSE_WARPS = 1024, 32
POSITION_CHUNK = 8
# Products below which its dozen launches take longer than squaring in every program.
SQUARES_MIN_WORK = 2**33
# Rows whose squares are stored at a time, and steps that a split has at least.
SQUARED_ROWS = 8192
SPLIT_STEPS = 8
# Error that rounding the squares may bring, relative to the result's norm.
TOLERANCE = 9.5e-6
# Between what rounding leaves of a square, which may be subnormal, and the rounded square it is multiplied by.
LOW_SCALE = 64.0
REDUCE_BLOCK = 1024


@triton.jit
def _tile(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of the program's tile: GROUP rows of tiles share their columns while these are in L2."""
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    group = min(tiles_m - first, GROUP)
    return first + program % (GROUP * tiles_n) % group, program % (GROUP * tiles_n) // group


@triton.jit
def _write(out, first_m, first_n, total, ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write a tile by TMA in two halves, which take half the shared memory of one."""
    low, high = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    if ACCUMULATE:
        low += out.load([first_m, first_n])
        high += out.load([first_m, first_n + BLOCK_N // 2])
    out.store([first_m, first_n], low)
    out.store([first_m, first_n + BLOCK_N // 2], high)


@triton.jit
def _fisher_tma_kernel(
    grad,
    x,
    out,
    counts,
    splits,
    out_features,
    in_features,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out (number of splits * out_features, in_features) = or += Σ_n (G_nᵀ X_n)² over a split's steps.

    grad (rows, out_features), x (rows, in_features) and out are tensor descriptors. counts holds the steps of each
    sequence; splits the first step and sequence of every split.
    """
    tile_m, tile_n = _tile(tl.cdiv(out_features, BLOCK_M), tl.cdiv(in_features, BLOCK_N), GROUP)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    split = tl.program_id(1)
    first, last = tl.load(splits + 2 * split), tl.load(splits + 2 * split + 2)
    sequence = counts + tl.load(splits + 2 * split + 1)
    # Steps left of the sequence, and those of the next one, fetched while this one runs.
    left, upcoming = tl.load(sequence), tl.load(sequence + 1)
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for turn in tl.range(0, last - first, num_stages=STAGES):
        row = (first + turn) * BLOCK_K
        part = tl.dot(grad.load([row, first_m]).T, x.load([row, first_n]), part)
        left -= 1
        if left % TMA_CHUNK == 0:
            gradient += part
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            if left == 0:
                total += gradient * gradient
                gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                sequence += 1
                left = upcoming
                upcoming = tl.load(sequence + 1)
    _write(out, split * out_features + first_m, first_n, total, ACCUMULATE, BLOCK_M, BLOCK_N)


@triton.jit
def _exponent(number):
    """Exponent bits of a positive fp32 number."""
    return number.to(tl.int32, bitcast=True) >> 23 & 255


@triton.jit
def _power(exponent):
    """The power of two with these exponent bits."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scale_exponent(sums):
    """Exponent bits of the power of two that brings `sums` to [2^14, 2^15), where all it sums fits fp16."""
    return tl.minimum(127 + 14 + 127 - _exponent(sums), 250)


@triton.jit
def _largest_to_one(sums, columns, BLOCK: tl.constexpr):
    """The power of two that brings the largest of `sums` to [1/2, 1)."""
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, columns, BLOCK):
        c = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(sums + c, mask=c < columns, other=0.0))
    return _power(tl.maximum(253 - _exponent(tl.max(largest, axis=0)), 1))


@triton.jit
def _lane_sums(tile, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_T, BLOCK_C) to (BLOCK_T, BLOCK_C / 8): what lies in a thread is added, nothing is exchanged."""
    return tl.sum(tl.reshape(tile, (BLOCK_T, BLOCK_C // 8, 8)), axis=2)


@triton.jit
def _row_factor(row, GRADIENT: tl.constexpr):
    """A factor in [1, 1.125) for each row of the gradient, and its inverse for x.

    It lets equal rows round differently, so that the errors of a column are independent whatever the data.
    """
    phase = row.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32)
    factor = 1.0 + (phase >> 8).to(tl.int32).to(tl.float32) * 2.0**-27
    if not GRADIENT:
        factor = 1.0 / factor
    return factor


@triton.jit
def _fisher_squares_kernel(
    source,
    out,
    sums,
    norms,
    lost_sums,
    rows,
    stride,
    columns,
    GRADIENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Squares of source (rows, columns), times powers of two, rounded to fp16: the first stride rows of out.

    A program has BLOCK_T rows; rows from `rows` on are zero. sums (columns,) are those of the columns' squares.
    norms (3, stride) receives of every row u the squared norm of u less its column means, that of u less the rounded
    u, and the product of u with sums, in units of the largest sum. lost_sums (programs, columns) receives column sums
    of what is lost by rounding.
    """
    slot = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    unit = _largest_to_one(sums, columns, 1024)
    factor = _row_factor(slot, GRADIENT)[:, None]
    inverse = _row_factor(slot, not GRADIENT)[:, None]
    counted = slot < rows
    spread = tl.zeros((BLOCK_T, BLOCK_C // 8), dtype=tl.float32)
    lost = tl.zeros((BLOCK_T, BLOCK_C // 8), dtype=tl.float32)
    along = tl.zeros((BLOCK_T, BLOCK_C // 8), dtype=tl.float32)
    for first in tl.range(0, columns, BLOCK_C, num_stages=STAGES):
        c = first + tl.arange(0, BLOCK_C)
        inside = (c < columns)[None, :]
        pointers = source + slot.to(tl.int64)[:, None] * columns + c[None, :]
        value = tl.load(pointers, mask=counted[:, None] & inside, other=0.0).to(tl.float32)
        total = tl.load(sums + c, mask=c < columns, other=0.0)
        exponent = _scale_exponent(total)
        scale, size = _power(exponent), _power(254 - exponent) * unit
        value = value * value * scale[None, :] * factor
        rounded = value.to(tl.float16)
        tl.store(out + slot.to(tl.int64)[:, None] * columns + c[None, :], rounded, mask=inside)
        left = value - rounded.to(tl.float32)
        tl.store(lost_sums + tl.program_id(0).to(tl.int64) * columns + c, tl.sum(left * inverse, 0), mask=c < columns)
        centred = (value - (total * scale / rows)[None, :] * factor) * size[None, :]
        left *= size[None, :]
        spread += _lane_sums(centred * centred, BLOCK_T, BLOCK_C)
        lost += _lane_sums(left * left, BLOCK_T, BLOCK_C)
        along += _lane_sums(value * (total * unit * size)[None, :], BLOCK_T, BLOCK_C)
    tl.store(norms + slot, tl.sum(spread, axis=1))
    tl.store(norms + stride + slot, tl.sum(lost, axis=1))
    tl.store(norms + 2 * stride + slot, tl.sum(along, axis=1))


@triton.jit
def _fisher_means_kernel(
    out, sums, lost_sums, chosen, rows, stride, columns, programs, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """The two rows of out from stride on: the sum of what rounding lost and the mean, of x the other way round.

    They are zero where chosen says that means are not subtracted.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    lost = sum_partials(lost_sums, c, columns, programs, 128)
    total = tl.load(sums + c, mask=inside, other=0.0)
    mean = total * _power(_scale_exponent(total)) / rows
    if tl.load(chosen + 1) == 0:
        lost, mean = lost * 0.0, mean * 0.0
    out += stride.to(tl.int64) * columns + c
    tl.store(out + (0 if GRADIENT else columns), lost.to(tl.float16), mask=inside)
    tl.store(out + (columns if GRADIENT else 0), mean.to(tl.float16), mask=inside)


@triton.jit
def _fisher_chosen_kernel(
    source,
    out,
    sums,
    chosen,
    rows,
    stride,
    columns,
    GRADIENT: tl.constexpr,
    LOW_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Two rows of out for each row of source that chosen lists, behind those of _fisher_means_kernel.

    They are what rounding lost and the rounded squares, less their mean where chosen says so, of x the other way
    round: with those of the means their products add what the product of rounded squares lacks in the chosen rows.
    """
    slot = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = 2 * tl.load(chosen) + 2
    if tl.program_id(0) * BLOCK_T >= tl.cdiv(slots, BLOCK_K) * BLOCK_K:
        return
    counted = (slot >= 2) & (slot < slots)
    row = tl.load(chosen + 1 + slot // 2, mask=counted, other=0)
    around = tl.load(chosen + 1).to(tl.float32) / rows
    factor = _row_factor(row, GRADIENT)[:, None]
    is_lost = (slot % 2 == (0 if GRADIENT else 1))[:, None]
    for first in tl.range(0, columns, BLOCK_C, num_stages=STAGES):
        c = first + tl.arange(0, BLOCK_C)
        inside = (c < columns)[None, :]
        pointers = source + row.to(tl.int64)[:, None] * columns + c[None, :]
        value = tl.load(pointers, mask=counted[:, None] & inside, other=0.0).to(tl.float32)
        total = tl.load(sums + c, mask=c < columns, other=0.0)
        scale = _power(_scale_exponent(total))
        value = value * value * scale[None, :] * factor
        rounded = value.to(tl.float16).to(tl.float32)
        centred = rounded - (total * scale * around)[None, :] * factor
        pair = tl.where(is_lost, (value - rounded) * LOW_SCALE, centred / LOW_SCALE)
        pair = tl.where(counted[:, None], pair, 0.0).to(tl.float16)
        pointers = out + (stride + slot).to(tl.int64)[:, None] * columns + c[None, :]
        tl.store(pointers, pair, mask=(slot >= 2)[:, None] & inside)


@triton.jit
def _powers_of_sums(sums, columns, BLOCK: tl.constexpr):
    """Sums of the squares and of the fourth powers of `sums`, in units of about the largest."""
    unit = _largest_to_one(sums, columns, BLOCK)
    second, fourth = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, columns, BLOCK):
        c = first + tl.arange(0, BLOCK)
        value = tl.load(sums + c, mask=c < columns, other=0.0) * unit
        second += value * value
        fourth += value * value * value * value
    return tl.sum(second, axis=0), tl.sum(fourth, axis=0)


@triton.jit
def _fisher_choose_kernel(
    norms_x,
    norms_grad,
    sums_x,
    sums_grad,
    chosen,
    rows,
    stride,
    in_features,
    out_features,
    TOLERANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which rows need more than rounded squares for an error of TOLERANCE, to chosen.

    chosen is the number of rows, whether means are subtracted, and the list of rows. Rounding row t changes out by a
    matrix of squared norm w_t = |lost g|^2 |x|^2 + |g|^2 |lost x|^2, or, if the sums of what is lost are added times
    the other matrix's mean, with |x - mean| and |g - mean|, which is less unless few rows hold most of the sum. These
    changes are independent of each other, so the error's squared norm is about the sum of the w_t of the rows that
    are not chosen. out's norm is at least its product with the unit matrix along (mean of g) (mean of x)^T.
    """
    row = tl.arange(0, BLOCK)
    inside = row < rows
    spread_x = tl.load(norms_x + row, mask=inside, other=0.0)
    lost_x = tl.load(norms_x + stride + row, mask=inside, other=0.0)
    along_x = tl.load(norms_x + 2 * stride + row, mask=inside, other=0.0)
    spread_grad = tl.load(norms_grad + row, mask=inside, other=0.0)
    lost_grad = tl.load(norms_grad + stride + row, mask=inside, other=0.0)
    along_grad = tl.load(norms_grad + 2 * stride + row, mask=inside, other=0.0)
    second_x, fourth_x = _powers_of_sums(sums_x, in_features, BLOCK)
    second_grad, fourth_grad = _powers_of_sums(sums_grad, out_features, BLOCK)
    error = lost_grad * spread_x + spread_grad * lost_x
    # |x|^2 = |x - mean|^2 + 2 x mean - |mean|^2, where the mean has the row's factor.
    mean_x, mean_grad = _row_factor(row, False) / rows, _row_factor(row, True) / rows
    square_x = spread_x + mean_x * (2.0 * along_x - mean_x * second_x)
    square_grad = spread_grad + mean_grad * (2.0 * along_grad - mean_grad * second_grad)
    plain = lost_grad * square_x + square_grad * lost_x
    centred = tl.sum(error, axis=0) < tl.sum(tl.where(inside, plain, 0.0), axis=0)
    error = tl.where(centred, error, plain)
    norm = tl.sum(along_x * along_grad, axis=0)
    # Nothing but zeros is 0 in units of the largest, else there is a number of at least 1/4 among the squares.
    second_x, second_grad = tl.maximum(second_x, 0.25), tl.maximum(second_grad, 0.25)
    allowed = TOLERANCE * TOLERANCE * norm * norm / (second_x * second_grad)
    # Three standard deviations of a sum of as many squares as there are columns that count.
    concentration = tl.maximum(fourth_x / (second_x * second_x), fourth_grad / (second_grad * second_grad))
    allowed /= 1.0 + 3.0 * tl.sqrt(2.0 * concentration)
    # Rows of at most their share; of the others those that fit in what this leaves, unless they take much of it.
    share = allowed / rows
    kept = error <= share
    allowed -= tl.sum(tl.where(kept & inside, error, 0.0), axis=0)
    medium = inside & (error > share) & (error <= 4 * share)
    kept = kept | (medium & (tl.cumsum(tl.where(medium, error, 0.0), axis=0) <= allowed))
    taken = (inside & (kept == 0)).to(tl.int32)
    tl.store(chosen, tl.sum(taken, axis=0))
    tl.store(chosen + 1, centred.to(tl.int32))
    tl.store(chosen + 1 + tl.cumsum(taken, axis=0), row, mask=taken != 0)


@triton.jit
def _fisher_position_kernel(
    grad,
    x,
    out,
    sums_grad,
    sums_x,
    chosen,
    steps,
    out_features,
    in_features,
    split_features,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out (number of splits * split_features, in_features) = or += gradᵀ x over a split's share of the steps.

    grad and x are tensor descriptors of rounded squares and, behind `steps` steps, of the rows that correct them;
    their powers of two are undone.
    """
    tile_m, tile_n = _tile(tl.cdiv(out_features, BLOCK_M), tl.cdiv(in_features, BLOCK_N), GROUP)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    split, splits = tl.program_id(1), tl.num_programs(1)
    steps += tl.cdiv(2 * tl.load(chosen) + 2, BLOCK_K)
    first, last = steps * split // splits, steps * (split + 1) // splits
    left = last - first
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        row = step * BLOCK_K
        part = tl.dot(grad.load([row, first_m]).T, x.load([row, first_n]), part)
        left -= 1
        if left % CHUNK == 0:
            total += part
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    total *= _power(254 - _scale_exponent(tl.load(sums_grad + m, mask=m < out_features, other=1.0)))[:, None]
    total *= _power(254 - _scale_exponent(tl.load(sums_x + n, mask=n < in_features, other=1.0)))[None, :]
    _write(out, split * split_features + first_m, first_n, total, ACCUMULATE, BLOCK_M, BLOCK_N)


@triton.jit
def _fisher_kernel(
    grad,
    x,
    out,
    table,
    splits,
    out_features,
    in_features,
    ACCUMULATE: tl.constexpr,
    EVEN: tl.constexpr,
    POSITION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same from pointers, of any alignment and size; with POSITION what is summed are the products of squares.

    table holds the first row and the number of rows of each step, and 1 where a chunk ends, 2 where a sequence does.
    """
    tile_m, tile_n = _tile(tl.cdiv(out_features, BLOCK_M), tl.cdiv(in_features, BLOCK_N), GROUP)
    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first, last = tl.load(splits + split), tl.load(splits + split + 1)
    row, here = tl.load(table + 3 * first), tl.load(table + 3 * first + 1)
    for step in tl.range(first, last, num_stages=STAGES):
        # A step's rows are fetched one step ahead, since the tiles wait for them.
        next_row, next_here = tl.load(table + 3 * step + 3), tl.load(table + 3 * step + 4)
        inside = (k < here)[:, None]
        inside_m, inside_n = inside, inside
        if not EVEN:
            inside_m, inside_n = inside & (m < out_features)[None, :], inside & (n < in_features)[None, :]
        rows = (row + k).to(tl.int64)[:, None]
        grad_tile = tl.load(grad + rows * out_features + m[None, :], mask=inside_m, other=0.0)
        x_tile = tl.load(x + rows * in_features + n[None, :], mask=inside_n, other=0.0)
        if POSITION:
            left, right = grad_tile.to(tl.float32), x_tile.to(tl.float32)
            left, right = left * left, right * right
            if grad_tile.dtype == tl.bfloat16:
                left_high, right_high = left.to(tl.bfloat16), right.to(tl.bfloat16)
                left_low = (left - left_high.to(tl.float32)).to(tl.bfloat16)
                right_low = (right - right_high.to(tl.float32)).to(tl.bfloat16)
                part = tl.dot(tl.trans(left_low), right_high, part)
                part = tl.dot(tl.trans(left_high), right_low, part)
                part = tl.dot(tl.trans(left_high), right_high, part)
            else:
                part = tl.dot(tl.trans(left), right, part, input_precision=PRECISION)
        else:
            part = tl.dot(tl.trans(grad_tile), x_tile, part, input_precision=PRECISION)
        ends = tl.load(table + 3 * step + 2)
        if ends != 0:
            if POSITION:
                total += part
            else:
                gradient += part
                if ends == 2:
                    total += gradient * gradient
                    gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        row, here = next_row, next_here
    pointers = out + (split.to(tl.int64) * out_features + m[:, None]) * in_features + n[None, :]
    inside = (m < out_features)[:, None] & (n < in_features)[None, :]
    total = total.to(out.dtype.element_ty)
    if ACCUMULATE:
        total += tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, total, mask=inside)


@triton.jit
def _fisher_align_kernel(source, out, table, columns, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows of source (rows, columns) to the steps of out, zero behind a sequence's end; a program has one step."""
    step = tl.program_id(0)
    first, here = tl.load(table + 3 * step), tl.load(table + 3 * step + 1)
    t = tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c < columns)[None, :]
    tile = tl.load(
        source + (first + t).to(tl.int64)[:, None] * columns + c[None, :],
        mask=(t < here)[:, None] & inside,
        other=0.0,
    )
    tl.store(out + (step * BLOCK_T + t).to(tl.int64)[:, None] * columns + c[None, :], tile, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _fisher_reduce_kernel(partial, out, stride, size, splits, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """out (size,) = or += the sum of the first size elements of partial (splits, stride) over splits, in order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = sum_partials(partial, index, stride, splits, 4).to(out.dtype.element_ty)
    if ACCUMULATE:
        total += tl.load(out + index, mask=inside, other=0.0)
    tl.store(out + index, total, mask=inside)


@functools.lru_cache(maxsize=64)
def _steps(lengths: tuple[int, ...], block_k: int, splits: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What the kernels read of the sequences' lengths (above 0): table, counts, and the splits of either kernel.

    Splits take about the same number of steps each and end where sequences do. Kept for later calls: all layers of a
    model see a batch's lengths.
    """
    rows = torch.tensor(lengths)
    counts = (rows + block_k - 1) // block_k
    sequence = torch.arange(len(lengths)).repeat_interleave(counts)
    ends = counts.cumsum(0)
    within = torch.arange(len(sequence)) - (ends - counts)[sequence]
    here = (rows[sequence] - within * block_k).clamp(max=block_k)
    first_row = (rows.cumsum(0) - rows)[sequence] + within * block_k
    kind = torch.where(within == counts[sequence] - 1, 2, ((within + 1) % CHUNK == 0).long())
    table = torch.stack([first_row, here, kind], dim=1)
    wanted = torch.arange(1, splits) * len(sequence) // splits
    first_sequence = torch.cat([torch.searchsorted(ends, wanted) + 1, torch.tensor([len(lengths)])])
    first_sequence = torch.nn.functional.pad(first_sequence, (1, 0))
    starts = torch.nn.functional.pad(ends, (1, 0))[first_sequence]
    # Two entries more, which are fetched and not used.
    table, counts = torch.nn.functional.pad(table, (0, 0, 0, 1)), torch.nn.functional.pad(counts, (0, 2))
    both = torch.stack([starts, first_sequence], dim=1)
    found = [t.to(torch.int32).contiguous() for t in (table, counts, both, starts)]
    if device.type == "cuda":
        # From pinned memory, so that nothing waits for what the device has still to do.
        found = [t.pin_memory().to(device, non_blocking=True) for t in found]
    return tuple(found)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _by_tma(x: torch.Tensor, grad: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether tensor descriptors can read all three, and the tiles are not mostly outside."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and out.dtype == torch.float32
        and _is_hopper(x.device)
        and all(t.shape[1] >= TMA_MIN_FEATURES and t.shape[1] % 8 == 0 for t in (x, grad))
        and all(t.data_ptr() % 16 == 0 for t in (x, grad, out))
    )


@functools.lru_cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _aligned(source: torch.Tensor, table: torch.Tensor, block_k: int) -> torch.Tensor:
    """source (rows, columns) with every step's rows apart."""
    steps, columns = table.shape[0] - 1, source.shape[1]
    out = torch.empty(steps * block_k, columns, dtype=source.dtype, device=source.device)
    _fisher_align_kernel[(steps, _cdiv(columns, 128))](
        source, out, table, columns, BLOCK_T=block_k, BLOCK_C=128, num_warps=4
    )
    return out


def launch_fisher_diag(
    x: torch.Tensor, grad: torch.Tensor, lengths: torch.Tensor, convention: str, out: torch.Tensor, accumulate: bool
) -> None:
    """Write the Fisher diagonal of packed rows to `out`, or add it.

    Args:
        x: (rows, in_features), contiguous.
        grad: (rows, out_features), contiguous, x's dtype.
        lengths: (sequences,) int64 on the CPU, summing to rows.
        convention: "per_sequence" or "per_position".
        out: (out_features, in_features), fp32 or fp64, contiguous.
        accumulate: add to `out` where true; overwrite it where false.
    """
    lengths = lengths[lengths > 0]
    rows = x.shape[0]
    if out.numel() == 0 or rows == 0:
        if not accumulate:
            out.zero_()
    elif convention == "per_sequence":
        _launch(x, grad, tuple(lengths.tolist()), False, out, accumulate)
    elif _by_tma(x, grad, out) and rows * out.numel() >= SQUARES_MIN_WORK:
        for first in range(0, rows, SQUARED_ROWS):
            some = slice(first, first + SQUARED_ROWS)
            _launch_squares(x[some], grad[some], out, accumulate or first > 0)
    else:
        # Sums over positions know no sequences; pieces let programs share the work.
        _launch(x, grad, _pieces(rows), True, out, accumulate)


def _launch_squares(x: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """per_position by TMA, of at most SQUARED_ROWS rows."""
    (rows, in_features), out_features, device = x.shape, grad.shape[1], x.device
    block_m, block_n, block_k, group, warps, stages = POSITION_CONFIG
    steps = _cdiv(rows, block_k)
    stride = steps * block_k
    # Rows behind the squares: two for the means, two for each chosen row.
    corrections = _cdiv(2 * rows + 2, block_k) * block_k
    block_t = SQUARES_CONFIG["BLOCK_T"]
    squares, sums, norms, lost_sums = [], [], [], []
    for source, is_grad in ((x, False), (grad, True)):
        columns = source.shape[1]
        squares.append(torch.empty(stride + corrections, columns, dtype=torch.float16, device=device))
        sums.append(torch.empty(columns, dtype=torch.float32, device=device))
        norms.append(torch.empty(3, stride, dtype=torch.float32, device=device))
        lost_sums.append(torch.empty(stride // block_t, columns, dtype=torch.float32, device=device))
        launch_autocorrelation_diag(source, None, sums[-1], False)
        _fisher_squares_kernel[(stride // block_t,)](
            source, squares[-1], sums[-1], norms[-1], lost_sums[-1], rows, stride, columns, GRADIENT=is_grad,
            **SQUARES_CONFIG,
        )  # fmt: skip
    chosen = torch.empty(rows + 2, dtype=torch.int32, device=device)
    _fisher_choose_kernel[(1,)](
        *norms, *sums, chosen, rows, stride, in_features, out_features, TOLERANCE=TOLERANCE,
        BLOCK=max(CHOOSE_BLOCK, triton.next_power_of_2(rows)), num_warps=CHOOSE_WARPS,
    )  # fmt: skip
    for i, source in enumerate((x, grad)):
        columns = source.shape[1]
        _fisher_means_kernel[(_cdiv(columns, 32),)](
            squares[i], sums[i], lost_sums[i], chosen, rows, stride, columns, stride // block_t, GRADIENT=i == 1,
            BLOCK=32,
        )  # fmt: skip
        _fisher_chosen_kernel[(corrections // block_t,)](
            source, squares[i], sums[i], chosen, rows, stride, columns, GRADIENT=i == 1, LOW_SCALE=LOW_SCALE,
            BLOCK_K=block_k, **SQUARES_CONFIG,
        )  # fmt: skip
    tiles = _cdiv(out_features, block_m) * _cdiv(in_features, block_n)
    splits = max(1, min(steps // SPLIT_STEPS, multiprocessors(device) // tiles))
    partial, apart = _partial(out, splits, block_m)
    _fisher_position_kernel[(tiles, splits)](
        TensorDescriptor.from_tensor(squares[1], [block_k, block_m]),
        TensorDescriptor.from_tensor(squares[0], [block_k, block_n]),
        TensorDescriptor.from_tensor(partial.view(-1, in_features), [block_m, block_n // 2]),
        sums[1], sums[0], chosen, steps, out_features, in_features, apart,
        ACCUMULATE=accumulate and splits == 1, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=group,
        CHUNK=POSITION_CHUNK, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    _reduce(partial, out, splits, apart, accumulate)


def _launch(
    x: torch.Tensor, grad: torch.Tensor, lengths: tuple[int, ...], position: bool, out: torch.Tensor, accumulate: bool
) -> None:
    out_features, in_features = out.shape
    tma = not position and _by_tma(x, grad, out)
    config = TMA_CONFIG if tma else CONFIG if min(out.shape) > 64 else SMALL_CONFIG
    block_m, block_n, block_k, group, warps, stages = config
    tiles = _cdiv(out_features, block_m) * _cdiv(in_features, block_n)
    splits = max(1, min(len(lengths), multiprocessors(x.device) // tiles))
    table, counts, split_starts, starts = _steps(lengths, block_k, splits, x.device)
    partial, apart = _partial(out, splits, block_m if tma else 1)
    options = {
        "ACCUMULATE": accumulate and splits == 1, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "GROUP": group, "STAGES": stages, "num_warps": warps,
    }  # fmt: skip
    if tma:
        if any(length % block_k for length in lengths[:-1]):
            x, grad = _aligned(x, table, block_k), _aligned(grad, table, block_k)
        _fisher_tma_kernel[(tiles, splits)](
            TensorDescriptor.from_tensor(grad, [block_k, block_m]),
            TensorDescriptor.from_tensor(x, [block_k, block_n]),
            TensorDescriptor.from_tensor(partial.view(-1, in_features), [block_m, block_n // 2]),
            counts, split_starts, apart, in_features, **options,
        )  # fmt: skip
    else:
        _fisher_kernel[(tiles, splits)](
            grad, x, partial, table, starts, out_features, in_features,
            EVEN=out_features % block_m == 0 and in_features % block_n == 0,
            POSITION=position, PRECISION="tf32x3" if x.is_cuda else "ieee", **options,
        )  # fmt: skip
    _reduce(partial, out, splits, apart, accumulate)


def _partial(out: torch.Tensor, splits: int, block_m: int) -> tuple[torch.Tensor, int]:
    """Where splits write, and how many rows apart: a tile written by TMA must not reach into the next split's."""
    if splits == 1:
        return out, out.shape[0]
    apart = _cdiv(out.shape[0], block_m) * block_m
    return torch.empty(splits, apart, out.shape[1], dtype=torch.float32, device=out.device), apart


def _reduce(partial: torch.Tensor, out: torch.Tensor, splits: int, apart: int, accumulate: bool) -> None:
    if splits > 1:
        _fisher_reduce_kernel[(_cdiv(out.numel(), REDUCE_BLOCK),)](
            partial, out, apart * out.shape[1], out.numel(), splits, ACCUMULATE=accumulate, BLOCK=REDUCE_BLOCK
        )


def _pieces(rows: int, piece: int = 512) -> tuple[int, ...]:
    return (piece,) * (rows // piece) + ((rows % piece,) if rows % piece else ())
