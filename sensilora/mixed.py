"""Several named adapters in one model, and in one batch: each sample uses its own, in training as in inference.

Adapters may differ in their targets, ranks, scaling and dropout. Each is saved as an ordinary PEFT adapter folder.

    mixed.add_adapter(model, "support", plan_a)
    mixed.add_adapter(model, "legal", plan_b)
    with mixed.adapter_ids(model, ["legal", "support", "__base__"]):
        model(**batch_of_three).loss.backward()
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sensilora.adapters import (
    CONFIG_FILE,
    Model,
    adapter_layers,
    check_all_mergeable,
    check_fit,
    check_plan,
    matching_modules,
    read_adapter,
    replace_modules,
    write_adapter,
)
from sensilora.errors import AdapterError, PlanError
from sensilora.nn import AdapterRouting, MultiLoRALinear, check_name, check_settings
from sensilora.plan import RankPlan
from sensilora.sensitivity.head import untrained_heads


def add_adapter(
    model: Model,
    adapter: str,
    plan: RankPlan,
    *,
    dropout: float = 0.0,
    init: str = "kaiming",
    adapter_dtype: torch.dtype | None = None,
    strict: bool = True,
) -> Model:
    """Add a named adapter with the plan's ranks to every matrix that has one, in place.

    The first adapter freezes the model and replaces the planned matrices by `MultiLoRALinear`; later ones may have
    other targets and ranks. Where an adapter has no rank, its samples use the base layer. A new adapter requires
    gradients and leaves the model's function as it is.

    Args:
        model: a plain model, or one with named adapters.
        adapter: the new adapter's name, without dots.
        plan: ranks and scaling, made for the model without adapters.
        dropout, init, adapter_dtype: see `sensilora.nn.VarRankLoRALinear`.
        strict: check the model's fingerprint too, as `sensilora.inject` does.

    Returns:
        `model` itself.

    Raises:
        PlanError: the plan was made for another model, or gives every matrix rank 0.
        AdapterError: the name is taken or cannot be one, or the model was prepared by `sensilora.inject`.
        ValueError: `init` is unknown, or `dropout` outside [0, 1].
    """
    modules = _base_modules(model)
    check_plan(plan, model, modules, strict=strict)
    settings = {
        name: {
            "rank": rank,
            "scaling": plan.scaling_of(name),
            "dropout": dropout,
            "init": init,
            "adapter_dtype": adapter_dtype,
        }
        for name, rank in plan.ranks.items()
        if rank > 0
    }
    if not settings:
        raise PlanError("every rank of the plan is 0, so there is no adapter to add; raise a rank")
    _add(model, adapter, modules, settings)
    return model


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names they have without adapters."""
    if adapter_layers(model):
        raise AdapterError(
            "the model carries an adapter that sensilora.inject or load_adapter put there; call "
            "sensilora.unload(model) first and add it under a name"
        )
    return {
        name: module.base_layer if isinstance(module, MultiLoRALinear) else module
        for name, module in model.named_modules()
    }


def _add(
    model: nn.Module, adapter: str, modules: dict[str, nn.Module], settings: dict[str, dict[str, Any]]
) -> dict[str, MultiLoRALinear]:
    present = _layers(model)
    routing = next(iter(present.values())).routing if present else AdapterRouting()
    # All that can fail comes before the model is touched.
    check_name(adapter)
    if adapter in routing.names:
        raise AdapterError(f"there is an adapter {adapter!r} already; delete it first, or choose another name")
    for name, given in settings.items():
        check_settings(given["rank"], modules[name], given["init"], given["dropout"], given["adapter_dtype"])
    heads = [] if present else untrained_heads(model)
    if heads:
        warnings.warn(
            f"the head {' and '.join(map(repr, heads))} looks new and is frozen now; call requires_grad_(True) on it "
            "to train it for all adapters together",
            UserWarning,
            stacklevel=3,
        )
    if not present:
        model.requires_grad_(False)
    new = {name: MultiLoRALinear(modules[name], routing) for name in settings if name not in present}
    layers = {name: present.get(name) or new[name] for name in settings}
    for name, layer in layers.items():
        layer.add_adapter(adapter, **settings[name])
    replace_modules(model, {id(layer.base_layer): layer for layer in new.values()})
    return layers


