"""Batches in which prompts fail: each alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.outputs import LLMResult

from quire.errors import EngineClosedError, InvalidRequestError, RequestFailedError
from quire.integrations.langchain import VLLM

KINDS: dict[str, Any] = {"BAD": InvalidRequestError, "DIE": RequestFailedError}


class Outcomes(BaseCallbackHandler):
    def __init__(self) -> None:
        self.prompts: dict[Any, str] = {}
        self.outcomes: dict[str, Any] = {}

    def on_llm_start(self, serialized: Any, prompts: list[str], **kwargs: Any) -> None:
        self.prompts[kwargs["run_id"]] = prompts[0]

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.outcomes[self.prompts[kwargs["run_id"]]] = response.generations[0][0].text

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.outcomes[self.prompts[kwargs["run_id"]]] = error


class AsyncOutcomes(AsyncCallbackHandler, Outcomes):
    async def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        Outcomes.on_llm_start(self, *args, **kwargs)

    async def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        Outcomes.on_llm_end(self, *args, **kwargs)

    async def on_llm_error(self, *args: Any, **kwargs: Any) -> None:
        Outcomes.on_llm_error(self, *args, **kwargs)


def check(prompts: list[Any], answers: list[Any], outcomes: dict[str, Any]) -> None:
    assert len(answers) == len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        if not isinstance(prompt, str):
            assert isinstance(answer, ValueError)
            continue
        kind = next((KINDS[word] for word in KINDS if word in prompt), None)
        if kind is None:
            assert answer.startswith(f"m|{prompt}|")
        else:
            assert isinstance(answer, kind)
        assert outcomes[prompt] is answer or outcomes[prompt] == answer


batches = st.lists(st.sampled_from(["", "BAD", "DIE", None]), min_size=0, max_size=6).map(
    lambda kinds: [kind if kind is None else f"{kind}{i}" for i, kind in enumerate(kinds)]
)


@given(prompts=batches, width=st.sampled_from([None, 1, 2, 100]), cached=st.booleans())
def test_failures_stay_alone(
    fake: Any, prompts: list[Any], width: int | None, cached: bool
) -> None:
    """Whichever prompts of a batch fail, the others have their answers; each run is told its
    own outcome; and what failed is not in the cache."""
    fake.calls.clear()
    handler = Outcomes()
    cache = InMemoryCache() if cached else False
    llm = VLLM(model="m", seed=1, callbacks=[handler], cache=cache)
    config: Any = {"max_concurrency": width}
    answers: list[Any] = llm.batch(prompts, config=config, return_exceptions=True)
    check(prompts, answers, handler.outcomes)
    if width is None:
        assert len({call.batch for call in fake.calls}) <= 1
    if cached:
        fake.calls.clear()
        again: list[Any] = llm.batch(prompts, return_exceptions=True)
        assert [type(answer) for answer in again] == [type(answer) for answer in answers]
        assert all("BAD" in call.prompt or "DIE" in call.prompt for call in fake.calls)


async def test_failures_stay_alone_async(fake: Any) -> None:
    """The same for abatch."""
    prompts: list[Any] = ["a", "BAD", "b", None, "DIE", "c"]
    for width in (None, 2):
        handler = AsyncOutcomes()
        llm = VLLM(model="m", seed=1, callbacks=[handler], cache=InMemoryCache())
        answers: list[Any] = await llm.abatch(
            prompts, config={"max_concurrency": width}, return_exceptions=True
        )
        check(prompts, answers, handler.outcomes)
        fake.calls.clear()
        again: list[Any] = await llm.abatch(prompts, return_exceptions=True)
        assert [type(answer) for answer in again] == [type(answer) for answer in answers]
        assert sorted(call.prompt for call in fake.calls) == ["BAD", "DIE"]


async def test_without_return_exceptions_the_batch_fails(fake: Any) -> None:
    """Otherwise the first failure is raised, and every run is told."""
    handler = Outcomes()
    llm = VLLM(model="m", callbacks=[handler])
    with pytest.raises(InvalidRequestError):
        llm.batch(["a", "BAD"])
    assert fake.calls == []
    with pytest.raises(RequestFailedError):
        llm.batch(["a", "DIE"])
    assert all(isinstance(handler.outcomes[prompt], Exception) for prompt in ("a", "DIE"))
    with pytest.raises(InvalidRequestError):
        await llm.abatch(["a", "BAD"])
    with pytest.raises(RequestFailedError):
        await llm.agenerate(["DIE", "a"])


async def test_what_concerns_all_prompts_is_every_ones_exception(fake: Any) -> None:
    """An error that is no prompt's own is in every place, as LangChain's batch has it."""
    llm = VLLM(model="m")
    for answers in (
        llm.batch(["a", "b"], return_exceptions=True, temprature=1),
        await llm.abatch(["a", "b"], return_exceptions=True, temprature=1),
    ):
        assert [type(answer) for answer in answers] == [TypeError, TypeError]
    for answers in (
        llm.batch(["a"], return_exceptions=True, temperature=-1.0),
        await llm.abatch(["a"], return_exceptions=True, temperature=-1.0),
    ):
        assert [type(answer) for answer in answers] == [InvalidRequestError]
    llm.close()
    for answers in (
        llm.batch(["a", "b"], return_exceptions=True),
        await llm.abatch(["a", "b"], return_exceptions=True),
    ):
        assert [type(answer) for answer in answers] == [EngineClosedError, EngineClosedError]


def test_each_prompt_has_its_own_config(fake: Any) -> None:
    """Callbacks, tags and names of a batch go to their own prompt's run."""
    handlers = [Outcomes() for _ in range(3)]
    configs: Any = [
        {"callbacks": [handler], "tags": [str(i)]} for i, handler in enumerate(handlers)
    ]
    prompts: list[Any] = ["a", "BAD", "c"]
    VLLM(model="m").batch(prompts, config=configs, return_exceptions=True)
    assert [list(handler.outcomes) for handler in handlers] == [["a"], ["BAD"], ["c"]]


