"""Images in any accepted form, as a sequence of pictures and as batches of tensors."""

from __future__ import annotations

import glob
import hashlib
import heapq
import io
import os
import stat
import sys
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps

from dfkde_sklearn._inputs import ENCODED, Lazy, lacks_image, unpacked
from dfkde_sklearn._threads import Lock, computed_ahead

# fmt: off
# Pillow's own formats that it decodes without other programs, the usual ones first. Excluded: EPS, for which it runs
# Ghostscript; IPTC, which may contain an EPS; WMF, which only Windows renders; and formats that it recognises but
# cannot decode.
FORMATS = (
    "PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "AVIF", "PPM", "TGA", "BLP", "CUR", "DCX", "DDS", "DIB",
    "FITS", "FLI", "FTEX", "GBR", "ICNS", "ICO", "IM", "IMT", "MCIDAS", "MPO", "MSP", "PCD", "PCX", "PIXAR", "PSD",
    "QOI", "SGI", "SPIDER", "SUN", "XBM", "XPM", "XVTHUMB",
)
# Suffixes of files that commonly lie beside images, of which no warning is needed.
COMPANIONS = frozenset((
    ".cfg", ".csv", ".db", ".html", ".ini", ".ipynb", ".joblib", ".json", ".jsonl", ".log", ".md", ".md5", ".onnx",
    ".parquet", ".pdf", ".pt", ".pth", ".py", ".rst", ".safetensors", ".sha256", ".sqlite3", ".toml", ".tsv", ".txt",
    ".xlsx", ".xml", ".yaml", ".yml",
))
# fmt: on
# Grey, colour, colour with alpha.
CHANNELS = (1, 3, 4)
# The EXIF tag of the orientation, and the first of its values that swap width and height.
_ORIENTATION, _FIRST_ON_ITS_SIDE = 0x0112, 5
# White in images that use all 16 bits.
FULL_RANGE = 65535
# Half a grey level: floats in [0, 1] may leave the range by that much when they are rounded.
ROUNDING = 0.5 / 255
# More threads seldom decode faster: they wait for the disk or for Python's lock.
MAX_THREADS = 8
# Number of file digests that are kept: about 20 MB.
MAX_DIGESTS = 2**16
_digests: OrderedDict[tuple[int, ...], bytes] = OrderedDict()
# Seconds after which another write to a file certainly changes its time of change.
SETTLED = 2.0
# A user's picture may be in a list twice, and PIL reads its file at the first access.
_READING = Lock()

# From the width and height of a picture to the number by which both may be divided at most.
Reduction = Callable[[int, int], float]

ACCEPTED = (
    "Allowed: a list, 1-D array, iterable, or pandas, polars or Arrow column of paths, PIL images, arrays, tensors or"
    " encoded images (bytes); an array or tensor (n, H, W), (n, H, W, C) or (n, C, H, W); a folder or a pattern."
)


