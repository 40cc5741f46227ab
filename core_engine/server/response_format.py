"""What a request's text has to match, of the several fields that can say it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from quire.errors import InvalidRequestError
from quire.server.errors import ApiError
from quire.structured_outputs import StructuredOutputsParams
from quire.utils.checks import shown

if TYPE_CHECKING:
    from quire.server.protocol.sampling import SamplingBody

_GUIDED: Final = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "structural_tag": "structural_tag",
}

_FORMATS: Final = (
    "text",
    "json_object",
    "json_schema",
    "structural_tag",
    "regex",
    "choice",
    "grammar",
)

_SCHEMA_FIELDS: Final = ("name", "description", "schema", "strict")


def structured_outputs(body: SamplingBody, backend: str) -> StructuredOutputsParams | None:
    """Return what the text has to match, or None.

    Parameters
    ----------
    body : SamplingBody
    backend : str
        The library that the engine enforces structures with.

    Raises
    ------
    ApiError
        400: it is wrong, or said twice.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    if body.structured_outputs is not None:
        given = {
            name: value for name, value in body.structured_outputs.items() if value is not None
        }
        if given:
            found["structured_outputs"] = ("structured_outputs", given)
    for name, kind in _GUIDED.items():
        value = getattr(body, name)
        if value is not None and value is not False:
            found[name] = (name, {kind: value, **_guided_options(body)})
    if body.response_format is not None:
        read = _read_format(body.response_format)
        if read is not None:
            if read[1].keys() & {"json", "json_object"} and backend != "xgrammar":
                # More than a space between the parts of JSON is how weak models run on.
                read[1]["whitespace_pattern"] = "[ ]?"
            found["response_format"] = read
    if not found:
        return None
    if len(found) > 1:
        raise ApiError(
            400,
            f"give only one of {' and '.join(found)}: each says what the text must match",
            param=list(found)[-1],
        )
    [(param, fields)] = found.values()
    try:
        return StructuredOutputsParams(**fields)
    except (InvalidRequestError, TypeError) as error:
        raise ApiError(400, f"{param}: {error}", param=param) from None


def structure_field(body: SamplingBody) -> str:
    """Return the field by which a text has to match something; with none, it is the tools."""
    for name in ("structured_outputs", *_GUIDED, "response_format"):
        if getattr(body, name):
            return name
    return "tools"


def _guided_options(body: SamplingBody) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if body.guided_whitespace_pattern is not None:
        options["whitespace_pattern"] = body.guided_whitespace_pattern
    if body.guided_decoding_backend not in (None, "auto"):
        options["backend"] = body.guided_decoding_backend
    return options


def _read_format(value: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the field's path and what it says as structured outputs."""
    kind = value.get("type")
    if kind not in _FORMATS:
        valid = ", ".join(_FORMATS)
        raise _wrong("response_format.type", f"must be one of {valid}, got {shown(kind)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return "response_format", {"json_object": True}
    if kind == "json_schema":
        return _read_schema(value)
    if kind == "structural_tag":
        # As vLLM has it, the tag's fields stand beside the type; OpenAI's style nests them.
        tag = value.get("structural_tag")
        tag = {k: v for k, v in value.items() if k != "type"} if tag is None else tag
        return "response_format", {"structural_tag": tag}
    if value.get(kind) is None:
        raise _wrong(f"response_format.{kind}", f"is missing, which the type {kind!r} needs")
    return f"response_format.{kind}", {kind: value[kind]}


def _read_schema(value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    path = "response_format.json_schema"
    wrapper = value.get("json_schema")
    if not isinstance(wrapper, dict):
        raise _wrong(path, f"must be an object with 'name' and 'schema', got {shown(wrapper)}")
    for name in wrapper:
        if name not in _SCHEMA_FIELDS:
            valid = ", ".join(_SCHEMA_FIELDS)
            raise _wrong(path, f"has {shown(name)}; what it may have is {valid}")
    schema = wrapper.get("schema")
    if not isinstance(schema, dict):
        raise _wrong(f"{path}.schema", f"must be a JSON schema, got {shown(schema)}")
    strict = wrapper.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise _wrong(f"{path}.strict", f"must be true or false, got {shown(strict)}")
    return f"{path}.schema", {"json": schema}


def _wrong(path: str, reason: str) -> ApiError:
    return ApiError(400, f"{path} {reason}", param=path)
