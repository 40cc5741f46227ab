"""quantized_linear on a GPU: what is made ready for its kernels, and how they are run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import quantized_linear as quantized_linear_by_torch
from quire.kernels.triton.configs import bucket, config_for
from quire.kernels.triton.quantized_inputs import multiply_outliers, prepare_inputs
from quire.kernels.triton.quantized_product import add_parts, quantized_product
from quire.kernels.triton.tunables import Config

_FEW_ROWS = 32
"""Up to so many rows, inputs are read as they lie: they are few beside the codes."""

_LEAST_BLOCK = 64
"""Columns below which a block rather has several groups."""


@dataclass(frozen=True)
class Plan:
    """How a product is computed.

    Attributes
    ----------
    config : dict
        Of the tuning table, its INPUTS such as the weight's groups allow.
    by_values : bool
        Codes become values first; see `quire.kernels.triton.quantized_product`.
    is_apart : bool
        Even columns of the inputs are to lie apart from the odd ones.
    """

    config: Config
    by_values: bool
    is_apart: bool


def plan_product(weight: QuantizedWeight, num_rows: int, dtype: torch.dtype) -> Plan:
    """Choose how inputs of that type are multiplied; int8 ones only where codes are.

    Parameters
    ----------
    weight : QuantizedWeight
    num_rows : int
    dtype : torch.dtype
        Of what is multiplied, not of the result.
    """
    has_pairs = weight.kind in ("int4", "table4")
    config = dict(
        config_for(
            "quantized_product",
            weight.codes.device,
            rows=bucket(num_rows),
            outputs=weight.out_features,
            inputs=weight.in_features,
            kind=weight.kind,
            dtype=str(dtype)[6:],
        )
    )
    if has_pairs or dtype is torch.int8:
        # A product has 16 inputs at least, 32 of int8; of pairs of columns it has one half.
        config["INPUTS"] = max(config["INPUTS"], 64 if has_pairs and dtype is torch.int8 else 32)
    by_values = False
    if weight.group_size < weight.in_features:
        fitting = config["INPUTS"]
        while weight.group_size % fitting:
            fitting //= 2
        by_values = fitting < min(_LEAST_BLOCK, config["INPUTS"])
        config["INPUTS"] = config["INPUTS"] if by_values else fitting
    if by_values or weight.kind == "table4":
        # Values take registers, as codes do not.
        config["OUTPUTS"] = min(config["OUTPUTS"], 64)
        config["INPUTS"] = min(config["INPUTS"], 64)
        config["ROWS"] = min(config["ROWS"], 64)
    return Plan(config, by_values, has_pairs and num_rows > _FEW_ROWS)


@cache
def _num_processors(device: torch.device) -> int:
    """Return how many programs a device runs at the same time, at least."""
    if device.type == "cpu":
        return 8  # the interpreter runs one, but is to take the same ways
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0)) or 64


def num_splits(weight: QuantizedWeight, num_rows: int, config: Config) -> int:
    """Return into how many parts inputs are divided, so that enough programs run at once.

    Parts are written and read again: they are no more than a fraction of the codes.
    """
    programs = -(-num_rows // config["ROWS"]) * -(-weight.out_features // config["OUTPUTS"])
    wanted = 2 * _num_processors(weight.codes.device) // programs
    blocks = -(-weight.in_features // config["INPUTS"])
    row_bytes = weight.codes.shape[1]
    return max(1, min(wanted, blocks // 4, row_bytes // (16 * num_rows), 32))


def quantized_linear(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `quire.kernels.quantized_interface.QuantizedOperations.quantized_linear`."""
    rounds = weight.activations == "int8"
    if rounds and weight.input_factors is not None:
        return quantized_linear_by_torch(x, weight, bias)  # which says what is wrong
    out = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    inputs = _Inputs.of(x, weight)
    _multiply(x, inputs, weight, bias, out)
    return out


