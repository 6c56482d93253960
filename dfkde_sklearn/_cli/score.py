"""``dfkde score``: scores and verdicts of images, from a detector that ``dfkde fit`` saved."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkde_sklearn._cli.arguments import (
    add_confidence_argument,
    add_force_argument,
    add_quiet_argument,
    file_path,
    given,
    positive,
    rate,
    shard,
)
from dfkde_sklearn._cli.exit_codes import DONE, FAILED, NOT_ALL_NORMAL
from dfkde_sklearn._cli.files import check_distinct, check_new, check_png, write_new
from dfkde_sklearn._cli.groups import add_groups_argument, image_groups
from dfkde_sklearn._cli.images import add_images_argument, image_paths
from dfkde_sklearn._cli.models import add_extractor_arguments, add_model_argument, loaded_detector
from dfkde_sklearn._cli.output import (
    N_WORST,
    numbers,
    one_line,
    print_bytes,
    print_message,
    print_table,
    say,
    shows_progress,
    summarize,
)
from dfkde_sklearn._cli.shards import score_shard
from dfkde_sklearn._cli.tables import Row, as_csv, as_json, as_jsonl, as_parquet, parquet_library
from dfkde_sklearn._report.text import decimal

if TYPE_CHECKING:
    from dfkde_sklearn import Assessment, DFKDEDetector, DriftMonitor, PatchDFKDEDetector

STDOUT = Path("-")
# What needs all images, or shows them, and not those of a shard.
_NOT_OF_SHARDS = ("fdr", "groups", "sort", "top", "csv", "json", "jsonl", "sheet", "maps", "masks", "monitor")
FORMATS = {"csv": as_csv, "json": as_json, "jsonl": as_jsonl, "parquet": as_parquet}


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "score",
        help="score images with a fitted detector",
        description="Score images with a detector that dfkde fit saved. Prints for each image its score (natural log "
        "of a density; higher is more normal), P(anomalous), the p-value (the share of good images with a score as "
        "low) and the verdict: normal, anomalous or, with --skip-broken, broken.",
        epilog="Example: dfkde score dfkde-model.safetensors incoming --top 10 --csv results.csv. Exit code: 0 on "
        "success; 2 on an error, such as a broken image without --skip-broken. With --exit-code: 0 if all images are "
        "normal; 1 if some are anomalous or broken; 2 on an error.",
    )
    add_model_argument(command)
    add_images_argument(command, "the images")
    group = command.add_argument_group("which images are called anomalous")
    threshold = group.add_mutually_exclusive_group()
    threshold.add_argument(
        "--target-fpr",
        type=rate,
        metavar="RATE",
        help="the share of new good images that may be called anomalous: moves the threshold for this run, and leaves "
        "the model and the threshold of maps as they are",
    )
    threshold.add_argument(
        "--fdr",
        type=rate,
        metavar="SHARE",
        help="of the images that are called anomalous, at most this share is good, on average: for a batch of parts, "
        "in place of a threshold",
    )
    add_confidence_argument(group, "; moves the threshold for this run too")
    add_groups_argument(command, "for --fdr and --monitor, which then go by parts, each by its lowest score")
    group = command.add_argument_group("results")
    order = group.add_mutually_exclusive_group()
    order.add_argument(
        "--sort",
        choices=("score", "input"),
        help="the order of the table: by score, the least normal image first, or as the images were given (default: "
        "score)",
    )
    order.add_argument(
        "--top", type=positive, metavar="N", help="print the N most anomalous images only; files hold all of them"
    )
    for name, what in {
        "csv": "a CSV file",
        "json": "a JSON array",
        "jsonl": "a file of JSON objects, one a line",
    }.items():
        group.add_argument(
            f"--{name}", type=file_path, metavar="FILE", help=f"also write the table as {what}; - prints it instead"
        )
    group.add_argument(
        "--parquet",
        type=file_path,
        metavar="FILE",
        help="also write the table as a Parquet file; needs pyarrow or polars",
    )
    group.add_argument(
        "--sheet", type=file_path, metavar="FILE.png", help=f"also draw a picture of the {N_WORST} least normal images"
    )
    group.add_argument(
        "--maps",
        type=file_path,
        metavar="FOLDER",
        help="also write into this folder, which is made if it does not exist, each image with its anomalous positions "
        "in red: IMAGE.map.png; needs a detector of positions",
    )
    group.add_argument(
        "--masks",
        action="store_true",
        help="with --maps, also write IMAGE.mask.png: white where the image is anomalous, else black",
    )
    group = command.add_argument_group("many jobs")
    group.add_argument(
        "--shard",
        type=shard,
        metavar="K/N",
        help="score the K-th of N parts of the images only, sorted by name, as one of N jobs that are given the same "
        "model and images. --parquet is then a folder, which is made if it does not exist; the table goes into "
        "scores-K-of-N.parquet in it, with five digits, and is not printed",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="with --shard, continue a job that was stopped: what it has scored is kept, and nothing is done if the "
        "shard is complete. Shards of another model or of other images are an error",
    )
    command.add_argument(
        "--monitor",
        type=file_path,
        metavar="FILE",
        help="keep in this file, from run to run, whether the images, in the order in which they are given, still look "
        "like the training images; it is made if it does not exist. An alarm is printed, and --exit-code counts it. "
        "Each image counts as a part of its own, unless --groups is given: then all images of a part belong in one run",
    )
    command.add_argument(
        "--skip-broken",
        action="store_true",
        help="continue if an image cannot be read, or one of a list is not there: it is reported on standard error, "
        "and is `broken` in the table",
    )
    command.add_argument("--exit-code", action="store_true", help="exit with 1 unless all images are normal; see below")
    add_extractor_arguments(command)
    add_force_argument(command)
    add_quiet_argument(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    import numpy as np

    from dfkde_sklearn import PatchDFKDEDetector
    from dfkde_sklearn._cli.pictures import ShownMap, map_files, sheet
    from dfkde_sklearn._cli.summary import worst_first
    from dfkde_sklearn._maps import lie_over_images

    _check_arguments(options)
    if options.shard is not None:
        detector = _with_threshold(options, loaded_detector(options))
        return score_shard(options, detector, image_paths(options))
    paths = image_paths(options)
    groups = image_groups(options, paths)
    tables = {name: path for name in FORMATS if (path := getattr(options, name)) is not None}
    printed = [name for name, path in tables.items() if path == STDOUT]
    files = {name: path for name, path in tables.items() if path != STDOUT}
    for path in filter(None, (*files.values(), options.sheet)):
        check_new(path, options.force)
    of_maps = {}
    if options.maps is not None:
        of_maps = map_files(options.maps, paths, ("map", "mask") if options.masks else ("map",), options.force)
    detector = loaded_detector(options)
    if options.maps is not None and not isinstance(detector, PatchDFKDEDetector):
        raise ValueError(
            f"MODEL {options.model} is a pooled detector, which has no maps. Leave --maps out, or fit a detector of "
            "positions."
        )
    if options.fdr is not None:
        detector._check_fdr(options.fdr)
    detector = _with_threshold(options, detector)
    monitor = _monitor(options.monitor, detector)
    say(options, f"Scoring {len(paths)} images")
    has_image_maps = lie_over_images(detector.features_)
    if options.maps is not None and not has_image_maps:
        raise ValueError(
            f"--maps needs features of whole images, and those of MODEL {options.model} are of cropped ones: its maps "
            "would be of another part of the image. Leave --maps out, or fit with crop='squash'."
        )
    assessment, grid_maps, broken = _assess(detector, paths, options.skip_broken)
    readable = [path for path in paths if path not in broken]
    if groups is not None:
        groups = [group for path, group in zip(paths, groups, strict=True) if path not in broken]
    if options.fdr is not None:
        selected = detector._selected(assessment.log_density, options.fdr, groups)
        assessment = assessment._replace(label=np.where(selected, -1, 1))
    for reason in broken.values():
        print_message(f"dfkde score: skipped: {one_line(reason)}")
    rows = {path: Row(path, None, None, None, "broken", reason) for path, reason in broken.items()}
    for path, *values, label in zip(readable, *assessment, strict=True):
        score, p_value, p_anomalous = map(decimal, values)
        rows[path] = Row(path, score, p_anomalous, p_value, "anomalous" if label == -1 else "normal", "")
    by_score = [rows[readable[i]] for i in worst_first(assessment)]
    as_given = options.sort == "input"
    table = [rows[path] for path in paths] if as_given else [*(rows[path] for path in broken), *by_score]
    n_anomalous = int((assessment.label == -1).sum())
    summary = f"{n_anomalous} of {len(readable)} images are anomalous."

    # The files come before the table, so that they are written even if the reader of the table closes its pipe; and if
    # they cannot be written, on a full disk say, the table is printed all the same.
    outputs: list[tuple[Path, Callable[[], bytes]]] = [
        (path, partial(FORMATS[name], table)) for name, path in files.items()
    ]
    shown: dict[str, ShownMap] = {}
    if isinstance(detector, PatchDFKDEDetector) and has_image_maps:
        shown = {path: ShownMap(detector, path, of_grid) for path, of_grid in zip(readable, grid_maps, strict=True)}
    if options.sheet is not None:
        outputs.append((options.sheet, lambda: sheet(options.model.name, summary, by_score[:N_WORST], shown)))
    if options.maps is not None:
        options.maps.mkdir(parents=True, exist_ok=True)
        for path, of_image in shown.items():
            outputs += zip(of_maps[path], (of_image.overlay, of_image.mask), strict=False)
    failed = not _written(outputs, options)
    if monitor is not None:
        monitor.update_scores(assessment.log_density, groups=groups)
    # After a run that failed, and will be repeated, its images are not counted.
    if monitor is not None and not failed:
        try:
            monitor.save(options.monitor)
        except OSError as error:
            print_message(f"dfkde score: error: {one_line(error)}")
            failed = True
    listed = table if options.top is None else by_score[: options.top]
    if printed:
        print_bytes(FORMATS[printed[0]](listed))
    else:
        print_table(
            None,
            ("path", "score", "P(anomalous)", "p-value", "verdict"),
            [(row.path, *numbers(row.score, row.p_anomalous, row.p_value), row.verdict) for row in listed],
        )
    if monitor is not None:
        print_message(f"dfkde score: {monitor.describe()}")
    summarize(options, summary + (f" {len(broken)} could not be read." if broken else ""))
    if failed:
        return FAILED
    is_alarm = monitor is not None and monitor.alarm_ is not None
    return NOT_ALL_NORMAL if options.exit_code and (n_anomalous or broken or is_alarm) else DONE


def _check_arguments(options: argparse.Namespace) -> None:
    """Raise an error if arguments contradict one another, or a library for them is not installed."""
    if options.shard is not None:
        if options.parquet is None:
            raise ValueError("--shard writes a file for each shard into one folder. Give --parquet FOLDER too.")
        for name in _NOT_OF_SHARDS:
            if getattr(options, name):
                raise ValueError(
                    f"--{name} is for all images at once, and --shard scores a part of them. Leave --{name} out; the "
                    "shards together have what it needs."
                )
    elif options.resume:
        raise ValueError("--resume continues a shard. Give --shard K/N too; with --shard 1/1, one has all images.")
    if options.confidence is not None and options.fdr is not None:
        raise ValueError(
            "--confidence is that of --target-fpr, and --fdr takes the place of a threshold. Leave one out."
        )
    if options.groups is not None and options.fdr is None and options.monitor is None:
        raise ValueError("--groups says which images are one part, for --fdr and --monitor. Give one of them too.")
    if options.masks and options.maps is None:
        raise ValueError("--masks writes into the folder of --maps. Give --maps FOLDER too.")
    if options.parquet is not None:
        if options.parquet == STDOUT:
            raise ValueError("--parquet - would print a file that is no text. Name a file, or print --jsonl -.")
        parquet_library()
    if options.sheet is not None:
        check_png(options.sheet)
    printed = [f"--{name}" for name in FORMATS if getattr(options, name) == STDOUT]
    if len(printed) > 1:
        raise ValueError(f"{' and '.join(printed)} both print the table. Write one of them to a file.")
    outputs = [(f"--{name}", getattr(options, name)) for name in (*FORMATS, "sheet", "monitor")]
    check_distinct([("MODEL", options.model), *((name, path) for name, path in outputs if path != STDOUT)])


def _with_threshold(
    options: argparse.Namespace, detector: DFKDEDetector | PatchDFKDEDetector
) -> DFKDEDetector | PatchDFKDEDetector:
    """Return the detector with the threshold that was asked for."""
    promises = given(options, "target_fpr", "confidence")
    if not promises:
        return detector
    from dfkde_sklearn._cli.summary import expected_rate

    moved = detector._with_threshold(promises)
    summarize(
        options,
        f"Threshold for this run: {moved.offset_:.2f}, of the model: {detector.offset_:.2f}. False alarms expected: "
        f"{expected_rate(moved)['False alarms expected']}.",
    )
    return moved


def _monitor(path: Path | None, detector: DFKDEDetector | PatchDFKDEDetector) -> DriftMonitor | None:
    """Return the monitor in a file, or a new one where there is no such file."""
    from dfkde_sklearn import DriftMonitor

    if path is None:
        return None
    if path.exists():
        return DriftMonitor.load(path, detector)
    check_new(path, force=False)
    return DriftMonitor(detector)


def _assess(
    detector: DFKDEDetector | PatchDFKDEDetector, paths: list[str], skip_broken: bool
) -> tuple[Assessment, Any, dict[str, str]]:
    """Return the assessment of the readable images, their maps, and the others with the reason.

    Those are skipped if that is asked for, else an error. The maps are on the grid, and None of a pooled detector.
    """
    from dfkde_sklearn import PatchDFKDEDetector
    from dfkde_sklearn._batch.columns import of_readable

    def answers(images: list[str]) -> tuple[Assessment, Any]:
        if isinstance(detector, PatchDFKDEDetector):
            return detector.assess_with_maps(images, resolution="grid")
        return detector.assess(images), None

    found, broken = of_readable(answers, paths, skip_broken)
    if found is None:
        raise ValueError(f"None of the {len(paths)} images can be read. {next(iter(broken.values()))}")
    return *found, {paths[i]: reason for i, reason in broken.items()}


def _written(outputs: list[tuple[Path, Callable[[], bytes]]], options: argparse.Namespace) -> bool:
    """Write each of the files that can be written, whole, and return whether all could."""
    from tqdm import tqdm

    succeeded = True
    for path, content in tqdm(outputs, "files", unit="file", disable=not (outputs and shows_progress(options))):
        try:
            write_new(path, content(), options.force)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print_message(f"dfkde score: error: {one_line(error)}")
            succeeded = False
    return succeeded
