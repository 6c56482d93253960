"""``dfkde evaluate``: how well a fitted detector does on images whose kind is known."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dfkde_sklearn._cli.arguments import add_quiet_argument, weights_advice
from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.labelled import labelled_images
from dfkde_sklearn._cli.models import WEIGHTS_OF_MODEL, add_extractor_arguments, add_model_argument, loaded_detector
from dfkde_sklearn._cli.output import print_facts, say
from dfkde_sklearn._cli.summary import detector_facts, print_evaluation
from dfkde_sklearn.datasets._mvtec import NORMAL


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "evaluate",
        help="measure a fitted detector on good and defective images",
        description="Measure a detector that dfkde fit saved on images whose kind is known: AUROC, false alarms and "
        "defects found, and what other thresholds would give; with masks also the AUROC of pixels and the AUPRO.",
    )
    add_model_argument(command)
    command.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help=f"a folder with a folder for each kind of image, of which '{NORMAL}' holds the good ones; or one that has "
        "such a folder called test, and beside it masks in ground_truth, as in MVTec AD",
    )
    add_extractor_arguments(command)
    add_quiet_argument(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    test = labelled_images(options.folder)
    with weights_advice(WEIGHTS_OF_MODEL):
        detector = loaded_detector(options)
        say(options, f"Scoring {len(test.X_test)} images")
        print_facts({"Model": str(options.model)} | detector_facts(detector))
        print_evaluation(detector, test, str(options.folder))
    return DONE
