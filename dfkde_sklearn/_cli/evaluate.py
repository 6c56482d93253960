"""``dfkde evaluate``: how well a fitted detector does on images whose kind is known."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkde_sklearn._cli.arguments import add_quiet_argument
from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.images import add_images_argument, folders_of, image_paths, single_folder
from dfkde_sklearn._cli.models import add_extractor_arguments, add_model_argument, loaded_detector
from dfkde_sklearn._cli.output import print_facts, say

if TYPE_CHECKING:
    from sklearn.utils import Bunch


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "evaluate",
        help="measure a fitted detector on good and defective images",
        description="Measure a detector that dfkde fit saved on images whose kind is known: AUROC, false alarms and "
        "defects found, and what other thresholds would give; with masks also the AUROC of pixels and the AUPRO.",
        epilog="Example: dfkde evaluate dfkde-model.safetensors parts/test, where parts/test/good holds good parts, "
        "and the other folders in parts/test defective ones.",
    )
    add_model_argument(command)
    add_images_argument(
        command,
        "a folder with a folder for each kind of image, of which 'good' holds the good ones; or one that has such a "
        "folder called test, and beside it masks in ground_truth, as in MVTec AD; or images, of which each is of the "
        "kind that its folder is named after",
    )
    add_extractor_arguments(command)
    add_quiet_argument(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dfkde_sklearn._cli.summary import detector_facts, print_evaluation

    test, where = _labelled(options)
    detector = loaded_detector(options)
    say(options, f"Scoring {len(test.X_test)} images")
    print_facts({"Model": str(options.model)} | detector_facts(detector))
    print_evaluation(detector, test, where)
    return DONE


def _labelled(options: argparse.Namespace) -> tuple[Bunch, str]:
    """Return the labelled images, as `load_mvtec_folder` does, and where they are."""
    import numpy as np
    from sklearn.utils import Bunch

    from dfkde_sklearn.datasets._mvtec import NORMAL, load_test_folder

    folder = single_folder(options)
    if folder is not None:
        root = folder / "test" if (folder / "test").is_dir() else folder
        kinds = [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    else:
        paths = image_paths(options)
        kinds = [Path(path).absolute().parent.name for path in paths]
    if NORMAL not in kinds:
        where = "The images are in" if folder is None else f"{root} has"
        raise ValueError(
            f"{where} no folder {NORMAL!r}, but {', '.join(map(repr, sorted({*kinds}))) or 'no folders'}. Put good "
            "images into a folder of that name, and defective ones into folders beside it."
        )
    if folder is not None:
        return Bunch(**load_test_folder(root, folder / "ground_truth")), str(folder)
    defects = np.array(kinds)
    test = Bunch(
        X_test=np.array(paths),
        y_test=(defects != NORMAL).astype(np.int64),
        defects_test=defects,
        masks_test=np.full(len(paths), None),
    )
    return test, folders_of(paths)
