"""LLM: order, errors, streams, threads, and the end of its life; over an engine that echoes."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest

from quire import LLM
from quire.errors import EngineClosedError, InvalidRequestError, QuireError, RequestFailedError
from quire.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams


def tokens(count, **kwargs):
    return SamplingParams(max_tokens=count, **kwargs)


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


def wait_until(condition):
    done = threading.Event()
    for _ in range(10_000):
        if condition():
            return
        done.wait(0.002)
    raise AssertionError("waited in vain")


# -- generate ------------------------------------------------------------------------------------


def test_order_is_kept_whatever_finishes_first(llm):
    """Long and short requests come back in the order of the prompts."""
    prompts = ["abc", "de", "f", {"prompt": "gh"}, {"prompt_token_ids": [105, 106]}, [107]]
    params = [tokens(n) for n in (9, 2, 30, 1, 4, 3)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert texts(outputs) == ["abcabcabc", "de", "f" * 30, "g", "ijij", "kkk"]
    assert [output.prompt for output in outputs] == ["abc", "de", "f", "gh", None, None]
    assert all(output.finished for output in outputs)


def test_one_prompt_gives_a_list_of_one(llm):
    for prompt in ("ab", {"prompt": "ab"}, [97, 98], {"prompt_token_ids": [97, 98]}):
        assert texts(llm.generate(prompt, tokens(3), use_tqdm=False)) == ["aba"]


def test_the_callers_parameters_stay_as_they_are(llm):
    """The engine is asked for final outputs only, on a copy."""
    params = tokens(3, output_kind=RequestOutputKind.CUMULATIVE)
    llm.generate(["a", "b"], params, use_tqdm=False)
    list(llm.stream("a", params))
    assert params == tokens(3)


def test_default_parameters_are_the_models(llm):
    [output] = llm.generate("a", use_tqdm=False)
    assert len(output.outputs[0].token_ids) == llm.get_default_sampling_params().max_tokens


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([], None, "at least one prompt"),
        ("", None, "the prompt is empty"),
        ({"prompt_token_ids": []}, None, "empty"),
        (["a", "", "c"], None, "prompt 1 of 3: the prompt is empty"),
        (["a", [5000]], None, "prompt 1 of 2: token id 5000 at position 0"),
        (["a", "b" * 700], None, "prompt 1 of 2: the prompt has 700 tokens, .* is 600"),
        ([["a"]], None, "token ids must be integers"),
        (None, None, "prompts must be"),
        (["a", "b"], [SamplingParams()], "sampling_params has 1 entries for 2 prompts"),
        ("a", {"max_tokens": 3}, "sampling_params must be a SamplingParams"),
        (["a", "b"], [SamplingParams(), 3], "prompt 1 of 2: sampling_params must be"),
    ],
)
def test_one_wrong_entry_stops_the_batch_before_anything_runs(llm, prompts, params, message):
    """The message says which; the engine has seen nothing, and serves the next request."""
    engine = llm.llm_engine
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert engine.said == {}
    assert texts(llm.generate("ab", tokens(2), use_tqdm=False)) == ["ab"]


@pytest.mark.parametrize("options", ["lora_request", "priority", "sampling_params"])
def test_an_integer_too_long_to_print_is_refused_like_any_other(llm, options):
    with pytest.raises(InvalidRequestError, match=options):
        llm.generate("a", use_tqdm=False, **{options: 10**5000})
    for messages in (10**5000, [10**5000]):
        with pytest.raises(InvalidRequestError, match="messages"):
            llm.chat(messages, use_tqdm=False)


def test_what_this_version_has_not_is_refused(llm):
    with pytest.raises(InvalidRequestError, match="lora_request='x': this engine has no adapters"):
        llm.generate("a", lora_request="x", use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="priority=3 needs an engine made with"):
        llm.generate("a", priority=3, use_tqdm=False)


def test_priorities_are_one_for_all_or_one_each(make_llm):
    llm = make_llm(scheduling_policy="priority")
    seen = []
    engine = llm.llm_engine
    add = engine.add_request
    engine.add_request = lambda request: (seen.append(request.priority), add(request))
    llm.generate(["a", "b"], tokens(1), priority=[2, -1], use_tqdm=False)
    llm.generate(["a", "b"], tokens(1), priority=7, use_tqdm=False)
    llm.generate("a", tokens(1), use_tqdm=False)
    assert seen == [2, -1, 7, 7, 0]
    with pytest.raises(InvalidRequestError, match="priority must be an integer, not 'high'"):
        llm.generate("a", priority="high", use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="priority has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], priority=[1], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="priority has 0 entries for 1 prompts"):
        llm.generate("a", priority=[], use_tqdm=False)


def test_a_request_that_fails_fails_alone(llm):
    """The others of its batch are completed first; the error says which prompt and why."""
    engine = llm.llm_engine
    with pytest.raises(RequestFailedError, match=r"prompt 1 of 3: ValueError: no '!'") as caught:
        llm.generate(["ab", "c!", "d"], tokens(50), use_tqdm=False)
    assert isinstance(caught.value.__cause__, ValueError)
    assert sorted(map(len, engine.said.values())) == [1, 50, 50]
    assert engine.aborted == []
    assert texts(llm.generate("ab", tokens(2), use_tqdm=False)) == ["ab"]


def test_run_gives_each_prompt_its_result_or_its_error(llm):
    """What adapters stand on: wrong and failing prompts in their places, the rest served."""
    results = llm._run(["ab", "", "c!", "d"], tokens(2))
    assert [type(result).__name__ for result in results] == [
        "RequestOutput",
        "InvalidRequestError",
        "RequestFailedError",
        "RequestOutput",
    ]
    assert texts([results[0], results[3]]) == ["ab", "dd"]
    assert isinstance(llm._run([""])[0], InvalidRequestError)


def test_a_step_that_breaks_down_fails_its_requests_only(llm, caplog):
    engine = llm.llm_engine
    step = engine.step
    engine.step = lambda: 1 / 0
    with pytest.raises(RequestFailedError, match="division by zero"):
        llm.generate("ab", tokens(2), use_tqdm=False)
    engine.step = step
    assert texts(llm.generate("ab", tokens(2), use_tqdm=False)) == ["ab"]


# -- the progress bar ----------------------------------------------------------------------------


class Bar:
    """Stands in for tqdm."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, total, desc, dynamic_ncols):
        self.total, self.count, self.closed, self.postfix = total, 0, False, ""
        Bar.made.append(self)

    def set_postfix_str(self, text, refresh):
        self.postfix = text

    def update(self, count):
        self.count += count

    def close(self):
        self.closed = True


