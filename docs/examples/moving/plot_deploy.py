"""
Deploy: ONNX Runtime, OpenVINO
==============================

One file for programs without Python. For those that speak HTTP there is a server to copy: :ref:`serving`.
"""

# %%
# A detector that is to run elsewhere.

import tempfile
from pathlib import Path

import numpy as np

from dfkde_sklearn import PatchDFKDEDetector, TimmFeatures
from dfkde_sklearn.datasets import make_textures

data = make_textures(n_train=60, n_test=20, image_size=64, random_state=0)
features = TimmFeatures("resnet10t", pretrained=False, layers="layer2", image_size=64, pooling=None, random_state=0)
detector = PatchDFKDEDetector(features).fit(data.X_train)
folder = Path(tempfile.mkdtemp())

# %%
# ONNX
# ----
#
# With `image_shape` the graph takes images as a camera gives them: uint8, of that size, resized and normalised within.
# ``check`` compares the file with the detector on some images before it is written.

rgb = np.repeat(data.X_test[..., None], 3, axis=-1)
detector.to_onnx(folder / "detector.onnx", image_shape=(64, 64), check=rgb)

# %%
# ONNX Runtime, from Python here, from C++, C#, Java or JavaScript there:

import onnxruntime

session = onnxruntime.InferenceSession(folder / "detector.onnx")
names = [output.name for output in session.get_outputs()]
answers = dict(zip(names, session.run(None, {"images": rgb}), strict=True))
print({name: answer.shape for name, answer in answers.items()})
print("largest difference:", np.abs(answers["log_density"] - detector.score_samples(rgb)).max())

# %%
# OpenVINO reads the same file. It computes in bfloat16 where the processor can, unless told otherwise:

import openvino

compiled = openvino.compile_model(folder / "detector.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
print("labels agree:", bool((compiled({"images": rgb})["label"] == detector.predict(rgb)).all()))
