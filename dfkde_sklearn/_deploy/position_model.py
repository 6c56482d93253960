"""PatchDfkdeModel: densities at positions as a torch module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfkde_sklearn._deploy.position_buffers import PositionBuffers
from dfkde_sklearn._features.modules import FeatureModule


class PatchDfkdeModel(nn.Module):
    """A fitted :class:`PatchDFKDEDetector` as a torch module, from its `to_torch`.

    Parameters
    ----------
    density : torch.nn.Module
        The fitted state, in buffers.
    feature_extractor : torch.nn.Module or None
        Images to features at positions (n, h, w, C); None where the model takes these.

    See Also
    --------
    PatchDFKDEDetector.to_torch : Returns it.
    """

    # The public path, which pickles and lists of trusted types name.
    __module__ = "dfkde_sklearn"

    def __init__(self, density: PositionBuffers, feature_extractor: FeatureModule | None) -> None:
        super().__init__()
        self.density = density
        self.feature_extractor = feature_extractor

    @property
    def threshold_offset(self) -> float:
        """The log density at which an image is as probably anomalous as normal."""
        return float(self.density.offset)

    @property
    def threshold_steepness(self) -> float:
        """Slope of the probability at the threshold, per unit of log density."""
        return float(self.density.steepness)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of the features of an image: (h, w, C), or (C,) where there is one position."""
        n_positions, n_channels = self.density.mean.shape
        return (n_channels,) if n_positions == 1 else (*self.density.grid, n_channels)

    def read_images(self, images: Any) -> Tensor:
        """Return images as `forward` takes them.

        Parameters
        ----------
        images : images
            As in :meth:`PatchDFKDEDetector.fit`.

        Returns
        -------
        Tensor of shape (n, ...)
            Resized and normalised.

        Raises
        ------
        ValueError
            If the model has no feature extractor.
        """
        if self.feature_extractor is None:
            raise ValueError("This model takes features at positions, not images: it has no feature extractor.")
        return self.feature_extractor.read_images(images)

    def get_features(self, batch: Tensor) -> Tensor:
        """Return the features of images.

        Parameters
        ----------
        batch : Tensor of shape (n, ...)
            Images as from `read_images`; or their features, where the model has no feature extractor.

        Returns
        -------
        Tensor of shape (n, h, w, C)
            A vector for each position; with a gradient if the images require one.
        """
        if self.feature_extractor is None:
            return batch
        return self.feature_extractor(batch)

    def log_densities(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return the natural logs of the densities of images, and of their positions.

        Parameters
        ----------
        features : Tensor of shape (n, h, w, C)
            From `get_features`; (n, C) where there is one position.

        Returns
        -------
        scores : Tensor of shape (n,)
            Higher is more normal.
        maps : Tensor of shape (n, h, w)
            Absent where there is one position.

        Raises
        ------
        ValueError
            If the features have another shape.
        """
        shape = self.feature_shape
        if tuple(features.shape[1:]) != shape:
            raise ValueError(
                f"Features of shape {tuple(features.shape)}; the model was fitted on (n, {', '.join(map(str, shape))})."
            )
        rows = features if features.dtype in (torch.float32, torch.float64) else features.float()
        scores, maps = self.density.log_densities(rows.reshape(-1, *self.density.mean.shape))
        return (scores,) if len(shape) == 1 else (scores, maps.reshape(-1, *shape[:2]))

    def forward(self, batch: Tensor) -> Tensor:
        """Return P(anomalous) of images.

        Parameters
        ----------
        batch : Tensor of shape (n, ...)
            As in `get_features`.

        Returns
        -------
        Tensor of shape (n,)
            Probabilities.
        """
        return self.density.p_anomalous(self.log_densities(self.get_features(batch))[0])
