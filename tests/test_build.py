"""What is built and packaged: the extension, its ops, the symlinked kernels, what wheel and sdist hold."""

import email
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import sensilora

ROOT = Path(__file__).parent.parent
LEVELS = ["baseline", "avx2", "avx512", "avx512bf16"]

built = pytest.mark.skipif(
    importlib.util.find_spec("sensilora._C") is None, reason="the native extension is not built here"
)
cloned = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git clone")


def python(code: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@built
def test_build_facts():
    extension = importlib.import_module("sensilora._C")
    assert extension.compiler.startswith("C++ ")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", extension.torch_version)
    assert extension.cpu_level() in LEVELS
    assert isinstance(extension.cuda, bool)
    assert bool(extension.cuda_architectures) == extension.cuda
    assert not extension.cuda or torch.version.cuda is not None


@built
def test_registered_ops_are_those_of_the_schema_file():
    importlib.import_module("sensilora._C")
    declared = set(re.findall(r'"(\w+)\(Tensor[ ([]', (ROOT / "csrc" / "schema.cpp").read_text()))
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sensilora_C::")}
    assert len(declared) >= 6
    assert registered == {f"sensilora_C::{name}" for name in declared}
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU") for name in registered)
    for path in (ROOT / "csrc").glob("*_cuda.cu"):
        for name in re.findall(r'm\.impl\("(\w+)"', path.read_text()):
            on_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"sensilora_C::{name}", "CUDA")
            assert on_cuda == importlib.import_module("sensilora._C").cuda, name


@built
def test_cpu_level_can_be_lowered_and_nonsense_is_refused():
    code = "import sensilora._C as c; print(c.cpu_level())"
    assert python(code, SENSILORA_CPU="baseline").stdout == "baseline\n"
    refused = python(code, SENSILORA_CPU="mmx")
    assert refused.returncode != 0
    assert "SENSILORA_CPU is mmx" in refused.stderr


def package_with_extension(folder: Path, content: bytes | None) -> None:
    """`folder`/sensilora: this package, with `content` (or nothing) in the place of its extension."""
    (folder / "sensilora").mkdir()
    for entry in (ROOT / "sensilora").iterdir():
        if not entry.name.startswith(("_C.", "__pycache__")):
            (folder / "sensilora" / entry.name).symlink_to(entry)
    if content is not None:
        (folder / "sensilora" / "_C.so").write_bytes(content)


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["missing", "broken"])
def test_a_missing_extension_falls_back_and_a_broken_one_raises(tmp_path, content):
    package_with_extension(tmp_path, content)
    run = python(
        "import torch; from sensilora.ops import autocorrelation_diag as a; print(a(torch.ones(3, 1)))", tmp_path
    )
    if content is None:
        assert run.stdout == "tensor([3.])\n", run.stderr
    else:
        assert "ImportError" in run.stderr


@cloned
def test_kernels_are_reached_through_the_package():
    link = ROOT / "sensilora" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert importlib.util.find_spec("sensilora.kernels.autocorrelation_diag") is not None


@cloned
def test_the_sanitizer_counts_what_is_found_in_every_kernel():
    ours = re.compile(re.search(r"^KERNELS = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1])
    triton = [
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"def (\w+_kernel)\(", path.read_text())
    ]
    assert len(triton) >= 20
    assert [name for name in triton if not ours.search(f"at {name}")] == []
    for path in (ROOT / "csrc").glob("*.cu*"):
        text = path.read_text()
        assert "__global__" not in text or text.index("namespace sensilora {") < text.index("__global__"), path
    assert ours.search("at void sensilora::signs_kernel<float, double>")
    assert not ours.search("at void at::native::reduce_kernel<512, 1>")


@dataclass(frozen=True)
class Packed:
    """What the tracked files were packed into: archives, and the names of the files in them."""

    tracked: set[str]
    wheel: Path
    wheel_names: set[str]
    sdist_names: set[str]
    rebuilt_names: set[str]  # of the wheel that the unpacked sdist makes


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Packed:
    """Without the extension, and from copies, since setuptools leaves build folders beside setup.py."""

    def build(source: Path, kind: str) -> Path:
        code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(source.parent)!r}))"
        run = python(code, source, SENSILORA_BUILD="none")
        assert run.returncode == 0, run.stderr
        return source.parent / run.stdout.splitlines()[-1]

    clone = tmp_path_factory.mktemp("clone") / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    listed = subprocess.run(["git", "ls-files"], cwd=clone, capture_output=True, text=True, check=True)
    sdist, wheel = build(clone, "sdist"), build(clone, "wheel")
    unpacked = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(sdist, unpacked)
    (source,) = unpacked.iterdir()
    return Packed(
        tracked=set(listed.stdout.splitlines()),
        wheel=wheel,
        wheel_names=set(zipfile.ZipFile(wheel).namelist()),
        sdist_names={path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()},
        rebuilt_names=set(zipfile.ZipFile(build(source, "wheel")).namelist()),
    )


@cloned
def test_wheel_holds_every_module_and_data_file(packed):
    assert packed.wheel.name.endswith("-py3-none-any.whl")
    package = {name for name in packed.tracked if name.startswith("sensilora/")} - {"sensilora/kernels"}
    kernels = {f"sensilora/{name}" for name in packed.tracked if name.startswith("kernels/")}
    assert kernels
    assert {name for name in package if name.startswith("sensilora/demo_data/")}
    about = {name for name in packed.wheel_names if ".dist-info/" in name}
    assert packed.wheel_names - about == package | kernels
    assert "sensilora/py.typed" in package


