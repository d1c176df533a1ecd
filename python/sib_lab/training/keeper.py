"""What a training writes into its run folder while it goes on; what lies there is named in sib_lab/training/runs.py."""

import csv
import io
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import sib_ext

from . import runs
from .config import TrainConfig
from .files import options_as_yaml
from .logs import Log, TensorBoard, WeightsAndBiases
from .losses import preset_constants
from .runs import RunError, step_times
from .state import best_state_of, state_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from .trainer import Trainer

PACKAGES = ("torch", "numpy", "lightning-fabric", "torchvision", "captum", "torchcam", "timm")


class Keeper:
    """Writes the run folder, in the first process; the others wait and hear of its errors.

    Args:
        identity: of the data, see :mod:`sib_lab.data.identity`.
    """

    def __init__(self, folder: Path, config: TrainConfig, fabric: "Fabric", identity: Mapping[str, Any]):
        self.folder, self.config, self.fabric = folder, config, fabric
        self.identity = identity
        self.saved_at = time.monotonic()
        self.logs: list[Log] = []

    def begin(self, trainer: "Trainer", anew: bool) -> None:
        """Notes the start in config.json and brings the curves to where the training stands.

        Args:
            anew: what an old run left in the folder is removed.
        """
        self.fabric.barrier()  # before the first process removes what another still looks for
        self._first(lambda: self._begin(trainer, anew))

    def checkpoint(self, trainer: "Trainer") -> None:
        """last.pt, and the curves up to it."""
        self._first(lambda: self._checkpoint(trainer))
        self.saved_at = time.monotonic()

    def best(self, trainer: "Trainer") -> None:
        self._first(lambda: runs.save_state(self.folder / runs.BEST, best_state_of(trainer)))

    def finish(self, trainer: "Trainer") -> None:
        """finished.json: the run's end in a few numbers."""
        self._first(lambda: self._finish(trainer))

    def close(self, ended: bool) -> None:
        """Closes the curves' other places, in whatever way the training came to its end."""
        for log in self.logs:
            with suppress(OSError):  # nothing is left to write; a disk that refuses was named before
                log.close(ended)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint within the epoch is due after ``step`` steps."""
        by_steps = self.config.save_steps > 0 and step % self.config.save_steps == 0
        return by_steps or time.monotonic() - self.saved_at > 60 * self.config.save_minutes

    def _begin(self, trainer: "Trainer", anew: bool) -> None:
        record = {"config": runs.plain(asdict(self.config)), "starts": []}
        if trainer.step:
            record["starts"] = runs.read_record(self.folder).get("starts", [])
        record["starts"].append({"step": trainer.step} | surroundings(self.fabric.device))
        record["weights_sha256"] = trainer.weights_sha256
        record["constants"] = preset_constants(self.config)
        if self.config.wandb is not None:  # it may refuse: before the old run goes
            self.logs.append(WeightsAndBiases(self.config, self.folder, record["starts"][0]["time"]))
        if anew:
            runs.remove_results(self.folder)
        runs.write_text(self.folder / runs.CONFIG, json.dumps(record, indent=2) + "\n")
        runs.write_text(self.folder / runs.OPTIONS, options_as_yaml(self.config))
        runs.write_text(self.folder / runs.DATA, json.dumps(self.identity, indent=2) + "\n")
        self.logs.append(TensorBoard(self.folder / runs.TENSORBOARD))
        self._write_curves(trainer)

    def _checkpoint(self, trainer: "Trainer") -> None:
        runs.save_state(self.folder / runs.LAST, state_of(trainer))
        self._write_curves(trainer)

    def _finish(self, trainer: "Trainer") -> None:
        first, epochs = trainer.selected_by, trainer.history.epochs
        best = max(epochs, key=lambda line: (line[first], line["epoch"]))
        summary = {"steps": trainer.step, "selected_by": first, "best": best, "last": epochs[-1]}
        summary["seconds_per_step"] = step_times(trainer.history.seconds)
        runs.write_text(self.folder / runs.FINISHED, json.dumps(summary, indent=2) + "\n")

    def _write_curves(self, trainer: "Trainer") -> None:
        epochs, curves = trainer.history.epochs, trainer.history.curves
        points = [dict(zip(curves, values, strict=True)) for values in zip(*curves.values(), strict=True)]
        runs.write_text(self.folder / runs.METRICS, as_csv(epochs))
        runs.write_text(self.folder / runs.STEPS, as_csv(points))
        for log in self.logs:
            try:
                log.write(epochs, points)
            except OSError as error:
                raise RunError(
                    f"{log.place} cannot be written ({error.strerror or error}): the checkpoint is whole; make room "
                    "there and run the same command again."
                ) from error

    def _first(self, action: Callable[[], None]) -> None:
        """Does something in the first process; its RunError is raised in all."""
        error = None
        if self.fabric.global_rank == 0:
            try:
                action()
            except RunError as problem:
                error = problem
        if self.fabric.world_size > 1:
            error = self.fabric.broadcast(error)
        if error is not None:
            raise error


def as_csv(lines: list[dict[str, float]]) -> str:
    """A header and the lines; numbers so that reading them gives the same number back."""
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def surroundings(device: torch.device) -> dict[str, Any]:
    """When, with what and on what a run was started."""
    versions = {"python": platform.python_version(), "sib-ext": sib_ext.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "git_commit": git_commit(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "cpu"


def git_commit() -> str | None:
    """The commit of this program's source, with ``+changes`` where files differ from it; None outside git."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(here.parent), *arguments]
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    # Installed into an environment that lies in some other repository, the file is not tracked there.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
