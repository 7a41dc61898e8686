"""New classification heads: they are told, and warmed for calibration only."""

import pytest
import torch
from torch import nn

from sensilora.errors import CalibrationError, NonFiniteError
from sensilora.sensitivity import calibrate
from sensilora.sensitivity.head import classification_head, untrained_heads
from tests.sensitivity.oracles import Net, classification_batch, pad, sequences

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
LENGTHS = (5, 3, 7, 4)
LABELS = [0, 1, 2, 1]


def classifier(cls=transformers.BertForSequenceClassification, config=transformers.BertConfig, **options):
    return cls(config(**SMALL, intermediate_size=24, num_labels=6, **options))


def batches():
    ids = sequences(*LENGTHS)
    return [classification_batch(ids[:2], LABELS[:2]), classification_batch(ids[2:], LABELS[2:])]


@pytest.mark.parametrize(
    ("cls", "config", "head"),
    [
        (transformers.BertForSequenceClassification, transformers.BertConfig, "classifier"),
        (transformers.RobertaForSequenceClassification, transformers.RobertaConfig, "classifier"),
        (transformers.LlamaForSequenceClassification, transformers.LlamaConfig, "score"),
        (transformers.BertForTokenClassification, transformers.BertConfig, "classifier"),
        (transformers.BertForMaskedLM, transformers.BertConfig, None),
        (transformers.LlamaForCausalLM, transformers.LlamaConfig, None),
        (transformers.BertModel, transformers.BertConfig, None),
    ],
)
def test_which_module_is_the_head(cls, config, head):
    model = classifier(cls, config)
    found = classification_head(model)
    assert (found and found[0].partition(".")[0]) == head
    assert untrained_heads(model) == ([head] if head else [])


def test_a_trained_head_is_not_called_new():
    model = classifier()
    model.classifier.bias.data[0] = 0.01
    assert untrained_heads(model) == []
    model = classifier()
    model.classifier.weight.data.mul_(2)
    assert untrained_heads(model) == []
    assert untrained_heads(Net()) == []  # no config to compare with


@pytest.mark.parametrize("labels", ["data", "model"])
def test_fisher_on_a_new_head_warns(labels, recwarn):
    model = classifier()
    with pytest.warns(UserWarning, match=r"'classifier'.*head_warmup_steps"):
        calibrate(model, batches(), estimator="fisher", labels=labels, progress=False)
    recwarn.clear()
    calibrate(model, batches(), progress=False)
    calibrate(model, batches(), estimator="fisher", head_warmup_steps=1, progress=False)
    torch.nn.init.normal_(model.classifier.bias)
    calibrate(model, batches(), estimator="fisher", progress=False)
    assert [str(warning.message) for warning in recwarn if "newly" in str(warning.message)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_warm_up_trains_the_head_and_restores_it_bit_for_bit(dtype):
    model = classifier().to(dtype)
    model.classifier.bias.grad = torch.ones(6, dtype=dtype)
    grad = model.classifier.bias.grad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    during = []

    class Spy(list):
        def __iter__(self):
            for batch in super().__iter__():
                during.append({name: value.clone() for name, value in model.state_dict().items()})
                yield batch

    warm = calibrate(model, Spy(batches()), estimator="fisher", head_warmup_steps=5, progress=False)
    changed = {name for name in before if not torch.equal(during[-1][name], before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.classifier.bias.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    # Five steps over two batches, then one pass for calibration.
    assert len(during) == 5 + 2
    with pytest.warns(UserWarning, match="newly"):
        cold = calibrate(model, batches(), estimator="fisher", progress=False)
    assert warm["bert.pooler.dense"].trace != cold["bert.pooler.dense"].trace


def test_warm_up_lowers_the_loss():
    model = classifier().eval()
    batch = batches()[0]
    losses = []

    def loss_fn(outputs, entries):
        loss = torch.nn.functional.cross_entropy(outputs.logits, entries["labels"], reduction="sum")
        losses.append(float(loss.detach()))
        return loss

    calibrate(model, [batch], estimator="fisher", head_warmup_steps=50, loss_fn=loss_fn, progress=False)
    assert len(losses) == 51
    assert losses[-1] < 0.95 * losses[0]


def test_a_one_shot_iterable_serves_warm_up_and_calibration():
    again = calibrate(classifier_with_seed(), batches(), estimator="fisher", head_warmup_steps=3, progress=False)
    once = calibrate(classifier_with_seed(), iter(batches()), estimator="fisher", head_warmup_steps=3, progress=False)
    assert once.matrices == again.matrices
    assert once.sequences == 4


def classifier_with_seed():
    torch.manual_seed(3)
    return classifier()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_head_is_restored_after_an_interruption(error):
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def failing():
        yield from batches()
        assert not torch.equal(model.classifier.weight, before["classifier.weight"])
        raise error("stop")

    class Failing:
        def __iter__(self):
            return failing()

    with pytest.raises(error, match="stop"):
        calibrate(model, Failing(), estimator="fisher", head_warmup_steps=9, progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_warm_up_needs():
    ids, mask = pad(sequences(*LENGTHS))
    with pytest.raises(CalibrationError, match="no classification head"):
        calibrate(
            nn.Sequential(nn.Linear(3, 3)),
            [{"input": torch.ones(1, 3)}],
            estimator="fisher",
            head_warmup_steps=1,
            progress=False,
        )
    unlabelled = [{"input_ids": ids, "attention_mask": mask}]
    with pytest.raises(CalibrationError, match="no labels"):
        calibrate(classifier(), unlabelled, estimator="fisher", labels="model", head_warmup_steps=1, progress=False)
    with pytest.raises(CalibrationError, match="empty"):
        calibrate(classifier(), [], estimator="fisher", head_warmup_steps=1, progress=False)
    model = classifier(problem_type="regression")
    bad = [{"input_ids": ids, "attention_mask": mask, "labels": torch.full((4, 6), float("inf"))}]
    with pytest.raises(NonFiniteError, match="the loss of the head warm-up"):
        calibrate(model, bad, estimator="fisher", head_warmup_steps=1, progress=False)
