"""Runs every native kernel once on small inputs, for a memory or race checker to watch.

    compute-sanitizer --tool memcheck python -m tests.gpu.exercise
    python -m tests.gpu.exercise --device cpu      # what it does, without a GPU

Inputs are made on the CPU, so that hardly any other kernel runs; results are compared with the formulas. Every case
runs, and what differs is listed at the end; only an error that outlasts its cause, as CUDA's do, ends the process.
"""

import argparse
from collections.abc import Callable, Iterator

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
    Sample("one pass", (67, 2, 6, 10)),
    Sample("three tiles", (131, 1, 6, 10)),
    Sample("many channels", (3, 600, 3, 9)),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


# What was computed, its value and the formula's.
Results = Iterator[tuple[str, torch.Tensor, torch.Tensor]]


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.cpu().double() - truth).norm() / (truth.norm() + 1e-30))


def density_mask(sample: Sample, dtype: torch.dtype, device: str, ties: bool = False) -> Results:
    vjp, options = sample.fields(dtype).vjp, sample.positional_options
    if ties:
        vjp = (vjp * 2).round()
    cotangent = sample.cotangent_of_mask(reference.accumulation_dtype(dtype))
    on_device = vjp.to(device)
    mask, support = dispatch.overload("density_mask", "native")(on_device, *options)
    backward = dispatch.overload("density_mask_backward", "native")
    gradient = backward(cotangent.to(device), on_device, mask, support, *options)
    wide = vjp.double()
    yield "mask", mask, reference.density_mask(wide, *options)
    # From the mask and support at hand: rounding may swap ranks.
    truth = reference.density_mask_backward(cotangent.double(), wide, mask.cpu().double(), support.cpu(), *options)
    yield "gradient of the mask", gradient, truth


def masked_statistics(sample: Sample, dtype: torch.dtype, device: str) -> Results:
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
    names = ("moments", "Gram of R", "Gram of x", "gradient of R", "gradient of x", "gradient of M")
    yield from zip(names, (*outputs, *grads), truths, strict=True)


def sums_of_one_field(sample: Sample, dtype: torch.dtype, device: str) -> Results:
    """As the balanced preset takes them: R stands for x, and neither x nor M needs a gradient."""
    vjp, _, mask = sample.fields(dtype)
    mask = mask.to(reference.accumulation_dtype(dtype))
    cotangent = sample.cotangents_of_statistics()[0].to(mask.dtype)
    on_device = [t.to(device) for t in (vjp, mask)]
    fields = (on_device[0], *on_device)
    moments, *_ = dispatch.overload("masked_statistics", "native")(*fields, False, False)
    backward = dispatch.overload("masked_statistics_backward", "native")
    gradient, *_ = backward(cotangent.to(device), None, None, *fields, False, False)
    wide = [t.double() for t in (vjp, vjp, mask)]
    yield "moments", moments, reference.masked_statistics(*wide, False, False)[0]
    yield "gradient of R", gradient, reference.masked_statistics_backward(cotangent.double(), None, None, *wide)[0]


def norm_double_backward(name: str, dtype: torch.dtype, device: str) -> Results:
    arguments = normalisation.arguments(name, dtype)
    op = dispatch.overload("norm_double_backward", "native")
    results = op(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments))
    truths = reference.norm_double_backward(*(t.double() for t in arguments[:6]))
    yield from zip(("derivative by g", "by x", "by the weight"), results, truths, strict=True)


def batch_norm_backward(name: str, dtype: torch.dtype, device: str) -> Results:
    arguments = normalisation.arguments(name, dtype)[1:6]
    results = torch.ops.sib_ext.batch_norm_backward(*(t.to(device) for t in arguments))
    truths = reference.batch_norm_backward(*(t.double() for t in arguments))
    yield from zip(("derivative by x", "by the weight", "by the bias"), results, truths, strict=True)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Results]]:
    for sample in MASK_SAMPLES:
        yield f"density_mask, {sample.name}", density_mask(sample, dtype, device)
    yield f"density_mask, {LARGE.name}, ties", density_mask(LARGE, dtype, device, ties=True)
    for sample in STATISTICS_SAMPLES:
        yield f"masked_statistics, {sample.name}", masked_statistics(sample, dtype, device)
        yield f"masked_statistics of one field, {sample.name}", sums_of_one_field(sample, dtype, device)
    for name in normalisation.CASES:
        yield f"norm_double_backward, {name}", norm_double_backward(name, dtype, device)
        if device == "cuda" and normalisation.CASES[name][1] is None:  # of a GPU alone
            yield f"batch_norm_backward, {name}", batch_norm_backward(name, dtype, device)


def mismatches(name: str, results: Results, tolerance: float, synchronise: Callable[[], None]) -> list[str]:
    """What is wrong in a case. SystemExit if the device takes no more work: all that followed would fail with it."""
    found = []
    try:
        for what, value, truth in results:
            error = relative_error(value, truth)
            if not error < tolerance:
                found.append(f"{name}: {what}: relative error {error:.1e}")
    except Exception as error:
        found.append(f"{name}: {type(error).__name__}: {error}")
    try:
        synchronise()  # a fault of the device belongs to this case
    except RuntimeError as error:
        raise SystemExit(f"{name}: the device failed, and nothing after this case ran: {error}") from error
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if problem := dispatch.native_problem(device):
        raise SystemExit(f"no native kernels for {device}: {problem}")
    synchronise = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    count, wrong = 0, []
    for dtype in DTYPES:
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 2e-2)
        for name, results in cases(dtype, device):
            found = mismatches(f"{dtype}, {name}", results, tolerance, synchronise)
            for line in found:
                print(f"WRONG: {line}", flush=True)
            count, wrong = count + 1, wrong + found
    if wrong:
        raise SystemExit("\n".join([f"{count} cases of native kernels of {device} ran; wrong are:", *wrong]))
    print(f"{count} cases of native kernels of {device} ran, and all gave the formula's results")


if __name__ == "__main__":
    main()
