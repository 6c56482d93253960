"""AnomalyClassifier: scikit-learn's metrics, displays and searches on an outlier detector, against sums by hand."""

import os
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import rankdata
from sklearn import config_context
from sklearn.base import BaseEstimator, OutlierMixin, clone, is_classifier, is_outlier_detector
from sklearn.calibration import CalibratedClassifierCV, CalibrationDisplay
from sklearn.covariance import EllipticEnvelope
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    DetCurveDisplay,
    PrecisionRecallDisplay,
    RocCurveDisplay,
    f1_score,
    get_scorer,
    make_scorer,
    roc_auc_score,
)
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    StratifiedGroupKFold,
    StratifiedKFold,
    TunedThresholdClassifierCV,
    cross_val_predict,
    cross_validate,
)
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.validation import has_fit_parameter

from dfkde_sklearn import AnomalyClassifier, DFKDEDetector, ScatteringFeatures

# What a scikit-learn check asks for and this classifier does not do, with the reason.
EXCEPTIONS = {
    "check_classifiers_classes": "labels 'one' and 'two' with anomaly_label=1: a label that is not there is an error",
    "check_dtype_object": "puts what is no number into an anomalous row, and these are not fitted",
}
WITH_WEIGHTS = {
    "check_classifiers_one_label_sample_weights": "the detector takes the weights, and needs no rows of a second class",
}
# The one check that runs only with an environment variable set before scipy is imported.
NEEDS_ARRAY_API = {"check_array_api_input"}

# Anomalous, normal: in the order of numbers, of words, and of truth, each way around.
LABELS = [(1, 0), (0, 1), (-1, 1), ("bad", "good"), ("ng", "io"), (True, False), (False, True)]
DETECTORS = [
    DFKDEDetector.original(),
    make_pipeline(StandardScaler(), DFKDEDetector.original(n_components=4)),
    IsolationForest(n_estimators=20, random_state=0),
    LocalOutlierFactor(novelty=True),
    OneClassSVM(),
    EllipticEnvelope(random_state=0),
]


