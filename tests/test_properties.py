"""Laws of the density and of what follows from scores, on rows and scores that hypothesis makes up.

Those of `density/test_laws.py` are tried on random rows; hypothesis looks for rows on which a law fails: equal,
constant and extreme ones, and ties. The same examples each time; ``--long`` tries more of them.
"""

import warnings

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector
from dfkde_sklearn._calibration import conformal_p_values

SETTINGS = st.fixed_dictionaries(
    {
        "n_components": st.sampled_from([1, 2, 3, 0.9]),
        "scaling": st.sampled_from(["scale", "norm", None]),
        "bandwidth": st.sampled_from(["scott", "silverman", "loo", 0.5]),
        "residual": st.sampled_from([None, "gaussian", "box"]),
    }
)
NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False) | st.integers(-3, 3).map(float)


@st.composite
def clouds(draw):
    """Training and new rows whose principal axes are no matter of rounding, and settings."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, width = draw(st.integers(12, 40)), draw(st.integers(3, 9))
    # Variances that differ by a factor at least: the axes of equal ones are any.
    deviations = np.cumprod([draw(st.floats(0.3, 0.7)) for _ in range(width)])
    mixing = np.linalg.qr(rng.normal(size=(width, width)))[0] * deviations[:, None]
    X = rng.normal(size=(n, width)) @ mixing + draw(st.floats(-2, 2))
    far = draw(st.sampled_from([1.0, 10.0, 1e3]))
    return X, far * rng.normal(size=(7, width)) @ mixing, draw(SETTINGS), rng


@st.composite
def any_rows(draw):
    """A detector of rows of any numbers, some of them equal, and new ones."""
    width = draw(st.integers(2, 5))
    X = draw(arrays(np.float64, (draw(st.integers(6, 16)), width), elements=NUMBERS))
    new = draw(arrays(np.float64, (draw(st.integers(1, 9)), width), elements=NUMBERS))
    settings = draw(SETTINGS)
    kind = draw(st.sampled_from([DFKDEDetector, PatchDFKDEDetector]))
    try:
        detector = fitted(X, settings) if kind is DFKDEDetector else fitted_positions(X)
    except ValueError as error:
        # The one reason to refuse rows of finite numbers.
        if "do not differ" not in str(error):
            raise
        assume(False)
    return detector, np.r_[new, new[:2], X[:1]]


def fitted(X, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies, and of components that the rows do not span
        return DFKDEDetector(features=None, **settings).fit(X)


def fitted_positions(X):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PatchDFKDEDetector(features=None).fit(X)


@given(clouds())
def test_the_order_of_the_training_rows_changes_no_density(case):
    X, new, settings, rng = case
    # These are measured on folds, which follow the order.
    settings |= {"residual": None, "bandwidth": "scott"}
    before, after = fitted(X, settings), fitted(X[rng.permutation(len(X))], settings)
    np.testing.assert_allclose(after.score_samples(new), before.score_samples(new), rtol=1e-6, atol=1e-6)


@given(clouds(), st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_shifted_and_scaled_rows_have_the_same_decisions_and_p_values(case, scale, shift):
    X, new, settings, _ = case
    before, after = fitted(X, settings), fitted(scale * X + shift, settings)
    np.testing.assert_allclose(
        after.decision_function(scale * new + shift), before.decision_function(new), rtol=1e-5, atol=1e-5
    )


@given(clouds())
def test_rotated_rows_have_the_same_scores(case):
    X, new, settings, rng = case
    rotation = np.linalg.qr(rng.normal(size=(X.shape[1],) * 2))[0]
    before, after = fitted(X, settings), fitted(X @ rotation, settings)
    np.testing.assert_allclose(after.score_samples(new @ rotation), before.score_samples(new), rtol=1e-5, atol=1e-5)


@given(any_rows())
def test_equal_rows_have_equal_scores_and_blocks_those_of_the_whole(case):
    detector, new = case
    scores = detector.score_samples(new)
    assert np.isfinite(scores).all()
    equal = (new[:, None] == new[None]).all(axis=2)
    tolerance = 1e-9 * np.abs(scores).max()
    assert (np.abs(scores[:, None] - scores[None])[equal] <= tolerance).all()
    for size in (1, 2):
        blocks = [detector.score_samples(new[i : i + size]) for i in range(0, len(new), size)]
        np.testing.assert_allclose(np.concatenate(blocks), scores, rtol=1e-9, atol=1e-9)


@given(any_rows())
def test_all_answers_are_those_of_their_methods_and_agree(case):
    detector, new = case
    log_density, p_value, p_anomalous, label = detector.assess(new)
    np.testing.assert_array_equal(log_density, detector.score_samples(new))
    np.testing.assert_array_equal(p_value, detector.p_values(new))
    np.testing.assert_array_equal(p_anomalous, detector.predict_proba(new)[:, 0])
    np.testing.assert_array_equal(label, detector.predict(new))
    decisions = detector.decision_function(new)
    np.testing.assert_array_equal(label, np.where(decisions >= 0, 1, -1))
    np.testing.assert_array_equal(p_anomalous > 0.5, decisions < 0)
    assert ((p_anomalous >= 0) & (p_anomalous <= 1)).all()


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.lists(NUMBERS, min_size=1, max_size=30))
def test_p_values_count_the_calibration_scores_up_to_the_score(calibration, scores):
    scores = np.array(scores)
    p_values = conformal_p_values(scores, np.array(calibration), np.arange(len(calibration)))
    expected = [(1 + sum(of <= score for of in calibration)) / (1 + len(calibration)) for score in scores]
    np.testing.assert_allclose(p_values, expected, rtol=1e-12)
    assert ((p_values > 0) & (p_values <= 1)).all()
    order = np.argsort(scores)
    assert (np.diff(p_values[order]) >= 0).all()
