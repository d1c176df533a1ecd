"""Runs every native kernel once on small inputs, for a memory or race checker to watch.

    compute-sanitizer --tool memcheck python -m tests.gpu.exercise
    python -m tests.gpu.exercise --device cpu      # what it does, without a GPU

Inputs are made on the CPU, so that hardly any other kernel runs; results are compared with the formulas.
"""

import argparse

import torch

from sib_ext import reference
from sib_ext.ops import dispatch

from .. import test_norm_double_backward as normalisation
from ..samples import LARGE, Sample

# Images that fit in shared memory in float32, and one whose float64 plane does not; ties; wide supports; odd sizes.
MASK_SAMPLES = (
    LARGE,
    Sample("wide", (2, 3, 25, 23), {"temperature": 5.0, "padding": "exclude"}, layout="channels_last"),
    Sample("large", (1, 3, 180, 170), {"window": 9}),
    Sample("too large for shared memory", (1, 1, 250, 251), {"window": 9}),
)
STATISTICS_SAMPLES = (
    LARGE,
    Sample("channels last", (3, 5, 6, 7), layout="channels_last"),
    Sample("two tiles", (67, 2, 6, 10)),
    Sample("many channels", (3, 600, 3, 9)),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def check(name: str, value: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 2e-2)
    error = float((value.cpu().double() - truth).norm() / (truth.norm() + 1e-30))
    if not error < tolerance:
        raise RuntimeError(f"{name} in {dtype}: relative error {error:.1e}")


def density_mask(sample: Sample, dtype: torch.dtype, device: str, ties: bool) -> None:
    vjp, options = sample.fields(dtype).vjp, sample.positional_options
    if ties:
        vjp = (vjp * 2).round()
    cotangent = sample.cotangent_of_mask(reference.accumulation_dtype(dtype))
    on_device = vjp.to(device)
    mask, support = dispatch.overload("density_mask", "native")(on_device, *options)
    backward = dispatch.overload("density_mask_backward", "native")
    gradient = backward(cotangent.to(device), on_device, mask, support, *options)
    wide = vjp.double()
    check("mask", mask, reference.density_mask(wide, *options), dtype)
    # From the mask and support at hand: rounding may swap ranks.
    truth = reference.density_mask_backward(cotangent.double(), wide, mask.cpu().double(), support.cpu(), *options)
    check("gradient of the mask", gradient, truth, dtype)


def masked_statistics(sample: Sample, dtype: torch.dtype, device: str) -> None:
    vjp, x, mask = sample.fields(dtype)
    mask = mask.to(reference.accumulation_dtype(dtype))
    cotangents = [c.to(mask.dtype) for c in sample.cotangents_of_statistics()]
    fields = [t.to(device) for t in (vjp, x, mask)]
    outputs = dispatch.overload("masked_statistics", "native")(*fields, True, True)
    backward = dispatch.overload("masked_statistics_backward", "native")
    grads = backward(*(c.to(device) for c in cotangents), *fields, True, True)
    wide = [t.double() for t in (vjp, x, mask)]
    truths = (
        *reference.masked_statistics(*wide),
        *reference.masked_statistics_backward(*(c.double() for c in cotangents), *wide),
    )
    for value, truth in zip((*outputs, *grads), truths, strict=True):
        check("statistics", value, truth, dtype)


def norm_double_backward(name: str, dtype: torch.dtype, device: str) -> None:
    arguments = normalisation.arguments(name, dtype)
    op = dispatch.overload("norm_double_backward", "native")
    results = op(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments))
    for value, truth in zip(results, reference.norm_double_backward(*(t.double() for t in arguments[:6])), strict=True):
        check(f"norm_double_backward, {name}", value, truth, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if problem := dispatch.native_problem(device):
        raise SystemExit(f"no native kernels for {device}: {problem}")
    for dtype in DTYPES:
        for sample in MASK_SAMPLES:
            density_mask(sample, dtype, device, ties=False)
        density_mask(LARGE, dtype, device, ties=True)
        for sample in STATISTICS_SAMPLES:
            masked_statistics(sample, dtype, device)
        for name in normalisation.CASES:
            norm_double_backward(name, dtype, device)
    print(f"every native kernel of {device} ran and gave the formula's results")


if __name__ == "__main__":
    main()
