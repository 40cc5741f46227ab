"""Which modules the lists of a quantization's configuration mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quire.errors import ModelLoadError
from quire.quantization.modules import is_head
from quire.utils.checks import shown
from quire.utils.patterns import MOST_WAYS, compiled, num_ways

_EMBEDDINGS = frozenset(
    ("embed_tokens", "embed_in", "embed_positions", "wte", "wpe", "word_embeddings")
)
_PLAIN = re.compile(r"[\w.\-]*", re.ASCII)


def is_embedding(module: str) -> bool:
    """Whether a module is a table of vectors."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def names_in(field: str, value: Any) -> list[str]:
    """Return a list of strings of a configuration; none are there where it is null.

    Raises
    ------
    ModelLoadError
        It is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ModelLoadError(f"{field} is {shown(value)}; it must be a list of module names")
    return value


class _Patterns:
    """Expressions of one configuration, which together may not take long to match."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._ways = 0

    def compile(self, around: str, pattern: str) -> re.Pattern[str]:
        found = compiled(around, pattern, self._field, ModelLoadError)
        self._ways += num_ways(pattern)
        if self._ways > MOST_WAYS and num_ways(pattern) > 1:
            raise ModelLoadError(
                f"{self._field} has too many expressions up to {pattern!r:.100}, which may take "
                "forever to match; write plainer ones, or names"
            )
        return found


class Targets:
    """Names, classes (``Linear``, ``Embedding``) and expressions (``re:...``) of modules.

    Of those that a module matches, its own name decides, then an expression, then its class.

    Parameters
    ----------
    field
        For messages.
    targets
        What they are.

    Raises
    ------
    ModelLoadError
        An expression is none, or not safe to match.
    """

    def __init__(self, field: str, targets: Iterable[str]) -> None:
        self._targets = frozenset(targets)
        patterns = _Patterns(field)
        self._patterns = [
            (each, patterns.compile("{}", each.removeprefix("re:")))
            for each in sorted(self._targets)
            if each.startswith("re:")
        ]

    def match(self, module: str) -> str | None:
        """Return the target that a module falls under."""
        if module in self._targets:
            return module
        for target, pattern in self._patterns:
            if pattern.match(module):
                return target
        name = "Embedding" if is_embedding(module) else "Linear"
        return name if name in self._targets else None


class SkippedModules:
    """Modules that a quantization left as they were, in transformers' way to say it.

    A name stands for the module and all in it, for modules whose names end with it, and, as an
    expression, for those that it matches from the beginning. Without a list it is the head alone,
    which transformers leaves out then. Embeddings always are.

    Parameters
    ----------
    fields
        The list by its name in the configuration; null or absent: there is none. Of several, all
        count.

    Raises
    ------
    ModelLoadError
        A value is no list of names, or has an expression that is not safe to match.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        given = {field: value for field, value in fields.items() if value is not None}
        self._head = not given
        self._names: set[str] = set()
        self._patterns: list[re.Pattern[str]] = []
        for field, value in given.items():
            patterns = _Patterns(field)
            for each in names_in(field, value):
                if not each or _PLAIN.fullmatch(each):
                    self._names.add(each)
                else:
                    pattern = each.removeprefix("re:")
                    around = r"(?:{})(?:(?<=\.)|(?=\.|$))"
                    self._patterns.append(patterns.compile(around, pattern))
        self._names.discard("")
        self._endings = tuple(self._names)

    def __contains__(self, module: str) -> bool:
        if is_embedding(module) or (self._head and is_head(module)):
            return True
        parts = module.split(".")
        return (
            any(".".join(parts[:count]) in self._names for count in range(1, len(parts) + 1))
            or module.endswith(self._endings)
            or any(pattern.match(module) for pattern in self._patterns)
        )
