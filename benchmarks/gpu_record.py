"""The record of benchmarks/run_gpu.sh: OUT/summary.json, kept up to date after every stage, and printed in one line.

python benchmarks/gpu_record.py OUT machine DEVICE
python benchmarks/gpu_record.py OUT stage NAME OUTCOME SECONDS [DETAIL]   # OUTCOME: passed, failed or skipped
python benchmarks/gpu_record.py OUT print
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

STEP_GOALS = {
    "resnet50: exact step, x plain": 2.2,
    "resnet50: default step, x plain": 1.25,
    "resnet50: features alone step, x plain": 1.03,
}
OF_STEP = {
    "double_backward": "exact",
    "default": "default",
    "features": "features alone",
    "published": "published",
    "compiled": "compiled exact",
}


def first_match(command: list[str], part: str = "") -> str | None:
    """The first line of what a command prints that contains ``part``; None where it is missing or fails."""
    program = shutil.which(command[0])
    if program is None:
        return None
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20)
    return next((line.strip() for line in done.stdout.splitlines() if done.returncode == 0 and part in line), None)


def machine(device: str) -> dict:
    import measure  # takes torch, which the other commands do without

    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"
    nvcc = str(toolkit) if toolkit.is_file() else "nvcc"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"device": device, **measure.machine()} | {
        "driver": first_match(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "nvcc": first_match([nvcc, "--version"], "release"),
        "triton": triton,
    }


def figures(results: list[dict]) -> dict:
    """Figure -> value, with its goal beside it where it has one."""
    values, goals, share = {}, dict(STEP_GOALS), {}
    for result in results:
        values |= result.get("summary", {})
        goals |= result.get("goals", {})
        if "copy_gb_per_s" in result:
            values["copy, GB/s"] = result["copy_gb_per_s"]
        of = {"reference": ", reference ops"}.get(result.get("implementation of the ops"), "")
        for network, rows in result.get("networks", {}).items():
            for engine, row in rows.items():
                if engine in OF_STEP and "time_ratio" in row:
                    values[f"{network}{of}: {OF_STEP[engine]} step, x plain"] = row["time_ratio"]
                if engine in OF_STEP and "memory_ratio" in row:
                    share[f"{network}{of}: {OF_STEP[engine]} step's memory, x plain"] = row["memory_ratio"]
    found = {}
    for name, value in (values | share).items():
        found[name] = {"value": float(f"{value:.4g}")}
        if name in goals:
            at_least = "speed-up" in name
            met = value >= goals[name] if at_least else value <= goals[name]
            found[name] |= {"goal": f"{'>=' if at_least else '<='} {goals[name]:g}", "met": met}
    return found


def read_results(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("results/*/*.json"))}


def main() -> None:
    out, command, *rest = Path(sys.argv[1]), *sys.argv[2:]
    path = out / "summary.json"
    record = json.loads(path.read_text()) if path.is_file() else {"machine": {}, "stages": {}}
    if command == "machine":
        record["machine"] = machine(*rest)
    elif command == "stage":
        name, outcome, seconds, *detail = rest
        record["stages"][name] = {"outcome": outcome, "seconds": int(seconds)} | ({"why": detail[0]} if detail else {})
    results = read_results(out)
    record["figures"] = figures([result for name, result in results.items() if name != "bench_ops_plain"])
    if "bench_ops_plain" in results:  # the same without tensor cores
        plain = results["bench_ops_plain"].get("summary", {})
        record["figures"] |= {f"plain products: {k}": {"value": float(f"{v:.4g}")} for k, v in plain.items()}
    record["failed measurements"] = [f"{name}: {what}" for name, r in results.items() for what in r.get("failed", {})]
    record["ok"] = all(stage["outcome"] != "failed" for stage in record["stages"].values())
    path.write_text(json.dumps(record, indent=1) + "\n")
    if command == "print":
        print(json.dumps(record))


if __name__ == "__main__":
    main()
