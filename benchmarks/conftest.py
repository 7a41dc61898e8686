"""pytest-benchmark over the same cases as `python -m benchmarks.run`; the check comes before the timing."""

from __future__ import annotations

import pytest
import torch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        cases = metafunc.module.cases(device)
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture
def timed(benchmark, case):
    """Run the case under pytest-benchmark unless its result is wrong."""

    def run() -> None:
        errors = case.errors()
        assert all(error <= case.tolerance for error in errors), f"wrong result, no speed: errors {errors}"
        benchmark.group = case.id
        if torch.cuda.is_available():
            benchmark(lambda: (case.ours(), torch.cuda.synchronize()))
        else:
            benchmark(case.ours)

    return run
