"""LoRA adapters in LangChain: however one is asked for, it is that one's text, and no other's."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from adapters import write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumps, loads
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField

from quire import AdapterError, LoRARequest, SamplingParams
from quire.config import EngineConfig
from quire.errors import ConfigError, EngineClosedError, InvalidRequestError
from quire.integrations.engines import engine_key
from quire.integrations.langchain import VLLM

PROMPTS = ["the quick brown fox", "hello world", "What is the capital"]
PROMPT = PROMPTS[0]
LORA: dict[str, Any] = {"enable_lora": True, "block_size": 4, "max_num_seqs": 16}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters by name, of different ranks."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "one": write_adapter(root / "one", tiny_llama, seed=1),
        "two": write_adapter(root / "two", tiny_llama, seed=2, rank=2),
    }


@pytest.fixture(scope="module")
def arguments(tiny_llama: Path) -> dict[str, Any]:
    return {"model": str(tiny_llama), "dtype": "float32", "vllm_kwargs": LORA}


@pytest.fixture(scope="module")
def llm(arguments: dict[str, Any], folders: dict[str, Path]) -> Iterator[VLLM]:
    with VLLM(**arguments, temperature=0.0, max_tokens=8) as llm:
        llm.client.load_lora(folders["two"], "registered")
        yield llm


@pytest.fixture(scope="module")
def expected(llm: VLLM, folders: dict[str, Path]) -> dict[str, list[str]]:
    """What the engine itself says for the prompts, by adapter; each something else."""
    wanted = {"base": None, **{name: LoRARequest(name, 1, path) for name, path in folders.items()}}
    found = {name: texts(llm, adapter) for name, adapter in wanted.items()}
    assert len({text for each in found.values() for text in each}) == 9
    return found


def texts(llm: VLLM, adapter: Any) -> list[str]:
    outputs = llm.client.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=adapter)
    return [output.outputs[0].text for output in outputs]


async def every_answer(model: Any, **kwargs: Any) -> list[str]:
    """Return what a model says to the prompt by each of its methods."""
    streamed = "".join(model.stream(PROMPT, **kwargs))
    astreamed = "".join([piece async for piece in model.astream(PROMPT, **kwargs)])
    failing = model.batch([PROMPT, ""], return_exceptions=True, **kwargs)
    afailing = await model.abatch(["", PROMPT], return_exceptions=True, **kwargs)
    assert isinstance(failing[1], InvalidRequestError)
    assert isinstance(afailing[0], InvalidRequestError)
    return [
        model.invoke(PROMPT, **kwargs),
        *model.batch([PROMPT, PROMPT], **kwargs),
        streamed,
        await model.ainvoke(PROMPT, **kwargs),
        *await model.abatch([PROMPT, PROMPT], **kwargs),
        astreamed,
        failing[0],
        afailing[1],
        (PromptTemplate.from_template("{x}") | model.bind(**kwargs) | StrOutputParser()).invoke(
            {"x": PROMPT}
        ),
    ]


@pytest.mark.parametrize("form", ["request", "dict", "other", "registered"])
async def test_every_way_of_asking_runs_with_the_adapter_that_was_named(
    llm: VLLM,
    arguments: dict[str, Any],
    folders: dict[str, Path],
    expected: dict[str, list[str]],
    form: str,
) -> None:
    """By constructor, copy, call and bind, in whole, in batches and in streams; and what was asked
    without is the base model's."""
    path = str(folders["two"])
    adapter: Any = {
        "request": LoRARequest("two", 2, path),
        "dict": {"lora_name": "two", "lora_path": path},
        "other": SimpleNamespace(lora_name="two", lora_int_id=7, lora_path=path),
        "registered": "registered",
    }[form]
    made = VLLM(**arguments, temperature=0.0, max_tokens=8, lora_request=adapter)
    assert made.client is llm.client
    answer = expected["two"][0]
    assert set(await every_answer(made)) == {answer}
    assert set(await every_answer(llm, lora_request=adapter)) == {answer}
    assert set(await every_answer(llm.bind(lora_request=adapter))) == {answer}
    changed = llm.model_copy(update={"lora_request": adapter})
    assert set(await every_answer(changed)) == {answer}
    assert changed.generate([PROMPT]).generations[0][0].text == answer
    assert (await changed.agenerate([PROMPT])).generations[0][0].text == answer
    assert set(await every_answer(made, lora_request=None)) == {expected["base"][0]}
    assert set(await every_answer(llm)) == {expected["base"][0]}


