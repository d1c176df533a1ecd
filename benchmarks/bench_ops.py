"""Both ops, forward and backward, against the literal reference (full sorts), eager and under torch.compile.

    python benchmarks/bench_ops.py            # about four minutes; writes benchmarks/results/cpu/
    python benchmarks/bench_ops.py --quick    # the headline size only; writes nothing

Every implementation gets the same inputs and the same cotangents, and its gradient is compared before it is timed.
GB/s counts the bytes that each op declares (sib_ext/ops: traffic), whatever the implementation really moves.
"""

import argparse
import json
import sys

import torch
from measure import in_fresh_process, machine, peak_extra_bytes, save, time_calls
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sib_ext import reference
from sib_ext.ops import auto_window, density_mask, masked_statistics

HEADLINE = (8, 3, 224, 224)
BATCHES = [(b, 3, 224, 224) for b in (1, 2, 4, 8, 16, 32, 64)]
SIZES = [(8, 3, s, s) for s in (64, 128, 224, 320, 384, 512)]
IMPLEMENTATIONS = ("native", "reference", "reference compiled")
GOALS = {"speed-up over the literal reference, eager": 10.0, "peak memory, share of the reference's": 0.25}


def traffic(vjp: torch.Tensor) -> int:
    modules = (sys.modules[f.__module__] for f in (density_mask, masked_statistics))
    return sum(sum(module.traffic(vjp)) for module in modules)


def tail(impl: str):
    """(vjp, x, cotangents) -> dL/dR: forward and backward of both ops."""

    def forward(vjp, x):
        if impl == "native":
            mask = density_mask(vjp, impl="native")
            return tuple(masked_statistics(vjp, x, mask, impl="native"))
        window = auto_window(*vjp.shape[2:])
        mask = reference.density_mask(vjp, window, 0.1, 10.0, 1e-8, "zeros", 0.2)
        return reference.masked_statistics(vjp, x, mask)

    forward = torch.compile(forward, fullgraph=True) if impl.endswith("compiled") else forward

    def run(vjp, x, cotangents):
        return torch.autograd.grad(forward(vjp, x), vjp, cotangents)[0]

    return run


