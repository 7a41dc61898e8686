"""Random cases of the LoRA ops, with fp64 of the plain formula: shapes, ranks, dtypes, layouts, dropout, backends.

Run by benchmarks/fuzz.py.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sensilora import use_backend
from sensilora.ops import _backend, lora_group, lora_linear, lora_segments, lora_update
from sensilora.ops._dropout import keep_mask, keep_scale

OPS = (
    "lora_linear", "lora_linear", "lora_group", "lora_linear", "lora_segments", "lora_linear", "lora_update",
    "lora_linear",
)  # fmt: skip
# Errors relative to the root of the summed squares of all terms, which random signs do not cancel.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2.5e-3, torch.bfloat16: 1.6e-2}
DTYPES = {
    "cpu": [torch.float32, torch.bfloat16, torch.float64, torch.float16],
    "cuda": [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, torch.float64],
}
# Sizes as (first, stop, step). From 2048 rows on, a product of its own serves on some GPUs.
ROWS = {
    "cpu": [(0, 3, 1), (3, 64, 2), (16, 65, 16), (65, 300, 2), (64, 700, 16)],
    "cuda": [(0, 3, 1), (3, 64, 2), (16, 65, 16), (65, 300, 2), (64, 700, 16), (2048, 2600, 16), (2049, 2600, 2)],
}
FEATURES = [(1, 40, 2), (8, 512, 16), (16, 513, 16), (16, 513, 16), (41, 300, 2)]
RANKS = [
    (0, 1, 1), (1, 2, 1), (2, 16, 1), (2, 16, 1), (16, 17, 1), (17, 32, 1), (32, 65, 16), (33, 64, 1), (65, 128, 1),
    (80, 129, 16), (129, 512, 1), (144, 513, 16),
]  # fmt: skip


@dataclass(frozen=True)
class Update:
    """Rows `start` to `stop` of output `output` get s (drop(x) Aᵀ) Bᵀ.

    A is `rank` rows from `first` on of the A numbered `adapter`, and B as many columns of its B.
    """

    output: int
    start: int
    stop: int
    adapter: int
    first: int
    rank: int
    scaling: float
    p: float
    seed: int


@dataclass(frozen=True)
class Problem:
    """One drawn case: its tensors, the op's call, and what the formula needs besides."""

    text: str
    backend: str | None
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    upstreams: list[Tensor]
    updates: list[Update]
    call: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
    need_grad_x: bool
    base: Tensor | None = None  # what updates are added to, where that is not x Wᵀ + b


