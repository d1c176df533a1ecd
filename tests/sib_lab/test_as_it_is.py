"""Networks that are measured as their weights are: 0 epochs, and heads asked for other classes."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sib_lab.cli.commands import app
from sib_lab.data import open_data
from sib_lab.networks import heads
from sib_lab.networks.build import build_network
from sib_lab.networks.errors import NetworkError
from sib_lab.networks.heads import restrict_head, rows_of
from sib_lab.networks.imagenet_classes import imagenet_names
from sib_lab.training.config import TrainConfig
from sib_lab.training.making import make_network
from sib_lab.training.runs import open_run
from typer.testing import CliRunner

CLASSES = ("apple", "pear", "plum")


@pytest.fixture
def photographs(tmp_path):
    """A folder of three classes, each of another colour."""
    rng = np.random.default_rng(0)
    for colour, name in enumerate(CLASSES):
        for number in range(12):
            pixels = rng.integers(0, 60, (40, 40, 3), dtype=np.uint8)
            pixels[10:30, 10:30, colour] += 150
            path = tmp_path / "photographs" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "photographs"


@pytest.fixture
def weights(tmp_path):
    """Those of a network of three classes in the same order."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save(build_network("small_cnn", 3, 32).state_dict(), path)
    return path


def invoked(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def compared(root, weights, out, *more):
    words = (
        "compare",
        "--data",
        "folder",
        "--root",
        root,
        "--size",
        32,
        "--network",
        "small_cnn",
        "--weights",
        weights,
    )
    return invoked(*words, "--epochs", 0, "--images", 6, "--measures", "deletion", "--out", out, *more)


def test_a_network_is_measured_with_its_own_weights(photographs, weights, tmp_path):
    result = compared(photographs, weights, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "As it is" in result.output and "Seconds a step" not in result.output
    run = open_run(tmp_path / "out/runs/as-is-seed0")
    given = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, given[key]) for key, value in run.model.state_dict().items())
    test = open_data("folder", photographs, size=32).test["test"]
    right = [int(run.model(test[row].image[None]).argmax() == test[row].label) for row in range(len(test))]
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["runs"][0]["numbers"]["accuracy/test"]["mean"] == pytest.approx(np.mean(right))
    page = (tmp_path / "out/report.html").read_text()
    assert "was measured as it is" in page and "nothing was trained" in page
    again = compared(photographs, weights, tmp_path / "out")
    assert again.exit_code == 0 and "Measuring" not in again.output


def test_other_weights_or_other_data_are_not_taken_for_the_same(photographs, weights, tmp_path):
    assert compared(photographs, weights, tmp_path / "out").exit_code == 0
    state = torch.load(weights, weights_only=True)
    torch.save({key: value + 0.1 if value.is_floating_point() else value for key, value in state.items()}, weights)
    result = compared(photographs, weights, tmp_path / "out")
    assert result.exit_code == 1 and "was begun with weights = " in result.stderr
    torch.save(state, weights)
    (photographs / "plum/0.png").unlink()
    result = compared(photographs, weights, tmp_path / "out")
    assert result.exit_code == 1 and "is not what it was (1 image of the " in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (("--methods", "ce"), "--methods has no meaning with --epochs 0"),
        (("--seeds", 2), "--seeds has no meaning with --epochs 0"),
    ],
)
def test_options_of_a_training_have_no_meaning(words, message, photographs, weights, tmp_path):
    result = compared(photographs, weights, tmp_path / "out", *words)
    assert result.exit_code == 1 and message in result.stderr and not (tmp_path / "out/runs").exists()


def test_without_weights_there_is_nothing_to_measure():
    with pytest.raises(ValueError, match="epochs 0 keeps a network as it is: give its weights"):
        TrainConfig(epochs=0, method="ce")


def test_a_head_of_other_classes_is_never_a_new_one(photographs, tmp_path):
    torch.save(build_network("small_cnn", 5, 32).state_dict(), tmp_path / "five.pt")
    result = compared(photographs, tmp_path / "five.pt", tmp_path / "out")
    assert result.exit_code == 1 and "tell 5 classes and the data has 3" in result.stderr


