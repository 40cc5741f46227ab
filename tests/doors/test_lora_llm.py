"""Adapters through whole engines: each request has its own weights, and never another's.

The oracle of an adapter is the checkpoint that it was merged into, in an engine of its own.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from adapters import TENSORS_FILE, merge_adapter, write_adapter
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from quire import LLM, BeamSearchParams, LoRARequest, PoolingParams, SamplingParams
from quire.errors import (
    AdapterError,
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    RequestFailedError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], list(range(20, 61))]
SHAPES = {
    0: {"rank": 4},
    1: {"rank": 1, "targets": ["q_proj", "v_proj"], "size": 1.5},
    2: {"rank": 16, "targets": ["gate_proj", "up_proj", "down_proj"]},
    3: {"rank": 7, "targets": ["k_proj", "o_proj"], "size": 1.5},
}
"""Ranks and modules of the adapters, by seed."""


def write(folder: Path, checkpoint: Path, seed: int) -> Path:
    return write_adapter(folder, checkpoint, seed=seed, **SHAPES[seed % 4])


def tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def named(folder: Path, name: str = "any", **options) -> LoRARequest:
    return LoRARequest(name, lora_path=folder, **options)


@pytest.fixture(scope="module")
def folders(tiny_llama, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [write(root / f"a{seed}", tiny_llama, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def wanted(tiny_llama, tmp_path_factory):
    """``wanted(seed)``: the greedy tokens of the prompts by the merged model; None: by the base."""

    @functools.cache
    def tokens_of(seed: int | None) -> list[list[int]]:
        folder = tiny_llama
        if seed is not None:
            root = tmp_path_factory.mktemp("merged")
            folder = merge_adapter(
                root / "model", tiny_llama, write(root / "adapter", tiny_llama, seed)
            )
        with LLM(folder, dtype="float32") as llm:
            return tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False))

    return tokens_of


@pytest.fixture(scope="module")
def make(tiny_llama):
    def make_llm(**options) -> LLM:
        return LLM(tiny_llama, **{"dtype": "float32", "enable_lora": True, **options})

    return make_llm


@pytest.fixture(scope="module")
def shared(make):
    with make(max_loras=2, block_size=4) as llm:
        yield llm


def ask(llm, lora_request=None, params=GREEDY, **options):
    return tokens(
        llm.generate(PROMPTS, params, lora_request=lora_request, use_tqdm=False, **options)
    )


def check(llm) -> None:
    llm.engine_loop.call(lambda engine: engine.check_integrity())


def test_the_oracles_differ(wanted):
    """Each adapter changes each prompt's tokens, or nothing here tests anything."""
    for i in range(len(PROMPTS)):
        every = [tuple(wanted(seed)[i]) for seed in (None, 0, 1, 2, 3)]
        assert len(set(every)) == 5


@pytest.mark.parametrize("seed", range(4))
def test_an_adapter_equals_the_model_it_is_merged_into(shared, folders, wanted, seed):
    assert ask(shared, named(folders[seed])) == wanted(seed)
    assert ask(shared) == wanted(None)


