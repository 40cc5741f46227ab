"""What a call sends to the engine and what comes back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.outputs import LLMResult

from quire.errors import EngineClosedError, InvalidRequestError
from quire.integrations.langchain import VLLM


class Record(BaseCallbackHandler):
    """Keeps what LangChain tells about each run."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.ended: list[LLMResult] = []
        self.failed: list[BaseException] = []

    def on_llm_start(self, serialized: Any, prompts: list[str], **kwargs: Any) -> None:
        self.started.append({"serialized": serialized, "prompts": prompts, **kwargs})

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.ended.append(response)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.failed.append(error)


strings = st.lists(st.sampled_from("abcd"), max_size=3)


@given(own=st.none() | strings, call=st.none() | strings, as_text=st.booleans())
def test_stop_strings_of_constructor_and_call_are_joined(
    fake: Any, own: list[str] | None, call: list[str] | None, as_text: bool
) -> None:
    """A call's stop strings add to the constructor's, each once; neither is lost."""
    given_own: Any = own[0] if own and as_text else own
    llm = VLLM(model="m", stop=given_own)
    llm.invoke("p", stop=call)
    first = [given_own] if isinstance(given_own, str) else own or []
    assert fake.calls[-1].params.stop == list(dict.fromkeys([*first, *(call or [])]))


async def test_stop_works_in_every_way_of_calling(fake: Any) -> None:
    """invoke, batch, stream and their async forms all end at the same strings."""
    llm = VLLM(model="m", stop=["a"])
    bound = llm.bind(stop=["b"])
    bound.invoke("p")
    bound.batch(["p"])
    bound.batch(["p"], return_exceptions=True)
    list(bound.stream("p"))
    await bound.ainvoke("p")
    await bound.abatch(["p"])
    await bound.abatch(["p"], return_exceptions=True)
    assert [chunk async for chunk in bound.astream("p")]
    llm.invoke("p", stop="b")
    assert len(fake.calls) == 9
    assert all(call.params.stop == ["a", "b"] for call in fake.calls)


@pytest.mark.parametrize("stop", [5, {"x": 1}, [{"x": 1}, "b"], [["a"]]])
def test_what_is_no_stop_string_is_refused_by_name(fake: Any, stop: Any) -> None:
    """Whatever it is, hashable or not."""
    llm = VLLM(model="m")
    with pytest.raises(InvalidRequestError, match=r"^stop must be a non-empty string"):
        llm.invoke("p", stop=stop)
    with pytest.raises(InvalidRequestError, match=r"^stop must be a non-empty string"):
        list(llm.stream("p", stop=stop))


def test_prompt_goes_as_written(fake: Any) -> None:
    """No template, no trimming: the engine gets the very text."""
    text = "  <|user|>\n Hello \u00e9 {x}\n"
    VLLM(model="m").invoke(text)
    VLLM(model="m").invoke([HumanMessage("Hi")])
    assert [call.prompt for call in fake.calls] == [text, "Human: Hi"]


def test_n_gives_n_generations(fake: Any) -> None:
    """Each prompt has ``n`` generations; invoke returns the first."""
    llm = VLLM(model="m", n=3, best_of=4, seed=1)
    result = llm.generate(["p", "q"])
    assert [len(generations) for generations in result.generations] == [3, 3]
    assert len({one.text for one in result.generations[0]}) == 3
    assert llm.invoke("p") == result.generations[0][0].text
    assert (fake.calls[0].params.n, fake.calls[0].params.best_of) == (3, 4)


def test_usage_and_reasons(fake: Any) -> None:
    """Every generation says why it ended and what it cost; llm_output has the sums."""
    result = VLLM(model="m", n=2, seed=1).generate(["pp", "qqq"])
    lengths = [[len(one.text) for one in generations] for generations in result.generations]
    first = result.generations[0][0].generation_info
    assert first is not None
    assert first["finish_reason"] == "length"
    assert first["stop_reason"] is None
    assert first["token_usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": lengths[0][0],
        "total_tokens": 2 + lengths[0][0],
        "cached_tokens": 2,
    }
    assert result.llm_output == {
        "model_name": "m",
        "token_usage": {
            "prompt_tokens": 5,  # once per prompt, whatever n is
            "completion_tokens": sum(map(sum, lengths)),
            "total_tokens": 5 + sum(map(sum, lengths)),
            "cached_tokens": 4,
        },
    }