async def test_with_lora_gives_models_that_share_batches(
    llm: VLLM, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    """Models with several adapters and with none answer at once, each for itself, in the steps of
    one engine; one of a model's own adapter may be had from another's."""
    one = llm.with_lora(folders["one"])
    two = one.with_lora(str(folders["two"]), name="another")
    base = two.with_lora(None)
    named = one.with_lora(None, name="registered")
    assert one.lora_request == LoRARequest("one", None, str(folders["one"]))
    assert two.lora_request.lora_name == "another"
    assert base.lora_request is None
    models = {"one": one, "two": two, "base": base}
    assert all(model.client is llm.client for model in models.values())
    answers = await asyncio.gather(*(model.abatch(PROMPTS) for model in models.values()))
    assert dict(zip(models, answers, strict=True)) == expected
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda model: model.batch(PROMPTS), models.values()))
    assert dict(zip(models, found, strict=True)) == expected
    assert named.batch(PROMPTS) == expected["two"]
    assert set(await every_answer(one.with_lora(two.lora_request))) == {expected["two"][0]}


@pytest.mark.parametrize("kwargs", [{"use_beam_search": True, "n": 2}, {"best_of": 3, "seed": 1}])
async def test_what_comes_whole_is_the_adapters_too(
    llm: VLLM, folders: dict[str, Path], kwargs: dict[str, Any]
) -> None:
    """Beams and the best of several are of the adapter in every door."""
    values = {"n": 1, "temperature": 1.0, **kwargs}
    own = llm.with_lora(folders["one"])
    answer = own.invoke(PROMPT, **values)
    assert answer != llm.invoke(PROMPT, **values)
    assert "".join(own.stream(PROMPT, **values)) == answer
    assert "".join([piece async for piece in own.astream(PROMPT, **values)]) == answer
    assert await own.ainvoke(PROMPT, **values) == answer


# -- the cache -----------------------------------------------------------------------------------

steps = st.one_of(
    st.tuples(st.just("write"), st.sampled_from([3, 4])),
    st.tuples(st.just("load"), st.sampled_from(["one", "two", "edited"])),
    st.tuples(st.just("ask"), st.sampled_from(["base", "one", "two", "edited", "same", "name"])),
)


@settings(max_examples=12)
@given(script=st.lists(steps, min_size=3, max_size=10), is_chain=st.booleans())
def test_cache_never_answers_with_another_adapters_text(
    llm: VLLM,
    tiny_llama: Path,
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    script: list[tuple[str, Any]],
    is_chain: bool,
) -> None:
    """Whatever is written into a folder, or loaded under a name, between two calls: with a cache
    a model says what it says without."""
    edited = tmp_path_factory.mktemp("edited") / "one"
    write_adapter(edited, tiny_llama, seed=3)
    llm.client.load_lora(edited, "name")
    wanted: dict[str, Any] = {
        "base": None,
        "one": LoRARequest("one", 1, folders["one"]),
        "two": LoRARequest("one", 1, folders["two"]),  # a name and a number that another has
        "edited": LoRARequest("one", 1, edited),
        "same": LoRARequest("other", 2, edited),
        "name": "name",
    }
    cached = llm.model_copy(update={"cache": InMemoryCache()})
    plain = llm.model_copy(update={"cache": False})
    for step, value in script:
        if step == "write":
            write_adapter(edited, tiny_llama, seed=value)
        elif step == "load":
            llm.client.load_lora({**folders, "edited": edited}[value], "name")
        elif is_chain:
            own = cached.model_copy(update={"lora_request": wanted[value]})
            assert own.invoke(PROMPT) == plain.invoke(PROMPT, lora_request=wanted[value])
        else:
            answer = cached.invoke(PROMPT, lora_request=wanted[value])
            assert answer == plain.invoke(PROMPT, lora_request=wanted[value])


