"""The sums of kernels by PyTorch, on any device: a product, exp2 in place and a sum for each tile of the matrix.

It is used if there is no code for the device (`sums_llvm`, `sums_triton`). Two choices make it several times faster.
``exp2`` is vectorised in torch itself; ``exp`` calls a library that is slow on some processors, and 20 to 100 times
slower if its result underflows. And a tile stays in the cache of a core, in memory that is used again: the system
clears new memory page by page.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Products are fastest at multiples of 48 columns.
_TILE_ROWS = 240


def exp2_sums(q: Tensor, rows: Tensor, of_rows: Tensor | None = None) -> Tensor:
    """Return ``(q @ rows.T).exp2().sum(1)``, as `sums.Exp2Sums` says."""
    tile = q.new_empty(len(q) * _TILE_ROWS)
    sums = q.new_zeros(len(q), dtype=torch.float64)
    for start in range(0, len(rows), _TILE_ROWS):
        some = rows[start : start + _TILE_ROWS]
        powers = tile[: len(q) * len(some)].view(len(q), len(some))
        torch.mm(q, some.T, out=powers).exp2_()
        sums += powers.sum(1)
        if of_rows is not None:
            of_rows[start : start + _TILE_ROWS] += powers.sum(0)
    return sums
