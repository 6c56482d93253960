"""A fitted detector as one file for other runtimes: ONNX, and a program of torch.export."""

from __future__ import annotations

import io
import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dfkde_sklearn._features import TimmFeatures, timm_transform
from dfkde_sklearn._files import write_file
from dfkde_sklearn._model import DfkdeModel, ScatteringModule, model_of

if TYPE_CHECKING:
    from dfkde_sklearn._detector import DFKDEDetector

# Resize, GroupNormalization and LayerNormalization of backbones have their present form since 18 (2022).
OPSET = 18
OUTPUTS = ("log_density", "p_anomalous", "label")
_OUTSIDE = "Leave image_shape out, and preprocess with read_images of the to_torch module."
# One in Pillow's weights, which are integers of 22 binary places.
_UNIT = 2**22
# Batches of two, since a length of one would be taken for constant.
_TRACED_ROWS = 2


def write_onnx(detector: DFKDEDetector, path: str | os.PathLike[str], image_shape: tuple[int, int] | None) -> None:
    """Write a fitted detector as one ONNX file; see `DFKDEDetector.to_onnx`."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"to_onnx needs the packages onnx and onnxscript ({error}): pip install 'dfkde-sklearn[onnx]'."
        ) from error
    scorer, name, example = _scorer(detector, image_shape)
    with warnings.catch_warnings():
        # The exporter warns of its own internals.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            scorer,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[name],
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    write_file(path, program.model_proto.SerializeToString())


def write_program(detector: DFKDEDetector, path: str | os.PathLike[str], image_shape: tuple[int, int] | None) -> None:
    """Write a fitted detector as a program of torch.export; see `DFKDEDetector.to_pt2`."""
    scorer, _, example = _scorer(detector, image_shape)
    program = torch.export.export(scorer, (example,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    write_file(path, stream.getbuffer())


class Scorer(nn.Module):
    """Images or feature rows to log density, P(anomalous) and label.

    Parameters
    ----------
    model : DfkdeModel
        Fitted.
    preprocessing : torch.nn.Module or None
        What images go through first.
    """

    def __init__(self, model: DfkdeModel, preprocessing: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log density (n,), P(anomalous) (n,) and label (n,), 1 or -1."""
        if self.preprocessing is not None:
            batch = self.preprocessing(batch)
        features = self.model.get_features(batch)
        density = self.model.density
        log_densities = self.model.compute_kde_scores(features, as_log_likelihood=True)
        # Asked so that NaN, which the detector refuses and a graph cannot, is not normal.
        is_normal = log_densities.double() >= density.offset
        return log_densities, self.model.compute_probabilities(log_densities), 2 * is_normal.long() - 1


class Preprocessing(nn.Module):
    """timm's transform for images of one size: resize, crop and normalise as Pillow and torchvision do.

    A resize is two matrix products, and a crop selects rows of the matrices. They are found by putting images of single
    bright lines through the very transform, and the products are Pillow's own, of integers: not one pixel differs.

    Parameters
    ----------
    stage : TimmFeatures
        Fitted.
    image_shape : tuple (height, width)
        Of the images, in pixels.
    """

    across: Tensor
    down: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, stage: TimmFeatures, image_shape: tuple[int, int]) -> None:
        super().__init__()
        height, width = image_shape
        if min(image_shape) < 1:
            raise ValueError(f"image_shape={image_shape}. Allowed: (height, width) in pixels.")
        if stage.crop_mode_ not in ("center", "squash"):
            raise ValueError(
                f"image_shape={image_shape}: the backbone pads its images (crop mode {stage.crop_mode_!r}), and "
                f"padding is not exported. {_OUTSIDE}"
            )
        resize, crop, *_ = timm_transform(stage).transforms
        resized = resize(Image.new("RGB", (width, height)))
        # Where each pixel of the crop comes from; 0 where it is padding.
        places = 1 + np.arange(resized.height * resized.width, dtype=np.int32).reshape(resized.height, resized.width)
        cropped = np.asarray(crop(Image.fromarray(places)))
        if cropped.shape != tuple(stage.input_size_) or not cropped.all():
            raise ValueError(
                f"image_shape={image_shape}: resized to {resized.height} x {resized.width} pixels, the image does not "
                f"fill the crop of {stage.input_size_}, and padding is not exported. {_OUTSIDE}"
            )
        rows, columns = np.divmod(cropped - 1, resized.width)
        resample = getattr(resize, "interpolation", None)
        self.register_buffer("across", _resizing(width, resized.width, resample)[columns[0]])
        self.register_buffer("down", _resizing(height, resized.height, resample)[rows[:, 0]])
        self.register_buffer("mean", torch.tensor(stage.mean_).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(stage.std_).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised images (n, 3, H, W) of RGB images (n, height, width, 3), uint8."""
        # In float64, which holds the products of these integers exactly.
        levels = images.permute(0, 3, 1, 2).double()
        levels = _rounded(levels @ self.across.T)
        levels = _rounded(self.down @ levels).float()
        return (levels / 255 - self.mean) / self.std


def _resizing(length: int, new_length: int, interpolation: Any) -> Tensor:
    """Return the weights (new_length, length), times `_UNIT`, with which Pillow resizes a line of pixels."""
    lines = Image.fromarray(_UNIT * np.eye(length, dtype=np.int32))
    if new_length != length:
        # Rounded to integers, as Pillow rounds its weights before it resizes pixels of 8 bits.
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
    """Return sums of levels times weights as 8-bit levels, to which Pillow rounds after each direction."""
    return (levels / _UNIT + 0.5).floor().clamp(0, 255)


def _scorer(detector: DFKDEDetector, image_shape: tuple[int, int] | None) -> tuple[nn.Module, str, Tensor]:
    """Return what is exported, the name of its input, and an example of it."""
    model = model_of(detector).eval()
    if isinstance(model.feature_extractor, ScatteringModule):
        raise ValueError(
            "features=ScatteringFeatures(...) cannot be exported: other runtimes lack its complex Fourier transforms. "
            "Export a detector that is fitted on the features (features=None), and compute them outside."
        )
    dtype = model.density.support.dtype
    if model.feature_extractor is None:
        if image_shape is not None:
            raise ValueError(
                f"image_shape={image_shape}, but this detector was fitted on features: there are no images to resize. "
                "Leave image_shape out."
            )
        return Scorer(model, None), "features", torch.zeros(_TRACED_ROWS, len(model.density.mean), dtype=dtype)
    stage = model.feature_extractor.stage
    if image_shape is None:
        return Scorer(model, None), "images", torch.zeros(_TRACED_ROWS, 3, *stage.input_size_)
    preprocessing = Preprocessing(stage, image_shape)
    return Scorer(model, preprocessing), "images", torch.zeros(_TRACED_ROWS, *image_shape, 3, dtype=torch.uint8)