def test_each_run_is_told_its_own_usage(fake: Any) -> None:
    """Callbacks of a batch add up to the batch: no run has another's tokens."""
    record = Record()
    result = VLLM(model="m", callbacks=[record]).generate(["p", "qqqqq"])
    assert result.llm_output is not None
    told = [
        ended.llm_output["token_usage"]["total_tokens"]
        for ended in record.ended
        if ended.llm_output
    ]
    assert len(told) == 2
    assert sum(told) == result.llm_output["token_usage"]["total_tokens"]
    assert result.run is not None
    assert len({run.run_id for run in result.run}) == 2


def test_logprobs(fake: Any) -> None:
    """Logprobs stand in generation_info, one entry per token; equal texts stay apart."""
    result = VLLM(model="m", logprobs=2, prompt_logprobs=0).generate(["pq"])
    [[one]] = result.generations
    assert one.generation_info is not None
    logprobs = one.generation_info["logprobs"]
    assert "".join(logprobs["tokens"]) == one.text
    assert logprobs["token_ids"] == [ord(c) for c in one.text]
    assert set(logprobs["token_logprobs"]) == {-0.5}
    assert set(logprobs["ranks"]) == {1}
    assert logprobs["top_logprobs"][0] == {one.text[0]: -0.5, "\ufffd": -1.5, "token_id:8": -2.5}
    assert one.generation_info["cumulative_logprob"] == -0.5 * len(one.text)
    assert one.generation_info["prompt_logprobs"] == [None, {"q": -1.0}]
    [[plain]] = VLLM(model="m").generate(["p"]).generations
    assert plain.generation_info is not None
    assert not {"logprobs", "prompt_logprobs", "cumulative_logprob"} & set(plain.generation_info)


def test_default_beam_search_is_not_sampling(fake: Any) -> None:
    """The class's default temperature counts as unset in a beam search."""
    VLLM(model="m", use_beam_search=True, n=3).invoke("p")
    VLLM(model="m").invoke("p", use_beam_search=True, best_of=3)
    assert [call.params.temperature for call in fake.calls] == [0.0, 0.0]
    with pytest.raises(InvalidRequestError, match="temperature"):
        VLLM(model="m", use_beam_search=True, n=3, temperature=0.7)


