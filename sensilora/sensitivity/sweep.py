"""Passes over the calibration data: under a memory budget, and so that a run that was killed can go on."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from sensilora.errors import CalibrationError, TargetError
from sensilora.sensitivity.batches import Batch, progress_bar
from sensilora.sensitivity.capture import Matrix
from sensilora.sensitivity.checkpoint import Checkpoint, digest
from sensilora.sensitivity.diagonals import DiagonalWriter
from sensilora.sensitivity.estimator import Estimator
from sensilora.sensitivity.report import MatrixSensitivity

_UNITS = {"kb": 10**3, "kib": 2**10, "mb": 10**6, "mib": 2**20, "gb": 10**9, "gib": 2**30}
_HEAD = "head:"
_measured_adapter = TypeAdapter(dict[str, MatrixSensitivity])


def parse_bytes(name: str, size: str | int) -> int:
    """Bytes of "24GB", "1.5 GiB", "800MB", "64MiB" or an int; GB are 10⁹ bytes, GiB 2³⁰.

    Raises:
        CalibrationError: it is none of these, or not positive; `name` is the argument's.
    """
    plain = re.fullmatch(r"\d+", str(size))
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)\s*", str(size).lower())
    amount = int(plain[0]) if plain else int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if isinstance(size, bool) or not amount:
        raise CalibrationError(
            f"{name}={size!r} is no size; give bytes, or for example '24GB' (kB, MB, GB, KiB, MiB, GiB)"
        )
    return amount


@dataclass(frozen=True)
class Pass:
    """One pass over the data: the matrices that it measures, and the bytes of sums that it holds at most."""

    matrices: list[Matrix]
    bytes: int


def plan_passes(
    matrices: Sequence[Matrix], observer: Estimator, batches: Iterable[Any], budget: int | None
) -> list[Pass]:
    """Consecutive matrices whose sums fit the budget together, group by group.

    Raises:
        CalibrationError: the sum of one matrix does not fit, or several passes are needed over a one-shot iterator.
    """
    sizes = [observer.accumulator_bytes(matrix) for matrix in matrices]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    if budget is not None and sizes[largest] > budget:
        raise CalibrationError(
            f"the matrix {matrices[largest].name!r} needs {in_words(sizes[largest])} for its sums, more than the "
            f"memory_budget of {in_words(budget)}; give at least that, or leave it out of targets"
        )
    if observer.keeps_batches or (known_length(batches) == 1 and observer.one_backward):
        # Each sum is reduced where it is made, before the next is.
        return [Pass(list(matrices), sizes[largest])]
    passes: list[Pass] = []
    for matrix, size in zip(matrices, sizes, strict=True):
        if passes and (budget is None or passes[-1].bytes + size <= budget):
            passes[-1] = Pass([*passes[-1].matrices, matrix], passes[-1].bytes + size)
        else:
            passes.append(Pass([matrix], size))
    if len(passes) > 1 and isinstance(batches, Iterator):
        raise CalibrationError(
            f"a memory_budget of {in_words(budget or 0)} takes {len(passes)} passes over the data, and batches can "
            "be read only once; give a list (list(batches)) or a DataLoader"
        )
    return passes


def describe_passes(passes: Sequence[Pass], budget: int) -> str:
    """How many passes, and the memory of each, as a sentence."""
    sizes = ", ".join(in_words(one.bytes) for one in passes)
    count = "one pass" if len(passes) == 1 else f"{len(passes)} passes"
    return f"memory_budget {in_words(budget)}: {count} over the calibration data, with sums of {sizes}"


def in_words(size: int) -> str:
    """A number of bytes for people."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"


