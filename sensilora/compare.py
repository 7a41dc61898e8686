"""Is a plan worth it on one's own data? Uniform LoRA, the plan, and its ranks permuted, over several seeds.

Every arm and seed is an adapter with a head of its own on one frozen model, and all of them train side by side in one
batch. A comparison that was killed goes on from its folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from sensilora import _files, mixed
from sensilora.adapters import check_plan, unload
from sensilora.allocation import allocate, assign_ranks
from sensilora.data import Row, number
from sensilora.demo import peak_memory
from sensilora.errors import DataError, NonFiniteError, OutputExistsError, PlanError, SensiloraError
from sensilora.integrations.transformers import (
    accuracy_and_macro_f1,
    collate,
    encode_classification,
    length_limit,
    load_sequence_classifier,
    load_tokenizer,
    require_fit,
)
from sensilora.plan import RankPlan
from sensilora.sensitivity.calibrate import calibrate
from sensilora.targets import outermost_heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIFORM, PLAN, PERMUTED = "uniform", "plan", "permuted"
TITLES = {UNIFORM: "uniform LoRA", PLAN: "the plan", PERMUTED: "permuted ranks"}
CLASSIFICATION_METRICS, REGRESSION_METRICS = ("accuracy", "macro_f1", "matthews"), ("pearson", "spearman")
CONFIDENCE = 0.95

RESULT_FILE, PICTURE_FILE = "result.json", "compare.png"
_SETTINGS_FILE, _PLAN_FILE, _CHECKPOINT_FILE = "settings.json", "plan.json", "checkpoint.safetensors"
_CALIBRATION_ROWS = 256
_CALIBRATION_BATCH = 32
_MAX_GRADIENT_NORM = 1.0  # as transformers' Trainer has it


@dataclass(frozen=True)
class Settings:
    """What a comparison's numbers follow from, with a digest of its data; the arguments of `run_compare`."""

    model: str
    classes: tuple[int | str, ...] | None
    metric: str
    plan_hash: str | None
    average_rank: int
    seeds: int
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    warmup: float
    weight_decay: float
    dropout: float
    max_length: int
    serial: bool
    device: str
    dtype: str
    data_digest: str = ""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 2), ("epochs", 1), ("batch_size", 1), ("average_rank", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise SensiloraError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise SensiloraError(f"learning_rate must be a finite number above 0, not {self.learning_rate}")
        if not 0 <= self.warmup <= 1:
            raise SensiloraError(f"warmup must be in [0, 1], not {self.warmup}")
        known = REGRESSION_METRICS if self.classes is None else CLASSIFICATION_METRICS
        if self.metric not in known:
            raise SensiloraError(f"metric {self.metric!r} does not fit the data; choose {', '.join(known)}")


@dataclass(frozen=True)
class Run:
    """One fine-tuning: an arm, and the seed of its head, its adapter and the order of its rows."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of the adapter, and of the file with the record."""
        return f"{self.arm}_{self.seed}"


@dataclass(frozen=True)
class Task:
    """The frozen model, and the tokenized rows."""

    model: Any
    settings: Settings
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    pad_token_id: int

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    def batch(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The rows, padded to the longest of them, on the device."""
        batch = collate(examples, self.pad_token_id)
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}


def run_compare(
    output: str | os.PathLike[str],
    model: str | os.PathLike[str],
    rows: Sequence[Row],
    eval_rows: Sequence[Row],
    *,
    classes: Sequence[int | str] | None,
    plan: RankPlan | None = None,
    average_rank: int = 4,
    metric: str | None = None,
    seeds: int = 5,
    seed: int = 0,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 5e-4,
    warmup: float = 0.06,
    weight_decay: float = 0.0,
    dropout: float = 0.0,
    max_length: int = 256,
    serial: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    checkpoint_every: int = 200,
    force: bool = False,
    progress: bool = True,
) -> Comparison:
    """Fine-tune a sequence classifier (or regressor) under three rankings of its matrices, and compare them.

    The arms are uniform LoRA, the plan, and the plan's ranks permuted at random among matrices of one shape (or its
    transpose), which shows whether it matters that it is these matrices that get the rank. All have the plan's number
    of trainable parameters, scale rule and hyperparameters. Runs of one seed see the same rows in the same order and
    begin with the same head; the permutation is drawn anew for each seed. What is measured is the model at the end of
    training, on rows that decided nothing before.

    Args:
        output: folder for settings, plan, a record of each run, result.json and a picture. A comparison with the same
            settings that was stopped there goes on.
        model: local folder or hub name.
        rows: to train on, with labels.
        eval_rows: to measure on, with labels.
        classes: the labels in the model's order; None for regression on numbers.
        plan: made for the model. None calibrates on at most 256 of `rows` (activation) and allots what uniform LoRA
            of `average_rank` costs.
        average_rank: see `plan`.
        metric: what the verdict is about: "accuracy", "macro_f1" or "matthews"; for regression "pearson" or
            "spearman". None for the first.
        seeds: runs of each arm, at least 2; seeds are `seed`, `seed` + 1 and so on.
        seed: the first.
        epochs, batch_size, learning_rate, warmup, weight_decay, dropout: of each run; AdamW with linear warm-up (as a
            share of the steps) and decay, each run's gradient clipped at norm 1. `dropout` is on the adapters'
            inputs; the model's own is as configured.
        max_length: tokens of a row.
        serial: train one run after another, where the batches of all together do not fit the device.
        device: where to train.
        dtype: of the frozen weights; None for the checkpoint's own. Adapters and heads train in fp32 at least.
        checkpoint_every: steps between two states to go on from.
        force: begin anew where the folder holds another comparison.
        progress: show bars.

    Returns:
        What came out, also written to the folder.

    Raises:
        OutputExistsError: the folder holds another comparison and `force` is false, or something else.
        PlanError: the plan is for another model, or gives uniform ranks.
        DataError: rows lack labels, or have such as do not fit.
        NonFiniteError: a loss became NaN or Inf.
        SensiloraError: an argument is out of range, or the runs do not fit the GPU side by side.
    """
    settings = Settings(
        model=os.fspath(model),
        classes=None if classes is None else tuple(classes),
        metric=metric or (REGRESSION_METRICS if classes is None else CLASSIFICATION_METRICS)[0],
        plan_hash=None if plan is None else plan.content_hash,
        average_rank=average_rank,
        seeds=seeds,
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        dropout=dropout,
        max_length=max_length,
        serial=serial,
        device=torch.device(device).type,
        dtype="auto" if dtype is None else str(dtype).removeprefix("torch."),
    )
    if checkpoint_every < 1:
        raise SensiloraError(f"checkpoint_every must be at least 1, not {checkpoint_every}")
    task = _task(settings, rows, eval_rows, dtype)
    if plan is not None:  # what is wrong with it is told before anything is written
        check_plan(plan, task.model, dict(task.model.named_modules()), strict=True)
        arm_plans(plan, task.settings)
    folder = _opened(Path(output), task.settings, force)
    plan = _plan(task, plan, folder, progress)
    plans = arm_plans(plan, task.settings)
    records = _records(folder, plans)
    pending = [run for run in plans if run not in records]
    for group in [[run] for run in pending] if serial else [pending] if pending else []:
        for run, record in _train(
            task, {run: plans[run] for run in group}, folder, checkpoint_every, progress
        ).items():
            records[run] = record
            _files.write_text(_record_file(folder, run), json.dumps(record, indent=1) + "\n")
        _files.remove_all_but(folder, _CHECKPOINT_FILE, ())
    found = Comparison(task.settings, {run: records[run] for run in plans})
    _files.write_text(folder / RESULT_FILE, json.dumps(found.as_dict(), indent=1) + "\n")
    return found


# Model, data and folder


def _task(settings: Settings, rows: Sequence[Row], eval_rows: Sequence[Row], dtype: torch.dtype | None) -> Task:
    tokenizer = load_tokenizer(settings.model)
    model = _new_model(settings, settings.seed, dtype)
    require_fit(model, tokenizer)
    limit = length_limit(model, settings.max_length)
    train, held_out = (_encoded(tokenizer, part, settings.classes, limit) for part in (rows, eval_rows))
    digest = hashlib.sha256(json.dumps([train, held_out]).encode()).hexdigest()
    settings = replace(settings, max_length=limit, data_digest=digest)
    return Task(model.to(settings.device), settings, train, held_out, tokenizer.pad_token_id)


def _new_model(settings: Settings, seed: int, dtype: torch.dtype | None) -> Any:
    torch.manual_seed(seed)
    names = ["score"] if settings.classes is None else [str(label) for label in settings.classes]
    return load_sequence_classifier(settings.model, labels=names, dtype=dtype)


def _encoded(
    tokenizer: Any, rows: Sequence[Row], classes: Sequence[int | str] | None, max_length: int
) -> list[dict[str, Any]]:
    """Token ids and label of each row; the label is a place in `classes`, or the number itself."""
    if any(row.label is None for row in rows):
        raise DataError(
            "some rows have no label; comparisons are of classifiers and regressors, and not yet of causal models: "
            "name the field that holds the label (--label-field)"
        )
    if classes is not None:
        return encode_classification(tokenizer, rows, labels=classes, max_length=max_length)
    examples = encode_classification(
        tokenizer, [replace(row, label=None) for row in rows], labels=(), max_length=max_length
    )
    return [example | {"labels": number(row.label)} for example, row in zip(examples, rows, strict=True)]


def _opened(folder: Path, settings: Settings, force: bool) -> Path:
    """The folder, holding these settings; what another comparison left there is removed under `force`."""
    written = json.dumps(asdict(settings), indent=1) + "\n"
    file = folder / _SETTINGS_FILE
    if folder.is_file():
        raise OutputExistsError(f"output {folder} is a file; name a folder")
    if file.is_file():
        if file.read_text() == written:
            return folder
        if not force:
            raise OutputExistsError(
                f"output folder {folder} holds a comparison with other settings or data; name another folder, or "
                "pass --force (force=True) to begin anew"
            )
        results = (_PLAN_FILE, _CHECKPOINT_FILE, RESULT_FILE, PICTURE_FILE)
        for old in (*folder.glob("runs/*.json"), *(folder / name for name in results)):
            old.unlink(missing_ok=True)
    elif folder.is_dir() and any(folder.iterdir()):
        raise OutputExistsError(f"output folder {folder} holds files that are no comparison; name another folder")
    _files.write_text(file, written)
    return folder


def _record_file(folder: Path, run: Run) -> Path:
    return folder / "runs" / f"{run.name}.json"


def _records(folder: Path, plans: Mapping[Run, RankPlan]) -> dict[Run, dict[str, Any]]:
    files = {run: _record_file(folder, run) for run in plans}
    return {run: json.loads(file.read_text()) for run, file in files.items() if file.is_file()}


# Plans


def _plan(task: Task, plan: RankPlan | None, folder: Path, progress: bool) -> RankPlan:
    """The plan of the comparison, which the folder keeps."""
    file = folder / _PLAN_FILE
    if file.is_file():
        return RankPlan.load(file)
    if plan is None:
        settings = task.settings
        drawn = random.Random(settings.seed).sample(task.train, min(_CALIBRATION_ROWS, len(task.train)))
        drawn.sort(key=lambda example: len(example["input_ids"]))
        batches = [
            task.batch(drawn[start : start + _CALIBRATION_BATCH])
            for start in range(0, len(drawn), _CALIBRATION_BATCH)
        ]
        report = calibrate(task.model, batches, seed=settings.seed, progress=progress)
        budget = settings.average_rank * sum(sum(report[name].shape) for name in report)
        plan = allocate(report, total_parameters=budget)
    plan.save(file)
    return plan


def uniform_ranks(plan: RankPlan) -> dict[str, int]:
    """Ranks as equal as the plan's number of parameters allows, by matrix."""
    settings = plan.allocation.model_copy(
        update={"strategy": "scaled", "temper": 0.0, "min_rank": 0, "max_rank": None, "multiple": 1, "tie": None}
    )
    shapes = {name: entry.shape for name, entry in plan.matrices.items()}
    return assign_ranks(shapes, np.ones(len(shapes)), settings, "total_parameters", plan.parameters)


def permuted_ranks(plan: RankPlan, seed: int) -> dict[str, int]:
    """The plan's ranks, permuted at random among matrices of one shape or its transpose.

    A rank costs as many parameters in each of them, so that their number stays.
    """
    draw = random.Random(f"permuted ranks {seed}")
    names_of: dict[tuple[int, ...], list[str]] = {}
    for name, entry in plan.matrices.items():
        names_of.setdefault(tuple(sorted(entry.shape)), []).append(name)
    ranks = plan.ranks
    for names in names_of.values():
        permuted = draw.sample([ranks[name] for name in names], len(names))
        ranks.update(zip(names, permuted, strict=True))
    return ranks


def arm_plans(plan: RankPlan, settings: Settings) -> dict[Run, RankPlan]:
    """The plan of each run, arm by arm. The permuted arm is left out where no permutation changes a rank.

    Raises:
        PlanError: the plan's ranks are the uniform ones, so that there is nothing to compare.
    """
    uniform = uniform_ranks(plan)
    if uniform == plan.ranks:
        raise PlanError("the plan gives every matrix the rank of uniform LoRA, so there is nothing to compare")
    seeds = range(settings.seed, settings.seed + settings.seeds)
    permuted = {seed: permuted_ranks(plan, seed) for seed in seeds}
    plans = {Run(UNIFORM, seed): plan.with_ranks(uniform) for seed in seeds}
    plans |= {Run(PLAN, seed): plan for seed in seeds}
    if any(ranks != plan.ranks for ranks in permuted.values()):
        plans |= {Run(PERMUTED, seed): plan.with_ranks(permuted[seed]) for seed in seeds}
    return plans


# Training


class _Heads(nn.Module):
    """Each run's own copy of a head, for a batch that holds the rows of one run after those of another."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.runs = nn.ModuleList(heads)
        self.only: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ...) of all runs, as many rows each; of the one run where `only` says which."""
        x = x.to(next(self.runs.parameters()).dtype)
        if self.only is not None:
            return self.runs[self.only](x)
        return torch.cat([head(part) for head, part in zip(self.runs, x.chunk(len(self.runs)), strict=True)])


@contextmanager
def _prepared(task: Task, plans: Mapping[Run, RankPlan]) -> Iterator[dict[Run, dict[str, nn.Parameter]]]:
    """The trainable parameters of each run, whose adapters and heads the model carries inside the block."""
    model, settings = task.model, task.settings
    originals = {name: model.get_submodule(name) for name in outermost_heads(model)}
    dtype = torch.promote_types(model.dtype, torch.float32)
    drawn = {}
    for seed in dict.fromkeys(run.seed for run in plans):
        source = _new_model(settings, seed, model.dtype)
        drawn[seed] = {name: source.get_submodule(name).to(task.device, dtype) for name in originals}
    heads = {name: _Heads([copy.deepcopy(drawn[run.seed][name]) for run in plans]) for name in originals}
    with warnings.catch_warnings():
        # Of a new head being frozen: each run trains its own.
        warnings.filterwarnings("ignore", message="the head .* looks new", category=UserWarning)
        for run, plan in plans.items():
            torch.manual_seed(run.seed)
            mixed.add_adapter(model, run.name, plan, dropout=settings.dropout)
    try:
        for name, head in heads.items():
            model.set_submodule(name, head.requires_grad_(True))
        yield {
            run: mixed.adapter_parameters(model, run.name)
            | {
                f"{name}.{key}": parameter
                for name, head in heads.items()
                for key, parameter in head.runs[place].named_parameters()
            }
            for place, run in enumerate(plans)
        }
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
        unload(model)
        model.eval()


def _train(
    task: Task, plans: Mapping[Run, RankPlan], folder: Path, checkpoint_every: int, progress: bool
) -> dict[Run, dict[str, Any]]:
    """Fine-tune these runs side by side, and the record of each."""
    settings, runs = task.settings, list(plans)
    with _prepared(task, plans) as parameters, _enough_memory(), peak_memory(task.device) as peak:
        state = _State(task, parameters, folder / _CHECKPOINT_FILE)
        _fit(task, runs, state, checkpoint_every, progress)
        results = {run: _evaluate(task, runs, run) for run in runs}
    last_epoch = state.losses[-_steps_an_epoch(task) :].mean(0).tolist()
    return {
        run: {
            "arm": run.arm,
            "seed": run.seed,
            "metrics": results[run],
            "adapter_parameters": plans[run].parameters,
            "head_parameters": sum(p.numel() for p in parameters[run].values()) - plans[run].parameters,
            "training_loss": last_epoch[place],
            "seconds": state.seconds / state.side_by_side,
            "peak_memory_bytes": peak[0],
            "side_by_side": state.side_by_side,
            "epochs": settings.epochs,
            "ranks": plans[run].ranks,
        }
        for place, run in enumerate(runs)
    }


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise SensiloraError(
            "the GPU's memory is too small for these runs; train one after another with --serial (serial=True), or "
            "take a smaller batch size"
        ) from error


class _State:
    """What training changes: parameters, AdamW's moments, losses so far. Runs are independent of one another."""

    def __init__(self, task: Task, parameters: Mapping[Run, Mapping[str, nn.Parameter]], file: Path) -> None:
        self.parameters, self.file = parameters, file
        # AdamW is elementwise, so one optimiser is as good as one for each run.
        self.optimizer = torch.optim.AdamW(
            [parameter for own in parameters.values() for parameter in own.values()],
            lr=task.settings.learning_rate,
            weight_decay=task.settings.weight_decay,
        )
        steps = task.settings.epochs * _steps_an_epoch(task)
        self.losses = torch.zeros(steps, len(parameters), device=task.device)
        # After a kill some runs may be finished, and these be fewer than trained side by side.
        self.step, self.seconds, self.side_by_side = 0, 0.0, len(parameters)
        if file.is_file():
            self._load()

    def save(self) -> None:
        """Write everything, in one atomic step."""
        progress = [self.step, self.seconds, self.side_by_side]
        tensors = {"progress": torch.tensor(progress, dtype=torch.float64)}
        for place, (run, own) in enumerate(self.parameters.items()):
            tensors[f"{run.name}/losses"] = self.losses[:, place]
            for name, parameter in own.items():
                tensors[f"{run.name}/{name}"] = parameter
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"{run.name}/{name}/{key}"] = value
        _files.write_tensors(self.file, tensors)

    @torch.no_grad()
    def _load(self) -> None:
        try:
            tensors = load_file(self.file)
        except SafetensorError as error:
            raise DataError(f"{self.file} is damaged ({error}); remove it to train its runs anew") from error
        if any(f"{run.name}/losses" not in tensors for run in self.parameters):
            return  # of a run that was finished
        step, self.seconds, side_by_side = tensors["progress"].tolist()
        self.step, self.side_by_side = int(step), int(side_by_side)
        for place, (run, own) in enumerate(self.parameters.items()):
            self.losses[:, place] = tensors[f"{run.name}/losses"].to(self.losses.device)
            for name, parameter in own.items():
                parameter.copy_(tensors[f"{run.name}/{name}"])
                moments = {key: tensors[f"{run.name}/{name}/{key}"] for key in ("exp_avg", "exp_avg_sq")}
                moments = {key: value.to(parameter.device) for key, value in moments.items()}
                self.optimizer.state[parameter] = {"step": tensors[f"{run.name}/{name}/step"], **moments}


