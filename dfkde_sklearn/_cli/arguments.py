"""Arguments that several commands share, and what they mean for the detector.

An option that is not given is None, and left to the defaults of Python: help texts name these, and a test compares
them with those of the detector.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dfkde_sklearn

# The detectors by their names on the command line.
POSITIONS, POOLED = "positions", "pooled"
DETECTORS = {POSITIONS: "PatchDFKDEDetector", POOLED: "DFKDEDetector"}
# The residual terms by their names on the command line.
RESIDUALS = {"none": None, "gaussian": "gaussian", "box": "box"}
FLIPS = {"none": None, "horizontal": "horizontal", "all": "all"}


def add_detector_arguments(command: argparse.ArgumentParser) -> Any:
    """Add the parameters of the detector, and return the group of those that set the threshold: one of them holds."""
    group = command.add_argument_group("the detector")
    add_detector_argument(group)
    group.add_argument(
        "--n-components",
        type=n_components,
        metavar="N",
        help="of the pooled detector: principal components to keep, at most N; a share of the variance, between 0 and "
        "1; or 'auto', as many as hold for new images (default: auto)",
    )
    group.add_argument(
        "--residual",
        choices=list(RESIDUALS),
        help="of the pooled detector: the score of an image's distance from the principal axes: 'gaussian', as in "
        "probabilistic PCA; 'box', weighted by its effective dimension; or 'none' (default: box)",
    )
    group.add_argument(
        "--bandwidth",
        type=bandwidth,
        metavar="H",
        help="the width of the kernels, in standard deviations of the good images: a number; 'scott' or 'silverman', "
        "rules that go by the number of images; or, of the pooled detector, 'loo', the one of largest leave-one-out "
        "likelihood (default: scott)",
    )
    group.add_argument(
        "--flips",
        choices=list(FLIPS),
        help="of the detector of positions: average the features of an image with those of its mirror image, in two "
        "passes of the network, or of all its flips, in four (default: none)",
    )
    threshold = group.add_mutually_exclusive_group()
    threshold.add_argument(
        "--target-fpr",
        type=rate,
        metavar="RATE",
        help="the share of new good images that may be called anomalous (default: 0.05)",
    )
    return threshold


def add_detector_argument(group: Any) -> None:
    """Add --detector."""
    group.add_argument(
        "--detector",
        choices=list(DETECTORS),
        default=POSITIONS,
        help="'positions': a density at every position, which says where a defect is, for parts that lie alike in all "
        "images; 'pooled': one density of the whole image's features (default: %(default)s)",
    )


def add_confidence_argument(group: Any, more: str) -> None:
    """Add --confidence; `more` ends the help."""
    group.add_argument(
        "--confidence",
        type=rate,
        metavar="PROBABILITY",
        help=f"the probability with which --target-fpr holds for this detector, such as 0.9{more}",
    )


def detector_class(options: argparse.Namespace) -> Any:
    """Return the class of --detector."""
    return getattr(dfkde_sklearn, DETECTORS[options.detector])


def detector_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of the detector that `add_detector_arguments` declares."""
    of_other = {POSITIONS: ("n_components", "residual"), POOLED: ("flips",)}[options.detector]
    for name in given(options, *of_other):
        raise ValueError(
            f"--{name.replace('_', '-')} is for the other detector, and this is --detector {options.detector}. Leave "
            "it out, or choose the other one."
        )
    parameters = given(options, "n_components", "bandwidth", "target_fpr")
    if options.residual is not None:
        parameters["residual"] = RESIDUALS[options.residual]
    if options.flips is not None:
        parameters["flips"] = FLIPS[options.flips]
    return parameters


def add_run_arguments(group: Any) -> None:
    """Add the parameters of a feature extractor that do not change the features."""
    add_batch_size_argument(group)
    group.add_argument(
        "--cache",
        type=file_path,
        metavar="FOLDER",
        help="keep the features in this folder, which is made if it does not exist, and reuse those that are there; "
        "see dfkde cache",
    )
    add_reading_arguments(group)


def add_batch_size_argument(group: Any) -> None:
    """Add --batch-size."""
    group.add_argument("--batch-size", type=int, metavar="N", help="images in a batch; does not change the result")


def add_reading_arguments(group: Any) -> None:
    """Add --max-pixels and --device."""
    group.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="refuse images of more pixels, since a small file can hold a huge image (default: 89478485)",
    )
    group.add_argument(
        "--device", help="cpu, cuda, cuda:1, ..., or mps (default: the first CUDA GPU if there is one, else the CPU)"
    )


def add_force_argument(command: argparse.ArgumentParser) -> None:
    """Add --force."""
    command.add_argument("--force", action="store_true", help="overwrite files that exist; by default this is an error")


def add_quiet_argument(command: argparse.ArgumentParser) -> None:
    """Add --quiet."""
    command.add_argument("--quiet", action="store_true", help="nothing on standard error but warnings and errors")


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options of these names that the command has and that were given; the others are left to Python."""
    return {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}


@contextmanager
def weights_advice(advice: str) -> Iterator[None]:
    """Add to an error about missing weights which options help."""
    try:
        yield
    except OSError as error:
        if "weights" not in str(error):
            raise
        raise OSError(f"{error} {advice}") from error


# Types of arguments.


def rate(text: str) -> float:
    """Return a number between 0 and 1; where per cent seem to be meant, the error says what they are."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if 0 < value < 1 and not text.endswith("%"):
        return value
    hint = f"{value / 100:g} is {value:g} %" if 0 < value < 100 else "0.05 is 5 %"
    raise argparse.ArgumentTypeError(f"{text} is not a rate between 0 and 1: {hint}")


def bandwidth(text: str) -> float | str:
    """Return a number, or the name of a rule."""
    names = ("scott", "silverman", "loo")
    if text in names:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor one of {', '.join(names)}") from None


def layers(text: str) -> list[str]:
    """Return names of layers, which commas separate."""
    return text.split(",")


def filled(text: str) -> str:
    """Return a text that is not empty, as that of an unset variable of a shell would be."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty. Leave the option out, or name something")
    return text


def file_path(text: str) -> Path:
    """Return a path; an empty one, as of an unset variable of a shell, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty. For the current folder use '.'")
    return Path(text)


def positive(text: str) -> int:
    """Return a number of things, at least 1."""
    try:
        n = int(text)
    except ValueError:
        n = 0
    if n < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return n


def shard(text: str) -> tuple[int, int]:
    """Return K and N of "K/N": the K-th of N parts."""
    try:
        k, n = map(int, text.split("/"))
    except ValueError:
        k, n = 0, 1
    if not 1 <= k <= n:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not K/N with K from 1 to N, such as 3/16. Where jobs are counted from 0, add 1"
        )
    return k, n


def n_components(text: str) -> int | float | str:
    """Return a number, or "auto"."""
    if text == "auto":
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'")
