"""What every estimator has in common, and what `calibrate` asks of one."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from sensilora.sensitivity.batches import Batch
from sensilora.sensitivity.capture import Forward, Matrix


class Estimator(abc.ABC):
    """Sums over batches what the diagonals of a model's matrices are made of.

    All that is summed is in the `Matrix` objects and in the counters here, so that a sweep over the data can be
    interrupted between two batches and go on from `Matrix.state` and the counters alone.

    Attributes:
        matrices: by module name. Those that are not `Matrix.active` are left alone in this pass over the data.
        batches, tokens, sequences: what counted in this pass so far.
        finish: while the last batch is observed, what to call with a matrix to which nothing more will be added; it
            takes the matrix's diagonal away. None before. Calling it is a kindness to memory: matrices it was not
            called for are finished afterwards.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], matrices: dict[str, Matrix]) -> None:
        self.model, self.modules, self.matrices = model, modules, matrices
        self.batch: Batch | None = None
        self.batches = self.tokens = self.sequences = 0
        self.finish: Callable[[Matrix], None] | None = None

    @abc.abstractmethod
    def wrap(self, name: str, module: nn.Module, forward: Forward) -> Forward:
        """What module `name` runs in the place of `forward`, see `capture.wrapped_forwards`."""

    @abc.abstractmethod
    def observe(self, batch: Batch) -> None:
        """Run the model on a batch, and add it to the active matrices and to the counters.

        What it draws at random depends on the seed and on `batches` alone.
        """

    @abc.abstractmethod
    def diagonal(self, matrix: Matrix) -> Tensor:
        """The matrix's finished diagonal, non-negative, fp32 or fp64. It may take the running sum's memory."""

    @abc.abstractmethod
    def accumulator_bytes(self, matrix: Matrix) -> int:
        """Memory of the matrix's running sum."""

    @property
    def one_backward(self) -> bool:
        """Whether a matrix's whole share of a batch comes at once, so that of a single batch no sum is kept."""
        return False

    @property
    def keeps_batches(self) -> bool:
        """Whether the work is done in `diagonal`, on the batches that were observed, and not in `observe`."""
        return False

    def rewind(self) -> None:
        """Forget the counters before another pass over the data."""
        self.batches = self.tokens = self.sequences = 0
