"""fisher_diag. Limit: the FLOPs of the weight gradient, 2 tokens·in·out.

On the CPU the baseline is the torch reference; on a GPU one weight gradient of the whole batch by cuBLAS, which the
squares of single sequences can at best equal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Case, Cases, relative_error, through
from sensilora import use_backend
from sensilora.ops import fisher_diag
from sensilora.ops.fisher_diag import CONVENTIONS

# (sequences, positions, in, out)
CPU_SHAPES = [(16, 64, 384, 384), (16, 64, 384, 1536), (16, 128, 1536, 384)]
UNIFORM = (512,) * 16
# 32 sequences of 17 to 512 tokens, 8192 together.
RAGGED = (
    512, 17, 301, 128, 489, 77, 256, 333, 19, 410, 64, 205, 500, 91, 372, 33,
    268, 449, 150, 23, 397, 310, 111, 476, 58, 243, 350, 182, 505, 29, 433, 401,
)  # fmt: skip


def cases(device: str) -> Cases:
    if device == "cpu":
        return {
            f"cpu/fisher/{mode}/{in_features}x{out_features}/n{sequences}_t{positions}/{name}": (
                partial(
                    _case, device, mode, (positions,) * sequences, in_features, out_features, getattr(torch, name)
                )
            )
            for mode in CONVENTIONS
            for sequences, positions, in_features, out_features in CPU_SHAPES
            for name in ("float32", "bfloat16")
        }
    found: Cases = {
        f"fisher/{mode}/4096x{out_features}/{name}": partial(_case, device, mode, lengths, 4096, out_features)
        for mode, out_features, name, lengths in (
            ("per_sequence", 4096, "n16_t512", UNIFORM),
            ("per_sequence", 14336, "n16_t512", UNIFORM),
            ("per_sequence", 4096, "ragged", RAGGED),
            ("per_sequence", 4096, "n8_t1024", (1024,) * 8),
            ("per_sequence", 4096, "n4_t2048", (2048,) * 4),
            ("per_position", 4096, "n16_t512", UNIFORM),
        )
    }
    # What rounding squares costs depends on the data: here squared norms of tokens' gradients are lognormal.
    found["fisher/per_position/4096x4096/uneven_tokens"] = partial(
        _case, device, "per_position", UNIFORM, 4096, 4096, token_sigma=1.0
    )
    # On Hopper the native extension is picked for per_sequence, Triton for the rest.
    for name, case in list(found.items()):
        if "per_sequence" in name:
            found[f"{name}/triton"] = partial(_through, "triton", case)
        elif not name.endswith("uneven_tokens"):
            found[f"{name}/native"] = partial(_through, "native", case)
    return found


def _through(backend: str, case: Callable[[], Case]) -> Case:
    return through(case(), backend, "fisher_diag")


def _case(
    device: str,
    mode: str,
    lengths: tuple[int, ...],
    in_features: int,
    out_features: int,
    dtype: torch.dtype = torch.bfloat16,
    token_sigma: float = 0.0,
) -> Case:
    tokens, sizes = sum(lengths), torch.tensor(lengths)
    x = torch.randn(tokens, in_features, device=device, dtype=dtype)
    grad = torch.randn(tokens, out_features, device=device, dtype=dtype)
    if token_sigma:
        grad *= (token_sigma / 2 * torch.randn(tokens, 1, device=device)).exp().to(dtype)

    def on(backend: str, *tensors: torch.Tensor) -> torch.Tensor:
        with use_backend(backend):
            return fisher_diag(*tensors, mode=mode, lengths=sizes)

    def weight_gradient() -> torch.Tensor:
        return grad.T @ x

    def reference() -> torch.Tensor:
        return on("torch", x, grad)

    def stored() -> torch.Tensor:
        """Every sequence's gradient at once, in the inputs' dtype."""
        n = len(lengths)
        gradients = torch.bmm(grad.view(n, -1, out_features).mT, x.view(n, -1, in_features))
        return gradients.float().square_().sum(0)

    def squares() -> torch.Tensor:
        """One product of squares in the inputs' dtype."""
        return grad.square().T @ x.square()

    peers = {"one weight gradient": weight_gradient}
    if device == "cuda":
        peers = {"torch, sequence by sequence": reference}
        if mode == "per_position":
            peers = {"squares in bf16": squares}
        elif len(set(lengths)) == 1 and out_features == in_features:
            peers["bmm, all gradients stored"] = stored
    return Case(
        ours=lambda: fisher_diag(x, grad, mode=mode, lengths=sizes),
        baseline=reference if device == "cpu" else weight_gradient,
        errors=lambda: [
            relative_error(fisher_diag(x, grad, mode=mode, lengths=sizes), on("torch", x.double(), grad.double()))
        ],
        tolerance=1e-5,
        peers=peers,
        floor_flops=2 * tokens * in_features * out_features,
    )


def test_fisher_diag(timed) -> None:
    timed()
