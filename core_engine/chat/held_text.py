"""Texts that may be the beginning of a marker, and so have to wait."""

from __future__ import annotations


def beginning_of(marker: str, text: str) -> int:
    """Return where the text's end may be the beginning of a marker; its length if it is none.

    Parameters
    ----------
    marker : str
    text : str
        In which the marker itself does not stand.
    """
    at = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while at >= 0 and not marker.startswith(text[at:]):
        at = text.find(marker[0], at + 1)
    return len(text) if at < 0 else at
