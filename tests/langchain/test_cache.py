"""LangChain's cache: an answer is never taken for another's."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache

from quire.integrations.langchain import VLLM
from quire.sampling_params import SamplingParams

ADAPTERS = ["a1", "a2"]
LORA = {"enable_lora": True}

sampling = st.fixed_dictionaries(
    {},
    optional={
        "n": st.sampled_from([1, 2]),
        "temperature": st.sampled_from([0.5, 1.0]),
        "top_k": st.sampled_from([-1, 3]),
        "top_p": st.sampled_from([1.0, 0.5]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.1]),
        "presence_penalty": st.sampled_from([0.0, 0.1]),
        "seed": st.sampled_from([0, 1]),
        "stop": st.sampled_from([["a"], ["b"], ["a", "b"]]),
        "stop_token_ids": st.sampled_from([[1], [2]]),
        "bad_words": st.sampled_from([["x"], ["y"]]),
        "ignore_eos": st.booleans(),
        "max_tokens": st.sampled_from([4, 512]),
        "min_tokens": st.sampled_from([0, 1]),
        "logit_bias": st.sampled_from([{1: 1.0}, {1: 2.0}]),
        "allowed_token_ids": st.sampled_from([[1], [1, 2]]),
        "truncate_prompt_tokens": st.sampled_from([1, 2]),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "lora_request": st.sampled_from([None, *ADAPTERS]),
    },
)


@given(
    st.lists(
        st.tuples(st.sampled_from(["m", "o"]), sampling, sampling, st.booleans()),
        min_size=2,
        max_size=8,
    )
)
def test_cache_never_answers_for_another_configuration(fake: Any, runs: list[Any]) -> None:
    """With any mix of models, parameters and adapters on one cache, every answer is the one
    that its own configuration gives."""
    cache = InMemoryCache()
    for model, own, call, bind in runs:
        seeded = {"seed": 5, **own}
        cached = VLLM(model=model, cache=cache, vllm_kwargs=LORA, **seeded)
        direct = VLLM(model=model, cache=False, vllm_kwargs=LORA, **seeded)
        answer = cached.bind(**call).invoke("p") if bind else cached.invoke("p", **call)
        assert answer == direct.invoke("p", **call)


def test_equal_calls_are_served_from_the_cache(fake: Any) -> None:
    """The other way round: what is equal is found again, by whatever object it was asked."""
    cache = InMemoryCache()
    VLLM(model="m", cache=cache, temperature=0.0, stop=["a"]).invoke("p")
    VLLM(model="m", cache=cache).invoke("p", temperature=0.0, stop=["a"])
    VLLM(model="m", cache=cache).bind(temperature=0.0).invoke("p", stop=["a"])
    assert len(fake.calls) == 1


def test_unseeded_sampling_repeats_only_in_the_cache(fake: Any) -> None:
    """Without a cache equal calls draw anew; with one the first draw stays, for each seed and
    model of its own; prompts that are equal within a batch are drawn apart."""
    free = VLLM(model="m", cache=False)
    assert free.invoke("p") != free.invoke("p")
    cached = VLLM(model="m", cache=InMemoryCache())
    assert cached.invoke("p") == cached.invoke("p")
    assert cached.invoke("p", seed=1) != cached.invoke("p")
    first, second = VLLM(model="m", cache=InMemoryCache()).batch(["p", "p"])
    assert first != second


def test_global_cache(fake: Any) -> None:
    """The global cache is used as for any LangChain model."""
    set_llm_cache(InMemoryCache())
    try:
        llm = VLLM(model="m")
        assert llm.invoke("p") == llm.invoke("p")
        assert llm.batch(["p"], return_exceptions=True) == [llm.invoke("p")]
        assert len(fake.calls) == 1
    finally:
        set_llm_cache(None)


def test_engine_arguments_and_files_count(fake: Any, checkpoint: Path, tmp_path: Path) -> None:
    """The identity has dtype, revision, seed and whatever else makes another model, also the
    state of the checkpoint's files; memory and scheduling do not change it."""

    def identity(**kwargs: Any) -> str:
        return str(VLLM(model=str(checkpoint), **kwargs)._identifying_params)

    texts = [
        identity(),
        identity(dtype="half"),
        identity(vllm_kwargs={"revision": "v2"}),
        identity(vllm_kwargs={"seed": 7}),
        identity(vllm_kwargs={"max_model_len": 8}),
        identity(vllm_kwargs={"hf_overrides": {"rope_theta": 1.0}}),
        identity(vllm_kwargs={"tokenizer": "other"}),
    ]
    assert len(set(texts)) == len(texts)
    assert identity(vllm_kwargs={"max_num_seqs": 3, "hf_token": "t"}) == texts[0]
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert identity() not in texts
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    before = identity(vllm_kwargs={"tokenizer": str(tokenizer)})
    (tokenizer / "tokenizer.json").write_text("{ }")
    assert identity(vllm_kwargs={"tokenizer": str(tokenizer)}) != before


def test_a_hub_model_is_its_commit(fake: Any, tmp_path: Path) -> None:
    """When a hub name comes to mean other weights, its identity changes."""
    home = tmp_path / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        (home / "snapshots" / commit).mkdir(parents=True)
        (home / "snapshots" / commit / "config.json").write_text("{}")
    (home / "refs").mkdir()

    def identity(**vllm_kwargs: Any) -> Any:
        llm = VLLM(model="org/name", download_dir=str(tmp_path), vllm_kwargs=vllm_kwargs)
        return llm._identifying_params["checkpoint"]

    assert identity() is None
    for commit in ("a" * 40, "b" * 40):
        (home / "refs" / "main").write_text(commit)
        assert identity() == commit
    assert identity(revision="a" * 40) == "a" * 40
    url = VLLM(model="https://huggingface.co/org/name", download_dir=str(tmp_path))
    assert url._identifying_params["checkpoint"] is None


def test_callables_are_told_apart_when_their_address_is_reused(fake: Any) -> None:
    """Logits processors that differ never share an entry, even when one took the other's place
    in memory."""
    llm = VLLM(model="m")

    def make(bias: float) -> Any:
        return lambda token_ids, logits: logits + bias

    names = set()
    for bias in range(50):
        identity = llm.model_copy(update={"logits_processors": [make(bias)]})._identifying_params
        names.add(str(identity["logits_processors"]))
        del identity
        gc.collect(0)
    assert len(names) == 50
    same = make(1.0)
    one, two = (llm.model_copy(update={"logits_processors": [same]}) for _ in range(2))
    assert one._identifying_params == two._identifying_params

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, token_ids: Any, logits: Any) -> Any:
            return logits

    odd = llm.model_copy(update={"logits_processors": [Unhashable()]})
    assert odd._identifying_params != odd._identifying_params


def test_every_parameter_is_in_the_identity(fake: Any) -> None:
    """A sampling parameter that is added one day is in the cache's key from its first day."""
    import dataclasses

    llm = VLLM(model="m")
    plain = llm._identifying_params
    for field in dataclasses.fields(SamplingParams):
        if field.name in {"output_kind", "max_tokens"}:
            continue
        copied = llm.__copy__()
        copied.__dict__[field.name] = [len] if field.name == "logits_processors" else ["another"]
        assert copied._identifying_params != plain, field.name
