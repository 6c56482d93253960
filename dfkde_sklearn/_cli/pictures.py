"""Pictures of images with their maps, as ``dfkde score`` writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dfkde_sklearn import PatchDFKDEDetector
from dfkde_sklearn._cli.files import check_new, png
from dfkde_sklearn._cli.tables import Row
from dfkde_sklearn._images import as_images
from dfkde_sklearn._maps import image_maps
from dfkde_sklearn._report.contact_sheet import Section, Tile, contact_sheet
from dfkde_sklearn._report.overlay import mask, overlay


class ShownMap:
    """The pictures of the map of an image, made when they are written.

    Parameters
    ----------
    detector : PatchDFKDEDetector
    path : str
        The image.
    of_grid : ndarray of shape (h, w)
        Its log densities on the grid.
    """

    def __init__(self, detector: PatchDFKDEDetector, path: str, of_grid: NDArray[np.floating]) -> None:
        self.detector, self.path, self.of_grid = detector, path, of_grid

    def picture(self) -> Image.Image:
        """Return the image with its anomalous positions in red."""
        picture = as_images(self.path)[0]
        of_image = self._of_shape((picture.height, picture.width))
        return overlay(picture, of_image, self.detector.map_offset_, self.detector.threshold_steepness)

    def overlay(self) -> bytes:
        """Return the same as a PNG."""
        return png(self.picture())

    def mask(self) -> bytes:
        """Return the anomalous positions as a PNG."""
        return png(mask(self._of_shape(as_images(self.path).shape(0)), self.detector.map_offset_))

    def _of_shape(self, shape: tuple[int, int]) -> NDArray[np.floating]:
        return next(image_maps(self.of_grid[None], [shape]))


def map_files(folder: Path, paths: Sequence[str], kinds: Sequence[str], force: bool) -> dict[str, list[Path]]:
    """Return the files in a folder for the map of each image, none of which exists without `force`."""
    # As in the folders that the images are in, where they are in several.
    places = {path: Path(path).absolute() for path in paths}
    root = os.path.commonpath([place.parent for place in places.values()])
    files, taken = {}, dict[str, str]()
    for path, place in places.items():
        name = "_".join(place.relative_to(root).parts)
        files[path] = [folder / f"{name}.{kind}.png" for kind in kinds]
        other = taken.setdefault(name, path)
        if other != path:
            raise ValueError(
                f"--maps: {other} and {path} would both have the map {name}.map.png. Rename one, or score them in two "
                "runs."
            )
    if folder.exists():
        for of_image in files.values():
            for file in of_image:
                check_new(file, force)
    return files


def sheet(model: str, summary: str, rows: Sequence[Row], shown: Mapping[str, ShownMap]) -> bytes:
    """Return a PNG of images, the least normal one first, with their maps if there are any."""
    tiles = [
        Tile(
            shown[row.path].picture() if shown else as_images(row.path)[0],
            row.path,
            f"{rank}: score {row.score:.1f}, P {row.p_anomalous:.2f}",
            row.verdict == "anomalous",
        )
        for rank, row in enumerate(rows, 1)
    ]
    return png(
        contact_sheet(
            f"dfkde score: {model}",
            [
                summary,
                "Bars: red is called anomalous, green is called normal.",
                *(["Red, within yellow lines: the positions that are called anomalous."] if shown else []),
            ],
            [Section(f"The {len(tiles)} least normal images", tiles)],
        )
    )
