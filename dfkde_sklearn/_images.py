"""What a user may hand in as images, seen as a sequence of pictures and read as batches of tensors."""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from dfkde_sklearn._threads import Lock, computed_ahead

# fmt: off
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)
# fmt: on
# Grey, colour, colour with alpha.
CHANNELS = (1, 3, 4)
# More threads than this seldom decode faster: they wait for the disk or for Python's lock.
MAX_THREADS = 8
# Digests of files that are known by their status: about 20 MB of them.
MAX_DIGESTS = 2**16
_digests: OrderedDict[tuple[int, ...], bytes] = OrderedDict()
# Seconds after which a file that is written to has another time of change than before.
SETTLED = 2.0
# A picture of the user's may stand in a list twice, and PIL reads its file at the first access.
_READING = Lock()

ACCEPTED = (
    "Allowed: a list, 1-D array or pandas / polars column of paths, PIL images, arrays or tensors;"
    " an array or tensor (n, H, W), (n, H, W, C) or (n, C, H, W); a folder."
)


class Images(Sequence[Image.Image]):
    """What a user handed in, seen as a sequence of pictures; made by :func:`as_images`.

    Every item is read when it is asked for and kept nowhere: a picture of mode "RGB", 8 bits a channel,
    turned as its EXIF orientation says. Of files with several frames or pages, the first is taken. An alpha
    channel is dropped, as timm and ``convert("RGB")`` do, not composited. 16-bit samples are scaled from
    their full range (65535 becomes 255), floating-point samples from [0, 1].

    Parameters
    ----------
    items : list, ndarray or Tensor
        The images, by index, as :func:`as_images` checked them.
    """

    def __init__(self, items: list[Any] | np.ndarray | torch.Tensor) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        """Return the picture at `index`.

        Parameters
        ----------
        index : int
            Position of the image; negative ones count from the end.

        Returns
        -------
        PIL.Image.Image
            Mode "RGB", independent of what the user handed in.

        Raises
        ------
        ValueError
            If the image cannot be read, or its values are not those of an image. The message names it.
        FileNotFoundError
            If there is no such file.
        """
        index = range(len(self))[index]
        item, name = self._items[index], self.name(index)
        if isinstance(item, np.ndarray | torch.Tensor):
            return _picture_from_array(_as_numpy(item), name)
        try:
            if isinstance(item, Image.Image):
                with _READING:
                    picture = ImageOps.exif_transpose(item)
            else:
                picture = _picture_from_file(item)
            if picture.mode != "F" and not picture.mode.startswith("I"):
                return _as_rgb(picture)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: there is no such file.") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"{name}: {error} If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS.") from error
        except Exception as error:  # PIL's readers raise SyntaxError, IndexError, struct.error, zlib.error...
            raise ValueError(f"{name}: {_reason(item, error)}") from error
        # PIL's own conversion clips wide samples at 255 and never scales.
        return _picture_from_array(np.asarray(picture), name)

    def name(self, index: int) -> str:
        """Return what messages call the image at `index`: its path where it has one.

        Parameters
        ----------
        index : int
            Position of the image.

        Returns
        -------
        str
            The path, or for example "images[3]".
        """
        item = self._items[index]
        return os.fspath(item) if isinstance(item, str | os.PathLike) else f"images[{index}]"

    def digest(self, index: int) -> bytes:
        """Return the SHA-256 of what the picture at `index` is read from: the file's bytes, or else its pixels.

        Parameters
        ----------
        index : int
            Position of the image.

        Returns
        -------
        bytes
            32 of them: the same for the same content, wherever it stands; a picture in a file and the same in
            memory have different ones.

        Raises
        ------
        ValueError
            If the image cannot be read. The message names it.
        FileNotFoundError
            If there is no such file.
        """
        item = self._items[range(len(self))[index]]
        if isinstance(item, str | os.PathLike):
            try:
                return _file_digest(item)
            except OSError:
                self[index]  # raises an error that names the image
                raise
        picture = self[index]
        return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()


