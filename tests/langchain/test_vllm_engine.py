"""VLLM on the real engine and the model that ships with the package."""

from __future__ import annotations

import asyncio
import gc
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate

from quire import LLM, SamplingParams
from quire.errors import EngineClosedError, InvalidRequestError, ModelNotFoundError
from quire.integrations.langchain import VLLM

QUESTION = "What is the capital of {} ?"
COUNTRIES = ["France", "Spain", "Italy", "Japan"]
SMALL: dict[str, Any] = {
    "model": "quire/demo",
    "dtype": "float32",
    "vllm_kwargs": {"max_model_len": 256, "max_num_seqs": 16, "kv_cache_memory_bytes": 8 << 20},
}


@pytest.fixture(scope="module")
def llm() -> Iterator[VLLM]:
    with VLLM(**SMALL, temperature=0.0, max_new_tokens=24) as llm:
        yield llm


def test_answers_as_the_engine_does(llm: VLLM) -> None:
    """Text, tokens, reasons and logprobs are those of LLM.generate, for one prompt and many."""
    prompts = [QUESTION.format(country) for country in COUNTRIES]
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2)
    outputs = llm.client.generate(prompts, params, use_tqdm=False)
    result = llm.generate(prompts, logprobs=2)
    for output, [generation] in zip(outputs, result.generations, strict=True):
        info = generation.generation_info
        assert info is not None
        assert generation.text == output.outputs[0].text
        assert info["finish_reason"] == output.outputs[0].finish_reason
        assert info["logprobs"]["token_ids"] == output.outputs[0].token_ids
        assert info["token_usage"]["prompt_tokens"] == len(output.prompt_token_ids)
    assert "Paris" in llm.invoke(prompts[0])
    assert llm.batch(prompts) == [output.outputs[0].text for output in outputs]


def test_token_count_is_what_the_engine_sees(llm: VLLM) -> None:
    """get_num_tokens is the length of the prompt as the model gets it."""
    bos = llm.client.get_tokenizer().bos_token
    for prompt in ("What is 2 + 2 ?", "\u00e9\u00e8 \U0001f600", " a\n\nb ", f"{bos}Hello"):
        [output] = llm.client.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)
        assert llm.get_token_ids(prompt) == output.prompt_token_ids


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.0, "seed": 3, "n": 2},
        {"temperature": 1.0, "seed": 3, "n": 1, "best_of": 3},
        {"use_beam_search": True, "n": 2, "temperature": 1.0},
        {"logprobs": 3},
        {"stop": ["is"]},
        {"stop": ["is"], "include_stop_str_in_output": True},
        {"max_tokens": 1},
    ],
)
async def test_every_way_of_asking_gives_one_answer(llm: VLLM, kwargs: dict[str, Any]) -> None:
    """invoke, batch, stream and their async forms agree, whatever the parameters."""
    prompt = QUESTION.format("Norway")
    answer = llm.invoke(prompt, **kwargs)
    assert llm.batch([prompt, "x"], **kwargs)[0] == answer
    chunks = list(llm.stream(prompt, **kwargs))
    assert "".join(chunks) == answer
    assert await llm.ainvoke(prompt, **kwargs) == answer
    assert (await llm.abatch(["x", prompt], **kwargs))[1] == answer
    assert "".join([chunk async for chunk in llm.astream(prompt, **kwargs)]) == answer


def test_concurrent_callers_join_one_batch(llm: VLLM) -> None:
    """Threads and tasks that call at once share the engine's steps, and get their own answers."""
    prompts = [QUESTION.format(country) for country in COUNTRIES] * 2
    expected = llm.batch(prompts)

    def invoke(prompt: str) -> str:
        return llm.invoke(prompt)

    async def gathered() -> list[str]:
        return list(await asyncio.gather(*(llm.ainvoke(prompt) for prompt in prompts)))

    with ThreadPoolExecutor(9) as pool:
        from_threads = [pool.submit(invoke, prompt) for prompt in prompts]
        from_loop = pool.submit(asyncio.run, gathered())
        assert [future.result() for future in from_threads] == expected
        assert from_loop.result() == expected
    assert asyncio.run(gathered()) == expected  # a second event loop


def test_a_batch_is_one_batch_of_the_engine(llm: VLLM) -> None:
    """Eight prompts share steps: they take about as many as one of them."""

    def steps_of(prompts: list[str]) -> float:
        before = llm.client.get_metrics()["num_steps"]
        llm.batch(prompts, ignore_eos=True)
        return float(llm.client.get_metrics()["num_steps"] - before)

    prompts = [QUESTION.format(country) for country in COUNTRIES] * 2
    alone = steps_of(prompts[:1])
    assert alone <= steps_of(prompts) < 2 * alone


def test_stop_strings_of_constructor_and_call_end_the_text(llm: VLLM) -> None:
    """Whichever comes first; and the generation says which it was."""
    own = llm.model_copy(update={"stop": ["France"]})
    question = QUESTION.format("France")
    whole = llm.invoke(question)
    assert whole.index("capital") < whole.index("France")
    for call, first in ((None, "France"), (["capital"], "capital"), (["Paris"], "France")):
        [[generation]] = own.generate([question], stop=call).generations
        assert generation.text == whole[: whole.index(first)]
        assert generation.generation_info is not None
        assert generation.generation_info["stop_reason"] == first
        assert generation.generation_info["finish_reason"] == "stop"


