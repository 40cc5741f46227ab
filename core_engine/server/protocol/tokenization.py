"""The bodies of ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Any, ClassVar

from quire.server.fields import Ints, RequestBody
from quire.server.protocol.chat import CHAT_REFUSED, ChatFields, Messages


class TokenizeRequest(ChatFields):
    """A text, or a conversation, to be made tokens of."""

    refused: ClassVar[dict[str, str]] = {
        **CHAT_REFUSED,
        "mm_processor_kwargs": "models here read text",
    }

    model: str | None = None
    prompt: str | None = None
    """The text, where there are no messages."""
    messages: Messages | None = None  # type: ignore[assignment]
    """The conversation, where there is no text."""
    return_token_strs: bool | None = None
    """Also return the tokens as the vocabulary spells them."""
    mm_processor_kwargs: Any = None


class DetokenizeRequest(RequestBody):
    """Tokens to be made text of."""

    model: str | None = None
    tokens: Ints
