"""Several named adapters in one batch: against the base, PEFT and separate training; routing, files, bad input."""

import copy
import warnings

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import captured
from sensilora import adapters, mixed
from sensilora.adapters import load_adapter, unload
from sensilora.errors import AdapterError, OutputExistsError, PlanError, RankError
from sensilora.nn import BASE, MultiLoRALinear, VarRankLoRALinear
from sensilora.plan import RankPlan
from sensilora.targets import find_targets, fingerprint, matrix_shape
from tests.tolerances import relative_error

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:the head")


def llama(**changes):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, initializer_range=0.3, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)).eval()


def bert():
    torch.manual_seed(1)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def plan_for(model, shift, scaling=1.5):
    """Ranks 0 to 4 by turns, begun elsewhere for each shift: adapters differ in ranks and in targets."""
    shapes = {name: matrix_shape(module) for name, module in find_targets(model).items()}
    plan = RankPlan.uniform(shapes, 1, scaling=scaling, model_id="tiny", fingerprint=fingerprint(model))
    return plan.with_ranks({name: (index + shift) % 5 for index, name in enumerate(shapes)})


def randomised(parameters):
    for name, parameter in parameters.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


def with_adapters(model, names=("a", "b", "c"), **kwargs):
    plans = [plan_for(model, index, scaling=1.0 + index) for index in range(len(names))]
    for name, plan in zip(names, plans, strict=True):
        mixed.add_adapter(model, name, plan, **kwargs)
        randomised(mixed.adapter_parameters(model, name))
    return model


IDS = torch.arange(48).reshape(4, 12) % 50


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(params=[llama, gpt2, bert])
def make(request):
    return request.param


def one_layer(ranks=(3, 5, 0), in_features=8, out_features=6, **kwargs):
    layer = MultiLoRALinear(nn.Linear(in_features, out_features))
    for index, rank in enumerate(ranks):
        layer.add_adapter(f"a{index}", rank, scaling=0.5 + index, **kwargs)
        nn.init.normal_(layer.lora_B[f"a{index}"])
    return layer


# --- the layer


@pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8), (4, 2, 3, 8)])
def test_each_sample_uses_its_adapter(shape):
    layer = one_layer()
    x = torch.randn(shape)
    layer.routing.assign(["a1", BASE, "a0", "a2"])
    y = layer(x)
    for sample, name in enumerate(["a1", BASE, "a0", "a2"]):
        layer.routing.assign(name)
        torch.testing.assert_close(y[sample], layer(x[sample : sample + 1])[0])
    torch.testing.assert_close(y[1], layer.base_layer(x)[1])
    torch.testing.assert_close(y[3], layer.base_layer(x)[3])
    assert not torch.allclose(y[0], layer.base_layer(x)[0])


def test_a_name_for_all_is_the_layer_with_that_adapter_alone():
    layer = one_layer()
    alone = VarRankLoRALinear(layer.base_layer, 5, scaling=1.5)
    alone.lora_A, alone.lora_B = layer.lora_A["a1"], layer.lora_B["a1"]
    x = torch.randn(4, 5, 8)
    layer.routing.assign("a1")
    assert torch.equal(layer(x), alone(x))


def test_ids_names_and_offsets_say_the_same(device):
    layer, x = one_layer().to(device), torch.randn(4, 5, 8, device=device)
    outputs = []
    for ids, offsets in (
        (["a1", BASE, "a0", "a1"], None),
        (torch.tensor([1, -1, 0, 1]), None),
        (torch.tensor([1, -1, 0, 1], dtype=torch.int32, device=device), None),
        (torch.tensor([1, 99, 0, 1], device=device), None),
        (["a1", "a0", "a1"], torch.tensor([0, 5, 15, 20])[[0, 1, 2, 3]]),
        (["a1", BASE, "a0", "a1"], torch.tensor([0, 5, 10, 15, 20], device=device)),
    ):
        layer.routing.assign(ids, offsets)
        outputs.append(layer(x))
    for index in (1, 2, 3, 5):
        assert torch.equal(outputs[0], outputs[index])
    assert not torch.equal(outputs[0], outputs[4])


