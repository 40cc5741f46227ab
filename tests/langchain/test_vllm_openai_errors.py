"""VLLMOpenAI where something is wrong: with the server, the request, or the way between."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
from typing import Any

import openai
import pytest
from fake_openai import FakeOpenAI, Scripted
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import LLMResult

from quire.errors import (
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    NotSupportedError,
    QuireError,
)
from quire.integrations.langchain import VLLMOpenAI


def make(remote: FakeOpenAI, **kwargs: Any) -> VLLMOpenAI:
    defaults = {"model": "m", "api_key": "k", "base_url": remote.url, "max_retries": 0}
    return VLLMOpenAI(**{**defaults, **kwargs})


def raised_by(llm: VLLMOpenAI, kind: type[Exception], prompt: str = "p") -> Exception:
    """Return what every way to ask raises; it is the same."""

    async def astream() -> list[str]:
        return [piece async for piece in llm.astream(prompt)]

    ways: list[Any] = [
        lambda: llm.invoke(prompt),
        lambda: llm.batch([prompt, prompt]),
        lambda: list(llm.stream(prompt)),
        lambda: asyncio.run(llm.ainvoke(prompt)),
        lambda: asyncio.run(astream()),
    ]
    errors = []
    for way in ways:
        with pytest.raises(kind) as caught:
            way()
        assert isinstance(caught.value, QuireError)
        errors.append(caught.value)
    assert len({str(error) for error in errors}) == 1
    return errors[0]


def test_no_server() -> None:
    """Where nobody listens the message has the URL, the reason and the command that helps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://user:pw@127.0.0.1:{port}/v1"
    llm = VLLMOpenAI(model="quire/demo", base_url=url, max_retries=0)
    message = str(raised_by(llm, openai.APIConnectionError))
    assert f"no server answers at http://127.0.0.1:{port}/v1" in message
    assert f"`quire serve quire/demo --port {port}`" in message
    assert "Connection refused" in message
    assert "pw" not in message


def test_wrong_model(remote: FakeOpenAI) -> None:
    """A model that is not there: the message has those that are."""
    error = raised_by(make(remote, model="x"), openai.NotFoundError)
    assert isinstance(error, ModelNotFoundError)
    assert str(error) == f"{remote.url} has no model 'x'; it has 'm', 'o'"
    with pytest.raises(ModelNotFoundError, match="has no model 'x'; it has 'm', 'o'"):
        _ = make(remote, model="x").max_context_size
    remote.models = [f"m{i}" for i in range(30)]
    with pytest.raises(ModelNotFoundError, match=r"'m19' and 10 more$"):
        make(remote, model="x").invoke("p")


def test_wrong_path(remote: FakeOpenAI) -> None:
    """A URL without its /v1 is told from a wrong model."""
    error = raised_by(make(remote, base_url=remote.root), openai.NotFoundError)
    assert "has no completions API (Not Found); is openai_api_base right?" in str(error)
    assert "/v1" in str(error)


