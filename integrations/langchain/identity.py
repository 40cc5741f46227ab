"""What tells two answers apart, for LangChain's cache, which compares texts."""

from __future__ import annotations

import hashlib
import itertools
import threading
import uuid
import weakref
from typing import Any

from quire.integrations.engines import folder_fingerprint

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


def adapter_name(lora_request: Any) -> dict[str, Any] | str | None:
    """Return what tells one adapter from another: its names and the state of its files."""
    if lora_request is None:
        return None
    names = ("lora_name", "lora_int_id", "lora_path")
    found = {name: getattr(lora_request, name, None) for name in names}
    if found["lora_path"] is None:
        return repr(lora_request)
    return {**found, "checkpoint": digest(folder_fingerprint(str(found["lora_path"])))}


def digest(fingerprint: object) -> str | None:
    """Return a short text for a fingerprint; None for none."""
    if not fingerprint:
        return None
    return hashlib.sha256(repr(fingerprint).encode()).hexdigest()[:16]
