"""Devices, precision, processes and signals of a training, through lightning-fabric."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .config import TrainConfig
from .runs import TrainingError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def by_torchrun() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


def with_processes_of_torchrun(config: TrainConfig) -> TrainConfig:
    if not by_torchrun():
        return config
    world = int(os.environ["WORLD_SIZE"])
    if config.devices not in (1, world):
        raise TrainingError(f"torchrun started {world} processes, but {config.devices} devices were asked for.")
    try:
        return replace(config, devices=world)
    except ValueError as error:
        raise TrainingError(f"{error}.") from error


def devices_here(config: TrainConfig) -> tuple[str, int]:
    """cpu or cuda, and how many of them on this machine.

    Raises:
        TrainingError: a device that is not there.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = config.device if config.device != "auto" else "cuda" if there else "cpu"
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if by_torchrun() else config.devices
    if device == "cuda" and local > there:
        seen = f"torch sees {there}" if there else "torch sees none (`python -m sib_ext.info` says what is installed)"
        wanted = "1 CUDA device was" if local == 1 else f"{local} CUDA devices were"
        raise TrainingError(f"{wanted} asked for, but {seen}: use --device cpu or fewer.")
    return device, local


def make_fabric(config: TrainConfig) -> "Fabric":
    """Devices, precision and processes.

    Raises:
        TrainingError: a device that is not there.
    """
    from lightning_fabric import Fabric

    _quiet_fabric()
    device, local = devices_here(config)
    strategy = "ddp" if by_torchrun() else "ddp_spawn" if config.devices > 1 else "auto"
    return Fabric(
        accelerator=device,
        devices=local,
        num_nodes=config.devices // local if by_torchrun() else 1,
        strategy=strategy,
        precision=config.precision,  # type: ignore[arg-type]  # checked with the options
    )


def _quiet_fabric() -> None:
    """Without its notes on precision and ranks; warnings stay."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric.utilities.rank_zero").setLevel(logging.WARNING)


def launch_processes(fabric: "Fabric", work: Callable) -> BaseException | None:
    """Starts the processes and waits; signals are theirs to answer."""
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    came: list[int] = []

    def hand_on(signum, frame):
        came.append(signum)
        # Ctrl-C reaches every process of the terminal by itself.
        for child in multiprocessing.active_children() if signum == signal.SIGTERM else ():
            child.terminate()

    with _handlers(hand_on):
        try:
            return fabric.launch(work)
        except (ProcessRaisedException, ProcessExitedException) as error:
            if came:  # before a process could answer it, or when it had nothing more to do
                return stopping(came[0])
            if isinstance(error, ProcessExitedException):
                how = f"signal {error.signal_name}" if error.signal_name else f"exit code {error.exit_code}"
                return TrainingError(
                    f"Process {error.error_index} of the training was ended by {how}: run the same command again, "
                    "which goes on from the last checkpoint."
                )
            kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
            if kind.startswith("sib_lab."):  # an error of this program is a sentence
                return TrainingError(message)
            return TrainingError(f"Process {error.error_index} of the training failed with {kind}: {message}")


def stopping(signum: int) -> KeyboardInterrupt | SystemExit:
    """What a signal ends the program with: Ctrl-C as usual, another with the exit code that shells give it."""
    return KeyboardInterrupt() if signum == signal.SIGINT else SystemExit(128 + signum)


@contextmanager
def _handlers(handler) -> Iterator[None]:
    """SIGINT and SIGTERM go to ``handler``; elsewhere than in the main thread nothing can be set."""
    try:
        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        previous = {}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int | None]]:
    """Inside, the first SIGINT or SIGTERM only sets what the yielded function returns; a second one acts at once."""
    came: list[int] = []

    def note(signum, frame):
        came.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    with _handlers(note):
        yield lambda: came[0] if came else None


@contextmanager
def settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Threads and repeatable kernels, as they were afterwards."""
    _quiet_fabric()  # in processes that were started, too
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    cudnn, before = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    flags = (cudnn.deterministic, cudnn.benchmark)
    if config.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
        cudnn.deterministic, cudnn.benchmark = flags
