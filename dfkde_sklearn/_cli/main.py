"""The command line: ``dfkde demo``, ``dfkde fit``, ``dfkde score`` and ``dfkde cache``.

Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
from sklearn.utils import Bunch

from dfkde_sklearn import DFKDEDetector, datasets
from dfkde_sklearn._cli.arguments import DEMO_PICTURE, N_WORST, RESIDUALS, parser
from dfkde_sklearn._cli.output import print_bytes, print_line, print_message, printable, silence
from dfkde_sklearn._features.cache import cache_size, clear_cache
from dfkde_sklearn._features.network import TimmFeatures
from dfkde_sklearn._features.scattering import ScatteringFeatures
from dfkde_sklearn._files import check_writable, is_stream, write_file
from dfkde_sklearn._images import as_images
from dfkde_sklearn._report.contact_sheet import Section, Tile, contact_sheet

# Enough held-out good images for the rate of false alarms to mean something.
N_DEMO_TRAIN, N_DEMO_GOOD, N_DEMO_DEFECTIVE = 200, 300, 100
# Images in a row of a contact sheet.
N_ROW = 6
# Training images that `fit` lists.
N_LOWEST = 5
# Columns of tables that hold words.
WORDS = ("path", "defect", "verdict")
STDOUT = Path("-")
# The first byte of a pickle.
PICKLE = b"\x80"

# Exit codes. argparse ends with 2 as well where the arguments are wrong.
DONE, NOT_ALL_NORMAL, FAILED, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, default=None
        What follows `dfkde` on the command line; None takes the command line of this process.

    Returns
    -------
    int
        0 where the command did what it says, 2 where it could not; 1 from ``score --exit-code``.
    """
    options = parser().parse_args(arguments)
    commands = {"demo": _demo, "fit": _fit, "score": _score, "cache": _cache}

    def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        print_message(f"dfkde {options.command}: warning: {_one_line(message)}")

    try:
        with warnings.catch_warnings(), _max_pixels(getattr(options, "max_pixels", Image.MAX_IMAGE_PIXELS)):
            warnings.showwarning = print_warning
            code = commands[options.command](options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, `head` say, has seen enough.
        code = READER_GONE
    except KeyboardInterrupt:
        code = INTERRUPTED
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print_message(f"dfkde {options.command}: error: {_one_line(error)}")
        code = FAILED
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
    return code


@contextmanager
def _max_pixels(n: int | None) -> Iterator[None]:
    """Let Pillow open images of up to `n` pixels."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, n
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


# The commands


def _demo(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    picture, replace = _demo_picture(options.out, options.force)
    _check_writable(picture, replace)
    material, n_test = options.material, N_DEMO_GOOD + N_DEMO_DEFECTIVE
    _say(
        options,
        f"1/4 Drawing {N_DEMO_TRAIN} good images of {material} to learn from; {N_DEMO_GOOD} good and "
        f"{N_DEMO_DEFECTIVE} defective ones for the test",
    )
    data = datasets.make_textures(
        N_DEMO_TRAIN,
        n_test,
        material=material,
        anomaly_fraction=N_DEMO_DEFECTIVE / n_test,
        random_state=options.seed,
    )
    if options.images is not None:
        datasets.write_mvtec_folder(data, options.images)
    _say(options, f"2/4 Learning what good {material} looks like")
    detector = DFKDEDetector(
        ScatteringFeatures(verbose=_shows_progress(options)),
        n_components=options.n_components,
        residual=RESIDUALS[options.residual],
        target_fpr=options.target_fpr,
    ).fit(data.X_train)
    _say(options, f"3/4 Scoring the {n_test} test images")
    scored = _scored(detector, detector.features_.transform(data.X_test))
    _say(options, "4/4 Drawing the picture")
    quality = _quality(scored, data.y_test, data.defects_test)
    sheet = contact_sheet(
        f"dfkde demo: {material}",
        [
            *(f"{name}: {value}" for name, value in quality.items()),
            "Bars: red is called anomalous, green is called normal. Orange lines: the true defects.",
        ],
        _demo_sections(data, scored),
        columns=N_ROW,
    )
    _write(picture, _png(sheet), replace)

    _print_facts(
        {
            "Training": f"{N_DEMO_TRAIN} good images of {material}, seed {options.seed}",
            "Detector": _description(detector),
            "Threshold": _threshold(detector),
            "False alarms asked for": _percent(options.target_fpr),
            **quality,
        }
    )
    _print_table(
        f"The {N_WORST} most anomalous of the {n_test} test images:",
        ("rank", "index", "defect", "score", "P(anomalous)", "p-value"),
        [
            (
                str(rank),
                str(i),
                data.defects_test[i],
                *_printed(scored.scores[i], scored.p_anomalous[i], scored.p_values[i]),
            )
            for rank, i in enumerate(_worst_first(scored)[:N_WORST], 1)
        ],
    )
    print_line()
    if options.images is not None:
        _print_facts({"Images": f"{options.images}, for dfkde fit and dfkde score"})
    _print_facts({"Picture": str(picture), "Time": f"{time.perf_counter() - start:.1f} s"})
    return DONE


def _fit(options: argparse.Namespace) -> int:
    _check_writable(options.model, options.force)
    train, test = _training_images(options.folder)
    detector = DFKDEDetector(
        _feature_extractor(options),
        n_components=options.n_components,
        residual=RESIDUALS[options.residual],
        contamination="auto" if options.contamination is None else options.contamination,
        target_fpr=options.target_fpr,
        device=options.device,
        random_state=options.seed,
    )
    # Told, since sub-folders of defects among the good images would go unnoticed.
    n_folders = len({Path(path).parent for path in train})
    source = f"{len(train)} images in {n_folders} folder{'s' * (n_folders > 1)}"
    _say(options, f"Learning from {source}")
    with _way_out("On the command line: --weights FILE, or --features scattering, which needs no weights."):
        detector.fit(train)
    _save(detector, options.model, options.force)

    _print_facts(
        {
            "Training": f"{source}, {options.folder}",
            "Detector": _description(detector),
            "Threshold": _threshold(detector),
            **_expected_rate(options, len(train)),
            "Model": f"{options.model}, for dfkde score",
        }
    )
    lowest = np.argsort(detector.calibration_scores_)[:N_LOWEST]
    _print_table(
        "The training images that look least normal to a fit without them; see whether they are good:",
        ("path", "score", "less threshold"),
        [
            (
                train[i],
                f"{detector.calibration_scores_[i]:.2f}",
                f"{detector.calibration_scores_[i] - detector.offset_:.2f}",
            )
            for i in lowest
        ],
    )
    if test is not None:
        _say(options, f"Scoring {len(test.X_test)} test images")
        extractor: Any = detector.features_
        scored = _scored(detector, extractor.transform(test.X_test))
        _print_heading(f"On the {len(test.X_test)} images in {options.folder / 'test'}:")
        _print_facts(_quality(scored, test.y_test, test.defects_test))
    return DONE


def _score(options: argparse.Namespace) -> int:
    csv_file = None if options.csv == STDOUT else options.csv
    for path in filter(None, (csv_file, options.sheet)):
        _check_writable(path, options.force)
    if options.sheet is not None:
        _check_png(options.sheet)
        if csv_file is not None and os.path.realpath(csv_file) == os.path.realpath(options.sheet):
            raise ValueError(f"{csv_file}: --csv and --sheet name the same file. Name two.")
    # A file that two arguments name is scored once.
    paths = list(dict.fromkeys(path for images in options.images for path in _image_paths(images)))
    with _way_out("On the command line: --weights FILE, the file that the model was fitted with."):
        detector = _loaded_detector(options)
        _say(options, f"Scoring {len(paths)} images")
        features, broken = _features_and_broken(detector.features_, paths, options.skip_broken)
    for reason in broken.values():
        print_message(f"dfkde score: skipped: {_one_line(reason)}")
    readable = [path for path in paths if path not in broken]
    scored = _scored(detector, features)
    rows = {path: _Row(path, None, None, None, "broken", reason) for path, reason in broken.items()}
    for path, score, p_anomalous, p_value, anomalous in zip(readable, *scored, strict=True):
        rows[path] = _Row(path, score, p_anomalous, p_value, "anomalous" if anomalous else "normal", "")
    worst_first = [readable[i] for i in _worst_first(scored)]
    table = [rows[path] for path in ([*broken, *worst_first] if options.sort == "score" else paths)]

    n_anomalous = int(scored.anomalous.sum())
    summary = f"{n_anomalous} of {len(readable)} images are anomalous."

    def sheet() -> bytes:
        return _png(
            contact_sheet(
                f"dfkde score: {options.model.name}",
                [summary, "Bars: red is called anomalous, green is called normal."],
                [_worst_section([rows[path] for path in worst_first[:N_WORST]])],
                columns=N_ROW,
            )
        )

    # Before the table is printed, so that a reader that has gone does not cost the files; and where they cannot be
    # written, on a full disk say, the scores are still told.
    failed = False
    for path, content in ((csv_file, lambda: _csv(table)), (options.sheet, sheet)):
        try:
            if path is not None:
                _write(path, content(), options.force)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print_message(f"dfkde score: error: {_one_line(error)}")
            failed = True
    if options.csv == STDOUT:
        print_bytes(_csv(table))
    else:
        _print_table(
            None,
            ("path", "score", "P(anomalous)", "p-value", "verdict"),
            [(row.path, *_printed(row.score, row.p_anomalous, row.p_value), row.verdict) for row in table],
        )
    _say(options, summary + (f" {len(broken)} could not be read." if broken else ""))
    if failed:
        return FAILED
    return NOT_ALL_NORMAL if options.exit_code and (n_anomalous or broken) else DONE


def _cache(options: argparse.Namespace) -> int:
    if options.action == "clear":
        clear_cache(options.folder)
    size = cache_size(options.folder)
    _print_facts(
        {
            "Cache": str(options.folder),
            "Entries": f"{size.n_rows}, one for each image and layer",
            "Size": f"{size.n_bytes / 1e6:.1f} MB",
        }
    )
    return DONE


# Images


def _image_paths(source: Path) -> list[str]:
    """Return the paths of the images at a file or folder."""
    images = as_images(source)
    return [images.name(i) for i in range(len(images))]


def _training_images(folder: Path) -> tuple[list[str], Bunch | None]:
    """Return the paths of the good images, and a folder's own test where it has the MVTec layout."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder. Put the good images into one.")
    good = folder / "train" / "good"
    if good.is_dir() and not (folder / "test").is_dir():
        return _image_paths(good), None
    # Read as a plain folder, what lies in such folders would make defects and masks part of what is normal.
    part_of_layout = any((folder / name).is_dir() for name in ("test", "ground_truth"))
    if part_of_layout or any(folder.glob("*/train/good")):
        data = datasets.load_mvtec_folder(folder)
        return data.X_train.tolist(), data
    return _image_paths(folder), None


def _features_and_broken(
    extractor: Any, paths: list[str], skip_broken: bool
) -> tuple[NDArray[np.floating], dict[str, str]]:
    """Return the features of the readable images, and of the others the reason; none are others unless skipped."""
    try:
        return extractor.transform(paths), {}
    except (ValueError, OSError):
        # One pass more, and only where something is wrong: most folders have no broken image.
        broken = _broken(paths) if skip_broken else {}
        if not broken:
            raise
    readable = [path for path in paths if path not in broken]
    if not readable:
        raise ValueError(f"None of the {len(paths)} images can be read. {next(iter(broken.values()))}")
    return extractor.transform(readable), broken


def _broken(paths: list[str]) -> dict[str, str]:
    """Return the images that cannot be read, each with the reason."""
    images, broken = as_images(paths), {}
    for i, path in enumerate(paths):
        try:
            images[i]
        except (ValueError, OSError) as error:
            broken[path] = str(error)
    return broken


# Detectors


class _Scored(NamedTuple):
    """What a detector says of images, arrays of shape (n_images,)."""

    scores: NDArray[np.floating]
    p_anomalous: NDArray[np.floating]
    p_values: NDArray[np.float64]
    anomalous: NDArray[np.bool_]


def _scored(detector: DFKDEDetector, features: NDArray[np.floating]) -> _Scored:
    """Return what the detector says of images with these features."""
    # Without its feature extractor it takes their features: the images go through the network once, not four times.
    density = copy.copy(detector)
    density.features_ = None
    return _Scored(
        density.score_samples(features),
        density.predict_proba(features)[:, 0],
        density.p_values(features),
        density.predict(features) == -1,
    )


def _worst_first(scored: _Scored) -> NDArray[np.int64]:
    return np.argsort(scored.scores, kind="stable")


def _feature_extractor(options: argparse.Namespace) -> ScatteringFeatures | TimmFeatures:
    names = ("layers", "weights", "image_size", "white_level", "batch_size", "cache", "device")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given["verbose"] = _shows_progress(options)
    if options.features != "scattering":
        if "weights" in given:
            # The model may be used from another folder.
            given["weights"] = os.path.realpath(given["weights"])
        return TimmFeatures(options.features, **given)
    for name in ("layers", "weights"):
        if name in given:
            raise ValueError(f"--{name} is for a backbone; --features scattering has none.")
    return ScatteringFeatures(**given)


def _description(detector: DFKDEDetector) -> str:
    extractor: Any = detector.features_
    name = (
        "scattering"
        if isinstance(extractor, ScatteringFeatures)
        else ", ".join([extractor.backbone_name_, *extractor.layers_])
    )
    return (
        f"{detector.n_features_in_} features ({name}), {detector.n_components_} principal components, "
        f"{detector.residual or 'no'} residual"
    )


def _threshold(detector: DFKDEDetector) -> str:
    return f"score {detector.offset_:.2f} (a log density); images below it are called anomalous"


def _save(detector: DFKDEDetector, path: Path, force: bool) -> None:
    _check_writable(path, force)
    saved = copy.copy(detector)
    extractor: Any = copy.copy(detector.features_)
    # Whether bars were shown at the fit is not the model's.
    saved.features_ = extractor.set_params(verbose=False)
    saved.save(path)


def _loaded_detector(options: argparse.Namespace) -> DFKDEDetector:
    """Return the detector in the file MODEL, with the settings of the command line."""
    path = options.model
    if not path.is_file():
        raise FileNotFoundError(f"MODEL {path}: there is no such file.")
    try:
        detector = DFKDEDetector.load(path, weights=options.weights, device=options.device, download=True)
    except ValueError as error:
        with path.open("rb") as file:
            is_pickle = file.read(1) == PICKLE
        if is_pickle:
            raise ValueError(
                f"MODEL {path} is a pickle, as joblib and earlier versions of dfkde fit write. Loading such a file "
                "runs code that is in it, and dfkde no longer does: fit it again."
            ) from error
        advice = " On the command line, weights= is --weights." if "weights=" in str(error) else ""
        raise ValueError(f"MODEL {path}: {error}{advice}") from error
    extractor: Any = detector.features_
    if extractor is None:
        raise ValueError(f"MODEL {path} was fitted on a feature matrix, not on images: score with it in Python.")
    given = {name: getattr(options, name) for name in ("batch_size", "cache") if getattr(options, name) is not None}
    extractor.set_params(verbose=_shows_progress(options), **given)
    return detector


# What is printed and drawn


class _Row(NamedTuple):
    """What `score` says of an image; its numbers are None where the image is broken."""

    path: str
    score: np.floating | None
    p_anomalous: np.floating | None
    p_value: np.floating | None
    verdict: str
    reason: str


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        print_message(text)


def _shows_progress(options: argparse.Namespace) -> bool:
    """Tell whether bars are shown: in a terminal only, since in a file each step of a bar is a line."""
    return not options.quiet and sys.stderr.isatty()


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _expected_rate(options: argparse.Namespace, n_train: int) -> dict[str, str]:
    """Return what the threshold lets one expect of new images."""
    if options.contamination is not None:
        return {"Anomalies expected": f"{_percent(options.contamination)} of images like these"}
    expected = f"{_percent(options.target_fpr)} of new good images"
    finest = 1 / (n_train + 1)
    if options.target_fpr < finest:
        expected += f"; but {n_train} images cannot tell a rate below {_percent(finest)}: use more of them"
    return {"False alarms expected": expected}


def _quality(scored: _Scored, y: NDArray[np.int64], defects: NDArray[np.str_]) -> dict[str, str]:
    """Return how well images are told apart whose labels `y` (1 = anomalous) and defects are known."""
    good = y == 0
    found: dict[str, str] = {}
    if 0 < good.sum() < len(y):
        found["AUROC"] = f"{roc_auc_score(y, -scored.scores):.3f}"
    if good.any():
        n_alarms, n_good = int(scored.anomalous[good].sum()), int(good.sum())
        low, high = binomtest(n_alarms, n_good).proportion_ci()
        found["False alarms held"] = (
            f"{_percent(n_alarms / n_good)} ({n_alarms} of {n_good} good images; 95 % interval {_percent(low)} to "
            f"{_percent(high)})"
        )
    if not good.all():
        kinds = [
            f"{kind} {scored.anomalous[defects == kind].sum()}/{(defects == kind).sum()}"
            for kind in np.unique(defects[~good])
        ]
        found["Defects found"] = f"{_percent(scored.anomalous[~good].mean())} ({', '.join(kinds)})"
    return found


def _print_facts(facts: Mapping[str, str]) -> None:
    for name, value in facts.items():
        print_line(f"{name:<24}{value}")


def _printed(
    score: np.floating | None, p_anomalous: np.floating | None, p_value: np.floating | None
) -> tuple[str, str, str]:
    if score is None:
        return "-", "-", "-"
    return f"{score:.2f}", f"{p_anomalous:.3f}", f"{p_value:.4f}"


def _print_heading(heading: str) -> None:
    print_line()
    print_line(heading)
    print_line()


def _print_table(heading: str | None, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if heading is not None:
        _print_heading(heading)
    lines = [header, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if name in WORDS else cell.rjust(width)
            for name, cell, width in zip(header, line, widths, strict=True)
        ]
        print_line("  ".join(cells).rstrip())


def _one_line(message: object) -> str:
    """Return a message as it is printed, with the option of the command line where it speaks of Python's."""
    line = " ".join(str(message).split()) or type(message).__name__
    return f"{line} On the command line: --max-pixels N." if "MAX_IMAGE_PIXELS" in line else line


def _csv(rows: Sequence[_Row]) -> bytes:
    text = io.StringIO()
    # csv quotes a carriage return only where lines end with one.
    lines = SimpleNamespace(write=lambda line: text.write(line.removesuffix("\r\n") + "\n"))
    writer = csv.writer(lines, lineterminator="\r\n")
    writer.writerow(_Row._fields)
    writer.writerows(rows)
    # Names of files are bytes, and not always UTF-8.
    return text.getvalue().encode("utf-8", "surrogateescape")


def _png(sheet: Image.Image) -> bytes:
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()


def _worst_section(rows: Sequence[_Row]) -> Section:
    tiles = [
        Tile(
            as_images(row.path)[0],
            row.path,
            f"{rank}: score {row.score:.1f}, P {row.p_anomalous:.2f}",
            row.verdict == "anomalous",
        )
        for rank, row in enumerate(rows, 1)
    ]
    return Section(f"The {len(tiles)} least normal images", tiles)


def _demo_sections(data: Bunch, scored: _Scored) -> list[Section]:
    def tiles(indices: Iterable[int]) -> list[Tile]:
        return [
            Tile(
                Image.fromarray(data.X_test[i]),
                f"{data.defects_test[i]} ({i})",
                f"score {scored.scores[i]:.1f}, P {scored.p_anomalous[i]:.2f}",
                bool(scored.anomalous[i]),
                data.masks_test[i],
            )
            for i in indices
        ]

    worst_first = _worst_first(scored)
    good = [i for i in worst_first if data.y_test[i] == 0]
    missed = [i for i in worst_first if data.y_test[i] == 1 and not scored.anomalous[i]]
    spread = [good[round(step * (len(good) - 1) / (N_ROW - 1))] for step in range(N_ROW)]
    n_missed = f"{len(missed)} of {int(data.y_test.sum())} defects"
    return [
        Section(f"The {N_WORST} most anomalous of {len(data.y_test)} test images", tiles(worst_first[:N_WORST])),
        Section(f"Missed ({n_missed}), the most normal ones", tiles(missed[::-1][:N_ROW])),
        Section("Good images, from the least to the most normal one", tiles(spread)),
    ]


# Files that are written


def _demo_picture(out: Path | None, force: bool) -> tuple[Path, bool]:
    """Return where the picture goes, and whether one that is there may go: one of the demo's own name may."""
    if out is None:
        return Path(DEMO_PICTURE), True
    if out.suffix and not out.is_dir():
        _check_png(out)
        return out, force
    out.mkdir(parents=True, exist_ok=True)
    return out / DEMO_PICTURE, True


def _check_png(path: Path) -> None:
    if path.suffix.lower() != ".png" and not is_stream(path):
        raise ValueError(f"{path}: the picture is a PNG. Give it a name that ends in .png.")


def _check_writable(path: Path, force: bool) -> None:
    """Raise an OSError where the file cannot be written: before the work, not after it."""
    check_writable(path)
    if path.exists() and not is_stream(path) and not force:
        raise FileExistsError(f"{path} exists. Name another file, or overwrite it with --force.")


def _write(path: Path, data: bytes, force: bool) -> None:
    _check_writable(path, force)
    write_file(path, data)


@contextmanager
def _way_out(advice: str) -> Iterator[None]:
    """Add to an error on missing weights what the options of the command line can do about it."""
    try:
        yield
    except OSError as error:
        if "weights" not in str(error):
            raise
        raise OSError(f"{error} {advice}") from error
