"""VLLMOpenAI's arguments, copies, and written forms."""

from __future__ import annotations

import asyncio
import builtins
import copy
import gc
import pickle
import subprocess
import sys
import warnings
from typing import Any

import httpx
import openai
import pytest
from fake_openai import FakeOpenAI
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumps, loads
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField
from pydantic import ValidationError

from quire.errors import ConfigError, InvalidRequestError
from quire.integrations.langchain import VLLMOpenAI
from quire.integrations.langchain.remote_model import RemoteModel

VARIABLES = (
    "QUIRE_API_KEY",
    "VLLM_API_KEY",
    "OPENAI_API_KEY",
    "OPENAI_API_BASE",
    "OPENAI_BASE_URL",
    "OPENAI_ORG_ID",
    "OPENAI_ORGANIZATION",
    "OPENAI_PROXY",
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def make(remote: FakeOpenAI, **kwargs: Any) -> VLLMOpenAI:
    return VLLMOpenAI(**{"model": "m", "api_key": "k", "base_url": remote.url, **kwargs})


def key_of(llm: VLLMOpenAI) -> str:
    assert llm.openai_api_key is not None
    return llm.openai_api_key.get_secret_value()


def test_fields_and_defaults_of_langchains_class() -> None:
    """Every field of LangChain's class is here under its name and alias, with its default, but
    for the few whose difference is documented."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("langchain_community.llms", reason="it is the oracle")
        theirs = module.VLLMOpenAI.model_fields
    differ = {"model_name", "logit_bias"}
    for name, field in theirs.items():
        own = VLLMOpenAI.model_fields[name]
        assert own.alias == field.alias, name
        if name not in differ:
            assert own.get_default(call_default_factory=True) == field.get_default(
                call_default_factory=True
            ), name
    text = " ".join((VLLMOpenAI.__doc__ or "").split())
    assert not {name for name in RemoteModel.model_fields if name not in text}


def test_aliases() -> None:
    """Each name works, both together only where they agree."""
    by_field = VLLMOpenAI(
        model_name="m", openai_api_key="k", openai_api_base="http://h/v1", request_timeout=3.0
    )
    by_alias = VLLMOpenAI(model="m", api_key="k", base_url="http://h/v1", timeout=3.0)
    assert by_field == by_alias
    with pytest.raises(TypeError, match="model_name and model are two names of one argument"):
        VLLMOpenAI(model="m", model_name="n")


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments go before the environment, and quire's own variables before OpenAI's."""
    llm = VLLMOpenAI(model="m")
    assert (key_of(llm), llm.openai_api_base) == ("EMPTY", "http://localhost:8000/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "o")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://two/v1")
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    llm = VLLMOpenAI(model="m")
    assert (key_of(llm), llm.openai_api_base) == ("o", "http://two/v1")
    assert llm.client._client.organization == "org"
    monkeypatch.setenv("VLLM_API_KEY", "v")
    assert key_of(VLLMOpenAI(model="m")) == "v"
    monkeypatch.setenv("QUIRE_API_KEY", "q")
    monkeypatch.setenv("OPENAI_API_BASE", "http://one/v1")
    llm = VLLMOpenAI(model="m")
    assert (key_of(llm), llm.openai_api_base) == ("q", "http://one/v1")
    assert key_of(VLLMOpenAI(model="m", api_key="k")) == "k"


def test_unknown_arguments() -> None:
    """A name that nobody knows is an error with the nearest one, wherever it stands; one that
    only the client knows is moved, with a warning, as in LangChain's class."""
    with pytest.raises(TypeError, match="'temprature': did you mean 'temperature'"):
        VLLMOpenAI(model="m", temprature=0)
    with pytest.raises(TypeError, match=r"model_kwargs\(\) got .* 'sead': did you mean 'seed'"):
        VLLMOpenAI(model="m", model_kwargs={"sead": 1})
    with pytest.warns(UserWarning, match="echo is no argument of VLLMOpenAI and was moved"):
        assert VLLMOpenAI(model="m", echo=True).model_kwargs == {"echo": True}
    with pytest.warns(UserWarning, match="temperature is an argument of VLLMOpenAI"):
        llm = VLLMOpenAI(model="m", model_kwargs={"temperature": 0.5})
    assert (llm.temperature, llm.model_kwargs) == (0.5, {})
    with pytest.raises(ConfigError, match="seed is given as an argument and in model_kwargs"):
        VLLMOpenAI(model="m", seed=1, model_kwargs={"seed": 1})
    with pytest.raises(ConfigError, match="top_k is given as an argument and in extra_body"):
        VLLMOpenAI(model="m", top_k=1, extra_body={"top_k": 1})
    own = {"stop": ["."]}
    VLLMOpenAI(model="m", model_kwargs=own)
    assert own == {"stop": ["."]}


def test_unknown_arguments_of_calls(remote: FakeOpenAI) -> None:
    """In a call as well; what belongs to the object cannot be changed by it."""
    llm = make(remote)
    with pytest.raises(TypeError, match="'topk': did you mean 'top_k'"):
        llm.invoke("p", topk=1)
    with pytest.raises(TypeError, match="cannot change 'openai_api_base': make another VLLMOpenAI"):
        llm.invoke("p", base_url="http://x")
    with pytest.raises(TypeError, match="stream"):
        llm.invoke("p", stream=True)
    with pytest.raises(InvalidRequestError, match=r"prompts\[0\] must be a string"):
        llm.generate([1])  # type: ignore[list-item]
    assert remote.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "temperature must be"),
        ({"temperature": True}, "must be a number"),
        ({"n": 0}, "n must be"),
        ({"n": 2, "temperature": 0}, "n must be 1 at temperature 0"),
        ({"top_p": 0}, "top_p must be"),
        ({"best_of": 2, "n": 3}, "best_of must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be"),
        ({"stop": [""]}, "stop"),
        ({"structured_outputs": {"regex": ""}}, "regex"),
        ({"logit_bias": {1: float("-inf")}}, "-100 forbids a token"),
        ({"batch_size": 0}, "batch_size"),
        ({"streaming": True, "n": 2}, "n must be 1 with streaming"),
        ({"streaming": True, "best_of": 2}, "best_of must be 1 with streaming"),
        ({"model": ""}, "model_name is empty"),
        ({"openai_proxy": "http://p", "http_client": object()}, "openai_proxy"),
        ({"http_client": object()}, "refuses these settings"),
    ],
)
def test_wrong_values_are_told_at_once(arguments: dict[str, Any], message: str) -> None:
    """Before a server is asked, as a ValueError that names the argument."""
    with pytest.raises(ValueError, match=message) as caught:
        VLLMOpenAI(**{"model": "m", **arguments})
    assert isinstance(caught.value, (ConfigError, InvalidRequestError, ValidationError))


