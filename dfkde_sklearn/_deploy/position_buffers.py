"""The fitted state of densities at positions in the buffers of a torch module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dfkde_sklearn._density.positions import STATE, PositionDensity, lowest_mean, normalized
from dfkde_sklearn._deploy.buffers import StateBuffers
from dfkde_sklearn._kernels.density import WORKING_MEMORY


class PositionBuffers(StateBuffers):
    """A fitted `PositionDensity` in buffers, with the grid of its positions and the threshold of its maps.

    Parameters
    ----------
    n_lowest : int or float
        The positions of lowest density whose mean is the score of an image, or their share of all.
    steepness, offset : float
        Of the probability as a function of the log density.
    """

    # s are calibration scores, and g the height and width of the grid.
    AXES = dict(STATE) | {
        "grid_shape": "g",
        "map_offset": "",
        "calibration_scores": "s",
        "calibration_groups": "s",
        "steepness": "",
        "offset": "",
    }
    ROW_DTYPE = ("whitening", "kernel_centers", "calibration_scores")
    INTEGERS = ("grid_shape", "calibration_groups")
    POSITIVE = ("scale", "bandwidth")

    scale: Tensor
    channel_scales: Tensor
    normalization: Tensor
    whitening: Tensor
    log_volumes: Tensor
    bandwidth: Tensor
    grid_shape: Tensor
    map_offset: Tensor

    def __init__(self, n_lowest: int | float, steepness: float, offset: float) -> None:
        super().__init__(steepness, offset)
        self.n_lowest = n_lowest
        # Plain values, since a trace cannot follow a choice by the value of a tensor.
        self.is_normalized = False
        self.grid: tuple[int, ...] = ()

    def contradiction(self, parameters: Mapping[str, Any]) -> str | None:
        """Return in which way parameters of the detector contradict the fitted state; None if they do not."""
        if parameters["n_lowest"] != self.n_lowest:
            return f"n_lowest={parameters['n_lowest']} was set after a fit with {self.n_lowest}"
        given, fitted = parameters["normalization"], float(self.normalization)
        return None if given in ("auto", fitted) else f"normalization={given} was set after a fit with {fitted}"

    def keep(
        self,
        fitted: PositionDensity,
        calibration_scores: Tensor,
        calibration_groups: Tensor,
        grid_shape: tuple[int, int],
        map_offset: float,
    ) -> None:
        """Store a fitted density, its calibration scores and their groups, its grid and the threshold of its maps."""
        others = {
            "calibration_scores": calibration_scores,
            "calibration_groups": calibration_groups,
            "grid_shape": grid_shape,
            "map_offset": map_offset,
        }
        self.keep_state(fitted.state() | others)
        self._note()

    def fitted(self) -> PositionDensity:
        """Return the density."""
        return PositionDensity.from_state({name: self.get_buffer(name) for name, _ in STATE})

    def log_densities(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log densities of images (n,), and of their positions (n, P), from vectors (n, P, C)."""
        on_device = vectors.to(self.mean.device)
        if torch.compiler.is_compiling() or (vectors.requires_grad and torch.is_grad_enabled()):
            maps = self.traceable_log_density(on_device)
        else:
            maps = self.fitted().log_density(on_device.to(self.kernel_centers.dtype), WORKING_MEMORY)
        maps = maps.to(vectors)
        return lowest_mean(maps, self.n_lowest), maps

    def traceable_log_density(self, vectors: Tensor) -> Tensor:
        """Return the log densities (n, P) by a few tensor operations that can be traced and differentiated."""
        vectors = vectors.double() * self.scale
        if self.is_normalized:
            vectors = normalized(vectors, self.channel_scales, self.normalization)
        m, n_channels = self.kernel_centers.shape[1:]
        whitened = (vectors - self.mean).transpose(0, 1) @ self.whitening.double() / self.bandwidth
        kernels = self.kernel_centers.double() / self.bandwidth
        products = whitened @ kernels.transpose(1, 2) - kernels.square().sum(2)[:, None] / 2
        # Images first from here on: OpenVINO 2026.4 adds a constant of each position to other elements where positions
        # are the first axis of a reduction.
        whitened, products = whitened.transpose(0, 1), products.transpose(0, 1)
        log_sums = torch.logsumexp(products, 2) - whitened.square().sum(2) / 2
        # A tensor, since exporters round Python's floats to float32.
        constant = math.log(m) + n_channels * math.log(math.tau) / 2
        log_count = torch.tensor(constant, dtype=torch.float64, device=self.mean.device)
        return log_sums + (self.log_volumes - n_channels * self.bandwidth.log() - log_count)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._note()

    def _note(self) -> None:
        """Keep as plain values what a trace has to know."""
        self.is_normalized = bool(self.normalization > 0)
        self.grid = tuple(self.grid_shape.tolist())

    @classmethod
    def _other_faults(cls, given: Mapping[str, Tensor], lengths: Mapping[str, int]) -> list[str]:
        if "grid_shape" in given and lengths.get("p"):
            grid = given["grid_shape"].tolist()
            if len(grid) != 2 or min(grid) < 1 or math.prod(grid) != lengths["p"]:
                return [f"grid_shape is {grid}, and there are {lengths['p']} positions"]
        return []
