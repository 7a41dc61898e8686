"""The driver: invariances, what it leaves behind, and an error for every bad input."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import sensilora
from sensilora.errors import CalibrationError, NonFiniteError, SensiloraError, TargetError
from sensilora.sensitivity import SensitivityReport, calibrate
from tests.sensitivity.oracles import Net, assert_close, classification_batch, diagonals, sequences

LENGTHS = (5, 3, 7, 1, 6, 2)
LABELS = [0, 2, 1, 2, 0, 1]
ESTIMATORS = (
    {"estimator": "activation"},
    {"estimator": "fisher"},
    {"estimator": "fisher", "mode": "per_position"},
    {"estimator": "fisher", "labels": "model", "draws": 2},
    {"estimator": "hutchinson", "probes": 2, "min_probes": 2},
)
every_estimator = pytest.mark.parametrize(
    "arguments", ESTIMATORS, ids=lambda options: "-".join(map(str, options.values()))
)


def batch_of(indices=range(6), **options):
    ids = sequences(*LENGTHS)
    return classification_batch([ids[n] for n in indices], [LABELS[n] for n in indices], **options)


# ---------------------------------------------------------------------------------------------- invariances


@given(st.permutations(range(6)), st.integers(1, 6), st.integers(7, 12), st.booleans())
@settings(deadline=None, max_examples=5)
def test_order_batch_size_and_padding_do_not_matter(order, size, width, left):
    """Token positions are not encoded in this net, so left padding must not matter either."""
    torch.manual_seed(0)
    model = Net().double()
    parts = [order[start : start + size] for start in range(0, 6, size)]
    for arguments in ESTIMATORS[:3]:
        _, expected = diagonals(model, [batch_of()], **arguments)
        report, found = diagonals(model, [batch_of(part, to=width, left=left) for part in parts], **arguments)
        assert_close(found, expected, rtol=1e-10)
        assert (report.tokens, report.sequences) == (sum(LENGTHS), 6)


@every_estimator
def test_fp32_agrees_with_fp64(arguments):
    model = Net()
    low = calibrate(model, [batch_of()], **{**arguments, "labels": "data", "draws": 1}, progress=False)
    high = calibrate(model.double(), [batch_of()], **{**arguments, "labels": "data", "draws": 1}, progress=False)
    for name in high:
        assert low[name].trace == pytest.approx(high[name].trace, rel=1e-4)
        assert low[name].topk_mean == pytest.approx(high[name].topk_mean, rel=1e-4)
        assert abs(low[name].effective_rank - high[name].effective_rank) <= 1


def test_the_report_says_what_was_done(tmp_path):
    model = Net()
    report = calibrate(
        model, [batch_of()], estimator="fisher", labels="model", draws=2, seed=9, k=0.25, alpha=0.5, progress=False
    )
    assert (report.estimator, report.mode, report.labels) == ("fisher", "per_sequence", "model")
    assert (report.draws, report.seed, report.k, report.alpha) == (2, 9, 0.25, 0.5)
    assert report.model_id == "Net"
    assert len(report.fingerprint) == 64
    assert report.versions["torch"] == torch.__version__
    assert report.versions["sensilora"] == sensilora.__version__
    order = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "classifier"]
    assert list(report) == order
    assert SensitivityReport.load(report.save(tmp_path / "report.json")) == report


def test_targets_select_the_matrices():
    report = calibrate(Net(), [batch_of()], targets=["up", "blocks.1.down"], progress=False)
    assert list(report) == ["blocks.0.up", "blocks.1.up", "blocks.1.down"]


# ---------------------------------------------------------------------------------------------- data


@every_estimator
def test_any_iterable_of_dicts_serves(arguments):
    model, rows = Net(), [batch_of([n]) for n in range(6)]

    def collate(items):
        return classification_batch([item["input_ids"] for item in items], [int(item["labels"]) for item in items])

    loader = DataLoader(rows, batch_size=3, collate_fn=collate)
    of_loader = calibrate(model, loader, **arguments, progress=False)
    of_list = calibrate(model, [batch_of([0, 1, 2]), batch_of([3, 4, 5])], **arguments, progress=False)
    of_generator = calibrate(model, (batch for batch in list(loader)), **arguments, progress=False)
    assert of_loader.matrices == of_list.matrices == of_generator.matrices


@pytest.mark.parametrize(("rank", "shown"), [(None, True), ("0", True), ("1", False)])
def test_the_bar_is_on_the_main_process_only(monkeypatch, capsys, rank, shown):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    calibrate(Net(), [batch_of()] * 3)
    assert ("3/3" in capsys.readouterr().err) == shown
    calibrate(Net(), (batch for batch in [batch_of()] * 3))  # no len: no total, no error
    assert ("3batch" in capsys.readouterr().err.replace(" ", "")) == shown
    calibrate(Net(), [batch_of()], progress=False)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------- what is left behind


class Recorder:
    """A `forward` that its owner has already replaced on the instance."""

    def __init__(self, module):
        self.original = module.forward
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.original(*args, **kwargs)


def model_with_a_past():
    """A model in mixed modes, with hooks, gradients, a patched forward and some frozen weights."""
    model = Net(repeat=2, use_reentrant=False)
    model.train()
    model.blocks[0].eval()
    model.blocks[1].up.weight.requires_grad_(False)
    for parameter in model.classifier.parameters():
        parameter.grad = torch.randn_like(parameter)
    model.blocks[0].query.register_forward_hook(lambda module, args, output: None)
    model.blocks[0].query.register_full_backward_hook(lambda module, before, after: None)
    model.embed.register_forward_pre_hook(lambda module, args: None)
    model.blocks[1].down.forward = Recorder(model.blocks[1].down)
    return model


def state(model):
    modules = {
        name: (
            module.training,
            {key: id(value) for key, value in module.__dict__.items()},
            {key: list(value.items()) for key, value in module.__dict__.items() if key.endswith("hooks")},
        )
        for name, module in model.named_modules()
    }
    parameters = {
        name: (id(p), p.requires_grad, id(p.grad), p.detach().clone(), None if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    }
    # `training` is a plain value; its identity says nothing, and True is a singleton.
    generators = (torch.get_rng_state(), random.getstate())
    return modules, parameters, generators, torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()


def assert_unchanged(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, (*flags, value, grad) in before[1].items():
        *flags_after, value_after, grad_after = after[1][name]
        assert flags == flags_after, name
        assert torch.equal(value, value_after), name
        assert (grad is None and grad_after is None) or torch.equal(grad, grad_after), name
    assert torch.equal(before[2][0], after[2][0])
    assert before[2][1:] == after[2][1:]
    assert before[3:] == after[3:]


@every_estimator
def test_the_model_is_as_it_was(arguments):
    model = model_with_a_past()
    recorder = model.blocks[1].down.forward
    seen = {}
    model.dropout.register_forward_hook(lambda module, args, output: seen.update(training=module.training))
    before = state(model)
    shuffled = DataLoader([batch_of([n]) for n in range(6)], shuffle=True, collate_fn=lambda items: items[0])
    calibrate(model, shuffled, **arguments, progress=False)
    assert_unchanged(before, state(model))
    assert seen == {"training": False}
    assert recorder.calls > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("place", "arguments"),
    [(place, arguments) for place in ("data", "forward") for arguments in ESTIMATORS]
    + [("backward", arguments) for arguments in ESTIMATORS if arguments["estimator"] != "activation"],
)
def test_the_model_is_as_it_was_after_an_exception(arguments, error, place):
    model = model_with_a_past()

    class Bomb(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise error("stop")

    def break_forward(module, args, output):
        if place == "forward":
            raise error("stop")
        return Bomb.apply(output)

    def batches():
        yield batch_of()
        if place == "data":
            raise error("stop")
        model.blocks[1].up.register_forward_hook(break_forward)
        yield batch_of()

    untouched = state(model)
    with pytest.raises(error, match="stop"):
        calibrate(model, batches(), **arguments, progress=False)
    hooks = model.blocks[1].up._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is break_forward]:
        del hooks[key]
    assert_unchanged(untouched, state(model))


def test_it_runs_under_no_grad_and_inference_mode():
    model = Net()
    expected = calibrate(model, [batch_of()], estimator="fisher", progress=False)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            report = calibrate(model, [batch_of()], estimator="fisher", progress=False)
        assert report.matrices == expected.matrices


# ---------------------------------------------------------------------------------------------- bad input


@every_estimator
def test_empty_data(arguments):
    for empty in ([], iter(()), DataLoader([])):
        with pytest.raises(CalibrationError, match="calibration data is empty"):
            calibrate(Net(), empty, **arguments, progress=False)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (batch_of(), "batches is a dict; give an iterable of batches"),
        (3, "batches is a int"),
        ([torch.zeros(2, 3)], "is a Tensor; each must be a dict"),
        ([{"input_ids": [[1, 2, 3]]}], "no tensor"),
    ],
)
def test_data_of_the_wrong_kind(batches, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(Net(), batches, progress=False)


@every_estimator
@pytest.mark.parametrize(("shape", "what"), [((0, 5), "sequence"), ((3, 0), "token")])
def test_an_empty_batch(arguments, shape, what):
    empty = {"input_ids": torch.zeros(shape, dtype=torch.int64), "labels": torch.zeros(shape[0], dtype=torch.int64)}
    with pytest.raises(CalibrationError, match=rf"holds no {what}: its shape is \({shape[0]}, {shape[1]}\); leave"):
        calibrate(Net(), [batch_of(), empty], **arguments, progress=False)


def test_fisher_without_labels_says_how_to_make_them():
    batch = {key: value for key, value in batch_of().items() if key != "labels"}
    with pytest.raises(CalibrationError, match=r"no labels, only input_ids, attention_mask.*batch\['input_ids'\]"):
        calibrate(Net(), [batch], estimator="fisher", progress=False)


@pytest.mark.parametrize("token_logits", [False, True])
@pytest.mark.parametrize("labels", ["data", "model"])
def test_all_labels_ignored(token_logits, labels):
    batch = batch_of()
    batch["labels"] = torch.full_like(batch["input_ids"] if token_logits else batch["labels"], -100)
    with pytest.raises(CalibrationError, match=r"every label of the calibration data is ignored"):
        calibrate(Net(token_logits=token_logits), [batch], estimator="fisher", labels=labels, progress=False)


def test_everything_masked():
    batch = batch_of()
    batch["attention_mask"].zero_()
    with pytest.raises(CalibrationError, match=r"attention_mask .* 0 everywhere"):
        calibrate(Net(), [batch], targets=["up"], progress=False)


@pytest.mark.parametrize(("label", "message"), [(3, "label 3 is outside the model's 3 classes"), (-1, "label -1 is")])
def test_labels_out_of_range(label, message):
    batch = batch_of()
    batch["labels"][2] = label
    with pytest.raises(CalibrationError, match=message):
        calibrate(Net(), [batch], estimator="fisher", progress=False)


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, torch.zeros(6, 4, dtype=torch.long)),
        ({}, torch.zeros(5, dtype=torch.long)),
        ({}, torch.zeros(6)),
        ({"classes": 1}, torch.zeros(6, dtype=torch.long)),
        ({"token_logits": True}, torch.zeros(6, dtype=torch.long)),
        ({"token_logits": True}, torch.zeros(6, 7)),
    ],
)
def test_labels_that_do_not_fit_the_logits(options, labels):
    with pytest.raises(CalibrationError, match=r"labels \(.*do not fit logits"):
        calibrate(Net(**options), [{**batch_of(), "labels": labels}], estimator="fisher", progress=False)


@pytest.mark.parametrize("estimator", ["activation", "fisher", "hutchinson"])
def test_numpys_numbers_are_numbers(estimator):
    numbers = {"probes": 2, "min_probes": 2, "seed": 3, "block_size": 4}
    fractions = {"k": 0.5, "alpha": 0.75, "tolerance": 0.5, "damping": 0.25}
    arguments = {"estimator": estimator, "progress": False}
    model = Net()
    expected = calibrate(model, [batch_of()], **numbers, **fractions, **arguments)
    given = {name: np.int64(value) for name, value in numbers.items()}
    given |= {name: np.float32(value) for name, value in fractions.items()}
    assert calibrate(model, [batch_of()], **given, **arguments) == expected


@pytest.mark.parametrize("value", [-100.0, 1.5, float("nan")])
def test_labels_of_several_kinds_at_once_are_probabilities(value):
    labels = torch.ones(6, 3)
    labels[2, 1] = value
    with pytest.raises(CalibrationError, match="are probabilities, from 0 to 1"):
        calibrate(Net(), [{**batch_of(), "labels": labels}], estimator="fisher", progress=False)


@pytest.mark.parametrize("estimator", ["activation", "fisher", "hutchinson"])
def test_tensors_made_under_inference_mode(estimator):
    class Direct(nn.Module):
        """A linear layer reads the batch itself."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x)

    arguments = {"estimator": estimator, "targets": ["layer"], "probes": 2, "min_probes": 2, "progress": False}
    model, batch = Direct(), {"x": torch.randn(5, 4), "labels": torch.tensor([0, 1, 2, 0, 1])}
    expected = calibrate(model, [batch], **arguments)
    with torch.inference_mode():
        batch = {name: tensor.clone() for name, tensor in batch.items()}
        other = Direct()
    assert calibrate(model, [batch], **arguments) == expected
    with pytest.raises(CalibrationError, match=r"made under torch\.inference_mode"):
        calibrate(other, [batch], **arguments)


