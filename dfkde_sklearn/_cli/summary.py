"""Facts about a detector and its results, as the commands print them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import Bunch

from dfkde_sklearn import Assessment, DFKDEDetector, PatchDFKDEDetector
from dfkde_sklearn._cli.output import percent, print_facts, print_heading, print_table
from dfkde_sklearn._images import as_images
from dfkde_sklearn._maps import image_maps
from dfkde_sklearn._report.quality import RATES, operating_points, quality_facts
from dfkde_sklearn.datasets import read_mask
from dfkde_sklearn.metrics import aupro, pixel_roc_auc, region_hits


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


def expected_rate(detector: DFKDEDetector | PatchDFKDEDetector) -> dict[str, str]:
    """Return the rate of anomalous images to expect with the threshold of a detector."""
    if detector.contamination != "auto":
        return {"Anomalies expected": f"{percent(float(detector.contamination))} of images like these"}
    if detector.threshold_offset != "auto":
        return {}
    n_units = len(np.unique(detector.calibration_groups_))
    units = "images" if n_units == len(detector.calibration_groups_) else "parts"
    if detector.confidence is not None:
        return {
            "False alarms expected": f"at most {percent(detector.target_fpr)} of new good {units}, with "
            f"{percent(detector.confidence)} confidence"
        }
    expected = f"{percent(detector.target_fpr)} of new good images"
    lowest = 1 / (n_units + 1)
    if detector.target_fpr < lowest:
        expected += f"; but {n_units} {units} cannot tell a rate below {percent(lowest)}: use more of them"
    return {"False alarms expected": expected}


def map_facts(detector: PatchDFKDEDetector, grid_maps: Any, test: Bunch) -> dict[str, str]:
    """Return how well maps on the grid find the regions of the masks of a test set; nothing without masks."""
    masks = [read_mask(file) if file else None for file in test.masks_test]
    has_mask = [mask is not None for mask, is_bad in zip(masks, test.y_test, strict=True) if is_bad]
    if not has_mask or not all(has_mask):
        return {}
    images = as_images(test.X_test)
    maps = list(image_maps(np.asarray(grid_maps), [images.shape(i) for i in range(len(images))]))
    found = [region.hit for region in region_hits(masks, maps, detector.map_offset_)]
    return {
        "AUROC of pixels": f"{pixel_roc_auc(masks, maps):.3f}",
        "AUPRO": f"{aupro(masks, maps):.3f}",
        "Regions found": f"{percent(float(np.mean(found)))} ({sum(found)} of {len(found)})",
    }


def print_evaluation(detector: DFKDEDetector | PatchDFKDEDetector, test: Bunch, name: str) -> None:
    """Print how well a detector does on labelled images, those of `load_mvtec_folder`, from one pass over them."""
    facts: dict[str, str] = {}
    if isinstance(detector, PatchDFKDEDetector):
        assessment, grid_maps = detector.assess_with_maps(test.X_test, resolution="grid")
        facts = map_facts(detector, grid_maps, test)
    else:
        assessment = detector.assess(test.X_test)
    print_heading(f"On the {len(test.X_test)} images in {name}:")
    print_facts(quality_facts(assessment, test.y_test, test.defects_test) | facts)
    print_table(
        "What other thresholds would give, the rate asked of the training images:",
        ("rate asked", "threshold", "false alarms", "defects found"),
        _operating_rows(detector, assessment, test),
    )


def _operating_rows(
    detector: DFKDEDetector | PatchDFKDEDetector, assessment: Assessment, test: Bunch
) -> list[Sequence[str]]:
    """Return the rates of false alarms and of found defects at thresholds from the calibration scores."""
    points = operating_points(RATES, detector.calibration_scores_, assessment.log_density, test.y_test == 1)
    return [
        (
            percent(point.rate),
            f"{point.threshold:.2f}",
            *("-" if np.isnan(share) else percent(share) for share in (point.false_alarms, point.found)),
        )
        for point in points
    ]


def worst_first(assessment: Assessment) -> NDArray[np.int64]:
    """Return the indices of the images, the least normal one first."""
    return np.argsort(assessment.log_density, kind="stable")
