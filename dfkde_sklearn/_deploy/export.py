"""A fitted detector as one file for other runtimes: ONNX, and a program of torch.export."""

from __future__ import annotations

import importlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from scipy.special import expit
from torch import Tensor, nn

from dfkde_sklearn._deploy.model import DfkdeModel, ScatteringModule
from dfkde_sklearn._features.network import TimmFeatures, image_transform, timm_transform
from dfkde_sklearn._files import write_file
from dfkde_sklearn._images import as_images, image_batches

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
# Rows that go through an exported file at once while it is checked: some, as a batch of one hides what mixes rows.
_CHECKED_ROWS = 16
# What a checked file may differ by: relative to the log density, or absolute, in nats, where that is below 1. Behind a
# network, whose float32 sums each runtime orders its own way, and of float32 and float64 features.
_TOLERANCES = {"images": 1e-3, "float32": 1e-4, "float64": 1e-8}

# An exported file: a batch to log density, P(anomalous) and label.
Run = Callable[[Tensor], Sequence[Any]]


def write_onnx(
    detector: DFKDEDetector, path: str | os.PathLike[str], image_shape: tuple[int, int] | None, check: Any
) -> None:
    """Write a fitted detector as one ONNX file; see `DFKDEDetector.to_onnx`."""
    try:
        for package in ("onnx", "onnxscript", *(() if check is None else ("onnxruntime",))):
            importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"to_onnx needs the packages onnx and onnxscript, and check= needs onnxruntime ({error}): "
            "pip install 'dfkde-sklearn[onnx]'."
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
    data = program.model_proto.SerializeToString()
    if check is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

        def run(batch: Tensor) -> Sequence[Any]:
            return session.run(list(OUTPUTS), {name: batch.numpy()})

        _check(run, "ONNX Runtime", detector, image_shape, check)
    write_file(path, data)


def write_program(
    detector: DFKDEDetector, path: str | os.PathLike[str], image_shape: tuple[int, int] | None, check: Any
) -> None:
    """Write a fitted detector as a program of torch.export; see `DFKDEDetector.to_pt2`."""
    scorer, _, example = _scorer(detector, image_shape)
    program = torch.export.export(scorer, (example,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    if check is not None:
        stream.seek(0)
        _check(torch.export.load(stream).module(), "torch.export", detector, image_shape, check)
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
    extractor : TimmFeatures
        Fitted.
    image_shape : tuple (height, width)
        Of the images, in pixels.
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
        if extractor.crop_mode_ not in ("center", "squash"):
            raise ValueError(
                f"image_shape={image_shape}: the backbone pads its images (crop mode {extractor.crop_mode_!r}), and "
                f"padding is not exported. {_OUTSIDE}"
            )
        resize, crop, *_ = timm_transform(extractor).transforms
        resized = resize(Image.new("RGB", (width, height)))
        # Where each pixel of the crop comes from; 0 where it is padding.
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
    model = detector.to_torch().eval()
    if isinstance(model.feature_extractor, ScatteringModule):
        raise ValueError(
            "features=ScatteringFeatures(...) cannot be exported: other runtimes lack its complex Fourier transforms. "
            "Export a detector that is fitted on the features (features=None), and compute them outside."
        )
    dtype = model.density.kernel_centers.dtype
    if model.feature_extractor is None:
        if image_shape is not None:
            raise ValueError(
                f"image_shape={image_shape}, but this detector was fitted on features: there are no images to resize. "
                "Leave image_shape out."
            )
        return Scorer(model, None), "features", torch.zeros(_TRACED_ROWS, len(model.density.mean), dtype=dtype)
    extractor = model.feature_extractor.extractor
    if image_shape is None:
        return Scorer(model, None), "images", torch.zeros(_TRACED_ROWS, 3, *extractor.input_size_)
    preprocessing = Preprocessing(extractor, image_shape)
    return Scorer(model, preprocessing), "images", torch.zeros(_TRACED_ROWS, *image_shape, 3, dtype=torch.uint8)


def _check(run: Run, runtime: str, detector: DFKDEDetector, image_shape: tuple[int, int] | None, X: Any) -> None:
    """Raise a ValueError unless an exported file gives for X what the detector gives."""
    scores = detector.score_samples(X).astype(np.float64)
    excess = scores - detector.offset_
    is_of_images = isinstance(detector.features_, TimmFeatures)
    tolerance = _TOLERANCES["images" if is_of_images else str(detector.kernel_centers_.dtype)]
    near = tolerance * np.maximum(1.0, np.abs(scores))
    # The right values, and by how much they may be missed: a label by any, where the score is at the threshold.
    right = {
        "log_density": (scores, near),
        "p_anomalous": (expit(-detector.threshold_steepness * excess), max(1.0, detector.threshold_steepness) * near),
        "label": (np.where(excess < 0, -1.0, 1.0), np.where(np.abs(excess) <= near, np.inf, 0.0)),
    }
    outputs = [run(batch) for batch in _batches(detector, image_shape, X)]
    for name, parts in zip(OUTPUTS, zip(*outputs, strict=True), strict=True):
        found = np.concatenate([np.asarray(part) for part in parts]).astype(np.float64)
        expected, allowed = right[name]
        # NaN and infinities are differences.
        difference = np.nan_to_num(np.abs(found - expected), nan=np.inf)
        wrong = np.flatnonzero(difference > allowed)
        if len(wrong):
            i = int(wrong[np.argmax(difference[wrong])])
            raise ValueError(
                f"The exported file is not the detector: check[{i}] has {name} {found[i]:.9g} in {runtime} and "
                f"{expected[i]:.9g} in the detector, which is off by {difference[i]:.3g}; allowed: {allowed[i]:.3g}. "
                f"So it is with {len(wrong)} of {len(scores)}. Nothing was written. Try other versions of torch, onnx "
                f"and onnxscript, or keep the detector with save()."
            )


def _batches(detector: DFKDEDetector, image_shape: tuple[int, int] | None, X: Any) -> Iterator[Tensor]:
    """Yield what an exported file is given for X, a few rows at a time."""
    extractor: Any = detector.features_
    if not isinstance(extractor, TimmFeatures):
        rows = detector._validated(X if extractor is None else extractor.transform(X), reset=False)
        yield from (
            torch.from_numpy(np.array(rows))
            .to(getattr(torch, str(detector.kernel_centers_.dtype)))
            .split(_CHECKED_ROWS)
        )
        return

    def pixels(picture: Image.Image) -> Tensor:
        if (picture.height, picture.width) != image_shape:
            raise ValueError(f"the exported file takes images of image_shape={image_shape} only")
        return torch.from_numpy(np.array(picture))

    yield from image_batches(as_images(X), pixels if image_shape else image_transform(extractor), _CHECKED_ROWS)
