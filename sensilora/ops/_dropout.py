"""The dropout mask as a function of (seed, row, column): plain torch reference of what every backend generates.

Counter-based (Philox4x32-7; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, with the
fewest rounds that pass its tests, since the rounds are what a mask costs), so the mask is never stored, does not
depend on tiling or thread count, and is the same in forward, in backward and under checkpoint replay. One Philox
call serves 8 columns, those that one thread holds of a tensor core's operand or accumulator (four pairs of
neighbours, 8 columns apart), so that no bit has to change threads. Each takes 15 bits of half a word: with the 16th
set, one subtraction compares both halves, and neither borrows from the other.

    counter = (4 (column // 32) + column % 8 // 2, row mod 2^32, row // 2^32, 0)
    key     = (seed mod 2^32, seed // 2^32)
    bits    = the lower 15 of half (column % 2, low half first) of output word column % 32 // 8
    kept    = bits >= round(32768 p);  kept values are scaled by 32768 / (32768 - round(32768 p))

The scale uses the rounded probability, so the expectation is exact for every p that does not round to 1; p = 0 and
p = 1 are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

#: Columns that four Philox calls serve together: (word, call, half) in the order of columns.
SPAN = 32
#: Dropout probabilities are multiples of 1 / LEVELS.
LEVELS = 32768


def threshold(p: float) -> int:
    """Least 15-bit value that is kept."""
    return round(p * LEVELS)


def keep_scale(p: float) -> float:
    """Factor of the kept values; 0 where nothing is kept."""
    kept = LEVELS - threshold(p)
    return LEVELS / kept if kept else 0.0


def keep_mask(rows: int, columns: int, p: float, seed: Tensor | int, device: torch.device | str = "cpu") -> Tensor:
    """bool (rows, columns): which elements dropout keeps. Memory: about 100 bytes an element while it runs."""
    row = torch.arange(rows, dtype=torch.int64, device=device).unsqueeze(1)
    call = torch.arange(4 * -(-columns // SPAN), dtype=torch.int64, device=device).unsqueeze(0)
    row, call = torch.broadcast_tensors(row, call)
    words = philox((call, row & _WORD, row >> 32, torch.zeros_like(row)), seed)
    halves = torch.stack([torch.stack((word & 0x7FFF, word >> 16 & 0x7FFF), dim=-1) for word in words], dim=-2)
    # (row, span, call, word, half) to (row, span, word, call, half), which is the order of columns.
    bits = halves.unflatten(1, (-1, 4)).transpose(2, 3)
    return bits.flatten(1)[:, :columns] >= threshold(p)


def philox(counter: tuple[Tensor, ...], seed: Tensor | int) -> tuple[Tensor, ...]:
    """Philox4x32-7 on int64 tensors that hold 32-bit words. The wrapped 64-bit product has the right low 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def dropout(x: Tensor, p: float, seed: Tensor | int) -> Tensor:
    """Dropout of `x` (rows, columns) with the mask of `keep_mask`, scaled so that the expectation is `x`."""
    if p == 0.0:
        return x
    kept = keep_mask(x.shape[0], x.shape[1], p, seed, x.device)
    return torch.where(kept, x * keep_scale(p), 0.0)
