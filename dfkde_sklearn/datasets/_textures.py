"""Generated photographs of materials, some of them with a defect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions, validate_parameter_constraints

from dfkde_sklearn.datasets._mvtec import NORMAL
from dfkde_sklearn.datasets._surfaces import MATERIALS, SIDE, Field, Mask, Surface, noise, pixels, rotated


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
    anomalous image is a normal one with a defect drawn into it: outside of its mask it is the image of
    `anomaly_fraction=0`.

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
        Determines the images: the same integer gives the same images, and a smaller set is the beginning of a
        larger one.

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
            1 = anomalous, 0 = normal: the labels for metrics of a score that is higher for anomalies. The labels
            of an outlier detector, 1 = normal and -1 = anomalous, are `1 - 2 * y_test`.
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
    defects_test = np.where(y_test == 1, np.array(kinds)[n_before[:-1] % len(kinds)], NORMAL)
    X_test = np.empty((n_test, image_size, image_size), dtype=np.uint8)
    masks_test = np.empty(X_test.shape, dtype=bool)
    for i, kind in enumerate(defects_test):
        X_test[i], masks_test[i] = _picture(
            material, image_size, (entropy, 1, i), None if kind == NORMAL else str(kind)
        )
    return Bunch(
        X_train=X_train,
        y_train=np.zeros(n_train, dtype=np.int64),
        X_test=X_test,
        y_test=y_test,
        defects_test=defects_test,
        masks_test=masks_test,
        defect_names=sorted({str(kind) for kind in defects_test} - {NORMAL}),
        category=material,
    )


def _picture(
    material: str, size: int, seed: tuple[int, int, int], defect: str | None
) -> tuple[NDArray[np.uint8], Mask]:
    """Return a photograph of a piece of material, and the mask of its defect."""
    # The defect has a generator of its own, so that the rest of the image is the same without it.
    rng = RandomState(seed)
    surface = MATERIALS[material].paint(rng, size)
    albedo, mask = surface.albedo, np.zeros((size, size), dtype=bool)
    if defect is not None:
        albedo, mask = _DEFECTS[defect](surface, RandomState((*seed, 1)))
    return _photograph(albedo, rng), mask


def _photograph(albedo: Field, rng: RandomState) -> NDArray[np.uint8]:
    """Return the grey levels of a surface under uneven light, with the noise of a camera."""
    size = len(albedo)
    along, _ = rotated(*pixels(size), rng.uniform(0, 2 * np.pi))
    light = rng.uniform(0.95, 1.05) * (1 + rng.uniform(0, 0.1) * along / (SIDE / 2))
    noise = rng.uniform(0.008, 0.012) * rng.standard_normal(albedo.shape)
    return np.clip(255 * (albedo * light + noise) + 0.5, 0, 255).astype(np.uint8)


def _place(rng: RandomState, size: int) -> tuple[Field, Field]:
    """Return coordinates around a random pixel away from the border, rotated by a random angle."""
    row, column = rng.randint(size // 8, size - size // 8, size=2)
    right, down = pixels(size)
    return rotated(right - right[row, column], down - down[row, column], rng.uniform(0, 2 * np.pi))


def _blob(rng: RandomState, size: int, radius: float, softness: float) -> Field:
    """Return the share of each pixel that a ragged blob covers, in [0, 1]; shares below 0.1 are 0."""
    along, across = _place(rng, size)
    stretch = rng.uniform(1, 1.5)
    distance = np.hypot(along / stretch, across * stretch) / radius
    depth = 1 - distance * (1 + 0.2 * noise(rng, size, radius / 1.5))
    cover = np.clip(depth / softness, 0, 1)
    return np.where(cover < 0.1, 0.0, cover)


def _scratch(surface: Surface, rng: RandomState) -> tuple[Field, Mask]:
    size = len(surface.albedo)
    along, across = _place(rng, size)
    half_length = rng.uniform(15, 50)
    across = across + rng.uniform(-0.006, 0.006) * along**2
    taper = np.clip(1 - (along / half_length) ** 2, 0, None)
    half_width = rng.uniform(0.8, 1.8) * np.sqrt(taper)
    # At least a pixel wide: a thinner scratch would fall between the pixels of a small image.
    half_width = np.maximum(half_width, 0.75 * SIDE / size)
    cover = np.clip(2 * (1 - np.abs(across) / half_width), 0, 1) * (taper > 0)
    cover[cover < 0.1] = 0
    contrast = rng.choice([-1, 1]) * rng.uniform(0.2, 0.5)
    return surface.albedo + contrast * cover, cover > 0


def _stain(surface: Surface, rng: RandomState) -> tuple[Field, Mask]:
    cover = _blob(rng, len(surface.albedo), rng.uniform(10, 22), softness=0.4)
    colour = rng.uniform(*((0.1, 0.3) if rng.uniform() < 0.5 else (0.8, 1.0)))
    opacity = rng.uniform(0.3, 0.65)
    return surface.albedo + opacity * cover * (colour - surface.albedo), cover > 0


def _hole(surface: Surface, rng: RandomState) -> tuple[Field, Mask]:
    size = len(surface.albedo)
    cover = _blob(rng, size, rng.uniform(4, 9), softness=0.25)
    inside = rng.uniform(0.03, 0.15) + 0.02 * noise(rng, size, 1.5)
    return surface.albedo + cover * (inside - surface.albedo), cover > 0


def _wear(surface: Surface, rng: RandomState) -> tuple[Field, Mask]:
    size = len(surface.albedo)
    cover = _blob(rng, size, rng.uniform(14, 26), softness=0.3) * rng.uniform(0.6, 1)
    worn = gaussian_filter(surface.albedo, 5 * size / SIDE) + rng.uniform(0.02, 0.12)
    return surface.albedo + cover * (worn - surface.albedo), cover > 0


def _distortion(surface: Surface, rng: RandomState) -> tuple[Field, Mask]:
    size = len(surface.albedo)
    along, across = _place(rng, size)
    # Up or down rather than sideways: wood and metal that are pulled along their grain look the same.
    angle = rng.choice([-1, 1]) * rng.uniform(np.pi / 4, 3 * np.pi / 4)
    bump = np.clip(1 - (along**2 + across**2) / rng.uniform(18, 32) ** 2, 0, None) ** 1.5
    shift = rng.uniform(6, 12) * bump * (bump > 0.05)
    pixel = SIDE / size
    rows, columns = np.indices(surface.albedo.shape)
    sources = [rows + shift * np.sin(angle) / pixel, columns + shift * np.cos(angle) / pixel]
    pulled = map_coordinates(surface.albedo, sources, order=1, mode="reflect")
    return np.where(shift > 0, pulled, surface.albedo), shift > 0


def _missing_thread(surface: Surface, rng: RandomState) -> tuple[Field, Mask]:
    assert surface.threads is not None
    bare, thread = surface.threads
    size = len(surface.albedo)
    row, column = rng.randint(size // 8, size - size // 8, size=2)
    half_length = rng.uniform(12, 70) * size / SIDE
    rows = np.arange(size)[:, None]
    mask = (thread == thread[row, column]) & (np.abs(rows - row) <= half_length)
    return np.where(mask, bare, surface.albedo), mask


_DEFECTS: dict[str, Callable[[Surface, RandomState], tuple[Field, Mask]]] = {
    "scratch": _scratch,
    "stain": _stain,
    "hole": _hole,
    "wear": _wear,
    "distortion": _distortion,
    "thread": _missing_thread,
}
