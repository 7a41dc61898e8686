"""How estimators order a model's matrices on real text, for docs/orderings.md: ``python -m benchmarks.orderings``.

all-MiniLM-L6-v2 as the demo loads it, on parts of PIQA, PubMed abstracts, LexGLUE and SST-2, which are not in this
package: ``--data`` names the folder that holds them, else shared/data in the checkout or beside it. The figures go to
benchmarks/results/orderings.json; page and pictures are made from that file alone (``--page-only``). On a GPU
(``--device cuda``) Hutchinson gets as many sequences as the others, and 16 times the probes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.run import current_commit, provenance
from sensilora.allocation import fuse_scores
from sensilora.data import Row, label_names, read_rows
from sensilora.demo import MODEL_NAME, bundled_model
from sensilora.errors import SensiloraError
from sensilora.integrations.transformers import classification_batches, load_sequence_classifier, load_tokenizer
from sensilora.sensitivity.calibrate import calibrate
from sensilora.sensitivity.head import warmed_head
from sensilora.sensitivity.report import SensitivityReport
from sensilora.targets import find_targets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "orderings.json"
PAGE = ROOT / "docs" / "orderings.md"

Rows = dict[str, dict[str, Any]]

SETS = ("piqa", "pubmed", "lexglue", "sst2")
# Sequences of a half, of the part that Hutchinson gets, and of the shares that are compared with the whole.
HALF, SMALL = 128, 8
SHARES = {10: 26, 20: 51, 50: HALF, 100: 2 * HALF}
HEAD_ROWS, HEAD_STEPS = 96, 32
MAX_LENGTH, BATCH = 64, 16
PROBES, MANY_PROBES = 8, 128
HEADINGS = ("BACKGROUND", "METHODS", "OBJECTIVE", "RESULTS")
TITLES = 12


def data_folder(named: str | None) -> Path:
    """The folder of the data sets.

    Raises:
        SensiloraError: there is none.
    """
    folders = [Path(named)] if named else [root / "shared/data" for root in (ROOT, ROOT.parent)]
    for folder in folders:
        if (folder / "piqa").is_dir():
            return folder
    raise SensiloraError(
        f"no data in {folders[0]}: name the folder that holds piqa, pubmedqa_abstracts, lexglue_ledgar and glue_sst2 "
        "with --data"
    )


def _piqa(folder: Path) -> list[Row]:
    """Goal and one of its two solutions, drawn; the label is whether it is the right one."""
    draw = random.Random(0)
    both = [
        read_rows(folder / "piqa/dev.jsonl.gz", text_fields=["goal", field], label_field="label")
        for field in ("sol1", "sol2")
    ]
    picked = [(pair, draw.randrange(2)) for pair in zip(*both, strict=True)]
    return [Row(pair[which].texts, int(pair[which].label == which)) for pair, which in picked]


def _pubmed(folder: Path) -> list[Row]:
    rows = read_rows(folder / "pubmedqa_abstracts/train.jsonl.gz", label_field="section")
    return [row for row in rows if row.label in HEADINGS]


def _lexglue(folder: Path) -> list[Row]:
    rows = read_rows(folder / "lexglue_ledgar/test.jsonl.gz")
    counts = Counter(row.label for row in rows)
    common = sorted(counts, key=lambda label: (-counts[label], str(label)))[:TITLES]
    return [row for row in rows if row.label in common]


def _sst2(folder: Path) -> list[Row]:
    return read_rows(folder / "glue_sst2/train.jsonl.gz", text_fields=["sentence"])


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    "piqa": _piqa,
    "pubmed": _pubmed,
    "lexglue": _lexglue,
    "sst2": _sst2,
}


@dataclass(frozen=True)
class Cell:
    """One calibration: which sequences (from, to), and how."""

    part: str
    rows: tuple[int, int]
    estimator: str
    labels: str = "data"
    seed: int = 0
    head: int = 0
    probes: int = PROBES

    @property
    def name(self) -> str:
        labels = "-model" if self.labels == "model" else ""
        seed = f"/seed{self.seed}" if self.seed else ""
        head = f"/head{self.head}" if self.head else ""
        return f"{self.part}/{self.estimator}{labels}{seed}{head}"


A, B = (0, HALF), (HALF, 2 * HALF)
SMALL_A, SMALL_B = (0, SMALL), (HALF, HALF + SMALL)


def cells(name: str, device: str) -> list[Cell]:
    """The calibrations of one set."""
    made = [Cell(part, rows, way) for way in ("activation", "fisher") for part, rows in (("a", A), ("b", B))]
    if name == "piqa":
        for share, count in SHARES.items():
            if count != HALF:
                made += [Cell(f"{share}%", (0, count), way) for way in ("activation", "fisher")]
    if name in ("piqa", "sst2"):
        made.append(Cell("a", A, "fisher", labels="model"))
    # Hutchinson's products with the Hessian are affordable on the set of the shortest texts.
    if name == "sst2":
        made.append(Cell("a", A, "fisher", head=1))
        made += [Cell("small_a", SMALL_A, way) for way in ("activation", "fisher", "hutchinson")]
        made.append(Cell("small_a", SMALL_A, "fisher", labels="model"))
        made.append(Cell("small_a", SMALL_A, "hutchinson", seed=1))
        made += [Cell("small_b", SMALL_B, way) for way in ("activation", "fisher", "hutchinson")]
        if device == "cuda":
            made += [Cell("a", A, "hutchinson", seed=seed, probes=MANY_PROBES) for seed in (0, 1)]
            made.append(Cell("b", B, "hutchinson", probes=MANY_PROBES))
    return made


def measure(folder: Path, reports: Path, names: Sequence[str], device: str) -> Iterator[dict[str, Any]]:
    """Calibrate on the named sets. Yields each report's row, when the report is in the folder `reports`."""
    source = bundled_model()
    tokenizer = load_tokenizer(source)
    for name in names:
        rows = _READERS[name](folder)
        random.Random(0).shuffle(rows)
        rows = rows[: 2 * HALF + HEAD_ROWS]
        if len(rows) < 2 * HALF + HEAD_ROWS:
            raise SensiloraError(f"{name} has {len(rows)} rows; {2 * HALF + HEAD_ROWS} are needed")
        labels = label_names(rows)

        def batches(
            start: int, stop: int, size: int = BATCH, rows: list[Row] = rows, labels: Any = labels
        ) -> list[dict[str, Tensor]]:
            made = classification_batches(
                tokenizer, rows[start:stop], labels=labels, max_length=MAX_LENGTH, batch_size=size
            )
            # In their order by length a head would see all the short rows first.
            random.Random(0).shuffle(made)
            return made

        of_set = cells(name, device)
        for head in sorted({cell.head for cell in of_set}):
            torch.manual_seed(head)
            model = load_sequence_classifier(source, labels=[str(label) for label in labels]).requires_grad_(False)
            model.name_or_path = MODEL_NAME
            model.to(device)
            targets = [target for target in find_targets(model) if target.startswith("bert.encoder.")]
            # Each calibration by itself would train its head on its own sequences, few or many.
            with warmed_head(
                model, batches(2 * HALF, 2 * HALF + HEAD_ROWS), HEAD_STEPS,
                modules={}, loss_fn=None, shift_labels=None, progress=False,
            ):  # fmt: skip
                accuracy = _accuracy(model, batches(*A))
                for cell in of_set:
                    if cell.head != head:
                        continue
                    # A product with the Hessian takes about as long for few rows as for many.
                    size = HALF if cell.estimator == "hutchinson" else BATCH
                    made = batches(*cell.rows, size=size)
                    yield _calibrated(name, cell, model, made, targets, accuracy, len(labels), reports)


