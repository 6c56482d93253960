"""``dfkde demo``: the method on generated images, without a network and without data."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkde_sklearn._cli.arguments import (
    POSITIONS,
    add_detector_arguments,
    add_force_argument,
    add_quiet_argument,
    detector_class,
    detector_parameters,
    file_path,
)
from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.files import check_new, check_png, png, write_new
from dfkde_sklearn._cli.output import (
    N_WORST,
    numbers,
    percent,
    print_facts,
    print_line,
    print_table,
    say,
    shows_progress,
)

if TYPE_CHECKING:
    from PIL import Image
    from sklearn.utils import Bunch

    from dfkde_sklearn import Assessment
    from dfkde_sklearn._report.contact_sheet import Section, Tile

MATERIALS = ("weave", "twill", "knit", "mesh", "metal", "wood", "leather", "granite")
PICTURE = "dfkde-demo.png"
# As many good test images as a narrow interval of the false-alarm rate takes.
N_TRAIN, N_GOOD, N_DEFECTIVE = 200, 300, 100


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "demo",
        help="try it on generated images; needs no network and no data",
        description="Generate images of a material, fit a detector on good ones, and score a test set of good and "
        "defective ones. Prints the detection quality and draws a picture of the result. Needs no network and no data, "
        "and takes less than a minute.",
        epilog="Example: dfkde demo --images cloth, and then dfkde fit cloth --features scattering",
    )
    command.add_argument(
        "--out",
        type=file_path,
        metavar="PATH",
        help=f"the picture: a name that ends in .png, or a folder for {PICTURE}, which replaces an earlier one there "
        "(default: the current folder)",
    )
    command.add_argument(
        "--material",
        choices=MATERIALS,
        default="weave",
        help="the material in the images (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="determines the images (default: %(default)s)")
    command.add_argument(
        "--images",
        type=file_path,
        metavar="FOLDER",
        help="also write the images to this new folder, in the MVTec layout, to try fit and score on",
    )
    add_detector_arguments(command)
    add_force_argument(command)
    add_quiet_argument(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    import numpy as np
    from PIL import Image
    from sklearn.metrics import roc_auc_score

    from dfkde_sklearn import PatchDFKDEDetector, ScatteringFeatures, datasets
    from dfkde_sklearn._cli.summary import detector_facts, worst_first
    from dfkde_sklearn._report.contact_sheet import contact_sheet
    from dfkde_sklearn._report.overlay import overlay
    from dfkde_sklearn._report.quality import quality_facts

    start = time.perf_counter()
    picture, replace = _picture_file(options.out, options.force)
    check_new(picture, replace)
    material, n_test = options.material, N_GOOD + N_DEFECTIVE
    say(
        options,
        f"1/4 Generating images of {material}: {N_TRAIN} good ones for the fit, {N_GOOD} good and {N_DEFECTIVE} "
        "defective ones for the test",
    )
    data = datasets.make_textures(
        N_TRAIN, n_test, material=material, anomaly_fraction=N_DEFECTIVE / n_test, random_state=options.seed
    )
    if options.images is not None:
        datasets.write_mvtec_folder(data, options.images)
    say(options, "2/4 Fitting the detector")
    features = ScatteringFeatures(
        pooling=None if options.detector == POSITIONS else "statistics", verbose=shows_progress(options)
    )
    detector = detector_class(options)(features, **detector_parameters(options)).fit(data.X_train)
    say(options, f"3/4 Scoring the {n_test} test images")
    pictures = [Image.fromarray(image) for image in data.X_test]
    if isinstance(detector, PatchDFKDEDetector):
        assessment, maps = detector.assess_with_maps(data.X_test)
        pictures = [
            overlay(picture, of_image, detector.map_offset_, detector.threshold_steepness)
            for picture, of_image in zip(pictures, maps, strict=True)
        ]
        pixels = roc_auc_score(data.masks_test.ravel(), -np.concatenate([of_image.ravel() for of_image in maps]))
    else:
        assessment, pixels = detector.assess(data.X_test), None
    say(options, "4/4 Drawing the picture")
    quality = quality_facts(assessment, data.y_test, data.defects_test)
    if pixels is not None:
        quality["AUROC of pixels"] = f"{pixels:.3f}"
    sheet = contact_sheet(
        f"dfkde demo: {material}",
        [
            *(f"{name}: {value}" for name, value in quality.items()),
            "Bars: red is called anomalous, green is called normal. Orange lines: the true defects.",
            *(["Red, within yellow lines: the positions that the detector calls anomalous."] if pixels else []),
        ],
        _sections(data, pictures, assessment),
    )
    write_new(picture, png(sheet), replace)

    print_facts(
        {
            "Training": f"{N_TRAIN} good images of {material}, seed {options.seed}",
            **detector_facts(detector),
            "False alarms asked for": percent(detector.target_fpr),
            **quality,
        }
    )
    print_table(
        f"The {N_WORST} most anomalous of the {n_test} test images:",
        ("rank", "index", "defect", "score", "P(anomalous)", "p-value"),
        [
            (
                str(rank),
                str(i),
                data.defects_test[i],
                *numbers(assessment.log_density[i], assessment.p_anomalous[i], assessment.p_value[i]),
            )
            for rank, i in enumerate(worst_first(assessment)[:N_WORST], 1)
        ],
    )
    print_line()
    if options.images is not None:
        print_facts({"Images": f"{options.images}, for dfkde fit and dfkde score"})
    print_facts({"Picture": str(picture), "Time": f"{time.perf_counter() - start:.1f} s"})
    return DONE


def _picture_file(out: Path | None, force: bool) -> tuple[Path, bool]:
    """Return the file of the picture, and whether it may replace another: a file of the demo's own name may."""
    if out is None:
        return Path(PICTURE), True
    if out.suffix and not out.is_dir():
        check_png(out)
        return out, force
    out.mkdir(parents=True, exist_ok=True)
    return out / PICTURE, True


def _sections(data: Bunch, pictures: Sequence[Image.Image], assessment: Assessment) -> list[Section]:
    from dfkde_sklearn._cli.summary import worst_first
    from dfkde_sklearn._report.contact_sheet import COLUMNS, Section, Tile

    def tiles(indices: Iterable[int]) -> list[Tile]:
        return [
            Tile(
                pictures[i],
                f"{data.defects_test[i]} ({i})",
                f"score {assessment.log_density[i]:.1f}, P {assessment.p_anomalous[i]:.2f}",
                bool(assessment.label[i] == -1),
                data.masks_test[i],
            )
            for i in indices
        ]

    order = worst_first(assessment)
    good = [i for i in order if data.y_test[i] == 0]
    missed = [i for i in order if data.y_test[i] == 1 and assessment.label[i] == 1]
    evenly = [good[round(step * (len(good) - 1) / (COLUMNS - 1))] for step in range(COLUMNS)]
    n_missed = f"{len(missed)} of {int(data.y_test.sum())} defects"
    return [
        Section(f"The {N_WORST} most anomalous of {len(data.y_test)} test images", tiles(order[:N_WORST])),
        Section(f"Missed ({n_missed}), the most normal ones", tiles(missed[::-1][:COLUMNS])),
        Section("Good images, from the least to the most normal one", tiles(evenly)),
    ]
