"""The calibration driver: batches through a model, sensitivities of its weight matrices out."""

from __future__ import annotations

import contextlib
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

import sensilora
from sensilora import ops
from sensilora.errors import CalibrationError, NonFiniteError, TargetError
from sensilora.ops.fisher_diag import MODES
from sensilora.sensitivity.activation import MAX_DAMPING, ActivationEstimator
from sensilora.sensitivity.batches import Batch, progress_bar
from sensilora.sensitivity.capture import Matrix, frozen, group_tied, wrapped_forwards
from sensilora.sensitivity.estimator import Estimator
from sensilora.sensitivity.experts import ExpertStack, Observer, find_expert_stacks, followed_experts, with_siblings
from sensilora.sensitivity.fisher import FisherEstimator, LossFunction
from sensilora.sensitivity.head import untrained_heads, warmed_head
from sensilora.sensitivity.report import (
    EstimatorName,
    LabelSource,
    MatrixSensitivity,
    Mode,
    SensitivityReport,
    Variant,
)
from sensilora.targets import Targets, find_targets, fingerprint, model_id, stacked_experts, unwrapped

# By name: the class, and which of `calibrate`'s arguments it takes.
_ESTIMATORS: dict[str, tuple[type[Estimator], tuple[str, ...]]] = {
    "activation": (ActivationEstimator, ("variant", "block_size", "damping")),
    "fisher": (FisherEstimator, ("mode", "labels", "draws", "seed", "loss_fn", "shift_labels")),
}
ESTIMATORS = tuple(_ESTIMATORS)
LABELS = ("data", "model")
VARIANTS = ("diagonal", "inverse")


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    estimator: EstimatorName = "activation",
    targets: Targets = "all-linear",
    experts: bool = False,
    min_expert_tokens: int = 32,
    variant: Variant = "diagonal",
    block_size: int = 128,
    damping: float = 0.01,
    mode: Mode = "per_sequence",
    labels: LabelSource = "data",
    draws: int = 1,
    seed: int = 0,
    k: float = 0.5,
    alpha: float = 0.85,
    loss_fn: LossFunction | None = None,
    shift_labels: bool | None = None,
    head_warmup_steps: int = 0,
    progress: bool = True,
) -> SensitivityReport:
    """Measure how sensitive the loss is to each weight matrix, before fine-tuning.

    The diagonal of a Hessian surrogate is accumulated for each matrix and reduced to trace, top-k mean and effective
    rank (Sensitivity-LoRA, Zhang et al. 2025, arXiv 2509.09119, eqs. 8 to 10).

    - "activation": diag(Σ_t x_t x_tᵀ) / tokens, in_features values, by forward passes alone (section 4.6). Needs no
      labels; matrices that read the same input get the same numbers. With ``variant="inverse"`` (appendix E) the
      values are 1 / diag((H + δI)⁻¹) of H = Σ_t x_t x_tᵀ / tokens, what is left of each input's mean square when the
      other inputs of its block of features have explained what they can.
    - "fisher": the squared gradient of each sequence's own summed loss, averaged over sequences, out · in values.
      "per_sequence" squares after the sum over positions, (1/N) Σ_n (G_nᵀX_n)²; "per_position" before it,
      (1/N) Σ_n (G_n∘G_n)ᵀ(X_n∘X_n), where each call of a module is a position of its own. "per_loss_term" squares the
      gradient of each label's term of the loss, (1/N) Σ_n Σ_t (∂ℓ_{n,t}/∂W)² (curvlinops' convention), with a
      backward pass for each label of the batch's longest sequence: for a language model up to T times the cost.
      Where a sequence has one label (classification, regression) it equals "per_sequence".

    Padding (``attention_mask`` 0) never counts; nor do labels of -100 with Fisher ("activation" reads no labels, so a
    prompt token whose label is ignored is still an input). A model under torch.compile or DistributedDataParallel is
    measured as the model inside. The model runs in eval mode. Its training mode,
    requires_grad, gradients, forwards, hooks and the random number generators are afterwards as they were, also after
    an exception. All weights may be frozen; gradient checkpointing may be on; modules may run more than once and
    share weights (a shared weight is one matrix, its calls' gradients added before they are squared).

    Args:
        model: any module whose forward takes the batch's entries as keyword arguments.
        batches: dicts of tensors as a tokenizer or collator makes them, any iterable or DataLoader. Labels under
            "labels" or "label"; they are not passed to the model, unless an encoder-decoder makes its decoder's
            inputs from them.
        estimator: "activation" or "fisher".
        targets: which modules, see `sensilora.targets.find_targets`.
        experts: measure also the experts of a mixture that are stacked in one parameter (experts, ., .), each as a
            matrix of its own, named by the parameter and the expert ("model.layers.0.mlp.experts.down_proj.3").
            transformers' experts meanwhile run one by one (``experts_implementation="eager"``). Not for "hutchinson".
            `allocate` gives such matrices no rank, for `inject` has no module to adapt. Experts that are linear
            modules are `targets`.
        min_expert_tokens: an expert that saw fewer tokens gets the mean of the trace, top-k mean and effective rank
            of the experts beside it in the same parameter; the report says so (``from_siblings``). With 32 the
            standard error of a mean square of normal numbers is 25%.
        variant: of "activation": "diagonal" or "inverse", which keeps 8 · in_features · block_size bytes a matrix.
        block_size: of "inverse": features a block; the last block may be smaller.
        damping: of "inverse", in (0, 1]: δ as a fraction of the mean of a block's diagonal over its inputs that are
            not always 0 (GPTQ's ``percdamp``). Where a Cholesky factorisation fails, 10 times as much, up to 1; the
            report says what each matrix took.
        mode: how Fisher squares.
        labels: Fisher's labels: "data" (empirical Fisher) or "model" (sampled from the model's own distribution; in
            expectation the Gauss-Newton diagonal). Without labels in the batch, all that is not padding counts.
        draws: label samples a sequence; one backward pass each.
        seed: of the label samples.
        k: fraction of the diagonal that the top-k mean covers, in (0, 1].
        alpha: share of the trace that the effective rank must reach, in (0, 1].
        loss_fn: ``loss_fn(outputs, batch)``, for a model without logits or with a loss of its own: the scalar loss
            *summed* over the batch's sequences. The batch is on the model's device and has its labels.
        shift_labels: whether logits at a position are for the next position's label; None: true for causal language
            models by their class name (transformers' names).
        head_warmup_steps: Fisher only: first train the classification head alone for so many batches (needs labels;
            a one-shot iterable is kept in memory), and give it its weights back afterwards.
        progress: show a progress bar (main process only).

    Returns:
        `SensitivityReport`, in module order.

    Raises:
        TargetError: no module matches `targets`, some matched module never ran, or `experts` is true and there are
            none in stacks.
        CalibrationError: an argument is invalid; the data is empty, not of dicts, or without the labels it needs; all
            labels are ignored; a module's rows cannot be attributed to sequences; or no expert of a stack saw
            `min_expert_tokens` tokens.
        NonFiniteError: a NaN or Inf was met; the message names the parameter or module.

    Warns:
        UserWarning: Fisher on a classification head that looks newly initialised, without `head_warmup_steps`; or
            `targets` is "all-linear" and the model has experts that are no linear modules, and so are left out; or
            experts saw too few tokens.
    """
    # What the numbers depend on, besides the model and the data.
    arguments: dict[str, Any] = {
        "variant": variant,
        "block_size": block_size,
        "damping": damping,
        "mode": mode,
        "labels": labels,
        "draws": draws,
        "seed": seed,
        "k": k,
        "alpha": alpha,
        "loss_fn": loss_fn,
        "shift_labels": shift_labels,
        "head_warmup_steps": head_warmup_steps,
    }
    _check_arguments(estimator, mode, labels, draws, k, alpha, loss_fn, head_warmup_steps)
    _check_variant(estimator, variant, block_size, damping)
    model = unwrapped(model)
    modules = find_targets(model, targets)
    matrices = group_tied(modules)
    if min_expert_tokens < 1:
        raise CalibrationError(f"min_expert_tokens must be at least 1, not {min_expert_tokens}")
    holders = find_expert_stacks(model) if experts else {}
    stacks = [stack for held in holders.values() for stack in held]
    for stack in stacks:
        matrices.update((f"{stack.name}.{expert}", matrix) for expert, matrix in enumerate(stack.matrices))
    if targets == "all-linear" and not experts:
        _warn_of_experts(model)
    _check_parameters(model)
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"batches is a {type(batches).__name__}; give an iterable of batches, for example [batch] or a DataLoader"
        )
    if head_warmup_steps and isinstance(batches, Iterator):
        batches = list(batches)
    if estimator != "activation":
        _warn_of_untrained_head(model, head_warmup_steps)
    kind, options = _ESTIMATORS[estimator]
    observer = kind(model, modules, matrices, **{name: arguments[name] for name in options})
    warmed = warmed_head(
        model,
        batches,
        head_warmup_steps,
        modules=modules,
        loss_fn=loss_fn,
        shift_labels=shift_labels,
        progress=progress,
    )
    with frozen(model), warmed:
        with (
            wrapped_forwards(modules, observer.wrap),
            _watched_experts(model, observer, holders),
            progress_bar(batches, f"calibrating ({estimator})", show=progress) as bar,
        ):
            for raw in bar:
                observer.observe(Batch(raw, model))
        _check_coverage(observer, {name: matrices[name] for name in modules})
        # An expert that no token reached has no diagonal.
        ran = [matrix for matrix in _distinct(matrices) if matrix.calls]
        measured = {matrix.name: _measure(observer, matrix, k, alpha) for matrix in ran}
    of_experts = with_siblings(stacks, measured, min_expert_tokens)
    measured = {name: found for name, found in measured.items() if name in modules} | of_experts
    return SensitivityReport(
        estimator=estimator,
        variant=variant,
        block_size=block_size if variant == "inverse" else None,
        damping=damping if variant == "inverse" else None,
        mode=mode if estimator == "fisher" else None,
        labels=labels if estimator == "fisher" else None,
        draws=draws if estimator == "fisher" else 1,
        seed=seed,
        tokens=observer.tokens,
        sequences=observer.sequences,
        min_expert_tokens=min_expert_tokens if experts else None,
        k=k,
        alpha=alpha,
        model_id=model_id(model),
        fingerprint=fingerprint(model),
        versions=_versions(),
        matrices=measured,
    )


