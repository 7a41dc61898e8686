"""The three numbers a Hessian diagonal is reduced to: trace, top-k mean, effective rank."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sensilora.errors import NonFiniteError
from sensilora.ops import _backend
from sensilora.ops._backend import Implementation

# What a backend returns as the effective rank of an invalid diagonal, so that no kernel has to raise.
_NON_FINITE, _NEGATIVE = -1, -2


class DiagonalMetrics(NamedTuple):
    """The metrics of one matrix's Hessian diagonal, as 0-dim tensors on the diagonal's device.

    Attributes:
        trace: Σ λ_i, fp64 (Sensitivity-LoRA, eq. 8).
        topk_mean: mean of the k largest λ_i, fp64 (eq. 9).
        effective_rank: least k with Σ_{i≤k} λ_i ≥ α Σ λ_i, int64 (eq. 10); 0 where the trace is 0.
    """

    trace: Tensor
    topk_mean: Tensor
    effective_rank: Tensor


def diagonal_metrics(diag: Tensor, *, k: float = 0.5, alpha: float = 0.85) -> DiagonalMetrics:
    """Trace, top-k mean and effective rank of a non-negative diagonal λ (Sensitivity-LoRA, eqs. 8 to 10).

    Args:
        diag: any shape, taken as flat; m values, finite and non-negative; fp64, fp32, bf16 or fp16.
        k: fraction of the m values that the top-k mean covers, in (0, 1]; ⌊k·m⌋ of them, at least one.
            The paper uses 0.5, and 1/3 in an ablation.
        alpha: share of the trace that the effective rank must reach, in (0, 1]. The paper uses 0.85.

    Returns:
        `DiagonalMetrics`. An empty diagonal gives zeros. `trace` and `topk_mean` are differentiable in `diag`;
        among equal values at the k-th place the gradient of `topk_mean` goes to those torch.topk picks.

    Raises:
        ValueError: `k` or `alpha` is outside (0, 1], or `diag` is not floating-point or holds a negative value.
        NonFiniteError: `diag` holds a NaN or Inf.
        BackendError: a backend was asked for that cannot serve.
    """
    for name, value in (("k", k), ("alpha", alpha)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], not {value}")
    if not diag.is_floating_point():
        raise ValueError(f"diag must be floating-point, not {diag.dtype}")
    return DiagonalMetrics(*_diagonal_metrics(diag, topk_count(diag.numel(), k), alpha))


def topk_count(m: int, k: float) -> int:
    """⌊k·m⌋, at least 1; the small term keeps products such as 0.29 · 100 from falling under their integer."""
    return max(1, math.floor(k * m + 1e-6))


def _reference(diag: Tensor, count: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    values = diag.double().sort(descending=True).values
    if values.numel() == 0:
        zero = values.new_zeros(())
        return zero, zero.clone(), zero.long()
    reached = values.cumsum(0)
    # sum() adds pairwise and cumsum() in sequence, so the last of `reached` may fall short of the trace by rounding.
    trace = values.sum()
    effective_rank = ((reached < alpha * trace).sum() + (trace > 0)).clamp(max=values.numel())
    # NaN sorts above everything, so the two ends of the sorted values tell of NaN, Inf and negative values.
    effective_rank = torch.where(values[-1] < 0, _NEGATIVE, effective_rank)
    effective_rank = torch.where(values[[0, -1]].isfinite().all(), effective_rank, _NON_FINITE)
    return trace, values[:count].mean(), effective_rank


def _native(diag: Tensor, count: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.sensilora_C.diagonal_metrics(diag, count, alpha)


_backend.register(
    "diagonal_metrics",
    native=Implementation(_native, frozenset({torch.float32, torch.bfloat16, torch.float16})),
    torch=Implementation(_reference),
)


@torch.library.custom_op("sensilora::diagonal_metrics", mutates_args=())
def _diagonal_metrics(diag: Tensor, count: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    implementation = _backend.select("diagonal_metrics", diag.device, diag.dtype)
    trace, topk_mean, effective_rank = implementation(diag.contiguous().reshape(-1), count, alpha)
    code = int(effective_rank)
    if code == _NON_FINITE:
        raise NonFiniteError("diag holds a NaN or Inf; find the layer or batch it comes from")
    if code == _NEGATIVE:
        raise ValueError("diag holds a negative value; clamp the diagonal at zero first and report the mass removed")
    return trace, topk_mean, effective_rank


@_diagonal_metrics.register_fake
def _(diag: Tensor, count: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    return (
        diag.new_empty((), dtype=torch.float64),
        diag.new_empty((), dtype=torch.float64),
        diag.new_empty((), dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output) -> None:
    diag, ctx.count, _ = inputs
    ctx.save_for_backward(diag)


def _backward(ctx, grad_trace: Tensor, grad_topk_mean: Tensor, _grad_effective_rank):
    (diag,) = ctx.saved_tensors
    flat = diag.reshape(-1)
    count = min(ctx.count, flat.numel())
    grad = grad_trace.to(diag.dtype).expand_as(flat)
    if count:
        top = torch.zeros_like(flat).index_fill(0, flat.topk(count).indices, 1 / count)
        grad = grad + top * grad_topk_mean.to(diag.dtype)
    return grad.reshape(diag.shape), None, None


_diagonal_metrics.register_autograd(_backward, setup_context=_setup_context)
