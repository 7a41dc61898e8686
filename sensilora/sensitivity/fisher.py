"""The Fisher estimator: squared gradients of each sequence's own loss, without ever forming a weight gradient.

For one linear layer and sequence n with inputs X_n and output gradients G_n, the diagonal is (1/N) Σ_n (G_nᵀX_n)²
("per_sequence") or (1/N) Σ_n (G_n∘G_n)ᵀ(X_n∘X_n) ("per_position"). "per_loss_term" is "per_sequence" on each term of
the losses in turn, all sequences side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sensilora import ops
from sensilora.errors import CalibrationError
from sensilora.sensitivity.batches import Batch, Rows
from sensilora.sensitivity.capture import (
    Forward,
    Matrix,
    first_argument,
    raise_non_finite,
    rows_of,
    wrapped_forwards,
)
from sensilora.sensitivity.estimator import Estimator
from sensilora.sensitivity.losses import Likelihood, likelihood
from sensilora.targets import is_packed_for_inference

#: loss_fn(outputs, batch): the loss summed (not averaged) over the batch's sequences.
LossFunction = Callable[[Any, dict[str, Any]], Tensor]

# Powers of two, undone exactly: gradients of fp16 models would otherwise underflow.
_FP16_LOSS_SCALE = 2.0**10


class _Probe(torch.autograd.Function):
    """The identity on a linear module's output; its backward hands (input, output gradient) on.

    Works with frozen weights because `anchor` requires a gradient (it gets none), and under both modes of gradient
    checkpointing: the saved input obeys the checkpoint, and the backward runs exactly once. Without `deliver` it only
    passes gradients on, so that all passes over the data differentiate one and the same graph.
    """

    @staticmethod
    def forward(ctx, output, x, anchor, deliver):
        ctx.save_for_backward(x)
        ctx.deliver = deliver
        # Not `output` itself: autograd would return a view of it, on which an in-place activation is forbidden.
        # Sharing the storage is safe, for the backward of a linear map does not read its output.
        return output.data

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        if ctx.deliver is not None:
            ctx.deliver(x, grad_output)
        return grad_output, None, None, None


class _Root(torch.autograd.Function):
    """A frozen embedding whose output requires a gradient: reentrant checkpoints skip blocks without one."""

    @staticmethod
    def forward(ctx, anchor, forward):
        return forward()

    @staticmethod
    def backward(ctx, grad_output):
        return None, None


@dataclass
class _Calls:
    """One matrix's calls in the current batch."""

    expected: int = 0
    hidden: int = 0
    received: int = 0
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


