"""Other forms of a trained adapter (normalised PEFT files, one rank for all matrices, a merged model) and of a plan
(axolotl's fields, an untrained adapter)."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from sensilora import _files
from sensilora.adapters import (
    CONFIG_FILE,
    KEY_PREFIX,
    WEIGHTS_FILE,
    AdapterConfig,
    as_alpha,
    load_adapter,
    merge,
    pattern_key,
    read_adapter,
    unload,
)
from sensilora.errors import AdapterError, OutputExistsError, PlanError
from sensilora.integrations.transformers import quiet
from sensilora.plan import RankPlan

Pairs = dict[str, tuple[Tensor, Tensor]]

# What an adapter's folder may hold beside the adapter: its card, and the log of `sensilora train`, which names the
# classes of a classifier.
_BESIDE = ("README.md", "training.json")

# Loaders of other versions and other tools refuse fields that they do not know.
_KEPT_FIELDS = ("task_type", "lora_dropout", "base_model_name_or_path", "fan_in_fan_out", "modules_to_save")


def export_peft(adapter: str | os.PathLike[str], output: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Check a LoRA adapter folder and write it in the form that PEFT and vLLM read without ambiguity.

    Each module is named in full with its rank and alpha, under pattern keys that match it alone; rsLoRA's scale
    becomes a plain alpha; fields that older loaders refuse are left out. The tensors stay as they are.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors, this package's or PEFT's.
        output: folder to write, whole or not at all.
        force: replace `output` if it exists.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: a file of `adapter` is missing.
        AdapterError: a file of `adapter` is damaged, or its ranks contradict each other.
        OutputExistsError: `output` exists and `force` is false.
    """
    config, pairs, plain = _read(adapter)
    ranks = {name: lora_A.shape[0] for name, (lora_A, _) in pairs.items()}
    alphas = {name: as_alpha(config.scaling_of(name) * rank) for name, rank in ranks.items()}
    largest = max(ranks, key=lambda name: ranks[name])
    fields = {
        "r": ranks[largest],
        "lora_alpha": alphas[largest],
        "rank_pattern": {pattern_key(name): rank for name, rank in ranks.items()},
        "alpha_pattern": {pattern_key(name): alpha for name, alpha in alphas.items()},
    }
    return _write(output, force, {**_kept_fields(adapter), **fields}, pairs, plain, beside=_beside(adapter))


def export_uniform(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dropped: Mapping[str, tuple[int, int]] | None = None,
    force: bool = False,
) -> Path:
    """Write an adapter of one rank that computes the same, for servers that know no rank or alpha patterns.

    lora_A and lora_B are padded with zeros to the largest rank, each matrix's scale is folded into its lora_B (and
    rounded to lora_B's dtype), and lora_alpha equals r. Some servers need every layer to have the same modules: an
    adapter of zeros is written for the `dropped` ones or, where these are not known, for what a layer lacks and
    others have.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors, this package's or PEFT's.
        output: folder to write, whole or not at all.
        dropped: (out_features, in_features) by name of matrices that the plan gave rank 0; None where there is no
            plan to tell.
        force: replace `output` if it exists.

    Returns:
        `output`.

    Raises:
        FileNotFoundError, AdapterError, OutputExistsError: as for `export_peft`.
    """
    config, pairs, plain = _read(adapter)
    rank = max(lora_A.shape[0] for lora_A, _ in pairs.values())
    uniform = {name: _padded(*pair, config.scaling_of(name), rank) for name, pair in pairs.items()}
    dtype = next(iter(pairs.values()))[0].dtype
    for name, (out_features, in_features) in (_gaps(pairs) if dropped is None else dropped).items():
        if name not in uniform:
            zeros = torch.zeros(rank, in_features, dtype=dtype), torch.zeros(out_features, rank, dtype=dtype)
            uniform[name] = zeros
    fields = {**_kept_fields(adapter), "r": rank, "lora_alpha": rank}
    return _write(output, force, fields, uniform, plain, beside=_beside(adapter))


def export_merged(
    model: Any,
    tokenizer: Any,
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
) -> Path:
    """Write the whole model with the adapter's update added to its weights, and its tokenizer.

    Args:
        model: the base transformers model, without adapters; it carries the update afterwards.
        tokenizer: its tokenizer.
        adapter: folder with adapter_config.json and adapter_model.safetensors, this package's or PEFT's.
        output: folder to write, whole or not at all; weights as safetensors.
        force: replace `output` if it exists.

    Returns:
        `output`.

    Raises:
        FileNotFoundError, AdapterError, OutputExistsError: as for `export_peft`.
    """
    with _files.output_folder(output, force=force) as temporary:
        unload(merge(load_adapter(model, adapter)))
        try:
            with quiet():
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"{output} cannot be written: {error}") from error
    return Path(output)


