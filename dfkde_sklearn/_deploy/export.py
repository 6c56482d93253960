"""A fitted detector as one file for other runtimes: ONNX, and a program of torch.export."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.special import expit
from torch import Tensor, nn

from dfkde_sklearn._deploy.buffers import StateBuffers
from dfkde_sklearn._deploy.preprocessing import Preprocessing
from dfkde_sklearn._features.engines import TRACED_ROWS, onnx_program
from dfkde_sklearn._files import write_file
from dfkde_sklearn._images import as_images, image_batches

OUTPUTS = ("log_density", "p_anomalous", "label")
# From a model with densities at positions.
MAP_OUTPUT = "log_density_map"
# Rows of a batch while an exported file is checked: several, since a batch of one hides faults that mix rows.
_CHECKED_ROWS = 16
# Tolerances of the check: relative to the log density, or absolute, in nats, where that is below 1. After a network,
# since runtimes order its float32 sums differently, and for float32 and float64 features.
_TOLERANCES = {"images": 1e-3, "float32": 1e-4, "float64": 1e-8}

# An exported file: a batch to log density, P(anomalous) and label.
Run = Callable[[Tensor], Sequence[Any]]


class Expected(NamedTuple):
    """What an exported file must answer.

    X : images, or an array of features (n, ...) for a model without a feature extractor.
    log_densities : tuple of ndarray, of the detector: of the images (n,), and of their positions (n, h, w) if any.
    """

    X: Any
    log_densities: tuple[NDArray[np.floating], ...]


class Agreement(NamedTuple):
    """How well an exported file agreed with the detector, within the tolerance.

    n_images : int, number of images or rows that were compared.
    difference : float, the largest one of a log density, of images or positions; relative, or in nats where the log
        density is below 1.
    tolerance : float, what was allowed.
    n_labels : int, number of labels that differ: of scores that lie at the threshold within the tolerance.
    """

    n_images: int
    difference: float
    tolerance: float
    n_labels: int


class Exportable(Protocol):
    """A module that can be exported: fitted, with a feature extractor or without."""

    feature_extractor: Any
    density: StateBuffers
    feature_shape: tuple[int, ...]
    threshold_offset: float
    threshold_steepness: float

    def get_features(self, batch: Tensor) -> Tensor:
        """Return the features of a batch."""

    def log_densities(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return the log densities of images (n,), and of their positions (n, h, w) if there are any."""

    def eval(self) -> Any:
        """Set the module to evaluation."""


def write_onnx(
    model: Exportable,
    path: str | os.PathLike[str],
    image_shape: tuple[int, int] | None,
    expected: Expected | None,
    tolerance: float | None = None,
) -> Agreement | None:
    """Write a fitted model as one ONNX file; see `DFKDEDetector.to_onnx`.

    Returns how well it agreed with what is expected, and None where nothing is. `tolerance` None is that of
    `to_onnx`.
    """
    try:
        for package in ("onnx", "onnxscript", *(() if expected is None else ("onnxruntime",))):
            importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"to_onnx needs the packages onnx and onnxscript, and check= needs onnxruntime ({error}): "
            "pip install 'dfkde-sklearn[onnx]'."
        ) from error
    scorer, name, example = _scorer(model, image_shape)
    outputs = _outputs(model)
    data = onnx_program(scorer, example, name, outputs)
    agreement = None
    if expected is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

        def run(batch: Tensor) -> Sequence[Any]:
            return session.run(list(outputs), {name: batch.numpy()})

        agreement = _check(run, "ONNX Runtime", model, image_shape, expected, tolerance)
    write_file(path, data)
    return agreement


