"""Which backend serves a call, and what happens when one is asked for that cannot."""

import threading

import pytest
import torch

import sensilora
from sensilora.errors import BackendError
from sensilora.ops import _backend, autocorrelation_diag


def test_a_forced_backend_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.delitem(_backend._table["diagonal_metrics"], "triton", raising=False)
    with sensilora.use_backend("triton"), pytest.raises(BackendError, match="has no triton implementation"):
        sensilora.ops.diagonal_metrics(torch.ones(3))


def test_unknown_names():
    with pytest.raises(BackendError, match="choose one of triton, native, torch"), sensilora.use_backend("cuda"):
        pass


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("SENSILORA_BACKEND", "torch")
    assert _backend.forced_backend() == "torch"
    with sensilora.use_backend("native"):
        assert _backend.forced_backend() == "native"
    monkeypatch.setenv("SENSILORA_BACKEND", "fast")
    with pytest.raises(BackendError, match="SENSILORA_BACKEND got 'fast'"):
        autocorrelation_diag(torch.ones(2, 2))


def test_nesting_and_exceptions_restore_the_choice():
    with sensilora.use_backend("torch"):
        with pytest.raises(ZeroDivisionError), sensilora.use_backend("native"):
            raise ZeroDivisionError
        assert _backend.forced_backend() == "torch"
    assert _backend.forced_backend() is None


def test_other_threads_see_the_choice():
    seen = []
    with sensilora.use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(_backend.forced_backend()))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_an_error_in_a_kernel_is_not_a_fallback(monkeypatch):
    def broken(*args):
        raise RuntimeError("kernel broke")

    table = dict(_backend._table["autocorrelation_diag"])
    table["native"] = _backend.Implementation(broken)
    monkeypatch.setitem(_backend._table, "autocorrelation_diag", table)
    monkeypatch.setattr(_backend, "_why_not_native", lambda op, device: None)
    with pytest.raises(RuntimeError, match="kernel broke"):
        autocorrelation_diag(torch.ones(2, 2))


def test_unsupported_dtype_is_a_reason(monkeypatch):
    monkeypatch.setattr(_backend, "_why_not_native", lambda op, device: None)
    assert "not torch.float64" in _backend.why_not("diagonal_metrics", "native", "cpu", torch.float64)
    assert _backend.why_not("diagonal_metrics", "native", "cpu", torch.float32) is None


def test_triton_without_its_interpreter_says_how(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in _backend.why_not("autocorrelation_diag", "triton", "cpu", torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "wrongly" in _backend.why_not("autocorrelation_diag", "triton", "cpu", torch.bfloat16)
    assert _backend.why_not("autocorrelation_diag", "triton", "cpu", torch.float32) is None


def test_the_order_of_an_op_in_the_table_is_its_order(monkeypatch):
    monkeypatch.setattr(_backend, "why_not", lambda op, backend, device, dtype: None)
    implementation = _backend.Implementation(lambda: None)
    monkeypatch.setitem(_backend._table, "an_op", dict.fromkeys(["native", "triton", "torch"], implementation))
    assert _backend.serving("an_op", torch.device("cuda"), torch.float32) == "native"
    monkeypatch.setitem(_backend._table, "an_op", dict.fromkeys(["triton", "native", "torch"], implementation))
    assert _backend.serving("an_op", torch.device("cuda"), torch.float32) == "triton"
    # The interpreter is asked for by name only.
    assert _backend.serving("an_op", torch.device("cpu"), torch.float32) == "native"
    assert _backend.serving("an_op", torch.device("mps"), torch.float32) == "torch"


def test_every_op_has_a_reference():
    assert {"autocorrelation_diag", "fisher_diag", "diagonal_metrics", "lora_linear"} <= set(
        _backend.registered_ops()
    )
    assert all("torch" in _backend.backends_of(op) for op in _backend.registered_ops())


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("8.0:9.0a", (8, 0), True),
        ("8.0:9.0a", (8, 6), True),
        ("8.0:9.0a", (9, 0), True),
        ("8.0:9.0a", (7, 5), False),
        ("8.0:9.0a", (10, 0), False),
        ("8.6", (8, 0), False),
        ("9.0a:9.0+PTX", (12, 0), True),
        ("9.0a:9.0+PTX", (8, 9), False),
        ("12.0", (10, 0), False),
        ("Ampere", (9, 0), True),
        ("", (9, 0), True),  # of an extension that does not tell
    ],
)
def test_which_gpus_the_extensions_code_runs_on(built, capability, runs):
    assert _backend.runs_on(built, capability) == runs


def test_an_extension_without_code_for_the_gpu_is_told(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("sensilora._C"), "cuda_architectures", "9.0a")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (8, 6)].__getitem__)
    reason = _backend._why_not_these_gpus()
    assert "built for 9.0a and holds no code for GPU 1, of compute capability 8.6" in reason
