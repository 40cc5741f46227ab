"""RequestRecord: what is known of an HTTP request while it is answered."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class RequestRecord:
    """One request.

    Attributes
    ----------
    request_id : str
        The client's own, or a new one.
    status : int
        0 before the answer has begun.
    left : bool
        Whether the client went away before its end.
    has_body : bool
        Whether its body has come whole.
    num_prompt_tokens, num_generated_tokens : int
        Of all prompts that it had run.
    """

    request_id: str
    status: int = 0
    left: bool = False
    has_body: bool = False
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0


RECORD: ContextVar[RequestRecord | None] = ContextVar("quire_request_record", default=None)
"""The request that the running task answers."""
