"""The comparison on GLUE: arms of equal cost, rows that go on, and a page that comes from the results."""

import itertools
import json
import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("transformers")

from benchmarks import compare_glue as glue
from sensilora.compare import PERMUTED, UNIFORM, Run
from sensilora.errors import NonFiniteError, SensiloraError
from tests.reports import make_report


def reports():
    draw = random.Random(0)
    shapes = {
        f"layer.{layer}.{kind}": shape for layer in range(9) for kind, shape in (("q", (8, 8)), ("up", (16, 8)))
    }
    return {
        estimator: make_report(
            {name: (10 ** draw.uniform(0, 3), 10 ** draw.uniform(0, 3), draw.randrange(1, 40)) for name in shapes},
            shapes,
        )
        for estimator in glue.ESTIMATORS
    }


def made_up(gain=0.0, seeds=5):
    """Rows whose plans are ahead of the other arms by `gain`, with noise of a point."""
    draw = np.random.default_rng(0)
    rows = {}
    for task, of in glue.TASKS.items():
        for rank in glue.RANKS:
            for arm in glue.ARMS:
                for seed in range(seeds):
                    metrics = {
                        metric: 0.7 + 0.01 * float(draw.normal()) + gain * (arm in glue.ESTIMATORS)
                        for metric in of.metrics
                    }
                    record = {
                        "metrics": {**metrics, "other": 1.0},
                        "training_loss": 0.5,
                        "adapter_parameters": 9,
                        "seconds": 1.0,
                    }
                    options = glue.Options("cpu", "float32", (1e-3,), None)
                    row = glue._row(task, rank, Run(arm, seed), record, 1e-3, options)
                    rows[row["id"]] = row | {"torch": "2", "cpu": "cpu", "date": "2026-01-01", "commit": "c"}
    return rows


@pytest.mark.parametrize("average_rank", glue.RANKS)
def test_all_arms_have_uniform_loras_parameters(average_rank):
    plans = glue.plans_of(reports(), average_rank, range(3))
    assert [run.arm for run in plans][::3] == list(glue.ARMS)
    assert len({plan.parameters for plan in plans.values()}) == 1
    assert set(plans[Run(UNIFORM, 0)].ranks.values()) == {average_rank}
    for estimator in glue.ESTIMATORS:
        assert len(set(plans[Run(estimator, 0)].ranks.values())) > 1
        assert plans[Run(estimator, 0)].ranks == plans[Run(estimator, 2)].ranks
        permuted = [plans[Run(f"{PERMUTED}-{estimator}", seed)].ranks for seed in range(3)]
        assert permuted[0] != permuted[1]


def test_results_are_read_as_they_are_written(tmp_path):
    rows = made_up(seeds=2)
    glue.write_results(rows, tmp_path / "rows.json")
    assert glue.load(tmp_path / "rows.json") == rows
    assert list(glue.load(tmp_path / "rows.json"))[:2] == ["cola/r1/uniform/seed0", "cola/r1/uniform/seed1"]
    assert glue.load(tmp_path / "none.json") == {}


def test_differences_are_paired_by_seed():
    rows = made_up()
    del rows["rte/r4/fisher/seed1"]
    found = glue.differences(rows)
    assert len(found) == 2 * 3 * 2 * 4
    one = found[4, "fisher", UNIFORM, "rte"]
    assert one.seeds == 4
    pairs = [
        rows[f"rte/r4/fisher/seed{seed}"]["value"] - rows[f"rte/r4/uniform/seed{seed}"]["value"]
        for seed in (0, 2, 3, 4)
    ]
    assert one.mean == pytest.approx(np.mean(pairs))


def test_the_verdict_counts():
    ahead = glue.verdict(made_up(gain=0.2))
    assert (
        "Of 24 comparisons of a plan with uniform LoRA, the plan is ahead beyond noise in 24 (activation on" in ahead
    )
    assert "behind in 0; by chance alone one expects 0.6 of each" in ahead
    behind = glue.verdict(made_up(gain=-0.2))
    assert "its own ranks permuted, the plan is ahead beyond noise in 0 and behind in 24 (" in behind
    assert "Fisher's plans differ from uniform LoRA by -" in behind


def test_the_page_is_what_the_results_say():
    page = glue.PAGE.read_text(encoding="utf-8")
    assert page == glue.render(page, glue.load()), "run: python -m benchmarks.compare_glue --page-only"
    filled = glue.render(page, made_up(gain=0.2))
    assert filled.count("**+2") >= 20
    assert "CoLA, Matthews (5 seeds)" in filled
    assert glue.render(filled, made_up(gain=0.2)) == filled


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(SensiloraError, match=r"no data in .*--data"):
        glue.data_folder(str(tmp_path))


