"""Comparisons of arms: statistics, equal budgets, runs side by side against one by one, going on after a kill."""

import json
import math
import random
import sys
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats

from sensilora import cli, compare, mixed
from sensilora.allocation import allocate
from sensilora.cli import main
from sensilora.compare import (
    PERMUTED,
    PLAN,
    UNIFORM,
    Comparison,
    Difference,
    Run,
    Settings,
    classification_metrics,
    permuted_ranks,
    regression_metrics,
    run_compare,
    uniform_ranks,
)
from sensilora.data import Row
from sensilora.errors import (
    BudgetError,
    DataError,
    ModelError,
    NonFiniteError,
    OutputExistsError,
    PlanError,
    SensiloraError,
)
from sensilora.integrations.transformers import collate
from sensilora.plan import RankPlan
from sensilora.targets import find_targets, fingerprint, matrix_shape
from tests import tiny_models
from tests.reports import encoder_report

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUICK = {"classes": [0, 1], "seeds": 2, "epochs": 1, "batch_size": 5, "average_rank": 2, "progress": False}


def rows(count, seed=0):
    return [Row((text,), label) for text, label in tiny_models.sentences(count, seed)]


@pytest.fixture
def model(tmp_path):
    return tiny_models.bert(tmp_path / "model", **NO_DROPOUT)


@pytest.fixture(scope="module")
def plan():
    return allocate(encoder_report(), average_rank=4)


def settings(**changes):
    fields = {
        "model": "m", "classes": (0, 1), "metric": "accuracy", "plan_hash": None, "average_rank": 4, "seeds": 3,
        "seed": 0, "epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "warmup": 0.1, "weight_decay": 0.0,
        "dropout": 0.0, "max_length": 32, "serial": False, "device": "cpu", "dtype": "auto",
    }  # fmt: skip
    return Settings(**{**fields, **changes})


def made_up(values):
    """A comparison whose runs have these accuracies, by arm."""
    records = {
        Run(arm, seed): {
            "metrics": dict.fromkeys(settings().metrics, value),
            "adapter_parameters": 100,
            "seconds": 1.0,
            "peak_memory_bytes": 2**20,
            "side_by_side": 1,
        }
        for arm, own in values.items()
        for seed, value in enumerate(own)
    }
    return Comparison(settings(seeds=len(values[PLAN])), records)


# Metrics and statistics


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_matthews_of_two_classes_is_the_usual_formula(pairs):
    gold, predicted = zip(*pairs, strict=True)
    (tn, fp), (fn, tp) = (tuple(pairs.count((g, p)) for p in (0, 1)) for g in (0, 1))
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(spread) if spread else 0.0
    found = classification_metrics(gold, predicted, binary=True)
    assert found["matthews"] == pytest.approx(expected, abs=1e-12)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
    assert found["accuracy"] == (tp + tn) / len(pairs)


def test_matthews_of_three_classes():
    # Gorodkin's R_K as the correlation of one-hot matrices.
    draw = np.random.default_rng(0)
    gold, predicted = draw.integers(0, 3, (2, 50))
    x, y = (np.eye(3)[labels] - np.eye(3)[labels].mean(0) for labels in (gold, predicted))
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert classification_metrics(gold.tolist(), predicted.tolist())["matthews"] == pytest.approx(expected)


def test_regression_metrics_are_scipys_and_0_where_undefined():
    draw = np.random.default_rng(1)
    gold, predicted = draw.integers(0, 5, 30).tolist(), draw.normal(size=30).tolist()
    found = regression_metrics(gold, predicted)
    assert found["pearson"] == pytest.approx(stats.pearsonr(gold, predicted).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(gold, predicted).statistic)
    assert regression_metrics(gold, [1.0] * 30) == {"pearson": 0.0, "spearman": 0.0}


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    first, second = zip(*pairs, strict=True)
    found = Difference.of(UNIFORM, first, second)
    spread = np.std(np.subtract(first, second), ddof=1)
    assert found.mean == pytest.approx(np.mean(np.subtract(first, second)), abs=1e-12)
    assert found.standard_error == pytest.approx(spread / math.sqrt(len(pairs)), abs=1e-12)
    if spread > 1e-6:
        low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
        assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = random.Random(0)
    noise = NormalDist()
    hits = 0
    for _ in range(800):
        first = [0.3 + noise.inv_cdf(draw.random()) for _ in range(4)]
        found = Difference.of(UNIFORM, first, [0.0] * 4)
        hits += found.low <= 0.3 <= found.high
    assert abs(hits / 800 - 0.95) < 0.03


