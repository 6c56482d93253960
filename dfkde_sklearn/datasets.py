"""Image sets for anomaly detection: folders in the MVTec layout, and generated textures with defects.

Both give the same keys, so that what runs on one runs on the other.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions, validate_parameter_constraints

from dfkde_sklearn._files import new_folder
from dfkde_sklearn._images import image_files, image_suffixes

__all__ = ["load_mvtec_folder", "make_textures", "read_mask", "write_mvtec_folder"]

Field = NDArray[np.float64]
Mask = NDArray[np.bool_]

_NORMAL = "good"


def load_mvtec_folder(root: str | os.PathLike[str]) -> Bunch:
    """Load the paths, labels and masks of an image folder in the MVTec layout.

    The layout is that of one category of MVTec AD [1]_, which other image sets have taken over::

        root/train/good/*.png                   normal images
        root/test/good/*.png                    more of them
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
            1 = anomalous, 0 = normal: for metrics, beside a score that is high for anomalies. An outlier
            detector's `predict`, and a search that scores one, have the labels `1 - 2 * y_test`.
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
    if not (root / "train" / _NORMAL).is_dir():
        categories = sorted(path.parent.parent.name for path in root.glob(f"*/train/{_NORMAL}"))
        way_out = (
            f"It holds several categories, load one of them: {', '.join(map(repr, categories))}."
            if categories
            else "The MVTec layout is train/good/*, test/good/*, test/<defect>/*, ground_truth/<defect>/*."
        )
        raise FileNotFoundError(f"root={str(root)!r} has no folder train/{_NORMAL}. {way_out}")
    if not (root / "test").is_dir():
        raise FileNotFoundError(
            f"root={str(root)!r} has no folder test. A folder of normal images alone needs no loader: "
            "hand it to the detector as it is."
        )
    train = _files(root / "train" / _NORMAL)
    folders = _folders(root / "test")
    test = [path for folder in folders for path in _files(folder)]
    for folder in (root / "train" / _NORMAL, *(folders or [root / "test"])):
        if not _files(folder):
            raise ValueError(f"{str(folder)!r} holds no image: no file ends in {', '.join(sorted(image_suffixes()))}.")
    mask_of: dict[Path, Path] = {}
    for folder in _folders(root / "ground_truth"):
        mask_of |= _masks_of_images(_files(root / "test" / folder.name), _files(folder))

    defects = np.array([path.parent.name for path in test])
    return Bunch(
        X_train=np.array([str(path) for path in train]),
        y_train=np.zeros(len(train), dtype=np.int64),
        X_test=np.array([str(path) for path in test]),
        y_test=(defects != _NORMAL).astype(np.int64),
        defects_test=defects,
        masks_test=np.array([str(mask_of[path]) if path in mask_of else None for path in test], dtype=object),
        defect_names=[folder.name for folder in folders if folder.name != _NORMAL],
        category=root.resolve().name,
    )


def _files(folder: Path) -> list[Path]:
    """Return the images that lie in a folder, sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return [Path(path) for path in image_files(folder, below=False)]


def _folders(folder: Path) -> list[Path]:
    """Return the folders that lie in a folder, sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    folders = []
    for path in folder.iterdir():
        if path.is_symlink() and not path.suffix and not path.exists():
            raise FileNotFoundError(f"{str(path)!r} is a link to {str(path.readlink())!r}, where there is nothing.")
        if path.is_dir() and not path.name.startswith("."):
            folders.append(path)
    return sorted(folders)


def _masks_of_images(images: Sequence[Path], masks: Sequence[Path]) -> dict[Path, Path]:
    """Return the mask of each image of one defect that has one.

    Raises
    ------
    ValueError
        If a mask belongs to no image or to several, or an image has several masks.
    """
    images_named = defaultdict(list)
    for image in images:
        images_named[image.stem].append(image)
        images_named[f"{image.stem}_mask"].append(image)
    found: dict[Path, Path] = {}
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
        if owners[0] in found:
            raise ValueError(
                f"The image {str(owners[0])!r} has two masks: {str(found[owners[0]])!r} and {str(mask)!r}. "
                "Remove one of them."
            )
        found[owners[0]] = mask
    return found


