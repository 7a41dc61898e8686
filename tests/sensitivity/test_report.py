"""The report: exact round trips, a clear error for every way of damaging its file, and comparison with another."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensilora.allocation import allocate, fuse_scores
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


# Comparison of two reports

SCORES = ("trace", "topk_mean", "effective_rank", "fused")
# Few values, so that ties are common.
few = st.integers(0, 5)
triples = st.lists(st.tuples(few, few, few), min_size=1, max_size=12)


def numbered(metrics, **fields):
    return make_report({f"layer.{i}": metric for i, metric in enumerate(metrics)}, **fields)


def scores_of(report):
    """The four scores of every matrix, by score."""
    columns = {name: [getattr(report[matrix], name) for matrix in report] for name in SCORES[:3]}
    return {**columns, "fused": fuse_scores(**columns).fused.tolist()}


@given(st.lists(st.tuples(metric, metric, st.integers(0, 64 * 64)), min_size=1, max_size=8) | triples)
@settings(deadline=None, max_examples=50)
def test_a_report_agrees_with_itself(metrics):
    report = numbered(metrics)
    comparison = report.compare(replace(report, seed=1))
    for score, values in scores_of(report).items():
        found = comparison.agreement[score]
        if len(set(values)) == 1:
            assert (found.kendall, found.spearman) == (None, None)
        else:
            assert (found.kendall, found.spearman) == pytest.approx((1, 1))
    assert comparison.movers == ()
    assert "no matrix has another place" in str(comparison)


@given(st.lists(st.integers(0, 20), min_size=2, max_size=12).filter(lambda values: len(set(values)) > 1))
@settings(deadline=None, max_examples=50)
def test_reversed_orders_disagree(values):
    # Ties stay ties, so that every pair that has an order has the other one.
    one, two = ([(v, 2 * v, v) for v in column] for column in (values, [20 - v for v in values]))
    comparison = numbered(one).compare(numbered(two))
    for found in comparison.agreement.values():
        assert (found.kendall, found.spearman) == pytest.approx((-1, -1))


@given(st.lists(st.tuples(few, few, few, few, few, few), min_size=1, max_size=12))
@settings(deadline=None, max_examples=50)
def test_comparison_is_symmetric(metrics):
    one, two = numbered([row[:3] for row in metrics]), numbered([row[3:] for row in metrics])
    there, back = one.compare(two), two.compare(one)
    for score in SCORES:
        forward, backward = there.agreement[score], back.agreement[score]
        assert (forward.kendall is None) == (backward.kendall is None) == (forward.spearman is None)
        if forward.kendall is not None:
            assert (forward.kendall, forward.spearman) == pytest.approx((backward.kendall, backward.spearman))
    assert [(m.matrix, m.place, m.other_place) for m in there.movers] == [
        (m.matrix, m.other_place, m.place) for m in back.movers
    ]


def pairs_of_order(values):
    """The sign of every pair's difference."""
    return np.sign(np.subtract.outer(values, values))[np.triu_indices(len(values), 1)]


@given(st.lists(st.tuples(few, few), min_size=2, max_size=10))
@settings(deadline=None, max_examples=50)
def test_coefficients_are_those_of_their_definitions(values):
    one, two = (numbered([(trace, 1, 1) for trace in column]) for column in zip(*values, strict=True))
    found = one.compare(two).agreement["trace"]
    x, y = (np.array(column, dtype=float) for column in zip(*values, strict=True))
    a, b = pairs_of_order(x), pairs_of_order(y)
    if not a.any() or not b.any():
        assert found.kendall is None
        return
    assert found.kendall == pytest.approx((a @ b) / math.sqrt((a @ a) * (b @ b)))
    # The mean place of ties: one more than those below, and half of the others that are equal.
    x, y = ([np.sum(v < value) + (np.sum(v == value) + 1) / 2 for value in v] for v in (x, y))
    assert found.spearman == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_movers_are_told_by_their_places_the_largest_first():
    here = make_report({"a": (4, 4, 4), "b": (3, 3, 3), "c": (2, 2, 2), "d": (2, 2, 2), "gone": (9, 9, 9)})
    there = make_report({"new": (1, 1, 1), "d": (9, 9, 9), "c": (1, 1, 1), "b": (3, 3, 3), "a": (4, 4, 4)})
    comparison = here.compare(there)
    assert comparison.matrices == ("a", "b", "c", "d")
    assert (comparison.only_here, comparison.only_there) == (("gone",), ("new",))
    moved = [(mover.matrix, mover.place, mover.other_place, mover.moved) for mover in comparison.movers]
    assert moved == [("d", 3.5, 1, 2.5), ("a", 1, 2, 1), ("b", 2, 3, 1), ("c", 3.5, 4, 0.5)]
    lines = str(comparison).splitlines()
    assert lines[0] == "matrices in both reports: 4, only in this one (here): 1, only in the other (there): 1"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    taus = [f"{comparison.agreement[score].kendall:.3f}" for score in SCORES]
    assert [row[:2] for row in rows[:4]] == [
        [name, tau] for name, tau in zip(("trace", "top-k mean", "effective rank", "fused score"), taus, strict=True)
    ]
    assert rows[4:] == [
        ["d", "3.5", "1", "2.5"],
        ["a", "1", "2", "1"],
        ["b", "2", "3", "1"],
        ["c", "3.5", "4", "0.5"],
    ]


