"""Pictures of a report: which images are shown, in how many bytes, and which training images are like them."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dfkde_sklearn._images import Images
from dfkde_sklearn._maps import image_maps
from dfkde_sklearn._report.overlay import outlined, overlay
from dfkde_sklearn.datasets import read_mask

# WebP takes about half the bytes of JPEG for small pictures. The qualities are tried in turn until a picture fits.
_FORMAT, _QUALITIES = "WEBP", (80, 60, 40, 20, 5)
# Training images whose features say how much each feature varies.
_N_SCALED_BY = 64


class Candidates(NamedTuple):
    """Scored images, from which the sections of a gallery choose.

    scores : ndarray of shape (n,), float64
    is_anomalous : ndarray of shape (n,), bool, the verdicts.
    is_defective : ndarray of shape (n,), bool, or None where the kinds are not known.
    """

    scores: NDArray[np.float64]
    is_anomalous: NDArray[np.bool_]
    is_defective: NDArray[np.bool_] | None


class Section:
    """A part of a gallery: the first images by some rank, of all that it has been offered so far.

    Parameters
    ----------
    heading : str
        What people read above it.
    ranks : callable
        From `Candidates` to floats (n,): the lowest come first, and infinite ones are not chosen.
    n_most : int
        The number of images that it keeps.
    """

    def __init__(self, heading: str, ranks: Callable[[Candidates], NDArray[np.float64]], n_most: int) -> None:
        self.heading = heading
        self._ranks = ranks
        self._n_most = n_most
        self._chosen: list[tuple[float, int]] = []

    def offer(self, indices: Sequence[int], candidates: Candidates) -> None:
        """Choose among the images chosen before and some more, at `indices`."""
        ranked = zip(self._ranks(candidates).tolist(), indices, strict=True)
        self._chosen += [(rank, i) for rank, i in ranked if rank < np.inf]
        self._chosen = sorted(self._chosen)[: self._n_most]

    def indices(self) -> list[int]:
        """Return the images chosen, in order."""
        return [i for _, i in self._chosen]


def sections(offset: float, *, labelled: bool, n_most: int) -> list[Section]:
    """Return the sections of a gallery: where kinds are known, the mistakes have sections of their own.

    Parameters
    ----------
    offset : float
        The threshold of scores.
    labelled : bool
        Whether `Candidates.is_defective` is known.
    n_most : int
        The number of images in each.

    Returns
    -------
    list of Section
        Empty ones.
    """

    def mistakes(of: Candidates, *, defective: bool) -> NDArray[np.bool_]:
        assert of.is_defective is not None
        return (of.is_defective == defective) & (of.is_anomalous != defective)

    made = [
        Section("The least normal images", lambda of: of.scores, n_most),
        Section("The borderline images, nearest to the threshold", lambda of: np.abs(of.scores - offset), n_most),
    ]
    if labelled:
        made += [
            Section(
                "Missed: defective images that are called normal, the most normal ones first",
                lambda of: np.where(mistakes(of, defective=True), -of.scores, np.inf),
                n_most,
            ),
            Section(
                "False alarms: good images that are called anomalous, the least normal ones first",
                lambda of: np.where(mistakes(of, defective=False), of.scores, np.inf),
                n_most,
            ),
        ]
    return made


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """Return a picture of mode "RGB" that is at most `side` pixels wide and high, with the same proportions."""
    copy = picture.convert("RGB")
    copy.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return copy


def encoded(picture: Image.Image, n_bytes: int) -> str:
    """Return a picture as base64 of WebP.

    Parameters
    ----------
    picture : PIL image
        Of mode "RGB".
    n_bytes : int
        The most that the file may have: the quality falls, and at last the size, until it fits.

    Returns
    -------
    str
        A third longer than the file.
    """
    while True:
        for quality in _QUALITIES:
            file = io.BytesIO()
            picture.save(file, format=_FORMAT, quality=quality)
            if file.tell() <= n_bytes or max(picture.size) == 1:
                return base64.b64encode(file.getvalue()).decode("ascii")
        picture = shrunk(picture, max(1, max(picture.size) // 2))


def pictures(
    picture: Image.Image, grid_map: NDArray[np.floating] | None, mask: NDArray[np.bool_] | None, detector: Any
) -> dict[str, Image.Image]:
    """Return the pictures of an image in the gallery.

    Parameters
    ----------
    picture : PIL image
        The image, of mode "RGB".
    grid_map : ndarray of shape (h, w) or None
        Its log densities at the positions of `detector`.
    mask : ndarray of shape (height, width), bool, or None
        Its true defect.
    detector : detector
        Has the threshold of maps, where there is one.

    Returns
    -------
    dict
        "image"; "map", where there is one; "truth", where there is a defect.
    """
    shown = {"image": picture}
    if grid_map is not None:
        of_image = next(image_maps(grid_map[None], [(picture.height, picture.width)]))
        shown["map"] = overlay(picture, of_image, detector.map_offset_, detector.threshold_steepness)
    if mask is not None and mask.any():
        shown["truth"] = outlined(picture, mask)
    return shown


def checked_mask(mask: Any, shape: tuple[int, int], name: str) -> NDArray[np.bool_] | None:
    """Return the mask of an image as booleans.

    Parameters
    ----------
    mask : path, array-like of shape (height, width) or None
        Nonzero where the image is defective.
    shape : tuple (height, width)
        That of the image.
    name : str
        That of the image.

    Returns
    -------
    ndarray of shape (height, width), bool, or None
        The mask.

    Raises
    ------
    ValueError
        If the mask has another shape than its image, or cannot be read.
    OSError
        If there is no such file.
    """
    if mask is None:
        return None
    values = read_mask(mask) if isinstance(mask, str | os.PathLike) else np.asarray(mask) != 0
    if values.shape != shape:
        raise ValueError(
            f"The mask of {name} has shape {values.shape}, and the image {shape} (height, width): they must be equal."
        )
    return values


def nearest(
    transform: Callable[[Any], Any],
    queries: Any,
    training: Images,
    n_nearest: int,
    blocks: Iterable[Sequence[int]],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the training images whose features are nearest to those of other images.

    The distance is the square root of the mean over all features, at all positions, of the squared difference, each
    feature divided by its standard deviation over some training images.

    Parameters
    ----------
    transform : callable
        From images to features, an array whose first axis is that of the images.
    queries : images
        Whatever `transform` takes.
    training : Images
        The training images, of which one block after the other is described.
    n_nearest : int
        The number to return for each query.
    blocks : iterable of sequence of int
        The positions of all training images.

    Returns
    -------
    indices : ndarray of shape (n_queries, n_nearest)
        Positions of training images, the nearest first; fewer columns where there are fewer training images.
    distances : ndarray of the same shape
        In standard deviations.
    """

    def rows(images: Any) -> NDArray[np.float32]:
        features = np.asarray(transform(images), dtype=np.float32)
        return features.reshape(len(features), -1)

    sample = np.unique(np.linspace(0, len(training) - 1, _N_SCALED_BY).round().astype(np.int64)).tolist()
    deviations = rows(training.items(sample)).std(axis=0)
    # A feature that does not vary says nothing about which image is nearer, but for its own difference.
    deviations[deviations == 0] = 1
    asked = rows(queries) / deviations
    indices, squares = np.empty((len(asked), 0), np.int64), np.empty((len(asked), 0))
    for block in blocks:
        known = rows(training.items(block)) / deviations
        new = np.stack([((known - row) ** 2).mean(axis=1, dtype=np.float64) for row in asked])
        squares = np.concatenate([squares, new], axis=1)
        indices = np.concatenate([indices, np.tile(np.asarray(block), (len(asked), 1))], axis=1)
        order = np.argsort(squares, axis=1, kind="stable")[:, :n_nearest]
        squares, indices = np.take_along_axis(squares, order, 1), np.take_along_axis(indices, order, 1)
    return indices, np.sqrt(squares)
