"""Run the benchmarks, print a table and write benchmarks/results/<device>.json.

python -m benchmarks.run --device cpu
python -m benchmarks.run --device cuda --only lora_linear
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_autocorrelation_diag, bench_diagonal_metrics, bench_fisher_diag, bench_lora_linear
from benchmarks.harness import Ceilings, run

MODULES = (bench_autocorrelation_diag, bench_fisher_diag, bench_diagonal_metrics, bench_lora_linear)
RESULTS = Path(__file__).parent / "results"


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="regular expression that a case's id must match")
    parser.add_argument("--commit", default="", help="commit to record, where the sources are no git checkout")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/")
    arguments = parser.parse_args()
    device = arguments.device
    torch.manual_seed(0)
    ceilings = Ceilings.measure() if device == "cuda" else None
    if ceilings:
        print(
            f"copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, bf16 {ceilings.flops_per_second / 1e12:.0f} TFLOP/s"
        )
    where = provenance(device, arguments.commit or current_commit())
    path = (RESULTS if arguments.record else Path("out/benchmarks")) / f"{device_name(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Rows of cases that are not run this time are kept.
    rows = {row["id"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    wrong = []
    print(f"{'case':50} {'ours ms':>9} {'baseline':>9} {'ratio':>6} {'floor':>8} {'error':>8}  peers")
    for module in MODULES:
        for case in module.cases(device):
            if not re.search(arguments.only, case.id):
                continue
            row = run(case, device, ceilings) | where
            if row.get("wrong"):
                wrong.append(case.id)
                rows.pop(case.id, None)
                print(f"{case.id:50} wrong: error {row['error']:.2e} above {case.tolerance:.2e}", flush=True)
                continue
            rows[case.id] = row
            peers = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["peers"].items())
            print(
                f"{case.id:50} {row['ours_ms']:9.4f} {row['baseline_ms']:9.4f} {row['ratio']:6.3f} "
                f"{row.get('floor_ms', float('nan')):8.4f} {row['error']:8.1e}  {peers}",
                flush=True,
            )
            path.write_text(json.dumps([rows[key] for key in sorted(rows)], indent=1) + "\n")
    if wrong:
        print(f"wrong results, no speed reported: {', '.join(wrong)}", file=sys.stderr)
    print(f"written to {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
