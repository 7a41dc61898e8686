import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from sensilora.adapters import adapter_layers, inject, load_adapter, save_adapter
from sensilora.errors import AdapterError, OutputExistsError, PlanError
from sensilora.integrations.export import (
    export_axolotl,
    export_blank_adapter,
    export_merged,
    export_peft,
    export_uniform,
)
from sensilora.integrations.transformers import load_causal_lm, load_tokenizer
from sensilora.plan import RankPlan
from sensilora.targets import find_targets, fingerprint, matrix_shape
from tests import tiny_models

IDS = torch.tensor([[2, 5, 9, 14, 15, 16], [2, 6, 10, 17, 18, 19]])

TEN_FIELDS = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "target_modules",
    "bias",
    "use_rslora",
    "init_lora_weights",
    "inference_mode",
    "base_model_name_or_path",
}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request, tmp_path_factory):
    return getattr(tiny_models, request.param)(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plan(base):
    """Ranks 0 to 6 and a scale of 2."""
    model = load_causal_lm(base)
    shapes = {name: matrix_shape(module) for name, module in find_targets(model).items()}
    plan = RankPlan.uniform(shapes, 1, scaling=2.0, model_id=str(base), fingerprint=fingerprint(model))
    return plan.with_ranks({name: 5 * index % 7 for index, name in enumerate(shapes)})


@pytest.fixture(scope="module")
def trained(base, plan, tmp_path_factory):
    """An adapter, its model's logits, the shapes of the matrices of rank 0, and the update of every other matrix."""
    torch.manual_seed(0)
    model = inject(load_causal_lm(base), plan)
    randomise(model)
    folder = save_adapter(model, tmp_path_factory.mktemp("adapter") / "a")
    dropped = {name: plan.matrices[name].shape for name, rank in plan.ranks.items() if rank == 0}
    updates = {
        name: layer.scaling * (layer.lora_B.detach() @ layer.lora_A.detach())
        for name, layer in adapter_layers(model).items()
    }
    return SimpleNamespace(folder=folder, logits=logits(model), dropped=dropped, updates=updates)


def opened(base, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def test_uniform_computes_the_same_with_one_rank(base, trained, tmp_path):
    folder, expected, dropped = trained.folder, trained.logits, trained.dropped
    assert dropped
    output = export_uniform(folder, tmp_path / "uniform", dropped=dropped)
    config = json.loads((output / "adapter_config.json").read_text())
    tensors = load_file(output / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"] == 6
    assert "rank_pattern" not in config
    assert "alpha_pattern" not in config
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {6}
    assert {tensor.shape[1] for name, tensor in tensors.items() if "lora_B" in name} == {6}
    for name in dropped:
        assert not tensors[f"base_model.model.{name}.lora_B.weight"].any()
    assert set(config["target_modules"]) == set(find_targets(load_causal_lm(base)))
    torch.testing.assert_close(logits(opened(base, output)), expected, rtol=1e-5, atol=1e-5)


def test_uniform_fills_the_layers_gaps_without_a_plan(base, trained, tmp_path):
    folder, expected, dropped = trained.folder, trained.logits, trained.dropped
    output = export_uniform(folder, tmp_path / "uniform")
    tensors = load_file(output / "adapter_model.safetensors")
    written = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    kinds = {name.split(".", 3)[-1] for name in written}
    assert written >= {name for name in dropped if name.split(".", 3)[-1] in kinds}
    for name in written & dropped.keys():
        lora_A, lora_B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert (lora_B.shape[0], lora_A.shape[1]) == dropped[name]
    torch.testing.assert_close(logits(opened(base, output)), expected, rtol=1e-5, atol=1e-5)


def test_peft_form_keeps_the_tensors_and_loads(base, trained, tmp_path):
    folder, expected = trained.folder, trained.logits
    card = b"# An adapter\n\nby Andr\xe9\n"  # not UTF-8
    (folder / "README.md").write_bytes(card)
    output = export_peft(folder, tmp_path / "peft")
    (folder / "README.md").unlink()
    assert (output / "README.md").read_bytes() == card
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, output))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(logits(opened(base, output)), expected, rtol=1e-5, atol=1e-5)


def test_peft_form_normalises_an_rslora_adapter_of_peft(tmp_path):
    base = tiny_models.llama(tmp_path / "base")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 9},
        alpha_pattern={"down_proj": 10},
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    output = export_peft(tmp_path / "theirs", tmp_path / "peft")
    fields = json.loads((output / "adapter_config.json").read_text())
    assert fields.keys() == TEN_FIELDS | {"rank_pattern", "alpha_pattern"}
    assert fields["use_rslora"] is False
    assert fields["rank_pattern"]["^model\\.layers\\.1\\.self_attn\\.q_proj"] == 9
    assert fields["alpha_pattern"]["^model\\.layers\\.1\\.self_attn\\.q_proj"] == 18  # 6 / sqrt(9) * 9
    torch.testing.assert_close(logits(opened(base, output)), logits(theirs), rtol=1e-5, atol=1e-5)
    ours = load_adapter(load_causal_lm(base), output)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_merged_model_is_plain_and_computes_the_same(base, trained, tmp_path, capfd):
    folder, expected = trained.folder, trained.logits
    output = export_merged(load_causal_lm(base), load_tokenizer(base), folder, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(output)
    capfd.readouterr()
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    assert load_tokenizer(output)("good film")["input_ids"] == [5, 14]
    assert not list(output.glob("*.bin"))


def test_contradicting_ranks_and_existing_output(trained, tmp_path):
    folder = trained.folder
    damaged = tmp_path / "damaged"
    export_peft(folder, damaged)
    path = damaged / "adapter_config.json"
    fields = json.loads(path.read_text())
    name = next(iter(fields["rank_pattern"]))
    fields["rank_pattern"][name] += 1
    path.write_text(json.dumps(fields))
    for export in (export_peft, export_uniform):
        with pytest.raises(AdapterError, match=r"its tensors have ranks \d and \d"):
            export(damaged, tmp_path / "out")
        with pytest.raises(OutputExistsError, match="exists already"):
            export(folder, damaged)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["damaged"]
    export_peft(folder, damaged, force=True)
    assert json.loads(path.read_text())["rank_pattern"][name] == fields["rank_pattern"][name] - 1


def factors(folder):
    """Tensors of an adapter by module, lora_A and lora_B."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key)[1] for key in tensors}
    return {name: [tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB"] for name in names}


def assert_served(updates, scaled):
    """`scaled`: a server's (scale, lora_A, lora_B) by module; modules without an update are zeros."""
    assert scaled.keys() >= updates.keys()
    for name, (scale, lora_A, lora_B) in scaled.items():
        wanted = updates.get(name, torch.zeros(lora_B.shape[0], lora_A.shape[1]))
        torch.testing.assert_close(scale * (lora_B @ lora_A), wanted, rtol=1e-5, atol=1e-6, msg=name)


def vllm_scale(config, name):
    """vLLM's rule since 0.32, and PEFT's: the first pattern that matches the name's end, alpha / rank."""

    def found(patterns, default):
        matches = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)]
        assert len(matches) == 1  # no order of the patterns, such as PEFT's when it saves, changes anything
        return next(iter(matches), default)

    assert config["use_rslora"] is False
    rank = found(config["rank_pattern"], config["r"])
    return rank, found(config["alpha_pattern"], config["lora_alpha"]) / rank


