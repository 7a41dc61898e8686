"""Adapter modules: a frozen linear layer with a low-rank adapter of its own rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sensilora.errors import AdapterError, RankError
from sensilora.ops import lora_linear
from sensilora.targets import is_conv1d, is_matrix, matrix_shape

INITS = ("kaiming", "gaussian")


class VarRankLoRALinear(nn.Module):
    """A frozen linear layer plus a trainable update of any rank: y = base(x) + s (drop(x) Aᵀ) Bᵀ.

    A new adapter leaves the layer's function as it was (B starts at zero). The base layer's weight and bias stop
    requiring gradients. Source: LoRA (Hu et al. 2021), eq. 3.

    Args:
        base_layer: ``nn.Linear``, or transformers' ``Conv1D`` (weight stored transposed). Kept as ``base_layer``.
        rank: 0 to min(in_features, out_features). Rank 0 is the base layer alone.
        scaling: s, the effective scale (alpha / rank in PEFT's terms).
        dropout: probability of dropping an element of the adapter's input while training.
        init: lora_A's initialisation: ``"kaiming"`` (uniform, a = √5, as PEFT's default) or ``"gaussian"``
            (standard deviation 1 / rank).
        adapter_dtype: dtype of lora_A and lora_B. None: fp32 over a 16-bit base, else the base's dtype.

    Attributes:
        lora_A: Parameter (rank, in_features).
        lora_B: Parameter (out_features, rank).
        rank, scaling, dropout, in_features, out_features: as given.
        merged: whether the base weight holds the update at present.

    Raises:
        AdapterError: `base_layer` is neither of the two.
        RankError: the rank is out of range.
        ValueError: `init` is unknown, or `dropout` outside [0, 1].
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        *,
        scaling: float = 1.0,
        dropout: float = 0.0,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not is_matrix(base_layer):
            raise AdapterError(f"base_layer must be nn.Linear or Conv1D, not {type(base_layer).__name__}")
        if init not in INITS:
            raise ValueError(f"init {init!r} is unknown; choose one of {', '.join(INITS)}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be in [0, 1], not {dropout}")
        self.out_features, self.in_features = matrix_shape(base_layer)
        self.rank = self._checked_rank(rank)
        self.scaling = float(scaling)
        self.dropout = float(dropout)
        self.init = init
        self.merged = False
        self.base_layer = base_layer.requires_grad_(False)
        if adapter_dtype is None:
            adapter_dtype = torch.float32 if self.weight.dtype.itemsize == 2 else self.weight.dtype
        self.lora_A = self._parameter(rank, self.in_features, adapter_dtype)
        self.lora_B = self._parameter(self.out_features, rank, adapter_dtype)
        self.reset_parameters()
        self.train(base_layer.training)

    def _checked_rank(self, rank: int) -> int:
        largest = min(self.in_features, self.out_features)
        if not 0 <= rank <= largest:
            raise RankError(
                f"rank {rank} does not fit a {self.out_features}x{self.in_features} matrix; give 0 to {largest}"
            )
        return rank

    def _parameter(self, rows: int, columns: int, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=self.weight.device))

    @property
    def weight(self) -> Tensor:
        """The base layer's weight as it is stored: (out, in) for ``nn.Linear``, (in, out) for ``Conv1D``."""
        return self.base_layer.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias (out_features,), or None."""
        return self.base_layer._parameters.get("bias")

    def reset_parameters(self) -> None:
        """Draw lora_A anew and set lora_B to zero, so that the layer computes what the base layer does."""
        self._initialise_rows(self.lora_A)
        nn.init.zeros_(self.lora_B)

    def _initialise_rows(self, rows: Tensor) -> None:
        if rows.numel() == 0:
            return
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
        else:
            nn.init.normal_(rows, std=1 / self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.merged or self.rank == 0:
            return self.base_layer(x)
        weight = self.weight.t() if is_conv1d(self.base_layer) else self.weight
        dropout_p = self.dropout if self.training else 0.0
        return lora_linear(x, weight, self.bias, self.lora_A, self.lora_B, self.scaling, dropout_p=dropout_p)

    def delta_weight(self) -> Tensor:
        """s B A, (out_features, in_features), in fp32 (fp64 for fp64 adapters)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    @torch.no_grad()
    def merge(self) -> None:
        """Add s B A to the base weight, so that the layer costs what the base layer does.

        The sum is formed in fp32 and rounded once to the base's dtype. Merging a merged layer does nothing.
        """
        if not self.merged:
            self._add_to_base(1.0)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take s B A out of the base weight again.

        The weight was rounded to the base's dtype by `merge` and is once more: where the update is large beside the
        weight, several units in the last place of a 16-bit weight may be lost. Keep a copy for an exact return.
        """
        if self.merged:
            self._add_to_base(-1.0)
            self.merged = False

    def _add_to_base(self, sign: float) -> None:
        delta = sign * self.delta_weight()
        weight = self.weight
        if is_conv1d(self.base_layer):
            delta = delta.t()
        weight.copy_(weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta)

    @torch.no_grad()
    def resize_rank(self, rank: int) -> None:
        """Change the rank in place. lora_A and lora_B become new parameters: give them to the optimiser anew.

        Growing keeps the function exactly (new rows of A are drawn, their columns of B are zero). Shrinking keeps the
        nearest function of that rank (Eckart-Young: truncated SVD of B A); directions in which B A is zero are
        drawn anew, so that an untrained adapter stays trainable.

        Raises:
            RankError: the rank is out of range.
            AdapterError: the adapter is merged.
        """
        self._checked_rank(rank)
        if self.merged:
            raise AdapterError("a merged adapter cannot change its rank; call unmerge() first")
        old_A, old_B, old_rank = self.lora_A, self.lora_B, self.rank
        # All that can fail comes before the layer is touched.
        kept_A, kept_B = (old_A, old_B) if rank >= old_rank else _truncated(old_A, old_B, rank)
        self.rank = rank
        self.lora_A = self._parameter(rank, self.in_features, old_A.dtype)
        self.lora_B = self._parameter(self.out_features, rank, old_A.dtype)
        self.lora_A.requires_grad_(old_A.requires_grad)
        self.lora_B.requires_grad_(old_B.requires_grad)
        self.reset_parameters()
        self.lora_A[: kept_A.shape[0]] = kept_A.to(old_A.dtype)
        self.lora_B[:, : kept_A.shape[0]] = kept_B.to(old_B.dtype)

    def extra_repr(self) -> str:
        """Shown between the parentheses of ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"scaling={self.scaling:g}, dropout={self.dropout:g}" + (", merged" if self.merged else "")
        )


def _truncated(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the nearest matrix to B A of at most this rank, without directions in which B A is zero, in fp64."""
    # SVD of the (rank, rank) core instead of the (out, in) product.
    basis_B, core_B = torch.linalg.qr(lora_B.double())
    basis_A, core_A = torch.linalg.qr(lora_A.double().T)
    left, singular, right = torch.linalg.svd(core_B @ core_A.T)
    kept = int((singular[:rank] > singular[0] * 1e-12).sum())
    root = singular[:kept].sqrt()
    return root[:, None] * (right[:kept] @ basis_A.T), (basis_B @ left[:, :kept]) * root
