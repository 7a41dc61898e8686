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
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    module = extension(
        "sensilora._C",
        sources,
        depends=sorted(str(header) for ending in ("h", "cuh") for header in CSRC.glob(f"*.{ending}")),
        define_macros=macros,
        extra_compile_args=flags,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**native_build())
