"""ChatVLLM: the engine's answers as LangChain's messages, whichever way they are asked for."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from threading import Event
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.outputs import LLMResult
from langchain_core.rate_limiters import InMemoryRateLimiter
from pydantic import create_model

from quire.errors import ConfigError, EngineClosedError, InvalidRequestError
from quire.integrations.langchain import VLLM, gathering
from quire.integrations.langchain.chat_vllm import ChatVLLM
from quire.sampling_params import SamplingParams

QUESTIONS = [
    "What is the capital of France?",
    "Hello",
    "What is 2 + 3?",
    "Who are you?",
    "What is the capital of Japan?",
]


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatVLLM]:
    with ChatVLLM(model="quire/demo", temperature=0, max_tokens=24) as chat:
        yield chat


def joined(chunks: Any) -> Any:
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


async def collected(stream: Any) -> Any:
    return joined([chunk async for chunk in stream])


def same(left: Any, right: Any) -> None:
    """Assert that two messages say the same, however they came."""
    assert left.content == right.content
    assert left.usage_metadata == right.usage_metadata
    assert left.additional_kwargs == right.additional_kwargs
    assert left.response_metadata == right.response_metadata


@pytest.mark.parametrize("question", QUESTIONS)
def test_says_what_the_engine_says(chat: ChatVLLM, question: str) -> None:
    """The text, its end and the tokens used are those of LLM.chat."""
    chat.client.reset_prefix_cache()
    message = chat.invoke(
        [SystemMessage("Be brief."), HumanMessage(question)],
        logprobs=0,
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": question},
    ]
    chat.client.reset_prefix_cache()
    [output] = chat.client.chat(
        messages, SamplingParams(temperature=0, max_tokens=24, logprobs=0), use_tqdm=False
    )
    [completion] = output.outputs
    assert message.content == completion.text
    assert message.response_metadata["finish_reason"] == completion.finish_reason
    assert message.response_metadata["model_name"] == "quire/demo"
    assert message.usage_metadata == {
        "input_tokens": len(output.prompt_token_ids),
        "output_tokens": len(completion.token_ids),
        "total_tokens": len(output.prompt_token_ids) + len(completion.token_ids),
        "input_token_details": {"cache_read": output.num_cached_tokens},
    }
    listed = message.response_metadata["logprobs"]["content"]
    assert [one["token_id"] for one in listed] == completion.token_ids
    assert sum(one["logprob"] for one in listed) == pytest.approx(completion.cumulative_logprob)


@settings(max_examples=15)
@given(
    questions=st.lists(st.sampled_from(QUESTIONS), min_size=1, max_size=3),
    most=st.integers(1, 24),
    stop=st.sampled_from([None, ["capital"], ["."]]),
    logprobs=st.sampled_from([None, 2]),
)
def test_a_stream_adds_up_to_the_message(
    chat: ChatVLLM, questions: list[str], most: int, stop: Any, logprobs: Any
) -> None:
    """Chunks, joined, are the message of invoke, in every field; so are those of astream."""
    messages = [m for q in questions for m in (HumanMessage(q), AIMessage("Yes."))][:-1]
    arguments: dict[str, Any] = {"max_tokens": most, "stop": stop, "logprobs": logprobs}
    for _ in range(2):  # the second finds all of the prompt that is kept in the cache
        whole = chat.invoke(messages, **arguments)
    same(joined(chat.stream(messages, **arguments)), whole)
    same(asyncio.run(collected(chat.astream(messages, **arguments))), whole)
    same(asyncio.run(chat.ainvoke(messages, **arguments)), whole)


def test_cached_prompts_are_told(chat: ChatVLLM) -> None:
    """The part of a prompt that was in the engine's cache is in input_token_details."""
    question = "What is the capital of France? " * 8
    chat.invoke(question)
    usage = chat.invoke(question).usage_metadata
    assert usage is not None
    assert usage["input_token_details"]["cache_read"] > 16
    streamed = joined(chat.stream(question)).usage_metadata
    assert streamed["input_token_details"] == usage["input_token_details"]


