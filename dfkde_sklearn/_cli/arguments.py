"""What may be said on the command line, and what the help says of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from dfkde_sklearn import __version__
from dfkde_sklearn._features.network import TimmFeatures
from dfkde_sklearn.datasets._surfaces import MATERIALS

DEMO_PICTURE = "dfkde-demo.png"
# Images on a contact sheet that shows the worst.
N_WORST = 12
RESIDUALS: dict[str, Literal["gaussian", "box"] | None] = {"none": None, "gaussian": "gaussian", "box": "box"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, whose `command` is demo, fit, score or cache."""
    found = argparse.ArgumentParser(
        prog="dfkde",
        description="Find the images that do not look like good ones. It learns from good images alone: the density of "
        "their deep features. Images where that density is low are called anomalous.",
        epilog="Start with `dfkde demo`; `dfkde COMMAND --help` tells more of each command. Results go to standard "
        "output, progress and errors to standard error. Exit code: 0 done, 2 an error; see `dfkde score --help` for 1.",
    )
    found.add_argument("--version", action="version", version=f"dfkde-sklearn {__version__}")
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_fit(commands)
    _add_score(commands)
    _add_cache(commands)
    return found


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo",
        help="show it on generated textures, with no network and no data",
        description="Generate images of a material, learn from good ones, and find the defective ones among others. "
        "Needs no network and no data, and takes less than a minute. Prints how well it did, and draws a picture.",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help=f"where the picture goes: a name that ends in .png, or a folder for {DEMO_PICTURE}, which replaces an "
        "earlier one there (default: the current folder)",
    )
    command.add_argument(
        "--material",
        choices=list(MATERIALS),
        default="weave",
        help="what the images show (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="determines the images (default: %(default)s)")
    command.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="also write the images to this new folder, in the MVTec layout, to try fit and score on",
    )
    _add_detector(command, residual="box")
    _add_common(command)


def _add_fit(commands: Any) -> None:
    command = commands.add_parser(
        "fit",
        help="learn from a folder of good images",
        description="Learn from good images, and save the detector. Prints the threshold, the rate of false alarms to "
        "expect, and the training images that look least normal.",
        epilog="The detector goes into a file that holds no code. dfkde score and, in Python, DFKDEDetector.load read "
        "it.",
    )
    command.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="good images, in it and below it; or a folder in the MVTec layout: then those in FOLDER/train/good, and "
        "where there is a FOLDER/test, it tells how well the detector does on that",
    )
    command.add_argument(
        "--model",
        type=Path,
        default=Path("dfkde-model.safetensors"),
        metavar="FILE",
        help="where the detector goes (default: %(default)s)",
    )
    group = command.add_argument_group("how images are described")
    group.add_argument(
        "--features",
        default=TimmFeatures().backbone,
        metavar="NAME",
        help="a backbone of timm, pretrained, whose weights are downloaded at the first use; or `scattering`: fixed "
        "filters, which need no download and as a rule find less (default: %(default)s)",
    )
    group.add_argument(
        "--weights", metavar="FILE", help="weights of the backbone, safetensors or a state dict, not downloaded"
    )
    group.add_argument(
        "--layers",
        type=_layers,
        metavar="A,B,...",
        help="layers of the backbone, each averaged over positions (default: its pooled embedding)",
    )
    group.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width that images are resized to")
    group.add_argument(
        "--white-level",
        type=int,
        metavar="VALUE",
        help="the value of 16-bit samples that is white: 4095 for 12 bits in 16-bit files (default: 65535)",
    )
    _add_extractor_run(group)
    group = _add_detector(command, residual="none")
    group.add_argument(
        "--contamination",
        type=float,
        metavar="SHARE",
        help="this share of the training images is anomalous; the threshold is set by it and not by --target-fpr",
    )
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        help="draws training images where there are more than 40000 (default: %(default)s)",
    )
    _add_common(command)


def _add_score(commands: Any) -> None:
    command = commands.add_parser(
        "score",
        help="tell which images are anomalous",
        description="Score images with a detector that `dfkde fit` saved. Prints for each its score (natural log of a "
        "density; higher is more normal), P(anomalous), the p-value (the share of good images that score as low) and "
        "the verdict.",
        epilog="Exit code: 0 done; 2 an error, such as a broken image without --skip-broken. With --exit-code: 0 all "
        "images are normal; 1 some are anomalous, or were skipped as broken; 2 an error.",
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="a file from `dfkde fit` or DFKDEDetector.save")
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="image files, and folders of them")
    command.add_argument(
        "--sort",
        choices=("score", "input"),
        default="score",
        help="the order of the table: the least normal image first, or as the images were given (default: %(default)s)",
    )
    command.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write the table to FILE; - prints it as CSV instead"
    )
    command.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help=f"also draw a picture of the {N_WORST} least normal images"
    )
    command.add_argument(
        "--skip-broken",
        action="store_true",
        help="go on where an image cannot be read: it is named on standard error, and called broken in the table",
    )
    command.add_argument(
        "--exit-code", action="store_true", help="end with 1 where not all images are normal; see below"
    )
    group = command.add_argument_group("how images are described")
    group.add_argument("--weights", metavar="FILE", help="weights of the backbone, where they have moved since the fit")
    _add_extractor_run(group)
    _add_common(command)


def _add_cache(commands: Any) -> None:
    command = commands.add_parser(
        "cache",
        help="tell the size of a feature cache, or empty it",
        description="Tell how much is in a folder that dfkde fit and dfkde score use as --cache FOLDER, and feature "
        "extractors as cache=FOLDER in Python, or empty it. "
        "Features that are no longer there are computed again where they are needed.",
    )
    command.add_argument("action", choices=("size", "clear"), help="size: tell it; clear: empty it, then tell it")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the cache")


def _add_extractor_run(group: Any) -> None:
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="images described at once; does not change the result"
    )
    group.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keep the features in this folder, which is made where there is none, and describe no image again whose "
        "features are there; see dfkde cache",
    )
    group.add_argument(
        "--max-pixels",
        type=_n_pixels,
        default=Image.MAX_IMAGE_PIXELS,
        metavar="N",
        help="refuse images of more pixels than this, since a small file can hold a huge image (default: %(default)s)",
    )
    group.add_argument(
        "--device", help="cpu, cuda, cuda:1, ..., or mps (default: the first CUDA GPU that there is, else the CPU)"
    )


def _add_detector(command: argparse.ArgumentParser, residual: str) -> Any:
    """Add the parameters of the detector and return the group in which the threshold is set one way or another."""
    group = command.add_argument_group("the detector")
    group.add_argument(
        "--n-components",
        type=_n_components,
        default=16,
        metavar="N",
        help="principal components: at most N; or, between 0 and 1, the share of variance to keep; or 'auto', as many "
        "as hold for new images, which finds more defects as a rule (default: %(default)s)",
    )
    group.add_argument(
        "--residual",
        choices=tuple(RESIDUALS),
        default=residual,
        help="the term for what the components leave out; which is best depends on the images (default: %(default)s)",
    )
    threshold = group.add_mutually_exclusive_group()
    threshold.add_argument(
        "--target-fpr",
        type=float,
        default=0.05,
        metavar="RATE",
        help="the share of new good images that may be called anomalous (default: %(default)s)",
    )
    return threshold


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--force", action="store_true", help="overwrite files that exist; without it they are kept")
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")


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


def _layers(text: str) -> list[str]:
    return text.split(",")
