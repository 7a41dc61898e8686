"""The one place that picks a backend for an op.

Three backends: ``triton``; ``native`` (C++ on CPU tensors, CUDA on CUDA tensors: torch's dispatcher separates
them); ``torch`` (the plain reference, which serves everything). A call takes the first that can serve in the order of
its op's entry in the table: triton, native, torch, unless the op's file says why not. Triton serves CPU tensors only
when asked for by name and only under its interpreter (``TRITON_INTERPRET=1``).

A backend asked for by `use_backend` or ``SENSILORA_BACKEND`` either serves the call or raises `BackendError`
with the reason. An error inside a kernel is never turned into a fallback.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sensilora.errors import BackendError

BACKENDS = ("triton", "native", "torch")
# Those that serve without being asked for by name; on other devices torch alone.
_UNASKED = {"cuda": frozenset(BACKENDS), "cpu": frozenset({"native", "torch"})}

FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Implementation:
    """One backend's code for one op, and the dtypes of the main input that it serves.

    `native_op` names the op of the native extension that a native implementation calls, where it is another's.
    `takes` says which CUDA calls are left to it although another backend comes first, as the op's file decides.
    """

    call: Callable[..., Any]
    dtypes: frozenset[torch.dtype] = FLOATS
    native_op: str | None = None
    takes: str | None = None


_table: dict[str, dict[str, Implementation]] = {}

# Process-wide, not per thread: autograd runs a CUDA backward on threads of its own, which must see the same choice.
_forced: list[str] = []


def register(op: str, **implementations: Implementation) -> None:
    """Enter an op's implementations, by backend name and the best first, into the table. ``torch`` must be there."""
    _table[op] = implementations


def registered_ops() -> list[str]:
    """Names of the ops in the table, in registration order."""
    return list(_table)


def taken_calls(op: str, backend: str) -> str | None:
    """Which CUDA calls of `op` are left to `backend` although another comes first, as a clause; None if none are."""
    return _table[op][backend].takes if backend in _table[op] else None


def backends_of(op: str) -> list[str]:
    """Names of the backends that implement `op`, wherever they can run."""
    return list(_table[op])


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make every sensilora op use one backend inside the ``with`` block, in all threads.

    Args:
        name: ``"triton"``, ``"native"`` or ``"torch"``.

    Raises:
        BackendError: the name is none of the three; and, at each op called inside the block that the backend
            cannot serve, with the reason.
    """
    _forced.append(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _forced.pop()


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{where} got {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


def forced_backend() -> str | None:
    """The backend asked for by `use_backend` (innermost) or ``SENSILORA_BACKEND``, or None."""
    if _forced:
        return _forced[-1]
    name = os.environ.get("SENSILORA_BACKEND")
    return _checked(name, "SENSILORA_BACKEND") if name else None


def select(op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The implementation that serves `op` on tensors of this device type and dtype.

    Raises:
        BackendError: a backend was asked for and cannot serve this call.
    """
    return _table[op][serving(op, device, dtype)].call


def serving(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend that `select` takes.

    Raises:
        BackendError: a backend was asked for and cannot serve this call.
    """
    forced = forced_backend()
    if forced is not None:
        reason = why_not(op, forced, device.type, dtype)
        if reason is not None:
            raise BackendError(f"backend {forced!r} was asked for but cannot serve {op} on {device.type}: {reason}")
        return forced
    unasked = _UNASKED.get(device.type, frozenset({"torch"}))
    for name in _table[op]:
        if name in unasked and why_not(op, name, device.type, dtype) is None:
            return name
    raise BackendError(f"no backend serves {op} on {device.type} tensors of {dtype}")


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve `op` on such tensors, as a clause; None if it can."""
    implementation = _table[op].get(backend)
    if implementation is None:
        return f"{op} has no {backend} implementation"
    reason = None
    if backend == "triton":
        reason = _why_not_triton(device_type, dtype)
    elif backend == "native":
        reason = _why_not_native(implementation.native_op or op, device_type)
    if reason is None and dtype not in implementation.dtypes:
        reason = f"it takes {', '.join(sorted(str(d) for d in implementation.dtypes))}, not {dtype}"
    return reason


def _why_not_triton(device_type: str, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda":
        return None
    if device_type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return "triton needs a CUDA device, or its interpreter (set TRITON_INTERPRET=1 before starting python)"
    if dtype == torch.bfloat16:
        return "triton's interpreter computes bfloat16 wrongly"
    return None


@functools.lru_cache
def _why_not_native(op: str, device_type: str) -> str | None:
    if importlib.util.find_spec("sensilora._C") is None:
        return "the native extension is not built (pip install --no-build-isolation -e . builds it)"
    # Imported here because loading a library is a side effect that `import sensilora` should not have; a broken one
    # raises its own error, which must not look like a missing one.
    importlib.import_module("sensilora._C")
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"sensilora_C::{op}", key):
        return f"the native extension holds no {device_type.upper()} kernel for {op}"
    return _why_not_these_gpus() if device_type == "cuda" else None


def architectures_built() -> str:
    """What the native extension's CUDA code was compiled for, as `runs_on` takes it; empty where it does not tell."""
    built: str = getattr(importlib.import_module("sensilora._C"), "cuda_architectures", "")
    return built


def _why_not_these_gpus() -> str | None:
    built = architectures_built()
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if not runs_on(built, capability):
            return (
                f"the native extension was built for {built.replace(':', ', ')} and holds no code for GPU {device}, "
                f"of compute capability {'.'.join(map(str, capability))}; build it on this machine "
                "(pip install --no-build-isolation -e .)"
            )
    return None


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architectures`, as TORCH_CUDA_ARCH_LIST has them but with colons, runs on such a GPU.

    Code runs on GPUs of its major version that are not older, code for 9.0a on 9.0 alone, and PTX on all that are not
    older. A name that is not a number, such as Ampere, may stand for any.
    """
    for name in filter(None, architectures.split(":")):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if found is None:
            return True
        major, minor = int(found[1]), int(found[2])
        if (major, minor) == capability:
            return True
        if not found[3] and (major, minor) < capability and (major == capability[0] or found[4]):
            return True
    return not architectures


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
