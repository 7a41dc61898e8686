"""Experts stacked in one parameter, against autograd on that parameter, one sequence at a time."""

import contextlib
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sensilora.errors import CalibrationError, NonFiniteError, TargetError
from sensilora.sensitivity import Diagonals, calibrate
from sensilora.sensitivity.batches import Rows
from sensilora.sensitivity.experts import find_expert_stacks, route
from sensilora.sensitivity.report import SensitivityReport
from tests.sensitivity.oracles import assert_close, diagonals, pad, sequences

transformers = pytest.importorskip("transformers")

from tests.tiny_models import family_model  # noqa: E402 (imports transformers)

LENGTHS = (5, 3, 7, 1)
MODES = ["per_sequence", "per_position", "per_loss_term"]


class Experts(nn.Module):
    """As transformers holds and runs them, and the ways in which its models differ.

    `matmul`: x @ W with (in, out) weights, as GPT-OSS. `taken`: how an expert gets its rows. `idle`: whether an
    expert without rows runs on none.
    """

    def __init__(self, experts, width, *, matmul=False, taken="index", idle=False):
        super().__init__()
        shapes = [(experts, 2 * width, width), (experts, width, width)]
        if matmul:
            shapes = [(experts, columns, rows) for experts, rows, columns in shapes]
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape) * 0.5) for shape in shapes)
        self.matmul, self.taken, self.idle = matmul, taken, idle

    def apply_to(self, x, weight):
        return x @ weight if self.matmul else F.linear(x, weight)

    def forward(self, hidden, chosen, weights):
        rows = hidden.reshape(-1, hidden.shape[-1])
        out = torch.zeros_like(rows)
        for expert in range(len(self.gate_up_proj)):
            token, place = torch.where(chosen == expert)
            if not len(token) and not self.idle:
                continue
            token, place = token.flip(0), place.flip(0)  # no order may be relied on
            if self.taken == "index":
                x = rows[token]
            elif self.taken == "select":
                x = torch.index_select(rows, 0, token)
            elif self.taken == "mask":
                x, (token, place) = rows[(chosen == expert).any(1)], torch.where(chosen == expert)
            else:
                x = rows[token] * 1.0
            gate, up = self.apply_to(x, self.gate_up_proj[torch.tensor(expert)]).chunk(2, dim=-1)
            y = self.apply_to(gate.tanh() * up, self.down_proj[expert])
            out.index_add_(0, token, y * weights[token, place, None])
        return out.view_as(hidden)


class Mixture(nn.Module):
    """Embedding, mixing over positions, `depth` mixtures of experts, and a head for every position."""

    def __init__(self, *, experts=3, width=4, depth=1, use_reentrant=None, repeat=1, flat=True, **options):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, width), nn.Linear(width, width), nn.Linear(width, 20)
        self.routers = nn.ModuleList(nn.Linear(width, experts) for _ in range(depth))
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": Experts(experts, width, **options)}) for _ in range(depth)
        )
        self.use_reentrant, self.repeat, self.flat = use_reentrant, repeat, flat

    def get_input_embeddings(self):
        return self.embed

    def layer(self, index, hidden, mask):
        mixed = (hidden * mask.unsqueeze(-1)).cumsum(1)  # each position sees those before it
        hidden = hidden + self.mix(mixed).tanh()
        scores = self.routers[index](hidden).flatten(0, 1).softmax(-1)
        weights, chosen = scores.topk(2, dim=-1)
        rows = hidden.flatten(0, 1) if self.flat else hidden
        return hidden + self.layers[index].experts(rows, chosen, weights).view_as(hidden)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        mask = torch.ones_like(hidden[..., 0]) if attention_mask is None else attention_mask.to(hidden.dtype)
        for index in range(len(self.layers)):
            for _ in range(self.repeat):
                if self.use_reentrant is None:
                    hidden = self.layer(index, hidden, mask)
                else:
                    hidden = checkpoint(self.layer, index, hidden, mask, use_reentrant=self.use_reentrant)
        return self.head(hidden)


def token_batch(ids, labels, **options):
    padded, mask = pad(ids, **options)
    return {"input_ids": padded, "attention_mask": mask, "labels": pad(labels, value=-100, **options)[0]}


def stacks_of(model):
    return {stack.name: stack.parameter for held in find_expert_stacks(model).values() for stack in held}


