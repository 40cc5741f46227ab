"""From messages to a prompt, by the model's chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from quire.errors import InvalidRequestError
from quire.server.errors import ApiError
from quire.server.sampling import field_error

if TYPE_CHECKING:
    from quire.prompts import TokensPrompt
    from quire.server.protocol.chat import ChatFields
    from quire.server.service import Service

_OWN: Final = frozenset(
    {
        "messages",
        "chat_template",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
    }
)

_OF_TEMPLATE: Final = ("the chat template is not", "the chat template cannot")


async def chat_prompt(service: Service, body: ChatFields, **variables: Any) -> TokensPrompt:
    """Return the prompt of a conversation, in text and tokens.

    Parameters
    ----------
    service : Service
    body : ChatFields
    **variables
        Further ones of the template; those of the body win.

    Raises
    ------
    ApiError
        400: the messages or tools are malformed, or there is no template, or it refuses them.
    """
    generation = body.add_generation_prompt
    if body.continue_final_message and generation:
        raise ApiError(
            400,
            "add_generation_prompt must be false with continue_final_message: the last message is "
            "gone on with, and no new one begun",
            param="add_generation_prompt",
        )
    _check_template(service, body.chat_template)
    given = body.chat_template_kwargs or {}
    for name in given:
        if name in _OWN:
            raise ApiError(
                400,
                f"chat_template_kwargs has {name!r}, which is no variable of its own",
                param=f"chat_template_kwargs.{name}",
            )
    options = {
        **variables,
        **given,
        "chat_template": body.chat_template or _own_template(service),
        "add_generation_prompt": not body.continue_final_message and generation is not False,
        "continue_final_message": bool(body.continue_final_message),
    }
    try:
        # A template is a program, and a conversation may be long.
        return await asyncio.to_thread(_render, service, body, options)
    except InvalidRequestError as error:
        of_template = body.chat_template and str(error).startswith(_OF_TEMPLATE)
        other = "chat_template" if of_template else "messages"
        raise field_error(error, body, other) from None


def _check_template(service: Service, template: str | None) -> None:
    """Refuse a program of somebody who is not trusted with one; the name of one is none."""
    named = service.tokenizer.chat_template
    if not template or service.settings.trust_request_chat_template:
        return
    if isinstance(named, Mapping) and template in named:
        return
    raise ApiError(
        400,
        "chat_template is not taken from requests: a template is a program; give it to the server, "
        "or start that with --trust-request-chat-template",
        param="chat_template",
        code="unsupported_parameter",
    )


def _own_template(service: Service) -> str | None:
    return service.settings.chat_template or service.llm.config.model.chat_template


def _render(service: Service, body: ChatFields, options: dict[str, Any]) -> TokensPrompt:
    from quire.chat import template_messages, template_tools

    tokenizer = service.tokenizer
    text = tokenizer.apply_chat_template(
        template_messages(body.messages), tools=template_tools(body.tools or None), **options
    )
    assert isinstance(text, str)
    ids = (
        tokenizer.encode_prompt(text) if body.add_special_tokens else tokenizer.encode(text, False)
    )
    prompt: TokensPrompt = {"prompt": text, "prompt_token_ids": ids}
    salt = getattr(body, "cache_salt", None)
    if salt is not None:
        prompt["cache_salt"] = salt
    return prompt
