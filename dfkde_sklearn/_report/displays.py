"""Pictures of what detectors say, in scikit-learn's Display protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted

from dfkde_sklearn._explanation import Explanation
from dfkde_sklearn._images import as_images
from dfkde_sklearn._inputs import repeatable
from dfkde_sklearn._maps import lie_over_images
from dfkde_sklearn._report.gallery import checked_mask, nearest, pictures
from dfkde_sklearn._report.quality import CURVE_RATES, kinds_of_images, operating_points
from dfkde_sklearn.datasets._mvtec import NORMAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_N_BINS = 50
# In units of the range of the calibration scores: scores farther away are drawn at the border.
_REACH = 1.5
_GOOD, _BAD, _CALIBRATION = "tab:blue", "tab:red", "0.6"


def _pyplot(name: str) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(f"{name}.plot needs matplotlib: pip install 'dfkde-sklearn[plot]'.") from error
    return plt


def _axes(name: str, ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    return _pyplot(name).subplots(layout="constrained")[1]


def _detector(estimator: Any) -> Any:
    """Return the detector that an estimator is, or that it ends in."""
    check_is_fitted(estimator)
    last = estimator[-1] if hasattr(estimator, "steps") else estimator
    last = getattr(last, "detector_", last)
    if not hasattr(last, "calibration_scores_"):
        raise TypeError(
            f"{type(estimator).__name__} has no calibration scores. Give a fitted DFKDEDetector or PatchDFKDEDetector, "
            "an AnomalyClassifier of one, or a pipeline that ends in one."
        )
    return last


def _seen_by_detector(estimator: Any, X: Any) -> Any:
    """Return X as the last step of a pipeline sees it."""
    for _, step in getattr(estimator, "steps", [])[:-1]:
        X = X if step in (None, "passthrough") else step.transform(X)
    return X


def _scores(estimator: Any, X: Any) -> NDArray[np.floating]:
    return np.asarray(_detector(estimator).score_samples(_seen_by_detector(estimator, X)))


def _checked_scores(scores: ArrayLike, name: str) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} has shape {values.shape}. It must be (n,), with at least one number.")
    if np.isnan(values).any():
        raise ValueError(f"{name} has NaN at {np.isnan(values).sum()} of {len(values)} places: these have no order.")
    return values


def _is_defective(y: Any, n: int) -> NDArray[np.bool_] | None:
    return None if y is None else kinds_of_images(y, n) != NORMAL


class ScoreDisplay:
    """Distribution of calibration scores and of new scores, with the threshold.

    It is made by :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    scores : ndarray of shape (n_samples,)
        Log densities of new rows or images.
    calibration_scores : ndarray of shape (n_calibrated,)
        Out-of-fold log densities of the training rows.
    threshold : float
        Rows below it are anomalous.
    is_defective : ndarray of shape (n_samples,), bool, or None
        What the new rows are, where that is known.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        The axes, once drawn.
    figure_ : matplotlib.figure.Figure
        The figure, once drawn.
    bars_ : list of BarContainer
        The histograms, once drawn.
    line_ : matplotlib.lines.Line2D
        The threshold, once drawn.

    See Also
    --------
    OperatingCurveDisplay : What other thresholds would give.

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import DFKDEDetector, ScoreDisplay
    >>> rng = np.random.default_rng(0)
    >>> detector = DFKDEDetector().fit(rng.normal(size=(200, 5)))
    >>> display = ScoreDisplay.from_estimator(detector, rng.normal(size=(50, 5)))
    >>> display.scores.shape
    (50,)
    """

    ax_: Axes
    figure_: Figure

    def __init__(
        self,
        scores: NDArray[np.float64],
        calibration_scores: NDArray[np.float64],
        threshold: float,
        is_defective: NDArray[np.bool_] | None = None,
    ) -> None:
        self.scores = scores
        self.calibration_scores = calibration_scores
        self.threshold = threshold
        self.is_defective = is_defective

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any, y: Any = None, *, ax: Axes | None = None, **options: Any) -> Self:
        """Draw the scores of new rows or images.

        Parameters
        ----------
        estimator : estimator
            A fitted detector, an :class:`AnomalyClassifier` of one, or a pipeline that ends in one.
        X : array-like of shape (n_samples, n_features) or images
            New ones: training rows have kernels of their own, and score higher.
        y : array-like of shape (n_samples,) or None, default=None
            0 for good and 1 for defective, or the names of kinds, of which "good" is one.
        ax : matplotlib axes, default=None
            Where to draw; None: in a new figure.
        **options : dict
            As in :meth:`plot`.

        Returns
        -------
        ScoreDisplay
            What was drawn.
        """
        detector = _detector(estimator)
        return cls.from_predictions(
            _scores(estimator, X),
            calibration_scores=detector.calibration_scores_,
            threshold=detector.offset_,
            y=y,
            ax=ax,
            **options,
        )

    @classmethod
    def from_predictions(
        cls,
        scores: ArrayLike,
        *,
        calibration_scores: ArrayLike,
        threshold: float,
        y: Any = None,
        ax: Axes | None = None,
        **options: Any,
    ) -> Self:
        """Draw scores that were computed before.

        Parameters
        ----------
        scores : array-like of shape (n_samples,)
            As from ``score_samples``.
        calibration_scores : array-like of shape (n_calibrated,)
            The detector's `calibration_scores_`.
        threshold : float
            The detector's `offset_`.
        y : array-like of shape (n_samples,) or None, default=None
            As in :meth:`from_estimator`.
        ax : matplotlib axes, default=None
            As in :meth:`from_estimator`.
        **options : dict
            As in :meth:`plot`.

        Returns
        -------
        ScoreDisplay
            What was drawn.
        """
        values = _checked_scores(scores, "scores")
        calibration = _checked_scores(calibration_scores, "calibration_scores")
        return cls(values, calibration, float(threshold), _is_defective(y, len(values))).plot(ax=ax, **options)

    def plot(self, ax: Axes | None = None, *, bins: int = _N_BINS) -> Self:
        """Draw it.

        Parameters
        ----------
        ax : matplotlib axes, default=None
            Where to draw; None: in a new figure.
        bins : int, default=50
            Number of bins. Scores far below or above the calibration scores are counted in the outermost ones.

        Returns
        -------
        ScoreDisplay
            Itself.

        Raises
        ------
        ImportError
            If matplotlib is not installed: the extra "plot".
        """
        self.ax_ = ax = _axes(type(self).__name__, ax)
        self.figure_ = ax.figure  # type: ignore[assignment]
        low, high = self.calibration_scores.min(), self.calibration_scores.max()
        reach = _REACH * max(high - low, 1e-9 * max(1.0, abs(high)))
        ends = (
            max(low - reach, min(low, self.scores.min(), self.threshold)),
            min(high + reach, max(high, self.scores.max(), self.threshold)),
        )
        edges = np.linspace(*ends, bins + 1)

        def bars(scores: NDArray[np.float64], colour: str, name: str, **style: Any) -> Any:
            clipped = np.clip(scores, *ends)
            weights = np.full(len(scores), 1 / len(scores))
            return ax.hist(
                clipped, edges.tolist(), weights=weights, color=colour, label=f"{name} ({len(scores)})", **style
            )[2]

        self.bars_ = [bars(self.calibration_scores, _CALIBRATION, "calibration", alpha=0.8)]
        kinds = {"new": np.ones(len(self.scores), bool)}
        if self.is_defective is not None:
            kinds = {"good": ~self.is_defective, "defective": self.is_defective}
        for name, chosen in kinds.items():
            if chosen.any():
                colour = _BAD if name == "defective" else _GOOD
                style = {"histtype": "step", "linewidth": 1.6, "linestyle": "--" if name == "defective" else "-"}
                self.bars_.append(bars(self.scores[chosen], colour, name, **style))
        self.line_ = ax.axvline(self.threshold, color="black", linestyle=":", label="threshold")
        ax.set(xlabel="log density (higher is more normal)", ylabel="share of each")
        ax.legend(frameon=False)
        return self


class OperatingCurveDisplay:
    """What each rate of false alarms that could be asked for would give.

    With labels, the rate that is kept on good rows, and the share of the defective ones that is found; without, the
    share that is called anomalous. It is made by :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    asked : ndarray of shape (n_rates,)
        Rates of false alarms, as `target_fpr`.
    called : ndarray of shape (n_rates,)
        Share of all rows that the threshold of each calls anomalous.
    kept, found : ndarray of shape (n_rates,) or None
        The same of the good and of the defective rows, where kinds are known.
    target_fpr : float or None
        The rate that was asked for in fact.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        The axes, once drawn.
    figure_ : matplotlib.figure.Figure
        The figure, once drawn.
    lines_ : list of matplotlib.lines.Line2D
        The curves, once drawn.

    See Also
    --------
    ScoreDisplay : The scores themselves.
    sklearn.metrics.RocCurveDisplay : Needs no threshold, and says nothing of one.

    Notes
    -----
    Thresholds are the quantiles of the calibration scores that ``confidence=None`` takes.

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import DFKDEDetector, OperatingCurveDisplay
    >>> rng = np.random.default_rng(0)
    >>> detector = DFKDEDetector().fit(rng.normal(size=(200, 5)))
    >>> X, y = rng.normal(size=(60, 5)), np.repeat([0, 1], 30)
    >>> X[30:] += 2
    >>> display = OperatingCurveDisplay.from_estimator(detector, X, y)
    >>> bool((display.found >= display.kept).all())
    True
    """

    ax_: Axes
    figure_: Figure

    def __init__(
        self,
        asked: NDArray[np.float64],
        called: NDArray[np.float64],
        kept: NDArray[np.float64] | None = None,
        found: NDArray[np.float64] | None = None,
        target_fpr: float | None = None,
    ) -> None:
        self.asked = asked
        self.called = called
        self.kept = kept
        self.found = found
        self.target_fpr = target_fpr

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any, y: Any = None, *, ax: Axes | None = None) -> Self:
        """Draw the curve of new rows or images.

        Parameters
        ----------
        estimator : estimator
            A fitted detector, an :class:`AnomalyClassifier` of one, or a pipeline that ends in one.
        X : array-like of shape (n_samples, n_features) or images
            New ones: training rows have kernels of their own, and score higher.
        y : array-like of shape (n_samples,) or None, default=None
            0 for good and 1 for defective, or the names of kinds, of which "good" is one.
        ax : matplotlib axes, default=None
            Where to draw; None: in a new figure.

        Returns
        -------
        OperatingCurveDisplay
            What was drawn.
        """
        detector = _detector(estimator)
        return cls.from_predictions(
            _scores(estimator, X),
            calibration_scores=detector.calibration_scores_,
            target_fpr=detector.target_fpr,
            y=y,
            ax=ax,
        )

    @classmethod
    def from_predictions(
        cls,
        scores: ArrayLike,
        *,
        calibration_scores: ArrayLike,
        target_fpr: float | None = None,
        y: Any = None,
        ax: Axes | None = None,
    ) -> Self:
        """Draw the curve of scores that were computed before.

        Parameters
        ----------
        scores : array-like of shape (n_samples,)
            As from ``score_samples``.
        calibration_scores : array-like of shape (n_calibrated,)
            The detector's `calibration_scores_`.
        target_fpr : float or None, default=None
            The rate to mark.
        y : array-like of shape (n_samples,) or None, default=None
            As in :meth:`from_estimator`.
        ax : matplotlib axes, default=None
            As in :meth:`from_estimator`.

        Returns
        -------
        OperatingCurveDisplay
            What was drawn.
        """
        values = _checked_scores(scores, "scores")
        is_defective = _is_defective(y, len(values))
        calibration = _checked_scores(calibration_scores, "calibration_scores")
        points = operating_points(CURVE_RATES, calibration, values, is_defective)
        asked, _, called, kept, found = np.array(points).T
        if is_defective is None:
            return cls(asked, called, target_fpr=target_fpr).plot(ax)
        return cls(asked, called, kept, found, target_fpr).plot(ax)

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw it.

        Parameters
        ----------
        ax : matplotlib axes, default=None
            Where to draw; None: in a new figure.

        Returns
        -------
        OperatingCurveDisplay
            Itself.

        Raises
        ------
        ImportError
            If matplotlib is not installed: the extra "plot".
        """
        self.ax_ = ax = _axes(type(self).__name__, ax)
        self.figure_ = ax.figure  # type: ignore[assignment]
        curves = {"called anomalous": (self.called, _GOOD, "-")}
        if self.kept is not None and self.found is not None:
            curves = {"defects found": (self.found, _BAD, "-"), "false alarms kept": (self.kept, _GOOD, "--")}
        self.lines_ = []
        for name, (values, colour, style) in curves.items():
            if not np.isnan(values).all():
                self.lines_ += ax.plot(self.asked, values, color=colour, linestyle=style, label=name)
        ax.plot(
            [0, self.asked[-1]], [0, self.asked[-1]], color="grey", linewidth=1, linestyle=":", label="as asked for"
        )
        if self.target_fpr is not None:
            ax.axvline(self.target_fpr, color="black", linewidth=1, label=f"target_fpr={self.target_fpr:g}")
        ax.set(xlabel="rate of false alarms asked for", ylabel="share", xlim=(0, self.asked[-1]), ylim=(0, 1.02))
        ax.legend(frameon=False)
        return self


