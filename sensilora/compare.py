"""Is a plan worth it on one's own data? Uniform LoRA, the plan, and its ranks permuted, over several seeds.

Every arm and seed is an adapter with a head of its own on one frozen model, and all of them train side by side in one
batch. A comparison that was killed goes on from its folder.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import operator
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
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from rich import box
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import sensilora
from sensilora import _files, mixed
from sensilora.adapters import check_plan
from sensilora.allocation import allocate, assign_ranks
from sensilora.data import Row, number
from sensilora.demo import peak_memory
from sensilora.errors import (
    BudgetError,
    DataError,
    ModelError,
    NonFiniteError,
    OutputExistsError,
    PlanError,
    SensiloraError,
)
from sensilora.integrations.transformers import (
    accuracy_and_macro_f1,
    encode_classification,
    length_limit,
    load_sequence_classifier,
    load_tokenizer,
    require_fit,
)
from sensilora.nn import MultiLoRALinear
from sensilora.ops import lora_linear, lora_segments
from sensilora.plan import RankPlan
from sensilora.sensitivity import SensitivityReport
from sensilora.sensitivity.calibrate import calibrate
from sensilora.sensitivity.checkpoint import weights_of
from sensilora.targets import is_conv1d, is_matrix, is_quantised, outermost_heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sensilora.integrations.adaptive import AdaLoRA

UNIFORM, PLAN, PERMUTED = "uniform", "plan", "permuted"
ADALORA, EVA, EVA_RANKS, EVA_START = "adalora", "eva", "eva_ranks", "eva_start"
TITLES = {
    UNIFORM: "uniform LoRA",
    PLAN: "the plan",
    PERMUTED: "permuted ranks",
    ADALORA: "AdaLoRA",
    EVA: "EVA",
    EVA_RANKS: "EVA's ranks alone",
    EVA_START: "EVA's start alone",
}
DEFAULT_ARMS = (UNIFORM, PLAN, PERMUTED)
_OF_PEFT = (ADALORA, EVA, EVA_RANKS, EVA_START)
CLASSIFICATION_METRICS, REGRESSION_METRICS = ("accuracy", "macro_f1", "matthews"), ("pearson", "spearman")
CONFIDENCE = 0.95

RESULT_FILE, PICTURE_FILE = "result.json", "compare.png"
_SETTINGS_FILE, _PLAN_FILE, _CHECKPOINT_FILE = "settings.json", "plan.json", "checkpoint.safetensors"
_EVA_FILE = "eva.safetensors"
_CALIBRATION_ROWS = 256
_CALIBRATION_BATCH = 32
_MAX_GRADIENT_NORM = 1.0  # as transformers' Trainer has it
# Batches are cut from chunks of so many batches of rows of like length.
_CHUNK = 8
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Settings:
    """What a comparison's numbers follow from, with digests of data and weights; the arguments of `run_compare`."""

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
    arms: tuple[str, ...] = DEFAULT_ARMS
    data_digest: str = ""
    weights_digest: str = ""

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in TITLES]
        if unknown:
            raise SensiloraError(f"there is no arm {unknown[0]!r}; choose among {', '.join(TITLES)}")
        if not {UNIFORM, PLAN} <= set(self.arms):
            raise SensiloraError(f"{UNIFORM} and {PLAN} are always among the arms, which are {', '.join(self.arms)}")
        for name, least in (("seeds", 2), ("epochs", 1), ("batch_size", 1), ("average_rank", 1), ("seed", 0)):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, operator.index(value))  # numpy's are numbers too
            except TypeError as error:
                raise SensiloraError(f"{name} must be a whole number, not {value!r}") from error
            if value < least:
                raise SensiloraError(f"{name} must be at least {least}, not {value}")
        if not 0 < self.learning_rate < math.inf:
            raise SensiloraError(f"learning_rate must be a finite number above 0, not {self.learning_rate}")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise SensiloraError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise SensiloraError(f"weight_decay must be 0 or a positive number, not {self.weight_decay}")
        if self.metric not in self.metrics:
            raise SensiloraError(f"metric {self.metric!r} does not fit the data; choose {', '.join(self.metrics)}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Of each run; "f1" is that of the second of two classes."""
        if self.classes is None:
            return REGRESSION_METRICS
        return (*CLASSIFICATION_METRICS, "f1") if len(self.classes) == 2 else CLASSIFICATION_METRICS


@dataclass(frozen=True)
class Run:
    """One fine-tuning: an arm, and the seed of its head, its adapter and the order of its rows."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of the adapter, and of the file with the record."""
        return f"{self.arm}_{self.seed}"

    @property
    def title(self) -> str:
        """The arm in words."""
        return TITLES.get(self.arm, self.arm)


class Rows:
    """Tokenized rows on a device, end to end, of which a batch is put together there without waiting for it.

    Args:
        examples: of each row, lists of tokens by the model's argument, and the label under "labels".
        pad_token_id: behind shorter rows of a batch.
        device: where the tokens are kept.

    Attributes:
        lengths: tokens of each row.
        labels: of each row.
    """

    def __init__(self, examples: Sequence[dict[str, Any]], pad_token_id: int, device: torch.device) -> None:
        self.lengths = [len(example["input_ids"]) for example in examples]
        self.labels = [example["labels"] for example in examples]
        self._padding = {"input_ids": pad_token_id}
        ends = list(itertools.accumulate(self.lengths))
        self._starts = torch.tensor([end - length for end, length in zip(ends, self.lengths, strict=True)]).to(device)
        self._lengths, self._labels = torch.tensor(self.lengths).to(device), torch.tensor(self.labels).to(device)
        self._tokens = {
            key: torch.tensor(list(itertools.chain.from_iterable(example[key] for example in examples))).to(device)
            for key in examples[0]
            if key != "labels"
        }

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, places: Tensor, width: int) -> dict[str, Tensor]:
        """The rows at `places` (int64 on the device), each `width` wide; none may be longer."""
        column = torch.arange(width, device=places.device)
        inside = column < self._lengths[places].unsqueeze(1)
        token = torch.where(inside, self._starts[places].unsqueeze(1) + column, 0)
        batch = {key: torch.where(inside, of[token], self._padding.get(key, 0)) for key, of in self._tokens.items()}
        return batch | {"attention_mask": inside.long(), "labels": self._labels[places]}

    def padded(self, places: Sequence[int]) -> dict[str, Tensor]:
        """The rows at `places`, as wide as the longest of them."""
        return self.batch(
            torch.tensor(places, device=self._starts.device), max(self.lengths[place] for place in places)
        )


