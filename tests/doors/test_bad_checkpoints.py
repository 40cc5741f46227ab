"""A model that cannot be served: one clear error from `LLM`, and everybody else goes on."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.errors import ModelLoadError, QuireError, TokenizerError, UnsupportedModelError

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(scope="module")
def good(tiny_llama):
    with LLM(tiny_llama, dtype="float32") as llm:
        yield llm


def configure(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def without_config(folder):
    (folder / "config.json").unlink()


def with_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def of_an_unknown_architecture(folder):
    configure(folder, architectures=["NobodysForCausalLM"], model_type="nobodys")


def with_a_tokenizer_too_large(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({"id": 304, "content": "<|no|>", "special": True, **special})
    content["model"]["vocab"]["<|no|>"] = 304
    file.write_text(json.dumps(content))


def without_a_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without_config, ModelLoadError, r"has no config\.json"),
        (with_truncated_weights, ModelLoadError, r"model\.safetensors.*truncated"),
        (of_an_unknown_architecture, UnsupportedModelError, "NobodysForCausalLM.*LlamaForCausalLM"),
        (with_a_tokenizer_too_large, TokenizerError, "304"),
        (without_a_tokenizer, TokenizerError, r"tokenizer\.json"),
    ],
)
def test_a_bad_checkpoint_is_one_clear_error(spoil, error, message, folder, good):
    """Mended, the same folder loads; an engine that runs beside it notices nothing."""
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        LLM(folder, dtype="float32")
    assert isinstance(caught.value, QuireError)
    expected = good.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    shutil.rmtree(folder)
    shutil.copytree(good.config.model.model, folder)
    with LLM(folder, dtype="float32") as llm:
        [output] = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == list(expected)


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_a_checkpoint_is_never_run(trust, folder, tmp_path):
    """A supported model that brings code of its own is served by quire's; another is refused."""
    trace = tmp_path / "executed"
    code = f"open({str(trace)!r}, 'w').close()\n"
    names = ("configuration_mine", "modeling_mine", "tokenization_mine")
    for name in names:
        (folder / f"{name}.py").write_text(code)
    classes = {"AutoConfig": f"{names[0]}.Mine", "AutoModelForCausalLM": f"{names[1]}.Mine"}
    configure(folder, auto_map=classes)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [f"{names[2]}.Mine", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with LLM(folder, dtype="float32", trust_remote_code=trust) as llm:
        [output] = llm.generate("hello", GREEDY, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 4
    of_an_unknown_architecture(folder)
    with pytest.raises(UnsupportedModelError, match="NobodysForCausalLM"):
        LLM(folder, dtype="float32", trust_remote_code=trust)
    assert not trace.exists()


@pytest.mark.parametrize("native", [True, False])
def test_the_start_line_says_what_a_float32_checkpoint_is_loaded_as(
    native, folder, monkeypatch, caplog
):
    """bfloat16 where the CPU computes in it, by default; and the line names both."""
    monkeypatch.setattr("quire.models.hf_config.cpu_has_bfloat16", lambda: native)
    with caplog.at_level(logging.INFO, "quire"), LLM(folder) as llm:
        assert llm.generate("hello", GREEDY, use_tqdm=False)[0].finished
    [line] = [each.getMessage() for each in caplog.records if "KV cache" in each.getMessage()]
    wanted = "bfloat16 (stored as float32) on cpu" if native else ": float32 on cpu"
    assert wanted in line