def test_verdicts():
    level, ahead = [0.70, 0.72, 0.71, 0.73], [0.80, 0.83, 0.80, 0.84]
    noisy = [0.72, 0.71, 0.70, 0.74]
    nothing = made_up({UNIFORM: level, PLAN: noisy}).verdict()
    assert nothing.startswith(
        "No difference beyond noise between the plan and uniform LoRA: +0.25 points of accuracy"
    )
    assert "4 seeds" in nothing
    won = made_up({UNIFORM: level, PLAN: ahead, PERMUTED: level}).verdict()
    assert "ahead of uniform LoRA by 10.25 points" in won
    assert "ahead of permuted ranks" in won
    lost = made_up({UNIFORM: ahead, PLAN: level}).verdict()
    assert "The plan is behind uniform LoRA by 10.25 points" in lost
    chance = made_up({UNIFORM: [0.7, 0.8], PLAN: [0.75, 0.85]})
    assert chance.differences()[0].sign == 0
    assert "differ by +5.00 points of accuracy in each of 2 seeds, which says nothing" in chance.verdict()
    equal = made_up({UNIFORM: level, PLAN: level})
    assert equal.differences()[0].sign == 0
    assert "have the same accuracy in each of 4 seeds, which says nothing about the noise" in equal.verdict()
    by_shape = made_up({UNIFORM: level, PLAN: ahead, PERMUTED: [0.81, 0.82, 0.79, 0.85]}).verdict()
    assert "not from which matrix got which rank" in by_shape
    # Of a difference that is the same in every seed nothing follows.
    for permuted in (ahead, [value - 0.05 for value in ahead]):
        unknown = made_up({UNIFORM: level, PLAN: ahead, PERMUTED: permuted}).verdict()
        assert "says nothing about the noise" in unknown
        assert "which matrix got which rank" not in unknown


# Arms


@given(st.integers(0, 2**32))
def test_permuted_ranks_keep_parameters_and_what_each_shape_has(plan, seed):
    permuted = plan.with_ranks(permuted_ranks(plan, seed))
    assert permuted.parameters == plan.parameters
    for entries in (plan.matrices, permuted.matrices):
        assert all(entry.rank <= min(entry.shape) for entry in entries.values())
    by_shape = [
        sorted((sorted(entry.shape), entry.rank) for entry in entries.values())
        for entries in (plan.matrices, permuted.matrices)
    ]
    assert by_shape[0] == by_shape[1]
    assert permuted_ranks(plan, seed) == permuted_ranks(plan, seed)


def test_permutations_differ_from_seed_to_seed(plan):
    assert len({tuple(permuted_ranks(plan, seed).values()) for seed in range(5)}) == 5


@pytest.mark.parametrize("budget", [{"average_rank": 4}, {"total_rank": 150}, {"total_parameters": 30_011}])
def test_uniform_ranks_have_the_plans_parameters(budget):
    plan = allocate(encoder_report(), **budget)
    uniform = uniform_ranks(plan)
    assert plan.with_ranks(uniform).parameters == plan.parameters
    assert max(uniform.values()) - min(uniform.values()) <= 2


def test_a_uniform_plan_is_refused():
    shapes = {"a.q": (8, 8), "a.k": (8, 8)}
    with pytest.raises(PlanError, match="the rank of uniform LoRA"):
        compare.arm_plans(RankPlan.uniform(shapes, 2), settings())


def test_the_permuted_arm_is_left_out_where_it_is_the_plan():
    plan = RankPlan.uniform({"a.q": (8, 8), "a.v": (8, 16)}, 3).with_ranks({"a.q": 6, "a.v": 1})
    assert {run.arm for run in compare.arm_plans(plan, settings())} == {UNIFORM, PLAN}


# Training


def small_task(model, **changes):
    return compare.prepare(settings(model=str(model), **changes), rows(40), rows(12, 9), None)


def test_rows_make_the_batches_that_collate_makes():
    examples = [
        {"input_ids": [2, 7, 3], "token_type_ids": [0, 0, 1], "labels": 1},
        {"input_ids": [2, 3], "token_type_ids": [0, 1], "labels": 0},
        {"input_ids": [2, 5, 6, 8, 3], "token_type_ids": [0] * 5, "labels": 1},
    ]
    found = compare.Rows(examples, 9, torch.device("cpu"))
    for places in ([1, 0], [2], [0, 1, 2, 1]):
        expected = collate([examples[place] for place in places], 9)
        batch = found.padded(places)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], value) for key, value in expected.items())


