"""A report on a detector and the images that it has scored: one HTML page, which needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve
from sklearn.utils.validation import check_is_fitted

from dfkde_sklearn import __version__
from dfkde_sklearn._calibration import Assessment, CalibratedOutlierMixin
from dfkde_sklearn._files import check_writable, write_file
from dfkde_sklearn._images import Images, as_images
from dfkde_sklearn._report.charts import Axis, Mark, Series, histogram, line_chart
from dfkde_sklearn._report.facts import learnt, promises, thresholds
from dfkde_sklearn._report.quality import CURVE_RATES, RATES, kinds_of_images, operating_points, quality_facts
from dfkde_sklearn._report.scored import Scored, neighbours, score_images
from dfkde_sklearn._report.text import decimal, percent, printable
from dfkde_sklearn.datasets._mvtec import NORMAL

VERDICTS = ("normal", "anomalous", "broken")


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
    scored = score_images(detector, pictured, kinds, masks, skip_broken, verbose)
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
        near, near_pictures = neighbours(detector, pictured, sorted(scored.large), training, verbose)
        _, training_names = _names(training)
        data["neighbours"] = near
        data["training"] = {i: (training_names[i], picture) for i, picture in near_pictures.items()}
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


def _names(images: Images) -> tuple[str, list[str]]:
    """Return the folder that all images are in, "" if there is none, and their names below it."""
    names = [images.name(i) for i in range(len(images))]
    shared = os.path.commonprefix(names)  # noqa: RUF071 (cut off at a separator in the next line)
    folder = shared[: shared.rfind(os.sep) + 1]
    return printable(folder), [printable(name[len(folder) :]) for name in names]


def _rows(scored: Scored, names: Sequence[str], kinds: NDArray[np.str_] | None) -> dict[str, Any]:
    """Return the columns of the table; in those of numbers, an image that cannot be read has null."""
    columns: dict[str, list[Any]] = {name: [None] * len(names) for name in ("score", "p_anomalous", "p_value")}
    columns["verdict"] = [VERDICTS.index("broken")] * len(names)
    for i, score, p_value, p_anomalous, label in zip(scored.readable, *scored.assessment, strict=True):
        columns["score"][i], columns["p_anomalous"][i], columns["p_value"][i] = map(
            decimal, (score, p_anomalous, p_value)
        )
        columns["verdict"][i] = int(label == -1)
    rows: dict[str, Any] = {"name": names, **columns}
    rows["reason"] = {i: printable(reason) for i, reason in scored.broken.items()}
    rows["kind"] = None if kinds is None else [printable(kind) for kind in kinds.tolist()]
    return rows


def _summary(scored: Scored, n: int) -> str:
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

    points = operating_points(CURVE_RATES, detector.calibration_scores_, scores, is_defective)
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


def _cards(scored: Scored, names: Sequence[str], kinds: NDArray[np.str_] | None) -> list[dict[str, Any]]:
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
