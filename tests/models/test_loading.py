"""Weights into parameters: formats, tying, names, memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import build_config, build_model, write_checkpoint
from folders import Load, Make, Tensors, configure, copy_of, rewrite
from paged import PagedRunner
from safetensors.torch import load_file, save_file

from quire.errors import ModelLoadError
from quire.kernels import get_backend
from quire.models.decoder import Decoder


def assert_same_weights(one: Decoder, other: Decoder) -> None:
    assert one.weights.names() == other.weights.names()
    for name in one.weights.names():
        assert torch.equal(one.weights[name], other.weights[name]), name


# Formats


def write_sharded(folder: Path, _tensors: Tensors) -> None:
    build_model(build_config("llama")).save_pretrained(folder, max_shard_size="60KB")


def write_sharded_without_index(folder: Path, tensors: Tensors) -> None:
    write_sharded(folder, tensors)
    (folder / "model.safetensors.index.json").unlink()


def write_bin(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def write_old_bin(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_sharded_bin(folder: Path, tensors: Tensors) -> None:
    weight_map = {}
    for number, name in enumerate(tensors):
        weight_map[name] = f"pytorch_model-{number % 3 + 1:05}-of-00003.bin"
    for file in set(weight_map.values()):
        torch.save({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "write",
    [write_sharded, write_sharded_without_index, write_bin, write_old_bin, write_sharded_bin],
)
def test_every_format_gives_the_same_weights(
    write: Callable[[Path, Tensors], None], tiny_llama: Path, tmp_path: Path, load: Load
) -> None:
    """Shards or one file, safetensors or .bin: the parameters are equal bit by bit."""
    folder = copy_of(tiny_llama, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write(folder, tensors)
    assert len([each for each in folder.iterdir() if each.suffix in (".bin", ".safetensors")])
    assert_same_weights(load(folder), load(tiny_llama))


def test_safetensors_come_before_bin(tiny_llama: Path, tmp_path: Path, load: Load) -> None:
    """Where both lie in a folder, the .bin file is not opened."""
    folder = copy_of(tiny_llama, tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"no tensors")
    assert_same_weights(load(folder), load(tiny_llama))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "phi3"])
def test_weights_are_converted_one_by_one(
    name: str, dtype: torch.dtype, tiny_checkpoint: Make, load: Load
) -> None:
    """Each parameter is the float32 one, rounded."""
    exact, rounded = (
        load(tiny_checkpoint(name), dtype=each, backend="reference")
        for each in (torch.float32, dtype)
    )
    for parameter in exact.weights.names():
        assert torch.equal(rounded.weights[parameter], exact.weights[parameter].to(dtype))


def test_weights_of_another_dtype_are_read(tiny_llama: Path, tmp_path: Path, load: Load) -> None:
    """A bfloat16 checkpoint loads into float32 parameters of the same values."""
    folder = copy_of(tiny_llama, tmp_path)
    rewrite(folder, lambda ts: ts.update({n: t.bfloat16() for n, t in ts.items()}))
    decoder, reference = load(folder), load(tiny_llama)
    for name in decoder.weights.names():
        assert torch.equal(decoder.weights[name], reference.weights[name].bfloat16().float())


# Tying


def logits_of(decoder: Decoder) -> torch.Tensor:
    runner = PagedRunner(decoder, get_backend("cpu"), num_seqs=1, max_len=16)
    return runner.step([(0, list(range(3, 14)))])[0]


@pytest.mark.parametrize("name", ["llama-mha-bias-tied", "opt-350m", "gemma2", "gpt2"])
def test_a_tied_embedding_is_in_memory_once(
    name: str, tiny_checkpoint: Make, tmp_path: Path, load: Load
) -> None:
    """With tie_word_embeddings there is one matrix, whether or not the file repeats it."""
    folder = copy_of(tiny_checkpoint(name), tmp_path)
    absent = load(folder)
    embedding = next(
        key
        for key in load_file(folder / "model.safetensors")
        if key.endswith(("embed_tokens.weight", "wte.weight"))
    )
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    present = load(folder)
    assert "lm_head.weight" not in present.weights
    assert present.weight_bytes() == absent.weight_bytes()
    assert torch.equal(logits_of(present), logits_of(absent))


def test_a_tied_output_matrix_may_stand_for_the_embedding(
    tiny_checkpoint: Make, tmp_path: Path, load: Load
) -> None:
    """A tied checkpoint may hold the matrix under the output's name only."""
    folder = copy_of(tiny_checkpoint("qwen2-tied"), tmp_path)
    expected = logits_of(load(folder))

    def rename(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    rewrite(folder, rename)
    assert torch.equal(logits_of(load(folder)), expected)


def test_an_output_matrix_that_differs_is_used_and_reported(
    tiny_llama: Path, tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers, a configuration that ties two different matrices is not followed."""
    folder = copy_of(tiny_llama, tmp_path)
    configure(folder, tie_word_embeddings=True)
    decoder = load(folder)
    assert "differs from the embedding" in caplog.text
    assert torch.equal(logits_of(decoder), logits_of(load(tiny_llama)))


def test_without_tying_the_output_matrix_is_required(
    tiny_checkpoint: Make, tmp_path: Path, load: Load
) -> None:
    """tie_word_embeddings=false and no lm_head: its name is in the error."""
    folder = copy_of(tiny_checkpoint("qwen2-tied"), tmp_path)
    configure(folder, tie_word_embeddings=False)
    with pytest.raises(ModelLoadError, match=r"1 missing: lm_head\.weight"):
        load(folder)


# Names


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("llama", "model."),
        ("gpt2", "transformer."),
        ("opt", "model."),
        ("falcon-7b", "transformer."),
    ],
)
def test_names_without_the_model_prefix_load(
    name: str, prefix: str, tiny_checkpoint: Make, tmp_path: Path, load: Load
) -> None:
    """A checkpoint saved from the base model, as gpt2's own is, loads all the same."""
    folder = copy_of(tiny_checkpoint(name), tmp_path)

    def strip(tensors: Tensors) -> None:
        for key in list(tensors):
            tensors[key.removeprefix(prefix)] = tensors.pop(key)

    rewrite(folder, strip)
    assert_same_weights(load(folder), load(tiny_checkpoint(name)))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.1.attn.bias"),
        ("gpt2", "h.1.attn.masked_bias"),
        ("gpt-neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt-neox", "gpt_neox.layers.1.attention.masked_bias"),
        ("gpt-neox-serial", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"),
    ],
)
def test_tensors_that_carry_nothing_are_left_out(
    name: str, extra: str, tiny_checkpoint: Make, tmp_path: Path, load: Load
) -> None:
    """Masks and frequencies of old checkpoints are no error."""
    folder = copy_of(tiny_checkpoint(name), tmp_path)
    rewrite(folder, lambda tensors: tensors.update({extra: torch.ones(1, 1, 4, 4).bool()}))
    assert_same_weights(load(folder), load(tiny_checkpoint(name)))


# Memory

_MEASURE = """
import sys
from pathlib import Path
import torch
from quire.kernels import get_backend
from quire.models.hf_config import read_config
from quire.models.loader import load_model

def status(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) * 1024

folder, cpu = Path(sys.argv[1]), torch.device("cpu")
dtype = getattr(torch, sys.argv[2])
torch.ones(8).bfloat16()
before = status("VmRSS")
model = load_model(
    folder, read_config(folder), device=cpu, dtype=dtype, kernels=get_backend(cpu)
)
print((status("VmHWM") - before) / model.weight_bytes(), model.weight_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_weights_are_in_memory_once(dtype: str, tmp_path: Path) -> None:
    """Peak memory while loading is the weights and one chunk of the file, not twice the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).float()
    save_file(
        {name: torch.rand(each.shape) for name, each in model.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    result = subprocess.run(
        [sys.executable, "-P", "-c", _MEASURE, str(tmp_path), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    ratio, num_bytes = (float(each) for each in result.stdout.split())
    assert num_bytes > 90e6
    assert ratio < 1 + 60e6 / num_bytes, result.stdout


def test_a_checkpoint_can_be_deleted_once_loaded(tmp_path: Path, load: Load) -> None:
    """No parameter points into the file."""
    folder = write_checkpoint(tmp_path / "m", "llama")
    decoder = load(folder)
    expected = logits_of(decoder)
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    shutil.rmtree(folder)
    assert torch.equal(logits_of(decoder), expected)