def test_orders_hold_every_row_once_and_rows_of_like_length_together(model):
    task = small_task(model, batch_size=2)
    lengths = task.train.lengths
    orders = [compare._order(task, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(row for batch in order for row in batch) == list(range(40))
    assert len({str(order) for order in orders}) == 4
    for first, second in zip(orders[0], orders[2], strict=True):
        # Of two seeds, batches that come together are from one chunk of 16.
        assert len(first) == len(second)
        chunks = [
            {sorted(range(40), key=lengths.__getitem__).index(row) // 16 for row in batch}
            for batch in (first, second)
        ]
        assert chunks[0] == chunks[1]
        assert len(chunks[0]) == 1


@pytest.mark.filterwarnings("ignore:the head .* looks new:UserWarning")
def test_stacked_adapters_are_the_mixed_ones(model, device):
    task = small_task(model, device=device)
    tolerance = 1e-4 if device == "cpu" else 1e-2
    shapes = {name: matrix_shape(module) for name, module in find_targets(task.model).items()}
    uniform = RankPlan.uniform(shapes, 2, fingerprint=fingerprint(task.model))
    some = list(shapes)[::2]
    plans = {
        Run("a", 0): uniform.with_ranks(dict.fromkeys(some, 3)),
        Run("b", 0): uniform.with_ranks(dict.fromkeys(some, 0)),
        Run("c", 1): uniform,
    }
    batch = task.train.padded(range(6))
    labels = batch.pop("labels")
    with compare._prepared(task, plans, {}) as (layout, pieces):
        with torch.no_grad():
            for own in pieces.values():
                for name, piece in own.items():
                    if name.endswith("lora_B"):
                        piece.parameter[piece.rows].normal_()
        task.model.eval()
        layout.rows, layout.only = len(labels), None
        states = {
            run: {name: piece.parameter[piece.rows].detach().clone() for name, piece in own.items()}
            for run, own in pieces.items()
        }
        together = task.model(**batch).logits.detach()
        alone = []
        for place in range(3):
            layout.only = place
            alone.append(task.model(**batch).logits.detach()[2 * place : 2 * place + 2])
    torch.testing.assert_close(together, torch.cat(alone), rtol=tolerance, atol=tolerance)
    assert {type(module).__name__ for module in task.model.modules()}.isdisjoint({"_Stacked", "_Heads"})
    for run, plan in plans.items():
        mixed.add_adapter(task.model, run.name, plan)
        for name, parameter in mixed.adapter_parameters(task.model, run.name).items():
            value = states[run].get(name.removesuffix(f".{run.name}"))
            if value is not None:
                parameter.data.copy_(value.t() if "lora_B" in name else value)
    head = next(iter(compare.outermost_heads(task.model)))
    for place, run in enumerate(plans):
        own = {key.removeprefix(head + "."): value for key, value in states[run].items() if key.startswith(head)}
        task.model.get_submodule(head).load_state_dict(own)
        with mixed.adapter_ids(task.model, [run.name] * 6), torch.no_grad():
            expected = task.model(**batch).logits[2 * place : 2 * place + 2]
        torch.testing.assert_close(together[2 * place : 2 * place + 2], expected, rtol=tolerance, atol=tolerance)


def test_each_run_is_clipped_by_its_own_norm(model):
    task = small_task(model, weight_decay=0.1)
    shapes = {name: matrix_shape(module) for name, module in find_targets(task.model).items()}
    plan = RankPlan.uniform(shapes, 2, fingerprint=fingerprint(task.model))
    plans = {Run(PLAN, seed): plan for seed in range(3)}
    with compare._prepared(task, plans, {}) as (_, pieces):
        state = compare._State(task, pieces, None)
        draw = torch.Generator().manual_seed(0)
        sizes = (0.001, 5.0, math.nan)  # below the norm of 1, above it, and a run that diverged
        theirs = []
        for parameter in state.parameters:
            parameter.grad = torch.empty_like(parameter)
        for size, own in zip(sizes, pieces.values(), strict=True):
            copies = []
            for piece in own.values():
                gradient = size * torch.randn(piece.parameter[piece.rows].shape, generator=draw)
                piece.parameter.grad[piece.rows] = gradient
                copies.append(torch.nn.Parameter(piece.parameter[piece.rows].detach().clone()))
                copies[-1].grad = gradient.clone()
            torch.nn.utils.clip_grad_norm_(copies, 1.0)
            torch.optim.AdamW(copies, lr=0.01, weight_decay=0.1).step()
            theirs.append(copies)
        state.update(0.01)
        for own, copies in zip(list(pieces.values())[:2], theirs, strict=False):
            for piece, expected in zip(own.values(), copies, strict=True):
                torch.testing.assert_close(piece.parameter[piece.rows], expected, rtol=1e-5, atol=1e-7)
        assert all(piece.parameter[piece.rows].isnan().all() for piece in pieces[Run(PLAN, 2)].values())


def test_a_layer_that_does_not_see_the_batch_is_told(model):
    layout = compare._Layout(2)
    layout.rows = 6
    with pytest.raises(SensiloraError, match=r"a layer got 4 rows of a batch of 6.*--serial"):
        layout.segments(torch.zeros(4, 3))


# Whole comparisons


def test_a_comparison_writes_what_it_returns(model, tmp_path):
    found = run_compare(tmp_path / "out", model, rows(23), rows(12, 9), **QUICK)
    assert found.arms == [UNIFORM, PLAN, PERMUTED]
    assert len(found.records) == 6
    assert len({record["adapter_parameters"] for record in found.records.values()}) == 1
    assert all(record["seconds"] > 0 and record["peak_memory_bytes"] > 0 for record in found.records.values())
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result == json.loads(json.dumps(found.as_dict()))
    assert result["verdict"] == found.verdict()
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    runs = {f"{arm}_{seed}.json" for arm in (UNIFORM, PLAN, PERMUTED) for seed in (0, 1)}
    assert names == {"settings.json", "plan.json", "result.json", *runs}
    plan = RankPlan.load(tmp_path / "out" / "plan.json")
    assert found.records[Run(PLAN, 1)]["ranks"] == plan.ranks
    assert set(found.records[Run(UNIFORM, 0)]["ranks"].values()) == {2}


def trained(model, folder, serial, monkeypatch, steps=4, **changes):
    """Records, and every run's losses, parameters and moments at the end."""
    tensors = {}
    save = compare._State.save

    def keep(state):
        save(state)
        tensors.update(load_file(state.file))

    monkeypatch.setattr(compare._State, "save", keep)
    options = {**QUICK, "learning_rate": 5e-3, **changes}
    found = run_compare(folder, model, rows(steps * 5 - 2), rows(40, 9), serial=serial, **options)
    return found, {key: value for key, value in tensors.items() if key != "progress"}


@pytest.mark.parametrize("kind", ["encoder", "decoder", "eva"])
def test_side_by_side_is_serial(kind, tmp_path, monkeypatch, device):
    folder = tmp_path / "model"
    model = tiny_models.llama(folder) if kind == "decoder" else tiny_models.bert(folder, **NO_DROPOUT)
    # A tiny random Llama's plan is uniform at lower ranks.
    options = {"average_rank": 10 if kind == "decoder" else 4, "device": device}
    if kind == "eva":
        pytest.importorskip("peft")
        options["arms"] = (UNIFORM, PLAN, compare.EVA_START)
    count = 2 * len(options.get("arms", compare.DEFAULT_ARMS))
    together, ours = trained(model, tmp_path / "a", False, monkeypatch, **options)
    alone, theirs = trained(model, tmp_path / "b", True, monkeypatch, **options)
    assert ours.keys() == theirs.keys()
    assert len({key.split("/")[0] for key in ours}) == count
    for key, value in ours.items():
        # AdamW's first steps are the sign of the gradient times the rate, whatever the gradient's size.
        torch.testing.assert_close(
            value, theirs[key], rtol=2e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
        if key.endswith("/losses"):
            rtol = 1e-5 if device == "cpu" else 1e-4
            torch.testing.assert_close(value, theirs[key], rtol=rtol, atol=0.1 * rtol)
    for run, record in together.records.items():
        assert record["metrics"] == pytest.approx(alone.records[run]["metrics"], abs=0.03)
        assert record["side_by_side"] == count
        assert alone.records[run]["side_by_side"] == 1
    # Runs are not copies of one another.
    assert len({tuple(value.tolist()) for key, value in ours.items() if key.endswith("/losses")}) == count


def test_side_by_side_is_serial_with_dropout_on_average(tmp_path, monkeypatch):
    model = tiny_models.bert(tmp_path / "model")
    means = []
    for serial in (False, True):
        _, tensors = trained(model, tmp_path / str(serial), serial, monkeypatch, steps=6, dropout=0.3, epochs=2)
        means.append(torch.stack([value for key, value in tensors.items() if key.endswith("/losses")]).mean())
    assert means[0] != means[1]
    assert abs(means[0] - means[1]) < 0.1


def test_learning_happens(model, tmp_path):
    options = {**QUICK, "epochs": 12, "batch_size": 16, "learning_rate": 1e-2}
    found = run_compare(tmp_path / "out", model, rows(96), rows(40, 9), **options)
    assert min(np.mean(found.values(arm)) for arm in found.arms) > 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_and_heads_are_fp32_at_least(dtype, model, tmp_path, monkeypatch, device):
    _, tensors = trained(model, tmp_path / "out", False, monkeypatch, steps=2, dtype=dtype, device=device)
    wanted = torch.promote_types(dtype, torch.float32)
    for key, value in tensors.items():
        if "classifier" in key and not key.endswith("/step"):
            assert value.dtype == wanted, key
        if "lora" in key and not key.endswith("/step"):
            assert value.dtype in (torch.float32, torch.float64), key
        assert value.isfinite().all(), key


def test_too_little_memory_is_told(model, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(compare, "_losses", full)
    with pytest.raises(SensiloraError, match="one after another with --serial"):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **QUICK)


class Killed(BaseException):
    pass


def test_arms_of_peft(model, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    options = {**QUICK, "epochs": 2, "average_rank": 4, "arms": list(compare.TITLES)}
    evaluate, calls = compare._evaluate, []

    def kill(task, layout, place):
        calls.append(layout.runs)
        if calls.count(1) == 2:  # the second of AdaLoRA's
            raise Killed
        return evaluate(task, layout, place)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "_evaluate", kill)
        with pytest.raises(Killed):
            run_compare(tmp_path / "out", model, rows(23), rows(12, 9), **options)
    assert not (tmp_path / "out" / "runs" / "adalora_1.json").exists()
    found = run_compare(tmp_path / "out", model, rows(23), rows(12, 9), **options)
    assert found.arms == list(compare.TITLES)
    assert len(found.records) == 14
    plan = RankPlan.load(tmp_path / "out" / "plan.json")
    largest = max(sum(entry.shape) for entry in plan.matrices.values())
    for run, record in found.records.items():
        assert plan.parameters - 2 * largest < record["adapter_parameters"] <= plan.parameters, run
        assert record["head_parameters"] == found.records[Run(PLAN, 0)]["head_parameters"]
        assert record["ranks"].keys() == plan.matrices.keys()
        assert record["side_by_side"] == (1 if run.arm == compare.ADALORA else 12)
    assert found.records[Run(compare.ADALORA, 0)]["initial_parameters"] > plan.parameters
    assert found.records[Run(compare.EVA, 0)]["ranks"] == found.records[Run(compare.EVA_RANKS, 1)]["ranks"]
    assert found.records[Run(compare.EVA_START, 0)]["ranks"] == found.records[Run(UNIFORM, 0)]["ranks"]
    whole = run_compare(tmp_path / "whole", model, rows(23), rows(12, 9), **options)
    for run, record in whole.records.items():
        assert found.records[run]["training_loss"] == record["training_loss"], run
        assert found.records[run]["metrics"] == record["metrics"], run
    assert "AdaLoRA" in found.verdict()


def test_arms_begin_alike(model, tmp_path, monkeypatch):
    """AdaLoRA's first loss is that of the others of its seed: the same head, rows and order, and no update yet."""
    pytest.importorskip("peft")
    firsts = {}
    fit = compare._fit

    def watch(task, layout, state, *arguments):
        fit(task, layout, state, *arguments)
        firsts.update({run: float(state.losses[0, place]) for place, run in enumerate(state.pieces)})

    monkeypatch.setattr(compare, "_fit", watch)
    arms = [UNIFORM, PLAN, compare.EVA, compare.ADALORA]
    run_compare(tmp_path / "out", model, rows(43), rows(12, 9), **{**QUICK, "arms": arms})
    for seed in (0, 1):
        losses = [firsts[Run(arm, seed)] for arm in arms]
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert firsts[Run(UNIFORM, 0)] != pytest.approx(firsts[Run(UNIFORM, 1)], rel=1e-3)


def test_peft_that_is_missing_is_told(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "sensilora.integrations.adaptive", raising=False)
    monkeypatch.delattr("sensilora.integrations.adaptive", raising=False)
    with pytest.raises(SensiloraError, match=r"need peft; install it with: pip install 'sensilora\[peft\]'"):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), arms=[UNIFORM, PLAN, "eva"], **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("at", ["training", "evaluation"])
def test_a_killed_comparison_goes_on_to_the_same_numbers(tmp_path, monkeypatch, serial, at):
    model = tiny_models.bert(tmp_path / "model")  # with dropout
    options = {**QUICK, "dropout": 0.1, "serial": serial, "checkpoint_every": 3}
    whole = run_compare(tmp_path / "whole", model, rows(23), rows(12, 9), **options)
    name = "_losses" if at == "training" else "_evaluate"
    original, calls = getattr(compare, name), []

    def kill(*arguments):
        calls.append(1)
        # In the second run where there is one.
        if len(calls) == {"training": 9 if serial else 4, "evaluation": 2}[at]:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(compare, name, kill)
    with pytest.raises(Killed):
        run_compare(tmp_path / "out", model, rows(23), rows(12, 9), **options)
    assert (tmp_path / "out" / "checkpoint.safetensors").is_file()
    assert not (tmp_path / "out" / "result.json").exists()
    (tmp_path / "out" / ".checkpoint.safetensors.x.part").touch()  # as a kill while it is written leaves it
    before = len(calls)
    resumed = run_compare(tmp_path / "out", model, rows(23), rows(12, 9), **options)
    if at == "training":
        # 5 steps a run: of the 9 (4) that began before the kill 8 (3) were kept.
        assert len(calls) - before == (30 - 8 if serial else 5 - 3)
    for run, record in whole.records.items():
        again = resumed.records[run]
        assert {**again, "seconds": 0, "peak_memory_bytes": 0} == {**record, "seconds": 0, "peak_memory_bytes": 0}
    assert not list((tmp_path / "out").glob("*checkpoint*"))
    # A finished one does nothing again.
    before = len(calls)
    assert run_compare(tmp_path / "out", model, rows(23), rows(12, 9), **options).records == resumed.records
    assert len(calls) == before


def test_a_kill_between_two_records(model, tmp_path, monkeypatch):
    whole = run_compare(tmp_path / "whole", model, rows(12), rows(8, 9), **QUICK)
    write, calls = compare._files.write_text, []

    def kill(path, text):
        calls.append(path)
        if path.name == "plan_1.json":
            raise Killed
        return write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(compare._files, "write_text", kill)
        with pytest.raises(Killed):
            run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **QUICK)
    monkeypatch.setattr(compare, "_losses", None)  # nothing is trained again
    resumed = run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **QUICK)
    assert calls
    for run, record in resumed.records.items():
        assert {**record, "seconds": 0, "peak_memory_bytes": 0} == {
            **whole.records[run],
            "seconds": 0,
            "peak_memory_bytes": 0,
        }


def test_regression(model, tmp_path):
    def scored(count, seed):
        return [Row(row.texts, f"{5 * int(row.label) + 0.5}") for row in rows(count, seed)]

    options = {**QUICK, "classes": None, "epochs": 20, "learning_rate": 2e-2, "batch_size": 16}
    found = run_compare(tmp_path / "out", model, scored(64, 0), scored(30, 9), **options)
    assert found.settings.metric == "pearson"
    assert np.mean(found.values(PLAN)) > 0.35
    assert "points of pearson" in found.verdict()


@pytest.mark.parametrize(
    ("family", "config"),
    [("RobertaForSequenceClassification", {"pad_token_id": 0}), ("DistilBertForSequenceClassification", {})],
)
def test_heads_of_several_layers(family, config, tmp_path):
    made = tiny_models.family_model(family, **config)
    tiny_models.save(made, tmp_path / "model", bert=True)
    found = run_compare(tmp_path / "out", tmp_path / "model", rows(12), rows(8, 9), max_length=16, **QUICK)
    heads = {record["head_parameters"] for record in found.records.values()}
    assert heads == {sum(p.numel() for name, p in made.named_parameters() if "classifier" in name)}


def test_a_given_plan_is_the_one_compared(model, tmp_path):
    loaded = compare.load_sequence_classifier(model, labels=["0", "1"])
    shapes = {name: matrix_shape(module) for name, module in find_targets(loaded).items()}
    plan = RankPlan.uniform(shapes, 2, fingerprint=fingerprint(loaded)).with_ranks({next(iter(shapes)): 4})
    found = run_compare(tmp_path / "out", model, rows(12), rows(8, 9), plan=plan, **QUICK)
    assert found.records[Run(PLAN, 0)]["ranks"] == plan.ranks
    assert sum(len(set(found.records[Run(PERMUTED, seed)]["ranks"].values())) > 1 for seed in (0, 1)) == 2
    assert {record["adapter_parameters"] for record in found.records.values()} == {plan.parameters}


def test_another_models_plan_is_refused(model, tmp_path, plan):
    with pytest.raises(PlanError):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), plan=plan, **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_divergence_is_named(model, tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"the loss of .*, seed [01], is (nan|inf) at step \d+; lower the learning"
    ):
        run_compare(tmp_path / "out", model, rows(23), rows(8, 9), **{**QUICK, "learning_rate": 1e30})


