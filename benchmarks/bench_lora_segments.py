"""lora_segments on a GPU, forward and backward: a batch of eight adapters against one adapter for all its rows.

The baseline is our own lora_linear with one adapter of rank 16 on the same rows: what mixing costs. Limit: the frozen
layer's FLOPs plus 6 r (in + out) a row.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch.nn.functional import linear

from benchmarks.harness import Case, Cases, native
from benchmarks.lora import SCALING, eager, errors, leaves, step, tensors
from sensilora.ops import lora_linear, lora_segments

OP = "lora_segments"
FEATURES = 4096
ROWS = (1999, 101, 1531, 640, 2048, 17, 1209, 647)
RANKS = (4, 33, 8, 64, 11, 48, 16, 24)


def cases(device: str) -> Cases:
    if device == "cpu":
        return {}
    mixed = partial(_case, device, FEATURES, ROWS, RANKS)
    return {
        "lora_segments/8_adapters/r4_to_64": mixed,
        "lora_segments/8_adapters/r4_to_64/native": lambda: native(mixed(), OP, f"{OP}_backward"),
    }


def _case(device: str, features: int, rows: tuple[int, ...], ranks: tuple[int, ...]) -> Case:
    dtype = torch.bfloat16
    tokens, count = sum(rows), len(rows)
    x, weight, lora_A, lora_B, upstream = tensors(device, dtype, tokens, features, features, sum(ranks))
    _, _, one_A, one_B, _ = tensors(device, dtype, 1, features, features, 16)
    offsets = torch.tensor([0, *itertools.accumulate(rows)], device=device)
    adapters = torch.arange(count, device=device)

    def ours():
        def forward(x, a, b):
            return lora_segments(x, weight, None, a, b, ranks, [SCALING] * count, offsets, adapters)

        return step(forward, (x, lora_A, lora_B), upstream)

    def one_by_one(update):
        """A loop over the segments: y and `update(rows of x, A, B)` of each."""

        def forward(x, a, b):
            updates = map(update, x.split(rows), a.split(ranks), b.split(ranks, dim=1))
            return torch.cat(list(updates))

        return forward

    def added(x, a, b):
        return SCALING * linear(linear(x, a), b)

    def loop(matrix):
        """One base product for all rows and the segments' updates after it."""
        return lambda x, a, b: linear(x, matrix) + one_by_one(added)(x, a, b)

    half = leaves((x, lora_A, lora_B), dtype)
    wide = partial(leaves, (x, lora_A, lora_B), torch.float64)

    def oracle():
        return step(loop(weight.double()), wide(), upstream.double())

    def single(x, a, b):
        return lora_linear(x, weight, None, a, b, SCALING)

    return Case(
        ours=ours,
        baseline=lambda: step(single, (x, one_A, one_B), upstream),
        errors=lambda: errors(ours(), oracle()),
        tolerance=1e-2,
        peers={
            "loop over updates": lambda: step(loop(weight), half, upstream),
            "loop over eager": lambda: step(one_by_one(partial(eager, weight=weight)), half, upstream),
            "loop over lora_linear": lambda: step(one_by_one(single), (x, lora_A, lora_B), upstream),
        },
        eager_errors=lambda: errors(step(loop(weight), half, upstream), oracle()),
        floor_flops=sum(
            4 * count * features * features + 12 * count * rank * features
            for count, rank in zip(rows, ranks, strict=True)
        ),
    )


def test_lora_segments(timed) -> None:
    timed()
