"""PEFT's methods that decide about ranks themselves, for comparisons with a plan: AdaLoRA and EVA."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

try:
    from peft import AdaLoraConfig, EvaConfig, LoraConfig, get_peft_model
    from peft.tuners.lora.eva import get_eva_state_dict
except ModuleNotFoundError as error:
    raise ImportError("AdaLoRA and EVA need peft; install it with: pip install 'sensilora[peft]'") from error

from sensilora.errors import DataError, PlanError
from sensilora.plan import RankPlan

# As shares of the steps: full ranks at first, and the final ranks at last. Between the two ranks fall.
_ADALORA_START, _ADALORA_END = 0.15, 0.45
_EVA_RHO = 2.0
_EVA_ROUNDS = 4


class AdaLoRA:
    """PEFT's AdaLoRA on the plan's matrices, ending with the plan's number of parameters.

    Ranks begin at 1.5 times the average one, are masked in the course of training and never shrink. Where PEFT makes
    them final, the total rank is solved for, so that what is left costs at most what the plan does. The scale is the
    plan's: alpha over the initial rank, for all of training.

    Args:
        model: without adapters; frozen and wrapped in place. What is to be trained beside the adapters must be made
            to require gradients afterwards.
        plan: its matrices, its scale and its number of parameters.
        steps: optimiser steps of the whole training, at least 4.
        dropout: on the adapters' inputs.

    Attributes:
        model: the ``peft.PeftModel`` to train.
        initial_parameters: of the adapters, at the beginning.

    Raises:
        PlanError: there are too few steps, or the plan's scale depends on the rank.
    """

    def __init__(self, model: nn.Module, plan: RankPlan, *, steps: int, dropout: float = 0.0) -> None:
        check_comparable(plan, steps)
        self._budget = plan.parameters
        self._cost = {name: sum(entry.shape) + 1 for name, entry in plan.matrices.items()}
        average = plan.parameters / sum(self._cost.values())
        initial = max(math.ceil(1.5 * average), math.floor(average) + 1)
        self._final = steps - max(1, round(_ADALORA_END * steps))
        config = AdaLoraConfig(
            init_r=initial,
            target_r=max(1, round(average)),
            lora_alpha=cast(int, _constant_scale(plan) * initial),  # any number: PEFT divides it by the rank
            lora_dropout=dropout,
            target_modules="|".join(map(re.escape, plan.matrices)),
            total_step=steps,
            tinit=round(_ADALORA_START * steps),
            tfinal=steps - self._final,
            deltaT=max(1, steps // 100),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # told for Conv1D, and set
            self.model = cast(Any, get_peft_model(model, config))
        self._tuner = cast(Any, self.model.base_model)
        self._allocator = cast(Any, self._tuner.rankallocator)
        self._allocator.target_bgt = min(round(average * len(plan.matrices)), self._allocator.init_bgt - 1)
        self.initial_parameters = initial * sum(self._cost.values())

    def penalty(self) -> Tensor:
        """How far the columns of B and rows of A are from orthonormal, times 0.5.

        ``AdaLoraModel.forward`` adds it to a loss, which a PeftModel without a task type does not call.
        """
        parts = [
            torch.linalg.matrix_norm(
                (gram := p @ p.T if ".lora_A." in name else p.T @ p) - torch.eye(len(gram), device=p.device)
            )
            for name, p in self._tuner.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        ]
        return self._tuner.peft_config["default"].orth_reg_weight * torch.stack(parts).mean()

    def after_step(self, step: int) -> None:
        """To be called after the optimiser's step number `step`, from 0, while the gradients are still there."""
        if step == self._final:
            self._allocator.target_bgt = self._affordable()
        self._tuner.update_and_allocate(step)

    def ranks(self) -> dict[str, int]:
        """The ranks that are left, by matrix; PEFT has decided them when the last share of the steps begins."""
        return self._ranks(self._tuner.peft_config["default"].rank_pattern)

    def parameters(self) -> int:
        """Of the adapters with the ranks that are left."""
        return self._parameters(self.ranks())

    def _ranks(self, pattern: Mapping[str, Sequence[bool]]) -> dict[str, int]:
        kept = {_matrix(name): sum(own) for name, own in pattern.items()}
        return {name: kept[name] for name in self._cost}

    def _parameters(self, ranks: Mapping[str, int]) -> int:
        return sum(self._cost[name] * rank for name, rank in ranks.items())

    def _affordable(self) -> int:
        """The largest total rank whose matrices, as PEFT chooses them, cost no more than the plan."""
        values = [p for name, p in self._tuner.named_parameters() if ".lora_E." in name]
        before = [value.detach().clone() for value in values]
        low, high = 0, self._allocator.init_bgt - 1
        while low < high:
            middle = (low + high + 1) // 2
            pattern = self._allocator.mask_to_budget(self._tuner.model, middle)
            if self._parameters(self._ranks(pattern)) <= self._budget:
                low = middle
            else:
                high = middle - 1
        with torch.no_grad():
            for value, old in zip(values, before, strict=True):
                value.copy_(old)
        return low


