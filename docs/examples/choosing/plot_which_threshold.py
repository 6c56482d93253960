"""
Which threshold?
================

A threshold is a bargain: fewer false alarms, fewer defects found. What does which rate give?
"""

# %%
# Photographs of metal, some with defects; and a detector with the usual 5 %.

from dfkde_sklearn import OperatingCurveDisplay, PatchDFKDEDetector, PValueDisplay, ScatteringFeatures, ScoreDisplay
from dfkde_sklearn.datasets import make_textures

data = make_textures(n_train=150, n_test=200, image_size=64, material="weave", random_state=0)
detector = PatchDFKDEDetector(ScatteringFeatures(image_size=64, pooling=None)).fit(data.X_train)
assessment = detector.assess(data.X_test)
is_bad = data.y_test == 1
for name, some in {"damaged": is_bad, "good": ~is_bad}.items():
    print(f"{(assessment.label[some] == -1).sum()} of {some.sum()} {name} images are called anomalous")

# %%
# With labels
# -----------
#
# A few labelled defects show what each rate gives. Everything is computed from scores that are there already.

import matplotlib.pyplot as plt

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
known = {"calibration_scores": detector.calibration_scores_, "y": data.y_test}
ScoreDisplay.from_predictions(assessment.log_density, threshold=detector.offset_, **known, ax=left)
curve = OperatingCurveDisplay.from_predictions(
    assessment.log_density, target_fpr=detector.target_fpr, **known, ax=right
)

# %%
# Where the red curve is flat, more false alarms buy nothing. The same as numbers:

for rate in (0.01, 0.02, 0.05, 0.1, 0.2):
    i = abs(curve.asked - rate).argmin()
    print(f"asked {curve.asked[i]:.3f}: kept {curve.kept[i]:.3f}, found {curve.found[i]:.2f}")

# %%
# Without labels
# --------------
#
# Without labels, the share that is called anomalous tells how much work a threshold makes. Where good parts are known,
# their p-values show whether the promise is kept: their curve should stay within the band.

PValueDisplay.from_predictions(assessment.p_value[~is_bad])

# %%
# Another threshold needs no new fit of the density, only other quantiles of the same calibration scores:
# ``detector.set_params(target_fpr=0.02)`` and a fit on cached features, or ``dfkde score --target-fpr 0.02``. What a
# threshold promises, and to whom, is in :doc:`/guide/thresholds`.
