"""Both ops, forward and backward, against the literal reference (full sorts), eager and under torch.compile.

    python benchmarks/bench_ops.py                 # about four minutes; writes benchmarks/results/cpu/
    python benchmarks/bench_ops.py --device cuda   # about two minutes; writes benchmarks/results/<GPU>/
    python benchmarks/bench_ops.py --quick         # the headline size only; writes nothing
    python benchmarks/bench_ops.py --only batches,sizes --implementations native --name growth
    python benchmarks/bench_ops.py --plot FILE     # draws a result again, where it was measured without matplotlib

Every implementation gets the same inputs and the same cotangents, and its gradient is compared before it is timed.
Each is measured in a process of its own, so that a fault of one (a CUDA error outlasts its cause) leaves the others'
figures; they are saved and printed as they come.
The literal reference leaves out the two sums of magnitudes, which the published loss has no use for. The balanced
preset's term of the VJP, which needs only those, is measured by itself.
GB/s counts the bytes that each op declares (sib_ext/ops: traffic), whatever the implementation really moves.
"""

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measure import (
    RESULTS,
    copy_bandwidth,
    in_fresh_process,
    machine,
    peak_extra_bytes,
    save,
    time_calls,
    time_graph,
)

from sib_ext import reference
from sib_ext.functional import background_magnitude_ratio
from sib_ext.ops import auto_window, density_mask, dispatch, masked_statistics

Shape = tuple[int, int, int, int]
PUBLISHED_MOMENTS = 7  # of the moments, those before the sums of magnitudes
PARTS = ("headline", "balanced", "batches", "sizes")
ROW = "row: "  # begins a line in which a measuring process tells a result
BALANCED = "balanced preset's term"


@dataclass(frozen=True)
class Plan:
    """What is measured on a device."""

    headline: Shape
    batches: tuple[Shape, ...]
    sizes: tuple[Shape, ...]
    implementations: tuple[str, ...]
    growing: tuple[str, ...]  # of them, those whose growth is measured
    largest_reference: int  # elements of R up to which the reference's growth is
    least_batch: int  # from which on the growth in B is reported: smaller ones do not fill a GPU
    goals: dict[str, float]


PLANS = {
    "cpu": Plan(
        (8, 3, 224, 224),
        tuple((b, 3, 224, 224) for b in (1, 2, 4, 8, 16, 32, 64)),
        tuple((8, 3, s, s) for s in (64, 128, 224, 320, 384, 512)),
        ("native", "reference", "reference compiled"),
        ("native", "reference"),
        16 * 3 * 224 * 224,
        1,
        {"speed-up over the literal reference, eager": 10.0, "peak memory, share of the reference's": 0.25},
    ),
    "cuda": Plan(
        (128, 3, 224, 224),
        tuple((b, 3, 224, 224) for b in (1, 8, 32, 64, 128, 256, 512, 1024)),
        tuple((32, 3, s, s) for s in (64, 128, 224, 320, 384, 512)),
        ("native", "triton", "reference", "reference compiled"),
        ("native", "triton", "reference"),
        256 * 3 * 224 * 224,
        128,
        {
            "native, ms": 0.6,
            "triton, ms": 1.0,
            "speed-up over the literal reference, eager": 20.0,
            "speed-up over the literal reference, compiled": 5.0,
            "peak memory, share of the reference's": 0.25,
            f"{BALANCED}, x a copy of its bytes": 1.5,
        },
    ),
}


def tiny(plan: Plan) -> Plan:
    """The same at sizes that take no time, to see that everything runs."""

    def shrunk(shapes):
        return tuple((min(b, 4), c, min(h, 32), min(w, 32)) for b, c, h, w in shapes)

    batches = tuple((b, 3, 16, 16) for b in (1, 2, 3))
    sizes = tuple((2, 3, s, s) for s in (8, 16, 24))
    return replace(plan, headline=shrunk([plan.headline])[0], batches=batches, sizes=sizes, least_batch=1)


def traffic(vjp: torch.Tensor) -> int:
    modules = (sys.modules[f.__module__] for f in (density_mask, masked_statistics))
    return sum(sum(module.traffic(vjp)) for module in modules)