def is_transposed(model, name):
    holder = model.get_submodule(name.rpartition(".")[0])
    return getattr(holder, "matmul", False) or getattr(holder, "is_transposed", False)


def by_expert(model, values):
    """Numbers the shape of each stack as one (out, in) matrix an expert."""
    return {
        f"{name}.{expert}": (value.T if is_transposed(model, name) else value).double()
        for name, stack in values.items()
        for expert, value in enumerate(stack)
    }


def squared_gradients(model, losses):
    """Sum over `losses` (functions of no argument) of each stack's squared gradient, by autograd on the parameter."""
    stacks = stacks_of(model)
    total = {name: torch.zeros_like(parameter) for name, parameter in stacks.items()}
    for parameter in stacks.values():
        parameter.requires_grad_(True)
    for loss_of in losses:
        for name, grad in zip(stacks, torch.autograd.grad(loss_of(), list(stacks.values())), strict=True):
            total[name] += grad.square()
    return by_expert(model, total)


def position_losses(model, ids, labels, *, shift=False):
    """One function for each label of each sequence."""

    def loss_of(n, t):
        return lambda: F.cross_entropy(model(ids[n])[0, t - shift], labels[n][0, t], reduction="sum")

    return [[loss_of(n, t) for t in range(shift, ids[n].shape[1])] for n in range(len(ids))]


def summed(losses):
    return lambda: sum(loss() for loss in losses)


def experts_alone(found):
    return {name: diagonal for name, diagonal in found.items() if ".experts." in name}


def measured(model, batches, **arguments):
    """(report, diagonals of the experts alone); every expert's own, however few tokens it saw."""
    report, found = diagonals(model, batches, experts=True, min_expert_tokens=1, **arguments)
    return report, experts_alone(found)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("taken", ["index", "select", "mask"])
@pytest.mark.parametrize("matmul", [False, True])
def test_fisher_is_the_squared_gradient_of_each_sequence(matmul, taken, flat):
    model = Mixture(depth=2, matmul=matmul, taken=taken, flat=flat).double()
    ids, labels = sequences(*LENGTHS), sequences(*LENGTHS, seed=1)
    losses = position_losses(model, ids, labels)
    expected = squared_gradients(model, [summed(of_sequence) for of_sequence in losses])
    for width, left in ((0, False), (9, True)):
        batches = [token_batch(ids[:3], labels[:3], to=width, left=left), token_batch(ids[3:], labels[3:])]
        report, found = measured(model, batches, estimator="fisher")
        assert_close(found, {name: value / 4 for name, value in expected.items()})
    assert report["layers.0.experts.gate_up_proj.0"].shape == (8, 4)
    assert report["layers.0.experts.down_proj.0"].shape == (4, 4)
    for layer in (0, 1):
        for part in ("gate_up_proj", "down_proj"):
            tokens = [report[f"layers.{layer}.experts.{part}.{expert}"].tokens for expert in range(3)]
            assert sum(tokens) == 2 * sum(LENGTHS)  # each token reaches two experts


@pytest.mark.parametrize("labels_from", ["data", "model"])
@pytest.mark.parametrize("mode", MODES)
def test_the_modes_of_fisher(mode, labels_from):
    """One batch of all sequences gives what the sequences give one by one, and what autograd gives."""
    model, ids, labels = Mixture().double(), sequences(*LENGTHS), sequences(*LENGTHS, seed=1)
    if labels_from == "model":
        with torch.no_grad():
            model.head.bias[4] = 20.0  # so that the label that will be drawn is known
        labels = [torch.full_like(x, 4) for x in ids]
    arguments = {"estimator": "fisher", "mode": mode, "labels": labels_from}
    _, together = measured(model, [token_batch(ids, labels)], **arguments)
    _, apart = measured(model, [token_batch([x], [y]) for x, y in zip(ids, labels, strict=True)], **arguments)
    assert_close(together, apart)
    if mode != "per_position":
        losses = position_losses(model, ids, labels)
        if mode == "per_sequence":
            losses = [[summed(of_sequence)] for of_sequence in losses]
        expected = squared_gradients(model, [loss for of_sequence in losses for loss in of_sequence])
        assert_close(together, {name: value / 4 for name, value in expected.items()})


