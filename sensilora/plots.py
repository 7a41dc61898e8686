"""Pictures: a plan's ranks by layer and projection, training curves, comparisons. Needs the extra ``plots``."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sensilora._files import write_bytes
from sensilora.allocation import assign_ranks
from sensilora.errors import BudgetError, RankError
from sensilora.plan import RankPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".pdf")
_OTHER = "other"


def plot_ranks(plan: RankPlan, path: str | os.PathLike[str] | None = None) -> Figure:
    """Heat maps of the ranks the plan's budget gives under the global, the local and the fused scores.

    Rows are projections, columns are layers (the first number in a module's name; modules without one stand in the
    column "other"), and every cell holds its rank. All panels share one colour scale. A plan whose ranks follow from
    none of the three scores (edited by hand, uniform) gets a panel of its own. That is the only one where the budget,
    the bounds or the ties do not suit the plan's matrices any more, some of which were taken out by hand.

    Args:
        plan: The plan; the three allocations are made again from its metrics and settings.
        path: Where to write the picture, as .png, .svg or .pdf. None writes nothing.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the ending of `path` is none of the three.
    """
    figure = _figure(path)
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    panels = _rank_panels(plan)
    rows, columns, cells = _layout(list(plan.matrices))
    values = [rank for _, ranks in panels for rank in ranks.values()]
    # Two digits need about 0.3 inch at the font size used; with few layers the cells may be wider.
    cell_width = min(0.62, max(0.31 if max(values) < 100 else 0.38, 9.0 / len(columns)))
    width = 2.6 + 0.075 * max(map(len, rows)) + cell_width * len(columns)
    figure.set_size_inches(max(6.5, width), 1.2 + len(panels) * (0.95 + 0.29 * len(rows)))
    low, high = min(values), max(*values, min(values) + 1)
    # The square root keeps one large rank from making all the others one colour.
    norm = PowerNorm(0.5, vmin=low, vmax=high)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, ranks) in zip(axes, panels, strict=True):
        grid = np.full((len(rows), len(columns)), np.nan)
        for name, rank in ranks.items():
            grid[cells[name]] = rank
        image = axis.pcolormesh(np.ma.masked_invalid(grid), cmap="YlGnBu", norm=norm, edgecolors="white", linewidth=1)
        for (row, column), rank in np.ndenumerate(grid):
            if not np.isnan(rank):
                colour = "white" if norm(rank) > 0.55 else "black"
                text = f"{rank:.0f}"
                label = axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=colour)
                # Inside its cell in any case; measuring thousands of them for the layout takes seconds.
                label.set_in_layout(False)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=8)
        axis.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
        axis.tick_params(length=0)
        axis.set_ylabel("projection")
        axis.set_facecolor("0.94")
        axis.spines[:].set_visible(False)
    axes[-1].set_xlabel("layer")
    ticks = sorted({low, *(tick for tick in MaxNLocator(integer=True).tick_values(low, high) if low < tick <= high)})
    figure.colorbar(image, ax=list(axes), label="LoRA rank", fraction=0.03, pad=0.01, aspect=40, ticks=ticks)
    budget = f"{plan.budget.kind.replace('_', ' ')} {plan.budget.value:,}"
    # The end of a long path tells more than its beginning.
    model = plan.model_id if len(plan.model_id) <= 50 else "…" + plan.model_id[-49:]
    figure.suptitle(
        f"LoRA ranks of {model or 'the model'}\n{budget}, {plan.allocation.strategy} strategy", fontsize=12
    )
    _write(figure, path)
    return figure


def plot_training(
    histories: Mapping[str, Mapping[str, Sequence[float]]], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Training curves of several runs, one panel a quantity.

    Args:
        histories: By run name, its quantities by name. "loss" has a value a step and is drawn smoothed over its own
            faint line; every other quantity, such as "dev_accuracy", has a value an epoch.
        path: Where to write the picture, as .png, .svg or .pdf. None writes nothing.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `histories` holds no quantity, or the ending of `path` is none of the three.
    """
    quantities = list(dict.fromkeys(quantity for history in histories.values() for quantity in history))
    if not quantities:
        raise ValueError("histories holds no training curve; give at least one run with a loss")
    figure = _figure(path)
    figure.set_size_inches(5.2 * len(quantities), 3.8)
    for axis, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        per_step = quantity == "loss"
        for i, (run, history) in enumerate(histories.items()):
            values, colour = np.asarray(history.get(quantity, ()), dtype=np.float64), f"C{i}"
            steps = np.arange(1, len(values) + 1)
            # Runs of the same seed lie nearly on one another: later ones are dashed, so that the first shows through.
            dashes = ("-", "--", ":", "-.")[i % 4]
            if per_step:
                axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
                axis.plot(steps, _smoothed(values), dashes, color=colour, linewidth=1.8, label=run)
            else:
                axis.plot(steps, values, dashes, color=colour, marker="o", markersize=4, linewidth=1.5, label=run)
        _label(axis, quantity, per_step)
        if quantity.endswith("accuracy"):
            # The whole range: a scale fitted to two nearly equal runs would make noise look like a difference.
            axis.set_ylim(0, 1)
    _write(figure, path)
    return figure


