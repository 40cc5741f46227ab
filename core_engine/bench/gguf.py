"""GGUF: a Hugging Face checkpoint written as the one file that llama.cpp reads.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a header, settings by name,
a table of the tensors, and their data, each aligned. Benchmarks give token ids, so the file has a
vocabulary's size and no vocabulary.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from quire.bench.checkpoint import made_from
from quire.bench.contest import BenchError

if TYPE_CHECKING:
    import torch

TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""A matrix's type in the file, by the dtype of a checkpoint."""

QUANTIZED = ("q8_0", "q4_0")
"""Types that no checkpoint has: 32 numbers as integers of 8 or 4 bits, and a scale."""

KINDS = (*TYPES.values(), *QUANTIZED)

# The format's numbers for the types of tensors, and for a file that is mostly of one.
_TENSOR_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_ALIGNMENT = 32
_BLOCK = 32
_BLOCK_BYTES = {"q8_0": 34, "q4_0": 18}
_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_file(folder: Path, kind: str) -> Path:
    """Return a checkpoint's GGUF file in the benchmark's cache, made at the first use.

    Parameters
    ----------
    folder : Path
        A checkpoint of Llama's or Qwen2's architecture, as safetensors.
    kind : {"f32", "f16", "bf16", "q8_0", "q4_0"}
        Of all matrices, the output matrix too; everything else is float32.

    Raises
    ------
    BenchError
        For a checkpoint that the file cannot express.
    """
    target = made_from(folder, f"{kind}.gguf")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}.part")
        write_gguf(folder, unfinished, kind)
        unfinished.replace(target)
    return target


def write_gguf(folder: Path, target: Path, kind: str) -> None:
    """Write a checkpoint's GGUF file; see `gguf_file`."""
    from quire.models.hf_config import read_config

    config = read_config(folder)
    settings = _settings(config, kind)
    sources = _sources(folder)
    infos, offset = bytearray(), 0
    for name, (_, _, shape) in sources.items():
        type_ = _type_of(shape, kind)
        infos += _text(name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", _TENSOR_TYPES[type_], offset)
        offset += _padded(_num_bytes(shape, type_))
    with target.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(sources), len(settings)))
        for name, value in settings.items():
            file.write(_text(name) + _value(value))
        file.write(infos)
        _pad(file)
        for name, tensor in _tensors(sources):
            rows = _in_pairs(tensor, name, config) if settings[_ARCHITECTURE] == "llama" else tensor
            file.write(_data(rows, _type_of(tuple(rows.shape), kind)))
            _pad(file)


def step_bytes(folder: Path, kind: str) -> int:
    """Return how many bytes of weights llama.cpp reads for a token: see `gguf_file`.

    All tensors but the embedding, of which it reads a row; where there is no output matrix, the
    embedding is that, too.
    """
    shapes = {name: shape for name, (_, _, shape) in _sources(folder).items()}
    if "output.weight" in shapes:
        del shapes["token_embd.weight"]
    return sum(_num_bytes(shape, _type_of(shape, kind)) for shape in shapes.values())


_ARCHITECTURE = "general.architecture"


def _settings(config: dict[str, Any], kind: str) -> dict[str, str | int | float]:
    """Return the file's settings, or say what of the configuration they cannot express."""
    names = config.get("architectures") or [None]
    if names[0] not in _ARCHITECTURES:
        raise BenchError(
            f"llama-cpp: architecture {names[0]!r} is not written as GGUF here; "
            f"{' and '.join(_ARCHITECTURES)} are"
        )
    rope = config.get("rope_parameters") or {}
    for field, value, only in (
        ("rope_type", rope.get("rope_type"), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor"), 1.0),
        ("use_sliding_window", config.get("use_sliding_window"), False),
        ("hidden_act", config.get("hidden_act"), "silu"),
    ):
        if value not in (None, only):
            raise BenchError(
                f"llama-cpp: {field} {value!r} is not written as GGUF here; {only!r} is"
            )
    architecture = _ARCHITECTURES[names[0]]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    model: dict[str, int | float] = {
        "context_length": config.get("max_position_embeddings", 2048),
        "embedding_length": hidden,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope.get("rope_theta", 10_000.0)),
        "vocab_size": config["vocab_size"],
    }
    return {
        _ARCHITECTURE: architecture,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        **{f"{architecture}.{name}": value for name, value in model.items()},
        "tokenizer.ggml.model": "no_vocab",
    }


Sources = dict[str, tuple[Path, str, tuple[int, ...]]]
"""By a tensor's name in the GGUF file: the file it comes from, its name there, its shape."""


def _sources(folder: Path) -> Sources:
    from safetensors import safe_open

    found: Sources = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                if not name.endswith("rotary_emb.inv_freq"):
                    shape = tuple(file.get_slice(name).get_shape())
                    found[_gguf_name(name)] = path, name, shape
    if not found:
        raise BenchError(f"llama-cpp: {folder} has no safetensors files")
    return found


def _gguf_name(name: str) -> str:
    stem, _, last = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if layer and layer[2] in _LAYER_NAMES:
        return f"blk.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{last}"
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{last}"
    raise BenchError(f"llama-cpp: tensor {name!r} has no name in a GGUF file")


def _tensors(sources: Sources) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for name, (path, source, _) in sources.items():
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(source)


def _in_pairs(tensor: torch.Tensor, name: str, config: dict[str, Any]) -> torch.Tensor:
    """Reorder a Llama's queries and keys: llama.cpp rotates neighbours, not halves."""
    part = name.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return tensor
    heads = config["num_attention_heads"]
    if part == "attn_k":
        heads = config.get("num_key_value_heads") or heads
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _type_of(shape: tuple[int, ...], kind: str) -> str:
    """Return a tensor's type: vectors are float32, and so is what has no whole blocks."""
    if len(shape) == 1 or (kind in QUANTIZED and shape[-1] % _BLOCK):
        return "f32"
    return kind


def _num_bytes(shape: tuple[int, ...], type_: str) -> int:
    count = math.prod(shape)
    if type_ in _BLOCK_BYTES:
        return count // _BLOCK * _BLOCK_BYTES[type_]
    return count * (4 if type_ == "f32" else 2)


def _data(tensor: torch.Tensor, type_: str) -> bytes:
    import torch

    if type_ in _BLOCK_BYTES:
        blocks = tensor.float().reshape(-1, _BLOCK)
        scale, codes = _codes_of_8_bits(blocks) if type_ == "q8_0" else _codes_of_4_bits(blocks)
        packed = torch.cat([scale.to(torch.float16).view(torch.uint8), codes], 1)
        return packed.numpy().tobytes()
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[type_]
    return tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def _codes_of_8_bits(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales, and the codes' bytes."""
    import torch

    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = (blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return scale, codes.to(torch.int8).view(torch.uint8)


def _codes_of_4_bits(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales, and the codes: the first half of a block in the low halves of bytes.

    A code is from 0 to 15 and stands for 8 less. The number of the largest size is the code 0: the
    one that has no opposite.
    """
    import torch

    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = (blocks * inverse + 8.5).clamp(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, 1)
    return scale, low | (high << 4)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<If", _FLOAT32, value)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(bytes(_padded(file.tell()) - file.tell()))
