"""Experts held as one parameter (experts, ., .): telling whose slice a product reads, and whose rows it takes.

No module stands for such a matrix, so the forward of the module that holds the parameter is followed function by
function: which rows an expert takes is known from the indexing of the module's input, and which expert it is from
where its slice lies in memory.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sensilora.errors import CalibrationError, TargetError
from sensilora.sensitivity.batches import Batch, Rows
from sensilora.sensitivity.capture import Forward, Matrix, first_argument, wrapped_forwards
from sensilora.sensitivity.report import MatrixSensitivity
from sensilora.targets import is_expert_stack

# x @ W; the weight is the second argument.
_MATMULS = frozenset({torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})
_SELECTS = frozenset({torch.index_select, Tensor.index_select})


@dataclass
class ExpertStack:
    """One parameter that holds a matrix for each expert, and what has been measured of them.

    Attributes:
        name: the parameter's full name.
        parameter: (experts, ., .).
        matrices: one an expert, named by the parameter and the expert: "model.layers.0.mlp.experts.down_proj.3".
    """

    name: str
    parameter: nn.Parameter
    matrices: list[Matrix]

    def slice_of(self, tensor: Tensor) -> int | None:
        """Which expert's whole matrix `tensor` is, perhaps transposed; -1 for other parts of the stack's memory."""
        parameter = self.parameter
        if tensor.device != parameter.device or tensor.dtype != parameter.dtype:
            return None
        step = parameter.stride(0) * parameter.element_size()
        expert, rest = divmod(tensor.data_ptr() - parameter.data_ptr(), step)
        if not 0 <= expert < len(self.matrices) or not tensor.numel():
            return None
        whole = rest == 0 and tensor.dim() == 2 and tensor.numel() == parameter[0].numel()
        return expert if whole else -1

    def orient(self, shape: tuple[int, ...]) -> None:
        """Give the matrices the shape (out_features, in_features) that a product shows."""
        if shape == self.matrices[0].shape:
            return
        for matrix in self.matrices:
            matrix.shape = (shape[0], shape[1])


@runtime_checkable
class Observer(Protocol):
    """An estimator that can also watch a product without a module of its own."""

    batch: Batch | None

    def rows(self, name: str, x: Tensor) -> Rows: ...

    def watch(self, matrix: Matrix, x: Tensor, rows: Rows, product: Callable[[], Tensor]) -> Tensor: ...


def find_expert_stacks(model: nn.Module) -> dict[str, list[ExpertStack]]:
    """The stacks of experts by the module that holds them, in module order.

    Modules that share (tie) a parameter share its matrices, which then have each other's names as aliases.

    Raises:
        TargetError: the model has none, or one is not of floating-point numbers.
    """
    matrices: dict[int, list[Matrix]] = {}
    found: dict[str, list[ExpertStack]] = {}
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{own_name}"
            if not is_expert_stack(name, parameter):
                continue
            if not parameter.is_floating_point():
                raise TargetError(
                    f"the experts of {name} are packed ({parameter.dtype}); quantised layers are not supported yet"
                )
            experts, rows, columns = parameter.shape
            # As transformers marks those that are used as x @ W; a product will show in any case.
            shape = (columns, rows) if getattr(module, "is_transposed", False) else (rows, columns)
            shared = matrices.setdefault(id(parameter), [Matrix([], shape) for _ in range(experts)])
            for expert, matrix in enumerate(shared):
                matrix.modules.append(f"{name}.{expert}")
            found.setdefault(module_name, []).append(ExpertStack(name, parameter, shared))
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no parameter that stacks experts; leave experts=True out (experts that are "
            "linear modules are ordinary targets)"
        )
    return found


@contextlib.contextmanager
def followed_experts(model: nn.Module, observer: Observer, stacks: Mapping[str, list[ExpertStack]]) -> Iterator[None]:
    """Have `observer` watch the products of every expert, by the module that holds them, for the length of the block.

    transformers' experts run one by one in it, not in grouped kernels.
    """

    def wrap(name: str, module: nn.Module, forward: Forward) -> Forward:
        def followed(*args: Any, **kwargs: Any) -> Any:
            if observer.batch is None:
                return forward(*args, **kwargs)
            with _Routing(observer, stacks[name], name, first_argument(args, kwargs)):
                return forward(*args, **kwargs)

        return followed

    modules = {name: model.get_submodule(name) for name in stacks}
    # Not by transformers' property of the name without "_internal", which would set every sub-configuration too.
    key = "_experts_implementation_internal"
    configs = {id(config): config for config in (getattr(module, "config", None) for module in modules.values())}
    previous = [(config, getattr(config, key)) for config in configs.values() if hasattr(config, key)]
    try:
        for config, _ in previous:
            setattr(config, key, "eager")
        with wrapped_forwards(modules, wrap):
            yield
    finally:
        for config, value in previous:
            setattr(config, key, value)


class _Routing(TorchFunctionMode):
    """Follows one forward call of a module that holds stacks of experts, and has their products watched."""

    def __init__(self, observer: Observer, stacks: list[ExpertStack], name: str, hidden: Tensor) -> None:
        super().__init__()
        self.observer, self.stacks, self.name, self.hidden = observer, stacks, name, hidden
        self.rows = observer.rows(name, hidden)
        self._positions = torch.arange(hidden.shape[:-1].numel(), device=hidden.device)
        # Tensors taken from the input, by id, and the positions of their rows in it.
        self._taken: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        # How many rows each expert has, and whose. They are known where they enter its first matrix, and stay its own
        # up to the last.
        self._of_expert: dict[int, tuple[int, Rows]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]

        def call() -> Any:
            return func(*args, **(kwargs or {}))

        if func is F.linear or func in _MATMULS:
            x, weight = given[:2]
            for stack in self.stacks:
                expert = stack.slice_of(weight)
                if expert is not None and expert >= 0:
                    stack.orient(tuple(weight.shape if func is F.linear else weight.T.shape))
                    return self.observer.watch(stack.matrices[expert], x, self._rows_of(stack, expert, x), call)
        result = call()
        if func is Tensor.__getitem__:
            self._note_taken(given[0], given[1], result)
        elif func in _SELECTS and given[1] == 0:
            self._note_taken(given[0], given[2], result)
        if isinstance(result, Tensor) and result.is_floating_point():
            self._refuse_unknown_use(func, given, result)
        return result

    def _rows_of(self, stack: ExpertStack, expert: int, x: Tensor) -> Rows:
        count = x.shape[:-1].numel()
        taken = self._taken.get(id(x))
        if taken is not None and taken[0]() is x:
            self._of_expert[expert] = (count, route(self.rows, taken[1], len(self._positions)))
        elif self._is_input(x):
            self._of_expert[expert] = (count, self.rows)
        known = self._of_expert.get(expert)
        if known is None or known[0] != count:
            raise CalibrationError(
                f"which tokens the rows are that reach {stack.matrices[expert].name!r} cannot be told: they are not "
                f"taken from the input of {self.name!r} by an index; leave experts=True out for this model"
            )
        return known[1]

    def _note_taken(self, source: Tensor, index: Any, result: Any) -> None:
        if isinstance(index, Tensor) and index.dim() == 1 and source.dim() == 2 and self._is_input(source):
            self._taken[id(result)] = (weakref.ref(result), self._positions[index])

    def _is_input(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the module's input, perhaps with its leading sizes as one."""
        hidden = self.hidden
        same_memory = tensor.data_ptr() == hidden.data_ptr() and tensor.dtype == hidden.dtype
        same_rows = tensor.shape[-1:] == hidden.shape[-1:] and tensor.numel() == hidden.numel()
        same_order = tensor.stride() == hidden.stride() or (tensor.is_contiguous() and hidden.is_contiguous())
        return same_memory and same_rows and same_order

    def _refuse_unknown_use(self, func: Any, given: list[Any], result: Tensor) -> None:
        """What is made of a stack's memory and is no view of it would be a product that goes unwatched."""
        nested = [item for argument in given if isinstance(argument, (tuple, list)) for item in argument]
        tensors = [item for item in given + nested if isinstance(item, Tensor)]
        for stack in self.stacks:
            used = any(stack.slice_of(tensor) is not None for tensor in tensors)
            if used and stack.slice_of(result) is None:
                raise CalibrationError(
                    f"{self.name!r} uses {stack.name!r} in {getattr(func, '__name__', func)}, and not one expert's "
                    "matrix at a time in a linear map (F.linear or @); leave experts=True out for this model"
                )


