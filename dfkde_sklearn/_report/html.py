"""A report on a detector and the images that it has scored: one HTML page, which needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve
from sklearn.utils.validation import check_is_fitted
from tqdm import tqdm

from dfkde_sklearn import __version__
from dfkde_sklearn._calibration import Assessment, CalibratedOutlierMixin
from dfkde_sklearn._files import check_writable, write_file
from dfkde_sklearn._images import MAX_THREADS, Images, as_images
from dfkde_sklearn._report.charts import Axis, Mark, Series, histogram, line_chart
from dfkde_sklearn._report.facts import learnt, promises, thresholds
from dfkde_sklearn._report.gallery import (
    Candidates,
    Section,
    checked_mask,
    encoded,
    nearest,
    pictures,
    sections,
    shrunk,
)
from dfkde_sklearn._report.quality import RATES, kinds_of_images, operating_points, quality_facts
from dfkde_sklearn._report.text import percent, printable
from dfkde_sklearn._threads import computed_ahead
from dfkde_sklearn.datasets._mvtec import NORMAL

# Images that are read and scored at a time, so that their features take little memory.
_IMAGES = 64
# Images in a section of the gallery, and training images beside each of them.
_N_SHOWN, _N_NEAREST = 12, 4
# Pictures in the gallery, of training images, and in the table: their longest sides in pixels, and the most bytes of
# one. With base64, all of them together stay below 18 MB, whatever the images are.
_LARGE, _LARGE_BYTES = 480, 30_000
_NEIGHBOUR, _NEIGHBOUR_BYTES = 144, 4_000
_SMALL, _SMALLEST = 128, 64
_SMALL_BYTES, _ALL_SMALL_BYTES = 6_000, 8_000_000
# Rows of the table that have a picture, at most: those of the least normal images.
_N_SMALL = 5_000
# The rates asked of the operating curve: none that anybody would ask for is higher.
_CURVE_RATES = np.concatenate([np.linspace(0.0025, 0.05, 20), np.linspace(0.06, 0.3, 25)])
VERDICTS = ("normal", "anomalous", "broken")


class _Scored(NamedTuple):
    """What one pass over the images leaves.

    readable : list of int, the positions of the images that `assessment` is about.
    broken : dict, the reason why each other image cannot be read.
    small : dict, a picture for the table by position, in base64.
    large : dict, the pictures in the gallery by position, each in base64.
    gallery : list of Section, the images shown in it.
    """

    readable: list[int]
    assessment: Assessment
    broken: dict[int, str]
    small: dict[int, str]
    large: dict[int, dict[str, str]]
    gallery: list[Section]


def write_report(
    detector: Any,
    images: Any,
    path: str | os.PathLike[str],
    *,
    y: Any = None,
    masks: Any = None,
    training_images: Any = None,
    title: str | None = None,
    skip_broken: bool = False,
    verbose: bool = False,
) -> Path:
    """Score images, and write a report on them as one HTML page.

    The page holds all that it shows, and asks no network for anything: what the detector has learnt, its threshold and
    what that promises, the distribution of the scores, what other thresholds would give, pictures of the least normal
    and of the borderline images with their maps, and a table of all images to sort, filter and save as CSV. Where the
    images are labelled, it also holds the ROC curve, the confusion table, and pictures of the mistakes.

    The images are read and scored in one pass, a few at a time. The page stays below 20 MB for 5000 images.

    Parameters
    ----------
    detector : PatchDFKDEDetector or DFKDEDetector
        Fitted on images.
    images : images
        The images to score, in any form that the detector takes, as a folder or paths.
    path : str or path-like
        The page. It is written whole or not at all, and replaces an earlier one.
    y : array-like of shape (n_images,) or None, default=None
        What each image is: 0 for good and 1 for defective, or the names of kinds, of which "good" is one. None: not
        known.
    masks : sequence of length n_images or None, default=None
        Where each image is defective: the path of a mask, as of :func:`~dfkde_sklearn.datasets.load_mvtec_folder`; an
        array (height, width) that is nonzero there; or None. Shown in the pictures.
    training_images : images or None, default=None
        The images of the fit. Given these, the pictures come with the training images whose features are most alike,
        which takes another pass over them.
    title : str or None, default=None
        The heading of the page; None is the class of the detector.
    skip_broken : bool, default=False
        Whether images that cannot be read are only listed, with the reason. By default they are an error.
    verbose : bool, default=False
        Whether to show the progress on standard error.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ImportError
        If jinja2 is not installed: the extra ``report``.
    NotFittedError
        If the detector is not fitted.
    TypeError
        If `detector` is of another kind.
    ValueError
        If the detector was fitted on a feature matrix; there is no image, or one cannot be read; `y` or `masks` has
        another length; or a mask has another shape than its image.
    OSError
        If the page cannot be written.

    See Also
    --------
    PatchDFKDEDetector.assess_with_maps : The same answers as arrays.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from dfkde_sklearn import PatchDFKDEDetector, ScatteringFeatures, write_report
    >>> from dfkde_sklearn.datasets import make_textures
    >>> data = make_textures(20, 8, image_size=32, random_state=0)
    >>> detector = PatchDFKDEDetector(ScatteringFeatures(pooling=None, image_size=32)).fit(data.X_train)
    >>> with TemporaryDirectory() as folder:
    ...     page = write_report(detector, data.X_test, Path(folder) / "report.html", y=data.y_test)
    ...     page.name, page.read_text(encoding="utf-8").startswith("<!doctype html>")
    ('report.html', True)
    """
    check_writable(path)
    page = report_page(
        detector,
        images,
        y=y,
        masks=masks,
        training_images=training_images,
        title=title,
        skip_broken=skip_broken,
        verbose=verbose,
    )
    write_file(path, page)
    return Path(path)


write_report.__module__ = "dfkde_sklearn"  # the public path


def report_page(
    detector: Any,
    images: Any,
    *,
    y: Any = None,
    masks: Any = None,
    training_images: Any = None,
    title: str | None = None,
    skip_broken: bool = False,
    verbose: bool = False,
) -> bytes:
    """Return the page of `write_report`, in UTF-8."""
    template = _template()
    _check_detector(detector)
    pictured = as_images(images, getattr(detector.features_, "white_level", None))
    kinds = None if y is None else kinds_of_images(y, len(pictured))
    if masks is not None and len(masks) != len(pictured):
        raise ValueError(f"There are {len(masks)} masks for {len(pictured)} images. Give one for each, or None.")
    training = None
    if training_images is not None:
        training = as_images(training_images, getattr(detector.features_, "white_level", None))
    scored = _scored(detector, pictured, kinds, masks, skip_broken, verbose)
    if not scored.readable:
        raise ValueError(f"None of the {len(pictured)} images can be read. {next(iter(scored.broken.values()))}")
    of_readable = None if kinds is None else kinds[scored.readable]
    folder, names = _names(pictured)
    data: dict[str, Any] = {
        "folder": folder,
        "rows": _rows(scored, names, kinds),
        "small": scored.small,
        "large": scored.large,
        "format": "data:image/webp;base64,",
        "verdicts": VERDICTS,
    }
    if training is not None:
        data |= _neighbours(detector, pictured, scored, training, verbose)
    style, script = _resource("report.css"), _resource("report.js")
    heading = type(detector).__name__ if title is None else title
    page = template.render(
        title=printable(heading),
        written=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        version=__version__,
        summary=_summary(scored, len(pictured)),
        learnt={name: printable(value) for name, value in learnt(detector).items()},
        thresholds=thresholds(detector),
        promises=promises(detector),
        charts=_charts(detector, scored.assessment, of_readable),
        operating=_operating_table(detector, scored.assessment, of_readable),
        quality=_quality(scored.assessment, of_readable),
        confusion=None if of_readable is None else _confusion(scored.assessment, of_readable),
        gallery=_cards(scored, names, kinds),
        has_maps=any("map" in shown for shown in scored.large.values()),
        has_neighbours=training is not None,
        kinds=None if kinds is None else [printable(kind) for kind in np.unique(kinds).tolist()],
        verdicts=VERDICTS if scored.broken else VERDICTS[:2],
        n_images=len(pictured),
        folder=folder,
        data=data,
        style=style,
        script=script,
        style_hash=_digest(style),
        script_hash=_digest(script),
    )
    return page.encode("utf-8")


def _template() -> Any:
    """Return the template of the page, in which all text is escaped."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("A report needs jinja2: pip install 'dfkde-sklearn[report]'.") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.from_string(_resource("report.html.jinja"))


