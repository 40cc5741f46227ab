"""Weights to begin with that can already copy, a little: two heads, prepared and then trained.

What was said before is found by a pair of heads: one tells each token which token precedes it, the
next looks for the places that follow the token at hand. From weights that are random all over,
a model this small did not learn that pair within a run. Given a rough one it needs 400 steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch

CONSTANT_DIMS = 8
"""Places of the embedding that are alike in all tokens: what a head of positions can hold on to."""
CONSTANT = 0.1
FAST_PAIRS = 5
"""Pairs of places, those that rotate fastest, that tell one position from the next."""
POSITION_SCALE = 0.7
MATCH_SCALE = 3.0
WRITE_SCALE = 0.1
FETCH_SCALE = 0.2


def _rows(count: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Draw orthonormal rows that leave the constant places alone, ``[count, width]``."""
    drawn, _ = torch.linalg.qr(torch.randn(width, count, generator=generator))
    rows: torch.Tensor = drawn.T.contiguous()
    if width > CONSTANT_DIMS and count < width:
        rows[:, :CONSTANT_DIMS] = 0
    return rows


def prepare_to_copy(model: Any, seed: int, *, rope_theta: float) -> None:
    """Prepare an untrained Llama, in place.

    Layers begin by adding nothing but what the prepared heads tell: the first head of the first
    layer looks one token back, and those of the second layer look for a token's successors.

    Parameters
    ----------
    model : LlamaForCausalLM
    seed : int
        Of the directions along which heads read and write.
    rope_theta : float
        The base of the model's rotary positions.
    """
    config = model.config
    width, size = config.hidden_size, config.head_dim
    half = size // 2
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = model.model.embed_tokens.weight
        # Of one length, so that no token's constant places weigh more than another's.
        lengths = embedding.norm(dim=1, keepdim=True).clamp(min=1e-6)
        embedding *= config.initializer_range * width**0.5 / lengths
        embedding[:, :CONSTANT_DIMS] = CONSTANT
        # Directions of their own, so that a token and the one before it do not mix.
        both = _rows(2 * size, width, generator)
        read, write = both[:size], both[size:]
        attention = model.model.layers[0].self_attn
        keys, queries = attention.k_proj.weight[:size], attention.q_proj.weight[:size]
        keys.zero_()
        queries.zero_()
        for place in range(FAST_PAIRS):
            # Rotated by one position, so that the product peaks at a distance of one.
            angle = rope_theta ** (-place / half)
            keys[place, :CONSTANT_DIMS] = POSITION_SCALE
            queries[place, :CONSTANT_DIMS] = POSITION_SCALE * math.cos(angle)
            queries[place + half, :CONSTANT_DIMS] = -POSITION_SCALE * math.sin(angle)
        attention.v_proj.weight[:size] = read
        attention.o_proj.weight[:, :size] = WRITE_SCALE * write.T
        for layer in model.model.layers[1:2]:
            _look_for_successors(layer.self_attn, config, (read, write), generator)


def _look_for_successors(
    attention: Any,
    config: Any,
    directions: tuple[torch.Tensor, torch.Tensor],
    generator: torch.Generator,
) -> None:
    """Let each head match its token with the tokens that precede others, and fetch those."""
    read, write = directions
    size = config.head_dim
    half = size // 2
    # Slowly rotating places match at any distance.
    slow = [*range(half // 2, half), *range(half + half // 2, size)]
    per_group = config.num_attention_heads // config.num_key_value_heads
    for group in range(config.num_key_value_heads):
        mixed = MATCH_SCALE * _rows(size, size, generator)[: len(slow)]
        start = group * size
        attention.k_proj.weight[start : start + size] = 0
        attention.k_proj.weight[[start + place for place in slow]] = mixed @ write
        fetched = _rows(size, config.hidden_size, generator)
        attention.v_proj.weight[start : start + size] = fetched
        for head in range(group * per_group, (group + 1) * per_group):
            start = head * size
            attention.q_proj.weight[start : start + size] = 0
            attention.q_proj.weight[[start + place for place in slow]] = mixed @ read
            attention.o_proj.weight[:, start : start + size] = FETCH_SCALE * fetched.T
