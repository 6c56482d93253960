"""Deep Feature Kernel Density Estimation (DFKDE) as a scikit-learn estimator."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfkde_sklearn import datasets
    from dfkde_sklearn._cache import cache_size, clear_cache
    from dfkde_sklearn._classifier import AnomalyClassifier
    from dfkde_sklearn._detector import DFKDEDetector
    from dfkde_sklearn._features import TimmFeatures
    from dfkde_sklearn._model import DfkdeModel
    from dfkde_sklearn._scattering import ScatteringFeatures

__all__ = [
    "AnomalyClassifier",
    "DFKDEDetector",
    "DfkdeModel",
    "ScatteringFeatures",
    "TimmFeatures",
    "cache_size",
    "clear_cache",
    "datasets",
]

__version__ = "0.1.0"

_MODULES = {
    "AnomalyClassifier": "_classifier",
    "DFKDEDetector": "_detector",
    "DfkdeModel": "_model",
    "ScatteringFeatures": "_scattering",
    "TimmFeatures": "_features",
    "cache_size": "_cache",
    "clear_cache": "_cache",
}


def __getattr__(name: str) -> Any:
    # At the first use: to import PyTorch takes seconds, in which `dfkde` has to be able to end without a traceback.
    if name == "datasets":
        return import_module("dfkde_sklearn.datasets")
    if name not in _MODULES:
        raise AttributeError(f"module 'dfkde_sklearn' has no attribute {name!r}")
    value = getattr(import_module(f"dfkde_sklearn.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
