"""Plans against uniform LoRA on four tasks of GLUE, for docs/compare.md: ``python -m benchmarks.compare_glue``.

all-MiniLM-L6-v2 as the demo loads it, on CoLA, STS-B, MRPC and RTE, which are not in this package: ``--data`` names
the folder that holds them, else shared/data in the checkout or beside it. For each task and average rank there are
uniform LoRA, a plan of each estimator, and each plan's ranks permuted, side by side for a few seeds at a time, until
``--seconds`` are over; the tasks run in a process each. The same command goes on where it ended. The rows go to
benchmarks/results/compare-glue.json; the page is made from that file alone (``--page-only``).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.run import current_commit, provenance
from sensilora import _files
from sensilora.compare import (
    PERMUTED,
    UNIFORM,
    Difference,
    Run,
    Settings,
    Task,
    calibration_batches,
    permuted_ranks,
    plan_of,
    prepare,
    train,
    uniform_ranks,
)
from sensilora.data import read_rows
from sensilora.demo import bundled_model
from sensilora.errors import NonFiniteError, SensiloraError
from sensilora.plan import RankPlan
from sensilora.sensitivity.calibrate import calibrate
from sensilora.sensitivity.report import SensitivityReport
from sensilora.targets import find_targets

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "compare-glue.json"
WORK = Path("out/compare-glue")
PAGE = ROOT / "docs" / "compare.md"

RANKS = (1, 4)
ESTIMATORS = ("activation", "fisher", "hutchinson")
ARMS = (UNIFORM, *ESTIMATORS, *(f"{PERMUTED}-{estimator}" for estimator in ESTIMATORS))
MAX_LENGTH, BATCH = 128, 32
# Uniform LoRA of this rank and these seeds chooses the learning rate, on this share of the training rows.
RATES, RATE_RANK, RATE_SEEDS, RATE_SHARE = (5e-4, 1.5e-3), 4, (1000, 1001, 1002), 0.1
HEAD_STEPS = 24
# Hutchinson's products with the Hessian take their rows in one batch, for each matrix and probe.
HUTCHINSON_ROWS, PROBES = 32, 16

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Glue:
    """A task of GLUE: its columns of text, passes over the training rows, and metrics, the verdict's first."""

    title: str
    fields: tuple[str, ...]
    epochs: int
    metrics: tuple[str, ...]
    regression: bool = False


PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Glue("CoLA", ("sentence",), 6, ("matthews",)),
    "stsb": Glue("STS-B", PAIR, 3, ("pearson", "spearman"), regression=True),
    "mrpc": Glue("MRPC", PAIR, 4, ("f1", "accuracy")),
    "rte": Glue("RTE", PAIR, 5, ("accuracy",)),
}
METRICS = {
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "f1": "F1",
    "accuracy": "accuracy",
}
NAMES = {UNIFORM: "uniform LoRA", "activation": "activation", "fisher": "Fisher", "hutchinson": "Hutchinson"}


def data_folder(named: str | None) -> Path:
    """The folder of the data sets.

    Raises:
        SensiloraError: there is none.
    """
    folders = [Path(named)] if named else [root / "shared/data" for root in (ROOT, ROOT.parent)]
    for folder in folders:
        if (folder / "glue_cola").is_dir():
            return folder
    raise SensiloraError(
        f"no data in {folders[0]}: name the folder of glue_cola, glue_stsb, glue_mrpc and glue_rte with --data"
    )


