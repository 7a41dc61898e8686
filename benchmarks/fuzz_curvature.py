"""Random cases of the curvature ops, against their definition in fp64; metrics and signs against the exact values.

Run by benchmarks/fuzz.py.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import random
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from sensilora import use_backend
from sensilora.errors import NonFiniteError
from sensilora.ops import (
    _backend,
    autocorrelation_blocks,
    autocorrelation_diag,
    diagonal_metrics,
    diagonal_metrics_batch,
    fisher_diag,
    hutchinson_accumulate,
    rademacher,
)
from sensilora.ops._backend import accumulator_dtype
from sensilora.ops.diagonal_metrics import topk_count
from sensilora.ops.fisher_diag import MODES

OPS = (
    "fisher_diag", "diagonal_metrics", "fisher_diag", "autocorrelation_diag", "fisher_diag", "hutchinson_accumulate",
    "fisher_diag", "diagonal_metrics_batch", "fisher_diag", "autocorrelation_blocks", "fisher_diag", "rademacher",
)  # fmt: skip
# Of sums, by the dtype they are kept in, relative to the exact ones.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
DTYPES = {
    "cpu": [torch.float32, torch.bfloat16, torch.float64, torch.float16],
    "cuda": [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, torch.float64],
}
# What random normal numbers are multiplied by; fp16 ends at 65504.
SCALES = [1.0, 1.0, 1.0, 1e-4, 1e4]
SMALL_SCALES = [1.0, 1.0, 1e-2, 1e2]
# Sizes as (first, stop, step). From 128 on in multiples of 8, Fisher's tiles come by TMA on Hopper.
WIDE = [(128, 520, 16), (136, 520, 16), (136, 513, 128)]
FEATURES = [(1, 2, 1), (2, 40, 1), (41, 300, 2), (16, 129, 16), *WIDE]
ROWS = {"cpu": [(0, 3, 1), (3, 64, 1), (65, 700, 1), (64, 513, 64), (1000, 3000, 1)]}
ROWS["cuda"] = [*ROWS["cpu"], (20_000, 40_000, 1)]
WORD = 0xFFFFFFFF


def check(op: str, family: random.Random, rng: random.Random, device: str) -> tuple[str, list[float]]:
    """The case's description, and its errors as multiples of their tolerance.

    `family` chooses what kernels are compiled for, `rng` sizes and values. A result that does not repeat bit for bit
    counts as an infinite error, as does one that is not exact where it has to be.
    """
    text, errors = _CHECKS[op](Draw(op, family, rng, device))
    return f"{op} {text}", errors


class Draw:
    """Random choices of a case, and tensors in random layouts.

    Attributes:
        family, rng: for what a family of cases shares, and for what is a case's own.
        dtype, backend: the family's.
    """

    def __init__(self, op: str, family: random.Random, rng: random.Random, device: str) -> None:
        self.family, self.rng, self.device = family, rng, device
        self.values = torch.Generator(device).manual_seed(rng.getrandbits(48))
        self.dtype = family.choice(DTYPES[device])
        registered = "diagonal_metrics" if op == "diagonal_metrics_batch" else op
        self.backend = "torch"
        if registered in _backend.registered_ops():
            # Not the reference, and Triton not on a CPU, where its interpreter takes seconds.
            left_out = {"torch"} if device == "cuda" else {"torch", "triton"}
            names = [name for name in _backend.backends_of(registered) if name not in left_out]
            served = [name for name in names if _backend.why_not(registered, name, device, self.dtype) is None]
            self.backend = family.choice([*served[:1], *served] or ["torch"])  # the best twice as often

    def size(self, kinds: Sequence[tuple[int, int, int]]) -> int:
        return self.rng.randrange(*self.family.choice(kinds))

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of a random scale; the columns' scales differ at times."""
        dtype = dtype or self.dtype
        drawn = torch.randn(shape, generator=self.values, device=self.device, dtype=torch.float64)
        drawn *= self.rng.choice(SMALL_SCALES if dtype == torch.float16 else SCALES)
        if shape and self.rng.random() < 0.3:
            drawn *= 10 ** (torch.rand(shape[-1], generator=self.values, device=self.device) * 2 - 1)
        if self.rng.random() < 0.1:
            drawn = drawn.abs()  # sums of one sign show what is cut off of them
        return drawn.to(dtype)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same values: contiguous, off the boundary that wide loads need, transposed, or with gaps."""
        layout = self.family.choice(["contiguous", "contiguous", "shifted", "transposed", "sliced"])
        if layout == "shifted":
            return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
        if layout == "transposed" and tensor.dim() > 1:
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "sliced" and tensor.dim() > 0:
            return tensor.repeat_interleave(2, dim=-1)[..., ::2]
        return tensor

    def out(self, *shape: int) -> Tensor | None:
        """Sums to add to, or None."""
        kind = self.family.choice([None, None, torch.float32, torch.float64])
        return None if kind is None else self.normal(*shape, dtype=torch.float64).abs().to(kind)

    def twice(self, call: Callable[[Tensor | None], Tensor], out: Tensor | None) -> tuple[Tensor, bool]:
        """What `call` gives with a copy of `out`, and whether it does so again, bit for bit."""
        with use_backend(self.backend):
            first, second = (call(None if out is None else out.clone()) for _ in range(2))
        return first, torch.equal(first, second)


def _errors(
    got: Tensor, repeats: bool, exact: Tensor, bound: Tensor, dtype: torch.dtype, of_element: float | None = None
) -> list[float]:
    """The error by norm, and the largest of an element relative to its `bound`, the exact sum of its terms' sizes.

    `dtype` is that of the op's inputs, by which it chooses what it sums in; `of_element` an element's own tolerance.
    """
    tolerance = max(TOLERANCE[accumulator_dtype(dtype)], TOLERANCE[got.dtype])
    if got.shape != exact.shape or not repeats:
        return [math.inf]
    if not got.numel():
        return []
    difference = (got.double() - exact).abs()
    by_element = torch.where(difference == 0, 0.0, difference / bound)
    norm = float(exact.norm())
    return [float(difference.norm()) / (tolerance * norm or 1.0), float(by_element.max()) / (of_element or tolerance)]


def _fisher_diag(draw: Draw) -> tuple[str, list[float]]:
    rng, family = draw.rng, draw.family
    mode = family.choice(MODES)
    form = family.choice(["packed", "packed", "padded"])
    other = draw.dtype if family.random() < 0.8 else torch.float32
    kinds = WIDE if family.random() < 0.5 else FEATURES
    in_features, out_features = draw.size(kinds), draw.size(kinds)
    lengths = _lengths(draw)
    terms = rng.randint(1, 3)
    width = max(lengths, default=0) + rng.choice([0, 0, 1, 5])
    rows = [len(lengths), width] if form == "padded" else [sum(lengths)]
    x = draw.normal(*rows, in_features)
    g = draw.normal(*([terms] if mode == "per_loss_term" else []), *rows, out_features, dtype=other)
    # Positions behind a sequence's end do not count, whatever they hold.
    ends = torch.tensor(lengths, dtype=torch.int64, device=draw.device)
    counted = torch.arange(width, device=draw.device) < ends.unsqueeze(1)
    if form == "padded":
        x = torch.where(counted.unsqueeze(-1), x, math.nan)
        g = torch.where(counted.unsqueeze(-1), g, math.inf)
    x, g, out = draw.laid_out(x), draw.laid_out(g), draw.out(out_features, in_features)
    given = family.choice([lengths, ends, ends.cpu()])
    text = (
        f"{mode} x {tuple(x.shape)} strides {x.stride()} {x.dtype}, gradient {tuple(g.shape)} strides {g.stride()} "
        f"{g.dtype}, lengths {lengths}, out {None if out is None else out.dtype}, backend {draw.backend}"
    )
    rounds = draw.backend == "triton" and mode == "per_position" and family.random() < 0.8
    with _squares_of_large_products() if rounds else contextlib.nullcontext():
        got, repeats = draw.twice(lambda out: fisher_diag(x, g, mode=mode, lengths=given, out=out), out)
    if rounds:
        text += ", squares rounded on Hopper"

    # In the dtype that the op brings both to.
    common = torch.promote_types(x.dtype, g.dtype)
    x, g = x.to(common).double(), g.to(common).double()
    if form == "padded":
        x, g = x[counted], g[..., counted, :]
    total = torch.zeros(out_features, in_features, dtype=torch.float64, device=draw.device)
    exact, bound = (total.clone() if out is None else out.double() for _ in range(2))
    for term in g if mode == "per_loss_term" else [g]:
        for x_n, g_n in zip(x.split(lengths), term.split(lengths), strict=True):
            if mode == "per_position":
                exact = exact + g_n.square().T @ x_n.square()
            else:
                exact = exact + (g_n.T @ x_n).square()
                bound = bound + (g_n.abs().T @ x_n.abs()).square()
    if rounds:
        # Rounded squares keep the tolerance by norm. They have 11 bits each, and so have the corrections, which are
        # of the size of the columns' sums.
        bound = exact + 2**-12 * torch.outer(g.square().sum(0), x.square().sum(0))
        return text, _errors(got, repeats, exact, bound, common, of_element=2**-11)
    return text, _errors(got, repeats, exact, exact if mode == "per_position" else bound, common)


def _squares_of_large_products() -> contextlib.AbstractContextManager[None]:
    """Lets products of any size take the form that large ones take; those are too slow to check many of."""
    return mock.patch.object(importlib.import_module("sensilora.kernels.fisher_diag"), "SQUARES_MIN_WORK", 0)


def _lengths(draw: Draw) -> list[int]:
    """Lengths of sequences: alike, ragged with empty ones, many short ones, one long one, none."""
    rng = draw.rng
    kind = draw.family.choice(["alike", "ragged", "ragged", "short", "tiles", "long", "few"])
    if kind == "alike":
        return [rng.randint(1, 200)] * rng.randint(1, 12)
    if kind == "ragged":
        return [rng.choice([0, 1, rng.randint(1, 90), rng.randint(1, 500)]) for _ in range(rng.randint(1, 9))]
    if kind == "short":
        return [rng.randint(0, 4) for _ in range(rng.randint(20, 120))]
    if kind == "tiles":
        return [64 * rng.randint(0, 5) for _ in range(rng.randint(1, 9))]
    if kind == "few":
        return [0] * rng.randint(0, 2) + [1] * rng.randint(0, 2)
    # A GPU takes the squares of single positions 16384 at a time.
    return [rng.randint(16_000, 18_000) if draw.device == "cuda" and rng.random() < 0.2 else rng.randint(1000, 3000)]


def _rows_and_mask(draw: Draw) -> tuple[Tensor, Tensor | None]:
    """x with a mask or None; rows that do not count hold NaN."""
    rng, family = draw.rng, draw.family
    shape = [draw.size(ROWS[draw.device]), draw.size(FEATURES)]
    if family.random() < 0.3:
        shape = [rng.randint(1, 4), shape[0] // 3, shape[1]]
    x, mask = draw.normal(*shape), None
    if family.random() < 0.5:
        counted = torch.rand(shape[:-1], generator=draw.values, device=draw.device)
        mask = counted < rng.choice([0.0, 0.5, 0.9, 1.0])
        x = torch.where(mask.unsqueeze(-1), x, math.nan)
        mask = draw.laid_out(mask)
    return draw.laid_out(x), mask


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows that count, in fp64."""
    return (x.flatten(0, -2) if mask is None else x[mask]).double()


