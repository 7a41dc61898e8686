import contextlib
import copy
import dataclasses
import json
import pickle
import warnings

import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.tuners.lora import Linear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import sensilora.integrations.peft as integration
from sensilora import RankPlan
from sensilora.adapters import shared_inputs
from sensilora.errors import AdapterError
from sensilora.integrations.peft import FusedLinear, fuse, unfuse, use_fused
from sensilora.ops._dropout import LEVELS, keep_scale, threshold
from sensilora.targets import find_targets, matrix_shape
from tests.integrations.peft_versions import since_020, transformers_takes_peft
from tests.tolerances import relative_error

VOCABULARY = 24
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def gpt2():
    # No dropout outside of the adapters, which would take numbers from the generator.
    off = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4, **off))


BASES = {"llama": llama, "gpt2": gpt2}


def config(family="llama", **fields):
    fields = {"r": 5, "lora_alpha": 7, "target_modules": TARGETS[family], **fields}
    return LoraConfig(fan_in_fan_out=family == "gpt2", **fields)


def randomised(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def stock_model(family="llama", **fields):
    return randomised(get_peft_model(BASES[family](), config(family, **fields)))


def pair(family="llama", **fields):
    """PEFT's model and a fused copy of it."""
    stock = stock_model(family, **fields)
    return stock, fuse(copy.deepcopy(stock))


def fused_layers(model):
    return [module for module in model.modules() if type(module) is FusedLinear]


def ids(batch=3, device="cpu"):
    return torch.randint(VOCABULARY, (batch, 7), generator=torch.Generator().manual_seed(1)).to(device)


def step(model, **arguments):
    """Logits and the gradients of all trained parameters, by name."""
    model.zero_grad()
    batch = ids(device=next(model.parameters()).device)
    output = model(input_ids=batch, labels=batch, use_cache=False, **arguments)
    output.loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert trained
    return {"logits": output.logits.detach(), **trained}


# Above tests.tolerances, since what is compared went through a whole model, whose softmax cancels much.
def assert_same(got, expected, tolerance=5e-5):
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        assert relative_error(got[name], expected[name]) <= tolerance, name


def logits(model, **arguments):
    with torch.no_grad():
        return model(input_ids=ids(device=next(model.parameters()).device), use_cache=False, **arguments).logits


@pytest.fixture(autouse=True)
def _warnings_anew():
    integration._warn_of.cache_clear()


@pytest.fixture
def counted(monkeypatch):
    """How many times each op was called."""
    counts = {"lora_linear": 0, "lora_group": 0, "lora_segments": 0}

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(integration, name, counting(name, getattr(integration, name)))
    return counts


@contextlib.contextmanager
def one_warning(match):
    """The block warns once of PEFT's own forward, and of that by the words `match`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [str(warning.message) for warning in caught if "fused LoRA layer" in str(warning.message)]
    assert len(ours) == 1, ours
    assert match in ours[0]


# Keys for the other family are ignored with a warning.
FEATURES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"0": 1, "v_proj": 9, "c_proj": 9}, "alpha_pattern": {"v_proj": 3, "c_proj": 3}},
    "base biases trained": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "olora": {"init_lora_weights": "olora"},
    "dropout of zero": {"lora_dropout": 0.0},
}


class TestFuse:
    # PEFT gives the factors over a Conv1D wrong shapes with olora.
    @pytest.mark.parametrize(
        ("family", "feature"),
        [(family, feature) for family in BASES for feature in FEATURES if (family, feature) != ("gpt2", "olora")],
    )
    @pytest.mark.filterwarnings("ignore:.*(has no bias|did not match any targeted module):Warning")
    def test_outputs_and_gradients_are_pefts(self, family, feature, counted):
        stock, fused = pair(family, **FEATURES[feature])
        expected = step(stock)
        assert counted["lora_linear"] == 0
        got = step(fused)
        assert counted["lora_linear"] == len(fused_layers(fused)) > 0
        assert_same(got, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_on_each_device(self, device, dtype):
        """fp32 adapters over each dtype of the base: as far from the fp64 oracle as PEFT, but for their rounding."""
        stock, fused = (model.to(device) for model in pair())
        oracle = step(copy.deepcopy(stock).double())
        for model in (stock, fused):
            for name, parameter in model.named_parameters():
                if "lora_" not in name:
                    parameter.data = parameter.data.to(dtype)
        expected, got = step(stock), step(fused)
        assert expected.keys() == got.keys() == oracle.keys()
        for name in oracle:
            assert got[name].dtype == expected[name].dtype
            floor = 5e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
            limit = 1.5 * relative_error(expected[name], oracle[name]) + floor
            assert relative_error(got[name], oracle[name]) <= limit, name

    def test_changes_nothing_but_the_class(self):
        stock = stock_model()
        twin = copy.deepcopy(stock)
        before = dict(twin.named_parameters())
        modules = dict(twin.named_modules())
        assert fuse(twin) is twin
        assert len(fused_layers(twin)) == 6
        assert all(parameter is before[name] for name, parameter in twin.named_parameters())
        assert all(module is modules[name] for name, module in twin.named_modules())
        assert list(twin.state_dict()) == list(stock.state_dict())
        assert len(fused_layers(fuse(twin))) == 6
        assert unfuse(twin) is twin
        assert [type(module) for module in twin.modules()] == [type(module) for module in stock.modules()]
        assert [vars(module).keys() for module in twin.modules()] == [vars(m).keys() for m in stock.modules()]
        assert torch.equal(logits(twin), logits(stock))

    def test_optimizer_state_survives(self):
        """Training goes on over fuse and unfuse as if nothing had been done."""
        stock = stock_model()
        twin = copy.deepcopy(stock)
        optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2) for m in (stock, twin)]
        for change in (None, fuse, None, unfuse):
            if change is not None:
                change(twin)
            for model, optimizer in zip((stock, twin), optimizers, strict=True):
                step(model)
                optimizer.step()
        assert all(state["step"] == 4 for state in optimizers[1].state.values())
        for name, parameter in twin.named_parameters():
            # Adam's first steps have the size of the learning rate whatever the gradient's, which rounding may turn.
            torch.testing.assert_close(parameter, stock.get_parameter(name), atol=2e-3, rtol=0)

    def test_copies_and_pickles(self):
        _, fused = pair()
        expected = logits(fused)
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert len(fused_layers(twin)) == 6
            assert torch.equal(logits(twin), expected)

    def test_injected_adapters_without_a_peft_model(self):
        model = randomised(peft.inject_adapter_in_model(config(), llama()))
        expected = logits(model)
        torch.testing.assert_close(logits(fuse(model)), expected)
        assert len(fused_layers(model)) == 6

    @pytest.mark.parametrize("used", [False, True])
    def test_over_another_methods_layers(self, used):
        """The base of a LoRA layer may itself be an adapter layer, which the ops would leave out."""
        loha = peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False)
        model = get_peft_model(llama(), loha, adapter_name="loha", mixed=True)
        model.add_adapter("lora", use_fused(config()) if used else config())
        model.set_adapter(["loha", "lora"])
        randomised(model)
        expected = logits(unfuse(copy.deepcopy(model)))
        if not used:
            with pytest.warns(UserWarning, match=r"left 4 of 6 LoRA layers .*loha.*, not a plain nn\.Linear"):
                fuse(model)
        assert len(fused_layers(model)) == 2
        torch.testing.assert_close(logits(model), expected)

    def test_says_what_it_leaves_to_peft(self):
        class Odd(nn.Linear):
            pass

        model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv2d(4, 4, 1), Odd(4, 4))
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1", "2", "3"]))
        with pytest.warns(UserWarning, match="left 3 of 4 LoRA layers to PEFT .*Embedding.*Conv2d.*Odd"):
            fuse(model)
        assert len(fused_layers(model)) == 1

    def test_nothing_to_fuse(self):
        with pytest.raises(AdapterError, match=r"Linear holds no LoRA layer.*call peft\.get_peft_model first"):
            fuse(nn.Linear(2, 2))
        model = get_peft_model(nn.Sequential(nn.Embedding(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        with pytest.raises(AdapterError, match="1: Embedding is not PEFT's LoRA layer"):
            fuse(model)


class TestUseFused:
    @pytest.mark.parametrize("family", BASES)
    def test_layers_are_fused(self, family):
        base = BASES[family]()
        torch.manual_seed(0)
        stock = randomised(get_peft_model(copy.deepcopy(base), config(family)))
        torch.manual_seed(0)
        fused = randomised(get_peft_model(base, use_fused(config(family))))
        assert len(fused_layers(fused)) == sum(type(module) is Linear for module in stock.modules())
        assert list(fused.state_dict()) == list(stock.state_dict())
        assert_same(step(fused), step(stock))

    def test_with_a_plan(self):
        model = llama()
        plan = RankPlan.uniform({name: matrix_shape(module) for name, module in find_targets(model).items()}, 2)
        plan = plan.with_ranks({name: index % 4 for index, name in enumerate(plan.ranks)})
        model = get_peft_model(model, use_fused(plan.to_lora_config()))
        ranks = {name: m.r["default"] for name, m in model.base_model.model.named_modules() if type(m) is FusedLinear}
        assert ranks == {name: rank for name, rank in plan.ranks.items() if rank}

    @transformers_takes_peft
    def test_transformers_own_adapters(self):
        model = llama()
        model.add_adapter(use_fused(config()))
        assert len(fused_layers(model)) == 6
        assert step(model)

    def test_changes_the_config_in_place_and_twice_is_once(self):
        first = config()
        before = first.to_dict()
        assert use_fused(use_fused(first)) is first
        assert first.to_dict() == before
        assert len(fused_layers(get_peft_model(llama(), first))) == 6

    @pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))])
    def test_copies_of_the_config(self, copied):
        twin = copied(use_fused(config(r=3)))
        twin.lora_dropout = 0.25
        layers = fused_layers(get_peft_model(llama(), twin))
        assert len(layers) == 6
        assert {layer.lora_dropout["default"].p for layer in layers} == {0.25}

    def test_all_linear_and_a_second_adapter(self):
        model = get_peft_model(llama(), use_fused(config(target_modules="all-linear")))
        model.add_adapter("other", use_fused(config(r=2, target_modules="all-linear")))
        layers = fused_layers(model)
        assert len(layers) == 14
        assert all(set(layer.lora_A) == {"default", "other"} for layer in layers)

    def test_falls_through_for_other_bases(self):
        class Odd(nn.Linear):
            pass

        model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv2d(4, 4, 1), Odd(4, 4))
        names = ["0", "1", "2", "3"]
        stock = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=names))
        fused = get_peft_model(model, use_fused(LoraConfig(r=2, target_modules=names)))
        kinds = [[type(m.base_model.model[i]) for i in range(4)] for m in (stock, fused)]
        assert kinds[1] == [FusedLinear, *kinds[0][1:]]
        assert kinds[0][0] is kinds[0][3] is Linear

    def test_weights_of_another_kind_fall_through(self):
        class Quantised(torch.Tensor):
            pass

        model = nn.Sequential(nn.Linear(4, 4))
        model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Quantised))
        model = get_peft_model(model, use_fused(LoraConfig(r=2, target_modules=["0"])))
        assert type(model.base_model.model[0]) is Linear

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
    def test_pefts_own_correction_of_fan_in_fan_out(self):
        wrong = use_fused(LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=False))
        layers = fused_layers(get_peft_model(gpt2(), wrong))
        assert len(layers) == 2
        assert all(layer.fan_in_fan_out and layer.is_target_conv_1d_layer for layer in layers)

    def test_replace_loses_it(self):
        twin = dataclasses.replace(use_fused(config()), r=3)
        assert not fused_layers(get_peft_model(llama(), twin))

    def test_wrong_configs(self):
        with pytest.raises(AdapterError, match=r"use_fused takes a peft\.LoraConfig, not LoHaConfig"):
            use_fused(peft.LoHaConfig())
        with pytest.raises(AdapterError, match=r"use_fused takes a peft\.LoraConfig, not AdaLoraConfig"):
            use_fused(peft.AdaLoraConfig(total_step=10))
        own = config()
        own._register_custom_module({Conv1D: Linear})
        with pytest.raises(AdapterError, match=r"the config maps Conv1D to .*Linear.* already"):
            use_fused(own)


def layer_pair(base, **fields):
    """PEFT's layer over `base` and a fused copy of it."""
    fields = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": isinstance(base, Conv1D), **fields}
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"], **fields))
    stock = randomised(model).base_model.model[0]
    twin = copy.deepcopy(stock)
    return stock, fuse(twin)


class TestLayer:
    @settings(deadline=None, max_examples=60)
    @given(
        shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
        ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
        leading=st.sampled_from([(5,), (0,), (2, 3), (1, 2, 3)]),
        conv1d=st.booleans(),
        bias=st.booleans(),
        lora_bias=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    @pytest.mark.filterwarnings("ignore:.*has no bias:Warning")
    def test_any_number_of_active_adapters(self, shape, ranks, leading, conv1d, bias, lora_bias, seed):
        torch.manual_seed(seed)
        base = Conv1D(*shape) if conv1d else nn.Linear(shape[1], shape[0], bias=bias)
        model = nn.Sequential(base)
        for index, rank in enumerate(ranks):
            own = LoraConfig(
                r=rank, lora_alpha=index + 1, target_modules=["0"], fan_in_fan_out=conv1d, lora_bias=lora_bias
            )
            model = peft.inject_adapter_in_model(own, model, adapter_name=f"a{index}")
        stock = randomised(model)[0]
        stock.set_adapter([f"a{index}" for index in range(len(ranks))])
        fused = fuse(copy.deepcopy(stock))
        x = torch.randn(*leading, shape[1])
        results = []
        for layer in (stock, fused):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            upstream = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
            y.backward(upstream)
            results.append({"y": y.detach(), "x": leaf.grad, **{n: p.grad for n, p in layer.named_parameters()}})
        for name, expected in results[0].items():
            if expected is None:
                assert results[1][name] is None
            else:
                torch.testing.assert_close(results[1][name], expected, atol=2e-5, rtol=2e-5)

    @settings(deadline=None, max_examples=40)
    @given(
        ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
        rows=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
        chosen=st.lists(st.integers(-1, 3), min_size=1, max_size=9),
        conv1d=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def test_any_mixed_batch(self, ranks, rows, chosen, conv1d, seed):
        torch.manual_seed(seed)
        model = nn.Sequential(Conv1D(11, 7) if conv1d else nn.Linear(7, 11))
        for index, rank in enumerate(ranks):
            own = LoraConfig(r=rank, lora_alpha=index + 1, target_modules=["0"], fan_in_fan_out=conv1d)
            model = peft.inject_adapter_in_model(own, model, adapter_name=f"a{index}")
        stock = randomised(model)[0]
        fused = fuse(copy.deepcopy(stock))
        # Also names of adapters that this layer does not have.
        names = ["__base__" if index < 0 else f"a{index}" for index in chosen]
        x = torch.randn(len(names), *rows, 7)
        torch.testing.assert_close(fused(x, adapter_names=names), stock(x, adapter_names=names), atol=2e-5, rtol=2e-5)

    def test_dropout_drops_as_often_as_pefts_does(self, device):
        """With A, B the identity and W zero the layer is its dropout."""
        size, p, scale = 64, 0.3, 2.0
        base = nn.Linear(size, size, bias=False)
        nn.init.zeros_(base.weight)
        layers = [layer.to(device) for layer in layer_pair(base, r=size, lora_alpha=scale * size, lora_dropout=p)]
        x = torch.ones(200, size, device=device)
        for layer in layers:
            nn.init.eye_(layer.lora_A["default"].weight)
            nn.init.eye_(layer.lora_B["default"].weight)
            y = layer.train()(x).detach()
            kept = (y != 0).double()
            deviation = (p * (1 - p) / y.numel()) ** 0.5
            assert abs(float(kept.mean()) - (1 - p)) < 5 * deviation
            # Within a row and from row to row alike.
            for axis, count in ((0, 200), (1, size)):
                assert float((kept.mean(axis) - (1 - p)).abs().max()) < 6 * (p * (1 - p) / count) ** 0.5
            assert abs(float(y.double().mean()) - scale) < 5 * scale * deviation / (1 - p)
            assert torch.equal(layer.eval()(x), scale * x)
        fused = layers[1].train()
        assert fused(x).unique().tolist() == pytest.approx([0.0, scale * keep_scale(p)], rel=1e-5)
        assert threshold(p) / LEVELS == pytest.approx(p, abs=0.5 / LEVELS)

    def test_dropout_of_one_seed_repeats(self):
        _, fused = layer_pair(nn.Linear(8, 8), lora_dropout=0.5)
        x = torch.randn(16, 8)
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(fused.train()(x))
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])

    def test_dropout_is_read_at_each_call(self, counted):
        """As PEFT's layer, which holds an nn.Dropout that may be changed or be in another mode."""
        stock, fused = layer_pair(nn.Linear(8, 8), lora_dropout=0.5)
        x = torch.randn(4, 8)
        for layer in (stock, fused):
            layer.train()
            layer.lora_dropout["default"].eval()
        torch.testing.assert_close(fused(x), stock(x))
        fused.lora_dropout["default"].train().p = 1.0
        torch.testing.assert_close(fused(x), fused.base_layer(x))
        assert counted["lora_linear"] == 2

    def test_hooks_of_the_parts_are_heard(self):
        _, layer = layer_pair(nn.Linear(8, 8))
        x = torch.randn(4, 8)
        expected = layer(x)
        for part, words in ((layer.base_layer, "the base layer"), (layer.lora_A["default"], "lora_A or lora_B")):
            heard = []
            hook = part.register_forward_hook(lambda *_, heard=heard: heard.append(1))
            with one_warning(words):
                torch.testing.assert_close(layer(x), expected)
                layer(x)
            assert len(heard) == 2
            hook.remove()

    def test_replaced_parts_are_heeded(self):
        stock, fused = layer_pair(nn.Linear(8, 8), lora_dropout=0.5)
        for layer in (stock, fused):
            layer.lora_dropout["default"] = nn.AlphaDropout(0.5)
        x = torch.randn(4, 8)
        with one_warning("the dropout is AlphaDropout"):
            torch.manual_seed(0)
            expected = stock(x)
            torch.manual_seed(0)
            assert torch.equal(fused(x), expected)

    def test_accelerate_hooks_that_only_align_devices(self, counted):
        _, fused = layer_pair(nn.Linear(8, 8))
        x = torch.randn(4, 8)
        expected = fused(x)
        for module in (fused, fused.base_layer, fused.lora_A["default"], fused.lora_B["default"]):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
        torch.testing.assert_close(fused(x), expected)
        assert counted["lora_linear"] == 2

    def test_offloaded_base_is_left_to_peft(self):
        _, fused = layer_pair(nn.Linear(8, 8))
        x = torch.randn(4, 8)
        expected = fused(x)
        cpu_offload(fused.base_layer, execution_device=torch.device("cpu"))
        assert fused.base_layer.weight.is_meta
        torch.testing.assert_close(fused(x), expected)

    def test_errors_are_pefts(self):
        stock, fused = layer_pair(nn.Linear(8, 8))
        for x, extra in ((torch.randn(4, 8).double(), ()), (torch.randn(4, 8), (1,))):
            raised = []
            for layer in (stock, fused):
                with pytest.raises((RuntimeError, TypeError)) as info:
                    layer(x, *extra)
                raised.append(str(info.value))
            assert raised[0] == raised[1]

    def test_differentiated_twice_is_refused(self):
        _, fused = layer_pair(nn.Linear(8, 8))
        x = torch.randn(4, 8, requires_grad=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)[0].sum(), x)
        x = torch.randn(4, 8, requires_grad=True)
        unfused = unfuse(fused)
        torch.autograd.grad(torch.autograd.grad(unfused(x).square().sum(), x, create_graph=True)[0].sum(), x)


