"""DFKDEDetector: the density against scipy, the threshold against slow refits, and what a user may get wrong."""

import pickle
import subprocess
import sys
import warnings
from itertools import pairwise

import joblib
import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import gaussian_kde
from sklearn import config_context
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dfkde_sklearn import DFKDEDetector
from dfkde_sklearn._density.stream import sampled_places


def rows(n, width=20, seed=0, rank=None):
    rank = width if rank is None else rank
    mixing = np.random.default_rng(1).normal(size=(rank, width)) * np.logspace(0, -1, width)
    return np.random.default_rng(seed).normal(size=(n, rank)) @ mixing + 3.0


def scaled(detector, X):
    """The scaled principal components, from the public attributes."""
    Z = (X - detector.mean_) @ detector.components_.T
    if detector.scaling == "scale":
        return Z / detector.max_length_
    return Z / np.linalg.norm(Z, axis=1, keepdims=True) if detector.scaling == "norm" else Z


# ---- the density


@pytest.mark.parametrize("scaling", ["scale", "norm", None])
@pytest.mark.parametrize("bandwidth", ["scott", "silverman", 0.3])
@pytest.mark.parametrize(("n", "width", "n_components"), [(120, 20, 5), (40, 90, 8), (30, 1, 16), (60, 4, 0.9)])
def test_score_samples_is_scipys_log_density(scaling, bandwidth, n, width, n_components):
    X, new = rows(n, width), rows(25, width, seed=2)
    detector = DFKDEDetector.original(n_components=n_components, scaling=scaling, bandwidth=bandwidth).fit(X)
    reference = gaussian_kde(scaled(detector, X).T, bw_method=bandwidth)
    np.testing.assert_allclose(detector.score_samples(new), reference.logpdf(scaled(detector, new).T), rtol=1e-10)
    np.testing.assert_allclose(detector.score_samples(X), reference.logpdf(scaled(detector, X).T), rtol=1e-10)
    assert detector.bandwidth_ == pytest.approx(reference.factor)


def unseen(X, d):
    """Each row along and beyond the axes of the 19 other folds: squared distance from d axes, and (n, axes + 1) squares
    of which the last are beyond all axes."""
    folds = (
        np.array_split(np.arange(len(X)), 20) if len(X) % 20 == 0 else np.split(np.arange(len(X)), fold_bounds(len(X)))
    )
    found = []
    for fold in folds:
        others = np.delete(X, fold, 0)
        axes = np.linalg.svd(others - others.mean(0), full_matrices=False)[2][: min(len(others) - 1, X.shape[1])]
        centred = X[fold] - others.mean(0)
        coordinates = centred @ axes.T
        found.append((coordinates**2, (centred**2).sum(1)))
    n_axes = min(squares.shape[1] for squares, _ in found)
    squares = np.concatenate([np.c_[s[:, :n_axes], total - s[:, :n_axes].sum(1)] for s, total in found])
    return squares[:, d:].sum(1), squares


def fold_bounds(n):
    return [round(i * n / 20) for i in range(1, 20)]


@pytest.mark.parametrize("residual", ["gaussian", "box"])
@pytest.mark.parametrize(("n", "width"), [(80, 20), (25, 60), (53, 30)])
def test_the_residual_term_is_learnt_from_rows_that_a_fit_has_not_seen(residual, n, width):
    X, new = rows(n, width), rows(10, width, seed=2)
    plain = DFKDEDetector.original(n_components=4).fit(X)
    detector = DFKDEDetector(n_components=4, residual=residual).fit(X)
    distances, squares = unseen(X, 4)
    if residual == "gaussian":
        spread, degrees = distances.mean() / (width - 4), width - 4
    else:
        variances = squares[:, 4:-1].mean(0)
        n_beyond = width - squares.shape[1] + 1
        beyond = squares[:, -1].mean() if n_beyond else 0.0
        sum_of_squares = (variances**2).sum() + (beyond**2 / n_beyond if n_beyond else 0.0)
        spread = sum_of_squares / (variances.sum() + beyond)
        degrees = (variances.sum() + beyond) ** 2 / sum_of_squares

    def term(r):
        return -r / (2 * spread) - degrees / 2 * np.log(2 * np.pi * spread)

    r = ((new - X.mean(0)) ** 2).sum(1) - (((new - X.mean(0)) @ plain.components_.T) ** 2).sum(1)
    np.testing.assert_allclose(detector.score_samples(new), plain.score_samples(new) + term(r), rtol=1e-10)
    np.testing.assert_allclose(detector.calibration_scores_, plain.calibration_scores_ + term(distances), rtol=1e-10)


@pytest.mark.parametrize("residual", ["gaussian", "box"])
def test_one_row_from_elsewhere_does_not_carry_the_residual_away(residual):
    X, new = signal_and_noise(80, 4, 60), signal_and_noise(10, 4, 60, seed=2)
    expected = DFKDEDetector(n_components=4, residual=residual).fit(X).score(new)
    X[7] += 1e6
    detector = DFKDEDetector(n_components=5, residual=residual).fit(X)
    # It takes an axis for itself; for the others, and for what is left out, little changes.
    assert detector.score(new) > expected - 40