def _autocorrelation_diag(draw: Draw) -> tuple[str, list[float]]:
    x, mask = _rows_and_mask(draw)
    out = draw.out(x.shape[-1])
    text = (
        f"x {tuple(x.shape)} strides {x.stride()} {x.dtype}, mask {mask is not None}, "
        f"out {None if out is None else out.dtype}, backend {draw.backend}"
    )
    got, repeats = draw.twice(lambda out: autocorrelation_diag(x, mask=mask, out=out), out)
    exact = _counted(x, mask).square().sum(0)
    if out is not None:
        exact += out
    return text, _errors(got, repeats, exact, exact, x.dtype)


def _autocorrelation_blocks(draw: Draw) -> tuple[str, list[float]]:
    x, mask = _rows_and_mask(draw)
    features = x.shape[-1]
    size = draw.rng.choice([1, 7, 16, 64, 128, features, features + 3])
    text = f"x {tuple(x.shape)} strides {x.stride()} {x.dtype}, mask {mask is not None}, block {size}"
    got, repeats = draw.twice(lambda _: autocorrelation_blocks(x, size, mask=mask), None)
    exact, bound = [], []
    block = min(size, features)
    for part in _counted(x, mask).split(block, dim=1):
        part = torch.nn.functional.pad(part, (0, block - part.shape[1]))
        exact.append(part.T @ part)
        bound.append(part.abs().T @ part.abs())
    return text, _errors(got, repeats, torch.stack(exact), torch.stack(bound), x.dtype)


