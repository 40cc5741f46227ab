"""What the command refuses, what it gives the sides, and what its tables, files and charts show."""

from __future__ import annotations

import json
import struct
import sys

import pytest
from typer.testing import CliRunner

from quire.bench import chart, cli, options
from quire.bench import record as records
from quire.bench.checkpoint import DIMENSIONS
from quire.bench.contest import Measurement
from quire.bench.limit import Limit, ModelSize
from quire.bench.record import Record

RUNS = {
    "quire": {"seconds": [2.0, 1.0, 4.0], "first_token_seconds": [0.5, 0.5, 1.0]},
    "transformers": {"seconds": [8.0, 9.0, 7.0], "first_token_seconds": [1.0, 1.0, 1.0]},
    "vllm": {"seconds": [3.0, 3.0, 3.0]},  # did not tell
    "llama-cpp": {"seconds": [5.0, 5.0, 5.0], "first_token_seconds": [2.0, 2.0, 2.0]},
}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The command on a configuration without weights; the records that it asked for."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {**DIMENSIONS["llama-small"], "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(options, "random_checkpoint", lambda name, dtype: folder)
    monkeypatch.setattr(options, "gguf_file", lambda folder, kind: folder / f"{kind}.gguf")
    asked: list[Record] = []

    def fake(model, folder, vocab_size, workload, entries, repeats, say):
        measurements = [Measurement(e.label, dict(RUNS[e.side])) for e in entries]
        limit, size = Limit(1e9, 1e12), ModelSize(10**8, 10**7, 10**7)
        versions = [{e.side: "1.2"} for e in entries]
        done = Record(model, workload, entries, versions, measurements, limit, size)
        for each in measurements:
            records.add_rates(each, workload.num_output_tokens, done.num_later_tokens)
        asked.append(done)
        return done

    monkeypatch.setattr(cli, "record", fake)
    return asked


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("throughput --workload prefix", ["--workload", "'prefix'", "uniform or mixed"]),
        ("throughput --vs vlm", ["--vs", "'vlm'", "llama-cpp"]),
        ("prefix --vs x", ["--vs", "'x'"]),
        ("latency --vs x", ["--vs", "'x'"]),
        ("latency --dtype int8", ["--dtype", "'int8'", "bfloat16"]),
        ("throughput --random zzz --vs none", ["--random", "'zzz'", "llama-small"]),
        ("throughput --gguf-type q3 --vs llama-cpp", ["--gguf-type", "'q3'", "q8_0"]),
        ("throughput --gguf-type q8_0", ["--gguf-type", "'q8_0'", "--vs llama-cpp"]),
        ("throughput --vs vllm --peer-python vllm=/no", ["--peer-python", "'/no'"]),
        ("throughput --peer-python vllm=sh", ["--peer-python", "'vllm=sh'", "no vllm"]),
        ("prefix --peer-python sh", ["--peer-python", "'sh'", "no peer"]),
        ("prefix --vs vllm --peer-python sh --peer-python sh", ["'sh'", "given twice"]),
        ("prefix --vs vllm --peer-env A", ["--peer-env", "NAME=VALUE", "'A'"]),
        ("prefix --peer-env A=1", ["--peer-env", "'A=1'", "no peer"]),
        ("throughput --dataset d.json --workload mixed", ["--dataset", "--workload", "give one"]),
        ("throughput --dataset d.json", ["--dataset", "no tokenizer", "--model"]),
        ("throughput --tokenizer t", ["--tokenizer", "'t'", "--dataset"]),
        ("kernels --rows 1,a", ["--rows", "'1,a'", "numbers"]),
        ("kernels --dtype float16", ["--dtype", "'float16'", "bfloat16"]),
        ("latency --json /proc/none.json", ["/proc/none.json", "no file can be written"]),
        ("latency --chart a.pdf", ["--chart", "a.pdf", ".png"]),
        ("latency --chart no/a.png", ["--chart", "no/a.png", "no file can be written"]),
    ],
)
def test_a_wrong_option_is_named_before_anything_runs(monkeypatch, arguments, named):
    """With its value and what would be right; no checkpoint is made for it."""
    monkeypatch.setattr(options, "random_checkpoint", None)
    monkeypatch.setattr(chart, "find_spec", lambda name: object())
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(cli.app, arguments.split())
    assert result.exit_code == 2, result.output
    for text in named:
        assert text in result.output


def test_a_chart_without_matplotlib_says_what_to_install(monkeypatch):
    """Before the measurement, not after it."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(chart, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["latency", "--chart", "a.png"])
    assert result.exit_code == 2
    assert 'pip install "quire[bench]"' in result.output


@pytest.mark.parametrize("command", ["throughput", "prefix", "latency"])
def test_every_side_gets_the_same_tokens_and_its_own_place(measured, tmp_path, command):
    """One workload for all; each peer's interpreter, variables and options are as asked for."""
    file = tmp_path / "figures.json"
    output = run(
        *(command, "--vs", "transformers, vllm,llama-cpp", "--json", file),
        *("--peer-python", "sh", "--peer-python", f"vllm={sys.executable}"),
        *("--peer-env", "A=b=c", "--gguf-type", "q8_0", "--seed", "3"),
    )
    [done] = measured
    by_label = {entry.label: entry for entry in done.entries}
    ours = {"prefix": {"quire", "quire, no prefix cache"}}.get(command, {"quire"})
    assert set(by_label) == {"transformers", "vllm", "llama-cpp q8_0"} | ours
    assert by_label["vllm"].python == sys.executable
    assert by_label["transformers"].python == by_label["llama-cpp q8_0"].python == "sh"
    assert by_label["quire"].python == sys.executable
    assert by_label["llama-cpp q8_0"].model.endswith("q8_0.gguf")
    assert by_label["vllm"].environment == {"A": "b=c"}
    assert by_label["quire"].environment == {}
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["limit"]["bytes_per_second"] == 1e9
    assert document["limit"]["flops"] == 1e12
    assert document["limit"]["seconds"] == pytest.approx(done.limit_seconds)
    assert set(document["runs"]) == set(document["sides"]) == set(by_label)
    for label, side in document["sides"].items():
        assert side["versions"] == {by_label[label].side: "1.2"}
        assert side["options"] == by_label[label].options
        assert len(document["runs"][label]["seconds"]) == 3
        assert f"{by_label[label].side} 1.2" in output
        for name, value in by_label[label].options.items():
            assert f"{name}={value}" in output
    assert "of limit" in output
    assert "A=b=c" in output


