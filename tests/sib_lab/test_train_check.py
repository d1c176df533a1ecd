"""What stops a training stops it before its first step."""

from dataclasses import replace

import pytest
import torch
from sib_lab.data import DataError, open_data
from sib_lab.networks.errors import NetworkError
from sib_lab.training.config import METHODS
from sib_lab.training.runs import RunError, TrainingError
from sib_lab.training.train import check
from sib_lab.training.trainer import Trainer
from test_train import DIGITS, SMALL, one_sentence, run

NETWORKS = """
import torch
from torch import nn

def flat(classes, size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 8), nn.Tanh(), nn.Linear(8, classes))

class Once(nn.Module):
    def __init__(self, classes, size):
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 4, 5, 4), nn.LazyLinear(classes)

    def forward(self, x):
        if self.training:
            raise ArithmeticError("no training mode here\\nat all")
        return self.head(self.features(x).flatten(1))
"""


@pytest.fixture(scope="module")
def data():
    return open_data("digits", **DIGITS)


@pytest.fixture(autouse=True)
def networks(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_what_can_be_trained_passes_and_moves_no_generator(data, method):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    assert check(replace(SMALL, method=method), data) is None
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"loss_options": {"speed": 1}}, TrainingError, "The loss cannot be made: the method ce .*'speed'"),
        ({"method": "sib", "loss_options": {"layer": "block4"}}, TrainingError, "The loss cannot be made: .*'layer'"),
        ({"method": "sib", "loss_options": {"every": 0}}, TrainingError, "every must be an integer >= 1, got 0"),
        ({"method": "sib", "loss_options": {"layers": ["block9"]}}, TrainingError, "has no layer 'block9'"),
        ({"method": "sib", "loss_options": {"layers": ["head"]}}, TrainingError, "The loss cannot be made: .*head"),
        ({"method": "energy-loss", "loss_options": {"layer": "block9"}}, TrainingError, "has no layer 'block9'"),
        ({"method": "energy-loss", "loss_options": {"layer": "head"}}, TrainingError, "loss cannot be made"),
        ({"method": "sib-paper", "batch_size": 1}, TrainingError, "hsic.* at least 2|at least 2.*hsic"),
        ({"method": "energy-loss", "network": "own_networks:flat"}, NetworkError, "no module with a feature map"),
        ({"method": "ppce-loss", "network": "own_networks:flat"}, NetworkError, "no module with a feature map"),
        ({"method": "l1-loss", "loss_options": {"layer": "block9"}}, TrainingError, "has no layer 'block9'"),
        ({"method": "sib", "network": "own_networks:flat"}, NetworkError, "has no feature map for the terms of sib"),
        ({"method": "centre-mask", "network": "own_networks:flat"}, NetworkError, "no feature map for the terms of"),
        (
            {"method": "sib", "network": "own_networks:flat", "loss_options": {"input_background": 0}},
            TrainingError,
            "no feature map",
        ),
        ({"network": "own_networks:Once"}, TrainingError, "own_networks:Once cannot be trained .*: no training mode"),
        ({"network": "resnet19"}, NetworkError, "There is no network 'resnet19'"),
        ({"weights": "none.pt"}, (NetworkError, RunError), r"none\.pt"),
        ({"batch_size": 16, "accumulate": 5}, TrainingError, "72 training images in digits, too few for steps of 80"),
    ],
)
def test_what_cannot_be_trained_is_said_before_the_first_step(data, tmp_path, monkeypatch, changes, kind, message):
    options = replace(SMALL, **changes)
    with pytest.raises(kind, match=message) as error:
        check(options, data)
    assert one_sentence(error)
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(kind, match=message):
        run(options, tmp_path / "run", data)


@pytest.mark.parametrize("method", ["rrr", "energy-loss", "l1-loss", "rrr-loss", "ppce-loss"])
def test_a_loss_that_needs_masks_without_any_does_not_start(method):
    with pytest.raises(TrainingError, match=f"The method {method} needs masks"):
        check(replace(SMALL, method=method), open_data("digits", annotated=0.0, **DIGITS))


def test_a_class_without_images_does_not_start(data):
    with pytest.raises(DataError, match="have no training image"):
        check(SMALL, replace(data, classes=(*data.classes, "unicorn")))


def test_without_terms_of_feature_maps_a_network_needs_none(data):
    options = {"feature_background": 0, "feature_foreground": 0}
    check(replace(SMALL, method="sib", network="own_networks:flat", loss_options=options), data)