def test_packed_batch():
    layer, x = one_layer(), torch.randn(1, 20, 8)
    layer.routing.assign(["a0", "a1"], torch.tensor([0, 3, 15]))
    y = layer(x)
    layer.routing.assign("a0")
    torch.testing.assert_close(y[:, :3], layer(x)[:, :3])
    layer.routing.assign("a1")
    torch.testing.assert_close(y[:, 3:15], layer(x)[:, 3:15])
    torch.testing.assert_close(y[:, 15:], layer.base_layer(x)[:, 15:])


def test_without_ids():
    x = torch.randn(2, 8)
    layer = MultiLoRALinear(nn.Linear(8, 6))
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.add_adapter("one", 3)
    nn.init.normal_(layer.lora_B["one"])
    assert not torch.allclose(layer(x), layer.base_layer(x))
    layer.add_adapter("two", 3)
    with pytest.raises(AdapterError, match=r"has adapters one, two; call sensilora\.mixed\.set_adapter_ids"):
        layer(x)


def test_dropout_of_each_adapter_while_training_only():
    layer = one_layer((3, 5))
    layer.dropout["a0"] = 1.0
    x = torch.randn(4, 8)
    layer.routing.assign(["a0", "a1", "a0", "a1"])
    trained, base = layer.train()(x), layer.base_layer(x)
    torch.testing.assert_close(trained[::2], base[::2])
    torch.testing.assert_close(trained[1::2], layer.eval()(x)[1::2])
    assert not torch.allclose(layer(x)[::2], base[::2])


def test_merge_is_for_good_and_for_all():
    layer, x = one_layer(), torch.randn(4, 8)
    layer.routing.assign("a0")
    expected = layer(x)
    layer.merge("a0")
    torch.testing.assert_close(layer.base_layer(x), expected)
    assert list(layer.adapters) == ["a1", "a2"]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_resize_keeps_the_function_where_it_can(rank):
    layer, x = one_layer(), torch.randn(4, 8)
    layer.lora_A["a0"].requires_grad_(False)
    layer.routing.assign("a0")
    before, delta = layer(x), layer.delta_weight("a0")
    layer.resize_rank("a0", rank)
    assert layer.adapters["a0"].rank == rank
    assert not layer.lora_A["a0"].requires_grad
    assert layer.lora_B["a0"].requires_grad
    if rank >= 3:
        torch.testing.assert_close(layer(x), before)
    else:
        best = torch.linalg.svdvals(delta.double())[rank:].norm()
        assert relative_error((layer.delta_weight("a0") - delta).norm(), best) < 1e-5
    with pytest.raises(RankError, match="give 0 to 6"):
        layer.resize_rank("a0", 7)


