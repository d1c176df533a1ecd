"""Tiny data sets in their real layouts: images of a red square on blue whose red channel is the square's mask."""

import csv
import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image

RED_ON_BLUE = np.array([[0, 0, 255], [255, 0, 0]], dtype=np.uint8)


def square(rng: np.random.Generator, width: int = 0, height: int = 0) -> np.ndarray:
    """A mask [h,w] uint8 in {0,1} of a square well inside the middle of an image of 40 to 70 px."""
    width, height = width or int(rng.integers(40, 71)), height or int(rng.integers(40, 71))
    side = min(width, height) // 3
    y, x = (int(rng.integers(length // 4, length // 4 + length // 8)) for length in (height, width))
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[y : y + side, x : x + side] = 1
    return mask


def save(path: Path, values: np.ndarray) -> Path:
    """Losslessly, whatever the suffix says (readers go by the content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, format="PNG")
    return path


def save_picture(path: Path, mask: np.ndarray) -> Path:
    return save(path, RED_ON_BLUE[mask])


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of the square, x2 and y2 excluded."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def write_xml(path: Path, boxes, size: tuple[int, int] | None = None) -> None:
    inside = "".join(
        "<object><name>it</name><bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = "" if size is None else f"<width>{size[0]}</width><height>{size[1]}</height>"
    path.write_text(f"<annotation><folder>02085620</folder><size>{sides}<depth>3</depth></size>{inside}</annotation>")


def write_cifar100(root: Path, monkeypatch, classes: int = 3) -> Path:
    """cifar-100-python with 6 training and 2 test images a class; torchvision is told the files' sums."""
    from torchvision.datasets import CIFAR100

    rng = np.random.default_rng(0)
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    sums = {}
    for name, count in (("train", 6), ("test", 2)):
        labels = [label for label in range(classes) for _ in range(count)]
        data = rng.integers(0, 256, (len(labels), 3 * 32 * 32), dtype=np.uint8)
        sums[name] = _pickle(folder / name, {"data": data, "fine_labels": labels})
    sums["meta"] = _pickle(folder / "meta", {"fine_label_names": [f"kind {label}" for label in range(classes)]})
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return root


def _pickle(path: Path, content) -> str:
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cub200(root: Path, classes: int = 3) -> Path:
    """CUB_200_2011 with 5 training and 3 test images a class, and segmentations beside it."""
    rng = np.random.default_rng(1)
    base = root / "CUB_200_2011"
    tables = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes", "classes")}
    key = 0
    for label in range(1, classes + 1):
        folder = f"{label:03d}.Grey_Bird_{label}"
        tables["classes"].append(f"{label} {folder}")
        for place in range(8):
            key += 1
            mask = square(rng)
            name = f"{folder}/Grey_Bird_{label}_{place:04d}_{key}"
            save_picture(base / "images" / f"{name}.jpg", mask)
            save(root / "segmentations" / f"{name}.png", mask * 255)
            x1, y1, x2, y2 = box_of(mask)
            tables["images"].append(f"{key} {name}.jpg")
            tables["image_class_labels"].append(f"{key} {label}")
            tables["train_test_split"].append(f"{key} {int(place < 5)}")
            tables["bounding_boxes"].append(f"{key} {x1:.1f} {y1:.1f} {x2 - x1:.1f} {y2 - y1:.1f}")
    for name, lines in tables.items():
        (base / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def write_dogs(root: Path) -> Path:
    """Images, Annotation (files without suffix) and lists with 4 training and 2 test images of 3 breeds."""
    from scipy.io import savemat

    rng = np.random.default_rng(2)
    listed = {"train": [], "test": []}
    for label, breed in enumerate(("n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02085936-Maltese_dog")):
        for place in range(6):
            mask = square(rng)
            name = f"{breed}/{breed[:9]}_{place}"
            save_picture(root / "Images" / f"{name}.jpg", mask)
            write_xml(root / "Annotation" / name, [box_of(mask)], mask.shape[::-1])
            listed["train" if place < 4 else "test"].append((name, label + 1))
    (root / "lists").mkdir()
    for part, entries in listed.items():
        cells = {"file_list": [f"{name}.jpg" for name, _ in entries], "annotation_list": [name for name, _ in entries]}
        table = {key: np.array(values, dtype=object)[:, None] for key, values in cells.items()}
        table["labels"] = np.array([[label] for _, label in entries], dtype=np.uint8)
        savemat(root / "lists" / f"{part}_list.mat", table)
    return root


def write_pets(root: Path) -> Path:
    """oxford-iiit-pet with 4 trainval and 2 test images of 3 breeds, and trimaps whose outline is unclassified (3)."""
    rng = np.random.default_rng(3)
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    lines = {"trainval": [], "test": []}
    for label, breed in enumerate(("Abyssinian", "american_bulldog", "Maine_Coon"), start=1):
        for place in range(6):
            mask = square(rng)
            x1, y1, x2, y2 = box_of(mask)
            trimap = np.where(mask == 1, 3, 2).astype(np.uint8)
            trimap[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] = 1
            name = f"{breed}_{place}"
            save_picture(base / "images" / f"{name}.jpg", mask)
            save(base / "annotations" / "trimaps" / f"{name}.png", trimap)
            lines["trainval" if place < 4 else "test"].append(f"{name} {label} 1 1")
    for split, entries in lines.items():
        (base / "annotations" / f"{split}.txt").write_text("\n".join(entries) + "\n")
    return root


def write_imagenet(root: Path) -> Path:
    """train/ and val/ with 4 and 2 images of 3 classes, meta.bin, and XML boxes for val and for half of train."""
    rng = np.random.default_rng(4)
    wnids = ("n01440764", "n01443537", "n02086240")
    for wnid in wnids:
        for split, count in (("train", 4), ("val", 2)):
            for place in range(count):
                mask = square(rng)
                stem = f"{wnid}_{place}" if split == "train" else f"ILSVRC2012_val_{wnid[1:]}{place}"
                save_picture(root / split / wnid / f"{stem}.JPEG", mask)
                if split == "val":
                    write_xml(root / "Annotations" / "val" / f"{stem}.xml", [box_of(mask)], mask.shape[::-1])
                elif place % 2:
                    write_xml(root / "Annotations" / wnid / f"{stem}.xml", [box_of(mask)], mask.shape[::-1])
    names = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish",), "n02086240": ("Shih-Tzu",)}
    torch.save((names, []), root / "meta.bin")
    return root


def write_folder(root: Path, classes=("cat", "dog", "owl"), count: int = 8, masks: bool = True) -> Path:
    """Class folders, and masks of the same paths in masks/."""
    rng = np.random.default_rng(5)
    for name in classes:
        for place in range(count):
            mask = square(rng)
            save_picture(root / name / f"{place}.jpg", mask)
            if masks:
                save(root / "masks" / name / f"{place}.png", mask * 255)
    return root


def write_objects(root: Path, classes=("ball", "cube", "ring", "star"), objects: int = 5, views: int = 2) -> Path:
    """images/<class>/<object>/ of red squares on blue, and masks of the same paths."""
    rng = np.random.default_rng(6)
    for name in classes:
        for number in range(1, objects + 1):
            for view in range(views):
                mask = square(rng)
                save_picture(root / "images" / name / str(number) / f"{view}.png", mask)
                save(root / "masks" / name / str(number) / f"{view}.png", mask * 255)
    return root


def write_backgrounds(root: Path, groups=("forest", "sea"), count: int = 5) -> Path:
    """Plain pictures: green grows with the group, blue with the file, no red."""
    for group, name in enumerate(groups):
        for place in range(count):
            colour = np.array([0, 50 + 100 * group, 20 * place], dtype=np.uint8)
            save(root / name / f"{place}.png", np.broadcast_to(colour, (60, 80, 3)).copy())
    return root


WATERBIRDS = {"train": (4, 1, 1, 3), "val": (2, 2, 2, 2), "test": (3, 3, 3, 3)}  #: of (bird, background) 00, 01, 10, 11


def write_waterbirds(root: Path, original: bool = False, times: int = 1) -> Path:
    """images/ and metadata.csv as in the subset, or as in the original release; the first of each kind has no box."""
    rng = np.random.default_rng(8)
    rows = []
    for number, (split, counts) in enumerate(WATERBIRDS.items()):
        for group, count in enumerate(counts):
            for place in range(times * count):
                mask = square(rng)
                name = f"images/00{group}.Bird/{split}_{place}.jpg"
                save_picture(root / name, mask)
                bird, water = divmod(group, 2)
                if original:
                    rows.append({"img_id": len(rows), "img_filename": name, "y": bird, "split": number, "place": water})
                else:
                    box = dict(zip(("x1", "y1", "x2", "y2"), box_of(mask) if place else ("",) * 4, strict=True))
                    rows.append({"file": name, "split": split, "waterbird": bird, "on_water": water, **box})
    with open(root / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root


VOC_CLASSES = ("aeroplane", "bicycle", "cat")  #: of the tiny copies
VOC_COLOURS = np.array([[255, 0, 0], [0, 255, 0], [255, 255, 0]], dtype=np.uint8)
#: x1, y1, x2, y2 of the places that objects stand at, px of an image of 60 x 40.
VOC_PLACES = ((4, 4, 20, 24), (36, 12, 56, 36))


def voc_photographs(count: int, seed: int) -> list[list[tuple[int, tuple[int, int, int, int], int]]]:
    """Objects (class, box, difficult) of each image: all pairs of classes in turn, some of the second ones
    difficult."""
    found = []
    for place in range(count):
        first, second = (place + seed) % 3, (place // 3 + seed) % 4
        objects = [(first, VOC_PLACES[place % 2], 0)]
        if second < 3:
            objects.append((second, VOC_PLACES[1 - place % 2], int(place % 4 == 3)))
        found.append(objects)
    return found


def voc_picture(objects) -> tuple[np.ndarray, np.ndarray]:
    """The image [40,60,3], and its label map with an undecided line above each object."""
    image, labels = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), np.uint8)
    image[..., 2] = 255
    for label, (x1, y1, x2, y2), _ in objects:
        image[y1:y2, x1:x2] = VOC_COLOURS[label]
        labels[y1:y2, x1:x2] = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat").index(
            VOC_CLASSES[label]
        ) + 1
        labels[y1 - 2 : y1, x1:x2] = 255
    return image, labels


def write_voc(root: Path, counts=(("train", 12), ("val", 6), ("test", 9)), segmented: int = 2) -> Path:
    """VOCdevkit/VOC2007; every so manieth image is segmented."""
    base = root / "VOCdevkit" / "VOC2007"
    for seed, (split, count) in enumerate(counts):
        names = []
        for place, objects in enumerate(voc_photographs(count, seed)):
            name = f"{seed}{place:05d}"
            image, labels = voc_picture(objects)
            save(base / "JPEGImages" / f"{name}.jpg", image)
            if place % segmented == 0:
                save(base / "SegmentationClass" / f"{name}.png", labels)
            inside = "".join(
                f"<object><name>{VOC_CLASSES[label]}</name><difficult>{difficult}</difficult><bndbox>"
                f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for label, (x1, y1, x2, y2), difficult in objects
            )
            (base / "Annotations").mkdir(exist_ok=True)
            (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{inside}</annotation>")
            names.append(name)
        (base / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def write_labels(root: Path, counts=(("train", 12), ("val", 6), ("test", 9))) -> Path:
    """images.csv and boxes.csv; a class of difficult objects alone is in boxes.csv alone."""
    images, boxes = ["file,split,classes"], ["file,x1,y1,x2,y2,class,difficult"]
    for seed, (split, count) in enumerate(counts):
        for place, objects in enumerate(voc_photographs(count, seed)):
            file = f"images/{seed}{place:05d}.png"
            save(root / file, voc_picture(objects)[0])
            names = dict.fromkeys(VOC_CLASSES[label] for label, _, difficult in objects if not difficult)
            images.append(f"{file},{split},{' '.join(names)}")
            boxes += [f"{file},{','.join(map(str, box))},{VOC_CLASSES[label]},{d}" for label, box, d in objects]
    (root / "images.csv").write_text("\n".join(images) + "\n")
    (root / "boxes.csv").write_text("\n".join(boxes) + "\n")
    return root