def check_comparable(plan: RankPlan | None, adalora_steps: int | None = None) -> None:
    """Raise PlanError where AdaLoRA, trained for so many steps, or EVA cannot be compared with the plan.

    Of a plan that is None nothing is asked, and of AdaLoRA neither without steps.
    """
    if adalora_steps is not None and adalora_steps < 4:
        raise PlanError(
            f"AdaLoRA lowers its ranks over the steps, and {adalora_steps} are too few; train for at least 4"
        )
    if plan is not None:
        _constant_scale(plan)


def _matrix(parameter: str) -> str:
    """The module that PEFT's name of a parameter is of."""
    return parameter.partition(".lora_E.")[0]


def _constant_scale(plan: RankPlan) -> float:
    scales = {plan.scaling_of(name) for name, rank in plan.ranks.items() if rank > 0}
    if len(scales) > 1:
        raise PlanError("the plan's scale depends on the rank; AdaLoRA and EVA are compared at one scale for all")
    return scales.pop()


def eva(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], plan: RankPlan) -> dict[str, Tensor]:
    """EVA's A of each of the plan's matrices, by PEFT, at the plan's number of parameters; its rows are the rank.

    The rows are the directions in which a matrix's inputs vary most, and a matrix has as many of them as are among
    the ones that explain most, over all matrices (at most twice the average rank each). EVA's own budget is the sum
    of ranks, so that PEFT is asked anew with other sums until the parameters are the plan's, or as near below as four
    tries come.

    Args:
        model: without adapters.
        batches: for the model's forward, on its device. Padding and labels do not count.
        plan: its matrices and its number of parameters.

    Returns:
        (rank, in_features) by matrix; a rank may be 0.

    Raises:
        DataError: a batch has fewer inputs of some matrix than directions are sought.
        PlanError: no sum of ranks that was tried costs at most what the plan does.
    """
    _constant_scale(plan)
    costs = {name: sum(entry.shape) for name, entry in plan.matrices.items()}
    total = max(len(costs), round(plan.parameters / sum(costs.values()) * len(costs)))
    best: dict[str, Tensor] = {}
    tried = set()
    for _ in range(_EVA_ROUNDS):
        tried.add(total)
        low, more = divmod(total, len(costs))
        asked = {name: low + (place < more) for place, name in enumerate(costs)}
        found = _eva_directions(model, batches, asked, _EVA_RHO)
        parameters = sum(costs[name] * len(directions) for name, directions in found.items())
        if parameters <= plan.parameters and parameters >= sum(costs[name] * len(A) for name, A in best.items()):
            best = found
        total = max(len(costs), math.floor(total * plan.parameters / parameters))
        if total in tried:
            break
    if not best:
        raise PlanError("EVA's ranks cost more parameters than the plan's at every sum of ranks that was tried")
    return best


def eva_start(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], ranks: Mapping[str, int]
) -> dict[str, Tensor]:
    """EVA's A for ranks that are given: (rank, in_features) of each matrix that has one. Raises as `eva` does."""
    # Directions come in order. Of unequal numbers PEFT would give some matrices' to others with the same input.
    largest = max(ranks.values())
    found = _eva_directions(model, batches, {name: largest for name, rank in ranks.items() if rank > 0}, 1.0)
    return {name: directions[: ranks[name]] for name, directions in found.items()}


def _eva_directions(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], ranks: Mapping[str, int], rho: float
) -> dict[str, Tensor]:
    largest = max(ranks.values())
    config = LoraConfig(
        r=largest,
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != largest},
        target_modules="|".join(map(re.escape, ranks)),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, use_label_mask=False, adjust_scaling_factors=True),
    )
    wanted = round(largest * rho)

    def real_inputs(x: Any, mask: Tensor, name: str) -> Tensor:
        x = x[0] if isinstance(x, (tuple, list)) else x
        # A pooler sees one position of each sequence.
        x = x[mask.bool()] if x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1]).contiguous()
        if len(x) < wanted:
            raise DataError(
                f"EVA seeks {wanted} directions for {name}, and a batch has {len(x)} inputs of it; give more rows, "
                "or a lower rank"
            )
        return x

    inputs = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    found: dict[str, Tensor] = get_eva_state_dict(
        model,
        inputs,
        peft_config=config,
        prepare_model_inputs_fn=lambda batch, _: batch["attention_mask"],
        prepare_layer_inputs_fn=real_inputs,
        show_progress_bar=False,
    )
    return {name: found[name].float() for name in ranks}
