"""Putting adapters into a model, taking them out, and reading and writing them as PEFT's files.

The file format is PEFT's, so that the folder opens in PEFT and vLLM: ``adapter_config.json`` and
``adapter_model.safetensors``. Different ranks go into ``rank_pattern`` and ``alpha_pattern`` under keys that are
anchored, escaped full names, because PEFT treats a key as a regular expression and takes the first that matches.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sensilora import _files
from sensilora.allocation import TIE_PRESETS
from sensilora.errors import AdapterError, PlanError
from sensilora.nn import LoRAAdapter, MultiLoRALinear, SharedInput, VarRankLoRALinear, check_mergeable
from sensilora.plan import RankPlan
from sensilora.sensitivity.batches import is_encoder_decoder
from sensilora.sensitivity.head import untrained_heads
from sensilora.targets import fingerprint, is_conv1d, is_matrix, is_quantised, matrix_shape, model_id

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}

_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

Model = TypeVar("Model", bound=nn.Module)
Layers = Mapping[str, VarRankLoRALinear | LoRAAdapter]


def adapter_layers(model: nn.Module) -> dict[str, VarRankLoRALinear]:
    """The model's adapter layers by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, VarRankLoRALinear)}


def inject(
    model: Model,
    plan: RankPlan,
    *,
    dropout: float = 0.0,
    init: str = "kaiming",
    adapter_dtype: torch.dtype | None = None,
    modules_to_save: Iterable[str] = (),
    strict: bool = True,
    groups: bool = True,
    shared_dropout_mask: bool = False,
) -> Model:
    """Replace every matrix the plan gives a rank by a `VarRankLoRALinear` of that rank, in place.

    All other parameters are frozen, except those of `modules_to_save`. Matrices of rank 0 stay plain.

    Args:
        model: the model the plan was made for.
        plan: ranks and scaling, from `allocate` or `RankPlan.load`.
        dropout, init, adapter_dtype: see `VarRankLoRALinear`.
        modules_to_save: names (full, or a suffix that begins at a dot) of modules that are trained in full and saved
            with the adapter, such as ``["classifier"]``.
        strict: check the model's fingerprint too. False accepts a model whose other weights differ, such as one with
            a resized vocabulary; names and shapes of the planned matrices are checked in any case.
        groups: compute projections that read one input together (query, key, value; gate, up; told by their usual
            names), whatever their ranks, by `sensilora.ops.lora_group`. Modules, parameters and files are the same
            either way; layers that turn out to read different inputs go on alone, and so do all under
            ``torch.inference_mode``.
        shared_dropout_mask: with `groups`, one dropout mask for the projections that are computed together, instead
            of one for each (PEFT's way).

    Returns:
        `model` itself.

    Raises:
        PlanError: the plan was made for another model.
        AdapterError: the model carries adapters already, or `modules_to_save` names nothing.
    """
    modules = _plain_modules(model)
    check_plan(plan, model, modules, strict=strict)
    saved = matching_modules(modules, modules_to_save)
    for name in plan.ranks:
        if any(name == module or name.startswith(module + ".") for module in saved):
            raise AdapterError(
                f"the plan adapts {name}, which modules_to_save trains in full; leave it out of one of the two"
            )
    heads = untrained_heads(model)
    if not set(heads) <= set(saved):
        left = " and ".join(repr(head) for head in heads if head not in saved)
        warnings.warn(
            f"the head {left} looks new and is frozen now; pass modules_to_save={heads} to train it",
            UserWarning,
            stacklevel=2,
        )
    layers = {
        name: VarRankLoRALinear(
            modules[name],
            rank,
            scaling=plan.scaling_of(name),
            dropout=dropout,
            init=init,
            adapter_dtype=adapter_dtype,
        )
        for name, rank in plan.ranks.items()
        if rank > 0
    }
    return _install(model, layers, saved, groups, shared_dropout_mask)


