"""Every family of docs/models.md, from calibration to a merged model, on tiny models with random weights."""

import contextlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from sensilora import adapters, allocate, calibrate, inject, load_adapter, merge, save_adapter, unload
from sensilora.errors import CalibrationError
from sensilora.targets import find_targets, head_names, outermost_heads, stacked_experts
from tests.sensitivity.oracles import pad
from tests.tolerances import relative_error

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.tiny_models import FAMILIES, family_model  # noqa: E402 (imports transformers)

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
# Arguments of calibrate by name of the column; of Hutchinson's probes only what every batch takes alike is looked at.
ESTIMATORS = {
    "activation": {"estimator": "activation"},
    "inverse": {"estimator": "activation", "variant": "inverse", "block_size": 8},
    "fisher": {"estimator": "fisher"},
    "hutchinson": {"estimator": "hutchinson", "probes": 2, "min_probes": 2},
}
COLUMNS = [*(f"calibrate: {name}" for name in ESTIMATORS), "train", "save, load", "open with PEFT", "merge"]
# What the page says of a family whose experts get no adapter.
PARTLY = dict.fromkeys(COLUMNS, "attention") | {
    f"calibrate: {name}": "attention, experts" for name in ESTIMATORS if name != "hutchinson"
}

pytestmark = [
    # A tiny model's head is as transformers draws it, and calibrated so here.
    pytest.mark.filterwarnings("ignore:the head .* looks newly initialised"),
    pytest.mark.filterwarnings("ignore:.*stack the weights of experts"),
]


def build(family):
    # Weights as large as trained ones: at the usual 0.02, attention is all but uniform and query and key are idle.
    std = "init_std" if family.startswith(("Whisper", "Bart", "OPT")) else "initializer_range"
    return family_model(family, **({} if family.startswith("T5") else {std: 0.3})).eval()


def batch_of(model, samples):
    """The named samples as a tokenizer or feature extractor and a collator give them, padded to the longest."""
    family = type(model).__name__
    token = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 50, (1, length), generator=token) for length in (6, 3, 5)]
    targets = [torch.randint(4, 50, (1, length), generator=token) for length in (4, 6, 2)]
    images, sounds = torch.randn(3, 3, 8, 8, generator=token), torch.randn(3, 4, 12, generator=token)
    padded, mask = pad([ids[i] for i in samples], value=getattr(model.config, "pad_token_id", None) or 0)
    tokens = {"input_ids": padded, "attention_mask": mask}
    labels = pad([targets[i] for i in samples], value=-100)[0]
    if family.startswith("ViT"):
        return {"pixel_values": images[samples], "labels": torch.tensor([0, 1, 0])[samples]}
    if family.startswith("Whisper"):
        start = torch.full((len(samples), 1), model.config.decoder_start_token_id)
        decoder = torch.cat([start, labels[:, :-1].clamp(min=0)], 1)
        return {"input_features": sounds[samples], "decoder_input_ids": decoder, "labels": labels}
    if "Conditional" in family:
        return {**tokens, "labels": labels}
    if "Classification" in family:
        return {**tokens, "labels": torch.tensor([0, 1, 0])[samples]}
    return {**tokens, "labels": padded.masked_fill(mask == 0, -100)}


def heads_to_train(model):
    """A classifier's head. A language model's stays as it is."""
    return [] if model.get_output_embeddings() is not None else outermost_heads(model)


@torch.no_grad()
def logits_of(model, batch):
    return model(**batch).logits


