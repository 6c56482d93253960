"""Detectors as those of PyOD."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

try:
    from pyod.models.base import BaseDetector
except ImportError as error:
    raise ImportError("as_pyod needs PyOD: pip install 'dfkde-sklearn[pyod]'.") from error


class PyODDetector(BaseDetector):
    """A detector with the signs and the attributes of PyOD, made by :func:`as_pyod`.

    Parameters
    ----------
    detector : DFKDEDetector, PatchDFKDEDetector or a pipeline that ends in one
        It is cloned, and the clone is fitted.
    contamination : float in (0, 0.5]
        The share of the training scores above `threshold_`.

    Attributes
    ----------
    detector_ : estimator
        The fitted clone.
    decision_scores_ : ndarray of shape (n_samples,)
        Out-of-fold log densities of the training rows, negated: higher is more anomalous.
    threshold_ : float
        Scores above it are anomalous.
    labels_ : ndarray of shape (n_samples,), int
        1 for anomalous training rows, 0 for the others.
    """

    def __init__(self, detector: Any, contamination: float) -> None:
        super().__init__(contamination=contamination)
        self.detector = detector

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit a clone of the detector.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As the detector takes them.
        y : None
            Ignored.

        Returns
        -------
        PyODDetector
            Itself.
        """
        self._set_n_classes(y)
        self.detector_ = clone(self.detector).fit(X)
        last = self.detector_[-1] if hasattr(self.detector_, "steps") else self.detector_
        self.decision_scores_ = -last.calibration_scores_.astype(np.float64)
        self._process_decision_scores()
        if self.contamination == last.target_fpr:
            # Its own threshold, which differs from a quantile of PyOD's by the way of interpolation.
            self.threshold_ = -last.offset_
            self.labels_ = (self.decision_scores_ > self.threshold_).astype(int)
        return self

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Return the negated log density of each row: higher is more anomalous.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples,)
            Nats.
        """
        check_is_fitted(self, "decision_scores_")
        return -np.asarray(self.detector_.score_samples(X), dtype=np.float64)


def as_pyod(detector: Any, contamination: float | None = None) -> PyODDetector:
    """Return a detector as one of PyOD, for its ensembles and tools.

    Parameters
    ----------
    detector : DFKDEDetector, PatchDFKDEDetector or a pipeline that ends in one
        Fitted or not: a clone of it is fitted.
    contamination : float in (0, 0.5] or None, default=None
        The share of the training scores above `threshold_`, as for every detector of PyOD. None: the detector's
        `target_fpr`, with its own threshold.

    Returns
    -------
    pyod.models.base.BaseDetector
        With PyOD's signs: `decision_scores_` and ``decision_function`` are higher for anomalous rows, `labels_` and
        ``predict`` are 1 for these and 0 for the others. The scores of the training rows are out-of-fold.

    Raises
    ------
    ImportError
        If PyOD is not installed: the extra "pyod".
    TypeError
        If `detector` is no detector of this package.

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import DFKDEDetector, as_pyod
    >>> good = np.random.default_rng(0).normal(size=(200, 5))
    >>> detector = as_pyod(DFKDEDetector(target_fpr=0.05)).fit(good)
    >>> detector.predict([[0, 0, 0, 0, 0], [9, 9, 9, 9, 9]])
    array([0, 1])
    """
    last = detector[-1] if hasattr(detector, "steps") else detector
    if not hasattr(last, "target_fpr"):
        raise TypeError(
            f"{type(detector).__name__} is no DFKDEDetector or PatchDFKDEDetector, nor a pipeline that ends in one."
        )
    return PyODDetector(detector, last.target_fpr if contamination is None else contamination)
