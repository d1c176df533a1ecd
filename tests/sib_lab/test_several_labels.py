"""The workbench on images of several labels: measures of classification, losses, training, comparison, pictures."""

import json
import math
import re
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_samples import write_labels, write_voc
from rich.console import Console
from sib_lab.data import open_data, stack
from sib_lab.data.labelled import LabelPairs
from sib_lab.experiments.compare import compare
from sib_lab.experiments.explain_files import explain_files, subject_of_network, subject_of_run
from sib_lab.experiments.material import Material, gallery_of_labels
from sib_lab.experiments.plan import OF_MASKS, Plan
from sib_lab.experiments.record import loss_sentence
from sib_lab.explaining import measures as measure
from sib_lab.explaining import methods as explain
from sib_lab.networks.heads import linear_head
from sib_lab.training import train as training
from sib_lab.training.config import METHODS, TrainConfig, recipe
from sib_lab.training.losses import LOCALISATIONS, LocalisationLoss, SpatialIB, drawn_label, make_criterion
from sib_lab.training.making import class_weights, log_odds, make_loss, make_network
from sib_lab.training.runs import RunError, TrainingError, open_run
from sklearn.metrics import average_precision_score, f1_score

COUNTS = (("train", 24), ("val", 12), ("test", 12))
METHODS_OF_SEVERAL = ("ce", "sib", *LOCALISATIONS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_labels(tmp_path_factory.mktemp("labels"), COUNTS)


def config_of(root, method="sib", **changes) -> TrainConfig:
    given = {"data": "voc", "network": "small_cnn", "root": str(root), "size": 32, "epochs": 2, "batch_size": 8}
    return recipe("balanced", method=method, threads=1, **(given | changes))


# ------------------------------------------------------------------------------------------ the first bias


@pytest.mark.parametrize("pos_weight", [None, torch.tensor([0.5, 1.0, 8.0])])
def test_no_guess_has_a_lower_loss_than_the_log_odds(pos_weight):
    labels = (torch.rand(4000, 3) < torch.tensor([0.02, 0.3, 0.9])).long()
    odds = log_odds(labels, pos_weight).float()

    def loss(bias):
        logits = bias.expand(len(labels), 3)
        each = F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=pos_weight, reduction="none")
        return each.mean(0)

    for moved in (odds - 0.1, odds + 0.1):
        assert (loss(moved) > loss(odds)).all()
    extremes = log_odds(torch.tensor([[0, 1], [0, -1]]), torch.tensor([0.0, 1.0]))  # absent, and difficult: there
    assert extremes.isfinite().all() and extremes[1].item() == pytest.approx(math.log(3))


def test_a_new_head_starts_there_and_a_trained_one_is_left(root, tmp_path):
    data = open_data("voc", root, size=32)
    first = make_network(config_of(root), data)
    torch.testing.assert_close(linear_head(first).bias.double(), log_odds(data.train.labels, None), check_dtype=False)
    weighted = make_network(config_of(root, class_weights="balanced"), data)
    assert linear_head(weighted).bias.abs().max() < 0.3
    torch.testing.assert_close(linear_head(weighted).weight, linear_head(first).weight)
    run = training.train(config_of(root, "ce", epochs=1), tmp_path, quiet=True)
    again = make_network(config_of(root, weights=str(tmp_path / "best.pt")), data)
    torch.testing.assert_close(linear_head(again).bias, linear_head(run.model).bias)


def test_a_network_whose_head_is_no_linear_layer_is_left_as_it_is(root):
    data = open_data("voc", root, size=64)
    network = make_network(config_of(root, network="squeezenet1_1", size=64), data)
    assert linear_head(network) is None


# ----------------------------------------------------------------------------------------------- how right


