"""`quire bench gpu` at tiny sizes, on a CPU: every part runs, and the table says what it must."""

from __future__ import annotations

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from quire.bench import cli
from quire.bench.gpu import run as runs
from quire.bench.gpu import start
from quire.bench.gpu.clock import Clock
from quire.bench.gpu.figure import Figure
from quire.bench.gpu.part import PARTS, run_part
from quire.bench.gpu.setting import Setting
from quire.bench.gpu.table import BEGIN, END, figures_table, section, write_section

LINE = {"part": "latency", "name": "decode", "unit": "ms"}


def measure(name: str) -> dict[str, Figure]:
    """Measure one part here, at tiny sizes; return its figures by what they are of."""
    figures: list[Figure] = []
    run_part(
        name, device="cpu", tiny=True, seconds=0.5, copied=1e9, multiplied=1e10,
        tell=figures.append,
    )  # fmt: skip
    assert all(each.part == name for each in figures)
    return {each.name: each for each in figures}


def test_the_ceilings_are_measured():
    copied, product = measure("ceilings").values()
    assert copied.median > 0.01
    assert product.unit == "TFLOP/s"


def test_every_kernel_is_measured(monkeypatch):
    """None fails; how busy the machine is does not matter."""
    monkeypatch.setattr(Setting, "left", 1.0)
    figures = measure("kernels")
    assert len(figures) > 30
    for name, figure in figures.items():
        assert figure.values, (name, figure.note)
        assert min(figure.values) > 0
    for wanted in ("decode attention", "prefill attention", "product int4, 1 x", "rms_norm",
                   "sample_tokens, top_p", "LoRA", "experts"):  # fmt: skip
        assert any(name.startswith(wanted) for name in figures), wanted


@pytest.mark.parametrize(("part", "goal"), [("latency", 0.75), ("throughput", 0.7)])
def test_a_model_is_measured_beside_what_can_be(part, goal):
    """The last figure is a share, with the goal that it is to reach."""
    *_, figure = measure(part).values()
    assert figure.goal == goal
    assert figure.ratio is not None
    assert 0 < figure.ratio < 2
    assert figure.reached is (figure.ratio >= goal)


def test_the_start_is_measured_from_the_start_of_the_process(monkeypatch):
    monkeypatch.setattr(start, "_LEAST", 1)
    monkeypatch.setattr(start, "_MOST", 1)
    [figure] = measure("start").values()
    assert figure.limit
    assert figure.goal == 3.0
    assert figure.median > 0.3  # torch alone takes as long


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_mixed_lengths_are_measured_beside_transformers():
    static, ours, continuous = measure("mixed").values()
    assert ours.ratio_to == "x static"
    assert ours.goal == 5.0
    assert static.values
    assert continuous.values or continuous.note.startswith("failed")


def test_goals_are_said_to_be_reached_or_not():
    near = Figure(values=[4.0, 2.0, 3.0], ratio=0.7, ratio_to="of copy", goal=0.75, **LINE)
    assert near.cells()[2:5] == ["3.0 ms (2.0-4.0)", "70% of copy", "75%: NOT REACHED"]
    late = Figure(values=[2.5], goal=3.0, limit=True, **LINE)
    assert late.cells()[2:5] == ["2.5 ms", "", "3 ms: reached"]
    times = Figure(values=[2.5], ratio=6.0, ratio_to="x static", goal=5.0, **LINE)
    assert times.cells()[3:5] == ["6.00x static", "5x: reached"]
    assert Figure(values=[], note="cut", **LINE).cells()[2] == "-"


def test_sides_are_timed_in_turns():
    """One after the other, as often each."""
    order = []
    clock = Clock(torch.device("cpu"))
    times = clock.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0)
    assert order[4:8] == ["a", "b", "a", "b"]
    assert len(times["a"]) == len(times["b"]) >= 5


def test_the_table_goes_between_the_marks(tmp_path):
    """What stands around them stays; a file without them is an error."""
    results = runs.Results("Some GPU", {"torch": "2.13", "driver": "580"}, problems=["mixed: cut"])
    results.figures.append(Figure(values=[1.0], **LINE))
    text = section(results, ["rms_norm: right in 9 cases"])
    assert "**Some GPU**, torch 2.13, driver 580" in text
    assert "- rms_norm: right in 9 cases" in text
    assert "- mixed: cut" in text
    assert figures_table(results) in text
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        write_section(readme, text)
    assert readme.read_text(encoding="utf-8") == f"before\n{BEGIN}\n{text}\n{END}\nafter\n"
    readme.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the marks"):
        write_section(readme, text)


def test_the_readme_has_the_marks(repo_root):
    """Into which `make gpu-check` writes."""
    content = (repo_root / "kernels/README.md").read_text(encoding="utf-8")
    assert content.count(BEGIN) == content.count(END) == 1


def test_parts_that_take_too_long_are_ended(monkeypatch):
    """What they had told by then is kept, and the rest go on."""
    monkeypatch.setitem(runs.SECONDS, "ceilings", 0.05)
    said: list[str] = []
    started = time.monotonic()
    results = runs.run_parts([], device="cpu", tiny=True, tell=said.append)
    assert time.monotonic() - started < 30
    assert results.problems == ["ceilings: cut after 0 s; what it had measured is kept"]


def test_the_command_measures_and_writes(tmp_path):
    """Figures to standard output and into a file; the ceilings are always there."""
    file = tmp_path / "gpu.json"
    arguments = ["gpu", "--cpu", "--parts", "latency", "--time", "6", "--json", str(file)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "| part" in result.output
    document = json.loads(file.read_text(encoding="utf-8"))
    assert {each["part"] for each in document["figures"]} == {"ceilings", "latency"}
    assert document["versions"]["torch"] == torch.__version__


def test_the_command_refuses_what_it_does_not_know():
    result = CliRunner().invoke(cli.app, ["gpu", "--cpu", "--parts", "latencies"])
    assert result.exit_code == 2
    assert all(name in result.output for name in PARTS)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_the_command_says_that_there_is_no_gpu():
    result = CliRunner().invoke(cli.app, ["gpu"])
    assert result.exit_code == 2
    assert "torch finds no GPU" in result.output
