"""Run folders: what a training leaves behind, written so that it is whole at every moment, and opened again.

A run folder holds ``config.json`` (options, versions, git commit), ``run.yaml`` (options that repeat it), ``data.json``
(the data's identity), ``metrics.csv`` (a line an epoch), ``steps.csv`` (curves within epochs), ``tensorboard/``,
``last.pt`` (where to go on), ``best.pt`` (the best network on validation) and, at the end, ``finished.json``.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import is_multilabel
from ..networks.preprocessing import of_checkpoint
from .config import TrainConfig

CONFIG, FINISHED, OPTIONS, DATA = "config.json", "finished.json", "run.yaml", "data.json"
METRICS, STEPS, TENSORBOARD = "metrics.csv", "steps.csv", "tensorboard"
LAST, BEST = "last.pt", "best.pt"
MEASURED = "measured"  #: folder of what was measured on the network
LOCK = ".lock"


#: What every checkpoint holds at least.
STATE = {"config": dict, "classes": list, "size": int, "epoch": int, "model": dict}

#: What to do about a run that does not fit: not every command has --fresh.
ANEW = "remove this run (train, compare: --fresh), or take another folder with --out"


class RunError(Exception):
    """Something about a run that the user must decide; the message is one sentence."""


class TrainingError(RunError):
    """A training that cannot start or go on; the message is one sentence."""


class DivergedError(TrainingError):
    """A training whose loss or gradient became infinite or NaN; the message is one sentence."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be resumed; the message is one sentence."""


@dataclass
class Run:
    """A trained (or partly trained) network with its history."""

    folder: Path
    config: TrainConfig
    model: nn.Module  #: on the CPU, in eval mode
    classes: tuple[str, ...]
    size: int  #: side of the images it was trained on, px
    epoch: int  #: how many epochs these weights were trained, whole ones
    history: list[dict[str, float]]  #: the lines of metrics.csv
    curves: dict[str, list[float]]  #: the columns of steps.csv: ``step``, and the mean of every loss part up to it
    seconds_per_step: dict[str, float]  #: without loading data: median, p20, p80, mean over all steps
    finished: bool
    record: dict[str, Any] = field(default_factory=dict)  #: config.json in full: versions, git commit

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return is_multilabel(self.config.data)

    def data(self, root: Path | str | None = None):
        """The data set as it was trained on, see :func:`sib_lab.data.open_data`; ``root``: where it lies now."""
        return open_config_data(self.config, root)


def open_config_data(config: TrainConfig, root: Path | str | None = None):
    """The data set that a config names; ``root`` replaces the config's.

    Raises:
        DataError: what is wrong with it.
    """
    from ..data import open_data

    names = ("size", "seed", "annotated", "annotation", "agreement", "skip_broken", "augment", "limit")
    options = {name: getattr(config, name) for name in names} | dict(config.data_options)
    data = open_data(config.data, config.root if root is None else root, **options)
    if config.augmentation == "trivial":
        from .augmentation import add_trivial

        add_trivial(data)
    return data


def open_run(folder: Path | str, best: bool = True, trust: bool = False) -> Run:
    """Opens a run folder, or one checkpoint file in it.

    Args:
        folder: the folder; or its ``best.pt`` or ``last.pt``, then ``best`` does not matter.
        best: the weights that were best on validation; False: the latest.
        trust: whether a network that the run names as ``module:function``, code that would run here, is imported.

    Raises:
        RunError: no run there, a file that is no checkpoint, nothing trained yet, a damaged file, or a network that
            does not fit its weights.
        NetworkError: a network that cannot be built, or that is not trusted.
    """
    path = Path(folder)
    if path.suffix != ".pt" and path.is_file():
        raise RunError(
            f"{path} is no checkpoint of this program: give a run folder, or {BEST} or {LAST} in one (weights from "
            "elsewhere go with --network and --weights)."
        )
    folder, path = (path.parent, path) if path.suffix == ".pt" else (path, path / (BEST if best else LAST))
    record = read_record(folder)
    last = load_state(folder / LAST)
    state = load_state(path) if path != folder / LAST else last
    config = saved_config(record["config"], folder)
    model = _network(config, state, path, trust)
    history = history_of(last, folder / LAST)
    return Run(
        folder=folder,
        config=config,
        model=model,
        classes=tuple(state["classes"]),
        size=state["size"],
        epoch=state["epoch"],
        history=history["epochs"],
        curves=history["curves"],
        seconds_per_step=step_times(history["seconds"]),
        finished=is_finished(folder),
        record=record,
    )


