"""SamplingBody: the fields that completions and chats have in common."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from quire.server.fields import Int, Ints, RequestBody, Strings

_STOP_SCHEMA: Final = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "null"},
    ]
}


def _check_stop(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a string or a list of strings")
    return value


def _check_bias(value: Any) -> Any:
    if isinstance(value, dict):
        for name, item in value.items():
            if isinstance(item, bool) or not isinstance(item, (int, float)):
                # The first wrong one alone, as with lists.
                return {name: item}
    return value


def _check_early_stopping(value: Any) -> Any:
    if value is not None and not isinstance(value, bool) and value != "never":
        raise ValueError('must be true, false or "never"')
    return value


Stop = Annotated[Any, AfterValidator(_check_stop), WithJsonSchema(_STOP_SCHEMA)]
EarlyStopping = Annotated[
    Any,
    AfterValidator(_check_early_stopping),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"const": "never"}, {"type": "null"}]}),
]
Object = dict[str, Any]


class StreamOptions(RequestBody):
    """What a stream holds besides the text."""

    include_usage: bool | None = None
    """Send a last chunk with the usage, and no choices."""
    continuous_usage_stats: bool | None = None
    """Send the usage so far with every chunk."""
    include_obfuscation: bool | None = None
    """OpenAI's padding against onlookers; there is none here."""


class SamplingBody(RequestBody):
    """How tokens are chosen, when a text ends, and how it is sent; OpenAI's fields and vLLM's."""

    refused: ClassVar[dict[str, str]] = {
        "logits_processors": "code cannot come with a request",
        "kv_transfer_params": "a server's KV cache is its own",
        "prompt_embeds": "prompts are text or token ids",
        "mm_processor_kwargs": "models here read text",
        "repetition_detection": "there is no such thing here; see repetition_penalty",
        "thinking_token_budget": "thinking cannot be cut short; see max_tokens",
    }

    model: str | None = None
    """One of the names of ``/v1/models``; left out, the first."""
    n: Int | None = None
    """Completions of each prompt."""
    best_of: Int | None = None
    """Completions of which the ``n`` likeliest are returned."""
    max_tokens: Int | None = None
    """Tokens to generate at most."""
    temperature: float | None = None
    """What logits are divided by; 0 always takes the likeliest token."""
    top_p: float | None = None
    """Draw from the likeliest tokens that have this probability together."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Int | None = None
    """Makes the draws repeat."""
    stop: Stop = None
    """Strings that end the text."""
    logit_bias: Annotated[dict[str, float], BeforeValidator(_check_bias)] | None = None
    """Added to the logits of these token ids."""
    stream: bool | None = None
    """Send the text as it is written, as server-sent events."""
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Changes nothing."""
    response_format: Object | None = None
    """``{"type": "text" | "json_object" | "json_schema" | "structural_tag" | "regex" | "choice" |
    "grammar", ...}``; the last three hold what they are about in a field of the same name."""

    # vLLM's, and quire's own
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping = None
    use_beam_search: bool | None = None
    stop_token_ids: Ints | None = None
    bad_words: Strings | None = None
    allowed_token_ids: Ints | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Int | None = None
    prompt_logprobs: Int | None = None
    """Also return the log-probabilities of the prompt's tokens, and of this many likeliest."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's own tokens around a text, such as BOS."""
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """Write a token of the log-probabilities as ``token_id:`` and its number."""
    structured_outputs: Object | None = None
    """What the text has to match: the fields of ``quire.StructuredOutputsParams``."""
    guided_json: Annotated[
        Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]})
    ] = None
    """An older name of ``structured_outputs.json``; so are the next ones."""
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None
    structural_tag: Annotated[
        Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]})
    ] = None
    priority: Int | None = None
    """Lower runs earlier, where the server schedules by priority."""
    request_id: str | None = Field(default=None, min_length=1, max_length=256)
    """A name for the request, that no other request in flight has."""
    cache_salt: str | None = Field(default=None, min_length=1)
    """Requests with different salts share no cached prefix."""
    vllm_xargs: Object | None = None
    """What the request has for the engine's own logits processors."""

    logits_processors: Any = None
    kv_transfer_params: Any = None
    prompt_embeds: Any = None
    mm_processor_kwargs: Any = None
    repetition_detection: Any = None
    thinking_token_budget: Any = None
