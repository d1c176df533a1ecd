"""Data sets with object masks, opened by name: :func:`open_data`. Light to import: torch comes with the first set."""

import typing
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DataError

if TYPE_CHECKING:
    from .base import DataSets

#: Measures of how well a network classifies, of one label an image and of several -> names for people.
QUALITIES = {"accuracy": "accuracy", "map": "mAP"}
#: What a training may see of masks: as they are, or their bounding "boxes".
ANNOTATIONS = ("masks", "boxes")

__all__ = ["SETS", "DataError", "DataSets", "Item", "SetInfo", "open_data", "set_epoch", "stack"]


@dataclass(frozen=True)
class SetInfo:
    """One entry of :data:`SETS`."""

    sentence: str  #: for people
    annotation: str  #: what is known about where the object is: "masks", "boxes", "masks or boxes", "none"
    size: int  #: default side of the images, px
    module: str  #: under sib_lab.data; its ``open_set(root, common, **options)`` makes the DataSets
    layout: str = ""  #: the files that are looked for under ``root``
    options: dict[str, str] = field(default_factory=dict)  #: own options of :func:`open_data` and what they mean
    multilabel: bool = False  #: whether an image may have several labels

    @property
    def needs_root(self) -> bool:
        return bool(self.layout)


_VALIDATION = {"validation_share": "share of each class's training images kept for validation (0.1)"}

SETS: dict[str, SetInfo] = {
    "digits": SetInfo(
        "Handwritten digits on photographs that give the label away in training; embedded, nothing to download.",
        "masks",
        40,
        "digits_on_textures",
        options={
            "train": "different digits to train on (1200)",
            "validation": "different digits to validate on (197)",
            "test": "different digits to test on (400)",
            "copies": "composites of each training digit (4)",
        },
    ),
    "composite": SetInfo(
        "Your masked objects pasted on backgrounds of two or more kinds that agree with the class in training.",
        "masks",
        64,
        "composite",
        "objects/ (or one .zip) with images/<class>/ and masks/<class>/, optionally labels.csv; "
        "backgrounds/<group>/*.jpg",
        {
            "objects": "folder or .zip of the masked objects (root/objects, or the only .zip in root)",
            "backgrounds": "folder of two or more folders of pictures (root/backgrounds)",
            "copies": "composites of each training photograph of an object (1)",
            "scale": "least and greatest longer side of the object, as a share of the image's (0.3,0.6)",
            "validation_share": "share of each class's objects kept for validation (0.2)",
            "test_share": "share of each class's objects kept for the tests (0.3)",
        },
    ),
    "cifar100": SetInfo(
        "CIFAR-100: 60,000 images of 32 px in 100 classes.",
        "none",
        224,
        "cifar100",
        "cifar-100-python/{train,test,meta}",
        _VALIDATION,
    ),
    "cub200": SetInfo(
        "CUB-200-2011: 11,788 photographs of 200 kinds of birds.",
        "masks or boxes",
        224,
        "cub200",
        "CUB_200_2011/{images,images.txt,image_class_labels.txt,train_test_split.txt,bounding_boxes.txt} "
        "and segmentations/",
        {"masks": "segmentations, boxes, or auto: segmentations where the folder is there (auto)", **_VALIDATION},
    ),
    "dogs": SetInfo(
        "Stanford Dogs: 20,580 photographs of 120 breeds.",
        "boxes",
        224,
        "dogs",
        "Images/, Annotation/, lists/{train,test}_list.mat",
        _VALIDATION,
    ),
    "pets": SetInfo(
        "Oxford-IIIT Pet: 7,349 photographs of 37 breeds of cats and dogs.",
        "masks",
        224,
        "pets",
        "oxford-iiit-pet/{images,annotations}",
        _VALIDATION,
    ),
    "imagenet": SetInfo(
        "ImageNet-1k: 1.3 million photographs of 1,000 classes.",
        "boxes",
        224,
        "imagenet",
        "train/<class>/*.JPEG, val/<class>/*.JPEG, optionally Annotations/ with XML boxes and meta.bin with names",
        {"validation_share": "share of each class's training images kept for validation (0.01)"},
    ),
    "waterbirds": SetInfo(
        "Waterbirds: birds of land or water pasted on backgrounds that agree with them in 95 % of training.",
        "boxes",
        224,
        "waterbirds",
        "metadata.csv with file,split,waterbird,on_water (x1,y1,x2,y2), or img_filename,split,y,place; its images",
    ),
    "voc": SetInfo(
        "Pascal VOC: photographs with several labels each, of 20 classes; or your own of that kind.",
        "masks or boxes",
        224,
        "voc",
        "VOCdevkit/VOC2007/{JPEGImages,Annotations,ImageSets}, or images.csv with file,split,classes "
        "and boxes.csv with file,x1,y1,x2,y2,class,difficult",
        {
            "masks": "boxes, or segmentations: the label maps of SegmentationClass (boxes)",
            "validation_share": "share of the training images kept for validation where there is no such split (0.1)",
            "test_share": "share of them kept for the test where there is no such split (0.2)",
        },
        multilabel=True,
    ),
    "folder": SetInfo(
        "Your own images: one folder a class, or train/, val/ and test/ with such folders in each.",
        "masks or boxes",
        224,
        "folder",
        "<class>/*.jpg, or {train,val,test}/<class>/*.jpg; optionally masks/ with the same paths, or boxes.csv",
        {
            "masks": "folder of masks with the paths of the images (every masks/ or segmentations/ that is there)",
            "boxes": "CSV with the columns file,x1,y1,x2,y2 in pixels, or all in 0..1 (every boxes.csv that is there)",
            "mask_values": "what marks the object in label maps: 1,3 or #ff0000, nonzero, grey, alpha (by itself)",
            "invert_masks": "true: the masks mark the background (false)",
            "validation_share": "share of each class kept for validation where there is no val/ (0.15)",
            "test_share": "share of each class kept for the test where there is no test/ (0.2)",
        },
    ),
}


