"""bitsandbytes: what the tool made and read again, kept in golden/, and its plain definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ct_checkpoints import NF4
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.kernels.reference.quantized import dequantize
from quire.quantization.bitsandbytes import from_config

GOLDEN = Path(__file__).with_name("golden") / "bitsandbytes.safetensors"
STATE = "weight.quant_state.bitsandbytes__nf4"
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"load_in_8bit": True}

with safe_open(GOLDEN, "pt") as _file:
    SHAPES = {name: tuple(shape) for name, shape in json.loads(_file.metadata()["shapes"]).items()}


def golden(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a case, and what bitsandbytes dequantized them to."""
    with safe_open(GOLDEN, "pt") as file:
        tensors = {
            key.removeprefix(f"{name}/"): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
            if key.startswith(f"{name}/")
        }
    return tensors, tensors.pop("dequantized")


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_what_the_tool_wrote_is_read_as_it_reads_it(name: str) -> None:
    """Bit for bit; of int8, which it rounds twice, up to the last bits."""
    tensors, expected = golden(name)
    config = EIGHT if name == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": name[:3]}
    chosen = from_config(config)
    kinds = chosen.kinds("model.layers.0.mlp.up_proj")
    assert kinds is not None
    assert kinds.required <= set(tensors) <= kinds.required | kinds.optional
    weight = chosen.read("model.layers.0.mlp.up_proj", tensors, SHAPES[name])
    if name == "int8":
        assert torch.allclose(dequantize(weight), expected, rtol=2**-22, atol=0)
        expected = tensors["weight"].float() * (tensors["SCB"].float() / 127)[:, None]
    assert torch.equal(dequantize(weight), expected)
    owned = {each.untyped_storage().data_ptr() for each in weight.tensors().values()}
    assert not owned & {each.untyped_storage().data_ptr() for each in tensors.values()}


def nf4(
    shape: tuple[int, int], block_size: int, nested: int, seed: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random tensors, and what they mean by the definition, value by value."""
    torch.manual_seed(seed)
    size = shape[0] * shape[1]
    num_blocks = -(-size // block_size)
    codes = torch.randint(0, 16, (size + size % 2,))
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": block_size, "dtype": "float32", "shape": list(shape)
    }  # fmt: skip
    tensors = {"weight.quant_map": NF4.clone()}
    if nested:
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.37}
        tensors["weight.absmax"] = torch.randint(0, 256, (num_blocks,)).to(torch.uint8)
        tensors["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
        tensors["weight.nested_absmax"] = torch.rand(-(-num_blocks // nested))
        absmax = torch.empty(num_blocks)
        for block in range(num_blocks):
            code = tensors["weight.nested_quant_map"][int(tensors["weight.absmax"][block])]
            absmax[block] = code * tensors["weight.nested_absmax"][block // nested] + 0.37
    else:
        tensors["weight.absmax"] = absmax = torch.rand(num_blocks)
    tensors["weight"] = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    place = torch.arange(size)
    return tensors, (NF4[codes[:size]] * absmax[place // block_size]).view(shape)


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 200)),
    block_size=st.sampled_from([32, 64, 128, 4096]),
    nested=st.sampled_from([0, 4, 256]),
    seed=st.integers(0, 99),
)
def test_blocks_run_through_the_rows(
    shape: tuple[int, int], block_size: int, nested: int, seed: int
) -> None:
    """Of any size and anywhere they begin, each value has its block's scale."""
    tensors, expected = nf4(shape, block_size, nested, seed)
    weight = from_config(FOUR).read("lm_head", tensors, shape)
    assert torch.equal(dequantize(weight), expected)


def test_what_transformers_saves_is_a_configuration() -> None:
    """With fields that have an underscore before them beside the others."""
    transformers = pytest.importorskip("transformers")
    saved = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    kinds = from_config(saved).kinds("model.layers.0.mlp.up_proj")
    assert kinds is not None
    assert STATE in kinds.required
    saved = transformers.BitsAndBytesConfig(load_in_8bit=True).to_dict()
    kinds = from_config(saved).kinds("model.layers.0.mlp.up_proj")
    assert kinds is not None
    assert kinds.required == {"weight", "SCB"}


def test_skipped_modules_are_plain() -> None:
    """Those of the list, or the head where there is none."""
    assert from_config(EIGHT).kinds("lm_head") is None
    skipping = from_config({**EIGHT, "llm_int8_skip_modules": ["up_proj"]})
    assert skipping.kinds("lm_head") is not None
    assert skipping.kinds("model.layers.0.mlp.up_proj") is None
    assert skipping.kinds("model.layers.0.mlp.down_proj") is not None


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ModelLoadError, "both false; one of them"),
        ({"load_in_4bit": True, "load_in_8bit": True}, ModelLoadError, "both true; one of them"),
        ({"load_in_4bit": "yes"}, ModelLoadError, "load_in_4bit is 'yes'; it must be true or"),
        ({**FOUR, "bnb_4bit_quant_type": "int4"}, UnsupportedModelError, "'nf4' and 'fp4' are"),
        ({**EIGHT, "llm_int8_has_fp16_weight": True}, UnsupportedModelError, "where it is false"),
        ({**FOUR, "llm_int8_skip_modules": "lm_head"}, ModelLoadError, "list of module names"),
        ({**FOUR, "llm_int8_skip_modules": ["(.*)*x"]}, ModelLoadError, "may take forever"),
    ],
)
def test_a_bitsandbytes_configuration_that_makes_no_sense_is_refused(
    config: dict[str, Any], error: type[Exception], message: str
) -> None:
    """By the field, with its value and what would be right."""
    with pytest.raises(error, match=message):
        from_config(config)


