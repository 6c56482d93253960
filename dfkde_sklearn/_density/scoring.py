"""Deep feature kernel density estimation: the method itself, from feature rows to log densities.

Functions of tensors, over the two halves that know nothing of each other: `_reduction` (principal axes) and
`_kernels` (Gaussian kernels on whitened rows). The estimator, the module and the exports all come down to this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dfkde_sklearn._density.axes import (
    CentredRows,
    EigenPairs,
    PrincipalAxes,
    Span,
    axis_signs,
    centred_rows,
    principal_axes,
)
from dfkde_sklearn._kernels.bandwidth import leave_one_out_bandwidth, scott_bandwidth, silverman_bandwidth
from dfkde_sklearn._kernels.density import leave_one_out, log_density
from dfkde_sklearn._threads import product, run_in_turn, run_on_single_cores

# Whitened rows that nearly span their axes lie equally far from one another, whatever each is like: with so many rows
# an axis or more, a row from elsewhere is by far the farthest.
_ROWS_AN_AXIS = 3
# Farther from the mean, in units of the largest training entry, sums of squares might overflow.
_FARTHEST = 1e150
# Rows scored at a time: enough to pay for a call, and few enough that copies of their coordinates take little memory.
_ROWS = 2**14

# All that a fitted density consists of: the name of each part, and its axes (D features, d components, n kernels, two
# numbers of a residual term or none: t and u). A part without axes is a plain number. Lengths are those of features.
STATE = (
    ("mean", "D"),
    ("scale", ""),
    ("components", "dD"),
    ("singular_values", "d"),
    ("scaling_code", ""),
    ("max_length", ""),
    ("whitening", "dd"),
    ("log_volume", ""),
    ("log_jacobian", ""),
    ("bandwidth", ""),
    ("kernel_centers", "nd"),
    ("residual", "t"),
    ("gaussian_residual", "u"),
)

Scaling = Literal["scale", "norm"] | None
# In the order of their codes in the state.
SCALINGS: tuple[Scaling, ...] = (None, "scale", "norm")
Bandwidth = Literal["scott", "silverman", "loo"] | float
Residual = Literal["gaussian", "box"] | None
_TERMS = ("residual", "gaussian_residual")


class Settings(NamedTuple):
    """What a fit is asked for.

    scaling : "scale", "norm" or None.
    bandwidth : "scott", "silverman", "loo", or the factor h.
    residual : "gaussian", "box" or None.
    contamination : float, the share of the training rows that leaves the fit.
    working_memory : int, bytes.
    """

    scaling: Scaling
    bandwidth: Bandwidth
    residual: Residual
    contamination: float
    working_memory: int


class Units(NamedTuple):
    """What a fit of centred and scaled rows has to know of the features that they come from.

    n_features : int, dimensions of the feature space, of which the rows may span a part.
    scale : float, the factor that took the features to the units of the rows.
    noise : float, the largest singular value that rounding can make, in the units of the rows.
    beyond : Tensor (2,), sum and sum of squares of the eigenvalues of the scatter matrix that the rows lack.
    offset : float, the squared length of the mean of the features, in the units of the rows.
    dtype : torch.dtype, in which densities are computed.
    """

    n_features: int
    scale: float
    noise: float
    beyond: Tensor
    offset: float
    dtype: torch.dtype


class ResidualTerm(NamedTuple):
    """The log density of squared distances r from the principal axes: ``log_height - r / (2 spread)``."""

    spread: float
    log_height: float

    def log_density(self, squared_distances: Tensor) -> Tensor:
        """Return the natural log of the density at each squared distance."""
        return self.log_height - squared_distances / (2 * self.spread)


@dataclass(frozen=True)
class RowDensity:
    """The density of centred and scaled rows.

    Lengths are in the units of the rows, densities in those of the features.

    centre : Tensor (width,), float64; where the axes meet.
    axes : Tensor (width, d), float64, orthonormal columns.
    singular_values : Tensor (d,), of the rows.
    scaling : "scale", "norm" or None.
    max_length : float, the norm of the longest training row on the axes.
    whitening : Tensor (d, d), float64; makes the scaled coordinates white.
    log_volume : float; what whitening adds to the log density of the scaled coordinates.
    log_jacobian : float; what turns a density of scaled coordinates into one of coordinates in the feature space.
    bandwidth : float, the factor h.
    kernel_centers : Tensor (n, d), the whitened training rows, in the dtype that densities are computed in.
    residual : ResidualTerm to add to the log density, or None.
    gaussian_residual : ResidualTerm of probabilistic PCA, which completes a density of the whole feature space; None
        where the axes span it.
    """

    centre: Tensor
    axes: Tensor
    singular_values: Tensor
    scaling: Scaling
    max_length: float
    whitening: Tensor
    log_volume: float
    log_jacobian: float
    bandwidth: float
    kernel_centers: Tensor
    residual: ResidualTerm | None
    gaussian_residual: ResidualTerm | None

    def log_density(self, whitened: Tensor, squared_distances: Tensor, working_memory: int) -> Tensor:
        """Return the natural log of the density of rows that `split` and `whiten` took apart, with the residual."""
        return self.with_residual(self.kernel_log_density(whitened, working_memory), squared_distances)

    def kernel_log_density(self, whitened: Tensor, working_memory: int) -> Tensor:
        """Return the natural log of the kernel density of whitened rows (n, d)."""
        return (
            log_density(whitened, self.kernel_centers, self.bandwidth, working_memory=working_memory) + self.log_volume
        )

    def full_log_density(self, whitened: Tensor, squared_distances: Tensor, working_memory: int) -> Tensor:
        """Return the natural log of the density in the whole feature space, whatever `residual` scores with."""
        log_densities = self.kernel_log_density(whitened, working_memory).double() + self.log_jacobian
        if self.gaussian_residual is not None:
            log_densities += self.gaussian_residual.log_density(squared_distances)
        return finite(log_densities)

    def leave_one_out(self, rows: Tensor, units: Units, working_memory: int) -> Tensor:
        """Return the log density of each row under kernels around all the others, on these axes."""
        coordinates, squared_distances = self.split(rows)
        log_densities = leave_one_out(self.whiten(coordinates), self.bandwidth, working_memory=working_memory)
        squared_distances = beyond_rounding(squared_distances, coordinates, units.offset, units.dtype)
        return self.with_residual(log_densities + self.log_volume, squared_distances)

    def with_residual(self, log_densities: Tensor, squared_distances: Tensor) -> Tensor:
        """Return the log densities with the residual term of the squared distances, where there is one."""
        if self.residual is not None:
            log_densities = log_densities + self.residual.log_density(squared_distances).to(log_densities.dtype)
        return finite(log_densities)

    def project(self, rows: Tensor) -> Tensor:
        """Return the coordinates (n, d) of rows on the axes."""
        return product(rows - self.centre, self.axes)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates (n, d) of rows on the axes, and their squared distances (n,) from these."""
        centred = rows - self.centre
        coordinates = product(centred, self.axes)
        # The square of a difference, not a difference of squares, which cancels where the residual is small.
        return coordinates, (centred - product(coordinates, self.axes.T)).square_().sum(1)

    def whiten(self, coordinates: Tensor) -> Tensor:
        """Return coordinates (n, d) scaled and whitened, in the dtype of the kernel_centers."""
        whitened = product(scaled(coordinates, self.scaling, self.max_length), self.whitening)
        largest = torch.finfo(self.kernel_centers.dtype).max
        return whitened.clamp_(-largest, largest).to(self.kernel_centers.dtype)

    def in_features(self, whole: Span) -> RowDensity:
        """Return the same density of rows of features, of which these rows are the coordinates on their span.

        Each axis is turned so that its entry of largest magnitude is positive: one orientation for any solver.
        """
        axes = whole.in_features(self.axes)
        signs = axis_signs(axes)
        return replace(
            self,
            centre=whole.in_features(self.centre[:, None])[:, 0],
            axes=axes * signs,
            whitening=signs[:, None] * self.whitening * signs,
            kernel_centers=self.kernel_centers * signs.to(self.kernel_centers.dtype),
        )


