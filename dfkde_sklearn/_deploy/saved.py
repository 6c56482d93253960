"""Save and load: one safetensors file that holds no code.

The tensors are the buffers of `DensityBuffers`. The header's metadata has one entry, a JSON document: format version,
parameters, versions of libraries, the feature extractor with its backbone's tag, hash and preprocessing, and the
SHA-256 of the whole file, taken with zeros in the place of its digits.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import platform
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import sklearn
import torch
from sklearn.base import clone
from torch import Tensor, nn

from dfkde_sklearn._deploy.buffers import DensityBuffers
from dfkde_sklearn._features.layers import check_layers
from dfkde_sklearn._features.network import TimmFeatures, image_transform
from dfkde_sklearn._features.scattering import ScatteringFeatures
from dfkde_sklearn._files import write_file

if TYPE_CHECKING:
    from dfkde_sklearn._detector import DFKDEDetector

FORMAT = "dfkde-sklearn"
FORMAT_VERSION = 1
_DIGITS = "0" * 64
# JSON has lists only.
_TUPLE = "tuple"
# Parameters that a file of another machine shall not set.
_OF_THE_MACHINE = ("device", "cache")
_EXTRACTORS: dict[str, type[TimmFeatures | ScatteringFeatures]] = {
    "TimmFeatures": TimmFeatures,
    "ScatteringFeatures": ScatteringFeatures,
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53


def _are(
    kind: type[list[Any]] | type[tuple[Any, ...]], is_one: Callable[[Any], bool], length: int | None = None
) -> Callable[[Any], bool]:
    def are(values: Any) -> bool:
        return isinstance(values, kind) and len(values) == (length or len(values)) and all(map(is_one, values))

    return are


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What a fitted feature extractor has, all of it, and what is allowed there.
_FITTED: dict[str, dict[str, Callable[[Any], bool]]] = {
    "TimmFeatures": {
        "backbone_name_": _is_text,
        "seed_": lambda value: value is None or _is_whole(value, 0),
        "weights_hash_": _is_text,
        "input_size_": _are(tuple, lambda value: _is_whole(value, 1), 2),
        "mean_": _are(tuple, _is_number, 3),
        "std_": _are(tuple, lambda value: _is_number(value) and value > 0, 3),
        "interpolation_": _is_text,
        "crop_mode_": _is_text,
        "crop_pct_": lambda value: _is_number(value) and value > 0,
        "layers_": _are(list, _is_text),
        "layer_formats_": _are(list, lambda value: value in ("NC", "NCHW", "NHWC", "NLC", "NCL")),
        "layer_prefix_tokens_": _are(list, lambda value: _is_whole(value, 0)),
        "layer_widths_": _are(list, lambda value: _is_whole(value, 1)),
        "activation_bytes_": lambda value: _is_whole(value, 0),
        "n_features_out_": lambda value: _is_whole(value, 1),
    },
    "ScatteringFeatures": {"n_features_out_": lambda value: _is_whole(value, 1)},
}

_Detector = TypeVar("_Detector", bound="DFKDEDetector")


def save(detector: DFKDEDetector, path: str | os.PathLike[str]) -> None:
    """Write a fitted detector to `path`; see `DFKDEDetector.save`."""
    import timm

    from dfkde_sklearn import __version__

    extractor = None if detector.features_ is None else _described_extractor(detector.features_)
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sha256": _DIGITS,
        "parameters": _plain(
            {
                name: value
                for name, value in detector.get_params(deep=False).items()
                if name not in ("features", "device")
            },
            "DFKDEDetector",
        ),
        # "auto" and None are values of the parameter; "extractor" is a transformer like the fitted one.
        "features": detector.features if detector.features in ("auto", None) else "extractor",
        "extractor": extractor,
        "feature_names": getattr(detector, "feature_names_in_", np.array([])).tolist(),
        "versions": {
            "dfkde-sklearn": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "timm": timm.__version__,
            "torch": str(torch.__version__),
        },
    }
    tensors = {name: value.contiguous() for name, value in detector._buffers().state_dict().items()}
    data = safetensors.torch.save(tensors, {FORMAT: json.dumps(header)})
    write_file(path, data.replace(_DIGITS.encode(), hashlib.sha256(data).hexdigest().encode(), 1))


def load(
    path: str | os.PathLike[str],
    kind: type[_Detector],
    *,
    backbone: nn.Module | None,
    weights: str | os.PathLike[str] | None,
    device: str | torch.device | None,
    download: bool,
) -> _Detector:
    """Return the detector of class `kind` in the file at `path`; see `DFKDEDetector.load`."""
    header, tensors = _read(Path(path))
    try:
        if header["extractor"] is not None:
            extractor = _extractor(header["extractor"], backbone, weights, device)
        elif backbone is None and weights is None:
            extractor = None
        else:
            raise ValueError(f"{str(path)!r} has no feature extractor: load it without backbone= and weights=.")
        features = {"auto": "auto", None: None, "extractor": clone(extractor) if extractor else None}[
            header["features"]
        ]
        detector = kind(features, device=device, **_parameters(header["parameters"], kind, ("features", "device")))
        detector._validate_params()
        buffers = DensityBuffers(detector.scaling, 1.0, 0.0)
        buffers.load_state_dict(tensors)
        names = header["feature_names"]
        n_features = len(buffers.mean)
        if not _are(list, _is_text)(names) or len(names) not in (0, n_features):
            raise ValueError(f"feature_names are not the names of {n_features} columns")
        if (extractor is None) != (features is None) and features != "auto":
            raise ValueError(f"features is {header['features']!r}, which contradicts the feature extractor")
        if extractor is not None and extractor.n_features_out_ != n_features:
            raise ValueError("the feature extractor and the density have different numbers of features")
        if buffers.scaling != detector.scaling or not buffers.is_fitted:
            raise ValueError("its tensors contradict its parameters")
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{str(path)!r} does not hold what a detector needs: {error}") from error
    detector._take(buffers, extractor)
    if names:
        detector.feature_names_in_ = np.array(names, dtype=object)
    if isinstance(extractor, TimmFeatures):
        _check_backbone(extractor, download)
    return detector


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON document and the tensors of a file, whole and of a version that is known."""
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][FORMAT], object_hook=_with_tuples)
        digits, version = header["sha256"], header["format_version"]
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, RecursionError, struct.error) as error:
        raise ValueError(
            f"{str(path)!r} is not a file of DFKDEDetector.save, or it is damaged: {type(error).__name__}: {error}"
        ) from error
    if not _is_whole(version, 1):
        raise ValueError(f"{str(path)!r} is damaged: it states format version {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format version {version}, and this version of dfkde-sklearn reads up to "
            f"{FORMAT_VERSION}. Install a newer one."
        )
    signed = data.replace(str(digits).encode(), _DIGITS.encode(), 1)
    if hashlib.sha256(signed).hexdigest() != digits:
        raise ValueError(f"{str(path)!r} is damaged or was changed: its SHA-256 is not the one it states.")
    return header, tensors


