"""The sum-reduced loss that Fisher differentiates: from the model's logits and labels, given or sampled.

Every loss is a negative log-likelihood summed over what counts, so that the gradient at a sequence's positions is
that of the sequence's own loss, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sensilora.errors import CalibrationError
from sensilora.sensitivity.batches import IGNORED, Batch, is_encoder_decoder

# transformers' names of models whose logits at position t predict the token at t + 1.
_NEXT_TOKEN_MODELS = ("CausalLM", "LMHead", "ConditionalGeneration")


class Likelihood(NamedTuple):
    """What a batch's logits are the parameters of.

    Attributes:
        family: "categorical", "bernoulli" (one for each logit) or "gaussian" (of unit variance, the logit its mean).
        logits: (rows, C), fp32 at least; only rows that count.
        labels: (rows,) int64 for "categorical", else (rows, C); None where the batch has none.
        sequences: how many sequences have a row that counts.
        terms: (rows,) int64, the place of each row among those of its sequence, from 0; None where each has one.
    """

    family: Literal["categorical", "bernoulli", "gaussian"]
    logits: Tensor
    labels: Tensor | None
    sequences: int
    terms: Tensor | None = None

    @property
    def most_terms(self) -> int:
        """The most loss terms that a sequence has."""
        if self.terms is None:
            return min(len(self.logits), 1)
        return int(self.terms.max()) + 1 if len(self.terms) else 0

    def loss(self, labels: Tensor, term: int | None = None) -> Tensor:
        """Negative log-likelihood of `labels`, summed (without the gaussian's constant).

        Args:
            labels: as the attribute.
            term: sum only what stands at this place of its sequence; None: everything.
        """
        logits = self.logits
        if term is not None and self.terms is not None:
            chosen = self.terms == term
            logits, labels = logits[chosen], labels[chosen]
        if self.family == "categorical":
            return F.cross_entropy(logits, labels, reduction="sum")
        if self.family == "bernoulli":
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return 0.5 * (logits - labels).square().sum()

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """Labels drawn from the model's own distribution. The logits must be finite."""
        if self.family == "categorical":
            return torch.multinomial(self.logits.softmax(-1), 1, generator=generator).squeeze(1)
        noise = torch.empty_like(self.logits)
        if self.family == "bernoulli":
            return (noise.uniform_(generator=generator) < self.logits.sigmoid()).to(noise.dtype)
        return self.logits + noise.normal_(generator=generator)


def likelihood(model: nn.Module, outputs: Any, batch: Batch, shift_labels: bool | None) -> Likelihood:
    """Match a model's outputs with a batch's labels.

    (N, T, V) logits are categorical at every position whose label is not -100 and not padding (next-token models:
    the label one further on); (N, C) logits with integer labels categorical, with float labels (N, C) bernoulli;
    (N, 1) logits with float labels gaussian. ``config.problem_type`` settles the other cases as in transformers.

    Args:
        shift_labels: whether logits predict the next position's label; None: as the model's class name says.

    Raises:
        CalibrationError: the outputs have no logits, or logits and labels do not fit each other.
    """
    logits = _logits(outputs)
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if logits.dim() == 3:
        shift = _predicts_next_token(model) if shift_labels is None else shift_labels
        found = _of_tokens(logits, batch, shift)
    elif logits.dim() in (1, 2):
        found = _of_sequences(logits.reshape(logits.shape[0], -1), batch, problem)
    else:
        raise CalibrationError(f"the model's logits have shape {tuple(logits.shape)}; pass loss_fn for such a model")
    if found.family == "categorical" and found.labels is not None and found.labels.numel():
        low, high = int(found.labels.min()), int(found.labels.max())
        classes = found.logits.shape[-1]
        if low < 0 or high >= classes:
            raise CalibrationError(
                f"label {low if low < 0 else high} is outside the model's {classes} classes; "
                f"labels are 0 to {classes - 1}, or {IGNORED} for those that do not count"
            )
    return found


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    elif not isinstance(outputs, Tensor):
        outputs = getattr(outputs, "logits", None)
    if not isinstance(outputs, Tensor):
        raise CalibrationError(
            "the model's output has no logits, so its loss is unknown; pass loss_fn(outputs, batch), "
            "which returns the loss summed over the batch"
        )
    return outputs


def _predicts_next_token(model: nn.Module) -> bool:
    # By the bases' names too, so that a subclass of a user's own counts.
    names = [cls.__name__ for cls in type(model).__mro__]
    return not is_encoder_decoder(model) and any(part in name for name in names for part in _NEXT_TOKEN_MODELS)


def _of_tokens(logits: Tensor, batch: Batch, shift: bool) -> Likelihood:
    labels = batch.labels
    shape = logits.shape[:2]
    if labels is not None and (labels.shape != shape or labels.is_floating_point()):
        raise CalibrationError(
            f"labels {tuple(labels.shape)} {labels.dtype} do not fit logits {tuple(logits.shape)}: "
            "token labels are integers, one for each position"
        )
    counted = torch.ones(shape, dtype=torch.bool, device=logits.device) if labels is None else labels != IGNORED
    # The last stream is the one the logits belong to: the decoder's where there is one.
    mask = batch.streams[-1].mask if batch.streams else None
    if mask is not None and mask.shape == shape:
        counted = counted & mask
        if shift:
            # A padded position before the first token (left padding) predicts nothing.
            counted = counted & F.pad(mask[:, :-1], (1, 0))
    if shift:
        logits, counted = logits[:, :-1], counted[:, 1:]
        labels = None if labels is None else labels[:, 1:]
    return Likelihood(
        "categorical",
        _at_least_fp32(logits[counted]),
        None if labels is None else labels[counted].long(),
        int(counted.any(1).sum()),
        (counted.cumsum(1) - 1)[counted],
    )


def _of_sequences(logits: Tensor, batch: Batch, problem: str | None) -> Likelihood:
    labels, (sequences, classes) = batch.labels, logits.shape
    logits = _at_least_fp32(logits)
    regression = problem == "regression" or (classes == 1 and problem != "multi_label_classification")
    if labels is None:
        several = problem == "multi_label_classification"
        family: Any = "gaussian" if regression else "bernoulli" if several else "categorical"
        return Likelihood(family, logits, None, sequences)
    if labels.is_floating_point() and labels.numel() == logits.numel() and labels.shape[:1] == (sequences,):
        values = labels.reshape(logits.shape).to(logits.dtype)
        if not regression and not bool(((values >= 0) & (values <= 1)).all()):
            raise CalibrationError(
                "the labels of a batch for several labels at once are probabilities, from 0 to 1, and some are not "
                f"({IGNORED} has no meaning there); for a regression with several outputs set "
                "config.problem_type='regression', or pass loss_fn"
            )
        return Likelihood("gaussian" if regression else "bernoulli", logits, values, sequences)
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if whole and not regression and labels.numel() == sequences and labels.shape[:1] == (sequences,):
        labels = labels.reshape(-1).long()
        counted = labels != IGNORED
        return Likelihood("categorical", logits[counted], labels[counted], int(counted.sum()))
    raise CalibrationError(
        f"labels {tuple(labels.shape)} {labels.dtype} do not fit logits {tuple(logits.shape)}: give integers (N,) "
        "for classes, floats (N, C) for several labels at once, or floats (N,) for a regression with one logit"
    )


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
