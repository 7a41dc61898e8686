"""The benchmarks: no speed for a wrong result, which rows there are, the fuzzer, the tables and plots."""

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")

from benchmarks import (
    bench_hutchinson,
    bench_lora_group,
    bench_lora_linear,
    bench_lora_segments,
    bench_model,
    bench_peft,
    fuzz,
    harness,
    report,
    run,
)
from benchmarks.harness import Case, Unavailable
from sensilora.ops import _backend

RESULTS = Path(run.RESULTS)
HEADLINES = [
    "hutchinson/accumulate/8.7e8",
    "lora_linear/4096x4096/r16/p0.05",
    "lora_linear/4096x4096/r16/T256/graph",
    "lora_linear/4096x14336/r16/p0/native",
    "lora_group/qkv_4096/r6_11_17/p0",
    "lora_group/gate_up_4096/r7_19/p0.05",
    "lora_segments/8_adapters/r4_to_64",
    "model/llama8b_4x2048/avg8/p0",
]


def fake(error=0.0):
    return Case(ours=lambda: None, baseline=lambda: None, errors=lambda: [0.0, error], tolerance=1e-2)


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")])
def test_a_wrong_result_gets_no_speed(error):
    row = harness.run(fake(error), "cpu", None)
    assert row["wrong"]
    assert "ours_ms" not in row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bandwidth_is_recorded_where_it_is_the_point(dtype):
    row = harness.run(bench_hutchinson._case("cpu", 5000, dtype), "cpu", None)
    assert row["error"] == 0
    assert row["tbps"] * row["ours_ms"] * 1e9 == pytest.approx(5000 * (8 + dtype.itemsize))
    assert f"Bandwidth of `a`: {row['tbps']:.3g} TB/s." in report.table([{"id": "a", **row}])


def test_a_peer_without_memory_is_named():
    def peer():
        raise torch.OutOfMemoryError("CUDA out of memory")

    nothing = lambda: None  # noqa: E731
    case = harness.Case(nothing, nothing, lambda: [0.0], 0.0, peers={"theirs": peer, "others": nothing})
    row = harness.run(case, "cpu", None)
    assert list(row["peers"]) == ["others"]
    assert row["out_of_memory"] == ["theirs"]
    assert "Out of memory in `a`: theirs." in report.table([{"id": "a", **row}])


def test_rows_cover_what_is_promised():
    names = run.all_cases("cuda")
    assert set(HEADLINES) <= set(names)
    assert all(name.startswith("cpu/") for name in run.all_cases("cpu"))


# Orderings and comparisons are no benchmarks of speed: their files have tests of their own.
@pytest.mark.parametrize(
    "path",
    sorted(set(RESULTS.glob("*.json")) - {RESULTS / "orderings.json", RESULTS / "compare-glue.json"}),
    ids=lambda path: path.stem,
)
def test_recorded_rows_are_of_cases_that_exist(path):
    names = {*run.all_cases("cpu" if path.stem.startswith("cpu") else "cuda")}
    names |= {f"fuzz/{op}" for suite in fuzz.SUITES.values() for op in suite.OPS}
    assert {row["id"] for row in json.loads(path.read_text())} <= names


def test_run_writes_rows_and_fails_on_a_wrong_one(tmp_path, monkeypatch, capsys):
    def unavailable():
        raise Unavailable("no such kernel")

    made = {"op/good": fake, "op/wrong": lambda: fake(1.0), "op/absent": unavailable, "other/good": fake}
    monkeypatch.setattr(run, "MODULES", [SimpleNamespace(cases=lambda device: made)])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "out" / "benchmarks" / f"{run.device_name('cpu')}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{"id": "op/wrong"}, {"id": "op/old"}]))
    assert run.main(["--device", "cpu", "--only", "^op/", "--commit", "abc"]) == 1
    rows = {row["id"]: row for row in json.loads(path.read_text())}
    assert list(rows) == ["op/good", "op/old"]
    assert rows["op/good"].keys() >= {"ours_ms", "baseline_ms", "ratio", "peers", "error", "commit", "torch", "date"}
    assert "skipped: no such kernel" in capsys.readouterr().out
    assert run.main(["--device", "cpu", "--only", "good"]) == 0
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu", "--only", "nothing"])


LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
# Cases at sizes for a test: their check passes, and every way gives results of the same shapes.
SMALL = {
    "layer on a CPU": lambda p: bench_lora_linear._cpu_case(48, 40, 56, 16, p, torch.bfloat16),
    "layer": lambda p: bench_lora_linear._gpu_case(48, 40, 56, 16, p, device="cpu"),
    "group": lambda p: bench_lora_group._case("cpu", 48, 40, [(32, 6), (24, 11), (40, 17)], p),
    "segments": lambda p: bench_lora_segments._case("cpu", 48, (20, 1, 11, 30), (4, 8, 3, 20)),
    "model": lambda p: bench_model._case("cpu", LLAMA, 2, 8, p),
    "peft": lambda p: bench_peft._case("cpu", LLAMA, 2, 8, p),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("name", SMALL)
def test_cases_are_right_at_small_sizes(name, p):
    case = SMALL[name](p)
    errors, eager_errors = case.errors(), case.eager_errors()
    assert len(errors) == len(eager_errors)
    assert max(errors) <= case.tolerance
    assert max(eager_errors) <= case.tolerance
    shapes = [value.shape for value in tree_leaves(case.ours())]
    for peer in case.peers.values():
        assert [value.shape for value in tree_leaves(peer())] == shapes
    case.baseline()


def test_ranks_of_the_model_average_eight():
    names = [f"layer{layer}.{name}" for layer in range(32) for name in bench_model.PROJECTIONS]
    ranks = bench_model._ranks(names)
    assert sum(ranks.values()) == 8 * len(names)
    assert all(len({ranks[name] for name in names[i : i + 7]}) == 7 for i in range(0, len(names), 7))


@pytest.mark.parametrize("suite", fuzz.SUITES)
def test_fuzz_finds_nothing(device, suite):
    cases = {"lora": 80, "curvature": 120}[suite]
    assert {fuzz.op_of(suite, number) for number in range(cases)} == set(fuzz.SUITES[suite].OPS)
    assert fuzz.check_chunk(suite, range(cases), 0, device) == []


def test_fuzz_finds_a_mask_that_backward_does_not_apply(monkeypatch):
    module = sys.modules["sensilora.ops.lora_linear"]  # the name in the package is its function

    def faulty(grad, x, h, weight, lora_A, lora_B, scaling, dropout_p, seed, need_grad_x):
        return module._reference_backward(grad, x, h, weight, lora_A, lora_B, scaling, 0.0, seed, need_grad_x)

    monkeypatch.setitem(_backend._table["lora_linear_backward"], "torch", _backend.Implementation(faulty))
    monkeypatch.setattr(_backend, "why_not", lambda op, name, *_: None if name == "torch" else "not tested here")
    failures = fuzz.check_chunk("lora", range(20), 0, "cpu")
    assert failures
    assert all("times the tolerance" in text for _, text in failures)


def joined_sequences(right, x, grad, lengths, convention, out, accumulate):
    first = lengths[:2].sum().reshape(1)
    right(x, grad, torch.cat([first, lengths[2:]]), convention, out, accumulate)


def last_row_left_out(right, x, mask, out, accumulate):
    right(x[:-1], None if mask is None else mask[:-1], out, accumulate)


def half_a_sign(right, hz, out, seed, offset):
    right(hz, out, seed, offset & 0xFFFFFFFF)


def signs_of_a_short_call(right, out, seed, offset):
    right(out, seed, offset)
    out.view(-1)[4000:].fill_(1.0)


def one_more_at_ties(right, diags, counts, alpha):
    trace, topk_mean, effective_rank = right(diags, counts, alpha)
    ties = torch.tensor([diag.numel() > len(diag.unique()) for diag in diags])
    return trace, topk_mean, effective_rank + ties


def not_the_kth(right, diags, counts, alpha):
    return right(diags, [max(1, count - 1) for count in counts], alpha)


FAULTS = {
    "fisher_diag": [joined_sequences],
    "autocorrelation_diag": [last_row_left_out],
    "hutchinson_accumulate": [half_a_sign],
    "rademacher": [signs_of_a_short_call],
    "diagonal_metrics": [one_more_at_ties, not_the_kth],
}


@pytest.mark.parametrize(("op", "fault"), [(op, fault) for op, faults in FAULTS.items() for fault in faults])
def test_fuzz_finds_a_fault_of(op, fault, monkeypatch):
    for name, implementation in list(_backend._table[op].items()):
        faulty = functools.partial(fault, implementation.call)
        monkeypatch.setitem(_backend._table[op], name, _backend.Implementation(faulty, implementation.dtypes))
    families = [first for first in range(0, 360, fuzz.FAMILY) if fuzz.op_of("curvature", first).startswith(op)]
    numbers = [number for first in families[:6] for number in range(first, first + 3)]
    assert any("times the tolerance" in text for _, text in fuzz.check_chunk("curvature", numbers, 0, "cpu"))


def test_fuzz_counts_what_it_checked_and_records_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fuzz.main(["--device", "cpu", "--cases", "70", "--commit", "abc"]) == 0
    (path,) = (tmp_path / "out" / "benchmarks").iterdir()
    rows = {row["id"]: row for row in json.loads(path.read_text())}
    assert {name: row["cases"] for name, row in rows.items()} == {
        "fuzz/autocorrelation_diag": 10,
        "fuzz/diagonal_metrics": 10,
        "fuzz/fisher_diag": 40,
        "fuzz/hutchinson_accumulate": 10,
        "fuzz/lora_group": 10,
        "fuzz/lora_linear": 40,
        "fuzz/lora_segments": 10,
        "fuzz/lora_update": 10,
    }
    assert all(row["failures"] == 0 and row["seeds"] == [0] for row in rows.values())
    done, _ = fuzz.run("curvature", 200, 0, "cpu", 1, seconds=0.0)
    assert len(done) < 200


def test_fuzz_repeats_a_case(capsys):
    assert fuzz.main(["--device", "cpu", "--ops", "curvature", "--case", "12"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("diagonal_metrics [")
    assert fuzz.main(["--device", "cpu", "--ops", "curvature", "--case", "12"]) == 0
    assert capsys.readouterr().out == first
    with pytest.raises(SystemExit):
        fuzz.main(["--device", "cpu", "--case", "12"])


def row(name, ratio, **peers):
    return {"id": name, "ours_ms": ratio, "baseline_ms": 1.0, "ratio": ratio, "floor_ms": 0.9, "error": 1e-3,
            "error_vs_eager": 0.9, "peers": peers, "gpu": "g", "date": "d"}  # fmt: skip


@pytest.fixture
def results(tmp_path, monkeypatch):
    rows = [
        row("lora_linear/64x64/r16/p0", 1.1, eager=1.3, PEFT=1.4),
        row("lora_linear/4096x4096/r16/p0", 1.1, eager=1.3),
        row("lora_linear/4096x4096/r6/p0", 1.2, eager=1.5),
        row("lora_group/qkv_64/r6_11/p0.05", 1.05, eager=1.8),
        row("model/m/avg8/p0", 1.06, **{"PEFT, rank 8": 1.15})
        | {"peak_gib": {"ours": 66.0, "baseline": 61.0, "PEFT, rank 8": 72.0}},
        {"id": "fuzz/lora_linear", "cases": 10, "failures": 0, "seeds": [0], "gpu": "g"},
    ]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "gpu.json").write_text(json.dumps(rows))
    return tmp_path


def test_page_is_filled_from_the_results(results):
    page = (
        "a\n<!-- results: gpu lora_linear/ -->\nold\n<!-- end -->\n<!-- results: gpu fuzz/ -->\n<!-- end -->\n"
        "<!-- results: gpu absent/ -->\n<!-- end -->\n<!-- plot: gpu layer -->\n<!-- end -->\nz"
    )
    filled = report.render(page)
    assert report.render(filled) == filled
    assert "old" not in filled
    assert filled.index("4096x4096/r6/") < filled.index("4096x4096/r16/")
    assert "| `fuzz/lora_linear` | 10 | 0 | 0 |" in filled
    assert "Not measured yet." in filled
    assert "ours 1.05 to 1.10, eager 1.30 to 1.80, PEFT 1.40.](images/gpu-layer.png)" in filled
    assert "Peak memory" in report.table(report.load("gpu", "model/"))


def test_plots_are_written(results):
    report.write_images("gpu", results)
    assert sorted(path.name for path in results.glob("*.png")) == ["gpu-layer.png", "gpu-model.png", "gpu-rank.png"]


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_a_captured_step_repeats_it(monkeypatch, p):
    for limit in ("LAUNCH_BOUND_FLOPS", "NATIVE_ROWS"):
        monkeypatch.setattr(f"sensilora.ops._products.{limit}", 0)  # as in a graph
    case = bench_lora_linear._gpu_case(64, 128, 256, 16, p)
    replay = harness.captured(case.ours)
    for value, wanted in zip(replay(), case.ours(), strict=True):
        assert torch.equal(value, wanted)


class SimulatedGPU:
    """A host that takes `host_ms` to launch a call and a device that takes `device_ms` to run it."""

    def __init__(self, monkeypatch, host_ms, device_ms):
        self.host_ms, self.device_ms, self.now, self.free = host_ms, device_ms, 0.0, 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.now, gpu.free)

            def query(self):
                return gpu.now >= self.at

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.run(cycles / 2_000_000))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.wait())
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now / 1e3)

    def run(self, milliseconds):
        self.free = max(self.now, self.free) + milliseconds

    def wait(self):
        self.now = max(self.now, self.free)

    def call(self):
        self.now += self.host_ms
        self.run(self.device_ms)


def test_a_host_that_becomes_slower_does_not_count_as_device_time(monkeypatch):
    gpu = SimulatedGPU(monkeypatch, host_ms=0.1, device_ms=0.5)
    timer = harness._cuda_timer(gpu.call)
    assert timer()[0] == pytest.approx(0.5)
    gpu.host_ms = 3.0
    assert timer()[0] == pytest.approx(0.5)


def test_a_call_that_takes_the_host_longest_is_timed_once(monkeypatch):
    gpu = SimulatedGPU(monkeypatch, host_ms=300.0, device_ms=500.0)
    timer = harness._cuda_timer(gpu.call)
    before = gpu.now
    assert timer()[0] >= 500.0
    assert gpu.now - before < 1000.0


def test_a_call_that_waits_for_the_device_is_timed(monkeypatch):
    gpu = SimulatedGPU(monkeypatch, host_ms=0.1, device_ms=2.0)

    def call():
        gpu.call()
        gpu.wait()

    timer = harness._cuda_timer(call)
    # It waits for the device's earlier work too, so that only the launches within count.
    assert [timer()[0], timer()[0]] == pytest.approx([2.1, 2.1], abs=0.2)
