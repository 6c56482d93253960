"""Folds of training rows: which rows each fold holds out, and the other rows with their scatter matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkde_sklearn._density.axes import principal_axes
from dfkde_sklearn._density.eigen import Scatter
from dfkde_sklearn._density.estimate import n_removed
from dfkde_sklearn._density.rows import CentredRows, on_one_core_if_small
from dfkde_sklearn._threads import run_in_turn, run_on_single_cores

# Measured on features of photographs: 10 folds, 20, and one per row hold the false-alarm rate equally well.
N_FOLDS = 20
# Centring a scatter matrix by its mean loses the digits by which it shrinks: past this, it is summed again.
_CENTRING_LIMIT = 1e-4
# Multiplications for a fold's scatter matrix and pairs of its rows, under which threads of Python would only wait for
# one another.
_SMALL_FOLD = 2**19
# Rows hashed at a time.
_HASHED_ROWS = 1024

_Result = TypeVar("_Result")


class Fold(NamedTuple):
    """Held-out rows, and the others.

    where : slice or Tensor, the places of the held-out rows.
    held_out : Tensor (m, width), the held-out rows minus the mean of the others.
    others : CentredRows.
    scatter : Scatter, of the others.
    """

    where: slice | Tensor
    held_out: Tensor
    others: CentredRows
    scatter: Scatter


class Folds:
    """The folds of centred rows, each of which is held out from a fit to the others.

    Parameters
    ----------
    rows : CentredRows (n, width)
    groups : Tensor (n,), int64, or None
        Rows of one group share a fold: folds are runs of groups, in order of their numbers. None: runs of rows.
    working_memory : int
        Bytes that folds may take which are computed at the same time.
    off_axis : Tensor (n,), default=None
        Where the rows are projections: their squared distances from what was projected.
    dropped : Tensor (2,), default=None
        Where the rows are projections: as `off_axis` of `Scatter`.
    """

    def __init__(
        self,
        rows: CentredRows,
        groups: Tensor | None,
        working_memory: int,
        off_axis: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> None:
        self.rows = rows
        self.groups = groups
        self.working_memory = working_memory
        self.off_axis = rows.mean.new_zeros(len(rows)) if off_axis is None else off_axis
        self.places = fold_places(len(rows), groups)
        self._dropped = dropped
        self._others: list[tuple[Tensor, Scatter]] | None = None
        self._on_axes: dict[int, Folds] = {}

    def map(self, function: Callable[[Fold], _Result]) -> list[_Result]:
        """Return the function of each fold, in order.

        On the CPU several folds are computed at a time, each on one core, where `working_memory` suffices to keep half
        the cores busy.
        """
        if self._others is None:
            self._others = self._others_of_folds()
        n, width, n_folds = len(self.rows), self.rows.width, len(self.places)
        results: dict[int, _Result] = {}

        def compute(i: int) -> None:
            results[i] = function(self._fold(i))

        # The rows, the scatter matrix, its eigenvectors, and the memory that their computation takes.
        n_at_once = self.working_memory // (8 * width * (n + 5 * width))
        if self.rows.X.is_cpu and 2 * n_at_once >= min(torch.get_num_threads(), n_folds):
            is_small = n * (width**2 + n) < _SMALL_FOLD
            run_on_single_cores(1 if is_small else n_at_once)(compute, range(n_folds))
        else:
            run_in_turn(compute, range(n_folds))
        return [results[i] for i in range(n_folds)]

    def projected(self, width: int, scatter: Scatter, noise: float) -> Folds:
        """Return the folds of the rows on at most `width` of their first principal axes; the same ones for each call.

        `scatter` is that of all rows, and singular values up to `noise` are rounding.
        """
        if self.rows.width <= width:
            return self
        if width not in self._on_axes:
            first = principal_axes(self.rows, width, noise, scatter)
            off_axis = torch.cat([(x - (x @ first.axes) @ first.axes.T).square().sum(1) for x in self.rows.blocks()])
            mean = off_axis.new_zeros(first.axes.shape[1])
            rows = CentredRows(first.coordinates, mean, 1.0, self.rows.block_rows)
            self._on_axes[width] = Folds(rows, self.groups, self.working_memory, off_axis, first.left_out)
        return self._on_axes[width]

    def take(self, kept: Tensor) -> Folds:
        """Return new folds of the rows where the mask `kept` (n,) is true."""
        rows, _ = self.rows.take(kept)
        groups = None if self.groups is None else self.groups[kept]
        return Folds(rows, groups, self.working_memory, self.off_axis[kept], self._dropped)

    def max_components(self, contamination: float) -> int:
        """Return the number of axes, at least 1, that rows in general position have without any one fold.

        Rows of a group count as one, and a contamination removes its fraction of them.
        """
        n = len(self.rows)
        numbers = torch.arange(n) if self.groups is None else self.groups
        n_groups = len(numbers.unique())

        def n_left(where: slice | Tensor) -> int:
            held_out = numbers[where]
            return n_groups - len(held_out.unique()) - n_removed(contamination, n - len(held_out))

        return max(1, min(map(n_left, self.places)) - 1)

    def _fold(self, i: int) -> Fold:
        assert self._others is not None
        where = self.places[i]
        mean, scatter = self._others[i]
        is_other = torch.ones(len(self.rows), dtype=torch.bool, device=mean.device)
        is_other[where] = False
        return Fold(where, self.rows.part(where).rows() - mean, self.rows.part(is_other).shifted(mean), scatter)

    def _others_of_folds(self) -> list[tuple[Tensor, Scatter]]:
        """Return for each fold the mean of the other rows, and their scatter matrix about it."""
        keeps_eigenpairs = 8 * N_FOLDS * self.rows.width**2 <= self.working_memory
        return [
            (mean, Scatter(scatter, self._dropped, keeps_eigenpairs=keeps_eigenpairs))
            for mean, scatter in _means_and_scatters_of_others(self.rows, self.places)
        ]


def fold_places(n: int, groups: Tensor | None = None, n_folds: int = N_FOLDS) -> Sequence[slice | Tensor]:
    """Return the places of the rows of each of the folds of `n` rows; `groups` is as in `Folds`."""
    if groups is None:
        return _runs(n, n_folds)
    numbers, group = groups.unique(return_inverse=True)
    return [((run.start <= group) & (group < run.stop)).nonzero()[:, 0] for run in _runs(len(numbers), n_folds)]


def n_moved(groups: Tensor) -> int:
    """Return how many rows are in another run of consecutive rows than the first row of their group (n,)."""
    places = torch.arange(len(groups))
    _, group = groups.unique(return_inverse=True)
    first = places.new_full((int(group.max()) + 1,), len(groups)).scatter_reduce(0, group, places, "amin")
    run_of = torch.cat([torch.full((run.stop - run.start,), i) for i, run in enumerate(_runs(len(groups)))])
    return int((run_of != run_of[first[group]]).sum())


def copies(table: NDArray[np.number]) -> Tensor:
    """Return for each row of a table (n, n_features) the place of the first row that equals it, (n,), int64."""
    first: dict[int, int] = {}

    def hashes() -> Iterator[int]:
        for start in range(0, len(table), _HASHED_ROWS):
            # Adding zero makes -0 equal to 0.
            yield from (hash(row.tobytes()) for row in table[start : start + _HASHED_ROWS] + 0.0)

    # Different rows of equal hash, of 64 bits, do no harm: they share a fold.
    return torch.tensor([first.setdefault(of_row, i) for i, of_row in enumerate(hashes())])


def _runs(n: int, n_folds: int = N_FOLDS) -> list[slice]:
    """Return `n_folds` runs of `n` consecutive places, or `n` runs of one place where that is fewer."""
    n_runs = min(n_folds, n)
    return [slice(*ends) for ends in pairwise(round(i * n / n_runs) for i in range(n_runs + 1))]


@on_one_core_if_small
def _means_and_scatters_of_others(rows: CentredRows, places: Sequence[slice | Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return for each of the `places` the mean of all other rows, and their scatter matrix about it."""
    parts = [rows.part(where) for where in places]
    # Summed over the other folds, not subtracted from the sum of all: a far outlier's square would swallow the others'.
    scatters = _sums_of_others([part.scatter() for part in parts])
    totals = _sums_of_others([part.total() for part in parts])
    others = []
    for where, part, scatter, total in zip(places, parts, scatters, totals, strict=True):
        n_others = len(rows) - len(part)
        mean = total / n_others
        centred = scatter - n_others * torch.outer(mean, mean)
        if centred.trace() < _CENTRING_LIMIT * scatter.trace():
            is_other = torch.ones(len(rows), dtype=torch.bool, device=mean.device)
            is_other[where] = False
            centred = rows.part(is_other).shifted(mean).scatter()
        others.append((mean, centred))
    return others


def _sums_of_others(terms: list[Tensor]) -> list[Tensor]:
    """Return, for each term, the sum of all the others."""
    before, after = [torch.zeros_like(terms[0])], [torch.zeros_like(terms[0])]
    for term, last in zip(terms[:-1], terms[:0:-1], strict=True):
        before.append(before[-1] + term)
        after.append(after[-1] + last)
    return [left + right for left, right in zip(before, after[::-1], strict=True)]
