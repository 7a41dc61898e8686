"""From sensitivities to ranks: fused scores, quotas under a budget, exact rounding.

Everything is fp64 and deterministic, and sums are exact (`math.fsum`), so that the order of the matrices decides
nothing but ties. Source of the formulas: Sensitivity-LoRA (Zhang et al. 2025, arXiv 2509.09119), section 4.
"""

from __future__ import annotations

import bisect
import math
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from sensilora.errors import BudgetError, NonFiniteError, RankError
from sensilora.plan import (
    SCHEMA_VERSION,
    AllocationSettings,
    Budget,
    BudgetKind,
    Calibration,
    PlanEntry,
    RankPlan,
    ScalingRule,
    Tie,
    Weights,
    budget_total,
    first_error,
)

if TYPE_CHECKING:
    from sensilora.sensitivity.report import SensitivityReport

Array = NDArray[np.float64]

#: Groups of projections that read the same input, by the names common model families give them.
TIE_PRESETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "qkv": (
        ("q_proj", "k_proj", "v_proj"),
        ("query", "key", "value"),
        ("q", "k", "v"),
        ("q_lin", "k_lin", "v_lin"),
        ("wq", "wk", "wv"),
        ("to_q", "to_k", "to_v"),
    ),
    "gate_up": (("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3")),
}

_METRICS = ("trace", "topk_mean", "effective_rank")
_Model = TypeVar("_Model", bound=BaseModel)

# How far, in multiples, rounding may move a rank from its quota beyond the floor and the ceiling, only in order to
# leave less of the budget over.
_MAX_WIDENING = 3
# Most bits the subset-sum tables may hold (256 MiB). Costs without a large common divisor can need more; then the
# left-over is filled greedily, in the same order of priority.
_MAX_TABLE_BITS = 2**31


class Scores(NamedTuple):
    """The three scores of each matrix, fp64 arrays of shape (matrices,)."""

    global_: Array
    local: Array
    fused: Array

    def by_name(self, name: str) -> Array:
        """The array that ``scores="global"``, "local" or "fused" means."""
        return {"global": self.global_, "local": self.local, "fused": self.fused}[name]


def fuse_scores(
    trace: Iterable[float], topk_mean: Iterable[float], effective_rank: Iterable[float], *, weights: Weights = "cv"
) -> Scores:
    """S_global, S_local and theta of every matrix (eqs. 8, 11 to 14).

    ``local = b1 * topk_mean + b2 * effective_rank`` and ``fused = g1 * trace + g2 * local``, each weight taken from
    the mean mu and the population standard deviation sigma of the metric it multiplies, over the matrices.

    Args:
        trace: S_global of each matrix, non-negative.
        topk_mean: S_topk of each matrix, non-negative.
        effective_rank: S_erank of each matrix, non-negative.
        weights: "cv" for sigma / mu^2 (eqs. 12, 14), "equal" for 0.5 / mu (the paper's table 7). A metric of mean 0
            gets weight 0.

    Returns:
        Scores that do not change when a metric is multiplied by a constant, but for `global_`, which is the trace.
    """

    def weighted(metric: Array) -> Array:
        if not metric.any():
            return np.zeros_like(metric)
        # sigma / mu^2 * x = std(x / mu) * (x / mu): the same number, without squaring (which overflows) the mean.
        relative = metric / metric.max()
        relative = relative / (math.fsum(relative) / len(relative))
        if weights == "equal":
            return 0.5 * relative
        return math.sqrt(math.fsum((relative - 1.0) ** 2) / len(relative)) * relative

    metrics = [np.asarray(list(metric), dtype=np.float64) for metric in (trace, topk_mean, effective_rank)]
    local = weighted(metrics[1]) + weighted(metrics[2])
    return Scores(metrics[0], local, weighted(metrics[0]) + weighted(local))


