"""The tiny quantized folders that other tests load are what their configurations say."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import write_quantized
from safetensors.torch import load_file

from quire.kernels.reference.quantized import dequantize
from quire.models.checkpoint import open_file, weight_files
from quire.quantization import awq, gptq, squeezellm

FORMATS: dict[str, Any] = {"awq": awq, "gptq": gptq, "squeezellm": squeezellm}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mpt", "falcon-40b", "opt-350m"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {"ignored": ("layers.1.", "h.1.")}),
        ("gptq", {"bits": 3, "group_size": -1, "dtype": torch.bfloat16, "ignored": ("layers.1.",)}),
        ("gptq", {"desc_act": True, "lm_head": True, "version": "gptq_v2"}),
        ("squeezellm", {"bits": 3, "torch_file": True}),
    ],
)
def test_modules_have_the_weights_of_the_plain_twin(
    name: str,
    method: str,
    options: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Those that the format says are quantized, and they alone, are in its codes."""
    pair = write_quantized(tiny_checkpoint(name), tmp_path, method, **options)
    config = json.loads((pair.quantized / "config.json").read_text())
    reader = FORMATS[method].from_config(config["quantization_config"])
    plain = load_file(pair.plain / "model.safetensors")
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    [path] = weight_files(pair.quantized)
    with open_file(path) as file:
        for each in file.names():
            module, _, kind = each.rpartition(".")
            found[module][kind] = file.tensor(each).clone()
    assert pair.modules
    for module, tensors in found.items():
        if "weight" in tensors:
            assert module not in pair.modules
            assert torch.equal(tensors["weight"].float(), plain[f"{module}.weight"])
            continue
        if "qweight" not in tensors:
            continue
        kinds = reader.kinds(module)
        assert module in pair.modules
        assert kinds.required <= tensors.keys() <= kinds.required | kinds.optional | {"bias"}
        dense = plain[f"{module}.weight"]
        dense = dense.t() if config["model_type"] == "gpt2" and module != "lm_head" else dense
        tensors.pop("bias", None)
        weight = reader.read(module, tensors, tuple(dense.shape))
        assert torch.equal(dequantize(weight), dense)