def labelled_rows(n=90, n_anomalous=30, seed=0):
    """Return rows in random order, and which of them are anomalous."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n + n_anomalous, 5)) * [3, 2, 1, 0.3, 0.3]
    anomalous = rng.permutation(np.arange(n + n_anomalous) < n_anomalous)
    X[anomalous, 3] += 1.2
    return X, anomalous


class RowsSeen(OutlierMixin, BaseEstimator):
    """A detector that keeps what it was fitted to, and scores by the first column."""

    def fit(self, X, y=None):
        self.seen_, self.y_ = X, y
        return self

    def decision_function(self, X):
        return np.asarray(X)[:, 0]

    def predict(self, X):
        return np.where(self.decision_function(X) < 0, -1, 1)


# ---- scikit-learn's own checks


@pytest.mark.parametrize("detector", [DFKDEDetector.original(), IsolationForest(n_estimators=20, random_state=0)])
def test_every_scikit_learn_check_passes_but_those_listed(detector):
    pytest.importorskip("pandas", reason="scikit-learn skips checks in silence without pandas")
    pytest.importorskip("polars", reason="scikit-learn skips checks in silence without polars")
    failed, skipped = {}, set()
    for estimator, check in estimator_checks_generator(AnomalyClassifier(detector)):
        name = check.func.__name__
        try:
            # The checks fit to a handful of rows, on which the detector warns.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(estimator)
        except Exception as error:
            if type(error).__name__ == "SkipTest":
                skipped.add(name)
            else:
                failed[name] = error
    takes_weights = has_fit_parameter(detector, "sample_weight")
    assert set(failed) == {*EXCEPTIONS, *(WITH_WEIGHTS if takes_weights else ())}, failed
    assert skipped == (set() if os.environ.get("SCIPY_ARRAY_API") else NEEDS_ARRAY_API)


# ---- labels


@pytest.mark.parametrize(("anomaly", "normal"), LABELS)
@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: type(d).__name__)
def test_it_is_the_detector_on_the_normal_rows_in_the_user_s_labels(detector, anomaly, normal):
    X, anomalous = labelled_rows()
    y = np.where(anomalous, anomaly, normal)
    classifier = AnomalyClassifier(detector, anomaly_label=anomaly).fit(X, y)
    alone = clone(detector).fit(X[~anomalous])
    assert classifier.classes_.tolist() == sorted([anomaly, normal])
    assert classifier.classes_.dtype == y.dtype
    np.testing.assert_array_equal(classifier.predict(X), np.where(alone.predict(X) == -1, anomaly, normal))
    sign = -1 if classifier.classes_[1] == anomaly else 1
    np.testing.assert_array_equal(classifier.decision_function(X), sign * alone.decision_function(X))
    # Positive is the second class, as for every binary classifier.
    np.testing.assert_array_equal(
        classifier.predict(X), classifier.classes_[(classifier.decision_function(X) > 0).astype(int)]
    )
    assert hasattr(classifier, "predict_proba") == hasattr(alone, "predict_proba")
    if hasattr(alone, "predict_proba"):
        column = classifier.classes_.tolist().index(anomaly)
        np.testing.assert_array_equal(classifier.predict_proba(X)[:, column], alone.predict_proba(X)[:, 0])
        np.testing.assert_allclose(classifier.predict_proba(X).sum(1), 1)


def test_the_detector_sees_normal_rows_and_no_label():
    X, anomalous = labelled_rows()
    classifier = AnomalyClassifier(RowsSeen()).fit(X, anomalous.astype(int))
    np.testing.assert_array_equal(classifier.detector_.seen_, X[~anomalous])
    assert classifier.detector_.y_ is None
    assert not hasattr(classifier.detector, "seen_")


@pytest.mark.parametrize("as_y", [list, np.array, pd.Series, lambda y: np.array(y, dtype=object)])
def test_labels_come_in_any_container(as_y):
    X, anomalous = labelled_rows()
    y = ["bad" if is_anomalous else "good" for is_anomalous in anomalous]
    classifier = AnomalyClassifier(RowsSeen(), anomaly_label="bad").fit(X, as_y(y))
    np.testing.assert_array_equal(classifier.detector_.seen_, X[~anomalous])
    assert classifier.classes_.tolist() == ["bad", "good"]


def test_data_frames_keep_their_names():
    X, anomalous = labelled_rows()
    frame = pd.DataFrame(X, columns=list("abcde"))
    classifier = AnomalyClassifier(DFKDEDetector.original()).fit(frame, anomalous)
    assert classifier.feature_names_in_.tolist() == list("abcde")
    assert classifier.n_features_in_ == 5
    with pytest.raises(ValueError, match="feature names should match"):
        classifier.predict(frame[list("edcba")])


@pytest.mark.parametrize("kind", ["paths", "pictures", "stack"])
def test_images_are_chosen_by_label_in_every_form(kind, tmp_path):
    stack = np.random.default_rng(0).integers(0, 256, (12, 24, 24), np.uint8)
    stack[9:] //= 8
    y = np.repeat([0, 1], [9, 3])
    pictures = [Image.fromarray(image) for image in stack]
    paths = [str(tmp_path / f"{i}.png") for i in range(len(stack))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    images = {"paths": paths, "pictures": pictures, "stack": stack}[kind]
    detector = DFKDEDetector.original(ScatteringFeatures(scales=2, orientations=2, image_size=16), n_components=2)
    classifier = AnomalyClassifier(detector).fit(images, y)
    np.testing.assert_array_equal(
        classifier.decision_function(images), -clone(detector).fit(stack[:9]).decision_function(stack)
    )


def test_scikit_learn_takes_it_for_a_classifier():
    classifier = AnomalyClassifier(DFKDEDetector.original())
    assert is_classifier(classifier)
    assert not is_outlier_detector(classifier)
    search = GridSearchCV(classifier, {"detector__n_components": [2]}).fit(*labelled_rows())
    assert isinstance(search.cv or StratifiedKFold(), StratifiedKFold)


# ---- several kinds of anomalies


def labelled_kinds(seed=0):
    X, anomalous = labelled_rows(seed=seed)
    return X, np.where(anomalous, np.where(np.arange(len(X)) % 3 == 0, "dent", "scratch"), "good")


def test_kinds_of_anomalies_are_one_class():
    X, kinds = labelled_kinds()
    several = AnomalyClassifier(DFKDEDetector.original(), anomaly_label="bad", normal_label="good").fit(X, kinds)
    two = AnomalyClassifier(DFKDEDetector.original(), anomaly_label="bad").fit(
        X, np.where(kinds == "good", "good", "bad")
    )
    assert several.classes_.tolist() == ["bad", "good"]
    for method in ("predict", "predict_proba", "decision_function"):
        np.testing.assert_array_equal(getattr(several, method)(X), getattr(two, method)(X))
    new, new_kinds = labelled_kinds(seed=1)
    right = np.where(new_kinds == "good", "good", "bad") == two.predict(new)
    assert several.score(new, new_kinds) == pytest.approx(right.mean())
    assert several.score(new[:5], new_kinds[:5]) == pytest.approx(right[:5].mean())
    for name in ("roc_auc", "accuracy", "neg_log_loss"):
        y = np.where(new_kinds == "good", "good", "bad")
        assert get_scorer(name)(several, new, y) == get_scorer(name)(two, new, y)


def test_a_search_takes_kinds_and_every_fold_has_some_of_each():
    X, kinds = labelled_kinds()
    classifier = AnomalyClassifier(DFKDEDetector.original(), anomaly_label="bad", normal_label="good")
    search = GridSearchCV(classifier, {"detector__n_components": [1, 4]}, error_score="raise").fit(X, kinds)
    for i, (train, test) in enumerate(StratifiedKFold().split(X, kinds)):
        detector = DFKDEDetector.original(n_components=4).fit(X[train][kinds[train] == "good"])
        expected = ((detector.predict(X[test]) == 1) == (kinds[test] == "good")).mean()
        assert search.cv_results_[f"split{i}_test_score"][1] == pytest.approx(expected)


def test_kinds_by_number():
    X, anomalous = labelled_rows()
    classifier = AnomalyClassifier(RowsSeen(), normal_label=0).fit(X, anomalous * (1 + np.arange(len(X)) % 4))
    np.testing.assert_array_equal(classifier.detector_.seen_, X[~anomalous])
    assert classifier.classes_.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"normal_label": "good"}, r"anomaly_label=1 and normal_label='good' are of different types.*'anomalous'"),
        (
            {"normal_label": "fine", "anomaly_label": "bad"},
            r"normal_label='fine' is not among the labels \['dent', 'good'",
        ),
        ({"normal_label": "good", "anomaly_label": "good"}, "the anomaly_label too"),
        ({"anomaly_label": "dent"}, "multiclass.*set normal_label"),
    ],
)
def test_kinds_that_cannot_be_told_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        AnomalyClassifier(DFKDEDetector.original(), **labels).fit(*labelled_kinds())


# ---- detectors with other answers


class ZeroOne(RowsSeen):
    """Answers as PyOD's detectors do: 1 is anomalous, and scores are higher there."""

    def decision_function(self, X):
        return -super().decision_function(X)

    def predict(self, X):
        return (self.decision_function(X) > 0).astype(int)


