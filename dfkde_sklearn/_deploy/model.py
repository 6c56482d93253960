"""DfkdeModel: the method as a torch module, with the signature and the methods of the model first published.

The module computes what the detector computes, by the same functions. What it learns lies in the buffers of
`DensityBuffers`, which is also what a saved detector consists of.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dfkde_sklearn._density.estimate import Settings
from dfkde_sklearn._density.fit import fit
from dfkde_sklearn._density.folds import copies
from dfkde_sklearn._density.scoring import (
    SCALINGS,
    STATE,
    FeatureDensity,
    Scaling,
    finite,
    scaled,
    without_rounding,
)
from dfkde_sklearn._features.backbones import weights_hash
from dfkde_sklearn._features.layers import embedding, pooled
from dfkde_sklearn._features.network import TimmFeatures, image_transform
from dfkde_sklearn._features.scattering import ScatteringFeatures, grey_levels
from dfkde_sklearn._images import Images, as_images, image_batches
from dfkde_sklearn._kernels.bandwidth import scott_bandwidth
from dfkde_sklearn._kernels.density import WORKING_MEMORY

if TYPE_CHECKING:
    from dfkde_sklearn._detector import DFKDEDetector

# Draws the rows that filter_count keeps: the original's signature has no place for a seed.
_SEED = 0
# The axes of every buffer; m are training rows.
_AXES = dict(STATE) | {"calibration_scores": "m", "steepness": "", "offset": ""}
_IN_ROW_DTYPE = ("kernel_centers", "calibration_scores")
# Of the residual terms the first number, the variance.
_POSITIVE = ("scale", "max_length", "bandwidth", "residual", "gaussian_residual")


class DensityBuffers(nn.Module):
    """A fitted `FeatureDensity` in buffers, with the scores of its training rows and the curve of probabilities.

    The set of buffers is fixed; their sizes become those of what is kept or loaded. All are float64 but for `kernel_centers`
    and `calibration_scores`, which have the dtype that densities are computed in, and `scaling_code`. They keep these dtypes
    whatever the modules around them are cast to, and stay on the CPU where the others go to a device without float64.

    Parameters
    ----------
    scaling : "scale", "norm" or None
        What is done to the coordinates.
    steepness, offset : float
        Of the probability as a function of the log density.
    """

    mean: Tensor
    scale: Tensor
    components: Tensor
    singular_values: Tensor
    scaling_code: Tensor
    max_length: Tensor
    whitening: Tensor
    log_volume: Tensor
    log_jacobian: Tensor
    bandwidth: Tensor
    kernel_centers: Tensor
    residual: Tensor
    gaussian_residual: Tensor
    calibration_scores: Tensor
    steepness: Tensor
    offset: Tensor

    def __init__(self, scaling: Scaling, steepness: float, offset: float) -> None:
        super().__init__()
        for name, axes in _AXES.items():
            self.register_buffer(name, torch.full([0] * len(axes), math.nan, dtype=torch.float64))
        self.scaling_code = torch.tensor(SCALINGS.index(scaling))
        self.steepness = torch.tensor(steepness, dtype=torch.float64)
        self.offset = torch.tensor(offset, dtype=torch.float64)
        self.scaling = scaling

    @property
    def is_fitted(self) -> bool:
        """Whether there is a density."""
        return len(self.kernel_centers) > 0

    def keep(self, fitted: FeatureDensity, calibration_scores: Tensor) -> None:
        """Take over a fitted density and the scores of its training rows."""
        kept = fitted.state() | {"calibration_scores": calibration_scores}
        for name, value in kept.items():
            dtype = None if name in _IN_ROW_DTYPE else self.get_buffer(name).dtype
            tensor = torch.as_tensor(value, dtype=dtype, device=self.mean.device)
            setattr(self, name, tensor.detach().clone(memory_format=torch.contiguous_format))
        self.scaling = fitted.density.scaling

    def fitted(self, dtype: torch.dtype) -> FeatureDensity:
        """Return what was kept, for feature rows of `dtype`."""
        return FeatureDensity.from_state({name: self.get_buffer(name) for name, _ in STATE}, dtype)

    def log_density(self, features: Tensor) -> Tensor:
        """Return the natural log of the density of feature rows (n, D), of shape (n,), in their dtype."""
        on_device = features.to(self.mean.device)
        if torch.compiler.is_compiling() or (features.requires_grad and torch.is_grad_enabled()):
            log_densities = self.traceable_log_density(on_device)
        elif len(features) == 0:
            log_densities = on_device.new_empty(0)
        else:
            log_densities = self.fitted(features.dtype).log_density(on_device, WORKING_MEMORY)
        return finite(log_densities.to(features))

    def traceable_log_density(self, features: Tensor) -> Tensor:
        """Return the same in float64, by few operations on whole tensors, that can be traced and differentiated.

        The kernels at a row q are ``exp(q . k - |k|^2 / 2)`` times a factor of q alone, ``exp(-|q|^2 / 2)``: however
        far out q lies, its logarithm is added to that of the sum, and nothing underflows.
        """
        n, d = self.kernel_centers.shape
        # With an axis between: where a network ends in a reduction that drops the axis of positions, OpenVINO 2026.4
        # subtracts the constant from other elements.
        centred = (features.double()[:, None] * self.scale - self.mean * self.scale)[:, 0]
        coordinates = centred @ self.components.T
        # Scalars are multiplied into the small matrix: onnxruntime would fuse one beside a large product into it, as
        # a number of float32. Exporters round Python's floats to float32 too, but no tensors.
        if self.scaling == "scale":
            queries = coordinates @ (self.whitening / (self.bandwidth * self.max_length * self.scale))
        else:
            queries = scaled(coordinates, self.scaling, 1.0) @ (self.whitening / self.bandwidth)
        kernels = self.kernel_centers.double() / self.bandwidth
        log_sums = torch.logsumexp(queries @ kernels.T - kernels.square().sum(1) / 2, 1) - queries.square().sum(1) / 2
        log_count = torch.tensor(math.log(n) + d * math.log(math.tau) / 2, dtype=torch.float64, device=self.mean.device)
        log_densities = log_sums + (self.log_volume - d * self.bandwidth.log() - log_count)
        if len(self.residual):
            squared_distances = (centred - coordinates @ self.components).square().sum(1)
            offset = (self.mean * self.scale).square().sum()
            squared_distances = without_rounding(squared_distances, coordinates, offset, features.dtype)
            log_densities = log_densities + self.residual[1] - squared_distances / (2 * self.residual[0])
        return log_densities

    def p_anomalous(self, log_densities: Tensor) -> Tensor:
        """Return P(anomalous) for natural logs of densities."""
        # The difference in float64, then in the dtype of the scores: as the detector does it.
        excess = (log_densities.to(self.offset) - self.offset).to(log_densities.dtype)
        return torch.sigmoid(-self.steepness.to(log_densities.dtype) * excess).to(log_densities)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Halved, the density would be noise: only the device changes. Apple's GPUs have no float64.
        device = fn(torch.empty(0, dtype=torch.float32, device=self.mean.device)).device
        if device.type == "mps":
            device = torch.device("cpu")
        for name in _AXES:
            setattr(self, name, self.get_buffer(name).to(device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name: state_dict[prefix + name] for name in _AXES if prefix + name in state_dict}
        missing = [prefix + name for name in _AXES if name not in given]
        faults = _faults(given)
        missing_keys.extend(missing)
        error_msgs.extend(f"{prefix}{fault}" for fault in faults)
        if missing or faults:
            return
        for name, value in given.items():
            # torch copies values into the buffers that are there, and refuses other sizes.
            setattr(self, name, torch.empty_like(value, device=self.mean.device))
        super()._load_from_state_dict(
            dict(state_dict), prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.scaling = SCALINGS[int(self.scaling_code)]


def _faults(given: Mapping[str, Any]) -> list[str]:
    """Return what keeps these from being the buffers of one density."""
    faults: list[str] = []
    lengths: dict[str, int] = {}
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            faults.append(f"{name} is not a tensor with its values")
            continue
        floats = (torch.float32, torch.float64) if name in _IN_ROW_DTYPE else (torch.float64,)
        if value.dtype not in ((torch.int64,) if name == "scaling_code" else floats):
            faults.append(f"{name} has dtype {value.dtype}; allowed: {', '.join(map(str, floats))}")
        elif value.ndim != len(_AXES[name]):
            faults.append(f"{name} has shape {tuple(value.shape)}; {len(_AXES[name])} axes are needed")
        else:
            for axis, length in zip(_AXES[name], value.shape, strict=True):
                if lengths.setdefault(axis, length) != length:
                    faults.append(f"{name} has shape {tuple(value.shape)}, which does not fit the other sizes")
    if any(lengths.get(axis, 0) not in (0, 2) for axis in "tu"):
        faults.append("residual and gaussian_residual hold two numbers each, or none")
    if not faults and "scaling_code" in given and int(given["scaling_code"]) not in range(len(SCALINGS)):
        faults.append(f"scaling_code is {int(given['scaling_code'])}; allowed: 0 to {len(SCALINGS) - 1}")
    return faults or [
        fault for name in given if (fault := _value_fault(name, given, is_fitted=lengths.get("n", 0) > 0))
    ]


def _value_fault(name: str, given: Mapping[str, Tensor], *, is_fitted: bool) -> str:
    """Return what is wrong with the values of a buffer, or nothing: with one that is not a number all is normal."""
    value = given[name]
    if name == "scaling_code" or not (is_fitted or name in ("steepness", "offset")):
        return ""
    if not value.numel() and name not in ("residual", "gaussian_residual"):
        return f"{name} has shape {tuple(value.shape)}: it is empty"
    if name == "calibration_scores":
        # A density may be zero.
        return f"{name} holds NaN or +inf" if bool((value.isnan() | (value == math.inf)).any()) else ""
    # anomalib's weights do not tell the singular values of "norm", which no score needs.
    is_unknown = name == "singular_values" and bool(value.isnan().all())
    if not is_unknown and not bool(torch.isfinite(value).all()):
        return f"{name} holds NaN or infinities"
    if name in _POSITIVE and value.numel() and not float(value.flatten()[0]) > 0:
        return f"{name} is {float(value.flatten()[0])}; allowed: positive numbers"
    return ""


class NetworkFeatures(nn.Module):
    """The network of a fitted `TimmFeatures`, a copy of its own: image tensors to feature rows.

    Parameters
    ----------
    extractor : TimmFeatures
        Fitted.
    """

    def __init__(self, extractor: TimmFeatures) -> None:
        super().__init__()
        with extractor._lent_backbone() as backbone:
            self.network = copy.deepcopy(backbone.network).eval().requires_grad_(False)
        self.extractor = _without_module(extractor)
        self._formats = dict(
            zip(
                extractor.layers_ or [""],
                zip(extractor.layer_formats_, extractor.layer_prefix_tokens_, strict=True),
                strict=True,
            )
        )
        self._tapped: dict[str, Tensor] = {}
        modules = dict(self.network.named_modules())
        for layer in extractor.layers_:
            modules[layer].register_forward_hook(_Tap(layer, self))

    def forward(self, batch: Tensor) -> Tensor:
        """Return the features (n, D), float32, of normalised images (n, 3, H, W)."""
        if not torch.compiler.is_compiling():
            return self.extractor._rows(self.network, batch)
        # A traced pass runs to its end, and what comes after the last layer is dropped from the graph.
        like = next((tensor for tensor in self.network.parameters() if tensor.is_floating_point()), batch)
        batch = batch.to(like.dtype)
        if self.extractor.layers_:
            self.network(batch)
            rows = torch.cat([self._tapped[layer] for layer in self.extractor.layers_], dim=1)
            self._tapped.clear()
            return rows
        return self.pooled("", embedding(self.network, batch))

    def pooled(self, layer: str, output: Tensor) -> Tensor:
        """Return one vector (n, C) for each image from the output of a layer."""
        return pooled(output, *self._formats[layer], self.extractor.pooling)

    def as_extractor(self) -> TimmFeatures:
        """Return a fitted feature extractor that computes the same: by name, if the network has its weights still."""
        extractor = copy.copy(self.extractor)
        found = weights_hash(self.network)
        if not isinstance(extractor.backbone, str) or found != extractor.weights_hash_:
            extractor.backbone, extractor.weights = copy.deepcopy(self.network), None
            for module in extractor.backbone.modules():
                module._forward_hooks.clear()
            extractor.weights_hash_, extractor.seed_ = found, None
        return extractor

    def read_images(self, images: Any) -> Tensor:
        """Return images as the network takes them, of shape (n, 3, H, W)."""
        return _read(as_images(images, self.extractor.white_level), image_transform(self.extractor))

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: batch statistics are none of the features."""
        return super().train(False)


