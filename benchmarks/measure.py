"""Timing, peak memory and the description of the machine, for every benchmark."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import sib_ext

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """What the numbers were measured on and with."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = (line.partition(":") for line in info.read_text().splitlines())
        cpu = next((value.strip() for name, _, value in fields if name.strip() == "model name"), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sib_ext": sib_ext.__version__,
        "date": time.strftime("%Y-%m-%d"),
    } | _gpu()


def _gpu() -> dict:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    gpu = {"gpu": properties.name, "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
    return gpu | {"gpu_memory": properties.total_memory, "l2_bytes": properties.L2_cache_size}


def folder_name(device: str) -> str:
    """Where results of a device go: "cpu", or the GPU's name as a file name."""
    return "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower())


def _summary(samples: list[float]) -> dict[str, float]:
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median_ms": statistics.median(samples), "p20_ms": p20, "p80_ms": p80, "calls": len(samples)}


def time_calls(call: Callable[[], object], seconds: float = 1.5, least: int = 5, device: str = "cpu") -> dict:
    """Milliseconds a call: median, p20 and p80 over at least ``least`` calls and about ``seconds``, after warm-up.

    On a GPU by events around each call: what the device needs, and its waiting where the caller does not keep up.
    """
    for _ in range(2 if device == "cpu" else 5):
        call()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < end:
        if device == "cpu":
            start = time.perf_counter()
            call()
            samples.append(1e3 * (time.perf_counter() - start))
        else:
            samples += _time_on_gpu(call, least)
    return _summary(samples)


def _time_on_gpu(call: Callable[[], object], count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def time_graph(call: Callable[[], object], seconds: float = 0.5, replays: int = 20) -> dict[str, float]:
    """Milliseconds of the kernels of a call alone: replays of a CUDA graph of it, ``replays`` between two events."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay() -> None:
        for _ in range(replays):
            graph.replay()

    times = time_calls(replay, seconds, device="cuda")
    return {key: value if key == "calls" else value / replays for key, value in times.items()}


def copy_bandwidth(size: int = 1 << 30) -> float:
    """GB/s of a large copy on the GPU, bytes read plus bytes written."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = time_calls(lambda: target.copy_(source), 0.5, 10, "cuda")
    return 2 * size / times["median_ms"] / 1e6


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_extra_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """How far the memory in use rises over its start while ``call`` runs: the process's resident memory (Linux), or
    what tensors take on the GPU."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    call()
    return _memory("VmHWM") - before


def in_fresh_process(script: str, *arguments: str) -> dict:
    """Runs ``python script arguments...``, which prints JSON: memory numbers need a heap without a past."""
    # Fixed thresholds make malloc give large blocks back at once, so that they count while they live and only then.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, script, *arguments], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def save(name: str, device: str, results: dict, out: Path = RESULTS) -> Path:
    folder = out / folder_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path
