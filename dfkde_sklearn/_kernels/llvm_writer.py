"""A function of vectors in LLVM's intermediate representation, and its machine code by LLVM.

`Writer` adds loops and vectors of one width to llvmlite's `ir.IRBuilder`. Its methods have LLVM's names for what they
write. It knows nothing of kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import llvmlite.binding as llvm
import torch
from llvmlite import ir

double = ir.DoubleType()
_index = ir.IntType(64)


class Compiled(NamedTuple):
    """Machine code.

    run : function of integers and addresses, which returns nothing. Other threads of Python run meanwhile.
    engine : what keeps the code in memory.
    """

    run: Callable[..., None]
    engine: llvm.ExecutionEngine


@cache
def cpu_features() -> dict[str, bool]:
    """Return LLVM's names of instruction sets, and whether this processor has them."""
    try:
        return dict(llvm.get_host_cpu_features())
    except RuntimeError:  # raised for processors whose features it cannot read
        return {}


def compiled(assembly: str, name: str, n_integers: int, n_pointers: int) -> Compiled:
    """Compile a function of integers and, after them, pointers for this processor."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = ",".join(("+" if has else "-") + feature for feature, has in cpu_features().items())
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3)
    module = llvm.parse_assembly(assembly)
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    arguments = [ctypes.c_int64] * n_integers + [ctypes.c_void_p] * n_pointers
    return Compiled(ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address(name)), engine)


class Writer:
    """Writes one function of 64-bit integers and pointers, instruction by instruction.

    Parameters
    ----------
    name : str
        The function's name.
    dtype : torch.float32 or torch.float64
        Type of the numbers in vectors.
    lanes : int
        Numbers of a vector.
    n_integers, n_pointers : int
        Arguments of the function, in this order: `arguments`. No two pointers may address the same memory.
    """

    def __init__(self, name: str, dtype: torch.dtype, lanes: int, n_integers: int, n_pointers: int) -> None:
        self.lanes = lanes
        self._align = dtype.itemsize
        self.scalar = double if dtype == torch.float64 else ir.FloatType()
        self.vector = ir.VectorType(self.scalar, lanes)
        self.bits = ir.VectorType(ir.IntType(8 * dtype.itemsize), lanes)
        self._doubles = ir.VectorType(double, lanes)
        self._module = ir.Module()
        kinds = [_index] * n_integers + [ir.PointerType()] * n_pointers
        function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), kinds), name)
        for pointer in function.args[n_integers:]:
            pointer.add_attribute("noalias")
        self.arguments = function.args
        self.builder = ir.IRBuilder(function.append_basic_block())
        kind = f"v{lanes}f{8 * dtype.itemsize}"
        self._fmuladd = self._intrinsic(f"llvm.fmuladd.{kind}", self.vector, [self.vector] * 3)
        self._reduce = self._intrinsic(f"llvm.vector.reduce.fadd.v{lanes}f64", double, [double, self._doubles])
        b = self.builder
        self.add, self.sub, self.mul, self.fadd, self.fsub = b.add, b.sub, b.mul, b.fadd, b.fsub

    def assembly(self) -> str:
        """End the function, and return its assembly."""
        self.builder.ret_void()
        return str(self._module)

    def _intrinsic(self, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
        return ir.Function(self._module, ir.FunctionType(result, arguments), name)

    def integer(self, value: int) -> ir.Constant:
        return ir.Constant(_index, value)

    def splat(self, value: float | int, kind: ir.Type | None = None) -> ir.Constant:
        """Return a constant vector of one number."""
        return ir.Constant(kind or self.vector, [value] * self.lanes)

    def load_splat(self, pointer: ir.Value) -> ir.Value:
        """Return a vector of one number in memory."""
        b, lane = self.builder, ir.IntType(32)
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = b.insert_element(undefined, b.load(pointer, typ=self.scalar, align=self._align), ir.Constant(lane, 0))
        return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(lane, self.lanes), [0] * self.lanes))

    def load_vectors(self, pointer: ir.Value, n: int) -> list[ir.Value]:
        """Return the next `n` vectors in memory."""
        places = [self.gep(pointer, self.integer(i * self.lanes)) for i in range(n)]
        return [self.builder.load(place, typ=self.vector, align=self._align) for place in places]

    def gep(self, pointer: ir.Value, index: ir.Value, kind: ir.Type | None = None) -> ir.Value:
        """Return the address of the element of an array."""
        return self.builder.gep(pointer, [index], source_etype=kind or self.scalar)

    def alloca(self, n: int = 1) -> ir.Value:
        """Return the address of `n` local vectors; LLVM keeps a single one in a register."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(self.vector, n)

    def load(self, address: ir.Value) -> ir.Value:
        return self.builder.load(address, typ=self.vector)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.builder.store(value, address)

    def add_to(self, pointer: ir.Value, doubles: ir.Value) -> None:
        """Add one or several doubles to those in memory."""
        before = self.builder.load(pointer, typ=doubles.type, align=8)
        self.builder.store(self.fadd(before, doubles), pointer, align=8)

    def fmuladd(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.builder.call(self._fmuladd, [a, b, c])

    def smin(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def srem(self, a: ir.Value, divisor: int) -> ir.Value:
        return self.builder.srem(a, self.integer(divisor))

    def fmin(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def fmax(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def fpext(self, vector: ir.Value) -> ir.Value:
        """Return the vector as doubles."""
        return vector if self.scalar == double else self.builder.fpext(vector, self._doubles)

    def reduce_fadd(self, doubles: ir.Value) -> ir.Value:
        """Return the sum of the numbers of a vector."""
        return self.builder.call(self._reduce, [ir.Constant(double, 0.0), doubles], fastmath=("reassoc",))

    @contextmanager
    def loop(self, start: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
        """Repeat the instructions written within, for each integer of ``range(start, stop, step)``."""
        b = self.builder
        with b.goto_entry_block():
            counter = b.alloca(_index)
        b.store(start, counter)
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        value = b.load(counter, typ=_index)
        b.cbranch(b.icmp_signed("<", value, stop), body, after)
        b.position_at_end(body)
        yield value
        b.store(b.add(value, self.integer(step)), counter)
        b.branch(head)
        b.position_at_end(after)
