"""What preempted sequences had computed, kept in the host's memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quire.engine.host_cache
from quire import LLM, SamplingParams
from quire.engine.block_pool import root_key
from quire.engine.host_blocks import HostBlocks
from quire.engine.host_cache import HostCache
from quire.engine.sequence import Sequence

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCARCE = {"block_size": 4, "num_gpu_blocks_override": 14, "max_model_len": 40, "dtype": "float32"}
PROMPTS = [list(range(i, i + 9)) for i in (10, 30, 50, 70)]


def make_caches(dtype):
    shapes = [(9, 4, 2, 8), (9, 4, 2, 8), (9, 4, 1, 12), (9, 4, 1, 12)]
    caches = []
    for shape in shapes:
        cache = torch.randn(shape, device=DEVICE) * 30
        caches.append(cache.to(dtype))
    return caches


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
)
@given(data=st.data())
def test_blocks_come_back_as_they_went(dtype, data):
    """Of all layers, bit for bit, from any host blocks into any others of the cache."""
    caches = make_caches(dtype)
    before = [cache.clone() for cache in caches]
    host = HostCache(caches, 12_000)
    assert host.num_blocks >= 6
    count = data.draw(st.integers(1, 6))
    sources = data.draw(st.permutations(range(1, 9)))[:count]
    kept = data.draw(st.permutations(range(host.num_blocks)))[:count]
    targets = data.draw(st.permutations(range(1, 9)))[:count]
    host.save(list(zip(sources, kept, strict=True)))
    for cache in caches:
        cache.view(torch.uint8).fill_(7)
    host.restore(list(zip(targets, kept, strict=True)))
    others = [i for i in range(9) if i not in targets]
    for cache, old in zip(caches, before, strict=True):
        found, wanted = cache.view(torch.uint8), old.view(torch.uint8)
        assert torch.equal(found[targets], wanted[sources])
        assert (found[others] == 7).all()


def test_a_host_cache_takes_no_more_than_it_may():
    caches = make_caches(torch.float32)
    room = sum(cache[0].nbytes for cache in caches)
    assert HostCache(caches, 10).num_blocks == 0
    assert HostCache(caches, 5 * room + 4 * 512).num_blocks == 5


def test_a_sequence_is_saved_whole_or_not_at_all():
    """Blocks are taken at the first use, and those of a sequence that ends come free."""
    made = []

    class Room:
        num_blocks = 3

    host_blocks = HostBlocks(lambda: made.append(1) or Room(), 4)
    assert host_blocks.num_used == 0
    assert not made
    one, two = (Sequence(n, 0, [1] * 20, order=(0,), root_key=root_key()) for n in "ab")
    one.block_ids, one.num_computed_tokens = [5, 6, 7], 9
    two.block_ids, two.num_computed_tokens = [8], 4
    assert host_blocks.save(one) == [(5, 0), (6, 1), (7, 2)]
    assert host_blocks.save(two) == []
    assert two.num_saved_tokens == 0
    host_blocks.check_integrity([one, two])
    one.block_ids = [5, 2, 3]
    assert host_blocks.restore(one, 1) == [(2, 1), (3, 2)]
    assert host_blocks.num_used == 0
    assert host_blocks.save(two) == [(8, 0)]
    host_blocks.check_integrity([one, two])
    assert made == [1]


def answers(llm, **options):
    options = {"temperature": 0, "max_tokens": 28, "ignore_eos": True, **options}
    outputs = llm.generate(PROMPTS, SamplingParams(**options), use_tqdm=False)
    llm.engine_loop.call(lambda engine: engine.check_integrity())
    return [
        (output.prompt_logprobs, [(c.token_ids, c.text) for c in output.outputs])
        for output in outputs
    ]


@pytest.mark.parametrize(
    "options", [{}, {"n": 2, "temperature": 1.0, "seed": 3}, {"n": 2, "use_beam_search": True}]
)
@pytest.mark.parametrize("caching", [True, False])
def test_swapped_requests_are_not_computed_anew(tiny_llama, options, caching):
    """And answered as if they were."""
    ways = {**SCARCE, "enable_prefix_caching": caching}
    with LLM(tiny_llama, **ways) as llm:
        wanted, plain = answers(llm, **options), llm.get_metrics()
    with LLM(tiny_llama, **ways, swap_space=0.01) as llm:
        assert answers(llm, **options) == wanted
        swapped = llm.get_metrics()
        assert llm.llm_engine.scheduler.host_blocks.num_used == 0
    assert plain["num_preemptions"] > 0
    assert plain["num_swapped_out"] == 0
    assert swapped["num_swapped_out"] >= swapped["num_swapped_in"] > 0
    if not options:
        assert swapped["num_computed_tokens"] < plain["num_computed_tokens"]
        assert swapped["num_computed_tokens"] == sum(len(p) + 27 for p in PROMPTS)


def test_what_was_said_of_a_prompt_is_not_said_twice(tiny_llama):
    """Prompt logprobs go on where they were, in chunks that others interrupt."""
    options = {"prompt_logprobs": 1, "max_tokens": 24}
    with LLM(tiny_llama, **SCARCE, max_num_batched_tokens=5) as llm:
        wanted = answers(llm, **options)
    with LLM(tiny_llama, **SCARCE, max_num_batched_tokens=5, swap_space=0.01) as llm:
        found = answers(llm, **options)
        assert llm.get_metrics()["num_swapped_in"] > 0
    assert [(len(p), tokens) for p, tokens in found] == [(len(p), tokens) for p, tokens in wanted]


def test_where_there_is_no_memory_preempted_requests_are_computed_anew(
    tiny_llama, monkeypatch, caplog
):
    """A line in the log says so, once."""
    with LLM(tiny_llama, **SCARCE) as llm:
        wanted = answers(llm)

    def no_memory(*args, **kwargs):
        raise MemoryError("none left")

    with LLM(tiny_llama, **SCARCE, swap_space=1) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(quire.engine.host_cache.torch, "empty", no_memory)
            assert llm.llm_engine._runner.make_host_cache(1 << 30) is None
        monkeypatch.setattr(llm.llm_engine._runner, "make_host_cache", lambda num_bytes: None)
        llm.engine_loop.call(lambda engine: engine.restart(RuntimeError("for new books")))
        assert answers(llm) == wanted
        assert llm.get_metrics()["num_preemptions"] > 0
        assert llm.get_metrics()["num_swapped_out"] == 0
    assert "computed anew" in caplog.text


def test_a_copy_that_fails_is_not_relied_on(tiny_llama, monkeypatch):
    """The step fails; who was preempted for it is computed anew and answered rightly."""
    with LLM(tiny_llama, **SCARCE) as llm:
        wanted = answers(llm)
    with LLM(tiny_llama, **SCARCE, swap_space=0.01) as llm:
        calls = []
        save = HostCache.save

        def fail_once(self, pairs):
            calls.append(pairs)
            if len(calls) == 1:
                raise RuntimeError("no copy")
            save(self, pairs)

        monkeypatch.setattr(HostCache, "save", fail_once)
        params = SamplingParams(temperature=0, max_tokens=28, ignore_eos=True)
        results = llm._run(PROMPTS, params)
        llm.engine_loop.call(lambda engine: engine.check_integrity())
        failed = [isinstance(result, Exception) for result in results]
        assert any(failed)
        assert not all(failed)
        for result, (_, [(tokens, _)]) in zip(results, wanted, strict=True):
            if not isinstance(result, Exception):
                assert result.outputs[0].token_ids == tokens
        assert llm.llm_engine.scheduler.host_blocks.num_used == 0


def test_an_aborted_request_leaves_no_host_blocks(tiny_llama):
    def work(engine):
        params = SamplingParams(temperature=0, max_tokens=28, ignore_eos=True)
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(engine.processor.process(prompt, params, request_id=str(i)))
        host_blocks = engine.scheduler.host_blocks
        while not host_blocks.num_used:
            engine.step()
        engine.abort(list("0123"))
        engine.check_integrity()
        assert host_blocks.num_used == 0

    with LLM(tiny_llama, **SCARCE, swap_space=0.01) as llm:
        llm.engine_loop.call(work)
