"""PEFT: a rank plan as a ``peft.LoraConfig``."""

from __future__ import annotations

import math
import re
from typing import Any, cast

try:
    from peft import LoraConfig
except ModuleNotFoundError as error:
    raise ImportError("a LoraConfig needs peft; install it with: pip install 'sensilora[peft]'") from error

from sensilora.errors import PlanError
from sensilora.plan import RankPlan

_FROM_THE_PLAN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")


def lora_config_from_plan(plan: RankPlan, **overrides: Any) -> LoraConfig:
    """A config with which ``peft.get_peft_model`` gives every matrix the plan's rank and scale.

    Every module is named in full, with its own rank and alpha: PEFT matches pattern keys as regular expressions
    against the end of a name and takes the first, so that shorter keys would collide. Matrices of rank 0 are left
    out, as PEFT knows no rank 0. ``r`` is the largest rank.

    Args:
        plan: The plan.
        overrides: Any other field of ``LoraConfig``, such as ``task_type="SEQ_CLS"``, ``lora_dropout`` or
            ``modules_to_save``.

    Raises:
        PlanError: every rank is 0, or an override is a field that the plan decides.
    """
    decided = [field for field in overrides if field in _FROM_THE_PLAN]
    if decided:
        raise PlanError(f"{decided[0]} follows from the plan; change the plan instead of overriding it")
    ranks = {name: rank for name, rank in plan.ranks.items() if rank > 0}
    if not ranks:
        raise PlanError("every rank of the plan is 0, so there is no LoRA to configure; raise a rank")
    rule, largest = plan.scaling, max(ranks.values())

    def alpha(rank: int) -> int | float:
        value = rule.value * rank if rule.rule == "constant" else rule.value
        # Loaders such as axolotl's take whole numbers only, and 1.1 * 10 is 11.000000000000002.
        return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value

    # PEFT matches target names against the end of a module's name, so a dropped module may need to be named.
    dropped = [name for name in plan.ranks if name not in ranks and any(name.endswith(f".{kept}") for kept in ranks)]
    if dropped:
        overrides = {"exclude_modules": dropped, **overrides}
    return LoraConfig(
        r=largest,
        lora_alpha=cast(int, alpha(largest)),  # annotated as int, but any number is taken
        rank_pattern={_pattern(name): rank for name, rank in ranks.items()},
        alpha_pattern={_pattern(name): alpha(rank) for name, rank in ranks.items()},
        target_modules=list(ranks),
        use_rslora=rule.rule == "rslora",
        **overrides,
    )


def _pattern(name: str) -> str:
    return "^" + re.escape(name)
