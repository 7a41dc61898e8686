"""SensitivityCallback: what it measures, what it logs, and that training does not notice it."""

import copy
import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from sensilora import allocate, calibrate, inject, merge, mixed, unload
from sensilora.errors import CalibrationError, ReportError, TargetError
from sensilora.integrations import transformers as hf
from sensilora.integrations.peft import FusedLinear, fuse
from sensilora.plan import Calibration, RankPlan
from tests import tiny_models
from tests.integrations.peft_versions import transformers_takes_peft

LEARNING_RATE = 0.05  # so high that the order of the matrices moves in two epochs


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


def load(folder, **changes):
    return AutoModelForCausalLM.from_pretrained(folder, **changes)


def rows(count=12, seed=0, length=9):
    ids = torch.randint(4, 24, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def batches():
    made = [torch.utils.data.default_collate(rows(6, seed)) for seed in (1, 2)]
    made[1]["attention_mask"][:3, 6:] = 0
    made[1]["labels"][:3, 6:] = -100
    return made


def report_of(folder, **settings):
    return calibrate(load(folder), batches(), progress=False, **settings)


def trainer_of(model, folder, **settings):
    fields = {
        "output_dir": str(folder), "num_train_epochs": 2, "per_device_train_batch_size": 4, "report_to": "none",
        "learning_rate": LEARNING_RATE, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
        "logging_steps": 1,
    }  # fmt: skip
    return Trainer(model, TrainingArguments(**{**fields, **settings}), train_dataset=rows())


def trained(model, folder, reference, *, data=None, options=None, **settings):
    """The callback (None without a reference) and the Trainer, after training."""
    trainer = trainer_of(model, folder, **settings)
    callback = None
    if reference is not None:
        data = batches() if data is None else data
        callback = hf.SensitivityCallback(reference, data, trainer, **(options or {}))
        trainer.add_callback(callback)
    trainer.train()
    return callback, trainer


def state_of(trainer):
    """All that training has changed, as one dict of tensors."""
    state = {f"weight {name}": tensor.detach() for name, tensor in trainer.model.state_dict().items()}
    for number, slots in trainer.optimizer.state_dict()["state"].items():
        state.update({f"optimiser {number} {key}": torch.as_tensor(value) for key, value in slots.items()})
    return {**state, "rng": torch.random.get_rng_state()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def plain_names(model):
    """Whether the module tree holds no forward of its own that the measurement left behind."""
    return not [name for name, module in model.named_modules() if "forward" in module.__dict__ and name]


def adapted(kind, folder, plan):
    torch.manual_seed(7)
    model = load(folder)
    if kind == "inject":
        return inject(model, plan, dropout=0.1)
    if kind == "inject without groups":
        return inject(model, plan, groups=False)
    if kind == "full":
        return model
    config = plan.to_lora_config(task_type="CAUSAL_LM", lora_dropout=0.1)
    if kind == "add_adapter":
        model.add_adapter(config)
        return model
    model = peft.get_peft_model(model, config)
    return fuse(model) if kind == "fused" else model


def merged(model):
    """A plain model that computes the same."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        module.__dict__.pop("forward", None)  # a Trainer's, which may be of the model that was copied
    if hasattr(model, "merge_and_unload"):
        return model.merge_and_unload()
    if getattr(model, "_hf_peft_config_loaded", False):
        for module in list(model.modules()):
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.merge()
        for name, module in list(model.named_modules()):
            if isinstance(module, peft.tuners.lora.LoraLayer):
                model.set_submodule(name, module.base_layer)
        return model
    return unload(merge(model)) if any("lora_A" in name for name, _ in model.named_parameters()) else model


KINDS = [
    "inject",
    "inject without groups",
    "peft",
    "fused",
    pytest.param("add_adapter", marks=transformers_takes_peft),
    "full",
]


@pytest.mark.parametrize("estimator", ["activation", "fisher"])
@pytest.mark.parametrize("kind", KINDS)
def test_measures_the_plain_model_that_computes_the_same(llama, tmp_path, kind, estimator):
    reference = report_of(llama, estimator=estimator)
    model = adapted(kind, llama, allocate(reference, average_rank=4))
    callback, _ = trained(model, tmp_path, reference)
    assert [(entry.epoch, entry.step) for entry in callback.history] == [(1, 3), (2, 6)]
    last = callback.history[-1]
    expected = calibrate(merged(model), batches(), estimator=estimator, progress=False)
    assert list(last.report) == list(reference)
    for name in reference:
        assert last.report[name].trace == pytest.approx(expected[name].trace, rel=2e-4)
        assert last.report[name].topk_mean == pytest.approx(expected[name].topk_mean, rel=2e-4)
        assert (last.report[name].tokens, last.report[name].calls) == (expected[name].tokens, expected[name].calls)
    # Training moved it, and away from the start.
    assert any(last.report[name].trace != pytest.approx(reference[name].trace, rel=1e-2) for name in reference)
    assert last.kendall_tau == last.report.compare(reference).agreement["fused"].kendall
    assert last.kendall_tau < 1
    assert last.seconds > 0
    assert plain_names(model)
    if kind == "fused":
        assert sum(type(module) is FusedLinear for module in model.modules()) == 14


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bitwise_the_same_with_and_without(llama, tmp_path, kind):
    plan = allocate(report_of(llama), average_rank=4)
    states, losses = [], []
    for reference in (None, plan):
        _, trainer = trained(adapted(kind, llama, plan), tmp_path, reference, gradient_accumulation_steps=2)
        states.append(state_of(trainer))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert same(*states)
    assert losses[0] == losses[1]


class Noisy:
    """Batches whose collator draws from every generator of the host."""

    def __iter__(self):
        for batch in batches():
            random.random(), np.random.rand(), torch.rand(1)
            yield batch


def test_batches_may_draw_random_numbers(llama, tmp_path):
    plan = allocate(report_of(llama), average_rank=4)
    found = []
    for reference in (None, plan):
        _, trainer = trained(adapted("inject", llama, plan), tmp_path, reference, data=Noisy())
        found.append((state_of(trainer), random.getstate(), np.random.get_state()[1].tolist()))
    assert same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_an_iterator_is_read_once_and_serves_all_epochs(llama, tmp_path):
    plan = allocate(report_of(llama), average_rank=4)
    callback, _ = trained(adapted("inject", llama, plan), tmp_path, plan, data=iter(batches()))
    again, _ = trained(adapted("inject", llama, plan), tmp_path, plan)
    assert [entry.report for entry in callback.history] == [entry.report for entry in again.history]


class Recorder(TrainerCallback):
    """A tracker: what reaches it reaches TensorBoard and W&B."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
def test_trackers_see_the_drift_and_miss_nothing_else(llama, tmp_path, strategy):
    plan = allocate(report_of(llama), average_rank=4)
    seen = []
    for reference in (None, plan):
        trainer = trainer_of(adapted("inject", llama, plan), tmp_path, logging_strategy=strategy)
        recorder = Recorder()
        trainer.add_callback(recorder)
        if reference is not None:
            callback = hf.SensitivityCallback(reference, batches(), trainer)
            trainer.add_callback(callback)
        trainer.train()
        seen.append(recorder.seen)
    drift = [(step, logs) for step, logs in seen[1] if "sensitivity/kendall_tau" in logs]
    rest = [(step, logs) for step, logs in seen[1] if "sensitivity/kendall_tau" not in logs]
    assert [(step, sorted(logs)) for step, logs in rest] == [(step, sorted(logs)) for step, logs in seen[0]]
    assert [logs.get("loss") for _, logs in rest] == [logs.get("loss") for _, logs in seen[0]]
    assert drift == [
        (
            entry.step,
            {
                "sensitivity/kendall_tau": entry.kendall_tau,
                "sensitivity/seconds": entry.seconds,
                "epoch": entry.epoch,
            },
        )
        for entry in callback.history
    ]
    logged = [
        entry["sensitivity/kendall_tau"] for entry in trainer.state.log_history if "sensitivity/seconds" in entry
    ]
    assert logged == [entry.kendall_tau for entry in callback.history]


def test_an_undefined_tau_is_not_logged(llama, tmp_path):
    reference = report_of(llama, targets=["layers.0.self_attn.q_proj"])
    callback, trainer = trained(load(llama), tmp_path, reference)
    assert [entry.kendall_tau for entry in callback.history] == [None, None]
    logged = [entry for entry in trainer.state.log_history if "sensitivity/seconds" in entry]
    assert len(logged) == 2
    assert not [entry for entry in logged if "sensitivity/kendall_tau" in entry]


def test_untrained_adapters_leave_the_order_as_it_is(llama, tmp_path):
    reference = report_of(llama)
    plan = allocate(reference, average_rank=4)
    for given in (plan, reference):
        callback, _ = trained(adapted("inject", llama, plan), tmp_path, given, learning_rate=0.0)
        assert [entry.kendall_tau for entry in callback.history] == [1.0, 1.0]
        for name in reference:
            assert callback.history[0].report[name].trace == pytest.approx(reference[name].trace, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "inverse", "block_size": 16, "damping": 0.1},
        {"estimator": "fisher", "mode": "per_position", "labels": "model", "draws": 2, "seed": 5},
        {"estimator": "hutchinson", "probes": 8, "seed": 5, "targets": ["q_proj", "down_proj"]},
        {"k": 0.25, "alpha": 0.5},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_measures_with_the_settings_of_the_reference(llama, tmp_path, settings):
    reference = report_of(llama, **settings)
    plan = allocate(reference, average_rank=4)
    found = []
    for given in (reference, plan):
        callback, _ = trained(adapted("inject", llama, plan), tmp_path, given, learning_rate=0.0, num_train_epochs=1)
        found.append(callback.history[0].report)
    assert found[0] == found[1]
    found = found[0]
    decided = {field.name for field in dataclasses.fields(reference)} - {"matrices", "passes"}
    assert {name: getattr(found, name) for name in decided} == {name: getattr(reference, name) for name in decided}
    for name in reference:
        if (mine := found[name].probes) is None:
            assert found[name].trace == pytest.approx(reference[name].trace, rel=1e-3)
        else:  # drawn by a weight's place among the parameters, which adapters shift
            given = reference[name].probes
            assert abs(mine.trace - given.trace) <= 4 * (mine.standard_error + given.standard_error)


def test_a_plan_carries_the_settings_of_fisher_and_the_weights_of_its_score(llama, tmp_path):
    reference = report_of(llama, estimator="fisher", labels="model", draws=2, seed=9, k=0.25)
    plan = allocate(reference, average_rank=4, weights="equal")
    model = adapted("inject", llama, plan)
    callback, _ = trained(model, tmp_path, plan, options={"memory_budget": "1MB"})
    last = callback.history[-1]
    assert (last.report.labels, last.report.draws, last.report.seed, last.report.k) == ("model", 2, 9, 0.25)
    assert last.kendall_tau == last.report.compare(reference, weights="equal").agreement["fused"].kendall
    assert last.report.compare(plan, weights="equal") == last.report.compare(reference, weights="equal")


def test_experts_and_rank_0_and_tied_weights(tmp_path):
    data = [{"input_ids": torch.arange(48).reshape(6, 8), "labels": torch.arange(48).reshape(6, 8)}]
    model = tiny_models.family_model("MixtralForCausalLM")
    reference = calibrate(model, data, experts=True, min_expert_tokens=1, progress=False)
    plan = allocate(calibrate(model, data, targets=["q_proj", "o_proj"], progress=False), average_rank=4)
    inject(model, plan.with_ranks({"model.layers.0.self_attn.q_proj": 0}))
    trainer = trainer_of(model, tmp_path, num_train_epochs=1)
    callback = hf.SensitivityCallback(reference, data, trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert list(callback.history[0].report) == list(reference)
    model = tiny_models.family_model("LlamaForCausalLM")
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    reference = calibrate(model, data, estimator="fisher", progress=False)
    assert reference["model.layers.0.mlp.gate_proj"].aliases == ("model.layers.1.mlp.gate_proj",)
    inject(model, allocate(reference, average_rank=4))
    callback, _ = trained(model, tmp_path, reference, data=data, num_train_epochs=1, learning_rate=0.0)
    found = callback.history[0].report
    assert {name: found[name].aliases for name in found} == {name: reference[name].aliases for name in reference}
    for name in reference:
        assert found[name].trace == pytest.approx(reference[name].trace, rel=1e-4)


class Nested(torch.nn.Module):
    """No model of transformers, in which the name of one matrix is the end of another's."""

    def __init__(self):
        super().__init__()
        self.b = torch.nn.Linear(4, 6)
        self.a = torch.nn.Module()
        self.a.b = torch.nn.Linear(6, 4)

    def forward(self, x, labels=None):
        y = self.a.b(self.b(x).relu())
        return {"logits": y, **({} if labels is None else {"loss": torch.nn.functional.cross_entropy(y, labels)})}


@pytest.mark.parametrize("targets", ["b", r"(a\.)?b"])
def test_matrices_are_told_by_their_whole_names(tmp_path, targets):
    data = [{"x": torch.randn(8, 4)}]
    model = Nested()
    reference = calibrate(model, data, targets=targets, progress=False)
    trainer = trainer_of(inject(model, RankPlan.uniform({"b": (6, 4), "a.b": (4, 6)}, 2)), tmp_path)
    trainer.train_dataset = [{"x": torch.randn(4), "labels": index % 4} for index in range(8)]
    callback = hf.SensitivityCallback(reference, data, trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert list(callback.history[-1].report) == list(reference)
    assert callback.history[-1].report["b"].trace == pytest.approx(reference["b"].trace)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["inject", "peft"])
@pytest.mark.parametrize("estimator", ["activation", "fisher"])
def test_gradient_checkpointing_with_frozen_embeddings(llama, tmp_path, kind, reentrant, estimator):
    reference = report_of(llama, estimator=estimator)
    plan = allocate(reference, average_rank=4)
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    states = []
    for given in (None, reference):
        model = adapted(kind, llama, plan)
        model.enable_input_require_grads()
        callback, trainer = trained(model, tmp_path, given, **settings)
        states.append(state_of(trainer))
    assert same(*states)
    expected = calibrate(merged(model), batches(), estimator=estimator, progress=False)
    for name in reference:
        assert callback.history[-1].report[name].trace == pytest.approx(expected[name].trace, rel=2e-4)


@pytest.mark.parametrize("kind", ["inject", "peft", "fused"])
def test_device_map(llama, tmp_path, kind):
    """accelerate's hooks, as device_map="auto" puts them on every layer where there are several devices."""
    accelerate = pytest.importorskip("accelerate")
    reference = report_of(llama)
    plan = allocate(reference, average_rank=4)
    states = []
    for given in (None, reference):
        torch.manual_seed(7)
        model = accelerate.dispatch_model(load(llama, device_map="auto"), {"": "cpu"}, force_hooks=True)
        if kind == "inject":
            inject(model, plan)
        else:
            model = peft.get_peft_model(model, plan.to_lora_config(task_type="CAUSAL_LM"))
            if kind == "fused":
                fuse(model)
        before = [(name, module.__dict__.get("forward")) for name, module in model.named_modules()]
        assert sum(forward is not None for _, forward in before) > 14
        callback, trainer = trained(model, tmp_path, given)
        assert [(name, module.__dict__.get("forward")) for name, module in model.named_modules()] == before
        states.append(state_of(trainer))
    assert same(*states)
    assert len(callback.history) == 2


@pytest.mark.parametrize("kind", ["inject", "peft", "full"])
def test_mixed_precision_is_the_trainers(llama, tmp_path, kind):
    plan = allocate(report_of(llama), average_rank=4)
    states, seen = [], set()
    for given in (None, plan):
        model = adapted(kind, llama, plan)
        name = next(name for name, _ in model.named_modules() if ".down_proj" in name)
        model.get_submodule(name).register_forward_hook(lambda module, _, y: seen.add((module.training, y.dtype)))
        callback, trainer = trained(model, tmp_path, given, bf16=True)
        states.append(state_of(trainer))
    assert same(*states)
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    in_fp32 = calibrate(merged(trainer.accelerator.unwrap_model(trainer.model, False)), batches(), progress=False)
    found = callback.history[-1].report
    traces = [(found[name].trace, in_fp32[name].trace) for name in found]
    assert all(mine == pytest.approx(theirs, rel=0.05) for mine, theirs in traces)


@pytest.mark.parametrize("kind", ["inject", "peft"])
def test_a_compiled_model_is_not_compiled_again(llama, tmp_path, kind):
    plan = allocate(report_of(llama), average_rank=4)
    states, graphs = [], []
    for given in (None, plan):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        settings = {"torch_compile": True, "torch_compile_backend": "eager"}
        _, trainer = trained(adapted(kind, llama, plan), tmp_path, given, **settings)
        states.append(state_of(trainer))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert same(*states)
    assert graphs[0] == graphs[1] > 0


LAUNCHED = """
import sys, torch
from tests.integrations import test_callback as tests

folder, kind = sys.argv[1:]
reference = tests.report_of(folder)
plan = tests.allocate(reference, average_rank=4)
states = []
for given in (None, plan):
    settings = {"per_device_train_batch_size": 2, "ddp_find_unused_parameters": False}
    callback, trainer = tests.trained(tests.adapted(kind, folder, plan), folder + "/out", given, **settings)
    states.append(tests.state_of(trainer))
assert torch.distributed.get_world_size() == 2
assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
assert tests.same(*states)
assert [entry.step for entry in callback.history] == [3, 6]
mine = [entry.report for entry in callback.history]
everyones = [None, None]
torch.distributed.all_gather_object(everyones, mine)
assert everyones[0] == everyones[1] == mine
logged = [entry["step"] for entry in trainer.state.log_history if "sensitivity/kendall_tau" in entry]
assert logged == [3, 6]
if torch.distributed.get_rank() == 0:
    print("as expected")
# Or a thread of it may still run when the process ends, and abort it.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["inject", "fused"])
def test_accelerate_launch_with_distributed_data_parallel(llama, tmp_path, kind):
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    # With --cpu it starts one process, and several only through MPI.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), str(llama), kind], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "as expected" in done.stdout


def test_sft_trainer(llama, tmp_path):
    trl = pytest.importorskip("trl", reason="SFTTrainer is TRL's, which is not installed")
    datasets = pytest.importorskip("datasets")
    reference = report_of(llama)
    plan = allocate(reference, average_rank=4)
    data = datasets.Dataset.from_dict({"text": [text for text, _ in tiny_models.sentences(12)]})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, report_to="none",
        learning_rate=LEARNING_RATE, use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    for kind in ("peft", "peft_config", "inject"):
        states = []
        for with_callback in (False, True):
            torch.manual_seed(7)
            config = plan.to_lora_config(task_type="CAUSAL_LM")
            model = load(llama) if kind == "peft_config" else adapted(kind, llama, plan)
            trainer = trl.SFTTrainer(
                model,
                arguments,
                train_dataset=data,
                processing_class=hf.load_tokenizer(llama),
                peft_config=config if kind == "peft_config" else None,
            )
            if with_callback:
                callback = hf.SensitivityCallback(plan, batches(), trainer)
                trainer.add_callback(callback)
            trainer.train()
            states.append(state_of(trainer))
        assert same(*states)
        assert len(callback.history) == 2
        assert [entry["step"] for entry in trainer.state.log_history if "sensitivity/kendall_tau" in entry] == [3, 6]
        expected = calibrate(merged(trainer.model), batches(), progress=False)
        for name in reference:
            assert callback.history[-1].report[name].trace == pytest.approx(expected[name].trace, rel=2e-4)


def test_misfits_are_told_before_training(llama, tmp_path):
    plan = allocate(report_of(llama), average_rank=4)

    def begin(model, reference):
        model.register_forward_hook(lambda *_: pytest.fail("training began"))
        trained(model, tmp_path, reference)

    other = calibrate(tiny_models.family_model("GPT2LMHeadModel"), batches(), progress=False)
    with pytest.raises(TargetError, match=r"^the reference is for .*: the model in training has no linear layer"):
        begin(load(llama), other)
    narrow = tiny_models.family_model("LlamaForCausalLM")
    with pytest.raises(TargetError, match=r"q_proj is \(16, 16\) in the model in training and \(32, 32\) in the ref"):
        begin(narrow, plan)
    several = load(llama)
    mixed.add_adapter(several, "one", plan)
    with pytest.raises(TargetError, match="holds several adapters"):
        begin(several, plan)


def test_bad_arguments(llama, tmp_path):
    report = report_of(llama)
    plan = allocate(report, average_rank=4)
    trainer = trainer_of(load(llama), tmp_path)
    for reference, data, options, error, message in [
        (plan, batches()[0], {}, CalibrationError, "batches is a dict; give an iterable"),
        (plan, 3, {}, CalibrationError, "batches is a int; give an iterable"),
        (plan, batches(), {"estimator": "fisher"}, CalibrationError, "estimator follows from the reference"),
        (plan, batches(), {"targets": "all-linear"}, CalibrationError, "targets follows from the reference"),
        ("plan.json", batches(), {}, ReportError, "reference is a str; give a RankPlan or a SensitivityReport"),
        (RankPlan.uniform({"a": (8, 8)}, 2), batches(), {}, ReportError, "made without a calibration"),
    ]:
        with pytest.raises(error, match=message):
            hf.SensitivityCallback(reference, data, trainer, **options)


def older(plan):
    """The plan as it was before plans told the settings of an estimator."""
    kept = {"estimator", "mode", "labels", "draws", "seed", "tokens", "sequences", "k", "alpha", "versions"}
    recorded = plan.calibration.model_dump()
    return plan.model_copy(update={"calibration": Calibration(**{name: recorded[name] for name in kept})})


def test_older_plans_are_of_the_diagonal_and_not_of_probes(llama, tmp_path):
    reference = report_of(llama)
    plan = allocate(reference, average_rank=4)
    assert older(plan).calibration.variant is None
    callback, _ = trained(adapted("inject", llama, plan), tmp_path, older(plan), learning_rate=0.0)
    assert callback.history[0].report.variant == "diagonal"
    assert callback.history[0].kendall_tau == 1.0
    probed = allocate(
        report_of(llama, estimator="hutchinson", probes=2, min_probes=2, targets=["q_proj"]), total_rank=9
    )
    with pytest.raises(ReportError, match="older one, without the settings of 'hutchinson'; give the report"):
        hf.SensitivityCallback(older(probed), batches(), trainer_of(load(llama), tmp_path))


def test_the_model_is_as_it_was_after_an_exception(llama, tmp_path):
    plan = allocate(report_of(llama), average_rank=4)
    model = adapted("fused", llama, plan)
    data = [*batches(), {"input_ids": torch.zeros(0, 4, dtype=torch.long)}]
    trainer = trainer_of(model, tmp_path)
    callback = hf.SensitivityCallback(plan, data, trainer)
    before = random.getstate()  # the trainer seeds
    with pytest.raises(CalibrationError, match="holds no sequence"):
        callback._measure(hf._adapted_model(model))
    assert plain_names(model)
    assert random.getstate() == before


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bf16", [False, True])
def test_on_the_gpu(llama, tmp_path, kind, bf16):
    reference = report_of(llama)
    plan = allocate(reference, average_rank=4)
    states = []
    for given in (None, plan):
        callback, trainer = trained(adapted(kind, llama, plan), tmp_path, given, use_cpu=False, bf16=bf16)
        states.append({**state_of(trainer), "cuda rng": torch.cuda.get_rng_state()})
    assert trainer.model.device.type == "cuda"
    assert same(*states)
    model = merged(trainer.accelerator.unwrap_model(trainer.model, False))
    expected = calibrate(model, batches(), progress=False)
    for name in reference:
        tolerance = 0.1 if bf16 else 2e-3
        assert callback.history[-1].report[name].trace == pytest.approx(expected[name].trace, rel=tolerance)
