"""Eigenpairs against NumPy's full decomposition."""

import numpy as np
import pytest
import torch

from dfkde_sklearn._density.eigen import Scatter, _lanczos, leading_eigenpairs


def symmetric_with(eigenvalues, seed=0):
    width = len(eigenvalues)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    return (turn * eigenvalues) @ turn.T


@pytest.mark.parametrize(
    "eigenvalues",
    [
        np.arange(1, 401) ** -1.5,
        np.r_[np.full(12, 3.0), np.full(12, 2.0), np.linspace(1, 0.5, 376)],
        np.r_[np.full(30, 2.0), np.ones(370)],
        np.r_[5.0, 4.0, np.zeros(398)],
        np.ones(400),
        1 + 1e-9 * np.arange(400),
        np.zeros(400),
    ],
    ids=["falling", "repeated", "repeated past the last", "of low rank", "equal", "nearly equal", "none"],
)
@pytest.mark.parametrize("n", [20, 40, 60], ids=["few", "as many as Lanczos iterations find", "of all"])
def test_few_of_many_eigenpairs_are_those_of_a_full_decomposition(eigenvalues, n):
    symmetric = symmetric_with(eigenvalues)
    values, vectors = leading_eigenpairs(torch.from_numpy(symmetric), n)
    largest = np.sort(eigenvalues)[::-1][:n]
    np.testing.assert_allclose(values, largest, atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(symmetric @ vectors.numpy(), vectors.numpy() * largest, atol=1e-12)


@pytest.mark.parametrize("n", [6, 12])
def test_lanczos_iterations_that_miss_an_eigenvalue_are_not_trusted(n):
    # Of equal eigenvalues the Krylov space of one vector has one, and others by rounding only.
    symmetric = torch.diag(torch.from_numpy(np.r_[np.full(n, 2.0), np.linspace(1, 0.9, n), np.zeros(400 - 2 * n)]))
    start = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eigenvalues, _ = _lanczos(symmetric.mv, start, n, 2**-52)
    assert eigenvalues[0] <= 1
    np.testing.assert_array_equal(leading_eigenpairs(symmetric, n)[0], np.full(n, 2.0))


@pytest.mark.parametrize("keeps", [False, True])
def test_eigenpairs_that_are_kept_are_those_of_the_matrix(keeps):
    symmetric = torch.from_numpy(symmetric_with(np.r_[4.0, 3.0, 2.0, 1e-20, 0.0]))
    scatter = Scatter(symmetric, keeps_eigenpairs=keeps)
    before = scatter.leading_eigenpairs(2)
    significant, _ = scatter.significant_eigenpairs(1e-3)
    torch.testing.assert_close(significant, torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64))
    for values, vectors in (before, scatter.leading_eigenpairs(2)):
        torch.testing.assert_close(values, significant[:2])
        torch.testing.assert_close(symmetric @ vectors, vectors * values)
