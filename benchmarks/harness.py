"""What every benchmark shares: a case, its check, and timing of ours, the baseline and the peers side by side.

A case whose result is wrong gets no speed. All functions of a case are timed in turn within each round, so that a
change of clock or load meets all of them alike; medians over rounds are reported, and ratios are the point.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One line of the results.

    Attributes:
        id: name in the results file, ``op/shape/...``.
        ours, baseline: what is timed; the ratio is ours / baseline.
        errors: computes the error of each of our outputs against an fp64 oracle, relative to the oracle's norm.
        tolerance: largest error with which a speed is reported.
        peers: other ways to do the same, by name; their ratios are to the baseline too.
        eager_errors: the same for the plain torch expression in the same dtype, for the row's error_vs_eager.
        floor_bytes, floor_flops: least memory traffic and arithmetic of ours, for the floor on a GPU.
    """

    id: str
    ours: Callable[[], Any]
    baseline: Callable[[], Any]
    errors: Callable[[], list[float]]
    tolerance: float
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    eager_errors: Callable[[], list[float]] | None = None
    floor_bytes: float = 0.0
    floor_flops: float = 0.0


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of the GPU: bytes a second of a copy (read plus write), FLOP a second of a bf16 product."""

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def measure(cls) -> Ceilings:
        source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        copy = median_ms([lambda: target.copy_(source)], "cuda")[0]
        left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        product = median_ms([lambda: left @ right], "cuda")[0]
        return cls(2 * source.nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3)

    def floor_ms(self, case: Case) -> float:
        return max(case.floor_bytes / self.bytes_per_second, case.floor_flops / self.flops_per_second) * 1e3


def median_ms(functions: list[Callable[[], Any]], device: str, seconds: float = 0.4, rounds: int = 30) -> list[float]:
    """Median milliseconds of each function, timed in turn, `rounds` times at most and for about `seconds` each."""
    timer = _cuda_ms if device == "cuda" else _cpu_ms
    for function in functions:
        for _ in range(3):
            function()
    first = [timer(function) for function in functions]
    rounds = max(5, min(rounds, int(seconds * 1e3 * len(functions) / sum(first))))
    samples = [[timer(function) for function in functions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def _cpu_ms(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


_REPEATS = 10
_QUEUE_CYCLES = 30_000_000  # about 15 ms, more than ten calls' host time


def _cuda_ms(function: Callable[[], Any]) -> float:
    """Device time a call. The device is kept busy while the calls are queued, so that no launch gap counts."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_QUEUE_CYCLES)
    start.record()
    for _ in range(_REPEATS):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _REPEATS


def run(case: Case, device: str, ceilings: Ceilings | None) -> dict[str, Any]:
    """One row of the results file; without times where the error is above the tolerance."""
    errors = case.errors()
    row: dict[str, Any] = {"id": case.id, "error": max(errors), "tolerance": case.tolerance}
    if not all(error <= case.tolerance for error in errors):
        return {**row, "wrong": True}
    if case.eager_errors is not None:
        row["error_vs_eager"] = max(ours / eager for ours, eager in zip(errors, case.eager_errors(), strict=True))
    ours, baseline, *peers = median_ms([case.ours, case.baseline, *case.peers.values()], device)
    row.update(ours_ms=ours, baseline_ms=baseline, ratio=ours / baseline)
    row["peers"] = {name: peer / baseline for name, peer in zip(case.peers, peers, strict=True)}
    if ceilings is not None:
        row["floor_ms"] = ceilings.floor_ms(case)
    return row


def relative_error(got: torch.Tensor, oracle: torch.Tensor) -> float:
    """||got - oracle|| / ||oracle|| in fp64."""
    got, oracle = got.detach().double(), oracle.detach().double()
    return float((got - oracle).norm() / oracle.norm())
