"""Images and models for the tests of the command line."""

import shutil
from pathlib import Path

import joblib
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from command_line import SCATTERING, run
from PIL import Image

from dfkde_sklearn import DFKDEDetector
from dfkde_sklearn.datasets import make_textures, write_mvtec_folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small images spend their time on waking threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def textures(tmp_path_factory):
    """A folder in the MVTec layout: 60 good images to learn from, 20 good ones and 20 with a hole for the test."""
    data = make_textures(60, 40, material="knit", defects=["hole"], image_size=64, random_state=0)
    return write_mvtec_folder(data, tmp_path_factory.mktemp("images") / "knit")


@pytest.fixture(scope="session")
def fitted(textures, tmp_path_factory):
    """A model of the good images."""
    model = tmp_path_factory.mktemp("model") / "knit.safetensors"
    assert run("fit", textures, *SCATTERING, "--model", model) == 0
    return model


@pytest.fixture(scope="session")
def positions(textures, tmp_path_factory):
    """A model of the good images, with a density at every position."""
    model = tmp_path_factory.mktemp("positions") / "knit.safetensors"
    assert (
        run("fit", textures / "train" / "good", "--features", "scattering", "--image-size", "64", "--model", model) == 0
    )
    return model


@pytest.fixture(scope="session")
def shared_weights(tmp_path_factory):
    """A file of random weights of a tiny network, which stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=0)
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.torch.save_file(network.state_dict(), file)
    return file


@pytest.fixture
def weights(shared_weights, tmp_path):
    """A copy of it, which may be moved or removed."""
    return Path(shutil.copy(shared_weights, tmp_path))


@pytest.fixture
def exposures(tmp_path):
    """A folder of three parts at several exposures, and the part of each image."""
    data = make_textures(9, 1, material="leather", image_size=64, random_state=0)
    folder, groups = tmp_path / "parts", {}
    for i, image in enumerate(data.X_train):
        path = folder / f"part{i % 3}" / f"part{i % 3}_exp{i // 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        groups[path] = f"part{i % 3}"
    with (tmp_path / "groups.csv").open("w") as table:
        table.write("path,group\n")
        table.writelines(f"{path.relative_to(folder).as_posix()},{group}\n" for path, group in groups.items())
    return folder, groups


@pytest.fixture(scope="session")
def odd(fitted, textures, tmp_path_factory):
    """Folders and files that are not what they should be."""
    folder = tmp_path_factory.mktemp("odd")
    image = (textures / "test" / "hole" / "000.png").read_bytes()
    for place in ("single", "tested/test/hole", "several/one/train/good"):
        (folder / place).mkdir(parents=True)
        (folder / place / "000.png").write_bytes(image)
    (folder / "none").mkdir()
    (folder / "text").write_text("no model")
    (folder / "cut").write_bytes(fitted.read_bytes()[:1000])
    rows = np.random.default_rng(0).normal(size=(9, 2))
    matrix = DFKDEDetector().fit(rows)
    matrix.save(folder / "matrix")
    joblib.dump({"dfkde_sklearn": "0.1.0", "detector": matrix}, folder / "older")
    safetensors.torch.save_file({"weight": torch.ones(2)}, folder / "weights")
    return folder


@pytest.fixture
def with_broken(textures, tmp_path):
    """Two good images, and between them one that is cut off."""
    folder = tmp_path / "some broken"
    folder.mkdir()
    good = sorted((textures / "test" / "good").iterdir())[:2]
    for name, path in zip("ac", good, strict=True):
        (folder / f"{name}.png").write_bytes(path.read_bytes())
    (folder / "b.png").write_bytes(good[0].read_bytes()[:300])
    return folder
