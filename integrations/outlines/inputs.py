"""Outlines' inputs as prompts of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from quire.errors import InvalidRequestError
from quire.integrations.outlines.upstream import Audio, Chat, Image, Video
from quire.prompts import Message, Prompt, as_conversations
from quire.utils.checks import shown

if TYPE_CHECKING:
    from quire.llm import LLM

CHAT_OPTIONS: Final[tuple[str, ...]] = (
    "add_generation_prompt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "tools",
)
"""Arguments of a call that say how a chat is written out, as of :meth:`quire.LLM.chat`."""


def is_batch(model_input: Any) -> bool:
    """Return whether an input is several: a list, but not one of token ids or with an image."""
    return (
        isinstance(model_input, list)
        and not all(isinstance(item, int) for item in model_input)
        and not any(isinstance(item, (Image, Audio, Video)) for item in model_input)
    )


def as_prompt(
    llm: LLM, model_input: Any, *, chat: bool = False, chat_options: Mapping[str, Any] | None = None
) -> Prompt:
    """Return one input as the engine takes it.

    Parameters
    ----------
    llm : LLM
        Its chat template is what a ``Chat`` is written out by.
    model_input : str, Chat, list of int or dict
        A text; a conversation; a prompt of :meth:`quire.LLM.generate`.
    chat : bool
        Take a text for what a user says in a conversation, and not for the prompt itself.
    chat_options : mapping, optional
        Of :data:`CHAT_OPTIONS`.

    Raises
    ------
    TypeError
        For what is no input, and for chat options without a chat.
    InvalidRequestError
        For images, videos and sounds, and where the template refuses a conversation.
    """
    if chat and isinstance(model_input, str):
        model_input = Chat([{"role": "user", "content": model_input}])
    options = dict(chat_options or {})
    if isinstance(model_input, Chat):
        messages = model_input.messages
        if not isinstance(messages, (list, tuple)):
            raise TypeError(f"the messages of a Chat must be a list, not {shown(messages)}")
        [conversation] = as_conversations([[_plain(message) for message in messages]])
        return llm._chat_prompt(conversation, **options)
    if options:
        raise TypeError(
            f"{next(iter(options))} needs a chat: an outlines.inputs.Chat, or chat=True"
        )
    if isinstance(model_input, str):
        return model_input
    if isinstance(model_input, dict) and model_input.keys() & {"prompt", "prompt_token_ids"}:
        return model_input  # type: ignore[return-value]
    if isinstance(model_input, list):
        for item in model_input:
            _refuse_asset(item)
        if model_input and all(isinstance(item, int) for item in model_input):
            return model_input
    _refuse_asset(model_input)
    raise TypeError(
        f"the input must be a str, an outlines.inputs.Chat or a prompt of quire.LLM.generate, not "
        f"{shown(model_input)}; messages go into a Chat, and a Template is called first"
    )


def _plain(message: Any) -> Message:
    """Return a message of texts alone, in which some templates take no list."""
    if not isinstance(message, dict):
        raise TypeError(f"a message of a Chat must be a dict, not {shown(message)}")
    content = message.get("content")
    if not isinstance(content, list):
        _refuse_asset(content)
        return message
    texts = []
    for part in content:
        _refuse_asset(part)
        if isinstance(part, dict) and part.get("type") == "text":
            part = part.get("text")
        if not isinstance(part, str):
            raise InvalidRequestError(f"a message's content must be text, not {shown(part)}")
        texts.append(part)
    return {**message, "content": "\n".join(texts)}


def _refuse_asset(item: Any) -> None:
    if isinstance(item, (Image, Audio, Video)):
        raise InvalidRequestError(
            f"{type(item).__name__} is not supported: the models that quire runs read text alone"
        )
