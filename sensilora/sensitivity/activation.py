"""The activation estimator: the diagonal of each layer's input autocorrelation (Sensitivity-LoRA, section 4.6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sensilora import ops
from sensilora.sensitivity.batches import Batch, Rows
from sensilora.sensitivity.capture import Forward, Matrix, first_argument, raise_non_finite, rows_of


class _Seen(NamedTuple):
    x: Tensor
    version: int
    rows: Rows
    squares: Tensor


class ActivationEstimator:
    """Sums x_t² over the tokens that enter each matrix, by forward passes alone."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], matrices: dict[str, Matrix]) -> None:
        self.model, self.modules, self.matrices = model, modules, matrices
        self.batch: Batch | None = None
        self.batches = self.tokens = self.sequences = 0
        self._last: _Seen | None = None
        self._dtypes: dict[str, torch.dtype] = {}

    def wrap(self, name: str, module: nn.Module, forward: Forward) -> Forward:
        matrix = self.matrices[name]

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.batch is not None:
                self._see(name, matrix, first_argument(args, kwargs), self.batch)
            return forward(*args, **kwargs)

        return watched

    def _see(self, name: str, matrix: Matrix, x: Tensor, batch: Batch) -> None:
        rows = rows_of(batch, name, x) if batch.padded else Rows(torch.tensor([x.shape[:-1].numel()]))
        last = self._last
        # Query, key and value read the very same tensor one after the other: its squares are summed once.
        if last is None or last.x is not x or last.version != x._version or last.rows.mask is not rows.mask:
            mask = None if rows.mask is None else rows.mask.view(x.shape[:-1])
            last = self._last = _Seen(x, x._version, rows, ops.autocorrelation_diag(x.detach(), mask=mask))
        # Many batches are summed in fp64; what comes out has the precision of one.
        matrix.accumulator(x, last.squares.shape, torch.float64).add_(last.squares)
        self._dtypes[matrix.name] = last.squares.dtype
        matrix.tokens += rows.count
        matrix.calls += 1

    @torch.no_grad()
    def observe(self, batch: Batch) -> None:
        self.batch = batch
        self.model(**batch.inputs)
        self.batch = self._last = None
        self.batches += 1
        self.tokens += batch.streams[0].tokens if batch.streams else batch.size
        self.sequences += batch.size
        # One small transfer a batch, and the batch that is to blame is still at hand.
        traces = [matrix.diagonal.sum().cpu() for matrix in self.matrices.values() if matrix.diagonal is not None]
        if traces and not bool(torch.stack(traces).isfinite().all()):
            raise_non_finite(self.model, self.modules, batch, "an input of a target module")

    def diagonal(self, matrix: Matrix) -> Tensor:
        """(in_features,), fp64 for fp64 inputs, else fp32: mean square of each input, per counted token."""
        assert matrix.diagonal is not None
        return (matrix.diagonal / self.tokens).to(self._dtypes[matrix.name])