WAYS = {
    "together": {},
    "one adapter at a time": {"max_loras": 1},
    "two adapters at a time, in chunks": {"max_loras": 2, "max_num_batched_tokens": 7},
    "whole prompts, few seats": {"enable_chunked_prefill": False, "max_num_seqs": 3},
    "scarce blocks": {"max_loras": 3, "num_gpu_blocks_override": 24, "max_model_len": 80},
    "scarce blocks, one adapter": {
        "max_loras": 1,
        "num_gpu_blocks_override": 24,
        "max_model_len": 80,
        "enable_prefix_caching": False,
    },
    "no room in memory": {"max_cpu_loras": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_many_adapters_and_none_in_one_batch(make, folders, wanted, way):
    """Company, slots, chunks, preemption and eviction change no token of anybody."""
    seeds = [None, 0, 1, 2, 3, 0, None, 3, 1]
    with make(block_size=4, **WAYS[way]) as llm:
        for _ in range(2):
            requests = [None if seed is None else named(folders[seed]) for seed in seeds]
            outputs = llm.generate(
                [prompt for prompt in PROMPTS for _ in seeds],
                GREEDY,
                lora_request=requests * len(PROMPTS),
                use_tqdm=False,
            )
            expected = [wanted(seed)[i] for i in range(len(PROMPTS)) for seed in seeds]
            assert tokens(outputs) == expected
            assert [output.lora_request for output in outputs] == requests * len(PROMPTS)
            check(llm)
        if "scarce" in way:
            assert llm.get_metrics()["num_preemptions"] > 0


def test_prefix_blocks_are_shared_by_content_and_by_nothing_else(make, tiny_llama, tmp_path):
    """Two names of one content share them; another content, or none, has its own."""
    first, twin = (write(tmp_path / name, tiny_llama, 0) for name in ("first", "twin"))
    other = write(tmp_path / "other", tiny_llama, 2)
    prompt = PROMPTS[2]

    with make(block_size=4) as llm:

        def cached(lora_request) -> int:
            [output] = llm.generate(prompt, GREEDY, lora_request=lora_request, use_tqdm=False)
            return output.num_cached_tokens

        assert cached(named(first, "a")) == 0
        assert cached(named(other, "a")) == 0, "the same name"
        assert cached(None) == 0
        assert cached(named(twin, "b")) == 40
        assert cached(None) == 40
        metrics = llm.get_metrics()
        assert metrics["num_adapters_in_memory"] == metrics["num_adapters_in_slots"] == 2


@pytest.mark.parametrize("restore_time", [False, True])
def test_an_edited_folder_gives_the_new_weights_and_no_old_block(
    make, tiny_llama, tmp_path, wanted, restore_time
):
    """At once, by the same request and also where the files' times were set back."""
    folder = write(tmp_path / "a", tiny_llama, 0)
    request = named(folder)
    with make(block_size=4) as llm:
        for seed in (0, 2, 0):
            before = os.stat(folder / TENSORS_FILE)
            write(folder, tiny_llama, seed)
            if restore_time:
                os.utime(folder / TENSORS_FILE, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert ask(llm, request) == wanted(seed)
            assert ask(llm, request) == wanted(seed)


def test_a_loaded_name_means_what_was_loaded(make, tiny_llama, tmp_path, wanted):
    """Until it is loaded again; the request that load_lora returns means the folder."""
    folder = write(tmp_path / "a", tiny_llama, 0)
    with make() as llm:
        request = llm.load_lora(folder, "x")
        assert request == LoRARequest("x", lora_path=str(folder))
        assert llm.list_loras() == [request]
        write(folder, tiny_llama, 2)
        assert ask(llm, "x") == ask(llm, LoRARequest("x")) == wanted(0)
        assert ask(llm, request) == wanted(2)
        assert llm.load_lora(folder, "x") == request
        assert ask(llm, "x") == wanted(2)
        llm.unload_lora("x")
        assert llm.list_loras() == []
        with pytest.raises(AdapterError, match="no adapter is called 'x'; loaded are: none"):
            ask(llm, "x")
        with pytest.raises(AdapterError, match="unload_lora"):
            llm.unload_lora("x")
        assert llm.load_lora(folder).lora_name == "a"


def test_requests_that_run_keep_their_weights(make, tiny_llama, tmp_path, wanted):
    """Unloaded, and its name given to another: a stream goes on with what it began with."""
    folder = write(tmp_path / "a", tiny_llama, 0)
    with make() as llm:
        llm.load_lora(folder, "x")
        stream = llm.stream(PROMPTS[1], GREEDY, lora_request="x")
        got = list(next(stream).outputs[0].token_ids)
        llm.unload_lora("x")
        write(folder, tiny_llama, 2)
        llm.load_lora(folder, "x")
        assert ask(llm, "x") == wanted(2)
        for output in stream:
            got += output.outputs[0].token_ids
        assert got == wanted(0)[1]


def forms_of(llm) -> list[weakref.ref]:
    store = llm.llm_engine.adapters
    return [weakref.ref(adapter.form) for adapter in store._alive.values()]


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_memory_goes_when_nobody_needs_an_adapter(make, folders):
    """After an unload, an eviction or a close, in an engine with nothing to do, without `gc`."""
    gc.collect()
    gc.disable()
    try:
        with make(max_loras=2, max_cpu_loras=1) as llm:
            llm.load_lora(folders[0], "x")
            ask(llm, "x")
            [unloaded] = forms_of(llm)
            llm.unload_lora("x")
            wait_for(lambda: unloaded() is None)
            ask(llm, named(folders[1]))
            [evicted] = forms_of(llm)
            llm.load_lora(folders[2])
            wait_for(lambda: evicted() is None)
            ask(llm, "a2")
            [closed] = forms_of(llm)
            assert llm.get_metrics()["num_adapters_in_slots"] == 1
        assert closed() is None
    finally:
        gc.enable()


def test_an_aborted_request_lets_its_adapter_go(make, folders):
    """One that runs, and one that waits for its slot."""
    with make(max_loras=1, max_cpu_loras=1) as llm:
        long = SamplingParams(max_tokens=200, ignore_eos=True)
        running = llm.stream(PROMPTS[0], long, lora_request=named(folders[0]))
        next(running)
        waiting = llm.stream(PROMPTS[0], long, lora_request=named(folders[1]))
        forms = forms_of(llm)
        assert len(forms) == 2
        running.close()
        waiting.close()
        ask(llm, named(folders[2]))
        wait_for(lambda: all(form() is None for form in forms))
        check(llm)


def test_who_waits_for_a_slot_is_served(make, folders, wanted):
    """With one slot, requests of four adapters and of none, in turns, all end."""
    with make(max_loras=1, max_num_seqs=2) as llm:
        seeds = [0, 1, None, 2, 3] * 4
        outputs = llm.generate(
            [PROMPTS[i % 3] for i in range(len(seeds))],
            GREEDY,
            lora_request=[None if s is None else named(folders[s], f"s{s}") for s in seeds],
            use_tqdm=False,
        )
        assert tokens(outputs) == [wanted(seed)[i % 3] for i, seed in enumerate(seeds)]
        assert llm.get_metrics()["num_adapter_swaps"] >= 4
        check(llm)


def test_requests_by_adapter_are_counted(make, folders):
    with make(max_loras=1) as llm:
        llm.load_lora(folders[0], "a")
        long = SamplingParams(max_tokens=150, ignore_eos=True)
        streams = [llm.stream([5, 6], long, lora_request="a") for _ in range(2)]
        for stream in streams:
            next(stream)
        streams.append(llm.stream([5, 6], long, lora_request=named(folders[1], "b")))
        streams.append(llm.stream([5, 6], long))
        assert llm.count_lora_requests() == {"a": (2, 0), "b": (0, 1)}
        for stream in streams:
            stream.close()
        assert llm.count_lora_requests() == {}


# -- every kind of request -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(tiny_llama, folders, tmp_path_factory):
    """The model that adapter 0 was merged into."""
    folder = merge_adapter(tmp_path_factory.mktemp("m") / "m", tiny_llama, folders[0])
    with LLM(folder, dtype="float32", block_size=4) as llm:
        yield llm


def test_logprobs_of_prompts_and_outputs_are_the_adapters(shared, merged, folders):
    """Rows of logits have their adapters, also those of a prompt among others."""
    params = SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )

    def values(outputs):
        return [
            [[(k, v.logprob) for k, v in entry.items()] for entry in entries if entry is not None]
            for output in outputs
            for entries in (output.prompt_logprobs, output.outputs[0].logprobs)
        ]

    expected = values(merged.generate(PROMPTS, params, use_tqdm=False))
    requests = [named(folders[0]), None] * len(PROMPTS)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    outputs = shared.generate(prompts, params, lora_request=requests, use_tqdm=False)
    for mine, theirs in zip(values(outputs[::2]), expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert [k for k, _ in a] == [k for k, _ in b]
            assert [v for _, v in a] == pytest.approx([v for _, v in b], abs=1e-4)


def test_beams_samples_and_embeddings_have_their_adapter(shared, merged, folders):
    adapter = named(folders[0])
    beams = BeamSearchParams(beam_width=3, max_tokens=8)
    got = shared.beam_search(PROMPTS, beams, lora_request=[adapter] * 3)
    expected = merged.beam_search(PROMPTS, beams)
    assert [[s.tokens for s in o.sequences] for o in got] == [
        [s.tokens for s in o.sequences] for o in expected
    ]
    samples = SamplingParams(n=3, temperature=1, seed=3, max_tokens=6, ignore_eos=True)
    got = shared.generate(PROMPTS, samples, lora_request=adapter, use_tqdm=False)
    expected = merged.generate(PROMPTS, samples, use_tqdm=False)
    assert [[c.token_ids for c in o.outputs] for o in got] == [
        [c.token_ids for c in o.outputs] for o in expected
    ]
    for pooling in ("last", "mean"):
        params = PoolingParams(pooling=pooling)
        vectors = shared.embed(
            PROMPTS, params, lora_request=[adapter, None, adapter], use_tqdm=False
        )
        expected = merged.embed(PROMPTS, params, use_tqdm=False)
        for i, vector in enumerate(vectors):
            same = vector.outputs.embedding == pytest.approx(
                expected[i].outputs.embedding, abs=1e-4
            )
            assert same == (i != 1)


def test_chats_and_streams_have_their_adapter(shared, merged, folders):
    messages = [{"role": "user", "content": "hello world"}]
    llm_chat = shared.chat(messages, GREEDY, lora_request=named(folders[0]), use_tqdm=False)
    assert tokens(llm_chat) == tokens(merged.chat(messages, GREEDY, use_tqdm=False))
    stream = list(shared.stream(PROMPTS[0], GREEDY, lora_request=named(folders[0], "me")))
    assert all(output.lora_request.lora_name == "me" for output in stream)
    got = [token for output in stream for token in output.outputs[0].token_ids]
    assert got == tokens(merged.generate(PROMPTS[:1], GREEDY, use_tqdm=False))[0]


def test_forced_tokens_have_their_adapter(shared, merged, folders):
    """Drafts that a grammar forces are computed, and verified, with the adapter."""
    from quire.structured_outputs import StructuredOutputsParams

    params = SamplingParams(
        temperature=0,
        max_tokens=60,
        structured_outputs=StructuredOutputsParams(regex="the capital of France is (a|b|c){3}"),
    )
    before = shared.get_metrics()["num_accepted_forced_tokens"]
    got = shared.generate(["hello"] * 2, params, lora_request=[named(folders[0]), None])
    assert got[0].outputs[0].token_ids == merged.generate("hello", params)[0].outputs[0].token_ids
    assert shared.get_metrics()["num_accepted_forced_tokens"] > before


def test_parked_beams_and_slots_do_not_wait_for_each_other(make, folders):
    """Searches of several adapters with one slot, and blocks for hardly one of them, all end."""
    options = {"block_size": 4, "num_gpu_blocks_override": 20, "max_model_len": 40}
    params = SamplingParams(
        n=3, use_beam_search=True, max_tokens=10, ignore_eos=True, temperature=0
    )
    prompts = PROMPTS[:2] * 3
    requests = [named(folders[i % 3]) for i in range(6)]

    def beams(llm):
        outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        check(llm)
        return [[c.token_ids for c in output.outputs] for output in outputs]

    with make(block_size=4) as llm:
        expected = beams(llm)
    with make(max_loras=1, max_num_seqs=5, **options) as llm:
        assert beams(llm) == expected


# -- errors --------------------------------------------------------------------------------------


def test_an_adapter_that_cannot_be_had_fails_its_own_requests(shared, folders, wanted, tmp_path):
    """Before anything runs; or, where errors are returned, alone."""
    wrong = [None, "nobody", named(tmp_path / "nowhere")]
    with pytest.raises(InvalidRequestError, match=r"prompt 1 of 3: .*'nobody'"):
        ask(shared, wrong)
    results = shared._run(PROMPTS, GREEDY, lora_request=wrong)
    assert list(results[0].outputs[0].token_ids) == wanted(None)[0]
    assert isinstance(results[1], AdapterError)
    assert isinstance(results[2], AdapterError)
    assert "nowhere" in str(results[2])
    results = shared._run(PROMPTS, GREEDY, lora_request=3)
    assert all("lora_request must be a LoRARequest" in str(result) for result in results)
    assert len(set(map(id, results))) == 3


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_list_has_one_adapter_per_prompt(shared, folders, count):
    requests = [named(folders[0])] * count
    with pytest.raises(InvalidRequestError, match=f"lora_request has {count} entries for 3"):
        ask(shared, requests)
    with pytest.raises(InvalidRequestError, match=f"lora_request has {count} entries for 3"):
        shared.embed(PROMPTS, lora_request=requests, use_tqdm=False)
    assert shared.embed(PROMPTS, lora_request=[None] * 3, use_tqdm=False)


def test_an_engine_without_adapters_says_what_to_set(tiny_llama, folders):
    with LLM(tiny_llama, dtype="float32") as llm:
        for call in (
            lambda: ask(llm, named(folders[0])),
            lambda: llm.load_lora(folders[0]),
            lambda: llm.embed("a", lora_request="a", use_tqdm=False),
            lambda: llm.stream("a", lora_request="a"),
        ):
            with pytest.raises(AdapterError, match="enable_lora=True"):
                call()
        assert llm.list_loras() == []
    for call in (lambda: llm.load_lora(folders[0]), llm.list_loras, lambda: llm.unload_lora("a")):
        with pytest.raises(EngineClosedError):
            call()


def test_adapters_come_with_the_model(make, folders, wanted):
    """Those of lora_modules are there by name; one that cannot be had is named, and so is why."""
    modules = {"x": folders[0], "y": folders[1]}
    with make(lora_modules=modules) as llm:
        assert [each.lora_name for each in llm.list_loras()] == ["x", "y"]
        assert ask(llm, ["x", "y", "x"]) == [
            wanted(0)[0], wanted(1)[1], wanted(0)[2]
        ]  # fmt: skip
    with pytest.raises(AdapterError, match=r"lora_modules: 'z': .*nowhere"):
        make(lora_modules={**modules, "z": "/nowhere"})
    with pytest.raises(AdapterError, match="lora_modules: 'y'"):
        make(lora_modules={"x": folders[0], "y": folders[2]}, max_lora_rank=8)
    with pytest.raises(ConfigError, match="max_loras"):
        make(max_loras=0)


def test_a_step_that_breaks_down_takes_no_slot_along(make, folders, wanted, monkeypatch):
    """Neither a failing slot nor a failing step; after a restart everything is put in anew."""
    with make(max_loras=2) as llm:
        assert ask(llm, named(folders[0])) == wanted(0)
        engine = llm.llm_engine
        set_adapter = engine._runner.set_adapter

        def broken(slot, adapter):
            raise OSError("no slot today")

        monkeypatch.setattr(engine._runner, "set_adapter", broken)
        with pytest.raises(RequestFailedError, match="no slot today"):
            ask(llm, named(folders[1]))
        monkeypatch.setattr(engine._runner, "set_adapter", set_adapter)
        assert ask(llm, named(folders[1])) == wanted(1)
        check(llm)
        llm.engine_loop.call(lambda engine: engine.restart(RuntimeError("broken")))
        assert llm.get_metrics()["num_adapters_in_slots"] == 0
        assert ask(llm, [named(folders[0]), None, named(folders[1])]) == [
            wanted(0)[0], wanted(None)[1], wanted(1)[2]
        ]  # fmt: skip


# -- at once, and in any order -------------------------------------------------------------------


def test_threads_load_edit_and_generate_at_once(make, tiny_llama, tmp_path, wanted):
    """Each answer is that of a content which the folder, or the name, had while it was asked."""
    allowed = [wanted(seed) for seed in (0, 4)]  # of one shape, so that one file is all of it
    folder = write(tmp_path / "a", tiny_llama, 0)
    errors: list[BaseException] = []
    with make(max_loras=2, max_cpu_loras=2) as llm:
        llm.load_lora(folder, "x")
        stop = threading.Event()

        def guarded(function):
            def run():
                try:
                    while not stop.is_set():
                        function()
                except BaseException as error:
                    errors.append(error)
                    stop.set()

            return threading.Thread(target=run)

        def load():
            llm.load_lora(folder, "x")

        def ask_by_name():
            assert ask(llm, "x") in allowed

        def ask_by_path():
            assert ask(llm, named(folder)) in allowed

        def ask_plainly():
            assert ask(llm) == wanted(None)

        threads = [guarded(each) for each in (load, ask_by_name, ask_by_path, ask_plainly)]
        for thread in threads:
            thread.start()
        for seed in (4, 0) * 3:
            other = write(tmp_path / f"new{seed}", tiny_llama, seed)
            os.replace(other / TENSORS_FILE, folder / TENSORS_FILE)
            stop.wait(0.15)
        stop.set()
        for thread in threads:
            thread.join(60)
        check(llm)
    assert not errors, errors


class AdapterStates(RuleBasedStateMachine):
    """Load, unload, edit, ask and abort in any order, against engines of merged weights.

    `wanted` and `llm` come from the test that runs it.
    """

    fixtures: SimpleNamespace
    places = st.sampled_from(["p", "q", "r"])
    seeds = st.sampled_from([0, 1, 2])

    @initialize()
    def start(self):
        fixed = self.fixtures
        self.llm, self.wanted = fixed.llm, fixed.wanted
        for name in [each.lora_name for each in self.llm.list_loras()]:
            self.llm.unload_lora(name)
        self.root = fixed.root
        self.held: dict[str, int] = {}
        self.loaded: dict[str, int] = {}
        self.streams = []
        for place in ("p", "q", "r"):
            self.edit(place, 0)

    @rule(place=places, seed=seeds)
    def edit(self, place, seed):
        if self.held.get(place) != seed:
            write(self.root / place, self.fixtures.checkpoint, seed)
        self.held[place] = seed

    @rule(place=places, name=st.sampled_from("xy"))
    def load(self, place, name):
        self.llm.load_lora(self.root / place, name)
        self.loaded[name] = self.held[place]

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def unload(self, data):
        name = data.draw(st.sampled_from(sorted(self.loaded)))
        self.llm.unload_lora(name)
        del self.loaded[name]

    @rule(place=places, data=st.data())
    def ask(self, place, data):
        choices = [(None, None), (named(self.root / place, "x"), self.held[place])]
        choices += list(self.loaded.items())
        picked = data.draw(st.lists(st.sampled_from(choices), min_size=1, max_size=4))
        numbers = [i % 3 for i in range(len(picked))]
        outputs = self.llm.generate(
            [PROMPTS[i] for i in numbers],
            GREEDY,
            lora_request=[request for request, _ in picked],
            use_tqdm=False,
        )
        expected = [self.wanted(seed)[i] for i, (_, seed) in zip(numbers, picked, strict=True)]
        assert tokens(outputs) == expected

    @rule(place=places)
    def begin(self, place):
        stream = self.llm.stream(PROMPTS[1], GREEDY, lora_request=named(self.root / place))
        self.streams.append((stream, self.held[place]))

    @precondition(lambda self: self.streams)
    @rule(to_the_end=st.booleans())
    def end(self, to_the_end):
        stream, seed = self.streams.pop(0)
        if not to_the_end:
            stream.close()
            return
        got = [token for output in stream for token in output.outputs[0].token_ids]
        assert got == self.wanted(seed)[1]

    def teardown(self):
        for stream, seed in getattr(self, "streams", []):
            got = [token for output in stream for token in output.outputs[0].token_ids]
            assert got == self.wanted(seed)[1]
        if hasattr(self, "llm"):
            check(self.llm)


@pytest.mark.parametrize("options", [{"max_loras": 1}, {"max_loras": 2, "max_cpu_loras": 6}])
def test_whatever_happens_each_request_has_the_weights_of_its_time(
    make, tiny_llama, tmp_path, wanted, options
):
    """Over random orders of everything that changes adapters."""
    with make(block_size=4, **options) as llm:
        AdapterStates.fixtures = SimpleNamespace(
            llm=llm, wanted=wanted, root=tmp_path, checkpoint=tiny_llama
        )
        run_state_machine_as_test(
            AdapterStates,
            settings=settings(max_examples=8, stateful_step_count=15, deadline=None),
        )
