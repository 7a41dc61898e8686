"""Small networks and brute-force references: one sequence at a time, without padding, by plain autograd."""

from __future__ import annotations

import importlib
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sensilora.sensitivity import calibrate
from sensilora.targets import find_targets, is_conv1d


class Block(nn.Module):
    """Attention and a feed-forward layer, with an in-place activation on a linear module's output."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden, mask):
        scores = self.query(hidden) @ self.key(hidden).transpose(1, 2)
        weights = scores.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(-1)
        hidden = hidden + weights @ self.value(hidden)
        return hidden + self.down(F.relu_(self.up(hidden)))


class Net(nn.Module):
    """A tiny transformer on token ids; `token_logits` decides between (N, classes) and (N, T, classes) logits."""

    def __init__(self, classes=3, width=6, depth=2, *, repeat=1, use_reentrant=None, token_logits=False):
        super().__init__()
        self.repeat, self.use_reentrant, self.token_logits = repeat, use_reentrant, token_logits
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(width, classes)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask != 0
        hidden = self.embed(input_ids)
        for block in self.blocks:
            for _ in range(self.repeat):
                if self.use_reentrant is None:
                    hidden = block(hidden, mask)
                else:
                    hidden = checkpoint(block, hidden, mask, use_reentrant=self.use_reentrant)
        hidden = self.dropout(hidden)
        if self.token_logits:
            return self.classifier(hidden)
        weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1)
        return self.classifier((hidden * weights.to(hidden.dtype)).sum(1))


def diagonals(model, batches, **arguments):
    """(report, the diagonals it was made from by name) of a calibration."""
    seen = {}

    def measured(observer, matrices, **options):
        def recorded(matrix):
            found = diagonal(matrix)
            seen[matrix.name] = found.clone()
            return found

        diagonal = observer.diagonal
        with mock.patch.object(observer, "diagonal", recorded):
            return measure(observer, matrices, **options)

    driver = importlib.import_module("sensilora.sensitivity.calibrate")
    measure = driver._measure
    with mock.patch.object(driver, "_measure", measured):
        report = calibrate(model, batches, progress=False, **arguments)
    return report, seen


def sequences(*lengths, vocabulary=20, seed=0):
    """Random token sequences (1, T) of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocabulary, (1, length), generator=generator) for length in lengths]


def pad(tensors, *, to=0, value=0, left=False):
    """Stack (1, T) tensors into (N, max T), and the attention mask of the result."""
    width = max(to, max(tensor.shape[1] for tensor in tensors))
    spare = [width - tensor.shape[1] for tensor in tensors]
    sides = [(extra, 0) if left else (0, extra) for extra in spare]
    padded = [F.pad(tensor, side, value=value) for tensor, side in zip(tensors, sides, strict=True)]
    ones = [F.pad(torch.ones_like(tensor), side) for tensor, side in zip(tensors, sides, strict=True)]
    return torch.cat(padded), torch.cat(ones)


def classification_batch(model_ids, labels, **options):
    ids, mask = pad(model_ids, **options)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.as_tensor(labels)}


def fisher_oracle(model, losses, *, targets="all-linear", mode="per_sequence"):
    """Mean over `losses` (functions of no argument, one a sequence) of each target's squared gradient, fp64.

    "per_sequence" squares the autograd gradient of the weight itself; "per_position" is the formula on the inputs and
    output gradients of every call.
    """
    model.eval()
    modules = find_targets(model, targets)
    total = {name: torch.zeros((), dtype=torch.float64) for name in modules}
    for loss_of in losses:
        squared = squared_gradients if mode == "per_sequence" else squared_positions
        for name, value in squared(model, modules, loss_of):
            total[name] = total[name] + value
    return {name: value / len(losses) for name, value in total.items()}


def squared_gradients(model, modules, loss_of):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    gradients = torch.autograd.grad(loss_of(), [module.weight for module in modules.values()])
    for (name, module), gradient in zip(modules.items(), gradients, strict=True):
        yield name, (gradient.T if is_conv1d(module) else gradient).double().square()


def squared_positions(model, modules, loss_of):
    calls = []

    def record(name):
        def hook(module, args, y):
            calls.append((name, args[0], y))
            return y.clone()  # an in-place activation then changes the clone

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    loss = loss_of()
    for hook in hooks:
        hook.remove()
    for (name, x, _), g in zip(calls, torch.autograd.grad(loss, [y for *_, y in calls]), strict=True):
        x, g = x.detach().double().flatten(0, -2), g.double().flatten(0, -2)
        yield name, torch.einsum("to,ti->oi", g.square(), x.square())


def assert_close(found, expected, rtol=1e-9):
    """All diagonals agree to `rtol` of the largest value of each."""
    assert found.keys() == expected.keys()
    for name in expected:
        scale = float(expected[name].abs().max())
        assert scale > 0, f"the reference for {name} is zero, so the comparison would say nothing"
        torch.testing.assert_close(
            found[name].double(),
            expected[name].double(),
            rtol=0,
            atol=rtol * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )
