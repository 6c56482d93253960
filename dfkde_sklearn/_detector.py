"""DFKDEDetector: the method as a scikit-learn outlier detector."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from math import isclose
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, _fit_context, clone
from sklearn.utils import assert_all_finite
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions, validate_parameter_constraints
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from dfkde_sklearn._calibration import CONFIDENCE, CalibratedOutlierMixin, judged_scores, labels, weighted_mean
from dfkde_sklearn._callbacks import N_CALLS, CallbackSupportMixin, one_task
from dfkde_sklearn._density.estimate import Settings, n_removed
from dfkde_sklearn._density.explain import explained
from dfkde_sklearn._density.fit import fit
from dfkde_sklearn._density.folds import copies, n_moved
from dfkde_sklearn._density.scoring import STATE, FeatureDensity
from dfkde_sklearn._deploy.buffers import DensityBuffers
from dfkde_sklearn._deploy.deployable import DeployableMixin
from dfkde_sklearn._device import as_device
from dfkde_sklearn._explanation import Explanation
from dfkde_sklearn._features.extractor import FeatureExtractor
from dfkde_sklearn._groups import drawn_rows, warn_of_near_duplicates, with_copies
from dfkde_sklearn._inputs import repeatable
from dfkde_sklearn._kernels.bandwidth import scott_bandwidth
from dfkde_sklearn._matrices import blocks, floats, is_matrix, is_of_numbers, tensor, working_memory
from dfkde_sklearn._streams import StreamsMixin

if TYPE_CHECKING:
    from dfkde_sklearn._deploy.export import Expected
    from dfkde_sklearn._deploy.model import DfkdeModel

# Rows scored at a time, so that their copies take little memory.
_ROWS = 2**14
# Share of training rows up to which copies of others are no reason for a warning.
_FEW_COPIES = 0.02
# Parts of the density's state that are public attributes; the others are private.
_PUBLIC_STATE = ("mean", "components", "singular_values", "max_length", "bandwidth", "kernel_centers")
# Numbers below the normal range count as zero in the threads of the kernels.
_POSITIVE = Interval(Real, float(np.finfo(np.float64).tiny), None, closed="left")


class DFKDEDetector(CalibratedOutlierMixin, StreamsMixin, DeployableMixin, CallbackSupportMixin, BaseEstimator):
    """Deep feature kernel density estimation: an outlier detector for images and feature rows.

    A feature extractor turns images into feature rows, these are reduced to their principal components, and a Gaussian
    kernel density of the normal training rows scores new rows. The threshold comes from out-of-fold scores of the
    training rows, so that the requested false-alarm rate holds on new data.

    Parameters
    ----------
    features : "auto", transformer or None, default="auto"
        The feature extractor. With "auto", a two-dimensional numeric X is the feature matrix, and any other X is images
        for :class:`TimmFeatures`. A transformer is cloned and fitted as `features_`. With None, X must be a
        feature matrix.
    n_components : int, float or "auto", default="auto"
        Principal components to keep. "auto" keeps those along which held-out rows vary about as much as training
        rows: see Notes. An int is the largest number, a float in (0, 1) keeps the fewest that hold this share of the
        variance.
    scaling : {"scale", "norm"} or None, default="scale"
        What is done to the principal components before the density: "scale" divides by the largest norm in
        training (a constant in the log density), "norm" makes each row unit length, None leaves them.
    bandwidth : {"scott", "silverman", "loo"} or float, default="scott"
        The factor h; the kernel covariance is h squared times the covariance of the training rows. For n rows and d
        components, "scott" is ``n ** (-1 / (d + 4))`` and "silverman" ``(n * (d + 2) / 4) ** (-1 / (d + 4))``; "loo"
        has the largest leave-one-out likelihood; a float is the factor itself, as `bw_method` of
        `scipy.stats.gaussian_kde`.
    residual : {"gaussian", "box"} or None, default="box"
        The term for the distance from the principal axes. "box" weighs it by its effective dimension [3]_, "gaussian"
        is the residual of probabilistic PCA [2]_, None scores the components alone.
    max_samples : int or None, default=40000
        Fit on at most this many training rows, drawn with `random_state`, of `groups` whole ones; None takes all. Of
        more images, and of streams, no other features are kept in memory.
    contamination : "auto" or float, default="auto"
        "auto" takes all training rows for normal. A float in (0, 0.5] is the share of them that is anomalous: the rows
        with the lowest scores leave the fit, and the threshold lies between them and the others.
    target_fpr : float, default=0.05
        The share of new normal rows that may be called anomalous; used where `contamination` and `threshold_offset`
        are "auto".
    confidence : float in (0, 1) or None, default=None
        The probability, over training sets, that `target_fpr` holds for this detector; None: it holds on average over
        detectors. With `groups`, it is then the share of new groups of which any row is called anomalous.
    threshold_steepness : float, default=0.05
        Slope of the probability at the threshold, per unit (nat) of log density.
    threshold_offset : "auto" or float, default="auto"
        The log density at which a row is as probably anomalous as normal. A float (12.0 is the original's) replaces the
        threshold from the training data in `offset_` too.
    device : str, torch.device or None, default=None
        Where the density is computed, and the features of `features="auto"`: None takes the first CUDA GPU, else the
        CPU. Apple's "mps" has no float64: there the features are computed on it and the density on the CPU.
    random_state : int, RandomState instance or None, default=None
        Draws the `max_samples` rows.

    Attributes
    ----------
    features_ : transformer or None
        The fitted feature extractor; None where X is the feature matrix.
    n_features_in_ : int
        Number of features the density was fitted on: columns of X, or of what the feature extractor returns.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns of X, where they are all strings.
    mean_ : ndarray of shape (`n_features_in_`,), float64
        Mean of the training rows.
    components_ : ndarray of shape (`n_components_`, `n_features_in_`), float64
        The principal axes, orthonormal, in order of decreasing variance.
    singular_values_ : ndarray of shape (`n_components_`,), float64
        Singular values of the centred training rows on the axes.
    n_components_ : int
        Number of components kept. It is at most `n_components`, at most the rank of the training rows, and less than
        the number of distinct rows that remain without one of 20 folds and without the rows that `contamination`
        removes.
    max_length_ : float
        The largest norm of a training row's components, by which "scale" divides.
    bandwidth_ : float
        The factor h.
    kernel_centers_ : ndarray of shape (n_kernels, `n_components_`)
        The training rows of the density, whitened: their covariance is the identity.
    calibration_scores_ : ndarray of shape (n_samples,)
        Log density of each training row from a fit without it, and then those of :meth:`recalibrate`; only these
        set the threshold. Of images beyond `max_samples`, those that were drawn. See Notes.
    calibration_groups_ : ndarray of shape (n_samples,), int64
        The number of the group that each calibration score counts for: those of `groups`, or else each its own.
    offset_ : float
        The threshold: rows whose log density lies below it are called anomalous.
    classes_ : ndarray of shape (2,)
        ``[-1, 1]``: anomalous, normal; the columns of `predict_proba`.

    See Also
    --------
    TimmFeatures : Features of pretrained networks.
    ScatteringFeatures : Features that need no download.
    sklearn.neighbors.KernelDensity : A kernel density without reduction or whitening.

    Notes
    -----
    The density of the scaled principal components is that of `scipy.stats.gaussian_kde`, computed in log space in the
    dtype of the features (float32 or float64); the residual term is added to it.

    The training rows are divided into 20 consecutive folds, and each fold is scored with axes, whitening and kernels
    from the other folds: these out-of-fold scores are `calibration_scores_`, and their quantile `target_fpr` is
    `offset_`; with `confidence` it is one of the lowest of them (docs/guide/thresholds.rst). The same folds measure how
    far held-out rows lie from the axes, which sets the scale of the residual, and their variance along each axis:
    ``n_components="auto"`` keeps the first axes, as long as the variance of held-out rows is at most twice that of the
    rows that the axis was computed from.

    Rows of a feature matrix that are left out by `max_samples`, and rows left out by `contamination`, are scored by the
    fit itself. The false-alarm rate holds for new rows from the same distribution as the training rows. If several rows
    show one part, give their `groups` to :meth:`fit`: folds are then of whole groups, `max_samples` draws whole groups,
    and the rate holds for new ones.
    Without `groups`, near-duplicates in different folds are looked for, and a warning says how many there are. Equal
    rows share a fold wherever they stand.

    "auto" and "box" were chosen on three data sets, where no setting is best everywhere (docs/guide/quality.rst).
    :meth:`original` has the original's settings.

    References
    ----------
    .. [1] Akcay et al. (2022), Anomalib: a deep learning library for anomaly detection,
       doi:10.1109/ICIP46576.2022.9897283
    .. [2] Tipping and Bishop (1999), Probabilistic principal component analysis, doi:10.1111/1467-9868.00196
    .. [3] Box (1954), Some theorems on quadratic forms applied in the study of analysis of variance problems,
       doi:10.1214/aoms/1177728786
    .. [4] Vovk, Gammerman and Shafer (2005), Algorithmic learning in a random world, doi:10.1007/b106715

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import DFKDEDetector
    >>> rng = np.random.default_rng(0)
    >>> good = rng.normal(size=(200, 32)) * np.linspace(2, 0.1, 32)
    >>> detector = DFKDEDetector(n_components=4).fit(good)
    >>> new = rng.normal(size=(3, 32)) * np.linspace(2, 0.1, 32)
    >>> new[2] += 8
    >>> detector.predict(new)
    array([ 1,  1, -1])
    >>> detector.p_values(new).round(2)
    array([0.36, 0.75, 0.  ])
    """

    # The public path, which pickles and lists of trusted types name.
    __module__ = "dfkde_sklearn"
    _saved_as = "DFKDEDetector"

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "features": [StrOptions({"auto"}), HasMethods(["fit", "transform"]), None],
        "n_components": [
            Interval(Integral, 1, None, closed="left"),
            Interval(Real, 0, 1, closed="neither"),
            StrOptions({"auto"}),
        ],
        "scaling": [StrOptions({"scale", "norm"}), None],
        "bandwidth": [StrOptions({"scott", "silverman", "loo"}), _POSITIVE],
        "residual": [StrOptions({"gaussian", "box"}), None],
        "max_samples": [Interval(Integral, 2, None, closed="left"), None],
        "contamination": [StrOptions({"auto"}), Interval(Real, 0, 0.5, closed="right")],
        "target_fpr": [Interval(Real, 0, 1, closed="neither")],
        "confidence": CONFIDENCE,
        "threshold_steepness": [Interval(Real, 0, None, closed="neither")],
        "threshold_offset": [StrOptions({"auto"}), Interval(Real, None, None, closed="neither")],
        "device": [str, torch.device, None],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        features: Any = "auto",
        *,
        n_components: int | float | Literal["auto"] = "auto",
        scaling: Literal["scale", "norm"] | None = "scale",
        bandwidth: Literal["scott", "silverman", "loo"] | float = "scott",
        residual: Literal["gaussian", "box"] | None = "box",
        max_samples: int | None = 40_000,
        contamination: Literal["auto"] | float = "auto",
        target_fpr: float = 0.05,
        confidence: float | None = None,
        threshold_steepness: float = 0.05,
        threshold_offset: Literal["auto"] | float = "auto",
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.features = features
        self.n_components = n_components
        self.scaling = scaling
        self.bandwidth = bandwidth
        self.residual = residual
        self.max_samples = max_samples
        self.contamination = contamination
        self.target_fpr = target_fpr
        self.confidence = confidence
        self.threshold_steepness = threshold_steepness
        self.threshold_offset = threshold_offset
        self.device = device
        self.random_state = random_state

    @classmethod
    def original(cls, features: Any = "auto", **parameters: Any) -> Self:
        """Return a detector with the settings of the original [1]_: 16 components, and no residual.

        Its threshold still comes from the training data, since the original's constant of 12 keeps no false-alarm
        rate; ``threshold_offset=12.0`` sets that constant.

        Parameters
        ----------
        features : "auto", transformer or None, default="auto"
            As in the constructor.
        **parameters : dict
            Other parameters of the constructor, which replace these settings.

        Returns
        -------
        DFKDEDetector
            Not fitted.

        See Also
        --------
        DfkdeModel : The original's model itself.

        References
        ----------
        .. [1] Akcay et al. (2022), Anomalib: a deep learning library for anomaly detection,
           doi:10.1109/ICIP46576.2022.9897283
        """
        return cls(features, **{"n_components": 16, "residual": None} | parameters)

    @_fit_context(prefer_skip_nested_validation=False)
    @one_task
    def fit(self, X: Any, y: Any = None, *, groups: Any = None) -> Self:
        """Fit the feature extractor, the principal components, the density and the threshold to normal data.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            A feature matrix, or whatever the feature extractor takes: paths, a folder, arrays, PIL images.
        y : None
            Ignored; there for the interface.
        groups : array-like of shape (n_samples,) or None, default=None
            What each row or image shows, such as the serial number of its part. Folds leave out whole groups, so that
            the threshold, the residual, ``n_components="auto"`` and ``bandwidth="loo"`` hold for new parts. Exact
            copies are always in one group. scikit-learn passes it on by metadata routing (`set_fit_request`).

        Returns
        -------
        DFKDEDetector
            The fitted detector itself.

        Raises
        ------
        ValueError
            If X holds fewer than two distinct rows, NaN or infinities, or cannot be read as features or images; if
            `groups` has another length, a missing label, or only one group; if `confidence` needs more rows or groups
            than there are, or stands beside a `contamination` or `threshold_offset` that sets the threshold.
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
        """Fit to X, and return +1 for rows of X that are normal and -1 for the anomalous ones.

        Each row is judged by its out-of-fold score: -1 where `calibration_scores_` lies below `offset_`.
        ``fit(X).predict(X)`` would call nearly all rows normal, each by its own kernel. Where `contamination` sets the
        threshold, both are the same, and -1 is exactly that share of the rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As in `fit`.
        y : None
            Ignored; there for the interface.
        groups : array-like of shape (n_samples,) or None, default=None
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples,), int64
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
        """Fit to rows, and return the scores (n,) of these that are compared with the threshold."""
        group_numbers = with_copies(groups, table)
        calibration_groups = np.arange(len(table)) if groups is None else group_numbers.numpy()
        self._check_confidence(calibration_groups)
        drawn = drawn_rows(len(table), self.max_samples, None if groups is None else group_numbers, self._seed)
        rows = floats(table if len(drawn) == len(table) else table[drawn])
        if groups is None:
            warn_of_near_duplicates(rows, "rows" if self.features_ is None else "images")
        training = fit(
            tensor(rows, self._density_device()),
            self.n_components,
            Settings(
                self.scaling,
                self.bandwidth,
                self.residual,
                0.0 if self.contamination == "auto" else float(self.contamination),
                working_memory(),
            ),
            group_numbers[drawn],
            leave_out_groups=groups is not None,
        )
        # A few copies, as rounded measurements have, are in one fold and change nothing else.
        moved = n_moved(copies(table)[drawn]) if groups is None else 0
        if moved > _FEW_COPIES * len(drawn):
            warnings.warn(
                f"{moved} of {len(drawn)} training rows are exact copies of rows elsewhere in X. Copies "
                "share a fold, so that the threshold holds for new rows, but each has its kernel in the density. "
                "Leave them out unless they are meant.",
                UserWarning,
                stacklevel=4 + N_CALLS,
            )
        if training.n_unrefitted:
            n_components = training.fitted.density.axes.shape[1]
            warnings.warn(
                f"{training.n_unrefitted} of {len(drawn)} training rows cannot be scored by a fit without them: the "
                f"others span fewer than n_components_={n_components} dimensions. The threshold and the p-values may "
                "be far off on new rows. Use fewer components or more distinct rows.",
                UserWarning,
                stacklevel=4 + N_CALLS,
            )
        self._keep(training.fitted)
        self.calibration_scores_ = self._scores_of_all(
            table, copies(table).numpy(), drawn, training.calibration_scores.cpu().numpy()
        )
        self.calibration_groups_ = calibration_groups
        self.classes_ = np.array([-1, 1])
        self.offset_, scores = judged_scores(
            self.calibration_scores_,
            self._promised_threshold(self.calibration_scores_, self.calibration_groups_),
            lambda: self._scores(table),
            None if self.contamination == "auto" else n_removed(float(self.contamination), len(table)),
            self.threshold_offset,
        )
        return scores

    def score_samples(self, X: Any) -> NDArray[np.floating]:
        """Return the log density of each row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples,), dtype of the features
            Natural log of the density of the scaled principal components, with the residual term if `residual`
            is not None; higher is more normal. Always finite: the smallest value is the lowest number of the dtype.

        Raises
        ------
        ValueError
            If X has other features than in `fit`, NaN or infinities.
        """
        return self._log_density(X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the mean log density of the rows in the full feature space.

        The density of the principal components times the Gaussian residual of probabilistic PCA [1]_, whatever
        `residual` is, so that it compares numbers of components and bandwidths; `GridSearchCV`
        maximises it. With ``scaling="norm"`` the components have no density in the feature space: that of the unit rows
        stands in.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As in `fit`.
        y : None
            Ignored; there for the interface.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            Weights of the rows in the mean. With metadata routing, pipelines are scored only if there is such a
            parameter.

        Returns
        -------
        float
            Natural log of a density, per row.

        References
        ----------
        .. [1] Tipping and Bishop (1999), Probabilistic principal component analysis, doi:10.1111/1467-9868.00196
        """
        return weighted_mean(self._log_density(X, full=True), sample_weight)

    def explain(self, X: Any, *, n_kernels: int = 5) -> Explanation:
        """Return what the log density of each row is made of.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As in `fit`.
        n_kernels : int, default=5
            The number of training rows to name for each row, at most that of the kernels.

        Returns
        -------
        Explanation
            The training rows that carry the density, the terms of the principal axes, of the residual and of the
            layers, and the gains of the features; see :ref:`explanation`.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        ValueError
            If `n_kernels` is not a positive integer; or as `score_samples`.

        Examples
        --------
        >>> import numpy as np
        >>> from dfkde_sklearn import DFKDEDetector
        >>> good = np.random.default_rng(0).normal(size=(200, 8))
        >>> detector = DFKDEDetector(n_components=8, residual=None).fit(good)
        >>> explanation = detector.explain(good[:2], n_kernels=3)
        >>> explanation.kernels[:, 0]
        array([0, 1])
        >>> terms = explanation.axis_terms.sum(1) + explanation.residual_term + explanation.rest
        >>> bool(np.allclose(terms, detector.score_samples(good[:2])))
        True
        """
        check_is_fitted(self)
        of_kernels = {"n_kernels": [Interval(Integral, 1, None, closed="left")]}
        validate_parameter_constraints(of_kernels, {"n_kernels": n_kernels}, "explain")
        rows = tensor(floats(self._table(X)), self._density_device())
        with torch.inference_mode():
            density = self._fitted(rows.dtype, rows.device)
            parts = explained(density, rows, int(n_kernels), working_memory())
        arrays = {name: part.cpu().numpy() for name, part in parts._asdict().items()}
        feature_terms = arrays.pop("feature_terms")
        layers: dict[str, NDArray[np.float64]] = {}
        names, widths = (getattr(self.features_, name, None) for name in ("layers_", "layer_widths_"))
        if names is not None and widths is not None and sum(widths) == self.n_features_in_:
            of_layers = np.split(feature_terms, np.cumsum(widths)[:-1], axis=1)
            layers = {name: terms.sum(1) for name, terms in zip(names or ["embedding"], of_layers, strict=True)}
        return Explanation(**arrays, layer_terms=layers)

    def to_torch(self) -> DfkdeModel:
        """Return the fitted detector as a torch module.

        Returns
        -------
        DfkdeModel
            Its `forward` gives P(anomalous) of image tensors, as from its `read_images`, where the feature extractor is
            :class:`TimmFeatures` or :class:`ScatteringFeatures`; of feature rows with any other.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        """
        check_is_fitted(self)
        from dfkde_sklearn._deploy.model import extractor_module, fitted_model

        n_components = self.n_components_ if self.n_components == "auto" else self.n_components
        return fitted_model(self._buffers(), extractor_module(self.features_), n_components, self.max_samples)

    @classmethod
    def from_torch(cls, model: DfkdeModel) -> Self:
        """Return a fitted module as a detector.

        Parameters
        ----------
        model : DfkdeModel
            Fitted, from `to_torch`, or read by :meth:`DfkdeModel.from_anomalib`.

        Returns
        -------
        DFKDEDetector
            Fitted, with the module's threshold as `threshold_offset`. Parameters that only matter for a fit, and that
            the module does not know, have their defaults.

        Raises
        ------
        TypeError
            If `model` is another module.
        ValueError
            If it is not fitted.
        """
        from dfkde_sklearn._deploy.model import DfkdeModel

        if not isinstance(model, DfkdeModel):
            raise TypeError(
                f"A DfkdeModel is needed, not {type(model).__name__}. For weights: DfkdeModel.from_anomalib."
            )
        buffers = model.density
        buffers.check_fitted()
        bandwidth, scott = float(buffers.bandwidth), scott_bandwidth(*buffers.kernel_centers.shape)
        residual: Literal["gaussian", "box"] | None = None
        if len(buffers.residual):
            residual = "gaussian" if torch.equal(buffers.residual, buffers.gaussian_residual) else "box"
        extractor = None if model.feature_extractor is None else model.feature_extractor.as_extractor()
        detector = cls(
            # A parameter that is set changes no fitted attribute.
            None if extractor is None else clone(extractor),
            n_components=model.n_components,
            scaling=model.pre_processing,
            bandwidth="scott" if isclose(bandwidth, scott, rel_tol=1e-12) else bandwidth,
            residual=residual,
            max_samples=model.filter_count or None,
            threshold_steepness=model.threshold_steepness,
            threshold_offset=model.threshold_offset,
        )
        detector._take(buffers, extractor)
        return detector

    def _scores_of_all(
        self,
        table: NDArray[np.number],
        groups: NDArray[np.int64],
        drawn: NDArray[np.int64],
        scores: NDArray[np.floating],
    ) -> NDArray[np.floating]:
        """Return the scores of the drawn rows, and those of the held-out rows by the fit."""
        if len(drawn) == len(table):
            return scores
        others = np.setdiff1d(np.arange(len(table)), drawn, assume_unique=True)
        of_all = np.empty(len(table), scores.dtype)
        of_all[drawn] = scores
        of_all[others] = self._scores(table, others)
        # Copies of drawn rows are not held out: they get the out-of-fold score of the drawn row.
        drawn_groups, first = np.unique(groups[drawn], return_index=True)
        copied = others[np.isin(groups[others], drawn_groups)]
        of_all[copied] = scores[first[np.searchsorted(drawn_groups, groups[copied])]]
        return of_all

    def _keep(self, fitted: FeatureDensity) -> None:
        """Set the fitted attributes that come from the density, as NumPy arrays and plain numbers."""
        for name, value in fitted.state().items():
            setattr(self, _attribute(name), value.cpu().numpy() if isinstance(value, Tensor) else value)
        self.n_components_ = len(self.components_)

    def _fitted(self, dtype: torch.dtype, device: torch.device) -> FeatureDensity:
        """Return the density that `_keep` stored, on the device, for rows of `dtype`."""
        kept = {name: getattr(self, _attribute(name)) for name, _ in STATE}
        state = {
            name: tensor(value, device) if isinstance(value, np.ndarray) else value for name, value in kept.items()
        }
        return FeatureDensity.from_state(state, dtype)

    def _buffers(self) -> DensityBuffers:
        """Return the fitted state as buffers of a torch module, on the CPU."""
        dtype = torch.float32 if self.kernel_centers_.dtype == np.float32 else torch.float64
        buffers = DensityBuffers(self.scaling, float(self.threshold_steepness), float(self.offset_))
        # A copy: torch warns of read-only arrays, such as memory maps.
        scores = torch.from_numpy(np.array(self.calibration_scores_))
        groups = torch.from_numpy(np.array(self.calibration_groups_))
        buffers.keep(self._fitted(dtype, torch.device("cpu")), scores, groups)
        return buffers

    def _exported_answers(self, X: Any) -> Expected:
        """Return what an exported file must answer for X."""
        from dfkde_sklearn._deploy.export import Expected

        if isinstance(self.features_, FeatureExtractor):
            X = repeatable(X)
            return Expected(X, (self.score_samples(X),))
        rows = self._table(X)
        return Expected(rows, (self._scores(rows),))

    @classmethod
    def _empty_buffers(cls, parameters: Mapping[str, Any]) -> DensityBuffers:
        """Return buffers for the state of a detector with these parameters."""
        return DensityBuffers(parameters["scaling"], 1.0, 0.0)

    def _take(self, buffers: DensityBuffers, extractor: Any) -> None:
        """Set all fitted attributes from copies of buffers, and a fitted feature extractor or None."""
        buffers = copy.deepcopy(buffers)  # the arrays share the memory of the tensors
        self._keep(buffers.fitted(buffers.kernel_centers.dtype))
        self.calibration_groups_ = buffers.calibration_groups.cpu().numpy()
        self.calibration_scores_ = buffers.calibration_scores.cpu().numpy()
        self.offset_ = float(buffers.offset)
        self.classes_ = np.array([-1, 1])
        self.n_features_in_ = len(self.mean_)
        self.features_ = extractor
        self._read_arrays()

    def _log_density(self, X: Any, *, full: bool = False) -> NDArray[np.floating]:
        check_is_fitted(self)
        return self._scores(self._table(X), full=full)

    def _table(self, X: Any) -> NDArray[np.number]:
        """Return the feature matrix of rows or images."""
        return self._whole_table(X, reset=False)

    @torch.inference_mode()
    def _scores(
        self, table: NDArray[np.number], places: NDArray[np.int64] | None = None, *, full: bool = False
    ) -> NDArray[np.floating]:
        """Return the log density of each row of a table, or of those at `places`."""
        device = self._density_device()
        n = len(table) if places is None else len(places)
        parts = []
        # In blocks, as rows may have to be converted, copied, and moved to the device.
        for start in range(0, n, _ROWS):
            block = slice(start, start + _ROWS)
            rows = tensor(floats(table[block] if places is None else table[places[block]]), device)
            parts.append(self._fitted(rows.dtype, device).log_density(rows, working_memory(), full=full))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).cpu().numpy()

    def _default_extractor(self) -> FeatureExtractor:
        from dfkde_sklearn._features.network import TimmFeatures

        return TimmFeatures(device=self.device)

    def _reads_parts(self) -> bool:
        return True

    def _whole_table(self, X: Any, *, reset: bool) -> NDArray[np.number]:
        """Return the feature matrix of rows or images at once; with `reset`, the feature extractor is fitted first."""
        if self.features_ is not None:
            if not isinstance(self.features_, FeatureExtractor):
                X = repeatable(X)  # the parts of a union read it one after the other
            X = self.features_.fit_transform(X) if reset else self.features_.transform(X)
        return self._validated(X, reset=reset)

    def _validated(self, X: Any, *, reset: bool) -> NDArray[np.number]:
        if isinstance(X, np.ndarray) and X.ndim == 4 and self.features_ is not None:
            raise ValueError(
                f"features={self.features!r} returns features at {X.shape[1]} x {X.shape[2]} positions. Use "
                "PatchDFKDEDetector, which has a density at each of them, or pool the positions, as with pooling='avg'."
            )
        if not is_matrix(X):
            raise ValueError(
                f"features={self.features!r} {'takes' if reset else 'was fitted on'} a feature matrix of shape "
                f"(n_samples, n_features); got images ({type(X).__name__}). Fit on images, with "
                "features=TimmFeatures() or features=ScatteringFeatures(), or give their features."
            )
        if isinstance(X, Tensor):
            X = X.detach().cpu()
            X = (X.float() if X.dtype == torch.bfloat16 else X).numpy()
        is_kept = isinstance(X, np.ndarray) and is_of_numbers(X)
        table = validate_data(
            self,
            X,
            reset=reset,
            dtype=None if is_kept else [np.float64, np.float32],
            ensure_all_finite=not is_kept,
            ensure_min_samples=2 if reset else 1,
        )
        if is_kept:
            for block in blocks(table):
                assert_all_finite(block, estimator_name=type(self).__name__, input_name="X")
        return table

    def _density_device(self) -> torch.device:
        device = as_device(self.device)
        return torch.device("cpu") if device.type == "mps" else device


def _attribute(name: str) -> str:
    """Return the name of the attribute that holds a part of the density's state."""
    return f"{name}_" if name in _PUBLIC_STATE else f"_{name}"
