"""LoRA adapters of chat models and of embeddings in LangChain."""

from __future__ import annotations

import asyncio
import pickle
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from adapters import write_adapter
from langchain_core.caches import InMemoryCache
from langchain_core.messages import HumanMessage
from pydantic import BaseModel

from quire import AdapterError, LoRARequest, PoolingParams, SamplingParams
from quire.errors import ConfigError, InvalidRequestError
from quire.integrations.langchain import VLLM, ChatVLLM, VLLMEmbeddings

QUESTIONS = ["the quick brown fox", "hello world", "What is the capital"]
QUESTION = QUESTIONS[0]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters by name."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(root / name, tiny_llama, seed=seed)
        for seed, name in enumerate(["one", "two"])
    }


@pytest.fixture(scope="module")
def arguments(tiny_llama: Path) -> dict[str, Any]:
    lora = {"enable_lora": True, "block_size": 4, "max_num_seqs": 16}
    return {"model": str(tiny_llama), "dtype": "float32", "vllm_kwargs": lora}


@pytest.fixture(scope="module")
def chat(arguments: dict[str, Any], folders: dict[str, Path]) -> Iterator[ChatVLLM]:
    with ChatVLLM(**arguments, temperature=0.0, max_tokens=8) as chat:
        chat.client.load_lora(folders["two"], "registered")
        yield chat


@pytest.fixture(scope="module")
def expected(chat: ChatVLLM, folders: dict[str, Path]) -> dict[str, list[str]]:
    """What the engine itself answers, by adapter."""
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    found = {}
    for name, adapter in {
        "base": None,
        **{name: LoRARequest(name, 1, path) for name, path in folders.items()},
    }.items():
        outputs = chat.client.chat(conversations, GREEDY, use_tqdm=False, lora_request=adapter)
        found[name] = [output.outputs[0].text for output in outputs]
    assert len({text for texts in found.values() for text in texts}) == 9
    return found


def contents(messages: Any) -> list[str]:
    return [message.content for message in messages]


async def every_answer(model: Any, **kwargs: Any) -> set[str]:
    """Return what a chat model answers by each of its methods."""
    return {
        model.invoke(QUESTION, **kwargs).content,
        *contents(model.batch([QUESTION, QUESTION], **kwargs)),
        "".join(contents(model.stream(QUESTION, **kwargs))),
        (await model.ainvoke(QUESTION, **kwargs)).content,
        *contents(await model.abatch([QUESTION, QUESTION], **kwargs)),
        "".join([chunk.content async for chunk in model.astream(QUESTION, **kwargs)]),
    }


async def test_chats_run_with_the_adapter_that_was_named(
    chat: ChatVLLM,
    arguments: dict[str, Any],
    folders: dict[str, Path],
    expected: dict[str, list[str]],
) -> None:
    """By constructor, copy, call and bind, in whole, in batches and in streams."""
    answer = {expected["two"][0]}
    for adapter in (LoRARequest("two", 2, folders["two"]), "registered"):
        made = ChatVLLM(**arguments, temperature=0.0, max_tokens=8, lora_request=adapter)
        assert made.client is chat.client
        assert await every_answer(made) == answer
        assert await every_answer(chat, lora_request=adapter) == answer
        assert await every_answer(chat.bind(lora_request=adapter)) == answer
        assert await every_answer(pickle.loads(pickle.dumps(made))) == answer
        assert await every_answer(made, lora_request=None) == {expected["base"][0]}
    own = chat.with_lora(folders["two"])
    assert await every_answer(own) == answer
    assert await every_answer(own.with_lora(None)) == {expected["base"][0]}
    whole = own.generate([[HumanMessage(question)] for question in QUESTIONS])
    assert [of_one[0].text for of_one in whole.generations] == expected["two"]
    drawn = {"best_of": 2, "n": 1, "seed": 3, "temperature": 1.0}
    for kwargs in ({"use_beam_search": True, "n": 2}, drawn):
        [whole_answer] = await every_answer(own, **kwargs)
        assert await every_answer(chat, **kwargs) != {whole_answer}


