"""Tiny checkpoints in the formats of other tools: compressed-tensors, fp8, bitsandbytes.

``quantized_folder(plain, out, form)`` makes ``out/quantized`` of a plain folder of
``tests/helpers/checkpoints.py``, and beside it ``out/dequantized``, whose float32 weights are what
the first one's codes stand for: transformers reads that one without any other package.

Here are plain definitions of the formats; tests hold them against the tools themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

GROUP_SIZE = 16
"""It divides every size of the tiny models."""

NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip


class Quantized(NamedTuple):
    """A weight's tensors by what follows the module and a dot, and what they stand for."""

    tensors: dict[str, torch.Tensor]
    dequantized: torch.Tensor


class Folders(NamedTuple):
    """Two checkpoints of the same values."""

    quantized: Path
    dequantized: Path


def _ct_int8(weight: torch.Tensor) -> Quantized:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return Quantized({"weight": codes, "weight_scale": scale}, codes * scale)


def _ct_int4(weight: torch.Tensor) -> Quantized:
    groups = weight.unflatten(1, (-1, GROUP_SIZE))  # type: ignore[no-untyped-call]
    scale = groups.abs().amax(2) / 7
    codes = (groups / scale[..., None]).round()
    tensors = {
        "weight_packed": _packed((codes + 8).flatten(1)),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return Quantized(tensors, (codes * scale[..., None]).flatten(1))


def _ct_int4_zeros(weight: torch.Tensor) -> Quantized:
    groups = weight.unflatten(1, (-1, GROUP_SIZE))  # type: ignore[no-untyped-call]
    low = groups.amin(2).clamp(max=0)
    scale = (groups.amax(2).clamp(min=0) - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    codes = (groups / scale[..., None]).round().add(zero[..., None]).clamp(0, 15)
    tensors = {
        "weight_packed": _packed(codes.flatten(1)),
        "weight_scale": scale,
        "weight_zero_point": _packed(zero.t()).t().contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return Quantized(tensors, ((codes - zero[..., None]) * scale[..., None]).flatten(1))


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes to an int32, the first in its lowest bits."""
    missing = -codes.shape[1] % 8
    eights = torch.nn.functional.pad(codes.long(), (0, missing)).view(len(codes), -1, 8)
    words = (eights << (4 * torch.arange(8))).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _ct_fp8(weight: torch.Tensor) -> Quantized:
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return Quantized({"weight": codes, "weight_scale": scale}, codes.float() * scale)


def _fp8_block(weight: torch.Tensor) -> Quantized:
    size = GROUP_SIZE
    blocks = weight.view(len(weight) // size, size, -1, size)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return Quantized(
        {"weight": codes.view(weight.shape), "weight_scale_inv": scale},
        (codes.float() * scale[:, None, :, None]).view(weight.shape),
    )


def _bnb_nf4(weight: torch.Tensor) -> Quantized:
    blocks = weight.flatten().view(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = torch.bucketize(blocks / absmax[:, None], (NF4[1:] + NF4[:-1]) / 2)
    flat = codes.flatten()
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [*weight.shape]}
    tensors = {
        "weight": (flat[::2] << 4 | flat[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": NF4.clone(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    return Quantized(tensors, (NF4[codes] * absmax[:, None]).view(weight.shape))


def _bnb_int8(weight: torch.Tensor) -> Quantized:
    absmax = weight.abs().amax(1)
    codes = (weight * (127 / absmax[:, None])).round().to(torch.int8)
    tensors = {
        "weight": codes,
        "SCB": absmax,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return Quantized(tensors, codes * (absmax[:, None] / 127))


_INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_TOKENS: dict[str, Any] = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True
}  # fmt: skip
_INT4: dict[str, Any] = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE
}  # fmt: skip


def _ct(form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FORMS: dict[str, tuple[Callable[[torch.Tensor], Quantized], dict[str, Any]]] = {
    "compressed-tensors-int8": (_ct_int8, _ct("int-quantized", _INT8, None)),
    "compressed-tensors-w8a8": (_ct_int8, _ct("int-quantized", _INT8, _TOKENS)),
    "compressed-tensors-int4": (_ct_int4, _ct("pack-quantized", _INT4, None)),
    "compressed-tensors-int4-zeros": (
        _ct_int4_zeros,
        _ct("pack-quantized", {**_INT4, "symmetric": False}, None),
    ),
    "compressed-tensors-fp8": (
        _ct_fp8,
        _ct("float-quantized", {**_INT8, "type": "float"}, None),
    ),
    "fp8-block": (
        _fp8_block,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [GROUP_SIZE, GROUP_SIZE],
        },
    ),
    "bitsandbytes-nf4": (
        _bnb_nf4,
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "float32",
        },
    ),
    "bitsandbytes-int8": (
        _bnb_int8,
        {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True},
    ),
}
"""Name -> how a weight is quantized, and the ``quantization_config``; the head stays as it is."""


def quantized_folder(plain: Path, out: Path, form: str) -> Folders:
    """Write a checkpoint's projections in one of `FORMS`.

    Parameters
    ----------
    plain
        A folder of one ``model.safetensors``, of a family whose projections are ``nn.Linear``
        (no GPT-2).
    out
        Gets two folders; see the module.
    form
        A name in `FORMS`.
    """
    quantize, quantization = FORMS[form]
    folders = Folders(out / "quantized", out / "dequantized")
    for folder in folders:
        shutil.copytree(plain, folder)
    quantized, dequantized = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if tensor.dim() != 2 or kind != "weight" or "emb" in module or module == "lm_head":
            quantized[name] = dequantized[name] = tensor
            continue
        result = quantize(tensor)
        quantized |= {f"{module}.{key}": each for key, each in result.tensors.items()}
        dequantized[name] = result.dequantized
    for folder, tensors in zip(folders, (quantized, dequantized), strict=True):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    file = folders.quantized / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": quantization}))
    return folders
