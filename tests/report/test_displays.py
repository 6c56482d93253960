"""Displays hold the numbers that they draw, from a detector or from saved results."""

import sys

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from dfkde_sklearn import (
    AnomalyClassifier,
    AnomalyMapDisplay,
    DFKDEDetector,
    ExplanationDisplay,
    OperatingCurveDisplay,
    PatchDFKDEDetector,
    PValueDisplay,
    ScatteringFeatures,
    ScoreDisplay,
    TimmFeatures,
)
from dfkde_sklearn.datasets import make_textures

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


rng = np.random.default_rng(0)
GOOD = rng.normal(size=(150, 6))
X = np.concatenate([rng.normal(size=(40, 6)), rng.normal(size=(20, 6)) + 2])
Y = np.repeat([0, 1], [40, 20])
DETECTOR = DFKDEDetector(target_fpr=0.1).fit(GOOD)


@pytest.fixture(scope="module")
def of_images():
    data = make_textures(n_train=40, n_test=3, image_size=48, anomaly_fraction=0.5, random_state=0)
    detector = PatchDFKDEDetector(ScatteringFeatures(image_size=48, pooling=None)).fit(data.X_train)
    return detector, data


@pytest.mark.parametrize("labels", [None, Y, np.where(Y, "hole", "good")])
def test_the_histograms_hold_the_shares_of_all_scores(labels):
    display = ScoreDisplay.from_estimator(DETECTOR, X, labels)
    np.testing.assert_allclose(display.scores, DETECTOR.score_samples(X))
    assert display.line_.get_xdata() == [DETECTOR.offset_] * 2
    assert len(display.bars_) == (2 if labels is None else 3)
    assert sum(bar.get_height() for bar in display.bars_[0]) == pytest.approx(1)
    same = ScoreDisplay.from_predictions(
        DETECTOR.score_samples(X), calibration_scores=DETECTOR.calibration_scores_, threshold=DETECTOR.offset_, y=labels
    )
    np.testing.assert_array_equal(same.scores, display.scores)


def test_far_scores_do_not_squeeze_the_others():
    far = ScoreDisplay.from_estimator(DETECTOR, np.concatenate([X, X * 1e3]))
    low, high = far.ax_.get_xlim()
    assert high - low < 10 * np.ptp(DETECTOR.calibration_scores_)


def test_the_operating_curve_is_that_of_detectors_with_other_rates():
    display = OperatingCurveDisplay.from_estimator(DETECTOR, X, Y)
    assert [line.get_label() for line in display.lines_] == ["defects found", "false alarms kept"]
    for i in (10, 50, 99):
        other = DFKDEDetector(target_fpr=display.asked[i]).fit(GOOD)
        is_alarm = other.predict(X) == -1
        assert display.kept[i] == is_alarm[Y == 0].mean()
        assert display.found[i] == is_alarm[Y == 1].mean()
        assert display.called[i] == is_alarm.mean()
    unlabelled = OperatingCurveDisplay.from_estimator(DETECTOR, X)
    assert (unlabelled.kept, unlabelled.found) == (None, None)
    np.testing.assert_array_equal(unlabelled.lines_[0].get_ydata(), display.called)


def test_pipelines_and_classifiers_are_drawn_as_their_detectors():
    pipeline = make_pipeline(StandardScaler(), DFKDEDetector()).fit(GOOD)
    np.testing.assert_array_equal(ScoreDisplay.from_estimator(pipeline, X).scores, pipeline.score_samples(X))
    classifier = AnomalyClassifier(DFKDEDetector()).fit(np.concatenate([GOOD, X[Y == 1]]), [0] * 150 + [1] * 20)
    np.testing.assert_array_equal(
        ScoreDisplay.from_estimator(classifier, X).scores, classifier.detector_.score_samples(X)
    )
    explained = ExplanationDisplay.from_estimator(pipeline, X, row=-1).explanation
    np.testing.assert_allclose(explained.log_density, pipeline.score_samples(X))


def test_the_curve_of_p_values_is_their_distribution():
    display = PValueDisplay.from_estimator(DETECTOR, X[:40])
    np.testing.assert_array_equal(display.p_values, DETECTOR.p_values(X[:40]))
    assert (np.diff(display.line_.get_ydata()) >= 0).all()
    assert display.line_.get_ydata()[-1] == 1