def test_lengths_that_the_model_does_not_take_are_refused(measured, monkeypatch):
    """Before anything is loaded, by the options that they come from."""
    monkeypatch.setenv("COLUMNS", "300")
    arguments = ["latency", "--vs", "none", "--input-len", "2000", "--output-len", "50"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    for word in ("2050 tokens", "2048", "--input-len", "--output-len"):
        assert word in result.output
    assert not measured


def test_prefix_is_measured_with_the_cache_and_without(measured):
    """16 prompts sharing 1,024 tokens unless asked otherwise; the cache is the only difference."""
    output = run("prefix")
    [done] = measured
    assert [len(prompt) for prompt in done.workload.prompts] == [1056] * 16
    assert done.workload.output_lens == [32] * 16
    assert len({tuple(p[:1024]) for p in done.workload.prompts}) == 1
    warm, cold = (entry.options for entry in done.entries)
    assert warm.pop("enable_prefix_caching") is True
    assert cold.pop("enable_prefix_caching") is False
    assert warm == cold
    assert "vs quire, no prefix cache" in output
    # The limit has the shared tokens once: 1,024 + 16 * 32 tokens.
    computing = (1024 + 16 * 32) * 2 * 1e8 / 1e12
    assert done.limit_first_token_seconds == pytest.approx(computing)


def test_rates_are_of_the_tokens_that_the_time_was_for(measured):
    """All tokens over all the time; those after the first over the time after the first."""
    output = run("latency", "--vs", "vllm,llama-cpp", "--batch", "2", "--output-len", "6")
    quire, vllm, _ = measured[0].measurements
    assert quire.runs["output_tokens_per_second"] == [6.0, 12.0, 3.0]
    assert quire.runs["decode_tokens_per_second"] == pytest.approx([10 / 1.5, 20.0, 10 / 3])
    assert "decode_tokens_per_second" not in vllm.runs
    [row] = [line for line in output.splitlines() if line.startswith("| vllm ") and "3.00" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["-", "-", "-"], "what a side does not tell is not made up"


def test_workloads_of_the_command_are_as_long_as_asked(measured):
    """A seed draws other tokens; mixed lengths go up to the ones given."""
    lens = ("--input-len", "40", "--output-len", "20", "--num-prompts", "60", "--vs", "none")
    for arguments in (lens, (*lens, "--seed", "1"), (*lens, "--workload", "mixed")):
        run("throughput", *arguments)
    plain, seeded, mixed = (done.workload for done in measured)
    assert {len(p) for p in plain.prompts} == {40}
    assert plain.prompts != seeded.prompts
    assert {len(p) for p in mixed.prompts} <= set(range(16, 41))
    assert {*mixed.output_lens} <= set(range(16, 21))
    assert len({len(p) for p in mixed.prompts}) > 1


def test_a_dataset_is_tokenized_by_the_models_tokenizer(measured, tiny_llama, tmp_path):
    """A prompt as the engine would take it, an answer by its length; and its errors are usage's."""
    from quire.tokenizer.loader import load_tokenizer

    tokenizer = load_tokenizer(tiny_llama)
    question, answer = "What is the capital of France ?", "The capital of France is Paris ."
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    file = tmp_path / "chats.json"
    file.write_text(json.dumps([{"conversations": turns}]), encoding="utf-8")
    arguments = ("throughput", "--dataset", file, "--vs", "none", "--num-prompts", 1)
    run(*arguments, "--model", tiny_llama, "--dtype", "float32")
    run(*arguments, "--tokenizer", tiny_llama)
    for done in measured:
        assert done.workload.prompts == [tokenizer.encode(question)]
        assert done.workload.output_lens == [len(tokenizer.encode(answer, False))]
        assert "chats.json" in done.workload.name
    for extra, named in (
        (["--num-prompts", 2], "1 of the 2 prompts"),
        (["--input-len", 4], "0 of the 1 prompts"),
    ):
        result = CliRunner().invoke(
            cli.app, [str(each) for each in [*arguments, "--model", tiny_llama, *extra]]
        )
        assert result.exit_code == 2
        assert named in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("command", ["throughput", "prefix", "latency"])
def test_a_chart_is_a_png_of_the_sides_that_told(measured, tmp_path, monkeypatch, command):
    """Bars have the median and the range of the rates in the table, the line is the limit."""
    pytest.importorskip("matplotlib", reason="matplotlib is in the extras 'bench' and 'dev'")
    from matplotlib.axes import Axes

    drawn: dict[str, list] = {"bars": [], "lines": []}
    bar, line = Axes.bar, Axes.axhline
    monkeypatch.setattr(
        Axes, "bar", lambda self, x, h, *a, **k: drawn["bars"].append(h) or bar(self, x, h, *a, **k)
    )
    monkeypatch.setattr(
        Axes, "axhline", lambda self, y, **k: drawn["lines"].append(y) or line(self, y, **k)
    )
    file = tmp_path / "chart.png"
    run(command, "--vs", "transformers,vllm,llama-cpp", "--chart", file)
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 500
    assert height > 500
    [done] = measured
    rate = "decode" if command == "latency" else "output"
    told = [m for m in done.measurements if f"{rate}_tokens_per_second" in m.runs]
    assert drawn["bars"] == [[m.median(f"{rate}_tokens_per_second") for m in told]]
    total = done.workload.num_output_tokens / done.limit_seconds
    assert drawn["lines"] == [done.limit_decode_rate if command == "latency" else total]


def test_the_readme_lists_every_subcommand(repo_root):
    """The bench's document is where its commands are explained."""
    text = (repo_root / "core_engine" / "bench" / "README.md").read_text(encoding="utf-8")
    for command in cli.app.registered_commands:
        assert f"quire bench {command.callback.__name__}" in text
