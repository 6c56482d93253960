"""Save and load: one safetensors file that holds no code.

The tensors are the buffers of the detector's state and, where asked for, the training rows. The header's metadata has
one entry, a JSON document: format version, the detector's class, its parameters, versions of libraries, the feature
extractor with its backbone's tag, hash and preprocessing, and the SHA-256 of the file, computed with zeros in place of
its digits.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import sklearn
import torch
from sklearn.base import BaseEstimator, clone
from torch import Tensor, nn

from dfkde_sklearn import __version__
from dfkde_sklearn._density.stream import RowSample
from dfkde_sklearn._deploy.buffers import StateBuffers
from dfkde_sklearn._document import (
    Check,
    as_json,
    checked_parameters,
    from_json,
    is_integer_from,
    is_list_of,
    is_positive,
    is_text,
)
from dfkde_sklearn._features.extractor import FeatureExtractor
from dfkde_sklearn._features.network import TimmFeatures
from dfkde_sklearn._features.scattering import ScatteringFeatures
from dfkde_sklearn._files import write_file

FORMAT = "dfkde-sklearn"
FORMAT_VERSION = 5
_DIGITS = "0" * 64
# The feature extractors that a file may name.
_EXTRACTORS: dict[str, type[FeatureExtractor]] = {kind.__name__: kind for kind in (TimmFeatures, ScatteringFeatures)}

# The arrays of the state of a `RowSample`, and what tensors of them are called; the rest of it is in the document.
_SAMPLE = {"rows": "training_rows", "numbers": "training_numbers", "places": "training_places"}
# Parameters that depend on the machine, or have another place in the file.
_NOT_KEPT = ("features", "device")


class File(NamedTuple):
    """A file as it was read: whole, with the SHA-256 that it states.

    path : Path
    header : dict, the JSON document.
    tensors : dict of Tensor, the buffers of the detector's state, and the training rows if they are kept.
    """

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def owner(self) -> str:
        """The name of the detector's class."""
        return str(self.header.get("detector"))


class Saved(NamedTuple):
    """The content of a file: a fitted detector.

    parameters : dict, of the constructor, without `features`.
    features : the parameter: "auto", None, or a feature extractor like the fitted one.
    extractor : the fitted feature extractor, or None.
    feature_names : list of str, of the columns; empty where they have none.
    buffers : StateBuffers, fitted.
    sample : dict or None, the state of the `RowSample` that `partial_fit` adds to.
    """

    parameters: dict[str, Any]
    features: Any
    extractor: Any
    feature_names: list[str]
    buffers: StateBuffers
    sample: dict[str, Any] | None


def save(path: str | os.PathLike[str], owner: str, saved: Saved) -> None:
    """Write a fitted detector of a class named `owner` to `path`; see `DFKDEDetector.save`."""
    import timm

    # What `load` would refuse.
    contradiction = saved.buffers.contradiction(saved.parameters)
    if contradiction is not None:
        raise ValueError(f"{contradiction}. Fit again, or set it back.")
    if saved.features is None and saved.extractor is not None:
        raise ValueError("features=None was set after a fit with a feature extractor. Fit again, or set it back.")
    kept = {name: value for name, value in saved.parameters.items() if name not in _NOT_KEPT}
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sha256": _DIGITS,
        "detector": owner,
        "parameters": as_json(kept, owner),
        "features": saved.features if saved.features in ("auto", None) else "extractor",
        "extractor": None if saved.extractor is None else _described_extractor(saved.extractor),
        "feature_names": saved.feature_names,
        "sample": None if saved.sample is None else _described_sample(saved.sample),
        "versions": {
            "dfkde-sklearn": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "timm": timm.__version__,
            "torch": str(torch.__version__),
        },
    }
    tensors = {name: value.contiguous() for name, value in saved.buffers.state_dict().items()}
    if saved.sample is not None:
        tensors |= {name: torch.from_numpy(np.ascontiguousarray(saved.sample[key])) for key, name in _SAMPLE.items()}
    data = safetensors.torch.save(tensors, {FORMAT: json.dumps(header)})
    write_file(path, data.replace(_DIGITS.encode(), hashlib.sha256(data).hexdigest().encode(), 1))