class Submissions:
    """How many requests entered the engine at a time."""

    def __init__(self, chat: ChatVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = chat.client._lifetime.start()
        submit = loop.submit
        self.sizes: list[int] = []

        def counted(items: Any) -> None:
            items = list(items)
            self.sizes.append(len(items))
            submit(items)

        monkeypatch.setattr(loop, "submit", counted)


@pytest.mark.parametrize("times", [1, 8])
def test_a_batch_is_one_batch_of_the_engine(
    chat: ChatVLLM, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """All conversations of a batch reach the engine at once, and are answered as alone."""
    alone = {question: chat.invoke(question).content for question in QUESTIONS}
    monkeypatch.setattr(gathering, "_PATIENCE", 60.0)  # a busy machine holds threads up
    submissions = Submissions(chat, monkeypatch)
    answers = chat.batch(QUESTIONS * times)
    assert [answer.content for answer in answers] == [alone[q] for q in QUESTIONS] * times
    assert submissions.sizes == [len(QUESTIONS) * times]
    result = chat.generate([[HumanMessage(question)] for question in QUESTIONS])
    assert [one.text for [one] in result.generations] == list(alone.values())
    assert submissions.sizes[1:] == [len(QUESTIONS)]
    assert result.llm_output is not None
    used = [one.message.usage_metadata for [one] in result.generations]  # type: ignore[union-attr]
    assert result.llm_output["token_usage"]["total_tokens"] == sum(u["total_tokens"] for u in used)
    assert result.run is not None
    assert len({run.run_id for run in result.run}) == len(QUESTIONS)


def test_a_batch_goes_ahead_of_a_conversation_that_is_held_up(chat: ChatVLLM) -> None:
    """One that does not come to the engine keeps the others from their answers no longer."""
    answered, in_time = Event(), []

    class HoldsUp(BaseCallbackHandler):
        def on_chat_model_start(self, *_: Any, **__: Any) -> None:
            in_time.append(answered.wait(60))

    class Tells(BaseCallbackHandler):
        def on_llm_end(self, *_: Any, **__: Any) -> None:
            answered.set()

    configs: list[Any] = [{"callbacks": [HoldsUp()]}, {"callbacks": [Tells()]}]
    alone = [chat.invoke(question).content for question in QUESTIONS[:2]]
    assert [answer.content for answer in chat.batch(QUESTIONS[:2], configs)] == alone
    assert in_time == [True]


def test_max_concurrency_bounds_a_batch(chat: ChatVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most max_concurrency conversations are in the engine; the others follow at once."""
    submissions = Submissions(chat, monkeypatch)
    answers = chat.batch(QUESTIONS, config={"max_concurrency": 2})
    assert [a.content for a in answers] == [chat.invoke(q).content for q in QUESTIONS]
    assert max(submissions.sizes) <= 2
    done = dict(chat.batch_as_completed(QUESTIONS))
    assert [done[i].content for i in range(len(QUESTIONS))] == [a.content for a in answers]
    with pytest.raises(InvalidRequestError, match="max_concurrency"):
        chat.batch(QUESTIONS, config={"max_concurrency": -1})
    assert chat.batch([]) == []


IMAGE = HumanMessage([{"type": "image", "url": "http://localhost/a.png"}])


@pytest.mark.parametrize("place", range(3))
def test_a_batch_that_fails_leaves_nothing_behind(
    chat: ChatVLLM, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """Wherever the conversation stands that fails a batch, none of the others goes on."""
    submissions = Submissions(chat, monkeypatch)
    inputs: list[Any] = ["Hello", "Help"]
    inputs.insert(place, [IMAGE])
    with pytest.raises(InvalidRequestError, match="image"):
        chat.batch(inputs, max_tokens=1000, ignore_eos=True)
    # Those that began before it failed were ended; the others never began.
    assert chat.client.get_metrics()["num_unfinished_requests"] == 0, submissions.sizes


def test_failures_stay_alone(chat: ChatVLLM) -> None:
    """With return_exceptions a conversation that fails has its exception, the others answers."""
    inputs: list[Any] = ["Hello", [IMAGE], "Who are you?", 5]
    answers: list[Any] = chat.batch(inputs, return_exceptions=True)
    assert [type(a).__name__ for a in answers] == [
        "AIMessage",
        "InvalidRequestError",
        "AIMessage",
        "ValueError",
    ]
    answers = asyncio.run(chat.abatch(inputs, return_exceptions=True))
    assert [isinstance(a, AIMessage) for a in answers] == [True, False, True, False]
    with pytest.raises(InvalidRequestError, match=r"messages\[0\].content\[0\]"):
        chat.batch(inputs[:3])
    assert chat.client.get_metrics()["num_unfinished_requests"] == 0


class Record(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.started: list[Any] = []
        self.ended: list[LLMResult] = []
        self.failed: list[BaseException] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.started.append((serialized, messages, kwargs))

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.ended.append(response)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.failed.append(error)


def test_callbacks_and_traces(chat: ChatVLLM) -> None:
    """Each run is told its start, its tokens and its end or failure, and what it was asked."""
    record = Record()
    config: Any = {"callbacks": [record], "metadata": {"k": 1}, "tags": ["t"]}
    text = joined(chat.stream("Hello", config, max_tokens=5, stop=["x"])).content
    assert "".join(record.tokens) == text
    [(serialized, [[message]], started)] = record.started
    assert (serialized["name"], message.content) == ("ChatVLLM", "Hello")
    assert started["metadata"]["ls_provider"] == "quire"
    assert started["metadata"]["ls_model_name"] == "quire/demo"
    assert started["metadata"]["ls_temperature"] == 0.0
    assert started["metadata"]["ls_max_tokens"] == 5
    assert started["metadata"]["ls_stop"] == ["x"]
    assert started["metadata"]["k"] == 1
    chat.batch(["Hello", [IMAGE], "Hello"], config, return_exceptions=True)
    assert (len(record.started), len(record.ended), len(record.failed)) == (4, 3, 1)
    streaming = ChatVLLM(client=chat.client, streaming=True, temperature=0, max_tokens=5)
    record.tokens.clear()
    assert streaming.invoke("Hello", config).content == "".join(record.tokens)


def test_cache(chat: ChatVLLM) -> None:
    """What was answered is answered from the cache, unless anything that matters differs."""
    record = Record()
    cached = ChatVLLM(client=chat.client, temperature=1, seed=None, cache=InMemoryCache())
    first = cached.invoke("Hello").content
    before = chat.client.get_metrics()
    assert cached.invoke("Hello", {"callbacks": [record]}).content == first
    assert chat.client.get_metrics() == before
    names = {
        cached._get_llm_string(),
        cached._get_llm_string(temperature=0.5),
        cached._get_llm_string(stop=["x"]),
        cached._get_llm_string(tools=[{"type": "function", "function": {"name": "f"}}]),
        cached._get_llm_string(structured_outputs={"choice": ["a"]}),
        cached._get_llm_string(response_format={"type": "json_object"}),
        cached._get_llm_string(chat_template_kwargs={"a": 1}),
        # Classes of one name, as of a notebook's cell that was run again.
        cached._get_llm_string(response_format=create_model("Answer", sky=(bool, ...))),
        cached._get_llm_string(response_format=create_model("Answer", sea=(bool, ...))),
        ChatVLLM(client=chat.client, temperature=1, chat_template="x")._get_llm_string(),
    }
    assert len(names) == 10
    assert cached._get_llm_string() == cached._get_llm_string(temperature=1.0)


def test_rate_limiter_is_asked(chat: ChatVLLM) -> None:
    """A rate limiter is acquired for each call, and holds nobody of a batch up for good."""
    limiter = InMemoryRateLimiter(requests_per_second=50, check_every_n_seconds=0.001)
    limited = ChatVLLM(client=chat.client, temperature=0, max_tokens=4, rate_limiter=limiter)
    assert len(limited.batch(QUESTIONS)) == len(QUESTIONS)


def test_several_completions(chat: ChatVLLM) -> None:
    """generate() has all n completions; invoke and stream the first."""
    several = ChatVLLM(client=chat.client, n=3, temperature=1, seed=3, max_tokens=8)
    result = several.generate([[HumanMessage("Hello")]])
    assert len(result.generations[0]) == 3
    first = result.generations[0][0].text
    assert several.invoke("Hello").content == first
    assert joined(several.stream("Hello")).content == first
    best = {"use_beam_search": True, "best_of": 3, "n": 1, "temperature": 0.0}
    same(joined(several.stream("Hello", **best)), several.invoke("Hello", **best))


def test_tokens_are_counted_as_the_template_writes_them(chat: ChatVLLM) -> None:
    """get_num_tokens_from_messages is what the engine counts for the prompt."""
    messages = [HumanMessage("Hello"), AIMessage("Hi."), HumanMessage("Who are you?")]
    usage = chat.invoke(messages).usage_metadata
    assert usage is not None
    assert chat.get_num_tokens_from_messages(messages) == usage["input_tokens"]
    assert chat.get_num_tokens("Hello") == len(chat.client.get_tokenizer().encode("Hello"))


def test_continue_final_message(chat: ChatVLLM) -> None:
    """The model goes on with the last message where that is asked for."""
    messages = [HumanMessage("What is the capital of France?"), AIMessage("The capital of")]
    answer = chat.invoke(messages, continue_final_message=True)
    assert "France" in str(answer.content)
    with pytest.raises(InvalidRequestError, match="add_generation_prompt"):
        chat.invoke(messages, continue_final_message=True, add_generation_prompt=True)


def test_template_of_a_call(chat: ChatVLLM) -> None:
    """A template and its variables may be given to the object and to a call."""
    template = "{{ greeting }} {{ messages[0].content }}"
    arguments: Any = {"chat_template": template, "chat_template_kwargs": {"greeting": "Dear"}}
    expected = len(chat.client.get_tokenizer().encode("Dear reader"))
    own = ChatVLLM(client=chat.client, **arguments)
    assert own.get_num_tokens_from_messages([HumanMessage("reader")]) == expected
    usage = chat.invoke("reader", **arguments).usage_metadata
    assert usage is not None
    assert usage["input_tokens"] == expected


def test_no_template_says_what_to_do(chat: ChatVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without a chat template is told as such, with ways out."""
    monkeypatch.setattr(chat.client.get_tokenizer(), "chat_template", None)
    with pytest.raises(InvalidRequestError, match=r"no chat template.*chat_template="):
        ChatVLLM(client=chat.client).invoke("Hello")


def test_bad_arguments_are_refused(chat: ChatVLLM) -> None:
    """A mistyped name, a value out of range and an unknown parser are errors before any work."""
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        ChatVLLM(model="quire/demo", temprature=1)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        chat.invoke("Hello", temprature=1)
    with pytest.raises(TypeError, match="cannot change 'dtype'"):
        list(chat.stream("Hello", dtype="half"))
    with pytest.raises(InvalidRequestError, match="temperature"):
        chat.bind(temperature=-1.0).invoke("Hello")
    with pytest.raises(ConfigError, match="nobody"):
        ChatVLLM(client=chat.client, tool_parser="nobody")
    with pytest.raises(InvalidRequestError, match="response_format"):
        chat.invoke("Hello", response_format={"type": "xml"})
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        chat.invoke(
            "Hello",
            response_format={"type": "json_object"},
            structured_outputs={"choice": ["a"]},
        )


def test_structured_outputs_of_the_engine(chat: ChatVLLM) -> None:
    """What the engine can constrain, a chat model can."""
    assert chat.invoke("Hello", structured_outputs={"choice": ["blue"]}).content == "blue"


def test_engine_is_shared_and_life_ends(chat: ChatVLLM) -> None:
    """A text model and a chat model are on one engine; a closed model says that it is."""
    text = VLLM(model="quire/demo")
    assert text.client is chat.client
    other = ChatVLLM(model="quire/demo")
    assert other.client is chat.client
    other.close()
    for call in (other.invoke, lambda q: list(other.stream(q)), lambda q: other.batch([q])):
        with pytest.raises(EngineClosedError):
            call("Hello")
    assert chat.invoke("Hello").content


def test_stored_and_copied(chat: ChatVLLM) -> None:
    """A pickle and a copy answer alike, on the same engine; the dump has no engine."""
    chat.invoke("Hello")
    again = pickle.loads(pickle.dumps(chat))
    assert again.client is chat.client
    assert again.invoke("Hello").content == chat.invoke("Hello").content
    copied = chat.model_copy(update={"max_new_tokens": 2})
    usage = copied.invoke("Who are you?").usage_metadata
    assert usage is not None
    assert usage["output_tokens"] == 2
    form = dumpd(chat)
    assert form["id"] == ["quire", "integrations", "langchain", "chat_vllm", "ChatVLLM"]
    assert not {"client", "profile"} & form["kwargs"].keys()
    assert "profile" not in repr(chat)


def test_profile(chat: ChatVLLM) -> None:
    """What the profile says is of the loaded model, where LangChain has profiles."""
    profile: Any = getattr(chat, "profile", None)
    if profile is None:
        pytest.skip("this langchain-core has no model profiles")
    assert profile["max_input_tokens"] == chat.client._open_processor().limits.max_model_len
    assert profile["structured_output"] is True
    assert profile["image_inputs"] is False
    assert ChatVLLM(client=chat.client, profile={"tool_calling": True}).profile == {
        "tool_calling": True
    }


async def test_concurrent_calls_run_together(chat: ChatVLLM) -> None:
    """Tasks answer as calls one after the other do; one that is cancelled leaves nothing."""
    alone = [chat.invoke(question).content for question in QUESTIONS]
    together = await asyncio.gather(*(chat.ainvoke(question) for question in QUESTIONS))
    assert [message.content for message in together] == alone
    batch = await chat.abatch(QUESTIONS)
    assert [message.content for message in batch] == alone
    stream = chat.astream("Who are you?", max_tokens=500, ignore_eos=True)
    await anext(stream)
    await stream.aclose()
    assert chat.client.get_metrics()["num_unfinished_requests"] == 0
