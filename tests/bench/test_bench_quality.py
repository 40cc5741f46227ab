"""`quire bench quality`: perplexity as defined, on texts that were not trained on."""

from __future__ import annotations

import json
import math
from itertools import islice

import pytest
import torch
from typer.testing import CliRunner

from quire import LLM
from quire.bench import cli, quality
from quire.bench.quality import Quality
from quire.demo import model_path, perplexity
from quire.demo.samples import Sample
from quire.demo.text import training_samples


def test_no_held_out_text_was_trained_on(monkeypatch):
    """What the training's seed draws, too, is left out; as many are left as are asked for."""
    monkeypatch.setattr(perplexity, "_TRAINED_ON", 3000)
    trained = {sample.text for sample in islice(training_samples(0), 3000)}
    fresh = perplexity.held_out_samples(200)
    assert len(fresh) == 200
    assert not trained & {sample.text for sample in fresh}
    assert fresh == perplexity.held_out_samples(200)


def test_perplexity_is_that_of_transformers_on_the_learned_tokens():
    """The tokens that were to be learned, after all before them; the first of a text has none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    samples = [*islice(training_samples(7), 6), Sample((("It rains.", True),))]
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    losses = []
    for sample in samples:
        parts = [
            (tokenizer.encode(text, add_special_tokens=False), learned)
            for text, learned in sample.parts
        ]
        ids = torch.tensor([[id_ for part, _ in parts for id_ in part]])
        learned = [is_learned for part, is_learned in parts for _ in part]
        with torch.inference_mode():
            logprobs = model(ids).logits[0].log_softmax(-1)
        losses += [-logprobs[i - 1, ids[0, i]] for i in range(1, len(learned)) if learned[i]]
    want = math.exp(sum(losses) / len(losses))
    with LLM("quire/demo", dtype="float32", max_num_seqs=8, max_model_len=1024) as llm:
        assert perplexity.perplexity(llm, samples) == pytest.approx(want, rel=1e-4)


def test_the_table_is_beside_the_first_row():
    """Perplexity as a share more or less, answers as a share of what was asked."""
    done = [Quality("plain", 1.25, {"a": 5, "b": 3}), Quality("int4", 1.275, {"a": 4, "b": 2})]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in quality.table(done, 10).splitlines()
    ]
    assert rows[0] == ["weights", "perplexity", "vs plain", "right of 10", "accuracy"]
    assert rows[2] == ["plain", "1.2500", "+0.00%", "8", "80.0%"]
    assert rows[3] == ["int4", "1.2750", "+2.00%", "6", "60.0%"]


def test_every_format_is_measured_on_the_same(monkeypatch, tmp_path):
    """Arguments are the format's own, with prompts where it is calibrated."""
    monkeypatch.setattr(quality, "held_out_samples", lambda count: [count])
    asked = []

    def fake(name, model, options, samples, sets):
        asked.append((name, model, options, samples, {key: len(q) for key, q in sets.items()}))
        return Quality(name, 2.0, {"a": 1})

    monkeypatch.setattr(quality, "measure", fake)
    file = tmp_path / "figures.json"
    words = ["quality", "--formats", "plain,int4-calibrated,kv-int8", "--texts", "7"]
    result = CliRunner().invoke(cli.app, [*words, "--questions", "2", "--json", str(file)])
    assert result.exit_code == 0, result.output
    plain, calibrated, cached = asked
    assert plain[2] == {}
    assert cached[2] == {"kv_cache_dtype": "int8"}
    prompts = calibrated[2]["quantization_config"]["calibration"]
    assert len(prompts) == quality._CALIBRATING
    assert all(isinstance(prompt, str) for prompt in prompts)
    assert quality.OPTIONS["int4-calibrated"]["quantization_config"]["calibration"] == []
    assert plain[3:] == calibrated[3:] == cached[3:]
    assert set(plain[4].values()) == {2}
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["formats"]["kv-int8"] == {"perplexity": 2.0, "right": {"a": 1}}


@pytest.mark.parametrize("text", ["int3", ","])
def test_an_unknown_format_is_an_error_of_usage(monkeypatch, text):
    """Before texts are drawn."""
    monkeypatch.setattr(quality, "held_out_samples", None)
    result = CliRunner().invoke(cli.app, ["quality", "--formats", text])
    assert result.exit_code == 2
    assert text in result.output
