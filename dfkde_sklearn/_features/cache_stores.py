"""Where the feature cache keeps rows: in the memory of this process, or in an SQLite file in a folder."""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dfkde_sklearn._threads import Lock

Answer = TypeVar("Answer")
Row = NDArray[np.float32]
Rows = Mapping[bytes, Row]

# Maximum size of the cache in memory, for all extractors of a process; the least recently read rows go first.
MEMORY_BYTES = 2**30
# Size of a dictionary entry, its key and the array's header.
ENTRY_BYTES = 300

FILE_NAME = "features.sqlite3"
# "DFKD" in ASCII: marks files of this package.
APPLICATION = 0x44464B44
FORMAT = 1
# Seconds to wait for other processes before going on without the cache.
PATIENCE = 10.0
# Keys in a query, whose number SQLite limits.
CHUNK = 256


class CacheSize(NamedTuple):
    """What is in a cache.

    Parameters
    ----------
    n_rows : int
        Blocks of features: one for each image and layer.
    n_bytes : int
        Bytes in memory, or of the files.
    """

    n_rows: int
    n_bytes: int


class Store(Protocol):
    """Rows by key. The first row under a key stays until the store is cleared or, in memory, is full."""

    def get(self, keys: Collection[bytes]) -> Rows:
        """Return the rows of those keys that are present."""

    def put(self, rows: Rows) -> Rows:
        """Keep the rows of new keys, and return the rows that are now under these keys."""

    def size(self) -> CacheSize: ...

    def clear(self) -> None: ...


class MemoryStore:
    """Rows in the memory of this process, the most recently read last."""

    def __init__(self) -> None:
        self._rows: OrderedDict[bytes, Row] = OrderedDict()
        self._n_bytes = 0
        self._lock = Lock()

    def get(self, keys: Collection[bytes]) -> Rows:
        with self._lock:
            found = {key: self._rows[key] for key in keys if key in self._rows}
            for key in found:
                self._rows.move_to_end(key)
            return found

    def put(self, rows: Rows) -> Rows:
        with self._lock:
            for key, row in rows.items():
                if key not in self._rows:
                    # A copy, since the row is a view and would keep its whole batch in memory.
                    self._rows[key] = row.copy()
                    self._n_bytes += row.nbytes + ENTRY_BYTES
            kept = {key: self._rows[key] for key in rows}
            while self._n_bytes > MEMORY_BYTES:
                self._n_bytes -= self._rows.popitem(last=False)[1].nbytes + ENTRY_BYTES
            return kept

    def size(self) -> CacheSize:
        with self._lock:
            return CacheSize(len(self._rows), self._n_bytes)

    def clear(self) -> None:
        with self._lock:
            self._rows.clear()
            self._n_bytes = 0


MEMORY = MemoryStore()


