"""The activation estimator against sums of squares gathered by hooks, one sequence at a time."""

import collections
import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from sensilora import ops
from sensilora.errors import CalibrationError, NonFiniteError
from sensilora.sensitivity import SensitivityReport, calibrate
from sensilora.sensitivity.activation import ActivationEstimator, inverse_diagonal
from sensilora.sensitivity.batches import Batch
from sensilora.sensitivity.capture import frozen, group_tied, wrapped_forwards
from sensilora.targets import find_targets
from tests.sensitivity.oracles import Net, assert_close, classification_batch, diagonals, pad, sequences

LENGTHS = (5, 3, 7, 1)


def activation_oracle(model, samples, *, tokens):
    """Σ x² of every target over unpadded samples (dicts), divided by `tokens`."""
    model.eval()
    total, hooks = {}, []

    def record(name):
        def hook(module, args):
            squares = args[0].detach().double().flatten(0, -2).square().sum(0)
            total[name] = total.get(name, 0) + squares

        return hook

    for name, module in find_targets(model).items():
        hooks.append(module.register_forward_pre_hook(record(name)))
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    for hook in hooks:
        hook.remove()
    return {name: total[name] / tokens for name in find_targets(model)}


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padding_does_not_count(repeat, dtype):
    model, ids = Net(repeat=repeat).to(dtype), sequences(*LENGTHS)
    expected = activation_oracle(model, [{"input_ids": x} for x in ids], tokens=sum(LENGTHS))
    batches = [classification_batch(ids[:2], [0, 0]), classification_batch(ids[2:], [0, 0], to=11)]
    report, found = diagonals(model, batches)
    assert_close(found, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5)
    for name, diagonal in expected.items():
        values = diagonal.sort(descending=True).values
        assert report[name].trace == pytest.approx(float(values.sum()), rel=1e-5)
        assert report[name].topk_mean == pytest.approx(float(values[: len(values) // 2].mean()), rel=1e-5)
        assert (report[name].tokens, report[name].calls) == (repeat * sum(LENGTHS), repeat * 2)
    assert (report.estimator, report.mode, report.labels) == ("activation", None, None)
    assert (report.tokens, report.sequences) == (sum(LENGTHS), 4)


def test_nan_in_padding_does_not_leak():
    class Poisoned(Net):
        def forward(self, input_ids, attention_mask=None):
            hidden = self.embed(input_ids).masked_fill(attention_mask.unsqueeze(-1) == 0, float("nan"))
            return self.blocks[0].up(hidden)

    report = calibrate(
        Poisoned(depth=1), [classification_batch(sequences(4, 2), [0, 0])], targets=r".*\.up", progress=False
    )
    assert report["blocks.0.up"].trace > 0


def test_tied_weights_are_one_matrix():
    model, ids = Net().double(), sequences(*LENGTHS)
    model.blocks[1].down.weight = model.blocks[0].down.weight
    expected = activation_oracle(model, [{"input_ids": x} for x in ids], tokens=sum(LENGTHS))
    expected["blocks.0.down"] += expected.pop("blocks.1.down")
    report, found = diagonals(model, [classification_batch(ids, [0] * 4)])
    assert_close(found, expected)
    assert report["blocks.0.down"].aliases == ("blocks.1.down",)


def test_matrices_that_read_the_same_tensor_share_one_pass_over_it(monkeypatch):
    calls = []
    original = ops.autocorrelation_diag
    monkeypatch.setattr(ops, "autocorrelation_diag", lambda x, **rest: calls.append(x) or original(x, **rest))
    model = Net(depth=2)
    report = calibrate(model, [{"input_ids": torch.randint(0, 20, (2, 5))}], progress=False)
    assert len(calls) == 2 * 3  # (query, key, value), up, down in each block
    for part in ("key", "value"):
        assert report[f"blocks.0.{part}"] == report["blocks.0.query"]


def test_a_tensor_changed_in_place_is_read_again():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = x.clone()
            y = self.first(x)
            x.mul_(2)
            return y + self.second(x)

    report = calibrate(InPlace(), [{"x": torch.randn(2, 4, 3)}], progress=False)
    assert report["second"].trace == pytest.approx(4 * report["first"].trace, rel=1e-6)


def test_tokens_without_a_mask_are_all_positions():
    ids = torch.randint(0, 20, (3, 5))
    report = calibrate(Net(), [{"input_ids": ids}], progress=False)
    assert (report.tokens, report.sequences, report["blocks.0.up"].tokens) == (15, 3, 15)


def test_rows_that_cannot_be_attributed_are_an_error_only_under_padding():
    class Routed(Net):
        def forward(self, input_ids, attention_mask=None):
            return self.blocks[0].up(self.embed(input_ids).flatten(0, 1)[::2])

    model, targets = Routed(depth=1), r".*\.up"
    ids, mask = pad(sequences(4, 2))
    assert calibrate(model, [{"input_ids": ids}], targets=targets, progress=False)["blocks.0.up"].tokens == 4
    with pytest.raises(CalibrationError, match=r"'blocks\.0\.up'"):
        calibrate(model, [{"input_ids": ids, "attention_mask": mask}], targets=targets, progress=False)


def test_the_fused_encoder_layer_of_torch_is_seen():
    """In eval mode nn.TransformerEncoderLayer would read its weights past the modules."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = calibrate(layer, [{"src": torch.randn(2, 5, 8)}], targets=r"linear\d", progress=False)
    assert list(report) == ["linear1", "linear2"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_on_device(device):
    model, ids = Net().double(), sequences(*LENGTHS)
    expected = activation_oracle(model, [{"input_ids": x} for x in ids], tokens=sum(LENGTHS))
    _, found = diagonals(model.to(device), [classification_batch(ids, [0] * 4)])
    assert_close({name: value.cpu() for name, value in found.items()}, expected)


# ------------------------------------------------------------------------------------------------ the inverse


def inverse_oracle(model, samples, *, tokens, block_size, damping):
    """1 / diag((H + δI)⁻¹) block by block, by a general inverse over the live features, from unpadded samples."""
    model.eval()
    rows, hooks = {}, []

    def record(name):
        return lambda module, args: rows.setdefault(name, []).append(args[0].detach().double().flatten(0, -2))

    for name, module in find_targets(model).items():
        hooks.append(module.register_forward_pre_hook(record(name)))
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    for hook in hooks:
        hook.remove()
    found = {}
    for name in find_targets(model):
        x = torch.cat(rows[name])
        found[name] = torch.zeros(x.shape[1], dtype=torch.float64)
        for start in range(0, x.shape[1], block_size):
            part = x[:, start : start + block_size]
            live = part.abs().sum(0) > 0
            if not live.any():
                continue
            h = part[:, live].T @ part[:, live] / tokens
            h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
            found[name][start : start + block_size][live] = 1 / h.inverse().diagonal()
    return found


def alone(layer):
    """A model of one layer, whose module is called "0" and whose input is called x."""
    model = nn.Sequential(layer)
    model.forward = lambda x: layer(x)
    return model


class GPT2Like(nn.Module):
    """transformers' Conv1D holds its weight transposed: (in, out)."""

    def __init__(self):
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.embed = nn.Embedding(20, 6)
        self.c_fc, self.c_proj = conv1d(10, 6), conv1d(6, 10)

    def forward(self, input_ids, attention_mask=None):
        return self.c_proj(torch.relu(self.c_fc(self.embed(input_ids))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block_size", [1, 4, 6, 100])
@pytest.mark.parametrize("make", [Net, lambda: Net(repeat=2), GPT2Like], ids=["net", "repeated", "conv1d"])
def test_inverse_matches_a_general_inverse(make, block_size, dtype):
    model, ids = make().to(dtype), sequences(*LENGTHS)
    options = {"block_size": block_size, "damping": 0.05}
    expected = inverse_oracle(model, [{"input_ids": x} for x in ids], tokens=sum(LENGTHS), **options)
    batches = [classification_batch(ids[:2], [0, 0]), classification_batch(ids[2:], [0, 0], to=11)]
    report, found = diagonals(model, batches, variant="inverse", **options)
    assert_close(found, expected, rtol=1e-10 if dtype == torch.float64 else 1e-4)
    assert (report.estimator, report.variant) == ("activation", "inverse")
    assert (report.block_size, report.damping) == (block_size, 0.05)
    assert all((matrix.damping, matrix.attempts) == (0.05, 1) for matrix in report.matrices.values())
    for name, values in expected.items():
        assert report[name].trace == pytest.approx(float(values.sum()), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inverse_of_16_bit_inputs_is_that_of_the_same_inputs_in_fp64(dtype):
    model, x = alone(nn.Linear(10, 3, dtype=dtype)), torch.randn(36, 10).to(dtype)
    _, found = diagonals(model, [{"x": part} for part in x.split(12)], targets="0", variant="inverse", block_size=4)
    for start in range(0, 10, 4):
        part = x[:, start : start + 4].double()
        h = part.T @ part / len(part)
        h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
        got = found["0"][start : start + 4].double()
        torch.testing.assert_close(got, 1 / h.inverse().diagonal(), rtol=1e-5, atol=0)


def test_inverse_of_single_features_is_the_diagonal_and_its_damping():
    model, batch = Net().double(), classification_batch(sequences(*LENGTHS), [0] * 4)
    _, plain = diagonals(model, [batch])
    _, found = diagonals(model, [batch], variant="inverse", block_size=1, damping=0.25)
    assert_close(found, {name: 1.25 * value for name, value in plain.items()}, rtol=1e-12)


def test_nan_in_padding_does_not_reach_the_blocks():
    class Poisoned(Net):
        def forward(self, input_ids, attention_mask=None):
            hidden = self.embed(input_ids).masked_fill(attention_mask.unsqueeze(-1) == 0, float("nan"))
            return self.blocks[0].up(hidden)

    batches = [classification_batch(sequences(4, 2), [0, 0])]
    report = calibrate(Poisoned(depth=1), batches, targets=r".*\.up", variant="inverse", progress=False)
    assert report["blocks.0.up"].trace > 0


def test_blocks_are_summed_once_for_matrices_that_read_the_same_tensor(monkeypatch):
    calls = []
    original = ops.autocorrelation_blocks
    monkeypatch.setattr(
        ops, "autocorrelation_blocks", lambda x, *rest, **kw: calls.append(x) or original(x, *rest, **kw)
    )
    report = calibrate(Net(depth=2), [{"input_ids": torch.randint(0, 20, (2, 5))}], variant="inverse", progress=False)
    assert len(calls) == 2 * 3
    assert report["blocks.0.key"] == report["blocks.0.query"]


def test_an_overflow_of_the_blocks_names_the_module():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x) * float("inf"))

    with pytest.raises(NonFiniteError, match="the input of module 'second'"):
        calibrate(Large(), [{"x": torch.randn(2, 3, 4)}], variant="inverse", progress=False)


def spd(generator, blocks, size, rows):
    x = torch.randn(blocks, rows, size, dtype=torch.float64, generator=generator)
    return x.mT @ x


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(1, 3),
    size=st.integers(1, 8),
    rows=st.integers(1, 12),
    damping=st.floats(1e-6, 1),
    seed=st.integers(0, 10**6),
)
def test_the_inverse_lies_between_the_damping_and_the_damped_diagonal(blocks, size, rows, damping, seed):
    """δ ≤ 1 / diag((H + δI)⁻¹) ≤ diag(H) + δ: the least eigenvalue, and what a Schur complement cannot exceed."""
    h = spd(torch.Generator().manual_seed(seed), blocks, size, rows)
    found = inverse_diagonal(h, damping)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    delta = damping * diagonal.mean(-1, keepdim=True)
    assert bool((found.values >= delta * (1 - 1e-6)).all())
    assert bool((found.values <= (diagonal + delta) * (1 + 1e-6)).all())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_inverse_scales_with_its_block(scale):
    h = spd(torch.Generator().manual_seed(0), 2, 5, 3)
    torch.testing.assert_close(
        inverse_diagonal(scale * h, 0.01).values, scale * inverse_diagonal(h, 0.01).values, rtol=1e-9, atol=0
    )


def test_dead_features_are_worth_nothing_and_change_nothing():
    h = spd(torch.Generator().manual_seed(0), 1, 4, 9)
    wider = torch.zeros(2, 6, 6, dtype=torch.float64)
    live = torch.tensor([0, 2, 3, 5])
    wider[0, live.unsqueeze(1), live] = h[0]
    found = inverse_diagonal(wider, 0.01)
    assert torch.equal(found.values[0, [1, 4]], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found.values[0, live], inverse_diagonal(h, 0.01).values[0], rtol=1e-12, atol=0)
    assert not found.values[1].any()  # a block of dead features alone
    assert found.attempts == 1


def test_damping_is_raised_where_the_factorisation_fails_and_told():
    """The first block has an eigenvalue of -2e-4 times its mean diagonal, as rounding errors make them."""
    h = torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    h[0, 0, 1] = h[0, 1, 0] = 1 + 2e-4
    found = inverse_diagonal(h, 1e-6)
    assert found.attempts == 4
    assert found.damping == pytest.approx(1e-3)
    expected = 1 / (h[0] + 1e-3 * torch.eye(2, dtype=torch.float64)).inverse().diagonal()
    torch.testing.assert_close(found.values[0], expected)
    torch.testing.assert_close(found.values[1], torch.full((2,), 1 + 1e-6, dtype=torch.float64))
    assert inverse_diagonal(torch.tensor([[[1.0, 3.0], [3.0, 1.0]]], dtype=torch.float64), 0.3) is None


def test_fewer_tokens_than_features_take_more_damping_and_the_report_says_so(tmp_path):
    """Sums in fp32 of few, almost equal rows are no longer positive definite at a damping of 1e-12."""
    x = 1 + 1e-4 * torch.randn(1, 3, 40)
    report = calibrate(
        alone(nn.Linear(40, 2)), [{"x": x}], targets="0", variant="inverse", damping=1e-12, progress=False
    )
    assert report["0"].attempts > 1
    assert report["0"].damping == pytest.approx(1e-12 * 10 ** (report["0"].attempts - 1))
    assert 0 < report["0"].trace <= float(x.square().sum(-1).mean()) * (1 + report["0"].damping)
    assert SensitivityReport.load(report.save(tmp_path / "report.json")) == report
    assert "inverse, block_size=128, damping=1e-12" in report.summary()


def test_an_indefinite_block_names_its_module(monkeypatch):
    def indefinite(x, block_size, mask=None):
        return torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])

    monkeypatch.setattr(ops, "autocorrelation_blocks", indefinite)
    model = alone(nn.Linear(2, 2))
    with pytest.raises(CalibrationError, match="module '0' has a block without a Cholesky factor at damping 1;"):
        calibrate(model, [{"x": torch.randn(3, 2)}], targets="0", variant="inverse", progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "full"}, "variant 'full' is unknown; choose one of diagonal, inverse"),
        ({"variant": "inverse", "estimator": "fisher"}, "variant='inverse' is for 'activation' only"),
        ({"variant": "inverse", "block_size": 0}, "block_size must be at least 1, not 0"),
        ({"variant": "inverse", "damping": 0.0}, r"damping must be in \(0, 1\], not 0.0"),
        ({"variant": "inverse", "damping": 1.5}, r"damping must be in \(0, 1\], not 1.5"),
        ({"variant": "inverse", "damping": float("nan")}, r"damping must be in \(0, 1\], not nan"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(Net(), [{"input_ids": torch.ones(1, 3, dtype=torch.int64)}], progress=False, **arguments)


def test_reports_without_a_variant_are_of_the_diagonal(tmp_path):
    report = calibrate(Net(), [{"input_ids": torch.ones(1, 3, dtype=torch.int64)}], progress=False)
    path = report.save(tmp_path / "report.json")
    content = json.loads(path.read_text())
    for key in ("variant", "block_size", "damping"):
        del content[key]
    for matrix in content["matrices"].values():
        del matrix["damping"], matrix["attempts"]
    path.write_text(json.dumps(content))
    assert SensitivityReport.load(path) == report


def test_a_report_says_all_of_the_inverse_or_nothing():
    report = calibrate(Net(), [{"input_ids": torch.ones(1, 3, dtype=torch.int64)}], variant="inverse", progress=False)
    fisher = {"estimator": "fisher", "mode": "per_sequence", "labels": "data"}
    for change in ({"damping": None}, {"block_size": None}, {"variant": "diagonal"}, fisher):
        with pytest.raises(ValidationError, match="inverse"):
            dataclasses.replace(report, **change)


def test_inverse_in_several_passes_and_by_way_of_checkpoints_is_the_same(tmp_path):
    model, batches = Net(), [classification_batch(sequences(*LENGTHS), [0] * 4)] * 3
    options = {"variant": "inverse", "block_size": 4, "progress": False}
    expected = calibrate(model, batches, **options)
    swept = calibrate(model, batches, memory_budget=1000, **options)
    assert len(swept.passes) > 1
    assert sum(swept.passes) == sum(expected.passes) == 8 * 16 * (2 * (4 * 2 + 3))  # of 6 or 12 features
    checkpointed = calibrate(model, batches, checkpoint=tmp_path / "state", checkpoint_every=1, **options)
    assert swept.matrices == checkpointed.matrices == expected.matrices


def test_inverse_on_device(device):
    model, ids = Net().double(), sequences(*LENGTHS)
    options = {"block_size": 4, "damping": 0.01}
    expected = inverse_oracle(model, [{"input_ids": x} for x in ids], tokens=sum(LENGTHS), **options)
    _, found = diagonals(model.to(device), [classification_batch(ids, [0] * 4)], variant="inverse", **options)
    assert_close({name: value.cpu() for name, value in found.items()}, expected)


# ------------------------------------------------------------------------------------------------ its cost


@pytest.mark.parametrize(("targets", "positions"), [("all-linear", 1), (".*", 7)])
def test_logits_that_nothing_reads_are_not_computed(targets, positions):
    """They are where the head itself is a target; and the other matrices' numbers are the same either way."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 20}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    )
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    batch = classification_batch(sequences(7, 4), [0, 0])
    report = calibrate(model, [batch], targets=targets, progress=False)
    assert shapes == [(2, positions, 8)]
    assert ("lm_head" in report) == (positions == 7)
    own_choice = calibrate(model, [batch | {"logits_to_keep": 0}], progress=False)
    assert shapes[1:] == [(2, 7, 8)]
    assert {name: report[name] for name in own_choice} == own_choice.matrices


def test_a_matrix_costs_one_sum_and_one_addition_and_a_batch_one_transfer():
    """Nothing waits for the device in between: a value that the host reads is an aten::_local_scalar_dense."""
    model = Net(depth=4)
    modules = find_targets(model)
    matrices = group_tied(modules)
    observer = ActivationEstimator(model, modules, matrices)
    inputs = {"input_ids": torch.randint(0, 20, (2, 5))}

    def launched(run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        return collections.Counter(event.name for event in profile.events())

    with torch.no_grad(), frozen(model):
        model(**inputs)
        plain = launched(lambda: model(**inputs))
        with wrapped_forwards(modules, observer.wrap):
            observer.observe(Batch(inputs, model))
            watched = launched(lambda: observer.observe(Batch(inputs, model)))
    added = watched - plain
    assert added["sensilora::_autocorrelation_diag"] + added["sensilora::autocorrelation_diag"] == 4 * 3
    assert added["aten::add_"] == len(modules) == 4 * 5
    assert added["aten::_local_scalar_dense"] == 1
    assert added["aten::cat"] == 1
    assert added["aten::isfinite"] == 1
    assert added["aten::sum"] == 0
