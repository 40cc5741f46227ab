"""What the benchmark claims to compare is what it runs, and a side that fails is not a figure."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from quire.bench import products, report
from quire.bench.checkpoint import random_checkpoint
from quire.bench.cli import app
from quire.bench.contest import BenchError, Contestant, Measurement, alternate
from quire.bench.limit import Limit, ModelSize, measure_limit
from quire.bench.sides import TransformersSide
from quire.bench.workload import Workload, mixed, shared_prefix, uniform


def test_workloads_repeat_and_have_the_lengths_they_name():
    """Equal arguments give equal tokens, other seeds others; lengths are as asked for."""
    for make in (
        lambda seed: uniform(4, 7, 5, vocab_size=300, seed=seed),
        lambda seed: mixed(9, (3, 8), (2, 6), vocab_size=300, seed=seed),
        lambda seed: shared_prefix(3, 20, 4, 2, vocab_size=300, seed=seed),
    ):
        assert make(1) == make(1)
        assert make(1).prompts != make(2).prompts
        assert all(0 <= token < 300 for prompt in make(0).prompts for token in prompt)
    assert [len(p) for p in uniform(4, 7, 5, vocab_size=300).prompts] == [7] * 4
    work = mixed(50, (3, 8), (2, 6), vocab_size=300)
    assert {len(p) for p in work.prompts} == {3, 4, 5, 6, 7, 8}
    assert set(work.output_lens) == {2, 3, 4, 5, 6}
    shared = shared_prefix(3, 20, 4, 2, vocab_size=300).prompts
    assert {tuple(p[:20]) for p in shared} == {tuple(shared[0][:20])}
    assert len({tuple(p[20:]) for p in shared}) == 3


def test_median_and_spread_are_of_all_runs():
    """A table quotes the median, with the least and the greatest."""
    measurement = Measurement("a", {"seconds": [3.0, 1.0, 2.0]})
    assert report.spread(measurement, "seconds", 1) == "2.0 (1.0-3.0)"
    assert report.spread(measurement, "missing") == "-"


def test_sides_run_in_turns(tiny_llama):
    """A B A B, each in a process of its own that checks how much was generated."""
    order = []
    work = Workload("w", [[5, 6, 7], [8, 9]], [4, 3])
    options = {"dtype": "float32"}
    with (
        Contestant("a", "quire", str(tiny_llama), options) as a,
        Contestant("b", "quire", str(tiny_llama), {**options, "max_num_seqs": 1}) as b,
    ):
        assert "quire" in a.versions
        measured = alternate(
            [a, b], work, repeats=2, on_run=lambda label, figures: order.append(label)
        )
        with pytest.raises(BenchError, match="vocabulary"):
            a.run(Workload("w", [[10**6]], [1]))
        assert a.run(work)["steps"] > 0, "a side that failed once can run again"
    assert order == ["a", "b", "a", "b"]
    for one in measured:
        assert len(one.runs["seconds"]) == 2
        assert min(one.runs["first_token_seconds"]) > 0
        assert min(one.runs["peak_bytes"]) > 0
    # One at a time needs a step per token of each; together they share steps.
    assert measured[1].median("steps") > measured[0].median("steps")


def test_transformers_tells_when_first_tokens_came(tiny_llama):
    """After the prompt and before the rest, with batches one after the other."""
    work = Workload("w", [[5, 6, 7], [8, 9]], [30, 20])
    side = TransformersSide(str(tiny_llama), dtype="float32", batch_size=2)
    together = side.run(work)
    assert 0 < together["first_token_seconds"] < together["seconds"] / 2
    assert "transformers" in side.versions()
    with pytest.raises(IndexError):
        side.run(Workload("w", [[10**6]], [1]))


def test_a_side_that_cannot_start_says_why(tmp_path):
    """The reason comes back from the side's process."""
    with pytest.raises(BenchError, match=r"config\.json"):
        Contestant("a", "quire", str(tmp_path))


@pytest.mark.slow
def test_throughput_beside_transformers(tmp_path, monkeypatch):
    """The command makes a checkpoint that both sides load, and writes every figure."""
    monkeypatch.setenv("QUIRE_BENCH_DIR", str(tmp_path))
    figures = tmp_path / "figures.json"
    arguments = ["throughput", "--random", "llama-small", "--dtype", "float32"]
    arguments += ["--num-prompts", "3", "--input-len", "20", "--output-len", "4"]
    run = CliRunner().invoke(app, [*arguments, "--repeats", "2", "--json", str(figures)])
    assert run.exit_code == 0, run.output
    assert "transformers" in run.output
    document = json.loads(figures.read_text(encoding="utf-8"))
    assert {len(runs["seconds"]) for runs in document["runs"].values()} == {2}
    assert random_checkpoint("llama-small", "float32").parent == tmp_path


