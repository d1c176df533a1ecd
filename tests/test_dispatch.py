"""Which implementation runs, and what is said when one cannot."""

import ast
import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sib_ext
from sib_ext import density_mask, masked_statistics, use_impl
from sib_ext.ops import dispatch

from .samples import PLAIN

OPS = ("density_mask", "density_mask_backward", "masked_statistics", "masked_statistics_backward")
NOT_BUILT = "sib_ext._C was not built here"


def call_density_mask(impl=None, device="cpu"):
    return density_mask(PLAIN.fields().vjp.to(device), impl=impl)


def call_masked_statistics(impl=None, device="cpu"):
    return masked_statistics(*(t.to(device) for t in PLAIN.fields()), impl=impl)


each_op = pytest.mark.parametrize("call", [call_density_mask, call_masked_statistics])


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setitem(dispatch._native_problems, "cpu", NOT_BUILT)


@pytest.fixture
def with_native(monkeypatch):
    monkeypatch.setitem(dispatch._native_problems, "cpu", None)


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = str(Path(sib_ext.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_native_kernels_are_there_where_they_are_required():
    if os.environ.get("SIB_EXT_REQUIRE_NATIVE") != "1":
        pytest.skip("SIB_EXT_REQUIRE_NATIVE=1 makes missing native kernels a failure")
    assert dispatch.native_problem("cpu") is None


@pytest.mark.parametrize("op", OPS)
def test_native_means_that_the_cpu_key_of_the_default_overload_has_a_kernel(op, native):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sib_ext::{op}", "CPU")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"sib_ext::{op}.reference", "CPU")


def test_auto_takes_native_where_it_is_there(with_native):
    assert dispatch.resolve(None, "cpu") == dispatch.resolve("auto", "cpu") == "native"


def test_auto_falls_back_to_the_reference_silently(without_native, recwarn):
    assert dispatch.resolve(None, "cpu") == dispatch.resolve("auto", "meta") == "reference"
    call_density_mask("auto")
    assert not recwarn.list


@each_op
def test_native_that_is_missing_says_why_and_what_to_do(call, without_native):
    with pytest.raises(RuntimeError, match=f"impl='native' cannot run on cpu: {NOT_BUILT}.*impl='auto'"):
        call("native")


@each_op
def test_native_on_a_device_without_kernels_says_which_device(call):
    with pytest.raises(RuntimeError, match="impl='native' cannot run on meta.*'meta'"):
        call("native", "meta")


@each_op
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_triton_on_a_cpu_says_why(call):
    with pytest.raises(RuntimeError, match="impl='triton' cannot run on cpu: .*[Tt]riton"):
        call("triton")


def test_auto_takes_the_cuda_kernels_on_a_gpu_then_triton_then_the_reference(monkeypatch):
    monkeypatch.setitem(dispatch._native_problems, "cuda", None)
    monkeypatch.setitem(dispatch._triton_problems, "cuda", None)
    assert dispatch.resolve("auto", "cuda") == "native"
    monkeypatch.setitem(dispatch._native_problems, "cuda", "sib_ext._C_cuda was not built here")
    assert dispatch.resolve("auto", "cuda") == dispatch.resolve("triton", "cuda") == "triton"
    monkeypatch.setitem(dispatch._triton_problems, "cuda", "no triton here")
    assert dispatch.resolve("auto", "cuda") == "reference"
    with pytest.raises(RuntimeError, match="impl='triton' cannot run on cuda: no triton here"):
        dispatch.resolve("triton", "cuda")


def test_auto_takes_the_reference_on_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setitem(dispatch._native_problems, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert dispatch.resolve("auto", "cuda") == "reference"
    assert dispatch.resolve("native", "cuda") == "native"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert dispatch.resolve("auto", "cuda") == "native"


def test_triton_without_a_compiler_says_what_to_do(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch.shutil, "which", lambda program: None)
    assert "C compiler" in dispatch._find_triton_problems()["cuda"]


def test_auto_takes_no_interpreter(without_native, monkeypatch):
    monkeypatch.setitem(dispatch._triton_problems, "cpu", None)
    assert dispatch.resolve("auto", "cpu") == "reference"
    assert dispatch.resolve("triton", "cpu") == "triton"


def test_where_the_cuda_module_is_loaded_native_means_its_kernels():
    if problem := dispatch.native_problem("cuda"):
        pytest.skip(problem)
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sib_ext::{op}", "CUDA")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"sib_ext::{op}.reference", "CUDA")


def test_triton_that_is_not_installed_says_so_and_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "package triton cannot be imported" in dispatch._find_triton_problems()["cuda"]
    assert "pip install triton" in dispatch._find_triton_problems()["cuda"]


def test_without_the_package_triton_the_library_works():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, sib_ext;"
        "print(sib_ext.density_mask(torch.rand(1, 3, 8, 8)).shape)"
    )
    result = in_a_new_process(code)
    assert result.stdout.strip() == "torch.Size([1, 1, 8, 8])", result.stderr


@each_op
def test_an_unknown_implementation_is_refused_with_the_choices(call):
    with pytest.raises(ValueError, match="impl is 'fast'.*'auto', 'native', 'triton', 'reference'"):
        call("fast")
    with pytest.raises(ValueError, match="impl is 'fast'"), use_impl("fast"):
        pass


@each_op
def test_tensors_without_values_give_results_without_values(call):
    """For shape inference of a model on the meta device."""
    result = call(device="meta")
    tensors = result if isinstance(result, tuple) else (result,)
    assert all(t.device.type == "meta" and t.shape[0] == 2 for t in tensors)


def test_use_impl_sets_the_default_inside_its_block_only(without_native):
    before = dispatch.resolve(None, "cpu")
    with use_impl("reference"):
        assert dispatch.resolve(None, "cpu") == "reference"
        with use_impl("native"), pytest.raises(RuntimeError, match="impl='native' cannot run"):
            call_density_mask()
        assert dispatch.resolve(None, "cpu") == "reference"
    assert dispatch.resolve(None, "cpu") == before


def test_use_impl_is_undone_by_an_exception(with_native):
    with pytest.raises(KeyError), use_impl("reference"):
        raise KeyError
    assert dispatch.resolve(None, "cpu") == "native"


def test_use_impl_is_a_threads_own():
    seen = []
    with use_impl("reference"):
        other = threading.Thread(target=lambda: seen.append(dispatch.default_impl()))
        other.start()
        other.join()
        assert dispatch.default_impl() == "reference"
    assert seen == [dispatch.default_impl()]


def test_an_argument_goes_before_use_impl(without_native):
    with use_impl("native"):
        call_density_mask("reference")


@each_op
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_the_chosen_implementation_is_the_one_that_runs(call, impl, with_native, monkeypatch):
    used = []
    real = dispatch.overload

    def spy(name, implementation):
        used.append(implementation)
        return real(name, implementation)

    monkeypatch.setattr(dispatch, "overload", spy)
    call(impl)
    assert used == [impl]


class Recorder(TorchDispatchMode):
    """Notes every op of this library that runs."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sib_ext":
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@each_op
def test_the_backward_runs_in_the_implementation_of_its_forward(call, implementation):
    fields = PLAIN.fields().requiring_grad()
    with Recorder() as recorder:
        if call is call_density_mask:
            density_mask(fields.vjp, impl=implementation).sum().backward()
        else:
            masked_statistics(*fields, impl=implementation).moments.sum().backward()
    overload = "default" if implementation == "native" else implementation
    name = call.__name__.removeprefix("call_")
    assert recorder.ops == [f"sib_ext.{name}.{overload}", f"sib_ext.{name}_backward.{overload}"]


def test_the_environment_variable_sets_the_default():
    code = "import sib_ext.ops.dispatch as d; print(d.resolve(None, 'cpu'))"
    result = in_a_new_process(code, SIB_EXT_IMPL="reference")
    assert result.stdout.strip() == "reference", result.stderr


def test_an_environment_variable_that_names_nothing_is_refused_at_import():
    result = in_a_new_process("import sib_ext", SIB_EXT_IMPL="fast")
    assert result.returncode != 0
    assert "ValueError: the environment variable SIB_EXT_IMPL is 'fast'; choose one of 'auto'" in result.stderr


def test_a_native_module_that_does_not_load_gives_one_readable_reason(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    reason = dispatch._load("_C")
    for part in ("sib_ext._C", torch.__version__, "undefined symbol", "To rebuild: pip install"):
        assert part in reason
    assert "\n" not in reason


def test_a_native_module_that_was_never_built_gives_the_command_that_builds_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dispatch, "build_record", dict)
    assert "sib_ext._C was not built; to build it: pip install" in dispatch._load("_C")


def test_the_package_checks_its_arguments_without_assert_statements():
    for path in Path(sib_ext.__file__).parent.rglob("*.py"):
        asserts = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
        assert not asserts, f"{path.name} has an assert statement in line {asserts}: python -O removes it"