def draw(op: str, family: random.Random, rng: random.Random, device: str) -> Problem:
    """A case of `op`: by `family` what kernels are compiled for, by `rng` its sizes and values."""
    values = torch.Generator(device).manual_seed(rng.getrandbits(48))
    dtype = family.choice(DTYPES[device])
    adapter_dtype = family.choice([dtype, torch.float32])
    servers = [name for name in ("triton", "native") if _backend.why_not(op, name, device, dtype) is None]
    if device == "cpu":
        servers = [name for name in servers if name != "triton"]  # its interpreter takes seconds
    # None leaves the choice to the op, which makes small calls on a GPU from plain products.
    backend = family.choice([*servers, None] if servers else ["torch"])
    outputs = family.choice([2, 2, 3, 4]) if op == "lora_group" else 1
    adapters = family.randint(1, 6) if op == "lora_segments" else outputs
    need_grad_x = family.random() < 0.8

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=values, device=device) * scale).to(dtype)

    def matrix(rows: int, columns: int, scale: float, dtype: torch.dtype, layout: str) -> Tensor:
        """Contiguous, stored transposed, or every second column of a wider one."""
        if layout == "transposed":
            return normal(columns, rows, scale=scale, dtype=dtype).t()
        step = 2 if layout == "sliced" else 1
        return normal(rows, step * columns, scale=scale, dtype=dtype)[:, ::step]

    def layout() -> str:
        return family.choice(["contiguous", "contiguous", "transposed", "sliced"])

    rows = rng.randrange(*family.choice(ROWS[device]))
    in_features = rng.randrange(*family.choice(FEATURES))
    out_features = [rng.randrange(*family.choice(FEATURES)) for _ in range(outputs)]
    ranks = [rng.randrange(*family.choice(RANKS)) for _ in range(adapters)]
    # Segments share one stack of adapters.
    sizes = list(zip(out_features, [sum(ranks)] if op == "lora_segments" else ranks, strict=True))
    x = _laid_out(family, normal(rows, in_features))
    weights = [matrix(out, in_features, in_features**-0.5, dtype, layout()) for out in out_features]
    biases = [normal(out) if family.random() < 0.5 else None for out in out_features]
    lora_As = [matrix(rank, in_features, in_features**-0.5, adapter_dtype, layout()) for _, rank in sizes]
    lora_Bs = [matrix(out, rank, max(rank, 1) ** -0.5, adapter_dtype, layout()) for out, rank in sizes]
    base = None
    if op == "lora_update":
        base = normal(*x.shape[:-1], *out_features, dtype=family.choice([dtype, dtype, adapter_dtype]))
    like = x if base is None else base
    upstreams = [_upstream(family, normal, (*x.shape[:-1], out)).to(like.dtype) for out in out_features]
    scalings = [rng.choice([0.25, 1.0, 2.0, 0.7]) for _ in range(adapters)]
    dropped = [family.random() < 0.5 for _ in range(adapters)]
    # 3e-5 rounds to the smallest threshold, 1.
    ps = [rng.choice([0.05, 0.05, 0.1, 0.5, 1.0, 3e-5]) if drop else 0.0 for drop in dropped]
    seeds = [rng.getrandbits(63) for _ in range(1 if op == "lora_segments" else adapters)]
    key = torch.tensor(seeds, device=device)
    text = (
        f"{op} x {tuple(x.shape)} strides {x.stride()}, out {out_features}, ranks {ranks}, dropout {ps}, {dtype}, "
        f"adapters {adapter_dtype}, bias {[bias is not None for bias in biases]}, backend {backend}"
        f"{'' if base is None else f', base {base.dtype}'}"
    )

    def lora_linear_call(x, lora_As, lora_Bs):
        return [lora_linear(x, weights[0], biases[0], lora_As[0], lora_Bs[0], scalings[0], dropout_p=ps[0], seed=key)]

    def lora_update_call(x, lora_As, lora_Bs):
        return [lora_update(base, x, lora_As[0], lora_Bs[0], scalings[0], dropout_p=ps[0], seed=key)]

    def lora_group_call(x, lora_As, lora_Bs):
        return lora_group(x, weights, biases, list(lora_As), list(lora_Bs), scalings, dropout_ps=ps, seeds=key)

    if op == "lora_segments":
        ends = sorted(rng.randint(0, rows) for _ in range(rng.randint(2, 8)))
        chosen = [rng.randint(-1, adapters - 1) for _ in ends[1:]]
        offsets, which = torch.tensor(ends, device=device), torch.tensor(chosen, device=device)
        text += f", segments {ends} of adapters {chosen}"

        def lora_segments_call(x, lora_As, lora_Bs):
            return [
                lora_segments(
                    x, weights[0], biases[0], lora_As[0], lora_Bs[0], ranks, scalings, offsets, which,
                    dropout_ps=ps, seed=key,
                )
            ]  # fmt: skip

        firsts = [sum(ranks[:i]) for i in range(adapters)]
        updates = [
            Update(0, start, stop, 0, firsts[i], ranks[i], scalings[i], ps[i], seeds[0])
            for start, stop, i in zip(ends, ends[1:], chosen, strict=False)
            if i >= 0
        ]
        call = lora_segments_call
    else:
        updates = [Update(i, 0, rows, i, 0, ranks[i], scalings[i], ps[i], seeds[i]) for i in range(adapters)]
        calls = {"lora_linear": lora_linear_call, "lora_update": lora_update_call, "lora_group": lora_group_call}
        call = calls[op]
    return Problem(text, backend, x, weights, biases, lora_As, lora_Bs, upstreams, updates, call, need_grad_x, base)


