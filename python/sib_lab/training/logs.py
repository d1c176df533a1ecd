"""Where the curves of a training go beside its CSV files: TensorBoard, and Weights & Biases when asked for."""

import hashlib
import math
import shutil
import warnings
from abc import ABC, abstractmethod
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from .config import TrainConfig
from .runs import TrainingError, plain

Lines = list[dict[str, float]]


class Log(ABC):
    """Gets everything again and again, and hands on what is new: epochs under ``epoch/``, curves under ``step/``.

    Attributes:
        place: what an error names.
    """

    place: str

    def __init__(self):
        self.written = [0, 0]

    def write(self, epochs: Lines, points: Lines) -> None:
        """
        Args:
            epochs, points: the lines of metrics.csv and of steps.csv from the first on.

        Raises:
            OSError: the disk is full or refuses.
        """
        fresh = [("step", line) for line in points[self.written[1] :]]
        fresh += [("epoch", line) for line in epochs[self.written[0] :]]
        for group, line in sorted(fresh, key=lambda pair: pair[1]["step"]):
            # NaN: a part that these steps did not have.
            names = [name for name in line if name not in ("epoch", "step") and not math.isnan(line[name])]
            self.add({f"{group}/{name}": line[name] for name in names}, int(line["step"]))
        self.written = [len(epochs), len(points)]
        self.flush()

    @abstractmethod
    def add(self, values: dict[str, float], step: int) -> None:
        """Named values at a step; steps never fall."""

    @abstractmethod
    def flush(self) -> None:
        """What was added can be seen from now on."""

    @abstractmethod
    def close(self, ended: bool) -> None:
        """At the end of the training, or of a start that was stopped before it (not ``ended``)."""


class TensorBoard(Log):
    """Event files, written anew from the checkpoint at every start, so that nothing after it appears twice."""

    def __init__(self, folder: Path):
        super().__init__()
        self.place = str(folder)
        shutil.rmtree(folder, ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of tensorboard's own imports
            from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.place)

    def add(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self):
        self.writer.flush()

    def close(self, ended):
        self.writer.close()


class WeightsAndBiases(Log):
    """A run of Weights & Biases, which goes on when the training does.

    With ``WANDB_MODE=offline`` it stays on this disk: every start leaves a folder with all curves up to its end.

    Args:
        config: whose ``wandb`` is the project.
        folder: the run folder; its name is the run's.
        began: when the training was first started: another start anew is another run.

    Raises:
        TrainingError: it is not installed or refuses, as without a login.
    """

    def __init__(self, config: TrainConfig, folder: Path, began: str):
        super().__init__()
        check_wandb()
        import wandb

        self.place = "the run of Weights & Biases"
        key = hashlib.sha256(f"{folder.resolve()} {began}".encode()).hexdigest()[:16]
        try:
            self.run = wandb.init(
                project=config.wandb, name=folder.name, id=key, resume="allow", dir=str(folder),
                config=plain(asdict(config)), reinit="create_new",  # never into a run that others have open here
            )  # fmt: skip
        except (wandb.errors.Error, ValueError) as error:  # ValueError: a setting of the environment
            cause = " ".join(" ".join(str(error).splitlines()[:3]).split())
            raise TrainingError(
                f"Weights & Biases cannot be used ({cause.removesuffix('.')}): log in with `wandb login`, set "
                "WANDB_MODE=offline, or leave --wandb out."
            ) from error
        self.known = self.run.step  # a run that goes on has the steps before it

    def add(self, values, step):
        if step >= self.known:
            self.run.log(values, step=step)

    def flush(self):
        pass  # it sends in the background

    def close(self, ended):
        self.run.finish(exit_code=int(not ended))


def check_wandb() -> None:
    """
    Raises:
        TrainingError: Weights & Biases is not installed.
    """
    if find_spec("wandb") is None:
        raise TrainingError("--wandb needs wandb, which is not installed: pip install wandb, or leave --wandb out.")