def _check_arguments(
    estimator: str,
    mode: str,
    labels: str,
    draws: int,
    k: float,
    alpha: float,
    loss_fn: LossFunction | None,
    head_warmup_steps: int,
) -> None:
    if estimator == "hutchinson":
        raise CalibrationError("the estimator 'hutchinson' is not available in this version; use 'fisher'")
    for name, value, choices in (
        ("estimator", estimator, ESTIMATORS),
        ("mode", mode, MODES),
        ("labels", labels, LABELS),
    ):
        if value not in choices:
            raise CalibrationError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")
    for name, fraction in (("k", k), ("alpha", alpha)):
        if not 0 < fraction <= 1:
            raise CalibrationError(f"{name} must be in (0, 1], not {fraction}")
    if draws < 1 or (draws > 1 and labels == "data"):
        raise CalibrationError(f"draws={draws}: it must be 1, or at least 1 with labels='model'")
    if loss_fn is not None and labels == "model":
        raise CalibrationError("labels='model' samples from the logits, so it cannot be combined with loss_fn")
    if loss_fn is not None and mode == "per_loss_term":
        raise CalibrationError(
            "mode='per_loss_term' divides the loss by its labels, so it cannot be combined with loss_fn"
        )
    if estimator == "activation" and (labels != "data" or loss_fn is not None):
        raise CalibrationError("the activation estimator reads no labels and no loss; leave labels and loss_fn out")
    if head_warmup_steps < 0 or (head_warmup_steps and estimator != "fisher"):
        raise CalibrationError(f"head_warmup_steps={head_warmup_steps}: it must be 0, or positive with 'fisher'")


