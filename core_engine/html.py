"""HTML for notebooks: a title and a small table, of text that nobody has checked."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_LONGEST = 400
"""Characters of a value that are shown."""

_CELL = "text-align: left; vertical-align: top; white-space: pre-wrap"


def card(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Return a title and, below it, a row for each name with its value.

    Parameters
    ----------
    title : str
    rows : iterable of (str, object)
        What to show; text may be a user's or a model's, and is shown as it is, never as markup.
    """
    cells = "".join(
        f'<tr><th style="{_CELL}">{_shown(name)}</th><td style="{_CELL}">{_shown(value)}</td></tr>'
        for name, value in rows
    )
    return f"<div><b>{_shown(title)}</b><table>{cells}</table></div>"


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    # A lone surrogate is no text that a notebook could be saved with.
    return escape(text.encode("utf-8", "replace").decode())