@cloned
def test_an_installed_wheel_runs_without_the_clone(packed, tmp_path):
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        site,
        packed.wheel,
    ]
    subprocess.run(command, check=True)
    code = (
        "import torch, sensilora\n"
        "from sensilora.nn import VarRankLoRALinear\n"
        "layer = VarRankLoRALinear(torch.nn.Linear(8, 4), 2)\n"
        "layer(torch.ones(3, 8)).sum().backward()\n"
        "print(sensilora.__file__, layer.lora_B.grad.shape)"
    )
    # The clone may be on the interpreter's path by an editable install, behind this folder.
    run = python(code, tmp_path, PYTHONPATH=str(site))
    assert run.stdout == f"{site / 'sensilora' / '__init__.py'} torch.Size([4, 2])\n", run.stderr
    told = subprocess.run(
        [sys.executable, "-m", "sensilora", "doctor"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert "lora_linear" in told.stdout


@cloned
def test_sdist_holds_what_is_tracked_and_builds_the_same_wheel(packed):
    assert packed.tracked - {"sensilora/kernels"} <= packed.sdist_names
    assert packed.rebuilt_names == packed.wheel_names


@cloned
def test_wheel_says_its_licences_command_and_extras(packed):
    with zipfile.ZipFile(packed.wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        for licence in ("LICENSE", "NOTICE", "sensilora/demo_data/LICENSE"):
            assert archive.read(f"{folder}/licenses/{licence}") == (ROOT / licence).read_bytes()
        assert b"sensilora = sensilora.__main__:main" in archive.read(f"{folder}/entry_points.txt")
    assert metadata["Version"] == sensilora.__version__
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-4.0"
    extras = set(metadata.get_all("Provides-Extra"))
    named = {
        extra
        for path in [ROOT / "README.md", *(ROOT / "sensilora").rglob("*.py")]
        for extra in re.findall(r"sensilora\[(\w+)\]", path.read_text())
    }
    assert {"peft", "plots"} <= named <= extras


def test_citation_and_package_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == sensilora.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert all(entry["authors"] and entry["title"] and entry["type"] for entry in citation["references"])


def setup_functions() -> dict:
    """What setup.py defines, without setting anything up."""
    functions: dict = {}
    source = (ROOT / "setup.py").read_text().replace("setup(**native_build())", "")
    exec(compile(source, "setup.py", "exec"), functions)
    return functions


def cuda_toolkit() -> Path | None:
    """A folder with bin/nvcc and headers; a wrapper of nvcc elsewhere on PATH does not tell where those are."""
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for root in map(Path, filter(None, roots)):
        if (root / "bin" / "nvcc").is_file() and (root / "include" / "cuda_runtime.h").is_file():
            return root
    return None


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "csrc").glob("*.cu")))
def test_cuda_sources_compile_without_spilling_registers(tmp_path, name):
    """Against the headers of the torch that is installed, for the oldest GPU served, with the flags torch adds.

    Hopper's kernels for Hopper too.
    """
    toolkit = cuda_toolkit()
    if toolkit is None:
        pytest.skip("no CUDA toolkit with nvcc and headers")
    from torch.utils import cpp_extension

    flags = ["-std=c++17", "-O3", "--threads=2", "--compiler-options=-fPIC", "-Xptxas=-v"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DSENSILORA_WITH_CUDA=1"]
    flags += [*cpp_extension.COMMON_NVCC_FLAGS, *(f"-I{folder}" for folder in cpp_extension.include_paths("cpu"))]
    flags += ["--generate-code=arch=compute_80,code=sm_80"]
    flags += [f"-D{macro}={value}" for macro, value in setup_functions()["cuda_macros"](["9.0a", "8.0", "9.0+PTX"])]
    if "hopper" in name:
        flags += ["--generate-code=arch=compute_90a,code=sm_90a"]
    command = [toolkit / "bin" / "nvcc", "-c", ROOT / "csrc" / name, "-o", tmp_path / "object.o", *flags]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    report = re.findall(r"properties for (\w+)\n.* (\d+) bytes spill stores", run.stderr)
    assert report
    # Few enough to lie outside of loops.
    assert not [(kernel, int(count)) for kernel, count in report if int(count) > 32]
    # Or each product of the tensor cores waits for the one before.
    assert "wgmma.mma_async instructions are serialized" not in run.stderr


@pytest.mark.parametrize(
    ("named", "capabilities", "expected"),
    [
        ("", [], "9.0a;8.0;9.0+PTX"),
        ("", [(9, 0), (9, 0)], "9.0a;9.0+PTX"),
        ("", [(8, 0), (9, 0)], "9.0a;8.0;9.0+PTX"),
        ("native", [(8, 6)], "8.6+PTX"),
        ("", [(13, 0)], "12.0+PTX"),
        ("8.0;9.0+PTX", [(8, 6)], "9.0a;8.0;9.0+PTX"),
        ("8.0 9.0a 9.0", [], "9.0a;8.0"),
        ("9.0a", [], "9.0a"),
        ("Hopper", [], "9.0a;9.0+PTX"),
        ("10.0;", [], "10.0"),
        ("Ampere", [], "Ampere"),
    ],
)
def test_hopper_gets_code_with_its_own_instructions(monkeypatch, named, capabilities, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "sm_120", "compute_120"])
    assert setup_functions()["cuda_architectures"](torch) == expected.split(";")


@pytest.mark.parametrize(
    ("wanted", "message"), [("fast", "use none, cpp or cuda"), ("cuda", "SENSILORA_BUILD=cuda: ")]
)
@pytest.mark.skipif(torch.version.cuda is not None, reason="CUDA ops can be built here")
def test_forcing_what_cannot_be_built_is_an_error(wanted, message):
    run = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        env=os.environ | {"SENSILORA_BUILD": wanted},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert message in run.stderr