def test_average_precision_and_f1_are_scikit_learns():
    logits, labels = torch.randn(60, 4) * 3, torch.randint(0, 2, (60, 4))
    labels[::7, 1] = -1
    labels[:, 2] = 0  # in no image
    logits[:5, 0] = logits[5:10, 0]  # equal scores
    precision, f1 = measure.average_precision(logits, labels), measure.f1_scores(logits, labels)
    assert precision[2].isnan() and f1[2].isnan()
    for label in (0, 1, 3):
        known = labels[:, label] >= 0
        truth, scores = labels[known, label].numpy(), logits[known, label].numpy()
        assert precision[label].item() == pytest.approx(average_precision_score(truth, scores), abs=1e-6)
        assert f1[label].item() == pytest.approx(f1_score(truth, scores > 0), abs=1e-6)


def test_logits_are_never_taken_for_probabilities_and_large_ones_stay_apart():
    labels = torch.tensor([[1], [0], [1], [0]])
    small = torch.tensor([[0.9], [0.6], [0.3], [0.2]])  # all of a probability above one half
    assert measure.f1_scores(small, labels).item() == pytest.approx(2 / 3)
    large = torch.tensor([[300.0], [290.0], [60.0], [50.0]])
    assert measure.average_precision(large, labels).item() == pytest.approx(
        average_precision_score([1, 0, 1, 0], large)
    )
    assert measure.average_precision(large, torch.zeros_like(labels)).isnan().all()
    assert measure.f1_scores(torch.zeros(4, 1), labels).item() == pytest.approx(2 / 3)  # one half is told


# -------------------------------------------------------------------------------------------------- losses


@pytest.fixture
def batch():
    torch.manual_seed(3)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    y = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.float64)
    mask = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    annotated = torch.tensor([[True, False, True], [False, False, False], [True, True, True], [True] * 3, [True] * 3])
    return x, y, mask, annotated


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Softplus())
        self.head = torch.nn.Linear(6 * 64, 3)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def test_the_drawn_label_is_there_and_annotated_with_its_own_mask(batch):
    _, y, mask, annotated = batch
    seen = [set() for _ in y]
    for _ in range(60):
        label, of_label, known = drawn_label(y, mask, annotated)
        assert known.tolist() == [True, False, True, False, True]
        for row in known.nonzero()[:, 0].tolist():
            assert y[row, label[row]] == 1 and annotated[row, label[row]]
            assert torch.equal(of_label[row, 0], mask[row, label[row]])
            seen[row].add(int(label[row]))
    assert seen == [{0, 2}, set(), {0, 1, 2}, set(), {2}]


@pytest.mark.parametrize("kind", LOCALISATIONS)
@pytest.mark.parametrize("attribution", LocalisationLoss.ATTRIBUTIONS)
def test_a_localisation_loss_is_that_of_the_drawn_labels(batch, kind, attribution):
    x, y, mask, annotated = batch
    layer = "features" if attribution == "gradcam" else None
    several = LocalisationLoss(kind, 2.0, attribution, layer, task="multilabel")
    model = Net().double()
    torch.manual_seed(7)
    parts = several(model, x, y, mask, annotated)
    torch.manual_seed(7)
    label, of_label, known = drawn_label(y, mask, annotated)
    one = LocalisationLoss(kind, 2.0, attribution, layer)(model, x, label, of_label, known)
    name = LOCALISATIONS[kind].part
    torch.testing.assert_close(parts[name], one[name], atol=1e-12, rtol=0)
    cross_entropy = F.binary_cross_entropy_with_logits(model(x), y)
    torch.testing.assert_close(parts["loss"], cross_entropy + 2 / 3 * one[name], atol=1e-12, rtol=0)  # of 3 labels
    assert parts["loss"].requires_grad and one[name] > 0


def test_without_annotation_only_the_cross_entropy_is_left(batch):
    x, y, mask, annotated = batch
    loss = LocalisationLoss("energy-loss", 2.0, "input_x_gradient", task="multilabel")
    model = Net().double()
    expected = F.binary_cross_entropy_with_logits(model(x), y)
    for given in ((None, None), (mask, torch.zeros_like(annotated))):
        torch.testing.assert_close(loss(model, x, y, *given)["loss"], expected, atol=1e-12, rtol=0)


