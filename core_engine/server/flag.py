"""Flag: an argument of the command line that may stand in a file as well."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["switch", "integer", "number", "text", "several", "modules", "json", "free", "token"]

_FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_FACTORS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_INTEGER = re.compile(r"([+-]?\d+(?:\.\d+)?)([kmgtKMGT]?)")


def integer(text: str) -> int:
    """Return the integer that a text says; 4k are 4,000, and 4K are 4,096.

    Examples
    --------
    >>> integer("32K")
    32768
    """
    match = _INTEGER.fullmatch(text.strip().replace("_", ""))
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer")
    digits, unit = match.groups()
    if not unit and "." not in digits:
        return int(digits)
    value = float(digits) * (_FACTORS | _BINARY_FACTORS).get(unit, 1)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is no integer")
    return int(value)


def number(text: str) -> float:
    """Return the number that a text says."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def mapping(text: str) -> dict[str, Any]:
    """Return the JSON object that a text is."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, as '{{\"name\": 1}}' is one")
    return value


def free(text: str) -> Any:
    """Return what a text says in JSON, or else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


_READERS: dict[str, Callable[[str], Any]] = {
    "integer": integer,
    "number": number,
    "text": str,
    "several": str,
    "modules": str,
    "json": mapping,
    "free": free,
    "token": str,
}
_METAVARS = {
    "integer": "N",
    "number": "X",
    "text": "TEXT",
    "several": "TEXT",
    "modules": "NAME=PATH",
    "json": "JSON",
    "free": "VALUE",
    "token": "TOKEN",
}


class _Gather(argparse.Action):
    """Joins what stands behind a flag each time that it is given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, ()), *values])


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One name with the kind of value that it takes.

    Attributes
    ----------
    name : str
        With underscores; the command line takes hyphens, too.
    kind : str
        ``switch`` is given as ``--name`` and ``--no-name``; ``several`` takes any number of texts
        and may be repeated; so does ``modules``, for which a file may have objects; ``free`` is
        JSON where it can be; ``token`` may stand without a value, for True.
    group : str or None
        The heading in the help; None leaves it out of there.
    help : str
    default : object
        Told in the help.
    spellings : tuple of str
        Further names on the command line, such as ``-tp``.
    """

    name: str
    kind: Kind
    group: str | None = None
    help: str = ""
    default: Any = None
    spellings: tuple[str, ...] = ()

    @property
    def option(self) -> str:
        """How it is written on the command line."""
        return "--" + self.name.replace("_", "-")

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Let a parser know it; what is not given leaves no trace in the parser's result."""
        told = self.help.replace("%", "%%") if self.group else argparse.SUPPRESS
        default = self.default
        if self.group and default is not None and default != () and default != "":
            shown = " ".join(default) if isinstance(default, tuple) else str(default)
            told = f"{told} [{shown}]".replace("%", "%%") if "%" in shown else f"{told} [{shown}]"
        common: dict[str, Any] = {"dest": self.name, "default": argparse.SUPPRESS, "help": told}
        names = (self.option, *self.spellings)
        if self.kind == "switch":
            parser.add_argument(*names, action=_Switch, **common)
            return
        common |= {"type": _READERS[self.kind], "metavar": _METAVARS[self.kind]}
        if self.kind in ("several", "modules"):
            parser.add_argument(*names, nargs="+", action=_Gather, **common)
        elif self.kind == "token":
            parser.add_argument(*names, nargs="?", const=True, **common)
        else:
            parser.add_argument(*names, **common)


class _Switch(argparse.Action):
    """``--name`` is True and ``--no-name`` False."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        negative = [f"--no-{name[2:]}" for name in option_strings if name.startswith("--")]
        super().__init__([*option_strings, *negative], dest, nargs=0, **kwargs)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, not (option_string or "").startswith("--no-"))
