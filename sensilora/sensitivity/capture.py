"""Watching a model's weight matrices run, and leaving the model as it was found."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sensilora.errors import CalibrationError, NonFiniteError
from sensilora.sensitivity.batches import Batch, Rows
from sensilora.sensitivity.report import ProbeStatistics
from sensilora.targets import first_non_finite_parameter, matrix_shape

Forward = Callable[..., Any]


@dataclass
class Matrix:
    """One weight matrix and what has been measured of it. Modules that share (tie) the weight share the `Matrix`.

    Attributes:
        modules: names of the modules that hold the weight, in module order.
        shape: (out_features, in_features).
        diagonal: running sum; None until the matrix has run.
        tokens: counted rows so far, over all calls.
        calls: forward calls so far.
        active: whether this pass over the data measures it.
        dtype: of the diagonal that comes out, where that is not the running sum's.
        damping, attempts: what the inverse of its blocks took; None where none was made.
        probes: what Hutchinson's probes told of themselves; None where none were taken.
    """

    modules: list[str]
    shape: tuple[int, int]
    diagonal: Tensor | None = None
    tokens: int = 0
    calls: int = 0
    active: bool = True
    dtype: torch.dtype | None = None
    damping: float | None = None
    attempts: int | None = None
    probes: ProbeStatistics | None = None

    @property
    def name(self) -> str:
        return self.modules[0]

    def sum_on(self, device: torch.device) -> Tensor | None:
        """The running sum, brought to `device` from where a checkpoint's was read; None until the matrix has run."""
        if self.diagonal is not None and self.diagonal.device != device:
            self.diagonal = self.diagonal.to(device)
        return self.diagonal


def group_tied(modules: Mapping[str, nn.Module]) -> dict[str, Matrix]:
    """The `Matrix` of each module, by name; one for all modules whose weight is the same Parameter."""
    by_weight: dict[int, Matrix] = {}
    by_name = {}
    for name, module in modules.items():
        # A parametrised weight is computed anew at each access, so it has no identity to compare.
        owner = module._parameters.get("weight") if "weight" in module._parameters else module
        matrix = by_weight.setdefault(id(owner), Matrix([], matrix_shape(module)))
        matrix.modules.append(name)
        by_name[name] = matrix
    return by_name


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """transformers' layers whose gradient checkpointing is on, and that do nothing else in training mode.

    Not those that ask for their mode themselves, as where they drop something.
    """
    found = []
    for module in model.modules():
        if "GradientCheckpointingLayer" not in (kind.__name__ for kind in type(module).__mro__):
            continue
        # A functools.partial of torch's checkpoint.
        options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if not module.gradient_checkpointing or options.get("use_reentrant", True):
            continue
        kinds = type(module).__mro__
        # Those above it are torch's own.
        above = next(i for i, kind in enumerate(kinds) if kind.__name__ == "GradientCheckpointingLayer")
        try:
            sources = [inspect.getsource(kind) for kind in kinds[:above]]
        except (OSError, TypeError):  # there is none to look into
            continue
        if not any("self.training" in source for source in sources):
            found.append(module)
    return found


@contextlib.contextmanager
def frozen(model: nn.Module, *, checkpointing: bool = False) -> Iterator[None]:
    """The model in eval mode with no parameter requiring a gradient; afterwards all as it was, also the RNGs.

    Without a parameter to differentiate, a backward pass computes no weight gradient and touches no ``.grad``.

    Args:
        checkpointing: whether the model's gradient checkpointing, if on, stays at work where it can.
    """
    training = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    devices = {parameter.device.index for parameter, _ in parameters if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.inference_mode(False):
        try:
            for module, _ in training:
                # Not train(False): a subclass may have that merge weights.
                module.training = False
            for module in checkpointed_layers(model) if checkpointing else ():
                module.training = True
            for parameter, _ in parameters:
                parameter.requires_grad_(False)
            # The fused encoder layer of torch.nn reads weights without calling the modules that hold them.
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for parameter, flag in parameters:
                parameter.requires_grad_(flag)
            for module, mode in training:
                module.training = mode


@contextlib.contextmanager
def wrapped_forwards(
    modules: Mapping[str, nn.Module], wrap: Callable[[str, nn.Module, Forward], Forward]
) -> Iterator[None]:
    """Replace each module's ``forward`` by ``wrap(name, module, forward)`` for the length of the block.

    An instance attribute, not a hook: it is there exactly once and leaves the module's hook tables alone.
    """
    previous = [(module, module.__dict__.get("forward")) for module in modules.values()]
    try:
        for name, module in modules.items():
            module.forward = wrap(name, module, module.forward)
        yield
    finally:
        for module, forward in previous:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a linear module, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def rows_of(batch: Batch, name: str, x: Tensor) -> Rows:
    """`Batch.rows` of a module's input.

    Raises:
        CalibrationError: the rows cannot be attributed to the batch's sequences.
    """
    rows = batch.rows(name, x.shape[:-1])
    if rows is None:
        raise CalibrationError(
            f"the rows of module {name!r}, whose input has shape {tuple(x.shape)}, cannot be attributed to the "
            f"{batch.size} sequences of the batch; use batches of one sequence without padding, or leave the module "
            "out of targets"
        )
    return rows


def raise_non_finite(model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch, what: str) -> None:
    """Run the batch once more to find where `what` became NaN or Inf, and raise.

    Raises:
        NonFiniteError: always; it names the first parameter, else batch entry, else module in order of execution.
    """
    parameter = first_non_finite_parameter(model)
    if parameter is not None:
        raise NonFiniteError(f"{what} is NaN or Inf because the parameter {parameter!r} holds NaN or Inf")
    for key, value in batch.inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
            raise NonFiniteError(f"{what} is NaN or Inf because the batch entry {key!r} holds NaN")
    found: list[str] = []

    def watch(name: str, module: nn.Module, forward: Forward) -> Forward:
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            output = forward(*args, **kwargs)
            for side, tensor in (("input", first_argument(args, kwargs)), ("output", output)):
                rows = batch.rows(name, tensor.shape[:-1])
                counted = tensor if rows is None else rows.pack(tensor)
                if not found and not bool(counted.isfinite().all()):
                    found.append(f"the {side} of module {name!r}")
            return output

        return watched

    with wrapped_forwards(modules, watch), torch.no_grad():
        model(**batch.inputs)
    if found:
        raise NonFiniteError(f"{what} is NaN or Inf: {found[0]} is the first to hold NaN or Inf")
    raise NonFiniteError(
        f"{what} is NaN or Inf though every parameter and every target module's output is finite; "
        "check the labels, and the layers between the targets and the loss"
    )
