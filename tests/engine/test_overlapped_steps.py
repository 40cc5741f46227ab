"""Steps that overlap: the same answers, and whatever goes wrong concerns the same requests."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import LLM, PoolingParams, RequestFailedError, SamplingParams
from quire.errors import DeviceLostError, EngineClosedError
from quire.kernels import get_backend
from quire.sampling.sampler import PendingTokens, Sampler
from quire.structured_outputs import StructuredOutputsParams

PROMPT = [11, 42, 7, 99, 150, 31, 8, 64, 23, 5, 77]
SCARCE = {"block_size": 4, "num_gpu_blocks_override": 16, "max_model_len": 60, "max_num_seqs": 6}
COMMON = {"dtype": "float32", "scheduling_policy": "priority", **SCARCE}
WAYS = {
    "plain": {"async_scheduling": False},
    "overlapped": {"async_scheduling": True},
    "swapped": {"async_scheduling": False, "swap_space": 0.01},
    "both, in chunks": {"async_scheduling": True, "swap_space": 0.01, "max_num_batched_tokens": 9},
}


def leave_out_even_tokens(token_ids, logits):
    logits[::2] = -math.inf
    return logits


KINDS = [
    {"temperature": 0},
    {"temperature": 0, "ignore_eos": True, "logprobs": 2},
    {"temperature": 1.2, "stop_token_ids": list(range(40, 90))},
    {"temperature": 1.5, "stop_token_ids": list(range(10, 90)), "min_tokens": 2},
    {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "stop": ["e", "a "], "min_tokens": 1},
    {"temperature": 0.9, "n": 3, "stop_token_ids": list(range(100, 130))},
    {"temperature": 1.0, "n": 1, "best_of": 2, "logprobs": 0},
    {"temperature": 0, "repetition_penalty": 1.4, "presence_penalty": 0.4, "logprobs": 1},
    {"temperature": 0, "frequency_penalty": 1.0, "bad_words": ["the"], "logit_bias": {9: 3.0}},
    {"temperature": 1.0, "min_p": 0.05, "allowed_token_ids": list(range(20, 60))},
    {"temperature": 0, "prompt_logprobs": 1, "ignore_eos": True},
    {"temperature": 0, "n": 2, "use_beam_search": True},
    {"temperature": 0, "logits_processors": [leave_out_even_tokens]},
    {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(regex="(ab|cd)+e?")},
    {"temperature": 0, "structured_outputs": StructuredOutputsParams(choice=["hello", "help"])},
]

requests = st.builds(
    lambda kind, seed, max_tokens, prompt, priority: (
        prompt,
        SamplingParams(**{**KINDS[kind], "seed": seed, "max_tokens": max_tokens}),
        priority,
    ),
    st.integers(0, len(KINDS) - 1),
    st.integers(0, 99),
    st.sampled_from([2, 5, 16, 24]),
    st.sampled_from([PROMPT, [*PROMPT, 9], PROMPT[:3], [5], list(range(20, 50))]),
    st.integers(0, 2),
)
arrivals = st.lists(st.tuples(st.integers(0, 3), requests), min_size=4, max_size=9)


@pytest.fixture(scope="module")
def engines(tiny_llama):
    made = {name: LLM(tiny_llama, **COMMON, **way) for name, way in WAYS.items()}
    yield made
    for llm in made.values():
        llm.close()


@pytest.fixture
def llm(engines):
    yield engines["overlapped"]
    engines["overlapped"].engine_loop.call(check_all_is_free)


def check_all_is_free(engine):
    engine.check_integrity()
    assert engine.metrics()["kv_cache_usage"] == 0
    host_blocks = engine.scheduler.host_blocks
    assert host_blocks is None or host_blocks.num_used == 0
    assert engine._in_flight is None


def reason(completion):
    return completion.finish_reason, completion.stop_reason


def content(output):
    """Return what a request is told, without what is a matter of time."""
    if isinstance(output, RequestFailedError):
        return str(output)
    if get_backend("cpu").name != "cpu":  # others round by what is computed together
        return [(c.index, c.token_ids, reason(c)) for c in output.outputs]
    return (
        output.prompt_logprobs,
        [
            (c.index, c.text, c.token_ids, c.logprobs, c.cumulative_logprob, reason(c))
            for c in output.outputs
        ],
    )


def run(llm, work):
    return llm.engine_loop.call(work)


def submit(engine, name, params=None, prompt=PROMPT, priority=0):
    params = params or SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    request = engine.processor.process(prompt, params, request_id=name, priority=priority)
    engine.add_request(request)


def finish(engine, outputs=()):
    """Step to the end; return the last output of each request."""
    last = {output.request_id: output for output in outputs}
    while engine.has_work:
        for output in engine.step():
            last[output.request_id] = output
        engine.check_integrity()
    check_all_is_free(engine)
    return last


def play(engine, script, aborted):
    """Let requests arrive, each some steps after the last, and abort some a while after that."""
    engine.reset_prefix_cache()
    last, leaving = {}, {}
    for number, (pause, (prompt, params, priority)) in enumerate(script):
        submit(engine, str(number), params.clone(), prompt, priority)
        if number in aborted:
            leaving[str(number)] = aborted[number]
        for _ in range(pause):
            for output in engine.step():
                last[output.request_id] = output
            engine.check_integrity()
            for name in [name for name, steps in leaving.items() if steps <= 0]:
                del leaving[name]
                last.update((output.request_id, output) for output in engine.abort([name]))
                engine.check_integrity()
            leaving = {name: steps - 1 for name, steps in leaving.items()}
    return {**last, **finish(engine, last.values())}


def check_equal(engines, script, aborted):
    told = {
        name: run(llm, lambda engine: play(engine, script, aborted))
        for name, llm in engines.items()
    }
    plain = told.pop("plain")
    for name, outputs in told.items():
        assert outputs.keys() == plain.keys()
        for id_, output in outputs.items():
            if int(id_) not in aborted:
                assert content(output) == content(plain[id_]), (name, id_)


@settings(max_examples=12)
@given(arrivals, st.dictionaries(st.integers(0, 8), st.integers(0, 8), max_size=2))
def test_any_mix_of_requests_is_answered_the_same(engines, script, aborted):
    """Whatever arrives when, whoever is aborted, with few blocks and priorities."""
    check_equal(engines, script, aborted)


@pytest.mark.slow
@settings(max_examples=400)
@given(arrivals, st.dictionaries(st.integers(0, 8), st.integers(0, 8), max_size=3))
def test_any_mix_of_requests_is_answered_the_same_at_length(engines, script, aborted):
    """The same, for longer."""
    check_equal(engines, script, aborted)


def test_a_step_is_launched_before_the_last_is_collected(llm, monkeypatch):
    """What it is all for: the model has work while the host looks at tokens."""
    events = []

    def watch(kind, name, event):
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args: (events.append(event), method(*args))[1])

    def work(engine):
        watch(engine._runner, "forward", "forward")
        watch(Sampler, "launch", "launch")
        watch(PendingTokens, "collect", "collect")
        submit(engine, "a", SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        submit(engine, "b", SamplingParams(temperature=0, max_tokens=3, logprobs=1, seed=1))
        assert engine.step() == []
        assert engine._in_flight is not None
        before = engine.metrics()["num_computed_tokens"]
        finish(engine)
        assert engine.metrics()["num_computed_tokens"] - before == 4, "something was in vain"

    run(llm, work)
    step = ["forward", "collect", "launch"]
    assert events == ["forward", "launch", *step, *step, "collect"]


def test_a_token_computed_in_vain_leaves_no_trace(llm):
    """A sequence that ended by its own token was computed one step too far."""
    [free] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    ids = list(free.outputs[0].token_ids)
    end = next(i for i in range(3, 12) if ids[i] not in ids[:i])
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[ids[end]])
    before = llm.get_metrics()["num_computed_tokens"]
    [output] = llm.generate([[*PROMPT]], params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == ids[: end + 1]
    cached = output.num_cached_tokens
    computed = llm.get_metrics()["num_computed_tokens"] - before
    assert computed == len(PROMPT) - cached + end + 1  # end by right, and one in vain


def test_steps_that_look_at_logits_do_not_overlap_and_others_do_again(llm):
    """A processor of logits keeps everybody in its step from going ahead, for as long as it is."""

    def work(engine):
        slow = {"logits_processors": [leave_out_even_tokens]}
        submit(engine, "a", SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
        engine.step()
        assert engine._in_flight is not None
        submit(engine, "b", SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, **slow))
        outputs = engine.step()  # a's first token, and then a token for each
        assert engine._in_flight is None
        assert [output.request_id for output in outputs] == ["a", "a", "b"]
        outputs = engine.step()
        assert [output.finished for output in outputs] == [False, True]
        engine.step()
        assert engine._in_flight is not None
        assert len(finish(engine)["a"].outputs[0].token_ids) == 9

    run(llm, work)


def test_a_forward_that_raises_fails_who_was_in_it_after_the_last_tokens_are_told(llm, monkeypatch):
    """Who ends with the step in flight is not concerned, nor who comes later."""

    def work(engine):
        ending, whole = (
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 8)
        )
        submit(engine, "ending", ending)
        submit(engine, "whole", whole)
        engine.step()
        engine.step()  # the second tokens are in flight
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "forward", lambda batch: 1 / 0)
            outputs = engine.step()
        engine.check_integrity()
        told = {output.request_id: output for output in outputs}
        assert told["ending"].finished
        assert len(told["ending"].outputs[0].token_ids) == 2
        assert "division" in str(told["whole"])
        assert not engine.has_work
        submit(engine, "later", whole)
        assert len(finish(engine)["later"].outputs[0].token_ids) == 8

    run(llm, work)


def test_nan_found_when_a_step_is_collected_fails_one_request(llm, monkeypatch):
    """Its neighbours go on, and what the next step computed for it is in vain."""

    def work(engine):
        submit(engine, "wanted")
        wanted = finish(engine)["wanted"].outputs[0].token_ids
        forward = engine._runner.forward

        def poisoned(batch):
            hidden = forward(batch)
            hidden[1] = math.nan
            return hidden

        for name in "abc":
            submit(engine, name)
        engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "forward", poisoned)
            engine.step()
        outputs = engine.step()
        [failed] = [each for each in outputs if isinstance(each, RequestFailedError)]
        assert failed.request_id == "b"
        assert "NaN" in str(failed)
        last = finish(engine, outputs)
        assert last["a"].outputs[0].token_ids == last["c"].outputs[0].token_ids == wanted

    run(llm, work)


def test_a_step_that_cannot_be_collected_fails_who_was_in_it(llm, monkeypatch):
    """Who has entered since has nothing to do with it."""

    def work(engine):
        submit(engine, "in it")
        engine.step()
        submit(engine, "not in it", prompt=[5, 6])
        with monkeypatch.context() as patch:
            patch.setattr(PendingTokens, "collect", lambda self: 1 / 0)
            [failed] = engine.step()
        assert failed.request_id == "in it"
        engine.check_integrity()
        assert len(finish(engine)["not in it"].outputs[0].token_ids) == 8

    run(llm, work)


def test_a_device_that_is_lost_with_a_step_in_flight_is_said_to_be(tiny_llama, monkeypatch):
    with LLM(tiny_llama, **COMMON, async_scheduling=True) as llm:

        def work(engine):
            submit(engine, "a")
            engine.step()

            def lose(self):
                raise DeviceLostError("gone")

            with monkeypatch.context() as patch:
                patch.setattr(PendingTokens, "collect", lose)
                with pytest.raises(DeviceLostError, match="gone"):
                    engine.step()

        run(llm, work)


def test_an_aborted_request_gets_no_token_of_the_step_in_flight(llm):
    """Its row and its id may be another's when that is collected."""

    def work(engine):
        submit(engine, "wanted", prompt=[5, 6, 7])
        wanted = finish(engine)["wanted"].outputs[0].token_ids
        for name in ("kept", "gone"):
            submit(engine, name)
        engine.step()
        engine.step()
        [output] = engine.abort(["gone"])
        assert output.outputs[0].finish_reason == "abort"
        engine.check_integrity()
        submit(engine, "gone", prompt=[5, 6, 7])  # into the row that has just come free
        last = finish(engine)
        assert last["gone"].outputs[0].token_ids == wanted
        assert len(last["kept"].outputs[0].token_ids) == 8
        for name in ("kept", "gone"):
            submit(engine, name)
        engine.step()
        assert len(engine.abort(["kept", "gone"])) == 2
        assert not engine.has_unfinished_requests
        assert engine.has_work
        assert engine.step() == []
        assert not engine.has_work

    run(llm, work)


