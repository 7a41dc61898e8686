"""diagonal_metrics: every backend against hand-computed numbers and exact rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensilora.errors import NonFiniteError
from sensilora.ops import DiagonalMetrics, _backend, diagonal_metrics, diagonal_metrics_batch, use_backend
from sensilora.ops.diagonal_metrics import _diagonal_metrics, topk_count

OP = "diagonal_metrics"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def check(got, diag, k=0.5, alpha=0.85):
    """Against eqs. 8 to 10 in exact arithmetic; the threshold is allowed the rounding of fp64 sums."""
    values = sorted((Fraction(float(value)) for value in diag.flatten()), reverse=True)
    trace = sum(values, Fraction(0))
    count = topk_count(len(values), k)
    assert float(got.trace) == pytest.approx(float(trace), rel=1e-13, abs=0)
    assert float(got.topk_mean) == pytest.approx(float(sum(values[:count], Fraction(0)) / count), rel=1e-13, abs=0)
    effective_rank = int(got.effective_rank)
    if trace == 0:
        assert effective_rank == 0
        return
    needed, slack = Fraction(alpha) * trace, Fraction(1, 10**12)
    assert sum(values[:effective_rank], Fraction(0)) >= needed * (1 - slack)
    assert sum(values[: effective_rank - 1], Fraction(0)) < needed * (1 + slack)


def test_hand_computed(on_backend, device):
    # Sum 20; the two largest are 8 and 6, mean 7; 0.85 * 20 = 17 is reached by 8 + 6 + 4 = 18, so 3.
    diag = torch.tensor([4.0, 8.0, 2.0, 6.0], device=device)
    with on_backend(OP, torch.float32):
        got = diagonal_metrics(diag)
    assert (float(got.trace), float(got.topk_mean), int(got.effective_rank)) == (20.0, 7.0, 3)
    assert (got.trace.dtype, got.topk_mean.dtype, got.effective_rank.dtype) == (
        torch.float64,
        torch.float64,
        torch.int64,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 255, 1000, 4097])
@pytest.mark.parametrize(("k", "alpha"), [(0.5, 0.85), (1 / 3, 0.8), (1.0, 1.0), (1e-9, 0.01)])
def test_matches_exact_arithmetic(on_backend, device, dtype, size, k, alpha):
    diag = torch.randn(size).square().mul(torch.randn(size).mul(2).exp()).clamp(max=6e4).to(dtype)
    with on_backend(OP, dtype):
        got = diagonal_metrics(diag.to(device), k=k, alpha=alpha)
    check(got, diag, k, alpha)


EXTREMES = {
    "ties at the boundary": torch.tensor([1.0] * 100 + [2.0] * 7),
    "zeros": torch.zeros(50),
    "mostly zeros": torch.cat([torch.zeros(1000), torch.tensor([3.0, 1.0])]),
    "all equal": torch.full((777,), 0.1),
    "one huge value": torch.cat([torch.full((500,), 1e-3), torch.tensor([3e38])]),
    "subnormals": torch.arange(300) * 1e-45,
    "largest finite": torch.full((40,), torch.finfo(torch.float32).max),
    "one value": torch.tensor([5.0]),
    "many exponents": 2.0 ** torch.arange(-140, 120, dtype=torch.float32),
    "negative zero": torch.tensor([-0.0, 1.0, -0.0]),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("alpha", [0.5, 0.85, 1.0])
def test_extreme_values(on_backend, device, name, alpha):
    diag = EXTREMES[name].float()
    with on_backend(OP, torch.float32):
        got = diagonal_metrics(diag.to(device), alpha=alpha)
    check(got, diag, alpha=alpha)


def test_deterministic_algorithms(on_backend, device):
    diags = [torch.rand(4000, device=device, dtype=torch.float64), torch.rand(3, device=device, dtype=torch.float64)]
    torch.use_deterministic_algorithms(True)
    try:
        with on_backend(OP, torch.float64):
            got = diagonal_metrics_batch(diags)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(values.device == diags[0].device for values in got)
    for diag, metrics in zip(diags, each_of(got), strict=True):
        check(metrics, diag)


def test_empty_gives_zeros(on_backend, device):
    with on_backend(OP, torch.float32):
        got = diagonal_metrics(torch.empty(0, 3, device=device))
    assert [float(value) for value in got] == [0.0, 0.0, 0.0]


def each_of(metrics):
    return [DiagonalMetrics(*values) for values in zip(*metrics, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_matches_exact_arithmetic(on_backend, device, dtype, poisoned_empty):
    sizes = [0, 1, 31, 4097, 0, 700, 8192, 20001, 2]
    diags = [
        torch.randn(size).square().mul(torch.randn(size).mul(2).exp()).clamp(max=6e4).to(dtype) for size in sizes
    ]
    diags[5] = diags[5].reshape(7, 100).t()
    diags[7] = diags[7][1:]  # 16-byte loads cannot begin here
    with on_backend(OP, dtype):
        got = diagonal_metrics_batch([diag.to(device) for diag in diags], k=0.4, alpha=0.9)
    assert [values.shape for values in got] == [(len(diags),)] * 3
    for diag, metrics in zip(diags, each_of(got), strict=True):
        check(metrics, diag, 0.4, 0.9)


def test_batch_is_each_by_itself(on_backend, device):
    diags = [values.float().to(device) for values in EXTREMES.values()]
    with on_backend(OP, torch.float32):
        got = diagonal_metrics_batch(diags)
        for diag, metrics in zip(diags, each_of(got), strict=True):
            assert metrics == diagonal_metrics(diag)


@pytest.mark.parametrize(
    ("bad", "error"), [(float("nan"), NonFiniteError), (-1.0, ValueError)], ids=["not finite", "negative"]
)
def test_batch_names_the_bad_diagonal(on_backend, device, bad, error):
    diags = [torch.rand(size, device=device) for size in (100, 20000, 3)]
    diags[1][777] = bad
    with on_backend(OP, torch.float32), pytest.raises(error, match=r"^diags\[1\] holds a"):
        diagonal_metrics_batch(diags)


@pytest.mark.parametrize(
    ("diags", "message"),
    [
        ([], "at least one"),
        ([torch.ones(3), torch.ones(3).double()], "share a dtype"),
        ([torch.ones(3), torch.ones(3, dtype=torch.int32)], "must be floating-point"),
        ([torch.ones(3), torch.ones(3, device="meta")], "and a device"),
    ],
)
def test_bad_batches(diags, message):
    with pytest.raises(ValueError, match=message):
        diagonal_metrics_batch(diags)


# More values than a table of one pass may hold before it is emptied, and every value in one bin.
@pytest.mark.gpu
@pytest.mark.parametrize("value", [0.0, 0.1, 1.9999999])
def test_many_equal_values(on_backend, device, value):
    if device == "cpu":
        pytest.skip("a GPU's tables")
    size = 2**26 + 12345
    with on_backend(OP, torch.float32):
        got = diagonal_metrics(torch.full((size,), value, device=device))
    exact = Fraction(float(torch.tensor(value)))
    assert float(got.trace) == float(exact * size)
    assert float(got.topk_mean) == pytest.approx(float(exact), rel=1e-15)
    assert int(got.effective_rank) == (0 if value == 0 else pytest.approx(0.85 * size, abs=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_sums_agree_bit_for_bit(on_backend, backend, device, dtype):
    if backend == "torch" or (backend, device) == ("native", "cpu"):
        pytest.skip("compares exact sums with those in C++ on the CPU")
    reason = _backend.why_not(OP, "native", "cpu", dtype)
    if reason is not None:
        pytest.skip(reason)
    sizes = [1, 777, 2**20 + 5, 0, 4_000_003] if device == "cuda" else [1, 777, 5000]
    diags = [(torch.randn(size) * torch.randn(size)).square() for size in sizes] + list(EXTREMES.values())
    largest = torch.finfo(dtype).max
    diags = [diag.double().clamp(max=largest).to(dtype) for diag in diags]
    for alpha in (0.1, 0.85, 1.0) if device == "cuda" else (0.85,):
        with use_backend("native"):
            want = diagonal_metrics_batch(diags, alpha=alpha)
        with on_backend(OP, dtype):
            got = diagonal_metrics_batch([diag.to(device) for diag in diags], alpha=alpha)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


# 8.6 GB: counts and places beyond 31 bits.
@pytest.mark.gpu
def test_more_values_than_31_bits_count(on_backend, backend, device):
    if device == "cpu" or backend == "torch":
        pytest.skip("too slow, or more than a GPU's memory")
    size = 2**31 + 1000
    with on_backend(OP, torch.float32):
        diag = torch.ones(size, device=device)
        diag[-7:] = 4.0
        got = diagonal_metrics(diag)
    total, count = size + 21, topk_count(size, 0.5)
    assert float(got.trace) == total
    assert float(got.topk_mean) == (count + 21) / count
    assert int(got.effective_rank) == math.ceil(Fraction(0.85 * total)) - 21


def test_strided_and_shaped(on_backend, device):
    diag = torch.rand(6, 8, device=device)
    with on_backend(OP, torch.float32):
        check(diagonal_metrics(diag.t()[::2]), diag.t()[::2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 57, 999])
def test_non_finite_raises(on_backend, device, bad, place):
    diag = torch.rand(1000, device=device)
    diag[place] = bad
    with on_backend(OP, torch.float32), pytest.raises(NonFiniteError, match="NaN or Inf"):
        diagonal_metrics(diag)


def test_nan_beside_a_negative_value_is_non_finite(on_backend, device):
    with on_backend(OP, torch.float32), pytest.raises(NonFiniteError):
        diagonal_metrics(torch.tensor([float("nan"), -1.0, 2.0], device=device))


def test_negative_raises(on_backend, device):
    with on_backend(OP, torch.float32), pytest.raises(ValueError, match="negative value"):
        diagonal_metrics(torch.tensor([1.0, -1e-30, 2.0], device=device))


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=60),
    k=st.floats(0.01, 1.0),
    alpha=st.floats(0.01, 1.0),
)
def test_backends_agree_on_any_values(values, k, alpha):
    diag = torch.tensor(values, dtype=torch.float32)
    for name in _backend.backends_of(OP):
        if _backend.why_not(OP, name, "cpu", torch.float32) is None:
            with use_backend(name):
                check(diagonal_metrics(diag, k=k, alpha=alpha), diag, k, alpha)


def test_scaling_changes_no_effective_rank():
    diag = torch.rand(501)
    small = diagonal_metrics(diag)
    large = diagonal_metrics(diag * 2.0**40)
    assert int(small.effective_rank) == int(large.effective_rank)
    assert float(large.trace) == float(small.trace) * 2.0**40


def test_topk_count_guards_against_rounding():
    assert topk_count(100, 0.29) == 29
    assert topk_count(3, 1 / 3) == 1
    assert topk_count(5, 0.5) == 2
    assert topk_count(5, 1e-9) == 1


def test_gradients():
    diag = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    other = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: diagonal_metrics(d)[:2], diag)
    assert torch.autograd.gradcheck(lambda *ds: diagonal_metrics_batch(ds)[:2], (diag, other))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    diags = [torch.rand(shape, device=device, requires_grad=requires_grad) for shape in ((3, 5), (4,))]
    torch.library.opcheck(_diagonal_metrics, (diags, [7, 2], 0.85))


@pytest.mark.parametrize(
    ("diag", "kwargs", "message"),
    [
        (torch.ones(3), {"k": 0.0}, "k must be in"),
        (torch.ones(3), {"k": 1.5}, "k must be in"),
        (torch.ones(3), {"alpha": 0.0}, "alpha must be in"),
        (torch.ones(3), {"alpha": float("nan")}, "alpha must be in"),
        (torch.ones(3, dtype=torch.int64), {}, "must be floating-point"),
    ],
)
def test_bad_input(diag, kwargs, message):
    with pytest.raises(ValueError, match=message):
        diagonal_metrics(diag, **kwargs)