class FolderStore:
    """Rows in an SQLite file in a folder, for any number of processes of one machine.

    Each row has a checksum. If the file cannot be read or written, a warning says so and features are computed: damage
    to the file never makes a result wrong or unavailable.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE_NAME
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._usable = True
        _check_writable(folder, self._file)

    def get(self, keys: Collection[bytes]) -> Rows:
        return self._query(lambda connection: self._read(connection, list(keys)), {})

    def put(self, rows: Rows) -> Rows:
        def write(connection: sqlite3.Connection) -> Rows:
            with _transaction(connection):
                sealed = [(key, _sealed(key, row)) for key, row in rows.items()]
                connection.executemany("INSERT OR IGNORE INTO features VALUES (?, ?)", sealed)
            return self._read(connection, list(rows))

        return self._query(write, {})

    def size(self) -> CacheSize:
        def count(connection: sqlite3.Connection) -> int:
            return int(connection.execute("SELECT count(*) FROM features").fetchone()[0])

        n_rows = self._query(count, 0)
        files = [self._file, *self._beside()]
        return CacheSize(n_rows, sum(file.stat().st_size for file in files if file.exists()))

    def clear(self) -> None:
        try:
            self._connection = self._connected()
            self._connection.execute("DELETE FROM features")
            # Without this the file keeps its size.
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            self.close()
            if _is_damage(error):
                self._set_aside(error)
            elif _primary_code(error) in _NO_SPACE and self._has_our_header():
                # SQLite has to write even to delete rows. Other processes go on with the file that they have open.
                self._remove()
            else:
                raise OSError(
                    f"{self._file} cannot be emptied: {error}. Where no process uses it, delete the folder."
                ) from error
            # Make the new, empty file.
            self.get([])

    def close(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _query(self, question: Callable[[sqlite3.Connection], Answer], default: Answer) -> Answer:
        """Return the answer of the file; if it cannot be used, warn and return `default`."""
        if not self._usable:
            return default
        try:
            if self._connection is None:
                self._connection = self._connected()
            return question(self._connection)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            self.close()
            if _is_damage(error):
                self._set_aside(error)
            else:
                self._give_up(error)
            return default

    def _connected(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, timeout=PATIENCE, isolation_level=None)
        # A damaged row may claim to be text that does not decode.
        connection.text_factory = bytes
        try:
            self._identity = _identity(self._file)
            # In one transaction, since another process may be creating the file.
            connection.execute("BEGIN")
            application, version, n_tables = (
                int(connection.execute(query).fetchone()[0])
                for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
            )
            connection.execute("COMMIT")
            if application != APPLICATION and (application or n_tables):
                raise ValueError(
                    f"cache: {self._file} is an SQLite file of another program. Give another folder, or move the file."
                )
            if version > FORMAT:
                raise ValueError(
                    f"cache: {self._file} is of a newer version (its format is {version}, and this is dfkde-sklearn "
                    f"with format {FORMAT}). Update dfkde-sklearn, or give another folder."
                )
            try:
                # Readers and a writer then do not wait for each other.
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                # Another process is switching; the next connection will benefit.
                if _primary_code(error) != sqlite3.SQLITE_BUSY:
                    raise
            connection.execute("PRAGMA synchronous = NORMAL")
            if not n_tables:
                with _transaction(connection):
                    connection.execute(f"PRAGMA application_id = {APPLICATION}")
                    connection.execute(f"PRAGMA user_version = {FORMAT}")
                    connection.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, row BLOB NOT NULL)")
        except BaseException:
            connection.close()
            raise
        return connection

    def _read(self, connection: sqlite3.Connection, keys: list[bytes]) -> Rows:
        rows, damaged = {}, []
        for start in range(0, len(keys), CHUNK):
            part = keys[start : start + CHUNK]
            query = f"SELECT rowid, key, row FROM features WHERE key IN ({','.join('?' * len(part))})"
            for number, key, sealed in connection.execute(query, part):
                row = _unsealed(key, sealed)
                if row is None:
                    damaged.append((number,))
                else:
                    rows[key] = row
        if damaged:
            warnings.warn(
                f"The feature cache {self._file}: {len(damaged)} of {len(keys)} entries asked for are damaged. They "
                "are computed again. Check the disk.",
                UserWarning,
                stacklevel=2,
            )
            with _transaction(connection):
                connection.executemany("DELETE FROM features WHERE rowid = ?", damaged)
        return rows

    def _set_aside(self, error: Exception) -> None:
        """Rename a damaged file, unless another process has done so; the next query creates a new one."""
        aside = self._file.with_name(f"{FILE_NAME}.damaged-{time.time_ns()}")
        try:
            if _identity(self._file) != self._identity:
                return
            self._remove_beside()
            self._file.replace(aside)
        except OSError as failure:
            self._give_up(failure)
            return
        warnings.warn(
            f"The feature cache {self._file} is damaged ({error}). Its file is now {aside}, which may be deleted; "
            "features are computed again and kept in a new file.",
            UserWarning,
            stacklevel=2,
        )

    def _give_up(self, error: Exception) -> None:
        self._usable = False
        warnings.warn(
            f"The feature cache {self._file} cannot be used ({error}). Features are computed and not kept.",
            UserWarning,
            stacklevel=2,
        )

    def _has_our_header(self) -> bool:
        """Return whether the header marks the file as ours, without SQLite."""
        with self._file.open("rb") as file:
            return file.read(72)[68:] == APPLICATION.to_bytes(4, "big")

    def _remove(self) -> None:
        self._remove_beside()
        self._file.unlink(missing_ok=True)

    def _remove_beside(self) -> None:
        """Remove SQLite's log and index, before the file itself: SQLite would apply them to a new file of that name."""
        for file in self._beside():
            file.unlink(missing_ok=True)

    def _beside(self) -> list[Path]:
        """Return the paths of SQLite's log and of its index."""
        return [self._file.with_name(FILE_NAME + suffix) for suffix in ("-wal", "-shm")]


def _check_writable(folder: Path, file: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"cache={str(folder)!r} is a file. Give a folder; it is made where there is none.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"cache={str(folder)!r}: the folder cannot be made: {error}. Give another.") from error
    for path in (folder, file):
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(
                f"cache={str(folder)!r}: {path} cannot be written to. Give another folder, or cache=True for memory."
            )


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino


# SQLite's codes when there is no space for its log or the index of the log.
_NO_SPACE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
# Its codes for a damaged file: SQLITE_ERROR if the schema is not the one that our statements expect, SQLITE_READONLY if
# the header says so (permissions were checked before).
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_READONLY)


def _is_damage(error: Exception) -> bool:
    """Return whether the file is damaged, as opposed to a fault of the disk, a lock or a permission."""
    # A message quotes the schema, and sqlite3 cannot decode a damaged quotation.
    return isinstance(error, UnicodeDecodeError) or _primary_code(error) in _DAMAGE


def _primary_code(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _checksum(key: bytes, values: bytes) -> bytes:
    # Includes the key, so that a row under the wrong key is detected too.
    return zlib.crc32(values, zlib.crc32(key)).to_bytes(4, "little")


def _sealed(key: bytes, row: Row) -> bytes:
    values = row.astype("<f4").tobytes()
    return _checksum(key, values) + values


def _unsealed(key: Any, sealed: Any) -> Row | None:
    """Return the row, or None if it is damaged."""
    if (
        not isinstance(key, bytes)
        or not isinstance(sealed, bytes)
        or len(sealed) % 4
        or sealed[:4] != _checksum(key, sealed[4:])
    ):
        return None
    return np.frombuffer(sealed, "<f4", offset=4)
