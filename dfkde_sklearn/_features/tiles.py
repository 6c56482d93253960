"""Overlapping tiles of an image, and one grid of positions from all of them."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

# Of a tile, that neighbours share at least.
_OVERLAP = 0.25


class Tiling(NamedTuple):
    """How an image is cut into tiles, and how their positions lie on its grid.

    Parameters
    ----------
    tile : tuple (height, width)
        Pixels of a tile.
    tile_grid : tuple (h, w)
        Positions of a tile.
    starts : tuple of list of int
        Where tiles begin along the height and along the width, in positions.
    """

    tile: tuple[int, int]
    tile_grid: tuple[int, int]
    starts: tuple[list[int], list[int]]

    @property
    def grid(self) -> tuple[int, int]:
        """The positions (H, W) of the image."""
        rows, columns = (starts[-1] + n for starts, n in zip(self.starts, self.tile_grid, strict=True))
        return rows, columns

    def cut(self, images: Tensor) -> Tensor:
        """Return the tiles (n * n_tiles, 3, height, width) of images (n, 3, H, W)."""
        (height, width), (down, across) = self.tile, self._pixels_of_a_position()
        tiles = [
            images[:, :, y * down : y * down + height, x * across : x * across + width]
            for y in self.starts[0]
            for x in self.starts[1]
        ]
        return torch.stack(tiles, dim=1).flatten(0, 1)

    def joined(self, vectors: Tensor) -> Tensor:
        """Return the vectors (n, H, W, C) of images from those of their tiles (n * n_tiles, h, w, C).

        Where tiles overlap it is their mean, with weights that fall towards the borders of each.
        """
        n_down, n_across = map(len, self.starts)
        tiles = vectors.unflatten(0, (-1, n_down, n_across))
        down, across = (
            _shares(starts, n, total).to(vectors)
            for starts, n, total in zip(self.starts, self.tile_grid, self.grid, strict=True)
        )
        return torch.einsum("Yah,Xbw,nabhwc->nYXc", down, across, tiles)

    def _pixels_of_a_position(self) -> tuple[int, int]:
        return self.tile[0] // self.tile_grid[0], self.tile[1] // self.tile_grid[1]


def tiling(image: tuple[int, int], tile: tuple[int, int], tile_grid: tuple[int, int]) -> Tiling:
    """Return the fewest tiles that cover an image (height, width) and overlap by a quarter at least.

    Raises
    ------
    ValueError
        If the tile is larger than the image, or either is not a whole number of positions.
    """
    starts: list[list[int]] = []
    for name, length, of_tile, n in zip(("height", "width"), image, tile, tile_grid, strict=True):
        if of_tile > length:
            raise ValueError(
                f"tile_size: tiles have a {name} of {of_tile} pixels, and images are resized to {length}. "
                "Give an image_size of at least that."
            )
        if of_tile % n:
            raise ValueError(
                f"tile_size: a {name} of {of_tile} pixels is not a multiple of the {n} positions that the layers have "
                f"there. Give a multiple of the stride of the layers, such as {of_tile // n * n}."
            )
        step = of_tile // n
        if length % step:
            raise ValueError(
                f"image_size: a {name} of {length} pixels is not a multiple of {step}, the pixels of a position of the "
                f"tiles. Give {length // step * step} or {ceil(length / step) * step}."
            )
        rest = length // step - n
        n_tiles = 1 + ceil(rest / max(1, int((1 - _OVERLAP) * n)))
        starts.append([round(i * rest / max(1, n_tiles - 1)) for i in range(n_tiles)])
    return Tiling(tile, tile_grid, (starts[0], starts[1]))


def _shares(starts: list[int], n: int, total: int) -> Tensor:
    """Return the shares (total, n_tiles, n) that the positions of tiles have in the positions of a line."""
    from_border = torch.minimum(torch.arange(n), torch.arange(n).flip(0)) + 1.0
    weights = torch.zeros(total, len(starts), n)
    for i, start in enumerate(starts):
        weights[torch.arange(start, start + n), i, torch.arange(n)] = from_border
    return weights / weights.sum((1, 2), keepdim=True)
