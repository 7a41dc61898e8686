"""Device functions and launch helpers that several Triton kernels share."""

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-7 on uint32 tensors: four random words a counter (Salmon et al., SC 2011)."""
    for _ in tl.static_range(7):
        high0 = tl.umulhi(c0, tl.full((), 0xD2511F53, tl.uint32))
        low0 = c0 * tl.full((), 0xD2511F53, tl.uint32)
        high1 = tl.umulhi(c2, tl.full((), 0xCD9E8D57, tl.uint32))
        low1 = c2 * tl.full((), 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep_mask(
    seed,
    first_row,
    first_column,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOVE_WORDS: tl.constexpr = False,
):
    """The dropout mask of a (ROWS, COLUMNS) tile as the package's reference defines it (sensilora/ops/_dropout.py).

    `first_column` and COLUMNS are multiples of 32: four Philox calls serve a span of 32 columns with 16 bits each.
    In a tensor core's layout what one call gives stays in one thread. Where the mask meets another layout,
    MOVE_WORDS moves whole words before each becomes two truth values, which takes fewer exchanges than moving those.
    """
    row = first_row.to(tl.int64) + tl.arange(0, ROWS)
    call = (first_column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    zero = tl.zeros((ROWS, COLUMNS // 8), dtype=tl.uint32)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox(zero + call[None, :], zero + low[:, None], zero + high[:, None], zero, k0, k1)
    if MOVE_WORDS:
        # (row, span, call, word) to the order of columns: (row, span, word, call, half).
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLUMNS // 32, 4, 4))
        kept = _kept_halves(tl.reshape(tl.permute(words, (0, 1, 3, 2)), (ROWS, COLUMNS // 2)), threshold)
    else:
        even = tl.join(_kept_halves(w0, threshold), _kept_halves(w2, threshold))
        odd = tl.join(_kept_halves(w1, threshold), _kept_halves(w3, threshold))
        # (row, span, call, half, word / 2, word % 2) to the same order.
        kept = tl.reshape(tl.join(even, odd), (ROWS, COLUMNS // 32, 4, 2, 2, 2))
        kept = tl.permute(kept, (0, 1, 4, 5, 2, 3))
    return tl.reshape(kept, (ROWS, COLUMNS))


@triton.jit
def _kept_halves(word, threshold):
    return tl.join((word & 0xFFFF) >= threshold, (word >> 16) >= threshold)


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