def test_another_comparison_in_the_folder(model, tmp_path):
    out = tmp_path / "out"
    run_compare(out, model, rows(12), rows(8, 9), **QUICK)
    with pytest.raises(OutputExistsError, match="with other settings, data or weights"):
        run_compare(out, model, rows(13), rows(8, 9), **QUICK)
    found = run_compare(out, model, rows(13), rows(8, 9), force=True, **QUICK)
    assert json.loads((out / "result.json").read_text())["settings"]["data_digest"] == found.settings.data_digest


def test_a_folder_of_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(OutputExistsError, match="no comparison"):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), force=True, **QUICK)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "x"


def test_a_damaged_checkpoint_is_named(model, tmp_path, monkeypatch):
    def stop(*arguments):
        raise Killed

    monkeypatch.setattr(compare, "_evaluate", stop)
    with pytest.raises(Killed):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **QUICK)
    checkpoint = tmp_path / "out" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged"):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **QUICK)


def test_a_checkpoint_of_finished_runs_is_no_start_for_others(model, tmp_path, monkeypatch):
    options = {**QUICK, "serial": True}
    whole = run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **options)
    for file in (tmp_path / "out" / "runs").glob("p*.json"):
        file.unlink()
    save_file({"uniform_1/losses": torch.ones(3)}, tmp_path / "out" / "checkpoint.safetensors")
    again = run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **options)
    assert again.values(PLAN) == whole.values(PLAN)
    assert again.records[Run(PERMUTED, 1)]["training_loss"] == whole.records[Run(PERMUTED, 1)]["training_loss"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": 1}, "seeds must be at least 2, not 1"),
        ({"seeds": 2.0}, "seeds must be a whole number, not 2.0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"dropout": 1.5}, "dropout must be in"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or a positive number"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number"),
        ({"warmup": 1.5}, "warmup must be in"),
        ({"metric": "pearson"}, "metric 'pearson' does not fit the data; choose accuracy, macro_f1, matthews, f1"),
        ({"arms": ["uniform", "plan", "dora"]}, "there is no arm 'dora'; choose among uniform, plan"),
        ({"arms": ["plan", "permuted"]}, "uniform and plan are always among the arms"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
    ],
)
def test_arguments_out_of_range(model, tmp_path, changes, sentence):
    with pytest.raises(SensiloraError, match=sentence):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **{**QUICK, **changes})
    assert not (tmp_path / "out").exists()


