"""VarRankLoRAGroup, and SharedInput: layers of a module as it is, computed together."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sensilora
import sensilora.nn as lora_nn
from sensilora.errors import AdapterError
from sensilora.nn import SharedInput, VarRankLoRAGroup, VarRankLoRALinear


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the groups that lora_group computed, and how often lora_linear was called."""

    class Calls:
        groups: list[int]
        alone: int

        def reset(self):
            self.groups, self.alone = [], 0

    counted = Calls()
    counted.reset()
    together, alone = lora_nn.lora_group, lora_nn.lora_linear

    def count_group(x, weights, *args, **kwargs):
        counted.groups.append(len(weights))
        return together(x, weights, *args, **kwargs)

    def count_alone(*args, **kwargs):
        counted.alone += 1
        return alone(*args, **kwargs)

    monkeypatch.setattr(lora_nn, "lora_group", count_group)
    monkeypatch.setattr(lora_nn, "lora_linear", count_alone)
    return counted


def adapted(out_features, rank, in_features=8, dtype=torch.float32, **kwargs):
    layer = VarRankLoRALinear(nn.Linear(in_features, out_features, dtype=dtype), rank, scaling=0.7, **kwargs)
    nn.init.normal_(layer.lora_B)
    return layer


class Attention(nn.Module):
    """Products of q, k and v, which read what `inputs` makes of the arguments."""

    def __init__(self, inputs=lambda x: (x, x, x), *, ranks=(3, 1, 2), dropout=0.0):
        super().__init__()
        self.q, self.k, self.v = (adapted(6, rank, dropout=dropout) for rank in ranks)
        self.inputs = inputs

    def forward(self, *args, **kwargs):
        q, k, v = self.inputs(*args, **kwargs)
        return self.q(q) * self.k(k) + self.v(v)


def attention(inputs=lambda x: (x, x, x), device="cpu", **kwargs):
    """Two equal modules, one whose layers share an input and one whose layers do not, and the SharedInput."""
    torch.manual_seed(1)
    together = Attention(inputs, **kwargs).to(device)
    alone = copy.deepcopy(together)
    return together, alone, SharedInput(together, (together.q, together.k, together.v), has_query=True)


def step(module, *args, seed=2, **kwargs):
    """The output and every gradient of one step."""
    torch.manual_seed(seed)
    args = [arg.detach().clone().requires_grad_() for arg in args]
    module.zero_grad()
    y = module(*args, **kwargs)
    y.square().sum().backward()
    return [y.detach(), *(arg.grad for arg in args), *(p.grad for p in module.parameters() if p.grad is not None)]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def same_elements_dropped(outputs, layers):
    """Whether layers with A and B of ones, and no base, dropped the same elements of an input of ones."""
    kept = [y[:, 0] / (layer.scaling * layer.rank) for y, layer in zip(outputs, layers, strict=True)]
    return torch.allclose(kept[0], kept[1])


