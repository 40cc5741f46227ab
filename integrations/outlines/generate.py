"""The functions of Outlines' 0.x API that make generators, on quire's engine.

Each takes a model, of :mod:`quire.integrations.outlines.models` or a :class:`quire.LLM`, what the
texts have to match and a sampler, and returns a :class:`SequenceGenerator` to be called with
prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

from quire.integrations.outlines import formats, schema_objects
from quire.integrations.outlines.generators import SequenceGenerator, llm_of
from quire.integrations.outlines.samplers import Sampler
from quire.structured_outputs import StructuredOutputsParams
from quire.utils.checks import refuse

__all__ = ["SequenceGenerator", "cfg", "choice", "format", "json", "regex", "text"]


def text(model: Any, sampler: Sampler | None = None) -> SequenceGenerator:
    """Return a generator of plain text.

    Parameters
    ----------
    model : quire.LLM, or an object with one in ``llm``
    sampler : Sampler, optional
        ``samplers.multinomial()`` by default.

    Returns
    -------
    SequenceGenerator
        Its results are str.
    """
    return SequenceGenerator(model, None, sampler)


def regex(model: Any, regex_str: Any, sampler: Sampler | None = None) -> SequenceGenerator:
    """Return a generator of texts that match a regular expression.

    Parameters
    ----------
    model, sampler
        As for :func:`text`.
    regex_str : str or a type of ``outlines.types``
        What ``re.fullmatch`` would match each text with.

    Returns
    -------
    SequenceGenerator
        Its results are str.
    """
    if schema_objects.is_term(regex_str):
        constraint = formats.term_constraint(regex_str, _backend(model))
    else:
        constraint = StructuredOutputsParams(regex=regex_str)
    return SequenceGenerator(model, constraint, sampler)


def json(
    model: Any,
    schema_object: Any,
    sampler: Sampler | None = None,
    whitespace_pattern: str | None = None,
) -> SequenceGenerator:
    r"""Return a generator of JSON.

    Parameters
    ----------
    model, sampler
        As for :func:`text`.
    schema_object : type, str, dict or callable
        A pydantic model; a JSON schema; a function, a dataclass or a TypedDict, for what it takes
        by ``**``; an Enum, for one of its values, or of the functions that are its values; a
        genson SchemaBuilder. Objects have no members but those that are named, unless the schema
        says otherwise.
    whitespace_pattern : str, optional
        A regex of what may stand between the parts of JSON, such as ``r"[\n ]?"``; by default at
        most one space, "" for nothing.

    Returns
    -------
    SequenceGenerator
        Its results are instances of the pydantic model, and else what :func:`json.loads` returns.

    Raises
    ------
    InvalidRequestError
        The schema is none; it is a ValueError.
    """
    if whitespace_pattern is None and schema_objects.is_term(schema_object, "JsonSchema"):
        whitespace_pattern = schema_object.whitespace_pattern
    schema, parse = schema_objects.schema_of(schema_object)
    constraint = _json_constraint(model, schema, whitespace_pattern)
    return SequenceGenerator(model, constraint, sampler, parse)


def _json_constraint(
    model: Any, schema: dict[str, Any] | str, whitespace_pattern: str | None
) -> StructuredOutputsParams:
    if whitespace_pattern == "":
        return StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    # xgrammar takes no pattern: there, what nobody asked for is left to it.
    if whitespace_pattern is None and _backend(model) != "xgrammar":
        whitespace_pattern = "[ ]?"
    return StructuredOutputsParams(json=schema, whitespace_pattern=whitespace_pattern)


def _backend(model: Any) -> str:
    """Return what enforces constraints where nobody says."""
    return llm_of(model).config.structured.structured_outputs_backend


def cfg(model: Any, cfg_str: Any, sampler: Sampler | None = None) -> SequenceGenerator:
    """Return a generator of texts of a context-free grammar.

    Parameters
    ----------
    model, sampler
        As for :func:`text`.
    cfg_str : str or outlines.types.CFG
        In Lark's notation, or in GBNF.

    Returns
    -------
    SequenceGenerator
        Its results are str.
    """
    grammar = cfg_str.definition if schema_objects.is_term(cfg_str, "CFG") else cfg_str
    return SequenceGenerator(model, StructuredOutputsParams(grammar=grammar), sampler)


def format(model: Any, python_type: Any, sampler: Sampler | None = None) -> SequenceGenerator:
    """Return a generator of values of a Python type.

    Parameters
    ----------
    model, sampler
        As for :func:`text`.
    python_type : type
        int, float, bool, datetime.date, datetime.time or datetime.datetime; an Enum, for the name
        of a member; a type of ``outlines.types``, for a text.

    Returns
    -------
    SequenceGenerator
        Its results are of that type.

    Raises
    ------
    TypeError
        For any other type.
    """
    constraint, parse = formats.format_of(python_type, _backend(model))
    return SequenceGenerator(model, constraint, sampler, parse)


def choice(
    model: Any, choices: Iterable[str] | type[Enum], sampler: Sampler | None = None
) -> SequenceGenerator:
    """Return a generator of one of several texts.

    Parameters
    ----------
    model, sampler
        As for :func:`text`.
    choices : list of str, or Enum
        The texts; of an Enum the values, which the model writes as JSON.

    Returns
    -------
    SequenceGenerator
        Its results are str, or the values of the Enum's members.
    """
    if isinstance(choices, type) and issubclass(choices, Enum):
        return json(model, choices, sampler)
    if schema_objects.is_term(choices, "Choice"):
        choices = choices.items  # type: ignore[attr-defined]
    expected = "a list of at least one string, or an Enum"
    if isinstance(choices, (str, bytes)) or not isinstance(choices, Iterable):
        raise refuse("choices", choices, expected)
    return SequenceGenerator(model, StructuredOutputsParams(choice=list(choices)), sampler)