def test_score_is_the_mean_log_density_of_the_whole_space():
    X, new = rows(200, 6), rows(50, 6, seed=2)
    detector = DFKDEDetector.original(n_components=2).fit(X)
    Z, new_Z = ((A - X.mean(0)) @ detector.components_.T for A in (X, new))
    variance = unseen(X, 2)[0].mean() / 4
    r = ((new - X.mean(0)) ** 2).sum(1) - (new_Z**2).sum(1)
    gaussian = -r / (2 * variance) - 2 * np.log(2 * np.pi * variance)
    expected = (gaussian_kde(Z.T).logpdf(new_Z.T) + gaussian).mean()
    for settings in ({}, {"scaling": None}, {"residual": "box"}, {"residual": "gaussian"}):
        assert DFKDEDetector.original(n_components=2, **settings).fit(X).score(new) == pytest.approx(
            expected, rel=1e-10
        )


def signal_and_noise(n, n_signals, width, seed=0):
    rng = np.random.default_rng(seed)
    signals = np.linalg.qr(np.random.default_rng(99).normal(size=(width, n_signals)))[0] * np.linspace(9, 6, n_signals)
    return rng.normal(size=(n, n_signals)) @ signals.T + rng.normal(size=(n, width)) * 0.5


@pytest.mark.parametrize(("n", "n_signals", "width"), [(60, 3, 300), (60, 12, 300), (150, 30, 400)])
def test_auto_keeps_the_axes_that_hold_for_new_rows(n, n_signals, width):
    # Far fewer rows than features: axes after the signals follow the noise of the training rows.
    detector = DFKDEDetector.original(n_components="auto").fit(signal_and_noise(n, n_signals, width))
    assert detector.n_components_ == n_signals


@pytest.mark.parametrize("n", [900, 9000])
def test_auto_keeps_all_axes_of_many_rows(n):
    assert DFKDEDetector.original(n_components="auto").fit(rows(n, 12)).n_components_ == 12


def test_some_of_many_rows_tell_the_residual_of_all():
    X, new = rows(9000, 12), rows(200, 12, seed=2)
    plain, box = (DFKDEDetector(n_components=4, residual=residual).fit(X) for residual in (None, "box"))
    left_out = np.linalg.eigvalsh(np.cov(X.T))[:-4]
    spread = (left_out**2).sum() / left_out.sum()
    r = ((new - X.mean(0)) ** 2).sum(1) - (((new - X.mean(0)) @ plain.components_.T) ** 2).sum(1)
    terms = box.score_samples(new) - plain.score_samples(new)
    # With so many rows unseen ones are like the others: the slope is that of the eigenvalues.
    assert np.polyfit(r, terms, 1)[0] == pytest.approx(-1 / (2 * spread), rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"residual": "box", "contamination": 0.1}, {"scaling": "norm"}])
def test_auto_is_the_fit_of_the_number_that_it_finds(settings):
    X, new = signal_and_noise(60, 5, 100), signal_and_noise(9, 5, 100, seed=1)
    found = DFKDEDetector.original(n_components="auto", **settings).fit(X)
    fixed = DFKDEDetector.original(n_components=found.n_components_, **settings).fit(X)
    assert np.array_equal(found.score_samples(new), fixed.score_samples(new))
    # Axes without a fold come from the decomposition of all that "auto" counts them by, or from one of the first.
    np.testing.assert_allclose(found.calibration_scores_, fixed.calibration_scores_, rtol=1e-12)


def test_one_row_from_elsewhere_does_not_end_auto():
    X = signal_and_noise(60, 5, 100)
    X[30] += 1e5
    assert 5 <= DFKDEDetector.original(n_components="auto").fit(X).n_components_ <= 7


@pytest.mark.filterwarnings("ignore:.*training rows are exact copies")
@pytest.mark.parametrize("X", [np.r_[np.zeros((5, 3)), np.ones((1, 3))], np.eye(2)])
def test_auto_keeps_one_axis_where_no_row_is_like_another(X):
    with pytest.warns(UserWarning, match="cannot be scored"):
        assert DFKDEDetector.original(n_components="auto").fit(X).n_components_ == 1


def test_score_finds_the_number_of_dimensions_where_the_reduced_likelihood_takes_the_most():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 4)) @ rng.normal(size=(4, 15)) * 3 + rng.normal(size=(300, 15))
    grid = {"n_components": [1, 2, 4, 8, 12]}
    search = GridSearchCV(DFKDEDetector.original(), grid).fit(X)
    assert search.best_params_ == {"n_components": 4}
    reduced = GridSearchCV(DFKDEDetector.original(), grid, scoring=lambda d, X: d.score_samples(X).mean()).fit(X)
    assert reduced.best_params_ == {"n_components": 12}


@pytest.mark.parametrize("scaling", ["scale", "norm", None])
def test_attributes_describe_the_fit(scaling):
    X = rows(50, 12)
    detector = DFKDEDetector.original(n_components=5, scaling=scaling).fit(X)
    pca = PCA(5, svd_solver="full").fit(X)
    np.testing.assert_allclose(detector.mean_, pca.mean_, rtol=1e-12)
    np.testing.assert_allclose(detector.singular_values_, pca.singular_values_, rtol=1e-12)
    np.testing.assert_allclose(np.abs(detector.components_ @ pca.components_.T), np.eye(5), atol=1e-12)
    assert (detector.components_[range(5), np.abs(detector.components_).argmax(1)] > 0).all()
    assert detector.max_length_ == pytest.approx(np.linalg.norm(pca.transform(X), axis=1).max())
    np.testing.assert_allclose(np.cov(detector.kernel_centers_.T), np.eye(5), atol=1e-10)
    assert detector.n_components_ == 5
    assert detector.calibration_scores_.shape == (50,)
    assert detector.classes_.tolist() == [-1, 1]


