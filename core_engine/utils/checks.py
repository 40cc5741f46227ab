"""Checks of values that users write: each names the field, the value and what would be right."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping

from quire.errors import InvalidRequestError

_MOST_SHOWN = 200
_LARGEST = 2**63 - 1
"""Most that an integer without a bound of its own may be: messages and arrays can hold it."""


def refuse(name: str, value: object, expected: str) -> InvalidRequestError:
    """Return the error for a value that is not what was expected; to be raised by the caller."""
    return InvalidRequestError(f"{name} must be {expected}, got {shown(value)}")


def shown(value: object) -> str:
    """Return a value as a message shows it: its repr, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits has none, other objects may fail too
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def described(error: BaseException) -> str:
    """Return an exception's type and what it says, if it can say it."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # somebody else wrote its class
        return type(error).__name__


def integer(name: str, value: object, expected: str, low: int, high: int | None = None) -> int:
    """Return ``value`` as an int in [low, high]; a bool or a float is not taken for one.

    Without ``high``, it may be as large as 64 bits hold.
    """
    try:
        whole = operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # arrays and tensors have the method, and it is not for all of them
        raise refuse(name, value, expected) from None
    if isinstance(value, bool):
        raise refuse(name, value, expected)
    if whole < low or (high is not None and whole > high):
        raise refuse(name, value, expected)
    if whole > _LARGEST and high is None:
        raise refuse(name, value, f"{expected}, and at most 2**63 - 1")
    return whole


def number(name: str, value: object, expected: str, valid: Callable[[float], bool]) -> float:
    """Return ``value`` as a finite float for which ``valid`` holds; a bool is not taken for one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise refuse(name, value, expected)
    try:
        real = float(value)
    except OverflowError:
        real = math.inf
    if not math.isfinite(real) or not valid(real):
        raise refuse(name, value, expected)
    return real


def flag(name: str, value: object) -> bool:
    """Return ``value``, which has to be a bool."""
    if not isinstance(value, bool):
        raise refuse(name, value, "True or False")
    return value


def strings(name: str, value: object) -> list[str]:
    """Return a list of non-empty strings: a lone string is a list of one, None of none."""
    if value is None:
        return []
    items = [value] if isinstance(value, str) else _items(value)
    if items is None or not all(isinstance(item, str) and item for item in items):
        raise refuse(name, value, "a non-empty string or a list of non-empty strings")
    return [item for item in items if isinstance(item, str)]


def token_ids(name: str, value: object) -> list[int]:
    """Return a list of ints that may be token ids: None is a list of none."""
    if value is None:
        return []
    items = _items(value)
    if items is None:
        raise refuse(name, value, "a list of token ids (integers >= 0)")
    return [integer(f"each id of {name}", item, "an integer >= 0", 0) for item in items]


def _items(value: object) -> list[object] | None:
    """Return what a list, or something like it, has in it."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        return None
    try:
        return list(value)
    except TypeError:  # an array of no dimension
        return None
