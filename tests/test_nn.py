"""VarRankLoRALinear: function, gradients, merging, resizing."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import sensilora.nn
from sensilora.errors import AdapterError, RankError
from sensilora.nn import VarRankLoRALinear
from tests.tolerances import relative_error

transformers_utils = pytest.importorskip("transformers.pytorch_utils")


def make_base(kind, out_features=6, in_features=8, dtype=torch.float32):
    if kind == "linear":
        return nn.Linear(in_features, out_features, dtype=dtype)
    conv = transformers_utils.Conv1D(out_features, in_features).to(dtype)
    nn.init.normal_(conv.bias)
    return conv


def trained(base, rank=3, **kwargs):
    """A layer whose lora_B is no longer zero."""
    layer = VarRankLoRALinear(base, rank, scaling=0.7, **kwargs)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.fixture(params=["linear", "conv1d"])
def kind(request):
    return request.param


def test_a_new_adapter_changes_nothing(kind):
    base = make_base(kind)
    x = torch.randn(4, 5, 8)
    expected = base(x)
    layer = VarRankLoRALinear(base, 3)
    torch.testing.assert_close(layer(x), expected)
    assert (layer.rank, layer.scaling, layer.in_features, layer.out_features) == (3, 1.0, 8, 6)
    assert layer.lora_A.shape == (3, 8)
    assert layer.lora_B.shape == (6, 3)


def test_formula_and_gradients(kind):
    layer = trained(make_base(kind))
    x = torch.randn(4, 5, 8, requires_grad=True)
    y = layer(x)
    weight = layer.weight if kind == "linear" else layer.weight.T
    expected = linear(x, weight, layer.bias) + 0.7 * linear(linear(x, layer.lora_A), layer.lora_B)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, (x, layer.lora_A, layer.lora_B), upstream)
    y.backward(upstream)
    for got, reference in zip((x.grad, layer.lora_A.grad, layer.lora_B.grad), wanted, strict=True):
        torch.testing.assert_close(got, reference)
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
def test_the_output_may_be_changed_in_place(shape):
    layer = trained(nn.Linear(8, 6))
    x = torch.randn(shape)
    wanted = torch.autograd.grad((2 * layer(x)).sum(), layer.lora_B)
    torch.testing.assert_close(torch.autograd.grad(layer(x).mul_(2).sum(), layer.lora_B), wanted)


def test_no_bias_and_no_input_gradient():
    layer = trained(nn.Linear(8, 6, bias=False))
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.bias is None
    assert layer.lora_A.grad.abs().sum() > 0


def test_rank_zero_is_the_base_layer(kind):
    base = make_base(kind)
    layer = VarRankLoRALinear(base, 0, dropout=0.5)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), base(x))


def test_dropout_only_while_training():
    layer = trained(nn.Linear(8, 6), dropout=0.5)
    x = torch.randn(64, 8)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_merge_and_unmerge(kind):
    layer = trained(make_base(kind, dtype=torch.float64))
    weight = layer.weight.clone()
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = layer(x)
    layer.merge()
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), expected)
    assert "merged" in repr(layer)
    layer.unmerge()
    layer.unmerge()
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer(x), expected)


def test_merge_into_bfloat16_rounds_once():
    layer = trained(nn.Linear(8, 6, dtype=torch.bfloat16))
    exact = layer.weight.float() + 0.7 * (layer.lora_B @ layer.lora_A)
    layer.merge()
    assert torch.equal(layer.weight, exact.bfloat16())


@pytest.mark.parametrize("rank", [3, 4, 6])
def test_growing_keeps_the_function_exactly(kind, rank):
    layer = trained(make_base(kind, dtype=torch.float64))
    delta = layer.delta_weight()
    layer.resize_rank(rank)
    assert layer.rank == rank
    assert torch.equal(layer.delta_weight(), delta)
    assert torch.equal(layer.lora_B[:, 3:], torch.zeros(6, rank - 3, dtype=torch.float64))
    assert (layer.lora_A.abs().sum(1) > 0).all()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_shrinking_is_the_best_approximation(rank):
    layer = trained(nn.Linear(8, 6, dtype=torch.float64), rank=4)
    delta = layer.delta_weight()
    singular = torch.linalg.svdvals(delta)
    layer.resize_rank(rank)
    # Eckart-Young: no matrix of this rank is nearer than the root of the dropped squares.
    error = torch.linalg.matrix_norm(layer.delta_weight() - delta)
    torch.testing.assert_close(error, singular[rank:].square().sum().sqrt())


def test_shrinking_a_rank_deficient_adapter_is_exact():
    layer = trained(nn.Linear(8, 6, dtype=torch.float64), rank=4)
    with torch.no_grad():
        layer.lora_B[:, 2:] = 0
    delta = layer.delta_weight()
    layer.resize_rank(2)
    torch.testing.assert_close(layer.delta_weight(), delta)


def test_shrinking_an_untrained_adapter_leaves_it_trainable():
    layer = VarRankLoRALinear(nn.Linear(8, 6), 4)
    layer.resize_rank(2)
    assert not layer.delta_weight().any()
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.lora_B.grad.abs().sum() > 0


def test_a_failed_resize_leaves_the_layer_as_it_was():
    layer = trained(nn.Linear(8, 6), rank=4)
    with torch.no_grad():
        layer.lora_B[0, 0] = float("nan")
    before = layer.lora_B
    with pytest.raises(torch.linalg.LinAlgError):
        layer.resize_rank(2)
    assert layer.rank == 4
    assert layer.lora_B is before


def test_resizing_a_merged_adapter_is_refused():
    layer = trained(nn.Linear(8, 6))
    layer.merge()
    with pytest.raises(AdapterError, match="unmerge"):
        layer.resize_rank(2)


@pytest.mark.parametrize(
    ("base", "wanted", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapter_dtype(base, wanted, expected):
    layer = VarRankLoRALinear(nn.Linear(8, 6, dtype=base), 2, adapter_dtype=wanted)
    assert layer.lora_A.dtype == layer.lora_B.dtype == expected
    assert layer(torch.randn(3, 8, dtype=base)).dtype == base


def test_init_distributions():
    kaiming = VarRankLoRALinear(nn.Linear(4096, 64), 16).lora_A
    assert kaiming.abs().max() <= 1 / 64
    assert relative_error(kaiming.std(), torch.tensor(1 / 64 / 3**0.5)) < 0.02
    gaussian = VarRankLoRALinear(nn.Linear(4096, 64), 16, init="gaussian").lora_A
    assert relative_error(gaussian.std(), torch.tensor(1 / 16)) < 0.02


def test_deepcopy_and_state_dict_round_trip(kind):
    layer = trained(make_base(kind))
    x = torch.randn(3, 8)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    other = VarRankLoRALinear(make_base(kind), 3, scaling=0.7)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert "rank=3" in repr(layer)


def test_a_quantised_base_that_passes_no_gradient_on_is_told(monkeypatch):
    layer = VarRankLoRALinear(nn.Linear(8, 6), 2)
    monkeypatch.setattr("sensilora.nn.is_quantised", lambda module: True)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x)
    layer.base_layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)  # as bitsandbytes marks it
    with torch.no_grad():
        layer(x)
    layer(x.detach())  # the first layer's input needs none
    with pytest.raises(AdapterError, match="the quantised base layer passes no gradient on"):
        layer(x)


def test_keeps_the_base_layers_mode():
    assert not VarRankLoRALinear(nn.Linear(4, 4).eval(), 2).training


@pytest.mark.parametrize("rank", [-1, 7])
def test_rank_out_of_range(rank):
    with pytest.raises(RankError, match=rf"rank {rank} does not fit a 6x8 matrix; give 0 to 6"):
        VarRankLoRALinear(nn.Linear(8, 6), rank)
    layer = VarRankLoRALinear(nn.Linear(8, 6), 2)
    with pytest.raises(RankError):
        layer.resize_rank(rank)
    assert layer.rank == 2


@pytest.mark.parametrize("rank", [2.5, 2.0, "2", None])
def test_a_rank_is_a_whole_number(rank):
    with pytest.raises(RankError, match=rf"^a rank must be a whole number, not {rank!r}$"):
        VarRankLoRALinear(nn.Linear(8, 6), rank)
    layer = VarRankLoRALinear(nn.Linear(8, 6), np.int64(2))
    assert type(layer.rank) is int
    with pytest.raises(RankError, match="a rank must be a whole number"):
        layer.resize_rank(rank)
    layer.resize_rank(np.int32(3))
    assert type(layer.rank) is int
    assert layer.rank == layer.lora_A.shape[0] == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"base_layer": nn.Embedding(3, 4)}, AdapterError, "not Embedding"),
        ({"init": "zeros"}, ValueError, "init 'zeros' is unknown"),
        ({"dropout": 1.5}, ValueError, "dropout must be in"),
        ({"adapter_dtype": torch.int8}, ValueError, "adapter_dtype must be of floating point, not torch.int8"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        VarRankLoRALinear(**{"base_layer": nn.Linear(8, 6), "rank": 2, **arguments})


def test_a_layer_refused_leaves_its_base_as_it_was():
    base = nn.Linear(8, 6)
    for arguments in ({"adapter_dtype": torch.int8}, {"scaling": "two"}, {"rank": 9}):
        with pytest.raises((ValueError, RankError)):
            VarRankLoRALinear(base, **{"rank": 2, **arguments})
    assert base.weight.requires_grad


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_base_with_a_forward_of_its_own_is_called():
    x = torch.randn(5, 8)
    layer = trained(Doubled(8, 6))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.delta_weight().T)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_base_fire(register):
    layer, fired = trained(nn.Linear(8, 6)), []
    x = torch.randn(5, 8)
    expected = layer(x)
    getattr(layer.base_layer, register)(lambda *args: fired.append(1))
    torch.testing.assert_close(layer(x), expected)
    assert fired == [1]


def test_a_forward_put_on_the_base_is_called():
    """As accelerate does to move weights."""
    layer = trained(nn.Linear(8, 6))
    x = torch.randn(5, 8)
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * forward(x)
    torch.testing.assert_close(layer(x), 2 * forward(x) + x @ layer.delta_weight().T)


def test_functional_call_with_plain_tensors(kind):
    layer = trained(make_base(kind))
    x = torch.randn(5, 8)
    other = {name: torch.randn_like(parameter) for name, parameter in layer.named_parameters()}
    got = torch.func.functional_call(layer, other, x)
    layer.load_state_dict(other)
    torch.testing.assert_close(got, layer(x))


def test_replicas_of_data_parallel(kind):
    """Their parameters are plain tensors in the modules' attributes."""
    from torch.nn.parallel.replicate import _replicatable_module

    layer = trained(make_base(kind))
    assert _replicatable_module(layer)
    replica = layer._replicate_for_data_parallel()
    base = replica.base_layer = layer.base_layer._replicate_for_data_parallel()
    replica._modules["base_layer"] = base
    for copied, module in ((replica, layer), (base, layer.base_layer)):
        copied._parameters = {}
        for name, parameter in module._parameters.items():
            setattr(copied, name, None if parameter is None else parameter * 1.0)
    x = torch.randn(5, 8)
    torch.testing.assert_close(replica(x), layer(x))