@pytest.mark.parametrize("name", ["", "a.b", BASE, "keys", "training"])
def test_names_that_cannot_be(name):
    layer = one_layer()
    with pytest.raises(AdapterError, match="choose a name without dots"):
        layer.add_adapter(name, 2)
    assert list(layer.adapters) == ["a0", "a1", "a2"]


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda layer: layer.add_adapter("a0", 2), AdapterError, "there is an adapter 'a0' already"),
        (lambda layer: layer.add_adapter("x", 9), RankError, "rank 9 does not fit a 6x8 matrix"),
        (lambda layer: layer.add_adapter("x", 2.0), RankError, "a rank must be a whole number, not 2.0"),
        (lambda layer: layer.add_adapter("x", 2, init="zero"), ValueError, "init 'zero' is unknown"),
        (lambda layer: layer.add_adapter("x", 2, dropout=2.0), ValueError, "dropout must be in"),
        (lambda layer: layer.delete_adapter("x"), AdapterError, "this layer has no adapter 'x', only a0, a1, a2"),
        (lambda layer: layer.merge("x"), AdapterError, "this layer has no adapter 'x'"),
        (lambda layer: layer.routing.assign("x"), AdapterError, "there is no adapter 'x'; the model has a0, a1, a2"),
        (lambda layer: layer.routing.assign(["a0", "x"]), AdapterError, "there is no adapter 'x'"),
        (lambda layer: layer.routing.assign(torch.ones(2)), AdapterError, "must be a 1-D tensor of integers"),
        (
            lambda layer: layer.routing.assign(torch.ones(2, 1).int()),
            AdapterError,
            "must be a 1-D tensor of integers",
        ),
        (lambda layer: layer.routing.assign(["a0"], [0, 1]), AdapterError, "offsets must be a 1-D tensor"),
        (lambda layer: layer.add_adapter(3, 2), AdapterError, "an adapter cannot be called 3"),
        (lambda layer: layer.routing.assign(["a0"], torch.tensor([0, 1, 2])), AdapterError, "one offset more"),
        (lambda layer: layer.routing.assign("a0", torch.tensor([0, 1])), AdapterError, "one offset more"),
        (lambda layer: layer.routing.assign(["a0"], torch.tensor([0.0, 1.0])), AdapterError, "offsets must be a 1-D"),
        (lambda layer: MultiLoRALinear(layer), AdapterError, "base_layer must be nn.Linear or Conv1D"),
    ],
)
def test_bad_input_to_the_layer(act, error, message):
    layer, x = one_layer(), torch.randn(2, 8)
    layer.routing.assign(["a1", "a0"])
    before = layer(x)
    with pytest.raises(error, match=message):
        act(layer)
    assert torch.equal(layer(x), before)


def test_a_batch_of_another_length_than_the_ids():
    layer = one_layer()
    layer.routing.assign(["a0", "a1"])
    with pytest.raises(ValueError, match="2 adapter ids for a batch of 3; give one for each sample"):
        layer(torch.randn(3, 5, 8))


@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (2, 0, 8)])
def test_empty_batches(shape):
    layer = one_layer()
    layer.routing.assign(["a0"] * shape[0])
    assert layer(torch.randn(shape)).shape == (*shape[:-1], 6)


def test_ids_may_be_set_anew_before_the_backward_pass():
    layer, x = one_layer(), torch.randn(4, 8)
    assigned = [["a0", "a0", "a1", BASE], ["a1", BASE, "a0", "a0"]]

    def gradients(losses):
        layer.zero_grad()
        for loss in losses:
            loss.backward()
        return [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]

    def loss(ids):
        layer.routing.assign(ids)
        return layer(x).square().sum()

    one_by_one = gradients(map(loss, assigned))
    assert all(torch.equal(*pair) for pair in zip(gradients(list(map(loss, assigned))), one_by_one, strict=True))


def test_ids_set_under_inference_mode_can_be_trained_with():
    layer = one_layer()
    with torch.inference_mode():
        layer.routing.assign(["a0", "a1"])
        layer(torch.randn(2, 8))
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.lora_B["a0"].grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_the_block(reentrant):
    layer, x = one_layer(dropout=0.3).train(), torch.randn(4, 8, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        torch.manual_seed(3)
        with mixed.adapter_ids(layer, ["a0", "a1", BASE, "a1"]):
            run(x).square().sum().backward()
        gradients.append([layer.lora_A["a0"].grad, layer.lora_B["a1"].grad])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


# Inductor's cache does not know when an op's fake kernel has changed.
@torch._inductor.config.patch(force_disable_caches=True)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(device, compiler):
    layer, x = one_layer().to(device), torch.randn(4, 5, 8, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for ids in (["a0", "a1", BASE, "a1"], ["a1", "a1", "a0", BASE], "a1", torch.tensor([-1, 0, 1, 1])):
        mixed.set_adapter_ids(layer, ids)
        torch.testing.assert_close(compiled(x), layer(x))


def test_other_batches_and_lengths_do_not_compile_again():
    layer, counter = one_layer(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    counts = set()
    for batch, length in ((4, 5), (4, 7), (3, 7), (6, 9), (2, 30)):
        layer.routing.assign(torch.arange(batch) % 3 - 1)
        x = torch.randn(batch, length, 8)
        torch.testing.assert_close(compiled(x), layer(x))
        counts.add(counter.frame_count)
    assert len(counts) == 1


@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16])
def test_16_bit_base(adapter_dtype):
    layer = MultiLoRALinear(nn.Linear(8, 6, dtype=torch.bfloat16))
    layer.add_adapter("a", 3, adapter_dtype=adapter_dtype)
    layer.add_adapter("b", 2)
    assert layer.lora_A["a"].dtype == (adapter_dtype or torch.float32)
    layer.routing.assign(["a", "b"])
    layer(torch.randn(2, 8, dtype=torch.bfloat16)).sum().backward()
    assert layer.lora_B["a"].grad.dtype == layer.lora_B["a"].dtype
    assert layer.lora_B["b"].grad.dtype == torch.float32


# --- the model


def test_mixed_batch_equals_one_adapter_at_a_time(make):
    model = with_adapters(make())
    names = ["b", BASE, "a", "c"]
    mixed.set_adapter_ids(model, names)
    got = logits(model)
    for sample, name in enumerate(names):
        with mixed.adapter_ids(model, name):
            torch.testing.assert_close(got[sample], logits(model)[sample], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), got)
    torch.testing.assert_close(got[1], logits(make())[1], rtol=1e-4, atol=1e-5)


