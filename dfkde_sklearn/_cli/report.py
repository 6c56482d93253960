"""``dfkde report``: a page on a fitted detector and the images that it scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dfkde_sklearn._cli.arguments import add_force_argument, add_quiet_argument, file_path
from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.files import check_new, write_new
from dfkde_sklearn._cli.images import add_images_argument, image_paths, paths_at
from dfkde_sklearn._cli.labelled import is_labelled, labelled_images
from dfkde_sklearn._cli.models import add_extractor_arguments, add_model_argument, loaded_detector
from dfkde_sklearn._cli.output import print_facts, say, shows_progress


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "report",
        help="write a page on a fitted detector and the images that it scores",
        description="Score images with a detector that dfkde fit saved, and write one HTML page, which needs nothing "
        "but a browser: the threshold and what it promises, the distribution of the scores, what other thresholds "
        "would give, pictures of the least normal and of the borderline images, and a table of all images. Needs "
        "jinja2: pip install 'dfkde-sklearn[report]'.",
        epilog="Example: dfkde report dfkde-model.safetensors incoming -o report.html",
    )
    add_model_argument(command)
    add_images_argument(
        command,
        "the images; if it is one folder with a folder called 'good' for good images, and others beside it for each "
        "kind of defective ones, as in MVTec AD, the page has the ROC curve, the confusion table and the mistakes too, "
        "and the masks in ground_truth",
    )
    command.add_argument(
        "-o",
        "--output",
        type=file_path,
        default=Path("dfkde-report.html"),
        metavar="FILE",
        help="the page (default: %(default)s)",
    )
    command.add_argument("--title", help="the heading of the page (default: the names of MODEL and IMAGES)")
    command.add_argument(
        "--training",
        metavar="FOLDER",
        help="the training images: each picture then comes with those that are most like it",
    )
    command.add_argument(
        "--skip-broken",
        action="store_true",
        help="continue if an image cannot be read: it is `broken` in the table, with the reason",
    )
    add_extractor_arguments(command)
    add_force_argument(command)
    add_quiet_argument(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    check_new(options.output, options.force)
    y = masks = None
    if is_labelled(options):
        test, where = labelled_images(options)
        paths, y, masks = test.X_test.tolist(), test.defects_test, test.masks_test
        source = f"{len(paths)} labelled images in {where}"
    else:
        paths = image_paths(options)
        source = f"{len(paths)} images"
    training = None if options.training is None else paths_at(options.training)
    from dfkde_sklearn._report.html import report_page

    detector = loaded_detector(options)
    # The bar is that of all images, and not one for each few.
    detector.features_.set_params(verbose=False)
    say(options, f"Scoring {source}")
    page = report_page(
        detector,
        paths,
        y=y,
        masks=masks,
        training_images=training,
        title=options.title or ": ".join([options.model.name, ", ".join(options.images or [])]).removesuffix(": "),
        skip_broken=options.skip_broken,
        verbose=shows_progress(options),
    )
    write_new(options.output, page, options.force)
    print_facts({"Images": source, "Report": f"{options.output}, {len(page) / 2**20:.1f} MiB"})
    return DONE
