"""
Why is this one bad?
====================

A score is a sum. What it is made of says which features are odd, and which good rows a row is most like.
"""

# %%
# Features with names: measurements of parts, of which one is off in the last row.

import numpy as np

from dfkde_sklearn import DFKDEDetector, ExplanationDisplay

rng = np.random.default_rng(0)
directions = rng.normal(size=(4, 12))
names = [f"measure {i}" for i in range(12)]
good = rng.normal(size=(300, 4)) @ directions + 0.2 * rng.normal(size=(300, 12))
new = rng.normal(size=(3, 4)) @ directions + 0.2 * rng.normal(size=(3, 12))
new[2, 7] += 1.5
detector = DFKDEDetector().fit(good)
print(detector.predict(new))

# %%
# By how much would the log density rise with another value of one feature alone? Features are correlated, and still the
# one at fault stands out.

explanation = detector.explain(new)
for i in explanation.feature_gains[2].argsort()[:-4:-1]:
    print(f"{names[i]}: {explanation.feature_gains[2, i]:.1f} of {-explanation.axis_terms[2].sum():.1f}")

# %%
# By principal axes: their terms, the residual's and a rest add up to the log density, and the lowest make the row
# anomalous. The last axes are those along which good rows hardly vary.

ExplanationDisplay.from_explanation(explanation, row=2)

# %%
# Which good rows is it most like? Their shares of the density:

for kernel, share in zip(explanation.kernels[2], explanation.shares[2], strict=True):
    print(f"training row {kernel}: {share:.0%}")

# %%
# With :class:`~dfkde_sklearn.TimmFeatures` and several layers, ``explanation.layer_terms`` has a term for each layer.
# For images at positions, :class:`~dfkde_sklearn.AnomalyMapDisplay` and ``regions`` say where instead of which
# feature.
