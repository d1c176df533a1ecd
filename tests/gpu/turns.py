"""The tests of a folder, in as many processes as it takes: one fault must not fail every test after it.

    python -m tests.gpu.turns tests/gpu -k native      # arguments as of pytest

After an illegal access a CUDA context is lost, and every later call in the process fails. Each test is followed by a
synchronisation, so that a fault belongs to it; then the session ends, and another process runs the tests that have not
had their turn. The same if a test ends its process, or hangs longer than ``TEST_SECONDS``.
"""

import faulthandler
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

LIST = "SIB_EXT_TESTS_BEGUN"  # names the file of the tests that have had their turn
FINISHED = "every test has had its turn"
TERMINAL = pytest.StashKey()
TEST_SECONDS = float(os.environ.get("SIB_EXT_TEST_SECONDS", 60))


def begun() -> list[str]:
    return Path(os.environ[LIST]).read_text().splitlines()


def note(line: str) -> None:
    with open(os.environ[LIST], "a") as file:
        file.write(line + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    had = set(begun())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in had])
    items[:] = [item for item in items if item.nodeid not in had]


def pytest_configure(config) -> None:
    config.stash[TERMINAL] = os.fdopen(os.dup(2), "w")  # beside what pytest captures of a test


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    note(item.nodeid)
    faulthandler.dump_traceback_later(TEST_SECONDS, exit=True, file=item.config.stash[TERMINAL])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    finally:
        torch = sys.modules.get("torch")  # not imported: the process that starts the others does without
        if torch and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                item.session.shouldstop = f"CUDA error in {item.nodeid}: {error}".splitlines()[0]
                raise


def pytest_runtest_logreport(report) -> None:
    """At once: the list at the end is lost with the process, or where time runs out."""
    if report.failed:
        message = getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longreprtext)
        print(f"\nFAILED {report.nodeid} ({report.when}): {' '.join(message.split())[:300]}", flush=True)


def pytest_sessionfinish(session) -> None:
    if not session.shouldstop:
        note(FINISHED)


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "begun"
        path.touch()
        command = [sys.executable, "-m", "pytest", "-p", __spec__.name, *arguments]
        failed = count = 0
        while True:
            status = subprocess.run(command, env=os.environ | {LIST: str(path)}).returncode
            lines = path.read_text().splitlines()
            nothing_left = status == pytest.ExitCode.NO_TESTS_COLLECTED and count
            failed = failed or (0 if nothing_left else status)
            if FINISHED in lines or len(lines) == count:
                return failed
            count = len(lines)
            print(f"\nERROR: {lines[-1]} ended its process (exit status {status}); the rest in a new one", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
