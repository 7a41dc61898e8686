"""Adapter modules: a frozen linear layer with a low-rank adapter of its own rank."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sensilora.errors import AdapterError, RankError
from sensilora.ops import lora_group, lora_linear, lora_segments, lora_update
from sensilora.ops._lora import autocast_dtype, draw_seeds
from sensilora.targets import (
    has_own_forward,
    is_conv1d,
    is_matrix,
    is_packed_for_inference,
    is_packed_otherwise,
    is_quantised,
    is_wrapped,
    matrix_shape,
    whole_rank,
)

INITS = ("kaiming", "gaussian")


class VarRankLoRALinear(nn.Module):
    """A frozen linear layer plus a trainable update of any rank: y = base(x) + s (drop(x) Aᵀ) Bᵀ.

    A new adapter leaves the layer's function as it was (B starts at zero). The base layer's weight and bias stop
    requiring gradients. Source: LoRA (Hu et al. 2021), eq. 3.

    Args:
        base_layer: ``nn.Linear``, or transformers' ``Conv1D`` (weight stored transposed). Kept as ``base_layer``. One
            that bitsandbytes or torchao quantised is called for its product and cannot be merged into.
        rank: 0 to min(in_features, out_features). Rank 0 is the base layer alone.
        scaling: s, the effective scale (alpha / rank in PEFT's terms).
        dropout: probability of dropping an element of the adapter's input while training.
        init: lora_A's initialisation: ``"kaiming"`` (uniform, a = √5, as PEFT's default) or ``"gaussian"``
            (standard deviation 1 / rank).
        adapter_dtype: dtype of lora_A and lora_B. None: fp32 over a 16-bit or quantised base, else the base's dtype.

    Attributes:
        lora_A: Parameter (rank, in_features).
        lora_B: Parameter (out_features, rank).
        rank, scaling, dropout, in_features, out_features: as given.
        merged: whether the base weight holds the update at present.

    Raises:
        AdapterError: `base_layer` is neither of the two.
        RankError: the rank is out of range.
        ValueError: `init` is unknown, `dropout` outside [0, 1], or `adapter_dtype` not of floating point.
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
        self.rank = rank = check_settings(rank, base_layer, init, dropout, adapter_dtype)
        self.scaling = float(scaling)
        self.dropout = float(dropout)
        self.init = init
        self.merged = False
        self.base_layer = base_layer.requires_grad_(False)
        adapter_dtype = adapter_dtype or _adapter_dtype(base_layer)
        self.lora_A = self._parameter(rank, self.in_features, adapter_dtype)
        self.lora_B = self._parameter(self.out_features, rank, adapter_dtype)
        self.reset_parameters()
        self.train(base_layer.training)

    def _parameter(self, rows: int, columns: int, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=self.weight.device))

    @property
    def weight(self) -> Tensor:
        """The base layer's weight as it is stored: (out, in) for ``nn.Linear``, (in, out) for ``Conv1D``."""
        return _weight_of(self.base_layer)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias (out_features,), or None."""
        return getattr(self.base_layer, "bias", None)

    def reset_parameters(self) -> None:
        """Draw lora_A anew and set lora_B to zero, so that the layer computes what the base layer does."""
        _draw(self.lora_A, self.init)
        nn.init.zeros_(self.lora_B)

    @property
    def adapts(self) -> bool:
        """Whether forward adds an update to the base layer: not if it is merged, or the rank is 0."""
        return not self.merged and self.rank > 0

    def forward(self, x: Tensor, *, seed: Tensor | None = None) -> Tensor:
        """(..., in_features) to (..., out_features).

        Args:
            x: the input.
            seed: the dropout mask's key, an int64 tensor of one element on x's device; None draws one.
        """
        y = None if seed is not None else shared_output(self, x)
        if y is not None:
            return y
        if not self.adapts:
            return self.base_layer(x)
        p = self.dropout if self.training else 0.0
        return _adapted(self, x, self.lora_A, self.lora_B, self.scaling, p, seed)

    def delta_weight(self) -> Tensor:
        """s B A, (out_features, in_features), in fp32 (fp64 for fp64 adapters)."""
        return _delta(self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """Add s B A to the base weight, so that the layer costs what the base layer does.

        The sum is formed in fp32 and rounded once to the base's dtype. Merging a merged layer does nothing.

        Raises:
            AdapterError: the base is quantised.
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
        rank = _checked_rank(rank, self.base_layer)
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
    if isinstance(base_layer, NonDynamicallyQuantizableLinear):
        raise AdapterError(
            "base_layer is the output projection of an nn.MultiheadAttention, which reads its weight and never calls "
            "it; an adapter would have no effect"
        )
    if is_packed_otherwise(base_layer):
        raise AdapterError(
            f"the weight of the base layer is packed ({type(base_layer.weight).__name__}) in a way that is not known "
            "here; of quantised layers those of bitsandbytes and torchao are"
        )