def balanced_traffic(vjp: torch.Tensor) -> int:
    """The least bytes of the balanced preset's term: R and M in, forward and again backward, and dL/dR out."""
    return 3 * vjp.nbytes + 2 * vjp[:, :1].numel() * vjp.itemsize


def tail(impl: str):
    """(vjp, x, cotangents) -> dL/dR: forward and backward of both ops."""

    def forward(vjp, x):
        if impl in ("native", "triton"):
            mask = density_mask(vjp, impl=impl)
            return tuple(masked_statistics(vjp, x, mask, impl=impl))
        window = auto_window(*vjp.shape[2:])
        mask = reference.density_mask(vjp, window, 0.1, 10.0, 1e-8, "zeros", 0.2)
        a, b, c = reference.masked_fields(vjp, x, mask)
        return reference.published_moments(a, b, c), a @ a.T, b @ b.T

    forward = torch.compile(forward, fullgraph=True) if impl.endswith("compiled") else forward

    def run(vjp, x, cotangents):
        outputs = forward(vjp, x)
        of_moments, *of_grams = cotangents
        return torch.autograd.grad(outputs, vjp, (of_moments[:, : outputs[0].shape[1]], *of_grams))[0]

    return run


def balanced_tail(impl: str):
    """(vjp, mask) -> dL/dR of the balanced preset's term of the VJP, for a given mask."""

    def forward(vjp, mask):
        if impl in ("native", "triton"):
            moments = masked_statistics(vjp, vjp.detach(), mask, False, False, impl=impl).moments
            return background_magnitude_ratio(moments, vjp[0].numel()).mean()
        magnitude = vjp.abs()
        return ((magnitude * (1 - mask)).sum((1, 2, 3)) / magnitude.sum((1, 2, 3))).mean()

    forward = torch.compile(forward, fullgraph=True) if impl.endswith("compiled") else forward
    return lambda vjp, mask: torch.autograd.grad(forward(vjp, mask), vjp)[0]


def sample(shape: Shape, device: str):
    generator = torch.Generator().manual_seed(0)
    vjp = (1e-2 * torch.randn(shape, generator=generator)).to(device).requires_grad_()
    x = torch.randn(shape, generator=generator).to(device)
    batch = shape[0]
    sizes = ((batch, len(reference.MOMENTS)), (batch, batch), (batch, batch))
    cotangents = tuple(torch.randn(size, generator=generator).to(device) for size in sizes)
    cotangents[0][:, PUBLISHED_MOMENTS:] = 0
    return vjp, x, cotangents


def check(gradient: torch.Tensor, expected: torch.Tensor, impl: str) -> float:
    """Of the worst sample: the median over its pixels of the difference, relative to that of the gradient.

    Rounding may swap ranks of nearly equal values, and the whole gradient of a quantile then rests on other pixels;
    that of d's is spread over a window around each. Those are less than half of all (the tests leave them out one by
    one), but have nearly all of the squares: in them eager float32 differs from float64 by half at a batch of 24.
    """
    of_difference, of_expected = (t.flatten(2).norm(dim=1).median(1).values for t in (gradient - expected, expected))
    error = float((of_difference / of_expected).max())
    if not error < 1e-4:
        raise RuntimeError(f"{impl} differs from the reference by {error:.1e}: nothing is timed")
    return error


def timed(call, impl: str, seconds: float, device: str) -> dict[str, float]:
    """Milliseconds of eager calls; on a GPU also of the kernels alone, of what a graph can capture."""
    times = time_calls(call, seconds, device=device)
    if device != "cpu" and not impl.startswith("reference"):
        try:
            times["graph_ms"] = time_graph(call, seconds / 2)["median_ms"]
        except RuntimeError as error:  # the eager time stands all the same
            print(f"{impl} is not captured in a graph: {error}", flush=True)
    return times


def fastest(row: dict) -> float:
    return row.get("graph_ms", row["median_ms"])


