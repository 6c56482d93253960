"""
Quick start
===========

Good images in; for each new image a label, a p-value and a map of where it is anomalous out.
"""

# %%
# Images of woven cloth are generated: 100 good ones to learn from, and 40 new ones, a quarter of them damaged.

from dfkde_sklearn.datasets import make_textures

data = make_textures(n_train=100, n_test=40, anomaly_fraction=0.25, random_state=0)

# %%
# A detector is a feature extractor and a density. The threshold is set by the fit so that about 5 % of new good images
# are called anomalous. No damaged image is needed.

from dfkde_sklearn import PatchDFKDEDetector, ScatteringFeatures

detector = PatchDFKDEDetector(ScatteringFeatures(pooling=None), target_fpr=0.05)
detector.fit(data.X_train)

# %%
# All answers in one pass. A label of -1 is anomalous, a small p-value too: a good image has one of 0.05 or less one
# time in twenty.

assessment, maps = detector.assess_with_maps(data.X_test)
for i in assessment.p_value.argsort(kind="stable")[:12]:
    print(f"image {i:2}: label {assessment.label[i]:2}, p-value {assessment.p_value[i]:.3f}, {data.defects_test[i]}")

# %%
# Where is it? ``maps`` has the log density at each pixel; below ``map_offset_`` it is anomalous.

import matplotlib.pyplot as plt

worst = assessment.log_density.argsort()[:5]
fig, axes = plt.subplots(1, 5, figsize=(9, 2.1), layout="constrained")
for ax, i in zip(axes, worst, strict=True):
    ax.imshow(data.X_test[i], cmap="gray", vmin=0, vmax=255)
    ax.contour(maps[i], [detector.map_offset_], colors="red", linewidths=1)
    ax.set_title(data.defects_test[i], fontsize=10)
    ax.axis("off")