def _weight_of(base_layer: nn.Module) -> Tensor:
    # As an attribute: in replicas of nn.DataParallel, under functional_call and where a parametrisation computes it,
    # it is no parameter.
    weight: Tensor = getattr(base_layer, "weight")  # noqa: B009
    return weight


def check_settings(
    rank: int, base_layer: nn.Module, init: str, dropout: float, adapter_dtype: torch.dtype | None = None
) -> int:
    """The rank as an int. Raises what `VarRankLoRALinear` raises for arguments no adapter of this layer can have."""
    if adapter_dtype is not None and not adapter_dtype.is_floating_point:
        raise ValueError(f"adapter_dtype must be of floating point, not {adapter_dtype}")
    if init not in INITS:
        raise ValueError(f"init {init!r} is unknown; choose one of {', '.join(INITS)}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], not {dropout}")
    return _checked_rank(rank, base_layer)


def _checked_rank(rank: int, base_layer: nn.Module) -> int:
    rank = whole_rank(rank)
    out_features, in_features = matrix_shape(base_layer)
    if not 0 <= rank <= min(out_features, in_features):
        raise RankError(
            f"rank {rank} does not fit a {out_features}x{in_features} matrix; "
            f"give 0 to {min(out_features, in_features)}"
        )
    return rank


def _adapter_dtype(base_layer: nn.Module) -> torch.dtype:
    dtype = _weight_of(base_layer).dtype
    return torch.float32 if dtype.itemsize == 2 or is_quantised(base_layer) else dtype


def _adapted(
    layer: VarRankLoRALinear | MultiLoRALinear,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None = None,
) -> Tensor:
    """base(x) + s (drop(x) Aᵀ) Bᵀ."""
    if _must_be_called(layer.base_layer):
        check_base_gradient(layer.base_layer, x)
        y = layer.base_layer(x)
        return lora_update(y, x, lora_A, lora_B, scaling, dropout_p=dropout_p, seed=seed)
    weight = layer.weight.t() if is_conv1d(layer.base_layer) else layer.weight
    return lora_linear(x, weight, layer.bias, lora_A, lora_B, scaling, dropout_p=dropout_p, seed=seed)


def _must_be_called(base_layer: nn.Module) -> bool:
    """Whether the layer is more than the product with its weight: quantised, of another forward, or with hooks."""
    return is_quantised(base_layer) or _is_another_function(base_layer) or is_wrapped(base_layer)


def _is_another_function(base_layer: nn.Module) -> bool:
    """Whether the layer's forward is neither ``nn.Linear``'s nor transformers' ``Conv1D``'s."""
    owner = next(kind for kind in type(base_layer).__mro__ if "forward" in kind.__dict__)
    plain = owner is nn.Linear or (owner.__name__ == "Conv1D" and is_conv1d(base_layer))
    return not plain or has_own_forward(base_layer)


def check_base_gradient(base_layer: nn.Module, x: Tensor) -> None:
    """Raise AdapterError where a gradient is to go through a quantised layer that passes none on."""
    if x.requires_grad and torch.is_grad_enabled() and is_packed_for_inference(base_layer):
        raise AdapterError(
            "the quantised base layer passes no gradient on: bitsandbytes packs 4-bit weights for this CPU when they "
            "are first used for inference; load the model anew to train it, or train on a GPU"
        )


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


