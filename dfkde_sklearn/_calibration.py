"""What follows from scores alone: threshold, label, p-value and probability.

A detector scores rows; here the scores are compared with the calibration scores, the out-of-fold scores of the training
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.base import OutlierMixin
from sklearn.utils import column_or_1d


class Assessment(NamedTuple):
    """All answers of a detector for rows or images; arrays of shape (n_samples,).

    Parameters
    ----------
    log_density : ndarray, dtype of the features
        Natural log of the density; higher is more normal.
    p_value : ndarray, float64
        Conformal p-value of the hypothesis that the row is normal; small is anomalous.
    p_anomalous : ndarray, dtype of the features
        Probability of being anomalous.
    label : ndarray, int64
        1 for normal, -1 for anomalous.

    See Also
    --------
    DFKDEDetector.assess : Returns it.

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import Assessment
    >>> assessment = Assessment(np.array([-3.0]), np.array([0.01]), np.array([0.6]), np.array([-1]))
    >>> list(assessment._asdict())  # what pandas.DataFrame takes
    ['log_density', 'p_value', 'p_anomalous', 'label']
    """

    log_density: NDArray[np.floating]
    p_value: NDArray[np.float64]
    p_anomalous: NDArray[np.floating]
    label: NDArray[np.int64]


Assessment.__module__ = "dfkde_sklearn"  # the public path, which pickles name


class CalibratedOutlierMixin(OutlierMixin):
    """The answers of a detector whose scores are calibrated.

    A class that uses the mixin has `score_samples`, the parameter `threshold_steepness` and, once fitted,
    `calibration_scores_` and `offset_`. The mixin needs nothing else.
    """

    threshold_steepness: float
    calibration_scores_: NDArray[np.floating]
    offset_: float

    if TYPE_CHECKING:

        def score_samples(self, X: Any) -> NDArray[np.floating]:
            """Return the log density of each row."""

    def assess(self, X: Any) -> Assessment:
        """Return log density, p-value, P(anomalous) and label of each row.

        All from one pass through the feature extractor and one evaluation of the density. `score_samples`, `p_values`,
        `predict_proba` and `predict` return the same arrays one at a time, with a pass each.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As in `fit`.

        Returns
        -------
        Assessment
            Named tuple of the arrays `log_density`, `p_value`, `p_anomalous` and `label`.

        Raises
        ------
        ValueError
            If X has other features than in `fit`, NaN or infinities, or an image cannot be read.
        """
        return self._assessment(self.score_samples(X))

    def predict(self, X: Any) -> NDArray[np.int64]:
        """Return +1 for normal and -1 for anomalous rows.

        For new rows only. Each training row has a kernel of its own in the density, so that it scores as normal: use
        :meth:`fit_predict` for these.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples,), int64
            +1 where `decision_function` is 0 or more, else -1.
        """
        return self.assess(X).label

    def predict_proba(self, X: Any) -> NDArray[np.floating]:
        """Return the probabilities of being anomalous and normal.

        A logistic curve in the log density, of slope `threshold_steepness`, one half at `offset_`.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples, 2), dtype of the features
            Columns in the order of `classes_`: ``[:, 0]`` is P(anomalous).
        """
        margins = self.decision_function(X)
        return np.column_stack(
            [logistic(-margins, self.threshold_steepness), logistic(margins, self.threshold_steepness)]
        )

    def p_values(self, X: Any) -> NDArray[np.float64]:
        """Return the conformal p-value of each row under the hypothesis that it is normal.

        ``(1 + number of calibration_scores_ <= score) / (1 + number of calibration_scores_)``: a new normal row has a
        p-value of at most p with probability p [1]_, if it has the distribution of the training rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples,), float64
            From 1 / (1 + number of calibration scores), anomalous, to 1, normal.

        References
        ----------
        .. [1] Vovk, Gammerman and Shafer (2005), Algorithmic learning in a random world, doi:10.1007/b106715
        """
        return self.assess(X).p_value

    def decision_function(self, X: Any) -> NDArray[np.floating]:
        """Return the log density minus the threshold: negative is anomalous.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples,), dtype of the features
            Nats; higher is more normal.
        """
        return self._margins(self.score_samples(X))

    def _assessment(self, scores: NDArray[np.floating]) -> Assessment:
        """Return all answers that follow from scores."""
        margins = self._margins(scores)
        return Assessment(
            scores,
            conformal_p_values(scores, self.calibration_scores_),
            logistic(-margins, self.threshold_steepness),
            labels(margins),
        )

    def _margins(self, scores: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the scores minus the threshold."""
        # In float64, since a threshold rounded to float32 may fall on the wrong side of a score.
        return (scores.astype(np.float64) - self.offset_).astype(scores.dtype)


