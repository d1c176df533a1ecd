"""Several labels an image: Pascal VOC's official layout, tables, and the pairs that are explained."""

import pytest
import torch
from data_samples import VOC_CLASSES, VOC_COLOURS, voc_photographs, write_labels, write_voc
from sib_lab.data import DataError, open_data, set_epoch, stack
from sib_lab.data.checks import check
from sib_lab.data.identity import changed
from sib_lab.data.labelled import ABSENT, DIFFICULT, PRESENT, LabelPairs

SIZE = 40


@pytest.fixture(params=["official", "tables"])
def written(request, tmp_path):
    """The root of a tiny copy in each layout."""
    return {"official": write_voc, "tables": write_labels}[request.param](tmp_path)


def opened(root, **options):
    return open_data("voc", root, size=SIZE, **options)


def expected(objects):
    """Labels [K], and which classes are there."""
    sure = {label for label, _, difficult in objects if not difficult}
    there = {label for label, _, _ in objects}
    labels = torch.tensor(
        [PRESENT if n in sure else DIFFICULT if n in there else ABSENT for n in range(3)], dtype=torch.int64
    )
    return labels, there


def test_labels_and_masks_are_those_of_each_object(written):
    data = opened(written)
    assert data.multilabel and data.quality == "map" and data.classes == VOC_CLASSES
    assert [len(s) for s in (data.train, data.validation["validation"], data.test["test"])] == [12, 6, 9]
    seen = set()
    for seed, (split, count) in enumerate([(data.train, 12), (data.test["test"], 9)]):
        for row, objects in enumerate(voc_photographs(count, 2 * seed)):
            labels, there = expected(objects)
            seen |= set(labels.tolist())
            item = split[row]
            assert split.labels[row].tolist() == labels.tolist()
            assert item.label.tolist() == (labels != ABSENT).float().tolist()
            assert item.annotated.nonzero()[:, 0].tolist() == sorted(there)
            assert item.mask.shape == (3, SIZE, SIZE)
            for number in range(3):
                whole = torch.zeros(SIZE, SIZE)
                for label, (x1, y1, x2, y2), _ in objects:
                    if label == number:
                        whole[y1:y2, round(x1 * SIZE / 60) : round(x2 * SIZE / 60)] = 1
                assert (item.mask[number] - whole).abs().mean() < 0.03, (row, number)
    assert seen == {PRESENT, ABSENT, DIFFICULT}


def test_pairs_are_every_label_that_is_there_and_leave_difficult_objects_out(written):
    test = opened(written).test["test"]
    pairs = LabelPairs(test)
    assert len(pairs) == int((test.labels == PRESENT).sum())
    assert pairs.annotated.all()
    both, left_out = 0, 0
    for row in range(len(pairs)):
        objects = voc_photographs(9, 2)[pairs.rows[row]]
        item, out = pairs[row], pairs.left_out(row)
        assert item.mask.shape == out.shape == (1, SIZE, SIZE) and item.annotated is True
        label = item.label
        mine = [(box, difficult) for of, box, difficult in objects if of == label]
        assert item.mask.sum() == pytest.approx(
            sum((x2 - x1) * (y2 - y1) * SIZE / 60 for (x1, y1, x2, y2), difficult in mine if not difficult), rel=0.1
        )
        assert bool(out.any()) == any(difficult for _, difficult in mine)
        assert not (out & (item.mask > 0.5)).any()
        both, left_out = both + (len(mine) > 1), left_out + bool(out.any())
    assert both and left_out


def test_difficult_pixels_under_another_object_stay_in_it(tmp_path):
    root = write_labels(tmp_path)
    file = "images/200000.png"
    lines = [line for line in (root / "boxes.csv").read_text().splitlines() if file not in line]
    (root / "boxes.csv").write_text("\n".join([*lines, f"{file},0,0,30,40,cat,0", f"{file},15,0,60,40,cat,1", ""]))
    images = (root / "images.csv").read_text().splitlines()
    (root / "images.csv").write_text(
        "\n".join(f"{file},test,cat" if line.startswith(file) else line for line in images) + "\n"
    )
    pairs = LabelPairs(opened(root).test["test"])
    row = pairs.rows.index(0)
    assert pairs[row].mask.mean() == pytest.approx(0.5, abs=0.02)
    assert pairs.left_out(row).float().mean() == pytest.approx(0.5, abs=0.02)