def test_a_detector_that_answers_0_and_1_is_refused():
    X, anomalous = labelled_rows()
    for detector in (ZeroOne(), make_pipeline(StandardScaler(), ZeroOne())):
        with pytest.raises(
            ValueError, match=r"ZeroOne\(\).* predicts 0, and not -1 for anomalous and 1 for normal rows"
        ):
            AnomalyClassifier(detector).fit(X, anomalous)


def test_a_detector_of_pyod_is_refused_and_can_be_wrapped_as_the_error_says():
    pyod = pytest.importorskip("pyod.models.knn", reason="pyod is not installed")

    class Wrapped(OutlierMixin, BaseEstimator):
        def fit(self, X, y=None):
            self.detector_ = pyod.KNN().fit(X)
            return self

        def predict(self, X):
            return 1 - 2 * self.detector_.predict(X)

        def decision_function(self, X):
            return self.detector_.threshold_ - self.detector_.decision_function(X)

    X, anomalous = labelled_rows()
    with pytest.raises(ValueError, match=r"predicts 0, and not -1.*threshold_ - decision_function"):
        AnomalyClassifier(pyod.KNN()).fit(X, anomalous)
    classifier = AnomalyClassifier(Wrapped()).fit(X, anomalous)
    alone = pyod.KNN().fit(X[~anomalous])
    np.testing.assert_array_equal(classifier.predict(X), alone.predict(X) == 1)
    assert get_scorer("roc_auc")(classifier, X, anomalous) == pytest.approx(
        auroc(alone.decision_function(X), anomalous)
    )


