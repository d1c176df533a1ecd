"""Entry point: ``sib-lab``, ``python -m sib_lab.cli``."""

import ctypes
import os
import signal

from . import INSTALL


def main() -> None:
    """Entry point of the console script."""
    # Read when torch loads: threads that wait without spinning cost little when idle and much less beside other jobs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        raise SystemExit(INSTALL.format(missing=error.name)) from error
    try:
        app(prog_name="sib-lab")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and said: it would only break the interpreter's end


def keep_freed_memory() -> None:
    """Tells glibc, where it is the C library, not to hand freed pages back: the system fills every new one with zeros,
    a fifth of a training step's time on a CPU where other work runs (docs/engines.md)."""
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


if __name__ == "__main__":
    main()