def measure(impl: str, shape: Shape, expected: torch.Tensor | None, seconds: float, device: str) -> dict:
    vjp, x, cotangents = sample(shape, device)
    run = tail(impl)
    error = None if expected is None else check(run(vjp, x, cotangents), expected, impl)
    times = timed(lambda: run(vjp, x, cotangents), impl, seconds, device)
    row = {"impl": impl, "shape": list(shape), **times}
    pixels = shape[0] * shape[2] * shape[3]
    derived = {"gb_per_s": traffic(vjp) / fastest(row) / 1e6, "ns_per_pixel": 1e6 * fastest(row) / pixels}
    return row | derived | {"gradient_difference": error}


def measure_memory(impl: str, shape: Shape, device: str) -> int:
    """Peak extra bytes of one forward and backward, after a warm-up that loads and compiles what is needed."""
    run = tail(impl)
    # Compiled code is warmed at the full size (it would recompile); eager code at a tiny one.
    run(*sample(shape if impl.endswith("compiled") else (2, 3, 16, 16), device))
    inputs = sample(shape, device)
    return peak_extra_bytes(lambda: run(*inputs), device)


def measure_parts(impl: str, shape: Shape, seconds: float, device: str) -> dict[str, float]:
    """Milliseconds of each op by itself, forward and backward, without autograd: where the time goes."""
    vjp, x, cotangents = sample(shape, device)
    vjp, window = vjp.detach(), auto_window(*shape[2:])
    options = (window, 0.1, 10.0, 1e-8, "zeros", 0.2)
    op = {name: dispatch.overload(name, impl) for name in ("density_mask", "masked_statistics")}
    back = {name: dispatch.overload(f"{name}_backward", impl) for name in op}
    mask, support = op["density_mask"](vjp, *options)
    grad_mask = torch.ones_like(mask)
    moments_only = (cotangents[0], None, None, vjp, vjp, mask, False, False)
    calls = {
        "density_mask": lambda: op["density_mask"](vjp, *options),
        "density_mask_backward": lambda: back["density_mask"](grad_mask, vjp, mask, support, *options),
        "masked_statistics, moments only": lambda: op["masked_statistics"](vjp, vjp, mask, False, False),
        "masked_statistics": lambda: op["masked_statistics"](vjp, x, mask, True, True),
        "masked_statistics_backward, moments only": lambda: back["masked_statistics"](*moments_only),
        "masked_statistics_backward": lambda: back["masked_statistics"](*cotangents, vjp, x, mask, False, True),
    }
    if device == "cpu":
        return {name: time_calls(call, seconds / 4)["median_ms"] for name, call in calls.items()}
    return {name: time_graph(call, seconds / 4)["median_ms"] for name, call in calls.items()}


def slope(rows: list[dict], size) -> float:
    """The exponent p of time ~ size^p, least squares in logarithms: 1 is linear growth.

    Of the kernels alone where all rows have that: eager calls at small sizes take as long as their launches do.
    """
    key = "graph_ms" if all("graph_ms" in row for row in rows) else "median_ms"
    logs = torch.tensor([[size(r["shape"]), r[key]] for r in rows], dtype=torch.float64).log()
    x, y = (logs - logs.mean(0)).unbind(1)
    return float((x * y).sum() / x.square().sum())


def available(implementations: list[str], device: str) -> list[str]:
    """Those that run here; why the others do not is printed."""
    problems = {"native": dispatch.native_problem(device), "triton": dispatch.triton_problem(device)}
    for impl in implementations:
        if problems.get(impl):
            print(f"not measured: {impl}, {problems[impl]}")
    return [impl for impl in implementations if not problems.get(impl)]


def headline(plan: Plan, impl: str, seconds: float, device: str) -> Iterator[dict]:
    """The row, after each thing that is measured."""
    expected = tail("reference")(*sample(plan.headline, device))
    row = measure(impl, plan.headline, expected, seconds, device)
    yield row
    if device == "cpu":
        shape = ",".join(map(str, plan.headline))
        arguments = ("--memory", impl, "--shape", shape, "--threads", str(torch.get_num_threads()))
        row |= in_fresh_process(__file__, *arguments)
    else:
        row["peak_extra_bytes"] = measure_memory(impl, plan.headline, device)
    yield row
    if not impl.startswith("reference"):
        row["parts_ms"] = measure_parts(impl, plan.headline, seconds, device)
        yield row


