"""lora_group on a GPU, forward and backward: q, k, v and gate, up on one input against the frozen layers alone.

The frozen layers are forward + backward(dx) of every x Wᵢᵀ on one x, whose gradients autograd sums. Limit: their
FLOPs plus 6 T rᵢ (in + outᵢ).
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.harness import Case, Cases
from benchmarks.lora import (
    PEFT_DTYPES,
    SCALING,
    SEED,
    addmm,
    eager,
    errors,
    formula,
    frozen,
    kept,
    leaves,
    peft_layers,
    step,
    tensors,
)
from sensilora.ops import lora_group, lora_linear

TOKENS = 8192
IN_FEATURES = 4096
# name: (out_features, rank) of each member
GROUPS = {
    "qkv_4096/r6_11_17": [(4096, 6), (4096, 11), (4096, 17)],
    "gate_up_4096/r7_19": [(14336, 7), (14336, 19)],
}


def cases(device: str) -> Cases:
    if device == "cpu":
        return {}
    return {
        f"lora_group/{name}/p{p:g}": partial(_case, device, TOKENS, IN_FEATURES, members, p)
        for name, members in GROUPS.items()
        for p in (0.0, 0.05)
    }


def _each_of(layers, x, *_):
    return [layer(x) for layer in layers]


def _case(device: str, tokens: int, in_features: int, members: list[tuple[int, int]], p: float) -> Case:
    dtype = torch.bfloat16
    made = [tensors(device, dtype, tokens, in_features, *member) for member in members]
    x = made[0][0]
    weights, lora_As, lora_Bs, upstreams = (list(column) for column in list(zip(*made, strict=True))[1:])
    del made
    count = len(members)
    inputs = (x, *lora_As, *lora_Bs)
    half = leaves(inputs, dtype)
    seeds = torch.arange(SEED, SEED + count, device=device)

    def each(function, *, weights=weights, options=({},) * count):
        """`function` of x, each member's A and B, and its weight."""
        return lambda x, *adapters: [
            function(x, adapters[i], adapters[count + i], weight=weights[i], **options[i]) for i in range(count)
        ]

    def ours():
        def forward(x, *adapters):
            return lora_group(
                x, weights, [None] * count, list(adapters[:count]), list(adapters[count:]), [SCALING] * count,
                dropout_ps=p, seeds=seeds,
            )  # fmt: skip

        return step(forward, inputs, upstreams)

    def single(x, lora_A, lora_B, *, weight, seed):
        return lora_linear(x, weight, None, lora_A, lora_B, SCALING, dropout_p=p, seed=seed)

    def oracle():
        wide = leaves(inputs, torch.float64)
        masks = [{"kept": kept(x, p, SEED + i)} for i in range(count)]
        return step(
            each(formula, weights=[weight.double() for weight in weights], options=masks),
            wide,
            [upstream.double() for upstream in upstreams],
        )

    def eager_step():
        masks = [{"kept": kept(x, p, SEED + i)} for i in range(count)]
        return step(each(formula, options=masks), half, upstreams)

    one_seed_each = [{"seed": seeds[i : i + 1]} for i in range(count)]
    peers = {
        "eager": lambda: step(each(partial(eager, p=p)), half, upstreams),
        "addmm": lambda: step(each(partial(addmm, p=p)), half, upstreams),
        "lora_linear one by one": lambda: step(each(single, options=one_seed_each), inputs, upstreams),
    }
    for name, dtype in PEFT_DTYPES.items():
        layers = peft_layers(weights, lora_As, lora_Bs, p, dtype)
        if layers:
            adapters = [layer.get_parameter(f"lora_{part}.default.weight") for part in "AB" for layer in layers]
            forward = partial(_each_of, layers)
            peers[name] = partial(step, forward, (x, *adapters), upstreams)
    return Case(
        ours=ours,
        baseline=lambda: step(lambda x: [frozen(x, weight=weight) for weight in weights], (x,), upstreams),
        errors=lambda: errors(ours(), oracle()),
        tolerance=1e-2,
        peers=peers,
        eager_errors=lambda: errors(eager_step(), oracle()),
        floor_flops=sum(
            4 * tokens * in_features * out + 6 * tokens * rank * (in_features + out) for out, rank in members
        ),
    )


def test_lora_group(timed) -> None:
    timed()
