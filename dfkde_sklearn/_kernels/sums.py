"""Logarithms of sums of Gaussian kernels, from row sums of two to the power of a matrix product.

In the unit ``z = (x - centre) * sqrt(log2 e) / bandwidth`` the kernel of the row k at the query q is
``2 ** -(|q - k|^2 / 2)``. Its exponent is one inner product, ``[1, q, -shift] . [-|k|^2 / 2, k, 1]``, plus a number
that depends on the query alone, ``shift - |q|^2 / 2``. So a sum of kernels is a row sum of ``exp2(q @ rows.T)``. These
row sums take nearly all the time. They are what a backend computes: see `Exp2Sums`. There are three backends:
`sums_llvm` on CPUs, `sums_triton` on GPUs, and `sums_torch` where neither is available.

The shift keeps the sums within the range of floating point. Where it fails to, or where an exponent would lose digits,
a log sum is NaN, and `direct_log_sums` computes it from differences instead of products.
"""

from __future__ import annotations

import math
import os
import warnings
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dfkde_sklearn._kernels import sums_torch
from dfkde_sklearn._threads import Run, product, run_in_turn, run_on_single_cores

# Queries of a block on a CPU, a multiple of the panels of `sums_llvm` for vectors of any width; and elsewhere.
_CPU_QUERIES, _GPU_QUERIES = 1152, 2**16
# Rows of a block of leave-one-out. The pairs within a block are computed as one matrix.
_LEAVE_ONE_OUT_ROWS = 512
_SAMPLE_ROWS = 128
# The minimum number of pairs per chunk: fewer do not repay a thread.
_CHUNK_PAIRS = 2**18

# While |q|^2 / 2 is at most 64 nats, inner products of float32 are right to 2e-5 nats up to 64 dimensions.
_MAX_FLOAT32_HALF_NORM = 64 * math.log2(math.e)


class Exp2Sums(Protocol):
    """The contract of a backend: the function `exp2_sums` of its file."""

    def __call__(self, q: Tensor, rows: Tensor, of_rows: Tensor | None = None) -> Tensor:
        """Return ``(q @ rows.T).exp2().sum(1)`` in float64.

        Parameters
        ----------
        q : Tensor of shape (m, d + 2)
            Queries as the left-hand factor: 1, the coordinates, the negative shift. Contiguous, float32 or float64.
        rows : Tensor of shape (n, d + 2)
            Rows as the right-hand factor: minus half the square norm, the coordinates, 1. Contiguous, of the same type.
        of_rows : Tensor of shape (n,), float64, default=None
            The sums over the queries, ``(q @ rows.T).exp2().sum(0)``, are added to it. Contiguous.

        Returns
        -------
        Tensor of shape (m,)
            Products and powers are computed in the type of the factors, and never in a type with fewer digits.
            A power below the range of the type counts as zero, or as its smallest normal number. No sum depends on
            other queries by more than rounding.
        """


@cache
def backend(device: torch.device, dtype: torch.dtype) -> Exp2Sums:
    """Return the fastest backend that works for factors of this type on this device."""
    by_triton = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not by_triton and device.type != "cpu":
        return sums_torch.exp2_sums
    exp2_sums: Exp2Sums
    try:
        if by_triton:
            from dfkde_sklearn._kernels.sums_triton import exp2_sums
        else:
            from dfkde_sklearn._kernels.sums_llvm import exp2_sums
    except ImportError:
        return sums_torch.exp2_sums
    one_row = torch.zeros(1, 3, dtype=dtype, device=device)
    try:
        exp2_sums(one_row, one_row)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing compiler, an unknown processor, memory that may not be executed, ...
        warnings.warn(
            f"{'Triton' if by_triton else 'LLVM'} cannot build the code for densities in {dtype} on {device}: "
            f"{error.__cause__ or error}. PyTorch computes the same more slowly.",
            RuntimeWarning,
            stacklevel=2,
        )
        return sums_torch.exp2_sums
    return exp2_sums


