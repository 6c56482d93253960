"""The sums of kernels in one loop of machine code on a CPU, which keeps exponents in registers.

By PyTorch, a matrix product writes each exponent to memory, exp2 reads it and writes the power, and a sum reads that.
Here the exponents of a few rows and a panel of queries fill the processor's registers, and become powers and sums
there: see `source`. That takes about half as long. LLVM, which comes with llvmlite, compiles the code for this
processor, in some tenths of a second at the first use in a process; no compiler has to be installed. The speed page of
the documentation lists the alternatives that were tried, among them numba.
"""

from __future__ import annotations

import math
import os
import platform
import threading
from functools import cache, reduce
from typing import NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from dfkde_sklearn._kernels.llvm_writer import Compiled, Writer, compiled, cpu_features, double

# 2 ** x, |x| <= 1/2, as a polynomial: interpolated at Chebyshev nodes, one of them 0, so that powers of integers
# are exact. Its largest relative errors are 3e-16 and 2e-8.
_POWER = {
    torch.float64: (
        1.0,
        0.69314718055995,
        0.24022650695910097,
        0.05550410866444772,
        0.009618129107606888,
        0.0013333558230164974,
        0.0001540353044173605,
        1.5252657260200837e-05,
        1.321544258792169e-06,
        1.0208690299958306e-07,
        7.072585949269223e-09,
    ),
    torch.float32: (1.0, 0.6931472, 0.2402265, 0.05550327, 0.009618057, 0.0013400428, 0.00015461445),
}
# Few enough for the registers, and enough to use each loaded query several times.
_UNROLLED_ROWS = 4
# Rows that all panels are paired with before the next rows: few enough for the innermost cache. Sums within a tile
# have the type of the factors, and sums over tiles are float64.
_TILE_ROWS = 64
# The negative shift of a place in a panel without a query: its powers are negligible, and its sum is dropped.
_NO_QUERY = -1e30

_compiling = threading.Lock()  # LLVM compiles one function at a time
if hasattr(os, "register_at_fork"):
    # A process forked while LLVM works in another thread would wait for that thread's locks without end.
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )


def exp2_sums(q: Tensor, rows: Tensor, of_rows: Tensor | None = None) -> Tensor:
    """Return ``(q @ rows.T).exp2().sum(1)``, as `sums.Exp2Sums` says, computed on one core.

    A power below the smallest normal number counts as that, and one above the largest as infinity. No query's sum
    depends on other queries, not even by rounding.
    """
    (m, width), n = q.shape, len(rows)
    # The machine code reads and writes memory by address, without checks.
    assert (rows.dtype, rows.shape[1], rows.is_contiguous(), rows.is_cpu) == (q.dtype, width, True, True)
    if of_rows is not None:
        assert (of_rows.dtype, of_rows.shape, of_rows.is_contiguous()) == (torch.float64, (n,), True)
    with _compiling:
        loop = _loop(q.dtype, *_vectors(q.dtype), of_rows is not None)
    n_panels = -(-m // loop.panel)
    panels = q.new_zeros(n_panels * loop.panel, width - 1)
    panels[:m] = q[:, 1:]
    panels[m:, -1] = _NO_QUERY
    panels = panels.view(n_panels, loop.panel, width - 1).transpose(1, 2).contiguous()
    sums = torch.zeros(n_panels * loop.panel, dtype=torch.float64)
    tensors = [panels, rows, sums] if of_rows is None else [panels, rows, sums, of_rows]
    loop.code.run(n_panels, n, width - 2, *[x.data_ptr() for x in tensors])
    return sums[:m]


class _Loop(NamedTuple):
    """The loop for panels of `panel` queries.

    Its code takes the numbers of panels, rows and dimensions, and pointers to panels, rows, the sums of queries, and,
    where the loop has them, the sums of rows.
    """

    code: Compiled
    panel: int


def _vectors(dtype: torch.dtype) -> tuple[int, int]:
    """Return how many numbers a vector of the processor has, and how many vectors of queries make a panel."""
    has_512_bits, has_256_bits = (cpu_features().get(name, False) for name in ("avx512f", "avx"))
    lanes = (64 if has_512_bits else 32 if has_256_bits else 16) // dtype.itemsize
    # With four rows that makes exponents for 16 of 32 registers, or 12 of 16.
    return lanes, 4 if has_512_bits or platform.machine().lower() in ("aarch64", "arm64") else 3


@cache
def _loop(dtype: torch.dtype, lanes: int, vectors: int, sums_rows: bool) -> _Loop:
    code = compiled(source(dtype, lanes, vectors, sums_rows), "exp2_sums", n_integers=3, n_pointers=3 + sums_rows)
    return _Loop(code, lanes * vectors)


def source(dtype: torch.dtype, lanes: int, vectors: int, sums_rows: bool) -> str:
    """Return the loop in LLVM's assembly, for vectors of `lanes` numbers and panels of `vectors` vectors.

    For a tile of rows, for a panel of queries, for a few rows of the tile:

    1. the exponents are the inner products, in registers, a vector of queries and one row each;
    2. with the shifts of the queries added, they become powers;
    3. these are added to the sums of the queries, and, if `sums_rows`, of the rows.
    """
    w = Writer("exp2_sums", dtype, lanes, n_integers=3, n_pointers=3 + sums_rows)
    n_panels, n, d, panels, rows, sums, *sums_of_rows = w.arguments
    zero, panel_size = w.integer(0), w.integer(lanes * vectors)
    width = w.add(d, w.integer(2))
    of_tile = [w.alloca() for _ in range(vectors)]
    # The sums of a tile's rows, each in as many parts as a vector has numbers.
    of_rows = w.alloca(_TILE_ROWS)

    def add_rows(tile: ir.Value, start: ir.Value, n_rows: int, panel: ir.Value) -> None:
        """Add the powers of the next `n_rows` rows and the queries of a panel to the sums."""
        row = [w.gep(rows, w.mul(w.add(start, w.integer(i)), width)) for i in range(n_rows)]
        exponents = [[w.alloca() for _ in range(vectors)] for _ in row]
        for of_row, x in zip(exponents, row, strict=True):
            half_norm = w.load_splat(x)
            for exponent in of_row:
                w.store(half_norm, exponent)
        with w.loop(zero, d, 1) as k:
            queries = w.load_vectors(w.gep(panel, w.mul(k, panel_size)), vectors)
            for of_row, x in zip(exponents, row, strict=True):
                coordinate = w.load_splat(w.gep(x, w.add(k, w.integer(1))))
                for exponent, of_queries in zip(of_row, queries, strict=True):
                    w.store(w.fmuladd(coordinate, of_queries, w.load(exponent)), exponent)
        shifts = w.load_vectors(w.gep(panel, w.mul(d, panel_size)), vectors)
        # Two rows at a time: enough powers to keep the processor busy, and few enough for the registers.
        for first in range(0, n_rows, 2):
            pair = exponents[first : first + 2]
            shifted = [w.fadd(w.load(x), shift) for of_row in pair for x, shift in zip(of_row, shifts, strict=True)]
            powers = _exp2(w, dtype, shifted)
            for i in range(len(pair)):
                of_row = powers[i * vectors : (i + 1) * vectors]
                for total, power in zip(of_tile, of_row, strict=True):
                    w.store(w.fadd(w.load(total), power), total)
                if sums_rows:
                    total = w.gep(of_rows, w.sub(w.add(start, w.integer(first + i)), tile), w.vector)
                    w.store(w.fadd(w.load(total), reduce(w.fadd, of_row)), total)

    with w.loop(zero, n, _TILE_ROWS) as tile:
        stop = w.smin(w.add(tile, w.integer(_TILE_ROWS)), n)
        # Of the last tile, some rows may be left over.
        left_over = w.sub(stop, w.srem(stop, _UNROLLED_ROWS))
        if sums_rows:
            with w.loop(zero, w.integer(_TILE_ROWS), 1) as i:
                w.store(w.splat(0.0), w.gep(of_rows, i, w.vector))
        with w.loop(zero, n_panels, 1) as p:
            panel = w.gep(panels, w.mul(p, w.mul(w.add(d, w.integer(1)), panel_size)))
            for total in of_tile:
                w.store(w.splat(0.0), total)
            with w.loop(tile, left_over, _UNROLLED_ROWS) as start:
                add_rows(tile, start, _UNROLLED_ROWS, panel)
            with w.loop(left_over, stop, 1) as start:
                add_rows(tile, start, 1, panel)
            of_panel = w.gep(sums, w.mul(p, panel_size), double)
            for v, total in enumerate(of_tile):
                w.add_to(w.gep(of_panel, w.integer(v * lanes), double), w.fpext(w.load(total)))
        if sums_rows:
            with w.loop(tile, stop, 1) as i:
                parts = w.load(w.gep(of_rows, w.sub(i, tile), w.vector))
                w.add_to(w.gep(sums_of_rows[0], i, double), w.reduce_fadd(w.fpext(parts)))
    return w.assembly()


def _exp2(w: Writer, dtype: torch.dtype, exponents: list[ir.Value]) -> list[ir.Value]:
    """Return 2 to the power of each vector: each step for all of them, so that no instruction waits for the one before.

    Of ``2 ** x``, the integer nearest to x goes into the exponent of the binary number, and the remainder, at most 1/2
    in size, into the polynomial.
    """
    b, info = w.builder, torch.finfo(dtype)
    # The exponent of infinity is one above the largest.
    low, high = w.splat(math.log2(info.tiny)), w.splat(float(math.frexp(info.max)[1]))
    xs = [w.fmin(x, high) for x in exponents]
    xs = [w.fmax(x, low) for x in xs]
    n_digits = round(-math.log2(info.eps))
    # Added to x, it leaves the nearest integer in the last binary digits.
    rounder = w.splat(1.5 * 2.0**n_digits)
    rounded = [w.fadd(x, rounder) for x in xs]
    remainders = [w.fsub(x, w.fsub(r, rounder)) for x, r in zip(xs, rounded, strict=True)]
    *coefficients, last = _POWER[dtype]
    powers = [w.splat(last)] * len(xs)
    for coefficient in reversed(coefficients):
        constant = w.splat(coefficient)
        powers = [w.fmuladd(p, x, constant) for p, x in zip(powers, remainders, strict=True)]
    digits = w.splat(n_digits, w.bits)
    integers = [b.shl(b.bitcast(r, w.bits), digits) for r in rounded]
    return [b.bitcast(b.add(b.bitcast(p, w.bits), i), w.vector) for p, i in zip(powers, integers, strict=True)]
