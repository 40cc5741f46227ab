"""Checked: a part of a configuration, which checks its fields as it is made."""

from __future__ import annotations

import dataclasses
from typing import Any

from quire.config import checks


def argument(default: Any, check: checks.Check, *, repr: bool = True) -> Any:
    """Return a field of a :class:`Checked` dataclass."""
    return dataclasses.field(default=default, repr=repr, metadata={"check": check})


class Checked:
    """A frozen dataclass that checks and normalises every field as it is made."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):  # type: ignore[arg-type]
            check: checks.Check | None = spec.metadata.get("check")
            value = getattr(self, spec.name)
            # None stands for "not said" in every argument.
            if value is None:
                kept = None if spec.default is dataclasses.MISSING else spec.default
            else:
                kept = value if check is None else check(spec.name, value)
            if kept is None and spec.default is dataclasses.MISSING:
                raise checks.refuse(spec.name, value, "given")
            object.__setattr__(self, spec.name, kept)
