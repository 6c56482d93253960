"""``dfkde score``: scores and verdicts of images, from a detector that ``dfkde fit`` saved."""

from __future__ import annotations

import argparse
import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dfkde_sklearn import Assessment, DFKDEDetector, DriftMonitor, PatchDFKDEDetector
from dfkde_sklearn._cli.arguments import add_output_arguments, weights_advice
from dfkde_sklearn._cli.exit_codes import DONE, FAILED, NOT_ALL_NORMAL
from dfkde_sklearn._cli.files import check_new, check_png, image_paths, png, write_new
from dfkde_sklearn._cli.models import WEIGHTS_OF_MODEL, add_extractor_arguments, add_model_argument, loaded_detector
from dfkde_sklearn._cli.output import (
    numbers,
    one_line,
    print_bytes,
    print_message,
    print_table,
    say,
)
from dfkde_sklearn._cli.summary import N_WORST, worst_first
from dfkde_sklearn._images import as_images
from dfkde_sklearn._maps import image_maps
from dfkde_sklearn._report.contact_sheet import Section, Tile, contact_sheet
from dfkde_sklearn._report.overlay import mask, overlay

STDOUT = Path("-")


class _Row(NamedTuple):
    """A row of the table; the numbers are None for an image that cannot be read."""

    path: str
    score: np.floating | None
    p_anomalous: np.floating | None
    p_value: np.floating | None
    verdict: str
    reason: str


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "score",
        help="score images with a fitted detector",
        description="Score images with a detector that dfkde fit saved. Prints for each image its score (natural log "
        "of a density; higher is more normal), P(anomalous), the p-value (the share of good images with a score as "
        "low) and the verdict: normal, anomalous or, with --skip-broken, broken.",
        epilog="Exit code: 0 on success; 2 on an error, such as a broken image without --skip-broken. With "
        "--exit-code: 0 if all images are normal; 1 if some are anomalous or broken; 2 on an error.",
    )
    add_model_argument(command)
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="image files, and folders of them")
    command.add_argument(
        "--fdr",
        type=float,
        metavar="SHARE",
        help="of the images that are called anomalous, at most this share is good, on average: for a batch of parts, "
        "in place of the threshold of the model",
    )
    command.add_argument(
        "--sort",
        choices=("score", "input"),
        default="score",
        help="the order of the table: by score, the least normal image first, or as the images were given (default: "
        "%(default)s)",
    )
    command.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write the table to a CSV file; - prints it as CSV instead"
    )
    command.add_argument(
        "--monitor",
        type=Path,
        metavar="FILE",
        help="keep in this file, from run to run, whether the images, in the order in which they are given, still look "
        "like the training images; it is made if it does not exist. An alarm is printed, and --exit-code counts it. "
        "Each image counts as a part of its own",
    )
    command.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help=f"also draw a picture of the {N_WORST} least normal images"
    )
    command.add_argument(
        "--maps",
        type=Path,
        metavar="FOLDER",
        help="also write into this folder, which is made if it does not exist, each image with its anomalous positions "
        "in red: IMAGE.map.png; needs a detector of positions",
    )
    command.add_argument(
        "--masks",
        action="store_true",
        help="with --maps, also write IMAGE.mask.png: white where the image is anomalous, else black",
    )
    command.add_argument(
        "--skip-broken",
        action="store_true",
        help="continue if an image cannot be read: it is reported on standard error, and is `broken` in the table",
    )
    command.add_argument("--exit-code", action="store_true", help="exit with 1 unless all images are normal; see below")
    add_extractor_arguments(command)
    add_output_arguments(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    csv_file = None if options.csv == STDOUT else options.csv
    for path in filter(None, (csv_file, options.sheet)):
        check_new(path, options.force)
    if options.sheet is not None:
        check_png(options.sheet)
        if csv_file is not None and os.path.realpath(csv_file) == os.path.realpath(options.sheet):
            raise ValueError(f"{csv_file}: --csv and --sheet name the same file. Name two.")
    if options.masks and options.maps is None:
        raise ValueError("--masks writes into the folder of --maps. Give --maps FOLDER too.")
    # A file that two arguments name is scored once.
    paths = list(dict.fromkeys(path for images in options.images for path in image_paths(images)))
    map_files = _map_files(options, paths)
    with weights_advice(WEIGHTS_OF_MODEL):
        detector = loaded_detector(options)
        if options.maps is not None and not isinstance(detector, PatchDFKDEDetector):
            raise ValueError(
                f"MODEL {options.model} is a pooled detector, which has no maps. Leave --maps out, or fit a detector "
                "of positions."
            )
        if options.fdr is not None:
            detector._check_fdr(options.fdr)
        monitor = _monitor(options.monitor, detector)
        say(options, f"Scoring {len(paths)} images")
        assessment, grid_maps, broken = _assess(detector, paths, options.skip_broken)
    if options.fdr is not None:
        selected = detector._selected(assessment.log_density, options.fdr)
        assessment = assessment._replace(label=np.where(selected, -1, 1))
    for reason in broken.values():
        print_message(f"dfkde score: skipped: {one_line(reason)}")
    readable = [path for path in paths if path not in broken]
    rows = {path: _Row(path, None, None, None, "broken", reason) for path, reason in broken.items()}
    for path, score, p_value, p_anomalous, label in zip(readable, *assessment, strict=True):
        rows[path] = _Row(path, score, p_anomalous, p_value, "anomalous" if label == -1 else "normal", "")
    by_score = [rows[readable[i]] for i in worst_first(assessment)]
    table = [*(rows[path] for path in broken), *by_score] if options.sort == "score" else [rows[path] for path in paths]
    n_anomalous = int((assessment.label == -1).sum())
    summary = f"{n_anomalous} of {len(readable)} images are anomalous."

    # The files come before the table, so that they are written even if the reader of the table closes its pipe; and if
    # they cannot be written, on a full disk say, the table is printed all the same.
    failed = False
    outputs: list[tuple[Path | None, Callable[[], bytes]]] = [
        (csv_file, lambda: _csv(table)),
        (options.sheet, lambda: _sheet(options.model.name, summary, by_score[:N_WORST], shown)),
    ]
    shown: dict[str, _ShownMap] = {}
    if isinstance(detector, PatchDFKDEDetector):
        shown = {path: _ShownMap(detector, path, of_grid) for path, of_grid in zip(readable, grid_maps, strict=True)}
    if options.maps is not None:
        options.maps.mkdir(parents=True, exist_ok=True)
        for path, of_image in shown.items():
            outputs += zip(map_files[path], (of_image.overlay, of_image.mask), strict=False)
    for path, content in outputs:
        try:
            if path is not None:
                write_new(path, content(), options.force)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print_message(f"dfkde score: error: {one_line(error)}")
            failed = True
    if monitor is not None:
        monitor.update_scores(assessment.log_density)
    # After a run that failed, and will be repeated, its images are not counted.
    if monitor is not None and not failed:
        try:
            monitor.save(options.monitor)
        except OSError as error:
            print_message(f"dfkde score: error: {one_line(error)}")
            failed = True
    if options.csv == STDOUT:
        print_bytes(_csv(table))
    else:
        print_table(
            None,
            ("path", "score", "P(anomalous)", "p-value", "verdict"),
            [(row.path, *numbers(row.score, row.p_anomalous, row.p_value), row.verdict) for row in table],
        )
    if monitor is not None:
        print_message(f"dfkde score: {monitor.describe()}")
    say(options, summary + (f" {len(broken)} could not be read." if broken else ""))
    if failed:
        return FAILED
    is_alarm = monitor is not None and monitor.alarm_ is not None
    return NOT_ALL_NORMAL if options.exit_code and (n_anomalous or broken or is_alarm) else DONE


class _ShownMap:
    """The pictures of the map of an image, made when they are written."""

    def __init__(self, detector: PatchDFKDEDetector, path: str, of_grid: NDArray[np.floating]) -> None:
        self.detector, self.path, self.of_grid = detector, path, of_grid

    def picture(self) -> Image.Image:
        """Return the image with its anomalous positions in red."""
        picture = as_images(self.path)[0]
        of_image = self._of_shape((picture.height, picture.width))
        return overlay(picture, of_image, self.detector.map_offset_, self.detector.threshold_steepness)

    def overlay(self) -> bytes:
        """Return the same as a PNG."""
        return png(self.picture())

    def mask(self) -> bytes:
        """Return the anomalous positions as a PNG."""
        return png(mask(self._of_shape(as_images(self.path).shape(0)), self.detector.map_offset_))

    def _of_shape(self, shape: tuple[int, int]) -> NDArray[np.floating]:
        return next(image_maps(self.of_grid[None], [shape]))


def _monitor(path: Path | None, detector: DFKDEDetector | PatchDFKDEDetector) -> DriftMonitor | None:
    """Return the monitor in a file, or a new one where there is no such file."""
    if path is None:
        return None
    if path.exists():
        return DriftMonitor.load(path, detector)
    check_new(path, force=False)
    return DriftMonitor(detector)


def _map_files(options: argparse.Namespace, paths: list[str]) -> dict[str, list[Path]]:
    """Return the files for the map of each image, none of which exists without --force."""
    if options.maps is None:
        return {}
    kinds = ("map", "mask") if options.masks else ("map",)
    # As in the folders that the images are in, where they are in several.
    places = {path: Path(path).absolute() for path in paths}
    root = os.path.commonpath([place.parent for place in places.values()])
    files = {}
    for path, place in places.items():
        name = "_".join(place.relative_to(root).parts)
        files[path] = [options.maps / f"{name}.{kind}.png" for kind in kinds]
    if options.maps.exists():
        for of_image in files.values():
            for file in of_image:
                check_new(file, options.force)
    return files


def _assess(
    detector: DFKDEDetector | PatchDFKDEDetector, paths: list[str], skip_broken: bool
) -> tuple[Assessment, Any, dict[str, str]]:
    """Return the assessment of the readable images, their maps, and the others with the reason.

    Those are skipped if that is asked for, else an error. The maps are on the grid, and None of a pooled detector.
    """

    def answers(images: list[str]) -> tuple[Assessment, Any]:
        if isinstance(detector, PatchDFKDEDetector):
            return detector.assess_with_maps(images, resolution="grid")
        return detector.assess(images), None

    try:
        return *answers(paths), {}
    except (ValueError, OSError):
        # Most folders have no broken image: only where something is wrong is there a second pass.
        broken = _broken(paths) if skip_broken else {}
        if not broken:
            raise
    readable = [path for path in paths if path not in broken]
    if not readable:
        raise ValueError(f"None of the {len(paths)} images can be read. {next(iter(broken.values()))}")
    return *answers(readable), broken


def _broken(paths: list[str]) -> dict[str, str]:
    """Return the images that cannot be read, each with the reason."""
    images, broken = as_images(paths), {}
    for i, path in enumerate(paths):
        try:
            images[i]
        except (ValueError, OSError) as error:
            broken[path] = str(error)
    return broken


def _csv(rows: list[_Row]) -> bytes:
    text = io.StringIO()
    # csv quotes a carriage return only where lines end with one.
    lines = SimpleNamespace(write=lambda line: text.write(line.removesuffix("\r\n") + "\n"))
    writer = csv.writer(lines, lineterminator="\r\n")
    writer.writerow(_Row._fields)
    writer.writerows(rows)
    # Names of files are bytes, and not always UTF-8.
    return text.getvalue().encode("utf-8", "surrogateescape")


def _sheet(model: str, summary: str, rows: list[_Row], shown: dict[str, _ShownMap]) -> bytes:
    """Return a PNG of images, the least normal one first, with their maps if there are any."""
    tiles = [
        Tile(
            shown[row.path].picture() if shown else as_images(row.path)[0],
            row.path,
            f"{rank}: score {row.score:.1f}, P {row.p_anomalous:.2f}",
            row.verdict == "anomalous",
        )
        for rank, row in enumerate(rows, 1)
    ]
    return png(
        contact_sheet(
            f"dfkde score: {model}",
            [
                summary,
                "Bars: red is called anomalous, green is called normal.",
                *(["Red, within yellow lines: the positions that are called anomalous."] if shown else []),
            ],
            [Section(f"The {len(tiles)} least normal images", tiles)],
        )
    )
