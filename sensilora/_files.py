"""Writing files so that a crash, a full disk or Ctrl-C never leaves a half-written one under its final name."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sensilora.errors import OutputExistsError

# safetensors' names of dtypes, in the order in which it sorts tensors.
_SAFETENSORS_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A temporary file in `path`'s folder, open for writing: synced and renamed to `path` at the end, or removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:  # which would name the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` by way of a temporary file in the same folder and an atomic rename."""
    with replaced(path) as file:
        file.write(data)
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """`write_bytes` for UTF-8 text."""
    return write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """`write_bytes` for dicts, lists, numbers and texts as JSON, in which NaN and Infinity are null."""
    return write_text(path, json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write tensors as safetensors with the metadata ``{"format": "pt"}`` that PEFT and vLLM expect.

    Byte for byte the file of `safetensors.torch.save`, which however holds all tensors on the host, twice; here it is
    one at a time.

    Raises:
        OSError: the file cannot be written.
    """
    # Wider dtypes first, so that every tensor is aligned to its own.
    ranks = list(_SAFETENSORS_NAMES)
    order = sorted(tensors, key=lambda name: (-ranks.index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _SAFETENSORS_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replaced(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(bytes_of(tensors[name]))
    return Path(path)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The values in order, whatever the strides."""
    values = tensor.detach().cpu().contiguous()
    # A size of 1 counts as contiguous with any stride, but no such tensor can be viewed as bytes.
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().data


def remove_all_but(folder: Path, pattern: str, keep: Container[str]) -> None:
    """Remove the files in `folder` that match `pattern` and are not in `keep`, and what a kill left of such."""
    for path in (*folder.glob(pattern), *folder.glob(f".{pattern}.*.part")):
        if path.name not in keep:
            path.unlink()


#: Files that tell a folder this package wrote. `force` replaces no other folder, since replacing is deleting.
_MARKERS = ("adapter_config.json", "config.json", "report.md")


@contextlib.contextmanager
def output_folder(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` on success, remove it on any exception.

    Raises:
        OutputExistsError: `path` is a file, or a folder that is not empty while `force` is false; or one that `force`
            may not replace: not written by this package, or the working folder or a parent of it.
    """
    path = Path(path).resolve()  # a link keeps pointing where it did; what it points at is replaced
    if path.is_file():
        raise OutputExistsError(f"output {path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise OutputExistsError(f"output folder {path} exists already; pass --force (force=True) to overwrite it")
        if path in (Path.cwd(), *Path.cwd().parents) or not any((path / name).is_file() for name in _MARKERS):
            raise OutputExistsError(
                f"output folder {path} holds files this package did not write, which --force would delete; "
                "name another folder"
            )
    new_parents = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # someone else may have put something there meanwhile
            for parent in new_parents:
                parent.rmdir()
        raise
    _swap(temporary, path)


def _swap(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; the old folder is complete until the new one is. Results are never deleted."""
    old = None
    try:
        if path.is_dir():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            os.replace(path, old)
        os.replace(temporary, path)
    except OSError as error:
        if old is not None and not path.exists():
            os.replace(old, path)
        raise OSError(
            error.errno, f"cannot put the results at {path} ({error.strerror}); they are in {temporary}"
        ) from error
    if old is not None:
        shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