def test_connection_settings_reach_the_client(remote: FakeOpenAI) -> None:
    """Headers, query, organization and HTTP clients are those of the requests that are sent."""
    llm = make(
        remote,
        default_headers={"X-A": "b"},
        default_query={"q": "1"},
        organization="org",
        max_retries=7,
        timeout=(1.0, 2.0),
    )
    llm.invoke("p")
    [recorded] = remote.requests
    assert recorded.headers["x-a"] == "b"
    assert recorded.headers["openai-organization"] == "org"
    assert recorded.path.endswith("?q=1")
    assert llm.client._client.max_retries == 7
    assert (llm.client._client.timeout.connect, llm.client._client.timeout.read) == (1.0, 2.0)
    sent: list[str] = []
    with httpx.Client(
        event_hooks={"request": [lambda request: sent.append(request.method)]}
    ) as own:
        make(remote, http_client=own).invoke("p")
    assert sent == ["POST"]


def test_a_proxy_is_used(remote: FakeOpenAI) -> None:
    """Requests for another host go to the proxy."""
    llm = VLLMOpenAI(model="m", base_url="http://elsewhere.invalid/v1", openai_proxy=remote.root)
    remote.models = []
    with pytest.raises(openai.NotFoundError):
        llm.invoke("p")
    assert remote.requests[0].path == "http://elsewhere.invalid/v1/completions"
    with pytest.raises(openai.NotFoundError):
        asyncio.run(llm.ainvoke("p"))


