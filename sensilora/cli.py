"""The command line: ``sensilora demo | plan | train | evaluate | compare | export | plot | doctor``.

Exit codes: 0 done; 1 a bug, with its traceback; 2 an input that cannot be used, told in one sentence; 130 Ctrl-C.
Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import json
import math
import os
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from sensilora.errors import AdapterError, BackendError, DataError, OutputExistsError, SensiloraError

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from rich.table import Table

    from sensilora.data import Row
    from sensilora.plan import RankPlan
    from sensilora.sensitivity.report import SensitivityReport

TRAINING_FILE = "training.json"
PLAN_FILE = "plan.json"

# typer's public name for the base of its usage errors differs between its versions; this is it in all of them.
_UsageProblem: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="sensilora",
    help="Sensitivity-LoRA: measure how sensitive each weight matrix is, and give it a LoRA rank of its own.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: the command line without the program's name; None for ``sys.argv``.
    """
    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _show_warning
        sys.exit(_exit_code(arguments))


def _exit_code(arguments: Sequence[str] | None) -> int:
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="sensilora", standalone_mode=False)
    except _UsageProblem as problem:
        context = getattr(problem, "ctx", None)
        path = context.command_path if context else "sensilora"
        sentence = problem.format_message().rstrip(".").replace("Value error, ", "")
        return _fail(f"{sentence} (see {path} --help)")
    except SensiloraError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(_about_files(error))
    if code == 130:
        print("interrupted; nothing half-written remains", file=sys.stderr)
    return code or 0


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _about_files(error: OSError) -> str:
    where = f" while writing {error.filename}" if error.filename else ""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"no space is left on the disk{where}; nothing half-written remains: free some space and run it again"
    if error.errno is None or error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a YAML file as the command's defaults, so that flags on the command line win."""
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold 'name: value' lines, one for each flag")
    parameters = {
        name.lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        for name in parameter.opts
        if parameter.name not in {"config", "help"}
    }
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        parameter = parameters.get(str(key).replace("-", "_"))
        if parameter is None or parameter.name is None:
            known = ", ".join(sorted(name.replace("_", "-") for name in parameters))
            raise typer.BadParameter(f"{path} has the unknown key {key!r}; known are {known}")
        if isinstance(value, (dict, list)) and not (parameter.multiple and isinstance(value, list)):
            raise typer.BadParameter(f"{path}: {key} must be a single value")
        if parameter.multiple and value is not None:
            entries = value if isinstance(value, list) else [value]
            value = [",".join(entry) if isinstance(entry, list) else entry for entry in entries]
        if value is not None:
            defaults[parameter.name] = value
    context.default_map = defaults
    return path


class Task(str, Enum):
    auto = "auto"
    causal = "causal"
    classification = "classification"


class Estimator(str, Enum):
    activation = "activation"
    fisher = "fisher"
    hutchinson = "hutchinson"


class Variant(str, Enum):
    diagonal = "diagonal"
    inverse = "inverse"


class Mode(str, Enum):
    per_sequence = "per_sequence"
    per_position = "per_position"
    per_loss_term = "per_loss_term"


class HessianProduct(str, Enum):
    double_backward = "double_backward"
    central_differences = "central_differences"


class Labels(str, Enum):
    data = "data"
    model = "model"


class Strategy(str, Enum):
    scaled = "scaled"
    progressive = "progressive"


class Weights(str, Enum):
    cv = "cv"
    equal = "equal"


class Scores(str, Enum):
    fused = "fused"
    global_ = "global"
    local = "local"


class Form(str, Enum):
    merged = "merged"
    uniform = "uniform"
    peft = "peft"
    axolotl = "axolotl"
    blank_adapter = "blank-adapter"


class TaskType(str, Enum):
    CAUSAL_LM = "CAUSAL_LM"
    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub name.")]
DataArgument = Annotated[
    Path, typer.Argument(metavar="DATA", help="JSONL, CSV, TSV or text (one row a line) file, also .gz.")
]
PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="Rank plan, from `sensilora plan`.")]
AdapterArgument = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="Adapter folder, from `sensilora train` or PEFT.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=_read_config,
        help="YAML file with values for these flags and arguments; flags on the command line win.",
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite outputs that exist.")]
TaskOption = Annotated[
    Task, typer.Option("--task", help="auto: classification where every row has a label, else causal.")
]
TextFieldOption = Annotated[
    list[str],
    typer.Option(
        "--text-field", metavar="FIELD", help="Field that holds the text [text]; twice for a sentence pair."
    ),
]
LabelFieldOption = Annotated[
    str | None, typer.Option("--label-field", metavar="FIELD", help="Field that holds the class [label].")
]
LearningRateOption = Annotated[float, typer.Option("--learning-rate", "--lr", help="At its peak.")]
WarmupOption = Annotated[
    float, typer.Option("--warmup", min=0, max=1, help="Share of the steps in which it rises from 0.")
]
WeightDecayOption = Annotated[float, typer.Option("--weight-decay", min=0, help="Of AdamW.")]
DropoutOption = Annotated[float, typer.Option("--dropout", min=0, max=1, help="On the adapters' inputs.")]
MaxLengthOption = Annotated[int, typer.Option("--max-length", min=2, help="Longest sequence, in tokens.")]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything that is drawn at random.")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: the GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the model's weights; auto: as in its files.")]
EditedOption = Annotated[
    bool, typer.Option("--allow-edited", help="Take a plan whose ranks were changed by hand (its hash differs).")
]


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        import sensilora

        print(f"sensilora {sensilora.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    epilog=_examples(
        "sensilora demo",
        "sensilora demo --output out/bert --model ./bert-base-uncased --average-rank 8",
    )
)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("out/demo"),
    model: Annotated[
        str | None, typer.Option("--model", help="Model folder or hub name, in the place of all-MiniLM-L6-v2.")
    ] = None,
    average_rank: Annotated[int | None, typer.Option("--average-rank", min=1, help="Ranks a matrix.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Dialogues a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="At its peak.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="Longest dialogue, tokens.")] = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    config: ConfigOption = None,
) -> None:
    """Compare Sensitivity-LoRA with uniform LoRA on real data: calibrate, allot ranks, fine-tune both, report."""
    _check_matplotlib()

    from sensilora.demo import run_demo

    chosen = {
        "average_rank": average_rank,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
    }
    given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    run_demo(output, model=model, seed=seed, force=force, **given)