@dataclass(frozen=True)
class _Inputs:
    """What is multiplied with codes.

    Attributes
    ----------
    high : Tensor[num_rows, width]
    low : Tensor[num_rows, width] or None
        What is to be added to it.
    steps : Tensor[num_rows] or None
        What the result is to be multiplied with.
    odd : int
        Where odd columns begin, if they are apart.
    plan : Plan
    """

    high: torch.Tensor
    low: torch.Tensor | None
    steps: torch.Tensor | None
    odd: int
    plan: Plan

    @classmethod
    def of(cls, x: torch.Tensor, weight: QuantizedWeight) -> _Inputs:
        num_rows, num_inputs = x.shape
        rounds = weight.activations == "int8"
        plan = plan_product(weight, num_rows, x.dtype)
        dtype, in_pairs = x.dtype, False
        if rounds and weight.kind in ("int8", "int4"):
            in_integers = plan_product(weight, num_rows, torch.int8)
            if not in_integers.by_values:
                plan, dtype = in_integers, torch.int8
        if weight.input_factors is not None and x.dtype is not torch.float32:
            # A product with a factor has more digits than 16 bits hold.
            in_pairs = not plan.by_values and weight.kind != "table4"
            dtype = _part_type(x.device) if in_pairs else torch.float32
            if not in_pairs:
                plan = plan_product(weight, num_rows, dtype)
        if not (
            rounds or plan.is_apart or weight.order is not None or weight.input_factors is not None
        ):
            return cls(x, None, None, 1, plan)
        odd = -(-num_inputs // 32) * 16 if plan.is_apart else 1
        width = 2 * odd if plan.is_apart else num_inputs
        # What stands beside an odd number of columns is read, and times 0 is to be 0.
        make = torch.zeros if plan.is_apart and num_inputs % 2 else torch.empty
        high = make(num_rows, width, dtype=dtype, device=x.device)
        low = torch.zeros_like(high) if in_pairs else None
        steps = None
        if rounds:
            steps = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        prepare_inputs[(num_rows,)](
            x,
            x if weight.order is None else weight.order.contiguous(),
            x if weight.input_factors is None else weight.input_factors.contiguous(),
            high,
            high if low is None else low,
            x if steps is None else steps,
            num_inputs,
            x.stride(0),
            width,
            odd,
            weight.activation_scale or 0.0,
            HAS_ORDER=weight.order is not None,
            HAS_FACTORS=weight.input_factors is not None,
            IN_STEPS=rounds,
            HAS_FIXED_STEP=weight.activation_scale is not None,
            IN_PAIRS=in_pairs,
            IS_APART=plan.is_apart,
            BLOCK=min(bucket(max(num_inputs, 16)), 1024),
            num_warps=4,
        )
        return cls(high, low, steps, odd, plan)


def _part_type(device: torch.device) -> torch.dtype:
    """Return the type of two numbers that make one of float32."""
    # It has all of float32's exponents; the interpreter, which runs on a CPU, does not know it.
    return torch.float16 if device.type == "cpu" else torch.bfloat16


def _multiply(
    x: torch.Tensor,
    inputs: _Inputs,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    num_rows, num_outputs = out.shape
    plan, outliers = inputs.plan, weight.outliers
    config = plan.config
    splits = num_splits(weight, num_rows, config)
    blocks = -(-weight.in_features // config["INPUTS"])
    per_split = -(-blocks // splits)
    splits = -(-blocks // per_split)
    parts = None
    if splits > 1 or outliers is not None:
        num_parts = splits + (outliers is not None)
        parts = torch.empty(num_parts, num_rows, num_outputs, dtype=torch.float32, device=x.device)
    codes = weight.codes.contiguous()
    table = weight.table
    tiles = -(-num_rows // config["ROWS"]) * -(-num_outputs // config["OUTPUTS"])
    scales = weight.scales.contiguous()
    quantized_product[(tiles, splits)](
        inputs.high,
        inputs.high if inputs.low is None else inputs.low,
        codes.view(torch.uint8) if weight.kind == "fp8" else codes,
        scales,
        scales if weight.zeros is None else weight.zeros.contiguous(),
        scales if table is None else table.contiguous(),
        scales if inputs.steps is None else inputs.steps,
        scales if bias is None else bias.contiguous(),
        out if parts is None else parts,
        num_rows,
        num_outputs,
        weight.in_features,
        weight.scales.shape[1],
        min(weight.group_size, weight.in_features),
        inputs.high.stride(0),
        inputs.odd,
        codes.shape[1],
        per_split * config["INPUTS"],
        KIND=weight.kind,
        BY_VALUES=plan.by_values,
        IN_PAIRS=inputs.low is not None,
        IS_APART=plan.is_apart,
        ONE_GROUP=weight.group_size >= weight.in_features,
        HAS_ZEROS=weight.zeros is not None,
        HAS_STEPS=inputs.steps is not None,
        HAS_BIAS=bias is not None,
        IN_PARTS=parts is not None,
        TABLE_STRIDE=16 if table is not None and table.dim() == 2 else 0,
        **config,
    )
    if parts is None:
        return
    if outliers is not None:
        rows = 16
        multiply_outliers[(num_outputs, -(-num_rows // rows))](
            x,
            x if weight.input_factors is None else weight.input_factors.contiguous(),
            x if inputs.steps is None else inputs.steps,
            outliers.first.contiguous(),
            outliers.columns.contiguous(),
            outliers.values.contiguous(),
            parts[splits],
            num_rows,
            num_outputs,
            x.stride(0),
            HAS_FACTORS=weight.input_factors is not None,
            IN_STEPS=inputs.steps is not None,
            ROWS=rows,
            BLOCK=32,
            num_warps=2,
        )
    block = min(bucket(max(num_outputs, 16)), 512)
    add_parts[(num_rows, -(-num_outputs // block))](
        parts,
        scales if inputs.steps is None else inputs.steps,
        scales if bias is None else bias.contiguous(),
        out,
        num_rows,
        num_outputs,
        parts.shape[0],
        HAS_STEPS=inputs.steps is not None,
        HAS_BIAS=bias is not None,
        BLOCK=block,
        num_warps=4,
    )
