"""``dfkde update``: a model that has learnt from new good images too."""

from __future__ import annotations

import argparse
from typing import Any

from dfkde_sklearn._cli.changes import add_change_arguments, change_model
from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.models import has_training_rows


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
    add_change_arguments(command, "if the fit was told so too")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""

    def add(detector: Any, paths: list[str], groups: list[str] | None) -> None:
        if not has_training_rows(detector):
            raise ValueError(
                f"MODEL {options.model} does not hold what new images are added to: fit it with --training-rows. dfkde "
                "recalibrate moves the threshold alone, and takes any model."
            )
        detector.partial_fit(paths, groups=groups)

    change_model(options, "Adding", add)
    return DONE
