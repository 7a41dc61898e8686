"""The Fisher estimator against autograd, one sequence at a time in fp64, and against BackPACK where it is installed.

BackPACK is no dependency of the tests, for it would bring torchvision and with that another torch; it needs neither:
``pip install --no-deps backpack-for-pytorch==1.7.1 unfoldNd einops``.
"""

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sensilora.errors import CalibrationError
from sensilora.ops.fisher_diag import MODES
from sensilora.sensitivity import calibrate
from sensilora.sensitivity.fisher import FisherEstimator
from tests.sensitivity.oracles import (
    Net,
    assert_close,
    classification_batch,
    diagonals,
    fisher_oracle,
    pad,
    sequences,
)

LENGTHS = (5, 3, 7, 1)
LABELS = [0, 2, 1, 2]
both_modes = pytest.mark.parametrize("mode", ["per_sequence", "per_position"])


def losses_of(model, ids, labels):
    return [
        lambda x=x, y=y: F.cross_entropy(model(x), torch.tensor([y]), reduction="sum")
        for x, y in zip(ids, labels, strict=True)
    ]


@both_modes
def test_classifier_with_padding_matches_one_sequence_at_a_time(mode):
    model, ids = Net().double(), sequences(*LENGTHS)
    expected = fisher_oracle(model, losses_of(model, ids, LABELS), mode=mode)
    batches = [classification_batch(ids[:3], LABELS[:3]), classification_batch(ids[3:], LABELS[3:], to=4)]
    report, found = diagonals(model, batches, estimator="fisher", mode=mode)
    assert_close(found, expected)
    for name, diagonal in expected.items():
        values = diagonal.flatten().sort(descending=True).values
        half = values[: len(values) // 2]
        assert report[name].trace == pytest.approx(float(values.sum()), rel=1e-9)
        assert report[name].topk_mean == pytest.approx(float(half.mean()), rel=1e-9)
        reached = int((values.cumsum(0) < 0.85 * values.sum()).sum()) + 1
        assert report[name].effective_rank == reached
        assert report[name].shape == tuple(diagonal.shape)
        assert (report[name].tokens, report[name].calls) == (sum(LENGTHS), 2)
    assert (report.tokens, report.sequences) == (sum(LENGTHS), 4)
    assert (report.estimator, report.mode, report.labels, report.draws) == ("fisher", mode, "data", 1)


@both_modes
def test_module_called_twice_adds_its_gradients_before_squaring(mode):
    model, ids = Net(repeat=2).double(), sequences(*LENGTHS)
    expected = fisher_oracle(model, losses_of(model, ids, LABELS), mode=mode)
    report, found = diagonals(model, [classification_batch(ids, LABELS)], estimator="fisher", mode=mode)
    assert_close(found, expected)
    assert report["blocks.0.up"].calls == 2
    assert report["blocks.0.up"].tokens == 2 * sum(LENGTHS)


def test_tied_weights_are_one_matrix_with_aliases():
    model, ids = Net().double(), sequences(*LENGTHS)
    model.blocks[1].down.weight = model.blocks[0].down.weight
    # autograd.grad of a tied weight is the sum over both modules already.
    expected = fisher_oracle(model, losses_of(model, ids, LABELS))
    del expected["blocks.1.down"]
    report, found = diagonals(model, [classification_batch(ids, LABELS)], estimator="fisher")
    assert_close(found, expected)
    assert report["blocks.0.down"].aliases == ("blocks.1.down",)
    assert report["blocks.0.down"].calls == 2
    assert "blocks.1.down" not in report.matrices


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant, repeat, frozen):
    plain, ids = Net(repeat=repeat).double(), sequences(*LENGTHS)
    checkpointed = Net(repeat=repeat, use_reentrant=use_reentrant).double()
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.requires_grad_(not frozen)
    batch = classification_batch(ids, LABELS)
    expected_report, expected = diagonals(plain, [batch], estimator="fisher")
    report, found = diagonals(checkpointed, [batch], estimator="fisher")
    assert_close(found, expected, rtol=1e-13)
    assert [report[name].calls for name in report] == [expected_report[name].calls for name in expected_report]


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_several_draws_through_checkpoints_count_calls_once(use_reentrant):
    plain, ids = Net(repeat=2).double(), sequences(*LENGTHS)
    model = Net(repeat=2, use_reentrant=use_reentrant).double()
    model.load_state_dict(plain.state_dict())
    arguments = {"estimator": "fisher", "labels": "model", "seed": 3}
    batch = classification_batch(ids, LABELS)
    _, expected = diagonals(plain, [batch], draws=3, **arguments)
    report, found = diagonals(model, [batch], draws=3, **arguments)
    assert_close(found, expected, rtol=1e-13)
    assert report["blocks.0.up"].calls == 2
    assert report.draws == 3


