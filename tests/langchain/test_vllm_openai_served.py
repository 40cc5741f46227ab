"""VLLMOpenAI on ``quire serve``: what the in-process model answers, over HTTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.prompts import PromptTemplate

pytest.importorskip("quire.server", reason="this version has no server")

from quire.errors import InvalidRequestError, ModelNotFoundError
from quire.integrations.langchain import VLLM, VLLMOpenAI

PROMPTS = [f"What is the capital of {country} ?" for country in ("France", "Italy", "Japan")]


@pytest.fixture(scope="module")
def local() -> Iterator[VLLM]:
    """Return the same model in this process."""
    with VLLM(model="quire/demo", temperature=0, max_new_tokens=16) as llm:
        yield llm


@pytest.fixture
def remote(served: Any) -> VLLMOpenAI:
    """Return the model on the server."""
    return VLLMOpenAI(
        model="quire/demo",
        openai_api_base=f"{served.url}/v1",
        openai_api_key=served.api_key,
        temperature=0,
        max_tokens=16,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stop": ["is"]},
        {"stop": ["is"], "include_stop_str_in_output": True},
        {"repetition_penalty": 1.5, "bad_words": ["Paris"]},
        {"min_tokens": 12},
        {"ignore_eos": True, "skip_special_tokens": False},
        {"truncate_prompt_tokens": 3},
        {"allowed_token_ids": [265, 291, 297]},
        {"logit_bias": {265: 100.0}},
        {"structured_outputs": {"choice": ["Rome", "Madrid"]}},
        {"structured_outputs": {"regex": "[A-Z]{3}"}},
        {"frequency_penalty": 2.0, "presence_penalty": 1.0},
    ],
    ids=lambda arguments: "+".join(arguments) or "plain",
)
def test_answers_are_those_of_the_engine(
    local: VLLM, remote: VLLMOpenAI, arguments: dict[str, Any]
) -> None:
    """Greedy texts are the in-process model's for every parameter: each of them arrives."""
    expected = local.batch(PROMPTS, **arguments)
    assert remote.batch(PROMPTS, **arguments) == expected
    assert "".join(remote.stream(PROMPTS[0], **arguments)) == expected[0]


def test_generation_info(local: VLLM, remote: VLLMOpenAI) -> None:
    """Why it ended, the tokens used and the logprobs are the in-process model's."""
    [[here]] = local.generate(PROMPTS[:1], logprobs=2).generations
    result = remote.generate(PROMPTS[:1], logprobs=2)
    [[there]] = result.generations
    assert here.generation_info is not None
    assert there.generation_info is not None
    assert there.text == here.text
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        count = here.generation_info["token_usage"][name]
        assert there.generation_info["token_usage"][name] == count
        assert (result.llm_output or {})["token_usage"][name] == count
    assert there.generation_info["finish_reason"] == here.generation_info["finish_reason"]
    shown, given = there.generation_info["logprobs"], here.generation_info["logprobs"]
    assert shown["tokens"] == given["tokens"]
    assert shown["token_logprobs"] == pytest.approx(given["token_logprobs"], abs=1e-2)


def test_samples(remote: VLLMOpenAI) -> None:
    """A seed repeats; several completions come back, and the best of several."""
    drawn = {"temperature": 1.5, "seed": 7}
    assert remote.invoke("Once", **drawn) == remote.invoke("Once", **drawn)
    result = remote.generate(["Once", "Then"], temperature=1.5, n=3)
    assert [len(of_prompt) for of_prompt in result.generations] == [3, 3]
    assert len(remote.generate(["Once"], temperature=1.5, best_of=3).generations[0]) == 1


def test_streams_tell_usage(remote: VLLMOpenAI) -> None:
    """A stream's pieces add up to the text, and its run ends with the usage."""
    ends: list[LLMResult] = []

    class Ends(BaseCallbackHandler):
        def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
            ends.append(response)

    text = "".join(remote.stream(PROMPTS[0], config={"callbacks": [Ends()]}))
    [[whole]] = ends[0].generations
    assert whole.text == text == remote.invoke(PROMPTS[0])
    assert whole.generation_info is not None
    assert whole.generation_info["token_usage"]["completion_tokens"] > 3
    assert whole.generation_info["finish_reason"] == "stop"


async def test_asynchronous_twins(remote: VLLMOpenAI) -> None:
    """They answer alike, many at once."""
    expected = await asyncio.to_thread(remote.batch, PROMPTS)
    assert await remote.abatch(PROMPTS * 5) == expected * 5
    assert await asyncio.gather(*map(remote.ainvoke, PROMPTS)) == expected
    assert "".join([piece async for piece in remote.astream(PROMPTS[0])]) == expected[0]


def test_tokens_and_room(local: VLLM, remote: VLLMOpenAI) -> None:
    """Tokens are counted as the engine does, and -1 leaves all the room there is."""
    for prompt in (*PROMPTS, "", "ö"):
        assert remote.get_token_ids(prompt) == local.get_token_ids(prompt)
    used = len(local.get_token_ids(PROMPTS[0]))
    assert remote.max_tokens_for_prompt(PROMPTS[0]) == remote.max_context_size - used
    assert remote.invoke(PROMPTS[0], max_tokens=-1) == remote.invoke(PROMPTS[0])


def test_errors(remote: VLLMOpenAI) -> None:
    """What the server refuses says why; a prompt that is refused fails alone."""
    with pytest.raises(ModelNotFoundError, match="has no model 'x'; it has 'quire/demo'"):
        remote.invoke("p", model="x")
    with pytest.raises(openai.BadRequestError, match="suffix"):
        remote.invoke("p", suffix="s")
    too_long = "word " * 3000
    with pytest.raises(InvalidRequestError, match=r"tokens.*shorten the prompt"):
        remote.invoke(too_long)
    answers: list[Any] = remote.batch([PROMPTS[0], too_long, PROMPTS[1]], return_exceptions=True)
    assert [isinstance(answer, InvalidRequestError) for answer in answers] == [False, True, False]


def test_a_chain(remote: VLLMOpenAI) -> None:
    """The model stands in a chain like any other."""
    prompt = PromptTemplate.from_template("What is the capital of {x} ?")
    chain = prompt | remote.bind(stop=["."]) | StrOutputParser()
    assert chain.invoke({"x": "Spain"}).endswith("Madrid")
    assert "Paris" in "".join(chain.stream({"x": "France"}))


def test_the_readmes_example(
    served: Any, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the adapter's README shows of a server runs on one."""
    folder = repo_root / "integrations" / "langchain"
    texts = [path.read_text() for path in sorted(folder.glob("README*.md"))]
    blocks = [b for text in texts for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    [example] = [block for block in blocks if "http://localhost:8000" in block]
    exec(example.replace("http://localhost:8000", served.url), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.strip()
    assert second in ("yes", "no")