def _file_digest(path: str | os.PathLike[str]) -> bytes:
    """Return the SHA-256 of a file's bytes; a search asks for it again for every candidate and fold.

    A file that has not been written to is known by its status, as git knows it: the time of its last change is the
    system's, and no program can set it. One that was changed just now is read, since a change in the same tick of the
    clock does not show; and on Windows, which has no such time, all are.
    """
    status = Path(path).stat()
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    known = _digests.get(key)
    if known is not None:
        return known
    with open(path, "rb") as file:  # noqa: PTH123 (a str or a path)
        digest = hashlib.file_digest(file, "sha256").digest()
    if os.name != "nt" and time.time() - status.st_ctime > SETTLED:
        with _READING:
            _digests[key] = digest
            if len(_digests) > MAX_DIGESTS:
                _digests.popitem(last=False)
    return digest


def as_images(X: Any) -> Images:
    """Return what a user handed in as a sequence of pictures.

    Nothing is decoded yet: this checks kinds, shapes and dtypes; a broken file is found when it is read.

    Parameters
    ----------
    X : list, tuple, ndarray, Tensor, Series, str, PathLike or PIL image
        - a list, tuple, one-dimensional array or pandas / polars Series of paths, of PIL images, or of
          arrays or tensors (H, W), (H, W, C) or (C, H, W), of one size or of several;
        - an array or tensor (n, H, W), (n, H, W, C) or (n, C, H, W), with 1, 3 or 4 channels;
        - a folder: every image file in it and in its sub-folders, sorted by path. Hidden files and folders
          (a leading dot) and files without a known image suffix are left out;
        - one image file or one PIL image: a sequence of one.

        Arrays and tensors are uint8; or uint16 over the full range; or floating point in [0, 1].
        A three-dimensional array is always a stack of grey images, never one colour image.

    Returns
    -------
    Images
        The pictures, read one by one when they are asked for.

    Raises
    ------
    TypeError
        If X, or an item of it, is nothing that can be an image.
    ValueError
        If X is empty, or the meaning of its axes is not certain.
    FileNotFoundError
        If X is a path at which there is nothing.

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn._images import as_images
    >>> images = as_images(np.zeros((5, 32, 48, 3), np.uint8))
    >>> len(images), images[0].mode, images[0].size
    (5, 'RGB', (48, 32))
    """
    if isinstance(X, Images):
        return X
    if isinstance(X, str | os.PathLike):
        items: list[Any] | np.ndarray | torch.Tensor = _files_at(Path(X))
    elif isinstance(X, Image.Image):
        items = [X]
    elif isinstance(X, torch.Tensor) or (isinstance(X, np.ndarray) and X.dtype.kind not in "OUT"):
        _check_stack(X)
        items = X
    elif isinstance(X, np.ndarray):
        if X.ndim != 1:
            raise ValueError(
                f"images: an array of dtype {X.dtype} with shape {X.shape}. Paths or images stand in one"
                " dimension: use X.ravel(); pixels need a numeric dtype: use X.astype(np.uint8)."
            )
        items = X.tolist()
    elif hasattr(X, "columns"):
        raise TypeError(
            f"images: a {type(X).__name__} with columns {list(X.columns)[:5]}."
            " Pass the column of paths instead, for example X['path']."
        )
    elif isinstance(X, list | tuple):
        items = list(X)
    elif hasattr(X, "to_list"):  # a Series of pandas or polars, without importing either
        items = X.to_list()
    else:
        raise TypeError(f"images: a {type(X).__name__}. {ACCEPTED}")
    if len(items) == 0:
        raise ValueError("images: 0 images; at least one is needed.")
    if isinstance(items, list):
        for index, item in enumerate(items):
            _check_item(item, f"images[{index}]")
    return Images(items)