def _state(**fields: Any) -> torch.Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [12, 64], "nested_blocksize": 256}
    return torch.tensor(list(json.dumps({**state, **fields}).encode()), dtype=torch.uint8)


def _bytes(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


NAN = float("nan")
TEN = torch.full((1,), 10.0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nf4-nested", {"weight": torch.zeros(12, 64)}, "must be under 'llm_int8_skip_modules'"),
        ("nf4-nested", {"weight": torch.zeros(12, 64).byte()}, "768 bytes; 384 are needed"),
        ("nf4-nested", {"weight": None}, "weight is missing"),
        ("nf4-nested", {"weight.quant_map": torch.zeros(8)}, r"\[8\], \[16\] is needed"),
        ("nf4-nested", {"weight.quant_map": torch.full((16,), NAN)}, "weight.quant_map has nan"),
        ("nf4-nested", {"weight.absmax": torch.zeros(11).byte()}, r"\[11\], \[12\] is needed"),
        ("nf4-nested", {"weight.absmax": torch.zeros(12)}, "uint8 is needed"),
        ("nf4-nested", {"weight.nested_quant_map": torch.zeros(16)}, r"\[256\] is needed"),
        ("nf4-nested", {"weight.nested_quant_map": None}, "nested_quant_map is missing"),
        ("nf4-nested", {"weight.nested_absmax": torch.full((1,), NAN)}, "nested_absmax has nan"),
        ("nf4-nested", {"weight.nested_absmax": torch.ones(2)}, r"\[2\], \[1\] is needed"),
        ("nf4-nested", {"weight.nested_absmax": None}, "codes need weight.nested_absmax"),
        (
            "nf4-nested",
            {"weight.nested_quant_map": torch.full((256,), 1e38), "weight.nested_absmax": TEN},
            "weight.absmax has inf",
        ),
        ("nf4-nested", {STATE: None}, f"{STATE} is missing"),
        ("nf4-nested", {STATE: torch.zeros(4)}, "uint8 is needed"),
        ("nf4-nested", {STATE: torch.zeros(1 << 17).byte()}, "bytes of a JSON object"),
        ("nf4-nested", {STATE: _bytes(b"{'a': __import__('os')}")}, "is not valid JSON"),
        ("nf4-nested", {STATE: _bytes(b"\xff\xfe{")}, "is not valid JSON"),
        ("nf4-nested", {STATE: _bytes(b"[" * 60_000)}, "is not valid JSON"),
        ("nf4-nested", {STATE: _bytes(b"[1]")}, "holds a JSON list"),
        ("nf4-nested", {STATE: _state(quant_type="fp4")}, "quant_type 'fp4', 'nf4' is needed"),
        ("nf4-nested", {STATE: _state(shape=[64, 12])}, r"\[64, 12\], .* needs \[12, 64\]"),
        ("nf4-nested", {STATE: _state(shape=None)}, "the shape None"),
        ("nf4-nested", {STATE: _state(blocksize=0)}, "blocksize 0; it must be such as 64"),
        ("nf4-nested", {STATE: _state(blocksize=True)}, "blocksize True"),
        ("nf4-nested", {STATE: _state(blocksize="64")}, "blocksize '64'"),
        ("nf4-nested", {STATE: _state(nested_blocksize=-1)}, "nested_blocksize -1"),
        ("nf4-nested", {STATE: _state(nested_offset=1e39)}, "no finite number"),
        ("nf4-nested", {STATE: _state(nested_offset=NAN)}, "no finite number"),
        ("nf4-nested", {STATE: _state(nested_offset="0")}, "no finite number"),
        ("int8", {"weight": torch.zeros(12, 40)}, "int8 is needed; a module that is not"),
        ("int8", {"weight": torch.zeros(40, 12).char()}, r"\[12, 40\] is needed"),
        ("int8", {"SCB": torch.ones(40)}, r"\[40\], \[12\] or \[12, 1\] is needed"),
        ("int8", {"SCB": torch.full((12,), float("inf"))}, "SCB has inf"),
        ("int8", {"SCB": None}, "SCB is missing"),
        ("int8", {"weight_format": torch.tensor(2).byte()}, "weight_format is 2, a layout"),
    ],
)
def test_damaged_bitsandbytes_tensors_are_refused(
    name: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    """By the kind, with what it has and what it needs; nothing in them is run."""
    tensors, _ = golden(name)
    for kind, tensor in changes.items():
        tensors.pop(kind, None)
        if tensor is not None:
            tensors[kind] = tensor
    config = EIGHT if name == "int8" else FOUR
    with pytest.raises(ModelLoadError, match=message):
        from_config(config).read("lm_head", tensors, SHAPES[name])