@pytest.mark.slow
def test_latency_and_startup_tell_their_phases(tmp_path, tiny_llama):
    """Each phase of a step and of a start is a row and a figure of every run."""
    for arguments, figures in (
        (
            ["latency", "--dtype", "float32", "--batch", "2", "--input-len", "8"],
            {
                "seconds",
                "first_token_seconds",
                "decode_tokens_per_second",
                "forward_ms_per_step",
                "overhead_ms_per_step",
            },
        ),
        (["startup"], {"import_quire", "import_torch", "load", "first_token", "after_torch"}),
    ):
        file = tmp_path / f"{arguments[0]}.json"
        run = CliRunner().invoke(
            app, [*arguments, "--model", str(tiny_llama), "--repeats", "1", "--json", str(file)]
        )
        assert run.exit_code == 0, run.output
        runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
        measured = runs if arguments == ["startup"] else runs["quire"]
        assert {*figures, "peak_bytes"} <= set(measured)
        assert all(value > 0 for [value] in measured.values())
        assert "first token" in run.output


def test_the_limit_is_what_reading_and_multiplying_take_at_least():
    """A prompt is bound by products; a step by reading the weights, or by many sequences."""
    limit = Limit(bytes_per_second=1e9, flops=1e12)
    size = ModelSize(layer_weights=400_000_000, head_weights=100_000_000, step_bytes=10**9)
    one = uniform(1, 100, 11, vocab_size=300)
    assert limit.seconds(one, size) == pytest.approx(1.0 + 10 * 1.0), "a prompt reads weights, too"
    long = uniform(1, 5000, 1, vocab_size=300)
    assert limit.seconds(long, size) == pytest.approx(5000 * 2 * 4e8 / 1e12)
    assert limit.first_token_seconds(long, size) == limit.seconds(long, size)
    many = Workload("w", [[i] for i in range(2000)], [3] * 2000)
    assert limit.seconds(many, size, 2000) == pytest.approx(2000 * 8e-4 + 2 * 2000 * 1e-3)
    waves = limit.seconds(many, size, 500)
    assert waves == pytest.approx(2000 * 8e-4 + 4 * 2 * 1.0)
    measured = measure_limit(1)
    assert measured.bytes_per_second > 1e8
    assert measured.flops > 1e8


@given(prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1))
def test_shared_beginnings_are_computed_once(prompts):
    """As many tokens as there are different beginnings of prompts."""
    beginnings = {tuple(p[: i + 1]) for p in prompts for i in range(len(p))}
    work = Workload("w", prompts, [1] * len(prompts))
    assert work.num_computed_tokens == len(beginnings)


def test_a_models_size_counts_what_a_step_reads(tiny_checkpoint):
    """A tied table is the output matrix; of one of its own, a step reads a few rows."""
    for name, tables in (("llama", 2), ("qwen2-tied", 1)):
        folder = tiny_checkpoint(name)
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        size = ModelSize.of(folder, vocab_size)
        assert size.head_weights % vocab_size == 0
        whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        weights = size.layer_weights + tables * size.head_weights
        assert size.step_bytes == whole * (size.layer_weights + size.head_weights) // weights


def test_products_are_measured_in_turns(tmp_path, monkeypatch):
    """Every side, number of rows and repeat has a time, and the command a table of them."""
    monkeypatch.setattr(products, "_MEMORY_BYTES", 1 << 16)
    file = tmp_path / "figures.json"
    arguments = ["kernels", "--in-features", "64", "--out-features", "40", "--rows", "1,3"]
    run = CliRunner().invoke(app, [*arguments, "--repeats", "2", "--json", str(file)])
    assert run.exit_code == 0, run.output
    assert "GFLOP/s" in run.output
    seconds = json.loads(file.read_text(encoding="utf-8"))["seconds"]
    assert "torch" in seconds
    for figures in seconds.values():
        assert set(figures) == {"1", "3"}
        assert all(len(times) == 2 and min(times) > 0 for times in figures.values())


def test_a_peer_runs_in_an_environment_without_quire(tmp_path, monkeypatch):
    """The benchmark's own modules load there, and variables reach the peer's process."""
    site = tmp_path / "site"
    (site / "torch").mkdir(parents=True)
    (site / "torch" / "__init__.py").write_text("__version__ = '0'")
    (site / "vllm").mkdir()
    (site / "vllm" / "__init__.py").write_text(FAKE_VLLM)
    work = Workload("w", [[5, 6, 7], [8, 9]], [4, 3])
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH={site}\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    with Contestant("v", "vllm", "m", python=str(python), environment={"MARK": "7"}) as peer:
        assert peer.versions == {"vllm": "fake-7", "torch": "0"}
        figures = peer.run(work)
    assert figures["seconds"] > 0
    assert figures["first_token_seconds"] == 0.25


FAKE_VLLM = """
import os
from types import SimpleNamespace as Space
__version__ = "fake-" + os.environ["MARK"]
SamplingParams = Space
class LLM:
    def __init__(self, model, skip_tokenizer_init): pass
    def reset_prefix_cache(self): pass
    def generate(self, prompts, params, use_tqdm):
        metrics = Space(first_token_latency=0.25)
        outputs = [[Space(token_ids=[1] * each.max_tokens)] for each in params]
        return [Space(outputs=each, metrics=metrics) for each in outputs]
"""
