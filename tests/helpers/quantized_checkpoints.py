"""Tiny checkpoints with weights in AWQ's, GPTQ's and SqueezeLLM's formats, and their plain twins.

``write_quantized(source, folder, method)`` rounds the layers of a checkpoint of
`tests.helpers.checkpoints` and writes ``folder/quantized`` and ``folder/plain``: the latter has the
same numbers as plain float32 weights, so that transformers can be asked what the former should say.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plain_packing
import torch
from safetensors.torch import load_file, save_file

_TRANSPOSED = ("gpt2",)
"""Model types whose checkpoints have layers' weights as ``[in, out]``."""


@dataclass(frozen=True)
class QuantizedPair:
    """Two folders of the same model.

    Attributes
    ----------
    quantized
        In the format; its config.json says so.
    plain
        Float32.
    modules
        Names of the modules that are quantized.
    """

    quantized: Path
    plain: Path
    modules: tuple[str, ...]


def _is_layer(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is the weight of a projection in a layer."""
    parts = name.split(".")
    return (
        parts[-1] == "weight" and tensor.dim() == 2 and any(part.isdecimal() for part in parts[:-1])
    )


def _codes(
    weight: np.ndarray, bits: int, group_size: int, sym: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round ``[out, in]`` to codes, zeros and float16 scales; zeros are 1 at least."""
    size = weight.shape[1] if group_size == -1 else group_size
    grouped = weight.reshape(weight.shape[0], -1, size)
    top, most = np.maximum(grouped.max(2), 0), (1 << bits) - 1
    low = np.minimum(grouped.min(2), 0)
    if sym:
        top = np.maximum(top, -low)
        low = -top
    scales = np.maximum((top - low) / most, 1e-4).astype(np.float16)
    wide = scales.astype(np.float32)
    zeros = np.clip(np.rint(-low / wide), 1, most).astype(np.int64)
    if sym:
        zeros[:] = 1 << bits - 1
    codes = np.rint(grouped / wide[:, :, None]) + zeros[:, :, None]
    return np.clip(codes, 0, most).astype(np.int64).reshape(weight.shape), zeros, scales


def _squeezed(weight: np.ndarray, bits: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two largest values of each output apart, the rest to the nearest entry of its own table."""
    columns = np.sort(np.argsort(-np.abs(weight), axis=1)[:, :2], axis=1)
    values = np.take_along_axis(weight, columns, axis=1)
    rest = weight.copy()
    np.put_along_axis(rest, columns, 0, axis=1)
    table = np.quantile(rest, np.linspace(0, 1, 1 << bits), axis=1).T.astype(np.float32)
    codes = np.abs(rest[:, :, None] - table[:, None, :]).argmin(2)
    dense = np.take_along_axis(table, codes, axis=1)
    apart = (values - np.take_along_axis(dense, columns, axis=1)).astype(np.float32)
    tensors = plain_packing.squeezellm(codes, table, bits)
    tensors |= {
        "rows": torch.arange(0, 2 * len(weight) + 1, 2, dtype=torch.int32),
        "cols": torch.tensor(columns.flatten(), dtype=torch.int32),
        "vals": torch.tensor(apart.flatten()),
    }
    places = np.take_along_axis(dense, columns, axis=1) + apart
    np.put_along_axis(dense, columns, places, axis=1)
    return tensors, torch.tensor(dense)


def write_quantized(
    source: Path,
    folder: Path,
    method: str,
    *,
    bits: int = 4,
    group_size: int = 16,
    sym: bool = False,
    desc_act: bool = False,
    version: str = "gptq",
    ignored: tuple[str, ...] = (),
    lm_head: bool = False,
    dtype: torch.dtype = torch.float32,
    torch_file: bool = False,
    seed: int = 0,
) -> QuantizedPair:
    """Write a checkpoint's twin in a format.

    Parameters
    ----------
    source
        A folder with a config.json, one model.safetensors, and a tokenizer.
    folder
        Made; has both twins.
    method : {"awq", "gptq", "squeezellm"}
    bits, group_size, sym, desc_act, version
        As in the formats' configurations. `desc_act` takes the inputs in a random order.
    ignored
        Parts of names of modules that stay as they are.
    lm_head
        Whether the output layer is quantized, too (GPTQ; not where it is the embedding).
    dtype
        Of what is not quantized.
    torch_file
        Whether weights are written as a ``.pt`` file, as SqueezeLLM's are.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    generator = np.random.default_rng(seed)
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    modules = []
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        is_head = lm_head and module in ("lm_head", "embed_out")
        if not (is_head or _is_layer(name, tensor)) or any(part in module for part in ignored):
            packed[name] = tensor.to(dtype)
            plain[name] = tensor.to(dtype).float()
            continue
        modules.append(module)
        turned = config["model_type"] in _TRANSPOSED and not is_head
        weight = (tensor.t() if turned else tensor).float().numpy()
        if method == "squeezellm":
            tensors, dense = _squeezed(weight, bits)
        else:
            tensors, dense = _grouped(
                weight, method, bits, group_size, sym, version, generator if desc_act else None
            )
        packed |= {f"{module}.{kind}": each for kind, each in tensors.items()}
        plain[name] = (dense.t() if turned else dense).contiguous()
    quantized, twin = folder / "quantized", folder / "plain"
    for target, tensors in ((quantized, packed), (twin, plain)):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
        if torch_file and target is quantized:
            torch.save(tensors, target / "sq-model-w4.pt")
        else:
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    described = dict(config, dtype=str(dtype).removeprefix("torch."))
    described["quantization_config"] = {
        "awq": {
            "quant_method": "awq",
            "bits": bits,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignored) or None,
        },
        "gptq": {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "sym": sym,
            "desc_act": desc_act,
            "checkpoint_format": version,
            "lm_head": lm_head,
            "dynamic": {f"-:.*{part}": {} for part in ignored},
        },
        "squeezellm": {"quant_method": "squeezellm", "wbits": bits},
    }[method]
    (quantized / "config.json").write_text(json.dumps(described, indent=1))
    (twin / "config.json").write_text(json.dumps(dict(config, dtype="float32"), indent=1))
    return QuantizedPair(quantized, twin, tuple(modules))


def _grouped(
    weight: np.ndarray,
    method: str,
    bits: int,
    group_size: int,
    sym: bool,
    version: str,
    generator: np.random.Generator | None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    in_features = weight.shape[1]
    size = in_features if group_size == -1 else group_size
    order = np.arange(in_features) if generator is None else generator.permutation(in_features)
    ordered, zeros, scales = _codes(weight[:, order], bits, group_size, sym)
    codes, g_idx = np.empty_like(ordered), np.empty(in_features, dtype=np.int64)
    codes[:, order], g_idx[order] = ordered, np.arange(in_features) // size
    dense = plain_packing.dequantized(codes, zeros, scales, g_idx)
    if method == "awq":
        return plain_packing.awq(codes, zeros, scales), dense
    tensors = plain_packing.gptq(codes, zeros, scales, bits, version=version, g_idx=g_idx)
    return tensors, dense
