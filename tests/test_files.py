"""Writing files: whole or not at all."""

import errno
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save

from sensilora import _files
from sensilora.errors import OutputExistsError


def everything_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "a.json"
    _files.write_text(path, "one")
    _files.write_text(path, "two")
    assert path.read_text() == "two"
    assert everything_in(path.parent) == ["a.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "a.json"
    _files.write_text(path, "old")

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        _files.write_text(path, "new")
    assert path.read_text() == "old"
    assert everything_in(tmp_path) == ["a.json"]


def test_write_tensors_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    _files.write_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtypes", [[torch.float32], list(_files._SAFETENSORS_NAMES)], ids=["one", "all"])
def test_tensors_are_written_as_safetensors_writes_them(tmp_path, dtypes):
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), 'a "quoted" \\ näme': torch.ones(1)}
    for place, dtype in enumerate(dtypes):
        tensors[f"layer.{place}"] = torch.randint(0, 2, (3, place + 1)).to(dtype)
        tensors[f"a.{place}"] = torch.randint(0, 2, (place + 1, 1)).to(dtype)
    path = _files.write_tensors(tmp_path / "x.safetensors", tensors)
    assert path.read_bytes() == save(tensors, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "values",
    [
        torch.randn(1, 6)[:, 2],
        torch.randn(4, 1, 3)[:, :, 1:2],
        torch.randn(3, 5).T,
        torch.tensor(2.0),
        torch.zeros(0, 3),
    ],
    ids=["a column of one row", "sizes of 1", "transposed", "scalar", "empty"],
)
def test_bytes_of_any_strides(values, tmp_path):
    assert bytes(_files.bytes_of(values)) == values.clone(memory_format=torch.contiguous_format).numpy().tobytes()
    path = _files.write_tensors(tmp_path / "x.safetensors", {"x": values})
    assert torch.equal(load_file(path)["x"], values)


def test_json_holds_no_nan(tmp_path):
    content = {"a": [math.nan, 1.5, (math.inf, -math.inf)], "b": {"c": math.nan, "d": "NaN"}, "e": True}
    path = _files.write_json(tmp_path / "x.json", content)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None, None]],
        "b": {"c": None, "d": "NaN"},
        "e": True,
    }


def test_a_file_that_is_being_replaced_is_whole_until_it_is(tmp_path):
    path = _files.write_text(tmp_path / "a", "old")
    with _files.replaced(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert everything_in(tmp_path) == ["a"]


def test_remove_all_but(tmp_path):
    names = ["x-1.bin", "x-2.bin", "y-1.bin", ".x-3.bin.abc.part", ".y-3.bin.abc.part", "x-1.bin.txt"]
    for name in names:
        (tmp_path / name).write_text(name)
    _files.remove_all_but(tmp_path, "x-*.bin", {"x-2.bin"})
    assert everything_in(tmp_path) == [".y-3.bin.abc.part", "x-1.bin.txt", "x-2.bin", "y-1.bin"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = _files.write_text(tmp_path / "a", "x")
        with _files.output_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_output_folder_appears_whole(tmp_path):
    target = tmp_path / "out" / "run"
    with _files.output_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert everything_in(target) == ["a"]
    assert everything_in(target.parent) == ["run"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_failed_output_folder_leaves_the_old_one(tmp_path, error):
    target = tmp_path / "run"
    target.mkdir()
    (target / "report.md").write_text("1")

    def fail():
        with _files.output_folder(target, force=True) as folder:
            (folder / "new").write_text("2")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert everything_in(target) == ["report.md"]
    assert everything_in(tmp_path) == ["run"]


def test_force_deletes_nothing_this_package_did_not_write(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(OutputExistsError, match="did not write"), _files.output_folder(tmp_path, force=True):
        pass
    (tmp_path / "report.md").write_text("1")
    (tmp_path / "inside").mkdir()
    for working_folder in (tmp_path, tmp_path / "inside"):
        monkeypatch.chdir(working_folder)
        with pytest.raises(OutputExistsError, match="did not write"), _files.output_folder(tmp_path, force=True):
            pass
    assert (tmp_path / "train.jsonl").exists()


def test_a_linked_output_folder_is_replaced_where_it_is(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with _files.output_folder(tmp_path / "link") as folder:
        (folder / "report.md").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert everything_in(tmp_path / "real") == ["report.md"]


def test_results_survive_a_failed_rename(tmp_path, monkeypatch):
    def busy(source, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    def write():
        with _files.output_folder(tmp_path / "run") as folder:
            (folder / "a").write_text("1")
            monkeypatch.setattr(os, "replace", busy)

    with pytest.raises(OSError, match="they are in") as caught:
        write()
    kept = [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
    assert str(kept[0]) in str(caught.value)
    assert everything_in(kept[0]) == ["a"]


def test_failed_output_folder_removes_the_parents_it_made(tmp_path):
    with pytest.raises(ZeroDivisionError), _files.output_folder(tmp_path / "a" / "b" / "run"):
        raise ZeroDivisionError
    assert everything_in(tmp_path) == []


def test_existing_output_needs_force(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    (target / "report.md").write_text("1")
    with pytest.raises(OutputExistsError, match=r"exists already; pass --force"), _files.output_folder(target):
        pass
    with _files.output_folder(target, force=True) as folder:
        (folder / "new").write_text("2")
    assert everything_in(target) == ["new"]
    assert everything_in(tmp_path) == ["run"]


def test_empty_existing_folder_is_fine_and_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    with _files.output_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("1")
    assert everything_in(tmp_path / "empty") == ["a"]
    (tmp_path / "file").write_text("1")
    with pytest.raises(OutputExistsError, match="is a file"), _files.output_folder(tmp_path / "file", force=True):
        pass