def running(device: torch.device, n_pairs: int) -> Run:
    """Return what runs the tasks of this number of pairs: on a CPU threads of one core each, elsewhere a loop."""
    # torch's own threads would wait for one another in every call, and take milliseconds to wake.
    return run_on_single_cores(max(1, n_pairs // _CHUNK_PAIRS)) if device.type == "cpu" else run_in_turn


class KernelFactor(NamedTuple):
    """Rows with a kernel each, as the right-hand factor of inner products.

    rows : Tensor (n, d + 2): ``-|k|^2 / 2, k, 1``. In this order partial sums stay small, and float32 loses half as
        much.
    centre : Tensor (d,), the origin of the unit of `standardised`.
    scale : float
    """

    rows: Tensor
    centre: Tensor
    scale: float

    @property
    def max_half_norm(self) -> float:
        """The half square norm of a query up to which exponents are exact enough."""
        return _MAX_FLOAT32_HALF_NORM if self.rows.dtype == torch.float32 else math.inf

    def standardised(self, x: Tensor) -> Tensor:
        return (x.double() - self.centre).mul_(self.scale)


def kernel_factor(run: Run, support: Tensor, bandwidth: float, dtype: torch.dtype) -> KernelFactor:
    """Return the factor of the kernels at the support rows (n, d)."""
    n, d = support.shape
    # Distances are the same about any centre. One among the rows keeps norms, and so rounding, small; outliers do not
    # move the median far.
    centre = _sample(support, _SAMPLE_ROWS).double().median(0).values
    factor = KernelFactor(support.new_empty(n, d + 2, dtype=dtype), centre, _scale(bandwidth))

    def fill(block: slice) -> None:
        rows = factor.rows[block]
        rows[:, 1:-1] = factor.standardised(support[block])
        rows[:, 0] = -_half_square_norms(rows[:, 1:-1])
        rows[:, -1] = 1

    run(fill, _blocks(support))
    return factor


def is_in_range(run: Run, queries: Tensor, factor: KernelFactor) -> Tensor:
    """Return whether each query is near enough to the centre for the type of the factor, as a bool Tensor (m,)."""
    near = torch.empty(len(queries), dtype=torch.bool, device=queries.device)

    def fill(block: slice) -> None:
        near[block] = _half_square_norms(factor.standardised(queries[block])) <= factor.max_half_norm

    run(fill, _blocks(queries))
    return near


def log_sums(run: Run, queries: Tensor, index: Tensor, factor: KernelFactor, working_memory: int) -> Tensor:
    """Return the log of the sum of all kernels at each of ``queries[index]``; NaN where that is not exact enough."""
    rows, m = factor.rows, len(index)
    exp2_sums, size = backend(rows.device, rows.dtype), _block_size(rows, working_memory)
    n_chunks = 1
    if rows.is_cpu:
        # Few queries against many rows are divided by rows as well, in the same way for any number of threads.
        n_chunks = max(1, min(64 * size // max(1, m), min(size, m) * len(rows) // _CHUNK_PAIRS))
    chunks = rows.split(-(-len(rows) // n_chunks))
    sample = _sample(rows, max(1, min(_SAMPLE_ROWS, len(rows) // 32)))  # a small part of the work
    q = rows.new_ones(m, rows.shape[1])
    sums = torch.empty(len(chunks), m, dtype=torch.float64, device=rows.device)
    shifts, half_norms, result = (torch.empty_like(sums[0]) for _ in range(3))

    def prepare(block: slice) -> None:
        q[block, 1:-1] = factor.standardised(queries[index[block]])
        half_norms[block] = _half_square_norms(q[block, 1:-1])
        # The largest exponent over a sample of the rows becomes 0: no sum is under 1 then, and few overflow.
        q[block, -1] = 0
        shifts[block] = shift = product(q[block], sample.T).amax(1)
        q[block, -1] = -shift

    def add(item: tuple[slice, int]) -> None:
        block, chunk = item
        sums[chunk, block] = exp2_sums(q[block], chunks[chunk])

    def finish(block: slice) -> None:
        total = sums[:, block].sum(0)
        log2_sum = total.log2() + shifts[block] - half_norms[block]
        is_valid = (total >= 0.5) & total.isfinite() & _is_exact(factor, log2_sum, half_norms[block])
        result[block] = torch.where(is_valid, log2_sum * math.log(2), torch.nan)

    blocks = _slices(m, size)
    run(prepare, blocks)
    run(add, [(block, chunk) for block in blocks for chunk in range(len(chunks))])
    run(finish, _blocks(q))
    return result


def leave_one_out_log_sums(run: Run, factor: KernelFactor, working_memory: int) -> Tensor:
    """Return the log of the sum of all kernels but its own at each row; NaN where that is not exact enough.

    Each power is computed once for both of its rows: a block is paired with itself and the rows after it, whose sums a
    backend adds up as well. That takes half the time of all pairs, measured from 2000 to 40 000 rows.
    """
    rows, n = factor.rows, len(factor.rows)
    exp2_sums, size = backend(rows.device, rows.dtype), min(_LEAVE_ONE_OUT_ROWS, _block_size(rows, working_memory))
    # Two rows can share a power only under the same shift: one that uses the range of floating point to its top.
    shift = 960.0 if rows.dtype == torch.float64 else 64.0
    window = torch.finfo(rows.dtype)
    n_chunks = min(32, -(-n // size))
    sums = torch.zeros(n_chunks, n, dtype=torch.float64, device=rows.device)
    result = torch.empty_like(sums[0])

    def add(chunk: int) -> None:
        of_chunk = sums[chunk]
        for start in range(chunk * size, n, n_chunks * size):
            block, later = slice(start, min(start + size, n)), slice(min(start + size, n), n)
            q = rows[block].clone()
            q[:, -1] = q[:, 0] + shift
            q[:, 0] = 1
            # Masked, not subtracted: a sum much smaller than a row's own kernel would lose all digits.
            of_chunk[block] += (q @ rows[block].T).fill_diagonal_(-torch.inf).exp2_().sum(1)
            of_chunk[block] += exp2_sums(q, rows[later], of_chunk[later])

    def finish(block: slice) -> None:
        total = sums[:, block].sum(0)
        log2_sum = total.log2() - shift
        is_valid = (total * window.eps > n * window.tiny) & total.isfinite()
        is_valid &= _is_exact(factor, log2_sum, -rows[block, 0])
        result[block] = torch.where(is_valid, log2_sum * math.log(2), torch.nan)

    run(add, range(n_chunks))
    run(finish, _blocks(rows))
    return result


def direct_log_sums(
    run: Run, queries: Tensor, support: Tensor, bandwidth: float, working_memory: int, own: Tensor | None = None
) -> Tensor:
    """Return the log of the sum of all kernels at each query, by differences and the largest exponent of all.

    `own` names a support row for each query, whose kernel is left out. Several times slower than products, but exact
    anywhere, and faster where there are few pairs.
    """
    rows = support
    if support.dtype != torch.float64 or not support.is_contiguous():
        rows = torch.empty(support.shape, dtype=torch.float64, device=support.device)

        def convert(block: slice) -> None:
            rows[block] = support[block]

        run(convert, _blocks(support))  # not in the calling thread, where torch would wake threads of its own
    result = torch.empty(len(queries), dtype=torch.float64, device=queries.device)
    of_thread = min(_of_thread(support, working_memory), 2**21) if support.is_cpu else working_memory

    def fill(block: slice) -> None:
        distances = torch.cdist(queries[block].double(), rows, compute_mode="donot_use_mm_for_euclid_dist")
        exponents = distances.mul_(_scale(bandwidth)).square_().mul_(-0.5)
        if own is not None:
            exponents.scatter_(1, own[block, None], -torch.inf)
        largest = exponents.amax(1)
        total = exponents.sub_(largest[:, None]).exp2_().sum(1)
        # Where the square of a distance overflows, so does the result.
        result[block] = torch.where(largest == -torch.inf, largest, (total.log2() + largest) * math.log(2))

    run(fill, _slices(len(queries), max(1, of_thread // (8 * len(support)))))
    return result


def _is_exact(factor: KernelFactor, log2_sum: Tensor, half_norms: Tensor) -> Tensor:
    # An exponent is a difference of numbers as large as |q|^2 / 2: their rounding must be small against the result.
    cancelled = half_norms * 2.0**-50
    return (half_norms <= factor.max_half_norm) & (cancelled <= 2e-11 * log2_sum.abs().clamp_min(1))


def _of_thread(x: Tensor, working_memory: int) -> int:
    return working_memory // torch.get_num_threads() if x.is_cpu else working_memory


def _block_size(rows: Tensor, working_memory: int) -> int:
    """Return the number of queries to give to a backend at a time."""
    # A query takes a row of a tile, or its exponents at the sample, and some copies of itself.
    size = _of_thread(rows, working_memory) // (8 * (_LEAVE_ONE_OUT_ROWS + 4 * rows.shape[1]))
    return max(1, min(size, _CPU_QUERIES if rows.is_cpu else _GPU_QUERIES))


def _scale(bandwidth: float) -> float:
    return math.sqrt(math.log2(math.e)) / bandwidth


def _sample(rows: Tensor, n: int) -> Tensor:
    return rows[:: -(-len(rows) // n)]


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


def _blocks(rows: Tensor) -> list[slice]:
    return _slices(len(rows), 2**13 if rows.is_cpu else 2**17)


def _half_square_norms(z: Tensor) -> Tensor:
    return z.double().square().sum(1) / 2