CALLS = {
    "invoke": lambda llm, **kwargs: llm.invoke("p", **kwargs),
    "batch": lambda llm, **kwargs: llm.batch(["p"], **kwargs),
    "generate": lambda llm, **kwargs: llm.generate(["p"], **kwargs),
    "stream": lambda llm, **kwargs: list(llm.stream("p", **kwargs)),
    "bind": lambda llm, **kwargs: llm.bind(**kwargs).invoke("p"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_unknown_arguments_of_a_call_are_refused(fake: Any, call: Any) -> None:
    """A mistyped argument is an error wherever it stands; nothing runs."""
    llm = VLLM(model="m")
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        call(llm, temprature=1)
    with pytest.raises(TypeError, match="cannot change 'dtype'"):
        call(llm, dtype="half")
    with pytest.raises(TypeError, match="cannot change 'max_model_len'"):
        call(llm, max_model_len=7)
    with pytest.raises(InvalidRequestError, match="temperature"):
        call(llm, temperature=-1.0)
    assert fake.calls == []
    call(llm, temperature=0.5, seed=3)
    assert (fake.calls[-1].params.temperature, fake.calls[-1].params.seed) == (0.5, 3)


async def test_unknown_arguments_of_an_async_call_are_refused(fake: Any) -> None:
    """The async forms refuse alike."""
    llm = VLLM(model="m")
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        await llm.ainvoke("p", temprature=1)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        await llm.abatch(["p"], temprature=1)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        async for _ in llm.astream("p", temprature=1):
            pass
    assert fake.calls == []


def test_a_call_changes_nothing_for_the_next(fake: Any) -> None:
    """Arguments of a call are of that call alone."""
    llm = VLLM(model="m", temperature=0.5)
    before = llm.model_dump()
    llm.invoke("p", temperature=0.0, n=1, max_tokens=3, stop=["x"])
    llm.invoke("p")
    assert fake.calls[-1].params.temperature == 0.5
    assert fake.calls[-1].params.stop == []
    assert llm.model_dump() == before


def test_batch_is_one_engine_batch(fake: Any) -> None:
    """All prompts reach the engine together; max_concurrency cuts the batch."""
    llm = VLLM(model="m")
    prompts = [str(i) for i in range(5)]
    answers = llm.batch(prompts)
    assert [f"|{prompt}|" in answer for prompt, answer in zip(prompts, answers, strict=True)]
    assert len({call.batch for call in fake.calls}) == 1
    fake.calls.clear()
    llm.batch(prompts, config={"max_concurrency": 2})
    batches = [call.batch - fake.calls[0].batch for call in fake.calls]
    assert batches == [0, 0, 1, 1, 2]
    assert llm.batch([]) == []
    assert llm.generate([]).generations == []


async def test_concurrent_async_calls_run_together(fake: Any) -> None:
    """abatch and gathered ainvokes are all in flight at once."""
    import asyncio

    llm = VLLM(model="m", seed=0)
    answers = await llm.abatch(["a", "b", "c"])
    assert fake.most_running == 3
    assert answers == llm.batch(["a", "b", "c"])
    await asyncio.gather(*(llm.ainvoke(str(i)) for i in range(7)))
    assert fake.most_running == 7


def test_adapter_is_passed_on(fake: Any) -> None:
    """The adapter of the constructor, or of the call, reaches the engine."""
    llm = VLLM(model="m", lora_request="one", vllm_kwargs={"enable_lora": True})
    texts = [
        llm.invoke("p"),
        llm.invoke("p", lora_request="two"),
        "".join(llm.stream("p", lora_request="two")),
        llm.invoke("p", lora_request=None),
    ]
    assert [text.split("|")[-3] for text in texts] == ["one", "two", "two", "None"]


def test_num_tokens_are_the_models(fake: Any) -> None:
    """Counting uses the model's tokenizer, or the user's own function."""
    llm = VLLM(model="m")
    assert llm.get_num_tokens("abc") == 4
    assert llm.get_token_ids("a") == [1, 97]
    assert VLLM(model="m", custom_get_token_ids=lambda text: [5] * 9).get_num_tokens("abc") == 9


def test_tracing_names_provider_and_limits(fake: Any) -> None:
    """Traces say which engine, model, temperature and length a run had, the call's own included."""
    record = Record()
    llm = VLLM(model="m", callbacks=[record])
    llm.invoke("p", temperature=0.25, max_tokens=5, stop=["x"], config={"metadata": {"k": 1}})
    [start] = record.started
    assert start["invocation_params"]["temperature"] == 0.25
    assert start["invocation_params"]["max_tokens"] == 5
    assert start["invocation_params"]["stop"] == ["x"]
    assert start["metadata"]["ls_provider"] == "quire"
    assert start["metadata"]["ls_model_name"] == "m"
    assert start["metadata"]["ls_temperature"] == 0.25
    assert start["metadata"]["ls_max_tokens"] == 5
    assert start["metadata"]["k"] == 1
    assert start["serialized"]["id"][-1] == "VLLM"
    assert start["serialized"]["kwargs"]["model"] == "m"
    assert "client" not in start["serialized"]["kwargs"]


def test_closed_model_says_so(fake: Any) -> None:
    """After close every call is an EngineClosedError, and closing again is nothing."""
    llm = VLLM(model="m")
    llm.close()
    llm.close()
    for call in CALLS.values():
        with pytest.raises(EngineClosedError, match="closed"):
            call(llm)
    with pytest.raises(EngineClosedError):
        llm.get_num_tokens("p")
    with VLLM(model="m") as other:
        assert other.invoke("p")
    assert fake.num_alive() == 0


@pytest.mark.parametrize("prompt", [5, ["a"], None, b"a"])
async def test_prompts_that_are_no_strings_are_refused(fake: Any, prompt: Any) -> None:
    """What is not text is named and refused, and is never taken for a token id."""
    llm = VLLM(model="m")
    with pytest.raises(InvalidRequestError, match=r"prompts\[1\] must be a string"):
        llm.generate(["a", prompt])
    with pytest.raises(InvalidRequestError, match=r"prompts\[1\] must be a string"):
        await llm.agenerate(["a", prompt])
