"""lora_linear: every backend against fp64 autograd of the plain formula, dropout, and the op's registration."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from benchmarks.harness import captured
from sensilora.errors import BackendError
from sensilora.ops import lora_linear, use_backend
from sensilora.ops._dropout import keep_mask, keep_scale, threshold
from sensilora.ops.lora_linear import _lora_linear, _lora_linear_backward
from tests.tolerances import RELATIVE, relative_error

OP = "lora_linear"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = ("y", "x", "lora_A", "lora_B")


def make(sizes, dtype, device, adapter_dtype=None, bias=True):
    *leading, in_features, out_features, rank = sizes
    x = torch.randn(*leading, in_features)
    weight = torch.randn(out_features, in_features) / in_features**0.5
    b = torch.randn(out_features) if bias else None
    lora_A = torch.randn(rank, in_features) / in_features**0.5
    lora_B = torch.randn(out_features, rank)
    adapter_dtype = adapter_dtype or dtype
    return [
        None if tensor is None else tensor.to(device, kind)
        for tensor, kind in (
            (x, dtype),
            (weight, dtype),
            (b, dtype),
            (lora_A, adapter_dtype),
            (lora_B, adapter_dtype),
        )
    ]


def results(function, tensors, upstream):
    """y and the gradients of x, lora_A and lora_B."""
    x, weight, bias, lora_A, lora_B = tensors
    x, lora_A, lora_B = (tensor.detach().clone().requires_grad_() for tensor in (x, lora_A, lora_B))
    y = function(x, weight, bias, lora_A, lora_B)
    y.backward(upstream.to(y))
    return y.detach(), x.grad, lora_A.grad, lora_B.grad


def oracle(tensors, upstream, scaling, p=0.0, seed=0):
    """The plain formula in fp64, with the stored mask, differentiated by autograd."""
    tensors = [None if tensor is None else tensor.detach().cpu().double() for tensor in tensors]

    def formula(x, weight, bias, lora_A, lora_B):
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        kept = keep_mask(rows.shape[0], rows.shape[1], p, seed) if p else torch.ones_like(rows, dtype=torch.bool)
        dropped = (rows * kept * keep_scale(p)).reshape(x.shape)
        return linear(x, weight, bias) + scaling * linear(linear(dropped, lora_A), lora_B)

    return results(formula, tensors, upstream.cpu().double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(
    "sizes",
    [(33, 17, 5), (1, 1, 1, 1), (5, 8, 16, 3), (3, 7, 33, 17, 5), (2, 3, 4, 19, 31, 11), (130, 64, 48, 33)],
)
def test_forward_and_backward_match_oracle(on_backend, device, dtype, p, sizes):
    tensors = make(sizes, dtype, device)
    upstream = torch.randn(*sizes[:-3], sizes[-2])
    expected = oracle(tensors, upstream.to(dtype), 0.7, p, seed=2**40 + 3)
    with on_backend(OP, dtype):
        got = results(lambda *t: lora_linear(*t, 0.7, dropout_p=p, seed=2**40 + 3), tensors, upstream)
    for name, value, reference in zip(NAMES, got, expected, strict=True):
        assert relative_error(value, reference) <= 4 * RELATIVE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 40, 24, 1), (63, 77, 97, 15), (129, 264, 136, 17), (64, 128, 600, 16), (65, 203, 129, 47),
        (66, 600, 72, 64), (65, 72, 129, 100), (40, 96, 67, 200), (33, 136, 64, 512),
    ],
)  # fmt: skip
def test_every_rank_and_size(on_backend, device, dtype, p, sizes):
    tensors = make(sizes, dtype, device, adapter_dtype=torch.float32)
    upstream = torch.randn(sizes[0], sizes[2])
    # The oracle takes what the op works on: adapters rounded to x's dtype.
    rounded = [*tensors[:3], *(tensor.to(dtype) for tensor in tensors[3:])]
    expected = oracle(rounded, upstream.to(dtype), 0.7, p, seed=9)
    with on_backend(OP, dtype):
        got = results(lambda *t: lora_linear(*t, 0.7, dropout_p=p, seed=9), tensors, upstream)
    for name, value, reference in zip(NAMES, got, expected, strict=True):
        assert relative_error(value, reference) <= 4 * RELATIVE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_unaligned_inputs(on_backend, device, dtype, p):
    def unaligned(tensor):
        """The same numbers one element behind a 16-byte boundary, in a contiguous tensor."""
        return torch.cat([tensor.new_full((1,), float("nan")), tensor.flatten()])[1:].view(tensor.shape)

    x, *others = (unaligned(tensor) for tensor in make((70, 128, 72, 16), dtype, device))
    upstream = unaligned(torch.randn(70, 72).to(device, dtype))
    expected = oracle([x, *others], upstream, 0.7, p, seed=9)
    leaves = [tensor.requires_grad_() for tensor in (x, *others[2:])]
    with on_backend(OP, dtype):
        y = lora_linear(x, *others, 0.7, dropout_p=p, seed=9)
        got = y, *torch.autograd.grad(y, leaves, upstream)
    for name, value, reference in zip(NAMES, got, expected, strict=True):
        assert relative_error(value, reference) <= 4 * RELATIVE[dtype], name


@pytest.mark.parametrize("bias", [True, False])
def test_rank_zero_is_the_base_layer(on_backend, device, bias):
    tensors = make((4, 6, 5, 0), torch.float32, device, bias=bias)
    with on_backend(OP, torch.float32):
        y, grad_x, grad_A, grad_B = results(lambda *t: lora_linear(*t, 1.0, dropout_p=0.5), tensors, torch.ones(4, 5))
    torch.testing.assert_close(y, linear(*tensors[:3]))
    torch.testing.assert_close(grad_x, torch.ones(4, 5, device=device) @ tensors[1])
    assert grad_A.shape == (0, 6)
    assert grad_B.shape == (5, 0)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_no_rows(on_backend, device, shape, p):
    tensors = make((*shape, 5, 3), torch.float32, device)
    upstream = torch.ones(*shape[:-1], 5)
    with on_backend(OP, torch.float32):
        y, grad_x, grad_A, grad_B = results(lambda *t: lora_linear(*t, 1.0, dropout_p=p), tensors, upstream)
    assert y.shape == (*shape[:-1], 5)
    assert grad_x.shape == shape
    assert not grad_A.any()
    assert not grad_B.any()


def test_outputs_are_all_written(on_backend, device, poisoned_empty):
    tensors = make((9, 13, 7, 3), torch.float32, device)
    with on_backend(OP, torch.float32):
        got = results(lambda *t: lora_linear(*t, 1.0, dropout_p=0.3, seed=1), tensors, torch.ones(9, 7))
    assert all(torch.isfinite(value).all() for value in got)


def test_strided_inputs(on_backend, device):
    x = torch.randn(6, 20, 4, device=device).transpose(0, 1)[..., ::2]
    weight = torch.randn(2, 7, device=device).t()
    lora_A, lora_B = torch.randn(2, 3, device=device).t(), torch.randn(3, 7, device=device).t()
    tensors = [x, weight, torch.randn(7, device=device), lora_A, lora_B]
    upstream = torch.randn(1, 1, 7, device=device).expand(20, 6, 7)
    expected = oracle(tensors, upstream, 1.3)
    with on_backend(OP, torch.float32):
        got = results(lambda *t: lora_linear(*t, 1.3), tensors, upstream)
    for name, value, reference in zip(NAMES, got, expected, strict=True):
        assert relative_error(value, reference) <= 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_over_a_16_bit_base(on_backend, device, dtype):
    tensors = make((7, 16, 12, 4), dtype, device, adapter_dtype=torch.float32)
    upstream = torch.randn(7, 12)
    with on_backend(OP, dtype):
        y, grad_x, grad_A, grad_B = results(lambda *t: lora_linear(*t, 0.5), tensors, upstream)
    assert (y.dtype, grad_x.dtype, grad_A.dtype, grad_B.dtype) == (dtype, dtype, torch.float32, torch.float32)
    for value, reference in zip((y, grad_x, grad_A, grad_B), oracle(tensors, upstream.to(dtype), 0.5), strict=True):
        assert relative_error(value, reference) <= 4 * RELATIVE[dtype]


def test_saved_inputs_are_not_written(on_backend, device):
    tensors = make((7, 16, 12, 4), torch.float32, device)
    before = [tensor.clone() for tensor in tensors]
    with on_backend(OP, torch.float32):
        results(lambda *t: lora_linear(*t, 0.5, dropout_p=0.2), tensors, torch.ones(7, 12))
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_deterministic(on_backend, device, dtype):
    tensors = make((65, 40, 24, 7), dtype, device)
    with on_backend(OP, dtype):
        runs = [
            results(lambda *t: lora_linear(*t, 1.0, dropout_p=0.3, seed=9), tensors, torch.ones(65, 24))
            for _ in range(2)
        ]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_philox_known_answers():
    # Philox4x32-7 of counter and key zero, and of all ones: Random123's published known-answer vectors (kat_vectors).
    from sensilora.ops._dropout import philox

    zero = torch.zeros((), dtype=torch.int64)
    assert [int(word) for word in philox((zero,) * 4, 0)] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    ones = torch.full((), 0xFFFFFFFF, dtype=torch.int64)
    words = philox((ones,) * 4, 0xFFFFFFFFFFFFFFFF)
    assert [int(word) for word in words] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


def test_dropout_expectation_and_variance(on_backend, device):
    p, rows, columns = 0.05, 4096, 64
    x = torch.ones(rows, columns, device=device)
    weight = torch.zeros(1, columns, device=device)
    # One column a rank picks the dropped inputs out one by one.
    lora_A, lora_B = torch.eye(columns, device=device), torch.zeros(1, columns, device=device)
    with on_backend(OP, torch.float32):
        h = _lora_linear(x, weight, None, lora_A, lora_B, 1.0, p, torch.tensor([11], device=device))[1]
    dropped = (h == 0).double()
    deviation = (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(float(dropped.mean()) - p) < 5 * deviation
    assert abs(float(h.double().mean()) - 1) < 5 * deviation / (1 - p)
    assert abs(float(h.double().var()) - p / (1 - p)) < 0.05 * p
    # No row or column of the mask stands out.
    for dim in (0, 1):
        means = dropped.mean(dim)
        assert float((means - p).abs().max()) < 6 * (p * (1 - p) / dropped.shape[dim]) ** 0.5


@pytest.mark.parametrize("seed", [2**63 + 5, 2**64 - 1, 2**64 + 2**40, -(2**63) - 1, -3, np.int64(2**40)])
def test_any_whole_number_is_a_seed(on_backend, device, seed):
    tensors, upstream = make((5, 33, 17, 4), torch.float32, device), torch.randn(5, 17)
    # The key has 64 bits.
    expected = oracle(tensors, upstream, 0.7, 0.3, seed=int(seed) % 2**64)
    with on_backend(OP, torch.float32):
        got = results(lambda *t: lora_linear(*t, 0.7, dropout_p=0.3, seed=seed), tensors, upstream)
    for name, value, reference in zip(NAMES, got, expected, strict=True):
        assert relative_error(value, reference) <= 4 * RELATIVE[torch.float32], name


@pytest.mark.parametrize("seed", [2.5, "7", torch.tensor(1.0), torch.tensor([1, 2])])
def test_a_bad_seed_is_named(seed):
    tensors = make((5, 8, 6, 4), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"^seed must be .*, not [^\n]*$"):
        lora_linear(*tensors, 0.7, dropout_p=0.3, seed=seed)


def test_dropout_masks_differ_by_seed_and_repeat_by_manual_seed():
    tensors = make((32, 32, 8, 4), torch.float32, "cpu")
    torch.manual_seed(5)
    first, second = (lora_linear(*tensors, 1.0, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, lora_linear(*tensors, 1.0, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_checkpointing_replays_the_mask():
    from torch.utils.checkpoint import checkpoint

    tensors = make((32, 32, 8, 4), torch.float32, "cpu")

    def run(use_reentrant):
        torch.manual_seed(3)
        function = lambda *t: lora_linear(*t, 1.0, dropout_p=0.5)  # noqa: E731
        wrapped = (
            function if use_reentrant is None else lambda *t: checkpoint(function, *t, use_reentrant=use_reentrant)
        )
        return results(wrapped, tensors, torch.ones(32, 8))

    plain = run(None)
    for use_reentrant in (False, True):
        assert all(torch.equal(*pair) for pair in zip(plain, run(use_reentrant), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_graph_replays_with_new_inputs_and_seed(name, dtype):
    x, weight, bias, lora_A, lora_B = make((70, 64, 48, 5), dtype, "cuda", adapter_dtype=torch.float32)
    grad, seed = torch.randn(70, 48, device="cuda", dtype=dtype), torch.tensor([1], device="cuda")

    def run():
        y, h = _lora_linear(x, weight, bias, lora_A, lora_B, 0.7, 0.3, seed)
        return y, *_lora_linear_backward(grad, x, h, weight, lora_A, lora_B, 0.7, 0.3, seed, True)

    with use_backend(name):
        replay = captured(run)
        for key in (2, 3):
            seed.fill_(key)
            x.copy_(torch.randn(70, 64))
            assert all(torch.equal(*pair) for pair in zip(replay(), run(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "native"])
def test_second_gpu(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    tensors = make((70, 64, 48, 5), torch.bfloat16, "cuda:1")
    upstream = torch.randn(70, 48)
    expected = oracle(tensors, upstream.bfloat16(), 0.7, 0.3, seed=3)
    with use_backend(name):
        got = results(lambda *t: lora_linear(*t, 0.7, dropout_p=0.3, seed=3), tensors, upstream)
    for value, reference in zip(got, expected, strict=True):
        assert value.device == torch.device("cuda:1")
        assert relative_error(value, reference) <= 4 * RELATIVE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (2048, 64, 128, 16),
        (2177, 200, 328, 5),
        (3000, 136, 72, 33),
        (2049, 512, 520, 64),
        (2100, 264, 328, 75),
        (2050, 328, 136, 260),
    ],
)
def test_triton_product_with_the_update_in_its_accumulator(dtype, p, conv1d, sizes):
    tensors = make(sizes, dtype, "cuda", adapter_dtype=torch.float32)
    if conv1d:
        tensors[1] = tensors[1].T.contiguous().T
    from sensilora.kernels.lora_linear import product_serves

    assert product_serves(tensors[0], tensors[1].T, sizes[-1], dense=True)
    upstream = torch.randn(sizes[0], sizes[2])
    expected = oracle(tensors, upstream.to(dtype), 0.7, p, seed=3)
    with use_backend("triton"):
        got = results(lambda *t: lora_linear(*t, 0.7, dropout_p=p, seed=3), tensors, upstream)
    for name, value, reference in zip(NAMES, got, expected, strict=True):
        assert relative_error(value, reference) <= 4 * RELATIVE[dtype], name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "native"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_more_elements_than_32_bits_count(name, p):
    rows, in_features, out_features, rank = 2**31 // 1024 + 777, 1024, 64, 5
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("less than 40 GiB of GPU memory")
    _, weight, bias, lora_A, lora_B = make((1, in_features, out_features, rank), torch.bfloat16, "cuda")
    last = torch.randn(3, in_features, device="cuda").bfloat16()
    upstream = torch.randn(3, out_features, device="cuda").bfloat16()
    x = torch.zeros(rows, in_features, device="cuda", dtype=torch.bfloat16)
    grad = torch.zeros(rows, out_features, device="cuda", dtype=torch.bfloat16)
    x[-3:], grad[-3:] = last, upstream
    seed = torch.tensor([7], device="cuda")
    with use_backend(name):
        y, h = _lora_linear(x, weight, bias, lora_A, lora_B, 0.7, p, seed)
        got = y[-3:], *_lora_linear_backward(grad, x, h, weight, lora_A, lora_B, 0.7, p, seed, True)
    # The last rows alone, under the mask that they have at their place.
    row = torch.arange(rows - 3, rows)
    kept = torch.cat([_mask_of_row(int(t), in_features, p, 7) for t in row]).cuda().double() * keep_scale(p)
    wide = [t.double() for t in (last, weight, bias, lora_A, lora_B)]
    dropped, scaled = wide[0] * kept, 0.7 * upstream.double()
    expected = linear(wide[0], *wide[1:3]) + 0.7 * dropped @ wide[3].T @ wide[4].T
    assert relative_error(got[0], expected) <= 4 * RELATIVE[torch.bfloat16]
    grad_x = upstream.double() @ wide[1] + kept * (scaled @ wide[4] @ wide[3])
    assert relative_error(got[1][-3:], grad_x) <= 4 * RELATIVE[torch.bfloat16]
    assert relative_error(got[2], (scaled @ wide[4]).T @ dropped) <= 4 * RELATIVE[torch.bfloat16]
    assert relative_error(got[3], scaled.T @ (dropped @ wide[3].T)) <= 4 * RELATIVE[torch.bfloat16]


def _mask_of_row(row, columns, p, seed):
    """One row of the mask, (1, columns), as `keep_mask` of all rows up to it has it last."""
    from sensilora.ops._dropout import philox

    call = torch.arange(columns // 8)
    words = philox((call, torch.full_like(call, row), torch.zeros_like(call), torch.zeros_like(call)), seed)
    halves = torch.stack([torch.stack((word & 0x7FFF, word >> 16 & 0x7FFF), dim=-1) for word in words], dim=-2)
    return (halves.unflatten(0, (-1, 4)).transpose(1, 2).flatten()[None, :]) >= threshold(p)


def test_one_row_of_the_mask():
    expected = keep_mask(41, 96, 0.3, 7)[40:]
    assert torch.equal(_mask_of_row(40, 96, 0.3, 7), expected)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("sizes", [(130, 64, 48, 33), (70, 40, 24, 5), (300, 72, 136, 130)])
def test_triton_skinny_passes_read_nothing_outside_their_inputs(device, sizes, p):
    from sensilora.kernels import lora_linear as kernels

    def inside_nan(*shape):
        """A contiguous tensor with NaN before and behind it in memory: 0 * NaN would show."""
        size = shape[0] * shape[1]
        memory = torch.full((size + 100_000,), float("nan"), device=device)
        return memory[50_000 : 50_000 + size].view(shape).copy_(torch.randn(shape))

    rows, in_features, _, rank = sizes
    x, lora_A, q = inside_nan(rows, in_features), inside_nan(rank, in_features), inside_nan(rows, rank)
    seed = torch.tensor([3], device=device)
    dropped = x.double() * keep_mask(rows, in_features, p, seed, device)
    h = torch.full((rows, kernels.padded(rank)), float("nan"), device=device)
    kernels.launch_lora_down(x, [lora_A], h, 0.7, threshold(p), seed)
    assert relative_error(h[:, :rank], 0.7 * dropped @ lora_A.double().T) <= 1e-5
    assert not h[:, rank:].any()
    grad_A = torch.full_like(lora_A, float("nan"))
    # Passed as wide as it is, without the padding that the op gives it.
    kernels.launch_reduce(kernels.launch_lora_outer(x, q, (grad_A,), 0.7, threshold(p), seed))
    assert relative_error(grad_A, 0.7 * q.double().T @ dropped) <= 1e-5


@pytest.mark.parametrize("ranks", [(5,), (3, 20), (16, 0, 7)])
@pytest.mark.parametrize("masks", [0, 1, 3])
def test_triton_product_of_a_group_under_the_interpreter(ranks, masks):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    from sensilora.kernels import lora_linear as kernels

    rows, columns, members = 130, 264, len(ranks)
    stack = kernels.stack_size(ranks)
    lefts = [torch.randn(rows, 48, dtype=torch.float16) for _ in ranks]
    matrices = [(torch.randn(48, columns) / 7).half() for _ in ranks]
    updates = [torch.randn(rank, columns) for rank in ranks]
    skinny = torch.randn(rows, stack, dtype=torch.float16)
    seeds = torch.arange(1, 1 + (1 if masks == 1 else members)) if masks else None
    p = 0.25 if masks else 0.0
    expected, first = torch.zeros(rows, columns, dtype=torch.float64), 0
    for i, (left, matrix, update, rank) in enumerate(zip(lefts, matrices, updates, ranks, strict=True)):
        low_rank = skinny[:, first : first + rank].double() @ update.double()
        if masks:
            seed = seeds[0 if masks == 1 else i].reshape(1)
            low_rank *= keep_mask(rows, columns, p, seed) * keep_scale(p)
        expected += left.double() @ matrix.double() + low_rank
        first += kernels.padded(rank)
    masked = [threshold(p)] * members, [keep_scale(p)] * members, seeds
    for stored in (matrices, [matrix.T.contiguous().T for matrix in matrices]):
        forms = [updates] if masks else [updates, kernels.dense_update(updates, 1.0, skinny, stored[0])]
        for form in forms:
            got = kernels.launch_lora_product(lefts, stored, None, skinny, form, 1.0, *masked)
            assert relative_error(got, expected) <= 2 * RELATIVE[torch.float16]


@pytest.mark.parametrize("rank", [5, 16, 40, 100])
def test_triton_product_with_bias_and_scale_under_the_interpreter(rank):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    from sensilora.kernels import lora_linear as kernels

    left, bias = torch.randn(130, 64, dtype=torch.float16), torch.randn(264, dtype=torch.float16)
    skinny, update = torch.randn(130, kernels.padded(rank), dtype=torch.float16), torch.randn(264, rank)
    matrix = (torch.randn(64, 264) / 8).half()
    expected = left.double() @ matrix.double() + bias.double() + 0.7 * skinny[:, :rank].double() @ update.double().T
    for form in ([update.T], kernels.dense_update([update.T], 0.7, left, matrix)):
        got = kernels.launch_lora_product([left], [matrix], bias, skinny, form, 0.7, [0], [1.0], None)
        assert relative_error(got, expected) <= RELATIVE[torch.float16]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 20)),
    p=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 2**63 - 1),
)
def test_native_agrees_on_any_shape(sizes, p, seed):
    tensors = make(sizes, torch.float32, "cpu")
    upstream = torch.randn(sizes[0], sizes[2])
    try:
        with use_backend("native"):
            got = results(lambda *t: lora_linear(*t, 0.7, dropout_p=p, seed=seed), tensors, upstream)
    except BackendError as error:
        pytest.skip(str(error))
    for value, reference in zip(got, oracle(tensors, upstream, 0.7, p, seed), strict=True):
        assert relative_error(value, reference) <= 1e-5


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_gradients(on_backend, device, p):
    tensors = [tensor.requires_grad_() for tensor in make((2, 3, 5, 4, 2), torch.float64, device)]
    with on_backend(OP, torch.float64):
        assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, 0.7, dropout_p=p, seed=5), tensors)


def test_double_backward_raises_clearly():
    tensors = [tensor.requires_grad_() for tensor in make((3, 5, 4, 2), torch.float64, "cpu")]
    y = lora_linear(*tensors, 1.0)
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(device, requires_grad, p):
    tensors = [tensor.requires_grad_(requires_grad) for tensor in make((2, 3, 6, 4, 2), torch.float32, device)]
    seed = torch.tensor([3], device=device) if p else None
    torch.library.opcheck(_lora_linear, (*tensors, 0.7, p, seed))
    x, weight, _, lora_A, lora_B = (tensor.detach() for tensor in tensors)
    h, grad = torch.randn(6, 16, device=device), torch.randn(2, 3, 4, device=device)
    for need_grad_x in (False, True):
        torch.library.opcheck(_lora_linear_backward, (grad, x, h, weight, lora_A, lora_B, 0.7, p, seed, need_grad_x))


def test_fake_gradients_have_the_strides_of_real_ones(on_backend, device):
    """Inductor asserts it; converted adapters are often transposed."""
    x, weight, _, lora_A, lora_B = make((6, 8, 5, 3), torch.float32, device)
    lora_A, lora_B = lora_A.T.contiguous().T, lora_B.T.contiguous().T
    grad, h = torch.randn(6, 5, device=device), torch.zeros(6, 16, device=device)
    arguments = grad, x, h, weight, lora_A, lora_B, 0.7, 0.0, None, True
    with on_backend(OP, torch.float32):
        torch.library.opcheck(_lora_linear_backward, arguments, test_utils="test_faketensor")


def test_compiles_without_graph_breaks(device):
    tensors = make((6, 8, 5, 3), torch.float32, device)
    compiled = torch.compile(lambda *t: lora_linear(*t, 0.7), fullgraph=True, backend="aot_eager")
    got = results(compiled, tensors, torch.ones(6, 5))
    plain = results(lambda *t: lora_linear(*t, 0.7), tensors, torch.ones(6, 5))
    assert all(torch.equal(*pair) for pair in zip(got, plain, strict=True))


def test_autocast(device):
    tensors = make((6, 8, 5, 3), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, *grads = results(lambda *t: lora_linear(*t, 0.7), tensors, torch.ones(6, 5))
    assert y.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)
    for value, reference in zip((y, *grads), oracle(tensors, torch.ones(6, 5), 0.7), strict=True):
        assert relative_error(value, reference) <= 4 * RELATIVE[torch.bfloat16]


X, W, A, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)


@pytest.mark.parametrize(
    ("arguments", "kwargs", "message"),
    [
        ((X[:, :2], W, None, A, B, 1.0), {}, "shapes do not fit"),
        ((X, W, None, A, B.T, 1.0), {}, "shapes do not fit"),
        ((X, W, torch.ones(3), A, B, 1.0), {}, "bias must have shape"),
        ((X.double(), W, None, A, B, 1.0), {}, "must have x's dtype"),
        ((X, W, None, A, B, 1.0), {"dropout_p": 1.5}, "dropout_p must be in"),
        ((X, W, None, A, B, 1.0), {"dropout_p": float("nan")}, "dropout_p must be in"),
    ],
)
def test_bad_input(arguments, kwargs, message):
    with pytest.raises(ValueError, match=message):
        lora_linear(*arguments, **kwargs)
