"""lora_segments: every backend against an fp64 loop over the segments, isolation of adapters, and registration."""

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

from benchmarks.harness import captured
from sensilora.errors import BackendError
from sensilora.ops import _backend, lora_linear, lora_segments, use_backend
from sensilora.ops._dropout import keep_mask, keep_scale
from sensilora.ops.lora_segments import _lora_segments, _lora_segments_backward, _tables
from tests.tolerances import RELATIVE, relative_error

OP = "lora_segments"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = ("y", "x", "lora_A", "lora_B")
SEED = 2**40 + 3

# rows, ranks, offsets, adapters
CASES = {
    "one segment": (9, [3], [0, 9], [0]),
    "uneven": (40, [1, 7, 33], [0, 3, 5, 40], [0, 1, 2]),
    "unsorted and repeated": (60, [2, 5, 16, 9], [0, 10, 11, 30, 31, 47, 60], [3, 0, 2, 0, 1, 3]),
    "one adapter in scattered segments": (50, [4, 6], [0, 7, 20, 22, 40, 50], [1, 0, 1, 0, 1]),
    "empty and single-row segments": (12, [5, 3, 8], [0, 0, 1, 1, 2, 11, 11, 12, 12], [2, 0, 1, 1, 2, 0, 0, 2]),
    "rows outside every segment": (30, [4, 2], [5, 9, 21], [1, 0]),
    "base rows between": (30, [4, 2], [0, 6, 12, 18, 30], [0, -1, 1, -1]),
    "all on the base layer": (10, [4, 2], [0, 4, 10], [-1, -1]),
    "no segments": (10, [4, 2], [0], []),
    "rank 0 among them": (20, [0, 3, 0, 5], [0, 5, 10, 15, 20], [0, 1, 2, 3]),
    "an adapter without rows": (20, [6, 3, 11], [0, 8, 20], [2, 0]),
    "large ranks": (150, [70, 200, 1, 64, 65], [0, 20, 50, 51, 100, 150], [0, 1, 2, 3, 4]),
    "a row each": (17, list(range(17)), list(range(18)), [(5 * i) % 17 for i in range(17)]),
}


def make(rows, in_features, out_features, ranks, dtype, device, adapter_dtype=None, bias=True):
    adapter_dtype = adapter_dtype or dtype
    tensors = (
        (torch.randn(rows, in_features), dtype),
        (torch.randn(out_features, in_features) / in_features**0.5, dtype),
        (torch.randn(out_features) if bias else None, dtype),
        (torch.randn(sum(ranks), in_features) / in_features**0.5, adapter_dtype),
        (torch.randn(out_features, sum(ranks)), adapter_dtype),
    )
    return [None if tensor is None else tensor.to(device, kind) for tensor, kind in tensors]


def on(device, offsets, adapters):
    return [torch.tensor(values, dtype=torch.int64, device=device) for values in (offsets, adapters)]


def scales(ranks):
    return [0.5 + 0.25 * index for index in range(len(ranks))]


def results(function, tensors, upstream):
    """y and the gradients of x, lora_A and lora_B."""
    x, weight, bias, lora_A, lora_B = tensors
    x, lora_A, lora_B = (tensor.detach().clone().requires_grad_() for tensor in (x, lora_A, lora_B))
    y = function(x, weight, bias, lora_A, lora_B)
    y.backward(upstream.to(y))
    return y.detach(), x.grad, lora_A.grad, lora_B.grad


def oracle(tensors, upstream, ranks, scalings, offsets, adapters, ps, seed=SEED):
    """A loop over the segments in fp64 with stored masks, differentiated by autograd."""
    tensors = [None if tensor is None else tensor.detach().cpu().double() for tensor in tensors]

    def formula(x, weight, bias, lora_A, lora_B):
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        # Depends on both, so that adapters without rows have the gradient zero and not none.
        delta = torch.zeros(rows.shape[0], weight.shape[0]).double() + 0 * (lora_A.sum() + lora_B.sum())
        As, Bs = lora_A.split(ranks), lora_B.split(ranks, dim=1)
        for first, last, i in zip(offsets, offsets[1:], adapters, strict=False):
            if i < 0 or first == last:
                continue
            kept = keep_mask(*rows.shape, ps[i], seed)[first:last]
            dropped = rows[first:last] * kept * keep_scale(ps[i])
            delta[first:last] = scalings[i] * linear(linear(dropped, As[i]), Bs[i])
        return linear(x, weight, bias) + delta.reshape(*x.shape[:-1], weight.shape[0])

    return results(formula, tensors, upstream.cpu().double())


