"""Principal axes of centred rows, and the variance that they leave out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dfkde_sklearn._density.eigen import Scatter
from dfkde_sklearn._density.rows import CentredRows, centred_rows, on_one_core_if_small

# A scatter matrix squares the condition number: singular values under 1e-5 of the largest have lost half their
# digits in it, and are taken from a singular value decomposition of the rows instead.
_SCATTER_LIMIT = 1e-10


class Span(NamedTuple):
    """A data matrix, centred and scaled, and rotated onto its span where that is smaller than the feature space.

    mean : Tensor (n_features,), float64, the column means of the data.
    basis : reflectors (n_features, width) and factors (width,) of a QR decomposition, which hold an orthonormal basis
        of the span; None where the rows are not rotated. To multiply them out would take as long as the decomposition.
    rows : CentredRows of `width` columns: the coordinates of ``scale * (X - mean)`` on the basis.
    scale : float, the power of two by which the rows are scaled.
    noise : float, the largest singular value that rounding alone can make, in the units of `rows`.
    dtype : torch.dtype, of the data.
    """

    mean: Tensor
    basis: tuple[Tensor, Tensor] | None
    rows: CentredRows
    scale: float
    noise: float
    dtype: torch.dtype

    @property
    def n_features(self) -> int:
        """Number of dimensions of the feature space."""
        return len(self.mean)

    @property
    def squared_mean(self) -> float:
        """Squared length of the mean, in the units of the rows."""
        return float((self.mean * self.scale).square().sum())

    def in_features(self, vectors: Tensor) -> Tensor:
        """Return vectors (width, k) of the space of the rows as vectors (n_features, k)."""
        if self.basis is None:
            return vectors
        reflectors, factors = self.basis
        n_features, width = reflectors.shape
        padded = vectors.new_zeros(n_features, vectors.shape[1])
        padded[:width] = vectors
        return torch.ormqr(reflectors, factors, padded)


class PrincipalAxes(NamedTuple):
    """The first principal axes of centred rows.

    axes : Tensor (width, d), orthonormal columns.
    coordinates : Tensor (n, d), the rows on the axes.
    singular_values : Tensor (d,), of the rows, decreasing.
    left_out : Tensor (2,), sum and sum of squares of the remaining eigenvalues of the scatter matrix.
    """

    axes: Tensor
    coordinates: Tensor
    singular_values: Tensor
    left_out: Tensor

    def first(self, d: int) -> PrincipalAxes:
        """Return the first `d` axes, or all where there are fewer."""
        dropped = self.singular_values[d:].square()
        left_out = self.left_out + torch.stack([dropped.sum(), dropped.square().sum()])
        return PrincipalAxes(self.axes[:, :d], self.coordinates[:, :d], self.singular_values[:d], left_out)


@on_one_core_if_small
def span(X: Tensor, working_memory: int) -> Span:
    """Return the rows of `X`, centred and scaled, on the space that they span.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features), float32 or float64
    working_memory : int
        Bytes that a block of rows may take.

    Returns
    -------
    Span
        With far fewer samples than features the rows have n_samples columns, from a QR decomposition: the cost of all
        later steps then grows with n_samples and not with n_features.
    """
    n, n_features = X.shape
    largest = max(abs(float(x)) for x in X.aminmax())  # without a copy
    # The exponent of the largest entry: scaled, entries lie in [-1, 1]; in [-4, 4] near the largest floats, as numbers
    # below 2**-1022 may count as zero.
    scale = 2.0 ** -min(math.frexp(largest)[1], 1022) if largest > 0 else 1.0
    # The spectral norm of a matrix of independent rounding errors.
    noise = torch.finfo(X.dtype).eps * (math.sqrt(n) + math.sqrt(n_features)) * largest * scale
    mean = torch.zeros(n_features, dtype=torch.float64, device=X.device)
    rows = centred_rows(X, mean, scale, working_memory)
    for _ in range(2):  # the second time removes what rounding left of a large offset
        rows = replace(rows, mean=rows.mean + rows.total() / n / scale)
    if n > 0.8 * n_features:  # the decomposition would cost more than the few columns that it saves
        return Span(rows.mean, None, rows, scale, noise, X.dtype)
    reflectors, factors = torch.geqrf(rows.rows().T)
    triangle = reflectors[:n].triu()
    rotated = centred_rows(triangle.T.contiguous(), mean.new_zeros(n), 1.0, working_memory)
    return Span(rows.mean, (reflectors, factors), rotated, scale, noise, X.dtype)


@on_one_core_if_small
def principal_axes(
    rows: CentredRows,
    n_components: int | float,
    noise: float,
    scatter: Scatter | None = None,
    max_components: int | None = None,
) -> PrincipalAxes:
    """Return the first principal axes of centred rows.

    Parameters
    ----------
    rows : CentredRows
        Their mean is zero.
    n_components : int or float
        The number of axes; a float in (0, 1) keeps the fewest axes that hold this fraction of the variance.
    noise : float
        Singular values up to this are rounding, not data.
    scatter : Scatter, default=None
        Of the rows, where it is known.
    max_components : int, default=None
        The largest number of axes, whatever fraction of the variance they hold.

    Returns
    -------
    PrincipalAxes
        The number of axes is at most the rank of the rows.
    """
    scatter = Scatter(rows.scatter()) if scatter is None else scatter
    limit = min(len(rows) - 1, rows.width, rows.width if max_components is None else max_components)

    def count(eigenvalues: Tensor) -> int:
        return min(int(n_components) if n_components >= 1 else _n_for_fraction(eigenvalues, n_components), limit)

    n_computed = min(int(n_components), limit) if n_components >= 1 else rows.width
    eigenvalues, vectors = scatter.leading_eigenpairs(max(n_computed, 1))
    d = count(eigenvalues)
    if d and eigenvalues[d - 1] < _SCATTER_LIMIT * eigenvalues[0]:
        _, triangle = torch.linalg.qr(rows.rows(), mode="r")
        _, singular_values, vectors = torch.linalg.svd(triangle, full_matrices=False)
        vectors, eigenvalues = vectors.T, singular_values.square()
        d = count(eigenvalues)
        # A backward stable decomposition errs by a few roundings of its largest value.
        noise = max(noise, 10 * torch.finfo(torch.float64).eps * float(singular_values[0]))
        d = min(d, int((singular_values > noise).sum()))
        left_out = torch.stack([eigenvalues[d:].sum(), eigenvalues[d:].square().sum()])
    else:
        d = min(d, int((eigenvalues > noise**2).sum()))
        deflated = scatter.matrix - (vectors[:, :d] * eigenvalues[:d]) @ vectors[:, :d].T
        left_out = torch.stack([deflated.trace().clamp_min(0), deflated.square().sum()])
    left_out = left_out + scatter.off_axis
    axes = vectors[:, :d]
    if d == 0:
        return PrincipalAxes(axes, axes.new_zeros(len(rows), 0), axes.new_zeros(0), left_out)
    # One Rayleigh-Ritz step on the rows themselves gives singular values that are exact for these coordinates.
    coordinates = rows.project(axes)
    _, triangle = torch.linalg.qr(coordinates, mode="r")
    _, singular_values, rotation = torch.linalg.svd(triangle, full_matrices=False)
    axes, coordinates = axes @ rotation.T, coordinates @ rotation.T
    return PrincipalAxes(axes, coordinates, singular_values, left_out)


def axis_signs(axes: Tensor) -> Tensor:
    """Return the sign (d,) of the entry of largest magnitude of each column, which fixes the orientation of an axis."""
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(axes.dtype)


def _n_for_fraction(eigenvalues: Tensor, fraction: float) -> int:
    """Return the smallest number of first eigenvalues whose sum is this fraction of the sum of all."""
    sums = eigenvalues.cumsum(0)
    # The sum itself is rounded: a fraction of 0.9 is reached by 0.9 minus a rounding error.
    is_enough = sums >= fraction * sums[-1] * (1 - 1e-12)
    return int(is_enough.to(torch.int8).argmax()) + 1
