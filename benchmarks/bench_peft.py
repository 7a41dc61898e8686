"""A training step of a model that PEFT prepared, its layers fused, against the same step of PEFT's own layers.

The model, batch and step are bench_model's: Llama-3.1-8B's shape, rank 8 on all seven projections, fp32 adapters over
bf16 weights (PEFT's default). The peers are the frozen model, the fused layers in groups, and PEFT's AdaLoRA, of rank
12 that falls to 8, with the orthogonality term that it adds to the loss: by itself, as trainers run it that know
nothing of it, and with its allocation of ranks, which is to be called after every step; with adapters in fp32, for
which it keeps fp32 copies of all inputs, and in bf16. Every arm's peak memory includes the adapters and gradients of
all arms, about 1 GiB.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import bench_model
from benchmarks.harness import Case, Cases, Unavailable, relative_error
from sensilora import use_backend

TOTAL_STEPS = 1000  # of AdaLoRA's schedule


def cases(device: str) -> Cases:
    if device == "cpu":
        return {}
    shape = bench_model.LLAMA_8B, bench_model.BATCH, bench_model.LENGTH
    return {f"model/llama8b_4x2048/peft_fuse/p{p:g}": partial(_case, device, *shape, p) for p in (0.0, 0.05)}


def _fused(model: nn.Module, p: float, *, groups: bool = False) -> nn.Module:
    from sensilora.integrations.peft import fuse

    return fuse(_stock(model, p), groups=groups)


def _stock(model: nn.Module, p: float) -> nn.Module:
    stock = bench_model._peft(model, p)
    if stock is None:
        raise Unavailable("peft is not installed")
    return stock


def _adalora(model: nn.Module, p: float, *, in_fp32: bool) -> nn.Module:
    from peft import AdaLoraConfig, get_peft_model

    rank = bench_model.AVERAGE_RANK
    config = AdaLoraConfig(
        init_r=rank * 3 // 2,  # the relation of PEFT's defaults, 12 and 8
        target_r=rank,
        total_step=TOTAL_STEPS,
        lora_alpha=bench_model.SCALING * rank,
        lora_dropout=p,
        target_modules=list(bench_model.PROJECTIONS),
    )
    return get_peft_model(bench_model._sharing(model), config, autocast_adapter_dtype=in_fp32)


def _case(device: str, shape: dict[str, Any], batch: int, length: int, p: float) -> Case:
    model = bench_model._build(device, shape)
    labels = torch.randint(shape["vocab_size"], (batch, length), device=device)
    embeddings = model.get_input_embeddings()(labels).requires_grad_()
    stock, fused = _stock(model, p), _fused(model, p)
    adaptive = {
        "PEFT AdaLoRA": _adalora(model, p, in_fp32=True),
        "PEFT AdaLoRA, bf16 adapters": _adalora(model, p, in_fp32=False),
    }

    def step(arm: nn.Module) -> Any:
        return partial(bench_model._step, arm, embeddings, labels)

    def step_and_allocation(arm: nn.Module) -> Tensor:
        loss = bench_model._step(arm, embeddings, labels)
        arm.base_model.update_and_allocate(TOTAL_STEPS // 2)
        return loss

    return Case(
        ours=step(fused),
        baseline=step(stock),
        errors=lambda: _check(device, shape, p)[0],
        tolerance=5e-2,
        peers={
            "frozen model": step(model),
            "fuse, in groups": step(_fused(model, p, groups=True)),
            **{name: step(arm) for name, arm in adaptive.items()},
            **{f"{name}, and its allocation": partial(step_and_allocation, arm) for name, arm in adaptive.items()},
        },
        eager_errors=lambda: _check(device, shape, p)[1],
        floor_flops=bench_model._flops(shape, batch * length, fused),
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
