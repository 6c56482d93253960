"""The parts of a fit against slow references in NumPy, SciPy and scikit-learn."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from scipy.stats import gaussian_kde
from sklearn.covariance import empirical_covariance

from dfkde_sklearn._density.axes import span
from dfkde_sklearn._density.eigen import Scatter
from dfkde_sklearn._density.estimate import Settings, n_removed, residual_term, row_density
from dfkde_sklearn._density.fit import fit
from dfkde_sklearn._density.folds import N_FOLDS, Folds, copies, fold_places, n_moved
from dfkde_sklearn._density.held_out import (
    HeldOutSpectrum,
    calibration_scores,
    cross_fitted,
    held_out_spectrum,
    with_held_out_residuals,
)
from dfkde_sklearn._density.scoring import log_density_of

MEMORY = 2**24
SETTINGS = Settings("scale", "scott", None, 0.0, MEMORY)


def rows(n, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) @ (rng.normal(size=(width, width)) * np.logspace(0, -1, width)) + 3.0


def grouped(n, seed=0):
    """Group numbers of n rows, with gaps between them: about three rows a group, in no order."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, n // 3, n) * 7 - 5)


def slow_folds(n, groups=None):
    """Places of each fold: 20 runs of rows, or of the sorted numbers of groups."""
    numbers = np.arange(n) if groups is None else groups.numpy()
    unique = np.unique(numbers)
    n_runs = min(20, len(unique))
    bounds = [round(i * len(unique) / n_runs) for i in range(n_runs + 1)]
    return [np.flatnonzero(np.isin(numbers, unique[a:b])) for a, b in pairwise(bounds)]


def slow_axes(X, d):
    """Mean, axes and singular values by a full decomposition."""
    mean = X.mean(0)
    _, singular_values, axes = np.linalg.svd(X - mean, full_matrices=False)
    return mean, axes[:d].T, singular_values[:d]


def slow_log_density(X, new, d):
    """The density of the principal components divided by their longest, by SciPy."""
    mean, axes, _ = slow_axes(X, d)
    longest = np.linalg.norm((X - mean) @ axes, axis=1).max()
    return gaussian_kde(((X - mean) @ axes / longest).T).logpdf(((new - mean) @ axes / longest).T)


def folds_of(X, groups=None, memory=MEMORY):
    features = span(torch.from_numpy(X), memory)
    return features, Folds(features.rows, groups, memory)


def fitted_density(X, d, settings=SETTINGS, groups=None):
    features, folds = folds_of(X, groups)
    density, is_kept = row_density(features.rows, Scatter(features.rows.scatter()), d, features, settings)
    return features, folds, density, is_kept


@pytest.mark.parametrize("n", [2, 7, 20, 21, 59, 400])
def test_folds_are_runs_of_equal_length_but_for_a_row(n):
    places = [np.arange(n)[where] for where in fold_places(n)]
    np.testing.assert_array_equal(np.concatenate(places), np.arange(n))
    assert len(places) == min(N_FOLDS, n)
    assert np.ptp([len(where) for where in places]) <= 1


@pytest.mark.parametrize("n", [6, 45, 200])
def test_folds_follow_groups(n):
    groups = grouped(n)
    places = fold_places(n, groups)
    for where, expected in zip(places, slow_folds(n, groups), strict=True):
        np.testing.assert_array_equal(where, expected)


def test_groups_of_consecutive_rows_are_in_the_folds_of_their_rows():
    for where, run in zip(fold_places(41, torch.arange(41) * 3 + 100), fold_places(41), strict=True):
        np.testing.assert_array_equal(where, np.arange(41)[run])


def test_rows_are_moved_that_are_in_another_run_than_the_first_of_their_group():
    assert n_moved(torch.arange(100)) == 0
    groups = torch.arange(100)  # of runs of five rows
    groups[3] = 1
    assert n_moved(groups) == 0
    groups[[50, 99]] = 1
    assert n_moved(groups) == 2


def test_copies_have_the_number_of_the_first():
    table = np.array([[0.0, 1.0], [2.0, 3.0], [-0.0, 1.0], [2.0, 3.5], [2.0, 3.0]])
    assert copies(table).tolist() == [0, 1, 0, 3, 1]