@app.command(
    epilog=_examples(
        "sensilora plan ./llama corpus.txt --average-rank 8 --output plan.json --plot ranks.png",
        "sensilora plan bert-base-uncased train.jsonl --estimator fisher --head-warmup-steps 100 --total-rank 288",
        "sensilora plan ./llama data.jsonl --config plan.yaml --tie qkv --tie gate_proj,up_proj",
        "sensilora plan ./llama corpus.txt --average-rank 8 --estimator fisher --compare activation-report.json",
        "sensilora plan ./llama corpus.txt --average-rank 8 --estimator fisher --memory-budget 24GB --checkpoint run",
    )
)
def plan(
    model: ModelArgument,
    data: DataArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Plan file to write.")] = Path("plan.json"),
    report: Annotated[Path | None, typer.Option("--report", help="Write the sensitivity report there too.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the ranks there too (.png, .svg, .pdf).")] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="OTHER_REPORT",
            help="Print how far the sensitivities agree with those of this report, which an earlier --report wrote.",
        ),
    ] = None,
    average_rank: Annotated[float | None, typer.Option("--average-rank", help="Budget: ranks a matrix.")] = None,
    total_rank: Annotated[int | None, typer.Option("--total-rank", help="Budget: sum of all ranks.")] = None,
    total_parameters: Annotated[
        int | None, typer.Option("--total-parameters", help="Budget: trainable parameters.")
    ] = None,
    task: TaskOption = Task.auto,
    estimator: Annotated[
        Estimator,
        typer.Option(
            "--estimator",
            help="activation: forward passes; fisher: squared gradients; hutchinson: the Hessian, by random probes.",
        ),
    ] = Estimator.activation,
    variant: Annotated[
        Variant, typer.Option("--variant", help="activation: the inputs' autocorrelation, or its inverse in blocks.")
    ] = Variant.diagonal,
    block_size: Annotated[int, typer.Option("--block-size", min=1, help="inverse: input features a block.")] = 128,
    damping: Annotated[
        float, typer.Option("--damping", help="inverse: added to a block's diagonal, as a fraction of its mean.")
    ] = 0.01,
    mode: Annotated[
        Mode, typer.Option("--mode", help="Fisher: square a sequence's gradient, each position's, or each label's.")
    ] = Mode.per_sequence,
    labels: Annotated[
        Labels, typer.Option("--labels", help="Fisher: labels of the data, or drawn from the model.")
    ] = Labels.data,
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="Fisher: label draws a sequence (--labels model).")
    ] = 1,
    probes: Annotated[int, typer.Option("--probes", min=2, help="Hutchinson: the most probes a matrix takes.")] = 64,
    min_probes: Annotated[
        int | None,
        typer.Option(
            "--min-probes", min=2, help="Hutchinson: the least, and between two looks at the error [8, or --probes]."
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", min=0, help="Hutchinson: standard error of a trace, as a fraction, that is good enough."
        ),
    ] = 0.05,
    hvp: Annotated[
        HessianProduct, typer.Option("--hvp", help="Hutchinson: how products with the Hessian are taken.")
    ] = HessianProduct.double_backward,
    head_warmup_steps: Annotated[
        int,
        typer.Option("--head-warmup-steps", min=0, help="Not activation: train a new classifier head so long first."),
    ] = 0,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget",
            metavar="SIZE",
            help="Of the sums, for example 24GB: measure the matrices in as many passes over the data as that takes.",
        ),
    ] = None,
    keep_diagonals: Annotated[
        Path | None,
        typer.Option("--keep-diagonals", metavar="FOLDER", help="Write the diagonals there too, as safetensors."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            metavar="FOLDER",
            help="Keep the calibration's state there; the same command goes on from it after a kill or Ctrl-C.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", min=1, help="Batches between two states.")
    ] = 100,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Rows to calibrate on, drawn at random; 0 for all.")
    ] = 256,
    max_length: MaxLengthOption = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences a batch.")] = 8,
    strategy: Annotated[
        Strategy, typer.Option("--strategy", help="Ranks proportional to scores, or falling by classes.")
    ] = Strategy.scaled,
    weights: Annotated[Weights, typer.Option("--weights", help="How the metrics are fused.")] = Weights.cv,
    scores: Annotated[Scores, typer.Option("--scores", help="Which scores decide.")] = Scores.fused,
    min_rank: Annotated[int, typer.Option("--min-rank", min=0, help="0 lets a matrix go without.")] = 1,
    max_rank: Annotated[int | None, typer.Option("--max-rank", min=1, help="Greatest rank of a matrix.")] = None,
    multiple: Annotated[int, typer.Option("--multiple", min=1, help="Every rank is a multiple of this.")] = 1,
    temper: Annotated[
        float, typer.Option("--temper", min=0, help="Exponent of the scores: 1 the paper, 0 uniform ranks.")
    ] = 1.0,
    tie: Annotated[
        list[str],
        typer.Option(
            "--tie", metavar="GROUP", help="Equal ranks within a layer: qkv, gate_up, or names with commas."
        ),
    ] = [],  # noqa: B006 (typer copies it)
    targets: Annotated[
        str, typer.Option("--targets", help="all-linear, names with commas, or a regular expression for whole names.")
    ] = "all-linear",
    experts: Annotated[
        bool, typer.Option("--experts", help="For --report: measure experts in stacks too; they get no rank.")
    ] = False,
    min_expert_tokens: Annotated[
        int,
        typer.Option("--min-expert-tokens", min=1, help="An expert that saw fewer takes its siblings' mean."),
    ] = 32,
    scaling: Annotated[float, typer.Option("--scaling", help="LoRA scale s = alpha / r of every matrix.")] = 1.0,
    text_field: TextFieldOption = [],  # noqa: B006
    label_field: LabelFieldOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    force: ForceOption = False,
    config: ConfigOption = None,
) -> None:
    """Measure the sensitivity of each weight matrix on some data, and allot LoRA ranks under one budget.

    Give exactly one of --average-rank, --total-rank and --total-parameters.
    """
    inputs = [path for path in (Path(model), data, config) if path is not None]
    _check_outputs([path for path in (output, report, plot) if path is not None], force, inputs)
    if plot is not None:
        _check_picture(plot)
    budgets = {"average-rank": average_rank, "total-rank": total_rank, "total-parameters": total_parameters}
    given = {f"--{name}": value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise typer.BadParameter(
            "give exactly one of --average-rank, --total-rank and --total-parameters, not "
            + (" and ".join(given) or "none of them")
        )
    for flag, value in given.items():
        if not 0 < value < math.inf:
            raise typer.BadParameter(f"{flag} must be a number above 0, not {value}")

    from sensilora.sensitivity.diagonals import remove_diagonals
    from sensilora.sensitivity.report import SensitivityReport
    from sensilora.sensitivity.sweep import parse_bytes

    if memory_budget is not None:
        parse_bytes("--memory-budget", memory_budget)
    if keep_diagonals is not None:
        remove_diagonals(keep_diagonals, force=force)

    # Read now, since --report may name the same file.
    earlier = None if compare is None else SensitivityReport.load(compare)
    rows = _rows(data, task, text_field, label_field, samples, seed)

    from sensilora.allocation import allocate
    from sensilora.sensitivity.calibrate import calibrate

    names = _classes(model, task, rows, data)
    loaded, tokenizer = _load(model, names, device, dtype, seed)
    wanted: str | list[str] = targets
    if targets != "all-linear" and re.fullmatch(r"[\w.,-]+", targets):
        wanted = targets.split(",")
    options: dict[str, Any] = {
        "average_rank": average_rank,
        "total_rank": total_rank,
        "total_parameters": total_parameters,
        "strategy": strategy.value,
        "weights": weights.value,
        "scores": scores.value,
        "min_rank": min_rank,
        "max_rank": max_rank,
        "multiple": multiple,
        "temper": temper,
        "tie": [group.split(",") if "," in group else group for group in tie] or None,
        "scaling": scaling,
    }
    # A budget that cannot be met or another model's report should be told before the calibration, not after it.
    rehearsal = _rehearsal(loaded, wanted)
    allocate(rehearsal, **options)
    if earlier is not None:
        rehearsal.compare(earlier)
    try:
        measured = calibrate(
            loaded,
            _batches(loaded, tokenizer, rows, names, max_length, batch_size),
            estimator=estimator.value,
            targets=wanted,
            experts=experts,
            min_expert_tokens=min_expert_tokens,
            variant=variant.value,
            block_size=block_size,
            damping=damping,
            mode=mode.value,
            labels=labels.value,
            draws=draws,
            probes=probes,
            min_probes=min(8, probes) if min_probes is None else min_probes,
            tolerance=tolerance,
            hvp=hvp.value,
            seed=seed,
            head_warmup_steps=head_warmup_steps,
            memory_budget=memory_budget,
            keep_diagonals=keep_diagonals or False,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
        )
    except KeyboardInterrupt as interrupt:
        if not str(interrupt):
            raise
        print(f"interrupted; run the same command again to go on from {checkpoint}", file=sys.stderr)
        raise SystemExit(130) from interrupt
    made = allocate(measured, **options)
    with _telling_of_written() as written:
        if report is not None:
            written(report, measured.save)
        written(output, made.save)
        if plot is not None:
            written(plot, made.plot)
    _print(_plan_table(made))
    if earlier is not None:
        _print(measured.compare(earlier, weights=made.allocation.weights))
    used = f"{made.budget.used:,} of {made.budget.total:,} used"
    print(f"{made.budget.kind} {made.budget.value:,}: {used}, {made.parameters:,} trainable parameters")
    print("wrote " + ", ".join(str(path) for path in (output, report, plot, keep_diagonals) if path is not None))


@app.command(
    epilog=_examples(
        "sensilora train bert-base-uncased plan.json train.jsonl --eval-data dev.jsonl --output adapter",
        "sensilora train ./llama plan.json corpus.txt --epochs 1 --max-length 512 --output adapter",
        "sensilora train --config train.yaml --seed 1 --output adapter-1",
    )
)
def train(
    model: ModelArgument,
    plan: PlanArgument,
    data: DataArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Adapter folder to write.")] = Path("adapter"),
    eval_data: Annotated[Path | None, typer.Option("--eval-data", help="Evaluate on this after each epoch.")] = None,
    task: TaskOption = Task.auto,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 10.0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences a step.")] = 32,
    learning_rate: LearningRateOption = 5e-4,
    warmup: WarmupOption = 0.06,
    weight_decay: WeightDecayOption = 0.0,
    dropout: DropoutOption = 0.0,
    max_length: MaxLengthOption = 256,
    text_field: TextFieldOption = [],  # noqa: B006
    label_field: LabelFieldOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    allow_edited: EditedOption = False,
    force: ForceOption = False,
    config: ConfigOption = None,
) -> None:
    """Fine-tune LoRA adapters of the planned ranks with transformers' Trainer, and write them as PEFT's files.

    A classifier's head is trained in full and saved with them. The folder also gets the plan and training.json, the
    log with the settings.
    """
    if not (0 < epochs < math.inf and 0 < learning_rate < math.inf):
        raise typer.BadParameter("epochs and learning rate must be finite numbers above 0")
    # Not the plan, which is written again.
    _check_folder(output, force, [path for path in (Path(model), data, eval_data, config) if path is not None])

    from sensilora import _files
    from sensilora.adapters import inject, save_adapter
    from sensilora.plan import RankPlan
    from sensilora.targets import outermost_heads

    ranks = RankPlan.load(plan, allow_edited=allow_edited)
    rows = _rows(data, task, text_field, label_field)
    held_out = None if eval_data is None else _rows(eval_data, task, text_field, label_field)
    names = _classes(model, task, rows, data, must_be_labelled=True)
    if names is not None and held_out is not None:
        _require_labels(held_out, eval_data)
    loaded, tokenizer = _load(model, names, device, dtype, seed)
    inject(loaded, ranks, dropout=dropout, modules_to_save=outermost_heads(loaded) if names else [])

    from sensilora.integrations import transformers as hf

    limit = hf.length_limit(loaded, max_length)
    if names is None:
        examples = hf.encode_causal(tokenizer, rows, max_length=limit)
    else:
        examples = hf.encode_classification(tokenizer, rows, labels=names, max_length=limit)
    after_epoch = None
    if held_out is not None:
        batches = _batches(loaded, tokenizer, held_out, names, max_length, batch_size)
        after_epoch = functools.partial(_evaluated, loaded, batches, names)
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "seed": seed,
    }
    with _files.output_folder(output, force=force) as folder:
        started = time.perf_counter()
        history = hf.train_with_trainer(
            loaded,
            examples,
            folder,
            pad_token_id=tokenizer.pad_token_id,
            use_cpu=loaded.device.type == "cpu",
            evaluate=after_epoch,
            **settings,
        )
        log = {
            "model": model,
            "data": str(data),
            "plan_hash": ranks.content_hash,
            "labels": names,
            "settings": {
                **settings,
                "dropout": dropout,
                "max_length": limit,
                "device": str(loaded.device),
                "dtype": str(loaded.dtype).removeprefix("torch."),
            },
            "trainable_parameters": sum(p.numel() for p in loaded.parameters() if p.requires_grad),
            "seconds": time.perf_counter() - started,
            "history": history,
        }
        save_adapter(loaded, folder, force=True)
        ranks.save(folder / PLAN_FILE)
        _files.write_json(folder / TRAINING_FILE, log)
    evaluations = [entry for entry in history if "accuracy" in entry or "perplexity" in entry]
    if evaluations:
        _print(_metrics_table("after each epoch", evaluations))
    losses = [entry["loss"] for entry in history if "loss" in entry and "learning_rate" in entry]
    trained = f"{log['trainable_parameters']:,} parameters trained in {log['seconds']:.0f} s"
    print(f"{trained}, last loss {losses[-1]:.4f}; wrote {output}")


