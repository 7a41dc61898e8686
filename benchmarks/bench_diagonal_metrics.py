"""diagonal_metrics against sort and cumulative sum. Limit: three reads of the diagonal."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.harness import Case, Cases
from sensilora import use_backend
from sensilora.ops import diagonal_metrics

SIZES = {"cpu": [147456, 589824, 2**24], "cuda": [2**24]}


def cases(device: str) -> Cases:
    prefix = "cpu/" if device == "cpu" else ""
    return {f"{prefix}metrics/{size}": partial(_case, device, size) for size in SIZES[device]}


def _case(device: str, size: int) -> Case:
    # Products of squares, as Fisher diagonals are: many orders of magnitude.
    diag = torch.randn(size, device=device).square() * torch.randn(size, device=device).square()

    def ours():
        return diagonal_metrics(diag)

    def reference():
        with use_backend("torch"):
            return diagonal_metrics(diag)

    def errors() -> list[float]:
        return [abs(float(got) / float(wanted) - 1) for got, wanted in zip(ours(), reference(), strict=True)]

    return Case(
        ours=ours,
        baseline=reference,
        errors=errors,
        tolerance=1e-12,
        peers={"torch.sort alone": lambda: diag.sort(), "torch.topk(half)": lambda: diag.topk(size // 2)},
        floor_bytes=3 * diag.nbytes,
    )


def test_diagonal_metrics(timed) -> None:
    timed()
