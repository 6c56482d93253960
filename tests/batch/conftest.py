"""A model, images, and what it says of them in this process."""

import os
from pathlib import Path

import pytest
from PIL import Image

from dfkde_sklearn import DFKDEDetector, ScatteringFeatures
from dfkde_sklearn.datasets import make_textures


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Restore the variables that Dask and Ray set for the processes that they start, such as MKL_NUM_THREADS."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_on_single_cores():
    """Workers inherit it: no reports of use over the network, and no threads that wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("DO_NOT_TRACK", "true")
        patch.setenv("DAFT_PROGRESS_BAR", "0")
        yield


@pytest.fixture(scope="session")
def data():
    return make_textures(20, 24, image_size=32, random_state=0)


@pytest.fixture(scope="session")
def model(data, tmp_path_factory):
    """The file of a detector."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    DFKDEDetector(ScatteringFeatures(scales=2, image_size=32)).fit(data.X_train).save(path)
    return path


@pytest.fixture(scope="session")
def paths(data, tmp_path_factory):
    """The paths of 24 images, sorted."""
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(data.X_test):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="session")
def detector(model):
    return DFKDEDetector.load(model)


@pytest.fixture(scope="session")
def scores(detector, paths):
    """The scores of the images by path, as this process computes them from all images at once."""
    return dict(zip(paths, detector.score_samples(paths).astype(float).tolist(), strict=True))


@pytest.fixture
def die_once(tmp_path):
    """A function that kills the process that calls it first, and does nothing in all others."""
    return make_die_once(tmp_path / "killed")


def make_die_once(marker: Path):
    # A function of a function, so that engines pickle its code, and workers need not import the tests.
    def die():
        import signal

        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    return die