def _layers(model: nn.Module) -> dict[str, MultiLoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MultiLoRALinear)}


def _first_layer(model: nn.Module) -> MultiLoRALinear:
    for module in model.modules():
        if isinstance(module, MultiLoRALinear):
            return module
    raise AdapterError(f"{type(model).__name__} carries no named adapter; call sensilora.mixed.add_adapter first")


def _routing(model: nn.Module) -> AdapterRouting:
    return _first_layer(model).routing


def _layers_of(model: nn.Module, adapter: str) -> dict[str, MultiLoRALinear]:
    _routing(model).known(adapter)
    return {name: layer for name, layer in _layers(model).items() if adapter in layer.lora_A}


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The model's adapters in order of adding; an adapter's id is its place here.

    Raises:
        AdapterError: the model carries no named adapter.
    """
    return tuple(_routing(model).names)


def set_adapter_ids(
    model: nn.Module, ids: str | Sequence[str] | Tensor | None, *, offsets: Tensor | None = None
) -> None:
    """Say which adapter each sample of the batches to come uses, until it is said again.

    Nothing is read on the host: ids are copied once, and offsets are made on the device. A CUDA graph that was
    captured with ids can be replayed with others: set as many ids and call replay. A name for all samples is no part
    of that, since it is known on the host: it decides which kernels run.

    With a name for all, the other adapters take no part in the backward pass; with ids, adapters that no sample uses
    get gradients of zero. While nothing is set, an adapter that is alone serves every sample. Where a part of the
    forward pass is run again in the backward pass (gradient checkpointing), the same ids must be set then.

    Args:
        model: carries named adapters; a lone `MultiLoRALinear` will do.
        ids: one of
            a name: every sample uses this adapter, in batches of any length;
            a sequence of names, one for each sample: the first dimension of what the layers get is the batch;
            an int64 tensor (batch,) of places in `adapter_names`, copied;
            None: nothing is set.
            The base layer alone is ``"__base__"`` or -1. A number that is no adapter's stands for it too: numbers on
            a device cannot be checked without waiting for it.
        offsets: int64 (segments + 1,), ascending, for packed batches, with `ids` for the segments: id i is for rows
            offsets[i] to offsets[i + 1], the layers' input counted row by row through all leading dimensions. Rows
            outside use the base alone.

    Raises:
        AdapterError: a name is unknown, or `ids` and `offsets` are not as above. A batch of another length than the
            ids raises ValueError in the forward pass.
    """
    layer = _first_layer(model)
    layer.routing.assign(ids, offsets, layer.weight.device)


@contextlib.contextmanager
def adapter_ids(
    model: nn.Module, ids: str | Sequence[str] | Tensor | None, *, offsets: Tensor | None = None
) -> Iterator[None]:
    """`set_adapter_ids` inside the ``with`` block; what was set before holds again after it, unless an adapter was
    deleted in it: then nothing is set.

    The backward pass may come after the block, except under gradient checkpointing, which runs parts of the forward
    pass again and must find the same ids.
    """
    layer = _first_layer(model)
    before, names = layer.routing.assignment(), tuple(layer.routing.names)
    layer.routing.assign(ids, offsets, layer.weight.device)
    try:
        yield
    finally:
        # Where an adapter was deleted meanwhile, the places of others are not what they were.
        kept = tuple(layer.routing.names)[: len(names)] == names
        layer.routing.assign(*(before if kept else (None, None)), layer.weight.device)


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """One adapter's parameters by their names in the model, such as for an optimiser of its own.

    In a batch with ids, an adapter that no sample uses gets gradients of zero, not none; give adapters optimisers of
    their own where a step without samples should not decay their weights.

    Raises:
        AdapterError: the model has no such adapter.
    """
    return {
        f"{name}.{part}.{adapter}": getattr(layer, part)[adapter]
        for name, layer in _layers_of(model, adapter).items()
        for part in ("lora_A", "lora_B")
    }


def set_requires_grad(model: nn.Module, adapter: str, requires_grad: bool = True) -> None:
    """Train an adapter (as it is when added), or freeze it.

    Raises:
        AdapterError: the model has no such adapter.
    """
    for parameter in adapter_parameters(model, adapter).values():
        parameter.requires_grad_(requires_grad)


def delete_adapter(model: Model, adapter: str) -> Model:
    """Take an adapter out of the model. Ids of adapters added after it go down by one, and no ids are set.

    `sensilora.unload` takes out all of them. Returns `model`.

    Raises:
        AdapterError: the model has no such adapter.
    """
    for layer in _layers_of(model, adapter).values():
        layer.delete_adapter(adapter)
    _routing(model).remove(adapter)
    return model


def merge(model: Model, adapter: str) -> Model:
    """Add an adapter's update to the base weights for good, under all other adapters too, and delete it.

    Returns `model`.

    Raises:
        AdapterError: the model has no such adapter, a weight to be merged is quantised, or it is shared with another
            module, whose function would change too.
    """
    layers = _layers_of(model, adapter)
    check_all_mergeable(model, layers)
    for layer in layers.values():
        layer.merge(adapter)
    _routing(model).remove(adapter)
    return model


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter: str,
    modules_to_save: Iterable[str] = (),
    force: bool = False,
) -> Path:
    """Write one adapter as a PEFT adapter folder, as if it were alone in the model.

    Args:
        model: carries the adapter.
        folder: created whole or not at all.
        adapter: the adapter's name; the file does not hold it.
        modules_to_save: names of modules to write with it, such as a head trained for all adapters together. Such a
            folder is for `sensilora.load_adapter` and PEFT; the one here takes adapters alone.
        force: replace a folder that exists.

    Returns:
        The folder's path.

    Raises:
        AdapterError: the model has no such adapter, its ranks are all 0, or `modules_to_save` names nothing.
        OutputExistsError: the folder exists and `force` is false.
    """
    found = {name: layer.adapters[adapter] for name, layer in _layers_of(model, adapter).items()}
    # PEFT knows no rank 0.
    layers = {name: layer for name, layer in found.items() if layer.rank > 0}
    if not layers:
        raise AdapterError(f"adapter {adapter!r} has rank 0 everywhere, so there is nothing to save")
    saved = matching_modules(dict(model.named_modules()), modules_to_save)
    return write_adapter(model, layers, tuple(saved), folder, force=force)


def load_adapter(
    model: Model, folder: str | os.PathLike[str], *, adapter: str, dropout: float | None = None
) -> Model:
    """Add a saved LoRA adapter (this package's or PEFT's own) under a name, in place.

    Everything is read and checked before the model is touched.

    Args:
        model: a plain model, or one with named adapters.
        folder: holds adapter_config.json and adapter_model.safetensors.
        adapter: the name it gets, without dots.
        dropout: dropout when trained further; None takes the file's ``lora_dropout``.

    Returns:
        `model`, the new adapter requiring gradients.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        AdapterError: a file is damaged, of another kind than LoRA, does not fit the model or holds modules_to_save;
            the name is taken or cannot be one; or the model was prepared by `sensilora.inject`.
    """
    folder = Path(folder)
    config, pairs, plain = read_adapter(folder)
    if plain:
        raise AdapterError(
            f"{folder} holds {next(iter(plain))}, named in modules_to_save of {CONFIG_FILE}; a model with several "
            "adapters has one copy of it for all, so load that adapter alone by sensilora.load_adapter"
        )
    modules = _base_modules(model)
    for name, pair in pairs.items():
        check_fit(folder, name, modules.get(name), pair, config.rank_of(name))
    if not pairs:
        raise AdapterError(f"{folder} holds no lora_A and lora_B; it is empty")
    settings = {
        name: {
            "rank": lora_A.shape[0],
            "scaling": config.scaling_of(name),
            "dropout": config.lora_dropout if dropout is None else dropout,
            "init": "kaiming",
            "adapter_dtype": lora_A.dtype,
        }
        for name, (lora_A, _) in pairs.items()
    }
    layers = _add(model, adapter, modules, settings)
    with torch.no_grad():
        for name, (lora_A, lora_B) in pairs.items():
            layers[name].lora_A[adapter].copy_(lora_A)
            layers[name].lora_B[adapter].copy_(lora_B)
    return model
