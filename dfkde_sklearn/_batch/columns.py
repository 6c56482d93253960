"""What a detector answers for a batch of images, as columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dfkde_sklearn._images import chosen, unreadable

T = TypeVar("T")
# The columns that `dfkde score` writes too, after the path.
_NUMBERS = ("score", "p_anomalous", "p_value")
COLUMNS = (*_NUMBERS, "verdict", "reason")


def of_readable(answer: Callable[[Any], T], images: Any, skip_broken: bool) -> tuple[T | None, dict[int, str]]:
    """Return what a function answers for the images that can be read, and the positions of the others with the reason.

    The answer is None where none can be read. Without `skip_broken`, an image that cannot be read is an error.
    """
    try:
        return answer(images), {}
    except (TypeError, ValueError, OSError):
        # Few batches have a broken image: only where something is wrong are images read one by one.
        broken = unreadable(images) if skip_broken else {}
        if not broken:
            raise
    readable = [i for i in range(len(images)) if i not in broken]
    return answer(chosen(images, readable)) if readable else None, broken


def assessed(detector: Any, images: Any, *, skip_broken: bool, widened: bool = True) -> dict[str, NDArray[Any]]:
    """Return the answers of a detector for images, one row for each.

    Parameters
    ----------
    detector : object with `assess`
        What scores the images.
    images : images or array-like of shape (n, n_features)
        What it takes; there may be none.
    skip_broken : bool
        Whether an image that cannot be read, or is missing in a list, is no error.
    widened : bool, default=True
        Whether numbers are float64, so that batches have the same types with and without images; else they keep the
        dtype of the answers.

    Returns
    -------
    dict
        Arrays of shape (n,) by the names of `COLUMNS`: numbers, NaN for an image that cannot be read; the verdict
        "normal", "anomalous" or "broken"; and the reason why the image cannot be read, else "".

    Raises
    ------
    ValueError, OSError
        As `assess`; with `skip_broken` only if it fails on images that can be read.
    """
    n = len(images)
    columns: dict[str, NDArray[Any]] = {name: np.full(n, np.nan) for name in _NUMBERS}
    verdict, reason = ["broken"] * n, [""] * n
    assessment, broken = of_readable(detector.assess, images, skip_broken) if n else (None, {})
    readable = [i for i in range(n) if i not in broken]
    if assessment is not None:
        answers = (assessment.log_density, assessment.p_anomalous, assessment.p_value)
        for name, values in zip(_NUMBERS, answers, strict=True):
            columns[name] = np.full(n, np.nan, np.float64 if widened else values.dtype)
            columns[name][readable] = values
        for i, label in zip(readable, assessment.label.tolist(), strict=True):
            verdict[i] = "anomalous" if label == -1 else "normal"
    for i, why in broken.items():
        reason[i] = why
    return {**columns, "verdict": np.array(verdict, dtype=str), "reason": np.array(reason, dtype=str)}
