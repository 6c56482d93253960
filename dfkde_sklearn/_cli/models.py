"""Detectors in files, as several commands take and write them."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dfkde_sklearn._cli.arguments import add_run_arguments, file_path, filled, given, weights_advice
from dfkde_sklearn._cli.files import check_new
from dfkde_sklearn._cli.output import shows_progress

if TYPE_CHECKING:
    from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector

# The file that `dfkde fit` writes by default.
MODEL = Path("dfkde-model.safetensors")
# A pickle starts with this byte, a protocol from 2 to 5, and an opcode; a file of ours with the length of its header,
# which may have the same first bytes, but never as large a third one.
_PICKLE, _PROTOCOLS, _LEAST_OPCODE = 0x80, range(2, 6), 0x20

_Content = TypeVar("_Content")


def add_model_argument(command: argparse.ArgumentParser) -> None:
    """Add MODEL."""
    command.add_argument("model", type=file_path, metavar="MODEL", help="a file from dfkde fit or DFKDEDetector.save")


def add_extractor_arguments(command: argparse.ArgumentParser) -> None:
    """Add what a model file does not say of its feature extractor."""
    group = command.add_argument_group("the feature extractor")
    add_weights_argument(group)
    add_run_arguments(group)


def add_weights_argument(group: Any) -> None:
    """Add --weights."""
    group.add_argument(
        "--weights", type=filled, metavar="FILE", help="the weights of the backbone, if they have moved since the fit"
    )


def loaded_detector(options: argparse.Namespace) -> DFKDEDetector | PatchDFKDEDetector:
    """Return the detector in the file MODEL, with the settings of the command line."""
    from dfkde_sklearn._batch.models import load_detector

    def load(path: Path) -> DFKDEDetector | PatchDFKDEDetector:
        with weights_advice("On the command line: --weights FILE, the file that the model was fitted with."):
            detector: DFKDEDetector | PatchDFKDEDetector = load_detector(
                path, weights=options.weights, device=options.device, download=True
            )
            return detector

    path = options.model
    detector = file_of_model(path, load)
    extractor: Any = detector.features_
    if extractor is None:
        raise ValueError(f"MODEL {path} was fitted on a feature matrix, not on images: score with it in Python.")
    extractor.set_params(verbose=shows_progress(options), **given(options, "batch_size", "cache"))
    return detector


def save_detector(
    detector: DFKDEDetector | PatchDFKDEDetector, path: Path, force: bool, *, training_rows: bool = False
) -> None:
    """Write a detector to a file, whole or not at all; a file that exists is kept, unless `force` is set."""
    check_new(path, force)
    saved = copy.copy(detector)
    extractor: Any = copy.copy(detector.features_)
    # Progress bars belong to this run, not to the model.
    saved.features_ = extractor.set_params(verbose=False)
    saved.save(path, training_rows=training_rows)


def has_training_rows(detector: DFKDEDetector | PatchDFKDEDetector) -> bool:
    """Return whether a detector from a file can be updated."""
    return hasattr(detector, "_sample")


def file_of_model(path: Path, read: Callable[[Path], _Content]) -> _Content:
    """Return what `read` makes of the file MODEL; errors name it, and what else it may be."""
    if not path.is_file():
        raise FileNotFoundError(f"MODEL {path}: there is no such file.")
    try:
        return read(path)
    except ValueError as error:
        with path.open("rb") as file:
            start = [*file.read(3), 0, 0, 0]
        if start[0] == _PICKLE and start[1] in _PROTOCOLS and start[2] >= _LEAST_OPCODE:
            raise ValueError(
                f"MODEL {path} is a pickle, as joblib and earlier versions of dfkde fit write. Loading such a file "
                "runs code that is in it, and dfkde no longer does: fit it again."
            ) from error
        advice = " On the command line, weights= is --weights." if "weights=" in str(error) else ""
        raise ValueError(f"MODEL {path}: {error}{advice}") from error