def test_peft_form_by_vllms_rule(trained, tmp_path):
    output = export_peft(trained.folder, tmp_path / "peft")
    config, scaled = json.loads((output / "adapter_config.json").read_text()), {}
    assert isinstance(config["target_modules"], list)
    assert config["r"] == max(config["rank_pattern"].values())
    assert all(type(value) is int for value in (*config["rank_pattern"].values(), *config["alpha_pattern"].values()))
    for name, (lora_A, lora_B) in factors(output).items():
        rank, scale = vllm_scale(config, name)
        assert lora_A.shape[0] == lora_B.shape[1] == rank
        scaled[name] = scale, lora_A, lora_B
    assert_served(trained.updates, scaled)


def test_uniform_by_the_rule_of_servers_without_patterns(trained, tmp_path):
    """vLLM up to 0.31 and SGLang: one rank and scale, q, k and v of a layer stacked, so that all are there."""
    output = export_uniform(trained.folder, tmp_path / "uniform", dropped=trained.dropped)
    config, found = json.loads((output / "adapter_config.json").read_text()), factors(output)
    assert not config.get("use_rslora")
    assert {lora_A.shape[0] for lora_A, _ in found.values()} == {config["r"]}
    for name in found:
        for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if name.endswith(first):
                stacked = [found[name.replace(first, other)][0] for other in (first, *others)]
                assert torch.cat(stacked).shape[0] == len(stacked) * config["r"]
    scale = config["lora_alpha"] / config["r"]
    assert_served(trained.updates, {name: (scale, *pair) for name, pair in found.items()})


