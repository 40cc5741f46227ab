"""Files damaged at random: an AdapterError or the right adapter, never anything else."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_adapters import plain_files, read, write_files
from safetensors.torch import load

from quire.errors import AdapterError
from quire.lora.content import TensorsFile
from quire.models.adapter import Adapter

MODULES = {
    "model.layers.0.self_attn.k_proj": (32, 64),
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.1.mlp.down_proj": (64, 112),
}
CONFIG, TENSORS = plain_files(MODULES, rank=2, rank_pattern={"k_proj": 2}, use_rslora=False)
FIELDS = [*CONFIG, "alpha_pattern", "bias", "use_dora", "modules_to_save", "init_lora_weights"]
FIELDS += ["exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias", "revision"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("damaged") / "adapter", CONFIG, TENSORS)


@pytest.fixture(scope="module")
def content(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def _matches(adapter: Adapter, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Check an adapter against its files, read by safetensors."""
    parts = {
        "layers.0.attention.qkv": ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"],
        "layers.1.mlp.down": ["layers.1.mlp.down_proj"],
    }
    assert adapter.linears.keys() == parts.keys()
    for name, modules in parts.items():
        delta = adapter.linears[name]
        pairs = [
            [tensors[f"base_model.model.model.{module}.lora_{each}.weight"] for each in "AB"]
            for module in modules
        ]
        torch.testing.assert_close(delta.a, torch.cat([a for a, _ in pairs]).float())
        for part, (_, b) in zip(delta.slices, pairs, strict=True):
            torch.testing.assert_close(part.b, b.float())
        if not {"alpha_pattern", "use_rslora"} & config.keys():
            assert set(delta.scales.tolist()) == {config["lora_alpha"] / config["r"]}


@given(data=st.data())
def test_damaged_bytes(data: st.DataObject, folder: Path, content: bytes, tiny_llama: Path) -> None:
    """Bytes changed, cut out or put in anywhere, most often in the header."""
    damaged = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.sampled_from([8, header, header, len(damaged)]))
        at = data.draw(st.integers(0, max(0, min(end, len(damaged)) - 1)))
        kind = data.draw(st.sampled_from(["set", "digit", "cut", "insert", "end"]))
        if kind == "set":
            damaged[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif kind == "digit":
            damaged[at : at + 1] = data.draw(st.sampled_from(b"0123456789,[]{}\"'- ")).to_bytes(1)
        elif kind == "cut":
            del damaged[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            del damaged[at:]
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(damaged)
    try:
        adapter = read(tiny_llama, folder)
    except AdapterError:
        return
    _matches(adapter, CONFIG, load(bytes(damaged)))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["q_proj", "k_proj", "LORA", "all", "none", "all-linear", ".*", "gaussian"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(changes=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=3))
def test_a_damaged_configuration(
    changes: dict[str, Any], folder: Path, content: bytes, tiny_llama: Path
) -> None:
    """Any JSON value in any field."""
    config = {**CONFIG, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(content)
    try:
        adapter = read(tiny_llama, folder)
    except AdapterError:
        return
    plain = {"alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_rslora"}
    _matches(adapter, config if not plain & changes.keys() else {"use_rslora": 1}, TENSORS)


@given(text=st.text(max_size=40) | st.binary(max_size=40))
def test_a_configuration_of_any_text(
    text: str | bytes, folder: Path, content: bytes, tiny_llama: Path
) -> None:
    """Whatever stands where the configuration should be."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    (folder / "adapter_config.json").write_bytes(raw)
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError):
        read(tiny_llama, folder)


def test_a_shape_of_very_many_axes(tmp_path: Path) -> None:
    """A small file cannot keep the reader busy with the product of its sizes."""
    entry = {"dtype": "F32", "shape": [2**62] * 30_000, "data_offsets": [0, 4]}
    header = json.dumps({"base_model.model.x.lora_A.weight": entry}).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(4)
    )
    before = time.perf_counter()
    with pytest.raises(AdapterError, match="30000 axes"):
        TensorsFile(tmp_path)
    assert time.perf_counter() - before < 1