def export_axolotl(
    plan: RankPlan,
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Write a plan as fields of an axolotl config. Needs peft.

    Args:
        plan: the plan.
        output: YAML file to write.
        base: axolotl config, without ranks, whose other fields go into `output` too. None: the fields alone.
        force: replace `output` if it exists.

    Returns:
        `output`.

    Raises:
        PlanError: axolotl has no field for what the plan says (a fractional alpha; rank 0 for a matrix whose name
            ends with that of another), every rank is 0, `base` is no axolotl config or sets what the plan does, or
            peft is not installed.
        OutputExistsError: `output` exists and `force` is false.
    """
    lora = _lora_config(plan)
    if not all(isinstance(alpha, int) for alpha in (lora.alpha_pattern or {}).values()):
        raise PlanError("axolotl takes whole alphas only; make the plan with a whole --scaling")
    if lora.exclude_modules:
        raise PlanError(f"axolotl cannot leave out {min(lora.exclude_modules)}; make the plan with --min-rank 1")
    fields = {
        "lora_r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_target_modules": sorted(lora.target_modules or ()),
        "lora_rank_pattern": lora.rank_pattern,
        "lora_alpha_pattern": lora.alpha_pattern,
        "peft_use_rslora": lora.use_rslora,
    }
    config = {} if base is None else _read_yaml(base)
    given = sorted({*fields, "lora_target_linear"} & set(config))
    if given:
        raise PlanError(f"{base} sets {given[0]}, which follows from the plan; leave it out there")
    if Path(output).exists() and not force:
        raise OutputExistsError(f"output {output} exists already; pass --force to overwrite it")
    return _files.write_text(output, yaml.safe_dump({**config, **fields}, sort_keys=False))


def export_blank_adapter(
    plan: RankPlan,
    output: str | os.PathLike[str],
    *,
    task_type: str | None = "CAUSAL_LM",
    dropout: float = 0.0,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Write an adapter that is not trained yet, for trainers that take ranks only from an adapter. Needs peft.

    lora_A is drawn as PEFT draws it, lora_B is zero, both in fp32, so that the model computes what it did without.
    The base model's tensors are not needed, nor is the head of a classifier written.

    Args:
        plan: the plan.
        output: adapter folder to write, whole or not at all.
        task_type: PEFT's, by which it chooses the class of the model around the base model.
        dropout: the adapter's ``lora_dropout``.
        seed: of lora_A.
        force: replace `output` if it exists.

    Returns:
        `output`.

    Raises:
        PlanError: every rank of the plan is 0, `dropout` is outside [0, 1], or peft is not installed.
        OutputExistsError: `output` exists and `force` is false.
    """
    if not 0.0 <= dropout <= 1.0:
        raise PlanError(f"dropout must be in [0, 1], not {dropout}")
    lora = _lora_config(plan)
    fields: dict[str, Any] = {
        "task_type": task_type,
        "lora_dropout": dropout,
        "base_model_name_or_path": plan.model_id or None,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "use_rslora": lora.use_rslora,
    }
    if lora.exclude_modules:
        fields["exclude_modules"] = sorted(lora.exclude_modules)
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, rank in plan.ranks.items():
        if rank > 0:
            out_features, in_features = plan.matrices[name].shape
            lora_A = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)
            pairs[name] = lora_A, torch.zeros(out_features, rank)
    return _write(output, force, fields, pairs, {})


def _lora_config(plan: RankPlan) -> Any:
    """The plan as PEFT's config; PEFT that is missing is told as any other obstacle."""
    try:
        return plan.to_lora_config()
    except ImportError as error:
        raise PlanError(str(error)) from error


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise PlanError(f"{path} holds no 'name: value' lines, so it is no axolotl config")
    return config


def _read(adapter: str | os.PathLike[str]) -> tuple[AdapterConfig, Pairs, dict[str, Tensor]]:
    config, pairs, plain = read_adapter(adapter)
    if not pairs:
        raise AdapterError(f"{adapter} holds no LoRA matrices; there is nothing to export")
    for name, (lora_A, lora_B) in pairs.items():
        if not lora_A.shape[0] == lora_B.shape[1] == config.rank_of(name):
            raise AdapterError(
                f"{adapter}: {CONFIG_FILE} gives {name} rank {config.rank_of(name)}, its tensors have ranks "
                f"{lora_A.shape[0]} and {lora_B.shape[1]}; save the adapter again"
            )
    return config, pairs, plain


def _padded(lora_A: Tensor, lora_B: Tensor, scaling: float, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - lora_A.shape[0]
    scaled = (lora_B.to(torch.promote_types(lora_B.dtype, torch.float32)) * scaling).to(lora_B.dtype)
    return torch.nn.functional.pad(lora_A, (0, 0, 0, missing)), torch.nn.functional.pad(scaled, (0, missing))


def _gaps(pairs: Pairs) -> dict[str, tuple[int, int]]:
    """Shape by name of each module that a layer lacks while all others of its kind agree on one shape."""
    members: dict[tuple[str, str], dict[str, str]] = {}  # names by layer, by what stands before and behind the layer
    layers: dict[str, dict[str, None]] = {}
    for name in pairs:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        if match:
            members.setdefault((match[1], match[3]), {})[match[2]] = name
            layers.setdefault(match[1], {})[match[2]] = None
    gaps = {}
    for (before, behind), names in members.items():
        shapes = {(pairs[name][1].shape[0], pairs[name][0].shape[1]) for name in names.values()}
        if len(shapes) == 1:
            lacking = [layer for layer in layers[before] if layer not in names]
            gaps.update(dict.fromkeys((before + layer + behind for layer in lacking), shapes.pop()))
    return gaps


def _kept_fields(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    source = json.loads((Path(adapter) / CONFIG_FILE).read_bytes())
    return {key: source[key] for key in _KEPT_FIELDS if source.get(key)}


def _beside(adapter: str | os.PathLike[str]) -> dict[str, bytes]:
    files = [Path(adapter) / name for name in _BESIDE]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def _write(
    output: str | os.PathLike[str],
    force: bool,
    fields: dict[str, Any],
    pairs: Pairs,
    plain: dict[str, Tensor],
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    config = {
        "peft_type": "LORA",
        "target_modules": sorted(pairs),
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **fields,
    }
    tensors = {f"{KEY_PREFIX}{name}": tensor for name, tensor in plain.items()}
    for name, (lora_A, lora_B) in pairs.items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = lora_A
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = lora_B
    with _files.output_folder(output, force=force) as temporary:
        _files.write_text(temporary / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        _files.write_tensors(temporary / WEIGHTS_FILE, tensors)
        for name, content in (beside or {}).items():
            _files.write_bytes(temporary / name, content)
    return Path(output)
