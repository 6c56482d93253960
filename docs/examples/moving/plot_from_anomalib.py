"""
From anomalib
=============

``DfkdeModel`` has the signature and the methods of the original, as a torch module. A detector has the same densities,
and a threshold that comes from the images instead of a constant.
"""

# %%
# The original's model, here with a small network of random weights, for want of a download. Without
# ``pre_trained=False`` the weights are those of ImageNet.

import torch

from dfkde_sklearn import DFKDEDetector, DfkdeModel
from dfkde_sklearn.datasets import make_textures

data = make_textures(n_train=60, n_test=60, image_size=64, anomaly_fraction=0.5, random_state=0)
as_tensors = {
    name: torch.from_numpy(images).float().div(255)[:, None].expand(-1, 3, -1, -1)
    for name, images in (("train", data.X_train), ("test", data.X_test))
}
torch.manual_seed(0)
model = DfkdeModel(["layer1", "layer2"], "resnet18", pre_trained=False, n_comps=8).eval()

# %%
# As in the original: features of batches, one fit, then probabilities.

with torch.no_grad():
    embeddings = torch.cat([model.get_features(batch) for batch in as_tensors["train"].split(16)])
    model.fit(embeddings)
    probabilities = model(as_tensors["test"])
print(probabilities[:4])

# %%
# The fitted module becomes a detector of scikit-learn, and back with ``to_torch``. A checkpoint of the original is
# read by ``DfkdeModel.from_anomalib``.

detector = DFKDEDetector.from_torch(model)
scores = detector.score_samples(data.X_test)

# %%
# The original's threshold is a log density of 12, regardless of the features: all images are called anomalous, or none.
# A detector that is fitted here sets the threshold by a rate of false alarms:

import matplotlib.pyplot as plt

fitted = DFKDEDetector(detector.features, n_components=8, residual=None, target_fpr=0.05).fit(data.X_train)
is_bad = data.y_test == 1
for name, some in {"threshold_offset=12": detector, "target_fpr=0.05": fitted}.items():
    is_alarm = some.predict(data.X_test) == -1
    print(f"{name}: {is_alarm[~is_bad].sum()} of {(~is_bad).sum()} good images are called anomalous")

new = fitted.score_samples(data.X_test)
fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
ax.hist([new[~is_bad], new[is_bad]], bins=40, stacked=True, label=["good", "damaged"])
ax.axvline(fitted.offset_, color="black", linestyle="--", label="target_fpr=0.05")
ax.axvline(12, color="grey", linestyle=":", label="the original's 12")
ax.set(xlabel="log density", ylabel="images")
ax.legend(frameon=False)