def test_a_rank_that_does_not_fit_leaves_nothing(model, tmp_path):
    with pytest.raises(BudgetError, match="average_rank 33 does not fit the smallest matrix; give at most 32"):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **{**QUICK, "average_rank": 33})
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(model, tmp_path):
    with pytest.raises(SensiloraError, match="device='cuda' was asked for, and torch finds no GPU"):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), device="cuda", **QUICK)


def test_rows_without_labels(model, tmp_path):
    for metric in (None, "accuracy"):  # which fits no regression, and that is not what is wrong
        for classes in ([0, 1], None):
            options = {**QUICK, "metric": metric, "classes": classes}
            with pytest.raises(DataError, match="not yet of causal models"):
                run_compare(tmp_path / "out", model, [Row(("a film",))], rows(8, 9), **options)


def test_training_of_a_single_step(model, tmp_path):
    # A state of one loss a run has a stride that no view as bytes can have.
    found = run_compare(tmp_path / "out", model, rows(5), rows(8, 9), **QUICK)
    assert all(record["epochs"] == 1 for record in found.records.values())


def test_the_order_of_arms_is_no_other_comparison(model, tmp_path):
    arms = [PERMUTED, PLAN, UNIFORM]
    first = run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **QUICK)
    assert run_compare(tmp_path / "out", model, rows(12), rows(8, 9), arms=arms, **QUICK).settings == first.settings


