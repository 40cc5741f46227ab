"""Defects that were found by trying to break the engine, and that must not come back."""

from __future__ import annotations

import asyncio
import threading
from queue import Empty, SimpleQueue

import pytest
import torch

from quire import LLM, AsyncLLM, EngineClosedError, RequestFailedError, SamplingParams
from quire.engine.block_pool import BlockPool, root_key
from quire.engine.scheduler import Scheduler
from quire.engine.sequence import Sequence
from quire.errors import ConfigError, InvalidRequestError, ModelNotFoundError
from quire.models.hub import resolve
from quire.sampling_params import RequestOutputKind
from quire.tokenizer.detokenizer import Detokenizer

PROMPT = [11, 42, 7, 99, 150]
WAIT = 20.0


def within(function):
    """Return what a call on another thread returns or raises; a call that hangs is a failure."""
    results = SimpleQueue()

    def run():
        try:
            results.put(function())
        except BaseException as error:
            results.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return results.get(timeout=WAIT)
    except Empty:
        pytest.fail("the call hangs")


def answer(llm, **options):
    params = SamplingParams(max_tokens=2, ignore_eos=True, **options)
    return within(lambda: llm.generate([PROMPT], params, use_tqdm=False))


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama, dtype="float32") as llm:
        yield llm


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_exit_raised_in_a_logits_processor_does_not_end_the_engines_thread(llm, error):
    """What is no Exception fails the request too: a thread that dies leaves all callers waiting."""

    def leave(token_ids, logits):
        raise error("out")

    assert isinstance(answer(llm, logits_processors=[leave]), RequestFailedError)
    assert answer(llm)[0].finished


def test_an_exit_raised_in_a_receiver_of_outputs_loses_its_own_request_only(llm):
    """A sink is somebody else's code, whatever it raises."""
    told = threading.Event()

    def leave(event):
        told.set()
        raise SystemExit

    request = llm._make_request(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True))
    llm.engine_loop.submit([(request, leave)])
    assert told.wait(WAIT)
    assert answer(llm)[0].finished
    assert llm.get_metrics()["num_unfinished_requests"] == 0


def test_an_engine_beyond_repair_closes_and_tells_everybody_why(tiny_llama, monkeypatch):
    """When not even new books can be begun after a step broke down, nobody is left waiting."""
    llm = LLM(tiny_llama, dtype="float32")
    answer(llm)
    engine = llm.llm_engine
    monkeypatch.setattr(engine._sampler, "sample", lambda *args: 1 / 0)
    monkeypatch.setattr(engine.scheduler, "finish", lambda sequence: 1 / 0)
    monkeypatch.setattr(engine, "_begin", lambda: [][0])
    for _ in range(2):  # the request that was in flight, and one that comes after
        error = answer(llm)
        assert isinstance(error, EngineClosedError)
        assert "IndexError" in str(error)
    assert engine._runner is None, "the weights stay"
    assert within(llm.close) is None


def test_a_processor_that_waits_for_its_own_engine_is_refused(llm):
    """The engine's thread cannot wait for itself: an error instead of a standstill."""

    def ask(token_ids, logits):
        llm.generate([PROMPT], SamplingParams(max_tokens=1), use_tqdm=False)
        return logits

    def read(token_ids, logits):
        next(llm.stream(PROMPT, SamplingParams(max_tokens=1)))
        return logits

    for processor in (ask, read):
        error = answer(llm, logits_processors=[processor])
        assert isinstance(error, RequestFailedError)
        assert "engine's own thread" in str(error)
    assert answer(llm)[0].finished


@pytest.mark.parametrize("method", ["append", "text"])
@pytest.mark.parametrize("options", [{}, {"n": 2, "use_beam_search": True}])
def test_a_tokenizer_that_fails_on_a_request_fails_no_other(llm, monkeypatch, method, options):
    """Text is made for each request by itself."""
    wanted = answer(llm, temperature=0)[0].outputs[0].token_ids
    original = getattr(Detokenizer, method)

    def fail(self, *args, **kwargs):
        if self._includes_stop:
            raise ValueError("no such piece")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Detokenizer, method, fail)
    good = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    bad = SamplingParams(include_stop_str_in_output=True, stop="zzz", **options)
    results = within(lambda: llm._run([PROMPT] * 3, [good, bad, good]))
    assert isinstance(results[1], RequestFailedError)
    assert "no such piece" in str(results[1])
    assert results[0].outputs[0].token_ids == results[2].outputs[0].token_ids == wanted
    llm.engine_loop.call(lambda engine: engine.check_integrity())