def plot_comparison(
    values: Mapping[str, Sequence[float]],
    intervals: Mapping[str, tuple[float, float]],
    path: str | os.PathLike[str] | None = None,
    *,
    reference: str,
    metric: str,
) -> Figure:
    """Runs of several arms, paired by seed, and beside them one arm's differences to the others.

    Args:
        values: By arm, a value a seed, in one order of seeds, between -1 and 1; drawn in points (hundredths).
        intervals: By each other arm, the confidence interval of the mean of `reference` less that arm.
        path: Where to write the picture, as .png, .svg or .pdf. None writes nothing.
        reference: The arm of `values` that the others are compared with.
        metric: What the values are, for the axes.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the ending of `path` is none of the three.
    """
    figure = _figure(path)
    figure.set_size_inches(9.4, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    arms, points = list(values), {arm: 100 * np.asarray(seeds, dtype=np.float64) for arm, seeds in values.items()}
    left.plot(arms, np.stack(list(points.values())), color="0.75", linewidth=0.9, zorder=1)
    for i, arm in enumerate(arms):
        left.scatter([arm] * len(points[arm]), points[arm], color=f"C{i}", s=22, zorder=2)
        left.hlines(points[arm].mean(), i - 0.22, i + 0.22, color=f"C{i}", linewidth=2.5, zorder=3)
    left.set_title("each run, runs of one seed joined; bars are means", fontsize=10, loc="left")
    left.set_ylabel(f"{metric}, points")
    left.margins(x=0.12)
    for place, (arm, (low, high)) in enumerate(intervals.items()):
        differences, colour = points[reference] - points[arm], f"C{arms.index(arm)}"
        right.scatter([place] * len(differences), differences, color=colour, s=18, alpha=0.45)
        mean = differences.mean()
        reach = [[mean - 100 * low], [100 * high - mean]]
        right.errorbar([place + 0.12], [mean], yerr=reach, fmt="s", color=colour, capsize=5, linewidth=1.8)
    right.axhline(0.0, color="0.3", linewidth=0.9, linestyle="--")
    right.set_xticks(range(len(intervals)), [f"less {arm}" for arm in intervals])
    right.set_xlim(-0.5, len(intervals) - 0.5)
    right.set_title(f"{reference}, paired differences with 95 % interval", fontsize=10, loc="left")
    right.set_ylabel(f"difference in {metric}, points")
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _write(figure, path)
    return figure


def _label(axis: Axes, quantity: str, per_step: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(
        "training loss (smoothed; pale: each step)" if per_step else quantity.replace("_", " "), fontsize=11
    )
    axis.set_xlabel("step" if per_step else "epoch")
    axis.set_ylabel("loss" if per_step else quantity.replace("_", " "))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a twentieth of the curve, cut off at the ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _rank_panels(plan: RankPlan) -> list[tuple[str, dict[str, int]]]:
    """Title and ranks of each panel."""
    shapes = {name: entry.shape for name, entry in plan.matrices.items()}
    titles = {
        "global": "global score (trace)",
        "local": "local score (top-k mean and effective rank)",
        "fused": "fused score (global and local)",
    }
    panels, own = [], False
    for scores, title in titles.items():
        theta = np.array([getattr(entry, f"score_{scores}") for entry in plan.matrices.values()])
        try:
            ranks = assign_ranks(shapes, theta, plan.allocation, plan.budget.kind, plan.budget.value)
        except (BudgetError, RankError):
            return [("this plan (edited: its settings do not suit the matrices it has left)", plan.ranks)]
        if scores == plan.allocation.scores and ranks == plan.ranks:
            title, own = f"{title} — this plan", True
        panels.append((title, ranks))
    return panels if own else [*panels, ("this plan (ranks set by hand)", plan.ranks)]


def _layout(names: Sequence[str]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Row labels, column labels, and (row, column) of every matrix."""
    places: dict[str, tuple[tuple[str, ...], int, int | None]] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if number is None:
            places[name] = tuple(parts), len(parts), None
        else:
            places[name] = (*parts[:number], *parts[number + 1 :]), len(parts) - number - 1, int(parts[number])
    # By kind, which is the name without the layer's number: how many of its components come after that number.
    kinds = {kind: tail for kind, tail, _ in places.values()}
    layers = sorted({layer for _, _, layer in places.values() if layer is not None})
    columns = [str(layer) for layer in layers]
    if any(layer is None for _, _, layer in places.values()):
        columns.append(_OTHER)
    row_of = {kind: row for row, kind in enumerate(kinds)}
    cells = {
        name: (row_of[kind], len(layers) if layer is None else layers.index(layer))
        for name, (kind, _, layer) in places.items()
    }
    return [_shortest(kind, kinds) for kind in kinds], columns, cells


def _shortest(kind: tuple[str, ...], kinds: Mapping[tuple[str, ...], int]) -> str:
    """The shortest end of `kind` that ends no other, else what follows the layer if that is alone, else all of it."""
    for length in range(1, kinds[kind] + 1):
        if sum(other[-length:] == kind[-length:] for other in kinds) == 1:
            return ".".join(kind[-length:])
    tail = kind[len(kind) - kinds[kind] :]
    if tail and sum(other[len(other) - length :] == tail for other, length in kinds.items()) == 1:
        return ".".join(tail)
    return ".".join(kind)


def _figure(path: str | os.PathLike[str] | None) -> Figure:
    # A Figure of its own, never pyplot: that would pick a display backend and keep every figure alive.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'sensilora[plots]'") from error
    if path is not None and Path(path).suffix.lower() not in _FORMATS:
        raise ValueError(f"cannot tell the picture format of {path}; end the name with one of {', '.join(_FORMATS)}")
    return Figure(layout="constrained")


def _write(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    if path is None:
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lower()[1:], dpi=130)
    write_bytes(path, buffer.getvalue())
