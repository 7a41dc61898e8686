"""Every example runs, on a tiny model, and does what its docstring says."""

import itertools
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sensilora import RankPlan, load_adapter
from sensilora.adapters import adapter_layers
from sensilora.cli import main
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


def test_axolotl(tmp_path, monkeypatch):
    """The config's second command, on the config."""
    plan = RankPlan.uniform({"model.layers.0.mlp.up_proj": (8, 4), "model.layers.0.mlp.down_proj": (4, 8)}, 2)
    plan = plan.with_ranks({"model.layers.0.mlp.up_proj": 3})
    command = re.search(
        r"^# +sensilora (export plan\.json .+)$", (EXAMPLES / "axolotl.yml").read_text(), re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    plan.save("plan.json")
    with pytest.raises(SystemExit) as exit_:
        main(command[1].replace("examples/axolotl.yml", str(EXAMPLES / "axolotl.yml")).split())
    assert exit_.value.code == 0
    base = yaml.safe_load((EXAMPLES / "axolotl.yml").read_text())
    config = yaml.safe_load(Path("ranks.yml").read_text())
    assert base.items() <= config.items()
    assert config["adapter"] == "lora"
    assert not any(config.get(field) for field in ("lora_target_linear", "load_in_8bit", "load_in_4bit"))
    assert list(config["lora_rank_pattern"].values()) == [3, 2]


def test_the_commands_of_the_axolotl_example_are_those_of_the_package():
    text = (EXAMPLES / "axolotl.yml").read_text()
    base = yaml.safe_load(text)
    assert f"sensilora plan {base['base_model']} {base['datasets'][0]['path']} " in text
    assert base["datasets"][0]["ds_type"] == "json"