class Images(Sequence[Image.Image]):
    """A sequence of pictures, made by :func:`as_images`.

    An item is read at each access and not kept. It is a picture of mode "RGB", 8 bits a channel, turned according to
    its EXIF orientation. Of files with several frames or pages, the first is read. An alpha channel is dropped, as
    timm and ``convert("RGB")`` do, not composited. 16-bit samples are scaled from [0, `white_level`], and
    floating-point samples from [0, 1].

    Parameters
    ----------
    items : list, ndarray, Tensor or Lazy
        The images, by index, as :func:`as_images` checked them; those of `Lazy` are checked when they are read.
    white_level : int, default=65535
        The 16-bit value that becomes 255, as do all above it.
    first : int, default=0
        The number of the first image in messages, where these are a part of others.
    """

    def __init__(
        self, items: list[Any] | np.ndarray | torch.Tensor | Lazy, white_level: int = FULL_RANGE, first: int = 0
    ) -> None:
        self._items = items
        self.white_level = white_level
        self._first = first
        # The maxima of the 16-bit images read so far: a set, as several threads add to it.
        self._brightest: set[int] = set()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        """Return the picture at `index`, as `picture` does."""
        return self.picture(index)

    def picture(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """Return the picture at `index`.

        Parameters
        ----------
        index : int
            Position of the image; negative ones count from the end.
        reduction : callable or None, default=None
            From the width and height of a picture to the number by which both may be divided. The decoder of JPEG then
            does so, which is faster, by 2, 4 or 8 where that divides both without a rest.

        Returns
        -------
        PIL.Image.Image
            Mode "RGB"; does not share memory with the user's image.

        Raises
        ------
        ValueError
            If the image cannot be read, or its values are not those of an image. The message names it.
        FileNotFoundError
            If there is no such file.
        """
        index = range(len(self))[index]
        item, name = self._item(index), self.name(index)
        white = FULL_RANGE
        try:
            if isinstance(item, np.ndarray | torch.Tensor):
                samples: Image.Image | np.ndarray = _as_numpy(item)
            elif isinstance(item, Image.Image):
                with _READING:
                    samples, white = _shown(item)
            else:
                samples, white = _read_file(item, reduction)
            if isinstance(samples, Image.Image):
                return _as_rgb(samples)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: {_missing(item)}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(
                f"{name}: {error} The limit guards against small files that unpack to more than the memory holds. If "
                "you trust the file, raise it: in Python PIL.Image.MAX_IMAGE_PIXELS = NUMBER, on the command line "
                "--max-pixels NUMBER."
            ) from error
        except Image.UnidentifiedImageError as error:
            if not isinstance(item, bytes):
                raise ValueError(f"{name}: {_reason(error)}") from error
            raise ValueError(
                f"{name}: these {len(item)} bytes are not an image that PIL can read. If they are a path: "
                "os.fsdecode(path)."
            ) from error
        except Exception as error:  # PIL's readers raise SyntaxError, IndexError, struct.error, zlib.error...
            raise ValueError(f"{name}: {_reason(error)}") from error
        return _picture_from_array(samples, name, self._white(samples, white))

    def _item(self, index: int) -> Any:
        """Return the item at `index`, bytes for encoded images."""
        item = self._items[index]
        if isinstance(self._items, Lazy):
            _check_item(item, f"images[{self._first + index}]")
        if isinstance(item, io.IOBase):
            with _READING:  # the place in a stream is shared
                item.seek(0)
                return item.read()
        return bytes(item) if isinstance(item, bytes | bytearray | memoryview) else item

    def _white(self, samples: np.ndarray, white: int) -> int:
        """Return the value that becomes 255, given that of the file, and record the maximum of 16-bit samples."""
        if samples.dtype.kind != "f" and samples.dtype != np.uint8 and self.white_level <= white:
            self._brightest.add(int(samples.max()))
        return min(white, self.white_level)

    def warn_of_white_level(self) -> None:
        """Warn if the 16-bit images read so far stay far below the white level, or exceed it."""
        if not self._brightest:
            return
        brightest, white = max(self._brightest), self.white_level
        if brightest > white:
            warnings.warn(
                f"The brightest value of the 16-bit images is {brightest}, and all values above white_level={white} "
                f"become white. To distinguish them: white_level={2 ** brightest.bit_length() - 1}.",
                UserWarning,
                stacklevel=3,
            )
        elif 0 < brightest < (white + 1) / 16:
            warnings.warn(
                f"The brightest value of the 16-bit images is {brightest}, under a sixteenth of white_level={white}: "
                f"{round(brightest * 255 / white) + 1} of 256 grey levels are left. If the camera has "
                f"{brightest.bit_length()} bits: white_level={2 ** brightest.bit_length() - 1}.",
                UserWarning,
                stacklevel=3,
            )

    def name(self, index: int) -> str:
        """Return the name of the image at `index` in messages: its path if it has one.

        Parameters
        ----------
        index : int
            Position of the image.

        Returns
        -------
        str
            The path, or for example "images[3]".
        """
        item = None if isinstance(self._items, Lazy) else self._items[index]
        return os.fspath(item) if isinstance(item, str | os.PathLike) else f"images[{self._first + index}]"

    def items(self, indices: Sequence[int]) -> list[Any] | np.ndarray | torch.Tensor:
        """Return the images at `indices` as the user handed them in, for a detector to read.

        Parameters
        ----------
        indices : sequence of int
            Positions of the images.

        Returns
        -------
        list, ndarray or Tensor
            What `as_images` accepts.
        """
        return _at(self._items, indices)

    def part(self, start: int, stop: int) -> Images:
        """Return the images from `start` to `stop`, under their names.

        Parameters
        ----------
        start, stop : int
            Positions of images; `stop` may lie beyond the last.

        Returns
        -------
        Images
            At least one.
        """
        stop = min(stop, len(self))
        if isinstance(self._items, Lazy):
            fetch = self._items.__getitem__
            items: Any = Lazy(stop - start, lambda i: fetch(start + i))
        else:
            items = self._items[start:stop]
        images = Images(items, self.white_level, self._first + start)
        images._brightest = self._brightest
        return images

    def followed_by(self, items: list[Any], first: int) -> Images:
        """Return the next images of a stream, whose values `warn_of_white_level` counts with those of these images.

        Parameters
        ----------
        items : list
            Images, at least one.
        first : int
            The number of the first of them in messages.

        Returns
        -------
        Images
            They alone, with the white level of these images.
        """
        images = as_images(items, self.white_level, first)
        images._brightest = self._brightest
        return images

    def shape(self, index: int) -> tuple[int, int]:
        """Return the height and width of the image at `index`, of a file from its header.

        Parameters
        ----------
        index : int
            Position of the image.

        Returns
        -------
        tuple (height, width)
            Pixels of the picture that indexing returns.

        Raises
        ------
        ValueError
            If the image cannot be read. The message names it.
        FileNotFoundError
            If there is no such file.
        """
        item = self._item(range(len(self))[index])
        if isinstance(item, str | os.PathLike | bytes):
            try:
                with _opened(item) as picture:
                    width, height = picture.size
                    return (width, height) if _lies_on_its_side(picture) else (height, width)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self.name(index)}: {_missing(item)}") from error
            except Exception as error:  # as in __getitem__
                raise ValueError(f"{self.name(index)}: {_reason(error)}") from error
        decoded = self[index]
        return decoded.height, decoded.width

    def digest(self, index: int) -> bytes:
        """Return the SHA-256 of the image at `index`: of the file's bytes, or else of the pixels.

        Parameters
        ----------
        index : int
            Position of the image.

        Returns
        -------
        bytes
            32 bytes that depend on the content only, not on its place. A picture in a file and the same picture in
            memory have different digests.

        Raises
        ------
        ValueError
            If the image cannot be read. The message names it.
        FileNotFoundError
            If there is no such file.
        """
        item = self._item(range(len(self))[index])
        if isinstance(item, bytes):
            return hashlib.sha256(item).digest()
        if isinstance(item, str | os.PathLike):
            try:
                return _file_digest(item)
            except OSError:
                self[index]  # raises an error that names the image
                raise
        picture = self[index]
        return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()


