"""Weights that anomalib fitted: read without running code, and converted to a density.

anomalib's model holds ``pca_model`` (``mean`` and ``singular_vectors``), ``max_length``, and ``kde_model``:
``bw_transform``, the Cholesky factor T of the inverse kernel covariance, and ``dataset``, the scaled components
times T. Its density at a row with scaled components z is the mean over i of
``exp(-|dataset_i - z T|^2 / 2) * prod(diag(T)) / (2 pi)^(d/2)``. With h Scott's factor, ``h T`` whitens, and that is an
isotropic kernel of bandwidth h at the rows ``h dataset``.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfkde_sklearn._density.scoring import FeatureDensity, RowDensity
from dfkde_sklearn._kernels.bandwidth import scott_bandwidth
from dfkde_sklearn._kernels.density import leave_one_out

_LEARNED = (
    "pca_model.mean",
    "pca_model.singular_vectors",
    "kde_model.bw_transform",
    "kde_model.dataset",
    "kde_model.norm",
    "max_length",
)
# The rows went through float32, a Cholesky factor and its inverse.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class AnomalibState:
    """What anomalib's DFKDE learned.

    mean : Tensor (D,), float64.
    axes : Tensor (D, d), float64.
    max_length : float, the largest norm of a training row on the axes.
    whitening : Tensor (d, d), float64; whitens scaled components.
    kernel_centers : Tensor (n, d), float64; the whitened training rows.
    scaling : "scale" or "norm".
    backbone : dict, the weights of the backbone by their names in it; empty where the file holds none.
    """

    mean: Tensor
    axes: Tensor
    max_length: float
    whitening: Tensor
    kernel_centers: Tensor
    scaling: Literal["scale", "norm"]
    backbone: dict[str, Tensor]

    @property
    def n_components(self) -> int:
        """Number of components."""
        return self.axes.shape[1]

    @property
    def bandwidth(self) -> float:
        """Scott's factor."""
        return scott_bandwidth(*self.kernel_centers.shape)

    @property
    def log_volume(self) -> float:
        """What whitening adds to the log density of the scaled components."""
        # Not from the stored norm, which overflows in float32 if there are many components.
        return float(self.whitening.diagonal().log().sum())

    def density(self) -> FeatureDensity:
        """Return the density of feature rows; what the components leave out is not in the file."""
        if self.scaling == "scale":
            singular_values = _scaled_rows(self.kernel_centers, self.whitening).norm(dim=0) * self.max_length
            log_jacobian = -self.n_components * math.log(self.max_length)
        else:
            # Lengths of rows are not in the file.
            singular_values = torch.full((self.n_components,), math.nan, dtype=torch.float64)
            log_jacobian = 0.0
        return FeatureDensity(
            self.mean,
            1.0,
            RowDensity(
                centre=torch.zeros_like(self.mean),
                axes=self.axes,
                singular_values=singular_values,
                scaling=self.scaling,
                max_length=self.max_length,
                whitening=self.whitening,
                log_volume=self.log_volume,
                log_jacobian=log_jacobian,
                bandwidth=self.bandwidth,
                kernel_centers=self.kernel_centers,
                residual=None,
                gaussian_residual=None,
            ),
        )

    def leave_one_out(self) -> Tensor:
        """Return the log density (n,) of each training row without its own kernel."""
        # An approximation for "norm": its kernels were centred, and the rows that it scores are not.
        return leave_one_out(self.kernel_centers, self.bandwidth) + self.log_volume


def read_state(weights: str | PathLike[str] | Mapping[str, Any]) -> AnomalibState:
    """Return what a checkpoint file or state dict of anomalib's DFKDE holds.

    Raises
    ------
    ValueError
        If it is not that of a fitted DFKDE, or reading it would run code.
    """
    source = "The state dict" if isinstance(weights, Mapping) else f"{str(weights)!r}"
    given = weights if isinstance(weights, Mapping) else _read_file(Path(weights))
    if isinstance(given, Mapping) and isinstance(given.get("state_dict"), Mapping):
        given = given["state_dict"]
    entries = given.items() if isinstance(given, Mapping) else ()
    tensors = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)}
    anchor = "pca_model.singular_vectors"
    prefixes = [key.removesuffix(anchor) for key in tensors if key == anchor or key.endswith(f".{anchor}")]
    complete = [prefix for prefix in prefixes if all(prefix + name in tensors for name in _LEARNED)]
    if len(complete) != 1:
        reason = f"it holds {len(complete)} such models" if complete else f"its names are {_some(tensors)}"
        raise ValueError(
            f"{source} is not that of one DFKDE model of anomalib: {reason}. Needed are {', '.join(_LEARNED)},"
            " with any prefix."
        )
    prefix = complete[0]
    learned = {name: tensors[prefix + name].detach().cpu().double() for name in _LEARNED}
    if learned["kde_model.dataset"].numel() == 0:
        raise ValueError(f"{source} is of a DFKDE model that was not fitted: kde_model.dataset is empty.")
    return _checked(learned, _backbone_weights(tensors, prefix), source)


