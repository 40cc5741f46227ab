"""What tells two answers apart, for LangChain's cache, which compares texts."""

from __future__ import annotations

import hashlib
import itertools
import threading
import uuid
import weakref
from typing import Any

_PROCESS = uuid.uuid4().hex[:12]
_COUNTER = itertools.count()
_NUMBERS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def callable_name(function: object) -> str:
    """Return a text that no other callable or object has, in this process or another.

    The address that ``repr`` prints will not do: it is given to another function once the first
    is gone, and a cache that outlives the process would mix both up.
    """
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    module = getattr(function, "__module__", type(function).__module__)
    # A bound method is a new object each time it is read; its object and its name are it.
    subject = function if owner is None else owner
    try:
        with _LOCK:
            number = _NUMBERS.get(subject)
            if number is None:
                number = _NUMBERS[subject] = next(_COUNTER)
    except TypeError:  # not hashable, or not to be held weakly: never equal, so never cached
        number = next(_COUNTER)
    return f"{module}.{name}#{_PROCESS}-{number}"


def digest(fingerprint: object) -> str | None:
    """Return a short text for a fingerprint; None for none."""
    if not fingerprint:
        return None
    return hashlib.sha256(repr(fingerprint).encode()).hexdigest()[:16]
