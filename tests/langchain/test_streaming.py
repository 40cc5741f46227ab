"""Streams: token by token, equal to the whole, and ended with their reader."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.outputs import GenerationChunk, LLMResult

from quire.errors import InvalidRequestError, RequestFailedError
from quire.integrations.langchain import VLLM


class Tokens(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.result: LLMResult | None = None
        self.error: BaseException | None = None

    def on_llm_new_token(self, token: str, *, chunk: Any = None, **kwargs: Any) -> None:
        assert isinstance(chunk, GenerationChunk)
        assert chunk.text == token
        self.tokens.append(token)

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.result = response

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.error = error


class AsyncTokens(AsyncCallbackHandler, Tokens):
    async def on_llm_new_token(self, *args: Any, **kwargs: Any) -> None:
        Tokens.on_llm_new_token(self, *args, **kwargs)

    async def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        Tokens.on_llm_end(self, *args, **kwargs)


CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"logprobs": 1},
    {"n": 2},
    {"n": 2, "best_of": 3, "logprobs": 1},
    {"use_beam_search": True, "n": 2},
    {"prompt_logprobs": 1},
]


@pytest.mark.parametrize("kwargs", CONFIGURATIONS)
async def test_stream_adds_up_to_invoke(fake: Any, kwargs: dict[str, Any]) -> None:
    """The chunks of a stream, joined, are what invoke returns, in text and in information; the
    callbacks see the same chunks; the async stream is the same stream."""
    seed = {} if "use_beam_search" in kwargs else {"seed": 1}
    llm = VLLM(model="m", **seed, **kwargs)
    [[whole, *_]] = llm.generate(["pq"]).generations
    handler = Tokens()
    chunks = list(llm.stream("pq", config={"callbacks": [handler]}))
    assert "".join(chunks) == whole.text
    assert handler.tokens == chunks
    assert handler.result is not None
    [[streamed]] = handler.result.generations
    assert streamed.text == whole.text
    assert streamed.generation_info == whole.generation_info
    several = "use_beam_search" not in kwargs and "best_of" not in kwargs
    assert (len(chunks) > 5) == several
    async_handler = AsyncTokens()
    config: Any = {"callbacks": [async_handler]}
    assert [chunk async for chunk in llm.astream("pq", config=config)] == chunks
    assert async_handler.tokens == chunks
    assert async_handler.result is not None
    assert async_handler.result.generations == handler.result.generations


def test_leaving_a_stream_aborts_it(fake: Any) -> None:
    """Whoever stops reading stops the engine, whether by break, close or by dropping it."""
    llm = VLLM(model="m")
    for _ in llm.stream("p"):
        break
    stream = llm.stream("p")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert [call.aborted for call in fake.calls] == [True, True]
    list(llm.stream("p"))
    assert not fake.calls[-1].aborted


async def test_cancelling_an_async_stream_aborts_it(fake: Any) -> None:
    """Cancelling the reading task, or closing the stream, aborts the request."""
    llm = VLLM(model="m")
    started = asyncio.Event()

    async def read() -> None:
        async for _ in llm.astream("p"):
            started.set()

    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream = llm.astream("p")
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    assert [call.aborted for call in fake.calls] == [True, True]


async def test_cancelling_a_batch_cancels_all_of_it(fake: Any) -> None:
    """No request of a cancelled abatch goes on."""
    task = asyncio.create_task(VLLM(model="m").abatch(["a", "b", "c"]))
    while fake.num_running() < 3:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fake.num_running() == 0
    assert fake.calls == []


async def test_errors_of_a_stream_reach_reader_and_callbacks(fake: Any) -> None:
    """A prompt that cannot be served raises from the stream, and the run is told."""
    handler = Tokens()
    llm = VLLM(model="m", callbacks=[handler])
    with pytest.raises(InvalidRequestError):
        list(llm.stream("BAD"))
    assert isinstance(handler.error, InvalidRequestError)
    with pytest.raises(RequestFailedError):
        async for _ in llm.astream("DIE"):
            pass


async def test_stream_through_a_chain(fake: Any) -> None:
    """In a chain the chunks pass through parsers one by one."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import PromptTemplate

    llm = VLLM(model="m", seed=1)
    chain = PromptTemplate.from_template("{x}") | llm | StrOutputParser()
    chunks = list(chain.stream({"x": "p"}))
    assert len(chunks) > 5
    assert "".join(chunks) == llm.invoke("p") == chain.invoke({"x": "p"})
    assert [chunk async for chunk in chain.astream({"x": "p"})] == chunks