def image_batches(
    images: Images,
    transform: Callable[[Image.Image], torch.Tensor],
    batch_size: int,
    *,
    verbose: bool = False,
    description: str = "",
) -> Iterator[torch.Tensor]:
    """Yield the transformed images in batches, in order, read in threads ahead of the consumer.

    At most two batches and one image per thread are held beside the batch that was yielded.

    Parameters
    ----------
    images : Images
        The pictures.
    transform : callable
        Makes a tensor from one picture; of the same shape for all.
    batch_size : int
        Number of images in a batch; the last one may be smaller.
    verbose : bool, default=False
        Whether to show a progress bar.
    description : str, default=""
        What stands before the progress bar.

    Yields
    ------
    Tensor of shape (n, ...)
        The next `batch_size` images.

    Raises
    ------
    ValueError
        If an image cannot be read; the message names it.
    """
    from tqdm import tqdm

    def tensor_at(index: int) -> torch.Tensor:
        picture = images[index]
        try:
            return transform(picture)
        except Exception as error:
            raise ValueError(
                f"{images.name(index)}: the image of {picture.width} x {picture.height} pixels cannot be"
                f" transformed: {error}"
            ) from error

    # PIL finds its readers at the first file; two threads that look at the same moment may miss one.
    Image.init()
    n_images, n_threads = len(images), min(MAX_THREADS, os.cpu_count() or 1)
    tensors = computed_ahead(tensor_at, range(n_images), min(n_threads, n_images), batch_size + n_threads)
    # Closed as well when an image is broken or the consumer stops early: what has not begun never does.
    with (
        closing(tensors),
        tqdm(total=n_images, desc=description or None, unit="image", disable=not verbose) as progress,
    ):
        while batch := list(islice(tensors, batch_size)):
            yield torch.stack(batch)
            progress.update(len(batch))


def _files_at(path: Path) -> list[Any]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"images: {str(path)!r} is neither a folder nor a file.")
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    ]
    if not files:
        raise ValueError(
            f"images: no image file in the folder {str(path)!r} or below it."
            f" Known suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}; for others pass a list of paths."
        )
    return files


def _check_item(item: Any, name: str) -> None:
    if isinstance(item, str | os.PathLike | Image.Image):
        return
    if not isinstance(item, np.ndarray | torch.Tensor):
        raise TypeError(f"{name}: {item!r:.80} of type {type(item).__name__} is not an image. {ACCEPTED}")
    _check_dtype(item, name)
    _check_shape(tuple(item.shape), name)


def _check_stack(X: np.ndarray | torch.Tensor) -> None:
    _check_dtype(X, "images")
    shape = tuple(X.shape)
    if len(shape) == 2:
        raise ValueError(
            f"images: an array of shape {shape} may be a feature matrix or one grey image. For one image pass"
            " X[None]; a feature matrix needs no feature stage: pass it to the detector with features=None."
        )
    if len(shape) == 3 and shape[-1] in CHANNELS:
        raise ValueError(
            f"images: an array of shape {shape} may be one image (H, W, C) or a stack of grey images of width"
            f" {shape[-1]}. For one image pass X[None]; for a stack pass X[..., None]."
        )
    if len(shape) not in (3, 4):
        raise ValueError(f"images: an array of shape {shape}. Allowed: (n, H, W), (n, H, W, C) or (n, C, H, W).")
    if shape[0]:
        _check_shape(shape[1:], "images")


def _check_shape(shape: tuple[int, ...], name: str) -> None:
    """Raise a ValueError unless `shape` is that of one image, in one reading only."""
    if 0 in shape or len(shape) not in (2, 3):
        raise ValueError(f"{name}: shape {shape} is not that of an image. Allowed: (H, W), (H, W, C) or (C, H, W).")
    if len(shape) == 2:
        return
    first, last = shape[0] in CHANNELS, shape[2] in CHANNELS
    if first and last:
        raise ValueError(
            f"{name}: an image of shape {shape} may be (C, H, W) or (H, W, C)."
            " Pass a list of PIL images, for example [PIL.Image.fromarray(image) for image in X]."
        )
    if not (first or last):
        raise ValueError(
            f"{name}: an image of shape {shape} has no axis of 1, 3 or 4 channels, neither first (C, H, W)"
            " nor last (H, W, C)."
        )


