"""What a fitted detector has learnt from what, and what its threshold promises, in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from dfkde_sklearn._calibration import CalibratedOutlierMixin
from dfkde_sklearn._report.text import percent

# Characters of a setting that are shown: some are whole modules.
_LONGEST = 60


def learnt(detector: CalibratedOutlierMixin) -> dict[str, str]:
    """Return what a fitted detector is, and what it was fitted to.

    Parameters
    ----------
    detector : CalibratedOutlierMixin
        Fitted on images.

    Returns
    -------
    dict
        Names and values, both for people.
    """
    parts: Any = detector
    extractor, n_groups = parts.features_, len(np.unique(detector.calibration_groups_))
    n = len(detector.calibration_scores_)
    facts = {
        "Detector": type(detector).__name__,
        "Learnt from": f"{n} images, counting those of recalibrate"
        + (f", of {n_groups} groups" if n_groups < n else ""),
        "Features": extractor.summary() if hasattr(extractor, "summary") else type(extractor).__name__,
    }
    if hasattr(parts, "grid_shape_"):
        facts["Positions"] = " x ".join(map(str, parts.grid_shape_))
    if hasattr(parts, "n_components_"):
        facts["Principal components"] = f"{parts.n_components_} of {parts.n_features_in_} features"
    facts["Settings"] = _settings(detector, "features")
    facts["Settings of the features"] = f"{type(extractor).__name__}: {_settings(extractor)}"
    return facts


def thresholds(detector: CalibratedOutlierMixin) -> dict[str, str]:
    """Return the thresholds of a fitted detector.

    Parameters
    ----------
    detector : CalibratedOutlierMixin
        As in `learnt`.

    Returns
    -------
    dict
        Names and values, both for people.
    """
    below = float(np.mean(detector.calibration_scores_.astype(np.float64) < detector.offset_))
    facts = {
        "Threshold": f"score {detector.offset_:.4g}, a log density: images below it are called anomalous",
        "Below it": f"{percent(below)} of the {len(detector.calibration_scores_)} calibration scores, those of good "
        "images from fits without them",
    }
    if hasattr(detector, "map_offset_"):
        facts["Threshold of maps"] = f"log density {detector.map_offset_:.4g}: pixels below it are called anomalous"
    return facts


def promises(detector: CalibratedOutlierMixin) -> list[str]:
    """Return what the thresholds of a fitted detector promise, and to whom, in sentences.

    Parameters
    ----------
    detector : CalibratedOutlierMixin
        As in `learnt`.

    Returns
    -------
    list of str
        Paragraphs.
    """
    n, n_groups = len(detector.calibration_scores_), len(np.unique(detector.calibration_groups_))
    in_groups, rate = n_groups < n, percent(detector.target_fpr)
    who = "new good images of new groups" if in_groups else "new good images"
    if detector.threshold_offset != "auto":
        said = [
            f"The threshold was given, as threshold_offset={detector.threshold_offset}: no rate of false alarms is "
            "promised."
        ]
    elif detector.contamination != "auto":
        said = [
            f"The threshold was set by contamination={detector.contamination}: about {percent(detector.contamination)} "
            "of new images from the same source as the training images, good or not, are called anomalous."
        ]
    elif detector.confidence is None:
        said = [f"About {rate} of {who} are called anomalous, on average over training sets."]
        smallest = 1 / (n_groups + 1)
        if detector.target_fpr < smallest:
            said.append(
                f"But {n_groups} {'groups' if in_groups else 'images'} cannot tell a rate below {percent(smallest)}."
            )
    else:
        what = (
            f"Of at most {rate} of new groups of good images, any image is called anomalous"
            if in_groups
            else f"At most {rate} of {who} are called anomalous"
        )
        said = [f"{what}, with a probability of {detector.confidence:g} over training sets."]
    if hasattr(detector, "map_offset_"):
        parts: Any = detector
        share = percent(parts.target_map_fpr)
        said.append(
            f"About {share} of the pixels of new good images lie below the threshold of maps, on average over training "
            "sets."
        )
    if detector.threshold_offset != "auto" and not hasattr(detector, "map_offset_"):
        return said
    said.append(
        f"Rates hold for new {'groups' if in_groups else 'images'} that are drawn as the training images were: "
        "independently of each other, and from the same source. They say nothing about how many defects are found."
    )
    return said


def _settings(parts: Any, *left_out: str) -> str:
    """Return the parameters of an estimator, without some of them."""
    values = {name: value for name, value in parts.get_params(deep=False).items() if name not in left_out}
    return ", ".join(f"{name}={_shortened(repr(value))}" for name, value in values.items())


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
