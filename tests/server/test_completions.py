"""``/v1/completions``: what is served is what the engine says in this process."""

from __future__ import annotations

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sse import events_of

from quire import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Seven plus two is", "Once upon a time, a little dog"]


async def complete(http: httpx.AsyncClient, **body) -> dict:
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_served_text_and_ids_are_the_engines(http: httpx.AsyncClient, demo_llm: LLM) -> None:
    """Greedy text, tokens, reasons and counts are those of LLM.generate on the same prompts."""
    expected = demo_llm.generate(
        PROMPTS, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False
    )
    answer = await complete(
        http, prompt=PROMPTS, temperature=0, max_tokens=12, return_token_ids=True
    )
    assert answer["model"] == "quire/demo"
    assert [c["text"] for c in answer["choices"]] == [o.outputs[0].text for o in expected]
    assert [c["token_ids"] for c in answer["choices"]] == [o.outputs[0].token_ids for o in expected]
    assert [c["prompt_token_ids"] for c in answer["choices"]] == [
        o.prompt_token_ids for o in expected
    ]
    assert [c["finish_reason"] for c in answer["choices"]] == [
        o.outputs[0].finish_reason for o in expected
    ]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == sum(len(o.prompt_token_ids) for o in expected)
    assert usage["completion_tokens"] == sum(len(o.outputs[0].token_ids) for o in expected)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0


@pytest.mark.parametrize("kind", ["text", "ids", "texts", "id lists", "mixed"])
async def test_a_prompt_may_be_written_in_each_way(
    http: httpx.AsyncClient, demo_llm: LLM, kind: str
) -> None:
    """Text, ids and lists of either give the same completions."""
    ids = [demo_llm.get_tokenizer().encode(prompt) for prompt in PROMPTS[:2]]
    prompt = {
        "text": PROMPTS[0],
        "ids": ids[0],
        "texts": PROMPTS[:2],
        "id lists": ids,
        "mixed": [PROMPTS[0], ids[1]],
    }[kind]
    answer = await complete(http, prompt=prompt, temperature=0, max_tokens=6)
    expected = demo_llm.generate(
        PROMPTS[:2], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False
    )
    texts = [o.outputs[0].text for o in expected]
    assert [c["text"] for c in answer["choices"]] == texts[: len(answer["choices"])]
    assert len(answer["choices"]) == (1 if kind in ("text", "ids") else 2)


async def test_choices_stand_in_order_of_prompts_then_samples(
    http: httpx.AsyncClient, demo_llm: LLM
) -> None:
    """Choice ``i * n + k`` is sample k of prompt i."""
    answer = await complete(http, prompt=PROMPTS, n=2, seed=5, temperature=1, max_tokens=5)
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    params = SamplingParams(n=2, seed=5, temperature=1, max_tokens=5)
    expected = demo_llm.generate(PROMPTS, params, use_tqdm=False)
    assert [c["text"] for c in answer["choices"]] == [c.text for o in expected for c in o.outputs]


async def test_best_of_and_beams_return_the_likeliest(
    http: httpx.AsyncClient, demo_llm: LLM
) -> None:
    """``best_of`` and ``use_beam_search`` are the engine's."""
    for fields in (
        {"n": 1, "best_of": 3, "seed": 3, "temperature": 1.0},
        {"n": 2, "use_beam_search": True, "length_penalty": 0.5},
    ):
        answer = await complete(http, prompt=PROMPTS[0], max_tokens=6, **fields)
        [expected] = demo_llm.generate(
            PROMPTS[0], SamplingParams(max_tokens=6, **fields), use_tqdm=False
        )
        assert [c["text"] for c in answer["choices"]] == [c.text for c in expected.outputs]


async def test_logprobs_are_the_engines(http: httpx.AsyncClient, demo_llm: LLM) -> None:
    """Log-probabilities and the likeliest tokens are those of LLM.generate."""
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3)
    [expected] = demo_llm.generate(PROMPTS[0], params, use_tqdm=False)
    answer = await complete(http, prompt=PROMPTS[0], temperature=0, max_tokens=8, logprobs=3)
    lists = answer["choices"][0]["logprobs"]
    output = expected.outputs[0]
    assert len(lists["tokens"]) == len(output.token_ids)
    for token_id, entry, token, value, top in zip(
        output.token_ids,
        output.logprobs,
        lists["tokens"],
        lists["token_logprobs"],
        lists["top_logprobs"],
        strict=True,
    ):
        assert token == entry[token_id].decoded_token
        assert value == pytest.approx(entry[token_id].logprob, abs=1e-4)
        best = {e.decoded_token: e.logprob for e in entry.values()}
        assert top == pytest.approx(best, abs=1e-4)
        assert list(top.values()) == sorted(top.values(), reverse=True)


