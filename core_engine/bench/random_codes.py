"""Quantized checkpoints of random codes: a folder of each format, as wide as a given checkpoint.

Codes are drawn and not computed, because what they are changes no time; scales are such that
weights are as large as those of a random checkpoint. What is no projection of attention or MLP is
copied.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.bench.checkpoint import made_from
from quire.bench.contest import BenchError
from quire.bench.random_adapters import TARGETS

if TYPE_CHECKING:
    import torch

GROUP = 128
"""Inputs that share a scale, where a format has groups."""
SPARSE_SHARE = 0.0045
"""Of a weight's numbers, those that SqueezeLLM keeps apart in its usual setting."""
_SPREAD = 0.02
_NF4_BLOCK = 64
# How far codes are from 0 on average (root of the mean square), as they are drawn here.
_SPREAD_4_BITS = math.sqrt((16**2 - 1) / 12)
_SPREAD_8_BITS = math.sqrt((256**2 - 1) / 12)
_MOST_FLOAT = 448.0
_SPREAD_FLOATS = _MOST_FLOAT / 4  # scales are such that the largest weight is the largest code

Tensors = dict[str, "torch.Tensor"]
Make = Callable[["torch.Generator", int, int], Tensors]


@dataclass(frozen=True, slots=True)
class CodeFormat:
    """A format that checkpoints keep quantized weights in.

    Attributes
    ----------
    make : callable
        From a generator, outputs and inputs to a module's tensors, by what follows its name.
    divisor : int
        Of the inputs and the outputs that it can have.
    config : mapping
        Its ``quantization_config``.
    """

    make: Make
    divisor: int
    config: Mapping[str, Any]


