"""Output files and folders, each written completely or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_file(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write `data` to `path`; a kill or an error at any moment leaves either the old file or the new one, complete.

    A link stays a link, and the file it points to is written. A file that is replaced keeps its mode, and its owner if
    this process may set it; the mode of a new file follows from the umask. Devices, pipes and open descriptors, such
    as ``/dev/stdout``, cannot be replaced: they are written to directly.

    Parameters
    ----------
    path : str or PathLike
        The file.
    data : bytes or memoryview
        All of its content.

    Raises
    ------
    OSError
        If the file cannot be written. The old file is unchanged.
    """
    check_writable(path)
    descriptor = _descriptor(path)
    if descriptor is not None or is_stream(path):
        # Without O_CREAT, so that a pipe that has just been removed does not become a file.
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
    # The new name is on the disk only after the folder is synced, which not every system allows.
    with suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder whose sub-folders are moved to the folder `path` at the end; after an error, none are.

    They are moved one by one, in order of their names.

    Parameters
    ----------
    path : str or PathLike
        An empty folder, or one that does not exist; its parents are made too.

    Yields
    ------
    Path
        The folder to write to.
    """
    path = Path(path)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    moved: list[Path] = []
    try:
        hidden = Path(tempfile.mkdtemp(prefix=".dfkde-", dir=path))
        try:
            yield hidden
            # Extended one by one, so that after an error `moved` holds what has been moved.
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
    """Raise an OSError if `write_file` would fail, as far as can be checked without writing.

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
    """Return whether `path` is a device, a pipe or an open descriptor: written to directly, never replaced.

    Parameters
    ----------
    path : str or PathLike
        The path; links are followed.

    Returns
    -------
    bool
        False also if nothing exists there.
    """
    path = Path(path)
    return _descriptor(path) is not None or (path.exists() and not path.is_file() and not path.is_dir())


def _descriptor(path: str | os.PathLike[str]) -> int | None:
    """Return the descriptor of this process that `path` names, as /dev/stdout does; None for other paths.

    It may belong to a file, as after ``> FILE`` in a shell. That file must not be replaced: the shell has it open.
    """
    folders = [os.path.realpath(folder) for folder in ("/dev/fd", "/proc/self/fd")]
    name = Path(path).absolute()
    # Linux follows at most 40 links.
    for _ in range(40):
        folder = os.path.realpath(name.parent)
        if folder in folders and name.name.isdecimal():
            return int(name.name)
        if not name.is_symlink():
            break
        name = Path(folder, name.readlink())
    return None


def _write_beside(target: Path, temporary: Path, data: bytes | memoryview) -> None:
    """Write the file `temporary` to the disk, with the mode and the owner of `target`, which it will replace."""
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
            # With a descriptor as src_dir_fd, Python calls linkat, which follows the link in /proc.
            os.link(_in_proc(file.fileno()), temporary, src_dir_fd=file.fileno())


def _new_descriptor(temporary: Path, mode: int) -> int:
    """Open a new file without a name, so that a kill leaves nothing behind; if that fails, one named `temporary`."""
    if hasattr(os, "O_TMPFILE"):
        # Not every filesystem supports it.
        with suppress(OSError):
            descriptor = os.open(temporary.parent, os.O_WRONLY | os.O_TMPFILE, mode)
            if _in_proc(descriptor).exists():
                return descriptor
            os.close(descriptor)
    # Exclusively: it is an error if a file or a link of that name exists.
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)


def _in_proc(descriptor: int) -> Path:
    return Path("/proc/self/fd", str(descriptor))
