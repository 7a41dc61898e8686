"""lora_group: every backend against fp64 autograd of the plain formula, masks like lora_linear's, registration."""

import weakref
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from sensilora.errors import BackendError
from sensilora.ops import _backend, lora_group, lora_linear, use_backend
from sensilora.ops._dropout import keep_mask, keep_scale
from sensilora.ops._lora import columns_of_h
from sensilora.ops.lora_group import _lora_group, _lora_group_backward
from tests.tolerances import RELATIVE, relative_error

OP = "lora_group"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SEEDS = [2**40 + 3, 5, 2**62 + 1, 77]


class Group:
    """Random operands: x of shape (*leading, in_features) and one (out_features, rank) a member."""

    def __init__(self, leading, in_features, members, dtype=torch.float32, device="cpu", adapter_dtype=None):
        def draw(*shape, scale=1.0, kind=dtype):
            return (torch.randn(*shape) * scale).to(device, kind)

        adapter_dtype, root = adapter_dtype or dtype, max(in_features, 1) ** -0.5
        self.x = draw(*leading, in_features)
        self.weights = [draw(out, in_features, scale=root) for out, _ in members]
        # Every second member has a bias.
        self.biases = [draw(out) if i % 2 == 0 else None for i, (out, _) in enumerate(members)]
        self.lora_As = [draw(rank, in_features, scale=root, kind=adapter_dtype) for _, rank in members]
        self.lora_Bs = [draw(out, rank, kind=adapter_dtype) for out, rank in members]
        self.scalings = [0.7 + 0.4 * i for i in range(len(members))]
        self.upstreams = [draw(*leading, out) for out, _ in members]

    def seeds(self, count=None):
        return torch.tensor(SEEDS[: count or len(self.weights)], device=self.x.device)

    def results(self, function=lora_group, **kwargs):
        """Outputs and the gradients of x, every A and every B, named."""
        x = self.x.detach().clone().requires_grad_()
        lora_As = [a.detach().clone().requires_grad_() for a in self.lora_As]
        lora_Bs = [b.detach().clone().requires_grad_() for b in self.lora_Bs]
        outputs = function(x, self.weights, self.biases, lora_As, lora_Bs, self.scalings, **kwargs)
        torch.autograd.backward(outputs, [upstream.to(outputs[0]) for upstream in self.upstreams])
        named = {"x": x.grad}
        for i in range(len(outputs)):
            named |= {f"y{i}": outputs[i].detach(), f"A{i}": lora_As[i].grad, f"B{i}": lora_Bs[i].grad}
        return named

    def oracle(self, ps=0.0, seeds=None):
        """The plain formula in fp64, with the stored masks, differentiated by autograd."""
        exact = object.__new__(Group)
        for name, value in vars(self).items():
            if name == "scalings":
                exact.scalings = value
            elif isinstance(value, list):
                setattr(exact, name, [None if t is None else t.detach().cpu().double() for t in value])
            else:
                setattr(exact, name, value.detach().cpu().double())
        ps = ps if isinstance(ps, list) else [ps] * len(self.weights)

        def formula(x, weights, biases, lora_As, lora_Bs, scalings):
            outputs = []
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
                if ps[i]:
                    key = int(seeds[i if len(seeds) > 1 else 0])
                    flat = flat * keep_mask(*flat.shape, ps[i], key) * keep_scale(ps[i])
                dropped = flat.reshape(x.shape)
                update = linear(linear(dropped, lora_As[i]), lora_Bs[i])
                outputs.append(linear(x, weight, bias) + scalings[i] * update)
            return outputs

        return exact.results(formula)