def random_codes(folder: Path, name: str) -> Path:
    """Return a folder like a checkpoint's, of random codes, made at the first use.

    Parameters
    ----------
    folder : Path
        A checkpoint as safetensors files.
    name : str
        One of `FORMATS`.

    Raises
    ------
    BenchError
        The checkpoint has no projections of the usual names, or of sizes that do not fit.
    """
    target = made_from(folder, name)
    if not (target / "config.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        _write(folder, target, FORMATS[name])
    return target


def _write(folder: Path, target: Path, made: CodeFormat) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    num_quantized = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                module, _, kind = name.rpartition(".")
                if kind != "weight" or module.split(".")[-1] not in TARGETS:
                    tensors[name] = file.get_tensor(name)
                    continue
                rows, columns = file.get_slice(name).get_shape()
                if rows % made.divisor or columns % made.divisor:
                    raise BenchError(
                        f"{folder}: {module} is [{rows}, {columns}]; here this format takes "
                        f"multiples of {made.divisor}"
                    )
                codes = made.make(generator, rows, columns)
                tensors |= {f"{module}.{part}": tensor for part, tensor in codes.items()}
                num_quantized += 1
    if not num_quantized:
        raise BenchError(f"{folder} has no projection named as one of {', '.join(TARGETS)}")
    unfinished = target / f"{os.getpid()}.part"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = dict(made.config)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _words(generator: torch.Generator, *shape: int) -> torch.Tensor:
    import torch

    low, high = -(1 << 31), 1 << 31
    return torch.randint(low, high, shape, dtype=torch.int32, generator=generator)


def _repeated(nibble: int, *shape: int) -> torch.Tensor:
    """Words of eight equal codes of 4 bits."""
    import torch

    word = nibble * 0x11111111
    return torch.full(shape, word - (1 << 32) if word >> 31 else word, dtype=torch.int32)


def _zeros(generator: torch.Generator, groups: int, rows: int) -> torch.Tensor:
    """Words of eight zero points near the middle, as they are where weights are asymmetric."""
    import torch

    points = torch.randint(6, 11, (groups, rows // 8, 8), generator=generator)
    words = (points << torch.arange(0, 32, 4)).sum(2)
    return torch.where(words >> 31 > 0, words - (1 << 32), words).int()


def _scales(generator: torch.Generator, spread: float, *shape: int) -> torch.Tensor:
    import torch

    return (torch.rand(shape, generator=generator) + 0.5) * (_SPREAD / spread)


def _awq(generator: torch.Generator, rows: int, columns: int) -> Tensors:
    groups = columns // GROUP
    return {
        "qweight": _words(generator, columns, rows // 8),
        "qzeros": _zeros(generator, groups, rows),
        "scales": _scales(generator, _SPREAD_4_BITS, groups, rows).half(),
    }


def _gptq(
    generator: torch.Generator, rows: int, columns: int, *, act_order: bool = False
) -> Tensors:
    import torch

    groups = columns // GROUP
    order = torch.arange(columns)
    if act_order:  # modules that share their input share their order: it is made of the input
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    return {
        "qweight": _words(generator, columns // 8, rows),
        "qzeros": _repeated(7, groups, rows // 8),  # the format has one less than the zero point
        "scales": _scales(generator, _SPREAD_4_BITS, groups, rows).half(),
        "g_idx": (order // GROUP).int(),
    }


def _act_order(generator: torch.Generator, rows: int, columns: int) -> Tensors:
    return _gptq(generator, rows, columns, act_order=True)


def _squeezellm(generator: torch.Generator, rows: int, columns: int) -> Tensors:
    import torch

    table = torch.randn(rows, 16, generator=generator).sort(1).values * _SPREAD
    each = max(1, round(columns * SPARSE_SHARE))
    picked = torch.rand(rows, columns, generator=generator).topk(each, 1).indices.sort(1).values
    return {
        "qweight": _words(generator, columns // 8, rows),
        "lookup_table": table.half(),
        "rows": torch.arange(0, rows * each + 1, each, dtype=torch.int32),
        "cols": picked.reshape(-1).int(),
        "vals": torch.randn(rows * each, generator=generator) * _SPREAD,
    }


def _packed_groups(generator: torch.Generator, rows: int, columns: int) -> Tensors:
    import torch

    return {
        "weight_packed": _words(generator, rows, columns // 8),
        "weight_scale": _scales(generator, _SPREAD_4_BITS, rows, columns // GROUP).bfloat16(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _bytes(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    import torch

    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)


def _int8_channels(generator: torch.Generator, rows: int, columns: int) -> Tensors:
    return {
        "weight": _bytes(generator, rows, columns),
        "weight_scale": _scales(generator, _SPREAD_8_BITS, rows, 1).bfloat16(),
    }


def _int8_outputs(generator: torch.Generator, rows: int, columns: int) -> Tensors:
    return {
        "weight": _bytes(generator, rows, columns),
        "SCB": _scales(generator, _SPREAD_8_BITS, rows) * 127,  # what the code 127 stands for
    }


def _floats(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    import torch

    drawn = torch.randn(rows, columns, generator=generator) * _SPREAD_FLOATS
    return drawn.clamp(-_MOST_FLOAT, _MOST_FLOAT).to(torch.float8_e4m3fn)


def _fp8_channels(generator: torch.Generator, rows: int, columns: int) -> Tensors:
    return {
        "weight": _floats(generator, rows, columns),
        "weight_scale": _scales(generator, _SPREAD_FLOATS, rows, 1).bfloat16(),
    }


def _fp8_blocks(generator: torch.Generator, rows: int, columns: int) -> Tensors:
    return {
        "weight": _floats(generator, rows, columns),
        "weight_scale_inv": _scales(generator, _SPREAD_FLOATS, rows // GROUP, columns // GROUP),
    }


# The quantiles of the normal distribution that QLoRA (Dettmers et al. 2023) defines as NF4.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _nf4(generator: torch.Generator, rows: int, columns: int) -> Tensors:
    import torch

    state = {
        "quant_type": "nf4",
        "blocksize": _NF4_BLOCK,
        "dtype": "bfloat16",
        "shape": [rows, columns],
    }
    count = rows * columns
    codes = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, generator=generator)
    table = torch.tensor(_NF4)
    spread = float(table.square().mean().sqrt())
    return {
        "weight": codes,
        "weight.absmax": _scales(generator, spread, count // _NF4_BLOCK),
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def _compressed(
    kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None
) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _per_token(kind: str) -> dict[str, Any]:
    common = {"symmetric": True, "dynamic": True, "strategy": "token"}
    return {"num_bits": 8, "type": kind, **common}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "lm_head": False}
_BITSANDBYTES = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}
FORMATS: dict[str, CodeFormat] = {
    "awq": CodeFormat(
        _awq,
        GROUP,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
    "gptq": CodeFormat(_gptq, GROUP, {**_GPTQ, "desc_act": False}),
    "gptq-act-order": CodeFormat(_act_order, GROUP, {**_GPTQ, "desc_act": True}),
    "squeezellm": CodeFormat(_squeezellm, 8, {"quant_method": "squeezellm", "wbits": 4}),
    "ct-w4a16": CodeFormat(
        _packed_groups,
        GROUP,
        _compressed(
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
            None,
        ),
    ),
    "ct-w8a8": CodeFormat(
        _int8_channels,
        1,
        _compressed(
            "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel"},
            _per_token("int"),
        ),
    ),
    "ct-fp8": CodeFormat(
        _fp8_channels,
        1,
        _compressed(
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "channel"},
            _per_token("float"),
        ),
    ),
    "fp8-blocks": CodeFormat(
        _fp8_blocks,
        GROUP,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [GROUP, GROUP],
        },
    ),
    "bnb-int8": CodeFormat(_int8_outputs, 1, {**_BITSANDBYTES, "load_in_8bit": True}),
    "bnb-nf4": CodeFormat(
        _nf4,
        _NF4_BLOCK,
        {
            **_BITSANDBYTES,
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": False,
        },
    ),
}
"""By the name that ``quire bench quantization --formats`` has for it."""