@pytest.mark.parametrize("of_groups", [False, True], ids=["runs", "groups"])
@pytest.mark.parametrize("shape", [(90, 12), (30, 100)], ids=["tall", "wide"])
def test_each_fold_has_the_centred_rows_and_the_scatter_of_the_others(shape, of_groups):
    X = rows(*shape)
    groups = grouped(len(X)) if of_groups else None
    features, folds = folds_of(X, groups)
    for fold, where in zip(folds.map(lambda fold: fold), slow_folds(len(X), groups), strict=True):
        others = np.delete(X, where, axis=0)
        centred = others - others.mean(0)
        of_rows = fold.others.rows().numpy()
        np.testing.assert_allclose(of_rows @ of_rows.T / features.scale**2, centred @ centred.T, atol=1e-10)
        np.testing.assert_allclose(fold.scatter.matrix, of_rows.T @ of_rows, atol=1e-13)
        np.testing.assert_allclose(
            fold.held_out @ fold.others.rows().T / features.scale**2,
            (X[where] - others.mean(0)) @ centred.T,
            atol=1e-10,
        )


def test_a_far_outlier_takes_no_digits_from_the_scatter_of_the_others():
    X = rows(60, 5)
    X[7] += 1e9
    features, folds = folds_of(X)
    fold = folds.map(lambda fold: fold)[slow_fold_of(7, 60)]
    others = np.delete(X, np.arange(60)[fold.where], axis=0)
    expected = empirical_covariance(others) * len(others)
    # To the digits of the rows, from which a mean of 1e7 was subtracted.
    np.testing.assert_allclose(fold.scatter.matrix / features.scale**2, expected, rtol=1e-5)


def slow_fold_of(place, n):
    return next(i for i, where in enumerate(slow_folds(n)) if place in where)


@pytest.mark.parametrize("contamination", [0.0, 0.2])
@pytest.mark.parametrize("n", [12, 50])
def test_the_largest_number_of_components_is_the_rank_of_the_others_of_any_fold(n, contamination):
    X = np.random.default_rng(0).normal(size=(n, 60))
    groups = grouped(n)
    X = X[np.unique(groups, return_index=True)[1][np.unique(groups, return_inverse=True)[1]]]  # copies in each group
    for numbers in (None, groups):
        ranks = []
        for where in slow_folds(n, numbers):
            others = np.delete(X, where, axis=0) if numbers is not None else np.eye(n)[len(where) :]
            others = np.unique(others, axis=0)
            others = others[: len(others) - round(contamination * (n - len(where)))]
            ranks.append(np.linalg.matrix_rank(others - others.mean(0)) if len(others) else 0)
        _, folds = folds_of(X, numbers)
        assert folds.max_components(contamination) == max(1, min(ranks))


def test_scatters_and_eigenpairs_are_computed_once_for_each_fold():
    _, folds = folds_of(rows(60, 8))
    first, again = ([fold.scatter for fold in folds.map(lambda fold: fold)] for _ in range(2))
    assert all(a is b for a, b in zip(first, again, strict=True))
    values, _ = first[0].significant_eigenpairs(0.0)
    assert values.data_ptr() == first[0].significant_eigenpairs(0.0)[0].data_ptr()


def test_eigenpairs_are_not_kept_where_they_exceed_the_working_memory():
    _, folds = folds_of(rows(60, 8), memory=8 * N_FOLDS * 8**2 - 1)
    scatter = folds.map(lambda fold: fold)[0].scatter
    values, _ = scatter.significant_eigenpairs(0.0)
    again, _ = scatter.significant_eigenpairs(0.0)
    assert values.data_ptr() != again.data_ptr()
    torch.testing.assert_close(values, again, rtol=0, atol=0)


def test_projected_folds_have_the_rows_on_the_first_axes_and_what_these_leave_out():
    X = rows(70, 20)
    features, folds = folds_of(X, grouped(70))
    scatter = Scatter(features.rows.scatter())
    assert folds.projected(20, scatter, features.noise) is folds
    projected = folds.projected(6, scatter, features.noise)
    assert folds.projected(6, scatter, features.noise) is projected
    mean, axes, _ = slow_axes(X, 6)
    coordinates = (X - mean) @ axes
    gram = projected.rows.rows() @ projected.rows.rows().T / features.scale**2
    np.testing.assert_allclose(gram, coordinates @ coordinates.T, atol=1e-10)
    off_axis = ((X - mean - coordinates @ axes.T) ** 2).sum(1)
    np.testing.assert_allclose(projected.off_axis / features.scale**2, off_axis, rtol=1e-10)
    for where, expected in zip(projected.places, folds.places, strict=True):
        np.testing.assert_array_equal(where, expected)


