"""Calibration sees through wrappers and the user's own subclasses, and works on each CPU backend."""

import pytest
import torch

from sensilora import calibrate, use_backend
from sensilora.errors import CalibrationError, TargetError

transformers = pytest.importorskip("transformers")


class StoryWriter(transformers.GPT2LMHeadModel):
    """A causal model whose class name does not say so."""


def gpt2(cls=transformers.GPT2LMHeadModel):
    torch.manual_seed(0)
    return cls(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)).eval()


def traces(model, **kwargs):
    ids = torch.arange(24).reshape(2, 12)
    report = calibrate(model, [{"input_ids": ids, "labels": ids}], progress=False, **kwargs)
    return {name: report[name].trace for name in report}


def test_wrappers_and_subclasses_give_the_same_names_and_numbers():
    expected = traces(gpt2(), estimator="fisher")
    compiled = torch.compile(gpt2(), backend="eager")
    for model in (gpt2(StoryWriter), torch.nn.DataParallel(gpt2()), compiled):
        assert traces(model, estimator="fisher") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("estimator", ["activation", "fisher"])
def test_every_backend_serves_a_whole_calibration(backend, estimator):
    from sensilora.ops import _backend

    reason = _backend.why_not("fisher_diag", backend, "cpu", torch.float32)
    if reason:
        pytest.skip(reason)
    expected = traces(gpt2(), estimator=estimator)
    with use_backend(backend):
        assert traces(gpt2(), estimator=estimator) == pytest.approx(expected, rel=1e-5)


def test_activation_reads_no_labels():
    with pytest.raises(CalibrationError, match="reads no labels"):
        traces(gpt2(), estimator="activation", labels="model")


def test_packed_weights_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model[0].weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TargetError, match="is packed"):
        calibrate(model, [{"input": torch.ones(1, 4)}], progress=False)
