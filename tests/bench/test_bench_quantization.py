"""`quire bench quantization`: what is counted, what ratios are of, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from quire import LLM
from quire.bench import cli, formats, quantization, quantized_runs
from quire.bench.checkpoint import DIMENSIONS, random_checkpoint
from quire.bench.contest import BenchError, Measurement
from quire.bench.load_memory import measure_load
from quire.bench.quantized_runs import OF_LIMIT, RATE, STEP_BYTES, VS_BASE, Decoding
from quire.bench.random_codes import FORMATS, random_codes
from quire.bench.weight_bytes import layer_bytes, step_bytes
from quire.bench.workload import uniform


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_a_step_reads_all_but_rows_of_an_embedding(tiny_checkpoint, name):
    """As the file's tensors add up; an embedding that is the output matrix is read whole."""
    folder = tiny_checkpoint(name)
    sizes = {key: t.numel() * 4 for key, t in load_file(folder / "model.safetensors").items()}
    rows = sizes["model.embed_tokens.weight"] if "lm_head.weight" in sizes else 0
    with LLM(folder, dtype="float32", skip_tokenizer_init=True) as llm:
        assert step_bytes(llm.llm_engine._runner.model) == sum(sizes.values()) - rows


def test_a_layer_has_the_bytes_of_its_tensors(tiny_llama):
    """Of the largest one; what is in no layer does not count."""
    tensors = load_file(tiny_llama / "model.safetensors")
    assert layer_bytes(tiny_llama) == sum(
        t.nbytes for name, t in tensors.items() if name.startswith("model.layers.1.")
    )


def test_ratios_are_of_the_same_turn():
    """Rates beside the base's, and of what memory allows: bytes per step over bytes per second."""
    seconds = {"first_token_seconds": [1.0, 2.0]}
    sides = [
        Measurement("plain", {"seconds": [3.0, 6.0], STEP_BYTES: [8.0, 8.0], **seconds}),
        Measurement("int4", {"seconds": [2.0, 4.0], STEP_BYTES: [2.0, 2.0], **seconds}),
        Measurement("llama-cpp q4_0", {"seconds": [5.0, 4.0], **seconds}),
        Measurement("other", {"seconds": [5.0, 4.0], **seconds}),
    ]
    alone = Decoding(uniform(1, 4, 9, vocab_size=300), sides, [64.0, 32.0])
    quantized_runs.add_ratios(alone, {"llama-cpp q4_0": 3})
    plain, int4, peer, other = (each.runs for each in sides)
    assert plain[RATE] == [4.0, 2.0]
    assert int4[RATE] == [8.0, 4.0]
    assert plain[VS_BASE] == [1.0, 1.0]
    assert int4[VS_BASE] == [2.0, 2.0]
    assert plain[OF_LIMIT] == [0.5, 0.5]
    assert int4[OF_LIMIT] == [0.25, 0.25]
    assert peer[STEP_BYTES] == [3.0, 3.0]
    assert peer[OF_LIMIT] == pytest.approx([6 / 64, 12 / 32])
    assert OF_LIMIT not in other
    text = quantization.decode_table(alone)
    assert "50 (50-50)" in text
    [row] = [line for line in text.splitlines() if line.startswith("| other")]
    assert [cell.strip() for cell in row.strip("|").split("|")][1::3] == ["-", "-"]
    [told] = quantization.peer_lines(alone, {"q4_0": "llama-cpp q4_0"})
    assert told == "int4 vs llama-cpp q4_0: 2.50 (1.00-4.00)"
    several = Decoding(uniform(2, 4, 9, vocab_size=300), sides[:2], [64.0, 32.0])
    assert "limit" not in quantization.decode_table(several)


def test_a_load_is_measured_against_the_weights_and_a_layer():
    """What the peak has over the weights, in layers; where the system tells no peak, nothing."""
    told = {"load_seconds": [1.0], "weight_bytes": [10e6], "peak_bytes": [13e6]}
    silent = {"load_seconds": [1.0], "weight_bytes": [10e6]}
    done = [Measurement("int8", told), Measurement("int4", silent)]
    rows = quantization.load_table(done, [4_000_000, 4_000_000]).splitlines()
    assert rows[2].split("|")[-2].strip() == "0.75"
    assert rows[3].split("|")[-2].strip() == "-"