def labels(margins: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return 1 where a margin is 0 or more, and -1 elsewhere: NaN is not normal."""
    return np.where(margins >= 0, 1, -1)


def logistic(margins: NDArray[np.floating], steepness: float) -> NDArray[np.floating]:
    """Return ``1 / (1 + exp(-steepness * margins))``."""
    with np.errstate(over="ignore"):  # infinite odds are a probability of 0 or 1
        return expit(steepness * margins)


def conformal_p_values(scores: NDArray[np.floating], calibration_scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return ``(1 + number of calibration scores <= score) / (1 + number of calibration scores)`` for each score."""
    n_at_or_below = np.searchsorted(np.sort(calibration_scores), scores, side="right")
    return (1.0 + n_at_or_below.astype(np.float64)) / (1.0 + len(calibration_scores))


def threshold_at_rate(calibration_scores: NDArray[np.floating], rate: float) -> float:
    """Return the score below which new normal rows fall at this rate."""
    # The quantile estimate that Hyndman and Fan (1996, doi:10.2307/2684934) recommend.
    return float(np.quantile(calibration_scores.astype(np.float64), rate, method="median_unbiased"))


def threshold_between(training_scores: NDArray[np.floating], n_anomalous: int, preferred: float) -> float:
    """Return the threshold nearest to `preferred` below which exactly `n_anomalous` of the training scores lie.

    It keeps a margin of more than the rounding of a score, which may differ between batches. Where the scores on both
    sides are equal to rounding, both are on the normal side.
    """
    in_order = np.sort(training_scores.astype(np.float64))
    first_normal = float(in_order[n_anomalous])
    last_anomalous = float(in_order[n_anomalous - 1]) if n_anomalous else min(preferred, first_normal - 1)
    eps = float(np.finfo(training_scores.dtype).eps)
    rounding = 16 * eps * max(1.0, abs(last_anomalous), abs(first_normal))
    if first_normal - last_anomalous <= rounding:
        return first_normal - rounding
    margin = min(256 * rounding, (first_normal - last_anomalous) / 2)
    return min(max(preferred, last_anomalous + margin), first_normal - margin)


def weighted_mean(log_densities: NDArray[np.floating], sample_weight: Any) -> float:
    """Return the mean of log densities (n,), weighted by an array-like of shape (n,) unless that is None."""
    if sample_weight is None:
        return float((log_densities / len(log_densities)).sum())  # the sum of the lowest numbers would overflow
    weights = column_or_1d(np.asarray(sample_weight, dtype=np.float64))
    if len(weights) != len(log_densities):
        raise ValueError(f"sample_weight has {len(weights)} weights for {len(log_densities)} rows. Give one for each.")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(
            f"sample_weight goes from {weights.min()} to {weights.max()}. Weights are finite and not negative, and one "
            "is positive."
        )
    weights = weights / weights.max()
    counts = weights > 0
    return float((log_densities[counts] * (weights[counts] / weights.sum())).sum())


def judged_scores(
    calibration_scores: NDArray[np.floating],
    training_scores: Callable[[], NDArray[np.floating]],
    n_anomalous: int | None,
    target_fpr: float,
    threshold_offset: float | Literal["auto"],
) -> tuple[float, NDArray[np.floating]]:
    """Return the threshold, and the scores of the training rows that are compared with it.

    These are the calibration scores; where `n_anomalous`, from a contamination, sets the threshold, they are scores of
    the training rows by the fit itself, so that ``predict`` calls exactly that many anomalous.
    """
    if threshold_offset != "auto":
        return float(threshold_offset), calibration_scores
    if n_anomalous is None:
        return threshold_at_rate(calibration_scores, target_fpr), calibration_scores
    scores = training_scores()
    preferred = threshold_at_rate(calibration_scores, n_anomalous / len(scores))
    return threshold_between(scores, n_anomalous, preferred), scores
