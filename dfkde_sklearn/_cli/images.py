"""Images as the commands take them: files, folders, patterns, and lists of files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dfkde_sklearn._cli.arguments import filled

STDIN = "-"
_NOTE = (
    "files, folders of images, quoted patterns such as 'parts/**/*.png', where ** stands for folders at any depth, or "
    "- for names on standard input, one a line; see --files-from and -0 too"
)


def add_images_argument(command: argparse.ArgumentParser, what: str) -> None:
    """Add IMAGES, --files-from and --null; `what` begins the help."""
    images = command.add_argument("images", nargs="+", metavar="IMAGES", help=f"{what}: {_NOTE}")

    class Listing(argparse.Action):
        """An option that says where images are listed, so that none need be named."""

        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
            setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
            images.required = False

    group = command.add_argument_group("lists of images")
    group.add_argument(
        "--files-from",
        action=Listing,
        type=filled,
        metavar="FILE",
        help="take the images that are named in this file, one a line; - is standard input",
    )
    group.add_argument(
        "-0",
        "--null",
        action=Listing,
        nargs=0,
        const=True,
        default=False,
        help="names in a list end with a NUL instead of a line, as find -print0 writes them; without --files-from, the "
        "list is on standard input",
    )


def image_paths(options: argparse.Namespace) -> list[str]:
    """Return the paths of the images that the arguments of `add_images_argument` name, each once.

    With --skip-broken, where a command has it, names in a list may be of files that are no longer there.

    Raises
    ------
    ValueError
        If a folder, a pattern or a list holds none.
    OSError
        If there is no such file.
    """
    return list(dict.fromkeys(_named(options)))


def single_folder(options: argparse.Namespace) -> Path | None:
    """Return the folder, where the images are all of one folder, and else None."""
    sources = options.images or []
    is_listed = options.files_from is not None or options.null
    return Path(sources[0]) if len(sources) == 1 and not is_listed and Path(sources[0]).is_dir() else None


def root_of(options: argparse.Namespace, paths: Sequence[str]) -> Path:
    """Return the folder that the images are in: the one that was named, or else the deepest that holds them all."""
    folder = single_folder(options)
    return folder or Path(os.path.commonpath([Path(path).absolute().parent for path in paths]))


def paths_at(source: str) -> list[str]:
    """Return the paths of the images at a file or folder, or that a pattern matches."""
    from dfkde_sklearn._images import as_images

    images = as_images(source)
    return [images.name(i) for i in range(len(images))]


def described(paths: Sequence[str], groups: Sequence[str] | None) -> str:
    """Return in a few words which images there are, and of how many groups."""
    parts = "" if groups is None else f", of {len(set(groups))} parts"
    return f"{len(paths)} images in {folders_of(paths)}{parts}"


def folders_of(paths: Sequence[str]) -> str:
    """Return how many folders the images are in: folders by accident would go unnoticed."""
    n_folders = len({Path(path).parent for path in paths})
    return f"{n_folders} folder{'s' * (n_folders > 1)}"


def _named(options: argparse.Namespace) -> Iterator[str]:
    sources = options.images or []
    listed = options.files_from
    if options.null and listed is None and STDIN not in sources:
        listed = STDIN
    if listed is not None:
        yield from _in_list(listed, options)
    for source in sources:
        yield from _in_list(STDIN, options) if source == STDIN else paths_at(source)


def _in_list(source: str, options: argparse.Namespace) -> Iterator[str]:
    """Yield the images at the names in a list."""
    where = "standard input" if source == STDIN else source
    data = _standard_input() if source == STDIN else Path(source).read_bytes()
    if options.null:
        names = data.split(b"\0")
    else:
        # Lists of Windows have a byte order mark, and lines that end with a carriage return.
        names = [line.removesuffix(b"\r") for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
        if b"\0" in data:
            raise ValueError(f"{where}: the list has names that end with a NUL, as find -print0 writes: give -0.")
    names = [name for name in names if name]
    if not names:
        raise ValueError(f"{where}: the list names no image.")
    for name in map(os.fsdecode, names):
        try:
            yield from paths_at(name)
        except (ValueError, FileNotFoundError):
            if not getattr(options, "skip_broken", False) or os.path.exists(name):  # noqa: PTH110 (a str)
                raise
            yield name


def _standard_input() -> bytes:
    # None where the process was started without.
    return sys.stdin.buffer.read() if sys.stdin is not None else b""
