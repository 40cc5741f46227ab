"""The map of the KV cache: which block is whose, read between two steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import LLM, EngineClosedError, SamplingParams
from quire.engine.block_pool import BlockPool, block_keys, root_key
from quire.engine.cache_map import map_blocks
from quire.engine.sequence import Sequence

SIZE = 4


@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), max_size=6),
    ends=st.sets(st.integers(0, 5)),
)
def test_the_map_agrees_with_the_books(prompts, ends):
    """Each block is mapped to those that hold it; the others are cached or free, by the pool."""
    pool = BlockPool(40, SIZE)
    sequences = []
    for i, prompt in enumerate(prompts):
        sequence = Sequence(str(i), 0, prompt, order=(0, i, 0), root_key=root_key())
        keys = block_keys(prompt, SIZE, sequence.root_key)
        hits = pool.match(keys, prompt)
        pool.share(hits)
        wanted = -(-len(prompt) // SIZE) - len(hits)
        sequence.block_ids = [*hits, *pool.allocate(wanted)]
        for place, key in enumerate(keys):
            tokens = prompt[place * SIZE : (place + 1) * SIZE]
            pool.publish(sequence.block_ids[place], key, tokens)
        sequences.append(sequence)
    for i in ends & set(range(len(sequences))):
        pool.free(sequences[i].block_ids)
        sequences[i].block_ids = []
    mapped = map_blocks(pool, sequences)
    assert mapped.block_size == SIZE
    assert len(mapped.blocks) == 39
    for sequence in sequences:
        places = [block_id - 1 for block_id in sequence.block_ids]
        assert mapped.blocks_of(sequence.request_id) == sorted(places)
    assert mapped.count("free") + mapped.count("cached") == pool.num_free
    assert sum(block.is_cached for block in mapped.blocks) == pool.num_published
    for block in mapped.blocks:
        assert block.state == (
            ("free", "cached")[block.is_cached]
            if not block.request_ids
            else ("used", "shared")[len(block.request_ids) > 1]
        )


def test_samples_of_one_request_are_one_user(tiny_llama):
    """Blocks that samples share are the request's own; what it has left behind is cached."""
    params = SamplingParams(n=3, temperature=1, seed=1, max_tokens=40, ignore_eos=True)
    with LLM(tiny_llama, block_size=4, num_gpu_blocks_override=80) as llm:
        first = llm.kv_cache_map()
        assert first.count("free") == len(first.blocks) == 79
        with llm.stream(list(range(5, 25)), params) as stream:
            next(stream)
            mapped = llm.kv_cache_map()
            assert mapped.count("shared") == 0
            assert len(mapped.blocks_of(stream.request_id)) == mapped.count("used") >= 5
        last = llm.kv_cache_map()
        assert last.count("used") == 0
        assert last.count("cached") >= 5
        assert repr(last).startswith("KVCacheMap(79 blocks of 4 tokens: 0 used, 0 shared, ")
        llm.reset_prefix_cache()
        assert llm.kv_cache_map().count("free") == 79


def test_requests_with_one_beginning_share_its_blocks(tiny_llama):
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    start = list(range(5, 25))
    with (
        LLM(tiny_llama, block_size=4, num_gpu_blocks_override=80) as llm,
        llm.stream([*start, 30], params) as one,
        llm.stream([*start, 31], params) as two,
    ):
        next(one)
        next(two)
        mapped = llm.kv_cache_map()
        shared = [block for block in mapped.blocks if block.state == "shared"]
        assert len(shared) == 5
        assert {block.request_ids for block in shared} == {(one.request_id, two.request_id)}
        assert all(block.is_cached for block in shared)


def test_a_closed_engine_has_no_map(tiny_llama):
    llm = LLM(tiny_llama)
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.kv_cache_map()
