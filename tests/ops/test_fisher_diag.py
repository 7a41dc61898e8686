"""fisher_diag: every backend against per-sample autograd in fp64, and the op's registration."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensilora.errors import BackendError
from sensilora.ops import _backend, fisher_diag, use_backend
from sensilora.ops.fisher_diag import CONVENTIONS, _fisher_diag, _fisher_diag_
from tests.tolerances import ACCUMULATED, relative_error

OP = "fisher_diag"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def oracle(x, g, mode, lengths):
    """By the definition, one position or sequence at a time, in fp64. x (tokens, in), g (tokens, out), packed."""
    x, g = x.detach().double().cpu(), g.detach().double().cpu()
    total = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float64)
    start = 0
    for length in lengths:
        positions = range(start, start + length)
        gradients = [torch.outer(g[t], x[t]) for t in positions]
        if mode == "per_sequence" and gradients:
            total += sum(gradients).square()
        elif mode == "per_position":
            total += sum((gradient.square() for gradient in gradients), torch.zeros_like(total))
        start += length
    return total


@pytest.mark.parametrize("mode", CONVENTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 5, 7, 9), (2, 17, 33, 65), (4, 1, 30, 40)])
def test_matches_oracle(on_backend, device, mode, dtype, sizes, poisoned_empty):
    sequences, positions, in_features, out_features = sizes
    x = torch.randn(sequences, positions, in_features).to(dtype)
    g = torch.randn(sequences, positions, out_features).to(dtype)
    with on_backend(OP, dtype):
        got = fisher_diag(x.to(device), g.to(device), mode=mode)
    expected = oracle(x.flatten(0, 1), g.flatten(0, 1), mode, [positions] * sequences)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(got, expected) <= ACCUMULATED[dtype]


@pytest.mark.parametrize("mode", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[700, 1, 0, 300], [3] * 150])
@pytest.mark.parametrize("features", [(150, 264), (97, 35)])
def test_long_and_many_sequences(on_backend, device, mode, dtype, lengths, features):
    x, g = (torch.randn(sum(lengths), size).to(dtype) for size in features)
    with on_backend(OP, dtype):
        got = fisher_diag(x.to(device), g.to(device), mode=mode, lengths=lengths)
    x, g = x.double(), g.double()
    pairs = zip(g.split(lengths), x.split(lengths), strict=True)
    expected = (
        g.square().T @ x.square() if mode == "per_position" else sum((g_n.T @ x_n).square() for g_n, x_n in pairs)
    )
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("mode", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_of_one_sign_are_not_cut_off(on_backend, device, mode, dtype):
    # A tensor core cuts off what it adds to a sum: with equal signs those errors add up, unlike errors of rounding.
    x, g = ((torch.rand(1, 4096, size) + 0.5).to(dtype) for size in (40, 24))
    with on_backend(OP, dtype):
        got = fisher_diag(x.to(device), g.to(device), mode=mode)
    x, g = x.double()[0], g.double()[0]
    expected = g.square().T @ x.square() if mode == "per_position" else (g.T @ x).square()
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("mode", CONVENTIONS)
@pytest.mark.parametrize("name", ["triton", "native"])
def test_nothing_waits_for_the_device(name, mode):
    x, g = torch.randn(30, 40, device="cuda"), torch.randn(30, 24, device="cuda")
    out, orders = torch.zeros(24, 40, device="cuda"), [[4, 0, 26], [7, 21, 2]]
    with use_backend(name):
        fisher_diag(x, g, mode=mode, lengths=orders[0], out=out)
        torch.cuda.set_sync_debug_mode("error")
        try:
            # Lengths that were not seen before have to be told to the device.
            fisher_diag(x, g, mode=mode, lengths=orders[1], out=out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert relative_error(out, sum(oracle(x, g, mode, lengths) for lengths in orders)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("mode", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["triton", "native"])
def test_repeats_bit_for_bit(name, mode, dtype):
    x, g = (torch.randn(8, 65, 128, device="cuda", dtype=dtype) for _ in range(2))
    with use_backend(name):
        first, second = (fisher_diag(x, g, mode=mode) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "native"])
def test_second_gpu(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x, g = (torch.randn(130, 136, device="cuda:1", dtype=torch.bfloat16) for _ in range(2))
    with use_backend(name):
        got = fisher_diag(x, g, lengths=[64, 66])
    assert got.device == torch.device("cuda:1")
    assert relative_error(got, oracle(x, g, "per_sequence", [64, 66])) <= 1e-5


def test_is_the_squared_gradient_of_each_sequence():
    layer = torch.nn.Linear(4, 3, dtype=torch.float64)
    x = torch.randn(5, 6, 4, dtype=torch.float64)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    outputs = layer(x)
    loss = outputs.sin().sum()
    (g,) = torch.autograd.grad(loss, outputs, retain_graph=True)
    for n in range(5):
        (grad,) = torch.autograd.grad(layer(x[n]).sin().sum(), layer.weight)
        expected += grad.square()
    torch.testing.assert_close(fisher_diag(x, g), expected)


@pytest.mark.parametrize("mode", CONVENTIONS)
def test_lengths_padded_and_packed_agree(on_backend, device, mode):
    lengths = [3, 0, 5, 1]
    x, g = torch.randn(4, 5, 6, device=device), torch.randn(4, 5, 2, device=device)
    packed_x = torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
    packed_g = torch.cat([row[:length] for row, length in zip(g, lengths, strict=True)])
    padded_x, padded_g = x.clone(), g.clone()
    for n, length in enumerate(lengths):
        padded_x[n, length:] = float("nan")
        padded_g[n, length:] = float("inf")
    expected = oracle(packed_x, packed_g, mode, lengths)
    with on_backend(OP, torch.float32):
        assert relative_error(fisher_diag(packed_x, packed_g, mode=mode, lengths=lengths), expected) <= 1e-5
        got = fisher_diag(padded_x, padded_g, mode=mode, lengths=torch.tensor(lengths))
    assert relative_error(got, expected) <= 1e-5


def test_packed_without_lengths_is_one_sequence(on_backend, device):
    x, g = torch.randn(8, 3, device=device), torch.randn(8, 2, device=device)
    with on_backend(OP, torch.float32):
        assert relative_error(fisher_diag(x, g), oracle(x, g, "per_sequence", [8])) <= 1e-5


@pytest.mark.parametrize("mode", CONVENTIONS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
def test_out_accumulates(on_backend, device, mode, out_dtype):
    x, g = torch.randn(4, 5, 6, device=device), torch.randn(4, 5, 3, device=device)
    with on_backend(OP, torch.float32):
        out = torch.zeros(3, 6, dtype=out_dtype, device=device)
        assert fisher_diag(x[:1], g[:1], mode=mode, out=out) is out
        fisher_diag(x[1:], g[1:], mode=mode, out=out)
    assert relative_error(out, oracle(x.flatten(0, 1), g.flatten(0, 1), mode, [5] * 4)) <= 1e-5


@pytest.mark.parametrize("mode", CONVENTIONS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(on_backend, device, mode, shape, poisoned_empty):
    with on_backend(OP, torch.float32):
        got = fisher_diag(torch.ones(*shape, 3, device=device), torch.ones(*shape, 2, device=device), mode=mode)
    assert torch.equal(got.cpu(), torch.zeros(2, 3))


@pytest.mark.parametrize("mode", CONVENTIONS)
def test_strided_inputs(on_backend, device, mode):
    x = torch.randn(5, 4, 12, device=device).transpose(0, 1)[..., ::2]
    g = torch.randn(4, 1, 3, device=device).expand(4, 5, 3)
    expected = oracle(x.flatten(0, 1), g.flatten(0, 1), mode, [5] * 4)
    with on_backend(OP, torch.float32):
        assert relative_error(fisher_diag(x, g, mode=mode), expected) <= 1e-5


def test_fp16_squares_do_not_underflow(on_backend, device):
    x = torch.full((2, 3, 4), 1e-2, dtype=torch.float16, device=device)
    g = torch.full((2, 3, 5), 1e-4, dtype=torch.float16, device=device)
    with on_backend(OP, torch.float16):
        got = fisher_diag(x, g)
    assert relative_error(got, oracle(x.flatten(0, 1), g.flatten(0, 1), "per_sequence", [3, 3])) <= 1e-5


def test_mixed_dtypes_are_promoted(device):
    x, g = torch.randn(2, 3, 4, device=device).bfloat16(), torch.randn(2, 3, 5, device=device)
    assert relative_error(fisher_diag(x, g), oracle(x.flatten(0, 1), g.flatten(0, 1), "per_sequence", [3, 3])) <= 1e-5


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    features=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    mode=st.sampled_from(CONVENTIONS),
    seed=st.integers(0, 10**6),
)
def test_native_agrees_on_any_shape(lengths, features, mode, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), features[0], generator=generator)
    g = torch.randn(sum(lengths), features[1], generator=generator)
    try:
        with use_backend("native"):
            got = fisher_diag(x, g, mode=mode, lengths=lengths)
    except BackendError as error:
        pytest.skip(str(error))
    with use_backend("torch"):
        expected = fisher_diag(x.double(), g.double(), mode=mode, lengths=lengths)
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("mode", CONVENTIONS)
def test_gradients(mode):
    x = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, g: fisher_diag(x, g, mode=mode, lengths=[4, 2, 0]), (x, g))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float64])
def test_loss_terms_are_squared_one_by_one(on_backend, device, packed, out_dtype):
    """Of the loss Σ_t ℓ_t, term t has a gradient of its own at every position; sequences differ in length."""
    lengths = [4, 2, 3]
    x, g = torch.randn(sum(lengths), 5), torch.randn(6, sum(lengths), 3)
    expected = sum(oracle(x, term, "per_sequence", lengths) for term in g)
    if packed:
        arguments = (x, g)
    else:
        nan = float("nan")
        arguments = (torch.full((3, 4, 5), nan), torch.full((6, 3, 4, 3), nan))
        counted = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
        arguments[0][counted] = x
        arguments[1][:, counted] = g
    x, g = (tensor.to(device) for tensor in arguments)
    out = None if out_dtype is None else torch.ones(3, 5, dtype=out_dtype, device=device)
    with on_backend(OP, torch.float32):
        got = fisher_diag(x, g, mode="per_loss_term", lengths=lengths, out=out)
    assert got is out or out is None
    assert relative_error(got if out is None else got - 1, expected) <= 1e-5


def test_no_loss_term_is_zero():
    got = fisher_diag(torch.ones(2, 3, dtype=torch.float64), torch.ones(0, 2, 4), mode="per_loss_term")
    assert got.dtype == torch.float64
    assert torch.equal(got, torch.zeros(4, 3, dtype=torch.float64))


def test_gradients_of_loss_terms():
    x = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)

    def summed(x, g):
        return fisher_diag(x, g, mode="per_loss_term", lengths=[4, 2, 0])

    assert torch.autograd.gradcheck(summed, (x, g))


@pytest.mark.parametrize("mode", CONVENTIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, mode, requires_grad):
    x = torch.randn(7, 3, device=device, requires_grad=requires_grad)
    g = torch.randn(7, 2, device=device, requires_grad=requires_grad)
    lengths = torch.tensor([3, 4])
    torch.library.opcheck(_fisher_diag, (x, g, lengths, mode))
    torch.library.opcheck(_fisher_diag_, (x.detach(), g.detach(), lengths, mode, torch.zeros(2, 3, device=device)))


@pytest.mark.parametrize(
    ("arguments", "kwargs", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3)), {"mode": "per_token"}, "mode 'per_token' is unknown"),
        ((torch.ones(2, 3), torch.ones(3, 3)), {}, "agree in all but the last size"),
        ((torch.ones(3), torch.ones(3)), {}, "agree in all but the last size"),
        ((torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)), {}, "floating-point"),
        ((torch.ones(2, 3), torch.ones(2, 4)), {"mode": "per_loss_term"}, r"per_loss_term takes .* not \(2, 4\)"),
        ((torch.ones(2, 3), torch.ones(2, 4)), {"lengths": [3]}, "lengths sum to 3 but there are 2"),
        ((torch.ones(2, 3), torch.ones(2, 4)), {"lengths": [3, -1]}, "non-negative"),
        ((torch.ones(1, 2, 3), torch.ones(1, 2, 4)), {"lengths": [3]}, "at most 2"),
        ((torch.ones(1, 2, 3), torch.ones(1, 2, 4)), {"out": torch.ones(3, 4)}, "out must be contiguous"),
        ((torch.ones(2, 3), torch.ones(2, 4)), {"out": torch.ones(4, 3, device="meta")}, "out must be on x's device"),
        ((torch.ones(3, 3), torch.ones(3, 4)), {"lengths": [2.9, 1.9]}, "one non-negative integer a sequence"),
    ],
)
def test_bad_input(arguments, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fisher_diag(*arguments, **kwargs)


@pytest.fixture
def hoppers(monkeypatch, on_backend):
    """The module of Hopper's kernels, which serve all that follows; the interpreter knows tensor descriptors too."""
    with on_backend(OP, torch.float16):
        if _backend.forced_backend() != "triton":
            pytest.skip("the kernel is Triton's")
        kernels = pytest.importorskip("sensilora.kernels.fisher_diag")
        monkeypatch.setattr(kernels, "_by_tma", lambda *args: True)
        monkeypatch.setattr(kernels, "SQUARES_MIN_WORK", 0)
        yield kernels


