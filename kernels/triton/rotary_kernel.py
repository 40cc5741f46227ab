"""The kernel of rotary embedding: some heads of one token to a program, queries or keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_heads(
    x,
    out,
    cos,
    sin,
    token,
    head,
    num_heads,
    token_stride,
    head_stride,
    pair,
    is_pair,
    INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """Rotate heads of one token of `x`, and bring what is not rotated over as it is."""
    is_head = head < num_heads
    source = x + token * token_stride + head.to(tl.int64)[:, None] * head_stride
    target = out + (token * num_heads + head)[:, None] * HEAD_DIM
    if INTERLEAVED:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + HALF
    there = is_head[:, None] & is_pair[None, :]
    a = tl.load(source + first[None, :], mask=there, other=0.0).to(tl.float32)
    b = tl.load(source + second[None, :], mask=there, other=0.0).to(tl.float32)
    type_out = out.dtype.element_ty
    turned = a * cos[None, :] - b * sin[None, :]
    tl.store(target + first[None, :], turned.to(type_out), mask=there)
    turned = b * cos[None, :] + a * sin[None, :]
    tl.store(target + second[None, :], turned.to(type_out), mask=there)
    if REST > 0:
        column = 2 * HALF + tl.arange(0, REST)
        there = is_head[:, None] & (column < HEAD_DIM)[None, :]
        kept = tl.load(source + column[None, :], mask=there, other=0.0)
        tl.store(target + column[None, :], kept, mask=there)


@triton.jit
def rotate(
    query,
    key,
    cos,
    sin,
    query_out,
    key_out,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    cos_stride,
    sin_stride,
    INTERLEAVED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotate ``HEADS`` heads of a token: of its query, or of its key in the last programs.

    Parameters
    ----------
    query, query_out : [num_tokens, NUM_HEADS, HEAD_DIM]; the result contiguous
    key, key_out : [num_tokens, NUM_KV_HEADS, HEAD_DIM]; the result contiguous
    cos, sin : [num_tokens, HALF]
    PAIRS : the power of two from HALF on
    REST : one from ``HEAD_DIM - 2 * HALF`` on, or 0
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    of_query: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    pair = tl.arange(0, PAIRS)
    is_pair = pair < HALF
    cosine = tl.load(cos + token * cos_stride + pair, mask=is_pair, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * sin_stride + pair, mask=is_pair, other=0.0).to(tl.float32)
    if group < of_query:
        rotate_heads(
            query,
            query_out,
            cosine,
            sine,
            token,
            group * HEADS + tl.arange(0, HEADS),
            NUM_HEADS,
            query_stride,
            query_head_stride,
            pair,
            is_pair,
            INTERLEAVED,
            HEAD_DIM,
            HALF,
            REST,
        )
    else:
        rotate_heads(
            key,
            key_out,
            cosine,
            sine,
            token,
            (group - of_query) * HEADS + tl.arange(0, HEADS),
            NUM_KV_HEADS,
            key_stride,
            key_head_stride,
            pair,
            is_pair,
            INTERLEAVED,
            HEAD_DIM,
            HALF,
            REST,
        )
