"""An adapter over a quantised layer, forward and backward, against that layer alone.

Limit: the frozen products' FLOPs plus 6 T r (in + out); what dequantising costs is in the baseline.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Cases, Unavailable
from benchmarks.lora import SCALING, SEED, errors, formula, kept, leaves, step, tensors
from sensilora.ops import lora_update

KINDS = ("nf4", "bnb_8bit", "torchao_int8", "torchao_fp8")
TOKENS, RANK = 8192, 16
SHAPES = [(4096, 4096, 0.0), (4096, 4096, 0.05), (4096, 14336, 0.0)]


def cases(device: str) -> Cases:
    if device == "cpu":
        return {}
    return {
        f"quantised/{kind}/{in_features}x{out_features}/r{RANK}/p{p:g}": partial(
            _case, kind, TOKENS, in_features, out_features, RANK, p
        )
        for kind in KINDS
        for in_features, out_features, p in SHAPES
    }


def library_of(kind: str) -> str:
    return "torchao" if kind.startswith("torchao") else "bitsandbytes"


def quantised(base: nn.Linear, kind: str) -> nn.Linear:
    """The layer, quantised on its device.

    Args:
        base: of fp32, bf16 or fp16; torchao changes it in place.
        kind: "nf4" or "fp4", either also with "_double", "bnb_8bit", "torchao_int8" or "torchao_fp8".
    """
    library = importlib.import_module(library_of(kind))
    if library_of(kind) == "torchao":
        configs = {"torchao_int8": "Int8WeightOnlyConfig", "torchao_fp8": "Float8WeightOnlyConfig"}
        library.quantization.quantize_(base, getattr(library.quantization, configs[kind])())
        return base
    weight, sizes = base.weight, (base.in_features, base.out_features, base.bias is not None)
    if kind == "bnb_8bit":
        layer = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
    else:
        quant_type, _, double = kind.partition("_")
        layer = library.nn.Linear4bit(
            *sizes, compute_dtype=weight.dtype, compress_statistics=bool(double), quant_type=quant_type
        )
    layer.load_state_dict(base.state_dict())
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(weight.dtype)
    return layer.to(weight.device)


def dequantised_weight(layer: nn.Module) -> Tensor:
    """The weight (out, in) that a quantised layer stands for, in fp64."""
    weight = layer.weight
    if type(weight).__module__.startswith("torchao"):
        return weight.dequantize().double()
    bitsandbytes = importlib.import_module("bitsandbytes")
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return weight.data.double() * scales.double().unsqueeze(1) / 127


def _case(
    kind: str, tokens: int, in_features: int, out_features: int, rank: int, p: float, *, device: str = "cuda"
) -> Case:
    if importlib.util.find_spec(library_of(kind)) is None:
        raise Unavailable(f"{library_of(kind)} is not installed")
    x, weight, lora_A, lora_B, upstream = tensors(device, torch.bfloat16, tokens, in_features, out_features, rank)
    base = nn.Linear(in_features, out_features, bias=False, device=device, dtype=torch.bfloat16)
    base.weight.data = weight
    layer = quantised(base, kind).requires_grad_(False)
    seed = torch.tensor([SEED], device=device)
    half = leaves((x, lora_A, lora_B), torch.bfloat16)
    peers = {"eager": partial(step, partial(_eager, layer=layer, p=p), half, upstream)}
    if importlib.util.find_spec("peft") is not None:
        peft_layer = _peft_layer(kind, layer, lora_A, lora_B, p)
        adapter = (peft_layer.lora_A["default"].weight, peft_layer.lora_B["default"].weight)
        peers["PEFT"] = partial(step, lambda x, *_: peft_layer(x), (x, *adapter), upstream)

    def ours():
        forward = lambda x, a, b: lora_update(layer(x), x, a, b, SCALING, dropout_p=p, seed=seed)  # noqa: E731
        return step(forward, (x, lora_A, lora_B), upstream)

    def oracle():
        wide, mask = leaves((x, lora_A, lora_B), torch.float64), kept(x, p, SEED)
        y, *gradients = step(partial(formula, weight=dequantised_weight(layer), kept=mask), wide, upstream.double())
        if kind == "bnb_8bit":
            # It rounds its input, so its own product is what an update is added to.
            y = y + layer(x).detach().double() - x.detach().double() @ dequantised_weight(layer).T
        return y, *gradients

    return Case(
        ours=ours,
        baseline=lambda: step(layer, (x,), upstream),
        errors=lambda: errors(ours(), oracle()),
        tolerance=1e-2,
        peers=peers,
        floor_flops=4 * tokens * in_features * out_features + 6 * tokens * rank * (in_features + out_features),
    )


def _eager(x: Tensor, lora_A: Tensor, lora_B: Tensor, *, layer: nn.Module, p: float) -> Tensor:
    linear, dropout = nn.functional.linear, nn.functional.dropout
    return layer(x) + SCALING * linear(linear(dropout(x, p), lora_A), lora_B)


def _peft_layer(kind: str, layer: nn.Module, lora_A: Tensor, lora_B: Tensor, p: float) -> nn.Module:
    """PEFT's own layer over the quantised one, with its default, fp32 adapters."""
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(layer)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "bnb_8bit"
    rank = lora_A.shape[0]
    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=p, target_modules=["0"])
    found = inject_adapter_in_model(config, model)[0]
    for part, value in ((found.lora_A, lora_A), (found.lora_B, lora_B)):
        part["default"].weight = nn.Parameter(value.detach().clone())
    return found.train()
