"""What every data set is made of: items, their transforms and the splits."""

import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .errors import DataError, some
from .identity import Split, digest


class Item(NamedTuple):
    """An image with its label and what is known about where the object is; ``default_collate`` stacks every field."""

    image: Tensor  #: [3,size,size] float32 in [-1,1] (mean 0.5, standard deviation 0.5)
    label: Any  #: int: index into the set's classes; of several labels see :class:`sib_lab.data.labelled.Photographs`
    mask: Tensor  #: [1,size,size] float32 in [0,1], 1 on the object; zeros where ``annotated`` is False
    annotated: Any  #: bool: whether ``mask`` is a real annotation
    group: Any  #: int: kind of background, for worst-group accuracy; -1 where the set has none


@dataclass(frozen=True)
class DataSets:
    """The splits of one set. No image (and no object of a composite) is in two of them."""

    name: str
    classes: tuple[str, ...]
    size: int  #: side of the images, px
    train: "ItemDataset"
    validation: "dict[str, ItemDataset]"  #: the first selects the best checkpoint
    test: "dict[str, ItemDataset]"  #: the first is explained and measured on
    skipped: tuple[str, ...] = ()  #: files left out, each with its reason; those that are no pictures by their kinds
    groups: tuple[str, ...] = ()  #: names of the background groups that ``Item.group`` counts
    wordnet_ids: tuple[str, ...] = ()  #: of the classes, where a file gives them ("": not of this one)

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.train.labels.dim() == 2

    @property
    def quality(self) -> str:
        """The measure of how well a network classifies: "accuracy", or of several labels "map", mean average precision
        over the classes."""
        return "map" if self.multilabel else "accuracy"

    def splits(self) -> "dict[str, ItemDataset]":
        """Every split by name: "train", "validation/NAME", "test/NAME"."""
        named = {"validation": self.validation, "test": self.test}
        return {"train": self.train} | {f"{kind}/{name}": s for kind, sets in named.items() for name, s in sets.items()}

    def identity(self) -> dict[str, Split]:
        """What the set consists of, to be stored (as JSON) and compared with :func:`sib_lab.data.identity.changed`.

        Every split has a hash of the contents of each image file and of its annotation, with its label, by the image's
        path under root. Sets that are made or held in memory, and splits of more than ``files.MANY`` images, have one
        digest of names, sizes, labels and groups instead. Files that ``skip_broken`` left out are counted in.
        """
        return self._identity

    @cached_property
    def _identity(self) -> dict[str, Split]:
        return {name: split.identity(self.classes) for name, split in self.splits().items()}


@dataclass(frozen=True)
class Common:
    """The options that every set takes; see :func:`sib_lab.data.open_data`."""

    size: int
    seed: int = 0
    annotated: float = 1.0
    agreement: float = 0.95
    skip_broken: bool = False
    augment: bool = False
    limit: int | None = None


class ItemDataset(Dataset, ABC):
    """Images with masks. Item i is the same whichever worker makes it, except for augmentation, which also takes
    the epoch (see :meth:`set_epoch`).

    A subclass gives :meth:`layers`; geometry is done on the four layers together, so a mask follows its image.

    Attributes:
        annotation: what items show of the masks: "masks" as they are, or "boxes", the bounding box of each.
    """

    annotation = "masks"

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        transform: "Transform",
        annotated: Sequence[bool] | Tensor,
        groups: Sequence[int] | Tensor | None = None,
    ):
        self.labels = torch.as_tensor(labels, dtype=torch.int64)  #: [N], or [N,K] where an image may have several
        self.annotated = torch.as_tensor(annotated, dtype=torch.bool)  #: [N]
        no_group = torch.full_like(self.annotated, -1, dtype=torch.int64)
        self.groups = no_group if groups is None else torch.as_tensor(groups, dtype=torch.int64)  #: [N]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def layers(self, row: int) -> Tensor:
        """Red, green, blue and mask, [4,H,W]: uint8 in 0..255 or float32 in [0,1]."""

    def checked(self, row: int) -> int:
        """A row number, counted from the first; negative ones count from the last.

        Raises:
            IndexError: there is none of that number.
        """
        if not -len(self) <= int(row) < len(self):
            raise IndexError(f"row {row} of a data set of {len(self)}")
        return int(row) % len(self)

    def __getitem__(self, row: int) -> Item:
        row = self.checked(row)
        layers = self.layers(row)
        if self.annotation == "boxes":
            layers = torch.cat([layers[:3], bounding_box(layers[3:])])
        layers = as_float(self.transform(layers, row))
        annotated = bool(self.annotated[row])
        mask = layers[3:] if annotated else torch.zeros_like(layers[3:])
        return Item(normalise(layers[:3]), int(self.labels[row]), mask, annotated, int(self.groups[row]))

    def identity(self, classes: Sequence[str]) -> Split:
        """See :meth:`DataSets.identity`; here a digest of labels and groups."""
        rows = zip(self.labels.tolist(), self.groups.tolist(), strict=True)
        return digest(f"{classes[label]} {group}" for label, group in rows)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that augmentation is drawn for; seen by workers that already run, too."""
        self.transform.epoch.fill_(epoch)


class ArrayItems(ItemDataset):
    """Images held in memory: layers [N,4,H,W] uint8 or float32, or images [N,3,H,W] uint8 without masks."""

    def __init__(self, images: Tensor, *arguments, **options):
        super().__init__(*arguments, **options)
        self.images = images

    def layers(self, row: int) -> Tensor:
        image = self.images[row]
        return image if len(image) == 4 else torch.cat([image, torch.zeros_like(image[:1])])


def bounding_box(mask: Tensor) -> Tensor:
    """A mask of the smallest box around what is above half of a mask's maximum, [1,H,W] in its type: 255 (uint8) or
    1.0 inside; zeros for a mask of zeros."""
    box = torch.zeros_like(mask)
    inside = mask[0] > mask.max() / 2
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    if len(rows):
        highest = 1 if mask.is_floating_point() else 255
        box[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = highest
    return box


def as_float(layers: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [0,1]; float32 stays."""
    return layers if layers.is_floating_point() else layers.to(torch.float32) / 255