@pytest.mark.parametrize("residual", [None, "box"])
@pytest.mark.parametrize("scaling", ["scale", "norm"])
def test_far_rows_have_finite_ordered_scores(scaling, residual):
    X = rows(60, 8)
    detector = DFKDEDetector(n_components=4, scaling=scaling, residual=residual).fit(X)
    distances = np.logspace(0, 6, 40)[:, None] * X.std()
    scores = detector.score_samples(X[:1] + distances * detector.components_.sum(0))
    assert np.isfinite(scores).all()
    if scaling == "scale":
        assert (np.diff(scores[5:]) < 0).all()


@pytest.mark.parametrize("residual", [None, "gaussian"])
@pytest.mark.parametrize("scaling", ["scale", "norm", None])
@pytest.mark.parametrize(("dtype", "farthest", "first_tie"), [(np.float32, 38, 18), (np.float64, 308, 150)])
def test_scores_stay_finite_and_in_order_to_the_largest_numbers_there_are(
    scaling, residual, dtype, farthest, first_tie
):
    X = rows(60, 8).astype(dtype)
    detector = DFKDEDetector(n_components=4, scaling=scaling, residual=residual, threshold_steepness=5.0).fit(X)
    far = (10.0 ** np.arange(farthest + 1))[:, None] * np.sign(detector.components_[0]).astype(dtype)
    scores = detector.score_samples(far.astype(dtype))
    assert scores.dtype == dtype
    assert np.isfinite(scores).all()
    if scaling != "norm" or residual:
        assert (np.diff(scores) <= 1e-12 * np.abs(scores[1:])).all()
        assert (np.diff(scores[:first_tie]) < 0).all()
        assert (detector.predict(far.astype(dtype)[3:]) == -1).all()
        assert (detector.predict_proba(far.astype(dtype)[3:])[:, 0] == 1).all()
    assert np.isfinite(detector.score(far.astype(dtype)))


@pytest.mark.parametrize("factor", [1e-300, 1e300])
def test_rows_farther_out_than_the_largest_number_in_units_of_the_training_rows_have_scores(factor):
    detector = DFKDEDetector(n_components=3, residual="box").fit(rows(60, 8) * factor)
    far = rows(5, 8, seed=2) * [[1e300], [-1e300], [1e200], [1e307], [1e10]]
    assert np.isfinite(detector.score_samples(far)).all()


@pytest.mark.parametrize("residual", ["box", "gaussian"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0, 100])
def test_a_residual_that_is_only_rounding_is_none(residual, dtype, offset):
    # Three of the columns are constant: the axes span all that the rows do, and leave out nothing but rounding.
    def constant_columns(n, seed, factor=1.0):
        return np.insert(rows(n, 3, seed=seed) * factor + offset, [0, 1, 3], [0.1, 7.3, 1 / 3], axis=1).astype(dtype)

    X, new = constant_columns(60, 0), np.r_[constant_columns(50, 2), constant_columns(50, 3, 1e4)]
    plain, detector = (DFKDEDetector.original(residual=setting).fit(X) for setting in (None, residual))
    together = detector.score_samples(new)
    rtol = 1e-12 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose([detector.score_samples(row[None])[0] for row in new], together, rtol=rtol)
    np.testing.assert_allclose(np.ptp(together - plain.score_samples(new)), 0, atol=rtol * abs(together).max())
    np.testing.assert_allclose(np.ptp(detector.calibration_scores_ - plain.calibration_scores_), 0, atol=1e4 * rtol)
    new[:, 0] += 0.01
    assert (detector.score_samples(new)[:50] < together[:50] - 1e4).all()


@pytest.mark.parametrize("residual", ["box", "gaussian"])
def test_a_residual_that_is_only_rounding_is_none_in_float32_after_a_fit_in_float64(residual):
    X, new = rows(60, 12, rank=5), rows(20, 12, seed=2, rank=5)
    detector = DFKDEDetector.original(residual=residual).fit(X)
    expected = detector.score_samples(new)
    np.testing.assert_allclose(detector.score_samples(new.astype(np.float32)), expected, rtol=1e-4)


@pytest.mark.parametrize("scaling", ["scale", "norm"])
def test_a_score_does_not_depend_on_the_other_rows(scaling):
    X, new = rows(300, 10), rows(200, 10, seed=2)
    new[::7] *= 1e4
    detector = DFKDEDetector(n_components=6, scaling=scaling, residual="box").fit(X)
    together = detector.score_samples(new)
    order = np.random.default_rng(0).permutation(200)
    np.testing.assert_allclose(detector.score_samples(new[order]), together[order], rtol=1e-12)
    np.testing.assert_allclose([detector.score_samples(row[None])[0] for row in new], together, rtol=1e-12)
    with config_context(working_memory=0.01):
        np.testing.assert_allclose(detector.score_samples(new), together, rtol=1e-12)


@pytest.mark.parametrize("contamination", ["auto", 0.1])
@pytest.mark.parametrize("n_components", [6, "auto"])
def test_a_fit_depends_on_neither_threads_nor_memory(n_components, contamination):
    X = rows(130, 80, rank=40) + 0.1 * rows(130, 80, seed=2)
    detectors = []
    number = torch.get_num_threads()
    try:
        for n_threads, working_memory in ((1, 1024), (3, 1024), (3, 0.7), (3, 0.01)):  # three folds at once, two, one
            torch.set_num_threads(n_threads)
            with config_context(working_memory=working_memory):
                detector = DFKDEDetector(n_components=n_components, contamination=contamination, residual="box")
                detectors.append(detector.fit(X))
    finally:
        torch.set_num_threads(number)
    for other in detectors[1:]:
        assert other.n_components_ == detectors[0].n_components_
        np.testing.assert_allclose(other.calibration_scores_, detectors[0].calibration_scores_, rtol=1e-10)
        np.testing.assert_allclose(other.score_samples(X), detectors[0].score_samples(X), rtol=1e-10)