def _steps_an_epoch(task: Task) -> int:
    return -(-len(task.train) // task.settings.batch_size)


def _fit(task: Task, runs: Sequence[Run], state: _State, checkpoint_every: int, progress: bool) -> None:
    model, settings = task.model, task.settings
    steps, an_epoch = len(state.losses), _steps_an_epoch(task)
    warmup = max(1, round(settings.warmup * steps))
    # Runs of one seed have the same rows, which are collated once.
    seeds = list(dict.fromkeys(run.seed for run in runs))
    places = torch.tensor([seeds.index(run.seed) for run in runs], device=task.device)
    model.train()
    start, before = time.perf_counter(), state.seconds
    shuffled = -1
    with tqdm(total=steps, initial=state.step, desc=_described(runs), unit="step", disable=not progress) as bar:
        while state.step < steps:
            epoch, position = divmod(state.step, an_epoch)
            if epoch != shuffled:
                orders, shuffled = {seed: _order(seed, epoch, len(task.train)) for seed in seeds}, epoch
            own = slice(position * settings.batch_size, (position + 1) * settings.batch_size)
            size = len(range(len(task.train))[own])
            batch = task.batch([task.train[row] for seed in seeds for row in orders[seed][own]])
            rows = (places[:, None] * size + torch.arange(size, device=task.device)).flatten()
            # Whatever is drawn (dropout) follows from the seed and the step, also after a kill.
            torch.manual_seed(((runs[0].seed << 32) + state.step) % 2**64)
            losses = _losses(task, runs, {key: value[rows] for key, value in batch.items()})
            losses.sum().backward()
            for parameters in state.parameters.values():
                nn.utils.clip_grad_norm_(parameters.values(), _MAX_GRADIENT_NORM)
            rate = min((state.step + 1) / warmup, (steps - state.step) / max(steps - warmup, 1))
            for group in state.optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.losses[state.step] = losses.detach()
            state.step += 1
            bar.update()
            if state.step % checkpoint_every == 0 or state.step == steps:
                _require_finite(runs, state)
                state.seconds = before + time.perf_counter() - start
                state.save()
                bar.set_postfix(loss=f"{float(losses.detach().mean()):.4f}")


def _described(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"training {len(runs)} runs side by side"
    return f"training {TITLES[runs[0].arm]}, seed {runs[0].seed}"


def _order(seed: int, epoch: int, rows: int) -> list[int]:
    return random.Random(f"order of rows {seed} {epoch}").sample(range(rows), rows)


def _losses(task: Task, runs: Sequence[Run], batch: dict[str, Tensor]) -> Tensor:
    """(runs,): the mean loss of each run's rows."""
    labels = batch.pop("labels")
    # Of one adapter, its name: that is another, faster layer.
    ids = runs[0].name if len(runs) == 1 else [run.name for run in runs for _ in range(len(labels) // len(runs))]
    with mixed.adapter_ids(task.model, ids):
        logits = task.model(**batch).logits
    if task.settings.classes is None:
        losses = (logits.squeeze(-1) - labels.to(logits.dtype)).square()
    else:
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses.view(len(runs), -1).mean(1)


def _require_finite(runs: Sequence[Run], state: _State) -> None:
    bad = ~state.losses[: state.step].isfinite()
    if bad.any():
        step, place = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"training diverged: the loss of {TITLES[runs[place].arm]}, seed {runs[place].seed}, is "
            f"{float(state.losses[step, place])} at step {step + 1}; lower the learning rate, and pass --force"
        )


@torch.inference_mode()
def _evaluate(task: Task, runs: Sequence[Run], run: Run) -> dict[str, float]:
    """All metrics of one run on the held-out rows."""
    model = task.model.eval()
    heads = [module for module in model.modules() if isinstance(module, _Heads)]
    order = sorted(range(len(task.held_out)), key=lambda row: len(task.held_out[row]["input_ids"]))
    # As many rows as in training, which are known to fit.
    size = task.settings.batch_size * len(runs)
    outputs: list[Tensor] = []
    for head in heads:
        head.only = runs.index(run)
    with mixed.adapter_ids(model, run.name):
        for start in range(0, len(order), size):
            batch = task.batch([task.held_out[row] for row in order[start : start + size]])
            del batch["labels"]
            outputs.append(model(**batch).logits.float())
    for head in heads:
        head.only = None
    gold = [task.held_out[row]["labels"] for row in order]
    logits = torch.cat(outputs)
    if task.settings.classes is None:
        return regression_metrics(gold, logits.squeeze(-1).tolist())
    return classification_metrics(gold, logits.argmax(-1).tolist())


# Metrics


def classification_metrics(gold: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Accuracy, macro-F1, and Matthews' correlation for any number of classes (Gorodkin 2004, R_K).

    The correlation is 0 where it is undefined, all rows having one class in `gold` or `predicted`.
    """
    accuracy, macro_f1 = accuracy_and_macro_f1(gold, predicted)
    rows, there, said = len(gold), Counter(gold), Counter(predicted)
    hits = sum(g == p for g, p in zip(gold, predicted, strict=True))
    covariance = hits * rows - sum(there[label] * said[label] for label in there)
    spread = math.prod(rows**2 - sum(n**2 for n in counts.values()) for counts in (there, said))
    matthews = covariance / math.sqrt(spread) if spread else 0.0
    return {"accuracy": accuracy, "macro_f1": macro_f1, "matthews": matthews}


def regression_metrics(gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where undefined, all rows having one value."""
    # scipy.stats takes most of a second to import.
    from scipy.stats import rankdata

    def pearson(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x - x.mean(), y - y.mean()
        norm = math.sqrt(float(x @ x) * float(y @ y))
        return float(x @ y) / norm if norm else 0.0

    values = np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    return {"pearson": pearson(*values), "spearman": pearson(rankdata(values[0]), rankdata(values[1]))}


# What came out


@dataclass(frozen=True)
class Difference:
    """The plan's metric less another arm's, over runs paired by seed.

    Attributes:
        arm: the other one.
        seeds: number of pairs.
        mean, standard_error: of the differences.
        low, high: 95 % t interval of the mean.
    """

    arm: str
    seeds: int
    mean: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def of(cls, arm: str, plan: Sequence[float], other: Sequence[float]) -> Difference:
        """From the metric of each seed, in one order."""
        from scipy.stats import t

        differences = np.subtract(plan, other)
        count, mean = len(differences), float(differences.mean())
        error = float(differences.std(ddof=1)) / math.sqrt(count)
        reach = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
        return cls(arm, count, mean, error, mean - reach, mean + reach)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval says which is ahead, 0 where it holds 0 or cannot be known."""
        return 0 if self._is_constant else (self.low > 0) - (self.high < 0)

    @property
    def _is_constant(self) -> bool:
        """Whether the difference is the same in every seed, by chance: that leaves its noise unknown, not absent."""
        return self.standard_error < 1e-12 < abs(self.mean)

    def sentence(self, metric: str) -> str:
        """What the interval says, in words."""
        name = metric.replace("_", "-")
        if self._is_constant:
            return (
                f"The plan and {TITLES[self.arm]} differ by {100 * self.mean:+.2f} points of {name} in each of "
                f"{self.seeds} seeds, which says nothing about the noise: take more seeds or more evaluation rows."
            )
        figures = f"95 % interval {100 * self.low:+.2f} to {100 * self.high:+.2f}, {self.seeds} seeds"
        if not self.sign:
            return (
                f"No difference beyond noise between the plan and {TITLES[self.arm]}: {100 * self.mean:+.2f} points "
                f"of {name} ({figures})."
            )
        where = "ahead of" if self.sign > 0 else "behind"
        return f"The plan is {where} {TITLES[self.arm]} by {100 * abs(self.mean):.2f} points of {name} ({figures})."


@dataclass(frozen=True)
class Comparison:
    """The records of all runs, and what follows from them.

    Attributes:
        settings: of the comparison.
        records: as they are in the folder, by run; metrics, parameters, seconds, bytes, ranks.
    """

    settings: Settings
    records: dict[Run, dict[str, Any]]

    @property
    def arms(self) -> list[str]:
        """The arms that were run."""
        return list(dict.fromkeys(run.arm for run in self.records))

    def values(self, arm: str, metric: str | None = None) -> list[float]:
        """An arm's metric (by default the one of the verdict), seed by seed."""
        metric = metric or self.settings.metric
        return [record["metrics"][metric] for run, record in self.records.items() if run.arm == arm]

    def differences(self) -> list[Difference]:
        """The plan against each of the other arms."""
        return [Difference.of(arm, self.values(PLAN), self.values(arm)) for arm in self.arms if arm != PLAN]

    def verdict(self) -> str:
        """A sentence for each difference, and what they say together."""
        found = {difference.arm: difference for difference in self.differences()}
        sentences = [difference.sentence(self.settings.metric) for difference in found.values()]
        if found[UNIFORM].sign > 0 and PERMUTED in found and found[PERMUTED].sign <= 0:
            sentences.append(
                "That permuted ranks do as well means that the gain is not from which matrix got which rank."
                if found[PERMUTED].sign == 0
                else "The gain is not from which matrix got which rank: permuted ranks do better still."
            )
        return " ".join(sentences)

    def table(self) -> Table:
        """Means with their standard errors, a row an arm; then the plan's paired differences."""
        metrics = REGRESSION_METRICS if self.settings.classes is None else CLASSIFICATION_METRICS
        together = max(record["side_by_side"] for record in self.records.values())
        table = Table(
            title=f"{self.settings.model}: mean and standard error over {self.settings.seeds} seeds, in points",
            caption=f"Peak memory is of {together} runs side by side." if together > 1 else None,
            box=box.SIMPLE_HEAD,
        )
        table.add_column("")
        for column in (*(metric.replace("_", "-") for metric in metrics), "parameters", "s a run", "peak memory"):
            table.add_column(column, justify="right")
        for arm in self.arms:
            own = [record for run, record in self.records.items() if run.arm == arm]
            table.add_row(
                TITLES[arm],
                *(_mean_and_error(self.values(arm, metric)) for metric in metrics),
                f"{own[0]['adapter_parameters']:,}",
                f"{np.mean([record['seconds'] for record in own]):.1f}",
                f"{max(record['peak_memory_bytes'] for record in own) / 2**20:,.0f} MiB",
            )
        table.add_section()
        for arm in self.arms:
            if arm != PLAN:
                differences = (np.subtract(self.values(PLAN, m), self.values(arm, m)).tolist() for m in metrics)
                table.add_row(
                    f"the plan less {TITLES[arm]}", *(_mean_and_error(values, "+") for values in differences)
                )
        return table

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "settings": asdict(self.settings),
            "metric": self.settings.metric,
            "means": {
                arm: {
                    metric: math.fsum(self.values(arm, metric)) / self.settings.seeds
                    for metric in next(iter(self.records.values()))["metrics"]
                }
                for arm in self.arms
            },
            "differences": [asdict(difference) for difference in self.differences()],
            "verdict": self.verdict(),
            "versions": {name: version(name) for name in ("sensilora", "torch", "transformers")},
            "runs": list(self.records.values()),
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw every run and the paired differences; see `sensilora.plots.plot_comparison`."""
        from sensilora.plots import plot_comparison  # matplotlib is an extra

        metric = self.settings.metric
        return plot_comparison(
            {TITLES[arm]: self.values(arm) for arm in self.arms},
            {TITLES[difference.arm]: (difference.low, difference.high) for difference in self.differences()},
            path,
            reference=TITLES[PLAN],
            metric=metric.replace("_", "-"),
        )


def _mean_and_error(values: Sequence[float], sign: str = "") -> str:
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{100 * float(np.mean(values)):{sign}.2f} ± {100 * error:.2f}"