def _check_dtype(X: np.ndarray | torch.Tensor, name: str) -> None:
    if isinstance(X, torch.Tensor):
        if X.layout != torch.strided:
            raise TypeError(f"{name}: a sparse tensor is not an image. Pass X.to_dense().")
        allowed = X.dtype.is_floating_point or X.dtype in (torch.uint8, torch.uint16)
    else:
        allowed = X.dtype.kind == "f" or (X.dtype.kind == "u" and X.dtype.itemsize <= 2)
    if X.dtype in (torch.bool, np.bool_):
        raise TypeError(
            f"{name}: a mask of dtype {X.dtype}, not an image. To see it as black and white, pass it as uint8"
            " times 255."
        )
    if not allowed:
        raise TypeError(
            f"{name}: dtype {X.dtype}. Allowed: uint8, uint16 (full range) or floating point in [0, 1]."
            " Values of 0 to 255 in another type: convert them to uint8."
        )


def _as_numpy(item: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(item, np.ndarray):
        return item
    item = item.detach().cpu()
    # NumPy has neither bfloat16 nor the 8-bit floating-point types.
    return (item.float() if item.dtype.is_floating_point else item).numpy()


def _picture_from_array(values: np.ndarray, name: str) -> Image.Image:
    if values.ndim == 3 and values.shape[2] not in CHANNELS:
        values = np.moveaxis(values, 0, 2)
    values = _as_8_bits(values, name)
    if values.ndim == 2 or values.shape[2] == 1:
        return Image.fromarray(np.ascontiguousarray(values.reshape(values.shape[:2]))).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(values[..., :3]))


def _picture_from_file(path: str | os.PathLike[str]) -> Image.Image:
    with Image.open(path) as picture:
        # PIL only warns up to twice its limit, and a warning neither stops a run nor names the file.
        if Image.MAX_IMAGE_PIXELS and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(
                f"{picture.width} x {picture.height} pixels, over PIL's limit of {Image.MAX_IMAGE_PIXELS}."
            )
        ImageOps.exif_transpose(picture, in_place=True)
        return picture


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "P" and "transparency" in picture.info:
        # The detour that PIL's warning asks for.
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _as_8_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Scale samples to 0..255: uint16 and wider integers from 0..65535, floating point from [0, 1]."""
    if values.dtype == np.uint8:
        return values
    floating = values.dtype.kind == "f"
    low, high = values.min(), values.max()
    # A NaN fails both comparisons.
    if not (low >= 0 and high <= (1 if floating else 65535)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: NaN or infinite values. Replace them first, for example with np.nan_to_num.")
        if not floating:
            raise ValueError(f"{name}: integers from {low} to {high}. Allowed: 0 to 65535.")
        raise ValueError(
            f"{name}: floating-point values from {low:.6g} to {high:.6g}. Allowed: [0, 1]. Divide 0 to"
            " 255 by 255, or pass them as uint8; undo a normalisation by mean and standard deviation."
        )
    if floating:
        return np.rint(values.astype(np.float32, copy=False) * 255).astype(np.uint8)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _reason(item: Any, error: Exception) -> str:
    if isinstance(item, Image.Image):
        return f"the image cannot be read: {error}"
    if Path(item).is_dir():
        return "is a folder. Pass the folder itself instead of a list, or the paths of the files in it."
    if Path(item).stat().st_size == 0:
        return "the file is empty (0 bytes)."
    if isinstance(error, Image.UnidentifiedImageError):
        return "the file is not an image that PIL can read."
    return f"the image cannot be read: {error}"