class Counting(InMemoryCache):
    """Counts what is stored, and lets a test do something between look-up and answer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_stored = 0
        self.meanwhile: Any = None

    def lookup(self, prompt: str, llm_string: str) -> Any:
        found = super().lookup(prompt, llm_string)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return found

    def update(self, prompt: str, llm_string: str, return_val: Any) -> None:
        self.num_stored += 1
        super().update(prompt, llm_string, return_val)


def test_equal_content_is_served_from_the_cache(
    llm: VLLM, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    """An adapter is found again by another name, another form and another object."""
    cache = Counting()
    cached = llm.model_copy(update={"cache": cache})
    forms: list[Any] = [
        LoRARequest("x", 1, folders["two"]),
        "registered",
        {"lora_name": "registered"},
    ]
    answers = {cached.invoke(PROMPT, lora_request=form) for form in forms}
    answers |= {cached.with_lora(folders["two"]).invoke(PROMPT)}
    assert answers == {expected["two"][0]}
    assert cache.num_stored == 1


@pytest.mark.parametrize("is_async", [False, True])
async def test_an_adapter_that_changes_in_a_call_is_the_old_one_to_its_end(
    llm: VLLM, tiny_llama: Path, tmp_path: Path, is_async: bool
) -> None:
    """A folder that is written, and a name that is loaded, after the cache was asked: the answer
    is stored for the content that it is of."""
    folder = write_adapter(tmp_path / "changing", tiny_llama, seed=5)
    llm.client.load_lora(folder, "changing")
    cache = Counting()
    for adapter in (LoRARequest("changing", 1, folder), "changing"):
        write_adapter(folder, tiny_llama, seed=5)
        llm.client.load_lora(folder, "changing")
        own = llm.model_copy(update={"lora_request": adapter, "cache": False})
        old = own.invoke(PROMPT)

        def change() -> None:
            write_adapter(folder, tiny_llama, seed=6)
            llm.client.load_lora(folder, "changing")

        cache.clear()
        cache.meanwhile = change
        cached = own.model_copy(update={"cache": cache})
        answer = await cached.ainvoke(PROMPT) if is_async else cached.invoke(PROMPT)
        new = own.invoke(PROMPT)
        assert answer == old != new
        assert cached.invoke(PROMPT) == new


@pytest.mark.parametrize("door", ["ainvoke", "astream", "abatch"])
async def test_an_adapter_is_read_beside_the_event_loop(
    llm: VLLM, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    """What is read for a call, or downloaded, keeps no other task waiting."""
    store = llm.client.llm_engine.adapters
    find, threads = store._find, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread())
        return find(*args, **kwargs)

    monkeypatch.setattr(store, "_find", watched)
    wanted = LoRARequest("new", 1, write_adapter(tmp_path / door, tiny_llama, seed=9))
    if door == "astream":
        assert [piece async for piece in llm.astream(PROMPT, lora_request=wanted)]
    elif door == "ainvoke":
        assert await llm.ainvoke(PROMPT, lora_request=wanted)
    else:
        assert await llm.abatch(PROMPTS, lora_request=wanted)
    assert threads
    assert threading.current_thread() not in threads


# -- engines -------------------------------------------------------------------------------------


def test_the_engine_lives_as_long_as_one_of_its_models(
    arguments: dict[str, Any], folders: dict[str, Path]
) -> None:
    """Closing a model with an adapter, or the one that it was made of, leaves the other; the
    last one's closing ends the engine, also after a try that failed."""
    own = {**arguments, "vllm_kwargs": {**LORA, "seed": 11}}
    llm = VLLM(**own, temperature=0.0, max_tokens=2)
    engine = llm.client
    one = llm.with_lora(folders["one"])
    with llm.with_lora(folders["two"]) as two:
        assert two.invoke(PROMPT)
    with pytest.raises(EngineClosedError):
        two.invoke(PROMPT)
    with pytest.raises(EngineClosedError):
        two.with_lora(folders["one"])
    with pytest.raises(AdapterError):
        llm.with_lora(folders["one"].parent / "missing")
    llm.close()
    assert one.invoke(PROMPT)
    assert not engine.closed
    one.close()
    assert engine.closed


