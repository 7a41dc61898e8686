"""What the ops around a frozen layer and its adapters share: operands under autocast, checks, rows, seeds, h."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def cast_for_autocast(x: Tensor, *operands: Tensor | None) -> tuple[Any, ...]:
    """`x` and the frozen operands in the dtype in which ``torch.nn.functional.linear`` would take them."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *operands
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), *(None if operand is None else operand.to(dtype) for operand in operands)


def check_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dropout_p: float
) -> None:
    """Raise ValueError unless these make one frozen layer with its adapter."""
    out_features, in_features = weight.shape
    rank = lora_A.shape[0]
    if x.shape[-1] != in_features or lora_A.shape != (rank, in_features) or lora_B.shape != (out_features, rank):
        raise ValueError(
            f"shapes do not fit: x {tuple(x.shape)}, weight {tuple(weight.shape)}, "
            f"lora_A {tuple(lora_A.shape)}, lora_B {tuple(lora_B.shape)}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must have shape {(out_features,)}, not {tuple(bias.shape)}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"weight and bias must have x's dtype {x.dtype}, not {weight.dtype}; cast x or use autocast")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], not {dropout_p}")


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """int64 (count,): keys of dropout masks from torch's default generator of `device`.

    Drawn outside the ops, so that ``torch.manual_seed``, checkpoint replay and CUDA graphs repeat or renew them.
    """
    return torch.randint(2**63 - 1, (count,), dtype=torch.int64, device=device)


def rows(x: Tensor) -> Tensor:
    """Every leading dimension folded into one; reshape(-1, ...) would not do for a last size of 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def padded_rank(rank: int) -> int:
    """Columns of the saved h: the rank and zeros up to a multiple of 16, so that kernels read every rank aligned."""
    return -(-rank // 16) * 16


def columns_of_h(ranks: Sequence[int]) -> list[slice]:
    """Where each member's columns of h are, padding included: behind those of the members before it."""
    ends = [0]
    for rank in ranks:
        ends.append(ends[-1] + padded_rank(rank))
    return [slice(*pair) for pair in itertools.pairwise(ends)]
