"""autocorrelation_diag against its torch reference. Limit: one read of x."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.harness import Case, Cases, native, relative_error
from sensilora import use_backend
from sensilora.ops import autocorrelation_diag

SHAPES = {"cpu": [(2048, 384), (2048, 1536), (16384, 384)], "cuda": [(8192, 4096), (8192, 14336)]}
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}


def cases(device: str) -> Cases:
    prefix = "cpu/" if device == "cpu" else ""
    found = {
        f"{prefix}autocorrelation_diag/{rows}x{columns}/{str(dtype).removeprefix('torch.')}": partial(
            _case, device, rows, columns, dtype
        )
        for rows, columns in SHAPES[device]
        for dtype in DTYPES[device]
    }
    if device == "cuda":
        for rows, columns in SHAPES["cuda"]:
            found[f"autocorrelation_diag/{rows}x{columns}/bfloat16/native"] = partial(_native_case, rows, columns)
    return found


def _case(device: str, rows: int, columns: int, dtype: torch.dtype) -> Case:
    x = torch.randn(rows, columns, device=device, dtype=dtype)

    def reference():
        with use_backend("torch"):
            return autocorrelation_diag(x)

    return Case(
        ours=lambda: autocorrelation_diag(x),
        baseline=reference,
        errors=lambda: [relative_error(autocorrelation_diag(x), x.double().square().sum(0))],
        tolerance=1e-5,
        peers={"x.square().sum(0), x's dtype": lambda: x.square().sum(0)},
        floor_bytes=x.nbytes,
    )


def _native_case(rows: int, columns: int) -> Case:
    return native(_case("cuda", rows, columns, torch.bfloat16), "autocorrelation_diag")


def test_autocorrelation_diag(timed) -> None:
    timed()