def _resource(name: str) -> str:
    return (files("dfkde_sklearn._report") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Return what the page's policy calls a style or a script: no other one is taken, wherever it comes from."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"


def _check_detector(detector: Any) -> None:
    if not isinstance(detector, CalibratedOutlierMixin):
        raise TypeError(
            f"A report is on a PatchDFKDEDetector or a DFKDEDetector, not on {type(detector).__name__}. Give the "
            "detector itself."
        )
    check_is_fitted(detector)
    fitted: Any = detector
    if fitted.features_ is None:
        raise ValueError(
            f"{type(detector).__name__} was fitted on features, and a report shows images. Fit it on images, with "
            "features=TimmFeatures() or features=ScatteringFeatures(); for rows of a matrix, assess(X) returns all "
            "answers as arrays."
        )


def _scored(
    detector: Any,
    images: Images,
    kinds: NDArray[np.str_] | None,
    masks: Any,
    skip_broken: bool,
    verbose: bool,
) -> _Scored:
    """Read and score the images, and keep the pictures that are shown: of the others nothing is left in memory."""
    small_side, small_bytes = _small_size(len(images))
    has_maps = _has_maps(detector)
    gallery = sections(detector.offset_, labelled=kinds is not None, n_most=_N_SHOWN)
    small: dict[int, str] = {}
    large: dict[int, dict[str, str]] = {}
    broken: dict[int, str] = {}
    score_of: dict[int, float] = {}
    assessments: list[Assessment] = []
    with tqdm(total=len(images), desc="Scoring", unit="image", disable=not verbose) as progress:
        for block in _blocks(len(images)):
            views: dict[int, Image.Image] = {}
            read = partial(_read, images, small_side, small_bytes)
            for i, found in zip(block, computed_ahead(read, block, MAX_THREADS, 2 * MAX_THREADS), strict=True):
                if isinstance(found, Exception):
                    if not skip_broken:
                        raise found
                    broken[i] = str(found)
                else:
                    views[i], small[i] = found
            if views:
                readable = list(views)
                assessment, grid_maps = _assessed(detector, images.items(readable), has_maps)
                assessments.append(assessment)
                scores = assessment.log_density.astype(np.float64)
                score_of |= zip(readable, scores.tolist(), strict=True)
                candidates = Candidates(
                    scores, assessment.label == -1, None if kinds is None else kinds[readable] != NORMAL
                )
                for section in gallery:
                    section.offer(readable, candidates)
                chosen = {i for section in gallery for i in section.indices()}
                large = {i: shown for i, shown in large.items() if i in chosen}
                for place, i in enumerate(readable):
                    if i in chosen:
                        mask = None if masks is None else checked_mask(masks[i], images.shape(i), images.name(i))
                        grid_map = None if grid_maps is None else grid_maps[place]
                        shown = pictures(views[i], grid_map, mask, detector)
                        large[i] = {name: encoded(picture, _LARGE_BYTES) for name, picture in shown.items()}
                if len(small) > _N_SMALL:
                    small = {i: small[i] for i in sorted(small, key=score_of.__getitem__)[:_N_SMALL]}
            progress.update(len(block))
    merged = Assessment(*map(np.concatenate, zip(*assessments, strict=True))) if assessments else None
    # Without any, the caller raises an error.
    nothing = Assessment(*(np.empty(0),) * 3, np.empty(0, np.int64))
    return _Scored(list(score_of), merged or nothing, broken, small, large, gallery)


def _small_size(n_images: int) -> tuple[int, int]:
    """Return the longest side in pixels, and the most bytes, of a picture in the table: all of them have a budget."""
    n_bytes = min(_SMALL_BYTES, _ALL_SMALL_BYTES // min(n_images, _N_SMALL))
    return int(np.clip(_SMALL * (n_bytes / _SMALL_BYTES) ** 0.5, _SMALLEST, _SMALL)), n_bytes


def _read(images: Images, small_side: int, small_bytes: int, i: int) -> tuple[Image.Image, str] | ValueError | OSError:
    """Return an image in the size of the gallery and its picture in the table, or why it cannot be read."""
    try:
        view = shrunk(images[i], _LARGE)
    except (ValueError, OSError) as error:
        return error
    return view, encoded(shrunk(view, small_side), small_bytes)


def _blocks(n: int) -> Iterator[range]:
    for start in range(0, n, _IMAGES):
        yield range(start, min(start + _IMAGES, n))


def _has_maps(detector: Any) -> bool:
    """Return whether the detector has maps that lie over its images."""
    if not hasattr(detector, "assess_with_maps") or prod(detector.grid_shape_) == 1:
        return False
    return getattr(detector.features_, "sees_whole_images", True)


def _assessed(detector: Any, images: Any, has_maps: bool) -> tuple[Assessment, NDArray[np.floating] | None]:
    if has_maps:
        assessment, grid_maps = detector.assess_with_maps(images, resolution="grid")
        return assessment, grid_maps
    return detector.assess(images), None


def _names(images: Images) -> tuple[str, list[str]]:
    """Return the folder that all images are in, "" if there is none, and their names below it."""
    names = [images.name(i) for i in range(len(images))]
    shared = os.path.commonprefix(names)  # noqa: RUF071 (cut off at a separator in the next line)
    folder = shared[: shared.rfind(os.sep) + 1]
    return printable(folder), [printable(name[len(folder) :]) for name in names]


def _rows(scored: _Scored, names: Sequence[str], kinds: NDArray[np.str_] | None) -> dict[str, Any]:
    """Return the columns of the table; in those of numbers, an image that cannot be read has null."""
    columns: dict[str, list[Any]] = {name: [None] * len(names) for name in ("score", "p_anomalous", "p_value")}
    columns["verdict"] = [VERDICTS.index("broken")] * len(names)
    for i, score, p_value, p_anomalous, label in zip(scored.readable, *scored.assessment, strict=True):
        # As NumPy prints them: no more digits than tell the number from others of its dtype.
        columns["score"][i], columns["p_anomalous"][i], columns["p_value"][i] = (
            float(str(value)) for value in (score, p_anomalous, p_value)
        )
        columns["verdict"][i] = int(label == -1)
    rows: dict[str, Any] = {"name": names, **columns}
    rows["reason"] = {i: printable(reason) for i, reason in scored.broken.items()}
    rows["kind"] = None if kinds is None else [printable(kind) for kind in kinds.tolist()]
    return rows


def _neighbours(detector: Any, images: Images, scored: _Scored, training: Images, verbose: bool) -> dict[str, Any]:
    """Return the training images most like those in the gallery: pictures, names, and distances."""
    shown = sorted(scored.large)
    with tqdm(total=len(training), desc="Comparing", unit="image", disable=not verbose) as progress:

        def blocks() -> Iterator[range]:
            for block in _blocks(len(training)):
                yield block
                progress.update(len(block))

        transform = detector.features_.transform
        indices, distances = nearest(transform, images.items(shown), training, _N_NEAREST, blocks())
    _, names = _names(training)
    return {
        "neighbours": {
            i: [[j, round(distance, 3)] for j, distance in zip(of.tolist(), lengths.tolist(), strict=True)]
            for i, of, lengths in zip(shown, indices, distances, strict=True)
        },
        "training": {
            j: [names[j], encoded(shrunk(training[j], _NEIGHBOUR), _NEIGHBOUR_BYTES)]
            for j in np.unique(indices).tolist()
        },
    }


def _summary(scored: _Scored, n: int) -> str:
    n_readable, n_anomalous = len(scored.readable), int((scored.assessment.label == -1).sum())
    said = f"{n_anomalous} of {n_readable} images are called anomalous ({percent(n_anomalous / n_readable)})."
    return said + (f" {len(scored.broken)} of {n} could not be read." if scored.broken else "")


def _charts(
    detector: CalibratedOutlierMixin, assessment: Assessment, kinds: NDArray[np.str_] | None
) -> list[dict[str, str]]:
    """Return the charts: for each its heading, the picture and a note."""
    scores, is_defective = assessment.log_density, None if kinds is None else kinds != NORMAL
    sets = [("new images", "new", scores)]
    if is_defective is not None:
        sets = [("good", "good", scores[~is_defective]), ("defective", "defective", scores[is_defective])]
    distribution, n_beyond = histogram(
        "Distribution of the calibration scores and of the scores of the images, with the threshold. "
        f"{percent(float(np.mean(assessment.label == -1)))} of the images lie below it.",
        detector.calibration_scores_,
        [one for one in sets if len(one[2])],
        detector.offset_,
    )
    note = "Calibration: scores of the good images of the fit, each from a fit without it."
    if n_beyond:
        note += f" {n_beyond} images lie beyond the chart, and are counted in its outermost bars."
    charts = [{"heading": "Distribution of the scores", "picture": distribution, "note": note}]

    points = operating_points(_CURVE_RATES, detector.calibration_scores_, scores, is_defective)
    rates = [point.rate for point in points]
    curves = [Series("called anomalous", "new", rates, [point.called for point in points])]
    if is_defective is not None:
        of_kinds = [("false alarms", "good", [point.false_alarms for point in points], ~is_defective)]
        of_kinds.append(("defects found", "defective", [point.found for point in points], is_defective))
        curves = [Series(name, style, rates, shares) for name, style, shares, chosen in of_kinds if chosen.any()]
    reference = Series("as asked", "reference", [0.0, rates[-1]], [0.0, rates[-1]])
    below = float(np.mean(detector.calibration_scores_.astype(np.float64) < detector.offset_))
    marks = [Mark("now", below)] if below <= rates[-1] else []
    charts.append(
        {
            "heading": "What other thresholds would give",
            "picture": line_chart(
                "Shares of the images that are called anomalous, for thresholds of other rates. The table beside it "
                "has the numbers.",
                Axis("rate of false alarms asked for", 0.0, rates[-1], in_percent=True),
                Axis("share of the images", 0.0, 1.0, in_percent=True),
                [*curves, reference],
                marks,
            ),
            "note": "Each rate asked for is that of a threshold from the calibration scores. The dashed line: as many "
            "false alarms as asked for.",
        }
    )
    if is_defective is not None and 0 < is_defective.sum() < len(is_defective):
        charts.append(_roc(assessment, is_defective))
    return charts


def _roc(assessment: Assessment, is_defective: NDArray[np.bool_]) -> dict[str, str]:
    alarms, found, _ = roc_curve(is_defective, -assessment.log_density)
    area = roc_auc_score(is_defective, -assessment.log_density)
    called = assessment.label == -1
    now = Mark("now", float(called[~is_defective].mean()), float(called[is_defective].mean()))
    return {
        "heading": "ROC curve",
        "picture": line_chart(
            f"ROC curve of area {area:.3f}. The threshold gives {percent(now.x)} false alarms, and finds "
            f"{percent(now.y or 0.0)} of the defective images.",
            Axis("false alarms, of the good images", 0.0, 1.0, in_percent=True),
            Axis("found, of the defective images", 0.0, 1.0, in_percent=True),
            [Series(f"AUROC {area:.3f}", "defective", alarms, found), Series("chance", "reference", [0, 1], [0, 1])],
            [now],
        ),
        "note": "One point for each threshold; the circle is the present one.",
    }


def _operating_table(
    detector: CalibratedOutlierMixin, assessment: Assessment, kinds: NDArray[np.str_] | None
) -> dict[str, Any]:
    is_defective = None if kinds is None else kinds != NORMAL
    points = operating_points(RATES, detector.calibration_scores_, assessment.log_density, is_defective)
    names = ["rate asked for", "threshold"]
    names += ["called anomalous"] if kinds is None else ["false alarms", "defects found"]

    def shown(share: float) -> str:
        return "–" if np.isnan(share) else percent(share)  # noqa: RUF001

    rows = []
    for point in points:
        shares = [point.called] if kinds is None else [point.false_alarms, point.found]
        rows.append([percent(point.rate), f"{point.threshold:.4g}", *map(shown, shares)])
    return {"names": names, "rows": rows}


def _quality(assessment: Assessment, kinds: NDArray[np.str_] | None) -> dict[str, str]:
    if kinds is None:
        return {}
    facts = quality_facts(assessment, (kinds != NORMAL).astype(np.int64), kinds)
    return {name: printable(value) for name, value in facts.items()}


def _confusion(assessment: Assessment, kinds: NDArray[np.str_]) -> list[list[str]]:
    """Return rows of the confusion table: of good and of defective images, and of each kind of these if several."""
    called = assessment.label == -1
    matrix = confusion_matrix(kinds != NORMAL, called, labels=[False, True])
    groups = {"good": matrix[0], "defective": matrix[1]}
    defects = np.unique(kinds[kinds != NORMAL]).tolist()
    if len(defects) > 1:
        for kind in defects:
            groups[f"·\N{NO-BREAK SPACE}{printable(kind)}"] = np.bincount(called[kinds == kind], minlength=2)
    return [
        [name, str(n_normal), str(n_called), percent(n_called / (n_normal + n_called))]
        for name, (n_normal, n_called) in groups.items()
        if n_normal + n_called
    ]


def _cards(scored: _Scored, names: Sequence[str], kinds: NDArray[np.str_] | None) -> list[dict[str, Any]]:
    """Return the sections of the gallery: headings, and what is said of each image."""
    place = {i: row for row, i in enumerate(scored.readable)}
    result = []
    for section in scored.gallery:
        cards = []
        for i in section.indices():
            one = Assessment(*(values[place[i]] for values in scored.assessment))
            cards.append(
                {
                    "index": i,
                    "name": names[i],
                    "verdict": VERDICTS[int(one.label == -1)],
                    "score": f"{one.log_density:.4g}",
                    "p_value": f"{one.p_value:.3g}",
                    "kind": None if kinds is None else printable(str(kinds[i])),
                    "has_map": "map" in scored.large[i],
                }
            )
        result.append({"heading": section.heading, "cards": cards})
    return result
