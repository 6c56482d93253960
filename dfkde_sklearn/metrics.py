"""How well anomaly maps show where the defects are: pixel AUROC, AUPRO, and which defective regions are found.

The maps are log densities, as the detectors return them: **lower is more anomalous**. Negate maps that are higher where
an image is anomalous.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

__all__ = ["RegionHit", "aupro", "pixel_roc_auc", "region_hits"]

# Pixels that touch at a corner belong to one region, as in the evaluation code that MVTec published.
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


class RegionHit(NamedTuple):
    """Whether a threshold finds a defective region.

    Parameters
    ----------
    image : int
        Index of the image.
    size : int
        Number of pixels of the region.
    overlap : float
        Share of these that lie below the threshold.
    hit : bool
        True if the region is found.

    See Also
    --------
    region_hits : Returns a list of them.

    Examples
    --------
    >>> from dfkde_sklearn.metrics import RegionHit
    >>> RegionHit(image=0, size=4, overlap=0.5, hit=True).overlap
    0.5
    """

    image: int
    size: int
    overlap: float
    hit: bool


def pixel_roc_auc(masks: Iterable[ArrayLike | None], anomaly_maps: Iterable[ArrayLike]) -> float:
    """Return the area under the ROC curve of the pixels of all images.

    It is the probability that a defective pixel has a lower value than a good one, equal values counting one half. A
    large defect weighs as much as all the small ones with as many pixels together; in :func:`aupro`, each region weighs
    the same.

    Parameters
    ----------
    masks : array-like of shape (n, H, W), or iterable of n array-likes of shape (H, W) or None
        Nonzero where a pixel is defective: boolean, 0 and 1, or 0 and 255. None stands for an image without defects.
    anomaly_maps : array-like of shape (n, H, W), or iterable of n array-likes of shape (H, W)
        Log densities of the pixels, in which **lower is more anomalous**; negate maps in which higher is. Each has the
        shape of its mask; images may differ in size.

    Returns
    -------
    float
        From 0 to 1; one half for maps that say nothing.

    Raises
    ------
    ValueError
        If there is not one mask for each map, a mask has another shape than its map or other values, a map is not 2-D
        or has NaN, or no pixel is defective, or none is good.

    Notes
    -----
    It takes the memory of all maps twice, and the time of sorting them.

    Examples
    --------
    >>> from dfkde_sklearn.metrics import pixel_roc_auc
    >>> masks = [[[0, 1], [0, 1]], None]
    >>> maps = [[[-1.0, -9.0], [-2.0, -8.0]], [[-1.0, -8.5], [-1.0, -1.0]]]
    >>> round(pixel_roc_auc(masks, maps), 3)
    0.917
    """
    good, defective = [], []
    for mask, anomaly_map in _pairs(masks, anomaly_maps):
        good.append(anomaly_map[~mask])
        defective.append(anomaly_map[mask])
    good_values, defective_values = _sorted(good, "good"), _sorted(defective, "defective")
    n_lower = np.searchsorted(good_values, defective_values, side="left").sum(dtype=np.int64)
    n_lower_or_equal = np.searchsorted(good_values, defective_values, side="right").sum(dtype=np.int64)
    n_pairs = len(good_values) * len(defective_values)
    return 1 - (int(n_lower) + int(n_lower_or_equal)) / (2 * n_pairs)


def aupro(masks: Iterable[ArrayLike | None], anomaly_maps: Iterable[ArrayLike], *, max_fpr: float = 0.3) -> float:
    """Return the normalised area under the curve of the per-region overlap (PRO).

    For a threshold, the overlap of a defective region is the share of its pixels at or below it; the curve is the mean
    overlap of the regions of all images against the false-positive rate, the share of all good pixels at or below the
    threshold [1]_. Each region weighs the same, whatever its size.

    Parameters
    ----------
    masks : array-like of shape (n, H, W), or iterable of n array-likes of shape (H, W) or None
        Nonzero where a pixel is defective: boolean, 0 and 1, or 0 and 255. None stands for an image without defects.
        Defective pixels that touch, at a corner too, are one region: the convention of MVTec's own evaluation code.
    anomaly_maps : array-like of shape (n, H, W), or iterable of n array-likes of shape (H, W)
        Log densities of the pixels, in which **lower is more anomalous**; negate maps in which higher is. Each has the
        shape of its mask; images may differ in size.
    max_fpr : float, default=0.3
        The curve is integrated from 0 to this false-positive rate, and the area divided by it. In (0, 1].

    Returns
    -------
    float
        From 0 to 1; `max_fpr` / 2 for maps that say nothing.

    Raises
    ------
    ValueError
        If `max_fpr` is not in (0, 1], there is not one mask for each map, a mask has another shape than its map or
        other values, a map is not 2-D or has NaN, or no pixel is defective, or none is good.

    Notes
    -----
    Every value of the maps is a threshold; between two thresholds, and up to `max_fpr`, the curve is a straight line.
    It takes a few times the memory of all maps, and the time of sorting them.

    References
    ----------
    .. [1] Bergmann et al. (2021), The MVTec anomaly detection dataset, doi:10.1007/s11263-020-01400-4

    Examples
    --------
    >>> from dfkde_sklearn.metrics import aupro
    >>> masks = [[[0, 1], [0, 1]], None]
    >>> maps = [[[-1.0, -9.0], [-2.0, -8.0]], [[-1.0, -8.5], [-1.0, -1.0]]]
    >>> round(aupro(masks, maps), 3)
    0.722
    """
    if not 0 < max_fpr <= 1:  # NaN too
        raise ValueError(f"max_fpr is {max_fpr!r}: it must be a number above 0 and at most 1.")
    good, defective, sizes = [], [], []
    for mask, anomaly_map in _pairs(masks, anomaly_maps):
        good.append(anomaly_map[~mask])
        labels, _ = ndimage.label(mask, _EIGHT_NEIGHBOURS)
        labels = labels[mask]
        defective.append(anomaly_map[mask])
        sizes.append((counts := np.bincount(labels)[1:], counts[labels - 1]))
    good_values = _sorted(good, "good")
    defective_values = _joined(defective, "defective")
    n_regions = sum(len(counts) for counts, _ in sizes)
    shares = 1 / (n_regions * np.concatenate([of_pixels for _, of_pixels in sizes]))
    order = np.argsort(defective_values)
    overlap = np.concatenate([[0.0], np.cumsum(shares[order])])  # of the lowest 0, 1, ... defective pixels
    defective_values = defective_values[order]

    # Only values of good pixels move the curve to the right, and none is needed above the one that reaches max_fpr.
    n_good = len(good_values)
    last = good_values[min(int(np.ceil(max_fpr * n_good)), n_good) - 1]
    values, counts = np.unique(good_values[good_values <= last], return_counts=True)
    right = np.minimum(np.cumsum(counts) / n_good, 1.0)
    left = np.concatenate([[0.0], right[:-1]])
    below = overlap[np.searchsorted(defective_values, values, side="left")]
    reached = overlap[np.searchsorted(defective_values, values, side="right")]
    end = np.minimum(right, max_fpr)
    at_end = below + (reached - below) * (end - left) / (right - left)
    return float(np.sum((end - left) * (below + at_end) / 2) / max_fpr)


def region_hits(
    masks: Iterable[ArrayLike | None], anomaly_maps: Iterable[ArrayLike], threshold: float, *, min_overlap: float = 0.0
) -> list[RegionHit]:
    """Return, for each defective region, whether a threshold finds it.

    Parameters
    ----------
    masks : array-like of shape (n, H, W), or iterable of n array-likes of shape (H, W) or None
        Nonzero where a pixel is defective: boolean, 0 and 1, or 0 and 255. None stands for an image without defects.
        Defective pixels that touch, at a corner too, are one region.
    anomaly_maps : array-like of shape (n, H, W), or iterable of n array-likes of shape (H, W)
        Log densities of the pixels, in which **lower is more anomalous**; negate maps in which higher is, and the
        threshold. Each has the shape of its mask; images may differ in size.
    threshold : float
        Pixels below it are anomalous.
    min_overlap : float, default=0
        A region is found if at least this share of its pixels is anomalous, and at least one. In [0, 1].

    Returns
    -------
    list of RegionHit
        Named tuples (image, size, overlap, hit), in the order of the images, and of the first pixel of each region row
        by row. Empty if no image has a defect.

    Raises
    ------
    ValueError
        If `threshold` is NaN, `min_overlap` is not in [0, 1], there is not one mask for each map, a mask has another
        shape than its map or other values, or a map is not 2-D or has NaN.

    Examples
    --------
    >>> from dfkde_sklearn.metrics import region_hits
    >>> region_hits([[[1, 0, 1], [1, 0, 1]], None], [[[-9.0, -1.0, -2.0], [-3.0, -1.0, -3.0]], [[-1.0]]], -5.0)
    [RegionHit(image=0, size=2, overlap=0.5, hit=True), RegionHit(image=0, size=2, overlap=0.0, hit=False)]
    """
    if np.isnan(threshold):
        raise ValueError("threshold is NaN: it must be a number, such as the map's own threshold of the detector.")
    if not 0 <= min_overlap <= 1:
        raise ValueError(f"min_overlap is {min_overlap!r}: it must be a share from 0 to 1.")
    threshold = np.float64(threshold)  # a Python float would be rounded to the maps' float32
    hits = []
    for i, (mask, anomaly_map) in enumerate(_pairs(masks, anomaly_maps)):
        labels, _ = ndimage.label(mask, _EIGHT_NEIGHBOURS)
        labels = labels[mask] - 1
        sizes = np.bincount(labels)
        n_below = np.bincount(labels[anomaly_map[mask] < threshold], minlength=len(sizes))
        for size, n in zip(sizes.tolist(), n_below.tolist(), strict=True):
            hits.append(RegionHit(i, size, n / size, n > 0 and n / size >= min_overlap))
    return hits


def _pairs(
    masks: Iterable[ArrayLike | None], anomaly_maps: Iterable[ArrayLike]
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.floating]]]:
    """Yield each mask and its map, checked, as arrays of shape (H, W)."""
    masks, anomaly_maps = list(masks), list(anomaly_maps)
    if len(masks) != len(anomaly_maps):
        raise ValueError(
            f"There are {len(masks)} masks and {len(anomaly_maps)} maps: each map needs one, None if it has no defect."
        )
    if not masks:
        raise ValueError("There are no maps: at least one is needed.")
    for i, (mask, anomaly_map) in enumerate(zip(masks, anomaly_maps, strict=True)):
        values = _values(i, anomaly_map)
        yield _defective(i, mask, values.shape), values


def _values(i: int, anomaly_map: Any) -> NDArray[np.floating]:
    """Return a map as an array of floats, float32 if it has this type."""
    values = np.asarray(anomaly_map)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"map {i} has shape {values.shape}: it must be (H, W), with at least one pixel.")
    if values.dtype.kind not in "fiub":
        raise ValueError(f"map {i} has dtype {values.dtype}: it must be real numbers.")
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    if np.isnan(values).any():
        raise ValueError(f"map {i} has NaN at {np.isnan(values).sum()} of {values.size} pixels: these have no order.")
    return values


def _defective(i: int, mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return where a mask says that the image is defective."""
    if mask is None:
        return np.zeros(shape, dtype=bool)
    mask = np.asarray(mask)
    if mask.dtype.kind in "US":
        raise ValueError(f"mask {i} is text, {mask!s:.80}: read the file first, with dfkde_sklearn.datasets.read_mask.")
    if mask.shape != shape:
        # Not shrunk here: a small defect would vanish, and with it what the detector missed.
        raise ValueError(
            f"mask {i} has shape {mask.shape}, its map {shape}: they must be equal. Maps in the pixels of their images"
            ' are those of anomaly_maps(X, resolution="image").'
        )
    defective = mask != 0
    if mask.dtype.kind not in "biuf" or not ((mask[defective] == 1).all() or (mask[defective] == 255).all()):
        raise ValueError(f"mask {i} has values other than 0 and 1, or 0 and 255: pass mask > t for a threshold t.")
    return defective


def _sorted(values: list[NDArray[np.floating]], which: str) -> NDArray[np.floating]:
    """Return the values of the good or the defective pixels of all images, sorted."""
    joined = _joined(values, which)
    joined.sort()
    return joined


def _joined(values: list[NDArray[np.floating]], which: str) -> NDArray[np.floating]:
    """Return the values of the good or the defective pixels of all images, and free those of each image."""
    joined = np.concatenate(values)
    values.clear()
    if not joined.size:
        raise ValueError(f"The masks have no {which} pixel: the curve needs good and defective ones.")
    return joined
