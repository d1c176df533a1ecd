"""benchmarks/run_gpu.sh and what it rests on, without a GPU: no fault where there is one may hide the rest."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .gpu import exercise

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/run_gpu.sh"
CALLS = re.findall(r'^#     STAGES="(.*)" benchmarks/run_gpu.sh', SCRIPT.read_text(), re.M)
BUDGETS = {name: int(s) for name, s in re.findall(r"^#     ([a-z]+) +(\d+)", SCRIPT.read_text(), re.M)}
# What stands in for Python: it keeps the record, and {exercise} and so on say what else happens.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
*" machine "*) ;;
*gpu_record.py*) exec {python} "$@" ;;
*exercise*) {exercise} ;;
*bench_step.py*) echo "$SIB_EXT_IMPL: $*"; {step} ;;
*) echo "ran: $*" ;;
esac
"""


@pytest.fixture
def bench_ops(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("bench_ops")


@pytest.fixture
def call(tmp_path):
    def run(stages=None, arguments=("out",), exercise=":", step=":", **environment):
        python = tmp_path / "python"
        python.write_text(STAND_IN.format(python=sys.executable, exercise=exercise, step=step))
        python.chmod(0o755)
        env = {k: v for k, v in os.environ.items() if k != "STAGES"} | {"DEVICE": "cpu", "PYTHON": str(python)}
        env |= environment | ({} if stages is None else {"STAGES": stages})
        paths = [str(tmp_path / name) for name in arguments]
        return subprocess.run([str(SCRIPT), *paths], env=env, capture_output=True, text=True, timeout=1800)

    return run


def record(done) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


def outcomes(done) -> dict[str, str]:
    return {name: stage["outcome"] for name, stage in record(done)["stages"].items()}


def test_the_calls_cover_every_stage_and_each_ends_in_nine_minutes():
    assert len(CALLS) == 3
    assert {name for call in CALLS for name in call.split()} == set(BUDGETS)
    assert all(20 + sum(BUDGETS[name] for name in call.split()) < 540 for call in CALLS)


def test_an_unknown_stage_is_refused_and_the_stages_are_named(call):
    done = call("small tiny")
    assert done.returncode == 2 and "'tiny'" in done.stderr and all(name in done.stderr for name in BUDGETS)


def test_without_a_folder_or_with_one_in_use_it_says_what_to_do(call, tmp_path):
    done = call(arguments=())
    assert done.returncode == 2 and all(text in done.stderr for text in (*CALLS, "DEVICE=cpu"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    done = call("small")
    assert done.returncode == 2 and "not empty" in done.stderr and (tmp_path / "out/precious").exists()


def test_stages_are_picked_in_the_order_given(call, tmp_path):
    done = call("plain small")
    assert done.returncode == 0 and list(outcomes(done)) == ["plain", "small"]
    assert record(done) == json.loads((tmp_path / "out/summary.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "summary.json"]


def test_without_stages_all_run(call):
    done = call()
    assert list(outcomes(done)) == list(BUDGETS) and len(done.stdout) < 12_000
    assert [name for name, outcome in outcomes(done).items() if outcome != "passed"] == ["build", "profile", "compiled"]


def test_with_a_gpu_the_tools_of_the_toolkit_watch(call, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"compute-sanitizer": "exit 9", "ncu": "exit 0"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    done = call("build memcheck racecheck profile compiled", DEVICE="cuda", PATH=path, CUDA_HOME=str(tmp_path))
    expected = {
        "build": "passed",
        "memcheck": "failed",
        "racecheck": "failed",
        "profile": "passed",
        "compiled": "passed",
    }
    assert outcomes(done) == expected
    log = (tmp_path / "out/log.txt").read_text()
    assert "setup.py build_ext --inplace" in log and f"profile_ops.py {tools}/ncu" in log
    assert f"{tools}/compute-sanitizer --tool racecheck --report-api-errors no --error-exitcode 9" in log


def test_a_tool_that_is_missing_is_told(call, tmp_path):
    for name in ("bash", "dirname", "sed", "grep", "mkdir", "ls", "timeout", "tee", "env", "cut", "head"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = call("memcheck profile", DEVICE="cuda", PATH=str(tmp_path), CUDA_HOME=str(tmp_path / "none"))
    assert outcomes(done) == {"memcheck": "skipped", "profile": "skipped"} and done.returncode == 0
    assert record(done)["stages"]["memcheck"]["why"] == "no compute-sanitizer"


def test_a_failing_stage_does_not_stop_the_rest_and_is_told(call):
    done = call("small native", exercise="echo 'WRONG: the Gram'; exit 3")
    assert done.returncode == 1
    assert outcomes(done) == {"small": "failed", "native": "passed"} and not record(done)["ok"]
    assert record(done)["stages"]["small"]["why"] == "exit status 3"
    assert "--- what failed\nWRONG: the Gram" in done.stdout


def test_where_time_runs_out_the_rest_is_told_as_failed(call):
    done = call("small native", exercise="sleep 60", TOTAL="4")
    assert done.returncode == 1 and outcomes(done) == {"small": "failed", "native": "failed"}
    assert {stage["why"] for stage in record(done)["stages"].values()} == {"out of time"}


def test_a_step_that_fails_with_the_kernels_is_measured_without_them(call, tmp_path):
    assert call("step", step="[[ $SIB_EXT_IMPL == reference ]]").returncode == 1
    log = (tmp_path / "out/log.txt").read_text()
    assert "\nnative: " in log and "\nreference: " in log


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(call, tmp_path):
    done = call(PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout
    found = record(done)
    assert list(found["stages"]) == list(BUDGETS) and found["machine"]["torch"] == torch.__version__
    for figure in (
        "native, ms",
        "speed-up over the literal reference, eager",
        "speed-up over the literal reference, compiled",
        "peak memory, share of the reference's",
        "growth exponent in B",
        "growth exponent in H*W",
        "plain products: native, ms",
        "resnet18: exact step, x plain",
        "resnet18: default step, x plain",
    ):
        assert found["figures"][figure]["value"] != 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(len(path.relative_to(tmp_path / "out").parts) <= 3 for path in files)
    assert len(done.stdout) < 12_000


# ------------------------------------------------------------------------------------------------ the record of it


def test_figures_stand_beside_their_goals(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu_record = importlib.import_module("gpu_record")
    ops = {"summary": {"native, ms": 0.7, "speed-up, eager": 30}, "goals": {"native, ms": 0.6, "speed-up, eager": 20}}
    ops["copy_gb_per_s"] = 3000.0
    rows = {"plain": {"time_ratio": 1.0}, "double_backward": {"time_ratio": 2.0, "memory_ratio": 1.9}}
    step = {"networks": {"resnet50": rows}, "implementation of the ops": "native"}
    assert gpu_record.figures([ops, step, step | {"implementation of the ops": "reference"}]) == {
        "native, ms": {"value": 0.7, "goal": "<= 0.6", "met": False},
        "speed-up, eager": {"value": 30, "goal": ">= 20", "met": True},
        "copy, GB/s": {"value": 3000},
        "resnet50: exact step, x plain": {"value": 2, "goal": "<= 2.2", "met": True},
        "resnet50, reference ops: exact step, x plain": {"value": 2},
        "resnet50: exact step's memory, x plain": {"value": 1.9},
        "resnet50, reference ops: exact step's memory, x plain": {"value": 1.9},
    }


def test_a_profile_is_a_line_a_kernel(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    kernels = importlib.import_module("profile_ops").kernels
    name = "void sib_ext::(anonymous namespace)::gram<float, 64>(const float *, int)"
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    text = f'==PROF== Connected\n{head}"0","{name}","gpu__time_duration.sum","us","1,234.5"\n'
    text += f'"0","{name}","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","81.5"\n'
    expected = {"gpu__time_duration.sum": 1234.5, "dram__throughput.avg.pct_of_peak_sustained_elapsed": 81.5}
    assert kernels(text) == [("gram<float, 64>", expected)]


# ----------------------------------------------------------------------------------------------- the op benchmark


def test_growth_is_that_of_the_kernels_where_they_were_timed_alone(bench_ops):
    def rows(**times):
        return [{"shape": [b, 3, 8, 8], **{k: f(b) for k, f in times.items()}} for b in (128, 256, 512)]

    batch = lambda shape: shape[0]  # noqa: E731
    assert bench_ops.slope(rows(median_ms=lambda b: 3.0), batch) == pytest.approx(0)
    assert bench_ops.slope(rows(median_ms=lambda b: 3.0, graph_ms=lambda b: b**1.5), batch) == pytest.approx(1.5)
    some = rows(median_ms=lambda b: b, graph_ms=lambda b: b**2)
    del some[0]["graph_ms"]
    assert bench_ops.slope(some, batch) == pytest.approx(1)


def test_growth_in_the_batch_is_reported_from_the_least_that_fills_the_device(bench_ops):
    batches = [{"impl": "native", "shape": [b, 3, 8, 8], "median_ms": max(b, 128)} for b in (1, 32, 128, 256, 512)]
    results = {"headline": [], "balanced": [], "batches": batches, "sizes": []}
    assert bench_ops.summarise(results, 128)["growth exponent in B"] == pytest.approx(1)
    assert bench_ops.summarise(results, 1)["growth exponent in B"] < 0.5


DYING = """
import json, sys, time
part, impl = sys.argv[sys.argv.index("--measure") + 1], sys.argv[sys.argv.index("--implementations") + 1]
row = {"impl": impl, "shape": [2, 3, 4, 4], "median_ms": 10.0 if impl == "reference" else 2.0, "gb_per_s": 1.0}
row |= {"p20_ms": 1.0, "p80_ms": 3.0}
print("row: " + json.dumps(row), flush=True)
if impl == "native":
    print("CUDA error: an illegal memory access", flush=True)
    %s
print("row: " + json.dumps(row | {"peak_extra_bytes": 5}), flush=True)
"""


@pytest.mark.parametrize(
    "death, told", [("import os; os.abort()", "illegal memory access"), ("time.sleep(60)", "longer than 4 s")]
)
def test_what_was_measured_before_a_process_died_is_kept(death, told, bench_ops, monkeypatch, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING % death)
    monkeypatch.setattr(bench_ops, "__file__", str(script))
    options = SimpleNamespace(
        device="cpu",
        threads=1,
        seconds=0.1,
        tiny=True,
        limit=4,
        only=["headline"],
        implementations=["native", "reference"],
    )
    kept = []
    results = bench_ops.run_all(bench_ops.PLANS["cpu"], options, lambda r: kept.append(json.loads(json.dumps(r))))
    assert [row["impl"] for row in results["headline"]] == ["native", "reference"]
    assert results["headline"][1]["peak_extra_bytes"] == 5 and "peak_extra_bytes" not in results["headline"][0]
    assert results["summary"] == {"native, ms": 2.0, "speed-up over the literal reference, eager": 5.0}
    assert list(results["failed"]) == ["headline, native"] and told in results["failed"]["headline, native"]
    assert len(kept[0]["headline"]) == 1 and kept[-1] == results
    bench_ops.show(results)


# --------------------------------------------------------------------------------------------------- small inputs


def test_every_mismatch_is_listed_and_every_case_runs(native, monkeypatch, capsys):
    def spoilt(name, implementation):
        op = overload(name, implementation)
        if name != "masked_statistics":
            return op
        return lambda *arguments: [2 * result for result in op(*arguments)]

    overload = exercise.dispatch.overload
    monkeypatch.setattr(exercise.dispatch, "overload", spoilt)
    monkeypatch.setattr(exercise, "DTYPES", (torch.float64,))
    monkeypatch.setattr(sys, "argv", ["exercise", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        exercise.main()
    lines = str(ended.value).splitlines()
    assert lines[0].startswith(f"{len(list(exercise.cases(torch.float64, 'cpu')))} cases")
    wrong = {line.rpartition(":")[0] for line in lines[1:]}
    outputs = {
        "masked_statistics": ("moments", "Gram of R", "Gram of x"),
        "masked_statistics of one field": ("moments",),
    }
    assert wrong == {
        f"torch.float64, {case}, {sample.name}: {output}"
        for sample in exercise.STATISTICS_SAMPLES
        for case in outputs
        for output in outputs[case]
    }
    assert capsys.readouterr().out.count("WRONG: ") == len(wrong)


def test_a_case_that_raises_is_listed_and_one_that_kills_the_device_ends_the_process():
    def raising():
        yield "mask", torch.ones(2), torch.ones(2).double()
        raise ValueError("no such size")

    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert exercise.mismatches("a case", raising(), 1e-8, lambda: None) == ["a case: ValueError: no such size"]
    with pytest.raises(SystemExit, match="a case: the device failed.*illegal memory access"):
        exercise.mismatches("a case", iter(()), 1e-8, dead)


# ------------------------------------------------------------------------------------------------- tests in turns

FAULTY = """
import os, sys, time, types

faulty = False

def synchronize():
    if faulty:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

def test_first(): pass
def test_fault():
    global faulty
    faulty = True
def test_after_the_fault(): assert not faulty
def test_crash(): os._exit(7)
def test_wrong(): assert 1 == 2
def test_hang(): time.sleep(60)
def test_last(): pass
"""


def in_turns(folder, tests: str):
    (folder / "test_faulty.py").write_text(tests)
    command = [sys.executable, "-m", "tests.gpu.turns", folder, "-v", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    env = os.environ | {"SIB_EXT_TEST_SECONDS": "2"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_fault_a_crash_and_a_hang_fail_no_test_after_them(tmp_path):
    done = in_turns(tmp_path, FAULTY)
    assert done.returncode != 0
    failed = re.findall(r"^FAILED test_faulty.py::(\w+) \(call\)", done.stdout, re.M)
    ended = re.findall(r"^ERROR: test_faulty.py::(\w+) ended its process", done.stdout, re.M)
    passed = re.findall(r"test_faulty.py::(\w+) PASSED", done.stdout)
    assert failed == ["test_fault", "test_wrong"] and ended == ["test_fault", "test_crash", "test_hang"]
    assert passed == ["test_first", "test_after_the_fault", "test_last"]
    assert "CUDA error in test_faulty.py::test_fault" in done.stdout


def test_without_a_fault_there_is_one_process(tmp_path):
    done = in_turns(tmp_path, "def test_first(): pass\n")
    assert done.returncode == 0 and "ERROR" not in done.stdout and "1 passed" in done.stdout