def normalise(images: Tensor) -> Tensor:
    """[0,1] -> [-1,1]: mean 0.5 and standard deviation 0.5, as in the published protocol."""
    return (images - 0.5) / 0.5


def stack(dataset: Dataset, rows: Sequence[int] | Tensor) -> Item:
    """The given rows as one Item of stacked tensors: image [N,3,S,S], mask [N,1,S,S], the other fields [N].

    Raises:
        DataError: no rows, or an image that cannot be read.
    """
    rows = [int(row) for row in rows]
    if not rows:
        raise DataError("There are no images to stack: give at least one row.")
    return default_collate([dataset[row] for row in rows])


# -------------------------------------------------------------------------------------------- transforms


class Transform:
    """Geometry for the layers [4,H,W] of row i: ``fixed`` for evaluation, or ``random`` with numbers of its own for
    every (seed, epoch, row), so that neither workers nor a resumed run change them."""

    def __init__(self, fixed: Callable | None = None, random: Callable | None = None, seed: int = 0):
        self.fixed = fixed
        self.random = random
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __call__(self, layers: Tensor, row: int) -> Tensor:
        if self.random is None:
            return layers if self.fixed is None else _apply(self.fixed, layers)
        key = np.random.SeedSequence([self.seed, int(self.epoch), row]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(key[0] >> np.uint64(1)))
            return _apply(self.random, layers)


def _apply(transform: Callable, layers: Tensor) -> Tensor:
    from torchvision import tv_tensors

    return transform(tv_tensors.Image(layers)).as_subclass(Tensor)


def photo_transforms(options: Common) -> tuple[Transform, Transform]:
    """For training and for evaluation: the published Resize 256, CenterCrop 224, scaled to ``size`` (the shorter side
    becomes size * 256/224); with ``augment``, a random resized crop and flip for training."""
    from torchvision.transforms import v2

    side = round(options.size * 256 / 224)
    fixed = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(options.size)])
    random = v2.Compose([v2.RandomResizedCrop(options.size, antialias=True), v2.RandomHorizontalFlip()])
    return Transform(fixed, random if options.augment else None, options.seed), Transform(fixed)


def gentle_transforms(options: Common, flip: bool) -> tuple[Transform, Transform]:
    """For images that are made at their final size: with ``augment``, crops of at least 70 % of the area."""
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(options.size, scale=(0.7, 1.0), ratio=(0.9, 1.1), antialias=True)]
    random = v2.Compose(steps + [v2.RandomHorizontalFlip()] * flip)
    return Transform(None, random if options.augment else None, options.seed), Transform()


# ------------------------------------------------------------------------------------------------ splits


def stratified(
    labels: Sequence[int], classes: Sequence[str], shares: dict[str, float], seed: int
) -> dict[str, list[int]]:
    """Row numbers of each named part (a share of every class, at least one image) and of ``train``, which keeps the
    rest; one seed gives one split.

    Raises:
        DataError: a class with too few images, or shares outside (0,1) or that leave nothing to train on.
    """
    _check_shares(shares)
    labels = np.asarray(labels)
    parts: dict[str, list[int]] = {"train": [], **{name: [] for name in shares}}
    for label, name in enumerate(classes):
        rows = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        counts = [max(1, round(share * len(rows))) for share in shares.values()]
        if len(rows) and len(rows) <= sum(counts):
            raise _too_few(name, len(rows), shares)
        *held, rest = np.split(rows, np.cumsum(counts))
        for part, chosen in zip([*shares, "train"], [*held, rest], strict=True):
            parts[part].extend(chosen.tolist())
    return {part: sorted(rows) for part, rows in parts.items()}


