"""The body of ``/v1/chat/completions``, and what it shares with others that have messages."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final

from pydantic import WithJsonSchema

from quire.server.fields import Int, RequestBody, Strings
from quire.server.protocol.sampling import Object, SamplingBody

_PART: Final = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_MESSAGE: Final = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]
        },
        "name": {"type": "string"},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": {"type": "string"},
    },
}
_CHOICE: Final = {
    "anyOf": [{"enum": ["auto", "none", "required"]}, {"type": "object"}, {"type": "null"}]
}

Messages = Annotated[list[Any], WithJsonSchema({"type": "array", "items": _MESSAGE, "minItems": 1})]
ToolChoice = Annotated[Any, WithJsonSchema(_CHOICE)]

CHAT_REFUSED: Final = {
    "documents": "put them into the messages, or into chat_template_kwargs",
}


class ChatFields(RequestBody):
    """How messages become a prompt."""

    messages: Messages
    """The conversation. Checked further by :func:`quire.chat.template_messages`."""
    tools: list[Any] | None = None
    """Functions that the model may call."""
    add_generation_prompt: bool | None = None
    """End the prompt where the assistant's answer begins; true, unless the last message is to be
    continued."""
    continue_final_message: bool | None = None
    """Let the model go on with the last message."""
    chat_template: str | None = None
    """A Jinja template instead of the model's own."""
    chat_template_kwargs: Object | None = None
    """Further variables of the template."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's own tokens around what the template wrote, which mostly has them."""
    documents: Any = None


class ChatRequest(ChatFields, SamplingBody):
    """A request for the next message of a conversation."""

    refused: ClassVar[dict[str, str]] = {
        **SamplingBody.refused,
        **CHAT_REFUSED,
        "audio": "models here write text",
        "prediction": "there is no such thing here",
        "web_search_options": "models here have no search",
        "functions": "it has become tools",
        "function_call": "it has become tool_choice",
        "moderation": "there is none here",
    }

    max_completion_tokens: Int | None = None
    """Tokens to generate at most; left out, as many as there is room for."""
    logprobs: bool | None = None
    """Return the log-probability of each token."""
    top_logprobs: Int | None = None
    """And of this many likeliest ones."""
    tool_choice: ToolChoice = None
    """``"auto"``, ``"none"``, ``"required"``, or a function by its name."""
    parallel_tool_calls: bool | None = None
    """Whether there may be several calls in a message."""
    reasoning_effort: str | None = None
    """A variable of the template, for those that know it."""
    include_reasoning: bool | None = None
    """Whether the answer has what the model thought."""
    echo: bool | None = None
    """Put the last message before the answer, where both are the assistant's."""
    modalities: Strings | None = None
    """``["text"]``."""

    # These change nothing here.
    metadata: Object | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    verbosity: str | None = None

    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    functions: Any = None
    function_call: Any = None
    moderation: Any = None
