"""Sensitivity reports with chosen numbers, for the tests of what is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sensilora.sensitivity.report import MatrixSensitivity, SensitivityReport


def make_report(
    metrics: Mapping[str, tuple[float, float, int]],
    shapes: Mapping[str, tuple[int, int]] | tuple[int, int] = (64, 64),
    **fields: Any,
) -> SensitivityReport:
    """A Fisher report with the given (trace, topk_mean, effective_rank) by name; one shape for all, or one each."""
    matrices = {
        name: MatrixSensitivity(
            shape=shapes if isinstance(shapes, tuple) else shapes[name],
            trace=float(trace),
            topk_mean=float(topk_mean),
            effective_rank=effective_rank,
            tokens=100,
            calls=1,
        )
        for name, (trace, topk_mean, effective_rank) in metrics.items()
    }
    defaults: dict[str, Any] = {
        "estimator": "fisher",
        "mode": "per_sequence",
        "labels": "data",
        "draws": 1,
        "seed": 0,
        "tokens": 100,
        "sequences": 4,
        "k": 0.5,
        "alpha": 0.85,
        "model_id": "tiny-model",
        "fingerprint": "ab" * 32,
        "versions": {"sensilora": "0.1.0", "torch": "2.13.0"},
    }
    return SensitivityReport(matrices=matrices, **{**defaults, **fields})


def encoder_report(layers: int = 6, width: int = 32) -> SensitivityReport:
    """A BERT-like report with a pooler outside the layers; the numbers differ from matrix to matrix."""
    shapes = {}
    for layer in range(layers):
        for part, shape in {
            "attention.self.query": (width, width),
            "attention.self.key": (width, width),
            "attention.self.value": (width, width),
            "attention.output.dense": (width, width),
            "intermediate.dense": (4 * width, width),
            "output.dense": (width, 4 * width),
        }.items():
            shapes[f"encoder.layer.{layer}.{part}"] = shape
    shapes["pooler.dense"] = (width, width)
    metrics = {name: (1.0 + i * 37 % 23, 0.1 + i * 11 % 7, 1 + i * 5 % width) for i, name in enumerate(shapes)}
    return make_report(metrics, shapes)