def read_record(folder: Path) -> dict[str, Any]:
    """config.json of a run folder.

    Raises:
        RunError: it is not there or cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(
            f"There is no run in {folder}: it has no {CONFIG}; train one with `sib-lab train --out {folder}`."
        )
    record = _json(path)
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("starts", []), list):
        raise RunError(f"The file {path} cannot be read as a run's configuration: train anew into another folder.")
    return record


def other_constants(folder: Path, constants: Mapping[str, Any]) -> dict[str, Any]:
    """Those of its loss's preset that the run in a folder was begun with and that are others now: name -> value."""
    was = read_record(folder).get("constants", constants) if (folder / CONFIG).is_file() else constants
    return {name: was.get(name) for name in {**was, **constants} if was.get(name) != constants.get(name)}


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder is at its end.

    Raises:
        RunError: finished.json is damaged.
    """
    path = folder / FINISHED
    if not path.exists():
        return False
    if not isinstance(_json(path).get("best"), dict):
        raise RunError(f"The file {path} is damaged: remove it and run the same command again, which writes it anew.")
    return True


def read_identity(folder: Path) -> dict[str, Any]:
    """data.json of a run folder: what its data was, see :mod:`sib_lab.data.identity`.

    Raises:
        RunError: it is not there or cannot be read.
    """
    path = folder / DATA
    found = _json(path) if path.is_file() else None
    if not found:
        problem = "is damaged" if path.is_file() else "is not there"
        raise RunError(f"The run in {folder} does not say what data it was trained on ({DATA} {problem}): {ANEW}.")
    return found


def _json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object; {} for anything else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):  # text that is no UTF-8 is a ValueError, too
        return {}
    return found if isinstance(found, dict) else {}


def saved_config(options: Mapping[str, Any], where: Path) -> TrainConfig:
    """A config from what was saved; options of other versions of this program are named.

    Raises:
        RunError: options that this version does not know, or values that it refuses.
    """
    known = {f.name for f in fields(TrainConfig)}
    if unknown := sorted(options.keys() - known):
        raise RunError(f"The run {where} has options that this version does not know: {', '.join(unknown)}.")
    try:
        return TrainConfig(**options)
    except (TypeError, ValueError) as error:
        raise RunError(f"The run {where} has an option that this version refuses: {error}.") from error


def _network(config: TrainConfig, state: Mapping[str, Any], path: Path, trust: bool) -> nn.Module:
    from ..networks.build import build_network

    try:
        # The checkpoint says what the network normalises with: that may have come with its first weights.
        own = of_checkpoint(state)
        classes, size = len(state["classes"]), state["size"]
        model = build_network(config.network, classes, size, mean=own.mean, std=own.std, trust=trust)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise RunError(
            f"The weights in {path} do not fit the network {config.network}: they belong to another run or version."
        ) from error
    return model.eval()


# ------------------------------------------------------------------------------------------- whole files


def load_state(path: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote, on the CPU.

    Raises:
        RunError: no such file, or one that is damaged or of another kind.
    """
    if not path.is_file():
        raise RunError(f"There is no checkpoint {path}: the run has not reached its first one.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(state[name], kind) for name, kind in STATE.items()):
            raise ValueError("not a checkpoint of this program")
        of_checkpoint(state)  # may refuse
    except Exception as error:  # torch.load fails in many ways on a damaged file
        raise RunError(f"The checkpoint {path} is damaged or not one of this program: train anew.") from error
    return state


def history_of(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The history in what ``last.pt`` holds.

    Raises:
        RunError: there is none.
    """
    history = state.get("history")
    kinds = {"epochs": list, "curves": dict, "seconds": list}
    if not isinstance(history, dict) or not all(isinstance(history.get(name), kind) for name, kind in kinds.items()):
        raise RunError(f"The checkpoint {path} is damaged or not one of this program: train anew.")
    return history


def file_hash(path: Path | str | None) -> str | None:
    """SHA-256 of a file's content, as hexadecimal digits; None for no file, a name that stands for weights as it is.

    Raises:
        RunError: it cannot be read.
    """
    from ..networks.build import IMAGENET

    if path is None or str(path) == IMAGENET:
        return None if path is None else str(path)
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()
    except OSError as error:
        raise RunError(f"The weights {path} cannot be read: {error.strerror or error}.") from error


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Inside, no other process that asks for it works in a folder; a killed process keeps nobody out.

    Raises:
        RunError: another one is at work there, or the folder cannot be made or written.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RunError(f"Another process is at work in {folder}: wait for its end, or take another folder.") from error
    except OSError as error:
        raise RunError(
            f"{error.filename or folder} cannot be written or removed ({error.strerror or error}): take another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint so that ``path`` is whole at every moment; errors as in :func:`write_whole`."""
    write_whole(path, lambda file: torch.save(state, file))


def write_text(path: Path, text: str) -> None:
    """Writes a text so that ``path`` is whole at every moment; errors as in :func:`write_whole`."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_whole(path: Path, write) -> None:
    """Calls ``write(file)`` on a file beside ``path``, brings it to the disk and renames it.

    Raises:
        RunError: the disk is full or refuses; what ``path`` was before, it still is.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    file = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as raw:
            file = _Watched(raw)
            write(file)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save answers a failing disk with a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else file and file.error
        _remove(temporary)
        if cause is None:
            raise
        raise RunError(
            f"{path} cannot be written ({cause.strerror or cause}): what was saved before is whole; "
            "make room there and run the same command again."
        ) from error


class _Watched:
    """A binary file that remembers the first error of a write."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name):
        return getattr(self.file, name)


def remove_results(folder: Path) -> None:
    """Removes what a run left in a folder, for another one to begin there.

    Raises:
        RunError: the folder refuses.
    """
    try:
        for measured in (folder / MEASURED).glob("*"):  # first: without the network it would be another's
            measured.unlink()
        for name in (LAST, BEST, METRICS, STEPS, FINISHED, DATA):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{error.filename} cannot be written or removed ({error.strerror}): take another folder."
        ) from error


def _sync_folder(folder: Path) -> None:
    """Brings a rename to the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # it is in nobody's way: the next save writes over it


def plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, for JSON and checkpoints."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def step_times(seconds: list[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantile, and the mean, which counts what few steps do, too; NaN for nothing."""
    values = torch.tensor(seconds or [float("nan")], dtype=torch.float64)
    found = {name: values.quantile(q).item() for name, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}
    return found | {"mean": values.mean().item()}
