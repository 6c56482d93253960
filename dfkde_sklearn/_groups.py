"""Groups of training rows: what is left out of a fit together, since it shows the same part."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dfkde_sklearn._callbacks import N_CALLS
from dfkde_sklearn._density.eigen import leading_eigenpairs
from dfkde_sklearn._density.folds import N_FOLDS, copies, fold_places
from dfkde_sklearn._density.stream import sampled_places
from dfkde_sklearn._inputs import is_missing
from dfkde_sklearn._threads import on_single_core

# In standard deviations; its square is a number still.
_FARTHEST = 1e100
# Entries of a table in a block, so that its copies take little memory.
_ENTRIES = 2**21
# Variances are rounding below this multiple of the largest one.
_ROUNDING = 1e-9


def with_copies(groups: Any, table: NDArray[np.number]) -> Tensor:
    """Return the number of the group of each row of a table (n, n_features), (n,), int64.

    Exact copies are in one group wherever they stand, and so are all groups that share a copy. The number of a group is
    the place of its first row.

    Parameters
    ----------
    groups : array-like of shape (n,) or None
        Labels: strings, numbers, or other keys of a dictionary. None: each row on its own, except for copies.
    table : ndarray of shape (n, n_features)

    Raises
    ------
    ValueError
        If there is not one label for each row, a label is missing, or all rows are one group.
    TypeError
        If labels cannot be keys of a dictionary.
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
    values = _given_labels(groups)
    if len(values) != n:
        raise ValueError(f"groups has {len(values)} labels, and X has {n} rows or images. Give one for each.")
    number: dict[Any, int] = {}
    try:
        return np.array([number.setdefault(value, len(number)) for value in values], dtype=np.int64)
    except TypeError as error:
        raise TypeError(
            f"groups has labels that are no keys of a dictionary ({error}). Give strings, numbers or tuples of them."
        ) from error


def group_labels(groups: Any) -> list[str]:
    """Return the labels of groups as text."""
    return [str(value) for value in _given_labels(groups)]


def _given_labels(groups: Any) -> list[Any]:
    """Return the labels as they are; raise a ValueError if one is missing."""
    values = _labels(groups)
    missing = [i for i, value in enumerate(values) if is_missing(value)]
    if missing:
        raise ValueError(
            f"groups[{missing[0]}] is {values[missing[0]]}: {len(missing)} of {len(values)} labels are missing. Give "
            "each row a label; one that is alone has a label of its own."
        )
    return values


def _labels(groups: Any) -> list[Any]:
    """Return the labels as they are: NumPy would make strings of numbers, and of NaN, beside strings."""
    if isinstance(groups, list | tuple):
        return [label.item() if isinstance(label, Tensor) else label for label in groups]
    if isinstance(groups, np.ma.MaskedArray):
        return _labels(groups.tolist())  # with None where it is masked
    array = np.asarray(groups)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(
            f"groups is a {type(groups).__name__} of shape {array.shape}; allowed is a sequence of n labels, "
            "one for each row or image."
        )
    return list(array)