def drawn(
    names: Sequence[str], labels: Sequence[int], classes: Sequence[str], shares: dict[str, float], seed: int
) -> dict[str, list[int]]:
    """As :func:`stratified`, but the part of an image follows from its name and the seed, so that every image stays
    where it is when others come or go, and the shares hold on average.

    Only where a class would have no image in a part, its images nearest to that part go there, as long as there are
    enough.

    Raises:
        DataError: a class with fewer images than parts, or shares outside (0,1) or that leave nothing to train on.
    """
    _check_shares(shares)
    labels = np.asarray(labels)
    ends = np.cumsum(list(shares.values()))
    parts: dict[str, list[int]] = {name: [] for name in (*shares, "train")}
    for label, name in enumerate(classes):
        rows = np.flatnonzero(labels == label)
        if 0 < len(rows) <= len(shares):
            raise _too_few(name, len(rows), shares)
        lots = np.array([_lot(names[row], seed) for row in rows.tolist()])
        chosen = np.searchsorted(ends, lots, side="right")
        for place in range(len(parts) if len(rows) else 0):
            if place not in chosen:
                spare = np.flatnonzero(np.bincount(chosen, minlength=len(parts))[chosen] > 1)
                middle = (([0, *ends][place]) + [*ends, 1][place]) / 2
                chosen[spare[np.abs(lots[spare] - middle).argmin()]] = place
        for place, part in enumerate(parts):
            parts[part].extend(rows[chosen == place].tolist())
    return {part: sorted(rows) for part, rows in parts.items()}


def _lot(name: str, seed: int) -> float:
    """A number in [0,1) that follows from a name, however the system composes its accents, and the seed."""
    text = unicodedata.normalize("NFC", f"{seed}/{name}").encode(errors="surrogateescape")
    return int.from_bytes(blake2b(text, digest_size=6).digest(), "big") / 2**48


def _check_shares(shares: dict[str, float]) -> None:
    if not all(0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        given = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise DataError(
            f"The shares of the splits must each lie between 0 and 1 and leave images to train on: {given}."
        )


def _too_few(name: str, count: int, shares: dict[str, float]) -> DataError:
    return DataError(
        f"The class {name} has {count} image{'' if count == 1 else 's'} to share out among train, "
        f"{' and '.join(shares)}: at least {len(shares) + 1} are needed, or smaller shares."
    )


def limited(labels: Sequence[int], limit: int | None, seed: int, name: Callable[[int], str] | None = None) -> list[int]:
    """At most ``limit`` row numbers, in order, spread evenly over the classes; None: all rows.

    Args:
        name: gives a row's own name, from which with the seed it follows whether the row is taken: when one comes or
            goes, at most one other is taken in or out for it. None: drawn by row number.
    """
    labels = np.asarray(labels)
    if limit is None or limit >= len(labels):
        return list(range(len(labels)))
    order = _in_order(np.arange(len(labels)), seed, 1, name)
    seen: dict[int, int] = {}
    turns = np.empty(len(labels), dtype=np.int64)
    for row in order:
        turns[row] = seen[labels[row]] = seen.get(labels[row], -1) + 1
    return sorted(order[np.argsort(turns[order], kind="stable")][:limit].tolist())


def visible(
    annotated: Sequence[bool] | Tensor, share: float, seed: int, name: Callable[[int], str] | None = None
) -> Tensor:
    """Which training masks the loss may see, [N] bool: a share of those there are; larger shares include smaller.

    Args:
        name: as in :func:`limited`.
    """
    known = torch.as_tensor(annotated, dtype=torch.bool)
    rows = known.nonzero()[:, 0].numpy()
    count = math.floor(share * len(rows) + 0.5)
    chosen = _in_order(rows, seed, 2, name)[:count] if 0 < count < len(rows) else rows[:count]
    seen = torch.zeros_like(known)
    seen[torch.from_numpy(chosen)] = True
    return seen


def _in_order(rows: np.ndarray, seed: int, use: int, name: Callable[[int], str] | None) -> np.ndarray:
    """Rows in the order that they are drawn in for one of several uses, by their names or (None) by their numbers."""
    if name is None:
        return np.random.default_rng([seed, use]).permutation(rows)
    return rows[np.argsort([_lot(f"{use}/{name(row)}", seed) for row in rows], kind="stable")]


def check_classes(classes: Sequence[str], labels: Sequence[int] | Tensor, name: str) -> None:
    """Every class has a training image.

    Raises:
        DataError: naming the classes that have none.
    """
    present = set(np.unique(np.asarray(labels)).tolist())
    missing = [c for label, c in enumerate(classes) if label not in present]
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of {len(classes)} classes have no training image ({some(missing)}): "
            "add images, remove the class everywhere, or raise the limit if one was set."
        )