def run(tensors, upstream, ranks, scalings, segments, ps=0.0, seed=SEED):
    return results(
        lambda *t: lora_segments(*t, ranks, scalings, *segments, dropout_ps=ps, seed=seed), tensors, upstream
    )


def check(tensors, upstream, ranks, offsets, adapters, ps, tolerance):
    device = tensors[0].device
    got = run(tensors, upstream, ranks, scales(ranks), on(device, offsets, adapters), ps)
    expected = oracle(tensors, upstream.to(tensors[0].dtype), ranks, scales(ranks), offsets, adapters, ps)
    for name, value, reference in zip(NAMES, got, expected, strict=True):
        assert relative_error(value, reference) <= tolerance, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_match_a_loop_over_segments(on_backend, device, dtype, case):
    rows, ranks, offsets, adapters = CASES[case]
    tensors = make(rows, 40, 24, ranks, dtype, device)
    with on_backend(OP, dtype):
        check(tensors, torch.randn(rows, 24), ranks, offsets, adapters, [0.0] * len(ranks), 4 * RELATIVE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(33, 17), (40, 24), (1, 1)])
def test_each_adapter_has_its_own_dropout(on_backend, device, dtype, sizes):
    ranks, ps = [4, 9, 2, 17, 3], [0.0, 0.05, 1.0, 0.5, 0.05]
    offsets, adapters = [0, 13, 20, 28, 60, 61, 75, 80], [1, 0, 2, 3, 1, -1, 4]
    tensors = make(83, *sizes, ranks, dtype, device)
    with on_backend(OP, dtype):
        check(tensors, torch.randn(83, sizes[1]), ranks, offsets, adapters, ps, 4 * RELATIVE[dtype])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_rows_are_as_lora_linear_gives_them_on_the_whole_batch(on_backend, device, p):
    ranks, offsets, adapters = [3, 8, 5], [0, 10, 25, 30], [1, 2, 0]
    tensors = make(30, 40, 24, ranks, torch.float32, device)
    *base, lora_A, lora_B = tensors
    with on_backend(OP, torch.float32):
        y = lora_segments(*tensors, ranks, scales(ranks), *on(device, offsets, adapters), dropout_ps=p, seed=9)
    for first, last, i in zip(offsets, offsets[1:], adapters, strict=False):
        own_A, own_B = lora_A.split(ranks)[i], lora_B.split(ranks, dim=1)[i]
        alone = lora_linear(*base, own_A, own_B, scales(ranks)[i], dropout_p=p, seed=9)
        assert relative_error(y[first:last], alone[first:last]) <= 1e-6


def test_the_seed_may_be_a_number_or_a_tensor(on_backend, device):
    segments = on(device, [0, 10, 30], [1, 0])
    tensors = make(30, 40, 24, [3, 5], torch.float32, device)
    with on_backend(OP, torch.float32):
        first, *others = (
            lora_segments(*tensors, [3, 5], [1.0, 2.0], *segments, dropout_ps=0.5, seed=seed)
            for seed in (9, torch.tensor(9, device=device), torch.tensor([9], device=device), 10)
        )
    assert [torch.equal(first, other) for other in others] == [True, True, False]


@pytest.mark.parametrize("seed", [2**63 + 5, -(2**63) - 1, -3])
def test_any_whole_number_is_a_seed(on_backend, device, seed):
    ranks, segments = np.array([3, 5]), on(device, [0, 10, 30], [1, 0])
    tensors = make(30, 40, 24, [3, 5], torch.float32, device)
    upstream = torch.randn(30, 24)
    # The key has 64 bits.
    expected = oracle(tensors, upstream, [3, 5], [1.0, 2.0], [0, 10, 30], [1, 0], [0.5] * 2, seed % 2**64)
    with on_backend(OP, torch.float32):
        got = results(
            lambda *t: lora_segments(*t, ranks, [1.0, 2.0], *segments, dropout_ps=0.5, seed=seed), tensors, upstream
        )
    for name, value, reference in zip(NAMES, got, expected, strict=True):
        assert relative_error(value, reference) <= 4 * RELATIVE[torch.float32], name


