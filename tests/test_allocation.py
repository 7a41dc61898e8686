"""Allocation: every formula against hand-made arithmetic, and properties that hold for all inputs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensilora import allocation
from sensilora.allocation import (
    allocate,
    fuse_scores,
    progressive_quotas,
    round_quotas,
    scaled_quotas,
    tie_groups,
)
from sensilora.errors import BudgetError, NonFiniteError, RankError, SensiloraError
from sensilora.sensitivity.calibrate import calibrate
from sensilora.sensitivity.report import MatrixSensitivity, SensitivityReport
from sensilora.targets import fingerprint
from tests.reports import encoder_report, make_report

few = settings(max_examples=60, deadline=None)

TRACE, TOPK, ERANK = [1.0, 1.0, 3.0, 3.0], [2.0, 6.0, 2.0, 6.0], [10, 10, 30, 30]


def four_matrices(shapes: tuple[int, int] = (64, 64)) -> SensitivityReport:
    return make_report({f"m{i}": metrics for i, metrics in enumerate(zip(TRACE, TOPK, ERANK, strict=True))}, shapes)


# --- scores


def test_cv_weights_by_hand():
    # trace: mu 2, sigma 1 (population; the sample's would be 1.15), g1 = 1/4. top-k: mu 4, sigma 2, b1 = 2/16 = 1/8.
    # effective rank: mu 20, sigma 10, b2 = 10/400 = 1/40.
    local = [2 / 8 + 10 / 40, 6 / 8 + 10 / 40, 2 / 8 + 30 / 40, 6 / 8 + 30 / 40]
    assert local == [0.5, 1.0, 1.0, 1.5]
    # local: mu 1, sigma = sqrt((0.25 + 0 + 0 + 0.25) / 4) = sqrt(1/8), g2 = sqrt(1/8).
    g2 = math.sqrt(1 / 8)
    fused = [1 / 4 + g2 / 2, 1 / 4 + g2, 3 / 4 + g2, 3 / 4 + 1.5 * g2]
    scores = fuse_scores(TRACE, TOPK, ERANK)
    np.testing.assert_array_equal(scores.global_, TRACE)
    np.testing.assert_allclose(scores.local, local, rtol=1e-14)
    np.testing.assert_allclose(scores.fused, fused, rtol=1e-14)


def test_equal_weights_by_hand():
    # 0.5/mu: top-k 1/8, effective rank 1/40, trace 1/4; local: mu 1, so 1/2.
    local = [2 / 8 + 10 / 40, 6 / 8 + 10 / 40, 2 / 8 + 30 / 40, 6 / 8 + 30 / 40]
    fused = [1 / 4 + 0.5 / 2, 1 / 4 + 1 / 2, 3 / 4 + 1 / 2, 3 / 4 + 1.5 / 2]
    scores = fuse_scores(TRACE, TOPK, ERANK, weights="equal")
    np.testing.assert_allclose(scores.local, local, rtol=1e-14)
    np.testing.assert_allclose(scores.fused, fused, rtol=1e-14)


def test_a_metric_that_does_not_vary_has_no_weight_under_cv():
    scores = fuse_scores([1.0, 3.0], [5.0, 5.0], [30, 10])
    # Only the effective rank is left of the local score: mu 20, sigma 10, b2 = 1/40.
    np.testing.assert_allclose(scores.local, [30 / 40, 10 / 40], rtol=1e-14)


@pytest.mark.parametrize("weights", ["cv", "equal"])
def test_metrics_of_mean_zero_get_weight_zero(weights):
    scores = fuse_scores([0.0, 0.0], [0.0, 0.0], [0, 0], weights=weights)
    assert not scores.local.any()
    assert not scores.fused.any()


@few
@given(
    metrics=st.lists(st.tuples(*[st.floats(0.01, 100.0)] * 3), min_size=2, max_size=8),
    factor=st.sampled_from([1e-150, 1e-3, 7.0, 1e150]),
    weights=st.sampled_from(["cv", "equal"]),
)
def test_fused_score_does_not_depend_on_the_scale_of_a_metric(metrics, factor, weights):
    trace, topk, erank = (np.array(column) for column in zip(*metrics, strict=True))
    plain = fuse_scores(trace, topk, erank, weights=weights).fused
    scaled = fuse_scores(trace * factor, topk, erank, weights=weights).fused
    np.testing.assert_allclose(scaled, plain, rtol=1e-9, atol=1e-12)


# --- quotas


def quotas_of(function, theta, budget, lower=0.0, upper=100.0, cost=1.0, **keywords):
    theta = np.array(theta, dtype=np.float64)
    bounds = [np.broadcast_to(np.asarray(x, dtype=np.float64), theta.shape) for x in (lower, upper, cost)]
    return function(theta, *bounds, budget, **keywords)


def test_scaled_quotas_are_the_shares_of_equation_15():
    # 16 * (1, 2, 5) / 8
    np.testing.assert_allclose(quotas_of(scaled_quotas, [1, 2, 5], 16), [2, 4, 10], rtol=1e-14)


def test_scaled_quotas_redistribute_what_the_bounds_cut_off():
    # Shares would be 2, 4, 10. The cap of 6 on the last leaves 10 to the others, in the ratio 1 to 2.
    np.testing.assert_allclose(quotas_of(scaled_quotas, [1, 2, 5], 16, upper=7), [3, 6, 7], rtol=1e-14)
    # The least of 3 on the first takes 1 of 16 from the others: 13 in the ratio 2 to 5.
    np.testing.assert_allclose(quotas_of(scaled_quotas, [1, 2, 5], 16, lower=3), [3, 26 / 7, 65 / 7], rtol=1e-14)


def test_scaled_quotas_with_costs():
    # lam * (10 * 1 + 20 * 2) = 100, so lam = 2.
    np.testing.assert_allclose(quotas_of(scaled_quotas, [1, 2], 100, cost=[10, 20]), [2, 4], rtol=1e-14)


def test_scores_of_zero_get_the_rest_only_when_the_others_are_full():
    np.testing.assert_array_equal(quotas_of(scaled_quotas, [0, 1, 0], 5, upper=8), [0, 5, 0])
    np.testing.assert_array_equal(quotas_of(scaled_quotas, [0, 1, 0], 14, upper=8), [3, 8, 3])
    np.testing.assert_array_equal(quotas_of(scaled_quotas, [0, 0, 0], 6), [2, 2, 2])


def test_quotas_near_a_whole_number_are_that_number():
    # 0.1 + 0.2 is 0.30000000000000004: the shares come out as whole numbers all the same.
    np.testing.assert_array_equal(quotas_of(scaled_quotas, [0.1 + 0.2, 0.3, 0.6], 12), [3, 3, 6])


def test_progressive_example_of_the_paper():
    # 6 matrices, average 5, 3 classes: 6, 6, 5, 5, 4, 4.
    np.testing.assert_array_equal(
        quotas_of(progressive_quotas, [9, 8, 7, 6, 5, 4], 30, classes=3), [6, 6, 5, 5, 4, 4]
    )


def test_progressive_classes_of_unequal_size():
    # 5 matrices in 2 classes are 3 and 2, with offsets +1/2 and -1/2: 5 lam + 3/2 - 2/2 = 20, so lam = 3.9.
    np.testing.assert_allclose(
        quotas_of(progressive_quotas, [1, 5, 4, 3, 2], 20, classes=2), [3.4, 4.4, 4.4, 4.4, 3.4], rtol=1e-14
    )


def test_progressive_with_equal_scores_or_few_matrices():
    np.testing.assert_array_equal(quotas_of(progressive_quotas, [2, 2, 2], 12, classes=3), [4, 4, 4])
    # Two matrices make two classes at most.
    np.testing.assert_array_equal(quotas_of(progressive_quotas, [2, 1], 9, classes=5), [5, 4])


@few
@given(
    items=st.lists(
        st.tuples(st.floats(0, 10), st.integers(0, 3), st.integers(0, 20), st.sampled_from([1.0, 3.0, 512.0])),
        min_size=1,
        max_size=9,
    ),
    fraction=st.floats(0, 1),
    function=st.sampled_from([scaled_quotas, progressive_quotas]),
)
def test_quotas_spend_the_budget_within_the_bounds(items, fraction, function):
    theta, lower, extra, cost = (np.array(column, dtype=np.float64) for column in zip(*items, strict=True))
    upper = lower + extra
    budget = cost @ lower + fraction * (cost @ extra)
    quotas = function(theta, lower, upper, cost, budget)
    assert (lower <= quotas).all()
    assert (quotas <= upper).all()
    assert cost @ quotas == pytest.approx(budget, rel=1e-9, abs=1e-6)


# --- rounding


def test_largest_remainder_by_hand():
    # Floors 2, 2, 5, 6 leave 1 of 16; the remainders are 0, 0.83, 0.17, 0.
    assert round_quotas(np.array([2.0, 2.83, 5.17, 6.0]), [1] * 4, [64] * 4, [1] * 4, 16) == [2, 3, 5, 6]


def test_equal_remainders_go_to_the_first():
    assert round_quotas(np.array([2.5, 2.5, 2.5, 2.5]), [1] * 4, [64] * 4, [1] * 4, 10) == [3, 3, 2, 2]


def test_rounding_skips_a_unit_that_does_not_fit():
    # Floors (1, 1, 1) cost 9 of 14. What is left, 5, is reached by the costs 2 and 3, though the item of cost 4 has
    # the largest remainder.
    quotas = np.array([1.9, 1.8, 1.7])
    assert round_quotas(quotas, [1] * 3, [9] * 3, [4, 2, 3], 14) == [1, 2, 2]


def test_rounding_looks_further_when_one_unit_up_is_not_enough():
    # Costs 3 and 2. The floors (2, 2) cost 10 of 11: one is left, for which no unit up exists. One unit down on the
    # 2s and one up on the 3 spends it: 3 * 3 + 2 * 1 = 11.
    assert round_quotas(np.array([2.2, 2.2]), [1, 1], [9, 9], [3, 2], 11) == [3, 1]


@few
@given(costs=st.lists(st.integers(1, 9), min_size=1, max_size=8), target=st.integers(0, 40))
def test_nearest_subset_is_the_first_of_the_best(costs, target):
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(costs)), size) for size in range(len(costs) + 1)
    )
    reached = [(sum(costs[i] for i in subset), subset) for subset in subsets]
    best = max(total for total, _ in reached if total <= target)

    # Lexicographic by membership: taking the first item comes before not taking it.
    def membership(subset):
        return [i not in subset for i in range(len(costs))]

    expected = min((subset for total, subset in reached if total == best), key=membership)
    assert tuple(allocation._nearest_subset(costs, target)) == expected


@few
@given(
    items=st.lists(st.tuples(st.floats(0, 7.99), st.integers(1, 12)), min_size=1, max_size=3),
    slack=st.integers(0, 30),
)
def test_left_over_is_the_least_that_brute_force_finds(items, slack):
    quotas = np.array([quota for quota, _ in items])
    cost = [c for _, c in items]
    lower, upper = [0] * len(items), [8] * len(items)
    budget = sum(c * math.floor(quota) for quota, c in items) + min(slack, sum(cost))
    found = round_quotas(quotas, lower, upper, cost, budget)
    near = [
        range(max(0, math.floor(quota) - 3), min(8, math.floor(quota) + 4) + 1) for quota in quotas
    ]  # 3 below the floor to 3 above the ceiling
    spent = [sum(c * v for c, v in zip(cost, values, strict=True)) for values in itertools.product(*near)]
    assert budget - sum(c * v for c, v in zip(cost, found, strict=True)) == budget - max(
        s for s in spent if s <= budget
    )


def test_rounding_without_room_for_the_tables_is_greedy_and_under_the_budget(monkeypatch):
    monkeypatch.setattr(allocation, "_MAX_TABLE_BITS", 0)
    # What is left of 14 is 5: the item of cost 4 comes first and fits, nothing else does.
    assert round_quotas(np.array([1.9, 1.8, 1.7]), [1] * 3, [9] * 3, [4, 2, 3], 14) == [2, 1, 1]


# --- ties


def test_tie_groups_and_presets():
    names = ["a.0.q_proj", "a.0.k_proj", "a.0.o_proj", "a.1.q_proj", "a.1.k_proj", "a.1.v_proj"]
    assert tie_groups(names, (("q_proj", "k_proj", "v_proj"),)) == [[0, 1], [2], [3, 4, 5]]
    assert tie_groups(names, ("qkv",)) == [[0, 1], [2], [3, 4, 5]]
    assert tie_groups(["x.key", "x.query", "x.dense"], ("qkv",)) == [[0, 1], [2]]
    assert tie_groups(["m.gate_proj", "m.down_proj", "m.up_proj"], ("gate_up",)) == [[0, 2], [1]]
    assert tie_groups(names, None) == [[i] for i in range(6)]


@pytest.mark.parametrize(
    ("tie", "message"),
    [
        (["qvk"], "'qvk' is neither a preset"),
        (["q_proj", "k_proj"], "'q_proj' is neither a preset"),
        ([["o_proj", "q_proj"]], r"\['o_proj', 'q_proj'\] ties nothing"),
        ("gate_up", "'gate_up' ties nothing"),
        (
            ["qkv", ["query", "dense"]],
            r"\['query', 'dense'\] ties nothing",
        ),
        (["qkv", ["query", "key"]], "ties encoder.layer.0.attention.self.query, which is tied already"),
        (3, "tie must be a list"),
        ([3], "tie must be a list"),
        ([[3, 4]], "tie"),
    ],
)
def test_bad_ties_are_named(tie, message):
    with pytest.raises(BudgetError, match=message):
        allocate(encoder_report(), average_rank=4, tie=tie)


def test_tied_matrices_share_a_rank_and_the_mean_score():
    # Equal weights and equal top-k and effective rank: theta grows with the trace alone. Traces 1 and 3 are tied: 2.
    report = make_report({"b.q": (1, 1, 8), "b.k": (3, 1, 8), "b.o": (2, 1, 8)})
    plan = allocate(report, total_rank=12, scores="global", tie=[["q", "k"]])
    assert plan.ranks == {"b.q": 4, "b.k": 4, "b.o": 4}
    assert allocate(report, total_rank=12, scores="global").ranks == {"b.q": 2, "b.k": 6, "b.o": 4}


@pytest.mark.parametrize("budget", [{"total_rank": 100}, {"total_parameters": 10_000}])
def test_qkv_tie_in_every_layer(budget):
    plan = allocate(encoder_report(), **budget, tie="qkv")
    for layer in range(6):
        assert len({plan.ranks[f"encoder.layer.{layer}.attention.self.{p}"] for p in ("query", "key", "value")}) == 1
    assert plan.budget.left_over >= 0


# --- allocate


def test_allocate_by_hand():
    # Fused scores of the four matrices (see above) over their sum 3.41421, times 16: 2, 2.83, 5.17, 6.
    assert list(allocate(four_matrices(), total_rank=16).ranks.values()) == [2, 3, 5, 6]
    # Equal weights: 16 * (0.5, 0.75, 1.25, 1.5) / 4.
    assert list(allocate(four_matrices(), average_rank=4, weights="equal").ranks.values()) == [2, 3, 5, 6]
    # 16 * (1, 1, 3, 3) / 8, and 16 * (0.5, 1, 1, 1.5) / 4.
    assert list(allocate(four_matrices(), total_rank=16, scores="global").ranks.values()) == [2, 2, 6, 6]
    assert list(allocate(four_matrices(), total_rank=16, scores="local").ranks.values()) == [2, 4, 4, 6]


def test_progressive_allocation_of_the_paper():
    report = make_report({f"m{i}": (trace, 1, 8) for i, trace in enumerate([4, 9, 5, 8, 6, 7])})
    plan = allocate(report, average_rank=5, strategy="progressive", scores="global")
    assert list(plan.ranks.values()) == [4, 6, 4, 6, 5, 5]


def test_progressive_steps_are_multiples():
    report = make_report({f"m{i}": (trace, 1, 8) for i, trace in enumerate([3, 2, 1])})
    plan = allocate(report, average_rank=16, strategy="progressive", scores="global", multiple=8)
    assert list(plan.ranks.values()) == [24, 16, 8]


def test_temper():
    # Traces 1, 1, 3, 3 squared: 20 * (1, 1, 9, 9) / 20.
    report = four_matrices()
    assert list(allocate(report, total_rank=20, scores="global", temper=2).ranks.values()) == [1, 1, 9, 9]
    for strategy in ("scaled", "progressive"):
        assert list(allocate(report, average_rank=7, temper=0, strategy=strategy).ranks.values()) == [7, 7, 7, 7]


def test_equal_matrices_get_equal_ranks():
    report = make_report({f"m{i}": (2.5, 0.1, 7) for i in range(5)})
    for keywords in ({}, {"weights": "equal"}, {"scores": "local"}, {"strategy": "progressive"}):
        assert set(allocate(report, average_rank=3, **keywords).ranks.values()) == {3}


def test_a_model_without_sensitivity_gets_equal_ranks():
    report = make_report({f"m{i}": (0, 0, 0) for i in range(5)})
    assert set(allocate(report, average_rank=3, temper=2.0).ranks.values()) == {3}


def test_average_rank_is_rounded_down_once():
    report = make_report({f"m{i}": (1, 1, 1) for i in range(100)})
    assert allocate(report, average_rank=4.35).budget.used == 435  # 4.35 * 100 is 434.99999999999994
    assert allocate(report, average_rank=4.359).budget.used == 435


def test_parameter_budget_counts_both_matrices_of_the_adapter():
    shapes = {"a": (8, 8), "b": (24, 8)}
    # One rank costs 16 and 32. Equal scores: lam * (16 + 32) = 96.
    plan = allocate(make_report({"a": (1, 1, 1), "b": (1, 1, 1)}, shapes), total_parameters=96)
    assert plan.ranks == {"a": 2, "b": 2}
    assert (plan.budget.used, plan.budget.left_over, plan.parameters) == (96, 0, 96)
    # 100 cannot be met: every cost is a multiple of 16.
    plan = allocate(make_report({"a": (1, 1, 1), "b": (1, 1, 1)}, shapes), total_parameters=100)
    assert (plan.budget.used, plan.budget.left_over) == (96, 4)


def test_multiples_and_bounds():
    plan = allocate(four_matrices(), total_rank=50, multiple=4, min_rank=3, max_rank=23)
    assert all(rank % 4 == 0 and 4 <= rank <= 20 for rank in plan.ranks.values())
    assert (plan.budget.used, plan.budget.left_over) == (48, 2)


def test_min_rank_zero_lets_a_matrix_go_without():
    report = make_report({"a": (0, 1, 1), "b": (1, 1, 1)})
    assert allocate(report, total_rank=4, scores="global", min_rank=0).ranks == {"a": 0, "b": 4}


def llama_report(width: int, narrow: int, wide: int) -> SensitivityReport:
    shapes = {}
    for layer in range(32):
        for name, shape in {
            "q_proj": (width, width),
            "k_proj": (narrow, width),
            "v_proj": (narrow, width),
            "o_proj": (width, width),
            "gate_proj": (wide, width),
            "up_proj": (wide, width),
            "down_proj": (width, wide),
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    rng = np.random.default_rng(0)
    metrics = {name: (*rng.lognormal(size=2), int(rng.integers(1, 4000))) for name in shapes}
    return make_report(metrics, shapes)


@pytest.mark.parametrize(
    ("widths", "left_over"),
    [((4096, 1024, 14336), 20_000_000 % 1024), ((4097, 1031, 14341), 0)],
    ids=["costs that are multiples of 1024", "costs without a common divisor"],
)
def test_large_models_meet_a_parameter_budget_quickly(widths, left_over):
    report = llama_report(*widths)
    start = time.perf_counter()
    plan = allocate(report, total_parameters=20_000_000)
    assert plan.budget.left_over == left_over
    assert time.perf_counter() - start < 10


def test_from_a_calibrated_model():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50))
    batch = {"input_ids": torch.arange(48).reshape(4, 12), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    report = calibrate(model, [batch], progress=False)
    plan = allocate(report, total_parameters=4000)
    assert list(plan.ranks) == list(report)
    assert plan.fingerprint == fingerprint(model)
    # Every cost is 64 or 96, so a multiple of 32 is spent.
    assert (plan.budget.used, plan.budget.left_over) == (4000, 0)
    # Projections of one input have one diagonal, and so ranks that differ by rounding at most.
    for layer in range(2):
        names = [f"encoder.layer.{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        assert len({plan.matrices[name].score_fused for name in names}) == 1
        ranks = [plan.ranks[name] for name in names]
        assert max(ranks) - min(ranks) <= 1


def test_scaling_rules():
    report = four_matrices()
    assert set(map(allocate(report, total_rank=16, scaling=2.0).scaling_of, report)) == {2.0}
    by_alpha = allocate(report, total_rank=16, alpha=12)
    assert [by_alpha.scaling_of(name) for name in report] == [12 / 2, 12 / 3, 12 / 5, 12 / 6]
    rank_stabilised = allocate(report, total_rank=16, alpha=12, use_rslora=True)
    assert rank_stabilised.scaling_of("m1") == 12 / math.sqrt(3)


# --- properties

METRIC = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


@st.composite
def requests(draw, equal_shapes=False):
    """A report and arguments whose budget can be met."""
    count = draw(st.integers(1, 10))
    sizes = st.sampled_from([8, 12, 33, 64])
    shapes = [(draw(sizes), draw(sizes)) for _ in range(1 if equal_shapes else count)] * (
        count if equal_shapes else 1
    )
    metrics = [(draw(METRIC), draw(METRIC), draw(st.integers(0, 64))) for _ in range(count)]
    multiple = draw(st.sampled_from([1, 1, 2, 4]))
    min_rank = draw(st.integers(0, 5))
    max_rank = draw(st.one_of(st.none(), st.integers(8, 40)))
    names = [f"layer.{i}.proj" for i in range(count)]
    lower = -(-min_rank // multiple) * multiple
    upper = [min(*shape, max_rank or 64) // multiple * multiple for shape in shapes]
    kind = draw(st.sampled_from(["total_rank", "total_parameters"]))
    costs = [sum(shape) if kind == "total_parameters" else 1 for shape in shapes]
    least, most = lower * sum(costs), sum(c * high for c, high in zip(costs, upper, strict=True))
    budget = draw(st.integers(max(least, 1), most))
    arguments = {
        kind: budget,
        "multiple": multiple,
        "min_rank": min_rank,
        "max_rank": max_rank,
        "strategy": draw(st.sampled_from(["scaled", "progressive"])),
        "weights": draw(st.sampled_from(["cv", "equal"])),
        "scores": draw(st.sampled_from(["fused", "global", "local"])),
        "temper": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        "classes": draw(st.integers(1, 4)),
    }
    report = make_report(dict(zip(names, metrics, strict=True)), dict(zip(names, shapes, strict=True)))
    return report, arguments, lower, dict(zip(names, upper, strict=True)), budget


@few
@given(requests())
def test_budget_kept_bounds_kept_and_the_same_twice(request):
    report, arguments, lower, upper, budget = request
    plan = allocate(report, **arguments)
    assert allocate(report, **arguments) == plan
    for name, rank in plan.ranks.items():
        assert lower <= rank <= upper[name]
        assert rank % arguments["multiple"] == 0
    by_parameters = "total_parameters" in arguments
    used = sum(rank * (sum(report[name].shape) if by_parameters else 1) for name, rank in plan.ranks.items())
    assert used == plan.budget.used == budget - plan.budget.left_over
    assert plan.budget.left_over >= 0
    if not by_parameters:
        # Ranks all cost the same, so less than one multiple is left: exact where multiple is 1.
        assert plan.budget.left_over == budget % arguments["multiple"]


@few
@given(requests(equal_shapes=True))
def test_a_higher_score_never_gets_a_lower_rank(request):
    report, arguments, *_ = request
    plan = allocate(report, **arguments)
    score = f"score_{arguments['scores']}"
    ordered = sorted(plan.matrices.values(), key=lambda entry: getattr(entry, score))
    for low, high in itertools.pairwise(ordered):
        if getattr(low, score) < getattr(high, score) and arguments["temper"] > 0:
            assert low.rank <= high.rank


@few
@given(requests(), st.randoms(use_true_random=False))
def test_permutation_equivariant(request, random):
    report, arguments, *_ = request
    names = list(report)
    random.shuffle(names)
    shuffled = make_report(
        {name: (report[name].trace, report[name].topk_mean, report[name].effective_rank) for name in names},
        {name: report[name].shape for name in names},
    )
    plan, other = allocate(report, **arguments), allocate(shuffled, **arguments)
    for name in names:
        assert plan.matrices[name].score_fused == other.matrices[name].score_fused
    scores = [getattr(entry, f"score_{arguments['scores']}") for entry in plan.matrices.values()]
    if len(set(scores)) == len(scores) and arguments["temper"] > 0:  # otherwise ties break by module order
        assert {name: other.ranks[name] for name in plan.ranks} == plan.ranks


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of average_rank, total_rank, total_parameters, not none of them"),
        ({"average_rank": 4, "total_rank": 16}, "not average_rank and total_rank"),
        ({"total_rank": 3}, "total_rank gives 3 ranks, below the 4 that min_rank 1 .* on 4 matrices"),
        ({"average_rank": 0.2, "min_rank": 0}, "gives 0 ranks, below the 1"),
        ({"total_rank": 257}, "total_rank gives 257 ranks, above the 256 that the shapes of the 4 matrices"),
        ({"total_rank": 41, "max_rank": 10}, "above the 40 .* max_rank 10"),
        ({"total_parameters": 4 * 64 * 128 + 1}, "above the 32,768"),
        ({"total_parameters": 100}, "total_parameters gives 100 parameters, below the 512"),
        ({"average_rank": 0}, "average_rank: must be a finite number above 0, not 0"),
        ({"average_rank": float("nan")}, "average_rank: must be a finite number above 0, not nan"),
        ({"average_rank": "4"}, "average_rank: must be a finite number above 0, not '4'"),
        ({"total_rank": 16.5}, "total_rank: must be a whole number, not 16.5"),
        ({"total_rank": True}, "total_rank: must be a finite number above 0, not True"),
        ({"average_rank": 4, "strategy": "fair"}, "strategy: .*'scaled' or 'progressive', not 'fair'"),
        ({"average_rank": 4, "weights": "one"}, "weights: .*'cv' or 'equal', not 'one'"),
        ({"average_rank": 4, "scores": "both"}, "scores: .*'fused', 'global' or 'local', not 'both'"),
        ({"average_rank": 4, "temper": -1}, "temper: .*greater than or equal to 0, not -1"),
        ({"average_rank": 4, "temper": float("nan")}, "temper: .*finite number, not nan"),
        ({"average_rank": 4, "temper": float("inf")}, "temper: .*finite number, not inf"),
        ({"average_rank": 4, "multiple": 0}, "multiple: .*greater than or equal to 1, not 0"),
        ({"average_rank": 4, "multiple": 1.5}, "multiple: .*integer, not 1.5"),
        ({"average_rank": 4, "classes": 0}, "classes: .*greater than or equal to 1, not 0"),
        ({"average_rank": 4, "min_rank": -1}, "min_rank: .*greater than or equal to 0, not -1"),
        ({"average_rank": 4, "max_rank": 0}, "max_rank: .*greater than or equal to 1, not 0"),
        ({"average_rank": 4, "min_rank": 6, "max_rank": 5}, "max_rank 5 is below min_rank 6"),
        ({"average_rank": 4, "scaling": 0}, "scaling: .*greater than 0, not 0"),
        ({"average_rank": 4, "scaling": float("nan")}, "scaling: "),
        ({"average_rank": 4, "alpha": -2}, "alpha: .*greater than 0, not -2"),
        ({"average_rank": 4, "alpha": 2, "scaling": 2}, "scaling 2 and alpha 2 contradict"),
        ({"average_rank": 4, "use_rslora": True}, "use_rslora needs alpha"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(BudgetError, match=message) as caught:
        allocate(four_matrices(), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", [{"average_rank": 8}, {"total_rank": 32}, {"total_parameters": 4096}])
def test_whole_numbers_may_be_numpys(budget):
    options = {**budget, "min_rank": 2, "max_rank": 20, "multiple": 2, "classes": 2}
    numpys = {name: np.int64(value) for name, value in options.items()}
    assert allocate(four_matrices(), **numpys) == allocate(four_matrices(), **options)


def test_a_matrix_too_small_for_min_rank_is_named():
    report = make_report({"wide": (1, 1, 1), "head": (1, 1, 1)}, {"wide": (64, 64), "head": (2, 64)})
    with pytest.raises(RankError, match="min_rank 4 in multiples of 1 does not fit head, which allows ranks up to 2"):
        allocate(report, average_rank=8, min_rank=4)
    with pytest.raises(RankError, match="min_rank 1 in multiples of 8 does not fit head"):
        allocate(report, average_rank=8, multiple=8)


class FakeReport(dict):
    """Only as much of a report as is read before it is refused; a real one refuses these numbers itself."""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("metric", ["trace", "topk_mean", "effective_rank"])
def test_a_bad_metric_is_named(metric, value):
    class Entry:
        trace, topk_mean, effective_rank, shape, expert_of = 1.0, 1.0, 1, (8, 8), None

    bad = Entry()
    setattr(bad, metric, value)
    with pytest.raises(NonFiniteError, match=f"{metric} of b is {value}"):
        allocate(FakeReport(a=Entry(), b=bad), average_rank=2)


def test_an_empty_report_is_refused():
    with pytest.raises(BudgetError, match="holds no matrix"):
        allocate(FakeReport(), average_rank=2)


def test_experts_get_no_rank_and_have_no_part_in_the_scores():
    plain = four_matrices()
    expert = MatrixSensitivity(
        shape=(8, 8), trace=1e6, topk_mean=1e6, effective_rank=9, tokens=9, calls=1, expert_of="mlp.experts.down_proj"
    )
    both = dataclasses.replace(plain, matrices={"mlp.experts.down_proj.0": expert, **plain.matrices})
    with pytest.warns(UserWarning, match="1 of the 5 matrices in the report are experts .* they get no rank"):
        assert allocate(both, average_rank=8) == allocate(plain, average_rank=8)
    alone = dataclasses.replace(plain, matrices={"mlp.experts.down_proj.0": expert})
    with pytest.raises(BudgetError, match="holds only experts, which can hold no adapter"):
        allocate(alone, average_rank=8)


def test_errors_are_the_packages_own():
    assert issubclass(BudgetError, SensiloraError)
    assert issubclass(BudgetError, ValueError)


def test_warns_of_a_matrix_that_gets_more_than_all_others():
    metrics = {f"layer.{i}": (1.0, 0.1, 10) for i in range(4)} | {"pooler": (1000.0, 100.0, 10)}
    with pytest.warns(UserWarning, match=r"pooler gets \d+ of all 20 ranks, more than the other 4 .* give max_rank"):
        allocate(make_report(metrics), average_rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocate(make_report(metrics), average_rank=4, max_rank=17)
        allocate(make_report(metrics), total_rank=3, min_rank=0)  # fewer than there are matrices
        # Of two matrices one as a rule has more than half.
        allocate(make_report({"a": (1.0, 0.1, 10), "b": (4.0, 1.0, 10)}), average_rank=4)
