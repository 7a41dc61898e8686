"""Real architectures with random weights, against transformers' own losses of one unpadded sequence at a time."""

import pytest
import torch

from sensilora.sensitivity import calibrate
from sensilora.targets import find_targets
from tests.sensitivity.oracles import assert_close, diagonals, fisher_oracle, pad, sequences
from tests.sensitivity.test_activation import activation_oracle

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 3, 7)
WIDE = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 12}


def bert():
    config = transformers.BertConfig(**WIDE, num_labels=3, max_position_embeddings=32, initializer_range=0.3)
    model = transformers.BertForSequenceClassification(config).double()
    torch.nn.init.normal_(model.classifier.bias)
    return model


def gpt2(cls=transformers.GPT2LMHeadModel, **options):
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=32, n_embd=8, n_layer=2, n_head=2, initializer_range=0.3, **options
    )
    return cls(config).double()


def llama(cls=transformers.LlamaForCausalLM, **options):
    config = transformers.LlamaConfig(**WIDE, num_key_value_heads=1, initializer_range=0.3, **options)
    return cls(config).double()


def t5():
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).double()


def bart():
    config = transformers.BartConfig(
        vocab_size=20,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_position_embeddings=32,
        init_std=0.3,
        decoder_start_token_id=2,
    )
    return transformers.BartForConditionalGeneration(config).double()


def summed(model, counted, **inputs):
    """The model's own mean loss times the number of labels it is a mean of."""
    return lambda: model(**inputs).loss * counted


@pytest.mark.parametrize("mode", ["per_sequence", "per_position"])
def test_bert_classifier(mode):
    model, ids, labels = bert(), sequences(*LENGTHS), [2, 0, 1]
    losses = [summed(model, 1, input_ids=x, labels=torch.tensor([y])) for x, y in zip(ids, labels, strict=True)]
    expected = fisher_oracle(model, losses, mode=mode)
    padded, mask = pad(ids, to=9)
    batch = transformers.BatchEncoding({"input_ids": padded, "attention_mask": mask, "label": torch.tensor(labels)})
    report, found = diagonals(model.train(), [batch], estimator="fisher", mode=mode)
    assert_close(found, expected, rtol=1e-6)
    assert report["bert.pooler.dense"].tokens == 3
    assert report["bert.encoder.layer.0.output.dense"].shape == (8, 12)
    assert model.training
    assert report.versions["transformers"] == transformers.__version__

    expected = activation_oracle(model, [{"input_ids": x} for x in ids], tokens=sum(LENGTHS))
    assert_close(diagonals(model, [batch])[1], expected, rtol=1e-6)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("mode", ["per_sequence", "per_position"])
def test_causal_language_models(make, mode):
    model, ids = make(), sequences(*LENGTHS)
    losses = [summed(model, x.shape[1] - 1, input_ids=x, labels=x) for x in ids]
    expected = fisher_oracle(model, losses, mode=mode)
    # Their norms and softmax run in fp32 inside, so fp64 agrees to fp32's precision only.
    padded, mask = pad(ids, to=8)
    batch = {"input_ids": padded, "attention_mask": mask, "labels": padded}
    report, found = diagonals(model, [batch], estimator="fisher", mode=mode)
    assert_close(found, expected, rtol=1e-4)
    assert "lm_head" not in report
    for name, module in find_targets(model).items():
        if make is gpt2:
            assert report[name].shape == tuple(reversed(module.weight.shape))
    expected = activation_oracle(model, [{"input_ids": x} for x in ids], tokens=sum(LENGTHS))
    assert_close(diagonals(model, [batch])[1], expected, rtol=1e-5)