def test_the_first_adapter_freezes_the_model_and_later_ones_leave_it(make):
    model = with_adapters(make(), ("a",))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(
        mixed.adapter_parameters(model, "a")
    )
    mixed.set_requires_grad(model, "a", False)
    mixed.add_adapter(model, "b", plan_for(make(), 2))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(
        mixed.adapter_parameters(model, "b")
    )
    assert mixed.adapter_names(model) == ("a", "b")
    assert fingerprint(model) == fingerprint(make())


def test_new_adapters_change_nothing(make):
    model = make()
    expected = logits(model)
    for index, name in enumerate(("a", "b")):
        mixed.add_adapter(model, name, plan_for(make(), index))
    mixed.set_adapter_ids(model, ["a", "b", "b", "a"])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2], indirect=True)
def test_equals_pefts_adapter_names(make, tmp_path):
    peft = pytest.importorskip("peft")
    model = with_adapters(make())
    for name in "abc":
        mixed.save_adapter(model, tmp_path / name, adapter=name)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "a", adapter_name="a").eval()
    for name in "bc":
        theirs.load_adapter(tmp_path / name, adapter_name=name)
    names = ["c", "a", BASE, "b"]
    mixed.set_adapter_ids(model, names)
    with torch.no_grad():
        expected = theirs(input_ids=IDS, adapter_names=names).logits
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_saved_adapters_are_ordinary_ones(make, tmp_path):
    peft = pytest.importorskip("peft")
    model = with_adapters(make())
    assert mixed.save_adapter(model, tmp_path / "b", adapter="b") == tmp_path / "b"
    mixed.set_adapter_ids(model, "b")
    expected = logits(model)
    torch.testing.assert_close(logits(load_adapter(make(), tmp_path / "b")), expected)
    opened = peft.PeftModel.from_pretrained(make(), tmp_path / "b").eval()
    torch.testing.assert_close(logits(opened), expected, rtol=1e-4, atol=1e-5)
    again = mixed.load_adapter(with_adapters(make(), ("first",)), tmp_path / "b", adapter="second")
    mixed.set_adapter_ids(again, "second")
    torch.testing.assert_close(logits(again), expected)
    with pytest.raises(OutputExistsError):
        mixed.save_adapter(model, tmp_path / "b", adapter="a")
    mixed.save_adapter(model, tmp_path / "b", adapter="a", force=True)


def test_a_head_for_all_is_saved_on_request(tmp_path):
    peft = pytest.importorskip("peft")
    model = with_adapters(bert(), ("a", "b"))
    nn.init.normal_(model.classifier.weight)
    mixed.save_adapter(model, tmp_path / "a", adapter="a", modules_to_save=["classifier"])
    mixed.set_adapter_ids(model, "a")
    for opened in (
        load_adapter(bert(), tmp_path / "a"),
        peft.PeftModel.from_pretrained(bert(), tmp_path / "a").eval(),
    ):
        torch.testing.assert_close(logits(opened), logits(model), rtol=1e-4, atol=1e-5)


def test_layers_resized_to_rank_0_are_left_out(tmp_path):
    model = with_adapters(llama(), ("a",))
    layers = [module for module in model.modules() if isinstance(module, MultiLoRALinear)]
    layers[0].resize_rank("a", 0)
    mixed.save_adapter(model, tmp_path / "a", adapter="a")
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path / "a")), logits(model))
    for layer in layers:
        layer.resize_rank("a", 0)
    with pytest.raises(AdapterError, match="rank 0 everywhere"):
        mixed.save_adapter(model, tmp_path / "b", adapter="a")


def test_an_adapter_peft_saved_is_loaded_under_a_name(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = mixed.load_adapter(llama(), tmp_path / "theirs", adapter="theirs", dropout=0.25)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.adapters["theirs"].dropout == 0.25


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.01)])
@pytest.mark.parametrize("make", [llama, bert], indirect=True)
def test_side_by_side_training_equals_two_separate_trainings(make, optimizer):
    names = ["a", "b", "a", BASE, "b", "a"]
    inputs = torch.randint(50, (8, 6, 12))
    # In fp64, or rounding is amplified from step to step by however many threads sum.
    together = with_adapters(make(), ("a", "b")).double().train()
    for module in together.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    apart = {name: copy.deepcopy(together) for name in "ab"}
    steppers = {
        model: optimizer([p for p in model.parameters() if p.requires_grad]) for model in (together, *apart.values())
    }

    def step(model, samples):
        # A sum over samples, so that a sample's gradient does not depend on who else is in the batch.
        scores = model(input_ids=samples).logits.log_softmax(-1)[..., 0]
        loss = scores.reshape(len(samples), -1).mean(1).square().sum()
        steppers[model].zero_grad()
        loss.backward()
        steppers[model].step()

    mixed.set_adapter_ids(together, names)
    for samples in inputs:
        step(together, samples)
        for own, model in apart.items():
            with mixed.adapter_ids(model, own):
                rows = [index for index, name in enumerate(names) if name == own]
                step(model, samples[rows])
            for name, parameter in mixed.adapter_parameters(together, own).items():
                torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-6, atol=1e-8)


def test_a_frozen_adapter_stays(make):
    model = with_adapters(make()).train()
    mixed.set_requires_grad(model, "a", False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with mixed.adapter_ids(model, ["a", "b", "c", BASE]):
        model(input_ids=IDS).logits.square().sum().backward()
    optimizer.step()
    moving = {*mixed.adapter_parameters(model, "b"), *mixed.adapter_parameters(model, "c")}
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in moving if before[name].numel()}


def test_adapters_with_an_optimiser_each_do_not_decay_in_steps_without_samples():
    model = with_adapters(llama(), ("a", "b")).train()
    optimizers = {name: torch.optim.AdamW(mixed.adapter_parameters(model, name).values(), lr=0.1) for name in "ab"}
    before = {name: p.detach().clone() for name, p in mixed.adapter_parameters(model, "b").items()}
    with mixed.adapter_ids(model, ["a", "a", BASE, "a"]):
        model(input_ids=IDS).logits.square().sum().backward()
    optimizers["a"].step()
    for name, p in mixed.adapter_parameters(model, "b").items():
        assert p.grad is None or not p.grad.any()
        assert torch.equal(p, before[name])


def test_a_layer_refuses_an_adapter_as_a_whole():
    layer = one_layer((3,))
    for arguments in ({"adapter_dtype": torch.int8}, {"scaling": "two"}, {"rank": 9}):
        with pytest.raises((ValueError, RankError)):
            layer.add_adapter("x", **{"rank": 2, **arguments})
        assert layer.routing.names == ["a0"]
        assert list(layer.adapters) == list(layer.lora_A) == ["a0"]


