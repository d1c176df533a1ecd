"""Every Triton kernel, as the ops launch it, compiles ahead of time for GPUs that are not here."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from .samples import Sample

triton = pytest.importorskip("triton")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")

# Bytes of shared memory that a block may have, by compute capability; registers of a multiprocessor, by any.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536
# Bytes of stack that a thread may have. Not on Hopper, ptxas rounds some kernels down to 64, 72, 80 or 128 registers,
# for one more block on a multiprocessor, and parks a few.
STACK = {80: 32, 90: 0, 100: 32}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Sizes of one become constants in a kernel, as does divisibility by 16: other code than that of odd sizes.
SAMPLES = (
    Sample("plain", (35, 3, 40, 37), {"window": 5}),
    Sample("multiples of 16, channels last", (16, 32, 16, 32), {"padding": "exclude"}, layout="channels_last"),
    Sample("ones", (1, 1, 1, 1), {"window": 1}),
    Sample("a training's batch", (128, 3, 64, 64), {"window": 5}),
)


def launches(dtype, sample, monkeypatch):
    """(kernel, its arguments, its options) of every launch, without a GPU: kernels are noted and not run."""
    from sib_ext.triton import density_mask, masked_statistics, norm_double_backward

    found = []

    def note(kernel, *arguments, grid, warmup, **options):
        found.append((kernel, arguments, options))

    monkeypatch.setattr(triton.JITFunction, "run", note)
    vjp, x, mask = sample.fields(dtype)
    mask = mask.to(torch.promote_types(dtype, torch.float32))
    _, support = density_mask.forward(vjp, *sample.positional_options)
    density_mask.backward(mask, vjp, mask, support, *sample.positional_options)
    masked_statistics.forward(vjp, x, mask, True, True)
    cotangents = sample.cotangents_of_statistics(mask.dtype)
    masked_statistics.backward(*cotangents, vjp, x, mask, True, True)
    mean = mask.new_zeros(x.shape[1])
    norm_double_backward.forward(vjp, vjp, x, mean, mean + 1, None, 1e-5)
    return found


def compiled(kernel, arguments, options, target):
    """What triton.jit would compile for these arguments: ones are constants, multiples of 16 are known as such."""
    signature, constants, hints = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (specialised and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = triton.runtime.jit.mangle_type(value)
        if isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
            hints[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=target, options=options)


def usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers of a thread and its bytes of stack and local memory, from cuobjdump, which ships with triton."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    report = subprocess.check_output([tool, "-res-usage", str(file)], text=True)
    return {name: int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}


def combinations():
    for capability in SHARED_MEMORY:
        for name, dtype in DTYPES.items():
            for sample in SAMPLES:
                usual = capability == 90 and name != "float64" and sample is not SAMPLES[2]
                marks = () if usual else pytest.mark.slow
                yield pytest.param(capability, dtype, sample, id=f"sm_{capability}-{name}-{sample.name}", marks=marks)


@pytest.mark.parametrize(("capability", "dtype", "sample"), list(combinations()))
def test_every_launch_compiles_within_the_resources_of_the_gpu(capability, dtype, sample, monkeypatch, tmp_path):
    names = set()
    for kernel, arguments, options in launches(dtype, sample, monkeypatch):
        binary = compiled(kernel, arguments, options, GPUTarget("cuda", capability, 32))
        names.add(binary.metadata.name)
        assert binary.metadata.shared <= SHARED_MEMORY[capability], kernel
        used = usage(binary.asm["cubin"], tmp_path)
        block = used["REG"] * 32 * binary.metadata.num_warps
        assert block <= REGISTERS, f"{binary.metadata.name} needs {block} registers a block"
        assert used["STACK"] <= STACK[capability] and not used["LOCAL"], f"{binary.metadata.name} spills: {used}"
    assert len(names) == 17, sorted(names)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_launch_compiles_for_an_amd_gpu(dtype, monkeypatch):
    for kernel, arguments, options in launches(dtype, SAMPLES[0], monkeypatch):
        binary = compiled(kernel, arguments, options, GPUTarget("hip", "gfx942", 64))
        assert binary.metadata.shared <= 64 * 1024, kernel
