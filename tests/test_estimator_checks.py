"""The contract with scikit-learn, by its own checks, for every kind of setting."""

import os

import pytest
from sklearn.utils.estimator_checks import estimator_checks_generator

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector

pytest.importorskip("pandas", reason="scikit-learn skips checks in silence without pandas")
pytest.importorskip("polars", reason="scikit-learn skips checks in silence without polars")

ORIGINAL = {"n_components": 16, "residual": None}
SETTINGS = [
    {},
    ORIGINAL,
    {"n_components": "auto", "residual": None},
    {"residual": None, "bandwidth": "loo"},
    {"scaling": "norm"},
    {"scaling": None},
    {"bandwidth": "silverman"},
    {"bandwidth": "loo"},
    {"bandwidth": 0.4},
    {"residual": "gaussian"},
    {"n_components": 16, "residual": "box"},
    {"contamination": 0.1},
    {"n_components": 1},
    {"n_components": 0.9},
    {"n_components": 64},
    {"max_samples": 50},
    # What any number of rows can promise.
    {"confidence": 0.5, "target_fpr": 0.5},
]
PATCH_SETTINGS = [
    {},
    {"density": "gaussian"},
    {"contamination": 0.1},
    {"max_samples": 50},
    {"normalization": 0.5},
    {"confidence": 0.5, "target_fpr": 0.5},
]
ESTIMATORS = [
    *(DFKDEDetector(**settings) for settings in SETTINGS),
    *(PatchDFKDEDetector(**settings) for settings in PATCH_SETTINGS),
]
# The one check that runs only with an environment variable set before scipy is imported: .ci/run makes that pass.
NEEDS_ARRAY_API = {"check_array_api_input"}
# It wants fit_predict to be fit and predict, which calls nearly all rows of the fit normal, each by its own kernel.
# tests/test_detector.py holds what fit_predict promises instead.
IN_SAMPLE = "check_outliers_fit_predict"
# It sets a contamination at its end, which beside a confidence is an error.
SETS_CONTAMINATION = "check_outliers_train"


@pytest.mark.parametrize("detector", ESTIMATORS, ids=str)
def test_every_scikit_learn_check_passes_and_none_is_skipped(detector):
    skipped = set()
    for estimator, check in estimator_checks_generator(detector):
        is_in_sample = check.func.__name__ == IN_SAMPLE and estimator.contamination == "auto"
        is_refused = check.func.__name__ == SETS_CONTAMINATION and estimator.confidence is not None
        try:
            if is_in_sample:
                with pytest.raises(AssertionError, match="Arrays are not equal"):
                    check(estimator)
            elif is_refused:
                with pytest.raises(ValueError, match=r"confidence=0\.5 .* contamination=0\.1 sets"):
                    check(estimator)
            else:
                check(estimator)
        except pytest.skip.Exception:
            raise
        except Exception as error:
            if type(error).__name__ != "SkipTest":
                raise
            skipped.add(check.func.__name__)
    assert skipped == (set() if os.environ.get("SCIPY_ARRAY_API") else NEEDS_ARRAY_API)
