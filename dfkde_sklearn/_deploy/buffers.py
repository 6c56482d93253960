"""Fitted densities in the buffers of torch modules: the state of a model, and the content of a saved detector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

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

_MAX_LOG = 1e12


class StateBuffers(nn.Module):
    """A fitted density in buffers, with its calibration scores and the curve of probabilities.

    The set of buffers is fixed; their sizes become those of the state that is kept or loaded. Casting the modules
    around them does not change their dtypes, and they stay on the CPU where the others go to a device without float64.
    Those in `ROW_DTYPE` have the dtype that densities are computed in, those in `INTEGERS` are int64, and all others
    are float64.

    Parameters
    ----------
    steepness, offset : float
        Of the probability as a function of the log density.
    """

    # The axes of every buffer.
    AXES: ClassVar[Mapping[str, str]]
    ROW_DTYPE: ClassVar[tuple[str, ...]]
    INTEGERS: ClassVar[tuple[str, ...]] = ()
    # Of a buffer with several numbers only the first has to be positive.
    POSITIVE: ClassVar[tuple[str, ...]]
    MAY_BE_EMPTY: ClassVar[tuple[str, ...]] = ()
    MAY_BE_NAN: ClassVar[tuple[str, ...]] = ()

    mean: Tensor
    kernel_centers: Tensor
    calibration_scores: Tensor
    calibration_groups: Tensor
    steepness: Tensor
    offset: Tensor

    def __init__(self, steepness: float, offset: float) -> None:
        super().__init__()
        for name, axes in self.AXES.items():
            is_integer = name in self.INTEGERS
            empty = torch.full(
                [0] * len(axes), 0 if is_integer else math.nan, dtype=torch.int64 if is_integer else torch.float64
            )
            self.register_buffer(name, empty)
        self.steepness = torch.tensor(steepness, dtype=torch.float64)
        self.offset = torch.tensor(offset, dtype=torch.float64)

    @property
    def is_fitted(self) -> bool:
        """Whether there is a density."""
        return len(self.kernel_centers) > 0

    @property
    def n_features(self) -> int:
        """The number of features of a row or of an image."""
        return self.mean.numel()

    def contradiction(self, parameters: Mapping[str, Any]) -> str | None:
        """Return in which way parameters of the detector contradict the fitted state; None if they do not."""
        raise NotImplementedError

    def keep_state(self, state: Mapping[str, Any]) -> None:
        """Store the parts of a fitted state."""
        for name, value in state.items():
            dtype = None if name in self.ROW_DTYPE else self.get_buffer(name).dtype
            tensor = torch.as_tensor(value, dtype=dtype, device=self.mean.device)
            setattr(self, name, tensor.detach().clone(memory_format=torch.contiguous_format))

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
        for name in self.AXES:
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
        given = {name: state_dict[prefix + name] for name in self.AXES if prefix + name in state_dict}
        missing = [prefix + name for name in self.AXES if name not in given]
        faults = self._faults(given)
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

    @classmethod
    def _faults(cls, given: Mapping[str, Any]) -> list[str]:
        """Return the reasons why these cannot be the buffers of one density."""
        faults: list[str] = []
        lengths: dict[str, int] = {}
        for name, value in given.items():
            if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
                faults.append(f"{name} is not a tensor with its values")
                continue
            allowed = (torch.float32, torch.float64) if name in cls.ROW_DTYPE else (torch.float64,)
            allowed = (torch.int64,) if name in cls.INTEGERS else allowed
            if value.dtype not in allowed:
                faults.append(f"{name} has dtype {value.dtype}; allowed: {', '.join(map(str, allowed))}")
            elif value.ndim != len(cls.AXES[name]):
                faults.append(f"{name} has shape {tuple(value.shape)}; {len(cls.AXES[name])} axes are needed")
            else:
                for axis, length in zip(cls.AXES[name], value.shape, strict=True):
                    if lengths.setdefault(axis, length) != length:
                        faults.append(f"{name} has shape {tuple(value.shape)}, which does not fit the other sizes")
        faults += cls._other_faults(given, lengths) if not faults else []
        is_fitted = "kernel_centers" in given and not faults and len(given["kernel_centers"]) > 0
        return faults or [fault for name in given if (fault := cls._value_fault(name, given, is_fitted=is_fitted))]

    @classmethod
    def _other_faults(cls, given: Mapping[str, Tensor], lengths: Mapping[str, int]) -> list[str]:  # noqa: ARG003
        """Return what else is wrong; `lengths` are those of the axes."""
        return []

    @classmethod
    def _value_fault(cls, name: str, given: Mapping[str, Tensor], *, is_fitted: bool) -> str:
        """Return what is wrong with the values of a buffer; "" if nothing is."""
        value = given[name]
        if name in cls.INTEGERS or not (is_fitted or name in ("steepness", "offset")):
            return ""
        if not value.numel() and name not in cls.MAY_BE_EMPTY:
            return f"{name} has shape {tuple(value.shape)}: it is empty"
        if name == "calibration_scores":
            # A density may be zero.
            return f"{name} holds NaN or +inf" if bool((value.isnan() | (value == math.inf)).any()) else ""
        is_unknown = name in cls.MAY_BE_NAN and bool(value.isnan().all())
        if not is_unknown and not bool(torch.isfinite(value).all()):
            return f"{name} holds NaN or infinities"
        # Sums of logarithms of numbers, each below 1000; with larger ones log densities would be infinite.
        if name.startswith("log_") and value.numel() and not float(value.abs().max()) <= _MAX_LOG:
            return f"{name} holds {float(value.abs().max()):.3g}; allowed: logarithms, up to {_MAX_LOG:g}"
        # Smaller numbers count as zero in the threads of the kernels.
        if name in cls.POSITIVE and value.numel() and not float(value.flatten()[0]) >= torch.finfo(torch.float64).tiny:
            return f"{name} is {float(value.flatten()[0])}; allowed: positive numbers"
        # Kernels divide by its square.
        if name == "bandwidth" and not 1e-150 <= float(value) <= 1e150:
            return f"{name} is {float(value)}; allowed: 1e-150 to 1e150"
        return ""


class DensityBuffers(StateBuffers):
    """A fitted `FeatureDensity` in buffers.

    Parameters
    ----------
    scaling : "scale", "norm" or None
        What is done to the coordinates.
    steepness, offset : float
        Of the probability as a function of the log density.
    """

    # m are calibration scores.
    AXES = dict(STATE) | {"calibration_scores": "m", "calibration_groups": "m", "steepness": "", "offset": ""}
    ROW_DTYPE = ("kernel_centers", "calibration_scores")
    INTEGERS = ("scaling_code", "calibration_groups")
    POSITIVE = ("scale", "max_length", "bandwidth", "residual", "gaussian_residual")
    MAY_BE_EMPTY = ("residual", "gaussian_residual")
    # anomalib's weights lack the singular values of "norm", which no score needs.
    MAY_BE_NAN = ("singular_values",)

    scale: Tensor
    components: Tensor
    singular_values: Tensor
    scaling_code: Tensor
    max_length: Tensor
    whitening: Tensor
    log_volume: Tensor
    log_jacobian: Tensor
    bandwidth: Tensor
    residual: Tensor
    gaussian_residual: Tensor

    def __init__(self, scaling: Scaling, steepness: float, offset: float) -> None:
        super().__init__(steepness, offset)
        self.scaling_code = torch.tensor(SCALINGS.index(scaling))
        self.scaling = scaling  # a trace cannot follow a choice by the value of a tensor

    def check_fitted(self) -> None:
        """Raise a ValueError if there is no density."""
        if not self.is_fitted:
            raise ValueError("This DfkdeModel is not fitted: call fit first, or load a state dict of a fitted one.")

    def contradiction(self, parameters: Mapping[str, Any]) -> str | None:
        """Return in which way parameters of the detector contradict the fitted state; None if they do not."""
        if parameters["scaling"] == self.scaling:
            return None
        return f"scaling={parameters['scaling']!r} was set after a fit with {self.scaling!r}"

    def keep(
        self, fitted: FeatureDensity, calibration_scores: Tensor, calibration_groups: Tensor | None = None
    ) -> None:
        """Store a fitted density, its calibration scores, and the group of each; None: each is on its own."""
        groups = torch.arange(len(calibration_scores)) if calibration_groups is None else calibration_groups
        self.keep_state(fitted.state() | {"calibration_scores": calibration_scores, "calibration_groups": groups})
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

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.scaling = SCALINGS[int(self.scaling_code)]

    @classmethod
    def _other_faults(cls, given: Mapping[str, Tensor], lengths: Mapping[str, int]) -> list[str]:
        faults = []
        if any(lengths.get(axis, 0) not in (0, 2) for axis in "tu"):
            faults.append("residual and gaussian_residual hold two numbers each, or none")
        elif "scaling_code" in given and int(given["scaling_code"]) not in range(len(SCALINGS)):
            faults.append(f"scaling_code is {int(given['scaling_code'])}; allowed: 0 to {len(SCALINGS) - 1}")
        return faults

    @classmethod
    def _value_fault(cls, name: str, given: Mapping[str, Tensor], *, is_fitted: bool) -> str:
        fault = super()._value_fault(name, given, is_fitted=is_fitted)
        if (
            not fault
            and is_fitted
            and name == "scale"
            and not (given["mean"] * given["scale"]).square().sum() < math.inf
        ):
            # Scaled, rows near the mean would exceed the largest number.
            return f"scale is {float(given['scale']):.3g}; allowed: what makes numbers near 1 of the mean"
        if fault or name != "components" or not is_fitted:
            return fault
        # Projections on longer axes may exceed the largest number.
        length = float(torch.linalg.vector_norm(given[name], dim=1).max())
        return f"components has a row of length {length:.3g}; allowed: 1" if length > 1.001 else ""