@dataclass(frozen=True)
class Task:
    """The frozen model, and the tokenized rows."""

    model: Any
    settings: Settings
    train: Rows
    held_out: Rows

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device


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
    arms: Sequence[str] = DEFAULT_ARMS,
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

    With PEFT there are more arms. "adalora" lowers its ranks while it trains, from 1.5 times the average one to the
    plan's number of parameters; it runs by itself, one seed after another, and a run that was killed begins anew.
    "eva" takes its ranks, and where A begins, from the inputs of the rows that the plan is made from; "eva_ranks"
    takes the ranks alone and "eva_start" uniform LoRA's ranks, which tells apart what either does.

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
        metric: what the verdict is about: "accuracy", "macro_f1", "matthews" or, of the second of two classes, "f1";
            for regression "pearson" or "spearman". None for the first.
        seeds: runs of each arm, at least 2; seeds are `seed`, `seed` + 1 and so on.
        seed: the first.
        epochs, batch_size, learning_rate, warmup, weight_decay, dropout: of each run; AdamW with linear warm-up (as a
            share of the steps) and decay, each run's gradient clipped at norm 1. `dropout` is on the adapters'
            inputs; the model's own is as configured.
        max_length: tokens of a row.
        serial: train one run after another, where the batches of all together do not fit the device.
        arms: which to compare; uniform LoRA and the plan are always among them.
        device: where to train.
        dtype: of the frozen weights; None for the checkpoint's own. Adapters and heads train in fp32 at least.
        checkpoint_every: steps between two states to go on from.
        force: begin anew where the folder holds another comparison.
        progress: show bars.

    Returns:
        What came out, also written to the folder.

    Raises:
        OutputExistsError: the folder holds another comparison and `force` is false, or something else.
        PlanError: the plan is for another model, adapts its head, gives uniform ranks, or does not go with an arm of
            PEFT's, which wants one scale and, for AdaLoRA, some steps.
        DataError: rows lack labels, or have such as do not fit.
        ModelError: the model does not load, or is quantised.
        NonFiniteError: a loss, or an output for the held-out rows, became NaN or Inf.
        SensiloraError: an argument is out of range, an arm needs PEFT, which is missing, or the runs do not fit the
            GPU side by side.
    """
    if not set(arms).isdisjoint(_OF_PEFT):
        _adaptive()
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise SensiloraError(f"device={str(device)!r} was asked for, and torch finds no GPU; leave it out")
    if any(row.label is None for row in (*rows, *eval_rows)):
        raise DataError(
            "some rows have no label; comparisons are of classifiers and regressors, and not yet of causal models: "
            "name the field that holds the label (--label-field)"
        )
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
        arms=(*(arm for arm in TITLES if arm in arms), *(arm for arm in arms if arm not in TITLES)),
    )
    if checkpoint_every < 1:
        raise SensiloraError(f"checkpoint_every must be at least 1, not {checkpoint_every}")
    task = prepare(settings, rows, eval_rows, dtype)
    if plan is not None:  # what is wrong with it is told before anything is written
        check_plan(plan, task.model, dict(task.model.named_modules()), strict=True)
        _check_no_head(plan, task.model)
        arm_plans(plan, task.settings)
    if not set(task.settings.arms).isdisjoint(_OF_PEFT):
        adalora_steps = _steps(task) if ADALORA in task.settings.arms else None
        _adaptive().check_comparable(plan, adalora_steps)
    folder = Path(output)
    goes_on = _is_ours(folder, task.settings, force)
    plan = _plan(task, plan, folder if goes_on else None, progress)
    if not goes_on:
        _begin(folder, task.settings, plan)
    starts = _eva_starts(task, plan, folder)
    plans = arm_plans(plan, task.settings, starts)
    records = _records(folder, plans)
    pending = [run for run in plans if run not in records]
    together = [run for run in pending if run.arm != ADALORA]
    groups = [[run] for run in together] if serial else [together] if together else []
    for group in [*groups, *([run] for run in pending if run.arm == ADALORA)]:
        if group[0].arm == ADALORA:
            made = {run: train_adalora(task, run, plan, progress) for run in group}
        else:
            own = {run: plans[run] for run in group}
            made = train(task, own, folder / _CHECKPOINT_FILE, checkpoint_every, progress, starts)
        for run, record in made.items():
            records[run] = record
            _files.write_json(_record_file(folder, run), record)
        _files.remove_all_but(folder, _CHECKPOINT_FILE, ())
    found = Comparison(task.settings, {run: records[run] for run in plans})
    _files.write_json(folder / RESULT_FILE, found.as_dict())
    return found


# Model, data and folder


def prepare(settings: Settings, rows: Sequence[Row], eval_rows: Sequence[Row], dtype: torch.dtype | None) -> Task:
    """The model and the tokenized rows on the device; the settings get what follows from these.

    Raises:
        DataError: labels do not fit.
        ModelError: the model does not load, or is quantised.
    """
    tokenizer = load_tokenizer(settings.model)
    model = _new_model(settings, settings.seed, dtype)
    require_fit(model, tokenizer)
    quantised = next(
        (name for name, module in model.named_modules() if is_matrix(module) and is_quantised(module)), None
    )
    if quantised is not None:
        raise ModelError(
            f"the weight of {quantised} in {settings.model} is quantised, and runs side by side share the weights of "
            "the unquantised model; name that one: its plan fits the quantised model too"
        )
    limit = length_limit(model, settings.max_length)
    train, held_out = (_encoded(tokenizer, part, settings.classes, limit) for part in (rows, eval_rows))
    settings = replace(
        settings, max_length=limit, data_digest=_digest([train, held_out]), weights_digest=_digest(weights_of(model))
    )
    model = model.to(settings.device)
    train_rows, held_out_rows = (Rows(part, tokenizer.pad_token_id, model.device) for part in (train, held_out))
    return Task(model, settings, train_rows, held_out_rows)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _new_model(settings: Settings, seed: int, dtype: torch.dtype | None) -> Any:
    torch.manual_seed(seed)
    names = ["score"] if settings.classes is None else [str(label) for label in settings.classes]
    return load_sequence_classifier(settings.model, labels=names, dtype=dtype)


def _check_no_head(plan: RankPlan, model: Any) -> None:
    """Raise PlanError if a matrix of the head has a rank: each run trains a head of its own in full."""
    for head in outermost_heads(model):
        for name, rank in plan.ranks.items():
            if rank and (name == head or name.startswith(head + ".")):
                raise PlanError(
                    f"the plan adapts {name}, but a comparison trains the head {head!r} in full; make a plan "
                    "without it"
                )


def _encoded(
    tokenizer: Any, rows: Sequence[Row], classes: Sequence[int | str] | None, max_length: int
) -> list[dict[str, Any]]:
    """Token ids and label of each row; the label is a place in `classes`, or the number itself."""
    if classes is not None:
        return encode_classification(tokenizer, rows, labels=classes, max_length=max_length)
    examples = encode_classification(
        tokenizer, [replace(row, label=None) for row in rows], labels=(), max_length=max_length
    )
    return [example | {"labels": number(row.label)} for example, row in zip(examples, rows, strict=True)]


def _is_ours(folder: Path, settings: Settings, force: bool) -> bool:
    """Whether the folder holds a comparison with these settings, which goes on.

    Raises:
        OutputExistsError: it holds something else, or another comparison and `force` is false.
    """
    file = folder / _SETTINGS_FILE
    if folder.is_file():
        raise OutputExistsError(f"output {folder} is a file; name a folder")
    if file.is_file():
        same = file.read_text() == _as_text(settings)
        if same and (folder / _PLAN_FILE).is_file():
            return True
        if not same and not force:
            raise OutputExistsError(
                f"output folder {folder} holds a comparison with other settings, data or weights; name another "
                "folder, or pass --force (force=True) to begin anew"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise OutputExistsError(f"output folder {folder} holds files that are no comparison; name another folder")
    return False


def _begin(folder: Path, settings: Settings, plan: RankPlan) -> None:
    """Write settings and plan, after all that can be wrong with them, and remove what another comparison left."""
    results = (_PLAN_FILE, _EVA_FILE, _CHECKPOINT_FILE, RESULT_FILE, PICTURE_FILE)
    for old in (*folder.glob("runs/*.json"), *(folder / name for name in results)):
        old.unlink(missing_ok=True)
    _files.write_text(folder / _SETTINGS_FILE, _as_text(settings))
    plan.save(folder / _PLAN_FILE)


def _as_text(settings: Settings) -> str:
    return json.dumps(asdict(settings), indent=1) + "\n"


def _record_file(folder: Path, run: Run) -> Path:
    return folder / "runs" / f"{run.name}.json"


def _records(folder: Path, plans: Mapping[Run, RankPlan]) -> dict[Run, dict[str, Any]]:
    files = {run: _record_file(folder, run) for run in plans}
    return {run: json.loads(file.read_text()) for run, file in files.items() if file.is_file()}


# Plans


def _plan(task: Task, plan: RankPlan | None, folder: Path | None, progress: bool) -> RankPlan:
    """The plan of the comparison: the folder's, the given one, or one that is made.

    Raises:
        PlanError: there is nothing to compare it with.
    """
    if folder is not None:
        return RankPlan.load(folder / _PLAN_FILE)
    if plan is None:
        settings = task.settings
        report = calibrate(task.model, calibration_batches(task), seed=settings.seed, progress=progress)
        plan = plan_of(report, settings.average_rank)
    arm_plans(plan, task.settings)
    return plan


def _adaptive() -> Any:
    """The module of PEFT's methods.

    Raises:
        SensiloraError: PEFT is not installed.
    """
    try:
        from sensilora.integrations import adaptive
    except ImportError as error:
        raise SensiloraError(str(error)) from error
    return adaptive


Starts = Mapping[str, Mapping[str, Tensor]]


def _eva_starts(task: Task, plan: RankPlan, folder: Path) -> Starts:
    """A at the beginning, (rank, in_features) by matrix, of the arms of PEFT's EVA; kept in the folder.

    "eva_ranks" has it for the ranks alone.
    """
    settings, file = task.settings, folder / _EVA_FILE
    wanted = [arm for arm in settings.arms if arm in (EVA, EVA_RANKS, EVA_START)]
    if wanted and not file.is_file():
        tensors: dict[str, Tensor] = {}
        # A pooler has one input of each row, and EVA seeks up to twice as many directions as the average rank, or
        # more where its first ranks cost less than the plan's.
        batches = calibration_batches(task, least=4 * max(uniform_ranks(plan).values()))
        if EVA_START in wanted:
            found = _adaptive().eva_start(task.model, batches, uniform_ranks(plan))
            tensors |= {f"{EVA_START}/{name}": A for name, A in found.items()}
        if wanted != [EVA_START]:
            tensors |= {f"{EVA}/{name}": A for name, A in _adaptive().eva(task.model, batches, plan).items()}
        _files.write_tensors(file, tensors)
    stored = load_file(file, device=str(task.device)) if wanted else {}
    return {
        arm: {
            key.partition("/")[2]: A
            for key, A in stored.items()
            if key.partition("/")[0] == (EVA if arm == EVA_RANKS else arm)
        }
        for arm in wanted
    }


def calibration_batches(
    task: Task, rows: int = _CALIBRATION_ROWS, *, least: int | None = None
) -> list[dict[str, Tensor]]:
    """At most so many training rows, drawn with the comparison's first seed, in batches of like length.

    With `least` every batch has as many rows, if there are as many at all.
    """
    drawn = random.Random(task.settings.seed).sample(range(len(task.train)), min(rows, len(task.train)))
    drawn.sort(key=task.train.lengths.__getitem__)
    starts = list(range(0, len(drawn), _CALIBRATION_BATCH))
    if least is not None:
        batches = max(1, len(drawn) // max(least, _CALIBRATION_BATCH))
        starts = [place * len(drawn) // batches for place in range(batches)]
    return [task.train.padded(drawn[start:end]) for start, end in itertools.pairwise([*starts, len(drawn)])]


def plan_of(report: SensitivityReport, average_rank: int) -> RankPlan:
    """The plan for as many parameters as uniform LoRA of this rank has.

    At an average of 1 a matrix may go without, or there would be nothing to allot.

    Raises:
        BudgetError: a matrix is too small for that rank.
    """
    largest = min(min(report[name].shape) for name in report)
    if average_rank > largest:
        raise BudgetError(f"average_rank {average_rank} does not fit the smallest matrix; give at most {largest}")
    budget = average_rank * sum(sum(report[name].shape) for name in report)
    return allocate(report, total_parameters=budget, min_rank=min(average_rank - 1, 1))


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


def arm_plans(plan: RankPlan, settings: Settings, starts: Starts | None = None) -> dict[Run, RankPlan]:
    """The plan of each run, arm by arm. The permuted arm is left out where no permutation changes a rank.

    AdaLoRA's is the plan that it has the parameters of.

    Args:
        plan: of the comparison.
        settings: its arms and seeds.
        starts: A at the beginning, by arm and matrix, whose rows are the ranks of EVA's arms; None leaves these out.

    Raises:
        PlanError: the plan's ranks are the uniform ones, so that there is nothing to compare.
    """
    uniform = uniform_ranks(plan)
    if uniform == plan.ranks:
        raise PlanError("the plan gives every matrix the rank of uniform LoRA, so there is nothing to compare")
    seeds = range(settings.seed, settings.seed + settings.seeds)
    permuted = {seed: permuted_ranks(plan, seed) for seed in seeds}
    of_arm = {UNIFORM: plan.with_ranks(uniform), PLAN: plan, ADALORA: plan}
    for arm, start in (starts or {}).items():
        of_arm[arm] = plan.with_ranks({name: len(start[name]) if name in start else 0 for name in plan.matrices})
    plans: dict[Run, RankPlan] = {}
    for arm in settings.arms:
        if arm in of_arm:
            plans |= {Run(arm, seed): of_arm[arm] for seed in seeds}
        elif arm == PERMUTED and any(ranks != plan.ranks for ranks in permuted.values()):
            plans |= {Run(arm, seed): plan.with_ranks(permuted[seed]) for seed in seeds}
    return plans


# Training


class _Layout:
    """What the layers of all runs share: whose rows a batch holds.

    Attributes:
        runs: their number; a batch holds as many rows of each, those of one run after those of another.
        rows: of the whole batch.
        only: the one run whose rows the batch holds instead, by its place; None for all.
    """

    def __init__(self, runs: int) -> None:
        self.runs, self.rows = runs, 0
        self.only: int | None = None
        self._segments: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def segments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`offsets` and `adapters` of `sensilora.ops.lora_segments` for x (rows, ..., features): a segment a run.

        Raises:
            SensiloraError: x's first dimension is not the batch.
        """
        if x.shape[0] != self.rows:
            raise SensiloraError(
                f"a layer got {x.shape[0]} rows of a batch of {self.rows}, so that it cannot be told which are of "
                "which run; train one after another with --serial (serial=True)"
            )
        each = x.shape[:-1].numel() // self.runs
        if (each, x.device) not in self._segments:
            runs = torch.arange(self.runs + 1, device=x.device)
            self._segments[each, x.device] = runs * each, runs[:-1]
        return self._segments[each, x.device]


