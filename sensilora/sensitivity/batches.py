"""Reading a calibration batch: its inputs, its labels, and which rows of a module belong to which sequence."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sensilora.errors import CalibrationError

#: The label that never counts, as in transformers and `torch.nn.functional.cross_entropy`.
IGNORED = -100

_CROSS_ATTENTION = re.compile(r"encdec_?attention|(encoder|cross)_?att", re.IGNORECASE)
_KEY_OR_VALUE = re.compile(r"(k|v|kv|key|value)(_proj)?")


@dataclass(frozen=True)
class Stream:
    """One sequence axis of a batch (an encoder-decoder model has two): its shape, and which positions count.

    Attributes:
        shape: (N, T), or (N, choices, T) for multiple choice.
        mask: bool of that shape; None where every position counts.
    """

    shape: tuple[int, ...]
    mask: Tensor | None

    @property
    def tokens(self) -> int:
        return torch.Size(self.shape).numel() if self.mask is None else int(self.mask.sum())

    def covers(self, lead: torch.Size) -> bool:
        """Whether rows of shape `lead` are this stream's positions, or one row for each of its folded sequences."""
        folded = (torch.Size(self.shape[:-1]).numel(), self.shape[-1])
        return tuple(lead) in (self.shape, folded, (folded[0] * folded[1],), folded[:1])

    def spread(self, lead: torch.Size) -> Tensor | None:
        """The mask for rows of shape `lead`, flat; None where the rows are not positions of this stream."""
        if self.mask is None:
            return None
        if lead.numel() == self.mask.numel() and self.covers(lead):
            return self.mask.reshape(-1)
        axes = [axis for axis in range(1, len(lead)) if lead[axis] == self.shape[-1]]
        if lead[:1] != self.shape[:1] or len(self.shape) != 2 or not axes:
            return None
        view = [1] * len(lead)
        view[0], view[axes[0]] = self.shape
        return self.mask.view(view).expand(lead).reshape(-1)


@dataclass(frozen=True)
class Rows:
    """How the rows of one module's input belong to the sequences of a batch.

    Attributes:
        lengths: (N,) int64 on the CPU, how many rows of each sequence count; sequences follow each other.
        mask: bool (rows,), which count; None: all.
        index: int64 (counted rows,), where they are; None: all.
    """

    lengths: Tensor
    mask: Tensor | None = None
    index: Tensor | None = None

    @functools.cached_property
    def count(self) -> int:
        return int(self.lengths.sum())

    def pack(self, x: Tensor) -> Tensor:
        """The counted rows of `x` (..., features) as (rows, features)."""
        flat = x.reshape(-1, x.shape[-1])
        # A model may be spread over several devices.
        return flat if self.index is None else flat.index_select(0, self.index.to(flat.device))


