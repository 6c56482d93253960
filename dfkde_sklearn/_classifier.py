"""AnomalyClassifier: an outlier detector as scikit-learn's binary classifier, for metrics and searches with labels."""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, _fit_context, clone, is_outlier_detector
from sklearn.utils import Tags, _safe_indexing, get_tags, indexable
from sklearn.utils._metadata_requests import _routing_enabled
from sklearn.utils._param_validation import HasMethods
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import _check_method_params, check_is_fitted, column_or_1d

from dfkde_sklearn._callbacks import CallbackSupportMixin, one_task

# Training rows whose predictions are checked after the fit: hardly any detector calls all of them anomalous.
_N_CHECKED = 20


def _detector_has(method: str) -> Any:
    return available_if(lambda self: hasattr(getattr(self, "detector_", self.detector), method))


class AnomalyClassifier(ClassifierMixin, MetaEstimatorMixin, CallbackSupportMixin, BaseEstimator):
    """A binary classifier made of an outlier detector: it learns from normal rows, and predicts your labels.

    scikit-learn's metrics, displays and searches are made for classifiers. Given an outlier detector they silently
    score the wrong class or reverse the scores, and a search fits on the anomalies too. Here the labels choose the
    rows to learn from, in each fold and in the refit, and the classes of the metrics.

    Parameters
    ----------
    detector : outlier detector
        A :class:`DFKDEDetector`, any other outlier detector of scikit-learn with `decision_function`, or a pipeline or
        a search that ends in one. It is cloned and fitted on the normal rows as `detector_`.
    anomaly_label : int, bool or str, default=1
        The label of anomalous rows; the other one is that of the normal rows. With `normal_label`, the label that is
        predicted for anomalous rows of every kind.
    normal_label : int, bool, str or None, default=None
        The label of normal rows. All other labels are then kinds of anomalies, any number of them. With None, y
        holds two labels, and `anomaly_label` is one of them.

    Attributes
    ----------
    detector_ : outlier detector
        The detector, fitted on the normal rows.
    classes_ : ndarray of shape (2,)
        The labels, sorted; the columns of `predict_proba` follow them.
    n_features_in_ : int
        Number of features that the detector was fitted on; present if the detector has it.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns of X; present if the detector has them.

    See Also
    --------
    DFKDEDetector : The detector itself, which needs no labels.

    Notes
    -----
    The higher `decision_function`, the more a row belongs to ``classes_[1]``, as scikit-learn has it: with labels 0 and
    1 that is the anomalous class. Where the label of the anomalies sorts first ("bad" before "good"), it is the normal
    one; set `pos_label` in metrics then, for example ``make_scorer(f1_score, pos_label="bad")``.

    Predictions are of two classes, also where y names several kinds of anomalies: give metrics and scorers ``y`` with
    two labels, such as ``np.where(y == "good", "good", "bad")``. `score` does so itself. Splitters may be given the
    kinds, to stratify by them.

    The anomalous rows only name the classes. To set the threshold by them, use scikit-learn's
    `TunedThresholdClassifierCV` or `CalibratedClassifierCV`.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.model_selection import GridSearchCV
    >>> from dfkde_sklearn import AnomalyClassifier, DFKDEDetector
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(120, 8)), np.repeat(["good", "bad"], [100, 20])
    >>> X[y == "bad", 5] += 6
    >>> search = GridSearchCV(
    ...     AnomalyClassifier(DFKDEDetector(residual=None), anomaly_label="bad"),
    ...     {"detector__n_components": [2, 8]},
    ...     scoring="roc_auc",
    ... ).fit(X, y)
    >>> search.best_params_
    {'detector__n_components': 8}
    >>> search.predict(X[[0, -1]]).tolist()
    ['good', 'bad']

    With the kinds of defects by name:

    >>> kinds = np.repeat(["good", "scratch", "dent"], [100, 12, 8])
    >>> classifier = AnomalyClassifier(DFKDEDetector(n_components=8), anomaly_label="bad", normal_label="good")
    >>> classifier.fit(X, kinds).predict(X[[0, 105, -1]]).tolist()
    ['good', 'bad', 'bad']
    """

    # The public path, which pickles and lists of trusted types name.
    __module__ = "dfkde_sklearn"

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "detector": [HasMethods(["fit", "predict", "decision_function"])],
        "anomaly_label": ["boolean", int, np.integer, str],
        "normal_label": ["boolean", int, np.integer, str, None],
    }

    def __init__(
        self, detector: Any, *, anomaly_label: int | bool | str = 1, normal_label: int | bool | str | None = None
    ) -> None:
        self.detector = detector
        self.anomaly_label = anomaly_label
        self.normal_label = normal_label

    @_fit_context(prefer_skip_nested_validation=False)
    @one_task
    def fit(self, X: Any, y: Any, **fit_params: Any) -> Self:
        """Fit the detector to the rows that are not labelled anomalous.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or sequence of images
            What the detector takes, one row or image for each label: a table, or a list of paths, but not a folder.
        y : array-like of shape (n_samples,)
            Labels of two kinds, `anomaly_label` one of them; with `normal_label` of two or more, that one of them.
        **fit_params : dict
            What the detector's ``fit`` takes, such as `groups`, one entry for each row of X: it gets those of the
            normal rows. With scikit-learn's metadata routing, what the detector requests.

        Returns
        -------
        AnomalyClassifier
            The fitted classifier itself.

        Raises
        ------
        ValueError
            If y does not hold normal and anomalous rows by these labels, or the detector does not answer -1 and 1, as
            scikit-learn's do; and what the detector raises.
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
        if self.normal_label is not None:
            self._check_labels(y)
        y = self._binary(y)
        self.classes_ = self._classes(y)
        normal = np.flatnonzero(y == self.classes_[1 - self._anomalous])
        if _routing_enabled():
            fit_params = process_routing(self, "fit", **fit_params).detector.fit
        of_normal = _check_method_params(X, fit_params, indices=normal)
        self.detector_ = clone(self.detector).fit(_safe_indexing(X, normal), **of_normal)
        # At once: detectors that do not predict -1 and 1 mostly have a decision_function of the opposite sign.
        if not hasattr(self.detector_, "classes_"):
            self._checked(self.detector_.predict(_safe_indexing(X, normal[:_N_CHECKED])))
        for attribute in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.detector_, attribute):
                setattr(self, attribute, getattr(self.detector_, attribute))
        return self

    def get_metadata_routing(self) -> MetadataRouter:
        """Return what is passed on to the detector, by scikit-learn's metadata routing.

        Returns
        -------
        MetadataRouter
            ``fit`` passes on what the detector's ``fit`` requests.
        """
        mapping = MethodMapping().add(caller="fit", callee="fit")
        router = MetadataRouter(owner=self).add_self_request(self)
        return router.add(detector=self.detector, method_mapping=mapping)

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
        anomalous = self._checked(self.detector_.predict(X)) == -1
        return self.classes_[np.where(anomalous, self._anomalous, 1 - self._anomalous)]

    @_detector_has("predict_proba")
    def predict_proba(self, X: Any) -> NDArray[np.floating]:
        """Return the detector's probabilities of the two classes; available if the detector has them.

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
        """Return the detector's decision function, with the sign that makes it higher for ``classes_[1]``.

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

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy: the share of rows whose label, normal or anomalous, is predicted correctly.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            What the detector takes.
        y : array-like of shape (n_samples,)
            Labels as in `fit`; with `normal_label` of any number of kinds.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows.

        Returns
        -------
        float
            From 0 to 1.
        """
        return super().score(X, self._binary(column_or_1d(y)), sample_weight)

    @property
    def _anomalous(self) -> int:
        """The position of the anomalous class in `classes_`."""
        return int(self.classes_[1] == self.anomaly_label)

    def _check_labels(self, y: NDArray[Any]) -> None:
        """Raise a ValueError unless `normal_label` is a label of y, and `anomaly_label` another of the same type."""
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        labels = np.unique(y).tolist()
        if kind not in ("binary", "multiclass") or self.normal_label not in labels:
            raise ValueError(
                f"normal_label={self.normal_label!r} is not among the labels {labels[:20]} in y, which is {kind}. Set "
                "normal_label to the one of them that normal rows have."
            )
        if isinstance(self.normal_label, str) != isinstance(self.anomaly_label, str):
            raise ValueError(
                f"anomaly_label={self.anomaly_label!r} and normal_label={self.normal_label!r} are of different types, "
                "and both are answers. Set anomaly_label to what anomalous rows shall be called, such as "
                f"{'anomalous' if isinstance(self.normal_label, str) else 1!r}."
            )
        if self.normal_label == self.anomaly_label:
            raise ValueError(f"normal_label={self.normal_label!r} is the anomaly_label too. Give two different labels.")

    def _binary(self, y: NDArray[Any]) -> NDArray[Any]:
        """Return the labels with one name for all kinds of anomalies, if `normal_label` is given."""
        if self.normal_label is None:
            return y
        return np.where(y == self.normal_label, self.normal_label, self.anomaly_label)

    def _checked(self, answers: NDArray[Any]) -> NDArray[Any]:
        """Return the detector's predictions; raise a ValueError if they are not all -1 or 1."""
        strange = np.setdiff1d(answers, [-1, 1])
        if len(strange):
            raise ValueError(
                f"detector={self.detector!r} predicts {strange.tolist()[0]!r}, and not -1 for anomalous and 1 for "
                "normal rows. PyOD's detectors predict 1 for anomalous rows, and their decision_function is higher "
                "there: give a class of your own that returns 1 - 2 * predict(X) and threshold_ - decision_function(X) "
                "of one."
            )
        return answers

    def _classes(self, y: NDArray[Any]) -> NDArray[Any]:
        """Return the two labels, sorted."""
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind != "binary":
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {kind}. Where y names several "
                "kinds of anomalies, set normal_label to the label of the normal rows."
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