def _accuracy(model: Any, batches: list[dict[str, Tensor]]) -> float:
    right, rows = 0, 0
    for batch in batches:
        inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            predicted = model(**inputs).logits.argmax(-1).cpu()
        right, rows = right + int((predicted == batch["labels"]).sum()), rows + len(predicted)
    return right / rows


def _calibrated(
    name: str,
    cell: Cell,
    model: Any,
    batches: list[dict[str, Tensor]],
    targets: list[str],
    accuracy: float,
    classes: int,
    reports: Path,
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if cell.estimator == "hutchinson":
        options = {"probes": cell.probes, "min_probes": cell.probes}
    if cell.estimator != "activation":
        options |= {"labels": cell.labels, "seed": cell.seed}
    start = time.perf_counter()
    report = calibrate(model, batches, estimator=cell.estimator, targets=targets, progress=False, **options)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    report.save(reports / _file(f"{name}/{cell.name}"))
    row: dict[str, Any] = {
        "id": f"report/{name}/{cell.name}",
        "estimator": cell.estimator,
        "labels": None if cell.estimator == "activation" else cell.labels,
        "seed": cell.seed,
        "head": cell.head,
        "head_accuracy": accuracy,
        "classes": classes,
        "sequences": report.sequences,
        "tokens": report.tokens,
        "seconds": round(seconds, 2),
        "metrics": {
            matrix: [found.trace, found.topk_mean, found.effective_rank] for matrix, found in report.matrices.items()
        },
    }
    if cell.estimator == "hutchinson":
        row |= {"probes": cell.probes, "noise": _noise(report)}
    return row


def _noise(report: SensitivityReport) -> dict[str, float]:
    """Medians over the matrices of what the probes tell of themselves."""
    matrices = list(report.matrices.values())
    return {
        "standard_error": statistics.median(
            m.probes.standard_error / abs(m.probes.trace) for m in matrices if m.probes is not None
        ),
        "negative_mass": statistics.median(m.probes.negative_mass for m in matrices if m.probes is not None),
        "topk_mean_bias": statistics.median(m.topk_mean_bias or 0.0 for m in matrices),
        "effective_rank_bias": statistics.median(m.effective_rank_bias or 0.0 for m in matrices),
    }


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which reports are compared: those of one set with each other, and the sets with each other on A."""
    found = []
    measured = set(names)
    sets = list(dict.fromkeys(name.split("/")[0] for name in names))
    for name in sets:
        own = [other.partition("/")[2] for other in names if other.startswith(name + "/")]
        for index, first in enumerate(own):
            for second in own[index + 1 :]:
                if _same_data(first, second) or _same_way(first, second):
                    found.append((f"{name}/{first}", f"{name}/{second}"))
    for way in ("a/activation", "a/fisher"):
        for index, one in enumerate(sets):
            found += [(f"{one}/{way}", f"{other}/{way}") for other in sets[index + 1 :]]
    return [pair for pair in found if measured.issuperset(pair)]


def _same_data(first: str, second: str) -> bool:
    return first.split("/")[0] == second.split("/")[0]


def _same_way(first: str, second: str) -> bool:
    return first.split("/")[1:] == second.split("/")[1:]


def with_comparisons(rows: Rows, folder: Path) -> list[dict[str, Any]]:
    """The reports' rows in order, and those of their comparisons, from the reports in `folder`.

    Raises:
        FileNotFoundError: a report is not there, since another folder was named for it.
    """
    wanted = [f"{name}/{cell.name}" for name in SETS for cell in cells(name, "cuda")]
    names = [name for name in wanted if f"report/{name}" in rows]
    reports = {name: SensitivityReport.load(folder / _file(name)) for name in names}
    return [
        *(rows[f"report/{name}"] for name in names),
        *(_compared(first, second, reports) for first, second in pairs(names)),
    ]


def _file(name: str) -> str:
    return f"{name.replace('/', '-')}.json"


def _compared(first: str, second: str, reports: dict[str, SensitivityReport]) -> dict[str, Any]:
    found = reports[first].compare(reports[second])
    return {
        "id": f"compare/{first}:{second}",
        "kendall": {score: agreement.kendall for score, agreement in found.agreement.items()},
        "spearman": {score: agreement.spearman for score, agreement in found.agreement.items()},
        "movers": [[mover.matrix, mover.place, mover.other_place] for mover in found.movers[:3]],
    }


def load() -> Rows:
    """The rows of the results by id."""
    return {row["id"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))}


def write_results(rows: Sequence[dict[str, Any]]) -> None:
    """One row a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    RESULTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


# --- the page

NAMES = {"piqa": "PIQA", "pubmed": "PubMed", "lexglue": "LexGLUE", "sst2": "SST-2"}
WAYS = {
    "activation": "activation",
    "fisher": "Fisher",
    "fisher-model": "Fisher, sampled labels",
    "hutchinson": "Hutchinson",
}


def tau(rows: Rows, first: str, second: str, score: str = "fused") -> float | None:
    """Kendall's tau of two reports by one score; None where they were not compared, or it is undefined."""
    row = rows.get(f"compare/{first}:{second}") or rows.get(f"compare/{second}:{first}")
    return None if row is None else row["kendall"][score]


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    right = "|".join(["---", *["---:"] * (len(header) - 1)])
    return "\n".join([f"| {' | '.join(header)} |", f"|{right}|", *(f"| {' | '.join(line)} |" for line in lines)])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def estimators_table(rows: Rows) -> str:
    """The estimators against each other on A, and what each differs from itself by."""
    others = [
        ("activation, Fisher", "a/activation", "a/fisher"),
        ("activation, Fisher with sampled labels", "a/activation", "a/fisher-model"),
        ("Fisher, Fisher with sampled labels", "a/fisher", "a/fisher-model"),
        ("*noise:* Fisher, another head", "a/fisher", "a/fisher/head1"),
        ("*noise:* Fisher, the other 128 sequences", "a/fisher", "b/fisher"),
        ("*noise:* activation, the other 128 sequences", "a/activation", "b/activation"),
        (f"activation, Hutchinson with {MANY_PROBES} probes", "a/activation", "a/hutchinson"),
        (f"Fisher, Hutchinson with {MANY_PROBES} probes", "a/fisher", "a/hutchinson"),
        (f"*noise:* Hutchinson, {MANY_PROBES} other probes", "a/hutchinson", "a/hutchinson/seed1"),
        (f"*noise:* Hutchinson with {MANY_PROBES} probes, the other 128 sequences", "a/hutchinson", "b/hutchinson"),
    ]
    lines = [
        [text, *(_cell(tau(rows, f"{name}/{first}", f"{name}/{second}")) for name in SETS)]
        for text, first, second in others
    ]
    return _table(["", *(NAMES[name] for name in SETS)], [line for line in lines if any(line[1:])])


def hutchinson_table(rows: Rows) -> str:
    """The three estimators on the same few sequences, by the fused score and by the trace."""
    others = [
        ("activation, Hutchinson", "small_a/activation", "small_a/hutchinson"),
        ("Fisher, Hutchinson", "small_a/fisher", "small_a/hutchinson"),
        ("Fisher with sampled labels, Hutchinson", "small_a/fisher-model", "small_a/hutchinson"),
        ("activation, Fisher", "small_a/activation", "small_a/fisher"),
        ("*noise:* Hutchinson, other probes", "small_a/hutchinson", "small_a/hutchinson/seed1"),
        ("*noise:* Hutchinson, 8 other sequences", "small_a/hutchinson", "small_b/hutchinson"),
        ("*noise:* Fisher, 8 other sequences", "small_a/fisher", "small_b/fisher"),
        ("*noise:* activation, 8 other sequences", "small_a/activation", "small_b/activation"),
        ("Fisher, 8 sequences and all 128", "small_a/fisher", "a/fisher"),
        ("activation, 8 sequences and all 128", "small_a/activation", "a/activation"),
    ]
    lines = [
        [text, *(_cell(tau(rows, f"sst2/{first}", f"sst2/{second}", score)) for score in ("fused", "trace"))]
        for text, first, second in others
    ]
    return _table([NAMES["sst2"], "fused score", "trace"], lines)


def noise_table(rows: Rows) -> str:
    """What Hutchinson's probes tell of themselves."""
    lines = []
    for name, row in rows.items():
        if "noise" in row:
            found = row["noise"]
            lines.append(
                [
                    f"`{name.removeprefix('report/')}`",
                    str(row["probes"]),
                    f"{100 * found['standard_error']:.0f}%",
                    f"{100 * found['negative_mass']:.0f}%",
                    f"{100 * found['topk_mean_bias']:+.0f}%",
                    f"{100 * found['effective_rank_bias']:+.0f}%",
                ]
            )
    header = [
        "report", "probes", "trace's standard error", "negative mass", "top-k mean from half the probes",
        "effective rank from half the probes",
    ]  # fmt: skip
    return _table(header, lines)


def movers_table(rows: Rows) -> str:
    """What moves most from activation's order to Fisher's, on A."""
    lines = []
    for name in SETS:
        row = rows.get(f"compare/{name}/a/activation:{name}/a/fisher")
        if row is not None:
            moved = (f"{_kind(m)} of layer {_layer(m)} {here:g} → {there:g}" for m, here, there in row["movers"])
            lines.append([NAMES[name], _cell(row["spearman"]["fused"]), "; ".join(moved)])
    return _table(["", "Spearman's rho", "place by activation → by Fisher, those that move most"], lines)


def domains_table(rows: Rows, estimator: str) -> str:
    """The sets against each other on A; on the diagonal each against its own other half."""
    lines = []
    for one in SETS:
        cells = []
        for other in SETS:
            part = "b" if one == other else "a"
            found = _cell(tau(rows, f"{one}/a/{estimator}", f"{other}/{part}/{estimator}"))
            cells.append(f"*{found}*" if found and one == other else found)
        lines.append([NAMES[one], *cells])
    return _table([WAYS[estimator], *(NAMES[name] for name in SETS)], lines)


def shares_table(rows: Rows) -> str:
    """Shares of PIQA against all of it."""
    lines = []
    for share, count in SHARES.items():
        if share != 100:
            part = _part(share)
            cells = [_cell(tau(rows, f"piqa/{part}/{way}", f"piqa/100%/{way}")) for way in ("activation", "fisher")]
            lines.append([f"{share}% ({count} sequences)", *cells])
    halves = [_cell(tau(rows, f"piqa/a/{way}", f"piqa/b/{way}")) for way in ("activation", "fisher")]
    lines.append(["*noise:* 50% and the other 50%", *halves])
    return _table(["", "activation", "Fisher"], lines)


def _part(share: int) -> str:
    return "a" if SHARES[share] == HALF else f"{share}%"


def reports_table(rows: Rows) -> str:
    """Every report, and where they were measured."""
    measured = {name: row for name, row in rows.items() if name.startswith("report/")}
    lines = [
        [
            f"`{name.removeprefix('report/')}`",
            str(row["sequences"]),
            f"{row['tokens']:,}",
            f"{row['seconds']:.1f}",
            row["labels"] or "none",
            f"{100 * row['head_accuracy']:.0f}% of {row['classes']}",
        ]
        for name, row in measured.items()
    ]
    table = _table(["report", "sequences", "tokens", "seconds", "labels", "head's accuracy on A, classes"], lines)
    keys = ("gpu", "cpu", "torch", "transformers", "python", "commit", "date")
    places = {", ".join(f"{key} {row[key]}" for key in keys if key in row) for row in measured.values()}
    return "\n".join([table, "", *(f"Measured with {place}." for place in sorted(places))])


# Okabe and Ito's palette, told apart with any colour vision; marks differ in shape as well.
_STYLES = {"activation": ("#0072B2", "o"), "fisher": ("#E69F00", "s"), "hutchinson": ("#009E73", "^")}
_TWO = "two estimators"


def plot_tau(rows: Rows) -> tuple[Figure, str]:
    """Every tau of the fused score, by what differs between the two reports."""
    figure = _figure((8.5, 4.2))
    axes = figure.subplots()
    groups = tau_groups(rows)
    drawn, ticks, told = set(), [], []
    for line, (text, points) in enumerate(reversed(groups)):
        ticks.append(text)
        for estimator in dict.fromkeys(way for way, _ in points):
            found = [value for way, value in points if way == estimator]
            colour, marker = _STYLES.get(estimator, ("0.35", "D"))
            label = "_" if estimator in drawn else WAYS.get(estimator, _TWO)
            drawn.add(estimator)
            offset = 0.16 * (1 - list(_STYLES).index(estimator)) if estimator in _STYLES else 0.0
            axes.plot(
                found, [line + offset] * len(found), marker, color=colour, markersize=7, label=label,
                markeredgecolor="white",
            )  # fmt: skip
            extremes = dict.fromkeys(f"{value:.2f}" for value in (min(found), max(found)))
            told.append(f"{text}, {WAYS.get(estimator, _TWO)} {' to '.join(extremes)}")
    axes.set_yticks(range(len(ticks)), ticks)
    axes.set_ylim(-0.6, len(ticks) - 0.4)
    lowest = min(value for _, points in groups for _, value in points)
    axes.set_xlim(min(0.0, lowest) - 0.03, 1.03)
    axes.axvline(0, color="0.35", linewidth=1.2)
    axes.set_xlabel("Kendall's tau of the fused score's order (36 matrices)")
    axes.grid(axis="x", color="0.9")
    axes.grid(axis="y", color="0.95")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: [*WAYS.values(), _TWO].index(labels[i]))
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper left",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    return figure, f"Dots of Kendall's tau. {'; '.join(reversed(told))}."