def _file_digest(path: str | os.PathLike[str]) -> bytes:
    """Return the SHA-256 of a file's bytes.

    Digests are kept, as a search needs them for every candidate and fold. Like git, this recognises an unchanged file
    by its status: the time of its last change is set by the system, not by programs. A file that has just changed is
    read again, since another change within the same tick of the clock would not show. Windows has no such time, so
    there all files are read.
    """
    status = os.stat(path)  # noqa: PTH116 (a str or a path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(_KINDS.get(stat.S_IFMT(status.st_mode)))
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


def as_images(X: Any, white_level: int | None = None, first: int = 0) -> Images:
    """Return images in any accepted form as a sequence of pictures.

    Types, shapes and dtypes are checked; nothing is decoded yet, so a broken file is noticed when it is read.

    Parameters
    ----------
    X : list, tuple, ndarray, Tensor, Series, str, PathLike, bytes, PIL image, data set or iterable
        - a list, tuple, one-dimensional array or pandas / polars Series of paths, of PIL images, or of
          arrays or tensors (H, W), (H, W, C) or (C, H, W), of one size or of several;
        - an array or tensor (n, H, W), (n, H, W, C) or (n, C, H, W), with 1, 3 or 4 channels;
        - a folder: every image file in it and in its sub-folders, sorted by path; see `image_files`;
        - a pattern of paths such as ``"parts/**/*.png"``, sorted by path;
        - encoded images, as the bytes of a file or an open binary file, alone or in any of these lists;
        - a frame of one column, an Arrow array, a column or `Dataset` of Hugging Face, an `ImageFolder` of torchvision,
          or any data set of torch: labels beside images are left out;
        - a generator, a ``DataLoader`` or another iterable of images, of pairs with a label, or of batches;
        - one image file or one PIL image: a sequence of one.

        Arrays and tensors are uint8; or uint16; or floating point in [0, 1].
        A three-dimensional array is always a stack of grey images, never one colour image.
    white_level : int or None, default=None
        The 16-bit value that becomes 255, as do all above it. None is 65535, or the level that X has already.
    first : int, default=0
        The number of the first image in messages, where X is a part of a stream.

    Returns
    -------
    Images
        The pictures, each read at each access.

    Raises
    ------
    TypeError
        If X, or an item of it, is of a type that cannot be an image.
    ValueError
        If X is empty, or the meaning of its axes is ambiguous.
    FileNotFoundError
        If X is a path that does not exist.

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn._images import as_images
    >>> images = as_images(np.zeros((5, 32, 48, 3), np.uint8))
    >>> len(images), images[0].mode, images[0].size
    (5, 'RGB', (48, 32))
    """
    if isinstance(X, Images):
        return X if white_level in (None, X.white_level) else Images(X._items, white_level, X._first)
    X = unpacked(X)
    if isinstance(X, str | os.PathLike):
        _check_path(X, "images")
        items: list[Any] | np.ndarray | torch.Tensor | Lazy = files_at(Path(X))
    elif isinstance(X, Image.Image):
        items = [X]
    elif isinstance(X, torch.Tensor) or (isinstance(X, np.ndarray) and X.dtype.kind not in "OUT"):
        _check_stack(X)
        items = X
    elif isinstance(X, np.ndarray):
        if X.ndim != 1:
            raise ValueError(
                f"images: an array of dtype {X.dtype} with shape {X.shape}. Paths or images need one"
                " dimension: use X.ravel(); pixels need a numeric dtype: use X.astype(np.uint8)."
            )
        items = X.tolist()
    elif isinstance(X, list | tuple):
        items = list(X)
    elif isinstance(X, Lazy):
        items = X
    else:
        raise TypeError(f"images: a {type(X).__name__}. {ACCEPTED}")
    if len(items) == 0:
        raise ValueError("images: 0 images; at least one is needed. An iterator can be used once.")
    if isinstance(items, list):
        for index, item in enumerate(items):
            _check_item(item, f"images[{first + index}]")
    return Images(items, FULL_RANGE if white_level is None else white_level, first)