def test_per_position_of_single_tokens_is_autograds():
    model, ids, labels = Mixture().double(), sequences(*[1] * 6), sequences(*[1] * 6, seed=1)
    expected = squared_gradients(model, [loss for (loss,) in position_losses(model, ids, labels)])
    _, found = measured(model, [token_batch(ids, labels)], estimator="fisher", mode="per_position")
    assert_close(found, {name: value / 6 for name, value in expected.items()})


@pytest.mark.parametrize("padded", [False, True])
def test_activation_is_the_mean_square_of_what_reaches_each_expert(padded):
    model, ids = Mixture().double(), sequences(6, 6) if not padded else sequences(*LENGTHS)
    experts, seen = model.layers[0].experts, []
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    for x in ids:
        model(x)
    handle.remove()
    expected = {}
    tokens = sum(x.shape[1] for x in ids)
    for expert in range(3):
        hidden = torch.cat([rows[(chosen == expert).any(1)] for rows, chosen, _ in seen]).detach()
        gate, up = F.linear(hidden, experts.gate_up_proj[expert]).chunk(2, -1)
        expected[f"layers.0.experts.gate_up_proj.{expert}"] = hidden.square().sum(0) / tokens
        expected[f"layers.0.experts.down_proj.{expert}"] = (gate.tanh() * up).square().sum(0).detach() / tokens
    batch = token_batch(ids, ids) if padded else {"input_ids": torch.cat(ids)}
    report, found = measured(model, [batch])
    assert_close(found, expected)
    assert sum(report[name].tokens for name in expected) == 2 * 2 * tokens


def test_the_inverse_variant_serves_experts():
    model, ids = Mixture().double(), sequences(*LENGTHS)
    report, found = measured(model, [token_batch(ids, ids)], variant="inverse", block_size=2)
    assert all(value.isfinite().all() for value in found.values())
    assert report["layers.0.experts.down_proj.0"].damping is not None


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_repeats_and_frozen_weights(mode, use_reentrant, repeat, frozen):
    """A module that runs twice adds its gradients before they are squared, under either kind of checkpoint."""
    plain, model = Mixture(repeat=repeat).double(), Mixture(repeat=repeat, use_reentrant=use_reentrant).double()
    plain.load_state_dict(model.state_dict())
    ids, labels = sequences(*LENGTHS), sequences(*LENGTHS, seed=1)
    arguments = {"estimator": "fisher", "mode": mode}
    if mode == "per_sequence":
        losses = position_losses(plain, ids, labels)
        expected = squared_gradients(plain, [summed(of_sequence) for of_sequence in losses])
        expected = {name: value / 4 for name, value in expected.items()}
    else:
        _, expected = measured(plain, [token_batch(ids, labels)], **arguments)
    model.requires_grad_(not frozen)
    report, found = measured(model, [token_batch(ids, labels)], **arguments)
    assert_close(found, expected)
    assert {report[name].calls for name in found} == {repeat}
    assert {parameter.requires_grad for parameter in model.parameters()} == {not frozen}


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_several_draws(use_reentrant):
    plain, model = Mixture().double(), Mixture(use_reentrant=use_reentrant).double()
    plain.load_state_dict(model.state_dict())
    batch = token_batch(sequences(*LENGTHS), sequences(*LENGTHS))
    arguments = {"estimator": "fisher", "labels": "model", "seed": 3}
    single = [measured(plain, [batch], draws=draws, **arguments)[1] for draws in (1, 3)]
    _, found = measured(model, [batch], draws=3, **arguments)
    assert_close(found, single[1], rtol=1e-13)
    name = "layers.0.experts.down_proj.0"
    assert not torch.allclose(single[0][name], single[1][name])


@pytest.mark.parametrize(
    ("arguments", "budget"),
    [({}, 100), ({"estimator": "fisher"}, 640), ({"estimator": "fisher", "labels": "model"}, 640)],
)
def test_passes_under_a_memory_budget_change_nothing(arguments, budget):
    model, ids = Mixture(depth=2), sequences(*LENGTHS)
    batches = [token_batch(ids[:2], ids[:2]), token_batch(ids[2:], ids[2:])]
    arguments = {"experts": True, "min_expert_tokens": 3, "progress": False, **arguments}
    expected = calibrate(model, batches, **arguments)
    found = calibrate(model, batches, memory_budget=budget, **arguments)
    assert found.matrices == expected.matrices
    assert len(found.passes) > 1


