"""``train``: a run folder from a config, in one process or several, with progress, signals and resumption."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import QUALITIES, DataSets, checks
from ..data.identity import changed
from ..networks.preprocessing import of_checkpoint
from . import runs
from .check import check
from .config import TrainConfig
from .keeper import Keeper
from .losses import preset_constants
from .processes import (
    by_torchrun,
    deferred_signals,
    launch_processes,
    make_fabric,
    settings,
    stopping,
    with_processes_of_torchrun,
)
from .runs import CheckpointError, Run, RunError, open_config_data, open_run
from .state import load
from .trainer import Trainer

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from rich.console import Console

__all__ = ["check", "check_unchanged", "train"]


def train(
    config: TrainConfig,
    folder: Path | str,
    *,
    resume: bool = True,
    console: "Console | None" = None,
    quiet: bool = False,
    data: DataSets | None = None,
) -> Run:
    """Trains a network and leaves a run folder (see :mod:`sib_lab.training.runs`); a finished one is opened at once.

    Several devices: ``config.devices`` processes are started here, or ``torchrun`` has started this program in several.

    Args:
        resume: go on where ``folder`` stands; False: start anew and remove what the old run left there.
        console: where progress is shown (with several devices: the standard output).
        quiet: show nothing.
        data: opened data; None: opened as the config says. Must be what the config says, for the run to be repeatable.

    Raises:
        RunError: (TrainingError, CheckpointError) one sentence that says what is wrong and what to do.
        DataError, NetworkError: the same for data and networks.
        KeyboardInterrupt: Ctrl-C; the batch under way was finished and a checkpoint written. A second Ctrl-C
            interrupts at once.
        SystemExit: SIGTERM, in the same way; the code is 143.
    """
    folder = Path(folder)
    config = with_processes_of_torchrun(config)
    if resume and runs.is_finished(folder):
        _check_same(config, _loaded(folder / runs.LAST), folder)
        check_unchanged(folder, (open_config_data(config) if data is None else data).identity())
        return open_run(folder, trust=True)
    spawned = config.devices > 1 and not by_torchrun()
    # Bound here, not handed through Fabric, which looks into arguments and refuses frozen dataclasses.
    work = partial(
        _work,
        config=config,
        folder=folder,
        resume=resume,
        console=None if spawned else console,  # a console cannot go to another process
        quiet=quiet,
        data=data,
    )
    # Of the processes that torchrun started the first locks the folder for all.
    with runs.locked(folder) if os.environ.get("RANK", "0") == "0" or not by_torchrun() else nullcontext():
        fabric = make_fabric(config)
        outcome = launch_processes(fabric, work) if spawned else fabric.launch(work)
    if outcome is not None:
        raise outcome
    return open_run(folder, trust=True)


def _work(
    fabric: "Fabric",
    config: TrainConfig,
    folder: Path,
    resume: bool,
    console: "Console | None",
    quiet: bool,
    data: DataSets | None,
) -> BaseException | None:
    """One process's training. What stops it is returned, for it may have to go to another process."""
    keep, ended = None, False
    try:
        with settings(config, fabric.device):
            data = open_config_data(config) if data is None else data
            identity = _identity(data, fabric)
            stood = _stood(config, folder, identity) if resume else None
            if stood is None:
                checks.check(data, least=1).stop()
                check(config, data)
            trainer = Trainer(config, data, fabric)
            if stood is not None:
                _go_on(trainer, folder, stood)
            keep = Keeper(folder, config, fabric, identity)
            keep.begin(trainer, anew=stood is None)
            shown = _progress(trainer, folder, console, quiet or fabric.global_rank > 0)
            with shown as show, deferred_signals() as stop_signal:
                trainer.run(stop_signal, keep, show)
                keep.finish(trainer)
                ended = True
                if came := stop_signal():  # after the last step: whoever trains several must not go on with the next
                    raise stopping(came)
    except (Exception, KeyboardInterrupt, SystemExit) as outcome:
        if fabric.world_size > 1 and not isinstance(outcome, (RunError, KeyboardInterrupt, SystemExit)):
            raise  # the others may not have it: this process must fail, so that nobody waits for it
        return outcome
    finally:
        if keep is not None:
            keep.close(ended)
    return None


