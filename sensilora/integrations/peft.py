"""PEFT: a rank plan as a ``peft.LoraConfig``, and PEFT's own LoRA layers on the fused kernels."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

try:
    from peft import LoraConfig, PeftType
    from peft.tuners.lora import Linear, LoraLayer
    from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, dispatch_default
    from peft.tuners.tuners_utils import BaseTunerLayer
except ModuleNotFoundError as error:
    raise ImportError("this module needs peft; install it with: pip install 'sensilora[peft]'") from error

from transformers.pytorch_utils import Conv1D

from sensilora.adapters import share_inputs, shared_inputs
from sensilora.errors import AdapterError, PlanError
from sensilora.nn import SharedInput, check_base_gradient, shared_output
from sensilora.ops import lora_group, lora_linear, lora_segments, lora_update
from sensilora.ops._backend import FLOATS
from sensilora.ops._lora import autocast_dtype
from sensilora.plan import RankPlan
from sensilora.targets import has_own_forward, is_quantised, is_wrapped

Model = TypeVar("Model", bound=nn.Module)

_KEYWORDS = frozenset({"adapter_names", *VARIANT_KWARG_KEYS})
# PEFT's layers over bases of bitsandbytes and torchao, by name, as their modules import those.
_QUANTISED = frozenset({"Linear4bit", "Linear8bitLt", "TorchaoLoraLinear"})
_FROM_THE_PLAN = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
)


def lora_config_from_plan(plan: RankPlan, **overrides: Any) -> LoraConfig:
    """A config with which ``peft.get_peft_model`` gives every matrix the plan's rank and scale.

    Every module is named in full, with its own rank and alpha: PEFT matches pattern keys as regular expressions
    against the end of a name and takes the first, so that shorter keys would collide. Matrices of rank 0 are left
    out, as PEFT knows no rank 0. ``r`` is the largest rank.

    Args:
        plan: The plan.
        overrides: Any other field of ``LoraConfig``, such as ``task_type="SEQ_CLS"``, ``lora_dropout`` or
            ``modules_to_save``.

    Raises:
        PlanError: every rank is 0, or an override is a field that the plan decides.
    """
    decided = [field for field in _FROM_THE_PLAN if overrides.pop(field, None) is not None]
    if decided:
        raise PlanError(f"{decided[0]} follows from the plan; change the plan instead of overriding it")
    ranks = {name: rank for name, rank in plan.ranks.items() if rank > 0}
    if not ranks:
        raise PlanError("every rank of the plan is 0, so there is no LoRA to configure; raise a rank")
    rule, largest = plan.scaling, max(ranks.values())

    def alpha(rank: int) -> int | float:
        value = rule.value * rank if rule.rule == "constant" else rule.value
        # Loaders such as axolotl's take whole numbers only, and 1.1 * 10 is 11.000000000000002.
        return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value

    # PEFT matches target names against the end of a module's name, so a dropped module may need to be named.
    dropped = [name for name in plan.ranks if name not in ranks and any(name.endswith(f".{kept}") for kept in ranks)]
    if dropped:
        excluded = overrides.get("exclude_modules") or []
        if isinstance(excluded, str):
            # As PEFT reads it: a regular expression that matches a whole name. Flags may stand at its beginning.
            excluded = "|".join([excluded, *map(re.escape, dropped)])
        else:
            excluded = [*excluded, *dropped]
        overrides = {**overrides, "exclude_modules": excluded}
    return LoraConfig(
        r=largest,
        lora_alpha=cast(int, alpha(largest)),  # annotated as int, but any number is taken
        rank_pattern={_pattern(name): rank for name, rank in ranks.items()},
        alpha_pattern={_pattern(name): alpha(rank) for name, rank in ranks.items()},
        target_modules=list(ranks),
        use_rslora=rule.rule == "rslora",
        **overrides,
    )


def _pattern(name: str) -> str:
    return "^" + re.escape(name)


def use_fused(config: LoraConfig) -> LoraConfig:
    """Make the layers of a config's adapters `FusedLinear`: ``get_peft_model(model, use_fused(config))``.

    By PEFT's own mapping of custom layers, which ``get_peft_model``, ``add_adapter`` and ``PeftModel`` heed. Base
    layers that are no plain ``nn.Linear`` or ``Conv1D`` (embeddings, convolutions, and quantised ones, which `fuse`
    serves) get what they get without it. Files do not tell the difference. ``dataclasses.replace`` loses the mapping.

    Args:
        config: changed in place; applying this twice does nothing.

    Returns:
        `config`.

    Raises:
        AdapterError: `config` is of another kind, or maps these base layers to layers of its own.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise AdapterError(f"use_fused takes a peft.LoraConfig, not {type(config).__name__}")
    for base in (nn.Linear, Conv1D):
        other = (config._custom_modules or {}).get(base)
        if other is not None and getattr(other, "func", None) is not _fused_layer:
            raise AdapterError(f"the config maps {base.__name__} to {other!r} already; take that out to fuse")
    layer: Any = functools.partial(_fused_layer, config)  # annotated as a class, but only called
    config._register_custom_module(dict.fromkeys((nn.Linear, Conv1D), layer))
    return config