def _check_variant(estimator: str, variant: str, block_size: int, damping: float) -> None:
    if variant not in VARIANTS:
        raise CalibrationError(f"variant {variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    if variant != "diagonal" and estimator != "activation":
        raise CalibrationError(f"variant={variant!r} is for 'activation' only; leave it out with {estimator!r}")
    if block_size < 1:
        raise CalibrationError(f"block_size must be at least 1, not {block_size}")
    if not 0 < damping <= MAX_DAMPING:
        raise CalibrationError(f"damping must be in (0, {MAX_DAMPING:g}], not {damping}")


def _check_parameters(model: nn.Module) -> None:
    """Found here, a NaN costs one read of the weights; found in a batch, it could hide behind the last target."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"the parameter {name!r} holds NaN or Inf; the checkpoint is damaged or diverged")


def _warn_of_experts(model: nn.Module) -> None:
    experts = stacked_experts(model)
    if experts:
        warnings.warn(
            f"{len(experts)} parameters stack the weights of experts ({experts[0]}, ...), which are no linear "
            "modules: they get no adapter, and are measured only with experts=True",
            UserWarning,
            stacklevel=3,
        )


def _watched_experts(
    model: nn.Module, observer: Estimator, holders: Mapping[str, list[ExpertStack]]
) -> contextlib.AbstractContextManager[None]:
    if not holders:
        return contextlib.nullcontext()
    if not isinstance(observer, Observer):
        raise CalibrationError(
            "experts=True is for the estimators 'activation' and 'fisher'; leave it out, or choose one of these"
        )
    return followed_experts(model, observer, holders)


def _warn_of_untrained_head(model: nn.Module, head_warmup_steps: int) -> None:
    heads = [] if head_warmup_steps else untrained_heads(model)
    if heads:
        warnings.warn(
            f"the head {' and '.join(map(repr, heads))} looks newly initialised, and gradients that come through it "
            "say nothing about the task; pass head_warmup_steps (for example 100) to train it first, for calibration "
            "only",
            UserWarning,
            stacklevel=3,
        )


def _distinct(matrices: Mapping[str, Matrix]) -> list[Matrix]:
    return [matrix for name, matrix in matrices.items() if name == matrix.name]


def _check_coverage(observer: Estimator, matrices: Mapping[str, Matrix]) -> None:
    """The data had sequences and tokens that count, and every matrix ran."""
    if not observer.batches:
        raise CalibrationError("the calibration data is empty; give at least one batch")
    if not observer.tokens:
        raise CalibrationError("the attention_mask of every calibration batch is 0 everywhere; no token counts")
    if not observer.sequences:
        raise CalibrationError(
            "every label of the calibration data is ignored (-100, or padding by the attention_mask); "
            "no sequence counts"
        )
    unseen = [matrix.name for matrix in _distinct(matrices) if not matrix.calls]
    if unseen:
        raise TargetError(
            f"{len(unseen)} target modules never ran in any batch ({', '.join(unseen[:5])}"
            f"{', ...' if len(unseen) > 5 else ''}); leave them out of targets, or give data that reaches them"
        )


def _measure(observer: Estimator, matrix: Matrix, k: float, alpha: float) -> MatrixSensitivity:
    diagonal = observer.diagonal(matrix)
    matrix.diagonal = None
    if not bool(diagonal.isfinite().all()):
        raise NonFiniteError(
            f"the gradients of module {matrix.name!r} overflowed to Inf or NaN though the loss is finite; "
            "calibrate in bfloat16 or float32"
        )
    metrics = ops.diagonal_metrics(diagonal, k=k, alpha=alpha)
    return MatrixSensitivity(
        shape=matrix.shape,
        trace=float(metrics.trace),
        topk_mean=float(metrics.topk_mean),
        effective_rank=int(metrics.effective_rank),
        tokens=matrix.tokens,
        calls=matrix.calls,
        aliases=tuple(matrix.modules[1:]),
        damping=matrix.damping,
        attempts=matrix.attempts,
    )


def _versions() -> dict[str, str]:
    versions = {
        "sensilora": sensilora.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    if "transformers" in sys.modules:
        versions["transformers"] = sys.modules["transformers"].__version__
    return versions
