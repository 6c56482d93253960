"""Folders in the MVTec layout: what is loaded, what is written, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.utils import Bunch

from dfkde_sklearn import datasets
from dfkde_sklearn._images import as_images
from dfkde_sklearn.datasets import load_mvtec_folder, make_textures, read_mask, write_mvtec_folder


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


# Written folders


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


@pytest.mark.parametrize("name", datasets.__all__)
def test_functions_state_their_public_path(name):
    function = getattr(datasets, name)
    assert (function.__module__, function.__qualname__) == ("dfkde_sklearn.datasets", name)
