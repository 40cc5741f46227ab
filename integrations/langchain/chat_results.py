"""From what the engine returns to the messages that LangChain expects of a chat model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, AIMessageChunk, InvalidToolCall, ToolCall
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from quire.integrations.langchain.results import final_info, token_text, token_usage
from quire.outputs import CompletionOutput, RequestOutput, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.chat import ChatDelta, ChatMessage, ChatReader
    from quire.chat import ToolCall as ReadCall


def to_chat_result(
    output: RequestOutput, new_reader: Callable[[], ChatReader], model: str
) -> ChatResult:
    """Build the result of one conversation.

    Parameters
    ----------
    output : RequestOutput
    new_reader : callable
        Makes what reads one completion.
    model : str
        The name that the message's ``response_metadata`` gives.

    Returns
    -------
    ChatResult
        A generation per completion.
    """
    generations = [_generation(output, one, new_reader(), model) for one in output.outputs]
    return ChatResult(
        generations=generations,
        llm_output={"token_usage": token_usage([generations]), **_provenance(model)},
    )


def combined_output(llm_outputs: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Return what several conversations used together; None is one that the cache answered."""
    known = [output for output in llm_outputs if output]
    if not known:
        return {}
    usage: dict[str, int] = {}
    for output in known:
        for name, count in output["token_usage"].items():
            usage[name] = usage.get(name, 0) + count
    return {**known[-1], "token_usage": usage}


def _provenance(model: str) -> dict[str, Any]:
    return {"model_name": model, "model_provider": "quire"}


def _generation(
    output: RequestOutput, completion: CompletionOutput, reader: ChatReader, model: str
) -> ChatGeneration:
    reader.feed(completion.text)
    reader.finish()
    read = reader.message
    info = {
        **_logprobs_info(completion),
        **_chat_info(output, completion, len(completion.token_ids), read),
        **_provenance(model),
    }
    calls, invalid = _tool_calls(read.tool_calls)
    message = AIMessage(
        content=read.content or "",
        tool_calls=calls,
        invalid_tool_calls=invalid,
        additional_kwargs=_reasoning(read.reasoning),
        usage_metadata=usage_metadata(info["token_usage"]),
    )
    return ChatGeneration(message=message, generation_info=info)


def _chat_info(
    output: RequestOutput, completion: CompletionOutput, num_tokens: int, read: ChatMessage
) -> dict[str, Any]:
    info = final_info(output, completion, num_tokens)
    if read.tool_calls and info["finish_reason"] == "stop":
        info["finish_reason"] = "tool_calls"
    return info


def _reasoning(text: str | None) -> dict[str, Any]:
    return {"reasoning_content": text} if text else {}


def _tool_calls(read: Sequence[ReadCall]) -> tuple[list[ToolCall], list[InvalidToolCall]]:
    """Return the calls whose arguments are a JSON object, and those cut off before they were."""
    calls: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    for one in read:
        try:
            arguments = json.loads(one.arguments)
            if not isinstance(arguments, dict):
                raise ValueError("the arguments are no JSON object")
        except ValueError as error:
            broken = invalid_tool_call(
                name=one.name, args=one.arguments, id=one.id, error=str(error)
            )
            invalid.append(broken)
        else:
            calls.append(tool_call(name=one.name, args=arguments, id=one.id))
    return calls, invalid


def usage_metadata(usage: Mapping[str, int]) -> UsageMetadata:
    """Return the tokens of one completion as LangChain's messages have them."""
    return UsageMetadata(
        input_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        total_tokens=usage["total_tokens"],
        input_token_details=InputTokenDetails(cache_read=usage["cached_tokens"]),
    )


class ChatChunkBuilder:
    """Turns the deltas of one completion into chunks that add up to its message.

    What chunks cannot add up (why it ended, the tokens used, the model's name) stands in the
    last one alone.

    Parameters
    ----------
    reader : ChatReader
    model : str
        The name that the last chunk's ``response_metadata`` gives.
    """

    def __init__(self, reader: ChatReader, model: str) -> None:
        self._reader = reader
        self._model = model
        self._num_tokens = 0
        self._logprobs: list[dict[str, Any]] = []

    def add(self, output: RequestOutput) -> ChatGenerationChunk | None:
        """Return the chunk of this delta; None where it adds nothing to the message yet."""
        completion = next((one for one in output.outputs if one.index == 0), None)
        if completion is None:
            return None
        self._num_tokens += len(completion.token_ids)
        self._logprobs += _logprobs(completion)
        delta = self._reader.feed(completion.text)
        chunks = [_chunk(delta)] if delta else []
        info: dict[str, Any] = {}
        usage = None
        if completion.finished():
            rest = self._reader.finish()
            if rest:
                chunks.append(_chunk(rest))
            info = _chat_info(output, completion, self._num_tokens, self._reader.message)
            info.update(_provenance(self._model))
            usage = usage_metadata(info["token_usage"])
            chunks.append(AIMessageChunk(content="", usage_metadata=usage))
        if not chunks:
            return None
        if self._logprobs:
            info["logprobs"] = {"content": self._logprobs}
            self._logprobs = []
        message = chunks[0]
        for more in chunks[1:]:
            message += more
        return ChatGenerationChunk(message=message, generation_info=info or None)


def whole_chunk(result: ChatResult) -> ChatGenerationChunk:
    """Return the first generation of a result as a stream of one chunk."""
    generation = result.generations[0]
    message = generation.message
    assert isinstance(message, AIMessage)
    calls = [
        tool_call_chunk(name=call["name"], args=_arguments(call["args"]), id=call["id"], index=i)
        for i, call in enumerate([*message.tool_calls, *message.invalid_tool_calls])
    ]
    chunk = AIMessageChunk(
        content=message.content,
        additional_kwargs=message.additional_kwargs,
        tool_call_chunks=calls,
        usage_metadata=message.usage_metadata,
    )
    return ChatGenerationChunk(message=chunk, generation_info=generation.generation_info)


def _arguments(arguments: dict[str, Any] | str | None) -> str | None:
    if arguments is None or isinstance(arguments, str):
        return arguments
    return json.dumps(arguments, ensure_ascii=False)


def _chunk(delta: ChatDelta) -> AIMessageChunk:
    return AIMessageChunk(
        content=delta.content,
        additional_kwargs=_reasoning(delta.reasoning),
        tool_call_chunks=[
            tool_call_chunk(name=one.name, args=one.arguments, id=one.id, index=one.index)
            for one in delta.tool_calls
        ],
    )


# -- logprobs -------------------------------------------------------------------------------------


def _logprobs_info(completion: CompletionOutput) -> dict[str, Any]:
    content = _logprobs(completion)
    return {"logprobs": {"content": content}} if content else {}


def _logprobs(completion: CompletionOutput) -> list[dict[str, Any]]:
    """Return log-probabilities in the form of OpenAI's chat completions, with ids and ranks."""
    if not completion.logprobs:
        return []
    return [
        {
            **_one(token_id, position),
            "top_logprobs": [_one(other, position) for other in position],
        }
        for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


def _one(token_id: int, position: TokenLogprobs) -> dict[str, Any]:
    text = token_text(token_id, position)
    found = position[token_id]
    return {
        "token": text,
        # A part of a character decodes to a mark that is not its bytes.
        "bytes": None if "\ufffd" in text else list(text.encode()),
        "token_id": token_id,
        "logprob": found.logprob,
        "rank": found.rank,
    }