def test_the_prefix_cache_can_be_reset_with_a_step_in_flight(llm):
    def work(engine):
        submit(engine, "a")
        wanted = finish(engine)["a"].outputs[0].token_ids
        submit(engine, "b")
        engine.step()
        assert engine.reset_prefix_cache()
        engine.kv_cache_map()
        assert finish(engine)["b"].outputs[0].token_ids == wanted

    run(llm, work)


def test_an_engine_begins_anew_with_a_step_in_flight(llm):
    """What was in flight is forgotten with all else."""

    def work(engine):
        submit(engine, "a")
        engine.step()
        [failed] = engine.restart(RuntimeError("broken"))
        assert "broken" in str(failed)
        assert not engine.has_work
        submit(engine, "b")
        assert len(finish(engine)["b"].outputs[0].token_ids) == 8

    run(llm, work)


def test_an_engine_is_closed_with_a_step_in_flight(tiny_llama):
    llm = LLM(tiny_llama, **COMMON, async_scheduling=True)
    engine = llm.llm_engine

    def work(engine):
        submit(engine, "a")
        engine.step()
        assert engine._in_flight is not None

    run(llm, work)
    llm.close()
    assert engine._runner is None
    assert not engine.has_work
    with pytest.raises(EngineClosedError):
        submit(engine, "b")


def test_embeddings_are_read_beside_a_step_in_flight(llm):
    """Of a prompt whose states are wanted, they are; the generating one goes on."""

    def embed(engine, name):
        request = engine.processor.process(PROMPT, None, request_id=name, pooling=PoolingParams())
        engine.add_request(request)

    def work(engine):
        embed(engine, "wanted")
        wanted = finish(engine)["wanted"].embedding
        submit(engine, "a")
        engine.step()
        embed(engine, "e")
        last = finish(engine)
        assert last["e"].embedding == pytest.approx(wanted, abs=1e-5)
        assert len(last["a"].outputs[0].token_ids) == 8

    run(llm, work)
