"""Small cases of every GPU kernel, for compute-sanitizer (``make sanitize``); right results are checked as well.

The oracle runs on the CPU, so that nothing but the op itself is slowed down by the sanitizer.
"""

import contextlib

import pytest
import torch

from sensilora.ops import (
    _backend,
    autocorrelation_diag,
    diagonal_metrics_batch,
    fisher_diag,
    hutchinson_accumulate,
    lora_group,
    lora_linear,
    lora_segments,
    lora_update,
    rademacher,
    use_backend,
)
from sensilora.ops._dropout import dropout, keep_scale, threshold
from sensilora.ops.fisher_diag import CONVENTIONS
from tests.tolerances import RELATIVE, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]
DEVICE = "cuda"

# Odd sizes leave tails in every tile. From 2048 rows on a persistent product serves on some GPUs.
SMALL, LARGE = (70, 43, 57), (2177, 72, 136)


@contextlib.contextmanager
def filled_memory():
    """New memory full of NaN, for kernels that write by TMA: initcheck does not see those writes."""
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(call, tensors, upstreams):
    """Outputs and gradients of `call`, which takes x, the A's and the B's."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = call(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstreams)]


def check(backend, dtype, call, tensors, upstreams):
    """Compare `call(dtype, device)`, a function of x, A's and B's, with itself in fp64 in plain torch."""
    for op in (call.op, f"{call.op}_backward"):
        reason = _backend.why_not(op, backend, DEVICE, dtype)
        if reason is not None:
            pytest.skip(reason)
    tensors, upstreams = ([tensor.to(dtype) for tensor in part] for part in (tensors, upstreams))
    with use_backend(backend), filled_memory() if len(tensors[0]) == LARGE[0] else contextlib.nullcontext():
        got = results(
            call(dtype, DEVICE), [t.to(DEVICE) for t in tensors], [upstream.to(DEVICE) for upstream in upstreams]
        )
    with use_backend("torch"):
        wanted = results(
            call(torch.float64, "cpu"), [t.double() for t in tensors], [upstream.double() for upstream in upstreams]
        )
    for value, reference in zip(got, wanted, strict=True):
        assert relative_error(value, reference) <= 4 * RELATIVE[dtype]


def matrices(sizes, ranks, outs):
    """x, weights, A's, B's and upstream gradients on the CPU in fp32."""
    rows, in_features = sizes
    x = torch.randn(rows, in_features)
    weights = [torch.randn(out, in_features) / in_features**0.5 for out in outs]
    lora_As = [torch.randn(rank, in_features) / in_features**0.5 for rank in ranks]
    lora_Bs = [torch.randn(out, rank) for out, rank in zip(outs, ranks, strict=True)]
    return x, weights, lora_As, lora_Bs, [torch.randn(rows, out) for out in outs]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("backend", "dtype", "sizes", "rank"),
    [
        ("triton", torch.float32, SMALL, 5),
        ("triton", torch.bfloat16, SMALL, 5),
        ("triton", torch.bfloat16, SMALL, 33),
        ("triton", torch.bfloat16, SMALL, 130),
        ("triton", torch.bfloat16, LARGE, 5),
        ("triton", torch.bfloat16, LARGE, 33),
        ("triton", torch.bfloat16, LARGE, 75),
        ("native", torch.float32, SMALL, 5),
        ("native", torch.bfloat16, SMALL, 33),
        ("native", torch.bfloat16, SMALL, 130),
    ],
)
def test_lora_linear(backend, dtype, sizes, rank, p):
    x, weights, lora_As, lora_Bs, upstreams = matrices(sizes[:2], [rank], [sizes[2]])
    weight, bias = weights[0].to(dtype), torch.randn(sizes[2]).to(dtype)

    def call(dtype, device):
        frozen = weight.to(device, dtype), bias.to(device, dtype)
        return lambda x, a, b: lora_linear(x, *frozen, a, b, 0.7, dropout_p=p, seed=3)

    call.op = "lora_linear"
    check(backend, dtype, call, [x, *lora_As, *lora_Bs], upstreams)


def test_dropout():
    launch_dropout = pytest.importorskip("sensilora.kernels.dropout").launch_dropout
    x = torch.randn(*SMALL[:2])
    got = launch_dropout(x.to(DEVICE), threshold(0.1), keep_scale(0.1), torch.tensor([3], device=DEVICE))
    assert relative_error(got, dropout(x.double(), 0.1, 3)) <= RELATIVE[torch.float32]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_lora_group(sizes, p):
    ranks, outs = [3, 20, 1], [sizes[2], 2 * sizes[2], sizes[2]]
    x, weights, lora_As, lora_Bs, upstreams = matrices(sizes[:2], ranks, outs)
    weights = [weight.bfloat16() for weight in weights]

    def call(dtype, device):
        frozen = [weight.to(device, dtype) for weight in weights]
        seeds = torch.tensor([3, 4, 5], device=device)

        def group(x, *adapters):
            return lora_group(
                x, frozen, [None] * 3, adapters[:3], adapters[3:], [0.7, 1.0, 2.0], dropout_ps=p, seeds=seeds
            )

        return group

    call.op = "lora_group"
    check("triton", torch.bfloat16, call, [x, *lora_As, *lora_Bs], upstreams)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("backend", "dtype", "rank"),
    [
        ("triton", torch.float32, 5),
        ("triton", torch.bfloat16, 33),
        ("triton", torch.bfloat16, 130),
        ("native", torch.bfloat16, 5),
    ],
)
def test_lora_update(backend, dtype, rank, p):
    x, _, lora_As, lora_Bs, upstreams = matrices(SMALL[:2], [rank], [SMALL[2]])
    base = torch.randn(SMALL[0], SMALL[2])

    def call(dtype, device):
        return lambda base, x, a, b: lora_update(base, x, a, b, 0.7, dropout_p=p, seed=3)

    call.op = "lora_update"
    check(backend, dtype, call, [base, x, *lora_As, *lora_Bs], upstreams)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_lora_segments(backend, dtype, p):
    ranks = [3, 20, 7]
    x, weights, lora_As, lora_Bs, upstreams = matrices(SMALL[:2], [sum(ranks)], [SMALL[2]])
    weight = weights[0].to(dtype)

    def call(dtype, device):
        offsets, adapters = (
            torch.tensor([2, 3, 40, 40, 61], device=device),
            torch.tensor([2, 0, 1, -1], device=device),
        )

        def segments(x, a, b):
            return lora_segments(
                x, weight.to(device, dtype), None, a, b, ranks, [0.7, 1.0, 2.0], offsets, adapters,
                dropout_ps=[p, 0.0, p], seed=3,
            )  # fmt: skip

        return segments

    call.op = "lora_segments"
    check(backend, dtype, call, [x, *lora_As, *lora_Bs], upstreams)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [77, 264])
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_autocorrelation_diag(backend, columns, dtype):
    reason = _backend.why_not("autocorrelation_diag", backend, DEVICE, dtype)
    if reason is not None:
        pytest.skip(reason)
    x = torch.randn(301, columns).to(dtype)
    mask = torch.rand(301) > 0.3
    out = torch.ones(columns, device=DEVICE)
    with use_backend(backend):
        got = autocorrelation_diag(x.to(DEVICE))
        added = autocorrelation_diag(x.to(DEVICE), mask=mask.to(DEVICE), out=out)
    assert relative_error(got, x.double().square().sum(0)) <= 1e-5
    assert relative_error(added, 1 + x[mask].double().square().sum(0)) <= 1e-5


# Sizes of in and out: odd ones, those of wide loads, whole tiles, those that TMA serves on Hopper.
ODD, WIDE, WHOLE, BY_TMA = (77, 43), (136, 72), (192, 128), (136, 264)


@pytest.mark.parametrize("mode", CONVENTIONS)
@pytest.mark.parametrize(
    ("backend", "dtype", "features", "adds"),
    [
        ("triton", torch.float32, ODD, False),
        ("triton", torch.float32, ODD, True),
        ("triton", torch.float32, WIDE, False),
        ("triton", torch.float32, WHOLE, False),
        ("triton", torch.bfloat16, ODD, False),
        ("triton", torch.bfloat16, WIDE, False),
        ("triton", torch.bfloat16, BY_TMA, False),
        ("triton", torch.bfloat16, BY_TMA, True),
        ("triton", torch.float16, BY_TMA, False),
        ("native", torch.float32, ODD, False),
        ("native", torch.float32, WIDE, True),
        ("native", torch.bfloat16, ODD, False),
        ("native", torch.bfloat16, WIDE, True),
        ("native", torch.float16, ODD, False),
        ("native", torch.float16, WIDE, False),
        ("native", torch.bfloat16, BY_TMA, True),
        ("native", torch.float64, ODD, False),
    ],
)
def test_fisher_diag(monkeypatch, backend, mode, dtype, features, adds):
    reason = _backend.why_not("fisher_diag", backend, DEVICE, dtype)
    if reason is not None:
        pytest.skip(reason)
    if backend == "triton":
        monkeypatch.setattr("sensilora.kernels.fisher_diag.SQUARES_MIN_WORK", 0)
    lengths = [301] if adds else [40, 1, 0, 260]
    x, g = (torch.randn(301, size).to(dtype) for size in features)
    out = torch.rand(features[::-1]) if adds else None
    with use_backend(backend), filled_memory() if min(features) >= 128 else contextlib.nullcontext():
        held = out if out is None else out.to(DEVICE, copy=True)
        got = fisher_diag(x.to(DEVICE), g.to(DEVICE), mode=mode, lengths=lengths, out=held)
    with use_backend("torch"):
        held = out if out is None else out.double()
        expected = fisher_diag(x.double(), g.double(), mode=mode, lengths=lengths, out=held)
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fisher_diag_of_long_sequences(dtype):
    reason = _backend.why_not("fisher_diag", "native", DEVICE, dtype)
    if reason is not None:
        pytest.skip(reason)
    lengths = [530, 70]
    x, g = (torch.randn(600, size, device=DEVICE).to(dtype) for size in BY_TMA)
    with use_backend("native"), filled_memory():
        got = fisher_diag(x, g, lengths=lengths)
    with use_backend("torch"):
        expected = fisher_diag(x.double(), g.double(), lengths=lengths)
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_hutchinson(backend, dtype):
    reason = _backend.why_not("hutchinson_accumulate", backend, DEVICE, dtype)
    if reason is not None:
        pytest.skip(reason)
    for size in (8192, 10_007):
        hz = torch.randn(size).to(dtype)
        with use_backend(backend):
            out = hutchinson_accumulate(hz.to(DEVICE), torch.zeros(size, device=DEVICE), seed=3, offset=4)
            z = rademacher((size,), seed=3, offset=4, device=DEVICE)
        with use_backend("torch"):
            expected = rademacher((size,), seed=3, offset=4)
        assert torch.equal(z.cpu(), expected)
        assert torch.equal(out.cpu(), expected * hz)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_diagonal_metrics(backend, dtype):
    reason = _backend.why_not("diagonal_metrics", backend, DEVICE, dtype)
    if reason is not None:
        pytest.skip(reason)
    diags = [torch.randn(size).square().to(dtype) for size in (8192, 1, 0, 70_001, 333)]
    diags.append(torch.rand(4000).to(dtype)[3:])
    diags.append(torch.full((9000,), 0.1, dtype=dtype))
    with use_backend(backend):
        got = diagonal_metrics_batch([diag.to(DEVICE) for diag in diags])
    with use_backend("torch"):
        expected = diagonal_metrics_batch(diags)
    for value, reference in zip(got, expected, strict=True):
        assert relative_error(value, reference) <= 1e-12
