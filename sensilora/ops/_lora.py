"""What the ops around a frozen layer and its adapters share: operands under autocast, checks, rows, seeds, h."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

_PLAIN = (Tensor, torch.nn.Parameter)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes products in at present, or None."""
    # Asking a device that has no autocast is an error, and torch 2.11 cannot trace the question whether it has one.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def cast_for_autocast(x: Tensor, *operands: Tensor | None) -> tuple[Any, ...]:
    """`x` and the frozen operands in the dtype in which ``torch.nn.functional.linear`` would take them."""
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x, *operands
    return tuple(
        tensor.to(dtype) if tensor is not None and _autocasts(tensor) else tensor for tensor in (x, *operands)
    )


def _autocasts(tensor: Tensor) -> bool:
    """Autocast leaves integers and fp64 as they are."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def check_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dropout_p: float
) -> None:
    """Raise ValueError unless these make one frozen layer with its adapter, and RuntimeError in forward mode."""
    fit = x.dim() > 0 and weight.dim() == lora_A.dim() == lora_B.dim() == 2
    if fit:
        (out_features, in_features), rank = weight.shape, lora_A.shape[0]
        fit = x.shape[-1] == lora_A.shape[1] == in_features and lora_B.shape == (out_features, rank)
    if not fit:
        raise ValueError(
            f"shapes do not fit: x {tuple(x.shape)}, weight {tuple(weight.shape)}, "
            f"lora_A {tuple(lora_A.shape)}, lora_B {tuple(lora_B.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {tuple(weight.shape[:1])}, not {tuple(bias.shape)}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"weight and bias must have x's dtype {x.dtype}, not {weight.dtype}; cast x or use autocast")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], not {dropout_p}")
    tensors = [tensor for tensor in (x, weight, bias, lora_A, lora_B) if tensor is not None]
    if any(tensor.device != x.device for tensor in tensors):
        devices = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"x, weight, bias, lora_A and lora_B must be on one device, not on {devices}")
    check_forward_mode(tensors)


def check_forward_mode(tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError in forward mode: torch would lose the tangent, as a custom op has no formula for it."""
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "an adapter cannot be differentiated in forward mode; use backward, or the plain expression "
            "linear(x, W, b) + s * linear(linear(x, A), B)"
        )


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nobody needs to see the call as an op: no compiler, tracer, mode, functional transform or subclass.

    Then `torch.autograd.Function` serves, which spares the host a quarter of the time that the op takes it.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and all(tensor is None or (type(tensor) in _PLAIN and not tensor.is_meta) for tensor in tensors)
    )


def seed_tensor(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed of one mask as the ops take it: int64 (1,) on `device`, drawn if it is None.

    An int counts modulo 2**64, as the key has two words of 32 bits.

    Raises:
        ValueError: a tensor of another dtype, size or device, or neither a tensor nor a whole number.
    """
    if seed is None:
        return draw_seeds(1, device)
    if not isinstance(seed, Tensor):
        try:
            number = operator.index(seed)
        except TypeError as error:
            raise ValueError(f"seed must be a whole number or an int64 tensor, not {seed!r}") from error
        if not -(2**63) <= number < 2**63:
            number = (number + 2**63) % 2**64 - 2**63
        return torch.tensor([number], dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"seed must be an int, or an int64 tensor of one element on x's device {device}, not "
            f"{tuple(seed.shape)} of {seed.dtype} on {seed.device}"
        )
    return seed


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """int64 (count,): keys of dropout masks from torch's default generator of `device`.

    Drawn outside the ops, so that ``torch.manual_seed``, checkpoint replay and CUDA graphs repeat or renew them.
    """
    return torch.randint(2**63 - 1, (count,), dtype=torch.int64, device=device)


def seed_of(seeds: Tensor | None, member: int) -> Tensor | None:
    """The seed (1,) of a group's member among seeds (members,), or (1,) where all share a mask."""
    return seeds if seeds is None or seeds.shape[0] == 1 else seeds[member : member + 1]


def rows(x: Tensor) -> Tensor:
    """Every leading dimension folded into one; reshape(-1, ...) would not do for a last size of 0."""
    return x.reshape(row_count(x), x.shape[-1])


def unfolded(y: Tensor, x: Tensor) -> Tensor:
    """The rows of `y` in the leading dimensions of `x`; no view, which could not be changed in place."""
    unfolded_y: Tensor = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
    return unfolded_y


def row_count(x: Tensor) -> int:
    """Product of the leading dimensions; torch.Size.numel would fix a symbolic size under torch.compile."""
    return math.prod(x.shape[:-1])


def frozen_gradients(
    grad: Tensor, x: Tensor, *, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the base layer's weight (out, in) and bias (out,) in x's dtype, each None unless needed."""
    grad_rows = rows(grad)
    return grad_rows.T @ rows(x) if need_weight else None, grad_rows.sum(0) if need_bias else None


def padded_rank(rank: int) -> int:
    """Columns of the saved h: the rank and zeros up to a multiple of 16, so that kernels read every rank aligned."""
    return -(-rank // 16) * 16


def columns_of_h(ranks: Sequence[int]) -> list[slice]:
    """Where each member's columns of h are, padding included: behind those of the members before it."""
    ends = [0]
    for rank in ranks:
        ends.append(ends[-1] + padded_rank(rank))
    return [slice(*pair) for pair in itertools.pairwise(ends)]
