"""The command line on tiny models: whole runs, and each bad input with its exit code, sentence and clean folder."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import sensilora
from sensilora import _files, doctor
from sensilora.adapters import load_adapter
from sensilora.cli import app, main
from sensilora.data import read_rows
from sensilora.integrations.transformers import classification_batches, load_sequence_classifier, load_tokenizer
from sensilora.plan import RankPlan
from sensilora.sensitivity import Diagonals
from sensilora.sensitivity.fisher import FisherEstimator
from sensilora.sensitivity.report import SensitivityReport
from tests import tiny_models

REPOSITORY = Path(__file__).parents[1]
COMMANDS = ["demo", "plan", "train", "evaluate", "compare", "export", "plot", "doctor"]


def run(*arguments):
    """Exit code of ``sensilora ARGUMENTS``."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code


def succeed(capsys, *arguments):
    """Standard output of a run that must succeed."""
    capsys.readouterr()
    code = run(*arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sensilora", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def content(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small lose time to threads that wait for each other, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models and data; the working folder of the module's tests is elsewhere."""
    folder = tmp_path_factory.mktemp("files")
    tiny_models.bert(folder / "bert")
    tiny_models.llama(folder / "llama")
    tiny_models.write_labelled(folder / "train.jsonl", 160)
    tiny_models.write_labelled(folder / "dev.jsonl", 40, seed=1)
    tiny_models.write_text(folder / "corpus.txt", 96)
    tiny_models.write_text(folder / "held_out.txt", 24, seed=1)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(files, tmp_path_factory):
    """Plan, report and adapter folder of the BERT classifier."""
    folder = tmp_path_factory.mktemp("classifier")
    plan, report, adapter = folder / "plan.json", folder / "report.json", folder / "adapter"
    budget = ("--average-rank", 4, "--samples", 64)
    assert run("plan", files / "bert", files / "train.jsonl", *budget, "--output", plan, "--report", report) == 0
    how = ("--epochs", 30, "--lr", "1e-2", "--eval-data", files / "dev.jsonl")
    assert run("train", files / "bert", plan, files / "train.jsonl", *how, "--output", adapter) == 0
    return {"plan": plan, "report": report, "adapter": adapter}


@pytest.fixture(scope="module")
def causal(files, tmp_path_factory):
    """Plan and adapter folder of the Llama; a Fisher plan in which some matrices have rank 0."""
    folder = tmp_path_factory.mktemp("causal")
    plan, adapter = folder / "plan.json", folder / "adapter"
    budget = ("--total-rank", 16, "--min-rank", 0, "--estimator", "fisher", "--tie", "qkv")
    assert run("plan", files / "llama", files / "corpus.txt", *budget, "--output", plan) == 0
    how = ("--epochs", 6, "--lr", "2e-2", "--dropout", 0.1, "--eval-data", files / "held_out.txt")
    assert run("train", files / "llama", plan, files / "corpus.txt", *how, "--output", adapter) == 0
    return {"plan": plan, "adapter": adapter}


# Whole runs


def classifier_logits(model, files):
    tokenizer = load_tokenizer(files / "bert")
    batches = classification_batches(tokenizer, read_rows(files / "dev.jsonl"), labels=[0, 1])
    with torch.no_grad():
        return torch.cat([model.eval()(**batch).logits for batch in batches])


def causal_logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(2, 20).view(2, 9)).logits


def test_classification_plan(files, classifier):
    plan, report = RankPlan.load(classifier["plan"]), SensitivityReport.load(classifier["report"])
    assert len(plan.ranks) == 13
    assert sum(plan.ranks.values()) == 52
    assert len(set(plan.ranks.values())) > 1
    assert report.sequences == 64
    assert report.estimator == "activation"
    assert {name: entry.trace for name, entry in plan.matrices.items()} == {
        name: report[name].trace for name in report
    }


def test_classifier_learns_and_is_evaluated(files, classifier, work, capsys):
    log = json.loads((classifier["adapter"] / "training.json").read_text())
    assert log["labels"] == [0, 1]
    assert log["plan_hash"] == RankPlan.load(classifier["adapter"] / "plan.json").content_hash
    adapters = RankPlan.load(classifier["plan"]).parameters
    assert log["trainable_parameters"] == adapters + 2 * 32 + 2
    evaluations = [entry for entry in log["history"] if "accuracy" in entry]
    assert len(evaluations) == 30
    out = succeed(
        capsys, "evaluate", files / "bert", classifier["adapter"], files / "dev.jsonl", "--json", "figures.json"
    )
    figures = json.loads(Path("figures.json").read_text())
    assert figures["accuracy"] == evaluations[-1]["accuracy"] >= 0.85
    assert figures["macro_f1"] == pytest.approx(evaluations[-1]["macro_f1"])
    assert figures["loss"] == pytest.approx(evaluations[-1]["loss"], rel=1e-4)
    assert f"{figures['accuracy']:.4f}" in out
    assert "macro-f1" in out