def unreadable(X: Any) -> dict[int, str]:
    """Return which images cannot be read, and which entries of a list or column are missing.

    Parameters
    ----------
    X : images
        What `as_images` accepts, and has a length; or anything else, of which none is an image.

    Returns
    -------
    dict
        The reasons by position, in order.
    """
    entries = unpacked(X)
    reasons, images = dict[int, str](), dict[int, Images]()
    if isinstance(entries, list | tuple) or (isinstance(entries, np.ndarray) and entries.dtype.kind in "OUT"):
        n_missing = 0
        for i, entry in enumerate(entries):
            if lacks_image(entry):
                n_missing += 1
                reasons[i] = f"images[{i}] is {entry!r}: there is no image."
                continue
            try:
                images[i] = as_images([entry], first=i)
            except (TypeError, ValueError) as error:
                reasons[i] = str(error)
        if not images and n_missing < len(entries):  # such as feature rows
            return {}
    else:
        try:
            whole = as_images(entries)
        except (TypeError, ValueError):
            return {}
        images = {i: whole.part(i, i + 1) for i in range(len(whole))}
    for i, image in images.items():
        try:
            image[0]
        except (ValueError, OSError) as error:
            reasons[i] = str(error)
    return dict(sorted(reasons.items()))


def chosen(X: Any, places: Sequence[int]) -> Any:
    """Return some of the images, as the user handed them in."""
    return _at(unpacked(X), places)


