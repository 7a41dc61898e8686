"""The Hutchinson estimator against the Hessian itself, by double backward in fp64 on small networks."""

import math
import statistics

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sensilora.errors import CalibrationError, NonFiniteError
from sensilora.ops import diagonal_metrics, lora_linear, rademacher
from sensilora.sensitivity import SensitivityReport, calibrate
from sensilora.targets import is_conv1d
from tests.sensitivity.oracles import Net, assert_close, classification_batch, diagonals, sequences
from tests.sensitivity.test_models import bart, bert, gpt2, llama
from tests.tiny_models import FAMILIES

LENGTHS = (5, 3, 7, 1)
LABELS = [0, 2, 1, 2]
FIXED = {"estimator": "hutchinson", "min_probes": 6, "probes": 6, "tolerance": 0.0}
both_products = pytest.mark.parametrize("hvp", ["double_backward", "central_differences"])


def batches_of(ids=None, labels=LABELS):
    ids = sequences(*LENGTHS) if ids is None else ids
    return [classification_batch(ids[:3], labels[:3]), classification_batch(ids[3:], labels[3:], to=4)]


def loss_of(model, labels=LABELS):
    """Mean over sequences, one at a time without padding, of each one's summed loss."""
    pairs = list(zip(sequences(*LENGTHS), labels, strict=True))

    def loss():
        total = sum(F.cross_entropy(model(x), torch.tensor([y]), reduction="sum") for x, y in pairs)
        return total / len(pairs)

    return loss


def hessian(model, loss, name):
    """(m, m): all second derivatives of the loss in the weight of a module, row by row."""
    model.eval()
    weight = model.get_submodule(name).weight
    weight.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(loss(), weight, create_graph=True)
        rows = [torch.autograd.grad(g, weight, retain_graph=True)[0].flatten() for g in gradient.flatten()]
    weight.requires_grad_(False)
    return torch.stack(rows).double()


def signs(model, name, probes, seed=0):
    """(probes, m): what the estimator draws for a matrix."""
    weight = model.get_submodule(name).weight
    place = [id(parameter) for parameter in model.parameters()].index(id(weight))
    return torch.stack(
        [rademacher((weight.numel(),), seed=seed, offset=place << 32 | probe) for probe in range(probes)]
    ).double()


def expected_of(model, loss, name, probes, seed=0):
    """What that many probes give for a matrix, before it is clamped: (out, in)."""
    module = model.get_submodule(name)
    z = signs(model, name, probes, seed)
    mean = (z * (z @ hessian(model, loss, name))).mean(0).view(module.weight.shape)
    return mean.T if is_conv1d(module) else mean


# ---------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("repeat", [1, 2])
@both_products
def test_probes_are_of_the_hessian_of_the_mean_loss(hvp, repeat):
    """Padded batches against one sequence at a time; modules that run twice; frozen weights."""
    model = Net(width=4, repeat=repeat, depth=3 - repeat).double().requires_grad_(False)
    report, found = diagonals(model, batches_of(), **FIXED, hvp=hvp)
    expected = {name: expected_of(model, loss_of(model), name, 6).clamp(min=0) for name in report}
    assert_close(found, expected, rtol=1e-9 if hvp == "double_backward" else 1e-6)
    for name, matrix in report.matrices.items():
        assert matrix.calls == 2 * repeat
        assert matrix.tokens == repeat * sum(LENGTHS)
        metrics = diagonal_metrics(expected[name])
        assert matrix.trace == pytest.approx(float(metrics.trace), rel=1e-6)
        assert matrix.topk_mean == pytest.approx(float(metrics.topk_mean), rel=1e-6)
    assert (report.sequences, report.tokens) == (4, sum(LENGTHS))