def test_a_load_tells_what_it_took(tiny_llama):
    """Seconds, the bytes of the weights, and on Linux the most memory there was; or the error."""
    figures = measure_load(str(tiny_llama), {"dtype": "float32"})
    total = sum(t.nbytes for t in load_file(tiny_llama / "model.safetensors").values())
    assert figures["weight_bytes"] == total
    assert figures["load_seconds"] > 0
    assert ("peak_bytes" in figures) == (sys.platform == "linux")
    with pytest.raises(BenchError, match="nowhere"):
        measure_load(str(tiny_llama.parent / "nowhere"), {"dtype": "float32"})


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A random checkpoint whose projections have groups of 128."""
    monkeypatch.setenv("QUIRE_BENCH_DIR", str(tmp_path / "cache"))
    dimensions = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 64,
    }
    monkeypatch.setitem(DIMENSIONS, "small", {**DIMENSIONS["llama-small"], **dimensions})
    return random_checkpoint("small", "bfloat16")


@pytest.mark.parametrize("name", FORMATS)
def test_codes_have_as_many_bits_as_the_format(small, name):
    """Projections are 4 or 8 bits a number and scales besides; all else is the checkpoint's."""
    folder = random_codes(small, name)
    plain = load_file(small / "model.safetensors")
    made = load_file(folder / "model.safetensors")
    kept = [key for key in plain if ".layers." not in key or "norm" in key]
    for key in kept:
        assert torch.equal(plain[key], made[key])
    codes = sum(t.nbytes for key, t in made.items() if key not in kept)
    numbers = sum(t.numel() for key, t in plain.items() if key not in kept)
    bits = (
        4 if name in ("awq", "gptq", "gptq-act-order", "squeezellm", "ct-w4a16", "bnb-nf4") else 8
    )
    assert bits / 8 <= codes / numbers < bits / 8 + 0.42
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == FORMATS[name].config
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert (random_codes(small, name) / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("name", formats.NAMES)
def test_every_format_is_a_model_of_the_same_size(small, name):
    """It loads and generates, weights are about as large, and of fewer bytes."""
    given = formats.find_format(name, small)
    options = {"dtype": "bfloat16", "max_model_len": 32, "skip_tokenizer_init": True}
    with LLM(given.folder, **options, **given.options) as llm:
        model = llm.llm_engine._runner.model
        assert 0.009 < model.read_weight("layers.1.mlp.down").float().std() < 0.031
        plain = sum(t.nbytes for t in load_file(small / "model.safetensors").values())
        assert (step_bytes(model) < plain - 512 * 128 * 2) == (name != "plain")
        llm.generate([[5, 6, 7]], use_tqdm=False)


def test_sizes_that_do_not_fit_are_refused(tiny_llama, monkeypatch, tmp_path):
    """The module and what would fit are named."""
    monkeypatch.setenv("QUIRE_BENCH_DIR", str(tmp_path))
    with pytest.raises(BenchError, match="multiples of 128"):
        random_codes(tiny_llama, "awq")


@pytest.fixture
def bench(tiny_llama, monkeypatch):
    """Run the command on a tiny checkpoint."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments):
        words = ["quantization", "--model", str(tiny_llama), "--dtype", "float32"]
        return CliRunner().invoke(cli.app, [*words, *map(str, arguments)])

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--formats", "int8,int3"), "'int3'"),
        (("--formats", ","), "--formats ','"),
        (("--parts", "speed"), "'speed'"),
        (("--batches", "1,x"), "'1,x'"),
        (("--batches", "0"), "'0'"),
        (("--vs", "vllm"), "'vllm'"),
        (("--gguf-types", "q3"), "'q3'"),
        (("--dtype", "int8"), "int8"),
        (("--output-len", 100_000), "--output-len"),
    ],
)
def test_what_is_wrong_is_an_error_of_usage(bench, arguments, message):
    """The value that is wrong is named, and nothing is measured."""
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_every_side_has_its_figures(bench, tmp_path, monkeypatch):
    """Workloads by their batch, loads by format; a peer that is not installed is told of."""
    loads = {"load_seconds": 1.0, "weight_bytes": 1e6}
    monkeypatch.setattr(quantized_runs, "measure_load", lambda model, options: loads)
    file = tmp_path / "figures.json"
    lens = ("--input-len", 4, "--output-len", 3, "--repeats", 2)
    result = bench(
        *("--formats", "plain", "--batches", "2,1", *lens, "--json", file),
        *("--peer-python", f"llama-cpp={sys.executable}"),
    )
    assert result.exit_code == 0, result.output
    done = json.loads(file.read_text())
    if list(done["decode"]["sides"]) == ["plain"]:
        assert "llama-cpp is left out" in result.output
    assert list(done["decode"]["workloads"]) == ["1 x (4 in, 3 out)", "2 x (4 in, 3 out)"]
    for workload in done["decode"]["workloads"].values():
        assert len(workload["bytes_per_second"]) == 2
        assert workload["runs"]["plain"][VS_BASE] == [1.0, 1.0]
    assert len(done["load"]["plain"]["runs"]["load_seconds"]) == 2
    assert done["formats"] == {"plain": {"folder": done["decode"]["sides"]["plain"]["model"]}}


def test_folders_take_part_beside_formats(bench, tiny_llama, monkeypatch):
    """Each side is given its own folder and arguments, all have the same room."""
    asked = []

    def fake(entries, workloads, **options):
        asked.extend(entries)
        raise BenchError("enough")

    monkeypatch.setattr(quantization, "measure_decoding", fake)
    result = bench("--formats", "plain,int4-head", "--folder", tiny_llama, "--vs", "none")
    assert "enough" in result.output
    assert [entry.label for entry in asked] == ["plain", "int4-head", tiny_llama.name]
    common = {"dtype": "float32", "max_model_len": 96, "max_num_seqs": 32}
    assert asked[0].options == asked[2].options == common
    assert asked[1].options == {**common, **formats.ON_LOAD["int4-head"]}
