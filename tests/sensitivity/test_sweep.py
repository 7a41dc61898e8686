"""Passes under a memory budget give the numbers of one pass, and sums are let go of as early as they can be."""

import gc
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from sensilora.errors import CalibrationError
from sensilora.sensitivity import Diagonals, SensitivityReport, calibrate
from sensilora.sensitivity.losses import Likelihood
from sensilora.sensitivity.sweep import in_words, parse_bytes
from tests.sensitivity.oracles import Net, classification_batch, pad, sequences

driver = importlib.import_module("sensilora.sensitivity.calibrate")

LENGTHS = (5, 3, 7, 1, 6, 2)
LABELS = [0, 2, 1, 2, 0, 1]
ESTIMATORS = (
    {"estimator": "activation"},
    {"estimator": "activation", "variant": "inverse", "block_size": 4},
    {"estimator": "fisher"},
    {"estimator": "fisher", "mode": "per_position"},
    {"estimator": "fisher", "mode": "per_loss_term"},
    {"estimator": "fisher", "labels": "model", "draws": 2},
)
every_estimator = pytest.mark.parametrize(
    "arguments", ESTIMATORS, ids=lambda options: "-".join(map(str, options.values()))
)
# The widest matrix of Net is 12 x 6.
LARGEST = {"activation": 8 * 12, "fisher": 4 * 72}


def batch_of(indices=range(6)):
    ids = sequences(*LENGTHS)
    return classification_batch([ids[n] for n in indices], [LABELS[n] for n in indices])


def batches():
    return [batch_of([0, 1]), batch_of([2, 3, 4]), batch_of([5])]


def budget_of(arguments, factor=1):
    block = 4 * 8 if arguments.get("variant") == "inverse" else 8
    return factor * (12 * block if arguments["estimator"] == "activation" else LARGEST["fisher"])


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("24GB", 24 * 10**9),
        ("24 GiB", 24 * 2**30),
        ("1.5gib", 3 * 2**29),
        ("800MB", 8 * 10**8),
        (" 64 MiB ", 2**26),
        (4096, 4096),
        ("4096", 4096),
        (2**62 + 1, 2**62 + 1),
    ],
)
def test_sizes(size, expected):
    assert parse_bytes("memory_budget", size) == expected


@pytest.mark.parametrize("size", ["", "GB", "24 TB", "-1GB", "1e9", -5, 0, "0GB", True, 1.5, None, "1.5"])
def test_what_is_no_size(size):
    with pytest.raises(CalibrationError, match=r"^memory_budget=.* is no size; give bytes, or for example '24GB'"):
        parse_bytes("memory_budget", size)


def test_sizes_in_words():
    assert [in_words(size) for size in (0, 999, 1000, 235_000_000, 27_900_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "235 MB",
        "27.9 GB",
    ]


# ---------------------------------------------------------------------------------------------- the same numbers


@every_estimator
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_a_budget_changes_no_bit(arguments, use_reentrant):
    model = Net(repeat=2, use_reentrant=use_reentrant)
    whole = calibrate(model, batches(), **arguments, seed=3, progress=False)
    budget = budget_of(arguments)
    swept = calibrate(model, batches(), **arguments, seed=3, memory_budget=budget, progress=False)
    assert swept.matrices == whole.matrices
    assert (swept.tokens, swept.sequences) == (whole.tokens, whole.sequences)
    assert len(whole.passes) == 1 < len(swept.passes)
    assert sum(swept.passes) == whole.passes[0]
    assert max(swept.passes) <= budget


def test_no_budget_is_as_good_as_enough():
    passes = [
        calibrate(Net(), batches(), estimator="fisher", memory_budget=budget, progress=False).passes
        for budget in (None, "1GB", 10 * 4 * (3 * 36 + 2 * 72))
    ]
    assert passes == [(2 * 4 * (3 * 36 + 2 * 72),)] * 3


@given(st.integers(288, 2000), st.lists(st.integers(1, 3), min_size=1, max_size=4))
@settings(deadline=None, max_examples=15)
def test_any_budget_that_the_largest_matrix_fits(budget, sizes):
    torch.manual_seed(0)
    model = Net(depth=3)
    data, start = [], 0
    for size in sizes:
        data.append(batch_of([n % 6 for n in range(start, start + size)]))
        start += size
    arguments = {"estimator": "fisher", "labels": "model", "progress": False}
    whole = calibrate(model, data, **arguments)
    swept = calibrate(model, data, **arguments, memory_budget=budget)
    assert swept.matrices == whole.matrices
    assert max(swept.passes) <= budget
    # No pass could have taken the next one's first matrix too.
    assert len(swept.passes) <= -(-2 * whole.passes[0] // (budget - 288 + 1)) + 1


def test_tied_weights_are_measured_in_one_pass():
    model = Net()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    whole = calibrate(model, batches(), estimator="fisher", progress=False)
    swept = calibrate(model, batches(), estimator="fisher", memory_budget=288, progress=False)
    assert swept.matrices == whole.matrices
    assert swept["blocks.0.up"].aliases == ("blocks.1.up",)


@pytest.mark.parametrize("arguments", [ESTIMATORS[0], ESTIMATORS[5]], ids=["activation", "fisher"])
def test_a_shuffling_loader_gives_every_pass_the_same_order(arguments):
    def collate(items):
        return classification_batch([item["input_ids"] for item in items], [int(item["labels"]) for item in items])

    model, rows = Net(), [batch_of([n]) for n in range(6)]
    loader = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=collate)
    torch.manual_seed(7)
    whole = calibrate(model, loader, **arguments, progress=False)
    torch.manual_seed(7)
    swept = calibrate(model, loader, **arguments, memory_budget=budget_of(arguments), progress=False)
    assert swept.matrices == whole.matrices
    assert len(swept.passes) > 1


def test_the_labels_of_a_batch_depend_on_the_seed_and_its_place_alone():
    """So the batches of a pass do not have the same draws, and those of two passes do."""
    model, seen = Net(), []
    sample = Likelihood.sample

    def record(self, generator):
        labels = sample(self, generator)
        seen.append(labels.tolist())
        return labels

    same = [batch_of()] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Likelihood, "sample", record)
        calibrate(model, same, estimator="fisher", labels="model", seed=1, memory_budget=4 * 36 * 7, progress=False)
    assert len(seen) == 6
    assert seen[:3] == seen[3:]
    assert seen[0] != seen[1] != seen[2]