def test_other_weights_in_the_models_folder_are_another_comparison(model, tmp_path):
    run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **QUICK)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    save_file({**weights, name: weights[name] + 0.01}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputExistsError, match="with other settings"):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **QUICK)


def test_a_plan_for_the_head_is_refused(model, tmp_path):
    loaded = compare.load_sequence_classifier(model, labels=["0", "1"])
    modules = find_targets(loaded, ["query", "classifier"])
    plan = RankPlan.uniform({name: matrix_shape(module) for name, module in modules.items()}, 2)
    with pytest.raises(PlanError, match="the plan adapts classifier, but a comparison trains the head 'classifier'"):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), plan=plan.with_ranks({"classifier": 1}), **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arm", [compare.ADALORA, compare.EVA])
def test_what_an_arm_of_peft_needs_is_told_before_anything_is_written(arm, model, tmp_path):
    pytest.importorskip("peft")
    loaded = compare.load_sequence_classifier(model, labels=["0", "1"])
    shapes = {name: matrix_shape(module) for name, module in find_targets(loaded).items()}
    plan = RankPlan.uniform(shapes, 2, fingerprint=fingerprint(loaded)).with_ranks({next(iter(shapes)): 4})
    plan = plan.model_copy(update={"scaling": plan.scaling.model_copy(update={"rule": "rslora"})})
    with pytest.raises(PlanError, match="the plan's scale depends on the rank"):
        run_compare(tmp_path / "out", model, rows(30), rows(8, 9), plan=plan, arms=[UNIFORM, PLAN, arm], **QUICK)
    assert not (tmp_path / "out").exists()