class TestGroup:
    @pytest.mark.parametrize("alone", [None, 0, 2])
    @pytest.mark.parametrize("shared", [False, True])
    def test_one_mask_for_all_or_one_for_each(self, shared, alone):
        layers = [adapted(6, 3, dropout=0.5), adapted(4, 2, dropout=0.5), adapted(5, 1, dropout=0.5)]
        for layer in layers:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
            nn.init.ones_(layer.lora_A)
            nn.init.ones_(layer.lora_B)
        if alone == 0:
            # With a backward hook on one, each layer computes for itself.
            layers[0].register_full_backward_hook(lambda *args: None)
        elif alone == 2:
            # With a forward hook on it, that layer does.
            layers[2].register_forward_hook(lambda *args: None)
        group = VarRankLoRAGroup(layers, shared_dropout_mask=shared)
        outputs = group(torch.ones(40, 8))
        assert same_elements_dropped(outputs[:2], layers[:2]) == shared
        assert same_elements_dropped(outputs[1:], layers[1:]) == shared
        assert torch.equal(group.eval()(torch.ones(40, 8))[0], layers[0](torch.ones(40, 8)))

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpoints_draw_the_same_masks(self, device, use_reentrant, shared):
        layers = [adapted(6, 3, dropout=0.4), adapted(4, 2, dropout=0.4)]
        group = VarRankLoRAGroup(layers, shared_dropout_mask=shared).to(device)

        class Whole(nn.Module):
            def __init__(self, checkpointed):
                super().__init__()
                self.group, self.checkpointed = group, checkpointed

            def forward(self, x):
                run = (lambda x: checkpoint(group, x, use_reentrant=use_reentrant)) if self.checkpointed else group
                return torch.cat(run(x), dim=-1)

        x = torch.randn(9, 8, device=device)
        assert_same(step(Whole(True), x), step(Whole(False), x))

    def test_compiles_without_graph_breaks(self, device):
        torch._dynamo.reset()
        group = VarRankLoRAGroup([adapted(6, 3), adapted(4, 0), adapted(5, 2)]).to(device)
        x = torch.randn(9, 8, device=device)
        alone = lambda x: torch.cat([layer(x) for layer in group.layers], dim=-1)  # noqa: E731
        compiled = torch.compile(lambda x: torch.cat(group(x), dim=-1), backend="aot_eager", fullgraph=True)
        results = []
        for function in (compiled, alone):
            group.zero_grad()
            y = function(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad.clone() for p in group.parameters() if p.grad is not None)])
        assert_same(*results)

    def test_autocast(self, device):
        group = VarRankLoRAGroup([adapted(6, 3), adapted(4, 2)]).to(device)
        x = torch.randn(9, 8, device=device)
        exact = group(x)
        with torch.autocast(device, dtype=torch.bfloat16):
            outputs = group(x)
        for y, reference, layer in zip(outputs, exact, group.layers, strict=True):
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), reference, rtol=3e-2, atol=3e-2)
            y.float().sum().backward(retain_graph=True)
            assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32

    def test_copies_are_the_same_and_independent(self):
        group = VarRankLoRAGroup([adapted(6, 3), adapted(4, 2)], shared_dropout_mask=True)
        x = torch.randn(9, 8)
        for other in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
            assert other.shared_dropout_mask
            assert_same(other(x), group(x))
            nn.init.zeros_(other.layers[0].lora_B)
            assert not torch.equal(other(x)[0], group(x)[0])

    def test_layers_that_were_unloaded(self):
        group = VarRankLoRAGroup([adapted(6, 3), adapted(4, 2)])
        x = torch.randn(3, 8)
        expected = [layer.base_layer(x) for layer in group.layers]
        for y, reference in zip(sensilora.unload(group)(x), expected, strict=True):
            torch.testing.assert_close(y, reference)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_gives_what_its_layers_give(self, calls, dtype):
        layers = [adapted(6, 3, dtype=dtype), adapted(4, 0, dtype=dtype), adapted(5, 2, dtype=dtype)]
        merged = adapted(7, 2, dtype=dtype)
        merged.merge()
        group = VarRankLoRAGroup([*layers, merged])
        x = torch.randn(3, 2, 8, dtype=dtype)
        expected = [layer(x) for layer in group.layers]
        calls.reset()
        for y, reference in zip(group(x), expected, strict=True):
            torch.testing.assert_close(y, reference)
        assert (calls.groups, calls.alone) == ([2], 0)

    def test_gradients(self):
        group = VarRankLoRAGroup([adapted(6, 3, dropout=0.3), adapted(4, 2, dropout=0.1)])
        alone = copy.deepcopy(group)
        alone.forward = lambda x: tuple(layer(x) for layer in alone.layers)
        x = torch.randn(9, 8)
        results = []
        for module in (group, alone):
            torch.manual_seed(3)
            own = x.clone().requires_grad_()
            torch.cat(module(own), dim=1).square().sum().backward()
            results.append([own.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
        assert_same(*results)

    def test_one_mask_or_one_for_each(self):
        layers = [adapted(6, 4, dropout=0.5) for _ in range(2)]
        layers[1].load_state_dict(layers[0].state_dict())
        x = torch.randn(32, 8)
        first, second = VarRankLoRAGroup(layers, shared_dropout_mask=True)(x)
        assert torch.equal(first, second)
        first, second = VarRankLoRAGroup(layers)(x)
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("reason", ["dropout", "mode", "dtype", "hook", "kind"])
    def test_what_cannot_be_computed_together_is_called_one_by_one(self, calls, reason):
        layers = [adapted(6, 3, dropout=0.2), adapted(4, 2, dropout=0.2)]
        if reason == "dropout":
            layers[1].dropout = 0.1
        elif reason == "mode":
            layers[1].eval()
        elif reason == "dtype":
            layers[1] = adapted(4, 2, dtype=torch.float64)
        elif reason == "hook":
            layers[1].register_forward_hook(lambda module, args, output: output + 1)
        else:
            layers[1].__class__ = type("Other", (VarRankLoRALinear,), {})
        group = VarRankLoRAGroup(layers, shared_dropout_mask=True)
        if reason == "dtype":
            with pytest.raises(ValueError, match="must have x's dtype"):
                group(torch.randn(3, 8))
        else:
            assert [y.shape for y in group(torch.randn(3, 8))] == [(3, 6), (3, 4)]
        assert calls.groups == []
        assert calls.alone == 2

    def test_state_dict_and_copies(self):
        group = VarRankLoRAGroup([adapted(6, 3), adapted(4, 2)])
        x = torch.randn(3, 8)
        for other in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
            assert all(torch.equal(*pair) for pair in zip(group(x), other(x), strict=True))
        assert "layers.1.lora_B" in group.state_dict()
        assert "shared_dropout_mask=False" in repr(group)

    @pytest.mark.parametrize("layers", [[], [nn.Linear(2, 2)]])
    def test_bad_layers(self, layers):
        with pytest.raises(AdapterError, match="one or more VarRankLoRALinear"):
            VarRankLoRAGroup(layers)


class TestSharedInput:
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_one_op_with_the_same_results(self, calls, device, dropout):
        if device == "cuda" and dropout:
            pytest.skip("on CUDA a draw of three seeds is not three draws of one")
        together, alone, shared = attention(device=device, dropout=dropout)
        x = torch.randn(5, 8, device=device)
        for seed in (2, 3):
            expected = step(alone, x, seed=seed)
            calls.reset()
            assert_same(step(together, x, seed=seed), expected)
            assert (calls.groups, calls.alone) == ([3], 0)
        assert shared.together == (0, 1, 2)

    def test_modules_parameters_and_names_stay(self):
        together, alone, _ = attention()
        assert list(together.state_dict()) == list(alone.state_dict())
        assert [name for name, _ in together.named_modules()] == [name for name, _ in alone.named_modules()]

    def test_nothing_outlives_the_call(self, calls):
        together, _, _ = attention()
        outputs = []
        for layer in (together.q, together.k, together.v):
            layer.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
        x = torch.randn(5, 8)
        gc.disable()  # Reference cycles would need it.
        try:
            y = together(x)
            assert not vars(x)
            x = weakref.ref(x)
            del y
            assert x() is None
            assert [output() for output in outputs] == [None] * 3
        finally:
            gc.enable()

    def test_a_model_without_references_is_freed(self):
        together, _, shared = attention()
        together(torch.randn(5, 8))
        weight = weakref.ref(together.k.lora_A)
        gc.disable()
        try:
            del together, shared
            assert weight() is None
        finally:
            gc.enable()

    def test_an_exception_leaves_nothing_and_teaches_nothing(self, calls):
        def broken(x):
            return x, x, "no tensor"

        together, alone, shared = attention(broken)
        x = torch.randn(5, 8)
        with pytest.raises(AttributeError):
            together(x)
        assert not vars(x)
        assert shared.together == (0, 1, 2)
        together.inputs = alone.inputs = lambda x: (x, x, x)
        assert_same(step(together, x), step(alone, x))

    def test_layers_called_outside_their_parent_are_alone(self, calls):
        together, alone, _ = attention()
        x = torch.randn(5, 8)
        assert torch.equal(together.q(x), alone.q(x))
        with torch.no_grad():
            together.k.lora_B.zero_()
        assert torch.equal(together.k(x), together.k.base_layer(x))
        assert calls.groups == []

    def test_cross_attention_computes_nothing_in_vain(self, calls):
        together, alone, shared = attention(lambda x, memory=None: (x, memory, memory))
        x, memory = torch.randn(5, 8), torch.randn(5, 8)
        expected = step(alone, x, memory)
        calls.reset()
        for _ in range(2):
            assert_same(step(together, x, memory), expected)
        assert (calls.groups, calls.alone) == ([2, 2], 2)
        assert shared.together == (0, 1, 2)

    def test_a_mask_as_long_as_the_input_is_wide_is_no_second_input(self, calls):
        together, _, _ = attention(lambda x, mask: (x, x, x))
        together(torch.randn(5, 8), torch.randn(1, 1, 8, 8))
        assert calls.groups == [3]

    @pytest.mark.parametrize(
        ("inputs", "left"),
        [
            (lambda x: (x, x + 1, x + 2), ()),
            (lambda x: (x, x, x + 1), (0, 1)),
            (lambda x: (x, x + 1, x), (0, 2)),
            (lambda x: (x + 1, x, x), (1, 2)),
        ],
    )
    def test_layers_that_read_different_inputs_part(self, calls, inputs, left):
        together, alone, shared = attention(inputs)
        x = torch.randn(5, 8)
        expected = step(alone, x)
        for _ in range(3):
            calls.reset()
            assert_same(step(together, x), expected)
        assert calls.groups == ([2] if left else [])
        assert calls.alone == 3 - len(left)
        if left:
            assert shared.together == left

    def test_an_input_changed_in_place_is_another_input(self):
        class Changing(Attention):
            def forward(self, x):
                q = self.q(x)
                x.add_(1)
                return q + self.k(x) + self.v(x)

        module = Changing()
        SharedInput(module, (module.q, module.k, module.v), has_query=True)
        x = torch.randn(5, 8)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                expected = module.q(x) + module.k(x + 1) + module.v(x + 1)
                torch.testing.assert_close(module(x.clone()), expected)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("inputs", [lambda x: (x, x, x), lambda x: (x, x + 1, x + 2)], ids=["one", "three"])
    def test_checkpoints(self, use_reentrant, inputs):
        together, _, _ = attention(inputs, dropout=0.4)

        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = together

            def forward(self, x):
                return checkpoint(self.inner, x, use_reentrant=use_reentrant)

        x = torch.randn(5, 8)
        for seed in range(3):
            got = step(Checkpointed(), x, seed=seed)
            # A copy, since a run without a checkpoint may teach the layers to part, and masks are then drawn in
            # another order.
            assert_same(got, step(copy.deepcopy(together), x, seed=seed))

    @pytest.mark.parametrize("change", ["merge", "resize", "eval", "freeze"])
    def test_a_member_changes_between_calls(self, calls, change):
        together, alone, _ = attention(dropout=0.0)
        x = torch.randn(5, 8)
        step(together, x)
        for module in (together, alone):
            if change == "merge":
                module.k.merge()
            elif change == "resize":
                torch.manual_seed(4)
                module.k.resize_rank(5)
            elif change == "eval":
                module.k.eval()
            else:
                module.k.requires_grad_(False)
        calls.reset()
        assert_same(step(together, x), step(alone, x))
        assert calls.groups == [2 if change == "merge" else 3]
        if change == "merge":
            together.k.unmerge()
            calls.reset()
            together(x)
            assert calls.groups == [3]

    def test_hooks_of_a_member_run(self, calls):
        together, alone, shared = attention()
        seen = []
        for module in (together, alone):
            module.k.register_forward_hook(lambda module, args, output: seen.append(1) or output * 2)
        x = torch.randn(5, 8)
        assert_same(step(together, x), step(alone, x))
        assert seen == [1, 1]
        assert calls.groups == [3]
        for module in (together, alone):
            module.v.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
        calls.reset()
        assert_same(step(together, x), step(alone, x))
        assert calls.groups == []
        assert shared.together == (0, 1, 2)

    def test_backward_hooks_of_a_member_run(self):
        together, alone, _ = attention()
        seen = []
        for module in (together, alone):
            module.k.register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs[0]))
        x = torch.randn(5, 8)
        assert_same(step(together, x), step(alone, x))
        torch.testing.assert_close(*seen)

    def test_outputs_may_be_changed_in_place(self):
        together, alone, _ = attention()
        for module in (together, alone):
            module.q.register_forward_hook(lambda module, args, output: output.mul_(2))
        x = torch.randn(5, 8)
        assert_same(step(together, x), step(alone, x))

    def test_copies_compute_together_with_themselves(self, calls):
        together, alone, _ = attention()
        x = torch.randn(5, 8)
        del together.inputs, alone.inputs  # A lambda cannot be pickled.
        Attention.inputs = staticmethod(lambda x: (x, x, x))
        try:
            for other in (copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
                with torch.no_grad():
                    together.k.lora_B.add_(1)
                    other.q.lora_A.add_(1)
                    alone.load_state_dict(other.state_dict())
                calls.reset()
                assert_same(step(other, x), step(alone, x))
                assert calls.groups == [3]
                assert len(other._forward_pre_hooks) == len(other._forward_hooks) == 1
                (hook,) = other._forward_pre_hooks.values()
                hook.__self__.remove()
                assert not other._forward_pre_hooks
                assert not other._forward_hooks
                assert together._forward_hooks
        finally:
            del Attention.inputs
        alone_copy = copy.deepcopy(together.q)
        assert torch.equal(alone_copy(x), together.q(x))

    def test_a_replaced_layer_is_not_computed(self, calls):
        together, alone, shared = attention()
        for module in (together, alone):
            torch.manual_seed(7)
            module.k = adapted(6, 2)
        x = torch.randn(5, 8)
        for _ in range(2):
            calls.reset()
            assert_same(step(together, x), step(alone, x))
        assert calls.groups == [2]
        assert shared.together == (0, 2)

    def test_remove(self, calls):
        together, _, shared = attention()
        shared.remove()
        together(torch.randn(5, 8))
        assert calls.groups == []

    def test_threads(self):
        together, alone, shared = attention()
        common = torch.randn(5, 8)

        def run(seed):
            generator = torch.Generator().manual_seed(seed)
            for _ in range(50):
                for x in (torch.randn(5, 8, generator=generator, requires_grad=True), common):
                    y = together(x)
                    torch.testing.assert_close(y, alone(x))
                    y.sum().backward()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(4)))
        assert shared.together == (0, 1, 2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, calls, device, dtype):
        together, alone, _ = attention(device=device)
        x = torch.randn(5, 8, device=device)
        with torch.autocast(device, dtype=dtype):
            got, expected = step(together, x), step(alone, x)
        assert got[0].dtype == dtype
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.1)
        assert calls.groups == [3]

    def test_meta_tensors_have_shapes(self):
        together, _, _ = attention()
        assert together.to("meta")(torch.empty(5, 8, device="meta")).shape == (5, 6)

    def test_no_grad_and_inference_mode(self, calls):
        together, alone, _ = attention()
        x = torch.randn(5, 8)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                own = x.clone()
                torch.testing.assert_close(together(own), alone(own))
        # An inference tensor does not tell whether it was changed in place meanwhile.
        assert calls.groups == [3]

    @pytest.mark.parametrize("checkpointed", [False, True])
    @pytest.mark.parametrize("inputs", [lambda x: (x, x, x), lambda x: (x, x + 1, x + 2)], ids=["one", "three"])
    def test_compiles_without_graph_breaks(self, device, checkpointed, inputs):
        from torch._dynamo.testing import CompileCounterWithBackend

        torch._dynamo.reset()
        together, alone, _ = attention(inputs, device=device)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = together

            def forward(self, x):
                return checkpoint(self.inner, x, use_reentrant=False) if checkpointed else self.inner(x)

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(Net(), fullgraph=True, backend=counter)
        x = torch.randn(5, 8, device=device)
        for _ in range(2):
            assert_same(step(compiled, x), step(alone, x))
        assert counter.frame_count == 1
