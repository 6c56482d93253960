"""A sample, of bounded size, of the rows of a stream; it does not depend on how the stream is cut into parts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# The rows that have come since the sample was last cut to its size are at most this part of it.
_PENDING = 4
# A step of the generator's counter gives this many numbers.
_NUMBERS_PER_STEP = 4


class _Part(NamedTuple):
    """Rows, in the order of the stream, with their random numbers, places and labels (n,)."""

    rows: NDArray[np.floating]
    numbers: NDArray[np.float64]
    places: NDArray[np.int64]
    labels: NDArray[np.object_]

    def take(self, kept: NDArray[np.bool_]) -> _Part:
        return _Part(self.rows[kept], self.numbers[kept], self.places[kept], self.labels[kept])


class RowSample:
    """At most `max_rows` of the rows that are added, where any set of rows is as probable as any other of its size.

    Each row gets a random number, and the rows with the smallest numbers are kept [1]_. The number depends on the seed,
    and on the place of the row in the stream or, if it has a label, on that: all rows of a label are kept, or none.

    Parameters
    ----------
    max_rows : int or None
        None keeps all rows.
    seed : int
        Not negative.

    Attributes
    ----------
    n_seen : int
        The number of rows that were added.

    References
    ----------
    .. [1] Cohen and Kaplan (2007), Summarizing data using bottom-k sketches, doi:10.1145/1281100.1281133
    """

    def __init__(self, max_rows: int | None, seed: int) -> None:
        self.max_rows = max_rows
        self.seed = seed
        self.n_seen = 0
        # Rows with this number or a larger one are not kept, nor will be.
        self._limit = np.inf
        self._parts: list[_Part] = []

    def __len__(self) -> int:
        """Return the number of rows that are kept."""
        return len(self._kept().rows) if self._parts else 0

    def state(self) -> dict[str, Any]:
        """Return what `from_state` makes the sample of: arrays, lists and plain numbers."""
        kept = self._kept()
        return {
            "n_seen": self.n_seen,
            "seed": self.seed,
            "limit": self._limit,
            "rows": kept.rows,
            "numbers": kept.numbers,
            "places": kept.places,
            "labels": kept.labels.tolist() if self.has_labels else None,
        }

    @staticmethod
    def check_state(state: Mapping[str, Any], n_features: int) -> None:
        """Raise a ValueError if a state, which comes from a file, is none that `state` returns."""
        rows, numbers, places, labels = (state[name] for name in ("rows", "numbers", "places", "labels"))
        n, n_seen = len(places), state["n_seen"]
        if rows.shape != (n, n_features) or rows.dtype not in (np.float32, np.float64) or not np.isfinite(rows).all():
            raise ValueError(f"the training rows are not {n} rows of {n_features} finite numbers")
        if numbers.shape != (n,) or numbers.dtype != np.float64 or not ((numbers >= 0) & (numbers < 1)).all():
            raise ValueError("the random numbers of the training rows are not one in [0, 1) for each")
        if not n or places.dtype != np.int64 or places[0] < 0 or (np.diff(places) < 1).any() or places[-1] >= n_seen:
            raise ValueError(f"the places of the training rows are not increasing and below {n_seen}")
        if not numbers.max() < state["limit"] or (n < n_seen and state["limit"] > 1):
            raise ValueError("the training rows are not those with the smallest random numbers")
        if labels is not None and len(labels) != n:
            raise ValueError(f"there are {len(labels)} labels of {n} training rows")

    @classmethod
    def from_state(cls, state: Mapping[str, Any], max_rows: int | None) -> RowSample:
        """Return a sample that grows on its own; with a smaller `max_rows` than before it keeps fewer rows."""
        sample = cls(max_rows, state["seed"])
        sample.n_seen, sample._limit = state["n_seen"], state["limit"]
        n = len(state["rows"])
        labels = np.full(n, None, object) if state["labels"] is None else np.array(state["labels"], object)
        sample._parts = [_Part(state["rows"], state["numbers"], state["places"], labels)]
        return sample

    @property
    def rows(self) -> NDArray[np.floating]:
        """The kept rows (m, n_features), in the order of the stream."""
        return self._kept().rows

    @property
    def places(self) -> NDArray[np.int64]:
        """The places (m,) of the kept rows in the stream, increasing."""
        return self._kept().places

    @property
    def has_labels(self) -> bool:
        """Whether rows have labels."""
        return bool(self._parts) and self._parts[0].labels[:1].tolist() != [None]

    @property
    def labels(self) -> list[str | None]:
        """The labels of the kept rows."""
        return self._kept().labels.tolist()

    def add(self, rows: NDArray[np.floating], labels: Sequence[str] | None = None) -> None:
        """Add rows.

        Parameters
        ----------
        rows : ndarray of shape (n, n_features), float32 or float64
            With as many columns as those before.
        labels : sequence of n str or None, default=None
            Either all rows of a stream have labels or none.
        """
        n = len(rows)
        numbers = _numbers(self.seed, self.n_seen, n) if labels is None else _numbers_of(self.seed, labels)
        of_rows = np.full(n, None, object) if labels is None else np.array(labels, object)
        part = _Part(rows, numbers, np.arange(self.n_seen, self.n_seen + n), of_rows)
        self.n_seen += n
        is_below = numbers < self._limit
        if not is_below.any():
            return
        self._parts.append(part.take(is_below))
        n_pending = sum(len(part.rows) for part in self._parts[1:])
        if self.max_rows is not None and n_pending > self.max_rows // _PENDING:
            self._kept()

    def _kept(self) -> _Part:
        """Return the sample as one part, cut to its size."""
        if len(self._parts) > 1:
            rows, numbers, places, labels = map(np.concatenate, zip(*self._parts, strict=True))
            self._parts = [_Part(rows, numbers, places, labels)]
        (part,) = self._parts
        if self.max_rows is not None and len(part.rows) > self.max_rows:
            # Strictly below, so that of rows with one label, and so with one number, none is kept without the others.
            self._limit = _limit(part.numbers, self.max_rows)
            self._parts = [part.take(part.numbers < self._limit)]
        return self._parts[0]


def sampled_places(n: int, max_rows: int, seed: int) -> NDArray[np.int64]:
    """Return the places, increasing, that a `RowSample` keeps of `n` rows without labels, more than `max_rows`."""
    numbers = _numbers(seed, 0, n)
    return np.flatnonzero(numbers < _limit(numbers, max_rows))


def _limit(numbers: NDArray[np.float64], max_rows: int) -> float:
    """Return the number below which rows are kept, at most `max_rows` of more."""
    return float(np.partition(numbers, max_rows)[max_rows])


def _numbers(seed: int, start: int, n: int) -> NDArray[np.float64]:
    """Return the random numbers (n,) in [0, 1) of the places from `start` on."""
    n_steps, n_before = divmod(start, _NUMBERS_PER_STEP)
    generator = np.random.Generator(np.random.Philox(key=seed).advance(n_steps))
    return generator.random(n_before + n)[n_before:]


def _numbers_of(seed: int, labels: Sequence[str]) -> NDArray[np.float64]:
    """Return the random numbers (n,) in [0, 1) of labels, the same for equal ones."""
    key = seed.to_bytes(8, "little")
    digests = [hashlib.blake2b(label.encode("utf-8", "surrogatepass"), digest_size=8, key=key) for label in labels]
    return np.array([int.from_bytes(digest.digest(), "little") >> 11 for digest in digests]) * 2.0**-53
