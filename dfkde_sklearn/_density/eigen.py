"""Eigenpairs of scatter matrices: the few largest by Lanczos iterations, or all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import log

import torch
from torch import Tensor

# LAPACK decomposes narrower matrices as fast as Lanczos iterations do.
_LANCZOS_WIDTH = 256

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
    if symmetric.is_cpu and width >= _LANCZOS_WIDTH and n <= width // 8:
        pairs = _few_eigenpairs(symmetric, n)
    eigenvalues, vectors = torch.linalg.eigh(symmetric) if pairs is None else pairs
    return eigenvalues.flip(0)[:n].clamp_min(0), vectors.flip(1)[:, :n]


def _few_eigenpairs(symmetric: Tensor, n: int) -> EigenPairs | None:
    """Return the `n` largest eigenvalues, increasing, and their vectors; None unless all of them are certain."""
    # The start is the same for any run. Drawn at random, it has a part along every axis.
    generator = torch.Generator().manual_seed(0)
    start, other_start = torch.randn(2, len(symmetric), dtype=symmetric.dtype, generator=generator)
    pairs = _lanczos(lambda vector: symmetric @ vector, start, n, torch.finfo(symmetric.dtype).eps)
    if pairs is None:
        return None
    eigenvalues, vectors = pairs
    # The iteration may miss one of several equal eigenvalues: it would then be the largest of the deflated matrix.
    deflated = _lanczos(
        lambda vector: symmetric @ vector - vectors @ (eigenvalues * (vectors.T @ vector)), other_start, 1, 1e-3
    )
    if deflated is None:
        return None
    rounding = 100 * torch.finfo(symmetric.dtype).eps * eigenvalues[-1]
    return pairs if deflated[0][0] <= eigenvalues[0] + rounding else None


def _lanczos(times: Callable[[Tensor], Tensor], start: Tensor, n: int, tolerance: float) -> EigenPairs | None:
    """Return the `n` largest eigenpairs of a symmetric operator in the Krylov space of one vector.

    Eigenvalues increase, and have an error of at most `tolerance` times the largest. The result is None where the
    iteration does not converge in half as many steps as the operator has dimensions.

    References
    ----------
    .. [1] G. H. Golub and C. F. Van Loan, Matrix Computations, 4th edition, 2013, section 10.3, with complete
       reorthogonalization.
    """
    n_steps = len(start) // 2
    basis = start.new_empty(n_steps + 1, len(start))
    tridiagonal = start.new_zeros(n_steps + 1, n_steps + 1)
    basis[0] = start / start.norm()
    length, excess, tested, next_test = 0.0, 0.0, 0, max(2 * n, 8)
    for j in range(n_steps):
        # In as few operations as possible: each takes and gives back Python's lock, for which other threads wait.
        size = j + 1
        previous, vector = basis[:size], basis[j]
        new = times(vector)
        along = float(vector @ new)
        new.add_(vector, alpha=-along)
        if j:
            new.add_(basis[j - 1], alpha=-length)
        # Rounding leaves a part along the last two, and along all others.
        new.addmv_(previous.T, previous @ new, alpha=-1)
        length = float(new.norm())
        if not length > 0:
            return None
        tridiagonal[j, j], tridiagonal[j + 1, j] = along, length
        torch.div(new, length, out=basis[j + 1])
        if size < next_test:
            continue
        eigenvalues, vectors = torch.linalg.eigh(tridiagonal[:size, :size])  # reads the lower half
        eigenvalues, vectors = eigenvalues[-n:], vectors[:, -n:]
        error, allowed = float((length * vectors[-1]).abs().max()), tolerance * float(eigenvalues[-1].abs())
        if error <= allowed:
            return eigenvalues, previous.T @ vectors
        # A test costs as much as several steps. The next one is where the error falls to what is allowed, if its
        # logarithm goes on as between the last two tests.
        excess_before, excess = excess, log(error / max(allowed, sys.float_info.min))
        rate = (excess_before - excess) / (size - tested) if tested else 0.0
        step = round(excess / rate) if rate > 0 else size // 8
        tested, next_test = size, size + min(max(2, step), max(4, size // 4))
    return None
