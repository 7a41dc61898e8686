"""Imports point one way, and importing the package has no side effects."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sensilora"

# Layers from the bottom up; a module may import from lower layers and from its own.
LAYERS = [
    {"errors", "_files", "kernels", "_C"},
    {"targets", "ops"},
    {"nn", "sensitivity", "allocation", "plan", "data"},
    {"adapters", "integrations", "mixed", "plots"},
    {"compare", "demo", "doctor"},
    {"cli", "__main__"},
]
# Methods that promise more than their layer and import it when called: RankPlan.to_lora_config and RankPlan.plot.
LAZY_EXCEPTIONS = {("plan", "integrations"), ("plan", "plots")}
INTEGRATIONS_ONLY = {"transformers", "peft"}


def level(part):
    matching = [index for index, names in enumerate(LAYERS) if part in names]
    assert matching, f"sensilora/{part} is in no layer of this test; add it where it belongs"
    return matching[0]


def imported(path):
    """(dotted module, whether at module level) of each import in a file."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "sensilora":
                names = [f"sensilora.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) in top


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name, at_top in imported(path):
        root, _, rest = name.partition(".")
        if root in INTEGRATIONS_ONLY:
            assert part == "integrations", f"{path.name} imports {root}; only sensilora/integrations may"
        if root != "sensilora" or not rest:
            continue
        target = rest.split(".")[0]
        if target in {"use_backend", "__version__"} or ((part, target) in LAZY_EXCEPTIONS and not at_top):
            continue
        assert level(target) <= level(part), f"{part} imports {name}, which is above it"


def test_kernels_import_torch_and_triton_only():
    for path in (PACKAGE / "kernels").glob("*.py"):
        for name, _ in imported(path):
            top = name.split(".")[0]
            assert top in {"torch", "triton"} | sys.stdlib_module_names or name.startswith("sensilora.kernels."), name


def test_importing_the_package_is_light():
    code = (
        "import sys, sensilora, torch\n"
        "heavy = {'transformers', 'triton', 'peft', 'matplotlib', 'typer', 'scipy', 'sensilora._C'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