def assert_close(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name in got:
        assert relative_error(got[name], expected[name]) <= tolerance, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ps", [0.0, 0.05, [0.5, 0.0, 1.0, 0.1]])
@pytest.mark.parametrize(
    ("leading", "in_features", "members"),
    [
        ((1,), 1, [(1, 1)]),
        ((5,), 8, [(16, 3), (16, 3)]),
        ((3, 7), 33, [(17, 5), (40, 0), (23, 19)]),
        ((130,), 64, [(48, 33), (16, 1), (48, 16), (8, 70)]),
    ],
)
def test_forward_and_backward_match_oracle(on_backend, device, dtype, ps, leading, in_features, members):
    group = Group(leading, in_features, members, dtype, device)
    ps = ps[: len(members)] if isinstance(ps, list) else ps
    with on_backend(OP, dtype):
        got = group.results(dropout_ps=ps, seeds=group.seeds())
    assert_close(got, group.oracle(ps, SEEDS[: len(members)]), 4 * RELATIVE[dtype])


@pytest.mark.parametrize("ranks", [(512, 7), (200, 0, 130)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_large_ranks(on_backend, device, ranks, p):
    group = Group((33,), 40, [(24, rank) for rank in ranks], device=device)
    with on_backend(OP, torch.float32):
        got = group.results(dropout_ps=p, seeds=group.seeds())
    assert_close(got, group.oracle(p, SEEDS[: len(ranks)]), 4 * RELATIVE[torch.float32])


def test_one_mask_for_the_group(on_backend, device):
    group = Group((65,), 40, [(24, 7), (16, 0), (8, 20)], device=device)
    with on_backend(OP, torch.float32):
        got = group.results(dropout_ps=0.3, seeds=group.seeds(1))
    assert_close(got, group.oracle(0.3, SEEDS[:1]), 4 * RELATIVE[torch.float32])


@pytest.mark.parametrize("shared", [False, True])
def test_masks_are_lora_linears(on_backend, device, shared):
    """Zeros in h tell the mask, element by element: A is the identity."""
    group = Group((64,), 48, [(4, 48), (4, 48), (4, 48)], device=device)
    group.lora_As = [torch.eye(48, device=device)] * 3
    group.x = torch.ones_like(group.x)
    seeds = group.seeds(1 if shared else 3)
    with on_backend(OP, torch.float32):
        h = _lora_group(
            group.x, group.weights, [], [False] * 3, group.lora_As, group.lora_Bs, group.scalings, [0.4] * 3, seeds
        )[1]
    for i, columns in enumerate(columns_of_h([48] * 3)):
        kept = keep_mask(64, 48, 0.4, SEEDS[0 if shared else i], device)
        assert torch.equal(h[:, columns] != 0, kept)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_equals_lora_linear_member_by_member(on_backend, device, p):
    group = Group((37,), 24, [(12, 5), (20, 18)], device=device)
    seeds = group.seeds()

    def alone(x, *lists, dropout_ps, seeds):
        members = zip(*lists, strict=True)
        return [lora_linear(x, *own, dropout_p=dropout_ps, seed=seeds[i : i + 1]) for i, own in enumerate(members)]

    with on_backend(OP, torch.float32):
        together = group.results(dropout_ps=p, seeds=seeds)
        apart = group.results(alone, dropout_ps=p, seeds=seeds)
    assert_close(together, apart, RELATIVE[torch.float32])


def test_members_without_rank_are_base_layers(on_backend, device):
    group = Group((4,), 6, [(5, 0), (3, 0)], device=device)
    with on_backend(OP, torch.float32):
        got = group.results(dropout_ps=0.5)
    assert_close(got, group.oracle(), RELATIVE[torch.float32])
    assert got["A0"].shape == (0, 6)
    assert got["B1"].shape == (3, 0)


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_no_rows(on_backend, device, leading, p):
    group = Group(leading, 6, [(5, 3), (4, 2)], device=device)
    with on_backend(OP, torch.float32):
        got = group.results(dropout_ps=p)
    assert got["y1"].shape == (*leading, 4)
    assert got["x"].shape == (*leading, 6)
    assert not any(got[name].any() for name in ("A0", "A1", "B0", "B1"))


def test_outputs_are_all_written(on_backend, device, poisoned_empty):
    group = Group((9,), 13, [(7, 3), (5, 0), (11, 20)], device=device)
    with on_backend(OP, torch.float32):
        got = group.results(dropout_ps=0.3)
    assert all(torch.isfinite(value).all() for value in got.values())


def test_strided_inputs(on_backend, device):
    group = Group((20, 6), 2, [(7, 3), (5, 2)], device=device)
    group.x = torch.randn(6, 20, 4, device=device).transpose(0, 1)[..., ::2]
    for tensors in (group.weights, group.lora_As, group.lora_Bs):
        tensors[:] = [tensor.t().contiguous().t() for tensor in tensors]
    group.upstreams = [torch.randn(1, 1, out, device=device).expand(20, 6, out) for out in (7, 5)]
    with on_backend(OP, torch.float32):
        got = group.results()
    assert_close(got, group.oracle(), 4 * RELATIVE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_over_a_16_bit_base(on_backend, device, dtype):
    group = Group((7,), 16, [(12, 4), (9, 20)], dtype, device, adapter_dtype=torch.float32)
    with on_backend(OP, dtype):
        got = group.results()
    assert {name: value.dtype for name, value in got.items()} == {
        name: torch.float32 if name[0] in "AB" else dtype for name in got
    }
    assert_close(got, group.oracle(), 4 * RELATIVE[dtype])


def test_inputs_are_not_written_and_results_repeat(on_backend, device):
    group = Group((65,), 40, [(24, 7), (16, 17)], device=device)
    before = group.x.clone()
    with on_backend(OP, torch.float32):
        runs = [group.results(dropout_ps=0.3, seeds=group.seeds()) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert torch.equal(group.x, before)


@pytest.mark.parametrize("used", [[0], [2], [0, 2], []])
@pytest.mark.parametrize("shared", [False, True])
def test_members_that_are_not_used_get_no_gradient(on_backend, device, used, shared):
    group = Group((9,), 13, [(7, 3), (5, 4), (11, 20)], device=device)
    seeds, seen = group.seeds(1 if shared else 3), []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "lora_group_backward" in str(func):
                seen.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    def some(*args, **kwargs):
        outputs = lora_group(*args, **kwargs)
        x, _, _, lora_As, lora_Bs, _ = args
        return [outputs[i] if i in used else 0 * x.sum() * lora_As[i].sum() * lora_Bs[i].sum() for i in range(3)]

    whole = [upstream.clone() for upstream in group.upstreams]
    group.upstreams = [upstream if i in used else torch.zeros([]) for i, upstream in enumerate(whole)]
    with on_backend(OP, torch.float32), Spy():
        got = group.results(some, dropout_ps=0.3, seeds=seeds)
    assert seen == ([len(used)] if used else [])
    group.upstreams = [upstream if i in used else torch.zeros_like(upstream) for i, upstream in enumerate(whole)]
    expected = group.oracle(0.3, SEEDS[: len(seeds)])
    for name in ("x", *(f"{kind}{i}" for kind in "AB" for i in range(3))):
        assert relative_error(got[name], expected[name]) <= 4 * RELATIVE[torch.float32], name


def test_gradients_of_weights_and_biases(on_backend, device):
    group = Group((2, 3), 5, [(4, 2), (3, 1), (2, 0)], torch.float64, device)
    tensors = [group.x, *group.weights, group.biases[0], group.biases[2], *group.lora_As, *group.lora_Bs]

    def function(x, *rest):
        biases = [rest[3], None, rest[4]]
        return lora_group(
            x, rest[:3], biases, rest[5:8], rest[8:], [0.7, 1.1, 1.0], dropout_ps=[0.3, 0.0, 0.5], seeds=group.seeds()
        )

    with on_backend(OP, torch.float64):
        assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in tensors])


def test_no_gradient_of_x(on_backend, device):
    group = Group((9,), 13, [(7, 3), (5, 4)], device=device)
    lora_As = [a.clone().requires_grad_() for a in group.lora_As]
    with on_backend(OP, torch.float32):
        outputs = lora_group(group.x, group.weights, group.biases, lora_As, group.lora_Bs, group.scalings)
        torch.autograd.backward(outputs, group.upstreams)
    assert_close({"A1": lora_As[1].grad}, {"A1": group.oracle()["A1"]}, 4 * RELATIVE[torch.float32])


def test_negative_seeds(on_backend, device):
    group = Group((5,), 33, [(17, 4), (9, 3)], torch.float32, device)
    seeds = torch.tensor([-3, -(2**63)], device=device)
    with on_backend(OP, torch.float32):
        got = group.results(dropout_ps=0.3, seeds=seeds)
    expected = group.oracle(0.3, [-3 % 2**64, 2**63])
    for name, value in got.items():
        assert relative_error(value, expected[name]) <= 4 * RELATIVE[torch.float32], name


def test_seeds_are_drawn_from_torchs_generator():
    group = Group((32,), 32, [(8, 4), (8, 4)])
    group.lora_As[1], group.lora_Bs[1], group.weights[1] = group.lora_As[0], group.lora_Bs[0], group.weights[0]
    group.biases, group.scalings = [None, None], [1.0, 1.0]

    def outputs(**kwargs):
        operands = group.x, group.weights, group.biases, group.lora_As, group.lora_Bs, group.scalings
        return lora_group(*operands, dropout_ps=0.5, **kwargs)

    torch.manual_seed(5)
    first, second = outputs(), outputs()
    torch.manual_seed(5)
    assert all(torch.equal(*pair) for pair in zip(first, outputs(), strict=True))
    assert not torch.equal(first[0], second[0])
    # A mask for each member, unless one seed is given.
    assert not torch.equal(*first)
    assert torch.equal(*outputs(seeds=torch.tensor([3])))


def test_checkpointing_replays_the_masks():
    from torch.utils.checkpoint import checkpoint

    group = Group((32,), 32, [(8, 4), (6, 3)])

    def run(use_reentrant):
        torch.manual_seed(3)
        if use_reentrant is None:
            return group.results(dropout_ps=0.5)

        def function(x, *args, **kwargs):
            return checkpoint(lambda x: lora_group(x, *args, **kwargs), x, use_reentrant=use_reentrant)

        return group.results(function, dropout_ps=0.5)

    plain = run(None)
    for use_reentrant in (False, True):
        replayed = run(use_reentrant)
        assert all(torch.equal(plain[name], replayed[name]) for name in plain)


def test_double_backward_raises_clearly():
    group = Group((3,), 5, [(4, 2), (3, 1)], torch.float64)
    x = group.x.requires_grad_()
    outputs = lora_group(x, group.weights, group.biases, group.lora_As, group.lora_Bs, group.scalings)
    (grad,) = torch.autograd.grad(sum(y.square().sum() for y in outputs), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_group cannot be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(device, requires_grad, p):
    group = Group((2, 3), 6, [(4, 2), (5, 0), (3, 17)], device=device)
    seeds = group.seeds() if p else None
    for tensor in (group.x, *group.lora_As, *group.lora_Bs):
        tensor.requires_grad_(requires_grad)
    biases = [bias for bias in group.biases if bias is not None]
    adapters = group.lora_As, group.lora_Bs, group.scalings, [p] * 3, seeds
    torch.library.opcheck(_lora_group, (group.x, group.weights, biases, [True, False, True], *adapters))
    lora_As, lora_Bs = ([t.detach() for t in tensors] for tensors in adapters[:2])
    h = torch.randn(6, 48, device=device)
    for need_grad_x in (False, True):
        args = (group.upstreams, group.x.detach(), h, group.weights, lora_As, lora_Bs, *adapters[2:], need_grad_x)
        torch.library.opcheck(_lora_group_backward, args)


@pytest.mark.parametrize("used", [[0, 1], [1]])
def test_compiles_without_graph_breaks(device, used):
    group = Group((6,), 8, [(5, 3), (4, 2)], device=device)

    def function(*args):
        outputs = lora_group(*args)
        return [outputs[i] if i in used else args[0].sum() * args[3][i].sum() * args[4][i].sum() for i in range(2)]

    group.upstreams = [upstream if i in used else torch.ones([]) for i, upstream in enumerate(group.upstreams)]
    torch._dynamo.reset()  # Compiled code does not notice that `used` is another.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, plain = group.results(compiled), group.results(function)
    assert_close(got, plain, RELATIVE[torch.float32])


def test_autocast(device):
    group = Group((6,), 8, [(5, 3), (4, 2)], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = group.results()
    assert got["y0"].dtype == torch.bfloat16
    assert got["x"].dtype == got["A0"].dtype == got["B1"].dtype == torch.float32
    assert_close(got, group.oracle(), 4 * RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("masks", [0, 1, 2])
def test_adapters_of_several_dtypes(on_backend, device, masks):
    group = Group((20,), 16, [(12, 5), (8, 20)], device=device)
    group.lora_As[1], group.lora_Bs[0] = group.lora_As[1].half(), group.lora_Bs[0].half()
    p, seeds = (0.3, group.seeds(masks)) if masks else (0.0, None)
    with on_backend(OP, torch.float32):
        got = group.results(dropout_ps=p, seeds=seeds)
    assert (got["A0"].dtype, got["A1"].dtype) == (torch.float32, torch.float16)
    assert (got["B0"].dtype, got["B1"].dtype) == (torch.float16, torch.float32)
    assert_close(got, group.oracle(p, SEEDS[:masks]), 4 * RELATIVE[torch.float16])


def test_fake_gradients_have_the_strides_of_real_ones(on_backend, device):
    """Inductor asserts it; stacked and converted adapters are often transposed."""
    group = Group((6,), 8, [(5, 3), (4, 2)], device=device)
    lora_As, lora_Bs = ([t.T.contiguous().T for t in tensors] for tensors in (group.lora_As, group.lora_Bs))
    h = torch.zeros(6, 32, device=device)
    arguments = group.upstreams, group.x, h, group.weights, lora_As, lora_Bs, group.scalings, [0.0] * 2, None, True
    with on_backend(OP, torch.float32):
        torch.library.opcheck(_lora_group_backward, arguments, test_utils="test_faketensor")


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    in_features=st.integers(1, 50),
    members=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=4),
    p=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_native_agrees_on_any_shape(rows, in_features, members, p):
    group = Group((rows,), in_features, members)
    try:
        with use_backend("native"):
            got = group.results(dropout_ps=p, seeds=group.seeds())
    except BackendError as error:
        pytest.skip(str(error))
    assert_close(got, group.oracle(p, SEEDS[: len(members)]), 1e-5)


def test_the_native_op_it_needs_is_lora_linears(monkeypatch):
    from sensilora.ops import _backend

    asked = []
    monkeypatch.setattr(_backend, "_why_not_native", lambda op, device: asked.append(op))
    for op in ("lora_group", "lora_group_backward"):
        assert _backend.why_not(op, "native", "cpu", torch.float32) is None
    assert asked == ["lora_linear", "lora_linear_backward"]


X, W, A, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"biases": [None]}, "biases must have one entry a member: 2, not 1"),
        ({"dropout_ps": [0.1] * 3}, "dropout_ps must have one entry a member"),
        ({"lora_As": [A, torch.ones(2, 3)]}, "shapes do not fit"),
        ({"weights": [W, torch.ones(4, 2)]}, "shapes do not fit"),
        ({"weights": [W, W.double()]}, "must have x's dtype"),
        ({"biases": [None, torch.ones(3)]}, "bias must have shape"),
        ({"dropout_ps": [0.1, 1.5]}, r"dropout_p must be in \[0, 1\], not 1.5"),
        ({"dropout_ps": 0.1, "seeds": torch.arange(3)}, r"seeds must have shape \(2,\) or \(1,\), not \(3,\)"),
        (
            {"dropout_ps": 0.1, "seeds": 2**63},
            "seeds must be an int64 tensor .*, not 9223",
        ),
        (
            {"dropout_ps": 0.1, "seeds": torch.ones(2)},
            "seeds must be an int64 tensor .*float32",
        ),
        ({"dropout_ps": [0.1, 0.2], "seeds": torch.tensor([1])}, "must share a dropout probability"),
        ({name: [] for name in ("weights", "biases", "lora_As", "lora_Bs", "scalings")}, "at least one member"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {
        "weights": [W, W], "biases": [None, None], "lora_As": [A, A], "lora_Bs": [B, B], "scalings": [1.0, 1.0]
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lora_group(X, **{**arguments, **changes})


def test_what_the_product_reads_outlives_the_passes_beside_it(monkeypatch):
    """They start before it ends: memory that it reads must not be free for their partial sums."""
    kernels = pytest.importorskip("sensilora.kernels.lora_linear")
    read = []

    def product(lefts, matrices, bias, skinny, updates, *masks, **add_to):
        read.extend(map(weakref.ref, kernels._stackable(updates)))
        return lefts[0] @ matrices[0]

    def outer(*args, overlap, **kwargs):
        assert overlap
        assert len(read) == 2
        assert all(reference() is not None for reference in read)
        return []

    monkeypatch.setattr(kernels, "product_serves", lambda *args: True)
    monkeypatch.setattr(kernels, "launch_lora_down", lambda *args, **kwargs: None)
    monkeypatch.setattr(kernels, "launch_lora_product", product)
    monkeypatch.setattr(kernels, "launch_lora_outer", outer)
    group = Group((6,), 8, [(5, 3), (4, 2)])
    kernels.launch_lora_group_backward(
        group.upstreams, group.x, torch.zeros(6, 32), group.weights, [group.lora_As[0], group.lora_As[1].half()],
        group.lora_Bs, group.scalings, [0] * 2, [1.0] * 2, None, True,
    )  # fmt: skip
    assert read


def test_the_product_reads_biases_and_seeds_of_any_strides(monkeypatch):
    """It takes their elements for neighbours; an expanded seed's are one and the same."""
    kernels = pytest.importorskip("sensilora.kernels.lora_linear")
    read = []

    def product(lefts, matrices, bias, skinny, updates, scale, thresholds, keep_scales, seeds, **add_to):
        read.extend(tensor for tensor in (bias, seeds) if tensor is not None)
        return lefts[0] @ matrices[0]

    monkeypatch.setattr(kernels, "product_serves", lambda *args: True)
    monkeypatch.setattr(kernels, "launch_lora_down", lambda *args, **kwargs: None)
    monkeypatch.setattr(kernels, "launch_lora_product", product)
    monkeypatch.setattr(kernels, "launch_lora_outer", lambda *args, **kwargs: [])
    group = Group((6,), 8, [(5, 3), (5, 2)])
    biases, seeds = [torch.arange(10.0)[::2]] * 2, torch.tensor([7]).expand(2)
    mask = [16384] * 2, [4 / 3] * 2, seeds
    adapters = group.weights, group.lora_As, group.lora_Bs, group.scalings
    kernels.launch_lora_group(group.x, group.weights, biases, *adapters[1:], *mask)
    kernels.launch_lora_group_backward(group.upstreams, group.x, torch.zeros(6, 32), *adapters, *mask, True)
    assert [tensor.tolist() for tensor in read] == [[0.0, 2.0, 4.0, 6.0, 8.0]] * 2 + [[7], [7]]
    assert all(tensor.is_contiguous() for tensor in read)


@pytest.mark.parametrize(
    ("masks", "one_by_one", "dense"),
    [(masks, one_by_one, False) for masks in ("none", "shared", "own") for one_by_one in (False, True)]
    + [("none", False, True), ("none", True, True)],
)
def test_hoppers_product_matches_oracle(monkeypatch, on_backend, device, masks, one_by_one, dense, poisoned_empty):
    """Both ways to sum the gradient of x up, with every kind of mask; the interpreter knows tensor descriptors."""
    with on_backend(OP, torch.float16):
        if _backend.forced_backend() != "triton":
            pytest.skip("the product is Triton's")
        kernels = pytest.importorskip("sensilora.kernels.lora_linear")
        monkeypatch.setattr(kernels, "product_serves", lambda *args: True)
        monkeypatch.setattr(kernels, "_one_by_one", lambda weights, own_masks: one_by_one)
        if dense:
            monkeypatch.setattr(kernels, "DENSE_DOWN", 32)
            monkeypatch.setattr(kernels, "DENSE_UPDATE", 32)
        group = Group((130,), 72, [(40, 3), (24, 20), (264, 1)], torch.float16, device)
        ps = {"none": 0.0, "shared": 0.25, "own": [0.25, 0.0, 0.5]}[masks]
        count = 3 if masks == "own" else 1
        got = group.results(dropout_ps=ps, seeds=None if masks == "none" else group.seeds(count))
    assert_close(got, group.oracle(ps, SEEDS[:count]), 4 * RELATIVE[torch.float16])


def test_weights_of_several_layouts(monkeypatch, on_backend, device, poisoned_empty):
    """One of the weights is stored as its transpose, as transformers' Conv1D has it."""
    with on_backend(OP, torch.float16):
        if _backend.forced_backend() == "triton":
            kernels = pytest.importorskip("sensilora.kernels.lora_linear")
            monkeypatch.setattr(kernels, "product_serves", lambda *args: True)
        group = Group((130,), 72, [(40, 3), (24, 20)], torch.float16, device)
        group.weights[1] = group.weights[1].T.contiguous().T
        got = group.results()
    assert_close(got, group.oracle(), 4 * RELATIVE[torch.float16])


def test_direct_calls_give_the_bits_of_the_op(device):
    """Without a dispatch mode autograd.Function serves, with one the registered op does."""

    class Seen(TorchDispatchMode):
        ops: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(str(func))
            return func(*args, **(kwargs or {}))

    group = Group((9,), 24, [(16, 3), (8, 5)], device=device)
    direct = group.results(dropout_ps=0.3, seeds=group.seeds())
    with Seen() as seen:
        watched = group.results(dropout_ps=0.3, seeds=group.seeds())
    assert {"sensilora.lora_group.default", "sensilora.lora_group_backward.default"} <= set(seen.ops)
    for name in direct:
        assert torch.equal(direct[name], watched[name]), name
