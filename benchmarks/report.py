"""Write the tables of docs/benchmarks.md from benchmarks/results/*.json: ``python -m benchmarks.report``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def table(rows: list[dict[str, Any]]) -> str:
    """One results file as a Markdown table, with where it was measured below."""
    lines = [
        "| case | ours ms | baseline ms | ratio | floor ms | error | error vs eager | others to the baseline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
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
    keys = ("gpu", "cpu", "torch", "triton", "python", "commit", "date")
    places = {", ".join(f"{key} {row[key]}" for key in keys if key in row) for row in rows}
    return "\n".join([*lines, "", *(f"Measured with {place}." for place in sorted(places))])


def _number(row: dict[str, Any], key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def render(page: str) -> str:
    """The page with every ``<!-- results: NAME -->`` ... ``<!-- end -->`` block filled from results/NAME.json."""

    def fill(match: re.Match[str]) -> str:
        rows = json.loads((RESULTS / f"{match[1]}.json").read_text())
        return f"<!-- results: {match[1]} -->\n{table(rows)}\n<!-- end -->"

    return re.sub(r"<!-- results: (\S+) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