def tau_groups(rows: Rows) -> list[tuple[str, list[tuple[str, float]]]]:
    """What differs between two reports, and (estimator, tau) of each such comparison."""
    both = ("activation", "fisher")
    wanted: list[tuple[str, list[tuple[str, str, str]]]] = [
        ("50% of PIQA and all of it", [(way, f"piqa/a/{way}", f"piqa/100%/{way}") for way in both]),
        ("10% of PIQA and all of it", [(way, f"piqa/10%/{way}", f"piqa/100%/{way}") for way in both]),
        (
            "two halves of a set",
            [(way, f"{name}/a/{way}", f"{name}/b/{way}") for way in (*both, "hutchinson") for name in SETS],
        ),
        (
            "two sets",
            [
                (way, f"{one}/a/{way}", f"{other}/a/{way}")
                for way in both
                for index, one in enumerate(SETS)
                for other in SETS[index + 1 :]
            ],
        ),
        ("another head", [("fisher", f"{name}/a/fisher", f"{name}/a/fisher/head1") for name in SETS]),
        (
            "other probes",
            [("hutchinson", f"{name}/small_a/hutchinson", f"{name}/small_a/hutchinson/seed1") for name in SETS],
        ),
        (
            "8 sequences and 8 others",
            [
                (way, f"{name}/small_a/{way}", f"{name}/small_b/{way}")
                for way in (*both, "hutchinson")
                for name in SETS
            ],
        ),
        (
            "Fisher and Hutchinson",
            [("two", f"{name}/small_a/fisher", f"{name}/small_a/hutchinson") for name in SETS],
        ),
        ("activation and Fisher", [("two", f"{name}/a/activation", f"{name}/a/fisher") for name in SETS]),
        (
            "activation and Hutchinson",
            [("two", f"{name}/small_a/activation", f"{name}/small_a/hutchinson") for name in SETS],
        ),
    ]
    found = [
        (text, [(way, value) for way, one, other in pairs if (value := tau(rows, one, other)) is not None])
        for text, pairs in wanted
    ]
    return [(text, points) for text, points in found if points]


