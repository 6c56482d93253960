"""Text and numbers as they are safe to show."""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    r"""Return the text on one line, with escapes for what is not printable, such as ``\n`` or ``\x1b``.

    Parameters
    ----------
    text : str
        Any text: a name of a file, or a message that holds one.

    Returns
    -------
    str
        The text, which no terminal reads as a command and no table as two lines.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def percent(share: float) -> str:
    """Return a share as text, in per cent.

    Parameters
    ----------
    share : float
        From 0 to 1.

    Returns
    -------
    str
        Such as "5 %" or "0.25 %".
    """
    return f"{100 * share:.3g} %"


def decimal(number: Any) -> float:
    """Return the shortest decimal number that a NumPy number is, so that all formats hold the same one."""
    return float(str(number))
