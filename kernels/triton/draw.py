"""Kernels that draw a token of each row, with temperature, min_p, top_k and top_p.

A weight, ``exp((logit - highest) / temperature)``, is an integer here, in units of 2^-40: sums of
integers do not depend on the order of their parts, so that programs may add in any, and what is
decided in one way is decided so in every other. A vocabulary of 2^18 tokens stays below 2^63.

Where tokens are left out, the kept ones are nearly always among the few hundred likeliest. These
are gathered (`choose_threshold`, `gather`) and drawn from (`draw_from_candidates`). Where that is
not enough, borders are found by bisection, each step of which reads the row (`draw_by_bisection`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.logit_rows import (
    best_of,
    id_in,
    key_in,
    keys_of,
    load_chunk,
    logits_of,
    pack,
)

SPAN = 64
"""Tokens whose highest logit stands for them."""

ROOM = 1024
"""Candidates that are gathered at most."""

FEW = 256
"""Likeliest tokens to gather where only top_p or min_p limits their number."""

MOST = 512
"""Likeliest tokens beyond which they are not gathered."""

UNIT = tl.constexpr(1099511627776.0)
"""One, in weights: 2^40."""


@triton.jit
def limits_of(temperatures, top_ks, top_ps, min_ps, row, vocab_size):
    """Return a row's limits; ``top_k`` of all tokens is ``vocab_size``."""
    temperature = tl.load(temperatures + row)
    # Beyond these, float32 tells the result from no others.
    temperature = tl.minimum(tl.maximum(temperature, 1e-30), 1e30).to(tl.float32)
    top_k = tl.load(top_ks + row)
    top_k = tl.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)
    return temperature, top_k, tl.load(top_ps + row), tl.load(min_ps + row).to(tl.float32)


@triton.jit
def weights_of(logits, highest, temperature, min_p):
    """Return weights, int64; 0 of those less likely than ``min_p`` times the likeliest."""
    # Below -100 nothing is left of a weight; -inf would come through a division with a warning.
    below = tl.maximum(logits - highest, -100.0 * temperature) / temperature
    weights = tl.exp(below)
    return tl.where(weights >= min_p, (weights * UNIT).to(tl.int64), 0)


@triton.jit
def least_of_weight(highest, temperature):
    """Return the key below which no token has any weight."""
    return keys_of(tl.maximum(highest - 28.0 * temperature, -3.4e38))