@pytest.mark.parametrize("arguments", [{}, {"estimator": "fisher", "labels": "model", "mode": "per_loss_term"}])
def test_an_interrupted_run_goes_on(arguments, tmp_path):
    """Two of four batches are in the sums that were saved."""

    class Interrupted(list):
        def __iter__(self):
            yield from self[:2]
            raise KeyboardInterrupt

    model, ids = Mixture(depth=2, matmul=True), sequences(*LENGTHS)
    batches = [token_batch([x], [x]) for x in ids]
    arguments = {"experts": True, "min_expert_tokens": 3, "progress": False, **arguments}
    expected = calibrate(model, batches, **arguments)
    arguments |= {"checkpoint": tmp_path / "state", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, Interrupted(batches), **arguments)
    assert list((tmp_path / "state").iterdir())
    assert calibrate(model, batches, **arguments).matrices == expected.matrices


def test_tied_stacks_are_one():
    model, ids = Mixture(depth=2).double(), sequences(*LENGTHS)
    first, second = (layer.experts for layer in model.layers)
    second.down_proj = first.down_proj
    labels = sequences(*LENGTHS, seed=1)
    losses = position_losses(model, ids, labels)
    expected = squared_gradients(model, [summed(of_sequence) for of_sequence in losses])
    report, found = measured(model, [token_batch(ids, labels)], estimator="fisher")
    expected = {name: value / 4 for name, value in expected.items() if not name.startswith("layers.1.experts.down")}
    assert_close(found, expected)
    assert report["layers.0.experts.down_proj.1"].aliases == ("layers.1.experts.down_proj.1",)
    assert report["layers.0.experts.down_proj.1"].calls == 2


# --- transformers' models

MODELS = {
    "MixtralForCausalLM": {},
    "Qwen3MoeForCausalLM": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "DeepseekV3ForCausalLM": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 2,
    },
    "GptOssForCausalLM": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8,
        "layer_types": ["full_attention", "full_attention"],
    },
}  # fmt: skip
SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip


def mixture(name, implementation="eager"):
    if name == "MixtralForCausalLM":
        model = family_model(name, initializer_range=0.3)
    else:
        torch.manual_seed(1)
        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**{**SIZES, **MODELS[name]}))
    model.set_experts_implementation(implementation)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["per_sequence", "per_loss_term"])
def test_transformers_mixtures(name, mode):
    model, ids = mixture(name), [x + 4 for x in sequences(6, 3, 5)]
    losses = position_losses(lambda x: model(x).logits, ids, ids, shift=True)
    if mode == "per_sequence":
        losses = [[summed(of_sequence)] for of_sequence in losses]
    expected = squared_gradients(model, [loss for of_sequence in losses for loss in of_sequence])
    report, found = measured(model, [token_batch(ids, ids)], estimator="fisher", mode=mode)
    reached = {name: value / 3 for name, value in expected.items() if name in found}
    for expert, value in reached.items():
        torch.testing.assert_close(found[expert].double(), value, rtol=0, atol=2e-5 * float(value.max()))
        assert report[expert].shape == tuple(value.shape)
    assert all(float(value.max()) == 0 for name, value in expected.items() if name not in found)
    # Most experts are reached, by two stacks of four in each layer that has experts.
    assert len(reached) > 0.7 * len(expected) >= 0.7 * 8


def test_llama4_is_refused():
    """Its experts all run at once, on a copy of the input for each."""
    torch.manual_seed(1)
    options = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 8}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**options)).eval()
    assert len(stacks_of(model)) == 4
    ids = sequences(5, 4)
    for batch in (token_batch(ids[:1], ids[:1]), token_batch(ids, ids)):
        with pytest.raises(CalibrationError, match=r"'model\.layers\.0\.feed_forward\.experts'"):
            calibrate(model, [batch], experts=True, progress=False)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("error", [False, True])
