"""Calibration of a whole model, on a GPU Llama-3.1-8B's shape with random bf16 weights, seven projections a layer.

- activation: one batch (16 sequences of 512 tokens) observed, against the plain forward pass. The plain pass computes
  all logits; ours asks for those of one position, since no target reads them.
- fisher: one batch observed (forward, backward, squared gradients), against forward and backward with frozen weights.
- calibrate_piqa2000: `calibrate` and `allocate`, that is all but loading the model, over 2,000 sequences of PIQA; the
  baseline is the plain forward passes over the same batches. ours_ms / 1000 are the seconds that the paper reports.
- cpu/minilm/fisher: a classifier of MiniLM's shape (6 layers, 384 wide, random fp32 weights), batches of 16 sequences
  observed, against a loop that takes each sequence's gradients and squares them. 64 sequences of 8 to 64 tokens by
  length, as `sensilora plan` takes them; one batch of 8 to 64 tokens as they come, of which 57% counts and the rest
  is padding for ours but not for the loop; and one of 32 or 64 tokens each.

PIQA is read from the file that SENSILORA_PIQA names (its own jsonl, also gzipped, or text with a sequence a line),
else from shared/data/piqa in the checkout or beside it. There is no tokenizer: words are cut into pieces of up to six
letters and hashed, 4.2 characters a token, which is about what Llama's own vocabulary gives on English.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench_model import LLAMA_8B, _build, _projections
from benchmarks.harness import Case, Cases, Unavailable, relative_error
from sensilora import allocate, calibrate
from sensilora.ops import autocorrelation_blocks
from sensilora.sensitivity.activation import ActivationEstimator
from sensilora.sensitivity.batches import Batch
from sensilora.sensitivity.capture import Matrix, group_tied, wrapped_forwards
from sensilora.sensitivity.estimator import Estimator
from sensilora.sensitivity.fisher import FisherEstimator
from sensilora.targets import find_targets

SEQUENCES, LENGTH = 16, 512
PIQA_SEQUENCES = 2000
PIQA_BATCH = 64
AVERAGE_RANK = 8
BLOCK_SIZE = 128
ROOT = Path(__file__).parents[1]

Inputs = dict[str, Tensor]


def cases(device: str) -> Cases:
    if device == "cpu":
        return {
            "cpu/minilm/fisher": partial(_minilm_case, MINILM_BY_LENGTH),
            "cpu/minilm/fisher/unsorted": partial(_minilm_case, [MINILM_UNSORTED]),
            "cpu/minilm/fisher/n16_t32": partial(_minilm_case, [(32,) * 16]),
            "cpu/minilm/fisher/n16_t64": partial(_minilm_case, [(64,) * 16]),
        }
    return {
        "model/llama8b/activation": partial(_activation_case, device, LLAMA_8B, SEQUENCES, LENGTH, "diagonal"),
        "model/llama8b/activation_inverse": partial(_activation_case, device, LLAMA_8B, SEQUENCES, LENGTH, "inverse"),
        "model/llama8b/fisher": partial(_fisher_case, device, LLAMA_8B, SEQUENCES, LENGTH),
        "model/llama8b/calibrate_piqa2000": partial(_piqa_case, device, LLAMA_8B, PIQA_SEQUENCES),
    }


def _observing(
    model: nn.Module, make: Callable[..., Estimator]
) -> tuple[Callable[[Inputs], None], dict[str, Matrix]]:
    """A function that observes a batch as `calibrate` does, and the matrices it fills."""
    modules = _projections(model)
    matrices = group_tied(modules)
    estimator = make(model, modules, matrices)

    def observe(inputs: Inputs) -> None:
        with wrapped_forwards(modules, estimator.wrap):
            estimator.observe(Batch(inputs, model))

    return observe, matrices


def _fisher(model: nn.Module, modules: dict[str, nn.Module], matrices: dict[str, Matrix]) -> Estimator:
    return FisherEstimator(
        model,
        modules,
        matrices,
        mode="per_sequence",
        labels="data",
        draws=1,
        seed=0,
        loss_fn=None,
        shift_labels=None,
    )


@torch.no_grad()
def _forward(model: nn.Module, batches: list[Inputs], **options: Any) -> None:
    for inputs in batches:
        model(**inputs, **options)


def _weights(shape: dict[str, Any]) -> tuple[int, int]:
    """How many weights the projections and the head have."""
    hidden, head = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    attention = 2 * hidden * head * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    layer = attention + 3 * hidden * shape["intermediate_size"]
    return shape["num_hidden_layers"] * layer, hidden * shape["vocab_size"]


# --- activation


def _activation_case(device: str, shape: dict[str, Any], sequences: int, length: int, variant: str) -> Case:
    model = _build(device, shape).eval()
    inputs = {"input_ids": torch.randint(shape["vocab_size"], (sequences, length), device=device)}
    observe, _ = _observing(model, partial(ActivationEstimator, variant=variant, block_size=BLOCK_SIZE))
    return Case(
        ours=lambda: observe(inputs),
        baseline=lambda: _forward(model, [inputs]),
        errors=lambda: _activation_errors(device, shape, [inputs], variant),
        tolerance=1e-5,
        peers={
            "hooks, x.float().square().sum(0)": _hooked(model, inputs, lambda x: x.float().square().sum(0)),
            "hooks, full XᵀX": _hooked(model, inputs, _full),
            "plain, logits of one position": lambda: _forward(model, [inputs], logits_to_keep=1),
        },
        floor_flops=2 * sequences * length * _weights(shape)[0],
        peak_memory=True,
    )


def _full(x: Tensor) -> Tensor:
    return torch.mm(x.T, x, out_dtype=torch.float32) if x.is_cuda else x.float().T @ x.float()


def _hooked(model: nn.Module, inputs: Inputs, reduce: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """What one writes by hand: a forward hook a module, which adds up in fp32."""

    def run() -> None:
        total: dict[nn.Module, Tensor] = {}

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found = reduce(args[0].flatten(0, -2))
            total[module] = total[module].add_(found) if module in total else found

        hooks = [module.register_forward_pre_hook(hook) for module in _projections(model).values()]
        _forward(model, [inputs])
        for handle in hooks:
            handle.remove()

    return run


def _activation_errors(device: str, shape: dict[str, Any], batches: list[Inputs], variant: str) -> list[float]:
    """Of every matrix's sum on a model of two layers, against fp64 sums of the very inputs that it was made of."""
    model = _build(device, {**shape, "num_hidden_layers": 2}).eval()
    observe, matrices = _observing(model, partial(ActivationEstimator, variant=variant, block_size=BLOCK_SIZE))
    oracle: dict[str, Tensor] = {}
    counted: list[Tensor] = []

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)[counted[-1]].double()
        found = rows.square().sum(0) if variant == "diagonal" else autocorrelation_blocks(rows, BLOCK_SIZE)
        oracle[name] = oracle[name] + found if name in oracle else found

    for name, module in _projections(model).items():
        module.register_forward_pre_hook(partial(hook, name))
    for inputs in batches:
        counted.append(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).flatten() != 0)
        observe(inputs)
    return [relative_error(_filled(matrices[name]), found) for name, found in oracle.items()]