@pytest.mark.parametrize("form", [export_peft, export_uniform])
def test_vllm_reads_it(trained, tmp_path, form):
    helper = pytest.importorskip("vllm.lora.peft_helper", reason="vLLM is not installed", exc_type=ImportError)
    output = form(trained.folder, tmp_path / "adapter")
    config = helper.PEFTHelper.from_local_dir(str(output), max_position_embeddings=None)
    config.validate_legal(SimpleNamespace(max_lora_rank=8))
    with pytest.raises(ValueError, match="rank 6 is greater than max_lora_rank"):
        config.validate_legal(SimpleNamespace(max_lora_rank=1))
    scaled = {}
    for name, (lora_A, lora_B) in factors(output).items():
        rank, scale = config.get_rank_and_scaling(name)
        assert lora_A.shape[0] == rank
        scaled[name] = scale, lora_A, lora_B
    assert_served(trained.updates, scaled)


def test_sglang_reads_uniform(base, trained, tmp_path):
    if base.name.startswith("gpt2"):
        pytest.skip("SGLang adapts no GPT-2")
    reason = {"reason": "SGLang is not installed", "exc_type": ImportError}
    config_module = pytest.importorskip("sglang.srt.lora.lora_config", **reason)
    lora = pytest.importorskip("sglang.srt.lora.lora", **reason)
    output = export_uniform(trained.folder, tmp_path / "uniform", dropped=trained.dropped)
    config = config_module.LoRAConfig(str(output))
    backend = SimpleNamespace(name="triton")
    adapter = lora.LoRAAdapter("a", config, AutoConfig.from_pretrained(base), None, backend)
    adapter.initialize_weights_from_tensors(load_file(output / "adapter_model.safetensors"))
    assert adapter.scaling == 1.0
    for index, layer in enumerate(adapter.layers):
        found = {}
        for key, tensor in layer.weights.items():
            name, side = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
            found.setdefault(name.rpartition(".")[2], {})[side] = tensor
        assert {name: pair["A"].shape[0] for name, pair in found.items()} == {
            "qkv_proj": 18, "o_proj": 6, "gate_up_proj": 12, "down_proj": 6
        }  # fmt: skip
        for stack, parts in (("qkv_proj", "qkv"), ("gate_up_proj", ["gate", "up"])):
            parent = f"model.layers.{index}.{'self_attn' if stack == 'qkv_proj' else 'mlp'}"
            shapes = [(part, trained_shape(trained, f"{parent}.{part}_proj")) for part in parts]
            lora_As = found[stack]["A"].chunk(len(shapes))
            lora_Bs = found[stack]["B"].split([shape[0] for _, shape in shapes])
            stacked = {
                f"{parent}.{part}_proj": (1.0, lora_A, lora_B)
                for (part, _), lora_A, lora_B in zip(shapes, lora_As, lora_Bs, strict=True)
            }
            assert_served({name: trained.updates[name] for name in stacked if name in trained.updates}, stacked)


