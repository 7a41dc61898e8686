"""What the LoRA benchmarks share: tensors, the plain expressions that ours is measured beside, and PEFT's layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from benchmarks.harness import relative_error
from sensilora.ops._dropout import keep_mask, keep_scale

SCALING = 2.0
SEED = 17


def tensors(device: str, dtype: torch.dtype, tokens: int, in_features: int, out_features: int, rank: int):
    """x, weight and upstream gradient in `dtype`; lora_A and lora_B in fp32, as adapters are trained."""
    x = torch.randn(tokens, in_features, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(out_features, in_features, device=device) / in_features**0.5).to(dtype)
    lora_A = (torch.randn(rank, in_features, device=device) / in_features**0.5).requires_grad_()
    lora_B = (torch.randn(out_features, rank, device=device) / rank**0.5).requires_grad_()
    upstream = torch.randn(tokens, out_features, device=device).to(dtype)
    return x, weight, lora_A, lora_B, upstream


def leaves(inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies in `dtype` to differentiate by."""
    return tuple(tensor.detach().to(dtype).requires_grad_() for tensor in inputs)


def step(
    forward: Callable[..., Any], inputs: Sequence[Tensor], upstream: Tensor | Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The outputs of `forward` and the gradients of its inputs."""
    outputs = forward(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    upstream = (upstream,) if isinstance(upstream, Tensor) else tuple(upstream)
    return (*outputs, *torch.autograd.grad(outputs, inputs, upstream))


def errors(got: Sequence[Tensor], oracle: Sequence[Tensor]) -> list[float]:
    return [relative_error(*pair) for pair in zip(got, oracle, strict=True)]


def kept(x: Tensor, p: float, seed: int) -> Tensor | float:
    """The factor dropout puts on x (rows, in_features): 0 or the scale of kept elements; fp64."""
    if p == 0.0:
        return 1.0
    return keep_mask(x.shape[0], x.shape[1], p, seed, x.device).double() * keep_scale(p)


def frozen(x: Tensor, *, weight: Tensor) -> Tensor:
    return linear(x, weight)


def eager(x: Tensor, lora_A: Tensor, lora_B: Tensor, *, weight: Tensor, p: float = 0.0) -> Tensor:
    """The adapter as it is written down."""
    return linear(x, weight) + SCALING * linear(linear(dropout(x, p), lora_A), lora_B)


def addmm(x: Tensor, lora_A: Tensor, lora_B: Tensor, *, weight: Tensor, p: float = 0.0) -> Tensor:
    """The update added by the second small product itself, which saves two passes over y."""
    return torch.addmm(linear(x, weight), linear(dropout(x, p), lora_A), lora_B.T, alpha=SCALING)


def formula(x: Tensor, lora_A: Tensor, lora_B: Tensor, *, weight: Tensor, kept: Tensor | float) -> Tensor:
    """The plain expression with a given dropout factor, in the dtype of its inputs: the oracle in fp64.

    The factor is not rounded before it meets x, as in torch's own dropout.
    """
    return linear(x, weight) + SCALING * linear(linear((x * kept).to(x.dtype), lora_A), lora_B)


#: PEFT as a peer: adapters in fp32, its default over a 16-bit base, and as with ``autocast_adapter_dtype=False``.
PEFT_DTYPES = {"PEFT": torch.float32, "PEFT, bf16 adapters": torch.bfloat16}


def peft_layers(
    weights: Sequence[Tensor], lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], p: float, dtype: torch.dtype
) -> list[nn.Module]:
    """PEFT's own LoRA layers over these weights, adapters in `dtype`; none without PEFT."""
    if importlib.util.find_spec("peft") is None:
        return []
    from peft import LoraConfig, inject_adapter_in_model

    found = []
    for weight, lora_A, lora_B in zip(weights, lora_As, lora_Bs, strict=True):
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(weight, requires_grad=False)
        rank = lora_A.shape[0]
        config = LoraConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=p, target_modules=["0"])
        layer = inject_adapter_in_model(config, nn.Sequential(base))[0]
        for part, value in ((layer.lora_A, lora_A), (layer.lora_B, lora_B)):
            part["default"].weight = nn.Parameter(value.detach().to(dtype, copy=True))
        found.append(layer.train())
    return found
