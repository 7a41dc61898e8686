"""Device functions and launch helpers that several Triton kernels share."""

import torch
import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 tensors: four random words a counter (Salmon et al., SC 2011)."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full((), 0xD2511F53, tl.uint32))
        low0 = c0 * tl.full((), 0xD2511F53, tl.uint32)
        high1 = tl.umulhi(c2, tl.full((), 0xCD9E8D57, tl.uint32))
        low1 = c2 * tl.full((), 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep_mask(seed, first_row, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The dropout mask of a (ROWS, COLUMNS) tile as the package's reference defines it (sensilora/ops/_dropout.py).

    `first_column` is a multiple of 8: one Philox call serves 8 neighbouring columns with 16 bits each.
    """
    row = first_row.to(tl.int64) + tl.arange(0, ROWS)
    block = (first_column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    zero = tl.zeros((ROWS, COLUMNS // 8), dtype=tl.uint32)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox(zero + block[None, :], zero + low[:, None], zero + high[:, None], zero, k0, k1)
    # Interleave to (row, block, word pair, word, half), which is column order.
    even = tl.join(tl.join(w0 & 0xFFFF, w0 >> 16), tl.join(w2 & 0xFFFF, w2 >> 16))
    odd = tl.join(tl.join(w1 & 0xFFFF, w1 >> 16), tl.join(w3 & 0xFFFF, w3 >> 16))
    bits = tl.permute(tl.join(even, odd), (0, 1, 3, 4, 2))
    return tl.reshape(bits, (ROWS, COLUMNS)) >= threshold


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a small stand-in for the CPU tensors of the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
