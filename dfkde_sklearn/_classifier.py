"""AnomalyClassifier: an outlier detector as scikit-learn's binary classifier, for metrics and searches with labels."""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, _fit_context, clone, is_outlier_detector
from sklearn.utils import Tags, _safe_indexing, get_tags, indexable
from sklearn.utils._param_validation import HasMethods
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, column_or_1d


def _detector_has(method: str) -> Any:
    return available_if(lambda self: hasattr(getattr(self, "detector_", self.detector), method))


class AnomalyClassifier(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """Make a binary classifier of an outlier detector: it learns from the normal rows, and answers with your labels.

    scikit-learn's metrics, displays and searches are made for classifiers. Handed an outlier detector they score the
    wrong class, or turn the scores around, without a word; and a search fits on the anomalies too. Here the
    labels choose the rows to learn from, in each fold and in the refit, and say what the metrics are about.

    Parameters
    ----------
    detector : outlier detector
        A :class:`DFKDEDetector`, any other outlier detector of scikit-learn with `decision_function`, or a pipeline or
        a search that ends in one. It is cloned and fitted on the normal rows as `detector_`.
    anomaly_label : int, bool or str, default=1
        The label of anomalous rows; the other one is that of the normal rows.

    Attributes
    ----------
    detector_ : outlier detector
        The detector, fitted on the normal rows.
    classes_ : ndarray of shape (2,)
        The labels, sorted; the columns of `predict_proba` follow them.
    n_features_in_ : int
        Number of features that the detector saw; there where the detector has it.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns of X; there where the detector has them.

    See Also
    --------
    DFKDEDetector : The detector itself, which needs no labels.

    Notes
    -----
    The higher `decision_function`, the more a row belongs to ``classes_[1]``, as scikit-learn has it: with labels 0 and
    1 that is the anomalous class. Where the label of the anomalies sorts first ("bad" before "good"), it is the normal
    one; metrics then want to be told the other way, for example ``make_scorer(f1_score, pos_label="bad")``.

    The anomalous rows are used for nothing but the names of the classes. They set no threshold: scikit-learn's
    `TunedThresholdClassifierCV` and `CalibratedClassifierCV` do that.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.model_selection import GridSearchCV
    >>> from dfkde_sklearn import AnomalyClassifier, DFKDEDetector
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(120, 8)), np.repeat(["good", "bad"], [100, 20])
    >>> X[y == "bad", 5] += 6
    >>> search = GridSearchCV(
    ...     AnomalyClassifier(DFKDEDetector(), anomaly_label="bad"),
    ...     {"detector__n_components": [2, 8]},
    ...     scoring="roc_auc",
    ... ).fit(X, y)
    >>> search.best_params_
    {'detector__n_components': 8}
    >>> search.predict(X[[0, -1]]).tolist()
    ['good', 'bad']
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "detector": [HasMethods(["fit", "predict", "decision_function"])],
        "anomaly_label": ["boolean", int, np.integer, str],
    }

    def __init__(self, detector: Any, *, anomaly_label: int | bool | str = 1) -> None:
        self.detector = detector
        self.anomaly_label = anomaly_label

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any) -> Self:
        """Fit the detector to the rows that are not labelled anomalous.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or sequence of images
            What the detector takes, one row or image for each label: a table, or a list of paths, but not a folder.
        y : array-like of shape (n_samples,)
            Labels of two kinds, `anomaly_label` one of them.

        Returns
        -------
        AnomalyClassifier
            The fitted classifier itself.

        Raises
        ------
        ValueError
            If y does not hold two classes, or `anomaly_label` is none of them; and what the detector raises.
        TypeError
            If X is one path.
        """
        if not is_outlier_detector(self.detector):
            raise ValueError(
                f"detector={self.detector!r} is not an outlier detector. Give one, such as DFKDEDetector(), or a "
                "pipeline that ends in one."
            )
        if y is None:
            raise ValueError(
                "AnomalyClassifier requires y to be passed, but the target y is None. Without labels, fit the detector "
                "itself, on normal rows."
            )
        if isinstance(X, str | PathLike):
            raise TypeError(f"X={str(X)!r} is one path; y needs something to belong to. Pass a list of image paths.")
        X, y = indexable(X, column_or_1d(y, warn=True))
        self.classes_ = self._classes(y)
        normal = np.flatnonzero(y == self.classes_[1 - self._anomalous])
        self.detector_ = clone(self.detector).fit(_safe_indexing(X, normal))
        for attribute in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.detector_, attribute):
                setattr(self, attribute, getattr(self.detector_, attribute))
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the label of each row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            What the detector takes.

        Returns
        -------
        ndarray of shape (n_samples,), dtype of the labels
            `anomaly_label` where the detector predicts -1, else the other label.
        """
        check_is_fitted(self)
        anomalous = self.detector_.predict(X) == -1
        return self.classes_[np.where(anomalous, self._anomalous, 1 - self._anomalous)]

    @_detector_has("predict_proba")
    def predict_proba(self, X: Any) -> NDArray[np.floating]:
        """Return the detector's probabilities of the two classes; there where the detector has them.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            What the detector takes.

        Returns
        -------
        ndarray of shape (n_samples, 2)
            Columns in the order of `classes_`.
        """
        check_is_fitted(self)
        probabilities = self.detector_.predict_proba(X)
        column = self.detector_.classes_.tolist().index(-1)
        return probabilities[:, [column, 1 - column] if self._anomalous == 0 else [1 - column, column]]

    def decision_function(self, X: Any) -> NDArray[np.floating]:
        """Return the detector's decision function, turned so that it is higher for ``classes_[1]``.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            What the detector takes.

        Returns
        -------
        ndarray of shape (n_samples,)
            In the detector's unit; for :class:`DFKDEDetector`, nats from its threshold.
        """
        check_is_fitted(self)
        scores = self.detector_.decision_function(X)
        return -scores if self._anomalous == 1 else scores

    @property
    def _anomalous(self) -> int:
        """The position of the anomalous class in `classes_`."""
        return int(self.classes_[1] == self.anomaly_label)

    def _classes(self, y: NDArray[Any]) -> NDArray[Any]:
        """Return the two labels, sorted."""
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind != "binary":
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {kind}. Give the anomalies one "
                "label, for example y != 'good'."
            )
        classes = np.unique(y)
        given = f"the labels {classes.tolist()}"
        if len(classes) == 1:
            missing = "normal" if classes[0] == self.anomaly_label else "anomalous"
            raise ValueError(
                f"y holds one class only, {given}: no row is {missing}. Both are needed: in a search, by every "
                "training fold, as StratifiedKFold sees to. Without anomalous rows, fit the detector itself."
            )
        if self.anomaly_label not in classes.tolist():
            raise ValueError(
                f"anomaly_label={self.anomaly_label!r} is not among {given} in y. Set anomaly_label to the one of them "
                "that anomalous rows have."
            )
        return classes

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags = get_tags(self.detector).input_tags
        tags.classifier_tags.multi_class = False
        return tags
