"""The rank plan: which matrix gets which LoRA rank, why, and for which model, in a JSON file a person can edit."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from sensilora._files import write_text
from sensilora.errors import PlanError, RankError
from sensilora.targets import whole_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from peft import LoraConfig

SCHEMA_VERSION: Literal[1] = 1

BudgetKind = Literal["average_rank", "total_rank", "total_parameters"]
Scores = Literal["fused", "global", "local"]
Weights = Literal["cv", "equal"]
Tie = tuple[str | tuple[str, ...], ...]


class _Record(BaseModel):
    # Strict, so that "4", true or 4.0 in the place of a rank is named as a mistake and not quietly converted.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class PlanEntry(_Record):
    """One weight matrix: its rank, its shape (out_features, in_features), and the numbers behind the rank."""

    rank: int = Field(ge=0)
    shape: tuple[PositiveInt, PositiveInt]
    trace: float = Field(ge=0)
    topk_mean: float = Field(ge=0)
    effective_rank: int = Field(ge=0)
    score_global: float = Field(ge=0)
    score_local: float = Field(ge=0)
    score_fused: float = Field(ge=0)

    @model_validator(mode="after")
    def _rank_fits(self) -> PlanEntry:
        if self.rank > min(self.shape):
            raise ValueError(f"rank {self.rank} is above min(out_features, in_features) = {min(self.shape)}")
        return self

    @property
    def parameters(self) -> int:
        """Trainable parameters of this matrix's adapter: rank * (in_features + out_features)."""
        return self.rank * sum(self.shape)


class Calibration(_Record):
    """How the sensitivities were measured; copied from the `SensitivityReport`.

    `variant` to `tolerance` are left out of the file, and of the content hash, where they are None: for an estimator
    that has no such setting, and in plans from before they were recorded.
    """

    estimator: str
    variant: Literal["diagonal", "inverse"] | None = None
    block_size: PositiveInt | None = None
    damping: float | None = Field(default=None, gt=0)
    hvp: Literal["double_backward", "central_differences"] | None = None
    probes: PositiveInt | None = None
    min_probes: PositiveInt | None = None
    tolerance: float | None = Field(default=None, ge=0)
    mode: str | None
    labels: str | None
    draws: int | None
    seed: int | None
    tokens: int
    sequences: int
    k: float
    alpha: float
    versions: dict[str, str]

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = {name for name, field in type(self).model_fields.items() if not field.is_required()}
        return {name: value for name, value in serialized(self).items() if value is not None or name not in optional}


class AllocationSettings(_Record):
    """How scores became ranks; the arguments of `sensilora.allocate` of the same names."""

    strategy: Literal["scaled", "progressive"]
    classes: int = Field(ge=1)
    weights: Weights
    scores: Scores
    temper: float = Field(ge=0)
    min_rank: int = Field(ge=0)
    max_rank: int | None = Field(ge=1)
    multiple: int = Field(ge=1)
    tie: Tie | None

    @model_validator(mode="after")
    def _bounds_in_order(self) -> AllocationSettings:
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"max_rank {self.max_rank} is below min_rank {self.min_rank}")
        return self


class Budget(_Record):
    """What was asked for (`kind`, `value`) and what the ranks use of it.

    `used` and `left_over` count ranks, or trainable parameters where `kind` is "total_parameters". `left_over` is
    negative only in a plan whose ranks were raised by hand.
    """

    kind: BudgetKind
    value: int | float
    used: int = Field(ge=0)
    left_over: int

    @field_validator("value", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"must be a finite number above 0, not {value!r}")
        if info.data.get("kind") != "average_rank" and not isinstance(value, int):
            raise ValueError(f"must be a whole number, not {value!r}")
        return value

    @property
    def total(self) -> int:
        """The budget in the unit of `used`."""
        return self.used + self.left_over

    @classmethod
    def of(cls, kind: BudgetKind, value: float, entries: Mapping[str, PlanEntry]) -> Budget:
        """The budget with what `entries` use of it."""
        if kind == "total_parameters":
            used = sum(entry.parameters for entry in entries.values())
        else:
            used = sum(entry.rank for entry in entries.values())
        return cls(kind=kind, value=value, used=used, left_over=budget_total(kind, value, len(entries)) - used)


