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
        _check_base(base_layer)
        self.out_features, self.in_features = matrix_shape(base_layer)
        _check_settings(rank, base_layer, init, dropout)
        self.rank = rank
        self.scaling = float(scaling)
        self.dropout = float(dropout)
        self.init = init
        self.merged = False
        self.base_layer = base_layer.requires_grad_(False)
        adapter_dtype = adapter_dtype or _adapter_dtype(self.weight)
        self.lora_A = self._parameter(rank, self.in_features, adapter_dtype)
        self.lora_B = self._parameter(self.out_features, rank, adapter_dtype)
        self.reset_parameters()
        self.train(base_layer.training)

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
        _draw(self.lora_A, self.init)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.merged or self.rank == 0:
            return self.base_layer(x)
        weight = self.weight.t() if is_conv1d(self.base_layer) else self.weight
        dropout_p = self.dropout if self.training else 0.0
        return lora_linear(x, weight, self.bias, self.lora_A, self.lora_B, self.scaling, dropout_p=dropout_p)

    def delta_weight(self) -> Tensor:
        """s B A, (out_features, in_features), in fp32 (fp64 for fp64 adapters)."""
        return _delta(self.lora_A, self.lora_B, self.scaling)

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
        _add_to(self.base_layer, sign * self.delta_weight())

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
        _check_rank(rank, self.base_layer)
        if self.merged:
            raise AdapterError("a merged adapter cannot change its rank; call unmerge() first")
        # All that can fail comes before the layer is touched.
        new_A, new_B = _resized(self.lora_A, self.lora_B, rank, self.init)
        self.rank = rank
        self.lora_A = nn.Parameter(new_A, requires_grad=self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(new_B, requires_grad=self.lora_B.requires_grad)

    def extra_repr(self) -> str:
        """Shown between the parentheses of ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"scaling={self.scaling:g}, dropout={self.dropout:g}" + (", merged" if self.merged else "")
        )


def _check_base(base_layer: nn.Module) -> None:
    if not is_matrix(base_layer):
        raise AdapterError(f"base_layer must be nn.Linear or Conv1D, not {type(base_layer).__name__}")


def _check_settings(rank: int, base_layer: nn.Module, init: str, dropout: float) -> None:
    if init not in INITS:
        raise ValueError(f"init {init!r} is unknown; choose one of {', '.join(INITS)}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], not {dropout}")
    _check_rank(rank, base_layer)


def _check_rank(rank: int, base_layer: nn.Module) -> None:
    out_features, in_features = matrix_shape(base_layer)
    if not 0 <= rank <= min(out_features, in_features):
        raise RankError(
            f"rank {rank} does not fit a {out_features}x{in_features} matrix; "
            f"give 0 to {min(out_features, in_features)}"
        )


def _adapter_dtype(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.dtype.itemsize == 2 else weight.dtype


def _draw(lora_A: Tensor, init: str) -> None:
    if lora_A.numel() == 0:
        return
    if init == "kaiming":
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    else:
        nn.init.normal_(lora_A, std=1 / lora_A.shape[0])


def _delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """s B A in fp32, or fp64 for fp64 adapters."""
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    return scaling * (lora_B.to(dtype) @ lora_A.to(dtype))


def _add_to(base_layer: nn.Module, delta: Tensor) -> None:
    """Add delta (out, in) to the weight, rounding once to the weight's dtype."""
    weight = base_layer.get_parameter("weight")
    if is_conv1d(base_layer):
        delta = delta.t()
    weight.copy_(weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta)


def _resized(lora_A: Tensor, lora_B: Tensor, rank: int, init: str) -> tuple[Tensor, Tensor]:
    """Factors of this rank for the same function, or the nearest; see `VarRankLoRALinear.resize_rank`."""
    kept_A, kept_B = (lora_A, lora_B) if rank >= lora_A.shape[0] else _truncated(lora_A, lora_B, rank)
    new_A = lora_A.new_zeros(rank, lora_A.shape[1])
    new_B = lora_B.new_zeros(lora_B.shape[0], rank)
    _draw(new_A, init)
    new_A[: kept_A.shape[0]] = kept_A.to(new_A.dtype)
    new_B[:, : kept_A.shape[0]] = kept_B.to(new_B.dtype)
    return new_A, new_B


def _truncated(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the nearest matrix to B A of at most this rank, without directions in which B A is zero, in fp64."""
    # SVD of the (rank, rank) core instead of the (out, in) product.
    basis_B, core_B = torch.linalg.qr(lora_B.double())
    basis_A, core_A = torch.linalg.qr(lora_A.double().T)
    left, singular, right = torch.linalg.svd(core_B @ core_A.T)
    kept = int((singular[:rank] > singular[0] * 1e-12).sum())
    root = singular[:kept].sqrt()
    return root[:, None] * (right[:kept] @ basis_A.T), (basis_B @ left[:, :kept]) * root
