"""The generated pages are up to date, and every link in the documentation points at something."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_api_page_is_up_to_date():
    module = load(ROOT / "docs" / "build_api.py")
    assert module.PAGE.read_text() == module.render(), "run: python docs/build_api.py"


def test_benchmark_tables_are_up_to_date():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import report
    finally:
        sys.path.remove(str(ROOT))
    page = report.PAGE.read_text()
    assert page == report.render(page), "run: python -m benchmarks.report"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_at_files(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_makefile_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README names make {target}"


def test_readme_commands_have_the_flags_they_use():
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    for command, rest in re.findall(r"^\s*sensilora (\w+)(.*)$", readme, re.MULTILINE):
        help_text = subprocess.run(
            [sys.executable, "-m", "sensilora", command, "--help"], capture_output=True, text=True, check=True,
            env={**__import__("os").environ, "COLUMNS": "200", "NO_COLOR": "1"},
        ).stdout  # fmt: skip
        for flag in re.findall(r"(--[a-z-]+)", rest):
            assert flag in help_text, f"README uses {flag} with sensilora {command}"