@dataclass(frozen=True)
class Options:
    """What every figure follows from; the rows of other ones are no part of a run that goes on."""

    device: str
    dtype: str
    learning_rates: tuple[float, ...]
    limit: int | None
    weights: str = field(default="")

    @property
    def key(self) -> str:
        """A digest, in each row."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]


def load_task(name: str, model: Path, data: Path, options: Options) -> tuple[Task, Task]:
    """The model in fp32 and the tokenized rows; and the same with a part of the training rows to measure on."""
    glue = TASKS[name]
    train_rows, dev_rows = (
        read_rows(
            data / f"glue_{name}/{split}.jsonl.gz",
            text_fields=glue.fields,
            numeric_labels=glue.regression,
            limit=options.limit,
        )
        for split in ("train", "dev")
    )
    settings = Settings(
        model=str(model),
        classes=None if glue.regression else (0, 1),
        metric=glue.metrics[0],
        plan_hash=None,
        average_rank=RATE_RANK,
        seeds=2,
        seed=0,
        epochs=glue.epochs,
        batch_size=BATCH,
        learning_rate=options.learning_rates[0],
        warmup=0.06,
        weight_decay=0.0,
        dropout=0.0,
        max_length=MAX_LENGTH,
        serial=False,
        device=options.device,
        dtype=options.dtype,
    )
    shuffled = random.Random(0).sample(train_rows, len(train_rows))
    held_out = round(RATE_SHARE * len(shuffled))
    task = prepare(settings, train_rows, dev_rows, torch.float32)
    split = prepare(settings, shuffled[held_out:], shuffled[:held_out], torch.float32)
    return task, replace(split, model=task.model)


def chosen_rate(task: Task, plan: RankPlan, rates: Sequence[float]) -> float:
    """The learning rate at which uniform LoRA is best on rows that are held out of the training rows."""
    if len(rates) == 1:
        return rates[0]
    uniform, found = plan.with_ranks(uniform_ranks(plan)), {}
    for rate in rates:
        at_rate = replace(task, settings=replace(task.settings, learning_rate=rate))
        try:
            records = train(at_rate, {Run(UNIFORM, seed): uniform for seed in RATE_SEEDS}, progress=False)
        except NonFiniteError:
            continue
        found[rate] = float(np.mean([record["metrics"][task.settings.metric] for record in records.values()]))
    print(f"{task.settings.metric} by learning rate: {found}", flush=True)
    return max(found, key=found.__getitem__)


def measured(task: Task, estimator: str, options: Options) -> SensitivityReport:
    """The estimator's report of the encoder's matrices; the pooler belongs to the head, and stays as it is.

    Heads are new, so gradients and Hessians come from one that was trained alone first.
    """
    targets = [name for name in find_targets(task.model) if name.startswith("bert.encoder.")]
    if estimator == "activation":
        return calibrate(task.model, calibration_batches(task), targets=targets, progress=False)
    if estimator == "fisher":
        return calibrate(
            task.model,
            calibration_batches(task),
            estimator="fisher",
            targets=targets,
            head_warmup_steps=HEAD_STEPS,
            progress=False,
        )
    rows, probes = (HUTCHINSON_ROWS, PROBES) if options.limit is None else (4, 2)
    return calibrate(
        task.model,
        calibration_batches(task, rows),
        estimator="hutchinson",
        targets=targets,
        head_warmup_steps=HEAD_STEPS,
        probes=probes,
        min_probes=min(probes, 8),
        progress=False,
    )


def plans_of(reports: dict[str, SensitivityReport], average_rank: int, seeds: Sequence[int]) -> dict[Run, RankPlan]:
    """Each arm's ranks for each seed."""
    plans: dict[Run, RankPlan] = {}
    for estimator in ESTIMATORS:
        plan = plan_of(reports[estimator], average_rank)
        for seed in seeds:
            plans[Run(UNIFORM, seed)] = plan.with_ranks(uniform_ranks(plan))
            plans[Run(estimator, seed)] = plan
            plans[Run(f"{PERMUTED}-{estimator}", seed)] = plan.with_ranks(permuted_ranks(plan, seed))
    return {Run(arm, seed): plans[Run(arm, seed)] for arm in ARMS for seed in seeds}


