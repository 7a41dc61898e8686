"""Hutchinson's estimate of a diagonal, z ⊙ Hz, with random signs z that are made where they are used.

Counter-based (Philox4x32-7, as for dropout: sensilora/ops/_dropout.py), so z is never stored beyond what the
Hessian-vector product needs, and is the same for every backend, tiling and thread count. A sign is one bit, so a
Philox call serves 128 elements and the accumulation is bound by memory. For element i in row-major order:

    counter = (i // 128 mod 2^32, i // 2^39, offset mod 2^32, offset // 2^32)
    key     = (seed mod 2^32, seed // 2^32)
    bit     = bit i % 32 (0 the lowest) of output word i // 32 % 4
    z       = 1 - 2 bit
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensilora.ops import _backend
from sensilora.ops._backend import Implementation
from sensilora.ops._dropout import philox

_WORD = 0xFFFFFFFF
_CALL = 128


def rademacher(
    shape: Sequence[int],
    *,
    seed: int,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent random signs: each element is -1 or 1 with equal probability.

    Args:
        shape: of the result.
        seed: any integer that fits 64 bits; another one gives signs independent of these.
        offset: the same; probes of one seed take an offset each.
        dtype: fp64, fp32, bf16 or fp16. The signs do not depend on it.
        device: of the result. The signs do not depend on it.

    Returns:
        `shape`, contiguous. The signs that `hutchinson_accumulate` multiplies by for the same seed and offset.

    Raises:
        ValueError: the seed or the offset does not fit 64 bits, or `dtype` is not floating-point.
        BackendError: a backend was asked for that cannot serve.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, not {dtype}")
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    _rademacher_(out, *_signed(seed, offset))
    return out


def hutchinson_accumulate(hz: Tensor, out: Tensor, *, seed: int, offset: int = 0) -> Tensor:
    """out += z ⊙ hz, with the signs z of ``rademacher(hz.shape, seed=seed, offset=offset)``.

    With hz = Hz, z ⊙ Hz is one probe's estimate of diag(H): unbiased, of variance Σ_{j≠i} H_ij² (Hutchinson 1990;
    Bekas, Kokiopoulou & Saad 2007). The mean over probes is `out` divided by their number.

    Args:
        hz: any shape and strides; fp64, fp32, bf16 or fp16.
        out: fp32 or fp64 of hz's shape, contiguous, on hz's device; added to in its own dtype. Not differentiable.
        seed: the key of the signs, any integer that fits 64 bits.
        offset: the probe, any integer that fits 64 bits.

    Returns:
        `out`. All backends give the same bits.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the seed or the offset does not fit 64 bits.
        BackendError: a backend was asked for that cannot serve.
    """
    if not hz.is_floating_point():
        raise ValueError(f"hz must be floating-point, not {hz.dtype}")
    if (
        out.shape != hz.shape
        or out.dtype not in (torch.float32, torch.float64)
        or out.device != hz.device
        or not out.is_contiguous()
    ):
        raise ValueError(
            f"out must be contiguous fp32 or fp64 of shape {tuple(hz.shape)} on {hz.device}, "
            f"not {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    _hutchinson_accumulate_(hz.detach(), out, *_signed(seed, offset))
    return out


def _signed(*values: int) -> list[int]:
    """64-bit words as the signed integers that an op takes."""
    for name, value in zip(("seed", "offset"), values, strict=True):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{name} must fit 64 bits, not {value}")
    return [value - 2**64 if value >= 2**63 else value for value in values]


def _signs(size: int, seed: int, offset: int, device: torch.device) -> Tensor:
    """int64 (size,) of -1 and 1. Memory: about 30 bytes an element while it runs."""
    call = torch.arange(-(-size // _CALL), dtype=torch.int64, device=device)
    low, high = torch.full_like(call, offset & _WORD), torch.full_like(call, offset >> 32 & _WORD)
    words = torch.stack(philox((call & _WORD, call >> 32, low, high), seed), dim=1)
    bits = words.unsqueeze(-1) >> torch.arange(32, device=device) & 1
    return 1 - 2 * bits.flatten()[:size]


def _reference_rademacher(out: Tensor, seed: int, offset: int) -> None:
    out.copy_(_signs(out.numel(), seed, offset, out.device).view(out.shape))


def _reference_accumulate(hz: Tensor, out: Tensor, seed: int, offset: int) -> None:
    out += _signs(out.numel(), seed, offset, out.device).view(out.shape) * hz.to(out.dtype)


def _native_rademacher(out: Tensor, seed: int, offset: int) -> None:
    torch.ops.sensilora_C.rademacher(out, seed, offset)


def _native_accumulate(hz: Tensor, out: Tensor, seed: int, offset: int) -> None:
    torch.ops.sensilora_C.hutchinson_accumulate(hz, out, seed, offset)


def _triton_rademacher(out: Tensor, seed: int, offset: int) -> None:
    from sensilora.kernels.hutchinson import launch_rademacher

    with torch.cuda.device_of(out):
        launch_rademacher(out, seed, offset)


def _triton_accumulate(hz: Tensor, out: Tensor, seed: int, offset: int) -> None:
    from sensilora.kernels.hutchinson import launch_hutchinson_accumulate

    with torch.cuda.device_of(out):
        launch_hutchinson_accumulate(hz, out, seed, offset)


_backend.register(
    "hutchinson_accumulate",
    triton=Implementation(_triton_accumulate),
    native=Implementation(_native_accumulate),
    torch=Implementation(_reference_accumulate),
)
_backend.register(
    "rademacher",
    triton=Implementation(_triton_rademacher),
    native=Implementation(_native_rademacher),
    torch=Implementation(_reference_rademacher),
)


@torch.library.custom_op("sensilora::rademacher_", mutates_args=("out",))
def _rademacher_(out: Tensor, seed: int, offset: int) -> None:
    _backend.select("rademacher", out.device, out.dtype)(out, seed, offset)


@_rademacher_.register_fake
def _(out: Tensor, seed: int, offset: int) -> None:
    return None


@torch.library.custom_op("sensilora::hutchinson_accumulate_", mutates_args=("out",))
def _hutchinson_accumulate_(hz: Tensor, out: Tensor, seed: int, offset: int) -> None:
    _backend.select("hutchinson_accumulate", hz.device, hz.dtype)(hz.contiguous(), out, seed, offset)


@_hutchinson_accumulate_.register_fake
def _(hz: Tensor, out: Tensor, seed: int, offset: int) -> None:
    return None
