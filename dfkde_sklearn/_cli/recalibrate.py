"""``dfkde recalibrate``: a threshold that goes by new good images too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dfkde_sklearn._cli.arguments import add_force_argument, add_quiet_argument
from dfkde_sklearn._cli.exit_codes import DONE
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


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "recalibrate",
        help="move the threshold of a model by new good images",
        description="Take the scores of new good images into the calibration of a model, and move its threshold and "
        "its p-values with them; what it has learnt of good parts stays. Give all good images of some time, and the "
        "false-alarm rate stays what fit was asked for. Of false alarms alone, the threshold falls below that.",
        epilog="Example: dfkde recalibrate dfkde-model.safetensors good/2025-06 -o june.safetensors. Images of the "
        "fit, and images taken in before, do not belong among them. A file of dfkde score --monitor belongs to "
        "the model as it was: begin a new one.",
    )
    add_model_argument(command)
    add_images_argument(command, "new good images")
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the file for the recalibrated model (default: MODEL, which is replaced once the new one is complete)",
    )
    add_groups_argument(command, "where several do")
    add_extractor_arguments(command)
    add_force_argument(command)
    add_quiet_argument(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dfkde_sklearn._cli.summary import expected_rate

    paths = image_paths(options)
    groups = image_groups(options, paths)
    # Without -o, to replace the model is what was asked for.
    output, force = (options.model, True) if options.output is None else (options.output, options.force)
    check_new(output, force)
    detector = loaded_detector(options)
    before, n_before = detector.offset_, len(detector.calibration_scores_)
    say(options, f"Scoring {len(paths)} images")
    detector.recalibrate(paths, groups=groups)
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
    return DONE
