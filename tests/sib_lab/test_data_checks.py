"""What a look at a data set tells before a training, from the library and from ``sib-lab check``."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_samples import save, write_folder
from PIL import Image
from sib_lab.cli import commands
from sib_lab.data import DataError, open_data
from sib_lab.data.checks import check
from typer.testing import CliRunner

SHARED = Path(os.environ.get("SIB_EXT_SHARED", Path(__file__).parents[3] / "shared"))


def repainted(root, change):
    """The folder with every mask [H,W] in {0,1} replaced."""
    for path in (root / "masks").rglob("*.png"):
        save(path, change(np.asarray(Image.open(path)) // 255))
    return root


def test_a_good_folder_has_no_problem(tmp_path):
    report = check(open_data("folder", write_folder(tmp_path), size=32), most=5)
    assert report.problems == () and report.classes == ("cat", "dog", "owl")
    assert sum(sum(split.images) for split in report.splits.values()) == 24
    for split in report.splits.values():
        assert split.annotated == 1 and len(split.areas) <= 5
        assert all(0.03 < area < 0.2 for area in split.areas) and set(split.edges) == {0}
    report.stop()


def test_sets_without_files_can_be_checked():
    report = check(open_data("digits", train=64, validation=20, test=20, copies=1), most=4)
    assert report.problems == () and list(report.splits)[0] == "train"


@pytest.mark.parametrize(
    "change, options, sentence",
    [
        (lambda mask: mask * 0, {}, "15 of the 15 masks that were looked at mark nearly nothing .* mask_values"),
        (lambda mask: mask, {"mask_values": "7"}, "mark nearly nothing"),
        (lambda mask: 255 - mask * 255, {}, "cover the edge of the image and most of it.* invert_masks=true"),
        (lambda mask: mask * 0 + 255, {}, "mark nearly the whole image"),
    ],
)
def test_masks_that_cannot_be_right_are_told(tmp_path, change, options, sentence):
    root = repainted(write_folder(tmp_path), change)
    report = check(open_data("folder", root, size=32, **options), most=5)
    assert len(report.problems) == 1
    with pytest.raises(DataError, match=sentence.replace("15 of the 15", r"\d+ of the \d+")):
        report.stop()


def test_black_images_and_single_images_are_told(tmp_path):
    root = write_folder(tmp_path / "train", masks=False, count=4)
    write_folder(tmp_path / "test", masks=False, count=2)
    write_folder(tmp_path / "val", masks=False, count=2)
    for path in tmp_path.rglob("*.jpg"):
        save(path, np.full((30, 30), 4095 // 8, np.uint16))
    for place in (1, 2, 3):
        (root / f"owl/{place}.jpg").unlink()
    report = check(open_data("folder", tmp_path, size=32))
    assert "nearly black: 16-bit images are read by their whole range" in report.problems[0]
    assert report.problems[1] == (
        "1 of 3 classes have fewer than 2 training images (owl): add images, remove the class everywhere, or raise the "
        "limit if one was set."
    )


def sib_lab_check(root, *words):
    return CliRunner().invoke(commands.app, ["check", "--root", str(root), "--size", "32", *map(str, words)])


def test_the_command_shows_counts_and_a_picture(tmp_path):
    root = write_folder(tmp_path / "a", classes=("cat", "[red]dog", "$owl_1^$"))
    (root / "cat" / "notes.txt").write_text("")
    done = sib_lab_check(root, "--out", tmp_path / "out" / "check.png")
    assert done.exit_code == 0, done.output
    assert "[red]dog" in done.output
    assert "train: 100% of the images are annotated; the object covers" in done.output
    assert "Left out: 1 .txt are no pictures" in done.output
    with Image.open(tmp_path / "out" / "check.png") as picture:
        assert min(picture.size) > 500


def test_the_command_fails_where_something_cannot_be_right(tmp_path):
    root = repainted(write_folder(tmp_path), lambda mask: 255 - mask * 255)
    done = sib_lab_check(root, "--out", tmp_path / "check.png")
    assert done.exit_code == 1 and "invert_masks=true" in done.stderr and (tmp_path / "check.png").is_file()
    again = sib_lab_check(root, "--out", tmp_path / "check.png", "--option", "invert_masks=true")
    assert again.exit_code == 0
    assert "must end in one of .png" in sib_lab_check(root, "--out", tmp_path / "check.txt").stderr
    assert "root is not a folder" in sib_lab_check(tmp_path / "nowhere").stderr


@pytest.mark.parametrize(
    "archive, name, counts",
    [
        ("waterbirds2k", "waterbirds", [1360, 160, 600]),
        ("cub20", "folder", [522, 78, 594]),
        ("pets3", "folder", [360, 60, 180]),
    ],
)
def test_real_photographs_have_no_problem(archive, name, counts, tmp_path):
    path = SHARED / "data" / "photos" / f"{archive}.zip"
    if not path.is_file():
        pytest.skip("needs the shared photographs")
    shutil.unpack_archive(path, tmp_path)
    data = open_data(name, tmp_path, size=64)
    assert [len(split) for split in data.splits().values()] == counts
    assert check(data, most=20).problems == () and data.skipped == ()
    assert len(data.identity()["train"]) == counts[0]
