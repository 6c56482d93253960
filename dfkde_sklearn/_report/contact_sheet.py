"""A contact sheet: one picture of many images, each with a verdict and captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dfkde_sklearn._report.overlay import outlined
from dfkde_sklearn._report.text import printable

# Tiles in a row.
COLUMNS = 6
# Lengths in pixels.
TILE = 200
GAP = 16
MARGIN = 32
BAR = 5
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 30, 18, 15

PAPER = (252, 252, 250)
MOUNT = (228, 228, 226)
INK = (28, 30, 34)
FAINT = (104, 108, 116)
NORMAL = (70, 140, 110)
ANOMALOUS = (205, 50, 50)


class Tile(NamedTuple):
    """An image on the sheet.

    picture : PIL image, of any size and mode.
    caption : str, the first line below it; the end of it if it is too long.
    detail : str, the second line.
    anomalous : bool, the verdict: the colour of the bar above the captions.
    mask : ndarray (height, width) of bool, outlined on the picture; None draws no outline.
    """

    picture: Image.Image
    caption: str
    detail: str
    anomalous: bool
    mask: NDArray[np.bool_] | None = None


class Section(NamedTuple):
    """Tiles under a heading."""

    heading: str
    tiles: Sequence[Tile]


def contact_sheet(
    title: str, notes: Sequence[str], sections: Sequence[Section], *, columns: int = COLUMNS
) -> Image.Image:
    """Return one picture of all tiles, in rows below the headings of their sections.

    Parameters
    ----------
    title : str
        The first line.
    notes : sequence of str
        The lines below it, in smaller type.
    sections : sequence of Section
        The tiles; sections without any are left out.
    columns : int, default=6
        Tiles in a row.

    Returns
    -------
    PIL.Image.Image
        Of mode "RGB".
    """
    sections = [section for section in sections if section.tiles]
    row_height = TILE + BAR + 2 * (SMALL_SIZE + 6) + GAP
    heading_height = TEXT_SIZE + 2 * GAP
    n_rows = sum(-(-len(section.tiles) // columns) for section in sections)
    head_height = MARGIN + TITLE_SIZE + GAP + len(notes) * (TEXT_SIZE + 8)
    width = 2 * MARGIN + columns * TILE + (columns - 1) * GAP
    sheet = Image.new("RGB", (width, head_height + len(sections) * heading_height + n_rows * row_height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - GAP // 2), printable(title), INK, ImageFont.load_default(TITLE_SIZE))
    for line, note in enumerate(notes):
        place = (MARGIN, MARGIN + TITLE_SIZE + GAP // 2 + line * (TEXT_SIZE + 8))
        draw.text(place, printable(note), FAINT, ImageFont.load_default(TEXT_SIZE))
    top = head_height
    for section in sections:
        draw.line((MARGIN, top + GAP // 2, width - MARGIN, top + GAP // 2), MOUNT)
        draw.text((MARGIN, top + GAP), printable(section.heading), INK, ImageFont.load_default(TEXT_SIZE))
        top += heading_height
        for start in range(0, len(section.tiles), columns):
            for column, tile in enumerate(section.tiles[start : start + columns]):
                _draw_tile(sheet, draw, tile, MARGIN + column * (TILE + GAP), top)
            top += row_height
    return sheet


def _draw_tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int) -> None:
    draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), MOUNT)
    picture = tile.picture.convert("RGB")
    scale = TILE / max(picture.size)
    # ImageOps.contain makes elongated images lines without a pixel.
    width, height = (max(1, round(scale * side)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if tile.mask is not None:
        picture = outlined(picture, tile.mask)
    sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
    bottom = top + TILE
    draw.rectangle((left, bottom, left + TILE - 1, bottom + BAR - 1), ANOMALOUS if tile.anomalous else NORMAL)
    font = ImageFont.load_default(SMALL_SIZE)
    draw.text((left, bottom + BAR + 4), _shortened(tile.caption, font), INK, font)
    draw.text((left, bottom + BAR + SMALL_SIZE + 9), _shortened(tile.detail, font), FAINT, font)


def _shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Return the end of the text, no wider than a tile: images are distinguished by the end of their path."""
    text = printable(text)
    if font.getlength(text) <= TILE:
        return text
    start = next(i for i in range(1, len(text) + 1) if font.getlength("..." + text[i:]) <= TILE)
    return "..." + text[start:]
