"""The sums of kernels in one loop of machine code on the CPU: no exponent reaches memory.

A matrix product writes each exponent to memory, from where exp2 reads it, and writes, and a sum reads it again. Here a
few rows meet a panel of queries at a time, as many as fill the processor's registers with their exponents, and these
turn into powers and sums where they are: see `source`. That takes about half as long. LLVM, which comes with llvmlite,
makes the code for the processor at hand, in some tenths of a second at the first use in a process; no compiler has to
be installed.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, reduce
from typing import NamedTuple

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

# 2 ** x, |x| <= 1/2, as a polynomial: interpolated at Chebyshev nodes, one of them 0, so that powers of whole numbers
# are exact. It errs by 3e-16 and 2e-8 of the power at most.
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
# Few enough for the registers, and enough that what is loaded of the queries serves more than once.
_ROWS_AT_ONCE = 4
# Rows that a panel meets before the next panel does: few enough for the innermost cache. Their sum is of the type of
# the factors, and the sums over tiles are float64.
_ROWS_A_TILE = 64
# The negative lift of a place in a panel without a query.
_NOTHING = -1e30

_making = threading.Lock()  # LLVM makes one at a time
if hasattr(os, "register_at_fork"):
    # A process that was forked while LLVM works in another thread would wait for that thread's locks for ever.
    os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release)


def exp2_sums(q: Tensor, rows: Tensor, of_rows: Tensor | None = None) -> Tensor:
    """Return ``(q @ rows.T).exp2().sum(1)`` in float64, computed on one core.

    Parameters
    ----------
    q : Tensor of shape (m, d + 2)
        Queries as the left-hand factor: 1, the coordinates, the negative lift. float32 or float64.
    rows : Tensor of shape (n, d + 2)
        Support rows as the right-hand factor: minus half the square norm, the coordinates, 1. Contiguous, of one type.
    of_rows : Tensor of shape (n,), float64, default=None
        The sums over the queries, ``(q @ rows.T).exp2().sum(0)``, are added to it. Contiguous.

    Returns
    -------
    Tensor of shape (m,)
        A power below the smallest normal number counts as that, and one above the largest as infinity. No query's sum
        depends on other queries.
    """
    (m, width), n = q.shape, len(rows)
    # What follows reads and writes memory by address.
    assert (rows.dtype, rows.shape[1], rows.is_contiguous(), rows.is_cpu) == (q.dtype, width, True, True)
    if of_rows is not None:
        assert (of_rows.dtype, of_rows.shape, of_rows.is_contiguous()) == (torch.float64, (n,), True)
    with _making:
        loop = _loop(q.dtype, *_vectors(q.dtype), of_rows is not None)
    n_panels = -(-m // loop.panel)
    panels = q.new_zeros(n_panels * loop.panel, width - 1)
    panels[:m] = q[:, 1:]
    panels[m:, -1] = _NOTHING
    panels = panels.view(n_panels, loop.panel, width - 1).transpose(1, 2).contiguous()
    sums = torch.zeros(n_panels * loop.panel, dtype=torch.float64)
    tensors = [panels, rows, sums] if of_rows is None else [panels, rows, sums, of_rows]
    loop.run(n_panels, n, width - 2, *[x.data_ptr() for x in tensors])
    return sums[:m]


class _Loop(NamedTuple):
    """Machine code.

    run : function of the numbers of panels, rows and dimensions, and of pointers to panels, rows, the sums of queries,
        and, where the loop has them, the sums of rows. Other threads of Python run meanwhile.
    panel : int, queries of a panel.
    engine : what keeps the code in memory.
    """

    run: Callable[..., None]
    panel: int
    engine: llvm.ExecutionEngine


@cache
def _features() -> dict[str, bool]:
    try:
        return dict(llvm.get_host_cpu_features())
    except RuntimeError:  # raised for processors of which it knows none
        return {}


def _vectors(dtype: torch.dtype) -> tuple[int, int]:
    """Return how many numbers a vector of the processor has, and how many vectors of queries make a panel."""
    has_512_bits, has_256_bits = (_features().get(name, False) for name in ("avx512f", "avx"))
    lanes = (64 if has_512_bits else 32 if has_256_bits else 16) // dtype.itemsize
    # With four rows that makes exponents for 16 of 32 registers, or 12 of 16.
    return lanes, 4 if has_512_bits or platform.machine().lower() in ("aarch64", "arm64") else 3


@cache
def _loop(dtype: torch.dtype, lanes: int, vectors: int, sums_rows: bool) -> _Loop:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = ",".join(("+" if has else "-") + name for name, has in _features().items())
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3)
    module = llvm.parse_assembly(source(dtype, lanes, vectors, sums_rows))
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    arguments = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * (4 if sums_rows else 3)
    run = ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address("exp2_sums"))
    return _Loop(run, lanes * vectors, engine)


def source(dtype: torch.dtype, lanes: int, vectors: int, sums_rows: bool) -> str:
    """Return the loop in LLVM's assembly, for vectors of so many numbers and panels of so many vectors.

    For a tile of rows, for a panel of queries, for a few rows of the tile:

    1. the exponents are the inner products, in registers, a vector of queries and one row each;
    2. with the lifts of the queries added, they become powers;
    3. these are added to the sums of the queries, and of the rows where they are asked for.
    """
    w = _Writer(dtype, lanes, n_pointers=3 + sums_rows)
    n_panels, n, d, panels, rows, sums, *sums_of_rows = w.arguments
    panel_size = w.whole(lanes * vectors)
    width = w.add(d, w.whole(2))
    of_tile = [w.variable() for _ in range(vectors)]
    # The sums of a tile's rows, in so many parts as a vector has.
    of_rows = w.variable(_ROWS_A_TILE)

    def add_rows(tile: ir.Value, start: ir.Value, n_rows: int, panel: ir.Value) -> None:
        """Add the powers of the next few rows and the queries of a panel to the sums."""
        row = [w.at(rows, w.multiply(w.add(start, w.whole(i)), width)) for i in range(n_rows)]
        exponents = [[w.variable() for _ in range(vectors)] for _ in row]
        for of_row, x in zip(exponents, row, strict=True):
            half_norm = w.spread(x)
            for exponent in of_row:
                w.set(exponent, half_norm)
        with w.loop(w.whole(0), d, 1) as k:
            queries = w.vectors(w.at(panel, w.multiply(k, panel_size)), vectors)
            for of_row, x in zip(exponents, row, strict=True):
                coordinate = w.spread(w.at(x, w.add(k, w.whole(1))))
                for exponent, of_queries in zip(of_row, queries, strict=True):
                    w.set(exponent, w.multiply_add(coordinate, of_queries, w.get(exponent)))
        lifts = w.vectors(w.at(panel, w.multiply(d, panel_size)), vectors)
        # Two rows at a time: enough powers under way that none waits for another, and few enough for the registers.
        for first in range(0, n_rows, 2):
            pair = exponents[first : first + 2]
            lifted = [w.plus(w.get(x), lift) for of_row in pair for x, lift in zip(of_row, lifts, strict=True)]
            powers = w.exp2(lifted)
            for i in range(len(pair)):
                of_row = powers[i * vectors : (i + 1) * vectors]
                for total, power in zip(of_tile, of_row, strict=True):
                    w.set(total, w.plus(w.get(total), power))
                if sums_rows:
                    total = w.at(of_rows, w.subtract(w.add(start, w.whole(first + i)), tile), w.vector)
                    w.set(total, w.plus(w.get(total), reduce(w.plus, of_row)))

    with w.loop(w.whole(0), n, _ROWS_A_TILE) as tile:
        stop = w.least(w.add(tile, w.whole(_ROWS_A_TILE)), n)
        # Of the last tile, some rows may be left over.
        left_over = w.subtract(stop, w.rest(stop, _ROWS_AT_ONCE))
        if sums_rows:
            with w.loop(w.whole(0), w.whole(_ROWS_A_TILE), 1) as i:
                w.set(w.at(of_rows, i, w.vector), w.constant(0.0))
        with w.loop(w.whole(0), n_panels, 1) as p:
            panel = w.at(panels, w.multiply(p, w.multiply(w.add(d, w.whole(1)), panel_size)))
            for total in of_tile:
                w.set(total, w.constant(0.0))
            with w.loop(tile, left_over, _ROWS_AT_ONCE) as start:
                add_rows(tile, start, _ROWS_AT_ONCE, panel)
            with w.loop(left_over, stop, 1) as start:
                add_rows(tile, start, 1, panel)
            of_panel = w.at(sums, w.multiply(p, panel_size), w.double)
            for v, total in enumerate(of_tile):
                w.add_to(w.at(of_panel, w.whole(v * lanes), w.double), w.doubles(w.get(total)))
        if sums_rows:
            with w.loop(tile, stop, 1) as i:
                parts = w.get(w.at(of_rows, w.subtract(i, tile), w.vector))
                w.add_to(w.at(sums_of_rows[0], i, w.double), w.total(w.doubles(parts)))
    return w.finished()


class _Writer:
    """Writes LLVM's assembly of one function of three integers and some pointers."""

    double = ir.DoubleType()

    def __init__(self, dtype: torch.dtype, lanes: int, n_pointers: int) -> None:
        self._power = _POWER[dtype]
        self._info = torch.finfo(dtype)
        self._lanes = lanes
        self._size = dtype.itemsize
        self._scalar = self.double if dtype == torch.float64 else ir.FloatType()
        self.vector = ir.VectorType(self._scalar, lanes)
        self._bits = ir.VectorType(ir.IntType(8 * dtype.itemsize), lanes)
        self._whole = ir.IntType(64)
        kinds = [self._whole] * 3 + [ir.PointerType()] * n_pointers
        self._module = ir.Module()
        function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), kinds), "exp2_sums")
        for pointer in function.args[3:]:
            pointer.add_attribute("noalias")
        self.arguments = function.args
        self._builder = ir.IRBuilder(function.append_basic_block())
        kind = f"v{lanes}f{8 * dtype.itemsize}"
        self._multiply_add = self._function(f"llvm.fmuladd.{kind}", self.vector, [self.vector] * 3)
        of_doubles = ir.VectorType(self.double, lanes)
        self._total = self._function(f"llvm.vector.reduce.fadd.v{lanes}f64", self.double, [self.double, of_doubles])
        b = self._builder
        self.add, self.subtract, self.multiply, self.plus = b.add, b.sub, b.mul, b.fadd

    def finished(self) -> str:
        self._builder.ret_void()
        return str(self._module)

    def _function(self, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
        return ir.Function(self._module, ir.FunctionType(result, arguments), name)

    def whole(self, value: int) -> ir.Constant:
        return ir.Constant(self._whole, value)

    def constant(self, value: float) -> ir.Constant:
        """Return a vector of one number."""
        return ir.Constant(self.vector, [value] * self._lanes)

    def least(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._builder.select(self._builder.icmp_signed("<", a, b), a, b)

    def rest(self, a: ir.Value, divisor: int) -> ir.Value:
        return self._builder.srem(a, self.whole(divisor))

    @contextmanager
    def loop(self, start: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
        """Write what is written within for each of ``range(start, stop, step)``."""
        b = self._builder
        with b.goto_entry_block():
            counter = b.alloca(self._whole)
        b.store(start, counter)
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        value = b.load(counter, typ=self._whole)
        b.cbranch(b.icmp_signed("<", value, stop), body, after)
        b.position_at_end(body)
        yield value
        b.store(b.add(value, self.whole(step)), counter)
        b.branch(head)
        b.position_at_end(after)

    def variable(self, n: int = 1) -> ir.Value:
        """Return a place for vectors: a register, as a rule, where it is one."""
        with self._builder.goto_entry_block():
            return self._builder.alloca(self.vector, n)

    def get(self, variable: ir.Value) -> ir.Value:
        return self._builder.load(variable, typ=self.vector)

    def set(self, variable: ir.Value, value: ir.Value) -> None:
        self._builder.store(value, variable)

    def at(self, pointer: ir.Value, index: ir.Value, kind: ir.Type | None = None) -> ir.Value:
        return self._builder.gep(pointer, [index], source_etype=kind or self._scalar)

    def vectors(self, pointer: ir.Value, n: int) -> list[ir.Value]:
        """Return the next `n` vectors in memory."""
        places = [self.at(pointer, self.whole(i * self._lanes)) for i in range(n)]
        return [self._builder.load(place, typ=self.vector, align=self._size) for place in places]

    def spread(self, pointer: ir.Value) -> ir.Value:
        """Return a vector of one number in memory."""
        b, index = self._builder, ir.IntType(32)
        undefined = ir.Constant(self.vector, ir.Undefined)
        number = b.load(pointer, typ=self._scalar, align=self._size)
        first = b.insert_element(undefined, number, ir.Constant(index, 0))
        return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(index, self._lanes), [0] * self._lanes))

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self._builder.call(self._multiply_add, [a, b, c])

    def exp2(self, exponents: list[ir.Value]) -> list[ir.Value]:
        """Return 2 to the power of each vector: each step for all of them, so that none waits for its last step."""
        b = self._builder
        # Of 2 ** x, the whole part of x is the exponent in binary. That of infinity is one above the largest.
        lowest, highest = math.log2(self._info.tiny), math.frexp(self._info.max)[1]
        n_digits = round(-math.log2(self._info.eps))
        # Added to x, it leaves the nearest whole number in the last binary digits.
        shift = self.constant(1.5 * 2.0**n_digits)
        low, high = self.constant(lowest), self.constant(float(highest))
        xs = [b.select(b.fcmp_ordered("<", x, high), x, high) for x in exponents]
        xs = [b.select(b.fcmp_ordered(">", x, low), x, low) for x in xs]
        shifted = [b.fadd(x, shift) for x in xs]
        rests = [b.fsub(x, b.fsub(s, shift)) for x, s in zip(xs, shifted, strict=True)]
        powers = [self.constant(self._power[-1])] * len(xs)
        for coefficient in self._power[-2::-1]:
            constant = self.constant(coefficient)
            powers = [self.multiply_add(p, rest, constant) for p, rest in zip(powers, rests, strict=True)]
        digits = ir.Constant(self._bits, [n_digits] * self._lanes)
        wholes = [b.shl(b.bitcast(s, self._bits), digits) for s in shifted]
        return [b.bitcast(b.add(b.bitcast(p, self._bits), w), self.vector) for p, w in zip(powers, wholes, strict=True)]

    def doubles(self, vector: ir.Value) -> ir.Value:
        if self._scalar == self.double:
            return vector
        return self._builder.fpext(vector, ir.VectorType(self.double, self._lanes))

    def total(self, doubles: ir.Value) -> ir.Value:
        zero = ir.Constant(self.double, 0.0)
        return self._builder.call(self._total, [zero, doubles], fastmath=("reassoc",))

    def add_to(self, pointer: ir.Value, doubles: ir.Value) -> None:
        """Add to a number, or several, in memory."""
        before = self._builder.load(pointer, typ=doubles.type, align=8)
        self._builder.store(self.plus(before, doubles), pointer, align=8)
