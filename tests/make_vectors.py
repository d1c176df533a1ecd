"""Writes vectors.npz: small float64 vectors from the plain formulas of sib_ext.reference, by autograd.

By hand, and only when a formula changes on purpose: python -m tests.make_vectors
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sib_ext import density_mask, masked_statistics, reference

PATH = Path(__file__).with_name("vectors.npz")
SHAPE = (2, 2, 5, 6)
CASES = {
    "published": {"window": 3, "temperature": 0.1, "slope": 10.0, "eps": 1e-8, "padding": "zeros", "area": 0.2},
    "other": {"window": 5, "temperature": 0.6, "slope": 4.0, "eps": 1e-3, "padding": "exclude", "area": 0.4},
}
INPUTS = ("R", "x", "mask_cotangent", "moments_cotangent", "gram_vjp_cotangent", "gram_input_cotangent")
OUTPUTS = ("mask", "moments", "gram_vjp", "gram_input", "dmask_dR", "dstatistics_dR", "dstatistics_dx")


def names() -> tuple[str, ...]:
    return INPUTS + OUTPUTS


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    batch, _, height, width = SHAPE
    shapes = (SHAPE, SHAPE, (batch, 1, height, width), (batch, len(reference.MOMENTS)), (batch, batch), (batch, batch))
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return dict(zip(INPUTS, values, strict=True))


def results(options: dict, given: dict[str, Tensor], implementation: str | None) -> dict[str, Tensor]:
    """The outputs for these inputs, by an implementation or, with None, by the plain formulas."""
    vjp, x = (given[name].clone().requires_grad_() for name in ("R", "x"))
    if implementation is None:
        mask = reference.density_mask(vjp, *options.values())
        statistics = reference.masked_statistics(vjp, x, mask)
    else:
        mask = density_mask(vjp, **options, impl=implementation)
        statistics = masked_statistics(vjp, x, mask, impl=implementation)
    (dmask,) = torch.autograd.grad(mask, vjp, given["mask_cotangent"], retain_graph=True)
    cotangents = [given[name] for name in INPUTS[3:]]
    # Through the mask as well.
    dvjp, dx = torch.autograd.grad(tuple(statistics), (vjp, x), cotangents)
    return dict(zip(OUTPUTS, (mask, *statistics, dmask, dvjp, dx), strict=True))


def main() -> None:
    given = inputs()
    arrays = {}
    for case, options in CASES.items():
        for name, value in {**given, **results(options, given, None)}.items():
            arrays[f"{case}/{name}"] = value.detach().numpy()
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
