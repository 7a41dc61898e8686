"""Run the benchmarks, print a table of ratios and write a row a case to <device>.json.

python -m benchmarks.run                                                into out/benchmarks/
python -m benchmarks.run --device cuda --only lora_linear/4096x4096 --record   into benchmarks/results/
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    bench_autocorrelation_blocks,
    bench_autocorrelation_diag,
    bench_calibrate,
    bench_diagonal_metrics,
    bench_fisher_diag,
    bench_hutchinson,
    bench_lora_group,
    bench_lora_linear,
    bench_lora_segments,
    bench_model,
    bench_peft,
    bench_quantised,
)
from benchmarks.harness import Cases, Ceilings, Unavailable, run

MODULES = (
    bench_autocorrelation_diag,
    bench_autocorrelation_blocks,
    bench_fisher_diag,
    bench_diagonal_metrics,
    bench_hutchinson,
    bench_lora_linear,
    bench_lora_group,
    bench_lora_segments,
    bench_model,
    bench_peft,
    bench_quantised,
    bench_calibrate,
)
RESULTS = Path(__file__).parent / "results"


def all_cases(device: str) -> Cases:
    """Every case of a device, by id, in the order of the modules."""
    return {name: make for module in MODULES for name, make in module.cases(device).items()}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-threads"


def provenance(device: str, commit: str) -> dict[str, Any]:
    """Where and with what a row was measured."""
    return {
        "commit": commit,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "python": platform.python_version(),
        ("gpu" if device == "cuda" else "cpu"): device_name(device),
        "date": datetime.date.today().isoformat(),
    }


def current_commit() -> str:
    """The commit of the checkout, marked when the tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


class ResultsFile:
    """The rows of one device, by id; those of cases that are not run this time are kept."""

    def __init__(self, device: str, *, record: bool) -> None:
        self.path = (RESULTS if record else Path("out/benchmarks")) / f"{device_name(device)}.json"
        self.rows = {row["id"]: row for row in json.loads(self.path.read_text())} if self.path.exists() else {}

    def write(self, name: str, row: dict[str, Any] | None) -> None:
        """Put a row in the place of the one with its id; None takes that out."""
        self.rows.pop(name, None)
        if row is not None:
            self.rows[name] = {"id": name, **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps([self.rows[key] for key in sorted(self.rows)], indent=1) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that writes rows."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="", help="commit to record, where the sources are no git checkout")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/, not out/benchmarks/")


HEADER = f"{'case':48} {'ours ms':>9} {'baseline':>9} {'ratio':>6} {'floor':>8} {'error':>8}  others to the baseline"


def line(name: str, row: dict[str, Any]) -> str:
    """A row as one line of the printed table; the peak memory, where it was measured, below it."""
    peers = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in row["peers"].items())
    text = (
        f"{name:48} {row['ours_ms']:9.4f} {row['baseline_ms']:9.4f} {row['ratio']:6.3f} "
        f"{format(row['floor_ms'], '8.4f') if 'floor_ms' in row else '':8} {row['error']:8.1e}  {peers}"
    )
    if "out_of_memory" in row:
        text += f"\n    out of memory: {', '.join(row['out_of_memory'])}"
    if "tbps" in row:
        text += f"\n    {row['tbps']:.3g} TB/s"
    if "peak_gib" in row:
        text += "\n    peak GiB: " + ", ".join(f"{arm} {gib:.1f}" for arm, gib in row["peak_gib"].items())
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", default="", help="regular expression that a case's id must match")
    parser.add_argument("--list", action="store_true", help="print the ids of the cases and stop")
    options = parser.parse_args(arguments)
    device = options.device
    chosen = {name: make for name, make in all_cases(device).items() if re.search(options.only, name)}
    if options.list:
        print(*chosen, sep="\n")
        return 0
    if not chosen:
        parser.error(f"no case matches {options.only!r}; --list prints their ids")
    torch.manual_seed(0)
    ceilings = Ceilings.measure() if device == "cuda" else None
    if ceilings:
        print(
            f"copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, bf16 {ceilings.flops_per_second / 1e12:.0f} TFLOP/s"
        )
    where = provenance(device, options.commit or current_commit())
    results = ResultsFile(device, record=options.record)
    wrong = []
    print(HEADER)
    for name, make in chosen.items():
        gc.collect()  # what the last case left in reference cycles may be gigabytes of the device's memory
        if device == "cuda":
            torch.cuda.empty_cache()
        try:
            row = run(make(), device, ceilings)
        except Unavailable as reason:
            print(f"{name:48} skipped: {reason}", flush=True)
            continue
        if row.get("wrong"):
            wrong.append(name)
            results.write(name, None)
            print(f"{name:48} wrong: error {row['error']:.2e} above {row['tolerance']:.2e}", flush=True)
            continue
        results.write(name, row | where)
        print(line(name, row), flush=True)
    if wrong:
        print(f"wrong results, no speed reported: {', '.join(wrong)}", file=sys.stderr)
    print(f"written to {results.path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
