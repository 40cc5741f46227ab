"""The async twin says what the sync model says, and lets go of what nobody waits for."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

pytest.importorskip("outlines", reason="the extra `outlines` is not installed")

import outlines
from outlines.inputs import Chat
from outlines.types import Regex

from quire import AsyncLLM, InvalidRequestError, StructureIncompleteError
from quire.integrations.outlines import AsyncVLLM, from_quire

PROMPT = "the quick brown fox"
ABC = Regex("[abc]{3}")
ENDLESS = Regex("[abc]{180,}")


@pytest.fixture(scope="module")
def twin(llm):
    return from_quire(AsyncLLM.from_llm(llm))


async def read(stream, pieces=None):
    pieces = [] if pieces is None else pieces
    async for piece in stream:
        pieces.append(piece)
    return pieces


async def wait_until_idle(llm, seconds=10.0):
    end = time.monotonic() + seconds
    while (await llm.get_metrics())["num_unfinished_requests"]:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_every_door_says_what_the_sync_model_says(model, twin):
    assert type(twin) is AsyncVLLM
    expected = model(PROMPT, ABC, seed=7)
    generator = outlines.Generator(twin, ABC)
    assert await twin(PROMPT, ABC, seed=7) == expected
    assert await generator(PROMPT, seed=7) == expected
    assert await generator.batch([PROMPT] * 2, seed=7) == [expected] * 2
    assert await twin.batch([PROMPT] * 2, ABC, seed=7) == [expected] * 2
    assert await twin([PROMPT] * 2, ABC, seed=7) == [expected] * 2
    assert await twin.batch([], ABC) == []
    assert "".join(await read(twin.stream(PROMPT, ABC, seed=7))) == expected
    assert "".join(await read(generator.stream(PROMPT, seed=7))) == expected
    assert await twin(PROMPT, ABC, seed=7, n=2) == model(PROMPT, ABC, seed=7, n=2)
    assert await read(twin.stream(PROMPT, ABC, seed=7, best_of=2)) == [
        model(PROMPT, ABC, seed=7, best_of=2)
    ]
    assert await twin(PROMPT, ABC, seed=7, backend="llguidance") == expected


async def test_chats_go_by_the_template(model, twin):
    chat = Chat([{"role": "user", "content": PROMPT}])
    expected = model(chat, seed=7)
    assert await twin(chat, seed=7) == await twin(PROMPT, seed=7, chat=True) == expected
    assert twin.type_adapter.format_input(chat) == model.type_adapter.format_input(chat)


async def test_a_structure_that_was_cut_off_is_no_answer(twin):
    with pytest.raises(StructureIncompleteError):
        await twin(PROMPT, ENDLESS, max_tokens=4)
    pieces: list[str] = []
    with pytest.raises(StructureIncompleteError) as caught:
        await read(twin.stream(PROMPT, ENDLESS, max_tokens=4), pieces)
    assert caught.value.text == "".join(pieces) != ""
    text = await twin(PROMPT, ENDLESS, max_tokens=4, allow_incomplete=True)
    assert re.fullmatch("[abc]+", text)


async def test_leaving_early_aborts(twin):
    """A stream that is closed, a batch that is cancelled, the rest of a batch that failed."""
    stream = twin.stream(PROMPT, ENDLESS)
    await anext(stream)
    await stream.aclose()
    await wait_until_idle(twin.llm)
    generator = outlines.Generator(twin, ENDLESS).stream(PROMPT)
    await anext(generator)
    await generator.aclose()
    await wait_until_idle(twin.llm)
    task = asyncio.ensure_future(twin.batch([PROMPT] * 3, ENDLESS, max_tokens=150))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until_idle(twin.llm)
    with pytest.raises(InvalidRequestError, match="empty"):
        await twin.batch([PROMPT, ""], ENDLESS)
    await wait_until_idle(twin.llm)


async def test_bad_arguments_are_told_as_by_the_sync_model(twin):
    with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
        await twin(PROMPT, ABC, max_token=5)
    with pytest.raises(TypeError, match="a batch must be a list"):
        await twin.batch(PROMPT, ABC)
    with pytest.raises(InvalidRequestError, match="n must be 1"):
        await read(twin.stream(PROMPT, ABC, n=2))