@pytest.mark.parametrize(
    ("variable", "source"),
    [
        (None, "given as openai_api_key"),
        ("OPENAI_API_KEY", "from OPENAI_API_KEY"),
        ("", "none was given, 'EMPTY' was sent"),
    ],
)
def test_wrong_key(
    remote: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, variable: str | None, source: str
) -> None:
    """The message says where the key came from, and not what it is."""
    for name in ("QUIRE_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    remote.keys = {"right"}
    if variable:
        monkeypatch.setenv(variable, "sk-wrong")
    llm = make(remote, api_key="sk-wrong" if variable is None else None)
    error = raised_by(llm, openai.AuthenticationError)
    assert f"refuses the API key ({source}): the API key is not one of this server's" in str(error)
    assert "sk-wrong" not in str(error)
    assert make(remote, api_key="right").invoke("p").startswith("p|")


def test_refused_requests(remote: FakeOpenAI) -> None:
    """What the server refuses is an InvalidRequestError in its own words; of a prompt that is
    too long, with what helps."""
    error = raised_by(make(remote), openai.BadRequestError, "BAD")
    assert isinstance(error, InvalidRequestError)
    assert str(error) == f"{remote.url} refuses the request: the prompt is BAD"
    assert error.status_code == 400  # type: ignore[attr-defined]
    assert error.param == "prompt"  # type: ignore[attr-defined]
    assert error.body["message"] == "the prompt is BAD"  # type: ignore[attr-defined]
    error = raised_by(make(remote), InvalidRequestError, "x" * 1001)
    assert str(error).endswith(
        "maximum context length is 1000 tokens; shorten the prompt, lower max_tokens, or set "
        "truncate_prompt_tokens"
    )
    with pytest.raises(InvalidRequestError, match="character that is none"):
        make(remote).invoke("a\ud800")


def test_errors_travel(remote: FakeOpenAI) -> None:
    """An error is pickled as quire's own, with its message."""
    with pytest.raises(InvalidRequestError) as caught:
        make(remote).invoke("BAD")
    copied = pickle.loads(pickle.dumps(caught.value))
    assert type(copied) is InvalidRequestError
    assert str(copied) == str(caught.value)


def test_failures_that_may_pass_are_tried_again(remote: FakeOpenAI) -> None:
    """The client's own retries run: a busy server is asked again as often as max_retries says,
    a request that is wrong is not."""
    busy = Scripted(503, {"error": {"message": "busy"}}, {"Retry-After": "0.01"})
    remote.script += [busy, busy]
    assert make(remote, max_retries=2).invoke("p").startswith("p|")
    assert len(remote.bodies) == 3
    remote.script += [busy, busy]
    with pytest.raises(openai.InternalServerError, match="answered with status 503: busy"):
        make(remote, max_retries=1).invoke("p")
    remote.script.clear()
    count = len(remote.bodies)
    with pytest.raises(openai.BadRequestError):
        make(remote, max_retries=2).invoke("BAD")
    assert len(remote.bodies) == count + 1


def test_no_answer_in_time(remote: FakeOpenAI) -> None:
    """A server that is silent for longer than the timeout is told so, of a float and a pair."""
    for timeout in (0.05, (5.0, 0.05)):
        llm = make(remote, request_timeout=timeout)
        remote.silent_seconds = 0.3
        with pytest.raises(openai.APITimeoutError, match="no answer within the request_timeout"):
            llm.invoke("p")


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (
            [{"error": {"message": "the engine died"}}],
            "ended its answer with an error: the engine died",
        ),
        ([None], "the connection to .* broke|no server answers"),
        ([], "ended its stream before the completion's end"),
        ([b"data: {nope\n\n"], "is no JSON"),
        ([{"choices": ["two"]}], "is no completion"),
        ([{"choices": [{"index": 0, "text": 2}]}], "is no completion"),
    ],
)
def test_streams_that_break(remote: FakeOpenAI, events: list[Any], message: str) -> None:
    """A stream that ends with an error, by a lost connection or too early raises after what came,
    and is never taken for a short answer; the run's callbacks are told."""
    first = {
        "id": "1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "text": "one", "finish_reason": None, "logprobs": None}],
    }
    ends: list[Any] = []

    class Ends(BaseCallbackHandler):
        def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
            ends.append(response)

        def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
            ends.append(error)

    async def astream() -> None:
        async for piece in llm.astream("p"):
            pieces.append(piece)

    llm = make(remote, callbacks=[Ends()])
    pieces: list[str] = []
    remote.script += [Scripted(events=[first, *events])] * 3
    with pytest.raises(QuireError, match=message):
        pieces.extend(llm.stream("p"))
    with pytest.raises(QuireError, match=message):
        asyncio.run(astream())
    assert pieces[-1] == "one"
    with pytest.raises(QuireError, match=message):
        llm.invoke("p", streaming=True)
    assert [type(end) for end in ends if not isinstance(end, QuireError)] == []
    assert len(ends) == 3


def test_what_is_no_completion(remote: FakeOpenAI) -> None:
    """A page of a proxy, or JSON of another API, is said to be none."""
    for body in (b"<html>Welcome</html>", {"hello": "there"}):
        remote.script.append(Scripted(body=body))
        with pytest.raises(QuireError, match="completions answered is no completion"):
            make(remote).invoke("p")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.sampled_from(["", "a"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["text", "index", "cached_tokens", "prompt_tokens", "total_tokens"]),
            inner,
        )
    ),
    max_leaves=6,
)


@given(choices=json_values, choice=json_values, usage=json_values)
def test_whatever_a_server_says_is_a_text_or_an_error(
    remote: FakeOpenAI, choices: Any, choice: Any, usage: Any
) -> None:
    """JSON of any shape where a completion should be is read, or an error of quire's."""
    for body in ({"choices": choices, "usage": usage}, {"choices": [choice], "usage": usage}):
        remote.script.append(Scripted(body=body))
        with contextlib.suppress(QuireError):
            assert isinstance(make(remote).invoke("p"), str)
    remote.script.append(Scripted(body=b"{nope", headers={"Content-Type": "application/json"}))
    with pytest.raises(QuireError, match="no JSON"):
        make(remote).invoke("p")