@pytest.mark.parametrize("of_groups", [False, True], ids=["runs", "groups"])
@pytest.mark.parametrize("shape", [(90, 12), (50, 100)], ids=["tall", "wide"])
def test_cross_fitted_scores_are_those_of_fits_to_the_other_folds(shape, of_groups):
    X = rows(*shape)
    groups = grouped(len(X)) if of_groups else None
    features, folds, density, _ = fitted_density(X, 4, groups=groups)
    log_densities, squared_distances = cross_fitted(folds, density, features, SETTINGS)
    for where in slow_folds(len(X), groups):
        others = np.delete(X, where, axis=0)
        np.testing.assert_allclose(log_densities[where], slow_log_density(others, X[where], 4), rtol=1e-9)
        mean, axes, _ = slow_axes(others, 4)
        centred = X[where] - mean
        expected = ((centred - centred @ axes @ axes.T) ** 2).sum(1)
        np.testing.assert_allclose(squared_distances[where] / features.scale**2, expected, rtol=1e-9)


def test_rows_that_alone_span_an_axis_have_no_cross_fitted_score_but_one_without_their_kernel():
    X = np.zeros((40, 3))
    X[:, :2] = rows(40, 2)
    X[5, 2] = 1.0  # in the third fold, of rows 4 and 5
    features, folds, density, _ = fitted_density(X, 3)
    log_densities, squared_distances = cross_fitted(folds, density, features, SETTINGS)
    for values in (log_densities, squared_distances):
        np.testing.assert_array_equal(np.flatnonzero(values.isnan()), [4, 5])
    scores, n_missing = calibration_scores(log_densities, squared_distances, density, features, SETTINGS)
    assert n_missing == 2
    torch.testing.assert_close(scores[6:], log_densities[6:], rtol=0, atol=0)
    coordinates, _ = density.project_and_measure(features.rows.rows())
    whitened = density.whiten(coordinates).numpy()
    for i in (4, 5):
        distances = ((np.delete(whitened, i, axis=0) - whitened[i]) ** 2).sum(1)
        kernels = np.exp(-distances / (2 * density.bandwidth**2)) / (density.bandwidth * math.sqrt(2 * math.pi)) ** 3
        assert float(scores[i]) == pytest.approx(math.log(kernels.mean()) + density.log_volume, rel=1e-10)


def slow_spectrum(X, folds):
    """Squares of each row along all axes of the other folds, those divided by the axes' variances, and off them."""
    n_axes = min(np.linalg.matrix_rank(np.delete(X, where, axis=0) - X.mean(0)) for where in folds)
    n_axes = min(n_axes, *(len(X) - len(where) - 1 for where in folds))
    along, ratios, off = (np.empty((len(X), n_axes)), np.empty((len(X), n_axes)), np.empty(len(X)))
    for where in folds:
        others = np.delete(X, where, axis=0)
        mean, axes, singular_values = slow_axes(others, n_axes)
        centred = X[where] - mean
        along[where] = (centred @ axes) ** 2
        ratios[where] = along[where] / (singular_values**2 / (len(others) - 1))
        off[where] = ((centred - centred @ axes @ axes.T) ** 2).sum(1)
    return tuple(np.minimum(x, 50 * np.median(x, axis=0)).mean(0) for x in (along, ratios, off))


@pytest.mark.parametrize("of_groups", [False, True], ids=["runs", "groups"])
@pytest.mark.parametrize("shape", [(91, 12), (51, 100)], ids=["tall", "wide"])
def test_the_held_out_spectrum_is_the_bounded_mean_of_squares_by_other_folds(shape, of_groups):
    X = rows(*shape)
    groups = grouped(len(X)) if of_groups else None
    features, folds = folds_of(X, groups)
    spectrum = held_out_spectrum(folds, features.noise)
    variances, ratios, off_axis = slow_spectrum(X, slow_folds(len(X), groups))
    np.testing.assert_allclose(spectrum.variances / features.scale**2, variances, rtol=1e-8)
    np.testing.assert_allclose(spectrum.ratios, ratios, rtol=1e-8)
    np.testing.assert_allclose(spectrum.off_axis / features.scale**2, off_axis, rtol=1e-8, atol=1e-20)


