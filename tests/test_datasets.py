from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.random_projection import GaussianRandomProjection
from sklearn.utils import Bunch

from dfkde_sklearn._images import as_images
from dfkde_sklearn.datasets import load_mvtec_folder, make_textures, read_mask, write_mvtec_folder

MATERIALS = ["weave", "twill", "knit", "mesh", "metal", "wood", "leather", "granite"]
FOR_ALL = ["hole", "scratch", "stain", "wear"]


def picture(path, value=0, size=(4, 3), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    """A small folder in the layout, with both ways to name a mask and a defective image without one."""
    root = tmp_path / "tile"
    for name in ("train/good/b.png", "train/good/a.JPG", "test/good/000.png"):
        picture(root / name)
    for name in ("test/crack/000.jpg", "test/crack/001.jpg", "test/bent/000.png", "test/bent/001.png"):
        picture(root / name)
    for name in (
        "ground_truth/crack/000.png",
        "ground_truth/crack/001.png",
        "ground_truth/bent/001_mask.png",
    ):
        picture(root / name, 255)
    return root


# Folders


def test_folder_gives_sorted_paths_labels_and_masks(root):
    data = load_mvtec_folder(root)

    def relative(paths):
        return [path and Path(path).relative_to(root).as_posix() for path in paths]

    assert relative(data.X_train) == ["train/good/a.JPG", "train/good/b.png"]
    assert data.y_train.tolist() == [0, 0]
    assert relative(data.X_test) == [
        "test/bent/000.png",
        "test/bent/001.png",
        "test/crack/000.jpg",
        "test/crack/001.jpg",
        "test/good/000.png",
    ]
    assert data.y_test.tolist() == [1, 1, 1, 1, 0]
    assert data.defects_test.tolist() == ["bent", "bent", "crack", "crack", "good"]
    assert relative(data.masks_test) == [
        None,
        "ground_truth/bent/001_mask.png",
        "ground_truth/crack/000.png",
        "ground_truth/crack/001.png",
        None,
    ]
    assert data.defect_names == ["bent", "crack"]
    assert data.category == "tile"


def test_category_is_the_name_of_a_relative_folder(root, monkeypatch):
    monkeypatch.chdir(root)
    assert load_mvtec_folder(".").category == "tile"


def test_hidden_and_other_files_are_no_images(root):
    (root / "train/good/.a.png").write_bytes(b"")
    (root / "train/good/Thumbs.db").write_bytes(b"")
    (root / "test/.ipynb_checkpoints").mkdir()
    (root / "test/readme.txt").write_text("")
    data = load_mvtec_folder(root)
    assert (len(data.X_train), len(data.X_test)) == (2, 5)


def test_masks_may_be_missing_altogether(root):
    (root / "ground_truth").rename(root / "elsewhere")
    assert load_mvtec_folder(root).masks_test.tolist() == [None] * 5


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root='.*nowhere' is not a folder"):
        load_mvtec_folder(tmp_path / "nowhere")


def test_folder_without_normal_images_is_told_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder train/good\. The MVTec layout is train/good/\*"):
        load_mvtec_folder(tmp_path)


def test_folder_of_categories_lists_them(root):
    with pytest.raises(FileNotFoundError, match=r"several categories, load one of them: 'tile'"):
        load_mvtec_folder(root.parent)


def test_folder_without_test_is_refused(tmp_path):
    picture(tmp_path / "train/good/000.png")
    with pytest.raises(FileNotFoundError, match=r"no folder test\. .* hand it to the detector"):
        load_mvtec_folder(tmp_path)


@pytest.mark.parametrize("folder", ["train/good", "test/good", "test/crack"])
def test_folder_without_an_image_is_named(root, folder):
    for path in (root / folder).iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match=rf"{folder}' holds no image: no file ends in .*\.png"):
        load_mvtec_folder(root)


def test_empty_test_folder_is_named(tmp_path):
    picture(tmp_path / "train/good/000.png")
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"test' holds no image"):
        load_mvtec_folder(tmp_path)


@pytest.mark.parametrize("name", ["crack/007.png", "crack/007_mask.png", "scratch/007.png"])
def test_mask_without_its_image_is_named(root, name):
    picture(root / "ground_truth" / name)
    folder = name.split("/")[0]
    with pytest.raises(ValueError, match=rf"{name}' belongs to no image: test/{folder} has none called '007'"):
        load_mvtec_folder(root)


def test_two_images_of_one_name_make_their_mask_ambiguous(root):
    picture(root / "test/crack/000.png")
    with pytest.raises(ValueError, match=r"000.png' may belong to each of '.*crack/000.jpg', '.*crack/000.png'"):
        load_mvtec_folder(root)


def test_image_called_mask_makes_a_mask_ambiguous(root):
    picture(root / "test/bent/001_mask.png")
    with pytest.raises(ValueError, match=r"001_mask.png' may belong to each of '.*/001.png', '.*/001_mask.png'"):
        load_mvtec_folder(root)


