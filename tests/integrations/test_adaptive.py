"""PEFT's AdaLoRA and EVA as comparisons run them: budgets, scales, and what PEFT itself would do."""

import pytest
import torch

pytest.importorskip("peft")

from sensilora.allocation import allocate
from sensilora.data import Row
from sensilora.errors import DataError, PlanError
from sensilora.integrations.adaptive import AdaLoRA, eva, eva_start
from sensilora.integrations.transformers import classification_batches, load_sequence_classifier, load_tokenizer
from sensilora.plan import RankPlan
from sensilora.sensitivity.calibrate import calibrate
from sensilora.targets import matrix_shape
from tests import tiny_models

STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.bert(tmp_path_factory.mktemp("adaptive") / "model")


@pytest.fixture(scope="module")
def batches(folder):
    rows = [Row((text,), label) for text, label in tiny_models.sentences(48)]
    return classification_batches(load_tokenizer(folder), rows, labels=[0, 1], batch_size=16)


@pytest.fixture
def model(folder):
    torch.manual_seed(0)
    return load_sequence_classifier(folder, labels=["0", "1"])


@pytest.fixture(scope="module")
def plan(folder, batches):
    loaded = load_sequence_classifier(folder, labels=["0", "1"])
    return allocate(calibrate(loaded, batches, progress=False), average_rank=4, scaling=2.0)


def trained(model, plan, batches, steps=STEPS):
    torch.manual_seed(0)
    method = AdaLoRA(model, plan, steps=steps)
    optimizer = torch.optim.AdamW([p for p in method.model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        (method.model(**batches[step % len(batches)]).logits.square().mean() + method.penalty()).backward()
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    return method


def layers(method):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in method.model.named_modules()
        if hasattr(module, "lora_E") and hasattr(module, "base_layer")
    }


def test_adalora_ends_with_the_plans_parameters_and_its_scale(model, plan, batches):
    method = trained(model, plan, batches)
    found = layers(method)
    assert found.keys() == plan.matrices.keys()
    largest = max(sum(entry.shape) + 1 for entry in plan.matrices.values())
    assert plan.parameters - 2 * largest < method.parameters() <= plan.parameters
    assert method.initial_parameters == sum(
        p.numel() for name, p in method.model.named_parameters() if "lora_" in name and p.requires_grad
    )
    assert len(set(method.ranks().values())) > 1
    for name, layer in found.items():
        assert layer.scaling["default"] / layer.ranknum["default"].item() == pytest.approx(2.0)
        kept = int((layer.lora_E["default"] != 0).sum())
        assert kept == method.ranks()[name], name


def test_the_penalty_is_the_one_that_peft_adds(model, plan, batches):
    method = AdaLoRA(model, plan, steps=STEPS)
    batch = batches[0]
    method.model.eval()
    outputs = method.model.base_model(**batch)
    plain = torch.nn.functional.cross_entropy(outputs.logits, batch["labels"])
    torch.testing.assert_close(method.penalty(), outputs.loss - plain, rtol=1e-4, atol=1e-6)


def test_solving_for_the_budget_changes_nothing(model, plan, batches):
    method = AdaLoRA(model, plan, steps=STEPS)
    for step in range(3):
        (method.model(**batches[0]).logits.sum() + method.penalty()).backward()
        with torch.no_grad():
            for layer in layers(method).values():
                layer.lora_E["default"].normal_()
        method.after_step(step)
    before = {name: layer.lora_E["default"].detach().clone() for name, layer in layers(method).items()}
    method._affordable()
    assert all(torch.equal(before[name], layer.lora_E["default"]) for name, layer in layers(method).items())


def test_adalora_needs_some_steps_and_one_scale(model, plan):
    with pytest.raises(PlanError, match="3 are too few; train for at least 4"):
        AdaLoRA(model, plan, steps=3)
    by_root = plan.model_copy(update={"scaling": plan.scaling.model_copy(update={"rule": "rslora"})})
    with pytest.raises(PlanError, match="scale depends on the rank"):
        AdaLoRA(model, by_root, steps=STEPS)


def test_eva_has_the_plans_budget_and_begins_with_principal_directions(model, plan, batches):
    found = eva(model, batches, plan)
    assert found.keys() == plan.matrices.keys()
    costs = {name: sum(entry.shape) for name, entry in plan.matrices.items()}
    parameters = sum(costs[name] * len(A) for name, A in found.items())
    assert 0.9 * plan.parameters < parameters <= plan.parameters
    assert len({len(A) for A in found.values()}) > 1
    assert max(len(A) for A in found.values()) <= 8
    name = "bert.encoder.layer.0.attention.self.query"
    A = found[name]
    torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-4)
    # The variance that they hold, against the best that as many directions can.
    inputs = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    model(**{key: value for key, value in batches[0].items() if key != "labels"})
    hook.remove()
    x = inputs[0][batches[0]["attention_mask"].bool()]
    x = x - x.mean(0)
    best = torch.linalg.svdvals(x)[: len(A)].square().sum()
    assert (x @ A.T).square().sum() > 0.9 * best


def test_eva_starts_have_the_ranks_that_are_given(model, plan, batches):
    ranks = {name: 1 + place % 3 for place, name in enumerate(plan.matrices)} | {next(iter(plan.matrices)): 0}
    found = eva_start(model, batches, ranks)
    assert {name: len(A) for name, A in found.items()} == {name: rank for name, rank in ranks.items() if rank}
    assert all(A.shape[1] == matrix_shape(model.get_submodule(name))[1] for name, A in found.items())


def test_eva_needs_as_many_inputs_as_directions(model, plan, batches):
    # The pooler has one input a sequence.
    few = [{key: value[:3] for key, value in batch.items()} for batch in batches]
    with pytest.raises(DataError, match=r"EVA seeks \d+ directions for .*, and a batch has \d+ inputs of it"):
        eva(model, few, plan)


def test_eva_says_where_the_budget_is_too_small(model, plan, batches):
    shapes = {name: entry.shape for name, entry in plan.matrices.items()}
    small = RankPlan.uniform(shapes, 1).with_ranks({next(iter(shapes)): 0})
    with pytest.raises(PlanError, match="EVA's ranks cost more"):
        eva(model, batches, small)
