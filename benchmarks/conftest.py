"""pytest-benchmark over the same cases as `python -m benchmarks.run`; the check comes before the timing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import Unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_id" in metafunc.fixturenames:
        metafunc.parametrize("case_id", metafunc.module.cases(DEVICE))


@pytest.fixture
def timed(benchmark, request, case_id):
    """Run the case under pytest-benchmark unless its result is wrong."""

    def run() -> None:
        try:
            case = request.module.cases(DEVICE)[case_id]()
        except Unavailable as reason:
            pytest.skip(str(reason))
        errors = case.errors()
        assert all(error <= case.tolerance for error in errors), f"wrong result, no speed: errors {errors}"
        benchmark.group = case_id
        if DEVICE == "cuda":
            benchmark(lambda: (case.ours(), torch.cuda.synchronize()))
        else:
            benchmark(case.ours)

    return run
