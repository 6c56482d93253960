"""Generated textures: what an image set has to be, whatever it shows."""

import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.random_projection import GaussianRandomProjection

from dfkde_sklearn.datasets import make_textures

MATERIALS = ["weave", "twill", "knit", "mesh", "metal", "wood", "leather", "granite"]
FOR_ALL = ["hole", "scratch", "stain", "wear"]


@pytest.mark.parametrize("material", MATERIALS)
def test_textures_have_the_documented_arrays(material):
    data = make_textures(3, 12, material=material, image_size=40, random_state=0)
    assert (data.X_train.shape, data.X_test.shape) == ((3, 40, 40), (12, 40, 40))
    assert data.X_train.dtype == data.X_test.dtype == np.uint8
    assert data.masks_test.shape == (12, 40, 40)
    assert data.masks_test.dtype == bool
    assert data.y_train.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(data.y_test, data.masks_test.any(axis=(1, 2)))
    np.testing.assert_array_equal(data.y_test, data.defects_test != "good")
    assert set(FOR_ALL) <= set(data.defect_names) == set(data.defects_test) - {"good"}
    assert data.category == material


@pytest.mark.parametrize("material", MATERIALS)
def test_same_seed_gives_the_same_bytes_and_another_seed_others(material):
    first, again, other = (
        make_textures(2, 2, material=material, image_size=32, random_state=seed) for seed in (3, 3, 4)
    )
    for key in ("X_train", "X_test", "masks_test"):
        assert first[key].tobytes() == again[key].tobytes()
        assert first[key].tobytes() != other[key].tobytes()


@pytest.mark.parametrize(
    ("material", "train", "test"),
    [
        ("weave", 132.28, 145.02),
        ("twill", 125.17, 137.18),
        ("knit", 111.80, 112.02),
        ("mesh", 100.95, 109.44),
        ("metal", 150.34, 146.74),
        ("wood", 160.62, 152.32),
        ("leather", 113.96, 114.51),
        ("granite", 137.06, 139.49),
    ],
)
def test_seed_zero_gives_the_images_that_were_recorded(material, train, test):
    data = make_textures(1, 2, material=material, random_state=0)
    assert data.X_train.mean() == pytest.approx(train, abs=0.02)
    assert data.X_test.mean() == pytest.approx(test, abs=0.02)
    assert data.masks_test.sum() == 116


@pytest.mark.parametrize("material", MATERIALS)
def test_no_two_images_are_alike(material):
    data = make_textures(6, 6, material=material, image_size=32, random_state=0)
    images = [image.tobytes() for image in (*data.X_train, *data.X_test)]
    assert len(set(images)) == 12


def test_smaller_set_is_the_beginning_of_a_larger_one():
    large = make_textures(7, 11, anomaly_fraction=0.3, image_size=32, random_state=5)
    small = make_textures(4, 6, anomaly_fraction=0.3, image_size=32, random_state=5)
    np.testing.assert_array_equal(small.X_train, large.X_train[:4])
    for key in ("X_test", "y_test", "defects_test", "masks_test"):
        np.testing.assert_array_equal(small[key], large[key][:6])


@pytest.mark.parametrize("material", MATERIALS)
def test_defect_changes_its_mask_and_nothing_else(material):
    normal, defective = (
        make_textures(1, 12, material=material, anomaly_fraction=share, random_state=1) for share in (0, 1)
    )
    assert not normal.masks_test.any()
    for before, after, mask in zip(normal.X_test, defective.X_test, defective.masks_test, strict=True):
        changed = before != after
        assert not changed[~mask].any()
        # A few grey levels stay the same by chance, more on the flat ground of a mesh.
        assert changed[mask].mean() > 0.5


@pytest.mark.parametrize("image_size", [32, 48, 200])
@pytest.mark.parametrize("material", ["weave", "leather"])
def test_every_anomalous_image_has_a_mask_at_each_size(material, image_size):
    data = make_textures(1, 30, material=material, anomaly_fraction=1, image_size=image_size, random_state=0)
    shares = data.masks_test.mean(axis=(1, 2))
    assert shares.min() > 0.0005
    assert shares.max() < 0.3


