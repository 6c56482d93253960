"""Principal components: the axes on which the normal rows spread, and what they leave out.

Functions of tensors. All of it runs in float64, whatever the features are: it is a small share of the work, and
the whitening that follows divides by the smallest kept singular value. Rows are scaled by a power of two first
(exactly), so that squares of 1e-150 or 1e150 neither underflow nor overflow.

All linear algebra is torch's, whose number of threads each thread sets for itself. NumPy's and SciPy's BLAS has one
number for the whole process: to hold it to one thread here would slow down, or race with, whatever else runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from dfkde_sklearn._threads import on_single_core

# A scatter matrix squares the condition number: singular values under 1e-5 of the largest have lost half their
# digits in it, and are taken from a singular value decomposition of the rows instead.
_SCATTER_LIMIT = 1e-10
# Of narrower matrices LAPACK takes no longer than Lanczos iterations.
_LANCZOS_WIDTH = 384

# Multiplications for the scatter matrix, from which on torch's threads are worth more than they hinder one another.
_LARGE = 2**35
# Bytes of a block of rows that is still in the processor's cache when it is used; rows that are worth several threads.
_CACHED = 2**21
_BLOCK_ROWS = 1024
# Columns of a scatter matrix that are computed at once: enough for a fast product.
_BLOCK_COLUMNS = 256

_P = ParamSpec("_P")
_Rows = TypeVar("_Rows", bound="CentredRows | Tensor")
_Result = TypeVar("_Result")


def _on_one_core_if_small(
    function: Callable[Concatenate[_Rows, _P], _Result],
) -> Callable[Concatenate[_Rows, _P], _Result]:
    """Have a function of rows computed on one core, where these are on the CPU and more cores would not pay."""

    @wraps(function)
    def wrapper(rows: _Rows, *args: _P.args, **kwargs: _P.kwargs) -> _Result:
        X = rows.X if isinstance(rows, CentredRows) else rows
        if X.is_cpu and X.numel() * min(X.shape) < _LARGE:
            return on_single_core(function, rows, *args, **kwargs)
        return function(rows, *args, **kwargs)

    return wrapper


@dataclass(frozen=True)
class CentredRows:
    """The rows ``scale * (X - mean)``, made in blocks when they are asked for.

    X : Tensor (n, width), float32 or float64; never written to.
    mean : Tensor (width,), float64.
    scale : float, a power of two.
    block_rows : int, rows made at a time.
    """

    X: Tensor
    mean: Tensor
    scale: float
    block_rows: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.X.shape[0]

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.X.shape[1]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows from `start` to `stop`, a new float64 tensor."""
        # Scaled before the mean is taken off: the difference of two numbers near the largest float may overflow.
        return self.X[start:stop].to(torch.float64, copy=True).mul_(self.scale).sub_(self.mean * self.scale)

    def part(self, where: slice | Tensor) -> CentredRows:
        """Return the rows at the places `where`, a slice or indices, about the same mean."""
        return replace(self, X=self.X[where])

    def blocks(self) -> Iterator[Tensor]:
        """Return the rows, block by block."""
        return (self.rows(i, i + self.block_rows) for i in range(0, len(self), self.block_rows))

    def total(self) -> Tensor:
        """Return the sum of the rows, of shape (width,)."""
        return _sum((block.sum(0) for block in self.blocks()), self.mean.new_zeros(self.width))

    @_on_one_core_if_small
    def scatter(self) -> Tensor:
        """Return the sum of outer products of the rows, of shape (width, width)."""
        return _sum_of_grams(self.blocks(), self.mean.new_zeros(self.width, self.width))

    def project(self, axes: Tensor) -> Tensor:
        """Return the coordinates of the rows on the columns of `axes`, of shape (n, d)."""
        return torch.cat([block @ axes for block in self.blocks()])

    def take(self, kept: Tensor) -> tuple[CentredRows, Tensor]:
        """Return the rows where the mask `kept` (n,) is true, centred again, and the mean that took, (width,)."""
        rows = self.part(kept)
        mean = rows.total() / len(rows)
        return replace(rows, mean=self.mean + mean / self.scale), mean