def balanced(plan: Plan, impl: str, seconds: float, device: str) -> dict:
    vjp = sample(plan.headline, device)[0]
    mask = torch.rand((vjp.shape[0], 1, *vjp.shape[2:]), generator=torch.Generator().manual_seed(1)).to(device)
    run = balanced_tail(impl)
    check(run(vjp, mask), balanced_tail("reference")(vjp, mask), impl)
    times = timed(lambda: run(vjp, mask), impl, seconds, device)
    return {
        "impl": impl,
        "shape": list(plan.headline),
        **times,
        "gb_per_s": balanced_traffic(vjp) / fastest(times) / 1e6,
    }


def growth(plan: Plan, impl: str, shapes: tuple[Shape, ...], seconds: float, device: str) -> Iterator[dict]:
    def elements(shape: Shape) -> int:
        return shape[0] * shape[1] * shape[2] * shape[3]

    for shape in shapes:
        if impl != "reference" or elements(shape) <= plan.largest_reference:
            yield measure(impl, shape, None, seconds, device)


def rows_of(part: str, plan: Plan, impl: str, seconds: float, device: str) -> Iterator[dict]:
    """What is measured of one implementation; a later row takes the place of an earlier one of the same shape."""
    if part == "headline":
        yield from headline(plan, impl, seconds, device)
    elif part == "balanced":
        yield balanced(plan, impl, seconds / 2, device)
    else:
        yield from growth(plan, impl, getattr(plan, part), seconds / 2, device)


def summarise(results: dict, least_batch: int) -> dict:
    """Ratios and exponents of whatever has been measured so far."""
    rows = {row["impl"]: row for row in results["headline"]}
    alone = {row["impl"]: row for row in results["balanced"]}
    copy = results.get("copy_gb_per_s")
    summary = {}
    for impl in ("native", "triton"):
        prefix = "" if impl == "native" else f"{impl}: "
        if impl in rows:
            mine, literal = rows[impl], rows.get("reference")
            summary[f"{impl}, ms"] = fastest(mine)
            for name, other in (("eager", literal), ("compiled", rows.get("reference compiled"))):
                if other:
                    speed_up = other["median_ms"] / mine["median_ms"]
                    summary[f"{prefix}speed-up over the literal reference, {name}"] = speed_up
            if literal and all("peak_extra_bytes" in row for row in (mine, literal)):
                share = mine["peak_extra_bytes"] / literal["peak_extra_bytes"]
                summary[f"{prefix}peak memory, share of the reference's"] = share
            if copy:
                summary[f"{prefix}share of the copy bandwidth"] = mine["gb_per_s"] / copy
        for key, name, size in (
            ("batches", "B", lambda shape: shape[0]),
            ("sizes", "H*W", lambda shape: shape[2] * shape[3]),
        ):
            grown = [r for r in results[key] if r["impl"] == impl]
            if key == "batches":
                grown = [r for r in grown if r["shape"][0] >= least_batch]
            if len(grown) > 1:
                summary[f"{prefix}growth exponent in {name}"] = slope(grown, size)
        if impl in alone:
            mine = alone[impl]
            summary[f"{prefix}{BALANCED}, ms"] = fastest(mine)
            for name in ("reference", "reference compiled"):
                if name in alone:
                    speed_up = alone[name]["median_ms"] / mine["median_ms"]
                    summary[f"{prefix}{BALANCED}: speed-up over the {name}"] = speed_up
            if copy:
                summary[f"{prefix}{BALANCED}, x a copy of its bytes"] = copy / mine["gb_per_s"]
    return summary


