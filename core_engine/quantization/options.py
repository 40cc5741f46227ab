"""Options of a quantization that is done while a model is loaded: read, and checked one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from quire.errors import ConfigError
from quire.utils.checks import shown
from quire.utils.suggest import nearest

FIELD = "quantization_config"
"""The engine argument that the options are."""

_LARGEST_GROUP = 1024


def refuse(name: str, value: object, right: str) -> ConfigError:
    """Return the error for an option; to be raised by the caller."""
    return ConfigError(f"{FIELD}[{name!r}] must be {right}, not {shown(value)}")


def check_names(method: str, options: object, known: Sequence[str]) -> Mapping[str, Any]:
    """Return options that are a mapping of known names.

    Raises
    ------
    ConfigError
        They are not.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ConfigError(f"{FIELD} must be a dict of options, not {shown(options)}")
    for name in options:
        if name not in known:
            guess = nearest(name, known) if isinstance(name, str) else None
            hint = "" if guess is None else f": did you mean {guess!r}?"
            raise ConfigError(
                f"{FIELD} has {shown(name)}, which quantization={method!r} does not take; it "
                f"takes {', '.join(map(repr, known))}{hint}"
            )
    return options


def flag(options: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return an option that is True or False."""
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise refuse(name, value, "True or False")
    return value


def choice(
    options: Mapping[str, Any], name: str, choices: Sequence[str | None], default: str | None
) -> str | None:
    """Return an option that is one of some words."""
    value = options.get(name, default)
    if not any(value is each or (isinstance(value, str) and value == each) for each in choices):
        raise refuse(name, value, "one of " + ", ".join(map(repr, choices)))
    kept: str | None = value
    return kept


def group_size(options: Mapping[str, Any]) -> int | None:
    """Return the columns that share a scale; None: what suits each weight."""
    value = options.get("group_size")
    if value is None:
        return None
    valid = isinstance(value, int) and not isinstance(value, bool)
    if not valid or not 8 <= value <= _LARGEST_GROUP or value % 8:
        raise refuse(
            "group_size", value, f"a multiple of 8 from 8 to {_LARGEST_GROUP} (32, 64 or 128)"
        )
    kept: int = value
    return kept


Prompt = str | tuple[int, ...]
"""A text, or its token ids."""


def prompts(options: Mapping[str, Any], name: str = "calibration") -> tuple[Prompt, ...]:
    """Return a list of prompts: texts, or lists of token ids; none where there is no such option.

    Raises
    ------
    ConfigError
        It is no list, or a prompt is neither, or is empty.
    """
    value = options.get(name)
    if value is None:
        return ()
    right = "a list of prompts: strings, or lists of token ids, none of them empty"
    if not isinstance(value, (list, tuple)) or not value:
        raise refuse(name, value, right)
    kept: list[Prompt] = []
    for each in value:
        if isinstance(each, str) and each.strip():
            kept.append(each)
        elif (
            isinstance(each, (list, tuple))
            and each
            and all(type(token) is int and token >= 0 for token in each)
        ):
            kept.append(tuple(each))
        else:
            raise refuse(name, value, right)
    return tuple(kept)


@dataclass(frozen=True)
class Patterns:
    """Modules that stay as they are.

    Attributes
    ----------
    patterns
        Each a decoder's name, or a shell pattern of names; what stands below a name is meant, too:
        ``layers.0`` is all of the first layer.
    """

    patterns: tuple[str, ...] = ()
    _met: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @classmethod
    def read(cls, options: Mapping[str, Any], name: str = "ignore") -> Patterns:
        """Read the option.

        Raises
        ------
        ConfigError
            It is no list of strings.
        """
        value = options.get(name)
        if value is None:
            return cls()
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(each, str) and each for each in value
        ):
            raise refuse(name, value, "a list of module names such as 'layers.0.mlp.down'")
        return cls(tuple(value))

    def match(self, name: str) -> bool:
        """Whether a module is meant."""
        found = [pattern for pattern in self.patterns if _matches(pattern, name)]
        self._met.update(found)
        return bool(found)

    def unmet(self) -> list[str]:
        """Return the patterns that no module was meant by so far."""
        return [pattern for pattern in self.patterns if pattern not in self._met]


def _matches(pattern: str, name: str) -> bool:
    parts = name.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(fnmatchcase(each, pattern) for each in above)
