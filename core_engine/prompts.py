"""What callers may write for prompts, and how it becomes one entry per request."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypedDict, TypeVar

from quire.errors import InvalidRequestError
from quire.utils.checks import shown

T = TypeVar("T")


class _CacheSalt(TypedDict, total=False):
    cache_salt: str


class TextPrompt(_CacheSalt):
    """A prompt as text; requests with different ``cache_salt`` share no cached prefix."""

    prompt: str


class _TokensExtras(_CacheSalt, total=False):
    prompt: str


class TokensPrompt(_TokensExtras):
    """A prompt as token ids; its text, if given, is only repeated in the output."""

    prompt_token_ids: list[int]


Prompt = str | list[int] | TextPrompt | TokensPrompt
"""One prompt."""

Message = dict[str, Any]
"""One message of a conversation: ``{"role": "user", "content": "..."}``."""


def as_prompts(prompts: Any) -> list[Prompt]:
    """Return one entry per prompt: a lone prompt becomes a list of one.

    A list of integers is one prompt of token ids.

    Raises
    ------
    InvalidRequestError
        For an empty list, and for what is neither a prompt nor a sequence.
    """
    if isinstance(prompts, (str, dict)):
        return [prompts]  # type: ignore[list-item]
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise InvalidRequestError(
            "prompts must be a string, a dict with 'prompt' or 'prompt_token_ids', a list of token "
            f"ids, or a list of these, not {type(prompts).__name__}"
        )
    if not prompts:
        raise InvalidRequestError("prompts is empty: give at least one prompt")
    if all(isinstance(item, Integral) for item in prompts):
        return [list(prompts)]
    return list(prompts)


def as_single_prompt(prompt: Any) -> Prompt:
    """Return the prompt as it is.

    Raises
    ------
    InvalidRequestError
        For a list of prompts, and for what is no prompt.
    """
    is_list = isinstance(prompt, (list, tuple))
    if is_list and not all(isinstance(item, Integral) for item in prompt):
        raise InvalidRequestError(
            "one prompt is taken here: a string, a dict or a list of token ids; "
            "LLM.generate takes several"
        )
    return prompt if is_list and not prompt else as_prompts(prompt)[0]


def as_conversations(messages: Any) -> list[list[Message]]:
    """Return one list of messages per conversation: a lone conversation becomes a list of one.

    Raises
    ------
    InvalidRequestError
        For what is neither; for an empty list of conversations, and for an empty conversation.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise InvalidRequestError(
            f"messages must be a list of messages or a list of such lists, not {shown(messages)}"
        )
    if not messages:
        raise InvalidRequestError("messages is empty: give at least one message")
    nested = isinstance(messages[0], (list, tuple))
    conversations = list(messages) if nested else [messages]
    for i, conversation in enumerate(conversations):
        where = f"conversation {i}" if nested else "messages"
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise InvalidRequestError(f"{where} must be a list of at least one message")
        for message in conversation:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InvalidRequestError(
                    f"{where}: each message must be a dict with a 'role', not {shown(message)}"
                )
    return [list(conversation) for conversation in conversations]


def one_per_prompt(name: str, values: T | Sequence[T], num_prompts: int) -> list[T]:
    """Return ``values`` as one entry per prompt; a lone value stands for all of them.

    Raises
    ------
    InvalidRequestError
        For a sequence of another length than there are prompts.
    """
    if not isinstance(values, (list, tuple)):
        return [values] * num_prompts  # type: ignore[list-item]
    if len(values) != num_prompts:
        raise InvalidRequestError(
            f"{name} has {len(values)} entries for {num_prompts} prompts; "
            "give one for all or one per prompt"
        )
    return list(values)