def plot_places(rows: Rows) -> tuple[Figure, str]:
    """Heat maps of every matrix's place under each estimator, on the same sequences of SST-2."""
    figure = _figure((8.5, 4.4))
    told = []
    ways = [way for way in _STYLES if f"report/sst2/small_a/{way}" in rows]
    for axes, way in zip(figure.subplots(1, len(ways), sharey=True, squeeze=False)[0], ways, strict=True):
        places = fused_places(rows[f"report/sst2/small_a/{way}"])
        kinds = list(dict.fromkeys(_kind(matrix) for matrix in places))
        layers = sorted({_layer(matrix) for matrix in places})
        grid = np.full((len(kinds), len(layers)), np.nan)
        for matrix, place in places.items():
            grid[kinds.index(_kind(matrix)), layers.index(_layer(matrix))] = place
        image = axes.pcolormesh(grid, cmap="YlGnBu_r", vmin=1, vmax=len(places), edgecolors="white", linewidth=1)
        for (row, column), place in np.ndenumerate(grid):
            if not np.isnan(place):
                axes.text(
                    column + 0.5, row + 0.5, f"{place:g}", ha="center", va="center", fontsize=8,
                    color="white" if place < 0.45 * len(places) else "black",
                )  # fmt: skip
        axes.set_title(WAYS[way], fontsize=11, loc="left")
        axes.set_xticks(np.arange(len(layers)) + 0.5, layers, fontsize=8)
        axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds, fontsize=8)
        axes.set_xlabel("layer")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        told.append(f"{WAYS[way]} first {', '.join(sorted(places, key=lambda m: places[m])[:3])}")
    axes.invert_yaxis()
    figure.colorbar(image, ax=figure.axes, label="place, 1 the most sensitive", fraction=0.03, pad=0.01, aspect=40)
    return figure, f"Heat maps of the matrices' places by the fused score. {'; '.join(told)}."


