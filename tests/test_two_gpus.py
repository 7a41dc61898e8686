"""A model over two GPUs, as device_map="auto" spreads it, and two processes with a GPU each."""

import copy

import pytest
import torch
from torch import nn

from sensilora import RankPlan, calibrate, inject
from sensilora.targets import find_targets, fingerprint, matrix_shape
from tests.tolerances import relative_error

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
DEVICES = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    "model.layers.0": 0,
    "model.layers.1": 1,
    "model.norm": 1,
    "lm_head": 1,
}


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


def spread(model):
    return accelerate.dispatch_model(model, dict(DEVICES))


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def adapted(model):
    shapes = {name: matrix_shape(module) for name, module in find_targets(model).items()}
    plan = RankPlan.uniform(shapes, 1, scaling=1.5, fingerprint=fingerprint(model))
    plan = plan.with_ranks({name: index % 4 + 1 for index, name in enumerate(shapes)})
    torch.manual_seed(2)
    model = inject(model, plan)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    return model


def gradients(model, entries):
    model.zero_grad()
    model(**entries).loss.backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    assert got
    for name in expected:
        assert relative_error(got[name], expected[name]) <= 1e-4, name


@pytest.mark.parametrize("estimator", ["activation", "fisher", "hutchinson"])
def test_calibrating_a_model_over_two_gpus(estimator):
    arguments = {"estimator": estimator, "probes": 4, "min_probes": 4, "progress": False}
    expected = calibrate(llama().to("cuda:0"), [batch()], **arguments)
    report = calibrate(spread(llama()), [batch()], **arguments)
    assert list(report) == list(expected)
    for name in expected:
        assert report[name].tokens == expected[name].tokens
        assert report[name].trace == pytest.approx(expected[name].trace, rel=1e-3)


def test_training_a_model_over_two_gpus():
    model = adapted(llama())
    one = copy.deepcopy(model).to("cuda:0")
    entries = {name: tensor.to("cuda:0") for name, tensor in batch().items()}
    assert_same(gradients(spread(model), entries), gradients(one, entries))


def test_adapters_put_into_a_model_over_two_gpus():
    entries = {name: tensor.to("cuda:0") for name, tensor in batch().items()}
    model = adapted(spread(llama()))
    for layer in model.model.layers:
        projection = layer.self_attn.q_proj
        assert projection.lora_A.device == projection.base_layer.weight.device
    one = adapted(llama())
    one.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    assert_same(gradients(model, entries), gradients(one.to("cuda:0"), entries))


def test_peft_fused_over_two_gpus():
    peft = pytest.importorskip("peft")
    from sensilora.integrations.peft import fuse

    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(spread(llama()), config).eval()
    entries = {name: tensor.to("cuda:0") for name, tensor in batch().items()}
    expected = gradients(model, entries)
    assert_same(gradients(fuse(model, groups=True), entries), expected)


def _worker(rank, world_size, folder):
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        model = adapted(llama()).to(f"cuda:{rank}")
        ids = torch.arange(4 * 600, device=f"cuda:{rank}").reshape(4, 600) % 60
        whole = gradients(model, {"input_ids": ids, "labels": ids})
        parallel = nn.parallel.DistributedDataParallel(model, device_ids=[rank])
        share = ids.chunk(world_size)[rank]
        got = gradients(parallel, {"input_ids": share, "labels": share})
        assert_same({name.removeprefix("module."): grad for name, grad in got.items()}, whole)
    finally:
        torch.distributed.destroy_process_group()


def test_ddp_averages_the_gradients_of_two_gpus(tmp_path):
    torch.multiprocessing.spawn(_worker, (2, tmp_path), nprocs=2)