def test_left_padding_of_a_rotary_model():
    model, ids = llama(), sequences(*LENGTHS)
    losses = [summed(model, x.shape[1] - 1, input_ids=x, labels=x) for x in ids]
    expected = fisher_oracle(model, losses)
    padded, mask = pad(ids, left=True)
    batch = {"input_ids": padded, "attention_mask": mask, "labels": padded}
    assert_close(diagonals(model, [batch], estimator="fisher")[1], expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_model_with_gradient_checkpointing_enabled(use_reentrant):
    model, ids = llama(), sequences(6, 6)
    batch = {"input_ids": torch.cat(ids), "labels": torch.cat(ids)}
    expected = calibrate(model, [batch], estimator="fisher", progress=False)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    for layer in model.model.layers:
        # Called again where the backward pass computes the layer anew.
        layer.input_layernorm.register_forward_pre_hook(lambda *args: runs.append(args))
    report = calibrate(model.train(), [batch], estimator="fisher", progress=False)
    assert report.matrices == expected.matrices
    assert len(runs) == (2 if use_reentrant else 4)
    assert all(module.training for module in model.modules())
    assert model.is_gradient_checkpointing


def test_layers_that_drop_something_are_not_checkpointed():
    """Bart's ask for their own mode, and would drop in training mode."""
    model, ids = bart(), torch.cat(sequences(6, 6))
    batch = {"input_ids": ids, "labels": ids}
    expected = calibrate(model, [batch], estimator="fisher", progress=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert calibrate(model.train(), [batch], estimator="fisher", progress=False).matrices == expected.matrices


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("same_length", [False, True])
def test_encoder_decoder(make, same_length):
    """Two token axes: also where both have one length, each module takes the mask of its own."""
    model, ids = make(), sequences(4, 6, 2)
    labels = sequences(6, 3, 2) if same_length else sequences(3, 5, 2)
    pairs = list(zip(ids, labels, strict=True))
    losses = [summed(model, y.shape[1], input_ids=x, labels=y) for x, y in pairs]
    expected = fisher_oracle(model, losses)
    padded, mask = pad(ids)
    batch = {"input_ids": padded, "attention_mask": mask, "labels": pad(labels, value=-100)[0]}
    report, found = diagonals(model, [batch], estimator="fisher")
    assert_close(found, expected, rtol=1e-4)
    inputs, outputs = sum(x.shape[1] for x in ids), sum(y.shape[1] for y in labels)
    for name in report:
        cross = any(
            part in name for part in ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k", "encoder_attn.v")
        )
        reads_encoder = cross or ("encoder." in name and "decoder." not in name)
        assert report[name].tokens == (inputs if reads_encoder else outputs), name
    assert report.tokens == inputs

    expected = activation_oracle(model, [{"input_ids": x, "labels": y} for x, y in pairs], tokens=inputs)
    assert_close(diagonals(model, [batch])[1], expected, rtol=1e-5)


def test_masked_language_model_and_token_classification_are_not_shifted():
    ids, labels = torch.cat(sequences(6, 6)), torch.cat(sequences(6, 6, seed=1))
    config = transformers.BertConfig(**WIDE, num_labels=20, initializer_range=0.3)
    for cls in (transformers.BertForMaskedLM, transformers.BertForTokenClassification):
        model = cls(config).double()
        if cls is transformers.BertForTokenClassification:
            torch.nn.init.normal_(model.classifier.bias)
        losses = [summed(model, 6, input_ids=x[None], labels=y[None]) for x, y in zip(ids, labels, strict=True)]
        expected = fisher_oracle(model, losses)
        batch = {"input_ids": ids, "labels": labels}
        assert_close(diagonals(model, [batch], estimator="fisher")[1], expected, rtol=1e-6)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_problem_type_decides_the_loss(problem):
    config = transformers.BertConfig(**WIDE, num_labels=3, problem_type=problem, initializer_range=0.3)
    model, ids = transformers.BertForSequenceClassification(config).double(), torch.cat(sequences(6, 6))
    torch.nn.init.normal_(model.classifier.bias)
    labels = torch.rand(2, 3).round().double()
    # transformers averages over the three outputs; ours is the likelihood, with 1/2 before a square.
    factor = 3 * (0.5 if problem == "regression" else 1)
    losses = [summed(model, factor, input_ids=x[None], labels=y[None]) for x, y in zip(ids, labels, strict=True)]
    expected = fisher_oracle(model, losses)
    batch = {"input_ids": ids, "labels": labels}
    assert_close(diagonals(model, [batch], estimator="fisher")[1], expected, rtol=1e-6)


def test_multiple_choice_folds_the_choices_into_the_batch():
    model = transformers.BertForMultipleChoice(transformers.BertConfig(**WIDE, initializer_range=0.3)).double()
    torch.nn.init.normal_(model.classifier.bias)
    ids, labels = torch.randint(1, 20, (2, 4, 6)), torch.tensor([1, 3])
    losses = [summed(model, 1, input_ids=x[None], labels=y[None]) for x, y in zip(ids, labels, strict=True)]
    expected = fisher_oracle(model, losses)
    found = diagonals(model, [{"input_ids": ids, "labels": labels}], estimator="fisher")[1]
    assert_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["activation", "fisher"])
def test_half_precision(dtype, estimator):
    model, ids = llama().to(dtype), torch.cat(sequences(8, 8, 8, 8))
    batch = {"input_ids": ids, "labels": ids}
    low = calibrate(model, [batch], estimator=estimator, progress=False)
    high = calibrate(model.float(), [batch], estimator=estimator, progress=False)
    for name in high:
        assert low[name].trace == pytest.approx(high[name].trace, rel=0.15)