@pytest.mark.parametrize("shape", [(90, 12), (50, 100), (200, 40)])
def test_auto_keeps_axes_of_like_variance_that_stand_out_of_the_noise(shape):
    n, width = shape
    rng = np.random.default_rng(0)
    X = rng.normal(size=shape) * np.r_[5.0, 4.0, 3.0, np.full(width - 3, 0.3)]
    variances, ratios, off_axis = slow_spectrum(X, slow_folds(n))
    noise = off_axis / (width - len(ratios)) if len(ratios) < width else 0.0
    ratios, variances = isotonic_regression(ratios).x, isotonic_regression(variances, increasing=False).x
    expected = max(1, int(((ratios <= 2.0) & (variances >= 1.25 * noise)).sum()))
    training = fit(torch.from_numpy(X), "auto", SETTINGS, torch.arange(n))
    assert training.fitted.density.axes.shape[1] == expected
    assert expected >= 3


def test_the_number_of_reliable_axes_ends_where_ratio_or_signal_fails():
    variances = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    ratios = torch.tensor([1.0, 1.1, 1.2, 1.9, 2.5], dtype=torch.float64)
    assert HeldOutSpectrum(variances, ratios, 0.0).n_reliable(5) == 4
    assert HeldOutSpectrum(variances, ratios, 10.0).n_reliable(15) == 3  # noise of 1 along each of ten directions
    assert HeldOutSpectrum(variances, ratios * 3, 0.0).n_reliable(5) == 1
    assert HeldOutSpectrum(variances, ratios, 3.0).left_out(2, 8) == (3.5 + 3.0, 4 + 1 + 0.25 + 3.0)


@pytest.mark.parametrize("kind", ["gaussian", "box"])
def test_residual_terms_are_gaussians_of_the_left_out_variances(kind):
    X = rows(40, 9)
    features, _ = folds_of(X)
    variances = np.array([0.5, 0.2, 0.1, 0.05])  # in the units of the features
    scale = features.scale
    term = residual_term(kind, variances.sum() * scale**2, (variances**2).sum() * scale**4, 40, 5, features)
    degrees = 4 if kind == "gaussian" else variances.sum() ** 2 / (variances**2).sum()
    variance = variances.sum() / degrees
    assert term.variance / scale**2 == pytest.approx(variance)
    squared_distance = 0.7
    expected = -squared_distance / (2 * variance) - degrees / 2 * math.log(2 * math.pi * variance)
    actual = term.log_density(torch.tensor(squared_distance * scale**2, dtype=torch.float64))
    assert float(actual) == pytest.approx(expected)
    assert residual_term(kind, 1.0, 1.0, 40, 9, features) is None
    assert residual_term(None, 1.0, 1.0, 40, 5, features) is None


@pytest.mark.parametrize("contamination", [0.0, 0.15])
@pytest.mark.parametrize("residual", ["gaussian", "box"])
def test_residual_terms_are_estimated_from_held_out_rows_that_are_kept(residual, contamination):
    X = rows(60, 10)
    settings = SETTINGS._replace(residual=residual, contamination=contamination)
    features, folds, density, is_kept = fitted_density(X, 3, settings)
    _, squared_distances = cross_fitted(folds, density, features, settings)
    actual = with_held_out_residuals(density, is_kept, squared_distances, folds, features, settings)
    of_kept = squared_distances[is_kept].numpy()
    mean = np.minimum(of_kept, 50 * np.median(of_kept)).mean()
    assert actual.gaussian_residual.variance == pytest.approx(mean / 7)
    if residual == "gaussian":
        assert actual.residual == actual.gaussian_residual
        return
    kept = X[is_kept.numpy()]
    variances, _, off_axis = slow_spectrum(kept, slow_folds(len(kept)))
    left_out = variances[3:] * features.scale**2
    total, squares = left_out.sum() + off_axis * features.scale**2, (left_out**2).sum()
    expected = residual_term("box", total, squares, len(X), 3, features)
    np.testing.assert_allclose(actual.residual, expected, rtol=1e-8)