class Basis(NamedTuple):
    """An orthonormal basis of the span of a few rows, as the reflectors that a QR decomposition consists of.

    To multiply them out would take as long as the decomposition, and only a few vectors are asked for.

    reflectors : Tensor (n_features, width), below the diagonal.
    factors : Tensor (width,), of the reflectors.
    """

    reflectors: Tensor
    factors: Tensor

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Return the vectors (n_features, k) that have the coordinates (width, k) on the basis."""
        n_features, width = self.reflectors.shape
        padded = coordinates.new_zeros(n_features, coordinates.shape[1])
        padded[:width] = coordinates
        return torch.ormqr(self.reflectors, self.factors, padded)


class Span(NamedTuple):
    """A data matrix, centred, and rotated onto its span where that is smaller than the feature space.

    mean : Tensor (n_features,), float64, the column means of the data.
    basis : Basis, the axes of the rotation; None where there is none.
    rows : CentredRows of `width` columns: the coordinates of ``scale * (X - mean)`` on the basis.
    scale : float, the power of two by which the rows are scaled.
    noise : float, the largest singular value that rounding alone can make, in the units of `rows`.
    """

    mean: Tensor
    basis: Basis | None
    rows: CentredRows
    scale: float
    noise: float

    def in_features(self, vectors: Tensor) -> Tensor:
        """Return vectors (width, k) of the space of the rows as vectors (n_features, k)."""
        return vectors if self.basis is None else self.basis.vectors(vectors)


class PrincipalAxes(NamedTuple):
    """The first principal axes of centred rows.

    axes : Tensor (width, d), orthonormal columns, each with its largest entry positive.
    coordinates : Tensor (n, d), the rows on the axes.
    singular_values : Tensor (d,), of the rows, decreasing.
    left_out : Tensor (2,), sum and sum of squares of the remaining eigenvalues of the scatter matrix.
    """

    axes: Tensor
    coordinates: Tensor
    singular_values: Tensor
    left_out: Tensor

    def first(self, d: int) -> PrincipalAxes:
        """Return the first `d` of the axes, or all where there are fewer."""
        rest = self.singular_values[d:].square()
        left_out = self.left_out + torch.stack([rest.sum(), rest.square().sum()])
        return PrincipalAxes(self.axes[:, :d], self.coordinates[:, :d], self.singular_values[:d], left_out)


class EigenPairs(NamedTuple):
    """Eigenvalues (n,) of a scatter matrix, decreasing, and their vectors (width, n)."""

    values: Tensor
    vectors: Tensor


def centred_rows(X: Tensor, mean: Tensor, scale: float, working_memory: int) -> CentredRows:
    """Return the rows ``scale * (X - mean)`` in blocks of at most `working_memory` bytes."""
    row_bytes = 8 * X.shape[1]
    if X.device.type == "cpu":
        working_memory = min(working_memory, max(_CACHED, _BLOCK_ROWS * row_bytes))
    return CentredRows(X, mean, scale, max(1, working_memory // row_bytes))


@_on_one_core_if_small
def span(X: Tensor, working_memory: int) -> Span:
    """Return the centred rows of `X` on the space that they span.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features), float32 or float64
    working_memory : int
        Bytes that a block of rows may take.

    Returns
    -------
    Span
        With far fewer samples than features the rows have n_samples columns, from a QR decomposition: all that follows
        (the principal axes, the refits without a fold) then costs n_samples columns and not n_features.
    """
    n, n_features = X.shape
    largest = max(abs(float(x)) for x in X.aminmax())  # without a copy
    # The exponent of the largest entry: after it, entries lie in [-1, 1].
    scale = 2.0 ** -math.frexp(largest)[1] if largest > 0 else 1.0
    # The spectral norm of a matrix of independent rounding errors.
    noise = torch.finfo(X.dtype).eps * (math.sqrt(n) + math.sqrt(n_features)) * largest * scale
    mean = torch.zeros(n_features, dtype=torch.float64, device=X.device)
    rows = centred_rows(X, mean, scale, working_memory)
    for _ in range(2):  # the second time takes off what rounding left of a large offset
        rows = replace(rows, mean=rows.mean + rows.total() / n / scale)
    if n > 0.8 * n_features:  # fewer columns by so little would not repay the decomposition
        return Span(rows.mean, None, rows, scale, noise)
    basis = Basis(*torch.geqrf(rows.rows().T))
    triangle = basis.reflectors[:n].triu()
    rotated = centred_rows(triangle.T.contiguous(), mean.new_zeros(n), 1.0, working_memory)
    return Span(rows.mean, basis, rotated, scale, noise)


@_on_one_core_if_small
def principal_axes(
    rows: CentredRows,
    n_components: int | float,
    noise: float,
    scatter: Tensor | None = None,
    pairs: EigenPairs | None = None,
) -> PrincipalAxes:
    """Return the first principal axes of centred rows.

    Parameters
    ----------
    rows : CentredRows
        Their mean is zero.
    n_components : int or float
        At most this many; a float in (0, 1) keeps the fewest axes that hold this share of the variance.
    noise : float
        Singular values up to this are rounding, not data.
    scatter : Tensor of shape (width, width), default=None
        The scatter matrix of the rows where it is known.
    pairs : EigenPairs, default=None
        All of the scatter matrix where they are known.

    Returns
    -------
    PrincipalAxes
        Of at most as many axes as the rows have rank.
    """
    scatter = rows.scatter() if scatter is None else scatter
    possible = min(len(rows) - 1, rows.width)

    def count(eigenvalues: Tensor) -> int:
        return min(int(n_components) if n_components >= 1 else _n_for_share(eigenvalues, n_components), possible)

    n_sought = min(int(n_components), possible) if n_components >= 1 else rows.width
    eigenvalues, vectors = leading_eigenpairs(scatter, max(n_sought, 1)) if pairs is None else pairs
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
        rest = scatter - (vectors[:, :d] * eigenvalues[:d]) @ vectors[:, :d].T
        left_out = torch.stack([rest.trace().clamp_min(0), rest.square().sum()])
    axes = vectors[:, :d]
    if d == 0:
        return PrincipalAxes(axes, axes.new_zeros(len(rows), 0), axes.new_zeros(0), left_out)
    # One Rayleigh-Ritz step on the rows themselves gives singular values that are exact for these coordinates.
    coordinates = rows.project(axes)
    _, triangle = torch.linalg.qr(coordinates, mode="r")
    _, singular_values, turn = torch.linalg.svd(triangle, full_matrices=False)
    axes, coordinates = axes @ turn.T, coordinates @ turn.T
    return PrincipalAxes(axes, coordinates, singular_values, left_out)


def more_than_rounding(pairs: EigenPairs, noise: float) -> EigenPairs:
    """Return those of all eigenpairs of a scatter matrix whose eigenvalues are more than rounding."""
    eigenvalues, vectors = pairs
    rounding = 10 * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * float(eigenvalues[0])
    n = int((eigenvalues > max(noise**2, rounding)).sum())
    return EigenPairs(eigenvalues[:n], vectors[:, :n])


def axis_signs(axes: Tensor) -> Tensor:
    """Return the sign of the entry of largest magnitude of each column, so that an axis has one orientation."""
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(axes.dtype)


def leading_eigenpairs(symmetric: Tensor, n: int) -> EigenPairs:
    """Return the `n` largest eigenvalues of a positive semidefinite matrix, and their vectors."""
    width = len(symmetric)
    found = None
    if symmetric.is_cpu and width >= _LANCZOS_WIDTH and n <= width // 8:
        found = _few_eigenpairs(symmetric, n)
    eigenvalues, vectors = torch.linalg.eigh(symmetric) if found is None else found
    return EigenPairs(eigenvalues.flip(0)[:n].clamp_min(0), vectors.flip(1)[:, :n])


def _few_eigenpairs(symmetric: Tensor, n: int) -> tuple[Tensor, Tensor] | None:
    """Return the `n` largest eigenvalues, increasing, and their vectors; None where not all are found for sure."""
    # The same for any run. A start without a part along some axis would never find it: as good as impossible by chance.
    generator = torch.Generator().manual_seed(0)
    start, other_start = torch.randn(2, len(symmetric), dtype=symmetric.dtype, generator=generator)
    found = _lanczos(lambda vector: symmetric @ vector, start, n, torch.finfo(symmetric.dtype).eps)
    if found is None:
        return None
    eigenvalues, vectors = found
    # Of several equal eigenvalues the iteration may find one only: the largest of what is left tells.
    left = _lanczos(
        lambda vector: symmetric @ vector - vectors @ (eigenvalues * (vectors.T @ vector)), other_start, 1, 1e-3
    )
    if left is None:
        return None
    rounding = 100 * torch.finfo(symmetric.dtype).eps * eigenvalues[-1]
    return found if left[0][0] <= eigenvalues[0] + rounding else None


def _lanczos(
    times: Callable[[Tensor], Tensor], start: Tensor, n: int, tolerance: float
) -> tuple[Tensor, Tensor] | None:
    """Return the `n` largest eigenpairs of a symmetric operator, as far as a Krylov space of one vector has them.

    Eigenvalues increase, and are right to `tolerance` times the largest. None where half as many steps as the operator
    has dimensions do not find them.

    References
    ----------
    .. [1] G. H. Golub and C. F. Van Loan, Matrix Computations, 4th edition, 2013, section 10.3, with complete
       reorthogonalization.
    """
    n_steps = len(start) // 2
    basis = start.new_empty(n_steps + 1, len(start))
    tridiagonal = start.new_zeros(n_steps + 1, n_steps + 1)
    basis[0] = start / start.norm()
    n_enough = max(2 * n, 8)
    for j in range(n_steps):
        size = j + 1
        known, rest = basis[:size], times(basis[j])
        along = known @ rest
        rest = rest - along @ known
        rest -= (known @ rest) @ known  # what rounding left of it
        length = rest.norm()
        if not length > 0:
            return None
        tridiagonal[j, j], tridiagonal[j + 1, j] = along[j], length
        basis[j + 1] = rest / length
        if size < n_enough:
            continue
        n_enough = size + max(4, size // 8)
        eigenvalues, vectors = torch.linalg.eigh(tridiagonal[:size, :size])  # reads the lower half
        eigenvalues, vectors = eigenvalues[-n:], vectors[:, -n:]
        if float((length * vectors[-1]).abs().max()) <= tolerance * float(eigenvalues[-1].abs()):
            return eigenvalues, known.T @ vectors
    return None


def _n_for_share(eigenvalues: Tensor, share: float) -> int:
    """Return the smallest number of first eigenvalues whose sum is this share of the sum of all."""
    sums = eigenvalues.cumsum(0)
    # The sum itself is rounded: a share of 0.9 is reached by 0.9 less a rounding.
    enough = sums >= share * sums[-1] * (1 - 1e-12)
    return int(enough.to(torch.int8).argmax()) + 1


def _sum_of_grams(blocks: Iterator[Tensor], nothing: Tensor) -> Tensor:
    if nothing.device.type != "cpu":
        return _sum((block.T @ block for block in blocks), nothing)
    # A product of a matrix with itself is symmetric: half of it is enough.
    width = len(nothing)
    for block in blocks:
        for start in range(0, width, _BLOCK_COLUMNS):
            stop = min(start + _BLOCK_COLUMNS, width)
            nothing[:stop, start:stop].addmm_(block[:, :stop].T, block[:, start:stop])
    return nothing.triu() + nothing.triu(1).T


def _sum(terms: Iterator[Tensor], nothing: Tensor) -> Tensor:
    for term in terms:
        nothing += term
    return nothing
