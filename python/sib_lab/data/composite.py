"""Masked objects pasted on backgrounds that agree with the class as often as wanted, with exact masks.

Class c has the background group c modulo the number of groups for its own. In training (and in the matched sets) a
chosen share of every class's images stand on their own group; in the uncorrelated sets every class stands on every
group equally often; in the flipped one, always on the group after its own. The three test sets show the same objects
at the same places, so that only the backgrounds tell them apart.

Nothing is shared between training, validation and test: objects are split as a whole, with all their photographs, and
backgrounds by file, or by region where a group has fewer than three files.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from .base import Common, DataSets, ItemDataset, Transform, check_classes, gentle_transforms, limited, visible
from .errors import DataError, some
from .files import Sample, image_files, is_hidden, read_layers, usable
from .identity import digest
from .images import SUFFIXES, File, ZipEntry, read_image, read_size
from .masks import read_mask

EDGE_BLUR = 0.7  #: standard deviation of the blur of a pasted object's edge, px of its photograph
CROP = (0.6, 1.0)  #: side of a background's crop, as a share of its region's shorter side
LEAST_REGION = 16  #: shorter side that a region must have, px
REGIONS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}  #: of a picture's longer side
PARTS = tuple(REGIONS)
CACHE = 128 * 2**20  #: finished composites of one split are kept in memory up to this many bytes


def open_set(
    root: Path | None,
    common: Common,
    *,
    objects: Path | None = None,
    backgrounds: Path | None = None,
    copies: int = 1,
    scale: tuple[float, float] = (0.3, 0.6),
    validation_share: float = 0.2,
    test_share: float = 0.3,
) -> DataSets:
    """Objects on backgrounds as DataSets; see :func:`sib_lab.data.open_data`.

    Args:
        objects: a folder or .zip with ``images/<class>/...`` and ``masks/<class>/...`` of the same paths (or with
            ``<class>/...`` beside ``masks/``). Which photographs show one object is said by the columns
            image,mask,class,object of a ``labels.csv`` in it, or by one more level of folders (``<class>/<object>/``);
            otherwise every photograph is an object of its own. Default: ``root/objects``, or the only .zip in root.
        backgrounds: a folder with two or more folders of pictures, one a group. Pictures of one scene can be kept
            together by the columns file,source of a ``backgrounds.csv`` in it. Default: ``root/backgrounds``.
        copies: composites of each training photograph, each elsewhere and on another background.
        scale: range of the object's longer side, as a share of the image's.
        validation_share, test_share: of each class's objects; the last ones in order where objects have names.

    Raises:
        DataError: one sentence about the files or the options.
    """
    if copies < 1:
        raise DataError(f"copies must be at least 1, got {copies}.")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise DataError(f"scale must be two rising shares in (0,1], got {scale[0]:g},{scale[1]:g}.")
    skipped: list[str] = []
    classes, photographs = find_objects(_objects_path(root, objects), common, skipped)
    by_part = split_objects(photographs, classes, {"validation": validation_share, "test": test_share}, common.seed)
    groups, regions = find_backgrounds(_backgrounds_path(root, backgrounds), common, skipped)
    for_training, fixed = gentle_transforms(common, flip=True)

    def composites(part: str, agreement: float | str | None, transform: Transform = fixed) -> Composites:
        shown = by_part[part] * (copies if part == "train" else 1)
        rows = limited([photograph.label for photograph in shown], common.limit, common.seed)
        return Composites([shown[row] for row in rows], regions[part], agreement, part, scale, common, transform)

    train = composites("train", common.agreement, for_training)
    train.annotated = visible(train.annotated, common.annotated, common.seed)
    check_classes(classes, train.labels, "composite")
    return DataSets(
        "composite",
        tuple(classes),
        common.size,
        train,
        {"matched": composites("validation", common.agreement), "uncorrelated": composites("validation", None)},
        {
            "uncorrelated": composites("test", None),
            "matched": composites("test", common.agreement),
            "flipped": composites("test", FLIPPED),
        },
        tuple(skipped),
        tuple(groups),
    )


def _objects_path(root: Path | None, objects: Path | None) -> Path:
    if objects is None:
        if root is None:
            raise DataError("composite needs objects and backgrounds, or root with both in it.")
        archives = sorted(root.glob("*.zip"))
        objects = root / "objects"
        if not objects.exists() and len(archives) == 1:
            objects = archives[0]
    objects = Path(objects).expanduser()
    if not objects.exists():
        raise DataError(f"objects is not there: {objects}; give a folder or a .zip with images/ and masks/.")
    return objects


def _backgrounds_path(root: Path | None, backgrounds: Path | None) -> Path:
    if backgrounds is None:
        if root is None:
            raise DataError("composite needs backgrounds, a folder with two or more folders of pictures.")
        backgrounds = root / "backgrounds"
    backgrounds = Path(backgrounds).expanduser()
    if not backgrounds.is_dir():
        raise DataError(f"backgrounds is not a folder: {backgrounds}; give one with two or more folders of pictures.")
    return backgrounds


# ------------------------------------------------------------------------------------------------ objects


@dataclass(frozen=True, slots=True)
class Photograph(Sample):
    """A photograph of an object, with its mask."""

    object: str = ""  #: which object of its class; "" where nobody said


def find_objects(path: Path, common: Common, skipped: list[str]) -> tuple[list[str], list[Photograph]]:
    """The classes and every photograph with its mask.

    Raises:
        DataError: not an archive or folder of that layout, fewer than two classes, or broken files.
    """
    files = _listing(path)
    table = files.get("labels.csv")
    found = _from_table(table, files) if table else _from_folders(files)
    if not found:
        raise DataError(f"{path} holds no images/<class>/ with pictures in it, or {path}/labels.csv has no rows.")
    classes = sorted({name for name, *_ in found})
    if len(classes) < 2:
        raise DataError(f"{path} has {len(classes)} class where at least 2 are needed.")
    number = {name: label for label, name in enumerate(classes)}
    bare = [image for _, image, mask, _ in found if mask is None]
    if bare and not common.skip_broken:
        raise DataError(
            f"composite: {len(bare)} of {len(found)} photographs of objects have no mask (the first: {bare[0]}): "
            "add masks of the same path, or leave them out with skip_broken (--skip-broken)."
        )
    skipped.extend(f"{image} has no mask" for image in bare)
    photographs = [Photograph(image, number[name], mask, object=thing) for name, image, mask, thing in found if mask]
    check = "full" if common.skip_broken else "header"
    return classes, usable("composite (objects)", photographs, check, common.skip_broken, skipped, read_object_mask)


def _listing(path: Path) -> dict[str, Path | ZipEntry]:
    """Every file in a folder or .zip by its path under the folder that holds the images; hidden ones left out."""
    if path.is_dir():
        files = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    else:
        try:
            with ZipFile(path) as archive:
                names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        except (BadZipFile, OSError) as error:
            raise DataError(f"{path} cannot be read as a .zip.") from error
        files = {name: ZipEntry(path, name) for name in names}
    files = {name: file for name, file in files.items() if not any(map(is_hidden, name.split("/")))}
    # An archive may hold everything in one more folder.
    outer = {name.split("/")[0] for name in files}
    if len(outer) == 1 and all("/" in name for name in files) and not outer & {"images", "masks"}:
        files = {name.split("/", 1)[1]: file for name, file in files.items()}
    return files


#: class, image, mask, object
Found = tuple[str, Path | ZipEntry, Path | ZipEntry | None, str]


def _from_table(table: Path | ZipEntry, files: dict) -> list[Found]:
    """What labels.csv lists; a file that it names and that is not there shows when files are checked."""
    reader = csv.DictReader(io.StringIO(_text(table)))
    if missing := [column for column in ("image", "mask", "class") if column not in (reader.fieldnames or ())]:
        raise DataError(f"{table} has no column {some(missing)}: its first line must name image,mask,class,object.")

    def located(name: str) -> Path | ZipEntry:
        if name in files:
            return files[name]
        return table.parent / name if isinstance(table, Path) else ZipEntry(table.archive, name)

    return [
        (row["class"], located(row["image"]), located(row["mask"]) if row["mask"] else None, row.get("object") or "")
        for row in reader
    ]


def _text(file: Path | ZipEntry) -> str:
    try:
        with file.open() if isinstance(file, ZipEntry) else open(file, "rb") as opened:
            return opened.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text.") from error


def _from_folders(files: dict) -> list[Found]:
    """Pictures in class folders with the mask of the same path under masks/."""
    pictures = {name: file for name, file in files.items() if PurePosixPath(name).suffix.lower() in SUFFIXES}
    top = "images/" if any(name.startswith("images/") for name in pictures) else ""
    masks = {name[6:].rpartition(".")[0]: file for name, file in pictures.items() if name.startswith("masks/")}
    found = []
    for name, file in pictures.items():
        inner = name.removeprefix(top)
        parts = inner.split("/")
        if name.startswith("masks/") or not name.startswith(top) or len(parts) < 2:
            continue
        found.append((parts[0], file, masks.get(inner.rpartition(".")[0]), parts[1] if len(parts) > 2 else ""))
    return found


def split_objects(
    photographs: Sequence[Photograph], classes: Sequence[str], shares: dict[str, float], seed: int
) -> dict[str, list[Photograph]]:
    """The photographs of each part; all of one object go to one part.

    Named objects are taken in order: the first train, the last test. Without names, by chance.

    Raises:
        DataError: a class with too few objects, or shares that leave none to train on.
    """
    if not all(0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise DataError("validation_share and test_share must lie between 0 and 1 and leave objects to train on.")
    parts: dict[str, list[Photograph]] = {part: [] for part in PARTS}
    for label, name in enumerate(classes):
        of_class = [photograph for photograph in photographs if photograph.label == label]
        things: dict[str, list[Photograph]] = defaultdict(list)
        for photograph in of_class:
            things[photograph.object or str(photograph.image)].append(photograph)
        order = sorted(things, key=_natural)
        if not any(photograph.object for photograph in of_class):
            order = [order[i] for i in np.random.default_rng([seed, 3, label]).permutation(len(order))]
        held = {part: max(1, round(share * len(order))) for part, share in shares.items()}
        if len(order) <= sum(held.values()):
            raise DataError(
                f"composite: the class {name} has {len(order)} objects, and train, validation and test need one each "
                "at the given shares: add objects, or lower validation_share and test_share."
            )
        cuts = np.cumsum([len(order) - sum(held.values()), held["validation"]])
        for part, keys in zip(PARTS, (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]), strict=True):
            parts[part].extend(p for key in keys for p in things[key])
    return parts


def _natural(name: str) -> tuple:
    """A sort key that puts 10 after 9."""
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name) if p)


def read_object_mask(path: Path | ZipEntry) -> np.ndarray:
    """:func:`read_mask` of a mask with an object in it.

    Raises:
        DataError: the file is missing or broken, or no value is above a half.
    """
    mask = read_mask(path)
    if mask.max(initial=0) < 128:
        raise DataError(f"{path} is empty: it marks no object.")
    return mask


def cut_out(photograph: Sample, longest: float) -> Tensor:
    """The object alone, cropped to its mask, [4,h,w] float32 in [0,1]: colours times opacity, and opacity.

    The mask loses 1 px and its edge is blurred, never beyond the mask, so that no backdrop is pasted along. Objects of
    more than four times ``longest`` px, the longer side that is wanted, and of more than 256 px are made smaller first.

    Raises:
        DataError: a file is missing or broken, or the mask is empty.
    """
    layers = read_layers(photograph, read_object_mask).numpy()
    image, mask = layers[:3].transpose(1, 2, 0), layers[3]
    inside = _bounds(mask)
    most = max(256, 4 * longest)
    image, mask = _at_most(image[inside], most), _at_most(mask[inside], most)
    framed = Image.fromarray(np.pad(mask, 1))
    eroded = framed.filter(ImageFilter.MinFilter(3))
    if np.asarray(eroded).max() < 128:  # too thin to lose anything
        eroded = framed
    opacity = np.minimum(np.asarray(eroded.filter(ImageFilter.GaussianBlur(EDGE_BLUR)))[1:-1, 1:-1], mask)
    inside = _bounds(opacity)
    alpha = torch.from_numpy(opacity[inside].astype(np.float32) / 255)
    colours = torch.from_numpy(image[inside].astype(np.float32) / 255).permute(2, 0, 1)
    return torch.cat([colours * alpha, alpha[None]])


def _bounds(mask: np.ndarray) -> tuple[slice, slice]:
    """The smallest box of rows and columns with all that is not 0."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _at_most(values: np.ndarray, longest: float) -> np.ndarray:
    """An image [h,w] or [h,w,3] uint8, made smaller where its longer side is above ``longest`` px."""
    factor = longest / max(values.shape[:2])
    if factor >= 1:
        return values
    height, width = (max(1, round(side * factor)) for side in values.shape[:2])
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))


