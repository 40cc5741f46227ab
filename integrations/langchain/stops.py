"""Stop strings of an object and of a call."""

from __future__ import annotations

from typing import Any


def merged_stop(*given: Any) -> list[str] | None:
    """Return the strings of all that is given, each once; None for none."""
    merged: list[Any] = []
    for strings in given:
        if isinstance(strings, (list, tuple, set, frozenset)):
            merged.extend(strings)
        elif strings is not None:  # one string; anything else is for SamplingParams to refuse
            merged.append(strings)
    try:
        return list(dict.fromkeys(merged)) or None
    except TypeError:  # not hashable, so no string, which SamplingParams refuses
        return merged
