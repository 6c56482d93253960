"""The results of images as a table, in the formats of files."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

# Libraries that write Parquet files, in the order in which they are tried.
_OF_PARQUET = ("pyarrow", "polars")
_NUMBERS = ("score", "p_anomalous", "p_value")


class Row(NamedTuple):
    """The result of an image; the numbers are None for one that cannot be read.

    Parameters
    ----------
    path : str
    score : float or None
        Natural log of a density; higher is more normal.
    p_anomalous, p_value : float or None
    verdict : str
        "normal", "anomalous" or "broken".
    reason : str
        Why the image cannot be read; else empty.
    """

    path: str
    score: float | None
    p_anomalous: float | None
    p_value: float | None
    verdict: str
    reason: str


def as_csv(rows: Sequence[Row]) -> bytes:
    """Return the rows as CSV, with a header."""
    text = io.StringIO()
    # csv quotes a carriage return only where lines end with one.
    lines = SimpleNamespace(write=lambda line: text.write(line.removesuffix("\r\n") + "\n"))
    writer = csv.writer(lines, lineterminator="\r\n")
    writer.writerow(Row._fields)
    writer.writerows(rows)
    # Names of files are bytes, and not always UTF-8.
    return text.getvalue().encode("utf-8", "surrogateescape")


def as_json(rows: Sequence[Row]) -> bytes:
    """Return the rows as a JSON array of objects."""
    return ("[\n" + ",\n".join(map(_object, rows)) + "\n]\n").encode()


def as_jsonl(rows: Sequence[Row]) -> bytes:
    """Return the rows as JSON objects, one a line."""
    return "".join(f"{_object(row)}\n" for row in rows).encode()


def as_parquet(rows: Sequence[Row]) -> bytes:
    """Return the rows as a Parquet file.

    Raises
    ------
    ValueError
        If a name is not UTF-8, which Parquet's text is.
    ImportError
        As `parquet_library`.
    """
    check_utf_8([row.path for row in rows], "Rename the image, or use --csv.")
    columns = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    library, file = parquet_library(), io.BytesIO()
    if library.__name__ == "polars":
        schema = {name: library.Float64 if name in _NUMBERS else library.String for name in columns}
        library.DataFrame(columns, schema=schema).write_parquet(file)
    else:
        importlib.import_module("pyarrow.parquet").write_table(arrow_table(rows), file)
    return file.getvalue()


def arrow_table(rows: Sequence[Row]) -> Any:
    """Return the rows as a table of pyarrow, which must be installed."""
    import pyarrow

    types = {name: pyarrow.float64() if name in _NUMBERS else pyarrow.string() for name in Row._fields}
    columns = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    return pyarrow.table(columns, schema=pyarrow.schema(types))


def check_utf_8(paths: Sequence[str], way_out: str) -> None:
    """Raise a ValueError, which ends in the way out, if a name is not UTF-8, which Parquet's text is."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"--parquet: the name {path!r} is not UTF-8, which Parquet needs. {way_out}") from error


def parquet_library() -> Any:
    """Return the library that writes Parquet files.

    Raises
    ------
    ImportError
        If none is installed; the message names the extra.
    """
    for name in _OF_PARQUET:
        try:
            return importlib.import_module(name)
        except ImportError:
            pass
    raise ImportError("--parquet needs pyarrow or polars: pip install 'dfkde-sklearn[parquet]'.")


def _object(row: Row) -> str:
    return json.dumps(row._asdict())