def fused_places(row: dict[str, Any]) -> dict[str, float]:
    """Each matrix's place by the fused score, 1 the highest; ties share their mean place."""
    from scipy.stats import rankdata

    scores = fuse_scores(*zip(*row["metrics"].values(), strict=True)).fused
    return dict(zip(row["metrics"], rankdata([-score for score in scores.tolist()]).tolist(), strict=True))


def _layer(matrix: str) -> int:
    return int(matrix.split(".")[3])


def _kind(matrix: str) -> str:
    return ".".join(matrix.split(".")[4:]).removesuffix(".dense")


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    return Figure(size, layout="constrained")


TABLES: dict[str, Callable[[Rows], str]] = {
    "estimators": estimators_table,
    "hutchinson": hutchinson_table,
    "noise": noise_table,
    "movers": movers_table,
    "domains-activation": lambda rows: domains_table(rows, "activation"),
    "domains-fisher": lambda rows: domains_table(rows, "fisher"),
    "shares": shares_table,
    "reports": reports_table,
}
PLOTS: dict[str, Callable[[Rows], tuple[Figure, str]]] = {"tau": plot_tau, "places": plot_places}


def render(page: str, rows: Rows) -> str:
    """The page with its blocks, ``<!-- orderings: NAME -->`` to ``<!-- end -->``, filled by table or picture."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        content = TABLES[name](rows) if name in TABLES else f"![{PLOTS[name](rows)[1]}](images/orderings-{name}.png)"
        return f"<!-- orderings: {name} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- orderings: (\S+) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


def write_page(rows: Rows, page: Path = PAGE) -> None:
    """The page's blocks, and the pictures beside it."""
    for name, draw in PLOTS.items():
        # Without the version that matplotlib writes, equal results give equal files.
        draw(rows)[0].savefig(page.parent / f"images/orderings-{name}.png", dpi=150, metadata={"Software": None})
    page.write_text(render(page.read_text(encoding="utf-8"), rows), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orderings", description=__doc__)
    parser.add_argument("--data", help="folder with piqa, pubmedqa_abstracts, lexglue_ledgar and glue_sst2")
    parser.add_argument("--reports", default="out/orderings", help="folder for the sensitivity reports")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--commit", default="", help="commit to record, where the sources are no git checkout")
    parser.add_argument("--page-only", action="store_true", help="only make the page and pictures from the results")
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, default=SETS, help="measure these and keep the others' rows"
    )
    options = parser.parse_args(arguments)
    if not options.page_only:
        folder = Path(options.reports)
        folder.mkdir(parents=True, exist_ok=True)
        where = provenance(options.device, options.commit or current_commit())
        where["transformers"] = importlib.metadata.version("transformers")
        before = load() if RESULTS.exists() else {}
        rows = {name: row for name, row in before.items() if name.split("/")[1] not in options.sets}
        for row in measure(data_folder(options.data), folder, options.sets, options.device):
            print(
                f"{row['id']}: {row['sequences']} sequences, {row['tokens']} tokens, {row['seconds']} s", flush=True
            )
            rows[row["id"]] = row | where
        write_results(with_comparisons(rows, folder))
    write_page(load())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
