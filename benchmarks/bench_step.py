"""A whole training step (forward, loss, backward) of every engine, against cross-entropy and the published loss.

Prints and saves time and peak memory as ratios to the plain cross-entropy step of the same network in the same run,
and the relative error of the parameter gradients against float64 double backward.

    python benchmarks/bench_step.py                           # six networks, [8,3,224,224], writes results/cpu
    python benchmarks/bench_step.py --networks resnet18 --compiled
    python benchmarks/bench_step.py --device cuda             # ResNet-18 and -50, [128,3,224,224]
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import measure  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from sib_ext import SIBStep, SpatialIBLoss  # noqa: E402
from sib_ext.layers import last_feature_map  # noqa: E402
from sib_ext.ops import dispatch  # noqa: E402

CLASSES = 100
SMALL = 64  # px, and two images: where gradients are compared in float64
ROUNDS = 5


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels)


class Checkpointed(nn.Module):
    """A block that is recomputed in every backward pass."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def checkpointed(model: nn.Module) -> nn.Module:
    """A ResNet with a checkpoint around every residual block."""
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for name, block in list(stage.named_children()):
            setattr(stage, name, Checkpointed(block))
    return model


def network(name: str, size: int) -> nn.Module:
    from torchvision import models

    torch.manual_seed(0)
    if name == "resnet18_groupnorm":
        return models.resnet18(num_classes=CLASSES, norm_layer=group_norm)
    if name == "resnet50_checkpointed":
        return checkpointed(models.resnet50(num_classes=CLASSES))
    if name == "vit_b_32":
        return models.vit_b_32(num_classes=CLASSES, image_size=size)
    return models.get_model(name, num_classes=CLASSES)


BATCH = {"cpu": 8, "cuda": 128}
NETWORKS = ("resnet18", "resnet50", "densenet121", "vit_b_32", "resnet18_groupnorm", "resnet50_checkpointed")
ON_A_GPU = ("resnet50", "resnet18")


#: Which terms an engine's step has, of the input and of the last feature map; where not both.
TERMS = {"loss alone": (True, False), "compiled": (True, False), "features": (False, True)}
#: Every term in every step, so that steps can be compared.
EXACT = {"every": 1, "jitter": 0.0}


def balanced(**options) -> SpatialIBLoss:
    """The balanced preset, without its draws: gradients are compared."""
    return SpatialIBLoss(seed="target_logit", **options)


def steps(model: nn.Module, name: str, compiled: bool) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Engine -> (x, y) -> loss."""
    cross_entropy, criterion = nn.CrossEntropyLoss(), balanced()
    published = SpatialIBLoss("paper", impl="reference")

    def in_pytorch_alone(criterion):
        def step(x, y):
            x = x.detach().requires_grad_()
            with sdpa_kernel(SDPBackend.MATH):
                return criterion(model(x), y, x)

        return step

    found = {
        "plain": lambda x, y: cross_entropy(model(x), y),
        "published": in_pytorch_alone(published),
        "loss alone": in_pytorch_alone(criterion),
        "double_backward": SIBStep(model, criterion, engine="double_backward", **EXACT),
        "default": SIBStep(model, criterion, engine="double_backward"),
        "features": SIBStep(model, balanced(input_background=0), engine="double_backward"),
        "microbatch": None,
    }
    if compiled:
        plain = torch.compile(model)
        found["plain, compiled"] = lambda x, y: cross_entropy(plain(x), y)
        found["compiled"] = SIBStep(model, criterion, layers=(), engine="compiled", **EXACT)
    return found


def baseline(engine: str) -> str:
    """What an engine's ratios are to."""
    return "plain, compiled" if engine == "compiled" else "plain"