# -------------------------------------------------------------------------------------------- backgrounds


@dataclass(frozen=True)
class Region:
    """A part of a picture: from ``start`` to ``stop`` of its longer side, as shares."""

    picture: Path
    start: float = 0.0
    stop: float = 1.0

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, upper, right and lower edge, px."""
        if width >= height:
            return self.start * width, 0.0, self.stop * width, float(height)
        return 0.0, self.start * height, float(width), self.stop * height


def find_backgrounds(path: Path, common: Common, skipped: list[str]) -> tuple[list[str], dict[str, list[list[Region]]]]:
    """The names of the groups, and the regions of each group for each part.

    Raises:
        DataError: fewer than two groups, a group without pictures, or broken or tiny pictures.
    """
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not is_hidden(folder.name)]
    if len(folders) < 2:
        raise DataError(f"{path} has {len(folders)} folders where at least 2 are needed: one a kind of background.")
    scenes = _scenes(path)
    regions: dict[str, list[list[Region]]] = {part: [] for part in PARTS}
    part_of: dict[str, str] = {}
    for number, folder in enumerate(folders):
        pictures = [Sample(picture, number) for picture in image_files(folder)]
        check = "full" if common.skip_broken else "header"
        good = usable(f"composite ({folder.name})", pictures, check, common.skip_broken, skipped)
        if not good:
            raise DataError(
                f"The background folder {folder} holds no pictures that can be used: add some, or remove it."
            )
        by_scene: dict[str, list[Path]] = defaultdict(list)
        for picture in (sample.image for sample in good):
            scene = scenes.get(picture.relative_to(path).as_posix(), str(picture))  # type: ignore[union-attr]
            by_scene[scene].append(picture)  # type: ignore[arg-type]  # a file of a folder
        chosen = _split_scenes(by_scene, part_of, np.random.default_rng([common.seed, 4, number]))
        for part in PARTS:
            _check_regions(chosen[part])
            regions[part].append(chosen[part])
    return [folder.name for folder in folders], regions


def _scenes(path: Path) -> dict[str, str]:
    """Picture (path under ``path``) -> what its scene is called, from backgrounds.csv; empty without that file."""
    table = path / "backgrounds.csv"
    if not table.is_file():
        return {}
    rows = list(csv.DictReader(io.StringIO(_text(table))))
    column = next((c for c in ("source", "bsds_id") if rows and c in rows[0]), None)
    if column is None or "file" not in rows[0]:
        raise DataError(f"{table} must have the columns file and source, with a row for each picture.")
    return {row["file"]: row[column] for row in rows}


def _split_scenes(
    by_scene: dict[str, list[Path]], part_of: dict[str, str], rng: np.random.Generator
) -> dict[str, list[Region]]:
    """Whole scenes to each part, about 60, 20 and 20 %; under three scenes, a region of every picture to each.

    ``part_of`` remembers scenes, so that one that two groups show goes to one part in both.
    """
    names = sorted(by_scene)
    fresh = [names[i] for i in rng.permutation(len(names)) if names[i] not in part_of]
    held = max(1, round(0.2 * len(names)))
    for part in ("validation", "test", "train"):
        lacking = held - sum(part_of.get(name) == part for name in names)
        for name in list(fresh) if part == "train" else fresh[: max(0, lacking)]:
            part_of[name] = part
            fresh.remove(name)
    chosen = {part: [Region(p) for name in names if part_of[name] == part for p in by_scene[name]] for part in PARTS}
    if all(chosen.values()):
        return chosen
    pictures = [picture for name in names for picture in by_scene[name]]
    return {part: [Region(picture, *span) for picture in pictures] for part, span in REGIONS.items()}


def _check_regions(regions: Sequence[Region]) -> None:
    for region in regions:
        left, upper, right, lower = region.box(*read_size(region.picture))
        if min(right - left, lower - upper) < LEAST_REGION:
            raise DataError(
                f"{region.picture} is too small for a background: {right - left:.0f} x {lower - upper:.0f} px of it "
                f"would be used, at least {LEAST_REGION} px are needed; remove it or add more pictures of its kind."
            )


@lru_cache(maxsize=256)
def background_picture(path: Path, least: int) -> Image.Image:
    """A picture, made smaller until its shorter side is ``least`` px where it is larger."""
    picture = Image.fromarray(read_image(path))
    factor = least / min(picture.size)
    if factor < 1:
        picture = picture.resize([max(1, round(side * factor)) for side in picture.size], Image.Resampling.BILINEAR)
    return picture


def background(region: Region, size: int, rng: np.random.Generator) -> Tensor:
    """A random square of a region, flipped or not, [3,size,size] float32 in [0,1]."""
    picture = background_picture(region.picture, 4 * size)
    left, upper, right, lower = region.box(*picture.size)
    side = rng.uniform(*CROP) * min(right - left, lower - upper)
    x, y = rng.uniform(left, right - side), rng.uniform(upper, lower - side)
    crop = picture.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    values = np.asarray(crop, dtype=np.float32) / 255
    values = values[:, ::-1] if rng.random() < 0.5 else values
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


# -------------------------------------------------------------------------------------------- composites

FLIPPED = "flipped"  #: instead of an agreement: every class stands on the group after its own


def draw_groups(
    labels: Sequence[int], kinds: int, agreement: float | str | None, rng: np.random.Generator
) -> np.ndarray:
    """The background group of each image, [N]; class c's own is c modulo ``kinds``.

    ``agreement``: in that share of every class's images its own, in the rest any other; None: every group equally
    often in each class; ``FLIPPED``: the one after its own.
    """
    labels = np.asarray(labels)
    own = labels % kinds
    if agreement == FLIPPED:
        return (own + 1) % kinds
    groups = own.copy()
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if agreement is None:
            groups[rows] = (np.arange(len(rows)) + rng.integers(kinds)) % kinds
        else:
            odd = rows[: round((1 - agreement) * len(rows))]  # type: ignore[operator]  # no word
            groups[odd] = (own[odd] + rng.integers(1, kinds, size=len(odd))) % kinds
    return groups


def _name(file: File) -> str:
    """A file's name in its folders and its size, wherever the set lies."""
    if isinstance(file, ZipEntry):
        return f"{file.name} {file.size}"
    return f"{'/'.join(Path(file).parts[-3:])} {Path(file).stat().st_size}"


