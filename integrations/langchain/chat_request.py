"""A conversation as the engine is asked to answer it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from quire.errors import InvalidRequestError
from quire.integrations.langchain.response_format import response_constraint
from quire.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.chat import ChatFormat, ChatReader
    from quire.llm import LLM
    from quire.prompts import Prompt, TokensPrompt


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What a call may ask for besides sampling parameters.

    Attributes
    ----------
    tools : list of dict, optional
        In OpenAI's shape.
    tool_choice : str or dict, optional
        ``"auto"``, ``"none"``, ``"required"`` or a function by name.
    parallel_tool_calls : bool, optional
        False for at most one call. None is True.
    response_format : dict, optional
        In the shape of OpenAI's chat completions.
    """

    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None


OPTION_NAMES = tuple(field.name for field in fields(ChatOptions))
"""Arguments of a call that become :class:`ChatOptions`."""


@dataclass(frozen=True)
class ChatRequest:
    """What one conversation is for the engine, and how its answers are read.

    Attributes
    ----------
    prompt : dict
        Text and token ids, as the chat template wrote them.
    params : SamplingParams
    new_reader : callable
        Makes a reader of one completion.
    """

    prompt: Prompt
    params: SamplingParams
    new_reader: Callable[[], ChatReader]


def chat_request(
    llm: LLM,
    messages: list[dict[str, Any]],
    params: SamplingParams,
    options: ChatOptions,
    chat_format: ChatFormat,
    rendering: Mapping[str, Any],
) -> ChatRequest:
    """Write out a conversation and constrain its answer.

    Parameters
    ----------
    llm : LLM
    messages : list of dict
        In OpenAI's shape.
    params : SamplingParams
    options : ChatOptions
    chat_format : ChatFormat
    rendering : dict
        ``chat_template``, ``chat_template_kwargs``, ``add_generation_prompt`` and
        ``continue_final_message``, as for :meth:`quire.LLM.chat`.

    Raises
    ------
    InvalidRequestError
        There is no chat template, or it refuses the conversation; options contradict each other.
    """
    backend = llm.config.structured.structured_outputs_backend
    constraint = response_constraint(options.response_format, backend)
    if constraint is not None:
        if params.structured_outputs is not None:
            raise InvalidRequestError(
                "response_format and structured_outputs both say what the answer has to match: "
                "give one of them"
            )
        params = replace(params, structured_outputs=constraint)
    choice = "auto" if options.tool_choice is None else options.tool_choice
    parallel = options.parallel_tool_calls is not False
    tools = options.tools or None
    prompt = chat_prompt(llm, messages, tools, chat_format, rendering)
    params = chat_format.constrain(params, tools, choice, parallel, prompt["prompt"])
    reader = partial(chat_format.reader, tools, choice, parallel, prompt["prompt"])
    return ChatRequest(prompt, params, reader)


def chat_prompt(
    llm: LLM,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    chat_format: ChatFormat,
    rendering: Mapping[str, Any],
) -> TokensPrompt:
    """Return the text and tokens that the chat template makes of a conversation.

    Raises
    ------
    InvalidRequestError
        There is no chat template, or it refuses the conversation.
    """
    from quire.chat import template_tools

    own = llm.config.model.chat_template or llm.get_tokenizer().chat_template
    if own is None and rendering.get("chat_template") is None:
        raise InvalidRequestError(
            f"{llm.config.model.model!r} has no chat template, so it cannot be told how a "
            "conversation is written for it: give chat_template= a Jinja template, take a model "
            "that was tuned for chat (its name often ends in -Instruct), or use VLLM, which "
            "completes text"
        )
    written = chat_format.messages(messages)
    prompt = llm._chat_prompt(written, tools=template_tools(tools), **rendering)
    return cast("TokensPrompt", prompt)
