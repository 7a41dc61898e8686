"""Reading rows of text, with or without labels, from JSONL, CSV, TSV and plain text files."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sensilora.errors import DataError

DEFAULT_TEXT_FIELD = "text"
DEFAULT_LABEL_FIELD = "label"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_WITH_FIELDS = {".jsonl", ".ndjson", ".json", *_DELIMITERS}


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        texts: the text, or several (a sentence pair; a prompt and its answer).
        label: the class as the file names it, a whole number or a string; for regression a number; None where the
            file has none.
    """

    texts: tuple[str, ...]
    label: float | str | None = None


def read_rows(
    path: str | os.PathLike[str],
    *,
    text_fields: Sequence[str] = (),
    label_field: str | None = None,
    with_labels: bool = True,
    numeric_labels: bool = False,
    limit: int | None = None,
) -> list[Row]:
    """Read JSONL (``.jsonl``, ``.ndjson``, ``.json``; one object a line), CSV or TSV (``.csv``, ``.tsv``), or else
    plain text.

    Blank lines are skipped, and each file may have ``.gz`` behind its name. Plain text has one row a line. The first
    line of a CSV or TSV file names the columns, which are its fields; a cell that holds the delimiter or a quote
    stands in double quotes. Its labels are whole numbers where all of them can be read so, else strings.

    Args:
        path: the file.
        text_fields: the fields that hold the text; by default "text". Plain text has none.
        label_field: the field that holds the class, which every row must have. None takes "label" where a row has it.
        with_labels: False reads no labels.
        numeric_labels: labels are numbers, for regression, and read as floats: 2.5, and also 3 and "2.5".
        limit: read no more rows than this.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file is empty, no UTF-8, damaged, not what its ending says, or a row lacks a field; the message
            names the file and line.

    Warns:
        UserWarning: what is read as plain text, by its ending, begins with a JSON object.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a JSONL, CSV, TSV or text file in it")
    if not path.exists():
        raise FileNotFoundError(f"data file {path} does not exist")
    packed = path.suffix.lower() == ".gz"
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    if kind in _WITH_FIELDS:
        if kind in _DELIMITERS:
            records = _records(path, _DELIMITERS[kind], label_field or DEFAULT_LABEL_FIELD)
        else:
            records = _objects(path)
        fields = tuple(text_fields) or (DEFAULT_TEXT_FIELD,)
        label = _number_label if numeric_labels else _class_label
        rows: Iterator[Row] = (
            _row(value, where, fields, label(value, where, label_field) if with_labels else None)
            for value, where in records
        )
    elif text_fields or label_field:
        raise DataError(
            f"{path} is read as plain text, which has no fields; name a file that ends in .jsonl, .csv or .tsv"
        )
    else:
        rows = (Row((line,)) for line, _ in _lines(path))
    found = list(itertools.islice(rows, limit))
    if found and kind not in _WITH_FIELDS and _is_object(found[0].texts[0]):
        warnings.warn(
            f"{path} is read as plain text, but its first line is a JSON object; if its lines are, let its name end "
            "in .jsonl",
            UserWarning,
            stacklevel=2,
        )
    if not found:
        raise DataError(f"{path} is empty; it must hold at least one row")
    return _with_whole_labels(found) if kind in _DELIMITERS and not numeric_labels else found


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def number(label: object) -> float:
    """A label of regression as a number.

    Raises:
        DataError: it is none, or not finite.
    """
    try:
        value = float(str(label))
    except ValueError as error:
        raise DataError(f"the label {label!r} is no number; leave --regression out for classes") from error
    if not math.isfinite(value):
        raise DataError(f"the label {label!r} is not finite; remove the row")
    return value


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
    for number, line in enumerate(_decoded(path), 1):
        text = line.rstrip("\r\n")
        if text.strip():
            yield text, f"{path}, line {number}"


def _decoded(path: Path) -> Iterator[str]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not UTF-8 text ({error.reason}); convert the file to UTF-8"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        if number == 0 and str(error).startswith("Not a gzipped file"):
            raise DataError(f"{path} is no gzip file; leave .gz out of its name") from error
        raise DataError(f"{path}: the gzip file is truncated or damaged after line {number} ({error})") from error


def _objects(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for line, where in _lines(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line"
            ) from error
        except (ValueError, RecursionError) as error:  # thousands of digits or of brackets
            raise DataError(f"{where}: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: {type(value).__name__} in the place of a JSON object; write one object a line")
        yield value, where


def _records(path: Path, delimiter: str, label_field: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a CSV or TSV file by column. An empty label cell is none, as null is in JSONL."""
    # Strict, since a stray quote would otherwise swallow the lines up to the next one.
    reader = csv.reader(_decoded(path), delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [cell.strip() for cell in cells]
                twice = [name for name in names if names.count(name) > 1]
                if twice:
                    raise DataError(f"{where}: two columns are called {twice[0]!r}; rename one")
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{where}: the row has {len(cells)} cells and the first line names {len(names)} columns; put "
                    "cells that hold the delimiter in double quotes"
                )
            record: dict[str, Any] = dict(zip(names, cells, strict=True))
            if not record.get(label_field, "").strip():
                record |= dict.fromkeys({label_field} & record.keys())
            yield record, where
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not {path.name.removesuffix('.gz')[-3:].upper()} ({error}); put cells "
            "that hold the delimiter or a quote in double quotes, and double the quotes in them"
        ) from error


def _with_whole_labels(rows: list[Row]) -> list[Row]:
    """A file of text cells does not say which of its labels are numbers: they are if each is written as one."""
    labels = {row.label for row in rows if isinstance(row.label, str)}
    if not all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", label) for label in labels):
        return rows
    return [row if row.label is None else replace(row, label=int(row.label)) for row in rows]


def _row(value: dict[str, Any], where: str, text_fields: Sequence[str], label: float | str | None) -> Row:
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
    return Row(tuple(texts), label)


def _class_label(value: dict[str, Any], where: str, field: str | None) -> int | str | None:
    label = _label(value, where, field)
    if field is None and label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise DataError(
            f"{where}: the label {label!r} is {type(label).__name__}; a class is a whole number or a string"
        )
    return label


def _number_label(value: dict[str, Any], where: str, field: str | None) -> float | None:
    label = _label(value, where, field)
    if field is None and label is None:
        return None
    try:
        return number(label)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _label(value: dict[str, Any], where: str, field: str | None) -> object:
    if field is not None and field not in value:
        raise DataError(f"{where}: no field {field!r}; it has {', '.join(value)} (--label-field names it)")
    return value.get(DEFAULT_LABEL_FIELD if field is None else field)
