r"""Regular expressions as Python reads them, in the dialect that automata libraries read.

These are written in Rust, and theirs is Rust's: nearly Python's, but for what a class may hold, for
the characters that ``\w`` and ``\s`` stand for, and for anchors, which say nothing of a whole text.
"""

from __future__ import annotations

import re

_WORD = r"\p{L}\p{N}_"
_TOKEN = re.compile(r"\\.|\{,\d+\}|.", re.DOTALL)
_SET_OPERATORS = "[&~-"
_SPACE = r"\s\x1c-\x1f"  # Python's has four separators that Unicode's has not

_XGRAMMAR_TOKEN = re.compile(
    r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\.|\{,\d+\}|.", re.DOTALL
)
_XGRAMMAR_ESCAPES = "dswnrtfv"
_SURROGATES = r"\ud800-\udfff"


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
        elif token == r"\w":
            token = f"[{_WORD}]"
        elif token == r"\W":
            token = f"[^{_WORD}]"
        elif token == r"\s":
            token = f"[{_SPACE}]"
        elif token == r"\S":
            token = f"[^{_SPACE}]"
        elif token in (r"\<", r"\>"):  # a word's ends, in Rust
            token = token[1]
        parts.append(token)
    return "".join(parts)


def to_xgrammar(pattern: str) -> str | None:
    r"""Return such a regex for xgrammar, or None where it would match what ``re`` does not.

    Its ``\w``, ``\d`` and ``\s`` stand for ASCII alone, so that their opposites are too many. It
    passes over anchors, knows escapes that Python does not, reads as many digits behind ``\x`` as
    there are, and takes the halves of surrogate pairs for characters.
    """
    parts: list[str] = []
    in_class = 0  # tokens since a class began, or 0 outside of one
    negated = False
    for token in _XGRAMMAR_TOKEN.findall("".join(_tokens(pattern))):
        if token[0] == "\\" and token[1].isalnum():
            if len(token) > 2:
                code = int(token[2:], 16)
                if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                    return None
                token = f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
            elif token[1] not in _XGRAMMAR_ESCAPES or (negated and token[1] in "dsw"):
                return None
        if in_class:
            if token == "]" and in_class > 1:
                in_class, token = 0, f"{_SURROGATES}]" if negated else token
                negated = False
            elif token == "^" and in_class == 1 and not negated:
                negated = True
            else:
                in_class += 1
                token = "\\" + token if token in "[]" else token
        elif token == "[":
            in_class = 1
        elif token in "^$":
            return None
        elif token.startswith("{,") and len(token) > 2:
            token = "{0" + token[1:]
        elif token == ".":
            token = rf"[^\n{_SURROGATES}]"
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
    if token == r"\w":
        return _WORD
    if token == r"\W":
        return f"[^{_WORD}]"
    if token == r"\s":
        return _SPACE
    if token == r"\S":
        return f"[^{_SPACE}]"
    if token in (r"\<", r"\>"):
        return token[1]
    # Rust nests classes, and has operators of two characters between them.
    if token in ("[", "]") or (token in _SET_OPERATORS and following == [token]):
        return "\\" + token
    return token


def escape_rust(text: str) -> str:
    """Return a regex that matches a text and nothing else."""
    return "".join(f"\\x{{{ord(c):x}}}" if not c.isalnum() else c for c in text)