class ScalingRule(_Record):
    """How the LoRA scale s_m of a matrix of rank r_m follows from `value`.

    "constant": s_m = value; "alpha": s_m = value / r_m; "rslora": s_m = value / sqrt(r_m).
    """

    rule: Literal["constant", "alpha", "rslora"]
    value: float = Field(gt=0)

    def scaling(self, rank: int) -> float:
        """The effective scale s_m of a matrix of this rank; 0.0 where the rank is 0."""
        if rank == 0:
            return 0.0
        return {"constant": self.value, "alpha": self.value / rank, "rslora": self.value / math.sqrt(rank)}[self.rule]


class RankPlan(_Record):
    """A rank for every adapted weight matrix under one budget; made by `sensilora.allocate`, kept as JSON.

    `matrices` maps full module names to `PlanEntry`, in module order. Plans are not changed in place:
    `with_ranks` gives another plan.
    """

    schema_version: Literal[1]
    model_id: str
    fingerprint: str
    calibration: Calibration | None
    allocation: AllocationSettings
    budget: Budget
    scaling: ScalingRule
    matrices: dict[str, PlanEntry] = Field(min_length=1)

    @classmethod
    def uniform(
        cls,
        shapes: Mapping[str, tuple[int, int]],
        rank: int,
        *,
        scaling: float = 1.0,
        model_id: str = "",
        fingerprint: str = "",
    ) -> RankPlan:
        """Plain LoRA without a calibration: the same rank for every matrix.

        Args:
            shapes: (out_features, in_features) by full module name, in module order.
            rank: The rank of every matrix, at least 1.
            scaling: The scale s of every adapter, lora_alpha / r in PEFT's terms.
            model_id: Name of the model, for the record.
            fingerprint: `sensilora.targets.fingerprint` of the model the plan is for.

        Raises:
            RankError: `rank` is no whole number, below 1, or above min(in, out) of a matrix.
            PlanError: `shapes` is empty, or another argument is out of range.
        """
        if not shapes:
            raise PlanError("a plan needs at least one matrix; shapes is empty")
        rank = whole_rank(rank)
        if rank < 1:
            raise RankError(f"rank must be at least 1, not {rank}")
        if not 0 < scaling < math.inf:
            raise PlanError(f"scaling must be a finite number above 0, not {scaling!r}")
        zeros: dict[str, Any] = dict.fromkeys(
            ["trace", "topk_mean", "score_global", "score_local", "score_fused"], 0.0
        )
        try:
            entries = {
                name: PlanEntry(
                    rank=_fitting(name, rank, shape), shape=(shape[0], shape[1]), effective_rank=0, **zeros
                )
                for name, shape in shapes.items()
            }
            return cls(
                schema_version=SCHEMA_VERSION,
                model_id=model_id,
                fingerprint=fingerprint,
                calibration=None,
                allocation=AllocationSettings(
                    strategy="scaled",
                    classes=3,
                    weights="cv",
                    scores="fused",
                    temper=0.0,
                    min_rank=1,
                    max_rank=None,
                    multiple=1,
                    tie=None,
                ),
                budget=Budget.of("total_rank", rank * len(entries), entries),
                scaling=ScalingRule(rule="constant", value=scaling),
                matrices=entries,
            )
        except ValidationError as error:
            raise PlanError(first_error(error)) from error

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by full module name, in module order; 0 where the matrix is not adapted."""
        return {name: entry.rank for name, entry in self.matrices.items()}

    @property
    def parameters(self) -> int:
        """Trainable parameters of all adapters together."""
        return sum(entry.parameters for entry in self.matrices.values())

    @property
    def content_hash(self) -> str:
        """SHA-256 (hexadecimal) over the plan's content; equal for two plans exactly when they say the same."""
        canonical = json.dumps(self.model_dump(mode="json"), ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def scaling_of(self, name: str) -> float:
        """The effective LoRA scale s_m (alpha_m / r_m) of the matrix `name`; 0.0 where its rank is 0."""
        return self.scaling.scaling(self.matrices[name].rank)

    def with_ranks(self, ranks: Mapping[str, int]) -> RankPlan:
        """The same plan with other ranks for the named matrices; what it uses of the budget is counted again.

        Raises:
            PlanError: a name is not in the plan.
            RankError: a rank is no whole number, negative, or above min(in, out).
        """
        unknown = [name for name in ranks if name not in self.matrices]
        if unknown:
            raise PlanError(
                f"the plan has no matrix {unknown[0]!r}; it has, for example, {next(iter(self.matrices))!r}"
            )
        entries = {
            name: entry.model_copy(update={"rank": _fitting(name, ranks.get(name, entry.rank), entry.shape)})
            for name, entry in self.matrices.items()
        }
        budget = Budget.of(self.budget.kind, self.budget.value, entries)
        return self.model_copy(update={"matrices": entries, "budget": budget})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, one line a matrix, in one atomic step."""
        fields = {**self.model_dump(mode="json"), "content_hash": self.content_hash}
        lines = [
            f"{_json(key)}: " + (_table(value) if key == "matrices" else _json(value))
            for key, value in fields.items()
        ]
        return write_text(path, "{\n  " + ",\n  ".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, allow_edited: bool = False) -> RankPlan:
        """Read a plan and check all of it.

        Args:
            path: The JSON file.
            allow_edited: Take a plan whose ranks were changed by hand: the content hash is not checked, and what
                the ranks use of the budget is counted again (it may be above the budget then). Every other check
                is made all the same.

        Raises:
            PlanError: the file cannot be read, is truncated, has another schema version, a missing, unknown,
                repeated or out-of-range field (which the message names), or was edited.
        """
        data = _read_object(path)
        if "budget" not in data:
            what = "a sensitivity report" if "estimator" in data else "something else"
            raise PlanError(f"{path} is {what} and no rank plan; name the file that `sensilora plan --output` wrote")
        if data.get("schema_version") != SCHEMA_VERSION:
            raise PlanError(
                f"{path}: schema_version is {data.get('schema_version')!r}, and this version of sensilora reads "
                f"{SCHEMA_VERSION}; make the plan again"
            )
        content_hash = data.pop("content_hash", None)
        if not isinstance(content_hash, str):
            raise PlanError(f"{path}: content_hash is missing or not a string; the plan was edited or damaged")
        try:
            # By way of JSON once more, since only there does strict validation take a list for a tuple.
            plan = cls.model_validate_json(json.dumps(data))
        except ValidationError as error:
            raise PlanError(f"{path}: {first_error(error)}") from error
        recounted = plan.with_ranks({})
        if allow_edited:
            return recounted
        if content_hash != plan.content_hash:
            raise PlanError(
                f"{path}: content_hash does not match the content; the plan was edited or damaged "
                "(to accept an edited plan pass allow_edited=True, on the command line --allow-edited)"
            )
        if recounted.budget != plan.budget:
            raise PlanError(
                f"{path}: budget.used {plan.budget.used} and budget.left_over {plan.budget.left_over} do not fit the "
                f"ranks, which give {recounted.budget.used} and {recounted.budget.left_over}"
            )
        return plan

    def summary(self) -> str:
        """A plain text table: every matrix with its metrics, score, rank and scale, and the totals above it."""
        chosen = self.allocation
        head = [
            f"rank plan for {self.model_id or 'an unnamed model'}: {len(self.matrices)} matrices, "
            f"total rank {sum(self.ranks.values())}, {self.parameters:,} trainable parameters",
            f"budget {self.budget.kind} {self.budget.value:,}: used {self.budget.used:,}, "
            f"left over {self.budget.left_over:,}",
            f"strategy {chosen.strategy}, scores {chosen.scores}, weights {chosen.weights}, "
            f"temper {chosen.temper:g}, scaling {self.scaling.rule} {self.scaling.value:g}",
        ]
        if self.calibration is not None:
            variant = self.calibration.variant if self.calibration.variant != "diagonal" else None
            kind = [self.calibration.estimator, variant, self.calibration.mode, self.calibration.labels]
            head.append(
                f"measured by {' / '.join(part for part in kind if part)} on {self.calibration.tokens:,} tokens in "
                f"{self.calibration.sequences:,} sequences"
            )
        columns = ("matrix", "out x in", "trace", "top-k mean", "eff. rank", "score", "rank", "scale")
        rows = [
            (
                name,
                f"{entry.shape[0]} x {entry.shape[1]}",
                f"{entry.trace:.4g}",
                f"{entry.topk_mean:.4g}",
                str(entry.effective_rank),
                f"{getattr(entry, f'score_{chosen.scores}'):.4g}",
                str(entry.rank),
                f"{self.scaling_of(name):.4g}",
            )
            for name, entry in self.matrices.items()
        ]
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        table = [
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(line))
            for line in (zip(row, widths, strict=True) for row in (columns, *rows))
        ]
        return "\n".join([*head, "", table[0], "-" * len(table[0]), *table[1:]])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the ranks by layer and projection; see `sensilora.plots.plot_ranks`."""
        from sensilora.plots import plot_ranks  # matplotlib is an extra

        return plot_ranks(self, path)

    def to_lora_config(self, **overrides: Any) -> LoraConfig:
        """The plan as a ``peft.LoraConfig``; see `sensilora.integrations.peft.lora_config_from_plan`."""
        from sensilora.integrations.peft import lora_config_from_plan  # peft is an extra

        return lora_config_from_plan(self, **overrides)


def budget_total(kind: BudgetKind, value: float, matrices: int) -> int:
    """The whole number of ranks or parameters that a budget allows; an average rank is rounded down."""
    # The small term keeps an average such as 4.35 on 100 matrices (434.99999999999994) from losing a rank.
    return math.floor(value * matrices + 1e-9) if kind == "average_rank" else int(value)


def first_error(error: ValidationError) -> str:
    """One sentence for the first thing pydantic found wrong: the field's path, the reason, what was there."""
    details = error.errors(include_url=False)[0]
    field = ".".join(map(str, details["loc"]))
    reason = details["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if details["type"] not in {"missing", "value_error", "extra_forbidden", "too_short", "json_invalid"}:
        reason += f", not {details['input']!r}"
    return f"{field}: {reason}" if field else reason


def _fitting(name: str, rank: int, shape: tuple[int, int]) -> int:
    rank = whole_rank(rank)
    if not 0 <= rank <= min(shape):
        raise RankError(f"rank {rank} of {name} is outside 0 to min(out_features, in_features) = {min(shape)}")
    return rank


def _read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise PlanError(f"{path}: {repeated} appears twice; remove one of them")
        return found

    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except IsADirectoryError as error:
        raise PlanError(f"the plan {path} is a folder; name the plan's JSON file") from error
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(
            f"{path} is not complete JSON ({error}); it is no plan, or was truncated or damaged"
        ) from error
    if not isinstance(data, dict):
        raise PlanError(f"{path} holds no JSON object, so it is not a rank plan")
    return data


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _table(entries: dict[str, dict[str, Any]]) -> str:
    """The matrices as JSON, one line each, padded so that the columns line up."""
    names = [f"{_json(name)}: " for name in entries]
    columns = {key: [_json(entry[key]) for entry in entries.values()] for key in next(iter(entries.values()))}
    widths = {key: max(map(len, cells)) for key, cells in columns.items()}
    lines = [
        name.ljust(max(map(len, names)))
        + "{"
        + ", ".join(f"{_json(key)}: {cells[i].rjust(widths[key])}" for key, cells in columns.items())
        + "}"
        for i, name in enumerate(names)
    ]
    return "{\n    " + ",\n    ".join(lines) + "\n  }"