@settings(max_examples=25)
@given(
    prompt=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    stop=st.sampled_from([None, ".", " the"]),
)
async def test_offsets_are_where_tokens_stand(demo_app, prompt: str, stop: str | None) -> None:
    """text_offset never goes back, stays within the text, and is 0 where an echo begins."""
    transport = httpx.ASGITransport(demo_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        answer = await complete(
            http, prompt=prompt, stop=stop, echo=True, logprobs=0, max_tokens=6, seed=1
        )
    [choice] = answer["choices"]
    assert choice["text"].startswith(prompt)
    lists = choice["logprobs"]
    offsets = lists["text_offset"]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(choice["text"])
    assert lists["token_logprobs"][0] is None
    assert lists["top_logprobs"][0] is None
    assert all(value is not None for value in lists["token_logprobs"][1:])
    for token, begin, end in zip(lists["tokens"], offsets, offsets[1:], strict=False):
        if "\ufffd" not in token and not token.startswith("<|"):
            # What is left of a character shows with the token that does not go on with it.
            assert choice["text"][begin:end].lstrip("\ufffd") in (token, "")


async def test_an_echo_has_the_prompts_logprobs(http: httpx.AsyncClient, demo_llm: LLM) -> None:
    """``echo`` with max_tokens=0 scores a text: what evaluations measure."""
    text = "The capital of France is Paris."
    [expected] = demo_llm.generate(
        text, SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False
    )
    answer = await complete(http, prompt=text, echo=True, logprobs=1, max_tokens=0)
    [choice] = answer["choices"]
    assert choice["text"] == text
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    ids = expected.prompt_token_ids
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
        [entry[i].logprob for i, entry in zip(ids[1:], expected.prompt_logprobs[1:], strict=True)],
        abs=1e-4,
    )
    assert "".join(choice["logprobs"]["tokens"]) == text


async def test_prompt_logprobs_have_vllms_shape(http: httpx.AsyncClient) -> None:
    """``prompt_logprobs`` maps token ids, as text, to what is known of them."""
    answer = await complete(http, prompt="The capital of", prompt_logprobs=1, max_tokens=1)
    first, *rest = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    for entry in rest:
        assert 1 <= len(entry) <= 2
        assert all(key.isdigit() for key in entry)
        for value in entry.values():
            assert set(value) == {"logprob", "rank", "decoded_token"}


async def test_tokens_may_be_named_by_their_ids(http: httpx.AsyncClient) -> None:
    """``return_tokens_as_token_ids`` tells tokens apart that look the same."""
    answer = await complete(
        http,
        prompt="The",
        max_tokens=3,
        logprobs=1,
        return_tokens_as_token_ids=True,
        return_token_ids=True,
    )
    [choice] = answer["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["."]},
        {"stop": " is", "include_stop_str_in_output": True},
        {"min_tokens": 6, "ignore_eos": True, "max_tokens": 8},
        {"bad_words": [" Paris"]},
        {"logit_bias": {"100": 50.0}},
        {"allowed_token_ids": [100, 200, 300]},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 7},
        {"truncate_prompt_tokens": 2},
        {"skip_special_tokens": False},
        {"structured_outputs": {"regex": "[a-z]{3}"}},
        {"structured_outputs": {"choice": ["red", "blue"]}},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_every_parameter_reaches_the_engine(
    http: httpx.AsyncClient, demo_llm: LLM, fields: dict
) -> None:
    """A field of a request does what the same parameter does in this process."""
    fields = {"temperature": 0, "max_tokens": 10, **fields}
    answer = await complete(http, prompt=PROMPTS[0], **fields)
    [expected] = demo_llm.generate(PROMPTS[0], SamplingParams(**fields), use_tqdm=False)
    [choice] = answer["choices"]
    assert choice["text"] == expected.outputs[0].text
    assert choice["finish_reason"] == expected.outputs[0].finish_reason
    assert choice["stop_reason"] == expected.outputs[0].stop_reason


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "[0-9]{3}"},
        {"guided_choice": ["red", "blue"]},
        {"guided_json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        {"guided_grammar": 'start: "x" | "y"'},
        {"response_format": {"type": "regex", "regex": "[0-9]{3}"}},
        {"response_format": {"type": "choice", "choice": ["red", "blue"]}},
        {"response_format": {"type": "grammar", "grammar": 'start: "x" | "y"'}},
    ],
    ids=lambda fields: str(fields)[:40],
)
async def test_other_spellings_of_structures_are_the_same(
    http: httpx.AsyncClient, fields: dict
) -> None:
    """vLLM's older fields and ``response_format`` say what ``structured_outputs`` say."""
    [(name, value)] = fields.items()
    kind = value["type"] if name == "response_format" else name.removeprefix("guided_")
    value = value[kind] if name == "response_format" else value
    common = {"prompt": "Say", "temperature": 0, "max_tokens": 12}
    one = await complete(http, **common, **fields)
    other = await complete(http, **common, structured_outputs={kind: value})
    assert one["choices"][0]["text"] == other["choices"][0]["text"]