def test_one_bad_prompt_fails_alone(llm: VLLM) -> None:
    """An empty and a too long prompt have their errors; their neighbours have their answers."""
    good = QUESTION.format("France")
    answers: list[Any] = llm.batch([good, "", "word " * 999, good], return_exceptions=True)
    assert isinstance(answers[1], InvalidRequestError)
    assert isinstance(answers[2], InvalidRequestError)
    assert answers[0] == answers[3] == llm.invoke(good)
    with pytest.raises(InvalidRequestError, match="prompt 1 of 2"):
        llm.batch([good, ""])


def test_a_failing_logits_processor_fails_alone(llm: VLLM) -> None:
    """A callable of the user's that raises ends that call, and the next works."""

    def broken(token_ids: list[int], logits: Any) -> Any:
        raise ArithmeticError("broken")

    question = QUESTION.format("France")
    [failed] = llm.batch([question], return_exceptions=True, logits_processors=[broken])
    assert "broken" in str(failed)
    assert "Paris" in llm.invoke(question)


def test_unseeded_samples_differ_and_seeded_repeat(llm: VLLM) -> None:
    """Equal prompts are drawn apart; a seed makes them equal, in one batch as in two calls."""
    prompt = "Once"
    hot = llm.bind(temperature=1.5, max_tokens=20)
    assert len(set(hot.batch([prompt] * 4))) > 1
    seeded = hot.bind(seed=11)
    assert len({*seeded.batch([prompt] * 3), seeded.invoke(prompt)}) == 1
    result = llm.generate([prompt], n=4, temperature=1.5, max_tokens=20)
    assert len({generation.text for generation in result.generations[0]}) > 1


def test_chain(llm: VLLM) -> None:
    """A chain answers."""
    chain = PromptTemplate.from_template("What is the capital of {x} ?") | llm | StrOutputParser()
    assert "Madrid" in chain.invoke({"x": "Spain"})


def test_engine_is_freed_with_its_last_user() -> None:
    """Weights and thread of a real engine go with the last object, without a collection."""
    gc.collect()
    threads = threading.active_count()
    llm = VLLM(**{**SMALL, "vllm_kwargs": {**SMALL["vllm_kwargs"], "seed": 5}})
    other = llm.model_copy(update={"temperature": 0.0, "max_new_tokens": 3})
    assert other.client is llm.client
    engine = weakref.ref(llm.client.llm_engine)
    other.invoke("a")
    list(other.stream("a"))
    asyncio.run(other.ainvoke("a"))
    del llm
    assert engine() is not None
    del other
    gc.collect()
    assert engine() is None
    assert threading.active_count() <= threads


def test_engines_of_equal_configuration_only(llm: VLLM) -> None:
    """A pickle re-shares the engine; another dtype is another engine."""
    again = pickle.loads(pickle.dumps(llm))
    assert again.client is llm.client
    assert again.invoke(QUESTION) == llm.invoke(QUESTION)
    assert VLLM(client=llm.client).client is llm.client
    own = LLM("quire/demo", dtype="float32", **SMALL["vllm_kwargs"])
    assert VLLM(client=own, temperature=0.0, max_new_tokens=24).invoke(QUESTION) == llm.invoke(
        QUESTION
    )
    own.close()


async def test_closing_ends_what_runs() -> None:
    """Calls that run when their model is closed fail with the reason, and do not hang; other
    users of the engine go on."""
    arguments = {**SMALL, "vllm_kwargs": {**SMALL["vllm_kwargs"], "seed": 6}}
    llm = VLLM(**arguments, max_new_tokens=200, ignore_eos=True)
    other = VLLM(**arguments)
    stream, bound = llm.stream("a"), llm.bind(top_k=5).stream("a")
    astream = llm.astream("a")
    next(stream), next(bound), await anext(astream)
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.invoke("a")
    assert other.generate([QUESTION.format("France")])
    other.close()
    for running in (stream, bound):
        with pytest.raises(EngineClosedError):
            list(running)
    with pytest.raises(EngineClosedError):
        async for _ in astream:
            pass


def test_a_missing_model_is_told_by_name(tmp_path: Path) -> None:
    """The engine's own errors come out of the constructor as they are."""
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        VLLM(model=str(tmp_path / "no-such-model"))


def test_works_after_a_fork() -> None:
    """A model that was made and not yet used serves the child of a fork; one that was used says
    what to do, and a new one can be made."""
    source = """
        import os, signal, sys
        from quire.errors import EngineClosedError
        from quire.integrations.langchain import VLLM

        def make():
            return VLLM(model="quire/demo", dtype="float32", temperature=0.0, max_new_tokens=8,
                        vllm_kwargs={"kv_cache_memory_bytes": 8 << 20, "max_model_len": 64})

        llm = make()
        for used in (False, True):
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)  # nothing is left behind when it hangs
                code = 1
                try:
                    if used:
                        try:
                            llm.invoke("x")
                        except EngineClosedError:
                            make().invoke("x")
                            code = 0
                    else:
                        llm.invoke("x")
                        code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, used
            llm.invoke("x")
        """
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
