"""The libraries that enforce constraints, each imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from quire.errors import InvalidRequestError

if TYPE_CHECKING:
    from quire.structured.constraint import ConstraintBackend
    from quire.structured.vocabulary import Vocabulary


def load_constraint_backend(
    name: str, vocabulary: Vocabulary, deadline: float
) -> ConstraintBackend:
    """Return a backend for a vocabulary.

    Parameters
    ----------
    name : str
        One of :data:`quire.structured_outputs.BACKENDS`.
    vocabulary : Vocabulary
    deadline : float
        Seconds after which nobody waits for a compilation any more.

    Raises
    ------
    InvalidRequestError
        The library is not installed.
    """
    try:
        module = import_module(f"quire.structured.{name}_backend")
    except ImportError as error:
        raise InvalidRequestError(
            f"structured_outputs with backend {name!r} needs the package {name}, which cannot be "
            f"imported ({error}): pip install {name}"
        ) from error
    backend: ConstraintBackend = module.Backend(vocabulary, deadline)
    return backend
