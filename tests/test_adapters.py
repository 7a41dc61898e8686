"""Injecting, merging, saving and loading adapters; the files against real PEFT."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sensilora.nn
from sensilora import adapters
from sensilora.adapters import adapter_layers, inject, load_adapter, merge, save_adapter, unload
from sensilora.errors import AdapterError, OutputExistsError, PlanError
from sensilora.nn import VarRankLoRALinear
from sensilora.plan import RankPlan
from sensilora.targets import find_targets, fingerprint, matrix_shape
from tests import tiny_models
from tests.tolerances import relative_error

transformers = pytest.importorskip("transformers")

# The tiny models' heads are as transformers initialises them; the one test of the warning catches it.
pytestmark = pytest.mark.filterwarnings("ignore:the head")


def bert():
    torch.manual_seed(1)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2():
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)).eval()


def plan_for(model, scaling=1.5):
    """Ranks 0, 1, 2, ... by turns, so that neighbours differ and some are left out."""
    shapes = {name: matrix_shape(module) for name, module in find_targets(model).items()}
    plan = RankPlan.uniform(shapes, 1, scaling=scaling, model_id="tiny", fingerprint=fingerprint(model))
    return plan.with_ranks({name: index % 5 for index, name in enumerate(shapes)})


def trained(model, plan, **kwargs):
    inject(model, plan, **kwargs)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(2, 12)).logits


@pytest.fixture(params=[bert, gpt2])
def make(request):
    return request.param


def test_inject_gives_the_planned_ranks_and_changes_no_output(make):
    model = make()
    expected, plan = logits(model), plan_for(model)
    assert inject(model, plan, dropout=0.1) is model
    torch.testing.assert_close(logits(model), expected)
    layers = adapter_layers(model)
    assert {name: layer.rank for name, layer in layers.items()} == {n: r for n, r in plan.ranks.items() if r}
    assert all(layer.scaling == 1.5 and layer.dropout == 0.1 for layer in layers.values())
    assert all(not layer.training for layer in layers.values())


def test_only_adapters_and_modules_to_save_train():
    model = bert()
    inject(model, plan_for(model), modules_to_save=["classifier"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trainable} == {"lora_A", "lora_B", "weight", "bias"}
    assert {name for name in trainable if "lora" not in name} == {"classifier.weight", "classifier.bias"}


def test_a_training_step_moves_only_what_trains():
    model = bert().train()
    inject(model, plan_for(model), dropout=0.1, modules_to_save=["classifier"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=torch.arange(24).reshape(2, 12), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_merge_and_unload(make):
    model = make()
    trained(model, plan_for(model))
    expected = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    unload(model)
    assert not adapter_layers(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_unload_without_merge_gives_the_base_model(make):
    model = make()
    expected = logits(model)
    trained(model, plan_for(model))
    assert not torch.allclose(logits(model), expected)
    unload(model)
    assert torch.equal(logits(model), expected)
    assert dict(model.named_parameters()).keys() == dict(make().named_parameters()).keys()


@pytest.mark.parametrize("scaling", [1.5, 2.0])
def test_save_and_load_round_trip(make, tmp_path, scaling):
    model = make()
    trained(model, plan_for(model, scaling))
    save_adapter(model, tmp_path / "adapter")
    other = load_adapter(make(), tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model))
    assert {n: (v.rank, v.scaling) for n, v in adapter_layers(other).items()} == {
        n: (v.rank, v.scaling) for n, v in adapter_layers(model).items()
    }


@pytest.mark.parametrize("scaling", [1.5, 2.0])
def test_saved_adapter_opens_in_peft_with_equal_logits(make, tmp_path, scaling):
    peft = pytest.importorskip("peft")
    model = make()
    head = ["classifier"] if make is bert else []
    trained(model, plan_for(model, scaling), modules_to_save=head)
    if head:
        nn.init.normal_(model.classifier.weight)
    save_adapter(model, tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(opened), logits(model))
    merged = opened.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_an_adapter_peft_saved_opens_here(make, tmp_path):
    peft = pytest.importorskip("peft")
    names = list(find_targets(make()))
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=names, use_rslora=make is gpt2, init_lora_weights=False,
        rank_pattern={"^" + names[0].replace(".", r"\."): 2}, fan_in_fan_out=make is gpt2,
        task_type="SEQ_CLS" if make is bert else "CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(make(), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(make(), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs))


def test_file_format(tmp_path):
    model = bert()
    plan = plan_for(model, 2.0)
    trained(model, plan, modules_to_save=["classifier"], dropout=0.1)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    kept = {name: rank for name, rank in plan.ranks.items() if rank}
    assert config["target_modules"] == list(kept)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["rank_pattern"] == {"^" + name.replace(".", r"\."): rank for name, rank in kept.items()}
    assert all(type(alpha) is int for alpha in config["alpha_pattern"].values())
    assert (config["task_type"], config["init_lora_weights"], config["modules_to_save"]) == (
        "SEQ_CLS",
        True,
        ["classifier"],
    )
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(iter(kept))
    assert tensors[f"base_model.model.{name}.lora_A.weight"].shape == (kept[name], 16)
    assert tensors["base_model.model.classifier.weight"].shape == (3, 16)


def test_a_shared_module_is_replaced_everywhere():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Linear(4, 4))})
    plan = RankPlan.uniform({"a.0": (4, 4)}, 2, fingerprint=fingerprint(model))
    inject(model, plan)
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["a"][0], VarRankLoRALinear)
    unload(model)
    assert model["a"][0] is model["b"][0] is shared


def test_merging_a_tied_weight_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    inject(model, RankPlan.uniform({"a": (4, 4)}, 2))
    with pytest.raises(AdapterError, match=r"weight of a is shared with b\.weight"):
        merge(model)
    assert not model["a"].merged


def test_a_planned_matrix_cannot_be_saved_in_full_too():
    model = bert()
    with pytest.raises(AdapterError, match=r"the plan adapts bert\.pooler\.dense"):
        inject(model, plan_for(model), modules_to_save=["bert.pooler"])
    assert not adapter_layers(model)


def test_a_new_head_that_stays_frozen_is_told():
    model = bert()
    with pytest.warns(UserWarning, match="head 'classifier' looks new"):
        inject(model, plan_for(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(bert(), plan_for(bert()), modules_to_save=["classifier"])


def test_a_new_head_of_two_layers_is_told_as_a_whole():
    model = tiny_models.family_model("RobertaForSequenceClassification")
    plan = RankPlan.uniform({"roberta.encoder.layer.0.output.dense": (16, 24)}, 1)
    with pytest.warns(UserWarning, match=r"pass modules_to_save=\['classifier'\]"):
        inject(copy.deepcopy(model), plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(model, plan, modules_to_save=["classifier"])
    model = tiny_models.family_model("DistilBertForSequenceClassification")
    plan = RankPlan.uniform({"distilbert.transformer.layer.0.ffn.lin1": (24, 16)}, 1)
    with pytest.warns(UserWarning, match=r"'pre_classifier' looks new .*\['pre_classifier', 'classifier'\]"):
        inject(model, plan, modules_to_save=["classifier"])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_adapters_that_changed_the_base_are_refused(tmp_path, init):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=init)
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=f"init_lora_weights '{init}' changed the base weights"):
        load_adapter(bert(), tmp_path / "adapter")


def test_deepcopy_keeps_what_to_save(tmp_path):
    model = bert()
    trained(model, plan_for(model), modules_to_save=["classifier"])
    save_adapter(copy.deepcopy(model), tmp_path / "adapter")
    assert "base_model.model.classifier.bias" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")


def test_plan_for_another_model():
    plan = plan_for(bert())
    with pytest.raises(PlanError, match=r"plan is for tiny: this model has no linear layer 'bert"):
        inject(gpt2(), plan)
    wide = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50
        )
    )
    with pytest.raises(PlanError, match=r"is \(24, 16\) there, \(32, 16\) here"):
        inject(wide, plan)
    assert not adapter_layers(wide)
    resized = bert()
    resized.resize_token_embeddings(60)
    with pytest.raises(PlanError, match="fingerprints differ"):
        inject(resized, plan)
    assert all(parameter.requires_grad for parameter in resized.parameters())
    assert adapter_layers(inject(resized, plan, strict=False))


def test_adapters_twice_or_never():
    model = bert()
    for function in (merge, unload):
        with pytest.raises(AdapterError, match="carries no adapter"):
            function(model)
    with pytest.raises(AdapterError, match="modules_to_save names 'head'"):
        inject(model, plan_for(model), modules_to_save=["head"])
    assert not adapter_layers(model)
    inject(model, plan_for(model))
    with pytest.raises(AdapterError, match="carries adapters already"):
        inject(model, plan_for(bert()))


def test_save_refuses_to_overwrite(tmp_path):
    model = bert()
    with pytest.raises(AdapterError, match="carries no adapter"):
        save_adapter(model, tmp_path / "adapter")
    trained(model, plan_for(model))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(OutputExistsError):
        save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


class TestDamagedAdapter:
    @pytest.fixture
    def folder(self, tmp_path):
        model = bert()
        trained(model, plan_for(model), modules_to_save=["classifier"])
        return save_adapter(model, tmp_path / "adapter")

    def refused(self, folder, message, error=AdapterError):
        """Loading fails with the message and leaves the model as it was."""
        model = bert()
        with pytest.raises(error, match=message):
            load_adapter(model, folder)
        assert not adapter_layers(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(logits(model), logits(bert()))

    def edit_config(self, folder, **fields):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def edit_tensors(self, folder, edit):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    def test_missing_files(self, folder):
        (folder / "adapter_model.safetensors").unlink()
        self.refused(folder, "adapter_model.safetensors does not exist", FileNotFoundError)
        (folder / "adapter_config.json").unlink()
        self.refused(folder, "adapter_config.json does not exist", FileNotFoundError)

    @pytest.mark.parametrize("keep", [0, 7, 100, -8])
    def test_truncated_weights(self, folder, keep):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(folder, "is damaged")

    @pytest.mark.parametrize("keep", [0, 10, -5])
    def test_truncated_config(self, folder, keep):
        path = folder / "adapter_config.json"
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(folder, "truncated or edited")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"peft_type": "IA3"}, "peft_type"),
            ({"r": None}, ": r: "),
            ({"lora_alpha": "x"}, "lora_alpha"),
            ({"lora_alpha": 0}, "lora_alpha"),
            ({"lora_alpha": float("inf")}, "lora_alpha"),
            ({"alpha_pattern": {"a": float("nan")}}, "alpha_pattern"),
            ({"alpha_pattern": {"a": -1}}, "alpha_pattern"),
            ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
            ({"rank_pattern": {}}, "rank 4 but its tensors have rank"),
            ({"alpha_pattern": {"a": "b"}}, "alpha_pattern"),
            ({"rank_pattern": {"(": 3}}, r"rank_pattern.*not a valid regular expression"),
            ({"use_dora": True}, "use_dora is set"),
            ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
            ({"modules_to_save": ["nothing"]}, "does not name its module"),
        ],
    )
    def test_edited_config(self, folder, fields, message):
        self.edit_config(folder, **fields)
        self.refused(folder, message)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda t: t.pop(next(k for k in t if k.endswith("lora_A.weight"))), "only lora_B"),
            (lambda t: t.update({"other": torch.ones(1)}), "does not begin with"),
            (lambda t: t.update({"base_model.model.x.lora_magnitude_vector": torch.ones(1)}), "of a kind"),
            (
                lambda t: t.update({"base_model.model.classifier.weight": torch.ones(9, 16)}),
                "does not fit this model",
            ),
            (lambda t: next(iter(t.values())).fill_(float("nan")), "NaN or Inf"),
        ],
    )
    def test_edited_tensors(self, folder, edit, message):
        self.edit_tensors(folder, edit)
        self.refused(folder, message)

    def test_adapter_of_another_model(self, folder):
        with pytest.raises(AdapterError, match=r"does not have as a linear layer|does not fit this model"):
            load_adapter(gpt2(), folder)

    def test_nothing_unpickles(self, folder):
        (folder / "adapter_model.safetensors").unlink()
        torch.save({}, folder / "adapter_model.bin")
        self.refused(folder, "adapter_model.safetensors does not exist", FileNotFoundError)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({r"^a\.q": 2, "q": 3}, 2),
        ({"q": 3, r"^a\.q": 2}, 3),
        ({"b.q": 4}, 8),
        ({"q_proj": 4}, 8),
        (None, 8),
    ],
)
def test_patterns_follow_pefts_rule(patterns, expected):
    assert adapters._pattern_value(patterns, "a.q", 8) == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("LlamaForCausalLM", "CAUSAL_LM"),
        ("GPT2LMHeadModel", "CAUSAL_LM"),
        ("DistilBertForSequenceClassification", "SEQ_CLS"),
        ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("WhisperForConditionalGeneration", None),
        ("ViTForImageClassification", None),
    ],
)
def test_task_types_are_those_that_run_in_peft(family, expected):
    assert adapters.task_type(tiny_models.family_model(family)) == expected


def test_a_vision_language_model_is_no_encoder_decoder():
    class LookAndTellForConditionalGeneration(nn.Linear):
        config = transformers.PretrainedConfig()

    assert adapters.task_type(LookAndTellForConditionalGeneration(2, 2)) is None


# Model class, and the sizes of the groups in one forward pass.
GROUPS = {
    "LlamaForCausalLM": [3, 2] * 2,
    "Qwen2ForCausalLM": [3, 2] * 2,
    "Qwen3ForCausalLM": [3, 2] * 2,
    "MistralForCausalLM": [3, 2] * 2,
    "MixtralForCausalLM": [3] * 2,
    "GemmaForCausalLM": [3, 2] * 2,
    "PhiForCausalLM": [3] * 2,
    "BertForSequenceClassification": [3] * 2,
    "RobertaForSequenceClassification": [3] * 2,
    "DistilBertForSequenceClassification": [3] * 2,
    "OPTForCausalLM": [3] * 2,
    "ViTForImageClassification": [3] * 2,
    "GPT2LMHeadModel": [],
    # The encoder, then the decoder, whose cross-attention reads its query elsewhere.
    "T5ForConditionalGeneration": [3, 2] * 2 + [3, 2, 2] * 2,
    "BartForConditionalGeneration": [3] * 2 + [3, 2] * 2,
    "WhisperForConditionalGeneration": [3] * 2 + [3, 2] * 2,
}


@pytest.mark.parametrize("wrap", [lambda layer: layer, lambda layer: nn.TransformerEncoder(layer, 1)])
def test_torchs_own_encoder_layers_call_their_adapters(wrap):
    """In eval mode it would run as one operation, which reads weights alone; so does its attention, in any mode."""
    model = nn.Sequential(wrap(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)), nn.Linear(8, 8))
    shapes = {name: matrix_shape(module) for name, module in find_targets(model).items()}
    assert not [name for name in shapes if name.endswith("out_proj")]
    before = [{**vars(module)} for module in model.modules()]
    trained(model, RankPlan.uniform(shapes, 2))
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    options = {"src_key_padding_mask": padding}
    with torch.no_grad():
        in_training = model[0](x, **options)
        torch.testing.assert_close(model.eval()[0](x, **options)[~padding], in_training[~padding])
    unload(model).train()
    for module, values in zip(model.modules(), before, strict=True):
        for name in ("activation_relu_or_gelu", "use_nested_tensor"):
            assert vars(module).get(name) == values.get(name)


class TestGroups:
    def test_one_dropout_mask_for_a_group(self):
        for shared in (True, False):
            model = trained(
                self.build("LlamaForCausalLM"), self.plan("LlamaForCausalLM"), dropout=0.5, shared_dropout_mask=shared
            )
            attention = model.model.layers[0].self_attn
            for layer in (attention.q_proj, attention.k_proj):
                for parameter in (layer.weight, layer.lora_A, layer.lora_B):
                    nn.init.constant_(parameter, 0.0 if parameter is layer.weight else 1.0)
            dropped = []
            for layer in (attention.q_proj, attention.k_proj):
                layer.register_forward_hook(
                    lambda layer, args, y, dropped=dropped: dropped.append(y[..., 0] / (layer.scaling * layer.rank))
                )
            self.step(model, "LlamaForCausalLM")
            assert torch.allclose(dropped[0], dropped[1], rtol=1e-4, atol=1e-5) == shared

    def plan(self, family):
        shapes = {name: matrix_shape(module) for name, module in find_targets(self.build(family)).items()}
        plan = RankPlan.uniform(shapes, 1, scaling=1.5, fingerprint=fingerprint(self.build(family)))
        return plan.with_ranks({name: index % 4 + 1 for index, name in enumerate(shapes)})

    @pytest.fixture
    def group_calls(self, monkeypatch):
        """Sizes of the groups that were computed by one op."""
        sizes, lora_group = [], sensilora.nn.lora_group

        def counted(x, weights, *args, **kwargs):
            sizes.append(len(weights))
            return lora_group(x, weights, *args, **kwargs)

        monkeypatch.setattr(sensilora.nn, "lora_group", counted)
        return sizes

    def build(self, family):
        return tiny_models.family_model(family).train()

    def inputs(self, family):
        if family.startswith("ViT"):
            return {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)}
        inputs = {"input_ids": torch.arange(4, 12).reshape(2, 4)}
        if family.startswith("Whisper"):
            inputs = {"input_features": torch.linspace(-1, 1, 96).reshape(2, 4, 12)}
        if "Conditional" in family:
            inputs["decoder_input_ids"] = torch.arange(6).reshape(2, 3)
        return inputs

    def step(self, model, family):
        """Logits and every gradient."""
        torch.manual_seed(3)
        model.zero_grad()
        logits = model(**self.inputs(family)).logits
        logits.square().mean().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def pair(self, family, **kwargs):
        """The same adapted model twice: with groups and without."""
        models = []
        for groups in (True, False):
            model = self.build(family)
            shapes = {name: matrix_shape(module) for name, module in find_targets(model).items()}
            plan = RankPlan.uniform(shapes, 1, scaling=1.5, fingerprint=fingerprint(model))
            plan = plan.with_ranks({name: index % 4 + 1 for index, name in enumerate(shapes)})
            models.append(trained(model, plan, groups=groups, **kwargs))
        models[0].load_state_dict(models[1].state_dict())
        return models

    @pytest.mark.parametrize("family", GROUPS)
    def test_every_family_computes_its_groups_by_one_op_with_equal_results(self, family, group_calls):
        together, alone = self.pair(family, dropout=0.2)
        assert list(together.state_dict()) == list(alone.state_dict())
        for _ in range(2):
            group_calls.clear()
            logits, gradients = self.step(together, family)
            assert group_calls == GROUPS[family]
        expected_logits, expected = self.step(alone, family)
        assert group_calls == GROUPS[family]
        assert relative_error(logits, expected_logits) < 1e-6
        assert gradients.keys() == expected.keys()
        for name in gradients:
            assert relative_error(gradients[name], expected[name]) < 1e-5, name

    def test_layers_without_a_rank_are_left_out(self, group_calls):
        family = "LlamaForCausalLM"
        model = self.build(family)
        shapes = {name: matrix_shape(module) for name, module in find_targets(model).items()}
        ranks = {
            "layers.0.self_attn.q_proj": 0,
            "layers.1.self_attn.q_proj": 0,
            "layers.1.self_attn.k_proj": 0,
            "layers.0.mlp.up_proj": 0,
        }
        plan = RankPlan.uniform(shapes, 2, fingerprint=fingerprint(model))
        inject(model, plan.with_ranks({f"model.{name}": rank for name, rank in ranks.items()}))
        self.step(model, family)
        assert group_calls == [2, 2]

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("family", ["LlamaForCausalLM", "BartForConditionalGeneration"])
    def test_gradient_checkpointing(self, family, use_reentrant, group_calls):
        together, alone = self.pair(family, dropout=0.3)
        for model in (together, alone):
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        (logits, gradients), (expected_logits, expected) = self.step(together, family), self.step(alone, family)
        assert group_calls
        assert relative_error(logits, expected_logits) < 1e-6
        for name in expected:
            assert relative_error(gradients[name], expected[name]) < 1e-5, name

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiles_whole(self, backend, group_calls):
        torch._dynamo.reset()
        together, alone = self.pair("LlamaForCausalLM")
        compiled = torch.compile(together, fullgraph=True, backend=backend)
        for _ in range(2):
            logits, gradients = self.step(compiled, "LlamaForCausalLM")
        assert group_calls == [3, 2] * 4
        expected_logits, expected = self.step(alone, "LlamaForCausalLM")
        assert relative_error(logits, expected_logits) < 1e-5
        for name in expected:
            assert relative_error(gradients[f"_orig_mod.{name}"], expected[name]) < 1e-5, name

    @pytest.mark.parametrize("family", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
    def test_generation(self, family, group_calls):
        together, alone = (model.eval() for model in self.pair(family))
        ids = torch.arange(4, 12).reshape(2, 4)
        arguments = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(together.generate(ids, **arguments), alone.generate(ids, **arguments))
        assert group_calls

    def test_files_loading_and_unloading(self, tmp_path, group_calls):
        family = "LlamaForCausalLM"
        together, alone = self.pair(family)
        for name, model in (("together", together), ("alone", alone)):
            save_adapter(model, tmp_path / name)
        for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            assert (tmp_path / "together" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
        loaded = load_adapter(self.build(family), tmp_path / "alone")
        assert torch.equal(self.step(loaded, family)[0], self.step(together, family)[0])
        assert group_calls == [3, 2] * 4
        group_calls.clear()
        self.step(load_adapter(self.build(family), tmp_path / "alone", groups=False), family)
        assert group_calls == []
        unload(loaded)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.modules())

    def test_merging_and_copies(self, group_calls):
        family = "LlamaForCausalLM"
        together, alone = self.pair(family)
        other = copy.deepcopy(together)
        for model in (other, alone):
            model.model.layers[0].self_attn.q_proj.merge()
            model.model.layers[0].mlp.up_proj.resize_rank(0)
        assert relative_error(self.step(other, family)[0], self.step(alone, family)[0]) < 1e-6
        assert group_calls == [2, 3, 2]
        merge(other)
        group_calls.clear()
        with torch.no_grad():
            other(**self.inputs(family))
        assert group_calls == []
        self.step(together, family)
        assert group_calls == [3, 2] * 2
