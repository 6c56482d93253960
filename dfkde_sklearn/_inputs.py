"""Containers of images that people have, as what :func:`dfkde_sklearn._images.as_images` reads one by one.

Of all of them only the images are taken: labels beside them are left out, as an outlier detector learns from none.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, IterableDataset, default_collate

# Images of a stream that are in memory at a time, where one pass suffices.
STREAMED = 256
ENCODED = (bytes, bytearray, memoryview, io.IOBase)


class Lazy(Sequence[Any]):
    """Images that are fetched at each access, such as those of a data set that decodes them.

    Parameters
    ----------
    n : int
        Their number.
    fetch : callable
        From a position to an image.
    """

    def __init__(self, n: int, fetch: Callable[[int], Any]) -> None:
        self._n = n
        self._fetch = fetch

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        """Return the image at a position."""
        return self._fetch(range(self._n)[index])


def unpacked(X: Any) -> Any:
    """Return what a container of images holds.

    Parameters
    ----------
    X : object
        A frame of one column, an Arrow array, a data set of Hugging Face or torch, a stream, or what needs no
        unpacking.

    Returns
    -------
    object
        A list, array, tensor, path or `Lazy`, or X itself.

    Raises
    ------
    TypeError
        If a container has several columns, or items that are no images.
    ValueError
        If a folder of torchvision has a transform.
    """
    if isinstance(X, ENCODED):
        return [X]
    if isinstance(X, str | os.PathLike | Image.Image | np.ndarray | torch.Tensor | list | tuple):
        return X
    if hasattr(X, "to_pylist"):  # Arrow arrays, without importing it
        if hasattr(X, "column_names"):
            raise TypeError(_several(X, list(X.column_names), "X.column('path')"))
        return X.to_pylist()
    if hasattr(X, "column_names") and hasattr(X, "features"):
        return _of_hugging_face(X)
    if hasattr(X, "columns") and hasattr(X, "shape"):
        if len(X.columns) != 1:
            raise TypeError(_several(X, list(X.columns), "X['path']"))
        return X[X.columns[0]].to_list()
    if hasattr(X, "to_list"):  # a Series of pandas or polars, without importing either
        return X.to_list()
    if hasattr(X, "samples") and hasattr(X, "loader"):
        return _of_folder(X)
    if is_stream(X):
        return list(stream_items(X))
    if hasattr(X, "__getitem__") and hasattr(X, "__len__") and not isinstance(X, dict | set):
        return Lazy(len(X), lambda i: _image_of(X[i], f"images[{i}]"))
    return X


def is_stream(X: Any) -> bool:
    """Return whether X can only be iterated over, such as a generator or a ``DataLoader`` of torch."""
    if isinstance(X, (str, os.PathLike, dict, set, np.ndarray, torch.Tensor, Image.Image, *ENCODED)):
        return False
    # Sparse matrices can be iterated over, and have a shape.
    is_indexed = hasattr(X, "__getitem__") or hasattr(X, "shape")
    return isinstance(X, IterableDataset) or (isinstance(X, Iterable) and not is_indexed)


def repeatable(X: Any) -> Any:
    """Return X, or a list of its images where it is a stream, which can be read once only."""
    return list(stream_items(X)) if is_stream(X) else X


def stream_items(X: Iterable[Any]) -> Iterator[Any]:
    """Yield the images of a stream.

    Parameters
    ----------
    X : iterable
        Of images; of pairs of an image and a label; or of batches of either: tensors and arrays of four dimensions,
        lists, and what a ``DataLoader`` gives.

    Yields
    ------
    object
        An image each.

    Raises
    ------
    TypeError
        If an item is nothing of this.
    """
    loader = X if isinstance(X, DataLoader) else None
    is_collated = loader is not None and loader.batch_sampler is not None and loader.collate_fn is default_collate
    # torch makes lists of the tuples of a data set.
    is_sample = loader is not None and loader.batch_sampler is None
    for number, item in enumerate(X):
        found = _image_of(item, f"item {number} of the stream", is_collated=is_collated, is_sample=is_sample)
        if isinstance(found, list) or _is_batch(found, is_collated):
            yield from map(_own, found)
        else:
            yield _own(found)


def is_missing(entry: Any) -> bool:
    """Return whether an entry of a list or column stands for nothing: None, NaN, or pandas' NA."""
    try:
        return entry is None or bool(entry != entry)
    except (TypeError, ValueError):  # of pandas.NA no truth is known
        return True