def test_clients_of_the_users_own(remote: FakeOpenAI) -> None:
    """A client, or its completions, is taken as it is."""
    with openai.OpenAI(api_key="other", base_url=remote.url) as client:
        for given in (client, client.completions):
            llm = make(remote, client=given)
            assert llm.invoke("p").startswith("p|")
            assert llm.client is client.completions
            assert remote.requests[-1].headers["authorization"] == "Bearer other"
            assert llm.get_num_tokens("a") == 2
        with pytest.raises(TypeError):
            pickle.dumps(llm)


def test_equal_objects_share_a_connection(remote: FakeOpenAI) -> None:
    """Objects with the same settings, copies and configured ones use the same sockets, and these
    are closed when the last of them goes."""
    llm = make(remote)
    assert make(remote, temperature=0).client is llm.client
    assert make(remote, api_key="x").client is not llm.client
    assert copy.deepcopy(llm).client is llm.client
    assert copy.copy(llm).client is llm.client
    assert llm.model_copy(update={"top_k": 3}).client is llm.client
    root = llm.client._client
    assert not root.is_closed()
    del llm
    gc.collect()
    assert root.is_closed()


def test_every_event_loop_has_its_client(remote: FakeOpenAI) -> None:
    """One object works in one event loop after the other, and leaves nothing open in them."""
    llm = make(remote)
    for _ in range(3):
        assert asyncio.run(llm.ainvoke("p")).startswith("p|")
    assert llm._connection is not None
    assert llm._connection._loops == {}

    async def direct() -> Any:
        return await llm.async_client.create(model="m", prompt="q")

    assert asyncio.run(direct()).choices[0].text.startswith("q|")


@pytest.fixture
def kept(remote: FakeOpenAI) -> VLLMOpenAI:
    """Return an object that keeps the sockets open which others share."""
    return make(remote)


fields = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.1, 0.2]),
        "max_tokens": st.sampled_from([4, None]),
        "stop": st.sampled_from([["a"], ["b"]]),
        "seed": st.sampled_from([1, 2]),
        "top_k": st.sampled_from([1, 2]),
        "structured_outputs": st.sampled_from([{"regex": "a"}, {"choice": ["a"]}]),
        "extra_body": st.sampled_from([{"x": 1}, {"x": 2}]),
        "model": st.sampled_from(["m", "o"]),
        "echo": st.sampled_from([True, False]),
    },
)


@given(runs=st.lists(st.tuples(fields, fields), min_size=2, max_size=5))
def test_the_cache_never_answers_for_another_request(
    remote: FakeOpenAI, kept: VLLMOpenAI, runs: list[Any]
) -> None:
    """With any mix of arguments of objects and calls, an answer from the cache is the one that
    the server gives to its own request."""
    cache = InMemoryCache()
    for own, call in runs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # echo is moved
            cached = make(remote, cache=cache, **own)
            direct = make(remote, cache=False, **own)
        assert cached.invoke("p", **call) == direct.invoke("p", **call)


def test_identity(remote: FakeOpenAI) -> None:
    """Two servers are two models; what changes no answer changes no identity; and no secret is
    in it, nor in any text of the object."""
    one = make(remote, base_url="http://one/v1")
    assert one._identifying_params != make(remote, base_url="http://two/v1")._identifying_params
    same = make(remote, base_url="http://u:pw@one/v1/", api_key="x", batch_size=3, streaming=True)
    assert one._identifying_params == same._identifying_params
    assert one._llm_type == "vllm-openai"
    secret = make(
        remote,
        base_url="http://u:pw@one/v1",
        api_key="sk-secret",
        default_headers={"Authorization": "sk-secret", "X-Route": "a"},
        openai_proxy="http://u:pw@proxy",
        model_kwargs={"extra_headers": {"X-Api-Key": "sk-secret"}},
    )
    for text in (repr(secret), str(secret), str(secret._identifying_params), dumps(secret)):
        assert "secret" not in text.replace('"type": "secret"', "")
        assert "pw" not in text
    assert (
        make(remote, default_headers={"X": "a"})._identifying_params
        != make(remote, default_headers={"X": "b"})._identifying_params
    )
    assert repr(VLLMOpenAI(model="m", top_k=3)).endswith("top_k=3)")


