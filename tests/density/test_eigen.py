"""Eigenpairs against NumPy's full decomposition."""

import numpy as np
import pytest
import torch

from dfkde_sklearn._density.eigen import Scatter, _are_largest, leading_eigenpairs


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
@pytest.mark.parametrize("n", [20, 40, 60], ids=["few", "as many as are sought by iterations", "of all"])
def test_few_of_many_eigenpairs_are_those_of_a_full_decomposition(eigenvalues, n):
    symmetric = symmetric_with(eigenvalues)
    values, vectors = leading_eigenpairs(torch.from_numpy(symmetric), n)
    largest = np.sort(eigenvalues)[::-1][:n]
    np.testing.assert_allclose(values, largest, atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(symmetric @ vectors.numpy(), vectors.numpy() * largest, atol=1e-12)


@pytest.mark.parametrize("left_out", [0, 3, 5])
def test_pairs_that_lack_one_of_the_largest_are_not_trusted(left_out):
    values = np.r_[np.full(3, 2.0), np.linspace(1, 0.9, 3), np.zeros(394)]
    symmetric = torch.from_numpy(symmetric_with(values))
    start = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eigenvalues, vectors = (part[..., -7:] for part in torch.linalg.eigh(symmetric))
    assert _are_largest((eigenvalues[1:], vectors[:, 1:]), symmetric, start)
    chosen = [i for i in range(1, 7) if i != 6 - left_out]
    # The smallest of those that are given is below the one that is missing, or they are fewer than were there.
    assert not _are_largest((eigenvalues[[0, *chosen]], vectors[:, [0, *chosen]]), symmetric, start)


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