# ---------------------------------------------------------------------------------------------- what it costs


def live_sums(monkeypatch, model, data, **arguments):
    """(matrices, how many running sums there are when they are reduced) in the order of reduction, and the report."""
    found, measure = [], driver._measure

    def count(observer, matrices, **options):
        every = {id(other): other for other in observer.matrices.values()}
        live = sum(other.diagonal is not None for other in every.values())
        if matrices:
            found.append(([matrix.name for matrix in matrices], live))
        return measure(observer, matrices, **options)

    monkeypatch.setattr(driver, "_measure", count)
    report = calibrate(model, data, **arguments, progress=False)
    return found, report


@pytest.mark.parametrize("mode", ["per_sequence", "per_position"])
@pytest.mark.parametrize(
    "options", [{}, {"repeat": 2}, {"use_reentrant": True}, {"use_reentrant": False, "repeat": 2}], ids=str
)
def test_of_a_single_batch_one_sum_exists_at_a_time(monkeypatch, mode, options):
    found, report = live_sums(monkeypatch, Net(**options), [batch_of()], estimator="fisher", mode=mode)
    assert [live for _, live in found] == [1] * 10
    assert report.passes == (288,)
    # As their gradients arrive, from the loss back; the report is in module order all the same.
    assert found[0][0] == ["blocks.1.down"]
    assert next(iter(report)) == "blocks.0.query"
    # So a budget that one matrix fits is enough for one pass.
    same = calibrate(Net(**options), [batch_of()], estimator="fisher", mode=mode, memory_budget=288, progress=False)
    assert same.passes == (288,)


@pytest.mark.parametrize("draws", [1, 2])
def test_the_last_batch_takes_the_sums_away_one_by_one(monkeypatch, draws):
    arguments = {"estimator": "fisher", "labels": "model", "draws": draws}
    found, _ = live_sums(monkeypatch, Net(), DataLoader(batches(), batch_size=None), **arguments)
    assert [live for _, live in found] == list(range(10, 0, -1))
    assert found[0][0] == ["blocks.1.down"]


def test_data_of_unknown_length_is_reduced_at_the_end(monkeypatch):
    found, report = live_sums(monkeypatch, Net(), iter([batch_of()]), estimator="fisher")
    assert found == [(list(report), 10)]
    torch.manual_seed(0)
    assert report.matrices == calibrate(Net(), [batch_of()], estimator="fisher", progress=False).matrices