def test_the_sign_policy_and_what_the_report_says_of_the_probes(tmp_path):
    model, name = Net().double(), "blocks.0.query"
    report, found = diagonals(model, batches_of(), **{**FIXED, "probes": 7}, k=0.25, alpha=0.6, targets=[name])
    z = signs(model, name, 7)
    samples = z * (z @ hessian(model, loss_of(model), name))
    mean, traces = samples.mean(0), samples.sum(1).tolist()
    assert float(mean.min()) < 0, "without a negative entry this test would say nothing"
    assert torch.allclose(found[name].flatten(), mean.clamp(min=0), rtol=0, atol=1e-12)

    probes = report[name].probes
    assert probes.count == 7
    assert probes.trace == pytest.approx(statistics.fmean(traces))
    assert probes.standard_error == pytest.approx(statistics.stdev(traces) / math.sqrt(7))
    assert probes.negative_mass == pytest.approx(float(mean.clamp(max=0).sum() / -mean.abs().sum()))
    halves = [
        diagonal_metrics(part.mean(0).clamp(min=0), k=0.25, alpha=0.6) for part in (samples[::2], samples[1::2])
    ]
    assert probes.half_topk_mean == pytest.approx([float(half.topk_mean) for half in halves])
    assert probes.half_effective_rank == tuple(int(half.effective_rank) for half in halves)
    half, rank = statistics.fmean(probes.half_topk_mean), statistics.fmean(probes.half_effective_rank)
    assert report[name].topk_mean_bias == pytest.approx(half / report[name].topk_mean - 1)
    assert report[name].effective_rank_bias == pytest.approx(rank / report[name].effective_rank - 1)

    settings = (report.hvp, report.probes, report.min_probes, report.tolerance, report.labels, report.mode)
    assert settings == ("double_backward", 7, 6, 0.0, None, None)
    assert report.diagonal_size(name) == 36
    assert SensitivityReport.load(report.save(tmp_path / "report.json")) == report
    title, header, line = report.summary().splitlines()
    assert "hutchinson (double_backward, 6 to 7 probes, tolerance=0)" in title
    assert "its error" in header
    assert line.split()[6] == "7"


@pytest.mark.parametrize("probes", [4, 16])
def test_unbiased_and_converging_with_the_root_of_the_probes(probes):
    """The trace's error over its exact deviation, √(2 Σ_{i≠j} H_ij² / P), is of size 1 whatever P is."""
    model, name = Net(width=4, depth=1).double(), "blocks.0.down"
    exact = hessian(model, loss_of(model), name)
    deviation = float((2 * (exact.square().sum() - exact.diagonal().square().sum()) / probes).sqrt())
    settings = {**FIXED, "min_probes": probes, "probes": probes, "targets": [name]}
    runs = [calibrate(model, batches_of(), **settings, seed=seed)[name].probes for seed in range(48)]
    errors = [(run.trace - float(exact.trace())) / deviation for run in runs]
    assert abs(statistics.fmean(errors)) < 4 / 48**0.5
    assert 0.5 < statistics.fmean(error**2 for error in errors) < 1.7
    # What a run says of its own error is right on average.
    assert 0.5 < statistics.fmean((run.standard_error / deviation) ** 2 for run in runs) < 1.7


def test_a_matrix_is_done_when_its_traces_error_is_small():
    model = Net(depth=1).double()
    loose = calibrate(model, batches_of(), estimator="hutchinson", probes=40, min_probes=5, tolerance=0.3)
    counts = {name: matrix.probes.count for name, matrix in loose.matrices.items()}
    assert len(set(counts.values())) > 1, "every matrix took as many, so nothing was decided by its error"
    fixed = calibrate(model, batches_of(), estimator="hutchinson", probes=40, min_probes=40, tolerance=0.0)
    for name, count in counts.items():
        probes = loose[name].probes
        assert count % 5 == 0
        assert probes.standard_error <= 0.3 * abs(probes.trace) or count == 40
        if count > 5:
            before = calibrate(
                model, batches_of(), estimator="hutchinson", probes=count - 5, min_probes=5, tolerance=0.3,
                targets=[name],
            )[name].probes  # fmt: skip
            assert before.count == count - 5
            assert before.standard_error > 0.3 * abs(before.trace)
        assert abs(probes.trace - fixed[name].probes.trace) <= 5 * (
            probes.standard_error + fixed[name].probes.standard_error
        )


def test_the_split_halves_show_the_bias_of_noise():
    """On average over matrices fewer probes give a higher top-k mean, and the halves tell."""
    model = Net().double()
    noisy = calibrate(model, batches_of(), **{**FIXED, "probes": 8, "min_probes": 8})
    exact = {
        name: diagonal_metrics(hessian(model, loss_of(model), name).diagonal().clamp(min=0)).topk_mean
        for name in noisy
    }
    told = statistics.fmean(noisy[name].topk_mean_bias for name in noisy)
    true = statistics.fmean(1 - float(exact[name]) / noisy[name].topk_mean for name in noisy)
    assert 0 < told < true < 4 * told


