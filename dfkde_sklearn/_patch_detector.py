"""PatchDFKDEDetector: a density at every position of an image, as a scikit-learn outlier detector."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, _fit_context
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from dfkde_sklearn._calibration import (
    CONFIDENCE,
    Assessment,
    CalibratedOutlierMixin,
    judged_scores,
    labels,
    threshold_at_rate,
    weighted_mean,
)
from dfkde_sklearn._callbacks import CallbackSupportMixin, one_task
from dfkde_sklearn._density.estimate import n_removed
from dfkde_sklearn._density.positions import (
    STATE,
    PositionDensity,
    PositionSettings,
    fit_positions,
    lowest_mean,
)
from dfkde_sklearn._deploy.deployable import DeployableMixin
from dfkde_sklearn._deploy.position_buffers import PositionBuffers
from dfkde_sklearn._device import as_device
from dfkde_sklearn._explanation import Region
from dfkde_sklearn._features.extractor import FeatureExtractor
from dfkde_sklearn._groups import drawn_rows, warn_of_near_duplicates, with_copies
from dfkde_sklearn._images import as_images
from dfkde_sklearn._inputs import repeatable
from dfkde_sklearn._maps import fine_maps, image_maps, lie_over_images, regions_of
from dfkde_sklearn._matrices import floats, is_matrix, tensor, working_memory
from dfkde_sklearn._streams import StreamsMixin

if TYPE_CHECKING:
    from dfkde_sklearn._deploy.export import Expected
    from dfkde_sklearn._deploy.position_model import PatchDfkdeModel

# A fit without a fold needs two images that differ.
_MIN_IMAGES = 3
# Images scored at a time, so that their copies take little memory.
_IMAGES = 256
# The normalisation of features of networks with "auto".
_OF_NETWORKS = 0.5
# Images whose out-of-fold maps set the maps' threshold, at most: each has thousands of pixels.
_MAP_IMAGES = 500
# Axes of an image (height, width, colour) that are reversed for each pass beside that of the image itself.
_FLIPS: dict[str | None, tuple[tuple[int, ...], ...]] = {None: (), "horizontal": ((1,),), "all": ((1,), (0,), (0, 1))}


class PatchDFKDEDetector(CalibratedOutlierMixin, StreamsMixin, DeployableMixin, CallbackSupportMixin, BaseEstimator):
    """A kernel density at every position of an image: an outlier detector that says where.

    A feature extractor describes every position of an image, on a grid of 14 x 14 say, by a vector. A Gaussian kernel
    density of the vectors that good images have at that position scores those of new images; the positions of lowest
    density are the score of the image. Parts have to lie alike in all images.

    Parameters
    ----------
    features : "auto", transformer or None, default="auto"
        The feature extractor, which returns arrays of shape (n_images, h, w, C): with "auto", a two-dimensional numeric
        X is vectors of a single position, and any other X is images for ``TimmFeatures(pooling=None)``. A transformer
        is cloned and fitted as `features_`. With None, X is an array of shape (n_images, h, w, C), or a matrix.
    pooled_share : float, default=0.2
        The weight of the mean covariance of all positions in the covariance of each, from 0, each on its own, to 1.
    density : {"kernel", "gaussian"}, default="kernel"
        "kernel" has a kernel at each training vector; "gaussian" is a single Gaussian at each position, which takes a
        third of the memory and half the time.
    bandwidth : {"scott", "silverman"} or float, default="scott"
        The factor h; the kernel covariance is h squared times the shrunk covariance of the position. For n images and C
        channels, "scott" is ``n ** (-1 / (C + 4))`` and "silverman" ``(n * (C + 2) / 4) ** (-1 / (C + 4))``.
    normalization : "auto" or float, default="auto"
        How much of what is the same all over an image, such as its contrast, is removed: from each channel of an image
        that many times its mean over the positions is subtracted, and the result is divided by its standard deviation
        to that power. 0 removes nothing, 1 everything. "auto" is 0.5 for :class:`TimmFeatures`, and 0 for others.
    n_lowest : int or float, default=0.03
        The positions of lowest density whose mean is the score of an image: their number, or as a float in (0, 1) their
        share of all positions.
    flips : {"horizontal", "all"} or None, default=None
        Average the features of an image with those of its mirror image ("horizontal", two passes of the network for an
        image), or of all three flips ("all", four passes).
    mirror : "auto" or bool, default="auto"
        Whether the mirrored maps of the training images are training images too. "auto" mirrors them where there are
        fewer images than channels.
    max_samples : int or None, default=1000
        Fit on at most this many training images, drawn with `random_state`, of `groups` whole ones; None takes all.
        Each adds a kernel at every position. Of more images, and of streams, no other features are kept in memory.
    contamination : "auto" or float, default="auto"
        "auto" takes all training images for normal. A float in (0, 0.5] is the share of them that is anomalous: the
        images with the lowest out-of-fold scores leave the fit, and the threshold lies between them and the others.
    target_fpr : float, default=0.05
        The share of new normal images that may be called anomalous; used where `contamination` and `threshold_offset`
        are "auto".
    confidence : float in (0, 1) or None, default=None
        The probability, over training sets, that `target_fpr` holds for this detector; None: it holds on average over
        detectors. With `groups`, it is then the share of new groups of which any image is called anomalous.
    target_map_fpr : float, default=0.01
        The share of the pixels of new normal images that may lie below `map_offset_`, on average over detectors,
        whatever `confidence` is.
    threshold_steepness : float, default=0.05
        Slope of the probability at the threshold, per unit (nat) of log density.
    threshold_offset : "auto" or float, default="auto"
        The log density at which an image is as probably anomalous as normal. A float replaces the threshold from the
        training data in `offset_` too.
    device : str, torch.device or None, default=None
        Where the density is computed, and the features of `features="auto"`: None takes the first CUDA GPU, else the
        CPU. Apple's "mps" has no float64: there the features are computed on it and the density on the CPU.
    random_state : int, RandomState instance or None, default=None
        Draws the `max_samples` images.

    Attributes
    ----------
    features_ : transformer or None
        The fitted feature extractor; None where X holds features.
    grid_shape_ : tuple (h, w)
        The positions.
    n_features_in_ : int
        Number of features of an image: h times w times C.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns of X, where it is a matrix and they are all strings.
    mean_ : ndarray of shape (h * w, C), float64
        Mean of the training vectors at each position, scaled by `scale_`.
    scale_ : float
        A power of two that brings features near 1.
    channel_scales_ : ndarray of shape (C,), float64
        The usual standard deviation of each channel over the positions of an image, scaled by `scale_`.
    whitening_ : ndarray of shape (h * w, C, C)
        For each position the transposed inverse of the Cholesky factor of its covariance.
    log_volumes_ : ndarray of shape (h * w,), float64
        For each position minus the log determinant of that factor.
    bandwidth_ : float
        The factor h.
    kernel_centers_ : ndarray of shape (h * w, n_kernels, C)
        The whitened training vectors; zero for a single Gaussian.
    calibration_scores_ : ndarray of shape (n_samples,)
        Score of each training image from a fit without it, and then those of :meth:`recalibrate`; only these
        set the threshold. Of images beyond `max_samples`, those that were drawn. See Notes.
    calibration_groups_ : ndarray of shape (n_samples,), int64
        The number of the group that each calibration score counts for: those of `groups`, or else each its own.
    offset_ : float
        The threshold: images whose score lies below it are called anomalous.
    map_offset_ : float
        The threshold of the maps: at new normal images a share `target_map_fpr` of the pixels lies below it.
    classes_ : ndarray of shape (2,)
        ``[-1, 1]``: anomalous, normal; the columns of `predict_proba`.

    See Also
    --------
    DFKDEDetector : One density of pooled features; for images whose parts do not lie alike.
    TimmFeatures : Features of pretrained networks.
    ScatteringFeatures : Features that need no download.

    Notes
    -----
    At each position the covariance of the training vectors is shrunk towards the mean covariance of all positions
    (`pooled_share`), and a hundredth of its mean variance is added to its diagonal. Its Cholesky factor whitens the
    vectors, and a kernel density of the whitened vectors, less the log determinant of the factor, is the log density:
    that of PaDiM [1]_ with kernels, shrinkage, and a determinant that makes positions comparable.

    The training images are divided into 10 consecutive folds, and each is scored by a fit to the others: these
    out-of-fold scores are `calibration_scores_`, and their quantile `target_fpr` is `offset_`; with `confidence` it is
    one of the lowest of them (docs/guide/thresholds.rst). Images of one part are near-duplicates: give `groups` to
    ``fit``, so that they share a fold, or the threshold does not hold for new parts.

    References
    ----------
    .. [1] Defard et al. (2021), PaDiM: a patch distribution modeling framework for anomaly detection and localization,
       doi:10.1007/978-3-030-68799-1_35

    Examples
    --------
    Features of 60 images on a grid of 6 x 6, and three new images, of which one has a defect at one position:

    >>> import numpy as np
    >>> from dfkde_sklearn import PatchDFKDEDetector
    >>> rng = np.random.default_rng(0)
    >>> good = rng.normal(size=(60, 6, 6, 8))
    >>> new = rng.normal(size=(3, 6, 6, 8))
    >>> new[2, 4, 1] += 6
    >>> detector = PatchDFKDEDetector(features=None).fit(good)
    >>> detector.predict(new)
    array([ 1,  1, -1])
    >>> log_densities = detector.anomaly_maps(new, resolution="grid")
    >>> [int(i) for i in np.unravel_index(log_densities[2].argmin(), (6, 6))]
    [4, 1]
    """

    # The public path, which pickles and lists of trusted types name.
    __module__ = "dfkde_sklearn"
    _saved_as = "PatchDFKDEDetector"
    # Refits of which each leaves out a fold of the training images.
    _n_folds: ClassVar[int] = 10

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "features": [StrOptions({"auto"}), HasMethods(["fit", "transform"]), None],
        "pooled_share": [Interval(Real, 0, 1, closed="both")],
        "density": [StrOptions({"kernel", "gaussian"})],
        "bandwidth": [StrOptions({"scott", "silverman"}), Interval(Real, 1e-3, 1e3, closed="both")],
        "normalization": [StrOptions({"auto"}), Interval(Real, 0, 1, closed="both")],
        "n_lowest": [Interval(Integral, 1, None, closed="left"), Interval(Real, 0, 1, closed="neither")],
        "flips": [StrOptions({"horizontal", "all"}), None],
        "mirror": [StrOptions({"auto"}), "boolean"],
        "max_samples": [Interval(Integral, _MIN_IMAGES, None, closed="left"), None],
        "contamination": [StrOptions({"auto"}), Interval(Real, 0, 0.5, closed="right")],
        "target_fpr": [Interval(Real, 0, 1, closed="neither")],
        "confidence": CONFIDENCE,
        "target_map_fpr": [Interval(Real, 0, 1, closed="neither")],
        "threshold_steepness": [Interval(Real, 0, None, closed="neither")],
        "threshold_offset": [StrOptions({"auto"}), Interval(Real, None, None, closed="neither")],
        "device": [str, torch.device, None],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        features: Any = "auto",
        *,
        pooled_share: float = 0.2,
        density: Literal["kernel", "gaussian"] = "kernel",
        bandwidth: Literal["scott", "silverman"] | float = "scott",
        normalization: Literal["auto"] | float = "auto",
        n_lowest: int | float = 0.03,
        flips: Literal["horizontal", "all"] | None = None,
        mirror: Literal["auto"] | bool = "auto",
        max_samples: int | None = 1000,
        contamination: Literal["auto"] | float = "auto",
        target_fpr: float = 0.05,
        confidence: float | None = None,
        target_map_fpr: float = 0.01,
        threshold_steepness: float = 0.05,
        threshold_offset: Literal["auto"] | float = "auto",
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.features = features
        self.pooled_share = pooled_share
        self.density = density
        self.bandwidth = bandwidth
        self.normalization = normalization
        self.n_lowest = n_lowest
        self.flips = flips
        self.mirror = mirror
        self.max_samples = max_samples
        self.contamination = contamination
        self.target_fpr = target_fpr
        self.confidence = confidence
        self.target_map_fpr = target_map_fpr
        self.threshold_steepness = threshold_steepness
        self.threshold_offset = threshold_offset
        self.device = device
        self.random_state = random_state

    grid_shape_: tuple[int, int]
    n_features_in_: int

    @_fit_context(prefer_skip_nested_validation=False)
    @one_task
    def fit(self, X: Any, y: Any = None, *, groups: Any = None) -> Self:
        """Fit the feature extractor, the densities and the thresholds to normal images.

        Parameters
        ----------
        X : images, array-like of shape (n_images, h, w, C) or of shape (n_images, n_features)
            Whatever the feature extractor takes: paths, a folder, arrays, PIL images. With ``features=None``, features
            at positions, or a matrix of a single position. At least three images.
        y : None
            Ignored; there for the interface.
        groups : array-like of shape (n_images,) or None, default=None
            What each image shows, such as the serial number of its part. Images of one group share a fold, so that the
            thresholds hold for new parts.

        Returns
        -------
        PatchDFKDEDetector
            The fitted detector itself.

        Raises
        ------
        ValueError
            If X holds fewer than three images, NaN or infinities, cannot be read as features or images, or the images
            do not differ; if `groups` has another length, or is a single group; if `confidence` needs more images or
            groups than there are, or stands beside a `contamination` or `threshold_offset` that sets the threshold.
            The detector is then as it was.
        TypeError
            If X is sparse, complex, or of a type that is neither features nor images.
        """
        fitted = copy.copy(self)
        table, groups = fitted._training_data(X, groups)
        fitted._fit_table(table, groups)
        fitted._keep_rows(table, groups)
        self._become(fitted)
        return self

    @_fit_context(prefer_skip_nested_validation=False)
    @one_task
    def fit_predict(self, X: Any, y: Any = None, *, groups: Any = None) -> NDArray[np.int64]:
        """Fit to X, and return +1 for images of X that are normal and -1 for the anomalous ones.

        Each image is judged by its out-of-fold score: -1 where `calibration_scores_` lies below `offset_`. Where
        `contamination` sets the threshold, -1 is exactly that share of the images.

        Parameters
        ----------
        X : images, array-like of shape (n_images, h, w, C) or of shape (n_images, n_features)
            As in `fit`.
        y : None
            Ignored; there for the interface.
        groups : array-like of shape (n_images,) or None, default=None
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_images,), int64
            +1 or -1.
        """
        fitted = copy.copy(self)
        fitted._begin(X)
        table = fitted._whole_table(X, reset=True)
        scores = fitted._fit_table(table, groups)
        fitted._keep_rows(table, groups)
        self._become(fitted)
        return labels(self._margins(scores))

    def _fit_table(self, table: NDArray[np.number], groups: Any) -> NDArray[np.floating]:
        """Fit to vectors (n, P, C), or as rows (n, P * C); return the scores (n,) that the threshold is compared with.

        They are those of the training images.
        """
        n = len(table)
        self._n_lowest = self.n_lowest
        vectors = table.reshape(n, math.prod(self.grid_shape_), -1)
        group_ids = with_copies(groups, vectors.reshape(n, -1))
        calibration_groups = np.arange(n) if groups is None else group_ids.numpy()
        self._check_confidence(calibration_groups)
        drawn = drawn_rows(n, self.max_samples, None if groups is None else group_ids, self._seed)
        images = floats(vectors if len(drawn) == n else vectors[drawn])
        largest = int(group_ids[drawn].unique(return_counts=True)[1].max())
        if groups is not None and len(drawn) - largest < _MIN_IMAGES - 1:
            raise ValueError(
                f"groups: {largest} of {len(drawn)} images are one group, and a fit without them needs at least "
                f"{_MIN_IMAGES - 1} others. Give good examples of more parts."
            )
        if groups is None:
            warn_of_near_duplicates(images.reshape(len(drawn), -1), "images", self._n_folds)
        contamination = 0.0 if self.contamination == "auto" else float(self.contamination)
        device = self._density_device()
        training = fit_positions(
            tensor(images, device),
            self._settings(),
            group_ids[drawn].to(device),
            min(n_removed(contamination, len(drawn)), len(drawn) - _MIN_IMAGES),
            self._mirrored_positions(len(drawn), device),
        )
        self._keep(training.fitted)
        maps = np.empty(vectors.shape[:2], training.calibration_maps.cpu().numpy().dtype)
        maps[drawn] = training.calibration_maps.cpu().numpy()
        others = np.setdiff1d(np.arange(n), drawn, assume_unique=True)
        if len(others):
            maps[others] = self._vector_maps(vectors[others])
        self.calibration_scores_ = self._scores(maps)
        self.calibration_groups_ = calibration_groups
        self.classes_ = np.array([-1, 1])
        is_normal = np.ones(n, dtype=bool)
        is_normal[drawn] = training.is_kept.cpu().numpy()
        self.map_offset_ = self._map_threshold(maps[is_normal])
        self.offset_, scores = judged_scores(
            self.calibration_scores_,
            self._promised_threshold(self.calibration_scores_, self.calibration_groups_),
            lambda: self._scores(self._vector_maps(vectors)),
            None if self.contamination == "auto" else n_removed(float(self.contamination), len(vectors)),
            self.threshold_offset,
        )
        return scores

    def score_samples(self, X: Any) -> NDArray[np.floating]:
        """Return the score of each image: the mean log density of the positions where it is lowest.

        Parameters
        ----------
        X : images, array-like of shape (n_images, h, w, C) or of shape (n_images, n_features)
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_images,), dtype of the features
            Natural log of a density of the (normalised) vectors of a position; higher is more normal.

        Raises
        ------
        ValueError
            If X has other features than in `fit`, NaN or infinities, or an image cannot be read.
        """
        return self._scores(self._grid_maps(X))

    def anomaly_maps(
        self, X: Any, *, resolution: Literal["image", "grid"] = "image"
    ) -> NDArray[np.floating] | list[NDArray[np.floating]]:
        """Return the log density of each image at its positions; lower is more anomalous.

        ``maps < detector.map_offset_`` are the anomalous regions. The score of an image is the mean of the `n_lowest`
        smallest values of its map on the grid, and it is anomalous exactly if that lies below `offset_`.

        Parameters
        ----------
        X : images, array-like of shape (n_images, h, w, C) or of shape (n_images, n_features)
            As in `fit`.
        resolution : {"image", "grid"}, default="image"
            "grid" gives a value for each position; "image" gives one for each pixel of the image as it was handed in:
            the grid interpolated bilinearly, and smoothed by a Gaussian of a quarter of a position.

        Returns
        -------
        list of ndarray of shape (height, width), or ndarray of shape (n_images, h, w)
            Natural logs of densities, in the dtype of the features: with "image" a list, since images may differ in
            size.

        Raises
        ------
        ValueError
            As `score_samples`; or if `resolution` is "image" and X holds features, or the feature extractor does not
            see whole images.
        """
        return self._with_maps(X, resolution)[1]

    def assess_with_maps(
        self, X: Any, *, resolution: Literal["image", "grid"] = "image"
    ) -> tuple[Assessment, NDArray[np.floating] | list[NDArray[np.floating]]]:
        """Return all answers for each image, and the maps, from one pass through the feature extractor.

        Parameters
        ----------
        X : images, array-like of shape (n_images, h, w, C) or of shape (n_images, n_features)
            As in `fit`.
        resolution : {"image", "grid"}, default="image"
            As in `anomaly_maps`.

        Returns
        -------
        assessment : Assessment
            As from `assess`.
        maps : list of ndarray of shape (height, width), or ndarray of shape (n_images, h, w)
            As from `anomaly_maps`.

        Raises
        ------
        ValueError
            As `anomaly_maps`.
        """
        grid_maps, maps = self._with_maps(X, resolution)
        return self._assessment(self._scores(grid_maps.reshape(len(grid_maps), -1))), maps

    def regions(self, X: Any, *, resolution: Literal["image", "grid"] = "image") -> list[Region]:
        """Return where images are anomalous: the connected regions of their maps below `map_offset_`.

        Parameters
        ----------
        X : images, array-like of shape (n_images, h, w, C) or of shape (n_images, n_features)
            As in `fit`.
        resolution : {"image", "grid"}, default="image"
            As in `anomaly_maps`: whether places are in pixels or in positions of the grid.

        Returns
        -------
        list of Region
            In the order of the images, in each the region of lowest log density first. Images without a region have
            none. ``pandas.DataFrame(regions)`` makes a table of them.

        Raises
        ------
        ValueError
            As `anomaly_maps`.

        Examples
        --------
        >>> from dfkde_sklearn import PatchDFKDEDetector, ScatteringFeatures
        >>> from dfkde_sklearn.datasets import make_textures
        >>> data = make_textures(n_train=60, n_test=4, image_size=64, anomaly_fraction=0.5, random_state=0)
        >>> detector = PatchDFKDEDetector(ScatteringFeatures(image_size=64, pooling=None)).fit(data.X_train)
        >>> largest = max(detector.regions(data.X_test), key=lambda region: region.area)
        >>> print(data.defects_test[largest.image])
        stain
        >>> bool(data.masks_test[largest.image][round(largest.row), round(largest.column)])
        True
        """
        assessment, maps = self.assess_with_maps(X, resolution=resolution)
        return [
            region
            for i, of_image in enumerate(maps)
            for region in regions_of(of_image, self.map_offset_, i, float(assessment.p_value[i]))
        ]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the mean log density over the images and their positions.

        It compares bandwidths and pooled shares; `GridSearchCV` maximises it. Values of `normalization` are not
        comparable by it, since each has densities of other vectors.

        Parameters
        ----------
        X : images, array-like of shape (n_images, h, w, C) or of shape (n_images, n_features)
            As in `fit`.
        y : None
            Ignored; there for the interface.
        sample_weight : array-like of shape (n_images,) or None, default=None
            Weights of the images in the mean. With metadata routing, pipelines are scored only if there is such a
            parameter.

        Returns
        -------
        float
            Natural log of a density, per position.
        """
        return weighted_mean(self._grid_maps(X).mean(1, dtype=np.float64), sample_weight)

    def to_torch(self) -> PatchDfkdeModel:
        """Return the fitted detector as a torch module.

        Returns
        -------
        PatchDfkdeModel
            Its `forward` gives P(anomalous) of image tensors, as from its `read_images`, where the feature extractor is
            :class:`TimmFeatures` or :class:`ScatteringFeatures`; of features at positions with any other.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        ValueError
            If `flips` is set: the module makes one pass.
        """
        check_is_fitted(self)
        from dfkde_sklearn._deploy.position_model import PatchDfkdeModel

        if self._flips is not None:
            raise ValueError(
                f"flips={self._flips!r} takes several passes through the network, and the module makes one. Fit with "
                "flips=None."
            )
        extractor = self.features_.as_module() if isinstance(self.features_, FeatureExtractor) else None
        return PatchDfkdeModel(self._buffers(), extractor)

    # Private.

    def _settings(self) -> PositionSettings:
        return PositionSettings(
            float(self.pooled_share),
            self.density,
            self.bandwidth,
            self._normalization_strength(),
            self.n_lowest,
            self._n_folds,
            working_memory(),
        )

    def _mirrored_positions(self, n: int, device: torch.device) -> Tensor | None:
        """Return for each position the one where a mirror shows it; None where there are to be no mirrored images."""
        h, w = self.grid_shape_
        few = n < self.n_features_in_ // (h * w)
        if w == 1 or not (few if self.mirror == "auto" else self.mirror):
            return None
        return torch.arange(h * w, device=device).reshape(h, w).flip(1).flatten()

    def _map_threshold(self, maps: NDArray[np.floating]) -> float:
        """Return the value below which the share `target_map_fpr` of the pixels of out-of-fold maps lies."""
        chosen = np.unique(np.linspace(0, len(maps) - 1, _MAP_IMAGES).round().astype(np.int64))
        return threshold_at_rate(fine_maps(maps[chosen].reshape(-1, *self.grid_shape_)).ravel(), self.target_map_fpr)

    def _with_maps(self, X: Any, resolution: str) -> tuple[NDArray[np.floating], Any]:
        """Return maps on the grid (n, h, w), and the maps that are asked for."""
        check_is_fitted(self)
        if resolution not in ("image", "grid"):
            raise ValueError(f"resolution={resolution!r}. Allowed: 'image' or 'grid'.")
        if resolution == "grid":
            grid_maps = self._grid_maps(X)
            grid_maps = grid_maps.reshape(-1, *self.grid_shape_)
            return grid_maps, grid_maps
        if self.features_ is None:
            raise ValueError("resolution='image', but X holds features, and no images that have pixels: use 'grid'.")
        if not lie_over_images(self.features_):
            raise ValueError(
                f"resolution='image' needs features of whole images, and {self.features_!r} crops them. Fit with "
                "crop='squash', or use resolution='grid'."
            )
        X = repeatable(X)
        images = as_images(X, getattr(self.features_, "white_level", None))
        shapes = [images.shape(i) for i in range(len(images))]
        grid_maps = self._grid_maps(X).reshape(-1, *self.grid_shape_)
        return grid_maps, list(image_maps(grid_maps, shapes))

    def _grid_maps(self, X: Any) -> NDArray[np.floating]:
        """Return the log densities (n, P) of images or features."""
        check_is_fitted(self)
        return self._vector_maps(self._whole_table(X, reset=False))

    def _scores(self, maps: NDArray[np.floating]) -> NDArray[np.floating]:
        return lowest_mean(torch.from_numpy(maps), self._n_lowest).numpy()

    def _normalization_strength(self) -> float:
        return normalization_for(self.features_) if self.normalization == "auto" else float(self.normalization)

    @torch.inference_mode()
    def _vector_maps(self, vectors: NDArray[np.number]) -> NDArray[np.floating]:
        """Return the log densities (n, P) of vectors (n, P, C)."""
        device = self._density_device()
        density = self._fitted(device)
        maps = np.empty(vectors.shape[:2], np.result_type(floats(vectors[:1])))
        for start in range(0, len(vectors), _IMAGES):
            part = tensor(floats(vectors[start : start + _IMAGES]), device)
            # In the dtype of the fit or a wider one.
            dtype = torch.promote_types(part.dtype, density.kernel_centers.dtype)
            maps[start : start + _IMAGES] = density.log_density(part.to(dtype), working_memory()).cpu().numpy()
        return maps

    def _default_extractor(self) -> FeatureExtractor:
        from dfkde_sklearn._features.network import TimmFeatures

        return TimmFeatures(pooling=None, device=self.device)

    def _begin(self, X: Any) -> None:
        super()._begin(X)
        self._flips = self.flips

    def _changed_parameters(self) -> dict[str, tuple[Any, Any]]:
        changed = super()._changed_parameters()
        return changed if self.flips == self._flips else changed | {"flips": (self._flips, self.flips)}

    def _reads_parts(self) -> bool:
        return self._flips is None

    def _whole_table(self, X: Any, *, reset: bool) -> NDArray[np.number]:
        """Return the vectors (n, P, C) of images at once; with `reset`, the feature extractor is fitted first."""
        if self.features_ is None:
            if self._flips is not None and reset:
                raise ValueError(f"flips={self._flips!r} needs images, and X holds features. Leave it out.")
            return self._validated(X, reset=reset)
        # The parts of a union read X one after the other.
        if self._flips is not None or not isinstance(self.features_, FeatureExtractor):
            X = repeatable(X)
        features = self.features_.fit_transform(X) if reset else self.features_.transform(X)
        return self._validated(self._flip_averaged(features, X), reset=reset)

    def _flip_averaged(self, features: Any, X: Any) -> Any:
        """Return the mean of features (n, h, w, C) and of those of flipped images, flipped back."""
        passes = _FLIPS[self._flips]
        if not passes:
            return features
        if not isinstance(self.features_, FeatureExtractor) or self.features_.grid_shape_ is None:
            raise ValueError(
                f"flips={self._flips!r} needs TimmFeatures or ScatteringFeatures with pooling=None, whose features can "
                f"be flipped back; features={self.features_!r}."
            )
        total = features.astype(np.float64)
        for axes in passes:
            # Axis 0 of an image is axis 1 of a batch.
            total += np.flip(self.features_.transform_flipped(X, axes), tuple(axis + 1 for axis in axes))
        return (total / (1 + len(passes))).astype(features.dtype)

    def _validated(self, X: Any, *, reset: bool) -> NDArray[np.number]:
        """Return features at positions, or a matrix of one position, as vectors (n, P, C)."""
        if isinstance(X, Tensor):
            X = X.detach().cpu()
            X = (X.float() if X.dtype == torch.bfloat16 else X).numpy()
        shape = tuple(X.shape) if hasattr(X, "shape") else ()
        if len(shape) == 4 and min(shape[1:]) > 0:
            grid_shape, table = shape[1:3], np.asarray(X).reshape(shape[0], math.prod(shape[1:]))
        elif len(shape) != 4 and is_matrix(X):
            grid_shape, table = (1, 1), X
        else:
            raise ValueError(
                f"features={self.features!r} {'takes' if reset else 'was fitted on'} features at positions (n_images, "
                f"h, w, C), or a matrix (n_images, n_features) of one position; got {type(X).__name__}"
                f"{f' of shape {shape}' if shape else ''}. Fit on images with features=TimmFeatures(pooling=None) or "
                "features=ScatteringFeatures(pooling=None), or give their features."
            )
        if reset:
            self.grid_shape_ = grid_shape
        elif grid_shape != self.grid_shape_:
            h, w = self.grid_shape_
            raise ValueError(
                f"X has features at {' x '.join(map(str, grid_shape))} positions, and the detector was fitted on {h} x "
                f"{w}: features of shape (n_images, {h}, {w}, {self.n_features_in_ // (h * w)}) are needed."
            )
        table = validate_data(
            self,
            table,
            reset=reset,
            dtype=[np.float64, np.float32],
            ensure_min_samples=_MIN_IMAGES if reset else 1,
        )
        return table.reshape(len(table), math.prod(self.grid_shape_), -1)

    def _keep(self, fitted: PositionDensity) -> None:
        """Set the fitted attributes that come from the density, as NumPy arrays and plain numbers."""
        for name, value in fitted.state().items():
            setattr(self, _attribute(name), value.cpu().numpy() if isinstance(value, Tensor) else value)

    def _fitted(self, device: torch.device) -> PositionDensity:
        """Return the density that `_keep` stored, on the device."""
        kept = {name: getattr(self, _attribute(name)) for name, _ in STATE}
        return PositionDensity.from_state(
            {name: tensor(value, device) if isinstance(value, np.ndarray) else value for name, value in kept.items()}
        )

    def _buffers(self) -> PositionBuffers:
        """Return the fitted state as buffers of a torch module, on the CPU."""
        if self.flips != self._flips:
            raise ValueError(
                f"flips={self.flips!r} was set after the fit, which had flips={self._flips!r}. Fit anew, or set it "
                "back."
            )
        buffers = PositionBuffers(self._n_lowest, float(self.threshold_steepness), float(self.offset_))
        # A copy: torch warns of read-only arrays, such as memory maps.
        scores = torch.from_numpy(np.array(self.calibration_scores_))
        groups = torch.from_numpy(np.array(self.calibration_groups_))
        buffers.keep(self._fitted(torch.device("cpu")), scores, groups, self.grid_shape_, self.map_offset_)
        return buffers

    @classmethod
    def _empty_buffers(cls, parameters: Mapping[str, Any]) -> PositionBuffers:
        """Return buffers for the state of a detector with these parameters."""
        return PositionBuffers(parameters["n_lowest"], 1.0, 0.0)

    def _take(self, buffers: PositionBuffers, extractor: Any) -> None:
        """Set all fitted attributes from copies of buffers, and a fitted feature extractor or None."""
        buffers = copy.deepcopy(buffers)  # the arrays share the memory of the tensors
        self._keep(buffers.fitted())
        self.grid_shape_ = (buffers.grid[0], buffers.grid[1])
        self.calibration_groups_ = buffers.calibration_groups.cpu().numpy()
        self.calibration_scores_ = buffers.calibration_scores.numpy()
        self.offset_ = float(buffers.offset)
        self.map_offset_ = float(buffers.map_offset)
        self.classes_ = np.array([-1, 1])
        self.n_features_in_ = buffers.n_features
        self.features_ = extractor
        self._read_arrays()
        # Of the fit, where the parameters may be set to something else.
        self._flips, self._n_lowest = self.flips, buffers.n_lowest

    def _exported_answers(self, X: Any) -> Expected:
        """Return what an exported file must answer for X."""
        from dfkde_sklearn._deploy.export import Expected

        X = repeatable(X)
        grid_maps = self._grid_maps(X)
        scores: tuple[NDArray[np.floating], ...] = (self._scores(grid_maps),)
        if math.prod(self.grid_shape_) > 1:
            scores += (grid_maps.reshape(-1, *self.grid_shape_),)
        if isinstance(self.features_, FeatureExtractor):
            return Expected(X, scores)
        features = X if self.features_ is None else self.features_.transform(X)
        return Expected(np.asarray(features), scores)

    def _density_device(self) -> torch.device:
        device = as_device(self.device)
        return torch.device("cpu") if device.type == "mps" else device


def normalization_for(extractor: Any) -> float:
    """Return the strength of the normalisation of a feature extractor's features with "auto"."""
    # Logarithms, as of wavelets, have lost their scale already: removing more of it hides defects.
    return _OF_NETWORKS if type(extractor).__name__ == "TimmFeatures" else 0.0


def _attribute(name: str) -> str:
    """Return the name of the attribute that holds a part of the density's state."""
    return f"_{name}" if name == "normalization" else f"{name}_"
