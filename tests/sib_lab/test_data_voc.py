"""Several labels an image: Pascal VOC's official layout, tables, and the pairs that are explained."""

import numpy as np
import pytest
import torch
from data_samples import VOC_CLASSES, VOC_COLOURS, save, voc_photographs, write_labels, write_voc
from PIL import Image
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
        ("boxes.csv", "images/000000.png,0,0,0.5,1,aeroplane,0", "0..1 where others are in pixels"),
        ("images.csv", ",train,cat", "names no file"),
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


# ------------------------------------------------------------------------------- what a first version got wrong


def test_the_order_of_a_table_or_list_changes_nothing(tmp_path):
    for root, table in ((write_labels(tmp_path / "a"), "images.csv"), (write_voc(tmp_path / "b"), None)):
        path = root / table if table else root / "VOCdevkit/VOC2007/ImageSets/Main/train.txt"
        before = opened(root)
        head, *lines = path.read_text().splitlines() if table else ["", *path.read_text().splitlines()]
        path.write_text("\n".join([head, *lines[::-1]] if table else lines[::-1]) + "\n")
        now = opened(root)
        assert [s.image for s in now.train.samples] == [s.image for s in before.train.samples]
        assert changed(before.identity(), now.identity()) is None


def test_another_order_of_images_is_told():
    one = {"train": {"a": "1 - cat", "b": "2 - dog"}, "test/test": {"c": "3 - cat"}}
    other = {**one, "train": dict(reversed(one["train"].items()))}
    assert changed(one, other) == "the images of the training split are in another order"
    assert changed(one, dict(one)) is None


def test_difficult_objects_stay_difficult_where_there_are_label_maps(tmp_path):
    write_voc(tmp_path, segmented=1)
    boxes, maps = opened(tmp_path), opened(tmp_path, masks="segmentations")
    one, two = LabelPairs(boxes.test["test"]), LabelPairs(maps.test["test"])
    assert torch.equal(boxes.test["test"].labels, maps.test["test"].labels)
    assert torch.equal(boxes.train.labels, maps.train.labels) and (maps.train.labels == DIFFICULT).any()
    assert one.rows == two.rows and torch.equal(one.labels, two.labels)
    alike = 0
    for row in range(len(one)):
        # The squares are the boxes: only the undecided lines above them differ.
        assert (one[row].mask - two[row].mask).abs().mean() < 0.03
        if one.left_out(row).any():
            alike += 1
            assert two.left_out(row)[one.left_out(row)].float().mean() > 0.9
    assert alike
    for row in range(12):
        assert (boxes.train[row].mask - maps.train[row].mask).abs().mean() < 0.03


def test_boxes_of_segmented_images_alone(tmp_path):
    root = write_voc(tmp_path)
    base = root / "VOCdevkit/VOC2007"
    save(base / "SegmentationClass" / "000000.png", np.zeros((40, 60), np.uint8))
    maps, boxes = (opened(root, masks="segmentations", annotation=of) for of in ("masks", "boxes"))
    assert not maps.train[0].mask.any() and boxes.train[0].mask.any() and not boxes.train[1].mask.any()
    assert torch.equal(maps.test["test"][0].mask, boxes.test["test"][0].mask)


def test_boxes_of_photographs_that_are_turned_are_of_the_upright_ones(tmp_path):
    root = write_labels(tmp_path)
    upright = np.zeros((60, 40, 3), np.uint8)
    upright[50:58, 4:36] = 255
    image = Image.fromarray(upright).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(root / "images/000000.png", exif=exif)
    lines = [line for line in (root / "boxes.csv").read_text().splitlines() if "000000" not in line]
    (root / "boxes.csv").write_text("\n".join([*lines, "images/000000.png,4,50,36,58,aeroplane,0", ""]))
    data = opened(root, limit=None)
    item = data.train[0]
    assert data.train.samples[0].image.name == "000000.png"
    white, mask = item.image.amin(0) > 0, item.mask.amax(0) > 0.5
    assert mask.any() and (white == mask).float().mean() > 0.97


def test_an_image_with_a_line_that_cannot_be_read_is_left_out_whole(tmp_path):
    root = write_labels(tmp_path)
    with open(root / "boxes.csv", "a") as table:
        table.write("images/000001.png,0,0,sixty,9,bicycle,0\n")
    with open(root / "images.csv", "a") as table:
        table.write("images/000002.png,,\n")
    data = opened(root, skip_broken=True)
    names = [sample.image.stem for sample in data.train.samples]
    assert len(names) == 10 and "000001" not in names and "000002" not in names and len(data.skipped) == 2


def test_boxes_as_shares(tmp_path):
    root = write_labels(tmp_path)
    pixels = opened(root)
    head, *lines = (root / "boxes.csv").read_text().splitlines()
    shares = []
    for line in lines:
        file, x1, y1, x2, y2, *rest = line.split(",")
        shares.append(
            ",".join([file, *(str(int(v) / n) for v, n in zip((x1, y1, x2, y2), (60, 40, 60, 40), strict=True)), *rest])
        )
    (root / "boxes.csv").write_text("\n".join([head, *shares]) + "\n")
    of_shares = opened(root)
    for row in range(len(pixels.train)):
        assert (pixels.train[row].mask - of_shares.train[row].mask).abs().max() < 0.02