# ---------------------------------------------------------------------------------------------- repeatability


def test_repeatable_to_the_bit_and_independent_of_the_other_matrices():
    model = Net()
    settings = {"estimator": "hutchinson", "probes": 12, "min_probes": 4, "tolerance": 0.2, "seed": 5}
    report, found = diagonals(model, batches_of(), **settings)
    again, found_again = diagonals(model, batches_of(), **settings)
    assert again.matrices == report.matrices
    assert all(torch.equal(found[name], found_again[name]) for name in found)
    for names in (["blocks.1.up"], ["blocks.0.key", "blocks.1.up"], r"blocks\.1\..*"):
        part, found_part = diagonals(model, batches_of(), **settings, targets=names)
        for name in part:
            assert part[name] == report[name]
            assert torch.equal(found_part[name], found[name])
    other = calibrate(model, batches_of(), **{**settings, "seed": 6})
    assert all(other[name].trace != report[name].trace for name in report)
    # Matrices of one shape have signs of their own.
    assert not torch.equal(signs(model, "blocks.0.query", 1), signs(model, "blocks.0.key", 1))


def test_more_probes_continue_those_before():
    model, name = Net().double(), "blocks.0.up"
    few = diagonals(model, batches_of(), **FIXED, targets=[name])[0][name].probes
    many = diagonals(model, batches_of(), **{**FIXED, "probes": 18}, targets=[name])[0][name].probes
    z = signs(model, name, 18)
    traces = (z * (z @ hessian(model, loss_of(model), name))).sum(1)
    assert few.trace == pytest.approx(float(traces[:6].mean()))
    assert many.trace == pytest.approx(float(traces.mean()))


def test_batches_may_come_from_an_iterator():
    model = Net()
    report = calibrate(model, iter(batches_of()), **FIXED)
    assert report.matrices == calibrate(model, batches_of(), **FIXED).matrices


# ---------------------------------------------------------------------------------------------- the model


@both_products
def test_the_weights_are_as_before_also_after_an_exception(hvp):
    model = Net()
    model.blocks[0].up.weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}

    def assert_as_before():
        for name, parameter in model.named_parameters():
            value, flag, grad = before[name]
            assert torch.equal(parameter, value), name
            assert (parameter.requires_grad, parameter.grad) == (flag, grad)

    calibrate(model, batches_of(), **FIXED, hvp=hvp)
    assert_as_before()
    calls = []

    def fail_later(outputs, batch):
        calls.append(outputs)
        if len(calls) == 6:
            raise KeyError("stop")
        return outputs.square().sum()

    with pytest.raises(KeyError, match="stop"):
        calibrate(model, batches_of(), **FIXED, hvp=hvp, loss_fn=fail_later)
    assert len(calls) == 6
    assert_as_before()


def test_only_the_probed_weight_gets_a_gradient(monkeypatch):
    model, wanted = Net(), []
    grad = torch.autograd.grad

    def watched(outputs, inputs, *args, **kwargs):
        wanted.append([name for name, p in model.named_parameters() if p.requires_grad])
        assert inputs is model.get_parameter(wanted[-1][0])
        return grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    report = calibrate(model, batches_of(), **FIXED)
    assert {name for (name,) in wanted} == {f"{name}.weight" for name in report}
    # A gradient a batch and round, and a product for each probe.
    assert len(wanted) == len(report) * 2 * (1 + 6)


def test_tied_weights_are_one_matrix():
    model = Net().double()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    report, found = diagonals(model, batches_of(), **FIXED)
    assert report["blocks.0.up"].aliases == ("blocks.1.up",)
    assert "blocks.1.up" not in report
    expected = expected_of(model, loss_of(model), "blocks.0.up", 6).clamp(min=0)
    assert_close({"up": found["blocks.0.up"]}, {"up": expected})
    alone = calibrate(model, batches_of(), **FIXED, targets=["blocks.1.up"])
    assert alone["blocks.1.up"].trace == report["blocks.0.up"].trace


