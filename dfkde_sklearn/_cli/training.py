"""Good images to learn from, and how they are described: what ``dfkde fit`` and ``dfkde search`` share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkde_sklearn._cli.arguments import POSITIONS, filled, given
from dfkde_sklearn._cli.images import image_paths, paths_at, single_folder
from dfkde_sklearn._cli.output import shows_progress

if TYPE_CHECKING:
    from sklearn.utils import Bunch

    from dfkde_sklearn import ScatteringFeatures, TimmFeatures

SCATTERING, DEFAULT_FEATURES = "scattering", "resnet18.tv_in1k"
CROPS = ("squash", "center", "border")
# For `weights_advice`.
WEIGHTS_ADVICE = "On the command line: --weights FILE, or --features scattering, which needs no weights."


def add_features_arguments(group: Any) -> None:
    """Add the parameters of the feature extractor that decide what the features are, beside its layers."""
    group.add_argument(
        "--features",
        default=DEFAULT_FEATURES,
        metavar="NAME",
        help="a pretrained backbone of timm, whose weights are downloaded at the first use; or `scattering`: fixed "
        "filters, which need no download and usually detect fewer defects (default: %(default)s)",
    )
    group.add_argument(
        "--weights",
        type=filled,
        metavar="FILE",
        help="the weights of the backbone, as safetensors or a state dict; nothing is downloaded then",
    )
    group.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width that images are resized to")
    group.add_argument(
        "--crop",
        choices=CROPS,
        help="how an image becomes a square for the backbone: 'squash', resized without its proportions; 'center', cut "
        "out, which loses the edges; or 'border', resized with its proportions, with a border around it (default: "
        "squash)",
    )
    group.add_argument(
        "--reducing-gap",
        type=float,
        metavar="FACTOR",
        help="divide large images by an integer before they are resized, and leave them at least this many times as "
        "large; JPEG files of a camera are then read in a fraction of the time, and grey levels change by a few of 255 "
        "at most (2 is a good value; default: off)",
    )
    group.add_argument(
        "--engine",
        choices=("torch", "onnxruntime", "openvino"),
        help="what computes the backbone on the CPU; the latter two are extra packages, faster on single images and on "
        "some networks (default: torch)",
    )
    group.add_argument(
        "--white-level",
        type=int,
        metavar="VALUE",
        help="the value of white in 16-bit images: 4095 for 12 bits in 16-bit files (default: 65535)",
    )


def feature_extractor(
    options: argparse.Namespace, layers: Sequence[str] | None, tile_size: int | None = None
) -> ScatteringFeatures | TimmFeatures:
    """Return the extractor of the arguments, not fitted; layers of None are the default ones."""
    from dfkde_sklearn import ScatteringFeatures, TimmFeatures

    parameters = given(
        options,
        "weights",
        "crop",
        "image_size",
        "reducing_gap",
        "engine",
        "white_level",
        "batch_size",
        "cache",
        "device",
    ) | {name: value for name, value in (("layers", layers), ("tile_size", tile_size)) if value is not None}
    parameters["verbose"] = shows_progress(options)
    if options.detector == POSITIONS:
        parameters["pooling"] = None
    if options.features != SCATTERING:
        if "weights" in parameters:
            # The model may be used from another folder.
            parameters["weights"] = os.path.realpath(parameters["weights"])
        return TimmFeatures(options.features, **parameters)
    for name in ("layers", "weights", "crop", "reducing_gap", "engine", "tile_size"):
        if name in parameters:
            raise ValueError(f"--{name.replace('_', '-')} is for a backbone; --features scattering has none.")
    return ScatteringFeatures(**parameters)


def training_images(options: argparse.Namespace) -> tuple[list[str], Bunch | None]:
    """Return the paths of the good images, and the test set of a folder in the MVTec layout."""
    from dfkde_sklearn import datasets

    folder = single_folder(options)
    if folder is None:
        return image_paths(options), None
    good = folder / "train" / "good"
    if good.is_dir() and not (folder / "test").is_dir():
        return paths_at(str(good)), None
    # Read as a plain folder, these would make defects and masks part of the training images.
    part_of_layout = any((folder / name).is_dir() for name in ("test", "ground_truth"))
    if part_of_layout or any(folder.glob("*/train/good")):
        data = datasets.load_mvtec_folder(folder)
        return data.X_train.tolist(), data
    return image_paths(options), None


def source_of(options: argparse.Namespace) -> str:
    """Return where the images are, as they were named."""
    named = [*(options.images or []), *([f"those in {options.files_from}"] if options.files_from else [])]
    first = named[0] if named else "standard input"
    return f"{first} and {len(named) - 1} more" if len(named) > 1 else str(Path(first))