def slow_leave_one_out(X, d):
    """Log density of each row without its kernel, but for a constant, on axes and a covariance of all rows."""
    _, axes, singular_values = slow_axes(X, d)
    n = len(X)
    return lambda table: np.array(
        [
            np.logaddexp.reduce(
                -(((np.delete(table, i, 0) - row) @ axes / singular_values * math.sqrt(n - 1)) ** 2).sum(1)
                / (2 * n ** (-2 / (d + 4)))
            )
            for i, row in enumerate(table)
        ]
    )


@pytest.mark.parametrize("contamination", [0.04, 0.25])
def test_trimming_ranks_rows_without_their_kernel_first_on_all_axes_then_on_those_of_the_rows_kept(contamination):
    X = rows(60, 8)
    X[::7] += 3 * np.random.default_rng(1).normal(size=X[::7].shape)
    settings = SETTINGS._replace(contamination=contamination)
    features, _, density, is_kept = fitted_density(X, 4, settings)
    n_kept = 60 - n_removed(contamination, 60)
    first = np.sort(np.argsort(-slow_leave_one_out(X, 4)(X), kind="stable")[:n_kept])
    expected = np.sort(np.argsort(-slow_leave_one_out(X[first], 4)(X), kind="stable")[:n_kept])
    np.testing.assert_array_equal(np.flatnonzero(is_kept), expected)
    assert len(density.kernel_centers) == n_kept
    mean, _, singular_values = slow_axes(X[first], 4)
    np.testing.assert_allclose(density.singular_values / features.scale, singular_values, rtol=1e-10)
    np.testing.assert_allclose(density.centre / features.scale + features.mean, mean, atol=1e-12)


@pytest.mark.parametrize("width", [20, 60], ids=["in one thread", "in several"])
@pytest.mark.parametrize("contamination", [0.0, 0.1])
def test_folds_side_by_side_are_exactly_those_one_after_the_other(width, contamination):
    X = rows(240, width)
    settings = SETTINGS._replace(contamination=contamination)
    number = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 4):
            torch.set_num_threads(n_threads)
            _, folds = folds_of(X)
            features, _, density, _ = fitted_density(X, 5, settings)
            spectrum = held_out_spectrum(folds, features.noise)
            results.append((*spectrum[:2], *cross_fitted(folds, density, features, settings)))
    finally:
        torch.set_num_threads(number)
    for alone, together in zip(*results, strict=True):
        assert torch.equal(alone, together)


@pytest.mark.parametrize("residual", [None, "gaussian", "box"])
@pytest.mark.parametrize("scaling", ["scale", "norm", None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_new", [1, 1000])
def test_the_fast_path_computes_the_formula(scaling, residual, dtype, n_new):
    X = torch.from_numpy(rows(60, 30)).to(dtype)
    new = torch.from_numpy(1.5 * rows(n_new, 30, seed=1)).to(dtype)
    settings = SETTINGS._replace(scaling=scaling, residual=residual)
    density = fit(X, 5, settings, torch.arange(60)).fitted
    expected = log_density_of(new, density.state())
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    for memory in (MEMORY, 8 * 30 * 90):  # one block, and blocks of 90 rows
        torch.testing.assert_close(density.log_density(new, memory).double(), expected, rtol=rtol, atol=rtol)


def test_a_density_has_the_axes_singular_values_and_white_kernel_centers_of_its_rows():
    X = rows(50, 7)
    features, _, density, _ = fitted_density(X, 7)
    np.testing.assert_allclose(np.cov(density.kernel_centers.T), np.eye(7), atol=1e-12)
    np.testing.assert_allclose(density.axes.T @ density.axes, np.eye(7), atol=1e-13)
    np.testing.assert_allclose(density.singular_values / features.scale, slow_axes(X, 7)[2], rtol=1e-12)


def test_the_fast_path_computes_the_formula_for_more_rows_than_a_chunk():
    density = fit(torch.from_numpy(rows(40, 6)), 2, SETTINGS._replace(residual="box"), torch.arange(40)).fitted
    new = torch.from_numpy(rows(2**14 + 5, 6, seed=1))
    expected = log_density_of(new, density.state())
    torch.testing.assert_close(density.log_density(new, MEMORY), expected, rtol=1e-10, atol=1e-10)