def check_plan(plan: RankPlan, model: nn.Module, modules: dict[str, nn.Module], *, strict: bool) -> None:
    """Raise PlanError unless `plan` was made for `model`, whose modules, without adapters, are `modules`."""
    if not isinstance(plan, RankPlan):
        raise PlanError(f"the plan is a {type(plan).__name__}; pass a RankPlan, such as RankPlan.load(path) gives")
    for name, entry in plan.matrices.items():
        module = modules.get(name)
        if module is None or not is_matrix(module):
            raise PlanError(
                f"the plan is for {plan.model_id}: this model has no linear layer {name!r}; make a plan for it"
            )
        if matrix_shape(module) != tuple(entry.shape):
            raise PlanError(
                f"the plan is for {plan.model_id}: {name} is {tuple(entry.shape)} there, {matrix_shape(module)} "
                "here; make a plan for this one"
            )
    if strict and plan.fingerprint and plan.fingerprint != fingerprint(model):
        raise PlanError(
            f"the plan was made for another model ({plan.model_id}): fingerprints differ; calibrate this model, or "
            "pass strict=False if only its vocabulary was resized"
        )


def _plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    if _adapted(model):
        raise AdapterError(
            "the model carries adapters already; call unload(model) first, after merge(model) to keep them"
        )
    return dict(model.named_modules())


def matching_modules(modules: dict[str, nn.Module], suffixes: Iterable[str]) -> list[str]:
    """Full names of the modules that `modules_to_save` means; AdapterError where one means none."""
    names = []
    for suffix in suffixes:
        found = [name for name in modules if _is_suffix(suffix, name)]
        if not found:
            raise AdapterError(f"modules_to_save names {suffix!r}, which the model does not have")
        names += found
    return names


def _is_suffix(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _install(
    model: Model,
    layers: dict[str, VarRankLoRALinear],
    saved: list[str],
    groups: bool,
    shared_dropout_mask: bool,
) -> Model:
    model.requires_grad_(False)
    replace_modules(model, {id(layer.base_layer): layer for layer in layers.values()})
    for layer in layers.values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)
    if groups:
        share_inputs(model, VarRankLoRALinear, partial(SharedInput, shared_dropout_mask=shared_dropout_mask))
    # Remembered on the model because requires_grad may be changed before it is saved.
    model.__dict__["_sensilora_modules_to_save"] = tuple(saved)
    return model


def share_inputs(model: nn.Module, layer_class: type[nn.Module], owner_class: Callable[..., SharedInput]) -> None:
    """Let the layers of this class that read one input in models of the usual families compute together."""
    for parent in list(model.modules()):
        for kind, families in TIE_PRESETS.items():
            for names in families:
                children = [parent._modules.get(name) for name in names]
                layers: list[Any] = [child for child in children if isinstance(child, layer_class)]
                layers = [layer for layer in layers if not is_quantised(layer.base_layer)]
                # An encoder of another width may feed key and value.
                width = layers[-1].in_features if layers else 0
                layers = [layer for layer in layers if layer.in_features == width]
                if len(layers) > 1:
                    owner_class(parent, layers, has_query=kind == "qkv" and layers[0] is children[0])


def shared_inputs(model: nn.Module) -> list[SharedInput]:
    """The groups of adapter layers that compute together."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, SharedInput)]


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Swap modules by identity in every parent, since a module may be registered under several names."""
    new = {id(module) for module in replacements.values()}
    for parent in list(model.modules()):
        if id(parent) in new:
            continue
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
    for module in model.modules():
        # Or torch's encoder layer may run as one operation, which reads weights and calls none of its modules. The
        # nested tensors are for that operation.
        if isinstance(module, nn.TransformerEncoderLayer):
            _switch(module, "activation_relu_or_gelu", 0, off=bool(_adapted(module)))
        elif isinstance(module, nn.TransformerEncoder):
            _switch(module, "use_nested_tensor", False, off=bool(_adapted(module)))


def _switch(module: nn.Module, name: str, value: Any, *, off: bool) -> None:
    """Give an attribute this value where `off`, and the one it had where not."""
    kept = f"_sensilora_{name}"
    if off and kept not in module.__dict__:
        module.__dict__[kept] = getattr(module, name)
        setattr(module, name, value)
    elif not off and kept in module.__dict__:
        setattr(module, name, module.__dict__.pop(kept))


