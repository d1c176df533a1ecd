"""One dispatch rule for every op: the device's native kernel, else on a GPU Triton's, else the reference.

Each op is registered once from Python: schema, fake kernel, autograd rule, and the reference at
CompositeExplicitAutograd. ``sib_ext._C`` (CPU) and ``sib_ext._C_cuda`` (CUDA) only implement their device's key of
the default overload, so a missing module leaves the reference in place. The overload ``.reference`` is always the
reference: it is what ``impl="reference"`` runs and what the tests compare. The overload ``.triton`` is always the
Triton kernels, on a GPU or, under ``TRITON_INTERPRET=1``, in Triton's interpreter.
"""

import contextlib
import contextvars
import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

IMPLEMENTATIONS = ("auto", "native", "triton", "reference")
MODULES = {"cpu": "_C", "cuda": "_C_cuda"}
# What auto takes the first of that runs. On a CPU Triton is an interpreter: only when asked for.
AUTO_ORDER = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps sib-ext (or the path of its source)"

LIBRARY = torch.library.Library("sib_ext", "DEF")


def build_record() -> dict:
    """What setup.py wrote when it built the native modules; empty where nothing was built."""
    path = Path(__file__).parent.parent / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _load(module: str) -> str | None:
    """Imports sib_ext.<module>; None, or the one readable reason why it is not there."""
    if importlib.util.find_spec(f"sib_ext.{module}") is None:
        return build_record().get("skipped", {}).get(module, f"sib_ext.{module} was not built; to build it: {REBUILD}")
    try:
        importlib.import_module(f"sib_ext.{module}")
    except (ImportError, OSError, RuntimeError) as error:
        built = build_record().get("torch", "an unknown torch")
        return (
            f"sib_ext.{module} was built for torch {built}, this is torch {torch.__version__}: {error}. "
            f"To rebuild: {REBUILD}"
        )
    return None


# Loaded once, at import: torch.compile can trace a look-up in a dictionary, but not an import.
_native_problems = {device_type: _load(module) for device_type, module in MODULES.items()}


def native_problem(device_type: str) -> str | None:
    """None where native kernels run on that device type, else why not."""
    return _native_problems.get(device_type, f"there are no native kernels for device type '{device_type}'")


def _missing_triton() -> str | None:
    """None if the triton package can be imported, else the reason."""
    # Looked for, not imported: that would take a second of every start.
    if importlib.util.find_spec("triton") is None:
        return "the package triton cannot be imported; to install it: pip install triton"
    return None


def _find_triton_problems() -> dict[str, str | None]:
    missing = _missing_triton()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    no_gpu = "Triton kernels run on a GPU; TRITON_INTERPRET=1, set before Python starts, interprets them on the CPU"
    on_a_gpu = missing
    if on_a_gpu is None and not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        on_a_gpu = "Triton needs a C compiler when a kernel runs for the first time: install gcc, or name one in CC"
    return {"cuda": on_a_gpu, "cpu": missing if interpreted else no_gpu}


_triton_problems = _find_triton_problems()


def triton_problem(device_type: str) -> str | None:
    """None where Triton kernels run on that device type, else why not."""
    return _triton_problems.get(device_type, f"there are no Triton kernels for device type '{device_type}'")


def problem_of(implementation: str, device_type: str) -> str | None:
    """None where an implementation runs on that device type, else why not."""
    known = {"native": native_problem, "triton": triton_problem}
    return known[implementation](device_type) if implementation in known else None


def _checked(impl: str, name: str) -> str:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{name} is {impl!r}; choose one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    return impl


_FROM_ENVIRONMENT = _checked(os.environ.get("SIB_EXT_IMPL", "auto"), "the environment variable SIB_EXT_IMPL")
_in_use = contextvars.ContextVar("sib_ext implementation", default=_FROM_ENVIRONMENT)


