"""Checkpoints of a calibration: what was summed so far, so that a run that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import sensilora
from sensilora._files import bytes_of, remove_all_but, write_tensors, write_text
from sensilora.errors import CalibrationError
from sensilora.targets import plain_tensors

STATE_FILE = "calibration.json"
_SUMS = "sums-*.safetensors"
_FORMAT = 2
# What a configuration says of its file, of names and of what a forward pass returns; transformers sets some of it
# when the model is saved or first run.
_IGNORED_SETTINGS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Checkpoint:
    """The state of a calibration in a folder: ``calibration.json`` and the safetensors file that it names.

    The JSON file is written last and renamed into place, so there is one whole state at every moment.

    Args:
        folder: made if it is not there.
        every: batches between two states.
        identity: what the state is good for, as JSON holds it: a run with another is told so.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int, identity: Mapping[str, Any]) -> None:
        self.folder, self.every = Path(folder), every
        self._identity = json.loads(json.dumps({"format": _FORMAT, **identity}, default=str))
        self._serial = 0

    @property
    def exists(self) -> bool:
        return (self.folder / STATE_FILE).exists()

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The state and its tensors, or None where there is none.

        Raises:
            CalibrationError: it is damaged, or of another calibration.
        """
        if not self.exists:
            return None
        with self.reading():
            content = json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8"))
            identity, state, self._serial = dict(content["identity"]), dict(content["state"]), int(content["serial"])
        self._check(identity)
        with self.reading():
            # Off the file's mapping, since the file is going to be removed.
            return state, {name: tensor.clone() for name, tensor in load_file(self._sums()).items()}

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """What fails in the block says that the state is damaged."""
        try:
            yield
        except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(
                f"the checkpoint in {self.folder} is damaged ({error!r}); remove the folder to start again"
            ) from error

    def write(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replace the state.

        Raises:
            OSError: it cannot be written; the former is still there.
        """
        self._serial += 1
        write_tensors(self._sums(), tensors)
        content = {"identity": self._identity, "serial": self._serial, "state": state}
        write_text(self.folder / STATE_FILE, json.dumps(content) + "\n")
        remove_all_but(self.folder, _SUMS, {self._sums().name})

    def remove(self) -> None:
        """Remove the state, and the folder if nothing else is in it."""
        remove_all_but(self.folder, STATE_FILE, ())
        remove_all_but(self.folder, _SUMS, ())
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _sums(self) -> Path:
        return self.folder / _SUMS.replace("*", str(self._serial))

    def _check(self, saved: Mapping[str, Any]) -> None:
        of = f"the checkpoint in {self.folder} is of a"
        advice = "give what it was started with, or remove the folder to start again"
        for key, value in self._identity.items():
            before = saved.get(key)
            if before == value:
                continue
            if isinstance(value, dict) and isinstance(before, dict):
                differing = next(name for name in {**value, **before} if value.get(name) != before.get(name))
                raise CalibrationError(f"{of} model with other {key} ({differing}, for example); {advice}")
            if isinstance(value, list):
                raise CalibrationError(f"{of} calibration of other {key}; {advice}")
            raise CalibrationError(f"{of} calibration with {key}={before!r}, not {value!r}; {advice}")


def identity(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from: arguments, versions, and the model's kind and weights."""
    plain = {name: _name_of(value) if callable(value) else value for name, value in arguments.items()}
    versions = {"sensilora": sensilora.__version__, "torch": str(torch.__version__)}
    device = next(model.parameters()).device.type
    kind = {"model": type(model).__qualname__, "config": config_of(model)}
    return {**plain, **versions, "device": device, **kind, "weights": weights_of(model)}


def config_of(model: nn.Module) -> dict[str, Any]:
    """What the configuration of a transformers model says, as JSON holds it, but for `_IGNORED_SETTINGS`."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    settings = {**config.to_dict(), "attn_implementation": getattr(config, "_attn_implementation", None)}
    found: dict[str, Any] = _plain_settings(settings)
    return found


def _plain_settings(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_settings(entry) for key, entry in value.items() if key not in _IGNORED_SETTINGS}
    if isinstance(value, (list, tuple)):
        return [_plain_settings(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    # An object may print its address.
    return value if isinstance(value, (str, int, float, type(None))) else type(value).__qualname__


def digest(batch: object) -> str:
    """A hash of all that a batch holds: tensors and arrays by value, wherever they are, the rest as it prints."""
    found = hashlib.sha256()

    def take(key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, entry in sorted(value.items(), key=lambda item: str(item[0])):
                take(f"{key}.{name}", entry)
        elif isinstance(value, (list, tuple)):
            found.update(f"{key}:{len(value)};".encode())
            for place, entry in enumerate(value):
                take(f"{key}.{place}", entry)
        elif isinstance(value, Tensor):
            found.update(f"{key}:{value.dtype}:{tuple(value.shape)}:".encode())
            found.update(bytes_of(value))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            found.update(f"{key}:{value.dtype}:{value.shape}:".encode())
            found.update(value.tobytes())
        else:
            # An object that does not say what it holds prints its address, which another run's does not have.
            found.update(f"{key}:{re.sub(' at 0x[0-9a-f]+', '', repr(value))};".encode())

    take("", batch)
    return found.hexdigest()[:32]


def weights_of(model: nn.Module) -> dict[str, str]:
    """For each parameter and buffer its dtype, shape and the sum of its bit patterns, which is exact in any order."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = " ".join(_bits_of(part) for part in plain_tensors(tensor))
    return found


def _bits_of(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))
    bits = flat.view(_INTEGERS.get(tensor.element_size(), torch.uint8))
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {int(bits.sum(dtype=torch.int64))}"


def _name_of(function: Callable[..., Any]) -> str:
    kind = type(function)
    name = getattr(function, "__qualname__", kind.__qualname__)
    return f"{getattr(function, '__module__', kind.__module__)}.{name}"