def test_a_callable_takes_the_place_of_tqdm_and_counts_requests(llm):
    """Tokens per second in and out; the bar is closed also when the batch fails."""
    Bar.made.clear()
    llm.generate(["ab", "cd", "ef"], tokens(3), use_tqdm=Bar)
    with pytest.raises(RequestFailedError):
        llm.generate(["ab", "!"], tokens(3), use_tqdm=Bar)
    with pytest.raises(InvalidRequestError):
        llm.generate(["ab", ""], tokens(3), use_tqdm=Bar)
    assert [(bar.total, bar.count, bar.closed) for bar in Bar.made] == [(3, 3, True), (2, 2, True)]
    assert "in " in Bar.made[0].postfix
    assert "out " in Bar.made[0].postfix
    assert "tok/s" in Bar.made[0].postfix


def test_the_bar_is_on_by_default_and_can_be_off(llm, capsys):
    llm.generate("ab", tokens(1))
    assert "Processed prompts" in capsys.readouterr().err
    llm.generate("ab", tokens(1), use_tqdm=False)
    llm.beam_search("ab", BeamSearchParams(beam_width=2, max_tokens=1))
    list(llm.stream("ab", tokens(1)))
    assert capsys.readouterr().err == ""


# -- chat ----------------------------------------------------------------------------------------


def test_chat_renders_one_conversation_or_several(llm):
    user = {"role": "user", "content": "hi"}
    [output] = llm.chat([user], tokens(3), use_tqdm=False)
    assert output.prompt == "<user>hi<assistant>"
    assert output.outputs[0].text == "<us"
    outputs = llm.chat(
        [[user], [user, user]],
        [tokens(1), tokens(2)],
        add_generation_prompt=False,
        use_tqdm=False,
    )
    assert [output.prompt for output in outputs] == ["<user>hi", "<user>hi<user>hi"]
    assert texts(outputs) == ["<", "<u"]


