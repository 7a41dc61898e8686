"""LoRA from plain products, which serves calls that a GPU runs sooner than they are launched."""

import pytest
import torch

from sensilora.ops import _backend, _products, lora_linear, use_backend
from tests.ops.test_lora_group import SEEDS, Group, assert_close
from tests.tolerances import RELATIVE

OP = "lora_group"


def products(x, weights, biases, lora_As, lora_Bs, scalings, dropout_ps=0.0, seeds=None, need_grad_x=True):
    """`_products` under autograd, for 2-dimensional x."""
    masks = dropout_ps if isinstance(dropout_ps, list) else [dropout_ps] * len(weights), seeds

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *adapters):
            members = len(weights)
            ctx.adapters = adapters[:members], adapters[members:]
            outputs, h = _products.forward(x, weights, biases, *ctx.adapters, scalings, *masks)
            ctx.save_for_backward(x, h)
            return tuple(outputs)

        @staticmethod
        def backward(ctx, *grads):
            x, h = ctx.saved_tensors
            grad_x, grad_As, grad_Bs = _products.backward(
                grads, x, h, weights, *ctx.adapters, scalings, *masks, need_grad_x
            )
            assert grad_x.numel() == (x.numel() if need_grad_x else 0)
            adapters = zip((*grad_As, *grad_Bs), (*ctx.adapters[0], *ctx.adapters[1]), strict=True)
            return grad_x if need_grad_x else None, *(grad.to(adapter.dtype) for grad, adapter in adapters)

    return Products.apply(x, *lora_As, *lora_Bs)


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "members", [[(40, 16)], [(8, 0)], [(40, 3), (24, 32), (48, 0), (264, 1)], [(7, 130), (9, 5)]]
)
def test_matches_oracle(device, dtype, adapter_dtype, members, poisoned_empty):
    group = Group((130,), 72, members, dtype, device, adapter_dtype)
    tolerance = 4 * max(RELATIVE[dtype], RELATIVE[adapter_dtype or dtype])
    assert_close(group.results(products), group.oracle(), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ps", [0.25, [0.25, 0.0, 0.5, 1.0]])
def test_masks_are_those_of_the_reference(on_backend, device, dtype, ps, poisoned_empty):
    with on_backend("lora_group", dtype):
        if _backend.forced_backend() != "triton":
            pytest.skip("the masks are Triton's")
        group = Group((70,), 72, [(40, 3), (24, 32), (48, 0), (264, 1)], dtype, device)
        count = 4 if isinstance(ps, list) else 1
        got = group.results(products, dropout_ps=ps, seeds=group.seeds(count))
    assert_close(got, group.oracle(ps, SEEDS[:count]), 4 * RELATIVE[dtype])


def test_without_a_gradient_of_x():
    group = Group((13,), 24, [(16, 3), (8, 5)])
    got = group.results(lambda *operands: products(*operands, need_grad_x=False))
    assert got.pop("x") is None
    expected = group.oracle()
    assert_close(got, {name: expected[name] for name in got}, RELATIVE[torch.float32])


def test_padding_of_h_is_zero(poisoned_empty):
    group = Group((13,), 24, [(16, 3), (8, 20)])
    adapters = group.lora_As, group.lora_Bs, group.scalings
    _, h = _products.forward(group.x, group.weights, group.biases, *adapters, [0.0] * 2, None)
    assert h.shape == (13, 16 + 32)
    assert not h[:, 3:16].any()
    assert not h[:, 36:].any()


def test_a_cpu_launches_nothing():
    one = torch.ones(1, 1)
    assert not _products.serve(one, [one])
    assert not _products.native_serves(one.bfloat16(), [one], [one])


@pytest.mark.gpu
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_small_calls_are_products_and_large_ones_and_graphs_are_not(monkeypatch, adapter_dtype):
    monkeypatch.setattr(_products, "native_serves", lambda *operands: False)  # as without the extension
    calls = []
    for name in ("forward", "backward"):
        function = getattr(_products, name)
        monkeypatch.setattr(
            _products, name, lambda *args, function=function: calls.append(function.__name__) or function(*args)
        )
    group = Group((4, 40), 72, [(40, 3), (24, 32)], torch.bfloat16, "cuda", adapter_dtype)
    got = group.results(dropout_ps=0.1, seeds=group.seeds())
    assert calls == ["forward", "backward"]
    assert_close(got, group.oracle(0.1, SEEDS[:2]), 4 * RELATIVE[torch.bfloat16])
    x, weight, bias = group.x.requires_grad_(), group.weights[0], group.biases[0]
    lora_A, lora_B = group.lora_As[0].requires_grad_(), group.lora_Bs[0].requires_grad_()

    def step():
        y = lora_linear(x, weight, bias, lora_A, lora_B, 0.7)
        return torch.autograd.grad(y.float().sum(), (x, lora_A, lora_B))

    step()
    assert calls == ["forward", "backward"] * 2
    with use_backend("triton"):
        step()
    assert len(calls) == 4
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    calls.clear()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        step()
    assert calls == []
    monkeypatch.setattr(_products, "LAUNCH_BOUND_FLOPS", 0)
    step()
    assert calls == []


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_small_calls_are_the_native_ones_where_it_is_built(monkeypatch, adapter_dtype, dropout_p):
    reason = _backend.why_not("lora_linear", "native", "cuda", torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    for name in ("forward", "backward"):
        monkeypatch.setattr(_products, name, None)
    group = Group((4, 40), 72, [(40, 3), (24, 32)], torch.bfloat16, "cuda", adapter_dtype)
    got = group.results(dropout_ps=dropout_p, seeds=group.seeds())
    assert_close(got, group.oracle(dropout_p, SEEDS[:2]), 4 * RELATIVE[torch.bfloat16])
    x, lora_A, lora_B = (t.requires_grad_() for t in (group.x, group.lora_As[0], group.lora_Bs[0]))
    y = lora_linear(x, group.weights[0], group.biases[0], lora_A, lora_B, 0.7)
    torch.autograd.grad(y.float().sum(), (x, lora_A, lora_B))


@pytest.mark.gpu
def test_which_calls_are_native():
    reason = _backend.why_not("lora_linear", "native", "cuda", torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)

    def native(rows, dtype=torch.bfloat16, ranks=(8,), features=4096):
        x, weight = (torch.empty(size, features, dtype=dtype, device="cuda") for size in (rows, features))
        return _products.native_serves(x, [weight], [torch.empty(rank, 1, device="cuda") for rank in ranks])

    assert native(1)
    assert native(2048, torch.float16, (64, 1))
    assert native(4096, features=64)
    assert not native(4096)
    assert not native(0)
    assert not native(8, torch.float32)
    assert not native(8, ranks=(8, 65))
    assert not native(8, ranks=(0, 8))
    with use_backend("triton"):
        assert not native(8)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # an empty graph is warned of
        assert not native(8)
