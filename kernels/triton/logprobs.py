"""Kernels of log-probabilities: all of them, or those of a few tokens with their ranks."""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.logit_rows import keys_of, load_chunk, normalizer_of, pack


@triton.jit
def subtract_normalizer(
    logits,
    bests,
    sums,
    out,
    vocab_size,
    stride,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Turn a chunk's logits into log-probabilities, ``out[num_rows, vocab_size]``, float32."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    normalizer = normalizer_of(bests, sums, row, num_chunks, CHUNKS)
    ids, found = load_chunk(logits + row * stride, chunk, vocab_size, CHUNK)
    tl.store(out + row * vocab_size + ids, found - normalizer, mask=ids < vocab_size)


@triton.jit
def top_of_chunks(
    logits,
    targets,
    tops,
    higher,
    vocab_size,
    stride,
    num_chunks,
    k,
    WITH_RANKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Find the k highest logits of each chunk, and how many are higher than a given token's.

    Parameters
    ----------
    targets : [num_rows], int64
        The given tokens; with WITH_RANKS.
    tops : [num_rows, num_chunks, k], int64
        Packed with their token ids; past the vocabulary, what is below all others.
    higher : [num_rows, num_chunks], int32
        With WITH_RANKS.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    row_logits = logits + row * stride
    ids, found = load_chunk(row_logits, chunk, vocab_size, CHUNK)
    place = row * num_chunks + chunk
    if WITH_RANKS:
        target = tl.load(row_logits + tl.load(targets + row)).to(tl.float32)
        tl.store(higher + place, tl.sum((found > target).to(tl.int32), 0))
    if k > 0:
        left = tl.where(ids < vocab_size, pack(keys_of(found), ids), -0x8000000000000000)
        for i in range(k):
            best = tl.max(left, 0)
            tl.store(tops + place * k + i, best)
            left = tl.where(left == best, -0x8000000000000000, left)


@triton.jit
def finish_logprobs(
    logits,
    targets,
    top_ids,
    top_logits,
    higher,
    bests,
    sums,
    ids,
    logprobs,
    ranks,
    stride,
    num_chunks,
    k,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Write a row's given token and its k likeliest: ``[num_rows, k + 1]``."""
    row = tl.program_id(0).to(tl.int64)
    normalizer = normalizer_of(bests, sums, row, num_chunks, CHUNKS)
    target = tl.load(targets + row)
    out = row * (k + 1)
    tl.store(ids + out, target)
    given = tl.load(logits + row * stride + target).to(tl.float32)
    tl.store(logprobs + out, given - normalizer)
    chunk = tl.arange(0, CHUNKS)
    counts = tl.load(higher + row * num_chunks + chunk, mask=chunk < num_chunks, other=0)
    tl.store(ranks + row, tl.sum(counts.to(tl.int64), 0) + 1)
    for first in range(0, k, BLOCK):
        place = first + tl.arange(0, BLOCK)
        there = place < k
        top = tl.load(top_ids + row * k + place, mask=there, other=0)
        tl.store(ids + out + 1 + place, top, mask=there)
        found = tl.load(top_logits + row * k + place, mask=there, other=0.0)
        tl.store(logprobs + out + 1 + place, found - normalizer, mask=there)