class TestAdapters:
    def several(self, **fields):
        """PEFT's model with adapters of three ranks, one of which leaves out some layers, and a fused copy."""
        stock = stock_model(**fields)
        stock.add_adapter("b", config(r=2, lora_alpha=1, **fields))
        stock.add_adapter("c", config(r=8, target_modules=["q_proj"], **fields))
        randomised(stock)
        return stock, fuse(copy.deepcopy(stock))

    def test_switching(self):
        stock, fused = self.several()
        for name in ("default", "b", "c"):
            stock.set_adapter(name)
            fused.set_adapter(name)
            assert_same(step(fused), step(stock))

    def test_several_at_once(self, device, counted):
        stock, fused = (model.to(device) for model in self.several())
        for model in (stock, fused):
            model.base_model.set_adapter(["default", "b", "c"])
        assert_same(step(fused), step(stock))
        assert counted["lora_linear"] == 6

    def test_several_with_dropout_are_left_to_peft(self, counted):
        _, fused = self.several(lora_dropout=0.1)
        fused.base_model.set_adapter(["default", "b"])
        with one_warning("several active adapters have dropout"):
            step(fused)
            step(fused)
        assert counted["lora_linear"] == 0
        fused.eval()
        logits(fused)
        assert counted["lora_linear"] == 6

    @pytest.mark.parametrize(
        "names", [("default", "b", "c"), ("c", "__base__", "c"), ("b",) * 3, ("__base__",) * 3], ids=str
    )
    def test_mixed_batches(self, names, device, counted):
        stock, fused = (model.to(device).eval() for model in self.several(lora_dropout=0.1))
        expected = logits(stock, adapter_names=list(names))
        assert relative_error(logits(fused, adapter_names=list(names)), expected) <= 5e-5
        layers = {"default": 6, "b": 6, "c": 2, "__base__": 0}
        assert counted["lora_segments"] == max(layers[name] for name in names)

    def test_mixed_batches_one_after_the_other(self):
        """Segments that are kept from call to call are those of other names, rows and adapters."""
        stock, fused = (model.eval() for model in self.several())
        for length in (7, 1, 3):
            for names in (["default", "b"], ["b", "default"], ["c", "c"]):
                batch = ids(2)[:, :length]
                with torch.inference_mode():
                    got, expected = (m(input_ids=batch, adapter_names=names).logits for m in (fused, stock))
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    def test_mixed_batches_with_gradients_after_inference_mode(self):
        stock, fused = (model.eval() for model in self.several())
        names = ["default", "b", "c"]
        with torch.inference_mode():
            fused(input_ids=ids(), adapter_names=names)
        results = [step(model, adapter_names=names) for model in (stock, fused)]
        assert_same(results[1], results[0])

    def test_mixed_generation(self):
        stock, fused = (model.eval() for model in self.several())
        names = ["c", "default", "b"]
        got, expected = (
            m.generate(input_ids=ids(), adapter_names=names, max_new_tokens=5, do_sample=False, pad_token_id=0)
            for m in (fused, stock)
        )
        assert torch.equal(got, expected)

    @pytest.mark.filterwarnings("ignore:.*has no bias:Warning")
    def test_mixed_batches_with_bias_are_left_to_peft(self):
        stock, fused = (model.eval() for model in self.several(lora_bias=True))
        names = ["default", "b", "c"]
        expected = logits(stock, adapter_names=names)
        with one_warning("adapter_names select an adapter with lora_bias"):
            got = logits(fused, adapter_names=names)
        assert torch.equal(got, expected)

    def test_mixed_batches_of_another_length(self):
        _, fused = self.several()
        with pytest.raises(ValueError, match="same as the number of inputs"):
            logits(fused.eval(), adapter_names=["b"])

    def test_weighted_adapters(self):
        stock, fused = self.several()
        for model in (stock, fused):
            model.base_model.delete_adapter("c")
            model.base_model.add_weighted_adapter(["default", "b"], [0.7, -0.4], "mix", combination_type="cat")
            model.base_model.add_weighted_adapter(["default", "b"], [0.7, 0.3], "svd", "svd", svd_rank=3)
        for name in ("mix", "svd"):
            stock.set_adapter(name)
            fused.set_adapter(name)
            torch.testing.assert_close(logits(fused), logits(stock))

    def test_deleting_and_adding(self):
        stock, fused = self.several()
        for model in (stock, fused):
            torch.manual_seed(3)
            model.delete_adapter("b")
            model.add_adapter("d", config(r=3))
            randomised(model)
            model.set_adapter("d")
        assert_same(step(fused), step(stock))

    @pytest.mark.parametrize("safe", [False, True])
    def test_merging(self, safe):
        stock, fused = pair()
        unmerged = logits(fused)
        for model in (stock, fused):
            model.merge_adapter(safe_merge=safe)
        assert torch.equal(logits(fused), logits(stock))
        for model in (stock, fused):
            model.unmerge_adapter()
        torch.testing.assert_close(logits(fused), unmerged, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits(fused.merge_and_unload(safe_merge=safe)), unmerged, atol=1e-5, rtol=1e-5)

    def test_safe_merge_finds_a_broken_adapter(self):
        _, fused = pair()
        fused_layers(fused)[0].lora_A["default"].weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaNs detected"):
            fused.merge_adapter(safe_merge=True)

    def test_disabling(self):
        stock, fused = pair()
        with stock.disable_adapter(), fused.disable_adapter():
            assert torch.equal(logits(fused), logits(stock))
            base = logits(fused)
        assert not torch.allclose(logits(fused), base)

    def test_scaling_is_read_at_each_call(self):
        stock, fused = pair()
        for model in (stock, fused):
            for module in model.modules():
                if isinstance(module, Linear):
                    module.scale_layer(3.0)
        torch.testing.assert_close(logits(fused), logits(stock))

    def test_rescaling_by_context(self):
        stock, fused = pair()
        with rescale_adapter_scale(stock, 0.5), rescale_adapter_scale(fused, 0.5):
            torch.testing.assert_close(logits(fused), logits(stock))

    def test_input_casting_disabled(self):
        stock, fused = pair()
        for model in (stock, fused):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.double()
        with disable_input_dtype_casting(fused), pytest.raises(RuntimeError):
            logits(fused)
        torch.testing.assert_close(logits(fused), logits(stock))

    @pytest.mark.parametrize(
        ("fields", "name"),
        [({"use_dora": True}, "Dora"), ({"alora_invocation_tokens": [3]}, "ALora")],
        ids=["dora", "alora"],
    )
    def test_variants_are_left_to_peft(self, fields, name, counted):
        stock = stock_model(**fields, task_type="CAUSAL_LM")
        fused = fuse(copy.deepcopy(stock))
        expected = step(stock)
        with one_warning(f"adapter 'default' is {name}"):
            got = step(fused)
            step(fused)
        assert counted["lora_linear"] == 0
        assert_same(got, expected, 0.0)

    def test_a_variant_beside_a_plain_adapter(self, counted):
        stock = stock_model(use_dora=True)
        stock.add_adapter("plain", config())
        randomised(stock).set_adapter("plain")
        fused = fuse(copy.deepcopy(stock))
        assert_same(step(fused), step(stock))
        assert counted["lora_linear"] == 6


