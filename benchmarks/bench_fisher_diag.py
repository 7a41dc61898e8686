"""fisher_diag against its torch reference. Limit: the FLOPs of the weight gradient, 2 tokens·in·out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Case, Cases, native, relative_error
from sensilora import use_backend
from sensilora.ops import fisher_diag
from sensilora.ops.fisher_diag import CONVENTIONS

# (sequences, positions, in, out)
SHAPES = {"cpu": [(16, 64, 384, 384), (16, 64, 384, 1536), (16, 128, 1536, 384)], "cuda": [(16, 512, 4096, 4096)]}
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}


def cases(device: str) -> Cases:
    prefix = "cpu/" if device == "cpu" else ""
    found = {
        f"{prefix}fisher/{mode}/{shape[2]}x{shape[3]}/n{shape[0]}_t{shape[1]}/{str(dtype).removeprefix('torch.')}": (
            partial(_case, device, mode, shape, dtype)
        )
        for mode in CONVENTIONS
        for shape in SHAPES[device]
        for dtype in DTYPES[device]
    }
    if device == "cuda":
        found |= {f"{name}/native": partial(_native_case, case) for name, case in found.items()}
    return found


def _native_case(case: Callable[[], Case]) -> Case:
    return native(case(), "fisher_diag")


def _case(device: str, mode: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    sequences, positions, in_features, out_features = shape
    x = torch.randn(sequences, positions, in_features, device=device, dtype=dtype)
    grad = torch.randn(sequences, positions, out_features, device=device, dtype=dtype)

    def on(backend: str, *tensors: torch.Tensor) -> torch.Tensor:
        with use_backend(backend):
            return fisher_diag(*tensors, mode=mode)

    return Case(
        ours=lambda: fisher_diag(x, grad, mode=mode),
        baseline=lambda: on("torch", x, grad),
        errors=lambda: [relative_error(fisher_diag(x, grad, mode=mode), on("torch", x.double(), grad.double()))],
        tolerance=1e-5,
        peers={"one weight gradient": lambda: grad.flatten(0, 1).T @ x.flatten(0, 1)},
        floor_flops=2 * sequences * positions * in_features * out_features,
    )


def test_fisher_diag(timed) -> None:
    timed()
