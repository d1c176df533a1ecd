"""python -m sib_ext.info: what runs here, and why not."""

import subprocess
import sys

import sib_ext
from sib_ext import info
from sib_ext.ops import dispatch


def test_the_report_names_the_version_and_every_implementation_with_its_state():
    report = subprocess.run([sys.executable, "-m", "sib_ext.info"], capture_output=True, text=True, check=True).stdout
    assert f"sib_ext {sib_ext.__version__}" in report
    for device_type, name, problem in info.implementations():
        line = next(line for line in report.splitlines() if line.split()[:2] == [device_type, name])
        assert ("available" in line) == (problem is None)
        assert problem is None or problem in line


def test_auto_takes_the_first_implementation_that_the_report_calls_available():
    for device in ("cpu", "cuda"):
        state = {name: problem for device_type, name, problem in info.implementations() if device_type == device}
        if usable := [name for name in info.auto_order(device) if state[name] is None]:
            assert dispatch.resolve("auto", device) == usable[0]


def test_what_auto_never_takes_is_marked_where_it_is_available(monkeypatch):
    monkeypatch.setattr(info, "implementations", lambda: [("cpu", "reference", None), ("cpu", "triton", None)])
    lines = info.report().splitlines()
    assert "  cpu   reference  available" in lines
    assert "  cpu   triton     available, only when asked for" in lines


def test_a_loaded_module_tells_what_it_was_built_with(native):
    options = info.build_options()
    assert "compiler" in options["sib_ext._C"] and "vector_instructions" in options["sib_ext._C"]
    assert options["built for torch"] == dispatch.build_record()["torch"]


def test_a_module_that_does_not_load_is_explained_in_one_readable_message(tmp_path, monkeypatch):
    (tmp_path / "_broken.py").write_text("raise ImportError('undefined symbol: torch_anything')")
    monkeypatch.setattr(sib_ext, "__path__", [*sib_ext.__path__, str(tmp_path)])
    monkeypatch.setattr(dispatch, "build_record", lambda: {"torch": "2.99.0"})
    problem = dispatch._load("_broken")
    assert "built for torch 2.99.0" in problem and "undefined symbol" in problem and "pip install" in problem


def test_a_module_that_was_not_built_gives_the_reason_that_the_build_recorded(monkeypatch):
    monkeypatch.setattr(dispatch, "build_record", lambda: {"skipped": {"_absent": "no nvcc"}})
    assert dispatch._load("_absent") == "no nvcc"
    assert "was not built" in dispatch._load("_other")
