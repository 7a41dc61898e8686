"""Models whose weights bitsandbytes or torchao quantised, against the same model with the dequantised weights."""

import copy
import importlib
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Trainer, TrainingArguments

import sensilora
from benchmarks.bench_quantised import _case, dequantised_weight, library_of, quantised
from benchmarks.harness import run
from sensilora import mixed
from sensilora.adapters import adapter_layers, shared_inputs
from sensilora.errors import AdapterError, CalibrationError
from sensilora.nn import VarRankLoRAGroup, VarRankLoRALinear
from sensilora.targets import find_targets, fingerprint, is_packed_for_inference, is_quantised, matrix_shape
from tests import tiny_models
from tests.tolerances import RELATIVE, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
MISSING = [library for library in ("bitsandbytes", "torchao") if importlib.util.find_spec(library) is None]
KINDS = [
    kind
    for kind in ("nf4", "nf4_double", "fp4", "bnb_8bit", "torchao_int8", "torchao_fp8")
    if library_of(kind) not in MISSING
]
if not KINDS:
    pytest.skip("neither bitsandbytes nor torchao is installed", allow_module_level=True)
# LLM.int8() rounds the activations too, to one of 127 parts of a row's largest, in the forward pass alone.
ROUNDED_INPUT = {"bnb_8bit": 0.02}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def _not_packed_for_the_cpu(monkeypatch):
    """On CPUs with bf16 instructions bitsandbytes would pack 4-bit layers, which then pass no gradient on."""
    if "bitsandbytes" not in MISSING:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.mark.skipif("bitsandbytes" in MISSING, reason="bitsandbytes is not installed")
def test_a_layer_packed_for_the_cpu_passes_no_gradient_on_and_that_is_told():
    if not importlib.import_module("bitsandbytes.functional").has_avx512bf16():
        pytest.skip("bitsandbytes packs nothing on this CPU")
    adapter = layer("nf4", "cpu", in_features=128)
    adapter.base_layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        adapter.eval()(torch.randn(3, 128))
    assert is_packed_for_inference(adapter.base_layer)
    with pytest.raises(AdapterError, match="passes no gradient on"):
        adapter.train()(torch.randn(3, 128, requires_grad=True))


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_library_is_there(library):
    if library in MISSING:
        pytest.skip(f"{library} is not installed, so its layers are not tested")
    importlib.import_module(library)


def config(kind, dtype):
    """What transformers quantises a model by."""
    if kind == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind.startswith("torchao"):
        quantization = importlib.import_module("torchao.quantization")
        name = "Int8WeightOnlyConfig" if kind == "torchao_int8" else "Float8WeightOnlyConfig"
        return TorchAoConfig(getattr(quantization, name)())
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.partition("_")[0],
        bnb_4bit_use_double_quant=kind.endswith("double"),
        bnb_4bit_compute_dtype=dtype,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.llama(
        tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=96, attention_bias=True
    )


def load(folder, kind, device, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config(kind, dtype), dtype=dtype, device_map={"": device}
    )


