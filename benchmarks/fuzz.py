"""Random shapes, dtypes, layouts, settings and backends of the ops, against their definition in fp64.

python -m benchmarks.fuzz --cases 2000 --seed 0                         checks both suites; failures are listed
python -m benchmarks.fuzz --ops curvature --seed 0 --case 137           one case again, with its numbers
python -m benchmarks.fuzz --ops lora --cases 2000 --seed 0 --record     also writes a row an op to benchmarks/results/

A case is a function of its suite, the seed and its number alone. Memory that torch hands out is filled with NaN, so
that an element nobody wrote shows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import ModuleType
from typing import Any

# cuBLAS repeats itself bit for bit only with a workspace of its own; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from benchmarks import fuzz_curvature, fuzz_lora
from benchmarks.run import ResultsFile, add_arguments, current_commit, provenance

# By name, modules with the order in which OPS take turns and with check(op, family, rng, device), which gives the
# case's description and its errors as multiples of their tolerance.
SUITES: dict[str, ModuleType] = {"lora": fuzz_lora, "curvature": fuzz_curvature}
# Cases of a family share all that kernels are compiled for (dtypes, layouts, divisibility of sizes, backend), so that
# compiling does not take all the time.
FAMILY = 10


def op_of(suite: str, number: int) -> str:
    ops = SUITES[suite].OPS
    return ops[number // FAMILY % len(ops)]


def check(suite: str, number: int, seed: int, device: str) -> tuple[str, list[float]]:
    """Case `number` of `seed`: its description, and its errors as multiples of their tolerance."""
    family, rng = random.Random(f"{seed}/family {number // FAMILY}"), random.Random(f"{seed}/{number}")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # also fills new memory with NaN
    try:
        return SUITES[suite].check(op_of(suite, number), family, rng, device)
    finally:
        torch.use_deterministic_algorithms(before)


def check_chunk(suite: str, numbers: Sequence[int], seed: int, device: str) -> list[tuple[int, str]]:
    """The numbers of the cases that fail, each with what is wrong."""
    failures = []
    for number in numbers:
        try:
            text, errors = check(suite, number, seed, device)
        except Exception as error:  # of whatever kind: it is a finding
            failures.append((number, f"{op_of(suite, number)}: {type(error).__name__}: {error}"))
            continue
        # NaN is not <= either.
        if not all(error <= 1 for error in errors):
            shown = ", ".join(f"{error:.2g}" for error in errors)
            failures.append((number, f"{text}: {shown} times the tolerance"))
    return failures


def run(
    suite: str, cases: int, seed: int, device: str, workers: int, seconds: float
) -> tuple[list[int], list[tuple[int, str]]]:
    """Check cases 0 to `cases` - 1 until the time is up. Returns the numbers checked and the failures."""
    chunks = [range(first, min(first + FAMILY, cases)) for first in range(0, cases, FAMILY)]
    end = time.monotonic() + seconds
    done: list[int] = []
    failures: list[tuple[int, str]] = []
    if workers == 1:
        for chunk in chunks:
            if time.monotonic() > end:
                break
            failures += check_chunk(suite, chunk, seed, device)
            done += chunk
        return done, failures
    # Several processes because most of the time goes into compiling kernels, one a thread.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(check_chunk, suite, chunk, seed, device): chunk for chunk in chunks}
        for future in as_completed(pending):
            failures += future.result()
            done += pending[future]
            if time.monotonic() > end:
                break
        pool.shutdown(cancel_futures=True)
        for future, chunk in pending.items():
            if future.done() and not future.cancelled() and chunk[0] not in done:
                failures += future.result()
                done += chunk
    return done, failures


def rows(
    suite: str, done: Sequence[int], failures: Sequence[tuple[int, str]], seed: int
) -> dict[str, dict[str, Any]]:
    """A results row for each op that was checked: in how many cases, and how many failed."""
    return {
        f"fuzz/{op}": {
            "cases": sum(op_of(suite, number) == op for number in done),
            "failures": sum(op_of(suite, number) == op for number, _ in failures),
            "seeds": [seed],
        }
        for op in sorted({op_of(suite, number) for number in done})
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--ops", choices=(*SUITES, "all"), default="all", help="which suite; default all")
    parser.add_argument("--cases", type=int, default=2000, help="of each suite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="check this case only")
    parser.add_argument("--seconds", type=float, default=110.0, help="start no more cases of a suite after this time")
    parser.add_argument("--workers", type=int, help="processes; default 1 on a CPU, all cores but two on a GPU")
    options = parser.parse_args(arguments)
    seed, device = options.seed, options.device
    suites = list(SUITES) if options.ops == "all" else [options.ops]
    if options.case is not None:
        if len(suites) > 1:
            parser.error(f"--case is of one suite; give --ops {' or '.join(suites)} with it")
        print(*check(suites[0], options.case, seed, device), sep="\n")
        return 0
    workers = options.workers or (max(1, (os.cpu_count() or 2) - 2) if device == "cuda" else 1)
    where = provenance(device, options.commit or current_commit())
    results_file = ResultsFile(device, record=options.record)
    failed = False
    for suite in suites:
        done, failures = run(suite, options.cases, seed, device, workers, options.seconds)
        for number, text in sorted(failures):
            again = f"python -m benchmarks.fuzz --device {device} --ops {suite} --seed {seed} --case {number}"
            print(f"case {number}: {text}\n    again: {again}")
        for name, row in rows(suite, done, failures, seed).items():
            print(f"{name}: {row['cases']} cases, {row['failures']} failures")
            results_file.write(name, row | where)
        if len(done) < options.cases:
            print(f"the time was up after {len(done)} of {options.cases} cases of {suite}")
        failed = failed or bool(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
