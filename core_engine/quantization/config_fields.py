"""ConfigFields: the entries of a quantization configuration, read with checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.utils.checks import shown


class ConfigFields:
    """A quantization configuration.

    Parameters
    ----------
    config
        Such as the ``quantization_config`` of a config.json.
    where
        What messages call it.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        if not isinstance(config, Mapping):
            raise ModelLoadError(f"{where} is {shown(config)}; it must be an object of fields")
        self._config = config
        self.where = where

    def value(self, *names: str) -> Any:
        """Return what is given under the first of some names; None if nothing, or null, is."""
        for name in names:
            found = self._config.get(name)
            if found is not None:
                return found
        return None

    def integer(self, *names: str, expected: str) -> int:
        """Return an integer that has to be there."""
        found = self.value(*names)
        if found is None:
            others = "".join(f" (or {each!r})" for each in names[1:])
            raise ModelLoadError(f"{self.where} has no {names[0]!r}{others}: {expected}")
        if type(found) is not int:
            raise self.wrong(names, expected)
        return found

    def flag(self, *names: str, default: bool) -> bool:
        """Return a bool."""
        found = self.value(*names)
        if found is None:
            return default
        if not isinstance(found, bool):
            raise self.wrong(names, "true or false")
        return found

    def word(self, *names: str, default: str) -> str:
        """Return a string in lower case."""
        found = self.value(*names)
        if found is None:
            return default
        if not isinstance(found, str):
            raise self.wrong(names, "a string")
        return found.lower()

    def strings(self, *names: str) -> tuple[str, ...]:
        """Return a list of strings, however deep in lists they are; none if nothing is given."""
        found = self.value(*names)
        if found is None:
            return ()
        flat: list[str] = []
        levels: list[Any] = [found]
        while levels:
            each = levels.pop()
            if isinstance(each, list):
                levels.extend(reversed(each))
            elif isinstance(each, str) and each:
                flat.append(each)
            else:
                raise self.wrong(names, "a list of module names")
        return tuple(flat)

    def wrong(self, names: Iterable[str], expected: str) -> ModelLoadError:
        """Return the error for a field of another kind than it must have."""
        name = self._name(names)
        return ModelLoadError(f"{name} of {self.where} is {shown(self.value(name))}; {expected}")

    def unsupported(self, names: Iterable[str], expected: str) -> UnsupportedModelError:
        """Return the error for a field whose value is not one that can be read."""
        name = self._name(names)
        return UnsupportedModelError(
            f"{name} of {self.where} is {shown(self.value(name))}; {expected}"
        )

    def _name(self, names: Iterable[str]) -> str:
        names = list(names)
        return next((each for each in names if self._config.get(each) is not None), names[0])


def group_size_of(value: int, name: str, where: str) -> int:
    """Return a group size: inputs that share a scale, or -1 for one scale per output.

    Raises
    ------
    ModelLoadError
        It is neither.
    """
    if value != -1 and value < 1:
        raise ModelLoadError(
            f"{name} of {where} is {value}; it must be the number of inputs that share a scale, "
            "such as 128, or -1 for one scale per output"
        )
    return value