def known_length(batches: Iterable[Any]) -> int | None:
    """How many batches there are, where ``len`` knows."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


@dataclass
class Sweep:
    """The passes over the data, from where a checkpoint left off to their end.

    Attributes:
        measure: reduces matrices' finished diagonals to their numbers, and frees them.
        head: parameters that were trained for the calibration only, by name.
        measured: what `measure` gave, by matrix name.
        done: batches of the current pass that are in the sums.
        current: the current pass's place in `passes`.
        digests: of the batches, in the order of the first pass; later passes and a resumed one must see the same.
        rng: the CPU generator's state at the start of each pass, by which a shuffling loader draws its order.
    """

    model: nn.Module
    observer: Estimator
    batches: Iterable[Any]
    passes: list[Pass]
    measure: Callable[[Sequence[Matrix]], list[MatrixSensitivity]]
    text: str
    progress: bool
    checkpoint: Checkpoint | None = None
    writer: DiagonalWriter | None = None
    head: Mapping[str, Tensor] = field(default_factory=dict)
    measured: dict[str, MatrixSensitivity] = field(init=False, default_factory=dict)
    done: int = field(init=False, default=0)
    current: int = field(init=False, default=0)
    digests: list[str] = field(init=False, default_factory=list)
    rng: Tensor = field(init=False, default_factory=torch.get_rng_state)
    # The generator's state after the batches that are done, for models that draw random numbers themselves.
    _rng_now: Tensor | None = field(init=False, default=None)
    # Whether the sums hold whole batches and nothing else.
    _whole: bool = field(init=False, default=True)
    _interruption: _Interruption = field(init=False, default_factory=lambda: _Interruption())

    def run(self) -> None:
        """Go through all passes.

        Raises:
            KeyboardInterrupt: with a checkpoint it says how to go on; the batch at hand is then finished first.
            CalibrationError: the data differs between two passes or from before the checkpoint, or has no token or
                sequence that counts.
            TargetError: a matrix never ran.
        """
        if self.checkpoint is None:
            self._run()
            return
        self.checkpoint.folder.mkdir(parents=True, exist_ok=True)
        if self.head and not self.checkpoint.exists:
            self.save()
        try:
            with self._interruption:
                self._run()
        except KeyboardInterrupt:
            if self._whole and self.done:
                self.save()
            if not self.checkpoint.exists:
                raise
            raise KeyboardInterrupt(
                f"interrupted; what was summed so far is in {self.checkpoint.folder}: calibrate again with the same "
                "arguments to go on from there"
            ) from None

    def _run(self) -> None:
        while self.current < len(self.passes):
            self._pass()
            with self._step():
                self.current, self.done, self._rng_now = self.current + 1, 0, None
                if self.checkpoint is not None and self.current < len(self.passes):
                    self.save()

    def _pass(self) -> None:
        observer, group = self.observer, self.passes[self.current].matrices
        chosen = {matrix.name for matrix in group}
        for matrix in observer.matrices.values():
            matrix.active = matrix.name in chosen
        if not self.done:
            observer.rewind()
        observer.finish = None
        torch.set_rng_state(self.rng)
        count, length, resumed = 0, known_length(self.batches), self.done
        number = f", pass {self.current + 1} of {len(self.passes)}" if len(self.passes) > 1 else ""
        with progress_bar(self.batches, self.text + number, show=self.progress) as bar:
            for count, raw in enumerate(bar, 1):
                self._recognise(count, raw)
                if count > resumed:
                    if observer.finish is not None:
                        raise CalibrationError(
                            f"the calibration data says that it holds {length} batches and gives more; give a list"
                        )
                    if count == length:
                        observer.finish = lambda matrix: self._finish([matrix])
                    with self._step():
                        self._observe(count, raw)
                elif count == resumed and self._rng_now is not None:
                    torch.set_rng_state(self._rng_now)
        if count < max(resumed, len(self.digests)):
            raise self._changed(count + 1)
        check_coverage(observer, [matrix for matrix in group if matrix.name in observer.modules])
        # An expert that no token reached has no diagonal.
        rest = [matrix for matrix in group if matrix.calls and matrix.name not in self.measured]
        if not observer.keeps_batches:
            with self._step():
                self._finish(rest)
            return
        for matrix in progress_bar(rest, "probing", show=self.progress, unit="matrix"):
            with self._step():
                self._finish([matrix])
                if self.checkpoint is not None:
                    self.save()

    def _observe(self, count: int, raw: Any) -> None:
        self.observer.observe(Batch(raw, self.model))
        self.done = count
        if self.checkpoint is not None:
            self._rng_now = torch.get_rng_state()
            if count % self.checkpoint.every == 0:
                self.save()

    def _finish(self, matrices: Sequence[Matrix]) -> None:
        for matrix, found in zip(matrices, self.measure(matrices), strict=True):
            self.measured[matrix.name] = found

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        """What Ctrl-C waits for, as the sums are of no use half-way."""
        self._whole = False
        with self._interruption.deferred():
            yield
            self._whole = True

    def _recognise(self, count: int, raw: object) -> None:
        """Batch `count` (from 1) is what it was in the first pass, or before the checkpoint."""
        if self.checkpoint is None and len(self.passes) == 1:
            return
        found = digest(raw)
        if count <= len(self.digests):
            if found != self.digests[count - 1]:
                raise self._changed(count)
        elif self.current == 0:
            self.digests.append(found)
        else:
            raise self._changed(count)

    def _changed(self, count: int) -> CalibrationError:
        before = "before the checkpoint" if self.current == 0 else "in the first pass over the data"
        return CalibrationError(
            f"batch {count} of the calibration data is not what it was {before}; give the same batches in the same "
            "order each time, for example a list"
        )

    def save(self) -> None:
        """Write the checkpoint."""
        assert self.checkpoint is not None
        if self.writer is not None:
            self.writer.flush()
        observer = self.observer
        matrices = {matrix.name: matrix for one in self.passes for matrix in one.matrices}
        state = {
            "current": self.current,
            "done": self.done,
            "digests": self.digests,
            "batches": observer.batches,
            "tokens": observer.tokens,
            "sequences": observer.sequences,
            "matrices": {name: _plain(matrix) for name, matrix in matrices.items() if matrix.calls},
            "measured": _measured_adapter.dump_python(self.measured, mode="json"),
            "diagonals": {} if self.writer is None else self.writer.files,
        }
        tensors: dict[str, Tensor] = {f"{_HEAD}{name}": weight for name, weight in self.head.items()}
        tensors["rng"] = self.rng
        if self._rng_now is not None:
            tensors["rng_now"] = self._rng_now
        for name, matrix in matrices.items():
            if matrix.diagonal is not None:
                tensors[f"sum:{name}"] = matrix.diagonal
        self.checkpoint.write(state, tensors)

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take over what `save` wrote."""
        self.digests, self.rng = list(state["digests"]), tensors["rng"]
        self.measured = _measured_adapter.validate_json(json.dumps(state["measured"]))
        observer = self.observer
        if observer.keeps_batches:
            return
        self.current, self.done, self._rng_now = state["current"], state["done"], tensors.get("rng_now")
        observer.batches, observer.tokens, observer.sequences = state["batches"], state["tokens"], state["sequences"]
        for matrix in (matrix for one in self.passes for matrix in one.matrices):
            plain = state["matrices"].get(matrix.name)
            if plain is not None:
                matrix.tokens, matrix.calls, matrix.shape = plain["tokens"], plain["calls"], tuple(plain["shape"])
                matrix.dtype = None if plain["dtype"] is None else getattr(torch, plain["dtype"])
                matrix.diagonal = tensors.get(f"sum:{matrix.name}")


