"""Reading streams of events in tests."""

from __future__ import annotations

import json
from typing import Any


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream, whose last one has to be ``[DONE]``."""
    *found, last, end = text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    assert all(item.startswith("data: ") for item in found)
    return [json.loads(item[6:]) for item in found]
