"""config.json and generation_config.json: what is read from them, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ConfigError, ModelLoadError
from quire.models import hf_config
from quire.models.hf_config import (
    cpu_has_bfloat16,
    eos_token_ids,
    max_length,
    read_config,
    read_generation_config,
    resolve_dtype,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_reading_needs_neither_torch_nor_transformers() -> None:
    """The module is light: what only wants a configuration pays for nothing else."""
    code = (
        "import sys; import quire.models.hf_config, quire.models.hub; "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_a_folder_without_config_is_an_error(tmp_path: Path) -> None:
    """The message says what is missing where."""
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xff", "not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b'{"rope_scaling": 2}', "rope_scaling"),
    ],
)
def test_a_damaged_config_is_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    """Whatever lies in config.json, the error names the file or the field."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        read_config(tmp_path)


def test_overrides_replace_single_fields(tmp_path: Path) -> None:
    """hf_overrides reach into nested settings and leave the rest."""
    config = {"a": 1, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_config(tmp_path, {"a": 2, "rope_scaling": {"factor": 4.0}})
    assert read["a"] == 2
    assert read["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 5.0}


def test_the_text_part_of_a_multimodal_config_is_read(tmp_path: Path) -> None:
    """text_config's values win, under the outer architecture."""
    config = {
        "architectures": ["Outer"],
        "vocab_size": 1,
        "eos_token_id": 7,
        "text_config": {"vocab_size": 2, "architectures": ["Inner"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_config(tmp_path)
    assert (read["architectures"], read["vocab_size"]) == (["Outer"], 2)
    assert read["eos_token_id"] == 7
    assert "text_config" not in read


def test_generation_config_may_be_absent(tmp_path: Path) -> None:
    """No file means no settings; the folder and the file itself are both understood."""
    assert read_generation_config(tmp_path) == {}
    assert read_generation_config(tmp_path / "none") == {}
    (tmp_path / "generation_config.json").write_text('{"top_k": 5}')
    assert read_generation_config(tmp_path) == {"top_k": 5}
    assert read_generation_config(tmp_path / "generation_config.json") == {"top_k": 5}


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, ()),
        ({"eos_token_id": 3}, {}, (3,)),
        ({"eos_token_id": 3}, {"eos_token_id": [5, 4]}, (5, 4)),
        ({"eos_token_id": [0]}, {"eos_token_id": None}, (0,)),
    ],
)
def test_eos_comes_from_the_generation_config_first(
    config: dict[str, Any], generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    """One id or several, generation_config.json's before config.json's."""
    assert eos_token_ids(config, generation) == expected


@pytest.mark.parametrize("value", ["2", -1, [1, "2"], True, 1.0])
def test_an_eos_that_is_no_token_is_refused(value: Any) -> None:
    """A wrong end-of-text token would run on to max_tokens, so it is an error."""
    with pytest.raises(ModelLoadError, match="eos_token_id"):
        eos_token_ids({"eos_token_id": value})


@pytest.mark.parametrize(
    ("config", "requested", "device", "native", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "auto", CPU, False, torch.bfloat16),
        ({"dtype": "float16"}, "auto", CPU, True, torch.float16),
        ({"dtype": "float32"}, "auto", CPU, False, torch.float32),
        ({"dtype": "float32"}, "auto", CPU, True, torch.bfloat16),
        ({"dtype": "float32"}, "auto", GPU, True, torch.float16),
        ({}, "auto", CPU, False, torch.float32),
        ({"dtype": "bfloat16"}, "half", CPU, False, torch.float16),
        ({"dtype": "float32"}, "float", GPU, False, torch.float32),
        ({"dtype": "nonsense"}, torch.bfloat16, CPU, False, torch.bfloat16),
    ],
)
def test_dtype_follows_the_request_then_the_config(
    config: dict[str, Any],
    requested: Any,
    device: torch.device,
    native: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """float32 checkpoints alone become smaller by themselves, where the device likes that."""
    monkeypatch.setattr(hf_config, "cpu_has_bfloat16", lambda: native)
    assert resolve_dtype(config, requested, device) is expected


def test_unknown_dtypes_are_named() -> None:
    """The argument's fault and the checkpoint's fault are told apart."""
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        resolve_dtype({}, "int8", CPU)
    with pytest.raises(ModelLoadError, match=r"dtype in config\.json is 'float8_e4m3fn'"):
        resolve_dtype({"torch_dtype": "float8_e4m3fn"}, "auto", CPU)


@pytest.mark.parametrize(
    ("machine", "line", "expected"),
    [
        ("x86_64", "flags\t\t: fpu avx2 avx512_bf16", True),
        ("x86_64", "flags\t\t: fpu amx_bf16", True),
        ("x86_64", "flags\t\t: fpu avx2 avx512f bf16", False),
        ("aarch64", "Features\t: fp asimd bf16 i8mm", True),
        ("aarch64", "Features\t: fp asimd", False),
        ("x86_64", "", False),
    ],
)
def test_native_bfloat16_is_read_from_the_cpu_flags(
    machine: str, line: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only flags of bfloat16 matrix products count."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{line}\n")
    assert cpu_has_bfloat16(tmp_path / "cpuinfo") is expected
    assert cpu_has_bfloat16(tmp_path / "none") is False


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 100, "rope_parameters": {"rope_type": kind, **values}}


@pytest.mark.parametrize(
    ("config", "wanted", "expected"),
    [
        ({"max_position_embeddings": 100}, None, 100),
        ({"n_positions": 50}, 1000, 50),
        ({"max_seq_len": 60}, None, 60),
        ({}, None, 2048),
        (rope("linear", factor=4.0), None, 400),
        (rope("linear", factor=4.0, original_max_position_embeddings=25), None, 100),
        (rope("yarn", factor=4.0, original_max_position_embeddings=50), None, 200),
        (rope("llama3", factor=8.0, original_max_position_embeddings=50), 1000, 100),
        (rope("longrope", original_max_position_embeddings=10), None, 100),
        (rope("dynamic", factor=3.0), None, 100),
        (rope("dynamic", factor=3.0), 250, 250),
        (rope("dynamic", factor=3.0), 900, 300),
    ],
)
def test_length_of_a_model(config: dict[str, Any], wanted: int | None, expected: int) -> None:
    """The configuration's own length, stretched as its rotary scaling says."""
    assert max_length(config, wanted) == expected


@given(st.one_of(st.text(), st.floats(), st.integers(max_value=0), st.booleans()))
def test_a_length_that_is_none_is_refused(value: Any) -> None:
    """Nothing but a positive integer passes for a length."""
    with pytest.raises(ModelLoadError, match="max_position_embeddings"):
        max_length({"max_position_embeddings": value})
