"""The calibration driver: batches through a model, sensitivities of its weight matrices out."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sensilora
from sensilora import ops
from sensilora.errors import CalibrationError, NonFiniteError
from sensilora.ops.fisher_diag import MODES
from sensilora.sensitivity.activation import MAX_DAMPING, ActivationEstimator
from sensilora.sensitivity.batches import announce
from sensilora.sensitivity.capture import Matrix, frozen, group_tied, wrapped_forwards
from sensilora.sensitivity.checkpoint import Checkpoint, identity
from sensilora.sensitivity.diagonals import DiagonalWriter
from sensilora.sensitivity.estimator import Estimator
from sensilora.sensitivity.experts import ExpertStack, Observer, find_expert_stacks, followed_experts, with_siblings
from sensilora.sensitivity.fisher import FisherEstimator, LossFunction
from sensilora.sensitivity.head import head_parameters, untrained_heads, warmed_head
from sensilora.sensitivity.hutchinson import HutchinsonEstimator
from sensilora.sensitivity.report import (
    EstimatorName,
    HessianProduct,
    LabelSource,
    MatrixSensitivity,
    Mode,
    SensitivityReport,
    Variant,
)
from sensilora.sensitivity.sweep import Sweep, describe_passes, of_head, parse_bytes, plan_passes
from sensilora.targets import (
    Targets,
    find_targets,
    fingerprint,
    first_non_finite,
    model_id,
    other_experts,
    stacked_experts,
    unwrapped,
)

# By name: the class, and which of `calibrate`'s arguments it takes.
_ESTIMATORS: dict[str, tuple[type[Estimator], tuple[str, ...]]] = {
    "activation": (ActivationEstimator, ("variant", "block_size", "damping")),
    "fisher": (FisherEstimator, ("mode", "labels", "draws", "seed", "loss_fn", "shift_labels")),
    "hutchinson": (
        HutchinsonEstimator,
        ("probes", "min_probes", "tolerance", "hvp", "seed", "k", "alpha", "loss_fn", "shift_labels"),
    ),
}
ESTIMATORS = tuple(_ESTIMATORS)
LABELS = ("data", "model")
VARIANTS = ("diagonal", "inverse")
HESSIAN_PRODUCTS = ("double_backward", "central_differences")


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
    probes: int = 64,
    min_probes: int = 8,
    tolerance: float = 0.05,
    hvp: HessianProduct = "double_backward",
    seed: int = 0,
    k: float = 0.5,
    alpha: float = 0.85,
    loss_fn: LossFunction | None = None,
    shift_labels: bool | None = None,
    head_warmup_steps: int = 0,
    memory_budget: str | int | None = None,
    keep_diagonals: bool | str | os.PathLike[str] = False,
    max_shard_size: str | int = "5GB",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
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
    - "hutchinson": the diagonal of the loss's true Hessian, (1/N) Σ_n ∇²L_n, as the mean of z ⊙ Hz over random signs
      z, drawn for one matrix at a time; out · in values. Negative values of the mean are set to 0, and the report
      says how much that was, what the probes' noise is, and what half of them would give. A matrix's cost: for every
      `min_probes` probes and batch a forward and a backward pass, and a product with the Hessian (about two backward
      passes) for each probe and batch. The batches are kept on the model's device.

    Padding (``attention_mask`` 0) never counts; nor do integer labels of -100 ("activation" reads no labels, so
    there a prompt token whose label is ignored is still an input). A model under torch.compile or
    DistributedDataParallel is measured as the model inside. The model runs in eval mode. Its training mode,
    requires_grad, gradients, forwards, hooks and the random number generators are afterwards as they were, also after
    an exception. All weights may be frozen. Gradient checkpointing may be on; with "fisher" transformers' layers then
    save memory as in training, if it is not reentrant and they drop nothing themselves. Modules may run more than
    once and share weights (a shared weight is one matrix, its calls' gradients added before they are squared; with
    "fisher" all that share it must be targets).

    Args:
        model: any module whose forward takes the batch's entries as keyword arguments.
        batches: dicts of tensors as a tokenizer or collator makes them, any iterable or DataLoader. Labels under
            "labels" or "label"; they are not passed to the model, unless an encoder-decoder makes its decoder's
            inputs from them.
        estimator: "activation", "fisher" or "hutchinson".
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
        probes: "hutchinson": the most probes a matrix takes.
        min_probes: the least, at least 2; they are also how many more are taken before the error is looked at again.
        tolerance: the standard error of a matrix's trace, as a fraction of the trace, at which no more are taken.
        hvp: how products with the Hessian are taken. "double_backward" is exact; torch's scaled dot-product
            attention then takes its math backend, as the fused ones have no second derivative. "central_differences"
            of the gradients at W ± εz take two forward and backward passes a probe, any operation, and err by about
            5e-5 with fp32 weights, some percent with bf16. Gradient checkpointing must not be reentrant with either.
        seed: of the label samples and the probes.
        k: fraction of the diagonal that the top-k mean covers, in (0, 1].
        alpha: share of the trace that the effective rank must reach, in (0, 1].
        loss_fn: ``loss_fn(outputs, batch)``, for a model without logits or with a loss of its own: the scalar loss
            *summed* over the batch's sequences. The batch is on the model's device and has its labels.
        shift_labels: whether logits at a position are for the next position's label; None: true for causal language
            models by their class name (transformers' names).
        head_warmup_steps: not for "activation": first train the classification head alone for so many batches (needs
            labels; a one-shot iterable is kept in memory), and give it its weights back afterwards.
        memory_budget: for the running sums of the diagonals, which for "fisher" are out · in fp32 numbers a matrix:
            bytes, or for example "24GB" or "24GiB". Matrices that do not fit together are measured in several passes
            over `batches`, which must then be the same each time; how many, and the memory of each, is shown before
            the first and is in the report. The numbers are those of one pass, bit for bit where the model's own
            passes are repeatable (on CUDA, `torch.use_deterministic_algorithms`). Besides the sums there are
            the model, its activations, and the working memory of one matrix. The sums of a single batch that takes
            one backward pass (`draws` is 1) exist one at a time, so that it takes one pass.
        keep_diagonals: write the diagonals too, in fp32, as safetensors files in this folder (True: "diagonals" in
            the working folder) with an index, each as soon as it is finished; `Diagonals` reads them. No more than
            one file's worth is in memory.
        max_shard_size: of a file of diagonals.
        checkpoint: a folder for the state, so that a run that was interrupted or killed goes on from there when it is
            repeated with the same arguments, model and data, to the same numbers, as above. Batches that are in the
            sums already are read, to know them again, and not run. Removed at the end. "hutchinson" goes on from the
            last matrix that was finished.
        checkpoint_every: batches between two states. Each takes as much room as the sums. Ctrl-C finishes the batch
            at hand and saves one; a second Ctrl-C does not wait.
        progress: show a progress bar (main process only).

    Returns:
        `SensitivityReport`, in module order.

    Raises:
        TargetError: no module matches `targets`, some matched module never ran, or `experts` is true and there are
            none in stacks.
        CalibrationError: an argument is invalid; the data is empty, not of dicts, or without the labels it needs; all
            labels are ignored; a module's rows cannot be attributed to sequences; no expert of a stack saw
            `min_expert_tokens` tokens; a matrix alone is above `memory_budget`, or `batches` can be read only once
            and would have to be read again; or `checkpoint` is damaged, or of other arguments, model or data.
        OutputExistsError: the folder for the diagonals is not empty.
        NonFiniteError: a NaN or Inf was met; the message names the parameter or module.

    Warns:
        UserWarning: Fisher on a classification head that looks newly initialised, without `head_warmup_steps`; or
            `targets` is "all-linear" and the model has experts that are no linear modules, and so are left out; or
            experts saw too few tokens.
    """
    block_size, draws = _whole("block_size", block_size), _whole("draws", draws)
    probes, min_probes, seed = _whole("probes", probes), _whole("min_probes", min_probes), _whole("seed", seed)
    head_warmup_steps = _whole("head_warmup_steps", head_warmup_steps)
    min_expert_tokens = _whole("min_expert_tokens", min_expert_tokens)
    checkpoint_every = _whole("checkpoint_every", checkpoint_every)
    damping, tolerance = _number("damping", damping), _number("tolerance", tolerance)
    k, alpha = _number("k", k), _number("alpha", alpha)
    # What the numbers depend on, besides the model and the data.
    arguments: dict[str, Any] = {
        "variant": variant,
        "block_size": block_size,
        "damping": damping,
        "mode": mode,
        "labels": labels,
        "draws": draws,
        "probes": probes,
        "min_probes": min_probes,
        "tolerance": tolerance,
        "hvp": hvp,
        "seed": seed,
        "k": k,
        "alpha": alpha,
        "loss_fn": loss_fn,
        "shift_labels": shift_labels,
        "head_warmup_steps": head_warmup_steps,
    }
    _check_arguments(estimator, mode, labels, draws, k, alpha, loss_fn, head_warmup_steps)
    _check_variant(estimator, variant, block_size, damping)
    _check_probes(probes, min_probes, tolerance, hvp)
    if not -(2**63) <= seed < 2**64:
        raise CalibrationError(f"seed must be from -2**63 to 2**64 - 1, not {seed}")
    model = unwrapped(model)
    modules = find_targets(model, targets)
    matrices = group_tied(modules)
    if estimator == "fisher":
        _check_ties(model, modules)
    computed = [name for name, module in modules.items() if "weight" not in module._parameters]
    if estimator == "hutchinson" and computed:
        raise CalibrationError(
            f"the weight of {computed[0]!r} is computed by a parametrisation, so it cannot be probed; leave it out "
            "of targets, or choose 'fisher' or 'activation'"
        )
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
    budget = None if memory_budget is None else parse_bytes("memory_budget", memory_budget)
    shard_bytes = parse_bytes("max_shard_size", max_shard_size)
    if checkpoint_every < 1:
        raise CalibrationError(f"checkpoint_every must be at least 1, not {checkpoint_every}")
    if head_warmup_steps and isinstance(batches, Iterator):
        batches = list(batches)
    if estimator != "activation":
        _warn_of_untrained_head(model, head_warmup_steps)
    kind, options = _ESTIMATORS[estimator]
    observer = kind(model, modules, matrices, **{name: arguments[name] for name in options})
    watched_experts = _watched_experts(model, observer, holders)
    passes = plan_passes(_distinct(matrices), observer, batches, budget)
    if budget is not None:
        announce(describe_passes(passes, budget), show=progress)
    folder = Path("diagonals") if keep_diagonals is True else Path(keep_diagonals) if keep_diagonals else None
    if folder is not None and checkpoint is not None:
        _check_folders(folder, Path(checkpoint))
    state, saved = None, None
    if checkpoint is not None:
        arguments |= {"estimator": estimator, "memory_budget": budget, "keep_diagonals": folder and folder.resolve()}
        arguments["targets"] = [matrix.name for matrix in _distinct(matrices)]
        state = Checkpoint(checkpoint, checkpoint_every, identity(model, arguments))
        saved = state.read()
    writer = None
    if folder is not None:
        writer = DiagonalWriter(folder, shard_bytes, None if saved is None else saved[0].get("diagonals"))
    warmed = warmed_head(
        model,
        batches,
        head_warmup_steps,
        modules=modules,
        loss_fn=loss_fn,
        shift_labels=shift_labels,
        progress=progress,
        trained=None if saved is None else of_head(saved[1]),
    )
    watched = wrapped_forwards(modules, observer.wrap)
    with contextlib.ExitStack() as undo:
        if writer is not None and state is None:
            undo.callback(writer.discard)
        with frozen(model, checkpointing=estimator == "fisher"), warmed, watched, watched_experts:
            sweep = Sweep(
                model,
                observer,
                batches,
                passes,
                measure=partial(_measure, observer, k=k, alpha=alpha, writer=writer),
                text=f"calibrating ({estimator})",
                progress=progress,
                checkpoint=state,
                writer=writer,
                head=head_parameters(model) if head_warmup_steps else {},
            )
            if state is not None and saved is not None:
                with state.reading():
                    sweep.restore(*saved)
            sweep.run()
        measured = {matrix.name: sweep.measured[matrix.name] for matrix in _distinct(matrices) if matrix.calls}
        of_experts = with_siblings(stacks, measured, min_expert_tokens)
        measured = {name: found for name, found in measured.items() if name in modules} | of_experts
        report = SensitivityReport(
            estimator=estimator,
            variant=variant,
            block_size=block_size if variant == "inverse" else None,
            damping=damping if variant == "inverse" else None,
            mode=mode if estimator == "fisher" else None,
            labels=labels if estimator == "fisher" else None,
            draws=draws if estimator == "fisher" else 1,
            hvp=hvp if estimator == "hutchinson" else None,
            probes=probes if estimator == "hutchinson" else None,
            min_probes=min_probes if estimator == "hutchinson" else None,
            tolerance=tolerance if estimator == "hutchinson" else None,
            seed=seed,
            tokens=observer.tokens,
            sequences=observer.sequences,
            min_expert_tokens=min_expert_tokens if experts else None,
            passes=tuple(one.bytes for one in passes),
            k=k,
            alpha=alpha,
            model_id=model_id(model),
            fingerprint=fingerprint(model),
            versions=_versions(),
            matrices=measured,
        )
        if writer is not None:
            writer.close(report)
        undo.pop_all()
    if state is not None:
        state.remove()
    return report


