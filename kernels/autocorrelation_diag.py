"""Column sums of squares in one pass over x, in two deterministic launches without atomics.

Bytes: x once, plus 2·SPLITS·in·4 for the partials. The first kernel gives every program a strip of columns and a
range of rows and keeps a (BLOCK_ROWS, BLOCK_COLUMNS) accumulator in registers, reduced once at its end; the second
adds the strips' partials in a fixed order.
"""

import torch
import triton
import triton.language as tl

from sensilora.kernels._common import multiprocessors, sum_partials

BLOCK_ROWS = 32
BLOCK_COLUMNS = 128
# Programs a multiprocessor should have in flight for the loads to cover the memory latency.
PROGRAMS_PER_SM = 8


@triton.jit
def _autocorrelation_diag_partial_kernel(
    x,
    mask,
    partial,
    rows,
    columns,
    row_stride,
    tiles_per_split,
    HAS_MASK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    split = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    # int64: rows * row_stride may pass 2^31 elements.
    first_row = split.to(tl.int64) * tiles_per_split * BLOCK_ROWS
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=partial.dtype.element_ty)
    for tile in range(tiles_per_split):
        row = first_row + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        counted = row < rows
        if HAS_MASK:
            counted = counted & (tl.load(mask + row, mask=counted, other=0) != 0)
        pointers = x + row[:, None] * row_stride + column[None, :]
        value = tl.load(pointers, mask=counted[:, None] & (column < columns)[None, :], other=0.0)
        value = value.to(total.dtype)
        total += value * value
    tl.store(partial + split.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=column < columns)


@triton.jit
def _autocorrelation_diag_reduce_kernel(
    partial, out, columns, splits, ACCUMULATE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    total = sum_partials(partial, column, columns, splits, 16).to(out.dtype.element_ty)
    if ACCUMULATE:
        total += tl.load(out + column, mask=inside, other=0.0)
    tl.store(out + column, total, mask=inside)


def launch_autocorrelation_diag(
    x: torch.Tensor, mask: torch.Tensor | None, out: torch.Tensor, accumulate: bool
) -> None:
    """Write diag(Σ_t x_t x_tᵀ) to `out`, or add it.

    Args:
        x: (rows, columns), unit column stride.
        mask: bool (rows,) contiguous, or None.
        out: (columns,), fp32 or fp64, contiguous.
        accumulate: add to `out` where true; overwrite it where false.
    """
    rows, columns = x.shape
    if columns == 0:
        return
    strips = triton.cdiv(columns, BLOCK_COLUMNS)
    tiles = triton.cdiv(rows, BLOCK_ROWS)
    splits = max(1, min(tiles, triton.cdiv(multiprocessors(x.device) * PROGRAMS_PER_SM, strips)))
    tiles_per_split = triton.cdiv(tiles, splits)
    partial = torch.empty(
        splits, columns, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device
    )
    _autocorrelation_diag_partial_kernel[(strips, splits)](
        x,
        x if mask is None else mask.view(torch.uint8),
        partial,
        rows,
        columns,
        x.stride(0),
        tiles_per_split,
        HAS_MASK=mask is not None,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
    )
    _autocorrelation_diag_reduce_kernel[(strips,)](
        partial, out, columns, splits, ACCUMULATE=accumulate, BLOCK_COLUMNS=BLOCK_COLUMNS
    )