def test_a_weight_that_is_also_an_embedding():
    """The Hessian is of the loss in the parameter, wherever it is used."""
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    batch = token_batch(model)
    report, found = diagonals(model, [batch], **FIXED, targets=["lm_head"])
    expected = expected_of(model, model_loss(model, batch), "lm_head", 6).clamp(min=0)
    assert_close(found, {"lm_head": expected}, rtol=1e-6)
    assert report["lm_head"].shape == (20, 8)


@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_transformers_checkpointing_is_idle_in_eval_mode(use_reentrant):
    model = llama()
    batch = token_batch(model)
    expected = calibrate(model, [batch], **FIXED)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert calibrate(model.train(), [batch], **FIXED).matrices == expected.matrices
    assert model.is_gradient_checkpointing


def test_rows_need_not_belong_to_sequences():
    """Fisher has to tell sequences apart; the Hessian of their sum does not."""

    class Mixed(Net):
        def forward(self, input_ids):
            hidden = self.embed(input_ids).transpose(0, 1)[:2]
            return self.classifier(self.blocks[0].down(self.blocks[0].up(hidden)).mean(0))

    model, batch = Mixed(), {"input_ids": torch.cat(sequences(5, 5, 5)), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(CalibrationError, match="cannot be attributed"):
        calibrate(model, [batch], estimator="fisher", targets=["blocks.0.up", "blocks.0.down"])
    report = calibrate(model, [batch], **FIXED, targets=["blocks.0.up", "blocks.0.down"])
    assert report["blocks.0.up"].tokens == 6


def test_a_loss_of_the_callers_own():
    model = Net().double()
    report, found = diagonals(model, batches_of(), **FIXED, loss_fn=lambda out, batch: (out**4).sum())

    def loss():
        return sum((model(x) ** 4).sum() for x in sequences(*LENGTHS)) / 4

    assert_close(found, {name: expected_of(model, loss, name, 6).clamp(min=0) for name in report})


def test_ignored_labels_do_not_count():
    model = Net(token_logits=True).double()
    ids = sequences(6, 4)
    batch = classification_batch(ids, [0, 0])
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 3, -100)
    labels[0, :2] = -100
    _, found = diagonals(model, [{**batch, "labels": labels}], **FIXED, targets=["up", "down"])

    def loss():
        first = F.cross_entropy(model(ids[0])[0, 2:], labels[0, 2:], reduction="sum")
        return (first + F.cross_entropy(model(ids[1])[0], labels[1, :4], reduction="sum")) / 2

    assert_close(found, {name: expected_of(model, loss, name, 6).clamp(min=0) for name in found})
    # A batch whose labels are all ignored adds nothing, and its sequences do not count.
    nothing = {**batch, "labels": torch.full_like(labels, -100)}
    report, again = diagonals(model, [{**batch, "labels": labels}, nothing], **FIXED, targets=["up", "down"])
    assert report.sequences == 2
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_what_the_loss_does_not_depend_on_has_a_hessian_of_zero():
    class Detached(Net):
        def forward(self, input_ids, attention_mask=None):
            hidden = self.embed(input_ids)
            self.blocks[1](hidden, hidden[..., 0] < 99)
            return self.classifier(self.blocks[0](hidden, hidden[..., 0] < 99).mean(1))

    report = calibrate(Detached(), batches_of(), **FIXED)
    for part in ("query", "up", "down"):
        assert (report[f"blocks.1.{part}"].trace, report[f"blocks.1.{part}"].effective_rank) == (0, 0)
        assert report[f"blocks.1.{part}"].probes.standard_error == 0
        assert report[f"blocks.1.{part}"].topk_mean_bias is None
        assert report[f"blocks.0.{part}"].trace > 0
    assert report["blocks.1.up"].probes.count == 6