def read_mask(path: str | os.PathLike[str]) -> Mask:
    """Read the mask of an image: where it is anomalous.

    Parameters
    ----------
    path : str or path-like
        An image without transparency, of any mode and depth. What is brighter than half of its brightest
        pixel is anomalous: right for masks of 0 and 1, of 0 and 255, and for those with smoothed edges.

    Returns
    -------
    ndarray of shape (height, width), dtype bool
        True where the image is anomalous; nowhere if the mask is black.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file cannot be read as an image, or has transparency.

    See Also
    --------
    load_mvtec_folder : Find the masks of a folder.

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
            # Only integers and floats of more than 8 bits would lose something as "L".
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


def make_textures(
    n_train: int = 200,
    n_test: int = 100,
    *,
    material: str = "weave",
    defects: Sequence[str] | None = None,
    anomaly_fraction: float = 0.5,
    image_size: int = 128,
    random_state: int | RandomState | None = None,
) -> Bunch:
    """Generate photographs of a material, some of them with a defect.

    Every image is a new piece of the material: its threads or grains, its position and angle, the light and
    the noise of the camera differ. Defects differ in place, size and contrast, and some are hard to see. An
    anomalous image is a normal one with a defect drawn into it: outside of its mask, it is what it would have
    been with `anomaly_fraction=0`.

    Parameters
    ----------
    n_train : int, default=200
        Number of training images, all normal.
    n_test : int, default=100
        Number of test images.
    material : {"weave", "twill", "knit", "mesh", "metal", "wood", "leather", "granite"}, default="weave"
        What is photographed.
    defects : sequence of str, default=None
        The kinds of defects, which take turns: any of "scratch", "stain", "hole", "wear" (the texture is
        flattened), "distortion" (the texture is pulled aside; not of leather and granite) and "thread" (a
        missing thread or wire; of weave, twill, knit and mesh). None: all that the material can have.
    anomaly_fraction : float, default=0.5
        The share of the test images that have a defect; they are spread evenly.
    image_size : int, default=128
        Height and width in pixels, 32 or more. A larger image shows the same extent in more detail.
    random_state : int, RandomState instance or None, default=None
        Determines the images: the same integer gives the same images, and the first ones of a larger set are
        those of a smaller one.

    Returns
    -------
    Bunch
        A dictionary whose keys are attributes too, those of :func:`load_mvtec_folder`:

        X_train : ndarray of shape (n_train, image_size, image_size), dtype uint8
            Grey-level images.
        y_train : ndarray of shape (n_train,), dtype int64
            Zeros: all of these are normal.
        X_test : ndarray of shape (n_test, image_size, image_size), dtype uint8
            Grey-level images.
        y_test : ndarray of shape (n_test,), dtype int64
            1 = anomalous, 0 = normal: for metrics, beside a score that is high for anomalies. An outlier
            detector's `predict`, and a search that scores one, have the labels `1 - 2 * y_test`.
        defects_test : ndarray of shape (n_test,), dtype str
            The kind of defect of each test image, or "good".
        masks_test : ndarray of shape (n_test, image_size, image_size), dtype bool
            Which pixels the defect covers; none in a normal image.
        defect_names : list of str
            The kinds of defects that occur, sorted.
        category : str
            The material.

    Raises
    ------
    ValueError
        If a parameter is out of range, or `material` or one of `defects` is unknown or they do not go
        together.

    See Also
    --------
    write_mvtec_folder : Write such a set as a folder of image files.

    Examples
    --------
    >>> from dfkde_sklearn.datasets import make_textures
    >>> data = make_textures(n_train=20, n_test=10, material="wood", random_state=0)
    >>> data.X_train.shape, data.X_train.dtype, data.y_test.tolist()
    ((20, 128, 128), dtype('uint8'), [1, 0, 1, 0, 1, 0, 1, 0, 1, 0])
    >>> data.defect_names
    ['distortion', 'hole', 'scratch', 'stain', 'wear']
    """
    validate_parameter_constraints(
        {
            "n_train": [Interval(Integral, 1, None, closed="left")],
            "n_test": [Interval(Integral, 1, None, closed="left")],
            "material": [StrOptions(set(MATERIALS))],
            "defects": [list, tuple, None],
            "anomaly_fraction": [Interval(Real, 0, 1, closed="both")],
            "image_size": [Interval(Integral, 32, None, closed="left")],
            "random_state": ["random_state"],
        },
        {
            "n_train": n_train,
            "n_test": n_test,
            "material": material,
            "defects": defects,
            "anomaly_fraction": anomaly_fraction,
            "image_size": image_size,
            "random_state": random_state,
        },
        caller_name="make_textures",
    )
    possible = MATERIALS[material].defects
    kinds = possible if defects is None else tuple(defects)
    if not kinds or not set(kinds) <= set(possible):
        raise ValueError(
            f"defects={defects!r} must be one or more of those that material={material!r} can have: "
            f"{', '.join(map(repr, possible))}."
        )
    entropy = int(check_random_state(random_state).randint(2**32, dtype=np.uint32))
    X_train = np.empty((n_train, image_size, image_size), dtype=np.uint8)
    for i in range(n_train):
        X_train[i], _ = _picture(material, image_size, (entropy, 0, i), None)

    # Of the first k test images, round(anomaly_fraction * k) are anomalous, whatever n_test is.
    n_before = np.floor(anomaly_fraction * np.arange(n_test + 1) + 0.5).astype(np.int64)
    y_test = np.diff(n_before)
    defects_test = np.where(y_test == 1, np.array(kinds)[n_before[:-1] % len(kinds)], _NORMAL)
    X_test = np.empty((n_test, image_size, image_size), dtype=np.uint8)
    masks_test = np.empty(X_test.shape, dtype=bool)
    for i, kind in enumerate(defects_test):
        X_test[i], masks_test[i] = _picture(
            material, image_size, (entropy, 1, i), None if kind == _NORMAL else str(kind)
        )
    return Bunch(
        X_train=X_train,
        y_train=np.zeros(n_train, dtype=np.int64),
        X_test=X_test,
        y_test=y_test,
        defects_test=defects_test,
        masks_test=masks_test,
        defect_names=sorted({str(kind) for kind in defects_test} - {_NORMAL}),
        category=material,
    )


def write_mvtec_folder(data: Bunch, root: str | os.PathLike[str]) -> Path:
    """Write a set of images, labels and masks as a folder in the MVTec layout.

    Parameters
    ----------
    data : Bunch
        What :func:`make_textures` returns, or uint8 images of your own, grey or RGB, under the keys
        `X_train`, `X_test`, `defects_test` and `masks_test`.
    root : str or path-like
        The folder to write; it must be empty or not there. It is written whole or not at all.

    Returns
    -------
    Path
        `root`, for :func:`load_mvtec_folder`. The images are PNG files, numbered within each folder in the
        order of `data`.

    Raises
    ------
    FileExistsError
        If `root` is a folder with something in it, or a file.
    TypeError
        If the images are not arrays of such images.
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
            f"root={str(root)!r} exists and is no empty folder. Nothing is overwritten: name another."
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
    # "train" comes last of the three: a process that is killed leaves nothing that load_mvtec_folder takes.
    with new_folder(root) as folder:
        _write_images(data.X_train, folder / "train" / _NORMAL)
        for name in np.unique(data.defects_test):
            members = data.defects_test == name
            _write_images(data.X_test[members], folder / "test" / name)
            if name != _NORMAL:
                _write_images(data.masks_test[members], folder / "ground_truth" / name, "_mask")
    return root