def is_multilabel(name: str | None) -> bool:
    """Whether the images of a set of this name may have several labels; False for a name that is none of SETS."""
    return name in SETS and SETS[name].multilabel


def open_data(
    name: str,
    root: Path | str | None = None,
    *,
    size: int | None = None,
    seed: int = 0,
    annotated: float = 1.0,
    annotation: str = "masks",
    agreement: float = 0.95,
    skip_broken: bool = False,
    augment: bool = False,
    limit: int | None = None,
    **options,
) -> "DataSets":
    """Opens a data set from its standard layout on disk; nothing is downloaded.

    Every file's header is read at once (not for ImageNet), so that what is missing, unreadable or of the wrong size
    shows before training.

    Args:
        name: a key of :data:`SETS`.
        root: the folder that holds the set's layout (``SETS[name].layout``); None for the embedded digits.
        size: side of the images, px; None takes the set's default.
        seed: of every split, choice and placement: one seed gives one data set.
        annotated: share in [0,1] of the annotated training images whose mask the training may see; the masks of
            validation and test images are always kept.
        annotation: what the training may see of these masks: "masks" as they are, or "boxes", the bounding box of each
            (made before transforms, which it follows); those of validation and test images stay as they are.
        agreement: share in [0,1] of training images whose background is that of their class (digits, composite).
        skip_broken: leave out what is missing or broken and name it in ``DataSets.skipped`` instead of stopping; every
            file is then read in full (headers alone for ImageNet).
        augment: random crops and flips of the training images (no flips for digits); call :func:`set_epoch`.
        limit: at most so many images a split, spread evenly over the classes.
        **options: the set's own (``SETS[name].options``); strings are converted.

    Raises:
        DataError: one sentence that says what is wrong and what to do.
    """
    if name not in SETS:
        raise DataError(f"There is no data set {name!r}: choose one of {', '.join(SETS)}.")
    info = SETS[name]
    size = info.size if size is None else size
    if not isinstance(size, int) or size < 8:
        raise DataError(f"size must be a whole number of at least 8 px, got {size}.")
    for option, share in (("annotated", annotated), ("agreement", agreement)):
        if not 0 <= share <= 1:
            raise DataError(f"{option} must be a share between 0 and 1, got {share:g}.")
    if annotation not in ANNOTATIONS:
        raise DataError(f"annotation must be one of {', '.join(ANNOTATIONS)}, got {annotation!r}.")
    if annotation == "boxes" and info.annotation == "none":
        raise DataError(f"{name} has no masks to take the boxes of: leave annotation out.")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 image, got {limit}.")
    if seed < 0:
        raise DataError(f"seed must be at least 0, got {seed}.")
    from .base import Common

    common = Common(size, seed, annotated, agreement, skip_broken, augment, limit)
    opener = import_module(f".{info.module}", __name__).open_set
    data = opener(_checked_root(name, root), common, **_converted(name, opener, options))
    data.train.annotation = annotation
    return data


def _checked_root(name: str, root: Path | str | None) -> Path | None:
    info = SETS[name]
    if root is None:
        own = {"objects", "backgrounds"}
        if info.needs_root and not own <= info.options.keys():
            raise DataError(f"{name} needs root, the folder with {info.layout}.")
        return None
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"root is not a folder: {root}.")
    return root


def _converted(name: str, opener, options: dict) -> dict:
    """Options with strings turned into what the opener's annotations say."""
    known, hints = SETS[name].options, typing.get_type_hints(opener)
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none of its own"
            raise DataError(f"{name} has no option {option!r}: {takes}.")
    return {option: _convert(option, value, hints[option]) for option, value in options.items()}


def _convert(option: str, value, hint):
    kinds = typing.get_args(hint) if typing.get_origin(hint) not in (tuple, None) else (hint,)
    kind = next(k for k in kinds if k is not type(None))
    if not isinstance(value, str) or kind is str:
        return value
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.casefold()]
        if typing.get_origin(kind) is tuple:
            values = tuple(float(part) for part in value.split(","))
            if len(values) == len(typing.get_args(kind)):
                return values
            raise ValueError
        return kind(value)
    except (KeyError, ValueError) as error:
        words = {int: "a whole number", float: "a number", bool: "true or false"}
        meaning = words.get(kind) or f"{len(typing.get_args(kind))} numbers with commas between them"
        raise DataError(f"The option {option} must be {meaning}, got {value!r}.") from error


def set_epoch(dataset, epoch: int) -> None:
    """Tells a training set which epoch (from 0) its augmentation is drawn for; without augmentation nothing changes."""
    dataset.set_epoch(epoch)


def __getattr__(name: str):
    # Item and the rest need torch, which the command line's --help must not wait for.
    if name in ("DataSets", "Item", "ItemDataset", "stack"):
        return getattr(import_module(".base", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
