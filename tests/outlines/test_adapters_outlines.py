"""LoRA adapters in Outlines: a model's generations are of the adapter that it has."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from adapters import write_adapter

pytest.importorskip("outlines", reason="the extra `outlines` is not installed")

import outlines
from outlines.inputs import Chat
from outlines.types import Regex
from pydantic import BaseModel

from quire import LLM, AdapterError, AsyncLLM, LoRARequest, SamplingParams
from quire.errors import EngineClosedError, InvalidRequestError
from quire.integrations.outlines import from_quire, generate, models, samplers

PROMPTS = ["the quick brown fox", "hello world"]
PROMPT = PROMPTS[0]
CHAT = Chat([{"role": "user", "content": PROMPT}])
PLAIN: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
WORD = Regex("[a-z]{6}")


class Fox(BaseModel):
    color: Literal["brown", "red", "white"]
    is_quick: bool


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(root / name, tiny_llama, seed=seed)
        for seed, name in enumerate(["one", "two"])
    }


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, folders: dict[str, Path]):
    with LLM(tiny_llama, dtype="float32", block_size=4, enable_lora=True) as engine:
        engine.load_lora(folders["two"], "registered")
        yield engine


@pytest.fixture
def model(engine: LLM) -> models.VLLM:
    return models.VLLM(engine)


@pytest.fixture(scope="module")
def expected(engine: LLM, folders: dict[str, Path]) -> dict[str, list[str]]:
    """What the engine itself says for the prompts, by adapter; each something else."""
    found = {name: said(engine, LoRARequest(name, 1, path)) for name, path in folders.items()}
    found["base"] = said(engine, None)
    assert len({text for texts in found.values() for text in texts}) == 6
    return found


def said(engine: LLM, adapter: Any) -> list[str]:
    params = SamplingParams(**PLAIN)
    outputs = engine.generate(PROMPTS, params, use_tqdm=False, lora_request=adapter)
    return [output.outputs[0].text for output in outputs]


def every_answer(model: Any, generator: Any, **kwargs: Any) -> set[str]:
    """Return what a model says to the prompt, by each of its methods and a generator's."""
    arguments = {**PLAIN, **kwargs}
    return {
        model(PROMPT, **arguments),
        *model.batch([PROMPT, PROMPT], **arguments),
        "".join(model.stream(PROMPT, **arguments)),
        generator(PROMPT, **arguments),
        *generator.batch([PROMPT, PROMPT], **arguments),
        "".join(generator.stream(PROMPT, **arguments)),
    }