def test_scores_follow_the_attributes_of_the_detector_and_change_none():
    X, new = rows(80, 6), rows(40, 6, seed=2)
    detector = DFKDEDetector.original(n_components=3).fit(X)
    before, pickled = detector.score_samples(new), pickle.dumps(detector)
    assert detector.score_samples(new.astype(np.float32)).dtype == np.float32
    np.testing.assert_array_equal(detector.score_samples(new), before)
    assert pickle.dumps(detector) == pickled
    detector.bandwidth_ *= 2
    reference = gaussian_kde(scaled(detector, X).T, bw_method=detector.bandwidth_)
    np.testing.assert_allclose(detector.score_samples(new), reference.logpdf(scaled(detector, new).T), rtol=1e-10)
    refitted = detector.fit(X + new.mean()).score_samples(new)
    np.testing.assert_array_equal(
        refitted, DFKDEDetector.original(n_components=3).fit(X + new.mean()).score_samples(new)
    )


def test_scaling_weights_no_ranking():
    X, new = rows(80, 10), rows(40, 10, seed=2)
    scores = DFKDEDetector.original(n_components=3).fit(X).score_samples(new)
    unscaled = DFKDEDetector.original(n_components=3, scaling=None).fit(X)
    shift = 3 * np.log(unscaled.max_length_)
    np.testing.assert_allclose(unscaled.score_samples(new) + shift, scores, rtol=1e-10)


def test_float32_stays_float32_and_agrees_with_float64():
    X, new = rows(200, 10).astype(np.float32), rows(50, 10, seed=2).astype(np.float32)
    single = DFKDEDetector(n_components=4, residual="box").fit(X)
    double = DFKDEDetector(n_components=4, residual="box").fit(X.astype(np.float64))
    assert (
        single.score_samples(new).dtype
        == single.calibration_scores_.dtype
        == single.kernel_centers_.dtype
        == np.float32
    )
    assert single.predict_proba(new).dtype == single.decision_function(new).dtype == np.float32
    np.testing.assert_allclose(single.score_samples(new), double.score_samples(new.astype(float)), atol=5e-5)


def test_loo_bandwidth_maximises_the_leave_one_out_likelihood():
    X = np.r_[rows(100, 3), rows(100, 3, seed=2) + 40]
    detector = DFKDEDetector.original(n_components=2, bandwidth="loo").fit(X)
    A = detector.kernel_centers_

    def likelihood(h):
        exponents = -((A[:, None] - A) ** 2).sum(2) / (2 * h * h)
        np.fill_diagonal(exponents, -np.inf)
        return (logsumexp(exponents, axis=1) - 2 * np.log(h)).mean()

    best = likelihood(detector.bandwidth_)
    assert all(likelihood(detector.bandwidth_ * factor) < best for factor in (0.9, 0.99, 1.01, 1.1))


# ---- the threshold


def test_loo_scores_come_from_fits_without_the_fold():
    X = rows(43, 15)
    detector = DFKDEDetector.original(n_components=4).fit(X)
    for start, stop in pairwise(round(i * 43 / 20) for i in range(21)):
        others = DFKDEDetector.original(n_components=4).fit(np.delete(X, np.s_[start:stop], 0))
        np.testing.assert_allclose(
            detector.calibration_scores_[start:stop], others.score_samples(X[start:stop]), rtol=1e-10
        )


@pytest.mark.parametrize("settings", [{"scaling": "norm"}, {"bandwidth": 0.4}, {"scaling": None}])
def test_loo_scores_of_a_few_rows_leave_out_one_row_each(settings):
    X = rows(12, 30)
    detector = DFKDEDetector.original(n_components=3, **settings).fit(X)
    expected = [
        DFKDEDetector.original(n_components=3, **settings).fit(np.delete(X, i, 0)).score_samples(X[[i]])[0]
        for i in range(12)
    ]
    np.testing.assert_allclose(detector.calibration_scores_, expected, rtol=1e-9)


def test_folds_of_wide_data_are_refitted_closely_on_its_first_axes():
    X = rows(600, 700)
    detector = DFKDEDetector.original(n_components=4).fit(X)
    others = DFKDEDetector.original(n_components=4).fit(X[30:])
    np.testing.assert_allclose(detector.calibration_scores_[:30], others.score_samples(X[:30]), rtol=2e-3)


@pytest.mark.parametrize("n", [40, 100, 400])
@pytest.mark.parametrize("settings", [{}, {"residual": "box"}, {"scaling": "norm"}, {"bandwidth": "loo"}])
@pytest.mark.parametrize("target", [0.05, 0.2])
def test_the_false_alarm_rate_holds_on_new_rows(n, settings, target):
    rates = [
        (
            DFKDEDetector.original(target_fpr=target, **settings)
            .fit(rows(n, 40, seed=s))
            .predict(rows(500, 40, seed=99 + s))
            < 0
        )
        for s in range(20 if n < 400 else 8)
    ]
    assert np.mean(rates) == pytest.approx(target, rel=0.3)


def test_in_sample_scores_would_break_the_promise():
    X, new = rows(100, 40), rows(500, 40, seed=2)
    detector = DFKDEDetector.original().fit(X)
    assert (detector.score_samples(new) < np.quantile(detector.score_samples(X), 0.05)).mean() > 0.5
    assert (detector.predict(new) < 0).mean() < 0.15


