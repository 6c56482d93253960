"""``dfkde update``: a model that has learnt from new good images too."""

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
        "update",
        help="add new good images to what a model has learnt from",
        description="Fit a model anew to the images that it was fitted to and to new good ones. The result is that of "
        "dfkde fit with all of them; of more than 1000 images, with the pooled detector 40000, a random choice is "
        "kept. The model must come from dfkde fit --training-rows.",
        epilog="Example: dfkde update dfkde-model.safetensors good/2025-06 -o june.safetensors. Images of the fit, and "
        "images that were added before, do not belong among them. dfkde recalibrate moves the threshold alone, of any "
        "model. A file of dfkde score --monitor belongs to the model as it was: begin a new one.",
    )
    add_model_argument(command)
    add_images_argument(command, "new good images")
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the file for the new model (default: MODEL, which is replaced once the new one is complete)",
    )
    add_groups_argument(command, "if the fit was told so too")
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
    if not has_training_rows(detector):
        raise ValueError(
            f"MODEL {options.model} does not hold what new images are added to: fit it with --training-rows. dfkde "
            "recalibrate moves the threshold alone, and takes any model."
        )
    before, n_before = detector.offset_, len(detector.calibration_scores_)
    say(options, f"Adding {len(paths)} images")
    detector.partial_fit(paths, groups=groups)
    save_detector(detector, output, force, training_rows=True)

    print_facts(
        {
            "New images": described(paths, groups),
            "Calibration scores": f"{len(detector.calibration_scores_)}, before {n_before}",
            "Threshold": f"score {detector.offset_:.2f}, before {before:.2f}",
            **expected_rate(detector),
            "Model": str(output),
        }
    )
    return DONE
