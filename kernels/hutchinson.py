"""out += z ⊙ hz with random signs z, in one pass bound by memory; and z alone.

Bytes: hz and `out` read, `out` written. A program takes BLOCK neighbouring elements and makes their signs with a
Philox call for every 128 of them, a bit each (sensilora/ops/hutchinson.py); 128 bits cost about 70 instructions, so
even where every warp makes them anew they hide behind the loads.
"""

import torch
import triton
import triton.language as tl

from sensilora.kernels._common import philox

# Enough bytes in flight a multiprocessor: 2 to 8 KiB of loads a warp, and many programs.
BLOCK = 4096
WARPS = 4


@triton.jit
def _sign_bits(first, key0, key1, offset0, offset1, BLOCK: tl.constexpr):
    """The bits of elements [first, first + BLOCK) as (BLOCK / 32, 32), 1 for a sign of -1; `first` is int64."""
    call = first // 128 + tl.arange(0, BLOCK // 128)
    zero = tl.zeros((BLOCK // 128,), dtype=tl.uint32)
    w0, w1, w2, w3 = philox(
        (call & 0xFFFFFFFF).to(tl.uint32),
        (call >> 32).to(tl.uint32),
        zero + offset0.to(tl.uint32, bitcast=True),
        zero + offset1.to(tl.uint32, bitcast=True),
        key0.to(tl.uint32, bitcast=True),
        key1.to(tl.uint32, bitcast=True),
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK // 32,))
    return (words[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1


@triton.jit(do_not_specialize=["key0", "key1", "offset0", "offset1"])
def _hutchinson_accumulate_kernel(hz, out, size, key0, key1, offset0, offset1, BLOCK: tl.constexpr):
    # int64: a diagonal may have more than 2^31 elements.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    negative = _sign_bits(first, key0, key1, offset0, offset1, BLOCK) != 0
    local = tl.arange(0, BLOCK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = local < size - first
    value = tl.load(hz + first + local, mask=inside, other=0.0).to(out.dtype.element_ty)
    total = tl.load(out + first + local, mask=inside, other=0.0)
    tl.store(out + first + local, total + tl.where(negative, -value, value), mask=inside)


@triton.jit(do_not_specialize=["key0", "key1", "offset0", "offset1"])
def _rademacher_kernel(out, size, key0, key1, offset0, offset1, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    negative = _sign_bits(first, key0, key1, offset0, offset1, BLOCK) != 0
    local = tl.arange(0, BLOCK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out + first + local, tl.where(negative, -1.0, 1.0).to(out.dtype.element_ty), mask=local < size - first)


def _words(value: int) -> tuple[int, int]:
    """Low and high 32 bits as signed integers, so that every value is of one type to Triton."""
    low, high = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def launch_hutchinson_accumulate(hz: torch.Tensor, out: torch.Tensor, seed: int, offset: int) -> None:
    """Add z ⊙ hz to `out`.

    Args:
        hz: contiguous, any floating type.
        out: contiguous, fp32 or fp64, of hz's size.
        seed, offset: integers of 64 bits.
    """
    if out.numel():
        _hutchinson_accumulate_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            hz, out, out.numel(), *_words(seed), *_words(offset), BLOCK=BLOCK, num_warps=WARPS
        )


def launch_rademacher(out: torch.Tensor, seed: int, offset: int) -> None:
    """Fill `out`, contiguous and of any floating type, with the signs z."""
    if out.numel():
        _rademacher_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            out, out.numel(), *_words(seed), *_words(offset), BLOCK=BLOCK, num_warps=WARPS
        )
