"""Measurements on held-out rows: each fold of the training rows is measured by a fit to the other folds.

They give the scores that thresholds are set from, the variance along and off the principal axes, and the number of axes
that hold for new rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from dfkde_sklearn._density.axes import Span
from dfkde_sklearn._density.estimate import Settings, leave_one_out_scores, residual_term, row_density
from dfkde_sklearn._density.folds import Fold, Folds
from dfkde_sklearn._density.scoring import RowDensity, without_rounding

# Axes along which the variance of held-out rows exceeds that of the training rows by a larger factor are fitted to the
# training rows. Measured on features of photographs, any factor from 1.5 to 2.5 finds defects about as well.
_MAX_RATIO = 2.0
# Axes along which the variance of held-out rows is a smaller multiple of that of an average direction off all axes
# only distinguish the training rows from others. It matters where noise is alike in all directions; features of
# photographs are not like that.
_MIN_SIGNAL = 1.25
# Held-out rows that determine variances to one or two per cent.
_ENOUGH = 8192


class HeldOutSpectrum(NamedTuple):
    """The variances of held-out rows along the principal axes of the others.

    variances : Tensor (width,), mean squares along each axis.
    ratios : Tensor (width,), mean squares divided by the variances of the rows that the axes are computed from.
    off_axis : float, mean squared distance from all these axes.
    """

    variances: Tensor
    ratios: Tensor
    off_axis: float

    def n_reliable(self, n_features: int) -> int:
        """Return the number of first axes that hold for held-out rows, at least 1.

        Along these, the variance of held-out rows is near that of the training rows, and above that of the directions
        off all axes.
        """
        n_off_axis = n_features - len(self.ratios)
        noise = self.off_axis / n_off_axis if n_off_axis else 0.0
        # Single axes are noisy: ratios as the nearest increasing curve, variances as the nearest decreasing one.
        ratios = isotonic_regression(self.ratios.cpu().numpy()).x
        variances = isotonic_regression(self.variances.cpu().numpy(), increasing=False).x
        return max(1, int(((ratios <= _MAX_RATIO) & (variances >= _MIN_SIGNAL * noise)).sum()))

    def left_out(self, d: int, n_features: int) -> tuple[float, float]:
        """Return sum and sum of squares of the variances along the directions after the first `d`."""
        remaining = self.variances[d:]
        n_off_axis = n_features - max(d, len(self.variances))
        # Of the directions off all axes only the total is known.
        squares = self.off_axis**2 / n_off_axis if n_off_axis else 0.0
        return float(remaining.sum()) + self.off_axis, float(remaining.square().sum()) + squares


def held_out_spectrum(folds: Folds, noise: float) -> HeldOutSpectrum:
    """Return the variances of held-out rows along the principal axes of the others, from about `_ENOUGH` of the rows.

    Singular values up to `noise` are rounding.
    """
    step = -(-len(folds.rows) // _ENOUGH)

    def measure(fold: Fold) -> tuple[Tensor, Tensor, Tensor]:
        eigenvalues, axes = fold.scatter.significant_eigenpairs(noise)
        held_out = fold.held_out[::step]
        coordinates = held_out @ axes
        off_axis = (held_out - coordinates @ axes.T).square().sum(1) + folds.off_axis[fold.where][::step]
        return coordinates.square(), eigenvalues / (len(fold.others) - 1), off_axis

    squares, variances, off_axis = zip(*folds.map(measure), strict=True)
    # Folds may have an axis or two more than others: squares along these count as off all axes.
    width = min(map(len, variances))
    along = torch.cat([of_fold[:, :width] for of_fold in squares])
    ratios = torch.cat(
        [of_fold[:, :width] / of_axes[:width] for of_fold, of_axes in zip(squares, variances, strict=True)]
    )
    off = torch.cat([of_fold[:, width:].sum(1) for of_fold in squares]) + torch.cat(off_axis)
    return HeldOutSpectrum(_bounded_mean(along), _bounded_mean(ratios), float(_bounded_mean(off)))


def cross_fitted(folds: Folds, density: RowDensity, features: Span, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return log densities (n,), without a residual term, and squared distances (n,) of the rows by fits without them.

    Each fold is scored by a fit to the other folds: their principal axes, scale, whitening, contamination and kernels.
    In-sample scores are useless for a threshold: in many dimensions a row's own kernel dominates its density. Leaving
    out that kernel alone is not enough: the axes still bend towards the row.

    Parameters
    ----------
    folds : Folds
        Of the training rows.
    density : RowDensity
        Of all training rows.
    features : Span
        Where the rows come from.
    settings : Settings
        Of the fit to all rows.

    Returns
    -------
    log_densities, squared_distances : Tensor of shape (n,)
        NaN where the other folds span fewer axes than `density` has.
    """
    d = density.axes.shape[1]
    # A searched bandwidth is one number learnt from all rows: another search in each fold hardly changes it.
    if settings.bandwidth == "loo":
        settings = settings._replace(bandwidth=density.bandwidth)
    log_densities = density.kernel_centers.new_full((len(folds.rows),), torch.nan)
    squared_distances = folds.off_axis.new_full((len(folds.rows),), torch.nan)

    def score(fold: Fold) -> None:
        result = row_density(fold.others, fold.scatter, d, features, settings)
        if result is None or result[0].axes.shape[1] < d:
            return
        of_others, _ = result
        coordinates, distances = of_others.project_and_measure(fold.held_out)
        whitened = of_others.whiten(coordinates)
        log_densities[fold.where] = of_others.kernel_log_density(whitened, settings.working_memory)
        distances = distances + folds.off_axis[fold.where]
        squared_distances[fold.where] = without_rounding(distances, coordinates, features.squared_mean, features.dtype)

    folds.map(score)
    return log_densities, squared_distances