def test_a_weight_that_a_parametrisation_computes():
    model = Net()
    torch.nn.utils.parametrizations.spectral_norm(model.blocks[0].up)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for estimator in ("activation", "fisher"):
        assert calibrate(model.train(), [batch_of()], estimator=estimator, progress=False)["blocks.0.up"].trace > 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    with pytest.raises(CalibrationError, match=r"weight of 'blocks\.0\.up' is computed by a parametrisation"):
        calibrate(model, [batch_of()], estimator="hutchinson", progress=False)


def test_fisher_of_a_weight_that_is_an_embedding_too():
    class Tied(Net):
        def __init__(self):
            super().__init__(classes=20, token_logits=True)
            self.classifier.weight = self.embed.weight

    batch = batch_of() | {"labels": torch.zeros_like(batch_of()["input_ids"])}
    with pytest.raises(CalibrationError, match=r"weight of 'classifier' is that of 'embed' \(Embedding\) too"):
        calibrate(Tied(), [batch], estimator="fisher", targets=["classifier", "up"], progress=False)
    for arguments in ({"targets": ["up"]}, {"targets": ["classifier"], "estimator": "activation"}):
        calibrate(Tied(), [batch], **{"estimator": "fisher", "progress": False, **arguments})


def test_a_model_without_logits_needs_a_loss():
    class Tuple(Net):
        def forward(self, input_ids, attention_mask=None):
            return {"hidden": super().forward(input_ids, attention_mask)}

    with pytest.raises(CalibrationError, match=r"no logits.*loss_fn"):
        calibrate(Tuple(), [batch_of()], estimator="fisher", progress=False)
    report = calibrate(
        Tuple(),
        [batch_of()],
        estimator="fisher",
        loss_fn=lambda outputs, batch: outputs["hidden"].square().sum(),
        progress=False,
    )
    assert report["blocks.0.up"].trace > 0
    with pytest.raises(CalibrationError, match=r"scalar tensor.*\(6, 3\)"):
        calibrate(Tuple(), [batch_of()], estimator="fisher", loss_fn=lambda out, batch: out["hidden"], progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "magic"}, "choose one of activation, fisher, hutchinson"),
        ({"mode": "per_token"}, "choose one of per_sequence, per_position"),
        ({"labels": "mine"}, "choose one of data, model"),
        ({"k": 0}, r"k must be in \(0, 1\]"),
        ({"alpha": 1.5}, r"alpha must be in \(0, 1\]"),
        ({"k": float("nan")}, "k must be"),
        ({"draws": 0}, "draws=0"),
        ({"draws": 2}, "draws=2.*labels='model'"),
        ({"labels": "model", "loss_fn": print}, "cannot be combined with loss_fn"),
        ({"head_warmup_steps": -1}, "head_warmup_steps=-1"),
        ({"estimator": "activation", "head_warmup_steps": 2}, "head_warmup_steps=2"),
        ({"k": "0.5"}, "k must be a number, not '0.5'"),
        ({"tolerance": None}, "tolerance must be a number, not None"),
        ({"probes": 8.0}, r"probes must be a whole number, not 8\.0"),
        ({"block_size": "4"}, "block_size must be a whole number"),
        ({"draws": 1.5}, "draws must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"seed": 2**64}, r"seed must be from -2\*\*63"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        calibrate(Net(), [batch_of()], **{"estimator": "fisher", **arguments}, progress=False)
    assert isinstance(caught.value, SensiloraError)
    assert isinstance(caught.value, ValueError)


def test_targets_that_match_nothing():
    with pytest.raises(TargetError, match="q_proj"):
        calibrate(Net(), [batch_of()], targets=["q_proj"], progress=False)


@every_estimator
def test_modules_that_never_run_are_named(arguments):
    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.spare = nn.ModuleList(nn.Linear(6, 6) for _ in range(7))

    with pytest.raises(TargetError, match=r"7 target modules never ran .*spare\.0, .*spare\.4, \.\.\.\)"):
        calibrate(Unused(), [batch_of()], **arguments, progress=False)


# ---------------------------------------------------------------------------------------------- NaN and Inf


@every_estimator
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blocks.0.key.weight", "classifier.bias", "embed.weight"])
def test_a_parameter_that_is_not_finite_is_named(arguments, value, name):
    model = Net()
    model.get_parameter(name).data.view(-1)[1] = value
    with pytest.raises(NonFiniteError, match=rf"'{name}'"):
        calibrate(model, [batch_of()], **arguments, progress=False)


@every_estimator
def test_the_first_module_that_overflows_is_named(arguments):
    model = Net(depth=3)
    with torch.no_grad():
        model.blocks[1].up.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match=r"the output of module 'blocks\.1\.up' is the first"):
        calibrate(model, [batch_of(), batch_of()], **arguments, progress=False)