def _described_extractor(extractor: Any) -> dict[str, Any]:
    """Return a fitted feature extractor as plain values."""
    name = type(extractor).__name__
    if _EXTRACTORS.get(name) is not type(extractor):
        raise TypeError(
            f"save keeps the feature extractors {' and '.join(_EXTRACTORS)}, not {name}. Use joblib.dump, or a detector with "
            "features=None on what the extractor returns."
        )
    parameters = {key: value for key, value in extractor.get_params(deep=False).items() if key not in _OF_THE_MACHINE}
    if isinstance(parameters.get("backbone"), nn.Module):
        # A module is code, which the file does not hold; load is given it.
        parameters["backbone"] = None
    fitted = {key: value for key, value in vars(extractor).items() if key.endswith("_")}
    return {"class": name, "parameters": _plain(parameters, name), "fitted": _plain(fitted, name)}


def _extractor(
    described: Mapping[str, Any],
    backbone: nn.Module | None,
    weights: str | os.PathLike[str] | None,
    device: str | torch.device | None,
) -> TimmFeatures | ScatteringFeatures:
    """Return the fitted feature extractor that was described."""
    name, fitted = described["class"], described["fitted"]
    parameters = _parameters(described["parameters"], _EXTRACTORS[name], _OF_THE_MACHINE)
    if name == "TimmFeatures":
        is_module = parameters["backbone"] is None
        if is_module != isinstance(backbone, nn.Module):
            raise ValueError(
                f"The backbone is a module, {fitted['backbone_name_']!r}: load(path, backbone=MODULE)."
                if is_module
                else f"The backbone is {parameters['backbone']!r}, by name: load it without backbone=."
            )
        if backbone is not None:
            parameters["backbone"] = backbone
        if weights is not None:
            parameters["weights"] = weights
    elif backbone is not None or weights is not None:
        raise ValueError(f"{name} has no backbone: load it without backbone= and weights=.")
    extractor = _EXTRACTORS[name](device=device, **parameters)
    extractor._validate_params()
    for attribute, value in fitted.items():
        if attribute not in _FITTED[name]:
            raise ValueError(f"{attribute!r} is not a fitted attribute of {name}")
        if not _FITTED[name][attribute](value):
            raise ValueError(f"the {attribute} of {name} is {value!r:.80}, which cannot be")
        setattr(extractor, attribute, value)
    missing = _FITTED[name].keys() - fitted.keys()
    if missing:
        raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
    if isinstance(extractor, TimmFeatures):
        n_layers = len(extractor.layers_) or 1
        lists = (extractor.layer_formats_, extractor.layer_prefix_tokens_, extractor.layer_widths_)
        if (
            any(len(values) != n_layers for values in lists)
            or sum(extractor.layer_widths_) != extractor.n_features_out_
        ):
            raise ValueError(f"what {name} says of its layers is contradictory")
        image_transform(extractor)
    elif extractor.n_features_out_ != extractor._n_features():
        raise ValueError(f"the parameters of {name} and its n_features_out_ are of different numbers of features")
    else:
        extractor._check_size()
    return extractor


