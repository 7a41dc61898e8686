"""Which rows of a module's input belong to which sequence, and which of them count."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sensilora.errors import CalibrationError
from sensilora.sensitivity.batches import Batch


class Plain(nn.Linear):
    def forward(self, **inputs):
        return inputs


def plain(**config):
    model = Plain(2, 2)
    model.config = SimpleNamespace(**config)
    return model


@st.composite
def masks(draw):
    sequences, positions = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    values = draw(st.lists(st.booleans(), min_size=sequences * positions, max_size=sequences * positions))
    return torch.tensor(values).view(sequences, positions).long()


@given(masks(), st.sampled_from(["plain", "flat", "heads last", "heads first"]))
@settings(deadline=None, max_examples=60)
def test_packing_takes_each_sequences_counted_rows_in_order(mask, layout):
    sequences, positions = mask.shape
    batch = Batch({"input_ids": torch.zeros_like(mask), "attention_mask": mask}, plain())
    heads = 7  # no test has so many positions
    x = torch.arange(sequences * positions * heads, dtype=torch.float32).view(sequences, positions, heads, 1)
    x = {
        "plain": x[:, :, 0],
        "flat": x[:, :, 0].flatten(0, 1),
        "heads last": x,
        "heads first": x.transpose(1, 2),
    }[layout]
    rows = batch.rows("m", x.shape[:-1])
    counted = mask.bool().view(sequences, positions)
    if layout == "plain" or layout == "flat":
        expected = [x.reshape(sequences, positions, 1)[n][counted[n]] for n in range(sequences)]
    elif layout == "heads last":
        expected = [x[n][counted[n]].flatten(0, 1) for n in range(sequences)]
    else:
        expected = [x[n][:, counted[n]].flatten(0, 1) for n in range(sequences)]
    assert rows.lengths.tolist() == [len(part) for part in expected]
    assert torch.equal(rows.pack(x), torch.cat(expected))
    assert rows.count == sum(map(len, expected))
    assert batch.streams[0].tokens == int(mask.sum())


def test_rows_without_padding_are_not_copied():
    batch = Batch({"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)}, plain())
    x = torch.randn(2, 3, 4)
    rows = batch.rows("m", x.shape[:-1])
    assert rows.mask is None
    assert rows.pack(x).data_ptr() == x.data_ptr()
    assert not batch.padded


@pytest.mark.parametrize("lead", [(3,), (4, 3), (5, 2, 3)])
def test_rows_of_no_sequence(lead):
    batch = Batch({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, plain())
    assert batch.rows("m", torch.Size(lead)) is None


def test_one_sequence_owns_every_row():
    batch = Batch({"input_ids": torch.zeros(1, 3, dtype=torch.long)}, plain())
    assert batch.rows("m", torch.Size((17,))).lengths.tolist() == [17]


def test_rows_in_no_order_of_one_padded_sequence_belong_to_none():
    """As an expert's, of which nobody knows which are padding."""
    mask = torch.tensor([[1, 1, 0]])
    batch = Batch({"input_ids": mask, "attention_mask": mask}, plain())
    assert batch.rows("layers.0.experts.3.up", torch.Size((2,))) is None
    assert batch.rows("layer", torch.Size((3,))).count == 2
    assert batch.rows("pooled", torch.Size(())).count == 1
    assert batch.rows("pooled", torch.Size((1,))).count == 1
    assert batch.rows("patches of an image", torch.Size((12,))).count == 12


def test_one_row_a_sequence_is_never_padding():
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = Batch({"input_ids": ids, "attention_mask": mask}, plain())
    assert batch.rows("pooler", torch.Size((2,))).lengths.tolist() == [1, 1]
    assert batch.rows("pooler", torch.Size((2, 5))).lengths.tolist() == [5, 5]


def test_decoder_padding_is_the_ignored_labels_at_the_end_only():
    labels = torch.tensor([[-100, 4, 5, -100], [6, -100, 7, 8]])
    batch = Batch(
        {"input_ids": torch.zeros(2, 3, dtype=torch.long), "labels": labels}, plain(is_encoder_decoder=True)
    )
    assert batch.streams[1].mask.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.inputs["labels"] is batch.labels
    assert batch.rows("model.decoder.layers.0.fc1", torch.Size((2, 4))).lengths.tolist() == [3, 4]
    assert batch.rows("model.encoder.layers.0.fc1", torch.Size((2, 3))).lengths.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("encoder.block.0.layer.0.SelfAttention.k", 2),
        ("decoder.block.0.layer.0.SelfAttention.k", 1),
        ("decoder.block.0.layer.1.EncDecAttention.k", 2),
        ("decoder.block.0.layer.1.EncDecAttention.q", 1),
        ("model.decoder.layers.0.encoder_attn.v_proj", 2),
        ("model.decoder.layers.0.encoder_attn.q_proj", 1),
        ("decoder.layer.0.crossattention.self.key", 2),
        ("decoder.layer.0.crossattention.self.query", 1),
        ("decoder.layer.0.crossattention.output.dense", 1),
    ],
)
def test_names_decide_between_encoder_and_decoder_of_one_length(name, counted):
    ids = torch.zeros(2, 3, dtype=torch.long)
    entries = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 0]]),
        "decoder_input_ids": ids,
        "decoder_attention_mask": torch.tensor([[1, 0, 0], [1, 0, 0]]),
    }
    batch = Batch(entries, plain(is_encoder_decoder=True))
    assert batch.rows(name, torch.Size((2, 3))).lengths.tolist() == [counted, counted]
    assert "labels" not in batch.inputs


def test_labels_are_kept_from_the_model_and_the_callers_tensors_from_the_graph():
    embeds = torch.randn(2, 3, 4, requires_grad=True)
    batch = Batch({"inputs_embeds": embeds, "label": torch.tensor([0, 1]), "note": "text"}, plain())
    assert set(batch.inputs) == {"inputs_embeds", "note"}
    assert set(batch.entries) == {"inputs_embeds", "label", "note"}
    assert not batch.inputs["inputs_embeds"].requires_grad
    assert embeds.requires_grad
    assert (batch.size, batch.streams[0].tokens) == (2, 6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"input_ids": [[1, 2]]}, "no tensor, only input_ids"),
        ({}, "no tensor"),
        ({"input_ids": torch.zeros(2, 3), "labels": [0, 1]}, "labels .* a list"),
        ({"input_ids": torch.zeros(2, 3), "attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\)"),
        ({"input_ids": torch.zeros(2, 3), "attention_mask": [[1, 1, 1]]}, "attention_mask .* list"),
        (torch.zeros(2, 3), "is a Tensor; each must be a dict"),
        ("input_ids", "is a str"),
    ],
)
def test_what_is_not_a_batch(entries, message):
    with pytest.raises(CalibrationError, match=message):
        Batch(entries, plain())