def merge(model: Model) -> Model:
    """Add every adapter's update to its base weight, in place; the adapters stay and can be unmerged layer by layer.

    Follow with `unload` to get the plain model with the updates in it. Returns `model`.

    Raises:
        AdapterError: the model carries no adapter, a weight to be merged is quantised, or it is shared with another
            module, whose function would change too. The model is then as it was.
    """
    layers = _required_layers(model)
    check_all_mergeable(model, layers)
    for layer in layers.values():
        layer.merge()
    return model


def check_all_mergeable(model: nn.Module, layers: Mapping[str, VarRankLoRALinear | MultiLoRALinear]) -> None:
    """Raise AdapterError if the weight of one of these layers is quantised, or another module uses it."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        check_mergeable(layer.base_layer, name)
        shared = [owner for owner in owners[id(layer.weight)] if owner != f"{name}.base_layer.weight"]
        if shared and any(model.get_submodule(owner.rpartition(".")[0]) is not layer.base_layer for owner in shared):
            raise AdapterError(f"the weight of {name} is shared with {shared[0]}, which merging would change too")


def unload(model: Model) -> Model:
    """Replace every adapter layer by its base layer as it is: with the update if merged, else without.

    Returns `model`.

    Raises:
        AdapterError: the model carries no adapter.
    """
    layers = _adapted(model) or list(_required_layers(model).values())
    for shared_input in shared_inputs(model):
        shared_input.remove()
    replace_modules(model, {id(layer): layer.base_layer for layer in layers})
    return model


def _adapted(model: nn.Module) -> list[VarRankLoRALinear | MultiLoRALinear]:
    return [module for module in model.modules() if isinstance(module, (VarRankLoRALinear, MultiLoRALinear))]


def _required_layers(model: nn.Module) -> dict[str, VarRankLoRALinear]:
    layers = adapter_layers(model)
    if not layers and _adapted(model):
        raise AdapterError("the model carries named adapters; use the function of this name in sensilora.mixed")
    if not layers:
        raise AdapterError(f"{type(model).__name__} carries no adapter; call inject or load_adapter first")
    return layers


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the model's adapters, and its modules_to_save, as a PEFT adapter folder.

    Where several processes train the model, call it in one of them.

    Args:
        model: a model that `inject` or `load_adapter` prepared.
        folder: created whole or not at all.
        force: replace a folder that exists.

    Returns:
        The folder's path.

    Raises:
        AdapterError: the model carries no adapter.
        OutputExistsError: the folder exists and `force` is false.
    """
    saved: tuple[str, ...] = getattr(model, "_sensilora_modules_to_save", ())
    return write_adapter(model, _required_layers(model), saved, folder, force=force)


def write_adapter(
    model: nn.Module, layers: Layers, saved: tuple[str, ...], folder: str | os.PathLike[str], *, force: bool
) -> Path:
    """Write these adapters by module name, and the modules named in `saved`, as `save_adapter` does."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name in saved:
        for key, tensor in model.get_submodule(name).state_dict(prefix=f"{KEY_PREFIX}{name}.").items():
            tensors[key] = tensor
    with _files.output_folder(folder, force=force) as temporary:
        config = _adapter_config(model, layers, saved)
        _files.write_text(temporary / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        _files.write_tensors(temporary / WEIGHTS_FILE, tensors)
        _files.write_text(temporary / "README.md", _model_card(model, layers))
    return Path(folder)


def _adapter_config(model: nn.Module, layers: Layers, saved: tuple[str, ...]) -> dict[str, Any]:
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: as_alpha(layer.scaling * layer.rank) for name, layer in layers.items()}
    largest = max(ranks, key=lambda name: ranks[name])
    config: dict[str, Any] = {
        "peft_type": "LORA",
        # PEFT looks for a head of these tasks in every adapter file, and fails where it finds none.
        "task_type": None if not saved and task_type(model) in _TASKS_WITH_HEAD else task_type(model),
        "r": ranks[largest],
        "lora_alpha": alphas[largest],
        "lora_dropout": layers[largest].dropout,
        "target_modules": list(layers),
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": model_id(model),
        "rank_pattern": {pattern_key(name): rank for name, rank in ranks.items()},
        "alpha_pattern": {pattern_key(name): alpha for name, alpha in alphas.items()},
    }
    if any(is_conv1d(layer.base_layer) for layer in layers.values()):
        config["fan_in_fan_out"] = True
    if saved:
        config["modules_to_save"] = list(saved)
    return config


def pattern_key(name: str) -> str:
    """The rank_pattern / alpha_pattern key that matches this module and no other."""
    return "^" + re.escape(name)


def as_alpha(value: float) -> int | float:
    """Alphas as integers where they are, since some loaders accept nothing else."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type by the model's class name, or None."""
    name = type(model).__name__
    found = next((task for suffix, task in _TASK_TYPES.items() if name.endswith(suffix)), None)
    # Under this type PEFT passes input_ids to the model, which Whisper does not take; and a vision-language model of
    # such a name is no encoder-decoder.
    text_to_text = is_encoder_decoder(model) and getattr(model, "main_input_name", "input_ids") == "input_ids"
    return None if found == "SEQ_2_SEQ_LM" and not text_to_text else found


