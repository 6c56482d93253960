"""The density of feature rows: its formula, its fitted state, and how many rows are scored fast.

The functions are on tensors. The estimator, the module and the exports all score by this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dfkde_sklearn._density.rows import CentredRows, centred_rows
from dfkde_sklearn._kernels.density import log_density as kernel_log_density
from dfkde_sklearn._threads import product, run_in_turn, run_on_single_cores

Scaling = Literal["scale", "norm"] | None
# In the order of their codes in the state.
SCALINGS: tuple[Scaling, ...] = (None, "scale", "norm")

# The parts of a fitted density: the name of each, and its axes (D features, d components, n kernels, two numbers of a
# residual term or none: t and u). A part without axes is a plain number. Lengths are in the units of the features.
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
_TERMS = ("residual", "gaussian_residual")

# Magnitude of centred rows above which sums of squares might overflow, in units of the largest training entry.
_MAX_MAGNITUDE = 1e150
# Rows scored at a time: enough to make up for the cost of a call, and few enough that copies of their coordinates take
# little memory.
_ROWS = 2**14


def log_density_of(X: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return the natural log of the density of feature rows `X` (n, D), of shape (n,): the formula, in float64.

    `state` holds the parts that `STATE` names. :meth:`FeatureDensity.log_density` computes the same for many rows, in
    blocks and threads, to the same digits however far out a row lies; tests compare the two.
    """
    n, d = state["kernel_centers"].shape
    h = state["bandwidth"]
    # Principal components, in units in which squares do not overflow.
    centred = state["scale"] * (X.double() - state["mean"])
    coordinates = centred @ state["components"].T
    # Scaled, and whitened: the kernels are round.
    scaling, max_length = SCALINGS[int(state["scaling_code"])], state["scale"] * state["max_length"]
    whitened = scaled(coordinates, scaling, max_length) @ state["whitening"]
    # The mean of n Gaussian kernels of standard deviation h, and the volume that whitening changed.
    squared_distances = (whitened[:, None] - state["kernel_centers"].double()).square().sum(2)
    log_sums = torch.logsumexp(-squared_distances / (2 * h**2), 1)
    log_densities = log_sums - math.log(n) - d * math.log(h) - d / 2 * math.log(2 * math.pi) + state["log_volume"]
    # The term for what the components leave out.
    if len(state["residual"]):
        residuals = (centred - coordinates @ state["components"]).square().sum(1)
        log_densities += ResidualTerm(*state["residual"].tolist()).log_density(residuals)
    return log_densities


def scaled(coordinates: Tensor, scaling: Scaling, max_length: float) -> Tensor:
    """Return coordinates (n, d) divided by `max_length` ("scale"), by their own norms ("norm"), or unchanged (None)."""
    if scaling == "scale":
        return coordinates / max_length
    if scaling == "norm":
        # A row at the mean has no direction: it stays at the origin.
        lengths = coordinates.norm(dim=1, keepdim=True)
        return coordinates / torch.where(lengths > 0, lengths, 1.0)
    return coordinates