class FisherEstimator(Estimator):
    """Sums squared per-sequence gradients of each matrix, by one forward and `draws` backward passes a batch.

    "per_loss_term" takes a backward pass for each term of the longest sequence's loss, times `draws`.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        matrices: dict[str, Matrix],
        *,
        mode: str,
        labels: str,
        draws: int,
        seed: int,
        loss_fn: LossFunction | None,
        shift_labels: bool | None,
    ) -> None:
        super().__init__(model, modules, matrices)
        self.mode, self.labels, self.draws, self.seed = mode, labels, draws, seed
        self.loss_fn, self.shift_labels = loss_fn, shift_labels
        half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        self._scale = _FP16_LOSS_SCALE if half else 1.0
        self._double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
        self._anchor = torch.zeros((), requires_grad=True)
        self._counting = False
        self._calls: dict[str, _Calls] = {}
        self._last_backward = False

    def wrap(self, name: str, module: nn.Module, forward: Forward) -> Forward:
        matrix = self.matrices[name]

        def watched(*args: Any, **kwargs: Any) -> Any:
            x = first_argument(args, kwargs)
            if x.requires_grad and torch.is_grad_enabled() and is_packed_for_inference(module):
                raise CalibrationError(
                    f"module {name!r} passes no gradient on: bitsandbytes packs 4-bit weights for this CPU when they "
                    "are first used for inference; load the model anew, or calibrate on a GPU"
                )
            return self.watch(matrix, x, self.rows(name, x), lambda: forward(*args, **kwargs))

        return watched

    def rows(self, name: str, x: Tensor) -> Rows:
        """How the rows of an input of module `name` belong to the batch's sequences."""
        assert self.batch is not None
        return rows_of(self.batch, name, x)

    def watch(self, matrix: Matrix, x: Tensor, rows: Rows, product: Callable[[], Tensor]) -> Tensor:
        """The output of a matrix's `product` with `x`, whose gradient will be received."""
        if not matrix.active:
            return _Probe.apply(product(), None, self._anchor, None)
        # A checkpoint runs the forward again during backward; that is not another call.
        if self._counting:
            calls = self._calls.setdefault(matrix.name, _Calls())
            calls.expected += 1
            calls.hidden += not torch.is_grad_enabled()
            matrix.calls += 1
            matrix.tokens += rows.count
        return _Probe.apply(product(), x.detach(), self._anchor, partial(self._receive, matrix, rows))

    def _receive(self, matrix: Matrix, rows: Rows, x: Tensor, grad_output: Tensor) -> None:
        calls = self._calls[matrix.name]
        calls.received += 1
        calls.parts.append((rows.pack(x), rows.pack(grad_output), rows.lengths))
        if calls.received == calls.expected:
            self._add(matrix, calls)

    def _add(self, matrix: Matrix, calls: _Calls) -> None:
        """Square and add the calls' gradients, which count as one: they are of one weight."""
        x, grad_output, lengths = calls.parts[0] if len(calls.parts) == 1 else _concatenate(calls.parts)
        calls.parts.clear()
        # A backward pass of "per_loss_term" is of one term a sequence.
        convention = "per_position" if self.mode == "per_position" else "per_sequence"
        # The first sum is written and not added to zeros, which for a large model are tens of gigabytes.
        matrix.diagonal = ops.fisher_diag(
            x, grad_output, mode=convention, lengths=lengths, out=matrix.sum_on(x.device)
        )
        if self.finish is not None and self._last_backward:
            self.finish(matrix)

    def observe(self, batch: Batch) -> None:
        self.batch = batch
        self._calls.clear()
        with torch.enable_grad(), wrapped_forwards(_token_embeddings(self.model), self._root):
            self._counting = True
            outputs = self.model(**batch.inputs)
            self._counting = False
            passes = self.draws
            if self.loss_fn is not None:
                sequences, losses = batch.size, iter([own_loss(self.loss_fn, outputs, batch)])
            else:
                found = self._likelihood(outputs, batch)
                terms = range(found.most_terms) if self.mode == "per_loss_term" else [None]
                sequences, losses = found.sequences, self._losses(found, batch, terms)
                passes *= len(terms)
            del outputs
            self.sequences += sequences
            if sequences:
                for done, loss in enumerate(losses, 1):
                    self._backward(loss, batch, keep=done < passes)
        self.batches += 1
        self.tokens += batch.streams[0].tokens if batch.streams else batch.size
        self.batch = None

    def _root(self, name: str, module: nn.Module, forward: Forward) -> Forward:
        return lambda *args, **kwargs: _Root.apply(self._anchor, lambda: forward(*args, **kwargs))

    def _likelihood(self, outputs: Any, batch: Batch) -> Likelihood:
        if self.labels == "data":
            require_labels(batch)
        return likelihood(self.model, outputs, batch, self.shift_labels)

    def _losses(self, found: Likelihood, batch: Batch, terms: Sequence[int | None]) -> Iterator[Tensor]:
        """What is differentiated one by one: for each draw of labels each term, or all of them (None)."""
        if self.labels == "data":
            assert found.labels is not None
            yield from (found.loss(found.labels, term) for term in terms)
            return
        if not bool(found.logits.logsumexp(-1).isfinite().all()):
            raise_non_finite(self.model, self.modules, batch, "the model's output")
        generator = torch.Generator(found.logits.device).manual_seed(_seed_of_batch(self.seed, self.batches))
        for _ in range(self.draws):
            labels = found.sample(generator)
            yield from (found.loss(labels, term) for term in terms)

    def _backward(self, loss: Tensor, batch: Batch, *, keep: bool) -> None:
        if not bool(loss.isfinite()):
            raise_non_finite(self.model, self.modules, batch, "the loss")
        if not loss.requires_grad:
            raise CalibrationError(
                "the loss does not depend on any target module: the model runs them under no_grad, or reentrant "
                "gradient checkpointing hides them (use use_reentrant=False)"
            )
        for calls in self._calls.values():
            calls.received = 0
        self._last_backward = not keep
        # Not autograd.grad, which reentrant checkpoints refuse. No leaf here but the anchor, which gets no gradient.
        (loss * self._scale).backward(retain_graph=keep)
        for name, calls in self._calls.items():
            if calls.received < calls.expected and calls.hidden:
                raise CalibrationError(
                    f"no gradient reached module {name!r}, which ran with gradients disabled: use "
                    "use_reentrant=False for gradient checkpointing, or leave the module out of targets"
                )
            if calls.parts:
                # The other calls did not contribute to the loss.
                self._add(self.matrices[name], calls)

    def diagonal(self, matrix: Matrix) -> Tensor:
        """(out_features, in_features): mean over sequences and draws of the squared gradient, in the sum's memory."""
        if matrix.diagonal is None:
            # It ran, but the loss does not depend on it.
            return torch.zeros(matrix.shape)
        return matrix.diagonal.div_(self._scale**2 * self.sequences * self.draws)

    def accumulator_bytes(self, matrix: Matrix) -> int:
        out_features, in_features = matrix.shape
        return (8 if self._double else 4) * out_features * in_features

    @property
    def one_backward(self) -> bool:
        return self.draws == 1 and self.mode != "per_loss_term"


def own_loss(loss_fn: LossFunction, outputs: Any, batch: Batch) -> Tensor:
    """The caller's loss, checked to be a scalar."""
    loss = loss_fn(outputs, batch.entries)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise CalibrationError(f"loss_fn must return the loss as a scalar tensor, summed over the batch, not {shape}")
    return loss.reshape(())


def require_labels(batch: Batch) -> None:
    """Raise CalibrationError if the batch has no labels."""
    if batch.labels is None:
        raise CalibrationError(
            f"a calibration batch has no labels, only {', '.join(map(str, batch.entries))}; add them under 'labels' "
            "(for a causal language model: batch['labels'] = batch['input_ids'], with -100 where a label is not to "
            "count), or pass labels='model' to sample them from the model"
        )


def _seed_of_batch(seed: int, batch: int) -> int:
    """Of a batch's label samples: by the increments of splitmix64, so that no batch has to be run for the next."""
    return (seed + batch * 0x9E3779B97F4A7C15) % 2**64


def _concatenate(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Packed (x, grad_output, lengths) of several calls as one, each sequence's rows of all calls together."""

    def interleave(column: int) -> Tensor:
        pieces = [part[column].split(part[2].tolist()) for part in parts]
        return torch.cat([piece for sequence in zip(*pieces, strict=True) for piece in sequence])

    return interleave(0), interleave(1), torch.stack([lengths for *_, lengths in parts]).sum(0)


def _token_embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The model's input embedding and the embeddings tied to it (an encoder's and a decoder's), by name."""
    tokens, getter = None, getattr(model, "get_input_embeddings", None)
    with contextlib.suppress(NotImplementedError):
        tokens = getter() if getter is not None else None
    if not isinstance(tokens, nn.Embedding):
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.weight is tokens.weight
    }
