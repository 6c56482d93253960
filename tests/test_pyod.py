"""The contract of PyOD's detectors, and its ensembles."""

import pickle
import sys

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

pytest.importorskip("pyod")

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures, as_pyod
from dfkde_sklearn.datasets import make_textures

rng = np.random.default_rng(0)
TRAIN = rng.normal(size=(120, 6))
TEST = np.concatenate([rng.normal(size=(40, 6)), rng.normal(size=(10, 6)) + 3])
Y = np.repeat([0, 1], [40, 10])


@pytest.fixture
def fitted():
    return as_pyod(DFKDEDetector(), contamination=0.1).fit(TRAIN)


def test_it_has_the_attributes_and_the_signs_of_pyod(fitted):
    assert len(fitted.decision_scores_) == len(fitted.labels_) == len(TRAIN)
    assert set(np.unique(fitted.labels_)) == {0, 1}
    assert fitted.labels_.mean() == pytest.approx(0.1, abs=0.01)
    np.testing.assert_array_equal(fitted.labels_, fitted.decision_scores_ > fitted.threshold_)
    scores = fitted.decision_function(TEST)
    np.testing.assert_allclose(scores, -fitted.detector_.score_samples(TEST))
    assert roc_auc_score(Y, scores) > 0.95
    np.testing.assert_array_equal(fitted.predict(TEST), scores > fitted.threshold_)


def test_its_own_threshold_is_that_of_target_fpr():
    detector = DFKDEDetector(target_fpr=0.07)
    adapted, plain = as_pyod(detector).fit(TRAIN), clone(detector).fit(TRAIN)
    assert adapted.threshold_ == -plain.offset_
    np.testing.assert_array_equal(adapted.predict(TEST) == 1, plain.predict(TEST) == -1)
    np.testing.assert_array_equal(adapted.labels_ == 1, plain.fit_predict(TRAIN) == -1)
    assert not hasattr(detector, "offset_")


@pytest.mark.parametrize("method", ["linear", "unify"])
def test_probabilities_and_confidence_are_those_of_pyod(fitted, method):
    probabilities, confidence = fitted.predict_proba(TEST, method=method, return_confidence=True)
    assert probabilities.shape == (50, 2)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    assert ((confidence >= 0) & (confidence <= 1)).all()
    labels, confidence = fitted.predict(TEST, return_confidence=True)
    assert labels.shape == confidence.shape == (50,)
    assert fitted.predict_with_rejection(TEST, c_r=0.1).shape == (50,)
    assert roc_auc_score(Y, fitted._predict_rank(TEST)) > 0.95


def test_it_clones_and_pickles(fitted):
    copy = clone(fitted)
    assert copy.get_params()["contamination"] == 0.1
    np.testing.assert_allclose(copy.fit(TRAIN).decision_scores_, fitted.decision_scores_)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.decision_function(TEST), fitted.decision_function(TEST))


def test_pipelines_and_images_are_taken():
    pipeline = make_pipeline(StandardScaler(), DFKDEDetector())
    assert roc_auc_score(Y, as_pyod(pipeline).fit(TRAIN).decision_function(TEST)) > 0.95
    data = make_textures(n_train=40, n_test=4, image_size=48, random_state=0)
    detector = as_pyod(PatchDFKDEDetector(ScatteringFeatures(image_size=48, pooling=None))).fit(data.X_train)
    assert detector.decision_function(data.X_test).shape == (4,)


def test_ensembles_of_pyod_take_it():
    from pyod.models.knn import KNN
    from pyod.models.lscp import LSCP

    detectors = [as_pyod(DFKDEDetector(n_components=k), contamination=0.1) for k in (2, 4, 6)]
    ensemble = LSCP([*detectors, KNN()], n_bins=3, random_state=0).fit(TRAIN)
    assert roc_auc_score(Y, ensemble.decision_function(TEST)) > 0.9
    scores = np.column_stack([detector.fit(TRAIN).decision_function(TEST) for detector in detectors])
    assert roc_auc_score(Y, scores.mean(1)) > 0.95


def test_embeddings_of_pyod_take_it():
    embedding = pytest.importorskip("pyod.models.embedding")
    detector = embedding.EmbeddingOD(np.asarray, as_pyod(DFKDEDetector(), contamination=0.1)).fit(TRAIN)
    assert roc_auc_score(Y, detector.decision_function(TEST)) > 0.95


def test_what_is_no_detector_is_an_error():
    with pytest.raises(TypeError, match="StandardScaler is no DFKDEDetector"):
        as_pyod(StandardScaler())
    with pytest.raises(ValueError, match="contamination"):
        as_pyod(DFKDEDetector(), contamination=0.7)


def test_without_pyod_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyod.models.base", None)
    monkeypatch.delitem(sys.modules, "dfkde_sklearn._pyod", raising=False)
    monkeypatch.delitem(vars(sys.modules["dfkde_sklearn"]), "as_pyod", raising=False)
    with pytest.raises(ImportError, match=r"dfkde-sklearn\[pyod\]"):
        sys.modules["dfkde_sklearn"].as_pyod  # noqa: B018