def test_classes_of_a_checkpoint_are_found_by_name(photographs, tmp_path):
    network = build_network("small_cnn", 4, 32)
    state = {"config": {}, "classes": ["plum", "quince", "apple", "pear"], "size": 32, "model": network.state_dict()}
    torch.save(state, tmp_path / "own.pt")
    data = open_data("folder", photographs, size=32)
    options = {"network": "small_cnn", "weights": str(tmp_path / "own.pt"), "size": 32, "epochs": 0, "method": "ce"}
    restricted = make_network(TrainConfig(**options), data)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(restricted.eval()(x), network.eval()(x)[:, [2, 3, 0]])
    state["classes"][0] = "damson"
    torch.save(state, tmp_path / "own.pt")
    with pytest.raises(NetworkError, match="plum is no class of the weights"):
        make_network(TrainConfig(**options), data)


def test_of_imagenet_the_data_s_classes_are_asked_by_name_or_id(tmp_path, monkeypatch):
    names = imagenet_names()
    torch.save({"weight": torch.zeros(1)}, path := tmp_path / "w.pt")
    assert rows_of(("Granny_Smith", "golden retriever"), (), 1000, path)[0] == [
        names.index("Granny Smith"),
        names.index("golden retriever"),
    ]
    with pytest.raises(NetworkError, match="crane is that of several classes of the weights .*classes.csv"):
        rows_of(("crane",), (), 1000, path)
    with pytest.raises(NetworkError, match="teapots is no class"):
        rows_of(("teapots",), (), 1000, path)
    monkeypatch.setattr(heads, "wordnet_ids", lambda: tuple(f"n{row:08}" for row in range(1000)))
    assert rows_of(("crane", "n00000007"), ("n00000134", ""), 1000, path) == ([134, 7], "")


def test_two_folders_of_one_class_are_refused(tmp_path):
    state = {
        "config": {},
        "classes": ["cat", "dog"],
        "size": 32,
        "model": build_network("small_cnn", 2, 32).state_dict(),
    }
    torch.save(state, tmp_path / "own.pt")
    with pytest.raises(NetworkError, match="DOG and dog are the same class of the weights"):
        rows_of(("DOG", "cat", "dog"), (), 2, tmp_path / "own.pt")
    torch.save({"weight": torch.zeros(1)}, path := tmp_path / "w.pt")
    with pytest.raises(NetworkError, match="sports car and sports_car are the same class"):
        rows_of(("sports car", "sports_car"), (), 1000, path)


def test_where_the_order_of_classes_is_assumed_it_is_said(photographs, weights, tmp_path):
    result = compared(photographs, weights, tmp_path / "out")
    said = " ".join(result.output.split())
    assert "It names no classes: they are taken to be apple, pear, plum, in this order." in said


def test_a_restricted_head_gives_the_logits_of_its_rows():
    network = build_network("small_cnn", 6, 32).eval()
    x = torch.rand(2, 3, 32, 32)
    before = network(x)
    network.class_count = 6
    torch.testing.assert_close(restrict_head(network, [4, 1])(x), before[:, [4, 1]])
    assert network.class_count == 2 and network.head.out_features == 2


def test_a_table_gives_the_ids_of_the_class_folders(photographs):
    assert open_data("folder", photographs, size=32).wordnet_ids == ()
    with open(photographs / "classes.csv", "w", newline="") as file:
        csv.writer(file).writerows([("folder", "wordnet_id"), ("plum", "n00000001"), ("fig", "n2")])
    assert open_data("folder", photographs, size=32).wordnet_ids == ("", "", "n00000001")


@pytest.mark.parametrize("is_trained", [False, True], ids=["as it is", "trained"])
def test_masks_that_mark_nothing_stop_every_command(is_trained, photographs, weights, tmp_path):
    for path in photographs.glob("*/*.png"):
        mask = photographs / "masks" / path.relative_to(photographs)
        mask.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((40, 40), np.uint8)
        pixels[0, 0] = 255
        Image.fromarray(pixels).save(mask)
    words = (
        "--data",
        "folder",
        "--root",
        photographs,
        "--size",
        32,
        "--network",
        "small_cnn",
        "--out",
        tmp_path / "out",
    )
    trained = ("compare", *words, "--epochs", 1, "--seeds", 1, "--batch-size", 4)
    result = invoked(*trained) if is_trained else compared(photographs, weights, tmp_path / "out")
    assert result.exit_code == 1 and "mark nearly nothing" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out/runs").exists()