def _at(entries: Any, places: Sequence[int]) -> Any:
    return [entries[i] for i in places] if isinstance(entries, list | tuple | Lazy) else entries[list(places)]


def image_files(folder: str | os.PathLike[str], *, below: bool = True) -> list[str]:
    """Return the paths of the images in a folder, sorted folder by folder.

    Links to folders are followed, and each folder is listed once, however many links lead to it. Hidden files and
    folders (a leading dot) and files without the suffix of an image are left out. Broken links without a suffix or
    with that of an image are listed, and so is anything else with such a suffix: reading them raises an error that
    names them.

    Parameters
    ----------
    folder : str or PathLike
        The folder.
    below : bool, default=True
        Whether to list the folders in it as well.

    Returns
    -------
    list of str
        The paths.

    Warns
    -----
    UserWarning
        If files are left out whose suffix is neither that of an image nor common beside images.

    Raises
    ------
    OSError
        If a folder cannot be read.
    """
    suffixes = image_suffixes()
    images: list[str] = []
    left_out: Counter[str] = Counter()
    # Links last, so that a folder that is also linked to is listed under its own path.
    folders, links, listed = [os.fspath(folder)], list[str](), set[tuple[int, int]]()
    while folders or links:
        current = folders.pop() if folders else heapq.heappop(links)
        status = os.stat(current)  # noqa: PTH116 (a str)
        if (status.st_dev, status.st_ino) in listed:
            continue
        listed.add((status.st_dev, status.st_ino))
        with os.scandir(current) as entries:
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 (ten times as fast as Path's)
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    if not below:
                        continue
                    if entry.is_symlink():
                        heapq.heappush(links, entry.path)
                    else:
                        folders.append(entry.path)
                elif suffix in suffixes or (not suffix and _dangles(entry)):
                    images.append(entry.path)
                elif suffix not in COMPANIONS:
                    left_out[suffix or "without a suffix"] += 1
    if left_out:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in left_out.most_common(5))
        warnings.warn(
            f"{left_out.total()} files in the folder {os.fspath(folder)!r} are left out, as their suffixes are not "
            f"those of images: {kinds}{', ...' if len(left_out) > 5 else ''}. If they are images, convert or rename "
            "them, or pass a list of paths.",
            UserWarning,
            stacklevel=3,
        )
    return sorted(images, key=lambda path: path.split(os.sep))  # noqa: PTH206 (ten times as fast as Path's)


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that are read, in lower case and with their dots."""
    formats = {*_formats(), *FORMATS}
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


def _formats() -> list[str]:
    """Return the formats that are read: `FORMATS`, and those that other packages have added to Pillow."""
    Image.init()
    added = [kind for kind, (factory, _) in Image.OPEN.items() if not str(factory.__module__).startswith("PIL.")]
    return [kind for kind in FORMATS if kind in Image.OPEN] + [kind for kind in added if kind not in FORMATS]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say
        return False


def _dangles(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110 (a str)


def image_batches(
    images: Images,
    transform: Callable[[Image.Image], torch.Tensor],
    batch_size: int,
    *,
    reduction: Reduction | None = None,
    verbose: bool = False,
    description: str = "",
) -> Iterator[torch.Tensor]:
    """Yield the transformed images in batches, in order, read ahead in threads.

    At most two batches and one image per thread are in memory, besides the batch that was yielded.

    Parameters
    ----------
    images : Images
        The pictures.
    transform : callable
        From a picture to a tensor, of the same shape for all.
    batch_size : int
        Number of images in a batch; the last one may be smaller.
    reduction : callable or None, default=None
        By how much the decoder of JPEG may divide pictures, as in `Images.picture`.
    verbose : bool, default=False
        Whether to show a progress bar.
    description : str, default=""
        Label of the progress bar.

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
        picture = images.picture(index, reduction)
        try:
            return transform(picture)
        except Exception as error:
            raise ValueError(
                f"{images.name(index)}: the image of {picture.width} x {picture.height} pixels cannot be"
                f" transformed: {error}"
            ) from error

    # PIL loads its readers at the first file; two threads that do so at once may miss one.
    _formats()
    n_images, n_threads = len(images), min(MAX_THREADS, joblib.cpu_count())
    tensors = computed_ahead(tensor_at, range(n_images), min(n_threads, n_images), batch_size + n_threads)
    # Closed also when an image is broken or the consumer stops early, so that no further image is read.
    with (
        closing(tensors),
        tqdm(total=n_images, desc=description or None, unit="image", disable=not verbose) as progress,
    ):
        while batch := list(islice(tensors, batch_size)):
            yield torch.stack(batch)
            progress.update(len(batch))


