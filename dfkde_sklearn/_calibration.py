"""What follows from scores alone: threshold, label, p-value and probability.

A detector scores rows; here the scores are compared with the calibration scores, the out-of-fold scores of the training
rows.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, expit
from scipy.stats import false_discovery_control
from sklearn.base import OutlierMixin
from sklearn.utils import column_or_1d
from sklearn.utils._param_validation import Interval, validate_parameter_constraints
from sklearn.utils.validation import check_is_fitted

from dfkde_sklearn._groups import group_numbers

# What the parameter `confidence` may be.
CONFIDENCE: list[Any] = [Interval(Real, 0, 1, closed="neither"), None]
# P-values are multiples of 1 / (N + 1), and often lie exactly at a limit, but for rounding.
_ROUNDING = 1e-9


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

    A class that uses the mixin has `score_samples`, the parameters below and, once fitted, `calibration_scores_`,
    `calibration_groups_` and `offset_`. The mixin needs nothing else.
    """

    contamination: Literal["auto"] | float
    target_fpr: float
    confidence: float | None
    threshold_steepness: float
    threshold_offset: Literal["auto"] | float
    calibration_scores_: NDArray[np.floating]
    calibration_groups_: NDArray[np.int64]
    offset_: float

    if TYPE_CHECKING:

        def _validate_params(self) -> None: ...
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

    def p_values(self, X: Any, *, confidence: float | None = None) -> NDArray[np.float64]:
        """Return the conformal p-value of each row under the hypothesis that it is normal.

        ``(1 + number of calibration_scores_ <= score) / (1 + number of calibration_scores_)``: a new normal row has a
        p-value of at most p with probability p [1]_, if it has the distribution of the training rows. Where the fit was
        given `groups`, each group counts once, by the share of its scores that are as low: ``(1 + sum of the shares) /
        (1 + number of groups)``, and the same holds for a row of a new group [2]_.

        That probability is an average over training sets. With `confidence`, it holds for this one: with that
        probability over the training sets, at most the share p of new normal rows has a p-value of at most p, for all p
        at once [3]_. Such p-values are larger, and those of the upper half of the scores are 1.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As in `fit`.
        confidence : float in (0, 1) or None, default=None
            The probability with which the p-values hold for this detector; None: on average over detectors.

        Returns
        -------
        ndarray of shape (n_samples,), float64
            From 1 / (1 + number of calibration scores, or groups), anomalous, to 1, normal; with `confidence` from
            ``1 - (1 - confidence) ** (1 / (number // 2))``.

        Raises
        ------
        ValueError
            If `confidence` is not in (0, 1); or as `assess`.

        References
        ----------
        .. [1] Vovk, Gammerman and Shafer (2005), Algorithmic learning in a random world, doi:10.1007/b106715
        .. [2] Lee, Barber and Willett (2023), Distribution-free inference with hierarchical data,
           doi:10.48550/arXiv.2306.06342
        .. [3] Bates, Candès, Lei, Romano and Sesia (2023), Testing for outliers with conformal p-values,
           doi:10.1214/22-AOS2244
        """
        if confidence is None:
            return self.assess(X).p_value
        validate_parameter_constraints({"confidence": CONFIDENCE}, {"confidence": confidence}, "p_values")
        scores = self.score_samples(X)
        lowest = lowest_of_groups(self.calibration_scores_, self.calibration_groups_)
        return conditional_p_values(scores, lowest, float(confidence))

    def select(self, X: Any, *, fdr: float = 0.1, groups: Any = None) -> NDArray[np.bool_]:
        """Return which rows of a batch to pull out, such that few of the pulled ones are normal.

        By the procedure of Benjamini and Hochberg [1]_ on the conformal p-values: of the rows that are pulled out, at
        most the share `fdr` is normal, on average over batches and training sets [2]_. How many are pulled out depends
        on the batch: with more anomalous rows, a row needs less to be among them.

        The smallest p-value is 1 / (N + 1), for N calibration scores, so that in a batch of m rows fewer than
        ``m / (N + 1) / fdr`` are never pulled out.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            The batch, as in `fit`.
        fdr : float in (0, 1), default=0.1
            The false discovery rate: the share of normal rows among those that are pulled out, on average.
        groups : array-like of shape (n_samples,) or None, default=None
            What each row or image shows, as in `fit`, where several show one part. Parts are then pulled out, with all
            of their rows, by the lowest score of each among the lowest scores of the groups of the fit; `fdr` is that
            of parts. None: each row is on its own.

        Returns
        -------
        ndarray of shape (n_samples,), bool
            True for the rows to pull out.

        Raises
        ------
        ValueError
            If `fdr` is not in (0, 1), or the smallest p-value is larger, so that nothing could be pulled out; if
            `groups` has another length, or a missing label; or as `score_samples`.

        Warns
        -----
        UserWarning
            If nothing is pulled out, though rows score lower than all calibration scores: there are too few calibration
            scores for a batch of this size.

        See Also
        --------
        scipy.stats.false_discovery_control : The same for any p-values.

        References
        ----------
        .. [1] Benjamini and Hochberg (1995), Controlling the false discovery rate,
           doi:10.1111/j.2517-6161.1995.tb02031.x
        .. [2] Bates, Candès, Lei, Romano and Sesia (2023), Testing for outliers with conformal p-values,
           doi:10.1214/22-AOS2244

        Examples
        --------
        >>> import numpy as np
        >>> from dfkde_sklearn import DFKDEDetector
        >>> rng = np.random.default_rng(0)
        >>> detector = DFKDEDetector(n_components=4).fit(rng.normal(size=(400, 16)))
        >>> batch = rng.normal(size=(50, 16))
        >>> batch[:5] += 3
        >>> np.flatnonzero(detector.select(batch, fdr=0.1))
        array([0, 1, 2, 3, 4])
        """
        check_is_fitted(self)
        self._check_fdr(fdr)
        return self._selected(self.score_samples(X), fdr, groups)

    def recalibrate(self, X_good: Any, *, groups: Any = None) -> Self:
        """Take the scores of new good rows into the calibration, and move the threshold with them.

        The rows are scored by the fit as it is, for which they are new. Their scores join `calibration_scores_`, and
        `offset_` becomes what `fit` would make of all of them, with `target_fpr` and `confidence` as they are now. The
        density is not fitted anew, and the threshold of maps stays.

        Give all good rows of some time, and the rate stays at `target_fpr`. Of false alarms alone, the threshold falls
        below what `target_fpr` asks for, and fewer defects are found.

        Parameters
        ----------
        X_good : array-like of shape (n_samples, n_features) or images
            New normal rows or images, as in `fit`. Not those of the fit, which score high by their own kernels, and
            not those of an earlier `recalibrate`, which would count twice.
        groups : array-like of shape (n_samples,) or None, default=None
            What each row or image shows, as in `fit`; all are other groups than those of the fit. None: each row is on
            its own.

        Returns
        -------
        detector
            The detector itself.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        ValueError
            If `contamination` or `threshold_offset` sets the threshold; if `groups` has another length, or a missing
            label; if `confidence` needs more scores than there are; or as `score_samples`. The detector is then as it
            was.
        """
        check_is_fitted(self)
        self._validate_params()
        self._check_promised("recalibrate")
        new_scores = self.score_samples(X_good)
        n = len(new_scores)
        new_groups = np.arange(n) if groups is None else group_numbers(groups, n)
        scores = np.concatenate([self.calibration_scores_, new_scores])
        numbers = np.concatenate([self.calibration_groups_, self.calibration_groups_.max() + 1 + new_groups])
        offset = self._promised_threshold(scores, numbers)
        self.calibration_scores_, self.calibration_groups_, self.offset_ = scores, numbers, offset
        return self

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
            conformal_p_values(scores, self.calibration_scores_, self.calibration_groups_),
            logistic(-margins, self.threshold_steepness),
            labels(margins),
        )

    def _with_threshold(self, promises: Mapping[str, float]) -> Self:
        """Return a copy with the threshold that `fit` would make of the calibration scores with other parameters.

        `promises` are those among "target_fpr" and "confidence".
        """
        check_is_fitted(self)
        self._check_promised(" and ".join(promises))
        moved = copy.copy(self)
        for name, value in promises.items():
            setattr(moved, name, value)
        moved._validate_params()
        moved.offset_ = moved._promised_threshold(self.calibration_scores_, self.calibration_groups_)
        return moved

    def _check_promised(self, mover: str) -> None:
        """Raise a ValueError if the threshold is not one that `target_fpr` has set; `mover` is what would move it."""
        for name in ("contamination", "threshold_offset"):
            if getattr(self, name) != "auto":
                raise ValueError(
                    f"{name}={getattr(self, name)} sets the threshold, and {mover} moves one that target_fpr sets. "
                    f"Fit with {name}='auto'."
                )

    def _check_fdr(self, fdr: float) -> None:
        """Raise a ValueError if no batch can be selected from with this false discovery rate."""
        validate_parameter_constraints({"fdr": [Interval(Real, 0, 1, closed="neither")]}, {"fdr": fdr}, "select")
        n_calibrated, smallest = self._resolution()
        if smallest > fdr * (1 + _ROUNDING):
            raise ValueError(
                f"fdr={fdr} with {n_calibrated} calibration scores, or groups: the smallest p-value is {smallest:.3g}, "
                f"so that nothing can be pulled out. Fit on at least {_n_for_one_of(1, fdr)}, or allow a larger fdr."
            )

    def _resolution(self) -> tuple[int, float]:
        """Return the number of calibration scores, or of their groups, and the smallest p-value."""
        n_calibrated = len(np.unique(self.calibration_groups_))
        return n_calibrated, 1.0 / (1.0 + n_calibrated)

    def _selected(self, scores: NDArray[np.floating], fdr: float, groups: Any = None) -> NDArray[np.bool_]:
        """Return which of the scores (n,) `select` pulls out."""
        n_calibrated, smallest = self._resolution()
        if groups is None:
            p_values = conformal_p_values(scores, self.calibration_scores_, self.calibration_groups_)
            selected = discovered(p_values, fdr)
        else:
            numbers = group_numbers(groups, len(scores))
            lowest = lowest_of_groups(self.calibration_scores_, self.calibration_groups_)
            p_values = conformal_p_values(lowest_of_groups(scores, numbers), lowest)
            selected = discovered(p_values, fdr)[np.unique(numbers, return_inverse=True)[1]]
        n_extreme, n_needed = int((p_values <= smallest).sum()), math.ceil(len(p_values) * smallest / fdr - _ROUNDING)
        if n_extreme and not selected.any():
            warnings.warn(
                f"{n_extreme} of {len(p_values)} score lower than all {n_calibrated} calibration scores, and none is "
                f"pulled out: with fdr={fdr} and so few calibration scores, at least {n_needed} of them must. Fit on "
                f"more good images ({_n_for_one_of(len(p_values), fdr)} for one of {len(p_values)}), or select from "
                "smaller batches.",
                UserWarning,
                stacklevel=3,
            )
        return selected

    def _check_confidence(self, groups: NDArray[np.int64]) -> None:
        """Raise a ValueError if `confidence` cannot be kept with scores of these groups (n,)."""
        if self.confidence is None:
            return
        for name in ("contamination", "threshold_offset"):
            if getattr(self, name) != "auto":
                raise ValueError(
                    f"confidence={self.confidence} is that of target_fpr, and {name}={getattr(self, name)} sets the "
                    f"threshold. Leave out one of them: confidence=None, or {name}='auto'."
                )
        rank_with_confidence(len(np.unique(groups)), self.target_fpr, self.confidence)

    def _promised_threshold(self, scores: NDArray[np.floating], groups: NDArray[np.int64]) -> float:
        """Return the threshold that keeps `target_fpr`, from calibration scores (n,) and the groups (n,) of each."""
        if self.confidence is None:
            return threshold_at_rate(scores, self.target_fpr)
        return threshold_with_confidence(lowest_of_groups(scores, groups), self.target_fpr, self.confidence)

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


