"""JSON schemas of classes that hold objects of themselves."""

from __future__ import annotations

from typing import Any

from langchain_core.utils.pydantic import is_basemodel_subclass


def recursive_schema(model: Any) -> dict[str, Any] | None:
    """Return the JSON schema of a pydantic class that holds objects of itself; None for others.

    LangChain's conversion writes out what a schema refers to, and where that has no end it takes
    anything. Here the references stay.

    Parameters
    ----------
    model : object
        A pydantic model of version 1 or 2, or anything else.
    """
    if not (isinstance(model, type) and is_basemodel_subclass(model)):
        return None
    new = getattr(model, "model_json_schema", None)
    schema: dict[str, Any] = new() if new is not None else model.schema()  # type: ignore[attr-defined]
    word = "$defs" if "$defs" in schema else "definitions"
    definitions: dict[str, Any] = schema.get(word, {})
    reached = {name: _references(shape) for name, shape in definitions.items()}
    if not any(_reaches(name, name, reached) for name in definitions):
        return None
    reference = schema.pop("$ref", None)
    own = {} if reference is None else definitions[_name(reference)]
    return {"title": model.__name__, **own, **schema}


def _references(shape: Any) -> set[str]:
    """Return the definitions that a schema refers to."""
    if isinstance(shape, list):
        return {name for item in shape for name in _references(item)}
    if not isinstance(shape, dict):
        return set()
    reference = shape.get("$ref")
    own = {_name(reference)} if isinstance(reference, str) else set()
    return own | {name for item in shape.values() for name in _references(item)}


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _reaches(start: str, goal: str, reached: dict[str, set[str]]) -> bool:
    seen: set[str] = set()
    left = [start]
    while left:
        following = reached.get(left.pop(), set())
        if goal in following:
            return True
        left += following - seen
        seen |= following
    return False