def _write_images(images: NDArray[np.uint8] | Mask, folder: Path, ending: str = "") -> None:
    folder.mkdir(parents=True)
    digits = max(3, len(str(len(images) - 1)))
    for i, image in enumerate(images):
        # 8 bits for masks too, as MVTec AD has them.
        grey = image.astype(np.uint8) * 255 if image.dtype == bool else image
        Image.fromarray(grey).save(folder / f"{i:0{digits}}{ending}.png")


# From here on: how textures are drawn. Lengths are in units of 1/128 of the side of the image, so that its
# extent is the same at each size. Albedo is the share of light sent back: 0 is black, 1 is white.
_SIDE = 128.0


class _Surface(NamedTuple):
    """A piece of material, before it is lit and photographed."""

    albedo: Field
    # Of cloth: the albedo where the threads that run down the image are gone, and which of them lies where.
    threads: tuple[Field, NDArray[np.int64]] | None = None


def _picture(
    material: str, size: int, seed: tuple[int, int, int], defect: str | None
) -> tuple[NDArray[np.uint8], Mask]:
    """Return a photograph of a piece of material, and where it has a defect."""
    # A generator for the image and one for its defect: the image depends neither on how many others there are
    # nor on whether it gets a defect.
    rng = RandomState(seed)
    surface = MATERIALS[material].paint(rng, size)
    albedo, mask = surface.albedo, np.zeros((size, size), dtype=bool)
    if defect is not None:
        albedo, mask = _DEFECTS[defect](surface, RandomState((*seed, 1)))
    return _photograph(albedo, rng), mask


