"""
Where is the defect?
====================

Maps, regions as a table, and the good images that an image is most like.
"""

# %%
# A detector with a density at every position of the image.

import pandas as pd

from dfkde_sklearn import AnomalyMapDisplay, PatchDFKDEDetector, ScatteringFeatures
from dfkde_sklearn.datasets import make_textures

data = make_textures(n_train=100, n_test=40, image_size=96, anomaly_fraction=0.25, random_state=0)
detector = PatchDFKDEDetector(ScatteringFeatures(image_size=96, pooling=None)).fit(data.X_train)

# %%
# The most anomalous images, what is anomalous in them, what their true defects are, and the training images that are
# most like them.

worst = detector.score_samples(data.X_test).argsort()[:4]
AnomalyMapDisplay.from_estimator(
    detector, data.X_test[worst], masks=data.masks_test[worst], training_images=data.X_train, n_neighbors=2
)

# %%
# The same as a table: connected regions below the threshold of maps, in pixels. The p-value is that of the whole image.

table = pd.DataFrame(detector.regions(data.X_test[worst]))
print(table[["image", "area", "row", "column", "log_density", "p_value"]].round(3).head(8).to_string(index=False))

# %%
# With true masks, metrics tell how well maps show defects:

from dfkde_sklearn.metrics import aupro, pixel_roc_auc

maps = detector.anomaly_maps(data.X_test)
print(f"pixels AUROC {pixel_roc_auc(data.masks_test, maps):.3f}, AUPRO {aupro(data.masks_test, maps):.3f}")
