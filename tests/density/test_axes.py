"""Principal axes against scikit-learn and NumPy, and where they must hold: scales, offsets, ranks, blocks."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

from dfkde_sklearn._density.axes import axis_signs, principal_axes, span

MEMORY = 2**20


def rows(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) * np.logspace(0, -2, d))


def axes_of(X, n_components, memory=MEMORY):
    spanned = span(torch.from_numpy(X), memory)
    result = principal_axes(spanned.rows, n_components, spanned.noise)
    axes = spanned.in_features(result.axes)
    return spanned, result, (axes * axis_signs(axes)).numpy()


@pytest.mark.parametrize("shape", [(200, 30), (30, 200), (50, 50), (51, 50), (5, 3), (700, 600)])
def test_axes_and_singular_values_are_those_of_a_full_svd(shape):
    X = rows(*shape)
    d = min(8, min(shape) - 1)
    pca = PCA(d, svd_solver="full").fit(X)
    spanned, result, axes = axes_of(X, d)
    np.testing.assert_allclose(spanned.mean, pca.mean_, atol=1e-13)
    np.testing.assert_allclose(result.singular_values / spanned.scale, pca.singular_values_, rtol=1e-12)
    assert np.sin(subspace_angles(axes, pca.components_.T).max()) < 1e-12
    np.testing.assert_allclose(result.coordinates.abs() / spanned.scale, np.abs(pca.transform(X)), atol=1e-11)


def test_what_is_left_out_is_the_remaining_spectrum():
    X = rows(60, 20)
    spanned, result, _ = axes_of(X, 5)
    remaining = np.linalg.svd(X - X.mean(0), compute_uv=False)[5:] * spanned.scale
    np.testing.assert_allclose(result.left_out, [(remaining**2).sum(), (remaining**4).sum()], rtol=1e-12)


def test_small_blocks_change_nothing():
    X = rows(100, 12)
    _, _, axes = axes_of(X, 5)
    _, _, in_blocks = axes_of(X, 5, memory=8 * 12 * 7)
    np.testing.assert_allclose(in_blocks, axes, atol=1e-13)


@pytest.mark.parametrize("factor", [1e-300, 1e-150, 1e150, 1e300])
def test_scale_of_the_features_changes_no_axis(factor):
    X = rows(40, 6)
    _, _, axes = axes_of(X, 4)
    spanned, result, scaled_axes = axes_of(X * factor, 4)
    np.testing.assert_allclose(scaled_axes, axes, atol=1e-12)
    np.testing.assert_allclose(
        result.singular_values / (factor * spanned.scale),
        np.linalg.svd(X - X.mean(0), compute_uv=False)[:4],
        rtol=1e-12,
    )


def test_small_singular_values_keep_their_digits():
    rng = np.random.default_rng(0)
    left = rng.normal(size=(50, 6))
    left = np.linalg.qr(left - left.mean(0))[0]
    right = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    values = np.logspace(0, -9, 6)
    spanned, result, _ = axes_of((left * values) @ right.T, 6)
    # The scatter matrix would give them up below 1e-8; the data itself is rounded to 1e-16 of the largest.
    np.testing.assert_allclose(result.singular_values / spanned.scale, values, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e8])
def test_a_large_offset_makes_no_dimension(offset):
    X = rows(80, 4) @ np.random.default_rng(1).normal(size=(4, 9)) + offset
    _, result, _ = axes_of(X, 9)
    assert len(result.singular_values) == 4


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 1), (0.75, 1), (0.76, 2), (0.95, 2), (0.96, 3), (0.999, 3)])
def test_a_fraction_keeps_the_fewest_axes_that_hold_it(fraction, expected):
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=float)
    X = signs * np.sqrt([0.75, 0.20, 0.05])
    assert len(axes_of(X, fraction)[1].singular_values) == expected


@pytest.mark.parametrize("X", [np.ones((10, 3)), np.full((10, 3), 0.1), np.zeros((4, 3)), np.full((10, 3), 1e300)])
def test_equal_rows_have_no_axis(X):
    assert axes_of(X, 2)[1].axes.shape[1] == 0


def test_the_data_is_not_written_to():
    X = rows(20, 5)
    before = X.copy()
    axes_of(X, 3)
    assert np.array_equal(X, before)


@pytest.mark.parametrize("n_components", [0.999, 6])
def test_the_largest_number_of_axes_limits_both_a_number_and_a_fraction(n_components):
    spanned = span(torch.from_numpy(rows(30, 8)), MEMORY)
    limited = principal_axes(spanned.rows, n_components, spanned.noise, max_components=2)
    expected = principal_axes(spanned.rows, 2, spanned.noise)
    torch.testing.assert_close(limited.singular_values, expected.singular_values, rtol=1e-13, atol=0)
    torch.testing.assert_close(limited.left_out, expected.left_out, rtol=1e-12, atol=0)
