"""Triton kernels compiled for a Hopper GPU on any machine: what the interpreter does not see."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# Of a multiprocessor of compute capability 9.0; a program takes another KiB.
REGISTERS, SHARED, RESERVED = 64 * 1024, 228 * 1024, 1024


@pytest.fixture(scope="module")
def usage():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_nothing_is_spilled_in_the_main_loops(usage):
    # A few registers may wait in memory over the end of a tile where its update is large, and some of ranks up to 128
    # in fp32 under a mask, for which there are no smaller tiles. A dropout probability of 1 / 32768 is nobody's.
    tuned = {name: case["spilled"] for name, case in usage.items() if "of 1" not in name}
    spilled = {name: count for name, count in tuned.items() if count > 256}
    assert all("fp32 128 True" in name and count <= 512 for name, count in spilled.items()), spilled


@pytest.mark.parametrize(
    ("product", "beside"),
    [
        *itertools.product(
            ["product early 16", "product early 32", "product add 16", "segments product"],
            ["down_beside 16", "outer_beside 16"],
        ),
        ("product dropout 16", "outer_dropout_beside 16"),
        ("product dropout 32", "outer_dropout_beside 32"),
    ],
)
def test_the_skinny_passes_find_room_beside_the_product(usage, product, beside):
    product, beside = usage[product], usage[beside]
    # Eight warps and four, their registers allotted in steps of 8 a thread.
    registers = 256 * -(-product["registers"] // 8) * 8 + 128 * -(-beside["registers"] // 8) * 8
    assert registers <= REGISTERS
    assert product["shared"] + beside["shared"] + 2 * RESERVED <= SHARED


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_signs_leave_room_for_loads_in_flight(usage, dtype):
    # Half of the threads a multiprocessor can hold, each with 32 elements under way.
    assert usage[f"hutchinson {dtype}"]["registers"] <= 64
    assert usage[f"hutchinson {dtype}"]["spilled"] == 0


@pytest.mark.parametrize("name", ["metrics exponents", "metrics digits", "metrics tails"])
def test_metrics_leave_room_for_loads_in_flight(usage, name):
    # Three programs of four warps, each with 2048 values under way.
    assert 3 * 128 * -(-usage[name]["registers"] // 8) * 8 <= REGISTERS
    assert usage[name]["spilled"] == 0


def test_numbers_of_one_compile(usage):
    # Which Triton compiles in where they are part of a tuple.
    for name in ("reduce of sizes of one", "product dropout of 1", "product dropouts of 1"):
        assert usage[name]["registers"] > 0
