"""``train``: a run folder from a config, in one process or several, with progress, signals and resumption."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import DataSets
from . import runs
from .config import TrainConfig
from .keeper import Keeper
from .processes import (
    by_torchrun,
    deferred_signals,
    launch_processes,
    make_fabric,
    settings,
    with_processes_of_torchrun,
)
from .runs import CheckpointError, Run, RunError, open_config_data, open_run
from .trainer import Trainer

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from rich.console import Console


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
    if resume and (folder / runs.FINISHED).exists():
        _check_same(config, runs.load_state(folder / runs.LAST), folder)
        return open_run(folder, trust=True)
    fabric = make_fabric(config)
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
    try:
        with settings(config, fabric.device):
            trainer = Trainer(config, open_config_data(config) if data is None else data, fabric)
            _resume_or_clear(trainer, folder, resume)
            keep = Keeper(folder, config, fabric)
            keep.begin(trainer)
            shown = _progress(trainer, folder, console, quiet or fabric.global_rank > 0)
            with shown as show, deferred_signals() as stop_signal:
                trainer.run(stop_signal, keep, show)
            keep.finish(trainer)
    except (Exception, KeyboardInterrupt, SystemExit) as outcome:
        if fabric.world_size > 1 and not isinstance(outcome, (RunError, KeyboardInterrupt, SystemExit)):
            raise  # the others may not have it: this process must fail, so that nobody waits for it
        return outcome
    return None


def _resume_or_clear(trainer: Trainer, folder: Path, resume: bool) -> None:
    """Loads ``last.pt``; or, without one or told to start anew, removes what an old run left."""
    path = folder / runs.LAST
    if resume and path.exists():
        state = _loaded(path)
        _check_same(trainer.config, state, folder)
        try:
            trainer.load(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"The checkpoint {path} does not fit this training: start anew with --fresh or in another folder."
            ) from error
        return
    trainer.fabric.barrier()  # before the first process removes what another still looks for
    if trainer.fabric.global_rank == 0:
        runs.remove_results(folder)


def _loaded(path: Path) -> dict[str, Any]:
    try:
        return runs.load_state(path)
    except RunError as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged or not one of this program: "
            "start anew with --fresh or in another folder."
        ) from error


def _check_same(config: TrainConfig, state: Mapping[str, Any], folder: Path) -> None:
    if differing := config.differing(state.get("config", {})):
        options = ", ".join(f"{name} = {value}" for name, value in differing.items())
        raise CheckpointError(
            f"The run in {folder} was made with {options}: "
            "go on with the same options, take another folder, or start anew with --fresh."
        )


@contextmanager
def _progress(
    trainer: Trainer, folder: Path, console: "Console | None", quiet: bool
) -> Iterator[Callable[[Trainer], None]]:
    """A bar with the time left; where the output is no terminal, a line an epoch."""
    if quiet:
        yield lambda trainer: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = console or Console()
    if trainer.step:
        console.print(f"Going on at step {trainer.step} of {trainer.steps} in {folder}.")
    elif trainer.network.weights_note:
        console.print(trainer.network.weights_note, markup=False, highlight=False)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        transient=not console.is_terminal,
        disable=not console.is_terminal,
    )
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
    """Recent cross-entropy and the latest accuracy."""
    words = []
    if trainer.curves:
        recent = trainer.curves["cross_entropy"][-20:]
        words.append(f"cross-entropy {sum(recent) / len(recent):.3f}")
    if trainer.epochs:
        first = next(iter(trainer.data.validation))
        words.append(f"accuracy {trainer.epochs[-1][f'accuracy_{first}']:.3f}")
    return ", ".join(words)
