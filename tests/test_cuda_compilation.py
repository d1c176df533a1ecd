"""The CUDA kernels compile for every GPU they are meant for, within its resources; their module loads without one."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]")
# Bytes a thread may spill or keep in local memory, by kernel; none of them needs any.
LOCAL_MEMORY = 0
# Of a multiprocessor; of a block where it is not 256.
REGISTERS = 65536
THREADS = {
    "in_block_kernelId": 512,
    "in_block_kernel": 768,
    "statistics_in_one_pass_kernel": 512,
    "backward_in_one_pass_kernel": 384,
}


def cuda_home() -> Path | None:
    """As setup.py looks for it."""
    on_path = shutil.which("nvcc")
    candidates = (os.environ.get("CUDA_HOME"), "/usr/local/cuda", on_path and Path(on_path).resolve().parents[1])
    return next((Path(c) for c in candidates if c and (Path(c) / "bin/nvcc").is_file()), None)


pytestmark = [
    pytest.mark.skipif(not SOURCES, reason="needs the source tree"),
    pytest.mark.skipif(cuda_home() is None, reason="no nvcc: set CUDA_HOME to a CUDA toolkit"),
    pytest.mark.skipif(torch.version.cuda is None, reason=f"torch {torch.__version__} was built without CUDA"),
]


@pytest.fixture(scope="session")
def objects(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Each source, compiled one after another: (object file, what ptxas says of its kernels)."""
    from torch.utils.cpp_extension import include_paths

    folder, found = tmp_path_factory.mktemp("cuda"), {}
    for source in SOURCES:
        target = folder / f"{source.stem}.o"
        command = [
            *(str(cuda_home() / "bin/nvcc"), "-std=c++17", "-O3", "-DUSE_CUDA", "-Xptxas=-v", "-Xcompiler=-fPIC"),
            *ARCHITECTURES,
            *(f"-I{path}" for path in include_paths("cuda")),
            *("-c", str(source), "-o", str(target)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        found[source.stem] = target, done.stdout + done.stderr
    return found


def resources(report: str) -> list[dict]:
    """What `ptxas -v` says of each kernel and architecture."""
    pattern = (
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<architecture>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers"
    )
    return [
        {key: int(value) if value.isdigit() else value for key, value in match.groupdict().items()}
        for match in re.finditer(pattern, report, re.DOTALL)
    ]


def test_every_source_compiles_for_ampere_hopper_and_what_comes_later(objects):
    assert set(objects) == {"batch_norm_backward", "density_mask", "masked_statistics", "norm_double_backward"}
    tool = shutil.which("cuobjdump") or cuda_home() / "bin/cuobjdump"
    for target, report in objects.values():
        assert {kernel["architecture"] for kernel in resources(report)} == {"sm_80", "sm_90"}
        if Path(tool).is_file():
            listing = subprocess.check_output([str(tool), "-lelf", "-lptx", str(target)], text=True)
            assert all(part in listing for part in ("sm_80.cubin", "sm_90.cubin", "sm_90.ptx"))


def test_no_kernel_spills_or_uses_local_memory(objects):
    kernels = [kernel for _, report in objects.values() for kernel in resources(report)]
    assert len(kernels) > 100
    greedy = [k for k in kernels if max(k["stack"], k["stores"], k["loads"]) > LOCAL_MEMORY]
    assert not greedy, greedy


def product_loops(sass: str) -> dict[str, list[list[str]]]:
    """The instructions of each loop with products on tensor cores (but no other such loop in it), by kernel."""
    loops: dict[str, list[list[str]]] = {}
    for part in sass.split("Function : ")[1:]:
        instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?);", part)]
        products = [at for at, text in instructions if "HMMA" in text]
        jumps = [(int(m[1], 16), at) for at, text in instructions if (m := re.search(r"BRA 0x([0-9a-f]+)", text))]
        spans = [(first, last) for first, last in jumps if any(first < at < last for at in products)]
        inner = [s for s in spans if not any(s[0] <= o[0] and o[1] <= s[1] for o in spans if o != s)]
        loops[part.split()[0]] = [[text for at, text in instructions if a <= at <= b] for a, b in inner]
    return loops


def registers_read(instruction: str) -> set[int]:
    """Numbers of the registers named after the first operand, which most instructions write."""
    return {int(r) for r in re.findall(r"\bR(\d+)", instruction.partition(",")[2])}


def test_products_go_on_while_the_next_elements_are_loaded(objects):
    """In the loops of products on tensor cores, loads stand before the products and their first use after them."""
    tool = shutil.which("cuobjdump") or cuda_home() / "bin/cuobjdump"
    if not Path(tool).is_file():
        triton = pytest.importorskip("triton")
        tool = triton.knobs.nvidia.cuobjdump.path
    sass = subprocess.check_output([tool, "-sass", "-arch", "sm_90", objects["masked_statistics"][0]], text=True)
    wanted = re.compile(r"(gram_kernel|statistics_backward_kernel)I.*Li64ELb1ELb1E")
    kernels = {name: loops for name, loops in product_loops(sass).items() if wanted.search(name)}
    assert len(kernels) == 6  # two kernels, three types
    for name, loops in kernels.items():
        assert loops, name
        for loop in loops:
            first = next(i for i, text in enumerate(loop) if "HMMA" in text)
            loads = {i: text for i, text in enumerate(loop) if "LDG" in text}
            assert len(loads) >= 3 and max(loads) < first, name
            for i, text in loads.items():
                width = {"128": 4, "64": 2}.get(text.split("LDG.E.")[1].split()[0].split(".")[0], 1)
                target = int(re.search(r"\bR(\d+),", text)[1])
                loaded = set(range(target, target + width))
                for later in loop[i + 1 :]:
                    assert not loaded & registers_read(later), f"{name}: {later} waits for {text}"


def test_the_registers_of_every_block_fit_on_a_multiprocessor(objects):
    for _, report in objects.values():
        for kernel in resources(report):
            threads = next((t for part, t in THREADS.items() if part in kernel["kernel"]), 256)
            rounded = -(-kernel["registers"] // 8) * 8  # registers are given out in eights
            assert rounded * threads <= REGISTERS, kernel


def test_the_module_links_and_loads_without_a_gpu(objects, tmp_path):
    """Linked as setup.py does it, imported in a process that sees no GPU, with all four ops on the CUDA key."""
    import pybind11
    from torch.utils.cpp_extension import CUDA_HOME, include_paths, library_paths

    assert CUDA_HOME
    module = tmp_path / "_C_cuda.so"
    options = ("-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-DTORCH_EXTENSION_NAME=_C_cuda")
    python = sysconfig.get_paths()["include"]
    include = (f"-I{path}" for path in (*include_paths("cpu"), pybind11.get_include(), python))
    folders = [*library_paths("cuda"), *(cuda_home() / f for f in ("lib", "lib64") if (cuda_home() / f).is_dir())]
    libraries = (*(f"-L{f}" for f in folders), "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lcudart")
    libraries = (*libraries, "-lc10_cuda", "-ltorch_cuda")
    command = ["g++", *options, '-DSIB_EXT_DEVICE="cuda"', *include, str(ROOT / "csrc/module.cpp")]
    command += [*(str(target) for target, _ in objects.values()), *libraries, "-o", str(module)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    # A fresh library namespace: the schema comes from the package, whose own module is kept out.
    code = (
        "import sys, importlib.util, importlib.machinery, torch\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'sib_ext._C_cuda' else real(name, *a)\n"
        "import sib_ext\n"
        f"loader = importlib.machinery.ExtensionFileLoader('_C_cuda', {str(module)!r})\n"
        "module = importlib.util.module_from_spec(importlib.util.spec_from_loader('_C_cuda', loader))\n"
        "loader.exec_module(module)\n"
        "ops = ('density_mask', 'density_mask_backward', 'masked_statistics', 'masked_statistics_backward')\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(module.build_info()['device'], all(has(f'sib_ext::{op}', 'CUDA') for op in ops))\n"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "cuda True", done.stderr[-4000:]