def test_an_explanation_is_drawn_by_its_terms():
    explanation = DETECTOR.explain(X)
    display = ExplanationDisplay.from_explanation(explanation, row=50, n_terms=2)
    widths = [bar.get_width() for bar in display.bars_]
    lowest = np.sort(explanation.axis_terms[50])[:2]
    np.testing.assert_allclose(widths[:2], lowest)
    np.testing.assert_allclose(sum(widths), explanation.axis_terms[50].sum() + explanation.residual_term[50])


def test_axes_that_are_given_are_drawn_into():
    figure, ax = plt.subplots()
    for display in (
        ScoreDisplay.from_estimator(DETECTOR, X, ax=ax),
        OperatingCurveDisplay.from_estimator(DETECTOR, X, ax=ax),
        PValueDisplay.from_estimator(DETECTOR, X, ax=ax),
        ExplanationDisplay.from_estimator(DETECTOR, X, ax=ax),
    ):
        assert (display.ax_, display.figure_) == (ax, figure)


def test_maps_are_drawn_with_defects_and_the_most_similar_training_images(of_images):
    detector, data = of_images
    display = AnomalyMapDisplay.from_estimator(
        detector, data.X_test, masks=data.masks_test, training_images=data.X_train, n_neighbors=2
    )
    assert display.axes_.shape == (3, 5)
    assert [truth is not None for truth in display.truths] == (data.y_test == 1).tolist()
    again = AnomalyMapDisplay.from_estimator(detector, data.X_train[3:4], training_images=data.X_train, n_neighbors=1)
    np.testing.assert_array_equal(np.asarray(again.neighbors[0][0])[..., 0], data.X_train[3])
    saved = AnomalyMapDisplay.from_predictions(
        data.X_test, detector.anomaly_maps(data.X_test, resolution="grid"), detector=detector
    )
    assert saved.axes_.shape == (3, 2)
    np.testing.assert_array_equal(np.asarray(saved.overlays[0]), np.asarray(display.overlays[0]))


def test_maps_of_cropped_images_are_refused():
    data = make_textures(n_train=12, n_test=1, image_size=64, random_state=0)
    features = TimmFeatures(
        "test_resnet", pretrained=False, layers="layer2", pooling=None, crop="center", image_size=32, random_state=0
    )
    detector = PatchDFKDEDetector(features).fit(data.X_train)
    with pytest.raises(ValueError, match="crops images"):
        AnomalyMapDisplay.from_estimator(detector, data.X_test)


def test_bad_input_is_an_error(of_images):
    detector, data = of_images
    with pytest.raises(NotFittedError):
        ScoreDisplay.from_estimator(DFKDEDetector(), X)
    with pytest.raises(TypeError, match="OneClassSVM has no calibration scores"):
        ScoreDisplay.from_estimator(OneClassSVM().fit(GOOD), X)
    with pytest.raises(ValueError, match="60 images"):
        OperatingCurveDisplay.from_estimator(DETECTOR, X, Y[:5])
    with pytest.raises(ValueError, match="1 and -1"):
        OperatingCurveDisplay.from_estimator(DETECTOR, X, 1 - 2 * Y)
    with pytest.raises(ValueError, match="scores has NaN at 1 of 2"):
        ScoreDisplay.from_predictions([1.0, np.nan], calibration_scores=[1.0, 2.0], threshold=0.0)
    with pytest.raises(ValueError, match="P-values lie from 0 to 1"):
        PValueDisplay.from_predictions([0.5, 1.5])
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        PValueDisplay.from_predictions([])
    with pytest.raises(ValueError, match="row=60, and there are 60"):
        ExplanationDisplay.from_estimator(DETECTOR, X, row=60)
    with pytest.raises(TypeError, match="has no maps"):
        AnomalyMapDisplay.from_estimator(DETECTOR, X)
    with pytest.raises(TypeError, match="explains no rows"):
        ExplanationDisplay.from_estimator(detector, data.X_test)
    with pytest.raises(ValueError, match="masks has length 1"):
        AnomalyMapDisplay.from_estimator(detector, data.X_test, masks=[None])
    with pytest.raises(ValueError, match="a map for each image"):
        AnomalyMapDisplay.from_predictions(data.X_test, np.zeros((2, 3, 3)), detector=detector)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"dfkde-sklearn\[plot\]"):
        ScoreDisplay.from_estimator(DETECTOR, X)