def scaled_quotas(theta: Array, lower: Array, upper: Array, cost: Array, budget: float) -> Array:
    """Real-valued ranks proportional to the scores (SRA, eq. 15), as far as the bounds allow.

    ``quota_m = clip(lam * theta_m, lower_m, upper_m)`` with the one lam for which ``sum(cost * quota) = budget``.
    Where that cannot be (every matrix of positive score at its upper bound), those of score 0 share the rest equally.

    Args:
        theta: Scores, shape (matrices,), non-negative. If all are 0, every matrix counts the same.
        lower: Least quota of each matrix.
        upper: Greatest quota of each matrix, at least `lower`.
        cost: What one unit of quota costs, positive.
        budget: Between ``cost @ lower`` and ``cost @ upper``.

    Returns:
        Quotas, shape (matrices,).
    """
    if not theta.any():
        theta = np.ones_like(theta)
    slope = theta / theta.max()
    # A share too small for its breakpoints to be representable is none.
    none = slope < 1e-290
    if budget <= math.fsum(cost * np.where(none, lower, upper)):
        return _fill(np.where(none, 0.0, slope), np.zeros_like(slope), lower, upper, cost, budget)
    return _fill(none.astype(np.float64), np.where(none, 0.0, upper), lower, upper, cost, budget)


def progressive_quotas(
    theta: Array, lower: Array, upper: Array, cost: Array, budget: float, *, classes: int = 3
) -> Array:
    """Real-valued ranks that fall by one a class (PRA): the matrices sorted by score and cut into equal classes.

    Class i of c (0 has the highest scores) has ``quota = clip(lam + (c - 1) / 2 - i, lower, upper)``. Where the
    matrices do not divide evenly, the first classes have one more. If all scores are equal there is one class.

    Args and Returns: as for `scaled_quotas`.
    """
    count = len(theta)
    if theta.min() == theta.max():
        classes = 1
    order = sorted(range(count), key=lambda m: (-theta[m], m))
    offset = np.empty(count)
    for i, members in enumerate(np.array_split(np.array(order), min(classes, count))):
        offset[members] = (min(classes, count) - 1) / 2 - i
    return _fill(np.ones(count), offset, lower, upper, cost, budget)


def _fill(slope: Array, offset: Array, lower: Array, upper: Array, cost: Array, budget: float) -> Array:
    """clip(lam * slope + offset, lower, upper) with the lam that spends the budget; a slope may be 0."""
    moving = slope > 0

    def quotas(lam: float) -> Array:
        return np.clip(lam * slope + offset, lower, upper)

    def spent(lam: float) -> float:
        return math.fsum(cost * quotas(lam))

    # What is spent is piecewise linear in lam, with a corner wherever a quota meets a bound: find the piece, then
    # solve on it in closed form.
    corners = sorted(
        {*((lower - offset)[moving] / slope[moving]).tolist(), *((upper - offset)[moving] / slope[moving]).tolist()}
    )
    piece = bisect.bisect_right(corners, budget, key=spent)
    if piece in (0, len(corners)):
        found = quotas(corners[max(piece - 1, 0)])
    else:
        left, right = corners[piece - 1], corners[piece]
        middle = left + (right - left) / 2
        inside = moving & (lower < middle * slope + offset) & (middle * slope + offset < upper)
        fixed = math.fsum(cost * np.where(inside, offset, quotas(middle)))
        steepness = math.fsum((cost * slope)[inside])
        found = quotas((budget - fixed) / steepness if steepness > 0 else left)
    nearest = np.rint(found)
    return np.where(np.abs(found - nearest) < 1e-9, nearest, found)