def _identity(data: DataSets, fabric: "Fabric") -> dict[str, Any]:
    """Of the data, taken by the first process for all."""
    if fabric.world_size == 1:
        return data.identity()
    return fabric.broadcast(data.identity() if fabric.global_rank == 0 else None)


def _stood(config: TrainConfig, folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where the same training stands in ``folder``; None: not begun.

    Raises:
        RunError: a damaged file, other options or other data.
    """
    if not (folder / runs.LAST).exists():
        return None
    stood = _loaded(folder / runs.LAST)
    _check_same(config, stood, folder)
    check_unchanged(folder, identity)
    return stood


def _go_on(trainer: Trainer, folder: Path, stood: Mapping[str, Any]) -> None:
    """Puts the training where it stood.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    try:
        was, now = of_checkpoint(stood), trainer.network.preprocessing
        if (was.mean, was.std) != (now.mean, now.std):
            raise CheckpointError(
                f"The network of the run in {folder} was trained on images normalised with mean {was.mean} and std "
                f"{was.std}, which would be {now.mean} and {now.std} now: {runs.ANEW}."
            )
        load(trainer, stood)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"The checkpoint {folder / runs.LAST} does not fit this training: {runs.ANEW}."
        ) from error


def _loaded(path: Path) -> dict[str, Any]:
    try:
        state = runs.load_state(path)
        runs.history_of(state, path)
        return state
    except RunError as error:
        raise CheckpointError(f"The checkpoint {path} is damaged or not one of this program: {runs.ANEW}.") from error


def _check_same(config: TrainConfig, stood: Mapping[str, Any], folder: Path) -> None:
    differing = config.differing(stood["config"])
    content = stood.get("weights_sha256")
    if runs.file_hash(config.weights) != content:
        was = stood["config"].get("weights")
        what = "whose content it does not say" if content is None else "of other content"
        differing["weights"] = f"{was}, {what}" if config.weights and was else was
    if not differing:  # of other options the constants are others, too
        differing = runs.other_constants(folder, preset_constants(config))
    if differing:
        options = ", ".join(f"{name} = {value}" for name, value in differing.items())
        raise CheckpointError(f"The run in {folder} was made with {options}: go on with the same options, {runs.ANEW}.")


def check_unchanged(folder: Path, identity: Mapping[str, Any]) -> None:
    """
    Raises:
        CheckpointError: the run in ``folder`` was made with other data, or does not say with which.
    """
    if what := changed(runs.read_identity(folder), identity):
        raise CheckpointError(
            f"The data of the run in {folder} is not what it was ({what}): restore the data, {runs.ANEW}."
        )


@contextmanager
def _progress(
    trainer: Trainer, folder: Path, console: "Console | None", quiet: bool
) -> Iterator[Callable[[Trainer], None]]:
    """A bar with the time left; where the output is no terminal, a line an epoch."""
    if quiet:
        yield lambda trainer: None
        return
    from ..console import plain_console, progress_bar

    console = console or plain_console()
    if trainer.step:
        console.print(f"Going on at step {trainer.step} of {trainer.steps} in {folder}.", markup=False)
    elif trainer.network.weights_note:
        console.print(trainer.network.weights_note, markup=False)
    progress = progress_bar(console, "steps", "state", stays=True)
    task = progress.add_task(trainer.config.method, total=trainer.steps, completed=trainer.step, state="")

    def show(trainer: Trainer) -> None:
        ended = trainer.step % trainer.batches.steps_per_epoch == 0
        if not console.is_terminal:
            if ended:
                console.print(
                    f"{trainer.config.method} epoch {trainer.epoch}/{trainer.config.epochs}: {_state(trainer)}"
                )
            return
        progress.update(task, completed=trainer.step, state=_state(trainer))

    with progress:
        yield show


def _state(trainer: Trainer) -> str:
    """Recent cross-entropy and the latest accuracy, or of several labels mAP."""
    words = []
    if trainer.history.curves:
        recent = trainer.history.curves["cross_entropy"][-20:]
        words.append(f"cross-entropy {sum(recent) / len(recent):.3f}")
    if trainer.history.epochs:
        words.append(f"{QUALITIES[trainer.data.quality]} {trainer.history.epochs[-1][trainer.selected_by]:.3f}")
    return ", ".join(words)
