"""Maps of log densities: from the positions of a grid to the pixels of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import center_of_mass, find_objects, gaussian_filter, label
from torch.nn.functional import interpolate

from dfkde_sklearn._explanation import Region

# Steps between two positions, at which maps are smoothed, and the width of the smoothing in units of a position: a
# quarter, 4 pixels of a map of stride 16.
FINE = 8
_SIGMA = 0.25


def lie_over_images(extractor: Any) -> bool:
    """Return whether maps of the features of an extractor lie over whole images, and not over a part cut out."""
    return bool(getattr(extractor, "sees_whole_images", True))


def fine_maps(maps: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return maps (n, h, w) at eight times as many positions along each axis, smoothed.

    Bilinear interpolation between the positions, and a Gaussian filter whose standard deviation is a quarter of the
    distance between two of them. A map of one position is constant.
    """
    steps = tuple(FINE if length > 1 else 1 for length in maps.shape[1:])
    shape = (maps.shape[1] * steps[0], maps.shape[2] * steps[1])
    fine = resized(maps, shape)
    sigmas = (0.0, *(_SIGMA * step if step > 1 else 0.0 for step in steps))
    return gaussian_filter(fine, sigmas, mode="nearest")


def image_maps(maps: NDArray[np.floating], shapes: Sequence[tuple[int, int]]) -> Iterator[NDArray[np.floating]]:
    """Yield each of the maps (n, h, w) in the pixels (height, width) of its image."""
    for i, shape in enumerate(shapes):
        yield resized(fine_maps(maps[i : i + 1]), shape)[0]


def resized(maps: NDArray[np.floating], shape: tuple[int, int]) -> NDArray[np.floating]:
    """Return maps (n, h, w) by bilinear interpolation at the centres of the pixels of another shape."""
    tensor = torch.from_numpy(np.ascontiguousarray(maps))[:, None]
    return interpolate(tensor, size=shape, mode="bilinear", align_corners=False)[:, 0].numpy()


def regions_of(of_image: NDArray[np.floating], threshold: float, image: int, p_value: float) -> list[Region]:
    """Return the connected regions of a map (height, width) below the threshold, the lowest first.

    Pixels that touch at a corner are connected. The image's number and p-value are those of `Region`.
    """
    below = of_image < threshold
    numbers, n_regions = label(below, structure=np.ones((3, 3)))
    centres = center_of_mass(below, numbers, range(1, n_regions + 1))
    regions = []
    for i, found in enumerate(find_objects(numbers)):
        assert found is not None  # every number has pixels
        rows, columns = found
        inside = numbers[rows, columns] == i + 1
        lowest = float(of_image[rows, columns][inside].min())
        box = int(rows.start), int(columns.start), int(rows.stop), int(columns.stop)
        row, column = map(float, centres[i])
        regions.append(Region(image, int(inside.sum()), *box, row, column, lowest, p_value))
    return sorted(regions, key=lambda region: region.log_density)
