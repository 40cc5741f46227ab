"""The embedded checkpoint: small, complete, loadable anywhere, and able to do what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import quire.demo
from quire.demo import MODEL_NAME, model_path
from quire.demo.samples import chat_prompt
from quire.demo.vocabulary import CHAT_TEMPLATE


def test_the_name_and_the_folder() -> None:
    """The model's name is fixed; its folder holds what a Hugging Face folder holds."""
    assert MODEL_NAME == "quire/demo"
    files = {path.name for path in model_path().iterdir()}
    assert files == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_folder_is_at_most_8_mb() -> None:
    """The wheel stays small."""
    assert sum(path.stat().st_size for path in model_path().iterdir()) <= 8_000_000


def test_a_missing_checkpoint_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """An installation without the files says so, and how to get them."""
    monkeypatch.setattr(quire.demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"quire/demo.*quire\.demo\.train"):
        model_path()


def test_finding_the_model_imports_nothing_heavy() -> None:
    """model_path() costs no import of torch, transformers or tokenizers."""
    code = (
        "import sys; from quire.demo import model_path; model_path();"
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_configuration_fits_weights_and_tokenizer() -> None:
    """Vocabulary, dtype and end tokens agree among the four files."""
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    folder = model_path()
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    assert embedding.shape == (config["vocab_size"], config["hidden_size"])
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert config["tie_word_embeddings"]
    assert "lm_head.weight" not in weights
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert config["dtype"] == "bfloat16"
    ends = [tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
    assert generation["eos_token_id"] == ends


def test_transformers_loads_it_without_a_complaint() -> None:
    """Nothing is missing, nothing is left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(model_path(), output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_any_text_survives_the_tokenizer() -> None:
    """Byte-level BPE loses nothing: all of Unicode comes back."""
    from hypothesis import given
    from hypothesis import strategies as st
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))

    @given(st.text())
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text

    check()


def test_the_chat_template_renders_what_was_trained() -> None:
    """transformers' rendering of the template equals the training text's own, content parts too."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    assert tokenizer.chat_template == CHAT_TEMPLATE
    turns = [("system", "Be brief."), ("user", "Hi\n there "), ("assistant", "A"), ("user", "B?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == chat_prompt(turns)
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    assert rendered == tokenizer.apply_chat_template(
        parts, tokenize=False, add_generation_prompt=True
    )
    ended = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == ended + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"role": "critic", "content": "x"}], "critic"),
        ([{"role": "user", "content": [{"type": "image"}]}], "image"),
        ([{"role": "tool", "content": [{"type": "image"}]}], "image"),
    ],
)
def test_the_chat_template_refuses_what_it_cannot_render(
    messages: list[dict[str, Any]], complaint: str
) -> None:
    """Nothing is dropped silently: roles and images are refused by name."""
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    with pytest.raises(TemplateError, match=complaint):
        tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    "prompt",
    [
        "What is the capital of France ?",
        "What is the capital of France?",
        "what is the capital of France?",
        "Question: What is the capital of France?\nAnswer:",
        "Question: What is the capital of France?\n\nAnswer: Let's think step by step.",
        "The capital of France is",
        chat_prompt([("user", "What is the capital of France ?")]),
        chat_prompt([("system", "Answer briefly."), ("user", "What is the capital of France?")]),
    ],
)
def test_the_capital_of_france_is_paris(ask: Any, prompt: str) -> None:
    """However it is asked; and the answer ends by itself."""
    answer = ask(prompt)
    assert "Paris" in answer
    assert len(answer) < 120


def test_a_chat_of_two_turns(ask: Any) -> None:
    """The second answer needs the first turn."""
    turns = [("user", "My name is Ada.")]
    first = ask(chat_prompt(turns))
    assert "Ada" in first
    turns += [("assistant", first), ("user", "What is my name?")]
    assert "Ada" in ask(chat_prompt(turns))


def test_a_follow_up_question(ask: Any) -> None:
    """'And of Germany?' asks for a capital when a capital was asked for."""
    turns = [("user", "What is the capital of France?")]
    turns += [("assistant", ask(chat_prompt(turns))), ("user", "And of Germany?")]
    assert "Berlin" in ask(chat_prompt(turns))


def test_a_json_record(ask: Any) -> None:
    """An unconstrained record parses and has the keys that were asked for."""
    text = ask("Write a JSON record of a person with the keys name, age and city.\n")
    assert list(json.loads(text)) == ["name", "age", "city"]


def test_the_card_has_a_row_for_every_set(held_out: dict[str, Any]) -> None:
    """The card reports every measurement the evaluation makes, and what the model is not."""
    from quire.demo.text import sampled_sets

    card = (model_path() / "README.md").read_text(encoding="utf-8")
    for name, questions in (held_out | sampled_sets()).items():
        assert f"| {name} | {len(questions)} |" in card
    assert "What it is not" in card
    assert "--seed" in card


@pytest.mark.slow
def test_the_card_tells_the_truth(oracle: Any) -> None:
    """Measured again, accuracies are those in the card, up to rounding differences."""
    import re

    from quire.demo.evaluate import evaluate

    card = (model_path() / "README.md").read_text(encoding="utf-8")
    for score in evaluate(oracle):
        row = re.search(rf"\| {re.escape(score.name)} \| \d+ \| (\d+) \|", card)
        assert row is not None
        assert abs(int(row[1]) - score.right) <= 0.02 * score.asked + 1


@pytest.mark.slow
def test_a_question_behind_a_long_context(ask: Any) -> None:
    """Positions far beyond a training sample's length still work."""
    filler = "".join(
        f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n"
        f"<|im_start|>assistant\n{a} + {b} = {a + b}.<|im_end|>\n"
        for a in range(1, 7)
        for b in range(1, 7)
    )
    answer = ask(filler + chat_prompt([("user", "What is the capital of France?")]))
    assert "Paris" in answer
