"""transformers: loading models and tokenizers, batches from rows of text, training with its Trainer, evaluation.

`SensitivityCallback` measures during training whether the order that ranks were allotted by still holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import random
import re
import socket
import time
import urllib.parse
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from huggingface_hub import constants as hub
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from sensilora.adapters import task_type
from sensilora.data import Row
from sensilora.errors import CalibrationError, DataError, ModelError, NonFiniteError, ReportError, TargetError
from sensilora.nn import MultiLoRALinear, VarRankLoRALinear
from sensilora.plan import RankPlan
from sensilora.sensitivity import MatrixSensitivity, SensitivityReport, calibrate
from sensilora.sensitivity.batches import IGNORED
from sensilora.sensitivity.capture import Forward, wrapped_forwards
from sensilora.targets import find_targets, first_non_finite_parameter, head_names, is_matrix, matrix_shape, unwrapped

Batch = dict[str, Tensor]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' notices and loading bars off the terminal inside the block; errors still show."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """A tokenizer from a model folder or hub name. One without a padding token pads with its end-of-text token.

    Raises:
        ModelError: it cannot be found or holds no vocabulary.
    """
    with _loading(name, "tokenizer") as where:
        tokenizer = AutoTokenizer.from_pretrained(str(name), **where)
    # Without vocabulary files transformers makes an empty tokenizer that turns every word into "unknown".
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(f"{name} holds no tokenizer files; add its tokenizer.json (or vocab.txt, tokenizer.model)")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {name} has neither a padding nor an end-of-text token; add one to it")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_sequence_classifier(
    name: str | os.PathLike[str], *, labels: Sequence[str], dtype: torch.dtype | None = None
) -> Any:
    """A sequence classifier from a model folder or hub name, in eval mode on the CPU.

    A checkpoint without a head for so many labels gets a new one, drawn from torch's global generator: call
    ``torch.manual_seed`` first. Weights are read from safetensors only, so that nothing is unpickled.

    Args:
        name: folder or hub name.
        labels: name of each class, in order.
        dtype: of the weights; None for the checkpoint's own.

    Raises:
        ModelError: the model cannot be found, has no safetensors, is damaged, or is of a kind without a classifier.

    Warns:
        UserWarning: weights other than the head's are not in the checkpoint and were drawn anew.
    """
    model = _load(
        AutoModelForSequenceClassification,
        name,
        dtype,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        # For a head that was trained for another number of labels; anything else that does not fit is an error.
        ignore_mismatched_sizes=True,
    )
    if model.config.pad_token_id is None:
        # As in load_tokenizer; without one a decoder's classifier does not find the last token of a padded row.
        model.config.pad_token_id = _first(model.config.eos_token_id)
    return model


def load_causal_lm(name: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Any:
    """A causal language model from a model folder or hub name, in eval mode on the CPU.

    Args, Raises and Warns: as for `load_sequence_classifier`.
    """
    return _load(AutoModelForCausalLM, name, dtype)


def class_names(name: str | os.PathLike[str]) -> list[str]:
    """The names of a model's classes, in order, as its config.json has them ("LABEL_0", ... where it has none).

    Raises:
        ModelError: the model cannot be found.
    """
    with _loading(name, "configuration") as where:
        config = AutoConfig.from_pretrained(str(name), **where)
    return [str(config.id2label[index]) for index in sorted(config.id2label)]


def _first(token_id: int | list[int] | None) -> int | None:
    return token_id[0] if isinstance(token_id, list) else token_id


def _load(loader: Any, name: str | os.PathLike[str], dtype: torch.dtype | None, **arguments: Any) -> Any:
    with _loading(name, "model") as where:
        model, info = loader.from_pretrained(
            str(name),
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            output_loading_info=True,
            **where,
            **arguments,
        )
    heads = head_names(model)

    def outside_head(keys: Any) -> list[str]:
        names = sorted(key if isinstance(key, str) else key[0] for key in keys)
        return [key for key in names if key.rpartition(".")[0] not in heads]

    misfits = outside_head(info["mismatched_keys"])
    if misfits:
        raise ModelError(f"{name}: the checkpoint's {misfits[0]} has another shape than its config.json says")
    missing = outside_head(info["missing_keys"])
    if missing:
        warnings.warn(
            f"{len(missing)} weights are not in the checkpoint {name} and were drawn at random, such as {missing[0]}",
            UserWarning,
            stacklevel=3,
        )
    return model.eval()


@contextlib.contextmanager
def _loading(name: str | os.PathLike[str], what: str) -> Iterator[dict[str, Any]]:
    """One sentence for whatever transformers raises when a folder or hub name does not load.

    Gives what is to be passed to ``from_pretrained`` beside the name.
    """
    folder = Path(name)
    if folder.is_file():
        raise ModelError(f"{name} is a file; name the model's folder, or a hub name")
    looks_local = folder.is_absolute() or str(name).startswith((".", "~")) or str(name).endswith(os.sep)
    if not folder.is_dir() and (looks_local or len(folder.parts) > 2):
        raise ModelError(f"model folder {name} does not exist; name a folder with config.json, or a hub name")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"model folder {name} holds no config.json; name a folder that save_pretrained wrote")
    if (
        folder.is_dir()
        and what == "model"
        and not any(folder.glob("*.safetensors"))
        and any(folder.glob("pytorch_model*.bin"))
    ):
        raise ModelError(
            f"model folder {name} holds weights as pickles only (.bin), which are not read; load them where you "
            "trust them and call save_pretrained, which writes safetensors"
        )
    cached_only = not folder.is_dir() and not _hub_is_reachable()
    where: dict[str, Any] = {"local_files_only": True} if cached_only else {}
    if cached_only and what == "model":
        # Or transformers would ask the hub whether there is an adapter of that name.
        where["adapter_kwargs"] = {"local_files_only": True}
    try:
        with quiet():
            yield where
    except (OSError, ValueError, SafetensorError) as error:
        if cached_only and not isinstance(huggingface_hub.try_to_load_from_cache(str(name), "config.json"), str):
            why = "is not to be asked (HF_HUB_OFFLINE)" if hub.HF_HUB_OFFLINE else "cannot be reached"
            raise ModelError(
                f"there is no folder {name} here, nor is such a model in the hub's cache, and the hub "
                f"({hub.ENDPOINT}) {why}; name a model folder"
            ) from error
        reason = " ".join(str(error).split())
        raise ModelError(f"the {what} {name} cannot be loaded: {reason}") from error


def _hub_is_reachable() -> bool:
    """Asked once a minute at most, since huggingface_hub tries as long before it gives up, at every file."""
    if hub.HF_HUB_OFFLINE:
        return False
    address = urllib.parse.urlsplit(hub.ENDPOINT)
    if not {address.scheme, "all"}.isdisjoint(urllib.request.getproxies()):
        return True  # only the proxy knows
    return _answers(address, int(time.monotonic() // 60))


@functools.lru_cache(1)
def _answers(address: urllib.parse.SplitResult, minute: int) -> bool:
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=10).close()
    except OSError:
        return False
    return True


def classification_batches(
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    labels: Sequence[int | str],
    max_length: int = 256,
    batch_size: int = 32,
) -> list[Batch]:
    """Rows as padded batches of ``input_ids``, ``attention_mask`` (N, T) and ``labels`` (N,), int64 on the CPU.

    ``token_type_ids`` too where the tokenizer makes them.

    Rows are sorted by length, so that a batch holds little padding. Longer rows are cut to `max_length` tokens.

    Args:
        rows: each with one text or a pair.
        labels: the classes in the model's order; a row's label is its position there, -100 where it has none.

    Raises:
        DataError: a label is not among `labels`, or a row has more than two texts.
    """
    return _padded(
        tokenizer, encode_classification(tokenizer, rows, labels=labels, max_length=max_length), batch_size
    )


def causal_batches(
    tokenizer: Any, rows: Sequence[Row], *, max_length: int = 512, batch_size: int = 32
) -> list[Batch]:
    """Rows as padded batches of ``input_ids``, ``attention_mask`` and ``labels`` (N, T), int64 on the CPU.

    A row's texts are joined by a line break, the end-of-text token is put behind them, and rows above `max_length`
    tokens are cut into several. Labels are the tokens themselves, -100 on padding; the model shifts them.
    """
    return _padded(tokenizer, encode_causal(tokenizer, rows, max_length=max_length), batch_size)


def encode_classification(
    tokenizer: Any, rows: Sequence[Row], *, labels: Sequence[int | str], max_length: int
) -> list[dict[str, Any]]:
    """Each row's token ids and label, as lists, unpadded; see `classification_batches`."""
    if not rows:
        raise DataError("there are no rows to make batches of; give at least one")
    index: dict[float | str, int] = {label: position for position, label in enumerate(labels)}
    most = max(len(row.texts) for row in rows)
    if most > 2:
        raise DataError(f"classification takes one text or a pair, not {most}; name one or two text fields")
    for row in rows:
        if row.label is not None and row.label not in index:
            raise DataError(
                f"label {row.label!r} is not one of the model's classes ({', '.join(map(str, list(index)[:8]))})"
            )
    texts = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
    encoded = tokenizer(*texts, truncation=True, max_length=_limit(tokenizer, max_length))
    # token_type_ids tell a BERT which of a pair a token belongs to.
    inputs = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    return [
        {key: encoded[key][i] for key in inputs} | {"labels": IGNORED if row.label is None else index[row.label]}
        for i, row in enumerate(rows)
    ]


