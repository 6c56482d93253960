"""Groups of training rows: what is left out of a fit together, since it shows the same part."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.utils import column_or_1d
from torch import Tensor

from dfkde_sklearn._density.folds import copies


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
