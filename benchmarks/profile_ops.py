"""Nsight Compute's view of one forward and backward of the native ops at the headline size: one line a kernel.

python benchmarks/profile_ops.py [NCU]      # needs ncu and a GPU whose counters it may read
"""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
}
# Leaves the clocks alone, and takes only what lies between the profiler's start and stop.
OPTIONS = ("--csv", "--clock-control", "none", "--profile-from-start", "off", "--metrics", ",".join(METRICS))
TO_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3}


def kernels(text: str) -> list[tuple[str, dict[str, float]]]:
    """(kernel, metric -> value) in the order of launches, of what ncu --csv prints."""
    table = text[text.index('"ID"') :]
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        metric = row.get("Metric Name")
        if metric in METRICS:
            value = float(row["Metric Value"].replace(",", "")) * TO_MICROSECONDS.get(row["Metric Unit"], 1)
            found.setdefault(row["ID"], (short(row["Kernel Name"]), {}))[1][metric] = value
    return list(found.values())


def short(kernel: str) -> str:
    """A kernel's name without namespaces and arguments."""
    whole = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\b\w+::", "", whole.partition("(")[0])[:60]


def main() -> None:
    script = str(Path(__file__).with_name("bench_ops.py"))
    program = sys.argv[1] if len(sys.argv) > 1 else "ncu"
    command = [program, *OPTIONS, sys.executable, script, "--device", "cuda", "--implementations", "native", "--once"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or '"ID"' not in done.stdout:
        raise SystemExit(f"ncu gave no figures (exit status {done.returncode}): {done.stdout[-1500:]}")
    print(f"{'kernel':60}" + "".join(f"{label:>13}" for label in METRICS.values()))
    for name, metrics in kernels(done.stdout):
        print(f"{name:60}" + "".join(f"{metrics.get(metric, float('nan')):13.1f}" for metric in METRICS))


if __name__ == "__main__":
    main()