def round_quotas(
    quotas: Array, lower: Sequence[int], upper: Sequence[int], cost: Sequence[int], budget: int
) -> list[int]:
    """Whole numbers near the quotas that spend the budget exactly, or as near under it as the costs allow.

    Start from the floors, and add one unit to some of the items: of the sets of items whose costs come nearest to
    what the floors leave over, the one that is first in the order of largest remainder, ties by position. With equal
    costs that is largest-remainder rounding. Where some budget is left over, the same choice is made among units up
    to 3 further below and above (the values then lie within 4 of their quotas), and the least widening that leaves
    the least over is taken. Among items of equal cost and bounds a higher quota never ends lower.

    The choice is exact as long as its tables fit 256 MiB: always, for the costs of common models, whose common
    divisor is large. Otherwise items are taken in the same order for as long as they fit into what is left.

    Args:
        quotas: Real-valued, within the bounds, spending about the budget.
        lower: Least value of each item.
        upper: Greatest value of each item.
        cost: Price of one unit of each item, positive.
        budget: At least the cost of the lower bounds. Never exceeded.

    Returns:
        One int an item.
    """
    free = [c for c, low, high in zip(cost, lower, upper, strict=True) if low < high]
    if not free:
        return list(lower)
    divisor = math.gcd(*free)
    floors = [min(max(math.floor(quota), low), high) for quota, low, high in zip(quotas, lower, upper, strict=True)]
    best, best_left = list(lower), budget - sum(c * low for c, low in zip(cost, lower, strict=True))
    for widening in range(_MAX_WIDENING + 1):
        values = [max(low, floor - widening) for floor, low in zip(floors, lower, strict=True)]
        left = budget - sum(c * value for c, value in zip(cost, values, strict=True))
        # One candidate for each unit an item may still gain, the item farthest below its quota first.
        candidates = sorted(
            (-round(quotas[m] - level, 9), m)
            for m, value in enumerate(values)
            for level in range(value, min(upper[m], floors[m] + 1 + widening))
        )
        if left < 0:
            continue  # only where snapping to whole quotas has gained a unit
        items = [m for _, m in candidates]
        target = left // divisor
        if widening and len(items) * (target + 1) > _MAX_TABLE_BITS:
            break
        for item in _nearest_subset([cost[m] // divisor for m in items], target):
            values[items[item]] += 1
        left = budget - sum(c * value for c, value in zip(cost, values, strict=True))
        if widening == 0 or left < best_left:
            best, best_left = values, left
        if left < divisor:
            break
    return best


def _nearest_subset(costs: Sequence[int], target: int) -> list[int]:
    """Positions of the first subset, in lexicographic order, whose sum is the greatest that is at most `target`."""
    reachable = [1]  # bit s of reachable[-1 - i] says whether costs[i:] has a subset of sum s
    if len(costs) * (target + 1) <= _MAX_TABLE_BITS:
        within = (1 << (target + 1)) - 1
        for cost in reversed(costs):
            reachable.append((reachable[-1] | (reachable[-1] << cost)) & within)
        remaining = reachable[-1].bit_length() - 1
    else:
        reachable = []
        remaining = target
    chosen: list[int] = []
    for i, cost in enumerate(costs):
        if cost <= remaining and (not reachable or reachable[-2 - i] >> (remaining - cost) & 1):
            chosen.append(i)
            remaining -= cost
    return chosen


def tie_groups(names: Sequence[str], tie: Tie | None) -> list[list[int]]:
    """Positions of the matrices that share a rank, as groups in module order; a matrix that is not tied is alone.

    Args:
        names: Full module names, in module order.
        tie: Groups of last name components, such as ``("q_proj", "k_proj", "v_proj")``, and names of presets ("qkv",
            "gate_up"). Modules of one parent whose last components are in one group are tied.

    Raises:
        BudgetError: an entry is no preset and no group, ties nothing, or ties what another entry ties already.
    """
    group_of = list(range(len(names)))
    tied: set[int] = set()
    for entry in tie or ():
        if isinstance(entry, str) and entry not in TIE_PRESETS:
            raise BudgetError(
                f"tie entry {entry!r} is neither a preset ({', '.join(TIE_PRESETS)}) nor a list of names; "
                'write a group as ["q_proj", "k_proj", "v_proj"]'
            )
        before = len(tied)
        for components in TIE_PRESETS[entry] if isinstance(entry, str) else (entry,):
            by_parent: dict[str, list[int]] = {}
            for i, name in enumerate(names):
                parent, _, last = name.rpartition(".")
                if last in components:
                    by_parent.setdefault(parent, []).append(i)
            for members in by_parent.values():
                if len(members) < 2:
                    continue
                for i in members:
                    if i in tied:
                        raise BudgetError(f"tie entry {_written(entry)} ties {names[i]}, which is tied already")
                    group_of[i] = members[0]
                tied.update(members)
        if len(tied) == before:
            raise BudgetError(f"tie entry {_written(entry)} ties nothing: no module has two children of these names")
    groups: dict[int, list[int]] = {}
    for i, first in enumerate(group_of):
        groups.setdefault(first, []).append(i)
    return list(groups.values())


def _written(entry: str | tuple[str, ...]) -> str:
    return repr(entry) if isinstance(entry, str) else repr(list(entry))


def assign_ranks(
    shapes: Mapping[str, tuple[int, int]], theta: Array, settings: AllocationSettings, kind: BudgetKind, value: float
) -> dict[str, int]:
    """Ranks for the matrices of `shapes` from their scores under one budget.

    Args:
        shapes: (out_features, in_features) by full module name, in module order.
        theta: Score of each matrix, shape (matrices,), non-negative; raised to ``settings.temper`` here.
        settings: Strategy, bounds, multiple and ties.
        kind: Unit of the budget.
        value: The budget.

    Raises:
        BudgetError: the budget is outside what the bounds, shapes and multiple allow, or `settings.tie` ties nothing.
        RankError: a matrix is too small for ``settings.min_rank``.
    """
    names, step = list(shapes), settings.multiple
    groups = tie_groups(names, settings.tie)
    # From here on one unit is `step` ranks of one group.
    least = -(-settings.min_rank // step)
    lower, upper, cost = [], [], []
    for group in groups:
        sizes = [min(shapes[names[m]]) for m in group]
        small = names[group[int(np.argmin(sizes))]]
        most = min(sizes) if settings.max_rank is None else min(*sizes, settings.max_rank)
        if most // step < least:
            raise RankError(
                f"min_rank {settings.min_rank} in multiples of {step} does not fit {small}, which allows ranks up to "
                f"{most}; lower min_rank or multiple, or leave the module out"
            )
        lower.append(least)
        upper.append(most // step)
        cost.append(step * (sum(sum(shapes[names[m]]) for m in group) if kind == "total_parameters" else len(group)))
    total = budget_total(kind, value, len(names))
    _check_reachable(total, lower, upper, cost, settings, kind, len(names))
    scores = _tempered(np.array([math.fsum(theta[group]) / len(group) for group in groups]), settings.temper)
    # Highest score first (then module order), so that equal remainders go to the higher score.
    order = sorted(range(len(groups)), key=lambda i: (-scores[i], i))
    scores, lower, upper, cost = scores[order], *([values[i] for i in order] for values in (lower, upper, cost))
    bounds = np.array(lower, dtype=np.float64), np.array(upper, dtype=np.float64), np.array(cost, dtype=np.float64)
    if settings.strategy == "scaled":
        quotas = scaled_quotas(scores, *bounds, total)
    else:
        quotas = progressive_quotas(scores, *bounds, total, classes=settings.classes)
    units = round_quotas(quotas, lower, upper, cost, total)
    rank_of = {m: step * unit for i, unit in zip(order, units, strict=True) for m in groups[i]}
    return {name: rank_of[m] for m, name in enumerate(names)}


def _tempered(theta: Array, temper: float) -> Array:
    # Scores that are all 0 say nothing, which must not depend on the exponent.
    return (theta / theta.max()) ** temper if theta.any() else np.ones_like(theta)


def _check_reachable(
    total: int,
    lower: Sequence[int],
    upper: Sequence[int],
    cost: Sequence[int],
    settings: AllocationSettings,
    kind: BudgetKind,
    matrices: int,
) -> None:
    unit = "parameters" if kind == "total_parameters" else "ranks"
    needed = sum(c * low for c, low in zip(cost, lower, strict=True))
    allowed = sum(c * high for c, high in zip(cost, upper, strict=True))
    if total < max(needed, 1):
        raise BudgetError(
            f"{kind} gives {total:,} {unit}, below the {max(needed, 1):,} that min_rank {settings.min_rank} and "
            f"multiple {settings.multiple} need on {matrices} matrices; raise the budget or lower min_rank"
        )
    if total > allowed:
        bounds = f" with max_rank {settings.max_rank}" if settings.max_rank is not None else ""
        bounds += f" in multiples of {settings.multiple}" if settings.multiple > 1 else ""
        raise BudgetError(
            f"{kind} gives {total:,} {unit}, above the {allowed:,} that the shapes of the {matrices} matrices"
            f"{bounds} allow; lower the budget{' or raise max_rank' if settings.max_rank is not None else ''}"
        )


def allocate(
    report: SensitivityReport,
    *,
    average_rank: float | None = None,
    total_rank: int | None = None,
    total_parameters: int | None = None,
    strategy: str = "scaled",
    weights: str = "cv",
    scores: str = "fused",
    min_rank: int = 1,
    max_rank: int | None = None,
    multiple: int = 1,
    temper: float = 1.0,
    tie: str | Iterable[str | Iterable[str]] | None = None,
    classes: int = 3,
    scaling: float = 1.0,
    alpha: float | None = None,
    use_rslora: bool = False,
) -> RankPlan:
    """Give every measured matrix a LoRA rank under one budget (Sensitivity-LoRA, section 4).

    Experts that the report holds (``expert_of``) get none and have no part in the scores, for `sensilora.inject`
    cannot put an adapter into a part of a parameter.

    Args:
        report: The sensitivities, from `sensilora.calibrate`.
        average_rank: Budget as ranks a matrix; the total is rounded down to a whole number. Give exactly one of the
            three budgets.
        total_rank: Budget as the sum of all ranks.
        total_parameters: Budget as trainable parameters, the sum of rank * (in_features + out_features).
        strategy: "scaled" (SRA, eq. 15: ranks proportional to the scores) or "progressive" (PRA: equal classes, whose
            ranks fall by one multiple a class).
        weights: Fusion weights, "cv" (sigma / mu^2) or "equal" (0.5 / mu).
        scores: "fused" (theta, eq. 13), "global" (the trace alone) or "local" (top-k mean and effective rank alone).
        min_rank: Least rank of a matrix, rounded up to a multiple; 0 lets a matrix go without an adapter.
        max_rank: Greatest rank; None for as much as min(in_features, out_features) allows.
        multiple: Every rank is a multiple of this.
        temper: Exponent of the scores: 1 is the paper, 0 gives equal ranks (uniform LoRA).
        tie: Modules that must have one rank: "qkv", "gate_up", or a list of those and of groups of last name
            components, such as ``[["q_proj", "k_proj", "v_proj"]]``. A group counts as one matrix with the mean of
            the scores.
        classes: Number of classes of the progressive strategy.
        scaling: The scale s = alpha_m / r_m that every matrix has, whatever its rank.
        alpha: One LoRA alpha for all in the place of `scaling`: s_m = alpha / r_m.
        use_rslora: With `alpha`: s_m = alpha / sqrt(r_m).

    Returns:
        A plan that never exceeds the budget, meets it exactly where multiples and costs allow, and says what is left.

    Raises:
        BudgetError: the budget cannot be met within bounds and shapes, or an argument is out of range.
        RankError: a matrix is too small for `min_rank`.
        NonFiniteError: a metric of the report is NaN, infinite or negative.

    Warns:
        UserWarning: the report holds experts, which get no rank; or one matrix gets more than all others together.
    """
    budgets = {"average_rank": average_rank, "total_rank": total_rank, "total_parameters": total_parameters}
    given = {kind: value for kind, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise BudgetError(f"give exactly one of {', '.join(budgets)}, not {' and '.join(given) or 'none of them'}")
    ((name_given, value),) = given.items()
    value = _plain(value)
    kind = cast(BudgetKind, name_given)
    if alpha is None and use_rslora:
        raise BudgetError("use_rslora needs alpha, the scale being alpha / sqrt(rank); pass alpha")
    if alpha is not None and scaling != 1.0:
        raise BudgetError(f"scaling {scaling!r} and alpha {alpha!r} contradict each other; pass one of them")
    matrices = {name: report[name] for name in report if report[name].expert_of is None}
    experts = len(report) - len(matrices)
    if not matrices:
        held = "only experts, which can hold no adapter" if experts else "no matrix"
        raise BudgetError(f"the sensitivity report holds {held}, so there is nothing to allocate ranks to")
    if experts:
        warnings.warn(
            f"{experts} of the {len(report)} matrices in the report are experts of a stacked parameter, which can "
            "hold no adapter: they get no rank, and the plan leaves them out",
            UserWarning,
            stacklevel=2,
        )
    for name, matrix in matrices.items():
        for metric in _METRICS:
            if not 0 <= getattr(matrix, metric) < math.inf:
                raise NonFiniteError(
                    f"{metric} of {name} is {getattr(matrix, metric)}; it must be finite and at least 0"
                )
    settings = _checked(
        AllocationSettings,
        {
            "strategy": strategy,
            "classes": _plain(classes),
            "weights": weights,
            "scores": scores,
            "temper": temper,
            "min_rank": _plain(min_rank),
            "max_rank": _plain(max_rank),
            "multiple": _plain(multiple),
            "tie": _normal_tie(tie),
        },
    )
    _checked(Budget, {"kind": kind, "value": value, "used": 0, "left_over": 0}, value=kind)
    if alpha is None:
        rule = _checked(ScalingRule, {"rule": "constant", "value": scaling}, value="scaling")
    else:
        rule = _checked(ScalingRule, {"rule": "rslora" if use_rslora else "alpha", "value": alpha}, value="alpha")

    metrics = ([getattr(matrix, metric) for matrix in matrices.values()] for metric in _METRICS)
    fused = fuse_scores(*metrics, weights=settings.weights)
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    ranks = assign_ranks(shapes, fused.by_name(settings.scores), settings, kind, value)
    if settings.max_rank is None:
        _warn_of_one_matrix(ranks)
    entries = {
        name: PlanEntry(
            rank=ranks[name],
            shape=shapes[name],
            trace=matrix.trace,
            topk_mean=matrix.topk_mean,
            effective_rank=matrix.effective_rank,
            score_global=float(fused.global_[i]),
            score_local=float(fused.local[i]),
            score_fused=float(fused.fused[i]),
        )
        for i, (name, matrix) in enumerate(matrices.items())
    }
    return RankPlan(
        schema_version=SCHEMA_VERSION,
        model_id=report.model_id,
        fingerprint=report.fingerprint,
        calibration=_calibration(report),
        allocation=settings,
        budget=Budget.of(kind, value, entries),
        scaling=rule,
        matrices=entries,
    )


def _calibration(report: SensitivityReport) -> Calibration:
    fields = {field: getattr(report, field) for field in Calibration.model_fields}
    if report.estimator != "activation":
        fields["variant"] = None
    return Calibration(**fields)


def _warn_of_one_matrix(ranks: Mapping[str, int]) -> None:
    """The gradient of a BERT classifier's pooler, say, can outweigh that of all other matrices together."""
    name = max(ranks, key=ranks.__getitem__)
    total = sum(ranks.values())
    if 2 < len(ranks) <= total < 2 * ranks[name]:
        warnings.warn(
            f"{name} gets {ranks[name]} of all {total} ranks, more than the other {len(ranks) - 1} matrices "
            "together; give max_rank, or leave it out of targets when calibrating, if that is not meant",
            UserWarning,
            stacklevel=3,
        )


def _plain(value: Any) -> Any:
    """An integer of numpy's as an int, which it counts as here; the fields below are strict."""
    return operator.index(value) if isinstance(value, np.integer) else value


def _checked(model: type[_Model], fields: dict[str, Any], **argument_of: str) -> _Model:
    """`model` from `fields`; what it refuses is told under the name of the argument that the field came from."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        field, colon, reason = first_error(error).partition(":")
        raise BudgetError(argument_of.get(field, field) + colon + reason) from error


def _normal_tie(tie: Any) -> Tie | None:
    entries = (tie,) if isinstance(tie, str) else tie
    if entries is None:
        return None
    try:
        return tuple(entry if isinstance(entry, str) else tuple(entry) for entry in entries)
    except TypeError as error:
        raise BudgetError(f"tie must be a list of presets and of lists of names, not {tie!r}") from error
