"""What becomes of fields: honoured, passed, named as unknown, or refused by name."""

from __future__ import annotations

import json
import logging
import threading

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import LLM
from quire.async_llm import AsyncLLM
from quire.engine.processor import Processor
from quire.server import errors
from quire.server.app import build_app
from quire.server.body import UNKNOWN_HEADER, load_object
from quire.server.errors import ApiError
from quire.server.service import Service
from quire.server.settings import ServerSettings

HELLO = [{"role": "user", "content": "Hello"}]
BODIES = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 1},
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 1},
}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**40}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"seed": "x"}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": [1, "a"]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "much"}}, "logit_bias.5"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt_logprobs": 10**6}, "prompt_logprobs"),
        ({"priority": 3}, "priority"),
        ({"request_id": ""}, "request_id"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"use_beam_search": True, "n": 2, "temperature": 1}, "temperature"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"logits_processors": ["os.system"]}, "logits_processors"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "regex"}}, "response_format.regex"),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_decoding_backend": "magic", "guided_regex": "a"}, "guided_regex"),
        ({"model": "nobody"}, "model"),
        ({"model": 3}, "model"),
    ],
    ids=lambda value: str(value)[:50],
)
@pytest.mark.parametrize("path", BODIES)
async def test_what_cannot_be_honoured_is_refused_by_name(
    http: httpx.AsyncClient, path: str, fields: dict, param: str
) -> None:
    """The status is 400, and ``param`` is the path of the field; nothing is guessed."""
    answer = await http.post(path, json={**BODIES[path], **fields})
    error = answer.json()["error"]
    assert answer.status_code == (404 if fields.get("model") == "nobody" else 400)
    assert error["param"] == param
    assert param.split(".")[0].split("[")[0] in error["message"] or "enforced" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "!"}, "suffix"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"] * 20_000}, "prompt"),
        ({"prompt": ["a"] * 200, "n": 200}, "prompt"),
        ({"prompt": "a " * 5000}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 10**6}, "logprobs"),
        ({"echo": "yes"}, "echo"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_completions_refuse_by_name(
    http: httpx.AsyncClient, fields: dict, param: str
) -> None:
    """The same for what only completions have."""
    answer = await http.post("/v1/completions", json={"prompt": "a", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
        ({"messages": None}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "user", "content": 3}]}, "messages[1].content"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "messages[0].content[0].type",
        ),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "browser"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": 3}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"documents": [{"text": "x"}]}, "documents"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"web_search_options": {"user_location": None}}, "web_search_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"chat_template": "{% if %}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_chats_refuse_by_name(http: httpx.AsyncClient, fields: dict, param: str) -> None:
    """The same for what only chats have; a part of a message is named by its path."""
    answer = await http.post("/v1/chat/completions", json={"messages": HELLO, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


async def test_a_prompt_that_is_too_long_has_openais_code(http: httpx.AsyncClient) -> None:
    """Clients look for ``context_length_exceeded``."""
    for path, field in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        long = "red " * 3000
        value = long if field == "prompt" else [{"role": "user", "content": long}]
        answer = await http.post(path, json={field: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert answer.json()["error"]["param"] == field


async def test_nothing_runs_when_one_of_several_prompts_is_wrong(
    http: httpx.AsyncClient, demo_llm: LLM
) -> None:
    """The error says which prompt it is, and the others are given up."""
    body = {"prompt": ["a", [1, 999999]], "max_tokens": 500, "ignore_eos": True}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "prompt 1 of 2" in answer.json()["error"]["message"]
    assert demo_llm.get_metrics()["num_unfinished_requests"] == 0


@pytest.mark.parametrize("path", BODIES)
async def test_fields_that_change_nothing_pass(http: httpx.AsyncClient, path: str) -> None:
    """What asks for nothing here is taken, and so is null for every field."""
    body = {**BODIES[path], "user": "me", "logits_processors": [], "kv_transfer_params": None}
    if "chat" in path:
        body |= {
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "prompt_cache_key": "k",
            "safety_identifier": "s",
            "verbosity": "low",
            "modalities": ["text"],
            "parallel_tool_calls": True,
            "tool_choice": "none",
            "tools": [],
        }
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert UNKNOWN_HEADER not in answer.headers
    document = (await http.get("/openapi.json")).json()
    name = "ChatRequest" if "chat" in path else "CompletionRequest"
    nulls = dict.fromkeys(document["components"]["schemas"][name]["properties"])
    answer = await http.post(path, json={**nulls, **BODIES[path]})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_unknown_fields_are_named(
    http: httpx.AsyncClient, path: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A header and the log say which fields were not known, nested ones and odd ones included."""
    odd = f"möglich\r\nx{path}{stream}"
    body = {**BODIES[path], "temprature": 1, odd: 2, "stream": stream}
    if stream:
        body["stream_options"] = {"includeUsage": True}
    with caplog.at_level(logging.WARNING, logger="quire"):
        answer = await http.post(path, json=body)
    assert answer.status_code == 200
    names = answer.headers[UNKNOWN_HEADER].split(", ")
    assert names[0] == "temprature"
    assert len(names) == 2 + stream
    if stream:
        assert names[-1] == "stream_options.includeUsage"
    assert "\\r\\n" in caplog.text


async def test_strict_fields_refuse_unknown_ones(demo_llm: LLM) -> None:
    """With ``strict_fields`` the nearest name is suggested."""
    settings = ServerSettings(served_model_names=("demo",), strict_fields=True)
    service = Service(AsyncLLM.from_llm(demo_llm), settings, demo_llm.get_tokenizer())
    transport = httpx.ASGITransport(build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        for path, body in BODIES.items():
            answer = await http.post(path, json={**body, "temprature": 1})
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["param"] == "temprature"
            assert "did you mean 'temperature'?" in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b"[1]",
        b"null",
        b'"text"',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "\\udc00": 1}',
        b"[" * 1000 + b"]" * 1000,
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 300 + b"1" + b"}" * 301,
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"9" * 4000 + b', "prompt": ' + b"8" * 4000 + b"}",
    ],
    ids=range(17),
)
@pytest.mark.parametrize("path", [*BODIES, "/tokenize", "/detokenize"])
async def test_bodies_that_are_not_json_are_refused(
    http: httpx.AsyncClient, path: str, content: bytes
) -> None:
    """Whatever the bytes are, the answer is 400 in OpenAI's shape."""
    answer = await http.post(path, content=content, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_body_has_to_say_that_it_is_json(http: httpx.AsyncClient) -> None:
    """A web page cannot post to the server behind its user's back."""
    content = json.dumps(BODIES["/v1/completions"])
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = await http.post("/v1/completions", content=content, headers={"content-type": kind})
        assert answer.status_code == 415
    for kind in ("application/json; charset=utf-8", "application/problem+json"):
        answer = await http.post("/v1/completions", content=content, headers={"content-type": kind})
        assert answer.status_code == 200


@given(
    content=st.binary(max_size=60)
    | st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass"))
)
def test_reading_a_body_raises_nothing_else(content: bytes) -> None:
    """Bytes are an object of JSON, or an ApiError of 400."""
    try:
        value = load_object(content)
    except ApiError as error:
        value = {"status": error.status}
    assert isinstance(value, dict)
    assert value.get("status", 400) == 400


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), JSON_VALUES, max_size=5))
def test_reading_a_body_gives_what_was_written(value: dict) -> None:
    """Any JSON object comes back as it is, whichever way it is escaped."""
    for ascii_only in (True, False):
        assert load_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


FIELDS = (
    "messages", "prompt", "tools", "tool_choice", "stop", "n", "seed", "stream", "logprobs",
    "top_logprobs", "response_format", "structured_outputs", "guided_json", "logit_bias", "model",
    "chat_template_kwargs", "stream_options", "modalities", "max_tokens", "bad_words",
    "truncate_prompt_tokens", "early_stopping", "structural_tag", "echo", "vllm_xargs",
)  # fmt: skip


@pytest.mark.parametrize("path", [*BODIES, "/tokenize", "/detokenize"])
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=2))
async def test_no_value_of_a_field_is_a_defect_of_the_server(
    demo_app, path: str, fields: dict
) -> None:
    """Whatever JSON stands in a field, the answer is a result or names what is wrong."""
    common = {"max_tokens": 1, "messages": HELLO, "prompt": "a"}
    if path == "/tokenize":
        del common["messages"]
    transport = httpx.ASGITransport(demo_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        answer = await http.post(path, json={**common, **fields})
    assert answer.status_code in (200, 400, 404), answer.text


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
async def test_clients_change_no_adapters_unless_they_may(http, path):
    """The answer names the flag, and says nothing of the path."""
    for where in ("somewhere", "/etc"):
        answer = await http.post(path, json={"lora_name": "mine", "lora_path": where})
        assert answer.status_code == 403
        error = answer.json()["error"]
        assert error["type"] == "permission_error"
        assert "--allow-runtime-lora-updating" in error["message"]
        assert where not in error["message"]


@pytest.mark.parametrize(
    ("path", "field", "wrong"),
    [
        ("/v1/embeddings", "input", [True] * 50_000),
        ("/v1/embeddings", "input", [[True]] * 50_000),
        ("/v1/embeddings", "input", 5),
        ("/v1/completions", "stop_token_ids", ["a"] * 50_000),
        ("/v1/completions", "bad_words", [1] * 50_000),
        ("/v1/completions", "logit_bias", dict.fromkeys(map(str, range(50_000)), "a")),
        ("/detokenize", "tokens", ["a"] * 50_000),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_body_of_wrong_items_costs_no_more_than_a_right_one(
    http: httpx.AsyncClient, monkeypatch, path: str, field: str, wrong: object
) -> None:
    """However many items of a field are wrong, one error is made, and names the field."""
    found = []
    original = errors._validation_error

    def count(error):
        found.append(len(error.errors()))
        return original(error)

    monkeypatch.setattr(errors, "_validation_error", count)
    body = {**BODIES.get(path, {}), field: wrong}
    answer = await http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].partition("[")[0].partition(".")[0] == field
    assert answer.json()["error"]["param"].count(".") <= (field == "logit_bias")
    assert sum(found) <= 1


async def test_many_bad_words_are_spelled_outside_of_the_event_loop(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes two calls of the tokenizer, in which no other request would be answered."""
    threads = set()
    original = Processor._spellings

    def spellings(self: Processor, word: str) -> list[list[int]]:
        threads.add(threading.get_ident())
        return original(self, word)

    monkeypatch.setattr(Processor, "_spellings", spellings)
    body = {"prompt": "a", "max_tokens": 1, "bad_words": [f"w{i}" for i in range(100)]}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert threads
    assert threading.get_ident() not in threads