def measure(
    name: str, model: Path, data: Path, options: Options, rows: Rows, at_once: int, most: int, deadline: float
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one task, a list for each rank and set of seeds, until the next would end after the deadline.

    Args:
        rows: those that are there already.
        at_once: seeds that train side by side.
        most: seeds that are enough.
        deadline: by `time.monotonic`.
    """
    task, split = load_task(name, model, data, options)
    reports = {}
    for estimator in ESTIMATORS:
        file = WORK / f"{options.key}-{name}-{estimator}.json"
        start = time.perf_counter()
        if not file.is_file():
            measured(task, estimator, options).save(file)
            print(f"{name}: {estimator} measured in {time.perf_counter() - start:.1f} s", flush=True)
        reports[estimator] = SensitivityReport.load(file)
    task.model.to(getattr(torch, options.dtype))
    file = WORK / f"{options.key}-{name}-rate.json"
    if not file.is_file():
        rate = chosen_rate(split, plan_of(reports["activation"], RATE_RANK), options.learning_rates)
        _files.write_text(file, json.dumps(rate))
    rate = json.loads(file.read_text())
    task = replace(task, settings=replace(task.settings, learning_rate=rate))
    first, took = 0, 0.0
    while first < most and time.monotonic() + 1.1 * took < deadline:
        begun = time.monotonic()
        for average_rank in RANKS:
            seeds = range(first, first + at_once)
            plans = plans_of(reports, average_rank, seeds)
            missing = {
                run: plan
                for run, plan in plans.items()
                if rows.get(_id(name, average_rank, run), {}).get("key") != options.key
            }
            if missing:
                # Arms that are missing train with those that are there, so that all have the same neighbours.
                start = time.perf_counter()
                records = train(task, plans, progress=False)
                seconds = time.perf_counter() - start
                print(f"{name}, rank {average_rank}, seeds {seeds}: {len(plans)} runs in {seconds:.1f} s", flush=True)
                yield [_row(name, average_rank, run, record, rate, options) for run, record in records.items()]
                took = max(took, time.monotonic() - begun)
        first += at_once


def _id(name: str, average_rank: int, run: Run) -> str:
    return f"{name}/r{average_rank}/{run.arm}/seed{run.seed}"


def _row(
    name: str, average_rank: int, run: Run, record: dict[str, Any], rate: float, options: Options
) -> dict[str, Any]:
    metrics = {metric: round(record["metrics"][metric], 6) for metric in TASKS[name].metrics}
    return {
        "id": _id(name, average_rank, run),
        "task": name,
        "average_rank": average_rank,
        "arm": run.arm,
        "seed": run.seed,
        "metric": TASKS[name].metrics[0],
        "value": metrics[TASKS[name].metrics[0]],
        "metrics": metrics,
        "training_loss": round(record["training_loss"], 5),
        "parameters": record["adapter_parameters"],
        "seconds": round(record["seconds"], 3),
        "dtype": options.dtype,
        "learning_rate": rate,
        "key": options.key,
    }


def load(path: Path = RESULTS) -> Rows:
    """The rows of the results by id; none where the file is not there."""
    return {row["id"]: row for row in json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def write_results(rows: Rows, path: Path) -> None:
    """One row a line, in order."""
    ordered = sorted(rows.values(), key=lambda row: (
        list(TASKS).index(row["task"]), row["average_rank"], ARMS.index(row["arm"]), row["seed"]
    ))  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in ordered)
    _files.write_text(path, f"[\n{lines}\n]\n")


# --- the page


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    right = "|".join(["---", "---", *["---:"] * (len(header) - 2)])
    return "\n".join([f"| {' | '.join(header)} |", f"|{right}|", *(f"| {' | '.join(line)} |" for line in lines)])


def values(rows: Rows, task: str, average_rank: int, arm: str, metric: str) -> dict[int, float]:
    """An arm's metric by seed."""
    return {
        row["seed"]: row["metrics"][metric]
        for row in rows.values()
        if (row["task"], row["average_rank"], row["arm"]) == (task, average_rank, arm)
    }


def arm_name(arm: str) -> str:
    """The arm in words."""
    kind, _, estimator = arm.partition("-")
    return f"{NAMES[estimator]}, permuted" if kind == PERMUTED else NAMES[arm]


def means_table(rows: Rows) -> str:
    """Mean and standard error of each arm, in points."""
    columns = [(task, metric) for task, glue in TASKS.items() for metric in glue.metrics]
    seeds = {task: len(values(rows, task, RANKS[0], UNIFORM, TASKS[task].metrics[0])) for task in TASKS}
    lines = [
        [
            str(rank),
            arm_name(arm),
            *(_mean(list(values(rows, task, rank, arm, metric).values())) for task, metric in columns),
        ]
        for rank in RANKS
        for arm in ARMS
    ]
    header = [f"{TASKS[task].title}, {METRICS[metric]} ({seeds[task]} seeds)" for task, metric in columns]
    return _table(["average rank", "arm", *header], lines)


def _mean(found: Sequence[float]) -> str:
    if len(found) < 2:
        return ""
    return f"{100 * float(np.mean(found)):.2f} ± {100 * float(np.std(found, ddof=1)) / math.sqrt(len(found)):.2f}"


def differences(rows: Rows) -> dict[tuple[int, str, str, str], Difference]:
    """By average rank, estimator, other arm and task: the estimator's plan less the other arm, over paired seeds."""
    found = {}
    for rank in RANKS:
        for estimator in ESTIMATORS:
            for other in (UNIFORM, f"{PERMUTED}-{estimator}"):
                for task, glue in TASKS.items():
                    ours, theirs = (values(rows, task, rank, arm, glue.metrics[0]) for arm in (estimator, other))
                    seeds = sorted(ours.keys() & theirs.keys())
                    if len(seeds) > 1:
                        pairs = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
                        found[rank, estimator, other, task] = Difference.of(other, *pairs)
    return found


def differences_table(rows: Rows) -> str:
    """The plans' differences with their intervals, in points; those that leave out 0 in bold."""
    found = differences(rows)
    lines = []
    for rank in RANKS:
        for estimator in ESTIMATORS:
            for other in (UNIFORM, f"{PERMUTED}-{estimator}"):
                what = NAMES[UNIFORM] if other == UNIFORM else "its ranks permuted"
                cells = (_interval(found.get((rank, estimator, other, task))) for task in TASKS)
                lines.append([str(rank), f"{NAMES[estimator]} less {what}", *cells])
    header = [f"{glue.title}, {METRICS[glue.metrics[0]]}" for glue in TASKS.values()]
    return _table(["average rank", "plan", *header], lines)


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    text = f"{100 * difference.mean:+.2f} ({100 * difference.low:+.2f} to {100 * difference.high:+.2f})"
    return f"**{text}**" if difference.sign else text


def verdict(rows: Rows) -> str:
    """What the intervals say, counted."""
    found = differences(rows)
    sentences = []
    for other, title in ((UNIFORM, "uniform LoRA"), (PERMUTED, "its own ranks permuted")):
        own = {key: value for key, value in found.items() if key[2].startswith(other)}
        ahead = [_where(key) for key, value in own.items() if value.sign > 0]
        behind = [_where(key) for key, value in own.items() if value.sign < 0]
        chance = 0.025 * len(own)
        sentences.append(
            f"Of {len(own)} comparisons of a plan with {title}, the plan is ahead beyond noise in {len(ahead)}"
            f"{_listed(ahead)} and behind in {len(behind)}{_listed(behind)}; by chance alone "
            f"one expects {chance:.1f} of each."
        )
    for estimator in ESTIMATORS:
        cells = [value.mean for key, value in found.items() if key[1] == estimator and key[2] == UNIFORM]
        sentences.append(
            f"Over tasks and ranks {NAMES[estimator]}'s plans differ from uniform LoRA by "
            f"{100 * float(np.mean(cells)):+.2f} points on average."
        )
    return " ".join(sentences)


def _where(key: tuple[int, str, str, str]) -> str:
    rank, estimator, _, task = key
    return f"{NAMES[estimator]} on {TASKS[task].title} at rank {rank}"


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def measured_with(rows: Rows) -> str:
    """Where the rows are from."""
    row = next(iter(rows.values()))
    dates = sorted({row["date"] for row in rows.values()})
    rates = [
        f"{glue.title} {row['learning_rate']:g}"
        for task, glue in TASKS.items()
        for row in itertools.islice((row for row in rows.values() if row["task"] == task), 1)
    ]
    seeds = sorted(
        {len(values(rows, task, rank, UNIFORM, TASKS[task].metrics[0])) for task in TASKS for rank in RANKS}
    )
    return (
        f"{len(rows)} fine-tunings, {_range(seeds)} seeds a cell, learning rates {', '.join(rates)}; the frozen "
        f"model in {row['dtype']}, on {row.get('gpu') or row.get('cpu')} with torch {row['torch']}, "
        f"{' and '.join(dates)}; every run is in [compare-glue.json](../benchmarks/results/compare-glue.json)."
    )


def _range(found: Sequence[int]) -> str:
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


BLOCKS: dict[str, Callable[[Rows], str]] = {
    "verdict": verdict,
    "differences": differences_table,
    "means": means_table,
    "measured": measured_with,
}


def render(page: str, rows: Rows) -> str:
    """The page with its blocks, ``<!-- glue: NAME -->`` to ``<!-- end -->``, filled; empty without rows."""

    def fill(match: re.Match[str]) -> str:
        content = BLOCKS[match[1]](rows) + "\n" if rows else ""
        return f"<!-- glue: {match[1]} -->\n{content}<!-- end -->"

    return re.sub(r"<!-- glue: (\S+) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_glue", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", help="folder with glue_cola, glue_stsb, glue_mrpc and glue_rte")
    parser.add_argument("--model", help="folder of all-MiniLM-L6-v2, where its package is not installed")
    parser.add_argument("--seconds", type=float, default=200.0, help="begin no seeds that would end later than this")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds-at-once", type=int, default=4, help="seeds that train side by side")
    parser.add_argument("--seeds", type=int, default=20, help="begin no more seeds than these")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the frozen weights in training")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=RATES, help="to choose among")
    parser.add_argument("--limit", type=int, help="to try the command: rows of each split, and hardly a Hessian")
    parser.add_argument("--commit", default="", help="commit to record, where the sources are no git checkout")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--page-only", action="store_true", help="only make the page's section from the results")
    given = parser.parse_args(arguments)
    if given.page_only:
        PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), load()), encoding="utf-8")
        return 0
    deadline = time.monotonic() + given.seconds
    if len(given.tasks) > 1:
        return _in_parallel(given, list(sys.argv[1:] if arguments is None else arguments), deadline)
    model = Path(given.model) if given.model else bundled_model()
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:12]
    dtype = given.dtype or ("bfloat16" if given.device == "cuda" else "float32")
    options = Options(given.device, dtype, tuple(given.learning_rates), given.limit, weights)
    where = provenance(given.device, given.commit or current_commit())
    where["transformers"] = importlib.metadata.version("transformers")
    rows = load(given.output)
    for found in measure(
        given.tasks[0], model, data_folder(given.data), options, rows, given.seeds_at_once, given.seeds, deadline
    ):
        rows |= {row["id"]: row | where for row in found}
        write_results(rows, given.output)
    return 0


def _in_parallel(given: argparse.Namespace, arguments: list[str], deadline: float) -> int:
    """A process for each task: while one makes the host wait, the device works for the others."""
    WORK.mkdir(parents=True, exist_ok=True)
    rows = load(given.output)
    parts = {task: WORK / f"rows-{task}.json" for task in given.tasks}
    for task, part in parts.items():
        write_results({name: row for name, row in rows.items() if row["task"] == task}, part)
    processes = {
        task: subprocess.Popen(
            [
                sys.executable, "-m", "benchmarks.compare_glue", *arguments, "--tasks", task, "--output", str(part),
                "--seconds", str(deadline - time.monotonic()),
            ]
        )
        for task, part in parts.items()
    }  # fmt: skip
    # Whatever ends this process finds the rows that were there then.
    running = True
    while running:
        running = any(process.poll() is None for process in processes.values())
        time.sleep(1.0 if running else 0.0)
        for part in parts.values():
            rows |= load(part)
        write_results(rows, given.output)
    failed = [task for task, process in processes.items() if process.returncode]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    print(f"{len(rows)} rows written to {given.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
