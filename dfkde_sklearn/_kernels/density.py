"""The log density of rows under equal Gaussian kernels, and that of each row under the kernels of all the others.

All rows are whitened: each kernel is a round Gaussian of one bandwidth. The sums of kernels come from `sums`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, cast

import torch
from torch import Tensor

from dfkde_sklearn._kernels.sums import (
    direct_log_sums,
    is_in_range,
    kernel_factor,
    leave_one_out_log_sums,
    log_sums,
    running,
)

WORKING_MEMORY = 64 * 2**20  # bytes

_P = ParamSpec("_P")


def _in_available_memory(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Call the function again with half the `working_memory`, as often as the device runs out of memory."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        first = memory = cast(int, kwargs.get("working_memory", WORKING_MEMORY))
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
                        f"{first} bytes, and smaller ones down to {memory} bytes, were tried, beside a copy of the "
                        "rows. Free memory there, use device='cpu', or fit fewer rows (max_samples)."
                    ) from error
            # Outside the handler, where the error still holds all that was allocated.
            memory //= 2

    return wrapper


@_in_available_memory
def log_density(queries: Tensor, support: Tensor, bandwidth: float, *, working_memory: int = WORKING_MEMORY) -> Tensor:
    """Return the log density of each query under equal Gaussian kernels at the support rows.

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
    run = running(queries.device, len(queries) * len(support))
    log_normaliser = _log_normaliser(len(support), support.shape[1], bandwidth)
    # Without the masks below, for which torch wakes its threads, which may take milliseconds.
    if _is_cheaper_directly(len(queries), support):
        return (direct_log_sums(run, queries, support, bandwidth, working_memory) - log_normaliser).to(queries.dtype)
    out = torch.full((len(queries),), torch.nan, dtype=torch.float64, device=queries.device)
    # Each of three methods leaves NaN where it is not exact enough. The later ones are slower.
    if _computing_dtype(queries) == torch.float32:
        factor = kernel_factor(run, support, bandwidth, torch.float32)
        near = is_in_range(run, queries, factor).nonzero()[:, 0]
        out[near] = log_sums(run, queries, near, factor, working_memory)
    left = out.isnan().nonzero()[:, 0]
    if not _is_cheaper_directly(len(left), support):
        factor = kernel_factor(run, support, bandwidth, torch.float64)
        out[left] = log_sums(run, queries, left, factor, working_memory)
        left = out.isnan().nonzero()[:, 0]
    if len(left):
        out[left] = direct_log_sums(run, queries[left], support, bandwidth, working_memory)
    return (out - log_normaliser).to(queries.dtype)


@_in_available_memory
def leave_one_out(support: Tensor, bandwidth: float, *, working_memory: int = WORKING_MEMORY) -> Tensor:
    """Return the log density of each support row under the kernels of all the others.

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
    run = running(support.device, n * n)
    if _is_cheaper_directly(n, support):
        out = direct_log_sums(run, support, support, bandwidth, working_memory, own=torch.arange(n))
    else:
        factor = kernel_factor(run, support, bandwidth, _computing_dtype(support))
        n_near = int(is_in_range(run, support, factor).sum())
        # A far row is computed directly, which for more than a few costs more than float64 for all.
        if factor.rows.dtype == torch.float32 and n - n_near > n // 32:
            factor = kernel_factor(run, support, bandwidth, torch.float64)
        out = leave_one_out_log_sums(run, factor, working_memory)
        if len(left := out.isnan().nonzero()[:, 0]):
            out[left] = direct_log_sums(run, support[left], support, bandwidth, working_memory, own=left)
    return (out - _log_normaliser(n - 1, d, bandwidth)).to(support.dtype)


def _log_normaliser(n: int, d: int, bandwidth: float) -> float:
    return math.log(n) + d * math.log(bandwidth) + 0.5 * d * math.log(2 * math.pi)


def _is_cheaper_directly(m: int, support: Tensor) -> bool:
    """Return whether differences of `m` queries and all rows take less time than products with a copy."""
    n, d = support.shape
    return support.is_cpu and (m <= 8 or m * n * (d + 16) < 2**22)


def _computing_dtype(rows: Tensor) -> torch.dtype:
    if rows.dtype == torch.float64:
        return torch.float64
    # Any setting but this lets torch round factors of float32 to TF32 or bfloat16: errors of 0.01 to 0.2 nats.
    try:
        is_exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # raised where backends were set one by one, other than to "ieee"
        is_exact = False
    return torch.float32 if is_exact else torch.float64
