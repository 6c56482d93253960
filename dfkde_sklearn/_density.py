"""Gaussian kernel density of whitened rows: bandwidths, log density, leave-one-out.

In the unit ``z = (x - centre) * sqrt(log2 e) / bandwidth``, the kernel of the support row k at the query q is
``2 ** -(|q - k|^2 / 2)``. Its exponent is one inner product, ``[1, q, -lift] . [-|k|^2 / 2, k, 1]``, plus a number that
depends on the query alone, ``lift - |q|^2 / 2``. So the sum of all kernels is ``exp2_sums(q, rows)``, the row sums of
``exp2(q @ rows.T)``: see `_log_sums`. On a CPU one loop of machine code computes them (`_llvm`), on a GPU one kernel
(`_triton`), and elsewhere a product, an exp2 and a sum a tile (`_tiles`).

The lift keeps the sums within the range of floating point; rows for which that fails, or precision, go to
`_direct_log_sums`; work too little to be shared out goes to `_small_log_sums`. Blocks of queries are shared out among
threads that each use one core, as torch's own threads wait for one another in every call.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import NamedTuple, ParamSpec, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor

from dfkde_sklearn._threads import Run, product, run_in_turn, run_on_single_cores
from dfkde_sklearn._tiles import Tiles

WORKING_MEMORY = 64 * 2**20  # bytes

# Queries of a block: full panels of `_llvm`, whatever the width of vectors.
_QUERIES = 1152
# A tile of `_tiles` takes 1.9 MiB in float64, near what a core keeps close.
_TILE_ROWS, _TILE_QUERIES = 480, 512
# Sums of which the logarithm is taken at once: less than what torch shares out among threads of its own.
_FINISHED_AT_ONCE = 2**14
# Less than so many pairs are not worth a share of their own, and less than twice as many not a second thread.
_PAIRS_A_SHARE = 2**18
_SHARED_PAIRS = 2 * _PAIRS_A_SHARE

# While |q|^2 / 2 is at most 64 nats, inner products of float32 are right to 2e-5 nats up to 64 dimensions.
_FLOAT32_REACH = 64 * math.log2(math.e)

_P = ParamSpec("_P")


def _in_the_memory_there_is(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Call the function with half its `working_memory`, and half of that, as long as the device has too little."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        asked = memory = cast(int, kwargs.get("working_memory", WORKING_MEMORY))
        while True:
            kwargs["working_memory"] = memory
            try:
                return function(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                if memory < 2**20:
                    tensors = [x for x in args if isinstance(x, Tensor)]
                    shapes = " and ".join(str(tuple(x.shape)) for x in tensors)
                    raise torch.OutOfMemoryError(
                        f"{tensors[0].device} has no memory for the densities of rows of shape {shapes}. Tiles of "
                        f"{asked} bytes, and smaller ones down to {memory} bytes, were tried, beside a copy of the "
                        "rows. Free memory there, use device='cpu', or fit fewer rows (max_samples)."
                    ) from error
            # Only here, as the error holds on to all that was allocated.
            memory //= 2

    return wrapper


def scott_bandwidth(n: int, d: int) -> float:
    """Return Scott's factor for `n` rows in `d` dimensions: ``n ** (-1 / (d + 4))``, as SciPy has it."""
    return float(n) ** (-1.0 / (d + 4))


def silverman_bandwidth(n: int, d: int) -> float:
    """Return Silverman's factor: ``(n (d + 2) / 4) ** (-1 / (d + 4))``, as SciPy has it."""
    return (n * (d + 2) / 4.0) ** (-1.0 / (d + 4))


