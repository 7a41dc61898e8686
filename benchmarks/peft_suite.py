"""PEFT's own LoRA tests on fused layers, beside the same tests on PEFT's layers.

    pip download --no-deps --no-binary :all: peft==$(python -c "import peft; print(peft.__version__)")
    python -m benchmarks.peft_suite peft-0.21.2.tar.gz [--files test_custom_models.py ...] [pytest's arguments]

The tests come with PEFT's source distribution, which must be of the installed version; they need ``parameterized``,
``datasets`` and what else their files import. In the fused run every ``LoraConfig`` that is made passes through
`sensilora.integrations.peft.use_fused`, also those that PEFT reads from files. Printed are the outcomes by file, the
tests whose outcome differs, how many calls of the ops the fused layers made, and how often PEFT's own forward
computed one, with the reasons.
Tests that need the hub fail in both runs where it cannot be reached; with HF_HUB_OFFLINE=1 they do so at once.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

#: Files of the suite that make LoRA layers without models from the hub.
FILES = [
    f"test_{name}.py"
    for name in (
        "arrow",
        "bdlora",
        "custom_models",
        "helpers",
        "initialization",
        "lora_conversion",
        "lora_ga",
        "lora_intruders",
        "lora_variants",
        "lorafa",
        "loraplus",
        "low_level_api",
        "mixed",
        "other",
        "target_parameters",
        "trainable_tokens",
        "tuners_utils",
        "velora",
    )
]
#: The largest file runs every test for each of PEFT's methods; of these, LoRA.
SELECTED = "not test_custom_models or (lora and not adalora and not randlora and not unilora and not xlora)"

#: Tests of how a layer calls itself, which is lora.Linear in the one run and lora.FusedLinear in the other.
OF_THE_NAME = {
    "test_modules_to_save_targets_lora_layer_raises",
    "test_module_type_large",
    "test_module_type_small",
    "test_repr_lora_conv1d",
    "test_repr_lora_linear",
    "test_target_parameters_and_target_modules",
}

Outcomes = dict[str, str]

calls: collections.Counter[str] = collections.Counter()
outcomes: Outcomes = {}


def pytest_configure(config) -> None:
    """As a plugin, in the process that runs the tests."""
    if os.environ["PEFT_SUITE"] == "fused":
        _fuse_every_config()
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        # The suite goes online all the same for a model that it has not seen.
        importlib.import_module("tests.testing_utils").hub_online_once = contextlib.nullcontext


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_collectreport(report) -> None:
    if report.failed:
        outcomes[report.nodeid] = "not collected"


def pytest_sessionfinish(session) -> None:
    Path(os.environ["PEFT_SUITE_OUTPUT"]).write_text(json.dumps({"outcomes": outcomes, "calls": calls}))


def _fuse_every_config() -> None:
    from peft import LoraConfig, PeftType

    from sensilora.integrations import peft

    initialised = LoraConfig.__post_init__

    def fused(config: LoraConfig) -> None:
        initialised(config)
        if config.peft_type == PeftType.LORA:
            peft.use_fused(config)

    LoraConfig.__post_init__ = fused
    for op in ("lora_linear", "lora_segments"):
        _count_calls(peft, op)
    peft._warn_of = lambda reason: calls.update([f"PEFT's forward: {reason}"])


def _count_calls(module, op: str) -> None:
    function = getattr(module, op)

    def counted(*args, **kwargs):
        calls[op] += 1
        return function(*args, **kwargs)

    setattr(module, op, counted)


def unpack(archive: Path, folder: Path) -> Path:
    """The suite's folder, made the package that its relative imports need."""
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")
    tests = next(folder.glob("*/tests"))
    (tests / "__init__.py").touch()
    return tests


def start(tests: Path, kind: str, files: list[str], arguments: list[str]) -> tuple[subprocess.Popen[bytes], Path]:
    """A run in a process of its own, and the file that it writes."""
    output = tests / f"{kind}.json"
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PEFT_SUITE": kind,
        "PEFT_SUITE_OUTPUT": str(output),
    }
    # The suite's own settings ask for coverage.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tests.parent), "-q", "--tb=no"]
    command += ["-p", "no:cacheprovider", "-p", "benchmarks.peft_suite", "-k", SELECTED, *arguments]
    command += [str(tests / file) for file in files]
    return subprocess.Popen(command, cwd=tests.parent, env=os.environ | environment), output


def finished(run: subprocess.Popen[bytes], output: Path) -> tuple[Outcomes, dict[str, int]]:
    """Outcomes by test, and layer calls by what computed them."""
    status = run.wait()
    if not output.is_file():
        sys.exit(f"pytest ended with {status} and no outcomes; what it printed is above")
    found = json.loads(output.read_text())
    return found["outcomes"], found["calls"]


def by_file(outcomes: Outcomes) -> dict[str, collections.Counter[str]]:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for test, outcome in outcomes.items():
        counts[test.partition("::")[0].rpartition("/")[2]][outcome] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="PEFT's source distribution, of the installed version")
    parser.add_argument("--files", nargs="+", default=FILES, metavar="FILE", help="names of the suite's files")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        tests = unpack(options.archive, Path(folder))
        runs = [start(tests, kind, options.files, arguments) for kind in ("stock", "fused")]
        (stock, _), (fused, calls) = (finished(*run) for run in runs)
    kinds = ("passed", "failed", "skipped", "not collected")
    print(f"\n{'':28} stock: {', '.join(kinds)}; fused: the same")
    counts = [by_file(stock), by_file(fused)]
    for file in sorted(counts[0] | counts[1]):
        print(f"{file:28} " + " | ".join(", ".join(f"{found[file][kind]:4}" for kind in kinds) for found in counts))
    for name, found in (("stock", stock), ("fused", fused)):
        total = collections.Counter(found.values())
        print(f"{name}: " + ", ".join(f"{total[kind]} {kind}" for kind in kinds))
    different = sorted(test for test in stock | fused if stock.get(test) != fused.get(test))
    of_the_name = {test for test in different if test.rpartition("::")[2] in OF_THE_NAME}
    for test in different:
        why = ", of the layer's name" if test in of_the_name else ""
        print(f"differs{why}: {test}: stock {stock.get(test)}, fused {fused.get(test)}")
    for what, count in sorted(calls.items()):
        print(f"{count:7} calls, {what}")
    return 1 if len(different) > len(of_the_name) else 0


if __name__ == "__main__":
    sys.exit(main())
