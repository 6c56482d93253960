"""Folders in the MVTec layout: loaded as paths, labels and masks, and written."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.utils import Bunch

from dfkde_sklearn._files import new_folder
from dfkde_sklearn._images import image_files, image_suffixes

# The name of the folders of normal images, and the label of these.
NORMAL = "good"


def load_mvtec_folder(root: str | os.PathLike[str]) -> Bunch:
    """Load the paths, labels and masks of an image folder in the MVTec layout.

    The layout is that of one category of MVTec AD [1]_, which other image sets use too::

        root/train/good/*.png                   normal images
        root/test/good/*.png                    normal images
        root/test/<defect>/NAME.png             images with that defect
        root/ground_truth/<defect>/NAME_mask.png, or NAME.png

    Nothing is decoded: the images stay paths until a feature extractor reads them.

    Parameters
    ----------
    root : str or path-like
        The folder of one category. Hidden files, files without the suffix of an image and deeper folders are
        left out.

    Returns
    -------
    Bunch
        A dictionary whose keys are attributes too:

        X_train : ndarray of shape (n_train,), dtype str
            Paths in `train/good`, sorted.
        y_train : ndarray of shape (n_train,), dtype int64
            Zeros: all of these are normal.
        X_test : ndarray of shape (n_test,), dtype str
            Paths in `test`, sorted by folder, then by name.
        y_test : ndarray of shape (n_test,), dtype int64
            1 = anomalous, 0 = normal: the labels for metrics of a score that is higher for anomalies. The labels
            of an outlier detector, 1 = normal and -1 = anomalous, are `1 - 2 * y_test`.
        defects_test : ndarray of shape (n_test,), dtype str
            The folder of each test image: its kind of defect, or "good".
        masks_test : ndarray of shape (n_test,), dtype object
            The path of each mask, to be read by :func:`read_mask`; None where there is none.
        defect_names : list of str
            The kinds of defects, sorted.
        category : str
            The name of the folder.

    Raises
    ------
    FileNotFoundError
        If the folder, its `train/good` or its `test` is missing.
    ValueError
        If `train/good`, `test` or a folder in `test` holds no image, a mask belongs to no image or to
        several, or an image has several masks.

    See Also
    --------
    read_mask : Read one of the masks.
    make_textures : Generate such a set, with nothing to download.

    References
    ----------
    .. [1] P. Bergmann, K. Batzner, M. Fauser, D. Sattlegger and C. Steger, "The MVTec Anomaly Detection
       Dataset", International Journal of Computer Vision 129, 1038-1059, 2021.
       doi:10.1007/s11263-020-01400-4

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from dfkde_sklearn.datasets import load_mvtec_folder, make_textures, write_mvtec_folder
    >>> with TemporaryDirectory() as folder:
    ...     root = write_mvtec_folder(make_textures(4, 4, image_size=32, random_state=0), folder)
    ...     data = load_mvtec_folder(root)
    >>> data.X_train.shape, data.y_test.tolist(), data.defect_names
    ((4,), [0, 0, 1, 1], ['scratch', 'stain'])
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is not a folder.")
    if not (root / "train" / NORMAL).is_dir():
        categories = sorted(path.parent.parent.name for path in root.glob(f"*/train/{NORMAL}"))
        way_out = (
            f"It holds several categories, load one of them: {', '.join(map(repr, categories))}."
            if categories
            else "The MVTec layout is train/good/*, test/good/*, test/<defect>/*, ground_truth/<defect>/*."
        )
        raise FileNotFoundError(f"root={str(root)!r} has no folder train/{NORMAL}. {way_out}")
    if not (root / "test").is_dir():
        raise FileNotFoundError(
            f"root={str(root)!r} has no folder test. A folder of normal images alone needs no loader: "
            "hand it to the detector as it is."
        )
    train = _some_files(root / "train" / NORMAL)
    return Bunch(
        X_train=np.array([str(path) for path in train]),
        y_train=np.zeros(len(train), dtype=np.int64),
        **load_test_folder(root / "test", root / "ground_truth"),
        category=root.resolve().name,
    )