def test_draws_average():
    """Four draws are the mean of the four single draws that the same generator makes in turn."""
    model, ids = Net().double(), sequences(*LENGTHS)
    batch = classification_batch(ids, LABELS)
    with torch.no_grad():
        probabilities = model.eval()(batch["input_ids"], batch["attention_mask"]).softmax(-1)
    generator = torch.Generator().manual_seed(11)
    draws = [torch.multinomial(probabilities, 1, generator=generator).squeeze(1) for _ in range(4)]
    expected = None
    for labels in draws:
        diagonal = fisher_oracle(model, losses_of(model, ids, labels.tolist()))
        expected = diagonal if expected is None else {name: expected[name] + diagonal[name] for name in expected}
    _, found = diagonals(model, [batch], estimator="fisher", labels="model", draws=4, seed=11)
    assert_close(found, {name: value / 4 for name, value in expected.items()})


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_captured_inputs_obey_the_checkpoint(use_reentrant):
    """Between forward and backward no checkpointed block holds the inner activation that its `down` reads."""
    model, ids = Net(width=64, use_reentrant=use_reentrant), torch.randint(0, 20, (4, 32))
    sizes, after_forward = [], []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    def loss_fn(outputs, batch):
        after_forward.extend(sizes)
        return outputs.square().sum()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        calibrate(model, [{"input_ids": ids}], estimator="fisher", loss_fn=loss_fn, progress=False)
    assert (ids.numel() * 2 * 64 in after_forward) == (use_reentrant is None)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoint_without_an_embedding_is_an_error_not_a_zero():
    class Bare(Net):
        get_input_embeddings = None

    model = Bare(use_reentrant=True)
    with pytest.raises(CalibrationError, match=r"use_reentrant=False"):
        calibrate(model, [classification_batch(sequences(4), [1])], estimator="fisher", progress=False)


def test_a_module_under_no_grad_is_named():
    class PartlyHidden(Net):
        def forward(self, input_ids, attention_mask=None):
            hidden = self.embed(input_ids)
            mask = torch.ones_like(input_ids).bool()
            with torch.no_grad():
                hidden = self.blocks[0](hidden, mask)
            return self.classifier(self.blocks[1](hidden, mask).mean(1))

    with pytest.raises(CalibrationError, match=r"'blocks\.0\.\w+'.*gradients disabled"):
        calibrate(PartlyHidden(), [classification_batch(sequences(4), [1])], estimator="fisher", progress=False)


def test_a_module_that_passes_no_gradient_on_is_named():
    model = Net()
    weight = model.blocks[1].up.weight
    weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)  # as bitsandbytes marks a 4-bit layer
    with pytest.raises(CalibrationError, match=r"module 'blocks\.1\.up' passes no gradient on"):
        calibrate(model, [classification_batch(sequences(4), [1])], estimator="fisher", progress=False)
    weight.quant_state.packing_format_for_cpu = False
    calibrate(model, [classification_batch(sequences(4), [1])], estimator="fisher", progress=False)


def test_a_module_the_loss_does_not_depend_on_has_zero_sensitivity():
    class Side(Net):
        def __init__(self):
            super().__init__()
            self.side = nn.Linear(6, 6)

        def forward(self, input_ids, attention_mask=None):
            self.side(self.embed(input_ids))
            return super().forward(input_ids, attention_mask)

    report = calibrate(Side(), [classification_batch(sequences(4), [1])], estimator="fisher", progress=False)
    assert (report["side"].trace, report["side"].effective_rank, report["side"].calls) == (0.0, 0, 1)
    assert report["blocks.0.up"].trace > 0


