"""Pictures: that they say what the plan says, are not blank, and need no display."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from sensilora.allocation import allocate
from sensilora.plan import RankPlan
from tests.reports import encoder_report, make_report

pytest.importorskip("matplotlib")

from matplotlib.image import imread

from sensilora import plots
from sensilora.plots import plot_ranks, plot_training


def panels(figure):
    """The panels of a rank picture, without the colour bar: title -> axes."""
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def cells(axes):
    """(row label, column label) -> number written in the cell."""
    rows = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    return {
        (rows[int(text.get_position()[1])], columns[int(text.get_position()[0])]): int(text.get_text())
        for text in axes.texts
    }


def assert_picture(path, width, height):
    image = imread(path)[..., :3]
    assert image.shape[0] > height
    assert image.shape[1] > width
    # Not blank: at least a fifth is not white, in many colours.
    assert (image < 0.9).any(axis=-1).mean() > 0.2
    assert len(np.unique((image * 255).astype(int).reshape(-1, 3), axis=0)) > 20


def test_every_cell_holds_the_rank_of_its_score(tmp_path):
    report = encoder_report()
    plan = allocate(report, average_rank=4)
    figure = plan.plot(tmp_path / "ranks.png")
    assert_picture(tmp_path / "ranks.png", 600, 600)
    shown = panels(figure)
    assert list(shown) == [
        "global score (trace)",
        "local score (top-k mean and effective rank)",
        "fused score (global and local) — this plan",
    ]
    for axes, scores in zip(shown.values(), ("global", "local", "fused"), strict=True):
        ranks = allocate(report, average_rank=4, scores=scores).ranks
        expected = {
            (short, str(layer)): ranks[f"encoder.layer.{layer}.{part}"]
            for layer in range(6)
            for short, part in {
                "query": "attention.self.query",
                "key": "attention.self.key",
                "value": "attention.self.value",
                "attention.output.dense": "attention.output.dense",
                "intermediate.dense": "intermediate.dense",
                "output.dense": "output.dense",
            }.items()
        }
        expected["pooler.dense", "other"] = ranks["pooler.dense"]
        assert cells(axes) == expected
    assert "tiny-model" in figure.get_suptitle()
    assert "average rank 4, scaled strategy" in figure.get_suptitle()


def test_all_panels_share_one_colour_scale():
    plan = allocate(encoder_report(), average_rank=4)
    norms = [axes.collections[0].norm for axes in panels(plot_ranks(plan)).values()]
    limits = {(norm.vmin, norm.vmax) for norm in norms}
    assert len(limits) == 1
    ((low, high),) = limits
    assert low <= min(plan.ranks.values())
    assert high >= max(plan.ranks.values())


def test_the_panel_of_the_plans_own_score_is_marked():
    plan = allocate(encoder_report(), total_parameters=9000, scores="local")
    marked = [title for title in panels(plot_ranks(plan)) if "this plan" in title]
    assert marked == ["local score (top-k mean and effective rank) — this plan"]


def test_ranks_set_by_hand_get_a_panel():
    plan = allocate(encoder_report(), average_rank=4).with_ranks({"pooler.dense": 31})
    shown = panels(plot_ranks(plan))
    assert list(shown)[-1] == "this plan (ranks set by hand)"
    assert cells(shown["this plan (ranks set by hand)"])["pooler.dense", "other"] == 31


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        # Nothing is left to tie, and more ranks than the matrices that are left can take.
        ({"average_rank": 4, "tie": "qkv"}, ("query", "dense")),
        ({"total_rank": 740}, ("query",)),
    ],
)
def test_a_plan_with_matrices_taken_out_by_hand(tmp_path, options, kept):
    file = allocate(encoder_report(), **options).save(tmp_path / "plan.json")
    data = json.loads(file.read_text())
    data["matrices"] = {name: entry for name, entry in data["matrices"].items() if name.endswith(kept)}
    file.write_text(json.dumps(data))
    plan = RankPlan.load(file, allow_edited=True)
    ((title, axes),) = panels(plan.plot(tmp_path / "ranks.png")).items()
    assert title == "this plan (edited: its settings do not suit the matrices it has left)"
    assert cells(axes)["query", "3"] == plan.ranks["encoder.layer.3.attention.self.query"]


def test_a_plan_without_calibration_can_be_drawn(tmp_path):
    RankPlan.uniform({"a.0.q": (8, 8), "a.1.q": (8, 8)}, 4).plot(tmp_path / "uniform.svg")
    assert b"<svg" in (tmp_path / "uniform.svg").read_bytes()


def test_eighty_layers(tmp_path):
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{layer}.{part}" for layer in range(80) for part in parts]
    report = make_report({name: (1 + i * 37 % 101, 1 + i * 11 % 13, 1 + i % 64) for i, name in enumerate(names)})
    figure = allocate(report, average_rank=8).plot(tmp_path / "ranks.png")
    assert_picture(tmp_path / "ranks.png", 2500, 600)
    assert all(len(cells(axes)) == len(names) for axes in panels(figure).values())


def test_labels_tell_encoder_and_decoder_apart():
    names = ["encoder.block.0.q", "decoder.block.0.q", "decoder.block.0.cross.q", "decoder.block.1.wo", "head.proj"]
    rows, columns, places = plots._layout(names)
    assert rows == ["encoder.block.q", "decoder.block.q", "cross.q", "wo", "proj"]
    assert columns == ["0", "1", "other"]
    assert places == dict(zip(names, [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)], strict=True))


def test_training_curves(tmp_path):
    loss = np.linspace(3, 1, 200) + np.tile([0.5, -0.5], 100)
    figure = plot_training(
        {
            "Sensitivity-LoRA": {"loss": loss.tolist(), "dev_accuracy": [0.3, 0.5, 0.6]},
            "uniform LoRA": {"loss": (loss + 0.2).tolist(), "dev_accuracy": [0.3, 0.4, 0.6]},
        },
        tmp_path / "training.png",
    )
    image = imread(tmp_path / "training.png")
    assert (image[..., :3] < 0.9).any(axis=-1).mean() > 0.01
    left, right = figure.axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("step", "epoch")
    raw, smooth = left.lines[0].get_ydata(), left.lines[1].get_ydata()
    np.testing.assert_array_equal(raw, loss)
    # Without the zigzag of 0.5, and still on the line.
    assert np.abs(smooth - np.linspace(3, 1, 200)).max() < 0.2
    assert [line.get_label() for line in right.lines] == ["Sensitivity-LoRA", "uniform LoRA"]
    np.testing.assert_array_equal(right.lines[1].get_ydata(), [0.3, 0.4, 0.6])


def test_a_run_without_one_of_the_curves():
    figure = plot_training({"a": {"loss": [1.0]}, "b": {"dev_accuracy": [0.5]}})
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "dev accuracy"]


def test_bad_requests_are_named(tmp_path):
    plan = RankPlan.uniform({"a.0.q": (8, 8)}, 4)
    with pytest.raises(ValueError, match=r"ranks.bmp; end the name with one of .png, .svg, .pdf"):
        plan.plot(tmp_path / "ranks.bmp")
    with pytest.raises(ValueError, match="holds no training curve"):
        plot_training({"a": {}})
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'sensilora\[plots\]'"):
        RankPlan.uniform({"a.0.q": (8, 8)}, 4).plot()


def test_drawing_never_touches_pyplot(tmp_path):
    code = (
        "import sys; from sensilora.plan import RankPlan; "
        f"RankPlan.uniform({{'a.0.q': (8, 8)}}, 4).plot({str(tmp_path / 'ranks.png')!r}); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