def _whole(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise CalibrationError(f"{name} must be a whole number, not {value!r}") from error


def _number(name: str, value: float) -> float:
    # numpy's and 0-dimensional tensors are numbers too.
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise CalibrationError(f"{name} must be a number, not {value!r}")
    return float(value)


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
    if estimator == "hutchinson" and labels != "data":
        raise CalibrationError("the Hessian is of the loss on the data's labels; use 'fisher' for labels='model'")
    if head_warmup_steps < 0 or (head_warmup_steps and estimator == "activation"):
        raise CalibrationError(
            f"head_warmup_steps={head_warmup_steps}: it must be 0, or positive with 'fisher' or 'hutchinson'"
        )


def _check_variant(estimator: str, variant: str, block_size: int, damping: float) -> None:
    if variant not in VARIANTS:
        raise CalibrationError(f"variant {variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    if variant != "diagonal" and estimator != "activation":
        raise CalibrationError(f"variant={variant!r} is for 'activation' only; leave it out with {estimator!r}")
    if block_size < 1:
        raise CalibrationError(f"block_size must be at least 1, not {block_size}")
    if not 0 < damping <= MAX_DAMPING:
        raise CalibrationError(f"damping must be in (0, {MAX_DAMPING:g}], not {damping}")


def _check_probes(probes: int, min_probes: int, tolerance: float, hvp: str) -> None:
    if not 2 <= min_probes <= probes:
        raise CalibrationError(f"min_probes={min_probes}: it must be at least 2 and at most probes={probes}")
    if not 0 <= tolerance < math.inf:
        raise CalibrationError(f"tolerance must be 0 or a positive number, not {tolerance}")
    if hvp not in HESSIAN_PRODUCTS:
        raise CalibrationError(f"hvp {hvp!r} is unknown; choose one of {', '.join(HESSIAN_PRODUCTS)}")


def _check_ties(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """No target's weight is used by a module whose part of its gradient would be missing."""
    owners = {id(module._parameters.get("weight")): name for name, module in modules.items()}
    owners.pop(id(None), None)
    watched = {id(module) for module in modules.values()}
    for name, module in model.named_modules():
        for parameter in () if id(module) in watched else module._parameters.values():
            if id(parameter) in owners:
                target = owners[id(parameter)]
                raise CalibrationError(
                    f"the weight of {target!r} is that of {name!r} ({type(module).__name__}) too, whose part of its "
                    f"gradient 'fisher' does not see; leave {target!r} out of targets, or choose 'hutchinson'"
                )


def _check_folders(diagonals: Path, checkpoint: Path) -> None:
    diagonals, checkpoint = diagonals.resolve(), checkpoint.resolve()
    if diagonals in (checkpoint, *checkpoint.parents):
        raise CalibrationError(
            f"keep_diagonals ({diagonals}) must be a folder that does not hold the checkpoint's ({checkpoint}); name "
            "two folders beside each other"
        )


def _check_parameters(model: nn.Module) -> None:
    """The weights are finite, and ordinary tensors.

    Found here, a NaN costs one read of the weights; found in a batch, it could hide behind the last target.
    """
    made_for_inference = next(
        (name for name, parameter in model.named_parameters() if parameter.is_inference()), None
    )
    if made_for_inference is not None:
        raise CalibrationError(
            f"the parameter {made_for_inference!r} was made under torch.inference_mode and cannot be differentiated; "
            "load the model outside of it"
        )
    name = first_non_finite(model.named_parameters())
    if name is not None:
        raise NonFiniteError(f"the parameter {name!r} holds NaN or Inf; the checkpoint is damaged or diverged")


def _warn_of_experts(model: nn.Module) -> None:
    unknown = other_experts(model)
    if unknown:
        warnings.warn(
            f"{len(unknown)} weights of experts ({unknown[0]}, ...) are held in a form that is not known here: they "
            "are not measured and get no adapter",
            UserWarning,
            stacklevel=3,
        )
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


def _measure(
    observer: Estimator, matrices: Sequence[Matrix], *, k: float, alpha: float, writer: DiagonalWriter | None
) -> list[MatrixSensitivity]:
    """Reduce the finished diagonals of matrices to their numbers, and let go of them."""
    diagonals = [observer.diagonal(matrix) for matrix in matrices]
    # Those of one kind go through the op together, which waits for the device once.
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, diagonal in enumerate(diagonals):
        kinds.setdefault((diagonal.dtype, diagonal.device), []).append(place)
    found: dict[int, tuple[float, float, int]] = {}
    for places in kinds.values():
        try:
            metrics = ops.diagonal_metrics_batch([diagonals[place] for place in places], k=k, alpha=alpha)
        except NonFiniteError as error:
            first = next(place for place in places if not bool(diagonals[place].isfinite().all()))
            raise NonFiniteError(
                f"the gradients of module {matrices[first].name!r} overflowed to Inf or NaN though the loss is "
                "finite; calibrate in bfloat16 or float32"
            ) from error
        found.update(zip(places, zip(*(values.tolist() for values in metrics), strict=True), strict=True))
    measured = []
    for place, matrix in enumerate(matrices):
        matrix.diagonal = None
        if writer is not None:
            writer.add(matrix.name, diagonals[place])
        trace, topk_mean, effective_rank = found[place]
        measured.append(
            MatrixSensitivity(
                shape=matrix.shape,
                trace=trace,
                topk_mean=topk_mean,
                effective_rank=effective_rank,
                tokens=matrix.tokens,
                calls=matrix.calls,
                aliases=tuple(matrix.modules[1:]),
                damping=matrix.damping,
                attempts=matrix.attempts,
                probes=matrix.probes,
            )
        )
    return measured


def _versions() -> dict[str, str]:
    versions = {
        "sensilora": sensilora.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    if "transformers" in sys.modules:
        versions["transformers"] = sys.modules["transformers"].__version__
    return versions
