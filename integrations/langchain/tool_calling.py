"""Tools and schemas of a chat model that takes them as arguments of a call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.language_models.base import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable

from quire.errors import InvalidRequestError
from quire.integrations.langchain.response_format import json_schema, schema_format
from quire.integrations.langchain.structured_output import (
    METHODS,
    Method,
    StructuredOutputParser,
    described_schema,
    model_class_of,
    structured_chain,
)
from quire.integrations.langchain.tool_binding import (
    ToolLike,
    openai_tool_choice,
    openai_tools,
)
from quire.utils.checks import refuse


class ToolCallingModel(BaseChatModel):
    """A chat model whose calls take ``tools``, ``tool_choice`` and ``response_format``."""

    @abstractmethod
    def _check_call(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse arguments that no call takes."""

    def bind_tools(
        self,
        tools: Sequence[ToolLike],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the model with tools that it may call.

        Parameters
        ----------
        tools : list
            Pydantic models, TypedDicts, functions with type hints, dicts, LangChain's tools and
            runnables.
        tool_choice : str, bool or dict, optional
            ``"any"``, ``"required"`` or True makes the model call at least one, a tool's name
            that one: the answer is constrained, so that the call can always be read and its
            arguments match their schema. ``"auto"``, the default, leaves it to the model;
            ``"none"`` or False forbids it.
        strict : bool, optional
            Constrain the arguments of calls that are left to the model, too.
        parallel_tool_calls : bool, optional
            False for at most one call per answer.
        **kwargs
            Other arguments of a call, as for ``bind``.

        Returns
        -------
        Runnable

        Raises
        ------
        InvalidRequestError
            For what is no tool, and for a choice that is none of these.
        TypeError
            For an argument that no call takes.
        """
        converted = openai_tools(tools, strict=strict)
        bound: dict[str, Any] = {"tools": converted, **kwargs}
        choice = openai_tool_choice(tool_choice, converted)
        if choice is not None:
            bound["tool_choice"] = choice
        if parallel_tool_calls is not None:
            bound["parallel_tool_calls"] = parallel_tool_calls
        self._check_call(bound)
        return self.bind(**bound)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        tools: Sequence[ToolLike] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the model with answers that are objects of a schema.

        Parameters
        ----------
        schema : type or dict
            A pydantic model, whose objects the answers become; or a TypedDict, a JSON schema or a
            function in OpenAI's shape, which make them dicts. May be left out with
            ``"json_mode"``.
        method : str, default "json_schema"
            ``"json_schema"``: the answer is constrained to JSON of the schema.
            ``"function_calling"``: it is constrained to the call of a tool of that schema.
            ``"json_mode"``: it is some JSON object; the prompt has to say which, and what a
            pydantic model does not take is an error.
        include_raw : bool, default False
            Return a dict of ``raw``, the message, ``parsed`` and ``parsing_error``.
        strict : bool, optional
            Told to the template and to traces. Schemas are enforced whatever it is.
        tools : list, optional
            Tools that the model may call before it answers. The result is None then. With
            ``"json_schema"`` only.
        **kwargs
            Other arguments of a call, as for ``bind``.

        Returns
        -------
        Runnable
            What it streams is the value as far as it is there.

        Raises
        ------
        InvalidRequestError
            For a method that does not exist, and a schema that is none.
        """
        if method not in METHODS:
            raise refuse("method", method, f"one of {', '.join(map(repr, METHODS))}")
        if schema is None and method != "json_mode":
            raise InvalidRequestError(f"method={method!r} needs a schema")
        if tools and method != "json_schema":
            raise InvalidRequestError(f"tools= needs method='json_schema', not {method!r}")
        parser = StructuredOutputParser(model_class=model_class_of(schema))
        bound = {**kwargs, "ls_structured_output_format": described_schema(schema, method, strict)}
        if method == "function_calling" and schema is not None:
            [tool] = openai_tools([schema])
            parser.tool_name = tool["function"]["name"]
            model = self.bind_tools(
                [schema],
                tool_choice=parser.tool_name,
                strict=strict,
                parallel_tool_calls=False,
                **bound,
            )
        elif method == "json_mode":
            model = self.bind(response_format={"type": "json_object"}, **bound)
        else:
            bound["response_format"] = schema_format(json_schema(schema), strict=strict)
            model = self.bind_tools(tools, **bound) if tools else self.bind(**bound)
        self._check_call(bound)
        return structured_chain(model, parser, include_raw=include_raw)
