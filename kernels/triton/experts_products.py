"""The kernels of mixtures of experts: choice, order, products and sum, without the host.

Pairs of a token and an expert are sorted by expert on the device and cut into tiles of one expert.
How many tiles there can be at most is known without looking, so that many programs are started,
and those without a tile end at once. They run as they are in Triton's interpreter, too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.lora_products import multiply

KINDS = frozenset({"silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "tanh"})
"""What `activate` knows."""


@triton.jit
def activate(x, KIND: tl.constexpr):
    """Apply an activation function, see `quire.kernels.interface.Backend.activation`."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(y)) / 2 is the sigmoid of 2 * y.
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif KIND == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    elif KIND == "relu_squared":
        return tl.where(x <= 0.0, 0.0, x * x)
    else:
        tl.static_assert(KIND == "tanh")
        # Of a size alone, which no exponential is too large for; near 0 by its series.
        size = tl.abs(x)
        power = tl.exp(-2.0 * size)
        far = (1.0 - power) / (1.0 + power)
        near = size * (1.0 - size * size * (1.0 / 3.0 - size * size * (2.0 / 15.0)))
        positive = tl.where(size < 0.05, near, far)
        return tl.where(x < 0.0, -positive, positive)


@triton.jit
def route_rows(
    logits,
    weights,
    chosen,
    stride,
    num_experts,
    PER_TOKEN: tl.constexpr,
    NORMALIZED: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Choose one token's experts.

    Parameters
    ----------
    logits : [num_tokens, num_experts]
    weights : [num_tokens, PER_TOKEN], float32
    chosen : [num_tokens, PER_TOKEN], int64
    EXPERTS, CHOICES : int
        Powers of two, not below ``num_experts`` and ``PER_TOKEN``.
    """
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < num_experts
    scores = tl.load(logits + row * stride + expert, mask=is_expert, other=float("-inf"))
    scores = scores.to(tl.float32)
    powers = tl.where(is_expert, tl.exp(scores - tl.max(scores, 0)), 0.0)
    shares = powers / tl.sum(powers, 0)
    # What is no number is above all numbers, and what has been chosen is below.
    left = tl.where(shares == shares, shares, 2.0)
    left = tl.where(is_expert, left, -1.0)
    choice = tl.arange(0, CHOICES)
    numbers = tl.zeros((CHOICES,), dtype=tl.int64)
    counts = tl.zeros((CHOICES,), dtype=tl.float32)
    for place in tl.static_range(PER_TOKEN):
        best = tl.min(tl.where(left == tl.max(left, 0), expert, EXPERTS), 0)
        numbers = tl.where(choice == place, best.to(tl.int64), numbers)
        share = tl.sum(tl.where(expert == best, shares, 0.0), 0)
        counts = tl.where(choice == place, share, counts)
        left = tl.where(expert == best, -1.0, left)
    if NORMALIZED:
        counts = counts / tl.sum(counts, 0)
    is_choice = choice < PER_TOKEN
    tl.store(weights + row * PER_TOKEN + choice, counts, mask=is_choice)
    tl.store(chosen + row * PER_TOKEN + choice, numbers, mask=is_choice)


@triton.jit(do_not_specialize=["num_pairs", "first_expert"])
def count_pairs(chosen, counts, num_pairs, first_expert, PAIRS: tl.constexpr):
    """Count the pairs of one expert.

    Parameters
    ----------
    chosen : [num_pairs], int64
    counts : [num_held], int32
    """
    expert = first_expert + tl.program_id(0)
    found = tl.zeros((PAIRS,), dtype=tl.int32)
    for begin in range(0, num_pairs, PAIRS):
        pair = begin + tl.arange(0, PAIRS)
        number = tl.load(chosen + pair, mask=pair < num_pairs, other=-1)
        found += (number == expert).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(found, 0))


@triton.jit(do_not_specialize=["num_pairs", "first_expert"])
def order_pairs(
    chosen,
    counts,
    order,
    tiles,
    num_tiles,
    num_pairs,
    first_expert,
    num_held,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Put the pairs of one expert into their place, in the order of their tokens.

    Parameters
    ----------
    chosen : [num_pairs], int64
    counts : [num_held], int32
        From `count_pairs`.
    order : [num_pairs], int32
        Pairs, expert by expert; those of experts that are not here are not in it.
    tiles : [most_tiles, 3], int32
        An expert's number here, where a tile begins in ``order``, and how many pairs it has.
    num_tiles : [1], int32
    EXPERTS : int
        A power of two, not below ``num_held``.
    """
    own = tl.program_id(0)
    each = tl.arange(0, EXPERTS)
    numbers = tl.load(counts + each, mask=each < num_held, other=0)
    in_tiles = (numbers + ROWS - 1) // ROWS
    first = tl.sum(tl.where(each < own, numbers, 0), 0)
    first_tile = tl.sum(tl.where(each < own, in_tiles, 0), 0)
    count = tl.sum(tl.where(each == own, numbers, 0), 0)
    tile = tiles + first_tile * 3
    for begin in range(0, count, ROWS):
        tl.store(tile, own)
        tl.store(tile + 1, first + begin)
        tl.store(tile + 2, tl.minimum(count - begin, ROWS))
        tile += 3
    if own == num_held - 1:
        tl.store(num_tiles, tl.sum(in_tiles, 0))
    place = order + first
    for begin in range(0, num_pairs, PAIRS):
        pair = begin + tl.arange(0, PAIRS)
        number = tl.load(chosen + pair, mask=pair < num_pairs, other=-1)
        is_own = (number == first_expert + own).to(tl.int32)
        tl.store(place + tl.cumsum(is_own, 0) - 1, pair, mask=is_own > 0)
        place += tl.sum(is_own, 0)


@triton.jit(do_not_specialize=["most_tiles"])
def expert_products(
    x,
    weight,
    order,
    tiles,
    num_tiles,
    out,
    most_tiles,
    per_row,
    num_outputs,
    num_inputs,
    x_stride,
    expert_stride,
    weight_stride,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Multiply a tile's rows with some rows of its expert's weight.

    Parameters
    ----------
    x : [num_pairs / per_row, num_inputs]
        The row of a pair is ``pair // per_row``.
    weight : [num_held, num_outputs, num_inputs]
        With KIND there are twice as many rows, and of the products with a row of the first half
        and that of the second ``activate(first, KIND) * second`` is taken.
    order, tiles, num_tiles
        From `order_pairs`.
    out : [num_pairs, num_outputs]
    most_tiles : int
        There are so many programs for each block of outputs.
    KIND : str or None
    TOGETHER : int
        Programs of so many tiles read the same weights soon after each other.
    """
    num_blocks = tl.cdiv(num_outputs, OUTPUTS)
    in_group = TOGETHER * num_blocks
    first_tile = tl.program_id(0) // in_group * TOGETHER
    size = tl.minimum(most_tiles - first_tile, TOGETHER)
    number = first_tile + tl.program_id(0) % in_group % size
    if number >= tl.load(num_tiles):
        return
    tile = tiles + number * 3
    each = tl.arange(0, ROWS)
    is_row = each < tl.load(tile + 2)
    pair = tl.load(order + tl.load(tile + 1) + each, mask=is_row, other=0).to(tl.int64)
    output = tl.program_id(0) % in_group // size * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < num_outputs
    column = tl.arange(0, INPUTS)
    inputs = x + (pair // per_row)[:, None] * x_stride + column[None, :]
    expert = weight + tl.load(tile).to(tl.int64) * expert_stride
    first = expert + output.to(tl.int64)[None, :] * weight_stride + column[:, None]
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    if KIND is not None:
        second = expert + (output + num_outputs).to(tl.int64)[None, :] * weight_stride
        second += column[:, None]
        others = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for begin in range(0, num_inputs, INPUTS):
        is_column = column < num_inputs - begin
        rows = tl.load(inputs, mask=is_row[:, None] & is_column[None, :], other=0.0)
        is_there = is_output[None, :] & is_column[:, None]
        sums = multiply(rows, tl.load(first, mask=is_there, other=0.0), sums, PRECISION)
        if KIND is not None:
            others = multiply(rows, tl.load(second, mask=is_there, other=0.0), others, PRECISION)
            second += INPUTS
        inputs += INPUTS
        first += INPUTS
    if KIND is not None:
        sums = activate(sums, KIND) * others
    places = out + pair[:, None] * num_outputs + output[None, :]
    tl.store(places, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["first_expert"])
def add_experts(
    made,
    weights,
    chosen,
    out,
    first_expert,
    num_held,
    size,
    PER_TOKEN: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up what a token's experts made of it, in ascending order of their numbers.

    Parameters
    ----------
    made : [num_tokens, PER_TOKEN, size]
        Of experts that are not here it is not read.
    weights : [num_tokens, PER_TOKEN], float32
    chosen : [num_tokens, PER_TOKEN], int64
    out : [num_tokens, size]
    CHOICES : int
        A power of two, not below ``PER_TOKEN``.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < size
    choice = tl.arange(0, CHOICES)
    is_choice = choice < PER_TOKEN
    highest: tl.constexpr = 1 << 30
    numbers = tl.load(chosen + row * PER_TOKEN + choice, mask=is_choice, other=highest)
    numbers = numbers.to(tl.int32)
    shares = tl.load(weights + row * PER_TOKEN + choice, mask=is_choice, other=0.0)
    is_here = (numbers >= first_expert) & (numbers < first_expert + num_held)
    place = tl.sum((numbers[None, :] < numbers[:, None]).to(tl.int32), 1)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for turn in tl.static_range(PER_TOKEN):
        is_next = place == turn
        if tl.sum((is_next & is_here).to(tl.int32), 0) > 0:
            number = tl.sum(tl.where(is_next, choice, 0), 0)
            share = tl.sum(tl.where(is_next, shares, 0.0), 0)
            at = made + (row * PER_TOKEN + number) * size + column
            sums += tl.load(at, mask=is_column, other=0.0).to(tl.float32) * share
    tl.store(out + row * size + column, sums.to(out.dtype.element_ty), mask=is_column)