@pytest.mark.parametrize("stop", [None, "zzz"])
def test_a_tokenizer_that_fails_on_an_aborted_request_fails_no_other(llm, monkeypatch, stop):
    """Text that is made when a request is aborted is its own affair, too."""
    original = Detokenizer.append

    def fail(self, token_ids):
        if self._includes_stop:
            raise ValueError("no such piece")
        return original(self, token_ids)

    monkeypatch.setattr(Detokenizer, "append", fail)
    good = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    bad = SamplingParams(
        include_stop_str_in_output=True,
        stop=stop,
        max_tokens=60,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    def run(engine):
        for name, params in (("good", good), ("bad", bad), ("other", bad)):
            engine.add_request(engine.processor.process(PROMPT, params, request_id=name))
        outputs = engine.step()
        outputs += engine.abort(["bad", "other"])
        while engine.has_unfinished_requests:
            outputs += engine.step()
        engine.check_integrity()
        return outputs

    outputs = within(lambda: llm.engine_loop.call(run))
    failed = [each for each in outputs if isinstance(each, RequestFailedError)]
    assert {each.request_id for each in failed} == {"bad", "other"}
    assert all("no such piece" in str(each) for each in failed)
    [last] = [each for each in outputs if each not in failed and each.finished]
    assert len(last.outputs[0].token_ids) == 60


@pytest.mark.parametrize("options", [{"n": 10**9}, {"best_of": 10**9}])
@pytest.mark.parametrize("beams", [True, False])
def test_a_request_for_endless_completions_is_refused_before_it_harms(llm, options, beams):
    """Making a billion sequences would hold up the engine's thread for everybody."""
    error = answer(llm, **options, use_beam_search=beams)
    assert isinstance(error, InvalidRequestError)
    assert "at most 16384" in str(error)


def test_the_largest_top_k_is_that_of_the_whole_vocabulary(llm):
    """A number too large for the sampler's arrays failed every request in flight."""
    huge, all_of_it = (
        answer(llm, top_k=top_k, seed=3)[0].outputs[0].token_ids for top_k in (2**63 - 1, 0)
    )
    assert list(huge) == list(all_of_it)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_any_kind_are_no_token_ids(llm, kind):
    """Text as bytes is refused and not read as one token id per byte."""
    error = within(lambda: llm.generate([kind(b"ab")], use_tqdm=False))
    assert isinstance(error, InvalidRequestError)
    assert kind.__name__ in str(error)


def make_scheduler(**options):
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 8, **options}
    return Scheduler(BlockPool(100, 4), **options)


def make_sequence(order, tokens):
    return Sequence(str(order), 0, tokens, order=order, root_key=root_key())


def test_a_sequence_does_not_wait_for_one_behind_it_to_compute_their_common_beginning():
    """A worse sequence may be kept from running, and a better one with it, for ever."""
    scheduler = make_scheduler()
    common = list(range(40))
    worse, better = make_sequence((5, 0, 0), common), make_sequence((1, 1, 0), [*common, 7])
    scheduler.add(worse)
    scheduler.update(scheduler.schedule())  # its first two blocks of ten
    scheduler.add(better)
    scheduler.max_num_batched_tokens = 40
    assert scheduler.schedule().sequences == [worse, better]
    assert better.num_computed_tokens == 8


def test_no_more_sequences_are_looked_at_than_can_enter(monkeypatch):
    """With thousands waiting for a common beginning, a step does not go through all of them."""
    scheduler = make_scheduler()
    for i in range(50):
        scheduler.add(make_sequence((0, i, 0), [1, 2, 3, 4, 5, i]))
    looked_at = []
    match = scheduler._match
    monkeypatch.setattr(scheduler, "_match", lambda s: looked_at.append(s) or match(s))
    plan = scheduler.schedule()
    assert len(plan.sequences) == 1
    assert len(looked_at) <= 4
    scheduler.update(plan)
    assert len(scheduler.schedule().sequences) == 3


def test_nobody_is_displaced_for_a_sequence_that_will_not_enter_yet():
    """A better sequence that waits for a running one's blocks leaves the worse ones running."""
    scheduler = make_scheduler(max_num_seqs=2, preempt_by_priority=True)
    first, worse = make_sequence((0, 0, 0), list(range(40))), make_sequence((5, 1, 0), [9])
    for sequence in (worse, first):
        scheduler.add(sequence)
        scheduler.update(scheduler.schedule())
    assert scheduler.running == [first, worse]
    scheduler.add(make_sequence((1, 2, 0), [*range(40), 7]))
    plan = scheduler.schedule()
    assert not plan.preempted
    assert scheduler.running == [first, worse]


def test_the_logprobs_of_a_beam_have_the_text_of_their_tokens(llm):
    """As those of any other completion do."""
    [output] = answer(llm, n=2, use_beam_search=True, logprobs=0)
    for completion in output.outputs:
        tokens = zip(completion.token_ids, completion.logprobs, strict=True)
        assert all(
            entry[token_id].decoded_token == llm.get_tokenizer().decode_token(token_id)
            for token_id, entry in tokens
        )