def encode_causal(tokenizer: Any, rows: Sequence[Row], *, max_length: int) -> list[dict[str, Any]]:
    """Each row's token ids and labels, as lists, unpadded; see `causal_batches`."""
    limit = _limit(tokenizer, max_length)
    with quiet():  # a row above the model's length is cut below, so the tokenizer's warning misleads
        encoded = tokenizer(["\n".join(row.texts) for row in rows])["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = []
    for ids in encoded:
        ids = ids if ids[-1:] == end else ids + end
        pieces += [ids[start : start + limit] for start in range(0, len(ids), limit)]
    # A single token has no next one to predict.
    return [{"input_ids": piece, "labels": piece} for piece in pieces if len(piece) > 1]


def _limit(tokenizer: Any, max_length: int) -> int:
    """`max_length`, or the tokenizer's own limit where that is less."""
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, not {max_length}")
    return min(max_length, tokenizer.model_max_length)


def _padded(tokenizer: Any, examples: Sequence[dict[str, Any]], batch_size: int) -> list[Batch]:
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, not {batch_size}")
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    return [
        collate(ordered[start : start + batch_size], tokenizer.pad_token_id)
        for start in range(0, len(ordered), batch_size)
    ]


def collate(examples: Sequence[dict[str, Any]], pad_token_id: int) -> Batch:
    """One right-padded batch: ``input_ids``, ``attention_mask``, and ``labels`` with -100 on padding."""
    columns = {key: [torch.tensor(example[key]) for example in examples] for key in examples[0]}
    padding = {"input_ids": pad_token_id, "token_type_ids": 0, "labels": IGNORED}
    columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    return {
        key: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding.get(key, 0))
        if rows[0].dim()
        else torch.stack(rows)
        for key, rows in columns.items()
    }


