"""A calibration that was killed, interrupted or failed goes on from its checkpoint, to the same numbers."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from sensilora.errors import CalibrationError, NonFiniteError
from sensilora.sensitivity import Diagonals, calibrate, head
from sensilora.sensitivity.checkpoint import STATE_FILE, Checkpoint, digest, identity
from tests import tiny_models
from tests.sensitivity.oracles import Net, classification_batch, sequences
from tests.sensitivity.test_calibrate import assert_unchanged, model_with_a_past, state

REPOSITORY = Path(__file__).parents[2]
LABELS = [0, 2, 1, 2, 0, 1]
# With a memory budget, of which the matrices take two passes.
ESTIMATORS = {
    "activation": {"estimator": "activation"},
    "inverse": {"estimator": "activation", "variant": "inverse", "block_size": 4},
    "fisher": {"estimator": "fisher"},
    "per_loss_term": {"estimator": "fisher", "mode": "per_loss_term"},
    "sampled": {"estimator": "fisher", "labels": "model", "draws": 2},
    "two passes": {"estimator": "fisher", "labels": "model", "memory_budget": 1200},
    "hutchinson": {"estimator": "hutchinson", "probes": 2, "min_probes": 2},
}
every_estimator = pytest.mark.parametrize("arguments", ESTIMATORS.values(), ids=ESTIMATORS)


def data(count=6):
    """`count` batches of one sequence."""
    ids = sequences(*[3 + n % 4 for n in range(count)])
    return [classification_batch([ids[n]], [LABELS[n % 6]]) for n in range(count)]


class Counting(Net):
    """Does `action` at forward `at` (from 1), and counts them."""

    def __init__(self, at=None, action=None):
        super().__init__()
        self.at, self.action, self.calls = at, action, 0

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        if self.calls == self.at:
            self.action()
        return super().forward(input_ids, attention_mask)


def model_of(at=None, action=None):
    """The same weights each time."""
    torch.manual_seed(0)
    return Counting(at, action)


def fail():
    raise RuntimeError("stop")


def interrupt():
    signal.raise_signal(signal.SIGINT)


def content(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else None


# ---------------------------------------------------------------------------------------------- going on


def run(model, folder, name):
    """A calibration with a checkpoint after every second batch, and its diagonals beside it."""
    folder = Path(folder)
    places = {"checkpoint": folder / "state", "keep_diagonals": folder / "diagonals", "max_shard_size": 1000}
    return calibrate(model, data(), **ESTIMATORS[name], **places, checkpoint_every=2, seed=5, progress=False)


# Which forward kills the process, and how many are left: those of batches that are in the state are spared.
KILLS = [
    ("activation", 6, 2),
    ("inverse", 4, 4),
    ("fisher", 2, 6),
    ("fisher", 6, 2),
    ("sampled", 6, 2),
    ("two passes", 6, 8),
    ("two passes", 12, 2),
    # Its 11 matrices take 6 forwards each, after 6 for all; 4 were finished.
    ("hutchinson", 30, 6 + 7 * 6),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with what each of KILLS left, by its place, from children of one process that has imported all."""
    folder = tmp_path_factory.mktemp("killed")
    script = """
import os, signal, sys
from tests.sensitivity import test_checkpoint as t
for place, (name, at, _) in enumerate(t.KILLS):
    child = os.fork()
    if not child:
        model = t.model_of(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        t.run(model, os.path.join(sys.argv[1], str(place)), name)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, (name, at, status)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("place", range(len(KILLS)), ids=[f"{name}-{at}" for name, at, _ in KILLS])
def test_a_killed_run_goes_on(tmp_path, killed, place):
    name, at, rest = KILLS[place]
    folder = killed / str(place)
    assert (STATE_FILE in content(folder / "state")) == (at > 2)
    model = model_of()
    resumed = run(model, folder, name)
    assert model.calls == rest
    whole = calibrate(model_of(), data(), **ESTIMATORS[name], seed=5, progress=False)
    assert resumed == whole
    assert content(folder) == ["diagonals"]
    run(model_of(), tmp_path, name)
    found, expected = Diagonals(folder / "diagonals"), Diagonals(tmp_path / "diagonals")
    assert list(found) == list(expected) == list(whole)
    assert all(torch.equal(found[matrix], expected[matrix]) for matrix in whole)


@given(
    st.sampled_from(sorted(set(ESTIMATORS) - {"hutchinson"})),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.integers(1, 7),
    st.sampled_from([fail, interrupt]),
)
@settings(deadline=None, max_examples=25)
def test_failing_again_and_again(tmp_path_factory, name, stops, every, action):
    folder = tmp_path_factory.mktemp("state") / "state"
    arguments = {**ESTIMATORS[name], "seed": 2, "progress": False}
    whole = calibrate(model_of(), data(), **arguments)
    arguments |= {"checkpoint": folder, "checkpoint_every": every}
    for at in stops:
        model = model_of(at, action)
        try:
            report = calibrate(model, data(), **arguments)
        except (RuntimeError, KeyboardInterrupt):
            continue
        assert report == whole
    assert calibrate(model_of(), data(), **arguments) == whole
    assert not folder.exists()


def test_fp64_sums_and_a_model_of_several_dtypes(tmp_path):
    def mixed(at=None):
        model = model_of(at, fail).double()
        model.blocks[1].float()
        model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0].float(), args[1]))
        model.blocks[1].register_forward_hook(lambda module, args, output: output.double())
        return model

    for arguments in (ESTIMATORS["activation"], ESTIMATORS["fisher"]):
        whole = calibrate(mixed(), data(), **arguments, progress=False)
        arguments = {**arguments, "checkpoint": tmp_path / "state", "checkpoint_every": 1, "progress": False}
        with pytest.raises(RuntimeError, match="stop"):
            calibrate(mixed(4), data(), **arguments)
        assert calibrate(mixed(), data(), **arguments) == whole


def test_a_shuffling_loader_goes_on_in_its_order(tmp_path):
    def loader():
        torch.manual_seed(9)
        return DataLoader(data(), shuffle=True, batch_size=None)

    arguments = {"estimator": "fisher", "labels": "model", "progress": False}
    whole = calibrate(model_of(), loader(), **arguments)
    arguments |= {"checkpoint": tmp_path / "state", "checkpoint_every": 1}
    with pytest.raises(RuntimeError, match="stop"):
        calibrate(model_of(4, fail), loader(), **arguments)
    torch.manual_seed(1)  # the order is the state's, not of the generator as it is now
    shuffled = DataLoader(data(), shuffle=True, batch_size=None)
    assert calibrate(model_of(), shuffled, **arguments) == whole


def test_a_one_shot_iterator_goes_on(tmp_path):
    arguments = {"estimator": "fisher", "checkpoint": tmp_path / "state", "checkpoint_every": 2, "progress": False}
    with pytest.raises(RuntimeError, match="stop"):
        calibrate(model_of(4, fail), iter(data()), **arguments)
    model = model_of()
    report = calibrate(model, iter(data()), **arguments)
    assert model.calls == 4
    assert report.matrices == calibrate(model_of(), data(), estimator="fisher", progress=False).matrices


def test_random_numbers_of_the_model_itself_go_on(tmp_path):
    class Noisy(Counting):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids, attention_mask) * torch.rand(())

    def noisy(at=None):
        torch.manual_seed(0)
        return Noisy(at, fail)

    whole = calibrate(noisy(), data(), estimator="fisher", progress=False)
    arguments = {"estimator": "fisher", "checkpoint": tmp_path / "state", "checkpoint_every": 2, "progress": False}
    with pytest.raises(RuntimeError, match="stop"):
        calibrate(noisy(6), data(), **arguments)
    torch.manual_seed(77)
    assert calibrate(noisy(), data(), **arguments) == whole


def test_a_trained_head_is_kept(tmp_path, monkeypatch):
    def run_with_head(model, **more):
        return calibrate(model, data(), estimator="fisher", head_warmup_steps=3, progress=False, **more)

    whole = run_with_head(model_of())
    places = {"checkpoint": tmp_path / "state", "checkpoint_every": 2}
    with pytest.raises(RuntimeError, match="stop"):
        run_with_head(model_of(7, fail), **places)
    monkeypatch.setattr(head, "_train", lambda *_: pytest.fail("the head was trained again"))
    model = model_of()
    before = model.classifier.weight.detach().clone()
    assert run_with_head(model, **places) == whole
    assert model.calls == 4
    assert torch.equal(model.classifier.weight, before)


# ---------------------------------------------------------------------------------------------- Ctrl-C


@every_estimator
def test_ctrl_c_finishes_the_batch_and_says_how_to_go_on(tmp_path, arguments):
    arguments = {**arguments, "checkpoint": tmp_path / "state", "checkpoint_every": 100, "progress": False}
    with pytest.raises(KeyboardInterrupt, match=r"interrupted; .*state: calibrate again with the same arguments"):
        calibrate(model_of(4, interrupt), data(), **arguments)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    state = json.loads((tmp_path / "state" / STATE_FILE).read_text())["state"]
    assert state["done"] == 4
    model = model_of()
    report = calibrate(model, data(), **arguments)
    if arguments["estimator"] != "hutchinson":  # its work is not in the batches
        assert model.calls == 6 * len(report.passes) - 4
    assert content(tmp_path) == []


def test_ctrl_c_while_data_is_awaited_acts_at_once(tmp_path):
    class Slow:
        def __iter__(self):
            for place, batch in enumerate(data()):
                if place == 3:
                    interrupt()
                    pytest.fail("the data was read on")
                yield batch

    arguments = {"estimator": "fisher", "checkpoint": tmp_path / "state", "progress": False}
    with pytest.raises(KeyboardInterrupt, match="calibrate again"):
        calibrate(model_of(), Slow(), **arguments)
    model = model_of()
    assert calibrate(model, data(), **arguments) == calibrate(model_of(), data(), estimator="fisher", progress=False)
    assert model.calls == 3


def test_ctrl_c_while_diagonals_are_reduced(tmp_path, monkeypatch):
    driver = importlib.import_module("sensilora.sensitivity.calibrate")
    measure = driver._measure

    def interrupted(observer, matrices, **options):
        interrupt()
        return measure(observer, matrices, **options)

    arguments = {"estimator": "activation", "checkpoint": tmp_path / "state", "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_measure", interrupted)
        with pytest.raises(KeyboardInterrupt, match="calibrate again"):
            calibrate(model_of(), data(), **arguments)
    model = model_of()
    assert calibrate(model, data(), **arguments) == calibrate(model_of(), data(), progress=False)
    assert model.calls == 0


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice():
        interrupt()
        interrupt()

    arguments = {"checkpoint": tmp_path / "state", "checkpoint_every": 2, "progress": False}
    with pytest.raises(KeyboardInterrupt, match="calibrate again"):
        calibrate(model_of(4, twice), data(), **arguments)
    assert json.loads((tmp_path / "state" / STATE_FILE).read_text())["state"]["done"] == 2


def test_ctrl_c_before_anything_is_summed_promises_nothing(tmp_path):
    def twice():
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt) as caught:
        calibrate(model_of(1, twice), data(), checkpoint=tmp_path / "state", progress=False)
    assert str(caught.value) == ""


def test_a_handler_of_the_callers_own_stays(tmp_path):
    seen = []
    previous = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        calibrate(model_of(4, interrupt), data(), checkpoint=tmp_path / "state", progress=False)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [1]


def test_hutchinson_keeps_the_matrices_that_are_done(tmp_path):
    arguments = {**ESTIMATORS["hutchinson"], "progress": False}
    whole = calibrate(model_of(), data(), **arguments)
    arguments["checkpoint"] = tmp_path / "state"
    at = 6 + 6 * 9  # forwards of the pass over the data, and some of probing
    with pytest.raises(KeyboardInterrupt):
        calibrate(model_of(at, interrupt), data(), **arguments)
    done = json.loads((tmp_path / "state" / STATE_FILE).read_text())["state"]["measured"]
    assert 0 < len(done) < len(whole)
    model, full = model_of(), model_of()
    assert calibrate(model, data(), **arguments) == whole
    calibrate(full, data(), **ESTIMATORS["hutchinson"], progress=False)
    assert model.calls < full.calls


# ---------------------------------------------------------------------------------------------- what is left behind


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("action", [fail, interrupt])
@every_estimator
def test_the_model_is_as_it_was(tmp_path, arguments, action):
    """After what stops a run, and after the run that goes on from there."""
    model, calls = model_with_a_past(), []

    def stop_once(*_):
        calls.append(1)
        if len(calls) == 4:
            action()

    model.embed.register_forward_hook(stop_once)
    before = state(model)
    places = {"checkpoint": tmp_path / "state", "checkpoint_every": 1, "keep_diagonals": tmp_path / "kept"}
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        calibrate(model, data(), **arguments, **places, progress=False)
    assert_unchanged(before, state(model))
    calibrate(model, data(), **arguments, **places, progress=False)
    assert_unchanged(before, state(model))


def test_nothing_is_left_but_what_was_there(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    calibrate(model_of(), data(), checkpoint=folder, checkpoint_every=1, progress=False)
    assert content(folder) == ["notes.txt"]


def test_one_whole_state_at_a_time(tmp_path):
    folder, seen = tmp_path / "state", []
    model = model_of()
    model.embed.register_forward_hook(lambda *_: seen.append(content(folder)))
    calibrate(model, data(3), checkpoint=folder, checkpoint_every=1, progress=False)
    assert seen == [[], [STATE_FILE, "sums-1.safetensors"], [STATE_FILE, "sums-2.safetensors"]]


def test_what_a_kill_left_of_writing_is_removed(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / ".sums-7.safetensors.abc.part").write_bytes(b"x")
    calibrate(model_of(), data(), checkpoint=folder, checkpoint_every=1, progress=False)
    assert content(tmp_path) == []


def test_a_state_that_cannot_be_written_leaves_the_former(tmp_path, monkeypatch):
    folder = tmp_path / "state"
    point = Checkpoint(folder, 1, {"a": 1})
    point.write({"done": 1}, {"x": torch.ones(2)})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            point.write({"done": 2}, {"x": torch.zeros(2)})
    state, tensors = Checkpoint(folder, 1, {"a": 1}).read()
    assert state == {"done": 1}
    assert tensors["x"].tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------- another calibration


@pytest.fixture
def stopped(tmp_path):
    """Arguments of a run that failed at its fourth batch, and its model and data."""
    arguments = {"estimator": "fisher", "checkpoint": tmp_path / "state", "checkpoint_every": 1, "progress": False}
    with pytest.raises(RuntimeError, match="stop"):
        calibrate(model_of(4, fail), data(), **arguments)
    return arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "activation"}, "with estimator='fisher', not 'activation'"),
        ({"mode": "per_position"}, "with mode='per_sequence', not 'per_position'"),
        ({"seed": 1}, "with seed=0, not 1"),
        ({"k": 0.25}, r"with k=0\.5, not 0\.25"),
        ({"loss_fn": print}, "with loss_fn=None, not 'builtins.print'"),
        ({"memory_budget": "1MB"}, "with memory_budget=None, not 1000000"),
        ({"targets": ["up"]}, "of other targets"),
        ({"keep_diagonals": "elsewhere"}, "with keep_diagonals=None, not '.*elsewhere'"),
    ],
)
def test_other_arguments(stopped, change, message):
    with pytest.raises(
        CalibrationError, match=rf"^the checkpoint in .*state is of a calibration {message}.*; give what"
    ):
        calibrate(model_of(), data(), **{**stopped, **change})
    assert not Path("elsewhere").exists()
    calibrate(model_of(), data(), **stopped)


def test_another_model(stopped):
    other = model_of()
    with torch.no_grad():
        other.blocks[1].down.weight[0, 0] += 1e-3
    with pytest.raises(
        CalibrationError, match=r"of a model with other weights \(blocks\.1\.down\.weight, for example"
    ):
        calibrate(other, data(), **stopped)
    with pytest.raises(CalibrationError, match="of a model with other weights"):
        calibrate(model_of().bfloat16(), data(), **stopped)


@pytest.mark.parametrize("place", [1, 3])
def test_other_data(stopped, place):
    other = data()
    other[place - 1]["labels"] += 1
    with pytest.raises(CalibrationError, match=rf"batch {place} of .* is not what it was before the checkpoint"):
        calibrate(model_of(), [*other[:place], *data()[place:]], **stopped)


def test_less_data_than_before(stopped):
    with pytest.raises(CalibrationError, match=r"batch 3 of .* is not what it was before the checkpoint"):
        calibrate(model_of(), data()[:2], **stopped)


def test_diagonals_that_are_gone(tmp_path):
    places = {"checkpoint": tmp_path / "state", "keep_diagonals": tmp_path / "kept", "progress": False}
    arguments = {"estimator": "fisher", "memory_budget": 1200, "checkpoint_every": 1, **places}
    with pytest.raises(RuntimeError, match="stop"):
        calibrate(model_of(8, fail), data(), **arguments)
    (file,) = (tmp_path / "kept").iterdir()
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(CalibrationError, match=rf"{file.name} is gone from .*kept, on which the checkpoint counts"):
        calibrate(model_of(), data(), **arguments)
    file.write_bytes(content)
    report = calibrate(model_of(), data(), **arguments)
    assert list(Diagonals(tmp_path / "kept")) == list(report)


def test_a_kill_between_the_index_and_the_end(tmp_path, monkeypatch):
    """All is done and written but the checkpoint is still there."""
    places = {"checkpoint": tmp_path / "state", "checkpoint_every": 1, "keep_diagonals": tmp_path / "kept"}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "remove", fail_at_the_end)
        with pytest.raises(RuntimeError, match="stop"):
            calibrate(model_of(), data(), **places, progress=False)
    model = model_of()
    report = calibrate(model, data(), **places, progress=False)
    assert model.calls == 0
    assert list(Diagonals(tmp_path / "kept")) == list(report)
    assert content(tmp_path) == ["kept"]


def fail_at_the_end(checkpoint):
    fail()


@pytest.mark.parametrize(
    "damage",
    ["json", "half", "sums gone", "sums short", "another file", "state", "identity", "digests", "matrices", "dtype"],
)
def test_a_damaged_state(stopped, damage):
    folder = stopped["checkpoint"]
    state, (sums,) = folder / STATE_FILE, folder.glob("sums-*")
    if damage == "json":
        state.write_text("{")
    elif damage == "half":
        state.write_text("{}")
    elif damage == "another file":
        state.write_text("[1]")
    elif damage == "sums gone":
        sums.unlink()
    elif damage in ("state", "identity", "digests", "matrices", "dtype"):
        whole = json.loads(state.read_text())
        if damage in ("state", "identity"):
            whole[damage] = [1]
        elif damage == "dtype":
            next(iter(whole["state"]["matrices"].values()))["dtype"] = "float12"
        else:
            del whole["state"][damage]
        state.write_text(json.dumps(whole))
    else:
        sums.write_bytes(sums.read_bytes()[:-5])
    with pytest.raises(CalibrationError, match=r"the checkpoint in .*state is damaged \(.*\); remove the folder"):
        calibrate(model_of(), data(), **stopped)


def test_a_state_of_another_version(stopped):
    state = stopped["checkpoint"] / STATE_FILE
    state.write_text(state.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    with pytest.raises(CalibrationError, match=r"with torch='1\.0', not "):
        calibrate(model_of(), data(), **stopped)


def test_bad_arguments(tmp_path):
    with pytest.raises(CalibrationError, match="checkpoint_every must be at least 1, not 0"):
        calibrate(model_of(), data(), checkpoint=tmp_path / "state", checkpoint_every=0, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        calibrate(model_of(), data(), checkpoint=tmp_path / "file", progress=False)


@pytest.mark.parametrize("inside", ["", "state"])
def test_diagonals_around_the_checkpoint_are_refused_at_once(tmp_path, inside):
    folders = {"checkpoint": tmp_path / "kept" / inside, "keep_diagonals": tmp_path / "kept"}
    model = model_of()
    with pytest.raises(CalibrationError, match="name two folders beside each other"):
        calibrate(model, data(), **folders, progress=False)
    assert model.calls == 0
    assert not (tmp_path / "kept").exists()


def test_an_error_in_the_data_can_be_mended(tmp_path):
    """The batches before it are not run again."""
    arguments = {"checkpoint": tmp_path / "state", "checkpoint_every": 1, "progress": False}
    broken = [*data()[:4], {"inputs_embeds": torch.zeros(1, 2, 6)}]
    with pytest.raises(TypeError):
        calibrate(model_of(), broken, **arguments)
    model = model_of()
    calibrate(model, data(), **arguments)
    assert model.calls == 2


# ---------------------------------------------------------------------------------------------- what is compared


def test_a_model_of_another_kind(stopped):
    class Other(Counting):
        pass

    torch.manual_seed(0)
    with pytest.raises(CalibrationError, match=r"with model='Counting', not '.*Other'"):
        calibrate(Other(), data(), **stopped)


def test_a_model_of_another_configuration(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    one, other = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=8, rms_norm_eps=eps))
        for eps in (1e-6, 1e-3)
    )
    other.load_state_dict(one.state_dict())
    Checkpoint(tmp_path, 1, identity(one, {})).write({}, {})
    with pytest.raises(CalibrationError, match=r"model with other config \(rms_norm_eps, for example\)"):
        Checkpoint(tmp_path, 1, identity(other, {})).read()
    # What transformers itself sets, and what another process prints otherwise.
    one.config.an_object, one.config.a_set = object(), {"b", "a", "c"}
    Checkpoint(tmp_path, 1, identity(one, {})).write({}, {})
    one.config._name_or_path, one.config.problem_type, one.config.use_cache = "moved", "regression", False
    one.config.an_object, one.config.a_set = object(), {"c", "b", "a"}
    Checkpoint(tmp_path, 1, identity(one, {})).read()
    del one.config.an_object, one.config.a_set
    Checkpoint(tmp_path, 1, identity(one, {})).write({}, {})
    one.save_pretrained(tmp_path / "saved")
    for saved in (one, transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")):
        Checkpoint(tmp_path, 1, identity(saved, {})).read()
    one.config.nested = {("a", 1): {"_name_or_path": "somewhere"}}
    Checkpoint(tmp_path, 1, identity(one, {})).write({}, {})
    one.config.nested = {("a", 1): {"_name_or_path": "elsewhere"}}
    Checkpoint(tmp_path, 1, identity(one, {})).read()


def test_a_digest_is_of_arrays_and_of_no_address():
    one, other = np.zeros(5000), np.zeros(5000)
    other[2500] = 1
    assert digest({"x": one}) != digest({"x": other})
    assert digest({"x": [{"y": one}]}) == digest({"x": [{"y": one.copy()}]}) != digest({"x": [{"y": other}]})
    assert digest({"x": object()}) == digest({"x": object()})


def test_a_digest_is_of_values():
    batch = {"b": torch.arange(6).view(2, 3), "a": "text", "c": [1, 2]}
    assert digest(batch) == digest(dict(reversed(batch.items())))
    assert digest(batch) == digest({**batch, "b": batch["b"].T.contiguous().T})
    others = [
        {**batch, "b": batch["b"].view(3, 2)},
        {**batch, "b": batch["b"].int()},
        {**batch, "b": batch["b"] + 1},
        {**batch, "a": "texT"},
        {**batch, "c": [2, 1]},
        {"b": batch["b"], "a": "text"},
        torch.ones(2),
        None,
    ]
    assert len({digest(other) for other in [batch, *others]}) == len(others) + 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.int32, torch.complex64])
def test_a_digest_of_any_dtype(dtype):
    x = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    assert digest({"x": x}) == digest({"x": x.clone()}) != digest({"x": torch.zeros_like(x)})
    assert digest({"x": torch.zeros(0, dtype=dtype)}) != digest({"x": torch.zeros(0, 1, dtype=dtype)})


def test_weights_are_told_apart_bit_by_bit():
    model = nn.Linear(3, 2).bfloat16()
    before = identity(model, {})["weights"]
    assert before == identity(model, {})["weights"]
    with torch.no_grad():
        model.weight.view(torch.int16)[1, 2] += 1
    after = identity(model, {})["weights"]
    assert before["bias"] == after["bias"]
    assert before["weight"] != after["weight"]


def test_non_finite_numbers_leave_the_state(tmp_path):
    """A NaN in a batch ends the run; with the batch mended it goes on."""
    embeds = [{"inputs_embeds": torch.randn(1, 4, 6)} for _ in range(4)]
    embeds[2]["inputs_embeds"][0, 1, 2] = float("nan")

    class Embedded(Counting):
        def forward(self, inputs_embeds):
            self.calls += 1
            return self.classifier(self.blocks[0](inputs_embeds, inputs_embeds[..., 0] < 9).mean(1))

    torch.manual_seed(0)
    arguments = {"targets": r"blocks\.0\..*", "checkpoint": tmp_path / "state", "checkpoint_every": 1}
    model = Embedded()
    with pytest.raises(NonFiniteError):
        calibrate(model, embeds, **arguments, progress=False)
    embeds[2]["inputs_embeds"][0, 1, 2] = 0
    model.calls = 0
    calibrate(model, embeds, **arguments, progress=False)
    assert model.calls == 2


# -------------------------------------------------------------------------------------------- a decoder, and on a GPU

# The arguments of each, and a budget that takes several passes; none for Hutchinson, which keeps one matrix's sums.
ON_DEVICES = {
    "activation": ({"estimator": "activation"}, 4 * 8 * 192),
    "inverse": ({"estimator": "activation", "variant": "inverse", "block_size": 64}, 4 * 8 * 192 * 64),
    "per_sequence": ({"estimator": "fisher"}, 2 * 4 * 136 * 192),
    "per_position": ({"estimator": "fisher", "mode": "per_position"}, 2 * 4 * 136 * 192),
    "per_loss_term": ({"estimator": "fisher", "mode": "per_loss_term"}, 2 * 4 * 136 * 192),
    "sampled": ({"estimator": "fisher", "labels": "model", "draws": 2}, 2 * 4 * 136 * 192),
    "hutchinson": (
        {"estimator": "hutchinson", "probes": 2, "min_probes": 2, "targets": ["q_proj", "down_proj"]},
        None,
    ),
}


def decoder_on(device, dtype, attention, at=None):
    """A Llama of one layer whose widths Fisher's kernels take by TMA where there is one; it fails at forward `at`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tiny_models.llama_config(
        hidden_size=136, intermediate_size=192, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
        head_dim=64, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(device, dtype)
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1
        if forwards == at:
            fail()

    model.register_forward_pre_hook(count)
    return model