def trained_shape(trained, name):
    return trained.dropped.get(name) or trained.updates[name].shape


def axolotls_lora_config(config):
    """What axolotl 0.19 makes of a config (``axolotl.loaders.adapter``), after its schema's types."""
    assert type(config["lora_r"]) is type(config["lora_alpha"]) is int
    for field in ("lora_rank_pattern", "lora_alpha_pattern"):
        assert all(type(key) is str and type(value) is int and value > 0 for key, value in config[field].items())
    return LoraConfig(
        r=config["lora_r"],
        lora_alpha=config["lora_alpha"],
        target_modules=config["lora_target_modules"],
        bias="none",
        task_type="CAUSAL_LM",
        rank_pattern=config["lora_rank_pattern"],
        alpha_pattern=config["lora_alpha_pattern"],
        **({"use_rslora": True} if config["peft_use_rslora"] else {}),
    )


def with_scaling(plan, rule, value):
    return plan.model_copy(update={"scaling": plan.scaling.model_copy(update={"rule": rule, "value": value})})


@pytest.mark.parametrize("rule", ["constant", "alpha", "rslora"])
def test_axolotl_trains_the_plans_ranks_and_scales(base, plan, tmp_path, rule):
    plan = with_scaling(plan, rule, 8.0)
    output = export_axolotl(plan, tmp_path / "ranks.yml")
    config = yaml.safe_load(output.read_text())
    ranks = {name: rank for name, rank in plan.ranks.items() if rank > 0}
    assert config["lora_target_modules"] == sorted(ranks)
    # Only keys that are anchored, escaped full names match one module each.
    assert set(config["lora_rank_pattern"]) == {"^" + re.escape(name) for name in ranks}
    assert config["lora_alpha_pattern"].keys() == config["lora_rank_pattern"].keys()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), axolotls_lora_config(config))
    layers = {name: model.get_submodule("base_model.model." + name) for name in ranks}
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    for name, layer in layers.items():
        assert layer.scaling["default"] == pytest.approx(plan.scaling_of(name))
    # Saved by PEFT, which sorts patterns, and opened by this package.
    model.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert {name: layer.rank for name, layer in adapter_layers(ours).items()} == ranks


def test_axolotl_reads_it(base, plan, tmp_path):
    """Its schema, and what it makes of a config for PEFT."""
    absent = {"reason": "axolotl is not installed", "exc_type": ImportError}
    schema = pytest.importorskip("axolotl.utils.schemas.peft", **absent)
    loader = pytest.importorskip("axolotl.loaders.adapter", **absent)
    mapping = pytest.importorskip("axolotl.utils.dict", **absent)
    (tmp_path / "base.yml").write_text("adapter: lora\nlora_dropout: 0.05\n")
    config = yaml.safe_load(export_axolotl(plan, tmp_path / "ranks.yml", base=tmp_path / "base.yml").read_text())
    read = schema.LoraConfig.model_validate(dict(config)).model_dump(exclude_none=True)
    assert {field: read[field] for field in config} == config
    model = AutoModelForCausalLM.from_pretrained(base)
    theirs = loader._build_peft_lora_config(model, mapping.DictDefault(read))
    ours = axolotls_lora_config(config)
    for field in (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "use_rslora",
    ):
        assert getattr(theirs, field) == getattr(ours, field), field


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda plan: with_scaling(plan, "constant", 0.3), None, "whole alphas only"),
        (lambda plan: plan, "lora_r: 8", r"sets lora_r, which follows from the plan"),
        (lambda plan: plan, "lora_target_linear: true", "sets lora_target_linear"),
        (lambda plan: plan, "- adapter", "holds no 'name: value' lines"),
        (lambda plan: plan, "a: [", "is not YAML"),
        (lambda plan: plan.with_ranks(dict.fromkeys(plan.ranks, 0)), None, "every rank of the plan is 0"),
        (lambda _: RankPlan.uniform({"encoder.layers.0.q": (8, 8), "layers.0.q": (8, 8)}, 2).with_ranks(
            {"encoder.layers.0.q": 0}), None, r"cannot leave out encoder\.layers\.0\.q"),
    ],
)  # fmt: skip
def test_axolotl_refuses(plan, tmp_path, change, config, message):
    path = None if config is None else tmp_path / "base.yml"
    if path is not None:
        path.write_text(config)
    with pytest.raises(PlanError, match=message):
        export_axolotl(change(plan), tmp_path / "ranks.yml", base=path)
    with pytest.raises(PlanError, match=r"cannot read .*absent\.yml"):
        export_axolotl(plan, tmp_path / "ranks.yml", base=tmp_path / "absent.yml")
    assert not (tmp_path / "ranks.yml").exists()