def _signs(size: int, seed: int, offset: int) -> np.ndarray:
    """fp64 (size,) of -1 and 1, as the docstring of sensilora/ops/hutchinson.py defines them."""
    call = np.arange(-(-size // 128), dtype=np.uint64)
    low, high = (np.full_like(call, word) for word in (offset & WORD, offset >> 32 & WORD))
    counter = [call & WORD, call >> 32, low, high]
    key = [seed & WORD, seed >> 32 & WORD]
    for _ in range(7):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            second >> 32 ^ counter[1] ^ key[0], second & WORD, first >> 32 ^ counter[3] ^ key[1], first & WORD,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    bits = np.stack(counter, axis=1)[:, :, None] >> np.arange(32, dtype=np.uint64) & 1
    return 1.0 - 2.0 * bits.reshape(-1)[:size]


def _shape(draw: Draw) -> tuple[int, ...]:
    """Of few and of many elements, in none to three dimensions."""
    rng = draw.rng
    kind = draw.family.choice(["one", "flat", "matrix", "edge"])
    if kind == "one":
        return rng.choice([(), (1,), (0,), (3, 0), (2, 1, 3)])
    if kind == "edge":
        return (max(0, rng.choice([32, 128, 2048, 4096]) * rng.randint(1, 9) + rng.randint(-1, 1)),)
    return (rng.randint(1, 200_000),) if kind == "flat" else (rng.randint(1, 500), rng.randint(1, 600))


def _word(draw: Draw) -> int:
    """Of 64 bits, signed or not."""
    rng = draw.rng
    return rng.choice([0, 1, rng.getrandbits(31), rng.getrandbits(64), -rng.getrandbits(63), 2**64 - 1, -(2**63)])


def _hutchinson_accumulate(draw: Draw) -> tuple[str, list[float]]:
    shape, seed, offset = _shape(draw), _word(draw), _word(draw)
    hz = draw.laid_out(draw.normal(*shape))
    out = draw.normal(*shape, dtype=draw.family.choice([torch.float32, torch.float64]))
    text = (
        f"hz {shape} strides {hz.stride()} {hz.dtype}, out {out.dtype}, seed {seed}, offset {offset}, "
        f"backend {draw.backend}"
    )
    got, repeats = draw.twice(lambda out: hutchinson_accumulate(hz, out, seed=seed, offset=offset), out)
    z = torch.from_numpy(_signs(hz.numel(), seed, offset)).view(shape).to(draw.device, out.dtype)
    return text, [0.0 if repeats and torch.equal(got, out + z * hz.to(out.dtype)) else math.inf]


def _rademacher(draw: Draw) -> tuple[str, list[float]]:
    shape, seed, offset = _shape(draw), _word(draw), _word(draw)
    text = f"{shape} {draw.dtype}, seed {seed}, offset {offset}, backend {draw.backend}"
    got, repeats = draw.twice(
        lambda _: rademacher(shape, seed=seed, offset=offset, dtype=draw.dtype, device=draw.device), None
    )
    z = torch.from_numpy(_signs(got.numel(), seed, offset)).view(shape)
    return text, [0.0 if repeats and got.dtype == draw.dtype and torch.equal(got.cpu().double(), z) else math.inf]


def _diagonal(draw: Draw, size: int) -> tuple[str, Tensor]:
    """Non-negative values and what kind they are; some kinds are hard for a selection by bit patterns."""
    rng, device = draw.rng, draw.device
    largest = min(torch.finfo(draw.dtype).max, torch.finfo(torch.float32).max)

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        drawn = torch.rand(size, generator=draw.values, device=device, dtype=torch.float64)
        return low + (high - low) * drawn

    kind = rng.choice(
        ["spread", "spread", "narrow", "ties", "equal", "zeros", "mostly zeros", "one huge", "subnormal", "exponents",
         "largest", "negative zeros"]
    )  # fmt: skip
    if kind in ("spread", "negative zeros"):
        found = uniform(-12, 3).exp()
    elif kind == "narrow":
        found = uniform(1, 1 + 2.0 ** -rng.randint(1, 10))
    elif kind == "ties":
        found = uniform(0, rng.randint(1, 6)).ceil() * rng.choice([0.1, 1.0, 3e-5])
    elif kind == "mostly zeros":
        found = uniform() * (uniform() < rng.choice([0.001, 0.01, 0.3]))
    elif kind == "subnormal":
        found = uniform() * torch.finfo(draw.dtype if draw.dtype != torch.float64 else torch.float32).tiny
    elif kind == "exponents":
        found = 2.0 ** uniform(-149, 128)
    else:
        value = {"equal": rng.choice([0.1, 1.0, 1e-30, 3.0]), "one huge": 1e-3, "largest": largest}.get(kind, 0.0)
        found = torch.full((size,), value, device=device, dtype=torch.float64)
    if kind == "one huge" and size:
        found[rng.randrange(size)] = largest
    found = found.clamp(max=largest).to(draw.dtype)
    if kind == "negative zeros":
        found = torch.where(uniform() < 0.5, -torch.zeros_like(found), found)
    if found.numel() % 2 == 0 and rng.random() < 0.3:
        found = found.view(2, -1)
    return kind, draw.laid_out(found)


def _fraction(rng: random.Random) -> float:
    return rng.choice([0.5, 0.85, 1.0, 1 / 3, 1e-9, rng.uniform(1e-6, 1), rng.uniform(1e-6, 1)])


def _metrics(draw: Draw, count: int, most: int) -> tuple[str, list[float]]:
    """Of a batch of `count` diagonals; now and then with one that is told by name."""
    rng = draw.rng
    k, alpha = _fraction(rng), _fraction(rng)
    kinds, diags = zip(*(_diagonal(draw, _diagonal_size(rng, most)) for _ in range(count)), strict=True)
    filled = [index for index, diag in enumerate(diags) if diag.numel()]
    bad = rng.choice([math.nan, math.inf, -math.inf, -1.0]) if filled and rng.random() < 0.1 else None
    where = -1
    if bad is not None:
        where = rng.choice(filled)
        place = tuple(rng.randrange(length) for length in diags[where].shape)
        diags[where][place] = bad
    sizes = [(kind, tuple(diag.shape)) for kind, diag in zip(kinds, diags, strict=True)]
    text = f"{sizes} {draw.dtype}, k {k}, alpha {alpha}, {bad} in {where}, backend {draw.backend}"
    if bad is not None:
        return text, [0.0 if _is_told(draw, diags, where, bad) else math.inf]
    with use_backend(draw.backend):
        if count == 1:
            found, again = ([value.view(1) for value in diagonal_metrics(diags[0], k=k, alpha=alpha)] for _ in "ab")
        else:
            found, again = (diagonal_metrics_batch(diags, k=k, alpha=alpha) for _ in range(2))
    repeats = all(torch.equal(first, second) for first, second in zip(found, again, strict=True))
    errors = [0.0 if repeats else math.inf]
    for diag, trace, topk_mean, effective_rank in zip(diags, *(values.tolist() for values in found), strict=True):
        values = diag.double().flatten().sort(descending=True).values.tolist()
        errors += _metrics_errors(values, k, alpha, trace, topk_mean, effective_rank, exact=draw.backend != "torch")
    return text, errors


def _diagonal_size(rng: random.Random, most: int) -> int:
    """At most about `most`; some beside the sizes of tiles, few of none."""
    if rng.random() < 0.1:
        return rng.randint(0, 2)
    if rng.random() < 0.3:
        return max(0, 2 ** rng.randint(0, int(math.log2(most))) + rng.randint(-1, 1))
    return int(math.exp(rng.uniform(0, math.log(most))))


def _is_told(draw: Draw, diags: Sequence[Tensor], where: int, bad: float) -> bool:
    name = f"diags[{where}] " if len(diags) > 1 else "diag "
    try:
        with use_backend(draw.backend):
            diagonal_metrics_batch(diags)
    except (NonFiniteError, ValueError) as error:
        return isinstance(error, NonFiniteError) == (not math.isfinite(bad)) and str(error).startswith(name)
    return False


def _metrics_errors(
    values: list[float], k: float, alpha: float, trace: float, topk_mean: float, effective_rank: int, *, exact: bool
) -> list[float]:
    """Of the metrics of descending `values`. `math.fsum` rounds once, so that its signs and its sums are exact."""
    if not values:
        return [0.0 if (trace, topk_mean, effective_rank) == (0.0, 0.0, 0) else math.inf]
    total, count = math.fsum(values), topk_count(len(values), k)
    mean = math.fsum(values[:count]) / count
    target = alpha * total
    if exact:
        if math.fsum([*values, -target]) < 0:  # rounded up, it is above the sum of all
            enough = effective_rank == sum(value > 0 for value in values)
        else:
            least = effective_rank == 0 or math.fsum([*values[: effective_rank - 1], -target]) < 0
            enough = least and math.fsum([*values[:effective_rank], -target]) >= 0
        return [0.0 if trace == total and topk_mean == mean and enough else math.inf]
    # Sums in fp64 that are rounded at every step.
    slack = 1e-12
    least = effective_rank == 0 or math.fsum(values[: effective_rank - 1]) < target * (1 + slack)
    reached = math.fsum(values[:effective_rank]) >= target * (1 - slack) and (effective_rank > 0 or total == 0)
    sums = [abs(trace - total) / (total or 1.0), abs(topk_mean - mean) / (mean or 1.0)]
    return [0.0 if least and reached else math.inf, *(error / TOLERANCE[torch.float64] for error in sums)]


def _diagonal_metrics(draw: Draw) -> tuple[str, list[float]]:
    return _metrics(draw, 1, 300_000)


def _diagonal_metrics_batch(draw: Draw) -> tuple[str, list[float]]:
    # The number of diagonals, rounded up to a power of two, is compiled in.
    most = draw.family.choice([2, 4, 32])
    return _metrics(draw, draw.rng.randint(most // 2 + 1, most), 40_000)


_CHECKS: dict[str, Callable[[Draw], tuple[str, list[float]]]] = {
    "fisher_diag": _fisher_diag,
    "autocorrelation_diag": _autocorrelation_diag,
    "autocorrelation_blocks": _autocorrelation_blocks,
    "hutchinson_accumulate": _hutchinson_accumulate,
    "rademacher": _rademacher,
    "diagonal_metrics": _diagonal_metrics,
    "diagonal_metrics_batch": _diagonal_metrics_batch,
}