@pytest.mark.parametrize("lengths", [[128, 64], [300], [1, 64, 0, 130, 63], [5] * 20])
@pytest.mark.parametrize("features", [(136, 144), (40, 264)])
def test_hoppers_kernel_matches_oracle(hoppers, device, lengths, features, poisoned_empty):
    """Padded copies, chunks, splits, adding to `out`."""
    x, g = torch.randn(sum(lengths), features[0]).half(), torch.randn(sum(lengths), features[1]).half()
    out = torch.ones(features[1], features[0], device=device)
    got = [
        fisher_diag(x.to(device), g.to(device), lengths=lengths),
        fisher_diag(x.to(device), g.to(device), lengths=lengths, out=out) - 1,
    ]
    for value in got:
        assert relative_error(value, oracle(x, g, "per_sequence", lengths)) <= 1e-5


@pytest.fixture
def native_on_hopper():
    """The CUDA C++ kernel for Hopper serves all 16-bit rows of a multiple of 8 elements."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    reason = _backend.why_not(OP, "native", "cuda", torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    assert "9.0a" in _backend.architectures_built().split(":")
    with use_backend("native"):
        yield


RANDOM_LENGTHS = torch.randint(1, 513, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "lengths",
    [[64], [17], [1, 64, 0, 130, 63], [3] * 150, [512] * 9, [513, 40], [2000, 1, 700], RANDOM_LENGTHS],
    ids=["whole_step", "part", "mixed", "many", "full", "long", "longer", "random"],
)
@pytest.mark.parametrize("features", [(8, 16), (136, 144), (904, 1032), (4096, 2056)])
def test_hoppers_native_kernel_matches_oracle(native_on_hopper, dtype, lengths, features, poisoned_empty):
    """Steps that end 1 to 64 rows into a sequence, tiles divided among splits and not, long sums, adding to `out`."""
    x, g = (torch.randn(sum(lengths), size, device="cuda").to(dtype) for size in features)
    pairs = zip(g.double().split(lengths), x.double().split(lengths), strict=True)
    expected = sum((g_n.T @ x_n).square() for g_n, x_n in pairs)
    out = torch.ones(features[::-1], device="cuda")
    got = [fisher_diag(x, g, lengths=lengths), fisher_diag(x, g, lengths=lengths)]
    assert torch.equal(*got)
    assert relative_error(got[0], expected) <= 1e-5
    assert relative_error(fisher_diag(x, g, lengths=lengths, out=out), expected + 1) <= 1e-5


@pytest.mark.gpu
def test_hoppers_native_kernel_keeps_non_finite_values_apart(native_on_hopper):
    lengths = [40, 100, 60]
    x, g = (torch.randn(200, size, device="cuda", dtype=torch.bfloat16) for size in (264, 136))
    x[139, 3], g[140, 5] = float("nan"), float("inf")
    got = fisher_diag(x, g, lengths=lengths).isfinite()
    assert not got[:, 3].any()
    assert not got[5].any()
    got[:, 3] = got[5] = True
    assert got.all()


@pytest.mark.gpu
def test_hopper_takes_the_native_kernel_unasked(native_on_hopper, monkeypatch):
    taken = []
    # sensilora.ops has the function under the module's name.
    module = importlib.import_module("sensilora.ops.fisher_diag")
    monkeypatch.setattr(module, "_native", lambda *args: taken.append(args[3]))
    monkeypatch.setattr(_backend, "_forced", [])
    x, g = (torch.randn(64, size, device="cuda", dtype=torch.bfloat16) for size in (136, 144))
    fisher_diag(x, g)
    fisher_diag(x[:, :135], g)
    fisher_diag(x.float(), g.float())
    fisher_diag(x, g, mode="per_position")
    assert taken == ["per_sequence"]


def rows_like(kind, rows, in_features, out_features):
    x, g = torch.randn(rows, in_features), torch.randn(rows, out_features)
    if kind == "large rows":
        g[::50] *= 20
    elif kind == "a large row of x alone":
        x[5] *= 300
        g[5] *= 1e-3
    elif kind == "columns apart":
        x[:, ::9] *= 100
        x[:, 1] = 0
        g *= 2.0 ** -torch.arange(out_features).fmod(9)
    elif kind == "equal rows":
        x, g = x[:1].repeat(rows, 1), g[:2].repeat(rows // 2, 1)
    elif kind == "few columns":
        x[:, 3] *= 1000
        g[:, 2] *= 30
    return x, g


KINDS = ("normal", "large rows", "a large row of x alone", "columns apart", "equal rows", "few columns")


@pytest.mark.parametrize("rows", [1, 129])
def test_hoppers_squares_match_oracle(hoppers, device, rows, poisoned_empty):
    """All rows are corrected: the two halves of a square hold 22 bits."""
    x, g = (tensor.half() for tensor in rows_like("normal", rows, 136, 144))
    out = torch.ones(144, 136, device=device)
    fisher_diag(x.to(device), g.to(device), mode="per_position", out=out)
    assert relative_error(out - 1, oracle(x, g, "per_position", [rows])) <= 3e-6


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_squares_keep_the_tolerance(hoppers, monkeypatch, device, kind):
    """At a tolerance that leaves most rows as they are, which 256 rows do not at the real one."""
    monkeypatch.setattr(hoppers, "TOLERANCE", 6e-5)
    x, g = (tensor.half() for tensor in rows_like(kind, 256, 128, 128))
    got = fisher_diag(x.to(device), g.to(device), mode="per_position")
    error = relative_error(got, g.double().square().T @ x.double().square())
    # Equal rows lie on their mean, which is exact.
    assert (0 if kind == "equal rows" else 1e-6) < error <= 6e-5


def test_no_squares_are_zero(hoppers, device):
    x, g = torch.zeros(70, 128, device=device).half(), torch.randn(70, 128, device=device).half()
    assert not fisher_diag(x, g, mode="per_position").any()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [5000, 16500])
def test_rounded_squares_of_bf16(kind, rows):
    x, g = (tensor.bfloat16().cuda() for tensor in rows_like(kind, rows, 1032, 1024))
    first, second = (fisher_diag(x, g, mode="per_position") for _ in range(2))
    assert torch.equal(first, second)
    assert relative_error(first, g.double().square().T @ x.double().square()) <= 1e-5


@pytest.mark.gpu
def test_rounded_squares_hide_no_non_finite_value():
    x, g = (torch.randn(5000, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x[7, 3], g[8, 5] = float("nan"), float("inf")
    got = fisher_diag(x, g, mode="per_position").isfinite()
    assert not got[:, 3].any()
    assert not got[5].any()
    got[:, 3] = got[5] = True
    assert got.all()