def test_engines_that_begin_with_other_adapters_are_others(
    tiny_llama: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Equal names and paths are one engine until the adapter's files change."""

    def key(modules: Any) -> Any:
        return engine_key(EngineConfig.create(tiny_llama, enable_lora=True, lora_modules=modules))

    folder = write_adapter(tmp_path / "module", tiny_llama, seed=1)
    first = key({"m": str(folder)})
    assert key([f"m={folder}"]) == first
    assert key([{"name": "m", "path": str(folder)}]) == first
    assert len({first, key({"n": str(folder)}), key({"m": str(folders["two"])})}) == 3
    write_adapter(folder, tiny_llama, seed=2, rank=2)
    assert key({"m": str(folder)}) != first


def test_adapters_that_an_engine_begins_with_are_there_by_name(
    arguments: dict[str, Any], folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    """``lora_modules`` goes into ``vllm_kwargs`` as every engine argument does, and out again."""
    modules = [LoRARequest("first", 1, folders["one"])]
    own = {**arguments, "vllm_kwargs": {**LORA, "lora_modules": modules}}
    with VLLM(**own, temperature=0.0, max_tokens=8, lora_request="first") as llm:
        assert llm.batch(PROMPTS) == expected["one"]
        same = VLLM(client=llm.client, temperature=0.0, max_tokens=8, lora_request="first")
        for model in (llm, same):
            for again in (load(dumps(model)), pickle.loads(pickle.dumps(model))):
                assert again.client is llm.client
                assert again.batch(PROMPTS) == expected["one"]
                again.close()


# -- copies --------------------------------------------------------------------------------------


def load(text: str) -> Any:
    allowed: dict[str, Any] = {}
    if "allowed_objects" in inspect.signature(loads).parameters:
        allowed["allowed_objects"] = [VLLM]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older versions call their loader a beta
        return loads(text, valid_namespaces=["quire"], **allowed)


@pytest.mark.parametrize("name", ["request", "registered"])
def test_copies_have_the_adapter(
    llm: VLLM, folders: dict[str, Path], expected: dict[str, list[str]], name: str
) -> None:
    """Whatever a model goes through, it comes out with its adapter, on the same engine."""
    adapter = {"request": LoRARequest("two", 3, folders["two"]), "registered": "registered"}[name]
    model = llm.model_copy(update={"lora_request": adapter})
    model.invoke(PROMPT)
    copies = [
        copy.copy(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        model.model_copy(deep=True),
        load(dumps(model)),
        VLLM(**model.model_dump(exclude={"callbacks", "custom_get_token_ids", "metadata"})),
    ]
    for each in copies:
        assert each.lora_request == adapter
        assert each == model or each.metadata != model.metadata
        assert each.client is llm.client
        assert each.batch(PROMPTS) == expected["two"]
        each.close()
    assert model.model_dump_json(exclude={"callbacks"})
    assert repr(adapter) in repr(model)


def test_a_relative_path_is_that_of_the_directory_where_it_was_given(
    llm: VLLM,
    folders: dict[str, Path],
    expected: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From another working directory it is not the adapter that has its name there."""
    (tmp_path / "one").symlink_to(folders["two"])
    monkeypatch.chdir(folders["one"].parent)
    with llm.with_lora("one") as own:
        monkeypatch.chdir(tmp_path)
        assert [own.invoke(prompt) for prompt in PROMPTS] == expected["one"]


def test_a_configurable_adapter_changes_by_call(
    llm: VLLM, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    """A configurable field names the adapter for each input of a batch."""
    model = llm.configurable_fields(lora_request=ConfigurableField("adapter"))
    one = {"configurable": {"adapter": LoRARequest("one", 1, folders["one"])}}
    two = {"configurable": {"adapter": "registered"}}
    assert model.invoke(PROMPT, config=one) == expected["one"][0]
    assert model.with_config(**two).invoke(PROMPT) == expected["two"][0]
    found = model.batch(PROMPTS, config=[one, two, {}])
    assert found == [expected["one"][0], expected["two"][1], expected["base"][2]]


# -- errors --------------------------------------------------------------------------------------


def test_what_is_no_adapter_is_refused(llm: VLLM, tmp_path: Path) -> None:
    """By its name and value, at once; the model that was asked stays as it was."""
    wrong: list[Any] = [7, [LoRARequest("a", 1, "a")], LoRARequest, b"a", ""]
    for value in wrong:
        with pytest.raises(InvalidRequestError, match="lora_"):
            llm.invoke(PROMPT, lora_request=value)
        with pytest.raises(InvalidRequestError, match="lora_"):
            VLLM(client=llm.client, lora_request=value)
    with pytest.raises(TypeError, match="'lora_nam': did you mean 'lora_name'"):
        llm.invoke(PROMPT, lora_request={"lora_nam": "a"})
    for incomplete in ({}, {"lora_path": "a"}):
        with pytest.raises(InvalidRequestError, match=r"lora_request must be .* 'lora_name'"):
            llm.invoke(PROMPT, lora_request=incomplete)
    with pytest.raises(AdapterError, match="'nobody'"):
        llm.invoke(PROMPT, lora_request="nobody")
    with pytest.raises(AdapterError, match="'nobody'"):
        list(llm.stream(PROMPT, lora_request="nobody"))
    missing = tmp_path / "missing"
    with pytest.raises(AdapterError, match="missing"):
        llm.with_lora(missing)
    with pytest.raises(AdapterError, match="missing"):
        VLLM(client=llm.client, lora_request=LoRARequest("a", 1, missing))
    with pytest.raises(InvalidRequestError, match="path must be"):
        llm.with_lora(7)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="path must be"):
        llm.with_lora("")
    with pytest.raises(InvalidRequestError, match="name must be"):
        llm.with_lora(LoRARequest("a", 1, "a"), name="b")
    answers: list[Any] = llm.batch(PROMPTS, return_exceptions=True, lora_request="nobody")
    assert all(isinstance(answer, AdapterError) for answer in answers)


def test_a_model_of_an_adapter_that_is_gone_can_be_looked_at(
    llm: VLLM, tiny_llama: Path, tmp_path: Path
) -> None:
    """Its text and its parameters are there; a call is an error."""
    folder = write_adapter(tmp_path / "going", tiny_llama)
    own = llm.with_lora(folder)
    (folder / "adapter_config.json").unlink()
    assert "going" in str(own)
    assert "going" in str(own._identifying_params["lora_request"])
    with pytest.raises(AdapterError, match="going"):
        own.invoke(PROMPT)


def test_an_engine_without_adapters_says_what_to_do(
    tiny_llama: Path, folders: dict[str, Path]
) -> None:
    """In the constructor, before a model is loaded, in a copy and in a call."""
    adapter = LoRARequest("one", 1, folders["one"])
    with pytest.raises(ConfigError, match="'enable_lora': True"):
        VLLM(model="missing/model", lora_request=adapter)
    with VLLM(model=str(tiny_llama), dtype="float32") as llm:
        with pytest.raises(ConfigError, match="enable_lora=True"):
            VLLM(client=llm.client, lora_request="one")
        with pytest.raises(ConfigError, match="enable_lora=True"):
            llm.with_lora(folders["one"])
        assert llm.with_lora(None).lora_request is None
        with pytest.raises(InvalidRequestError, match="enable_lora=True"):
            llm.invoke(PROMPT, lora_request=adapter)
