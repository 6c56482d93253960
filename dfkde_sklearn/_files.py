"""Output files: written whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_file(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write `data` to `path`, so that whatever happens there is the old file or the new one.

    A link stays a link, and the file it points to is written. A file that is replaced keeps its mode, and its owner as
    far as this process may set it; the mode of a new one follows from the umask. Devices, pipes and open descriptors,
    such as ``/dev/stdout``, are written to as they stand.

    Parameters
    ----------
    path : str or PathLike
        The file.
    data : bytes or memoryview
        All of its content.

    Raises
    ------
    OSError
        If the file cannot be written. What was there before is still there.
    """
    check_writable(path)
    descriptor = _descriptor(path)
    if descriptor is not None or is_stream(path):
        # Without O_CREAT, so that a pipe that has gone meanwhile does not become a file.
        opened = os.open(path, os.O_WRONLY) if descriptor is None else os.dup(descriptor)
        with os.fdopen(opened, "wb") as stream:
            stream.write(data)
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".dfkde-{secrets.token_hex(8)}")
    try:
        _write_beside(target, temporary, data)
        temporary.replace(target)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror or error}. What was there before is unchanged", os.fspath(path)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    # The new name is on the disk once the folder is; not every system lets folders be opened or synced.
    with suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Lend an empty folder whose folders appear in the folder `path` at the end, or not at all.

    They appear one by one, in order of their names, each of them whole.

    Parameters
    ----------
    path : str or PathLike
        An empty folder, or one that is made, with its parents.

    Yields
    ------
    Path
        Where to write.
    """
    path = Path(path)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    moved: list[Path] = []
    try:
        hidden = Path(tempfile.mkdtemp(prefix=".dfkde-", dir=path))
        try:
            yield hidden
            # One after the other, so that what has moved is known if one of them fails.
            moved.extend(entry.rename(path / entry.name) for entry in sorted(hidden.iterdir()))
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    except BaseException:
        for entry in moved:
            shutil.rmtree(entry, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                path.rmdir()
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise an OSError where `write_file` could not write, as far as that can be known without trying.

    Parameters
    ----------
    path : str or PathLike
        The file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Name a file.")
    if path.is_block_device():
        raise PermissionError(f"{path} is a disk. Name a file.")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is not yours to write to. Name another file.")
    if is_stream(path):
        return
    folder = (Path(os.path.realpath(path)) if path.is_symlink() else path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {folder}. Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: the folder {folder.absolute()} is not yours to write to.")


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a device, a pipe or an open descriptor, which cannot be replaced, only written to.

    Parameters
    ----------
    path : str or PathLike
        The path; links are followed.

    Returns
    -------
    bool
        False also where there is nothing.
    """
    path = Path(path)
    return _descriptor(path) is not None or (path.exists() and not path.is_file() and not path.is_dir())


def _descriptor(path: str | os.PathLike[str]) -> int | None:
    """Return the descriptor of this process that `path` names, as /dev/stdout does; None for other paths.

    Behind it may be a file, as after ``> FILE`` in a shell: replaced, it would not be the file that the shell shows.
    """
    folders = [os.path.realpath(folder) for folder in ("/dev/fd", "/proc/self/fd")]
    name = Path(path).absolute()
    # As many links as Linux follows.
    for _ in range(40):
        folder = os.path.realpath(name.parent)
        if folder in folders and name.name.isdecimal():
            return int(name.name)
        if not name.is_symlink():
            break
        name = Path(folder, name.readlink())
    return None


def _write_beside(target: Path, temporary: Path, data: bytes | memoryview) -> None:
    """Write the file `temporary`, for the place of `target`, to the disk."""
    try:
        old = target.stat()
    except FileNotFoundError:
        old = None
    with os.fdopen(_new_descriptor(temporary, 0o666 if old is None else old.st_mode & 0o777), "wb") as file:
        if old is not None and os.name == "posix":
            with suppress(PermissionError):
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
            os.fchmod(file.fileno(), old.st_mode & 0o777)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if not os.fstat(file.fileno()).st_nlink:
            # The folder's descriptor makes Python call linkat, which follows the link in /proc.
            os.link(_in_proc(file.fileno()), temporary, src_dir_fd=file.fileno())


def _new_descriptor(temporary: Path, mode: int) -> int:
    """Open a new file that has no name yet, so that a kill leaves nothing behind, or else the name `temporary`."""
    if hasattr(os, "O_TMPFILE"):
        # Not every filesystem can.
        with suppress(OSError):
            descriptor = os.open(temporary.parent, os.O_WRONLY | os.O_TMPFILE, mode)
            if _in_proc(descriptor).exists():
                return descriptor
            os.close(descriptor)
    # Exclusively: a name that somebody else has made, or a link, is an error.
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)


def _in_proc(descriptor: int) -> Path:
    return Path("/proc/self/fd", str(descriptor))