def require_fit(model: Any, tokenizer: Any) -> None:
    """Raise where a tokenizer does not belong to a model, or a causal loss not to its architecture.

    Raises:
        ModelError: the tokenizer makes token ids the model has no embedding for, or `model` is a bidirectional
            encoder loaded as a causal language model, which sees the tokens it should predict.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embeddings:
        raise ModelError(
            f"the tokenizer of {model.name_or_path} has {len(tokenizer)} tokens but the model only {embeddings} "
            "embeddings; they belong to different models"
        )
    if task_type(model) != "CAUSAL_LM" or getattr(model.config, "is_decoder", False):
        return
    # transformers offers encoders such as BERT as causal models too, for use as decoders.
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise ModelError(
            f"{model.name_or_path} is a bidirectional encoder, not a causal language model; use it for classification"
        )


def length_limit(model: Any, max_length: int) -> int:
    """`max_length`, or the model's number of positions where that is less."""
    return min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)


def train_with_trainer(
    model: Any,
    examples: Sequence[dict[str, Any]],
    folder: str | os.PathLike[str],
    *,
    pad_token_id: int,
    epochs: float = 3,
    batch_size: int = 32,
    learning_rate: float = 5e-4,
    weight_decay: float = 0.0,
    warmup: float = 0.06,
    seed: int = 0,
    use_cpu: bool = False,
    evaluate: Callable[[], dict[str, float]] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train the parameters that require gradients, with transformers' Trainer: AdamW, linear warm-up and decay.

    Args:
        model: trained in place, on the GPU if there is one; left there, in eval mode.
        examples: from `encode_classification` or `encode_causal`; drawn in a random order that `seed` fixes.
        folder: where the Trainer may put files of its own.
        pad_token_id: of the tokenizer.
        epochs: passes over the examples.
        batch_size: examples a step.
        learning_rate: at its peak.
        weight_decay: of AdamW.
        warmup: share of the steps in which the learning rate rises from 0.
        seed: of the order and of dropout.
        use_cpu: train on the CPU even if there is a GPU.
        evaluate: called after each epoch; what it returns goes into the log.
        progress: show a progress bar.

    Returns:
        The Trainer's log: dicts with "step", "epoch" and either "loss", "learning_rate", "grad_norm", or what
        `evaluate` returned, or the run's totals.

    Raises:
        ModelError: the model is quantised, which the Trainer takes as a PEFT model only.
        NonFiniteError: a weight holds NaN or Inf before or after training, or the loss of a step is NaN or Inf, at
            which training stops.
    """
    of_peft = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    if getattr(model, "is_quantized", False) and not of_peft:
        raise ModelError(
            "transformers' Trainer takes a quantised model only with PEFT's adapters: give PEFT the plan "
            "(plan.to_lora_config) and call sensilora.integrations.peft.fuse, or train the unquantised model"
        )
    damaged = first_non_finite_parameter(model)
    if damaged is not None:
        name = damaged.replace(".base_layer.", ".")
        raise NonFiniteError(f"{name} of the model holds NaN or Inf; its checkpoint is damaged, load another one")
    steps = math.ceil(len(examples) / batch_size) * epochs
    with quiet():
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=round(warmup * steps),
            lr_scheduler_type="linear",
            optim="adamw_torch",
            logging_steps=max(1, round(steps / 200)),
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=seed,
            use_cpu=use_cpu,
        )
        # With several GPUs the Trainer would wrap the model in nn.DataParallel; this is single-GPU training.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        bar = _Progress(evaluate, progress)
        trainer = _Trainer(
            model,
            arguments,
            data_collator=functools.partial(collate, pad_token_id=pad_token_id),
            train_dataset=list(examples),
            callbacks=[bar],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            bar.close()
        trainer.require_finite_loss()
    model.eval()
    damaged = first_non_finite_parameter(model)
    if damaged is not None:
        raise NonFiniteError(f"training diverged: {damaged} holds NaN or Inf; lower the learning rate")
    return trainer.state.log_history


class _Trainer(Trainer):
    """Stops when the loss is no longer finite."""

    latest_loss: Tensor | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # One step late: to ask for the loss of this one would make the host wait for the GPU at every step.
        self.require_finite_loss()
        self.latest_loss = super().training_step(*args, **kwargs)
        return self.latest_loss

    def require_finite_loss(self) -> None:
        if self.latest_loss is None or bool(self.latest_loss.isfinite()):
            return
        step, loss = self.state.global_step, float(self.latest_loss)
        if step == 1:
            raise NonFiniteError(
                f"the loss of step 1 is {loss}, before anything was trained: the model overflows on this data; load "
                "it in another dtype (--dtype float32 or bfloat16)"
            )
        raise NonFiniteError(f"training diverged: the loss of step {step} is {loss}; lower the learning rate")


class _Progress(TrainerCallback):
    """A bar with the latest loss, and an evaluation after each epoch."""

    def __init__(self, evaluate: Callable[[], dict[str, float]] | None, show: bool) -> None:
        self.evaluate, self.show = evaluate, show
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step", disable=not self.show)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.evaluate is not None:
            state.log_history.append({**self.evaluate(), "epoch": state.epoch, "step": state.global_step})

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@dataclasses.dataclass(frozen=True)
class Drift:
    """What `SensitivityCallback` measured at the end of an epoch.

    Attributes:
        epoch, step: of training, as the Trainer counts them.
        kendall_tau: Kendall's tau-b between the fused scores now and the reference's; None where it is undefined
            (a single matrix, or equal scores for all).
        seconds: what the measurement took, wall time.
        report: the measurement, under the reference's names: ``drift.report.compare(reference)`` tells which matrices
            moved, and by which score.
    """

    epoch: float
    step: int
    kendall_tau: float | None
    seconds: float
    report: SensitivityReport


class SensitivityCallback(TrainerCallback):
    """Logs after each epoch how far the order of the weight matrices' sensitivities has drifted from the plan's.

    The model is calibrated as it is then, with the estimator and the settings of the reference, and compared by
    `SensitivityReport.compare`; Kendall's tau of the fused scores is logged as ``sensitivity/kendall_tau`` (1: the
    order is the plan's still; Sensitivity-LoRA, Table 6, finds 0.98 to 0.99), the time it took as
    ``sensitivity/seconds``. The Trainer's ``log`` brings both to ``state.log_history`` and, with ``train/`` before
    their names, to TensorBoard and W&B. ::

        trainer.add_callback(SensitivityCallback(plan, batches, trainer))

    What is measured are the plan's matrices without their adapters, in a model that computes with them: by
    "activation" the autocorrelation of the base layers' inputs, which earlier layers' adapters have changed; by
    "fisher" and "hutchinson" derivatives of the adapted model's loss by the base weights. Adapters may be this
    package's or PEFT's, fused or not, merged or not; without any, the trained weights themselves are measured.

    Each time costs with "activation" one forward pass over `batches`, in the Trainer's mixed precision, without
    gradients; with "fisher" a backward pass more for each draw of labels. Adapters are computed by torch meanwhile,
    but for those over quantised layers. The probes of "hutchinson" are drawn anew for a model with adapters, so that
    their noise is in its drift.

    Weights, gradients, the optimiser and the random number generators (torch's, NumPy's, Python's) are afterwards as
    they were, so that training goes on to the same weights, bit for bit, as without the callback. Gradient
    checkpointing and a ``device_map`` may be on. Under DistributedDataParallel every process measures the same
    batches by itself, without communication, and has the same `history`. Weights that are sharded (FSDP, DeepSpeed
    ZeRO-3) or offloaded cannot be measured, nor quantised ones by "hutchinson".

    Args:
        reference: the plan, or the report that it was made from. An older plan that does not tell the ``variant`` of
            "activation" is taken for one of "diagonal".
        batches: as for `sensilora.calibrate`; those of the plan's own calibration for a drift of the model alone.
            They are read again each epoch; an iterator is read once and kept.
        trainer: whose ``log`` is called.
        options: further arguments of `sensilora.calibrate`, such as ``memory_budget`` or ``loss_fn``.

    Attributes:
        history: a `Drift` for each epoch so far.

    Raises:
        ReportError: `reference` is a plan without a calibration, an older one that does not tell the settings of
            "hutchinson", or neither plan nor report.
        CalibrationError: `batches` is one batch or no iterable, or an option is one that the reference decides.
        TargetError: when training begins, a matrix of the reference is not in the model or cannot be measured.
    """

    def __init__(
        self,
        reference: RankPlan | SensitivityReport,
        batches: Iterable[Mapping[str, Any]],
        trainer: Trainer,
        **options: Any,
    ) -> None:
        if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
            raise CalibrationError(
                f"batches is a {type(batches).__name__}; give an iterable of batches, for example [batch] or a "
                "DataLoader"
            )
        if not isinstance(reference, (RankPlan, SensitivityReport)):
            raise ReportError(f"reference is a {type(reference).__name__}; give a RankPlan or a SensitivityReport")
        self.reference = reference
        self.weights = reference.allocation.weights if isinstance(reference, RankPlan) else "cv"
        settings = _settings(reference)
        decided = [name for name in options if name in settings or name == "targets"]
        if decided:
            raise CalibrationError(f"{decided[0]} follows from the reference; leave it out or change the reference")
        self.settings = {"progress": False, **options, **settings}
        self.batches = list(batches) if isinstance(batches, Iterator) else batches
        self.trainer = trainer
        self.history: list[Drift] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the reference's matrices, so that a misfit is told before an epoch has passed."""
        _names_here(_adapted_model(model), self.reference)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure, log and remember."""
        start = time.perf_counter()
        report = self._measure(_adapted_model(model))
        seconds = time.perf_counter() - start
        tau = report.compare(self.reference, weights=self.weights).agreement["fused"].kendall
        self.history.append(Drift(state.epoch, state.global_step, tau, seconds, report))
        # The Trainer's own log of this step, if it is due, has yet to come; this one would count as it.
        should_log = control.should_log
        logged = {"sensitivity/kendall_tau": tau, "sensitivity/seconds": seconds}
        self.trainer.log({name: value for name, value in logged.items() if value is not None})
        control.should_log = should_log

    def _measure(self, model: nn.Module) -> SensitivityReport:
        names = _names_here(model, self.reference)
        # An expression, since a list's entries would match the ends of other names too.
        targets = "|".join(map(re.escape, names.values()))
        with _host_generators_kept(), self.trainer.accelerator.autocast(), _calling_base_layers(model):
            found = calibrate(model, self.batches, targets=targets, **self.settings)
        plain = {there: name for name, there in names.items()}
        return dataclasses.replace(
            found,
            # Its names and shapes were compared; other weights may differ, and PEFT's own names do.
            fingerprint=self.reference.fingerprint,
            matrices={
                plain.get(name, name): dataclasses.replace(
                    matrix, aliases=tuple(plain.get(alias, alias) for alias in matrix.aliases)
                )
                for name, matrix in found.matrices.items()
            },
        )


def _settings(reference: RankPlan | SensitivityReport) -> dict[str, Any]:
    """The arguments of `calibrate` that the reference was measured with, as far as it records them.

    Raises:
        ReportError: a plan was made without a calibration, or does not tell the settings of "hutchinson".
    """
    made = reference.calibration if isinstance(reference, RankPlan) else reference
    if made is None:
        raise ReportError("the plan was made without a calibration, so it has no order to compare; give a report")
    if made.estimator == "hutchinson" and made.probes is None:
        raise ReportError(
            "the plan is an older one, without the settings of 'hutchinson'; give the report it was made from"
        )
    names = (
        *("estimator", "variant", "block_size", "damping", "mode", "labels", "draws", "hvp", "probes", "min_probes"),
        *("tolerance", "seed", "k", "alpha"),
    )
    recorded = {name: getattr(made, name) for name in names if getattr(made, name) is not None}
    if isinstance(made, SensitivityReport) and made.min_expert_tokens is not None:
        return {**recorded, "experts": True, "min_expert_tokens": made.min_expert_tokens}
    return {**recorded, "experts": False}


def _adapted_model(model: Any) -> nn.Module:
    """The model that holds the adapters, whose names are the plan's but for ``base_layer``."""
    model = unwrapped(model)
    while hasattr(model, "get_base_model"):  # PEFT's
        model = unwrapped(model.get_base_model())
    return model


def _names_here(model: nn.Module, reference: RankPlan | SensitivityReport) -> dict[str, str]:
    """Names in the model by names in the reference, of linear modules; checked to be measurable."""
    modules = dict(model.named_modules())
    here = {name.replace(".base_layer", ""): name for name, module in modules.items() if is_matrix(module)}
    names = {}
    for name, matrix in reference.matrices.items():
        aliases: tuple[str, ...] = ()
        if isinstance(matrix, MatrixSensitivity):
            if matrix.expert_of is not None:
                continue
            aliases = matrix.aliases
        for alias in (name, *aliases):
            if alias not in here:
                raise TargetError(
                    f"the reference is for {reference.model_id}: the model in training has no linear layer "
                    f"{alias!r}; give the plan or report of this model"
                )
            names[alias] = here[alias]
    found = find_targets(model, "|".join(map(re.escape, names.values())))
    for name, there in names.items():
        if isinstance(modules[there.rpartition(".")[0]], MultiLoRALinear):
            raise TargetError(
                f"{name} holds several adapters (sensilora.mixed), of which each row of a batch uses its own; its "
                "drift cannot be measured, leave the callback out"
            )
        shape = reference.matrices[name].shape if name in reference.matrices else None
        if shape is not None and matrix_shape(found[there]) != shape:
            raise TargetError(
                f"{name} is {matrix_shape(found[there])} in the model in training and {shape} in the "
                "reference; give the plan or report of this model, and leave its weights unsharded"
            )
    return names


@contextlib.contextmanager
def _calling_base_layers(model: nn.Module) -> Iterator[None]:
    """Let adapter layers that compute base and adapter at once call the base layer, which can then be watched."""
    # Fused layers of PEFT are told by their module, so that peft need not be imported.
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, VarRankLoRALinear) or type(module).__module__ == "sensilora.integrations.peft"
    }

    def wrap(name: str, layer: Any, forward: Forward) -> Forward:
        if isinstance(layer, VarRankLoRALinear):
            return functools.partial(_through_base_layer, layer)
        return super(type(layer), layer).forward

    with wrapped_forwards(layers, wrap):
        yield