@app.command(
    epilog=_examples(
        "sensilora evaluate bert-base-uncased adapter test.jsonl",
        "sensilora evaluate ./llama adapter test.txt --max-length 512 --json result.json",
    )
)
def evaluate(
    model: ModelArgument,
    adapter: AdapterArgument,
    data: DataArgument,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there too.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences a batch.")] = 32,
    max_length: MaxLengthOption = 256,
    text_field: TextFieldOption = [],  # noqa: B006
    label_field: LabelFieldOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    force: ForceOption = False,
    config: ConfigOption = None,
) -> None:
    """Measure a model with its adapter: accuracy and macro-F1 of a classifier, perplexity of a causal model."""
    inputs = [path for path in (Path(model), adapter, data, config) if path is not None]
    _check_outputs([json_file] if json_file is not None else [], force, inputs)

    from sensilora import _files
    from sensilora.adapters import load_adapter

    names = _adapter_classes(adapter, model)
    rows = _rows(data, Task.causal if names is None else Task.classification, text_field, label_field)
    if names is not None:
        _require_labels(rows, data)
    loaded, tokenizer = _load(model, names, device, dtype, seed=0)
    load_adapter(loaded, adapter)
    figures = _evaluated(loaded, _batches(loaded, tokenizer, rows, names, max_length, batch_size), names)
    _print(_metrics_table(f"{adapter} on {data}", [figures]))
    if json_file is not None:
        figures_of = {"model": model, "adapter": str(adapter), "data": str(data), **figures}
        _files.write_json(json_file, figures_of)


