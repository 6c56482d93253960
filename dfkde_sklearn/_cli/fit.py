"""``dfkde fit``: a detector from a folder of good images."""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils import Bunch

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures, TimmFeatures, datasets
from dfkde_sklearn._cli.arguments import (
    DEFAULTS,
    DETECTORS,
    PATCH_DEFAULTS,
    POSITIONS,
    add_detector_arguments,
    add_output_arguments,
    add_run_arguments,
    detector_parameters,
    given,
    weights_advice,
)
from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.files import check_new, image_paths
from dfkde_sklearn._cli.groups import image_groups
from dfkde_sklearn._cli.output import percent, print_facts, print_table, say, shows_progress
from dfkde_sklearn._cli.summary import detector_facts, print_evaluation
from dfkde_sklearn._features.network import CROPS

# Training images that are listed as the least normal ones.
N_LOWEST = 5


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "fit",
        help="fit a detector to a folder of good images",
        description="Fit a detector to good images, and save it. Prints the threshold, the false-alarm rate to expect, "
        "and the training images that look least normal.",
        epilog="The file of the detector holds no code. dfkde score reads it, and DFKDEDetector.load in Python.",
    )
    command.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="good images, in this folder and below it; or a folder in the MVTec layout: then those in "
        "FOLDER/train/good, and if there is a FOLDER/test, the detection quality on it is printed",
    )
    command.add_argument(
        "--model",
        type=Path,
        default=Path("dfkde-model.safetensors"),
        metavar="FILE",
        help="the file for the detector (default: %(default)s)",
    )
    group = command.add_argument_group("the feature extractor")
    group.add_argument(
        "--features",
        default=TimmFeatures().backbone,
        metavar="NAME",
        help="a pretrained backbone of timm, whose weights are downloaded at the first use; or `scattering`: fixed "
        "filters, which need no download and usually detect fewer defects (default: %(default)s)",
    )
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="the weights of the backbone, as safetensors or a state dict; nothing is downloaded then",
    )
    group.add_argument(
        "--layers",
        type=_layers,
        metavar="A,B,...",
        help="layers of the backbone (default: those of stride 8 and 16; of the pooled detector its pooled embedding)",
    )
    group.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width that images are resized to")
    group.add_argument(
        "--tile-size",
        type=int,
        metavar="PIXELS",
        help="height and width of overlapping tiles of the resized image, which go through the backbone singly, for "
        "small defects in large images; needs --image-size",
    )
    group.add_argument(
        "--crop",
        choices=CROPS,
        help="how an image becomes a square for the backbone: 'squash', resized without its proportions; 'center', cut "
        "out, which loses the edges; or 'border', resized with its proportions, with a border around it (default: "
        f"{TimmFeatures().crop})",
    )
    group.add_argument(
        "--white-level",
        type=int,
        metavar="VALUE",
        help="the value of white in 16-bit images: 4095 for 12 bits in 16-bit files (default: 65535)",
    )
    add_run_arguments(group)
    threshold = add_detector_arguments(command)
    threshold.add_argument(
        "--contamination",
        type=float,
        metavar="SHARE",
        help="the share of the training images that is anomalous, which sets the threshold instead of --target-fpr",
    )
    command.add_argument(
        "--confidence",
        type=float,
        metavar="PROBABILITY",
        help="the probability with which --target-fpr holds for this detector, such as 0.9; with --groups it is then "
        "the share of new parts of which any image is called anomalous (default: it holds on average over detectors)",
    )
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        help=f"determines which images are used if there are more than {PATCH_DEFAULTS['max_samples']}, with the "
        f"pooled detector {DEFAULTS['max_samples']} (default: %(default)s)",
    )
    command.add_argument(
        "--groups",
        metavar="RULE",
        help="which images show the same part, so that the threshold holds for new parts: 'folder', those in one "
        "folder; FILE.csv, a table with the columns path and group; or a regular expression for the path of an image "
        "below FOLDER, whose parentheses enclose the name of the part, such as '(part[0-9]+)_'",
    )
    add_output_arguments(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    check_new(options.model, options.force)
    train, test = _training_images(options.folder)
    groups = None if options.groups is None else image_groups(options.groups, train, options.folder)
    detector = DETECTORS[options.detector](
        _feature_extractor(options),
        **detector_parameters(options),
        **given(options, "contamination", "confidence"),
        device=options.device,
        random_state=options.seed,
    )
    # The number of folders is printed, since sub-folders of defects among the good images would go unnoticed.
    n_folders = len({Path(path).parent for path in train})
    source = f"{len(train)} images in {n_folders} folder{'s' * (n_folders > 1)}"
    if groups is not None:
        source += f", of {len(set(groups))} parts"
    say(options, f"Fitting a detector to {source}")
    with weights_advice("On the command line: --weights FILE, or --features scattering, which needs no weights."):
        detector.fit(train, groups=groups)
    _save(detector, options.model, options.force)

    print_facts(
        {
            "Training": f"{source}, {options.folder}",
            **detector_facts(detector),
            **_expected_rate(options, len(np.unique(detector.calibration_groups_))),
            "Model": f"{options.model}, for dfkde score",
        }
    )
    scores = detector.calibration_scores_
    print_table(
        "The training images with the lowest held-out scores; check that they are good:",
        ("path", "score", "less threshold"),
        [(train[i], f"{scores[i]:.2f}", f"{scores[i] - detector.offset_:.2f}") for i in np.argsort(scores)[:N_LOWEST]],
    )
    if test is not None:
        say(options, f"Scoring {len(test.X_test)} test images")
        print_evaluation(detector, test, str(options.folder / "test"))
    return DONE


def _training_images(folder: Path) -> tuple[list[str], Bunch | None]:
    """Return the paths of the good images, and the test set of a folder in the MVTec layout."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder. Put the good images into one.")
    good = folder / "train" / "good"
    if good.is_dir() and not (folder / "test").is_dir():
        return image_paths(good), None
    # Read as a plain folder, these would make defects and masks part of the training images.
    part_of_layout = any((folder / name).is_dir() for name in ("test", "ground_truth"))
    if part_of_layout or any(folder.glob("*/train/good")):
        data = datasets.load_mvtec_folder(folder)
        return data.X_train.tolist(), data
    return image_paths(folder), None


def _feature_extractor(options: argparse.Namespace) -> ScatteringFeatures | TimmFeatures:
    parameters = given(
        options, "layers", "weights", "crop", "image_size", "tile_size", "white_level", "batch_size", "cache", "device"
    )
    parameters["verbose"] = shows_progress(options)
    if options.detector == POSITIONS:
        parameters["pooling"] = None
    if options.features != "scattering":
        if "weights" in parameters:
            # The model may be used from another folder.
            parameters["weights"] = os.path.realpath(parameters["weights"])
        return TimmFeatures(options.features, **parameters)
    for name in ("layers", "weights", "crop", "tile_size"):
        if name in parameters:
            raise ValueError(f"--{name.replace('_', '-')} is for a backbone; --features scattering has none.")
    return ScatteringFeatures(**parameters)


def _save(detector: DFKDEDetector | PatchDFKDEDetector, path: Path, force: bool) -> None:
    check_new(path, force)
    saved = copy.copy(detector)
    extractor: Any = copy.copy(detector.features_)
    # Progress bars belong to this run, not to the model.
    saved.features_ = extractor.set_params(verbose=False)
    saved.save(path)


def _expected_rate(options: argparse.Namespace, n_units: int) -> dict[str, str]:
    """Return the rate of anomalous images to expect with this threshold, from `n_units` images or groups of them."""
    if options.contamination is not None:
        return {"Anomalies expected": f"{percent(options.contamination)} of images like these"}
    units = "images" if options.groups is None else "parts"
    if options.confidence is not None:
        return {
            "False alarms expected": f"at most {percent(options.target_fpr)} of new good {units}, with "
            f"{percent(options.confidence)} confidence"
        }
    expected = f"{percent(options.target_fpr)} of new good images"
    lowest = 1 / (n_units + 1)
    if options.target_fpr < lowest:
        expected += f"; but {n_units} {units} cannot tell a rate below {percent(lowest)}: use more of them"
    return {"False alarms expected": expected}


def _layers(text: str) -> list[str]:
    return text.split(",")