def lacks_image(entry: Any) -> bool:
    """Return whether an entry of a list or column of images is missing, or an empty path."""
    return not isinstance(entry, np.ndarray | torch.Tensor) and (is_missing(entry) or entry == "")


def _own(image: Any) -> Any:
    """Return a copy of an image in memory: a camera may write its next image into the same."""
    if isinstance(image, torch.Tensor):
        return image.clone()
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, io.BytesIO):
        return image.getvalue()
    # A picture that was opened from a file is decoded later.
    is_in_memory = isinstance(image, Image.Image) and not isinstance(image, ImageFile.ImageFile)
    return image.copy() if is_in_memory or isinstance(image, np.ndarray) else image


def _image_of(item: Any, name: str, *, is_collated: bool = False, is_sample: bool = False) -> Any:
    """Return an image, or a batch of images, without its label.

    What a ``DataLoader`` has collated are batches; a sample is one image.
    """
    if isinstance(item, dict):
        images = {key: value for key, value in item.items() if _is_image(value, is_collated)}
        if len(images) != 1:
            raise TypeError(
                f"{name} has {len(images)} images, under the keys {list(images)} of {list(item)}. Give an iterable of "
                "images, for example (row['image'] for row in X)."
            )
        return next(iter(images.values()))
    if not isinstance(item, tuple | list):
        return item
    if _are_images(item, is_collated):
        is_one = is_sample or isinstance(item, tuple) or any(_is_batch(image, is_collated) for image in item)
        if is_one and len(item) > 1:
            raise TypeError(
                f"{name} is a {type(item).__name__} of {len(item)} images, such as an image and its mask. Give the "
                "images alone, for example (image for image, mask in X), and several at once as a list."
            )
        # Of one tensor, a `TensorDataset` makes such tuples, and a `DataLoader` lists of one batch.
        return item[0] if len(item) == 1 else list(item)
    is_of_samples = all(isinstance(one, tuple | list) and one and _is_image(one[0], is_collated) for one in item)
    if item and isinstance(item, list) and is_of_samples and not is_collated:
        return [_image_of(one, name, is_sample=True) for one in item]
    first = item[0] if item else None
    if _is_image(first, is_collated) or (isinstance(first, list | tuple) and _are_images(first, False)):
        return list(first) if isinstance(first, tuple) else first
    raise TypeError(f"{name} is a {type(item).__name__} without images: {item!r:.80}.")


def _are_images(values: Sequence[Any], is_collated: bool) -> bool:
    """Return whether there are images only, and not an image beside its path, which is a label."""
    is_path = [isinstance(value, str | os.PathLike) for value in values]
    are_images = bool(values) and all(_is_image(value, is_collated) for value in values)
    return are_images and (is_path[0] or not any(is_path))


def _is_batch(value: Any, is_collated: bool) -> bool:
    # Of grey images a batch has three dimensions, as one image in colour has.
    return isinstance(value, np.ndarray | torch.Tensor) and value.ndim >= (3 if is_collated else 4)


def _is_image(value: Any, is_collated: bool) -> bool:
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim >= (3 if is_collated else 2)
    return isinstance(value, (str, os.PathLike, Image.Image, *ENCODED))


def _several(X: Any, columns: list[Any], example: str) -> str:
    return (
        f"images: a {type(X).__name__} with columns {columns[:5]}. Pass the column of paths or images instead, for "
        f"example {example}."
    )


def _of_hugging_face(X: Any) -> Lazy:
    """Return the images of a `Dataset` of Hugging Face that has one column of them."""
    names = [name for name in X.column_names if type(X.features[name]).__name__ == "Image"]
    if len(names) != 1:
        raise TypeError(_several(X, list(X.column_names), f"X[{(names or ['image'])[0]!r}]"))
    column = X.select_columns(names)
    return Lazy(len(X), lambda i: column[i][names[0]])


def _of_folder(X: Any) -> list[Any]:
    """Return the paths of torchvision's `ImageFolder`, or of another `DatasetFolder`."""
    if getattr(X, "transform", None) is not None:
        raise ValueError(
            f"images: a {type(X).__name__} with transform={X.transform!r:.80}, which would not be applied: feature "
            "extractors resize and normalise images themselves. Make it without transform."
        )
    return [path for path, _ in X.samples]
