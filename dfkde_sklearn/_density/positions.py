"""A Gaussian kernel density at each position of a grid: its formula, its fitted state, and its fit.

A training image is P vectors of C channels, one at each position. At position p their covariance is shrunk towards the
mean covariance of all positions, and its Cholesky factor whitens the vectors: z = L_p^-1 (x - m_p). The density is

    log f_p(x) = log mean_i exp(-|z - k_pi|^2 / 2 h^2) - C log h - C/2 log 2 pi - log det L_p

with kernels k_pi at the whitened training vectors of that position. The log determinant makes positions comparable: a
step that is usual where parts vary is unusual where they do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from dfkde_sklearn._density.folds import fold_places
from dfkde_sklearn._density.scoring import finite
from dfkde_sklearn._kernels.bandwidth import scott_bandwidth, silverman_bandwidth

# The parts of a fitted density: the name of each, and its axes (p positions, c channels, m kernels). A part without
# axes is a plain number.
STATE = (
    ("mean", "pc"),
    ("scale", ""),
    ("channel_scales", "c"),
    ("normalization", ""),
    ("whitening", "pcc"),
    ("log_volumes", "p"),
    ("bandwidth", ""),
    ("kernel_centers", "pmc"),
)

# Of the mean variance, added to each variance: directions in which training images hardly differ stay finite.
_RIDGE = 0.01
# Spread of a channel over an image, as a share of its usual spread, below which it counts as that share.
_LEAST_SPREAD = 1e-3
# Images scored at a time: enough that the whitening matrices are read from memory rarely.
_IMAGES = 256

Bandwidth = Literal["scott", "silverman"] | float


class PositionSettings(NamedTuple):
    """The settings of a fit.

    pooled_share : float, in [0, 1]; the weight of the mean covariance of all positions in that of each.
    kind : "kernel", or "gaussian" for a single Gaussian at each position.
    bandwidth : "scott", "silverman", or the factor h of the kernels.
    normalization : float, in [0, 1]; see `normalized`.
    n_lowest : int or float, as in `lowest_mean`.
    n_folds : int
    working_memory : int, bytes.
    """

    pooled_share: float
    kind: Literal["kernel", "gaussian"]
    bandwidth: Bandwidth
    normalization: float
    n_lowest: int | float
    n_folds: int
    working_memory: int


@dataclass(frozen=True)
class PositionDensity:
    """A fitted density at each of P positions.

    mean : Tensor (P, C), float64, of the training vectors after the normalisation, times `scale`.
    scale : float, a power of two by which vectors are multiplied, so that no square overflows.
    channel_scales : Tensor (C,), float64, the usual spread of each channel over an image, times `scale`.
    normalization : float
    whitening : Tensor (P, C, C), transposed inverse of the Cholesky factor of each position, in the dtype of scores.
    log_volumes : Tensor (P,), float64, minus the log determinants of the factors, in the units of the features.
    bandwidth : float, the factor h.
    kernel_centers : Tensor (P, m, C), the whitened training vectors, in the dtype of scores.
    """

    mean: Tensor
    scale: float
    channel_scales: Tensor
    normalization: float
    whitening: Tensor
    log_volumes: Tensor
    bandwidth: float
    kernel_centers: Tensor

    def state(self) -> dict[str, Any]:
        """Return the parts that `STATE` names."""
        return {name: getattr(self, name) for name, _ in STATE}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the density with these parts."""
        parts: dict[str, Any] = {name: state[name] if axes else float(state[name]) for name, axes in STATE}
        return cls(**parts)

    def log_density(self, vectors: Tensor, working_memory: int) -> Tensor:
        """Return the natural log of the density at each position, (n, P), of vectors (n, P, C), in their dtype."""
        scores = vectors.new_empty(vectors.shape[:2])
        for images, positions in _parts(vectors.shape, self.kernel_centers.shape[1], vectors.itemsize, working_memory):
            # Whole images, whose channels are normalised over all positions.
            part = normalized(vectors[images] * self.scale, self.channel_scales, self.normalization)
            for places in positions:
                scores[images, places] = self._log_density_at(part[:, places], places).T
        return scores

    def _log_density_at(self, vectors: Tensor, places: slice) -> Tensor:
        """Return the log density (p, n) of scaled and normalised vectors (n, p, C)."""
        kernels, h = self.kernel_centers[places].to(vectors.dtype), self.bandwidth
        m, n_channels = kernels.shape[1:]
        # Centred in float64: a mean far from zero leaves no digits of the differences.
        centred = (vectors.double() - self.mean[places]).to(vectors.dtype)
        whitened = centred.transpose(0, 1) @ self.whitening[places].to(vectors.dtype)
        # However far out: products with kernels stay finite.
        largest = math.sqrt(torch.finfo(vectors.dtype).max) / n_channels
        whitened = whitened.nan_to_num(largest).clamp(-largest, largest)
        # |z - k|^2, less the part that is the same for all kernels: that cannot underflow in the sum.
        products = (whitened @ kernels.transpose(1, 2) - kernels.square().sum(2)[:, None] / 2) / h**2
        log_sums = torch.logsumexp(products, 2).double() - whitened.double().square().sum(2) / (2 * h**2)
        constant = math.log(m) + n_channels * (math.log(h) + math.log(math.tau) / 2)
        return finite((log_sums + (self.log_volumes[places][:, None] - constant)).to(vectors.dtype))


