"""Files that the commands read and write."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from dfkde_sklearn._files import check_writable, is_stream, write_file
from dfkde_sklearn._images import as_images


def image_paths(source: Path) -> list[str]:
    """Return the paths of the images at a file or folder."""
    images = as_images(source)
    return [images.name(i) for i in range(len(images))]


def check_png(path: Path) -> None:
    """Raise a ValueError if a picture under this name would not be taken for a PNG."""
    if path.suffix.lower() != ".png" and not is_stream(path):
        raise ValueError(f"{path}: the picture is a PNG. Give it a name that ends in .png.")


def check_new(path: Path, force: bool) -> None:
    """Raise an OSError if the file cannot be written, or exists without --force; commands ask before the work."""
    check_writable(path)
    if path.exists() and not is_stream(path) and not force:
        raise FileExistsError(f"{path} exists. Name another file, or overwrite it with --force.")


def write_new(path: Path, data: bytes, force: bool) -> None:
    """Write a file whole or not at all; one that has appeared since the check is kept, unless --force is given."""
    check_new(path, force)
    write_file(path, data)


def png(picture: Image.Image) -> bytes:
    """Return the content of a PNG file of a picture."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