def _pixels(size: int) -> tuple[Field, Field]:
    """Return how far right and how far down of the centre each pixel lies, in units."""
    positions = (np.arange(size) + 0.5) * (_SIDE / size) - _SIDE / 2
    down, right = np.meshgrid(positions, positions, indexing="ij")
    return right, down


def _turned(right: Field, down: Field, angle: float) -> tuple[Field, Field]:
    """Return the coordinates along an axis at `angle` radians from the first, and across it."""
    return np.cos(angle) * right + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * right


def _noise(rng: RandomState, size: int, along: float, across: float | None = None, angle: float = 0.0) -> Field:
    """Return Gaussian noise of unit variance, smooth over `along` units one way and `across` the other."""
    frequency = np.fft.fftfreq(size, d=_SIDE / size)
    down, right = np.meshgrid(frequency, frequency, indexing="ij")
    right, down = _turned(right, down, angle)
    across = along if across is None else across
    gain = np.exp(-2 * np.pi**2 * ((right * along) ** 2 + (down * across) ** 2))
    smooth = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * gain).real
    # Its expected variance, not that of the sample: pieces of one material differ in contrast.
    return smooth / np.sqrt(np.mean(gain**2))


def _laid(rng: RandomState, size: int, pitch: tuple[float, float]) -> tuple[Field, Field]:
    """Return coordinates, in repeats of the pattern, on a cloth that was laid down by hand."""
    right, down = _turned(*_pixels(size), np.deg2rad(rng.uniform(-3, 3)))
    scale = rng.uniform(0.97, 1.03, size=2)
    right = right * scale[0] + 0.6 * _noise(rng, size, 25.0)
    down = down * scale[1] + 0.6 * _noise(rng, size, 25.0)
    # A hundred repeats away from zero: the numbers of threads are positive and index the arrays of tones.
    return right / pitch[0] + rng.uniform(100, 102), down / pitch[1] + rng.uniform(100, 102)


def _woven(
    rng: RandomState,
    size: int,
    pitch: float,
    warp_on_top: Callable[[NDArray[np.int64], NDArray[np.int64]], Mask],
    tones: tuple[float, float],
    width: float = 1.0,
    ground: float = 0.08,
) -> _Surface:
    """Weave warp threads, which run down the image, and weft threads; `width` is their share of the pitch."""
    s, t = _laid(rng, size, (pitch, pitch))
    warp, weft = np.floor(s).astype(np.int64), np.floor(t).astype(np.int64)
    s, t = s - warp - 0.5, t - weft - 0.5
    top = warp_on_top(warp, weft)
    warp_profile = np.sqrt(np.clip(1 - (2 * s / width) ** 2, 0, None))
    weft_profile = np.sqrt(np.clip(1 - (2 * t / width) ** 2, 0, None))
    # A thread shines most where it bulges over another one, and dips into the shade beside that.
    warp_shine = np.where(top, 1 - 1.2 * t**2, 0.75)
    weft_shine = np.where(top, 0.75, 1 - 1.2 * s**2)
    warp_tone = tones[0] * rng.normal(1, 0.03, 256)[warp] * (1 + 0.07 * _noise(rng, size, 0.6, 3.0))
    weft_tone = tones[1] * rng.normal(1, 0.03, 256)[weft] * (1 + 0.07 * _noise(rng, size, 3.0, 0.6))
    bare = np.where(weft_profile > 0, weft_tone * (0.45 + 0.55 * weft_profile) * weft_shine, ground)
    warp_albedo = warp_tone * (0.45 + 0.55 * warp_profile) * warp_shine
    warp_seen = (warp_profile > 0) & (top | (weft_profile == 0))
    albedo = np.where(warp_seen, warp_albedo, bare)
    soft = 0.45 * size / _SIDE
    # Without its warp a weft thread hangs free: no bulges, and darker for the missing support.
    free = np.where(weft_profile > 0.5, 0.6 * weft_tone * weft_profile, ground)
    return _Surface(gaussian_filter(albedo, soft), (gaussian_filter(free, soft), warp))


