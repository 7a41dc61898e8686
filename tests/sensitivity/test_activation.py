"""The activation estimator against sums of squares gathered by hooks, one sequence at a time."""

import pytest
import torch
from torch import nn

from sensilora import ops
from sensilora.errors import CalibrationError
from sensilora.sensitivity import calibrate
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
