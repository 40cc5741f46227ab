"""``/tokenize`` and ``/detokenize``: the model's tokenizer, over HTTP."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import LLM


@settings(max_examples=30)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
async def test_text_comes_back(demo_app, demo_llm: LLM, text: str) -> None:
    """The tokens of a text are the tokenizer's, and make the text again."""
    transport = httpx.ASGITransport(demo_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        answer = (await http.post("/tokenize", json={"prompt": text})).json()
        back = await http.post("/detokenize", json={"tokens": answer["tokens"]})
    assert answer["tokens"] == demo_llm.get_tokenizer().encode(text)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 2048
    assert answer["token_strs"] is None
    assert back.json()["prompt"] == text


async def test_a_conversation_is_the_prompt_that_a_chat_has(http: httpx.AsyncClient) -> None:
    """The chat form counts what ``/v1/chat/completions`` reads."""
    messages = [{"role": "user", "content": "Hello"}]
    for fields in ({}, {"add_generation_prompt": False}, {"continue_final_message": True}):
        counted = await http.post("/tokenize", json={"messages": messages, **fields})
        answer = await http.post(
            "/v1/chat/completions",
            json={"messages": messages, "max_tokens": 1, "return_token_ids": True, **fields},
        )
        assert counted.json()["tokens"] == answer.json()["prompt_token_ids"], fields


async def test_tokens_are_spelled_if_asked_for(http: httpx.AsyncClient, demo_llm: LLM) -> None:
    """``return_token_strs`` gives the vocabulary's spellings."""
    answer = await http.post("/tokenize", json={"prompt": "A red cat", "return_token_strs": True})
    found = answer.json()
    tokenizer = demo_llm.get_tokenizer()
    assert found["token_strs"] == tokenizer.convert_ids_to_tokens(found["tokens"])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, 10**30]}, "tokens[1]"),
    ],
)
async def test_what_is_wrong_is_named(
    http: httpx.AsyncClient, path: str, body: dict, param: str
) -> None:
    """An error says which field it is about."""
    answer = await http.post(path, json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