class _Stacked(nn.Module):
    """All runs' adapters of one matrix, in two parameters: an optimiser's step costs what it does for one run.

    Attributes:
        lora_A: Parameter (Σ ranks, in_features), one run's A below another's.
        lora_B: Parameter (Σ ranks, out_features), one run's transposed B below another's.
        own: each run's rows of both.
    """

    def __init__(self, layer: MultiLoRALinear, names: Sequence[str], layout: _Layout) -> None:
        super().__init__()
        self.base_layer, self.layout = layer.base_layer, layout
        self.weight, self.bias = layer.weight, layer.bias
        adapters = [layer.adapters.get(name) for name in names]
        self.ranks = [0 if adapter is None else adapter.rank for adapter in adapters]
        self.scalings = [0.0 if adapter is None else adapter.scaling for adapter in adapters]
        self.dropouts = [0.0 if adapter is None else adapter.dropout for adapter in adapters]
        ends = list(itertools.accumulate(self.ranks))
        self.own = [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]
        present = [adapter for adapter in adapters if adapter is not None]
        self.lora_A = nn.Parameter(torch.cat([adapter.lora_A.detach() for adapter in present]))
        self.lora_B = nn.Parameter(torch.cat([adapter.lora_B.detach().t() for adapter in present]))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., in_features) to (rows, ..., out_features)."""
        weight = self.weight.t() if is_conv1d(self.base_layer) else self.weight
        ps = self.dropouts if self.training else [0.0] * len(self.dropouts)
        only = self.layout.only
        if only is None:
            return lora_segments(
                x, weight, self.bias, self.lora_A, self.lora_B.t(), self.ranks, self.scalings,
                *self.layout.segments(x), dropout_ps=ps,
            )  # fmt: skip
        if self.ranks[only] == 0:
            return self.base_layer(x)
        own = self.own[only]
        lora_A, lora_B = self.lora_A[own], self.lora_B[own].t()
        return lora_linear(x, weight, self.bias, lora_A, lora_B, self.scalings[only], dropout_p=ps[only])


class _Heads(nn.Module):
    """Each run's own copy of a head."""

    def __init__(self, heads: Sequence[nn.Module], layout: _Layout) -> None:
        super().__init__()
        self.runs, self.layout = nn.ModuleList(heads), layout

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ...) of all runs, or of the one that the layout says."""
        x = x.to(next(self.runs.parameters()).dtype)
        if self.layout.only is not None:
            return self.runs[self.layout.only](x)
        return torch.cat([head(part) for head, part in zip(self.runs, x.chunk(len(self.runs)), strict=True)])


@dataclass(frozen=True)
class _Piece:
    """A part of one run: some rows of a parameter, or all of it."""

    parameter: nn.Parameter
    rows: slice


Pieces = Mapping[Run, Mapping[str, _Piece]]


@contextmanager
def _prepared(task: Task, plans: Mapping[Run, RankPlan], starts: Starts) -> Iterator[tuple[_Layout, Pieces]]:
    """What each run trains, by name. Inside the block the model carries the adapters and heads of all of them."""
    model, settings = task.model, task.settings
    layout = _Layout(len(plans))
    originals = {name: model.get_submodule(name) for name in outermost_heads(model)}
    drawn = {}
    for seed in dict.fromkeys(run.seed for run in plans):
        source = _new_model(settings, seed, model.dtype)
        drawn[seed] = {name: _trainable(source.get_submodule(name), model) for name in originals}
    heads = {name: _Heads([copy.deepcopy(drawn[run.seed][name]) for run in plans], layout) for name in originals}
    # Of each matrix before it gets adapters, of which some runs may have none.
    originals |= {name: model.get_submodule(name) for name in next(iter(plans.values())).ranks}
    try:
        with warnings.catch_warnings():
            # Of a new head being frozen: each run trains its own.
            warnings.filterwarnings("ignore", message="the head .* looks new", category=UserWarning)
            for run, plan in plans.items():
                torch.manual_seed(run.seed)
                mixed.add_adapter(model, run.name, plan, dropout=settings.dropout)
                if run.arm in (EVA, EVA_START):
                    for name, A in starts[run.arm].items():
                        if len(A):
                            model.get_submodule(name).lora_A[run.name].data.copy_(A)
        names = [run.name for run in plans]
        found = {name: module for name, module in model.named_modules() if isinstance(module, MultiLoRALinear)}
        layers = {name: _Stacked(layer, names, layout) for name, layer in found.items()}
        for name, module in (heads | layers).items():
            model.set_submodule(name, module.requires_grad_(name in heads))
        for layer in layers.values():
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)
        yield (
            layout,
            {
                run: {
                    f"{name}.{part}": _Piece(getattr(layer, part), layer.own[place])
                    for name, layer in layers.items()
                    if layer.ranks[place]
                    for part in ("lora_A", "lora_B")
                }
                | {
                    f"{name}.{key}": _Piece(parameter, slice(None))
                    for name, head in heads.items()
                    for key, parameter in head.runs[place].named_parameters()
                }
                for place, run in enumerate(plans)
            },
        )
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
        model.eval()


def _trainable(head: nn.Module, model: Any) -> nn.Module:
    """The head on the model's device, in fp32 at least."""
    return head.to(model.device, torch.promote_types(model.dtype, torch.float32))


