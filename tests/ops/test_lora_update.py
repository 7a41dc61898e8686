"""lora_update: every backend against fp64 autograd of the plain formula, dropout, and the op's registration."""

import pytest
import torch
from torch.nn.functional import linear

from benchmarks.harness import captured
from sensilora.ops import lora_linear, lora_update
from sensilora.ops._dropout import keep_mask, keep_scale
from sensilora.ops.lora_update import _lora_update, _lora_update_backward
from tests.tolerances import RELATIVE, relative_error

OP = "lora_update"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = ("y", "base", "x", "lora_A", "lora_B")
SEED = 2**40 + 3


def make(sizes, dtype, device, *, base_dtype=None, adapter_dtype=None):
    *leading, in_features, out_features, rank = sizes
    return [
        torch.randn(*leading, out_features).to(device, base_dtype or dtype),
        torch.randn(*leading, in_features).to(device, dtype),
        (torch.randn(rank, in_features) / in_features**0.5).to(device, adapter_dtype or dtype),
        torch.randn(out_features, rank).to(device, adapter_dtype or dtype),
    ]


def results(function, tensors, upstream):
    """y and the gradients of base, x, lora_A and lora_B."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    y.backward(upstream.to(y))
    return y.detach(), *(leaf.grad for leaf in leaves)


def oracle(tensors, upstream, scaling, p=0.0):
    """The plain formula in fp64, adapters rounded to x's dtype, with the stored mask, differentiated by autograd."""
    _, x, *_ = tensors
    tensors = [tensors[0], x, *(tensor.to(x.dtype) for tensor in tensors[2:])]

    def formula(base, x, lora_A, lora_B):
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        kept = keep_mask(*rows.shape, p, SEED) if p else torch.ones_like(rows, dtype=torch.bool)
        dropped = (rows * kept * keep_scale(p)).reshape(x.shape)
        return base + scaling * linear(linear(dropped, lora_A), lora_B)

    return results(formula, [tensor.detach().cpu().double() for tensor in tensors], upstream.cpu().double())


def check(got, expected, dtype):
    for name, value, reference in zip(NAMES, got, expected, strict=True):
        assert relative_error(value, reference) <= 4 * RELATIVE[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "p"),
    [
        ((1, 1, 1, 1), 0.0),
        ((3, 7, 33, 17, 5), 0.3),
        ((2, 3, 4, 19, 31, 11), 1.0),
        ((70, 64, 48, 33), 0.3),
        ((33, 40, 72, 150), 0.0),
        ((20, 264, 72, 16), 0.0),
    ],
)
def test_forward_and_backward_match_oracle(on_backend, device, dtype, sizes, p, poisoned_empty):
    tensors = make(sizes, dtype, device)
    upstream = torch.randn(*sizes[:-3], sizes[-2]).to(dtype)
    expected = oracle(tensors, upstream, 0.7, p)
    with on_backend(OP, dtype):
        got = results(lambda *t: lora_update(*t, 0.7, dropout_p=p, seed=SEED), tensors, upstream)
        again = results(lambda *t: lora_update(*t, 0.7, dropout_p=p, seed=SEED), tensors, upstream)
    check(got, expected, dtype)
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))