def route(rows: Rows, positions: Tensor, total: int) -> Rows:
    """How rows taken from an input belong to the sequences.

    Args:
        rows: how the input's own rows do.
        positions: (taken,) int64, where they were in the input, in any order, also repeated.
        total: how many rows the input has.
    """
    sequences = len(rows.lengths)
    if sequences == 1 and rows.mask is None:
        return Rows(torch.tensor([len(positions)]))
    sequence = positions // (total // sequences)
    counted = torch.ones_like(positions, dtype=torch.bool) if rows.mask is None else rows.mask[positions]
    index = counted.nonzero().squeeze(1)
    index = index[sequence[index].argsort(stable=True)]
    lengths = torch.bincount(sequence[index], minlength=sequences).cpu()
    return Rows(lengths, None if rows.mask is None else counted, index)


def with_siblings(
    stacks: Iterable[ExpertStack], measured: Mapping[str, MatrixSensitivity], minimum: int
) -> dict[str, MatrixSensitivity]:
    """The sensitivities of all experts, where those that saw too little have their siblings' mean.

    Args:
        measured: of all experts that ran, by name.
        minimum: the least tokens of an expert whose own numbers count.

    Raises:
        CalibrationError: no expert of a stack saw as many.

    Warns:
        UserWarning: once, if some expert did not.
    """
    found: dict[str, MatrixSensitivity] = {}
    filled = []
    for stack in stacks:
        own = [measured[matrix.name] for matrix in stack.matrices if matrix.tokens >= minimum]
        if not own:
            most = max(matrix.tokens for matrix in stack.matrices)
            raise CalibrationError(
                f"no expert of {stack.name} saw min_expert_tokens={minimum} tokens (the most is {most}); "
                "give more calibration data, or a smaller min_expert_tokens"
            )
        for matrix in stack.matrices:
            if matrix.name in found:
                continue  # tied to another stack's
            if matrix.tokens >= minimum:
                found[matrix.name] = replace(measured[matrix.name], expert_of=stack.name)
                continue
            filled.append(matrix)
            found[matrix.name] = MatrixSensitivity(
                shape=matrix.shape,
                trace=fmean(sibling.trace for sibling in own),
                topk_mean=fmean(sibling.topk_mean for sibling in own),
                effective_rank=round(fmean(sibling.effective_rank for sibling in own)),
                tokens=matrix.tokens,
                calls=matrix.calls,
                aliases=tuple(matrix.modules[1:]),
                expert_of=stack.name,
                from_siblings=True,
            )
    if filled:
        fewest = min(filled, key=lambda matrix: matrix.tokens)
        warnings.warn(
            f"{len(filled)} of {len(found)} expert matrices saw fewer than min_expert_tokens={minimum} tokens "
            f"({fewest.name} saw {fewest.tokens}): the report gives each the mean of the experts beside it, and says "
            "so (from_siblings)",
            UserWarning,
            stacklevel=3,
        )
    return found