def test_ids_are_not_set_again_where_an_adapter_was_deleted():
    model = with_adapters(llama())
    mixed.set_adapter_ids(model, ["b"] * 4)
    with mixed.adapter_ids(model, "c"):
        mixed.add_adapter(model, "d", plan_for(llama(), 3))
    assert mixed._routing(model).assignment()[0].tolist() == [1] * 4
    with mixed.adapter_ids(model, "c"):
        mixed.delete_adapter(model, "a")
    with pytest.raises(AdapterError, match="to say which sample uses which"):
        logits(model)


def test_a_base_of_its_own_forward_takes_one_adapter_a_batch():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = MultiLoRALinear(Doubled(8, 6)), torch.randn(2, 8)
    layer.add_adapter("a", 2)
    layer.add_adapter("b", 3)
    nn.init.normal_(layer.lora_B["a"])
    layer.routing.assign("a")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.delta_weight("a").T)
    layer.routing.assign(["a", "b"])
    with pytest.raises(AdapterError, match=r"forward of its own \(Doubled\).*one adapter, by its name"):
        layer(x)


def test_ids_need_a_batch():
    layer = one_layer()
    layer.routing.assign(["a0"])
    with pytest.raises(ValueError, match=r"adapter ids are for a batch.*not \(8,\)"):
        layer(torch.randn(8))


def test_delete_adapter(make):
    model = with_adapters(make())
    mixed.set_adapter_ids(model, "c")
    expected = logits(model)
    mixed.delete_adapter(model, "b")
    assert mixed.adapter_names(model) == ("a", "c")
    assert not any(name.endswith(".b") for name, _ in model.named_parameters())
    mixed.set_adapter_ids(model, torch.tensor([1, 1, 1, 1]))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    mixed.add_adapter(model, "b", plan_for(make(), 3))
    assert mixed.adapter_names(model) == ("a", "c", "b")