@pytest.mark.parametrize("share", [0, 0.1, 0.29, 1 / 3, 0.5, 1])
@pytest.mark.parametrize("n_test", [1, 7, 100])
def test_anomaly_fraction_is_kept(share, n_test):
    y = make_textures(1, n_test, material="metal", anomaly_fraction=share, image_size=32, random_state=0).y_test
    assert abs(y.sum() - share * n_test) <= 0.5


def test_defects_take_turns_in_the_order_given():
    data = make_textures(1, 5, defects=("stain", "hole"), anomaly_fraction=1, image_size=32, random_state=0)
    assert data.defects_test.tolist() == ["stain", "hole", "stain", "hole", "stain"]
    assert data.defect_names == ["hole", "stain"]


def test_integer_seed_leaves_the_global_generator_alone():
    state = np.random.get_state()[1].copy()
    make_textures(1, 2, image_size=32, random_state=0)
    np.testing.assert_array_equal(state, np.random.get_state()[1])


def test_generator_instance_moves_on():
    rng = np.random.RandomState(0)
    first, second = (make_textures(1, 1, image_size=32, random_state=rng) for _ in range(2))
    assert not np.array_equal(first.X_train, second.X_train)


def test_missing_thread_is_one_thread_wide():
    data = make_textures(1, 8, defects=["thread"], anomaly_fraction=1, random_state=0)
    widths = data.masks_test.sum(axis=2)
    # The pitch of the weave is 9 pixels; cloth that was laid by hand varies.
    assert 7.5 < widths[widths > 0].mean() < 10.5
    assert widths.max() <= 12


def structure(images):
    """Least, mean and largest brightness and edges of blocks, and their spread: what any method could look at."""
    images = images / 255.0
    fields = np.stack([images, *np.abs(np.gradient(images, axis=(1, 2)))], axis=1)
    blocks = fields.reshape(len(images), 3, 16, 8, 16, 8).mean(axis=(3, 5)).reshape(len(images), 3, -1)
    return np.log(np.concatenate([blocks.min(2), blocks.mean(2), blocks.max(2), blocks.std(2)], axis=1))


@pytest.mark.parametrize("material", MATERIALS)
def test_defects_are_found_by_structure_and_not_by_projected_pixels(material):
    data = make_textures(80, 60, material=material, random_state=0)

    def auroc(describe):
        train, test = describe(data.X_train), describe(data.X_test)
        return roc_auc_score(data.y_test, EmpiricalCovariance().fit(train).mahalanobis(test))

    def flat(images):
        return images.reshape(len(images), -1) / 255.0

    projection = GaussianRandomProjection(16, random_state=0).fit(flat(data.X_train))
    components = PCA(16, random_state=0).fit(flat(data.X_train))
    assert auroc(structure) > 0.85
    assert auroc(lambda images: projection.transform(flat(images))) < 0.7
    assert auroc(lambda images: components.transform(flat(images))) < 0.7


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"n_train": 0},
            r"'n_train' parameter of make_textures must be an int in the range \[1, inf\). Got 0",
        ),
        ({"n_test": 2.5}, r"'n_test' parameter .* Got 2.5"),
        ({"material": "silk"}, r"'material' parameter .*'granite'.* Got 'silk'"),
        ({"anomaly_fraction": 1.5}, r"'anomaly_fraction' parameter .* Got 1.5"),
        ({"image_size": 16}, r"'image_size' parameter .*\[32, inf\). Got 16"),
        ({"random_state": "seed"}, r"'random_state' parameter .* Got 'seed'"),
        ({"defects": "hole"}, r"'defects' parameter .* Got 'hole'"),
        (
            {"defects": []},
            r"defects=\[\] must be one or more of those that material='weave' can have: 'scratch', ",
        ),
        ({"defects": ["dent"]}, r"defects=\['dent'\] must be one or more"),
        (
            {"material": "granite", "defects": ["thread"]},
            r"material='granite' can have: 'scratch', .*'wear'\.$",
        ),
    ],
)
def test_wrong_parameters_are_named(parameters, message):
    with pytest.raises(ValueError, match=message):
        make_textures(**parameters)