def _model_card(model: nn.Module, layers: Layers) -> str:
    ranks = [layer.rank for layer in layers.values()]
    parameters = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers.values())
    return (
        f"---\nbase_model: {model_id(model)}\nlibrary_name: peft\ntags:\n- lora\n- sensilora\n---\n\n"
        f"# LoRA adapter with a rank of its own for every matrix\n\n"
        f"{len(ranks)} matrices, ranks {min(ranks)} to {max(ranks)}, {sum(ranks)} in all, {parameters:,} parameters. "
        "Ranks were allotted by Sensitivity-LoRA (arXiv 2509.09119) before training.\n"
    )


def load_adapter(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    dropout: float | None = None,
    groups: bool = True,
    shared_dropout_mask: bool = False,
) -> Model:
    """Put a saved LoRA adapter (this package's or PEFT's own) into a plain model, in place.

    Everything is read and checked before the model is touched.

    Args:
        model: the base model, without adapters.
        folder: holds adapter_config.json and adapter_model.safetensors.
        dropout: dropout of the adapters when trained further; None takes the file's ``lora_dropout``.
        groups, shared_dropout_mask: see `inject`.

    Returns:
        `model`, its adapters and the file's modules_to_save requiring gradients, all else frozen.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        AdapterError: a file is damaged, of another kind than LoRA, or does not fit the model.
    """
    folder = Path(folder)
    config, pairs, plain = read_adapter(folder)
    modules = _plain_modules(model)
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    # PEFT names every usual head in modules_to_save, whether or not the model has it.
    saved = [name for name in modules if any(_is_suffix(suffix, name) for suffix in config.modules_to_save or ())]
    for name, tensor in plain.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise AdapterError(f"{folder} holds {name} {tuple(tensor.shape)}, which does not fit this model")
        if not any(name.startswith(module + ".") for module in saved):
            raise AdapterError(
                f"{folder} holds {name}, but modules_to_save in {CONFIG_FILE} does not name its module"
            )
    for name, pair in pairs.items():
        check_fit(folder, name, modules.get(name), pair, config.rank_of(name))
    layers = {}
    for name, (lora_A, lora_B) in pairs.items():
        layer = layers[name] = VarRankLoRALinear(
            modules[name],
            lora_A.shape[0],
            scaling=config.scaling_of(name),
            dropout=config.lora_dropout if dropout is None else dropout,
            adapter_dtype=lora_A.dtype,
        )
        with torch.no_grad():
            layer.lora_A.copy_(lora_A)
            layer.lora_B.copy_(lora_B)
    with torch.no_grad():
        for name, tensor in plain.items():
            parameters[name].copy_(tensor)
    return _install(model, layers, saved, groups, shared_dropout_mask)