@pytest.mark.parametrize("by_call", [True, False])
@pytest.mark.parametrize("door", ["ainvoke", "astream", "abatch"])
async def test_an_adapter_is_read_beside_the_event_loop(
    chat: ChatVLLM,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    door: str,
    by_call: bool,
) -> None:
    """Also where LangChain asks for the model's parameters as the call begins."""
    folder = write_adapter(tmp_path / door, tiny_llama, seed=9)
    model, kwargs = chat.with_lora(folder), {}
    if by_call:
        model, kwargs = chat, {"lora_request": LoRARequest("new", 1, folder)}
    store = chat.client.llm_engine.adapters
    find, threads = store._find, []

    def watched(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return find(*args, **options)

    monkeypatch.setattr(store, "_find", watched)
    if door == "astream":
        assert [chunk async for chunk in model.astream(QUESTION, **kwargs)]
    elif door == "ainvoke":
        assert await model.ainvoke(QUESTION, **kwargs)
    else:
        assert await model.abatch([QUESTION, QUESTION], **kwargs)
    assert threads
    assert threading.current_thread() not in threads


async def test_chats_of_several_adapters_share_the_engine(
    chat: ChatVLLM, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    """Batches of models with several adapters, and of a text model, run at once."""
    models = {name: chat.with_lora(path) for name, path in folders.items()}
    models["base"] = chat
    text = VLLM(client=chat.client, temperature=0.0, max_tokens=8).with_lora(folders["one"])
    alone = text.batch(QUESTIONS)
    *answers, texts = await asyncio.gather(
        *(model.abatch(QUESTIONS) for model in models.values()), text.abatch(QUESTIONS)
    )
    assert {n: contents(a) for n, a in zip(models, answers, strict=True)} == expected
    assert texts == alone
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda model: contents(model.batch(QUESTIONS)), models.values())
    assert dict(zip(models, found, strict=True)) == expected
    for model in models.values():
        assert model.client is chat.client


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_cache_tells_adapters_of_chats_apart(
    chat: ChatVLLM,
    tiny_llama: Path,
    folders: dict[str, Path],
    tmp_path: Path,
    is_async: bool,
) -> None:
    """By their content: other folders, and one whose files were written anew, also between the
    look-up and the answer."""
    folder = write_adapter(tmp_path / "one", tiny_llama, seed=3)
    edited = LoRARequest("one", 1, folder)

    class Editing(InMemoryCache):
        written = True

        def lookup(self, prompt: str, llm_string: str) -> Any:
            found = super().lookup(prompt, llm_string)
            if not self.written:
                self.written = True
                write_adapter(folder, tiny_llama, seed=4)
            return found

    cache = Editing()
    cached = chat.model_copy(update={"cache": cache})
    plain = chat.model_copy(update={"cache": False})

    async def ask(adapter: Any) -> str:
        if is_async:
            return str((await cached.ainvoke(QUESTION, lora_request=adapter)).content)
        return str(cached.invoke(QUESTION, lora_request=adapter).content)

    adapters: list[Any] = [None, "registered", LoRARequest("one", 1, folders["one"]), edited]
    for _ in range(2):
        for adapter in adapters:
            assert await ask(adapter) == plain.invoke(QUESTION, lora_request=adapter).content
    cache.clear()
    old = plain.invoke(QUESTION, lora_request=edited).content
    cache.written = False
    assert await ask(edited) == old
    new = plain.invoke(QUESTION, lora_request=edited).content
    assert await ask(edited) == new != old
    write_adapter(folder, tiny_llama, seed=3)
    assert await ask(edited) == old


def test_structured_answers_of_an_adapter_match_their_schema(
    chat: ChatVLLM, folders: dict[str, Path]
) -> None:
    """Schemas and required tools hold whatever an adapter would say."""

    class Weather(BaseModel):
        sky: Literal["sunny", "cloudy"]
        degrees: Literal[10, 20, 30]

    for path in folders.values():
        for seed in range(3):
            values = {"temperature": 1.0, "seed": seed, "max_tokens": 128}
            own = chat.with_lora(path).model_copy(update=values)
            assert isinstance(own.with_structured_output(Weather).invoke(QUESTION), Weather)
            text = own.invoke(QUESTION, structured_outputs={"regex": "[ab]{3}"}).content
            assert re.fullmatch("[ab]{3}", str(text))
            [call] = own.bind_tools([Weather], tool_choice="any").invoke(QUESTION).tool_calls
            assert Weather(**call["args"])


async def test_vectors_are_the_adapters(
    chat: ChatVLLM, arguments: dict[str, Any], folders: dict[str, Path]
) -> None:
    """Documents and queries are LLM.embed with the adapter, which changes them."""
    base = VLLMEmbeddings(**arguments, pooling="mean")
    assert base.client is chat.client
    pooling = PoolingParams(pooling="mean")
    seen = []
    for name, path in folders.items():
        adapter = LoRARequest(name, 1, path)
        outputs = base.client.embed(QUESTIONS, pooling, use_tqdm=False, lora_request=adapter)
        vectors = [output.outputs.embedding for output in outputs]
        made = VLLMEmbeddings(**arguments, pooling="mean", lora_request=adapter)
        for own in (base.with_lora(path), made, pickle.loads(pickle.dumps(made))):
            assert own.client is chat.client
            assert near(own.embed_documents(QUESTIONS), vectors)
            assert near(await own.aembed_documents(QUESTIONS), vectors)
            assert near(
                [own.embed_query(QUESTION), await own.aembed_query(QUESTION)], vectors[:1] * 2
            )
        seen.append(vectors)
    seen.append(base.with_lora(folders["one"]).with_lora(None).embed_documents(QUESTIONS))
    assert near(seen[-1], base.embed_documents(QUESTIONS))
    assert not near(seen[0], seen[1])
    assert not near(seen[0], seen[2])
    registered = VLLMEmbeddings(client=chat.client, pooling="mean", lora_request="registered")
    assert near(registered.embed_documents(QUESTIONS), seen[1])


def near(left: list[list[float]], right: list[list[float]]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(abs(a - b) < 1e-4 for x, y in pairs for a, b in zip(x, y, strict=True))


def test_what_is_no_adapter_is_refused(chat: ChatVLLM, tiny_llama: Path, tmp_path: Path) -> None:
    """By name, where it is given; an engine without adapters says what to do."""
    with pytest.raises(InvalidRequestError, match="lora_request must be"):
        chat.invoke(QUESTION, lora_request=7)
    with pytest.raises(AdapterError, match="'nobody'"):
        chat.invoke(QUESTION, lora_request="nobody")
    with pytest.raises(AdapterError, match="missing"):
        chat.with_lora(tmp_path / "missing")
    answers: list[Any] = chat.batch(QUESTIONS, return_exceptions=True, lora_request="nobody")
    assert all(isinstance(answer, AdapterError) for answer in answers)
    embeddings = VLLMEmbeddings(client=chat.client, lora_request="nobody")
    with pytest.raises(AdapterError, match="'nobody'"):
        embeddings.embed_query(QUESTION)
    with pytest.raises(InvalidRequestError, match="lora_request must be"):
        VLLMEmbeddings(client=chat.client, lora_request=7)
    for kind in (ChatVLLM, VLLMEmbeddings):
        with pytest.raises(ConfigError, match="'enable_lora': True"):
            kind(model=str(tiny_llama), lora_request="one")