def test_masks_follow_augmentation_and_what_is_cropped_out_is_not_known(written):
    data = opened(written, augment=True)
    cropped = 0
    for epoch in range(6):
        set_epoch(data.train, epoch)
        for row, objects in enumerate(voc_photographs(12, 0)):
            item = data.train[row]
            image = (item.image + 1) / 2
            for label in {of for of, _, _ in objects}:
                distance = (image - torch.tensor(VOC_COLOURS[label] / 255.0)[:, None, None]).abs().amax(0)
                mask = item.mask[label]
                assert (distance[mask > 0.9] < 0.2).all() and (distance[mask < 0.1] > 0.2).all()
                known = bool(item.annotated[label])
                assert known == bool((mask > 0.5).any())
                cropped += not known
            assert item.label.sum() == len({of for of, _, _ in objects})
    assert cropped


def test_segmentations_and_their_undecided_pixels(tmp_path):
    data = opened(write_voc(tmp_path), masks="segmentations")
    assert data.train.annotated.tolist() == [row % 2 == 0 for row in range(12)]
    assert not data.train[1].annotated.any() and not data.train[1].mask.any()
    assert data.train[0].annotated.sum() == len({label for label, _, _ in voc_photographs(12, 0)[0]})
    pairs = LabelPairs(data.test["test"])
    assert pairs.annotated.tolist() == [row % 2 == 0 for row in pairs.rows]
    out = pairs.left_out(0)
    objects = voc_photographs(9, 2)[0]
    lines = sum(2 * (x2 - x1) * SIZE / 60 for _, (x1, _, x2, _), _ in objects)
    assert out.sum() == pytest.approx(lines, rel=0.15)


def test_a_share_of_the_annotations_is_that_of_images_and_grows(written):
    some, more = (opened(written, annotated=share).train.annotated for share in (0.25, 0.5))
    assert (some.sum(), more.sum()) == (3, 6) and (more | ~some).all()
    data = opened(written, annotated=0.25)
    hidden = int((~data.train.annotated).nonzero()[0])
    assert not data.train[hidden].annotated.any() and data.test["test"].annotated.all()


def test_identity_tells_what_changed(tmp_path):
    root = write_labels(tmp_path)
    before = opened(root).identity()
    assert changed(before, opened(root).identity()) is None
    boxes = (root / "boxes.csv").read_text()
    (root / "boxes.csv").write_text(boxes.replace(",4,4,20,24,aeroplane", ",5,4,20,24,aeroplane", 1))
    assert "1 mask differs" in changed(before, opened(root).identity())
    (root / "boxes.csv").write_text(boxes)
    images = (root / "images.csv").read_text()
    (root / "images.csv").write_text(images.replace("aeroplane\n", "aeroplane cat\n", 1))
    assert "1 label differs" in changed(before, opened(root).identity())


def test_counts_and_limit(written):
    report = check(opened(written))
    assert report.problems == () and report.splits["train"].count == 12
    assert sum(report.splits["train"].images) == sum(
        len({of for of, _, _ in objects}) for objects in voc_photographs(12, 0)
    )
    assert len(opened(written, limit=8).train) == 8