def test_matrices_that_one_report_lacks_change_nothing():
    metrics = {f"layer.{i}": (1 + i * 7 % 5, 2 + i * 3 % 7, 1 + i * 2 % 3) for i in range(6)}
    report = make_report(metrics)
    more = make_report({"other": (1e9, 1, 4000), **metrics})
    for comparison in (report.compare(more), more.compare(report)):
        assert comparison.agreement["fused"].kendall == pytest.approx(1)
        assert comparison.movers == ()


def with_experts(report, metrics):
    """The report with experts of one parameter besides, the first of them with its siblings' mean."""
    experts = {
        f"mlp.experts.down_proj.{i}": replace(
            report["a"], trace=trace, topk_mean=trace / 2, expert_of="mlp.experts.down_proj"
        )
        for i, trace in enumerate(metrics)
    }
    first = next(iter(experts))
    experts[first] = replace(experts[first], from_siblings=True, calls=0)
    return replace(report, matrices={**report.matrices, **experts}, min_expert_tokens=32)


def test_experts_that_one_report_lacks_change_nothing():
    here = make_report({"a": (4, 4, 4), "b": (3, 3, 3), "c": (2, 5, 2)})
    there = make_report({"a": (1, 2, 9), "b": (5, 3, 1), "c": (2, 4, 4)})
    plain, more = here.compare(there), with_experts(here, [1e6, 3.0, 7.0])
    for found, names in ((more.compare(there), "only_here"), (there.compare(more), "only_there")):
        assert found.matrices == ("a", "b", "c")
        assert getattr(found, names) == tuple(f"mlp.experts.down_proj.{i}" for i in range(3))
        assert found.experts == set(getattr(found, names))
    assert more.compare(there).agreement == plain.agreement
    assert more.compare(there).movers == plain.movers
    first = str(more.compare(there)).splitlines()[0]
    assert first.endswith("reports: 3, only in this one (here): 3 (3 of them experts), only in the other (there): 0")
    assert plain.experts == frozenset()


def test_experts_in_both_reports_are_matrices_like_others():
    here = make_report({"a": (4, 4, 4), "b": (3, 3, 3)})
    one, two = with_experts(here, [1.0, 6.0]), with_experts(here, [6.0, 1.0])
    comparison = one.compare(two)
    assert comparison.matrices == ("a", "b", "mlp.experts.down_proj.0", "mlp.experts.down_proj.1")
    # Orders by the trace: 4 3 1 6 and 4 3 6 1, so five of six pairs but three disagree.
    assert comparison.agreement["trace"].kendall == pytest.approx(-2 / 3)
    assert str(comparison).startswith("matrices in both reports: 4 (2 of them experts), only")


def test_a_plan_stands_for_the_report_that_it_was_made_from():
    here, there = encoder_report(layers=2), numbers_reversed(encoder_report(layers=2))
    plan = allocate(there, average_rank=4)
    assert here.compare(plan) == here.compare(there)
    for other, message in (
        (allocate(replace(there, k=0.25), average_rank=4), "with k=0.5 and k=0.25"),
        (plan.model_copy(update={"calibration": None}), "the plan was made without a calibration"),
        (plan.model_copy(update={"fingerprint": "cd" * 32}), "are of different models"),
    ):
        with pytest.raises(ReportError, match=message):
            here.compare(other)


