"""What the benchmarks rest on; that they run is for .ci/run to say, which runs each with --quick."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

PATH = Path(__file__).parents[1] / "benchmarks" / "real_data.py"


@pytest.fixture(scope="module")
def real_data():
    spec = importlib.util.spec_from_file_location("real_data", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("width", [20, 100], ids=["more rows than features", "fewer rows than features"])
def test_ledoit_wolf_distances_are_scikit_learns(real_data, width):
    rng = np.random.default_rng(0)
    train = rng.normal(size=(60, width)) @ rng.normal(size=(width, width)) + 5
    test = rng.normal(size=(9, width))
    expected = LedoitWolf().fit(train).mahalanobis(test)
    np.testing.assert_allclose(real_data.ledoit_wolf_scores(train, test), expected, rtol=1e-10)


def test_no_split_has_images_of_one_group_on_both_sides(real_data, tmp_path):
    real_data.write_images(tmp_path / "tiles", 12, grouped=True)
    images = real_data.load_images(tmp_path / "tiles")
    splits = real_data.group_splits(images, n_seeds=3)
    assert len(splits) == 4
    for train, test in splits:
        assert not set(images.groups[train]) & set(images.groups[test])
        assert np.array_equal(np.sort(np.r_[train, test]), np.flatnonzero(~images.is_defect))
        # Rows of one group stand side by side.
        assert np.count_nonzero(images.groups[train][1:] != images.groups[train][:-1]) + 1 == len(
            np.unique(images.groups[train])
        )