def _through_base_layer(layer: VarRankLoRALinear, x: Tensor) -> Tensor:
    """`VarRankLoRALinear.forward` in eval mode."""
    y = layer.base_layer(x)
    if not layer.adapts:
        return y
    linear = nn.functional.linear
    return y + layer.scaling * linear(linear(x, layer.lora_A.to(x.dtype)), layer.lora_B.to(x.dtype))


@contextlib.contextmanager
def _host_generators_kept() -> Iterator[None]:
    """Python's and NumPy's random number generators as they were, which collators may draw from."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def evaluate_classifier(model: Any, batches: Sequence[Batch], *, progress: bool = True) -> dict[str, float]:
    """Accuracy, macro-F1, mean cross-entropy and number of the labelled rows in `batches`.

    Raises:
        DataError: no row has a label.
        NonFiniteError: the model's output makes the loss NaN or Inf.
    """
    gold: list[int] = []
    predicted: list[int] = []
    total = 0.0
    with _evaluating(model, batches, progress) as bar:
        for batch in bar:
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            total += float(nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            gold += labels[labels != IGNORED].tolist()
            predicted += logits.argmax(-1)[labels != IGNORED].tolist()
    if not gold:
        raise DataError("no row has a label to compare with; name the field that holds it (--label-field)")
    _require_finite(total)
    accuracy, macro_f1 = accuracy_and_macro_f1(gold, predicted)
    return {"accuracy": accuracy, "macro_f1": macro_f1, "loss": total / len(gold), "rows": len(gold)}


def evaluate_causal_lm(model: Any, batches: Sequence[Batch], *, progress: bool = True) -> dict[str, float]:
    """Mean negative log-likelihood a predicted token (in nats), its exponential, and the number of those tokens.

    A perplexity beyond all doubles is infinite.

    Raises:
        DataError: no row has a token to predict.
        NonFiniteError: the model's output makes the loss NaN or Inf.
    """
    total, tokens = 0.0, 0
    with _evaluating(model, batches, progress) as bar:
        for batch in bar:
            counted = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**batch).loss) * counted
            tokens += counted
    if not tokens:
        raise DataError("no row is longer than one token, so there is nothing to predict")
    _require_finite(total)
    loss = total / tokens
    # torch's exponential is infinite where Python's raises.
    return {"loss": loss, "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()), "tokens": tokens}


def _require_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss on the evaluation rows is {loss}; the adapter diverged in training, or the model overflows in "
            "its dtype: evaluate in float32"
        )


def accuracy_and_macro_f1(gold: Sequence[int], predicted: Sequence[int]) -> tuple[float, float]:
    """Share of equal entries, and the unweighted mean of F1 over the classes that occur in either sequence."""
    pairs = list(zip(gold, predicted, strict=True))
    in_gold, in_predicted = Counter(gold), Counter(predicted)
    hits = Counter(g for g, p in pairs if g == p)
    classes = in_gold.keys() | in_predicted.keys()
    f1 = [2 * hits[label] / (in_gold[label] + in_predicted[label]) for label in classes]
    return sum(hits.values()) / len(pairs), math.fsum(f1) / len(f1)


@contextlib.contextmanager
def _evaluating(model: Any, batches: Sequence[Batch], progress: bool) -> Iterator[Iterator[Batch]]:
    """The batches on the model's device; meanwhile the model is in eval mode and without gradients."""
    training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=not progress) as bar,
        ):
            yield ({key: value.to(model.device) for key, value in batch.items()} for batch in bar)
    finally:
        model.train(training)