def with_held_out_residuals(
    density: RowDensity, is_kept: Tensor, squared_distances: Tensor, folds: Folds, features: Span, settings: Settings
) -> RowDensity:
    """Return the density with residual terms estimated from held-out rows.

    Training rows lie nearer to axes that bend towards them than new rows do, the more so the fewer they are.

    Parameters
    ----------
    density, is_kept
        The result of `row_density` for all rows.
    squared_distances : Tensor (n,)
        Of `cross_fitted`.
    folds, features, settings
        As in `cross_fitted`.
    """
    held_out = squared_distances[is_kept & squared_distances.isfinite()]
    if density.gaussian_residual is None or not len(held_out):
        return density
    n, d = len(is_kept), density.axes.shape[1]
    gaussian = residual_term("gaussian", float(_bounded_mean(held_out)), torch.nan, n, d, features)
    if settings.residual != "box":
        return replace(density, gaussian_residual=gaussian, residual=gaussian if settings.residual else None)
    if not is_kept.all():
        folds = folds.take(is_kept)
    total, squares = held_out_spectrum(folds, features.noise).left_out(d, features.n_features)
    box = residual_term("box", total, squares, n, d, features)
    return replace(density, gaussian_residual=gaussian, residual=box)


def calibration_scores(
    log_densities: Tensor, squared_distances: Tensor, density: RowDensity, features: Span, settings: Settings
) -> tuple[Tensor, int]:
    """Return the log density (n,) of each row by a fit without it, and the number of rows that have no such fit.

    Of those only the row's own kernel is left out. The first two arguments are the result of `cross_fitted`.
    """
    scores = density.with_residual(log_densities, squared_distances)
    missing = squared_distances.isnan().nonzero()[:, 0]
    if len(missing):
        of_all = leave_one_out_scores(density, features.rows.rows(), features, settings.working_memory)
        scores[missing] = of_all[missing]
    return scores, len(missing)


def _bounded_mean(squares: Tensor) -> Tensor:
    """Return the mean over the first axis of squares, each bounded by 50 times their median.

    Squares of normal rows stay below the bound, so that the mean is the usual one. A few rows from elsewhere have
    little influence.
    """
    medians = squares.median(0).values if squares.ndim > 1 else squares.median()
    return squares.minimum(50 * medians).mean(0)