# ---- metrics


def auroc(scores, anomalous):
    """Return the share of pairs in which the anomalous row has the higher score."""
    higher = scores[anomalous][:, None] > scores[~anomalous][None, :]
    return higher.mean()


def average_precision(scores, anomalous):
    ranked = anomalous[np.argsort(-scores)]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return precision[ranked].mean()


@pytest.mark.parametrize("detector", DETECTORS[:3], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize(("anomaly", "normal"), [(1, 0), (True, False)])
def test_string_scorers_are_about_the_anomalous_class(detector, anomaly, normal):
    X, anomalous = labelled_rows()
    new, new_anomalous = labelled_rows(seed=1)
    classifier = AnomalyClassifier(detector, anomaly_label=anomaly).fit(X, np.where(anomalous, anomaly, normal))
    y = np.where(new_anomalous, anomaly, normal)
    alone = clone(detector).fit(X[~anomalous])
    scores, flagged = -alone.decision_function(new), alone.predict(new) == -1
    hits = (flagged & new_anomalous).sum()
    expected = {
        "roc_auc": auroc(scores, new_anomalous),
        "average_precision": average_precision(scores, new_anomalous),
        "accuracy": (flagged == new_anomalous).mean(),
        "precision": hits / flagged.sum(),
        "recall": hits / new_anomalous.sum(),
        "f1": 2 * hits / (flagged.sum() + new_anomalous.sum()),
        "balanced_accuracy": (hits / new_anomalous.sum() + (~flagged & ~new_anomalous).sum() / 90) / 2,
        "jaccard": hits / (flagged | new_anomalous).sum(),
        "matthews_corrcoef": np.corrcoef(flagged, new_anomalous)[0, 1],
    }
    if hasattr(alone, "predict_proba"):
        p = alone.predict_proba(new)[:, 0]
        expected["neg_brier_score"] = -((p - new_anomalous) ** 2).mean()
        expected["neg_log_loss"] = np.log(np.where(new_anomalous, p, 1 - p)).mean()
    for name, value in expected.items():
        assert get_scorer(name)(classifier, new, y) == pytest.approx(value), name


@pytest.mark.parametrize(("anomaly", "normal"), LABELS)
def test_roc_auc_is_right_for_all_labels(anomaly, normal):
    X, anomalous = labelled_rows()
    y = np.where(anomalous, anomaly, normal)
    classifier = AnomalyClassifier(DFKDEDetector.original(), anomaly_label=anomaly).fit(X, y)
    expected = auroc(-classifier.detector_.score_samples(X), anomalous)
    assert get_scorer("roc_auc")(classifier, X, y) == pytest.approx(expected)
    assert expected > 0.8
    of_anomalies = make_scorer(f1_score, pos_label=anomaly)(classifier, X, y)
    assert of_anomalies == pytest.approx(f1_score(anomalous, classifier.detector_.predict(X) == -1))


@pytest.mark.parametrize(
    "display", [RocCurveDisplay, PrecisionRecallDisplay, DetCurveDisplay, CalibrationDisplay], ids=lambda d: d.__name__
)
@pytest.mark.parametrize(("anomaly", "normal"), [(1, 0), ("ng", "io")])
def test_displays_draw_it(display, anomaly, normal):
    figure = pytest.importorskip("matplotlib.figure", reason="displays need matplotlib").Figure()
    X, anomalous = labelled_rows()
    y = np.where(anomalous, anomaly, normal)
    classifier = AnomalyClassifier(DFKDEDetector.original(), anomaly_label=anomaly).fit(X, y)
    drawn = display.from_estimator(classifier, X, y, pos_label=anomaly, ax=figure.subplots())
    if display is RocCurveDisplay:
        roc_auc = np.ravel(drawn.roc_auc)[0]
        assert roc_auc == pytest.approx(auroc(-classifier.detector_.score_samples(X), anomalous))


def test_thresholds_can_be_tuned():
    X, anomalous = labelled_rows()
    # A threshold that flags hardly anything, and one found by labels.
    classifier = AnomalyClassifier(DFKDEDetector.original(target_fpr=0.001))
    tuned = TunedThresholdClassifierCV(classifier, scoring="balanced_accuracy").fit(X, anomalous.astype(int))
    new, new_anomalous = labelled_rows(seed=1)
    plain = classifier.fit(X, anomalous.astype(int))
    score = get_scorer("balanced_accuracy")
    assert score(tuned, new, new_anomalous.astype(int)) > score(plain, new, new_anomalous.astype(int)) + 0.1


@pytest.mark.parametrize("detector", [DFKDEDetector.original(), IsolationForest(n_estimators=20, random_state=0)])
def test_probabilities_can_be_calibrated(detector):
    X, anomalous = labelled_rows()
    calibrated = CalibratedClassifierCV(AnomalyClassifier(detector)).fit(X, anomalous.astype(int))
    new, new_anomalous = labelled_rows(n=600, n_anomalous=200, seed=1)
    p = calibrated.predict_proba(new)[:, 1]
    assert p.mean() == pytest.approx(0.25, abs=0.06)
    assert p[new_anomalous].mean() > p[~new_anomalous].mean() + 0.1


# ---- folds and searches


def folds_seen(classifier, X, y, **parameters):
    found = cross_validate(classifier, X, y, return_estimator=True, scoring="roc_auc", **parameters)
    return [fitted.detector_.seen_ for fitted in found["estimator"]]


def test_no_fold_and_no_refit_learns_from_an_anomaly():
    X, anomalous = labelled_rows()
    X = np.column_stack([X, np.arange(len(X))])
    for seen in folds_seen(AnomalyClassifier(RowsSeen()), X, anomalous.astype(int), cv=4):
        assert not anomalous[seen[:, -1].astype(int)].any()
        assert len(seen) in (67, 68)  # three quarters of 90
    search = GridSearchCV(AnomalyClassifier(RowsSeen()), {"detector": [RowsSeen()]}, scoring="roc_auc").fit(
        X, anomalous
    )
    np.testing.assert_array_equal(search.best_estimator_.detector_.seen_, X[~anomalous])


def test_a_search_finds_the_components_that_show_the_defect():
    X, anomalous = labelled_rows()
    grid = {"detector__n_components": [1, 2, 3, 4]}
    search = GridSearchCV(AnomalyClassifier(DFKDEDetector.original()), grid, scoring="roc_auc").fit(X, anomalous)
    assert search.best_params_ == {"detector__n_components": 4}
    for i, (train, test) in enumerate(StratifiedKFold().split(X, anomalous)):
        detector = DFKDEDetector.original(n_components=4).fit(X[train][~anomalous[train]])
        expected = roc_auc_score(anomalous[test], -detector.score_samples(X[test]))
        assert search.cv_results_[f"split{i}_test_score"][3] == pytest.approx(expected)


def test_out_of_fold_scores_rank_as_by_hand():
    X, anomalous = labelled_rows()
    scores = cross_val_predict(
        AnomalyClassifier(DFKDEDetector.original()), X, anomalous.astype(int), method="decision_function"
    )
    for train, test in StratifiedKFold().split(X, anomalous):
        detector = DFKDEDetector.original().fit(X[train][~anomalous[train]])
        np.testing.assert_array_equal(rankdata(scores[test]), rankdata(-detector.decision_function(X[test])))


@pytest.mark.parametrize("splitter", [GroupKFold(3), StratifiedGroupKFold(3)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("routing", [False, True])
def test_groups_stay_together(splitter, routing):
    X, anomalous = labelled_rows()
    groups = np.arange(len(X)) // 3
    X = np.column_stack([X, np.arange(len(X)), groups])
    with config_context(enable_metadata_routing=routing):
        search = GridSearchCV(
            AnomalyClassifier(RowsSeen()), {"anomaly_label": [1]}, scoring="roc_auc", cv=splitter, error_score="raise"
        )
        assert np.isfinite(search.fit(X, anomalous.astype(int), groups=groups).best_score_)
        given = {"params": {"groups": groups}} if routing else {"groups": groups}
        seen = folds_seen(AnomalyClassifier(RowsSeen()), X, anomalous.astype(int), cv=splitter, **given)
    for rows, (_, test) in zip(seen, splitter.split(X, anomalous, groups), strict=True):
        assert not set(rows[:, -1]) & set(groups[test])


# ---- bad input


@pytest.mark.parametrize(
    ("y", "label", "message"),
    [
        (np.zeros(20, int), 1, r"y holds one class only, the labels \[0\]: no row is anomalous"),
        (np.ones(20, int), 1, r"one class only, the labels \[1\]: no row is normal"),
        (np.repeat([0, 1], 10), 2, r"anomaly_label=2 is not among the labels \[0, 1\]"),
        (np.repeat(["bad", "good"], 10), 1, r"anomaly_label=1 is not among the labels \['bad', 'good'\]"),
        (np.repeat(["1", "0"], 10), 1, "anomaly_label=1 is not among"),
        (np.arange(20) % 3, 1, "Only binary classification is supported. The type of the target is multiclass"),
        (np.linspace(0, 1, 20), 1, "Unknown label type|type of the target is continuous"),
        (np.repeat([0, 1], 9), 1, "inconsistent numbers of samples"),
        (None, 1, "requires y to be passed"),
    ],
)
def test_labels_that_cannot_be_right_are_refused(y, label, message):
    with pytest.raises(ValueError, match=message):
        AnomalyClassifier(DFKDEDetector.original(), anomaly_label=label).fit(labelled_rows()[0][:20], y)


@pytest.mark.parametrize(("label", "missing"), [(1, "anomalous"), (0, "normal")])
def test_a_fold_without_a_class_is_named_and_the_others_are_not_lost(label, missing):
    X, _ = labelled_rows()
    y = np.repeat([label, 1 - label], [30, 90])
    # Fold 0 of 4 is the block of a class: its training part has none of it.
    splits = [(np.setdiff1d(np.arange(120), test), test) for test in np.arange(120).reshape(4, 30)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = cross_validate(AnomalyClassifier(DFKDEDetector.original()), X, y, cv=splits, scoring="accuracy")
    assert np.isnan(found["test_score"]).tolist() == [True, False, False, False]
    assert any(f"no row is {missing}" in str(warning.message) for warning in caught)


def test_what_is_no_outlier_detector_is_refused():
    X, anomalous = labelled_rows()
    with pytest.raises(ValueError, match=r"detector=LogisticRegression\(\) is not an outlier detector"):
        AnomalyClassifier(LogisticRegression()).fit(X, anomalous)
    with pytest.raises(ValueError, match="'detector' parameter of AnomalyClassifier must be an object implementing"):
        AnomalyClassifier(LocalOutlierFactor()).fit(X, anomalous)


def test_a_folder_cannot_have_labels(tmp_path):
    with pytest.raises(TypeError, match=r"is one path; .*Pass a list of image paths"):
        AnomalyClassifier(DFKDEDetector.original()).fit(tmp_path, [0, 1])
