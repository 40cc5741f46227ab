"""The body of ``/v1/responses``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final

from pydantic import WithJsonSchema

from quire.server.fields import Int, RequestBody, Strings
from quire.server.protocol.sampling import Object, SamplingBody

_INPUT: Final = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]
}
_CHOICE: Final = {"anyOf": [{"enum": ["auto", "none", "required"]}, {"type": "object"}]}
_STATELESS: Final = "nothing is kept here: send the conversation so far in input"


class TextConfig(RequestBody):
    """What the answer's text has to be like."""

    format: Object | None = None
    """``{"type": "text" | "json_object" | "json_schema", ...}``, and the further types that a
    chat's ``response_format`` has."""
    verbosity: str | None = None
    """Changes nothing."""


class Reasoning(RequestBody):
    """How the model is to think."""

    effort: str | None = None
    """A variable of the chat template, for those that know it."""
    summary: str | None = None
    """Changes nothing: what the model thought is told as it is."""
    generate_summary: str | None = None
    context: str | None = None


class ResponsesRequest(SamplingBody):
    """A request for what a conversation goes on with."""

    refused: ClassVar[dict[str, str]] = {
        **SamplingBody.refused,
        "previous_response_id": _STATELESS,
        "conversation": _STATELESS,
        "background": "an answer is waited for, or streamed",
        "prompt": "no prompts are kept here: send instructions and input",
        "max_tokens": "it is max_output_tokens here",
        "response_format": "it is text.format here",
        "best_of": "a response has one answer",
        "use_beam_search": "a response has one answer",
        "prompt_logprobs": "a response has no place for them",
        "return_token_ids": "a response has no place for them",
        "length_penalty": "it is about use_beam_search, and a response has one answer",
        "early_stopping": "it is about use_beam_search, and a response has one answer",
        "moderation": "there is none here",
        "context_management": "nothing is kept here",
    }

    input: Annotated[str | list[Any], WithJsonSchema(_INPUT)]
    """A text, or the items of the conversation so far."""
    instructions: str | None = None
    """What the conversation begins with."""
    max_output_tokens: Int | None = None
    """Tokens to generate at most; left out, as many as there is room for."""
    tools: list[Any] | None = None
    """Functions that the model may call."""
    tool_choice: Annotated[Any, WithJsonSchema(_CHOICE)] = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    top_logprobs: Int | None = None
    include: Strings | None = None
    """``"message.output_text.logprobs"`` returns log-probabilities; the others add nothing."""
    truncation: str | None = None
    """``"disabled"``: what is too long is refused."""
    chat_template_kwargs: Object | None = None
    """Further variables of the chat template."""
    max_tool_calls: Int | None = None

    # These change nothing here.
    metadata: Object | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None

    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None
    moderation: Any = None
    context_management: Any = None
