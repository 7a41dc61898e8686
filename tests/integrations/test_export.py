import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sensilora.adapters import inject, load_adapter, save_adapter
from sensilora.errors import AdapterError, OutputExistsError
from sensilora.integrations.export import export_merged, export_peft, export_uniform
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
def trained(base, tmp_path_factory):
    """An adapter with ranks 0 to 6 and a scale of 2, its model's logits, and the shapes of the matrices of rank 0."""
    torch.manual_seed(0)
    model = load_causal_lm(base)
    shapes = {name: matrix_shape(module) for name, module in find_targets(model).items()}
    plan = RankPlan.uniform(shapes, 1, scaling=2.0, fingerprint=fingerprint(model))
    plan = plan.with_ranks({name: 5 * index % 7 for index, name in enumerate(shapes)})
    inject(model, plan)
    randomise(model)
    folder = save_adapter(model, tmp_path_factory.mktemp("adapter") / "a")
    return folder, logits(model), {name: shapes[name] for name, rank in plan.ranks.items() if rank == 0}


def opened(base, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def test_uniform_computes_the_same_with_one_rank(base, trained, tmp_path):
    folder, expected, dropped = trained
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
    folder, expected, dropped = trained
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
    folder, expected, _ = trained
    output = export_peft(folder, tmp_path / "peft")
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
    folder, expected, _ = trained
    output = export_merged(load_causal_lm(base), load_tokenizer(base), folder, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(output)
    capfd.readouterr()
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    assert load_tokenizer(output)("good film")["input_ids"] == [5, 14]
    assert not list(output.glob("*.bin"))


def test_contradicting_ranks_and_existing_output(trained, tmp_path):
    folder, _, _ = trained
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
