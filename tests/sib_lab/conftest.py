"""A demo small enough for a test."""

import signal

import pytest
from sib_lab.config import Config
from sib_lab.train import Learner


@pytest.fixture(scope="session")
def tiny() -> Config:
    return Config(epochs=2, batch_size=8, train_digits=24, validation_digits=10, test_digits=16, copies=1, threads=1)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture
def press_ctrl_c(monkeypatch):
    """press_ctrl_c(n): a real SIGINT during the n-th training step from now."""

    def at(number: int) -> None:
        original, steps = Learner.step, iter(range(1, 10**9))

        def step(self, split):
            if next(steps) == number:
                signal.raise_signal(signal.SIGINT)
            original(self, split)

        monkeypatch.setattr(Learner, "step", step)

    return at