def test_the_experts_implementation_is_as_it_was(implementation, error):
    model = mixture("MixtralForCausalLM", implementation)
    ids = torch.randint(4, 50, (2, 8))
    expected = calibrate(
        mixture("MixtralForCausalLM"), [{"input_ids": ids}], experts=True, min_expert_tokens=1, progress=False
    )
    batches = [{"input_ids": ids}, *([{"input_ids": "no tensor"}] if error else [])]
    with pytest.raises(CalibrationError) if error else contextlib.nullcontext():
        found = calibrate(model, batches, experts=True, min_expert_tokens=1, progress=False)
        assert found.matrices == expected.matrices
    assert model.config._experts_implementation == implementation
    assert "forward" not in vars(model.model.layers[0].mlp.experts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["activation", "fisher"])
def test_half_precision(dtype, estimator):
    model = Mixture(width=8)
    batch = token_batch(sequences(*LENGTHS), sequences(*LENGTHS, seed=1))
    arguments = {"estimator": estimator, "experts": True, "min_expert_tokens": 1, "progress": False}
    high = calibrate(model, [batch], **arguments)
    low = calibrate(model.to(dtype), [batch], **arguments)
    for part in ("gate_up_proj", "down_proj"):
        names = [f"layers.0.experts.{part}.{expert}" for expert in range(3)]
        assert sum(low[name].trace for name in names) == pytest.approx(
            sum(high[name].trace for name in names), rel=0.1
        )


# --- experts that see little


def few_tokens(**options):
    """A mixture in which expert 0 of 4 is never chosen, and 3 seldom; every expert's tokens are in the report."""
    model = Mixture(experts=4, **options).double()
    with torch.no_grad():
        model.routers[0].bias += torch.tensor([-50.0, 1.0, 1.0, 0.0])
    ids = sequences(9, 8, 7)
    return model, token_batch(ids, sequences(9, 8, 7, seed=1))


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("estimator", ["activation", "fisher"])
def test_an_expert_that_sees_too_little_takes_its_siblings_mean(tmp_path, estimator, idle):
    model, batch = few_tokens(idle=idle)
    arguments = {"estimator": estimator, "experts": True, "progress": False}
    with pytest.warns(UserWarning, match=r"2 of 8 expert matrices .*min_expert_tokens=1 .*\.0 saw 0\).*siblings"):
        own = calibrate(model, [batch], min_expert_tokens=1, **arguments)
    name = "layers.0.experts.{}.{}".format
    tokens = [own[name("down_proj", expert)].tokens for expert in range(4)]
    assert tokens[0] == 0
    assert 0 < tokens[3] < min(tokens[1:3]), "the test needs a seldom chosen expert"
    with pytest.warns(UserWarning, match="4 of 8 expert matrices saw fewer than min_expert_tokens") as caught:
        report = calibrate(model, [batch], min_expert_tokens=tokens[3] + 1, keep_diagonals=tmp_path, **arguments)
    assert len(caught) == 1
    assert set(Diagonals(tmp_path)) == {name for name in report if not report[name].from_siblings}
    for part in ("gate_up_proj", "down_proj"):
        siblings = [own[name(part, expert)] for expert in (1, 2)]
        for expert in (0, 3):
            filled = report[name(part, expert)]
            assert filled.from_siblings
            assert filled.expert_of == f"layers.0.experts.{part}"
            assert filled.tokens == tokens[expert]
            assert filled.trace == pytest.approx(sum(sibling.trace for sibling in siblings) / 2)
            assert filled.topk_mean == pytest.approx(sum(sibling.topk_mean for sibling in siblings) / 2)
            assert filled.effective_rank == round(sum(sibling.effective_rank for sibling in siblings) / 2)
            assert filled.shape == siblings[0].shape
        assert [report[name(part, expert)] for expert in (1, 2)] == siblings
        assert not any(sibling.from_siblings for sibling in siblings)
    assert report.min_expert_tokens == tokens[3] + 1


def test_no_expert_that_sees_enough_is_an_error():
    model, batch = few_tokens()
    with pytest.raises(CalibrationError, match=r"no expert of layers\.0\.experts\.gate_up_proj saw .*=1000 tokens"):
        calibrate(model, [batch], experts=True, min_expert_tokens=1000, progress=False)


def test_the_default_minimum_warns_of_small_data():
    model, batch = few_tokens()
    with pytest.raises(CalibrationError, match="min_expert_tokens=32"):
        calibrate(model, [batch], experts=True, progress=False)


