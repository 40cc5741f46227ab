"""The doors over a real engine and a tiny model: one answer through every door, memory freed."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quire import LLM, AsyncLLM, SamplingParams
from quire.errors import ConfigError, EngineClosedError, InvalidRequestError, OutOfMemoryError
from quire.sampling_params import BeamSearchParams, RequestOutputKind

PROMPTS = ["hello world", "the quick brown", "What is the capital", "a", "lazy dog jumps"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.2, seed=3, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=4, max_tokens=7, n=2, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, presence_penalty=1.0),
]


@pytest.fixture(scope="module", params=[False, True], ids=["", "overlapped"])
def options(tiny_llama, request):
    return {
        "model": tiny_llama,
        "dtype": "float32",
        "block_size": 4,
        "max_num_batched_tokens": 16,
        "async_scheduling": request.param,
    }


@pytest.fixture(scope="module")
def llm(options):
    with LLM(**options) as llm:
        yield llm


def answer(output):
    return [(c.index, c.text, list(c.token_ids), c.finish_reason) for c in output.outputs]


def join(outputs):
    """Put the deltas of one request together."""
    whole = {}
    for output in outputs:
        for c in output.outputs:
            text, ids, _ = whole.get(c.index, ("", [], None))
            whole[c.index] = text + c.text, [*ids, *c.token_ids], c.finish_reason
    return [(index, *whole[index]) for index in sorted(whole)]


def test_every_door_gives_the_same_answer(llm):
    """Batch, alone, stream, threads, tasks: a request's answer depends on itself only."""
    expected = [answer(output) for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    pairs = list(zip(PROMPTS, PARAMS, strict=True))
    alone = [answer(llm.generate(p, s, use_tqdm=False)[0]) for p, s in pairs]
    streamed = [join(llm.stream(p, s)) for p, s in pairs]
    with ThreadPoolExecutor(5) as pool:
        threads = list(pool.map(lambda pair: join(llm.stream(*pair)), pairs))
    async_llm = AsyncLLM.from_llm(llm)

    async def last(prompt, params):
        outputs = [output async for output in async_llm.generate(prompt, params)]
        return answer(outputs[-1])

    async def every():
        return await asyncio.gather(*(last(p, s) for p, s in pairs))

    assert alone == streamed == threads == expected
    assert asyncio.run(every()) == expected
    ids = [{"prompt_token_ids": llm.get_tokenizer().encode(p)} for p in PROMPTS]
    assert [answer(output) for output in llm.generate(ids, PARAMS, use_tqdm=False)] == expected


def test_unseeded_requests_differ_and_a_run_repeats(options):
    """They draw from the engine's seed and their number."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)

    def first_run(seed):
        with LLM(**options, seed=seed) as llm:
            outputs = llm.generate(["hello"] * 4, params, use_tqdm=False)
            return [output.outputs[0].text for output in outputs]

    one = first_run(5)
    assert len(set(one)) == 4
    assert first_run(5) == one
    assert first_run(6) != one


def test_beam_search_has_prompt_text_and_scores(llm):
    prompt = llm.get_tokenizer().encode("hello")
    [output] = llm.beam_search("hello", BeamSearchParams(beam_width=3, max_tokens=5))
    scores = [sequence.cum_logprob for sequence in output.sequences]
    assert len(scores) == 3
    assert all(score < 0 for score in scores)
    for sequence in output.sequences:
        assert sequence.tokens[: len(prompt)] == prompt
        assert len(sequence.tokens) <= len(prompt) + 5


def test_chat_is_generate_on_the_rendered_prompt(llm):
    messages = [{"role": "user", "content": "hello"}]
    [chat] = llm.chat(messages, PARAMS[0], use_tqdm=False)
    text = llm.get_tokenizer().apply_chat_template(messages, tokenize=False)
    assert chat.prompt == text
    [same] = llm.generate(text, PARAMS[0], use_tqdm=False)
    assert same.prompt_token_ids == chat.prompt_token_ids
    assert answer(same) == answer(chat)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ("", "empty"),
        ("word " * 400, "max_model_len is 256"),
        ([304], "token id 304 .* out of range"),
        ([-1], "token id -1"),
    ],
)
def test_bad_prompts_are_refused_and_the_next_request_works(llm, prompts, message):
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompts, use_tqdm=False)
    assert llm.generate("hello", PARAMS[0], use_tqdm=False)[0].finished


def test_without_a_tokenizer_token_ids_are_served(options):
    with LLM(**options, skip_tokenizer_init=True) as llm:
        [output] = llm.generate([5, 6], PARAMS[0], use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 12
        assert output.outputs[0].text == ""
        with pytest.raises(InvalidRequestError, match="tokenizer"):
            llm.generate("hello", use_tqdm=False)
        with pytest.raises(ConfigError, match="skip_tokenizer_init"):
            llm.get_tokenizer()
        with pytest.raises(InvalidRequestError, match="tokenizer"):
            llm.chat([{"role": "user", "content": "hello"}], use_tqdm=False)


def test_a_cache_that_does_not_fit_is_refused_before_it_harms(options):
    with pytest.raises(OutOfMemoryError, match="kv_cache_memory_bytes"):
        LLM(**options, kv_cache_memory_bytes=1 << 50)
    with pytest.raises(OutOfMemoryError, match="kv_cache_memory_bytes=1 is less"):
        LLM(**options, kv_cache_memory_bytes=1)
    with pytest.raises(ConfigError, match="max_model_len=200 does not fit"):
        LLM(**options, max_model_len=200, num_gpu_blocks_override=10)
    with pytest.raises(ConfigError, match="max_model_len=257 is more than the 256 positions"):
        LLM(**options, max_model_len=257)


def test_tables_that_do_not_fit_name_the_arguments_to_lower(options, monkeypatch):
    """What the engine keeps for each running sequence may be more than there is memory."""

    def fail(*args, **kwargs):
        raise MemoryError("Unable to allocate 244. GiB")

    monkeypatch.setattr("quire.engine.engine.SequenceTable", fail)
    with pytest.raises(
        OutOfMemoryError, match=r"max_num_seqs=7 .*max_model_len=40 .*lower.*244\. GiB"
    ):
        LLM(**{**options, "max_num_seqs": 7, "max_model_len": 40})


def test_the_length_shrinks_to_the_cache_when_it_was_not_asked_for(options):
    with LLM(**options, num_gpu_blocks_override=11) as llm:
        with pytest.raises(InvalidRequestError, match="max_model_len is 40"):
            llm.generate([[1] * 40], use_tqdm=False)
        params = SamplingParams(max_tokens=None, ignore_eos=True)
        [output] = llm.generate([[1] * 10], params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 30


@pytest.mark.parametrize("how", ["close", "del", "with", "after an error", "async"])
def test_weights_and_cache_are_freed_at_once(options, how):
    """By reference counts alone, while results and exceptions of it are still held."""
    gc.collect()
    gc.disable()
    try:
        llm = LLM(**options)
        kept = [llm.generate("hello", PARAMS[0], use_tqdm=False)]
        tensors = [weakref.ref(t) for t in live_tensors(llm)]
        assert len(tensors) > 10
        if how == "close":
            llm.close()
        elif how == "with":
            with llm:
                pass
        elif how == "async":
            async_llm = AsyncLLM.from_llm(llm)
            del llm, async_llm
        elif how == "after an error":
            bad = SamplingParams(max_tokens=3, logits_processors=[lambda ids, row: 1 / 0])
            results = llm._run(["hello", "a"], [bad, PARAMS[0]])
            kept.append(results)
            assert isinstance(results[0], Exception)
            llm.close()
        else:
            del llm
        assert [t for t in (ref() for ref in tensors) if t is not None] == []
    finally:
        gc.enable()
    assert kept


def live_tensors(llm):
    """Return the tensors that hang on an engine and are storage of their own."""
    seen, found, todo = set(), [], [llm.llm_engine]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif isinstance(thing, dict):
            todo.extend(thing.values())
        elif isinstance(thing, (list, tuple, set)):
            todo.extend(thing)
        elif type(thing).__module__.startswith("quire."):
            todo.extend(vars(thing).values() if hasattr(thing, "__dict__") else ())
            for kind in type(thing).__mro__:
                for name in getattr(kind, "__slots__", ()):
                    if hasattr(thing, name):
                        todo.append(getattr(thing, name))
    return found


def test_closing_while_threads_generate_ends_them(options):
    llm = LLM(**options)
    long = SamplingParams(max_tokens=200, ignore_eos=True)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(llm.generate, ["a"] * 4, long, use_tqdm=False) for _ in range(3)]
        next(llm.stream("b", long))
        llm.close()
        for future in futures:
            with pytest.raises(EngineClosedError):
                future.result()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(best_of=3, max_tokens=8, seed=1),
        SamplingParams(n=2, best_of=3, max_tokens=8, seed=1),
        SamplingParams(n=1, best_of=2, use_beam_search=True, max_tokens=8),
        SamplingParams(n=2, use_beam_search=True, max_tokens=8),
    ],
    ids=["best_of", "n and best_of", "best of beams", "beams"],
)
def test_a_stream_of_what_is_compared_first_has_one_piece(llm, params):
    """The completions to show are known only when all of them have ended."""
    [output] = llm.stream("hello world", params)
    [expected] = llm.generate("hello world", params, use_tqdm=False)
    assert output.finished
    assert [c.text for c in output.outputs] == [c.text for c in expected.outputs]


def test_final_outputs_only_are_asked_of_the_engine(llm):
    """A batch must not pay for texts in between that nobody reads."""
    kinds = []
    engine = llm.llm_engine
    add = engine.add_request
    engine.add_request = lambda request: (kinds.append(request.params.output_kind), add(request))
    try:
        llm.generate(["a", "b"], PARAMS[0], use_tqdm=False)
    finally:
        del engine.add_request
    assert kinds == [RequestOutputKind.FINAL_ONLY] * 2


@pytest.mark.parametrize(
    "name", ["atuo", "no/such/folder", "~nobody-of-that-name/x", "x" * 5000, "a\0b"], ids=range(5)
)
def test_a_generation_config_that_is_not_there_is_refused(options, name):
    """A misspelt "auto" is not taken for a folder that recommends nothing."""
    with pytest.raises(ConfigError, match="generation_config") as caught:
        LLM(**options, generation_config=name)
    assert len(str(caught.value)) < 500


def test_an_end_token_past_the_vocabulary_does_no_harm(options, tmp_path):
    """It can never be generated; min_tokens, which masks end tokens, works."""
    folder = shutil.copytree(options["model"], tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9999]}')
    with LLM(**{**options, "model": folder}) as llm:
        [output] = llm.generate("a", SamplingParams(min_tokens=3, max_tokens=3), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3


def test_a_beam_search_ends_hypotheses_at_stop_strings(llm):
    """With the string in their text or without."""
    plain = llm.beam_search([5, 6], BeamSearchParams(2, 8, ignore_eos=True))[0].sequences[0].text
    stop = plain[len(plain) // 2 :][:3]
    for kept in (False, True):
        params = BeamSearchParams(2, 8, ignore_eos=True, stop=stop, include_stop_str_in_output=kept)
        [output] = llm.beam_search([5, 6], params)
        [ended] = [beam for beam in output.sequences if beam.stop_reason == stop]
        assert plain.startswith(ended.text)
        assert ended.text.endswith(stop) == kept
        assert (stop in ended.text) == kept


def test_beam_search_refuses_other_parameters(llm):
    """SamplingParams are no BeamSearchParams, and the message says so."""
    with pytest.raises(InvalidRequestError, match="must be BeamSearchParams"):
        llm.beam_search([5, 6], SamplingParams())


def test_a_tokenizer_may_lie_elsewhere(options, llm, tmp_path):
    """The model's folder needs none then."""
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    shutil.copytree(options["model"], model)
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(model / name, tokenizer / name)
    with LLM(**{**options, "model": model}, tokenizer=tokenizer) as other:
        [output] = other.generate("hello world", PARAMS[0], use_tqdm=False)
    [expected] = llm.generate("hello world", PARAMS[0], use_tqdm=False)
    assert output.prompt_token_ids == expected.prompt_token_ids
    assert answer(output) == answer(expected)


def test_overrides_reach_the_model_and_its_chats(options):
    """hf_overrides change the model that runs, and chat_template what a chat is written by."""
    messages = [{"role": "user", "content": "hello"}]
    with LLM(
        **options,
        hf_overrides={"max_position_embeddings": 64},
        chat_template="{{ messages[0]['content'] }} dog",
    ) as llm:
        assert llm.llm_engine.limits.max_model_len == 64
        [output] = llm.chat(messages, PARAMS[0], use_tqdm=False)
        assert output.prompt == "hello dog"