def test_leading_dimensions_fold_into_rows(on_backend, device):
    ranks, offsets, adapters = [3, 5], [0, 4, 11, 24], [1, 0, 1]
    tensors = make(24, 10, 7, ranks, torch.float32, device)
    tensors[0] = tensors[0].reshape(2, 3, 4, 10)
    with on_backend(OP, torch.float32):
        check(tensors, torch.randn(2, 3, 4, 7), ranks, offsets, adapters, [0.1, 0.2], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_over_a_16_bit_base(on_backend, device, dtype):
    ranks, offsets, adapters = [3, 5], [0, 10, 15, 24], [1, 0, 1]
    tensors = make(24, 16, 12, ranks, dtype, device, adapter_dtype=torch.float32, bias=False)
    with on_backend(OP, dtype):
        got = run(tensors, torch.ones(24, 12), ranks, scales(ranks), on(device, offsets, adapters))
        check(tensors, torch.randn(24, 12), ranks, offsets, adapters, [0.0, 0.0], 4 * RELATIVE[dtype])
    assert [value.dtype for value in got] == [dtype, dtype, torch.float32, torch.float32]


def test_gradients_of_many_16_bit_segments_are_rounded_once(on_backend, device):
    # 512 single rows summed one by one in bf16 would lose half the digits.
    ranks, adapters = [4, 4], [0, 1] * 256
    tensors = make(512, 32, 24, ranks, torch.bfloat16, device)
    with on_backend(OP, torch.bfloat16):
        check(tensors, torch.ones(512, 24), ranks, list(range(513)), adapters, [0.0, 0.0], RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_no_rows(on_backend, device, shape):
    tensors = make(0, 6, 5, [3, 2], torch.float32, device)
    tensors[0] = tensors[0].reshape(shape)
    with on_backend(OP, torch.float32):
        y, grad_x, grad_A, grad_B = run(
            tensors, torch.ones(*shape[:-1], 5), [3, 2], [1.0, 1.0], on(device, [0, 0, 0], [1, 0]), 0.5
        )
    assert (y.shape, grad_x.shape) == ((*shape[:-1], 5), shape)
    assert not grad_A.any()
    assert not grad_B.any()


def test_no_adapters(on_backend, device):
    tensors = make(6, 8, 5, [], torch.float32, device)
    with on_backend(OP, torch.float32):
        y = run(tensors, torch.ones(6, 5), [], [], on(device, [0, 6], [-1]))[0]
    torch.testing.assert_close(y, linear(*tensors[:3]))


def test_numbers_that_are_no_adapters_take_the_base_layer(on_backend, device):
    ranks, segments = [3, 5], on(device, [0, 4, 8, 12], [7, 1, -5])
    tensors = make(12, 8, 6, ranks, torch.float32, device)
    with on_backend(OP, torch.float32):
        y, _, grad_A, _ = run(tensors, torch.ones(12, 6), ranks, [1.0, 1.0], segments)
    base = linear(*tensors[:3])
    torch.testing.assert_close(y[:4], base[:4])
    torch.testing.assert_close(y[8:], base[8:])
    assert not torch.allclose(y[4:8], base[4:8])
    assert not grad_A[:3].any()


def test_offsets_past_the_last_row_are_cut_off(on_backend, device):
    ranks, adapters = [3, 5], [0, 1, 0]
    tensors = make(12, 8, 6, ranks, torch.float32, device)
    with on_backend(OP, torch.float32):
        got, wanted = (
            run(tensors, torch.ones(12, 6), ranks, [1.0, 2.0], on(device, offsets, adapters))
            for offsets in ([0, 5, 40, 90], [0, 5, 12, 12])
        )
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_offsets_before_the_first_row_are_cut_off(on_backend, device):
    def behind_nan(*shape):
        """A contiguous tensor with NaN before it in memory: what is read there would show."""
        return torch.cat([torch.full((20, shape[1]), float("nan")), torch.randn(shape)]).to(device)[20:]

    ranks, adapters = [3, 5], [0, 1, 0]
    _, weight, bias, lora_A, lora_B = make(12, 8, 6, ranks, torch.float32, device)
    x, grad, h = behind_nan(12, 8), behind_nan(12, 6), behind_nan(12, 16)
    layer, settings = (weight, lora_A, lora_B), (ranks, [1.0, 2.0], [0.0, 0.0])
    with on_backend(OP, torch.float32):
        got, wanted = (
            (
                _lora_segments(x, weight, bias, lora_A, lora_B, *settings, *segments, None)[0],
                *_lora_segments_backward(grad, x, h, *layer, *settings, *segments, None, True),
            )
            for segments in (on(device, offsets, adapters) for offsets in ([-9, -4, 5, 12], [0, 0, 5, 12]))
        )
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_segments_of_int32(on_backend, device):
    tensors = make(12, 8, 6, [3, 5], torch.float32, device)
    segments = on(device, [0, 5, 12], [1, 0])
    with on_backend(OP, torch.float32):
        wide, narrow = (
            lora_segments(*tensors, [3, 5], [1.0, 2.0], *(tensor.to(kind) for tensor in segments))
            for kind in (torch.int64, torch.int32)
        )
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_nan_stays_in_its_rows_and_its_adapter(on_backend, device, p):
    ranks, offsets, adapters = [3, 40, 5, 2], [0, 10, 17, 30, 33, 40], [2, 1, 0, 1, -1]
    tensors = make(40, 24, 16, ranks, torch.float32, device)
    poisoned = [tensor.clone() for tensor in tensors]
    bad = torch.zeros(40, dtype=torch.bool)
    bad[10:17] = bad[30:33] = True
    poisoned[0][bad] = float("nan")
    upstream = torch.randn(40, 16)
    # The last adapter has no rows and has diverged.
    poisoned[3][48:], poisoned[4][:, 48:] = float("nan"), float("inf")
    own = torch.zeros(50, dtype=torch.bool)
    own[3:43] = True
    with on_backend(OP, torch.float32):
        clean, got = (
            run(t, upstream, ranks, scales(ranks), on(device, offsets, adapters), p) for t in (tensors, poisoned)
        )
    for value, wanted, dirty in zip(got[:3], clean[:3], (bad, bad, own), strict=True):
        assert torch.equal(value[~dirty], wanted[~dirty])
    assert torch.equal(got[3][:, ~own], clean[3][:, ~own])
    assert got[0][bad].isnan().all()
    assert got[2][own].isnan().any()


def test_adapters_without_rows_get_zero_gradients(on_backend, device, poisoned_empty):
    ranks = [3, 70, 4]
    tensors = make(20, 24, 16, ranks, torch.float32, device)
    with on_backend(OP, torch.float32):
        _, _, grad_A, grad_B = run(tensors, torch.ones(20, 16), ranks, scales(ranks), on(device, [0, 9, 20], [2, 2]))
    assert not grad_A[:73].any()
    assert not grad_B[:, :73].any()
    assert grad_A[73:].any()


def test_outputs_are_all_written(on_backend, device, poisoned_empty):
    rows, ranks, offsets, adapters = CASES["unsorted and repeated"]
    tensors = make(rows + 3, 13, 7, ranks, torch.float32, device)
    with on_backend(OP, torch.float32):
        got = run(tensors, torch.ones(rows + 3, 7), ranks, scales(ranks), on(device, offsets, adapters), 0.3)
    assert all(torch.isfinite(value).all() for value in got)


def test_native_h_is_zero_where_no_rank_is():
    # oneDNN's bf16 product on CPUs with AMX reads behind the columns it is given: NaN there made y NaN.
    if (reason := _backend.why_not(OP, "native", "cpu", torch.bfloat16)) is not None:
        pytest.skip(reason)
    rows, ranks, offsets, adapters = CASES["large ranks"]
    tensors = make(rows, 25, 277, ranks, torch.bfloat16, "cpu")
    for _ in range(8):
        # Freed memory that the op is likely to get.
        poison = [torch.full((rows, 208), float("nan"), dtype=torch.bfloat16) for _ in range(4)]
        del poison
        with use_backend("native"):
            y, h = _lora_segments(
                *tensors, ranks, scales(ranks), [0.0] * len(ranks), *on("cpu", offsets, adapters), None
            )
        assert not y.isnan().any()
        for first, last, adapter in zip(offsets, offsets[1:], adapters, strict=False):
            assert (h[first:last, ranks[adapter] :] == 0).all()


def test_strided_inputs(on_backend, device):
    ranks, offsets, adapters = [3, 5], [0, 50, 51, 120], [1, 0, 1]
    x = torch.randn(6, 20, 8, device=device).transpose(0, 1)[..., ::2]
    weight = torch.randn(4, 7, device=device).t()
    lora_A, lora_B = torch.randn(4, 8, device=device).t(), torch.randn(8, 7, device=device).t()
    tensors = [x, weight, torch.randn(7, device=device), lora_A, lora_B]
    upstream = torch.randn(1, 1, 7, device=device).expand(20, 6, 7)
    segments = [torch.stack((tensor, tensor), dim=1)[:, 0] for tensor in on(device, offsets, adapters)]
    expected = oracle(tensors, upstream, ranks, scales(ranks), offsets, adapters, [0.1, 0.1])
    with on_backend(OP, torch.float32):
        got = run(tensors, upstream, ranks, scales(ranks), segments, 0.1)
    for name, value, reference in zip(NAMES, got, expected, strict=True):
        assert relative_error(value, reference) <= 1e-5, name


def test_saved_inputs_are_not_written(on_backend, device):
    ranks = [3, 5]
    tensors = make(20, 16, 12, ranks, torch.float32, device)
    segments = on(device, [0, 4, 9, 20], [1, 0, 1])
    before = [tensor.clone() for tensor in (*tensors, *segments)]
    with on_backend(OP, torch.float32):
        run(tensors, torch.ones(20, 12), ranks, scales(ranks), segments, 0.2)
    assert all(torch.equal(*pair) for pair in zip((*tensors, *segments), before, strict=True))


def test_deterministic(on_backend, device):
    rows, ranks, offsets, adapters = CASES["large ranks"]
    tensors = make(rows, 40, 24, ranks, torch.float32, device)
    with on_backend(OP, torch.float32):
        runs = [
            run(tensors, torch.ones(rows, 24), ranks, scales(ranks), on(device, offsets, adapters), 0.3)
            for _ in range(2)
        ]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_frozen_x_and_trained_weight(on_backend, device):
    ranks, segments = [3, 5], on(device, [0, 4, 9], [1, 0])
    x, weight, bias, lora_A, lora_B = make(9, 8, 6, ranks, torch.float32, device)
    weight.requires_grad_()
    bias.requires_grad_()
    lora_A.requires_grad_()
    with on_backend(OP, torch.float32):
        lora_segments(x, weight, bias, lora_A, lora_B, ranks, [1.0, 1.0], *segments).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(6, 8))
    torch.testing.assert_close(bias.grad, torch.full((6,), 9.0, device=device))
    assert lora_A.grad.any()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_native_agrees_on_any_segments(data):
    rows, in_features, out_features = data.draw(st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40)))
    ranks = data.draw(st.lists(st.integers(0, 20), max_size=5))
    ps = [data.draw(st.sampled_from([0.0, 0.1, 0.9, 1.0])) for _ in ranks]
    offsets = sorted(data.draw(st.lists(st.integers(0, rows), min_size=1, max_size=8)))
    adapters = [data.draw(st.integers(-1, len(ranks) - 1)) for _ in offsets[1:]]
    tensors = make(rows, in_features, out_features, ranks, torch.float32, "cpu")
    try:
        with use_backend("native"):
            check(tensors, torch.randn(rows, out_features), ranks, offsets, adapters, ps, 1e-5)
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("ps", [[0.0, 0.0, 0.0], [0.3, 1.0, 0.0]])
def test_gradients(on_backend, device, ps):
    ranks, segments = [2, 0, 3], on(device, [0, 2, 3, 5, 6], [2, 0, -1, 2])
    tensors = [tensor.requires_grad_() for tensor in make(6, 5, 4, ranks, torch.float64, device)]
    with on_backend(OP, torch.float64):
        assert torch.autograd.gradcheck(
            lambda *t: lora_segments(*t, ranks, [0.7, 1.0, 1.3], *segments, dropout_ps=ps, seed=5), tensors
        )