def detector_in(
    file: File,
    owner: str,
    kind: type[BaseEstimator],
    empty: Callable[[dict[str, Any]], StateBuffers],
    *,
    backbone: nn.Module | None,
    weights: str | os.PathLike[str] | None,
    device: str | torch.device | None,
    download: bool,
) -> Saved:
    """Return what a file holds, checked, of a detector of class `kind`; see `DFKDEDetector.load`.

    `owner` is the name that `save` was given, and `empty` returns buffers for the parameters of a detector.
    """
    path, header, tensors = file
    if file.owner != owner:
        raise ValueError(f"{str(path)!r} holds a {file.owner}, not a {owner}: load it with that class.")
    if header.get("extractor", ...) is None and (backbone is not None or weights is not None):
        raise ValueError(f"{str(path)!r} has no feature extractor: load it without backbone= and weights=.")
    try:
        extractor = None
        if header["extractor"] is not None:
            kind_of_extractor = _EXTRACTORS[header["extractor"]["class"]]
            extractor = kind_of_extractor.from_document(
                header["extractor"], backbone=backbone, weights=weights, device=device
            )
        known = {"auto": "auto", None: None, "extractor": clone(extractor) if extractor else None}
        features = known[header["features"]]
        parameters = checked_parameters(header["parameters"], kind, _NOT_KEPT)
        kind(**parameters)._validate_params()
        buffers = empty(parameters)
        buffers.load_state_dict({name: value for name, value in tensors.items() if name not in _SAMPLE.values()})
        names = header["feature_names"]
        n_features = buffers.n_features
        sample = _sample(header["sample"], tensors, n_features)
        if not is_list_of(is_text)(names) or len(names) not in (0, n_features):
            raise ValueError(f"feature_names are not the names of {n_features} columns")
        if (extractor is None) != (features is None) and features != "auto":
            raise ValueError(f"features is {header['features']!r}, which contradicts the feature extractor")
        if extractor is not None and extractor.n_features_out_ != n_features:
            raise ValueError("the feature extractor and the density have different numbers of features")
        if buffers.contradiction(parameters) is not None or not buffers.is_fitted:
            raise ValueError("its tensors contradict its parameters")
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{str(path)!r} does not hold what a detector needs: {error}") from error
    if extractor is not None:
        extractor.check_weights(download=download)
    return Saved(parameters, features, extractor, names, buffers, sample)


def described(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the file at `path` says of the detector, as values of JSON: its document, and the thresholds."""
    _, header, tensors = read(path)
    offsets: dict[str, Any] = {name: float(tensors[name]) for name in ("offset", "map_offset") if name in tensors}
    return {**header, **offsets, "n_calibration_scores": len(tensors["calibration_scores"])}


def read(path: str | os.PathLike[str]) -> File:
    """Return the content of a file, after checks of its version and its SHA-256."""
    path = Path(path)
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        (length,) = struct.unpack("<Q", data[:8])
        header = from_json(json.loads(data[8 : 8 + length])["__metadata__"][FORMAT])
        digits, version = header["sha256"], header["format_version"]
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, RecursionError, struct.error) as error:
        raise ValueError(
            f"{str(path)!r} is not a file of a detector's save, or it is damaged: {type(error).__name__}: {error}"
        ) from error
    if not is_integer_from(1)(version):
        raise ValueError(f"{str(path)!r} is damaged: it states format version {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format version {version}, and this version of dfkde-sklearn reads up to "
            f"{FORMAT_VERSION}. Install a newer one."
        )
    if version < FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format version {version}, of a version of dfkde-sklearn before the first release, and "
            f"this one reads {FORMAT_VERSION} only. Fit the detector again, and save it."
        )
    signed = data.replace(str(digits).encode(), _DIGITS.encode(), 1)
    if hashlib.sha256(signed).hexdigest() != digits:
        raise ValueError(f"{str(path)!r} is damaged or was changed: its SHA-256 is not the one it states.")
    return File(path, header, tensors)


def _described_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a `RowSample` but for its arrays; JSON has no infinite numbers."""
    limit = sample["limit"]
    return {name: sample[name] for name in ("n_seen", "n_scores", "seed", "labels")} | {
        "limit": None if limit > 1 else limit
    }


def _sample(described: Any, tensors: dict[str, Tensor], n_features: int) -> dict[str, Any] | None:
    """Return the state of a `RowSample` of a file, checked; None where it has none."""
    if described is None:
        if tensors.keys() & _SAMPLE.values():
            raise ValueError("it has training rows, of which its document says nothing")
        return None
    for name, check in _OF_SAMPLE.items():
        if not check(described[name]):
            raise ValueError(f"the {name} of its training rows is {described[name]!r:.80}, which cannot be")
    sample = {name: described[name] for name in _OF_SAMPLE}
    sample |= {key: tensors[name].numpy() for key, name in _SAMPLE.items()}
    sample["limit"] = math.inf if sample["limit"] is None else sample["limit"]
    RowSample.check_state(sample, n_features)
    return sample


_OF_SAMPLE: dict[str, Check] = {
    "n_seen": is_integer_from(1),
    "n_scores": is_integer_from(1),
    "seed": is_integer_from(0),
    "limit": lambda value: value is None or (is_positive(value) and value <= 1),
    "labels": lambda value: value is None or is_list_of(is_text)(value),
}


def _described_extractor(extractor: Any) -> dict[str, Any]:
    """Return a fitted feature extractor as plain values."""
    name = type(extractor).__name__
    if _EXTRACTORS.get(name) is not type(extractor):
        raise TypeError(
            f"save keeps the feature extractors {' and '.join(_EXTRACTORS)}, not {name}. Use joblib.dump, or a "
            "detector with features=None on what the extractor returns."
        )
    return extractor.document()
