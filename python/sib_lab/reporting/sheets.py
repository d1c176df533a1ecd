"""Sheets: a picture, beside it its explanations laid over it, and what the network says, drawn as pixels."""

import io
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 224  #: shorter side of a picture on a sheet, px
LONGEST = 3 * SIDE  #: of its longer side, px
GAP, MARGIN, LINE = 8, 12, 18  #: px
INK, FAINT, PAPER = "#1f2933", "#616e7c", "white"
BRIGHTEST = 0.005  #: share of a map's pixels that has the brightest colour
DPI = 110  #: in .pdf and .svg


def shown_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a picture on a sheet, px: its aspect ratio, the shorter side SIDE where the longer allows."""
    scale = min(SIDE / min(width, height), LONGEST / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def sheet(picture: np.ndarray, caption: Sequence[str], maps: Mapping[str, np.ndarray]) -> Image.Image:
    """The caption, and under it the picture and each map over it, with its name above.

    Args:
        picture: [H,W,3] uint8, shown as large as it is.
        caption: lines; the first one is dark.
        maps: name for people -> map [h,w] >= 0, see :func:`overlay`.
    """
    height, width = picture.shape[:2]
    tiles = [picture, *(overlay(picture, values) for values in maps.values())]
    titles = ["", *maps]
    step = max([width, *(text_width(title) for title in titles)]) + GAP
    top = MARGIN + LINE * len(caption) + LINE + GAP
    full = max([step * len(tiles) - GAP, *(text_width(line) for line in caption)]) + 2 * MARGIN
    drawn = Image.new("RGB", (full, top + height + MARGIN), PAPER)
    draw = ImageDraw.Draw(drawn)
    for number, line in enumerate(caption):
        draw.text((MARGIN, MARGIN + LINE * number), printable(line), INK if number == 0 else FAINT, font())
    for column, (tile, title, values) in enumerate(zip(tiles, titles, [None, *maps.values()], strict=True)):
        left = MARGIN + step * column
        draw.text((left, top - LINE - 2), title, INK, font())
        drawn.paste(Image.fromarray(tile), (left, top))
        if values is not None and not (np.isfinite(values).all() and values.any()):
            told = "zero everywhere" if np.isfinite(values).all() else "not finite"
            draw.text((left + 6, top + height - LINE - 4), told, "white", font())
    return drawn


def overlay(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A map [h,w] >= 0 in colour over the picture [H,W,3] uint8 in grey; [H,W,3] uint8.

    The brightest colour is for the BRIGHTEST share of the pixels, so that a few of them do not leave all others dark.
    """
    grey = np.asarray(Image.fromarray(picture).convert("L"), dtype=np.float32)[..., None]
    values = np.nan_to_num(values.astype(np.float32), posinf=0)
    size = picture.shape[1::-1]
    heat = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))
    highest = float(np.quantile(heat, 1 - BRIGHTEST)) or float(heat.max())
    heat = np.clip(heat / max(highest, 1e-30), 0, 1)
    colour = palette()[(heat * 255).round().astype(np.uint8)]
    share = 0.45 + 0.45 * heat[..., None]  # of the colour: where nothing is found, the picture stays in sight
    return (share * colour + (1 - share) * grey).round().astype(np.uint8)


@cache
def palette() -> np.ndarray:
    """[256,3] float32 in 0..255."""
    return (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.float32)


@cache
def font() -> ImageFont.FreeTypeFont:
    """matplotlib's, which knows most alphabets."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 13)


def text_width(text: str) -> int:
    """px"""
    return round(font().getlength(printable(text)))


def printable(text: str) -> str:
    """Without line breaks, control characters and bytes that are no text, all of which file names may hold."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets one under the other."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    top = 0
    for one in sheets:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def encoded(picture: Image.Image, ending: str) -> bytes:
    """A picture file; ``ending``: .png, .jpg, .jpeg, .webp, .pdf or .svg."""
    file = io.BytesIO()
    if ending in (".pdf", ".svg"):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(picture.width / DPI, picture.height / DPI))
        figure.figimage(np.asarray(picture))
        figure.savefig(file, format=ending[1:], dpi=DPI)
    elif ending == ".png":
        # Of photographs as small as by the default, and in half the time.
        picture.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    else:
        picture.save(file, "WEBP" if ending == ".webp" else "JPEG", quality=90)
    return file.getvalue()
