"""DfkdeModel: the method as a torch module, with the signature and the methods of the model first published.

The module computes the same as the detector, by the same functions. Its fitted state is in the buffers of
`DensityBuffers`, which are also the content of a saved detector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dfkde_sklearn._density.estimate import Settings
from dfkde_sklearn._density.fit import fit
from dfkde_sklearn._density.folds import copies
from dfkde_sklearn._density.scoring import SCALINGS, Scaling, scaled
from dfkde_sklearn._deploy.buffers import DensityBuffers
from dfkde_sklearn._features.extractor import FeatureExtractor
from dfkde_sklearn._features.modules import FeatureModule
from dfkde_sklearn._features.network import TimmFeatures
from dfkde_sklearn._kernels.density import WORKING_MEMORY

# Draws the rows that filter_count keeps: the original's signature has no place for a seed.
_SEED = 0


class DfkdeModel(nn.Module):
    """Deep feature kernel density estimation as a torch module: the model of anomalib [1]_, with its bugs fixed.

    Code that was written for the original runs with only the import changed. Fixed are these: layers are concatenated
    image by image, densities are computed in log space, inputs are not modified, rows are scored in batches, and the
    subset of `filter_count` is the same each time.

    Parameters
    ----------
    layers : list of str
        Names of submodules of the backbone, whose outputs are averaged over positions and concatenated.
        An empty list takes the pooled embedding.
    backbone : str, torch.nn.Module or None
        The network: a name that ``timm.create_model`` takes, or a module, which is copied. With None, the
        model takes feature rows.
    pre_trained : bool, default=True
        Whether a named backbone gets its pretrained weights, downloaded at the first use.
    n_comps : int or float, default=16
        Principal components to keep: at most this many, or, in (0, 1), the fewest that hold this share of the variance.
    pre_processing : {"scale", "norm"}, default="scale"
        What is done to the principal components: "scale" divides by the largest norm in training, "norm" makes each
        row unit length.
    filter_count : int or None, default=40000
        Fit on at most this many rows, drawn with a fixed seed. 0 or None takes all.
    threshold_steepness : float, default=0.05
        Slope of the probability at the threshold, per unit (nat) of log density.
    threshold_offset : float, default=12.0
        The log density at which an image is as probably anomalous as normal.

    Attributes
    ----------
    feature_extractor : torch.nn.Module or None
        Images to feature rows; the network is its submodule `network`.
    density : torch.nn.Module
        The fitted state, in buffers. Casting the model does not change their dtypes.
    n_components : int or float
        `n_comps`.
    filter_count : int or None
        As given.

    See Also
    --------
    DFKDEDetector : The same method as an estimator, with a threshold from the training data.

    References
    ----------
    .. [1] Akcay et al. (2022), Anomalib: a deep learning library for anomaly detection,
       doi:10.1109/ICIP46576.2022.9897283

    Examples
    --------
    A tiny network with random weights, so that nothing is downloaded:

    >>> import torch
    >>> from dfkde_sklearn import DfkdeModel
    >>> model = DfkdeModel(["layer3", "layer4"], "test_resnet", pre_trained=False, n_comps=4)
    >>> images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> model.fit([model.get_features(images[:6]), model.get_features(images[6:])])
    True
    >>> model(images).shape
    torch.Size([12])
    """

    # The public path, which pickles and lists of trusted types name.
    __module__ = "dfkde_sklearn"

    def __init__(
        self,
        layers: Sequence[str],
        backbone: str | nn.Module | None,
        pre_trained: bool = True,
        n_comps: int | float = 16,
        pre_processing: Literal["scale", "norm"] | None = "scale",
        filter_count: int | None = 40_000,
        threshold_steepness: float = 0.05,
        threshold_offset: float = 12.0,
    ) -> None:
        super().__init__()
        if isinstance(layers, str | nn.Module):
            what = f"{layers!r:.60}"
            if isinstance(backbone, Sequence) and not isinstance(backbone, str):
                raise TypeError(
                    f"layers={what}, and backbone={backbone!r}: anomalib has had them in this order since 1.0. Here it "
                    "is that of the original, DfkdeModel(layers, backbone); or name them."
                )
            raise TypeError(f"layers={what}. Needed is a list of names, for example layers=['layer4'].")
        if pre_processing not in SCALINGS:
            raise ValueError(f"pre_processing={pre_processing!r}. Allowed: 'scale', 'norm', or None for neither.")
        is_share = isinstance(n_comps, float | np.floating) and 0 < n_comps < 1
        if not is_share and not (isinstance(n_comps, int | np.integer) and n_comps >= 1):
            raise ValueError(f"n_comps={n_comps!r}. Allowed: an integer from 1, or a share of variance in (0, 1).")
        if filter_count and filter_count < 2:
            raise ValueError(f"filter_count={filter_count}. Allowed: 2 or more rows; 0 or None for all.")
        self.n_components = n_comps
        self.filter_count = filter_count
        self.density = DensityBuffers(pre_processing, threshold_steepness, threshold_offset)
        self.feature_extractor: FeatureModule | None = None
        if backbone is not None:
            extractor = TimmFeatures(
                backbone, layers=list(layers) or None, pretrained=pre_trained, device="cpu", random_state=_SEED
            )
            # The image only shows the formats of the layers.
            self.feature_extractor = extractor.fit(np.zeros((1, 8, 8, 3), np.uint8)).as_module()

    @classmethod
    def from_anomalib(
        cls,
        weights: str | PathLike[str] | Mapping[str, Tensor],
        layers: Sequence[str] = (),
        backbone: str | nn.Module | None = None,
        *,
        threshold_steepness: float = 0.05,
        threshold_offset: float = 12.0,
    ) -> DfkdeModel:
        """Return the model that anomalib fitted.

        Parameters
        ----------
        weights : str, PathLike or dict
            A checkpoint of anomalib's DFKDE, or its state dict, with any prefix of names. No code in the
            file runs.
        layers : list of str
            The layers that the model was trained with.
        backbone : str, torch.nn.Module or None, default=None
            The backbone it was trained with. It gets the weights in the file; nothing is downloaded. With None, the
            model takes feature rows.
        threshold_steepness, threshold_offset : float
            As in the constructor; the file does not hold them.

        Returns
        -------
        DfkdeModel
            Fitted. Its densities are the original's formula, evaluated in float64. Its calibration scores leave out
            only each row's own kernel, since the file lacks what a refit needs.

        Raises
        ------
        ValueError
            If the weights are not those of a fitted DFKDE, would need code to be run, or do not fit the backbone.
        """
        from dfkde_sklearn._deploy.anomalib import load_backbone, read_state

        state = read_state(weights)
        model = cls(
            layers,
            backbone,
            pre_trained=False,
            n_comps=state.n_components,
            threshold_steepness=threshold_steepness,
            threshold_offset=threshold_offset,
        )
        model.density.keep(state.density(), state.leave_one_out())
        if model.feature_extractor is not None:
            load_backbone(model.feature_extractor.get_submodule("network"), state.backbone)
        return model

    @property
    def pre_processing(self) -> Scaling:
        """What is done to the principal components: "scale", "norm" or None."""
        return self.density.scaling

    @property
    def threshold_steepness(self) -> float:
        """Slope of the probability at the threshold, per nat."""
        return float(self.density.steepness)

    @threshold_steepness.setter
    def threshold_steepness(self, value: float) -> None:
        self.density.steepness = torch.full_like(self.density.steepness, value)

    @property
    def threshold_offset(self) -> float:
        """The log density at which P(anomalous) is one half."""
        return float(self.density.offset)

    @threshold_offset.setter
    def threshold_offset(self, value: float) -> None:
        self.density.offset = torch.full_like(self.density.offset, value)

    @property
    def max_length(self) -> Tensor:
        """The largest norm of a training row's components; NaN before `fit`."""
        return self.density.max_length

    def read_images(self, images: Any) -> Tensor:
        """Return images as the feature extractor takes them: resized, cropped and normalised.

        Parameters
        ----------
        images : images
            A list of paths, PIL images or arrays; an array or tensor of images; a folder; a column of paths.

        Returns
        -------
        Tensor of shape (n, 3, H, W), float32
            With scattering features, of shape (n, H, W): grey levels.

        Raises
        ------
        ValueError
            If an image cannot be read, or the model takes feature rows.
        """
        if self.feature_extractor is None:
            raise ValueError("This model has no feature extractor: it takes feature rows, not images.")
        return self.feature_extractor.read_images(images)

    def get_features(self, batch: Tensor) -> Tensor:
        """Return the features of images: each layer averaged over positions, all layers concatenated.

        Parameters
        ----------
        batch : Tensor of shape (n, 3, H, W)
            Normalised images, as from `read_images`.

        Returns
        -------
        Tensor of shape (n, n_features), float32
            A row for each image; with a gradient if the images require one.
        """
        if self.feature_extractor is None:
            return batch
        n_axes = self.feature_extractor.n_image_axes
        if batch.ndim != n_axes:
            raise ValueError(
                f"Images of shape {tuple(batch.shape)}. Needed are {n_axes} axes, as read_images gives them; a single "
                "image is a batch of one: image[None]."
            )
        return self.feature_extractor(batch)

    def pre_process(self, feature_stack: Tensor, max_length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return scaled components and the length that "scale" divides by.

        Parameters
        ----------
        feature_stack : Tensor of shape (n, d)
            Principal components. They are not written to.
        max_length : Tensor or None, default=None
            The length of training; None takes the largest norm of these rows.

        Returns
        -------
        stack : Tensor of shape (n, d)
            Divided by `max_length` ("scale") or by their own norms ("norm").
        max_length : Tensor of shape ()
            The length.
        """
        if max_length is None:
            max_length = torch.linalg.vector_norm(feature_stack, dim=1).max()
        if self.pre_processing == "scale":
            return feature_stack / max_length, max_length
        return scaled(feature_stack, self.pre_processing, 1.0), max_length

    def fit(self, embeddings: Sequence[Tensor] | Tensor) -> bool:
        """Fit principal components and density to feature rows of normal images.

        Parameters
        ----------
        embeddings : list of Tensor of shape (n, n_features)
            Rows from `get_features`, batch by batch; or one tensor of all rows.

        Returns
        -------
        bool
            True after a fit; False if there are fewer rows than components, which leaves the model unchanged.

        Raises
        ------
        ValueError
            If the rows do not differ, or hold NaN or infinities.
        """
        rows = _as_rows(torch.vstack(list(embeddings)).detach()).to(self.density.mean.device)
        if len(rows) < max(2, self.n_components):
            return False
        if self.filter_count and len(rows) > self.filter_count:
            drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SEED))[: self.filter_count]
            rows = rows[drawn.sort().values.to(rows.device)]
        settings = Settings(self.pre_processing, "scott", None, 0.0, WORKING_MEMORY)
        training = fit(rows, self.n_components, settings, copies(rows.cpu().numpy()))
        self.density.keep(training.fitted, training.calibration_scores)
        return True

    def compute_kde_scores(self, features: Tensor, as_log_likelihood: bool | None = False) -> Tensor:
        """Return the density of each row, or its natural log.

        Parameters
        ----------
        features : Tensor of shape (n, n_features)
            Rows from `get_features`. They are not written to.
        as_log_likelihood : bool, default=False
            Whether to return the natural log. The density itself underflows below a log of about -100 in float32.

        Returns
        -------
        Tensor of shape (n,), dtype of the features
            Higher is more normal.

        Raises
        ------
        ValueError
            If the model is not fitted, or was fitted on another number of features.
        """
        self.density.check_fitted()
        n_features = len(self.density.mean)
        if features.ndim != 2 or features.shape[1] != n_features:
            raise ValueError(
                f"Features of shape {tuple(features.shape)}; the model was fitted on {n_features} features: "
                f"(n, {n_features}) is needed."
            )
        log_densities = self.density.log_density(_as_rows(features))
        return log_densities if as_log_likelihood else log_densities.exp()

    def log_densities(self, features: Tensor) -> tuple[Tensor]:
        """Return the natural logs of the densities of feature rows, as the exports ask for them.

        Parameters
        ----------
        features : Tensor of shape (n, n_features)
            Rows from `get_features`.

        Returns
        -------
        tuple of one Tensor of shape (n,)
            Higher is more normal.
        """
        return (self.compute_kde_scores(features, as_log_likelihood=True),)

    @property
    def feature_shape(self) -> tuple[int]:
        """The shape of the features of an image: (n_features,)."""
        return (len(self.density.mean),)

    def compute_probabilities(self, scores: Tensor) -> Tensor:
        """Return P(anomalous) for natural logs of densities.

        Parameters
        ----------
        scores : Tensor of shape (n,)
            Natural logs of densities.

        Returns
        -------
        Tensor of shape (n,)
            ``1 / (1 + exp(threshold_steepness * (scores - threshold_offset)))``.
        """
        return self.density.p_anomalous(scores)

    def predict(self, features: Tensor) -> Tensor:
        """Return P(anomalous) of feature rows.

        Parameters
        ----------
        features : Tensor of shape (n, n_features)
            Rows from `get_features`.

        Returns
        -------
        Tensor of shape (n,)
            Probabilities.
        """
        return self.compute_probabilities(self.compute_kde_scores(features, as_log_likelihood=True))

    def forward(self, batch: Tensor) -> Tensor:
        """Return P(anomalous) of images.

        Parameters
        ----------
        batch : Tensor of shape (n, 3, H, W)
            Normalised images, as from `read_images`; or feature rows, where the model has no feature extractor.

        Returns
        -------
        Tensor of shape (n,)
            Probabilities.
        """
        return self.predict(self.get_features(batch))


def fitted_model(
    density: DensityBuffers,
    feature_extractor: FeatureModule | None,
    n_comps: int | float,
    filter_count: int | None,
) -> DfkdeModel:
    """Return a model with these parts, not copied; `n_comps` and `filter_count` are for a later `fit`."""
    model = DfkdeModel([], None, n_comps=n_comps, pre_processing=density.scaling, filter_count=filter_count)
    model.density = density
    model.feature_extractor = feature_extractor
    return model


def extractor_module(extractor: Any) -> FeatureModule | None:
    """Return a fitted feature extractor as a module; None for one that has none."""
    return extractor.as_module() if isinstance(extractor, FeatureExtractor) else None


def _as_rows(features: Tensor) -> Tensor:
    """Return feature rows in float32 or float64."""
    rows = features if features.dtype in (torch.float32, torch.float64) else features.float()
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(rows).all()):
        raise ValueError("The features hold NaN or infinities.")
    return rows
