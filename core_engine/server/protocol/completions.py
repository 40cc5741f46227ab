"""The body of ``/v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final

from pydantic import AfterValidator, WithJsonSchema

from quire.server.fields import Int
from quire.server.protocol.sampling import SamplingBody

PROMPT_SCHEMA: Final = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
        },
    ]
}
_EXPECTED: Final = "must be a string, a list of token ids, or a list of these"


def as_prompt_list(value: Any) -> list[str | list[int]]:
    """Return the prompts that OpenAI's field means: a list of integers is one of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(_EXPECTED)
    if not value:
        raise ValueError("is empty: give at least one prompt")
    if isinstance(value[0], (int, float)):
        value = [value]
    return [_prompt(item, i) for i, item in enumerate(value)]


def _prompt(item: Any, i: int) -> str | list[int]:
    if isinstance(item, str):
        return item
    if not isinstance(item, list) or not item:
        raise ValueError(f"{_EXPECTED}, none of them empty; number {i} is not")
    if set(map(type, item)) == {int}:
        return item
    for token_id in item:
        if type(token_id) is not int and not (
            isinstance(token_id, float) and token_id.is_integer()
        ):
            raise ValueError(f"{_EXPECTED}; number {i} holds something else")
    return [int(token_id) for token_id in item]


Prompts = Annotated[Any, AfterValidator(as_prompt_list), WithJsonSchema(PROMPT_SCHEMA)]


class CompletionRequest(SamplingBody):
    """A request to go on with a text, or several."""

    refused: ClassVar[dict[str, str]] = {
        **SamplingBody.refused,
        "suffix": "text is completed at its end, not in its middle",
    }

    prompt: Prompts
    """Text, token ids, or a list of either."""
    echo: bool | None = None
    """Return the prompt before the completion."""
    logprobs: Int | None = None
    """Return the log-probability of each token, and of this many likeliest ones."""
    suffix: Any = None