@pytest.mark.parametrize("contamination", [0.05, 0.1, 0.31, 0.5])
@pytest.mark.parametrize("settings", [{}, {"scaling": "norm"}, {"max_samples": 40}, {"residual": "box"}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_contamination_flags_exactly_its_share_of_training(contamination, settings, dtype):
    X = np.r_[rows(90, 12), rows(10, 12, seed=2) * 3].astype(dtype)
    detector = DFKDEDetector.original(contamination=contamination, random_state=0, **settings).fit(X)
    assert (detector.predict(X) < 0).sum() == round(contamination * 100)


def test_contamination_keeps_its_rate_on_new_normal_rows():
    rates = [
        (DFKDEDetector.original(contamination=0.1).fit(rows(150, 40, seed=s)).predict(rows(500, 40, seed=99 + s)) < 0)
        for s in range(12)
    ]
    assert np.mean(rates) == pytest.approx(0.1, abs=0.03)


def test_contamination_leaves_the_anomalies_out_of_the_fit():
    X = np.r_[rows(180, 10), (rows(20, 10, seed=2) - 3) * 30]
    detector = DFKDEDetector.original(n_components=3, contamination=0.1).fit(X)
    assert (detector.predict(X)[180:] == -1).all()
    assert len(detector.kernel_centers_) == 180
    clean = DFKDEDetector.original(n_components=3).fit(X[:180])
    np.testing.assert_allclose(detector.mean_, clean.mean_, rtol=1e-12)
    np.testing.assert_allclose(detector.score_samples(X), clean.score_samples(X), rtol=1e-8)


def test_fit_predict_finds_the_outliers_among_the_training_rows():
    X = rows(300, 40)
    far = np.random.default_rng(0).choice(300, 15, replace=False)
    X[far] += 40 * np.random.default_rng(1).normal(size=(15, 40))
    detector = DFKDEDetector.original()
    labels = detector.fit_predict(X)
    assert labels.dtype == np.int64
    assert (labels[far] == -1).all()
    assert (labels == -1).sum() <= 16
    np.testing.assert_array_equal(labels == -1, detector.calibration_scores_ < detector.offset_)
    # Each has a kernel of its own, by which it looks normal to the fit that it is part of.
    assert (detector.predict(X[far]) == 1).all()


@pytest.mark.parametrize("contamination", [0.05, 0.31])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fit_predict_flags_exactly_the_contamination(contamination, dtype):
    X = np.r_[rows(90, 12), rows(10, 12, seed=2) * 3].astype(dtype)
    detector = DFKDEDetector.original(contamination=contamination)
    labels = detector.fit_predict(X)
    assert (labels == -1).sum() == round(contamination * 100)
    np.testing.assert_array_equal(labels, detector.predict(X))


def test_fit_predict_follows_a_threshold_that_is_given():
    X = rows(60, 12)
    for contamination in ("auto", 0.1):
        detector = DFKDEDetector.original(n_components=4, threshold_offset=-1.0, contamination=contamination)
        np.testing.assert_array_equal(detector.fit_predict(X) == -1, detector.calibration_scores_ < -1.0)
    with pytest.raises(ValueError, match="The 'target_fpr' parameter"):
        DFKDEDetector.original(target_fpr=2.0).fit_predict(X)


@pytest.mark.parametrize("n_leaving", [1, 2])
@pytest.mark.parametrize("residual", [None, "box"])
def test_contamination_finds_the_one_far_row_of_a_few(n_leaving, residual):
    for seed in range(20):
        X = np.random.default_rng(seed).normal(size=(15, 80))
        X[seed % 15] *= 1000
        detector = DFKDEDetector.original(contamination=n_leaving / 15, residual=residual).fit(X)
        labels = detector.predict(X)
        assert labels[seed % 15] == -1
        assert (labels == -1).sum() == n_leaving
        in_columns = DFKDEDetector.original(contamination=n_leaving / 15, residual=residual).fit_predict(
            np.asfortranarray(X)
        )
        np.testing.assert_array_equal(in_columns, labels)


@pytest.mark.parametrize(
    ("n", "contamination", "expected"), [(15, 0.1, 12), (9, 0.5, 3), (60, 0.25, 42), (60, 0.5, 28)]
)
def test_components_are_as_many_as_the_rows_that_stay_in_each_fold_span(n, contamination, expected):
    detector = DFKDEDetector.original(n_components=64, contamination=contamination).fit(rows(n, 80))
    assert detector.n_components_ == expected


def test_threshold_offset_sets_the_offset():
    X = rows(50, 5)
    detector = DFKDEDetector.original(threshold_offset=-3.5).fit(X)
    assert detector.offset_ == -3.5
    np.testing.assert_allclose(detector.decision_function(X), detector.score_samples(X) + 3.5)


def test_probability_is_the_logistic_curve_and_agrees_with_predict():
    X, new = rows(60, 6), np.r_[rows(30, 6, seed=2), rows(30, 6, seed=3) * 20]
    detector = DFKDEDetector.original(n_components=3, threshold_steepness=0.2).fit(X)
    probabilities = detector.predict_proba(new)
    with np.errstate(over="ignore"):
        expected = 1 / (1 + np.exp(0.2 * (detector.score_samples(new) - detector.offset_)))
    np.testing.assert_allclose(probabilities[:, 0], expected, rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert np.array_equal(detector.classes_[probabilities.argmax(1)], detector.predict(new))


def test_p_values_count_training_scores():
    X, new = rows(40, 6), np.r_[rows(20, 6, seed=2), rows(2, 6, seed=3) * 50]
    detector = DFKDEDetector.original(n_components=3).fit(X)
    expected = [(1 + sum(loo <= s for loo in detector.calibration_scores_)) / 41 for s in detector.score_samples(new)]
    np.testing.assert_allclose(detector.p_values(new), expected)
    assert detector.p_values(new)[-1] == pytest.approx(1 / 41)


def test_max_samples_draws_with_the_random_state():
    X = rows(200, 8)
    detector = DFKDEDetector.original(n_components=3, max_samples=50, random_state=0).fit(X)
    again = DFKDEDetector.original(n_components=3, max_samples=50, random_state=0).fit(X)
    other = DFKDEDetector.original(n_components=3, max_samples=50, random_state=1).fit(X)
    assert len(detector.kernel_centers_) == 50
    assert np.array_equal(detector.kernel_centers_, again.kernel_centers_)
    assert not np.array_equal(detector.kernel_centers_, other.kernel_centers_)
    drawn = sampled_places(200, 50, np.random.RandomState(0).randint(2**31 - 1))
    others = np.setdiff1d(np.arange(200), drawn)
    np.testing.assert_allclose(detector.calibration_scores_[others], detector.score_samples(X[others]), rtol=1e-12)
    np.testing.assert_allclose(
        detector.calibration_scores_[drawn],
        DFKDEDetector.original(n_components=3).fit(X[drawn]).calibration_scores_,
        rtol=1e-10,
    )


def test_copies_among_rows_that_are_not_drawn_are_scored_as_the_drawn_ones():
    X = np.tile(rows(60, 8), (3, 1))
    with pytest.warns(UserWarning, match="exact copies"):
        detector = DFKDEDetector.original(n_components=3, max_samples=80, random_state=0).fit(X)
    drawn = sampled_places(180, 80, np.random.RandomState(0).randint(2**31 - 1))
    for i in range(60):
        scores = detector.calibration_scores_[i::60]
        if any(j in drawn for j in (i, i + 60, i + 120)):
            np.testing.assert_allclose(scores, scores[0], rtol=1e-10)
        else:
            np.testing.assert_allclose(scores, detector.score_samples(X[i::60]), rtol=1e-10)


# ---- copies


@pytest.mark.parametrize("settings", [{}, {"residual": "box"}, {"scaling": "norm"}, {"n_components": "auto"}])
def test_the_false_alarm_rate_holds_where_rows_are_stacked_twice(settings):
    rates = []
    for seed in range(10):
        with pytest.warns(UserWarning, match="100 of 200 training rows are exact copies of rows elsewhere in X"):
            detector = DFKDEDetector.original(**settings).fit(np.tile(rows(100, 40, seed=seed), (2, 1)))
        rates.append((detector.predict(rows(500, 40, seed=99 + seed)) < 0).mean())
    assert np.mean(rates) == pytest.approx(0.05, abs=0.02)


def test_copies_share_a_fold():
    X = rows(43, 15)
    copied = np.r_[X, X[[5, 40]], X[[5]]]
    with pytest.warns(UserWarning, match="3 of 46 training rows"):
        detector = DFKDEDetector.original(n_components=4).fit(copied)
    for start, stop in pairwise(round(i * 43 / 20) for i in range(21)):
        here = np.isin(np.r_[np.arange(43), 5, 40, 5], np.arange(start, stop))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*exact copies")
            others = DFKDEDetector.original(n_components=4).fit(copied[~here])
        np.testing.assert_allclose(detector.calibration_scores_[here], others.score_samples(copied[here]), rtol=1e-10)


def test_zero_of_either_sign_makes_a_copy():
    X = rows(40, 6)
    X[[0, 30]] = X[0]
    X[[0, 30], 2] = 0.0, -0.0
    with pytest.warns(UserWarning, match="1 of 40 training rows"):
        DFKDEDetector.original(n_components=3).fit(X)


def test_copies_that_are_adjacent_within_a_fold_need_no_warning():
    X = rows(40, 6)
    X[1] = X[0]
    DFKDEDetector.original(n_components=3).fit(X)


@pytest.mark.parametrize("contamination", ["auto", 0.1])
def test_components_are_counted_by_distinct_rows(contamination):
    X = np.tile(rows(40, 80), (2, 1))
    with pytest.warns(UserWarning, match="exact copies"):
        detector = DFKDEDetector.original(n_components=64, contamination=contamination).fit(X)
    # Of 40 rows, 38 are left without a fold, and with the contamination, 8 rows of 76 leave.
    assert detector.n_components_ == (37 if contamination == "auto" else 29)


# ---- degenerate data


def test_fewer_rows_than_components_give_the_density_of_what_the_rows_span():
    X = rows(9, 40)
    detector = DFKDEDetector.original().fit(X)
    # Nine folds of a row: the eight others span seven directions.
    assert detector.n_components_ == 7
    np.testing.assert_allclose(
        detector.score_samples(X), gaussian_kde(scaled(detector, X).T).logpdf(scaled(detector, X).T)
    )


@pytest.mark.parametrize("n", [20, 50])
def test_with_fewer_rows_than_components_false_alarms_stay_few(n):
    # With as many components as rows less one there would be no scores of unseen rows, and alarms for most new rows.
    detectors = [DFKDEDetector.original(n_components=64).fit(rows(n, 100, seed=seed)) for seed in range(10)]
    rates = [(detector.predict(rows(500, 100, seed=99 + i)) < 0).mean() for i, detector in enumerate(detectors)]
    assert np.mean(rates) < 0.08


def test_rank_deficient_features_keep_their_rank():
    X, new = rows(60, 12, rank=5), rows(20, 12, seed=2, rank=5)
    detector = DFKDEDetector.original().fit(X)
    assert detector.n_components_ == 5
    reference = gaussian_kde(scaled(detector, X).T).logpdf(scaled(detector, new).T)
    np.testing.assert_allclose(detector.score_samples(new), reference, rtol=1e-10)


@pytest.mark.parametrize("scaling", ["scale", "norm"])
@pytest.mark.parametrize("factor", [1e-300, 1e-150, 1e150, 1e300, 2.0**1020])
def test_the_scale_of_the_features_changes_nothing(scaling, factor):
    X, new = rows(60, 8), rows(20, 8, seed=2)
    detector = DFKDEDetector.original(n_components=4, scaling=scaling).fit(X)
    other = DFKDEDetector.original(n_components=4, scaling=scaling).fit(X * factor)
    np.testing.assert_allclose(other.score_samples(new * factor), detector.score_samples(new), rtol=1e-10)
    assert other.offset_ == pytest.approx(detector.offset_, rel=1e-10)


@pytest.mark.filterwarnings("ignore:.*training rows are exact copies")
@pytest.mark.parametrize("settings", [{}, {"bandwidth": "loo"}, {"scaling": "norm"}, {"residual": "box"}])
@pytest.mark.parametrize("kind", ["duplicates", "one feature", "two rows", "one differs"])
def test_odd_data_has_finite_scores(settings, kind):
    X = {
        "duplicates": np.repeat(rows(15, 4), 4, axis=0),
        "one feature": rows(30, 1),
        "two rows": rows(2, 5),
        "one differs": np.r_[np.zeros((9, 3)), np.ones((1, 3))],
    }[kind]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training rows cannot be scored by a fit without them")
        detector = DFKDEDetector.original(**settings).fit(X)
    assert np.isfinite(detector.score_samples(X)).all()
    assert np.isfinite(detector.offset_)
    assert np.isfinite(detector.score(X))


@pytest.mark.parametrize("X", [np.ones((10, 4)), np.full((8, 2), 0.1), np.zeros((3, 3))])
def test_equal_rows_are_refused(X):
    for detector in (DFKDEDetector.original(), DFKDEDetector(), DFKDEDetector(bandwidth="loo")):
        with pytest.raises(ValueError, match="training rows do not differ beyond rounding"):
            detector.fit(X)


# ---- bad input


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (np.empty((0, 3)), ValueError, "0 sample"),
        (np.ones((1, 3)), ValueError, "1 sample"),
        (np.array([[np.nan, 1.0], [1.0, 2.0]]), ValueError, "NaN"),
        (np.array([[np.inf, 1.0], [1.0, 2.0]]), ValueError, "infinity"),
        (np.ones((3, 3), dtype=complex), ValueError, "Complex data not supported"),
        (np.arange(4.0), ValueError, "Reshape your data"),
        (np.array([["a", "b"], ["c", "d"]]), ValueError, "could not convert string to float"),
        (None, ValueError, "Expected 2D array"),
    ],
)
def test_bad_matrices_are_refused(X, error, message):
    with pytest.raises(error, match=message):
        DFKDEDetector.original().fit(X)


def test_sparse_matrices_are_refused():
    import scipy.sparse

    with pytest.raises(TypeError, match="Sparse data was passed"):
        DFKDEDetector.original().fit(scipy.sparse.csr_array(rows(10, 3)))


@pytest.mark.parametrize("images", [np.zeros((4, 8, 8)), [np.zeros((8, 8))] * 3, ["a.png", "b.png"], "folder"])
def test_images_are_refused_where_a_feature_matrix_is_meant(images):
    with pytest.raises(ValueError, match=r"takes a feature matrix.*got images"):
        DFKDEDetector.original(features=None).fit(images)
    with pytest.raises(ValueError, match=r"was fitted on a feature matrix.*got images"):
        DFKDEDetector.original().fit(rows(20, 4)).score_samples(images)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_components": 0},
        {"n_components": 1.5},
        {"scaling": "standard"},
        {"bandwidth": -1.0},
        {"residual": "chi2"},
        {"max_samples": 1},
        {"contamination": 0.6},
        {"target_fpr": 0.0},
        {"threshold_steepness": 0},
        {"threshold_offset": "mean"},
        {"features": "resnet18"},
    ],
)
def test_parameters_out_of_range_are_named(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"The '{name}' parameter of DFKDEDetector must be"):
        DFKDEDetector.original(**settings).fit(rows(20, 4))


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_refused_with_the_ways_out(device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ValueError, match=f"device='{device}'.*Use device='cpu'"):
        DFKDEDetector.original(device=device).fit(rows(20, 4))


