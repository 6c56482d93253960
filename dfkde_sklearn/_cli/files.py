"""Files that the commands write."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dfkde_sklearn._files import check_writable, is_stream, write_file

if TYPE_CHECKING:
    from PIL import Image


def check_png(path: Path) -> None:
    """Raise a ValueError if a picture under this name would not be taken for a PNG."""
    if path.suffix.lower() != ".png" and not is_stream(path):
        raise ValueError(f"{path}: the picture is a PNG. Give it a name that ends in .png.")


def check_new(path: Path, force: bool) -> None:
    """Raise an OSError if the file cannot be written, or exists without --force; commands ask before the work."""
    check_writable(path)
    if path.exists() and not is_stream(path) and not force:
        raise FileExistsError(f"{path} exists. Name another file, or overwrite it with --force.")


def check_distinct(named: Iterable[tuple[str, Path | None]]) -> None:
    """Raise a ValueError if two arguments name the same file; each comes with its name."""
    seen: dict[str, str] = {}
    for argument, path in named:
        if path is None or is_stream(path):
            continue
        first = seen.setdefault(os.path.realpath(path), argument)
        if first != argument:
            raise ValueError(f"{path}: {first} and {argument} name the same file. Name two.")


def write_new(path: Path, data: bytes, force: bool) -> None:
    """Write a file whole or not at all; one that has appeared since the check is kept, unless --force is given."""
    check_new(path, force)
    write_file(path, data)


def png(picture: Image.Image) -> bytes:
    """Return the content of a PNG file of a picture."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