def _filled(matrix: Matrix) -> Tensor:
    assert matrix.diagonal is not None, f"{matrix.name} was not observed"
    return matrix.diagonal


# --- Fisher


def _fisher_case(device: str, shape: dict[str, Any], sequences: int, length: int) -> Case:
    model = _build(device, shape).eval()
    ids = torch.randint(shape["vocab_size"], (sequences, length), device=device)
    observe, _ = _observing(model, _fisher)
    embeddings = model.get_input_embeddings()(ids).requires_grad_()

    def step() -> None:
        embeddings.grad = None
        model(inputs_embeds=embeddings, labels=ids).loss.backward()

    layers, head = _weights(shape)
    return Case(
        ours=lambda: observe({"input_ids": ids, "labels": ids}),
        baseline=step,
        errors=lambda: _fisher_errors(device, shape)[0],
        # The gradients are bf16's; their squares in fp32 are checked where fisher_diag is measured.
        tolerance=1e-1,
        peers={"a loop over sequences": lambda: _loop(model, ids)},
        eager_errors=lambda: _fisher_errors(device, shape)[1],
        floor_flops=sequences * length * (6 * layers + 4 * head),
        peak_memory=True,
    )


def _loop(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The squared gradient of each sequence's own loss, one sequence after the other, summed in fp32 at least."""
    projections = _projections(model)
    total: dict[str, Tensor] = {}
    for module in projections.values():
        module.weight.requires_grad_()
    for sequence in ids.split(1):
        loss = model(input_ids=sequence, labels=sequence).loss * (sequence.shape[1] - 1)  # the sum, not the mean
        loss.backward()
        for name, module in projections.items():
            squares = module.weight.grad.to(torch.promote_types(module.weight.dtype, torch.float32)).square_()
            total[name] = total[name].add_(squares) if name in total else squares
            module.weight.grad = None
    for module in projections.values():
        module.weight.requires_grad_(False)
    return total


def _fisher_errors(device: str, shape: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Errors of ours and of the loop in bf16, each against the loop in fp64 on a model of two layers."""
    model = _build(device, {**shape, "num_hidden_layers": 2}).eval()
    ids = torch.randint(shape["vocab_size"], (2, 64), device=device)
    observe, matrices = _observing(model, _fisher)
    observe({"input_ids": ids, "labels": ids})
    plain = _loop(model, ids)
    oracle = _loop(model.double(), ids)
    ours = [relative_error(_filled(matrices[name]), found) for name, found in oracle.items()]
    return ours, [relative_error(plain[name], found) for name, found in oracle.items()]


# Tokens of each sequence, batch by batch.
MINILM_UNSORTED = (64, 17, 30, 45, 8, 64, 52, 21, 38, 12, 60, 27, 33, 49, 19, 41)
_BY_LENGTH = sorted(8 + 37 * i % 57 for i in range(64))
MINILM_BY_LENGTH = [tuple(_BY_LENGTH[start : start + 16]) for start in range(0, 64, 16)]


def _minilm_case(token_counts: Sequence[tuple[int, ...]]) -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).eval().requires_grad_(False)
    batches = []
    for counts in token_counts:
        lengths, longest = torch.tensor(counts), max(counts)
        mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
        ids = torch.randint(1, 30000, (len(counts), longest))
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, (len(counts),))})
    modules = find_targets(model)

    def ours() -> dict[str, Tensor]:
        matrices = group_tied(modules)
        estimator = _fisher(model, modules, matrices)
        with wrapped_forwards(modules, estimator.wrap):
            for batch in batches:
                estimator.observe(Batch(batch, model))
        return {name: _filled(matrix) for name, matrix in matrices.items()}

    def loop() -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        weights = {name: module.weight.requires_grad_() for name, module in modules.items()}
        for counts, batch in zip(token_counts, batches, strict=True):
            for n, length in enumerate(counts):
                loss = nn.functional.cross_entropy(
                    model(batch["input_ids"][n : n + 1, :length]).logits, batch["labels"][n : n + 1]
                )
                for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                    squares = gradient.square_()
                    total[name] = total[name].add_(squares) if name in total else squares
        model.requires_grad_(False)
        return total

    def errors() -> list[float]:
        got, expected = ours(), loop()
        return [relative_error(got[name], expected[name]) for name in expected]

    # The loop is fp32 itself, and so are the gradients of both.
    return Case(ours=ours, baseline=loop, errors=errors, tolerance=1e-4)


# --- all of it, over real text


def _piqa_case(device: str, shape: dict[str, Any], sequences: int) -> Case:
    batches = piqa_batches(device, shape["vocab_size"], sequences)
    model = _build(device, shape).eval()

    def ours() -> None:
        report = calibrate(model, batches, progress=False)
        allocate(report, average_rank=AVERAGE_RANK)

    tokens = sum(int(inputs["attention_mask"].sum()) for inputs in batches)
    return Case(
        ours=ours,
        baseline=lambda: _forward(model, batches),
        errors=lambda: _activation_errors(device, shape, batches[:2], "diagonal"),
        tolerance=1e-5,
        floor_flops=2 * tokens * _weights(shape)[0],
        peak_memory=True,
    )


def piqa_batches(device: str, vocabulary: int, sequences: int) -> list[Inputs]:
    """The first `sequences` of PIQA in padded batches of like lengths."""
    texts = _piqa_texts()[:sequences]
    if len(texts) < sequences:
        raise Unavailable(f"the PIQA file holds {len(texts)} sequences, not {sequences}")
    rows = sorted((_tokens(text, vocabulary) for text in texts), key=len)
    batches = []
    for start in range(0, sequences, PIQA_BATCH):
        part = [torch.tensor(row) for row in rows[start : start + PIQA_BATCH]]
        padded = {
            "input_ids": nn.utils.rnn.pad_sequence(part, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True),
        }
        batches.append({name: tensor.to(device) for name, tensor in padded.items()})
    return batches


def _tokens(text: str, vocabulary: int) -> list[int]:
    """Numbers from 1 on, the same for the same pieces."""
    return [1 + zlib.crc32(piece.encode()) % (vocabulary - 1) for piece in re.findall(r"\w{1,6}|[^\w\s]", text)]


def _piqa_texts() -> list[str]:
    """A goal and its first solution each, or a line each of a text file; those without a token left out."""
    named = os.environ.get("SENSILORA_PIQA")
    found = [Path(named)] if named else [root / "shared/data/piqa/test.jsonl.gz" for root in (ROOT, ROOT.parent)]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise Unavailable(
            f"no PIQA at {found[0]}: set SENSILORA_PIQA to its tests.jsonl (2,000 rows or more), or put it there"
        )
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    if ".json" in path.name:
        rows = [json.loads(line) for line in lines if line.strip()]
        lines = [f"{row['goal']} {row['sol1']}" for row in rows]
    return [line for line in lines if re.search(r"\w", line)]


def test_calibrate(timed) -> None:
    timed()
