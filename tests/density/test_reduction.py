"""Principal axes against scikit-learn and NumPy, and where they must hold: scales, offsets, ranks, blocks."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

from dfkde_sklearn._density.axes import _lanczos, axis_signs, leading_eigenpairs, principal_axes, span

MEMORY = 2**20


def rows(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) * np.logspace(0, -2, d))


def axes_of(X, n_components, memory=MEMORY):
    whole = span(torch.from_numpy(X), memory)
    found = principal_axes(whole.rows, n_components, whole.noise)
    axes = whole.in_features(found.axes)
    return whole, found, (axes * axis_signs(axes)).numpy()


@pytest.mark.parametrize("shape", [(200, 30), (30, 200), (50, 50), (51, 50), (5, 3), (700, 600)])
def test_axes_and_singular_values_are_those_of_a_full_svd(shape):
    X = rows(*shape)
    d = min(8, min(shape) - 1)
    pca = PCA(d, svd_solver="full").fit(X)
    whole, found, axes = axes_of(X, d)
    np.testing.assert_allclose(whole.mean, pca.mean_, atol=1e-13)
    np.testing.assert_allclose(found.singular_values / whole.scale, pca.singular_values_, rtol=1e-12)
    assert np.sin(subspace_angles(axes, pca.components_.T).max()) < 1e-12
    np.testing.assert_allclose(found.coordinates.abs() / whole.scale, np.abs(pca.transform(X)), atol=1e-11)


def test_what_is_left_out_is_the_rest_of_the_spectrum():
    X = rows(60, 20)
    whole, found, _ = axes_of(X, 5)
    rest = np.linalg.svd(X - X.mean(0), compute_uv=False)[5:] * whole.scale
    np.testing.assert_allclose(found.left_out, [(rest**2).sum(), (rest**4).sum()], rtol=1e-12)


def test_small_blocks_change_nothing():
    X = rows(100, 12)
    _, _, axes = axes_of(X, 5)
    _, _, in_blocks = axes_of(X, 5, memory=8 * 12 * 7)
    np.testing.assert_allclose(in_blocks, axes, atol=1e-13)


@pytest.mark.parametrize("factor", [1e-300, 1e-150, 1e150, 1e300])
def test_scale_of_the_features_changes_no_axis(factor):
    X = rows(40, 6)
    _, _, axes = axes_of(X, 4)
    whole, found, scaled_axes = axes_of(X * factor, 4)
    np.testing.assert_allclose(scaled_axes, axes, atol=1e-12)
    np.testing.assert_allclose(
        found.singular_values / (factor * whole.scale),
        np.linalg.svd(X - X.mean(0), compute_uv=False)[:4],
        rtol=1e-12,
    )


def test_small_singular_values_keep_their_digits():
    rng = np.random.default_rng(0)
    left = rng.normal(size=(50, 6))
    left = np.linalg.qr(left - left.mean(0))[0]
    right = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    values = np.logspace(0, -9, 6)
    whole, found, _ = axes_of((left * values) @ right.T, 6)
    # The scatter matrix would give them up below 1e-8; the data itself is rounded to 1e-16 of the largest.
    np.testing.assert_allclose(found.singular_values / whole.scale, values, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e8])
def test_a_large_offset_makes_no_dimension(offset):
    X = rows(80, 4) @ np.random.default_rng(1).normal(size=(4, 9)) + offset
    _, found, _ = axes_of(X, 9)
    assert len(found.singular_values) == 4


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1), (0.75, 1), (0.76, 2), (0.95, 2), (0.96, 3), (0.999, 3)])
def test_a_share_keeps_the_fewest_axes_that_hold_it(share, expected):
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=float)
    X = signs * np.sqrt([0.75, 0.20, 0.05])
    assert len(axes_of(X, share)[1].singular_values) == expected


@pytest.mark.parametrize("X", [np.ones((10, 3)), np.full((10, 3), 0.1), np.zeros((4, 3)), np.full((10, 3), 1e300)])
def test_equal_rows_have_no_axis(X):
    assert axes_of(X, 2)[1].axes.shape[1] == 0


def test_the_data_is_not_written_to():
    X = rows(20, 5)
    before = X.copy()
    axes_of(X, 3)
    assert np.array_equal(X, before)


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
    found, vectors = leading_eigenpairs(torch.from_numpy(symmetric), n)
    largest = np.sort(eigenvalues)[::-1][:n]
    np.testing.assert_allclose(found, largest, atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(symmetric @ vectors.numpy(), vectors.numpy() * largest, atol=1e-12)


@pytest.mark.parametrize("n", [6, 12])
def test_lanczos_iterations_that_miss_an_eigenvalue_are_not_trusted(n):
    # Of equal eigenvalues the Krylov space of one vector has one, and others by rounding only.
    symmetric = torch.diag(torch.from_numpy(np.r_[np.full(n, 2.0), np.linspace(1, 0.9, n), np.zeros(400 - 2 * n)]))
    start = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eigenvalues, _ = _lanczos(symmetric.mv, start, n, 2**-52)
    assert eigenvalues[0] <= 1
    np.testing.assert_array_equal(leading_eigenpairs(symmetric, n).values, np.full(n, 2.0))
