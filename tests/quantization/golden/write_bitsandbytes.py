"""Writes bitsandbytes.safetensors: what bitsandbytes makes of small weights, and reads of it again.

Run with a Python that has bitsandbytes, torch and safetensors, from any folder; on a CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

# Name -> shape, quant_type, block size, nested, storage.
CASES = {
    "nf4": ((16, 64), "nf4", 64, False, torch.uint8),
    "nf4-nested": ((12, 64), "nf4", 64, True, torch.uint8),
    "nf4-straddling": ((12, 40), "nf4", 32, True, torch.uint8),
    "nf4-odd": ((6, 33), "nf4", 32, False, torch.uint8),
    "nf4-bfloat16": ((8, 32), "nf4", 64, False, torch.bfloat16),
    "fp4": ((10, 48), "fp4", 64, False, torch.uint8),
    "fp4-nested": ((8, 128), "fp4", 128, True, torch.uint8),
}


def main() -> None:
    torch.manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for name, (shape, quant_type, block_size, nested, storage) in CASES.items():
        codes, state = bnb.quantize_4bit(
            torch.randn(shape),
            blocksize=block_size,
            compress_statistics=nested,
            quant_type=quant_type,
            quant_storage=storage,
        )
        tensors[f"{name}/weight"] = codes
        for key, value in state.as_dict(packed=True).items():
            tensors[f"{name}/weight.{key}"] = value
        tensors[f"{name}/dequantized"] = bnb.dequantize_4bit(codes, state)
        shapes[name] = shape
    codes, scales, _ = bnb.int8_vectorwise_quant(torch.randn(12, 40).to(torch.float16))
    tensors["int8/weight"], tensors["int8/SCB"] = codes, scales
    tensors["int8/weight_format"] = torch.tensor(0, dtype=torch.uint8)
    tensors["int8/dequantized"] = bnb.int8_vectorwise_dequant(codes, scales)
    shapes["int8"] = (12, 40)
    save_file(
        {name: each.contiguous() for name, each in tensors.items()},
        Path(__file__).with_name("bitsandbytes.safetensors"),
        {"bitsandbytes": bitsandbytes.__version__, "shapes": json.dumps(shapes)},
    )


if __name__ == "__main__":
    main()
