"""A GGUF file has the checkpoint's numbers: the format's own reader is the oracle."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file

from quire.bench.contest import BenchError
from quire.bench.gguf import _data, gguf_file, step_bytes, write_gguf
from quire.models.hf_config import read_config

gguf = pytest.importorskip("gguf", reason="gguf is in the extra 'dev'")

PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def expected(name: str, weights: dict[str, torch.Tensor], config: dict) -> torch.Tensor:
    """A tensor of the checkpoint; Llama's queries and keys with rotated pairs side by side."""
    parts = name.split(".")
    if parts[0] != "blk":
        return weights[f"{OTHERS[parts[0]]}.{parts[1]}"]
    tensor = weights[f"model.layers.{parts[1]}.{PARTS[parts[2]]}.{parts[3]}"]
    counts = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    if config["model_type"] != "llama" or parts[2] not in counts:
        return tensor
    heads = tensor.chunk(config[counts[parts[2]]])
    half = len(heads[0]) // 2
    order = [i // 2 + half * (i % 2) for i in range(2 * half)]
    return torch.cat([head[order] for head in heads])


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_the_formats_reader_finds_the_checkpoint(tiny_checkpoint, tmp_path, name, kind):
    """Every tensor is there once, to its type's precision; settings are the configuration's."""
    folder, file = tiny_checkpoint(name), tmp_path / "m.gguf"
    config = read_config(folder)
    weights = load_file(folder / "model.safetensors")
    write_gguf(folder, file, kind)
    reader = gguf.GGUFReader(file)
    assert len(reader.tensors) == len(weights)
    types = set()
    for tensor in reader.tensors:
        want = expected(tensor.name, weights, config).float()
        got = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert list(got.shape) == list(want.shape), tensor.name
        types.add(tensor.tensor_type.name)
        tolerance = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8}.get(tensor.tensor_type.name)
        if tolerance is not None:
            torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-7)
        else:
            blocks = (got - want).reshape(-1, 32).abs().amax(1)
            most = want.reshape(-1, 32).abs().amax(1)
            # Of 4 bits, what is as large as the largest and opposite to it is a step too far.
            step = {"Q8_0": 0.5 / 127, "Q4_0": 1 / 8}[tensor.tensor_type.name]
            assert bool((blocks <= most * (step + 2**-10)).all())
    assert types == {"F32", kind.upper()}  # F32: norms and biases
    fields = {key: field.contents() for key, field in reader.fields.items()}
    model = "qwen2" if name.startswith("qwen2") else "llama"
    assert fields["general.architecture"] == model
    assert fields[f"{model}.vocab_size"] == config["vocab_size"]
    assert fields[f"{model}.block_count"] == config["num_hidden_layers"]
    assert fields[f"{model}.attention.head_count_kv"] == config["num_key_value_heads"]
    assert fields[f"{model}.rope.freq_base"] == config["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_codes_are_those_of_the_formats_own_quantizer(tmp_path, kind):
    """Of 4 bits byte for byte, zeros and ties included; of 8 bits ties may go the other way."""
    numbers = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    numbers[0] = 0
    numbers[1] = torch.arange(256) % 17 - 8
    numbers[2] = -numbers[1]
    type_ = gguf.GGMLQuantizationType[kind.upper()]
    want = gguf.quants.quantize(numbers.numpy(), type_)
    got = numpy.frombuffer(_data(numbers, kind), dtype=numpy.uint8).reshape(want.shape)
    if kind == "q4_0":
        assert (got == want).all()
    else:
        values = [gguf.quants.dequantize(each, type_) for each in (got.copy(), want)]
        steps = numpy.abs(numbers.numpy().reshape(-1, 32)).max(1) / 127
        apart = numpy.abs(values[0] - values[1]).reshape(-1, 32).max(1)
        assert (apart <= steps * 1.001).all()
        assert (got != want).mean() < 0.01


def test_a_step_reads_all_tensors_but_rows_of_an_embedding(tiny_checkpoint, tmp_path):
    """As the reader counts them in the file; a tied embedding is read as the output matrix."""
    for name in ("llama", "qwen2-tied"):
        write_gguf(tiny_checkpoint(name), file := tmp_path / f"{name}.gguf", "q4_0")
        sizes = {each.name: int(each.n_bytes) for each in gguf.GGUFReader(file).tensors}
        rows = sizes["token_embd.weight"] if "output.weight" in sizes else 0
        assert step_bytes(tiny_checkpoint(name), "q4_0") == sum(sizes.values()) - rows


def test_a_file_is_made_once_for_a_checkpoint(tiny_checkpoint, tmp_path, monkeypatch):
    """Kept beside the random checkpoints, and made anew for another type or other weights."""
    monkeypatch.setenv("QUIRE_BENCH_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    for each in ("config.json", "model.safetensors"):
        (folder / each).write_bytes((tiny_checkpoint("llama") / each).read_bytes())
    first = gguf_file(folder, "bf16")
    written = first.stat().st_mtime_ns
    assert gguf_file(folder, "bf16") == first
    assert first.stat().st_mtime_ns == written
    assert gguf_file(folder, "q8_0").stat().st_size < first.stat().st_size
    (folder / "config.json").write_text(
        (folder / "config.json").read_text(encoding="utf-8") + "\n", encoding="utf-8"
    )
    assert gguf_file(folder, "bf16") != first
    assert len(list((tmp_path / "cache").iterdir())) == 3, "no unfinished file is left"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_the_file_cannot_express_is_refused(tiny_checkpoint, tmp_path, changes, message):
    """The field and the value are named, and nothing is written."""
    config = json.loads((tiny_checkpoint("llama") / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises(BenchError, match=message):
        write_gguf(tmp_path, tmp_path / "m.gguf", "bf16")
    assert not (tmp_path / "m.gguf").exists()
