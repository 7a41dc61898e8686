"""The benchmark of calibration at sizes for a CPU: every arm does what the others do, and real text is read right."""

import gzip
import json

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import bench_autocorrelation_blocks, bench_calibrate, run
from benchmarks.harness import Unavailable

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
SENTENCES = [f"To open jar number {n}, twist the lid{', and pull' * (n % 4)}." for n in range(150)]


@pytest.fixture
def piqa(tmp_path, monkeypatch):
    """Writes a data file and names it to the benchmark."""

    def write(name, content):
        path = tmp_path / name
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.write(content)
        monkeypatch.setenv("SENSILORA_PIQA", str(path))

    return write


def test_its_rows_are_run_on_a_gpu():
    rows = {f"model/llama8b/{name}" for name in ("activation", "activation_inverse", "fisher", "calibrate_piqa2000")}
    assert rows == set(bench_calibrate.cases("cuda")) <= set(run.all_cases("cuda"))
    rows = {f"cpu/minilm/fisher{lengths}" for lengths in ("", "/unsorted", "/n16_t32", "/n16_t64")}
    assert rows == set(bench_calibrate.cases("cpu")) <= set(run.all_cases("cpu"))


@pytest.mark.parametrize("variant", ["diagonal", "inverse"])
def test_activation(variant):
    case = bench_calibrate._activation_case("cpu", LLAMA, 2, 9, variant)
    assert max(case.errors()) <= case.tolerance
    case.ours()
    case.baseline()
    for peer in case.peers.values():
        peer()
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert case.floor_flops == 2 * 18 * weights


def test_activation_counts_no_padding():
    ids = torch.randint(50, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[4], [9], [1]])).long()
    errors = bench_calibrate._activation_errors(
        "cpu", LLAMA, [{"input_ids": ids, "attention_mask": mask}] * 2, "diagonal"
    )
    assert len(errors) == 14
    assert max(errors) <= 1e-6


def test_an_error_of_a_thousandth_is_found(monkeypatch):
    original = bench_calibrate.relative_error
    monkeypatch.setattr(bench_calibrate, "relative_error", lambda got, want: original(1.001 * got, want))
    case = bench_calibrate._activation_case("cpu", LLAMA, 2, 9, "diagonal")
    assert max(case.errors()) > case.tolerance


def test_fisher():
    case = bench_calibrate._fisher_case("cpu", LLAMA, 2, 9)
    errors, eager = case.errors(), case.eager_errors()
    assert max(errors) <= case.tolerance
    assert max(eager) <= case.tolerance
    case.ours()
    case.baseline()
    for peer in case.peers.values():
        peer()


def test_the_loop_and_the_estimator_agree_in_fp64():
    """The bf16 of the case itself would hide a missing factor near 1."""
    model = bench_calibrate._build("cpu", LLAMA).eval().double()
    ids = torch.randint(50, (3, 9))
    observe, matrices = bench_calibrate._observing(model, bench_calibrate._fisher)
    observe({"input_ids": ids, "labels": ids})
    for name, oracle in bench_calibrate._loop(model, ids).items():
        assert bench_calibrate.relative_error(matrices[name].diagonal, oracle) <= 1e-5


@pytest.mark.parametrize("name", ["tests.jsonl", "tests.jsonl.gz", "corpus.txt"])
def test_piqa(piqa, name):
    halves = [text.partition(" ") for text in SENTENCES]
    rows = [json.dumps({"goal": goal, "sol1": solution, "sol2": "", "label": -1}) for goal, _, solution in halves]
    piqa(name, "\n".join(["", *(rows if "json" in name else SENTENCES)]))
    batches = bench_calibrate.piqa_batches("cpu", 50, 130)
    assert [len(batch["input_ids"]) for batch in batches] == [64, 64, 2]
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert lengths.tolist() == sorted(lengths.tolist())
    assert sum(lengths.tolist()) == sum(len(bench_calibrate._tokens(text, 50)) for text in SENTENCES[:130])
    for batch in batches:
        assert torch.equal(batch["input_ids"] == 0, batch["attention_mask"] == 0)
        assert int(batch["input_ids"].max()) < 50
    case = bench_calibrate._piqa_case("cpu", LLAMA, 100)
    assert max(case.errors()) <= case.tolerance
    case.ours()
    case.baseline()


def test_no_piqa_is_told(piqa, monkeypatch, tmp_path):
    piqa("tests.jsonl", "")
    with pytest.raises(Unavailable, match="holds 0 sequences, not 10"):
        bench_calibrate.piqa_batches("cpu", 50, 10)
    monkeypatch.setenv("SENSILORA_PIQA", str(tmp_path / "absent.jsonl"))
    with pytest.raises(Unavailable, match=r"no PIQA at .*absent\.jsonl: set SENSILORA_PIQA"):
        bench_calibrate.piqa_batches("cpu", 50, 10)
    monkeypatch.delenv("SENSILORA_PIQA")
    monkeypatch.setattr(bench_calibrate, "ROOT", tmp_path / "checkout")
    with pytest.raises(Unavailable, match="no PIQA at"):
        bench_calibrate.piqa_batches("cpu", 50, 10)


def test_blocks():
    case = bench_autocorrelation_blocks._case("cpu", 30, 130)
    assert max(case.errors()) <= case.tolerance
    assert case.ours().shape == case.baseline().shape == (2, 128, 128)
    for peer in case.peers.values():
        peer()
