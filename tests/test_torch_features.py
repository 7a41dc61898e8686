"""Adapters under the rest of torch: compile, CUDA graphs, AMP, checkpointing, DDP, copies, determinism, resizing.

Dropout is checked without knowing the seed. A layer without a bias is linear in its input at a fixed mask, and its
update is linear in A and in B; so <dy, y> = <dx, x> for every row and <dy, update> = <dA, A> = <dB, B>, but only
where forward and backward drop the same elements. And a model repeats its masks after manual_seed.
"""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn.functional import linear

from benchmarks.harness import captured
from sensilora.adapters import adapter_layers, inject
from sensilora.errors import BackendError
from sensilora.nn import VarRankLoRALinear
from sensilora.ops import lora_linear
from sensilora.plan import RankPlan
from sensilora.targets import matrix_shape
from tests.tolerances import RELATIVE, relative_error

transformers = pytest.importorskip("transformers")
from tests import tiny_models  # noqa: E402

RANKS = (5, 3, 1, 7, 2, 4, 6)  # of the seven projections of a layer


def make_layer(device, *, rank=5, dropout=0.3, in_features=24, out_features=16, dtype=torch.float32):
    layer = VarRankLoRALinear(
        nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype),
        rank,
        scaling=0.7,
        dropout=dropout,
    )
    nn.init.normal_(layer.lora_B)
    return layer


def make_llama(device, *, dropout=0.3, groups=False, attn_implementation="eager", **config):
    """A tiny Llama with adapters of different ranks on every projection, one of them of rank 0.

    Attention is plain torch, since the fused kernels' backward need not repeat itself.
    """
    torch.manual_seed(1)
    config = tiny_models.llama_config(attn_implementation=attn_implementation, **config)
    model = transformers.LlamaForCausalLM(config).to(device)
    shapes = {name: matrix_shape(module) for name, module in model.named_modules() if name.endswith("_proj")}
    ranks = dict(zip(shapes, RANKS * config.num_hidden_layers, strict=True))
    ranks[next(iter(shapes))] = 0
    plan = RankPlan.uniform(shapes, 1).with_ranks(ranks)
    inject(model, plan, dropout=dropout, groups=groups, strict=False)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model.train()


def make_ids(device, batch=3, length=10):
    return torch.randint(24, (batch, length), device=device)


