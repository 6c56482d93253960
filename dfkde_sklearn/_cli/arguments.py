"""Arguments that several commands share, and what they mean for the detector."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector

# The detectors by their names on the command line.
POSITIONS, POOLED = "positions", "pooled"
DETECTORS = {POSITIONS: PatchDFKDEDetector, POOLED: DFKDEDetector}
# The defaults of the command line are those of the detectors.
DEFAULTS = DFKDEDetector().get_params(deep=False)
PATCH_DEFAULTS = PatchDFKDEDetector().get_params(deep=False)
# The residual terms by their names on the command line.
RESIDUALS = {"none": None, "gaussian": "gaussian", "box": "box"}


def add_detector_arguments(command: argparse.ArgumentParser) -> Any:
    """Add the parameters of the detector, and return the group of those that set the threshold: one of them holds."""
    group = command.add_argument_group("the detector")
    group.add_argument(
        "--detector",
        choices=list(DETECTORS),
        default=POSITIONS,
        help="'positions': a density at every position, which says where a defect is, for parts that lie alike in all "
        "images; 'pooled': one density of the whole image's features (default: %(default)s)",
    )
    residual = next(name for name, residual in RESIDUALS.items() if residual == DEFAULTS["residual"])
    group.add_argument(
        "--n-components",
        type=_n_components,
        metavar="N",
        help="of the pooled detector: principal components to keep, at most N; a share of the variance, between 0 and "
        f"1; or 'auto', as many as hold for new images (default: {DEFAULTS['n_components']})",
    )
    group.add_argument(
        "--residual",
        choices=list(RESIDUALS),
        help="of the pooled detector: the score of an image's distance from the principal axes: 'gaussian', as in "
        f"probabilistic PCA; 'box', weighted by its effective dimension; or 'none' (default: {residual})",
    )
    group.add_argument(
        "--flips",
        choices=("none", "horizontal", "all"),
        help="of the detector of positions: average the features of an image with those of its mirror image, in two "
        "passes of the network, or of all its flips, in four (default: none)",
    )
    threshold = group.add_mutually_exclusive_group()
    threshold.add_argument(
        "--target-fpr",
        type=float,
        default=DEFAULTS["target_fpr"],
        metavar="RATE",
        help="the share of new good images that may be called anomalous (default: %(default)s)",
    )
    return threshold


def detector_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of the detector that `add_detector_arguments` declares."""
    of_other = {POSITIONS: ("n_components", "residual"), POOLED: ("flips",)}[options.detector]
    for name in given(options, *of_other):
        raise ValueError(
            f"--{name.replace('_', '-')} is for the other detector, and this is --detector {options.detector}. Leave "
            "it out, or choose the other one."
        )
    parameters = given(options, "n_components", "flips") | {"target_fpr": options.target_fpr}
    if options.residual is not None:
        parameters["residual"] = RESIDUALS[options.residual]
    if parameters.get("flips") == "none":
        parameters["flips"] = None
    return parameters


def add_run_arguments(group: Any) -> None:
    """Add the parameters of a feature extractor that do not change the features."""
    group.add_argument("--batch-size", type=int, metavar="N", help="images in a batch; does not change the result")
    group.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keep the features in this folder, which is made if it does not exist, and reuse those that are there; "
        "see dfkde cache",
    )
    group.add_argument(
        "--max-pixels",
        type=_n_pixels,
        default=Image.MAX_IMAGE_PIXELS,
        metavar="N",
        help="refuse images of more pixels, since a small file can hold a huge image (default: %(default)s)",
    )
    group.add_argument(
        "--device", help="cpu, cuda, cuda:1, ..., or mps (default: the first CUDA GPU if there is one, else the CPU)"
    )


def add_output_arguments(command: argparse.ArgumentParser) -> None:
    """Add --force and --quiet."""
    command.add_argument("--force", action="store_true", help="overwrite files that exist; by default this is an error")
    add_quiet_argument(command)


def add_quiet_argument(command: argparse.ArgumentParser) -> None:
    """Add --quiet."""
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options of these names that were given; the others are left to the defaults of Python."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


@contextmanager
def weights_advice(advice: str) -> Iterator[None]:
    """Add to an error about missing weights which options help."""
    try:
        yield
    except OSError as error:
        if "weights" not in str(error):
            raise
        raise OSError(f"{error} {advice}") from error


def _n_components(text: str) -> int | float | str:
    if text == "auto":
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'")


def _n_pixels(text: str) -> int:
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of pixels, at least 1")
    return n