def test_cache_true_without_a_cache_is_langchains_error(fake: Any) -> None:
    """``cache=True`` with no global cache is refused as for every LangChain model."""
    llm = VLLM(model="m", cache=True)
    [answer] = llm.batch(["a"], return_exceptions=True)
    assert isinstance(answer, ValueError)
    with pytest.raises(ValueError, match="cache"):
        llm.invoke("a")


@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("width", [-1, "2", True])
async def test_a_wrong_concurrency_is_refused_and_loses_no_prompt(
    fake: Any, width: Any, return_exceptions: bool
) -> None:
    """An answer is a text, an exception in its place, or an error: never nothing."""
    llm = VLLM(model="m")
    settings: Any = {
        "config": {"max_concurrency": width},
        "return_exceptions": return_exceptions,
    }
    with pytest.raises(InvalidRequestError, match=f"max_concurrency must be .*{width!r}"):
        llm.batch(["a", "b"], **settings)
    with pytest.raises(InvalidRequestError, match=f"max_concurrency must be .*{width!r}"):
        await llm.abatch(["a", "b"], **settings)
    assert fake.calls == []


@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("width", [0, None])
async def test_no_concurrency_is_all_at_once(
    fake: Any, width: int | None, return_exceptions: bool
) -> None:
    """0 means what None means, whichever way failures are told."""
    llm = VLLM(model="m", seed=1)
    prompts: list[Any] = ["a", "b", "c"]
    settings: Any = {
        "config": {"max_concurrency": width},
        "return_exceptions": return_exceptions,
    }
    answers = llm.batch(prompts, **settings)
    assert answers == [llm.invoke(prompt) for prompt in prompts]
    assert len({call.batch for call in fake.calls[:3]}) == 1
    assert await llm.abatch(prompts, **settings) == answers
    assert llm.batch([], **settings) == []
    assert await llm.abatch([], **settings) == []
