"""The command line, ``dfkde``.

Each command is a file with `add_parser`, which declares its arguments, and `run`, which returns its exit code.
Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from dfkde_sklearn import __version__
from dfkde_sklearn._cli import cache, demo, evaluate, fit, info, report, score
from dfkde_sklearn._cli.exit_codes import FAILED, INTERRUPTED, READER_GONE
from dfkde_sklearn._cli.output import one_line, print_message, silence

COMMANDS = {
    "demo": demo,
    "fit": fit,
    "score": score,
    "evaluate": evaluate,
    "report": report,
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
    options = parser().parse_args(arguments)

    def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        print_message(f"dfkde {options.command}: warning: {one_line(message)}")

    try:
        with warnings.catch_warnings(), _max_pixels(getattr(options, "max_pixels", Image.MAX_IMAGE_PIXELS)):
            warnings.showwarning = print_warning
            code: int = COMMANDS[options.command].run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does.
        code = READER_GONE
    except KeyboardInterrupt:
        code = INTERRUPTED
    except (ValueError, ImportError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print_message(f"dfkde {options.command}: error: {one_line(error)}")
        code = FAILED
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
    return code


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, whose `command` is a key of `COMMANDS`."""
    result = argparse.ArgumentParser(
        prog="dfkde",
        description="Find anomalous images. A detector learns the density of deep features from good images alone; "
        "images of low density are called anomalous.",
        epilog="Start with `dfkde demo`. `dfkde COMMAND --help` describes a command. Results go to standard output, "
        "progress and errors to standard error. Exit code: 0 on success, 2 on an error; `dfkde score --exit-code` "
        "also uses 1.",
    )
    result.add_argument("--version", action="version", version=f"dfkde-sklearn {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_parser(commands)
    return result


@contextmanager
def _max_pixels(n: int | None) -> Iterator[None]:
    """Let Pillow open images of up to `n` pixels."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, n
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