def _weave(rng: RandomState, size: int) -> _Surface:
    return _woven(rng, size, 9.0, lambda warp, weft: (warp + weft) % 2 == 0, (0.75, 0.62))


def _twill(rng: RandomState, size: int) -> _Surface:
    return _woven(rng, size, 5.5, lambda warp, weft: (warp + weft) % 4 < 2, (0.5, 0.8))


def _mesh(rng: RandomState, size: int) -> _Surface:
    return _woven(rng, size, 9.0, lambda warp, weft: (warp + weft) % 2 == 0, (0.8, 0.75), width=0.4, ground=0.12)


def _knit(rng: RandomState, size: int) -> _Surface:
    s, t = _laid(rng, size, (11.0, 8.0))
    wale = np.floor(s).astype(np.int64)
    s = s - wale - 0.5
    # Each stitch is a V: two legs that lean outwards as they rise.
    leg = np.sqrt(np.clip(1 - (4 * np.abs(s) - 1) ** 2, 0, None))
    yarn = np.cos(np.pi * (t + 0.9 * np.abs(s))) ** 2
    tone = 0.78 * rng.normal(1, 0.025, 256)[wale] * (1 + 0.08 * _noise(rng, size, 0.8))
    albedo = tone * (0.15 + 0.85 * np.sqrt(yarn) * leg)
    # A ladder: the yarn lies across as rungs.
    ladder = tone * (0.1 + 0.6 * np.cos(np.pi * t) ** 6)
    soft = 0.5 * size / _SIDE
    return _Surface(gaussian_filter(albedo, soft), (gaussian_filter(ladder, soft), wale))


def _grit(rng: RandomState, size: int) -> Field:
    """Return the grain and the dark specks of a normal surface, without which every defect would stand out."""
    specks = np.clip(np.abs(_noise(rng, size, 1.0)) - 3.0, 0, None)
    return 0.03 * _noise(rng, size, 0.8) - 0.5 * specks


def _metal(rng: RandomState, size: int) -> _Surface:
    angle = np.deg2rad(rng.uniform(-8, 8))
    strokes = np.sum([_noise(rng, size, 12.0 * width, 0.4 * width, angle) for width in (1, 2, 4)], axis=0)
    across = _turned(*_pixels(size), angle)[1]
    sheen = 0.1 * np.cos(2 * np.pi * (across / 150 + rng.uniform()))
    return _Surface(0.58 + 0.05 * strokes + sheen + _grit(rng, size))


def _wood(rng: RandomState, size: int) -> _Surface:
    angle = np.deg2rad(rng.uniform(-8, 8))
    across = _turned(*_pixels(size), angle)[1]
    rings = across / rng.uniform(9, 11) + 0.35 * _noise(rng, size, 60.0, 12.0, angle) + rng.uniform()
    phase = rings % 1
    # Early wood darkens slowly towards the late wood, which ends sharply.
    late = np.where(phase < 0.85, phase / 0.85, (1 - phase) / 0.15) ** 2
    pores = np.clip(_noise(rng, size, 9.0, 0.5, angle) - 1.2, 0, None)
    fibres = _noise(rng, size, 14.0, 0.5, angle)
    return _Surface(0.68 - 0.18 * late - 0.07 * pores + 0.025 * fibres + _grit(rng, size))


