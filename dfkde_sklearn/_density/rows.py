"""Rows of features, centred and scaled, made block by block.

All of it is float64, whatever the features are: the whitening that follows divides by the smallest kept singular
value. Rows are scaled by a power of two, which is exact, so that the squares of 1e-150 or 1e150 neither underflow nor
overflow.

All linear algebra is torch's, whose number of threads can be set for each thread. NumPy's and SciPy's BLAS has one
number for the whole process: to set it here would slow down, or race with, whatever else runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from dfkde_sklearn._threads import on_single_core

# Minimum number of multiplications for which several threads are faster than one.
_LARGE = 2**35
# Bytes of a block of rows that stays in the processor's cache.
_CACHED = 2**21
# Minimum number of rows per block, for products that use several threads.
_BLOCK_ROWS = 1024
# Columns of a scatter matrix that are computed at once: few enough to leave out much of its other half, and enough for
# a fast product. Of 5000 x 512 rows on one core: 38 ms, 44 ms with 256, 47 ms with 128, and 50 ms for the whole matrix.
_BLOCK_COLUMNS = 192

_P = ParamSpec("_P")
_Rows = TypeVar("_Rows", bound="CentredRows | Tensor")
_Result = TypeVar("_Result")


def on_one_core_if_small(
    function: Callable[Concatenate[_Rows, _P], _Result],
) -> Callable[Concatenate[_Rows, _P], _Result]:
    """Decorate a function of rows: on the CPU it runs on one core unless the rows are large."""

    @wraps(function)
    def wrapper(rows: _Rows, *args: _P.args, **kwargs: _P.kwargs) -> _Result:
        X = rows.X if isinstance(rows, CentredRows) else rows
        if X.is_cpu and X.numel() * min(X.shape) < _LARGE:
            return on_single_core(function, rows, *args, **kwargs)
        return function(rows, *args, **kwargs)

    return wrapper


@dataclass(frozen=True)
class CentredRows:
    """The rows ``scale * (X - mean)``, computed block by block on request.

    X : Tensor (n, width), float32 or float64; never written to.
    mean : Tensor (width,), float64.
    scale : float, a power of two.
    block_rows : int, number of rows in a block.
    """

    X: Tensor
    mean: Tensor
    scale: float
    block_rows: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.X.shape[0]

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.X.shape[1]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows from `start` to `stop`, a new float64 tensor."""
        # Scaled before the mean is subtracted: the difference of two numbers near the largest float may overflow.
        return self.X[start:stop].to(torch.float64, copy=True).mul_(self.scale).sub_(self.mean * self.scale)

    def part(self, where: slice | Tensor) -> CentredRows:
        """Return the rows at the places `where` (a slice, indices or a mask), with the same mean."""
        return replace(self, X=self.X[where])

    def blocks(self) -> Iterator[Tensor]:
        """Return the rows, block by block."""
        return (self.rows(i, i + self.block_rows) for i in range(0, len(self), self.block_rows))

    def total(self) -> Tensor:
        """Return the sum of the rows, of shape (width,)."""
        total = self.mean.new_zeros(self.width)
        for block in self.blocks():
            total += block.sum(0)
        return total

    @on_one_core_if_small
    def scatter(self) -> Tensor:
        """Return the sum of outer products of the rows, of shape (width, width)."""
        total = self.mean.new_zeros(self.width, self.width)
        if not total.is_cpu:
            for block in self.blocks():
                total += block.T @ block
            return total
        # A product of a matrix with itself is symmetric: half of it is enough.
        for block in self.blocks():
            for start in range(0, self.width, _BLOCK_COLUMNS):
                stop = min(start + _BLOCK_COLUMNS, self.width)
                total[:stop, start:stop].addmm_(block[:, :stop].T, block[:, start:stop])
        return total.triu() + total.triu(1).T

    def project(self, axes: Tensor) -> Tensor:
        """Return the coordinates of the rows on the columns of `axes`, of shape (n, d)."""
        return torch.cat([block @ axes for block in self.blocks()])

    def shifted(self, mean: Tensor) -> CentredRows:
        """Return the rows minus `mean` (width,), which is in their units."""
        return replace(self, mean=self.mean + mean / self.scale)

    def take(self, kept: Tensor) -> tuple[CentredRows, Tensor]:
        """Return the rows where the mask `kept` (n,) is true, centred again, and their mean before that, (width,)."""
        rows = self.part(kept)
        mean = rows.total() / len(rows)
        return rows.shifted(mean), mean


def centred_rows(X: Tensor, mean: Tensor, scale: float, working_memory: int) -> CentredRows:
    """Return the rows ``scale * (X - mean)`` in blocks of at most `working_memory` bytes."""
    row_bytes = 8 * X.shape[1]
    if X.device.type == "cpu":
        working_memory = min(working_memory, max(_CACHED, _BLOCK_ROWS * row_bytes))
    return CentredRows(X, mean, scale, max(1, working_memory // row_bytes))
