"""Diagonal blocks of the input autocorrelation of a linear layer, H = Σ_t x_t x_tᵀ (Sensitivity-LoRA, appendix E)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sensilora.ops._backend import accumulator_dtype

_HALVES = (torch.bfloat16, torch.float16)
# Rows of a product: a tensor core cuts off what it adds to a sum, and squares only ever add to it. With 8192 rows in
# one product the diagonal was off by 2.7e-5 on an H200.
_ROWS = 1024


def autocorrelation_blocks(x: Tensor, block_size: int, *, mask: Tensor | None = None) -> Tensor:
    """The diagonal blocks of Σ_t x_t x_tᵀ over the counted rows of `x`: features of one block with one another.

    What GPTQ's surrogate of the Hessian needs to be inverted block by block (Sensitivity-LoRA, arXiv 2509.09119,
    section 4.6 and appendix E). It is a batched product on every device, so it has no backends to choose from: on
    CUDA, 16-bit rows are multiplied as they are and summed in fp32; autocast does not apply.

    Args:
        x: (..., in_features), fp64, fp32, bf16 or fp16, any strides.
        block_size: features a block; above in_features it means in_features.
        mask: bool, shape ``x.shape[:-1]``; rows where it is false do not count, whatever they hold (NaN too).

    Returns:
        (blocks, block, block) with block = min(block_size, in_features), fp64 if `x` is fp64, else fp32; zeros beyond
        in_features in the last block. Unit: the square of x's. Not differentiable.

    Raises:
        ValueError: a shape, dtype, device or the block size does not fit.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor (..., in_features), not {tuple(x.shape)} {x.dtype}")
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool or mask.device != x.device):
        raise ValueError(
            f"mask must be bool of shape {tuple(x.shape[:-1])} on {x.device}, "
            f"not {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    x = x.detach()
    if mask is not None:
        # Rows are not gathered: how many there are would have to be known on the host.
        x = torch.where(mask.unsqueeze(-1), x, 0.0)
    features = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), features)
    block = max(1, min(block_size, features))
    whole, rest = divmod(features, block)
    with torch.autocast(x.device.type, enabled=False):
        blocks = _products(rows[:, : whole * block].unflatten(1, (whole, block)))
        if not rest:
            return blocks
        last = _products(rows[:, whole * block :].unsqueeze(1))
    return torch.cat([blocks, pad(last, (0, block - rest, 0, block - rest))])


def _products(rows: Tensor) -> Tensor:
    """(blocks, block, block) of rows (rows, blocks, block), in the dtype that sums are kept in."""
    if rows.is_cuda and rows.dtype in _HALVES:
        first, *others = rows.split(_ROWS)
        total = torch.bmm(first.permute(1, 2, 0), first.transpose(0, 1), out_dtype=torch.float32)
        for some in others:
            total = torch.baddbmm(total, some.permute(1, 2, 0), some.transpose(0, 1), out_dtype=torch.float32)
        return total
    rows = rows.to(accumulator_dtype(rows.dtype))
    return torch.bmm(rows.permute(1, 2, 0), rows.transpose(0, 1))
