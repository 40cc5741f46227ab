"""Matrix products of a model's shapes, in turns over weights enough to fill no cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MEMORY_BYTES = 256 << 20


def measure_products(
    in_features: int, out_features: int, dtype: str, rows: list[int], repeats: int
) -> dict[str, dict[int, list[float]]]:
    """Measure one product with each of many weights, side by side.

    Parameters
    ----------
    in_features, out_features : int
    dtype : str
        Of the weights.
    rows : list of int
        Numbers of rows to multiply.
    repeats : int
        Times that all weights are gone through, by each side in turn.

    Returns
    -------
    dict of str to dict
        By side and number of rows the seconds that one product took, for every repeat.
    """
    import torch

    from quire.kernels.cpu.backend import why_missing
    from quire.kernels.cpu.packed_linear import PackedLinear

    type_ = getattr(torch, dtype)
    count = max(2, _MEMORY_BYTES // (in_features * out_features * type_.itemsize))
    weights = [torch.rand(out_features, in_features).sub_(0.5).to(type_) for _ in range(count)]
    sides: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {}
    if why_missing() is None and type_ is not torch.float16:
        sides["native"] = [PackedLinear(weight) for weight in weights]
    sides["torch"] = [partial(_by_torch, weight) for weight in weights]
    figures: dict[str, dict[int, list[float]]] = {side: {n: [] for n in rows} for side in sides}
    for number in rows:
        x = torch.rand(number, in_features)
        for repeat in range(repeats + 1):
            for side, products in sides.items():
                # Slow sides take a few of the weights: a product, not the whole, is what counts.
                started = time.perf_counter()
                done = 0
                for product in products:
                    product(x)
                    done += 1
                    if time.perf_counter() - started > 1.0:
                        break
                if repeat:
                    figures[side][number].append((time.perf_counter() - started) / done)
    return figures


def _by_torch(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.linear(x.to(weight.dtype), weight)
