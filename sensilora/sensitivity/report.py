"""The result of a calibration: three numbers for each weight matrix, and what they were measured with."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from sensilora._files import write_bytes
from sensilora.allocation import fuse_scores
from sensilora.errors import ReportError
from sensilora.plan import PlanEntry, RankPlan, Weights

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA_VERSION: Literal[1] = 1

# Strict, so that "3.5" or true in an edited file is an error and not a number.
_CONFIG = ConfigDict(extra="forbid", strict=True)

EstimatorName = Literal["activation", "fisher", "hutchinson"]
Variant = Literal["diagonal", "inverse"]
Mode = Literal["per_sequence", "per_position", "per_loss_term"]
LabelSource = Literal["data", "model"]
HessianProduct = Literal["double_backward", "central_differences"]
ScoreName = Literal["trace", "topk_mean", "effective_rank", "fused"]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Coefficient = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]

_SHOWN_MOVERS = 10


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class ProbeStatistics:
    """How well the probes of the "hutchinson" estimator know one matrix's Hessian diagonal.

    The averaged diagonal has negative entries, the Hessian's own and those that noise makes; they are set to 0 before
    the metrics are taken. Noise biases the top-k mean upwards and changes the effective rank; the metrics of half the
    probes show how much: what is left is 1 to 2.4 times what they differ by, as that bias falls with the number of
    probes or with its root.

    Attributes:
        count: how many probes were taken.
        trace: their unbiased estimate of the Hessian's trace, negative entries and all.
        standard_error: of that estimate, from its spread over the probes.
        negative_mass: Σ|negative entries| / Σ|entries| of the averaged diagonal, before they are set to 0.
        half_topk_mean: the top-k mean by every second probe alone, and by the others alone.
        half_effective_rank: the effective rank by the same halves.
    """

    count: Annotated[int, Field(ge=2)]
    trace: Annotated[float, Field(allow_inf_nan=False)]
    standard_error: Measure
    negative_mass: Annotated[float, Field(ge=0, le=1)]
    half_topk_mean: tuple[Measure, Measure]
    half_effective_rank: tuple[Count, Count]


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class MatrixSensitivity:
    """What a calibration found for one weight matrix.

    Attributes:
        shape: (out_features, in_features).
        trace: Σ λ_i over the matrix's Hessian diagonal (Sensitivity-LoRA, eq. 8). For "activation" the diagonal has
            in_features values, in units of the squared input per token; for "fisher" out_features · in_features
            values, in units of the squared loss gradient per sequence; for "hutchinson" as many, second derivatives
            of the loss per sequence, those below 0 set to 0 (`ProbeStatistics.trace` is the sum with them).
        topk_mean: mean of the largest fraction `k` of the diagonal (eq. 9), in the trace's unit.
        effective_rank: how many of the largest values reach the share `alpha` of the trace (eq. 10); 0 if it is 0.
        tokens: rows that entered the matrix, padding left out, summed over its calls.
        calls: how often the matrix ran in a forward pass.
        aliases: names of the other modules that hold the same (tied) weight; their calls are counted here.
        damping: the largest that a block of the matrix's inputs took to be inverted, as a fraction of the mean of its
            diagonal; None but for the variant "inverse".
        attempts: how many Cholesky factorisations that took, the first included; None but for the variant "inverse".
        expert_of: the parameter of several experts' matrices that this is one of; None for a linear module's weight.
        from_siblings: whether this expert saw fewer than `min_expert_tokens` tokens, and trace, topk_mean and
            effective_rank are the mean of the experts beside it in the same parameter that saw enough.
        probes: what is known of the probes' noise; None but for "hutchinson".
    """

    shape: tuple[Positive, Positive]
    trace: Measure
    topk_mean: Measure
    effective_rank: Count
    tokens: Count
    calls: Count
    aliases: tuple[str, ...] = ()
    damping: Fraction | None = None
    attempts: Positive | None = None
    expert_of: str | None = None
    from_siblings: bool = False
    probes: ProbeStatistics | None = None

    @property
    def topk_mean_bias(self) -> float | None:
        """By how much of the top-k mean half the probes give a higher one; None without probes or where it is 0."""
        if self.probes is None or not self.topk_mean:
            return None
        return sum(self.probes.half_topk_mean) / 2 / self.topk_mean - 1

    @property
    def effective_rank_bias(self) -> float | None:
        """By how much of the effective rank half the probes give a higher one; None in the same cases."""
        if self.probes is None or not self.effective_rank:
            return None
        return sum(self.probes.half_effective_rank) / 2 / self.effective_rank - 1


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class SensitivityReport:
    """Sensitivities of a model's weight matrices. ``report[name]`` is a `MatrixSensitivity`; iteration gives names.

    Attributes:
        matrices: by module name, in module order.
        estimator: "activation" (diagonal of the input autocorrelation), "fisher" or "hutchinson".
        variant: of "activation": "diagonal" (diag H) or "inverse" (1 / diag(H⁻¹) of H's diagonal blocks); "diagonal"
            for the other estimators.
        block_size: features a block of the variant "inverse"; None otherwise.
        damping: of the variant "inverse", as it was asked for; None otherwise.
        mode: how Fisher squares, "per_sequence", "per_position" or "per_loss_term"; None for the other estimators.
        labels: where Fisher's labels came from, "data" or "model" (sampled); None for the other estimators.
        draws: how many label samples each sequence had; 1 for labels from the data.
        hvp: how "hutchinson" took its Hessian-vector products, "double_backward" or "central_differences"; None for
            the other estimators, as are the next three.
        probes, min_probes: the most and the least that a matrix could have.
        tolerance: the standard error of a matrix's trace, relative to it, at which no more were taken.
        seed: of the label samples or the probes.
        tokens: input tokens that counted, padding left out.
        sequences: sequences that counted; for Fisher those with at least one label.
        min_expert_tokens: the least tokens for an expert's numbers to be its own; None where experts are left out.
        passes: for each pass over the data the most bytes of running sums that it held at a time, more than one pass
            under a `memory_budget`; empty where that is not known.
        k: fraction of the diagonal in the top-k mean.
        alpha: share of the trace that the effective rank reaches.
        model_id: hub name or folder of the model, or its class name.
        fingerprint: SHA-256 over the names and shapes of the model's weights (`sensilora.targets.fingerprint`).
        versions: of sensilora, torch, python and, where it was loaded, transformers.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    estimator: EstimatorName
    passes: tuple[Count, ...] = ()
    variant: Variant = "diagonal"
    block_size: Positive | None = None
    damping: Fraction | None = None
    mode: Mode | None
    labels: LabelSource | None
    draws: Positive
    hvp: HessianProduct | None = None
    probes: Positive | None = None
    min_probes: Positive | None = None
    tolerance: Measure | None = None
    seed: int
    tokens: Count
    sequences: Positive
    min_expert_tokens: Positive | None = None
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
        settings = (self.hvp, self.probes, self.min_probes, self.tolerance)
        if {setting is not None for setting in settings} != {self.estimator == "hutchinson"}:
            raise ValueError(
                "hvp, probes, min_probes and tolerance are given for the estimator 'hutchinson' only, and always for "
                "it"
            )
        inverse = self.variant == "inverse"
        if inverse and self.estimator != "activation":
            raise ValueError(f"variant is 'inverse' for the estimator 'activation' only, not {self.estimator!r}")
        if (self.block_size is None) == inverse or (self.damping is None) == inverse:
            raise ValueError("block_size and damping are given for the variant 'inverse' only, and always for it")
        for name, matrix in self.matrices.items():
            if (matrix.probes is not None) != (self.estimator == "hutchinson"):
                raise ValueError(f"probes of {name} are given for the estimator 'hutchinson' only, and always for it")
            if matrix.from_siblings:
                if matrix.expert_of is None:
                    raise ValueError(f"{name} is no expert of a stack (expert_of), so from_siblings cannot be true")
            elif not matrix.calls:
                raise ValueError(f"calls of {name} is 0, so it has no sensitivity of its own")
            elif (matrix.damping is None) == inverse or (matrix.attempts is None) == inverse:
                raise ValueError(f"damping and attempts of {name} are given for the variant 'inverse' only")
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

    def compare(self, other: SensitivityReport | RankPlan, *, weights: Weights = "cv") -> ReportComparison:
        """How far two reports of one model agree on the order of its weight matrices, those that both hold.

        What was measured with may differ (estimator, labels, data, seed), and so may the values of the weights.
        Experts that are stacked in one parameter count where both reports hold them, as any other matrix does; where
        one was made without ``experts=True`` they are among the matrices that it lacks, and change nothing.

        Args:
            other: the report to compare with, or a plan, which holds the numbers of the report that it was made from.
            weights: of the fused score, "cv" or "equal", as for `sensilora.allocate`. That score is made of the
                matrices in both reports alone, so that it compares like with like.

        Returns:
            A `ReportComparison`; ``print`` shows it as tables.

        Raises:
            ReportError: the reports are of different models (fingerprints), have another `k` or `alpha`, or no matrix
                in common; `other` is a plan without a calibration; or `weights` is neither "cv" nor "equal".
        """
        if weights not in get_args(Weights):
            raise ReportError(f"weights must be {' or '.join(map(repr, get_args(Weights)))}, not {weights!r}")
        if self.fingerprint != other.fingerprint:
            raise ReportError(
                f"the sensitivity reports are of different models ({self.model_id} and {other.model_id}: names or "
                "shapes of their weights differ); compare reports of one model"
            )
        settings = other.calibration if isinstance(other, RankPlan) else other
        if settings is None:
            raise ReportError("the plan was made without a calibration, so it has no order to compare; give a report")
        for setting in ("k", "alpha"):
            mine, theirs = getattr(self, setting), getattr(settings, setting)
            if mine != theirs:
                raise ReportError(
                    f"the sensitivity reports were measured with {setting}={mine} and {setting}={theirs}; measure "
                    f"both with one {setting}"
                )
        common = [name for name in self if name in other.matrices]
        if not common:
            raise ReportError(
                f"the sensitivity reports have no matrix in common (one holds {next(iter(self))}, the other "
                f"{next(iter(other.matrices))}, for example); measure both with the same targets"
            )
        here, there = (_scores([held[name] for name in common], weights) for held in (self.matrices, other.matrices))
        places = zip(common, _places(here["fused"]), _places(there["fused"]), strict=True)
        movers = [Mover(matrix=name, place=a, other_place=b) for name, a, b in places if a != b]
        return ReportComparison(
            matrices=tuple(common),
            only_here=tuple(name for name in self if name not in other.matrices),
            only_there=tuple(name for name in other.matrices if name not in self.matrices),
            experts=frozenset(
                name
                for held in (self.matrices, other.matrices)
                for name, matrix in held.items()
                if isinstance(matrix, MatrixSensitivity) and matrix.expert_of is not None
            ),
            agreement={score: _agreement(here[score], there[score]) for score in here},
            movers=tuple(sorted(movers, key=lambda mover: -mover.moved)),
        )

    def summary(self) -> str:
        """The report as a text table, one matrix a line."""
        inverse = self.damping and f"inverse, block_size={self.block_size}, damping={self.damping:g}"
        labels = self.labels and f"labels from the {self.labels}"
        probes = self.hvp and f"{self.hvp}, {self.min_probes} to {self.probes} probes, tolerance={self.tolerance:g}"
        source = ", ".join(part for part in (inverse, self.mode, labels, probes) if part)
        lines = [
            f"{self.model_id}: {self.estimator}{f' ({source})' if source else ''}, "
            f"{self.sequences} sequences, {self.tokens} tokens, k={self.k:g}, alpha={self.alpha:g}"
        ]
        header = ("matrix", "shape", "trace", "top-k mean", "effective rank", "% of m")
        rows: list[tuple[str, ...]] = [header]
        rows += [
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
        if self.hvp:
            titles = ("probes", "tr H", "its error", "negative %", "top-k bias %", "rank bias %")
            noise = [titles, *map(_noise, self.matrices.values())]
            rows = [row + cells for row, cells in zip(rows, noise, strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *numbers in rows:
            cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *cells]))
        return "\n".join(lines)


def _noise(matrix: MatrixSensitivity) -> tuple[str, ...]:
    """What the probes tell of themselves, as cells of the summary."""
    probes = matrix.probes
    assert probes is not None
    biases = (matrix.topk_mean_bias, matrix.effective_rank_bias)
    return (
        str(probes.count),
        f"{probes.trace:.4g}",
        f"{probes.standard_error:.2g}",
        f"{100 * probes.negative_mass:.1f}",
        *("" if bias is None else f"{100 * bias:.1f}" for bias in biases),
    )


_adapter = TypeAdapter(SensitivityReport)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Agreement:
    """How alike two reports order their matrices by one score.

    Both are None where they are undefined: for a single matrix, and where a report gives every matrix the same score.

    Attributes:
        kendall: Kendall's tau-b (Kendall 1945), from -1 (the reverse order) to 1 (the same order).
        spearman: Spearman's rho, the correlation of the matrices' places, from -1 to 1; ties share their mean place.
    """

    kendall: Coefficient | None
    spearman: Coefficient | None


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Mover:
    """A matrix whose place by the fused score differs between two reports.

    Attributes:
        matrix: its module name.
        place: in the report that was asked; 1 is the highest score, and ties share their mean place.
        other_place: in the report that it was compared with.
    """

    matrix: str
    place: float
    other_place: float

    @property
    def moved(self) -> float:
        """How many places lie between the two."""
        return abs(self.place - self.other_place)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class ReportComparison:
    """What `SensitivityReport.compare` found; ``print`` shows it as tables, with the first ten movers.

    Attributes:
        matrices: names of the matrices in both reports, which are those compared, in module order.
        only_here: names in the report that was asked alone.
        only_there: names in the other report alone.
        experts: those of all these names that are experts stacked in one parameter.
        agreement: an `Agreement` for each of "trace", "topk_mean", "effective_rank" and "fused", the score that ranks
            are allotted by (`sensilora.allocate` makes it without the experts).
        movers: a `Mover` for each matrix whose place by the fused score differs, those that moved most first.
    """

    matrices: tuple[str, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    experts: frozenset[str] = frozenset()
    agreement: dict[ScoreName, Agreement]
    movers: tuple[Mover, ...]

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        def count(names: tuple[str, ...]) -> str:
            experts = sum(name in self.experts for name in names)
            return f"{len(names)}{f' ({experts} of them experts)' if experts else ''}"

        common = (
            f"matrices in both reports: {count(self.matrices)}, only in this one (here): {count(self.only_here)}, "
            f"only in the other (there): {count(self.only_there)}"
        )
        agreement = Table()
        agreement.add_column("order by", no_wrap=True)
        agreement.add_column("Kendall's tau", justify="right")
        agreement.add_column("Spearman's rho", justify="right")
        titles = {"topk_mean": "top-k mean", "effective_rank": "effective rank", "fused": "fused score"}
        for score, found in self.agreement.items():
            coefficients = (found.kendall, found.spearman)
            cells = ("undefined" if value is None else f"{value:.3f}" for value in coefficients)
            agreement.add_row(titles.get(score, score), *cells)
        if not self.movers:
            return Group(common, agreement, "no matrix has another place by the fused score")
        movers = Table()
        movers.add_column("matrix", no_wrap=True)
        for column in ("place here", "place there", "moved"):
            movers.add_column(column, justify="right")
        for mover in self.movers[:_SHOWN_MOVERS]:
            # Text, since rich would take brackets in a plain string for its markup.
            numbers = (mover.place, mover.other_place, mover.moved)
            movers.add_row(Text(mover.matrix), *(f"{number:.1f}".removesuffix(".0") for number in numbers))
        largest = "the matrices that move most by the fused score (place 1 is the most sensitive):"
        more = len(self.movers) - _SHOWN_MOVERS
        return Group(common, agreement, largest, movers, *([f"and {more} more"] if more > 0 else []))

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=160, force_terminal=False).print(self)
        return text.getvalue().rstrip("\n")


def _scores(matrices: Sequence[MatrixSensitivity | PlanEntry], weights: Weights) -> dict[ScoreName, list[float]]:
    trace = [matrix.trace for matrix in matrices]
    topk_mean = [matrix.topk_mean for matrix in matrices]
    effective_rank = [float(matrix.effective_rank) for matrix in matrices]
    fused = fuse_scores(trace, topk_mean, effective_rank, weights=weights).fused.tolist()
    return {"trace": trace, "topk_mean": topk_mean, "effective_rank": effective_rank, "fused": fused}


def _places(scores: Sequence[float]) -> list[float]:
    from scipy.stats import rankdata

    return rankdata([-score for score in scores]).tolist()


def _agreement(here: Sequence[float], there: Sequence[float]) -> Agreement:
    # scipy.stats takes most of a second to import, which a program that compares nothing should not pay.
    from scipy.stats import kendalltau, spearmanr

    if len(set(here)) == 1 or len(set(there)) == 1:
        return Agreement(kendall=None, spearman=None)
    return Agreement(
        kendall=float(kendalltau(here, there).statistic), spearman=float(spearmanr(here, there).statistic)
    )


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
