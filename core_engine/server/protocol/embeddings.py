"""The body of ``/v1/embeddings``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from quire.server.fields import Int, RequestBody
from quire.server.protocol.completions import Prompts


class EmbeddingRequest(RequestBody):
    """A request for the vectors of texts."""

    refused: ClassVar[dict[str, str]] = {
        "messages": "give the texts in input",
        "mm_processor_kwargs": "models here read text",
    }

    input: Prompts
    """A text or its token ids, or a list of either."""
    model: str | None = None
    """One of the names of ``/v1/models``; left out, the first."""
    encoding_format: Literal["float", "base64"] | None = None
    """Lists of numbers, or the bytes of little-endian 32-bit floats in base64."""
    dimensions: Int | None = None
    """Keep that many of the first numbers."""
    user: str | None = None
    """Changes nothing."""

    # vLLM's, and quire's own
    pooling: Literal["last", "mean", "cls"] | None = None
    """Which of the hidden states: the last token's, the mean of all, or the first's."""
    normalize: bool | None = None
    """Whether vectors have length 1; true if left out."""
    truncate_prompt_tokens: Int | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None

    messages: Any = None
    mm_processor_kwargs: Any = None
