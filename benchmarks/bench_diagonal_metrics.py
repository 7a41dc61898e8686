"""diagonal_metrics against sorting and cumulative sums. Limit: three reads of the diagonals.

Ours includes the wait for the device in which NaN, Inf and negative values are looked for; a peer leaves it out.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, Cases, Unavailable
from sensilora import use_backend
from sensilora.ops import _backend, diagonal_metrics_batch
from sensilora.ops.diagonal_metrics import topk_count

SIZES = {"cpu": [147456, 589824, 2**24], "cuda": [2**24]}
# The largest matrix of Llama-3.1-8B; and all that LoRA adapts: q, k, v, output, gate, up, down in 32 layers.
LARGEST = 14336 * 4096
LLAMA_8B = [4096 * 4096, 4096 * 1024, 4096 * 1024, 4096 * 4096, LARGEST, LARGEST, LARGEST] * 32


def cases(device: str) -> Cases:
    prefix = "cpu/" if device == "cpu" else ""
    made: Cases = {f"{prefix}metrics/{size}": partial(_case, device, [size]) for size in SIZES[device]}
    made[f"{prefix}metrics/64_of_4096"] = partial(_case, device, [4096] * 64)
    if device == "cuda":
        made["metrics/58.7M"] = partial(_case, device, [LARGEST])
        made["metrics/58.7M/triton"] = partial(_case, device, [LARGEST], backend="triton")
        made["metrics/58.7M/equal"] = partial(_case, device, [LARGEST], equal=True)
        made["metrics/llama8b_224"] = partial(_case, device, LLAMA_8B)
        made["metrics/llama8b_224/triton"] = partial(_case, device, LLAMA_8B, backend="triton")
    return made


def _diagonal(device: str, size: int) -> Tensor:
    """Squares of products of normals, as Fisher diagonals are: skewed, over some thirty powers of two."""
    diag = torch.randn(size, device=device)
    diag *= torch.randn(size, device=device)
    return diag.square_()


def _case(device: str, sizes: list[int], *, backend: str | None = None, equal: bool = False) -> Case:
    if backend is not None:
        reason = _backend.why_not("diagonal_metrics", backend, device, torch.float32)
        if reason is not None:
            raise Unavailable(reason)
    diags = [_diagonal(device, size) for size in sizes]
    if equal:
        diags = [torch.full_like(diag, 0.1) for diag in diags]
    counts = [topk_count(size, 0.5) for size in sizes]

    def ours():
        if backend is None:
            return diagonal_metrics_batch(diags)
        with use_backend(backend):
            return diagonal_metrics_batch(diags)

    def unchecked():
        name = backend or _backend.serving("diagonal_metrics", diags[0].device, torch.float32)
        return _backend._table["diagonal_metrics"][name].call(diags, counts, 0.85)

    def reference():
        with use_backend("torch"):
            return diagonal_metrics_batch(diags)

    def errors() -> list[float]:
        return [
            float((got.double() / wanted.double() - 1).abs().max())
            for got, wanted in zip(ours(), reference(), strict=True)
        ]

    peers = {
        "torch.sort and cumsum": lambda: [diag.sort(descending=True).values.cumsum(0) for diag in diags],
        "torch.topk(half)": lambda: [diag.topk(count) for diag, count in zip(diags, counts, strict=True)],
    }
    return Case(
        ours=ours,
        baseline=reference,
        errors=errors,
        tolerance=1e-12,
        peers={"ours, not waited for": unchecked, **peers} if device == "cuda" else peers,
        floor_bytes=3 * sum(diag.nbytes for diag in diags),
    )


def test_diagonal_metrics(timed) -> None:
    timed()