# ---- the company it keeps


class Columns(TransformerMixin, BaseEstimator):
    """A feature extractor: the means and spreads of images."""

    def fit(self, X, y=None):
        self.n_features_out_ = 2
        return self

    def transform(self, X):
        return np.column_stack([X.mean((1, 2)), X.std((1, 2))])


def test_a_feature_stage_is_cloned_fitted_and_used():
    images = np.random.default_rng(0).random((40, 8, 8))
    extractor = Columns()
    detector = DFKDEDetector.original(features=extractor).fit(images)
    assert not hasattr(extractor, "n_features_out_")
    assert detector.features_.n_features_out_ == detector.n_features_in_ == 2
    on_features = DFKDEDetector.original().fit(Columns().transform(images))
    np.testing.assert_allclose(detector.score_samples(images), on_features.score_samples(Columns().transform(images)))
    assert on_features.features_ is None


def test_it_composes_with_pipelines_and_cross_validation():
    X = rows(90, 8)
    pipeline = make_pipeline(StandardScaler(), DFKDEDetector.original(n_components=3))
    y = np.resize([-1, 1], 90)  # scikit-learn sizes the decisions by the labels it is given
    labels = cross_val_predict(pipeline, X, y, cv=3)
    assert set(labels) <= {-1, 1}
    decisions = cross_val_predict(pipeline, X, y, cv=3, method="decision_function")
    assert np.array_equal(np.where(decisions < 0, -1, 1), labels)
    assert clone(pipeline).fit(X).score(X) == pytest.approx(pipeline.fit(X).score(X))