def train(
    task: Task,
    plans: Mapping[Run, RankPlan],
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    progress: bool = True,
    starts: Starts | None = None,
) -> dict[Run, dict[str, Any]]:
    """Fine-tune these runs side by side, and the record of each.

    Args:
        task: see `prepare`.
        plans: the ranks of each run.
        checkpoint: a file to go on from, and to write every `checkpoint_every` steps; None for none.
        checkpoint_every: see `checkpoint`.
        progress: show a bar.
        starts: A at the beginning of the arms "eva" and "eva_start", by arm and matrix.

    Raises:
        NonFiniteError: a loss became NaN or Inf.
        SensiloraError: the runs do not fit the GPU side by side.
    """
    with _prepared(task, plans, starts or {}) as (layout, pieces), _enough_memory(), peak_memory(task.device) as peak:
        state = _State(task, pieces, checkpoint)
        _fit(task, layout, state, checkpoint_every, progress)
        results = {run: _evaluate(task, layout, place) for place, run in enumerate(plans)}
    records = {}
    for place, (run, plan) in enumerate(plans.items()):
        trained = sum(piece.parameter[piece.rows].numel() for piece in pieces[run].values())
        records[run] = _record(run, results[run], state, place, plan.ranks, plan.parameters, peak[0])
        records[run]["head_parameters"] = trained - plan.parameters
    return records