def conformal_p_values(
    scores: NDArray[np.floating], calibration_scores: NDArray[np.floating], groups: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return the conformal p-value of each score.

    ``(1 + number of calibration scores <= score) / (1 + number of calibration scores)``; with `groups` (n,), the number
    of the group of each calibration score, ``(1 + sum over the groups of the share of their scores <= score) / (1 +
    number of groups)``, by Lee, Barber and Willett (2023, doi:10.48550/arXiv.2306.06342).
    """
    numbers = np.arange(len(calibration_scores)) if groups is None else groups
    _, of_score, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    order = np.argsort(calibration_scores)
    shares = np.concatenate([[0.0], np.cumsum(1.0 / sizes[of_score[order]])])
    n_at_or_below = np.searchsorted(calibration_scores[order], scores, side="right")
    # Sums of shares are rounded.
    return np.minimum((1.0 + shares[n_at_or_below]) / (1.0 + len(sizes)), 1.0)


def conditional_p_values(
    scores: NDArray[np.floating], calibration_scores: NDArray[np.floating], confidence: float
) -> NDArray[np.float64]:
    """Return p-values that are valid with probability `confidence` over the calibration scores, all at once.

    The p-value of a score with i - 1 calibration scores at or below it is b_i, where all order statistics of n
    independent uniform numbers have U_(i) <= b_i with probability `confidence`, exactly: the generalised Simes
    inequality, as Bates et al. (2023, doi:10.1214/22-AOS2244, section 3) use it, with its parameter k = n / 2.
    """
    n = len(calibration_scores)
    k = max(1, n // 2)
    # b_i = 1 - ((1 - confidence) * C(n + 1 - i, k) / C(n, k)) ** (1 / k), from ratios of binomial coefficients.
    logs = np.log1p(-confidence) + np.concatenate([[0.0], np.cumsum(np.log1p(-k / (n - np.arange(n - k))))])
    bounds = np.concatenate([-np.expm1(logs / k), np.ones(k)])
    return bounds[np.searchsorted(np.sort(calibration_scores), scores, side="right")]


def lowest_of_groups(scores: NDArray[np.floating], groups: NDArray[np.int64]) -> NDArray[np.floating]:
    """Return the lowest score of each group; `groups` (n,) are the numbers of the groups of the scores (n,)."""
    numbers, of_score = np.unique(groups, return_inverse=True)
    lowest = np.full(len(numbers), np.inf, scores.dtype)
    np.minimum.at(lowest, of_score, scores)
    return lowest


def discovered(p_values: NDArray[np.float64], fdr: float) -> NDArray[np.bool_]:
    """Return which of the hypotheses of p-values (n,) are rejected by the procedure of Benjamini and Hochberg."""
    return np.asarray(false_discovery_control(p_values) <= fdr * (1 + _ROUNDING))


def _n_for_one_of(n_parts: int, fdr: float) -> int:
    """Return how many calibration scores let a single one of some parts be pulled out."""
    return math.ceil(n_parts / fdr - _ROUNDING) - 1


def threshold_at_rate(calibration_scores: NDArray[np.floating], rate: float) -> float:
    """Return the score below which new normal rows fall at this rate."""
    # The quantile estimate that Hyndman and Fan (1996, doi:10.2307/2684934) recommend.
    return float(np.quantile(calibration_scores.astype(np.float64), rate, method="median_unbiased"))


def threshold_with_confidence(calibration_scores: NDArray[np.floating], rate: float, confidence: float) -> float:
    """Return the score below which, with probability `confidence`, new normal rows fall at most at this rate.

    It is the calibration score of rank `rank_with_confidence`. A new score that equals it does not lie below it: ties
    only lower the rate.
    """
    rank = rank_with_confidence(len(calibration_scores), rate, confidence)
    return float(np.sort(calibration_scores)[rank - 1])


def rank_with_confidence(n: int, rate: float, confidence: float) -> int:
    """Return the rank of the threshold among `n` calibration scores.

    The share of new scores below the r-th lowest of n independent ones has the distribution Beta(r, n + 1 - r), if they
    have a density. The rank is the largest r for which it is at most `rate` with probability `confidence`.

    Raises
    ------
    ValueError
        If that is no rank, not even the lowest.
    """
    ranks = np.arange(1, n + 1)
    rank = int(np.count_nonzero(betainc(ranks, n + 1 - ranks, rate) >= confidence))  # it decreases with the rank
    if rank == 0:
        needed = math.ceil(math.log1p(-confidence) / math.log1p(-rate))
        raise ValueError(
            f"confidence={confidence} of target_fpr={rate} needs at least {needed} good rows or images, of as many "
            f"groups where groups are given, and there are {n}. These can promise "
            f"target_fpr={_rounded(-math.expm1(math.log1p(-confidence) / n), math.ceil)} with confidence={confidence}, "
            f"or target_fpr={rate} with confidence={_rounded(-math.expm1(n * math.log1p(-rate)), math.floor)}; "
            "confidence=None promises it on average."
        )
    return rank


def _rounded(probability: float, direction: Callable[[float], int]) -> float:
    """Return a probability in (0, 1) rounded to two digits, up or down, and still in (0, 1)."""
    n_digits = 1 - math.floor(math.log10(min(probability, 1 - probability)))
    return direction(probability * 10**n_digits) / 10**n_digits


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
    promised_threshold: float,
    training_scores: Callable[[], NDArray[np.floating]],
    n_anomalous: int | None,
    threshold_offset: float | Literal["auto"],
) -> tuple[float, NDArray[np.floating]]:
    """Return the threshold, and the scores of the training rows that are compared with it.

    These are the calibration scores; where `n_anomalous`, from a contamination, sets the threshold, they are scores of
    the training rows by the fit itself, so that ``predict`` calls exactly that many anomalous.
    """
    if threshold_offset != "auto":
        return float(threshold_offset), calibration_scores
    if n_anomalous is None:
        return promised_threshold, calibration_scores
    scores = training_scores()
    preferred = threshold_at_rate(calibration_scores, n_anomalous / len(scores))
    return threshold_between(scores, n_anomalous, preferred), scores