def test_chat_names_the_conversation_that_is_wrong(llm):
    user, bad = {"role": "user", "content": "hi"}, {"role": "bad", "content": "hi"}
    with pytest.raises(InvalidRequestError, match="conversation 1 of 2: the template refuses"):
        llm.chat([[user], [bad]], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        llm.chat([], use_tqdm=False)
    assert llm.llm_engine.said == {}


def test_chat_hands_on_what_templates_take(make_llm):
    """A template given with the engine is the default, one given with the call goes first."""
    llm = make_llm(chat_template="engine's")
    seen = {}

    def render(messages, **kwargs):
        seen.update(kwargs)
        return [1]

    llm._open_processor().render_chat = render
    user = {"role": "user", "content": "hi"}
    llm.chat([user], tokens(1), use_tqdm=False)
    assert seen["chat_template"] == "engine's"
    llm.chat(
        [user],
        tokens(1),
        chat_template="call's",
        tools=[{"type": "function"}],
        continue_final_message=True,
        add_generation_prompt=False,
        chat_template_kwargs={"x": 1},
        use_tqdm=False,
    )
    assert seen == {
        "chat_template": "call's",
        "tools": [{"type": "function"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "chat_template_kwargs": {"x": 1},
    }


# -- stream --------------------------------------------------------------------------------------


def test_a_stream_yields_what_is_new(llm):
    outputs = list(llm.stream("abc", tokens(5)))
    assert texts(outputs) == ["a", "b", "c", "a", "b"]
    assert [output.finished for output in outputs] == [False] * 4 + [True]


def test_a_stream_is_checked_and_started_at_once(llm):
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        llm.stream("")
    with pytest.raises(InvalidRequestError, match="one prompt"):
        llm.stream(["a", "b"])
    stream = llm.stream("ab", tokens(3))
    engine = llm.llm_engine
    wait_until(lambda: not engine.requests and engine.said)  # it runs with nobody reading
    assert texts(stream) == ["a", "b", "a"]


@pytest.mark.parametrize("end", ["close", "with", "del", "cycle"])
def test_a_stream_that_is_left_early_aborts_its_request(llm, end):
    """However it is left; and the engine serves the next request."""
    engine = llm.llm_engine
    engine.delay = 0.001
    stream = llm.stream("abc", tokens(500))
    request_id = stream.request_id
    next(stream)
    if end == "close":
        stream.close()
        stream.close()
        assert list(stream) == []
    elif end == "with":
        with stream:
            pass
    elif end == "cycle":
        cycle = [stream]
        cycle.append(cycle)
        del stream, cycle
        gc.collect()
    else:
        del stream
    wait_until(lambda: engine.aborted == [request_id])
    assert texts(llm.generate("ab", tokens(2), use_tqdm=False)) == ["ab"]


def test_a_stream_read_to_its_end_aborts_nothing(llm):
    stream = llm.stream("abc", tokens(3))
    list(stream)
    stream.close()
    llm.get_metrics()  # a turn of the loop
    assert llm.llm_engine.aborted == []


def test_a_stream_whose_request_fails_raises_and_ends(llm):
    stream = llm.stream("ab!", tokens(9))
    assert texts([next(stream), next(stream)]) == ["a", "b"]
    with pytest.raises(RequestFailedError, match="no '!' please"):
        next(stream)
    assert list(stream) == []


def test_a_stream_keeps_its_engine_alive(make_llm):
    """`for output in LLM(...).stream(...)` works."""
    assert texts(make_llm().stream("ab", tokens(3))) == ["a", "b", "a"]


def test_a_stream_ends_with_its_engine(llm):
    engine = llm.llm_engine
    with engine.held():
        stream = llm.stream("ab", tokens(300))
        closing = threading.Thread(target=llm.close)
        closing.start()
    closing.join()
    with pytest.raises(EngineClosedError):
        list(stream)


# -- threads -------------------------------------------------------------------------------------


def test_threads_join_one_running_batch(llm):
    """While steps are held, 8 threads' requests gather; the next step runs them all."""
    engine = llm.llm_engine

    def work(i):
        letter = chr(ord("a") + i)
        if i % 2:
            return "".join(texts(llm.stream(letter, tokens(5))))
        return texts(llm.generate([letter] * 3, tokens(5), use_tqdm=False))[2]

    with ThreadPoolExecutor(8) as pool:
        with engine.held():
            first = llm.stream("z", tokens(2))
            wait_until(lambda: engine.begun == 1)
            futures = [pool.submit(work, i) for i in range(8)]
            wait_until(lambda: len(llm.engine_loop._inbox) == 8)
        assert [future.result() for future in futures] == [c * 5 for c in "abcdefgh"]
        assert texts(first) == ["z", "z"]
    assert max(engine.batch_sizes) == 4 * 3 + 4 + 1


def test_request_ids_are_unique_over_threads(llm):
    with ThreadPoolExecutor(4) as pool:
        batches = pool.map(lambda _: llm.generate(["a"] * 25, tokens(1), use_tqdm=False), range(8))
        ids = [output.request_id for batch in batches for output in batch]
    assert sorted(map(int, ids)) == list(range(200))


def test_an_interrupted_wait_aborts_its_requests_and_no_others(llm, monkeypatch):
    """As by Ctrl-C: what waits is interrupted; another thread's requests go on."""
    engine = llm.llm_engine
    engine.delay = 0.001
    other = llm.stream("z", tokens(300))

    class Interrupting(Bar):
        def update(self, count):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b", "c"], [tokens(1), tokens(500), tokens(500)], use_tqdm=Interrupting)
    assert Bar.made[-1].closed
    wait_until(lambda: len(engine.aborted) == 2)
    assert "".join(texts(other)) == "z" * 300
    assert texts(llm.generate("ab", tokens(2), use_tqdm=False)) == ["ab"]


# -- the rest ------------------------------------------------------------------------------------


def test_beam_search_asks_for_beams_and_returns_hypotheses(llm):
    seen = []
    engine = llm.llm_engine
    add = engine.add_request
    engine.add_request = lambda request: (seen.append(request.params), add(request))
    [output] = llm.beam_search("ab", BeamSearchParams(beam_width=3, max_tokens=4))
    assert seen[0].use_beam_search
    assert seen[0].beam_width == 3
    assert seen[0].max_tokens == 4
    assert output.sequences[0].tokens == [97, 98, 97, 98, 97, 98]
    assert output.sequences[0].text == "abab"


def test_metrics_and_prefix_cache_are_asked_on_the_engines_thread(llm):
    assert llm.get_metrics() == {"num_steps": 0.0}
    llm.generate("ab", tokens(3), use_tqdm=False)
    assert llm.get_metrics() == {"num_steps": 3.0}
    assert llm.reset_prefix_cache() is True
    assert llm.get_tokenizer().decode([97]) == "a"


def test_a_closed_llm_says_so_everywhere(llm):
    """Every door gives EngineClosedError; closing twice is fine."""
    engine = llm.llm_engine
    assert not llm.closed
    with llm as same:
        assert same is llm
        llm.generate("a", tokens(1), use_tqdm=False)
    llm.close()
    assert llm.closed
    assert engine.closed
    assert "closed" in repr(llm)
    for door in (
        lambda: llm.generate("a", use_tqdm=False),
        lambda: llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False),
        lambda: llm.stream("a"),
        lambda: llm._run(["a"]),
        lambda: llm.beam_search("a", BeamSearchParams(beam_width=2, max_tokens=1)),
        llm.get_metrics,
        llm.get_tokenizer,
        llm.get_default_sampling_params,
        llm.reset_prefix_cache,
        llm.__enter__,
        lambda: llm.llm_engine,
        lambda: llm.engine_loop,
    ):
        with pytest.raises(EngineClosedError, match="make a new one"):
            door()


def test_closing_ends_the_calls_that_wait(llm):
    """A thread inside generate gets EngineClosedError instead of waiting for ever."""
    engine = llm.llm_engine
    engine.delay = 0.001
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(llm.generate, ["a", "b"], tokens(500), use_tqdm=False)
        wait_until(lambda: len(engine.said) == 2)
        llm.close()
        with pytest.raises(EngineClosedError):
            future.result()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", ["del", "close"])
def test_the_engine_is_freed_without_the_garbage_collector(engine_threads, make_llm, used, how):
    """Neither a used LLM's thread nor any cycle holds the engine once the LLM is gone."""
    llm = LLM("echo")
    engine = weakref.ref(llm.llm_engine)
    gc.disable()
    try:
        if used:
            llm.generate(["a", "b"], tokens(3), use_tqdm=False)
            assert next(llm.stream("a", tokens(50))).outputs[0].text == "a"
            with pytest.raises(QuireError):
                llm.generate(["a", "!"], tokens(3), use_tqdm=False)
            llm.get_metrics()
        if how == "close":
            llm.close()
        else:
            del llm
        wait_until(lambda: engine() is None)
    finally:
        gc.enable()
    assert not engine_threads()


def test_no_thread_runs_before_the_first_request(engine_threads, llm):
    """So that a process can fork with a loaded model."""
    llm.get_tokenizer()
    llm.get_default_sampling_params()
    with pytest.raises(InvalidRequestError):
        llm.generate([""], use_tqdm=False)
    assert not engine_threads()
    llm.generate("a", tokens(1), use_tqdm=False)
    assert len(engine_threads()) == 1
