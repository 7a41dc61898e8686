"""A training step of a model that PEFT prepared, its layers fused, against the same step of PEFT's own layers.

The model, batch and step are bench_model's: Llama-3.1-8B's shape, rank 8 on all seven projections, fp32 adapters over
bf16 weights (PEFT's default). The peers are the frozen model, and `sensilora.inject` with its groups.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import bench_model
from benchmarks.harness import Case, Cases, Unavailable, relative_error
from sensilora import use_backend


def cases(device: str) -> Cases:
    if device == "cpu":
        return {}
    shape = bench_model.LLAMA_8B, bench_model.BATCH, bench_model.LENGTH
    return {f"model/llama8b_4x2048/peft_fuse/p{p:g}": partial(_case, device, *shape, p) for p in (0.0, 0.05)}


def _fused(model: nn.Module, p: float) -> nn.Module:
    from sensilora.integrations.peft import fuse

    return fuse(_stock(model, p))


def _stock(model: nn.Module, p: float) -> nn.Module:
    stock = bench_model._peft(model, p)
    if stock is None:
        raise Unavailable("peft is not installed")
    return stock


def _case(device: str, shape: dict[str, Any], batch: int, length: int, p: float) -> Case:
    model = bench_model._build(device, shape)
    labels = torch.randint(shape["vocab_size"], (batch, length), device=device)
    embeddings = model.get_input_embeddings()(labels).requires_grad_()
    stock, fused, injected = _stock(model, p), _fused(model, p), bench_model._adapted(model, p)

    def step(arm: nn.Module) -> Any:
        return partial(bench_model._step, arm, embeddings, labels)

    return Case(
        ours=step(fused),
        baseline=step(stock),
        errors=lambda: _check(device, shape, p)[0],
        tolerance=5e-2,
        peers={"frozen model": step(model), "sensilora.inject": step(injected)},
        eager_errors=lambda: _check(device, shape, p)[1],
        floor_flops=bench_model._flops(shape, batch * length, injected),
        peak_memory=True,
    )


def _check(device: str, shape: dict[str, Any], p: float) -> tuple[list[float], list[float]]:
    """Errors of ours, and of PEFT's layers in bf16, against PEFT's layers in fp64 on a model of two layers.

    Of the logits, the embeddings' gradient, and all A's and B's gradients. With dropout PEFT's masks are others, so
    the torch reference stands for PEFT in both places.
    """
    from sensilora.integrations.peft import unfuse

    model = _fused(bench_model._build(device, {**shape, "num_hidden_layers": 2}), p)
    factors = {
        part: [parameter for name, parameter in model.named_parameters() if part in name]
        for part in ("lora_A", "lora_B")
    }
    for lora_B in factors["lora_B"]:
        nn.init.normal_(lora_B, std=0.02)
    labels = torch.randint(shape["vocab_size"], (2, 256), device=device)
    embeddings = model.get_input_embeddings()(labels)

    def results() -> list[Tensor]:
        torch.manual_seed(0)
        leaf = embeddings.detach().to(model.get_input_embeddings().weight.dtype).requires_grad_()
        output = model(inputs_embeds=leaf, labels=labels)
        model.zero_grad()
        output.loss.backward()
        found = [output.logits, leaf.grad]
        found += [torch.cat([parameter.grad.flatten() for parameter in own]) for own in factors.values()]
        return [tensor.detach().double() for tensor in found]

    got = results()
    with use_backend("torch"):
        if p == 0.0:
            unfuse(model)
        plain = results()
        model.double()
        oracle = results()
    return tuple([relative_error(*pair) for pair in zip(found, oracle, strict=True)] for found in (got, plain))


def test_peft(timed) -> None:
    timed()