def write_program(
    model: Exportable,
    path: str | os.PathLike[str],
    image_shape: tuple[int, int] | None,
    expected: Expected | None,
    tolerance: float | None = None,
) -> Agreement | None:
    """Write a fitted model as a program of torch.export, as `write_onnx`; see `DFKDEDetector.to_pt2`."""
    scorer, _, example = _scorer(model, image_shape)
    program = torch.export.export(scorer, (example,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    agreement = None
    if expected is not None:
        stream.seek(0)
        run = torch.export.load(stream).module()
        agreement = _check(run, "torch.export", model, image_shape, expected, tolerance)
    write_file(path, stream.getbuffer())
    return agreement


class Scorer(nn.Module):
    """Images or feature rows to log density, P(anomalous) and label.

    Parameters
    ----------
    model : torch.nn.Module
        Fitted: an `Exportable`.
    preprocessing : torch.nn.Module or None
        Applied to images first.
    """

    def __init__(self, model: Any, preprocessing: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return log density (n,), P(anomalous) (n,), label (n,), 1 or -1, and maps (n, h, w) if there are any."""
        if self.preprocessing is not None:
            batch = self.preprocessing(batch)
        log_densities, *maps = self.model.log_densities(self.model.get_features(batch))
        density = self.model.density
        # With >=, so that NaN is not normal: the detector refuses it, and a graph cannot.
        is_normal = log_densities.double() >= density.offset
        return log_densities, density.p_anomalous(log_densities), 2 * is_normal.long() - 1, *maps


def _outputs(model: Exportable) -> tuple[str, ...]:
    return OUTPUTS if len(model.feature_shape) == 1 else (*OUTPUTS, MAP_OUTPUT)


def _scorer(model: Exportable, image_shape: tuple[int, int] | None) -> tuple[nn.Module, str, Tensor]:
    """Return the module to export, the name of its input, and an example input."""
    model.eval()
    dtype = model.density.kernel_centers.dtype
    if model.feature_extractor is None:
        if image_shape is not None:
            raise ValueError(
                f"image_shape={image_shape}, but this detector was fitted on features: there are no images to resize. "
                "Leave image_shape out."
            )
        return Scorer(model, None), "features", torch.zeros(TRACED_ROWS, *model.feature_shape, dtype=dtype)
    extractor: Any = model.feature_extractor.extractor
    extractor.check_exportable()
    if image_shape is None:
        return Scorer(model, None), "images", torch.zeros(TRACED_ROWS, 3, *extractor.input_size_)
    preprocessing = Preprocessing(extractor, image_shape)
    return Scorer(model, preprocessing), "images", torch.zeros(TRACED_ROWS, *image_shape, 3, dtype=torch.uint8)


def _check(
    run: Run,
    runtime: str,
    model: Exportable,
    image_shape: tuple[int, int] | None,
    reference: Expected,
    tolerance: float | None,
) -> Agreement:
    """Return how well an exported file gives the detector's results; raise a ValueError where it does not."""
    scores, *maps = (values.astype(np.float64) for values in reference.log_densities)
    excess, steepness = scores - model.threshold_offset, model.threshold_steepness
    dtype = str(model.density.kernel_centers.dtype).removeprefix("torch.")
    if tolerance is None:
        tolerance = _TOLERANCES[dtype if model.feature_extractor is None else "images"]
    near = tolerance * np.maximum(1.0, np.abs(scores))
    # The right values and their tolerances; where the score is at the threshold, either label is right.
    right = {
        "log_density": (scores, near),
        "p_anomalous": (expit(-steepness * excess), max(1.0, steepness) * near),
        "label": (np.where(excess < 0, -1.0, 1.0), np.where(np.abs(excess) <= near, np.inf, 0.0)),
    }
    if maps:
        right[MAP_OUTPUT] = (maps[0], tolerance * np.maximum(1.0, np.abs(maps[0])))
    outputs = [run(batch) for batch in _batches(model, image_shape, reference.X)]
    largest, n_labels = 0.0, 0
    for name, parts in zip(_outputs(model), zip(*outputs, strict=True), strict=True):
        actual = np.concatenate([np.asarray(part) for part in parts]).astype(np.float64)
        expected, allowed = right[name]
        # NaN and infinities are differences.
        difference = np.nan_to_num(np.abs(actual - expected), nan=np.inf)
        is_wrong = difference > allowed
        if is_wrong.any():
            worst = np.unravel_index(np.argmax(np.where(is_wrong, difference, -1)), difference.shape)
            which = f"check[{worst[0]}]{_path(reference.X, worst[0])}"
            raise ValueError(
                f"The exported file is not the detector: {which} has {name} {actual[worst]:.9g} in {runtime} "
                f"and {expected[worst]:.9g} in the detector, which is off by {difference[worst]:.3g}; allowed: "
                f"{allowed[worst]:.3g}. {is_wrong.sum()} of {is_wrong.size} differ. Nothing was written. Try "
                "other versions of torch, onnx and onnxscript, or keep the detector with save()."
            )
        if name in ("log_density", MAP_OUTPUT):
            largest = max(largest, float((difference / np.maximum(1.0, np.abs(expected))).max()))
        if name == "label":
            n_labels = int((difference > 0).sum())
    return Agreement(len(scores), largest, tolerance, n_labels)


def _path(X: Any, index: Any) -> str:
    """Return the path of an image, in parentheses; nothing where it has none."""
    return f" ({os.fspath(X[index])})" if isinstance(X, list) and isinstance(X[index], str | os.PathLike) else ""


def _batches(model: Exportable, image_shape: tuple[int, int] | None, X: Any) -> Iterator[Tensor]:
    """Yield the inputs of an exported file for X, in batches."""
    if model.feature_extractor is None:
        yield from torch.from_numpy(np.array(X)).to(model.density.kernel_centers.dtype).split(_CHECKED_ROWS)
        return
    extractor: Any = model.feature_extractor.extractor

    def pixels(picture: Image.Image) -> Tensor:
        if (picture.height, picture.width) != tuple(image_shape or ()):
            raise ValueError(f"the exported file takes images of image_shape={image_shape} only")
        return torch.from_numpy(np.array(picture))

    images = as_images(X, extractor.white_level)
    if image_shape:
        yield from image_batches(images, pixels, _CHECKED_ROWS)
    else:
        yield from extractor.batches(images, _CHECKED_ROWS)