@triton.jit
def choose_threshold(
    bests,
    spans,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    thresholds,
    counters,
    vocab_size,
    num_chunks,
    num_spans,
    FEW: tl.constexpr,
    MOST: tl.constexpr,
    ROOM: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Find a key that at least as many tokens reach as a row's limits ask for.

    The spans' maxima alone tell of one: as many tokens as spans reach it. ``thresholds[num_rows]``
    is above every number's key where no tokens are to be gathered; ``counters`` become 0.
    """
    row = tl.program_id(0).to(tl.int64)
    limits = limits_of(temperatures, top_ks, top_ps, min_ps, row, vocab_size)
    temperature, top_k, top_p, min_p = limits
    tl.store(counters + row, 0)
    threshold = tl.full((), 0x7FFFFFFF, tl.int32)
    if (top_k < vocab_size) | (top_p < 1.0) | (min_p > 0.0):
        few = tl.where(top_k < vocab_size, top_k, FEW)
        if vocab_size <= ROOM:
            threshold = tl.full((), -0x7FFFFFFF, tl.int32)
        elif (few <= num_spans) & (few <= MOST):
            span = tl.arange(0, SPANS)
            is_span = span < num_spans
            maxima = tl.load(spans + row * num_spans + span, mask=is_span, other=-0x7FFFFFFF)
            # So many reach `low`, fewer reach `high`; more than enough is good enough, too.
            low = tl.min(tl.where(is_span, maxima, 0x7FFFFFFF), 0).to(tl.int64)
            high = tl.max(maxima, 0).to(tl.int64) + 1
            enough = few + few // 8
            reached = num_spans.to(tl.int64)
            while (high - low > 1) & (reached > enough):
                middle = low + (high - low) // 2
                count = tl.sum((is_span & (maxima >= middle)).to(tl.int64), 0)
                if count >= few:
                    low = middle
                    reached = count
                else:
                    high = middle
            threshold = low.to(tl.int32)
    highest = logits_of(key_in(best_of(bests, row, num_chunks, CHUNKS)))
    is_finite = tl.abs(highest) < float("inf")
    threshold = tl.maximum(threshold, least_of_weight(highest, temperature))
    tl.store(thresholds + row, tl.where(is_finite, threshold, 0x7FFFFFFF))


@triton.jit
def gather(
    logits,
    bests,
    thresholds,
    counters,
    candidates,
    masses,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    vocab_size,
    stride,
    num_chunks,
    ROOM: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Gather, of each chunk, the candidates; and weigh it, where the row as a whole matters.

    Parameters
    ----------
    candidates : [num_rows, ROOM], int64
        Packed, in no order. Those beyond `ROOM` are counted, and left out.
    counters : [num_rows], int32
    masses : [num_rows, num_chunks], int64
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    limits = limits_of(temperatures, top_ks, top_ps, min_ps, row, vocab_size)
    temperature, top_k, _, min_p = limits
    is_whole = (top_k == vocab_size) & (min_p <= 0.0)
    threshold = tl.load(thresholds + row)
    best = tl.load(bests + row * num_chunks + chunk)
    has_candidates = key_in(best) >= threshold
    highest = logits_of(key_in(best_of(bests, row, num_chunks, CHUNKS)))
    if (is_whole | has_candidates) & (tl.abs(highest) < float("inf")):
        ids, found = load_chunk(logits + row * stride, chunk, vocab_size, CHUNK)
        if is_whole:
            weights = weights_of(found, highest, temperature, 0.0)
            tl.store(masses + row * num_chunks + chunk, tl.sum(weights, 0))
        if has_candidates:
            keys = keys_of(found)
            is_one = (keys >= threshold) & (ids < vocab_size)
            ones = is_one.to(tl.int32)
            first = tl.atomic_add(counters + row, tl.sum(ones, 0))
            place = first + tl.cumsum(ones, 0) - 1
            there = is_one & (place < ROOM)
            tl.store(candidates + row * ROOM + place, pack(keys, ids), mask=there)


@triton.jit
def draw_from_all(
    row_logits, masses, row, highest, temperature, uniform, vocab_size, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Draw from all tokens, in the order of their ids: first a chunk, then one of it."""
    chunks = tl.arange(0, CHUNKS)
    parts = tl.load(masses + row * num_chunks + chunks, mask=chunks < num_chunks, other=0)
    ends = tl.cumsum(parts, 0)
    total = tl.sum(parts, 0)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    chunk = tl.sum((ends <= target).to(tl.int32), 0)
    target -= tl.sum(tl.where(chunks < chunk, parts, 0), 0)
    _, found = load_chunk(row_logits, chunk, vocab_size, CHUNK)
    inside = tl.cumsum(weights_of(found, highest, temperature, 0.0), 0)
    return chunk * CHUNK + tl.sum((inside <= target).to(tl.int32), 0)


@triton.jit
def draw_from_candidates(
    candidates, row, count, is_all, total, highest, temperature, top_k, top_p, min_p, uniform,
    SIZE: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Draw from what was gathered; -1 where tokens beyond it may be kept, too.

    ``is_all`` says that there are no others of any weight. ``total`` is the weight of the whole
    row, or 0 where top_k or min_p comes before top_p. All that is to be known of a candidate is
    how many are likelier, and what these weigh together: each is compared with each, which for so
    few takes no longer than sorting them.
    """
    place = tl.arange(0, SIZE)
    there = place < count
    own = tl.load(candidates + row * ROOM + place, mask=there, other=-0x8000000000000000)
    rank = tl.zeros((SIZE,), tl.int32)
    before = tl.zeros((SIZE,), tl.int64)
    for first in range(0, count, TILE):
        other = first + tl.arange(0, TILE)
        is_other = other < count
        others = tl.load(candidates + row * ROOM + other, mask=is_other, other=-0x8000000000000000)
        logits = logits_of(tl.where(is_other, key_in(others), 0))
        weights = tl.where(is_other, weights_of(logits, highest, temperature, min_p), 0)
        is_before = others[None, :] > own[:, None]
        rank += tl.sum(is_before.to(tl.int32), 1)
        before += tl.sum(tl.where(is_before, weights[None, :], 0), 1)
    logits = logits_of(tl.where(there, key_in(own), 0))
    weights = weights_of(logits, highest, temperature, min_p)
    weights = tl.where(there & (rank < top_k), weights, 0)
    num_left = tl.sum((weights > 0).to(tl.int32), 0)
    mass = tl.where(total > 0, total, tl.sum(weights, 0))
    most = tl.where(top_p < 1.0, top_p * mass.to(tl.float64), float("inf"))
    is_kept = (weights > 0) & ((rank == 0) | (before.to(tl.float64) < most))
    num_kept = tl.sum(is_kept.to(tl.int32), 0)
    is_known = (num_left < count) | is_all | (top_k <= count)
    is_known = is_known | ((total > 0) & (num_kept < num_left))
    reach = tl.sum(tl.where(is_kept, weights, 0), 0)
    target = tl.minimum((uniform * reach.to(tl.float64)).to(tl.int64), reach - 1)
    is_chosen = is_kept & (before <= target) & (target < before + weights)
    token = tl.sum(tl.where(is_chosen, id_in(own), 0), 0).to(tl.int32)
    return tl.where(is_known, token, -1)


@triton.jit
def find_border(
    row_logits, highest, temperature, min_p, goal, vocab_size,
    BY_MASS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Find the highest key that tokens of so much weight, or so many, reach.

    Of those with a weight there must be as many. Returned are the key, and how many tokens and
    how much weight lie above it.
    """
    low = least_of_weight(highest, temperature).to(tl.int64)
    high = keys_of(highest).to(tl.int64) + 1
    count_above = tl.full((), 0, tl.int64)
    mass_above = tl.full((), 0, tl.int64)
    while high - low > 1:
        middle = low + (high - low) // 2
        count = tl.full((), 0, tl.int64)
        mass = tl.full((), 0, tl.int64)
        # The keys that there are: where there is one alone, the border is found.
        least = high
        most_below = low - 1
        for chunk in range(tl.cdiv(vocab_size, CHUNK)):
            _, found = load_chunk(row_logits, chunk, vocab_size, CHUNK)
            weights = weights_of(found, highest, temperature, min_p)
            keys = keys_of(found).to(tl.int64)
            inside = (weights > 0) & (keys >= low) & (keys < high)
            upper = inside & (keys >= middle)
            count += tl.sum(upper.to(tl.int64), 0)
            mass += tl.sum(tl.where(upper, weights, 0), 0)
            least = tl.minimum(least, tl.min(tl.where(upper, keys, high), 0))
            lower = tl.where(inside & (keys < middle), keys, low - 1)
            most_below = tl.maximum(most_below, tl.max(lower, 0))
        reached = (mass_above + mass) if BY_MASS else (count_above + count)
        if reached >= goal:
            low = least
        else:
            count_above += count
            mass_above += mass
            high = most_below + 1
    return low.to(tl.int32), count_above, mass_above


@triton.jit
def draw_by_bisection(
    row_logits, highest, temperature, top_k, top_p, min_p, uniform, vocab_size,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Draw from however many tokens are kept, in descending order of likelihood."""
    count = tl.full((), 0, tl.int64)
    mass = tl.full((), 0, tl.int64)
    for chunk in range(tl.cdiv(vocab_size, CHUNK)):
        _, found = load_chunk(row_logits, chunk, vocab_size, CHUNK)
        weights = weights_of(found, highest, temperature, min_p)
        count += tl.sum((weights > 0).to(tl.int64), 0)
        mass += tl.sum(weights, 0)
    if top_k < count:
        key, num_above, mass_above = find_border(
            row_logits, highest, temperature, min_p, top_k, vocab_size, False, CHUNK
        )
        weight = weights_of(logits_of(key), highest, temperature, min_p)
        mass = mass_above + (top_k - num_above) * weight
    reach = mass
    if top_p < 1.0:
        most = top_p * mass.to(tl.float64)
        goal = tl.minimum(tl.maximum(tl.ceil(most).to(tl.int64), 1), mass)
        key, num_above, mass_above = find_border(
            row_logits, highest, temperature, min_p, goal, vocab_size, True, CHUNK
        )
        weight = weights_of(logits_of(key), highest, temperature, min_p)
        reach = mass_above + (goal - mass_above + weight - 1) // weight * weight
    target = tl.minimum((uniform * reach.to(tl.float64)).to(tl.int64), reach - 1)
    key, num_above, mass_above = find_border(
        row_logits, highest, temperature, min_p, target + 1, vocab_size, True, CHUNK
    )
    weight = weights_of(logits_of(key), highest, temperature, min_p)
    # Of the tokens with this very logit, that many come before, in the order of their ids.
    left = ((target - mass_above) // weight).to(tl.int32)
    token = tl.full((), 0, tl.int32)
    for chunk in range(tl.cdiv(vocab_size, CHUNK)):
        ids, found = load_chunk(row_logits, chunk, vocab_size, CHUNK)
        is_one = (keys_of(found) == key) & (ids < vocab_size)
        nth = tl.cumsum(is_one.to(tl.int32), 0) - 1
        token += tl.sum(tl.where(is_one & (nth == left), ids, 0), 0)
        left -= tl.sum(is_one.to(tl.int32), 0)
    return token


@triton.jit
def draw(
    logits,
    bests,
    thresholds,
    counters,
    candidates,
    masses,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    out,
    vocab_size,
    stride,
    num_chunks,
    ROOM: tl.constexpr,
    SMALL: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Draw one token of each row into ``out[num_rows]``, int64."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * stride
    temperature, top_k, top_p, min_p = limits_of(
        temperatures, top_ks, top_ps, min_ps, row, vocab_size
    )
    uniform = tl.load(uniforms + row)
    best = best_of(bests, row, num_chunks, CHUNKS)
    highest = logits_of(key_in(best))
    token = id_in(best).to(tl.int32)
    if tl.abs(highest) < float("inf"):
        is_whole = (top_k == vocab_size) & (min_p <= 0.0)
        if is_whole & (top_p >= 1.0):
            token = draw_from_all(
                row_logits, masses, row, highest, temperature, uniform, vocab_size, num_chunks,
                CHUNK, CHUNKS,
            )  # fmt: skip
        else:
            count = tl.load(counters + row)
            token = tl.full((), -1, tl.int32)
            if (count > 0) & (count <= ROOM):
                chunks = tl.arange(0, CHUNKS)
                parts = tl.load(
                    masses + row * num_chunks + chunks, mask=chunks < num_chunks, other=0
                )
                total = tl.where(is_whole, tl.sum(parts, 0), 0)  # only then were they written
                least = least_of_weight(highest, temperature)
                is_all = tl.load(thresholds + row) <= least
                if count <= SMALL:
                    token = draw_from_candidates(
                        candidates, row, count, is_all, total, highest, temperature, top_k, top_p,
                        min_p, uniform, SMALL, 64, ROOM,
                    )  # fmt: skip
                else:
                    token = draw_from_candidates(
                        candidates, row, count, is_all, total, highest, temperature, top_k, top_p,
                        min_p, uniform, ROOM, 16, ROOM,
                    )  # fmt: skip
            if token < 0:
                token = draw_by_bisection(
                    row_logits, highest, temperature, top_k, top_p, min_p, uniform, vocab_size,
                    CHUNK,
                )  # fmt: skip
    tl.store(out + row, token)
