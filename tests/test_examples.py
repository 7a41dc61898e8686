"""Every example runs, on a tiny model, and does what its docstring says."""

import itertools
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sensilora import allocate, calibrate, load_adapter
from sensilora.adapters import adapter_layers
from sensilora.data import Row
from sensilora.integrations.transformers import causal_batches, load_causal_lm, load_tokenizer
from sensilora.plan import RankPlan
from tests import tiny_models

EXAMPLES = Path(__file__).parents[1] / "examples"
TAU = re.compile(r"^epoch (\d): Kendall's tau (-?[01]\.\d{3}) \(\d+\.\d\d s\)$", re.MULTILINE)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_models.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """What ``python examples/NAME ARGUMENTS`` prints, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def plan(llama):
    model, tokenizer = load_causal_lm(llama), load_tokenizer(llama)
    rows = [Row((text,)) for text, _ in tiny_models.sentences(12)]
    return allocate(calibrate(model, causal_batches(tokenizer, rows), progress=False), average_rank=4, scaling=2)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_short_and_documented(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 65
    docstring = path.read_text().split('"""')[1]
    assert f"python examples/{path.name} " in docstring
    assert "\nNeeds " in docstring
    assert "\nPrints " in docstring


def test_classification_trainer(bert, tmp_path, run):
    train = tiny_models.write_labelled(tmp_path / "train.jsonl", 320, names=("bad", "good"))
    test = tiny_models.write_labelled(tmp_path / "test.jsonl", 40, seed=1, names=("bad", "good"))
    settings = {"--epochs": 6, "--learning-rate": 0.01, "--output": "mine"}
    printed = run("classification_trainer.py", bert, train, test, *itertools.chain(*settings.items()))
    assert "13 matrices, total rank 52" in printed
    assert [int(epoch) for epoch, _ in TAU.findall(printed)] == list(range(1, 7))
    accuracy = float(re.search(r"^accuracy: (\d\.\d{3})$", printed, re.MULTILINE)[1])
    assert accuracy > 0.75  # labels from one telling word: it learns, by chance it would be 0.5
    assert "wrote mine" in printed
    model = load_adapter(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2), "mine")
    assert sum(layer.rank for layer in adapter_layers(model).values()) == 52


def test_plain_loop(llama, tmp_path, run):
    text = tiny_models.write_text(tmp_path / "train.txt", 64)
    printed = run("plain_loop.py", llama, text, "--epochs", 3, "--average-rank", 4, "--output", "mine")
    assert "14 matrices, total rank 56" in printed
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss (\d\.\d{4})$", printed, re.MULTILINE)]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]
    assert "matrices in both reports: 14, only in this one (here): 0, only in the other (there): 0" in printed
    assert "Kendall's tau" in printed
    model = load_adapter(AutoModelForCausalLM.from_pretrained(llama), "mine")
    assert sum(layer.rank for layer in adapter_layers(model).values()) == 56


def test_sft_trainer(llama, tmp_path, run):
    pytest.importorskip("trl", reason="SFTTrainer is TRL's, which is not installed")
    train = tiny_models.write_labelled(tmp_path / "train.jsonl", 24)
    printed = run("sft_trainer.py", llama, train, "--epochs", 2, "--average-rank", 4, "--output", "mine")
    assert "14 matrices, total rank 56" in printed
    assert [int(epoch) for epoch, _ in TAU.findall(printed)] == [1, 2]
    assert "wrote mine" in printed
    model = load_adapter(AutoModelForCausalLM.from_pretrained(llama), "mine")
    assert sum(layer.rank for layer in adapter_layers(model).values()) == 56


def axolotls_lora_config(config):
    """What axolotl 0.19 makes of a config (``axolotl.loaders.adapter``), after its schema's types."""
    assert type(config["lora_r"]) is type(config["lora_alpha"]) is int
    for field in ("lora_rank_pattern", "lora_alpha_pattern"):
        assert all(type(key) is str and type(value) is int and value > 0 for key, value in config[field].items())
    return LoraConfig(
        r=config["lora_r"],
        lora_alpha=config["lora_alpha"],
        target_modules=config["lora_target_modules"],
        lora_dropout=config["lora_dropout"],
        bias="none",
        task_type="CAUSAL_LM",
        rank_pattern=config["lora_rank_pattern"],
        alpha_pattern=config["lora_alpha_pattern"],
        **({"use_rslora": True} if config["peft_use_rslora"] else {}),
    )