def test_the_learning_rate_is_the_one_at_which_uniform_lora_is_best(monkeypatch):
    asked = []

    def train(task, plans, progress):
        rate = task.settings.learning_rate
        asked.append(({run.arm for run in plans}, rate))
        if rate > 1:
            raise NonFiniteError("diverged")
        return {run: {"metrics": {"accuracy": 0.5 + rate}} for run in plans}

    @dataclass
    class Settings:
        metric: str = "accuracy"
        learning_rate: float = 0.0

    @dataclass
    class Task:
        settings: Settings

    monkeypatch.setattr(glue, "train", train)
    plan = glue.plan_of(reports()["fisher"], 4)
    assert glue.chosen_rate(Task(Settings()), plan, (0.1, 0.3, 2.0, 0.2)) == 0.3
    assert asked == [({UNIFORM}, rate) for rate in (0.1, 0.3, 2.0, 0.2)]
    assert glue.chosen_rate(Task(Settings()), plan, (5.0,)) == 5.0


def test_tasks_run_in_a_process_each_and_their_rows_come_together(tmp_path, monkeypatch, capsys):
    rows = made_up(seeds=1)
    started = {}

    class Process:
        def __init__(self, command):
            last = dict(itertools.pairwise(command))  # of a flag that comes twice the last counts
            task, part = last["--tasks"], last["--output"]
            started[task] = command
            # What was there is there for the process to go on from.
            assert set(glue.load(glue.Path(part))) == {"rte/r1/uniform/seed7"} & {f"{task}/r1/uniform/seed7"}
            if task != "mrpc":
                own = {name: row for name, row in rows.items() if row["task"] == task}
                glue.write_results(glue.load(glue.Path(part)) | own, glue.Path(part))
            self.returncode = int(task == "mrpc")

        def poll(self):
            return self.returncode

    monkeypatch.setattr(glue, "WORK", tmp_path / "work")
    monkeypatch.setattr(glue.subprocess, "Popen", Process)
    before = {"rte/r1/uniform/seed7": rows["rte/r1/uniform/seed0"] | {"id": "rte/r1/uniform/seed7", "seed": 7}}
    glue.write_results(before, tmp_path / "rows.json")
    code = glue.main(["--device", "cpu", "--seconds", "50", "--output", str(tmp_path / "rows.json")])
    assert code == 1
    assert "failed: mrpc" in capsys.readouterr().err
    assert list(started) == list(glue.TASKS)
    assert all(0 < float(command[-1]) <= 50 and command[-2] == "--seconds" for command in started.values())
    expected = {name: row for name, row in rows.items() if row["task"] != "mrpc"} | before
    assert glue.load(tmp_path / "rows.json") == expected


def test_a_run_that_is_there_is_not_trained_again(tmp_path, monkeypatch):
    """Seeds that are there are passed over, those of other settings are not, and a deadline ends the run."""
    calls = []

    def train(task, plans, progress):
        calls.append({run.seed for run in plans})
        metrics = {"metrics": {"accuracy": 0.5}, "training_loss": 1.0, "adapter_parameters": 1, "seconds": 1.0}
        return dict.fromkeys(plans, metrics)

    @dataclass
    class Settings:
        learning_rate: float = 0.0

    @dataclass
    class Task:
        model: object = field(default_factory=lambda: SimpleNamespace(to=lambda dtype: None))
        settings: Settings = field(default_factory=Settings)

    found = reports()
    monkeypatch.setattr(glue, "WORK", tmp_path)
    monkeypatch.setattr(glue, "train", train)
    monkeypatch.setattr(glue, "load_task", lambda *arguments: (Task(), Task()))
    monkeypatch.setattr(glue, "measured", lambda task, estimator, options: found[estimator])
    options = glue.Options("cpu", "float32", (1e-3,), None)

    def run(rows, options, most=6, deadline=float("inf")):
        calls.clear()
        for new in glue.measure("rte", tmp_path, tmp_path, options, rows, 2, most, deadline):
            rows |= {row["id"]: row for row in new}
        return rows

    rows = run({}, options, most=4)
    assert calls == [{0, 1}] * 2 + [{2, 3}] * 2
    assert len(rows) == 4 * len(glue.ARMS) * len(glue.RANKS)
    run(rows, options)
    assert calls == [{4, 5}] * 2
    run(json.loads(json.dumps(rows)), glue.Options("cpu", "float32", (2e-3,), None), most=2)
    assert calls == [{0, 1}] * 2
    run({}, options, deadline=0.0)
    assert calls == []