def test_too_few_steps_for_adalora_are_told_before_anything_is_written(model, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(PlanError, match="AdaLoRA lowers its ranks over the steps, and 2 are too few"):
        run_compare(tmp_path / "out", model, rows(8), rows(8, 9), arms=[UNIFORM, PLAN, compare.ADALORA], **QUICK)
    assert not (tmp_path / "out").exists()


def test_eva_gets_batches_with_enough_inputs_of_a_pooler(model, tmp_path):
    pytest.importorskip("peft")
    # 70 rows would be two batches of 32 and one of 6, and EVA seeks 12 directions.
    options = {**QUICK, "batch_size": 35, "average_rank": 6, "arms": [UNIFORM, PLAN, compare.EVA]}
    found = run_compare(tmp_path / "out", model, rows(70), rows(8, 9), **options)
    assert found.records[Run(compare.EVA, 0)]["adapter_parameters"] > 0


def test_outputs_that_are_no_numbers_are_told(model, tmp_path, monkeypatch):
    evaluate = compare._evaluate

    def damaged(task, layout, place):
        task.model.get_input_embeddings().weight.data[5:].fill_(3e38)
        return evaluate(task, layout, place)

    monkeypatch.setattr(compare, "_evaluate", damaged)
    with pytest.raises(NonFiniteError, match="gives NaN or Inf for rows that are held out"):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **QUICK)


def test_a_quantised_model_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "is_quantised", lambda module: True)
    with pytest.raises(ModelError, match=r"the weight of bert\.encoder.*query in .* is quantised"):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **QUICK)


def test_a_failure_while_adapters_are_added_leaves_the_model_as_it_was(model, tmp_path, monkeypatch):
    tasks, prepare, add = [], compare.prepare, mixed.add_adapter

    def prepared(*arguments):
        tasks.append(prepare(*arguments))
        return tasks[-1]

    def second_fails(model, name, plan, **options):
        if name.endswith("_1"):
            raise KeyboardInterrupt
        add(model, name, plan, **options)

    monkeypatch.setattr(compare, "prepare", prepared)
    monkeypatch.setattr(mixed, "add_adapter", second_fails)
    with pytest.raises(KeyboardInterrupt):
        run_compare(tmp_path / "out", model, rows(12), rows(8, 9), **QUICK)
    assert not [name for name, _ in tasks[0].model.named_parameters() if "lora" in name]
    assert {type(module).__name__ for module in find_targets(tasks[0].model).values()} == {"Linear"}


@pytest.mark.parametrize(("label", "sentence"), [("good", "is no number"), ("nan", "is not finite")])
def test_scores_that_are_none(model, tmp_path, label, sentence):
    with pytest.raises(DataError, match=sentence):
        run_compare(tmp_path / "out", model, [Row(("a film",), label)], rows(8), **{**QUICK, "classes": None})