def test_a_report_with_filled_experts_is_read_back(tmp_path):
    model, batch = few_tokens()
    with pytest.warns(UserWarning, match="expert matrices saw fewer"):
        report = calibrate(model, [batch], variant="inverse", experts=True, min_expert_tokens=1, progress=False)
    assert SensitivityReport.load(report.save(tmp_path / "report.json")) == report
    parts = [f"layers.0.experts.{part}.{expert}" for part in ("gate_up_proj", "down_proj") for expert in range(4)]
    assert list(report) == ["mix", "head", "routers.0", *parts]
    assert (report[parts[0]].calls, report[parts[0]].damping) == (0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"from_siblings": True}, "mix is no expert of a stack .* so from_siblings cannot be true"),
        ({"calls": 0}, "calls of mix is 0, so it has no sensitivity of its own"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(change, message):
    model, batch = few_tokens()
    report = calibrate(model, [batch], targets=["mix"], progress=False)
    with pytest.raises(ValueError, match=message):
        replace(report, matrices={**report.matrices, "mix": replace(report["mix"], **change)})


# --- what is asked for and what is refused


def test_experts_are_measured_only_if_asked():
    model = mixture("MixtralForCausalLM", "grouped_mm")
    batch = {"input_ids": torch.randint(4, 50, (2, 20))}
    with pytest.warns(UserWarning, match="4 parameters stack the weights of experts .* only with experts=True"):
        plain = calibrate(model, [batch], progress=False)
    assert plain.min_expert_tokens is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = calibrate(model, [batch], experts=True, min_expert_tokens=1, progress=False)
        only = calibrate(model, [batch], targets=["q_proj"], experts=True, min_expert_tokens=1, progress=False)
    # Grouped kernels sum in another order.
    assert [name for name in both if not both[name].expert_of] == list(plain)
    assert sum(matrix.expert_of is not None for matrix in both.matrices.values()) == 2 * 2 * 4
    assert sum("experts" not in name for name in only) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": True, "min_expert_tokens": 0}, "min_expert_tokens must be at least 1, not 0"),
        (
            {"experts": True, "estimator": "hutchinson"},
            "experts=True is for the estimators 'activation' and 'fisher'",
        ),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(Mixture(), [token_batch(sequences(4), sequences(4))], progress=False, **arguments)


def test_experts_in_a_form_that_is_not_known_are_warned_of():
    config = transformers.JetMoeConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=8,
        vocab_size=24,
        num_local_experts=4,
    )
    model = transformers.JetMoeForCausalLM(config)
    batch = {"input_ids": torch.randint(24, (2, 5))}
    with pytest.warns(
        UserWarning, match=r"2 weights of experts \(model\.layers\.0\.mlp\..* in a form that is not known"
    ):
        report = calibrate(model, [batch], progress=False)
    assert len(report) > 0


def test_a_model_without_stacks_is_an_error():
    with pytest.raises(TargetError, match="Sequential has no parameter that stacks experts"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), [{"input": torch.ones(1, 2)}], experts=True, progress=False)