def test_it_is_written_and_read(remote: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dumps` and `loads`, pickle and deepcopy give an object that asks for the same."""
    llm = make(
        remote,
        temperature=0.25,
        top_k=4,
        extra_body={"x": 1},
        structured_outputs={"regex": "a+"},
        stop=["."],
        model_kwargs={"user": "u"},
    )
    expected = llm.invoke("p")
    text = dumps(llm)
    assert '"id": ["OPENAI_API_KEY"]' in text
    options: dict[str, Any] = {
        "valid_namespaces": ["quire"],
        "secrets_map": {"OPENAI_API_KEY": "k"},
        "additional_import_mappings": None,
    }
    from inspect import signature

    if "allowed_objects" in signature(loads).parameters:
        options["allowed_objects"] = [VLLMOpenAI]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loads calls itself beta
        read = loads(text, **options)
    for copied in (read, pickle.loads(pickle.dumps(llm)), copy.deepcopy(llm)):
        remote.requests.clear()
        assert copied.invoke("p") == expected
        assert remote.requests[0].headers["authorization"] == "Bearer k"
        assert copied._identifying_params == llm._identifying_params


def test_runnables(remote: FakeOpenAI) -> None:
    """Chains, `with_config`, `with_retry`, configurable fields and alternatives."""
    llm = make(remote).configurable_fields(
        temperature=ConfigurableField(id="t"),
        model_name=ConfigurableField(id="model"),
        openai_api_base=ConfigurableField(id="url"),
    )
    chain = PromptTemplate.from_template("<{x}>") | llm | StrOutputParser()
    assert chain.batch([{"x": 1}, {"x": 2}])[1].startswith("<2>|")
    configured = chain.with_config(configurable={"t": 0.125, "model": "o"})
    assert configured.invoke({"x": 1}).startswith("<1>|")
    assert (remote.bodies[-1]["temperature"], remote.bodies[-1]["model"]) == (0.125, "o")
    other = chain.with_config(configurable={"url": "http://127.0.0.1:1/v1"})
    with pytest.raises(openai.APIConnectionError):
        other.invoke({"x": 1})
    fallback = make(remote, model="x").with_fallbacks(
        [make(remote)], exceptions_to_handle=(openai.NotFoundError,)
    )
    assert fallback.invoke("p").startswith("p|")
    assert "".join(chain.stream({"x": 3})).startswith("<3>|")


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the client the error says what to install."""
    from quire.integrations.langchain import connection

    monkeypatch.setattr(connection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'quire\[openai\]'"):
        VLLMOpenAI(model="m")


def test_imports_are_thin() -> None:
    """The package imports nothing, the class neither torch nor the engine nor the client, which
    comes with the first object; that imports neither of the others, and no chat model."""
    code = """if True:
        import sys
        heavy = ("torch", "transformers", "quire.llm", "quire.engine", "quire.assembly", "openai")
        import quire.integrations.langchain as package
        print([name for name in (*heavy, "langchain_core") if name in sys.modules])
        package.VLLMOpenAI
        print([name for name in heavy if name in sys.modules])
        package.VLLMOpenAI(model="m").client
        print([name for name in heavy if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines() == ["[]", "[]", "['openai']"]


def test_a_missing_langchain_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name of the package asks for langchain-core where it is missing."""
    import quire.integrations.langchain as package

    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "langchain_core":
            raise ModuleNotFoundError("none", name="langchain_core")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in package.__all__:
        with pytest.raises(ImportError, match=r"pip install 'quire\[langchain\]'"):
            package.__getattr__(name)
