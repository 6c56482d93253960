"""Text as it is safe to show."""

from __future__ import annotations


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
