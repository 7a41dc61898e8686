"""New classification heads: telling them, and training one for a few steps before Fisher is measured.

A head at its random start sends gradients into the model that depend on the draw and not on the task.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sensilora.errors import CalibrationError
from sensilora.sensitivity.batches import Batch, progress_bar
from sensilora.sensitivity.capture import raise_non_finite
from sensilora.sensitivity.fisher import LossFunction, own_loss, require_labels
from sensilora.sensitivity.losses import likelihood
from sensilora.targets import head_names, outermost_heads

_LEARNING_RATE = 1e-3
# How far a head's standard deviation may be from config.initializer_range and still look untrained.
_STD_TOLERANCE = 0.2


def classification_head(model: nn.Module) -> tuple[str, nn.Linear] | None:
    """The last linear module of the task head, by name; None for language models and models without a head."""
    output_embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    if output_embeddings is not None:
        return None
    names = head_names(model)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return next(((name, module) for name, module in reversed(linears) if name in names), None)


def untrained_heads(model: nn.Module) -> list[str]:
    """Names of the classification head's outermost modules if it looks as transformers initialises it, else none.

    RoBERTa's head is two new layers in one module, DistilBERT's is two modules.
    """
    head = classification_head(model)
    std = getattr(getattr(model, "config", None), "initializer_range", None)
    if head is None or not std or head[1].weight.numel() < 2:
        return []
    _, module = head
    if module.bias is not None and bool(module.bias.any()):
        return []
    new = abs(float(module.weight.detach().float().std()) / std - 1) < _STD_TOLERANCE
    return outermost_heads(model) if new else []


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the task head, by name."""
    names = head_names(model)
    return {name: parameter for name, parameter in model.named_parameters() if name.rpartition(".")[0] in names}


@contextlib.contextmanager
def warmed_head(
    model: nn.Module,
    batches: Iterable[Any],
    steps: int,
    *,
    modules: Mapping[str, nn.Module],
    loss_fn: LossFunction | None,
    shift_labels: bool | None,
    progress: bool,
    trained: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Train the task head alone for `steps` batches (AdamW), and give it its old weights back at the end.

    Everything else is expected frozen; no parameter's ``.grad`` is touched.

    Args:
        trained: the head's weights by name, from a run that trained it; they are taken instead.

    Raises:
        CalibrationError: the model has no classification head, or the batches have no labels.
        NonFiniteError: the loss becomes NaN or Inf.
    """
    if steps == 0:
        yield
        return
    if classification_head(model) is None:
        raise CalibrationError(
            f"head_warmup_steps={steps}, but {type(model).__name__} has no classification head to train"
        )
    named = head_parameters(model)
    parameters = list(named.values())
    original = [parameter.detach().clone() for parameter in parameters]
    try:
        if trained is not None:
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(trained[name])
            yield
            return
        for parameter in parameters:
            parameter.requires_grad_(True)

        def mean_loss(raw: Any) -> Tensor | None:
            batch = Batch(raw, model)
            outputs = model(**batch.inputs)
            if loss_fn is not None:
                loss = own_loss(loss_fn, outputs, batch) / batch.size
            else:
                require_labels(batch)
                found = likelihood(model, outputs, batch, shift_labels)
                if found.labels is None or not found.sequences:
                    return None
                loss = found.loss(found.labels) / len(found.logits)
            if not bool(loss.isfinite()):
                raise_non_finite(model, modules, batch, "the loss of the head warm-up")
            return loss

        with torch.enable_grad():
            stream = itertools.islice(_endless(batches), steps)
            _train(parameters, map(mean_loss, progress_bar(stream, "head warm-up", show=progress, total=steps)))
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        with torch.no_grad():
            for parameter, weights in zip(parameters, original, strict=True):
                parameter.copy_(weights)


def _train(parameters: list[nn.Parameter], losses: Iterable[Tensor | None]) -> None:
    # Steps are taken on copies of at least fp32, in which an fp16 or bf16 head would lose small updates.
    masters = [
        weights.detach().to(torch.promote_types(weights.dtype, torch.float32), copy=True) for weights in parameters
    ]
    optimizer = torch.optim.AdamW(masters, lr=_LEARNING_RATE, weight_decay=0.0)
    for loss in losses:
        if loss is None:
            continue
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.to(master.dtype)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise CalibrationError("the calibration data is empty; give at least one batch")
