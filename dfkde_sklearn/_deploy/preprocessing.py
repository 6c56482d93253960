"""timm's preprocessing of images as a module of tensor operations, which can be exported."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dfkde_sklearn._features.network import TimmFeatures, timm_transform

_OUTSIDE = "Leave image_shape out, and preprocess with read_images of the to_torch module."
# The number that represents 1 in Pillow's weights, which are integers.
_UNIT = 2**22


class Preprocessing(nn.Module):
    """timm's transform for images of one size: resize, crop and normalise as Pillow and torchvision do.

    A resize is two matrix products, and a crop selects rows of the matrices. Pillow itself gives the matrices, by
    resizing images of single bright lines. They hold integers, as in Pillow, so that no pixel differs.

    Parameters
    ----------
    extractor : TimmFeatures
        Fitted.
    image_shape : tuple (height, width)
        Size of the images in pixels.
    """

    across: Tensor
    down: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, extractor: TimmFeatures, image_shape: tuple[int, int]) -> None:
        super().__init__()
        height, width = image_shape
        if min(image_shape) < 1:
            raise ValueError(f"image_shape={image_shape}. Allowed: (height, width) in pixels.")
        if extractor.reducing_gap is not None:
            raise ValueError(
                f"image_shape={image_shape} and reducing_gap={extractor.reducing_gap}: an exported file resizes images "
                f"from all pixels. {_OUTSIDE}"
            )
        if extractor.crop_mode_ == "border":
            raise ValueError(
                f"image_shape={image_shape}: crop='border' pads its images, and padding is not exported. {_OUTSIDE}"
            )
        resize, crop, *_ = timm_transform(extractor).transforms
        resized = resize(Image.new("RGB", (width, height)))
        # The source of each pixel of the crop; 0 for padding.
        places = 1 + np.arange(resized.height * resized.width, dtype=np.int32).reshape(resized.height, resized.width)
        cropped = np.asarray(crop(Image.fromarray(places)))
        if cropped.shape != tuple(extractor.input_size_) or not cropped.all():
            raise ValueError(
                f"image_shape={image_shape}: resized to {resized.height} x {resized.width} pixels, the image does not "
                f"fill the crop of {extractor.input_size_}, and padding is not exported. {_OUTSIDE}"
            )
        rows, columns = np.divmod(cropped - 1, resized.width)
        resample = getattr(resize, "interpolation", None)
        self.register_buffer("across", _resizing(width, resized.width, resample)[columns[0]])
        self.register_buffer("down", _resizing(height, resized.height, resample)[rows[:, 0]])
        self.register_buffer("mean", torch.tensor(extractor.mean_).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(extractor.std_).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised images (n, 3, H, W) of RGB images (n, height, width, 3), uint8."""
        # In float64, which represents the products of these integers exactly.
        levels = images.permute(0, 3, 1, 2).double()
        levels = _rounded(levels @ self.across.T)
        levels = _rounded(self.down @ levels).float()
        return (levels / 255 - self.mean) / self.std


def _resizing(length: int, new_length: int, interpolation: Any) -> Tensor:
    """Return the weights (new_length, length), times `_UNIT`, with which Pillow resizes a line of pixels."""
    lines = Image.fromarray(_UNIT * np.eye(length, dtype=np.int32))
    if new_length != length:
        # Resizing an image of integers rounds the weights, as Pillow does before it resizes 8-bit pixels.
        lines = lines.resize((new_length, length), _PILLOW[interpolation.value])
    return torch.from_numpy(np.array(lines).T.astype(np.float64))


_PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


def _rounded(levels: Tensor) -> Tensor:
    """Return sums of levels times weights as 8-bit levels; Pillow rounds after each direction."""
    return (levels / _UNIT + 0.5).floor().clamp(0, 255)
