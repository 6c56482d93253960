"""
From PyOD
=========

Other signs, and a threshold that is set otherwise. ``as_pyod`` makes a detector of PyOD, for its ensembles and tools.
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
# PyOD's scores are higher for anomalous rows and its labels 1 for these; scikit-learn's are higher for normal rows,
# with labels 1 and -1. PyOD's `contamination` is the share of the training rows above the threshold, and says little
# of new ones: the scores of rows that a detector was fitted to are too good.

from pyod.models.kde import KDE
from pyod.models.knn import KNN

from dfkde_sklearn import DFKDEDetector, as_pyod

detectors = {
    "KDE of PyOD": KDE(contamination=0.05),
    "KNN of PyOD": KNN(contamination=0.05),
    "DFKDEDetector": as_pyod(DFKDEDetector(target_fpr=0.05)),
}
rates = {}
for name, detector in detectors.items():
    detector.fit(good)
    rates[name] = [detector.predict(X).mean() for X in (good, new_good, new_bad)]
    print("{}: {:.3f} of the training rows, {:.3f} of new good and {:.2f} of bad ones".format(name, *rates[name]))

# %%

import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(7, 2.4), layout="constrained")
for offset, (i, kind) in zip((-0.2, 0.2), enumerate(["new good rows", "bad rows"], start=1), strict=True):
    ax.barh(np.arange(3) + offset, [of[i] for of in rates.values()], 0.4, label=f"{kind} called anomalous")
ax.axvline(0.05, color="grey", linestyle=":")
ax.set(yticks=range(3), yticklabels=list(rates))
ax.invert_yaxis()
fig.legend(loc="outside upper center", ncols=2, frameon=False)

# %%
# Ensembles of PyOD take it. Their threshold is PyOD's, so compare their ranking:

from pyod.models.lscp import LSCP
from sklearn.metrics import roc_auc_score

members = [as_pyod(DFKDEDetector(n_components=k), contamination=0.05) for k in (4, 6, 16)]
ensemble = LSCP(members, n_bins=2, random_state=0).fit(good)
scores = ensemble.decision_function(np.vstack([new_good, new_bad]))
print(f"AUROC of an ensemble: {roc_auc_score(np.repeat([0, 1], [len(new_good), len(new_bad)]), scores):.3f}")
