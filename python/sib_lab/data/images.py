"""Image files as arrays of 8 bits: what Pillow can read, whatever its depth, transparency, size and orientation."""

import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import ExifTags, Image, features

from .errors import DataError

try:  # optional: without it Pillow reads no HEIC
    from pillow_heif import register_heif_opener
except ImportError:
    HEIF: frozenset[str] = frozenset()
else:
    register_heif_opener()
    HEIF = frozenset((".heic", ".heif", ".hif"))

AVIF = frozenset((".avif",)) if features.check("avif") else frozenset()
SUFFIXES = (
    AVIF
    | HEIF
    | frozenset(
        (
            ".jpg",
            ".jpeg",
            ".jpe",
            ".jfif",
            ".png",
            ".gif",
            ".bmp",
            ".webp",
            ".tif",
            ".tiff",
            ".ppm",
            ".pgm",
            ".pbm",
            ".pnm",
        )
    )
)  #: of the files that are read
HEIF_CURE = "pip install pillow-heif"
#: Other pictures, and what to do to have them read.
CURES = dict.fromkeys((".heic", ".heif", ".hif"), HEIF_CURE) | {".avif": "pip install -U pillow"}
CURES |= dict.fromkeys(
    (".arw", ".cr2", ".cr3", ".dng", ".jp2", ".jxl", ".nef", ".orf", ".psd", ".raf", ".rw2", ".svg"),
    "save them as .jpg or .png",
)
BACKDROP = "white"  #: behind what is transparent
LARGE = 2**25  #: pixels; images of more are made smaller while they are read
LARGEST = 2**30  #: pixels; images of more are refused
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  #: by EXIF orientation
_opening = threading.Lock()


@dataclass(frozen=True)
class ZipEntry:
    """A file in a .zip, read where a Path would be."""

    archive: Path
    name: str

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    @property
    def size(self) -> int:
        """Bytes when unpacked."""
        return _archive(self.archive, os.getpid()).getinfo(self.name).file_size

    def open(self) -> BytesIO:
        try:
            return BytesIO(_archive(self.archive, os.getpid()).read(self.name))
        except KeyError as error:
            raise FileNotFoundError(str(self)) from error


@lru_cache(maxsize=8)
def _archive(path: Path, process: int) -> ZipFile:
    """One handle a process: forked workers must not share a file position."""
    return ZipFile(path)


#: Where an image is read from; a plain string where there are a million of them.
File = Path | str | ZipEntry


def read_image(path: File, upright: bool = False) -> np.ndarray:
    """RGB [H,W,3] uint8 of an image of any mode.

    16-bit images are scaled by their range, numbers of other depths where their range is clear; what is transparent
    shows ``BACKDROP``; of an animation the first frame counts; images of more than ``LARGE`` pixels come smaller, see
    :func:`read_smaller`. ``upright`` turns photographs as their EXIF orientation says, as every viewer does. The
    published sets are read as they are stored, which is what their annotations refer to.

    Raises:
        DataError: the file is missing, cannot be read as an image, is too large, or holds numbers of unknown range.
    """
    return read_smaller(path, upright)[0]


def read_smaller(path: File, upright: bool = False) -> tuple[np.ndarray, int]:
    """:func:`read_image` and how many times smaller than its file the image came: 1, or a power of 2 (sides are rounded
    up) where the file has more than ``LARGE`` pixels."""
    with opened(path) as image:
        times, width = reduction(image.size), image.width
        if times > 1:  # a JPEG is then decoded at this size
            image.draft(None, (image.width // times, image.height // times))
        orientation = _orientation(image) if upright else 1
        rgb = _rgb(loaded(image, path), path)
        left = times // round(width / rgb.width)
        if left > 1:
            rgb = rgb.reduce(left)
        return np.asarray(turned(rgb, orientation)), times


def reduction(size: tuple[int, int]) -> int:
    """How many times smaller an image of this width and height is read: the least power of 2 that leaves at most
    ``LARGE`` pixels."""
    times = 1
    while size[0] * size[1] > LARGE * times**2:
        times *= 2
    return times


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """An image as an EXIF orientation in 1..8 says."""
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def read_orientation(path: File) -> int:
    """The EXIF orientation of an image as it is stored; 1 where it says nothing.

    Raises:
        DataError: the file is missing or cannot be read as an image.
    """
    with opened(path) as image:
        return _stored_orientation(image)


def _orientation(image: Image.Image) -> int:
    """How an opened image has yet to be turned; a TIFF is turned by Pillow."""
    return 1 if image.format == "TIFF" else _stored_orientation(image)


def _stored_orientation(image: Image.Image) -> int:
    # Of a PNG Pillow would read all pixels to find an entry behind them.
    exif = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
    return exif.get(ExifTags.Base.Orientation, 1)


def read_size(path: File, upright: bool = False) -> tuple[int, int]:
    """Width and height from the file's header; ``upright`` as in :func:`read_image`.

    Raises:
        DataError: the file is missing, cannot be read as an image, or is too large.
    """
    with opened(path) as image:
        return image.size[::-1] if upright and _orientation(image) >= 5 else image.size


def opened(path: File) -> Image.Image:
    """An image of which the header alone was read.

    Raises:
        DataError: the file is missing, cannot be read as an image, or has more than ``LARGEST`` pixels.
    """
    try:
        with _opening:  # Pillow's own limit, on untrusted files, is lower and the same for every caller
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(path.open() if isinstance(path, ZipEntry) else path)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.") from error
    except Exception as error:  # PIL's decoders fail in many ways on damaged files
        cure = f": it holds HEIC ({HEIF_CURE})" if not HEIF and _is_heif(path) else ""
        raise DataError(f"{path} cannot be read as an image{cure}.") from error
    if image.width * image.height > LARGEST:
        image.close()
        raise DataError(
            f"{path} has {image.width} x {image.height} px, more than the {LARGEST // 10**6} million that are read: "
            "make it smaller."
        )
    return image


def _is_heif(path: File) -> bool:
    """Whether a file says that it holds HEIC, whatever it is called: telephones save it as .jpg, too."""
    try:
        with path.open() if isinstance(path, ZipEntry) else open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif", b"msf")


def loaded(image: Image.Image, path: File) -> Image.Image:
    """An opened image with its pixels.

    Raises:
        DataError: the file is damaged.
    """
    try:
        image.load()
    except Exception as error:
        raise DataError(f"{path} is damaged: it cannot be read to its end.") from error
    return image


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def is_deep(image: Image.Image) -> bool:
    """Whether an image has one channel of more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def _rgb(image: Image.Image, path: File) -> Image.Image:
    if is_deep(image):
        return Image.fromarray(eight_bits(image, path)).convert("RGB")
    if not has_alpha(image):
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, BACKDROP), image.convert("RGBA")).convert("RGB")


def eight_bits(image: Image.Image, path: File) -> np.ndarray:
    """Grey values [H,W] uint8 of an image with one channel of more bits.

    Raises:
        DataError: numbers whose range is not known: integers of 32 bits beyond 0..255, other numbers beyond it.
    """
    values = np.asarray(image)
    if image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM")):  # 16 bits, as "I" in older Pillows
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):  # also where a value is NaN
        raise DataError(
            f"{path} holds numbers from {low:g} to {high:g}, and it is not known which of them are black and white: "
            "scale them to 0..1 or 0..255, or save the image with 8 or 16 bits."
        )
    return (values * (255.0 if image.mode == "F" and high <= 1 else 1.0)).round().astype(np.uint8)
