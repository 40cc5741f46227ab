"""Weights that are missing, damaged or hostile: what is wrong is named, and nothing is run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import Load, Make, Tensors, copy_of, rewrite
from safetensors.torch import load_file

from quire.errors import ModelLoadError


def spoil_missing(tensors: Tensors) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["model.norm.weight"]


def spoil_extra(tensors: Tensors) -> None:
    tensors["model.layers.2.self_attn.k_proj.weight"] = torch.ones(32, 64)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


def spoil_shape(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(112, 63)


def spoil_dtype(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int32)


def spoil_float8(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(64).to(torch.float8_e4m3fn)


def spoil_twice(tensors: Tensors) -> None:
    tensors["norm.weight"] = torch.ones(64)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            spoil_missing,
            r"2 missing: model\.layers\.1\.self_attn\.k_proj\.weight, model\.norm\.weight$",
        ),
        (
            spoil_extra,
            r"2 unexpected: model\.layers\.0\.self_attn\.q_proj\.bias, "
            r"model\.layers\.2\.self_attn\.k_proj\.weight$",
        ),
        (spoil_shape, r"up_proj\.weight' has the shape \[112, 63\], .* needs \[112, 64\]"),
        (spoil_dtype, r"'model\.norm\.weight' has the dtype int32"),
        (spoil_float8, r"'model\.norm\.weight' has the dtype float8_e4m3fn"),
        (spoil_twice, r"norm\.weight' comes twice"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    spoil: Callable[[Tensors], None],
    message: str,
    tiny_llama: Path,
    tmp_path: Path,
    load: Load,
) -> None:
    """Missing, extra, mis-shaped, mistyped and doubled weights are errors that name them."""
    folder = copy_of(tiny_llama, tmp_path)
    rewrite(folder, spoil)
    with pytest.raises(ModelLoadError, match=message):
        load(folder)


def test_missing_fused_weights_are_named_as_the_checkpoint_would(
    tiny_checkpoint: Make, tmp_path: Path, load: Load
) -> None:
    """What is stored fused is missed once, under its own name."""
    folder = copy_of(tiny_checkpoint("phi3"), tmp_path)
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.qkv_proj.weight"))
    message = r"1 missing: model\.layers\.0\.self_attn\.qkv_proj\.weight$"
    with pytest.raises(ModelLoadError, match=message):
        load(folder)


def test_a_folder_without_weights_lists_what_it_has(
    tiny_llama: Path, tmp_path: Path, load: Load
) -> None:
    """No weight file of a known name: the error says which there would have to be."""
    folder = copy_of(tiny_llama, tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.gguf")
    with pytest.raises(ModelLoadError, match=r"no model\.safetensors.*weights\.gguf"):
        load(folder)


@pytest.mark.parametrize("size", [0, 3, 8, 100, -1, 0.5], ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_truncated_file_is_named(
    kind: str, size: float, tiny_llama: Path, tmp_path: Path, load: Load
) -> None:
    """Cut anywhere, a weight file is an error with its name, never garbage in the weights."""
    folder = copy_of(tiny_llama, tmp_path)
    file = folder / "model.safetensors"
    if kind == "bin":
        tensors = load_file(file)
        file.unlink()
        file = folder / "pytorch_model.bin"
        torch.save(tensors, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(size * len(content)) if 0 < size < 1 else int(size)])
    with pytest.raises(ModelLoadError, match=rf"{file.name}.*(truncated|damaged|safetensors)"):
        load(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b"\xff\xfe",
    ],
    ids=repr,
)
def test_a_damaged_header_is_an_error(
    header: bytes, tiny_llama: Path, tmp_path: Path, load: Load
) -> None:
    """No header, however wrong, gets past the reader as anything but a ModelLoadError."""
    folder = copy_of(tiny_llama, tmp_path)
    prefix = len(header).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(prefix + header + bytes(64))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        load(folder)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_not_executed(
    zipped: bool, tiny_llama: Path, tmp_path: Path, load: Load
) -> None:
    """A .bin file with anything but tensors is refused, and nothing in it runs."""
    folder = copy_of(tiny_llama, tmp_path)
    (folder / "model.safetensors").unlink()
    file, trace = folder / "pytorch_model.bin", tmp_path / "executed"
    if zipped:
        torch.save({"a": Bomb(trace)}, file)
    else:
        file.write_bytes(pickle.dumps({"a": Bomb(trace)}))
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin"):
        load(folder)
    assert not trace.exists()


def test_a_tensor_of_more_values_than_its_file_is_refused(
    tiny_llama: Path, tmp_path: Path, load: Load
) -> None:
    """One value that claims to be a tebibyte, as strides of 0 can, is not spread out in memory."""
    folder = copy_of(tiny_llama, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"vals": torch.zeros(1).expand(1 << 38)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin.*'vals'.*274877906944.*4 bytes"):
        load(folder)


def test_a_bin_file_must_be_tensors_by_name(tiny_llama: Path, tmp_path: Path, load: Load) -> None:
    """A training state, with the weights one level down, is not taken for a checkpoint."""
    folder = copy_of(tiny_llama, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"model": {"a": torch.ones(1)}}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="not a dictionary of tensors"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is damaged"),
        ('{"weight_map": []}', "is damaged"),
        ('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}', "is missing"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "no .safetensors file beside it"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "no .safetensors file beside it"),
        ('{"weight_map": {"a": 1}}', "no .safetensors file beside it"),
    ],
)
def test_an_index_is_not_trusted(
    index: str, message: str, tiny_llama: Path, tmp_path: Path, load: Load
) -> None:
    """A damaged index, and one that names files elsewhere, are refused."""
    folder = copy_of(tiny_llama, tmp_path)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelLoadError, match=message):
        load(folder)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file, its bytes left as they are."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "float shape": lambda h: h[EMBEDDING].update(shape=[304.0, 64.0]),
    "float offsets": lambda h: h[EMBEDDING].update(
        data_offsets=[float(x) for x in h[EMBEDDING]["data_offsets"]]
    ),
    "empty and huge": lambda h: h[EMBEDDING].update(shape=[0, 10**30], data_offsets=[0, 0]),
    "same bytes": lambda h: h["lm_head.weight"].update(h[EMBEDDING]),
}
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies_is_refused(
    load: Load, tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    """Sizes that are no integers or out of range, and tensors that share bytes."""
    folder = copy_of(tiny_llama, tmp_path)
    edit_header(folder, HEADERS[kind])
    with pytest.raises(ModelLoadError, match="damaged"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model.safetensors"]
)
def test_json_nested_without_end_is_refused(
    load: Load, tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    folder = copy_of(tiny_llama, tmp_path)
    content = b"[" * 100_000
    if name == "model.safetensors":
        content = len(content).to_bytes(8, "little") + content
    (folder / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match="JSON"):
        load(folder)


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_a_tensor_without_plain_values_is_refused(
    load: Load, tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    folder = copy_of(tiny_llama, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    whole = tensors[EMBEDDING]
    tensors[EMBEDDING] = whole.to("meta") if kind == "meta" else whole.to_sparse()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=EMBEDDING):
        load(folder)
