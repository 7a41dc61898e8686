"""Reading rows of text, with or without labels, from JSONL and plain text files."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensilora.errors import DataError

DEFAULT_TEXT_FIELD = "text"
DEFAULT_LABEL_FIELD = "label"


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        texts: the text, or several (a sentence pair; a prompt and its answer).
        label: the class as the file names it, a whole number or a string; None where the file has none.
    """

    texts: tuple[str, ...]
    label: int | str | None = None


def read_rows(
    path: str | os.PathLike[str],
    *,
    text_fields: Sequence[str] = (),
    label_field: str | None = None,
    with_labels: bool = True,
    limit: int | None = None,
) -> list[Row]:
    """Read a JSONL file (``.jsonl``, ``.json``; one object a line) or else plain text (one row a line), also ``.gz``.

    Blank lines are skipped.

    Args:
        path: the file.
        text_fields: JSONL only: the fields that hold the text; by default "text".
        label_field: JSONL only: the field that holds the class, which every row must have. None takes "label"
            where a row has it.
        with_labels: False reads no labels.
        limit: read no more rows than this.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file is empty, no UTF-8, damaged, not JSONL, or a row lacks a field; the message names the file
            and line.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a JSONL or text file in it")
    if not path.exists():
        raise FileNotFoundError(f"data file {path} does not exist")
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind in {".jsonl", ".json"}:
        fields = tuple(text_fields) or (DEFAULT_TEXT_FIELD,)
        rows: Iterator[Row] = (
            _row(value, where, fields, label_field, with_labels) for value, where in _objects(path)
        )
    elif text_fields or label_field:
        raise DataError(f"{path} is read as plain text, which has no fields; name a file that ends in .jsonl")
    else:
        rows = (Row((line,)) for line, _ in _lines(path))
    found = list(itertools.islice(rows, limit))
    if not found:
        raise DataError(f"{path} is empty; it must hold at least one row")
    return found


def label_names(rows: Iterable[Row]) -> list[int | str]:
    """The distinct labels of `rows` in order: whole numbers by value, strings alphabetically.

    Raises:
        DataError: a row has no label, some labels are numbers and others strings, or there is only one class.
    """
    labels = {row.label for row in rows}
    if None in labels:
        raise DataError("some rows have no label; name the field that holds it (--label-field)")
    found: list[Any] = list(labels)
    if len({type(label) for label in found}) > 1:
        raise DataError("some labels are whole numbers and others strings; use one kind")
    if len(found) == 1:
        raise DataError(f"every row has the label {found[0]!r}; classification needs at least two classes")
    return sorted(found)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, without their line end, each with "file, line n"."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield text, f"{path}, line {number}"
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not UTF-8 text ({error.reason}); convert the file to UTF-8"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is truncated or damaged after line {number} ({error})") from error


def _objects(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for line, where in _lines(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line"
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: {type(value).__name__} in the place of a JSON object; write one object a line")
        yield value, where


def _row(
    value: dict[str, Any], where: str, text_fields: Sequence[str], label_field: str | None, with_labels: bool
) -> Row:
    texts = []
    for field in text_fields:
        if field not in value:
            raise DataError(
                f"{where}: no field {field!r}; it has {', '.join(value) or 'none'} (--text-field names it)"
            )
        if not isinstance(value[field], str):
            raise DataError(f"{where}: field {field!r} is {type(value[field]).__name__}, not a string")
        texts.append(value[field])
    if not any(text.strip() for text in texts):
        raise DataError(f"{where}: field {text_fields[0]!r} is blank; remove the row")
    return Row(tuple(texts), _label(value, where, label_field) if with_labels else None)


def _label(value: dict[str, Any], where: str, field: str | None) -> int | str | None:
    if field is not None and field not in value:
        raise DataError(f"{where}: no field {field!r}; it has {', '.join(value)} (--label-field names it)")
    label = value.get(DEFAULT_LABEL_FIELD if field is None else field)
    if field is None and label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise DataError(
            f"{where}: the label {label!r} is {type(label).__name__}; a class is a whole number or a string"
        )
    return label