@pytest.mark.parametrize("draws", [1, 3])
def test_a_call_that_does_not_reach_the_loss_adds_nothing(draws):
    class Discarding(Net):
        def forward(self, input_ids, attention_mask=None):
            for block in self.blocks:
                block.up(self.embed(input_ids))
            return super().forward(input_ids, attention_mask)

    plain, model, batch = Net().double(), Discarding().double(), classification_batch(sequences(*LENGTHS), LABELS)
    model.load_state_dict(plain.state_dict())
    arguments = {"estimator": "fisher", "labels": "model", "draws": draws}
    _, expected = diagonals(plain, [batch], **arguments)
    report, found = diagonals(model, [batch], **arguments)
    assert_close(found, expected, rtol=1e-13)
    assert report["blocks.0.up"].calls == 2


def test_frozen_and_trainable_models_agree_exactly():
    batch = classification_batch(sequences(*LENGTHS), LABELS)
    model = Net()
    trainable = calibrate(model, [batch], estimator="fisher", progress=False)
    frozen = calibrate(model.requires_grad_(False), [batch], estimator="fisher", progress=False)
    assert trainable.matrices == frozen.matrices


def test_ignored_labels_and_ignored_sequences_do_not_count():
    model, ids = Net(classes=20, token_logits=True).double(), sequences(*LENGTHS)
    labels = sequences(*LENGTHS, seed=1)
    labels[0][0, 2:] = -100
    labels[1][:] = -100

    def loss_of(n):
        return lambda: F.cross_entropy(model(ids[n])[0], labels[n][0], reduction="sum", ignore_index=-100)

    # The second sequence has no label at all: it is no sequence of the mean.
    expected = fisher_oracle(model, [loss_of(n) for n in (0, 2, 3)])
    padded, mask = pad(ids)
    for value in (-100, 7):  # padding is ignored whether or not its labels say so
        batch = {"input_ids": padded, "attention_mask": mask, "labels": pad(labels, value=value)[0]}
        report, found = diagonals(model, [batch], estimator="fisher")
        assert_close(found, expected)
        assert (report.sequences, report.tokens) == (3, sum(LENGTHS))


@pytest.mark.parametrize("left", [False, True])
def test_shifted_labels_predict_the_next_token_only_from_and_to_real_tokens(left):
    # Positions are not encoded in this net, so left padding must give the same numbers.
    model, ids = Net(classes=20, token_logits=True).double(), sequences(5, 3, 7)
    losses = [lambda x=x: F.cross_entropy(model(x)[0, :-1], x[0, 1:], reduction="sum") for x in ids]
    expected = fisher_oracle(model, losses)
    padded, mask = pad(ids, left=left)
    batch = {"input_ids": padded, "attention_mask": mask, "labels": padded}
    _, found = diagonals(model, [batch], estimator="fisher", shift_labels=True)
    assert_close(found, expected)


def test_regression_multi_label_and_own_loss():
    ids = sequences(*LENGTHS)
    padded, mask = pad(ids)
    inputs = {"input_ids": padded, "attention_mask": mask}

    model, targets = Net(classes=1).double(), torch.randn(4).double()
    losses = [lambda n=n: 0.5 * (model(ids[n])[0, 0] - targets[n]) ** 2 for n in range(4)]
    expected = fisher_oracle(model, losses)
    assert_close(diagonals(model, [{**inputs, "labels": targets}], estimator="fisher")[1], expected)
    own = diagonals(
        model,
        [{**inputs, "label": targets}],
        estimator="fisher",
        loss_fn=lambda outputs, batch: 0.5 * (outputs[:, 0] - batch["label"]).square().sum(),
    )[1]
    assert_close(own, expected)

    several, targets = Net(classes=3).double(), torch.rand(4, 3).round().double()
    losses = [
        lambda n=n: F.binary_cross_entropy_with_logits(several(ids[n]), targets[n : n + 1], reduction="sum")
        for n in range(4)
    ]
    expected = fisher_oracle(several, losses)
    assert_close(diagonals(several, [{**inputs, "labels": targets}], estimator="fisher")[1], expected)


def gauss_newton(model, ids, classes, targets="all-linear"):
    """(1/N) Σ_n Σ_c p_c (∂ log p_c / ∂W)², the expectation that sampled labels approach, by enumeration."""
    with torch.no_grad():
        probabilities = [model.eval()(x).softmax(-1)[0] for x in ids]
    total = None
    for c in range(classes):
        losses = [
            lambda x=x, p=p[c], c=c: -p.sqrt() * model(x).log_softmax(-1)[0, c]
            for x, p in zip(ids, probabilities, strict=True)
        ]
        part = fisher_oracle(model, losses, targets=targets)
        total = part if total is None else {name: total[name] + part[name] for name in total}
    return total


