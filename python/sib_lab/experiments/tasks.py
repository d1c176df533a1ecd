"""Independent pieces of work in several processes of one thread each, stopped and gone on with at any moment."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from ..console import progress_bar
from ..data import DataError
from ..networks.errors import NetworkError
from ..reporting.results import ReportError
from ..training.runs import RunError


@dataclass(frozen=True)
class Task:
    """One piece of work.

    It must leave what it did on the disk: nothing but a word or two for people comes back.
    """

    name: str  #: for people
    work: Callable[..., str]  #: a function of a module; gives back what it did, as "trained 3:10"
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Failure:
    """A task that could not be done."""

    task: Task
    sentence: str  #: why


def run_tasks(tasks: Sequence[Task], jobs: int, console: Console) -> list[Failure]:
    """Does tasks in ``jobs`` processes (at least 1), in order: a process that is free takes the next one.

    A line for each that is done, and a bar over all. A task that fails stops no other.

    Returns:
        the tasks that failed.

    Raises:
        KeyboardInterrupt: Ctrl-C; the tasks under way were told to stop, as by Ctrl-C, and have. A second Ctrl-C ends
            them at once.
    """
    todo, failures = deque(tasks), []
    pool = None
    running: dict[Future, Task] = {}
    with progress_bar(console, "tasks") as progress:
        bar, done = progress.add_task("", total=len(tasks)), 0
        try:
            while todo or running:
                pool = pool or _pool(min(jobs, len(tasks)))
                with suppress(BrokenProcessPool):  # seen below, by the tasks under way
                    while todo and len(running) < jobs:
                        running[_submitted(pool, todo[0])] = todo[0]
                        todo.popleft()
                finished = wait(running, return_when=FIRST_COMPLETED).done
                if not finished or any(isinstance(future.exception(), BrokenProcessPool) for future in finished):
                    finished = wait(running).done  # all that were under way fail; the others go on in new processes
                    pool.shutdown()
                    pool = None
                for future in finished:
                    task, error, done = running.pop(future), future.exception(), done + 1
                    if error is not None and not isinstance(error, Exception):
                        raise KeyboardInterrupt  # someone stopped a process
                    if error is not None:
                        failures.append(Failure(task, _sentence(error)))
                    what = future.result() if error is None else f"failed: {failures[-1].sentence}"
                    console.print(f"{task.name}: {what} ({done} of {len(tasks)})", markup=False, soft_wrap=True)
                    progress.update(bar, completed=done)
            return failures
        except KeyboardInterrupt:
            _stop(running)
            raise
        finally:
            if pool is not None:
                pool.shutdown()


def raise_failures(failures: Sequence[Failure], count: int) -> None:
    """
    Raises:
        RunError: some of ``count`` tasks failed.
    """
    if failures:
        first = failures[0]
        raise RunError(
            f"{len(failures)} of {count} trainings failed (the first, {first.task.name}: "
            f"{first.sentence.removesuffix('.')}): the others are done, and the same command tries these again."
        )


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin)


def _submitted(pool: ProcessPoolExecutor, task: Task) -> Future:
    """A process that this starts inherits that Ctrl-C waits, until :func:`_begin` has made it deaf to the terminal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_do, task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(running: Iterable[Future]) -> None:
    """Tells the processes that are at work to stop, and waits until they have.

    Raises:
        KeyboardInterrupt: a second Ctrl-C; they are ended.
    """
    processes = multiprocessing.active_children()
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)
    try:
        wait(running)
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise


def _begin() -> None:
    """Of each process, before its first task."""
    os.setpgrp()  # the terminal's Ctrl-C reaches the first process alone, which hands it on once
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed command leaves no process behind that would be in the way of the next one; what is written is whole."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _do(task: Task) -> str:
    with _interruptible():
        return task.work(*task.arguments)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, SIGINT is Ctrl-C; outside, a process that waits for its next task does not hear it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _sentence(error: Exception) -> str:
    if isinstance(error, (RunError, DataError, NetworkError, ReportError)):
        return str(error)
    if isinstance(error, BrokenProcessPool):
        return "a process was ended from outside, or for lack of memory."
    return f"{type(error).__name__}: {error}".splitlines()[0]
