import math
import re
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sensilora.adapters import inject
from sensilora.data import Row
from sensilora.errors import DataError, ModelError, NonFiniteError
from sensilora.integrations import transformers as hf
from sensilora.plan import RankPlan
from sensilora.targets import find_targets, fingerprint, matrix_shape
from tests import tiny_models


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_models.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


def test_new_head_follows_the_seed_and_nothing_is_said(bert, capfd, recwarn):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = hf.load_sequence_classifier(bert, labels=["a", "b", "c"])
        heads.append(model.classifier.weight.detach())
    assert heads[0].shape == (3, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert not model.training
    assert hf.class_names(bert) == ["LABEL_0", "LABEL_1"]
    assert capfd.readouterr().err == ""
    assert not [warning for warning in recwarn if "drawn at random" in str(warning.message)]


def test_trained_head_is_kept_and_a_head_of_another_size_replaced(tmp_path):
    folder = tiny_models.bert(tmp_path / "model", classifier=True, num_labels=3)
    torch.manual_seed(5)
    kept = hf.load_sequence_classifier(folder, labels=["a", "b", "c"])
    torch.manual_seed(6)
    again = hf.load_sequence_classifier(folder, labels=["a", "b", "c"])
    assert torch.equal(kept.classifier.weight, again.classifier.weight)
    assert hf.load_sequence_classifier(folder, labels=["a", "b"]).classifier.weight.shape == (2, 32)


def test_weights_missing_outside_the_head_are_told(tmp_path):
    folder = tiny_models.bert(tmp_path / "model")
    deeper = tiny_models.bert_config(num_hidden_layers=3)
    deeper.save_pretrained(folder)
    with pytest.warns(
        UserWarning, match=r"16 weights are not in the checkpoint .* drawn at random, such as bert.enc"
    ):
        hf.load_sequence_classifier(folder, labels=["a", "b"])


def test_dtype(bert):
    assert hf.load_sequence_classifier(bert, labels=["a", "b"], dtype=torch.bfloat16).dtype == torch.bfloat16
    assert hf.load_sequence_classifier(bert, labels=["a", "b"]).dtype == torch.float32


def _no_config(folder):
    (folder / "config.json").unlink()


def _truncated_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def _pickled_weights(folder):
    weights = folder / "model.safetensors"
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    weights.unlink()


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _other_shape(folder):
    tiny_models.bert_config(intermediate_size=80).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_config, "holds no config.json"),
        (_truncated_config, "cannot be loaded: .*config.json"),
        (_pickled_weights, "holds weights as pickles only .*call save_pretrained, which writes safetensors"),
        (_no_weights, "cannot be loaded: .*no file named model.safetensors"),
        (_truncated_weights, "cannot be loaded: .*(?i:incomplete)"),
        (_other_shape, r"the checkpoint's bert.encoder.layer.0.intermediate.dense.bias has another shape"),
    ],
)
def test_damaged_model_folder(tmp_path, damage, message):
    folder = tiny_models.bert(tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        hf.load_sequence_classifier(folder, labels=["a", "b"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c"])
def test_missing_folder(name):
    for load in (hf.load_causal_lm, hf.load_tokenizer, hf.class_names):
        with pytest.raises(ModelError, match="does not exist; name a folder"):
            load(name)


def test_missing_tokenizer_is_not_replaced_by_an_empty_one(tmp_path):
    folder = tiny_models.bert(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(ModelError, match="holds no tokenizer files"):
        hf.load_tokenizer(folder)


def test_tokenizer_without_padding_token_pads_with_end_of_text(llama):
    tokenizer = hf.load_tokenizer(llama)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 3
    assert hf.load_sequence_classifier(llama, labels=["a", "b"]).config.pad_token_id == 3


def test_require_fit(bert, llama, tmp_path):
    tokenizer = hf.load_tokenizer(bert)
    hf.require_fit(hf.load_sequence_classifier(bert, labels=["a", "b"]), tokenizer)
    hf.require_fit(hf.load_causal_lm(llama), hf.load_tokenizer(llama))
    with pytest.raises(ModelError, match="is a bidirectional encoder"):
        hf.require_fit(hf.load_causal_lm(bert), tokenizer)
    small = hf.load_causal_lm(tiny_models.llama(tmp_path, vocab_size=11))
    with pytest.raises(ModelError, match="has 20 tokens but the model only 11 embeddings"):
        hf.require_fit(small, tokenizer)


def test_classification_batches(bert):
    tokenizer = hf.load_tokenizer(bert)
    rows = [Row(("the good film was a plot",), "y"), Row(("bad",), "x"), Row(("a film",), None)]
    first, second = hf.classification_batches(tokenizer, rows, labels=["x", "y"], max_length=6, batch_size=2)
    # [CLS] bad [SEP] and [CLS] a film [SEP]; then four of the six words between [CLS] and [SEP].
    assert first["input_ids"].tolist() == [[2, 9, 3, 0], [2, 16, 14, 3]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert first["labels"].tolist() == [0, -100]
    assert second["input_ids"].shape == (1, 6)
    assert second["labels"].tolist() == [1]


def test_a_file_is_no_model_folder(bert):
    with pytest.raises(ModelError, match=r"config.json is a file; name the model's folder"):
        hf.load_tokenizer(bert / "config.json")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = []

    def refuse(address, timeout):
        asked.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(hf.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    hf._answers.cache_clear()
    try:
        for load in (hf.load_tokenizer, hf.load_causal_lm, hf.class_names):
            with pytest.raises(ModelError, match=r"there is no folder no-such/model here, .* cannot be reached"):
                load("no-such/model")
        assert asked == [("huggingface.co", 443)]
        # What only a proxy can tell is left to huggingface_hub.
        for kind in ("https", "all"):
            monkeypatch.setattr("urllib.request.getproxies", lambda kind=kind: {kind: "http://proxy"})
            assert hf._hub_is_reachable()
        monkeypatch.setattr(hf.hub, "HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match=r"is not to be asked \(HF_HUB_OFFLINE\)"):
            hf.load_tokenizer("no-such/model")
        # A model that is in the cache has what is wrong with it told.
        monkeypatch.setattr(hf.huggingface_hub, "try_to_load_from_cache", lambda *name: "config.json")
        with pytest.raises(ModelError, match="the tokenizer no-such/model cannot be loaded"):
            hf.load_tokenizer("no-such/model")
    finally:
        hf._answers.cache_clear()


def test_pairs_say_which_text_a_token_belongs_to(bert):
    tokenizer = hf.load_tokenizer(bert)
    rows = [Row(("bad film", "good"), 0), Row(("bad", "good"), 1)]
    (batch,) = hf.classification_batches(tokenizer, rows, labels=[0, 1])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]


def test_causal_batches(llama):
    tokenizer = hf.load_tokenizer(llama)
    rows = [Row(("good film a plot was",)), Row(("bad", "film"))]
    (batch,) = hf.causal_batches(tokenizer, rows, max_length=4)
    # Texts are joined, end of text (3) added, and the six tokens of the first row cut into four and two.
    assert batch["input_ids"].tolist() == [[15, 3, 3, 3], [9, 14, 3, 3], [5, 14, 16, 17]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[15, 3, -100, -100], [9, 14, 3, -100], [5, 14, 16, 17]]


def test_bad_rows(bert):
    tokenizer = hf.load_tokenizer(bert)
    for rows, message in [
        ([], "no rows"),
        ([Row(("a",), 7)], r"label 7 is not one of the model's classes \(0, 1\)"),
        ([Row(("a", "b", "c"), 0)], "one text or a pair, not 3"),
    ]:
        with pytest.raises(DataError, match=message):
            hf.classification_batches(tokenizer, rows, labels=[0, 1])
    with pytest.raises(DataError, match="batch_size must be at least 1"):
        hf.classification_batches(tokenizer, [Row(("a",), 0)], labels=[0], batch_size=0)
    with pytest.raises(DataError, match="max_length must be at least 2"):
        hf.causal_batches(tokenizer, [Row(("a",))], max_length=1)


def test_macro_f1_by_hand():
    # Class 0: 2 gold, 1 predicted, 1 hit: F1 2/3. Class 1: 2, 2, 1: 1/2. Class 2 is only predicted: 0.
    accuracy, macro_f1 = hf.accuracy_and_macro_f1([0, 0, 1, 1], [0, 1, 1, 2])
    assert accuracy == 0.5
    assert macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_evaluate_classifier_is_the_mean_over_rows(bert):
    model = hf.load_sequence_classifier(bert, labels=["0", "1"]).train()
    tokenizer = hf.load_tokenizer(bert)
    rows = [Row((text,), label) for text, label in tiny_models.sentences(11)]
    figures = hf.evaluate_classifier(model, hf.classification_batches(tokenizer, rows, labels=[0, 1], batch_size=4))
    assert model.training
    model.eval()
    logits = torch.cat([model(**tokenizer(row.texts[0], return_tensors="pt")).logits.detach() for row in rows])
    labels = torch.tensor([row.label for row in rows])
    assert figures["rows"] == 11
    assert figures["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert figures["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    with pytest.raises(DataError, match="no row has a label"):
        hf.evaluate_classifier(model, hf.classification_batches(tokenizer, [Row(("a",))], labels=[0, 1]))


def test_evaluate_causal_is_the_mean_over_tokens(llama):
    model, tokenizer = hf.load_causal_lm(llama), hf.load_tokenizer(llama)
    rows = [Row((text,)) for text, _ in tiny_models.sentences(7)]
    figures = hf.evaluate_causal_lm(model, hf.causal_batches(tokenizer, rows, batch_size=3))
    losses = []
    for row in rows:
        ids = torch.tensor([*tokenizer(row.texts[0])["input_ids"], 3])
        losses.append(F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none").detach())
    expected = torch.cat(losses).double().numpy()
    assert figures["tokens"] == len(expected)
    assert figures["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    model.lm_head.weight.data.mul_(1e6)  # a loss above 709, beyond the largest exponent
    assert hf.evaluate_causal_lm(model, hf.causal_batches(tokenizer, rows))["perplexity"] == math.inf
    model.lm_head.weight.data.fill_(3e38)
    with pytest.raises(NonFiniteError, match="the loss on the evaluation rows is nan"):
        hf.evaluate_causal_lm(model, hf.causal_batches(tokenizer, rows))


def test_a_classifier_whose_output_is_no_number_is_not_evaluated(bert):
    model, tokenizer = hf.load_sequence_classifier(bert, labels=["0", "1"]), hf.load_tokenizer(bert)
    rows = [Row((text,), label) for text, label in tiny_models.sentences(5)]
    model.classifier.weight.data.fill_(3e38)
    with pytest.raises(NonFiniteError, match="the loss on the evaluation rows is nan"):
        hf.evaluate_classifier(model, hf.classification_batches(tokenizer, rows, labels=[0, 1]))


def test_the_trainer_is_not_given_a_quantised_model(bert, tmp_path):
    model = adapted(bert)
    model.is_quantized = True  # as transformers marks what it loads
    with pytest.raises(ModelError, match="takes a quantised model only with PEFT's adapters"):
        train(model, bert, tmp_path)
    peft = pytest.importorskip("peft")
    plain = hf.load_sequence_classifier(bert, labels=["0", "1"])
    plain.is_quantized, plain.hf_quantizer = True, SimpleNamespace(is_trainable=True)
    plain.quantization_method = None
    of_peft = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert train(of_peft, bert, tmp_path)


def adapted(folder, seed=0):
    torch.manual_seed(seed)
    model = hf.load_sequence_classifier(folder, labels=["0", "1"])
    shapes = {name: matrix_shape(module) for name, module in find_targets(model).items()}
    plan = RankPlan.uniform(shapes, 4, fingerprint=fingerprint(model))
    return inject(model, plan, modules_to_save=["classifier"])


def train(model, folder, tmp_path, **settings):
    tokenizer = hf.load_tokenizer(folder)
    rows = [Row((text,), label) for text, label in tiny_models.sentences(24)]
    examples = hf.encode_classification(tokenizer, rows, labels=[0, 1], max_length=32)
    return hf.train_with_trainer(
        model, examples, tmp_path, pad_token_id=0, use_cpu=True, progress=False, **{"batch_size": 8, **settings}
    )


def test_training_trains_the_adapters_alone_and_repeats_by_seed(bert, tmp_path, capfd):
    found = []
    for seed in (0, 0, 1):
        model = adapted(bert)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        calls = []
        history = train(
            model, bert, tmp_path, epochs=2, seed=seed, evaluate=lambda c=calls: {"n": c.append(1) or len(c)}
        )
        found.append({name: tensor for name, tensor in model.state_dict().items() if not before[name].equal(tensor)})
        assert {name.split(".")[-1] for name in found[-1]} <= {"lora_A", "lora_B", "weight", "bias"}
        assert {name for name in found[-1] if "lora_" not in name} == {"classifier.weight", "classifier.bias"}
        assert not model.training
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])
    steps = [entry for entry in history if "loss" in entry and "learning_rate" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    assert [(entry["n"], entry["step"]) for entry in history if "n" in entry] == [(1, 3), (2, 6)]
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_learning_rate_rises_and_falls_linearly(bert, tmp_path):
    history = train(adapted(bert), bert, tmp_path, epochs=4, learning_rate=1e-3, warmup=0.25)
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    # 12 steps, 3 of them warm-up; a step's rate is the one it was made with.
    assert rates == pytest.approx([0, 1 / 3e3, 2 / 3e3] + [1e-3 * (9 - n) / 9 for n in range(9)])


def test_divergence_is_an_error(bert, tmp_path):
    steps = []
    model = adapted(bert)
    model.register_forward_hook(lambda *_: steps.append(1))
    with pytest.raises(NonFiniteError, match=r"^training diverged: the loss of step 2 is nan; lower the learning"):
        train(model, bert, tmp_path, epochs=300, learning_rate=1e36, warmup=0.0)
    assert len(steps) == 2
    # After the last step no loss would tell.
    model = adapted(bert)

    def damage():
        model.classifier.weight.data.fill_(math.nan)
        return {}

    with pytest.raises(NonFiniteError, match=r"training diverged: .* holds NaN or Inf; lower the learning rate"):
        train(model, bert, tmp_path, epochs=1, evaluate=damage)


@pytest.mark.parametrize("batch_size", [8, 24])
def test_a_first_loss_that_is_not_finite_stops_training(bert, tmp_path, batch_size):
    model, steps = adapted(bert), []
    model.register_forward_hook(lambda module, inputs, output: steps.append(output.loss.mul_(math.inf)))
    message = r"^the loss of step 1 is inf, before anything was trained: .*; load it in another dtype"
    with pytest.raises(NonFiniteError, match=message):
        train(model, bert, tmp_path, epochs=batch_size / 24, batch_size=batch_size)
    assert len(steps) == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_named_before_training(bert, tmp_path):
    model = adapted(bert)
    layer = model.bert.encoder.layer[1].attention.self.key
    layer.weight.data[2, 3] = math.nan
    model.register_forward_hook(lambda *_: pytest.fail("training began"))
    name = re.escape("bert.encoder.layer.1.attention.self.key.weight")
    with pytest.raises(NonFiniteError, match=rf"^{name} of the model holds NaN or Inf; its checkpoint is damaged"):
        train(model, bert, tmp_path)


@pytest.mark.gpu
def test_training_on_the_gpu(bert, tmp_path):
    model = adapted(bert)
    tokenizer = hf.load_tokenizer(bert)
    rows = [Row((text,), label) for text, label in tiny_models.sentences(24)]
    examples = hf.encode_classification(tokenizer, rows, labels=[0, 1], max_length=32)
    history = hf.train_with_trainer(model, examples, tmp_path, pad_token_id=0, batch_size=8, epochs=1, progress=False)
    assert model.device.type == "cuda"
    assert all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry)