def train_adalora(task: Task, run: Run, plan: RankPlan, progress: bool = True) -> dict[str, Any]:
    """Fine-tune by PEFT's AdaLoRA, down to the plan's number of parameters, and the record of it.

    Head, rows, their order, optimiser, schedule and clipping are those of the other arms.

    Raises:
        NonFiniteError: a loss became NaN or Inf.
        PlanError: there are too few steps, or the plan's scale depends on the rank.
        SensiloraError: PEFT is not installed, or the model does not fit the GPU.
    """
    settings, layout = task.settings, _Layout(1)
    model = _new_model(settings, run.seed, task.model.dtype).to(task.device)
    heads = [_Heads([_trainable(model.get_submodule(name), model)], layout) for name in outermost_heads(model)]
    torch.manual_seed(run.seed)
    steps = _steps(task)
    with _enough_memory(), peak_memory(task.device) as peak:
        adalora = _adaptive().AdaLoRA(model, plan, steps=steps, dropout=settings.dropout)
        for name, head in zip(outermost_heads(model), heads, strict=True):
            model.set_submodule(name, head.requires_grad_(True))
        own = replace(task, model=adalora.model)
        trained = {name: p for name, p in adalora.model.named_parameters() if p.requires_grad}
        pieces = {run: {name: _Piece(parameter, slice(None)) for name, parameter in trained.items()}}
        state = _State(own, pieces, None)
        _fit(own, layout, state, steps, progress, adalora)
        metrics = _evaluate(own, layout, 0)
    record = _record(run, metrics, state, 0, adalora.ranks(), adalora.parameters(), peak[0])
    record["initial_parameters"] = adalora.initial_parameters
    record["head_parameters"] = sum(p.numel() for p in trained.values()) - adalora.initial_parameters
    return record


