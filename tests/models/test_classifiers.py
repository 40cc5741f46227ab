"""Models with a head for classes: as transformers computes them; they generate nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import quire
from quire import LLM

FAMILIES = [
    "llama",
    "qwen2-tied",
    "qwen3",
    "gpt2",
    "mistral",
    "opt",
    "gpt-neox",
    "gemma2",
    "mixtral",
]


def write_classifier(folder: Path, name: str, **changes: Any) -> Any:
    """Write a tiny random classifier; return it."""
    import torch
    import transformers
    from checkpoints import CONFIGS, build_config, write_tokenizer

    if name not in CONFIGS:
        pytest.skip(f"there is no tiny checkpoint {name!r}")
    config = build_config(name)
    config.num_labels = changes.pop("num_labels", 3)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.mul_(20)
    model.eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_agrees_on_logits_and_probabilities(name: str, tmp_path: Path) -> None:
    import torch

    model = write_classifier(tmp_path, name)
    prompts = [[5, 6, 7, 8, 9, 11], [20, 31], [50] * 20]
    with LLM(str(tmp_path), dtype="float32", num_gpu_blocks_override=60) as llm:
        assert llm.num_classes == 3
        raw = llm.classify(prompts, activates=False, use_tqdm=False)
        probs = llm.classify(prompts, use_tqdm=False)
    for ids, one, other in zip(prompts, raw, probs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        assert one.outputs.probs == pytest.approx(logits.tolist(), rel=1e-3, abs=1e-4)
        assert other.outputs.probs == pytest.approx(logits.softmax(0).tolist(), abs=1e-4)
        assert other.outputs.num_classes == 3
        assert other.prompt_token_ids == ids


def test_one_class_is_a_score_of_a_pair(tmp_path: Path) -> None:
    model = write_classifier(tmp_path, "llama", num_labels=1)
    import torch

    with LLM(str(tmp_path), dtype="float32", num_gpu_blocks_override=60) as llm:
        pairs = [("the quick", "brown fox"), ("hello", "world")]
        found = llm.score(pairs, use_tqdm=False)
        tokenizer = llm.get_tokenizer()
        for (first, second), each in zip(pairs, found, strict=True):
            assert each.prompt_token_ids == tokenizer.encode(first) + tokenizer.encode(second)
            with torch.no_grad():
                logit = model(torch.tensor([each.prompt_token_ids])).logits[0, 0]
            assert each.outputs.score == pytest.approx(logit.sigmoid().item(), abs=1e-4)
        with pytest.raises(quire.InvalidRequestError, match="generates no text"):
            llm.generate("x")
        with pytest.raises(quire.InvalidRequestError, match="pair 0"):
            llm.score([("x", 5)])  # type: ignore[list-item]
        assert len(llm.embed("the quick", use_tqdm=False)[0].outputs.embedding) == 64


def test_classes_that_do_not_exclude_each_other(tmp_path: Path) -> None:
    write_classifier(tmp_path, "llama", problem_type="multi_label_classification")
    with LLM(str(tmp_path), dtype="float32", num_gpu_blocks_override=60) as llm:
        [raw] = llm.classify("the", activates=False, use_tqdm=False)
        [probs] = llm.classify("the", use_tqdm=False)
        import math

        expected = [1 / (1 + math.exp(-number)) for number in raw.outputs.probs]
        assert probs.outputs.probs == pytest.approx(expected, abs=1e-6)
        with pytest.raises(quire.NotSupportedError, match="3 classes"):
            llm.score([("a", "b")])


def test_a_missing_head_says_so(tmp_path: Path, tiny_llama: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    with LLM(str(folder), dtype="float32", num_gpu_blocks_override=60) as llm:
        assert llm.num_classes is None
        with pytest.raises(quire.NotSupportedError, match="no head for classes"):
            llm.classify("x")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    with (
        LLM(str(folder), dtype="float32", num_gpu_blocks_override=60) as llm,
        pytest.raises(quire.ModelLoadError, match=r"score\.weight"),
    ):
        llm.classify("x")
