"""Finding weight matrices, heads and fingerprints."""

import pytest
import torch
from torch import nn

from sensilora.errors import AdapterError, TargetError
from sensilora.nn import VarRankLoRALinear
from sensilora.targets import (
    find_targets,
    fingerprint,
    first_non_finite_parameter,
    head_names,
    matrix_shape,
    model_id,
)

transformers = pytest.importorskip("transformers")


def bert(labels=3, **kwargs):
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
        num_labels=labels,
        **kwargs,
    )
    return transformers.BertForSequenceClassification(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))


def test_all_linear_leaves_the_head_out():
    names = list(find_targets(bert()))
    assert len(names) == 2 * 6 + 1
    assert names[0] == "bert.encoder.layer.0.attention.self.query"
    assert names[-1] == "bert.pooler.dense"


def test_conv1d_is_found_and_its_shape_is_out_in():
    targets = find_targets(gpt2())
    assert "lm_head" not in targets
    assert matrix_shape(targets["transformer.h.0.attn.c_attn"]) == (48, 16)


def test_selection_by_regular_expression_and_by_suffix():
    model = bert()
    assert set(find_targets(model, r".*layer\.1.*(query|key)")) == {
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.self.key",
    }
    assert list(find_targets(model, ["value", "bert.pooler.dense"])) == [
        "bert.encoder.layer.0.attention.self.value",
        "bert.encoder.layer.1.attention.self.value",
        "bert.pooler.dense",
    ]
    assert list(find_targets(model, ["classifier"])) == ["classifier"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj", "targets 'q_proj' match no linear module; the model has, for example, bert"),
        (["query", "q_proj"], "target 'q_proj' matches no linear module"),
        ("(", "not a valid regular expression"),
        ([], "match no linear module"),
    ],
)
def test_no_match(targets, message):
    with pytest.raises(TargetError, match=message):
        find_targets(bert(), targets)


def test_model_without_matrices():
    with pytest.raises(TargetError, match=r"holds no nn\.Linear"):
        find_targets(nn.Sequential(nn.ReLU()))


def test_head_names():
    assert head_names(bert()) == {"classifier"}
    assert head_names(gpt2()) == {"lm_head"}


class _Packed(torch.Tensor):
    """A weight as another library packs it: it says that it is a dense matrix."""

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers):
        self.numbers = numbers

    def __tensor_flatten__(self):
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return _Packed(inner["numbers"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return _Packed(args[0].numbers)
        raise NotImplementedError(func)


def test_weights_that_another_library_packed_are_refused():
    model = bert()
    query = model.bert.encoder.layer[0].attention.self.query
    query.weight = nn.Parameter(_Packed(torch.ones(16, 16, dtype=torch.int8)), requires_grad=False)
    with pytest.raises(
        TargetError, match=r"the weight of bert\.encoder.*query is packed \(_Packed of torch.float32\)"
    ):
        find_targets(model)
    with pytest.raises(AdapterError, match=r"the weight of the base layer is packed \(_Packed\)"):
        VarRankLoRALinear(query, 2)
    packed = nn.Linear(8, 8)
    packed.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match="is packed"):
        VarRankLoRALinear(packed, 2)


def test_fingerprint_ignores_adapters_and_heads_but_not_sizes():
    base = fingerprint(bert())
    assert fingerprint(bert(labels=7)) == base
    assert fingerprint(bert(max_position_embeddings=64)) != base
    adapted = bert()
    query = adapted.bert.encoder.layer[0].attention.self.query
    adapted.bert.encoder.layer[0].attention.self.query = VarRankLoRALinear(query, 2)
    assert fingerprint(adapted) == base


def test_model_id():
    assert model_id(nn.Linear(2, 2)) == "Linear"
    model = bert()
    model.config._name_or_path = model.name_or_path = "org/name"
    assert model_id(model) == "org/name"


def test_first_non_finite_parameter():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert first_non_finite_parameter(model) is None
    with torch.no_grad():
        model[1].weight[2, 1] = float("nan")
    assert first_non_finite_parameter(model) == "1.weight"
