"""Answers for a stream, in order, while the next part of it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from dfkde_sklearn._threads import computed_ahead

# Parts that are computed, or ready, while the answers of the one before are used.
_N_AHEAD = 2
# Rows of a matrix that are scored at a time.
_ROWS = 2**14

_Answers = TypeVar("_Answers", bound=tuple[Any, ...])


class Part(NamedTuple):
    """Some items of a stream.

    n : int, their number.
    items : callable, from two positions in the part to what a detector takes.
    """

    n: int
    items: Callable[[int, int], Any]


def answers_in_order(assess: Callable[[Any], _Answers], parts: Iterable[Part]) -> Iterator[_Answers]:
    """Yield what a function returns for each item, as plain numbers.

    Parameters
    ----------
    assess : callable
        From n items to a named tuple of arrays (n,). It is called in a thread, for one part at a time.
    parts : iterable of Part
        Read in the thread that asks for the answers, ahead of what is yielded.

    Yields
    ------
    named tuple
        Of a number for each array.

    Raises
    ------
    Exception
        What `assess` raises for an item, or the stream itself, after all answers before it.
    """

    def answers(part: Part | Exception) -> tuple[list[_Answers], Exception | None]:
        if isinstance(part, Exception):
            return [], part
        try:
            return _one_by_one(assess(part.items(0, part.n))), None
        except Exception as error:
            if part.n == 1:
                return [], error
        # Which of them it is, and the answers before it.
        found: list[_Answers] = []
        for i in range(part.n):
            try:
                found += _one_by_one(assess(part.items(i, i + 1)))
            except Exception as error:
                return found, error
        return found, None

    with closing(computed_ahead(answers, _until_error(parts), 1, _N_AHEAD)) as results:
        for found, error in results:
            yield from found
            if error is not None:
                raise error


def parts_of_images(images: Any, n_at_once: int) -> Iterator[Part]:
    """Yield parts of what has a length, and a method `part` from two positions to what a detector takes."""
    for start in range(0, len(images), n_at_once):
        n = min(n_at_once, len(images) - start)
        yield Part(n, partial(_of_images, images, start))


def parts_of_stream(items: Iterable[Any], n_at_once: int, read: Callable[[list[Any], int], Any]) -> Iterator[Part]:
    """Yield parts of a stream; `read` makes of a list of items, the first of this number, what a detector takes."""
    remaining, n_read = iter(items), 0
    while True:
        some, fault = _taken(remaining, n_at_once)
        if some:
            yield Part(len(some), partial(_of_items, read, some, n_read))
        n_read += len(some)
        if fault is not None:
            raise fault
        if not some:
            return


def parts_of_table(X: Any, n_at_once: int) -> Iterator[Part]:
    """Yield parts of what has rows by number: a matrix, a frame, or a list."""
    by_place = getattr(X, "iloc", X)
    n = X.shape[0] if hasattr(X, "shape") else len(X)
    for start in range(0, n, n_at_once):
        rows = by_place[start : start + n_at_once]
        yield Part(min(n_at_once, n - start), partial(_of_rows, rows))


def parts_of_rows(X: Any) -> Iterator[Part]:
    """Yield parts of a feature matrix, or of an iterable of rows or matrices."""
    if hasattr(X, "shape"):
        yield from parts_of_table(X, _ROWS)
        return
    for item in X:
        # A copy, as the next rows may come in the same memory.
        rows = item.detach().clone() if isinstance(item, Tensor) else np.array(item)
        if rows.ndim < 2:
            rows = rows.reshape(1, -1)
        yield Part(len(rows), partial(_of_rows, rows))


def not_empty(parts: Iterable[Part]) -> Iterator[Part]:
    """Yield parts, and raise a ValueError if there are none."""
    is_empty = True
    for part in parts:
        is_empty = False
        yield part
    if is_empty:
        raise ValueError("The stream is empty: it gave no image or row. A generator can be used once.")


def _of_images(images: Any, first: int, start: int, stop: int) -> Any:
    return images.part(first + start, first + stop)


def _of_items(read: Callable[[list[Any], int], Any], some: list[Any], first: int, start: int, stop: int) -> Any:
    return read(some[start:stop], first + start)


def _of_rows(rows: Any, start: int, stop: int) -> Any:
    return rows[start:stop]


def _taken(items: Iterator[Any], n: int) -> tuple[list[Any], Exception | None]:
    """Return up to `n` items, and the error that ended the stream before."""
    some: list[Any] = []
    try:
        for item in islice(items, n):
            some.append(item)  # noqa: PERF402 (those before an error count)
    except Exception as error:
        return some, error
    return some, None


def _until_error(parts: Iterable[Part]) -> Iterator[Part | Exception]:
    """Yield parts, and at last the error that ended them, if one did."""
    try:
        yield from parts
    except Exception as error:
        yield error


def _one_by_one(answers: _Answers) -> list[_Answers]:
    """Return a named tuple of arrays (n,) as a list of n named tuples of numbers."""
    make: Any = type(answers)._make  # type: ignore[attr-defined]
    return [make(row) for row in zip(*(values.tolist() for values in answers), strict=True)]
