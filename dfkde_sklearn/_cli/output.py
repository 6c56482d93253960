"""Lines, facts and tables on standard output; messages on standard error.

Any text is safe to print: a stream may be closed, and its encoding may lack some characters.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from dfkde_sklearn._report.text import percent as percent
from dfkde_sklearn._report.text import printable

if TYPE_CHECKING:
    import numpy as np

    _Number = float | np.floating | None

# Columns of tables that hold words; the others hold numbers.
WORDS = ("path", "defect", "verdict", "layer", "layers", "residual")
# Images that are listed or drawn as the most anomalous.
N_WORST = 12


def print_line(text: str = "") -> None:
    """Print one line of results on standard output.

    Parameters
    ----------
    text : str
        Characters that are not printable, or that the encoding lacks, are escaped.

    Raises
    ------
    OSError
        If standard output cannot be written to; BrokenPipeError if its reader has closed it.
    """
    _write_line(sys.stdout, text)


def print_bytes(data: bytes) -> None:
    """Print bytes on standard output as they are.

    Parameters
    ----------
    data : bytes
        The content of a file.

    Raises
    ------
    OSError
        As in `print_line`.
    """
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def print_message(text: str) -> None:
    """Print one line on standard error; nothing happens if that cannot be written to.

    Parameters
    ----------
    text : str
        As in `print_line`.
    """
    try:
        _write_line(sys.stderr, text)
        sys.stderr.flush()
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Send a stream that cannot be written to to the null device, since Python fails to flush it at exit.

    Parameters
    ----------
    stream : text stream
        Standard output or standard error.
    """
    # Streams in memory have no descriptor.
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say(options: argparse.Namespace, text: str) -> None:
    """Print one line of progress on standard error, if it is a terminal and --quiet is not given."""
    if shows_progress(options):
        print_message(text)


def summarize(options: argparse.Namespace, text: str) -> None:
    """Print one line about the result on standard error, beside the result itself, unless --quiet is given."""
    if not options.quiet:
        print_message(text)


def shows_progress(options: argparse.Namespace) -> bool:
    """Return whether to show progress: only in a terminal, since each step of a bar is a line of a file."""
    return not options.quiet and sys.stderr.isatty()


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values, one pair a line."""
    for name, value in facts.items():
        print_line(f"{name:<24}{value}")


def print_table(heading: str | None, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of aligned columns, below a heading if there is one."""
    if heading is not None:
        print_heading(heading)
    lines = [header, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if name in WORDS else cell.rjust(width)
            for name, cell, width in zip(header, line, widths, strict=True)
        ]
        print_line("  ".join(cells).rstrip())


def print_heading(heading: str) -> None:
    """Print a line between empty lines."""
    print_line()
    print_line(heading)
    print_line()


def numbers(score: _Number, p_anomalous: _Number, p_value: _Number) -> tuple[str, str, str]:
    """Return the cells of a table for an image's score, P(anomalous) and p-value; dashes if there is no score."""
    if score is None:
        return "-", "-", "-"
    return f"{score:.2f}", f"{p_anomalous:.3f}", f"{p_value:.4f}"


def one_line(message: object) -> str:
    """Return a message on one line; where it names a setting of Python, the option of the command line is added."""
    line = " ".join(str(message).split()) or type(message).__name__
    return f"{line} On the command line: --max-pixels N." if "MAX_IMAGE_PIXELS" in line else line


def _write_line(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