class ResidualTerm(NamedTuple):
    """The log density of squared distances r from the principal axes: ``log_height - r / (2 variance)``."""

    variance: float
    log_height: float

    def log_density(self, squared_distances: Tensor) -> Tensor:
        """Return the natural log of the density at each squared distance."""
        return self.log_height - squared_distances / (2 * self.variance)


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
    gaussian_residual : ResidualTerm of probabilistic PCA, which completes a density of the full feature space; None
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

    def project(self, rows: Tensor) -> Tensor:
        """Return the coordinates (n, d) of rows on the axes."""
        return product(rows - self.centre, self.axes)

    def project_and_measure(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates (n, d) of rows on the axes, and the squared distances (n,) of the rows from these."""
        centred = rows - self.centre
        coordinates = product(centred, self.axes)
        # The square of a difference, not a difference of squares, which cancels where the residual is small.
        return coordinates, (centred - product(coordinates, self.axes.T)).square_().sum(1)

    def whiten(self, coordinates: Tensor) -> Tensor:
        """Return coordinates (n, d) scaled and whitened, in the dtype of the kernel centers."""
        whitened = product(scaled(coordinates, self.scaling, self.max_length), self.whitening)
        largest = torch.finfo(self.kernel_centers.dtype).max
        return whitened.clamp_(-largest, largest).to(self.kernel_centers.dtype)

    def log_density(self, whitened: Tensor, squared_distances: Tensor, working_memory: int) -> Tensor:
        """Return the natural log of the density of rows, whitened (n, d) and at these distances from the axes."""
        return self.with_residual(self.kernel_log_density(whitened, working_memory), squared_distances)

    def full_log_density(self, whitened: Tensor, squared_distances: Tensor, working_memory: int) -> Tensor:
        """Return the natural log of the density in the full feature space, whatever `residual` is."""
        log_densities = self.kernel_log_density(whitened, working_memory).double() + self.log_jacobian
        if self.gaussian_residual is not None:
            log_densities += self.gaussian_residual.log_density(squared_distances)
        return finite(log_densities)

    def kernel_log_density(self, whitened: Tensor, working_memory: int) -> Tensor:
        """Return the natural log of the kernel density of whitened rows (n, d), without a residual term."""
        log_densities = kernel_log_density(whitened, self.kernel_centers, self.bandwidth, working_memory=working_memory)
        return log_densities + self.log_volume

    def with_residual(self, log_densities: Tensor, squared_distances: Tensor) -> Tensor:
        """Return log densities plus the residual term, where there is one, of the squared distances."""
        if self.residual is not None:
            log_densities = log_densities + self.residual.log_density(squared_distances).to(log_densities.dtype)
        return finite(log_densities)


@dataclass(frozen=True)
class FeatureDensity:
    """The density of feature rows: the result of a fit.

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

        def numbers(term: ResidualTerm | None) -> Tensor:
            return self.mean.new_empty(0) if term is None else self.mean.new_tensor(term)

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
            "residual": numbers(density.residual),
            "gaussian_residual": numbers(density.gaussian_residual),
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

        With `full` it is the density in the full feature space, whatever residual term the scores have.
        """
        of_rows = self.density.full_log_density if full else self.density.log_density
        has_residual = full or self.density.residual is not None
        rows = centred_rows(X, self.mean, self.scale, working_memory)
        chunks = [(start, min(start + _ROWS, len(rows))) for start in range(0, len(rows), _ROWS)]
        parts = [of_rows(*self._whitened(rows, *chunk, has_residual), working_memory) for chunk in chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _whitened(self, rows: CentredRows, start: int, stop: int, has_residual: bool) -> tuple[Tensor, Tensor]:
        """Return the rows from `start` to `stop`, whitened on the axes, and their squared distances from these.

        Without a residual term there are no distances, which take as long to compute as all else.
        """
        squared_mean = float((self.mean * self.scale).square().sum()) if has_residual else 0.0

        def whitened_block(first: int, last: int) -> tuple[Tensor, Tensor]:
            block = rows.rows(first, last)
            if rows.X.dtype == torch.float64:  # numbers of float32 have squares in float64, whatever their scale
                block = _bounded(block)
            if has_residual:
                coordinates, distances = self.density.project_and_measure(block)
                distances = without_rounding(distances, coordinates, squared_mean, rows.X.dtype)
            else:
                coordinates, distances = self.density.project(block), block[:0, 0]
            return self.density.whiten(coordinates), distances

        n, d = stop - start, self.density.axes.shape[1]
        size, n_products = min(rows.block_rows, _ROWS // 4), n * rows.width * d
        # torch's own threads would spin after their work, on cores that are needed for the kernels.
        in_threads = rows.X.is_cpu and n_products > 2**17
        if n <= size and not in_threads:
            return whitened_block(start, stop)
        whitened = self.density.kernel_centers.new_empty(n, d)
        squared_distances = rows.mean.new_empty(n if has_residual else 0)

        def fill(first: int) -> None:
            block = slice(first, first + size)
            whitened[block], squared_distances[block] = whitened_block(start + first, min(start + first + size, stop))

        run = run_on_single_cores(n_products // 2**22) if in_threads else run_in_turn
        run(fill, range(0, n, size))
        return whitened, squared_distances


def without_rounding(
    squared_distances: Tensor, coordinates: Tensor, squared_mean: Tensor | float, dtype: torch.dtype
) -> Tensor:
    """Return squared distances from the axes minus what rounding alone can make of them, at least 0.

    Where the axes span all training rows, the smallest distance changes the score by many nats, and rounding differs
    between batches.

    Parameters
    ----------
    squared_distances : Tensor (n,)
    coordinates : Tensor (n, d), of the same rows on the axes.
    squared_mean : Tensor (), or float, the squared length of the mean, which was subtracted from the rows.
    dtype : torch.dtype, of the rows of features.
    """
    squared_lengths = coordinates.square().sum(1) + squared_distances + squared_mean
    rounding = (1 + coordinates.shape[1]) * (4 * torch.finfo(dtype).eps) ** 2
    return (squared_distances - rounding * squared_lengths).clamp_min(0)


def finite(log_densities: Tensor) -> Tensor:
    """Return log densities, with those below the lowest number of their dtype replaced by that number."""
    return log_densities.clamp_min(torch.finfo(log_densities.dtype).min)


def _bounded(rows: Tensor) -> Tensor:
    """Return centred rows; those whose squares would overflow are moved towards the mean."""
    if max(abs(float(x)) for x in rows.aminmax()) <= _MAX_MAGNITUDE:
        return rows
    rows = rows.nan_to_num()  # which makes infinities the largest numbers
    return rows * (_MAX_MAGNITUDE / rows.abs().amax(1, keepdim=True)).clamp_max(1)