def test_what_cannot_be_sent_is_refused_at_once(remote: FakeOpenAI) -> None:
    """A key with a line's end, as from a file, a timeout of no seconds and a port that cannot be
    are told, and the key is not."""
    for key in ("sk-secret\n", "sk-secr\u00e9t"):
        with pytest.raises(ConfigError, match="openai_api_key has a character") as caught:
            make(remote, api_key=key)
        assert "sk-" not in str(caught.value)
    for timeout in (-1, 0, "3", (1, "3"), float("nan")):
        with pytest.raises(InvalidRequestError, match="request_timeout"):
            make(remote, timeout=timeout)
    with pytest.raises(QuireError, match=r"no server answers at http://127.0.0.1:99999/v1"):
        make(remote, base_url="http://127.0.0.1:99999/v1").invoke("p")


def test_models_that_are_none(remote: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /models, or tiktoken's download, gives nothing to count by, it is said what does."""
    llm = make(remote, max_tokens=-1)
    monkeypatch.setattr(llm.client._client.models, "list", lambda: [None])
    with pytest.raises(NotSupportedError, match="does not answer with models"):
        llm.invoke("p")
    tiktoken = pytest.importorskip("tiktoken")

    def offline(name: str) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.setattr(tiktoken, "encoding_for_model", offline)
    with pytest.raises(NotSupportedError, match="no network"):
        make(remote, tiktoken_model_name="some-model").get_num_tokens("p")


kinds = st.lists(st.sampled_from(["", "BAD", None]), max_size=6)


@given(given=kinds, width=st.sampled_from([None, 1, 3]), batch_size=st.sampled_from([1, 2, 20]))
def test_failures_stay_alone(
    remote: FakeOpenAI, given: list[Any], width: int | None, batch_size: int
) -> None:
    """Whichever prompts of a batch are refused or are none, the others have their answers, also
    those that went in one request with them; and no failure is in the cache."""
    prompts: Any = [kind if kind is None else f"{kind}{i}" for i, kind in enumerate(given)]
    cache = InMemoryCache()
    llm = make(remote, batch_size=batch_size, cache=cache)
    config: Any = {"max_concurrency": width}
    answers: list[Any] = llm.batch(prompts, config=config, return_exceptions=True)
    assert len(answers) == len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt is None:
            assert isinstance(answer, ValueError)
        elif "BAD" in prompt:
            assert isinstance(answer, openai.BadRequestError)
        else:
            assert answer.startswith(f"{prompt}|")
    count = len(remote.bodies)
    good = [prompt for prompt in prompts if prompt is not None and "BAD" not in prompt]
    llm.batch(good, return_exceptions=True)
    assert len(remote.bodies) == count


async def test_failures_stay_alone_asynchronously(remote: FakeOpenAI) -> None:
    """The same for `abatch`; without return_exceptions the failure is raised."""
    llm = make(remote, batch_size=2)
    answers: list[Any] = await llm.abatch(["a", "BAD", "c", "d"], return_exceptions=True)
    assert isinstance(answers.pop(1), InvalidRequestError)
    assert [answer[0] for answer in answers] == ["a", "c", "d"]
    with pytest.raises(InvalidRequestError):
        await llm.abatch(["a", "BAD"])


def test_a_server_that_is_gone_fails_every_prompt() -> None:
    """With return_exceptions a lost server is each prompt's own error."""
    llm = VLLMOpenAI(model="m", base_url="http://127.0.0.1:1/v1", max_retries=0)
    answers: list[Any] = llm.batch(["a", "b"], return_exceptions=True)
    assert [isinstance(answer, openai.APIConnectionError) for answer in answers] == [True, True]


def test_what_is_not_read_is_given_up(remote: FakeOpenAI) -> None:
    """A stream that is left before its end is closed, so that the server can stop."""
    remote.event_seconds = 0.05
    pieces = make(remote).stream("p" * 500)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]

    async def leave() -> None:
        async for _ in make(remote).astream("p" * 500):
            break

    asyncio.run(leave())
    for _ in range(100):
        if all(recorded.broke_off for recorded in remote.requests):
            break
        remote.pause()
    assert [recorded.broke_off for recorded in remote.requests] == [True, True]