def drawn_rows(n: int, max_samples: int | None, groups: Tensor | None, seed: int) -> NDArray[np.int64]:
    """Return the places of at most `max_samples` of `n` rows, increasing.

    With `groups` (n,), int64, whole groups are drawn, so that no row left out belongs to a group in the fit. A group of
    more than half of `max_samples` is never drawn.

    Raises
    ------
    ValueError
        If there is no room for two groups.
    """
    if max_samples is None or n <= max_samples:
        return np.arange(n)
    if groups is None:
        return sampled_places(n, max_samples, seed)
    _, of_row, sizes = np.unique(groups.numpy(), return_inverse=True, return_counts=True)
    # Any two of these have room.
    order = np.random.default_rng(seed).permutation(np.flatnonzero(sizes <= max_samples // 2))
    if len(order) < 2:
        raise ValueError(
            f"max_samples={max_samples} has no room for two whole groups: {n} rows are in {len(sizes)} groups, "
            f"the largest of {sizes.max()}. Raise max_samples to twice as many, or give fewer of each group."
        )
    chosen = order[np.cumsum(sizes[order]) <= max_samples]
    return np.flatnonzero(np.isin(of_row, chosen))


# Near-duplicates are looked for along this many principal axes, of this many rows or of so many products. All axes
# count alike: what differs most among all rows, such as the exposure, differs among photographs of one part as well.
_N_AXES = 32
_SAMPLE, _MAX_PRODUCTS = (200, 500), 4 * 10**9
# For this many rows, among all.
_QUERIES = 300
# The farthest neighbour whose distance says how rows lie is one of this part of the rows, within these bounds, and the
# first is a third as far. Parts photographed at any angle lie on a curve, which from farther away looks like many
# dimensions, in which their neighbours would be improbably near: fewer rows than these do not say how they lie.
_PART_OF_ROWS, _FARTHEST_NEIGHBOUR = 12, (12, 30)
_MIN_ROWS = 150
# A nearest neighbour that is this improbably near is a near-duplicate. Of independent rows less than 1 % have one; on
# 8 categories of MVTec AD at most 7 %, of photographs of magnetic tiles 50 to 96 %, depending on the features and the
# number of rows, and of solar cells 7 to 21 %: cells of one module look alike.
_P_VALUE = 0.01
_SMALLEST_SHARE, _FEWEST = 0.1, 5


def share_of_near_duplicates(table: NDArray[np.number], n_folds: int = N_FOLDS) -> float:
    """Return the share of rows of a table (n, n_features) with a near-duplicate in another fold; 0 if nearly none.

    A near-duplicate lies improbably near, given how far away the row's 11th to 30th neighbours are, of fewer than 360
    rows nearer ones: their distances determine the dimension in which rows lie [1]_, and with it the distribution of
    the nearest one. Neighbours in the row's own fold do no harm, and do not count. Groups of more than about ten rows,
    of five where there are 150, are not found if all of their rows are equally near.

    References
    ----------
    .. [1] Levina and Bickel (2004), Maximum likelihood estimation of intrinsic dimension, Advances in Neural
       Information Processing Systems 17
    """
    copied = copies(table)
    fold = np.empty(len(table), dtype=np.int64)
    for i, places in enumerate(fold_places(len(table), copied, n_folds)):
        fold[places] = i
    rows = np.flatnonzero(copied.numpy() == np.arange(len(table)))
    n = len(rows)
    if n < _MIN_ROWS:
        return 0.0
    high = min(max(n // _PART_OF_ROWS, _FARTHEST_NEIGHBOUR[0]), _FARTHEST_NEIGHBOUR[1])
    low = high // 3 + 1
    queries = _evenly_spaced(_QUERIES, n)
    nearest = _nearest_distances(_whitened(table, rows), queries, fold[rows], high)
    radius = nearest[:, -1:]
    is_proper = (nearest[:, low - 1] > 0) & np.isfinite(radius[:, 0])
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
    return n_found / len(queries) if n_found >= max(_FEWEST, _SMALLEST_SHARE * len(queries)) else 0.0


def warn_of_near_duplicates(table: NDArray[np.number], what: str, n_folds: int = N_FOLDS) -> None:
    """Warn if many rows of a table have a near-duplicate in another fold; `what` is what they are called."""
    # Small operations, between which threads of torch would wait for one another.
    share = on_single_core(share_of_near_duplicates, table, n_folds)
    if share:
        warnings.warn(
            f"About {share:.0%} of the {len(table)} training {what} have a near-duplicate elsewhere in X, as far as "
            "their features tell: several seem to show one part, or parts of one lot. The threshold then does not hold "
            "for new ones. Say which belong together: fit(X, groups=...), or dfkde fit --groups.",
            UserWarning,
            stacklevel=5 + N_CALLS,
        )


def _evenly_spaced(n_places: int, n: int) -> NDArray[np.int64]:
    return np.linspace(0, n - 1, min(n_places, n)).astype(np.int64)


def _whitened(table: NDArray[np.number], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return rows of a table on their first principal axes, with about equal variance along each, (n_rows, n_axes).

    Features count alike, whatever their units are. The axes are those of a sample of the rows.
    """
    fewest, most = _SAMPLE
    n_sampled = max(fewest, min(most, math.isqrt(_MAX_PRODUCTS // table.shape[1])))
    sample = table[rows[_evenly_spaced(n_sampled, len(rows))]].astype(np.float64)
    # In units of the largest deviation first, since squares of the largest numbers overflow.
    centre = sample[0]
    largest = np.abs(sample / 2 - centre / 2).max(0)
    largest[largest == 0] = 1.0
    sample = (sample / 2 - centre / 2) / largest
    mean, deviations = sample.mean(0), sample.std(0)
    deviations[deviations == 0] = np.inf
    sample = (sample - mean) / deviations
    n_axes = min(_N_AXES, len(sample) // 4, table.shape[1])
    is_wide = len(sample) <= table.shape[1]
    of_torch = torch.from_numpy(sample)
    products = of_torch @ of_torch.T if is_wide else of_torch.T @ of_torch
    pairs = leading_eigenpairs(products, n_axes)
    eigenvalues, vectors = (tensor.numpy() for tensor in pairs)
    is_axis = eigenvalues > _ROUNDING * eigenvalues[0]
    eigenvalues, vectors = eigenvalues[is_axis], vectors[:, is_axis]
    axes = _product(sample.T, vectors) / eigenvalues if is_wide else vectors / np.sqrt(eigenvalues)
    whitened = np.empty((len(rows), axes.shape[1]))
    step = max(1, _ENTRIES // table.shape[1])
    for start in range(0, len(rows), step):
        with np.errstate(over="ignore"):
            block = ((table[rows[start : start + step]] / 2 - centre / 2) / largest - mean) / deviations
        whitened[start : start + step] = _product(block.clip(-_FARTHEST, _FARTHEST, out=block), axes)
    return whitened


def _product(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matrix product by torch: a process that forks while NumPy's BLAS computes in a thread locks up."""
    return (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()


def _nearest_distances(
    points: NDArray[np.float64], queries: NDArray[np.int64], fold: NDArray[np.int64], n_nearest: int
) -> NDArray[np.float64]:
    """Return the increasing distances (n_queries, n_nearest) of some points to the nearest ones in other folds."""
    nearest, chosen = np.empty((len(queries), 0)), torch.from_numpy(points[queries])
    step = _ENTRIES // len(queries)
    for start in range(0, len(points), step):
        distances = torch.cdist(chosen, torch.from_numpy(points[start : start + step])).numpy()
        distances[fold[queries, None] == fold[start : start + step]] = np.inf
        nearest = np.hstack([nearest, distances])
        nearest = np.partition(nearest, min(n_nearest, nearest.shape[1]) - 1, axis=1)[:, :n_nearest]
    return np.sort(nearest, axis=1)
