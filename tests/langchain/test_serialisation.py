"""VLLM as a part of LangChain's world: stored, chained, traced."""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
from langchain_core.load import dumpd, dumps, loads
from langchain_core.output_parsers import CommaSeparatedListOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.context import collect_runs

from quire.integrations.langchain import VLLM


def load(text: str, **kwargs: Any) -> Any:
    """Load what a user allows: this class by name, where LangChain asks for that."""
    if "allowed_objects" in inspect.signature(loads).parameters:
        kwargs["allowed_objects"] = [VLLM]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older versions call their loader a beta
        return loads(text, valid_namespaces=["quire"], **kwargs)


def test_dumps_and_loads(fake: Any) -> None:
    """A model goes through LangChain's own format and runs again, on the same engine."""
    llm = VLLM(
        model="m",
        temperature=0.0,
        n=1,
        stop=["x"],
        max_new_tokens=7,
        logit_bias={5: 1.5},
        early_stopping=False,
        vllm_kwargs={"seed": 3, "hf_overrides": {"a": 1}},
    )
    llm.invoke("p")
    text = dumps(llm)
    assert json.loads(text)["id"] == ["quire", "integrations", "langchain", "vllm", "VLLM"]
    again = load(text)
    assert again.client is llm.client
    assert again._identifying_params == llm._identifying_params
    assert again.invoke("p") == llm.invoke("p")


def test_dump_has_no_secret_and_no_engine(fake: Any) -> None:
    """The hub token is left to the environment; the engine is no part of the text."""
    llm = VLLM(model="m", vllm_kwargs={"hf_token": "hf_secret", "seed": 3})
    llm.invoke("p")
    text = dumps(llm)
    assert "hf_secret" not in text
    assert "client" not in json.loads(text)["kwargs"]
    assert load(text).vllm_kwargs == {"seed": 3}
    assert llm.vllm_kwargs == {"hf_token": "hf_secret", "seed": 3}
    assert "hf_secret" not in str(VLLM(client=llm.client)) + repr(VLLM(client=llm.client))


def test_no_dump_of_pydantic_has_the_secret(fake: Any) -> None:
    """The hub token is left out as ``dumps`` leaves it out; a pickle, made to go on, has it."""
    arguments = {"hf_token": "hf_secret", "seed": 3}
    llm = VLLM(model="m", vllm_kwargs=arguments)
    assert llm.model_dump()["vllm_kwargs"] == {"seed": 3}
    assert "hf_secret" not in llm.model_dump_json(exclude={"callbacks"})
    assert llm.vllm_kwargs == arguments
    assert pickle.loads(pickle.dumps(llm)).vllm_kwargs == arguments


def test_serialized_form_follows_changes(fake: Any) -> None:
    """A copy is traced with its own arguments, not with those of what it was copied from."""
    llm = VLLM(model="m", temperature=0.5)
    llm.invoke("p")
    assert dumpd(llm)["kwargs"]["temperature"] == 0.5
    copied = llm.model_copy(update={"temperature": 0.25})
    assert copied._serialized["kwargs"]["temperature"] == 0.25


def test_save_writes_the_identity(fake: Any, tmp_path: Path) -> None:
    """``save`` writes parameters as JSON or YAML."""
    llm = VLLM(model="m", temperature=0.0, stop=["x"])
    llm.save(tmp_path / "llm.json")
    saved = json.loads((tmp_path / "llm.json").read_text())
    assert (saved["_type"], saved["model"], saved["stop"]) == ("vllm", "m", ["x"])
    llm.save(tmp_path / "llm.yaml")


def test_chain(fake: Any) -> None:
    """prompt | llm | parser, with a bound call, in invoke and batch."""
    prompt = PromptTemplate.from_template("list {x}")
    parse = CommaSeparatedListOutputParser()
    llm = VLLM(model="m", seed=1)
    chain = prompt | llm | parse
    assert chain.invoke({"x": "p"}) == parse.invoke(llm.invoke("list p"))
    assert chain.batch([{"x": "p"}, {"x": "q"}])[1] == parse.invoke(llm.invoke("list q"))
    assert fake.calls[-2].batch == fake.calls[-3].batch
    (prompt | llm.bind(stop=["z"]) | parse).invoke({"x": "p"})
    assert fake.calls[-1].params.stop == ["z"]
    with_fallback = (RunnableLambda(lambda _: "BAD") | llm).with_fallbacks([llm])
    assert with_fallback.invoke("p") == llm.invoke("p")


@pytest.mark.parametrize("package", ["langchain_classic.chains", "langchain.chains"])
def test_llm_chain(fake: Any, package: str) -> None:
    """LLMChain of langchain, before and after it moved, runs and passes its arguments on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chain_class: Any = importlib.import_module(package).LLMChain
    except (ImportError, AttributeError):
        pytest.skip(f"this version of LangChain has no {package}")
    llm = VLLM(model="m", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still used
        chain = chain_class(
            llm=llm, prompt=PromptTemplate.from_template("say {x}"), llm_kwargs={"top_k": 3}
        )
        answer = chain.invoke({"x": "p"})["text"]
        applied = chain.apply([{"x": "p"}, {"x": "q"}])
        generated = chain.generate([{"x": "p"}])
        repr(chain)
        chain.model_dump()
    assert answer == llm.invoke("say p", top_k=3)
    assert [one["text"] for one in applied] == llm.batch(["say p", "say q"], top_k=3)
    assert generated.llm_output["token_usage"]["prompt_tokens"] == 5


async def test_tracing(fake: Any) -> None:
    """A traced run has its inputs, its answer and the tokens it used, streamed or not."""
    llm = VLLM(model="m", seed=1)
    with collect_runs() as runs:
        answer = llm.invoke("p", config={"tags": ["t"], "run_name": "asked"})
        "".join(llm.stream("p"))
        await llm.ainvoke("p")
    assert len(runs.traced_runs) == 3
    for run in runs.traced_runs:
        assert run.run_type == "llm"
        assert run.inputs == {"prompts": ["p"]}
        assert run.outputs is not None
        [[generation]] = run.outputs["generations"]
        assert generation["text"] == answer
        assert generation["generation_info"]["token_usage"]["prompt_tokens"] == 1
    assert (runs.traced_runs[0].name, runs.traced_runs[0].tags) == ("asked", ["t"])


async def test_events(fake: Any) -> None:
    """astream_events tells of each token."""
    llm = VLLM(model="m", seed=1)
    events = [event async for event in llm.astream_events("p", version="v2")]
    streamed = [event for event in events if event["event"] == "on_llm_stream"]
    assert len(streamed) > 5
    assert events[-1]["event"] == "on_llm_end"


def test_schemas(fake: Any) -> None:
    """Input, output and configuration schemas can be made."""
    llm = VLLM(model="m")
    assert llm.get_output_jsonschema()["type"] == "string"
    assert llm.get_input_jsonschema()
    assert llm.config_schema()
