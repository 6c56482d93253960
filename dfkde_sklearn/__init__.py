"""Deep Feature Kernel Density Estimation (DFKDE) as a scikit-learn estimator."""

from dfkde_sklearn import datasets
from dfkde_sklearn._detector import DFKDEDetector
from dfkde_sklearn._features import TimmFeatures
from dfkde_sklearn._scattering import ScatteringFeatures

__all__ = ["DFKDEDetector", "ScatteringFeatures", "TimmFeatures", "datasets"]

__version__ = "0.1.0"
