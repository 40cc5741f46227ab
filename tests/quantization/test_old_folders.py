"""Folders of older tools: weights in files of other names, configurations beside config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quire.errors import ModelLoadError
from quire.models.checkpoint import open_file, weight_files
from quire.quantization.beside import FILES, with_method


def test_a_single_file_of_another_name_has_the_weights(tmp_path: Path) -> None:
    """As AutoGPTQ and SqueezeLLM named them; safetensors are preferred, the usual names too."""
    torch.save({"a": torch.ones(2)}, tmp_path / "sq-model-w4-s0.pt")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    assert [each.name for each in weight_files(tmp_path)] == ["sq-model-w4-s0.pt"]
    save_file({"a": torch.ones(2)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert [each.name for each in weight_files(tmp_path)] == ["gptq_model-4bit-128g.safetensors"]
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert [each.name for each in weight_files(tmp_path)] == ["model.safetensors"]


def test_of_several_files_of_other_names_none_is_guessed(tmp_path: Path) -> None:
    """The message names them."""
    for name in ("one.pt", "two.pt"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ModelLoadError, match=r"no usual name: one\.pt, two\.pt"):
        weight_files(tmp_path)


def test_files_that_have_no_weights_are_not_taken_for_some(tmp_path: Path) -> None:
    """An adapter's and a trainer's."""
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    torch.save({}, tmp_path / "scheduler.pt")
    with pytest.raises(ModelLoadError, match="has no weights"):
        weight_files(tmp_path)


def test_counts_of_sparse_parts_are_no_tensors(tmp_path: Path) -> None:
    """SqueezeLLM's files have them between; anything else that is no tensor is refused."""
    path = tmp_path / "sq-model-w4-s45.pt"
    counts = {"sparse_threshold.model.layers.0.self_attn.q_proj": 12}
    torch.save({"a": torch.ones(2), **counts}, path)
    with open_file(path) as file:
        assert file.names() == ["a"]
    torch.save({"a": torch.ones(2), "sparse_threshold.b": "12"}, path)
    with pytest.raises(ModelLoadError, match="not a dictionary of tensors"):
        open_file(path)
    torch.save({"a": torch.ones(2), "b": 12}, path)
    with pytest.raises(ModelLoadError, match="not a dictionary of tensors"):
        open_file(path)


@pytest.mark.parametrize(
    ("file", "config", "method"),
    [
        (FILES[0], {"bits": 4, "group_size": 128, "desc_act": True}, "gptq"),
        (FILES[0], {"bits": 4, "group_size": 128, "quant_method": "awq"}, "awq"),
        (FILES[1], {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "awq"),
        (FILES[1], {"wbits": 3}, "squeezellm"),
        (FILES[1], {"bits": 4}, None),
        (FILES[0], {}, None),
        (FILES[0], {"quant_method": 4}, None),
    ],
)
def test_what_a_configuration_beside_means(
    file: str, config: dict[str, Any], method: str | None
) -> None:
    """By its fields, where it does not say so."""
    found = with_method(file, config)
    assert found == (None if method is None else {**config, "quant_method": method})
