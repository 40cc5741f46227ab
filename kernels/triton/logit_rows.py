"""What kernels on logits share: floats as integers in the same order, and a row's parts.

A row is worked on in chunks of ``CHUNK`` logits, whatever its length and whatever rows stand beside
it, so that sums have one order. These functions run in Triton's interpreter, too.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 4096
"""Logits that one program looks at."""

NO_NUMBER = tl.constexpr(0x7FFFFFFF)
"""The key of what is no number: above all others."""


@triton.jit
def keys_of(logits):
    """Return integers, int32, in the order of the logits, float32; of equal ones, equal keys."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(logits != logits, NO_NUMBER, keys)


@triton.jit
def logits_of(keys):
    """Return the logits, float32, of keys."""
    return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)


@triton.jit
def pack(keys, ids):
    """Return int64 in the order of keys; of equal keys, that of the lower id is higher."""
    return (keys.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def key_in(packed):
    """Return the key of what `pack` has made."""
    return (packed >> 32).to(tl.int32)


@triton.jit
def id_in(packed):
    """Return the token id of what `pack` has made."""
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF)


@triton.jit
def load_chunk(row_logits, chunk, vocab_size, CHUNK: tl.constexpr):
    """Return a chunk's token ids, int32, and logits, float32; past the vocabulary, -inf."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf"))
    return ids, logits.to(tl.float32)


@triton.jit
def best_of(bests, row, num_chunks, CHUNKS: tl.constexpr):
    """Return a row's highest logit, packed with its token id, from those of its chunks."""
    chunk = tl.arange(0, CHUNKS)
    found = tl.load(
        bests + row.to(tl.int64) * num_chunks + chunk,
        mask=chunk < num_chunks,
        other=-0x8000000000000000,
    )
    return tl.max(found, 0)


@triton.jit
def survey(
    logits,
    bests,
    sums,
    spans,
    vocab_size,
    stride,
    num_chunks,
    WITH_SUMS: tl.constexpr,
    WITH_SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Find what each chunk of each row has.

    Parameters
    ----------
    logits : [num_rows, vocab_size]
    bests : [num_rows, num_chunks], int64
        The highest logit of each, packed with its token id.
    sums : [num_rows, num_chunks], float32
        Of ``exp(logit - highest of the chunk)``; with WITH_SUMS.
    spans : [num_rows, num_chunks * CHUNK / SPAN], int32
        The highest key in each SPAN tokens; with WITH_SPANS.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    ids, found = load_chunk(logits + row * stride, chunk, vocab_size, CHUNK)
    keys = keys_of(found)
    highest = tl.max(keys, 0)
    first = tl.min(tl.where(keys == highest, ids, 0x7FFFFFFF), 0)
    place = row * num_chunks + chunk
    tl.store(bests + place, pack(highest, first))
    if WITH_SUMS:
        top = logits_of(highest)
        # Where all are -inf, nothing is to be added, and -inf less itself is no number.
        base = tl.where(top == float("-inf"), 0.0, top)
        tl.store(sums + place, tl.sum(tl.exp(found - base), 0))
    if WITH_SPANS:
        per_chunk: tl.constexpr = CHUNK // SPAN
        maxima = tl.max(tl.reshape(keys, (per_chunk, SPAN)), 1)
        tl.store(spans + place * per_chunk + tl.arange(0, per_chunk), maxima)


@triton.jit
def finish_argmax(bests, ids, highest, num_chunks, CHUNKS: tl.constexpr):
    """Choose each row's likeliest token from those of its chunks."""
    row = tl.program_id(0)
    best = best_of(bests, row, num_chunks, CHUNKS)
    tl.store(ids + row, id_in(best))
    tl.store(highest + row, logits_of(key_in(best)))


@triton.jit
def normalizer_of(bests, sums, row, num_chunks, CHUNKS: tl.constexpr):
    """Return the log of the sum of a row's ``exp(logit)``."""
    chunk = tl.arange(0, CHUNKS)
    there = chunk < num_chunks
    place = row.to(tl.int64) * num_chunks + chunk
    packed = tl.load(bests + place, mask=there, other=-0x8000000000000000)
    parts = tl.load(sums + place, mask=there, other=0.0)
    top = logits_of(key_in(tl.max(packed, 0)))
    tops = tl.where(there, logits_of(key_in(packed)), float("-inf"))
    # A part that is all -inf has the sum 0, and its weight is 0, unless all parts are.
    total = tl.sum(parts * tl.exp(tops - top), 0)
    return top + tl.log(total)
