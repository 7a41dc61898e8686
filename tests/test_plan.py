"""The rank plan: what the file says, that damage is found and named, and that PEFT does what the plan says."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sensilora.allocation import allocate
from sensilora.errors import PlanError, RankError
from sensilora.plan import Calibration, PlanEntry, RankPlan
from sensilora.sensitivity.report import ProbeStatistics
from tests.reports import encoder_report, make_report


@pytest.fixture
def plan() -> RankPlan:
    return allocate(encoder_report(layers=2), average_rank=4, tie="qkv")


@pytest.fixture
def file(plan, tmp_path):
    return plan.save(tmp_path / "plan.json")


def edit(file, change) -> None:
    """Apply `change` to the parsed plan and write it back."""
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


NAME = "encoder.layer.0.attention.self.query"


# --- content


def test_what_the_plan_carries(plan):
    report = encoder_report(layers=2)
    assert list(plan.ranks) == list(report)
    assert plan.fingerprint == report.fingerprint
    assert plan.model_id == report.model_id
    assert plan.calibration.model_dump() == {
        "estimator": "fisher",
        "mode": "per_sequence",
        "labels": "data",
        "draws": 1,
        "seed": 0,
        "tokens": 100,
        "sequences": 4,
        "k": 0.5,
        "alpha": 0.85,
        "versions": {"sensilora": "0.1.0", "torch": "2.13.0"},
    }
    assert plan.budget.model_dump() == {"kind": "average_rank", "value": 4, "used": 52, "left_over": 0}
    assert plan.parameters == sum(rank * sum(report[name].shape) for name, rank in plan.ranks.items())
    for name in report:
        entry = plan.matrices[name]
        assert (entry.shape, entry.trace, entry.topk_mean, entry.effective_rank) == (
            report[name].shape,
            report[name].trace,
            report[name].topk_mean,
            report[name].effective_rank,
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "activation", "variant": "diagonal"},
        {"estimator": "activation", "variant": "inverse", "block_size": 16, "damping": 0.1},
        {
            "estimator": "hutchinson", "hvp": "central_differences", "probes": 8, "min_probes": 2,
            "tolerance": 0.0,
        },
    ],
    ids=["diagonal", "inverse", "hutchinson"],
)  # fmt: skip
def test_the_settings_of_an_estimator_are_recorded(tmp_path, settings):
    probes = ProbeStatistics(
        count=8,
        trace=1.0,
        standard_error=0.1,
        negative_mass=0.0,
        half_topk_mean=(1.0, 1.0),
        half_effective_rank=(1, 1),
    )
    of_matrices = {"probes": probes} if "probes" in settings else {}
    if settings.get("variant") == "inverse":
        of_matrices = {"damping": 0.1, "attempts": 1}
    report = encoder_report(layers=1)
    matrices = {
        name: dataclasses.replace(matrix, effective_rank=1, **of_matrices) for name, matrix in report.matrices.items()
    }
    report = dataclasses.replace(report, mode=None, labels=None, matrices=matrices, **settings)
    plan = allocate(report, average_rank=4)
    path = plan.save(tmp_path / "plan.json")
    written = json.loads(path.read_text())["calibration"]
    names = ("estimator", "variant", "block_size", "damping", "hvp", "probes", "min_probes", "tolerance")
    assert {name: written[name] for name in names if name in written} == settings
    assert RankPlan.load(path) == plan
    for name in set(settings) - {"estimator"}:
        edit(path, lambda data, name=name: data["calibration"].pop(name))
        with pytest.raises(PlanError, match="content_hash does not match"):
            RankPlan.load(path)
        plan.save(path)


OLDER = """\
{
  "schema_version": 1,
  "model_id": "tiny",
  "fingerprint": "abababababababababababababababababababababababababababababababab",
  "calibration": {"estimator": "activation", "mode": null, "labels": null, "draws": 1, "seed": 0, \
"tokens": 100, "sequences": 4, "k": 0.5, "alpha": 0.85, "versions": {"sensilora": "0.1.0"}},
  "allocation": {"strategy": "scaled", "classes": 3, "weights": "cv", "scores": "fused", "temper": 0.0, \
"min_rank": 1, "max_rank": null, "multiple": 1, "tie": null},
  "budget": {"kind": "total_rank", "value": 3, "used": 3, "left_over": 0},
  "scaling": {"rule": "constant", "value": 1.0},
  "matrices": {
    "layers.0.dense": {"rank": 3, "shape": [8, 16], "trace": 2.5, "topk_mean": 0.25, "effective_rank": 7, \
"score_global": 2.5, "score_local": 0.5, "score_fused": 0.75}
  },
  "content_hash": "f81f78f4acfea6fe715e6725d6873cbb91046684f7bfe0e17d75f852c2d7544e"
}
"""


def test_a_plan_from_before_those_settings_is_read_and_saved_as_it_was(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(OLDER)
    plan = RankPlan.load(path)
    assert plan.calibration.variant is None
    assert plan.save(tmp_path / "again.json").read_text() == OLDER


def test_save_and_load_round_trip(plan, file):
    loaded = RankPlan.load(file)
    assert loaded == plan
    assert list(loaded.ranks) == list(plan.ranks)
    assert loaded.content_hash == plan.content_hash
    assert loaded.save(file.with_name("again.json")).read_bytes() == file.read_bytes()


def test_the_file_is_a_table_a_person_can_read(plan, file):
    lines = file.read_text().splitlines()
    rows = [line for line in lines if '"rank"' in line]
    assert len(rows) == len(plan.matrices)
    assert len({row.index('"rank"') for row in rows}) == 1
    assert len({row.index('"score_fused"') for row in rows}) == 1
    data = json.loads("\n".join(lines))
    assert data["content_hash"] == plan.content_hash
    assert data["matrices"][NAME]["rank"] == plan.ranks[NAME]


def test_content_hash_depends_on_every_part(plan):
    changed = [
        plan.with_ranks({NAME: plan.ranks[NAME] + 1}),
        plan.model_copy(update={"fingerprint": "cd"}),
        plan.model_copy(update={"matrices": dict(reversed(plan.matrices.items()))}),
        plan.model_copy(update={"scaling": plan.scaling.model_copy(update={"value": 2.0})}),
    ]
    assert len({plan.content_hash, *(other.content_hash for other in changed)}) == 5
    assert re.fullmatch("[0-9a-f]{64}", plan.content_hash)


def test_content_hash_is_the_same_in_another_process(file, plan):
    code = f"from sensilora.plan import RankPlan; print(RankPlan.load({str(file)!r}).content_hash)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == plan.content_hash


def test_names_outside_ascii_and_with_quotes(tmp_path):
    plan = allocate(make_report({'größe."a"': (1, 1, 1), "层.1": (2, 1, 1)}), average_rank=2)
    assert RankPlan.load(plan.save(tmp_path / "plan.json")) == plan


def test_summary_has_a_line_for_every_matrix_and_the_totals(plan):
    text = plan.summary()
    for name, rank in plan.ranks.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        assert row.split()[-2:] == [str(rank), "1"]
    assert "13 matrices, total rank 52" in text
    assert f"{plan.parameters:,} trainable parameters" in text
    assert "budget average_rank 4: used 52, left over 0" in text


def test_scaling_of():
    report = make_report({"a": (1, 1, 1), "b": (3, 1, 1), "c": (0, 1, 1)})
    arguments = {"total_rank": 8, "scores": "global", "min_rank": 0}  # ranks 2, 6, 0
    constant = allocate(report, **arguments, scaling=0.5)
    alpha = allocate(report, **arguments, alpha=3)
    rslora = allocate(report, **arguments, alpha=3, use_rslora=True)
    assert [constant.scaling_of(name) for name in "abc"] == [0.5, 0.5, 0.0]
    assert [alpha.scaling_of(name) for name in "abc"] == [1.5, 0.5, 0.0]
    assert [rslora.scaling_of(name) for name in "abc"] == [3 / math.sqrt(2), 3 / math.sqrt(6), 0.0]
    with pytest.raises(KeyError, match="nobody"):
        constant.scaling_of("nobody")


def test_the_documentations_example_is_a_plan(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "plan_file.md").read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", text, re.DOTALL).group(1)
    file = tmp_path / "plan.json"
    file.write_text(example, encoding="utf-8")
    plan = RankPlan.load(file)
    assert plan.save(file).read_text(encoding="utf-8") == example
    described = {
        field for line in text.splitlines() if line.startswith("| `") for field in re.findall(r"`(\w+)", line)
    }
    for model in (RankPlan, PlanEntry, Calibration):
        assert set(model.model_fields) <= described


# --- other ways to a plan


def test_uniform_plan(tmp_path):
    plan = RankPlan.uniform({"a": (8, 16), "b": (32, 8)}, 4, scaling=2.0, model_id="m", fingerprint="f")
    assert plan.ranks == {"a": 4, "b": 4}
    assert plan.scaling_of("b") == 2.0
    assert plan.parameters == 4 * 24 + 4 * 40
    assert plan.calibration is None
    assert RankPlan.load(plan.save(tmp_path / "plan.json")) == plan
    assert "total rank 8" in plan.summary()


@pytest.mark.parametrize(
    ("shapes", "rank", "error", "message"),
    [
        ({}, 4, PlanError, "at least one matrix"),
        ({"a": (8, 8)}, 0, RankError, "rank must be at least 1, not 0"),
        ({"a": (8, 8)}, "4", RankError, "a rank must be a whole number, not '4'"),
        ({"a": (8, 8), "b": (3, 8)}, 4, RankError, r"rank 4 of b is outside 0 to min\(.*\) = 3"),
    ],
)
def test_bad_uniform_plan(shapes, rank, error, message):
    with pytest.raises(error, match=message):
        RankPlan.uniform(shapes, rank)


def test_ranks_may_be_numpys(plan, tmp_path):
    shapes = {"a": (8, 16), "b": (32, 8)}
    assert RankPlan.uniform(shapes, np.int64(4)) == RankPlan.uniform(shapes, 4)
    changed = plan.with_ranks({NAME: np.int16(2)})
    assert changed == plan.with_ranks({NAME: 2})
    assert RankPlan.load(changed.save(tmp_path / "plan.json")) == changed


def test_bad_scaling_of_a_uniform_plan():
    with pytest.raises(PlanError, match=r"scaling must be a finite number above 0, not -1\.0"):
        RankPlan.uniform({"a": (8, 8)}, 2, scaling=-1.0)


def test_with_ranks_counts_the_budget_again(plan):
    other = plan.with_ranks({NAME: plan.ranks[NAME] + 3})
    assert other.ranks == {**plan.ranks, NAME: plan.ranks[NAME] + 3}
    assert (other.budget.used, other.budget.left_over) == (55, -3)
    assert plan.budget.used == 52


def test_with_ranks_refuses_what_does_not_fit(plan):
    with pytest.raises(PlanError, match="no matrix 'encoder'"):
        plan.with_ranks({"encoder": 2})
    with pytest.raises(RankError, match=f"rank 33 of {NAME} is outside"):
        plan.with_ranks({NAME: 33})
    with pytest.raises(RankError, match=r"a rank must be a whole number, not 2\.5"):
        plan.with_ranks({NAME: 2.5})
    with pytest.raises(RankError, match=f"rank -1 of {NAME} is outside"):
        plan.with_ranks({NAME: -1})


# --- edited plans


def test_an_edited_rank_is_refused_and_accepted_on_demand(plan, file):
    edit(file, lambda data: data["matrices"][NAME].update(rank=plan.ranks[NAME] + 2))
    with pytest.raises(PlanError, match="content_hash does not match the content; the plan was edited or damaged"):
        RankPlan.load(file)
    loaded = RankPlan.load(file, allow_edited=True)
    assert loaded == plan.with_ranks({NAME: plan.ranks[NAME] + 2})
    # Saved again, it is a plan like any other.
    assert RankPlan.load(loaded.save(file)) == loaded


def test_a_matrix_removed_by_hand(plan, file):
    edit(file, lambda data: data["matrices"].pop(NAME))
    loaded = RankPlan.load(file, allow_edited=True)
    assert loaded.ranks == {name: rank for name, rank in plan.ranks.items() if name != NAME}
    # An average of 4 over the 12 that are left.
    assert loaded.budget.used + loaded.budget.left_over == 48


def test_a_budget_that_does_not_fit_the_ranks_is_refused(plan, file):
    wrong = plan.model_copy(update={"budget": plan.budget.model_copy(update={"used": 50, "left_over": 2})})
    with pytest.raises(PlanError, match=r"budget.used 50 and budget.left_over 2 do not fit .* 52 and 0"):
        RankPlan.load(wrong.save(file))
    assert RankPlan.load(file, allow_edited=True) == plan


def changed(*path, to):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


def removed(*path):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


BAD_EDITS = [
    (changed("schema_version", to=2), "schema_version is 2, and this version of sensilora reads 1"),
    (removed("schema_version"), "schema_version is None"),
    (removed("fingerprint"), "fingerprint: field required"),
    (removed("scaling"), "scaling: field required"),
    (removed("allocation", "strategy"), "allocation.strategy: field required"),
    (removed("matrices", NAME, "trace"), f"matrices.{NAME}.trace: field required"),
    (removed("content_hash"), "content_hash is missing"),
    (changed("content_hash", to=7), "content_hash is missing or not a string"),
    (changed("colour", to="red"), "colour: extra inputs are not permitted"),
    (changed("matrices", NAME, "colour", to="red"), f"matrices.{NAME}.colour: extra inputs are not permitted"),
    (changed("matrices", to={}), "matrices: dictionary should have at least 1 item"),
    (changed("matrices", to=[]), "matrices: "),
    (changed("matrices", NAME, "rank", to=33), f"matrices.{NAME}: rank 33 is above .* = 32"),
    (changed("matrices", NAME, "rank", to=-1), f"matrices.{NAME}.rank: .*greater than or equal to 0, not -1"),
    (changed("matrices", NAME, "rank", to="4"), f"matrices.{NAME}.rank: .*integer, not '4'"),
    (changed("matrices", NAME, "rank", to=2.5), f"matrices.{NAME}.rank: .*integer, not 2.5"),
    (changed("matrices", NAME, "rank", to=True), f"matrices.{NAME}.rank: .*integer, not True"),
    (changed("matrices", NAME, "shape", to=[32]), f"matrices.{NAME}.shape"),
    (changed("matrices", NAME, "shape", to=[32, 0]), f"matrices.{NAME}.shape.1: .*greater than 0, not 0"),
    (changed("matrices", NAME, "trace", to=float("nan")), f"matrices.{NAME}.trace: .*finite number"),
    (changed("matrices", NAME, "trace", to=-1), f"matrices.{NAME}.trace: .*greater than or equal to 0"),
    (changed("allocation", "strategy", to="best"), "allocation.strategy: .*'scaled' or 'progressive', not 'best'"),
    (changed("scaling", "value", to=0), "scaling.value: .*greater than 0, not 0"),
    (changed("budget", "kind", to="bytes"), "budget.kind: "),
    (changed("budget", "value", to=-4), "budget.value: must be a finite number above 0, not -4"),
    (changed("budget", "value", to="4"), "budget.value: must be a finite number above 0, not '4'"),
    (changed("calibration", "tokens", to=None), "calibration.tokens: .*integer, not None"),
]


@pytest.mark.parametrize("allow_edited", [False, True])
@pytest.mark.parametrize(("change", "message"), BAD_EDITS, ids=[message for _, message in BAD_EDITS])
def test_a_bad_field_is_named_together_with_the_file(file, change, message, allow_edited):
    edit(file, change)
    with pytest.raises(PlanError, match=message) as caught:
        RankPlan.load(file, allow_edited=allow_edited)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_matrix_named_twice_is_refused(file):
    text = file.read_text()
    row = next(line for line in text.splitlines() if NAME in line)
    file.write_text(text.replace(row, f"{row}\n{row}"))
    with pytest.raises(PlanError, match=f"{NAME} appears twice"):
        RankPlan.load(file, allow_edited=True)


@pytest.mark.parametrize("allow_edited", [False, True])
def test_truncation_at_any_point_is_found(file, allow_edited):
    content = file.read_bytes()
    # The last byte is a line break, without which the file is as good.
    for length in {*range(0, len(content) - 1, 37), *range(len(content) - 60, len(content) - 1)}:
        file.write_bytes(content[:length])
        with pytest.raises(PlanError, match="was truncated or damaged"):
            RankPlan.load(file, allow_edited=allow_edited)


def test_every_changed_byte_is_found(plan, file):
    content = file.read_bytes()
    for position in range(0, len(content), 11):
        damaged = bytearray(content)
        damaged[position] ^= 0x04
        file.write_bytes(bytes(damaged))
        try:
            loaded = RankPlan.load(file)
        except PlanError:
            continue
        assert loaded == plan  # only white space changed


def test_files_that_are_no_plan(tmp_path):
    with pytest.raises(PlanError, match=r"cannot read the plan .*nowhere.json: No such file"):
        RankPlan.load(tmp_path / "nowhere.json")
    with pytest.raises(PlanError, match="is a folder; name the plan's JSON file"):
        RankPlan.load(tmp_path)
    report = encoder_report(layers=1).save(tmp_path / "report.json")
    with pytest.raises(PlanError, match=r"report.json is a sensitivity report and no rank plan"):
        RankPlan.load(report)
    other = tmp_path / "other.json"
    other.write_text("[1, 2]")
    with pytest.raises(PlanError, match="holds no JSON object"):
        RankPlan.load(other)
    other.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="is not complete JSON"):
        RankPlan.load(other)


def test_a_plan_is_not_changed_in_place(plan):
    with pytest.raises(ValueError, match="frozen"):
        plan.model_id = "another"


# --- PEFT


def bert(**config):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 11, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50, **config))


def gpt2():
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=50))


def plan_for(model, **arguments) -> RankPlan:
    from sensilora.targets import find_targets, matrix_shape

    shapes = {name: matrix_shape(module) for name, module in find_targets(model).items()}
    metrics = {name: (1.0 + i * 37 % 23, 0.1 + i * 11 % 7, 1 + i * 5 % 32) for i, name in enumerate(shapes)}
    return allocate(make_report(metrics, shapes), **arguments)


@pytest.mark.parametrize("make_model", [bert, gpt2])
@pytest.mark.parametrize("rule", [{"scaling": 1.5}, {"alpha": 16}, {"alpha": 16, "use_rslora": True}])
def test_peft_gives_every_module_its_rank_and_scale(make_model, rule):
    peft = pytest.importorskip("peft")
    model = make_model()
    plan = plan_for(model, average_rank=5, min_rank=0, **rule)
    plan = plan.with_ranks({next(iter(plan.ranks)): 0})
    assert len(set(plan.ranks.values())) > 3
    adapted = peft.get_peft_model(model, plan.to_lora_config(lora_dropout=0.1))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        name: rank for name, rank in plan.ranks.items() if rank > 0
    }
    for name, layer in layers.items():
        assert layer.lora_A["default"].weight.shape == (plan.ranks[name], plan.matrices[name].shape[1])
        assert layer.lora_B["default"].weight.shape == (plan.matrices[name].shape[0], plan.ranks[name])
        assert layer.scaling["default"] == pytest.approx(plan.scaling_of(name), rel=1e-12)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable == plan.parameters


def test_without_peft_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "sensilora.integrations.peft", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'sensilora\[peft\]'"):
        RankPlan.uniform({"a.0.q": (8, 8)}, 4).to_lora_config()


def test_the_config_survives_pefts_own_file(tmp_path):
    peft = pytest.importorskip("peft")
    model = bert()
    plan = plan_for(model, average_rank=5)
    adapted = peft.get_peft_model(model, plan.to_lora_config(init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    tokens = torch.arange(12).reshape(2, 6)
    expected = adapted(tokens).last_hidden_state
    again = peft.PeftModel.from_pretrained(adapted.unload(), tmp_path).eval()
    torch.testing.assert_close(again(tokens).last_hidden_state, expected, rtol=0, atol=0)


def test_the_fields_of_the_config():
    pytest.importorskip("peft")
    report = make_report({"a.q": (1, 1, 1), "a.k": (3, 1, 1), "b+1.q": (4, 1, 1)})
    plan = allocate(report, total_rank=16, scores="global", scaling=2.0)
    config = plan.to_lora_config(task_type="SEQ_CLS")
    assert (config.r, config.lora_alpha) == (8, 16)
    assert config.rank_pattern == {r"^a\.q": 2, r"^a\.k": 6, r"^b\+1\.q": 8}
    assert config.alpha_pattern == {r"^a\.q": 4, r"^a\.k": 12, r"^b\+1\.q": 16}
    assert all(type(alpha) is int for alpha in config.alpha_pattern.values())
    assert set(config.target_modules) == {"a.q", "a.k", "b+1.q"}
    assert config.init_lora_weights is True
    assert config.use_rslora is False
    assert config.task_type == "SEQ_CLS"
    assert plan.to_lora_config().exclude_modules is None


@pytest.mark.parametrize("excluded", [None, [], ["other"], "other|.*another", "(?i)OTHER"])
def test_a_dropped_matrix_whose_name_ends_like_a_kept_one_stays_dropped(excluded):
    peft = pytest.importorskip("peft")

    class Block(torch.nn.Module):
        def __init__(self, inner=None):
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)
            if inner is not None:
                self.inner = inner

        def forward(self, x):
            return self.inner(self.fc(x))

    plan = plan_for(Block(Block()), total_rank=2, min_rank=0).with_ranks({"fc": 2, "inner.fc": 0})
    options = {} if excluded is None else {"exclude_modules": excluded}
    adapted = peft.get_peft_model(Block(Block()), plan.to_lora_config(**options))
    adapted_names = [name for name, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert adapted_names == ["base_model.model.fc"]


def test_what_a_lora_config_cannot_say():
    pytest.importorskip("peft")
    plan = RankPlan.uniform({"a": (8, 8)}, 2)
    with pytest.raises(PlanError, match="every rank of the plan is 0"):
        plan.with_ranks({"a": 0}).to_lora_config()
    for field in ("r", "lora_alpha", "rank_pattern", "target_modules", "use_rslora", "layers_to_transform"):
        with pytest.raises(PlanError, match=f"{field} follows from the plan"):
            plan.to_lora_config(**{field: 1})
    assert plan.to_lora_config(layers_to_transform=None).r == 2


def test_importing_the_plan_loads_no_extras():
    code = (
        "import sys, sensilora.plan, sensilora.plots; print({'peft', 'matplotlib', 'transformers'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
