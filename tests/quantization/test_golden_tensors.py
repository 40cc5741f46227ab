"""Tensors that other tools wrote are read as these tools read them themselves.

``golden/TOOL-VERSION.safetensors`` has a few tiny layers that the tool of this name and version
packed, under ``case/kind``, each with the tool's own dequantized values (or, where the tool needs
a GPU for these, the weight that it was given), and each case's configuration in the metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from quire.kernels.reference.quantized import dequantize
from quire.quantization import awq, gptq

FOLDER = Path(__file__).parent / "golden"
TOOLS = ("autoawq", "gptqmodel")
MODULE = "model.layers.0.mlp.up_proj"
FORMATS = {"awq": awq.from_config, "gptq": gptq.from_config}


def cases() -> list[Any]:
    found = []
    for path in sorted(each for tool in TOOLS for each in FOLDER.glob(f"{tool}-*.safetensors")):
        with safe_open(path, "pt") as file:
            found += [
                pytest.param(path, case, id=f"{path.stem}-{case}")
                for case in sorted(file.metadata())
                if case != "writer"
            ]
    return found


@pytest.mark.parametrize(("path", "case"), cases())
def test_other_tools_tensors_are_read_as_they_read_them(path: Path, case: str) -> None:
    """Bit for bit; where only the weight that was packed is known, to a step of its scale."""
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()[case])
        tensors = {
            name.removeprefix(f"{case}/"): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 (it is no dictionary)
            if name.startswith(f"{case}/")
        }
    dense, original = tensors.pop("dequantized", None), tensors.pop("original", None)
    config = described["config"]
    reader = FORMATS[config["quant_method"]](config)
    weight = reader.read(MODULE, tensors, tuple(described["shape"]))
    result = dequantize(weight)
    if dense is not None:
        assert torch.equal(result, dense)
    else:
        size = weight.scales.repeat_interleave(weight.group_size, dim=1)
        assert bool(((result - original.float()).abs() <= 0.75 * size).all())


def test_there_are_some() -> None:
    """The files of all these tools are there."""
    assert all(any(FOLDER.glob(f"{tool}-*.safetensors")) for tool in TOOLS)
    assert len(cases()) >= 14
