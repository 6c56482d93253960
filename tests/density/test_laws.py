"""Laws that hold for any training rows and settings, tried on random ones."""

import warnings

import numpy as np
import pytest

from dfkde_sklearn import DFKDEDetector

SHORT, LONG = range(6), range(6, 200)


def tried(seeds):
    return pytest.mark.parametrize("seed", seeds)


def random_case(seed):
    """Training rows, new rows and settings."""
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(12, 70)), int(rng.integers(3, 40))
    kind = ("full", "low rank", "constant columns", "offset", "heavy tails", "repeated")[seed % 6]
    rank = min(3, width) if kind == "low rank" else width
    mixing = rng.normal(size=(rank, width)) * np.logspace(0, -1, width)

    def drawn(m):
        factors = rng.standard_t(3, size=(m, rank)) if kind == "heavy tails" else rng.normal(size=(m, rank))
        X = factors @ mixing + 1.0
        if kind == "constant columns":
            X[:, ::3] = 0.7
        return X + 1000.0 if kind == "offset" else X

    X = drawn(n)
    if kind == "repeated":
        X[n // 2 :] = X[: n - n // 2]
    settings = {
        "n_components": [1, 2, 4, 16, 0.9, "auto"][rng.integers(6)],
        "scaling": ["scale", "scale", "norm", None][rng.integers(4)],
        "bandwidth": ["scott", "silverman", 0.5][rng.integers(3)],
        "residual": [None, "gaussian", "box"][rng.integers(3)],
    }
    return X, np.r_[drawn(12), 1.5 * drawn(4), X[:2]], settings, rng


def fitted(X, settings, **others):
    with warnings.catch_warnings():
        for message in (".*exact copies of rows", ".*cannot be scored by a fit without them", ".*are near-duplicates"):
            warnings.filterwarnings("ignore", message=message)
        return DFKDEDetector(**settings, **others).fit(X)


def assert_close(actual, expected, digits=8):
    np.testing.assert_allclose(
        actual, expected, rtol=10.0**-digits, atol=10.0**-digits * max(1, np.abs(expected).max())
    )


def moved_rows_have_the_same_scores(seed):
    X, new, settings, rng = random_case(seed)
    rotation = np.linalg.qr(rng.normal(size=(X.shape[1], X.shape[1])))[0]
    before, after = fitted(X, settings), fitted(X @ rotation + 5.0, settings)
    assert after.n_components_ == before.n_components_
    # Constant columns are constant but for rounding then, for which there is no other measure than its size.
    if settings["residual"] is None or np.linalg.matrix_rank(X - X.mean(0)) == X.shape[1]:
        assert_close(after.score_samples(new @ rotation + 5.0), before.score_samples(new), 6)


def scaled_rows_have_the_same_scores_but_for_a_constant(seed):
    X, new, settings, rng = random_case(seed)
    factor = 10.0 ** rng.uniform(-6, 6)
    before, after = (fitted(A, settings) for A in (X, X * factor))
    expected = before.score_samples(new)
    # The density of unscaled components, and of the residual, is one per unit of the features.
    difference = after.offset_ - before.offset_
    if settings["scaling"] and settings["residual"] is None:
        assert difference == pytest.approx(0, abs=1e-6)
    assert_close(after.score_samples(new * factor), expected + difference)


def order_of_rows_is_none_of_the_density(seed):
    X, new, settings, rng = random_case(seed)
    if settings["n_components"] == "auto":  # found by the folds
        settings["n_components"] = 3
    if settings["residual"] is not None:  # learnt from the folds
        settings["residual"] = None
    order = rng.permutation(len(X))
    before, after = fitted(X, settings), fitted(X[order], settings)
    if before.n_components_ == after.n_components_:
        assert_close(after.score_samples(new), before.score_samples(new))


def order_of_rows_within_a_fold_changes_nothing(seed):
    X, new, settings, rng = random_case(seed)
    X += 1e-3 * rng.normal(size=X.shape)  # no copies, which folds follow
    n_folds = min(20, len(X))
    bounds = [round(i * len(X) / n_folds) for i in range(1, n_folds)]
    order = np.concatenate([rng.permutation(fold) for fold in np.split(np.arange(len(X)), bounds)])
    before, after = fitted(X, settings), fitted(X[order], settings)
    assert after.n_components_ == before.n_components_
    assert_close(after.score_samples(new), before.score_samples(new))
    assert_close(after.calibration_scores_, before.calibration_scores_[order])
    assert_close(after.offset_, before.offset_)


def copies_have_the_same_calibration_scores(seed):
    X, _, settings, rng = random_case(seed)
    again = rng.choice(len(X), len(X) // 2)
    detector = fitted(np.r_[X, X[again]], settings)
    assert_close(detector.calibration_scores_[len(X) :], detector.calibration_scores_[again])


def rows_one_by_one_have_the_scores_of_the_batch(seed):
    X, new, settings, _ = random_case(seed)
    new[::3] *= 1e3
    detector = fitted(X, settings)
    together = detector.score_samples(new)
    assert_close([detector.score_samples(row[None])[0] for row in new], together, 10)
    for same in (np.asfortranarray(new), np.repeat(new, 2, axis=1)[:, ::2], new[::-1]):
        order = slice(None, None, -1) if same.base is new else slice(None)
        assert_close(detector.score_samples(same), together[order], 10)


def float32_is_near_float64(seed):
    X, new, settings, _ = random_case(seed)
    X, new = X.astype(np.float32), new.astype(np.float32)
    if isinstance(settings["n_components"], str) or len(np.unique(X, axis=0)) < len(X) or X.mean() > 500:
        return  # the number of axes may differ by one; an offset takes digits off the features themselves
    settings["n_components"] = 2
    single, double = fitted(X, settings), fitted(X.astype(np.float64), settings)
    if np.linalg.matrix_rank(X - X.mean(0), tol=1e-3) == X.shape[1]:
        assert_close(single.score_samples(new), double.score_samples(new.astype(np.float64)), 4)
        assert_close(single.calibration_scores_, double.calibration_scores_, 4)


def answers_agree_with_one_another(seed):
    X, new, settings, _ = random_case(seed)
    new[::4] *= 1e6
    detector = fitted(X, settings)
    scores, decisions, p_values = (
        getattr(detector, m)(new) for m in ("score_samples", "decision_function", "p_values")
    )
    assert np.isfinite(scores).all()
    assert_close(decisions, scores - detector.offset_)
    np.testing.assert_array_equal(detector.predict(new), np.where(decisions < 0, -1, 1))
    np.testing.assert_array_equal(detector.predict_proba(new)[:, 0] > 0.5, decisions < 0)
    assert ((p_values > 0) & (p_values <= 1)).all()
    assert (np.diff(p_values[np.argsort(scores)]) >= 0).all()


def contamination_flags_its_share(seed):
    X, _, settings, rng = random_case(seed)
    X += 1e-3 * rng.normal(size=X.shape)  # equal rows are of one kind, whatever the share
    contamination = float(rng.uniform(0.02, 0.5))
    detector = fitted(X, settings, contamination=contamination)
    assert (detector.predict(X) == -1).sum() == round(contamination * len(X))
    in_columns = fitted(np.asfortranarray(X), settings, contamination=contamination)
    np.testing.assert_array_equal(in_columns.predict(X), detector.predict(X))


LAWS = pytest.mark.parametrize(
    "law",
    [
        moved_rows_have_the_same_scores,
        scaled_rows_have_the_same_scores_but_for_a_constant,
        order_of_rows_is_none_of_the_density,
        order_of_rows_within_a_fold_changes_nothing,
        copies_have_the_same_calibration_scores,
        rows_one_by_one_have_the_scores_of_the_batch,
        float32_is_near_float64,
        answers_agree_with_one_another,
        contamination_flags_its_share,
    ],
    ids=lambda law: law.__name__,
)


@LAWS
@tried(SHORT)
def test_laws_hold_on_random_rows(law, seed):
    law(seed)


@pytest.mark.long
@LAWS
@tried(LONG)
def test_laws_hold_on_many_random_rows(law, seed):
    law(seed)
