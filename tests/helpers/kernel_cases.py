"""Comparisons of a backend's kernels with the reference: one function per operation.

Each takes what it needs from a `Draw` and raises `Mismatch`. They need torch alone, so that they
run where there is a GPU and no pytest: `tests/gpu/compare.py` calls them there, and property tests
call them with seeds that hypothesis draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernel_cases_attention import ATTENTION
from kernel_cases_mixtures import MIXTURES
from kernel_cases_quantized import QUANTIZED
from kernel_cases_rows import ROWS
from kernel_cases_sampling import SAMPLING
from kernel_draw import Draw

Case = Callable[[Draw, Any], None]

CASES: dict[str, Case] = {**ROWS, **QUANTIZED, **ATTENTION, **SAMPLING, **MIXTURES}
"""By the name of the operation, as backends have it, but for what is in parentheses."""


WEIGHTS = {**dict.fromkeys(ATTENTION, 4.0), "quantized_linear": 3.0, "sample_tokens": 3.0}
"""Of cases that have many forms, each compiled by itself: the share of time beside others' 1."""


def operation(name: str) -> str:
    """Return the operation of a case."""
    return name.partition(" (")[0]