def _parameters(given: Any, kind: type, but: tuple[str, ...]) -> dict[str, Any]:
    """Return the constructor's parameters in a file, which may set none of those in `but`."""
    unknown = dict(given).keys() - (inspect.signature(kind).parameters.keys() - set(but))
    if unknown:
        raise ValueError(f"{kind.__name__} takes no {', '.join(sorted(map(str, unknown)))} from a file")
    return dict(given)


def _check_backbone(extractor: TimmFeatures, download: bool) -> None:
    """Load the backbone, and raise unless its weights are those of the fit."""
    with extractor._lent_backbone(download=download) as backbone:
        found = backbone.weights_hash
        if extractor.layers_:
            check_layers(extractor.layers_, backbone.network, extractor.backbone_name_)
    if found != extractor.weights_hash_:
        raise ValueError(
            f"The weights of backbone {extractor.backbone_name_!r} are not those that the detector was fitted with: "
            f"SHA-256 {found:.12}..., at the fit {extractor.weights_hash_:.12}.... Give those with weights=PATH, or fit "
            "again."
        )


def _with_tuples(found: dict[str, Any]) -> Any:
    return tuple(found[_TUPLE]) if found.keys() == {_TUPLE} else found


def _plain(values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return values as JSON has them."""
    plain = {}
    for name, value in values.items():
        if isinstance(value, np.random.RandomState):
            value = None
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, np.generic):
            value = value.item()
        elif isinstance(value, tuple):
            value = {_TUPLE: list(value)}
        try:
            plain[name] = json.loads(json.dumps(value))
        except TypeError as error:
            raise TypeError(
                f"{owner}: {name}={value!r} cannot be saved: a {type(value).__name__}. Use joblib.dump, or plain "
                "parameters."
            ) from error
    return plain