class PValueDisplay:
    """Whether the p-values of good rows are what they should be: uniform, or larger.

    The share of good rows with a p-value of at most p, against p, and the band in which it lies with a probability of
    0.95 if the p-values are uniform. It is made by :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    p_values : ndarray of shape (n_samples,)
        Of new good rows.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        The axes, once drawn.
    figure_ : matplotlib.figure.Figure
        The figure, once drawn.
    line_ : matplotlib.lines.Line2D
        The shares, once drawn.

    See Also
    --------
    DFKDEDetector.p_values : What is drawn.

    Notes
    -----
    The band is that of Dvoretzky, Kiefer and Wolfowitz, with Massart's constant [1]_, for independent p-values. Those
    of one detector share its calibration scores, and are together larger or smaller by about as much as N calibration
    scores tell; those of several images of one part are alike.

    References
    ----------
    .. [1] Massart (1990), The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality, doi:10.1214/aop/1176990746

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import DFKDEDetector, PValueDisplay
    >>> rng = np.random.default_rng(0)
    >>> detector = DFKDEDetector().fit(rng.normal(size=(200, 5)))
    >>> PValueDisplay.from_estimator(detector, rng.normal(size=(100, 5))).line_.get_label()
    '100 good rows'
    """

    ax_: Axes
    figure_: Figure

    def __init__(self, p_values: NDArray[np.float64]) -> None:
        self.p_values = p_values

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any, *, ax: Axes | None = None) -> Self:
        """Draw the p-values of new good rows or images.

        Parameters
        ----------
        estimator : estimator
            A fitted detector, an :class:`AnomalyClassifier` of one, or a pipeline that ends in one.
        X : array-like of shape (n_samples, n_features) or images
            New ones, all good.
        ax : matplotlib axes, default=None
            Where to draw; None: in a new figure.

        Returns
        -------
        PValueDisplay
            What was drawn.
        """
        return cls.from_predictions(_detector(estimator)._assessment(_scores(estimator, X)).p_value, ax=ax)

    @classmethod
    def from_predictions(cls, p_values: ArrayLike, *, ax: Axes | None = None) -> Self:
        """Draw p-values that were computed before.

        Parameters
        ----------
        p_values : array-like of shape (n_samples,)
            As from ``p_values`` or ``assess``, of new good rows.
        ax : matplotlib axes, default=None
            As in :meth:`from_estimator`.

        Returns
        -------
        PValueDisplay
            What was drawn.
        """
        values = _checked_scores(p_values, "p_values")
        outside = values[(values < 0) | (values > 1)]
        if len(outside):
            raise ValueError(f"p_values holds {outside[0]}. P-values lie from 0 to 1.")
        return cls(values).plot(ax)

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw it.

        Parameters
        ----------
        ax : matplotlib axes, default=None
            Where to draw; None: in a new figure.

        Returns
        -------
        PValueDisplay
            Itself.

        Raises
        ------
        ImportError
            If matplotlib is not installed: the extra "plot".
        """
        self.ax_ = ax = _axes(type(self).__name__, ax)
        self.figure_ = ax.figure  # type: ignore[assignment]
        n = len(self.p_values)
        band = np.sqrt(np.log(2 / 0.05) / (2 * n))
        ends = np.array([0.0, 1.0])
        ax.fill_between(
            ends, np.maximum(ends - band, 0), np.minimum(ends + band, 1), color="0.9", label="95 % of uniform ones"
        )
        ax.plot(ends, ends, color="grey", linewidth=1, linestyle=":")
        self.line_ = ax.ecdf(self.p_values, color=_GOOD, label=f"{n} good rows")
        ax.set(xlabel="p", ylabel="share with a p-value of at most p", xlim=(0, 1), ylim=(0, 1))
        ax.legend(frameon=False, loc="upper left")
        return self


class AnomalyMapDisplay:
    """Images with their anomalous pixels in red, their true defects, and the training images most like them.

    It is made by :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    images : list of PIL images
        Of mode "RGB".
    overlays : list of PIL images
        The images with what is anomalous in red.
    titles : list of str
        Above each image.
    truths : list of PIL image or None
        The images with their true defects outlined; None where there is none.
    neighbors : list of lists of PIL images
        The training images that are most like each of them.

    Attributes
    ----------
    axes_ : ndarray of shape (n_images, n_columns) of matplotlib axes
        Once drawn.
    figure_ : matplotlib.figure.Figure
        The figure, once drawn.

    See Also
    --------
    PatchDFKDEDetector.anomaly_maps : The maps as numbers.
    PatchDFKDEDetector.regions : Their regions as a table.

    Examples
    --------
    >>> from dfkde_sklearn import AnomalyMapDisplay, PatchDFKDEDetector, ScatteringFeatures
    >>> from dfkde_sklearn.datasets import make_textures
    >>> data = make_textures(n_train=40, n_test=2, image_size=64, random_state=0)
    >>> detector = PatchDFKDEDetector(ScatteringFeatures(image_size=64, pooling=None)).fit(data.X_train)
    >>> AnomalyMapDisplay.from_estimator(detector, data.X_test).axes_.shape
    (2, 2)
    """

    axes_: NDArray[Any]
    figure_: Figure

    def __init__(
        self,
        images: Sequence[Any],
        overlays: Sequence[Any],
        titles: Sequence[str],
        truths: Sequence[Any],
        neighbors: Sequence[Sequence[Any]],
    ) -> None:
        self.images = images
        self.overlays = overlays
        self.titles = titles
        self.truths = truths
        self.neighbors = neighbors

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        *,
        masks: Any = None,
        training_images: Any = None,
        n_neighbors: int = 3,
        figure: Figure | None = None,
    ) -> Self:
        """Draw images and their maps.

        Parameters
        ----------
        estimator : PatchDFKDEDetector
            Fitted on images.
        X : images
            A handful: each is a row of the picture.
        masks : sequence of length n_images or None, default=None
            The true defects, for each image an array-like of shape (height, width), a path, or None.
        training_images : images or None, default=None
            Those of the fit; the most similar ones, by their features, are drawn beside each image.
        n_neighbors : int, default=3
            How many of them.
        figure : matplotlib figure or None, default=None
            Empty, to draw into; None: a new one.

        Returns
        -------
        AnomalyMapDisplay
            What was drawn.

        Raises
        ------
        TypeError
            If the estimator has no maps, or was fitted on features.
        ValueError
            If there is not one mask for each image, or of another shape; or if the features are of cropped images.
        """
        detector = _detector(estimator)
        if not hasattr(detector, "assess_with_maps"):
            raise TypeError(f"{type(detector).__name__} has no maps: fit a PatchDFKDEDetector, or draw a ScoreDisplay.")
        if detector.features_ is None:
            raise TypeError("The detector was fitted on features, and there are no images to draw. Fit it on images.")
        if not lie_over_images(detector.features_):
            raise ValueError(
                f"{detector.features_!r} crops images, so that maps do not lie over them. Fit with crop='squash'."
            )
        X = repeatable(X)
        images = as_images(X, getattr(detector.features_, "white_level", None))
        assessment, maps = detector.assess_with_maps(X, resolution="grid")
        titles = [
            f"p = {p:.3g}, {'normal' if verdict == 1 else 'anomalous'}"
            for p, verdict in zip(assessment.p_value, assessment.label, strict=True)
        ]
        neighbors: list[list[Any]] = [[] for _ in range(len(images))]
        if training_images is not None:
            known = as_images(training_images, getattr(detector.features_, "white_level", None))
            blocks = np.array_split(np.arange(len(known)), max(1, len(known) // 64))
            near, _ = nearest(detector.features_.transform, X, known, n_neighbors, [block.tolist() for block in blocks])
            neighbors = [[known[int(i)].convert("RGB") for i in row] for row in near]
        return cls._of(images, maps, titles, masks, neighbors, detector).plot(figure)

    @classmethod
    def from_predictions(
        cls,
        X: Any,
        maps: Any,
        *,
        detector: Any,
        titles: Sequence[str] | None = None,
        masks: Any = None,
        figure: Figure | None = None,
    ) -> Self:
        """Draw maps that were computed before.

        Parameters
        ----------
        X : images
            A handful.
        maps : array-like of shape (n_images, h, w)
            As from ``anomaly_maps(X, resolution="grid")``.
        detector : PatchDFKDEDetector
            Whose `map_offset_` is the boundary.
        titles : sequence of str or None, default=None
            Above each image.
        masks : sequence of length n_images or None, default=None
            As in :meth:`from_estimator`.
        figure : matplotlib figure or None, default=None
            As in :meth:`from_estimator`.

        Returns
        -------
        AnomalyMapDisplay
            What was drawn.

        Raises
        ------
        ValueError
            If there is not one map, title or mask for each image.
        """
        images = as_images(X, None)
        values = np.asarray(maps)
        if values.ndim != 3 or len(values) != len(images):
            raise ValueError(f"maps has shape {values.shape}. It must be ({len(images)}, h, w), a map for each image.")
        titles = [""] * len(images) if titles is None else titles
        return cls._of(images, values, titles, masks, [[]] * len(images), detector).plot(figure)

    @classmethod
    def _of(
        cls, images: Any, maps: Any, titles: Sequence[str], masks: Any, neighbors: Sequence[Any], detector: Any
    ) -> Self:
        given = [None] * len(images) if masks is None else list(masks)
        for name, values in (("masks", given), ("titles", titles)):
            if len(values) != len(images):
                raise ValueError(f"{name} has length {len(values)}, and there are {len(images)} images: one for each.")
        shown = []
        for i, grid_map in enumerate(maps):
            picture = images[i].convert("RGB")
            mask = checked_mask(given[i], (picture.height, picture.width), f"image {i}")
            shown.append(pictures(picture, grid_map, mask, detector))
        return cls(
            [of["image"] for of in shown],
            [of["map"] for of in shown],
            titles,
            [of.get("truth") for of in shown],
            neighbors,
        )

    def plot(self, figure: Figure | None = None) -> Self:
        """Draw it: a row for each image.

        Parameters
        ----------
        figure : matplotlib figure or None, default=None
            Empty, to draw into; None: a new one.

        Returns
        -------
        AnomalyMapDisplay
            Itself.

        Raises
        ------
        ImportError
            If matplotlib is not installed: the extra "plot".
        """
        n_neighbors = max(map(len, self.neighbors), default=0)
        has_truth = any(truth is not None for truth in self.truths)
        n_columns = 2 + has_truth + n_neighbors
        if figure is None:
            size = (1.9 * n_columns, 2.1 * len(self.images))
            figure = _pyplot(type(self).__name__).figure(figsize=size, layout="constrained")
        assert figure is not None
        self.figure_ = figure
        self.axes_ = figure.subplots(len(self.images), n_columns, squeeze=False)
        for i, row in enumerate(self.axes_):
            cells = [(self.images[i], self.titles[i]), (self.overlays[i], "anomalous pixels" if not i else "")]
            if has_truth:
                cells.append((self.truths[i], "true defect" if not i else ""))
            cells += [
                (neighbor, "most similar good ones" if i == j == 0 else "")
                for j, neighbor in enumerate(self.neighbors[i])
            ]
            for ax, (picture, title) in zip(row, cells, strict=False):
                if picture is not None:
                    ax.imshow(np.asarray(picture))
                    ax.set_title(title, fontsize=9)
            for ax in row:
                ax.axis("off")
        return self


class ExplanationDisplay:
    """What the log density of one row is made of.

    The terms of the principal axes and of the residual, or of the layers where there are any; the training rows that
    carry the density are named. It is made by :meth:`from_estimator` or :meth:`from_explanation`.

    Parameters
    ----------
    explanation : Explanation
        Of some rows.
    row : int
        Which of them.
    n_terms : int
        The number of axes to draw: those of the lowest terms.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        The axes, once drawn.
    figure_ : matplotlib.figure.Figure
        The figure, once drawn.
    bars_ : BarContainer
        The terms, once drawn.

    See Also
    --------
    DFKDEDetector.explain : The same as arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import DFKDEDetector, ExplanationDisplay
    >>> good = np.random.default_rng(0).normal(size=(200, 5))
    >>> display = ExplanationDisplay.from_estimator(DFKDEDetector().fit(good), good[:1] + 3)
    >>> [label.get_text() for label in display.ax_.get_yticklabels()][-1]
    'residual'
    """

    ax_: Axes
    figure_: Figure

    def __init__(self, explanation: Explanation, row: int = 0, n_terms: int = 10) -> None:
        self.explanation = explanation
        self.row = row
        self.n_terms = n_terms

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any, *, row: int = 0, n_terms: int = 10, ax: Axes | None = None) -> Self:
        """Explain a row or an image, and draw it.

        Parameters
        ----------
        estimator : estimator
            A fitted :class:`DFKDEDetector`, an :class:`AnomalyClassifier` of one, or a pipeline that ends in one.
        X : array-like of shape (n_samples, n_features) or images
            Some.
        row : int, default=0
            Which of them.
        n_terms : int, default=10
            The number of axes to draw.
        ax : matplotlib axes, default=None
            Where to draw; None: in a new figure.

        Returns
        -------
        ExplanationDisplay
            What was drawn.

        Raises
        ------
        TypeError
            If the estimator is no :class:`DFKDEDetector`.
        """
        detector = _detector(estimator)
        if not hasattr(detector, "explain"):
            raise TypeError(
                f"{type(detector).__name__} explains no rows: its maps and regions say where an image is anomalous."
            )
        return cls.from_explanation(detector.explain(_seen_by_detector(estimator, X)), row=row, n_terms=n_terms, ax=ax)

    @classmethod
    def from_explanation(
        cls, explanation: Explanation, *, row: int = 0, n_terms: int = 10, ax: Axes | None = None
    ) -> Self:
        """Draw an explanation.

        Parameters
        ----------
        explanation : Explanation
            As from ``explain``.
        row : int, default=0
            Which of its rows.
        n_terms : int, default=10
            The number of axes to draw.
        ax : matplotlib axes, default=None
            Where to draw; None: in a new figure.

        Returns
        -------
        ExplanationDisplay
            What was drawn.

        Raises
        ------
        ValueError
            If there is no such row.
        """
        n = len(explanation.log_density)
        if not -n <= row < n:
            raise ValueError(f"row={row}, and there are {n}. Allowed: from 0 to {n - 1}.")
        return cls(explanation, row, n_terms).plot(ax)

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw it.

        Parameters
        ----------
        ax : matplotlib axes, default=None
            Where to draw; None: in a new figure.

        Returns
        -------
        ExplanationDisplay
            Itself.

        Raises
        ------
        ImportError
            If matplotlib is not installed: the extra "plot".
        """
        self.ax_ = ax = _axes(type(self).__name__, ax)
        self.figure_ = ax.figure  # type: ignore[assignment]
        given, i = self.explanation, self.row
        if given.layer_terms:
            terms = {name: float(values[i]) for name, values in given.layer_terms.items()}
        else:
            lowest = np.argsort(given.axis_terms[i], kind="stable")[: self.n_terms]
            terms = {f"axis {j} ({given.deviations[i, j]:+.1f} sd)": float(given.axis_terms[i, j]) for j in lowest}
            others = given.axis_terms[i].sum() - given.axis_terms[i, lowest].sum()
            if len(lowest) < given.axis_terms.shape[1]:
                terms["all other axes"] = float(others)
            terms["residual"] = float(given.residual_term[i])
        self.bars_ = ax.barh(list(terms), list(terms.values()), color=_BAD)
        ax.invert_yaxis()
        carried = ", ".join(
            f"{j} ({share:.0%})" for j, share in zip(given.kernels[i][:3], given.shares[i][:3], strict=True)
        )
        ax.set(
            xlabel=f"term of the log density\nkernels of training rows {carried}",
            title=f"log density {given.log_density[i]:.1f}",
        )
        return self


for _display in (ScoreDisplay, OperatingCurveDisplay, PValueDisplay, AnomalyMapDisplay, ExplanationDisplay):
    _display.__module__ = "dfkde_sklearn"  # the public path, which pickles name
