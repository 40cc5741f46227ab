"""Keywords that a dataclass has no field for."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any, TypeVar

from quire.utils.suggest import unexpected_argument

_T = TypeVar("_T")


def refuse_unknown_keywords(cls: type[_T]) -> type[_T]:
    """Refuse keywords that a dataclass has no field for, naming the nearest that it has."""
    generated = cls.__init__
    valid = frozenset(item.name for item in fields(cls) if item.init)  # type: ignore[arg-type]

    @functools.wraps(generated)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in valid:
                raise unexpected_argument(cls.__name__, name, valid)
        generated(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls
