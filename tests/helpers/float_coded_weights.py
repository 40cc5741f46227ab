"""Weights in codes that stand for floats, e4m3 or entries of tables, drawn."""

from __future__ import annotations

import torch

from quire.kernels.quantized import Outliers, QuantizedWeight

NOT_NUMBERS = (0x7F, 0xFF)


def draw_outliers(generator: torch.Generator, out_features: int, in_features: int) -> Outliers:
    """About one input in ten, but none of every third output."""
    places = torch.rand(out_features, in_features, generator=generator) < 0.1
    places[::3] = False
    first = torch.zeros(out_features + 1, dtype=torch.int64)
    torch.cumsum(places.sum(1), 0, out=first[1:])
    columns = places.nonzero()[:, 1].to(torch.int32)
    return Outliers(first, columns, torch.randn(len(columns), generator=generator))


def draw_weight(
    kind: str,
    out_features: int,
    in_features: int,
    group_size: int | None,
    seed: int,
    *,
    has_order: bool = False,
    has_factors: bool = False,
    has_outliers: bool = False,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    num_groups = 1 if group_size is None else -(-in_features // group_size)
    table = None
    if kind == "fp8":
        codes = torch.randint(0, 256, (out_features, in_features), generator=generator)
        codes[codes == NOT_NUMBERS[0]] = 0
        codes[codes == NOT_NUMBERS[1]] = 0x80
        codes = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        codes = torch.randint(0, 256, (out_features, (in_features + 1) // 2), generator=generator)
        codes = codes.to(torch.uint8)
        shape = (16,) if kind == "table" else (out_features, 16)
        table = torch.randn(shape, generator=generator)
    return QuantizedWeight(
        kind="fp8" if kind == "fp8" else "table4",
        codes=codes,
        scales=torch.rand(out_features, num_groups, generator=generator) - 0.3,
        in_features=in_features,
        group_size=in_features if group_size is None else group_size,
        order=torch.randperm(in_features, generator=generator) if has_order else None,
        input_factors=torch.rand(in_features, generator=generator) + 0.5 if has_factors else None,
        table=table,
        outliers=draw_outliers(generator, out_features, in_features) if has_outliers else None,
    )


def outlier_sizes(weight: QuantizedWeight) -> torch.Tensor:
    assert weight.outliers is not None
    rows = torch.arange(weight.out_features).repeat_interleave(weight.outliers.first.diff())
    sizes = torch.zeros(weight.out_features, weight.in_features, dtype=torch.float64)
    values = weight.outliers.values.double().abs()
    sizes[rows, weight.outliers.columns.long()] = values
    if weight.input_factors is not None:
        sizes *= weight.input_factors.double()
    return sizes
