"""Kernels that change logits in place: penalties, and the masks of grammars."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def penalize(
    logits,
    rows,
    token_ids,
    counts,
    presence,
    frequency,
    repetition,
    stride,
    num_entries,
    BLOCK: tl.constexpr,
):
    """Lower the logits of tokens that have occurred, `BLOCK` entries at a time."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = entry < num_entries
    row = tl.load(rows + entry, mask=there, other=0)
    place = logits + row * stride + tl.load(token_ids + entry, mask=there, other=0)
    found = tl.load(place, mask=there, other=0.0)
    factor = tl.load(repetition + entry, mask=there, other=1.0)
    found = tl.where(found < 0.0, found * factor, tl.div_rn(found, factor))
    count = tl.load(counts + entry, mask=there, other=0.0)
    off = tl.load(frequency + entry, mask=there, other=0.0) * count
    has_occurred = tl.where(count > 0.0, 1.0, 0.0)
    off += tl.load(presence + entry, mask=there, other=0.0) * has_occurred
    tl.store(place, found - off, mask=there)


@triton.jit
def mask_logits(
    logits, rows, bitmask, vocab_size, stride, num_words, words_stride, CHUNK: tl.constexpr
):
    """Write -inf wherever a chunk's token is not allowed."""
    mask = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    word = ids // 32
    words = tl.load(bitmask + mask * words_stride + word, mask=word < num_words, other=0)
    is_allowed = ((words >> (ids % 32)) & 1) != 0
    row = tl.load(rows + mask)
    nothing = tl.full((CHUNK,), float("-inf"), tl.float32)
    tl.store(logits + row * stride + ids, nothing, mask=(ids < vocab_size) & (is_allowed == 0))
