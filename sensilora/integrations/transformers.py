"""transformers: loading models and tokenizers, batches from rows of text, training with its Trainer, evaluation."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sensilora.data import Row
from sensilora.errors import DataError, ModelError
from sensilora.sensitivity.batches import IGNORED
from sensilora.targets import head_names

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
    with _loading(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(name))
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


def _first(token_id: int | list[int] | None) -> int | None:
    return token_id[0] if isinstance(token_id, list) else token_id


def _load(loader: Any, name: str | os.PathLike[str], dtype: torch.dtype | None, **arguments: Any) -> Any:
    with _loading(name, "model"):
        model, info = loader.from_pretrained(
            str(name),
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            output_loading_info=True,
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
def _loading(name: str | os.PathLike[str], what: str) -> Iterator[None]:
    """One sentence for whatever transformers raises when a folder or hub name does not load."""
    folder = Path(name)
    looks_local = folder.is_absolute() or str(name).startswith((".", "~")) or len(folder.parts) > 2
    if not folder.is_dir() and (looks_local or folder.exists()):
        raise ModelError(f"model folder {name} does not exist; name a folder with config.json, or a hub name")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"model folder {name} holds no config.json; name a folder that save_pretrained wrote")
    try:
        with quiet():
            yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the {what} {name} cannot be loaded: {reason}") from error


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
    index = {label: position for position, label in enumerate(labels)}
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
