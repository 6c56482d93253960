"""The feature cache: features that were computed before are read instead.

Feature extractors use `feature_matrix`, `check_cache` and `numerics`. A row of the cache is a block of columns (a
layer) of one image. Its key is a hash of the image's content and of the block's recipe, which is all else that
determines the values.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image

from dfkde_sklearn._features.cache_stores import FILE_NAME, MEMORY, CacheSize, FolderStore, Row, Store
from dfkde_sklearn._images import Images, Reduction

Cache = bool | str | os.PathLike[str] | None
# From images and the positions of blocks to batches of rows, in the order of the images.
Compute = Callable[[Images, list[int]], Generator[NDArray[np.float32], None, None]]

# Number of images that are looked up at once.
CHUNK = 256


def cache_size(cache: bool | str | os.PathLike[str] = True) -> CacheSize:
    """Return the size of a feature cache.

    Parameters
    ----------
    cache : True, str or PathLike, default=True
        As the parameter `cache` of a feature extractor: True is the memory of this process, else the folder.

    Returns
    -------
    CacheSize
        ``n_rows``, blocks of features (one for each image and layer), and ``n_bytes``.

    Raises
    ------
    FileNotFoundError
        If the folder holds no cache.
    ValueError
        If it holds another program's file, or one of a newer version.

    See Also
    --------
    clear_cache : Empty it.

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import ScatteringFeatures, cache_size, clear_cache
    >>> clear_cache()
    >>> images = np.random.default_rng(0).integers(0, 256, (5, 48, 48), dtype=np.uint8)
    >>> features = ScatteringFeatures(scales=2, orientations=4, image_size=32, cache=True).fit_transform(images)
    >>> cache_size().n_rows
    5
    >>> clear_cache()
    >>> cache_size()
    CacheSize(n_rows=0, n_bytes=0)
    """
    with _existing(cache) as store:
        return store.size()


def clear_cache(cache: bool | str | os.PathLike[str] = True) -> None:
    """Empty a feature cache.

    Other processes may use it at the same time: they compute missing features again.

    Parameters
    ----------
    cache : True, str or PathLike, default=True
        As the parameter `cache` of a feature extractor: True is the memory of this process, else the folder.

    Raises
    ------
    FileNotFoundError
        If the folder holds no cache.
    ValueError
        If it holds another program's file, or one of a newer version.
    OSError
        If the file cannot be written to.

    See Also
    --------
    cache_size : Its size.
    """
    with _existing(cache) as store:
        store.clear()


def check_cache(cache: Cache) -> None:
    """Raise the error that `feature_matrix` would raise, before anything is computed.

    Parameters
    ----------
    cache : bool, str, PathLike or None
        The parameter of a feature extractor.

    Raises
    ------
    ValueError
        If the folder holds another program's file, or a cache of a newer version.
    OSError
        If the folder cannot be made or written to.
    """
    if _is_used(cache):
        with _opened(cache) as store:
            store.get([])


def feature_matrix(
    images: Images,
    widths: Sequence[int],
    recipes: Callable[[], Sequence[str]],
    compute: Compute,
    cache: Cache,
    *,
    is_half: bool = False,
) -> NDArray[np.float32]:
    """Return the features of the images: those in the cache are read, the others computed.

    Parameters
    ----------
    images : Images
        The pictures.
    widths : sequence of int
        Number of columns of each block.
    recipes : callable
        Returns, for each block, all that determines its values except the image. Called only with a cache.
    compute : callable
        ``compute(images, blocks)`` yields batches of rows, float32, the columns of these blocks side by side. It is
        called at most once, for the images and the blocks with anything missing; of equal images for the first only.
    cache : bool, str, PathLike or None
        None or False computes everything; True keeps features in the memory of this process, up to
        `MEMORY_BYTES`; a folder keeps them there.

    is_half : bool, default=False
        Whether the cache keeps features in float16. They are rounded to it when they are computed, too.

    Returns
    -------
    ndarray of shape (n_images, sum of widths), float32
        A row for each image. Each batch is kept as soon as it is computed: an error or a killed process loses one.

    Raises
    ------
    ValueError
        If a file changes while it is read, the cache is another program's or of a newer version, or features are too
        large for float16.
    OSError
        If the cache cannot be made or written to.
    """
    edges = np.cumsum([0, *widths])
    features = np.empty((len(images), edges[-1]), np.float32)
    # Closed at once, not when the traceback of an error is deleted: a user's network has to be given back.
    if not _is_used(cache):
        start = 0
        with closing(compute(images, list(range(len(widths))))) as batches:
            for batch in batches:
                features[start : start + len(batch)] = batch
                start += len(batch)
        return features
    columns = [slice(*pair) for pair in pairwise(edges)]
    dtype_mark = "float16" if is_half else ""
    recipe_digests = [hashlib.sha256((dtype_mark + recipe).encode()).digest() for recipe in recipes()]
    digests = [images.digest(i) for i in range(len(images))]

    def key(i: int, block: int) -> bytes:
        return hashlib.sha256(recipe_digests[block] + digests[i]).digest()

    with _opened(cache) as store:
        # The indices of images that lack a block, equal images together.
        incomplete: dict[bytes, list[int]] = {}
        lacking: set[int] = set()
        for start in range(0, len(images), CHUNK):
            chunk = range(start, min(start + CHUNK, len(images)))
            keys = {(i, block): key(i, block) for i in chunk for block in range(len(widths))}
            found = store.get(set(keys.values()))
            for (i, block), key_of_block in keys.items():
                if key_of_block in found:
                    features[i, columns[block]] = _unpacked(found[key_of_block], widths[block], is_half)
                else:
                    lacking.add(block)
                    equals = incomplete.setdefault(digests[i], [])
                    if i not in equals[-1:]:
                        equals.append(i)
        if not incomplete:
            return features
        chosen, blocks = [equals[0] for equals in incomplete.values()], sorted(lacking)
        inner = np.cumsum([widths[block] for block in blocks])[:-1]
        start = 0
        with closing(compute(_Chosen(images, chosen), blocks)) as batches:
            for batch in batches:
                in_batch = chosen[start : start + len(batch)]
                computed: dict[bytes, Row] = {}
                for i, row in zip(in_batch, batch, strict=True):
                    if images.digest(i) != digests[i]:
                        raise ValueError(
                            f"{images.name(i)} was written to while its features were computed. Run it again: the "
                            "batches before it are in the cache."
                        )
                    parts = np.split(row, inner)
                    if is_half:
                        parts = [_packed(part, images.name(i)) for part in parts]
                    computed.update((key(i, block), part) for block, part in zip(blocks, parts, strict=True))
                # Use what the cache holds now: another process may have been first, and its batch rounded differently.
                kept = computed | dict(store.put(computed))
                for i in in_batch:
                    for block in blocks:
                        row = _unpacked(kept[key(i, block)], widths[block], is_half)
                        features[incomplete[digests[i]], columns[block]] = row
                start += len(batch)
    return features


def numerics(device: torch.device) -> dict[str, Any]:
    """Return what determines the rounding of a feature, for recipes.

    Parameters
    ----------
    device : torch.device
        Where the feature is computed.

    Returns
    -------
    dict
        Versions, the device's kind, and the settings of its arithmetic.
    """
    from dfkde_sklearn import __version__

    cuda = device.type == "cuda"
    return {
        "versions": [__version__, torch.__version__, np.__version__, PIL.__version__],
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": cuda and torch.backends.cudnn.allow_tf32,
        "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None,
    }


def _packed(row: Row, name: str) -> Row:
    """Return a row in float16, two numbers in each float32 of a store."""
    largest = float(np.abs(row).max(initial=0))
    if largest > float(np.finfo(np.float16).max):
        raise ValueError(
            f"{name}: a feature of magnitude {largest:.4g} is too large for cache_dtype='float16', which ends at "
            "65504. Use cache_dtype='float32'."
        )
    half = np.zeros(len(row) + len(row) % 2, np.float16)
    half[: len(row)] = row
    return half.view(np.float32)


def _unpacked(row: Row, width: int, is_half: bool) -> Row:
    """Return a row of a store in float32."""
    return row.view(np.float16)[:width].astype(np.float32) if is_half else row


def _is_used(cache: Cache) -> bool:
    return cache is not None and (isinstance(cache, str | os.PathLike) or bool(cache))


class _Chosen(Images):
    """A selection of images that keeps their names."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self._images, self._indices = images, indices

    def __len__(self) -> int:
        return len(self._indices)

    def picture(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        return self._images.picture(self._indices[index], reduction)

    def name(self, index: int) -> str:
        return self._images.name(self._indices[index])


@contextmanager
def _opened(cache: Cache) -> Iterator[Store]:
    if not isinstance(cache, str | os.PathLike):
        yield MEMORY
        return
    store = FolderStore(Path(cache))
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _existing(cache: Cache) -> Iterator[Store]:
    if not _is_used(cache):
        raise ValueError(f"cache={cache!r} is none: True is the memory of this process; else give a folder.")
    if isinstance(cache, str | os.PathLike) and not Path(cache, FILE_NAME).is_file():
        raise FileNotFoundError(f"cache={os.fspath(cache)!r}: there is no {FILE_NAME} in this folder.")
    with _opened(cache) as store:
        yield store
