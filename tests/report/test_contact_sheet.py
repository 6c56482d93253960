"""The contact sheet: every image has its place, and defects stay visible."""

import numpy as np
from PIL import Image

from dfkde_sklearn._report.contact_sheet import ANOMALOUS, NORMAL, TILE, Section, Tile, contact_sheet
from dfkde_sklearn._report.overlay import DEFECT


def test_a_mask_is_outlined_and_not_painted_over():
    mask = np.zeros((TILE, TILE), dtype=bool)
    mask[50:80, 60:120] = True
    grey = Image.new("L", (TILE, TILE), 90)
    sheet = np.asarray(contact_sheet("", [], [Section("", [Tile(grey, "", "", True, mask)])]))
    rows, columns = np.nonzero((sheet == DEFECT).all(axis=-1))
    top, left = rows.min(), columns.min()
    assert (rows.max() - top + 1, columns.max() - left + 1) == (30 + 4, 60 + 4)
    assert (sheet[top + 2 : top + 32, left + 2 : left + 62] == 90).all()


def test_every_tile_is_on_the_sheet_and_empty_sections_are_not():
    def tile(anomalous):
        return Tile(Image.new("L", (30, 90)), "a long name " * 9, "", anomalous)

    sections = [Section("a", [tile(True)] * 7), Section("b", []), Section("c", [tile(False)] * 2)]
    sheet = np.asarray(contact_sheet("title", ["note"], sections, columns=3))
    bars = [(sheet == colour).all(axis=-1).sum() / TILE for colour in (ANOMALOUS, NORMAL)]
    assert bars[0] / 7 == bars[1] / 2
    without = contact_sheet("title", ["note"], [sections[0], sections[2]], columns=3)
    assert sheet.shape[:2] == (without.height, without.width)
