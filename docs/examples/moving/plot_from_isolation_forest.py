"""
From IsolationForest
====================

The interface is the same. What changes: no trees to draw, no `contamination` to guess, and a threshold that holds on
new rows.
"""

# %%
# A feature matrix in which good parts vary in six directions, and bad ones lie a little off these.

import numpy as np

rng = np.random.default_rng(0)
directions = rng.normal(size=(6, 64))


def parts(n, noise=0.3):
    return rng.normal(size=(n, 6)) @ directions + noise * rng.normal(size=(n, 64))


good, new_good, new_bad = parts(300), parts(2000), parts(200, noise=0.4)

# %%
# ``fit``, ``predict``, ``decision_function``, ``score_samples`` and their signs are those of scikit-learn: higher is
# more normal, and ``predict`` is -1 for anomalous rows. A pipeline or a search needs no other change than the name.

from sklearn.ensemble import IsolationForest

from dfkde_sklearn import DFKDEDetector

detectors = {
    "IsolationForest": IsolationForest(contamination=0.05, random_state=0),
    "DFKDEDetector": DFKDEDetector(target_fpr=0.05),
}
rates = {}
for name, detector in detectors.items():
    detector.fit(good)
    rates[name] = [np.mean(detector.predict(X) == -1) for X in (new_good, new_bad)]
    print(
        f"{name}: {rates[name][0]:.3f} of new good rows and {rates[name][1]:.2f} of the bad ones are called anomalous"
    )

# %%
# The forest's `contamination` is a share of the *training* rows, and says nothing of new ones. `target_fpr` is a rate
# on new good rows, from out-of-fold scores: see :doc:`/guide/thresholds`. An honest threshold for the forest costs
# half of the rows, since it needs scores of rows that it was not fitted to.

import matplotlib.pyplot as plt
from sklearn.metrics import RocCurveDisplay

X, is_bad = np.vstack([new_good, new_bad]), np.repeat([0, 1], [len(new_good), len(new_bad)])
fig, ax = plt.subplots(figsize=(4.5, 4), layout="constrained")
for name, detector in detectors.items():
    RocCurveDisplay.from_predictions(is_bad, -detector.score_samples(X), ax=ax, name=name)
ax.axvline(0.05, color="grey", linestyle=":")

# %%
# Besides: p-values (``p_values``), a promise with confidence (``confidence=0.9``), a batch at a false discovery rate
# (``select``), and with images their features and maps. What the forest has and this has not: missing values, and
# thousands of features of which few matter.
