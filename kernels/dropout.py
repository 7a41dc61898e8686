"""The adapter's input with its dropout mask applied, for products that cannot make the mask themselves."""

import torch
import triton
import triton.language as tl

from sensilora.kernels._common import drop

BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 32, 128, 4


@triton.jit(do_not_specialize=["threshold"])
def _dropout_kernel(
    x, out, seed, rows, columns, scale, threshold, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """out (rows, columns) = scale * mask∘x."""
    tiles_c = tl.cdiv(columns, BLOCK_C)
    first_row = (tl.program_id(0) // tiles_c).to(tl.int64) * BLOCK_T
    first_column = tl.program_id(0) % tiles_c * BLOCK_C
    t = first_row + tl.arange(0, BLOCK_T)
    c = first_column + tl.arange(0, BLOCK_C)
    inside = (t < rows)[:, None] & (c < columns)[None, :]
    places = t[:, None] * columns + c[None, :]
    tile = tl.load(x + places, mask=inside, other=0.0)
    tile = drop(tile, tl.load(seed), first_row, first_column, threshold)
    tl.store(out + places, (tile.to(tl.float32) * scale).to(out.dtype.element_ty), mask=inside)


def launch_dropout(x: torch.Tensor, threshold: int, keep_scale: float, seed: torch.Tensor) -> torch.Tensor:
    """keep_scale * mask∘x for contiguous x (rows, columns); seed is an int64 tensor of one element on its device."""
    rows, columns = x.shape
    out = torch.empty_like(x)
    tiles = -(-rows // BLOCK_ROWS) * -(-columns // BLOCK_COLUMNS)
    if tiles > 0:
        _dropout_kernel[(tiles,)](
            x, out, seed, rows, columns, keep_scale, threshold, BLOCK_T=BLOCK_ROWS, BLOCK_C=BLOCK_COLUMNS,
            num_warps=WARPS,
        )  # fmt: skip
    return out