@pytest.mark.parametrize("rule", ["constant", "alpha", "rslora"])
def test_axolotl(llama, plan, tmp_path, run, rule):
    if rule != "constant":
        plan = plan.model_copy(update={"scaling": plan.scaling.model_copy(update={"rule": rule, "value": 8.0})})
    plan.save(tmp_path / "plan.json")
    printed = run("axolotl_ranks.py", "plan.json", EXAMPLES / "axolotl.yml", "--output", "ranks.yml")
    assert printed == f"wrote ranks.yml: 14 matrices, ranks up to {max(plan.ranks.values())}\n"
    base = yaml.safe_load((EXAMPLES / "axolotl.yml").read_text())
    config = yaml.safe_load((tmp_path / "ranks.yml").read_text())
    assert base.items() <= config.items()
    assert config["adapter"] == "lora"
    assert not any(config.get(field) for field in ("lora_target_linear", "load_in_8bit", "load_in_4bit"))
    # Only keys that are anchored, escaped full names match one module each.
    assert set(config["lora_rank_pattern"]) == {"^" + re.escape(name) for name in plan.ranks}
    assert config["lora_alpha_pattern"].keys() == config["lora_rank_pattern"].keys()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), axolotls_lora_config(config))
    layers = {name: model.get_submodule("base_model.model." + name) for name in plan.ranks}
    assert {name: layer.r["default"] for name, layer in layers.items()} == plan.ranks
    for name, layer in layers.items():
        assert layer.scaling["default"] == pytest.approx(plan.scaling_of(name))


def test_axolotl_files_reload_with_the_same_ranks(llama, plan, tmp_path, run):
    """Saved by PEFT, which sorts patterns, and opened by this package."""
    plan.save(tmp_path / "plan.json")
    run("axolotl_ranks.py", "plan.json", EXAMPLES / "axolotl.yml")
    config = axolotls_lora_config(yaml.safe_load((tmp_path / "ranks.yml").read_text()))
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path / "adapter")
    model = load_adapter(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "adapter")
    assert {name: layer.rank for name, layer in adapter_layers(model).items()} == plan.ranks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan, config: plan.model_copy(update={"scaling": plan.scaling.model_copy(update={"value": 0.3})}),
         "whole alphas only"),
        (lambda plan, config: config.update(lora_r=8), "sets lora_r, which follows from the plan"),
        (lambda plan, config: config.update(lora_target_linear=True), "sets lora_target_linear"),
    ],
)  # fmt: skip
def test_axolotl_refuses(plan, tmp_path, run, change, message):
    config = yaml.safe_load((EXAMPLES / "axolotl.yml").read_text())
    (change(plan, config) or plan).save(tmp_path / "plan.json")
    (tmp_path / "axolotl.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match=message):
        run("axolotl_ranks.py", "plan.json", "axolotl.yml")
    assert not (tmp_path / "ranks.yml").exists()


def test_axolotl_refuses_a_dropped_matrix_that_a_kept_name_ends_with(tmp_path, run):
    shapes = {"encoder.layers.0.q": (8, 8), "layers.0.q": (8, 8)}
    RankPlan.uniform(shapes, 2).with_ranks({"encoder.layers.0.q": 0}).save(tmp_path / "plan.json")
    with pytest.raises(SystemExit, match=r"cannot leave out encoder\.layers\.0\.q"):
        run("axolotl_ranks.py", "plan.json", EXAMPLES / "axolotl.yml")


def test_the_commands_of_the_axolotl_example_are_those_of_the_package():
    text = (EXAMPLES / "axolotl.yml").read_text()
    base = yaml.safe_load(text)
    assert f"sensilora plan {base['base_model']} {base['datasets'][0]['path']} " in text
    assert base["datasets"][0]["ds_type"] == "json"