def test_weights_of_classes_are_the_positives(root, batch):
    data = open_data("voc", root, size=32)
    there = (data.train.labels != 0).double().mean(0)
    weight = class_weights(config_of(root, class_weights="balanced"), data)
    torch.testing.assert_close(weight.double(), 1 / there - 1)
    x, y, _, _ = batch
    criterion = make_criterion(config_of(root, "ce"), weight=weight, multilabel=True).double()
    model = Net().double()
    expected = F.binary_cross_entropy_with_logits(model(x), y, pos_weight=weight.double())
    torch.testing.assert_close(criterion(model, x, y)["loss"], expected)
    of_sib = make_loss(config_of(root, "sib", class_weights=(1, 2, 3)), data, make_network(config_of(root), data))
    assert isinstance(of_sib, SpatialIB) and of_sib.criterion.is_multilabel
    assert of_sib.criterion.pos_weight.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        *(
            (method, {}, "knows one label an image")
            for method in METHODS
            if method not in ("sib-paper", *METHODS_OF_SEVERAL)
        ),
        ("sib-paper", {}, "take seed='random_logit'"),
        ("ce", {"label_smoothing": 0.1}, "label_smoothing has no meaning"),
        ("energy-loss", {"annotated": 0.0}, "needs masks"),
        ("ce", {"epochs": 0, "weights": "somewhere.pt"}, "as it is on images of one label"),
        ("ce", {"class_weights": (1.0, 2.0)}, "one number for each of the 3 classes"),
    ],
)
def test_what_is_refused(root, method, changes, words):
    config = config_of(root, method, **changes)
    data = open_data("voc", root, size=32, annotated=config.annotated)
    with pytest.raises(TrainingError, match=words):
        training.check(config, data)


# ------------------------------------------------------------------------------------- training and comparing


@pytest.mark.parametrize("method", METHODS_OF_SEVERAL)
def test_every_method_trains(root, tmp_path, method):
    run = training.train(config_of(root, method, epochs=1), tmp_path, quiet=True)
    assert run.finished and run.multilabel and 0 <= run.history[0]["map_validation"] <= 1
    if method == "sib":
        assert "background_input" in run.history[0]


