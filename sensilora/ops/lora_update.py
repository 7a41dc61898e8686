"""The update of an adapter beside a base product that was computed elsewhere: y = base + s (drop(x) Aᵀ) Bᵀ."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from sensilora.ops import _backend
from sensilora.ops._backend import Implementation
from sensilora.ops._dropout import dropout, keep_scale, threshold
from sensilora.ops._lora import (
    cast_for_autocast,
    check_forward_mode,
    padded_rank,
    row_count,
    rows,
    seed_tensor,
    unfolded,
)
from sensilora.ops.lora_linear import _TRITON_DTYPES, _padded


def lora_update(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """y = base + s (drop(x) Aᵀ) Bᵀ: `lora_linear` where x Wᵀ + b is another library's, as that of a quantised layer.

    Only `x` and the (tokens, rank) product drop(x) Aᵀ are kept for the backward pass, in which `base` receives y's
    gradient as it is. Under autocast, `x` is cast as ``torch.nn.functional.linear`` would cast it. Where W is at hand
    `lora_linear` is faster, which adds the update before y is written.

    Args:
        base: (..., out_features), fp64, fp32, bf16 or fp16; not changed.
        x: (..., in_features), likewise, also of another dtype than `base`; the update is computed in its dtype, over
            an fp64 base in fp64.
        lora_A: (rank, in_features), any floating dtype; cast to x's. rank may be 0.
        lora_B: (out_features, rank), any floating dtype; cast to x's.
        scaling, dropout_p, seed: as for `lora_linear`; the same seed gives the same mask.

    Returns:
        base's shape and dtype. Differentiable once in `base`, `x`, `lora_A`, `lora_B`.

    Raises:
        ValueError: shapes or devices do not fit, a dtype is none of the four, `dropout_p` is outside [0, 1], or
            `seed` is no whole number.
        BackendError: a backend was asked for that cannot serve.
        RuntimeError: when differentiated twice, or in forward mode.
    """
    (x,) = cast_for_autocast(x)
    if base.dtype == torch.float64:
        x = x.double()
    _check(base, x, lora_A, lora_B, dropout_p)
    if dropout_p == 0.0 or lora_A.shape[0] == 0:
        dropout_p, seed = 0.0, None
    else:
        seed = seed_tensor(seed, x.device)
    return _lora_update(base, x, lora_A, lora_B, float(scaling), float(dropout_p), seed)[0]


def _check(base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, dropout_p: float) -> None:
    fit = x.dim() > 0 and lora_A.dim() == lora_B.dim() == 2
    if fit:
        rank, in_features = lora_A.shape
        fit = x.shape[-1] == in_features and lora_B.shape[1] == rank
        fit = fit and base.shape == (*x.shape[:-1], lora_B.shape[0])
    if not fit:
        raise ValueError(
            f"shapes do not fit: base {tuple(base.shape)}, x {tuple(x.shape)}, lora_A {tuple(lora_A.shape)}, "
            f"lora_B {tuple(lora_B.shape)}"
        )
    for name, tensor in (("base", base), ("x", x)):
        if tensor.dtype not in _backend.FLOATS:
            raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, not {tensor.dtype}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], not {dropout_p}")
    tensors = (base, x, lora_A, lora_B)
    if any(tensor.device != x.device for tensor in tensors):
        devices = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"base, x, lora_A and lora_B must be on one device, not on {devices}")
    check_forward_mode(tensors)


def _products(dropped, base, lora_A, lora_B, scaling) -> tuple[Tensor, Tensor]:
    h = linear(dropped, lora_A.to(dropped.dtype))
    lora_B = lora_B.to(dropped.dtype)
    if base.dtype == dropped.dtype:
        return torch.addmm(base, h, lora_B.T, alpha=scaling), _padded(h)
    return torch.add(base, linear(h, lora_B), alpha=scaling).to(base.dtype), _padded(h)


def _products_backward(drop, grad, x, h, lora_A, lora_B, scaling, need_grad_x):
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    q = scaling * (grad @ lora_B)
    grad_A = q.T @ drop(x)
    grad_B = scaling * (grad.T @ h[:, : lora_A.shape[0]])
    return drop(q @ lora_A) if need_grad_x else x.new_empty(0), grad_A, grad_B


def _reference(base, x, lora_A, lora_B, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    return _products(dropout(x, dropout_p, seed), base, lora_A, lora_B, scaling)


def _reference_backward(grad, x, h, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x):
    return _products_backward(
        lambda tensor: dropout(tensor, dropout_p, seed), grad, x, h, lora_A, lora_B, scaling, need_grad_x
    )


# Products that are bound by nothing but BLAS, and a mask that is made in one pass.
def _native_dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    return x if seed is None else torch.ops.sensilora_C.dropout(x, dropout_p, seed)


def _native(base, x, lora_A, lora_B, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    return _products(_native_dropout(x, dropout_p, seed), base, lora_A, lora_B, scaling)


def _native_backward(grad, x, h, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x):
    return _products_backward(
        lambda tensor: _native_dropout(tensor, dropout_p, seed), grad, x, h, lora_A, lora_B, scaling, need_grad_x
    )


def _triton(base, x, lora_A, lora_B, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    from sensilora.kernels.lora_update import launch_lora_update

    mask = threshold(dropout_p), keep_scale(dropout_p), seed
    with torch.cuda.device_of(x):
        return launch_lora_update(base, x, lora_A, lora_B, scaling, *mask)


def _triton_backward(grad, x, h, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x):
    from sensilora.kernels.lora_update import launch_lora_update_backward

    mask = threshold(dropout_p), keep_scale(dropout_p), seed
    with torch.cuda.device_of(x):
        return launch_lora_update_backward(grad, x, h, lora_A, lora_B, scaling, *mask, need_grad_x)


_backend.register(
    "lora_update",
    triton=Implementation(_triton, _TRITON_DTYPES),
    native=Implementation(_native, native_op="dropout"),
    torch=Implementation(_reference),
)
_backend.register(
    "lora_update_backward",
    triton=Implementation(_triton_backward, _TRITON_DTYPES),
    native=Implementation(_native_backward, native_op="dropout"),
    torch=Implementation(_reference_backward),
)


@torch.library.custom_op("sensilora::lora_update", mutates_args=())
def _lora_update(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    implementation = _backend.select("lora_update", x.device, x.dtype)
    base_rows, x_rows = rows(base).contiguous(), rows(x).contiguous()
    y, h = implementation(base_rows, x_rows, lora_A, lora_B, scaling, dropout_p, seed)
    return unfolded(y, x), h


@_lora_update.register_fake
def _(base, x, lora_A, lora_B, scaling, dropout_p, seed):
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    return y, x.new_empty(row_count(x), padded_rank(lora_A.shape[0]))


@torch.library.custom_op("sensilora::lora_update_backward", mutates_args=())
def _lora_update_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = _backend.select("lora_update_backward", x.device, x.dtype)
    grad_rows, x_rows = rows(grad).to(x.dtype).contiguous(), rows(x).contiguous()
    grad_x, grad_A, grad_B = implementation(
        grad_rows, x_rows, h, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x
    )
    return grad_x.reshape(x.shape) if need_grad_x else grad_x, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)


@_lora_update_backward.register_fake
def _(grad, x, h, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_grad_x else x.new_empty(0)
    return grad_x, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _setup_context(ctx, inputs, output) -> None:
    _base, x, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(x, lora_A, lora_B, output[1], seed)
    # Or a tensor of zeros would be filled for h, whose gradient nobody asks for.
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, _grad_h):
    if grad is None:
        return (None,) * 7
    need_base, need_x, need_A, need_B, *_ = ctx.needs_input_grad
    grad_x = grad_A = grad_B = None
    if need_x or need_A or need_B:
        x, lora_A, lora_B, h, seed = ctx.saved_tensors
        grad_x, grad_A, grad_B = _lora_update_backward(
            grad, x, h, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed, need_x
        )
    return grad if need_base else None, grad_x if need_x else None, grad_A, grad_B, None, None, None


_lora_update.register_autograd(_backward, setup_context=_setup_context)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "lora_update cannot be differentiated twice; for Hessian-vector products calibrate before injecting "
        "adapters, or use the plain expression base + s * linear(linear(x, A), B)"
    )


_lora_update_backward.register_autograd(_no_double_backward)
