"""LoRA's forward and backward pass from plain products, where a GPU runs a call sooner than it is launched.

A fused kernel saves the device passes over its memory, but takes the host some 40 µs to launch where a product of
cuBLAS's takes 8. So a call of few rows or of a small layer is faster this way, by how much less the host has to do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sensilora.ops._lora import padded_rank

# FLOPs of the base products, forward and backward, for each multiprocessor, up to which launches take longer.
LAUNCH_BOUND_FLOPS = 2**30


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch_bound(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether launches would take longer than the work, and no CUDA graph is captured that spares their cost."""
    if not x.is_cuda or x.shape[0] == 0:
        return False
    flops = 4 * x.shape[0] * sum(weight.numel() for weight in weights)
    return flops <= LAUNCH_BOUND_FLOPS * _multiprocessors(x.device) and not torch.cuda.is_current_stream_capturing()


def forward(x, weights, biases, lora_As, lora_Bs, scalings) -> tuple[list[Tensor], Tensor]:
    """Every x W_iᵀ + b_i + s_i (x A_iᵀ) B_iᵀ, and the h_i = x A_iᵀ side by side, padded; x (rows, in_features)."""
    outputs, hs = [], []
    for weight, bias, lora_A, lora_B, scaling in zip(weights, biases, lora_As, lora_Bs, scalings, strict=True):
        y = linear(x, weight, bias)
        if lora_A.shape[0] > 0:
            h = torch.mm(x, _padded(lora_A.to(x.dtype), 0).T)
            outputs.append(y.addmm_(h, _padded(lora_B.to(x.dtype), 1).T, alpha=scaling))
            hs.append(h)
        else:
            outputs.append(y)
    return outputs, hs[0] if len(hs) == 1 else torch.cat(hs, dim=1) if hs else x.new_empty(x.shape[0], 0)


def backward(
    grads, x, h, weights, lora_As, lora_Bs, scalings, need_grad_x: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The gradients of x (empty unless needed), of every A and of every B; grads (rows, out_i), h as of `forward`."""
    grad_x, grad_As, grad_Bs, first = x.new_empty(0), [], [], 0
    for i, (grad, weight, lora_A, lora_B, scaling) in enumerate(
        zip(grads, weights, lora_As, lora_Bs, scalings, strict=True)
    ):
        if need_grad_x:
            grad_x = torch.mm(grad, weight) if i == 0 else grad_x.addmm_(grad, weight)
        rank = lora_A.shape[0]
        if rank == 0:
            grad_As.append(torch.empty_like(lora_A, memory_format=torch.contiguous_format))
            grad_Bs.append(torch.empty_like(lora_B, memory_format=torch.contiguous_format))
            continue
        q = torch.mm(grad, _padded(lora_B.to(x.dtype), 1))
        if need_grad_x:
            grad_x.addmm_(q, _padded(lora_A.to(x.dtype), 0), alpha=scaling)
        columns = h[:, first : first + rank]
        first += padded_rank(rank)
        grad_As.append(_sum(q[:, :rank], x, lora_A.dtype).mul_(scaling))
        grad_Bs.append(_sum(grad, columns, lora_B.dtype).mul_(scaling))
    return grad_x, grad_As, grad_Bs


def _padded(adapter: Tensor, dim: int) -> Tensor:
    """Its rank, dimension `dim`, padded with zeros as h's columns are, so that products read aligned rows."""
    missing = padded_rank(adapter.shape[dim]) - adapter.shape[dim]
    if missing == 0:
        return adapter
    return pad(adapter, (0, missing) if dim == 1 else (0, 0, 0, missing))


def _sum(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """leftᵀ right, in fp32 where an adapter's gradient is kept in more than the operands' 16 bits."""
    if dtype == left.dtype or left.dtype not in (torch.float16, torch.bfloat16) or not left.is_cuda:
        return torch.mm(left.T, right)
    return torch.mm(left.T, right, out_dtype=torch.float32)