def read_adapter(
    folder: str | os.PathLike[str],
) -> tuple[AdapterConfig, dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Read and check a saved LoRA adapter, without a model.

    Returns:
        The config; (lora_A, lora_B) by module name; the tensors of the modules_to_save by parameter name.

    Raises:
        FileNotFoundError, AdapterError: as for `load_adapter`.
    """
    config = _read_config(Path(folder) / CONFIG_FILE)
    return config, *_split(_read_weights(Path(folder) / WEIGHTS_FILE))


def check_fit(
    folder: Path, name: str, module: nn.Module | None, pair: tuple[Tensor, Tensor], configured_rank: int
) -> None:
    """Raise AdapterError unless the read pair (lora_A, lora_B) fits this module, without adapters."""
    if module is None or not is_matrix(module):
        raise AdapterError(f"{folder} adapts {name!r}, which this model does not have as a linear layer")
    lora_A, lora_B = pair
    rank = lora_A.shape[0]
    out_features, in_features = matrix_shape(module)
    if lora_A.shape != (rank, in_features) or lora_B.shape != (out_features, rank):
        raise AdapterError(
            f"{folder}: {name} is {out_features}x{in_features} here and the adapter's matrices are "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}; it was made for another model"
        )
    if configured_rank != rank:
        raise AdapterError(
            f"{folder}: {CONFIG_FILE} gives {name} rank {configured_rank} but its tensors have rank {rank}"
        )


Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Initialisations that leave the base weights as they are; others (pissa, olora, corda, loftq, ...) change them.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
# Fields that, where set, give the tensors a meaning this package does not know.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
)


class AdapterConfig(BaseModel):
    """The fields of PEFT's adapter_config.json that decide what the tensors mean; all others are ignored."""

    peft_type: Literal["LORA"]
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    r: Annotated[int, Field(ge=1)]
    lora_alpha: Alpha
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: Any = True
    use_dora: Any = None
    lora_bias: Any = None
    use_qalora: Any = None
    alora_invocation_tokens: Any = None
    target_parameters: Any = None
    trainable_token_indices: Any = None
    layer_replication: Any = None

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _keys_compile(cls, patterns: dict[str, Any] | None) -> dict[str, Any] | None:
        for key in patterns or {}:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{key!r} is not a valid regular expression ({error})") from error
        return patterns

    def rank_of(self, name: str) -> int:
        return _pattern_value(self.rank_pattern, name, self.r)

    def scaling_of(self, name: str) -> float:
        rank = self.rank_of(name)
        return _pattern_value(self.alpha_pattern, name, self.lora_alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )


def _pattern_value(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the name or a suffix of it at a dot."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _read_config(path: Path) -> AdapterConfig:
    try:
        config = AdapterConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; name a folder that save_adapter or PEFT wrote") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise AdapterError(
            f"{path}: {field}: {first['msg']}; it was truncated or edited, save the adapter again"
        ) from error
    if config.init_lora_weights not in _PLAIN_INITS:
        raise AdapterError(
            f"{path}: init_lora_weights {config.init_lora_weights!r} changed the base weights, which are not in "
            "the adapter file; open the adapter with PEFT and save it converted"
        )
    for field in _UNSUPPORTED:
        if getattr(config, field):
            raise AdapterError(f"{path}: {field} is set, which this package cannot load; open the adapter with PEFT")
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged ({error}); save the adapter again") from error


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Adapter pairs by module name, and the modules_to_save tensors by parameter name."""
    lora: dict[str, dict[str, Tensor]] = {}
    plain = {}
    for key, tensor in tensors.items():
        if not key.startswith(KEY_PREFIX):
            raise AdapterError(f"key {key!r} does not begin with {KEY_PREFIX}; this is no PEFT adapter file")
        name = key[len(KEY_PREFIX) :]
        match = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name)
        if match:
            lora.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_" in name:
            raise AdapterError(f"key {key!r} is of a kind this package cannot load; open the adapter with PEFT")
        else:
            plain[name] = tensor
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"key {key!r} holds a NaN or Inf; the adapter is damaged or its training diverged")
    for name, pair in lora.items():
        if len(pair) != 2:
            raise AdapterError(f"{name} has only {next(iter(pair))}; the adapter file is incomplete")
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in lora.items()}, plain