def load_test_folder(root: Path, ground_truth: Path) -> dict[str, Any]:
    """Return the labelled images of `load_mvtec_folder`, in the folders of `root`, and the masks in `ground_truth`."""
    folders = _folders(root)
    test = [path for folder in folders or [root] for path in _some_files(folder)]
    mask_of: dict[Path, Path] = {}
    for folder in _folders(ground_truth):
        mask_of |= _masks_of_images(_files(root / folder.name), _files(folder))
    defects = np.array([path.parent.name for path in test])
    return {
        "X_test": np.array([str(path) for path in test]),
        "y_test": (defects != NORMAL).astype(np.int64),
        "defects_test": defects,
        "masks_test": np.array([str(mask_of[path]) if path in mask_of else None for path in test], dtype=object),
        "defect_names": [folder.name for folder in folders if folder.name != NORMAL],
    }


def read_mask(path: str | os.PathLike[str]) -> NDArray[np.bool_]:
    """Read the mask of an image, which marks its anomalous pixels.

    Parameters
    ----------
    path : str or path-like
        An image without transparency, of any mode and depth. A pixel is anomalous where it is brighter than
        half of the brightest pixel: right for masks of 0 and 1, of 0 and 255, and for those with smoothed edges.

    Returns
    -------
    ndarray of shape (height, width), dtype bool
        True where the image is anomalous; False everywhere if the mask is black.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file cannot be read as an image, or has transparency.

    See Also
    --------
    load_mvtec_folder : The paths of the masks in a folder.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> from dfkde_sklearn.datasets import read_mask
    >>> with TemporaryDirectory() as folder:
    ...     Image.new("L", (3, 2), color=255).save(f"{folder}/000_mask.png")
    ...     read_mask(f"{folder}/000_mask.png")
    array([[ True,  True,  True],
           [ True,  True,  True]])
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            # "L" has 8 bits: other modes of integers and floats would lose some.
            values = np.asarray(image if mode.startswith(("I", "F")) else image.convert("L"))
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (OSError, SyntaxError) as error:
        raise ValueError(f"The mask {os.fspath(path)!r} cannot be read: {error}") from error
    if mode in ("LA", "PA", "RGBA"):
        raise ValueError(
            f"The mask {os.fspath(path)!r} has transparency (mode {mode!r}): its colours and its transparency "
            "may say different things. Save it as a grey image that is white where the image is anomalous."
        )
    return values > values.max() / 2


def write_mvtec_folder(data: Bunch, root: str | os.PathLike[str]) -> Path:
    """Write a set of images, labels and masks as a folder in the MVTec layout.

    Parameters
    ----------
    data : Bunch
        The result of :func:`make_textures`, or uint8 images of your own, grey or RGB, under the keys
        `X_train`, `X_test`, `defects_test` and `masks_test`.
    root : str or path-like
        The folder to write, new or empty. It is written whole or not at all.

    Returns
    -------
    Path
        `root`, for :func:`load_mvtec_folder`. The images are PNG files, numbered within each folder in the
        order of `data`.

    Raises
    ------
    FileExistsError
        If `root` is a file, or a folder that is not empty.
    TypeError
        If the images are not uint8 arrays of grey or RGB images.
    ValueError
        If the name of a defect cannot name a folder.

    See Also
    --------
    load_mvtec_folder : Load such a folder.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from dfkde_sklearn.datasets import make_textures, write_mvtec_folder
    >>> data = make_textures(1, 4, material="mesh", image_size=32, random_state=0)
    >>> with TemporaryDirectory() as folder:
    ...     root = write_mvtec_folder(data, folder)
    ...     for path in sorted(root.rglob("*.png")):
    ...         print(path.relative_to(root).as_posix())
    ground_truth/scratch/000_mask.png
    ground_truth/stain/000_mask.png
    test/good/000.png
    test/good/001.png
    test/scratch/000.png
    test/stain/000.png
    train/good/000.png
    """
    root = Path(root)
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise FileExistsError(
            f"root={str(root)!r} exists and is no empty folder. Nothing is overwritten: name another folder."
        )
    for key in ("X_train", "X_test"):
        images = data[key]
        if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim in (3, 4)):
            raise TypeError(
                f"data.{key} must be a uint8 array of shape (n, height, width) or (n, height, width, 3), "
                f"got {type(images).__name__} of dtype {getattr(images, 'dtype', None)}, shape {np.shape(images)}."
            )
    for name in np.unique(data.defects_test):
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"data.defects_test has {str(name)!r}, which cannot name a folder. Use other names.")
    # Folders appear in order of their names, so "train" comes last of the three: load_mvtec_folder refuses what a
    # process that is killed leaves behind.
    with new_folder(root) as folder:
        _write_images(data.X_train, folder / "train" / NORMAL)
        for name in np.unique(data.defects_test):
            members = data.defects_test == name
            _write_images(data.X_test[members], folder / "test" / name)
            if name != NORMAL:
                _write_images(data.masks_test[members], folder / "ground_truth" / name, "_mask")
    return root


def _write_images(images: NDArray[np.uint8] | NDArray[np.bool_], folder: Path, ending: str = "") -> None:
    folder.mkdir(parents=True)
    digits = max(3, len(str(len(images) - 1)))
    for i, image in enumerate(images):
        # 8 bits for masks too, as MVTec AD has them.
        grey = image.astype(np.uint8) * 255 if image.dtype == bool else image
        Image.fromarray(grey).save(folder / f"{i:0{digits}}{ending}.png")


def _files(folder: Path) -> list[Path]:
    """Return the images directly in a folder, sorted; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    return [Path(path) for path in image_files(folder, below=False)]