def test_double_backward_raises_clearly():
    tensors = [tensor.requires_grad_() for tensor in make(3, 5, 4, [2], torch.float64, "cpu")]
    y = lora_segments(*tensors, [2], [1.0], *on("cpu", [0, 3], [0]))
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_forward_mode_raises_clearly():
    x, *others = make(3, 5, 4, [2], torch.float32, "cpu")
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="cannot be differentiated in forward mode"):
        lora_segments(fwAD.make_dual(x, x), *others, [2], [1.0], *on("cpu", [0, 3], [0]))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("ps", [[0.0, 0.0], [0.3, 0.0]])
def test_opcheck(device, requires_grad, ps):
    # Full ranks and no base rows: opcheck compares all of h, whose columns beyond a row's rank are undefined.
    ranks, segments = [16, 16], on(device, [0, 1, 4, 6], [1, 0, 1])
    tensors = [tensor.requires_grad_(requires_grad) for tensor in make(6, 6, 4, ranks, torch.float32, device)]
    seed = torch.tensor([3], device=device) if any(ps) else None
    torch.library.opcheck(_lora_segments, (*tensors, ranks, [0.7, 1.2], ps, *segments, seed))
    x, weight, _, lora_A, lora_B = (tensor.detach() for tensor in tensors)
    h, grad = torch.randn(6, 16, device=device), torch.randn(6, 4, device=device)
    for need_grad_x in (False, True):
        arguments = (grad, x, h, weight, lora_A, lora_B, ranks, [0.7, 1.2], ps, *segments, seed, need_grad_x)
        torch.library.opcheck(_lora_segments_backward, arguments)


