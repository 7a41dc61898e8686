"""The three numbers a Hessian diagonal is reduced to: trace, top-k mean, effective rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sensilora.errors import NonFiniteError
from sensilora.ops import _backend
from sensilora.ops._backend import Implementation

# What a backend returns as the effective rank of an invalid diagonal, so that no kernel has to raise.
_NON_FINITE, _NEGATIVE = -1, -2


class DiagonalMetrics(NamedTuple):
    """The metrics of Hessian diagonals on their device: 0-dim for one diagonal, (n,) for n of them.

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
    return DiagonalMetrics(*(value[0] for value in diagonal_metrics_batch([diag], k=k, alpha=alpha)))


def diagonal_metrics_batch(diags: Sequence[Tensor], *, k: float = 0.5, alpha: float = 0.85) -> DiagonalMetrics:
    """`diagonal_metrics` of many diagonals at once: the device is waited for once, not once a diagonal.

    Args:
        diags: at least one; of any shapes and sizes, but of one dtype and on one device.
        k, alpha: those of `diagonal_metrics`, for each diagonal.

    Returns:
        `DiagonalMetrics` of shape (len(diags),), in the order of `diags`.

    Raises:
        ValueError: as `diagonal_metrics`; or `diags` is empty, or of several dtypes or devices.
        NonFiniteError: one of `diags` holds a NaN or Inf; the message says which.
        BackendError: a backend was asked for that cannot serve.
    """
    for name, value in (("k", k), ("alpha", alpha)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], not {value}")
    if not diags:
        raise ValueError("diags must hold at least one tensor")
    for diag in diags:
        if not diag.is_floating_point():
            raise ValueError(f"diag must be floating-point, not {diag.dtype}")
        if diag.dtype != diags[0].dtype or diag.device != diags[0].device:
            raise ValueError(
                f"diags must share a dtype and a device, not {diags[0].dtype} on {diags[0].device} "
                f"and {diag.dtype} on {diag.device}"
            )
    counts = [topk_count(diag.numel(), k) for diag in diags]
    return DiagonalMetrics(*_diagonal_metrics(list(diags), counts, alpha))


def topk_count(m: int, k: float) -> int:
    """⌊k·m⌋, at least 1; the small term keeps products such as 0.29 · 100 from falling under their integer."""
    return max(1, math.floor(k * m + 1e-6))


# A backend takes flat contiguous diagonals, a count each and alpha, and gives trace, top-k mean and effective rank as
# vectors with an element a diagonal.


def _reference(diags: list[Tensor], counts: list[int], alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    metrics = [_reference_of_one(diag, count, alpha) for diag, count in zip(diags, counts, strict=True)]
    trace, topk_mean, effective_rank = (torch.stack(v).to(diags[0].device) for v in zip(*metrics, strict=True))
    return trace, topk_mean, effective_rank


def _reference_of_one(diag: Tensor, count: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    values = diag.double().sort(descending=True).values
    if torch.are_deterministic_algorithms_enabled():
        values = values.cpu()  # CUDA's sums of floats in sequence do not repeat bit for bit, and are refused here
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


def _native(diags: list[Tensor], counts: list[int], alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.sensilora_C.diagonal_metrics(diags, counts, alpha)


def _triton(diags: list[Tensor], counts: list[int], alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    from sensilora.kernels.diagonal_metrics import launch_diagonal_metrics

    with torch.cuda.device_of(diags[0]):
        return launch_diagonal_metrics(diags, counts, alpha)


_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
# CUDA before Triton, which has no addition to shared memory.
_backend.register(
    "diagonal_metrics",
    native=Implementation(_native, _DTYPES),
    triton=Implementation(_triton, _DTYPES),
    torch=Implementation(_reference),
)


@torch.library.custom_op("sensilora::diagonal_metrics", mutates_args=())
def _diagonal_metrics(diags: list[Tensor], counts: list[int], alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    implementation = _backend.select("diagonal_metrics", diags[0].device, diags[0].dtype)
    metrics = implementation([diag.contiguous().reshape(-1) for diag in diags], counts, alpha)
    # The one place that waits for the device.
    for index, code in enumerate(metrics[2].tolist()):
        name = "diag" if len(diags) == 1 else f"diags[{index}]"
        if code == _NON_FINITE:
            raise NonFiniteError(f"{name} holds a NaN or Inf; find the layer or batch it comes from")
        if code == _NEGATIVE:
            raise ValueError(
                f"{name} holds a negative value; clamp the diagonal at zero first and report the mass removed"
            )
    return metrics


@_diagonal_metrics.register_fake
def _(diags: list[Tensor], counts: list[int], alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(diags),)
    return (
        diags[0].new_empty(shape, dtype=torch.float64),
        diags[0].new_empty(shape, dtype=torch.float64),
        diags[0].new_empty(shape, dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output) -> None:
    diags, ctx.counts, _ = inputs
    ctx.save_for_backward(*diags)


def _backward(ctx, grad_trace: Tensor, grad_topk_mean: Tensor, _grad_effective_rank):
    grads = []
    for diag, count, of_trace, of_topk_mean in zip(
        ctx.saved_tensors, ctx.counts, grad_trace, grad_topk_mean, strict=True
    ):
        flat = diag.reshape(-1)
        count = min(count, flat.numel())
        grad = of_trace.to(diag.dtype).expand_as(flat)
        if count:
            top = torch.zeros_like(flat).index_fill(0, flat.topk(count).indices, 1 / count)
            grad = grad + top * of_topk_mean.to(diag.dtype)
        grads.append(grad.reshape(diag.shape))
    return grads, None, None


_diagonal_metrics.register_autograd(_backward, setup_context=_setup_context)