def test_a_parametrised_base():
    base = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
    x = torch.randn(5, 8)
    expected = base(x)
    layer = trained(base)
    torch.testing.assert_close(layer(x), expected + x @ layer.delta_weight().T)


def test_a_parametrised_base_is_not_merged_into():
    layer = trained(torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)))
    with pytest.raises(AdapterError, match="computed by a parametrisation, so there is nothing to merge into"):
        layer.merge()
    assert not layer.merged


def test_an_attentions_output_projection_is_refused():
    with pytest.raises(AdapterError, match=r"nn\.MultiheadAttention, which reads its weight and never calls it"):
        VarRankLoRALinear(nn.MultiheadAttention(8, 2).out_proj, 2)


def test_accelerates_hooks_that_only_move_inputs_leave_the_layer_fused(monkeypatch):
    hooks = pytest.importorskip("accelerate.hooks")
    calls, lora_linear = [], sensilora.nn.lora_linear
    monkeypatch.setattr(
        sensilora.nn, "lora_linear", lambda *args, **kwargs: calls.append(1) or lora_linear(*args, **kwargs)
    )
    layer = trained(nn.Linear(8, 6))
    x = torch.randn(5, 8)
    expected = layer(x)
    for offload, fused in ((False, 2), (True, 2)):
        hooks.add_hook_to_module(layer.base_layer, hooks.AlignDevicesHook(execution_device="cpu", offload=offload))
        torch.testing.assert_close(layer(x), expected)
        assert len(calls) == fused
        hooks.remove_hook_from_module(layer.base_layer)
