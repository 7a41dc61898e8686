"""The Hutchinson estimator: the diagonal of the loss's true Hessian, by Hessian-vector products with random signs.

For one weight matrix with Hessian H = (1/N) Σ_n ∇²L_n of the sequences' own losses, and signs z (Rademacher),
E[z ⊙ Hz] = diag(H), with variance Σ_{j≠i} H_ij² a probe (Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007). Signs are
drawn for one matrix at a time: over the whole model they would add the noise of all the other matrices.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sensilora.errors import CalibrationError, NonFiniteError
from sensilora.ops import diagonal_metrics, hutchinson_accumulate, rademacher
from sensilora.ops._backend import accumulator_dtype
from sensilora.sensitivity.batches import Batch
from sensilora.sensitivity.capture import Forward, Matrix, first_argument, raise_non_finite, rows_of
from sensilora.sensitivity.estimator import Estimator
from sensilora.sensitivity.fisher import LossFunction, own_loss, require_labels
from sensilora.sensitivity.losses import likelihood
from sensilora.sensitivity.report import HessianProduct, ProbeStatistics
from sensilora.targets import is_conv1d, is_quantised

# A power of two, undone exactly, against underflow in fp16 models. A product with z is the sum of a whole row of the
# Hessian, so it comes nearer to overflow than the gradients that Fisher scales by more.
_FP16_LOSS_SCALE = 2.0**5

# What autograd says where it cannot go on, and this package's own ops.
_NO_SECOND_DERIVATIVE = ("derivative for", "no autograd formula", "differentiated twice")


class HutchinsonEstimator(Estimator):
    """Keeps the batches, and probes one matrix after the other when its diagonal is asked for.

    A round of `min_probes` probes builds each batch's gradient once and takes a product for each probe from it. What
    is drawn depends on the seed, on the weight's place among the model's parameters and on the probe alone.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        matrices: dict[str, Matrix],
        *,
        probes: int,
        min_probes: int,
        tolerance: float,
        hvp: HessianProduct,
        seed: int,
        k: float,
        alpha: float,
        loss_fn: LossFunction | None,
        shift_labels: bool | None,
    ) -> None:
        super().__init__(model, modules, matrices)
        self.probes, self.min_probes, self.tolerance, self.hvp = probes, min_probes, tolerance, hvp
        self.seed, self.k, self.alpha = seed, k, alpha
        self.loss_fn, self.shift_labels = loss_fn, shift_labels
        quantised = next((name for name, module in modules.items() if is_quantised(module)), None)
        if quantised is not None:
            raise CalibrationError(
                f"the weight of {quantised} is quantised, and no Hessian can be taken with respect to it, by either "
                "hvp; use estimator='fisher', or calibrate the unquantised model: its plan fits this one too"
            )
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if hvp == "double_backward" and attention not in (None, "eager", "sdpa"):
            raise CalibrationError(
                f"attention of the kind {attention!r} may have no second derivative; load the model with "
                "attn_implementation='sdpa' or 'eager', or use hvp='central_differences'"
            )
        half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        self._scale = _FP16_LOSS_SCALE if half else 1.0
        self._places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
        self._kept: list[Batch] = []
        self._probed: tuple[Matrix, Batch] | None = None

    def wrap(self, name: str, module: nn.Module, forward: Forward) -> Forward:
        matrix = self.matrices[name]

        def watched(*args: Any, **kwargs: Any) -> Any:
            x = first_argument(args, kwargs)
            if self.batch is not None and matrix.active:
                if not torch.is_grad_enabled():
                    raise CalibrationError(
                        f"module {name!r} runs with gradients disabled, so no Hessian can be taken: use "
                        "use_reentrant=False for gradient checkpointing, or leave the module out of targets"
                    )
                matrix.calls += 1
                # Rows need not be told apart by sequence, only from padding.
                matrix.tokens += rows_of(self.batch, name, x).count if self.batch.padded else x.shape[:-1].numel()
            mask = None
            if self._probed is not None and self._probed[0] is matrix and self._probed[1].padded:
                mask = rows_of(self._probed[1], name, x).mask
            if mask is None:
                return forward(*args, **kwargs)
            # Rows of padding keep their values, which do not depend on the weight here, whatever they hold: in a
            # gradient, NaN times 0 would be NaN.
            mask = mask.to(x.device).view(*x.shape[:-1], 1)
            with torch.no_grad():
                padding = forward(*args, **kwargs)
            x = x.masked_fill(~mask, 0.0)
            counted = forward(x, *args[1:], **kwargs) if args else forward(**kwargs | {next(iter(kwargs)): x})
            return torch.where(mask, counted, padding)

        return watched

    def observe(self, batch: Batch) -> None:
        self.batch = batch
        with torch.enable_grad():
            loss, sequences = self._loss(batch)
        self.batch = None
        if not bool(loss.isfinite()):
            raise_non_finite(self.model, self.modules, batch, "the loss")
        if sequences:
            self._kept.append(batch)
        self.batches += 1
        self.tokens += batch.streams[0].tokens if batch.streams else batch.size
        self.sequences += sequences

    def rewind(self) -> None:
        super().rewind()
        self._kept.clear()

    def accumulator_bytes(self, matrix: Matrix) -> int:
        """A sum for each half of the probes; only one matrix has them at a time."""
        weight = self.modules[matrix.name].get_parameter("weight")
        return 2 * weight.numel() * accumulator_dtype(weight.dtype).itemsize

    @property
    def keeps_batches(self) -> bool:
        return True

    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The loss summed over the batch's sequences, and how many of them count."""
        outputs = self.model(**batch.inputs)
        if self.loss_fn is not None:
            return own_loss(self.loss_fn, outputs, batch), batch.size
        require_labels(batch)
        found = likelihood(self.model, outputs, batch, self.shift_labels)
        assert found.labels is not None
        return found.loss(found.labels), found.sequences

    def diagonal(self, matrix: Matrix) -> Tensor:
        """(out_features, in_features), fp64 for fp64 weights, else fp32: averaged over the probes, then clamped at 0.

        Raises:
            CalibrationError: an operation of the model has no second derivative.
            NonFiniteError: a Hessian-vector product holds NaN or Inf.
        """
        module = self.modules[matrix.name]
        weight = module.get_parameter("weight")
        # Every second probe goes to one half, the others to the other.
        dtype = accumulator_dtype(weight.dtype)
        halves = [torch.zeros(weight.shape, dtype=dtype, device=weight.device) for _ in range(2)]
        traces: list[float] = []
        with self._differentiable(matrix, weight):
            while len(traces) < self.probes and not self._precise(traces):
                last = min(len(traces) + self.min_probes, self.probes)
                traces += self._round(matrix, weight, range(len(traces), last), halves)
        scale = 1 / (self._scale * self.sequences)
        counts = (-(-len(traces) // 2), len(traces) // 2)
        found = [
            diagonal_metrics((half * (scale / count)).clamp_(min=0), k=self.k, alpha=self.alpha)
            for half, count in zip(halves, counts, strict=True)
        ]
        mean = halves[0].add_(halves[1]).mul_(scale / len(traces))
        total, signed = float(mean.abs().sum(dtype=torch.float64)), float(mean.sum(dtype=torch.float64))
        matrix.probes = ProbeStatistics(
            count=len(traces),
            trace=statistics.fmean(traces) * scale,
            standard_error=_standard_error(traces) * scale,
            negative_mass=max(0.0, (total - signed) / (2 * total)) if total else 0.0,
            half_topk_mean=(float(found[0].topk_mean), float(found[1].topk_mean)),
            half_effective_rank=(int(found[0].effective_rank), int(found[1].effective_rank)),
        )
        mean.clamp_(min=0)
        return mean.T.contiguous() if is_conv1d(module) else mean

    def _precise(self, traces: list[float]) -> bool:
        """Whether the trace's standard error is within the tolerance, relative to the trace."""
        return len(traces) >= self.min_probes and _standard_error(traces) <= self.tolerance * abs(
            statistics.fmean(traces)
        )

    @contextlib.contextmanager
    def _differentiable(self, matrix: Matrix, weight: nn.Parameter) -> Iterator[None]:
        """Only this weight requires a gradient, and attention takes the backend that has second derivatives."""
        attention = sdpa_kernel(SDPBackend.MATH) if self.hvp == "double_backward" else contextlib.nullcontext()
        weight.requires_grad_(True)
        try:
            with torch.enable_grad(), attention:
                yield
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
                raise
            raise CalibrationError(
                f"the Hessian of module {matrix.name!r} cannot be taken by double backward, for an operation between "
                f"it and the loss has no second derivative ({str(error).splitlines()[0]}); use "
                "hvp='central_differences', or attn_implementation='eager' for attention"
            ) from error
        finally:
            self._probed = None
            weight.requires_grad_(False)

    def _round(self, matrix: Matrix, weight: nn.Parameter, probes: range, halves: list[Tensor]) -> list[float]:
        """Add z ⊙ Hz of each probe to its half. Returns zᵀHz of each, summed over the batches."""
        products = self._double_backward if self.hvp == "double_backward" else self._central_differences
        place = self._places[id(weight)]
        traces = torch.zeros(len(probes), dtype=torch.float64, device=weight.device)
        for batch in self._kept:
            self._probed = (matrix, batch)
            offsets = [place << 32 | probe for probe in probes]
            for index, (z, hz) in enumerate(products(weight, batch, offsets)):
                hutchinson_accumulate(hz, halves[probes[index] % 2], seed=self.seed, offset=offsets[index])
                traces[index] += (z * hz).sum(dtype=torch.float64)
        found: list[float] = traces.tolist()
        if not all(map(math.isfinite, found)):
            raise NonFiniteError(
                f"a Hessian-vector product of module {matrix.name!r} overflowed to Inf or NaN though the loss is "
                "finite; calibrate in bfloat16 or float32"
            )
        return found

    def _double_backward(
        self, weight: nn.Parameter, batch: Batch, offsets: list[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        gradient = self._gradient(weight, batch, create_graph=True)
        # Without a graph the loss does not depend on the weight, or only in proportion to it.
        if gradient is None or not gradient.requires_grad:
            return
        _check_differentiable(gradient)
        for offset in offsets:
            z = rademacher(weight.shape, seed=self.seed, offset=offset, dtype=weight.dtype, device=weight.device)
            keep = offset != offsets[-1]
            (hz,) = torch.autograd.grad(gradient, weight, z, retain_graph=keep, allow_unused=True)
            if hz is not None:
                yield z, hz

    def _central_differences(
        self, weight: nn.Parameter, batch: Batch, offsets: list[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(∇L(W + εz) − ∇L(W − εz)) / 2ε, ε the root mean square of W times the cube root of its rounding error.

        That balances what rounding does, in proportion to 1/ε, with what the third derivative does, to ε².
        """
        original = weight.detach().clone()
        size = float(original.double().square().mean().sqrt()) or 1.0
        step = size * (torch.finfo(weight.dtype).eps / 2) ** (1 / 3)
        try:
            for offset in offsets:
                z = rademacher(weight.shape, seed=self.seed, offset=offset, dtype=weight.dtype, device=weight.device)
                hz = torch.zeros_like(z, dtype=accumulator_dtype(z.dtype))
                for side in (step, -step):
                    weight.data.copy_(original).add_(z, alpha=side)
                    gradient = self._gradient(weight, batch, create_graph=False)
                    if gradient is not None:
                        hz.add_(gradient, alpha=0.5 / side)
                yield z, hz
        finally:
            weight.data.copy_(original)

    def _gradient(self, weight: nn.Parameter, batch: Batch, *, create_graph: bool) -> Tensor | None:
        loss, _ = self._loss(batch)
        if not loss.requires_grad:
            return None
        return torch.autograd.grad(loss * self._scale, weight, create_graph=create_graph, allow_unused=True)[0]


def _check_differentiable(gradient: Tensor) -> None:
    """Raise RuntimeError if a function marked with @once_differentiable had a part in the gradient.

    Autograd's node that would say so is a dead end, which no path to the weight crosses: its part would be missing
    from the Hessian without a word.
    """
    seen: set[Any] = set()
    ahead = [gradient.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("derivative for a function that is marked with @once_differentiable")
        ahead.extend(before for before, _ in node.next_functions)


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
