"""What the log density of a row is made of: kernels, axes, features and the residual."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dfkde_sklearn._density.scoring import FeatureDensity, RowDensity, scaled, without_rounding

# Squared distances between rows and kernels that are held at a time.
_PAIRS = 2**24


class Parts(NamedTuple):
    """Of each of n rows, in float64, what `FeatureDensity.log_density` is made of.

    log_density : Tensor (n,)
    kernels : Tensor (n, k), int64, the kernels of largest share, the largest first.
    shares : Tensor (n, k), their shares of the sum of all kernels at the row.
    deviations : Tensor (n, d), the coordinates on the principal axes in standard deviations of the training rows.
    axis_terms : Tensor (n, d), ``-(z - zbar)^2 / (2 h^2)`` of each whitened axis, with the mean zbar of the kernels,
        weighted by their shares.
    residual_term : Tensor (n,), ``-r / (2 variance)``, 0 where there is no residual.
    rest : Tensor (n,), what is left: ``log_density - axis_terms.sum(1) - residual_term``.
    feature_terms : Tensor (n, n_features), whose sum is that of `axis_terms` and `residual_term`.
    feature_gains : Tensor (n, n_features), by how much the log density would rise with another value of this feature
        alone, with the shares as they are.
    """

    log_density: Tensor
    kernels: Tensor
    shares: Tensor
    deviations: Tensor
    axis_terms: Tensor
    residual_term: Tensor
    rest: Tensor
    feature_terms: Tensor
    feature_gains: Tensor


def explained(density: FeatureDensity, X: Tensor, n_kernels: int, working_memory: int) -> Parts:
    """Return what the log densities of rows X (n, n_features) are made of."""
    n_features, d = density.density.axes.shape
    of_row = max(len(density.density.kernel_centers), n_features * d if density.density.scaling == "norm" else 1)
    size = max(1, _PAIRS // of_row)
    blocks = [_explained(density, block, n_kernels, working_memory) for block in X.split(size)]
    return Parts(*map(torch.cat, zip(*blocks, strict=True)))


def _explained(density: FeatureDensity, X: Tensor, n_kernels: int, working_memory: int) -> Parts:
    of_rows = density.density
    centred = (X.double() - density.mean) * density.scale - of_rows.centre
    coordinates = centred @ of_rows.axes
    whitened = scaled(coordinates, of_rows.scaling, of_rows.max_length) @ of_rows.whitening
    kernels = of_rows.kernel_centers.double()
    # By differences: products of rows would cancel where kernels are near.
    squared_distances = torch.cdist(whitened, kernels, compute_mode="donot_use_mm_for_euclid_dist").square()
    shares = torch.softmax(-squared_distances / (2 * of_rows.bandwidth**2), 1)
    largest = shares.topk(min(n_kernels, len(kernels)), dim=1)

    differences = whitened - shares @ kernels
    factor = -1 / (2 * of_rows.bandwidth**2)
    # |z - zbar|^2 is the product of two vectors of features: the difference before whitening, and its image under it.
    before = torch.linalg.solve(of_rows.whitening.T, differences.T).T @ of_rows.axes.T
    after = differences @ of_rows.whitening.T @ of_rows.axes.T
    feature_terms = factor * before * after
    axis_terms = factor * differences.square()

    # The derivative of the whitened coordinates by the features (n or 1, width, d).
    slopes = _slopes_of_scaling(coordinates, of_rows) @ of_rows.whitening
    slopes = of_rows.axes @ slopes
    gradient = -2 * factor * (slopes @ differences[:, :, None])[:, :, 0]
    curvature = -2 * factor * slopes.square().sum(2)

    residual_term = torch.zeros_like(centred[:, 0])
    if of_rows.residual is not None:
        off_axis = centred - coordinates @ of_rows.axes.T
        squares = off_axis.square().sum(1)
        squared_mean = float((density.mean * density.scale).square().sum())
        without = without_rounding(squares, coordinates, squared_mean, X.dtype)
        precision = torch.where(squares > 0, without / squares, 0.0)[:, None] / of_rows.residual.variance
        feature_terms = feature_terms - off_axis.square() * precision / 2
        residual_term = -(off_axis.square() * precision).sum(1) / 2
        gradient = gradient + off_axis * precision
        curvature = curvature + (1 - of_rows.axes.square().sum(1)).clamp_min(0) / of_rows.residual.variance
    # Along a feature the sum of the terms is a parabola.
    feature_gains = torch.where(curvature > 0, gradient.square() / (2 * curvature), 0.0)

    log_density = density.log_density(X, working_memory).double()
    n = len(kernels)
    deviations = coordinates / (of_rows.singular_values.double() / max(1, n - 1) ** 0.5)
    rest = log_density - axis_terms.sum(1) - residual_term
    return Parts(
        log_density,
        largest.indices,
        largest.values,
        deviations,
        axis_terms,
        residual_term,
        rest,
        feature_terms,
        feature_gains,
    )


def _slopes_of_scaling(coordinates: Tensor, of_rows: RowDensity) -> Tensor:
    """Return the derivative (n or 1, d, d) of scaled coordinates by coordinates (n, d)."""
    identity = torch.eye(coordinates.shape[1], dtype=coordinates.dtype, device=coordinates.device)[None]
    if of_rows.scaling == "norm":
        lengths = coordinates.norm(dim=1)[:, None, None]
        lengths = torch.where(lengths > 0, lengths, 1.0)
        directions = coordinates[:, :, None] / lengths
        return (identity - directions @ directions.transpose(1, 2)) / lengths
    return identity / of_rows.max_length if of_rows.scaling == "scale" else identity
