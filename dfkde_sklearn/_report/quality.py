"""How well a detector does on images of known kind, and what other thresholds would give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from dfkde_sklearn._calibration import Assessment, threshold_at_rate
from dfkde_sklearn._report.text import percent
from dfkde_sklearn.datasets._mvtec import NORMAL

# The rates of false alarms that a table of thresholds asks for.
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
# Those of an operating curve: none that anybody would ask for is higher.
CURVE_RATES = np.concatenate([np.linspace(0.001, 0.05, 50), np.linspace(0.055, 0.3, 50)])
# What images that are not good are called where labels are numbers.
DEFECTIVE = "defective"


class OperatingPoint(NamedTuple):
    """What a threshold gives.

    rate : float, the rate of false alarms that it is to have, by the calibration scores.
    threshold : float, the score below which images are called anomalous.
    called : float, the share of all images that are.
    false_alarms, found : float, that of good and of defective images; NaN where there are none of known kind.
    """

    rate: float
    threshold: float
    called: float
    false_alarms: float
    found: float


def operating_points(
    rates: Iterable[float],
    calibration_scores: NDArray[np.floating],
    scores: NDArray[np.floating],
    is_defective: NDArray[np.bool_] | None = None,
) -> list[OperatingPoint]:
    """Return what thresholds from calibration scores give on the scores of new images.

    Parameters
    ----------
    rates : iterable of float
        The rates of false alarms to ask for.
    calibration_scores : ndarray of shape (n_calibrated,)
        Out-of-fold scores of good images.
    scores : ndarray of shape (n,)
        Of new images.
    is_defective : ndarray of shape (n,), bool, or None
        Their kinds; None where these are not known.

    Returns
    -------
    list of OperatingPoint
        One for each rate.
    """

    def share(chosen: NDArray[np.bool_] | None, threshold: float) -> float:
        of_kind = scores[:0] if chosen is None else scores[chosen]
        return float(np.mean(of_kind < threshold)) if len(of_kind) else float("nan")

    scores = scores.astype(np.float64)  # thresholds are not rounded to the dtype of the scores
    is_good = None if is_defective is None else ~is_defective
    points = []
    for rate in rates:
        threshold = threshold_at_rate(calibration_scores, rate)
        called = float(np.mean(scores < threshold))
        points.append(
            OperatingPoint(rate, threshold, called, share(is_good, threshold), share(is_defective, threshold))
        )
    return points


def quality_facts(assessment: Assessment, y: NDArray[np.integer], defects: NDArray[np.str_]) -> dict[str, str]:
    """Return the detection quality on images with known labels `y` (1 = anomalous) and kinds of defects."""
    good, anomalous = y == 0, assessment.label == -1
    facts: dict[str, str] = {}
    if 0 < good.sum() < len(y):
        facts["AUROC"] = f"{roc_auc_score(y, -assessment.log_density):.3f}"
    if good.any():
        n_alarms, n_good = int(anomalous[good].sum()), int(good.sum())
        low, high = binomtest(n_alarms, n_good).proportion_ci()
        facts["False alarms held"] = (
            f"{percent(n_alarms / n_good)} ({n_alarms} of {n_good} good images; 95 % interval {percent(low)} to "
            f"{percent(high)})"
        )
    if not good.all():
        kinds = [
            f"{kind} {anomalous[defects == kind].sum()}/{(defects == kind).sum()}" for kind in np.unique(defects[~good])
        ]
        facts["Defects found"] = f"{percent(anomalous[~good].mean())} ({', '.join(kinds)})"
    return facts


def kinds_of_images(y: Any, n_images: int) -> NDArray[np.str_]:
    """Return the kind of each image, "good" or what it is instead, from labels.

    Parameters
    ----------
    y : array-like of shape (n_images,)
        0 for good and 1 for defective images, or the names of their kinds, of which "good" is one.
    n_images : int
        The number of images.

    Returns
    -------
    ndarray of shape (n_images,), dtype str
        The kinds.

    Raises
    ------
    ValueError
        If there is not one label for each image, or numbers are not 0 and 1.
    """
    labels = np.asarray(y)
    if labels.shape != (n_images,):
        raise ValueError(f"y has shape {labels.shape}, and there are {n_images} images. Give one label for each.")
    if labels.dtype.kind in "OU":
        wrong = [label for label in labels.tolist() if not isinstance(label, str)]
        if wrong:
            raise ValueError(
                f"y holds {wrong[0]!r}. Allowed: 0 for good and 1 for defective images, or names of kinds, of which "
                f"{NORMAL!r} is one."
            )
        return labels.astype(np.str_)
    if labels.dtype.kind not in "biuf" or not np.isin(labels, (0, 1)).all():
        raise ValueError(
            f"y holds {', '.join(map(str, np.unique(labels)[:5].tolist()))}. Allowed: 0 for good and 1 for defective "
            f"images, or names of kinds, of which {NORMAL!r} is one. From labels 1 and -1: (1 - y) // 2."
        )
    return np.where(labels == 1, DEFECTIVE, NORMAL)