class CountingColumns(Columns):
    n_rows = 0

    def transform(self, X):
        CountingColumns.n_rows += len(X)
        return super().transform(X)


@pytest.mark.parametrize("contamination", ["auto", 0.1])
def test_fit_predict_describes_each_image_once(contamination):
    images = np.random.default_rng(0).random((40, 8, 8))
    CountingColumns.n_rows = 0
    DFKDEDetector.original(CountingColumns(), contamination=contamination).fit_predict(images)
    assert CountingColumns.n_rows == 40


def test_a_pipeline_predicts_its_training_rows_as_the_detector_does():
    X = rows(90, 8)
    pipeline = make_pipeline(StandardScaler(), DFKDEDetector.original(n_components=3))
    expected = DFKDEDetector.original(n_components=3).fit_predict(StandardScaler().fit_transform(X))
    np.testing.assert_array_equal(pipeline.fit_predict(X), expected)


@pytest.mark.filterwarnings("ignore:.* exact copies")  # most rows of bool are
@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.uint8, np.int16, np.uint16, np.int64, bool, np.longdouble])
def test_numbers_of_other_types_are_scored_as_float64(dtype):
    X, new = (np.random.default_rng(seed).integers(0, 100, (n, 8)).astype(dtype) for seed, n in ((0, 80), (1, 20)))
    detector = DFKDEDetector(n_components=4, residual="box").fit(X)
    expected = DFKDEDetector(n_components=4, residual="box").fit(X.astype(np.float64))
    scores = detector.score_samples(new)
    assert scores.dtype == detector.calibration_scores_.dtype == np.float64
    np.testing.assert_array_equal(scores, expected.score_samples(new.astype(np.float64)))
    np.testing.assert_array_equal(detector.calibration_scores_, expected.calibration_scores_)
    assert detector.offset_ == expected.offset_


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "Input X contains NaN"), (np.inf, "Input X contains infinity")]
)
def test_what_is_not_finite_is_found_in_any_block(dtype, value, message):
    X = rows(40, 6).astype(dtype)
    detector = DFKDEDetector.original(n_components=3).fit(X)
    wrong = np.ones((400_000, 6), dtype)
    wrong[-1, 3] = value
    for method in (detector.score_samples, detector.predict, detector.fit):
        with pytest.raises(ValueError, match=message):
            method(wrong)


