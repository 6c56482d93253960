"""Facts about a detector and its results, as the commands print them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from dfkde_sklearn import Assessment, DFKDEDetector, PatchDFKDEDetector
from dfkde_sklearn._cli.output import percent

# Images that are listed or drawn as the most anomalous.
N_WORST = 12


def detector_facts(detector: DFKDEDetector | PatchDFKDEDetector) -> dict[str, str]:
    """Return the parts of a fitted detector, and its threshold."""
    extractor: Any = detector.features_
    threshold = f"score {detector.offset_:.2f} (a log density); images below it are called anomalous"
    if isinstance(detector, DFKDEDetector):
        parts = (
            f"{detector.n_features_in_} features ({extractor.summary()}), {detector.n_components_} principal "
            f"components, {detector.residual or 'no'} residual"
        )
        return {"Detector": parts, "Threshold": threshold}
    h, w = detector.grid_shape_
    return {
        "Detector": f"{h} x {w} positions of {len(detector.channel_scales_)} features ({extractor.summary()})",
        "Threshold": threshold,
        "Threshold of maps": f"{detector.map_offset_:.2f}; {percent(detector.target_map_fpr)} of the pixels of new "
        "good images are expected below it",
    }


def quality_facts(assessment: Assessment, y: NDArray[np.int64], defects: NDArray[np.str_]) -> dict[str, str]:
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


def worst_first(assessment: Assessment) -> NDArray[np.int64]:
    """Return the indices of the images, the least normal one first."""
    return np.argsort(assessment.log_density, kind="stable")
