"""The run of PEFT's own tests on fused layers, by a suite of a few tests that is packed as PEFT packs its own."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def model():
    return get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))


def test_lora_forward():
    assert model()(torch.randn(3, 8)).shape == (3, 8)


def test_lora_repr():
    assert type(model().base_model.model[0]).__name__ == "Linear"


def test_lora_skipped():
    pytest.skip("as told")


def test_of_another_method():
    raise AssertionError
"""


def test_outcomes_are_compared(tmp_path):
    folder = tmp_path / "peft-0.0"
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "test_custom_models.py").write_text(TESTS)
    archive = tmp_path / "peft-0.0.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, folder.name)
    command = [sys.executable, "-m", "benchmarks.peft_suite", str(archive), "--files", "test_custom_models.py"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stderr
    assert "stock: 2 passed, 0 failed, 1 skipped, 0 not collected" in found.stdout
    assert "fused: 1 passed, 1 failed, 1 skipped, 0 not collected" in found.stdout
    assert "test_custom_models.py::test_lora_repr: stock passed, fused failed" in found.stdout
    assert "      1 calls, lora_linear" in found.stdout
    assert "test_of_another_method" not in found.stdout