ALL = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "rank_pattern": {"q_proj": 3, "v_proj": 9, "up_proj": 7},
}


class TestGroups:
    """q, k, v and gate, up of each of the two layers by one op each; o and down, four in all, by themselves."""

    def pair(self, **fields):
        """PEFT's model and a copy of it, fused with groups."""
        stock = stock_model(**{**ALL, **fields})
        return stock, fuse(copy.deepcopy(stock), groups=True)

    @pytest.mark.parametrize("feature", [name for name in FEATURES if name != "patterns"])
    @pytest.mark.filterwarnings("ignore:.*has no bias:Warning")
    def test_outputs_and_gradients_are_pefts(self, feature, counted):
        stock, fused = self.pair(**FEATURES[feature])
        assert_same(step(fused), step(stock))
        assert counted == {"lora_linear": 4, "lora_group": 4, "lora_segments": 0}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_as_the_layers_one_by_one(self, device, dtype):
        _, fused = self.pair()
        fused.to(device)
        for name, parameter in fused.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.to(dtype)
        alone = fuse(copy.deepcopy(fused))
        assert not shared_inputs(alone)
        assert_same(step(fused), step(alone), 5e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)

    def test_two_of_three(self, counted):
        """PEFT's usual targets leave the key out."""
        stock, fused = self.pair(target_modules=["q_proj", "v_proj", "up_proj"])
        assert_same(step(fused), step(stock))
        assert counted == {"lora_linear": 2, "lora_group": 2, "lora_segments": 0}

    def test_dropout(self, monkeypatch):
        _, fused = self.pair(lora_dropout=0.25)
        ps, group = [], integration.lora_group
        monkeypatch.setattr(
            integration,
            "lora_group",
            lambda *a, dropout_ps: ps.append(dropout_ps) or group(*a, dropout_ps=dropout_ps),
        )
        step(fused.train())
        assert [set(p) for p in ps] == [{0.25}] * 4
        ps.clear()
        step(fused.eval())
        assert [set(p) for p in ps] == [{0.0}] * 4

    def test_adapters(self, counted):
        stock = stock_model(**ALL)
        stock.add_adapter("b", config(r=2, lora_alpha=1, target_modules=["q_proj", "k_proj", "gate_proj", "up_proj"]))
        randomised(stock)
        fused = fuse(copy.deepcopy(stock), groups=True)
        for names, groups in ((["b"], 4), (["default", "b"], 4), (["default"], 4)):
            for model in (stock, fused):
                model.base_model.set_adapter(names)
            counted["lora_group"] = 0
            assert_same(step(fused), step(stock))
            assert counted["lora_group"] == groups
        counted["lora_group"] = 0
        names = ["default", "b", "__base__"]
        torch.testing.assert_close(
            logits(fused.eval(), adapter_names=names), logits(stock.eval(), adapter_names=names), atol=1e-4, rtol=1e-4
        )
        with fused.disable_adapter(), stock.disable_adapter():
            assert torch.equal(logits(fused), logits(stock))
        for model in (stock, fused):
            model.merge_adapter()
        torch.testing.assert_close(logits(fused), logits(stock))
        assert counted["lora_group"] == 0

    def test_what_peft_must_compute_is_left_to_it(self, counted):
        """DoRA of the queries; the keys and values are still together."""
        stock, fused = self.pair()
        for model in (stock, fused):
            dora = config(use_dora=True, target_modules=["q_proj"])
            model.add_adapter("dora", dora)
            model.base_model.set_adapter(["default", "dora"])
        randomised(stock)
        fused.load_state_dict(stock.state_dict())
        with one_warning("a variant of LoRA"):
            got = step(fused)
        assert counted == {"lora_linear": 4, "lora_group": 4, "lora_segments": 0}
        assert_same(got, step(stock))

    def test_undone(self):
        stock, fused = self.pair()
        assert len(shared_inputs(fused)) == 4
        assert len(shared_inputs(fuse(fused, groups=True))) == 4
        assert not shared_inputs(fuse(copy.deepcopy(fused)))
        assert unfuse(fused) is fused
        assert [vars(module).keys() for module in fused.modules()] == [vars(m).keys() for m in stock.modules()]
        assert not shared_inputs(fused)
        assert torch.equal(logits(fused), logits(stock))

    def test_unloaded(self):
        stock, fused = self.pair()
        merged = fused.merge_and_unload()
        torch.testing.assert_close(logits(merged), logits(stock), atol=1e-5, rtol=1e-4)
        assert not shared_inputs(merged)

    def test_copies_and_pickles(self, counted):
        _, fused = self.pair()
        expected = logits(fused)
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            counted["lora_group"] = 0
            assert torch.equal(logits(twin), expected)
            assert counted["lora_group"] == 4

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant):
        _, fused = self.pair(lora_dropout=0.2)
        fused.train()
        torch.manual_seed(5)
        expected = step(fused)
        fused.enable_input_require_grads()
        fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        assert_same(step(fused), expected, 1e-6)

    def test_autocast(self, device):
        _, fused = self.pair()
        fused.to(device)
        with torch.autocast(device, torch.bfloat16):
            assert_same(step(fused), step(fuse(copy.deepcopy(fused))), 3e-2)

    def test_compile(self):
        _, fused = self.pair()
        del fused.get_base_model().model.layers[1]
        expected = step(fused)
        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        got = {name.removeprefix("_orig_mod."): value for name, value in step(compiled).items()}
        assert_same(got, expected)

    def test_drift_is_measured(self, counted):
        """Whoever watches the base layers calls them, and groups compute nothing in vain."""
        from sensilora.integrations.transformers import _calling_base_layers

        stock, fused = self.pair()
        with _calling_base_layers(fused):
            torch.testing.assert_close(logits(fused), logits(stock))
        assert counted["lora_group"] == 0
        logits(fused)
        assert counted["lora_group"] == 4