def matching_files(pattern: str) -> list[str]:
    """Return the images that a pattern matches, and those in folders that it matches, sorted by path.

    Parameters
    ----------
    pattern : str
        With ``*``, ``?`` and ``[...]``; ``**`` stands for folders at any depth.

    Returns
    -------
    list of str
        The paths of the images.

    Raises
    ------
    ValueError
        If there are none.
    """
    suffixes, found, others = image_suffixes(), list[str](), list[str]()
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):  # noqa: PTH207 (Path's takes no absolute ones)
        if path.is_dir():
            found += image_files(path)
        else:
            (found if path.suffix.lower() in suffixes else others).append(str(path))
    if not found:
        what = f"{len(others)} files, such as {others[0]}, and no image" if others else "nothing"
        raise ValueError(f"{pattern!r} is neither a folder nor a file, and as a pattern it matches {what}.")
    # A folder and its files may both match.
    return list(dict.fromkeys(found))


def files_at(path: Path) -> list[Any]:
    """Return the images in a folder, of a pattern, or in one file."""
    if not os.path.lexists(path) and glob.has_magic(str(path)):
        return matching_files(str(path))
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"images: {str(path)!r} is neither a folder nor a file.")
    files = image_files(path)
    if not files:
        raise ValueError(
            f"images: no image file in the folder {str(path)!r} or below it."
            f" Known suffixes: {', '.join(sorted(image_suffixes()))}; for others pass a list of paths."
        )
    return files


def _check_path(path: str | os.PathLike[str], name: str) -> None:
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"{name}: the path {text!r} is of type bytes. Use os.fsdecode(path).")
    if not text:
        raise ValueError(f"{name}: the path is empty (''). For the current folder use '.'.")


def _check_item(item: Any, name: str) -> None:
    if isinstance(item, str | os.PathLike):
        _check_path(item, name)
        return
    if isinstance(item, (Image.Image, *ENCODED)):
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
            " X[None]; a feature matrix needs no feature extractor: pass it to the detector with features=None."
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
    """Raise a ValueError unless `shape` is that of one image, without ambiguity."""
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
        if X.is_nested:
            raise TypeError(f"{name}: a nested tensor is not an image. Pass X.unbind(), a list of tensors.")
        if X.device.type == "meta":
            raise TypeError(
                f"{name}: a tensor on the device 'meta' has no values. Pass one on a device that has memory."
            )
        allowed = X.dtype.is_floating_point or X.dtype in (torch.uint8, torch.uint16)
    else:
        allowed = X.dtype.kind == "f" or (X.dtype.kind == "u" and X.dtype.itemsize <= 2)
    if X.dtype in (torch.bool, np.bool_):
        raise TypeError(
            f"{name}: a mask of dtype {X.dtype}, not an image. To use it as black and white, pass it as uint8"
            " times 255."
        )
    if not allowed:
        raise TypeError(
            f"{name}: dtype {X.dtype}. Allowed: uint8, uint16 or floating point in [0, 1]."
            " Values of 0 to 255 in another type: convert them to uint8."
        )


def _as_numpy(item: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(item, np.ndarray):
        return item
    item = item.detach().cpu()
    # NumPy has neither bfloat16 nor the 8-bit floating-point types.
    return (item.float() if item.dtype.is_floating_point else item).numpy()


def _picture_from_array(values: np.ndarray, name: str, white: int) -> Image.Image:
    if values.ndim == 3 and values.shape[2] not in CHANNELS:
        values = np.moveaxis(values, 0, 2)
    values = _as_8_bits(values, name, white)
    if values.ndim == 2 or values.shape[2] == 1:
        return Image.fromarray(np.ascontiguousarray(values.reshape(values.shape[:2]))).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(values[..., :3]))


