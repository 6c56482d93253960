"""The sums of kernels in one Triton kernel, which keeps tiles of exponents in a GPU's registers.

Triton comes with torch for CUDA; without it this file cannot be imported. With TRITON_INTERPRET=1 in the environment
Triton's interpreter runs the same code on the CPU, slowly, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkde_sklearn._threads import Lock

# Queries and rows of a tile, and the number of warps whose registers hold it. Counted in the machine code for sm_90,
# that is 27 instructions a pair in float32 and 52 in float64, of which the product takes 16 and 2.
_TILES = {torch.float32: (128, 64, 8), torch.float64: (64, 64, 4)}
_DIMENSIONS = 16  # of a step of the product
# With few queries, the rows are divided among programs too, in the same way on any GPU.
_PROGRAMS = 2048

_interpreting = Lock()  # the interpreter takes one kernel at a time


def exp2_sums(q: Tensor, rows: Tensor, of_rows: Tensor | None = None) -> Tensor:
    """Return ``(q @ rows.T).exp2().sum(1)``, as `sums.Exp2Sums` says; never in TensorFloat-32."""
    (m, width), n = q.shape, len(rows)
    if m == 0 or n == 0:
        return torch.zeros(m, dtype=torch.float64, device=q.device)
    if of_rows is not None:
        # The powers are computed again: programs that add to the same sums would do so in any order.
        of_rows += exp2_sums(_exchanged(rows), _exchanged(q))
    tile_queries, tile_rows, warps = _TILES[q.dtype]
    blocks, tiles = triton.cdiv(m, tile_queries), triton.cdiv(n, tile_rows)
    chunks = max(1, min(tiles, _PROGRAMS // blocks))
    sums = torch.empty(chunks, m, dtype=torch.float64, device=q.device)
    with _interpreting, torch.cuda.device_of(q):
        _exp2_sums[blocks, chunks](
            q,
            rows,
            sums,
            m,
            n,
            width,
            IS_ONE_STEP=width - 2 <= _DIMENSIONS,
            DIMENSIONS=_DIMENSIONS,
            QUERIES=tile_queries,
            ROWS=tile_rows,
            num_warps=warps,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return sums.sum(0)


def _exchanged(factor: Tensor) -> Tensor:
    """Return a left-hand factor as a right-hand one, or the reverse: the first and last column are exchanged."""
    return torch.cat([factor[:, -1:], factor[:, 1:-1], factor[:, :1]], dim=1)


@triton.jit
def _exp2_sums(
    q,
    rows,
    sums,
    m,
    n,
    width,
    IS_ONE_STEP: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
):
    d = width - 2
    at = tl.arange(0, DIMENSIONS)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    is_query = query < m
    q_start = q + query.to(tl.int64) * width
    shift = tl.load(q_start + d + 1, mask=is_query, other=0.0)
    if IS_ONE_STEP:
        left = tl.load(q_start[:, None] + 1 + at[None, :], mask=is_query[:, None] & (at < d)[None, :], other=0.0)
    total = tl.zeros([QUERIES], tl.float64)
    for tile in range(tl.program_id(1), tl.cdiv(n, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS)
        is_row = row < n
        row_start = rows + row.to(tl.int64) * width
        # From the half norm to the shift, as in `sums.KernelFactor`: in this order partial sums stay small.
        half_norm = tl.load(row_start, mask=is_row, other=float("-inf"))
        exponents = tl.broadcast_to(half_norm[None, :], (QUERIES, ROWS))
        if IS_ONE_STEP:
            right = tl.load(row_start[None, :] + 1 + at[:, None], mask=is_row[None, :] & (at < d)[:, None], other=0.0)
            exponents = tl.dot(left, right, exponents, input_precision="ieee", out_dtype=exponents.dtype)
        else:
            for start in range(0, d, DIMENSIONS):
                i = start + at
                left = tl.load(q_start[:, None] + 1 + i[None, :], mask=is_query[:, None] & (i < d)[None, :], other=0.0)
                right = tl.load(row_start[None, :] + 1 + i[:, None], mask=is_row[None, :] & (i < d)[:, None], other=0.0)
                exponents = tl.dot(left, right, exponents, input_precision="ieee", out_dtype=exponents.dtype)
        exponents += shift[:, None]
        total += tl.sum(tl.exp2(exponents), 1).to(tl.float64)
    tl.store(sums + tl.program_id(1).to(tl.int64) * m + query, total, mask=is_query)
