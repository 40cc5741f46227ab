"""Did-you-mean: the valid name nearest to one that was mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name that looks most like ``name``.

    Parameters
    ----------
    name : str
        What was written.
    valid : iterable of str
        What could have been meant.

    Returns
    -------
    str or None
        None when nothing is near enough to be worth suggesting.

    Examples
    --------
    >>> nearest("frequence_penalty", ["presence_penalty", "frequency_penalty"])
    'frequency_penalty'
    """
    folded: dict[str, str] = {}
    for candidate in valid:
        folded.setdefault(candidate.casefold(), candidate)
    matches = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return folded[matches[0]] if matches else None


def unexpected_argument(owner: str, name: str, valid: Iterable[str]) -> TypeError:
    """Build the error for a keyword that ``owner`` does not take.

    Parameters
    ----------
    owner : str
        The class or function that was called.
    name : str
        The keyword it was given.
    valid : iterable of str
        The keywords it takes.

    Returns
    -------
    TypeError
        Naming the nearest valid keyword; to be raised by the caller.
    """
    guess = nearest(name, valid)
    hint = f": did you mean {guess!r}?" if guess is not None else ""
    return TypeError(f"{owner}() got an unexpected argument {name!r}{hint}")