def test_classification_exports_compute_the_same(files, classifier, work, capsys):
    adapter = classifier["adapter"]
    expected = classifier_logits(
        load_adapter(load_sequence_classifier(files / "bert", labels=["0", "1"]), adapter), files
    )
    folders = {"trained": adapter}
    for form in ("uniform", "peft", "merged"):
        succeed(capsys, "export", adapter, "--to", form, "--output", form)
        folders[form] = work / form
    merged = AutoModelForSequenceClassification.from_pretrained(folders.pop("merged"))
    assert merged.config.id2label == {0: "0", 1: "1"}
    torch.testing.assert_close(classifier_logits(merged, files), expected, rtol=1e-5, atol=1e-5)
    for folder in folders.values():
        base = AutoModelForSequenceClassification.from_pretrained(files / "bert", num_labels=2)
        model = PeftModel.from_pretrained(base, folder)
        torch.testing.assert_close(classifier_logits(model, files), expected, rtol=1e-5, atol=1e-5)


def test_causal_run(files, causal, work, capsys):
    plan = RankPlan.load(causal["plan"])
    assert 0 in plan.ranks.values()
    assert sum(plan.ranks.values()) <= 16
    for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        assert len({plan.ranks[f"{layer}.{name}_proj"] for name in "qkv"}) == 1
    history = json.loads((causal["adapter"] / "training.json").read_text())["history"]
    evaluations = [entry for entry in history if "perplexity" in entry]
    assert evaluations[-1]["perplexity"] < 0.7 * evaluations[0]["perplexity"]
    arguments = (files / "llama", causal["adapter"], files / "held_out.txt", "--json", "figures.json")
    out = succeed(capsys, "evaluate", *arguments)
    figures = json.loads(Path("figures.json").read_text())
    assert figures["perplexity"] == pytest.approx(evaluations[-1]["perplexity"], rel=1e-4)
    assert f"{figures['perplexity']:.4f}" in out


def test_causal_exports_compute_the_same(files, causal, work, capsys):
    folders = {"trained": causal["adapter"]}
    for form in ("uniform", "merged"):
        succeed(capsys, "export", causal["adapter"], "--to", form, "--output", form)
        folders[form] = work / form
    merged = AutoModelForCausalLM.from_pretrained(folders.pop("merged"))
    for folder in folders.values():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "llama"), folder)
        torch.testing.assert_close(causal_logits(model), causal_logits(merged), rtol=1e-5, atol=1e-5)
    # The plan's matrices of rank 0 are zeros there, since servers of one rank want every layer alike.
    targets = json.loads((work / "uniform" / "adapter_config.json").read_text())["target_modules"]
    assert set(targets) == set(RankPlan.load(causal["plan"]).ranks)