def test_pictures_full_of_objects_are_no_problem(tmp_path):
    root = write_labels(tmp_path)
    head, *lines = (root / "boxes.csv").read_text().splitlines()
    whole = [",".join([line.split(",")[0], "0,0,60,40", *line.split(",")[5:]]) for line in lines]
    (root / "boxes.csv").write_text("\n".join([head, *whole]) + "\n")
    assert check(opened(root)).problems == ()


@pytest.mark.parametrize("content", [b"", b"cut", "RGB", "1"])
def test_label_maps_that_cannot_be_read(tmp_path, content):
    root = write_voc(tmp_path)
    path = root / "VOCdevkit/VOC2007/SegmentationClass/000000.png"
    if isinstance(content, str):
        Image.new(content, (60, 40)).save(path)
    else:
        path.write_bytes(path.read_bytes()[: 60 if content else 0])
    with pytest.raises(DataError, match=r"000000\.png"):
        opened(root, masks="segmentations", skip_broken=False).train[0]
    data = opened(root, masks="segmentations", skip_broken=True)
    assert len(data.train) == 11 and "000000.png" in data.skipped[0]


def test_an_annotation_without_objects(tmp_path):
    root = write_voc(tmp_path, segmented=1)
    (root / "VOCdevkit/VOC2007/Annotations/000000.xml").write_text("<annotation></annotation>")
    for masks in ("boxes", "segmentations"):
        data = opened(root, masks=masks)
        assert not data.train[0].label.any() and not data.train[0].annotated.any()
        assert check(data).problems == ()


def test_large_label_maps_are_read_as_much_smaller_as_their_images(tmp_path, monkeypatch):
    monkeypatch.setattr("sib_lab.data.images.LARGE", 40 * 60 - 1)
    root = write_voc(tmp_path, segmented=1)
    base = root / "VOCdevkit/VOC2007"
    image, labels = np.zeros((41, 61, 3), np.uint8), np.zeros((41, 61), np.uint8)
    image[5:21, 7:31], labels[5:21, 7:31] = 255, 1
    save(base / "JPEGImages/000000.jpg", image)
    save(base / "SegmentationClass/000000.png", labels)
    for skip_broken in (False, True):
        data = opened(root, masks="segmentations", skip_broken=skip_broken)
        item = data.train[0]
        assert len(data.train) == 12 and ((item.image.amin(0) > 0) == (item.mask[0] > 0.5)).float().mean() > 0.95
    save(base / "SegmentationClass/000000.png", labels[:, :50])
    with pytest.raises(DataError, match="50 x 41 px, but its image"):
        opened(root, masks="segmentations")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('<?xml version="1.0" encoding="gbk"?><annotation/>', "cannot be read as an XML"),
        ('<?xml version="1.0" encoding="foo"?><annotation/>', "cannot be read as an XML"),
        (
            "<annotation><object><name>cat</name><difficult>maybe</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>"
            "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>",
            "difficult is neither 0 nor 1",
        ),
    ],
)
def test_odd_annotations_are_told(tmp_path, text, words):
    root = write_voc(tmp_path)
    (root / "VOCdevkit/VOC2007/Annotations/000000.xml").write_text(text)
    with pytest.raises(DataError, match=words):
        opened(root)
    assert len(opened(root, skip_broken=True).train) == 11


def test_an_image_in_two_splits_is_refused(tmp_path):
    lists = write_voc(tmp_path / "a") / "VOCdevkit/VOC2007/ImageSets/Main"
    (lists / "train.txt").write_text((lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    with pytest.raises(DataError, match="is in the train and the validation split"):
        opened(tmp_path / "a")
    root = write_labels(tmp_path / "b")
    with open(root / "images.csv", "a") as table:
        table.write("./images/000000.png,test,cat\n")
    with pytest.raises(DataError, match="for the second time"):
        opened(root)


def test_labels_are_told_apart_whatever_signs_their_names_have(tmp_path):
    root = write_labels(tmp_path)
    path = root / "images.csv"
    more = ["images/000000.png,train,a+b", "images/000001.png,train,a b", "images/000002.png,train,a b"]
    lines = [line for line in path.read_text().splitlines() if not line.startswith(tuple(m[:17] for m in more))]
    (root / "boxes.csv").unlink()
    path.write_text("\n".join([*lines, *more]) + "\n")
    before = opened(root).identity()
    path.write_text("\n".join([*lines, more[0], "images/000001.png,train,a+b", more[2]]) + "\n")
    assert "1 label differs" in changed(before, opened(root).identity())


def test_tables_with_blanks_and_other_separators_of_paths(tmp_path):
    root = write_labels(tmp_path)
    before = opened(root).identity()
    for name in ("images.csv", "boxes.csv"):
        head, *lines = (root / name).read_text().splitlines()
        lines = [line.replace("images/", "images\\", 1).replace(",", " , ") + "  " for line in lines]
        (root / name).write_text("\n".join([head.replace(",", " ,") + " ", *lines]) + "\n")
    assert changed(before, opened(root).identity()) is None
    lists = write_voc(tmp_path / "b") / "VOCdevkit/VOC2007/ImageSets/Main/train.txt"
    lists.write_text(lists.read_text().replace("\n", "  \n"))
    assert len(opened(tmp_path / "b").train) == 12
