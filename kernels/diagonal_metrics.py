"""Trace, mean of the largest values and effective rank of many diagonals, exactly and without sorting.

The radix select of csrc/diagonal_metrics_kernels.cuh: counts and exact sums by the exponent, then by the next 11 bits
and the last 12 inside the bins that the k-th value and the crossing of alpha * trace fall into. Triton adds to no
shared memory, so the first pass goes through the exponents a tile has and adds up those values in registers; the
later ones, which touch few values, add to tables in the L2 cache.

Bytes: the diagonals three times. Work: about five operations a value and exponent of its tile in the first pass.
"""

import struct

import torch
import triton
import triton.language as tl

# A word of the first pass holds a count above a sum of fractions: 2^18 values (2^23 - 1) < 2^44.
TILE = tl.constexpr(2048)
TILES = tl.constexpr(16)
COUNT_SHIFT = tl.constexpr(44)
PASS_WARPS = 4

EXPONENTS = tl.constexpr(256)
DIGITS = tl.constexpr(2048)
TAILS = tl.constexpr(4096)
FRACTION_BITS = tl.constexpr(23)
TAIL_BITS = tl.constexpr(12)
# Limbs of 32 bits of a sum, in units of 2^-149.
LIMBS = tl.constexpr(10)

# A matrix's words of 64 bits, zero at first: counts and sums by exponent, whether there is a negative value; counts
# and sums by digit, for each of the two cuts; counts by tail; the cuts; what is above the exponent of the first.
NEGATIVE = tl.constexpr(512)
DIGIT_TABLES = tl.constexpr(516)
TAIL_TABLES = tl.constexpr(516 + 4 * 2048)
CUTS = tl.constexpr(516 + 4 * 2048 + 2 * 4096)
HEAD = tl.constexpr(516 + 4 * 2048 + 2 * 4096 + 8)
WORK = tl.constexpr(516 + 4 * 2048 + 2 * 4096 + 8 + 12)
# The words of a cut: the bit pattern its bin begins at, how far it is away from the bin's upper end (in values, or in
# their mantissas' sum), the values above the bin, the mantissas above it that have its exponent.
PREFIX, REMAINING, ABOVE, SUM_ABOVE = (tl.constexpr(i) for i in range(4))
# A prefix that no value has.
NO_PREFIX = tl.constexpr(-1)


@triton.jit
def _chunk(table, matrices, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, MATRICES: tl.constexpr):
    """The matrix this program's chunk is of, its values and their number, the chunk's first value and its tiles."""
    chunk = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, MATRICES)
    first = tl.load(table + 4 * (index + 1) + 2, mask=index < matrices, other=0x7FFFFFFFFFFFFFFF)
    matrix = tl.sum((first <= chunk).to(tl.int32), axis=0)
    values = tl.load(table + 4 * matrix).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        values = tl.multiple_of(values, 16)
    begin = (chunk - tl.load(table + 4 * matrix + 2)) * (TILE * TILES)
    size = tl.load(table + 4 * matrix + 1)
    return matrix, values, size, begin, tl.minimum(tl.cdiv(size - begin, TILE), TILES).to(tl.int32)


@triton.jit
def _bits(values, first, size):
    """The bit patterns of a tile in fp32, and which of them exist."""
    index = first + tl.arange(0, TILE)
    inside = index < size
    # Loads without a mask can be of 16 bytes.
    value = tl.load(values + index) if first + TILE <= size else tl.load(values + index, mask=inside, other=0.0)
    return value.to(tl.float32).to(tl.int32, bitcast=True), inside


