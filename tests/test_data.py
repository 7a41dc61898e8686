import gzip

import pytest

from sensilora.data import Row, label_names, read_rows
from sensilora.errors import DataError


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.jsonl.gz"])
def test_jsonl(tmp_path, name):
    path = write(tmp_path / name, '{"text": "one", "label": 3}\n\n{"text": "zwei ü", "label": "b", "more": 1}\r\n')
    assert read_rows(path) == [Row(("one",), 3), Row(("zwei ü",), "b")]


@pytest.mark.parametrize("name", ["data.txt", "data.text.gz", "data"])
def test_plain_text_keeps_inner_space_and_skips_blank_lines(tmp_path, name):
    path = write(tmp_path / name, "\ufeffone  line\n\n   \n two\r\n")
    assert read_rows(path) == [Row(("one  line",)), Row((" two",))]


def test_named_fields_and_limit(tmp_path):
    path = write(tmp_path / "data.jsonl", '{"a": "x", "b": "y", "c": 0}\n{"a": "z", "b": "", "c": 1}\n{"a": 5}\n')
    rows = read_rows(path, text_fields=["a", "b"], label_field="c", limit=2)
    assert rows == [Row(("x", "y"), 0), Row(("z", ""), 1)]


def test_labels_that_are_no_classes_matter_only_when_read(tmp_path):
    path = write(tmp_path / "data.jsonl", '{"text": "x", "label": 2.5}\n')
    assert read_rows(path, with_labels=False) == [Row(("x",))]
    with pytest.raises(DataError, match=r"line 1: the label 2.5 is float"):
        read_rows(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.jsonl is empty"),
        ("\n  \n", "data.jsonl is empty"),
        ('{"text": "x"}\n{"text": \n', r"data.jsonl, line 2: not JSON"),
        ('{"text": "x"}\n[1]\n', r"line 2: list in the place of a JSON object"),
        ('{"body": "x"}\n', r"line 1: no field 'text'; it has body"),
        ('{"text": 7}\n', r"line 1: field 'text' is int, not a string"),
        ('{"text": "  "}\n', r"line 1: field 'text' is blank"),
        ('{"text": "x", "label": true}\n', r"line 1: the label True is bool"),
        (b'{"text": "\xff"}\n', r"line 1: not UTF-8"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / "data.jsonl", content))


def test_other_bad_inputs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl does not exist"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="plain text, which has no fields"):
        read_rows(write(tmp_path / "a.txt", "x"), text_fields=["text"])
    with pytest.raises(DataError, match=r"line 1: no field 'label'; it has text"):
        read_rows(write(tmp_path / "a.jsonl", '{"text": "x"}'), label_field="label")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"no gzip", lambda data: data[:20] + b"\0" * 40]
)
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "data.txt.gz"
    path.write_bytes(damage(gzip.compress(b"some text\n" * 50)))
    with pytest.raises(DataError, match=r"data.txt.gz: the gzip file is truncated or damaged"):
        read_rows(path)


def test_label_names():
    assert label_names([Row(("a",), 10), Row(("b",), 9), Row(("c",), 10)]) == [9, 10]
    assert label_names([Row(("a",), "z"), Row(("b",), "b")]) == ["b", "z"]
    for rows, message in [
        ([Row(("a",), 1), Row(("b",))], "some rows have no label"),
        ([Row(("a",), 1), Row(("b",), "1")], "some labels are whole numbers and others strings"),
        ([Row(("a",), "x"), Row(("b",), "x")], "every row has the label 'x'"),
    ]:
        with pytest.raises(DataError, match=message):
            label_names(rows)