@app.command(
    epilog=_examples(
        "sensilora compare bert-base-uncased train.jsonl --eval-data dev.jsonl --average-rank 8",
        "sensilora compare ./roberta train.jsonl --plan plan.json --metric matthews --seeds 10 --output out/cola",
        "sensilora compare ./roberta stsb.tsv --text-field sentence1 --text-field sentence2 --regression",
    )
)
def compare(
    model: ModelArgument,
    data: DataArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; a comparison stopped there goes on.")
    ] = Path("out/compare"),
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", help="Measure on this; else on a fifth of DATA, held out at random.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Plan to compare; else one is made (activation, --average-rank).")
    ] = None,
    average_rank: Annotated[
        int | None, typer.Option("--average-rank", min=1, help="Without --plan: ranks a matrix [4].")
    ] = None,
    regression: Annotated[bool, typer.Option("--regression", help="Labels are numbers and not classes.")] = False,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="Of the verdict: accuracy, macro_f1, matthews or, of the second of two classes, f1; for regression "
            "pearson or spearman [the first].",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=2, help="Runs of each arm.")] = 5,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the data.")] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences a step of one run.")] = 32,
    learning_rate: LearningRateOption = 5e-4,
    warmup: WarmupOption = 0.06,
    weight_decay: WeightDecayOption = 0.0,
    dropout: DropoutOption = 0.0,
    serial: Annotated[
        bool, typer.Option("--serial", help="One run after another, for models that fill the GPU.")
    ] = False,
    arms: Annotated[
        str,
        typer.Option(
            "--arms",
            metavar="NAMES",
            help="Of uniform, plan, permuted and, with PEFT, adalora, eva, eva_ranks, eva_start; with commas.",
        ),
    ] = "uniform,plan,permuted",
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", min=1, help="Steps between two states to go on from.")
    ] = 200,
    max_length: MaxLengthOption = 256,
    text_field: TextFieldOption = [],  # noqa: B006
    label_field: LabelFieldOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    allow_edited: EditedOption = False,
    force: ForceOption = False,
    config: ConfigOption = None,
) -> None:
    """Tell whether a plan is worth it: uniform LoRA, the plan, and its ranks permuted, over several seeds.

    All runs train side by side in one batch, each with its own adapter and head on one frozen model. PEFT's AdaLoRA
    and EVA can be compared too; AdaLoRA's seeds train one after another.
    """
    _check_matplotlib()
    if plan is not None and average_rank is not None:
        raise typer.BadParameter("--average-rank is for a plan that is made; leave it out with --plan")

    import torch

    from sensilora.compare import PICTURE_FILE, RESULT_FILE, run_compare
    from sensilora.plan import RankPlan

    ranks = None if plan is None else RankPlan.load(plan, allow_edited=allow_edited)
    rows = _rows(data, Task.classification, text_field, label_field, numeric_labels=regression)
    if eval_data is not None:
        held_out = _rows(eval_data, Task.classification, text_field, label_field, numeric_labels=regression)
    else:
        rows, held_out = _held_out(rows, seed, by_label=not regression)
        if not held_out:
            raise DataError(
                f"{data} has too few rows of a class to hold some out; name others with --eval-data, or pass "
                "--regression where labels are numbers"
            )
    classified = not regression and all(row.label is not None for row in rows)
    try:
        found = run_compare(
            output,
            model,
            rows,
            held_out,
            classes=_classes(model, Task.classification, rows, data) if classified else None,
            plan=ranks,
            average_rank=average_rank or 4,
            metric=metric,
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
            arms=[arm.strip() for arm in arms.split(",")],
            device=_device(device),
            dtype=None if dtype is Dtype.auto else getattr(torch, dtype.value),
            checkpoint_every=checkpoint_every,
            force=force,
        )
    except KeyboardInterrupt as interrupt:
        print(f"interrupted; run the same command again to go on from {output}", file=sys.stderr)
        raise SystemExit(130) from interrupt
    found.plot(output / PICTURE_FILE)
    _print(found.table())
    print(found.verdict())
    print(f"wrote {output / RESULT_FILE} and {output / PICTURE_FILE}")


