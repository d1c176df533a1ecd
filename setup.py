"""Builds the native modules; everything else about the package is in pyproject.toml.

SIB_EXT_NO_NATIVE=1   pure Python: no native module
SIB_EXT_CUDA=auto|0|1 CUDA kernels: auto builds them where torch has CUDA and nvcc is there (no GPU needed);
                      1 stops where that is not so
TORCH_CUDA_ARCH_LIST  as for every torch extension; default 8.0;9.0+PTX where no GPU is visible
"""

import json
import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
SETUPTOOLS = 77  #: the oldest that knows a licence by its SPDX name
CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.cu"))
CPU_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))


def say(message: str) -> None:
    print(f"sib_ext: {message}", file=sys.stderr, flush=True)


def check_setuptools() -> None:
    """Before pyproject.toml is read, of which an older one complains without saying what to do."""
    if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
        sys.exit(
            f"sib_ext: setuptools {setuptools.__version__} is too old, {SETUPTOOLS} is needed: "
            f"pip install 'setuptools>={SETUPTOOLS}'"
        )


def option(name: str, default: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in choices:
        sys.exit(f"sib_ext: {name}={value!r} is not one of {', '.join(choices)}")
    return value


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, else /usr/local/cuda, else the folder of an nvcc on PATH."""
    on_path = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        Path(on_path).resolve().parents[1] if on_path else None,
    ]
    return next((Path(c) for c in candidates if c and (Path(c) / "bin/nvcc").is_file()), None)


def cuda_problem() -> str | None:
    """None when the CUDA kernels are to be built, else why not."""
    wanted = option("SIB_EXT_CUDA", "auto", ("auto", "0", "1"))
    if wanted == "0":
        return "switched off by SIB_EXT_CUDA=0"
    import torch

    problem = None
    if not CUDA_SOURCES:
        problem = "this version has no CUDA kernels (csrc/cuda is empty)"
    elif torch.version.cuda is None:
        problem = f"torch {torch.__version__} was built without CUDA"
    elif cuda_home() is None:
        problem = "no nvcc: set CUDA_HOME to a CUDA toolkit"
    if wanted == "1" and problem:
        sys.exit(f"sib_ext: SIB_EXT_CUDA=1 asks for the CUDA kernels, but {problem}")
    return problem


def pybind11_include() -> list[str]:
    """Empty without the package: torch has pybind11's headers among its own."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def module(name: str, device: str, sources: list[str], extension, **options):
    return extension(
        name=f"sib_ext.{name}",
        sources=["csrc/module.cpp", *sources],
        include_dirs=pybind11_include(),
        define_macros=[("SIB_EXT_DEVICE", f'"{device}"')],
        **options,
    )


def extensions() -> tuple[list, dict]:
    """The modules to build, and for each that is not, why."""
    if option("SIB_EXT_NO_NATIVE", "0", ("0", "1")) == "1":
        return [], dict.fromkeys(("_C", "_C_cuda"), "switched off by SIB_EXT_NO_NATIVE=1 when it was installed")
    problem = cuda_problem()
    if problem is None:
        # Before cpp_extension is imported: it looks for the toolkit then, and takes a bare nvcc on PATH first.
        os.environ["CUDA_HOME"] = str(cuda_home())
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # -fopenmp-simd lets `omp simd` loops vectorise (no OpenMP runtime); the ABI of vector types stays inside one file.
    flags = ["-O3", "-fopenmp-simd", "-fvisibility=hidden", "-Wno-psabi"]
    modules = [module("_C", "cpu", CPU_SOURCES, CppExtension, extra_compile_args={"cxx": flags})]
    if problem is None:
        modules.append(cuda_module(flags, CUDAExtension))
    return modules, {} if problem is None else {"_C_cuda": problem}


def cuda_module(flags: list[str], extension):
    import torch

    home = cuda_home()
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    say(f"CUDA kernels: {home}, architectures {os.environ.get('TORCH_CUDA_ARCH_LIST', 'of the visible GPUs')}")
    return module(
        "_C_cuda",
        "cuda",
        CUDA_SOURCES,
        extension,
        library_dirs=[str(home / folder) for folder in ("lib", "lib64") if (home / folder).is_dir()],
        extra_compile_args={
            "cxx": [*flags, "-DUSE_CUDA"],
            "nvcc": ["-O3", "-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden"],
        },
    )


def record(modules: list, skipped: dict) -> dict:
    """What `python -m sib_ext.info` tells of the build, and the reason it gives where a module does not load."""
    built = {"modules": [extension.name for extension in modules], "skipped": skipped}
    if modules:
        import torch

        built |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    return built


class BuildPython(build_py):
    """Also writes the record of the build next to the package's modules."""

    def run(self):
        super().run()
        folder = self.get_package_dir("sib_ext") if self.editable_mode else Path(self.build_lib) / "sib_ext"
        Path(folder, "_build.json").write_text(json.dumps(RECORD, indent=1))


def commands(modules: list) -> dict:
    if not modules:
        return {"build_py": BuildPython}
    from torch.utils.cpp_extension import BuildExtension

    return {"build_py": BuildPython, "build_ext": BuildExtension}


check_setuptools()
MODULES, SKIPPED = extensions()
RECORD = record(MODULES, SKIPPED)
say(f"building {', '.join(RECORD['modules']) or 'no native module'}")
for skipped_module, reason in SKIPPED.items():
    say(f"not building sib_ext.{skipped_module}: {reason}")
setup(ext_modules=MODULES, cmdclass=commands(MODULES))