def in_own_process(part: str, impl: str, options: argparse.Namespace) -> Iterator[dict]:
    """The rows that another process measures, each as it comes; what else it says is passed on."""
    command = [sys.executable, __file__, "--measure", part, "--implementations", impl, "--device", options.device]
    command += ["--threads", str(options.threads), "--seconds", str(options.seconds), *["--tiny"] * options.tiny]
    last = "it said nothing"
    reading = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **reading) as process:
        timer = threading.Timer(options.limit, process.kill)
        timer.start()
        for line in process.stdout:
            if line.startswith(ROW):
                yield json.loads(line.removeprefix(ROW))
            elif line.strip():
                last = line.strip()
                print(line, end="", flush=True)
    late = not timer.is_alive()
    timer.cancel()
    if process.returncode:
        how = f"took longer than {options.limit:g} s" if late else f"ended with exit status {process.returncode}"
        raise RuntimeError(f"its process {how}; the last it said: {last}")


def run_all(plan: Plan, options: argparse.Namespace, keep) -> dict:
    """Measures everything; ``keep(results)`` after each row, so that a failure or a time limit loses only the rest."""
    results = {"machine": machine(), "goals": plan.goals, **{part: [] for part in PARTS}, "failed": {}, "summary": {}}
    if options.device == "cuda":
        results["copy_gb_per_s"] = copy_bandwidth()
        torch.cuda.empty_cache()  # the measuring processes need the room
    implementations = available(options.implementations, options.device)
    for part in options.only:
        for impl in implementations:
            if part in ("batches", "sizes") and impl not in plan.growing:
                continue
            print(f"measuring: {part}, {impl}", flush=True)
            rows = results[part]
            try:
                for row in in_own_process(part, impl, options):
                    others = [r for r in rows if (r["impl"], r["shape"]) != (impl, row["shape"])]
                    if len(others) == len(rows):
                        print(f"  {row['shape']}: {fastest(row):.4g} ms", flush=True)
                    rows[:] = [*others, row]
                    results["summary"] = summarise(results, plan.least_batch)
                    keep(results)
            except RuntimeError as error:
                print(f"FAILED: {part}, {impl}: {error}", flush=True)
                results["failed"][f"{part}, {impl}"] = str(error)
                keep(results)
    return results


def show(results: dict) -> None:
    if results["headline"]:
        print(f"\nforward + backward of both ops, {results['headline'][0]['shape']} float32")
        columns = (("median ms", 11), ("p20", 9), ("p80", 9), ("graph ms", 10), ("GB/s", 9), ("peak extra MB", 15))
        print(f"{'implementation':20}" + "".join(f"{name:>{width}}" for name, width in columns))
    for r in results["headline"]:
        peak = r.get("peak_extra_bytes")
        cells = (r["median_ms"], r["p20_ms"], r["p80_ms"], r.get("graph_ms"), r["gb_per_s"], peak and peak / 1e6)
        text = [f"{cell:.3g}" if cell is not None else "-" for cell in cells]
        print(f"{r['impl']:20}" + "".join(f"{t:>{w}}" for t, w in zip(text, (11, 9, 9, 10, 9, 15), strict=True)))
    for r in results["headline"]:
        for part, milliseconds in r.get("parts_ms", {}).items():
            print(f"  {r['impl']}: {part:42}{milliseconds:9.4f} ms")
    if "copy_gb_per_s" in results:
        print(f"copy bandwidth (read + written): {results['copy_gb_per_s']:.0f} GB/s")
    for key, value in results["summary"].items():
        goal = f"   (goal {results['goals'][key]:g})" if key in results["goals"] else ""
        print(f"{key}: {value:.3g}{goal}")


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    device = results["machine"].get("gpu") or f"{results['machine']['threads']} threads"
    copy = results.get("copy_gb_per_s")
    size = results["batches"][0]["shape"][2]
    batch = results["sizes"][0]["shape"][0]
    panels = (
        ("batches", f"batch size at {size} x {size}", lambda s: s[0]),
        ("sizes", f"pixels at B = {batch}", lambda s: s[2] * s[3]),
    )
    figure, axes = plt.subplots(
        2 if copy else 1, 2, figsize=(10, 8 if copy else 4), layout="constrained", squeeze=False
    )
    for column, (key, label, size_of) in enumerate(panels):
        for impl in dict.fromkeys(r["impl"] for r in results[key]):
            rows = [r for r in results[key] if r["impl"] == impl]
            x = [size_of(r["shape"]) for r in rows]
            middle = [r["median_ms"] for r in rows]
            spread = [[r["median_ms"] - r["p20_ms"] for r in rows], [r["p80_ms"] - r["median_ms"] for r in rows]]
            line = axes[0, column].errorbar(x, middle, spread, marker="o", capsize=3, label=impl)
            if "graph_ms" in rows[0]:
                style = {"marker": "o", "mfc": "none", "ls": "--", "color": line[0].get_color()}
                axes[0, column].plot(x, [r["graph_ms"] for r in rows], label=f"{impl}, kernels alone", **style)
            if copy:
                share = [100 * r["gb_per_s"] / copy for r in rows]
                axes[1, column].plot(x, share, marker="o", color=line[0].get_color(), label=impl)
        axes[0, column].set(xscale="log", yscale="log", xlabel=label)
        axes[0, column].set_ylabel("ms, forward + backward (median, p20-p80)")
        if copy:
            axes[1, column].set(
                xscale="log", ylim=(0, None), xlabel=label, ylabel="declared bytes: % of copy bandwidth"
            )
    for axis in axes.flat:
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.suptitle(f"density_mask + masked_statistics, float32, {device}")
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