def sample(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    vjp = (1e-2 * torch.randn(shape, generator=generator)).requires_grad_()
    x = torch.randn(shape, generator=generator)
    batch = shape[0]
    sizes = ((batch, 7), (batch, batch), (batch, batch))
    return vjp, x, tuple(torch.randn(size, generator=generator) for size in sizes)


def check(gradient: torch.Tensor, expected: torch.Tensor, impl: str) -> float:
    """Relative L2 difference over the pixels that no soft quantile rests on (see tests: rounding may swap ranks)."""
    difference = (gradient - expected).flatten(2).norm(dim=1)
    kept = difference <= difference.quantile(0.999, dim=1, keepdim=True)
    error = float((difference * kept).norm() / expected.norm())
    if not error < 1e-4:
        raise RuntimeError(f"{impl} differs from the reference by {error:.1e}: nothing is timed")
    return error


def measure(impl: str, shape: tuple[int, ...], expected: torch.Tensor | None, seconds: float) -> dict:
    vjp, x, cotangents = sample(shape)
    run = tail(impl)
    error = None if expected is None else check(run(vjp, x, cotangents), expected, impl)
    times = time_calls(lambda: run(vjp, x, cotangents), seconds)
    return {
        "impl": impl,
        "shape": list(shape),
        **times,
        "gb_per_s": traffic(vjp) / times["median_ms"] / 1e6,
        "ns_per_pixel": 1e6 * times["median_ms"] / (shape[0] * shape[2] * shape[3]),
        "gradient_difference": error,
    }


def measure_memory(impl: str, shape: tuple[int, ...]) -> int:
    """Peak extra bytes of one forward and backward, after a warm-up that loads and compiles what is needed."""
    run = tail(impl)
    # Compiled code is warmed at the full size (it would recompile); eager code at a tiny one.
    run(*sample(shape if impl.endswith("compiled") else (2, 3, 16, 16)))
    inputs = sample(shape)
    return peak_extra_bytes(lambda: run(*inputs))


def slope(rows: list[dict], size) -> float:
    """The exponent p of time ~ size^p, least squares in logarithms: 1 is linear growth."""
    logs = torch.tensor([[size(r["shape"]), r["median_ms"]] for r in rows], dtype=torch.float64).log()
    x, y = (logs - logs.mean(0)).unbind(1)
    return float((x * y).sum() / x.square().sum())


def headline(seconds: float) -> list[dict]:
    expected = tail("reference")(*sample(HEADLINE))
    rows = []
    for impl in track(IMPLEMENTATIONS, "headline size"):
        row = measure(impl, HEADLINE, expected, seconds)
        arguments = ("--memory", impl, "--threads", str(torch.get_num_threads()))
        rows.append(row | in_fresh_process(__file__, *arguments))
    return rows


def growth(impl: str, shapes: list[tuple[int, ...]], seconds: float) -> list[dict]:
    return [measure(impl, shape, None, seconds) for shape in track(shapes, f"growth, {impl}")]


def summarise(results: dict) -> dict:
    rows = {row["impl"]: row for row in results["headline"]}
    native, literal, compiled = (rows[impl] for impl in IMPLEMENTATIONS)
    summary = {
        "speed-up over the literal reference, eager": literal["median_ms"] / native["median_ms"],
        "speed-up over the literal reference, compiled": compiled["median_ms"] / native["median_ms"],
        "peak memory, share of the reference's": native["peak_extra_bytes"] / literal["peak_extra_bytes"],
    }
    if "batches" in results:
        native_rows = [[r for r in results[key] if r["impl"] == "native"] for key in ("batches", "sizes")]
        summary["growth exponent in B"] = slope(native_rows[0], lambda shape: shape[0])
        summary["growth exponent in H*W"] = slope(native_rows[1], lambda shape: shape[2] * shape[3])
    return summary


def show(results: dict) -> None:
    console = Console()
    table = Table(title=f"forward + backward of both ops, {results['headline'][0]['shape']} float32")
    for column in ("implementation", "median ms", "p20", "p80", "GB/s", "peak extra MB"):
        table.add_column(column, justify="left" if column == "implementation" else "right")
    for r in results["headline"]:
        cells = (r["median_ms"], r["p20_ms"], r["p80_ms"], r["gb_per_s"], r["peak_extra_bytes"] / 1e6)
        table.add_row(r["impl"], *(f"{cell:.3g}" for cell in cells))
    console.print(table)
    for key, value in results["summary"].items():
        goal = f"   (goal {GOALS[key]:g})" if key in GOALS else ""
        console.print(f"{key}: {value:.3g}{goal}")


def plot(results: dict, path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (
        ("batches", "batch size at 224 x 224", lambda s: s[0]),
        ("sizes", "pixels at B = 8", lambda s: s[2] * s[3]),
    )
    for axis, (key, label, size) in zip(axes, panels, strict=True):
        for impl in ("native", "reference"):
            rows = [r for r in results[key] if r["impl"] == impl]
            middle = [r["median_ms"] for r in rows]
            spread = [[r["median_ms"] - r["p20_ms"] for r in rows], [r["p80_ms"] - r["median_ms"] for r in rows]]
            axis.errorbar([size(r["shape"]) for r in rows], middle, spread, marker="o", capsize=3, label=impl)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="ms, forward + backward (median, p20-p80)")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.suptitle(f"density_mask + masked_statistics, float32, {results['machine']['threads']} threads")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each measurement")
    parser.add_argument("--quick", action="store_true", help="the headline size only; writes nothing")
    parser.add_argument("--memory", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps({"peak_extra_bytes": measure_memory(options.memory, HEADLINE)}))
        return

    results = {"machine": machine(), "goals": GOALS, "headline": headline(options.seconds)}
    if not options.quick:
        half = options.seconds / 2
        results["batches"] = growth("native", BATCHES, half) + growth("reference", BATCHES[:5], half)
        results["sizes"] = growth("native", SIZES, half) + growth("reference", SIZES, half)
    results["summary"] = summarise(results)
    show(results)
    if not options.quick:
        path = save("bench_ops", "cpu", results)
        plot(results, path.with_suffix(".png"))
        print(f"written: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
