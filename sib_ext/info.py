"""``python -m sib_ext.info``: what was built, what runs here, and why not."""

import importlib
import os
import platform

import torch

from . import __version__
from .ops import dispatch


def implementations() -> list[tuple[str, str, str | None]]:
    """(device type, implementation, None or why it cannot run); ``impl="auto"`` takes :func:`auto_order`'s first."""
    rows = []
    for device_type in ("cpu", "cuda"):
        absent = "torch sees no GPU" if device_type == "cuda" and not torch.cuda.is_available() else None
        order = auto_order(device_type)
        for name in (*order, *({"native", "triton", "reference"} - set(order))):
            rows.append((device_type, name, dispatch.problem_of(name, device_type) or absent))
    return rows


def auto_order(device_type: str) -> tuple[str, ...]:
    """What ``impl="auto"`` chooses from; everything else runs only when it is asked for."""
    return dispatch.AUTO_ORDER[device_type]


def build_options() -> dict[str, str]:
    """What the native modules say of themselves, and what setup.py recorded."""
    record = dispatch.build_record()
    options = {"built for torch": record.get("torch", "nothing native was built")}
    for device_type, module in dispatch.MODULES.items():
        if dispatch.native_problem(device_type) is None:
            built = importlib.import_module(f"sib_ext.{module}").build_info()
            options[f"sib_ext.{module}"] = ", ".join(f"{key} {value}" for key, value in built.items())
        else:
            options[f"sib_ext.{module}"] = "not loaded"
    return options


def report() -> str:
    lines = [
        f"sib_ext {__version__}",
        f"python  {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch   {torch.__version__}, {torch.get_num_threads()} CPU threads, {torch.cuda.device_count()} GPUs",
        f"impl    {os.environ.get('SIB_EXT_IMPL', 'auto')} (SIB_EXT_IMPL, or sib_ext.use_impl, or impl=...)",
        "",
        "implementations (auto takes the device's first that is available and not marked as only when asked for):",
    ]
    for device_type, name, problem in implementations():
        asked = "" if name in auto_order(device_type) else ", only when asked for"
        lines.append(f"  {device_type:5} {name:10} {'available' + asked if problem is None else f'no: {problem}'}")
    lines += ["", "build:"]
    lines += [f"  {key:16} {value}" for key, value in build_options().items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