def check_mergeable(base_layer: nn.Module, name: str = "the base layer") -> None:
    """Raise AdapterError unless an update can be added to the layer's weight."""
    if "weight" not in base_layer._parameters:
        raise AdapterError(
            f"the weight of {name} is computed by a parametrisation, so there is nothing to merge into; take the "
            "parametrisation off first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    if is_quantised(base_layer):
        raise AdapterError(
            f"the weight of {name} is quantised, so a merged update would be rounded to its few levels; save the "
            "adapter, load it over the unquantised model and merge there"
        )


def _add_to(base_layer: nn.Module, delta: Tensor) -> None:
    """Add delta (out, in) to the weight, rounding once to the weight's dtype."""
    check_mergeable(base_layer)
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


def _joint(
    layers: Sequence[VarRankLoRALinear], x: Tensor, *, shared_dropout_mask: bool, seed: Tensor | None = None
) -> tuple[Tensor, ...] | None:
    """Every layer's output from one `lora_group` call; None where each must be called for itself.

    `seed` is the shared mask's; None draws one.
    """
    ps = [layer.dropout if layer.training else 0.0 for layer in layers]
    one_mask = shared_dropout_mask and max(ps) > 0.0
    if (
        len(layers) < 2
        or (one_mask and len(set(ps)) > 1)
        or any(_must_be_called(layer.base_layer) for layer in layers)
    ):
        return None
    weight = layers[0].weight
    for layer in layers:
        # Wrappers (sharding, offloading, parametrisation) make weights ready in a pre-hook or in a forward of their
        # own, and backward hooks want an input of their own.
        if (
            type(layer) is not VarRankLoRALinear
            or "forward" in layer.__dict__
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or not layer.adapts
            or layer.in_features != layers[0].in_features
            or layer.weight.dtype != weight.dtype
            or layer.weight.device != x.device
            or layer.lora_A.device != x.device
        ):
            return None
    return lora_group(
        x,
        [layer.weight.t() if is_conv1d(layer.base_layer) else layer.weight for layer in layers],
        [layer.bias for layer in layers],
        [layer.lora_A for layer in layers],
        [layer.lora_B for layer in layers],
        [layer.scaling for layer in layers],
        dropout_ps=ps,
        seeds=(draw_seeds(1, x.device) if seed is None else seed) if one_mask else None,
    )


class VarRankLoRAGroup(nn.Module):
    """Adapter layers of any ranks that read the same input, computed together.

    Gives what the layers give one by one, in fewer passes over the input and with one gradient of it. Layers without
    an adapter (merged, or of rank 0) are served by their base. Where the rest cannot be computed together (they
    differ in dtype, device or in_features, carry hooks or are quantised), each is called for itself. A model's own
    q, k, v or gate, up need no such module: see `sensilora.inject`.

    Args:
        layers: one or more `VarRankLoRALinear`. Kept as ``layers``.
        shared_dropout_mask: draw one dropout mask for all layers instead of one for each (PEFT's way): where they
            have one probability, all drop the same elements; of several probabilities, the smaller ones' are among
            the larger ones'.

    Raises:
        AdapterError: there is no layer, or one is of another kind.
    """

    def __init__(self, layers: Iterable[VarRankLoRALinear], *, shared_dropout_mask: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not self.layers or not all(isinstance(layer, VarRankLoRALinear) for layer in self.layers):
            raise AdapterError("a group needs one or more VarRankLoRALinear layers")
        self.shared_dropout_mask = shared_dropout_mask

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., in_features) to (..., out_features_i) for every layer i."""
        layers: list[Any] = list(self.layers)
        # `sensilora.unload` may have put base layers in their places.
        adapted = [
            i for i, layer in enumerate(layers) if getattr(layer, "adapts", False) and not layer._forward_hooks
        ]
        together, seed = None, None
        if self.shared_dropout_mask and any(self._drops(layer) for layer in layers):
            seed = draw_seeds(1, x.device)
        if len(adapted) > 1:
            together = _joint(
                [layers[i] for i in adapted], x, shared_dropout_mask=self.shared_dropout_mask, seed=seed
            )
        outputs = {} if together is None else dict(zip(adapted, together, strict=True))
        for i, layer in enumerate(layers):
            if i not in outputs:
                outputs[i] = layer(x, seed=seed) if seed is not None and self._drops(layer) else layer(x)
        return tuple(outputs[i] for i in range(len(layers)))

    @staticmethod
    def _drops(layer: Any) -> bool:
        """Whether the layer drops elements and can be told by which mask; a class of the user's own may not."""
        return type(layer) is VarRankLoRALinear and layer.adapts and layer.training and layer.dropout > 0.0

    def extra_repr(self) -> str:
        """Shown between the parentheses of ``print(model)``."""
        return f"shared_dropout_mask={self.shared_dropout_mask}"


class SharedInput:
    """Layers of one module that read one input, computed together when the first of them is called.

    The module tree is left as it is. Two hooks mark the tensor that the parent module is called with for as long as
    its forward runs. The first layer called with the marked tensor computes all of them; the others find their
    outputs at the mark, each once. Nothing outlives the parent's call. Where outputs are left over, the layers read
    different inputs: those that took theirs, or the rest if they are more, stay together, for good. An input that
    changes in place between two layers is another input, but not under torch.compile, which does not show that; in
    inference mode, where no tensor tells, each layer computes for itself.

    Args:
        parent: the module whose forward calls the layers.
        layers: two or three with the same in_features. `compute` of a subclass may take others than
            `VarRankLoRALinear`, which then have ``adapts`` and ask `shared_output` first too.
        has_query: whether the first is an attention's query, which reads another input in cross-attention.
        shared_dropout_mask: one mask for those that are computed together, see `VarRankLoRAGroup`.

    Attributes:
        together: positions of the layers that are computed together; fewer than two mean that none are.
    """

    def __init__(
        self, parent: nn.Module, layers: Sequence[Any], *, has_query: bool, shared_dropout_mask: bool = False
    ) -> None:
        self.layers = tuple(layers)
        self.shared_dropout_mask = shared_dropout_mask
        self.has_query = has_query
        self.together = tuple(range(len(layers)))
        self._hooks = (
            parent.register_forward_pre_hook(self._open, with_kwargs=True),
            parent.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        )

    def remove(self) -> None:
        """Let every layer compute for itself again."""
        for hook in self._hooks:
            hook.remove()

    def compute(self, layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...] | None:
        """The output of each of these layers for `x`, together; None where each must compute its own."""
        return _joint(layers, x, shared_dropout_mask=self.shared_dropout_mask)

    def _open(
        self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        inputs, together = self._inputs((*args, *kwargs.values())), self.together
        # Told from this call's arguments, not learned from calls before: a checkpoint's replay must be told the same.
        if self.has_query and len(inputs) > 1:
            inputs, together = inputs[1:], tuple(i for i in together if i != 0)
        if not inputs or len(together) < 2:
            return None
        x = inputs[0]
        # It has no version, by which a change in place between two layers would show.
        if not torch.compiler.is_compiling() and x.is_inference():
            return None
        # Another thread may be at the same tensor.
        if any(call.owner is self for call in _calls_at(x)):
            return None
        # torch.compile can mark what is made here, but not what a checkpointed region was called with.
        marked = x.view_as(x) if torch.compiler.is_compiling() else x
        _mark(marked, (*_calls_at(x), _SharedCall(self, together)))
        if marked is x:
            return None
        return tuple(marked if a is x else a for a in args), {k: marked if a is x else a for k, a in kwargs.items()}

    def _inputs(self, arguments: tuple[Any, ...]) -> list[Any]:
        """The tensors among a call's arguments that the layers could read."""
        features = (self.layers[0].in_features,)
        found: list[Any] = []
        for argument in arguments:
            if (
                not isinstance(argument, Tensor)
                or argument.shape[-1:] != features
                or not argument.is_floating_point()
            ):
                continue
            # Not the same one again, nor a mask that happens to be as long.
            if all(argument is not other and argument.dim() == other.dim() for other in found):
                found.append(argument)
        return found

    def _close(self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for argument in (*args, *kwargs.values()):
            for call in _calls_at(argument):
                if call.owner is self and call.thread == _thread():
                    _mark(argument, tuple(other for other in _calls_at(argument) if other is not call))
                    # After an exception there is no output, and a layer that was not called says nothing.
                    if call.in_vain() and output is not None and not self._may_be_replayed():
                        rest = tuple(i for i in self.together if i not in call.served)
                        self.together = max(call.served, rest, key=len)

    def _may_be_replayed(self) -> bool:
        """Whether a checkpoint may run this call again, or does: it must find what the first run found."""
        return (
            torch.compiler.is_compiling()
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            or torch._C._current_graph_task_id() != -1
            or (not torch.is_grad_enabled() and any(layer.training for layer in self.layers))
        )


class _SharedCall:
    """The mark on a tensor: outputs of a `SharedInput`'s layers for it that were not asked for yet."""

    def __init__(self, owner: SharedInput, together: tuple[int, ...]) -> None:
        self.owner = owner
        self.together = together
        self.thread = _thread()
        self.served: tuple[int, ...] = ()
        self._ahead: dict[int, Tensor] = {}
        self._state: tuple[Any, ...] = ()

    def in_vain(self) -> bool:
        """Whether outputs were computed that nobody took."""
        return len(self._ahead) > 0

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """What `layer` gives for `x`, the marked tensor, or None if it must compute that itself."""
        # By identity: a replica of the layer may be called with a marked tensor too.
        position = next((i for i in self.together if self.owner.layers[i] is layer), None)
        if position is None or not layer.adapts or self.thread != _thread():
            return None
        if not self._ahead:
            adapted = [i for i in self.together if self.owner.layers[i].adapts]
            outputs = self.owner.compute([self.owner.layers[i] for i in adapted], x)
            if outputs is None:
                return None
            self._ahead, self._state, self.served = dict(zip(adapted, outputs, strict=True)), _state(x), ()
        if position not in self._ahead or self._state != _state(x):
            return None
        self.served = (*self.served, position)
        return self._ahead.pop(position)


def shared_output(layer: Any, x: Tensor) -> Tensor | None:
    """What `layer` gives for `x` where a `SharedInput` computes it, or None if the layer must do that itself."""
    for call in _calls_at(x):
        y = call.output(layer, x)
        if y is not None:
            return y
    return None


def _mark(x: Any, calls: tuple[_SharedCall, ...]) -> None:
    if calls or torch.compiler.is_compiling():
        x._shared_calls = calls
    else:
        x.__dict__.pop("_shared_calls", None)


def _calls_at(x: Any) -> tuple[_SharedCall, ...]:
    return getattr(x, "_shared_calls", ()) if isinstance(x, Tensor) else ()


def _thread() -> int:
    # What torch.compile traces is one thread's.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _state(x: Tensor) -> tuple[Any, ...]:
    """What must be as it was for a layer's output on `x` to be as it was, while the parent runs."""
    version = None if torch.compiler.is_compiling() else x._version
    return torch.is_grad_enabled(), autocast_dtype(x.device), version


#: The name that stands for no adapter, as in PEFT's ``adapter_names``.
BASE = "__base__"


class AdapterRouting:
    """Which adapter serves which rows of a batch: one object, shared by all `MultiLoRALinear` layers of a model.

    An assignment is a single name for everything, or one id a sample or segment. Ids live on the device and are never
    read on the host. Each assignment is a new tensor, so that what an earlier forward pass saved for its backward
    pass stays right; a captured CUDA graph reads tensors of its own, which the next assignment of as many ids fills.

    Attributes:
        names: the adapters in order of adding; an adapter's id is its place here.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._for_all: str | None = None
        self._assigned: dict[str, Tensor] = {}
        self._moved: dict[tuple[str, torch.device], Tensor] = {}
        self._captured: dict[tuple[str, torch.device, int], Tensor] = {}
        self._even: dict[tuple[int, int, torch.device], Tensor] = {}

    def add(self, name: str) -> None:
        """Give `name` the next id, unless it has one.

        Raises:
            AdapterError: the name cannot be a part of a parameter's name, or stands for the base layer.
        """
        check_name(name)
        if name not in self.names:
            self.names.append(name)

    def remove(self, name: str) -> None:
        """Forget `name` and the assignment; the ids of adapters added after it go down by one."""
        self.names.remove(self.known(name))
        self.assign(None)

    def known(self, name: str) -> str:
        """`name`, if it is an adapter.

        Raises:
            AdapterError: it is not.
        """
        if name not in self.names:
            raise AdapterError(f"there is no adapter {name!r}; the model has {', '.join(self.names) or 'none'}")
        return name

    # Not as inference tensors, since a later forward pass may save them for its backward pass.
    @torch.inference_mode(False)
    def assign(
        self,
        ids: str | Sequence[str] | Tensor | None,
        offsets: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Say which adapter serves which rows from now on; see `sensilora.mixed.set_adapter_ids`.

        `device` is where most layers are; ids are put there now, and elsewhere when a layer first needs them.
        """
        assigned: dict[str, Tensor] = {}
        for_all = None
        if isinstance(ids, str):
            for_all = ids if ids == BASE else self.known(ids)
        elif ids is not None:
            if not isinstance(ids, Tensor):
                numbers = [-1 if name == BASE else self.names.index(self.known(name)) for name in ids]
                ids = torch.tensor(numbers, dtype=torch.int64)
            assigned["ids"] = _int64_vector(ids, "adapter ids")
        if offsets is not None:
            offsets = _int64_vector(offsets, "offsets")
            if "ids" not in assigned or offsets.shape != (assigned["ids"].shape[0] + 1,):
                raise AdapterError("offsets go with adapter ids, one for each segment: one offset more than ids")
            assigned["offsets"] = offsets
        if device is not None:
            assigned = {key: _moved_to(tensor, device) for key, tensor in assigned.items()}
        self._for_all, self._assigned = for_all, assigned
        self._moved.clear()
        for (key, device, length), tensor in self._captured.items():
            if key in assigned and assigned[key].shape[0] == length:
                tensor.copy_(self._on(key, device))

    def assignment(self) -> tuple[str | Tensor | None, Tensor | None]:
        """What `assign` would be given to assign the same again."""
        return self._for_all or self._assigned.get("ids"), self._assigned.get("offsets")

    def for_all(self) -> str | None:
        """The one adapter (or `BASE`) of every row; None where rows may differ.

        Raises:
            AdapterError: nothing is assigned, and there is more than one adapter.
        """
        if self._for_all is not None or self._assigned:
            return self._for_all
        if len(self.names) > 1:
            raise AdapterError(
                f"the model has adapters {', '.join(self.names)}; call sensilora.mixed.set_adapter_ids(model, ...) "
                "to say which sample uses which"
            )
        return self.names[0] if self.names else BASE

    def segments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`offsets` and `adapters` of `sensilora.ops.lora_segments` for x (batch, ..., features), on x's device.

        Raises:
            ValueError: the batch has another length than the ids.
        """
        if x.dim() < 2:
            raise ValueError(f"adapter ids are for a batch (batch, ..., features), not {tuple(x.shape)}")
        ids = self._for_kernels("ids", x.device)
        if "offsets" in self._assigned:
            return self._for_kernels("offsets", x.device), ids
        batch = ids.shape[0]
        if x.shape[0] != batch:
            raise ValueError(f"there are {batch} adapter ids for a batch of {x.shape[0]}; give one for each sample")
        return self._even_offsets(batch, math.prod(x.shape[1:-1]), x.device), ids

    def _even_offsets(self, batch: int, rows: int, device: torch.device) -> Tensor:
        """Offsets of `batch` segments of as many rows. Kept, also for the captured graphs that read them."""
        if torch.compiler.is_compiling():
            return torch.arange(batch + 1, device=device) * rows
        offsets = self._even.get((batch, rows, device))
        if offsets is None:
            with torch.inference_mode(False):
                offsets = torch.arange(batch + 1, device=device) * rows
            # What is made inside a capture has no values outside of it.
            if not _capturing(device):
                self._even[batch, rows, device] = offsets
        return offsets

    def _for_kernels(self, key: str, device: torch.device) -> Tensor:
        if device.type != "cuda" or torch.compiler.is_compiling():
            return self._on(key, device)
        place = (key, device, self._assigned[key].shape[0])
        if _capturing(device):
            if place not in self._captured:
                raise AdapterError("run the model once with these adapter ids before capturing a CUDA graph of it")
            return self._captured[place]
        tensor = self._on(key, device)
        if place not in self._captured:
            self._captured[place] = tensor.clone()
        return tensor

    def _on(self, key: str, device: torch.device) -> Tensor:
        tensor = self._assigned[key]
        if tensor.device == device:
            return tensor
        if (key, device) not in self._moved:
            with torch.inference_mode(False):
                self._moved[key, device] = _moved_to(tensor, device)
        return self._moved[key, device]


def check_name(name: str) -> None:
    """Raise AdapterError unless `name` can be a part of a parameter's name and does not stand for the base layer."""
    if not isinstance(name, str) or name in ("", BASE) or "." in name or hasattr(nn.ParameterDict(), name):
        raise AdapterError(f"an adapter cannot be called {name!r}; choose a name without dots, such as 'task_a'")


def _moved_to(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory the host need not wait for the copy.
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _int64_vector(tensor: Tensor, name: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise AdapterError(f"{name} must be a 1-D tensor of integers, not {tensor!r}")
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise AdapterError(f"{name} must be a 1-D tensor of integers, not {tuple(tensor.shape)} of {tensor.dtype}")
    return tensor.to(torch.int64, copy=True)


@dataclass(frozen=True, eq=False)
class LoRAAdapter:
    """A view of one adapter of a `MultiLoRALinear`.

    Attributes:
        base_layer: the frozen layer that all adapters share.
        lora_A: Parameter (rank, in_features).
        lora_B: Parameter (out_features, rank).
        scaling, dropout: as given to `MultiLoRALinear.add_adapter`.
    """

    base_layer: nn.Module
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    dropout: float

    @property
    def rank(self) -> int:
        """Rows of lora_A."""
        return self.lora_A.shape[0]


class MultiLoRALinear(nn.Module):
    """A frozen linear layer with several named adapters, of which every row of a batch uses its own or none.

    Adapters may differ in rank, scaling and dropout; none is padded to another's rank. Which row uses which is said
    for all layers of a model at once, by their common `routing`: see `sensilora.mixed.set_adapter_ids`. A layer
    serves the base alone for an adapter that it does not have.

    Args:
        base_layer: ``nn.Linear``, or transformers' ``Conv1D``. Kept as ``base_layer``; stops requiring gradients.
        routing: shared with the model's other layers; None makes a new one.

    Attributes:
        lora_A, lora_B: ParameterDicts by adapter: (rank, in_features) and (out_features, rank).
        scaling, dropout, init: dicts by adapter, as given to `add_adapter`.
        routing, in_features, out_features: as given.

    Raises:
        AdapterError: `base_layer` is neither of the two.
    """

    def __init__(self, base_layer: nn.Module, routing: AdapterRouting | None = None) -> None:
        super().__init__()
        _check_base(base_layer)
        self.out_features, self.in_features = matrix_shape(base_layer)
        self.routing = AdapterRouting() if routing is None else routing
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.init: dict[str, str] = {}
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight as it is stored: (out, in) for ``nn.Linear``, (in, out) for ``Conv1D``."""
        return _weight_of(self.base_layer)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias (out_features,), or None."""
        return getattr(self.base_layer, "bias", None)

    @property
    def adapters(self) -> dict[str, LoRAAdapter]:
        """This layer's adapters by name, in order of adding."""
        return {
            name: LoRAAdapter(
                self.base_layer, self.lora_A[name], self.lora_B[name], self.scaling[name], self.dropout[name]
            )
            for name in self.routing.names
            if name in self.lora_A
        }

    def add_adapter(
        self,
        name: str,
        rank: int,
        *,
        scaling: float = 1.0,
        dropout: float = 0.0,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """Add an adapter that leaves the function as it is (B starts at zero).

        Args:
            name: without dots; becomes the last part of the parameters' names.
            rank, scaling, dropout, init, adapter_dtype: see `VarRankLoRALinear`.

        Raises:
            AdapterError: the name is taken, or cannot be one.
            RankError: the rank is out of range.
            ValueError: `init` is unknown, `dropout` outside [0, 1], or `adapter_dtype` not of floating point.
        """
        rank = check_settings(rank, self.base_layer, init, dropout, adapter_dtype)
        scaling = float(scaling)
        if name in self.lora_A:
            raise AdapterError(f"there is an adapter {name!r} already; delete it first, or choose another name")
        self.routing.add(name)
        dtype, device = adapter_dtype or _adapter_dtype(self.base_layer), self.weight.device
        self.lora_A[name] = nn.Parameter(torch.zeros(rank, self.in_features, dtype=dtype, device=device))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=device))
        _draw(self.lora_A[name], init)
        self.scaling[name], self.dropout[name], self.init[name] = scaling, float(dropout), init

    def delete_adapter(self, name: str) -> None:
        """Take an adapter out of this layer, which serves the base alone for its rows from then on.

        Raises:
            AdapterError: the layer has no adapter of that name.
        """
        self._check_has(name)
        for entries in (self.lora_A, self.lora_B, self.scaling, self.dropout, self.init):
            del entries[name]

    def _check_has(self, name: str) -> None:
        if name not in self.lora_A:
            raise AdapterError(f"this layer has no adapter {name!r}, only {', '.join(self.lora_A) or 'its base'}")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., in_features) to (batch, ..., out_features)."""
        name = self.routing.for_all()
        if name is not None:
            if name not in self.lora_A or self.lora_A[name].shape[0] == 0:
                return self.base_layer(x)
            p = self.dropout[name] if self.training else 0.0
            return _adapted(self, x, self.lora_A[name], self.lora_B[name], self.scaling[name], p)
        # Every adapter of the model has an entry, so that ids need no translation from layer to layer.
        names = self.routing.names
        ranks = [self.lora_A[name].shape[0] if name in self.lora_A else 0 for name in names]
        if not any(ranks):
            return self.base_layer(x)
        own = [name for name, rank in zip(names, ranks, strict=True) if rank > 0]
        if is_quantised(self.base_layer):
            raise AdapterError(
                "over a quantised layer a batch takes one adapter, by its name: "
                "sensilora.mixed.set_adapter_ids(model, 'name'); for one a sample load the model unquantised"
            )
        if _is_another_function(self.base_layer):
            raise AdapterError(
                f"over a base layer with a forward of its own ({type(self.base_layer).__name__}) a batch takes one "
                "adapter, by its name: sensilora.mixed.set_adapter_ids(model, 'name')"
            )
        offsets, ids = self.routing.segments(x)
        weight = self.weight.t() if is_conv1d(self.base_layer) else self.weight
        return lora_segments(
            x,
            weight,
            self.bias,
            torch.cat([self.lora_A[name] for name in own]),
            # Stacked as its transpose, which kernels read along contiguous rows.
            torch.cat([self.lora_B[name].t() for name in own]).t(),
            ranks,
            [self.scaling.get(name, 0.0) for name in names],
            offsets,
            ids,
            dropout_ps=[self.dropout.get(name, 0.0) if self.training else 0.0 for name in names],
        )

    def delta_weight(self, name: str) -> Tensor:
        """s B A of one adapter, (out_features, in_features), in fp32 (fp64 for fp64 adapters).

        Raises:
            AdapterError: the layer has no adapter of that name.
        """
        self._check_has(name)
        return _delta(self.lora_A[name], self.lora_B[name], self.scaling[name])

    @torch.no_grad()
    def merge(self, name: str) -> None:
        """Add s B A of one adapter to the base weight for good and delete the adapter.

        The base layer under all other adapters changes with it. The sum is formed in fp32 and rounded once.

        Raises:
            AdapterError: the layer has no adapter of that name, or its base is quantised.
        """
        _add_to(self.base_layer, self.delta_weight(name))
        self.delete_adapter(name)

    @torch.no_grad()
    def resize_rank(self, name: str, rank: int) -> None:
        """Change one adapter's rank as `VarRankLoRALinear.resize_rank` does; its parameters are new ones.

        Raises:
            AdapterError: the layer has no adapter of that name.
            RankError: the rank is out of range.
        """
        self._check_has(name)
        rank = _checked_rank(rank, self.base_layer)
        old_A, old_B = self.lora_A[name], self.lora_B[name]
        new_A, new_B = _resized(old_A, old_B, rank, self.init[name])
        self.lora_A[name] = nn.Parameter(new_A, requires_grad=old_A.requires_grad)
        self.lora_B[name] = nn.Parameter(new_B, requires_grad=old_B.requires_grad)

    def extra_repr(self) -> str:
        """Shown between the parentheses of ``print(model)``."""
        ranks = ", ".join(f"{name}={adapter.rank}" for name, adapter in self.adapters.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, ranks=({ranks})"