class TestFiles:
    def test_files_are_the_same(self, tmp_path):
        model = stock_model(modules_to_save=["lm_head"])
        model.save_pretrained(tmp_path / "stock")
        fuse(model).save_pretrained(tmp_path / "fused")
        unfuse(model).save_pretrained(tmp_path / "unfused")
        made = get_peft_model(llama(), use_fused(config(modules_to_save=["lm_head"])))
        made.load_state_dict(model.state_dict())
        made.save_pretrained(tmp_path / "made")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert len({(tmp_path / name / file).read_bytes() for name in ("stock", "fused", "unfused")}) == 1
        assert (tmp_path / "made" / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "stock" / "adapter_model.safetensors"
        ).read_bytes()
        configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("stock", "made")]
        # PEFT holds them in a set.
        for fields in configs:
            fields["target_modules"].sort()
        assert configs[0] == configs[1]

    def test_loading(self, tmp_path):
        stock = stock_model()
        stock.save_pretrained(tmp_path)
        base = stock.unload()
        opened = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
        by_config = PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, config=use_fused(LoraConfig.from_pretrained(tmp_path)), is_trainable=True
        )
        fused = fuse(copy.deepcopy(opened))
        assert len(fused_layers(fused)) == len(fused_layers(by_config)) == 6
        expected = step(opened)
        assert_same(step(fused), expected)
        assert_same(step(by_config), expected)
        fused.load_adapter(tmp_path, "again")
        fused.set_adapter("again")
        torch.testing.assert_close(logits(fused), expected["logits"], atol=1e-5, rtol=1e-5)

    def test_training_state_comes_back(self, tmp_path):
        _, fused = pair()
        fused.save_pretrained(tmp_path)
        twin = fuse(get_peft_model(llama(), config()))
        peft.set_peft_model_state_dict(twin, load_file(tmp_path / "adapter_model.safetensors"))
        for name, parameter in twin.named_parameters():
            if "lora_" in name:
                assert torch.equal(parameter, fused.get_parameter(name))

    @pytest.mark.parametrize("prepared", [False, True])
    def test_hotswapping(self, prepared, tmp_path, counted):
        stock, fused = pair()
        other = randomised(get_peft_model(copy.deepcopy(stock).unload(), config(r=3, lora_alpha=2)))
        other.save_pretrained(tmp_path)
        if prepared:
            for model in (stock, fused):
                prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
            assert isinstance(fused_layers(fused)[0].scaling["default"], torch.Tensor)
        for model in (stock, fused):
            hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
        got = logits(fused)
        assert counted["lora_linear"] == 6
        torch.testing.assert_close(got, logits(stock), atol=1e-5, rtol=1e-5)


