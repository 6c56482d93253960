"""Bandwidths of kernels of whitened rows: two rules of thumb, and the one of highest leave-one-out likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from dfkde_sklearn._kernels.density import WORKING_MEMORY, leave_one_out, log_density


def scott_bandwidth(n: int, d: int) -> float:
    """Return Scott's factor for `n` rows in `d` dimensions: ``n ** (-1 / (d + 4))``, as SciPy has it."""
    return float(n) ** (-1.0 / (d + 4))


def silverman_bandwidth(n: int, d: int) -> float:
    """Return Silverman's factor: ``(n (d + 2) / 4) ** (-1 / (d + 4))``, as SciPy has it."""
    return (n * (d + 2) / 4.0) ** (-1.0 / (d + 4))


def leave_one_out_bandwidth(
    support: Tensor, *, left_out: Sequence[slice | Tensor] | None = None, working_memory: int = WORKING_MEMORY
) -> float:
    """Return the bandwidth of highest mean leave-one-out log density, by likelihood cross-validation.

    First the best of 16 bandwidths, from a sixteenth of Scott's to four times Scott's, is chosen; from 2048 rows on, by
    about 512 held-out rows that are scored under the others. Parabolas through leave-one-out passes over all rows,
    usually four of them, then give the maximum to about 0.1 %. If every row has a duplicate, the likelihood grows
    without bound as the bandwidth goes to zero, and the result is a sixteenth of Scott's.

    Parameters
    ----------
    support : Tensor of shape (n_samples, d)
        Whitened rows, finite, at least two.
    left_out : sequence of slice or Tensor, default=None
        Places of rows that are left out together, such as those of one fold of groups; None leaves out one row at a
        time.
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
        h = math.exp(log_h)
        if left_out is None:
            return float(leave_one_out(support, h, working_memory=working_memory).double().mean())
        total = 0.0
        for where in left_out:
            is_other = torch.ones(n, dtype=torch.bool, device=support.device)
            is_other[where] = False
            scores = log_density(support[where], support[is_other], h, working_memory=working_memory)
            total += float(scores.double().sum())
        return total / n

    is_held_out = torch.arange(n, device=support.device) % max(1, n // 512) == 0
    held_out, others = support[is_held_out], support[~is_held_out]

    def mean_held_out(log_h: float) -> float:
        return float(log_density(held_out, others, math.exp(log_h), working_memory=working_memory).double().mean())

    low, high = math.log(scott_bandwidth(n, d) / 16), math.log(scott_bandwidth(n, d) * 4)
    step = (high - low) / 15
    middle = _peak(
        [low + step * i for i in range(16)], mean_held_out if n >= 2048 and left_out is None else mean_left_out
    )
    points = [middle - step / 3, middle, middle + step / 3]
    while (best := max(points, key=mean_left_out)) in (points[0], points[-1]) and low < best < high:
        points = sorted([*points, 2 * best - points[1 if best == points[0] else -2]])
    points = sorted({*points, _peak(points, mean_left_out)})
    return math.exp(min(max(_peak(points, mean_left_out), low), high))


def _peak(points: list[float], objective: Callable[[float], float]) -> float:
    """Return the top of the parabola through the best of the sorted points and its neighbours, or the best end."""
    values = [objective(x) for x in points]
    i = max(range(len(points)), key=values.__getitem__)
    if i in (0, len(points) - 1):
        return points[i]
    left, right = points[i] - points[i - 1], points[i + 1] - points[i]
    fall_left, fall_right = values[i] - values[i - 1], values[i] - values[i + 1]
    if fall_left == fall_right == 0:
        return points[i]
    return points[i] + (right**2 * fall_left - left**2 * fall_right) / (right * fall_left + left * fall_right) / 2
