"""Defects that were found by trying to break the engine, and that must not come back."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue

import pytest

from quire import LLM, EngineClosedError, RequestFailedError, SamplingParams
from quire.errors import InvalidRequestError

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


@pytest.fixture
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


def test_an_engine_beyond_repair_closes_and_tells_everybody_why(llm, monkeypatch):
    """When not even the requests of a broken step can be ended, nobody is left waiting."""
    answer(llm)
    engine = llm.llm_engine
    monkeypatch.setattr(engine._sampler, "sample", lambda *args: 1 / 0)
    monkeypatch.setattr(engine.scheduler, "finish", lambda sequence: [][0])
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


@pytest.mark.parametrize("options", [{"n": 10**9}, {"best_of": 10**9}])
@pytest.mark.parametrize("beams", [True, False])
def test_a_request_for_endless_completions_is_refused_before_it_harms(llm, options, beams):
    """Making a billion sequences would hold up the engine's thread for everybody."""
    error = answer(llm, **options, use_beam_search=beams)
    assert isinstance(error, InvalidRequestError)
    assert "at most 16384" in str(error)


def test_a_top_k_beyond_any_integer_type_is_that_of_the_whole_vocabulary(llm):
    """A number too large for the sampler's arrays failed every request in flight."""
    huge, all_of_it = (
        answer(llm, top_k=top_k, seed=3)[0].outputs[0].token_ids for top_k in (2**70, 0)
    )
    assert list(huge) == list(all_of_it)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_any_kind_are_no_token_ids(llm, kind):
    """Text as bytes is refused and not read as one token id per byte."""
    error = within(lambda: llm.generate([kind(b"ab")], use_tqdm=False))
    assert isinstance(error, InvalidRequestError)
    assert kind.__name__ in str(error)
