"""Models by the file or the pickle that they are in, each loaded once a process."""

from __future__ import annotations

import hashlib
import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from dfkde_sklearn._deploy.saved import read
from dfkde_sklearn._threads import Lock

# Models that a process keeps: those of a job or two, whatever number of jobs a worker outlives.
_MAX_MODELS = 4
_models: OrderedDict[Hashable, Any] = OrderedDict()
# While it loads, other threads wait for the model in place of loading it too.
_loading = Lock()


def once_a_process(key: Hashable, load: Callable[[], Any]) -> Any:
    """Return what `load` returned when it was called with this key in this process, or call it.

    Parameters
    ----------
    key : hashable
        Which model it is: all that decides what `load` returns.
    load : callable
        What returns the model. After an error it is called again the next time.

    Returns
    -------
    object
        The model.
    """
    with _loading:
        if key not in _models:
            _models[key] = load()
            if len(_models) > _MAX_MODELS:
                _models.popitem(last=False)
        _models.move_to_end(key)
        return _models[key]


def load_detector(path: str | os.PathLike[str], *, weights: Any = None, device: Any = None, download: bool) -> Any:
    """Return the detector in a file, of whichever class it is; see `DFKDEDetector.load`."""
    from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector

    file = read(path)
    kind = PatchDFKDEDetector if file.owner == PatchDFKDEDetector.__name__ else DFKDEDetector
    return kind._of_file(file, backbone=None, weights=weights, device=device, download=download)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal digits, as ``sha256sum`` prints it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def here() -> str:
    """Return the machine and the process, for messages that are read on another one."""
    return f"on {socket.gethostname()}, in process {os.getpid()}"
