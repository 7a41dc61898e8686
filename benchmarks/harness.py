"""What every benchmark shares: a case, its check, and timing of ours, the baseline and the peers side by side.

A case whose result is wrong gets no speed. All functions of a case are timed in turn within each round, so that a
change of clock or load meets all of them alike; medians over rounds are reported, and ratios are the point.

A benchmark module has ``cases(device)``: a function that builds the case, by the case's name in the results file
(``op/shape/...``). Its tensors exist only while it is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sensilora import use_backend
from sensilora.ops import _backend


class Unavailable(Exception):
    """A case cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """What one line of the results measures.

    Attributes:
        ours, baseline: what is timed; the ratio is ours / baseline.
        errors: computes the error of each of our outputs against an fp64 oracle, relative to the oracle's norm.
        tolerance: largest error with which a speed is reported.
        peers: other ways to do the same, by name; their ratios are to the baseline too.
        eager_errors: the same for the plain torch expression in the same dtype, for the row's error_vs_eager.
        floor_bytes, floor_flops: least memory traffic and arithmetic of ours, for the floor on a GPU.
        peak_memory: record the peak of allocated GPU memory of each function too.
        bandwidth: record floor_bytes over our time, in TB/s, too.
        wall: time by the host's clock, launches included, as a script that waits for nothing sees it.
    """

    ours: Callable[[], Any]
    baseline: Callable[[], Any]
    errors: Callable[[], list[float]]
    tolerance: float
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    eager_errors: Callable[[], list[float]] | None = None
    floor_bytes: float = 0.0
    floor_flops: float = 0.0
    peak_memory: bool = False
    bandwidth: bool = False
    wall: bool = False


Cases = dict[str, Callable[[], Case]]


