"""One pass over the images of a report: their scores, and pictures of those that are shown."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dfkde_sklearn._calibration import Assessment
from dfkde_sklearn._images import MAX_THREADS, Images
from dfkde_sklearn._maps import lie_over_images
from dfkde_sklearn._report.gallery import (
    Candidates,
    Section,
    checked_mask,
    encoded,
    nearest,
    pictures,
    sections,
    shrunk,
)
from dfkde_sklearn._threads import computed_ahead
from dfkde_sklearn.datasets._mvtec import NORMAL

# Images that are read and scored at a time, so that their features take little memory.
_IMAGES = 64
# Images in a section of the gallery, and training images beside each of them.
N_SHOWN, N_NEAREST = 12, 4
# Pictures in the gallery, of training images, and in the table: their longest sides in pixels, and the most bytes of
# one. With base64, all of them together stay below 18 MB, whatever the images are.
_LARGE, LARGE_BYTES = 480, 30_000
_NEIGHBOUR, NEIGHBOUR_BYTES = 144, 4_000
_SMALL, _SMALLEST = 128, 64
_SMALL_BYTES, _ALL_SMALL_BYTES = 6_000, 8_000_000
# Rows of the table that have a picture, at most: those of the least normal images.
N_SMALL = 5_000


class Scored(NamedTuple):
    """What one pass over the images leaves.

    readable : list of int, the positions of the images that `assessment` is about.
    broken : dict, the reason why each other image cannot be read.
    small : dict, a picture for the table by position, in base64.
    large : dict, the pictures in the gallery by position, each in base64.
    gallery : list of Section, the images shown in it.
    """

    readable: list[int]
    assessment: Assessment
    broken: dict[int, str]
    small: dict[int, str]
    large: dict[int, dict[str, str]]
    gallery: list[Section]


def score_images(
    detector: Any,
    images: Images,
    kinds: NDArray[np.str_] | None,
    masks: Any,
    skip_broken: bool,
    verbose: bool,
) -> Scored:
    """Read and score images, and keep the pictures that are shown: of the others nothing is left in memory.

    Parameters
    ----------
    detector : detector
        Fitted on images.
    images : Images
        All of them.
    kinds : ndarray of shape (n_images,), dtype str, or None
        What they are, of which "good" is one; None where that is not known.
    masks : sequence of length n_images or None
        As in `write_report`.
    skip_broken : bool
        Whether an image that cannot be read is no error.
    verbose : bool
        Whether to show the progress.

    Returns
    -------
    Scored
        The answers and the pictures.

    Raises
    ------
    ValueError
        If an image cannot be read and is not to be skipped; if all are; or if a mask does not fit its image.
    """
    small_side, small_bytes = small_size(len(images))
    has_maps = _has_maps(detector)
    gallery = sections(detector.offset_, labelled=kinds is not None, n_most=N_SHOWN)
    small: dict[int, str] = {}
    large: dict[int, dict[str, str]] = {}
    broken: dict[int, str] = {}
    score_of: dict[int, float] = {}
    assessments: list[Assessment] = []
    with tqdm(total=len(images), desc="Scoring", unit="image", disable=not verbose) as progress:
        for block in _blocks(len(images)):
            views: dict[int, Image.Image] = {}
            read = partial(_read, images, small_side, small_bytes)
            for i, found in zip(block, computed_ahead(read, block, MAX_THREADS, 2 * MAX_THREADS), strict=True):
                if isinstance(found, Exception):
                    if not skip_broken:
                        raise found
                    broken[i] = str(found)
                else:
                    views[i], small[i] = found
            if views:
                readable = list(views)
                assessment, grid_maps = _assessed(detector, images.items(readable), has_maps)
                assessments.append(assessment)
                scores = assessment.log_density.astype(np.float64)
                score_of |= zip(readable, scores.tolist(), strict=True)
                candidates = Candidates(
                    scores, assessment.label == -1, None if kinds is None else kinds[readable] != NORMAL
                )
                for section in gallery:
                    section.offer(readable, candidates)
                chosen = {i for section in gallery for i in section.indices()}
                large = {i: shown for i, shown in large.items() if i in chosen}
                for place, i in enumerate(readable):
                    if i in chosen:
                        mask = None if masks is None else checked_mask(masks[i], images.shape(i), images.name(i))
                        grid_map = None if grid_maps is None else grid_maps[place]
                        shown = pictures(views[i], grid_map, mask, detector)
                        large[i] = {name: encoded(picture, LARGE_BYTES) for name, picture in shown.items()}
                if len(small) > N_SMALL:
                    small = {i: small[i] for i in sorted(small, key=score_of.__getitem__)[:N_SMALL]}
            progress.update(len(block))
    if not assessments:
        raise ValueError(f"None of the {len(images)} images can be read. {next(iter(broken.values()))}")
    merged = Assessment(*map(np.concatenate, zip(*assessments, strict=True)))
    return Scored(list(score_of), merged, broken, small, large, gallery)


def small_size(n_images: int) -> tuple[int, int]:
    """Return the longest side in pixels, and the most bytes, of a picture in the table: all of them have a budget."""
    n_bytes = min(_SMALL_BYTES, _ALL_SMALL_BYTES // min(n_images, N_SMALL))
    return int(np.clip(_SMALL * (n_bytes / _SMALL_BYTES) ** 0.5, _SMALLEST, _SMALL)), n_bytes


def _read(images: Images, small_side: int, small_bytes: int, i: int) -> tuple[Image.Image, str] | ValueError | OSError:
    """Return an image in the size of the gallery and its picture in the table, or why it cannot be read."""
    try:
        view = shrunk(images[i], _LARGE)
    except (ValueError, OSError) as error:
        return error
    return view, encoded(shrunk(view, small_side), small_bytes)


def _blocks(n: int) -> Iterator[range]:
    for start in range(0, n, _IMAGES):
        yield range(start, min(start + _IMAGES, n))


def _has_maps(detector: Any) -> bool:
    """Return whether the detector has maps that lie over its images."""
    if not hasattr(detector, "assess_with_maps") or prod(detector.grid_shape_) == 1:
        return False
    return lie_over_images(detector.features_)


def _assessed(detector: Any, images: Any, has_maps: bool) -> tuple[Assessment, NDArray[np.floating] | None]:
    if has_maps:
        assessment, grid_maps = detector.assess_with_maps(images, resolution="grid")
        return assessment, grid_maps
    return detector.assess(images), None


def neighbours(
    detector: Any, images: Images, shown: list[int], training: Images, verbose: bool
) -> tuple[dict[int, list[tuple[int, float]]], dict[int, str]]:
    """Return the training images most like those at `shown`, and pictures of them.

    Parameters
    ----------
    detector : detector
        Its features determine which images are similar.
    images, training : Images
        Those of the report, and those of the fit.
    shown : list of int
        Positions in `images`.
    verbose : bool
        Whether to show the progress.

    Returns
    -------
    nearest : dict
        For each of `shown` the positions in `training` and the distances, the nearest first.
    pictures : dict
        For each of these positions a picture, in base64.
    """
    with tqdm(total=len(training), desc="Comparing", unit="image", disable=not verbose) as progress:

        def blocks() -> Iterator[range]:
            for block in _blocks(len(training)):
                yield block
                progress.update(len(block))

        transform = detector.features_.transform
        indices, distances = nearest(transform, images.items(shown), training, N_NEAREST, blocks())
    near = {
        i: list(zip(of_image, [round(length, 3) for length in lengths], strict=True))
        for i, of_image, lengths in zip(shown, indices.tolist(), distances.tolist(), strict=True)
    }
    pictured = np.unique(indices).tolist()
    return near, {j: encoded(shrunk(training[j], _NEIGHBOUR), NEIGHBOUR_BYTES) for j in pictured}
