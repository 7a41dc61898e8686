"""autocorrelation_diag: every backend against an fp64 oracle, and the op's registration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensilora.errors import BackendError
from sensilora.ops import autocorrelation_diag, use_backend
from sensilora.ops.autocorrelation_diag import _autocorrelation_diag, _autocorrelation_diag_
from tests.tolerances import ACCUMULATED, relative_error

OP = "autocorrelation_diag"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (5, 123, 123), (7, 33), (3, 4, 5, 17), (513, 129), (64, 384)]


def oracle(x, mask=None):
    rows = x.detach().double().reshape(-1, x.shape[-1])
    if mask is not None:
        rows = rows[mask.reshape(-1)]
    return (
        torch.stack([sum(value * value for value in column) for column in rows.T.unbind()])
        if rows.numel()
        else (torch.zeros(x.shape[-1], dtype=torch.float64))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_oracle(on_backend, device, dtype, shape, masked, poisoned_empty):
    x = torch.randn(shape).to(dtype)
    mask = torch.rand(shape[:-1]) > 0.4 if masked else None
    expected = (x.double()[mask] if masked else x.double().reshape(-1, shape[-1])).square().sum(0)
    with on_backend(OP, dtype):
        got = autocorrelation_diag(x.to(device), mask=None if mask is None else mask.to(device))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(got, expected) <= ACCUMULATED[dtype]


def test_oracle_agrees_with_definition():
    x = torch.randn(6, 3, dtype=torch.float64)
    full = sum(torch.outer(row, row) for row in x)
    torch.testing.assert_close(oracle(x), full.diag())


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
def test_out_accumulates(on_backend, device, out_dtype):
    first, second = torch.randn(10, 7, device=device), torch.randn(4, 7, device=device)
    with on_backend(OP, torch.float32):
        out = torch.zeros(7, dtype=out_dtype, device=device)
        assert autocorrelation_diag(first, out=out) is out
        autocorrelation_diag(second, out=out)
    assert relative_error(out, oracle(torch.cat([first, second]))) <= 1e-6


def test_rows_that_do_not_count_may_hold_anything(on_backend, device):
    x = torch.randn(6, 5, device=device)
    mask = torch.tensor([True, False, True, True, False, True], device=device)
    x[1], x[4] = float("nan"), float("inf")
    with on_backend(OP, torch.float32):
        got = autocorrelation_diag(x, mask=mask)
    assert relative_error(got, oracle(x, mask)) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)])
def test_empty(on_backend, device, shape, poisoned_empty):
    with on_backend(OP, torch.float32):
        got = autocorrelation_diag(torch.ones(shape, device=device))
    assert got.tolist() == [0.0] * shape[-1]


def test_strided_inputs(on_backend, device):
    x = torch.randn(9, 40, device=device)
    for view in (x[:, 3:20], x[::2], x.t(), x[:, ::3], x[:1].expand(5, 40)):
        with on_backend(OP, torch.float32):
            got = autocorrelation_diag(view)
        assert relative_error(got, oracle(view)) <= 1e-6


@pytest.mark.parametrize("value", [1e-20, 3e18])
def test_extreme_values(on_backend, device, value):
    x = torch.full((3, 4), value, device=device)
    with on_backend(OP, torch.float32):
        got = autocorrelation_diag(x, out=torch.zeros(4, dtype=torch.float64, device=device))
    assert relative_error(got, torch.full((4,), 3 * float(torch.tensor(value)) ** 2)) <= 1e-5


def test_fp16_squares_do_not_underflow(on_backend, device):
    x = torch.full((100, 4), 1e-4, dtype=torch.float16, device=device)
    with on_backend(OP, torch.float16):
        got = autocorrelation_diag(x)
    assert relative_error(got, oracle(x)) <= 1e-5


def test_deterministic(on_backend, device):
    x = torch.randn(777, 65, device=device)
    with on_backend(OP, torch.float32):
        results = [autocorrelation_diag(x) for _ in range(3)]
    assert all(torch.equal(results[0], result) for result in results)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 70), columns=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_backends_agree_on_any_shape(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, generator=generator) > 0.5
    for name in ("native", "triton"):
        try:
            with use_backend(name):
                got = autocorrelation_diag(x, mask=mask)
        except BackendError:
            continue
        assert relative_error(got, x.double()[mask].square().sum(0)) <= 1e-6


def test_gradients():
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])
    for chosen in (None, mask):
        function = lambda x, m=chosen: autocorrelation_diag(x, mask=m)  # noqa: E731
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    x = torch.randn(2, 5, 6, device=device, requires_grad=requires_grad)
    mask = torch.rand(2, 5, device=device) > 0.5
    torch.library.opcheck(_autocorrelation_diag, (x, mask))
    torch.library.opcheck(_autocorrelation_diag, (x, None))
    torch.library.opcheck(_autocorrelation_diag_, (x.detach(), mask, torch.zeros(6, device=device)))


@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (torch.tensor(1.0), {}, "must be a floating-point tensor"),
        (torch.ones(2, 3, dtype=torch.int64), {}, "must be a floating-point tensor"),
        (torch.ones(2, 3), {"mask": torch.ones(3, dtype=torch.bool)}, "mask must be bool of shape"),
        (torch.ones(2, 3), {"mask": torch.ones(2)}, "mask must be bool of shape"),
        (torch.ones(2, 3), {"mask": torch.ones(2, dtype=torch.bool, device="meta")}, "on cpu, not .* on meta"),
        (torch.ones(2, 3), {"out": torch.ones(2)}, "out must be fp32 or fp64 of shape"),
        (torch.ones(2, 3), {"out": torch.ones(3, dtype=torch.float16)}, "out must be fp32 or fp64"),
    ],
)
def test_bad_input(x, kwargs, message):
    with pytest.raises(ValueError, match=message):
        autocorrelation_diag(x, **kwargs)
