"""What the benchmark claims to compare is what it runs, and a side that fails is not a figure."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from quire.bench import report
from quire.bench.checkpoint import random_checkpoint
from quire.bench.cli import app
from quire.bench.contest import BenchError, Contestant, Measurement, alternate
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
            {"seconds", "first_token_seconds", "forward_ms_per_step", "overhead_ms_per_step"},
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