@app.command(
    epilog=_examples(
        "sensilora export adapter --to merged --output model",
        "sensilora export adapter --to uniform --output adapter-for-server",
        "sensilora export adapter --to peft --output adapter-clean",
        "sensilora export plan.json --to axolotl --axolotl-config axolotl.yml --output ranks.yml",
        "sensilora export plan.json --to blank-adapter --output adapter-to-train",
    )
)
def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Adapter folder, from `sensilora train` or PEFT; for axolotl and blank-adapter a rank plan.",
        ),
    ],
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="merged: the whole model with the update in it; uniform: one rank for all, for servers that know no "
            "rank patterns; peft: the same adapter, checked and with unambiguous patterns; axolotl: the plan, as "
            "fields of an axolotl config; blank-adapter: an untrained adapter of the plan's ranks, for trainers that "
            "take an adapter (--dropout and --seed are its).",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; for axolotl a YAML file.")],
    model: Annotated[
        str | None, typer.Option("--model", help="merged: the base model, if not the one the adapter names.")
    ] = None,
    axolotl_config: Annotated[
        Path | None,
        typer.Option("--axolotl-config", metavar="FILE", help="axolotl: config whose other fields are written too."),
    ] = None,
    task_type: Annotated[
        TaskType | None,
        typer.Option("--task-type", help="blank-adapter: PEFT's kind of the model it is for [CAUSAL_LM]."),
    ] = None,
    dropout: DropoutOption = 0.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = Dtype.auto,
    allow_edited: EditedOption = False,
    force: ForceOption = False,
    config: ConfigOption = None,
) -> None:
    """Write a trained adapter, or a plan, in the form that another tool takes."""
    inputs = [source, *(Path(path) for path in (model, axolotl_config, config) if path is not None)]
    if to is Form.axolotl:
        _check_outputs([output], force, inputs)
    else:
        _check_folder(output, force, inputs)
    if task_type is not None and to is not Form.blank_adapter:
        raise typer.BadParameter("--task-type is for --to blank-adapter; a trained adapter has its own")

    from sensilora.adapters import read_adapter
    from sensilora.integrations import export as exports
    from sensilora.plan import RankPlan

    if to is Form.axolotl:
        plan = RankPlan.load(source, allow_edited=allow_edited)
        exports.export_axolotl(plan, output, base=axolotl_config, force=force)
    elif to is Form.blank_adapter:
        plan = RankPlan.load(source, allow_edited=allow_edited)
        kind = (task_type or TaskType.CAUSAL_LM).value
        exports.export_blank_adapter(plan, output, task_type=kind, dropout=dropout, seed=seed, force=force)
    elif to is Form.peft:
        exports.export_peft(source, output, force=force)
    elif to is Form.uniform:
        plan_file = source / PLAN_FILE
        dropped = None
        if plan_file.is_file():
            planned = RankPlan.load(plan_file, allow_edited=True).matrices
            dropped = {name: entry.shape for name, entry in planned.items() if entry.rank == 0}
        exports.export_uniform(source, output, dropped=dropped, force=force)
    else:
        base = model or read_adapter(source)[0].base_model_name_or_path
        if not base:
            raise AdapterError(f"{source} does not name its base model; pass --model")
        _check_not_input(output, [Path(base)])
        names = _adapter_classes(source, base)
        loaded, tokenizer = _load(base, names, Device.cpu, dtype, seed=0)
        exports.export_merged(loaded, tokenizer, source, output, force=force)
    print(f"wrote {output}")