@pytest.mark.parametrize("k", [1, 9, -1])
def test_beams_show_the_logprobs_that_were_asked_for(llm, k):
    """They are those of the same tokens as a prompt's, the chosen one and the k best, by rank."""
    [output] = answer(llm, n=2, use_beam_search=True, logprobs=k)
    for completion in output.outputs:
        ids = [*output.prompt_token_ids, *completion.token_ids]
        [oracle] = llm.generate(
            {"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=k)
        )
        expected = oracle.prompt_logprobs[-len(completion.token_ids) :]
        for entry, other in zip(completion.logprobs, expected, strict=True):
            assert {i: (e.rank, e.decoded_token) for i, e in entry.items()} == {
                i: (e.rank, e.decoded_token) for i, e in other.items()
            }
            for token_id, value in entry.items():
                assert value.logprob == pytest.approx(other[token_id].logprob, abs=1e-4)


def test_a_generation_config_that_is_not_there_is_refused(tiny_llama, tmp_path):
    """A misspelled path must not silently leave the model's recommendations out."""
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="generation_config"):
            LLM(tiny_llama, dtype="float32", generation_config=str(path))


@pytest.mark.parametrize(
    "options", [{"max_model_len": 1}, {"block_size": 1, "num_gpu_blocks_override": 2}]
)
def test_an_engine_that_could_serve_nothing_is_refused(tiny_llama, options):
    """One token given and one generated is the shortest request there is."""
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(tiny_llama, dtype="float32", **options)


@pytest.mark.parametrize(
    "name",
    [
        "a" * 5000,
        "~nobody-of-this-name/model",
        "http://[::1",
        "https://huggingface.co/../..",
        "o/..",
    ],
)
def test_names_that_lead_nowhere_are_told_so_and_nothing_else(name):
    """Neither the file system's errors nor the URL parser's come through."""
    with pytest.raises(ModelNotFoundError, match="model is"):
        resolve(name)


def test_outputs_are_the_callers_own(llm):
    """Changing the ids in an output reaches neither the request that runs nor the prefix cache."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompt = list(range(20, 60))
    [expected] = llm.generate([prompt], params, use_tqdm=False)
    llm.reset_prefix_cache()
    token_ids = []
    for output in llm.stream(prompt, params):
        token_ids += output.outputs[0].token_ids
        output.prompt_token_ids[-1] = 3
        output.prompt_token_ids *= 400
    assert token_ids == expected.outputs[0].token_ids
    [again] = llm.generate([prompt], params, use_tqdm=False)
    assert again.num_cached_tokens > 0
    assert again.outputs[0].token_ids == expected.outputs[0].token_ids


@pytest.mark.parametrize("door", ["generate", "get_metrics", "reset_prefix_cache"])
def test_the_async_doors_do_not_wait_on_the_engines_own_thread(llm, door):
    """A logits processor that asks the engine it runs in gets an error, not a hang."""

    async def ask(async_llm):
        if door == "generate":
            async for _ in async_llm.generate(PROMPT, SamplingParams(max_tokens=1)):
                pass
        else:
            await getattr(async_llm, door)()

    def processor(token_ids, logits):
        asyncio.run(ask(AsyncLLM.from_llm(llm)))
        return logits

    error = answer(llm, logits_processors=[processor])
    assert isinstance(error, RequestFailedError)
    assert "engine's own thread" in str(error)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_torchs_default_dtype_changes_nothing(tiny_llama, default, dtype):
    """Programs set it for their own models; ours say what they need."""

    def results():
        with LLM(tiny_llama, dtype=dtype) as llm:
            plain = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            params = [
                plain,
                SamplingParams(max_tokens=4, logprobs=2, seed=1, ignore_eos=True),
                SamplingParams(n=2, use_beam_search=True, max_tokens=4, ignore_eos=True),
            ]
            outputs = llm.generate([PROMPT * 4] * 3, params, use_tqdm=False)
            return [[c.token_ids for c in output.outputs] for output in outputs]

    expected = results()
    torch.set_default_dtype(default)
    try:
        assert results() == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("part", ["prompt_logprobs", "sample"])
def test_what_breaks_in_one_step_ends_the_requests_of_that_step_only(llm, monkeypatch, part):
    """Prompt logprobs that fail concern their request alone; a broken sampler, those it served."""
    tokenizer, sampler = llm.llm_engine.tokenizer, llm.llm_engine._sampler

    def broken(*args):
        raise MemoryError("no room")

    neighbour = llm.stream([5, 6, 7], SamplingParams(max_tokens=200, ignore_eos=True))
    next(neighbour)
    if part == "prompt_logprobs":
        monkeypatch.setattr(tokenizer, "decode_token", broken)
        error = answer(llm, prompt_logprobs=1)
        assert isinstance(error, RequestFailedError)
        assert "no room" in str(error)
        monkeypatch.undo()
        assert sum(len(output.outputs[0].token_ids) for output in neighbour) >= 150
    else:
        monkeypatch.setattr(sampler, "sample", broken)
        with pytest.raises(RequestFailedError, match="no room"):
            list(neighbour)
        monkeypatch.undo()
    assert answer(llm)[0].finished
    assert llm.get_metrics()["num_unfinished_requests"] == 0
