"""The digest of an adapter's content, its fingerprint, and that what is read is of one version."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_adapters import plain_files, read, write_files

from quire.errors import AdapterError
from quire.lora.content import TensorsFile, fingerprint

MODULES = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.1.mlp.up_proj": (112, 64),
}


def _digest(model: Path, folder: Path, config: dict[str, Any], tensors: Any) -> str:
    return read(model, write_files(folder, config, tensors)).digest


def test_the_digest_is_that_of_the_effect(tiny_llama: Path, tmp_path: Path) -> None:
    """Another value, scale or order of patterns is another adapter; other metadata are not."""
    config, tensors = plain_files(MODULES)
    patterns = {"q_proj": 3.0, ".*": 5.0}

    def digest(**changes: Any) -> str:
        return _digest(tiny_llama, tmp_path / "adapter", {**config, **changes}, tensors)

    base = digest()
    assert digest() == base
    assert digest(base_model_name_or_path="other", peft_version="1", lora_dropout=0.5) == base
    assert digest(target_modules=config["target_modules"][::-1]) == base  # a set, in any order
    assert digest(bias=None, use_dora=False, new_field=None) == base
    ordered = {base, digest(alpha_pattern=patterns)}
    ordered.add(digest(alpha_pattern=dict(reversed(patterns.items()))))
    ordered |= {digest(lora_alpha=9), digest(use_rslora=True), digest(lora_alpha=0)}
    tensors[next(iter(tensors))][1, 1] += 1
    assert len({*ordered, digest()}) == 7


@given(at=st.integers(0), value=st.integers(1, 255))
def test_every_byte_of_the_tensors_counts(
    at: int, value: int, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No bit of a file can change without its digest."""
    folder = tmp_path_factory.mktemp("bytes") / "adapter"
    config, tensors = plain_files(MODULES)
    digest = _digest(tiny_llama, folder, config, tensors)
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= value
    path.write_bytes(content)
    with contextlib.suppress(AdapterError):
        assert read(tiny_llama, folder).digest != digest


def test_a_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    """By size, time, or because another file took the place, whatever its time says."""
    folder = write_files(tmp_path / "adapter", *plain_files(MODULES))
    seen = [fingerprint(folder)]
    assert fingerprint(folder) == seen[0]
    assert seen[0].changed_ns >= (folder / "adapter_config.json").stat().st_mtime_ns
    tensors = folder / "adapter_model.safetensors"
    content, before = tensors.read_bytes(), tensors.stat()
    os.utime(tensors, ns=(1, 1))
    seen.append(fingerprint(folder))
    (folder / "new").write_bytes(content)
    os.utime(folder / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "new").rename(tensors)
    seen.append(fingerprint(folder))
    with (folder / "adapter_config.json").open("a") as file:
        file.write(" ")
    seen.append(fingerprint(folder))
    assert len(set(seen)) == 4
    tensors.unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        fingerprint(folder)


def test_a_file_that_is_replaced_while_it_is_read_gives_one_version(tmp_path: Path) -> None:
    """Tensors and digest come from the same bytes, those of the file that was opened."""
    folder = write_files(tmp_path / "adapter", *plain_files(MODULES))
    other = write_files(tmp_path / "other", *plain_files(MODULES, seed=1))

    def whole(file: TensorsFile) -> tuple[str, dict[str, torch.Tensor]]:
        return file.digest(b""), {name: file.tensor(name).clone() for name in file.entries}

    with TensorsFile(folder) as file:
        file.load()
        digest, tensors = whole(file)
    with TensorsFile(folder) as file:
        (other / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")
        file.load()
        assert whole(file)[0] == digest
        assert all(torch.equal(file.tensor(name), tensors[name]) for name in tensors)
    with TensorsFile(folder) as file:
        with (folder / "adapter_model.safetensors").open("r+b") as open_file:
            open_file.truncate(1000)
        with pytest.raises(AdapterError, match="truncated"):
            file.load()


def test_tensors_of_several_types_and_at_odd_places_are_read(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Float16, bfloat16, float32 and float64 in one file, wherever their bytes begin."""
    config, tensors = plain_files(MODULES)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    tensors = {
        name: tensor.to(dtype)
        for (name, tensor), dtype in zip(sorted(tensors.items()), dtypes, strict=True)
    }
    folder = write_files(tmp_path / "adapter", config, tensors)
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length])).encode()
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    delta = read(tiny_llama, folder).linears["layers.0.attention.qkv"]
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    assert torch.equal(delta.a, tensors[f"{name}.lora_A.weight"].float())
    assert torch.equal(delta.slices[0].b, tensors[f"{name}.lora_B.weight"].float())
    assert delta.scales.tolist() == [2.0] * 4


@pytest.mark.parametrize("prefix", ["", "base_model.", "base_model.model."])
@pytest.mark.parametrize("inner", ["", "model."])
def test_names_with_and_without_prefixes_mean_the_same(
    prefix: str, inner: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Peft's prefix, none, and those of a model without its output matrix."""
    config, tensors = plain_files(MODULES)
    whole = read(tiny_llama, write_files(tmp_path / "whole", config, tensors))
    usual = "base_model.model.model."
    tensors = {name.replace(usual, prefix + inner): each for name, each in tensors.items()}
    adapter = read(tiny_llama, write_files(tmp_path / "adapter", config, tensors))
    assert adapter.linears.keys() == whole.linears.keys()
    for name, delta in adapter.linears.items():
        assert torch.equal(delta.a, whole.linears[name].a)


def test_an_adapter_shares_no_memory_with_the_file(tiny_llama: Path, tmp_path: Path) -> None:
    """What was read goes with the reading, and all that a decoder gets is its own to change."""
    config, tensors = plain_files(MODULES)
    head = "base_model.model.lm_head.weight"
    tensors[head] = torch.randn(304, 64)
    # Of rank 1, whose transpose is contiguous already.
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors[f"{embedding}A"], tensors[f"{embedding}B"] = torch.randn(1, 304), torch.randn(64, 1)
    config["target_modules"] += ["embed_tokens"]
    config["rank_pattern"] = {"embed_tokens": 1}
    adapter = read(tiny_llama, write_files(tmp_path / "adapter", config, tensors))
    pieces = adapter.tensors()
    assert all(each.is_contiguous() for each in pieces)
    storages = [each.untyped_storage() for each in pieces]
    assert len({storage.data_ptr() for storage in storages}) == len(pieces)
    assert all(
        storage.nbytes() == each.nbytes for storage, each in zip(storages, pieces, strict=True)
    )