def test_a_loss_in_proportion_to_the_weight_has_a_hessian_of_zero():
    model = nn.Sequential(nn.Linear(3, 2))
    model.forward = lambda x: model[0](x)
    report = calibrate(
        model, [{"x": torch.randn(4, 3)}], **FIXED, targets=["0"], loss_fn=lambda outputs, batch: outputs.sum()
    )
    assert report["0"].trace == 0


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing():
    plain, checkpointed = Net().double(), Net(use_reentrant=False).double()
    checkpointed.load_state_dict(plain.state_dict())
    expected = diagonals(plain, batches_of(), **FIXED)[1]
    assert_close(diagonals(checkpointed, batches_of(), **FIXED)[1], expected)
    with pytest.raises(CalibrationError, match=r"runs with gradients disabled.*use_reentrant=False"):
        calibrate(Net(use_reentrant=True), batches_of(), **FIXED)


def test_an_operation_without_a_second_derivative_says_what_to_do():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    class Squared(Net):
        def forward(self, input_ids, attention_mask=None):
            return Once.apply(super().forward(input_ids, attention_mask))

    model = Squared().double()
    with pytest.raises(CalibrationError, match=r"module 'blocks\.0\.query' .*hvp='central_differences'"):
        calibrate(model, batches_of(), **FIXED)
    _, found = diagonals(model, batches_of(), **FIXED, hvp="central_differences", targets=["down"])
    plain = Net().double()
    plain.load_state_dict(model.state_dict())

    def loss():
        pairs = zip(sequences(*LENGTHS), LABELS, strict=True)
        return sum(F.cross_entropy(plain(x).square(), torch.tensor([y])) for x, y in pairs) / 4

    expected = {name: expected_of(plain, loss, name, 6).clamp(min=0) for name in found}
    assert_close(found, expected, rtol=1e-6)


def test_attention_kernels_of_other_packages_are_refused():
    model = bert()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(CalibrationError, match=r"'flash_attention_2' may have no second derivative; load the model"):
        calibrate(model, [token_batch(model)], **FIXED)


def test_adapters_ops_have_no_second_derivative():
    class Adapted(Net):
        def forward(self, input_ids, attention_mask=None):
            logits = super().forward(input_ids, attention_mask)
            return lora_linear(logits, torch.eye(3), None, torch.ones(1, 3), torch.ones(3, 1), 0.5)

    with pytest.raises(CalibrationError, match=r"lora_linear cannot be differentiated twice.*central_differences"):
        calibrate(Adapted(), batches_of(), **FIXED)
    report = calibrate(Adapted(), batches_of(), **FIXED, hvp="central_differences", targets=["down"])
    assert report["blocks.0.down"].trace > 0


# ---------------------------------------------------------------------------------------------- architectures


def token_batch(model):
    ids = torch.cat(sequences(6, 6))
    return {"input_ids": ids, "labels": ids if model.config.num_labels != 3 else torch.tensor([2, 0])}


def model_loss(model, batch):
    """The summed loss of transformers' own mean, over the batch's sequences."""
    labels = batch["labels"]
    counted = labels[:, 1:].numel() if labels.dim() == 2 else len(labels)
    return lambda: model(**batch).loss * counted / 2