async def test_max_tokens_is_16_unless_the_model_says_otherwise(http: httpx.AsyncClient) -> None:
    """What OpenAI's API generates by default is generated here."""
    answer = await complete(http, prompt="One", temperature=0, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16


async def test_streams_of_prompts_and_samples_interleave(http: httpx.AsyncClient) -> None:
    """Joined by index, what is streamed is what is answered in one piece; usage comes last."""
    body = {"prompt": PROMPTS, "n": 2, "seed": 3, "max_tokens": 8, "logprobs": 1}
    whole = await complete(http, **body)
    answer = await http.post(
        "/v1/completions",
        json={**body, "stream": True, "stream_options": {"include_usage": True}},
    )
    *chunks, last = events_of(answer.text)
    assert last["choices"] == []
    assert {k: last["usage"][k] for k in ("prompt_tokens", "completion_tokens")} == {
        k: whole["usage"][k] for k in ("prompt_tokens", "completion_tokens")
    }
    for expected in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == expected["index"]]
        assert "".join(c["text"] for c in own) == expected["text"]
        assert [c["finish_reason"] for c in own][-1] == expected["finish_reason"]
        assert all(c["finish_reason"] is None for c in own[:-1])
        for name in ("tokens", "text_offset"):
            joined = [item for c in own for item in c["logprobs"][name]]
            assert joined == expected["logprobs"][name]
    assert len({c["id"] for c in chunks}) == 1
    order = [c["choices"][0]["index"] for c in chunks]
    assert order != sorted(order), "one after the other"


async def test_an_echo_is_streamed_once(http: httpx.AsyncClient) -> None:
    """The prompt comes before the first piece of each choice."""
    body = {"prompt": PROMPTS[:2], "n": 2, "seed": 3, "max_tokens": 4, "echo": True}
    whole = await complete(http, **body)
    answer = await http.post("/v1/completions", json={**body, "stream": True})
    texts = ["", "", "", ""]
    for chunk in events_of(answer.text):
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [c["text"] for c in whole["choices"]]


async def test_usage_is_streamed_with_every_chunk_if_asked_for(http: httpx.AsyncClient) -> None:
    """``continuous_usage_stats`` counts up to what the request used."""
    answer = await http.post(
        "/v1/completions",
        json={
            "prompt": "One",
            "max_tokens": 5,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    )
    counts = [event["usage"]["completion_tokens"] for event in events_of(answer.text)]
    assert counts == sorted(counts)
    assert counts[-1] == 5


async def test_openais_client_reads_answers(client: openai.AsyncOpenAI, demo_llm: LLM) -> None:
    """The official client gets typed completions, whole and streamed."""
    common = {"model": "demo", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 8}
    answer = await client.completions.create(**common, logprobs=1)
    [expected] = demo_llm.generate(
        PROMPTS[0], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False
    )
    assert answer.choices[0].text == expected.outputs[0].text
    assert answer.choices[0].logprobs.tokens
    assert answer.model == "demo"
    text = ""
    async for chunk in await client.completions.create(**common, stream=True):
        text += chunk.choices[0].text
    assert text == expected.outputs[0].text


def test_openais_client_talks_to_a_real_process(served) -> None:
    """The seed example's request, against ``quire serve`` itself."""
    with openai.OpenAI(api_key="EMPTY", base_url=f"{served.url}/v1") as client:
        answer = client.completions.create(
            model="quire/demo", prompt="Rome is", stop=["."], max_tokens=20, temperature=0
        )
        assert answer.choices[0].text
        assert "." not in answer.choices[0].text
        stream = client.completions.create(
            model="quire/demo",
            prompt="Rome is",
            stop=["."],
            max_tokens=20,
            temperature=0,
            stream=True,
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
