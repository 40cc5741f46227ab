"""The prefix cache: which blocks are kept, and when a hit is one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.engine.block_pool import NULL_BLOCK, BlockPool, block_keys, root_key

SIZE = 4


def fill(pool, tokens):
    """Compute a sequence: allocate its full blocks and publish them; return ids and keys."""
    keys = block_keys(tokens, SIZE, root_key())
    ids = pool.allocate(len(keys))
    for i, (block_id, key) in enumerate(zip(ids, keys, strict=True)):
        pool.publish(block_id, key, tokens[i * SIZE : (i + 1) * SIZE])
    return ids, keys


@given(order=st.permutations(range(4)), used=st.lists(st.integers(0, 3), max_size=6))
def test_the_least_recently_used_prefix_is_evicted_first(order, used):
    """Whatever the order in which sequences end and are found again, the oldest one goes."""
    pool = BlockPool(1 + 4 * 2, SIZE)
    prompts = [[10 * i + j for j in range(2 * SIZE)] for i in range(4)]
    made = [fill(pool, prompt) for prompt in prompts]
    for i in order:
        pool.free(made[i][0])
    ages = list(order)  # the least recently used first
    for i in used:
        found = pool.match(made[i][1], prompts[i])
        assert found == made[i][0]
        pool.share(found)
        pool.free(found)
        ages.remove(i)
        ages.append(i)
    for count, i in enumerate(ages):
        # The end of a sequence goes before its beginning.
        assert pool.allocate(1) == made[i][0][1:]
        assert pool.match(made[i][1], prompts[i]) == made[i][0][:1]
        assert pool.allocate(1) == made[i][0][:1]
        assert pool.match(made[i][1], prompts[i]) == []
        for other in ages[count + 1 :]:
            assert pool.match(made[other][1], prompts[other]) == made[other][0]


def test_a_block_that_can_be_found_outlives_those_that_cannot():
    """What was never published is of no use to anybody, and is reused first."""
    pool = BlockPool(4, SIZE)
    cached, _ = fill(pool, list(range(SIZE)))
    loose = pool.allocate(1)
    pool.free(cached)
    pool.free(loose)
    assert pool.allocate(1) == loose


def test_equal_keys_of_other_tokens_are_no_hit():
    """Were two texts ever to have one key, neither would get the other's values."""
    pool = BlockPool(8, SIZE)
    tokens = list(range(3 * SIZE))
    ids, keys = fill(pool, tokens)
    assert pool.match(keys, tokens) == ids
    other = [*tokens[: 2 * SIZE - 1], 99, *tokens[2 * SIZE :]]
    assert pool.match(keys, other) == ids[:1]
    assert pool.match(keys, [99, *tokens[1:]]) == []


def test_a_key_is_of_all_tokens_before_it_and_of_what_they_stand_under():
    """Equal blocks behind other tokens, or under another root, have other keys."""
    one = block_keys([1, 2, 3, 4, 9, 9, 9, 9], SIZE, root_key())
    other = block_keys([1, 2, 3, 5, 9, 9, 9, 9], SIZE, root_key())
    salted = block_keys([1, 2, 3, 4, 9, 9, 9, 9], SIZE, root_key("salt"))
    assert len({*one, *other, *salted}) == 6
    assert root_key(None, "a") != root_key("a", None) != root_key("a") != root_key("", "a")


def test_wrong_books_are_errors_at_once():
    """A block freed twice, more blocks than there are, and a pool of nothing."""
    pool = BlockPool(3, SIZE)
    ids = pool.allocate(2)
    assert NULL_BLOCK not in ids
    with pytest.raises(RuntimeError, match="1 blocks wanted, 0 free"):
        pool.allocate(1)
    pool.share(ids[:1])
    pool.free(ids)
    assert pool.num_free == 1
    pool.free(ids[:1])
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.free(ids[:1])
    with pytest.raises(AssertionError, match="counted 0, held by 1"):
        pool.check_integrity([ids])
    with pytest.raises(ValueError, match="num_blocks=1"):
        BlockPool(1, SIZE)