@pytest.mark.parametrize(
    ("make", "names", "rtol"),
    [
        (llama, ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.mlp.down_proj"], 1e-3),
        (bert, ["layer.0.attention.self.key", "layer.1.output.dense", "pooler.dense"], 1e-6),
        (gpt2, ["h.0.attn.c_attn", "h.1.mlp.c_proj"], 1e-6),
    ],
)
def test_transformers_with_fused_attention(make, names, rtol):
    """sdpa attention is the default of all three; GPT-2's weights are transposed. Llama computes in fp32 in parts."""
    model = make()
    assert model.config._attn_implementation == "sdpa"
    batch = token_batch(model)
    report, found = diagonals(model, [batch], **FIXED, targets=names)
    expected = {name: expected_of(model, model_loss(model, batch), name, 6).clamp(min=0) for name in found}
    assert_close(found, expected, rtol=rtol)
    assert all(found[name].shape == report[name].shape for name in report)


def test_an_encoder_decoder():
    model, ids = bart(), sequences(4, 4)
    batch = {"input_ids": torch.cat(ids), "labels": torch.cat(ids)}
    report = calibrate(model, [batch], **FIXED, targets=["q_proj", "fc2"])
    assert all(matrix.trace > 0 for matrix in report.matrices.values())


@pytest.mark.filterwarnings("ignore:the head .* looks newly initialised", "ignore:.*stack the weights of experts")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_familys_double_backward_loses_a_part(family):
    """A term that it lost would show beside central differences, which also see the kinks of OPT's ReLUs."""
    from tests.test_families import batch_of, build

    torch.manual_seed(0)
    model = build(family)
    batch = batch_of(model, [0, 1, 2])
    settings = {**FIXED, "probes": 2, "min_probes": 2}
    if family.startswith("OPT"):
        for layer in model.model.decoder.layers:
            layer.activation_fn = nn.GELU()
    report, exact = diagonals(model, [batch], **settings)
    _, found = diagonals(model, [batch], **settings, hvp="central_differences")
    error = torch.cat([(found[name] - exact[name]).flatten() for name in exact]).norm()
    assert float(error / torch.cat([value.flatten() for value in exact.values()]).norm()) < 2e-3
    assert all(matrix.trace > 0 for matrix in report.matrices.values())


@pytest.mark.parametrize("make", [bert, gpt2])
def test_central_differences_agree_with_double_backward_in_fp32(make):
    """Over all matrices together. Rounding and the third derivative leave some 5e-5 of a product's norm."""
    torch.manual_seed(0)
    model = make().float()
    batch = token_batch(model)
    _, exact = diagonals(model, [batch], **FIXED)
    _, found = diagonals(model, [batch], **FIXED, hvp="central_differences")
    error = torch.cat([(found[name] - exact[name]).flatten() for name in exact]).norm()
    assert float(error / torch.cat([value.flatten() for value in exact.values()]).norm()) <= 5e-5


@pytest.mark.parametrize(
    ("hvp", "dtype", "tolerance"),
    [
        ("double_backward", torch.bfloat16, 0.03),
        ("double_backward", torch.float16, 0.004),
        ("central_differences", torch.bfloat16, 0.08),
        ("central_differences", torch.float16, 0.03),
    ],
)
def test_products_of_half_precision_weights_are_summed_in_fp32(hvp, dtype, tolerance):
    torch.manual_seed(0)
    model = bert().to(dtype)
    batch = token_batch(model)
    _, found = diagonals(model, [batch], **FIXED, hvp=hvp)
    _, exact = diagonals(model.float(), [batch], **FIXED)
    assert all(diagonal.dtype == torch.float32 for diagonal in found.values())
    errors = [float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact]
    assert statistics.median(errors) < tolerance
    assert max(errors) < 3 * tolerance


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_probes": 1}, "min_probes=1: it must be at least 2 and at most probes=64"),
        ({"min_probes": 9, "probes": 8}, "min_probes=9: .* at most probes=8"),
        ({"tolerance": -0.1}, "tolerance must be 0 or a positive number"),
        ({"tolerance": float("nan")}, "tolerance must be"),
        ({"hvp": "forward"}, "choose one of double_backward, central_differences"),
        ({"labels": "model"}, "use 'fisher' for labels='model'"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(Net(), batches_of(), **{"estimator": "hutchinson", **arguments})


def test_products_that_overflow_name_the_module():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model.forward = lambda x: model[0](x)
    data = [{"x": torch.full((2, 3), 1e25)}]
    with pytest.raises(NonFiniteError, match=r"Hessian-vector product of module '0' .* bfloat16 or float32"):
        calibrate(model, data, **FIXED, targets=["0"], loss_fn=lambda out, batch: out.cos().sum())


def test_data_without_labels():
    batch = {key: value for key, value in batches_of()[0].items() if key != "labels"}
    with pytest.raises(CalibrationError, match="no labels"):
        calibrate(Net(), [batch], **FIXED)


def test_progress_is_shown_for_the_matrices(capsys):
    calibrate(Net(), batches_of(), **FIXED, targets=["up"])
    assert "2/2" in capsys.readouterr().err
    calibrate(Net(), batches_of(), **FIXED, targets=["up"], progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    torch.manual_seed(0)
    model = bert().double()
    batch = token_batch(model)
    _, expected = diagonals(model, [batch], **FIXED)
    found, again = (diagonals(model.cuda(), [batch], **FIXED)[1] for _ in range(2))
    assert_close({name: value.cpu() for name, value in found.items()}, expected, rtol=1e-6)
    assert all(torch.equal(found[name], again[name]) for name in found)
