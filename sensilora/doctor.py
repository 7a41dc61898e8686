"""What this installation can do: versions, devices, and which backend serves each op where."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

import sensilora
from sensilora.errors import BackendError
from sensilora.ops import _backend

_PACKAGES = ("triton", "transformers", "peft", "accelerate", "safetensors", "matplotlib")


def examine() -> dict[str, Any]:
    """Everything `sensilora doctor` tells, as JSON-ready values.

    Returns:
        "versions": by package, None where it is not installed; "devices": a dict each; "native": the compiled
        extension's build facts, or the reason there is none; "forced_backend": what was asked for, or None; "ops": by
        op and device type, the backend that serves fp32 tensors (None if a forced one cannot) and why the others do
        not.
    """
    forced = _backend.forced_backend()
    types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "versions": {
            "sensilora": sensilora.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,  # with +cpu or +cu128, which the metadata may lack
            **{package: _version(package) for package in _PACKAGES},
        },
        "devices": _devices(),
        "native": _native(),
        "forced_backend": forced,
        "ops": {op: {kind: _service(op, kind, forced) for kind in types} for op in _backend.registered_ops()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {"type": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "type": "cuda",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return devices


def _native() -> dict[str, Any]:
    if importlib.util.find_spec("sensilora._C") is None:
        return {"built": False, "reason": "the native extension is not built; pip install --no-build-isolation -e ."}
    extension = importlib.import_module("sensilora._C")
    facts = {
        key: value for key, value in vars(extension).items() if isinstance(value, (bool, int, str)) and key[0] != "_"
    }
    return {"built": True, **facts, "cpu_level": extension.cpu_level()}


def _service(op: str, device_type: str, forced: str | None) -> dict[str, Any]:
    try:
        chosen = _backend.serving(op, torch.device(device_type), torch.float32)
    except BackendError:
        chosen = None
    others = {}
    for name in _backend.BACKENDS:
        if name != chosen:
            reason = _backend.why_not(op, name, device_type, torch.float32)
            others[name] = reason or _passed_over(op, name, chosen, device_type, forced)
    return {"backend": chosen, "why_not": others}


def _passed_over(op: str, name: str, chosen: str | None, device_type: str, forced: str | None) -> str:
    """Why a backend that could serve is not the one taken."""
    if forced is not None:
        return f"it could serve, but {forced} was asked for"
    if name == "triton" and device_type == "cpu":
        return "it serves CPU tensors only when asked for by name"
    taken = _backend.taken_calls(op, name) if device_type == "cuda" else None
    if taken is not None:
        return f"it takes {taken}; for others {chosen} comes first"
    return f"it could serve, but {chosen} comes first"
