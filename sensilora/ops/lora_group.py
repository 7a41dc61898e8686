"""Frozen linear layers that read one input, each with an adapter of its own rank: q, k, v or gate, up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sensilora.ops import _backend, _products
from sensilora.ops._backend import Implementation
from sensilora.ops._dropout import keep_scale, threshold
from sensilora.ops._lora import (
    cast_for_autocast,
    check_operands,
    columns_of_h,
    draw_seeds,
    row_count,
    rows,
    seed_of,
    unfolded,
    unwatched,
)
from sensilora.ops.lora_linear import (
    _NATIVE_DTYPES,
    _TRITON_DTYPES,
    _native,
    _native_backward,
    _reference,
    _reference_backward,
)


def lora_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    dropout_ps: float | Sequence[float] = 0.0,
    seeds: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """y_i = x W_iᵀ + b_i + s_i (drop_i(x) A_iᵀ) B_iᵀ for every member i of a group with one input.

    What `lora_linear` gives for each member, in fewer passes over `x` and with one gradient of `x`, which is summed
    where it is made. Ranks and out_features may differ. Only `x` and the (tokens, rank) products drop_i(x) A_iᵀ are
    kept for the backward pass; members whose output is not used cost nothing there.

    Args:
        x: (..., in_features), fp64, fp32, bf16 or fp16.
        weights: (out_features_i, in_features) each, x's dtype; any strides.
        biases: (out_features_i,) in x's dtype, or None, each.
        lora_As: (rank_i, in_features) each, any floating dtype; cast to x's. A rank may be 0.
        lora_Bs: (out_features_i, rank_i) each, any floating dtype; cast to x's.
        scalings: s_i, the effective scale (alpha / rank in PEFT's terms), each.
        dropout_ps: each member's probability of dropping an input element of its adapter, or one for all; rounded
            to a multiple of 2⁻¹⁵.
        seeds: the masks' keys on x's device: int64 (members,), a mask for each member that is `lora_linear`'s for the
            same seed, or (1,), one mask for all, which then need one probability. None draws one for each member
            from torch's default generator of x's device.

    Returns:
        (..., out_features_i) in x's dtype for every member. Differentiable once in `x`, `weights`, `biases`,
        `lora_As` and `lora_Bs`.

    Raises:
        ValueError: there is no member, lengths, shapes, dtypes or devices do not fit, or a probability is outside
            [0, 1].
        BackendError: a backend was asked for that cannot serve.
        RuntimeError: when differentiated twice, or in forward mode.
    """
    members = len(weights)
    ps = [float(dropout_ps)] * members if isinstance(dropout_ps, (float, Real)) else [float(p) for p in dropout_ps]
    lists = {"biases": biases, "lora_As": lora_As, "lora_Bs": lora_Bs, "scalings": scalings, "dropout_ps": ps}
    for name, entries in lists.items():
        if len(entries) != members:
            raise ValueError(f"{name} must have one entry a member: {members}, not {len(entries)}")
    if members == 0:
        raise ValueError("a group needs at least one member")
    x, *operands = cast_for_autocast(x, *weights, *biases)
    weights, biases = operands[:members], operands[members:]
    for member in zip(weights, biases, lora_As, lora_Bs, ps, strict=True):
        check_operands(x, *member)
    if not any(p > 0.0 and lora_A.shape[0] > 0 for p, lora_A in zip(ps, lora_As, strict=True)):
        ps, seeds = [0.0] * members, None
    elif seeds is None:
        seeds = draw_seeds(members, x.device)
    elif not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.device != x.device:
        found = f"{seeds.dtype} on {seeds.device}" if isinstance(seeds, Tensor) else repr(seeds)
        raise ValueError(f"seeds must be an int64 tensor on x's device {x.device}, not {found}")
    elif seeds.shape not in ((members,), (1,)):
        raise ValueError(f"seeds must have shape {(members,)} or (1,), not {tuple(seeds.shape)}")
    elif seeds.shape[0] < members and len(set(ps)) > 1:
        raise ValueError(f"members that share a mask must share a dropout probability, not {ps}")
    # autograd's list arguments may not hold None.
    given, has_bias = [bias for bias in biases if bias is not None], [bias is not None for bias in biases]
    scalings = [float(s) for s in scalings]
    if unwatched(x, *weights, *given, *lora_As, *lora_Bs, seeds):
        return _Direct.apply(has_bias, scalings, ps, seeds, x, *weights, *given, *lora_As, *lora_Bs)
    outputs, _ = _lora_group(x, list(weights), given, has_bias, list(lora_As), list(lora_Bs), scalings, ps, seeds)
    return tuple(outputs)


def _by_member(member: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """The group's forward pass from lora_linear's."""

    def forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout_ps, seeds):
        own_seeds = [seed_of(seeds, i) for i in range(len(weights))]
        operands = zip(weights, biases, lora_As, lora_Bs, scalings, dropout_ps, own_seeds, strict=True)
        outputs, hs = zip(*(member(x, *own) for own in operands), strict=True)
        return list(outputs), torch.cat(hs, dim=1)

    return forward


def _backward_by_member(member: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
    """The group's backward pass from lora_linear's."""

    def backward(grads, x, h, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, need_grad_x):
        columns = columns_of_h([lora_A.shape[0] for lora_A in lora_As])
        gradients = [
            member(
                grad, x, h[:, columns[i]], weights[i], lora_As[i], lora_Bs[i], scalings[i], dropout_ps[i],
                seed_of(seeds, i), need_grad_x,
            )
            for i, grad in enumerate(grads)
        ]  # fmt: skip
        grad_x, *others = (grad_x for grad_x, _, _ in gradients)
        for other in others:
            grad_x = grad_x.add_(other)
        return grad_x, [grad_A for _, grad_A, _ in gradients], [grad_B for _, _, grad_B in gradients]

    return backward


def _masks(dropout_ps: Sequence[float]) -> tuple[list[int], list[float]]:
    return [threshold(p) for p in dropout_ps], [keep_scale(p) for p in dropout_ps]


_native_forward = _by_member(_native)
_native_gradients = _backward_by_member(_native_backward)


def _triton(x, weights, biases, lora_As, lora_Bs, scalings, dropout_ps, seeds) -> tuple[list[Tensor], Tensor]:
    from sensilora.kernels.lora_linear import launch_lora_group

    with torch.cuda.device_of(x):
        if _products.native_serves(x, weights, lora_As):
            return _native_forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout_ps, seeds)
        if _products.serve(x, weights):
            return _products.forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout_ps, seeds)
        return launch_lora_group(x, weights, biases, lora_As, lora_Bs, scalings, *_masks(dropout_ps), seeds)


def _triton_backward(grads, x, h, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, need_grad_x):
    from sensilora.kernels.lora_linear import launch_lora_group_backward

    with torch.cuda.device_of(x):
        if _products.native_serves(x, weights, lora_As):
            return _native_gradients(grads, x, h, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, need_grad_x)
        if _products.serve(x, weights):
            return _products.backward(
                grads, x, h, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, need_grad_x
            )
        return launch_lora_group_backward(
            grads, x, h, weights, lora_As, lora_Bs, scalings, *_masks(dropout_ps), seeds, need_grad_x
        )


_backend.register(
    "lora_group",
    triton=Implementation(_triton, _TRITON_DTYPES),
    native=Implementation(_native_forward, _NATIVE_DTYPES, native_op="lora_linear", takes=_products.NATIVE_TAKES),
    torch=Implementation(_by_member(_reference)),
)
_backend.register(
    "lora_group_backward",
    triton=Implementation(_triton_backward, _TRITON_DTYPES),
    native=Implementation(
        _native_gradients, _NATIVE_DTYPES, native_op="lora_linear_backward", takes=_products.NATIVE_TAKES
    ),
    torch=Implementation(_backward_by_member(_reference_backward)),
)


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    left = iter(biases)
    all_biases = [next(left) if has else None for has in has_bias]
    implementation = _backend.select("lora_group", x.device, x.dtype)
    outputs, h = implementation(
        rows(x).contiguous(), weights, all_biases, lora_As, lora_Bs, scalings, dropout_ps, seeds
    )
    return [unfolded(y, x) for y in outputs], h


_lora_group = torch.library.custom_op("sensilora::lora_group", _forward, mutates_args=())


@_lora_group.register_fake
def _(x, weights, biases, has_bias, lora_As, lora_Bs, scalings, dropout_ps, seeds):
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return outputs, x.new_empty(row_count(x), columns_of_h([lora_A.shape[0] for lora_A in lora_As])[-1].stop)


def _gradients(
    grads: Sequence[Tensor],
    x: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    need_grad_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    implementation = _backend.select("lora_group_backward", x.device, x.dtype)
    grad_x, grad_As, grad_Bs = implementation(
        [rows(grad).contiguous() for grad in grads], rows(x).contiguous(), h, weights, lora_As, lora_Bs, scalings,
        dropout_ps, seeds, need_grad_x,
    )  # fmt: skip
    return (
        grad_x.reshape(x.shape) if need_grad_x else grad_x,
        [grad.to(lora_A.dtype) for grad, lora_A in zip(grad_As, lora_As, strict=True)],
        [grad.to(lora_B.dtype) for grad, lora_B in zip(grad_Bs, lora_Bs, strict=True)],
    )


_lora_group_backward = torch.library.custom_op("sensilora::lora_group_backward", _gradients, mutates_args=())


@_lora_group_backward.register_fake
def _(grads, x, h, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, need_grad_x):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_grad_x else x.new_empty(0)
    # Contiguous for adapters of any strides, as every backend makes them.
    return grad_x, *([a.new_empty(a.shape) for a in adapters] for adapters in (lora_As, lora_Bs))


def _setup_context(ctx, inputs, output) -> None:
    x, weights, _biases, ctx.has_bias, lora_As, lora_Bs, ctx.scalings, ctx.dropout_ps, seeds = inputs
    ctx.save_for_backward(x, output[1], seeds, *weights, *lora_As, *lora_Bs)
    # A member whose output is not used then shows as None instead of zeros.
    ctx.set_materialize_grads(False)


def _backward(ctx, grads, needs):
    """Gradients of x and of all weights, biases, A's and B's, each None unless needed."""
    x, h, seeds, *operands = ctx.saved_tensors
    members = len(grads)
    weights, lora_As, lora_Bs = (operands[first : first + members] for first in range(0, 3 * members, members))
    need_x, need_weights, need_biases = needs
    used = [i for i, grad in enumerate(grads) if grad is not None]

    def of_used(entries):
        return [entries[i] for i in used]

    def of_all(gradients):
        found = dict(zip(used, gradients, strict=True))
        return [found.get(i) for i in range(members)]

    if not used:
        nothing = [None] * members
        return None, nothing, [None] * len(need_biases), nothing, nothing
    if len(used) < members:
        columns = columns_of_h([lora_A.shape[0] for lora_A in lora_As])
        h = torch.cat([h[:, own] for own in of_used(columns)], dim=1)
        if seeds is not None and seeds.shape[0] > 1:
            seeds = torch.cat(of_used(seeds.split(1)))
    # The op tells who differentiates again that this cannot be.
    direct = not torch.is_grad_enabled() and unwatched(*of_used(grads), x, h, *weights, *lora_As, *lora_Bs, seeds)
    grad_x, grad_As, grad_Bs = (_gradients if direct else _lora_group_backward)(
        of_used(grads), x, h, of_used(weights), of_used(lora_As), of_used(lora_Bs), of_used(ctx.scalings),
        of_used(ctx.dropout_ps), seeds, need_x,
    )  # fmt: skip
    grad_weights = [
        rows(grad).T @ rows(x) if need and grad is not None else None
        for grad, need in zip(grads, need_weights, strict=True)
    ]
    biased = [grad for grad, has in zip(grads, ctx.has_bias, strict=True) if has]
    grad_biases = [
        rows(grad).sum(0) if need and grad is not None else None
        for grad, need in zip(biased, need_biases, strict=True)
    ]
    return grad_x if need_x else None, grad_weights, grad_biases, of_all(grad_As), of_all(grad_Bs)


def _op_backward(ctx, grads, _grad_h):
    grad_x, grad_weights, grad_biases, grad_As, grad_Bs = _backward(ctx, grads, ctx.needs_input_grad[:3])
    return grad_x, grad_weights, grad_biases, None, grad_As, grad_Bs, None, None, None


_lora_group.register_autograd(_op_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The op's forward and backward pass without torch's dispatcher; biases are those that are given."""

    @staticmethod
    def forward(ctx, has_bias, scalings, dropout_ps, seeds, x, *operands):
        ctx.splits = splits = _splits(has_bias)
        weights, biases, lora_As, lora_Bs = (operands[own] for own in splits)
        inputs = (x, weights, biases, has_bias, lora_As, lora_Bs, scalings, dropout_ps, seeds)
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return tuple(output[0])

    @staticmethod
    def backward(ctx, *grads):
        need_x, *needs = ctx.needs_input_grad[4:]
        weights, biases, *_ = ctx.splits
        grad_x, *others = _backward(ctx, grads, (need_x, needs[weights], needs[biases]))
        return None, None, None, None, grad_x, *itertools.chain.from_iterable(others)


def _splits(has_bias: Sequence[bool]) -> list[slice]:
    """Where the weights, the given biases, the A's and the B's are among all of a group's operands."""
    members = len(has_bias)
    ends = list(itertools.accumulate([members, sum(has_bias), members, members], initial=0))
    return [slice(*ends[i : i + 2]) for i in range(4)]


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "lora_group cannot be differentiated twice; for Hessian-vector products calibrate before injecting "
        "adapters, or use the plain expression linear(x, W, b) + s * linear(linear(x, A), B) for each member"
    )


_lora_group_backward.register_autograd(_no_double_backward)
