"""The CUDA kernels of csrc/ run on the CPU: their index arithmetic, where there is no GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "autocorrelation_diag",
        "diagonal_metrics",
        "fisher_diag",
        "fisher_diag_hopper",
        "hutchinson",
        "lora_linear",
        "lora_segments",
    ],
)
def test_kernels(tmp_path, name):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    source = Path(__file__).with_name(f"check_{name}_kernels.cpp")
    program = tmp_path / "check"
    command = [compiler, "-std=c++17", "-O1", "-Wno-unknown-pragmas", source, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    run = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    assert run.stdout == "passed\n", run.stdout + run.stderr