def table():
    """Cells of the page's table by family and column."""
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|\n ").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    return {re.sub("`", "", row[1]): dict(zip(header[2:], row[2:], strict=True)) for row in rows}


def test_the_page_has_every_family_and_column():
    cells = table()
    assert list(cells) == list(FAMILIES)
    assert all(list(row) == COLUMNS for row in cells.values())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_from_calibration_to_a_merged_model(family, estimator, tmp_path):
    model = build(family)
    together = batch_of(model, [0, 1, 2])
    arguments = ESTIMATORS[estimator]
    # The page says that experts are measured, where there are any.
    experts = stacked_experts(model) if estimator != "hutchinson" else []
    if experts:
        arguments = {**arguments, "experts": True, "min_expert_tokens": 1}
    report = calibrate(model, [together], progress=False, **arguments)
    apart = [batch_of(model, [i]) for i in range(3)]
    # Hutchinson's passes are many.
    compared = list(find_targets(model))[::4] if estimator == "hutchinson" else "all-linear"
    expected = calibrate(model, apart, targets=compared, progress=False, **arguments)
    assert list(report) == [*find_targets(model), *(f"{stack}.{expert}" for stack in experts for expert in range(4))]
    assert all(report[name].trace > 0 for name in report)
    for name in expected:
        assert report[name].tokens == expected[name].tokens, name
        assert report[name].trace == pytest.approx(expected[name].trace, rel=1e-3), name
        assert report[name].topk_mean == pytest.approx(expected[name].topk_mean, rel=1e-3), name
    done = [f"calibrate: {estimator}"]

    with pytest.warns(UserWarning, match="get no rank") if experts else contextlib.nullcontext():
        # A budget that is no multiple of their number, since tiny models' scores may be all but equal.
        plan = allocate(report, average_rank=2.5)
    assert len(set(plan.ranks.values())) > 1
    plain = logits_of(model, together)
    names = list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(model, plan, modules_to_save=heads_to_train(model))
    assert bool(adapters.shared_inputs(model)) == (not family.startswith("GPT2"))
    assert relative_error(logits_of(model, together), plain) < 1e-5
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    loss = model(**together).loss
    loss.backward()
    for name, layer in adapters.adapter_layers(model).items():
        assert layer.lora_B.grad.isfinite().all(), name
        assert layer.lora_B.grad.any(), name
    optimizer.step()
    assert model(**together).loss < loss
    done.append("train")

    tuned = logits_of(model, together)
    assert relative_error(tuned, plain) > 1e-3
    folder = save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(build(family), folder)
    assert relative_error(logits_of(loaded, together), tuned) < 1e-6
    done.append("save, load")
    opened = peft.PeftModel.from_pretrained(build(family), folder).eval()
    assert relative_error(logits_of(opened, together), tuned) < 1e-5
    done.append("open with PEFT")

    unload(merge(model))
    assert list(model.state_dict()) == names
    assert relative_error(logits_of(model, together), tuned) < 1e-5
    done.append("merge")
    told = {column: cell for column, cell in table()[family].items() if column in done}
    assert done[1:] == COLUMNS[len(ESTIMATORS) :]
    assert told == {column: PARTLY[column] if family.startswith("Mixtral") else "✔" for column in done}


def test_sound_without_text_is_an_error():
    model = build("WhisperForConditionalGeneration")
    with pytest.raises(CalibrationError, match="nothing for the decoder, only input_features; add labels"):
        calibrate(model, [{"input_features": torch.randn(2, 4, 12)}], progress=False)


def test_a_mask_over_frames_does_not_reach_the_shortened_layers():
    """Nor does the decoder's mask reach an encoder's layer that is as long as the decoder's input."""
    model = build("WhisperForConditionalGeneration")
    batch = batch_of(model, [0, 1, 2])
    expected = calibrate(model, [batch], progress=False)
    frames = torch.tensor([[1] * 12, [1] * 8 + [0] * 4, [1] * 12])
    del batch["decoder_input_ids"]  # which the model makes from the labels
    report = calibrate(model, [{**batch, "attention_mask": frames}], progress=False)
    assert {name: report[name].tokens for name in report} == {name: expected[name].tokens for name in expected}
    assert report["model.encoder.layers.0.fc1"].tokens == 3 * 6
    assert report["model.decoder.layers.0.fc1"].tokens == 4 + 6 + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_a_target(family):
    """Everything with a matrix is served, but for embeddings, convolutions, heads and, in Mixtral, the experts."""
    model = build(family)
    served, heads = find_targets(model), head_names(model)
    left = {
        name
        for name, module in model.named_modules()
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        and not isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d))
        and name not in served.keys() | heads
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(model, [batch_of(model, [0])], progress=False)
    told = [str(warning.message) for warning in caught if "experts" in str(warning.message)]
    if family.startswith("Mixtral"):
        assert left == {f"model.layers.{i}.mlp.{part}" for i in (0, 1) for part in ("experts", "gate")}
        assert {name.rpartition(".")[2] for name in served} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert told == [
            "4 parameters stack the weights of experts (model.layers.0.mlp.experts.gate_up_proj, ...), which are no "
            "linear modules: they get no adapter, and are measured only with experts=True"
        ]
        calibrate(model, [batch_of(model, [0])], targets=["q_proj"], progress=False)
    else:
        # ViT's class token and position embeddings are parameters of their module.
        assert left == ({"vit.embeddings"} if family.startswith("ViT") else set())
        assert told == []
