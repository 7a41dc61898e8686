import gzip
import warnings

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


@pytest.mark.parametrize(("name", "delimiter"), [("data.csv", ","), ("data.csv.gz", ","), ("data.tsv", "\t")])
def test_columns(tmp_path, name, delimiter):
    lines = ["\ufefflabel|text|more", '3|"a ""quoted, \tcell""', 'of two lines"|', "||", "", "-12|ü |x"]
    path = write(tmp_path / name, "\r\n".join(lines).replace("|", delimiter))
    quoted = 'a "quoted, \tcell"\r\nof two lines'
    assert read_rows(path) == [Row((quoted,), 3), Row(("ü ",), -12)]
    assert read_rows(path, text_fields=["text", "more"], with_labels=False, limit=1) == [Row((quoted, ""))]
    assert read_rows(path, text_fields=["more", "text"], label_field="label")[1] == Row(("x", "ü "), -12)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1", "0"], [1, 0]),
        (["1", ""], [1, None]),
        (["1", "one"], ["1", "one"]),
        (["01", "2"], ["01", "2"]),
        (["1.0", "2"], ["1.0", "2"]),
    ],
)
def test_labels_of_columns_are_whole_numbers_where_all_are(tmp_path, labels, expected):
    path = write(tmp_path / "data.csv", "text,label\n" + "".join(f"a,{label}\n" for label in labels))
    assert [row.label for row in read_rows(path)] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.csv is empty"),
        ("text,label\n", "data.csv is empty"),
        ("body,label\nx,1\n", r"line 2: no field 'text'; it has body, label"),
        ("text,text\nx,1\n", r"line 1: two columns are called 'text'"),
        ("text,label\n\nx, y,1\n", r"line 3: the row has 3 cells and the first line names 2 columns"),
        ("text,label\nx\n", r"line 2: the row has 1 cells"),
        ('text,label\n"x" y,1\n', r"line 2: not CSV \(',' expected after '\"'\)"),
        ('text,label\n"x,1\ny,2\n', r"line 3: not CSV \(unexpected end of data\)"),
        ("text,label\n  ,1\n", r"line 2: field 'text' is blank"),
        ("text,label\n" + "x" * 140_000 + ",1\n", r"line 2: not CSV \(field larger than field limit"),
        (b"text,label\n\xff,1\n", r"line 2: not UTF-8"),
    ],
)
def test_bad_columns(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_rows(write(tmp_path / "data.csv", content))
    assert "\n" not in str(caught.value)


def test_every_row_needs_a_cell_of_a_label_field_that_is_named(tmp_path):
    path = write(tmp_path / "data.tsv", "text\tclass\na\t1\nb\t\n")
    assert [row.label for row in read_rows(path)] == [None, None]
    with pytest.raises(DataError, match=r"line 3: the label None is NoneType; a class is a whole number or a string"):
        read_rows(path, label_field="class")
    with pytest.raises(DataError, match=r"line 2: no field 'kind'; it has text, class"):
        read_rows(path, label_field="kind")


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
    ("name", "content"),
    [
        ("data.jsonl", '{"text": "a", "label": 2.5}\n{"text": "b", "label": -3}\n{"text": "c", "label": "1e-1"}\n'),
        ("data.csv", "text,label\na,2.5\nb,-3\nc,1e-1\n"),
    ],
)
def test_numeric_labels_are_floats(tmp_path, name, content):
    path = write(tmp_path / name, content)
    rows = read_rows(path, numeric_labels=True)
    assert rows == [Row(("a",), 2.5), Row(("b",), -3.0), Row(("c",), 0.1)]
    assert all(type(row.label) is float for row in rows)
    assert {row.label for row in read_rows(path, numeric_labels=True, with_labels=False)} == {None}


def test_rows_without_a_numeric_label_have_none(tmp_path):
    path = write(tmp_path / "data.jsonl", '{"text": "a"}\n{"text": "b", "label": null}\n{"text": "c", "label": 1}\n')
    assert [row.label for row in read_rows(path, numeric_labels=True)] == [None, None, 1.0]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ('"good"', r"data.jsonl, line 2: the label 'good' is no number; leave --regression out"),
        ("true", "line 2: the label True is no number"),
        ("[1]", "line 2: the label \\[1\\] is no number"),
        ("NaN", "line 2: the label nan is not finite"),
        ("1e999", "line 2: the label inf is not finite"),
    ],
)
def test_bad_numeric_labels(tmp_path, label, message):
    path = write(tmp_path / "data.jsonl", '{"text": "x", "label": 1.5}\n{"text": "y", "label": ' + label + "}\n")
    with pytest.raises(DataError, match=message):
        read_rows(path, numeric_labels=True)
    with pytest.raises(DataError, match="line 2: the label None is no number"):
        read_rows(
            write(tmp_path / "none.jsonl", '{"text": "x", "score": 1}\n{"text": "y", "score": null}\n'),
            label_field="score",
            numeric_labels=True,
        )


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
    "damage", [lambda data: data[:-9], lambda data: data[:20] + b"\0" * 40, lambda data: data + b"more"]
)
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "data.txt.gz"
    path.write_bytes(damage(gzip.compress(b"some text\n" * 50)))
    with pytest.raises(DataError, match=r"data.txt.gz: the gzip file is truncated or damaged"):
        read_rows(path)


def test_a_gzip_file_that_is_none(tmp_path):
    path = tmp_path / "data.txt.gz"
    path.write_bytes(b"some text")
    with pytest.raises(DataError, match=r"data.txt.gz is no gzip file; leave .gz out of its name"):
        read_rows(path)


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.Json", "a.jsonl.GZ"])
def test_endings_in_any_case(tmp_path, name):
    path = tmp_path / name
    content = b'{"text": "x", "label": 1}\n'
    path.write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    assert read_rows(path) == [Row(("x",), 1)]


def test_json_that_is_read_as_plain_text_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"a.log is read as plain text, but its first line is a JSON object"):
        assert read_rows(write(tmp_path / "a.log", '{"text": "x"}')) == [Row(('{"text": "x"}',))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_rows(write(tmp_path / "a.txt", "[1] and {2}\n3"))
        read_rows(write(tmp_path / "deep.txt", "[" * 100_000))


def test_a_number_too_long_for_python(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl, line 1: .*integer string conversion"):
        read_rows(write(tmp_path / "a.jsonl", '{"text": "x", "label": ' + "1" * 5000 + "}"))


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
