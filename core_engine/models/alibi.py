"""ALiBi slopes (Press et al., arXiv:2108.12409), in the two orders that checkpoints use."""

from __future__ import annotations

import math


def bloom_slopes(num_heads: int) -> tuple[float, ...]:
    """Slopes as in the paper's code (BLOOM, Falcon).

    For a count that is no power of two: those of the power below, then every other one of the
    power above.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = _geometric(below, 8.0)
    slopes += _geometric(2 * below, 8.0)[0 : 2 * (num_heads - below) : 2]
    return tuple(slopes)


def mpt_slopes(num_heads: int, bias_max: float) -> tuple[float, ...]:
    """Slopes as in MPT: of the power of two above, first the even ones, then the odd ones.

    `bias_max` is the exponent of the flattest slope, ``2 ** -bias_max``.
    """
    above = 2 ** math.ceil(math.log2(num_heads))
    slopes = _geometric(above, bias_max)
    if above != num_heads:
        slopes = (slopes[1::2] + slopes[::2])[:num_heads]
    return tuple(slopes)


def _geometric(count: int, bias_max: float) -> list[float]:
    return [2.0 ** (-bias_max * (i + 1) / count) for i in range(count)]
