"""What follows from scores alone, against plain formulas; one pass for all answers."""

import numpy as np
import pytest

from dfkde_sklearn import DFKDEDetector, ScatteringFeatures
from dfkde_sklearn._calibration import conformal_p_values, threshold_at_rate, threshold_between
from dfkde_sklearn._density.scoring import FeatureDensity


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