def test_the_best_network_is_that_of_the_best_map_as_scikit_learn_has_it(root, tmp_path):
    run = training.train(config_of(root, "ce", epochs=3, batch_size=4), tmp_path, quiet=True)
    precisions = [line["map_validation"] for line in run.history]
    best = open_run(tmp_path, best=True)
    assert precisions[best.epoch - 1] == max(precisions)
    split = open_data("voc", root, size=32).validation["validation"]
    items = stack(split, range(len(split)))
    with torch.no_grad():
        scores = best.model(items.image)
    known = split.labels >= 0
    expected = np.mean(
        [
            average_precision_score(split.labels[k, n], scores[k, n])
            for n, k in enumerate(known.T)
            if (split.labels[k, n] == 1).any()
        ]
    )
    assert max(precisions) == pytest.approx(expected, abs=1e-6)
    loss = F.binary_cross_entropy_with_logits(scores, (split.labels != 0).float())
    assert run.history[best.epoch - 1]["cross_entropy_validation"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(root, tmp_path):
    # 11 validation images: the processes have different numbers of them.
    of = {"method": "ce", "epochs": 1, "limit": 11, "batch_size": 4, "device": "cpu", "network": "gap_cnn"}
    one = training.train(config_of(root, **of), tmp_path / "one", quiet=True)
    two = training.train(replace(one.config, devices=2), tmp_path / "two", quiet=True)
    for name in ("map_validation", "cross_entropy_validation"):
        assert two.history[0][name] == pytest.approx(one.history[0][name], rel=0.2)
    split = open_data("voc", root, size=32, limit=11).validation["validation"]
    for run in (one, two):
        with torch.no_grad():
            scores = open_run(run.folder, best=False).model(stack(split, range(11)).image)
        expected = measure.average_precision(scores, split.labels).nanmean().item()
        assert run.history[0]["map_validation"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_a_process_without_a_validation_image(tmp_path):
    root = write_labels(tmp_path / "labels", (("train", 12), ("val", 1), ("test", 3)))
    config = config_of(root, "ce", epochs=1, batch_size=4, device="cpu", devices=2)
    run = training.train(config, tmp_path / "run", quiet=True)
    assert run.finished and 0 < run.history[0]["map_validation"] <= 1


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A comparison's folder, its results, and the plan."""
    folder = tmp_path_factory.mktemp("compare")
    plan = Plan({m: config_of(root, m) for m in ("ce", "sib", "energy-loss")}, (0,), OF_MASKS, 12, best=False)
    return folder, compare(plan, folder, console=Console(file=StringIO(), width=150)), plan


def test_a_comparison_measures_each_label_on_its_own_objects(root, finished):
    folder, found, plan = finished
    assert found["data"]["quality"] == "map" and found["data"]["images"] == 12
    keys = [row["key"] for row in found["rows"]]
    assert keys[:2] == ["map/test", "f1/test"] and not any(key.startswith("accuracy") for key in keys)
    data = open_data("voc", root, size=32)
    run = open_run(folder / "runs" / "sib-seed0", best=False)
    pairs, rows = LabelPairs(data.test["test"]), Material(plan, 0).rows
    assert sorted(rows) == rows and len(rows) == 12
    items, expected = stack(pairs, rows), []
    maps = explain.explain(run.model, items.image, items.label, ("gradcam",))["gradcam"]
    for row, one, mask in zip(rows, maps, items.mask, strict=True):
        counted = one * ~pairs.left_out(row)[0]
        expected.append(float((counted * (mask[0] > 0.5)).sum() / counted.sum()) if counted.any() else 0.0)
    stored = json.loads((run.folder / "measured" / "gradcam.json").read_text())["values"]["epg/gradcam"]
    assert stored == pytest.approx(expected, abs=1e-5)
    assert any(pairs.left_out(row).any() for row in rows)
    test = data.test["test"]
    with torch.no_grad():
        scores = run.model(stack(test, range(len(test))).image)
    numbers = next(r["numbers"] for r in found["runs"] if r["method"] == "sib")
    precision = measure.average_precision(scores, test.labels)
    assert numbers["map/test"]["mean"] == pytest.approx(precision.nanmean().item(), abs=1e-5)
    assert numbers["f1/test"]["mean"] == pytest.approx(
        measure.f1_scores(scores, test.labels).nanmean().item(), abs=1e-5
    )
    of_classes = [row["average_precision"]["sib"] for row in found["classes"]["rows"]]
    assert of_classes == pytest.approx(precision.tolist(), abs=1e-5) and found["classes"]["confusion"] == {}
    uniform = [
        float((mask > 0.5).sum() / (~pairs.left_out(row)).sum()) for row, mask in zip(rows, items.mask, strict=True)
    ]
    assert found["chance"] == pytest.approx(np.mean(uniform), abs=1e-6)


def test_the_gallery_shows_every_label_of_an_image_with_several():
    labels = torch.tensor([3, 0, 1, 2, 0, 2, 4])
    images = [5, 6, 6, 7, 8, 8, 9]
    # 6 has two labels; of 8 one was there; then 5, 7 and 9; then what is left, in order.
    assert gallery_of_labels(labels, images).tolist() == [1, 2, 0, 3, 6, 4, 5]
    assert gallery_of_labels(labels, images, count=3).tolist() == [1, 2, 0]


def test_its_page_speaks_of_labels(finished):
    folder, found, _ = finished
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", (folder / "report.html").read_text()))
    for words in (
        "12 labels in the images of the test set", "mAP and cost", "mAP against EPG",
        "Average precision and EPG of every",
        "labels of test images", "evidence for the label lies", "every label that is there", "Mean average precision",
    ):  # fmt: skip
        assert words in page, words
    for words in ("What is taken for what", "says ", "class that the network predicts", "Accuracy and cost"):
        assert words not in page, words
    assert re.search(r"(tells|misses) (aeroplane|bicycle|cat) [✓✗]", page)
    assert "was shown boxes around the objects in 100 %" in page
    told = {line["says"].split()[0]: line["right"] for line in _gallery(folder, found)}
    assert set(told) <= {"tells", "misses"} and told.get("tells", True) and not told.get("misses", False)


def _gallery(folder, found):
    from sib_lab.reporting.page import Examples

    return [network for example in Examples.load(found, folder).figures(found) for network in example["networks"]]


def test_the_same_command_finds_everything_done(finished, monkeypatch):
    folder, found, plan = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}
    again = compare(plan, folder, console=Console(file=StringIO()))
    assert again["rows"] == found["rows"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["values"].update({"map/test": [1.5]}), "from 0 to 1"),
        (lambda content: content["of_classes"].update(images=[1, 2]), "other classes"),
        (lambda content: content["of_classes"].update(average_precision=[2.0, 0.1, 0.1]), "from 0 to 1"),
    ],
)
def test_damaged_measurements_are_told(finished, tmp_path, change, words):
    import shutil

    from sib_lab.reporting import results

    folder = shutil.copytree(finished[0], tmp_path / "copy")
    path = folder / "runs" / "ce-seed0" / "measured" / "map-test.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(results.ReportError, match="damaged"):
        results.collect(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "boxes around the objects"),
        ({"masks": "boxes"}, "boxes around the objects"),
        ({"masks": "segmentations"}, "shown the objects in"),
    ],
)
def test_what_a_loss_was_shown_is_told(tmp_path, options, words):
    root = write_voc(tmp_path, COUNTS)
    plan = Plan({"sib": config_of(root, "sib", data_options=options)}, (0,))
    assert words in loss_sentence(plan, "sib", Material(plan, 0).data)


