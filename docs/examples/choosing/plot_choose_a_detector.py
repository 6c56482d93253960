"""
Choose a detector, with labels and without
==========================================

No setting is best on every product. Compare a few on images of your own: with a handful of labelled defects by the
share that is found, and without by the log density of held-out images.
"""

# %%
# Features once
# -------------
#
# The price of an image is its pass through the network, or through the wavelets. Features at positions serve both
# kinds of detector: their mean over the positions is what pooled features are.

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures
from dfkde_sklearn.datasets import make_textures

data = make_textures(n_train=150, n_test=300, image_size=64, material="twill", random_state=0)
extractor = ScatteringFeatures(image_size=64, pooling=None).fit(data.X_train)
train, test = extractor.transform(data.X_train), extractor.transform(data.X_test)

# %%
# With labels
# -----------
#
# Of each candidate: the AUROC, and, as no AUROC says what a threshold does, the share of the damaged images that are
# found and of the good ones that are called anomalous.

from sklearn.metrics import roc_auc_score

pooled = [rows.mean((1, 2)) for rows in (train, test)]
candidates = {
    "at positions": (PatchDFKDEDetector(features=None), train, test),
    "at positions, one Gaussian": (PatchDFKDEDetector(features=None, density="gaussian"), train, test),
    "at positions, one covariance": (PatchDFKDEDetector(features=None, pooled_share=1), train, test),
    "pooled, defaults": (DFKDEDetector(features=None), *pooled),
    "pooled, 16 components": (DFKDEDetector(features=None, n_components=16, residual=None), *pooled),
}
is_bad = data.y_test == 1
results = {}
for name, (detector, X, X_new) in candidates.items():
    scores = detector.fit(X).score_samples(X_new)
    is_alarm = scores < detector.offset_
    results[name] = roc_auc_score(~is_bad, scores), is_alarm[is_bad].mean(), is_alarm[~is_bad].mean()
    print("{}: AUROC {:.3f}, found {:.2f}, false alarms {:.3f}".format(name, *results[name]))

# %%

import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
ax.barh(list(results), [found for _, found, _ in results.values()], label="damaged images found")
ax.barh(list(results), [alarms for _, _, alarms in results.values()], label="good images called anomalous")
ax.invert_yaxis()
fig.legend(loc="outside upper center", ncols=2, frameon=False)

# %%
# Differences of a few hundredths mean little with so few images: repeat with other splits, and keep images of one part
# on one side (:doc:`/guide/search`).
#
# Without labels
# --------------
#
# ``score`` is the mean log density of rows that were held out, in the whole feature space, so that settings of the
# density can be compared. It says which density describes good images best, which is not the same as which finds most
# defects.

from sklearn.model_selection import GridSearchCV, KFold

grid = {"n_components": [4, 16, 64, "auto"], "bandwidth": ["scott", "loo"]}
folds = KFold(5, shuffle=True, random_state=0)
search = GridSearchCV(DFKDEDetector(features=None), grid, cv=folds).fit(pooled[0])
print(search.best_params_)
