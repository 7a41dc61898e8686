"""The diagonals themselves, on disk: written one at a time while a model is measured, and read one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sensilora._files import remove_all_but, write_tensors, write_text
from sensilora.errors import CalibrationError, OutputExistsError, ReportError
from sensilora.sensitivity.report import SensitivityReport

INDEX_FILE = "diagonals.safetensors.index.json"
_FILES = "diagonals-*.safetensors"


class DiagonalWriter:
    """Writes diagonals to safetensors files in a folder, the index last. At most one file's worth is in memory.

    Args:
        folder: made if it is not there.
        shard_bytes: of the values in a file; a larger diagonal has a file of its own.
        written: the files of the diagonals that are there already, by matrix name, where a run is resumed.

    Raises:
        OutputExistsError: `folder` is a file, or holds something that no interrupted run left there.
        CalibrationError: a file of `written` is gone.
    """

    def __init__(
        self, folder: str | os.PathLike[str], shard_bytes: int, written: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.files = dict(written or {})
        self._pending: dict[str, Tensor] = {}
        if self.folder.is_file():
            raise OutputExistsError(f"the folder for diagonals, {self.folder}, is a file; name a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        gone = sorted(file for file in set(self.files.values()) if not (self.folder / file).exists())
        if gone:
            raise CalibrationError(
                f"{gone[0]} is gone from the folder for diagonals, {self.folder}, on which the checkpoint counts; "
                "remove the checkpoint to start again"
            )
        if written is not None:
            remove_all_but(self.folder, INDEX_FILE, ())
        if any(not path.match(_FILES) and path.suffix != ".part" for path in self.folder.iterdir()):
            raise OutputExistsError(f"the folder for diagonals, {self.folder}, is not empty; name another")
        # Without an index they are of a run that was killed, perhaps after its last checkpoint.
        remove_all_but(self.folder, _FILES, set(self.files.values()))

    def add(self, name: str, diagonal: Tensor) -> None:
        """Take a diagonal; it must not change afterwards."""
        diagonal = diagonal.to("cpu", torch.float32)
        if self._pending and _bytes(self._pending.values()) + _bytes([diagonal]) > self.shard_bytes:
            self.flush()
        self._pending[name] = diagonal

    def flush(self) -> None:
        """Write what is in memory, as a file of its own."""
        if not self._pending:
            return
        file = _FILES.replace("*", f"{len(set(self.files.values())) + 1:05}")
        write_tensors(self.folder / file, self._pending)
        self.files.update(dict.fromkeys(self._pending, file))
        self._pending.clear()

    def close(self, report: SensitivityReport) -> None:
        """Write the rest, and the index with the matrices in the report's order."""
        self.flush()
        # Not those of experts whose numbers are not their own.
        names = [name for name in report if name in self.files and not report[name].from_siblings]
        index = {
            "metadata": {"total_size": sum(4 * report.diagonal_size(name) for name in names)},
            "weight_map": {name: self.files[name] for name in names},
        }
        write_text(self.folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")

    def discard(self) -> None:
        """Remove what was written, and the folder if nothing else is in it."""
        self._pending.clear()
        remove_all_but(self.folder, _FILES, ())
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


class Diagonals(Mapping[str, Tensor]):
    """Diagonals that ``calibrate(keep_diagonals=...)`` wrote, by matrix name; each is read when it is asked for.

    ``diagonals[name]`` is fp32 on the CPU: (out_features, in_features) for "fisher" and "hutchinson", (in_features,)
    for "activation".

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: the folder holds no index.
        ReportError: the index is damaged; or, when a diagonal is read, its file is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        text = (self.path / INDEX_FILE).read_text(encoding="utf-8")
        try:
            index: Any = json.loads(text)
            self._files = {str(name): str(file) for name, file in index["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReportError(
                f"the index of diagonals {self.path / INDEX_FILE} is damaged; calibrate again with keep_diagonals"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        path = self.path / self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ReportError(
                f"the diagonal of {name} cannot be read from {path} ({error}); calibrate again with keep_diagonals"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def remove_diagonals(folder: Path, *, force: bool) -> None:
    """Make room for new diagonals where an earlier run's are. Those of an unfinished run, without an index, stay.

    Raises:
        OutputExistsError: there are some and `force` is false.
    """
    if not (folder / INDEX_FILE).exists():
        return
    if not force:
        raise OutputExistsError(f"output folder {folder} exists already; pass --force to overwrite it")
    remove_all_but(folder, INDEX_FILE, ())
    remove_all_but(folder, _FILES, ())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
