"""VLLMOpenAI against LangChain's class of that name, on the same server."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from fake_openai import FakeOpenAI, Scripted
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.outputs import LLMResult

from quire import StructuredOutputsParams
from quire.errors import InvalidRequestError
from quire.integrations.langchain import VLLMOpenAI

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is no longer maintained, which it says on import
    community = pytest.importorskip("langchain_community.llms", reason="it is the oracle")


def make(remote: FakeOpenAI, **kwargs: Any) -> VLLMOpenAI:
    return VLLMOpenAI(**{"model": "m", "api_key": "k", "base_url": remote.url, **kwargs})


@pytest.fixture
def oracle(remote: FakeOpenAI) -> Iterator[Callable[..., Any]]:
    """Return a function that makes objects of LangChain's class, all on one client."""
    kept = make(remote)  # and ours, as long as it lives
    client = openai.OpenAI(api_key="k", base_url=remote.url)
    shared = {"client": client.completions, "async_client": client.completions}

    def make_theirs(**kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return community.VLLMOpenAI(**{"model": "m", "api_key": "k", **shared, **kwargs})

    yield make_theirs
    client.close()
    del kept


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Return an event loop, which ends as that of ``asyncio.run`` does."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def without_nulls(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in body.items() if v is not None} for body in bodies]


def outcome(remote: FakeOpenAI, run: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the bodies of the requests that a call makes, and what it returns."""
    remote.requests.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        returned = run()
    if isinstance(returned, LLMResult):
        usage = dict((returned.llm_output or {}).pop("token_usage"))
        usage.pop("cached_tokens", None)  # LangChain's class leaves it out
        generations = [
            [
                (
                    one.text,
                    *((one.generation_info or {}).get(k) for k in ("finish_reason", "logprobs")),
                )
                for one in of_prompt
            ]
            for of_prompt in returned.generations
        ]
        returned = generations, returned.llm_output, usage
    return without_nulls(remote.bodies), returned


constructor = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 1]),
        "max_tokens": st.sampled_from([1, 400]),
        "top_p": st.sampled_from([0.5, 1]),
        "frequency_penalty": st.sampled_from([-1.0, 0, 0.5]),
        "presence_penalty": st.sampled_from([0.25]),
        "n": st.sampled_from([1, 3]),
        "best_of": st.sampled_from([1, 3]),
        "batch_size": st.sampled_from([1, 2, 20]),
        "model": st.sampled_from(["m", "o"]),
        "model_kwargs": st.sampled_from(
            [
                {"stop": ["."]},
                {"logprobs": 2, "seed": 3},
                {"extra_body": {"top_k": 3, "structured_outputs": {"regex": "a+"}}},
                {"echo": True, "user": "u", "extra_headers": {"X-A": "b"}},
            ]
        ),
    },
)
called = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.25]),
        "max_tokens": st.sampled_from([7]),
        "echo": st.sampled_from([True]),
        "model": st.sampled_from(["o"]),
        "extra_headers": st.sampled_from([{"X-A": "c"}]),
        "timeout": st.sampled_from([30.0]),
    },
)


@given(
    own=constructor, call=called, prompts=st.lists(st.sampled_from("abc"), min_size=1, max_size=5)
)
def test_requests_and_results_are_those_of_langchains_class(
    remote: FakeOpenAI,
    oracle: Any,
    loop: asyncio.AbstractEventLoop,
    own: dict[str, Any],
    call: dict[str, Any],
    prompts: list[str],
) -> None:
    """The same arguments make the same requests, and the same answers the same results: of
    `generate`, its async twin and `invoke`."""
    ours = make(remote, **_copied(own))
    theirs = oracle(**_copied(own))
    model_name = call.get("model", ours.model_name)
    expected = outcome(remote, lambda: theirs.generate(prompts, **call))
    expected[1][1]["model_name"] = model_name  # LangChain's names the object's, also then
    assert outcome(remote, lambda: ours.generate(prompts, **call)) == expected
    concurrent = outcome(remote, lambda: loop.run_until_complete(ours.agenerate(prompts, **call)))
    assert concurrent[1][0] == expected[1][0]
    assert concurrent[1][2] == expected[1][2]
    assert sorted(map(str, concurrent[0])) == sorted(map(str, expected[0]))
    assert outcome(remote, lambda: ours.invoke("a", **call)) == outcome(
        remote, lambda: theirs.invoke("a", **call)
    )


def _copied(own: dict[str, Any]) -> dict[str, Any]:
    # LangChain's class takes arguments out of the user's own dict.
    return {k: dict(v) if isinstance(v, dict) else v for k, v in own.items()}


@given(own=constructor, stop=st.sampled_from([None, ["x"]]))
def test_streams_are_those_of_langchains_class(
    remote: FakeOpenAI, oracle: Any, own: dict[str, Any], stop: list[str] | None
) -> None:
    """A stream is asked for alike, but for the usage that ours asks for too, and its text is
    that of the other."""
    own = {k: v for k, v in own.items() if k not in ("n", "best_of")}
    if stop and "stop" in own.get("model_kwargs", {}):
        stop = None  # there they cannot be joined
    theirs = oracle(**_copied(own))
    bodies, pieces = outcome(remote, lambda: list(theirs.stream("a", stop=stop)))
    ours = make(remote, **_copied(own))
    own_bodies, own_pieces = outcome(remote, lambda: list(ours.stream("a", stop=stop)))
    assert [body.pop("stream_options") for body in own_bodies] == [{"include_usage": True}]
    assert own_bodies == bodies
    assert own_pieces == pieces
    quiet = make(remote, **_copied(own), stream_usage=False)
    assert outcome(remote, lambda: list(quiet.stream("a", stop=stop))) == (bodies, pieces)


def test_streaming_objects_answer_alike(remote: FakeOpenAI, oracle: Any) -> None:
    """With `streaming` the texts are the same, and callbacks see each token."""
    tokens: dict[str, list[str]] = {"ours": [], "theirs": []}

    class Tokens(BaseCallbackHandler):
        def __init__(self, whose: str) -> None:
            self.whose = whose

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            assert kwargs["chunk"].text == token
            tokens[self.whose].append(token)

    ours = make(remote, streaming=True, callbacks=[Tokens("ours")], logprobs=1)
    theirs = oracle(streaming=True, callbacks=[Tokens("theirs")], model_kwargs={"logprobs": 1})
    assert (
        outcome(remote, lambda: ours.generate(["a"]))[1][0]
        == (outcome(remote, lambda: theirs.generate(["a"]))[1][0])
    )
    assert tokens["ours"] == tokens["theirs"]
    assert len(tokens["ours"]) > 3
    with pytest.raises(ValueError, match="multiple prompts"):
        theirs.generate(["a", "b"])
    assert len(ours.generate(["a", "b"]).generations) == 2


def test_the_seed_example(remote: FakeOpenAI) -> None:
    """The example that both documentations begin with asks for what it says."""
    llm = VLLMOpenAI(
        openai_api_key="EMPTY",
        openai_api_base=remote.url,
        model_name="m",
        model_kwargs={"stop": ["."]},
    )
    assert llm.invoke("Rome is").startswith("Rome is|")
    [recorded] = remote.requests
    assert recorded.body["stop"] == ["."]
    assert recorded.body["prompt"] == ["Rome is"]
    assert recorded.headers["authorization"] == "Bearer EMPTY"


def test_sampling_beyond_openais_goes_into_the_body(remote: FakeOpenAI) -> None:
    """Sampling parameters of quire and vLLM are arguments, of objects and of calls, and a call's
    replace the object's wherever either was given."""
    llm = make(remote, top_k=5, min_p=0.1, extra_body={"priority": 1, "ignore_eos": True})
    llm.invoke("p")
    llm.invoke("p", top_k=7, ignore_eos=False, stop_token_ids=[4])
    llm.invoke("p", extra_body={"top_k": 9, "cache_salt": "s"})
    first, second, third = remote.bodies
    assert (first["top_k"], first["min_p"], first["priority"], first["ignore_eos"]) == (
        5,
        0.1,
        1,
        True,
    )
    assert (second["top_k"], second["min_p"], second["ignore_eos"]) == (7, 0.1, False)
    assert second["stop_token_ids"] == [4]
    assert (third["top_k"], third["priority"], third["cache_salt"]) == (9, 1, "s")
    unset = {"repetition_penalty", "bad_words", "structured_outputs", "logit_bias", "seed"}
    assert not unset & first.keys()


@pytest.mark.parametrize(
    "constraint",
    [
        {"json": {"type": "object", "properties": {"b": {}, "a": {}}}},
        {"choice": ["yes", "no"]},
        {"regex": "a+", "backend": "xgrammar"},
        {"json_object": True, "disable_any_whitespace": True},
    ],
)
def test_structured_outputs(remote: FakeOpenAI, constraint: dict[str, Any]) -> None:
    """A constraint goes to the server as it was written, as a dict or as an object, from the
    constructor or a call; one that is none is refused before the server is asked."""
    make(remote, structured_outputs=constraint).invoke("p")
    make(remote).invoke("p", structured_outputs=StructuredOutputsParams(**constraint))
    make(remote).bind(structured_outputs=constraint).invoke("p")
    assert [body["structured_outputs"] for body in remote.bodies] == [constraint] * 3
    for body in remote.bodies:  # the order of keys is the order in which they are generated
        assert str(body["structured_outputs"]) == str(constraint)
    with pytest.raises(InvalidRequestError, match="exactly one"):
        make(remote, structured_outputs={**constraint, "grammar": "root ::= 'a'"})
    with pytest.raises(InvalidRequestError, match="exactly one"):
        make(remote).invoke("p", structured_outputs={})
    assert len(remote.requests) == 3


def test_stop_strings_are_joined(remote: FakeOpenAI) -> None:
    """Those of the object, wherever it was given them, and of the call, each once; it is what
    the in-process model does."""
    make(remote, stop="a").invoke("p", stop=["b", "a"])
    make(remote, model_kwargs={"stop": ["a"]}).bind(stop=["c"]).invoke("p")
    make(remote).invoke("p")
    stops = [body.get("stop") for body in remote.bodies]
    assert stops == [["a", "b"], ["a", "c"], None]


def test_choices_in_any_order(remote: FakeOpenAI) -> None:
    """Completions belong to their prompts by index, whatever order they come in; too few are an
    error."""
    remote.reverses = True
    result = make(remote, n=2).generate(["a", "b"])
    texts = [[one.text for one in of_prompt] for of_prompt in result.generations]
    assert [[t[0] + t[-1] for t in of_prompt] for of_prompt in texts] == [
        ["a0", "a1"],
        ["b0", "b1"],
    ]
    remote.script.append(Scripted(body={"object": "text_completion", "choices": []}))
    with pytest.raises(Exception, match="0 completions for 2 prompts with n=1"):
        make(remote).generate(["a", "b"])


def test_usage(remote: FakeOpenAI) -> None:
    """Tokens are counted once: for a prompt that went alone in its generation's information, for
    all in `llm_output`, and over all runs of a batch."""
    seen: list[dict[str, int]] = []

    class Ends(BaseCallbackHandler):
        def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
            seen.append((response.llm_output or {})["token_usage"])

    llm = make(remote, batch_size=2, callbacks=[Ends()])
    result = llm.generate(["a", "bb", "ccc"])
    output = result.llm_output or {}
    lengths = [len(one[0].text) for one in result.generations]
    assert output["token_usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": sum(lengths),
        "total_tokens": 6 + sum(lengths),
        "cached_tokens": 2,
    }
    assert output["model_name"] == "m"
    assert output["system_fingerprint"] == "fp"
    infos = [one[0].generation_info or {} for one in result.generations]
    assert [info.get("token_usage", {}).get("prompt_tokens") for info in infos] == [None, None, 3]
    assert [info["stop_reason"] for info in infos] == ["."] * 3
    assert [usage.get("prompt_tokens") for usage in seen] == [3, None, 3]
    assert (
        sum(usage.get("total_tokens", 0) for usage in seen) == output["token_usage"]["total_tokens"]
    )
    alone = llm.generate(["a"], n=2)
    assert "token_usage" not in (alone.generations[0][0].generation_info or {})
    assert (alone.llm_output or {})["token_usage"]["prompt_tokens"] == 1


def test_logprobs(remote: FakeOpenAI) -> None:
    """They come as OpenAI's completions have them, also put together from a stream."""
    llm = make(remote, logprobs=1)
    [[whole]] = llm.generate(["p"]).generations
    info = whole.generation_info or {}
    assert "".join(info["logprobs"]["tokens"]) == whole.text
    ends: list[Any] = []

    class Ends(BaseCallbackHandler):
        def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
            ends.append(response.generations[0][0])

    assert "".join(llm.stream("p", config={"callbacks": [Ends()]})) == whole.text
    [streamed] = ends
    for name in ("finish_reason", "stop_reason", "token_usage"):
        assert streamed.generation_info[name] == info[name]
    assert streamed.generation_info["logprobs"]["tokens"] == info["logprobs"]["tokens"]
    assert len(streamed.generation_info["logprobs"]["top_logprobs"]) == len(whole.text)


def test_completions_to_compare_come_in_one_piece(remote: FakeOpenAI) -> None:
    """A stream of the best of several, or of a beam search, waits for all, as the in-process
    model's; a beam search takes the default temperature for unset."""
    assert len(list(make(remote, best_of=2).stream("p"))) == 1
    assert len(list(make(remote, n=2, use_beam_search=True).stream("p"))) == 1
    first, second = remote.bodies
    assert (first["best_of"], first.get("stream")) == (2, None)
    assert "temperature" not in second
    with pytest.raises(InvalidRequestError, match="temperature"):
        make(remote, n=2, use_beam_search=True, temperature=0.5)


async def test_asynchronous_requests_run_at_once(remote: FakeOpenAI) -> None:
    """All requests of a batch are under way together; the answers come in the order of the
    prompts, and callbacks are told of each."""
    ends: list[str] = []

    class Ends(AsyncCallbackHandler):
        async def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
            ends.append(response.generations[0][0].text[0])

    llm = make(remote, batch_size=1)
    texts = await llm.abatch(list("abcd"), config={"callbacks": [Ends()]})
    assert [text[0] for text in texts] == list("abcd")
    assert sorted(ends) == list("abcd")
    assert (await llm.ainvoke("e")).startswith("e|")


def test_room_left(remote: FakeOpenAI) -> None:
    """A `max_tokens` of -1 is what the model has left after each prompt, by the server's own
    tokens; no room is refused, None is left to the server."""
    make(remote, max_tokens=-1).batch(["a", "bbb"])
    assert [body["max_tokens"] for body in remote.bodies] == [998, 996]
    asyncio.run(make(remote).ainvoke("cc", max_tokens=-1))
    list(make(remote).stream("cc", max_tokens=-1))
    assert [body["max_tokens"] for body in remote.bodies[2:]] == [997, 997]
    with pytest.raises(InvalidRequestError, match=r"has 1001 tokens, and 'm' on .* takes 1000"):
        make(remote, max_tokens=-1).invoke("x" * 1000)
    make(remote, max_tokens=None).invoke("p")
    assert "max_tokens" not in remote.bodies[-1]


def test_tokens_are_the_servers(remote: FakeOpenAI) -> None:
    """Tokens are counted by the server's own tokenizer; without it by tiktoken, with a warning
    unless it was asked for; a function of the user's own goes before all."""
    llm = make(remote)
    assert llm.get_token_ids("ab") == [1, 97, 98]
    assert llm.get_num_tokens("abc") == 4
    assert llm.max_context_size == 1000
    assert make(remote, custom_get_token_ids=lambda text: [7]).get_num_tokens("abc") == 1
    assert remote.requests[0].headers["authorization"] == "Bearer k"
    remote.has_tokenize = False
    pytest.importorskip("tiktoken", reason="it counts where a server does not")
    from quire.integrations.langchain import server_info

    class Encoding:
        def encode(self, text: str, **kwargs: Any) -> list[int]:
            assert kwargs == {"allowed_special": frozenset(), "disallowed_special": "all"}
            return [0] * len(text)

    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_info, "_encoding", lambda name: names.append(name) or Encoding())
        with pytest.warns(UserWarning, match="has no /tokenize: .* not those of 'm'"):
            assert llm.get_num_tokens("abc") == 3
        assert make(remote, tiktoken_model_name="gpt-4o").get_num_tokens("ab") == 2
    assert names == ["cl100k_base", "gpt-4o"]