def trainable(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def loss_and_grads(model, ids, *, seed=5):
    """The loss and every adapter's gradient, masks drawn anew from `seed`."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in trainable(model))]


def assert_equal(got, wanted):
    for value, reference in zip(got, wanted, strict=True):
        assert torch.equal(value, reference)


def assert_close(got, wanted, tolerance=1e-5):
    for value, reference in zip(got, wanted, strict=True):
        assert relative_error(value, reference) <= tolerance


def assert_masks_agree(layer, x, y, upstream, tolerance=2e-6):
    """Of a layer without a bias and its input, after backward with `upstream`: gradients have the output's mask."""
    x_rows, x_grad, y, upstream = (
        tensor.detach().double().reshape(-1, tensor.shape[-1]) for tensor in (x, x.grad, y, upstream)
    )
    update = y - linear(x_rows, layer.weight.double())
    scale = y.norm() * upstream.norm()
    # Row by row, where another mask would show most; the norm of what rows of such sizes give is scale / √rows.
    rows = torch.sum(x_grad * x_rows, 1) - torch.sum(y * upstream, 1)
    assert float(rows.norm()) <= tolerance * float(scale) / len(rows) ** 0.5
    for matrix in (layer.lora_A, layer.lora_B):
        difference = torch.sum(matrix.grad.double() * matrix.detach()) - torch.sum(update * upstream)
        assert abs(float(difference)) <= tolerance * float(scale)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


class TestCompile:
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_layer_equals_eager(self, device, backend, dropout):
        layer = make_layer(device, dropout=dropout)
        x = torch.randn(2, 9, 24, device=device, requires_grad=True)
        upstream = torch.randn(2, 9, 16, device=device)
        # Inductor has a generator of its own, unless it is told to use torch's.
        with torch._inductor.config.patch(fallback_random=True):
            compiled = torch.compile(layer, fullgraph=True, backend=backend)
            results = []
            for function in (layer, compiled):
                torch.manual_seed(3)
                layer.zero_grad()
                x.grad = None
                y = function(x)
                y.backward(upstream)
                results.append([y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad])
        assert_close(results[1], results[0], 2e-6)

    def test_masks_agree_under_inductors_own_generator(self, device):
        layer = make_layer(device)
        compiled = torch.compile(layer, fullgraph=True)
        outputs = []
        for _ in range(2):
            layer.zero_grad()
            x = torch.ones(64, 24, device=device, requires_grad=True)
            upstream = torch.randn(64, 16, device=device)
            y = compiled(x)
            y.backward(upstream)
            assert_masks_agree(layer, x, y, upstream)
            outputs.append(y.detach())
        assert not torch.equal(*outputs)

    def test_a_changing_batch_compiles_at_most_twice(self, device):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        layer = make_layer(device)
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for batch in (4, 7, 9, 30, 2):
            x = torch.randn(batch, 5, 24, device=device, requires_grad=True)
            y = compiled(x)
            upstream = torch.randn_like(y)
            layer.zero_grad()
            y.backward(upstream)
            assert_masks_agree(layer, x, y, upstream)
        # Once for the first size, once for any size.
        assert counter.frame_count <= 2

    @pytest.mark.parametrize("groups", [False, True])
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
    def test_llama_equals_eager(self, device, backend, groups):
        if backend == "inductor" and device == "cpu":
            pytest.skip("minutes of C++ compilation")
        model = make_llama(device, groups=groups, num_hidden_layers=1)
        ids = make_ids(device)
        wanted = loss_and_grads(model, ids)
        with torch._inductor.config.patch(fallback_random=True):
            compiled = torch.compile(model, fullgraph=True, backend=backend)
            got = loss_and_grads(compiled, ids)
        assert_close(got, wanted)

    def test_a_llama_compiles_at_most_twice(self, device):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        model = make_llama(device, num_hidden_layers=1, groups=True)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for batch in (3, 5, 6, 2):
            loss_and_grads(compiled, make_ids(device, batch=batch))
        assert counter.frame_count <= 2

    def test_export_with_any_batch(self, device):
        layer = make_layer(device).eval()
        batch = {0: torch.export.Dim.DYNAMIC}
        exported = torch.export.export(layer, (torch.randn(4, 24, device=device),), dynamic_shapes=(batch,))
        x = torch.randn(7, 24, device=device)
        assert torch.equal(exported.module()(x), layer(x))

    def test_resized_layer_compiles_again(self, device):
        layer = make_layer(device, dropout=0.0)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(6, 24, device=device)
        for rank in (5, 8, 2, 0):
            layer.resize_rank(rank)
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.gpu
class TestCUDAGraph:
    """Seeds come from torch's CUDA generator, which a capture registers: every replay draws on.

    The models have sdpa attention because transformers' eager mask copies a number to the device, which no capture
    allows.
    """

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("rows", [64, 2304])
    def test_each_replay_draws_a_mask_that_backward_repeats(self, dtype, rows):
        layer = make_layer("cuda", dtype=dtype, in_features=64, out_features=128)
        x = torch.ones(rows, 64, device="cuda", dtype=dtype, requires_grad=True)
        upstream = torch.randn(rows, 128, device="cuda").to(dtype)

        def step():
            y = layer(x)
            return y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), upstream)

        replay = captured(step)
        seen = []
        for _ in range(3):
            y, x.grad, layer.lora_A.grad, layer.lora_B.grad = replay()
            assert_masks_agree(layer, x, y, upstream, 2e-6 if dtype == torch.float32 else 5e-3)
            seen.append(y.clone())
        assert not torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[1], seen[2])

    @pytest.mark.parametrize("groups", [False, True])
    def test_a_captured_training_step_equals_eager_steps(self, monkeypatch, groups):
        for limit in ("LAUNCH_BOUND_FLOPS", "NATIVE_ROWS"):
            monkeypatch.setattr(f"sensilora.ops._products.{limit}", 0)  # as in a graph
        models = [make_llama("cuda", dropout=0.0, groups=groups, attn_implementation="sdpa") for _ in range(2)]
        ids = make_ids("cuda")

        def stepper(model):
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, capturable=True)

            def step():
                optimizer.zero_grad(set_to_none=False)
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                return loss

            return step

        eager = stepper(models[0])
        replay = captured(stepper(models[1]))
        for _ in range(3):
            eager()  # as many as the capture's warm-up took
        for _ in range(3):
            assert relative_error(replay(), eager()) <= 1e-5
        assert_close(trainable(models[1]), trainable(models[0]), 1e-4)

    def test_replays_of_a_training_step_with_dropout_differ(self):
        model = make_llama("cuda", dropout=0.5, attn_implementation="sdpa")
        ids = make_ids("cuda")
        replay = captured(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
        assert len({float(replay()) for _ in range(4)}) == 4


class TestAMP:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_training_step_with_autocast_and_a_scaler(self, device, dtype):
        model, ids = make_llama(device, dropout=0.0), make_ids(device)
        exact = loss_and_grads(model, ids)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=256.0, enabled=dtype == torch.float16)
        model.zero_grad()
        with torch.autocast(device, dtype=dtype):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads = [parameter.grad for parameter in trainable(model)]
        assert all(grad.dtype == torch.float32 for grad in grads)
        assert_close([loss, *grads], exact, 10 * RELATIVE[dtype])
        before = [parameter.detach().clone() for parameter in trainable(model)]
        scaler.step(optimizer)
        scaler.update()
        assert all(not torch.equal(*pair) for pair in zip(before, trainable(model), strict=True))

    def test_the_scaler_skips_a_step_that_overflows(self, device):
        layer = make_layer(device, dropout=0.3)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
        before = [parameter.detach().clone() for parameter in layer.parameters()]
        with torch.autocast(device, dtype=torch.float16):
            loss = layer(torch.full((8, 24), 100.0, device=device)).float().square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() < 2.0**16
        assert_equal(layer.parameters(), before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    def test_casts_what_linear_casts(self, device, dtype):
        layer = make_layer(device, dropout=0.0, dtype=dtype)
        x = torch.randn(3, 24, device=device, dtype=dtype)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert layer(x).dtype == linear(x, layer.weight).dtype
        assert layer(x).dtype == dtype


class TestCheckpointing:
    @pytest.mark.parametrize("groups", [False, True])
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradients_are_those_without_it(self, device, use_reentrant, groups):
        model, ids = make_llama(device, groups=groups), make_ids(device)
        model.enable_input_require_grads()
        wanted = loss_and_grads(model, ids)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        assert_equal(loss_and_grads(model, ids), wanted)

    def test_keeps_no_mask_and_no_dropped_input(self, device):
        layer = make_layer(device, in_features=48, out_features=32)
        x = torch.randn(100, 48, device=device, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
            layer(x)
        parameters = {tensor.data_ptr() for tensor in (x, layer.weight, layer.lora_A, layer.lora_B)}
        added = [tensor for tensor in saved if tensor.data_ptr() not in parameters]
        # drop(x) Aᵀ, padded to a multiple of 16 columns, and the seed.
        assert sum(tensor.numel() for tensor in added) <= 100 * 16 + 1


def _join(rank, world_size, folder):
    """Make this process one of a gloo group."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )


def _ddp_worker(rank, world_size, folder, groups):
    if world_size > 1:
        torch.set_num_threads(1)
    _join(rank, world_size, folder)
    try:
        model = make_llama("cpu", dropout=0.0, groups=groups)
        torch.manual_seed(7)
        ids = make_ids("cpu", batch=4)
        parallel = nn.parallel.DistributedDataParallel(model)
        share = ids.chunk(world_size)[rank]
        for _ in range(2):  # a second step uses the buckets that the first arranged
            grads = loss_and_grads(parallel, share)[1:]
        assert_close(grads, loss_and_grads(model, ids)[1:])
    finally:
        torch.distributed.destroy_process_group()


class TestDistributed:
    @pytest.fixture(autouse=True)
    def _needs_gloo(self):
        if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
            pytest.skip("torch was built without gloo")

    def test_ddp_in_one_process(self, tmp_path):
        _ddp_worker(0, 1, tmp_path, False)

    def test_fsdp_in_one_process(self, tmp_path):
        from torch.distributed.fsdp import fully_shard

        model, ids = make_llama("cpu", groups=True), make_ids("cpu")
        wanted = loss_and_grads(model, ids)
        _join(0, 1, tmp_path)
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            loss, *grads = loss_and_grads(model, ids)
            assert_equal([loss, *(grad.full_tensor() for grad in grads)], wanted)
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("groups", [False, True])
    def test_ddp_averages_the_gradients_of_two_processes(self, tmp_path, groups):
        torch.multiprocessing.spawn(_ddp_worker, (2, tmp_path, groups), nprocs=2)


class TestCopies:
    @pytest.mark.parametrize("groups", [False, True])
    def test_copied_and_pickled_models_are_the_same_and_independent(self, device, groups):
        model, ids = make_llama(device, groups=groups), make_ids(device)
        wanted = loss_and_grads(model, ids)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_equal(loss_and_grads(other, ids), wanted)
            with torch.no_grad():
                for parameter in trainable(other):
                    parameter.zero_()
            assert_equal(loss_and_grads(model, ids), wanted)

    def test_state_dict_goes_through_a_file_without_unpickling(self, device):
        model, ids = make_llama(device), make_ids(device)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = make_llama(device)
        with torch.no_grad():
            for parameter in trainable(other):
                parameter.zero_()
        other.load_state_dict(torch.load(file, weights_only=True))
        assert_equal(loss_and_grads(other, ids), loss_and_grads(model, ids))

    def test_shapes_on_the_meta_device(self):
        layer = make_layer("meta")
        assert layer(torch.empty(3, 4, 24, device="meta")).shape == (3, 4, 16)


def train(device, steps=3):
    model, ids = make_llama(device), make_ids(device)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    torch.manual_seed(2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach().clone() for parameter in trainable(model))]


class TestDeterminism:
    def test_training_repeats_bit_for_bit(self, device):
        torch.manual_seed(0)
        first = train(device)
        torch.manual_seed(0)
        assert_equal(train(device), first)

    def test_under_deterministic_algorithms(self, device):
        torch.manual_seed(0)
        wanted = train(device)
        torch.use_deterministic_algorithms(True)
        try:
            torch.manual_seed(0)
            got = train(device)
        finally:
            torch.use_deterministic_algorithms(False)
        # Which also fills what torch.empty gives with NaN: nothing is read before it is written.
        assert all(torch.isfinite(value).all() for value in got)
        assert_close(got, wanted, 1e-5)


class TestDropout:
    def test_gradients_have_the_outputs_mask(self, device):
        layer = make_layer(device)
        x = torch.randn(4, 30, 24, device=device, requires_grad=True)
        upstream = torch.randn(4, 30, 16, device=device)
        y = layer(x)
        y.backward(upstream)
        assert_masks_agree(layer, x, y, upstream)
        with pytest.raises(AssertionError):
            assert_masks_agree(layer, x, layer(x), upstream)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_gradients_have_the_outputs_mask_in_16_bits(self, device, dtype):
        layer = make_layer(device, dtype=dtype)
        x = torch.randn(300, 24, device=device).to(dtype).requires_grad_()
        upstream = torch.randn(300, 16, device=device).to(dtype)
        y = layer(x)
        y.backward(upstream)
        assert_masks_agree(layer, x, y, upstream, 5e-3)
        with pytest.raises(AssertionError):
            assert_masks_agree(layer, x, layer(x), upstream, 5e-3)

    def test_the_base_path_is_not_dropped(self, device):
        layer = make_layer(device, dropout=1.0)
        x = torch.randn(30, 24, device=device, requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, linear(x, layer.weight))
        y.sum().backward()  # an upstream gradient with strides of zero
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(30, 24))
        assert not layer.lora_A.grad.any()

    def test_layers_and_calls_draw_masks_of_their_own(self, device):
        layer = make_layer(device)
        other = copy.deepcopy(layer)
        x = torch.randn(50, 24, device=device)
        assert not torch.equal(layer(x), layer(x))
        assert not torch.equal(layer(x), other(x))


class TestResizing:
    def test_ranks_may_change_between_steps(self, device):
        model, ids = make_llama(device), make_ids(device)
        losses = []
        for step in range(6):
            for index, layer in enumerate(adapter_layers(model).values()):
                layer.resize_rank((index + 3 * step) % 6)
            optimizer = torch.optim.SGD(trainable(model), lr=0.3)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[-1] < losses[0]


class TestRefusals:
    """What cannot be computed raises in words; nothing comes out silently wrong."""

    def test_double_backward_of_a_model(self, device):
        layer = make_layer(device)
        x = torch.randn(3, 24, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            grad.sum().backward()

    def test_forward_mode(self, device):
        layer = make_layer(device)
        x = torch.randn(3, 24, device=device)
        with pytest.raises(RuntimeError, match="forward mode"):
            torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(RuntimeError, match="forward mode"):
                layer(dual)
            layer(x)  # no tangent, nothing to lose

    def test_integers(self, device):
        layer = make_layer(device)
        x = torch.ones(3, 24, device=device, dtype=torch.int64)
        with pytest.raises(ValueError, match="weight and bias must have x's dtype"):
            layer(x)
        with torch.autocast(device, dtype=torch.bfloat16), pytest.raises(ValueError, match="must have x's dtype"):
            layer(x)
        weight = torch.ones(16, 24, device=device, dtype=torch.int64)
        with pytest.raises(BackendError, match="int64"):
            lora_linear(x, weight, None, layer.lora_A, layer.lora_B, 1.0)

    def test_tensors_on_several_devices(self, device):
        layer = make_layer(device)
        x = torch.ones(3, 24, device=device)
        for moved in range(3):
            tensors = [layer.weight, layer.lora_A, layer.lora_B]
            tensors[moved] = tensors[moved].to("meta")
            with pytest.raises(ValueError, match="on one device"):
                lora_linear(x, tensors[0], None, *tensors[1:], 1.0)

    @pytest.mark.parametrize("shape", [(), (24, 0)])
    def test_too_few_dimensions(self, device, shape):
        layer = make_layer(device)
        with pytest.raises(ValueError, match="shapes do not fit"):
            layer(torch.ones(shape, device=device))
        with pytest.raises(ValueError, match="shapes do not fit"):
            lora_linear(torch.ones(3, 24, device=device), layer.weight[0], None, layer.lora_A, layer.lora_B, 1.0)

    def test_an_empty_batch_trains_nothing(self, device):
        layer = make_layer(device)
        y = layer(torch.empty(0, 5, 24, device=device, requires_grad=True))
        assert y.shape == (0, 5, 16)
        y.sum().backward()
        assert not layer.lora_A.grad.any()
        assert not layer.lora_B.grad.any()
