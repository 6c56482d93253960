"""scikit-learn's callbacks see the fits of detectors, extractors and classifiers, in searches and pipelines too."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from dfkde_sklearn import AnomalyClassifier, DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures

callback = pytest.importorskip("sklearn.callback", reason="scikit-learn before 1.9")

ROWS = np.random.default_rng(0).normal(size=(60, 6))
IMAGES = np.random.default_rng(0).integers(0, 256, size=(12, 32, 32), dtype=np.uint8)


class Record:
    """A callback that is passed on to all estimators, and counts."""

    max_propagation_depth = None

    def __init__(self):
        self.seen = []

    def setup(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context, **_):
        self.seen.append(("begin", type(estimator).__name__))

    def on_fit_task_end(self, estimator, context, **_):
        self.seen.append(("end", type(estimator).__name__))
        return False

    def teardown(self, estimator, context):
        pass


@pytest.mark.parametrize(
    ("estimator", "X", "y"),
    [
        (DFKDEDetector(), ROWS, None),
        (PatchDFKDEDetector(None, n_lowest=1), ROWS, None),
        (AnomalyClassifier(DFKDEDetector()), ROWS, np.repeat([0, 1], [50, 10])),
        (ScatteringFeatures(image_size=32), IMAGES, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fit_is_one_task(estimator, X, y):
    record = Record()
    fitted = clone(estimator).set_callbacks(record).fit(X, y)
    name = type(estimator).__name__
    assert record.seen == [("begin", name), ("end", name)]
    assert not hasattr(fitted, "_callback_fit_ctx")


def test_searches_and_pipelines_pass_callbacks_on_without_a_warning():
    record = Record()
    grid = {"dfkdedetector__n_components": [2, 3]}
    pipeline = make_pipeline(ScatteringFeatures(image_size=32), DFKDEDetector())
    GridSearchCV(pipeline, grid, cv=2).set_callbacks(record).fit(IMAGES)
    # Two candidates in two folds, and the refit.
    for name in ("DFKDEDetector", "ScatteringFeatures"):
        assert record.seen.count(("begin", name)) == record.seen.count(("end", name)) == 5


def test_a_failed_fit_leaves_no_callback_behind():
    detector = DFKDEDetector().set_callbacks(Record())
    with pytest.raises(ValueError, match="differ"):
        detector.fit(np.ones((5, 3)))
    assert not hasattr(detector, "_callback_fit_ctx")


def test_a_search_shows_a_progress_bar(capsys):
    pytest.importorskip("rich", reason="scikit-learn's progress bars need rich")
    GridSearchCV(DFKDEDetector(), {"n_components": [2, 3]}, cv=2).set_callbacks(callback.ProgressBar()).fit(ROWS)
    assert "DFKDEDetector" in capsys.readouterr().out