def test_a_model_and_its_generators_follow_load_lora(
    model: models.VLLM, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    """From the call on, for generators that were made before, too; None is the base again; a
    call's own adapter goes before the model's, and so does its None."""
    generator = outlines.Generator(model)
    for name in ("base", "one", "two", "one", "base"):
        model.load_lora(folders.get(name))
        assert every_answer(model, generator) == {expected[name][0]}
        two = LoRARequest("any", 1, folders["two"])
        assert every_answer(model, generator, lora_request=two) == {expected["two"][0]}
        assert every_answer(model, generator, lora_request="registered") == {expected["two"][0]}
        assert every_answer(model, generator, lora_request=None) == {expected["base"][0]}
    model.load_lora(str(folders["one"]))
    assert model.batch(PROMPTS, **PLAIN) == expected["one"]
    assert model.lora_request == LoRARequest("one", None, str(folders["one"]))
    model.load_lora(LoRARequest("registered"))
    assert model.batch(PROMPTS, **PLAIN) == expected["two"]
    several = [None, LoRARequest("one", 1, folders["one"])]
    texts = model.batch(PROMPTS, lora_request=several, **PLAIN)
    assert texts == [expected["base"][0], expected["one"][1]]


def test_chats_and_beams_are_the_adapters(
    engine: LLM, model: models.VLLM, folders: dict[str, Path]
) -> None:
    """A conversation, and a search, are of the adapter as they are for the engine itself."""
    base = model(CHAT, **PLAIN), model(PROMPT, use_beam_search=True, n=2, max_tokens=8)
    model.load_lora(folders["one"])
    adapter = LoRARequest("one", 1, folders["one"])
    params = SamplingParams(**PLAIN)
    [output] = engine.chat(CHAT.messages, params, use_tqdm=False, lora_request=adapter)
    assert model(CHAT, **PLAIN) == model(PROMPT, chat=True, **PLAIN) == output.outputs[0].text
    search = SamplingParams(use_beam_search=True, n=2, max_tokens=8)
    [output] = engine.generate([PROMPT], search, use_tqdm=False, lora_request=adapter)
    beams = [beam.text for beam in output.outputs]
    assert model(PROMPT, use_beam_search=True, n=2, max_tokens=8) == beams
    assert model(CHAT, **PLAIN) != base[0]
    assert beams != base[1]


def test_a_structure_holds_under_every_adapter(
    model: models.VLLM, folders: dict[str, Path]
) -> None:
    """What an output type says is true of the text, which is the adapter's own."""
    words = []
    for name in ("base", "one", "two"):
        model.load_lora(folders.get(name))
        for seed in range(3):
            drawn = {"temperature": 1.0, "seed": seed}
            Fox.model_validate_json(model(PROMPT, Fox, **drawn))
            assert model(PROMPT, Literal["a", "bc"], **drawn) in ("a", "bc")
            assert re.fullmatch("[a-z]{6}", "".join(model.stream(PROMPT, WORD, **drawn)))
        words.append(model(PROMPT, WORD, temperature=0.0))
    assert len(set(words)) == 3


def test_models_on_one_engine_have_adapters_of_their_own(
    engine: LLM, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    """load_lora of one model is nothing to another; their requests run at once."""
    those = {name: models.VLLM(engine) for name in ("base", "one", "two")}
    for name, path in folders.items():
        those[name].load_lora(path)
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda model: model.batch(PROMPTS, **PLAIN), those.values())
    assert dict(zip(those, found, strict=True)) == expected


def test_an_adapter_that_cannot_be_had_leaves_the_one_before(
    model: models.VLLM, tiny_llama: Path, folders: dict[str, Path], tmp_path: Path, expected
) -> None:
    """A missing folder, a broken one, a wrong kind of thing."""
    broken = write_adapter(tmp_path / "broken", tiny_llama)
    (broken / "adapter_config.json").write_text("{")
    model.load_lora(folders["one"])
    for wrong in (tmp_path / "missing", broken, LoRARequest("nobody")):
        with pytest.raises(AdapterError, match=r"missing|broken|nobody"):
            model.load_lora(wrong)
        assert model.batch(PROMPTS, **PLAIN) == expected["one"]
    for kind in (7, "", [folders["two"]]):
        with pytest.raises(InvalidRequestError, match="path must be"):
            model.load_lora(kind)  # type: ignore[arg-type]
        assert model.batch(PROMPTS, **PLAIN) == expected["one"]
    with pytest.raises(AdapterError, match="nobody"):
        model(PROMPT, lora_request="nobody")


def test_a_folder_that_changes_is_read_again(
    model: models.VLLM, tiny_llama: Path, folders: dict[str, Path], tmp_path: Path, expected
) -> None:
    """What lies in the folder is what the next call runs with."""
    folder = write_adapter(tmp_path / "changing", tiny_llama, seed=0)
    model.load_lora(folder)
    assert model.batch(PROMPTS, **PLAIN) == expected["one"]
    write_adapter(folder, tiny_llama, seed=1)
    assert model.batch(PROMPTS, **PLAIN) == expected["two"]


async def test_the_async_twin_follows_load_lora(
    engine: LLM, folders: dict[str, Path], tmp_path: Path, expected: dict[str, list[str]]
) -> None:
    """All of it awaited; models with several adapters run at once."""
    twin, other = (from_quire(AsyncLLM.from_llm(engine)) for _ in range(2))
    generator = outlines.Generator(twin)
    for name in ("one", "two", "base"):
        await twin.load_lora(folders.get(name))
        assert await twin(PROMPT, **PLAIN) == expected[name][0]
        assert await generator(PROMPT, **PLAIN) == expected[name][0]
        streamed = [piece async for piece in twin.stream(PROMPT, **PLAIN)]
        assert "".join(streamed) == expected[name][0]
        both = await asyncio.gather(twin.batch(PROMPTS, **PLAIN), other.batch(PROMPTS, **PLAIN))
        assert both == [expected[name], expected["base"]]
        assert re.fullmatch("[a-z]{6}", await twin(PROMPT, WORD, seed=1))
    await twin.load_lora(folders["one"])
    with pytest.raises(AdapterError, match="missing"):
        await twin.load_lora(tmp_path / "missing")
    assert twin.lora_request.lora_name == "one"
    assert await twin.batch(PROMPTS, lora_request="registered", **PLAIN) == expected["two"]
    assert await twin.batch(PROMPTS, lora_request=None, **PLAIN) == expected["base"]
    texts = await twin.batch(PROMPTS, lora_request=["registered", None], **PLAIN)
    assert texts == [expected["two"][0], expected["base"][1]]
    with pytest.raises(InvalidRequestError, match="lora_request has 1 entries"):
        await twin.batch(PROMPTS, lora_request=["registered"], **PLAIN)


def test_old_generators_follow_load_lora(
    engine: LLM, model: models.VLLM, folders: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    """Those of the 0.x API as well; what a call says goes before, on a plain LLM, too."""
    generator = generate.text(model, samplers.greedy())
    on_engine = generate.text(engine, samplers.greedy())
    quiet = {"max_tokens": 8, "use_tqdm": False}
    for name in ("one", "base", "two"):
        model.load_lora(folders.get(name))
        assert generator(PROMPTS, **quiet) == expected[name]
        pieces = list(generator.stream(PROMPTS, max_tokens=8))
        assert ["".join(texts) for texts in zip(*pieces, strict=True)] == expected[name]
        for asked in (generator, on_engine):
            assert asked(PROMPTS, lora_request="registered", **quiet) == expected["two"]
            assert asked(PROMPTS, lora_request=None, **quiet) == expected["base"]
            pieces = list(asked.stream(PROMPT, max_tokens=8, lora_request="registered"))
            assert "".join(pieces) == expected["two"][0]
        assert isinstance(generate.json(model, Fox)(PROMPT, seed=1, use_tqdm=False), Fox)
        assert generate.choice(model, ["yes", "no"])(PROMPT, use_tqdm=False) in ("yes", "no")
        text = generate.regex(model, "[0-9]{4}", samplers.beam_search(2))(PROMPT, use_tqdm=False)
        assert all(re.fullmatch("[0-9]{4}", each) for each in text)
    assert on_engine(PROMPTS, **quiet) == expected["base"]


def test_by_name(tiny_llama: Path, folders: dict[str, Path], expected) -> None:
    """``models.vllm(name, enable_lora=True)``; without it an adapter is refused, and no adapter
    is not."""
    with models.vllm(tiny_llama, dtype="float32", block_size=4, enable_lora=True) as model:
        model.load_lora(folders["one"])
        assert model.batch(PROMPTS, **PLAIN) == expected["one"]
    with pytest.raises(EngineClosedError):
        model.load_lora(folders["one"])
    with models.vllm(tiny_llama, dtype="float32", block_size=4) as model:
        model.load_lora(None)
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="enable_lora=True"):
                model.load_lora(folders["one"])
        assert json.loads(model(PROMPT, Fox, seed=1))