MEMORY_OF_SCORING = """
import resource
import sys

import numpy as np

from dfkde_sklearn import DFKDEDetector

rng = np.random.default_rng(0)
detector = DFKDEDetector(n_components=4).fit(rng.normal(size=(100, 256)))


def table(n):
    row = rng.normal(size=(1, 256)) * 10
    return np.broadcast_to(row.astype(sys.argv[1]), (n, 256))  # which takes the memory of one row


detector.score_samples(table(20_000))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
detector.score_samples(table(400_000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is counted in other units")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8"])
def test_the_memory_of_scoring_does_not_grow_with_the_rows(dtype):
    # A mask of all entries takes 98 MB, and all of them as float64 take 781.
    command = [sys.executable, "-c", MEMORY_OF_SCORING, dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 50_000  # kB, of which the scores themselves are up to 6400


def test_pickles_memory_maps_and_odd_layouts_score_the_same(tmp_path):
    X, new = rows(60, 8), rows(20, 8, seed=2)
    detector = DFKDEDetector.original(n_components=4).fit(X)
    expected = detector.score_samples(new)
    assert np.array_equal(pickle.loads(pickle.dumps(detector)).score_samples(new), expected)
    joblib.dump(detector, tmp_path / "detector.joblib")
    mapped = joblib.load(tmp_path / "detector.joblib", mmap_mode="r")
    assert not mapped.kernel_centers_.flags.writeable
    np.testing.assert_allclose(mapped.score_samples(new), expected, rtol=1e-12)
    frozen = new.copy()
    frozen.flags.writeable = False
    wide = np.zeros((40, 16))
    wide[::2, ::2] = new
    tensor = torch.tensor(new, requires_grad=True)
    records = np.zeros(20, dtype=[("features", float, (8,)), ("is_good", np.int8)])
    records["features"] = new
    for same in (
        frozen,
        records["features"],
        wide[::2, ::2],
        np.asfortranarray(new),
        new[::-1][::-1],
        new.tolist(),
        tensor,
        new.astype(">f8"),
    ):
        np.testing.assert_allclose(detector.score_samples(same), expected, rtol=1e-12)


def test_nothing_that_is_handed_in_is_written_to():
    X, new = rows(60, 8), rows(20, 8, seed=2)
    copies = X.copy(), new.copy()
    detector = DFKDEDetector.original(scaling="norm", contamination=0.1, residual="box").fit(X)
    first = detector.score_samples(new)
    assert np.array_equal(detector.score_samples(new), first)
    assert np.array_equal(X, copies[0])
    assert np.array_equal(new, copies[1])


def test_fit_leaves_the_global_random_state_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    DFKDEDetector.original(max_samples=30, random_state=0).fit(rows(60, 8))
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)