def padded_texts():
    ids = torch.randint(4, 24, (4, 3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:, 1, 5:] = 0
    return [
        {"input_ids": i, "attention_mask": m, "labels": i.where(m == 1, -100)} for i, m in zip(ids, mask, strict=True)
    ]


@pytest.mark.parametrize(
    ("place", "dtype", "attention"),
    [
        ("cpu", torch.float32, "sdpa"),
        pytest.param("cuda", torch.float32, "sdpa", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, "eager", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, "sdpa", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("name", ON_DEVICES)
def test_the_same_bits_again_in_passes_and_gone_on_with(tmp_path, name, place, dtype, attention):
    arguments, budget = ON_DEVICES[name]
    arguments = {**arguments, "seed": 3, "progress": False}

    def calibrated(folder, at=None, **options):
        options |= {"keep_diagonals": tmp_path / folder}
        report = calibrate(decoder_on(place, dtype, attention, at), padded_texts(), **arguments, **options)
        return report.matrices, Diagonals(tmp_path / folder), len(report.passes)

    torch.use_deterministic_algorithms(True)
    try:
        runs = [calibrated("once"), calibrated("again")]
        state = {"checkpoint": tmp_path / "state", "checkpoint_every": 1, "memory_budget": budget}
        if budget is not None:
            runs.append(calibrated("in passes", memory_budget=budget))
            assert runs[-1][2] > 1
        # In the second pass, or for Hutchinson in the second matrix; there are four batches.
        with pytest.raises(RuntimeError, match="stop"):
            calibrated("gone on", at=7 if budget is not None else 10, **state)
        assert content(tmp_path / "state")
        runs.append(calibrated("gone on", **state))
    finally:
        torch.use_deterministic_algorithms(False)
    (expected, kept, _), *others = runs
    for found, diagonals, _ in others:
        assert found == expected
        assert all(torch.equal(diagonals[matrix], kept[matrix]) for matrix in expected)
