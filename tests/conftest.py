"""Fixtures shared by all tests."""

from __future__ import annotations

import os

# Before torch is imported: one thread for each of several test processes, which would else wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before triton is imported: its kernels run under their interpreter where there is no GPU.
import torch

# torch.use_deterministic_algorithms wants cuBLAS to have a workspace of its own, which is chosen when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from sensilora.ops import _backend, use_backend


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU the tests marked gpu are deselected: a hundred skips would hide the skips that say something."""
    if not torch.cuda.is_available():
        on_gpu = [item for item in items if "gpu" in item.keywords]
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if "gpu" not in item.keywords]


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and friends give NaN, so that an output element nobody wrote shows."""

    def poison(function):
        def wrapped(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapped

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `on_backend` run on every backend that their module's OP has, on each device."""
    devices = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
    if "on_backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _backend.backends_of(metafunc.module.OP), indirect=True)
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def on_backend(backend: str, device: str):
    """A context manager by op and dtype: runs the block on `backend`, or skips with the reason it cannot serve."""

    def choose(op: str, dtype: torch.dtype):
        reason = _backend.why_not(op, backend, device, dtype)
        if reason is not None:
            pytest.skip(f"{backend} on {device}: {reason}")
        return use_backend(backend)

    return choose
