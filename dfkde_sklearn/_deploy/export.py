"""A fitted detector as one file for other runtimes: ONNX, and a program of torch.export."""

from __future__ import annotations

import importlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.special import expit
from torch import Tensor, nn

from dfkde_sklearn._deploy.model import DfkdeModel
from dfkde_sklearn._deploy.preprocessing import Preprocessing
from dfkde_sklearn._files import write_file
from dfkde_sklearn._images import as_images, image_batches

# Resize, GroupNormalization and LayerNormalization of backbones have their present form since 18 (2022).
OPSET = 18
OUTPUTS = ("log_density", "p_anomalous", "label")
# Not one, which the tracer would take for a constant.
_TRACED_ROWS = 2
# Rows of a batch while an exported file is checked: several, since a batch of one hides faults that mix rows.
_CHECKED_ROWS = 16
# Tolerances of the check: relative to the log density, or absolute, in nats, where that is below 1. After a network,
# since runtimes order its float32 sums differently, and for float32 and float64 features.
_TOLERANCES = {"images": 1e-3, "float32": 1e-4, "float64": 1e-8}

# An exported file: a batch to log density, P(anomalous) and label.
Run = Callable[[Tensor], Sequence[Any]]


class Expected(NamedTuple):
    """What an exported file must answer.

    X : images, or an array of feature rows (n, n_features) for a model without a feature extractor.
    log_densities : ndarray (n,), of the detector.
    """

    X: Any
    log_densities: NDArray[np.floating]


def write_onnx(
    model: DfkdeModel, path: str | os.PathLike[str], image_shape: tuple[int, int] | None, expected: Expected | None
) -> None:
    """Write a fitted model as one ONNX file; see `DFKDEDetector.to_onnx`."""
    try:
        for package in ("onnx", "onnxscript", *(() if expected is None else ("onnxruntime",))):
            importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"to_onnx needs the packages onnx and onnxscript, and check= needs onnxruntime ({error}): "
            "pip install 'dfkde-sklearn[onnx]'."
        ) from error
    scorer, name, example = _scorer(model, image_shape)
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
    if expected is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

        def run(batch: Tensor) -> Sequence[Any]:
            return session.run(list(OUTPUTS), {name: batch.numpy()})

        _check(run, "ONNX Runtime", model, image_shape, expected)
    write_file(path, data)


def write_program(
    model: DfkdeModel, path: str | os.PathLike[str], image_shape: tuple[int, int] | None, expected: Expected | None
) -> None:
    """Write a fitted model as a program of torch.export; see `DFKDEDetector.to_pt2`."""
    scorer, _, example = _scorer(model, image_shape)
    program = torch.export.export(scorer, (example,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    if expected is not None:
        stream.seek(0)
        _check(torch.export.load(stream).module(), "torch.export", model, image_shape, expected)
    write_file(path, stream.getbuffer())


class Scorer(nn.Module):
    """Images or feature rows to log density, P(anomalous) and label.

    Parameters
    ----------
    model : DfkdeModel
        Fitted.
    preprocessing : torch.nn.Module or None
        Applied to images first.
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
        # With >=, so that NaN is not normal: the detector refuses it, and a graph cannot.
        is_normal = log_densities.double() >= density.offset
        return log_densities, self.model.compute_probabilities(log_densities), 2 * is_normal.long() - 1


def _scorer(model: DfkdeModel, image_shape: tuple[int, int] | None) -> tuple[nn.Module, str, Tensor]:
    """Return the module to export, the name of its input, and an example input."""
    model.eval()
    dtype = model.density.kernel_centers.dtype
    if model.feature_extractor is None:
        if image_shape is not None:
            raise ValueError(
                f"image_shape={image_shape}, but this detector was fitted on features: there are no images to resize. "
                "Leave image_shape out."
            )
        return Scorer(model, None), "features", torch.zeros(_TRACED_ROWS, len(model.density.mean), dtype=dtype)
    extractor: Any = model.feature_extractor.extractor
    extractor.check_exportable()
    if image_shape is None:
        return Scorer(model, None), "images", torch.zeros(_TRACED_ROWS, 3, *extractor.input_size_)
    preprocessing = Preprocessing(extractor, image_shape)
    return Scorer(model, preprocessing), "images", torch.zeros(_TRACED_ROWS, *image_shape, 3, dtype=torch.uint8)


def _check(run: Run, runtime: str, model: DfkdeModel, image_shape: tuple[int, int] | None, reference: Expected) -> None:
    """Raise a ValueError unless an exported file gives the detector's results."""
    scores = reference.log_densities.astype(np.float64)
    excess, steepness = scores - model.threshold_offset, model.threshold_steepness
    dtype = str(model.density.kernel_centers.dtype).removeprefix("torch.")
    tolerance = _TOLERANCES[dtype if model.feature_extractor is None else "images"]
    near = tolerance * np.maximum(1.0, np.abs(scores))
    # The right values and their tolerances; where the score is at the threshold, either label is right.
    right = {
        "log_density": (scores, near),
        "p_anomalous": (expit(-steepness * excess), max(1.0, steepness) * near),
        "label": (np.where(excess < 0, -1.0, 1.0), np.where(np.abs(excess) <= near, np.inf, 0.0)),
    }
    outputs = [run(batch) for batch in _batches(model, image_shape, reference.X)]
    for name, parts in zip(OUTPUTS, zip(*outputs, strict=True), strict=True):
        actual = np.concatenate([np.asarray(part) for part in parts]).astype(np.float64)
        expected, allowed = right[name]
        # NaN and infinities are differences.
        difference = np.nan_to_num(np.abs(actual - expected), nan=np.inf)
        wrong = np.flatnonzero(difference > allowed)
        if len(wrong):
            i = int(wrong[np.argmax(difference[wrong])])
            raise ValueError(
                f"The exported file is not the detector: check[{i}] has {name} {actual[i]:.9g} in {runtime} and "
                f"{expected[i]:.9g} in the detector, which is off by {difference[i]:.3g}; allowed: {allowed[i]:.3g}. "
                f"{len(wrong)} of {len(scores)} differ. Nothing was written. Try other versions of torch, onnx "
                "and onnxscript, or keep the detector with save()."
            )


def _batches(model: DfkdeModel, image_shape: tuple[int, int] | None, X: Any) -> Iterator[Tensor]:
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
    yield from image_batches(images, pixels if image_shape else extractor.image_transform(), _CHECKED_ROWS)
