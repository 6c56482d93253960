"""Eigenpairs of scatter matrices: the few largest by the iterations of ARPACK, or all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

# LAPACK decomposes narrower matrices as fast as ARPACK's iterations find a few eigenpairs.
_ITERATED_WIDTH = 320

# Eigenvalues (n,), decreasing, and their vectors (width, n).
EigenPairs = tuple[Tensor, Tensor]


class Scatter:
    """The scatter matrix of centred rows, and its eigenpairs.

    Parameters
    ----------
    matrix : Tensor of shape (width, width)
        The sum of outer products of the rows.
    off_axis : Tensor of shape (2,), default=None
        Where the rows are projections: sum and sum of squares of the eigenvalues that the projection dropped.
    keeps_eigenpairs : bool, default=False
        Whether a decomposition into all eigenpairs is kept for later calls.
    """

    def __init__(self, matrix: Tensor, off_axis: Tensor | None = None, *, keeps_eigenpairs: bool = False) -> None:
        self.matrix = matrix
        self.off_axis = matrix.new_zeros(2) if off_axis is None else off_axis
        self._keeps_eigenpairs = keeps_eigenpairs
        self._eigenpairs: EigenPairs | None = None

    def leading_eigenpairs(self, n: int) -> EigenPairs:
        """Return the `n` largest eigenvalues and their vectors."""
        if self._eigenpairs is None:
            return leading_eigenpairs(self.matrix, n)
        eigenvalues, vectors = self._eigenpairs
        return eigenvalues[:n], vectors[:, :n]

    def significant_eigenpairs(self, noise: float) -> EigenPairs:
        """Return the eigenpairs that are not rounding: those of singular values above `noise`."""
        eigenvalues, vectors = self.leading_eigenpairs(len(self.matrix))
        if self._keeps_eigenpairs:
            self._eigenpairs = eigenvalues, vectors
        rounding = 10 * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * float(eigenvalues[0])
        n = int((eigenvalues > max(noise**2, rounding)).sum())
        return eigenvalues[:n], vectors[:, :n]


def leading_eigenpairs(symmetric: Tensor, n: int) -> EigenPairs:
    """Return the `n` largest eigenvalues of a positive semidefinite matrix, and their vectors."""
    width = len(symmetric)
    pairs = None
    if symmetric.is_cpu and width >= _ITERATED_WIDTH and n <= width // 8:
        pairs = _few_eigenpairs(symmetric, n)
    eigenvalues, vectors = torch.linalg.eigh(symmetric) if pairs is None else pairs
    return eigenvalues.flip(0)[:n].clamp_min(0), vectors.flip(1)[:, :n]


def _few_eigenpairs(symmetric: Tensor, n: int) -> EigenPairs | None:
    """Return the `n` largest eigenvalues, increasing, and their vectors; None unless all of them are certain."""
    # The start is the same for any run. Drawn at random, it has a part along every axis.
    generator = torch.Generator().manual_seed(0)
    start, other_start = torch.randn(2, len(symmetric), dtype=symmetric.dtype, generator=generator)
    try:
        pairs = _iterated(symmetric.mv, start, n, 0.0)
        return pairs if _are_largest(pairs, symmetric, other_start) else None
    except ArpackError:
        return None


def _are_largest(pairs: EigenPairs, symmetric: Tensor, start: Tensor) -> bool:
    """Return whether eigenvalues, increasing, are the largest of a matrix.

    An iteration may miss one of several equal eigenvalues: it is then the largest of the deflated matrix.
    """
    eigenvalues, vectors = pairs

    def deflated(vector: Tensor) -> Tensor:
        return symmetric @ vector - vectors @ (eigenvalues * (vectors.T @ vector))

    missed, _ = _iterated(deflated, start, 1, 1e-3)
    return bool(missed[0] <= eigenvalues[0] + 100 * torch.finfo(symmetric.dtype).eps * eigenvalues[-1])


def _iterated(times: Callable[[Tensor], Tensor], start: Tensor, n: int, tolerance: float) -> EigenPairs:
    """Return the `n` largest eigenpairs of a symmetric operator, eigenvalues increasing, by ARPACK.

    The products are torch's, for the reason that `rows.py` gives. A `tolerance` of 0 is the rounding of float64.
    """
    width = len(start)
    operator = LinearOperator(
        (width, width), matvec=lambda vector: times(torch.from_numpy(vector.ravel())).numpy(), dtype=np.float64
    )
    eigenvalues, vectors = eigsh(operator, n, which="LA", v0=start.numpy(), tol=tolerance)
    return torch.from_numpy(eigenvalues), torch.from_numpy(np.ascontiguousarray(vectors))