class Composites(ItemDataset):
    """Composites made when they are asked for; row i follows from the seed, the part and i alone."""

    def __init__(
        self,
        photographs: Sequence[Photograph],
        regions: Sequence[Sequence[Region]],
        agreement: float | str | None,
        part: str,
        scale: tuple[float, float],
        common: Common,
        transform: Transform,
    ):
        labels = [photograph.label for photograph in photographs]
        kind = 1 if agreement is None else 2 if agreement == FLIPPED else 0
        rng = np.random.default_rng([common.seed, 5, PARTS.index(part), kind])
        groups = torch.from_numpy(draw_groups(labels, len(regions), agreement, rng))
        super().__init__(labels, transform, torch.ones(len(labels), dtype=torch.bool), groups)
        self.photographs = list(photographs)
        self.regions = regions
        self.scale = scale
        self.size = common.size
        self.key = (common.seed, 6, PARTS.index(part))
        self.keep = len(labels) * 4 * common.size**2 <= CACHE
        self.kept: dict[int, Tensor] = {}

    def identity(self, classes: Sequence[str]) -> str:
        rows = zip(self.photographs, self.groups.tolist(), strict=True)
        objects = (f"{_name(p.image)} {_name(p.mask)} {classes[p.label]} {group}" for p, group in rows)
        regions = (f"{_name(r.picture)} {r.start} {r.stop}" for among in self.regions for r in among)
        return digest([*objects, *regions, f"{self.scale} {self.key}"])

    def layers(self, row: int) -> Tensor:
        if row not in self.kept:
            made = self.compose(row)
            if not self.keep:
                return made
            self.kept[row] = made
        return self.kept[row]

    def compose(self, row: int) -> Tensor:
        """Red, green, blue and opacity of the object, [4,size,size] uint8."""
        rng = np.random.default_rng([*self.key, row])
        longest = rng.uniform(*self.scale) * self.size
        pasted = self._placed(cut_out(self.photographs[row], longest), longest, rng)
        among = self.regions[int(self.groups[row])]
        behind = background(among[int(rng.integers(len(among)))], self.size, rng)
        shown = pasted[:3] + behind * (1 - pasted[3:])
        return (torch.cat([shown, pasted[3:]]) * 255).round().clamp(0, 255).to(torch.uint8)

    def _placed(self, thing: Tensor, longest: float, rng: np.random.Generator) -> Tensor:
        """An object [4,h,w] at a random place of an empty image, [4,size,size]; ``longest``: its longer side, px."""
        height, width = (max(1, round(side * longest / max(thing.shape[1:]))) for side in thing.shape[1:])
        resized = F.interpolate(thing[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
        y, x = rng.integers(self.size - height + 1), rng.integers(self.size - width + 1)
        canvas = torch.zeros(4, self.size, self.size)
        canvas[:, y : y + height, x : x + width] = resized.clamp(0, 1)
        return canvas
