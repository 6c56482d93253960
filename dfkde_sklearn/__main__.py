"""``dfkde`` and ``python -m dfkde_sklearn``: the command line as a process."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from dfkde_sklearn._cli.exit_codes import INTERRUPTED


def main() -> int:
    """Run the command line of this process and return its exit code, one of `_cli.exit_codes`."""
    _open_closed_streams()
    on_interrupt = signal.getsignal(signal.SIGINT)
    # A process in the background of a shell ignores the signal, and has to go on doing so.
    is_ours = on_interrupt is signal.default_int_handler
    if is_ours:
        # During the imports the signal ends the process: there is nothing to clean up, and a module that is being
        # imported may catch the exception.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dfkde_sklearn._cli.main import parser, run

    options = parser().parse_args()
    from dfkde_sklearn import PatchDFKDEDetector  # noqa: F401 (imports PyTorch, which takes seconds)

    try:
        if is_ours:
            signal.signal(signal.SIGINT, _interrupt)
        code = run(options)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if is_ours:
        # Nothing is left to clean up.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if code == INTERRUPTED and os.name == "posix":
            # A shell ends its loop only if the signal has ended the process.
            os.kill(os.getpid(), signal.SIGINT)
    return code


def _interrupt(*_: object) -> NoReturn:
    """Raise KeyboardInterrupt; a second Ctrl-C, during the cleanup, ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _open_closed_streams() -> None:
    """Connect standard streams that are closed to the null device.

    Otherwise the next file to be opened would get their number, and the output of libraries.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The new descriptor has the lowest free number: this one.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