def test_a_matrix_that_the_last_batch_does_not_reach():
    class Gated(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(3, 3)

        def forward(self, input_ids, attention_mask=None):
            logits = super().forward(input_ids, attention_mask)
            return self.extra(logits) if len(input_ids) > 1 else logits

    model = Gated()
    expected = calibrate(model, iter(batches()), estimator="fisher", progress=False)
    assert calibrate(model, batches(), estimator="fisher", progress=False).matrices == expected.matrices
    assert expected["extra"].calls == 2


def test_the_passes_are_told_before_the_first(capsys):
    class Stop(Net):
        def forward(self, input_ids, attention_mask=None):
            raise RuntimeError(capsys.readouterr().err)

    with pytest.raises(RuntimeError) as stopped:
        calibrate(Stop(), batches(), estimator="fisher", memory_budget=800)
    assert str(stopped.value).startswith(
        "memory_budget 800 bytes: 3 passes over the calibration data, with sums of 720 bytes, 720 bytes, 576 bytes\n"
    )
    with pytest.raises(RuntimeError) as stopped:
        calibrate(Stop(), batches(), estimator="fisher", memory_budget="2MB")
    assert "memory_budget 2 MB: one pass over the calibration data, with sums of 2.02 kB\n" in str(stopped.value)
    capsys.readouterr()
    with pytest.raises(RuntimeError, match=r"^$"):
        calibrate(Stop(), batches(), estimator="fisher", memory_budget=800, progress=False)


def test_the_bar_counts_passes(capsys):
    calibrate(Net(), batches(), estimator="fisher", memory_budget=1200)
    shown = capsys.readouterr().err
    assert "pass 1 of 2: 100%" in shown
    assert "pass 2 of 2: 100%" in shown


def test_the_report_keeps_the_passes(tmp_path):
    report = calibrate(Net(), batches(), estimator="fisher", memory_budget=1200, progress=False)
    assert SensitivityReport.load(report.save(tmp_path / "report.json")).passes == report.passes == (1152, 864)


# ---------------------------------------------------------------------------------------------- what cannot be


def test_a_matrix_above_the_budget_is_named():
    with pytest.raises(
        CalibrationError, match=r"'blocks\.0\.up' needs 288 bytes .* memory_budget of 287 bytes; give at least that"
    ):
        calibrate(Net(), batches(), estimator="fisher", memory_budget=287, progress=False)


def test_double_precision_needs_twice_as_much():
    with pytest.raises(CalibrationError, match="needs 576 bytes"):
        calibrate(Net().double(), batches(), estimator="fisher", memory_budget=300, progress=False)


def test_data_that_can_be_read_once_takes_one_pass():
    with pytest.raises(CalibrationError, match=r"takes 2 passes over the data, .* only once; give a list"):
        calibrate(Net(), iter(batches()), estimator="fisher", memory_budget=1200, progress=False)
    report = calibrate(Net(), iter(batches()), estimator="fisher", memory_budget="1MB", progress=False)
    assert len(report.passes) == 1


class Changing:
    """Data that differs from pass to pass."""

    def __init__(self, *passes):
        self.passes = iter(passes)

    def __iter__(self):
        return iter(next(self.passes))


@pytest.mark.parametrize(
    ("second", "place"),
    [
        ([batch_of([0]), batch_of([2])], 2),
        ([batch_of([0])], 2),
        ([batch_of([0]), batch_of([1]), batch_of([2])], 3),
        ([batch_of([0]), {**batch_of([1]), "labels": torch.tensor([1])}], 2),
        ([batch_of([0]), {**batch_of([1]), "labels": torch.tensor([2], dtype=torch.int32)}], 2),
        ([], 1),
    ],
    ids=["another batch", "fewer", "more", "another label", "another dtype", "none"],
)
def test_data_that_changes_between_passes(second, place):
    first = [batch_of([0]), batch_of([1])]
    with pytest.raises(CalibrationError, match=rf"batch {place} .* not what it was in the first pass over the data"):
        calibrate(Net(), Changing(first, second), estimator="fisher", memory_budget=1200, progress=False)
    calibrate(Net(), Changing(first, first), estimator="fisher", memory_budget=1200, progress=False)


class Counted(list):
    """A list with a wrong length."""

    def __init__(self, batches, length):
        super().__init__(batches)
        self.length = length

    def __len__(self):
        return self.length


def test_data_with_a_wrong_length():
    model = Net()
    with pytest.raises(CalibrationError, match="says that it holds 2 batches and gives more"):
        calibrate(model, Counted(batches(), 2), estimator="fisher", progress=False)
    short = calibrate(model, Counted(batches(), 4), estimator="fisher", progress=False)
    assert short.matrices == calibrate(model, batches(), estimator="fisher", progress=False).matrices


# ---------------------------------------------------------------------------------------------- experts and devices


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
def test_transformers_models(name):
    """With dropout, norms, fused attention, tied embeddings, two stacks: the graph of every pass is that of one."""
    test_models = pytest.importorskip("tests.sensitivity.test_models", exc_type=ImportError)
    model, ids = getattr(test_models, name)().float(), sequences(4, 6, 2, 5)
    data = []
    for pair in (ids[:2], ids[2:]):
        padded, mask = pad(pair)
        labels = torch.tensor([1, 0]) if name == "bert" else padded
        data.append({"input_ids": padded, "attention_mask": mask, "labels": labels})
    for mode in ("per_sequence", "per_loss_term"):
        arguments = {"estimator": "fisher", "mode": mode, "progress": False}
        whole = calibrate(model, data, **arguments)
        budget = 2 * max(4 * whole.diagonal_size(matrix) for matrix in whole)
        swept = calibrate(model, data, **arguments, memory_budget=budget)
        assert len(swept.passes) > 2
        assert swept.matrices == whole.matrices


@pytest.mark.parametrize("matmul", [False, True])
@pytest.mark.parametrize("estimator", ["activation", "fisher"])
def test_stacked_experts_are_swept_and_resumed(tmp_path, estimator, matmul):
    from tests.sensitivity.test_experts import Mixture, token_batch

    def mixture():
        torch.manual_seed(0)
        return Mixture(depth=2, matmul=matmul)

    ids = sequences(9, 8, 7, 6)
    data = [token_batch(ids[start : start + 2], ids[start : start + 2]) for start in (0, 2)]
    arguments = {"estimator": estimator, "experts": True, "min_expert_tokens": 1, "progress": False}
    whole = calibrate(mixture(), data, **arguments)
    arguments |= {"memory_budget": 8 * 8 if estimator == "activation" else 4 * 80}
    swept = calibrate(mixture(), data, **arguments)
    assert len(swept.passes) > 2
    assert swept.matrices == whole.matrices
    broken = mixture()
    calls = []
    broken.embed.register_forward_hook(lambda *_: calls.append(len(calls)))
    broken.head.register_forward_hook(lambda *_: 1 / 0 if len(calls) == 4 else None)
    arguments |= {"checkpoint": tmp_path / "state", "checkpoint_every": 1}
    with pytest.raises(ZeroDivisionError):
        calibrate(broken, data, **arguments)
    assert calibrate(mixture(), data, **arguments) == swept


@every_estimator
def test_on_each_device(tmp_path, device, arguments):
    """In one pass, in several, and gone on from a failure."""

    def model(at=None):
        torch.manual_seed(0)
        net, calls = Net(), []
        net.embed.register_forward_hook(lambda *_: calls.append(at))
        net.classifier.register_forward_hook(lambda *_: 1 / 0 if len(calls) == at else None)
        return net.to(device)

    arguments = {**arguments, "seed": 4, "progress": False}
    whole = calibrate(model(), batches(), **arguments, keep_diagonals=tmp_path / "whole")
    arguments["memory_budget"] = budget_of(arguments)
    places = {"checkpoint": tmp_path / "state", "checkpoint_every": 1, "keep_diagonals": tmp_path / "kept"}
    with pytest.raises(ZeroDivisionError):
        calibrate(model(5), batches(), **arguments, **places)
    swept = calibrate(model(), batches(), **arguments, **places)
    assert swept.matrices == whole.matrices
    kept, expected = Diagonals(tmp_path / "kept"), Diagonals(tmp_path / "whole")
    assert all(torch.equal(kept[name], expected[name]) for name in whole)


@pytest.mark.gpu
def test_a_single_batch_needs_the_memory_of_one_sum():
    """On a chain of 8 matrices with 16 MiB of sums each, read in one batch and in two."""
    width, depth = 2048, 8
    model = nn.Sequential(nn.Embedding(32, width), *(nn.Linear(width, width) for _ in range(depth))).cuda().bfloat16()

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, input_ids):
            return self.layers(input_ids)

    def peak(data, **options):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calibrate(Chain(), data, estimator="fisher", progress=False, **options)
        assert torch.cuda.memory_allocated() == before
        return torch.cuda.max_memory_allocated() - before

    batch = {"input_ids": torch.arange(64).view(4, 16) % 32}
    batch["labels"] = batch["input_ids"]
    size = 4 * width * width
    calibrate(Chain(), [batch], estimator="fisher", progress=False)  # what the libraries keep
    gc.collect()  # or what earlier tests left may be freed in between
    one, two = peak([batch]), peak([batch, batch])
    assert two - one > 6 * size
    assert peak([batch, batch], memory_budget=2 * size) < one + 2 * size
