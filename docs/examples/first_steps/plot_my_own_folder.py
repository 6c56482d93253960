"""
My own folder, from start to line
=================================

A folder of photographs of good parts, several of each part: what to say to ``fit``, what to keep, and what to do with
the parts of the first week.
"""

# %%
# A folder
# --------
#
# This example writes one: 60 parts, each photographed three times, under names such as ``part07_2.png``.

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dfkde_sklearn.datasets import make_textures

rng = np.random.default_rng(0)


def photograph(parts, folder, first=0):
    """Write three photographs of each part, which differ by a little noise."""
    folder.mkdir(parents=True)
    for number, part in enumerate(parts, first):
        for shot in range(3):
            noisy = np.clip(part + rng.normal(scale=2, size=part.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"part{number:02}_{shot}.png")


data = make_textures(n_train=60, n_test=60, image_size=64, anomaly_fraction=0.2, random_state=0)
work = Path(tempfile.mkdtemp())
photograph(data.X_train, work / "good")

# %%
# Fit, with groups
# ----------------
#
# Photographs of one part are near-duplicates. ``groups`` says which belong together; otherwise the threshold does not
# hold for new parts, see :ref:`groups`. Paths sorted by name are in the order in which a folder is read.

from dfkde_sklearn import PatchDFKDEDetector, ScatteringFeatures

paths = sorted((work / "good").glob("*.png"))
parts = [path.name.split("_")[0] for path in paths]
detector = PatchDFKDEDetector(ScatteringFeatures(image_size=64, pooling=None), target_fpr=0.05)
detector.fit(paths, groups=parts)
print(f"{len(paths)} images of {len(np.unique(detector.calibration_groups_))} parts")

# %%
# Keep it
# -------
#
# The file holds no code and can be read by later versions.

detector.save(work / "detector.safetensors")
detector = PatchDFKDEDetector.load(work / "detector.safetensors")

# %%
# At the line
# -----------
#
# New parts come in. ``assess`` has all answers; a part is as bad as its worst photograph.

photograph(data.X_test, work / "new")
new = sorted((work / "new").glob("*.png"))
assessment = detector.assess(new)
is_alarm = (assessment.label == -1).reshape(-1, 3).any(axis=1)
is_bad = data.y_test == 1
print(f"{is_alarm[is_bad].sum()} of {is_bad.sum()} bad parts, {is_alarm[~is_bad].sum()} of {(~is_bad).sum()} good ones")

# %%
# The first week
# --------------
#
# An inspector has looked at the new parts. The good ones, all of them and not only the false alarms, sharpen the
# threshold without a new fit:

good = [path for path, bad in zip(new, np.repeat(is_bad, 3), strict=True) if not bad]
detector.recalibrate(good, groups=[path.name.split("_")[0] for path in good])
print(f"threshold from {len(np.unique(detector.calibration_groups_))} parts")

# %%
# Later on
# --------
#
# A :class:`~dfkde_sklearn.DriftMonitor` sees each batch and raises an alarm when the parts, as a whole, stop looking
# like those of the fit. Here the lamp has become brighter:

import matplotlib.pyplot as plt

from dfkde_sklearn import DriftMonitor

later = make_textures(n_train=1, n_test=200, image_size=64, anomaly_fraction=0, random_state=1).X_test
brighter = np.clip(later[100:] * 1.25, 0, 255).astype(np.uint8)
monitor = DriftMonitor(detector)
for batch in [*np.array_split(later[:100], 10), *np.array_split(brighter, 10)]:
    monitor.update(batch)
print(monitor.describe())

# %%

monitor.plot(plt.figure(figsize=(8, 4.5), layout="constrained"))