@dataclass(frozen=True)
class FeatureDensity:
    """The density of feature rows: what training learns.

    mean : Tensor (n_features,), float64, of the training rows.
    scale : float, the power of two that takes features to the units of `density`.
    density : RowDensity, of the rows ``scale * (X - mean)``.
    """

    mean: Tensor
    scale: float
    density: RowDensity

    def state(self) -> dict[str, Tensor | float]:
        """Return the parts that `STATE` names, in its order."""
        density = self.density
        none = self.mean.new_empty(0)
        return {
            # The axes of a trimmed fit meet at the mean of the rows that it keeps.
            "mean": self.mean + density.centre / self.scale,
            "scale": self.scale,
            "components": density.axes.T.contiguous(),
            "singular_values": density.singular_values / self.scale,
            "scaling_code": SCALINGS.index(density.scaling),
            "max_length": density.max_length / self.scale,
            "whitening": density.whitening,
            "log_volume": density.log_volume,
            "log_jacobian": density.log_jacobian,
            "bandwidth": density.bandwidth,
            "kernel_centers": density.kernel_centers,
            "residual": none if density.residual is None else none.new_tensor(density.residual),
            "gaussian_residual": none
            if density.gaussian_residual is None
            else none.new_tensor(density.gaussian_residual),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor | float], dtype: torch.dtype) -> FeatureDensity:
        """Return the density of these parts, for feature rows of `dtype`."""
        parts: Any = state
        scale = float(parts["scale"])
        terms = (ResidualTerm(*parts[name].tolist()) if len(parts[name]) else None for name in _TERMS)
        density = RowDensity(
            centre=torch.zeros_like(parts["mean"]),
            axes=parts["components"].T,
            singular_values=parts["singular_values"] * scale,
            scaling=SCALINGS[int(parts["scaling_code"])],
            max_length=float(parts["max_length"]) * scale,
            whitening=parts["whitening"],
            log_volume=float(parts["log_volume"]),
            log_jacobian=float(parts["log_jacobian"]),
            bandwidth=float(parts["bandwidth"]),
            kernel_centers=parts["kernel_centers"].to(dtype),
            **dict(zip(_TERMS, terms, strict=True)),
        )
        return cls(parts["mean"], scale, density)

    def log_density(self, X: Tensor, working_memory: int, *, full: bool = False) -> Tensor:
        """Return the natural log of the density of each row of `X`, of shape (n,).

        `full` asks for the density in the whole feature space, whatever residual term the scores have.
        """
        of_rows = self.density.full_log_density if full else self.density.log_density
        has_residual = full or self.density.residual is not None
        rows = centred_rows(X, self.mean, self.scale, working_memory)
        runs = [(start, min(start + _ROWS, len(rows))) for start in range(0, len(rows), _ROWS)]
        of_runs = [of_rows(*self._whitened(rows, *run, has_residual), working_memory) for run in runs]
        return of_runs[0] if len(of_runs) == 1 else torch.cat(of_runs)

    def _whitened(self, rows: CentredRows, start: int, stop: int, has_residual: bool) -> tuple[Tensor, Tensor]:
        """Return the rows from `start` to `stop`, whitened on the axes, and their squared distances from these.

        None of the distances, which cost as much as all else, where there is no residual term.
        """
        offset = float((self.mean * self.scale).square().sum()) if has_residual else 0.0

        def taken_apart(first: int, last: int) -> tuple[Tensor, Tensor]:
            block = rows.rows(first, last)
            if rows.X.dtype == torch.float64:  # numbers of float32 have squares in float64, whatever their scale
                block = _in_reach(block)
            if has_residual:
                coordinates, squared_distances = self.density.split(block)
                squared_distances = beyond_rounding(squared_distances, coordinates, offset, rows.X.dtype)
            else:
                coordinates, squared_distances = self.density.project(block), block[:0, 0]
            return self.density.whiten(coordinates), squared_distances

        n, d = stop - start, self.density.axes.shape[1]
        size, n_products = min(rows.block_rows, _ROWS // 4), n * rows.width * d
        # In torch's own threads these would spin, after their work, on cores that are needed for the kernels.
        in_threads = rows.X.is_cpu and n_products > 2**17
        if n <= size and not in_threads:
            return taken_apart(start, stop)
        whitened = self.density.kernel_centers.new_empty(n, d)
        squared_distances = rows.mean.new_empty(n if has_residual else 0)

        def fill(first: int) -> None:
            block = slice(first, first + size)
            whitened[block], squared_distances[block] = taken_apart(start + first, min(start + first + size, stop))

        run = run_on_single_cores(n_products // 2**22) if in_threads else run_in_turn
        run(fill, range(0, n, size))
        return whitened, squared_distances


class TrimmedDensity(NamedTuple):
    """The density of the rows that a fit keeps.

    density : RowDensity.
    kept : Tensor (n,), bool, the rows that have a kernel.
    """

    density: RowDensity
    kept: Tensor


def row_density(
    rows: CentredRows,
    scatter: Tensor,
    n_components: int | float,
    settings: Settings,
    units: Units,
    pairs: EigenPairs | None = None,
) -> TrimmedDensity | None:
    """Return the density of centred rows with the given scatter matrix; None where the rows do not differ.

    `pairs` are all eigenpairs of the scatter matrix, where they are known.

    With a contamination, the rows of lowest density, each without its own kernel, leave the fit: first the principal
    axes, then, ranked again on the new axes, the kernels. Densities of few rows are ranked on few axes.
    """
    found = principal_axes(rows, n_components, units.noise, scatter, pairs)
    if found.axes.shape[1] == 0:
        return None
    mean = scatter.new_zeros(rows.width)
    n_kept = len(rows) - n_leaving(settings.contamination, len(rows))
    if n_kept == len(rows):
        kept = torch.ones(n_kept, dtype=torch.bool, device=scatter.device)
        return TrimmedDensity(_kernels(found, mean, settings, units), kept)
    table = rows.rows()

    def without_lowest(axes: PrincipalAxes, centre: Tensor) -> Tensor:
        ranking = _kernels(axes.first(max(1, n_kept // _ROWS_AN_AXIS)), centre, settings, units)
        return _highest(ranking.leave_one_out(table, units, settings.working_memory), n_kept)

    normal, centre = rows.take(without_lowest(found, mean))
    found = principal_axes(normal, n_components, units.noise)
    if found.axes.shape[1] == 0:
        return None
    kept = without_lowest(found, centre)
    density = _kernels(found, centre, settings, units)
    return TrimmedDensity(replace(density, kernel_centers=density.whiten(density.split(table[kept])[0])), kept)


def n_leaving(contamination: float, n: int) -> int:
    """Return how many of `n` training rows leave a fit with this contamination."""
    return round(contamination * n)


def _kernels(found: PrincipalAxes, centre: Tensor, settings: Settings, units: Units) -> RowDensity:
    """Return the density of the rows whose principal axes meet at `centre`, with a kernel around each."""
    n, d = found.coordinates.shape
    scaling = settings.scaling
    left_out = (found.left_out + units.beyond).tolist()
    total, squares = left_out[0] / (n - 1), left_out[1] / (n - 1) ** 2
    max_length = float(found.coordinates.norm(dim=1).max())
    unwhitened = scaled(found.coordinates, scaling, max_length)
    if scaling == "norm":
        # The covariance of unit rows is not diagonal. Whitened by a decomposition of the rows themselves, which keeps
        # the digits that forming the covariance would lose.
        _, triangle = torch.linalg.qr(unwhitened - unwhitened.mean(0), mode="r")
        _, lengths, directions = torch.linalg.svd(triangle, full_matrices=False)
        whitening = directions.T * (math.sqrt(n - 1) / lengths)
        kernel_centers = unwhitened @ whitening
    else:
        lengths = found.singular_values / (max_length if scaling == "scale" else 1.0)
        factors = math.sqrt(n - 1) / lengths
        whitening, kernel_centers = factors.diag(), unwhitened * factors
    kernel_centers = kernel_centers.to(units.dtype)
    log_volume = float(d * math.log(n - 1) / 2 - lengths.log().sum())
    # Without scaling the coordinates are in the units of the features but for the power of two.
    log_volume += d * math.log(units.scale) if scaling is None else 0.0
    return RowDensity(
        centre=centre,
        axes=found.axes,
        singular_values=found.singular_values,
        scaling=scaling,
        max_length=max_length,
        whitening=whitening,
        log_volume=log_volume,
        log_jacobian=d * (math.log(units.scale) - math.log(max_length)) if scaling == "scale" else 0.0,
        bandwidth=bandwidth_factor(settings.bandwidth, kernel_centers, settings.working_memory),
        kernel_centers=kernel_centers,
        residual=residual_term(settings.residual, total, squares, n, d, units),
        gaussian_residual=residual_term("gaussian", total, squares, n, d, units),
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


def residual_term(kind: Residual, total: float, squares: float, n: int, d: int, units: Units) -> ResidualTerm | None:
    """Return the term of what `d` axes of `n` rows leave out; None where `kind` is None or they leave out nothing.

    The residual r is taken for a Gaussian of one variance in a number of dimensions: "gaussian", in all that are left
    out, with their mean variance [1]_; "box", in the effective number that gives r its mean and variance [2]_.

    Parameters
    ----------
    kind : "gaussian", "box" or None
    total, squares : float
        Sum and sum of squares of the variances along the directions that are left out; "gaussian" needs the first.
    n, d : int
    units : Units

    References
    ----------
    .. [1] Tipping and Bishop (1999), Probabilistic principal component analysis, doi:10.1111/1467-9868.00196
    .. [2] Box (1954), Some theorems on quadratic forms, doi:10.1214/aoms/1177728786
    """
    if kind is None or units.n_features == d:
        return None
    # Rows that lie exactly in the space of the axes leave out only their rounding.
    rounding = units.noise**2 / (n - 1)
    total = max(total, rounding)
    degrees = float(units.n_features - d) if kind == "gaussian" else total**2 / max(squares, rounding**2)
    spread = total / degrees
    log_height = degrees * (math.log(units.scale) - math.log(2 * math.pi * spread) / 2)
    return ResidualTerm(spread, log_height)


def beyond_rounding(
    squared_distances: Tensor, coordinates: Tensor, offset: Tensor | float, dtype: torch.dtype
) -> Tensor:
    """Return squared distances from the axes less what rounding alone can make of them, at least 0.

    Where the axes span all training rows, the smallest distance is worth many nats, and rounding differs between
    batches.

    Parameters
    ----------
    squared_distances : Tensor (n,)
    coordinates : Tensor (n, d), of the same rows on the axes.
    offset : Tensor (), or float, the squared length of the mean, which was taken off the rows.
    dtype : torch.dtype, that the rows came in.
    """
    squared_lengths = coordinates.square().sum(1) + squared_distances + offset
    rounding = (1 + coordinates.shape[1]) * (4 * torch.finfo(dtype).eps) ** 2
    return (squared_distances - rounding * squared_lengths).clamp_min(0)


def finite(log_densities: Tensor) -> Tensor:
    """Return log densities, of which those below the lowest number of their dtype are that number."""
    return log_densities.clamp_min(torch.finfo(log_densities.dtype).min)


def scaled(coordinates: Tensor, scaling: Scaling, max_length: float) -> Tensor:
    """Return coordinates (n, d) divided by `max_length` ("scale"), by their own norms ("norm"), or as they are."""
    if scaling == "scale":
        return coordinates / max_length
    if scaling == "norm":
        # A row at the mean has no direction: it stays at the origin.
        lengths = coordinates.norm(dim=1, keepdim=True)
        return coordinates / torch.where(lengths > 0, lengths, 1.0)
    return coordinates


def _in_reach(rows: Tensor) -> Tensor:
    """Return centred rows, of which those whose squares overflow are drawn nearer to the mean."""
    if max(abs(float(x)) for x in rows.aminmax()) <= _FARTHEST:
        return rows
    rows = rows.nan_to_num()  # which makes infinities the largest numbers
    return rows * (_FARTHEST / rows.abs().amax(1, keepdim=True)).clamp_max(1)


def _highest(log_densities: Tensor, n_kept: int) -> Tensor:
    """Return a mask of the `n_kept` highest values; of equal ones, the first."""
    order = log_densities.argsort(descending=True, stable=True)
    kept = torch.zeros_like(log_densities, dtype=torch.bool)
    kept[order[:n_kept]] = True
    return kept
