"""Deep Feature Kernel Density Estimation (DFKDE) as a scikit-learn estimator."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfkde_sklearn import datasets, metrics
    from dfkde_sklearn._batch.scorer import BatchScorer, BatchTransformer
    from dfkde_sklearn._calibration import Assessment
    from dfkde_sklearn._classifier import AnomalyClassifier
    from dfkde_sklearn._deploy.model import DfkdeModel
    from dfkde_sklearn._deploy.position_model import PatchDfkdeModel
    from dfkde_sklearn._detector import DFKDEDetector
    from dfkde_sklearn._explanation import Explanation, Region
    from dfkde_sklearn._features.cache import cache_size, clear_cache
    from dfkde_sklearn._features.network import TimmFeatures
    from dfkde_sklearn._features.scattering import ScatteringFeatures
    from dfkde_sklearn._monitor import DriftMonitor
    from dfkde_sklearn._patch_detector import PatchDFKDEDetector
    from dfkde_sklearn._pyod import as_pyod
    from dfkde_sklearn._report.displays import (
        AnomalyMapDisplay,
        ExplanationDisplay,
        OperatingCurveDisplay,
        PValueDisplay,
        ScoreDisplay,
    )
    from dfkde_sklearn._report.html import write_report

__all__ = [
    "AnomalyClassifier",
    "AnomalyMapDisplay",
    "Assessment",
    "BatchScorer",
    "BatchTransformer",
    "DFKDEDetector",
    "DfkdeModel",
    "DriftMonitor",
    "Explanation",
    "ExplanationDisplay",
    "OperatingCurveDisplay",
    "PValueDisplay",
    "PatchDFKDEDetector",
    "PatchDfkdeModel",
    "Region",
    "ScatteringFeatures",
    "ScoreDisplay",
    "TimmFeatures",
    "as_pyod",
    "cache_size",
    "clear_cache",
    "datasets",
    "metrics",
    "write_report",
]

__version__ = "0.1.0"

_MODULES = {
    "AnomalyClassifier": "_classifier",
    "AnomalyMapDisplay": "_report.displays",
    "Assessment": "_calibration",
    "BatchScorer": "_batch.scorer",
    "BatchTransformer": "_batch.scorer",
    "DFKDEDetector": "_detector",
    "DfkdeModel": "_deploy.model",
    "DriftMonitor": "_monitor",
    "Explanation": "_explanation",
    "ExplanationDisplay": "_report.displays",
    "OperatingCurveDisplay": "_report.displays",
    "PValueDisplay": "_report.displays",
    "PatchDFKDEDetector": "_patch_detector",
    "PatchDfkdeModel": "_deploy.position_model",
    "Region": "_explanation",
    "ScatteringFeatures": "_features.scattering",
    "ScoreDisplay": "_report.displays",
    "TimmFeatures": "_features.network",
    "as_pyod": "_pyod",
    "cache_size": "_features.cache",
    "clear_cache": "_features.cache",
    "write_report": "_report.html",
}


def __getattr__(name: str) -> Any:
    # At the first use: to import PyTorch takes seconds, in which `dfkde` has to be able to end without a traceback.
    if name in {"datasets", "metrics"}:
        return import_module(f"dfkde_sklearn.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'dfkde_sklearn' has no attribute {name!r}")
    value = getattr(import_module(f"dfkde_sklearn.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
