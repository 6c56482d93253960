"""``dfkde evaluate``: how well a fitted detector does on images whose kind is known."""

from __future__ import annotations

import argparse
from typing import Any

from dfkde_sklearn._cli.arguments import add_quiet_argument
from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.images import add_images_argument
from dfkde_sklearn._cli.labelled import labelled_images
from dfkde_sklearn._cli.models import add_extractor_arguments, add_model_argument, loaded_detector
from dfkde_sklearn._cli.output import print_facts, say


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "evaluate",
        help="measure a fitted detector on good and defective images",
        description="Measure a detector that dfkde fit saved on images whose kind is known: AUROC, false alarms and "
        "defects found, and what other thresholds would give; with masks also the AUROC of pixels and the AUPRO.",
        epilog="Example: dfkde evaluate dfkde-model.safetensors parts/test, where parts/test/good holds good parts, "
        "and the other folders in parts/test defective ones.",
    )
    add_model_argument(command)
    add_images_argument(
        command,
        "a folder with a folder for each kind of image, of which 'good' holds the good ones; or one that has such a "
        "folder called test, and beside it masks in ground_truth, as in MVTec AD; or images, of which each is of the "
        "kind that its folder is named after",
    )
    add_extractor_arguments(command)
    add_quiet_argument(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dfkde_sklearn._cli.summary import detector_facts, print_evaluation

    test, where = labelled_images(options)
    detector = loaded_detector(options)
    say(options, f"Scoring {len(test.X_test)} images")
    print_facts({"Model": str(options.model)} | detector_facts(detector))
    print_evaluation(detector, test, where)
    return DONE