def _some_files(folder: Path) -> list[Path]:
    """Return the images directly in a folder, sorted; raise a ValueError if there is none."""
    files = _files(folder)
    if not files:
        raise ValueError(f"{str(folder)!r} holds no image: no file ends in {', '.join(sorted(image_suffixes()))}.")
    return files


def _folders(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, sorted; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    folders = []
    for path in folder.iterdir():
        if path.is_symlink() and not path.suffix and not path.exists():
            raise FileNotFoundError(f"{str(path)!r} is a link to {str(path.readlink())!r}, which does not exist.")
        if path.is_dir() and not path.name.startswith("."):
            folders.append(path)
    return sorted(folders)


def _masks_of_images(images: Sequence[Path], masks: Sequence[Path]) -> dict[Path, Path]:
    """Return the mask of each image of one kind of defect; images without a mask are left out.

    Raises
    ------
    ValueError
        If a mask belongs to no image or to several, or an image has several masks.
    """
    images_named = defaultdict(list)
    for image in images:
        images_named[image.stem].append(image)
        images_named[f"{image.stem}_mask"].append(image)
    mask_of: dict[Path, Path] = {}
    for mask in masks:
        owners = images_named.get(mask.stem, [])
        if not owners:
            raise ValueError(
                f"The mask {str(mask)!r} belongs to no image: test/{mask.parent.name} has none called "
                f"{mask.stem.removesuffix('_mask')!r}. Add the image or remove the mask."
            )
        if len(owners) > 1:
            raise ValueError(
                f"The mask {str(mask)!r} may belong to each of {', '.join(repr(str(path)) for path in owners)}."
                " Rename the images so that only one of them fits."
            )
        if owners[0] in mask_of:
            raise ValueError(
                f"The image {str(owners[0])!r} has two masks: {str(mask_of[owners[0]])!r} and {str(mask)!r}. "
                "Remove one of them."
            )
        mask_of[owners[0]] = mask
    return mask_of
