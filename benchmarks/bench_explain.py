"""Wall time of the six explanation methods and of every measure; by default 500 images of 64 px and the small CNN.

Prints each part and writes results/<device>/bench_explain.json. The processor time beside the wall time shows whether
the machine was shared: on an idle one it is about the wall time times the threads.

    python benchmarks/bench_explain.py [--images 500] [--size 64] [--threads 2] [--device cpu] [--no-save]
"""

import argparse
import time
from collections.abc import Callable

import torch
from measure import machine, save
from sib_lab.explaining.measures import measure_maps, measure_perturbation
from sib_lab.explaining.methods import SIX, explain
from sib_lab.networks.own import SmallCNN

GOAL_SECONDS = 120  #: for the defaults, on two cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--size", type=int, default=64, help="px")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model, x, masks = scene(options.images, options.size)
    model, x, masks = model.to(options.device), x.to(options.device), masks.to(options.device)
    explain(model, x[:8])  # warm-up

    parts: dict[str, dict[str, float]] = {}
    maps = {}
    for method in SIX:
        maps |= timed(parts, method, options.device, lambda method=method: explain(model, x, methods=[method]))
    timed(parts, "measures of maps", options.device, lambda: [measure_maps(values, masks) for values in maps.values()])
    timed(parts, "deletion and insertion", options.device, lambda: measure_perturbation(model, x, maps))
    total = {key: sum(part[key] for part in parts.values()) for key in ("wall_s", "processor_s")}

    for name, part in (parts | {"total": total}).items():
        print(f"{name:<24}{part['wall_s']:8.1f} s wall {part['processor_s']:8.1f} s processor")
    results = {
        "machine": machine(),
        "images": options.images,
        "size": options.size,
        "network": "small_cnn",
        "goal_s": GOAL_SECONDS,
        "parts": parts,
        "total": total,
    }
    if not options.no_save:
        print(save("bench_explain", torch.device(options.device).type, results))


def scene(images: int, size: int) -> tuple[SmallCNN, torch.Tensor, torch.Tensor]:
    """A network, images and masks of discs; the times do not depend on what they show."""
    torch.manual_seed(0)
    at = torch.linspace(-1, 1, size)
    disc = (at[:, None] ** 2 + at**2 < 0.25).float()
    return SmallCNN().eval(), torch.rand(images, 3, size, size) * 2 - 1, disc.expand(images, 1, size, size)


def timed(parts: dict, name: str, device: str, call: Callable[[], object]) -> object:
    """``call()``, with its wall and processor seconds kept in ``parts``."""
    wall, processor = time.perf_counter(), time.process_time()
    result = call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    parts[name] = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
    return result


if __name__ == "__main__":
    main()
