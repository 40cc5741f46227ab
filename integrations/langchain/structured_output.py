"""What ``with_structured_output`` puts behind a chat model: parsing, and what asks for it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers.transform import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.json import parse_partial_json
from langchain_core.utils.pydantic import is_basemodel_subclass

from quire.integrations.langchain.messages import text_of

Method = Literal["json_schema", "function_calling", "json_mode"]
"""How a model is made to answer in a schema."""

METHODS: tuple[Method, ...] = ("json_schema", "function_calling", "json_mode")


class StructuredOutputParser(BaseCumulativeTransformOutputParser[Any]):
    """Reads an answer, or the arguments of a tool call, as JSON.

    A stream gives what is there of the value so far; a class's object as soon as it is valid.

    Parameters
    ----------
    model_class : type, optional
        A pydantic model, of version 1 or 2, to make of the JSON.
    tool_name : str, optional
        The tool whose call's arguments are the value; without it the answer's text is.
    """

    model_class: Any = None
    tool_name: str | None = None

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Return the value in an answer.

        Parameters
        ----------
        result : list of Generation
            The first is read.
        partial : bool
            Whether more of the answer may come; what cannot be read yet is None then.

        Raises
        ------
        OutputParserException
            The answer was cut off before its end, is no JSON, or not valid by the class.
        """
        generation = result[0]
        message = generation.message if isinstance(generation, ChatGeneration) else None
        if message is not None:
            _check_end(message)
        if self.tool_name is not None:
            return self._from_call(message, partial=partial)
        text = generation.text if message is None else text_of(message)
        if isinstance(message, AIMessage) and message.tool_calls and not text.strip():
            return None  # tools were offered beside the schema, and one is called first
        return self._from_text(text, partial=partial)

    def parse(self, text: str) -> Any:
        """Return the value in a text."""
        return self.parse_result([Generation(text=text)])

    def _from_call(self, message: BaseMessage | None, *, partial: bool) -> Any:
        calls = message.tool_calls if isinstance(message, AIMessage) else []
        found = next((call for call in calls if call["name"] == self.tool_name), None)
        if found is not None:
            return self._made(found["args"], partial=partial)
        if partial:
            return None
        raise OutputParserException(
            f"the answer has no call of {self.tool_name!r}: {message!r}",
            llm_output=text_of(message) if message else None,
        )

    def _from_text(self, text: str, *, partial: bool) -> Any:
        try:
            value = parse_partial_json(text) if partial else json.loads(text)
        except ValueError as error:
            if partial:
                return None
            raise OutputParserException(
                f"the answer is no JSON ({error}): {text}", llm_output=text
            ) from error
        return None if value is None and partial else self._made(value, partial=partial)

    def _made(self, value: Any, *, partial: bool) -> Any:
        if self.model_class is None:
            return value
        try:
            if hasattr(self.model_class, "model_validate"):
                return self.model_class.model_validate(value)
            return self.model_class.parse_obj(value)
        except ValueError as error:  # the errors of both versions are
            if partial:
                return None
            text = json.dumps(value, ensure_ascii=False)
            raise OutputParserException(
                f"the answer is no valid {self.model_class.__name__}: {error}", llm_output=text
            ) from error

    def _transform(self, input: Iterator[str | BaseMessage]) -> Iterator[Any]:
        yield from super()._transform(_as_chunk(piece) for piece in input)

    async def _atransform(self, input: AsyncIterator[str | BaseMessage]) -> AsyncIterator[Any]:
        async for value in super()._atransform(_as_chunk(piece) async for piece in input):
            yield value

    @property
    def _type(self) -> str:
        return "quire_structured_output"


def structured_chain(
    model: Runnable[Any, Any], parser: StructuredOutputParser, *, include_raw: bool
) -> Runnable[Any, Any]:
    """Return the model with the parser behind it.

    With ``include_raw`` the result is a dict of ``raw``, the message, ``parsed``, which is None
    where parsing failed, and ``parsing_error``.
    """
    if not include_raw:
        return model | parser
    parsed = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def model_class_of(schema: Any) -> Any:
    """Return the pydantic model that answers become; None where they stay dicts."""
    return schema if isinstance(schema, type) and is_basemodel_subclass(schema) else None


def described_schema(schema: Any, method: Method, strict: bool | None) -> dict[str, Any]:
    """Return what traces tell of the schema."""
    return {"kwargs": {"method": method, "strict": strict}, "schema": schema}


def _check_end(message: BaseMessage) -> None:
    metadata: Mapping[str, Any] = message.response_metadata
    if metadata.get("finish_reason") == "length":
        raise OutputParserException(
            "the answer was cut off when it had as many tokens as it may have, so it is not "
            "complete: raise max_new_tokens, or ask for less",
            llm_output=text_of(message),
        )


def _as_chunk(piece: str | BaseMessage) -> str | BaseMessage:
    """Return an answer that comes in one piece as a chunk, which keeps its calls."""
    if not isinstance(piece, AIMessage) or isinstance(piece, AIMessageChunk):
        return piece
    return AIMessageChunk(
        content=piece.content,
        additional_kwargs=piece.additional_kwargs,
        response_metadata=piece.response_metadata,
        tool_calls=piece.tool_calls,
        invalid_tool_calls=piece.invalid_tool_calls,
        id=piece.id,
    )
