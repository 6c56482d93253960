"""What follows from scores alone, against plain formulas; one pass for all answers."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import beta, betabinom, false_discovery_control
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures
from dfkde_sklearn._calibration import (
    conditional_p_values,
    conformal_p_values,
    lowest_of_groups,
    rank_with_confidence,
    threshold_at_rate,
    threshold_between,
    threshold_with_confidence,
)
from dfkde_sklearn._density.scoring import FeatureDensity

DETECTORS = [DFKDEDetector.original, PatchDFKDEDetector]


def rows(n, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


class CountingFeatures(ScatteringFeatures):
    """Count the images that go through the extractor."""

    n_images = 0

    def transform(self, X):
        CountingFeatures.n_images += len(X)
        return super().transform(X)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("contamination", ["auto", 0.1])
def test_assess_returns_what_the_single_methods_return(dtype, contamination):
    detector = DFKDEDetector.original(n_components=3, contamination=contamination).fit(rows(100).astype(dtype))
    new = np.vstack([rows(30, seed=1), rows(5, seed=2) + 9]).astype(dtype)
    assessment = detector.assess(new)
    np.testing.assert_array_equal(assessment.log_density, detector.score_samples(new))
    np.testing.assert_array_equal(assessment.p_value, detector.p_values(new))
    np.testing.assert_array_equal(assessment.p_anomalous, detector.predict_proba(new)[:, 0])
    np.testing.assert_array_equal(assessment.label, detector.predict(new))
    np.testing.assert_array_equal(assessment.label, np.where(detector.decision_function(new) < 0, -1, 1))
    assert assessment.log_density.dtype == assessment.p_anomalous.dtype == dtype
    assert set(assessment.label[-5:]) == {-1}


def test_assess_sends_images_through_the_extractor_once_and_evaluates_the_density_once(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (14, 32, 32), np.uint8)
    features = CountingFeatures(scales=2, orientations=4, image_size=32)
    detector = DFKDEDetector.original(features, n_components=3).fit(images[:10])
    CountingFeatures.n_images, evaluated = 0, []
    log_density = FeatureDensity.log_density

    def counted(self, X, *args, **kwargs):
        evaluated.append(len(X))
        return log_density(self, X, *args, **kwargs)

    monkeypatch.setattr(FeatureDensity, "log_density", counted)
    detector.assess(images[10:])
    assert CountingFeatures.n_images == 4
    assert evaluated == [4]


def test_p_values_count_the_calibration_scores_at_or_below():
    rng = np.random.default_rng(0)
    calibration_scores, scores = rng.integers(0, 9, 40).astype(float), rng.integers(-1, 10, 25).astype(float)
    expected = [(1 + sum(c <= score for c in calibration_scores)) / 41 for score in scores]
    np.testing.assert_array_equal(conformal_p_values(scores, calibration_scores), expected)


def test_p_values_of_exchangeable_scores_are_uniform():
    rng = np.random.default_rng(0)
    p = np.concatenate([conformal_p_values(rng.normal(size=1), rng.normal(size=99)) for _ in range(4000)])
    for rate in (0.05, 0.1, 0.5):
        assert abs((p <= rate).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / 4000)


@pytest.mark.parametrize("n_anomalous", [0, 1, 7, 19])
@pytest.mark.parametrize("preferred", [-100.0, 0.0, 100.0])
def test_a_threshold_between_has_exactly_the_anomalous_scores_below(n_anomalous, preferred):
    scores = np.random.default_rng(0).normal(size=20)
    threshold = threshold_between(scores, n_anomalous, preferred)
    assert (scores < threshold).sum() == n_anomalous


def test_tied_scores_at_the_threshold_are_all_normal():
    scores = np.repeat([0.0, 1.0], 10)
    assert (scores < threshold_between(scores, 5, 0.5)).sum() == 0


def test_the_threshold_at_a_rate_is_the_median_unbiased_quantile():
    # Hyndman and Fan's definition 8, by its formula.
    scores = np.sort(np.random.default_rng(0).normal(size=30))
    position = 30 * 0.05 + (0.05 + 1) / 3
    low = int(position)
    expected = scores[low - 1] + (position - low) * (scores[low] - scores[low - 1])
    assert threshold_at_rate(scores[::-1].copy(), 0.05) == pytest.approx(expected, rel=1e-12)


# ---- with confidence


@pytest.mark.parametrize(("n", "rank"), [(45, 1), (60, 1), (100, 2), (209, 7), (391, 14), (1000, 41)])
def test_the_rank_for_five_per_cent_at_ninety_is_that_of_the_beta_law(n, rank):
    assert rank_with_confidence(n, 0.05, 0.9) == rank


@pytest.mark.parametrize("n", [1, 2, 7, 60, 391])
@pytest.mark.parametrize("rate", [0.003, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("confidence", [0.01, 0.5, 0.9, 0.999])
def test_the_rank_is_the_largest_whose_rate_is_kept_with_the_confidence(n, rate, confidence):
    kept = [r for r in range(1, n + 1) if beta(r, n + 1 - r).cdf(rate) >= confidence]
    if kept:
        assert rank_with_confidence(n, rate, confidence) == max(kept)
    else:
        with pytest.raises(ValueError, match=f"there are {n}"):
            rank_with_confidence(n, rate, confidence)


def test_nine_of_ten_thresholds_keep_the_rate_and_of_the_average_ones_about_half():
    rng = np.random.default_rng(0)
    for n, rank in ((60, 1), (209, 7)):
        # Of uniform scores, the rate of a threshold is the threshold.
        calibrations = rng.uniform(size=(4000, n))
        kept = np.mean([threshold_with_confidence(scores, 0.05, 0.9) <= 0.05 for scores in calibrations])
        expected = beta(rank, n + 1 - rank).cdf(0.05)
        assert abs(kept - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)
        assert expected >= 0.9
        assert 0.4 < np.mean([threshold_at_rate(scores, 0.05) <= 0.05 for scores in calibrations]) < 0.6


@pytest.mark.parametrize("n_values", [1, 2, 10, 50])
def test_ties_keep_the_rate_at_least_as_often(n_values):
    rng = np.random.default_rng(0)
    # Of n_values equally probable scores, the rate of a threshold is the share of them below.
    rates = [threshold_with_confidence(rng.integers(n_values, size=100), 0.05, 0.9) / n_values for _ in range(2000)]
    assert np.mean(np.array(rates) <= 0.05) >= 0.9


def test_with_the_lowest_score_as_threshold_a_score_that_equals_it_is_normal():
    scores = np.random.default_rng(0).normal(size=60)
    assert threshold_with_confidence(scores, 0.05, 0.9) == scores.min()
    assert threshold_with_confidence(np.full(60, 3.0), 0.05, 0.9) == 3.0


@pytest.mark.parametrize("make", DETECTORS)
def test_of_the_training_rows_those_below_the_rank_are_anomalous(make):
    detector = make(confidence=0.9)
    labels = detector.fit_predict(rows(209))
    assert np.count_nonzero(labels == -1) == 6
    assert detector.offset_ == np.sort(detector.calibration_scores_)[6]
    # In float32 the threshold is one of the scores still.
    assert np.count_nonzero(make(confidence=0.9).fit_predict(rows(209).astype(np.float32)) == -1) == 6


def test_thresholds_fall_with_confidence_and_rise_with_the_rate():
    scores = np.random.default_rng(0).normal(size=400)
    of_confidence = [threshold_with_confidence(scores, 0.05, confidence) for confidence in (0.1, 0.5, 0.9, 0.99)]
    of_rate = [threshold_with_confidence(scores, rate, 0.9) for rate in (0.01, 0.05, 0.1, 0.5)]
    assert all(later < earlier for earlier, later in pairwise(of_confidence))
    assert all(later > earlier for earlier, later in pairwise(of_rate))


@pytest.mark.parametrize("make", DETECTORS)
def test_too_few_rows_for_a_promise_are_an_error_that_says_what_can_be_promised(make):
    detector = make(confidence=0.9)
    with pytest.raises(
        ValueError, match=r"confidence=0\.9 of target_fpr=0\.05 needs at least 45 .* there are 30"
    ) as caught:
        detector.fit(rows(30))
    assert not hasattr(detector, "offset_")
    with pytest.raises(ValueError, match="at least 230 "):
        clone(detector).set_params(target_fpr=0.01).fit(rows(30))
    can = re.search(
        r"target_fpr=(\S+) with confidence=0\.9, or target_fpr=0\.05 with confidence=(\S+);", str(caught.value)
    )
    for parameters in ({"target_fpr": float(can[1])}, {"confidence": float(can[2])}):
        detector = clone(detector).set_params(**{"confidence": 0.9} | parameters).fit(rows(30))
        assert detector.offset_ == detector.calibration_scores_.min()
    # And hardly less.
    with pytest.raises(ValueError, match="needs at least"):
        rank_with_confidence(30, float(can[1]) - 0.001, 0.9)
    with pytest.raises(ValueError, match="needs at least"):
        rank_with_confidence(30, 0.05, float(can[2]) + 0.01)


@pytest.mark.parametrize("make", DETECTORS)
@pytest.mark.parametrize("other", [{"contamination": 0.1}, {"threshold_offset": 12.0}])
def test_confidence_beside_another_threshold_is_an_error(make, other):
    with pytest.raises(ValueError, match=rf"confidence=0\.9 .* {next(iter(other))}=.* sets the threshold"):
        make(confidence=0.9, **other).fit(rows(60))


@pytest.mark.parametrize("make", DETECTORS)
@pytest.mark.parametrize("bad", [0, 1, 1.5, -0.1, "high", True])
def test_a_confidence_that_is_no_probability_is_an_error(make, bad):
    with pytest.raises(ValueError, match="The 'confidence' parameter"):
        make(confidence=bad).fit(rows(60))


# ---- conditional p-values


def test_conditional_p_values_hold_all_at_once_with_exactly_their_confidence():
    rng = np.random.default_rng(0)
    for n in (1, 2, 25, 200):
        # Scores are uniform: of new ones, the share i-th lowest calibration score has a p-value of at most bounds[i].
        bounds = conditional_p_values(np.arange(n), np.arange(n) + 0.5, 0.9)
        held = (np.sort(rng.uniform(size=(10000, n))) <= bounds).all(1).mean()
        assert abs(held - 0.9) < 4 * np.sqrt(0.09 / 10000)


def test_conditional_p_values_are_those_of_the_generalised_simes_constants():
    # Bates et al. (2023), section 3, by its formula: 1 - (delta * i ... (i - k + 1) / (n ... (n - k + 1))) ** (1 / k).
    n, k, delta = 20, 10, 0.05
    constants = [
        (delta * np.prod([(i - j) / (n - j) for j in range(k)])) ** (1 / k) if i >= k else 0.0 for i in range(n, -1, -1)
    ]
    p = conditional_p_values(np.arange(n + 1), np.arange(n) + 0.5, 1 - delta)
    np.testing.assert_allclose(p, 1 - np.array(constants), rtol=1e-12)


def test_conditional_p_values_rise_with_the_score_and_with_the_confidence():
    rng = np.random.default_rng(0)
    calibration_scores, scores = rng.normal(size=300), np.sort(rng.normal(size=50))
    marginal = conformal_p_values(scores, calibration_scores)
    low, high = (conditional_p_values(scores, calibration_scores, confidence) for confidence in (0.5, 0.99))
    for p in (marginal, low, high):
        assert (np.diff(p) >= 0).all()
        assert p.min() > 0
        assert p.max() <= 1
    assert (marginal <= low).all()
    assert (low <= high).all()


@pytest.mark.parametrize("make", DETECTORS)
def test_p_values_of_a_detector_take_a_confidence(make):
    detector = make().fit(rows(60))
    new = rows(20, seed=1)
    expected = conditional_p_values(detector.score_samples(new), detector.calibration_scores_, 0.9)
    np.testing.assert_array_equal(detector.p_values(new, confidence=0.9), expected)
    assert detector.p_values(rows(1) + 99, confidence=0.9)[0] == pytest.approx(1 - 0.1 ** (1 / 30))
    for bad in (0, 1, 2.0, np.nan, "high", [0.9]):
        with pytest.raises(ValueError, match="The 'confidence' parameter of p_values"):
            detector.p_values(new, confidence=bad)


def test_p_values_of_constant_scores_are_one():
    constant = np.full(30, 2.0)
    for p in (conformal_p_values(constant, constant), conditional_p_values(constant, constant, 0.9)):
        np.testing.assert_array_equal(p, 1.0)


# ---- groups


def test_p_values_by_group_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    calibration_scores, scores = rng.integers(0, 9, 40).astype(float), rng.integers(-1, 10, 25).astype(float)
    groups = rng.integers(0, 12, 40) * 7
    shares = [
        [np.mean(calibration_scores[groups == group] <= score) for group in np.unique(groups)] for score in scores
    ]
    expected = (1 + np.sum(shares, axis=1)) / (1 + len(np.unique(groups)))
    np.testing.assert_allclose(conformal_p_values(scores, calibration_scores, groups), expected, rtol=1e-12)


def test_groups_of_one_are_no_groups():
    rng = np.random.default_rng(0)
    calibration_scores, scores = rng.integers(0, 9, 40).astype(float), rng.integers(-1, 10, 25).astype(float)
    groups = rng.permutation(40)
    np.testing.assert_array_equal(
        conformal_p_values(scores, calibration_scores, groups), conformal_p_values(scores, calibration_scores)
    )
    np.testing.assert_array_equal(np.sort(lowest_of_groups(calibration_scores, groups)), np.sort(calibration_scores))


def hierarchical_scores(rng, n_groups):
    """Return scores and groups: groups differ more than the scores within one, and have 1 to 9 of these."""
    groups = np.repeat(np.arange(n_groups), rng.integers(1, 10, n_groups))
    return (rng.normal(size=n_groups)[groups] + 0.3 * rng.normal(size=len(groups))), groups


def test_p_values_of_one_score_of_a_new_group_are_uniform():
    rng = np.random.default_rng(0)
    p = []
    for _ in range(4000):
        scores, groups = hierarchical_scores(rng, 40)
        # The first score of the last group is new.
        is_known = groups < 39
        new = scores[groups == 39][:1]
        p.append(conformal_p_values(new, scores[is_known], groups[is_known])[0])
    for rate in (0.05, 0.1, 0.5):
        # By at most one step of p below the rate.
        assert rate - 1 / 40 - 0.01 < np.mean(np.array(p) <= rate) < rate + 4 * np.sqrt(rate * (1 - rate) / 4000)


def test_with_confidence_at_most_the_rate_of_new_groups_has_a_score_below_the_threshold():
    rng = np.random.default_rng(0)
    n_groups, n_new, rank = 60, 400, rank_with_confidence(60, 0.1, 0.9)
    kept, kept_by_scores = [], []
    for _ in range(1000):
        scores, groups = hierarchical_scores(rng, n_groups + n_new)
        is_known = groups < n_groups
        new = lowest_of_groups(scores[~is_known], groups[~is_known])
        lowest = lowest_of_groups(scores[is_known], groups[is_known])
        kept.append(np.mean(new < threshold_with_confidence(lowest, 0.1, 0.9)) <= 0.1)
        kept_by_scores.append(np.mean(new < threshold_with_confidence(scores[is_known], 0.1, 0.9)) <= 0.1)
    expected = betabinom(n_new, rank, n_groups + 1 - rank).cdf(n_new // 10)
    assert abs(np.mean(kept) - expected) < 4 * np.sqrt(expected * (1 - expected) / 1000)
    # Not where the scores count, and not the groups.
    assert np.mean(kept_by_scores) < 0.6


# ---- recalibration


@pytest.mark.parametrize("make", DETECTORS)
@pytest.mark.parametrize("confidence", [None, 0.9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_recalibration_adds_the_scores_of_new_rows_and_moves_the_threshold_as_a_fit_sets_it(make, confidence, dtype):
    train, new = rows(60).astype(dtype), rows(45, seed=1).astype(dtype)
    detector = make(confidence=confidence).fit(train)
    before, density = detector.calibration_scores_, detector.kernel_centers_
    scores = detector.score_samples(new)
    assert detector.recalibrate(new) is detector
    np.testing.assert_array_equal(detector.calibration_scores_, np.concatenate([before, scores]))
    assert detector.calibration_scores_.dtype == dtype
    np.testing.assert_array_equal(detector.calibration_groups_, np.arange(105))
    of_all = detector.calibration_scores_
    expected = threshold_at_rate(of_all, 0.05) if confidence is None else threshold_with_confidence(of_all, 0.05, 0.9)
    assert detector.offset_ == pytest.approx(expected, rel=1e-12)
    assert detector.kernel_centers_ is density
    np.testing.assert_array_equal(detector.score_samples(new), scores)
    np.testing.assert_array_equal(detector.p_values(new), conformal_p_values(scores, of_all))
    assert len(clone(detector).fit(train).calibration_scores_) == 60


def test_recalibration_by_false_alarms_alone_never_raises_the_threshold():
    detector = DFKDEDetector.original(n_components=3).fit(rows(60))
    new = rows(400, seed=1)
    false_alarms = new[detector.predict(new) == -1]
    assert len(false_alarms) > 3
    before = detector.offset_
    detector.recalibrate(false_alarms)
    assert detector.offset_ < before
    assert (detector.predict(false_alarms) == 1).sum() > len(false_alarms) / 2


def test_recalibration_by_all_good_rows_keeps_the_rate_where_the_process_has_changed():
    detector = DFKDEDetector.original(n_components=3).fit(rows(200))
    moved = rows(3000, seed=1) * 1.2
    assert np.mean(detector.predict(moved) == -1) > 0.09
    rate = np.mean(detector.recalibrate(moved[:1000]).predict(moved[1000:]) == -1)
    assert 0.02 < rate < 0.07


def test_recalibration_sends_images_through_the_extractor_once():
    images = np.random.default_rng(0).integers(0, 256, (14, 32, 32), np.uint8)
    features = CountingFeatures(scales=2, orientations=4, image_size=32)
    detector = DFKDEDetector.original(features, n_components=3).fit(images[:10])
    CountingFeatures.n_images = 0
    detector.recalibrate(images[10:])
    assert CountingFeatures.n_images == 4


def test_groups_of_a_recalibration_are_new_ones():
    detector = DFKDEDetector.original(n_components=3).fit(rows(40), groups=np.arange(40) // 2)
    assert len(np.unique(detector.calibration_groups_)) == 20
    detector.recalibrate(rows(6, seed=1), groups=["a", "b", "a", "c", "c", "a"])
    _, counts = np.unique(detector.calibration_groups_, return_counts=True)
    np.testing.assert_array_equal(counts, [2] * 20 + [3, 1, 2])


@pytest.mark.parametrize("make", DETECTORS)
def test_a_recalibration_that_cannot_be_leaves_the_detector_as_it_was(make):
    detector = make().fit(rows(60))
    scores, offset = detector.calibration_scores_.copy(), detector.offset_
    bad = rows(3)
    bad[0, 0] = np.nan
    for X, groups, message in (
        (bad, None, "NaN"),
        (rows(3, d=5), None, "features"),
        (rows(0), None, "0 sample"),
        (rows(3), [1, 2], "groups has 2 labels, and X has 3"),
        (rows(3), [1, 2, None], "missing"),
    ):
        with pytest.raises(ValueError, match=message):
            detector.recalibrate(X, groups=groups)
    with pytest.raises(ValueError, match=r"at least 230 .* there are 63"):
        detector.set_params(confidence=0.9, target_fpr=0.01).recalibrate(rows(3, seed=1))
    np.testing.assert_array_equal(detector.calibration_scores_, scores)
    assert detector.offset_ == offset
    with pytest.raises(NotFittedError):
        make().recalibrate(rows(3))
    for other in ({"contamination": 0.1}, {"threshold_offset": 12.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(other))}=.* sets the threshold"):
            make(**other).fit(rows(60)).recalibrate(rows(3))


# ---- a batch of parts


def calibrated(scores, groups=None):
    """Return a detector with these calibration scores."""
    detector = DFKDEDetector.original(n_components=2).fit(rows(40))
    detector.calibration_scores_ = np.asarray(scores)
    detector.calibration_groups_ = np.arange(len(scores)) if groups is None else np.asarray(groups)
    return detector


@pytest.mark.parametrize("make", DETECTORS)
@pytest.mark.parametrize("fdr", [0.05, 0.2, 0.5])
def test_a_selection_is_that_of_benjamini_and_hochberg(make, fdr):
    detector = make().fit(rows(200))
    batch = np.vstack([rows(60, seed=1), rows(15, seed=2) * 3])
    p_values = detector.p_values(batch)
    in_order = np.sort(p_values)
    passing = [k for k in range(1, 76) if in_order[k - 1] <= fdr * k / 75]
    limit = in_order[max(passing) - 1] if passing else -1.0
    selected = detector.select(batch, fdr=fdr)
    assert selected.dtype == bool
    np.testing.assert_array_equal(selected, p_values <= limit)
    assert selected.any()


def test_of_those_selected_the_share_that_is_asked_for_is_normal():
    rng, detector = np.random.default_rng(0), calibrated(np.zeros(400))
    shares, found = [], []
    for _ in range(2000):
        scores = np.concatenate([rng.normal(size=80), rng.normal(size=20) - 3])
        detector.calibration_scores_ = rng.normal(size=400)
        selected = detector._selected(scores, 0.2)
        shares.append(selected[:80].sum() / max(1, selected.sum()))
        found.append(selected[80:].mean())
    # The procedure's own rate is fdr times the share of normal rows, here 0.16, less what ties of p-values cost.
    assert 0.13 < np.mean(shares) < 0.16 + 3 * np.std(shares) / 2000**0.5
    assert np.mean(found) > 0.7


def test_a_selection_by_groups_is_that_of_their_lowest_scores():
    rng = np.random.default_rng(0)
    detector = calibrated(rng.normal(size=300), np.arange(300) // 3)
    scores = rng.normal(size=60)
    scores[:9] -= [0, 0, 6, 0, 5, 0, 4, 0, 0]
    parts = np.array([f"part {i // 3}" for i in range(60)])
    selected = detector._selected(scores, 0.2, parts)
    lowest = np.sort(detector.calibration_scores_.reshape(100, 3).min(1))
    p_values = np.array([(1 + np.sum(lowest <= of_part)) / 101 for of_part in scores.reshape(20, 3).min(1)])
    np.testing.assert_array_equal(selected, np.repeat(false_discovery_control(p_values) <= 0.2, 3))
    np.testing.assert_array_equal(np.flatnonzero(selected), np.arange(9))


def test_a_selection_by_groups_of_one_is_that_of_rows():
    rng = np.random.default_rng(1)
    detector = calibrated(rng.normal(size=100))
    scores = rng.normal(size=30) - 4 * (np.arange(30) < 6)
    np.testing.assert_array_equal(detector._selected(scores, 0.2, np.arange(30)), detector._selected(scores, 0.2))


def test_a_batch_too_large_for_the_calibration_scores_is_a_warning_that_says_how_many_are_needed():
    detector = calibrated(np.linspace(0, 1, 99))
    scores = np.full(200, 0.5)
    scores[:3] = -1.0
    with pytest.warns(UserWarning, match=r"3 of 200 score lower than all 99 .* at least 20 of them .* \(1999 for one"):
        assert not detector._selected(scores, 0.1).any()
    scores[:20] = -1.0
    np.testing.assert_array_equal(detector._selected(scores, 0.1), np.arange(200) < 20)
    assert calibrated(np.linspace(0, 1, 1999))._selected(np.r_[-1.0, np.full(199, 0.5)], 0.1).sum() == 1


@pytest.mark.parametrize("fdr", [0.05, 0.1, 0.15, 0.3])
def test_as_many_calibration_scores_as_are_said_to_be_needed_are_enough(fdr):
    for n in range(1, 120):
        n_needed = math.ceil(n / fdr - 1e-9) - 1
        if n_needed < 1:
            continue
        detector = calibrated(np.linspace(0, 1, n_needed))
        assert detector._selected(np.r_[-1.0, np.full(n - 1, 0.5)], fdr)[0]
        if n_needed > 1 and 1 / n_needed <= fdr:
            detector = calibrated(np.linspace(0, 1, n_needed - 1))
            with pytest.warns(UserWarning, match=rf"\({n_needed} for one of {n}\)"):
                assert not detector._selected(np.r_[-1.0, np.full(n - 1, 0.5)], fdr).any()


def test_a_batch_of_one_or_of_constant_scores_is_selected_from():
    detector = calibrated(np.linspace(0, 1, 99))
    assert detector._selected(np.array([-1.0]), 0.01).tolist() == [True]
    assert detector._selected(np.array([0.5]), 0.3).tolist() == [False]
    assert not calibrated(np.zeros(99))._selected(np.zeros(50), 0.5).any()


@pytest.mark.parametrize("make", DETECTORS)
def test_selections_that_cannot_be_are_errors(make):
    with pytest.raises(NotFittedError):
        make().select(rows(3))
    detector = make().fit(rows(30))
    for fdr in (0, 1.0, 10, -0.1, np.nan, "high"):
        with pytest.raises(ValueError, match="'fdr' parameter of select must be"):
            detector.select(rows(3), fdr=fdr)
    with pytest.raises(ValueError, match=r"fdr=0\.01 with 30 .* smallest p-value is 0\.0323, .* at least 99"):
        detector.select(rows(3), fdr=0.01)
    with pytest.raises(ValueError, match="groups has 2 labels, and X has 3"):
        detector.select(rows(3), groups=["a", "b"])
    with pytest.raises(ValueError, match="NaN"):
        detector.select(np.full((2, 6), np.nan))
