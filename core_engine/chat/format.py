"""ChatFormat: how a model's answers are read, and constrained."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from quire.chat.grammar import answer_constraint
from quire.chat.lark import lark_string
from quire.chat.messages import template_messages
from quire.chat.reader import ChatReader
from quire.chat.reasoning_parsers.interface import ReasoningParser
from quire.chat.registry import (
    guess_reasoning_parser,
    guess_tool_parser,
    reasoning_parser_class,
    tool_parser_class,
)
from quire.chat.tool_parsers.interface import ToolParser
from quire.chat.tools import read_tool_choice, read_tools

if TYPE_CHECKING:
    from quire.sampling_params import SamplingParams


class _Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    chat_template: str | Mapping[str, str] | None

    def special_texts(self) -> dict[int, str]: ...


@dataclass(frozen=True)
class ChatFormat:
    """How a model's answers are read: which of their text is reasoning, and which a tool call.

    Made by :meth:`for_model`; one serves any number of completions, on any thread.

    Attributes
    ----------
    tool_parser : str or None
        Name of the tool-call parser.
    reasoning_parser : str or None
        Name of the reasoning parser.
    """

    tool_parser: str | None = None
    reasoning_parser: str | None = None
    _tools: ToolParser | None = field(default=None, repr=False, compare=False)
    _reasoning: ReasoningParser | None = field(default=None, repr=False, compare=False)
    _special: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def for_model(
        cls,
        source: Any = None,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        chat_template: str | None = None,
    ) -> ChatFormat:
        """Return the format of a model.

        Parameters
        ----------
        source : Tokenizer, str, mapping of str to str, or None
            The model's tokenizer, or the text of its chat template, or several by name. With a
            tokenizer it is known which tags are special tokens of it.
        tool_parser, reasoning_parser : str, optional
            Names of parsers; ``"none"`` for none. Left out, they are guessed from the template.
        chat_template : str, optional
            The template that is used instead of the tokenizer's, or the name of one of its own.

        Raises
        ------
        ConfigError
            There is no parser of that name.
        """
        template = _template_text(source, chat_template)
        tools: ToolParser | None = None
        reasoning: ReasoningParser | None = None
        if tool_parser != "none":
            tool_class = (
                guess_tool_parser(template)
                if tool_parser is None
                else tool_parser_class(tool_parser)
            )
            tools = tool_class(template) if tool_class else None
        if reasoning_parser != "none":
            reasoning_class = (
                guess_reasoning_parser(template)
                if reasoning_parser is None
                else reasoning_parser_class(reasoning_parser)
            )
            reasoning = reasoning_class(template) if reasoning_class else None
        return cls(
            tools.name if tools else None,
            reasoning.name if reasoning else None,
            tools,
            reasoning,
            _special_tokens(source, tools, reasoning),
        )

    def reader(
        self,
        tools: Any = None,
        tool_choice: Any = "auto",
        parallel_tool_calls: bool = True,
        prompt: str = "",
    ) -> ChatReader:
        """Return a reader of one completion.

        Parameters
        ----------
        tools : list of dict, optional
            Without them, nothing is taken for a call.
        tool_choice : str or dict, default "auto"
            With ``"none"``, nothing is taken for a call. Calls of functions that were not
            offered are calls: whoever runs them has to say so to the model.
        parallel_tool_calls : bool, default True
            False takes what follows a first call for text.
        prompt : str, optional
            The prompt, or its end: a model may be in the midst of thinking there.

        Raises
        ------
        InvalidRequestError
            Tools or a choice that are malformed.
        """
        choice = read_tool_choice(tool_choice, read_tools(tools))
        parser = self._parser(choice.required) if choice.tools else None
        return ChatReader(
            parser.reader(parallel_tool_calls and not choice.single) if parser else None,
            self._reasoning.reader(prompt) if self._reasoning else None,
            parser.call_id if parser else _call_id,
        )

    def constrain(
        self,
        params: SamplingParams,
        tools: Any = None,
        tool_choice: Any = "auto",
        parallel_tool_calls: bool = True,
        prompt: str = "",
    ) -> SamplingParams:
        """Return the parameters of a completion that has to be what was asked for.

        A required call, or that of a named function, always parses, and its arguments match the
        function's schema; objects in it have no members that the schema does not name. Where the
        model may answer or call, it is left free; but calls match the functions that are there
        where one of them is ``strict``, or ``parallel_tool_calls`` is False (then nothing
        follows the first), or ``params.structured_outputs`` say what an answer has to match.
        Before all this, a model that thinks may think.

        Parameters
        ----------
        params : SamplingParams
            Not changed.
        tools : list of dict, optional
        tool_choice : str or dict, default "auto"
        parallel_tool_calls : bool, default True
        prompt : str, optional
            The prompt, or its end: a model may be in the midst of thinking there.

        Returns
        -------
        SamplingParams
            Also adjusted, see :meth:`adjust`; ``params`` itself where nothing is to be changed.

        Raises
        ------
        InvalidRequestError
            Tools or a choice that are malformed; a call is asked for together with
            ``params.structured_outputs``; or such as cannot be had together with tools.
        """
        choice = read_tool_choice(tool_choice, read_tools(tools))
        own = params.structured_outputs
        constraint = answer_constraint(
            own,
            choice,
            parallel=parallel_tool_calls,
            prompt=prompt,
            tool_parser=self._parser(choice.required),
            reasoning_parser=self._reasoning,
            literal=self._literal,
        )
        params = self.adjust(params, bool(choice.tools))
        if constraint is not own:
            params = params.clone()
            params.structured_outputs = constraint
        return params

    def adjust(self, params: SamplingParams, has_tools: bool = True) -> SamplingParams:
        """Return parameters under which the tags that are special tokens stay in the text.

        Parameters
        ----------
        params : SamplingParams
            Not changed.
        has_tools : bool, default True
            Whether the reader will look for calls.
        """
        parsers = (self._tools if has_tools else None, self._reasoning)
        markers = {marker for parser in parsers if parser for marker in parser.markers}
        if not params.skip_special_tokens or markers.isdisjoint(self._special):
            return params
        params = params.clone()
        params.skip_special_tokens = False
        return params

    def messages(self, messages: Any) -> list[dict[str, Any]]:
        """Do what :func:`quire.chat.template_messages` does, with ids as this format has them.

        Parameters
        ----------
        messages : list of dict

        Raises
        ------
        InvalidRequestError
            A message that is malformed.
        """
        written = template_messages(messages)
        if self._tools is not None:
            for message in written:
                for call in (*message.get("tool_calls", ()), message):
                    key = "tool_call_id" if call is message else "id"
                    if key in call:
                        call[key] = self._tools.template_id(call[key])
        return written

    def _literal(self, marker: str) -> str:
        id_ = self._special.get(marker)
        return lark_string(marker) if id_ is None else f"<[{id_}]>"

    def _parser(self, required: bool) -> ToolParser | None:
        """Return what reads calls; where calls are forced, there is always something."""
        if self._tools is None and required:
            return tool_parser_class("hermes")("")
        return self._tools


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _template_text(source: Any, asked: str | None) -> str:
    """Return the text of a chat template, or of all that there are."""
    own = source if isinstance(source, (str, Mapping)) else getattr(source, "chat_template", None)
    if isinstance(own, Mapping) and asked in own:
        own = own[asked]
    elif asked is not None:
        own = asked
    if isinstance(own, Mapping):
        return "\n".join(text for text in own.values() if isinstance(text, str))
    return own if isinstance(own, str) else ""


def _special_tokens(source: Any, *parsers: ToolParser | ReasoningParser | None) -> dict[str, int]:
    """Return which of the parsers' markers are special tokens, with their ids."""
    special_texts = getattr(source, "special_texts", None)
    if special_texts is None:
        return {}
    markers = {marker for parser in parsers if parser for marker in parser.markers}
    return {text: id_ for id_, text in special_texts().items() if text in markers}