@_in_the_memory_there_is
def log_density(queries: Tensor, support: Tensor, bandwidth: float, *, working_memory: int = WORKING_MEMORY) -> Tensor:
    """Log density of each query under equal Gaussian kernels at the support rows.

    Parameters
    ----------
    queries : Tensor of shape (n_queries, d)
        Whitened rows, finite. With float64 the result is right to 1e-10 of itself; other types are computed in float32
        where that is right to 2e-5 nats or 1e-6 of the result, elsewhere in float64.
    support : Tensor of shape (n_samples, d)
        Whitened rows, finite, at least one, on the same device. They need not be centred.
    bandwidth : float
        Standard deviation h > 0 of the kernels, in whitened units.
    working_memory : int, default=64 MiB
        Bytes that blocks of queries, or tiles, of all threads together may take. Beside them there is one copy of
        the support and one of the queries.

    Returns
    -------
    Tensor of shape (n_queries,)
        ``log (1 / n_samples) sum_i Normal(q; s_i, h^2 I)``: natural logarithm, in the type of the queries and without
        gradient. Finite as long as ``|q - s|^2 / (2 h^2)`` is a number of that type, else -inf. It depends on the other
        queries, their order and the number of threads by rounding only.

    Examples
    --------
    >>> import torch
    >>> log_density(torch.tensor([[0.0], [1e6]]), torch.tensor([[-1.0], [1.0]]), 1.0)
    tensor([-1.4189e+00, -5.0000e+11])
    """
    if _is_little(len(queries), support):
        out = _small_log_sums(queries, support, bandwidth)
    else:
        run = _running(queries.device, len(queries) * len(support))
        out = torch.full((len(queries),), torch.nan, dtype=torch.float64, device=queries.device)
        if _computing_dtype(queries) == torch.float32:
            kernels = _kernels(run, support, bandwidth, torch.float32)
            near = _is_near(run, queries, kernels).nonzero()[:, 0]
            out[near] = _log_sums(run, queries, near, kernels, working_memory)
        # NaN marks what the arithmetic so far did not reach.
        if len(left := out.isnan().nonzero()[:, 0]) and _is_little(len(left), support):
            out[left] = _small_log_sums(queries[left], support, bandwidth)
        elif len(left):
            kernels = _kernels(run, support, bandwidth, torch.float64)
            out[left] = _log_sums(run, queries, left, kernels, working_memory)
        if len(left := out.isnan().nonzero()[:, 0]):
            out[left] = _direct_log_sums(run, queries[left], support, bandwidth, working_memory)
    return (out - _log_normaliser(len(support), support.shape[1], bandwidth)).to(queries.dtype)


@_in_the_memory_there_is
def leave_one_out(support: Tensor, bandwidth: float, *, working_memory: int = WORKING_MEMORY) -> Tensor:
    """Log density of each support row under the kernels of all the others.

    Parameters
    ----------
    support : Tensor of shape (n_samples, d)
        Whitened rows, finite, at least two. Rows may be equal: only a row's own kernel is left out.
    bandwidth : float
        Standard deviation of the kernels, in whitened units.
    working_memory : int, default=64 MiB
        Bytes that blocks of rows, or tiles, of all threads together may take. Beside them there is a copy of the
        support and 256 bytes a row.

    Returns
    -------
    Tensor of shape (n_samples,)
        As `log_density` would give for the row and the ``n_samples - 1`` other rows, in half the time.

    Raises
    ------
    ValueError
        If there are fewer than two rows.
    """
    n, d = support.shape
    if n < 2:
        raise ValueError(f"leaving one row out of {n} leaves no kernel; at least 2 rows are needed")
    if _is_little(n, support):
        out = _small_log_sums(support, support, bandwidth, leave_one_out=True)
    else:
        # Not in the calling thread, where torch would wake its own threads for the product within a block.
        run = _running(support.device, max(n * n, _SHARED_PAIRS))
        kernels = _kernels(run, support, bandwidth, _computing_dtype(support))
        n_near = int(_is_near(run, support, kernels).sum())
        # A far row goes the direct way, which for more than a few costs more than float64 for all.
        if kernels.rows.dtype == torch.float32 and n - n_near > n // 32:
            kernels = _kernels(run, support, bandwidth, torch.float64)
        out = _leave_one_out_log_sums(run, kernels, working_memory)
        if len(left := out.isnan().nonzero()[:, 0]):
            out[left] = _direct_log_sums(run, support[left], support, bandwidth, working_memory, left)
    return (out - _log_normaliser(n - 1, d, bandwidth)).to(support.dtype)


def leave_one_out_bandwidth(support: Tensor, *, working_memory: int = WORKING_MEMORY) -> float:
    """Bandwidth that maximises the mean leave-one-out log density, also known as likelihood cross-validation.

    A grid of 16 bandwidths, from a sixteenth of Scott's to four times Scott's, finds the hill, where there are many
    rows by some 512 of them against the rest. Parabolas through leave-one-out passes over all rows, four of them as a
    rule, then find its top to about 0.1 %. Where all rows are duplicated the likelihood grows without bound as the
    bandwidth goes to zero, each row being a perfect prediction of its twin: the answer is a sixteenth of Scott's.

    Parameters
    ----------
    support : Tensor of shape (n_samples, d)
        Whitened rows, finite, at least two.
    working_memory : int, default=64 MiB
        As in `leave_one_out`.

    Returns
    -------
    float
        The bandwidth, the same for the same rows.

    Raises
    ------
    ValueError
        If there are fewer than two rows.

    References
    ----------
    .. [1] R. P. W. Duin, "On the choice of smoothing parameters for Parzen estimators of probability density
       functions", IEEE Transactions on Computers C-25, 1976, :doi:`10.1109/TC.1976.1674577`.
    """
    n, d = support.shape

    @cache
    def mean_left_out(log_h: float) -> float:
        return float(leave_one_out(support, math.exp(log_h), working_memory=working_memory).double().mean())

    is_held_out = torch.arange(n, device=support.device) % max(1, n // 512) == 0
    held_out, rest = support[is_held_out], support[~is_held_out]

    def mean_held_out(log_h: float) -> float:
        return float(log_density(held_out, rest, math.exp(log_h), working_memory=working_memory).double().mean())

    low, high = math.log(scott_bandwidth(n, d) / 16), math.log(scott_bandwidth(n, d) * 4)
    step = (high - low) / 15
    middle = _peak([low + step * i for i in range(16)], mean_held_out if n >= 2048 else mean_left_out)
    points = [middle - step / 3, middle, middle + step / 3]
    while (best := max(points, key=mean_left_out)) in (points[0], points[-1]) and low < best < high:
        points = sorted([*points, 2 * best - points[1 if best == points[0] else -2]])
    points = sorted({*points, _peak(points, mean_left_out)})
    return math.exp(min(max(_peak(points, mean_left_out), low), high))


def _peak(points: list[float], objective: Callable[[float], float]) -> float:
    """Top of the parabola through the best of the sorted points and its neighbours; an end where that is the best."""
    values = [objective(x) for x in points]
    i = max(range(len(points)), key=values.__getitem__)
    if i in (0, len(points) - 1):
        return points[i]
    left, right = points[i] - points[i - 1], points[i + 1] - points[i]
    fall_left, fall_right = values[i] - values[i - 1], values[i] - values[i + 1]
    if fall_left == fall_right == 0:
        return points[i]
    return points[i] + (right**2 * fall_left - left**2 * fall_right) / (right * fall_left + left * fall_right) / 2


def _is_little(m: int, support: Tensor) -> bool:
    """Tell whether so many queries are fewer than pay for more than `_small_log_sums`."""
    n, d = support.shape
    # A few queries do not repay the copy of all rows that `_kernels` makes.
    return support.is_cpu and (m * n * (d + 16) < 2**22 or (m <= 8 and m * n <= 2**20))


def _small_log_sums(queries: Tensor, support: Tensor, bandwidth: float, *, leave_one_out: bool = False) -> Tensor:
    """As `_direct_log_sums`, for little work: in the calling thread, as to wake others may take milliseconds."""
    # NumPy and SciPy have no threads for this; torch, whose exp2 is faster, has some only for more numbers at once.
    distances = cdist(_in_numpy(queries), _in_numpy(support), "sqeuclidean")
    if leave_one_out:
        np.fill_diagonal(distances, np.inf)
    factor = -0.5 * _scale(bandwidth) ** 2
    nearest = distances.min(1)
    distances -= (nearest if nearest.max(initial=0.0) < np.inf else np.where(nearest < np.inf, nearest, 0.0))[:, None]
    distances *= factor
    exponents = distances.reshape(-1)
    for start in range(0, len(exponents), 2**14):
        torch.from_numpy(exponents[start : start + 2**14]).exp2_()
    # No sum is under 1, but where the squares of all distances overflow: so does the result.
    return torch.from_numpy((np.log2(np.maximum(distances.sum(1), 1.0)) + factor * nearest) * math.log(2))


def _in_numpy(x: Tensor) -> NDArray[np.float64]:
    if x.dtype == torch.bfloat16:  # which NumPy does not have
        x = x.float()
    return x.detach().numpy().astype(np.float64, copy=False)


def _is_for_triton(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _compiled_sums(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """Return `exp2_sums` in code for the device: by Triton on GPUs and anywhere in its interpreter, by LLVM on CPUs."""
    by_triton = _is_for_triton(device)
    if not by_triton and device.type != "cpu":
        return None
    exp2_sums: Callable[..., Tensor]
    try:
        if by_triton:
            from dfkde_sklearn._triton import exp2_sums
        else:
            from dfkde_sklearn._llvm import exp2_sums
    except ImportError:
        return None
    one_row = torch.zeros(1, 3, dtype=dtype, device=device)
    try:
        exp2_sums(one_row, one_row)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: a missing compiler, an unknown processor, memory that may not be run
        warnings.warn(
            f"{'Triton' if by_triton else 'LLVM'} cannot build the code for densities in {dtype} on {device}: "
            f"{error.__cause__ or error}. PyTorch computes the same more slowly.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return exp2_sums


def _log_normaliser(n: int, d: int, bandwidth: float) -> float:
    return math.log(n) + d * math.log(bandwidth) + 0.5 * d * math.log(2 * math.pi)


def _computing_dtype(rows: Tensor) -> torch.dtype:
    if rows.dtype == torch.float64:
        return torch.float64
    # Any setting but this lets torch round factors of float32 to TF32 or bfloat16: errors of 0.01 to 0.2 nats.
    try:
        is_exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # raised where backends were set one by one, other than to "ieee"
        is_exact = False
    return torch.float32 if is_exact else torch.float64


class _Kernels(NamedTuple):
    """The support as the right-hand factor of inner products."""

    rows: Tensor  # (n, d + 2): -|k|^2 / 2, k, 1. In this order partial sums stay small, and float32 loses half as much.
    centre: Tensor  # (d,)
    scale: float

    @property
    def reach(self) -> float:
        return _FLOAT32_REACH if self.rows.dtype == torch.float32 else math.inf

    def standardised(self, x: Tensor) -> Tensor:
        return (x.double() - self.centre).mul_(self.scale)


def _kernels(run: Run, support: Tensor, bandwidth: float, dtype: torch.dtype) -> _Kernels:
    n, d = support.shape
    # Distances are the same about any centre. One amid the rows keeps norms, and so rounding, small; the median stays
    # there whatever a few rows do.
    centre = _sample(support).double().median(0).values
    kernels = _Kernels(support.new_empty(n, d + 2, dtype=dtype), centre, _scale(bandwidth))

    def fill(part: tuple[Tensor, Tensor]) -> None:
        x, rows = part
        rows[:, 1:-1] = kernels.standardised(x)
        rows[:, 0] = -_half_square_norms(rows[:, 1:-1])
        rows[:, -1] = 1

    run(fill, zip(_blocks(support), _blocks(kernels.rows), strict=True))
    return kernels


def _scale(bandwidth: float) -> float:
    return math.sqrt(math.log2(math.e)) / bandwidth


def _sample(rows: Tensor, n: int = 128) -> Tensor:
    return rows[:: -(-len(rows) // n)]


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(2**13 if rows.is_cpu else 2**17)


def _half_square_norms(z: Tensor) -> Tensor:
    return z.double().square().sum(1) / 2


def _is_near(run: Run, queries: Tensor, kernels: _Kernels) -> Tensor:
    near = torch.empty(len(queries), dtype=torch.bool, device=queries.device)

    def fill(part: tuple[Tensor, Tensor]) -> None:
        x, is_near = part
        is_near.copy_(_half_square_norms(kernels.standardised(x)) <= kernels.reach)

    run(fill, zip(_blocks(queries), _blocks(near), strict=True))
    return near


def _log_sums(run: Run, queries: Tensor, index: Tensor, kernels: _Kernels, working_memory: int) -> Tensor:
    """Log of the sum of all kernels at each of the queries that `index` names; NaN where that is out of reach."""
    rows, m = kernels.rows, len(index)
    exp2_sums, size, leaves_out = _way(rows, working_memory)
    n_shares = 1
    if rows.is_cpu and not leaves_out:
        # Few queries against many rows are shared out by rows as well, alike for any number of threads.
        n_shares = max(1, min(64 * size // max(1, m), min(size, m) * len(rows) // _PAIRS_A_SHARE))
    shares = rows.split(-(-len(rows) // n_shares))
    sample = _sample(rows, max(1, min(128, len(rows) // 32)))  # a small part of the work
    q = rows.new_ones(m, rows.shape[1])
    sums = torch.empty(len(shares), m, dtype=torch.float64, device=rows.device)
    lifts, half_norms, log_sums = (torch.empty_like(sums[0]) for _ in range(3))

    def prepare(block: slice) -> None:
        q[block, 1:-1] = kernels.standardised(queries[index[block]])
        half_norms[block] = _half_square_norms(q[block, 1:-1])
        # The largest exponent over a sample of the support becomes 0: no sum is under 1 then, and few overflow.
        q[block, -1] = 0
        lifts[block] = lift = product(q[block], sample.T).amax(1)
        q[block, -1] = -lift

    def add(item: tuple[int, int]) -> None:
        start, share = item
        sums[share, start : start + size] = exp2_sums(q[start : start + size], shares[share])

    def finish(block: slice) -> None:
        total = sums[:, block].sum(0)
        log2_sum = total.log2() + lifts[block] - half_norms[block]
        in_reach = (total >= 0.5) & total.isfinite() & _is_exact(kernels, log2_sum, half_norms[block])
        log_sums[block] = torch.where(in_reach, log2_sum * math.log(2), torch.nan)

    run(prepare, _slices(m, size))
    run(add, [(start, share) for start in range(0, m, size) for share in range(len(shares))])
    run(finish, _slices(m, _FINISHED_AT_ONCE))
    return log_sums


class _Way(NamedTuple):
    """A way to compute the sums of kernels.

    exp2_sums : function of queries and rows, as in `_llvm`.
    size : int, queries to give it at a time.
    leaves_out : bool, whether it can leave out one row for each query, as in `_triton`, instead of adding to `of_rows`.
    """

    exp2_sums: Callable[..., Tensor]
    size: int
    leaves_out: bool


def _way(rows: Tensor, working_memory: int) -> _Way:
    of_thread = working_memory // torch.get_num_threads() if rows.is_cpu else working_memory
    exp2_sums = _compiled_sums(rows.device, rows.dtype)
    if exp2_sums is None:
        elements = max(1, min(_TILE_QUERIES * _TILE_ROWS, of_thread // 8) if rows.is_cpu else of_thread // 8)
        return _Way(Tiles(rows, elements), min(_TILE_QUERIES, elements), leaves_out=False)
    # A query takes its exponents at the sample, and some copies of itself.
    size = of_thread // (8 * (128 + 4 * rows.shape[1]))
    by_triton = _is_for_triton(rows.device)
    return _Way(exp2_sums, max(1, min(size, 2**16 if by_triton else _QUERIES)), leaves_out=by_triton)


def _is_exact(kernels: _Kernels, log2_sum: Tensor, half_norms: Tensor) -> Tensor:
    # An exponent is a difference of numbers as large as |q|^2 / 2: what cancels must not matter in the result.
    cancelled = half_norms * 2.0**-50
    return (half_norms <= kernels.reach) & (cancelled <= 2e-11 * log2_sum.abs().clamp_min(1))


def _direct_log_sums(
    run: Run, queries: Tensor, support: Tensor, bandwidth: float, working_memory: int, own: Tensor | None = None
) -> Tensor:
    """As `_log_sums`, by differences and the largest exponent of all: for what is out of reach of products.

    `own` names a support row for each query, whose kernel is left out.
    """
    support = support.double().contiguous()
    log_sums = torch.empty(len(queries), dtype=torch.float64, device=queries.device)
    of_thread = min(working_memory // torch.get_num_threads(), 2**21) if support.is_cpu else working_memory
    size = max(1, of_thread // (8 * len(support)))

    def fill(start: int) -> None:
        block = slice(start, start + size)
        distances = torch.cdist(queries[block].double(), support, compute_mode="donot_use_mm_for_euclid_dist")
        exponents = distances.mul_(_scale(bandwidth)).square_().mul_(-0.5)
        if own is not None:
            exponents.scatter_(1, own[block, None], -torch.inf)
        lift = exponents.amax(1)
        exponents.sub_(lift[:, None]).exp2_()
        # In parts, as torch shares out the sum of one long row among its threads, and rounds it by their number.
        total = sum(part.sum(1) for part in exponents.split(2**14, dim=1))
        # Where the square of a distance overflows, so does the result.
        log_sums[block] = torch.where(lift == -torch.inf, lift, (total.log2() + lift) * math.log(2))

    run(fill, range(0, len(queries), size))
    return log_sums


def _leave_one_out_log_sums(run: Run, kernels: _Kernels, working_memory: int) -> Tensor:
    """As `_log_sums`, for the support itself without each row's own kernel; a power serves both of its rows."""
    rows, n = kernels.rows, len(kernels.rows)
    # Two rows can share a power only under the same lift: one that uses the range of floating point to its top.
    lift = 960.0 if rows.dtype == torch.float64 else 64.0
    window = torch.finfo(rows.dtype)
    exp2_sums, size, leaves_out = _way(rows, working_memory)
    if not leaves_out:  # a tile holds the pairs within a block
        size = min(size, _QUERIES // 2, max(1, math.isqrt(working_memory // (8 * torch.get_num_threads()))))
    n_shares = min(32, -(-n // size))
    sums = torch.zeros(n_shares, n, dtype=torch.float64, device=rows.device)
    log_sums = torch.empty_like(sums[0])

    def add(share: int) -> None:
        for start in range(share * size, n, n_shares * size):
            q = rows[start : start + size].clone()
            stop = start + len(q)
            q[:, -1] = q[:, 0] + lift
            q[:, 0] = 1
            if leaves_out:
                sums[share, start:stop] = exp2_sums(q, rows, own=start)
                continue
            own = (q @ rows[start:stop].T).fill_diagonal_(-torch.inf).exp2_()
            sums[share, start:stop] += own.sum(1)
            sums[share, start:stop] += exp2_sums(q, rows[stop:], sums[share, stop:])

    def finish(block: slice) -> None:
        total = sums[:, block].sum(0)
        log2_sum = total.log2() - lift
        is_whole = (total * window.eps > n * window.tiny) & total.isfinite()
        in_reach = is_whole & _is_exact(kernels, log2_sum, -rows[block, 0])
        log_sums[block] = torch.where(in_reach, log2_sum * math.log(2), torch.nan)

    run(add, range(n_shares))
    run(finish, _slices(n, _FINISHED_AT_ONCE))
    return log_sums


def _running(device: torch.device, n_pairs: int) -> Run:
    """Return what runs tasks for so many pairs: single cores; a loop for few, and off the CPU."""
    is_much = device.type == "cpu" and n_pairs >= _SHARED_PAIRS
    return run_on_single_cores(n_pairs // _PAIRS_A_SHARE) if is_much else run_in_turn