def default_impl() -> str:
    """What ``impl=None`` stands for here: :func:`use_impl`'s choice, or the environment's."""
    return _in_use.get()


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Makes ``impl`` (``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``) the default inside a ``with`` block.

    In this thread alone; an ``impl=`` argument goes before it.
    """
    token = _in_use.set(_checked(impl, "impl"))
    try:
        yield
    finally:
        _in_use.reset(token)


def _is_unproven(device_type: str) -> bool:
    """A GPU older than the kernels are built for by default, or of another maker."""
    if device_type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0)


def resolve(impl: str | None, device_type: str) -> str:
    """The implementation that will run: an explicit choice that cannot run raises and says why."""
    impl = default_impl() if impl is None else _checked(impl, "impl")
    if impl == "auto":
        order = ("reference",) if _is_unproven(device_type) else AUTO_ORDER.get(device_type, ("reference",))
        return next(name for name in order if problem_of(name, device_type) is None)
    problem = problem_of(impl, device_type)
    if problem is not None:
        raise RuntimeError(f"impl={impl!r} cannot run on {device_type}: {problem}. impl='auto' takes what is there.")
    return impl


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Keeps autocast from narrowing the products inside; nothing to do where it is off, as switching takes its time."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _without_autocast(kernel: Callable) -> Callable:
    def run(*arguments):
        with without_autocast(arguments[0].device.type):
            return kernel(*arguments)

    return run


def triton_kernel(module: str, function: str) -> Callable:
    """sib_ext.triton.<module>.<function>, imported when it first runs: the package triton may be missing."""

    def run(*arguments):
        return getattr(importlib.import_module(f"sib_ext.triton.{module}"), function)(*arguments)

    return run


def define(
    name: str,
    schema: str,
    reference: Callable,
    triton: Callable,
    fake: Callable,
    save: Callable,
    backward: Callable,
) -> None:
    """Registers the op under its default overload, under ``.reference`` and under ``.triton``.

    Why not two hand-written autograd Functions: ``register_autograd`` makes the same Function, at the Autograd key,
    where torch.compile, opcheck and functorch see it. ``backward(overload)`` gives the rule for one overload, so
    that a backward op runs in the implementation of its forward.
    """
    for overload in ("default", "reference", "triton"):
        suffix = "" if overload == "default" else f".{overload}"
        LIBRARY.define(f"{name}{suffix}{schema}")
        if overload == "triton":
            for key in ("CPU", "CUDA"):
                LIBRARY.impl(f"{name}{suffix}", _without_autocast(triton), key)
        else:
            LIBRARY.impl(f"{name}{suffix}", _without_autocast(reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"sib_ext::{name}{suffix}", fake, lib=LIBRARY)
        torch.library.register_autograd(f"sib_ext::{name}{suffix}", backward(overload), setup_context=save, lib=LIBRARY)


def partial_derivatives(formula: Callable, tensors: tuple, grad_outputs, needed: tuple[bool, ...]) -> tuple:
    """The VJP of formula(*tensors) for each tensor that is needed, else None; some tensors may be None.

    ``torch.func.vjp``, not ``autograd.grad``: one tensor may have been computed from another (the cotangent of a
    loss that is not linear in M comes from R), and autograd would follow that path and count it twice. What comes
    out is differentiable again.
    """
    wanted = [i for i, tensor in enumerate(tensors) if tensor is not None and needed[i]]

    def of_wanted(*values):
        arguments = list(tensors)
        for i, value in zip(wanted, values, strict=True):
            arguments[i] = value
        return formula(*arguments)

    with without_autocast(tensors[0].device.type):
        pull_back = torch.func.vjp(of_wanted, *(tensors[i] for i in wanted))[1]
        grads = dict(zip(wanted, pull_back(grad_outputs), strict=True))
    return tuple(grads.get(i) for i in range(len(tensors)))


def overload(name: str, implementation: str):
    """The registered op that runs ``implementation``."""
    packet = getattr(torch.ops.sib_ext, name)
    return {"reference": packet.reference, "triton": packet.triton}.get(implementation, packet.default)


def empty_field(like: torch.Tensor) -> torch.Tensor:
    """An uninitialised [B,C,H,W] in the layout that kernels write: channels_last if ``like`` is, else contiguous."""
    return torch.empty_like(like, memory_format=field_format(like))


def field_format(field: torch.Tensor) -> torch.memory_format:
    channels_last = (
        field.dim() == 4 and field.is_contiguous(memory_format=torch.channels_last) and not field.is_contiguous()
    )
    return torch.channels_last if channels_last else torch.contiguous_format