def dequantised(model, folder, dtype=torch.float32):
    """The model with plain layers that hold the quantised ones' weights."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(model.device)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and is_quantised(module):
                plain.get_submodule(name).weight.copy_(dequantised_weight(module))
    return plain


def layer(kind, device, dtype=torch.float32, rank=6, in_features=96, **settings):
    """An adapter layer over a quantised nn.Linear with 64 outputs, lora_B drawn too."""
    base = quantised(nn.Linear(in_features, 64, dtype=dtype, device=device), kind)
    adapter = VarRankLoRALinear(base, rank, **settings)
    nn.init.normal_(adapter.lora_B, std=0.1)
    return adapter


def batches(device, count=2):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 24, (count, 4, 9), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[:, 1, 6:] = 0
    return [
        {"input_ids": i, "attention_mask": m, "labels": i.masked_fill(m == 0, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]


def loss_of(model, batch):
    return model(**batch).loss


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def calibrate(model, device, **settings):
    return sensilora.calibrate(model, batches(device), progress=False, **settings)


def trained(model, device, **settings):
    """The model with adapters, after a few steps."""
    plan = sensilora.allocate(calibrate(model, device), average_rank=3)
    sensilora.inject(model, plan, **settings).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss_of(model, batches(device)[0]).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
)
def test_layer_matches_the_dequantised_one(kind, device, dtype, adapter_dtype, p):
    adapter = layer(kind, device, dtype, adapter_dtype=adapter_dtype, scaling=0.7, dropout=p)
    assert adapter.lora_A.dtype == (adapter_dtype or torch.float32)
    x = torch.randn(3, 5, 96, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 5, 64, device=device, dtype=dtype)
    base = adapter.base_layer(x).detach().double()
    torch.manual_seed(5)
    y = adapter(x)
    y.backward(upstream)
    assert y.dtype == dtype

    # The mask, from the op on an identity-like update: drop(x) where A picks inputs and B passes them on.
    torch.manual_seed(5)
    eye = torch.eye(96, device=device, dtype=dtype)
    dropped = sensilora.ops.lora_update(torch.zeros_like(x), x, eye, eye, 1.0, dropout_p=p).detach().double()
    leaves = [adapter.lora_A, adapter.lora_B]
    lora_A, lora_B = (leaf.detach().to(dtype).double().requires_grad_() for leaf in leaves)
    expected = base + 0.7 * linear(linear(dropped, lora_A), lora_B)
    assert relative_error(y, expected) <= 4 * RELATIVE[dtype]
    grad_A, grad_B = torch.autograd.grad(expected, (lora_A, lora_B), upstream.double())
    kept = torch.where(x.detach() == 0, 0.0, dropped / x.detach().double())
    update = kept * (0.7 * upstream.double() @ lora_B @ lora_A)
    grad_x = upstream.double() @ dequantised_weight(adapter.base_layer) + update
    for got, wanted in ((x.grad, grad_x), (adapter.lora_A.grad, grad_A), (adapter.lora_B.grad, grad_B)):
        assert relative_error(got, wanted) <= 4 * RELATIVE[dtype]
    # The base product is that of the dequantised weight, up to what the library rounds.
    plain = linear(x.detach().double(), dequantised_weight(adapter.base_layer), adapter.bias.double())
    assert relative_error(base, plain) <= max(4 * RELATIVE[dtype], ROUNDED_INPUT.get(kind, 1e-4))


def test_no_dense_weight_is_saved_for_backward(kind, device):
    adapter = layer(kind, device)
    x = torch.randn(7, 96, device=device, requires_grad=True)

    def saved_by(module):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            y = module(x)
        del y
        return sizes

    beside = saved_by(adapter)
    for size in saved_by(adapter.base_layer):
        beside.remove(size)
    # x, A, B and h, its columns padded to 16.
    assert sorted(beside) == sorted([7 * 96, 6 * 96, 6 * 64, 7 * 16])


def test_autocast(kind, device):
    adapter = layer(kind, device, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 96, device=device, dtype=dtype, requires_grad=True)
        with torch.autocast(device, torch.bfloat16):
            base, y = adapter.base_layer(x), adapter(x)
        y.float().square().sum().backward()
        assert y.dtype == base.dtype
        update = adapter.scaling * linear(
            linear(x.bfloat16().double(), adapter.lora_A.double()), adapter.lora_B.double()
        )
        assert relative_error(y, base.double() + update) <= RELATIVE[torch.bfloat16]
        assert x.grad.isfinite().all()


def test_compiles_whole(kind, device):
    adapter = layer(kind, device, torch.bfloat16)
    x = torch.randn(5, 96, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = adapter(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, y)
    assert torch.equal(torch.autograd.grad(compiled.sum(), x)[0], gradient)


def test_deepcopy_and_rank_changes(kind, device):
    adapter = layer(kind, device)
    x = torch.randn(5, 96, device=device)
    y = adapter(x)
    other = copy.deepcopy(adapter)
    assert torch.equal(other(x), y)
    other.resize_rank(9)
    assert relative_error(other(x), y) < 1e-6
    other.resize_rank(0)
    assert torch.equal(other(x), other.base_layer(x))


def test_layers_of_a_group_go_on_alone(kind, device):
    layers = [layer(kind, device, rank=rank) for rank in (3, 5)]
    x = torch.randn(5, 96, device=device)
    for got, one in zip(VarRankLoRAGroup(layers)(x), layers, strict=True):
        assert torch.equal(got, one(x))


def test_merging_raises_and_says_what_to_do(kind, device):
    adapter = layer(kind, device)
    x = torch.randn(5, 96, device=device)
    y = adapter(x)
    with pytest.raises(AdapterError, match=r"is quantised.*load it over the unquantised model and merge there"):
        adapter.merge()
    assert not adapter.merged
    assert torch.equal(adapter(x), y)


def test_benchmark_of_each_kind_is_right(kind, device):
    """Wrong results get no row."""
    row = run(_case(kind, 40, 96, 64, 5, 0.3, device=device), device, None)
    assert row["error"] < 1e-2
    assert {"eager", "PEFT"} >= row["peers"].keys() >= {"eager"}


class TestModel:
    def test_targets_shapes_and_fingerprint_are_those_before_quantisation(self, folder, kind, device):
        model = load(folder, kind, device)
        plain = AutoModelForCausalLM.from_pretrained(folder)
        found = find_targets(model)
        assert len(found) == 14
        assert all(is_quantised(module) for module in found.values())
        expected = {name: matrix_shape(module) for name, module in find_targets(plain).items()}
        assert {name: matrix_shape(module) for name, module in found.items()} == expected
        assert not any(is_quantised(module) for module in find_targets(plain).values())
        assert fingerprint(model) == fingerprint(plain)

    @pytest.mark.parametrize(
        "settings",
        [
            {"estimator": "activation"},
            {"estimator": "activation", "variant": "inverse", "block_size": 16},
            {"estimator": "fisher"},
            {"estimator": "fisher", "mode": "per_position"},
            {"estimator": "fisher", "labels": "model", "draws": 2},
        ],
        ids=lambda settings: "-".join(map(str, settings.values())),
    )
    def test_calibrates_like_the_dequantised_model(self, folder, kind, device, settings):
        model = load(folder, kind, device)
        expected = calibrate(dequantised(model, folder), device, **settings)
        report = calibrate(model, device, **settings)
        assert report.fingerprint == expected.fingerprint
        # Of the traces, since an error of the logits grows from layer to layer.
        tolerance = 0.25 if kind in ROUNDED_INPUT else 1e-3
        for name, matrix in report.matrices.items():
            assert matrix.shape == expected.matrices[name].shape
            assert matrix.trace == pytest.approx(expected.matrices[name].trace, rel=tolerance), name
            assert matrix.topk_mean == pytest.approx(expected.matrices[name].topk_mean, rel=tolerance), name

    def test_a_calibration_can_be_gone_on_from(self, folder, kind, device, tmp_path):
        model = load(folder, kind, device)
        expected = calibrate(model, device, estimator="fisher")

        def interrupted():
            yield batches(device)[0]
            raise KeyboardInterrupt

        settings = {"estimator": "fisher", "checkpoint": tmp_path / "state", "checkpoint_every": 1, "progress": False}
        with pytest.raises(KeyboardInterrupt):
            sensilora.calibrate(model, interrupted(), **settings)
        assert (tmp_path / "state").is_dir()
        report = sensilora.calibrate(model, batches(device), **settings)
        for name, matrix in report.matrices.items():
            assert matrix.trace == pytest.approx(expected.matrices[name].trace, rel=1e-5)

    def test_hutchinson_says_what_serves(self, folder, kind, device):
        model = load(folder, kind, device)
        for hvp in ("double_backward", "central_differences"):
            with pytest.raises(CalibrationError, match=r"q_proj.* is quantised.*estimator='fisher'"):
                calibrate(model, device, estimator="hutchinson", hvp=hvp)

    def test_train_save_load_and_unload(self, folder, kind, device, tmp_path):
        model, batch = load(folder, kind, device), batches(device)[0]
        before, first = logits_of(model, batch), float(loss_of(model, batch).detach())
        model = trained(model, device, dropout=0.1)
        assert all(is_quantised(adapter.base_layer) for adapter in adapter_layers(model).values())
        assert {adapter.lora_A.dtype for adapter in adapter_layers(model).values()} == {torch.float32}
        assert float(loss_of(model, batch).detach()) < first
        after = logits_of(model, batch)
        sensilora.save_adapter(model, tmp_path / "adapter")

        with pytest.raises(AdapterError, match=r"self_attn.q_proj is quantised"):
            sensilora.merge(model)
        assert torch.equal(logits_of(sensilora.unload(model), batch), before)
        assert torch.equal(logits_of(sensilora.load_adapter(model, tmp_path / "adapter"), batch), after)

        # What the error of merging says: over the unquantised model, here the dequantised one.
        plain = dequantised(sensilora.unload(model), folder)
        merged = sensilora.merge(sensilora.load_adapter(plain, tmp_path / "adapter"))
        assert relative_error(logits_of(merged, batch), after) <= 5 * ROUNDED_INPUT.get(kind, 1e-5)

    def test_a_plan_serves_before_and_after_quantisation(self, folder, kind, device):
        plain, model = AutoModelForCausalLM.from_pretrained(folder).to(device), load(folder, kind, device)
        plan = sensilora.allocate(calibrate(plain, device), average_rank=3)
        sensilora.inject(model, plan)
        of_model = sensilora.allocate(calibrate(load(folder, kind, device), device), average_rank=3)
        sensilora.inject(plain, of_model)
        assert {name: adapter.rank for name, adapter in adapter_layers(model).items()} == {
            name: rank for name, rank in plan.ranks.items() if rank
        }

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing(self, folder, kind, device, dtype, use_reentrant):
        model = load(folder, kind, device, dtype)
        sensilora.inject(model, sensilora.allocate(calibrate(model, device), average_rank=3), dropout=0.2).train()
        model.enable_input_require_grads()
        for adapter in adapter_layers(model).values():
            nn.init.normal_(adapter.lora_B, std=0.1)
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            torch.manual_seed(3)
            model.zero_grad()
            loss_of(model, batches(device)[0]).backward()
            gradients.append([adapter.lora_A.grad.clone() for adapter in adapter_layers(model).values()])
        for one, other in zip(*gradients, strict=True):
            assert one.any()
            assert relative_error(other, one) <= RELATIVE[dtype]

    def test_fisher_under_gradient_checkpointing(self, folder, kind, device):
        model = load(folder, kind, device)
        expected = calibrate(model, device, estimator="fisher")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        report = calibrate(model.train(), device, estimator="fisher")
        for name, matrix in report.matrices.items():
            assert matrix.trace == pytest.approx(expected.matrices[name].trace, rel=1e-5)

    def test_no_layers_are_grouped(self, folder, kind, device):
        model = load(folder, kind, device)
        sensilora.inject(model, sensilora.allocate(calibrate(model, device), average_rank=3))
        assert not shared_inputs(model)

    def test_named_adapters_serve_whole_batches(self, folder, kind, device, tmp_path):
        model, batch = load(folder, kind, device), batches(device)[0]
        before = logits_of(model, batch)
        plan = sensilora.allocate(calibrate(model, device), average_rank=3)
        for name in ("a", "b"):
            mixed.add_adapter(model, name, plan)
            for key, parameter in mixed.adapter_parameters(model, name).items():
                nn.init.normal_(parameter, std=0.1) if "lora_B" in key else None
        found = {}
        for name in ("a", "b", "__base__"):
            with mixed.adapter_ids(model, name):
                found[name] = logits_of(model, batch)
        assert torch.equal(found["__base__"], before)
        assert not torch.equal(found["a"], found["b"])
        with (
            mixed.adapter_ids(model, ["a", "b", "a", "b"]),
            pytest.raises(AdapterError, match="a batch takes one adapter"),
        ):
            logits_of(model, batch)
        with pytest.raises(AdapterError, match="is quantised"):
            mixed.merge(model, "a")
        mixed.save_adapter(model, tmp_path / "a", adapter="a")
        sensilora.load_adapter(sensilora.unload(model), tmp_path / "a")
        assert torch.equal(logits_of(model, batch), found["a"])


class TestPeft:
    """PEFT's layers over quantised bases against the same after `fuse`."""

    @pytest.fixture
    def integration(self):
        self.peft = pytest.importorskip("peft")
        return importlib.import_module("sensilora.integrations.peft")

    def model(self, folder, kind, device, dtype=torch.float32, **settings):
        model = load(folder, kind, device, dtype)
        wanted = {"target_modules": "all-linear", "r": 5, "lora_alpha": 8, "init_lora_weights": False, **settings}
        return self.peft.get_peft_model(model, self.peft.LoraConfig(**wanted))

    def gradients(self, model, device):
        model.zero_grad()
        torch.manual_seed(3)
        loss_of(model, batches(device)[0]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    @pytest.mark.parametrize("settings", [{}, {"lora_bias": True}, {"use_rslora": True}], ids=["", "bias", "rslora"])
    def test_a_fused_model_is_the_same(self, integration, folder, kind, device, settings):
        if settings.get("lora_bias") and kind.startswith("torchao"):
            pytest.skip("PEFT has no lora_bias over torchao")
        model, batch = self.model(folder, kind, device, **settings), batches(device)[0]
        before, gradients = logits_of(model, batch), self.gradients(model, device)
        classes = [type(m) for m in model.modules()]
        integration.fuse(model)
        fused = [module for module in model.modules() if isinstance(module, integration.FusedQuantised)]
        assert len(fused) == 14
        assert relative_error(logits_of(model, batch), before) <= ROUNDED_INPUT.get(kind, 1e-5)
        for name, gradient in self.gradients(model, device).items():
            assert relative_error(gradient, gradients[name]) <= ROUNDED_INPUT.get(kind, 1e-4), name
        integration.fuse(model)
        integration.unfuse(model)
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(logits_of(model, batch), before)

    def test_dropout_of_several_adapters_and_checkpointing(self, integration, folder, kind, device):
        model = self.model(folder, kind, device, torch.bfloat16, lora_dropout=0.5)
        config = self.peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.2)
        model.add_adapter("other", config)
        integration.fuse(model).train()
        model.base_model.set_adapter(["default", "other"])
        model.enable_input_require_grads()
        plain = self.gradients(model, device)
        assert len(plain) == 2 * 2 * 14
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, gradient in self.gradients(model, device).items():
            assert relative_error(gradient, plain[name]) <= RELATIVE[torch.bfloat16], name

    def test_what_is_left_to_peft(self, integration, folder, kind, device):
        model, batch = self.model(folder, kind, device).eval(), batches(device)[0]
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

        def computed():
            with torch.no_grad(), model.disable_adapter():
                off = model(**inputs).logits
            with torch.no_grad():
                return off, model(**inputs, adapter_names=["default", "other", "__base__", "other"]).logits

        before = computed()
        integration.fuse(model)
        integration._warn_of.cache_clear()
        with pytest.warns(UserWarning, match="adapter_names are given over a quantised base"):
            after = computed()
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))

    def test_use_fused_leaves_them_for_fuse(self, integration, folder, kind, device):
        model = load(folder, kind, device)
        config = self.peft.LoraConfig(target_modules="all-linear")
        model = self.peft.get_peft_model(model, integration.use_fused(config))
        assert not any(isinstance(module, integration._Fused) for module in model.modules())
        integration.fuse(model)
        assert sum(isinstance(module, integration.FusedQuantised) for module in model.modules()) == 14

    def test_trainer_takes_a_plan_through_peft_and_refuses_others(self, integration, folder, kind, device, tmp_path):
        """What docs/quantised.md says of it."""
        model = load(folder, kind, device, torch.bfloat16)
        plan = sensilora.allocate(calibrate(model, device), average_rank=3)
        rows = [{key: value[0] for key, value in batch.items()} for batch in batches("cpu", 4)]
        arguments = TrainingArguments(
            tmp_path, max_steps=3, use_cpu=device == "cpu", report_to=[], per_device_train_batch_size=2,
            gradient_checkpointing=True, learning_rate=1e-2, bf16=True,
        )  # fmt: skip
        with pytest.raises(ValueError, match="attach trainable adapters"):
            Trainer(sensilora.inject(copy.deepcopy(model), plan), arguments, train_dataset=rows)
        model = integration.fuse(self.peft.get_peft_model(model, plan.to_lora_config(task_type="CAUSAL_LM")))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        Trainer(model, arguments, train_dataset=rows).train()
        changed = [
            name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])
        ]
        assert len(changed) == len(before)
        assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