def test_packed_experts_are_named():
    model = Mixture()
    model.layers[0].experts.down_proj = nn.Parameter(torch.zeros(3, 4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"layers\.0\.experts\.down_proj are packed \(torch\.int8\)"):
        find_expert_stacks(model)


def test_rows_that_cannot_be_attributed_are_an_error():
    model = Mixture(taken="computed")
    with pytest.raises(CalibrationError, match=r"'layers\.0\.experts\.gate_up_proj\.0' cannot be told.*by an index"):
        calibrate(model, [token_batch(sequences(4, 3), sequences(4, 3))], experts=True, progress=False)


def test_rows_that_are_lost_between_an_experts_matrices_are_an_error():
    class Dropping(Experts):
        def forward(self, hidden, chosen, weights):
            gate, _ = F.linear(hidden[chosen[:, 0]], self.gate_up_proj[0]).chunk(2, -1)
            return hidden + F.linear(gate[1:], self.down_proj[0]).sum(0)

    model = Mixture()
    model.layers[0]["experts"] = Dropping(3, 4)
    with pytest.raises(CalibrationError, match=r"'layers\.0\.experts\.down_proj\.0' cannot be told"):
        calibrate(model, [token_batch(sequences(4, 3), sequences(4, 3))], experts=True, progress=False)


@pytest.mark.parametrize("use", ["bmm", "einsum", "part", "left"])
def test_a_use_that_would_go_unwatched_is_an_error(use):
    class Other(Experts):
        def forward(self, hidden, chosen, weights):
            out = super().forward(hidden, chosen, weights)
            if use == "bmm":
                return out + torch.bmm(hidden.expand(3, -1, -1), self.down_proj).sum(0)
            if use == "einsum":
                return out + torch.einsum("ti,eoi->to", hidden, self.down_proj)
            if use == "part":
                return out + F.linear(hidden, self.gate_up_proj[0, :4])
            return out + (self.down_proj[1] @ hidden.T).T

    model = Mixture()
    model.layers[0]["experts"] = Other(3, 4)
    with pytest.raises(CalibrationError, match=r"'layers\.0\.experts' uses 'layers.*' in \w+, and not one expert's"):
        calibrate(model, [token_batch(sequences(4, 3), sequences(4, 3))], experts=True, progress=False)


def test_an_expert_may_take_all_rows():
    """As in a mixture that runs every expert on every token."""

    class Dense(Experts):
        def forward(self, hidden, chosen, weights):
            hidden = hidden.view(-1, hidden.shape[-1])
            y = [F.linear(F.linear(hidden, self.gate_up_proj[e])[:, :4].tanh(), self.down_proj[e]) for e in range(3)]
            return sum(y)

    model = Mixture().double()
    model.layers[0]["experts"] = Dense(3, 4).double()
    ids, labels = sequences(*LENGTHS), sequences(*LENGTHS, seed=1)
    losses = position_losses(model, ids, labels)
    expected = squared_gradients(model, [summed(of_sequence) for of_sequence in losses])
    report, found = measured(model, [token_batch(ids, labels)], estimator="fisher")
    assert_close(found, {name: value / 4 for name, value in expected.items()})
    assert report["layers.0.experts.down_proj.2"].tokens == sum(LENGTHS)


def test_non_finite_weights_of_experts_are_named():
    model = Mixture()
    with torch.no_grad():
        model.layers[0].experts.down_proj[1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.0\.experts\.down_proj"):
        calibrate(model, [token_batch(sequences(4), sequences(4))], experts=True, progress=False)


@pytest.mark.parametrize("estimator", ["activation", "fisher"])
def test_values_that_overflow_inside_an_expert_are_an_error(estimator):
    model = Mixture()
    with torch.no_grad():
        model.layers[0].experts.gate_up_proj[:, 4:] *= 1e30
        model.layers[0].experts.down_proj *= 1e30
    with pytest.raises(NonFiniteError, match="is NaN or Inf"):
        calibrate(model, [token_batch(sequences(4), sequences(4))], estimator=estimator, experts=True, progress=False)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    positions=st.lists(st.integers(0, 29), max_size=40),
    seed=st.integers(0, 1000),
    padded=st.booleans(),
)
def test_route_sorts_rows_by_their_sequence(lengths, positions, seed, padded):
    """Against a loop over the rows."""
    width, count = max(lengths), len(lengths)
    total = width * count
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).flatten()
    rows = (
        Rows(torch.tensor(lengths), mask, mask.nonzero().squeeze(1)) if padded else Rows(torch.full((count,), width))
    )
    taken = torch.tensor([position % total for position in positions], dtype=torch.int64)
    x = torch.rand(len(taken), 2, generator=torch.Generator().manual_seed(seed))
    found = route(rows, taken, total)
    groups = [[] for _ in range(count)]
    for row, position in zip(x, taken.tolist(), strict=True):
        if not padded or mask[position]:
            groups[position // width].append(row)
    assert found.lengths.tolist() == [len(group) for group in groups]
    expected = torch.stack([row for group in groups for row in group]) if any(groups) else x[:0]
    assert torch.equal(found.pack(x), expected)
    if padded:
        assert torch.equal(x[found.mask].sort(0).values, expected.sort(0).values)


def test_on_device(device):
    model, ids = Mixture().double(), sequences(*LENGTHS)
    batch = token_batch(ids, sequences(*LENGTHS, seed=1))
    _, expected = measured(model, [batch], estimator="fisher")
    _, found = measured(model.to(device), [batch], estimator="fisher")
    assert_close({name: value.cpu() for name, value in found.items()}, expected)
