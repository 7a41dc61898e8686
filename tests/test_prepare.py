"""What makes .venv ready for the make targets: what a second run does again, and what it leaves alone."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "prepare.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the package does not hold it")


@pytest.fixture(autouse=True)
def _setuptools_keeps_distutils(monkeypatch):
    """The script imports pip, whereupon setuptools leaves distutils to Python for the rest of the process, and
    torch's compiler, which imports setuptools, fails in a later test."""
    if importlib.util.find_spec("_distutils_hack") is not None:
        import _distutils_hack

        monkeypatch.setattr(_distutils_hack.DistutilsMetaFinder, "spec_for_pip", lambda finder: None, raising=False)


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """``prepare(*arguments)`` gives what was done; nothing is installed, and .venv is a folder of the test's."""
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv, done = tmp_path / ".venv", []

    def make_venv():
        done.append("make")
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / "python").touch()

    def run(command):
        done.append(f"{command[command.index('--inside') + 1]} {command[-1]}")
        return module.status

    def main(*arguments):
        done.clear()
        monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
        module.main()
        return list(done)

    changes = {"VENV": venv, "VENV_PYTHON": venv / "bin" / "python", "STAMP": venv / "prepared.json"}
    changes |= {"make_venv": make_venv, "run": run, "built": lambda: True, "has": lambda name: False}
    for name, value in changes.items():
        monkeypatch.setattr(module, name, value)
    module.status = 0
    main.module = module
    return main


def test_a_second_run_does_nothing(prepare):
    assert prepare("--extras", "test") == ["make", "build torch==2.13.0"]
    assert prepare("--extras", "test") == []
    assert prepare("--extras", "lint") == ["keep torch==2.13.0"]
    assert prepare("--extras", "test", "lint") == []


def test_a_model_that_could_not_be_installed_is_tried_again(prepare):
    prepare.module.status = prepare.module.WITHOUT_MODEL
    assert prepare("--extras", "test", "--model", "want") == ["make", "build torch==2.13.0"]
    assert prepare("--extras", "test") == []
    assert prepare("--extras", "test", "--model", "want") == ["keep torch==2.13.0"]
    prepare.module.status = 0
    assert prepare("--extras", "test", "--model", "want") == ["keep torch==2.13.0"]
    assert prepare("--extras", "test", "--model", "want") == []


@pytest.mark.parametrize("model", ["want", "need"])
def test_only_a_model_that_is_needed_keeps_the_rest_from_being_built(prepare, monkeypatch, model):
    called = []
    monkeypatch.setattr(prepare.module, "pip", lambda *words: called.append(words[-1]) or words[-1] != "a-model==1")
    monkeypatch.setattr(prepare.module, "MODEL", "a-model==1")
    monkeypatch.setattr(prepare.module, "has", lambda name: True)
    monkeypatch.setattr(prepare.module, "missing", lambda lines: [line for line in lines if line == "a-model==1"])
    with pytest.raises(SystemExit) as exit_:
        prepare("--model", model, "--inside", "build")
    if model == "want":
        assert exit_.value.code == prepare.module.WITHOUT_MODEL
        assert called == ["a-model==1", str(prepare.module.ROOT)]
    else:
        assert "a-model==1 could not be installed; connect to a package index" in exit_.value.code
        assert called == ["a-model==1"]


def test_an_error_is_not_remembered_as_done(prepare):
    prepare.module.status = 1
    with pytest.raises(SystemExit):
        prepare("--extras", "test")
    prepare.module.status = 0
    assert prepare("--extras", "test") == ["build torch==2.13.0"]


def test_another_torch_makes_the_folder_anew(prepare):
    assert prepare("--torch", "torch==2.11.0") == ["make", "build torch==2.11.0"]
    # Not given, it stays what it was.
    assert prepare() == []
    assert prepare("--torch", "torch==2.11.0") == []
    assert prepare("--extras", "lint") == ["keep torch==2.11.0"]
    assert prepare("--torch", "torch==2.12.0", "--extras", "lint") == ["make", "build torch==2.12.0"]
    # Of another interpreter nothing is kept.
    stamp = prepare.module.STAMP
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "interpreter": "another", "key": "another"}))
    assert prepare() == ["make", "build torch==2.13.0"]


def test_the_pythons_own_torch_is_used_and_that_is_said(prepare, monkeypatch, capsys):
    monkeypatch.setattr(prepare.module, "has", lambda name: True)
    assert prepare() == ["make", "build torch==2.13.0"]
    assert capsys.readouterr().out == ""
    assert prepare("--torch", "torch==2.1") == []
    assert ", which is used; TORCH=torch==2.1 is for a python without" in capsys.readouterr().out