def test_fake_gradients_have_the_strides_of_real_ones(on_backend, device):
    """Inductor asserts it; B is stacked as its transpose by the layer."""
    ranks, segments = [3, 1], on(device, [0, 2, 6], [1, 0])
    x, weight, _, lora_A, lora_B = make(6, 8, 5, ranks, torch.float32, device)
    grad, h = torch.randn(6, 5, device=device), torch.zeros(6, 16, device=device)
    for A, B in ((lora_A, lora_B), (lora_A.T.contiguous().T, lora_B.T.contiguous().T)):
        arguments = grad, x, h, weight, A, B, ranks, [0.7, 1.2], [0.0, 0.0], *segments, None, True
        with on_backend(OP, torch.float32):
            torch.library.opcheck(_lora_segments_backward, arguments, test_utils="test_faketensor")


def test_other_numbers_of_rows_do_not_compile_again():
    ranks, counter = [3, 1], CompileCounterWithBackend("aot_eager")
    _, *others = make(6, 8, 5, ranks, torch.float32, "cpu")
    function = lambda x, *segments: lora_segments(x, *others, ranks, [0.7, 1.0], *segments)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    counts = set()
    # No two sizes of the first call are equal, or dynamo would take them for one.
    for batch, length in ((9, 11), (12, 11), (13, 7)):
        arguments = torch.randn(batch, length, 8), *on("cpu", [0, 2, batch * length], [1, 0])
        assert torch.equal(compiled(*arguments), function(*arguments))
        counts.add(counter.frame_count)
    assert len(counts) == 1


