"""hutchinson_accumulate and rademacher: the same bits on every backend, and signs that are random."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensilora.errors import BackendError
from sensilora.ops import hutchinson_accumulate, rademacher, use_backend
from sensilora.ops.hutchinson import _hutchinson_accumulate_, _rademacher_

OP = "hutchinson_accumulate"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Around a word (32), a Philox call (128), what the C++ makes at once (2048) and a program or warp (4096).
SHAPES = [(1,), (31,), (33,), (128, 1), (3, 43), (2047,), (5, 123, 7), (4096,), (2, 2051), (9, 1000)]
KEYS = [(0, 0), (12345, 7 << 32 | 9), (-1, 2**64 - 1), (2**31, 2**63), (-(2**63), 2**32 - 1)]


def philox(counter, key):
    """Philox4x32-7 in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(7):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & 0xFFFFFFFF, first >> 32 ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def sign(index, seed, offset):
    """The sign of one element, by the definition in the op's module."""
    low = 0xFFFFFFFF
    call = index // 128
    words = philox((call & low, call >> 32, offset & low, offset >> 32 & low), (seed & low, seed >> 32 & low))
    return 1 - 2 * (words[index % 128 // 32] >> index % 32 & 1)


@pytest.mark.parametrize(("seed", "offset"), KEYS)
def test_signs_are_as_defined(on_backend, device, seed, offset, poisoned_empty):
    with on_backend("rademacher", torch.float32):
        got = rademacher((3, 100), seed=seed, offset=offset, device=device)
    assert got.flatten().tolist() == [sign(index, seed, offset) for index in range(300)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_backend_gives_the_references_bits(on_backend, device, dtype, shape, poisoned_empty):
    hz = torch.randn(shape).to(dtype)
    seed, offset = KEYS[len(shape)]
    with use_backend("torch"):
        z = rademacher(shape, seed=seed, offset=offset)
    with on_backend(OP, dtype):
        assert torch.equal(rademacher(shape, seed=seed, offset=offset, dtype=dtype, device=device).cpu(), z.to(dtype))
        for out_dtype in (torch.float32, torch.float64):
            start = torch.randn(shape, dtype=out_dtype)
            out = start.to(device, copy=True)
            assert hutchinson_accumulate(hz.to(device), out, seed=seed, offset=offset) is out
            assert torch.equal(out.cpu(), start + z.to(out_dtype) * hz.to(out_dtype))


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(0, 10_000),
    seed=st.integers(-(2**63), 2**64 - 1),
    offset=st.integers(-(2**63), 2**64 - 1),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_backends_agree_on_any_size_and_key(size, seed, offset, dtype):
    hz = torch.linspace(-1, 3, size, dtype=dtype)
    outs = {}
    for name in ("torch", "native", "triton"):
        try:
            with use_backend(name):
                outs[name] = hutchinson_accumulate(hz, torch.ones(size), seed=seed, offset=offset)
        except BackendError:
            continue
    assert all(torch.equal(out, outs["torch"]) for out in outs.values())


def test_signs_are_balanced_and_independent():
    """Means of n independent signs are 0 within five standard deviations, 1/√n each, over elements and over keys."""
    n = 2**20
    limit = 5 / math.sqrt(n)
    z = rademacher((n,), seed=1)
    assert abs(z.mean()) <= limit
    for lag in (1, 2, 31, 32, 64, 96, 127, 128, 4096):
        assert abs((z * z.roll(lag)).mean()) <= limit, lag
    for seed, offset in ((1, 1), (1, 2), (1, 1 << 32), (2, 0), (1 << 32, 0)):
        assert abs((z * rademacher((n,), seed=seed, offset=offset)).mean()) <= limit, (seed, offset)
    # The squared sums of blocks have the mean of their size: no block leans to one side.
    sums = z.view(-1, 128).sum(1)
    assert abs(sums.square().mean() / 128 - 1) <= 5 * math.sqrt(2 / len(sums))


def test_the_signs_depend_on_the_flat_index_alone(on_backend, device):
    with on_backend("rademacher", torch.float32):
        long = rademacher((5000,), seed=3, offset=4, device=device)
        assert torch.equal(rademacher((700,), seed=3, offset=4, device=device), long[:700])
        assert torch.equal(rademacher((50, 100), seed=3, offset=4, device=device).flatten(), long)


def test_the_probe_mean_is_the_diagonal_of_a_small_hessian(device):
    """Over all probes z ⊙ Hz has the mean diag(H) and the variance Σ_{j≠i} H_ij²."""
    torch.manual_seed(1)
    hessian = torch.randn(12, 12, dtype=torch.float64)
    hessian = (hessian + hessian.T).to(device)
    out, probes = torch.zeros(12, dtype=torch.float64, device=device), 2000
    for probe in range(probes):
        z = rademacher((12,), seed=0, offset=probe, dtype=torch.float64, device=device)
        hutchinson_accumulate(hessian @ z, out, seed=0, offset=probe)
    deviation = (hessian.square().sum(1) - hessian.diagonal().square()).sqrt() / math.sqrt(probes)
    standardised = (out / probes - hessian.diagonal()) / deviation
    assert float(standardised.abs().max()) < 4
    assert 0.3 < float(standardised.square().mean()) < 2.5


def test_empty(on_backend, device):
    with on_backend(OP, torch.float32):
        assert rademacher((0, 4), seed=0, device=device).shape == (0, 4)
        assert (
            hutchinson_accumulate(torch.ones(3, 0, device=device), torch.ones(3, 0, device=device), seed=0).numel()
            == 0
        )


def test_strided_and_unaligned_inputs(on_backend, device):
    base = torch.randn(80, 90, device=device)
    long = torch.zeros(7201, device=device)
    for hz in (
        base.t(),
        base[:, 3:50],
        base[::3],
        base[:1].expand(20, 90),
        base.flatten()[1:7121].view(89, 80)[:, :-1],
    ):
        with on_backend(OP, torch.float32):
            got = hutchinson_accumulate(hz, torch.zeros(hz.shape, device=device), seed=5, offset=6)
            # A contiguous part of a tensor need not begin at a multiple of 16 bytes.
            shifted = long.zero_()[1 : 1 + hz.numel()].view(hz.shape)
            hutchinson_accumulate(hz, shifted, seed=5, offset=6)
        z = rademacher(hz.shape, seed=5, offset=6, device=device)
        assert torch.equal(got, z * hz)
        assert torch.equal(shifted, z * hz)
        assert long[0] == 0
        assert not long[1 + hz.numel() :].any()


@pytest.mark.parametrize("value", [float("inf"), 3e38, 1e-45, -0.0])
def test_extreme_values(on_backend, device, value):
    hz = torch.full((200,), value, device=device)
    with on_backend(OP, torch.float32):
        got = hutchinson_accumulate(hz, torch.zeros(200, device=device), seed=2)
    assert torch.equal(got, rademacher((200,), seed=2, device=device) * hz + 0.0)
    hz[7] = float("nan")
    with on_backend(OP, torch.float32):
        got = hutchinson_accumulate(hz, torch.zeros(200, device=device), seed=2)
    assert got.isnan().nonzero().tolist() == [[7]]


def test_sums_do_not_round_in_the_inputs_dtype(on_backend, device):
    hz = torch.full((64,), 2.0**-12, dtype=torch.float16, device=device)
    out = torch.ones(64, device=device)
    with on_backend(OP, torch.float16):
        hutchinson_accumulate(hz, out, seed=4)
    assert torch.equal((out - 1).abs(), hz.float())


def test_threads_do_not_matter():
    hz, before = torch.randn(300_001), torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(hutchinson_accumulate(hz, torch.ones_like(hz), seed=9))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_the_input_is_not_differentiated(device):
    hz = torch.randn(5, device=device, requires_grad=True)
    out = hutchinson_accumulate(hz, torch.zeros(5, device=device), seed=0)
    assert not out.requires_grad


def test_opcheck(device):
    hz, out = torch.randn(5, 6, device=device), torch.zeros(5, 6, device=device)
    torch.library.opcheck(_hutchinson_accumulate_, (hz, out, 3, -4))
    torch.library.opcheck(_rademacher_, (out, 3, -4))


@pytest.mark.parametrize(
    ("hz", "out", "keys", "message"),
    [
        (torch.ones(3, dtype=torch.int64), torch.ones(3), {}, "hz must be floating-point"),
        (torch.ones(3), torch.ones(2), {}, r"out must be contiguous fp32 or fp64 of shape \(3,\)"),
        (torch.ones(3), torch.ones(3).half(), {}, "out must be contiguous fp32 or fp64"),
        (torch.ones(3, 2), torch.ones(2, 3).t(), {}, "out must be contiguous"),
        (torch.ones(3), torch.ones(3), {"seed": 2**64}, "seed must fit 64 bits"),
        (torch.ones(3), torch.ones(3), {"offset": -(2**63) - 1}, "offset must fit 64 bits"),
    ],
)
def test_bad_input(hz, out, keys, message):
    with pytest.raises(ValueError, match=message):
        hutchinson_accumulate(hz, out, **{"seed": 0, **keys})


def test_bad_arguments_of_rademacher():
    with pytest.raises(ValueError, match="dtype must be floating-point"):
        rademacher((2,), seed=0, dtype=torch.int32)
    with pytest.raises(ValueError, match="seed must fit 64 bits"):
        rademacher((2,), seed=2**65)


@pytest.mark.gpu
def test_indices_beyond_2_to_31(on_backend, device):
    if device == "cpu":
        pytest.skip("takes long on a CPU")
    size = 2**31 + 5000
    with on_backend(OP, torch.float16):
        out = torch.zeros(size, device=device)
        hutchinson_accumulate(torch.ones(size, dtype=torch.float16, device=device), out, seed=1, offset=2)
    assert out[-20:].tolist() == [sign(index, 1, 2) for index in range(size - 20, size)]
    assert abs(float(out.mean(dtype=torch.float64))) < 5 / math.sqrt(size)
