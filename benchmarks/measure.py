"""Timing, peak memory and the description of the machine, for every benchmark."""

import json
import os
import platform
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
    }


def time_calls(call: Callable[[], object], seconds: float = 1.5, least: int = 5) -> dict[str, float]:
    """Milliseconds a call: median, p20 and p80 over at least ``least`` calls and about ``seconds``, after warm-up."""
    call()
    call()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - start))
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median_ms": statistics.median(samples), "p20_ms": p20, "p80_ms": p80, "calls": len(samples)}


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """How far the process's resident memory rises over its start while ``call`` runs (Linux)."""
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


def save(name: str, device: str, results: dict) -> Path:
    folder = RESULTS / device
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path
