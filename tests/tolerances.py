"""Tolerances by dtype, relative to the norm of the fp64 oracle: ||got - oracle|| <= tolerance * ||oracle||."""

import torch

# A few units of each format's rounding error; sums of hundreds of terms add a small factor.
RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# Results that are accumulated in fp32 whatever the input's dtype, against the oracle on the same rounded inputs.
ACCUMULATED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def relative_error(got: torch.Tensor, oracle: torch.Tensor) -> float:
    """||got - oracle|| / ||oracle|| in fp64; NaN if `got` holds one. Zero against zero is 0."""
    assert got.shape == oracle.shape, f"{tuple(got.shape)} != {tuple(oracle.shape)}"
    got, oracle = got.detach().double().cpu(), oracle.detach().double().cpu()
    if oracle.numel() == 0:
        return 0.0
    difference = (got - oracle).norm()
    return float(difference if oracle.norm() == 0 else difference / oracle.norm())
