"""The sums of kernels in PyTorch, on any device: for each tile of queries by rows a product, exp2 in place, and sums.

The slower way, where there is no code for the device (`_llvm`, `_triton`). Two choices are worth several times the
speed, and are easily undone. ``exp2`` is vectorised in torch itself, where ``exp`` calls a library that is slow on some
processors and, 20 to 100 times, where its result underflows. And a tile stays in the cache of a core, in memory that is
used again: the system clears new memory page by page.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Products are fastest at multiples of 48 columns.
_STEP = 48


class Tiles(threading.local):
    """``exp2_sums`` as in `_llvm`, in a tile of so many elements for each thread, like the given factor."""

    def __init__(self, like: Tensor, elements: int) -> None:
        self._scratch = like.new_empty(elements)

    def __call__(self, q: Tensor, rows: Tensor, of_rows: Tensor | None = None) -> Tensor:
        """Return ``(q @ rows.T).exp2().sum(1)`` in float64, and add ``(q @ rows.T).exp2().sum(0)`` to `of_rows`."""
        width = max(1, len(self._scratch) // len(q))
        width -= width % _STEP if width > _STEP else 0
        sums = q.new_zeros(len(q), dtype=torch.float64)
        for start in range(0, len(rows), width):
            tile = rows[start : start + width]
            powers = self._scratch[: len(q) * len(tile)].view(len(q), len(tile))
            torch.mm(q, tile.T, out=powers).exp2_()
            sums += powers.sum(1)
            if of_rows is not None:
                of_rows[start : start + width] += powers.sum(0)
        return sums
