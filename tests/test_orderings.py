"""The orderings on real text: the page comes from the results, and what is measured and compared."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks import orderings
from sensilora.errors import SensiloraError
from tests.reports import make_report


def reports_of(device):
    return [f"{name}/{cell.name}" for name in orderings.SETS for cell in orderings.cells(name, device)]


@pytest.fixture(scope="module")
def rows():
    return orderings.load()


def test_page_is_up_to_date(rows):
    page = orderings.PAGE.read_text(encoding="utf-8")
    assert page == orderings.render(page, rows), "run: python -m benchmarks.orderings --page-only"


def test_results_are_written_as_they_are_read(rows, tmp_path, monkeypatch):
    written = orderings.RESULTS.read_bytes()
    monkeypatch.setattr(orderings, "RESULTS", tmp_path / "orderings.json")
    orderings.write_results(list(rows.values()))
    assert orderings.RESULTS.read_bytes() == written


def test_results_hold_every_report_and_comparison(rows):
    reports = [name.removeprefix("report/") for name in rows if name.startswith("report/")]
    assert reports == reports_of("cuda" if "gpu" in rows[f"report/{reports[0]}"] else "cpu")
    pairs = [f"compare/{first}:{second}" for first, second in orderings.pairs(reports)]
    assert [name for name in rows if name.startswith("compare/")] == pairs


def test_comparisons_follow_from_the_metrics(rows):
    from scipy.stats import kendalltau

    for name, row in rows.items():
        if name.startswith("compare/"):
            places = [
                orderings.fused_places(rows[f"report/{one}"]) for one in name.removeprefix("compare/").split(":")
            ]
            found = kendalltau(*(list(place.values()) for place in places)).statistic
            assert row["kendall"]["fused"] == pytest.approx(found)
            for matrix, here, there in row["movers"]:
                assert [place[matrix] for place in places] == [here, there]


def test_rows_say_what_they_were_measured_with(rows):
    keys = {
        "estimator", "labels", "seed", "head", "head_accuracy", "classes", "sequences", "tokens", "seconds",
        "metrics", "commit", "date", "torch", "transformers", "python",
    }  # fmt: skip
    for name, row in rows.items():
        if name.startswith("report/"):
            assert keys <= row.keys()
            assert ("cpu" in row) != ("gpu" in row)
            assert len(row["metrics"]) == 36
            assert ("noise" in row) == (row["estimator"] == "hutchinson")
            assert (row["labels"] is None) == (row["estimator"] == "activation")


def test_shares_are_nested_and_halves_are_disjoint():
    assert list(orderings.SHARES.values()) == [round(share * 2 * orderings.HALF / 100) for share in orderings.SHARES]
    cells = {cell.name: cell.rows for cell in orderings.cells("piqa", "cpu")}
    assert cells["a/fisher"][1] == cells["b/fisher"][0]
    for share, count in orderings.SHARES.items():
        part = "a" if count == orderings.HALF else f"{share}%"
        assert cells[f"{part}/fisher"] == (0, count)
    small = {cell.name: cell.rows for cell in orderings.cells("sst2", "cpu")}
    assert small["small_a/hutchinson"] == small["small_a/fisher"] == (0, orderings.SMALL)


def test_a_gpu_gives_hutchinson_what_the_others_get():
    more = {cell.name: cell for cell in orderings.cells("sst2", "cuda")}
    assert more.keys() - {cell.name for cell in orderings.cells("sst2", "cpu")} == {
        "a/hutchinson",
        "a/hutchinson/seed1",
        "b/hutchinson",
    }
    assert more["a/hutchinson"].rows == more["a/fisher"].rows
    assert more["b/hutchinson"].rows == more["b/fisher"].rows
    assert {cell.probes for cell in more.values() if cell.part in "ab"} == {orderings.PROBES, orderings.MANY_PROBES}


def test_pairs_are_of_the_same_data_or_the_same_way():
    found = orderings.pairs(["p/a/fisher", "p/a/activation", "p/b/fisher", "q/a/fisher", "q/b/activation"])
    assert found == [
        ("p/a/fisher", "p/a/activation"),
        ("p/a/fisher", "p/b/fisher"),
        ("p/a/fisher", "q/a/fisher"),
    ]


@pytest.fixture
def toy():
    """Two sets whose reports order three matrices, and their comparison."""
    names = [f"bert.encoder.layer.{layer}.output.dense" for layer in range(3)]
    metrics = {"activation": [3.0, 2.0, 1.0], "fisher": [1.0, 2.0, 3.0]}
    made = {
        f"report/piqa/a/{way}": {"metrics": {name: [v, v, v] for name, v in zip(names, values, strict=True)}}
        for way, values in metrics.items()
    }
    made["compare/piqa/a/activation:piqa/a/fisher"] = {
        "kendall": {"fused": -1.0, "trace": -1.0},
        "spearman": {"fused": -1.0},
        "movers": [[names[0], 1.0, 3.0]],
    }
    return made


def test_tables_show_the_figures(toy):
    table = orderings.estimators_table(toy)
    assert table.splitlines()[2:] == ["| activation, Fisher | -1.000 |  |  |  |"]
    assert "| PIQA | -1.000 | output of layer 0 1 → 3 |" in orderings.movers_table(toy)
    assert orderings.tau(toy, "piqa/a/fisher", "piqa/a/activation") == -1
    assert orderings.tau(toy, "piqa/a/fisher", "piqa/b/fisher") is None
    assert list(orderings.fused_places(toy["report/piqa/a/activation"]).values()) == [1, 2, 3]


def test_page_blocks_are_filled_and_the_rest_is_kept(rows):
    page = "a\n<!-- orderings: estimators -->\nold\n<!-- end -->\nb\n<!-- orderings: tau -->\n<!-- end -->\nz"
    filled = orderings.render(page, rows)
    assert orderings.render(filled, rows) == filled
    assert "old" not in filled
    assert filled.startswith("a\n<!-- orderings: estimators -->\n| ")
    assert filled.endswith("](images/orderings-tau.png)\n<!-- end -->\nz")
    with pytest.raises(KeyError):
        orderings.render("<!-- orderings: absent --><!-- end -->", rows)


def test_pictures_and_page_are_written(rows, tmp_path):
    (tmp_path / "images").mkdir()
    page = tmp_path / "page.md"
    page.write_text("<!-- orderings: places --><!-- end -->")
    orderings.write_page(rows, page)
    assert "(images/orderings-places.png)" in page.read_text()
    for name in orderings.PLOTS:
        content = (tmp_path / f"images/orderings-{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_missing_data_is_named(tmp_path):
    with pytest.raises(SensiloraError, match=r"no data in .*absent: name the folder that holds piqa"):
        orderings.data_folder(str(tmp_path / "absent"))


def test_piqa_pairs_say_whether_the_solution_is_right(tmp_path):
    import gzip

    (tmp_path / "piqa").mkdir()
    lines = [
        {"goal": f"g{i}", "sol1": "right" if i % 3 else "wrong", "sol2": "wrong" if i % 3 else "right"}
        | {"label": 0 if i % 3 else 1}
        for i in range(60)
    ]
    with gzip.open(tmp_path / "piqa/dev.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    found = orderings._piqa(tmp_path)
    assert [row.texts[0] for row in found] == [line["goal"] for line in lines]
    assert {(row.texts[1], row.label) for row in found} == {("right", 1), ("wrong", 0)}
    assert orderings._piqa(tmp_path) == found


def test_accuracy_counts_right_answers():
    def model(x):
        return SimpleNamespace(logits=torch.nn.functional.one_hot(x, 3).float())

    model.device = torch.device("cpu")
    batches = [
        {"x": torch.tensor([0, 1, 2]), "labels": torch.tensor([0, 1, 1])},
        {"x": torch.tensor([2]), "labels": torch.tensor([2])},
    ]
    assert orderings._accuracy(model, batches) == 0.75


def test_some_sets_are_measured_and_the_others_rows_kept(tmp_path, monkeypatch):
    matrices = [f"bert.encoder.layer.{layer}.output.dense" for layer in range(3)]

    def measure(folder, reports, names, device):
        for name in names:
            report = make_report({matrix: (float(i + 1), 1.0, 2) for i, matrix in enumerate(matrices)})
            report.save(reports / f"{name}-a-activation.json")
            yield {"id": f"report/{name}/a/activation", "sequences": 1, "tokens": 8, "seconds": 0.1}

    written = []
    monkeypatch.setattr(orderings, "RESULTS", tmp_path / "orderings.json")
    monkeypatch.setattr(orderings, "measure", measure)
    monkeypatch.setattr(orderings, "write_page", written.append)
    (tmp_path / "data/piqa").mkdir(parents=True)
    common = ["--data", str(tmp_path / "data"), "--reports", str(tmp_path / "reports")]
    assert orderings.main([*common, "--commit", "first", "--sets", "sst2"]) == 0
    assert orderings.main([*common, "--commit", "second", "--sets", "piqa"]) == 0
    rows = orderings.load()
    assert list(rows) == [
        "report/piqa/a/activation",
        "report/sst2/a/activation",
        "compare/piqa/a/activation:sst2/a/activation",
    ]
    assert [row.get("commit") for row in rows.values()] == ["second", "first", None]
    assert rows["compare/piqa/a/activation:sst2/a/activation"]["kendall"]["fused"] == 1
    assert written[-1] == rows
