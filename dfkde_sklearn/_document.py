"""What an estimator is set to and has learnt, as values of JSON and back: for files that hold no code."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# JSON has lists only.
_TUPLE = "tuple"
# Every JSON reader keeps integers below.
_INTEGERS = 2**53

Check = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """Return whether a value is text."""
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def is_positive(value: Any) -> bool:
    """Return whether a value is a finite number above zero."""
    return is_number(value) and value > 0


def is_integer_from(minimum: int) -> Check:
    """Return a check for integers of at least `minimum` that every JSON reader keeps."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and minimum <= value < _INTEGERS


def is_one_of(*allowed: Any) -> Check:
    """Return a check for a few allowed values."""
    return lambda value: isinstance(value, str) and value in allowed


def is_list_of(is_item: Check) -> Check:
    """Return a check for lists, every item of which passes a check."""
    return lambda values: isinstance(values, list) and all(map(is_item, values))


def is_tuple_of(is_item: Check, length: int) -> Check:
    """Return a check for tuples of `length` items, each of which passes a check."""
    return lambda values: isinstance(values, tuple) and len(values) == length and all(map(is_item, values))


def as_json(values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return values as JSON has them.

    Parameters
    ----------
    values : mapping
        Parameters or fitted attributes by name.
    owner : str
        Name of the estimator that they are of.

    Returns
    -------
    dict
        Of the types that JSON has; a tuple is a dictionary with one key. A generator of random numbers becomes None.

    Raises
    ------
    TypeError
        If a value is of a type that JSON lacks; the message names it.
    """
    plain = {}
    for name, value in values.items():
        if isinstance(value, np.random.RandomState):
            value = None
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, np.generic):
            value = value.item()
        elif isinstance(value, tuple):
            value = {_TUPLE: list(value)}
        try:
            plain[name] = json.loads(json.dumps(value))
        except TypeError as error:
            raise TypeError(
                f"{owner}: {name}={value!r} cannot be saved: a {type(value).__name__}. Use joblib.dump, or plain "
                "parameters."
            ) from error
    return plain


def from_json(text: str | bytes) -> Any:
    """Return the values in a JSON text, with its tuples."""
    return json.loads(text, object_hook=lambda found: tuple(found[_TUPLE]) if found.keys() == {_TUPLE} else found)


def checked_parameters(given: Any, kind: type, excluded: tuple[str, ...]) -> dict[str, Any]:
    """Return the constructor's parameters in a document.

    Parameters
    ----------
    given : mapping
        Parameters by name.
    kind : type
        The class whose constructor takes them.
    excluded : tuple of str
        Parameters that a document may not set.

    Returns
    -------
    dict
        A copy.

    Raises
    ------
    ValueError
        If there is one that the constructor does not take, that is excluded, or that is too large an integer.
    """
    unknown = dict(given).keys() - (inspect.signature(kind).parameters.keys() - set(excluded))
    if unknown:
        raise ValueError(f"{kind.__name__} takes no {', '.join(sorted(map(str, unknown)))} from a file")
    for name, value in given.items():
        if isinstance(value, int) and abs(value) >= _INTEGERS:
            raise ValueError(f"{name} of {kind.__name__} is an integer of {value.bit_length()} bits, which cannot be")
    return dict(given)


def set_fitted(estimator: Any, given: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Set the fitted attributes of an estimator from a document.

    Parameters
    ----------
    estimator : estimator
        Is changed in place.
    given : mapping
        Values by attribute.
    checks : mapping
        For each attribute that a fitted estimator has, whether a value is allowed.

    Raises
    ------
    ValueError
        If an attribute is missing, unknown, or of a value that is not allowed.
    """
    owner = type(estimator).__name__
    for attribute, value in given.items():
        if attribute not in checks:
            raise ValueError(f"{attribute!r} is not a fitted attribute of {owner}")
        if not checks[attribute](value):
            raise ValueError(f"the {attribute} of {owner} is {value!r:.80}, which cannot be")
        setattr(estimator, attribute, value)
    missing = checks.keys() - given.keys()
    if missing:
        raise ValueError(f"{owner} lacks {', '.join(sorted(missing))}")