@triton.jit
def _metrics_exponents_kernel(
    table, work, matrices, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, MATRICES: tl.constexpr
):
    matrix, values, size, begin, tiles = _chunk(table, matrices, ALIGNED, DTYPE, MATRICES)
    bins = tl.arange(0, EXPONENTS)
    total = tl.zeros((EXPONENTS,), dtype=tl.int64)
    negative = tl.zeros((TILE,), dtype=tl.int1)
    for tile in range(tiles):
        bits, _ = _bits(values, begin + tile * TILE, size)
        pattern = bits & 0x7FFFFFFF
        negative = negative | ((bits < 0) & (pattern != 0))
        exponent = pattern >> FRACTION_BITS
        # Zeros are those that are not counted.
        one = tl.full((), 1, tl.int64) << COUNT_SHIFT
        word = tl.where(pattern != 0, one + (pattern & 0x7FFFFF), 0)
        lowest = tl.min(tl.where(pattern != 0, exponent, 256), axis=0)
        for e in range(lowest, tl.max(exponent, axis=0) + 1):
            total += tl.where(bins == e, tl.sum(tl.where(exponent == e, word, 0), axis=0), 0)
    work += matrix.to(tl.int64) * WORK
    tl.atomic_add(work + bins, total >> COUNT_SHIFT, mask=total != 0, sem="relaxed")
    fractions = total & ((tl.full((), 1, tl.int64) << COUNT_SHIFT) - 1)
    tl.atomic_add(work + EXPONENTS + bins, fractions, mask=total != 0, sem="relaxed")
    if tl.max(negative.to(tl.int32), axis=0) > 0:
        tl.atomic_add(work + NEGATIVE, tl.full((), 1, tl.int64), sem="relaxed")


@triton.jit
def _metrics_refine_kernel(
    table, work, matrices, DIGIT: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, MATRICES: tl.constexpr
):
    """Counts the values in the cuts' bins: by digit, with sums of tails, or by tail."""
    matrix, values, size, begin, tiles = _chunk(table, matrices, ALIGNED, DTYPE, MATRICES)
    work += matrix.to(tl.int64) * WORK
    kth = tl.load(work + CUTS + PREFIX).to(tl.int32)
    crossing = tl.load(work + CUTS + 4 + PREFIX).to(tl.int32)
    for tile in range(tiles):
        bits, inside = _bits(values, begin + tile * TILE, size)
        if DIGIT:
            prefix = bits & 0x7F800000
            place, bins, counts = (bits >> TAIL_BITS) & (DIGITS - 1), DIGITS, DIGIT_TABLES
        else:
            prefix = bits & 0x7FFFF000
            place, bins, counts = bits & (TAILS - 1), TAILS, TAIL_TABLES
        place += tl.where(prefix == kth, 0, bins)
        counted = inside & ((prefix == kth) | (prefix == crossing))
        tail = (bits & (TAILS - 1)).to(tl.int64)
        lowest = tl.min(tl.where(counted, place, 2 * bins), axis=0)
        highest = tl.max(tl.where(counted, place, -1), axis=0)
        if lowest < highest:
            tl.atomic_add(work + counts + place, tl.full((TILE,), 1, tl.int64), mask=counted, sem="relaxed")
            if DIGIT:
                tl.atomic_add(work + counts + 2 * bins + place, tail, mask=counted & (tail != 0), sem="relaxed")
        elif lowest == highest:
            # Equal values would wait for one another; zeros often are most of the values.
            tl.atomic_add(work + counts + lowest, tl.sum(counted.to(tl.int64), axis=0), sem="relaxed")
            if DIGIT:
                tails = tl.sum(tl.where(counted, tail, 0), axis=0)
                tl.atomic_add(work + counts + 2 * bins + lowest, tails, sem="relaxed")


@triton.jit
def _shift_of(bits):
    """Floats of one exponent are multiples of 2^(shift - 149)."""
    return tl.maximum(((bits >> FRACTION_BITS) & 0xFF) - 1, 0)


@triton.jit
def _mantissa_of(bits):
    """And this many of them."""
    return tl.where(bits >= 0x800000, (bits & 0x7FFFFF) | 0x800000, bits)


@triton.jit
def _limb_of(value, shift, limb):
    """The limb with index `limb` of value * 2^shift, for int64 that are not negative."""
    drop = 32 * limb - shift
    down = tl.where(drop < 63, value >> tl.minimum(tl.maximum(drop, 0), 63), 0)
    up = tl.where(drop > -32, value << tl.minimum(tl.maximum(-drop, 0), 31), 0)
    return tl.where(drop >= 0, down, up) & 0xFFFFFFFF


@triton.jit
def _limb_at(limbs, index):
    return tl.sum(tl.where(tl.arange(0, 16) == index, limbs, 0), axis=0)


