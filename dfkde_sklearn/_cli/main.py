"""The command line, ``dfkde``.

Each command is a file with `add_parser`, which declares its arguments, and `run`, which returns its exit code.
Results go to standard output, progress and errors to standard error. What takes seconds to import, such as PyTorch, is
imported inside `run`, so that ``dfkde --help`` and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from dfkde_sklearn import __version__
from dfkde_sklearn._cli import (
    cache,
    demo,
    evaluate,
    export,
    fit,
    info,
    layers,
    recalibrate,
    report,
    score,
    search,
    update,
)
from dfkde_sklearn._cli.exit_codes import FAILED, INTERRUPTED, READER_GONE
from dfkde_sklearn._cli.output import one_line, print_message, silence

# In the order in which they are used.
COMMANDS = {
    "demo": demo,
    "layers": layers,
    "search": search,
    "fit": fit,
    "score": score,
    "evaluate": evaluate,
    "report": report,
    "recalibrate": recalibrate,
    "update": update,
    "export": export,
    "info": info,
    "cache": cache,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, default=None
        The words that follow `dfkde` on the command line; None takes the command line of this process.

    Returns
    -------
    int
        One of `exit_codes`.
    """
    return run(parser().parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """Run the command of parsed arguments and return its exit code.

    Parameters
    ----------
    options : argparse.Namespace
        From `parser`.

    Returns
    -------
    int
        One of `exit_codes`.
    """

    def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        print_message(f"dfkde {options.command}: warning: {one_line(message)}")

    try:
        with warnings.catch_warnings(), _max_pixels(getattr(options, "max_pixels", None)):
            warnings.showwarning = print_warning
            code: int = COMMANDS[options.command].run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does.
        code = READER_GONE
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if not _is_expected(error):
            raise
        if options.debug:
            print_traceback()
        print_message(f"dfkde {options.command}: error: {one_line(error)}")
        code = FAILED
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
    return code


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, whose `command` is a key of `COMMANDS`."""
    result = _Parser(
        prog="dfkde",
        description="Find anomalous images. A detector learns the density of deep features from good images alone; "
        "images of low density are called anomalous.",
        epilog="Start with `dfkde demo`. `dfkde COMMAND --help` describes a command. Results go to standard output, "
        "progress and errors to standard error. Exit code: 0 on success, 2 on an error; `dfkde score --exit-code` "
        "also uses 1.",
    )
    result.add_argument("--version", action="version", version=f"dfkde-sklearn {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_parser(commands)
        commands.choices[name].add_argument(
            "--debug", action="store_true", help="after an error, also show where in the program it arose"
        )
    return result


class _Parser(argparse.ArgumentParser):
    """A parser that answers wrong arguments in one line, where argparse prints all arguments first."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: error: {one_line(message)}. {self.prog} --help lists the arguments.\n")


def print_traceback() -> None:
    """Print the traceback of the error that is being handled."""
    for line in traceback.format_exc().splitlines():
        print_message(line)


def _is_expected(error: Exception) -> bool:
    """Return whether an error is one of the user's input or of the machine, and not of the program."""
    # Of a library that is not installed, whose message names the extra.
    expected: tuple[type[Exception], ...] = (ValueError, OSError, MemoryError, ImportError)
    if "torch" in sys.modules:
        expected += (sys.modules["torch"].OutOfMemoryError,)
    return isinstance(error, expected)


@contextmanager
def _max_pixels(n: int | None) -> Iterator[None]:
    """Let Pillow open images of up to `n` pixels; None leaves its limit."""
    if n is None:
        yield
        return
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, n
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
