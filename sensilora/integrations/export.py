"""Other forms of a trained adapter: normalised PEFT files, one rank for all matrices, and a merged model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

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
from sensilora.errors import AdapterError
from sensilora.integrations.transformers import quiet

Pairs = dict[str, tuple[Tensor, Tensor]]

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
    return _write(adapter, output, force, fields, pairs, plain)


def export_uniform(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dropped: Mapping[str, tuple[int, int]] | None = None,
    force: bool = False,
) -> Path:
    """Write an adapter of one rank that computes the same, for servers that know no rank or alpha patterns.

    lora_A and lora_B are padded with zeros to the largest rank, each matrix's scale is folded into its lora_B, and
    lora_alpha equals r. Some servers need every layer to have the same modules: where a layer lacks one that other
    layers have, and for the `dropped` ones, an adapter of zeros is written.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors, this package's or PEFT's.
        output: folder to write, whole or not at all.
        dropped: (out_features, in_features) by name of matrices that the plan gave rank 0.
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
    for name, (out_features, in_features) in {**_gaps(pairs), **(dropped or {})}.items():
        if name not in uniform:
            zeros = torch.zeros(rank, in_features, dtype=dtype), torch.zeros(out_features, rank, dtype=dtype)
            uniform[name] = zeros
    return _write(adapter, output, force, {"r": rank, "lora_alpha": rank}, uniform, plain)


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


def _write(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    force: bool,
    fields: dict[str, Any],
    pairs: Pairs,
    plain: dict[str, Tensor],
) -> Path:
    source = json.loads((Path(adapter) / CONFIG_FILE).read_bytes())
    config = {
        "peft_type": "LORA",
        **{key: source[key] for key in _KEPT_FIELDS if source.get(key)},
        **fields,
        "target_modules": sorted(pairs),
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {f"{KEY_PREFIX}{name}": tensor for name, tensor in plain.items()}
    for name, (lora_A, lora_B) in pairs.items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = lora_A
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = lora_B
    with _files.output_folder(output, force=force) as temporary:
        _files.write_text(temporary / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        _files.write_tensors(temporary / WEIGHTS_FILE, tensors)
        card = Path(adapter) / "README.md"
        if card.is_file():
            _files.write_text(temporary / card.name, card.read_text(encoding="utf-8"))
    return Path(output)
