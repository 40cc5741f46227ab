r"""Regular expressions as Python reads them, in the dialect that automata libraries read.

These are written in Rust, and theirs is Rust's: nearly Python's, but for what a class may hold, for
the letters that ``\w`` stands for, and for anchors, which say nothing of a whole text.
"""

from __future__ import annotations

import re
import unicodedata

_AGE = ".".join(map(str, min((16, 0), tuple(map(int, unicodedata.unidata_version.split(".")[:2])))))
"""The Unicode whose characters both know: the libraries' may be newer, by some digits and letters,
than Python's."""

_WORD = rf"[[\p{{L}}\p{{N}}_]&&\p{{age={_AGE}}}]"
_DIGIT = rf"[\p{{Nd}}&&\p{{age={_AGE}}}]"
_CLASSES = {
    r"\w": _WORD,
    r"\W": f"[^{_WORD}]",
    r"\d": _DIGIT,
    r"\D": f"[^{_DIGIT}]",
    r"\s": r"[\s\x1c-\x1f]",
    r"\S": r"[^\s\x1c-\x1f]",
}
"""What Python's classes stand for, in a class or outside of one."""

_TOKEN = re.compile(r"\\.|\{,\d+\}|.", re.DOTALL)
_SET_OPERATORS = "[&~-"


def to_rust(pattern: str) -> str:
    """Return a regex that matches, as a whole, what ``re.fullmatch`` does with ``pattern``.

    What cannot be expressed is left as it is, for the library to refuse.
    """
    tokens = _tokens(pattern)
    parts: list[str] = []
    in_class = 0  # tokens since a class began, or 0 outside of one
    for i, token in enumerate(tokens):
        if in_class:
            if token == "]" and in_class > 1:
                in_class = 0
            elif token == "^" and tokens[i - 1] == "[" and in_class == 1:
                parts.append(token)
                continue  # what follows is still the first of the class
            else:
                in_class += 1
                parts.append(_in_class(token, tokens[i + 1 : i + 2]))
                continue
        elif token == "[":
            in_class = 1
        elif token.startswith("{,") and len(token) > 2:
            token = "{0" + token[1:]
        elif token in _CLASSES:
            token = _CLASSES[token]
        elif token in (r"\<", r"\>"):  # a word's ends, in Rust
            token = token[1]
        parts.append(token)
    return "".join(parts)


def to_ascii_classes(pattern: str) -> str | None:
    r"""Return such a regex for a library whose ``\w``, ``\d`` and ``\s`` stand for ASCII alone.

    None where the pattern has one of their opposites, which stand for more than Python's do.
    """
    parts = []
    in_class = False
    for token in _tokens(pattern):
        if token in (r"\W", r"\D", r"\S"):
            return None
        if token == "]":
            in_class = False
        elif token == "[":
            token = r"\[" if in_class else token
            in_class = True
        elif token.startswith("{,") and len(token) > 2 and not in_class:
            token = "{0" + token[1:]
        elif token == "." and not in_class:
            token = r"[^\n]"
        parts.append(token)
    return "".join(parts)


def _tokens(pattern: str) -> list[str]:
    """Return the parts of a regex that stand for themselves, without the anchors around it."""
    tokens = _TOKEN.findall(pattern)
    if tokens and tokens[0] in ("^", r"\A"):
        del tokens[0]
    if tokens and tokens[-1] in ("$", r"\Z"):
        del tokens[-1]
    return tokens


def _in_class(token: str, following: list[str]) -> str:
    if token in _CLASSES:
        return _CLASSES[token]
    if token in (r"\<", r"\>"):
        return token[1]
    # Rust nests classes, and has operators of two characters between them.
    if token in ("[", "]") or (token in _SET_OPERATORS and following == [token]):
        return "\\" + token
    return token


def escape_rust(text: str) -> str:
    """Return a regex that matches a text and nothing else."""
    return "".join(f"\\x{{{ord(c):x}}}" if not c.isalnum() else c for c in text)