def test_merge_and_unload(make):
    model = with_adapters(make())
    mixed.set_adapter_ids(model, "b")
    expected = logits(model)
    mixed.merge(model, "b")
    assert mixed.adapter_names(model) == ("a", "c")
    mixed.set_adapter_ids(model, BASE)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    unload(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert dict(model.named_parameters()).keys() == dict(make().named_parameters()).keys()


def test_merging_a_shared_weight_is_refused():
    model = llama(tie_word_embeddings=True)
    shapes = {"lm_head": matrix_shape(model.lm_head)}
    mixed.add_adapter(model, "a", RankPlan.uniform(shapes, 2, scaling=1.0, model_id="tiny", fingerprint=""))
    with pytest.raises(AdapterError, match="is shared with"):
        mixed.merge(model, "a")


def test_copies_have_a_routing_of_their_own(make):
    model = with_adapters(make())
    mixed.set_adapter_ids(model, "a")
    other = copy.deepcopy(model)
    mixed.set_adapter_ids(other, "b")
    assert not torch.allclose(logits(other), logits(model))
    assert len({id(m.routing) for m in other.modules() if isinstance(m, MultiLoRALinear)}) == 1
    other.load_state_dict(model.state_dict())


def test_generation_with_a_cache():
    model = with_adapters(llama())
    prompts, names = IDS[:, :5], ["b", BASE, "a", "c"]
    with mixed.adapter_ids(model, names):
        together = model.generate(prompts, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for sample, name in enumerate(names):
        with mixed.adapter_ids(model, name):
            alone = model.generate(prompts[sample : sample + 1], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(alone[0], together[sample, : alone.shape[1]])


@pytest.mark.gpu
def test_a_captured_step_is_replayed_with_other_ids():
    layer = one_layer((3, 20, 5), 64, 48).cuda()
    x = torch.randn(4, 16, 64, device="cuda")
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), parameters)

    mixed.set_adapter_ids(layer, ["a0", "a1", "a2", BASE])
    replay = captured(step)
    for ids in (["a2", "a2", BASE, "a0"], torch.tensor([1, 0, -1, 1], device="cuda"), torch.tensor([2, 2, 2, 2])):
        mixed.set_adapter_ids(layer, ["a0", "a1"])  # another length in between
        mixed.set_adapter_ids(layer, ids)
        for got, expected in zip(replay(), step(), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.gpu
def test_setting_ids_and_running_wait_for_nothing():
    layer = one_layer((3, 20, 5), 64, 48).cuda()
    x = torch.randn(4, 16, 64, device="cuda")
    mixed.set_adapter_ids(layer, ["a0", "a1", "a2", BASE])
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for ids in (["a1", "a1", "a0", BASE], torch.zeros(4, dtype=torch.int64, device="cuda")):
            mixed.set_adapter_ids(layer, ids)
            layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- bad input to the model


def test_bad_plans_leave_the_model_alone():
    model, plan = llama(), plan_for(llama(), 1)
    before = dict(model.named_modules())
    shallow = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24,
        )
    )  # fmt: skip
    for act, error, message in (
        (lambda: mixed.add_adapter(model, "a", plan_for(shallow, 1)), PlanError, "fingerprints differ"),
        (lambda: mixed.add_adapter(model, "a", plan_for(bert(), 1)), PlanError, "no linear layer"),
        (
            lambda: mixed.add_adapter(model, "a", plan.with_ranks(dict.fromkeys(plan.ranks, 0))),
            PlanError,
            "every rank of the plan is 0",
        ),
        (lambda: mixed.add_adapter(model, "a.b", plan), AdapterError, "without dots"),
        (lambda: mixed.add_adapter(model, "a", plan, init="zero"), ValueError, "init 'zero' is unknown"),
        (lambda: mixed.add_adapter(model, "a", plan, dropout=1.5), ValueError, "dropout must be in"),
        (lambda: mixed.add_adapter(model, "a", plan, adapter_dtype=torch.int8), ValueError, "of floating point"),
        (lambda: mixed.set_adapter_ids(model, "a"), AdapterError, r"call sensilora\.mixed\.add_adapter first"),
        (lambda: mixed.adapter_names(model), AdapterError, "carries no named adapter"),
    ):
        with pytest.raises(error, match=message):
            act()
        assert dict(model.named_modules()) == before
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_bad_input_to_a_model_with_adapters(tmp_path):
    model = with_adapters(llama())
    plan = plan_for(llama(), 1)
    for act, message in (
        (lambda: mixed.add_adapter(model, "a", plan), "there is an adapter 'a' already"),
        (lambda: mixed.set_adapter_ids(model, ["a", "x"]), "there is no adapter 'x'; the model has a, b, c"),
        (lambda: mixed.delete_adapter(model, "x"), "there is no adapter 'x'"),
        (lambda: mixed.merge(model, "x"), "there is no adapter 'x'"),
        (lambda: mixed.save_adapter(model, tmp_path / "x", adapter="x"), "there is no adapter 'x'"),
        (lambda: mixed.set_requires_grad(model, "x"), "there is no adapter 'x'"),
        (lambda: adapters.inject(model, plan), "carries adapters already"),
        (lambda: adapters.save_adapter(model, tmp_path / "x"), "sensilora.mixed"),
        (lambda: adapters.merge(model), "sensilora.mixed"),
    ):
        with pytest.raises(AdapterError, match=message):
            act()
    assert not (tmp_path / "x").exists()
    with pytest.raises(AdapterError, match=r"call sensilora\.unload\(model\) first"):
        mixed.add_adapter(adapters.inject(llama(), plan), "a", plan)


def test_a_folder_with_a_head_of_its_own_is_refused(tmp_path):
    model = bert()
    adapters.inject(model, plan_for(model, 1), modules_to_save=["classifier"])
    adapters.save_adapter(model, tmp_path / "with_head")
    with pytest.raises(AdapterError, match="one copy of it for all"):
        mixed.load_adapter(bert(), tmp_path / "with_head", adapter="a")


def test_a_new_head_is_warned_of():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with_adapters(bert())
    assert [str(w.message) for w in caught if "the head 'classifier' looks new" in str(w.message)] != []
    assert len([w for w in caught if "looks new" in str(w.message)]) == 1