def _record(
    run: Run, metrics: dict[str, float], state: _State, place: int, ranks: dict[str, int], parameters: int, peak: int
) -> dict[str, Any]:
    return {
        "arm": run.arm,
        "seed": run.seed,
        "metrics": metrics,
        "adapter_parameters": parameters,
        "training_loss": float(state.losses[-state.steps_an_epoch :, place].mean()),
        "seconds": state.seconds / state.side_by_side,
        "peak_memory_bytes": peak,
        "side_by_side": state.side_by_side,
        "epochs": len(state.losses) // state.steps_an_epoch,
        "ranks": ranks,
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

    def __init__(self, task: Task, pieces: Pieces, file: Path | None) -> None:
        self.pieces, self.file = pieces, file
        # Runs whose parameters are stacked name the same ones.
        unique = {id(piece.parameter): piece.parameter for own in pieces.values() for piece in own.values()}
        self.parameters = list(unique.values())
        # AdamW is elementwise, so one optimiser is as good as one for each run.
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=task.settings.learning_rate, weight_decay=task.settings.weight_decay, fused=True
        )
        # Which run each row of each parameter is of, all parameters' rows below one another.
        run_of_row = {key: torch.empty(len(parameter), dtype=torch.int64) for key, parameter in unique.items()}
        for place, own in enumerate(pieces.values()):
            for piece in own.values():
                run_of_row[id(piece.parameter)][piece.rows] = place
        self._run_of_row = torch.cat(list(run_of_row.values())).to(task.device)
        self._mine = self._run_of_row == torch.arange(len(pieces), device=task.device).unsqueeze(1)
        steps = _steps(task)
        self.steps_an_epoch = steps // task.settings.epochs
        self.losses = torch.zeros(steps, len(pieces), device=task.device)
        # After a kill some runs may be finished, and these be fewer than trained side by side.
        self.step, self.seconds, self.side_by_side = 0, 0.0, len(pieces)
        if file is not None and file.is_file():
            self._load(file)

    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        """One step of AdamW, each run's gradient clipped by its own norm."""
        for parameter in self.parameters:
            if parameter.grad is None:  # of a part of the head that has no use
                parameter.grad = torch.zeros_like(parameter)
        gradients = [cast(Tensor, parameter.grad) for parameter in self.parameters]
        squares = torch.cat([gradient.double().square().reshape(len(gradient), -1).sum(1) for gradient in gradients])
        # Chosen and not multiplied by 0, which would carry one run's NaN to the others.
        norms = torch.where(self._mine, squares, 0.0).sum(1).sqrt()
        factors = (_MAX_GRADIENT_NORM / (norms + 1e-6)).clamp(max=1.0)[self._run_of_row]
        for gradient, own in zip(gradients, factors.split([len(gradient) for gradient in gradients]), strict=True):
            gradient.mul_(own.to(gradient.dtype).view(-1, *(1 for _ in gradient.shape[1:])))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def save(self) -> None:
        """Write everything, in one atomic step."""
        if self.file is None:
            return
        progress = [self.step, self.seconds, self.side_by_side]
        tensors = {"progress": torch.tensor(progress, dtype=torch.float64)}
        for place, (run, own) in enumerate(self.pieces.items()):
            tensors[f"{run.name}/losses"] = self.losses[:, place]
            for name, piece in own.items():
                state = self.optimizer.state[piece.parameter]
                tensors[f"{run.name}/{name}"] = piece.parameter[piece.rows]
                tensors[f"{run.name}/{name}/step"] = state["step"]
                for key in _MOMENTS:
                    tensors[f"{run.name}/{name}/{key}"] = state[key][piece.rows]
        _files.write_tensors(self.file, tensors)

    @torch.no_grad()
    def _load(self, file: Path) -> None:
        try:
            tensors = load_file(file, device=str(self.losses.device))
        except SafetensorError as error:
            raise DataError(f"{file} is damaged ({error}); remove it to train its runs anew") from error
        if any(f"{run.name}/losses" not in tensors for run in self.pieces):
            return  # of a run that was finished
        step, self.seconds, side_by_side = tensors["progress"].tolist()
        self.step, self.side_by_side = int(step), int(side_by_side)
        for parameter in self.parameters:
            self.optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in _MOMENTS}
        for place, (run, own) in enumerate(self.pieces.items()):
            self.losses[:, place] = tensors[f"{run.name}/losses"]
            for name, piece in own.items():
                state = self.optimizer.state[piece.parameter]
                piece.parameter[piece.rows] = tensors[f"{run.name}/{name}"]
                state["step"] = tensors[f"{run.name}/{name}/step"]
                for key in _MOMENTS:
                    state[key][piece.rows] = tensors[f"{run.name}/{name}/{key}"]


