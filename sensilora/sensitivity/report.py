"""The result of a calibration: three numbers for each weight matrix, and what they were measured with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from sensilora._files import write_bytes
from sensilora.errors import ReportError

SCHEMA_VERSION: Literal[1] = 1

# Strict, so that "3.5" or true in an edited file is an error and not a number.
_CONFIG = ConfigDict(extra="forbid", strict=True)

EstimatorName = Literal["activation", "fisher", "hutchinson"]
Mode = Literal["per_sequence", "per_position"]
LabelSource = Literal["data", "model"]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class MatrixSensitivity:
    """What a calibration found for one weight matrix.

    Attributes:
        shape: (out_features, in_features).
        trace: Σ λ_i over the matrix's Hessian diagonal (Sensitivity-LoRA, eq. 8). For "activation" the diagonal has
            in_features values, in units of the squared input per token; for "fisher" out_features · in_features
            values, in units of the squared loss gradient per sequence.
        topk_mean: mean of the largest fraction `k` of the diagonal (eq. 9), in the trace's unit.
        effective_rank: how many of the largest values reach the share `alpha` of the trace (eq. 10); 0 if it is 0.
        tokens: rows that entered the matrix, padding left out, summed over its calls.
        calls: how often the matrix ran in a forward pass.
        aliases: names of the other modules that hold the same (tied) weight; their calls are counted here.
    """

    shape: tuple[Positive, Positive]
    trace: Measure
    topk_mean: Measure
    effective_rank: Count
    tokens: Count
    calls: Positive
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class SensitivityReport:
    """Sensitivities of a model's weight matrices. ``report[name]`` is a `MatrixSensitivity`; iteration gives names.

    Attributes:
        matrices: by module name, in module order.
        estimator: "activation" (diagonal of the input autocorrelation), "fisher" or "hutchinson".
        mode: how Fisher squares, "per_sequence" or "per_position"; None for the other estimators.
        labels: where Fisher's labels came from, "data" or "model" (sampled); None for the other estimators.
        draws: how many label samples each sequence had; 1 for labels from the data.
        seed: of the label samples.
        tokens: input tokens that counted, padding left out.
        sequences: sequences that counted; for Fisher those with at least one label.
        k: fraction of the diagonal in the top-k mean.
        alpha: share of the trace that the effective rank reaches.
        model_id: hub name or folder of the model, or its class name.
        fingerprint: SHA-256 over the names and shapes of the model's weights (`sensilora.targets.fingerprint`).
        versions: of sensilora, torch, python and, where it was loaded, transformers.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    estimator: EstimatorName
    mode: Mode | None
    labels: LabelSource | None
    draws: Positive
    seed: int
    tokens: Count
    sequences: Positive
    k: Fraction
    alpha: Fraction
    model_id: str
    fingerprint: str
    versions: dict[str, str]
    matrices: Annotated[dict[str, MatrixSensitivity], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> SensitivityReport:
        if (self.estimator == "fisher") != (self.mode is not None) or (self.mode is None) != (self.labels is None):
            raise ValueError(f"mode and labels are given for the estimator 'fisher' only, not {self.estimator!r}")
        for name, matrix in self.matrices.items():
            if matrix.effective_rank > self.diagonal_size(name):
                raise ValueError(
                    f"effective_rank of {name} is {matrix.effective_rank}, above the {self.diagonal_size(name)} "
                    "values of its diagonal"
                )
        return self

    def __getitem__(self, name: str) -> MatrixSensitivity:
        return self.matrices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    def diagonal_size(self, name: str) -> int:
        """How many values matrix `name`'s diagonal has: in_features for "activation", else out · in features."""
        out_features, in_features = self.matrices[name].shape
        return in_features if self.estimator == "activation" else out_features * in_features

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, whole or not at all. Numbers read back bit for bit.

        Raises:
            OSError: the file cannot be written.
        """
        return write_bytes(path, _adapter.dump_json(self, indent=2) + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SensitivityReport:
        """Read a report that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ReportError: the file is truncated, of another version, or a field is missing, unknown or invalid; the
                message names the file and the field.
        """
        content = Path(path).read_bytes()
        try:
            return _adapter.validate_json(content)
        except ValidationError as error:
            raise ReportError(f"sensitivity report {os.fspath(path)} {_complaint(error)}") from error

    def summary(self) -> str:
        """The report as a text table, one matrix a line."""
        source = ", ".join(part for part in (self.mode, self.labels and f"labels from the {self.labels}") if part)
        lines = [
            f"{self.model_id}: {self.estimator}{f' ({source})' if source else ''}, "
            f"{self.sequences} sequences, {self.tokens} tokens, k={self.k:g}, alpha={self.alpha:g}"
        ]
        header = ("matrix", "shape", "trace", "top-k mean", "effective rank", "% of m")
        rows = [header] + [
            (
                name,
                "{}x{}".format(*matrix.shape),
                f"{matrix.trace:.4g}",
                f"{matrix.topk_mean:.4g}",
                str(matrix.effective_rank),
                f"{100 * matrix.effective_rank / self.diagonal_size(name):.1f}",
            )
            for name, matrix in self.matrices.items()
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        for name, *numbers in rows:
            cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *cells]))
        return "\n".join(lines)


_adapter = TypeAdapter(SensitivityReport)


def _complaint(error: ValidationError) -> str:
    """The first finding of a failed validation as the rest of a sentence."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return f"is not complete JSON ({first['msg']}); it is truncated or edited: make it again"
    if field == "schema_version":
        return f"has schema_version {first['input']!r}, and this version reads {SCHEMA_VERSION}: make it again"
    if not field:
        return f"is invalid: {first['msg']}"
    return f"has an invalid field {field}: {first['msg']}"
