"""Groups of training rows: what is left out of a fit together, since it shows the same part."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.utils import column_or_1d
from torch import Tensor

from dfkde_sklearn._density.folds import copies

# Entries of a table in a block, so that its copies take little memory.
_ENTRIES = 2**21


def with_copies(groups: Any, table: NDArray[np.number]) -> Tensor:
    """Return the number of the group of each row of a table (n, n_features), (n,), int64.

    Exact copies are in one group wherever they stand, and so are all groups that share a copy. The number of a group is
    the place of its first row.

    Parameters
    ----------
    groups : array-like of shape (n,) or None
        Labels, of any kind that can be compared. None: each row on its own, except for copies.
    table : ndarray of shape (n, n_features)

    Raises
    ------
    ValueError
        If there is not one label for each row, a label is missing, or all rows are one group.
    """
    copied = copies(table)
    if groups is None:
        return copied
    labels = group_numbers(groups, len(table))
    # A graph of rows: each is tied to the first row of its group, and to the first of its copies.
    rows = np.arange(len(table))
    _, first, of_row = np.unique(labels, return_index=True, return_inverse=True)
    ends = np.concatenate([first[of_row], copied.numpy()])
    ties = coo_array((np.ones(2 * len(rows), np.int8), (np.tile(rows, 2), ends)), shape=(len(rows), len(rows)))
    n_groups, component = connected_components(ties, directed=False)
    if n_groups == 1:
        raise ValueError(
            f"groups: all {len(table)} rows are one group, so that none can be scored by a fit without its group. Give "
            "good examples of at least two parts, or leave groups out if the label is not that of a part."
        )
    _, first, of_row = np.unique(component, return_index=True, return_inverse=True)
    return torch.from_numpy(first[of_row].astype(np.int64))


def group_numbers(groups: Any, n: int) -> NDArray[np.int64]:
    """Return the labels of groups as numbers (n,), in the order of their first rows."""
    values = column_or_1d(np.asarray(groups))
    if len(values) != n:
        raise ValueError(f"groups has {len(values)} labels, and X has {n} rows or images. Give one for each.")
    missing = [i for i, value in enumerate(values.tolist()) if value is None or value != value]
    if missing:
        raise ValueError(
            f"groups[{missing[0]}] is {values[missing[0]]}: {len(missing)} of {n} labels are missing. Give each row a "
            "label; one that is alone has a label of its own."
        )
    number: dict[Any, int] = {}
    return np.array([number.setdefault(value, len(number)) for value in values.tolist()], dtype=np.int64)


# Near-duplicates are looked for among this many rows, against all others, and for no more than this many products.
_QUERIES = 300
_MAX_PRODUCTS = 10**9
# The neighbours whose distances say how rows lie, and the fewest rows for which they do.
_NEIGHBOURS = (10, 30)
_MIN_ROWS = 40
# A nearest neighbour that is this improbably near is a near-duplicate. Independently drawn rows have as many by chance;
# on 8 categories of MVTec AD, on solar cells and on random rows it was at most twice as many.
_P_VALUE = 0.01
_LARGEST_SHARE, _FEWEST = 0.05, 5


def share_of_near_duplicates(table: NDArray[np.number]) -> float:
    """Return the share of rows of a table (n, n_features) that have a near-duplicate; 0 where it cannot be told.

    A near-duplicate lies improbably near, given how far away the row's 10th to 30th neighbours are: their distances
    determine the dimension in which rows lie [1]_, and with it the distribution of the nearest one. The result is the
    share in excess of what chance gives.

    References
    ----------
    .. [1] Levina and Bickel (2004), Maximum likelihood estimation of intrinsic dimension, Advances in Neural
       Information Processing Systems 17
    """
    rows = np.flatnonzero(copies(table).numpy() == np.arange(len(table)))
    n = len(rows)
    if n < _MIN_ROWS:
        return 0.0
    queries = np.linspace(0, n - 1, min(_QUERIES, n, max(50, _MAX_PRODUCTS // table[0].size // n))).astype(np.int64)
    low, high = min(_NEIGHBOURS[0], n // 4), min(_NEIGHBOURS[1], n // 2)
    nearest = np.sort(_distances(table, rows, queries), axis=1)[:, 1 : high + 1]  # without the row itself
    radius = nearest[:, -1:]
    is_proper = nearest[:, 0] > 0
    if not is_proper.any():
        return 0.0
    nearest, radius = nearest[is_proper], radius[is_proper]
    # The logarithm of the ratio of the distances of the k-th and the j-th neighbour has this mean, over the dimension.
    expected = sum(1 / i for j in range(low, high) for i in range(j, high))
    observed = float(np.log(radius / nearest[:, low - 1 : -1]).mean(0).sum())
    if not observed > 0:
        return 0.0
    nearer = (nearest[:, 0] / radius[:, 0]) ** (expected / observed)
    p_values = 1 - (1 - nearer) ** (high - 1)
    n_found = int((p_values < _P_VALUE).sum())
    return n_found / len(queries) if n_found >= max(_FEWEST, _LARGEST_SHARE * len(queries)) else 0.0


def warn_of_near_duplicates(table: NDArray[np.number], what: str) -> None:
    """Warn if many rows of a table have a near-duplicate; `what` is what they are called."""
    share = share_of_near_duplicates(table)
    if share:
        warnings.warn(
            f"About {share:.0%} of the {len(table)} training {what} are near-duplicates of others, as far as their "
            "features tell: several seem to show one part. The threshold then does not hold for new parts. Say which "
            "show the same part: fit(X, groups=...), or dfkde fit --groups.",
            UserWarning,
            stacklevel=5,
        )


def _distances(table: NDArray[np.number], rows: NDArray[np.int64], queries: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the distances of some of the rows to all, in units of the standard deviation of each feature."""
    chosen = table[rows[queries]].astype(np.float64)
    largest = max(float(np.abs(chosen).max()), float(np.finfo(np.float64).tiny))
    centre = chosen[0] / largest
    deviations = (chosen / largest).std(0)
    scale = np.where(deviations > 0, deviations, 1.0)

    def in_units(values: NDArray[np.number]) -> NDArray[np.float64]:
        return (values / largest - centre) / scale

    # Rows that lie farther out than the largest number are at no finite distance.
    with np.errstate(over="ignore", invalid="ignore"):
        chosen = in_units(chosen)
        squares = (chosen**2).sum(1)[:, None]
        distances = np.empty((len(queries), len(rows)))
        step = max(1, _ENTRIES // table.shape[1])
        for start in range(0, len(rows), step):
            block = in_units(table[rows[start : start + step]])
            distances[:, start : start + step] = squares + (block**2).sum(1) - 2 * chosen @ block.T
        # What differs by rounding only is at no distance.
        distances[distances < 1e-12 * squares] = 0.0
        return np.nan_to_num(np.sqrt(distances), nan=np.inf)
