"""Patterns: the regular expressions of a configuration, as far as they are safe to match.

A configuration comes from outside, and Python's matcher takes exponential time for an expression
such as ``(a+)+$`` or ``.?.?.?.?$``. What can do so, a repetition of something that itself repeats
or chooses, is refused, and so are more repetitions and choices in a row than a name of a module has
use for.
"""

from __future__ import annotations

import re

from quire.errors import QuireError

_MOST_REPEATS = 6
_MOST_CHARACTERS = 4096
MOST_WAYS = 1 << 21
"""Ways to try a name, as `num_ways` counts them, with all expressions of a configuration."""
_WAYS_OF_REPEAT = 8
_PLAIN = re.compile(r"[\w.\-]*", re.ASCII)


def compiled(around: str, pattern: str, where: str, error: type[QuireError]) -> re.Pattern[str]:
    """Compile a configuration's expression.

    Parameters
    ----------
    around
        The expression to be, with ``{}`` where `pattern` goes.
    pattern
        What the configuration has.
    where
        The field and the file, for messages.
    error
        What is raised where it is no regular expression, or one that is not safe to match.
    """
    why, _ = _looked_through(pattern)
    if why:
        raise error(
            f"{where} has the pattern {pattern!r:.200}, which {why} and so may take forever to "
            "match; write a plainer one, or a list of names"
        )
    try:
        return re.compile(around.replace("{}", pattern))
    except (re.error, RecursionError, OverflowError) as cause:
        raise error(
            f"{where} has {pattern!r:.200}, which is no regular expression: {cause}"
        ) from cause


def num_ways(pattern: str) -> int:
    """Return about in how many ways an expression that is safe may be tried on a name."""
    return _looked_through(pattern)[1]


def _looked_through(pattern: str) -> tuple[str | None, int]:
    """Why the expression is not safe, None where it is; and in how many ways it may be tried."""
    if _PLAIN.fullmatch(pattern):
        return None, 1
    if len(pattern) > _MOST_CHARACTERS:
        return f"has {len(pattern)} characters", 0
    if re.search(r"\(\?\(|\(\?P?[=<!]|\\[1-9]|\(\?P=", pattern.replace("(?P<", "(?P_")):
        return "looks around or back", 0
    if re.search(r"\(\?(?:#|[a-zA-Z]*x)", pattern):
        return "has comments", 0  # in which a bracket is none
    groups = [False]  # of each open group: whether something in it repeats or chooses
    closed = False  # what the group that was just closed said
    # Of each open group: in how many ways its finished alternatives and its present one are tried.
    # A choice doubles them, and a repetition counts for more.
    ways = [(0, 1)]
    repeats, index = 0, 0
    while index < len(pattern):
        character = pattern[index]
        index += 1
        just_closed, closed = closed, False
        if character == "\\":
            index += 1
        elif character == "[":
            index = _after_class(pattern, index)
        elif character == "(":
            groups.append(False)
            ways.append((0, 1))
            if pattern.startswith("?", index):  # (?: and (?P<name>: no repetition
                index += 1
        elif character == ")":
            closed = groups.pop() if len(groups) > 1 else groups[-1]
            groups[-1] |= closed
            if len(ways) > 1:
                inner = sum(ways.pop())
                ways[-1] = (ways[-1][0], ways[-1][1] * inner)
        elif character == "|":
            groups[-1] = True
            ways[-1] = (sum(ways[-1]), 1)
        elif character == "?":
            groups[-1] = True
            ways[-1] = (ways[-1][0], ways[-1][1] * 2)
        elif character in "*+{":
            repeats += 1
            if just_closed:
                return "repeats what repeats or chooses itself", 0
            groups[-1] = True
            ways[-1] = (ways[-1][0], ways[-1][1] * _WAYS_OF_REPEAT)
            while pattern.startswith(("?", "+", "}"), index):
                index += 1
    if repeats > _MOST_REPEATS:
        return f"repeats {repeats} times", 0
    total = sum(map(sum, ways))
    return ("chooses too often" if total > MOST_WAYS else None), total


def _after_class(pattern: str, index: int) -> int:
    """Return the index after a character class that begins before `index`."""
    if pattern.startswith("^", index):
        index += 1
    if pattern.startswith("]", index):
        index += 1
    while index < len(pattern) and pattern[index] != "]":
        index += 2 if pattern[index] == "\\" else 1
    return index + 1