def test_splits_that_are_missing_are_drawn(tmp_path):
    official = opened(write_voc(tmp_path / "a", counts=(("train", 30), ("val", 9))), validation_share=0.3)
    assert len(official.test["test"]) == 9  # val takes its place
    assert len(official.train) + len(official.validation["validation"]) == 30
    tables = opened(write_labels(tmp_path / "b", counts=(("train", 40),)))
    names = [
        {str(p.image) for p in s.samples} for s in (tables.train, *tables.validation.values(), *tables.test.values())
    ]
    assert all(names) and sum(map(len, names)) == len(set.union(*names)) == 40


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("images.csv", "images/000000.png,train,cat", "for the second time"),
        ("images.csv", "images/x.png,dev,cat", "has the split 'dev'"),
        ("boxes.csv", "images/y.png,0,0,9,9,cat,0", "which images.csv does not"),
        ("boxes.csv", "images/000000.png,0,0,9,9,dog,0", "has the class 'dog'"),
        ("boxes.csv", "images/000000.png,0,0,,9,aeroplane,0", "has no four numbers"),
        ("boxes.csv", "images/000000.png,0,0,9,9,aeroplane,2", "has no four numbers, or difficult"),
        ("boxes.csv", "images/000000.png,0,0,900,9,aeroplane,0", "reaches out of the image"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, file, line, words):
    root = write_labels(tmp_path)
    with open(root / file, "a") as table:
        table.write(line + "\n")
    with pytest.raises(DataError, match=words) as caught:
        opened(root)
    assert "skip_broken" in str(caught.value)
    data = opened(root, skip_broken=True)
    assert any(words in reason for reason in data.skipped) and len(data.train) >= 11


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda root: None, {"masks": "both"}, "masks must be one of"),
        (lambda root: None, {"annotation": "boxes"}, "leave annotation out"),
        (lambda root: (root / "images.csv").unlink(), {}, "neither images.csv nor"),
        (lambda root: (root / "images.csv").write_text("file,split\n"), {}, "has no column classes"),
        (lambda root: (root / "images.csv").write_text("file,split,classes\na.png,train,cat\n"), {}, "names 1 classes"),
        (lambda root: (root / "images" / "000003.png").unlink(), {}, "cannot be used"),
        (lambda root: None, {"masks": "segmentations"}, "goes with boxes alone"),
    ],
)
def test_what_cannot_be_opened(tmp_path, change, options, words):
    root = write_labels(tmp_path)
    change(root)
    with pytest.raises(DataError, match=words):
        opened(root, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda base: (base / "Annotations" / "000000.xml").unlink(), "000000.xml is missing"),
        (lambda base: (base / "Annotations" / "000000.xml").write_text("<annotation"), "cannot be read as an XML"),
        (
            lambda base: (base / "Annotations" / "000000.xml").write_text(
                "<annotation><object><name>owl</name></object></annotation>"
            ),
            "without four numbers in bndbox",
        ),
        (lambda base: (base / "ImageSets" / "Main" / "train.txt").unlink(), "train.txt is missing"),
        (lambda base: base.rename(base.with_name("other")), "neither images.csv nor"),
        (lambda base: (base.with_name("VOC2012") / "JPEGImages").mkdir(parents=True), "give one of them as root"),
    ],
)
def test_an_official_layout_that_cannot_be_opened(tmp_path, change, words):
    root = write_voc(tmp_path)
    change(root / "VOCdevkit" / "VOC2007")
    with pytest.raises(DataError, match=words):
        opened(root)


def test_a_broken_annotation_is_left_out_and_a_devkit_may_be_the_root(tmp_path):
    root = write_voc(tmp_path)
    base = root / "VOCdevkit" / "VOC2007"
    (base / "Annotations" / "000000.xml").unlink()
    data = opened(root / "VOCdevkit", skip_broken=True)
    assert len(data.train) == 11 and "000000.xml is missing" in data.skipped[0]
    assert len(opened(base, skip_broken=True).train) == 11


def test_classes_without_a_training_image_are_named(tmp_path):
    root = write_labels(tmp_path)
    lines = (root / "images.csv").read_text().splitlines()
    (root / "images.csv").write_text(
        "\n".join([lines[0].replace(" cat", ""), *lines[1:], "images/z.png,test,owl"]) + "\n"
    )
    with pytest.raises(DataError, match=r"1 of 4 classes have no training image \(owl\)"):
        opened(root, skip_broken=True)


def test_an_image_without_labels_and_one_without_boxes(tmp_path):
    root = write_labels(tmp_path)
    lines = (root / "images.csv").read_text().splitlines()
    lines = ["images/000000.png,train," if line.startswith("images/000000") else line for line in lines]
    (root / "images.csv").write_text("\n".join(lines) + "\n")
    boxes = (root / "boxes.csv").read_text().splitlines()
    (root / "boxes.csv").write_text(
        "\n".join(b for b in boxes if not b.startswith(("images/000000", "images/200000"))) + "\n"
    )
    data = opened(root)
    items = stack(data.train, [0, 1])
    assert items.label[0].sum() == 0 and not items.annotated[0].any() and items.annotated[1].any()
    pairs = LabelPairs(data.test["test"])
    assert not pairs.annotated[[row == 0 for row in pairs.rows]].any() and pairs.annotated.any()


def test_a_split_without_labels_is_refused(tmp_path):
    root = write_labels(tmp_path)
    lines = [
        ",".join([*line.split(",")[:2], ""]) if ",val," in line else line
        for line in (root / "images.csv").read_text().splitlines()
    ]
    (root / "images.csv").write_text("\n".join(lines) + "\n")
    boxes = [line for line in (root / "boxes.csv").read_text().splitlines() if not line.startswith("images/1")]
    (root / "boxes.csv").write_text("\n".join(boxes) + "\n")
    with pytest.raises(DataError, match="no image of the validation split has a label"):
        opened(root)