def load_backbone(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of the extractor of anomalib, which ends after its last layer, into `network`.

    Raises
    ------
    ValueError
        If there are none, or they are not those of this network.
    """
    own = network.state_dict()
    if not weights:
        raise ValueError(
            "The weights hold no backbone. Build the model without one (backbone=None), and set its feature_extractor "
            "to that of a DfkdeModel with the backbone."
        )
    strange = [name for name in weights if name not in own or own[name].shape != weights[name].shape]
    if strange:
        raise ValueError(
            f"{len(strange)} of {len(weights)} weights in the file are not of this backbone: {_some(strange)}. "
            "Give the backbone, and the layers, that the model was trained with."
        )
    # The file lacks the layers after the last one that was read, which the features do not need. If it lacked others,
    # these would keep random weights.
    last = max(list(own).index(name) for name in weights)
    missing = [name for name in list(own)[:last] if name not in weights and not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"The file lacks {len(missing)} weights of this backbone: {_some(missing)}.")
    network.load_state_dict(dict(weights), strict=False)


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} cannot be read as safetensors: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds more than weights, and reading that would run code from the file. Where you trust "
            "it and have what wrote it: torch.save(torch.load(PATH, weights_only=False)['state_dict'], NEW_PATH)."
        ) from error
    except (RuntimeError, EOFError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a file of torch.save: {error}") from error


def _backbone_weights(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights under ``feature_extractor``, which newer versions wrap once more."""
    root = prefix.removesuffix("classifier.") + "feature_extractor."
    weights = {key.removeprefix(root): value for key, value in tensors.items() if key.startswith(root)}
    inner = "feature_extractor."
    if weights and all(key.startswith(inner) for key in weights):
        weights = {key.removeprefix(inner): value for key, value in weights.items()}
    return weights


def _checked(learned: dict[str, Tensor], backbone: dict[str, Tensor], source: str) -> AnomalibState:
    mean, axes, factor, dataset, norm, max_length = learned.values()
    mean = mean.flatten()
    shapes = {name: tuple(value.shape) for name, value in learned.items()}
    (n, d), n_features = dataset.shape if dataset.ndim == 2 else (0, 0), len(mean)
    fitting = axes.shape == (n_features, d) and factor.shape == (d, d) and norm.numel() == max_length.numel() == 1
    if not fitting or n < 2:
        raise ValueError(f"{source} holds sizes that do not fit one another: {shapes}.")
    for name, value in learned.items():
        if name != "kde_model.norm" and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{source} holds NaN or infinities in {name}: the fit failed. Fit the model again.")
    diagonal = factor.diagonal()
    if not (bool((diagonal > 0).all()) and float(max_length) > 0):
        raise ValueError(f"{source} holds a kde_model.bw_transform or max_length that is not positive.")
    log_norm = float(diagonal.log().sum()) - d * math.log(math.tau) / 2
    # In float32 the norm of many components overflows or underflows, which is no sign of damage.
    if 1e-37 < float(norm) < 1e38 and abs(math.log(float(norm)) - log_norm) > _TOLERANCE:
        raise ValueError(f"{source} holds a kde_model.norm that does not belong to its kde_model.bw_transform.")
    h = scott_bandwidth(n, d)
    whitening, kernel_centers = factor * h, dataset * h
    scaling = _scaling(_scaled_rows(kernel_centers, whitening))
    if scaling is None:
        raise ValueError(
            f"{source} holds training rows that are neither of largest length 1 ('scale') nor unit rows less their "
            "mean ('norm'): it is not of a DFKDE model."
        )
    return AnomalibState(mean, axes, float(max_length), whitening, kernel_centers, scaling, backbone)


def _scaled_rows(kernel_centers: Tensor, whitening: Tensor) -> Tensor:
    return torch.linalg.solve(whitening, kernel_centers, left=False)


def _scaling(rows: Tensor) -> Literal["scale", "norm"] | None:
    """Return the scaling, inferred from the training rows: the file does not name it."""
    squares = rows.square().sum(1)
    # Unit rows u less their mean m: |rows + m|^2 = 1 for one m, linear in m but for |m|^2, a constant.
    system = torch.cat([2 * rows, torch.ones_like(squares)[:, None]], 1)
    solution = torch.linalg.lstsq(system, (1 - squares)[:, None], driver="gelsd").solution[:, 0]
    misfit = (system @ solution - (1 - squares)).abs().max()
    is_centre = abs(float(solution[:-1].square().sum() - solution[-1])) < _TOLERANCE
    if len(rows) > rows.shape[1] + 1 and misfit < _TOLERANCE and is_centre:
        return "norm"
    return "scale" if abs(float(squares.max()) - 1) < _TOLERANCE else None


def _some(names: Any) -> str:
    listed = sorted(map(str, names))
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "") if listed else "none"
