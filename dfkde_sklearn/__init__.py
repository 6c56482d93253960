"""Deep Feature Kernel Density Estimation (DFKDE) as a scikit-learn estimator."""

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