class ScatteringModule(nn.Module):
    """A fitted `ScatteringFeatures`: grey levels to feature rows.

    Parameters
    ----------
    extractor : ScatteringFeatures
        Fitted.
    """

    def __init__(self, extractor: ScatteringFeatures) -> None:
        super().__init__()
        self.extractor = copy.copy(extractor)

    def forward(self, batch: Tensor) -> Tensor:
        """Return the features (n, D), float32, of grey levels (n, size, size) from 0 to 1."""
        return self.extractor._rows(batch)

    def as_extractor(self) -> ScatteringFeatures:
        """Return a fitted feature extractor that computes the same."""
        return copy.copy(self.extractor)

    def read_images(self, images: Any) -> Tensor:
        """Return images as grey levels (n, size, size)."""
        pictures = as_images(images, self.extractor.white_level)
        return _read(pictures, lambda picture: grey_levels(picture, self.extractor.image_size))


class DfkdeModel(nn.Module):
    """Deep feature kernel density estimation as a torch module: the model of anomalib [1]_, its defects mended.

    Code that was written for the original runs with only the import changed. What is better: layers are concatenated
    for each image, densities are computed in log space, nothing that is handed in is written to, rows are scored
    together, and the subset of `filter_count` is the same each time.

    Parameters
    ----------
    layers : list of str
        Names of submodules of the backbone, whose outputs are averaged over positions and concatenated.
        An empty list takes the pooled embedding.
    backbone : str, torch.nn.Module or None
        The network: a name that ``timm.create_model`` takes, or a module, which is copied. With None, the
        images are taken for feature rows already.
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
        All that is learnt, in buffers: of float64, also when the model is cast to another type.
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
        if pre_processing not in SCALINGS:
            raise ValueError(f"pre_processing={pre_processing!r}. Allowed: 'scale', 'norm', or None for neither.")
        is_share = isinstance(n_comps, float) and 0 < n_comps < 1
        if not is_share and not (isinstance(n_comps, int) and n_comps >= 1):
            raise ValueError(f"n_comps={n_comps!r}. Allowed: a whole number from 1, or a share of variance in (0, 1).")
        if filter_count and filter_count < 2:
            raise ValueError(f"filter_count={filter_count}. Allowed: 2 or more rows; 0 or None for all.")
        self.n_components = n_comps
        self.filter_count = filter_count
        self.density = DensityBuffers(pre_processing, threshold_steepness, threshold_offset)
        self.feature_extractor: NetworkFeatures | ScatteringModule | None = None
        if backbone is not None:
            extractor = TimmFeatures(
                backbone, layers=list(layers) or None, pretrained=pre_trained, device="cpu", random_state=_SEED
            )
            # Nothing is learnt from the image, but formats of layers are found out.
            self.feature_extractor = NetworkFeatures(extractor.fit(np.zeros((1, 8, 8, 3), np.uint8)))

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
            file is run.
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
            Fitted. Its densities are the original's formula, evaluated in float64. `calibration_scores` leave out each row's
            own kernel only, since the file lacks what a refit needs.

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
        if isinstance(model.feature_extractor, NetworkFeatures):
            load_backbone(model.feature_extractor.network, state.backbone)
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
            A row for each image, without gradient.
        """
        if self.feature_extractor is None:
            return batch
        n_axes = 3 if isinstance(self.feature_extractor, ScatteringModule) else 4
        if batch.ndim != n_axes:
            raise ValueError(
                f"Images of shape {tuple(batch.shape)}. Needed are {n_axes} axes, as read_images gives them; a single "
                "image is a batch of one: image[None]."
            )
        with torch.no_grad():
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
            Rows from `get_features`, batch by batch; one tensor of all will do.

        Returns
        -------
        bool
            True when trained; False when there are fewer rows than components, and the model is as it was.

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
            Whether to return the natural log. The density itself underflows where the log is far below -100.

        Returns
        -------
        Tensor of shape (n,), dtype of the features
            Higher is more normal.

        Raises
        ------
        ValueError
            If the model is not fitted, or was fitted on another number of features.
        """
        if not self.density.is_fitted:
            raise ValueError("This DfkdeModel is not fitted: call fit first, or load a state dict of a fitted one.")
        n_features = len(self.density.mean)
        if features.ndim != 2 or features.shape[1] != n_features:
            raise ValueError(
                f"Features of shape {tuple(features.shape)}; the model was fitted on {n_features} features: "
                f"(n, {n_features}) is needed."
            )
        log_densities = self.density.log_density(_as_rows(features))
        return log_densities if as_log_likelihood else log_densities.exp()

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


def model_of(detector: DFKDEDetector) -> DfkdeModel:
    """Return a fitted detector as a module, its feature extractor included where that is one of ours."""
    model = DfkdeModel(
        [],
        None,
        n_comps=detector.n_components_ if detector.n_components == "auto" else detector.n_components,
        pre_processing=detector.scaling,
        filter_count=detector.max_samples,
        threshold_steepness=float(detector.threshold_steepness),
        threshold_offset=float(detector.offset_),
    )
    model.density = buffers_of(detector)
    extractor: Any = detector.features_
    if isinstance(extractor, TimmFeatures):
        model.feature_extractor = NetworkFeatures(extractor)
    elif isinstance(extractor, ScatteringFeatures):
        model.feature_extractor = ScatteringModule(extractor)
    return model


def buffers_of(detector: DFKDEDetector) -> DensityBuffers:
    """Return what a fitted detector has learnt, on the CPU."""
    buffers = DensityBuffers(detector.scaling, float(detector.threshold_steepness), float(detector.offset_))
    dtype = torch.float32 if detector.kernel_centers_.dtype == np.float32 else torch.float64
    # Copies, since arrays out of a memory map cannot be written to and torch warns of that.
    # On the CPU, as the detector's own device may be one that this machine lacks.
    of_detector = detector._fitted(dtype, torch.device("cpu"))
    buffers.keep(of_detector, torch.from_numpy(np.array(detector.calibration_scores_)))
    return buffers


def keep_buffers(detector: DFKDEDetector, buffers: DensityBuffers) -> None:
    """Set the fitted attributes of a detector that come from its feature rows."""
    # NumPy would see the memory of the buffers.
    buffers = copy.deepcopy(buffers)
    detector._keep(buffers.fitted(buffers.kernel_centers.dtype))
    detector.calibration_scores_ = buffers.calibration_scores.cpu().numpy()
    detector.classes_ = np.array([-1, 1])
    detector.offset_ = float(buffers.offset)
    detector.n_features_in_ = len(buffers.mean)


def detector_of(model: nn.Module, kind: type[DFKDEDetector]) -> DFKDEDetector:
    """Return a fitted model as a detector of the class `kind`."""
    if not isinstance(model, DfkdeModel):
        raise TypeError(f"A DfkdeModel is needed, not {type(model).__name__}. For weights: DfkdeModel.from_anomalib.")
    if not model.density.is_fitted:
        raise ValueError("This DfkdeModel is not fitted: call fit first, or load a state dict of a fitted one.")
    buffers = model.density
    n, d = buffers.kernel_centers.shape
    bandwidth = float(buffers.bandwidth)
    residual: Literal["gaussian", "box"] | None = None
    if len(buffers.residual):
        residual = "gaussian" if torch.equal(buffers.residual, buffers.gaussian_residual) else "box"
    extractor = None if model.feature_extractor is None else model.feature_extractor.as_extractor()
    detector = kind(
        extractor,
        n_components=model.n_components,
        scaling=model.pre_processing,
        bandwidth="scott" if math.isclose(bandwidth, scott_bandwidth(n, d), rel_tol=1e-12) else bandwidth,
        residual=residual,
        max_samples=model.filter_count or None,
        threshold_steepness=model.threshold_steepness,
        threshold_offset=model.threshold_offset,
    )
    keep_buffers(detector, buffers)
    detector.features_ = extractor
    return detector


class _Tap:
    """A hook that hands the output of a layer to a `NetworkFeatures` while its forward pass is traced."""

    def __init__(self, layer: str, features: NetworkFeatures) -> None:
        self.layer = layer
        self.features = features

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        if torch.compiler.is_compiling():
            self.features._tapped[self.layer] = self.features.pooled(self.layer, output)


def _without_module(extractor: TimmFeatures) -> TimmFeatures:
    """Return a copy that does not hold a user's module, which the model has a copy of."""
    extractor = copy.copy(extractor)
    if isinstance(extractor.backbone, nn.Module):
        extractor.backbone = nn.Identity()
    return extractor


def _read(pictures: Images, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    return torch.cat(list(image_batches(pictures, transform, len(pictures))))


def _as_rows(features: Tensor) -> Tensor:
    """Return feature rows in float32 or float64."""
    rows = features if features.dtype in (torch.float32, torch.float64) else features.float()
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(rows).all()):
        raise ValueError("The features hold NaN or infinities.")
    return rows
