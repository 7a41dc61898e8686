"""The activation estimator: each layer's input autocorrelation H = Σ_t x_t x_tᵀ (Sensitivity-LoRA, section 4.6).

Its diagonal is one number an input feature, 1 / diag(H⁻¹) another, H taken in diagonal blocks (appendix E).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sensilora import ops
from sensilora.errors import CalibrationError
from sensilora.sensitivity.batches import Batch, Rows, is_encoder_decoder
from sensilora.sensitivity.capture import Forward, Matrix, first_argument, raise_non_finite, rows_of
from sensilora.sensitivity.estimator import Estimator

#: Where damping ends that is raised because a Cholesky factorisation fails. Here none should: no eigenvalue is below
#: the mean of the block's diagonal, far above any rounding error of the sums.
MAX_DAMPING = 1.0
_DAMPING_STEP = 10.0


class _Seen(NamedTuple):
    x: Tensor
    version: int
    mask: Tensor | None
    rows: int
    total: Tensor


class ActivationEstimator(Estimator):
    """Sums what each matrix's metrics need of x_t x_tᵀ over the tokens that enter it, by forward passes alone.

    `Matrix.diagonal` is the fp64 sum: of x_t², (in_features,); with the variant "inverse" of the diagonal blocks
    of x_t x_tᵀ, (blocks, block_size, block_size).
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        matrices: dict[str, Matrix],
        *,
        variant: str = "diagonal",
        block_size: int = 128,
        damping: float = 0.01,
    ) -> None:
        super().__init__(model, modules, matrices)
        self.variant, self.block_size, self.damping = variant, block_size, damping
        self._last: _Seen | None = None
        self._shortcut = {"logits_to_keep": 1} if _may_skip_logits(model, modules) else {}

    def wrap(self, name: str, module: nn.Module, forward: Forward) -> Forward:
        matrix = self.matrices[name]

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.batch is not None and matrix.active:
                x = first_argument(args, kwargs)
                self._see(matrix, x, rows_of(self.batch, name, x) if self.batch.padded else None)
            return forward(*args, **kwargs)

        return watched

    def rows(self, name: str, x: Tensor) -> Rows:
        """How the rows of an input of module `name` belong to sequences; without padding, to one."""
        assert self.batch is not None
        if self.batch.padded:
            return rows_of(self.batch, name, x)
        return Rows(torch.tensor([x.shape[:-1].numel()]))

    def watch(self, matrix: Matrix, x: Tensor, rows: Rows, product: Callable[[], Tensor]) -> Tensor:
        """The output of a matrix's `product` with `x`, which is seen."""
        if matrix.active:
            self._see(matrix, x, rows)
        return product()

    def _see(self, matrix: Matrix, x: Tensor, rows: Rows | None) -> None:
        flat = None if rows is None else rows.mask
        last = self._last
        # Query, key and value read the very same tensor one after the other: it is summed once.
        if last is None or last.x is not x or last.version != x._version or last.mask is not flat:
            mask = None if flat is None else flat.view(x.shape[:-1]).to(x.device)
            count = x.shape[:-1].numel() if rows is None else rows.count
            last = self._last = _Seen(x, x._version, flat, count, self._total(x, mask))
        # Many batches are summed in fp64; what comes out has the precision of one.
        held = matrix.sum_on(x.device)
        if held is None:
            matrix.diagonal = last.total.to(torch.float64, copy=True)
        else:
            held.add_(last.total)
        matrix.dtype = last.total.dtype
        matrix.tokens += last.rows
        matrix.calls += 1

    def _total(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.variant == "inverse":
            return ops.autocorrelation_blocks(x, self.block_size, mask=mask)
        return ops.autocorrelation_diag(x, mask=mask)

    @torch.no_grad()
    def observe(self, batch: Batch) -> None:
        self.batch = batch
        self.model(**self._shortcut | batch.inputs)
        self.batch = self._last = None
        self.batches += 1
        self.tokens += batch.streams[0].tokens if batch.streams else batch.size
        self.sequences += batch.size
        if not self._finite():
            raise_non_finite(self.model, self.modules, batch, "an input of a target module")

    def _finite(self) -> bool:
        """One transfer a device and batch, and the batch that is to blame is still at hand."""
        sums: dict[torch.device, list[Tensor]] = {}
        for matrix in self.matrices.values():
            if matrix.diagonal is not None:
                sums.setdefault(matrix.diagonal.device, []).append(_squares(matrix.diagonal).flatten())
        return all(bool(torch.cat(parts).isfinite().all()) for parts in sums.values())

    def diagonal(self, matrix: Matrix) -> Tensor:
        """(in_features,), fp64 for fp64 inputs, else fp32: mean square of each input, per counted token.

        With the variant "inverse" 1 / diag(H⁻¹), H being the mean of x_t x_tᵀ; `matrix` is told what that took.

        Raises:
            CalibrationError: a block has no Cholesky factor at any damping.
        """
        assert matrix.diagonal is not None
        mean = matrix.diagonal / self.tokens
        if self.variant == "inverse":
            found = inverse_diagonal(mean, self.damping)
            if found is None:
                raise CalibrationError(
                    f"the input autocorrelation of module {matrix.name!r} has a block without a Cholesky factor at "
                    f"damping {MAX_DAMPING:g}; use a smaller block_size or variant='diagonal'"
                )
            matrix.damping, matrix.attempts = found.damping, found.attempts
            mean = found.values.flatten()[: matrix.shape[1]]
        return mean.to(matrix.dtype)

    def accumulator_bytes(self, matrix: Matrix) -> int:
        in_features = matrix.shape[1]
        if self.variant == "diagonal":
            return 8 * in_features
        size = min(self.block_size, in_features)
        return 8 * size * size * -(-in_features // size)


def _may_skip_logits(model: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    """Whether logits can be left out but for a position, since no target module is their head.

    They are a twentieth of an 8B model's arithmetic, and its largest activation.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters or is_encoder_decoder(model):
        return False
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and all(module is not head for module in modules.values())


class Inverse(NamedTuple):
    """What `inverse_diagonal` found, and what it took."""

    values: Tensor
    damping: float
    attempts: int


def inverse_diagonal(blocks: Tensor, damping: float) -> Inverse | None:
    """1 / diag((H + δI)⁻¹) of each symmetric positive semidefinite block H, by Cholesky factors.

    δ is `damping` times the mean of the block's diagonal, GPTQ's ``percdamp`` (arXiv 2210.17323); here the mean is
    over the features that are not 0 everywhere. Those that are get 0 and touch no other. Blocks whose factorisation
    fails are tried again with 10 times the damping, up to `MAX_DAMPING`.

    Args:
        blocks: (blocks, block, block), fp64, finite.
        damping: in (0, `MAX_DAMPING`].

    Returns:
        `values` (blocks, block), the largest `damping` used and the number of `attempts`; None if a block has no
        factor at `MAX_DAMPING`, which says that it is not positive semidefinite.
    """
    squares = _squares(blocks)
    alive = squares > 0
    scale = squares.sum(-1) / alive.sum(-1).clamp(min=1)
    scale = torch.where(scale > 0, scale, 1.0)
    # In units of the mean of the diagonal. A dead feature becomes a row of the identity.
    normalised = (blocks / scale[:, None, None]) * (alive.unsqueeze(-1) & alive.unsqueeze(-2))
    normalised.diagonal(dim1=-2, dim2=-1).add_(~alive)
    levels = torch.full_like(scale, damping)
    attempts = 0
    while True:
        attempts += 1
        factors, failed = torch.linalg.cholesky_ex(normalised + levels[:, None, None] * _identity(blocks))
        stuck = failed != 0
        if not bool(stuck.any()):
            break
        if bool((levels[stuck] >= MAX_DAMPING).any()):
            return None
        levels = torch.where(stuck, (levels * _DAMPING_STEP).clamp(max=MAX_DAMPING), levels)
    # H⁻¹ = L⁻ᵀ L⁻¹, so its diagonal holds the sums of squares of the columns of L⁻¹.
    inverse = torch.linalg.solve_triangular(factors, _identity(blocks).expand_as(factors), upper=False)
    values = torch.where(alive, scale.unsqueeze(-1) / inverse.square().sum(-2), 0.0)
    return Inverse(values, float(levels.max()), attempts)


def _identity(blocks: Tensor) -> Tensor:
    return torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)


def _squares(total: Tensor) -> Tensor:
    """The sums of squares in a sum of either variant."""
    return total.diagonal(dim1=-2, dim2=-1) if total.dim() == 3 else total