def test_compiles_without_graph_breaks(device):
    ranks, segments = [3, 1], on(device, [0, 2, 6], [1, 0])
    tensors = make(6, 8, 5, ranks, torch.float32, device)
    function = lambda *t: lora_segments(*t, ranks, [0.7, 1.0], *segments)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, plain = (results(f, tensors, torch.ones(6, 5)) for f in (compiled, function))
    assert all(torch.equal(*pair) for pair in zip(got, plain, strict=True))


def test_autocast(device):
    ranks, offsets, adapters = [3, 1], [0, 2, 6], [1, 0]
    tensors = make(6, 8, 5, ranks, torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, *grads = run(tensors, torch.ones(6, 5), ranks, [0.7, 1.0], on(device, offsets, adapters))
    assert y.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)
    expected = oracle(tensors, torch.ones(6, 5), ranks, [0.7, 1.0], offsets, adapters, [0.0, 0.0])
    for value, reference in zip((y, *grads), expected, strict=True):
        assert relative_error(value, reference) <= 4 * RELATIVE[torch.bfloat16]


@pytest.mark.gpu
def test_a_captured_graph_is_replayed_with_other_segments():
    ranks, ps, segments = [3, 20, 8], [0.0, 0.1, 0.0], on("cuda", [0, 10, 25, 40], [0, 1, 2])
    tensors = make(40, 64, 48, ranks, torch.float32, "cuda")
    for tensor in (tensors[0], *tensors[3:]):
        tensor.requires_grad_()
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    seed, upstream = torch.tensor([5], device="cuda"), torch.randn(40, 48, device="cuda")

    def step():
        y = lora_segments(*tensors, ranks, scales(ranks), *segments, dropout_ps=ps, seed=seed)
        return y, *torch.autograd.grad(y, wanted, upstream)

    replay = captured(step)
    for offsets, adapters in (([0, 1, 30, 38], [2, -1, 1]), ([0, 0, 40, 40], [0, 1, 0])):
        for tensor, values in zip(segments, (offsets, adapters), strict=True):
            tensor.copy_(torch.tensor(values))
        got = replay()
        expected = oracle(tensors, upstream, ranks, scales(ranks), offsets, adapters, ps, seed=5)
        for name, value, reference in zip(NAMES, got, expected, strict=True):
            assert relative_error(value, reference) <= 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "native", "torch"])