def some_of(choices: tuple[str, ...]):
    """An argument's type: names of ``choices`` separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in choices]:
            raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))}: choose of {', '.join(choices)}")
        return names

    return parse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=PLANS, default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, help="time for each measurement (default: 3, on a GPU 0.5)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that a measuring process may take")
    parser.add_argument("--only", type=some_of(PARTS), default=list(PARTS), help=f"of {','.join(PARTS)}")
    known = PLANS["cuda"].implementations
    parser.add_argument("--implementations", type=some_of(known), help=f"of {','.join(known)}")
    parser.add_argument("--quick", action="store_true", help="the headline size only; writes nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--name", default="bench_ops", help="of the result files")
    parser.add_argument("--no-plot", action="store_true", help="write only the numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the plot of a result; measure nothing")
    parser.add_argument("--measure", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.implementations = options.implementations or PLANS[options.device].implementations
    options.seconds = options.seconds or (3.0 if options.device == "cpu" else 0.5)
    if options.quick:
        options.only = ["headline", "balanced"]
    return options


def once(plan: Plan, impl: str, device: str) -> None:
    """One forward and backward, between marks that a profiler knows: nothing before them is its business."""
    vjp, x, cotangents = sample(plan.headline, device)
    run = tail(impl)
    run(vjp, x, cotangents)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run(vjp, x, cotangents)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> None:
    options = arguments()
    if options.plot:
        plot(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
        return
    torch.set_num_threads(options.threads)
    if options.memory:
        shape = tuple(map(int, options.shape.split(",")))
        print(json.dumps({"peak_extra_bytes": measure_memory(options.memory, shape, "cpu")}))
        return
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: nothing is measured")
    plan = tiny(PLANS[device]) if options.tiny else PLANS[device]
    if options.once:
        once(plan, options.implementations[0], device)
        return
    if options.measure:
        for row in rows_of(options.measure, plan, options.implementations[0], options.seconds, device):
            print(ROW + json.dumps(row), flush=True)
        return

    def keep(results: dict) -> None:
        if not options.quick:
            save(options.name, device, results, options.out)

    results = run_all(plan, options, keep)
    show(results)
    if not options.quick and any(results[part] for part in PARTS):
        path = save(options.name, device, results, options.out)
        print(f"written: {path}")
        try:
            if results["batches"] and results["sizes"] and not options.no_plot:
                plot(results, path.with_suffix(".png"))
        except ImportError as error:
            print(f"no plot: {error}; draw it elsewhere: python benchmarks/bench_ops.py --plot {path.name}")
    if results["failed"]:
        raise SystemExit(f"failed: {', '.join(results['failed'])}")


if __name__ == "__main__":
    main()
