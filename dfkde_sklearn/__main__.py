"""``dfkde`` and ``python -m dfkde_sklearn``: the command line as a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> int:
    """Run the command line of this process, and return its exit code; see `dfkde_sklearn._cli.main`."""
    _open_closed_streams()
    on_interrupt = signal.getsignal(signal.SIGINT)
    # To be ignored, in the background of a shell say, it stays.
    is_ours = on_interrupt is signal.default_int_handler
    if is_ours:
        # In the middle of an import there is nothing to clean up, and an exception may be taken for another.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dfkde_sklearn._cli import main as _cli

    try:
        if is_ours:
            signal.signal(signal.SIGINT, _interrupt)
        code = _cli.main()
    except KeyboardInterrupt:
        code = _cli.INTERRUPTED
    if is_ours:
        # All is done, and nothing is left to wait for.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if code == _cli.INTERRUPTED and os.name == "posix":
            # Ended by the signal, so that a loop in a shell ends with it.
            os.kill(os.getpid(), signal.SIGINT)
    return code


def _interrupt(*_: object) -> NoReturn:
    """Raise KeyboardInterrupt; a second Ctrl-C, while what runs is cleaned up, ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _open_closed_streams() -> None:
    """Let standard streams that were closed at the start end nowhere.

    The next file to be opened would get their number, and what a library prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest number that is free: this one.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
