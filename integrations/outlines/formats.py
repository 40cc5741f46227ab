"""Python types as texts: the regex of each that ``generate.format`` takes, and how it is read."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Final, get_args, get_origin

from quire.integrations.outlines.schema_objects import is_term
from quire.structured_outputs import StructuredOutputsParams

INTEGER: Final = r"[+-]?(0|[1-9][0-9]*)"
FLOAT: Final = INTEGER + r"(\.[0-9]+)?([eE][+-][0-9]+)?"
BOOLEAN: Final = "(True|False)"

# Only days that there are, so that every text can be read.
_YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DAY_OF_YEAR = (
    "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    "|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    "|02-(0[1-9]|1[0-9]|2[0-8]))"
)
DATE: Final = f"({_YEAR}-{_DAY_OF_YEAR}|{_LEAP_YEAR}-02-29)"
TIME: Final = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
DATETIME: Final = f"{DATE} {TIME}"

Format = tuple[StructuredOutputsParams, Callable[[str], Any]]

_TYPES: Final[dict[Any, tuple[str, Callable[[str], Any]]]] = {
    int: (INTEGER, int),
    float: (FLOAT, float),
    bool: (BOOLEAN, lambda text: text == "True"),
    datetime.date: (DATE, datetime.date.fromisoformat),
    datetime.time: (TIME, datetime.time.fromisoformat),
    datetime.datetime: (DATETIME, datetime.datetime.fromisoformat),
}


def format_of(python_type: Any, backend: str | None = None) -> Format:
    """Return the constraint of a type, and what makes a value of a text.

    Parameters
    ----------
    python_type : type
        int, float, bool, date, time or datetime; an Enum, for the name of a member; a type of
        ``outlines.types``, for a text; ``Annotated[type, ...]`` with a JSON schema's ``pattern``.
    backend : str, optional
        What enforces a type of ``outlines.types``; None for the engine's.

    Raises
    ------
    TypeError
        For any other.
    """
    if is_term(python_type):
        return term_constraint(python_type, backend), str
    if get_origin(python_type) is Annotated:
        kind, *notes = get_args(python_type)
        for note in notes:
            schema = getattr(note, "json_schema", None)
            if isinstance(schema, dict) and isinstance(schema.get("pattern"), str):
                return StructuredOutputsParams(regex=schema["pattern"]), kind
    elif isinstance(python_type, type) and issubclass(python_type, Enum):
        return StructuredOutputsParams(choice=list(python_type.__members__)), str
    elif isinstance(python_type, type) and python_type in _TYPES:
        regex, parse = _TYPES[python_type]
        return StructuredOutputsParams(regex=regex), parse
    raise TypeError(
        "python_type must be int, float, bool, datetime.date, datetime.time, datetime.datetime, "
        f"an Enum or a type of outlines.types, not {python_type!r}"
    )


def term_constraint(term: Any, backend: str | None = None) -> StructuredOutputsParams:
    """Return the constraint of one of Outlines' types, as new calls of models have it."""
    # Not before there is a term: only then is Outlines there, and imported.
    output_types = importlib.import_module("quire.integrations.outlines.output_types")
    constraint: StructuredOutputsParams = output_types.structured_outputs_for(term, backend=backend)
    return constraint
