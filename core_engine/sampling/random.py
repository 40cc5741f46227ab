"""Random numbers that are a function of a seed and a position, and of nothing else.

SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014)
used as a counter: the state of its n-th step is known without taking the steps before, so a
token's number does not depend on what else was drawn, in which order, or in which batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GAMMA = 0x9E3779B97F4A7C15
_CHILD = 0xD1342543DE82EF95
_MASK = 2**64 - 1


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return one number in [0, 1) per pair of a seed and a position.

    Parameters
    ----------
    seeds : ndarray[num_rows], uint64
    positions : ndarray[num_rows], int64
        At least 0.

    Returns
    -------
    ndarray[num_rows], float64
        Multiples of 2**-53.
    """
    steps = positions.astype(np.uint64) + np.uint64(1)
    bits = _mix(_mix(seeds) + steps * np.uint64(_GAMMA))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def derive_seed(seed: int, index: int) -> int:
    """Return the seed of the ``index``-th child of ``seed``.

    A request's ``n`` samples, and an engine's requests, each get their own this way.

    Parameters
    ----------
    seed : int
        Any integer; taken modulo 2**64.
    index : int
        At least 0.

    Returns
    -------
    int
        In [0, 2**64 - 1].
    """
    parent = _mix(np.array([seed & _MASK], dtype=np.uint64))
    child = (int(parent[0]) ^ _CHILD) + (index + 1) * _GAMMA
    return int(_mix(np.array([child & _MASK], dtype=np.uint64))[0])