def numbers_reversed(report):
    """The first matrix with the numbers of the last, and so on."""
    numbers = [(matrix.trace, matrix.topk_mean, matrix.effective_rank) for matrix in report.matrices.values()]
    matrices = {
        name: replace(report[name], trace=trace, topk_mean=topk_mean, effective_rank=effective_rank)
        for name, (trace, topk_mean, effective_rank) in zip(report, reversed(numbers), strict=True)
    }
    return replace(report, matrices=matrices)


def test_the_table_shows_ten_movers_and_counts_the_others():
    metrics = [(value, 1, 1) for value in range(1, 15)]
    text = str(numbered(metrics).compare(numbered(metrics[::-1])))
    assert text.count("layer.") == 10
    assert text.splitlines()[-1] == "and 4 more"


def test_names_are_not_taken_for_markup():
    one, two = ({"a[bold]": trace, "b": (2, 2, 2)} for trace in ((1, 1, 1), (3, 3, 3)))
    assert "a[bold]" in str(make_report(one).compare(make_report(two)))


def test_a_single_common_matrix_has_no_order():
    comparison = make_report({"a": (1, 1, 1), "b": (2, 2, 2)}).compare(make_report({"a": (3, 3, 3)}))
    assert all(found.kendall is found.spearman is None for found in comparison.agreement.values())
    assert str(comparison).count("undefined") == 8
    assert "nan" not in str(comparison)


def test_the_fused_score_is_weighted_as_asked():
    # The first two stand one way by the trace and the other way by the top-k mean, which varies more as a whole.
    one = numbered([(12, 10, 1), (10, 11, 1), (11, 40, 1)])
    two = numbered([(1, 1, 1), (2, 2, 2), (3, 3, 3)])
    assert one.compare(two).agreement["fused"].kendall == pytest.approx(1)
    assert one.compare(two, weights="equal").agreement["fused"].kendall == pytest.approx(1 / 3)


def test_what_does_not_compare_is_told_in_one_sentence():
    report = make_report({"a": (1, 1, 1), "b": (2, 2, 2)})
    for other, message in (
        (replace(report, fingerprint="cd" * 32, model_id="bigger"), "different models (tiny-model and bigger:"),
        (replace(report, k=0.25), "with k=0.5 and k=0.25; measure both with one k"),
        (replace(report, alpha=0.9), "with alpha=0.85 and alpha=0.9; measure both with one alpha"),
        (make_report({"c": (1, 1, 1)}), "no matrix in common (one holds a, the other c,"),
    ):
        with pytest.raises(ReportError) as caught:
            report.compare(other)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ReportError, match="weights must be 'cv' or 'equal', not 'none'"):
        report.compare(report, weights="none")


def test_estimators_and_seeds_may_differ():
    metrics = {"a": (1, 1, 1), "b": (2, 2, 2)}
    other = make_report(metrics, estimator="activation", mode=None, labels=None, seed=5, sequences=9, tokens=7)
    assert make_report(metrics).compare(other).agreement["trace"].kendall == pytest.approx(1)


def test_a_report_from_before_the_estimators_with_probes_is_read(tmp_path):
    report = encoder_report(layers=1)
    path = report.save(tmp_path / "report.json")
    content = json.loads(path.read_text())
    for name in ("hvp", "probes", "min_probes", "tolerance"):
        assert content.pop(name) is None
    for matrix in content["matrices"].values():
        assert matrix.pop("probes") is None
    path.write_text(json.dumps(content))
    assert SensitivityReport.load(path) == report


@pytest.mark.parametrize("change", [{"hvp": "double_backward"}, {"probes": 8}, {"tolerance": 0.0}])
def test_settings_of_probes_belong_to_hutchinson(change):
    report = encoder_report(layers=1)
    with pytest.raises(ValueError, match="given for the estimator 'hutchinson' only"):
        replace(report, **change)
    with pytest.raises(ValueError, match="given for the estimator 'hutchinson' only"):
        replace(report, estimator="hutchinson", mode=None, labels=None, **change)
    settings = {
        "hvp": "double_backward",
        "probes": 8,
        "min_probes": 2,
        "tolerance": 0.0,
        "mode": None,
        "labels": None,
    }
    with pytest.raises(ValueError, match=r"probes of encoder\.layer\.0\..* 'hutchinson' only"):
        replace(report, estimator="hutchinson", **settings)