def _leather(rng: RandomState, size: int) -> _Surface:
    # Grains are cells around jittered points; creases run where two points are equally near.
    pitch = 7.0
    lattice = np.arange(-_SIDE / 2 - 2 * pitch, _SIDE / 2 + 3 * pitch, pitch)
    points = np.stack(np.meshgrid(lattice, lattice), axis=-1).reshape(-1, 2)
    points = points + rng.uniform(-0.45, 0.45, size=points.shape) * pitch
    right, down = _pixels(size)
    right, down = right + 0.8 * _noise(rng, size, 4.0), down + 0.8 * _noise(rng, size, 4.0)
    distances, nearest = map(np.asarray, cKDTree(points).query(np.stack([right, down], axis=-1), k=2))
    crease = np.exp(-(((distances[..., 1] - distances[..., 0]) / 1.3) ** 2))
    dome = np.clip(1 - distances[..., 0] / pitch, 0, None)
    tone = rng.normal(0, 0.02, len(points))[nearest[..., 0]]
    depth = rng.uniform(0.7, 1.3) + 0.2 * _noise(rng, size, 20.0)
    return _Surface(0.45 + depth * (0.12 * dome - 0.16 * crease) + tone + 0.02 * _noise(rng, size, 0.7))


def _granite(rng: RandomState, size: int) -> _Surface:
    feldspar = 0.05 * np.tanh(2 * _noise(rng, size, 1.5))
    mica = np.clip(2 * (_noise(rng, size, 0.9) - 1.2), 0, 1)
    quartz = np.clip(2 * (_noise(rng, size, 1.2) - 1.2), 0, 1)
    albedo = 0.55 + feldspar + 0.005 * _noise(rng, size, 12.0) + 0.02 * _noise(rng, size, 0.6)
    return _Surface((albedo + 0.12 * quartz * (1 - mica)) * (1 - 0.35 * mica))


def _photograph(albedo: Field, rng: RandomState) -> NDArray[np.uint8]:
    """Light a surface unevenly and expose it: grey levels with the noise of a camera."""
    size = len(albedo)
    along, _ = _turned(*_pixels(size), rng.uniform(0, 2 * np.pi))
    light = rng.uniform(0.95, 1.05) * (1 + rng.uniform(0, 0.1) * along / (_SIDE / 2))
    noise = rng.uniform(0.008, 0.012) * rng.standard_normal(albedo.shape)
    return np.clip(255 * (albedo * light + noise) + 0.5, 0, 255).astype(np.uint8)