class Batch:
    """One batch on the model's device, divided into what the model gets and what the loss gets.

    Attributes:
        entries: everything the batch held, for a caller's own loss function.
        inputs: the keyword arguments of the model's forward.
        labels: the labels, or None.
        size: N, the number of sequences.
        streams: the input's `Stream`, and the decoder's where there is one; empty if the batch has no token axis.
    """

    def __init__(self, raw: object, model: nn.Module) -> None:
        if not isinstance(raw, Mapping):
            raise CalibrationError(
                f"a calibration batch is a {type(raw).__name__}; each must be a dict of tensors, "
                "as a tokenizer or a collator makes them"
            )
        device = next(model.parameters()).device
        self.entries: dict[str, Any] = {
            key: _own(value, device) if isinstance(value, Tensor) else value for key, value in raw.items()
        }
        self.labels = self._labels()
        self.inputs = {key: value for key, value in self.entries.items() if key not in ("labels", "label")}
        stream = self._input_stream()
        self.streams = [] if stream is None else [stream]
        # Images and sound have no token axis: then the decoder's stream is the only one.
        self._encoder_streams = list(self.streams)
        self.size = self.streams[0].shape[0] if self.streams else self._first_size()
        if is_encoder_decoder(model):
            self._read_decoder(model)
        for shape in [stream.shape for stream in self.streams] or [(self.size,)]:
            if 0 in shape:
                raise CalibrationError(
                    f"a calibration batch holds no {'sequence' if self.size == 0 else 'token'}: its shape is "
                    f"{tuple(shape)}; leave empty batches out"
                )
        if "use_cache" in inspect.signature(model.forward).parameters:
            # A cache of keys and values serves generation only and would hold memory for every layer.
            self.inputs.setdefault("use_cache", False)
        self._rows: dict[tuple[torch.Size, str, bool], Rows | None] = {}

    def rows(self, name: str, lead: torch.Size) -> Rows | None:
        """How rows of shape `lead` (a module input's shape without its last size) belong to the sequences.

        Args:
            name: the module, which tells the encoder's token axis from the decoder's where both would fit.

        Returns:
            None if they cannot be told apart: neither N rows first, nor one row for each of the N·T positions.
        """
        stack, routed = _stack_read(name), "experts" in name.split(".")
        key = (lead, stack, routed)
        if key not in self._rows:
            streams = {"decoder": self.streams[::-1], "encoder": self._encoder_streams}.get(stack, self.streams)
            self._rows[key] = self._divide(lead, streams, routed)
        return self._rows[key]

    @property
    def padded(self) -> bool:
        return any(stream.mask is not None for stream in self.streams)

    def _divide(self, lead: torch.Size, streams: list[Stream], routed: bool) -> Rows | None:
        # All rows are a single sequence's, but of those that reach an expert some may be padding.
        alone = self.size == 1 and not (routed and self.padded)
        belong = alone or (len(lead) > 0 and lead[0] == self.size)
        if not belong and not any(stream.covers(lead) for stream in streams):
            return None
        fitting = [stream for stream in streams if stream.covers(lead)] or streams
        mask = next((mask for mask in (stream.spread(lead) for stream in fitting) if mask is not None), None)
        if mask is None:
            return Rows(torch.full((self.size,), lead.numel() // self.size, dtype=torch.int64))
        return Rows(mask.view(self.size, -1).sum(1).cpu(), mask, mask.nonzero().squeeze(1))

    def _labels(self) -> Tensor | None:
        labels = self.entries.get("labels", self.entries.get("label"))
        if labels is not None and not isinstance(labels, Tensor):
            raise CalibrationError(
                f"the labels of a calibration batch are a {type(labels).__name__}; give a tensor "
                "(return_tensors='pt', or a collator that stacks them)"
            )
        return labels

    def _input_stream(self) -> Stream | None:
        mask = self._mask("attention_mask")
        shape = None
        if isinstance(self.inputs.get("input_ids"), Tensor):
            shape = self.inputs["input_ids"].shape
        elif isinstance(self.inputs.get("inputs_embeds"), Tensor):
            shape = self.inputs["inputs_embeds"].shape[:-1]
        elif mask is not None:
            shape = mask.shape
        if shape is None:
            return None
        return _stream("attention_mask", shape, mask)

    def _read_decoder(self, model: nn.Module) -> None:
        """Add the decoder's stream; keep the labels among the inputs if the decoder's are made from them."""
        sequence_labels = self.labels if self.labels is not None and self.labels.dim() == 2 else None
        mask = self._mask("decoder_attention_mask")
        if isinstance(self.inputs.get("decoder_input_ids"), Tensor):
            shape = self.inputs["decoder_input_ids"].shape
        elif isinstance(self.inputs.get("decoder_inputs_embeds"), Tensor):
            shape = self.inputs["decoder_inputs_embeds"].shape[:-1]
        elif sequence_labels is not None:
            shape = sequence_labels.shape
            self.inputs["labels"] = sequence_labels
        elif not self.streams and "decoder_input_ids" in inspect.signature(model.forward).parameters:
            raise CalibrationError(
                f"a calibration batch for {type(model).__name__} holds nothing for the decoder, only "
                f"{', '.join(self.entries)}; add labels (N, T), or decoder_input_ids"
            )
        else:
            return
        if mask is None and sequence_labels is not None and sequence_labels.shape == shape:
            # Only the ignored labels at the end are padding: positions before a counted label feed its prediction.
            counted = (sequence_labels != IGNORED).long()
            mask = counted.flip(1).cumsum(1).flip(1) > 0
        self.streams.append(_stream("decoder_attention_mask", shape, mask))

    def _mask(self, key: str) -> Tensor | None:
        mask = self.inputs.get(key)
        if mask is not None and not isinstance(mask, Tensor):
            raise CalibrationError(f"{key} of a calibration batch is a {type(mask).__name__}; give a tensor (N, T)")
        return mask

    def _first_size(self) -> int:
        for value in self.entries.values():
            if isinstance(value, Tensor) and value.dim() > 0:
                return value.shape[0]
        raise CalibrationError(
            f"a calibration batch holds no tensor, only {', '.join(map(str, self.entries)) or 'nothing'}; "
            "make it with return_tensors='pt'"
        )


def progress_bar(
    batches: Iterable[Any], text: str, *, show: bool, total: int | None = None, unit: str = "batch"
) -> tqdm:
    """A bar over batches, on the main process only. The total is their number where ``len`` knows it."""
    return tqdm(batches, desc=text, unit=unit, total=total, disable=not (show and _is_main()))


def announce(text: str, *, show: bool) -> None:
    """A line where the bars are, on the main process only."""
    if show and _is_main():
        tqdm.write(text, file=sys.stderr)


def _is_main() -> bool:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's configuration says that it has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a backward pass does not reach the caller's, and may save it."""
    tensor = tensor.detach().to(device)
    return tensor.clone() if tensor.is_inference() else tensor


def _stream(key: str, shape: torch.Size, mask: Tensor | None) -> Stream:
    if mask is not None:
        if mask.shape != shape:
            raise CalibrationError(f"{key} has shape {tuple(mask.shape)} but the tokens have {tuple(shape)}")
        mask = mask != 0
        if bool(mask.all()):
            mask = None
    return Stream(tuple(shape), mask)


def _stack_read(name: str) -> Literal["encoder", "decoder", ""]:
    """Whose states the module reads, by its name; "" if that does not tell.

    Keys and values of cross-attention are made from the encoder's.
    """
    if "decoder" not in name:
        return "encoder" if "encoder" in name else ""
    cross = _CROSS_ATTENTION.search(name) and _KEY_OR_VALUE.fullmatch(name.rpartition(".")[2])
    return "encoder" if cross else "decoder"
