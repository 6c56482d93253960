"""``dfkde recalibrate``: a threshold that goes by new good images too."""

from __future__ import annotations

import argparse
from typing import Any

from dfkde_sklearn._cli.changes import add_change_arguments, change_model
from dfkde_sklearn._cli.exit_codes import DONE


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
    add_change_arguments(command, "where several do")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    change_model(options, "Scoring", lambda detector, paths, groups: detector.recalibrate(paths, groups=groups))
    return DONE