def batch(arguments, size: int | None = None, count: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size, count = size or arguments.size, count or arguments.batch
    x = torch.randn(count, 3, size, size, generator=generator)
    return x.to(arguments.device), torch.arange(count, device=arguments.device) % CLASSES


def prepared(arguments, name: str) -> tuple[dict, nn.Module]:
    torch.set_num_threads(arguments.threads)
    model = network(name, arguments.size).to(arguments.device)
    found = steps(model, name, arguments.compiled)
    part = max(2, arguments.batch // 4)
    found["microbatch"] = SIBStep(model, balanced(), microbatch=part, **EXACT)
    wanted = arguments.engines.split(";") if arguments.engines else list(found)
    return {engine: step for engine, step in found.items() if engine in wanted}, model


def run(model: nn.Module, step: Callable, x: Tensor, y: Tensor, precision: torch.dtype | None) -> None:
    model.zero_grad(set_to_none=True)
    autocast = torch.autocast(x.device.type, precision) if precision else contextlib.nullcontext()
    with autocast:
        loss = step(x, y)
    loss.backward()


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def kept_apart(failed: dict[str, str], what: str):
    """An engine that fails (it needs too much memory, say) leaves the others' figures; ``failed`` tells why."""
    try:
        yield
    except Exception as error:
        print(f"FAILED: {what}: {error}", file=sys.stderr, flush=True)
        failed[what] = str(error)


def seconds(arguments, engines: dict, model: nn.Module, failed: dict[str, str]) -> dict[str, dict]:
    """Every engine in turn, round by round, so that what else the machine does falls on all alike."""
    x, y = batch(arguments)
    samples: dict[str, list[float]] = {engine: [] for engine in engines}
    for number in range(arguments.rounds + 1):
        for engine, step in engines.items():
            if engine in failed:
                continue
            with kept_apart(failed, engine):
                repeats = step.every if engine == "default" else 1
                synchronise(arguments.device)
                start = time.perf_counter()
                for _ in range(repeats):
                    run(model, step, x, y, arguments.precision)
                synchronise(arguments.device)
                if number:  # the first round warms up
                    samples[engine].append((time.perf_counter() - start) / repeats)
    return {
        engine: {"median_s": statistics.median(s), "least_s": min(s), "most_s": max(s)}
        for engine, s in samples.items()
        if s
    }


def peak(arguments, engine: str, name: str) -> int:
    """Bytes over those of the idle model, without gradients; on a CPU in a process of its own, one engine only."""
    engines, model = prepared(arguments, name)
    x, y = batch(arguments)
    step = engines[engine]
    # Kernels choose their workspaces.
    run(model, step, *(t[:2] for t in (x, y)), arguments.precision)
    if engine == "default":
        step.steps = 0
    model.zero_grad(set_to_none=True)
    return measure.peak_extra_bytes(lambda: run(model, step, x, y, arguments.precision), arguments.device)


def peaks(arguments, engines: dict, name: str, failed: dict[str, str]) -> dict[str, int]:
    found = {}
    for engine in engines:
        with kept_apart(failed, f"{engine}, memory"):
            if arguments.device == "cuda":
                own = copy.copy(arguments)
                own.engines = engine
                found[engine] = peak(own, engine, name)
            else:
                child = [*sys.argv[1:], "--peak", engine, "--networks", name]
                found[engine] = measure.in_fresh_process(__file__, *child)["bytes"]
    return found


@contextlib.contextmanager
def plain_float32():
    """Convolutions in float32, not TF32, which a GPU takes for them by default."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@plain_float32()
def gradient_errors(arguments, name: str) -> dict[str, float]:
    """Relative L2 error of each engine's parameter gradients in float32 against double backward in float64."""
    small = copy.copy(arguments)
    small.size = arguments.size if name == "vit_b_32" else SMALL
    engines, model = prepared(small, name)
    x, y = batch(small, count=4)
    state = copy.deepcopy(model.state_dict())

    def gradients(model, step, x):
        model.load_state_dict(state)
        run(model, step, x, y, None)
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    double = copy.deepcopy(model).double()

    def exactly(of_input: bool, of_features: bool) -> Callable:
        criterion = balanced(impl="reference", **({} if of_input else {"input_background": 0}))

        def step(x, y):
            x, kept = x.requires_grad_(), {}
            layer = double.get_submodule(last_feature_map(double, x.detach()))
            handle = layer.register_forward_hook(lambda module, inputs, output: kept.update(last=output))
            with sdpa_kernel(SDPBackend.MATH):
                logits = double(x)
                handle.remove()
                return criterion(logits, y, x, features=kept if of_features else None)

        return step

    truths = {terms: gradients(double, exactly(*terms), x.double()) for terms in {(True, True), *TERMS.values()}}
    found = {}
    for engine in ("loss alone", "double_backward", "features", "microbatch", "compiled"):
        if engine not in engines:
            continue
        step = engines[engine]
        if engine == "microbatch":  # BatchNorm sees the parts: only one part is comparable
            step = SIBStep(model, balanced(), microbatch=len(x), **EXACT)
        truth = truths[TERMS.get(engine, (True, True))]
        found[engine] = float((gradients(model, step, x) - truth).norm() / truth.norm())
    return found


def measured(arguments, name: str, failed: dict[str, str]) -> Iterator[dict]:
    """Times, memory and errors of one network: the rows, after each thing that is measured."""
    engines, model = prepared(arguments, name)
    rows = seconds(arguments, engines, model, failed)
    for engine, row in rows.items():
        if of := rows.get(baseline(engine)):
            row["time_ratio"] = row["median_s"] / of["median_s"]
    yield rows
    del model
    memory = peaks(arguments, {engine: engines[engine] for engine in rows}, name, failed)
    for engine, row in rows.items():
        row["peak_bytes"] = memory.get(engine)
        if engine in memory and baseline(engine) in memory:
            row["memory_ratio"] = memory[engine] / memory[baseline(engine)]
    yield rows
    errors = {}
    with kept_apart(failed, "gradient errors"):
        errors = gradient_errors(arguments, name)
    for engine, row in rows.items():
        row["gradient_error"] = errors.get(engine)
    yield rows


def table(results: dict) -> str:
    lines = [
        "| network | engine | seconds (least-most) | x plain | peak MB | x plain | gradient error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in results["networks"].items():
        for engine, r in rows.items():
            error = "" if r["gradient_error"] is None else f"{r['gradient_error']:.1e}"
            megabytes = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.0f}"
            lines.append(
                f"| {name} | {engine} | {r['median_s']:.3f} ({r['least_s']:.3f}-{r['most_s']:.3f}) | "
                f"{r.get('time_ratio', float('nan')):.2f} | {megabytes} | "
                f"{r.get('memory_ratio', float('nan')):.2f} | {error} |"
            )
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Ratios to the plain step, time above and memory below."""
    from matplotlib.figure import Figure

    engines = [e for e in next(iter(results["networks"].values())) if not e.startswith("plain")]
    engines += [e for rows in results["networks"].values() for e in rows if e not in engines and e != "plain"]
    engines = [e for e in dict.fromkeys(engines) if not e.startswith("plain")]
    figure = Figure(figsize=(1.6 + 1.5 * len(results["networks"]), 6), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(2, 1, sharex=True), (("time_ratio", "time"), ("memory_ratio", "peak memory")), strict=True
    ):
        for place, engine in enumerate(engines):
            found = [
                (i, r[engine][key]) for i, r in enumerate(results["networks"].values()) if key in r.get(engine, {})
            ]
            offset = (place - (len(engines) - 1) / 2) * 0.8 / len(engines)
            axes.bar([i + offset for i, _ in found], [v for _, v in found], 0.8 / len(engines), label=engine)
        axes.axhline(2, color="black", linewidth=0.6, linestyle=":")
        axes.set_ylabel(f"{label}, x plain step")
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks(range(len(results["networks"])), results["networks"], rotation=15)
    figure.axes[0].legend(ncols=3, frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", help=f"of {', '.join(NETWORKS)} (default: all; on a GPU {', '.join(ON_A_GPU)})")
    parser.add_argument("--engines", default="", help="separated by semicolons; all by default")
    parser.add_argument("--batch", type=int, help="images (default: 8; on a GPU 128)")
    parser.add_argument("--size", type=int, default=224, help="side of the images, px")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", type=lambda v: getattr(torch, v), help="autocast: bfloat16 or float16")
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile (minutes of compiling)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measured steps of each engine")
    parser.add_argument("--name", default="bench_step", help="of the result files")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder; results go to OUT/<device>/")
    parser.add_argument("--tiny", action="store_true", help="a small size, to see that it runs")
    parser.add_argument("--no-plot", action="store_true", help="write only the numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the plot of a result; measure nothing")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plot:
        plot(json.loads(arguments.plot.read_text()), arguments.plot.with_suffix(".png"))
        return
    if arguments.tiny:
        arguments.size, arguments.batch, arguments.rounds = SMALL, 2, 1
        arguments.networks = arguments.networks or "resnet18"
    arguments.batch = arguments.batch or BATCH[arguments.device]
    arguments.networks = arguments.networks or ",".join(NETWORKS if arguments.device == "cpu" else ON_A_GPU)
    if arguments.peak:
        arguments.engines = arguments.peak
        print(json.dumps({"bytes": peak(arguments, arguments.peak, arguments.networks)}))
        return
    results = {
        "machine": measure.machine(),
        "batch": [arguments.batch, 3, arguments.size, arguments.size],
        "precision": str(arguments.precision or torch.float32),
        "implementation of the ops": dispatch.resolve(None, arguments.device),
        "networks": {},
        "failed": {},
    }
    for name in arguments.networks.split(","):
        print(name, file=sys.stderr, flush=True)
        failed: dict[str, str] = {}
        for rows in measured(arguments, name, failed):
            results["networks"][name] = rows
            results["failed"] |= {f"{name}, {what}": why for what, why in failed.items()}
            path = measure.save(arguments.name, arguments.device, results, arguments.out)
    if not arguments.no_plot and importlib.util.find_spec("matplotlib"):
        plot(results, path.with_suffix(".png"))
    print(table(results))
    print(f"saved {path}")
    if results["failed"]:
        raise SystemExit(f"failed: {'; '.join(results['failed'])}")


if __name__ == "__main__":
    main()
