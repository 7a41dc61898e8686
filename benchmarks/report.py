"""Write the tables and plots of docs/benchmarks.md from benchmarks/results/: ``python -m benchmarks.report``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
IMAGES = PAGE.parent / "images"

Row = dict[str, Any]


def load(name: str, pattern: str = "") -> list[Row]:
    """The rows of results/NAME.json whose id matches the regular expression from its beginning."""
    return [row for row in json.loads((RESULTS / f"{name}.json").read_text()) if re.match(pattern, row["id"])]


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table, with where they were measured below it."""
    if not rows:
        return "Not measured yet."
    lines = _fuzz_table(rows) if "cases" in rows[0] else _ratio_table(rows)
    keys = ("gpu", "cpu", "torch", "triton", "python", "commit", "date")
    places = {", ".join(f"{key} {row[key]}" for key in keys if key in row) for row in rows}
    return "\n".join([*lines, "", *(f"Measured with {place}." for place in sorted(places))])


def _ratio_table(rows: list[Row]) -> list[str]:
    lines = [
        "| case | ours ms | baseline ms | ratio | floor ms | error | error vs eager | others to the baseline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_order):
        cells = (
            f"`{row['id']}`",
            f"{row['ours_ms']:.4g}",
            f"{row['baseline_ms']:.4g}",
            f"**{row['ratio']:.3f}**",
            _number(row, "floor_ms", ".4g"),
            f"{row['error']:.1e}",
            _number(row, "error_vs_eager", ".2f"),
            ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["peers"].items()),
        )
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if "out_of_memory" in row:
            lines += ["", f"Out of memory in `{row['id']}`: {', '.join(row['out_of_memory'])}."]
        if "tbps" in row:
            lines += ["", f"Bandwidth of `{row['id']}`: {row['tbps']:.3g} TB/s."]
        if "peak_gib" in row:
            peaks = ", ".join(f"{arm} {gib:.1f}" for arm, gib in row["peak_gib"].items())
            lines += ["", f"Peak memory of `{row['id']}`, GiB: {peaks}."]
    return lines


def _fuzz_table(rows: list[Row]) -> list[str]:
    lines = ["| | cases | failures | seeds |", "|---|---|---|---|"]
    for row in rows:
        seeds = ", ".join(map(str, row["seeds"]))
        lines.append(f"| `{row['id']}` | {row['cases']} | {row['failures']} | {seeds} |")
    return lines


