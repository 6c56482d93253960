"""What a detector is given: whether it is a feature matrix or images, and a matrix as tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn import get_config
from torch import Tensor
from torch.utils.data import Dataset

from dfkde_sklearn._inputs import ENCODED, is_stream

# Entries of a table checked at a time, so that their copies take little memory.
_ENTRIES = 2**20


def is_matrix(X: Any) -> bool:
    """Return whether X is a feature matrix and not images; scikit-learn's validation may still refuse it."""
    if isinstance(X, (str, PathLike, *ENCODED)) or is_stream(X):
        return False
    if isinstance(X, list | tuple):
        first = X[0] if X else None
        return not (isinstance(first, (str, PathLike, *ENCODED)) or depth(first) >= 2)
    if isinstance(X, Dataset) or (hasattr(X, "column_names") and hasattr(X, "features")):
        return False  # a data set of torch or of Hugging Face
    if hasattr(X, "to_pylist") and not hasattr(X, "column_names"):
        return False  # an Arrow array: scikit-learn takes no matrix of one dimension
    if hasattr(X, "columns") and hasattr(X, "shape") and len(X.columns) == 1:
        return is_matrix(X[X.columns[0]])
    if depth(X) >= 3:
        return False
    if depth(X) == 0 and hasattr(X, "__getitem__") and hasattr(X, "__len__") and len(X) and not hasattr(X, "__array__"):
        return is_matrix([X[0]])  # such as a column of Hugging Face
    if depth(X) == 1 and hasattr(X, "dtype") and not issparse(X):
        values = np.asarray(X)
        return values.dtype.kind in "biufc" or is_matrix(list(values))
    return True


def is_of_numbers(table: NDArray[Any]) -> bool:
    """Return whether an array can stay as it is until blocks of its rows are converted to float64."""
    return table.dtype.kind in "biuf" and table.dtype.itemsize <= 8 and table.dtype.isnative


def blocks(table: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Return the rows of a table in blocks, so that arrays computed from a block take little memory."""
    size = max(1, _ENTRIES // max(1, table.shape[1]))
    return (table[start : start + size] for start in range(0, len(table), size))


def floats(table: NDArray[Any]) -> NDArray[np.floating]:
    return table if table.dtype in (np.float64, np.float32) else table.astype(np.float64)


def depth(X: Any) -> int:
    """Return the number of dimensions of an array, or of nested sequences by their first elements."""
    if hasattr(X, "ndim"):
        return int(X.ndim)
    if hasattr(X, "shape"):
        return len(X.shape)
    if hasattr(X, "__array_interface__"):  # a PIL image
        return len(X.__array_interface__["shape"])
    if isinstance(X, list | tuple) and X:
        return 1 + depth(X[0])
    return 0


def tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return a tensor that shares the memory of `array` where it can; it is never written to."""
    # torch refuses steps backwards, and steps of part of a number, as columns of structured arrays have.
    if any(step < 0 or step % array.itemsize for step in array.strides):
        array = array.copy()
    if array.flags.writeable:
        return torch.from_numpy(array).to(device)
    with warnings.catch_warnings():
        # Read-only arrays (memory maps from joblib) are fine: nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).to(device)


def working_memory() -> int:
    """Return scikit-learn's bound on temporary memory, in bytes."""
    return int(get_config()["working_memory"] * 2**20)
