"""Diagonal of the input autocorrelation of a linear layer, H = Σ_t x_t x_tᵀ (Sensitivity-LoRA, appendix E)."""

from __future__ import annotations

import torch
from torch import Tensor

from sensilora.ops import _backend
from sensilora.ops._backend import Implementation, accumulator_dtype


def autocorrelation_diag(x: Tensor, *, mask: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """diag(Σ_t x_t x_tᵀ): the sum of squares of every column of `x` over the counted rows.

    This is the activation surrogate for the Hessian diagonal of a layer whose input is `x`: the Hessian of the
    layer-wise squared error is the same for each output row and equals this autocorrelation (Sensitivity-LoRA,
    arXiv 2509.09119, section 4.6; the surrogate of GPTQ).

    Args:
        x: (..., in_features), fp64, fp32, bf16 or fp16, any strides.
        mask: bool, shape ``x.shape[:-1]``; rows where it is false do not count, whatever they hold (NaN too).
        out: fp32 or fp64 of shape (in_features,) on x's device. The result is *added* to it, so that batches
            accumulate without a temporary. Not differentiable.

    Returns:
        (in_features,), fp64 if `x` is fp64, else fp32; or `out`. Unit: the square of x's. Differentiable in `x`,
        twice.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendError: a backend was asked for that cannot serve.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor (..., in_features), not {tuple(x.shape)} {x.dtype}")
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool or mask.device != x.device):
        raise ValueError(
            f"mask must be bool of shape {tuple(x.shape[:-1])} on {x.device}, "
            f"not {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )
    if out is None:
        return _autocorrelation_diag(x, mask)
    if out.shape != x.shape[-1:] or out.dtype not in (torch.float32, torch.float64) or out.device != x.device:
        raise ValueError(
            f"out must be fp32 or fp64 of shape {tuple(x.shape[-1:])} on {x.device}, "
            f"not {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    _autocorrelation_diag_(x.detach(), mask, out)
    return out


def _reference(x: Tensor, mask: Tensor | None, out: Tensor, accumulate: bool) -> None:
    rows = x if mask is None else x[mask]
    total = rows.to(out.dtype).square().sum(0)
    if accumulate:
        out += total
    else:
        out.copy_(total)


def _native(x: Tensor, mask: Tensor | None, out: Tensor, accumulate: bool) -> None:
    torch.ops.sensilora_C.autocorrelation_diag(x, mask, out, accumulate)


def _triton(x: Tensor, mask: Tensor | None, out: Tensor, accumulate: bool) -> None:
    from sensilora.kernels.autocorrelation_diag import launch_autocorrelation_diag

    with torch.cuda.device_of(x):
        launch_autocorrelation_diag(x, mask, out, accumulate)


_backend.register(
    "autocorrelation_diag",
    triton=Implementation(_triton),
    native=Implementation(_native),
    torch=Implementation(_reference),
)


def _run(x: Tensor, mask: Tensor | None, out: Tensor, accumulate: bool) -> None:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    implementation = _backend.select("autocorrelation_diag", x.device, x.dtype)
    implementation(rows, None if mask is None else mask.reshape(-1).contiguous(), out, accumulate)


@torch.library.custom_op("sensilora::autocorrelation_diag", mutates_args=())
def _autocorrelation_diag(x: Tensor, mask: Tensor | None) -> Tensor:
    out = torch.empty(x.shape[-1], dtype=accumulator_dtype(x.dtype), device=x.device)
    _run(x, mask, out, False)
    return out


@_autocorrelation_diag.register_fake
def _(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.empty(x.shape[-1], dtype=accumulator_dtype(x.dtype), device=x.device)


@torch.library.custom_op("sensilora::autocorrelation_diag_", mutates_args=("out",))
def _autocorrelation_diag_(x: Tensor, mask: Tensor | None, out: Tensor) -> None:
    _run(x, mask, out, True)


@_autocorrelation_diag_.register_fake
def _(x: Tensor, mask: Tensor | None, out: Tensor) -> None:
    return None


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    x, mask = ctx.saved_tensors
    grad_x = 2 * x * grad.to(x.dtype)
    return (grad_x if mask is None else torch.where(mask.unsqueeze(-1), grad_x, 0.0)), None


_autocorrelation_diag.register_autograd(_backward, setup_context=_setup_context)