def test_nothing_waits_for_the_device(name):
    ranks, segments = [3, 20, 8], on("cuda", [0, 10, 25, 40], [0, 1, 2])
    tensors = make(40, 64, 48, ranks, torch.float32, "cuda")
    seed, upstream = torch.tensor([5], device="cuda"), torch.randn(40, 48, device="cuda")
    with use_backend(name):
        run(tensors, upstream, ranks, scales(ranks), segments, 0.1, seed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(tensors, upstream, ranks, scales(ranks), segments, 0.1, seed)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_tables():
    ints, floats = _tables((3, 0, 5), (0.5, 1.0, 2.0), (0.0, 0.5, 1.0), torch.device("cpu"))
    assert ints.tolist() == [[0, 3, 0], [3, 0, 16384], [3, 5, 32768]]
    assert floats.tolist() == [[0.5, 1.0], [1.0, 2.0], [2.0, 0.0]]
    assert (ints.dtype, floats.dtype) == (torch.int32, torch.float32)
    assert [table.shape for table in _tables((), (), (), torch.device("cpu"))] == [(0, 3), (0, 2)]


X, W, A, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(3, 3), torch.ones(4, 3)
R, S, O, I = [1, 2], [1.0, 1.0], torch.tensor([0, 2]), torch.tensor([0])


@pytest.mark.parametrize(
    ("arguments", "kwargs", "message"),
    [
        ((X[:, :2], W, None, A, B, R, S, O, I), {}, "shapes do not fit"),
        ((X, W, None, A, B.T, R, S, O, I), {}, "shapes do not fit"),
        ((X, W, None, A, B, [1, 1], S, O, I), {}, "shapes do not fit"),
        ((X, W, None, A, B, [4, -1], S, O, I), {}, "ranks must not be negative"),
        ((X, W, None, A, B, [1, 2.0], S, O, I), {}, "a rank must be a whole number, not 2.0"),
        ((X, W, None, A, B, R, S, O, I), {"dropout_ps": 0.1, "seed": 2.5}, "seed must be a whole number"),
        ((X, W, torch.ones(3), A, B, R, S, O, I), {}, "bias must have shape"),
        ((X.double(), W, None, A, B, R, S, O, I), {}, "must have x's dtype"),
        ((X, W, None, A, B, R, [1.0], O, I), {}, "one entry an adapter"),
        ((X, W, None, A, B, R, S, O, I), {"dropout_ps": [0.1]}, "one entry an adapter"),
        ((X, W, None, A, B, R, S, O, I), {"dropout_ps": [0.1, 1.5]}, "dropout_ps must be in"),
        ((X, W, None, A, B, R, S, O, torch.tensor([0, 1])), {}, "one entry more than adapters"),
        ((X, W, None, A, B, R, S, O.float(), I), {}, "offsets must hold integers"),
        ((X, W, None, A, B, R, S, O, I.to("meta")), {}, "adapters must hold integers on x's device"),
    ],
)
def test_bad_input(arguments, kwargs, message):
    with pytest.raises(ValueError, match=message):
        lora_segments(*arguments, **kwargs)


@pytest.mark.parametrize("ranks", [(3, 20, 0, 16), (70, 5, 130, 1)])
def test_triton_product_under_the_interpreter(ranks):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    from sensilora.kernels import lora_segments as kernels
    from sensilora.ops.lora_segments import _tables

    rows, columns, reduced = 300, 264, 48
    offsets, adapters = torch.tensor([0, 7, 7, 140, 200, 290]), torch.tensor([1, 0, 3, 2, 0])
    scalings = (0.5, 1.0, 2.0, 0.7)
    ints, floats = _tables(ranks, scalings, (0.0,) * 4, torch.device("cpu"))
    segments = kernels._Segments(ints, floats, offsets, adapters, None, max(ranks))
    left, matrix = torch.randn(rows, reduced, dtype=torch.float16), (torch.randn(reduced, columns) / 7).half()
    skinny = torch.randn(rows, 144, dtype=torch.float16)
    updates, bias = torch.randn(sum(ranks), columns), torch.randn(columns, dtype=torch.float16)
    expected = left.double() @ matrix.double() + bias.double()
    for i, adapter in enumerate(adapters.tolist()):
        first, rank = sum(ranks[:adapter]), ranks[adapter]
        own = slice(int(offsets[i]), int(offsets[i + 1]))
        low_rank = skinny[own, :rank].double() @ updates[first : first + rank].double()
        expected[own] += scalings[adapter] * low_rank
    # What lies behind a row's rank may hold anything.
    for row in range(rows):
        inside = [i for i in range(5) if offsets[i] <= row < offsets[i + 1]]
        skinny[row, ranks[adapters[inside[0]]] if inside else 0 :] = float("nan")
    for stored in (matrix, matrix.T.contiguous().T):
        got = kernels._product(left, stored, bias, skinny, updates, segments, scaled=True)
        assert relative_error(got, expected) <= 2 * RELATIVE[torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_triton_product_with_segments_in_its_accumulator(dtype, p):
    from sensilora.kernels.lora_linear import product_serves

    rows, ranks, scalings = 3000, [4, 0, 17, 64, 100], [1.0, 0.5, 2.0, 0.7, 0.3]
    offsets = torch.tensor([0, 5, 5, 700, 1024, 1500, 2990], device="cuda")
    adapters = torch.tensor([0, 3, 4, 2, 1, 0], device="cuda")
    x, weight = (
        torch.randn(rows, 512, device="cuda", dtype=dtype),
        torch.randn(328, 512, device="cuda").to(dtype) / 23,
    )
    lora_A = torch.randn(sum(ranks), 512, device="cuda") / 23
    lora_B = torch.randn(328, sum(ranks), device="cuda") / 8
    assert product_serves(x, weight.T, max(ranks))
    upstream = torch.randn(rows, 328, device="cuda", dtype=dtype)
    results = []
    for name, kind in (("triton", dtype), ("torch", torch.float64)):
        operands = [t.to(kind).detach().requires_grad_() for t in (x, weight)]
        adapter = [
            t.detach().clone().to(kind if name == "torch" else t.dtype).requires_grad_() for t in (lora_A, lora_B)
        ]
        with use_backend(name):
            y = lora_segments(
                operands[0], operands[1].detach(), None, *adapter, ranks, scalings, offsets, adapters, dropout_ps=p,
                seed=3,
            )  # fmt: skip
        results.append((y, *torch.autograd.grad(y, (operands[0], *adapter), upstream.to(kind))))
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected) <= 4 * RELATIVE[dtype]


def test_the_product_reads_a_bias_of_any_stride(monkeypatch):
    kernels = pytest.importorskip("sensilora.kernels.lora_segments")
    read = []
    monkeypatch.setattr(kernels, "product_serves", lambda *args: True)
    monkeypatch.setattr(kernels, "_down", lambda *args, **kwargs: None)
    monkeypatch.setattr(kernels, "_product", lambda left, matrix, bias, *args, **kwargs: read.append(bias))
    x, weight, _, lora_A, lora_B = make(4, 6, 3, [2], torch.float32, "cpu")
    tables, segments = _tables((2,), (1.0,), (0.0,), x.device), on("cpu", [0, 4], [0])
    kernels.launch_lora_segments(
        x, weight, torch.arange(6.0)[::2], lora_A, lora_B, *tables, *segments, None, 2, False
    )
    assert read[0].tolist() == [0.0, 2.0, 4.0]
    assert read[0].is_contiguous()
