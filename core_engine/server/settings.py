"""ServerSettings: what a server is told besides the engine's arguments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server behaves.

    Attributes
    ----------
    served_model_names : tuple of str
        The names that clients may ask for; the first one stands in answers.
    api_keys : tuple of str
        Of which a client has to send one; none are asked for where it is empty.
    chat_template : str or None
        A template, instead of the model's own.
    tool_call_parser, reasoning_parser : str or None
        How answers are read; None guesses by the model's chat template.
    strict_fields : bool
        Refuse a request with a field that nobody knows; otherwise a header of the answer names it.
    page : bool
        Offer a page for browsers at ``/``.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    chat_template: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    strict_fields: bool = False
    page: bool = True