@app.command(epilog=_examples("sensilora plot plan.json --output ranks.png", "sensilora plot plan.json -o ranks.svg"))
def plot(
    plan: PlanArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write: .png, .svg or .pdf.")] = Path(
        "ranks.png"
    ),
    allow_edited: EditedOption = False,
    force: ForceOption = False,
    config: ConfigOption = None,
) -> None:
    """Draw a plan's ranks by layer and projection, for global, local and fused scores."""
    _check_outputs([output], force, [plan] if config is None else [plan, config])
    _check_picture(output)

    from sensilora.plan import RankPlan

    RankPlan.load(plan, allow_edited=allow_edited).plot(output)
    print(f"wrote {output}")


@app.command(epilog=_examples("sensilora doctor", "sensilora doctor --json"))
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell versions, devices, how the native extension was built, and which backend serves each op and why."""
    from sensilora.doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from rich.table import Table

    table = Table(title="versions")
    table.add_column("package")
    table.add_column("version")
    for package, version in found["versions"].items():
        table.add_row(package, version or "not installed")
    _print(table)
    table = Table(title="devices and native extension")
    table.add_column("what")
    table.add_column("facts")
    for entry in found["devices"]:
        table.add_row(entry["type"], ", ".join(f"{key} {value}" for key, value in entry.items() if key != "type"))
    table.add_row("native", ", ".join(f"{key}: {value}" for key, value in found["native"].items()))
    table.add_row("backend asked for", found["forced_backend"] or "none")
    _print(table)
    table = Table(title="backends (fp32)")
    for column in ("op", "device", "served by", "why not the others"):
        table.add_column(column)
    for op, by_device in found["ops"].items():
        for kind, service in by_device.items():
            reasons = "\n".join(f"{name}: {reason}" for name, reason in service["why_not"].items())
            table.add_row(op, kind, service["backend"] or "none", reasons)
    _print(table)


def _check_outputs(paths: Sequence[Path], force: bool, inputs: Sequence[Path]) -> None:
    """Before the work and not after it: each output can be written, and none exists, unless it may be overwritten."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise OutputExistsError(f"two outputs have the same path among {', '.join(map(str, paths))}; name them apart")
    for path in paths:
        if path.is_dir():
            raise OutputExistsError(f"output {path} is a folder; name a file")
        _check_not_input(path, inputs)
        if path.exists() and not force:
            raise OutputExistsError(f"output {path} exists already; pass --force to overwrite it")
        _check_place(path)