def _place(rng: RandomState, size: int) -> tuple[Field, Field]:
    """Return coordinates around a pixel that is not at the border, turned by a random angle."""
    row, column = rng.randint(size // 8, size - size // 8, size=2)
    right, down = _pixels(size)
    return _turned(right - right[row, column], down - down[row, column], rng.uniform(0, 2 * np.pi))


def _blob(rng: RandomState, size: int, radius: float, softness: float) -> Field:
    """Return how much of each pixel a ragged blob covers: 0 to 1, nothing under 0.1."""
    along, across = _place(rng, size)
    stretch = rng.uniform(1, 1.5)
    distance = np.hypot(along / stretch, across * stretch) / radius
    depth = 1 - distance * (1 + 0.2 * _noise(rng, size, radius / 1.5))
    cover = np.clip(depth / softness, 0, 1)
    return np.where(cover < 0.1, 0.0, cover)


def _scratch(surface: _Surface, rng: RandomState) -> tuple[Field, Mask]:
    size = len(surface.albedo)
    along, across = _place(rng, size)
    half_length = rng.uniform(15, 50)
    across = across + rng.uniform(-0.006, 0.006) * along**2
    taper = np.clip(1 - (along / half_length) ** 2, 0, None)
    half_width = rng.uniform(0.8, 1.8) * np.sqrt(taper)
    # Not thinner than a pixel, or a scratch would fall between the pixels of a small image.
    half_width = np.maximum(half_width, 0.75 * _SIDE / size)
    cover = np.clip(2 * (1 - np.abs(across) / half_width), 0, 1) * (taper > 0)
    cover[cover < 0.1] = 0
    contrast = rng.choice([-1, 1]) * rng.uniform(0.2, 0.5)
    return surface.albedo + contrast * cover, cover > 0


def _stain(surface: _Surface, rng: RandomState) -> tuple[Field, Mask]:
    cover = _blob(rng, len(surface.albedo), rng.uniform(10, 22), softness=0.4)
    colour = rng.uniform(*((0.1, 0.3) if rng.uniform() < 0.5 else (0.8, 1.0)))
    opacity = rng.uniform(0.3, 0.65)
    return surface.albedo + opacity * cover * (colour - surface.albedo), cover > 0


def _hole(surface: _Surface, rng: RandomState) -> tuple[Field, Mask]:
    size = len(surface.albedo)
    cover = _blob(rng, size, rng.uniform(4, 9), softness=0.25)
    inside = rng.uniform(0.03, 0.15) + 0.02 * _noise(rng, size, 1.5)
    return surface.albedo + cover * (inside - surface.albedo), cover > 0


def _wear(surface: _Surface, rng: RandomState) -> tuple[Field, Mask]:
    size = len(surface.albedo)
    cover = _blob(rng, size, rng.uniform(14, 26), softness=0.3) * rng.uniform(0.6, 1)
    worn = gaussian_filter(surface.albedo, 5 * size / _SIDE) + rng.uniform(0.02, 0.12)
    return surface.albedo + cover * (worn - surface.albedo), cover > 0


def _distortion(surface: _Surface, rng: RandomState) -> tuple[Field, Mask]:
    size = len(surface.albedo)
    along, across = _place(rng, size)
    # Up or down rather than sideways: wood and metal pulled along their grain look as they did.
    angle = rng.choice([-1, 1]) * rng.uniform(np.pi / 4, 3 * np.pi / 4)
    bump = np.clip(1 - (along**2 + across**2) / rng.uniform(18, 32) ** 2, 0, None) ** 1.5
    shift = rng.uniform(6, 12) * bump * (bump > 0.05)
    pixel = _SIDE / size
    rows, columns = np.indices(surface.albedo.shape)
    sources = [rows + shift * np.sin(angle) / pixel, columns + shift * np.cos(angle) / pixel]
    pulled = map_coordinates(surface.albedo, sources, order=1, mode="reflect")
    return np.where(shift > 0, pulled, surface.albedo), shift > 0


def _missing_thread(surface: _Surface, rng: RandomState) -> tuple[Field, Mask]:
    assert surface.threads is not None
    bare, thread = surface.threads
    size = len(surface.albedo)
    row, column = rng.randint(size // 8, size - size // 8, size=2)
    half_length = rng.uniform(12, 70) * size / _SIDE
    rows = np.arange(size)[:, None]
    mask = (thread == thread[row, column]) & (np.abs(rows - row) <= half_length)
    return np.where(mask, bare, surface.albedo), mask


_DEFECTS: dict[str, Callable[[_Surface, RandomState], tuple[Field, Mask]]] = {
    "scratch": _scratch,
    "stain": _stain,
    "hole": _hole,
    "wear": _wear,
    "distortion": _distortion,
    "thread": _missing_thread,
}


class _Material(NamedTuple):
    paint: Callable[[RandomState, int], _Surface]
    defects: tuple[str, ...]


_ANY = ("scratch", "stain", "hole", "wear")
MATERIALS = {
    "weave": _Material(_weave, (*_ANY, "distortion", "thread")),
    "twill": _Material(_twill, (*_ANY, "distortion", "thread")),
    "knit": _Material(_knit, (*_ANY, "distortion", "thread")),
    "mesh": _Material(_mesh, (*_ANY, "distortion", "thread")),
    "metal": _Material(_metal, (*_ANY, "distortion")),
    "wood": _Material(_wood, (*_ANY, "distortion")),
    "leather": _Material(_leather, _ANY),
    "granite": _Material(_granite, _ANY),
}