def test_the_gauss_newton_diagonal_is_the_last_layers_hessian():
    """The reference of the two tests below, against double backward: the loss of a linear map's outputs is convex."""
    model, ids = Net(depth=1).double().eval(), sequences(4, 6, 3)
    weight = model.classifier.weight
    labels = torch.tensor([0, 1, 1])  # of no effect on this Hessian

    def loss_of(values):
        logits = torch.cat([torch.func.functional_call(model, {"classifier.weight": values}, (x,)) for x in ids])
        return F.cross_entropy(logits, labels)

    hessian = torch.autograd.functional.hessian(loss_of, weight)
    expected = hessian.flatten(0, 1).flatten(1, 2).diagonal().view_as(weight)
    found = gauss_newton(model, ids, 3, targets=["classifier"])["classifier"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def relative_error(found, expected):
    difference = sum(float((found[name] - expected[name]).abs().sum()) for name in expected)
    return difference / sum(float(value.sum()) for value in expected.values())


def test_sampled_labels_converge_to_the_gauss_newton_diagonal():
    model, ids = Net(depth=1).double(), sequences(4, 6, 3)
    expected = gauss_newton(model, ids, 3)
    arguments = {"estimator": "fisher", "labels": "model", "draws": 4}
    few, many = (
        diagonals(model, [classification_batch(ids * copies, [0] * 3 * copies)], **arguments)[1]
        for copies in (1, 100)
    )
    assert relative_error(many, expected) < 0.1
    assert relative_error(many, expected) < 0.5 * relative_error(few, expected)


def test_four_times_the_draws_halve_the_error():
    """The error of a mean over draws, which falls as one over the root of their number."""
    model, ids = Net(depth=1).double(), sequences(4, 6, 3)
    expected = gauss_newton(model, ids, 3)
    batch = classification_batch(ids, [0] * 3)
    errors = []
    for draws in (8, 32, 128):
        runs = [
            diagonals(model, [batch], estimator="fisher", labels="model", draws=draws, seed=seed)[1]
            for seed in range(4)
        ]
        errors.append(sum(relative_error(found, expected) for found in runs) / len(runs))
    for more, fewer in ((errors[1], errors[0]), (errors[2], errors[1])):
        assert 0.3 < more / fewer < 0.75
    assert errors[2] < 0.15


@pytest.mark.parametrize("mode", ["per_sequence", "per_loss_term"])
def test_sampled_labels_of_many_positions_converge_to_the_gauss_newton_diagonal(mode):
    """Where labels are drawn, the products of different labels' gradients cancel: both modes have one expectation."""
    model, ids = Net(classes=3, depth=1, token_logits=True).double(), sequences(4, 3)
    with torch.no_grad():
        probabilities = [model.eval()(x).softmax(-1)[0] for x in ids]
    losses = [
        lambda x=x, p=p, t=t, c=c: -p[t, c].sqrt() * model(x).log_softmax(-1)[0, t, c]
        for x, p in zip(ids, probabilities, strict=True)
        for t in range(len(p))
        for c in range(3)
    ]
    expected = {name: value * len(losses) / len(ids) for name, value in fisher_oracle(model, losses).items()}
    padded, mask = pad(ids * 100)
    batch = {"input_ids": padded, "attention_mask": mask}
    found = diagonals(model, [batch], estimator="fisher", labels="model", mode=mode, draws=4)[1]
    assert relative_error(found, expected) < 0.1


def term_losses(model, ids, labels):
    """One function for each label that counts."""
    return [
        lambda x=x, y=y, t=t: F.cross_entropy(model(x)[0, t], y[0, t], reduction="sum")
        for x, y in zip(ids, labels, strict=True)
        for t in range(x.shape[1])
        if y[0, t] != -100
    ]


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_per_loss_term_squares_the_gradient_of_each_label(use_reentrant, frozen):
    plain, ids = Net(classes=20, token_logits=True).double(), sequences(*LENGTHS)
    model = Net(classes=20, token_logits=True, use_reentrant=use_reentrant).double()
    model.load_state_dict(plain.state_dict())
    labels = sequences(*LENGTHS, seed=1)
    labels[0][0, 1:3] = -100
    losses = term_losses(plain, ids, labels)
    # The mean is over sequences, of which there are four, and not over labels.
    expected = {name: value * len(losses) / 4 for name, value in fisher_oracle(plain, losses).items()}
    padded, mask = pad(ids)
    batch = {"input_ids": padded, "attention_mask": mask, "labels": pad(labels, value=-100)[0]}
    model.requires_grad_(not frozen)
    with mock.patch.object(FisherEstimator, "_backward", autospec=True, side_effect=FisherEstimator._backward) as run:
        report, found = diagonals(model, [batch], estimator="fisher", mode="per_loss_term")
    assert_close(found, expected)
    assert run.call_count == max(LENGTHS)
    assert (report.mode, report.sequences) == ("per_loss_term", 4)
    assert {report[name].calls for name in report} == {1}
    # The sequences' own gradients are another matter.
    _, whole = diagonals(model, [batch], estimator="fisher")
    assert relative_error(whole, expected) > 0.1


def test_per_loss_term_of_shifted_labels_and_several_draws():
    model, ids = Net(classes=20, token_logits=True).double(), sequences(5, 3)
    padded, mask = pad(ids, left=True)
    with torch.no_grad():
        model.classifier.bias[4] = 20.0  # so that the label that will be drawn is known
    batch = {"input_ids": padded, "attention_mask": mask}
    arguments = {"estimator": "fisher", "mode": "per_loss_term", "shift_labels": True}
    sampled = diagonals(model, [batch], labels="model", draws=3, **arguments)[1]
    losses = term_losses(model, ids, [torch.tensor([[4] * (x.shape[1] - 1) + [-100]]) for x in ids])
    expected = {name: value * len(losses) / 2 for name, value in fisher_oracle(model, losses).items()}
    assert_close(sampled, expected)


def test_per_loss_term_of_one_label_a_sequence_is_per_sequence():
    model, ids = Net(), sequences(*LENGTHS)
    for batch in (
        classification_batch(ids, LABELS),
        classification_batch(ids, torch.rand(4, 3)),
        classification_batch(ids, [0, -100, 1, -100]),
    ):
        expected, found = (
            calibrate(model, [batch], estimator="fisher", mode=mode, progress=False)
            for mode in ("per_sequence", "per_loss_term")
        )
        assert found.matrices == expected.matrices


def test_per_loss_term_needs_the_packages_own_loss():
    with pytest.raises(CalibrationError, match="mode='per_loss_term' divides the loss by its labels"):
        calibrate(
            Net(), [], estimator="fisher", mode="per_loss_term", loss_fn=lambda outputs, batch: 0.0, progress=False
        )


def backpack_sums(model, x, loss, target, extension, field):
    """Field `field` of every weight after BackPACK's `extension` ran; by module name."""
    backpack = pytest.importorskip("backpack")
    copy = nn.Sequential(
        *(
            nn.Linear(part.in_features, part.out_features) if isinstance(part, nn.Linear) else nn.Tanh()
            for part in model
        )
    ).to(x.dtype)
    copy.load_state_dict(model.state_dict())
    backpack.extend(copy)
    with backpack.backpack(extension):
        backpack.extend(loss)(copy(x), target).backward()
    return {str(i): getattr(part.weight, field) for i, part in enumerate(copy) if isinstance(part, nn.Linear)}


def perceptron():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


backpack_warnings = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@backpack_warnings
def test_backpack_of_single_samples():
    extensions = pytest.importorskip("backpack.extensions")
    model, x, y = perceptron(), torch.randn(7, 5).double(), torch.randint(0, 3, (7,))
    loss = nn.CrossEntropyLoss(reduction="sum")
    expected = backpack_sums(model, x, loss, y, extensions.SumGradSquared(), "sum_grad_squared")
    model.requires_grad_(False)
    for mode in MODES:
        _, found = diagonals(model, [{"input": x, "labels": y}], estimator="fisher", mode=mode)
        assert_close(found, {name: value / 7 for name, value in expected.items()})


@backpack_warnings
def test_backpack_of_sequences():
    """BackPACK squares after the sum over T of inputs (N, T, features), which is per_sequence here."""
    extensions = pytest.importorskip("backpack.extensions")
    model, x, y = perceptron(), torch.randn(4, 6, 5).double(), torch.randn(4, 6, 3).double()
    loss = nn.MSELoss(reduction="sum")
    expected = backpack_sums(model, x, loss, y, extensions.SumGradSquared(), "sum_grad_squared")
    _, found = diagonals(
        model,
        [{"input": x, "labels": y}],
        estimator="fisher",
        loss_fn=lambda outputs, batch: (outputs - batch["labels"]).square().sum(),
    )
    assert_close(found, {name: value / 4 for name, value in expected.items()})


@backpack_warnings
def test_backpack_of_each_label():
    """In a network that acts on each position alone, the labels of N sequences are N · T samples of BackPACK's."""
    extensions = pytest.importorskip("backpack.extensions")
    model, x, y = perceptron(), torch.randn(4, 6, 5).double(), torch.randint(0, 3, (4, 6))
    loss = nn.CrossEntropyLoss(reduction="sum")
    flat = backpack_sums(model, x.flatten(0, 1), loss, y.flatten(), extensions.SumGradSquared(), "sum_grad_squared")
    for mode in ("per_loss_term", "per_position"):
        _, found = diagonals(model, [{"input": x, "labels": y}], estimator="fisher", mode=mode)
        assert_close(found, {name: value / 4 for name, value in flat.items()})


@backpack_warnings
def test_backpacks_gauss_newton_diagonal():
    extensions = pytest.importorskip("backpack.extensions")
    model, x = perceptron(), torch.randn(4, 5).double()
    loss = nn.CrossEntropyLoss(reduction="sum")
    exact = backpack_sums(model, x, loss, torch.zeros(4).long(), extensions.DiagGGNExact(), "diag_ggn_exact")
    _, found = diagonals(model, [{"input": x.repeat(200, 1)}], estimator="fisher", labels="model", draws=8)
    assert relative_error(found, {name: value / 4 for name, value in exact.items()}) < 0.1


def test_sampled_regression_converges_to_the_squared_jacobian():
    model, ids = Net(classes=1, depth=1).double(), sequences(4, 6, 3)
    expected = fisher_oracle(model, [lambda x=x: model(x)[0, 0] for x in ids])
    padded, mask = pad(ids * 100)
    batch = {"input_ids": padded, "attention_mask": mask}
    found = diagonals(model, [batch], estimator="fisher", labels="model", draws=4)[1]
    assert relative_error(found, expected) < 0.1


def test_the_seed_decides_the_sampled_labels():
    model = Net()
    batch = {
        key: value for key, value in classification_batch(sequences(*LENGTHS), LABELS).items() if key != "labels"
    }

    def traces(seed):
        torch.manual_seed(seed + 5)  # the global generator has no part in it
        report = calibrate(model, [batch] * 3, estimator="fisher", labels="model", seed=seed, progress=False)
        return [report[name].trace for name in report]

    assert traces(1) == traces(1)
    assert traces(1) != traces(2)


def test_sampling_without_labels_counts_what_is_not_padding():
    """With a certain model the sampled labels are known, so the counted positions can be read off the gradient."""
    model, ids = Net(classes=20, token_logits=True).double(), sequences(5, 3)
    with torch.no_grad():
        model.classifier.bias[4] = 200.0
    padded, mask = pad(ids)
    batch = {"input_ids": padded, "attention_mask": mask}
    sampled = diagonals(model, [batch], estimator="fisher", labels="model", targets=["classifier"])[1]
    labels = torch.where(mask == 1, 4, -100)
    given = diagonals(model, [{**batch, "labels": labels}], estimator="fisher", targets=["classifier"])[1]
    torch.testing.assert_close(sampled["classifier"], given["classifier"])


@pytest.mark.parametrize("flat", [False, True])
def test_rows_may_be_flattened(flat):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.head = nn.Embedding(20, 4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, input_ids, attention_mask):
            hidden = self.embed(input_ids)
            shape = hidden.shape[:2]
            hidden = self.up(hidden.flatten(0, 1) if flat else hidden).view(*shape, 5).tanh()
            return self.head((hidden * attention_mask.unsqueeze(-1)).sum(1))

    torch.manual_seed(5)
    model, ids = Flat().double(), sequences(*LENGTHS)
    losses = [
        lambda x=x, y=y: F.cross_entropy(model(x, torch.ones_like(x)), torch.tensor([y]))
        for x, y in zip(ids, LABELS, strict=True)
    ]
    expected = fisher_oracle(model, losses)
    assert_close(diagonals(model, [classification_batch(ids, LABELS)], estimator="fisher")[1], expected)


def test_rows_that_cannot_be_attributed_are_an_error_that_names_the_module():
    class Routed(Net):
        def forward(self, input_ids, attention_mask=None):
            hidden = self.embed(input_ids)
            routed = self.blocks[0].up(hidden.flatten(0, 1)[::2])
            return self.classifier(hidden.mean(1) + routed.mean())

    model = Routed(depth=1)
    batch = {"input_ids": torch.randint(0, 20, (4, 6)), "labels": torch.tensor([0, 1, 2, 0])}
    targets = r"blocks\.0\.up"
    with pytest.raises(CalibrationError, match=r"'blocks\.0\.up'.*one sequence"):
        calibrate(model, [batch], estimator="fisher", targets=targets, progress=False)
    # As the message says, one sequence a batch leaves no doubt.
    single = [{key: value[n : n + 1] for key, value in batch.items()} for n in range(4)]
    assert calibrate(model, single, estimator="fisher", targets=targets, progress=False).sequences == 4


def test_many_batches_of_bf16_gradients_are_summed_in_full():
    """A sum of squares in bf16 stops growing at 256 of them."""
    model, x = nn.Sequential(nn.Linear(3, 2, bias=False)).bfloat16(), torch.randn(1, 3).bfloat16()
    batch = {"input": x, "labels": torch.tensor([1])}
    once = calibrate(model, [batch], estimator="fisher", progress=False)["0"]
    often = calibrate(model, [batch] * 600, estimator="fisher", progress=False)["0"]
    assert often.trace == pytest.approx(once.trace, rel=1e-5)
    assert (often.effective_rank, often.tokens) == (once.effective_rank, 600)


def test_a_long_diagonal_is_summed_in_full():
    """One entry of 2^24 and 2^20 ones: in fp32 added one by one, the ones would all be lost."""
    model, x = nn.Sequential(nn.Linear(2**20 + 1, 1, bias=False)), torch.ones(1, 2**20 + 1)
    x[0, 7] = 2.0**12
    found = calibrate(
        model, [{"input": x}], estimator="fisher", alpha=0.97, loss_fn=lambda y, batch: y.sum(), progress=False
    )["0"]
    assert found.trace == 2**24 + 2**20
    assert found.effective_rank == 1 + math.ceil(0.97 * (2**24 + 2**20) - 2**24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_agree_with_fp32(dtype):
    model, ids = Net(width=16), sequences(*LENGTHS)
    batch = classification_batch(ids, LABELS)
    model.to(dtype)
    low = calibrate(model, [batch], estimator="fisher", progress=False)
    high = calibrate(model.float(), [batch], estimator="fisher", progress=False)
    for name in high:
        assert low[name].trace == pytest.approx(high[name].trace, rel=0.05)


def test_fp16_gradients_do_not_underflow():
    """Gradients of about 1e-8, below fp16's least number, still give their squares."""

    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.head(self.up(x))

    model = Faint()
    with torch.no_grad():
        model.head.weight.fill_(3e-8 * 2).mul_(torch.tensor([[1.0], [-1.0]]))
    batch = {"x": torch.ones(2, 3, 4), "labels": torch.zeros(2, dtype=torch.long)}

    def run(model, batch):
        return calibrate(
            model,
            [batch],
            estimator="fisher",
            targets=["up"],
            progress=False,
            loss_fn=lambda outputs, entries: F.cross_entropy(
                outputs.float().mean(1), entries["labels"], reduction="sum"
            ),
        )["up"].trace

    expected = run(model, batch)
    assert expected > 0
    found = run(model.half(), {**batch, "x": batch["x"].half()})
    assert found == pytest.approx(expected, rel=0.1)


def test_autocast_is_respected():
    model = Net(width=16)
    batch = classification_batch(sequences(*LENGTHS), LABELS)
    expected = calibrate(model, [batch], estimator="fisher", progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = calibrate(model, [batch], estimator="fisher", progress=False)
    for name in expected:
        assert found[name].trace == pytest.approx(expected[name].trace, rel=0.05)


def test_on_device(device):
    model, ids = Net().double(), sequences(*LENGTHS)
    expected = fisher_oracle(model, losses_of(model, ids, LABELS))
    report, found = diagonals(model.to(device), [classification_batch(ids, LABELS)], estimator="fisher")
    assert_close({name: value.cpu() for name, value in found.items()}, expected)
    sampled = calibrate(
        model, [classification_batch(ids, LABELS)], estimator="fisher", labels="model", progress=False
    )
    assert len(sampled) == len(report)