def through(plain: Case, backend: str, *ops: str) -> Case:
    """A GPU case in bf16 with ours through one backend, beside ours as it is picked by itself.

    Raises:
        Unavailable: the backend cannot serve one of `ops`.
    """
    for op in ops:
        reason = _backend.why_not(op, backend, "cuda", torch.bfloat16)
        if reason is not None:
            raise Unavailable(reason)

    def forced(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with use_backend(backend):
                return function()

        return run

    return replace(plain, ours=forced(plain.ours), errors=forced(plain.errors), peers={"as picked": plain.ours})


def native(plain: Case, *ops: str) -> Case:
    """`through` the CUDA C++ backend, of ops for which Triton is picked; it serves where that is not installed."""
    return replace(through(plain, "native", *ops), peers={"Triton": plain.ours})


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of the GPU: bytes a second of a copy (read plus write), FLOP a second of bf16 products.

    The best of several products, since no shape is the fastest everywhere and a large one lowers the clock.
    """

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def measure(cls) -> Ceilings:
        source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        copy = median_ms([lambda: target.copy_(source)], "cuda")[0]
        rates = [
            2 * rows * reduced * columns / product * 1e3
            for rows, reduced, columns in ((8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (8192,) * 3)
            for product in median_ms([_product(rows, reduced, columns)], "cuda")
        ]
        return cls(2 * source.nbytes / copy * 1e3, max(rates))

    def floor_ms(self, case: Case) -> float:
        return max(case.floor_bytes / self.bytes_per_second, case.floor_flops / self.flops_per_second) * 1e3


def _product(rows: int, reduced: int, columns: int) -> Callable[[], torch.Tensor]:
    left = torch.randn(rows, reduced, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(reduced, columns, device="cuda", dtype=torch.bfloat16)
    return lambda: left @ right


def median_ms(
    functions: list[Callable[[], Any]], device: str, seconds: float = 0.3, rounds: int = 20, wall: bool = False
) -> list[float]:
    """Median milliseconds of each function, timed in turn, `rounds` times at most and for about `seconds` each.

    Five rounds at least, or three where one takes more than five seconds.
    """
    make = _cpu_timer if device == "cpu" else _wall_timer if wall else _cuda_timer
    timers = [make(function) for function in functions]
    first = [timer() for timer in timers]
    round_ms = sum(spent for _, spent in first)
    rounds = max(3 if round_ms > 5e3 else 5, min(rounds, int(seconds * 1e3 * len(functions) / round_ms)))
    samples = [[spent for spent, _ in first], *([timer()[0] for timer in timers] for _ in range(rounds - 1))]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


# A call times a function and gives (milliseconds a call, milliseconds spent).
Timer = Callable[[], tuple[float, float]]


def _cpu_timer(function: Callable[[], Any]) -> Timer:
    for _ in range(3):
        function()

    def timer() -> tuple[float, float]:
        start = time.perf_counter()
        function()
        spent = (time.perf_counter() - start) * 1e3
        return spent, spent

    return timer


def _wall_timer(function: Callable[[], Any]) -> Timer:
    """The host's clock over several calls in a row, up to the end of the last one on the device."""
    for _ in range(3):
        function()

    def timer() -> tuple[float, float]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            function()
        torch.cuda.synchronize()
        spent = (time.perf_counter() - start) * 1e3
        return spent / 5, spent

    return timer


_CYCLES_PER_MS = 2_000_000
_LONGEST_QUEUE_MS = 50.0


def _cuda_timer(function: Callable[[], Any]) -> Timer:
    """Device time. The device is kept busy while the calls are queued, so that no launch gap counts.

    A sample that began before all calls were queued, as on a host that has become slower, is taken again behind a
    longer wait. Where the longest is too short, or a call waits for the device itself, launches count.
    """
    for call in range(3):  # the first two warm up, or the first alone if a call takes seconds
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        host_ms = (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize()
        device_ms = (time.perf_counter() - start) * 1e3
        if call > 0 and device_ms > 1e3:
            break
    # Short calls are timed several together, since the clock of the events is coarse.
    repeats = max(1, min(10, int(20 / device_ms)))
    queue_ms = min(_LONGEST_QUEUE_MS, 0.1 + 1.5 * repeats * host_ms)

    def timer() -> tuple[float, float]:
        nonlocal queue_ms
        while True:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(queue_ms * _CYCLES_PER_MS))
            start.record()
            for _ in range(repeats):
                function()
            end.record()
            began_early = start.query()
            end.synchronize()
            if not began_early or queue_ms >= _LONGEST_QUEUE_MS:
                spent = start.elapsed_time(end)
                return spent / repeats, spent
            queue_ms = min(2 * queue_ms, _LONGEST_QUEUE_MS)

    return timer


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` as a CUDA graph: a call replays its kernels and returns the same output tensors, refilled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def _peak_gib(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 2**30


def _fits(peer: Callable[[], Any]) -> bool:
    """Whether another's way runs in the memory there is; that ours and the baseline do is the case's business."""
    try:
        peer()
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits


def run(case: Case, device: str, ceilings: Ceilings | None) -> dict[str, Any]:
    """One row of the results file, without its id; without times where the error is above the tolerance."""
    errors = case.errors()
    row: dict[str, Any] = {"error": max(errors), "tolerance": case.tolerance}
    if not all(error <= case.tolerance for error in errors):
        return {**row, "wrong": True}
    if case.eager_errors is not None:
        row["error_vs_eager"] = max(ours / eager for ours, eager in zip(errors, case.eager_errors(), strict=True))
    run_peers = {name: peer for name, peer in case.peers.items() if _fits(peer)}
    ours, baseline, *peers = median_ms([case.ours, case.baseline, *run_peers.values()], device, wall=case.wall)
    row.update(ours_ms=ours, baseline_ms=baseline, ratio=ours / baseline)
    row["peers"] = {name: peer / baseline for name, peer in zip(run_peers, peers, strict=True)}
    if len(run_peers) < len(case.peers):
        row["out_of_memory"] = [name for name in case.peers if name not in run_peers]
    if ceilings is not None:
        row["floor_ms"] = ceilings.floor_ms(case)
    if case.bandwidth:
        row["tbps"] = case.floor_bytes / ours / 1e9
    if case.peak_memory and device == "cuda":
        functions = {"ours": case.ours, "baseline": case.baseline, **run_peers}
        row["peak_gib"] = {name: _peak_gib(function) for name, function in functions.items()}
    return row


def relative_error(got: torch.Tensor, oracle: torch.Tensor) -> float:
    """||got - oracle|| / ||oracle|| in fp64."""
    got, oracle = got.detach().double(), oracle.detach().double()
    return float((got - oracle).norm() / oracle.norm())
