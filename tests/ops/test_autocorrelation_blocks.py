"""autocorrelation_blocks against the blocks of XᵀX in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensilora.ops import autocorrelation_blocks, autocorrelation_diag
from tests.tolerances import ACCUMULATED, relative_error

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def oracle(x, block_size, mask=None):
    rows = x.detach().double().cpu().reshape(-1, x.shape[-1])
    rows = rows if mask is None else rows[mask.cpu().reshape(-1)]
    features = x.shape[-1]
    block = min(block_size, features)
    full = rows.T @ rows
    blocks = torch.zeros(-(-features // block), block, block, dtype=torch.float64)
    for index, start in enumerate(range(0, features, block)):
        part = full[start : start + block, start : start + block]
        blocks[index, : len(part), : len(part)] = part
    return blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((1, 1), 1), ((7, 33), 8), ((7, 33), 33), ((7, 33), 99), ((3, 4, 5, 17), 16), ((513, 129), 128), ((1, 12), 4)],
)
def test_matches_oracle(device, dtype, masked, shape, block_size, poisoned_empty):
    x = torch.randn(shape).to(dtype).to(device)
    mask = torch.rand(shape[:-1], device=device) > 0.4 if masked else None
    got = autocorrelation_blocks(x, block_size, mask=mask)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.device == x.device
    assert relative_error(got, oracle(x, block_size, mask)) <= ACCUMULATED[dtype]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 20), columns=st.integers(1, 50), block=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_its_diagonal_is_autocorrelation_diag(rows, columns, block, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, generator=generator) > 0.5
    blocks = autocorrelation_blocks(x, block, mask=mask)
    diagonal = blocks.diagonal(dim1=-2, dim2=-1).flatten()
    assert relative_error(diagonal[:columns], autocorrelation_diag(x, mask=mask)) <= 1e-6
    assert not diagonal[columns:].any()
    assert relative_error(blocks, blocks.mT) <= 1e-6


def test_rows_that_do_not_count_may_hold_anything(device):
    x = torch.randn(6, 5, device=device)
    mask = torch.tensor([True, False, True, True, False, True], device=device)
    x[1], x[4] = float("nan"), float("inf")
    assert relative_error(autocorrelation_blocks(x, 2, mask=mask), oracle(x, 2, mask)) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)])
def test_empty(device, shape, poisoned_empty):
    got = autocorrelation_blocks(torch.ones(shape, device=device), 3)
    assert got.shape[0] == -(-shape[-1] // 3)
    assert not got.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(device, dtype):
    x = torch.randn(9, 40, device=device).to(dtype)
    for view in (x[:, 3:20], x[::2], x.t(), x[:, ::3], x[:1].expand(5, 40), x.view(3, 3, 40).transpose(0, 1)):
        assert relative_error(autocorrelation_blocks(view, 7), oracle(view, 7)) <= ACCUMULATED[dtype]


def test_fp16_products_neither_overflow_nor_underflow(device):
    for value in (6e4, 1e-4):
        x = torch.full((100, 4), value, dtype=torch.float16, device=device)
        assert relative_error(autocorrelation_blocks(x, 2), oracle(x, 2)) <= 1e-5


def test_autocast_does_not_lower_the_precision(device):
    x = torch.randn(64, 6, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = autocorrelation_blocks(x, 4)
    assert relative_error(got, oracle(x, 4)) <= 1e-6


def test_it_is_cut_from_the_graph(device):
    assert not autocorrelation_blocks(torch.randn(3, 4, device=device, requires_grad=True), 2).requires_grad


@pytest.mark.gpu
def test_halves_are_summed_in_fp32_without_a_copy():
    """The copy of x in fp32 alone would take twice x's memory."""
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    autocorrelation_blocks(x, 128)  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = autocorrelation_blocks(x, 128)
    assert torch.cuda.max_memory_allocated() - before < x.nbytes
    assert relative_error(got, oracle(x, 128)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sums_of_squares_are_not_cut_off(dtype):
    x = torch.randn(16384, 256, device="cuda", dtype=dtype)
    assert relative_error(autocorrelation_blocks(x, 128), oracle(x, 128)) <= 1e-5


@pytest.mark.parametrize(
    ("x", "block_size", "mask", "message"),
    [
        (torch.tensor(1.0), 2, None, "must be a floating-point tensor"),
        (torch.ones(2, 3, dtype=torch.int64), 2, None, "must be a floating-point tensor"),
        (torch.ones(2, 3), 2, torch.ones(3, dtype=torch.bool), "mask must be bool of shape"),
        (torch.ones(2, 3), 2, torch.ones(2), "mask must be bool of shape"),
        (torch.ones(2, 3), 2, torch.ones(2, dtype=torch.bool, device="meta"), "on cpu, not .* on meta"),
        (torch.ones(2, 3), 0, None, "block_size must be at least 1, not 0"),
    ],
)
def test_bad_input(x, block_size, mask, message):
    with pytest.raises(ValueError, match=message):
        autocorrelation_blocks(x, block_size, mask=mask)
