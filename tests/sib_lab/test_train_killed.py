"""A training that is killed without warning, again and again, ends as one that never was."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sib_lab.training.runs import BEST, FINISHED, LAST, METRICS, STEPS, open_run
from test_train import tensorboard_events

# Imports once and forks for every attempt, so that a kill costs no import. {"whole": folder, "killed": folder,
# "kills": [...]}: a kill is seconds after the start, or the number of a disk write that the process dies before
# ("before"), half way through ("half") or right after ("after").
DRIVER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from lightning_fabric import Fabric
from torch.utils.tensorboard import SummaryWriter
from sib_lab.training import runs
from sib_lab.training.config import TrainConfig
from sib_lab.data import open_data
from sib_lab.training.train import train

task = json.loads(sys.argv[1])
digits = {"train": 72, "validation": 20, "test": 10, "copies": 1}
config = TrainConfig(method="sib", epochs=4, batch_size=16, data_options=digits, threads=1, device="cpu", save_steps=1)
data = open_data("digits", **digits)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def attempt(folder, kill=None):
    child = os.fork()
    if child == 0:
        code = 3
        try:
            if isinstance(kill, list):
                dying(*kill)
            train(config, folder, quiet=True, data=data)
            code = 0
        finally:
            os._exit(code)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

def dying(number, moment):
    original, count = runs.write_whole, iter(range(1, 10**6))
    def write_whole(path, write):
        if next(count) != number:
            return original(path, write)
        if moment == "before":
            die()
        if moment == "half":
            class Half:
                def __init__(self, file): self.file, self.left = file, 300
                def write(self, piece):
                    self.file.write(bytes(piece)[: self.left]); self.file.flush()
                    self.left -= len(piece)
                    if self.left <= 0:
                        die()
                    return len(piece)
                def __getattr__(self, name): return getattr(self.file, name)
            original(path, lambda file: write(Half(file)))
        else:
            original(path, write)
        die()
    runs.write_whole = write_whole

outcomes = {"whole": attempt(task["whole"]), "killed": [attempt(task["killed"], kill) for kill in task["kills"]]}
while (status := attempt(task["killed"])) and os.WIFSIGNALED(status):
    pass
outcomes["last"] = status
print(json.dumps(outcomes))
"""


def untimed(path: Path) -> str:
    """A CSV file without its columns of seconds."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return json.dumps([{name: text for name, text in row.items() if not name.startswith("seconds")} for row in rows])


def drive(tmp_path, kills) -> tuple[dict, Path, Path]:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    task = json.dumps({"whole": str(whole), "killed": str(killed), "kills": kills})
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, task]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), whole, killed


def assert_the_same_end(whole: Path, killed: Path) -> None:
    assert untimed(killed / METRICS) == untimed(whole / METRICS)
    assert (killed / STEPS).read_bytes() == (whole / STEPS).read_bytes()
    for name in (LAST, BEST):
        a, b = open_run(killed / name), open_run(whole / name)
        assert a.epoch == b.epoch and a.finished
        weights = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
        assert all(torch.equal(x, y) for x, y in weights)
    numbers = [sorted(e for e in tensorboard_events(f) if "seconds" not in e[0]) for f in (whole, killed)]
    assert numbers[0] == numbers[1]
    summaries = [json.loads((folder / FINISHED).read_text()) for folder in (whole, killed)]
    assert summaries[0]["best"]["epoch"] == summaries[1]["best"]["epoch"]
    assert not list(killed.glob(".*.tmp"))


def test_a_run_killed_before_amid_and_after_writing_ends_with_the_same_numbers(tmp_path):
    # Of an attempt's writes the first are config.json and the curves so far, then last.pt and curves for every step.
    moments = [(1, "half"), (2, "after"), (4, "before"), (4, "half"), (4, "after"), (5, "half"), (9, "after")]
    moments += [(13, "half"), (7, "before"), (10, "half"), (3, "half")]
    outcomes, whole, killed = drive(tmp_path, [list(m) for m in moments])
    assert outcomes["whole"] == 0 == outcomes["last"] and all(status == 9 for status in outcomes["killed"])
    assert_the_same_end(whole, killed)
    starts = json.loads((killed / "config.json").read_text())["starts"]
    steps = [start["step"] for start in starts]
    assert steps == sorted(steps) and len(set(steps)) > 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_same_numbers(tmp_path, seed):
    import random

    draw = random.Random(seed)
    outcomes, whole, killed = drive(tmp_path, [draw.uniform(0.05, 1.2) for _ in range(10)])
    assert outcomes["whole"] == 0 == outcomes["last"] and 9 in outcomes["killed"]
    assert_the_same_end(whole, killed)