def test_a_missing_model(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        run_compare(tmp_path / "out", tmp_path / "none", rows(12), rows(8, 9), **QUICK)


def test_the_picture_says_what_the_numbers_say(tmp_path):
    pytest.importorskip("matplotlib")
    found = made_up({UNIFORM: [0.7, 0.72, 0.71], PLAN: [0.75, 0.74, 0.76], PERMUTED: [0.71, 0.73, 0.7]})
    figure = found.plot(tmp_path / "compare.png")
    left, right = figure.axes
    assert (tmp_path / "compare.png").stat().st_size > 5000
    assert [label.get_text() for label in left.get_xticklabels()] == ["uniform LoRA", "the plan", "permuted ranks"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["less uniform LoRA", "less permuted ranks"]
    means = [line.get_segments()[0][0][1] for line in left.collections if hasattr(line, "get_segments")]
    assert means == pytest.approx([71.0, 75.0, 214 / 3])
    bars = [segment for line in right.collections if hasattr(line, "get_segments") for segment in line.get_segments()]
    for difference, segment in zip(found.differences(), bars, strict=True):
        assert sorted(segment[:, 1]) == pytest.approx([100 * difference.low, 100 * difference.high])


def test_the_table_has_every_arm():
    from rich.console import Console

    console = Console(width=160)
    with console.capture() as capture:
        console.print(made_up({UNIFORM: [0.7, 0.72], PLAN: [0.75, 0.75], PERMUTED: [0.7, 0.7]}).table())
    text = capture.get()
    assert "71.00 ± 1.00" in text
    assert "the plan less uniform LoRA" in text
    assert "+4.00 ± 1.00" in text


# The command


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in ("compare", *arguments)])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


QUICK_FLAGS = ("--seeds", 2, "--epochs", 1, "--batch-size", 8, "--average-rank", 2, "--device", "cpu")


def test_the_command(model, tmp_path, capsys):
    data = tiny_models.write_labelled(tmp_path / "train.jsonl", 30, names=("bad", "good"))
    arguments = (model, data, "--output", tmp_path / "out", *QUICK_FLAGS)
    code, out, err = command(capsys, *arguments)
    assert code == 0, err
    for word in ("uniform LoRA", "permuted ranks", "macro-f1", "peak memory", "accuracy", "2 seeds"):
        assert word in out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["settings"]["classes"] == ["bad", "good"]
    assert (tmp_path / "out" / "compare.png").is_file()
    # A fifth is held out: accuracies are sixths.
    assert all((6 * run["metrics"]["accuracy"]).is_integer() for run in result["runs"])
    again = command(capsys, *arguments)
    assert again[:2] == (0, out)
    code, _, err = command(capsys, *arguments, "--seeds", 3)
    assert code == 2
    assert "other settings" in err
    code, _, err = command(capsys, *arguments, "--average-rank", 3, "--plan", tmp_path / "out" / "plan.json")
    assert code == 2
    assert "--average-rank is for a plan that is made" in err
    code, _, err = command(capsys, model, data, "--output", model, "--force", *QUICK_FLAGS)
    assert code == 2
    assert "holds files that are no comparison" in err


def test_every_class_has_a_row_to_train_on():
    labelled = [Row((str(i),), label) for i, label in enumerate([0] * 20 + [1] * 9 + [2] * 2)]
    for seed in range(20):
        kept, held_out = cli._held_out(labelled, seed, by_label=True)
        assert sorted(kept + held_out, key=lambda row: int(row.texts[0])) == labelled
        assert [sum(row.label == label for row in held_out) for label in (0, 1, 2)] == [4, 1, 0]
    small = [Row((str(i),), i % 10) for i in range(40)]
    kept, held_out = cli._held_out(small, 0, by_label=True)
    assert (len(held_out), {row.label for row in kept}) == (8, set(range(10)))
    assert cli._held_out([Row((str(i),), i) for i in range(40)], 0, by_label=True)[1] == []
    kept, held_out = cli._held_out(labelled, 0, by_label=False)
    assert len(held_out) == 6
    assert not set(kept) & set(held_out)


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_the_command_on_scores(model, tmp_path, capsys, kind):
    data = tmp_path / f"scores.{kind}"
    rows = [{"one": text, "two": "the film", "score": label + 0.25} for text, label in tiny_models.sentences(20)]
    lines = ["one\ttwo\tscore", *("\t".join(map(str, row.values())) for row in rows)]
    data.write_text("\n".join(lines if kind == "tsv" else map(json.dumps, rows)) + "\n")
    fields = ("--text-field", "one", "--text-field", "two", "--label-field", "score")
    code, out, err = command(
        capsys, model, data, "--eval-data", data, "--regression", *fields, "-o", tmp_path / "out", *QUICK_FLAGS
    )
    assert code == 0, err
    assert "points of pearson" in out
    assert json.loads((tmp_path / "out" / "result.json").read_text())["settings"]["classes"] is None


def test_the_command_refuses_causal_data(model, tmp_path, capsys):
    data = tiny_models.write_text(tmp_path / "corpus.txt", 20)
    code, _, err = command(capsys, model, data, "--output", tmp_path / "out", *QUICK_FLAGS)
    assert code == 2
    assert "not yet of causal models" in err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(model, tmp_path, capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "_evaluate", stop)
    data = tiny_models.write_labelled(tmp_path / "train.jsonl", 30)
    code, _, err = command(capsys, model, data, "--output", tmp_path / "out", *QUICK_FLAGS)
    assert code == 130
    assert f"to go on from {tmp_path / 'out'}" in err
    assert "removed" not in err
