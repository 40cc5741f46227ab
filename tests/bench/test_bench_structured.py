"""The structured benchmark measures what matches, on a vocabulary that is whole, side by side."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from quire.bench import cases, cli, masks, structured_tables, tokens
from quire.bench.constrained import (
    measure_canonical,
    measure_steps,
    measure_throughput,
)
from quire.bench.contest import Measurement
from quire.bench.masks import Library, measure_masks, percentile
from quire.bench.workload import Workload
from quire.errors import InvalidRequestError
from quire.structured import backends
from quire.structured.closed_schema import why_open
from quire.structured.vocabulary import Vocabulary
from quire.tokenizer.loader import load_tokenizer

CASES = {case.name: case for case in cases.CASES}


@pytest.fixture
def vocabulary(tiny_llama):
    return Vocabulary(load_tokenizer(tiny_llama), 304)


@pytest.fixture
def tokenize(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture
def alone(monkeypatch):
    """No library but the default one, which compiles in no time, and caches as they are."""
    monkeypatch.setattr(masks, "BACKENDS", ("llguidance",))
    monkeypatch.setattr(masks, "_MEMORY_BYTES", 1 << 10)


@pytest.mark.parametrize("learned", [True, False])
def test_a_made_vocabulary_is_whole(tmp_path, monkeypatch, learned):
    """As many different tokens as asked for, reached by merges; any text comes back."""
    if not learned:  # then all is filled up
        monkeypatch.setattr(tokens, "_texts", lambda most: ["a b"])
    size, end_id = 1500, 7
    files = []
    for name in ("one", "other"):
        monkeypatch.setenv("QUIRE_BENCH_DIR", str(tmp_path / name))
        folder = tokens.make_tokenizer(size, end_id)
        files.append((folder / "tokenizer.json").read_bytes())
        assert tokens.make_tokenizer(size, end_id) == folder, "made once"
    assert files[0] == files[1], "the same each time"
    tokenizer = load_tokenizer(folder, model_config={"vocab_size": size})
    assert len(tokenizer) == size
    assert tokenizer.eos_token_id == end_id
    made = Vocabulary(tokenizer, size).tokens[:size]
    assert made[end_id] == b""
    assert len(set(made)) == size
    assert {bytes([byte]) for byte in range(256)} <= set(made)
    for text in ('{"name": "Zoë", "n": 12}', "東京 Привет 😀\n\n\tx"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(CASES)))
def test_the_texts_of_a_case_match_it(seed, name):
    """By jsonschema, by re, by the list."""
    case = CASES[name]
    text = case.draw(random.Random(seed))
    [(kind, wanted)] = case.constraint.items()
    if kind == "json":
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.validate(json.loads(text), wanted, format_checker=checker)
    elif kind == "json_object":
        assert isinstance(json.loads(text), dict)
    elif kind == "regex":
        assert re.fullmatch(wanted, text)
    elif kind == "choice":
        assert text in wanted
    else:
        assert kind == "grammar"  # the next test's


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_drawn_schemas_are_such_as_every_library_takes(seed):
    """Schemas of the draft, in keywords that none of them passes over; a seed gives the same."""
    drawn = cases.draw_schemas(5, seed)
    assert drawn[0].constraint == cases.draw_schemas(1, seed)[0].constraint
    for case in drawn:
        jsonschema.Draft202012Validator.check_schema(case.constraint["json"])
        assert why_open(case.constraint["json"]) is None


def test_each_row_and_token_of_a_run_is_a_figure(vocabulary, tokenize, alone):
    """Every case is walked to its end by the default library, which refuses no text."""
    said = []
    [library] = measure_masks(
        vocabulary,
        tokenize,
        cases.CASES,
        cases.draw_schemas(2, 0),
        batch=10,
        steps=300,
        repeats=2,
        seed=0,
        say=said.append,
    )
    assert len(said) == 2
    assert library.refused == {}
    assert library.num_refused == 0
    assert library.num_texts > 20
    assert set(library.mask_seconds) == set(CASES)
    for index, name in enumerate(CASES):
        rows = 2 if index < 2 else 1
        assert [len(run) for run in library.mask_seconds[name]] == [300 * rows] * 2
        assert [len(run) for run in library.accept_seconds[name]] == [300 * rows] * 2
        assert len(library.compile_seconds[name]) == 2
    assert len(library.compile_seconds) == len(CASES) + 2
    document = library.document()
    assert document["texts"] == library.num_texts
    assert document["mask_seconds"]["json_object"]["p50"] == library.mask_percentiles(
        50, ["json_object"]
    )
    table = structured_tables.masks_table([library])
    assert f"{len(CASES) + 2} of {len(CASES) + 2}" in table
    for name in CASES:
        assert name in structured_tables.cases_table([library])


class Refusing:
    """A library that takes one case, and none of its tokens."""

    def __init__(self):
        self.asked = []

    def compile(self, spec):
        self.asked.append(spec.kind)
        if spec.kind != "choice":
            raise InvalidRequestError("not today")
        return self

    def start(self):
        return self

    def fill_mask(self, row):
        row.fill(0)


def test_what_a_library_refuses_is_counted_and_not_measured(vocabulary, tokenize, monkeypatch):
    """A missing one by name, a constraint with its reason and once, a text that matches."""
    refusing = Refusing()

    def load(name, vocabulary, deadline):
        if name == "xgrammar":
            raise InvalidRequestError("no such package")
        return refusing

    monkeypatch.setattr(backends, "load_constraint_backend", load)
    monkeypatch.setattr(masks, "BACKENDS", ("llguidance", "xgrammar"))
    wanted = [CASES["choice: countries"], CASES["json_object"]]
    found = measure_masks(
        vocabulary, tokenize, wanted, [], batch=4, steps=3, repeats=2, seed=0, say=str
    )
    library, missing = found
    assert missing.document() == {"missing": missing.why_missing}
    assert missing.why_missing == "not installed"
    assert library.refused == {"json_object": "not today"}
    assert refusing.asked == ["choice", "json_object", "choice"]
    assert [len(run) for run in library.mask_seconds["choice: countries"]] == [6, 6]
    assert library.num_refused == 12
    table = structured_tables.masks_table(found)
    assert "not installed" in table
    assert "1 of 2" in table


@given(values=st.lists(st.floats(0, 1), min_size=1), percent=st.floats(0, 100))
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(values, percent):
    """And no smaller value is."""
    found = percentile(values, percent)
    assert found in values
    assert np.mean(np.array(values) <= found) >= min(percent / 100, 1)


def test_percentiles_of_some_cases_are_of_their_rows_together():
    """Run by run, whatever the number of rows of each case."""
    library = Library("x", mask_seconds={"a": [[1.0], [5.0]], "b": [[2.0, 3.0], [6.0, 7.0]]})
    assert library.mask_percentiles(50) == [2.0, 6.0]
    assert library.mask_percentiles(99, ["a"]) == [1.0, 5.0]


def test_constrained_and_free_generate_as_many_tokens(tiny_llama):
    """Each mode has a figure of every run but the first, on the same engine."""
    work = Workload("w", [[5, 6, 7], [8, 9]], [40, 30])
    done = measure_throughput(tiny_llama, {"dtype": "float32"}, work, repeats=2, say=str)
    assert [each.label for each in done] == ["unconstrained", "any text", "JSON lines"]
    for each in done:
        assert each.runs["tokens"] == [70.0, 70.0]
        assert min(each.runs["seconds"]) > 0
    assert "1.000 (1.000-1.000)" in structured_tables.rates_table(done)


def test_forced_tokens_save_steps_and_change_nothing():
    """The measurement fails if an output differs; each record counts on both sides."""
    done = measure_steps("quire/demo", {"dtype": "float32"}, num_records=2, say=str)
    for without, with_ in done.values():
        assert with_.runs["tokens"] == without.runs["tokens"]
        assert sum(with_.runs["steps"]) < sum(without.runs["steps"])
        assert len(with_.runs["steps"]) == 2


def test_canonical_records_are_finished():
    """Three modes on the same prompts, in fewer steps the less the model is asked."""
    options = {"dtype": "float32", "max_model_len": 1024}
    done = measure_canonical(Path("quire/demo"), options, [[5, 6], [7]], repeats=1, say=str)
    assert [each.label for each in done] == ["no forced tokens", "exact", "canonical"]
    steps = [each.median("steps") for each in done]
    assert steps[0] > steps[1] >= steps[2]


def test_savings_are_of_all_records_together():
    """A kind's line has its own steps; the last line the sums."""
    sides = [
        Measurement("off", {"steps": [10.0, 30.0], "tokens": [10.0, 30.0]}),
        Measurement("on", {"steps": [5.0, 5.0], "tokens": [10.0, 30.0]}),
    ]
    lines = structured_tables.steps_table({"a": sides, "b": sides}).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        *("a", "2", "40", "40", "10", "75.0%")
    ]
    assert [cell.strip() for cell in lines[4].strip("|").split("|")] == [
        *("all", "4", "80", "80", "20", "75.0%")
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--parts mask", ["--parts", "'mask'", "throughput"]),
        ("--dtype int8", ["--dtype", "'int8'", "bfloat16"]),
        ("--random zzz", ["--random", "'zzz'", "llama-small"]),
        ("--json /proc/none.json", ["/proc/none.json", "no file can be written"]),
    ],
)
def test_a_wrong_option_of_structured_is_named(monkeypatch, arguments, named):
    """With its value and what would be right."""
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(cli.app, ["structured", *arguments.split()])
    assert result.exit_code == 2, result.output
    for text in named:
        assert text in result.output


def test_the_command_writes_every_part_that_it_was_asked_for(tiny_llama, tmp_path, alone):
    """With the machine and the versions; a tokenizer comes from the model."""
    file = tmp_path / "figures.json"
    arguments = ["structured", "--quick", "--model", tiny_llama, "--dtype", "float32"]
    arguments += ["--parts", "throughput, masks", "--output-len", "8", "--json", file]
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text(encoding="utf-8"))
    assert set(document) == {"model", "machine", "versions", "masks", "throughput"}
    assert set(document["masks"]) == {"llguidance"}
    assert document["throughput"]["JSON lines"]["tokens"] == [4 * 8]
    assert "tokens, 8 rows, 16 tokens of each" in result.output
