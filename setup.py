"""Builds the native ops (csrc/) where the machine can; everything else is in pyproject.toml.

``SENSILORA_BUILD`` forces what is built: ``none`` (pure Python), ``cpp`` (CPU ops), ``cuda`` (CPU and CUDA ops).
Forcing what cannot be built is an error. Without it the CPU ops are built wherever torch can be imported, and the
CUDA ops where torch has CUDA and a CUDA toolkit is found.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import setup

CSRC = Path("csrc")
#: The oldest torch whose stable ABI the sources use (2.10); a build loads into this and every later torch.
TORCH_TARGET_VERSION = "0x020a000000000000"
#: For machines without a GPU to ask; H100 code also runs on what comes after it.
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def cuda_architectures(torch) -> list[str]:
    """What to compile for: what TORCH_CUDA_ARCH_LIST says, or else this machine's GPUs, or else the default.

    With 9.0 comes 9.0a, since Hopper's own instructions exist in code for that alone; of both, Hopper loads 9.0a.
    """
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace("Hopper", "9.0+PTX").replace(" ", ";").strip(";")
    if named in {"", "native"}:
        named = visible_architectures(torch) if torch.cuda.is_available() else DEFAULT_CUDA_ARCHITECTURES
    wanted = list(filter(None, named.split(";")))
    if {"9.0", "9.0+PTX"} & set(wanted):
        wanted = ["9.0a", *(name for name in wanted if name not in {"9.0", "9.0a"})]
    return wanted


def visible_architectures(torch) -> str:
    """As torch would choose: this machine's GPUs, none newer than it knows, and of the newest PTX for later ones."""
    known = max(int(re.sub(r"\D", "", name)) for name in torch.cuda.get_arch_list() if name.startswith("sm_"))
    found = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    names = sorted({min(capability, divmod(known, 10)) for capability in found})
    return ";".join(f"{major}.{minor}" for major, minor in names) + "+PTX"


def cuda_macros(architectures: list[str]) -> list[tuple[str, str]]:
    """What the sources are told of them; the extension tells Python. nvcc would take a comma for the next macro."""
    return [
        ("SENSILORA_WITH_HOPPER", str(int("9.0a" in architectures))),
        ("SENSILORA_CUDA_ARCHITECTURES", ":".join(architectures)),
    ]


def cuda_problem(cpp_extension, torch) -> str | None:
    """Why the CUDA ops cannot be built, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    root = cpp_extension.CUDA_HOME
    # An `nvcc` wrapper on PATH makes torch guess a root that holds neither headers nor libraries.
    if (
        root is None
        or not Path(root, "bin", "nvcc").is_file()
        or not Path(root, "include", "cuda_runtime.h").is_file()
    ):
        return f"no CUDA toolkit with nvcc and headers was found (CUDA_HOME is {root})"
    return None


def native_build() -> dict:
    """The ``ext_modules`` and ``cmdclass`` arguments of `setup`."""
    wanted = os.environ.get("SENSILORA_BUILD", "")
    if wanted not in {"", "none", "cpp", "cuda"}:
        sys.exit(f"SENSILORA_BUILD is {wanted!r}; use none, cpp or cuda")
    if wanted == "none":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        if wanted:
            sys.exit(f"SENSILORA_BUILD={wanted} needs torch at build time ({error}); use --no-build-isolation")
        print(
            "warning: torch cannot be imported here, so sensilora is built without its native ops; "
            "install torch first and then sensilora with --no-build-isolation to get them",
            file=sys.stderr,
        )
        return {}

    problem = cuda_problem(cpp_extension, torch)
    if wanted == "cuda" and problem:
        sys.exit(f"SENSILORA_BUILD=cuda: {problem}")
    cuda = problem is None and wanted != "cpp"
    sources = sorted(map(str, CSRC.glob("*.cpp")))
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("SENSILORA_WITH_CUDA", str(int(cuda)))]
    # Fused multiply-adds are off in ISO mode, which torch asks for.
    flags = {"cxx": ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]}
    extension = cpp_extension.CppExtension
    if cuda:
        extension = cpp_extension.CUDAExtension
        sources += sorted(map(str, CSRC.glob("*.cu")))
        flags["nvcc"] = ["-O3", "--threads=2"]
        architectures = cuda_architectures(torch)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)
        macros += cuda_macros(architectures)
    module = extension(
        "sensilora._C",
        sources,
        depends=sorted(str(header) for ending in ("h", "cuh") for header in CSRC.glob(f"*.{ending}")),
        define_macros=macros,
        extra_compile_args=flags,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**native_build())