@every_estimator
def test_a_buffer_or_a_batch_entry_that_is_not_finite_is_named(arguments):
    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(6))

        def forward(self, inputs_embeds):
            return self.classifier(self.blocks[0](inputs_embeds * self.scale, inputs_embeds[..., 0] < 9).mean(1))

    model, batch = Scaled(), {"inputs_embeds": torch.randn(2, 4, 6), "labels": torch.tensor([0, 1])}
    arguments = {**arguments, "targets": r"blocks\.0\..*", "progress": False}
    assert len(calibrate(model, [batch], **arguments)) == 5
    model.scale[2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'scale'"):
        calibrate(model, [batch], **arguments)
    model.scale[2] = 1.0
    batch["inputs_embeds"][0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"batch entry 'inputs_embeds'"):
        calibrate(model, [batch], **arguments)


def test_a_loss_that_is_not_finite_without_a_module_to_blame():
    with pytest.raises(NonFiniteError, match="the loss is NaN or Inf though"):
        calibrate(
            Net(),
            [batch_of()],
            estimator="fisher",
            loss_fn=lambda outputs, batch: outputs.sum() * float("nan"),
            progress=False,
        )


def test_gradients_that_overflow_name_the_module():
    class Steep(Net):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids, attention_mask) * 1e30

    with pytest.raises(NonFiniteError, match=r"gradients of module 'blocks\.\d\.\w+' overflowed"):
        calibrate(
            Steep(), [batch_of()], estimator="fisher", loss_fn=lambda outputs, batch: outputs.sum(), progress=False
        )


def test_nothing_is_said_about_padding_that_is_not_finite():
    """Rows of padding may hold NaN; they neither count nor raise."""

    class Poisoned(Net):
        def forward(self, input_ids, attention_mask=None):
            mask = attention_mask.unsqueeze(-1) != 0
            hidden = self.embed(input_ids).masked_fill(~mask, float("nan"))
            hidden = self.blocks[0].up(hidden).masked_fill(~mask, 0.0)
            return self.classifier(self.blocks[0].down(hidden).sum(1))

    for arguments in ESTIMATORS:
        report = calibrate(Poisoned(depth=1), [batch_of()], targets=["up", "down"], **arguments, progress=False)
        assert report["blocks.0.up"].trace > 0
