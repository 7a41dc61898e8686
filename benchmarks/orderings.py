"""How estimators order a model's matrices on real text, for docs/orderings.md: ``python -m benchmarks.orderings``.

all-MiniLM-L6-v2 as the demo loads it, on parts of PIQA, PubMed abstracts, LexGLUE and SST-2, which are not in this
package: ``--data`` names the folder that holds them, else shared/data in the checkout or beside it. The figures go to
benchmarks/results/orderings.json; page and pictures are made from that file alone (``--page-only``).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.run import current_commit, provenance
from sensilora.data import Row, label_names, read_rows
from sensilora.demo import MODEL_NAME, bundled_model
from sensilora.errors import SensiloraError
from sensilora.integrations.transformers import classification_batches, load_sequence_classifier, load_tokenizer
from sensilora.sensitivity.calibrate import calibrate
from sensilora.sensitivity.head import warmed_head
from sensilora.sensitivity.report import SensitivityReport
from sensilora.targets import find_targets

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "orderings.json"

SETS = ("piqa", "pubmed", "lexglue", "sst2")
# Sequences of a half, of the part that Hutchinson gets, and of the shares that are compared with the whole.
HALF, SMALL = 128, 16
SHARES = {10: 26, 20: 51, 50: HALF, 100: 2 * HALF}
HEAD_ROWS, HEAD_STEPS = 96, 32
MAX_LENGTH, BATCH = 64, 16
PROBES = 8
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

    @property
    def name(self) -> str:
        labels = "-model" if self.labels == "model" else ""
        seed = f"/seed{self.seed}" if self.seed else ""
        head = f"/head{self.head}" if self.head else ""
        return f"{self.part}/{self.estimator}{labels}{seed}{head}"


A, B = (0, HALF), (HALF, 2 * HALF)
SMALL_A, SMALL_B = (0, SMALL), (HALF, HALF + SMALL)


def cells(name: str) -> list[Cell]:
    """The calibrations of one set."""
    made = [
        Cell("a", A, "activation"),
        Cell("b", B, "activation"),
        Cell("a", A, "fisher"),
        Cell("b", B, "fisher"),
        Cell("a", A, "fisher", labels="model"),
    ]
    if name == "piqa":
        for share, count in SHARES.items():
            if count != HALF:
                made += [Cell(f"{share}%", (0, count), estimator) for estimator in ("activation", "fisher")]
    if name in ("piqa", "sst2"):
        made.append(Cell("a", A, "fisher", head=1))
        made += [Cell("small_a", SMALL_A, estimator) for estimator in ("activation", "fisher", "hutchinson")]
        made.append(Cell("small_a", SMALL_A, "fisher", labels="model"))
    if name == "sst2":
        made.append(Cell("small_a", SMALL_A, "hutchinson", seed=1))
        made += [Cell("small_b", SMALL_B, estimator) for estimator in ("activation", "fisher", "hutchinson")]
    return made


def measure(folder: Path, reports: Path, names: Sequence[str] = SETS) -> Iterator[tuple[dict[str, Any], Path]]:
    """Calibrate on every set. Yields each report's row and its file in `reports`."""
    source = bundled_model()
    tokenizer = load_tokenizer(source)
    for name in names:
        rows = _READERS[name](folder)
        random.Random(0).shuffle(rows)
        rows = rows[: 2 * HALF + HEAD_ROWS]
        if len(rows) < 2 * HALF + HEAD_ROWS:
            raise SensiloraError(f"{name} has {len(rows)} rows; {2 * HALF + HEAD_ROWS} are needed")
        labels = label_names(rows)

        def batches(start: int, stop: int, rows: list[Row] = rows, labels: Any = labels) -> list[dict[str, Tensor]]:
            made = classification_batches(
                tokenizer, rows[start:stop], labels=labels, max_length=MAX_LENGTH, batch_size=BATCH
            )
            # In their order by length a head would see all the short rows first.
            random.Random(0).shuffle(made)
            return made

        of_set = cells(name)
        for head in sorted({cell.head for cell in of_set}):
            torch.manual_seed(head)
            model = load_sequence_classifier(source, labels=[str(label) for label in labels]).requires_grad_(False)
            model.name_or_path = MODEL_NAME
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
                    yield _calibrated(name, cell, model, batches(*cell.rows), targets, accuracy, len(labels), reports)


def _accuracy(model: Any, batches: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        found = [
            model(**{key: batch[key] for key in batch if key != "labels"}).logits.argmax(-1) == batch["labels"]
            for batch in batches
        ]
    return float(torch.cat(found).double().mean())


def _calibrated(
    name: str,
    cell: Cell,
    model: Any,
    batches: list[dict[str, Tensor]],
    targets: list[str],
    accuracy: float,
    classes: int,
    reports: Path,
) -> tuple[dict[str, Any], Path]:
    options: dict[str, Any] = {"probes": PROBES, "min_probes": PROBES} if cell.estimator == "hutchinson" else {}
    if cell.estimator != "activation":
        options |= {"labels": cell.labels, "seed": cell.seed}
    start = time.perf_counter()
    report = calibrate(model, batches, estimator=cell.estimator, targets=targets, progress=False, **options)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    path = report.save(reports / f"{name}-{cell.name.replace('/', '-')}.json")
    row = {
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
        row["noise"] = _noise(report)
    return row, path


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
    for way in ("a/activation", "a/fisher", "small_a/activation", "small_a/fisher", "small_a/hutchinson"):
        for index, one in enumerate(sets):
            found += [(f"{one}/{way}", f"{other}/{way}") for other in sets[index + 1 :]]
    return [pair for pair in found if measured.issuperset(pair)]


def _same_data(first: str, second: str) -> bool:
    return first.split("/")[0] == second.split("/")[0]


def _same_way(first: str, second: str) -> bool:
    return first.split("/")[1:] == second.split("/")[1:]


def compared(first: str, second: str, reports: dict[str, SensitivityReport]) -> dict[str, Any]:
    """The row of one comparison."""
    found = reports[first].compare(reports[second])
    return {
        "id": f"compare/{first}:{second}",
        "kendall": {score: agreement.kendall for score, agreement in found.agreement.items()},
        "spearman": {score: agreement.spearman for score, agreement in found.agreement.items()},
        "movers": [[mover.matrix, mover.place, mover.other_place] for mover in found.movers[:3]],
    }


def write_results(rows: Sequence[dict[str, Any]]) -> None:
    """One row a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    RESULTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orderings", description=__doc__)
    parser.add_argument("--data", help="folder with piqa, pubmedqa_abstracts, lexglue_ledgar and glue_sst2")
    parser.add_argument("--reports", default="out/orderings", help="folder for the sensitivity reports")
    parser.add_argument("--commit", default="", help="commit to record, where the sources are no git checkout")
    parser.add_argument("--page-only", action="store_true", help="only make the page and pictures from the results")
    options = parser.parse_args(arguments)
    if not options.page_only:
        folder = Path(options.reports)
        folder.mkdir(parents=True, exist_ok=True)
        where = provenance("cpu", options.commit or current_commit())
        where["transformers"] = importlib.metadata.version("transformers")
        rows, reports = [], {}
        for row, path in measure(data_folder(options.data), folder):
            print(
                f"{row['id']}: {row['sequences']} sequences, {row['tokens']} tokens, {row['seconds']} s", flush=True
            )
            rows.append(row | where)
            reports[row["id"].removeprefix("report/")] = SensitivityReport.load(path)
        rows += [compared(first, second, reports) for first, second in pairs(list(reports))]
        write_results(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
