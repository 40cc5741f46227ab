r"""Regular expressions as Python reads them, in the dialects that automata libraries read.

Most are written in Rust, and theirs is Rust's: nearly Python's, but for what a class may hold, for
the characters that ``\w`` and ``\s`` stand for, and for anchors, which say nothing of a whole text.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_NEWEST_UNICODE: Final = (16, 0)
"""The newest version of Unicode that the libraries have the tables of."""

_UNICODE = min(
    tuple(int(part) for part in unicodedata.unidata_version.split(".")[:2]), _NEWEST_UNICODE
)
_AGE = r"&&\p{{Age={}.{}}}".format(*_UNICODE)
_RUST_CLASSES: Final = {
    # Characters that are newer than Python's tables are no letters and no digits to it.
    r"\w": rf"[\p{{L}}\p{{N}}_{_AGE}]",
    r"\d": rf"[\p{{Nd}}{_AGE}]",
    r"\s": r"[\s\x1c-\x1f]",
}
_RUST_SPACES: Final = tuple("\t\n\v\f\r \x85\u200e\u200f\u2028\u2029")
_TOKEN: Final = re.compile(
    r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\."
    r"|\{(?:\d+(?:,\d*)?|,\d*)\}|.",
    re.DOTALL,
)
_CARET: Final = re.compile(r"\\?\^|\\(?:x|u00|U000000)5[eE]")
_SET_OPERATORS: Final = "[&~-"


class UntranslatableError(ValueError):
    """A regex that a dialect cannot express; the message says what of it."""


def to_rust(pattern: str) -> str:
    """Return a regex that matches, as a whole, what ``re.fullmatch`` does with ``pattern``.

    What the dialect does not have is left as it is, for the library to refuse.

    Raises
    ------
    UntranslatableError
        It would mean something else.
    """
    parts = _parts(pattern)
    # Other spaces are none to Rust, in classes as well, and a library writes them as escapes.
    if re.search(r"\(\?[a-zA-Z]*x", pattern) and any(
        token == "#" or token in _RUST_SPACES for token, _ in parts
    ):
        raise UntranslatableError(
            "spaces or comments in a verbose regex: leave them out, and the flag x"
        )
    out: list[str] = []
    for i, (token, in_class) in enumerate(parts):
        if token in _RUST_CLASSES:
            token = _RUST_CLASSES[token]
        elif token in (r"\W", r"\D", r"\S"):
            token = f"[^{_RUST_CLASSES[token.lower()]}]"
        elif token in (r"\<", r"\>"):  # a word's ends, in Rust
            token = token[1]
        elif not in_class:
            token = _quantifier(token, parts, i)
        elif token == "[" or (token in _SET_OPERATORS and parts[i + 1 : i + 2] == [(token, True)]):
            token = "\\" + token  # Rust nests classes, and has operators between them
        out.append(token)
    return "".join(out)


def to_xgrammar(pattern: str) -> str:
    r"""Return such a regex for xgrammar, whose ``\w``, ``\d`` and ``\s`` stand for ASCII alone.

    Raises
    ------
    UntranslatableError
        It would mean something else, since the library reads some escapes as their letter and
        ignores some groups' kinds.
    """
    parts = _parts(pattern)
    out: list[str] = []
    negated = False
    for i, (token, in_class) in enumerate(parts):
        if token in (r"\w", r"\d", r"\s"):
            if in_class and negated:
                raise UntranslatableError(rf"a negated class with {token}, which is ASCII's alone")
        elif token in (r"\W", r"\D", r"\S"):
            raise UntranslatableError(rf"{token}, which stands for more than Python's")
        elif token[0] == "\\" and len(token) > 1:
            token = _xgrammar_escape(token, in_class)
        elif in_class:
            token = token if token == "-" else _xgrammar_character(token, in_class)
        elif token in ("[", "[^"):
            negated = token == "[^"
            if not negated and i + 1 < len(parts) and _CARET.fullmatch(parts[i + 1][0]):
                raise UntranslatableError("a class that begins with ^, which it takes to negate it")
        elif token == ".":
            token = r"[^\n]"
        elif token in ("^", "$"):
            raise UntranslatableError(f"the anchor {token} within it")
        elif token in ("{", "}"):
            token = "\\" + token
        elif token == "(" and parts[i + 1 : i + 2] == [("?", False)]:
            if parts[i + 2 : i + 3] != [(":", False)]:
                kind = "".join(part for part, _ in parts[i : i + 4])
                raise UntranslatableError(f"the group {kind}")
        else:
            token = _quantifier(token, parts, i)
        out.append(token)
    return "".join(out)


def _parts(pattern: str) -> list[tuple[str, bool]]:
    r"""Return the parts of a regex that stand for themselves, without the anchors around it.

    Each with whether it is a member of a class; a class begins with ``[`` or ``[^`` and ends with
    ``]``, which within one, or without one, is ``\]`` here.
    """
    tokens = _TOKEN.findall(pattern)
    if tokens and tokens[0] in ("^", r"\A"):
        del tokens[0]
    if tokens and tokens[-1] in ("$", r"\Z"):
        del tokens[-1]
    parts: list[tuple[str, bool]] = []
    in_class = False
    i = 0
    while i < len(tokens):
        token = tokens[i]
        i += 1
        if in_class:
            if token == "]":
                in_class = False
                parts.append((token, False))
            elif token[0] == "{":
                parts += [(character, True) for character in token]
            else:
                parts.append((token, True))
        elif token == "[":
            in_class = True
            if tokens[i : i + 1] == ["^"]:
                token = "[^"
                i += 1
            parts.append((token, False))
            if tokens[i : i + 1] == ["]"]:
                parts.append((r"\]", True))
                i += 1
        else:
            parts.append((r"\]" if token == "]" else token, False))
    return parts


def _quantifier(token: str, parts: list[tuple[str, bool]], i: int) -> str:
    """Return a token outside of classes in a form that every dialect has."""
    if token == "+" and i and not parts[i - 1][1]:
        previous = parts[i - 1][0]
        if previous in ("*", "+", "?") or (previous[0] == "{" and len(previous) > 1):
            raise UntranslatableError(f"the possessive quantifier {previous}+")
    if token.startswith("{,"):
        return "{0" + token[1:]
    return token


def _xgrammar_escape(token: str, in_class: bool) -> str:
    character = token[1]
    if len(token) > 2:
        code = int(token[2:], 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise UntranslatableError(f"{token}, which is no character")
        return _xgrammar_character(chr(code), in_class)
    if character in "ntrfva":
        return token
    if character.isascii() and character.isalnum():
        raise UntranslatableError(f"the escape {token}")
    return _xgrammar_character(character, in_class)


def _xgrammar_character(character: str, in_class: bool) -> str:
    """Return what stands for a character, with no escape that the library does not know."""
    if not in_class:
        return "\\" + character if character in r"^$\.*+?()[]{}|" else character
    named = {"\n": r"\n", "\r": r"\r"}.get(character)
    return named or ("\\" + character if character in r"\[]-" else character)


def escape_rust(text: str) -> str:
    """Return a regex that matches a text and nothing else."""
    return "".join(f"\\x{{{ord(c):x}}}" if not c.isalnum() else c for c in text)