def _fused_layer(registered: LoraConfig, target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
    """What PEFT would make, fused; None where PEFT is to go on through its kinds of base layers."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if _why_not_base(base) is not None:
        return None
    # Before 0.19 the config is not passed.
    layer = dispatch_default(target, adapter_name, kwargs.pop("config", registered), **kwargs)
    # Its base may be another method's layer over the plain one.
    if _why_not_layer(layer) is None:
        layer.__class__ = FusedLinear
    return layer


def fuse(model: Model, *, groups: bool = False) -> Model:
    """Make the LoRA layers of a model that PEFT prepared `FusedLinear`, or over quantised bases `FusedQuantised`.

    Parameters, their names and an optimiser's state stay as they are: only the layers' class changes. Layers over
    bases that the kernels cannot serve stay PEFT's, and one warning says which.

    Args:
        model: a ``PeftModel``, or any model with PEFT's LoRA layers. May be fused already, with or without groups.
        groups: compute `FusedLinear` layers that read one input together (query, key, value; gate, up; told by their
            usual names), whatever their ranks, by `sensilora.ops.lora_group`, as `sensilora.inject` does. It takes
            two hooks on the module that holds them.

    Returns:
        `model`.

    Raises:
        AdapterError: the model holds no LoRA layer that can be fused.
    """
    _check_model(model, "fuse")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    left: Counter[str] = Counter()
    for layer in layers:
        reason = _why_not_layer(layer)
        if reason is not None:
            left[reason] += 1
        else:
            layer.__class__ = _fused_class(layer.__class__)
    reasons = "; ".join(f"{count}: {reason}" for reason, count in left.items())
    if len(layers) == sum(left.values()):
        raise AdapterError(
            f"{type(model).__name__} holds no LoRA layer of PEFT that can be fused"
            + (f" ({reasons})" if reasons else "; call peft.get_peft_model first")
        )
    if left:
        warnings.warn(
            f"fuse left {sum(left.values())} of {len(layers)} LoRA layers to PEFT ({reasons})", stacklevel=2
        )
    _remove_groups(model)
    if groups:
        share_inputs(model, FusedLinear, _SharedInput)
    return model


def _check_model(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise AdapterError(f"{function} takes a model with PEFT's LoRA layers, not {type(model).__name__}")


def unfuse(model: Model) -> Model:
    """Make all fused layers PEFT's own again, in place. Returns `model`.

    Raises:
        AdapterError: `model` is no module.
    """
    _check_model(model, "unfuse")
    _remove_groups(model)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, _Fused)]
    for layer in layers:
        # The class behind this module's own.
        layer.__class__ = type(layer).__bases__[1]
    return model


def _remove_groups(model: nn.Module) -> None:
    for owner in shared_inputs(model):
        if isinstance(owner, _SharedInput):
            owner.remove()


class _SharedInput(SharedInput):
    """`FusedLinear` layers of one module that read one input."""

    def _open(self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # PEFT's unload puts the base layers into the parent, and knows of no hooks there.
        if not all(any(layer is child for child in parent._modules.values()) for layer in self.layers):
            self.remove()
            return None
        return super()._open(parent, args, kwargs)

    def compute(self, layers: Sequence[FusedLinear], x: Tensor) -> tuple[Tensor, ...] | None:
        if len(layers) < 2 or any(is_wrapped(layer) or not layer._is_usual(x, (), {}) for layer in layers):
            return None
        operands = zip(*(layer._operands(layer._adapters()) for layer in layers), strict=True)
        weights, biases, lora_As, lora_Bs, scalings, ps = operands
        return lora_group(x, weights, biases, lora_As, lora_Bs, scalings, dropout_ps=ps)


@functools.cache
def _fused_class(layer_class: Any) -> Any:
    """The fused class of one of PEFT's layers, itself if it is fused."""
    if issubclass(layer_class, _Fused):
        return layer_class
    if layer_class is Linear:
        return FusedLinear
    # "Linear" must be in the name, or PEFT would take the layer's parts for targets of another adapter.
    return type(f"Fused{layer_class.__name__}", (FusedQuantised, layer_class), {"__module__": __name__})


class _Fused:
    """What the fused layers have in common beside one of PEFT's layers."""

    def _why_not(self: Any, adapters: Sequence[str]) -> str | None:
        """Why the ops cannot compute these adapters, as a clause; None if they can."""
        for name in adapters:
            if name in self.lora_variant:
                return f"adapter {name!r} is {type(self.lora_variant[name]).__name__}, a variant of LoRA"
            for factor in (self.lora_A[name], self.lora_B[name]):
                if type(factor) is not nn.Linear or is_wrapped(factor) or not _is_dense(factor.weight):
                    return "lora_A or lora_B is replaced, wrapped or sharded, or has hooks"
            dropout = self.lora_dropout[name]
            if type(dropout) not in (nn.Dropout, nn.Identity) or is_wrapped(dropout):
                return f"the dropout is {type(dropout).__name__} and no plain nn.Dropout"
        return None

    def _dropout_p(self: Any, name: str) -> float:
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _scaled(self: Any, adapters: Sequence[str]) -> tuple[list[Tensor], list[float]]:
        """Every lora_B and its scale. A scale on the device, as hotswapping makes them, is in lora_B already."""
        lora_Bs: list[Any] = [self.lora_B[name].weight for name in adapters]
        scalings = [self.scaling[name] for name in adapters]
        for i, scaling in enumerate(scalings):
            if isinstance(scaling, Tensor):
                lora_Bs[i], scalings[i] = lora_Bs[i] * scaling.to(lora_Bs[i].device), 1.0
        return lora_Bs, scalings


def _blank(layer_class: Any) -> Any:
    """An instance of the fused class of one of PEFT's layers without any state."""
    fused = _fused_class(layer_class)
    return fused.__new__(fused)


class FusedQuantised(_Fused):
    """The forward pass of PEFT's LoRA layers over bases that bitsandbytes or torchao quantised.

    The base product is the base's own, and each active adapter's update one call of `sensilora.ops.lora_update`, with
    dropout or without. Batches with ``adapter_names``, and what `FusedLinear` leaves to PEFT, are computed by PEFT's
    own forward, with one warning for each reason. Dtypes are as for `FusedLinear`.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The class is made when it is needed, so it cannot be found by its name.
        return _blank, (type(self).__bases__[1],), self.__dict__

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) to (..., out_features); arguments as of PEFT's layer."""
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        names = kwargs.get("adapter_names")
        if self.disable_adapters or self.merged or (not adapters and names is None):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        reason = self._why_not(adapters)
        if names is not None:
            reason = "adapter_names are given over a quantised base"
        elif not self.cast_input_dtype_enabled and any(
            self.lora_A[name].weight.dtype != x.dtype for name in adapters
        ):
            reason = "casting the input's dtype is disabled"
        if reason is not None and not torch.compiler.is_compiling():
            _warn_of(reason)
        if reason is not None or args or kwargs.keys() - _KEYWORDS:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        check_base_gradient(self.base_layer, x)
        y = self.base_layer(x)
        for name, lora_B, scaling in zip(adapters, *self._scaled(adapters), strict=True):
            y = lora_update(y, x, self.lora_A[name].weight, lora_B, scaling, dropout_p=self._dropout_p(name))
            if self.lora_B[name].bias is not None:
                y = y + (self.lora_B[name].bias * self.scaling[name]).to(y.dtype)
        return y


class FusedLinear(_Fused, Linear):
    """PEFT's LoRA layer over a plain ``nn.Linear`` or ``Conv1D``, its forward pass by `sensilora.ops`.

    Everything but ``forward`` is PEFT's: parameters, state dict, merging, switching and deleting adapters. One active
    adapter is computed by `sensilora.ops.lora_linear` (in groups by `sensilora.ops.lora_group`), several without
    dropout by one call with their factors side by side, batches with ``adapter_names`` by
    `sensilora.ops.lora_segments`. What these cannot compute PEFT's own forward does, and each reason is warned of
    once.

    lora_A and lora_B are taken in the base's dtype (under autocast, in autocast's) with sums in fp32, whereas PEFT
    casts the input to theirs. The layer is differentiable once; `unfuse` it for second derivatives.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) to (..., out_features); arguments as of ``peft.tuners.lora.Linear.forward``."""
        if not args and not kwargs:
            y = shared_output(self, x)
            if y is not None:
                return y
        names = kwargs.get("adapter_names")
        adapters = self._adapters()
        if names is not None:
            adapters = [name for name in dict.fromkeys(names) if name in self.lora_A]
        if self.disable_adapters or self.merged or not adapters:
            return super().forward(x, *args, **kwargs)
        reason = self._reason(adapters, mixed=names is not None)
        if reason is not None and not torch.compiler.is_compiling():
            _warn_of(reason)
        if reason is not None or not self._is_usual(x, args, kwargs):
            return super().forward(x, *args, **kwargs)
        if names is None:
            weight, bias, lora_A, lora_B, scaling, p = self._operands(adapters)
            return lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p=p)
        self._check_forward_args(x, adapter_names=names)
        return self._mixed(x, adapters, names)

    @property
    def adapts(self) -> bool:
        """Whether forward, without ``adapter_names``, adds an update to the base layer's output by the ops."""
        adapters = self._adapters()
        if self.disable_adapters or self.merged or not adapters:
            return False
        return self._reason(adapters, mixed=False) is None

    def _adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _reason(self, adapters: Sequence[str], *, mixed: bool) -> str | None:
        """Why the ops cannot compute these adapters here, as a clause; None if they can."""
        reason = _why_not_base(self.base_layer) or self._why_not(adapters)
        return reason or self._why_not_together(adapters, mixed=mixed)

    def _is_usual(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether PEFT would take this call, over a plain base; else its own errors are the clearest."""
        weight: Any = self.base_layer.weight
        return (
            not args
            and kwargs.keys() <= _KEYWORDS
            and x.device == weight.device
            and (x.dtype == weight.dtype or autocast_dtype(x.device) is not None)
        )

    def _why_not_together(self, adapters: Sequence[str], *, mixed: bool) -> str | None:
        """Why the ops cannot compute these adapters in one call, as a clause; None if they can."""
        for name in adapters:
            lora_A, lora_B = self.lora_A[name], self.lora_B[name]
            if mixed and lora_B.bias is not None:
                return "adapter_names select an adapter with lora_bias"
            if len(adapters) > 1 and not mixed and self._dropout_p(name) > 0.0:
                return "several active adapters have dropout, each with a mask of its own"
            if not self.cast_input_dtype_enabled and lora_A.weight.dtype != self.get_base_layer().weight.dtype:
                return "casting the input's dtype is disabled"
        return None

    def _base(self) -> tuple[Tensor, Tensor | None]:
        """The base layer's weight (out_features, in_features) and bias."""
        base: Any = self.base_layer
        return base.weight.t() if isinstance(base, Conv1D) else base.weight, base.bias

    def _operands(self, adapters: Sequence[str]) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float, float]:
        """Weight, bias, lora_A, lora_B, scale and dropout of the active adapters as one."""
        weight, bias = self._base()
        for name in adapters:
            if self.lora_B[name].bias is not None:
                added = self.lora_B[name].bias * self.scaling[name]
                bias = (added if bias is None else bias + added).to(weight.dtype)
        lora_As: list[Any] = [self.lora_A[name].weight for name in adapters]
        lora_Bs, scalings = self._scaled(adapters)
        if len(adapters) == 1:
            return weight, bias, lora_As[0], lora_Bs[0], scalings[0], self._dropout_p(adapters[0])
        lora_B = torch.cat([lora_B * scaling for lora_B, scaling in zip(lora_Bs, scalings, strict=True)], dim=1)
        return weight, bias, torch.cat(lora_As), lora_B, 1.0, 0.0

    def _mixed(self, x: Tensor, adapters: Sequence[str], names: Sequence[str]) -> Tensor:
        lora_As: list[Any] = [self.lora_A[name].weight for name in adapters]
        lora_Bs, scalings = self._scaled(adapters)
        # torch.compile traces what makes the segments and warns of a cache around it.
        segments = _segments.__wrapped__ if torch.compiler.is_compiling() else _segments
        return lora_segments(
            x,
            *self._base(),
            torch.cat(lora_As),
            # Stacked as its transpose, which kernels read along contiguous rows.
            torch.cat([lora_B.t() for lora_B in lora_Bs]).t(),
            [lora_B.shape[1] for lora_B in lora_Bs],
            scalings,
            *segments(tuple(names), tuple(adapters), math.prod(x.shape[1:-1]), x.device),
            dropout_ps=[self._dropout_p(name) for name in adapters],
        )


