"""``dfkde fit``: a detector from good images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dfkde_sklearn._cli.arguments import (
    add_confidence_argument,
    add_detector_arguments,
    add_force_argument,
    add_quiet_argument,
    add_run_arguments,
    detector_class,
    detector_parameters,
    file_path,
    given,
    layers,
    rate,
    weights_advice,
)
from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.files import check_new
from dfkde_sklearn._cli.groups import add_groups_argument, image_groups
from dfkde_sklearn._cli.images import add_images_argument, described
from dfkde_sklearn._cli.models import MODEL, save_detector
from dfkde_sklearn._cli.output import print_facts, print_table, say
from dfkde_sklearn._cli.training import (
    WEIGHTS_ADVICE,
    add_features_arguments,
    feature_extractor,
    source_of,
    training_images,
)

# Training images that are listed as the least normal ones.
N_LOWEST = 5


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "fit",
        help="fit a detector to good images",
        description="Fit a detector to good images, and save it. Prints the threshold, the false-alarm rate to expect, "
        "and the training images that look least normal.",
        epilog="Example: dfkde fit parts/good. The file of the detector holds no code. dfkde score reads it, and "
        "PatchDFKDEDetector.load in Python.",
    )
    add_images_argument(
        command,
        "good images; or one folder in the MVTec layout: then those in its folder train/good, and if it has a folder "
        "test, the detection quality on that is printed",
    )
    command.add_argument(
        "-o",
        "--model",
        type=file_path,
        default=MODEL,
        metavar="FILE",
        help="the file for the detector (default: %(default)s)",
    )
    command.add_argument(
        "--training-rows",
        action="store_true",
        help="keep the features of the training images in the file, which may be hundreds of MB: dfkde update adds new "
        "ones",
    )
    group = command.add_argument_group("the feature extractor")
    add_features_arguments(group)
    group.add_argument(
        "--layers",
        type=layers,
        metavar="A,B,...",
        help="layers of the backbone, see dfkde layers (default: those of stride 8 and 16; of the pooled detector its "
        "pooled embedding)",
    )
    group.add_argument(
        "--tile-size",
        type=int,
        metavar="PIXELS",
        help="height and width of overlapping tiles of the resized image, which go through the backbone singly, for "
        "small defects in large images; needs --image-size",
    )
    add_run_arguments(group)
    threshold = add_detector_arguments(command)
    threshold.add_argument(
        "--contamination",
        type=rate,
        metavar="SHARE",
        help="the share of the training images that is anomalous, which sets the threshold instead of --target-fpr",
    )
    add_confidence_argument(
        command,
        "; with --groups it is then the share of new parts of which any image is called anomalous (default: it holds "
        "on average over detectors)",
    )
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        help="determines which images are used if there are more than 1000, with the pooled detector 40000 (default: "
        "%(default)s)",
    )
    add_groups_argument(command, "so that the threshold holds for new parts")
    add_force_argument(command)
    add_quiet_argument(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    import numpy as np

    from dfkde_sklearn._cli.summary import detector_facts, expected_rate, print_evaluation

    train, test = training_images(options)
    groups = image_groups(options, train)
    # After the images were looked at: --force is no answer to a wrong folder.
    check_new(options.model, options.force)
    detector = detector_class(options)(
        feature_extractor(options, options.layers, options.tile_size),
        **detector_parameters(options),
        **given(options, "contamination", "confidence"),
        device=options.device,
        random_state=options.seed,
    )
    source = described(train, groups)
    say(options, f"Fitting a detector to {source}")
    with weights_advice(WEIGHTS_ADVICE):
        # partial_fit keeps the rows, however many.
        (detector.partial_fit if options.training_rows else detector.fit)(train, groups=groups)
    save_detector(detector, options.model, options.force, training_rows=options.training_rows)

    print_facts(
        {
            "Training": f"{source}, {source_of(options)}",
            **detector_facts(detector),
            **expected_rate(detector),
            "Model": f"{options.model}, for dfkde score",
        }
    )
    scores = detector.calibration_scores_
    places = np.arange(len(train)) if detector._places is None else detector._places
    print_table(
        "The training images with the lowest held-out scores; check that they are good:",
        ("path", "score", "less threshold"),
        [
            (train[places[i]], f"{scores[i]:.2f}", f"{scores[i] - detector.offset_:.2f}")
            for i in np.argsort(scores)[:N_LOWEST]
        ],
    )
    if test is not None:
        say(options, f"Scoring {len(test.X_test)} test images")
        print_evaluation(detector, test, str(Path(options.images[0], "test")))
    return DONE
