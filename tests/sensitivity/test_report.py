"""The report file: exact round trips, and a clear error for every way of damaging it."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensilora.errors import ReportError, SensiloraError
from sensilora.sensitivity import MatrixSensitivity, SensitivityReport
from tests.reports import encoder_report, make_report

metric = st.floats(min_value=0, allow_nan=False, allow_infinity=False)


@given(
    st.dictionaries(st.text(min_size=1), st.tuples(metric, metric, st.integers(0, 64 * 64)), min_size=1, max_size=4),
    st.integers(-(2**63), 2**63),
)
@settings(deadline=None, max_examples=50)
def test_round_trip_is_exact(tmp_path_factory, metrics, seed):
    report = make_report(metrics, seed=seed)
    path = report.save(tmp_path_factory.mktemp("report") / "report.json")
    loaded = SensitivityReport.load(path)
    assert loaded == report
    assert list(loaded) == list(report)


def test_access_in_module_order():
    report = make_report({"b": (3.0, 2.0, 1), "a": (1.0, 0.5, 2)}, {"b": (4, 2), "a": (2, 2)})
    assert list(report) == ["b", "a"]
    assert len(report) == 2
    assert (report["b"].trace, report["b"].topk_mean, report["b"].effective_rank) == (3.0, 2.0, 1)
    assert report["b"].shape == (4, 2)
    assert report.diagonal_size("b") == 8
    with pytest.raises(KeyError, match="missing"):
        report["missing"]


def test_the_diagonal_of_the_activation_estimator_has_one_value_an_input():
    report = make_report({"a": (1.0, 0.5, 2)}, (3, 2), estimator="activation", mode=None, labels=None)
    assert report.diagonal_size("a") == 2
    with pytest.raises(ValueError, match="effective_rank of a is 3"):
        make_report({"a": (1.0, 0.5, 3)}, (3, 2), estimator="activation", mode=None, labels=None)


def test_summary_shows_every_matrix_and_number():
    report = make_report({"layer.query": (1234.5678, 0.000123456, 9), "layer.key": (0.0, 0.0, 0)}, (6, 3))
    title, header, query, key = report.summary().splitlines()
    assert "fisher (per_sequence, labels from the data)" in title
    assert header.split("  ")[0] == "matrix"
    assert query.split() == ["layer.query", "6x3", "1235", "0.0001235", "9", "50.0"]
    assert key.split() == ["layer.key", "6x3", "0", "0", "0", "0.0"]
    assert len({len(line) for line in (header, query, key)}) == 1


def test_a_missing_file_is_told_as_such(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"report\.json"):
        SensitivityReport.load(tmp_path / "report.json")


def test_truncation_at_any_offset_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "report.json"
    encoder_report(layers=1).save(path)
    content = path.read_bytes().rstrip()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(ReportError, match=r"report\.json is not complete JSON"):
            SensitivityReport.load(path)


def test_saving_replaces_the_whole_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("x" * 100_000)
    report = encoder_report(layers=1)
    report.save(path)
    assert SensitivityReport.load(path) == report
    assert list(tmp_path.iterdir()) == [path]


DAMAGES = {
    "matrices.enc.query.trace": lambda data: data["matrices"]["enc.query"].update(trace=math.nan),
    "matrices.enc.query.topk_mean": lambda data: data["matrices"]["enc.query"].update(topk_mean=math.inf),
    "matrices.enc.query.effective_rank": lambda data: data["matrices"]["enc.query"].update(effective_rank=-1),
    "matrices.enc.query.shape": lambda data: data["matrices"]["enc.query"].update(shape=[4]),
    "matrices.enc.query.shape.0": lambda data: data["matrices"]["enc.query"].update(shape=[0, 2]),
    "matrices.enc.query.calls": lambda data: data["matrices"]["enc.query"].update(calls=True),
    "matrices.enc.query.tokens": lambda data: data["matrices"]["enc.query"].pop("tokens"),
    "matrices.enc.query.rank": lambda data: data["matrices"]["enc.query"].update(rank=3),
    "effective_rank of enc.query is 9": lambda data: data["matrices"]["enc.query"].update(effective_rank=9),
    "matrices": lambda data: data.update(matrices={}),
    "k": lambda data: data.update(k="0.5"),
    "alpha": lambda data: data.update(alpha=1.5),
    "estimator": lambda data: data.update(estimator="magic"),
    "mode and labels": lambda data: data.update(estimator="activation"),
    "fingerprint": lambda data: data.pop("fingerprint"),
    "extra": lambda data: data.update(extra=1),
    "schema_version 99": lambda data: data.update(schema_version=99),
}


@pytest.mark.parametrize("field", DAMAGES)
def test_an_edited_file_is_an_error_that_names_file_and_field(tmp_path, field):
    path = tmp_path / "report.json"
    make_report({"enc.query": (3.0, 2.0, 1)}, (4, 2)).save(path)
    data = json.loads(path.read_text())
    DAMAGES[field](data)
    path.write_text(json.dumps(data))
    with pytest.raises(ReportError) as caught:
        SensitivityReport.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert field in message
    assert "\n" not in message
    assert isinstance(caught.value, SensiloraError)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"{}garbage"])
def test_other_files_are_not_reports(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ReportError, match=r"report\.json"):
        SensitivityReport.load(path)


def test_numbers_that_are_not_measurements_are_refused_in_python_too():
    for trace in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="trace"):
            MatrixSensitivity(shape=(2, 2), trace=trace, topk_mean=0.0, effective_rank=0, tokens=1, calls=1)