@functools.lru_cache(maxsize=16)
def _segments(
    names: tuple[str, ...], adapters: tuple[str, ...], rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`offsets` and `adapters` of `lora_segments`: one segment of as many rows for each name."""
    # Not as inference tensors, since a later forward pass may save them for its backward pass.
    with torch.inference_mode(False):
        ids = [adapters.index(name) if name in adapters else -1 for name in names]
        offsets = range(0, (len(names) + 1) * rows, rows) if rows else [0] * (len(names) + 1)
        return torch.tensor(list(offsets), device=device), torch.tensor(ids, device=device)


def _why_not_layer(layer: Any) -> str | None:
    quantised = type(layer).__name__ in _QUANTISED and type(layer).__module__.startswith("peft.tuners.lora.")
    if type(layer) is not Linear and not quantised and not isinstance(layer, _Fused):
        return f"{type(layer).__name__} is not PEFT's LoRA layer over nn.Linear or Conv1D"
    if has_own_forward(layer):
        return "the layer has a forward of its own"
    if quantised or isinstance(layer, FusedQuantised):
        return None if is_quantised(layer.base_layer) else "its base is no quantised layer itself"
    return _why_not_base(layer.base_layer)


def _why_not_base(base: Any) -> str | None:
    """Why the ops cannot stand for calling this base layer, as a clause; None if they can."""
    if type(base) not in (nn.Linear, Conv1D):
        # With its module, since PEFT has layers of the name Linear too.
        return f"the base layer is {type(base).__module__}.{type(base).__name__}, not a plain nn.Linear or Conv1D"
    if not _is_dense(base.weight):
        return f"the base layer's weight is {type(base.weight).__name__} of {base.weight.dtype}"
    if is_wrapped(base):
        return "the base layer has hooks or a forward of its own"
    return None


def _is_dense(weight: Any) -> bool:
    """A view of a sharded flat parameter is; a tensor of a class of its own, quantised or distributed, is not."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in FLOATS


@functools.lru_cache
def _warn_of(reason: str) -> None:
    warnings.warn(f"a fused LoRA layer is computed by PEFT's own forward: {reason}", stacklevel=4)
