"""A data set and a training small enough for a test."""

import signal

import pytest
from sib_lab.training.config import TrainConfig, recipe
from sib_lab.training.trainer import Trainer


def tiny_config(method: str = "sib", **changes) -> TrainConfig:
    """The demo's recipe on a few digits; a second of training."""
    sizes = {"train": 64, "validation": 20, "test": 30, "copies": 1}
    options = {"epochs": 2, "batch_size": 16, "threads": 1, "data_options": sizes}
    return recipe("balanced", "digits", "small_cnn", method=method, **(options | changes))


@pytest.fixture(scope="session")
def tiny():
    """tiny(method, **changes) -> TrainConfig."""
    return tiny_config


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture
def press_ctrl_c(monkeypatch):
    """press_ctrl_c(n): a real SIGINT during the n-th training step from now."""

    def at(number: int) -> None:
        original, steps = Trainer.train_step, iter(range(1, 10**9))

        def step(self, *arguments, **options):
            if next(steps) == number:
                signal.raise_signal(signal.SIGINT)
            return original(self, *arguments, **options)

        monkeypatch.setattr(Trainer, "train_step", step)

    return at
