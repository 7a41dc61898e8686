"""Diagonal of the Fisher information of a linear layer's weight, from the layer's inputs and output gradients."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sensilora.ops import _backend
from sensilora.ops._backend import Implementation, accumulator_dtype

#: What the kernels compute.
CONVENTIONS = ("per_sequence", "per_position")
MODES = (*CONVENTIONS, "per_loss_term")


def fisher_diag(
    x: Tensor,
    grad_output: Tensor,
    *,
    mode: str = "per_sequence",
    lengths: Tensor | list[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sum over sequences of the squared gradient of a linear layer's weight.

    With X_n (T_n, in) a sequence's layer inputs and G_n (T_n, out) the gradient of that sequence's *own*
    sum-reduced loss at the layer's output:

    - ``per_sequence``: Σ_n (G_nᵀ X_n)², squared after the sum over positions;
    - ``per_position``: Σ_n (G_n∘G_n)ᵀ (X_n∘X_n), which drops the terms between positions. On Hopper GPUs large
      products of 16-bit inputs round squares where that keeps the error below 1e-5 of the result's norm; how much
      time this saves depends on the data;
    - ``per_loss_term``: Σ_l Σ_n (G_{l,n}ᵀ X_n)², with G_{l,n} the gradient of sequence n's l-th term alone
      (curvlinops' convention, where each label of a language model is a datum). The same as ``per_sequence`` on every
      term in turn, and as many products.

    The Fisher diagonal of Sensitivity-LoRA's metrics is this sum divided by the number of sequences
    (squares and sums in fp32 at least: squares of fp16 gradients underflow).

    Args:
        x: (N, T, in_features), or packed sequences (tokens, in_features); fp64, fp32, bf16 or fp16.
        grad_output: like `x` with out_features last; for ``per_loss_term`` with the terms as one more dimension, the
            first: (L, N, T, out_features) or (L, tokens, out_features), zero where a sequence has fewer than L terms.
        mode: ``"per_sequence"``, ``"per_position"`` or ``"per_loss_term"``.
        lengths: (N,) integers. Packed input: the sequences' lengths in order, summing to tokens (without it, one
            sequence). Padded input: how many leading positions of each row count (without it, all).
            Best kept on the CPU: a CUDA tensor costs a synchronisation.
        out: fp32 or fp64, (out_features, in_features). The result is *added* to it. Not differentiable.

    Returns:
        (out_features, in_features), fp64 if the inputs are fp64, else fp32; or `out`.
        Differentiable in `x` and `grad_output`.

    Raises:
        ValueError: a shape, dtype, mode or the lengths do not fit.
        BackendError: a backend was asked for that cannot serve.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if mode == "per_loss_term":
        return _per_loss_term(x, grad_output, lengths, out)
    if x.dim() not in (2, 3) or x.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            "x and grad_output must be (N, T, features) or (tokens, features) and agree in all but the last size, "
            f"not {tuple(x.shape)} and {tuple(grad_output.shape)}"
        )
    if not (x.is_floating_point() and grad_output.is_floating_point()) or x.device != grad_output.device:
        raise ValueError(
            f"x and grad_output must be floating-point on one device, not {x.dtype} and {grad_output.dtype}"
        )
    x, grad_output, lengths = _pack(x, grad_output, lengths)
    if out is None:
        return _fisher_diag(x, grad_output, lengths, mode)
    shape = (grad_output.shape[-1], x.shape[-1])
    if out.shape != shape or out.dtype not in (torch.float32, torch.float64) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous fp32 or fp64 of shape {shape}, not {out.dtype} {tuple(out.shape)}")
    if out.device != x.device:
        raise ValueError(f"out must be on x's device {x.device}, not {out.device}")
    _fisher_diag_(x.detach(), grad_output.detach(), lengths, mode, out)
    return out


def _per_loss_term(x: Tensor, grad_output: Tensor, lengths: Tensor | list[int] | None, out: Tensor | None) -> Tensor:
    if grad_output.dim() != x.dim() + 1:
        raise ValueError(
            "per_loss_term takes grad_output (L, N, T, out) for x (N, T, in), or (L, tokens, out) for (tokens, in), "
            f"not {tuple(grad_output.shape)} for {tuple(x.shape)}"
        )
    if out is None:
        dtype = accumulator_dtype(torch.promote_types(x.dtype, grad_output.dtype))
        zero = torch.zeros(grad_output.shape[-1], x.shape[-1], dtype=dtype, device=x.device)
        return sum((fisher_diag(x, term, lengths=lengths) for term in grad_output), zero)
    for term in grad_output:
        fisher_diag(x, term, lengths=lengths, out=out)
    return out


def _pack(x: Tensor, grad_output: Tensor, lengths: Tensor | list[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Bring every accepted form to packed rows and the lengths of their sequences (int64, CPU)."""
    if lengths is not None:
        lengths = torch.as_tensor(lengths).to("cpu")
        if lengths.dim() != 1 or (lengths.numel() and (lengths.is_floating_point() or (lengths < 0).any())):
            raise ValueError("lengths must be one non-negative integer a sequence")
        lengths = lengths.to(torch.int64)
    common = torch.promote_types(x.dtype, grad_output.dtype)
    x, grad_output = x.to(common), grad_output.to(common)
    if x.dim() == 2:
        lengths = torch.tensor([x.shape[0]]) if lengths is None else lengths
        if int(lengths.sum()) != x.shape[0]:
            raise ValueError(f"lengths sum to {int(lengths.sum())} but there are {x.shape[0]} packed rows")
        return x, grad_output, lengths
    sequences, positions, _ = x.shape
    if lengths is None:
        lengths = torch.full((sequences,), positions, dtype=torch.int64)
        return x.flatten(0, 1), grad_output.flatten(0, 1), lengths
    if lengths.shape != (sequences,) or (lengths > positions).any():
        raise ValueError(f"lengths must be {sequences} integers of at most {positions}, not {lengths.tolist()}")
    counted = (torch.arange(positions) < lengths.unsqueeze(1)).to(x.device)
    return x[counted], grad_output[counted], lengths