def test_exports_of_a_plan(files, causal, work, capsys):
    Path("axolotl.yml").write_text("base_model: llama\n")
    arguments = ("--axolotl-config", "axolotl.yml", "--output", "ranks.yml")
    succeed(capsys, "export", causal["plan"], "--to", "axolotl", *arguments)
    ranks = sorted(rank for rank in RankPlan.load(causal["plan"]).ranks.values() if rank)
    config = yaml.safe_load(Path("ranks.yml").read_text())
    assert config["base_model"] == "llama"
    assert sorted(config["lora_rank_pattern"].values()) == ranks
    assert run("export", causal["plan"], "--to", "axolotl", *arguments) == 2
    assert "ranks.yml exists already; pass --force" in one_sentence(capsys)
    succeed(capsys, "export", causal["plan"], "--to", "blank-adapter", "--dropout", 0.1, "--output", "blank")
    blank = json.loads(Path("blank/adapter_config.json").read_text())
    assert sorted(blank["rank_pattern"].values()) == ranks
    assert blank["lora_dropout"] == 0.1
    assert blank["task_type"] == "CAUSAL_LM"
    kind = ("--task-type", "SEQ_CLS", "--output", "blank-classifier")
    succeed(capsys, "export", causal["plan"], "--to", "blank-adapter", *kind)
    assert json.loads(Path("blank-classifier/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    for form in ("axolotl", "blank-adapter"):
        assert run("export", causal["adapter"], "--to", form, "--output", "x") == 2
        assert "is a folder; name the plan's JSON file" in one_sentence(capsys)
    assert not Path("x").exists()


def test_an_exported_classifier_knows_its_classes(files, work, capsys):
    tiny_models.write_labelled(work / "named.jsonl", 40, names=("bad", "good"))
    succeed(capsys, "plan", files / "bert", "named.jsonl", "--average-rank", 2)
    succeed(capsys, "train", files / "bert", "plan.json", "named.jsonl", "--epochs", 1)
    expected = succeed(capsys, "evaluate", files / "bert", "adapter", "named.jsonl").splitlines()[1:]
    for form in ("peft", "uniform"):
        succeed(capsys, "export", "adapter", "--to", form, "--output", form)
        assert succeed(capsys, "evaluate", files / "bert", form, "named.jsonl").splitlines()[1:] == expected


def test_an_output_that_has_no_place_is_told_at_once(files, work, capsys):
    Path("file").touch()
    assert run("plan", "nowhere", "missing.jsonl", "--average-rank", 2, "--output", "file/plan.json") == 2
    assert f"output file/plan.json cannot be written: {work / 'file'} is a file" in one_sentence(capsys)
    if os.geteuid() != 0:  # who may write anywhere
        Path("locked").mkdir(mode=0o500)
        assert run("plan", "nowhere", "missing.jsonl", "--average-rank", 2, "--output", "locked/plan.json") == 2
        assert "locked may not be written into" in one_sentence(capsys)


def test_what_was_written_before_a_failure_is_told(files, work, capsys, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(RankPlan, "plot", full)
    arguments = ("--average-rank", 2, "--report", "report.json", "--plot", "ranks.png")
    assert run("plan", files / "bert", files / "train.jsonl", *arguments) == 2
    err = capsys.readouterr().err
    assert "wrote report.json, plan.json before what follows\nerror: no space is left on the disk" in err
    assert RankPlan.load("plan.json").ranks


def test_inputs_that_may_be_written_again(files, work, capsys):
    budget = ("--average-rank", 2, "--report", "report.json")
    succeed(capsys, "plan", files / "bert", files / "train.jsonl", *budget)
    succeed(capsys, "plan", files / "bert", files / "train.jsonl", *budget, "--compare", "report.json", "--force")
    succeed(capsys, "train", files / "bert", "plan.json", files / "train.jsonl", "--epochs", 0.1)
    again = ("--epochs", 0.1, "--output", "adapter", "--force")
    succeed(capsys, "train", files / "bert", "adapter/plan.json", files / "train.jsonl", *again)
    assert RankPlan.load("adapter/plan.json") == RankPlan.load("plan.json")


def test_rows_without_labels_that_do_not_count_are_told(files, classifier, work, capsys):
    lines = (files / "train.jsonl").read_text().splitlines()[:8]
    Path("some.jsonl").write_text("\n".join([*lines, '{"text": "the film"}']) + "\n")
    assert run("evaluate", files / "bert", classifier["adapter"], "some.jsonl") == 0
    captured = capsys.readouterr()
    assert "warning: some.jsonl: 1 of 9 rows have no label, and do not count" in captured.err


def test_same_seed_same_plan_and_adapter(files, work, capsys):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        budget = ("--average-rank", 2, "--samples", 24, "--seed", seed)
        succeed(capsys, "plan", files / "bert", files / "train.jsonl", *budget, "--output", f"{name}.json")
        how = ("--epochs", 1, "--dropout", 0.2, "--seed", seed, "--output", name)
        succeed(capsys, "train", files / "bert", "a.json", files / "dev.jsonl", *how)
    tensors = {name: load_file(work / name / "adapter_model.safetensors") for name in "abc"}
    assert (work / "a.json").read_bytes() == (work / "b.json").read_bytes() != (work / "c.json").read_bytes()
    assert all(torch.equal(tensor, tensors["b"][name]) for name, tensor in tensors["a"].items())
    assert not all(torch.equal(tensor, tensors["c"][name]) for name, tensor in tensors["a"].items())


def test_labels_by_name_keep_the_order_of_the_models_classes(files, work, capsys):
    """A model that knows its classes by name gets the rows' labels in its own order, not in the alphabet's."""
    model = load_sequence_classifier(files / "bert", labels=["good", "bad"])
    tiny_models.save(model, work / "model", bert=True)
    data = tiny_models.write_labelled(work / "data.jsonl", 20, names=("bad", "good"))
    capsys.readouterr()
    succeed(capsys, "plan", "model", data, "--average-rank", 2)
    succeed(capsys, "train", "model", "plan.json", data, "--epochs", 1)
    assert json.loads((work / "adapter" / "training.json").read_text())["labels"] == ["good", "bad"]


def test_plan_is_compared_with_an_earlier_report(files, classifier, work, capsys):
    planned = ("plan", files / "bert", files / "train.jsonl", "--average-rank", 4, "--samples", 64, "--force")
    out = succeed(capsys, *planned, "--compare", classifier["report"])
    assert "matrices in both reports: 13" in out
    assert re.findall(r"(trace|fused score) +│ +([\d.]+) │ +([\d.]+)", out) == [
        ("trace", "1.000", "1.000"),
        ("fused score", "1.000", "1.000"),
    ]
    assert content(work) == {"plan.json"}
    # The earlier report is read before the new one takes its place.
    Path("report.json").write_bytes(classifier["report"].read_bytes())
    fisher = ("--estimator", "fisher", "--head-warmup-steps", 3, "--targets", "query,key,value", "--weights", "equal")
    out = succeed(capsys, *planned, *fisher, "--report", "report.json", "--compare", "report.json")
    assert "matrices in both reports: 6, only in this one (here): 0, only in the other (there): 7" in out
    comparison = SensitivityReport.load("report.json").compare(
        SensitivityReport.load(classifier["report"]), weights="equal"
    )
    for line in str(comparison).splitlines():
        assert line in out


def test_plan_by_the_inverse_of_the_autocorrelation(files, classifier, work, capsys):
    planned = ("plan", files / "bert", files / "train.jsonl", "--average-rank", 4, "--report", "r.json")
    succeed(capsys, *planned, "--variant", "inverse", "--block-size", 5, "--damping", 0.1)
    report = SensitivityReport.load("r.json")
    assert (report.variant, report.block_size, report.damping) == ("inverse", 5, 0.1)
    assert run(*planned, "--force", "--variant", "inverse", "--damping", 2) == 2
    assert "damping must be in (0, 1], not 2" in capsys.readouterr().err


def test_plan_by_probes_of_the_hessian(files, work, capsys):
    planned = ("plan", files / "llama", files / "corpus.txt", "--average-rank", 2, "--samples", 8, "--force")
    probing = ("--estimator", "hutchinson", "--targets", "q_proj,down_proj")
    chosen = ("--probes", 5, "--min-probes", 3, "--tolerance", 0, "--hvp", "central_differences")
    succeed(capsys, *planned, *probing, *chosen, "--report", "r.json")
    report, plan = SensitivityReport.load("r.json"), RankPlan.load("plan.json")
    assert (report.estimator, report.hvp) == ("hutchinson", "central_differences")
    assert (report.probes, report.min_probes, report.tolerance) == (5, 3, 0)
    assert all(report[name].probes.count == 5 for name in report)
    assert (plan.calibration.estimator, sum(plan.ranks.values())) == ("hutchinson", 8)
    succeed(capsys, *planned, *probing, "--probes", 4, "--tolerance", 0)
    assert RankPlan.load("plan.json").calibration.min_probes == 4
    assert run(*planned, *probing, "--probes", 4, "--min-probes", 8) == 2
    assert "min_probes=8: it must be at least 2 and at most probes=4" in capsys.readouterr().err
    assert run(*planned, *probing, "--labels", "model") == 2
    assert "use 'fisher' for labels='model'" in capsys.readouterr().err


def test_plan_of_a_mixture_of_experts(files, work, capsys):
    torch.manual_seed(1)
    options = {"vocab_size": 24, "num_local_experts": 4, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": None}
    tiny_models.save(tiny_models.family_model("MixtralForCausalLM", **options), work / "mixtral", bert=False)
    options = ("--experts", "--min-expert-tokens", 4, "--estimator", "fisher", "--mode", "per_loss_term")
    succeed(
        capsys,
        "plan",
        "mixtral",
        files / "corpus.txt",
        "--average-rank",
        2,
        "--samples",
        8,
        "--report",
        "r.json",
        *options,
    )
    report, plan = SensitivityReport.load("r.json"), RankPlan.load("plan.json")
    experts = [name for name in report if report[name].expert_of]
    assert (len(experts), report.mode, report.min_expert_tokens) == (16, "per_loss_term", 4)
    assert list(plan.ranks) == [name for name in report if name not in experts]


def test_plot_and_edited_plan(classifier, work, capsys):
    succeed(capsys, "plot", classifier["plan"])
    assert Path("ranks.png").read_bytes().startswith(b"\x89PNG")
    text = classifier["plan"].read_text()
    name, rank = next(iter(RankPlan.load(classifier["plan"]).ranks.items()))
    start, rest = text.split(f'"{name}"', 1)
    Path("edited.json").write_text(start + f'"{name}"' + rest.replace(f'"rank": {rank}', f'"rank": {rank + 1}', 1))
    assert run("plot", "edited.json", "--output", "edited.svg") == 2
    assert "--allow-edited" in capsys.readouterr().err
    succeed(capsys, "plot", "edited.json", "--output", "edited.svg", "--allow-edited")
    assert "<svg" in Path("edited.svg").read_text()


@pytest.mark.gpu
def test_gpu_run(files, work, capsys):
    for model, data in (("bert", "train.jsonl"), ("llama", "corpus.txt")):
        options = ("--average-rank", 4, "--estimator", "fisher", "--device", "cuda", "--force")
        succeed(capsys, "plan", files / model, files / data, *options)
        succeed(
            capsys, "train", files / model, "plan.json", files / data, "--epochs", 2, "--device", "cuda", "--force"
        )
        succeed(capsys, "evaluate", files / model, "adapter", files / data, "--device", "cuda")
        assert json.loads((work / "adapter" / "training.json").read_text())["settings"]["device"] == "cuda:0"


# Configuration, help, doctor


def test_config_gives_values_and_flags_win(files, work, capsys):
    values = {
        "model": str(files / "bert"),
        "data": str(files / "dev.jsonl"),
        "average-rank": 3,
        "min_rank": 2,
        "samples": 16,
        "output": "from-config.json",
        "targets": "query,key,value",
        "tie": [["query", "key"]],
        "max-rank": None,
    }
    Path("plan.yaml").write_text(yaml.safe_dump(values))
    succeed(capsys, "plan", "--config", "plan.yaml")
    plan = RankPlan.load("from-config.json")
    assert len(plan.ranks) == 6
    assert plan.budget.value == 3
    assert plan.allocation.min_rank == 2
    assert plan.allocation.tie == (("query", "key"),)
    succeed(capsys, "plan", "--average-rank", 5, "--output", "flag.json", "--config", "plan.yaml")
    plan = RankPlan.load("flag.json")
    assert plan.budget.value == 5
    assert plan.allocation.min_rank == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("averge-rank: 3", "has the unknown key 'averge-rank'; known are "),
        ("config: other.yaml", "has the unknown key 'config'"),
        ("average-rank: [1, 2]", "average-rank must be a single value"),
        ("average-rank: many", "'--average-rank'"),
        ("estimator: psychic", "'psychic' is not one of"),
        ("- average-rank", "must hold 'name: value' lines"),
        ("average-rank: [3", "is not YAML"),
    ],
)
def test_bad_config(files, work, capsys, text, message):
    Path("plan.yaml").write_text(text)
    assert run("plan", files / "bert", files / "dev.jsonl", "--config", "plan.yaml") == 2
    assert message in one_sentence(capsys)
    assert content(work) == {"plan.yaml"}


def test_missing_config(files, work, capsys):
    assert run("plan", files / "bert", files / "dev.jsonl", "--config", "none.yaml") == 2
    assert "none.yaml: No such file" in one_sentence(capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    out = succeed(capsys, command, "--help")
    assert "Examples:" in out
    assert f"    sensilora {command}" in out


def test_help_lists_every_command(capsys):
    out = succeed(capsys)
    assert [command.callback.__name__ for command in app.registered_commands] == COMMANDS
    assert all(f"  {command} " in out for command in COMMANDS)
    assert succeed(capsys, "--version") == f"sensilora {sensilora.__version__}\n"


def test_help_loads_nothing_heavy():
    code = (
        "import sys, pytest\n"
        "from sensilora.cli import main\n"
        "with pytest.raises(SystemExit): main(['plan', '--help'])\n"
        "heavy = {'transformers', 'peft', 'matplotlib', 'accelerate', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def test_doctor(capsys):
    found = json.loads(succeed(capsys, "doctor", "--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["type"] == "cpu"
    assert {"autocorrelation_diag", "fisher_diag", "diagonal_metrics", "lora_linear"} <= found["ops"].keys()
    for by_device in found["ops"].values():
        service = by_device["cpu"]
        assert service["backend"] == ("native" if found["native"]["built"] else "torch")
        assert service["why_not"].keys() == {"triton", "native", "torch"} - {service["backend"]}
    out = succeed(capsys, "doctor")
    assert "lora_linear" in out
    assert torch.__version__ in out


def test_doctor_tells_which_calls_go_past_the_first_backend():
    others = ("native", "triton", "cuda", None)
    taken, passed = (doctor._passed_over(op, *others) for op in ("fisher_diag", "rademacher"))
    assert taken == "it takes 16-bit rows per sequence on Hopper; for others triton comes first"
    assert passed == "it could serve, but triton comes first"


def test_demo_says_before_it_starts_that_it_needs_matplotlib(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("demo", "--model", "does-not-exist") == 2
    assert "pip install 'sensilora[plots]'" in capsys.readouterr().err


def test_doctor_tells_of_a_forced_backend(capsys, monkeypatch):
    monkeypatch.setenv("SENSILORA_BACKEND", "torch")
    found = json.loads(succeed(capsys, "doctor", "--json"))
    assert found["forced_backend"] == "torch"
    assert found["ops"]["lora_linear"]["cpu"]["backend"] == "torch"
    monkeypatch.setenv("SENSILORA_BACKEND", "quantum")
    assert run("doctor") == 2
    assert "SENSILORA_BACKEND got 'quantum'" in one_sentence(capsys)


# Bad input


def one_sentence(capsys):
    """What was said on standard error, which must be one error line and no traceback."""
    err = capsys.readouterr().err
    lines = [line for line in re.split("[\r\n]", err) if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "{bert}", "missing.jsonl", "--average-rank", 4), "missing.jsonl does not exist"),
        (("plan", "./nowhere", "{train}", "--average-rank", 4), "model folder ./nowhere does not exist"),
        (
            ("plan", "{bert}", "{train}"),
            "give exactly one of --average-rank, --total-rank and --total-parameters, not none",
        ),
        (("plan", "{bert}", "{train}", "--average-rank", 4, "--total-rank", 9), "give exactly one of"),
        (("plan", "nowhere", "{train}", "--average-rank", 0), "--average-rank must be a number above 0, not 0"),
        (("plan", "nowhere", "{train}", "--average-rank", "nan"), "--average-rank must be a number above 0, not nan"),
        (("plan", "{bert}", "{train}", "--average-rank", 4, "-o", "{train}", "--force"), "would replace"),
        (("plan", "{bert}", "{train}", "--average-rank", 4, "-o", "{bert_config}", "--force"), "would replace"),
        (("plan", "{bert}"), "Missing argument 'DATA' (see sensilora plan --help)"),
        (("plan", "{bert}", "{train}", "--avrage-rank", 4), "No such option"),
        (("plan", "{bert}", "{train}", "--samples", -1), "'--samples'"),
        (("plan", "{bert}", "{train}", "--estimator", "x"), "'x' is not one of"),
        (("plna",), "No such command 'plna'"),
        (("plan", "{bert}", "{train}", "--total-rank", 12), "12"),
        (("plan", "{bert}", "{train}", "--average-rank", 33), "429"),
        (
            ("plan", "{bert}", "{train}", "--average-rank", 4, "--targets", "q_proj,v_proj"),
            "target 'q_proj' matches no",
        ),
        (("plan", "{bert}", "{train}", "--average-rank", 4, "--targets", "(.*x"), "not a valid regular expression"),
        (("plan", "{bert}", "{train}", "--average-rank", 4, "--tie", "abc"), "abc"),
        (("plan", "{bert}", "{train}", "--average-rank", 4, "--text-field", "body"), "line 1: no field 'body'"),
        (("plan", "{bert}", "{train}", "--average-rank", 4, "--label-field", "class"), "line 1: no field 'class'"),
        (("plan", "{bert}", "{train}", "--average-rank", 4, "--task", "causal"), "is a bidirectional encoder"),
        (("plan", "{llama}", "{corpus}", "--average-rank", 4, "--head-warmup-steps", 5), "head_warmup_steps=5"),
        (("plan", "{bert}", "{train}", "--average-rank", 4, "--plot", "ranks.bmp"), "ranks.bmp must end in .png"),
        (("plan", "{bert}", "{train}", "--average-rank", 4, "--compare", "none.json"), "none.json: No such file"),
        (("plan", "{bert}", "{train}", "--average-rank", 4, "--compare", "{plan}"), "sensitivity report"),
        (("plan", "{llama}", "{corpus}", "--average-rank", 4, "--compare", "{report}"), "are of different models"),
        (
            ("plan", "{bert}", "{corpus}", "--average-rank", 4, "--task", "classification", "--estimator", "fisher"),
            "label",
        ),
        (("train", "{bert}", "missing.json", "{train}"), "missing.json: No such file"),
        (("train", "{bert}", "{plan}", "{train}", "--epochs", 0), "must be finite numbers above 0"),
        (("train", "{bert}", "{plan}", "{train}", "--eval-data", "none.jsonl"), "none.jsonl does not exist"),
        (("train", "{llama}", "{plan}", "{corpus}"), "the plan is for"),
        (("train", "{bert}", "{plan}", "{corpus}", "--task", "classification"), "96 of 96 rows have no label"),
        (("evaluate", "{bert}", "nowhere", "{train}"), "nowhere/adapter_config.json does not exist"),
        (("evaluate", "{llama}", "{adapter}", "{train}"), "which does not fit this model"),
        (
            ("train", "{bert}", "{plan}", "{train}", "--eval-data", "{corpus}"),
            "corpus.txt: no row has a label",
        ),
        (("train", "{bert}", "{plan}", "{train}", "--output", "{bert}", "--force"), "would replace"),
        (("evaluate", "{bert}", "{adapter}", "{corpus}"), "corpus.txt: no row has a label to compare with"),
        (("evaluate", "{bert}", "{adapter}", "{train}", "--json", "{train}", "--force"), "would replace"),
        (("export", "{adapter}", "--to", "peft", "--output", "{adapter}", "--force"), "would replace"),
        (("export", "{adapter}", "--to", "merged", "--output", "{bert}", "--force"), "would replace"),
        (("export", "{adapter}", "--to", "peft", "-o", "x", "--task-type", "SEQ_CLS"), "is for --to blank-adapter"),
        (("export", "{adapter}", "--to", "pickle", "--output", "x"), "'pickle' is not one of"),
        (("export", "{adapter}", "--to", "merged"), "Missing option '--output'"),
        (("export", "nowhere", "--to", "uniform", "--output", "x"), "nowhere/adapter_config.json does not exist"),
        (("plot", "missing.json"), "missing.json: No such file"),
        (("plot", "{plan}", "--output", "ranks.bmp"), "ranks.bmp must end in .png"),
    ],
)
def test_bad_input(files, classifier, work, capsys, arguments, message):
    names = {
        "{bert}": files / "bert",
        "{bert_config}": files / "bert" / "config.json",
        "{llama}": files / "llama",
        "{train}": files / "train.jsonl",
        "{corpus}": files / "corpus.txt",
        **{f"{{{name}}}": path for name, path in classifier.items()},
    }
    assert run(*(names.get(argument, argument) for argument in arguments)) == 2
    assert message in one_sentence(capsys)
    assert content(work) == set()


def test_bad_data_file(files, work, capsys):
    Path("empty.jsonl").touch()
    Path("broken.jsonl").write_text('{"text": "good film", "label": 1}\n{"text": "bad')
    Path("partly.jsonl").write_text('{"text": "good film", "label": 1}\n{"text": "bad film"}\n')
    for name, message in (
        ("empty.jsonl", "empty.jsonl is empty"),
        ("broken.jsonl", "broken.jsonl, line 2: not JSON"),
        ("partly.jsonl", "1 of 2 rows have no label"),
    ):
        assert run("plan", files / "bert", name, "--average-rank", 4) == 2
        assert message in one_sentence(capsys)
    assert content(work) == {"empty.jsonl", "broken.jsonl", "partly.jsonl"}


def test_weights_that_are_not_finite_are_told_before_training(files, classifier, work, capsys):
    shutil.copytree(files / "bert", "bert")
    weights = load_file("bert/model.safetensors")
    name = next(name for name in weights if name.endswith("output.dense.weight"))
    weights[name][0, 0] = float("nan")
    _files.write_tensors("bert/model.safetensors", weights)
    before = content(work)
    assert run("train", "bert", classifier["plan"], files / "train.jsonl", "--eval-data", files / "dev.jsonl") == 2
    assert f"{name} of the model holds NaN or Inf" in one_sentence(capsys)
    assert content(work) == before


def test_damaged_plan_and_adapter(files, classifier, work, capsys):
    text = classifier["plan"].read_text()
    truncated, edited = Path("truncated.json"), Path("edited.json")
    truncated.write_text(text[: len(text) // 2])
    name = next(iter(RankPlan.load(classifier["plan"]).ranks))
    head, rest = text.split(f'"{name}"', 1)
    edited.write_text(head + f'"{name}"' + rest.replace('"rank": ', '"rank": 9', 1))
    for path, message in ((truncated, "truncated.json is not complete JSON"), (edited, "above min(")):
        for flags in ((), ("--allow-edited",)):
            assert run("train", files / "bert", path, files / "train.jsonl", *flags) == 2
            assert message in one_sentence(capsys)
    adapter = Path("adapter")
    adapter.mkdir()
    for file in classifier["adapter"].iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    before = content(work)
    for arguments in (
        ("evaluate", files / "bert", adapter, files / "dev.jsonl"),
        ("export", adapter, "--to", "merged", "--output", "x"),
        ("export", adapter, "--to", "uniform", "--output", "x"),
    ):
        assert run(*arguments) == 2
        assert "adapter_model.safetensors is damaged" in one_sentence(capsys)
    assert content(work) == before


def test_existing_outputs_are_kept_without_force(files, classifier, work, capsys):
    (work / "out").mkdir()
    (work / "out" / "mine.txt").write_text("mine")
    (work / "file").write_text("mine")
    adapter, plan = classifier["adapter"], classifier["plan"]
    planned = ("plan", files / "bert", files / "train.jsonl", "--average-rank", 4)
    for arguments in (
        (*planned, "--output", "file"),
        (*planned, "--report", "file"),
        (*planned, "--plot", "out"),
        ("train", files / "bert", plan, files / "train.jsonl", "--output", "out"),
        ("evaluate", files / "bert", adapter, files / "dev.jsonl", "--json", "file"),
        ("export", adapter, "--to", "peft", "--output", "out"),
        ("export", adapter, "--to", "merged", "--output", "file"),
    ):
        assert run(*arguments) == 2
        sentence = one_sentence(capsys)
        assert "exists already; pass --force" in sentence or "is a f" in sentence
        assert content(work) == {"file", "out", "out/mine.txt"}
    assert (work / "file").read_text() == (work / "out" / "mine.txt").read_text() == "mine"
    assert run("export", adapter, "--to", "peft", "--output", "out", "--force") == 2
    assert "did not write" in one_sentence(capsys)
    assert (work / "out" / "mine.txt").read_text() == "mine"
    for force in ((), ("--force",)):
        succeed(capsys, "export", adapter, "--to", "peft", "--output", "ours", *force)
    succeed(capsys, *planned, "--output", "file", "--force")
    assert RankPlan.load("file")


def test_new_head_under_fisher_warns(files, work, capsys):
    options = ("--average-rank", 4, "--estimator", "fisher", "--samples", 16)
    assert run("plan", files / "bert", files / "train.jsonl", *options) == 0
    err = capsys.readouterr().err
    assert "warning: the head 'classifier' looks newly initialised" in err
    assert run("plan", files / "bert", files / "train.jsonl", *options, "--head-warmup-steps", 3, "--force") == 0
    assert "warning" not in capsys.readouterr().err


def test_plan_under_a_memory_budget_keeps_its_diagonals(files, work, capsys):
    planned = ("plan", files / "llama", files / "corpus.txt", "--average-rank", 4, "--estimator", "fisher")
    planned += ("--samples", 16, "--max-length", 16, "--batch-size", 4, "--report", "report.json")
    succeed(capsys, *planned)
    whole, plan = SensitivityReport.load("report.json"), Path("plan.json").read_text()
    assert run(*planned, "--memory-budget", "50MB", "--keep-diagonals", "kept", "--force") == 0
    captured = capsys.readouterr()
    assert "memory_budget 50 MB: one pass over the calibration data" in captured.err
    assert captured.out.rstrip().endswith("wrote plan.json, report.json, kept")
    budget = max(4 * whole.diagonal_size(name) for name in whole)
    kept = ("--memory-budget", budget, "--keep-diagonals", "kept")
    Path("plan.json").unlink()
    Path("report.json").unlink()
    assert run(*planned, *kept) == 2
    assert one_sentence(capsys) == "error: output folder kept exists already; pass --force to overwrite it"
    succeed(capsys, *planned, *kept, "--force")
    swept = SensitivityReport.load("report.json")
    assert len(swept.passes) > 1
    assert swept.matrices == whole.matrices
    assert Path("plan.json").read_text() == plan
    assert list(Diagonals("kept")) == list(whole)
    assert run(*planned, "--memory-budget", "much", "--force") == 2
    assert "--memory-budget='much' is no size" in one_sentence(capsys)


def test_plan_goes_on_after_ctrl_c(files, work, capsys, monkeypatch):
    planned = ("plan", files / "bert", files / "train.jsonl", "--average-rank", 4, "--samples", 24, "--batch-size", 4)
    planned += ("--estimator", "fisher", "--head-warmup-steps", 2)
    succeed(capsys, *planned, "--output", "whole.json")
    observe, seen = FisherEstimator.observe, []

    def interrupted(self, batch):
        seen.append(batch)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        observe(self, batch)

    monkeypatch.setattr(FisherEstimator, "observe", interrupted)
    assert run(*planned, "--checkpoint", "state") == 130
    assert capsys.readouterr().err.endswith("interrupted; run the same command again to go on from state\n")
    assert content(work) == {"whole.json", "state", "state/calibration.json", "state/sums-2.safetensors"}
    succeed(capsys, *planned, "--checkpoint", "state")
    assert len(seen) == 6
    assert content(work) == {"whole.json", "plan.json"}
    whole, plan = RankPlan.load("whole.json"), RankPlan.load("plan.json")
    assert plan.ranks == whole.ranks


@pytest.mark.parametrize("command", ["plan", "train", "export"])
def test_full_disk(files, classifier, work, capsys, monkeypatch, command):
    arguments = {
        "plan": ("plan", files / "bert", files / "dev.jsonl", "--average-rank", 4, "--report", "report.json"),
        "train": ("train", files / "bert", classifier["plan"], files / "dev.jsonl", "--epochs", 1),
        "export": ("export", classifier["adapter"], "--to", "uniform", "--output", "x"),
    }[command]

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_files.os, "fsync", full)
    assert run(*arguments) == 2
    assert "no space is left on the disk" in one_sentence(capsys)
    assert content(work) == set()


def test_full_disk_under_a_merged_export(classifier, work, capsys):
    """Writes that really fail: the process may not write files above 4 kB."""
    limit = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from sensilora.cli import main; main(sys.argv[1:])"
    )
    arguments = ["export", classifier["adapter"], "--to", "merged", "--output", "merged"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", limit, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert content(work) == set()


def test_ctrl_c_during_training_removes_everything(files, classifier, work):
    arguments = ("train", files / "bert", classifier["plan"], files / "train.jsonl", "--epochs", 2000)
    process = start(*arguments, cwd=work)
    seen = b""
    deadline = time.monotonic() + 60
    while b"loss=" not in seen:
        assert time.monotonic() < deadline, seen
        assert process.poll() is None, seen
        seen += process.stderr.read1()
    # Training is under way, in a folder that has not its name yet.
    assert any(name.endswith(".part") for name in content(work)), seen
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert rest.rstrip().endswith(b"interrupted; nothing half-written remains")
    assert b"Traceback" not in rest
    assert content(work) == set()


@pytest.mark.parametrize("module", ["torch", "typer"])
@pytest.mark.parametrize("way", ["program", "module"])
def test_ctrl_c_while_modules_are_imported(work, module, way):
    Path(f"{module}.py").write_text("raise KeyboardInterrupt")
    # As pip writes it from pyproject.toml.
    project = (REPOSITORY / "pyproject.toml").read_text()
    target, function = re.search(r'^sensilora = "(.+):(.+)"$', project, re.MULTILINE).groups()
    Path("sensilora").write_text(f"import sys\nfrom {target} import {function}\nsys.exit({function}())\n")
    command = ["-m", "sensilora"] if way == "module" else ["sensilora"]
    done = subprocess.run(
        [sys.executable, *command, "doctor"],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_while_a_caller_imports_the_package_is_the_callers(work):
    Path("torch.py").write_text("raise KeyboardInterrupt")
    code = "try:\n    import sensilora\nexcept KeyboardInterrupt:\n    print('mine')\n"
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}."}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\n", "")


def test_a_bug_keeps_its_traceback(files, classifier, work, monkeypatch):
    monkeypatch.setattr(RankPlan, "plot", lambda plan, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["plot", str(classifier["plan"])])


def test_the_documentation_knows_every_flag_and_no_other():
    text = "".join((REPOSITORY / "docs" / page).read_text() for page in ("cli.md", "compare.md"))
    text = re.sub(r"`python -m benchmarks\.[^`]*`", "", text)  # commands of the benchmarks have flags of their own
    group = typer.main.get_command(app)
    flags = {
        name
        for command in group.commands.values()
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("--")
    }
    assert set(re.findall(r"--[a-z][a-z-]+", text)) == flags | {"--help"}
