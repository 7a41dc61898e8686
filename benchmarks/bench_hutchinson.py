"""hutchinson_accumulate against signs drawn by torch. Limit: one read of hz, one read and one write of the sum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Case, Cases, native, relative_error
from sensilora import use_backend
from sensilora.ops import hutchinson_accumulate, rademacher

SIZES = {"cpu": ["1.7e7"], "cuda": ["8.7e8"]}
DTYPES = (torch.float32, torch.bfloat16)


def cases(device: str) -> Cases:
    prefix = "cpu/" if device == "cpu" else ""
    made: Cases = {
        f"{prefix}hutchinson/accumulate/{size}{'' if dtype == torch.float32 else '/bfloat16'}": partial(
            _case, device, int(float(size)), dtype
        )
        for size in SIZES[device]
        for dtype in DTYPES
    }
    if device == "cuda":
        made |= {f"{name}/native": partial(_native, make) for name, make in made.items()}
    return made


def _native(make: Callable[[], Case]) -> Case:
    return native(make(), "hutchinson_accumulate")


def _case(device: str, size: int, dtype: torch.dtype) -> Case:
    hz = torch.randn(size, device=device, dtype=dtype)
    out = torch.zeros(size, device=device)
    signs = torch.ones_like(hz)

    def eager() -> torch.Tensor:
        z = torch.empty_like(hz).bernoulli_().mul_(2).sub_(1)
        return out.add_(z * hz)

    def errors() -> list[float]:
        got = hutchinson_accumulate(hz, torch.ones(size, device=device), seed=1, offset=2)
        with use_backend("torch"):
            z = rademacher((size,), seed=1, offset=2, dtype=dtype, device=device)
        # Bit for bit: the product with a sign is exact, and the sum is rounded once.
        return [relative_error(got, 1 + (z * hz).float())]

    return Case(
        ours=lambda: hutchinson_accumulate(hz, out, seed=1, offset=2),
        baseline=eager,
        errors=errors,
        tolerance=0.0,
        peers={"signs held in memory": lambda: out.addcmul_(signs, hz), "no signs": lambda: out.add_(hz)},
        floor_bytes=hz.nbytes + 2 * out.nbytes,
        bandwidth=True,
    )


def test_hutchinson(timed) -> None:
    timed()
