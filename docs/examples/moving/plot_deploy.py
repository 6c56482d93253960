"""
Deploy: ONNX Runtime, OpenVINO, FastAPI
=======================================

One file for programs without Python, and a service of twenty lines for those that speak HTTP.
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

# %%
# A service
# ---------
#
# Where Python is available, the saved detector is enough. It is loaded once; what is no image is answered with an
# error.

from fastapi import FastAPI, HTTPException, Request
from fastapi.testclient import TestClient

detector.save(folder / "detector.safetensors")
served = PatchDFKDEDetector.load(folder / "detector.safetensors")
app = FastAPI()


@app.post("/score")
async def score(request: Request):
    try:
        assessment = served.assess([await request.body()])
    except ValueError as error:
        raise HTTPException(422, str(error)) from None
    return {
        "label": int(assessment.label[0]),
        "p_value": float(assessment.p_value[0]),
        "log_density": float(assessment.log_density[0]),
    }


# %%
# As a client sees it:

import io

from PIL import Image

buffer = io.BytesIO()
Image.fromarray(data.X_test[0]).save(buffer, format="png")
client = TestClient(app)
print(client.post("/score", content=buffer.getvalue()).json())
print(client.post("/score", content=b"not an image").status_code)
