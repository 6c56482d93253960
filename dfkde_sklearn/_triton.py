"""The sums of kernels in one Triton kernel: on a GPU no tile of exponents reaches memory.

Imported where Triton is there, which comes with torch for CUDA: `_density` decides that. With TRITON_INTERPRET=1 in the
environment the same code runs on the CPU, slowly; so it is tested.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfkde_sklearn._threads import Lock

# Queries and rows of a tile, which the registers of so many warps hold. Counted in the machine code for sm_90, that is
# 27 instructions a pair in float32 and 52 in float64, of which the product takes 16 and 2.
_TILES = {torch.float32: (128, 64, 8), torch.float64: (64, 64, 4)}
_CHUNK = 16
# Few queries share the rows out among programs too, alike on any GPU.
_PROGRAMS = 2048

_interpreting = Lock()  # the interpreter takes one kernel at a time


def exp2_sums(q: Tensor, rows: Tensor, own: int | None = None) -> Tensor:
    """Return ``(q @ rows.T).exp2().sum(1)``, without what `own` leaves out, in float64.

    Parameters
    ----------
    q : Tensor of shape (m, d + 2)
        Queries as the left-hand factor: 1, the coordinates, the negative lift. Contiguous, float32 or float64.
    rows : Tensor of shape (n, d + 2)
        Support rows as the right-hand factor: minus half the square norm, the coordinates, 1. Contiguous, of one type.
    own : int or None, default=None
        Query i does without the row ``own + i``.

    Returns
    -------
    Tensor of shape (m,)
        Products and powers are computed in the type of the factors, and never in TensorFloat-32.
    """
    (m, width), n = q.shape, len(rows)
    queries_a_tile, rows_a_tile, warps = _TILES[q.dtype]
    blocks, tiles = triton.cdiv(m, queries_a_tile), triton.cdiv(n, rows_a_tile)
    shares = max(1, min(tiles, _PROGRAMS // blocks))
    sums = torch.empty(shares, m, dtype=torch.float64, device=q.device)
    with _interpreting, torch.cuda.device_of(q):
        _exp2_sums[blocks, shares](
            q,
            rows,
            sums,
            m,
            n,
            width,
            own or 0,
            LEAVES_OUT=own is not None,
            IS_ONE_CHUNK=width - 2 <= _CHUNK,
            CHUNK=_CHUNK,
            QUERIES=queries_a_tile,
            ROWS=rows_a_tile,
            num_warps=warps,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return sums.sum(0)


@triton.jit
def _exp2_sums(
    q,
    rows,
    sums,
    m,
    n,
    width,
    own,
    LEAVES_OUT: tl.constexpr,
    IS_ONE_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
):
    d = width - 2
    at = tl.arange(0, CHUNK)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    is_query = query < m
    q_start = q + query.to(tl.int64) * width
    lift = tl.load(q_start + d + 1, mask=is_query, other=0.0)
    if IS_ONE_CHUNK:
        left = tl.load(q_start[:, None] + 1 + at[None, :], mask=is_query[:, None] & (at < d)[None, :], other=0.0)
    total = tl.zeros([QUERIES], tl.float64)
    for tile in range(tl.program_id(1), tl.cdiv(n, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS)
        is_row = row < n
        row_start = rows + row.to(tl.int64) * width
        # From the half norm to the lift, as in `_density._Kernels`: in this order partial sums stay small.
        half_norm = tl.load(row_start, mask=is_row, other=float("-inf"))
        exponents = tl.broadcast_to(half_norm[None, :], (QUERIES, ROWS))
        if IS_ONE_CHUNK:
            right = tl.load(row_start[None, :] + 1 + at[:, None], mask=is_row[None, :] & (at < d)[:, None], other=0.0)
            exponents = tl.dot(left, right, exponents, input_precision="ieee", out_dtype=exponents.dtype)
        else:
            for start in range(0, d, CHUNK):
                i = start + at
                left = tl.load(q_start[:, None] + 1 + i[None, :], mask=is_query[:, None] & (i < d)[None, :], other=0.0)
                right = tl.load(row_start[None, :] + 1 + i[:, None], mask=is_row[None, :] & (i < d)[:, None], other=0.0)
                exponents = tl.dot(left, right, exponents, input_precision="ieee", out_dtype=exponents.dtype)
        exponents += lift[:, None]
        if LEAVES_OUT:
            exponents = tl.where((own + query)[:, None] == row[None, :], float("-inf"), exponents)
        total += tl.sum(tl.exp2(exponents), 1).to(tl.float64)
    tl.store(sums + tl.program_id(1).to(tl.int64) * m + query, total, mask=is_query)