def of_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained head's weights among the tensors that `Sweep.save` wrote, by name."""
    return {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items() if name.startswith(_HEAD)}


def check_coverage(observer: Estimator, matrices: Sequence[Matrix]) -> None:
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
    unseen = [matrix.name for matrix in matrices if not matrix.calls]
    if unseen:
        raise TargetError(
            f"{len(unseen)} target modules never ran in any batch ({', '.join(unseen[:5])}"
            f"{', ...' if len(unseen) > 5 else ''}); leave them out of targets, or give data that reaches them"
        )


def _plain(matrix: Matrix) -> dict[str, Any]:
    dtype = None if matrix.dtype is None else str(matrix.dtype).removeprefix("torch.")
    return {"tokens": matrix.tokens, "calls": matrix.calls, "shape": matrix.shape, "dtype": dtype}


class _Interruption:
    """While it is entered, Ctrl-C waits for the end of a step; pressed again, it acts at once.

    Only where Ctrl-C does what Python does by default; elsewhere it does what it did.
    """

    def __init__(self) -> None:
        self._busy = self._pressed = self._installed = False

    def __enter__(self) -> None:
        here = threading.current_thread() is threading.main_thread()
        self._installed = here and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._installed:
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, *_: object) -> None:
        if not self._busy or self._pressed:
            raise KeyboardInterrupt
        self._pressed = True

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A step; KeyboardInterrupt at its end if Ctrl-C was pressed meanwhile."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self._pressed:
            raise KeyboardInterrupt
