"""A whole training step without the optimizer, on a GPU: Llama-3.1-8B's shape with adapters on all seven projections.

Random bf16 weights, 4 sequences of 2048 tokens, sdpa attention, no gradient checkpointing. Ranks average 8 and differ
between the projections of a layer; PEFT has rank 8 everywhere. The baseline is the frozen model's forward + backward.
In every arm the embeddings' output requires a gradient, so that dx flows through all layers alike. All arms share one
copy of the base weights, which each arm's peak memory includes.
"""

from __future__ import annotations

import copy
import importlib.util
import random
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Cases, relative_error
from sensilora import use_backend
from sensilora.adapters import adapter_layers, inject
from sensilora.plan import RankPlan
from sensilora.targets import matrix_shape

BATCH, LENGTH = 4, 2048
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AVERAGE_RANK = 8
SCALING = 2.0
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def cases(device: str) -> Cases:
    if device == "cpu":
        return {}
    found: Cases = {
        f"model/llama8b_4x2048/avg8/p{p:g}": partial(_case, device, LLAMA_8B, BATCH, LENGTH, p) for p in (0.0, 0.05)
    }
    for length in (256, 1024, 2048):
        name = f"model/llama8b_8layers_1x{length}/avg8/p0/wall"
        found[name] = partial(_wall_case, device, {**LLAMA_8B, "num_hidden_layers": 8}, length)
    return found


def _build(device: str, shape: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, attn_implementation="sdpa", use_cache=False, dtype=torch.bfloat16)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).train().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _projections(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(PROJECTIONS)}


def _ranks(names: list[str]) -> dict[str, int]:
    """1 to 15, no two equal within a layer; every second layer mirrors the one before it, so the average is 8."""
    draw = random.Random(0)
    ranks: list[int] = []
    while len(ranks) < len(names):
        layer = draw.sample(range(1, 2 * AVERAGE_RANK), len(PROJECTIONS))
        ranks += [*layer, *(2 * AVERAGE_RANK - rank for rank in layer)]
    return dict(zip(names, ranks, strict=False))


def _adapted(model: nn.Module, p: float, *, trained: bool = False) -> nn.Module:
    """Ours: variable ranks, projections on one input as fused groups."""
    model = _sharing(model)
    shapes = {name: matrix_shape(module) for name, module in _projections(model).items()}
    plan = RankPlan.uniform(shapes, 1, scaling=SCALING).with_ranks(_ranks(list(shapes)))
    model = inject(model, plan, dropout=p, groups=True, strict=False)
    if trained:
        for layer in adapter_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.02)
    return model


def _peft(model: nn.Module, p: float) -> nn.Module | None:
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=AVERAGE_RANK, lora_alpha=SCALING * AVERAGE_RANK, lora_dropout=p, target_modules=list(PROJECTIONS)
    )
    return get_peft_model(_sharing(model), config)


def _step(model: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    """Loss and backward; gradients are left where an optimizer would find them, those of the last step dropped."""
    model.zero_grad()
    embeddings.grad = None
    loss = model(inputs_embeds=embeddings, labels=labels).loss
    loss.backward()
    return loss


def _case(device: str, shape: dict[str, Any], batch: int, length: int, p: float) -> Case:
    model = _build(device, shape)
    labels = torch.randint(shape["vocab_size"], (batch, length), device=device)
    embeddings = model.get_input_embeddings()(labels).requires_grad_()
    ours = _adapted(model, p)
    arms = {"PEFT, rank 8 everywhere": _peft(model, p)}
    return Case(
        ours=lambda: _step(ours, embeddings, labels),
        baseline=lambda: _step(model, embeddings, labels),
        errors=lambda: _check(device, shape, p)[0],
        tolerance=5e-2,
        peers={name: partial(_step, arm, embeddings, labels) for name, arm in arms.items() if arm is not None},
        eager_errors=lambda: _check(device, shape, p)[1],
        floor_flops=_flops(shape, batch * length, ours),
        peak_memory=True,
    )


def _wall_case(device: str, shape: dict[str, Any], length: int) -> Case:
    """One short sequence through eight layers, launches included, as an eager script waits for it."""
    return replace(_case(device, shape, 1, length, 0.0), peak_memory=False, wall=True)


def _flops(shape: dict[str, Any], tokens: int, model: nn.Module) -> float:
    """4 a frozen weight and token, 6 an adapter's, of ours or PEFT's; attention's own products are left out."""
    named = model.named_parameters()
    frozen = sum(weight.numel() for name, weight in named if "_proj." in name and not weight.requires_grad)
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return tokens * (4 * (frozen + shape["vocab_size"] * shape["hidden_size"]) + 6 * adapters)


def _check(device: str, shape: dict[str, Any], p: float) -> tuple[list[float], list[float]]:
    """Errors of ours, and of the torch reference in bf16, against the reference in fp64 on a model of two layers.

    Of the logits, the embeddings' gradient, and all A's and B's gradients. The seeds of the masks come from torch's
    generator in the same order in all three.
    """
    model = _adapted(_build(device, {**shape, "num_hidden_layers": 2}), p, trained=True)
    labels = torch.randint(shape["vocab_size"], (2, 256), device=device)
    embeddings = model.get_input_embeddings()(labels)

    def results(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        leaf = embeddings.detach().to(model.get_input_embeddings().weight.dtype).requires_grad_()
        output = model(inputs_embeds=leaf, labels=labels)
        model.zero_grad()
        output.loss.backward()
        layers = adapter_layers(model).values()
        found = [output.logits, leaf.grad]
        for name in ("lora_A", "lora_B"):
            found.append(torch.cat([layer.get_parameter(name).grad.flatten() for layer in layers]))
        return [tensor.detach().double() for tensor in found]

    got = results(model)
    with use_backend("torch"):
        plain = results(model)
        oracle = results(model.double())
    return tuple([relative_error(*pair) for pair in zip(found, oracle, strict=True)] for found in (got, plain))


def test_model(timed) -> None:
    timed()
