"""Grammars of answers: thoughts, then calls, or text with calls in it, or a given structure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from quire.chat.lark import lark_json, lark_string
from quire.chat.reasoning_parsers.interface import ReasoningParser
from quire.chat.schemas import closed, refuse_rounded
from quire.chat.tool_parsers.interface import Function, ToolParser
from quire.chat.tools import Tool, ToolChoice
from quire.errors import InvalidRequestError
from quire.structured.regex import UntranslatableError, to_rust
from quire.structured_outputs import StructuredOutputsParams, is_lark
from quire.utils.checks import refuse

_TEXT = r"TEXT: /(.|\n)*/"


def answer_constraint(
    own: StructuredOutputsParams | None,
    choice: ToolChoice,
    *,
    parallel: bool,
    prompt: str,
    tool_parser: ToolParser | None,
    reasoning_parser: ReasoningParser | None,
    literal: Callable[[str], str],
) -> StructuredOutputsParams | None:
    """Return what a completion has to match.

    Parameters
    ----------
    own : StructuredOutputsParams or None
        What an answer without calls has to match.
    choice : ToolChoice
    parallel : bool
        Whether more than one call may be made.
    prompt : str
        Or its end.
    tool_parser : ToolParser or None
    reasoning_parser : ReasoningParser or None
    literal : callable
        See :meth:`~quire.chat.tool_parsers.interface.ToolParser.grammar`.

    Returns
    -------
    StructuredOutputsParams or None
        ``own`` where there is nothing to add to it.

    Raises
    ------
    InvalidRequestError
        The two contradict each other, or cannot be had together.
    """
    if own is not None and choice.required:
        raise InvalidRequestError(
            "structured_outputs (a response format) must be absent where tool_choice asks for a "
            f"call, which is the whole answer; got {own.spec.kind}"
        )
    callable_tools = choice.tools if tool_parser is not None else ()
    is_tied = not parallel or any(tool.strict for tool in callable_tools)
    thought, rules = "", []
    if reasoning_parser is not None:
        thought, thought_rules = reasoning_parser.grammar(prompt, literal)
        rules = [thought_rules] if thought else []
    if own is None:
        if not callable_tools or not (choice.required or is_tied):
            return None
        body = "calls" if choice.required else "free"
    else:
        if own.structural_tag is not None or not (callable_tools or thought):
            return own
        body = "answer"
        if callable_tools:
            assert tool_parser is not None
            if tool_parser.is_json:
                raise InvalidRequestError(
                    "tools with tool_choice 'auto' cannot be had together with structured_outputs "
                    f"(a response format) of {tool_parser.name} models, whose calls are answers in "
                    "JSON, too: ask for one of the two"
                )
            body = "calls | answer"
        rules.append(_answer_rules(own))
    if callable_tools:
        assert tool_parser is not None
        functions = [_function(i, tool, choice, own) for i, tool in enumerate(callable_tools)]
        rules.append(tool_parser.grammar(functions, literal, parallel and not choice.single))
    grammar = "\n".join([f"start: {thought} body", f"body: {body}", *rules, _TEXT, ""])
    return StructuredOutputsParams(
        grammar=grammar,
        backend="llguidance",
        canonical_tokens=own is not None and own.canonical_tokens,
    )


def _function(
    index: int, tool: Tool, choice: ToolChoice, own: StructuredOutputsParams | None
) -> Function:
    """Return a function with what is enforced of its arguments."""
    if not (choice.required or tool.strict):
        return Function(tool.name, {"type": "object"})
    refuse_rounded(f"the parameters of the function {tool.name!r}", tool.parameters)
    schema = tool.parameters
    if not {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"} & schema.keys():
        schema = {"type": "object", **schema}
    return Function(tool.name, closed(schema))


# -- what an answer has to match, within a larger grammar ------------------------------------------


def _answer_rules(own: StructuredOutputsParams) -> str:
    """Return rules in Lark's notation, with a rule ``answer``."""
    if own.backend not in (None, "llguidance"):
        raise refuse("backend", own.backend, "'llguidance' with tools, and for models that think")
    if own.drop_unsupported:
        raise refuse("drop_unsupported", True, "False with tools, and for models that think")
    spec = own.spec
    if spec.kind in ("json", "json_object"):
        schema = json.loads(spec.text)
        refuse_rounded("json", schema)
        if not isinstance(schema, dict):
            schema = {} if schema else {"not": {}}
        whitespace: dict[str, Any] = {"whitespace_flexible": spec.any_whitespace}
        if spec.whitespace_pattern is not None:
            whitespace["whitespace_pattern"] = _rust("whitespace_pattern", spec.whitespace_pattern)
        return f"answer: {lark_json(schema, whitespace)}"
    if spec.kind == "regex":
        pattern = _rust("regex", spec.text)
        if "\n" in pattern and re.search(r"\(\?[a-zA-Z]*x", pattern):
            raise InvalidRequestError(
                "regex must be on one line with tools, and for models that think: it is verbose"
            )
        return f"answer: /(?:{_slashed(pattern)})/"
    if spec.kind == "choice":
        items = " | ".join(lark_string(item) for item in json.loads(spec.text))
        return f"answer: ANSWER\nANSWER: {items}"
    if not is_lark(spec.text):
        raise InvalidRequestError(
            "grammar must be in Lark's notation, with a rule `start`, with tools, and for models "
            "that think; it was read as GBNF"
        )
    return f"answer: %lark {{\n{spec.text}\n}}"


def _rust(name: str, pattern: str) -> str:
    try:
        return to_rust(pattern)
    except UntranslatableError as error:
        raise InvalidRequestError(
            f"{name} cannot be enforced by llguidance: it would not hold to {error}"
        ) from None


def _slashed(pattern: str) -> str:
    """Return a regex as it stands between slashes, on one line."""
    escaped = re.sub(r"\\.|/", lambda m: r"\/" if m[0] == "/" else m[0], pattern, flags=re.DOTALL)
    return escaped.replace("\\\n", r"\n").replace("\n", r"\n")