def _laid_out(family: random.Random, x: Tensor) -> Tensor:
    """x (rows, in_features) as it is, or in three dimensions, or behind strides."""
    layout = family.choice(["plain", "plain", "plain", "3d", "transposed", "sliced"])
    rows, in_features = x.shape
    if layout == "3d":
        return x.view(1, rows, in_features) if rows % 2 else x.view(2, rows // 2, in_features)
    if layout == "transposed":
        return x.t().contiguous().t()
    return x.repeat_interleave(2, dim=1)[:, ::2] if layout == "sliced" else x


def _upstream(family: random.Random, normal: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
    """Contiguous, one number everywhere with strides of zero (the gradient of a sum), or stored transposed."""
    layout = family.choice(["plain", "plain", "sum", "transposed"])
    if layout == "sum":
        return normal(1).expand(shape)
    if layout == "transposed":
        return normal(*reversed(shape)).permute(*reversed(range(len(shape))))
    return normal(*shape)


def results(
    problem: Problem, call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], upstreams
) -> list[Tensor]:
    """Outputs, then the gradients of the A's, the B's and, where it is wanted, x."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    if not problem.need_grad_x:
        leaves[0].requires_grad_(False)
    count = len(problem.lora_As)
    outputs = call(leaves[0], leaves[1 : 1 + count], leaves[1 + count :])
    wanted = leaves[1:] + leaves[: problem.need_grad_x]
    # The formula's outputs without an adapter depend on nothing that is differentiated by.
    differentiable = [pair for pair in zip(outputs, upstreams, strict=True) if pair[0].requires_grad]
    grads = [torch.zeros_like(leaf) for leaf in wanted]
    if differentiable:
        roots, root_grads = zip(*differentiable, strict=True)
        grads = torch.autograd.grad(roots, wanted, root_grads, allow_unused=True, materialize_grads=True)
    return [*(output.detach() for output in outputs), *grads]


def formula(problem: Problem, power: int) -> list[Tensor]:
    """The plain expression and its gradients in fp64; with power 2, of the squares of every factor."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().double() ** power

    def call(x, lora_As, lora_Bs):
        folded = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        found = [
            linear(folded, wide(weight), None if bias is None else wide(bias))
            for weight, bias in zip(problem.weights, problem.biases, strict=True)
        ]
        if problem.base is not None:
            found = [wide(problem.base).reshape(found[0].shape)]
        for update in problem.updates:
            dropped = folded
            if update.p:
                kept = keep_mask(*folded.shape, update.p, update.seed, folded.device)
                dropped = folded * (kept.double() * keep_scale(update.p)) ** power
            lora_A = lora_As[update.adapter][update.first : update.first + update.rank]
            lora_B = lora_Bs[update.adapter][:, update.first : update.first + update.rank]
            added = linear(linear(dropped[update.start : update.stop], lora_A), lora_B) * update.scaling**power
            above, below = update.start, folded.shape[0] - update.stop
            found[update.output] = found[update.output] + pad(added, (0, 0, above, below))
        return [y.reshape(*x.shape[:-1], y.shape[1]) for y in found]

    inputs = [wide(tensor) for tensor in (problem.x, *problem.lora_As, *problem.lora_Bs)]
    return results(problem, call, inputs, [wide(upstream) for upstream in problem.upstreams])


def check(op: str, family: random.Random, rng: random.Random, device: str) -> tuple[str, list[float]]:
    """The case's description, and the errors of its outputs and gradients as multiples of their tolerance.

    A result that does not repeat bit for bit counts as an infinite error.
    """
    problem = draw(op, family, rng, device)
    inputs = (problem.x, *problem.lora_As, *problem.lora_Bs)
    with contextlib.nullcontext() if problem.backend is None else use_backend(problem.backend):
        got = results(problem, problem.call, inputs, problem.upstreams)
        again = results(problem, problem.call, inputs, problem.upstreams)
    errors = []
    for value, repeated, exact, squares in zip(got, again, formula(problem, 1), formula(problem, 2), strict=True):
        if value.numel() == 0:
            continue
        same = torch.equal(value, repeated)
        scale = float(squares.sum().sqrt())
        error = float((value.double() - exact).norm())
        tolerance = max(TOLERANCE[value.dtype], TOLERANCE[problem.x.dtype]) * (scale or 1.0)
        errors.append(error / tolerance if same else float("inf"))
    return problem.text, errors
