"""Diagonals on disk: what was reduced is what is read back, one at a time, in files of a bounded size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sensilora import ops
from sensilora.errors import CalibrationError, OutputExistsError, ReportError
from sensilora.sensitivity import Diagonals, calibrate
from sensilora.sensitivity import diagonals as on_disk
from sensilora.sensitivity.diagonals import INDEX_FILE, DiagonalWriter
from tests.sensitivity.oracles import Net, classification_batch, diagonals, sequences

ESTIMATORS = (
    {"estimator": "activation"},
    {"estimator": "activation", "variant": "inverse", "block_size": 4},
    {"estimator": "fisher"},
    {"estimator": "fisher", "memory_budget": 600},
    {"estimator": "hutchinson", "probes": 2, "min_probes": 2},
)
every_estimator = pytest.mark.parametrize(
    "arguments", ESTIMATORS, ids=lambda options: "-".join(map(str, options.values()))
)
# Bytes of the diagonals of a block of Net in order: query, key, value, up, down.
BLOCK = [144, 144, 144, 288, 288]


def data():
    return [classification_batch(sequences(4, 2), [0, 1]), classification_batch(sequences(3, seed=1), [2])]


def content(folder):
    return sorted(path.name for path in folder.iterdir())


@every_estimator
def test_what_was_reduced_is_read_back(tmp_path, arguments):
    report, expected = diagonals(Net(), data(), **arguments, keep_diagonals=tmp_path / "kept", max_shard_size=500)
    found = Diagonals(tmp_path / "kept")
    assert list(found) == list(report)
    assert len(found) == 10
    for name, diagonal in found.items():
        assert diagonal.dtype == torch.float32
        assert torch.equal(diagonal, expected[name])
        metrics = ops.diagonal_metrics(diagonal, k=report.k, alpha=report.alpha)
        assert (float(metrics.trace), int(metrics.effective_rank)) == (
            report[name].trace,
            report[name].effective_rank,
        )


def test_keeping_changes_no_bit_of_the_report(tmp_path):
    model = Net()
    kept = calibrate(model, data(), estimator="fisher", keep_diagonals=tmp_path / "kept", progress=False)
    assert kept == calibrate(model, data(), estimator="fisher", progress=False)


def test_the_files_are_as_safetensors_shards_are(tmp_path):
    """Any reader of sharded safetensors can read them."""
    report = calibrate(Net(), data(), estimator="fisher", keep_diagonals=tmp_path, max_shard_size=500, progress=False)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 2 * sum(BLOCK)}
    assert list(index["weight_map"]) == list(report)
    assert sorted({*index["weight_map"].values(), INDEX_FILE}) == content(tmp_path)
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / file)
        assert set(tensors) == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(4 * tensor.numel() for tensor in tensors.values()) <= 500
    # Finished from the loss back: down and (above 500 together) up, value, key, query, ...
    assert index["weight_map"]["blocks.1.down"] == "diagonals-00001.safetensors"


def test_no_more_than_a_file_is_in_memory(tmp_path, monkeypatch):
    held, add = [], DiagonalWriter.add

    def watch(self, name, diagonal):
        add(self, name, diagonal)
        held.append(sum(4 * tensor.numel() for tensor in self._pending.values()))

    monkeypatch.setattr(DiagonalWriter, "add", watch)
    calibrate(Net(), data(), estimator="fisher", keep_diagonals=tmp_path, max_shard_size=300, progress=False)
    assert max(held) <= 300
    assert len(held) == 10


def test_a_diagonal_above_the_size_has_its_own_file(tmp_path):
    calibrate(Net(), data(), estimator="fisher", keep_diagonals=tmp_path, max_shard_size=150, progress=False)
    assert len(content(tmp_path)) == 10 + 1
    assert Diagonals(tmp_path)["blocks.0.up"].shape == (12, 6)


def test_a_double_precision_model_is_kept_in_single(tmp_path):
    _, expected = diagonals(Net().double(), data(), estimator="fisher", keep_diagonals=tmp_path)
    assert all(torch.equal(found, expected[name].float()) for name, found in Diagonals(tmp_path).items())


def test_true_means_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calibrate(Net(), data(), keep_diagonals=True, progress=False)
    assert len(Diagonals("diagonals")) == 10
    calibrate(Net(), data(), keep_diagonals=False, progress=False)
    assert content(tmp_path) == ["diagonals"]


# ---------------------------------------------------------------------------------------------- what cannot be


def test_a_folder_with_other_things_stays_as_it_is(tmp_path):
    calibrate(Net(), data(), keep_diagonals=tmp_path / "kept", progress=False)
    before = content(tmp_path / "kept")
    with pytest.raises(OutputExistsError, match=r"kept, is not empty; name another"):
        calibrate(Net(), data(), keep_diagonals=tmp_path / "kept", progress=False)
    assert content(tmp_path / "kept") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"file, is a file; name a folder"):
        calibrate(Net(), data(), keep_diagonals=tmp_path / "file", progress=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_kill_left_is_replaced(tmp_path):
    (tmp_path / "diagonals-00001.safetensors").write_bytes(b"x")
    (tmp_path / "diagonals-00009.safetensors").write_bytes(b"x")
    (tmp_path / ".diagonals-00002.safetensors.abc.part").write_bytes(b"x")
    calibrate(Net(), data(), keep_diagonals=tmp_path, progress=False)
    assert content(tmp_path) == ["diagonals-00001.safetensors", INDEX_FILE]
    assert len(Diagonals(tmp_path)) == 10


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    flush, flushed = DiagonalWriter.flush, []

    def fail_at_the_third(self):
        flushed.append(self)
        if len(flushed) == 3:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(DiagonalWriter, "flush", fail_at_the_third)
    with pytest.raises(OSError, match="No space"):
        calibrate(
            Net(), data(), estimator="fisher", keep_diagonals=tmp_path / "kept", max_shard_size=150, progress=False
        )
    assert content(tmp_path) == []


def test_bad_sizes(tmp_path):
    with pytest.raises(CalibrationError, match="max_shard_size='5 TB' is no size"):
        calibrate(Net(), data(), keep_diagonals=tmp_path / "kept", max_shard_size="5 TB", progress=False)
    assert content(tmp_path) == []


# ---------------------------------------------------------------------------------------------- reading


@pytest.fixture
def kept(tmp_path):
    calibrate(Net(), data(), keep_diagonals=tmp_path, progress=False)
    return tmp_path


def test_a_folder_without_an_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=INDEX_FILE):
        Diagonals(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_a_damaged_index(kept, text):
    (kept / INDEX_FILE).write_text(text)
    with pytest.raises(ReportError, match=rf"{INDEX_FILE} is damaged; calibrate again"):
        Diagonals(kept)


def test_an_unknown_matrix(kept):
    with pytest.raises(KeyError, match="nowhere"):
        Diagonals(kept)["nowhere"]
    assert "nowhere" not in Diagonals(kept)


@pytest.mark.parametrize("damage", ["gone", "short", "other"])
def test_a_damaged_file(kept, damage):
    file = kept / "diagonals-00001.safetensors"
    if damage == "gone":
        file.unlink()
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        on_disk.write_tensors(file, {"blocks.0.key": torch.ones(2)})
    with pytest.raises(
        ReportError, match=r"diagonal of blocks\.0\.query cannot be read from .*00001\.safetensors \("
    ):
        Diagonals(kept)["blocks.0.query"]


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calibrate(Net(), data(), keep_diagonals="a/b", progress=False)
    assert Path("a/b", INDEX_FILE).exists()
    assert list(Diagonals("a/b"))[-1] == "blocks.1.down"
