"""A frozen linear layer with a low-rank adapter of any rank: y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sensilora.ops import _backend, _products
from sensilora.ops._backend import Implementation
from sensilora.ops._dropout import dropout, keep_scale, threshold
from sensilora.ops._lora import (
    cast_for_autocast,
    check_operands,
    frozen_gradients,
    padded_rank,
    row_count,
    rows,
    seed_tensor,
    unfolded,
    unwatched,
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ (LoRA, Hu et al. 2021, eq. 3, with dropout on the adapter's input only).

    Only `x` and the (tokens, rank) product drop(x) Aᵀ are kept for the backward pass; the dropout mask is a
    function of (seed, row, column) and is generated again there. Under autocast, `x`, W and b are cast as
    ``torch.nn.functional.linear`` would cast them.

    Args:
        x: (..., in_features), fp64, fp32, bf16 or fp16.
        weight: (out_features, in_features), x's dtype; any strides (a transposed view serves Conv1D).
        bias: (out_features,) in x's dtype, or None.
        lora_A: (rank, in_features), any floating dtype; cast to x's. rank may be 0.
        lora_B: (out_features, rank), any floating dtype; cast to x's.
        scaling: s, the effective scale (alpha / rank in PEFT's terms).
        dropout_p: probability of dropping an input element of the adapter, rounded to a multiple of 2⁻¹⁵.
        seed: the mask's key: an int, taken modulo 2⁶⁴, or an int64 tensor of one element. None draws one from torch's
            default generator of x's device, so that ``torch.manual_seed`` and checkpoint replay repeat it.

    Returns:
        (..., out_features) in x's dtype. Differentiable once in `x`, `weight`, `bias`, `lora_A`, `lora_B`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, `dropout_p` is outside [0, 1], or `seed` is no whole number.
        BackendError: a backend was asked for that cannot serve.
        RuntimeError: when differentiated twice, or in forward mode.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    check_operands(x, weight, bias, lora_A, lora_B, dropout_p)
    if dropout_p == 0.0 or lora_A.shape[0] == 0:
        dropout_p, seed = 0.0, None
    else:
        seed = seed_tensor(seed, x.device)
    operands = (x, weight, bias, lora_A, lora_B, float(scaling), float(dropout_p), seed)
    if unwatched(x, weight, bias, lora_A, lora_B, seed):
        y: Tensor = _Direct.apply(*operands)
        return y
    return _lora_linear(*operands)[0]


def _seed_value(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


def _padded(h: Tensor) -> Tensor:
    return pad(h, (0, padded_rank(h.shape[1]) - h.shape[1]))


def _reference(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    h = linear(dropout(x, dropout_p, _seed_value(seed)), lora_A)
    return linear(x, weight, bias) + scaling * linear(h, lora_B), _padded(h)


def _reference_backward(grad, x, h, weight, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x):
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    dropped = dropout(x, dropout_p, _seed_value(seed))
    q = scaling * (grad @ lora_B)
    grad_A = q.T @ dropped
    grad_B = scaling * (grad.T @ h[:, : lora_A.shape[0]])
    grad_x = x.new_empty(0)
    if need_grad_x:
        grad_x = grad @ weight + dropout(q @ lora_A, dropout_p, _seed_value(seed))
    return grad_x, grad_A, grad_B


def _native(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    return torch.ops.sensilora_C.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def _native_backward(grad, x, h, weight, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x):
    return torch.ops.sensilora_C.lora_linear_backward(
        grad, x, h, weight, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x
    )


def _triton(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    from sensilora.kernels.lora_linear import launch_lora_group

    mask = [threshold(dropout_p)], [keep_scale(dropout_p)]
    with torch.cuda.device_of(x):
        if _products.native_serves(x, [weight], [lora_A]):
            return _native(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
        if _products.serve(x, [weight]):
            (y,), h = _products.forward(x, [weight], [bias], [lora_A], [lora_B], [scaling], [dropout_p], seed)
            return y, h
        (y,), h = launch_lora_group(x, [weight], [bias], [lora_A], [lora_B], [scaling], *mask, seed)
    return y, h


def _triton_backward(grad, x, h, weight, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x):
    from sensilora.kernels.lora_linear import launch_lora_group_backward

    mask = [threshold(dropout_p)], [keep_scale(dropout_p)]
    with torch.cuda.device_of(x):
        if _products.native_serves(x, [weight], [lora_A]):
            return _native_backward(grad, x, h, weight, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x)
        if _products.serve(x, [weight]):
            grad_x, (grad_A,), (grad_B,) = _products.backward(
                [grad], x, h, [weight], [lora_A], [lora_B], [scaling], [dropout_p], seed, need_grad_x
            )
            return grad_x, grad_A, grad_B
        grad_x, (grad_A,), (grad_B,) = launch_lora_group_backward(
            [grad], x, h, [weight], [lora_A], [lora_B], [scaling], *mask, seed, need_grad_x
        )
    return grad_x, grad_A, grad_B


_NATIVE_DTYPES = _backend.FLOATS
_TRITON_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_backend.register(
    "lora_linear",
    triton=Implementation(_triton, _TRITON_DTYPES),
    native=Implementation(_native, _NATIVE_DTYPES, takes=_products.NATIVE_TAKES),
    torch=Implementation(_reference),
)
_backend.register(
    "lora_linear_backward",
    triton=Implementation(_triton_backward, _TRITON_DTYPES),
    native=Implementation(_native_backward, _NATIVE_DTYPES, takes=_products.NATIVE_TAKES),
    torch=Implementation(_reference_backward),
)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    implementation = _backend.select("lora_linear", x.device, x.dtype)
    y, h = implementation(rows(x).contiguous(), weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    return unfolded(y, x), h


_lora_linear = torch.library.custom_op("sensilora::lora_linear", _forward, mutates_args=())


@_lora_linear.register_fake
def _(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    h = x.new_empty(row_count(x), padded_rank(lora_A.shape[0]))
    return x.new_empty(*x.shape[:-1], weight.shape[0]), h


def _gradients(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_rows, x_rows = rows(grad).contiguous(), rows(x).contiguous()
    implementation = _backend.select("lora_linear_backward", x.device, x.dtype)
    grad_x, grad_A, grad_B = implementation(
        grad_rows, x_rows, h, weight, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x
    )
    return grad_x.reshape(x.shape) if need_grad_x else grad_x, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)


_lora_linear_backward = torch.library.custom_op("sensilora::lora_linear_backward", _gradients, mutates_args=())


@_lora_linear_backward.register_fake
def _(grad, x, h, weight, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_grad_x else x.new_empty(0)
    # Contiguous for adapters of any strides, as every backend makes them.
    return grad_x, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _bias, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], seed)
    # Or a tensor of zeros would be filled for h, whose gradient nobody asks for.
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, _grad_h):
    if grad is None:
        return (None,) * 8
    x, weight, lora_A, lora_B, h, seed = ctx.saved_tensors
    # The op tells who differentiates again that this cannot be.
    direct = not torch.is_grad_enabled() and unwatched(grad, x, weight, lora_A, lora_B, h, seed)
    grad_x, grad_A, grad_B = (_gradients if direct else _lora_linear_backward)(
        grad, x, h, weight, lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed, ctx.needs_input_grad[0]
    )
    _, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_weight, grad_bias = frozen_gradients(grad, x, need_weight=need_weight, need_bias=need_bias)
    return grad_x if ctx.needs_input_grad[0] else None, grad_weight, grad_bias, grad_A, grad_B, None, None, None


_lora_linear.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The op's forward and backward pass without torch's dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad, None)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "lora_linear cannot be differentiated twice; for Hessian-vector products calibrate before injecting "
        "adapters, or use the plain expression linear(x, W, b) + s * linear(linear(x, A), B)"
    )


_lora_linear_backward.register_autograd(_no_double_backward)