def _number(row: Row, key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def _order(row: Row) -> list[str | tuple[int, str]]:
    """Sorts ids with numbers by value: r6 before r16."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", row["id"])]


# --- plots

# Okabe and Ito's palette, told apart with any colour vision; marks differ in shape as well.
_STYLES = {
    "ours": ("#0072B2", "o"),
    "eager": ("#E69F00", "s"),
    "addmm": ("#009E73", "^"),
    "PEFT": ("#D55E00", "D"),
    "PEFT, bf16 adapters": ("#F0E442", "P"),
    "torch.compile": ("#CC79A7", "X"),
    "lora_linear one by one": ("#56B4E9", "v"),
}
LAYER = r"lora_linear/\d+x\d+/r16/p[\d.]+$|lora_group/"
RANK = r"lora_linear/4096x4096/r\d+/p0$"
MODEL = r"model/[^/]+/avg[^/]*/p[\d.]+$"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _mark(axes: Any, name: str, x: Any, y: Any, **kwargs: Any) -> None:
    colour, marker = _STYLES[name]
    size = 9 if name == "ours" else 6.5
    axes.plot(x, y, marker=marker, color=colour, markersize=size, label=name, markeredgecolor="white", **kwargs)


def _label(name: str) -> str:
    """A case's id as a reader's words."""
    layer = re.match(r"lora_linear/(\d+)x(\d+)/r(\d+)/p([\d.]+)$", name)
    if layer:
        return f"{layer[1]} → {layer[2]}, rank {layer[3]}" + _with_dropout(layer[4])
    group = re.match(r"lora_group/(\w+?)_\d+/r([\d_]+)/p([\d.]+)$", name)
    if group:
        members = "q, k, v" if group[1] == "qkv" else "gate, up"
        return f"{members}, ranks {group[2].replace('_', ', ')}" + _with_dropout(group[3])
    return name


def _with_dropout(p: str) -> str:
    return "" if float(p) == 0 else f", dropout {p}"


def _ratios(row: Row, name: str) -> float | None:
    return row["ratio"] if name == "ours" else row["peers"].get(name)


def _ranges(rows: list[Row]) -> str:
    """What a plot shows, for its alt text: "ours 1.10 to 1.81, eager 1.23 to 2.57"."""
    parts = []
    for name in _STYLES:
        found = [ratio for row in rows if (ratio := _ratios(row, name)) is not None]
        if found:
            least, most = f"{min(found):.2f}", f"{max(found):.2f}"
            parts.append(f"{name} {least}" if least == most else f"{name} {least} to {most}")
    return ", ".join(parts)


def plot_layer(rows: list[Row]) -> tuple[Figure, str]:
    """One line a case: every way's time as a multiple of the frozen layer's, and the physical limit."""
    rows = sorted(rows, key=lambda row: (row["id"].startswith("lora_group"), _order(row)), reverse=True)
    figure = _figure(8.5, 1.6 + 0.36 * len(rows))
    axes = figure.subplots()
    lines = range(len(rows))
    axes.axvline(1, color="0.35", linewidth=1.2)
    for name in _STYLES:
        points = [(ratio, line) for line in lines if (ratio := _ratios(rows[line], name)) is not None]
        if points:
            _mark(axes, name, *zip(*points, strict=True), linestyle="none", zorder=4 if name == "ours" else 3)
    floors = [row["floor_ms"] / row["baseline_ms"] for row in rows]
    axes.plot(floors, lines, "|", color="black", markersize=13, markeredgewidth=1.6, label="least possible", zorder=2)
    for line, row in enumerate(rows):
        axes.annotate(
            f"{row['ratio']:.2f}", (row["ratio"], line), (0, 7), textcoords="offset points", ha="center",
            fontsize=8, color=_STYLES["ours"][0],
        )  # fmt: skip
    axes.set_yticks(lines, [_label(row["id"]) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.set_xlabel("time / frozen layer's time, forward + backward")
    axes.grid(axis="x", color="0.9")
    axes.grid(axis="y", color="0.95")
    _clean(axes)
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9, handletextpad=0.2, columnspacing=1.2)
    return figure, f"Dot plot of {len(rows)} cases, time as a multiple of the frozen layer's: {_ranges(rows)}."


def plot_rank(rows: list[Row]) -> tuple[Figure, str]:
    """The same against the rank, 4096 → 4096."""
    rows = sorted(rows, key=_order)
    ranks = [int(re.search(r"/r(\d+)/", row["id"])[1]) for row in rows]  # type: ignore[index]
    figure = _figure(8.5, 3.8)
    axes = figure.subplots()
    for name in ("ours", "eager", "addmm", "PEFT", "PEFT, bf16 adapters"):
        points = [(rank, ratio) for rank, row in zip(ranks, rows, strict=True) if (ratio := _ratios(row, name))]
        if points:
            _mark(axes, name, *zip(*points, strict=True), zorder=4 if name == "ours" else 3)
    floors = [row["floor_ms"] / row["baseline_ms"] for row in rows]
    axes.plot(ranks, floors, "--", color="0.35", linewidth=1.2, label="least possible")
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    # 16 and 17, 32 and 33 would be printed over one another.
    for tick, rank in zip(axes.get_xticklabels(), ranks, strict=True):
        tick.set_horizontalalignment("left" if rank - 1 in ranks else "right" if rank + 1 in ranks else "center")
    axes.set_ylim(bottom=min(0.95, *floors))
    axes.set_xlabel("LoRA rank (4096 → 4096, 8192 tokens)")
    axes.set_ylabel("time / frozen layer's time")
    axes.grid(color="0.93")
    _clean(axes)
    axes.legend(frameon=False, fontsize=9, ncols=2)
    return (
        figure,
        f"Lines over ranks {ranks[0]} to {ranks[-1]}, time as a multiple of the frozen layer's: {_ranges(rows)}.",
    )


def plot_model(rows: list[Row]) -> tuple[Figure, str]:
    """Time and peak memory of a whole step: frozen, ours, PEFT."""
    rows = sorted(rows, key=_order)
    figure = _figure(8.5, 1.5 + 0.9 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    told = []
    lines, names = [], []
    for index, row in enumerate(reversed(rows)):
        peer = next(iter(row["peers"]), None)
        title = "dropout " + row["id"].rpartition("/p")[2] if not row["id"].endswith("/p0") else "no dropout"
        arms = [("frozen", 1.0, "baseline", "0.6"), ("ours", row["ratio"], "ours", _STYLES["ours"][0])]
        if peer is not None:
            arms.append(("PEFT", row["peers"][peer], peer, _STYLES["PEFT"][0]))
        for offset, (name, ratio, key, colour) in enumerate(arms):
            line = index * 4 - offset
            lines.append(line)
            names.append(f"{name}, {title}")
            milliseconds = ratio * row["baseline_ms"]
            for axes, value, text in (
                (left, milliseconds, f"{milliseconds:.0f} ms ({ratio:.2f})"),
                (right, row["peak_gib"][key], f"{row['peak_gib'][key]:.0f} GiB"),
            ):
                axes.barh(line, value, color=colour, height=0.8)
                axes.annotate(text, (value, line), (-5, 0), textcoords="offset points", ha="right", va="center",
                              color="white" if name != "frozen" else "black", fontsize=9)  # fmt: skip
            told.append(f"{name} {title} {milliseconds:.0f} ms and {row['peak_gib'][key]:.0f} GiB")
    left.set_yticks(lines, names)
    left.set_xlabel("milliseconds a step, forward + backward")
    right.set_xlabel("peak memory, GiB")
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        _clean(axes)
    return figure, f"Bars of a whole step: {'; '.join(told)}."


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


PLOTS: dict[str, tuple[str, Callable[[list[Row]], tuple[Figure, str]]]] = {
    "layer": (LAYER, plot_layer),
    "rank": (RANK, plot_rank),
    "model": (MODEL, plot_model),
}


def image(name: str, plot: str) -> str:
    """A plot as a Markdown image; nothing where its rows are not measured."""
    pattern, draw = PLOTS[plot]
    rows = load(name, pattern)
    return f"![{draw(rows)[1]}](images/{name}-{plot}.png)" if rows else ""


def write_images(name: str, folder: Path = IMAGES) -> None:
    """Every plot of results/NAME.json that has rows, as FOLDER/NAME-PLOT.png."""
    for plot, (pattern, draw) in PLOTS.items():
        rows = load(name, pattern)
        if rows:
            # Without the date and version that matplotlib writes, equal results give equal files.
            draw(rows)[0].savefig(folder / f"{name}-{plot}.png", dpi=150, metadata={"Software": None})


def render(page: str) -> str:
    """The page with its blocks filled: ``<!-- results: NAME PATTERN -->`` by the table of the matching rows of
    results/NAME.json, ``<!-- plot: NAME PLOT -->`` by the picture; each up to ``<!-- end -->``."""

    def fill(match: re.Match[str]) -> str:
        kind, name, which = match[1], match[2], match[3] or ""
        content = table(load(name, which)) if kind == "results" else image(name, which)
        return f"{match[0].partition('-->')[0]}-->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- (results|plot): (\S+)(?: (\S+))? -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        write_images(path.stem)
    PAGE.write_text(render(PAGE.read_text()))


if __name__ == "__main__":
    main()
