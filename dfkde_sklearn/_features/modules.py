"""Fitted feature extractors as torch modules, which hold their weights and can be traced."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dfkde_sklearn._features.backbones import weights_hash
from dfkde_sklearn._features.layers import embedding
from dfkde_sklearn._images import as_images

if TYPE_CHECKING:
    from dfkde_sklearn._features.extractor import FeatureExtractor
    from dfkde_sklearn._features.network import TimmFeatures
    from dfkde_sklearn._features.scattering import ScatteringFeatures


class FeatureModule(nn.Module):
    """A fitted feature extractor: image tensors to feature rows.

    Parameters
    ----------
    extractor : FeatureExtractor
        Fitted.
    """

    # Axes of a batch of images.
    n_image_axes: ClassVar[int]
    extractor: FeatureExtractor

    def as_extractor(self) -> FeatureExtractor:
        """Return a fitted feature extractor that computes the same."""
        return copy.copy(self.extractor)

    def read_images(self, images: Any) -> Tensor:
        """Return images as `forward` takes them."""
        pictures = as_images(images, self.extractor.white_level)
        return torch.cat(list(self.extractor.batches(pictures, len(pictures))))


class NetworkModule(FeatureModule):
    """The network of a fitted `TimmFeatures`, a copy of its own: images (n, 3, H, W) to feature rows.

    Parameters
    ----------
    extractor : TimmFeatures
        Fitted.
    """

    n_image_axes = 4
    extractor: TimmFeatures

    def __init__(self, extractor: TimmFeatures) -> None:
        super().__init__()
        with extractor._lent_backbone() as backbone:
            self.network = copy.deepcopy(backbone.network).eval().requires_grad_(False)
        self.extractor = copy.copy(extractor)
        if isinstance(extractor.backbone, nn.Module):
            # The user's module, of which this module has a copy.
            self.extractor.backbone = nn.Identity()
        self._tapped: dict[str, Tensor] = {}
        modules = dict(self.network.named_modules())
        for layer in extractor.layers_:
            modules[layer].register_forward_hook(_Tap(layer, self))

    def forward(self, batch: Tensor) -> Tensor:
        """Return the features (n, D) or (n, h, w, C), float32, of normalised images (n, 3, H, W)."""
        height, width = self.extractor.input_size_
        if self.extractor.grid_shape_ is not None and tuple(batch.shape[2:]) != (height, width):
            raise ValueError(
                f"Images of {' x '.join(map(str, batch.shape[2:]))} pixels; features at positions were fitted on "
                f"{height} x {width}. read_images resizes images to that."
            )
        if not torch.compiler.is_compiling():
            return self.extractor._rows(self.network, batch)
        # A traced pass runs to its end, and what comes after the last layer is dropped from the graph.
        dtypes = [tensor.dtype for tensor in self.network.parameters() if tensor.is_floating_point()]
        batch = batch.to(dtypes[0] if dtypes else batch.dtype)
        if self.extractor.layers_:
            tiles = self.extractor._tiles()
            self.network(batch if tiles is None else tiles.cut(batch))
            rows = self.extractor.joined([self._tapped[layer] for layer in self.extractor.layers_])
            self._tapped.clear()
            return rows if tiles is None else tiles.joined(rows)
        return self.extractor.of_layer("", embedding(self.network, batch))

    def as_extractor(self) -> TimmFeatures:
        """Return a fitted feature extractor that computes the same.

        It has the backbone's name if the network still has its weights, else a copy of the network.
        """
        extractor = copy.copy(self.extractor)
        current_hash = weights_hash(self.network)
        if not isinstance(extractor.backbone, str) or current_hash != extractor.weights_hash_:
            extractor.backbone, extractor.weights = copy.deepcopy(self.network), None
            for module in extractor.backbone.modules():
                module._forward_hooks.clear()
            extractor.weights_hash_, extractor.seed_ = current_hash, None
        return extractor

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: features do not depend on the other images of a batch."""
        return super().train(False)


class ScatteringModule(FeatureModule):
    """A fitted `ScatteringFeatures`: grey levels (n, size, size) to feature rows.

    Parameters
    ----------
    extractor : ScatteringFeatures
        Fitted.
    """

    n_image_axes = 3
    extractor: ScatteringFeatures

    def __init__(self, extractor: ScatteringFeatures) -> None:
        super().__init__()
        self.extractor = copy.copy(extractor)

    def forward(self, batch: Tensor) -> Tensor:
        """Return the features (n, D), float32, of grey levels (n, size, size) from 0 to 1."""
        return self.extractor._rows(batch)


class _Tap:
    """A hook that gives the output of a layer to a `NetworkModule` while its forward pass is traced."""

    def __init__(self, layer: str, features: NetworkModule) -> None:
        self.layer = layer
        self.features = features

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        if torch.compiler.is_compiling():
            self.features._tapped[self.layer] = self.features.extractor.of_layer(self.layer, output)