class PositionTraining(NamedTuple):
    """The result of `fit_positions`.

    fitted : PositionDensity.
    calibration_maps : Tensor (n, P), the log densities of each training image by a fit without its fold.
    is_kept : Tensor (n,), bool; false for images that left the fit as anomalous.
    """

    fitted: PositionDensity
    calibration_maps: Tensor
    is_kept: Tensor


def fit_positions(
    vectors: Tensor, settings: PositionSettings, groups: Tensor | None, n_anomalous: int, mirror: Tensor | None
) -> PositionTraining:
    """Fit a density at each position of training images.

    Parameters
    ----------
    vectors : Tensor of shape (n, P, C), float32 or float64
    settings : PositionSettings
    groups : Tensor of shape (n,), int64, or None
        Images of one group are left out together.
    n_anomalous : int
        Images that leave the fit: those with the lowest scores by fits without them.
    mirror : Tensor of shape (P,), int64, or None
        For each position the one where a mirror shows it: the mirrored images are training images too.

    Returns
    -------
    PositionTraining

    Raises
    ------
    ValueError
        If the images do not differ.
    """
    scale = _scale(vectors)
    scaled = vectors * scale
    channel_scales = _spreads(scaled.double()).square().mean(0).sqrt()
    scaled = normalized(scaled, channel_scales, settings.normalization)
    shared: dict[str, Any] = {"scale": scale, "channel_scales": channel_scales, "normalization": settings.normalization}

    def fitted(is_kept: Tensor) -> PositionDensity:
        """Return the density of some of the images."""
        images = scaled[is_kept]
        if mirror is not None:
            images = torch.cat([images, images[:, mirror]])
        return PositionDensity(**shared, **_densities(images, scale, settings))

    def cross_fitted(is_kept: Tensor) -> Tensor:
        """Return the maps (n, P) of all images; of those kept by fits without their fold, of the others by the fit."""
        maps = vectors.new_empty(vectors.shape[:2])
        if not bool(is_kept.all()):
            maps[~is_kept] = fitted(is_kept).log_density(vectors[~is_kept], settings.working_memory)
        places = is_kept.nonzero()[:, 0]
        for where in fold_places(len(places), None if groups is None else groups[places], settings.n_folds):
            is_other = is_kept.clone()
            is_other[places[where]] = False
            maps[places[where]] = fitted(is_other).log_density(vectors[places[where]], settings.working_memory)
        return maps

    is_kept = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
    maps = cross_fitted(is_kept)
    if n_anomalous:
        is_kept[lowest_mean(maps, settings.n_lowest).argsort(stable=True)[:n_anomalous]] = False
        maps = cross_fitted(is_kept)
    return PositionTraining(fitted(is_kept), maps, is_kept)


def lowest_mean(maps: Tensor, n_lowest: int | float) -> Tensor:
    """Return the score (n,) of each image: the mean over the positions of lowest log density of maps (n, P).

    `n_lowest` is the number of these positions; below 1 it is their share of all.
    """
    n_positions = maps.shape[1]
    k = max(1, round(n_lowest * n_positions)) if n_lowest < 1 else min(int(n_lowest), n_positions)
    return maps.topk(k, dim=1, largest=False).values.mean(1)


def normalized(vectors: Tensor, channel_scales: Tensor, strength: float | Tensor) -> Tensor:
    """Return vectors (n, P, C) less a part of what is the same over the image, such as its contrast.

    Per image and channel, ``(x - a m) / s ** a`` with the mean m and the standard deviation s over the positions, and
    the strength a. A spread of nearly zero counts as a thousandth of the channel's usual one.
    """
    if vectors.shape[1] == 1 or (isinstance(strength, float) and strength == 0):
        return vectors
    usual = channel_scales.to(vectors.dtype)
    # A channel that is constant in all training images has no spread to be divided by.
    spreads = torch.where(usual > 0, torch.maximum(_spreads(vectors), _LEAST_SPREAD * usual), 1.0)
    means = vectors.mean(1, keepdim=True)
    return (vectors - strength * means) / (spreads**strength)[:, None]


