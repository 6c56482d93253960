"""A fitted density in the buffers of a torch module: the state of a model, and the content of a saved detector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from dfkde_sklearn._density.scoring import (
    SCALINGS,
    STATE,
    FeatureDensity,
    Scaling,
    finite,
    scaled,
    without_rounding,
)
from dfkde_sklearn._kernels.density import WORKING_MEMORY

# The axes of every buffer; m are training rows.
_AXES = dict(STATE) | {"calibration_scores": "m", "steepness": "", "offset": ""}
_IN_ROW_DTYPE = ("kernel_centers", "calibration_scores")
# Of a residual term only the first number, the variance, has to be positive.
_POSITIVE = ("scale", "max_length", "bandwidth", "residual", "gaussian_residual")


class DensityBuffers(nn.Module):
    """A fitted `FeatureDensity` in buffers, with its calibration scores and the curve of probabilities.

    The set of buffers is fixed; their sizes become those of the state that is kept or loaded. `kernel_centers` and
    `calibration_scores` have the dtype that densities are computed in, `scaling_code` is int64, and all others are
    float64. Casting the modules around them does not change these dtypes, and they stay on the CPU where the others go
    to a device without float64.

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

    def check_fitted(self) -> None:
        """Raise a ValueError if there is no density."""
        if not self.is_fitted:
            raise ValueError("This DfkdeModel is not fitted: call fit first, or load a state dict of a fitted one.")

    def keep(self, fitted: FeatureDensity, calibration_scores: Tensor) -> None:
        """Store a fitted density and its calibration scores."""
        kept = fitted.state() | {"calibration_scores": calibration_scores}
        for name, value in kept.items():
            dtype = None if name in _IN_ROW_DTYPE else self.get_buffer(name).dtype
            tensor = torch.as_tensor(value, dtype=dtype, device=self.mean.device)
            setattr(self, name, tensor.detach().clone(memory_format=torch.contiguous_format))
        self.scaling = fitted.density.scaling

    def fitted(self, dtype: torch.dtype) -> FeatureDensity:
        """Return the density, for feature rows of `dtype`."""
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
        """Return the same in float64, by a few tensor operations that can be traced and differentiated.

        The kernels at a row q are ``exp(q . k - |k|^2 / 2)`` times a factor of q alone, ``exp(-|q|^2 / 2)``. The
        logarithm of that factor is added to that of the sum, so that nothing underflows, however large q is.
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
        # With fewer digits the density would be noise: only the device changes. Apple's GPUs have no float64.
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
    """Return the reasons why these cannot be the buffers of one density."""
    faults: list[str] = []
    lengths: dict[str, int] = {}
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            faults.append(f"{name} is not a tensor with its values")
            continue
        allowed = (torch.float32, torch.float64) if name in _IN_ROW_DTYPE else (torch.float64,)
        allowed = (torch.int64,) if name == "scaling_code" else allowed
        if value.dtype not in allowed:
            faults.append(f"{name} has dtype {value.dtype}; allowed: {', '.join(map(str, allowed))}")
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
    """Return what is wrong with the values of a buffer; "" if nothing is."""
    value = given[name]
    if name == "scaling_code" or not (is_fitted or name in ("steepness", "offset")):
        return ""
    if not value.numel() and name not in ("residual", "gaussian_residual"):
        return f"{name} has shape {tuple(value.shape)}: it is empty"
    if name == "calibration_scores":
        # A density may be zero.
        return f"{name} holds NaN or +inf" if bool((value.isnan() | (value == math.inf)).any()) else ""
    # anomalib's weights lack the singular values of "norm", which no score needs.
    is_unknown = name == "singular_values" and bool(value.isnan().all())
    if not is_unknown and not bool(torch.isfinite(value).all()):
        return f"{name} holds NaN or infinities"
    # Smaller numbers count as zero in the threads of the kernels.
    if name in _POSITIVE and value.numel() and not float(value.flatten()[0]) >= torch.finfo(torch.float64).tiny:
        return f"{name} is {float(value.flatten()[0])}; allowed: positive numbers"
    return ""
