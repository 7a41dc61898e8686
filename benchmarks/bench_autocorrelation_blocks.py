"""autocorrelation_blocks against the same product of x in fp32. Limit: one read of x, or 2·rows·in·block FLOPs."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.harness import Case, Cases, relative_error
from sensilora.ops import autocorrelation_blocks

BLOCK_SIZE = 128


def cases(device: str) -> Cases:
    if device == "cpu":
        return {}
    return {
        f"autocorrelation_blocks/8192x{columns}/b{BLOCK_SIZE}/bfloat16": partial(_case, device, 8192, columns)
        for columns in (4096, 14336)
    }


def _case(device: str, rows: int, columns: int) -> Case:
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    full = torch.empty(columns, columns, device=device, dtype=torch.bfloat16)
    return Case(
        ours=lambda: autocorrelation_blocks(x, BLOCK_SIZE),
        baseline=lambda: autocorrelation_blocks(x.float(), BLOCK_SIZE),
        errors=lambda: [
            relative_error(autocorrelation_blocks(x, BLOCK_SIZE), autocorrelation_blocks(x.double(), BLOCK_SIZE))
        ],
        tolerance=1e-5,
        peers={"full XᵀX in bf16": lambda: torch.mm(x.T, x, out=full)},
        floor_bytes=x.nbytes,
        floor_flops=2 * rows * columns * BLOCK_SIZE,
    )


def test_autocorrelation_blocks(timed) -> None:
    timed()
