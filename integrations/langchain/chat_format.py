"""How the answers of a loaded model are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.chat import ChatFormat
    from quire.llm import LLM
    from quire.tokenizer.tokenizer import Tokenizer


class _Template:
    """A chat template that is not the tokenizer's own, with the tokenizer's special tokens."""

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self.chat_template = template
        self.special_texts = tokenizer.special_texts


def new_format(
    llm: LLM, template: str | None, tool_parser: str | None, reasoning_parser: str | None
) -> ChatFormat:
    """Return how tool calls and reasoning are read from a model's answers.

    Parameters
    ----------
    llm : LLM
    template : str, optional
        What is used instead of the engine's chat template, or the name of one of several.
    tool_parser, reasoning_parser : str, optional
        Names of parsers; found out from the template where they are left out.

    Raises
    ------
    ConfigError
        There is no parser of that name.
    """
    from quire.chat import ChatFormat

    tokenizer = llm.get_tokenizer()
    asked = template or llm.config.model.chat_template
    if asked is None:
        return ChatFormat.for_model(tokenizer, tool_parser, reasoning_parser)
    own = tokenizer.chat_template
    text = own.get(asked, asked) if isinstance(own, Mapping) else asked
    return ChatFormat.for_model(_Template(text, tokenizer), tool_parser, reasoning_parser)