# Files


_KINDS = {
    stat.S_IFDIR: "is a folder. Pass the folder itself instead of a list, or the paths of the files in it.",
    stat.S_IFIFO: "is a named pipe, not a file, and was not opened.",
    stat.S_IFSOCK: "is a socket, not a file.",
    stat.S_IFCHR: "is a device, not a file, and was not opened.",
    stat.S_IFBLK: "is a device, not a file, and was not opened.",
}
# Pillow keeps the upper byte of 16-bit colour. Read in the other byte order, that is the lower byte.
_OTHER_BYTES = {
    f"{channels};16{order}": f"{channels};16{other}"
    for channels in ("RGB", "RGBX", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
} | {"LA;16B": "RGBA"}
_PHOTOMETRIC, _BITS, _PLANAR = 262, 258, 284


class _NotAnImageError(ValueError):
    """A fault of a file, in words that need no introduction."""


def _read_file(
    source: str | os.PathLike[str] | bytes, reduction: Reduction | None = None
) -> tuple[Image.Image | np.ndarray, int]:
    """Return the picture in a file, or its samples if they have more than 8 bits, and the integer that is white."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        status = os.stat(source)  # noqa: PTH116 (a str or a path)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            # Not opened, since a pipe waits for a writer and opening a device may have an effect.
            raise _NotAnImageError(_KINDS.get(stat.S_IFMT(status.st_mode), "is not a file."))
    if not size:
        raise _NotAnImageError("the file is empty (0 bytes).")
    with _opened(source) as picture:
        _check_planes(picture)
        if _rawmode(picture) in _OTHER_BYTES:
            return _wide_colour(source), FULL_RANGE
        if reduction is not None:
            _divide(picture, reduction)
        return _shown(picture, in_place=True)


def _divide(picture: ImageFile.ImageFile, reduction: Reduction) -> None:
    """Have the decoder of JPEG divide a picture; it does nothing to other formats."""
    width, height = picture.size
    most = reduction(height, width) if _lies_on_its_side(picture) else reduction(width, height)
    for divisor in (8, 4, 2):
        # With a rest, the last pixels would be of another size than the others.
        if divisor <= most and width % divisor == height % divisor == 0:
            picture.draft(None, (width // divisor, height // divisor))
            return


def _shown(picture: Image.Image, *, in_place: bool = False) -> tuple[Image.Image | np.ndarray, int]:
    """Return a picture, or its samples if they have more than 8 bits, and the integer that is white."""
    _check_planes(picture)
    tags, mode = _tags(picture), picture.mode
    turned = _turned(picture, in_place=in_place)
    if mode != "F" and not mode.startswith("I"):
        return turned, FULL_RANGE
    # PIL's own conversion does not scale such samples but clips them at 255.
    samples = np.asarray(turned)
    white = 4095 if tags.get(_BITS) == (12,) else FULL_RANGE
    # Pillow inverts WhiteIsZero for 8 bits only. It assumes WhiteIsZero if the tag is missing.
    if picture.format == "TIFF" and tags.get(_PHOTOMETRIC, 0) == 0:
        return (1 if mode == "F" else white) - samples, white
    return samples, white


def _tags(picture: Any) -> Any:
    return picture.tag_v2 if picture.format == "TIFF" else {}


def _check_planes(picture: Image.Image) -> None:
    bits = _tags(picture).get(_BITS, (8,))
    if len(bits) > 1 and max(bits) > 8 and _tags(picture).get(_PLANAR) == 2:
        raise _NotAnImageError(
            f"a TIFF whose channels of {max(bits)} bits lie one after the other (PlanarConfiguration 2), which Pillow"
            " does not read correctly. Save it with interleaved channels, or pass an array."
        )


def _opened(source: str | os.PathLike[str] | bytes) -> ImageFile.ImageFile:
    picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    # Up to twice its limit PIL only warns, which does not name the file.
    if Image.MAX_IMAGE_PIXELS and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        picture.close()
        raise Image.DecompressionBombError(
            f"{picture.width} x {picture.height} pixels, over Pillow's limit of {Image.MAX_IMAGE_PIXELS}."
        )
    return picture


def _lies_on_its_side(picture: Image.Image) -> bool:
    return picture.getexif().get(_ORIENTATION, 1) >= _FIRST_ON_ITS_SIDE


def _turned(picture: Image.Image, *, in_place: bool) -> Image.Image:
    """Return a picture turned by its EXIF orientation, as a copy unless `in_place`; it must have pixels."""
    if not picture.width or not picture.height:
        raise _NotAnImageError(f"an image of {picture.width} x {picture.height} pixels shows nothing.")
    if in_place:
        ImageOps.exif_transpose(picture, in_place=True)
        return picture
    return ImageOps.exif_transpose(picture)


def _rawmode(picture: Any) -> str:
    """Return Pillow's name of the layout of samples in the file; "" if there is none."""
    if not getattr(picture, "tile", None):
        return ""
    arguments = picture.tile[0][3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _wide_colour(source: str | os.PathLike[str] | bytes) -> np.ndarray:
    """Return a file of 16-bit colour as uint16 (H, W, 3), or as (H, W) if it is grey with alpha."""
    with _opened(source) as picture:
        rawmode = _rawmode(picture)
        upper = np.asarray(_turned(picture, in_place=True)).astype(np.uint16)
    with _opened(source) as picture:
        picture.tile = [_with_rawmode(tile, _OTHER_BYTES[rawmode]) for tile in picture.tile]
        lower = np.asarray(_turned(picture, in_place=True))
    if rawmode == "LA;16B":
        # Grey and alpha of two bytes each were read as four channels of one byte.
        return upper[..., 0] << 8 | lower[..., 1]
    return upper[..., :3] << 8 | lower[..., :3]


def _with_rawmode(tile: Any, rawmode: str) -> Any:
    codec, extents, offset, arguments = tile
    arguments = (rawmode, *arguments[1:]) if isinstance(arguments, tuple) else rawmode
    # A tuple until Pillow 11, a named tuple since.
    return getattr(type(tile), "_make", tuple)((codec, extents, offset, arguments))


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "P" and "transparency" in picture.info:
        # Without this detour PIL warns.
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _as_8_bits(values: np.ndarray, name: str, white: int) -> np.ndarray:
    """Scale samples to 0..255: uint16 and wider integers from 0..`white`, floating point from [0, 1]."""
    if values.dtype == np.uint8:
        return values
    floating = values.dtype.kind == "f"
    low, high = values.min().item(), values.max().item()
    margin, most = (ROUNDING, 1) if floating else (0, FULL_RANGE)
    # A NaN fails both comparisons.
    if not (low >= -margin and high <= most + margin):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: NaN or infinite values. Replace them first, for example with np.nan_to_num.")
        if not floating:
            raise ValueError(f"{name}: integers from {low} to {high}. Allowed: 0 to 65535.")
        raise ValueError(
            f"{name}: floating-point values from {low:.6g} to {high:.6g}. Allowed: [0, 1], and {ROUNDING:.3f} on each"
            " side for rounding. Divide 0 to 255 by 255, or pass them as uint8; undo a normalisation by mean and"
            " standard deviation; clip values that resizing has made brighter than white."
        )
    if floating:
        return np.rint(np.clip(values.astype(np.float32, copy=False), 0, 1) * 255).astype(np.uint8)
    return ((np.minimum(values, white).astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _missing(path: Any) -> str:
    if os.path.islink(path):  # noqa: PTH114 (a str or a path)
        return f"a link to {os.readlink(path)!r}, where there is nothing."  # noqa: PTH115
    return "there is no such file."


def _reason(error: Exception) -> str:
    if isinstance(error, _NotAnImageError):
        return str(error)
    if isinstance(error, Image.UnidentifiedImageError):
        return "the file is not an image that PIL can read."
    return f"the image cannot be read: {error}"