class TestTorch:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("p", [0.0, 0.2])
    def test_gradient_checkpointing(self, reentrant, p):
        _, fused = pair(lora_dropout=p)
        fused.train()
        torch.manual_seed(5)
        expected = step(fused)
        fused.enable_input_require_grads()
        fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        assert_same(step(fused), expected, 1e-6)

    def test_autocast(self, device):
        stock, fused = (model.to(device) for model in pair())
        oracle = step(copy.deepcopy(stock).double())
        with torch.autocast(device, torch.bfloat16):
            expected, got = step(stock), step(fused)
        for name in oracle:
            assert got[name].dtype == expected[name].dtype
            limit = 1.5 * relative_error(expected[name], oracle[name]) + 8e-3
            assert relative_error(got[name], oracle[name]) <= limit, name

    @pytest.mark.parametrize("adapters", [["default"], ["default", "b"]], ids=str)
    def test_compile(self, adapters):
        _, fused = TestAdapters().several()
        fused.base_model.set_adapter(adapters)
        expected = step(fused)
        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        got = {name.removeprefix("_orig_mod."): value for name, value in step(compiled).items()}
        assert_same(got, expected)

    @since_020
    def test_hotswapping_compiles_once(self, tmp_path):
        _, fused = pair()
        other = randomised(get_peft_model(llama(), config(r=3, lora_alpha=2)))
        other.save_pretrained(tmp_path)
        prepare_model_for_compiled_hotswap(fused, target_rank=8, config=fused.peft_config)
        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        before = logits(compiled)
        hotswap_adapter(fused, str(tmp_path), "default", torch_device="cpu")
        expected = logits(fused)
        with torch.compiler.set_stance("fail_on_recompile"):
            got = logits(compiled)
        torch.testing.assert_close(got, expected)
        assert not torch.allclose(got, before)

    def test_compile_of_mixed_batches(self):
        _, fused = TestAdapters().several()
        names = ["default", "__base__", "b"]
        torch._dynamo.reset()
        layer, x = fused_layers(fused)[0], torch.randn(3, 5, 32)
        expected = layer(x, adapter_names=names)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, adapter_names=names), expected)

    def test_compile_of_what_is_left_to_peft(self):
        stock, fused = layer_pair(nn.Linear(8, 8), use_dora=True)
        x = torch.randn(4, 8)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(fused, backend="aot_eager")(x), stock(x))

    def test_data_parallel_replicas(self):
        """Replicas hold plain tensors in the place of parameters."""
        stock, fused = layer_pair(nn.Linear(8, 8))
        x = torch.randn(4, 8)
        expected = stock(x)
        base = fused.base_layer
        weight = base.weight
        del base._parameters["weight"]
        base.weight = weight.detach().clone()
        torch.testing.assert_close(fused(x), expected)


class OfAnotherBase(Linear):
    """As PEFT's layers over quantised bases are: another class beside lora.Linear."""


def test_layers_whose_class_is_made_at_run_time_can_be_pickled():
    layer = OfAnotherBase(nn.Linear(8, 6), "default", config=LoraConfig(r=2), r=2, lora_alpha=4)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 8)
    expected = layer(x)
    layer.__class__ = integration._fused_class(OfAnotherBase)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(twin) is type(layer)
        assert twin.lora_A["default"].weight is not layer.lora_A["default"].weight
        torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize("function", [fuse, unfuse])
def test_what_is_no_model(function):
    with pytest.raises(AdapterError, match="takes a model with PEFT's LoRA layers, not LoraConfig"):
        function(config())