def _spreads(vectors: Tensor) -> Tensor:
    """Return the standard deviation (n, C) over the positions of vectors (n, P, C)."""
    return (vectors - vectors.mean(1, keepdim=True)).square().mean(1).sqrt()


def _scale(vectors: Tensor) -> float:
    """Return a power of two that brings the deviations from the mean near 1."""
    largest = float((vectors.double() - vectors[:1].double()).abs().max())
    if not largest > 0:
        raise ValueError(_NO_DIFFERENCE.format(len(vectors)))
    return 2.0 ** -math.frexp(largest)[1]


_NO_DIFFERENCE = (
    "The {} training images do not differ, so that they have no density. Give at least three that are not copies of "
    "one another."
)


def _densities(scaled: Tensor, scale: float, settings: PositionSettings) -> dict[str, Any]:
    """Return the other parts of the state, from scaled and normalised training vectors (n, P, C)."""
    n, n_positions, n_channels = scaled.shape
    mean = scaled.double().mean(0)
    covariances = mean.new_empty(n_positions, n_channels, n_channels)
    whitening = scaled.new_empty(covariances.shape)
    kernels = scaled.new_empty(n_positions, n if settings.kind == "kernel" else 1, n_channels)
    parts = list(_slices(n_positions, settings.working_memory // (8 * n_channels * (3 * n + 5 * n_channels))))

    def centred(places: slice) -> Tensor:
        return (scaled[:, places].double() - mean[places]).transpose(0, 1)

    for places in parts:
        rows = centred(places)
        covariances[places] = rows.transpose(1, 2) @ rows / max(1, n - 1)
    pooled = covariances.mean(0)
    # What remains of equal images is rounding of their mean.
    rounding = torch.finfo(scaled.dtype).eps * float(mean.abs().max())
    if not float(pooled.diagonal().max()) > rounding**2:
        raise ValueError(_NO_DIFFERENCE.format(n))
    log_volumes = mean.new_empty(n_positions)
    identity = torch.eye(n_channels, dtype=mean.dtype, device=mean.device)
    for places in parts:
        shrunk = (1 - settings.pooled_share) * covariances[places] + settings.pooled_share * pooled
        mean_variance = shrunk.diagonal(dim1=1, dim2=2).mean(1)
        # A position that never varies, without a pooled share, varies as rounding does.
        mean_variance = mean_variance.clamp(min=max(rounding**2, torch.finfo(mean.dtype).tiny))
        factor = torch.linalg.cholesky(shrunk + _RIDGE * mean_variance[:, None, None] * identity)
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False).transpose(1, 2)
        log_volumes[places] = n_channels * math.log(scale) - factor.diagonal(dim1=1, dim2=2).log().sum(1)
        whitening[places] = inverse.to(scaled.dtype)
        if settings.kind == "kernel":
            kernels[places] = (centred(places) @ inverse).to(scaled.dtype)
    if settings.kind == "gaussian":
        kernels.zero_()
    return {
        "mean": mean,
        "whitening": whitening,
        "log_volumes": log_volumes,
        "bandwidth": _bandwidth(settings, n, n_channels),
        "kernel_centers": kernels,
    }


def _bandwidth(settings: PositionSettings, n: int, n_channels: int) -> float:
    if settings.kind == "gaussian":
        return 1.0
    if settings.bandwidth == "scott":
        return scott_bandwidth(n, n_channels)
    if settings.bandwidth == "silverman":
        return silverman_bandwidth(n, n_channels)
    return float(settings.bandwidth)


def _parts(
    shape: Sequence[int], n_kernels: int, itemsize: int, working_memory: int
) -> Iterator[tuple[slice, list[slice]]]:
    """Yield runs of images, each with the runs of positions that are scored at a time."""
    n, n_positions, n_channels = shape
    n_images = max(1, min(_IMAGES, working_memory // (8 * itemsize * n_positions * n_channels)))
    of_position = n_images * (itemsize * (2 * n_channels + 2 * n_kernels) + 16 * n_channels)
    for images in _slices(n, n_images):
        yield images, list(_slices(n_positions, working_memory // of_position))


def _slices(length: int, size: int) -> Iterator[slice]:
    """Yield runs of `size` places, at least 1, that cover a length."""
    size = max(1, size)
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
