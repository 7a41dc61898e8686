"""The native CPU ops called directly, against fp64 oracles: odd sizes, strides, poisoned outputs, threads, levels."""

import bisect
import importlib
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, pad

from sensilora.ops._dropout import dropout as reference_dropout
from sensilora.ops._dropout import keep_mask
from tests.tolerances import ACCUMULATED, RELATIVE, relative_error

if importlib.util.find_spec("sensilora._C") is None:
    pytest.skip("the native extension is not built here", allow_module_level=True)
importlib.import_module("sensilora._C")
OPS = torch.ops.sensilora_C

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PER_SEQUENCE, PER_POSITION = 0, 1


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def key(seed):
    return torch.tensor([seed])


@pytest.fixture
def threads():
    """Sets the number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def with_threads(threads, run):
    """The results of `run` on 1, 2 and 3 threads."""
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run())
    return results


# --- autocorrelation_diag


def autocorrelation(x, mask=None, out=None, accumulate=False):
    out = nan(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) if out is None else out
    OPS.autocorrelation_diag(x, mask, out, accumulate)
    return out


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (63, 17), (64, 16), (1000, 33), (5000, 3), (9, 1000)])
@pytest.mark.parametrize("masked", [False, True])
def test_autocorrelation(dtype, shape, masked):
    x = torch.randn(shape).to(dtype)
    mask = torch.rand(shape[0]) < 0.7 if masked else None
    oracle = (x if mask is None else x[mask]).double().square().sum(0)
    assert relative_error(autocorrelation(x, mask), oracle) <= 1e-7


def test_autocorrelation_ignores_what_masked_rows_hold():
    x = torch.randn(100, 9)
    mask = torch.rand(100) < 0.5
    x[~mask] = float("nan")
    assert relative_error(autocorrelation(x, mask), x[mask].double().square().sum(0)) <= 1e-7


@pytest.mark.parametrize("make", [lambda x: x[::3], lambda x: x[:, 4:9], lambda x: x.t(), lambda x: x[:, ::2]])
def test_autocorrelation_of_strided_input(make):
    x = make(torch.randn(40, 12))
    assert relative_error(autocorrelation(x), x.double().square().sum(0)) <= 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_autocorrelation_accumulates_and_overwrites(dtype, strided):
    x = torch.randn(50, 8)
    oracle = x.double().square().sum(0)
    out = torch.full((8, 2), 3.0, dtype=dtype)[:, 0] if strided else torch.full((8,), 3.0, dtype=dtype)
    assert relative_error(autocorrelation(x, out=out, accumulate=True), oracle + 3) <= 1e-7
    assert relative_error(autocorrelation(x, out=out), oracle) <= 1e-7


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_autocorrelation_of_nothing(shape):
    assert autocorrelation(torch.randn(shape)).tolist() == [0.0] * shape[1]
    kept = torch.ones(shape[1])
    assert torch.equal(autocorrelation(torch.randn(shape), out=kept, accumulate=True), torch.ones(shape[1]))


def test_autocorrelation_of_extreme_values():
    # Squares that overflow or vanish in fp32 are summed in fp64.
    x = torch.tensor([[1e25, 1e-25], [1e25, 1e-25]])
    out = autocorrelation(x, out=nan(2, dtype=torch.float64))
    assert relative_error(out, x.double().square().sum(0)) <= 1e-12


def test_autocorrelation_does_not_depend_on_threads(threads):
    x = torch.randn(5001, 130)
    first, *others = with_threads(threads, lambda: autocorrelation(x))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("x", "mask", "out", "message"),
    [
        (torch.ones(3), None, torch.ones(3), "x must have 2 dimensions"),
        (torch.ones(3, 2, dtype=torch.int32), None, torch.ones(2), "x must be float32"),
        (torch.ones(3, 2), torch.ones(2, dtype=torch.bool), torch.ones(2), "mask must be bool of shape"),
        (torch.ones(3, 2), torch.ones(3), torch.ones(2), "mask must be bool"),
        (torch.ones(3, 2), None, torch.ones(3), "out must have shape"),
        (torch.ones(3, 2), None, torch.ones(2, dtype=torch.float16), "out must be float32 or float64"),
    ],
)
def test_autocorrelation_bad_input(x, mask, out, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.autocorrelation_diag(x, mask, out, False)


# --- fisher_diag


def fisher(x, grad, lengths, mode, out=None, accumulate=False):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = nan(grad.shape[1], x.shape[1], dtype=wide) if out is None else out
    OPS.fisher_diag(x, grad, torch.tensor(lengths, dtype=torch.int64), mode, out, accumulate)
    return out


def fisher_oracle(x, grad, lengths, mode):
    x, grad = x.double(), grad.double()
    if mode == PER_POSITION:
        return grad.square().T @ x.square()
    pairs = zip(grad.split(lengths), x.split(lengths), strict=True)
    return sum(((g.T @ v).square() for g, v in pairs), torch.zeros(grad.shape[1], x.shape[1], dtype=torch.float64))


MODES = pytest.mark.parametrize("mode", [PER_SEQUENCE, PER_POSITION])


@MODES
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (12, 32), (13, 33), (47, 100), (230, 300)])
@pytest.mark.parametrize("lengths", [[1], [3, 1, 2], [17, 0, 64, 5]])
def test_fisher(mode, dtype, shape, lengths):
    out_features, in_features = shape
    x, grad = torch.randn(sum(lengths), in_features).to(dtype), torch.randn(sum(lengths), out_features).to(dtype)
    got = fisher(x, grad, lengths, mode)
    assert relative_error(got, fisher_oracle(x, grad, lengths, mode)) <= ACCUMULATED[dtype]


@MODES
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lengths", [[600], [128, 129, 1, 400]])
def test_fisher_of_sequences_longer_than_a_pass(mode, dtype, lengths):
    x, grad = torch.randn(sum(lengths), 37).to(dtype), torch.randn(sum(lengths), 14).to(dtype)
    assert relative_error(fisher(x, grad, lengths, mode), fisher_oracle(x, grad, lengths, mode)) <= ACCUMULATED[dtype]


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
def test_fisher_accumulates_and_overwrites(mode, dtype, out_dtype):
    lengths = [4, 9]
    x, grad = torch.randn(13, 40).to(dtype), torch.randn(13, 20).to(dtype)
    oracle = fisher_oracle(x, grad, lengths, mode)
    out = torch.full((20, 40), 2.0, dtype=out_dtype)
    assert relative_error(fisher(x, grad, lengths, mode, out, accumulate=True), oracle + 2) <= 1e-6
    assert relative_error(fisher(x, grad, lengths, mode, out), oracle) <= 1e-6


@MODES
def test_fisher_of_strided_input(mode):
    x, grad = torch.randn(22, 50)[::2, 3:40], torch.randn(9, 11).t()
    assert relative_error(fisher(x, grad, [4, 7], mode), fisher_oracle(x, grad, [4, 7], mode)) <= 1e-6


@MODES
@pytest.mark.parametrize(("tokens", "lengths"), [(0, []), (0, [0, 0])])
def test_fisher_of_nothing(mode, tokens, lengths):
    assert torch.equal(fisher(torch.ones(tokens, 3), torch.ones(tokens, 2), lengths, mode), torch.zeros(2, 3))
    assert fisher(torch.ones(4, 0), torch.ones(4, 2), [4], mode).shape == (2, 0)
    assert fisher(torch.ones(4, 3), torch.ones(4, 0), [4], mode).shape == (0, 3)


def test_fisher_squares_small_half_precision_gradients_without_underflow():
    grad = torch.full((2, 3), 1e-5, dtype=torch.float16)
    x = torch.full((2, 4), 1e-3, dtype=torch.float16)
    for mode in (PER_SEQUENCE, PER_POSITION):
        assert relative_error(fisher(x, grad, [2], mode), fisher_oracle(x, grad, [2], mode)) <= 1e-5


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fisher_does_not_depend_on_threads(threads, mode, dtype):
    x, grad = torch.randn(90, 600).to(dtype), torch.randn(90, 410).to(dtype)
    first, *others = with_threads(threads, lambda: fisher(x, grad, [40, 50], mode))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("lengths", "mode", "out", "message"),
    [
        ([4], 0, torch.ones(2, 3), "lengths sum to 4, x has 5 rows"),
        ([6, -1], 0, torch.ones(2, 3), "lengths must not be negative"),
        ([5], 2, torch.ones(2, 3), "mode must be 0 or 1"),
        ([5], 0, torch.ones(3, 2), "out must be contiguous, of shape"),
        ([5], 0, torch.ones(3, 2).t(), "out must be contiguous"),
    ],
)
def test_fisher_bad_input(lengths, mode, out, message):
    with pytest.raises(RuntimeError, match=message):
        fisher(torch.ones(5, 3), torch.ones(5, 2), lengths, mode, out)


def test_fisher_needs_one_dtype():
    with pytest.raises(RuntimeError, match="must share a dtype"):
        fisher(torch.ones(5, 3), torch.ones(5, 2).double(), [5], 0)


# --- diagonal_metrics


def metrics(diag, count, alpha):
    """(trace, mean of the largest, effective rank) of one diagonal."""
    return tuple(value.item() for value in OPS.diagonal_metrics([diag], [count], alpha))


def check_metrics(diag, cuts):
    """Each (count, alpha) of `cuts` against exact sums, in integers of 2^-149; the threshold is a rounded product."""
    values = sorted((int(Fraction(value) * 2**149) for value in diag.double().tolist()), reverse=True)
    reached = list(itertools.accumulate(values))
    total = float(Fraction(reached[-1], 2**149))
    for count, alpha in cuts:
        needed = min(Fraction(alpha * total) * 2**149, reached[-1])
        want = (
            total,
            float(Fraction(reached[count - 1], 2**149)) / count,
            bisect.bisect_left(reached, needed) + 1 if total else 0,
        )
        assert metrics(diag, count, alpha) == want


# 2^14 is where the method changes, 2^20 the size of a chunk.
@pytest.mark.parametrize("size", [1, 2, 777, 2**14 - 1, 2**14, 30011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_metrics_are_exact(size, dtype):
    diag = (torch.randn(size).square() * torch.randn(size).mul(3).exp()).clamp(max=6e4).to(dtype)
    check_metrics(diag, [(max(1, size // 2), 0.85), (size, 1.0), (1, 0.001)])


@pytest.mark.parametrize("repeat", [1, 200])
@pytest.mark.parametrize(
    "values",
    [
        [0.0] * 99,
        [0.1] * 99,
        [1.0] * 90 + [2.0] * 9,
        [3.0, 1.0] + [0.0] * 97,
        [3.4e38] * 99,
        [3e38] + [1e-40] * 98,
        [1e-45 * i for i in range(99)],
        [-0.0, 5.0] * 50,
        [2.0**e for e in range(-140, 120, 3)],
        [1.0 + 2.0**-23 * (i % 3) for i in range(99)],
    ],
    ids=["zeros", "equal", "ties", "two", "largest", "huge and tiny", "subnormal", "minus zero", "wide", "close"],
)
def test_metrics_of_extreme_values(values, repeat):
    diag = torch.tensor(values * repeat)
    check_metrics(diag, itertools.product((1, len(diag) // 2, len(diag)), (0.5, 0.85, 1.0)))


def test_metrics_of_two_chunks_match_sorting(threads):
    diag = torch.randn(2**20 + 1234).square()
    values = diag.double().sort(descending=True).values
    reached = values.cumsum(0)
    results = with_threads(threads, lambda: metrics(diag, 500_000, 0.85))
    assert results[0] == results[1] == results[2]
    trace, topk_mean, effective_rank = results[0]
    assert trace == pytest.approx(float(reached[-1]), rel=1e-11)
    assert topk_mean == pytest.approx(float(values[:500_000].mean()), rel=1e-11)
    assert effective_rank == int((reached < 0.85 * trace).sum()) + 1


@pytest.mark.parametrize("size", [100, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bad", "code"), [(float("nan"), -1), (float("inf"), -1), (float("-inf"), -1), (-1e-6, -2), (-3.0, -2)]
)
def test_invalid_diagonals_are_told_by_a_code(size, dtype, bad, code):
    diag = torch.rand(size).to(dtype)
    diag[size // 3] = bad
    trace, topk_mean, effective_rank = metrics(diag, 10, 0.85)
    assert effective_rank == code
    assert math.isnan(trace)
    assert math.isnan(topk_mean)


@pytest.mark.parametrize("size", [100, 20000])
def test_non_finite_comes_before_negative(size):
    diag = torch.rand(size)
    diag[3], diag[7] = -1.0, float("nan")
    assert metrics(diag, 10, 0.85)[2] == -1


def test_metrics_of_nothing():
    assert metrics(torch.empty(0), 1, 0.85) == (0.0, 0.0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_metrics_of_a_batch_are_those_of_each(threads, dtype):
    diags = [torch.rand(size).square().to(dtype) for size in (0, 1, 31, 2**14 - 1, 2**14, 0, 30011, 777)]
    counts = [max(1, diag.numel() // 3) for diag in diags]
    diags[1][0] = -1.0
    diags[6][9] = float("inf")
    singles = [metrics(diag, count, 0.85) for diag, count in zip(diags, counts, strict=True)]
    for trace, topk_mean, effective_rank in with_threads(threads, lambda: OPS.diagonal_metrics(diags, counts, 0.85)):
        for i, single in enumerate(singles):
            got = (trace[i].item(), topk_mean[i].item(), effective_rank[i].item())
            assert got == pytest.approx(single, rel=0, abs=0, nan_ok=True)
    assert [single[2] for single in singles][1::5] == [-2, -1]


@pytest.mark.parametrize(
    ("diags", "counts", "alpha", "message"),
    [
        ([torch.ones(3)], [0], 0.5, "count must be in"),
        ([torch.ones(9), torch.ones(3)], [4, 4], 0.5, "count must be in"),
        ([torch.ones(3)], [1], 0.0, "alpha must be in"),
        ([torch.ones(3)], [1], float("nan"), "alpha must be in"),
        ([torch.ones(3, 1)], [1], 0.5, "diags must have 1 dimension"),
        ([torch.ones(3).double()], [1], 0.5, "diags must be float32, bfloat16 or float16"),
        ([torch.ones(3), torch.ones(3).half()], [1, 1], 0.5, "diags must share a dtype"),
        ([torch.ones(3), torch.ones(3)], [1], 0.5, "a count for each of 2 diags, not 1"),
    ],
)
def test_metrics_bad_input(diags, counts, alpha, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.diagonal_metrics(diags, counts, alpha)


# --- dropout


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 128), (4, 129), (9, 300)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize("seed", [0, 12345, 2**40 + 7, -1])
def test_dropout_is_the_reference_mask(device, dtype, shape, p, seed):
    x = torch.randn(shape).to(device, dtype)
    got = OPS.dropout(x, p, key(seed).to(device))
    assert torch.equal(got == 0, ~keep_mask(*shape, p, seed, device) | (x == 0))
    assert relative_error(got, reference_dropout(x.double(), p, seed)) <= RELATIVE[dtype]


def test_dropout_drops_nan_too(device):
    got = OPS.dropout(nan(20, 20).to(device), 0.5, key(1).to(device))
    assert torch.equal(got == 0, ~keep_mask(20, 20, 0.5, 1, device))


def test_dropout_of_strided_rows_and_threads(threads):
    x = torch.randn(600, 200)[::2, 10:150]
    first, *others = with_threads(threads, lambda: OPS.dropout(x, 0.3, key(9)))
    assert torch.equal(first, OPS.dropout(x.contiguous(), 0.3, key(9)))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_dropout_bad_probability(p):
    with pytest.raises(RuntimeError, match="dropout probability must be in"):
        OPS.dropout(torch.ones(2, 2), p, key(0))


@pytest.mark.parametrize("seed", [torch.tensor([1.0]), torch.tensor([1, 2]), torch.tensor(1, dtype=torch.int32)])
def test_dropout_bad_seed(seed):
    with pytest.raises(RuntimeError, match="seed must be an int64 tensor of one element on x's device"):
        OPS.dropout(torch.ones(2, 2), 0.5, seed)


# --- lora_linear

SHAPES = [(1, 1, 1, 1), (5, 7, 3, 2), (33, 40, 17, 9), (64, 128, 96, 16), (4, 6, 5, 0), (0, 6, 5, 2), (3, 4, 5, 4)]


def lora_tensors(shape, dtype):
    tokens, in_features, out_features, rank = shape
    sizes = [(tokens, in_features), (out_features, in_features), (out_features,), (rank, in_features)]
    sizes += [(out_features, rank), (tokens, out_features)]
    return [torch.randn(size).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_lora_linear_and_its_gradients(dtype, shape, p, with_bias):
    x, weight, bias, lora_A, lora_B, grad = lora_tensors(shape, dtype)
    bias = bias if with_bias else None
    y, h = OPS.lora_linear(x, weight, bias, lora_A, lora_B, 0.7, p, key(11))
    grad_x, grad_A, grad_B = OPS.lora_linear_backward(grad, x, h, weight, lora_A, lora_B, 0.7, p, key(11), True)

    leaves = [tensor.double().requires_grad_() for tensor in (x, lora_A, lora_B)]
    # The mask and its scale, which have tests of their own.
    dropped = leaves[0] * OPS.dropout(torch.ones(x.shape, dtype=torch.float64), p, key(11))
    oracle_h = linear(dropped, leaves[1])
    oracle = linear(leaves[0], weight.double(), None if bias is None else bias.double()) + 0.7 * linear(
        oracle_h, leaves[2]
    )
    oracle_grads = torch.autograd.grad(oracle, leaves, grad.double())
    rank = shape[-1]
    assert h.shape[1] == -(-rank // 16) * 16
    assert not h[:, rank:].any()
    for got, want in zip((y, h[:, :rank], grad_x, grad_A, grad_B), (oracle, oracle_h, *oracle_grads), strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) <= RELATIVE[dtype]


def test_lora_linear_takes_a_transposed_weight():
    x, weight, bias, lora_A, lora_B, _ = lora_tensors((9, 8, 6, 2), torch.float32)
    got = OPS.lora_linear(x, weight.t().contiguous().t(), bias, lora_A, lora_B, 0.5, 0.2, key(3))
    want = OPS.lora_linear(x, weight, bias, lora_A, lora_B, 0.5, 0.2, key(3))
    assert all(relative_error(a, b) <= 1e-6 for a, b in zip(got, want, strict=True))


def test_lora_linear_backward_without_the_inputs_gradient():
    x, weight, bias, lora_A, lora_B, grad = lora_tensors((9, 8, 6, 2), torch.float32)
    _, h = OPS.lora_linear(x, weight, bias, lora_A, lora_B, 0.5, 0.2, key(3))
    full = OPS.lora_linear_backward(grad, x, h, weight, lora_A, lora_B, 0.5, 0.2, key(3), True)
    part = OPS.lora_linear_backward(grad, x, h, weight, lora_A, lora_B, 0.5, 0.2, key(3), False)
    assert part[0].numel() == 0
    assert torch.equal(part[1], full[1])
    assert torch.equal(part[2], full[2])


def test_lora_linear_takes_an_expanded_upstream_gradient():
    x, weight, _, lora_A, lora_B, _ = lora_tensors((9, 8, 6, 2), torch.float32)
    grad = torch.ones(()).expand(9, 6)
    h = pad(x @ lora_A.T, (0, 14))
    got = OPS.lora_linear_backward(grad, x, h, weight, lora_A, lora_B, 0.5, 0.0, None, True)
    want = OPS.lora_linear_backward(grad.contiguous(), x, h, weight, lora_A, lora_B, 0.5, 0.0, None, True)
    assert all(relative_error(a, b) <= 1e-6 for a, b in zip(got, want, strict=True))


def test_the_native_op_itself_is_not_differentiable():
    # sensilora::lora_linear has the gradient formula; torch's own ops inside the native one must not add another.
    x, weight, bias, lora_A, lora_B, _ = lora_tensors((9, 8, 6, 2), torch.float32)
    _, h = OPS.lora_linear(x, weight, bias, lora_A.requires_grad_(), lora_B, 0.5, 0.0, None)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        h.sum().backward()
    assert lora_A.grad is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(6, 7)}, "weight has 7 columns, x has 8"),
        ({"lora_A": torch.ones(2, 7)}, "lora_A has 7 columns"),
        ({"lora_B": torch.ones(6, 3)}, "lora_B must have shape"),
        ({"bias": torch.ones(5)}, "bias must have shape"),
        ({"x": torch.ones(9, 8).double()}, "x and weight must share a dtype"),
        ({"x": torch.ones(8)}, "must have 2 dimensions"),
    ],
)
def test_lora_linear_bad_input(change, message):
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    tensors = dict(zip(names, lora_tensors((9, 8, 6, 2), torch.float32), strict=False)) | change
    with pytest.raises(RuntimeError, match=message):
        OPS.lora_linear(*tensors.values(), 0.5, 0.0, None)


def test_lora_linear_dropout_needs_a_seed():
    tensors = lora_tensors((9, 8, 6, 2), torch.float32)[:-1]
    with pytest.raises(RuntimeError, match="dropout needs a seed"):
        OPS.lora_linear(*tensors, 0.5, 0.1, None)


@pytest.mark.parametrize("adapter_dtype", FLOATS)
def test_lora_linear_gradients_come_in_the_adapters_dtype(adapter_dtype):
    x, weight, bias, lora_A, lora_B, grad = lora_tensors((9, 8, 6, 2), torch.bfloat16)
    lora_A, lora_B = lora_A.to(adapter_dtype), lora_B.to(adapter_dtype)
    _, h = OPS.lora_linear(x, weight, bias, lora_A, lora_B, 0.5, 0.0, None)
    grad_x, grad_A, grad_B = OPS.lora_linear_backward(grad, x, h, weight, lora_A, lora_B, 0.5, 0.0, None, True)
    assert (h.dtype, grad_x.dtype) == (x.dtype, x.dtype)
    assert (grad_A.dtype, grad_B.dtype) == (adapter_dtype, adapter_dtype)


# --- levels of vector instructions


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_lower_cpu_levels(level):
    """The tests above again with fewer vector instructions, in another process: the level is fixed at first use."""
    if "SENSILORA_CPU" in os.environ:
        pytest.skip("this is the run at another level")
    levels = ["baseline", "avx2", "avx512", "avx512bf16"]
    if levels.index(level) >= levels.index(importlib.import_module("sensilora._C").cpu_level()):
        pytest.skip(f"{level} is not below the level of this machine")
    selection = "(fisher and not longer) or autocorrelation or dropout_is or dropout_of"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection, __file__],
        env=os.environ | {"SENSILORA_CPU": level},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