def test_axolotl_keeps_a_file_that_exists(plan, tmp_path):
    output = export_axolotl(plan, tmp_path / "ranks.yml")
    with pytest.raises(OutputExistsError, match="exists already"):
        export_axolotl(plan, output)
    assert export_axolotl(plan, output, force=True) == output


@pytest.mark.parametrize("rule", ["constant", "alpha", "rslora"])
def test_blank_adapter_changes_nothing_and_trains(base, plan, tmp_path, rule):
    """As trainers that take an adapter open it: by PEFT, trainable."""
    plan = with_scaling(plan, rule, 3.0)
    output = export_blank_adapter(plan, tmp_path / "blank", dropout=0.25)
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output, is_trainable=True)
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    assert torch.equal(logits(model), logits(plain))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and module.lora_A
    }
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        name: rank for name, rank in plan.ranks.items() if rank > 0
    }
    for name, layer in layers.items():
        assert layer.scaling["default"] == pytest.approx(plan.scaling_of(name))
        assert layer.lora_dropout["default"].p == 0.25
        limit = 1 / math.sqrt(layer.in_features)  # of PEFT's own draw
        assert 0.5 * limit < layer.lora_A["default"].weight.abs().max() <= limit
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in layers.values())


def test_blank_adapter_is_the_seeds(plan, tmp_path):
    folders = [export_blank_adapter(plan, tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, again, other = (factors(folder) for folder in folders)
    assert all(torch.equal(first[name][0], again[name][0]) for name in first)
    assert not any(torch.equal(first[name][0], other[name][0]) for name in first)


def test_blank_adapter_leaves_out_a_dropped_matrix_that_a_kept_name_ends(tmp_path):
    plan = RankPlan.uniform({"encoder.layers.0.q": (8, 8), "layers.0.q": (8, 8)}, 2)
    output = export_blank_adapter(plan.with_ranks({"encoder.layers.0.q": 0}), tmp_path / "blank", task_type=None)
    config = LoraConfig.from_pretrained(output)
    assert config.exclude_modules == {"encoder.layers.0.q"}
    assert config.task_type is None


@pytest.mark.parametrize("export", [export_axolotl, export_blank_adapter])
def test_peft_that_is_missing_is_told(plan, tmp_path, monkeypatch, export):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "sensilora.integrations.peft", raising=False)
    with pytest.raises(PlanError, match=r"peft.* pip install 'sensilora\[peft\]'"):
        export(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blank_adapter_refuses_a_dropout_that_is_none(plan, tmp_path):
    with pytest.raises(PlanError, match=r"dropout must be in \[0, 1\], not nan"):
        export_blank_adapter(plan, tmp_path / "out", dropout=math.nan)