def _steps(task: Task) -> int:
    """Of the whole training, for every seed."""
    return task.settings.epochs * len(_order(task, 0, 0))


def _order(task: Task, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each batch of an epoch.

    Batches are cut from chunks of rows of like length, which leaves little padding. Which chunk comes when is the
    same for all seeds, whose rows share a batch when they train side by side; which of its rows is the seed's own.
    """
    size, lengths = task.settings.batch_size, task.train.lengths
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    draw, batches = random.Random(f"order of rows {seed} {epoch}"), []
    for start in range(0, len(by_length), _CHUNK * size):
        chunk = by_length[start : start + _CHUNK * size]
        draw.shuffle(chunk)
        batches += [chunk[first : first + size] for first in range(0, len(chunk), size)]
    random.Random(f"order of batches {epoch}").shuffle(batches)
    return batches


def _fit(
    task: Task,
    layout: _Layout,
    state: _State,
    checkpoint_every: int,
    progress: bool,
    adalora: AdaLoRA | None = None,
) -> None:
    model, settings, runs = task.model, task.settings, list(state.pieces)
    steps = len(state.losses)
    warmup = max(1, round(settings.warmup * steps))
    # Runs of one seed have the same rows, which are put together once.
    seeds = list(dict.fromkeys(run.seed for run in runs))
    place_of_run = torch.tensor([seeds.index(run.seed) for run in runs]).to(task.device)
    model.train()
    start, before = time.perf_counter(), state.seconds
    shuffled = -1
    with tqdm(total=steps, initial=state.step, desc=_described(runs), unit="step", disable=not progress) as bar:
        while state.step < steps:
            epoch, position = divmod(state.step, state.steps_an_epoch)
            if epoch != shuffled:
                orders, shuffled = [_order(task, seed, epoch) for seed in seeds], epoch
                # One copy an epoch: each would make the host wait for the device.
                rows = torch.tensor([[row for batch in order for row in batch] for order in orders]).to(task.device)
                firsts = list(itertools.accumulate(map(len, orders[0]), initial=0))
            own = rows[:, firsts[position] : firsts[position + 1]]
            width = max(task.train.lengths[row] for order in orders for row in order[position])
            # Whatever is drawn (dropout) follows from the seed and the step, also after a kill.
            torch.manual_seed(((runs[0].seed << 32) + state.step) % 2**64)
            losses = _losses(task, layout, task.train.batch(own[place_of_run].flatten(), width))
            total = losses.sum()
            (total if adalora is None else total + adalora.penalty()).backward()
            state.update(
                settings.learning_rate * min((state.step + 1) / warmup, (steps - state.step) / max(steps - warmup, 1))
            )
            if adalora is not None:
                adalora.after_step(state.step)
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
    return f"training {runs[0].title}, seed {runs[0].seed}"


def _losses(task: Task, layout: _Layout, batch: dict[str, Tensor]) -> Tensor:
    """(runs,): the mean loss of each run's rows."""
    labels = batch.pop("labels")
    layout.rows = len(labels)
    # One run has another, faster layer.
    layout.only = 0 if layout.runs == 1 else None
    logits = task.model(**batch).logits
    if task.settings.classes is None:
        losses = (logits.squeeze(-1) - labels.to(logits.dtype)).square()
    else:
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses.view(layout.runs, -1).mean(1)


def _require_finite(runs: Sequence[Run], state: _State) -> None:
    bad = ~state.losses[: state.step].isfinite()
    if bad.any():
        step, place = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"training diverged: the loss of {runs[place].title}, seed {runs[place].seed}, is "
            f"{float(state.losses[step, place])} at step {step + 1}; lower the learning rate, and pass --force"
        )