def test_deletion_and_insertion_are_of_one_label(root, tmp_path):
    plan = Plan({"ce": config_of(root, "ce")}, (0,), ("epg", "deletion"), 12)
    with pytest.raises(RunError, match="deletion is of one label an image"):
        compare(plan, tmp_path, console=Console(file=StringIO()))
    assert not list(tmp_path.glob("runs/*/last.pt"))


def test_explain_names_every_label_from_one_half_on(root, finished, tmp_path, capsys):
    folder, _, _ = finished
    checkpoint = folder / "runs" / "ce-seed0"
    of_run = subject_of_run(checkpoint)
    of_weights, _ = subject_of_network("small_cnn", checkpoint / "best.pt")
    image = next((root / "images").iterdir())
    for subject in (of_run, of_weights):
        assert subject.multilabel and subject.classes == ("aeroplane", "bicycle", "cat")
        with torch.no_grad():
            list(subject.model.parameters())[-1].copy_(torch.tensor([9.0, -9.0, 8.0]))
        console = Console(file=StringIO(), width=200)
        results = explain_files(subject, [image], tmp_path / "one.png", ("gradcam",), console=console)
        line = console.file.getvalue()
        assert results[0][0] in ("aeroplane", "cat") and results[0][1] > 0.9
        assert line.count("%") == 3 and "aeroplane (" in line and "cat (" in line and "explained: " in line


def test_the_official_layout_trains_too(tmp_path):
    root = write_voc(tmp_path / "voc", COUNTS)
    config = config_of(root, "sib", data_options={"masks": "segmentations"}, epochs=1)
    run = training.train(config, tmp_path / "run", quiet=True)
    assert run.finished and math.isfinite(run.history[0]["background_input"])