@pytest.mark.parametrize(
    ("base_dtype", "dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dtypes_may_differ(on_backend, device, base_dtype, dtype, adapter_dtype, p):
    tensors = make((40, 48, 56, 12), dtype, device, base_dtype=base_dtype, adapter_dtype=adapter_dtype)
    upstream = torch.randn(40, 56).to(base_dtype)
    expected = oracle(tensors, upstream, 0.7, p)
    with on_backend(OP, dtype):
        got = results(lambda *t: lora_update(*t, 0.7, dropout_p=p, seed=SEED), tensors, upstream)
    assert [value.dtype for value in got] == [base_dtype, base_dtype, dtype, adapter_dtype, adapter_dtype]
    check(got, expected, max(base_dtype, dtype, key=RELATIVE.get))


def test_an_fp64_base_is_not_rounded():
    tensors = make((4, 6, 5, 2), torch.float32, "cpu", base_dtype=torch.float64)
    expected = tensors[0] + 0.7 * linear(linear(tensors[1].double(), tensors[2].double()), tensors[3].double())
    assert relative_error(lora_update(*tensors, 0.7), expected) < 1e-12


def test_the_mask_is_that_of_lora_linear(on_backend, device):
    _, x, lora_A, lora_B = make((9, 40, 24, 6), torch.float32, device)
    weight = torch.randn(24, 40, device=device)
    with on_backend(OP, torch.float32):
        got = lora_update(linear(x, weight), x, lora_A, lora_B, 0.7, dropout_p=0.4, seed=SEED)
        expected = lora_linear(x, weight, None, lora_A, lora_B, 0.7, dropout_p=0.4, seed=SEED)
    assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("sizes", [(0, 6, 5, 3), (4, 6, 5, 0), (2, 0, 6, 5, 3)])
def test_without_rows_or_rank_it_is_the_base(on_backend, device, sizes):
    tensors = make(sizes, torch.float32, device)
    upstream = torch.randn(*sizes[:-3], sizes[-2])
    with on_backend(OP, torch.float32):
        y, base, x, lora_A, lora_B = results(lambda *t: lora_update(*t, 0.7, dropout_p=0.5), tensors, upstream)
    assert torch.equal(y, tensors[0])
    assert torch.equal(base.cpu(), upstream)
    assert not any(gradient.any() for gradient in (x, lora_A, lora_B))


def test_base_is_not_changed_and_a_frozen_input_gets_no_gradient(on_backend, device):
    base, x, lora_A, lora_B = make((9, 40, 24, 6), torch.float32, device)
    before = base.clone()
    with on_backend(OP, torch.float32):
        y = lora_update(base, x, lora_A.requires_grad_(), lora_B.requires_grad_(), 0.7)
        y.sum().backward()
    assert torch.equal(base, before)
    assert x.grad is None
    assert lora_A.grad.shape == lora_A.shape


def test_inputs_need_not_be_contiguous(on_backend, device):
    tensors = make((5, 7, 24, 16, 6), torch.float32, device)
    upstream = torch.randn(5, 7, 16)
    expected = oracle(tensors, upstream, 0.7)
    leaves, upstream = (
        [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in group] for group in (tensors, [upstream])
    )
    assert not any(tensor.is_contiguous() for tensor in (*leaves, *upstream))
    with on_backend(OP, torch.float32):
        y = lora_update(*(tensor.requires_grad_() for tensor in leaves), 0.7)
        gradients = torch.autograd.grad(y, leaves, upstream[0].to(device))
    check((y, *gradients), expected, torch.float32)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_the_update_in_its_dtype(device, base_dtype):
    tensors = make((9, 40, 24, 6), torch.float32, device, base_dtype=base_dtype)
    expected = oracle([tensors[0], tensors[1].bfloat16(), *tensors[2:]], torch.zeros(9, 24), 0.7)[0]
    with torch.autocast(device, torch.bfloat16):
        got = lora_update(*tensors, 0.7)
    assert got.dtype == base_dtype
    assert relative_error(got, expected) <= RELATIVE[torch.bfloat16]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(device, requires_grad, p):
    tensors = [tensor.requires_grad_(requires_grad) for tensor in make((2, 3, 6, 4, 2), torch.float32, device)]
    seed = torch.tensor([3], device=device) if p else None
    torch.library.opcheck(_lora_update, (*tensors, 0.7, p, seed))
    base, x, lora_A, lora_B = (tensor.detach() for tensor in tensors)
    h = torch.randn(6, 16, device=device)
    for need_grad_x in (False, True):
        torch.library.opcheck(_lora_update_backward, (base, x, h, lora_A, lora_B, 0.7, p, seed, need_grad_x))


def test_gradcheck():
    tensors = [tensor.requires_grad_() for tensor in make((3, 6, 5, 2), torch.float64, "cpu")]
    assert torch.autograd.gradcheck(lambda *t: lora_update(*t, 0.7, dropout_p=0.3, seed=5), tensors)


def test_compiles_whole_and_repeats_masks_by_torchs_seed(device):
    tensors = [tensor.requires_grad_() for tensor in make((4, 6, 24, 16, 5), torch.float32, device)]
    compiled = torch.compile(lambda *t: lora_update(*t, 0.7, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, compiled, lambda *t: lora_update(*t, 0.7, dropout_p=0.5)):
        torch.manual_seed(3)
        found.append(results(function, tensors, torch.ones(4, 6, 16)))
    for other in found[1:]:
        assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(found[0], other, strict=True))


@pytest.mark.gpu
def test_graph_capture():
    tensors = make((64, 48, 40, 8), torch.float16, "cuda")
    expected = lora_update(*tensors, 0.7)
    assert torch.equal(captured(lambda: lora_update(*tensors, 0.7))(), expected)


def test_differentiating_twice_raises():
    tensors = [tensor.requires_grad_() for tensor in make((3, 6, 5, 2), torch.float32, "cpu")]
    (gradient,) = torch.autograd.grad(lora_update(*tensors, 0.7).sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


def test_forward_mode_raises():
    base, x, lora_A, lora_B = make((3, 6, 5, 2), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="forward mode"):
        torch.func.jvp(lambda x: lora_update(base, x, lora_A, lora_B, 0.7), (x,), (torch.ones_like(x),))


def test_bad_operands_raise():
    base, x, lora_A, lora_B = make((3, 6, 5, 2), torch.float32, "cpu")
    with pytest.raises(ValueError, match="shapes do not fit"):
        lora_update(base[:, :4], x, lora_A, lora_B, 0.7)
    with pytest.raises(ValueError, match="shapes do not fit"):
        lora_update(base[:2], x, lora_A, lora_B, 0.7)
    with pytest.raises(ValueError, match="bfloat16 or float16, not torch"):
        lora_update(base.to(torch.int8), x, lora_A, lora_B, 0.7)
    with pytest.raises(ValueError, match="one device"):
        lora_update(base.to("meta"), x, lora_A, lora_B, 0.7)
    with pytest.raises(ValueError, match="dropout_p must be in"):
        lora_update(base, x, lora_A, lora_B, 0.7, dropout_p=1.5)
