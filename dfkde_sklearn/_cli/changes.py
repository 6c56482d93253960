"""Changes of a model by new good images: what ``dfkde recalibrate`` and ``dfkde update`` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dfkde_sklearn._cli.arguments import add_force_argument, add_quiet_argument, file_path
from dfkde_sklearn._cli.files import check_new
from dfkde_sklearn._cli.groups import add_groups_argument, image_groups
from dfkde_sklearn._cli.images import add_images_argument, described, image_paths
from dfkde_sklearn._cli.models import (
    add_extractor_arguments,
    add_model_argument,
    has_training_rows,
    loaded_detector,
    save_detector,
)
from dfkde_sklearn._cli.output import print_facts, say

if TYPE_CHECKING:
    from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector


def add_change_arguments(command: argparse.ArgumentParser, groups_purpose: str) -> None:
    """Add all arguments of a command that changes a model."""
    add_model_argument(command)
    add_images_argument(command, "new good images")
    command.add_argument(
        "-o",
        "--output",
        type=file_path,
        metavar="FILE",
        help="the file for the new model (default: MODEL, which is replaced once the new one is complete)",
    )
    add_groups_argument(command, groups_purpose)
    add_extractor_arguments(command)
    add_force_argument(command)
    add_quiet_argument(command)


def change_model(
    options: argparse.Namespace,
    doing: str,
    change: Callable[[DFKDEDetector | PatchDFKDEDetector, list[str], list[str] | None], Any],
) -> None:
    """Change the model by the images and their groups, save it, and print what became of it.

    The new file can be updated if the old one could.
    """
    from dfkde_sklearn._cli.summary import expected_rate

    paths = image_paths(options)
    groups = image_groups(options, paths)
    # Without -o, to replace the model is what was asked for.
    output, force = (options.model, True) if options.output is None else (options.output, options.force)
    check_new(output, force)
    detector = loaded_detector(options)
    before, n_before = detector.offset_, len(detector.calibration_scores_)
    say(options, f"{doing} {len(paths)} images")
    change(detector, paths, groups)
    save_detector(detector, output, force, training_rows=has_training_rows(detector))

    print_facts(
        {
            "Good images": described(paths, groups),
            "Calibration scores": f"{len(detector.calibration_scores_)}, before {n_before}",
            "Threshold": f"score {detector.offset_:.2f}, before {before:.2f}",
            **expected_rate(detector),
            "Model": str(output),
        }
    )
