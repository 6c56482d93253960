"""What is printed: whatever is in it, on streams that may be closed, in an encoding that may lack its characters."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def print_line(text: str = "") -> None:
    """Print one line of results on standard output.

    Parameters
    ----------
    text : str
        What is not printable in it is escaped, and what the encoding lacks.

    Raises
    ------
    OSError
        If standard output cannot be written to; BrokenPipeError if its reader has gone.
    """
    _write_line(sys.stdout, text)


def print_bytes(data: bytes) -> None:
    """Print bytes on standard output as they are.

    Parameters
    ----------
    data : bytes
        UTF-8 as a rule.

    Raises
    ------
    OSError
        As in `print_line`.
    """
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def print_message(text: str) -> None:
    """Print one line on standard error; where that cannot be written to, what was said is lost, and no more than that.

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
    """Let a stream that cannot be written to end nowhere, since Python fails on what is left in it at its end.

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


def printable(text: str) -> str:
    r"""Return the text on one line, with escapes for what is not printable, such as ``\n`` or ``\x1b``.

    Parameters
    ----------
    text : str
        Names of files, and messages with them.

    Returns
    -------
    str
        No terminal takes it for commands, and no table for two lines.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _write_line(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