@torch.inference_mode()
def _evaluate(task: Task, layout: _Layout, place: int) -> dict[str, float]:
    """All metrics of one run on the held-out rows."""
    model, held_out = task.model.eval(), task.held_out
    order = sorted(range(len(held_out)), key=held_out.lengths.__getitem__)
    # As many rows as in training, which are known to fit.
    size = task.settings.batch_size * layout.runs
    layout.only = place
    outputs: list[Tensor] = []
    for start in range(0, len(order), size):
        batch = held_out.padded(order[start : start + size])
        del batch["labels"]
        outputs.append(model(**batch).logits.float())
    gold = [held_out.labels[row] for row in order]
    logits = torch.cat(outputs)
    if not bool(logits.isfinite().all()):
        raise NonFiniteError(
            "the trained model gives NaN or Inf for rows that are held out; lower the learning rate, or compute in "
            "another dtype, and pass --force"
        )
    if task.settings.classes is None:
        return regression_metrics(gold, logits.squeeze(-1).tolist())
    return classification_metrics(gold, logits.argmax(-1).tolist(), binary=len(task.settings.classes) == 2)


# Metrics


def classification_metrics(
    gold: Sequence[int], predicted: Sequence[int], *, binary: bool = False
) -> dict[str, float]:
    """Accuracy, macro-F1, and Matthews' correlation for any number of classes (Gorodkin 2004, R_K).

    With `binary` also the F1 of class 1. The correlation is 0 where it is undefined, all rows having one class in
    `gold` or `predicted`, and so is the F1 where class 1 is in neither.
    """
    accuracy, macro_f1 = accuracy_and_macro_f1(gold, predicted)
    rows, there, said = len(gold), Counter(gold), Counter(predicted)
    hits = sum(g == p for g, p in zip(gold, predicted, strict=True))
    covariance = hits * rows - sum(there[label] * said[label] for label in there)
    spread = math.prod(rows**2 - sum(n**2 for n in counts.values()) for counts in (there, said))
    matthews = covariance / math.sqrt(spread) if spread else 0.0
    found = {"accuracy": accuracy, "macro_f1": macro_f1, "matthews": matthews}
    if binary:
        both = sum(g == p == 1 for g, p in zip(gold, predicted, strict=True))
        found["f1"] = 2 * both / (there[1] + said[1]) if there[1] + said[1] else 0.0
    return found


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
        return 0 if self.is_constant else (self.low > 0) - (self.high < 0)

    @property
    def is_constant(self) -> bool:
        """Whether the difference is the same in every seed, by chance: that leaves its noise unknown, not absent."""
        return self.standard_error < 1e-12

    def sentence(self, metric: str) -> str:
        """What the interval says, in words."""
        name = metric.replace("_", "-")
        if self.is_constant and abs(self.mean) < 1e-12:
            return (
                f"The plan and {TITLES[self.arm]} have the same {name} in each of {self.seeds} seeds, which says "
                "nothing about the noise: take more seeds or more evaluation rows."
            )
        if self.is_constant:
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
        told = PERMUTED in found and not found[PERMUTED].is_constant
        if found[UNIFORM].sign > 0 and told and found[PERMUTED].sign <= 0:
            sentences.append(
                "That permuted ranks do as well means that the gain is not from which matrix got which rank."
                if found[PERMUTED].sign == 0
                else "The gain is not from which matrix got which rank: permuted ranks do better still."
            )
        return " ".join(sentences)

    def table(self) -> Table:
        """Means with their standard errors, a row an arm; then the plan's paired differences."""
        metrics = self.settings.metrics
        together = max(record["side_by_side"] for record in self.records.values())
        notes = [f"Peak memory is of {together} runs side by side."] if together > 1 else []
        if ADALORA in self.arms:
            first = next(record for run, record in self.records.items() if run.arm == ADALORA)
            notes.append(
                f"AdaLoRA began with {first['initial_parameters']:,} parameters, trained one seed after another, and "
                "never shrinks what it stores."
            )
        table = Table(
            title=f"{self.settings.model}: mean and standard error over {self.settings.seeds} seeds, in points",
            caption=" ".join(notes) or None,
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
                f"{round(np.mean([record['adapter_parameters'] for record in own])):,}",
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
            "versions": {
                "sensilora": sensilora.__version__,
                "torch": version("torch"),
                "transformers": version("transformers"),
            },
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