@triton.jit
def _to_double(limbs):
    """The nearest fp64 to a sum, ties to even."""
    index = tl.arange(0, 16)
    top = tl.max(tl.where(limbs != 0, index, 0), axis=0)
    high, middle, low = _limb_at(limbs, top), _limb_at(limbs, top - 1), _limb_at(limbs, top - 2)
    rest = tl.max(((limbs != 0) & (index < top - 2)).to(tl.int32), axis=0)
    exponent = 32 * (top - 1) - 149
    for step in tl.static_range(5):
        lift = 16 >> step
        small = high < (1 << (32 - lift))
        high = tl.where(small, (high << lift) | (middle >> (32 - lift)), high)
        middle = tl.where(small, ((middle << lift) & 0xFFFFFFFF) | (low >> (32 - lift)), middle)
        low = tl.where(small, (low << lift) & 0xFFFFFFFF, low)
        exponent -= tl.where(small, lift, 0)
    # Of the 62 bits the last stands for all below it, so that the conversion rounds as the whole sum would.
    leading = (high << 30) | (middle >> 2) | (((middle & 3) | low | rest) != 0).to(tl.int64)
    scale = ((exponent + 2 + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    return leading.to(tl.float64) * scale


@triton.jit(do_not_specialize=["alpha_bits"])
def _metrics_exponent_cuts_kernel(table, work, trace, effective_rank, alpha_bits):
    """The exponents of a matrix's two cuts, its trace, and whether its values are valid."""
    matrix = tl.program_id(0).to(tl.int64)
    size, kth = tl.load(table + 4 * matrix + 1), tl.load(table + 4 * matrix + 3)
    work += matrix * WORK
    exponent = EXPONENTS - 1 - tl.arange(0, EXPONENTS)  # descending
    bits = exponent << FRACTION_BITS
    shift = _shift_of(bits)
    count = tl.load(work + exponent)
    count += tl.where(exponent == 0, size - tl.sum(count, axis=0), 0)
    own = tl.load(work + EXPONENTS + exponent) + count * _mantissa_of(bits).to(tl.int64)
    non_finite = tl.sum(tl.where(exponent == EXPONENTS - 1, count, 0), axis=0) > 0

    index = tl.arange(0, 16)
    all_limbs = tl.zeros((16,), dtype=tl.int64)
    carry = tl.full((), 0, tl.int64)
    for j in tl.static_range(LIMBS):
        carry += tl.sum(_limb_of(own, shift, j), axis=0)
        all_limbs = tl.where(index == j, carry & 0xFFFFFFFF, all_limbs)
        carry = carry >> 32
    total = _to_double(all_limbs)

    # The smallest sum that is at least alpha * trace and no zero; the product rounds, and may round above the exact
    # trace.
    alpha = tl.cast(alpha_bits, tl.int64).to(tl.float64, bitcast=True)
    wanted = (alpha * total).to(tl.int64, bitcast=True)
    mantissa = (wanted & 0xFFFFFFFFFFFFF) | tl.where((wanted >> 52) > 0, 1 << 52, 0)
    lift = tl.maximum(wanted >> 52, 1) - 1075 + 149
    drop = tl.minimum(tl.maximum(-lift, 0), 63)
    kept = mantissa >> drop
    kept = tl.maximum(kept + ((kept << drop) != mantissa).to(tl.int64), 1)
    target = _limb_of(kept, tl.maximum(lift, 0), index)
    beyond = target - all_limbs
    beyond = _limb_at(beyond, tl.max(tl.where(beyond != 0, index, 0), axis=0)) > 0
    target = tl.where(beyond, all_limbs, target)

    # How far the target is above what the larger exponents sum to, in units of each exponent.
    count_above = tl.cumsum(count, axis=0) - count
    is_kth = (count_above < kth) & (count_above + count >= kth)
    need = tl.zeros((EXPONENTS,), dtype=tl.int64)
    rest = tl.zeros((EXPONENTS,), dtype=tl.int1)
    far = tl.zeros((EXPONENTS,), dtype=tl.int1)
    carries = tl.zeros((EXPONENTS,), dtype=tl.int64)
    for j in tl.static_range(LIMBS):
        part = _limb_of(own, shift, j)
        above = tl.cumsum(part, axis=0) - part
        tl.store(work + HEAD + j, tl.sum(tl.where(is_kth, above, 0), axis=0))
        carries += _limb_at(target, j) - above
        limb = carries & 0xFFFFFFFF
        carries = carries >> 32
        up = 32 * j - shift
        down = tl.minimum(tl.maximum(-up, 0), 32)
        rest = rest | ((limb & ((tl.full((), 1, tl.int64) << down) - 1)) != 0)
        held = tl.minimum(tl.maximum(up, 0), 62)
        far = far | ((limb >> (62 - held)) != 0)
        need += tl.where(up < 62, (limb >> down) << held, 0)
    need += rest.to(tl.int64)
    is_crossing = (carries >= 0) & (far == 0) & (need > 0) & (need <= own)

    valid = (non_finite == 0) & (tl.load(work + NEGATIVE) == 0)
    _store_cut(work + CUTS, is_kth & valid, bits, kth - count_above, count_above, tl.zeros_like(need))
    _store_cut(work + CUTS + 4, is_crossing & valid, bits, need, count_above, tl.zeros_like(need))
    tl.store(trace + matrix, tl.where(valid, total, float("nan")))
    tl.store(effective_rank + matrix, tl.where(non_finite, -1, tl.where(valid, 0, -2)))


@triton.jit
def _store_cut(cut, here, prefix, remaining, above, sum_above):
    """Stores the elements where `here` is true, which is so at one place; at none where there is no cut."""
    found = tl.max(here.to(tl.int32), axis=0) > 0
    prefix = tl.sum(tl.where(here, prefix, 0), axis=0)
    tl.store(cut + PREFIX, tl.where(found, prefix, NO_PREFIX).to(tl.int64))
    tl.store(cut + REMAINING, tl.sum(tl.where(here, remaining, 0), axis=0))
    tl.store(cut + ABOVE, tl.sum(tl.where(here, above, 0), axis=0))
    tl.store(cut + SUM_ABOVE, tl.sum(tl.where(here, sum_above, 0), axis=0))


@triton.jit
def _refined(cut, counts, BY_COUNT: tl.constexpr, DIGIT: tl.constexpr):
    """Where in the bins of its bin a cut is: its four words by bin, and the bin."""
    bins: tl.constexpr = DIGITS if DIGIT else TAILS
    place = bins - 1 - tl.arange(0, bins)  # descending
    prefix = tl.load(cut + PREFIX).to(tl.int32) + place * (TAILS if DIGIT else 1)
    count = tl.load(counts + place)
    own = count * _mantissa_of(prefix).to(tl.int64)
    if DIGIT:
        own += tl.load(counts + 2 * bins + place)
    above, sum_above = tl.cumsum(count, axis=0) - count, tl.cumsum(own, axis=0) - own
    remaining = tl.load(cut + REMAINING) - (above if BY_COUNT else sum_above)
    here = (remaining > 0) & (remaining <= (count if BY_COUNT else own))
    return here, prefix, remaining, above + tl.load(cut + ABOVE), sum_above + tl.load(cut + SUM_ABOVE)


@triton.jit
def _metrics_digit_cuts_kernel(work):
    work += tl.program_id(0).to(tl.int64) * WORK
    kth, crossing = work + CUTS, work + CUTS + 4
    # Values in the bins of both cuts are in the table of the first.
    same = tl.load(kth + PREFIX) == tl.load(crossing + PREFIX)
    of_kth = _refined(kth, work + DIGIT_TABLES, True, True)
    of_crossing = _refined(crossing, work + DIGIT_TABLES + tl.where(same, 0, DIGITS), False, True)
    tl.debug_barrier()  # all threads have read what the stores replace
    _store_cut(kth, of_kth[0], of_kth[1], of_kth[2], of_kth[3], of_kth[4])
    _store_cut(crossing, of_crossing[0], of_crossing[1], of_crossing[2], of_crossing[3], of_crossing[4])


@triton.jit
def _at(here, value):
    return tl.sum(tl.where(here, value, 0), axis=0)


@triton.jit
def _metrics_finish_kernel(table, work, trace, topk_mean, effective_rank):
    matrix = tl.program_id(0).to(tl.int64)
    work += matrix * WORK
    kth, crossing = work + CUTS, work + CUTS + 4
    same = tl.load(kth + PREFIX) == tl.load(crossing + PREFIX)
    invalid = tl.load(effective_rank + matrix) < 0

    here, prefix, remaining, _, sum_above = _refined(kth, work + TAIL_TABLES, True, False)
    bits = _at(here, prefix)
    extra = _at(here, sum_above) + _at(here, remaining) * _mantissa_of(bits).to(tl.int64)
    index = tl.arange(0, 16)
    own = _limb_of(extra, _shift_of(bits), index)
    own += tl.load(work + HEAD + index, mask=index < LIMBS, other=0)
    limbs = tl.zeros((16,), dtype=tl.int64)
    carry = tl.full((), 0, tl.int64)
    for j in tl.static_range(LIMBS):
        carry += _limb_at(own, j)
        limbs = tl.where(index == j, carry & 0xFFFFFFFF, limbs)
        carry = carry >> 32
    mean = _to_double(limbs) / tl.load(table + 4 * matrix + 3).to(tl.float64)
    tl.store(topk_mean + matrix, tl.where(invalid, float("nan"), mean))

    # The fewest copies of the crossing value that reach the target.
    counts = work + TAIL_TABLES + tl.where(same, 0, TAILS)
    here, prefix, remaining, above, _ = _refined(crossing, counts, False, False)
    mantissa = tl.maximum(_mantissa_of(_at(here, prefix)).to(tl.int64), 1)
    rank = _at(here, above) + (_at(here, remaining) + mantissa - 1) // mantissa
    tl.debug_barrier()  # all threads have read what the store replaces
    tl.store(effective_rank + matrix, rank, mask=invalid == 0)


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch_diagonal_metrics(
    diags: list[torch.Tensor], counts: list[int], alpha: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Trace, mean of the largest values and effective rank of each diagonal.

    Args:
        diags: at least one, each (m,) contiguous; fp32, bf16 or fp16, all of one dtype and on one device.
        counts: how many of the largest values of each to average, in [1, m].
        alpha: share of the trace that the effective rank must reach, in (0, 1].

    Returns:
        (n,) fp64, (n,) fp64 and (n,) int64. The effective rank is -1 where there is a NaN or Inf, else -2 where there
        is a negative value.
    """
    device = diags[0].device
    chunks, rows = 0, []
    for diag, count in zip(diags, counts, strict=True):
        rows.append((diag.data_ptr(), diag.numel(), chunks, count))
        chunks += triton.cdiv(diag.numel(), TILE.value * TILES.value)
    table = torch.tensor([*rows, (0, 0, chunks, 0)], dtype=torch.int64).to(device, non_blocking=True)
    work = torch.zeros(len(diags), WORK.value, dtype=torch.int64, device=device)
    trace = torch.empty(len(diags), dtype=torch.float64, device=device)
    topk_mean, effective_rank = torch.empty_like(trace), torch.empty(len(diags), dtype=torch.int64, device=device)
    (alpha_bits,) = struct.unpack("q", struct.pack("d", alpha))
    options = {
        "ALIGNED": all(row[0] % 16 == 0 for row in rows),
        "DTYPE": _DTYPES[diags[0].dtype],
        "MATRICES": triton.next_power_of_2(len(diags)),
        "num_warps": PASS_WARPS,
    }
    matrices = (len(diags),)
    if chunks:
        _metrics_exponents_kernel[(chunks,)](table, work, len(diags), **options)
    _metrics_exponent_cuts_kernel[matrices](table, work, trace, effective_rank, alpha_bits, num_warps=4)
    if chunks:
        _metrics_refine_kernel[(chunks,)](table, work, len(diags), DIGIT=True, **options)
    _metrics_digit_cuts_kernel[matrices](work, num_warps=8)
    if chunks:
        _metrics_refine_kernel[(chunks,)](table, work, len(diags), DIGIT=False, **options)
    _metrics_finish_kernel[matrices](table, work, trace, topk_mean, effective_rank, num_warps=16)
    return trace, topk_mean, effective_rank
