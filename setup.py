"""Builds the native ops (csrc/) where the machine can; everything else is in pyproject.toml.

``SENSILORA_BUILD`` forces what is built: ``none`` (pure Python), ``cpp`` (CPU ops), ``cuda`` (CPU and CUDA ops).
Forcing what cannot be built is an error. Without it the CPU ops are built wherever torch can be imported, and the
CUDA ops where torch has CUDA and a CUDA toolkit is found.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

CSRC = Path("csrc")
#: The oldest torch whose stable ABI the sources use (2.10); a build loads into this and every later torch.
TORCH_TARGET_VERSION = "0x020a000000000000"
#: For machines without a GPU to ask; H100 code also runs on what comes after it.
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def with_hopper(architectures: str) -> str:
    """The list with 9.0a wherever it has 9.0: Hopper's own instructions exist in code for that alone.

    9.0 stays where its PTX is wanted, for later GPUs; of both, Hopper loads 9.0a.
    """
    wanted = architectures.replace(" ", ";").split(";")
    if not {"9.0", "9.0+PTX"} & set(wanted):
        return architectures
    return ";".join(["9.0a", *(name for name in wanted if name not in {"", "9.0", "9.0a"})])


def cuda_architectures(torch) -> str:
    """What to compile for: what TORCH_CUDA_ARCH_LIST says, or else this machine's GPUs, if it has any."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not named and torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
        named = ";".join(f"{major}.{minor}" for major, minor in sorted(found))
    return with_hopper(named or DEFAULT_CUDA_ARCHITECTURES)


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
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures(torch)
        macros.append(("SENSILORA_WITH_HOPPER", str(int("9.0a" in os.environ["TORCH_CUDA_ARCH_LIST"]))))
    module = extension(
        "sensilora._C",
        sources,
        depends=sorted(str(header) for ending in ("h", "cuh") for header in CSRC.glob(f"*.{ending}")),
        define_macros=macros,
        extra_compile_args=flags,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**native_build())