def _reference(
    x: Tensor, grad_output: Tensor, lengths: Tensor, convention: str, out: Tensor, accumulate: bool
) -> None:
    if not accumulate:
        out.zero_()
    x, grad_output = x.to(out.dtype), grad_output.to(out.dtype)
    if convention == "per_position":
        out += grad_output.square().T @ x.square()
        return
    for x_n, grad_n in zip(x.split(lengths.tolist()), grad_output.split(lengths.tolist()), strict=True):
        out += (grad_n.T @ x_n).square()


def _native(x: Tensor, grad_output: Tensor, lengths: Tensor, convention: str, out: Tensor, accumulate: bool) -> None:
    torch.ops.sensilora_C.fisher_diag(x, grad_output, lengths, CONVENTIONS.index(convention), out, accumulate)


def _triton(x: Tensor, grad_output: Tensor, lengths: Tensor, convention: str, out: Tensor, accumulate: bool) -> None:
    from sensilora.kernels.fisher_diag import launch_fisher_diag

    with torch.cuda.device_of(x):
        launch_fisher_diag(x, grad_output, lengths, convention, out, accumulate)


_backend.register(
    "fisher_diag",
    triton=Implementation(_triton, frozenset({torch.float32, torch.bfloat16, torch.float16})),
    native=Implementation(_native, takes="16-bit rows per sequence on Hopper"),
    torch=Implementation(_reference),
)


def _run(x: Tensor, grad_output: Tensor, lengths: Tensor, convention: str, out: Tensor, accumulate: bool) -> None:
    x, grad_output = x.contiguous(), grad_output.contiguous()
    if convention == "per_sequence" and _backend.forced_backend() is None and _on_hopper(x, grad_output, out):
        implementation = _native
    else:
        implementation = _backend.select("fisher_diag", x.device, x.dtype)
    implementation(x, grad_output, lengths, convention, out, accumulate)


def _on_hopper(x: Tensor, grad_output: Tensor, out: Tensor) -> bool:
    """Whether the CUDA C++ kernel of csrc/fisher_diag_hopper.cuh serves, which is faster than Triton's."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and out.dtype == torch.float32
        and all(t.shape[1] % 8 == 0 and t.data_ptr() % 16 == 0 for t in (x, grad_output))
        and out.data_ptr() % 8 == 0
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and _backend.why_not("fisher_diag", "native", "cuda", x.dtype) is None
        and "9.0a" in _backend.architectures_built().split(":")
    )


# The ops call the mode "convention" because torch.fx cannot trace an op with an argument named "mode".
@torch.library.custom_op("sensilora::fisher_diag", mutates_args=())
def _fisher_diag(x: Tensor, grad_output: Tensor, lengths: Tensor, convention: str) -> Tensor:
    out = torch.empty(grad_output.shape[-1], x.shape[-1], dtype=accumulator_dtype(x.dtype), device=x.device)
    _run(x, grad_output, lengths, convention, out, False)
    return out


@_fisher_diag.register_fake
def _(x: Tensor, grad_output: Tensor, lengths: Tensor, convention: str) -> Tensor:
    return torch.empty(grad_output.shape[-1], x.shape[-1], dtype=accumulator_dtype(x.dtype), device=x.device)


@torch.library.custom_op("sensilora::fisher_diag_", mutates_args=("out",))
def _fisher_diag_(x: Tensor, grad_output: Tensor, lengths: Tensor, convention: str, out: Tensor) -> None:
    _run(x, grad_output, lengths, convention, out, True)


@_fisher_diag_.register_fake
def _(x: Tensor, grad_output: Tensor, lengths: Tensor, convention: str, out: Tensor) -> None:
    return None


def _setup_context(ctx, inputs, output) -> None:
    x, grad_output, lengths, ctx.convention = inputs
    ctx.save_for_backward(x, grad_output, lengths)


def _backward(ctx, grad: Tensor):
    x, g, lengths = ctx.saved_tensors
    dtype = x.dtype
    x, g = x.to(grad.dtype), g.to(grad.dtype)
    if ctx.convention == "per_position":
        grad_x = 2 * x * (g.square() @ grad)
        grad_g = 2 * g * (x.square() @ grad.T)
        return grad_x.to(dtype), grad_g.to(dtype), None, None
    ends = list(itertools.accumulate(lengths.tolist()))
    pieces_x, pieces_g = [], []
    for start, end in zip([0, *ends], ends, strict=False):
        x_n, g_n = x[start:end], g[start:end]
        grad_weight = 2 * grad * (g_n.T @ x_n)
        pieces_x.append(g_n @ grad_weight)
        pieces_g.append(x_n @ grad_weight.T)
    grad_x = torch.cat(pieces_x) if pieces_x else torch.zeros_like(x)
    grad_g = torch.cat(pieces_g) if pieces_g else torch.zeros_like(g)
    return grad_x.to(dtype), grad_g.to(dtype), None, None


_fisher_diag.register_autograd(_backward, setup_context=_setup_context)