def test_two_masks_of_one_image_are_named(root):
    picture(root / "ground_truth/crack/000_mask.png")
    with pytest.raises(ValueError, match=r"crack/000.jpg' has two masks: '.*/000.png' and '.*/000_mask.png'"):
        load_mvtec_folder(root)


# Masks


@pytest.mark.parametrize(("mode", "value"), [("L", 255), ("L", 1), ("1", 1), ("RGB", (255, 0, 0)), ("I;16", 65535)])
def test_mask_of_any_mode_is_true_where_it_is_bright(tmp_path, mode, value):
    image = Image.new(mode, (5, 4), 0)
    image.putpixel((3, 1), value)
    image.save(tmp_path / "mask.png")
    expected = np.zeros((4, 5), dtype=bool)
    expected[1, 3] = True
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), expected)


def test_palette_mask_is_true_where_it_is_bright(tmp_path):
    image = Image.fromarray(np.eye(3, dtype=np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), np.eye(3, dtype=bool))


def test_smoothed_mask_is_cut_at_half_its_height(tmp_path):
    Image.fromarray(np.array([[0, 60, 127, 128, 255, 200, 3]], dtype=np.uint8)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(str(tmp_path / "mask.png")), [[0, 0, 0, 1, 1, 1, 0]])


def test_black_mask_is_true_nowhere(tmp_path):
    assert not read_mask(picture(tmp_path / "mask.png")).any()


def test_transparent_mask_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mask.png' has transparency \(mode 'RGBA'\).*Save it as a grey image"):
        read_mask(picture(tmp_path / "mask.png", mode="RGBA"))


def test_unreadable_mask_is_named(tmp_path):
    path = picture(tmp_path / "mask.png", size=(64, 64))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"mask.png' cannot be read"):
        read_mask(path)
    path.write_text("no image")
    with pytest.raises(ValueError, match=r"mask.png' cannot be read"):
        read_mask(path)
    with pytest.raises(FileNotFoundError):
        read_mask(tmp_path / "none.png")


# Textures


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


# Textures as folders


def test_written_folder_loads_as_the_same_images_labels_and_masks(tmp_path):
    made = make_textures(3, 9, image_size=32, random_state=0)
    root = write_mvtec_folder(made, tmp_path / "new" / "weave")
    data = load_mvtec_folder(root)

    def pixels(X):
        return np.stack([np.asarray(picture) for picture in as_images(X)])

    order = np.argsort(made.defects_test, kind="stable")
    np.testing.assert_array_equal(pixels(data.X_train), pixels(made.X_train))
    np.testing.assert_array_equal(pixels(data.X_test), pixels(made.X_test[order]))
    for key in ("y_test", "defects_test"):
        np.testing.assert_array_equal(data[key], made[key][order])
    np.testing.assert_array_equal(data.masks_test == None, data.y_test == 0)  # noqa: E711
    for path, mask in zip(data.masks_test, made.masks_test[order], strict=True):
        if path is not None:
            np.testing.assert_array_equal(read_mask(path), mask)
    assert (data.defect_names, data.category) == (made.defect_names, made.category)
    assert set(data) == set(made)


def test_written_masks_are_black_and_white(tmp_path):
    write_mvtec_folder(make_textures(1, 2, image_size=32, random_state=0), tmp_path)
    with Image.open(tmp_path / "ground_truth/scratch/000_mask.png") as image:
        assert image.mode == "L"
        assert set(np.unique(np.asarray(image))) == {0, 255}


def test_names_sort_in_the_order_of_the_images(tmp_path):
    X = np.arange(1002, dtype=np.uint16).astype(np.uint8)[:, None, None] * np.ones((1, 2, 2), dtype=np.uint8)
    data = Bunch(X_train=X, X_test=X[:1], defects_test=np.array(["good"]), masks_test=np.zeros((1, 2, 2), bool))
    paths = load_mvtec_folder(write_mvtec_folder(data, tmp_path)).X_train
    assert [Path(paths[i]).name for i in (0, 1001)] == ["0000.png", "1001.png"]
    assert [np.asarray(Image.open(path))[0, 0] for path in paths[-3:]] == X[-3:, 0, 0].tolist()


def test_colour_images_are_written_too(tmp_path):
    data = make_textures(1, 1, image_size=32, random_state=0)
    data.X_train, data.X_test = (np.stack([X, X // 2, X // 3], axis=-1) for X in (data.X_train, data.X_test))
    root = write_mvtec_folder(data, tmp_path)
    with Image.open(root / "train/good/000.png") as image:
        np.testing.assert_array_equal(np.asarray(image), data.X_train[0])


def test_nothing_is_overwritten(root):
    data = make_textures(1, 1, image_size=32, random_state=0)
    before = sorted(root.rglob("*"))
    for path in (root, root / "train/good/b.png"):
        with pytest.raises(FileExistsError, match=r"exists and is no empty folder\. Nothing is overwritten"):
            write_mvtec_folder(data, path)
    assert sorted(root.rglob("*")) == before


def test_paths_are_not_written(root, tmp_path):
    with pytest.raises(TypeError, match=r"data.X_train must be a uint8 array .* got ndarray of dtype <U"):
        write_mvtec_folder(load_mvtec_folder(root), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