def _check_folder(path: Path, force: bool, inputs: Sequence[Path]) -> None:
    _check_not_input(path, inputs)
    if path.is_dir() and any(path.iterdir()) and not force:
        raise OutputExistsError(f"output folder {path} exists already; pass --force to overwrite it")
    _check_place(path)


def _check_not_input(output: Path, inputs: Sequence[Path]) -> None:
    """An output may not replace what the command reads, the folder that this is in, or a file of a folder's."""
    # A link to a file is replaced itself, one to a folder is followed.
    place = output.resolve() if output.is_dir() else output.parent.resolve() / output.name
    for path in (path for path in inputs if path.exists()):
        read = path.resolve()
        within = output.is_dir() and place in read.parents
        if read == place or within or (output.exists() and read.is_dir() and place.parent == read):
            raise OutputExistsError(f"output {output} would replace {path}, or a part, which is read; name another")


def _check_place(path: Path) -> None:
    """The nearest folder above that is there can be written into."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise OutputExistsError(f"output {path} cannot be written: {above} is a file; name another")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputExistsError(f"output {path} cannot be written: {above} may not be written into; name another")


@contextlib.contextmanager
def _telling_of_written() -> Iterator[Callable[[Path, Callable[[Path], Any]], None]]:
    """A function that writes a file by another; if one fails, it is told which are there."""
    done: list[Path] = []

    def write(path: Path, save: Callable[[Path], Any]) -> None:
        save(path)
        done.append(path)

    try:
        yield write
    except BaseException:
        if done:
            print("wrote " + ", ".join(map(str, done)) + " before what follows", file=sys.stderr)
        raise


def _check_picture(path: Path) -> None:
    if path.suffix not in {".png", ".svg", ".pdf"}:
        raise typer.BadParameter(f"{path} must end in .png, .svg or .pdf")
    _check_matplotlib()


def _check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError("pictures need matplotlib, which is not installed; pip install 'sensilora[plots]'")


def _rows(
    path: Path,
    task: Task,
    text_fields: Sequence[str],
    label_field: str | None,
    samples: int = 0,
    seed: int = 0,
    *,
    numeric_labels: bool = False,
) -> list[Row]:
    from sensilora.data import read_rows

    rows = read_rows(
        path,
        text_fields=text_fields,
        label_field=label_field,
        with_labels=task is not Task.causal,
        numeric_labels=numeric_labels,
    )
    if 0 < samples < len(rows):
        # In the file's order, so that only the choice depends on the seed.
        rows = [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), samples))]
    return rows


def _held_out(rows: Sequence[Row], seed: int, *, by_label: bool) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and a fifth that is drawn at random; `by_label` of each class, or where these are too small
    of those rows that are not the first of their class."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    if not by_label:
        return shuffled[len(rows) // 5 :], shuffled[: len(rows) // 5]
    seen: Counter[Any] = Counter()
    places = []  # of each row among those of its class
    for row in shuffled:
        places.append(seen[row.label])
        seen[row.label] += 1
    chosen = {i for i, place in enumerate(places) if place % 5 == 4}
    if not chosen:
        chosen = set([i for i, place in enumerate(places) if place > 0][: len(rows) // 5])
    kept = [row for i, row in enumerate(shuffled) if i not in chosen]
    return kept, [row for i, row in enumerate(shuffled) if i in chosen]


def _require_labels(rows: Sequence[Row], data: Path | None) -> None:
    unlabelled = sum(row.label is None for row in rows)
    if unlabelled == len(rows):
        raise DataError(f"{data}: no row has a label to compare with; name the field that holds it (--label-field)")
    if unlabelled:
        warnings.warn(f"{data}: {unlabelled} of {len(rows)} rows have no label, and do not count", stacklevel=2)


def _classes(
    model: str, task: Task, rows: Sequence[Row], data: Path, *, must_be_labelled: bool = False
) -> list[int | str] | None:
    """The classes of the rows, in the model's order where it knows them by name; None for the causal task.

    Rows without labels have the classes of the model's own head.
    """
    unlabelled = sum(row.label is None for row in rows)
    if task is Task.causal or (task is Task.auto and unlabelled == len(rows)):
        return None
    if 0 < unlabelled < len(rows) or (unlabelled and must_be_labelled):
        raise DataError(
            f"{data}: {unlabelled} of {len(rows)} rows have no label; complete them, name their field "
            "(--label-field), or pass --task causal"
        )

    from sensilora.data import label_names
    from sensilora.integrations.transformers import class_names

    known = class_names(model)
    if unlabelled:
        return list(known)
    try:
        found = label_names(rows)
    except DataError as error:
        raise DataError(f"{data}: {error}") from error
    by_name = {str(label): label for label in found}
    return [by_name[name] for name in known] if by_name.keys() == set(known) else found


def _adapter_classes(adapter: Path, model: str) -> list[int | str] | None:
    """The classes that an adapter's head was trained for, in order; None for a causal model.

    An adapter that `sensilora train` did not write has the classes of the base model's own head.
    """
    from sensilora.adapters import read_adapter
    from sensilora.integrations.transformers import class_names

    task_type = read_adapter(adapter)[0].task_type
    if task_type not in {"CAUSAL_LM", "SEQ_CLS"}:
        raise AdapterError(f"{adapter} has the task type {task_type}; this command knows CAUSAL_LM and SEQ_CLS")
    if task_type == "CAUSAL_LM":
        return None
    log = adapter / TRAINING_FILE
    if not log.is_file():
        # "LABEL_0" is transformers' name for a class without one, which data files call 0.
        return [index if name == f"LABEL_{index}" else name for index, name in enumerate(class_names(model))]
    try:
        return list(json.loads(log.read_bytes())["labels"])
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{log} is truncated or edited ({error}); train the adapter again") from error


def _load(name: str, names: Sequence[int | str] | None, device: Device, dtype: Dtype, seed: int) -> tuple[Any, Any]:
    """Model on its device, and tokenizer."""
    import torch

    from sensilora.integrations import transformers as hf

    chosen = _device(device)
    # A new classification head is drawn here, and the adapters after it.
    torch.manual_seed(seed)
    weights: torch.dtype | None = None if dtype is Dtype.auto else getattr(torch, dtype.value)
    if names is None:
        model = hf.load_causal_lm(name, dtype=weights)
    else:
        model = hf.load_sequence_classifier(name, labels=[str(label) for label in names], dtype=weights)
    tokenizer = hf.load_tokenizer(name)
    hf.require_fit(model, tokenizer)
    return model.to(chosen), tokenizer


def _device(device: Device) -> str:
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise BackendError("device cuda was asked for but torch finds no GPU; use --device cpu")
    return "cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu"


def _batches(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    names: Sequence[int | str] | None,
    max_length: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    from sensilora.integrations import transformers as hf

    limit = hf.length_limit(model, max_length)
    if names is None:
        return hf.causal_batches(tokenizer, rows, max_length=limit, batch_size=batch_size)
    return hf.classification_batches(tokenizer, rows, labels=names, max_length=limit, batch_size=batch_size)


def _evaluated(model: Any, batches: Any, names: Sequence[int | str] | None) -> dict[str, float]:
    from sensilora.integrations import transformers as hf

    return hf.evaluate_causal_lm(model, batches) if names is None else hf.evaluate_classifier(model, batches)


def _rehearsal(model: Any, targets: str | list[str]) -> SensitivityReport:
    """A report of the model's shapes with equal sensitivities."""
    from sensilora.sensitivity.capture import group_tied
    from sensilora.sensitivity.report import MatrixSensitivity, SensitivityReport
    from sensilora.targets import find_targets, fingerprint, model_id

    return SensitivityReport(
        estimator="activation",
        mode=None,
        labels=None,
        draws=1,
        seed=0,
        tokens=1,
        sequences=1,
        k=0.5,
        alpha=0.85,
        model_id=model_id(model),
        fingerprint=fingerprint(model),
        versions={},
        matrices={
            name: MatrixSensitivity(shape=matrix.shape, trace=1.0, topk_mean=1.0, effective_rank=1, tokens=1, calls=1)
            for name, matrix in group_tied(find_targets(model, targets)).items()
            if name == matrix.name
        },
    )


def _plan_table(made: RankPlan) -> Table:
    from rich.table import Table

    table = Table(title=f"ranks for {made.model_id}")
    table.add_column("matrix", no_wrap=True)
    for column in (
        "out x in",
        "trace",
        "top-k mean",
        "eff. rank",
        f"{made.allocation.scores} score",
        "rank",
        "scale",
    ):
        table.add_column(column, justify="right")
    for name, entry in made.matrices.items():
        table.add_row(
            name,
            f"{entry.shape[0]} x {entry.shape[1]}",
            f"{entry.trace:.4g}",
            f"{entry.topk_mean:.4g}",
            str(entry.effective_rank),
            f"{getattr(entry, 'score_' + made.allocation.scores):.4g}",
            str(entry.rank),
            f"{made.scaling_of(name):.4g}",
        )
    return table


def _metrics_table(title: str, entries: Sequence[Mapping[str, float]]) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for column in entries[0]:
        table.add_column(column.replace("_", "-"), justify="right")
    for entry in entries:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else f"{value:,}" for value in entry.values()))
    return table


def _print(table: RenderableType) -> None:
    from rich.console import Console

    console = Console()
    # Without a terminal rich assumes 80 columns and would cut names off.
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
