"""From training rows to a density: principal axes, scaling, whitening, bandwidth, residual terms, trimming."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dfkde_sklearn._density.axes import PrincipalAxes, Span, axis_signs, principal_axes
from dfkde_sklearn._density.eigen import Scatter
from dfkde_sklearn._density.rows import CentredRows
from dfkde_sklearn._density.scoring import FeatureDensity, ResidualTerm, RowDensity, Scaling, scaled, without_rounding
from dfkde_sklearn._kernels.bandwidth import leave_one_out_bandwidth, scott_bandwidth, silverman_bandwidth
from dfkde_sklearn._kernels.density import leave_one_out

# Rows per axis, at least, for a ranking by density. Whitened rows that nearly span their axes lie at equal distances
# from one another, whatever each is like, and any other row is by far the farthest.
_ROWS_PER_AXIS = 3

Bandwidth = Literal["scott", "silverman", "loo"] | float
Residual = Literal["gaussian", "box"] | None


class Settings(NamedTuple):
    """The settings of a fit.

    scaling : "scale", "norm" or None.
    bandwidth : "scott", "silverman", "loo", or the factor h.
    residual : "gaussian", "box" or None.
    contamination : float, the fraction of the training rows that is removed as anomalous.
    working_memory : int, bytes.
    """

    scaling: Scaling
    bandwidth: Bandwidth
    residual: Residual
    contamination: float
    working_memory: int


def row_density(
    rows: CentredRows,
    scatter: Scatter,
    n_components: int | float,
    features: Span,
    settings: Settings,
    max_components: int | None = None,
) -> tuple[RowDensity, Tensor] | None:
    """Return the density of centred rows, and a mask (n,) of those that have a kernel; None if the rows do not differ.

    With a contamination, the rows of lowest leave-one-out density are removed twice: before the principal axes are
    computed, and, ranked again on the new axes, before the kernels are placed.

    Parameters
    ----------
    rows : CentredRows (n, width)
    scatter : Scatter, of the rows.
    n_components, max_components
        As in `principal_axes`.
    features : Span, where the rows come from.
    settings : Settings
    """
    axes = principal_axes(rows, n_components, features.noise, scatter, max_components)
    if axes.axes.shape[1] == 0:
        return None
    centre = scatter.matrix.new_zeros(rows.width)
    n_kept = len(rows) - n_removed(settings.contamination, len(rows))
    if n_kept == len(rows):
        is_kept = torch.ones(n_kept, dtype=torch.bool, device=centre.device)
        return density_on_axes(axes, centre, features, settings), is_kept
    table = rows.rows()

    def without_lowest(axes: PrincipalAxes, centre: Tensor) -> Tensor:
        # Few rows are ranked on few axes.
        ranking = density_on_axes(axes.first(max(1, n_kept // _ROWS_PER_AXIS)), centre, features, settings)
        return _highest(leave_one_out_scores(ranking, table, features, settings.working_memory), n_kept)

    normal, centre = rows.take(without_lowest(axes, centre))
    normal_scatter = Scatter(normal.scatter(), scatter.off_axis)
    axes = principal_axes(normal, n_components, features.noise, normal_scatter, max_components)
    if axes.axes.shape[1] == 0:
        return None
    is_kept = without_lowest(axes, centre)
    density = density_on_axes(axes, centre, features, settings)
    return replace(density, kernel_centers=density.whiten(density.project(table[is_kept]))), is_kept


def density_on_axes(axes: PrincipalAxes, centre: Tensor, features: Span, settings: Settings) -> RowDensity:
    """Return the density of the rows that have these principal axes, about `centre`, with a kernel at each row."""
    n, d = axes.coordinates.shape
    scaling = settings.scaling
    total, squares = axes.left_out.tolist()
    total, squares = total / (n - 1), squares / (n - 1) ** 2
    max_length = float(axes.coordinates.norm(dim=1).max())
    coordinates = scaled(axes.coordinates, scaling, max_length)
    if scaling == "norm":
        # The covariance of unit rows is not diagonal. Whitened by a decomposition of the rows themselves, which keeps
        # the digits that forming the covariance would lose.
        _, triangle = torch.linalg.qr(coordinates - coordinates.mean(0), mode="r")
        _, lengths, directions = torch.linalg.svd(triangle, full_matrices=False)
        whitening = directions.T * (math.sqrt(n - 1) / lengths)
        kernel_centers = coordinates @ whitening
    else:
        lengths = axes.singular_values / (max_length if scaling == "scale" else 1.0)
        factors = math.sqrt(n - 1) / lengths
        whitening, kernel_centers = factors.diag(), coordinates * factors
    kernel_centers = kernel_centers.to(features.dtype)
    log_volume = float(d * math.log(n - 1) / 2 - lengths.log().sum())
    # Without scaling the coordinates are in the units of the features but for the power of two.
    log_volume += d * math.log(features.scale) if scaling is None else 0.0
    return RowDensity(
        centre=centre,
        axes=axes.axes,
        singular_values=axes.singular_values,
        scaling=scaling,
        max_length=max_length,
        whitening=whitening,
        log_volume=log_volume,
        log_jacobian=d * (math.log(features.scale) - math.log(max_length)) if scaling == "scale" else 0.0,
        bandwidth=bandwidth_factor(settings.bandwidth, kernel_centers, settings.working_memory),
        kernel_centers=kernel_centers,
        residual=residual_term(settings.residual, total, squares, n, d, features),
        gaussian_residual=residual_term("gaussian", total, squares, n, d, features),
    )


def bandwidth_factor(rule: Bandwidth, kernel_centers: Tensor, working_memory: int) -> float:
    """Return the factor h that `rule` gives for whitened rows `kernel_centers` (n, d)."""
    n, d = kernel_centers.shape
    if rule == "scott":
        return scott_bandwidth(n, d)
    if rule == "silverman":
        return silverman_bandwidth(n, d)
    if rule == "loo":
        return leave_one_out_bandwidth(kernel_centers, working_memory=working_memory)
    return float(rule)


def residual_term(kind: Residual, total: float, squares: float, n: int, d: int, features: Span) -> ResidualTerm | None:
    """Return the residual term of `d` axes of `n` rows; None where `kind` is None or the axes leave out nothing.

    The residual r is modelled as a Gaussian with one variance for all its dimensions. "gaussian" takes all dimensions
    that are left out, with their mean variance [1]_; "box" takes the effective number of dimensions, which gives r its
    mean and variance [2]_.

    Parameters
    ----------
    kind : "gaussian", "box" or None
    total, squares : float
        Sum and sum of squares of the variances along the directions that are left out; "gaussian" uses the first only.
    n, d : int
    features : Span

    References
    ----------
    .. [1] Tipping and Bishop (1999), Probabilistic principal component analysis, doi:10.1111/1467-9868.00196
    .. [2] Box (1954), Some theorems on quadratic forms, doi:10.1214/aoms/1177728786
    """
    if kind is None or features.n_features == d:
        return None
    # Rows that lie exactly in the space of the axes leave out only their rounding.
    rounding = features.noise**2 / (n - 1)
    total = max(total, rounding)
    degrees = float(features.n_features - d) if kind == "gaussian" else total**2 / max(squares, rounding**2)
    variance = total / degrees
    log_height = degrees * (math.log(features.scale) - math.log(2 * math.pi * variance) / 2)
    return ResidualTerm(variance, log_height)


def leave_one_out_scores(density: RowDensity, rows: Tensor, features: Span, working_memory: int) -> Tensor:
    """Return the log density (n,) of each row under the kernels of all other rows, on the axes of `density`."""
    coordinates, squared_distances = density.project_and_measure(rows)
    log_densities = leave_one_out(density.whiten(coordinates), density.bandwidth, working_memory=working_memory)
    squared_distances = without_rounding(squared_distances, coordinates, features.squared_mean, features.dtype)
    return density.with_residual(log_densities + density.log_volume, squared_distances)


def feature_density(density: RowDensity, features: Span) -> FeatureDensity:
    """Return a density of the rows of `features` as a density of feature rows.

    Each axis is oriented such that its entry of largest magnitude is positive, whatever solver computed it.
    """
    axes = features.in_features(density.axes)
    signs = axis_signs(axes)
    oriented = replace(
        density,
        centre=features.in_features(density.centre[:, None])[:, 0],
        axes=axes * signs,
        whitening=signs[:, None] * density.whitening * signs,
        kernel_centers=density.kernel_centers * signs.to(density.kernel_centers.dtype),
    )
    return FeatureDensity(features.mean, features.scale, oriented)


def n_removed(contamination: float, n: int) -> int:
    """Return how many of `n` training rows are removed from a fit with this contamination."""
    return round(contamination * n)


def _highest(log_densities: Tensor, n: int) -> Tensor:
    """Return a mask of the `n` highest values; of equal values, the first."""
    order = log_densities.argsort(descending=True, stable=True)
    is_highest = torch.zeros_like(log_densities, dtype=torch.bool)
    is_highest[order[:n]] = True
    return is_highest
