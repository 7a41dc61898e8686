"""Device functions and launch helpers that several Triton kernels share."""

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-7 on uint32 tensors: four random words a counter (Salmon et al., SC 2011)."""
    for _ in tl.static_range(7):
        high0, low0 = _wide_product(c0, 0xD2511F53)
        high1, low1 = _wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


# Triton's interpreter, which knows no inline assembly, makes a jitted function another class.
_INTERPRETED = tl.constexpr(not isinstance(philox, triton.JITFunction))


@triton.jit
def _wide_product(a, B: tl.constexpr):
    """The high and the low word of a product, in one instruction where umulhi and `*` would take two.

    A 64-bit product in Triton gives that instruction too, but makes it move the tile to another layout and back.
    """
    b = tl.full((), B, tl.uint32)
    if _INTERPRETED:
        high, low = tl.umulhi(a, b), a * b
    else:
        high, low = tl.inline_asm_elementwise(
            "{ .reg .b64 product; mul.wide.u32 product, $2, $3; mov.b64 {$1, $0}, product; }",
            "=r,=r,r,r", [a, b], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    return high, low


@triton.jit
def drop(tile, seed, first_row, first_column, threshold, MOVE_WORDS: tl.constexpr = False):
    """mask∘tile for a (rows, columns) tile; the mask is `keep_mask`'s.

    Of a 16-bit tile two neighbours are masked at once, in the word that they share.
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    if tile.dtype.primitive_bitwidth == 16:
        kept = _keep(seed, first_row, first_column, threshold, ROWS, COLUMNS, MOVE_WORDS, True)
        bits = tile.to(tl.uint16, bitcast=True)
        if _INTERPRETED:
            bits &= kept
        else:
            bits = tl.inline_asm_elementwise(
                "and.b32 $0, $1, $2;", "=r,r,r", [bits, kept], dtype=tl.uint16, is_pure=True, pack=2
            )
        dropped = bits.to(tile.dtype, bitcast=True)
    else:
        kept = _keep(seed, first_row, first_column, threshold, ROWS, COLUMNS, MOVE_WORDS, False)
        dropped = tl.where(kept, tile, 0.0)
    return dropped


@triton.jit
def keep_mask(seed, first_row, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The dropout mask of a (ROWS, COLUMNS) tile as the package's reference defines it (sensilora/ops/_dropout.py).

    `first_column` and COLUMNS are multiples of 32: four Philox calls serve a span of 32 columns with 15 bits each.
    """
    return _keep(seed, first_row, first_column, threshold, ROWS, COLUMNS, False, False)


@triton.jit
def _keep(
    seed, first_row, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MOVE_WORDS: tl.constexpr,
    ONES: tl.constexpr,
):  # fmt: skip
    """`keep_mask`'s truth values, or with ONES sixteen ones each, in uint16.

    In a tensor core's layout what one Philox call gives stays in one thread. Where the mask meets another layout,
    MOVE_WORDS moves whole words before each becomes two values, which takes fewer exchanges than moving those.
    """
    w0, w1, w2, w3 = _words(seed, first_row, first_column, ROWS, COLUMNS)
    if MOVE_WORDS:
        kept = _kept(_in_order(w0, w1, w2, w3), threshold, ONES)
    else:
        kept = _halves_in_order(
            _kept(w0, threshold, ONES), _kept(w1, threshold, ONES), _kept(w2, threshold, ONES),
            _kept(w3, threshold, ONES),
        )  # fmt: skip
    return tl.reshape(kept, (ROWS, COLUMNS))


@triton.jit
def _kept(word, threshold, ONES: tl.constexpr):
    """Both halves of each word as `_keep` gives them, in a new last dimension."""
    return _kept_pairs(word, threshold) if ONES else _kept_halves(word, threshold)


@triton.jit
def _words(seed, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What the Philox calls of a tile give: four (ROWS, COLUMNS / 8) tensors."""
    row = first_row.to(tl.int64) + tl.arange(0, ROWS)
    call = (first_column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    zero = tl.zeros((ROWS, COLUMNS // 8), dtype=tl.uint32)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return philox(zero + call[None, :], zero + low[:, None], zero + high[:, None], zero, k0, k1)


@triton.jit
def _in_order(w0, w1, w2, w3):
    """The words as their columns lie, (rows, 4 * calls): (row, span, call, word) to (row, span, word, call)."""
    ROWS: tl.constexpr = w0.shape[0]
    CALLS: tl.constexpr = w0.shape[1]
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, CALLS // 4, 4, 4))
    return tl.reshape(tl.permute(words, (0, 1, 3, 2)), (ROWS, 4 * CALLS))


@triton.jit
def _halves_in_order(h0, h1, h2, h3):
    """Both halves of each word, (rows, calls, 2), as their columns lie: (row, span, word, call, half)."""
    ROWS: tl.constexpr = h0.shape[0]
    CALLS: tl.constexpr = h0.shape[1]
    # (row, span, call, half, word / 2, word % 2)
    halves = tl.reshape(tl.join(tl.join(h0, h2), tl.join(h1, h3)), (ROWS, CALLS // 4, 4, 2, 2, 2))
    return tl.permute(halves, (0, 1, 4, 5, 2, 3))


@triton.jit
def _kept_halves(word, threshold):
    """Whether each half of a word is kept: its lower 15 bits, at the top of a word, against the threshold there."""
    # A threshold of 1 in a tuple arrives as a Python number.
    least = tl.where(threshold >= 1 << 15, 0xFFFFFFFF, tl.cast(threshold, tl.uint32) << 17)
    return tl.join((word << 17) >= least, (word << 1) >= least)


@triton.jit
def _kept_pairs(word, threshold):
    """Sixteen ones for each half of a word that is kept: where the subtraction leaves the half's upper bit."""
    left = (word | 0x80008000) - tl.cast(threshold, tl.uint32) * 0x10001
    if _INTERPRETED:
        ones = (left >> 15 & 0x10001) * 0xFFFF
        low, high = (ones & 0xFFFF).to(tl.uint16), (ones >> 16).to(tl.uint16)
    else:
        # One instruction spreads the upper bit of bytes 1 and 3 over the bytes of its half.
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 ones; prmt.b32 ones, $2, 0, 0xBB99; mov.b32 {$0, $1}, ones; }",
            "=h,=h,r", [left], dtype=(tl.uint16, tl.uint16), is_pure=True, pack=1,
        )  # fmt: skip
    return tl.join(low, high)


@triton.jit
def sum_partials(partial, index, size, splits, SPLITS: tl.constexpr):
    """Σ over the first dimension of a (splits, size) fp32 stack at the flat positions `index`, in a fixed order.

    SPLITS rows are loaded at a time, so that their latencies overlap.
    """
    total = tl.zeros((index.shape[0],), dtype=partial.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        pointers = partial + split.to(tl.int64)[:, None] * size + index[None, :]
        inside = (split < splits)[:, None] & (index < size)[None, :]
        total += tl.sum(tl.load(pointers, mask=inside, other=0.0), axis=0)
    return total


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a small stand-in for the CPU tensors of the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
