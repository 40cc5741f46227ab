"""Folders that are no adapter for the model: each is refused, with a message that says why."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import plain_files, read, write_files

from quire.errors import AdapterError
from quire.lora.place import folder_of

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]

MODULES = {
    f"model.layers.{i}.self_attn.{name}": (rows, 64)
    for i in range(2)
    for name, rows in (("q_proj", 64), ("v_proj", 32))
}
Q = "base_model.model.model.layers.0.self_attn.q_proj"
V = "base_model.model.model.layers.1.self_attn.v_proj"
EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
MERGE = "merge_and_unload"


def _refuses(folder: Path, model: Path, *expected: str, **options: Any) -> None:
    with pytest.raises(AdapterError) as caught:
        read(model, folder, **options)
    for text in expected:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("peft_type", "LOHA", ["'LOHA'", "'LORA'", MERGE]),
        ("peft_type", None, ["peft_type", "None"]),
        ("peft_type", 3, ["peft_type", "3"]),
        ("r", 0, ["r in", "is 0", "from 1 up"]),
        ("r", "8", ["r in", "'8'"]),
        ("r", True, ["r in", "True"]),
        ("r", 5, ["q_proj.lora_A.weight", "[4, 64]", "rank of 4", "says 5"]),
        ("r", 10**30, ["r in"]),
        ("lora_alpha", "x", ["lora_alpha", "'x'", "number"]),
        ("lora_alpha", float("nan"), ["lora_alpha", "nan"]),
        ("lora_alpha", 1e40, ["lora_alpha", "too large"]),
        ("use_rslora", 1, ["use_rslora", "true or false"]),
        ("use_dora", "yes", ["use_dora", "'yes'"]),
        ("use_dora", True, ["use_dora", "is true", "q_proj"]),
        ("lora_bias", True, ["lora_bias", "is true", "q_proj"]),
        ("bias", "some", ["bias", "'some'", "lora_only"]),
        ("rank_pattern", [1], ["rank_pattern", "[1]"]),
        ("rank_pattern", {"q_proj": 0}, ["rank_pattern['q_proj']", "0"]),
        ("rank_pattern", {"q_proj": 3}, ["q_proj", "rank of 4", "says 3"]),
        ("rank_pattern", {"(": 3}, ["rank_pattern", "no regular expression"]),
        ("alpha_pattern", {"q_proj": "x"}, ["alpha_pattern['q_proj']", "'x'"]),
        ("rank_pattern", {"(a+)+": 4}, ["rank_pattern", "repeats", "plainer"]),
        ("target_modules", "(.*)*q_proj", ["target_modules", "repeats"]),
        ("target_modules", 7, ["target_modules", "list of module names"]),
        ("target_modules", ["q_proj"], ["v_proj", "target_modules", "leave out"]),
        ("target_modules", ["q_proj", "v_proj", "k_proj"], ["k_proj", "incomplete"]),
        ("target_modules", r".*_proj", ["incomplete", "target_modules"]),
        ("target_modules", "all-linear", ["incomplete", "target_modules"]),
        ("exclude_modules", ["q_proj"], ["q_proj", "exclude_modules"]),
        ("layers_to_transform", [0], ["layers.1", "leave out"]),
        ("layers_to_transform", "x", ["layers_to_transform", "'x'"]),
        ("modules_to_save", ["lm_head"], ["modules_to_save", "lm_head", "incomplete"]),
        ("modules_to_save", [3], ["modules_to_save", "[3]"]),
        ("init_lora_weights", "pissa", ["init_lora_weights", "path_initial_model"]),
        ("init_lora_weights", "pissa_niter_4", ["init_lora_weights", "pissa_niter_4"]),
        ("init_lora_weights", "OLoRA", ["init_lora_weights", "set the field to true"]),
        ("init_lora_weights", "corda", ["init_lora_weights", "corda"]),
        ("init_lora_weights", "lora_ga", ["init_lora_weights", "lora_ga"]),
        ("init_lora_weights", "loftq", ["init_lora_weights", "loftq"]),
        ("init_lora_weights", "new", ["init_lora_weights", "'new'"]),
        ("init_lora_weights", {}, ["init_lora_weights", "{}"]),
        ("alora_invocation_tokens", [1, 2], ["alora_invocation_tokens", MERGE]),
        ("layer_replication", [[0, 2], [1, 2]], ["layer_replication", MERGE]),
        ("trainable_token_indices", [5], ["trainable_token_indices", MERGE]),
        ("target_parameters", ["experts.up"], ["target_parameters", MERGE]),
        ("use_qalora", True, ["use_qalora", MERGE]),
        ("megatron_config", {"a": 1}, ["megatron_config", MERGE]),
        ("arrow_config", {}, ["arrow_config", MERGE]),
        ("kasa_config", {"beta": 1}, ["kasa_config", MERGE]),
        ("monteclora_config", {}, ["monteclora_config", MERGE]),
        ("use_bdlora", {"nblocks": 2}, ["use_bdlora", MERGE]),
        ("new_method", 3, ["'new_method'", "not known", MERGE]),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(
    field: str, value: object, expected: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    """Each value that makes no sense, contradicts the tensors, or asks for what is not offered."""
    config, tensors = plain_files(MODULES)
    folder = write_files(tmp_path / "adapter", {**config, field: value}, tensors)
    _refuses(folder, tiny_llama, *expected, "adapter_config.json")


def test_fields_that_say_nothing_pass(tiny_llama: Path, tmp_path: Path) -> None:
    """Metadata, what concerned the training, and unknown fields at values that ask for nothing."""
    config, tensors = plain_files(
        MODULES,
        auto_mapping={"unsloth_fixed": True},
        base_model_name_or_path="no/where",
        peft_version="99.0",
        task_type="CAUSAL_LM",
        revision="main",
        lora_dropout=0.3,
        inference_mode=False,
        megatron_core="megatron.core",
        qalora_group_size=16,
        eva_config={"rho": 2.0},
        runtime_config={"ephemeral_gpu_offload": True},
        new_method=None,
        other_method=False,
        more=[],
        still_more={},
        rank_pattern=[],
        alpha_pattern={},
        layers_pattern="",
        exclude_modules=[],
        init_lora_weights="eva",
        use_bdlora=None,
        kasa_config=False,
        fan_in_fan_out=True,
    )
    assert read(tiny_llama, write_files(tmp_path / "adapter", config, tensors)).linears


def _renamed(name: str, other: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[other] = tensors.pop(name)

    return change


def _put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def _without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def _holding(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][1, 2] = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.clear(), ["no tensors"]),
        (_without(f"{Q}.lora_A.weight"), ["q_proj.lora_B.weight", "no lora_A", "incomplete"]),
        (_without(f"{V}.lora_B.weight"), ["v_proj.lora_A.weight", "no lora_B"]),
        (_put(f"{Q}.lora_A.weight", torch.zeros(4, 63)), ["q_proj.lora_A", "[4, 63]", "[64, 64]"]),
        (_put(f"{V}.lora_B.weight", torch.zeros(64, 4)), ["v_proj.lora_B", "[64, 4]", "[32, 64]"]),
        (_put(f"{Q}.lora_B.weight", torch.zeros(0)), ["[0]", "without gathering"]),
        (_put(f"{Q}.lora_A.weight", torch.zeros(4, 64).int()), ["int32", "bfloat16"]),
        (
            _put(f"{Q}.lora_A.weight", torch.zeros(4, 64).to(torch.float8_e4m3fn)),
            ["float8_e4m3fn"],
        ),
        (_holding(f"{Q}.lora_A.weight", float("nan")), ["q_proj.lora_A.weight", "NaN or infinity"]),
        (_holding(f"{V}.lora_B.weight", float("-inf")), ["v_proj.lora_B.weight", "NaN"]),
        (_renamed(f"{Q}.lora_A.weight", f"{Q}.lora_C.weight"), ["lora_C.weight", "none of those"]),
        (_renamed(f"{Q}.lora_A.weight", f"{Q}.lora_A.default.weight"), ["lora_A.default"]),
        (_put(f"{Q}.lora_diag", torch.zeros(4)), ["lora_diag"]),
        (_put("weight", torch.zeros(4)), ["'weight'"]),
        (
            _put(f"{Q.removeprefix('base_model.model.')}.lora_A.weight", torch.zeros(4, 64)),
            ["are the same"],
        ),
        (_put(f"{Q}.lora_magnitude_vector", torch.ones(64)), ["use_dora", "is false"]),
        (_put(f"{Q}.lora_B.bias", torch.ones(64)), ["lora_bias", "is false"]),
        (_put(f"{Q}.base_layer.bias", torch.ones(64)), ["q_proj", "no bias there"]),
        (_put(f"{Q}.weight", torch.ones(64, 64)), ["q_proj.weight", "modules_to_save", MERGE]),
        (_put(f"{Q}.base_layer.weight", torch.ones(64, 64)), ["q_proj.base_layer.weight"]),
        (_put(f"{Q}.lora_embedding_A", torch.ones(4, 64)), ["q_proj.lora_embedding_A"]),
        (_put("base_model.model.model.norm.weight", torch.ones(64)), ["'model.norm'", "changes"]),
        (
            _put("base_model.model.model.norm.lora_A.weight", torch.ones(4, 64)),
            ["'model.norm'", MERGE],
        ),
        (_put(f"{HEAD}.weight", torch.ones(305, 64)), ["lm_head.weight", "305 rows", "has 304"]),
        (_put(f"{EMBED}.weight", torch.ones(304, 65)), ["[304, 65]", "[304, 64]"]),
        (_put(f"{EMBED}.base_layer.weight", torch.ones(304, 64)), ["another model"]),
        (_put(f"{EMBED}.lora_embedding_A", torch.ones(4, 304)), ["lora_embedding_B", "incomplete"]),
        (_put("base_model.model.score.weight", torch.ones(2, 64)), ["'score'", "no such module"]),
        (
            _put("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", torch.ones(1)),
            ["layers.2.self_attn.q_proj", "model.layers.", "another model"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[Tensors], None], expected: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    """Whatever is missing, too much, of the wrong shape, type or value."""
    config, tensors = plain_files(MODULES)
    change(tensors)
    folder = write_files(tmp_path / "adapter", config, tensors)
    _refuses(folder, tiny_llama, *expected, "adapter_model.safetensors")


def test_an_adapter_for_another_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """No adapter whose names match nothing gives the base model's output in silence."""
    names = {f"transformer.h.{i}.attn.c_attn": (192, 64) for i in range(12)}
    folder = write_files(tmp_path / "adapter", *plain_files(names))
    _refuses(folder, tiny_llama, "transformer.h.0.attn.c_attn", "8 more", "self_attn", "another")


def test_a_rank_too_large_names_both_and_the_argument(tiny_llama: Path, tmp_path: Path) -> None:
    """The largest rank of all modules is the one that has to fit."""
    config, tensors = plain_files(MODULES, rank=20)
    config["rank_pattern"], config["r"] = {".*": 20}, 2
    folder = write_files(tmp_path / "adapter", config, tensors)
    _refuses(folder, tiny_llama, "rank is 20", "max_lora_rank is 16", "=20", max_rank=16)
    assert read(tiny_llama, folder, max_rank=20)


def test_values_that_the_dtype_cannot_hold_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """They would be infinite, and all text after them nonsense."""
    config, tensors = plain_files(MODULES)
    tensors[f"{Q}.lora_A.weight"][0, 0] = 1e6
    folder = write_files(tmp_path / "adapter", config, tensors)
    _refuses(folder, tiny_llama, "too large for float16", dtype=torch.float16)
    assert read(tiny_llama, folder, dtype=torch.bfloat16)


def test_a_tied_adapter_needs_both_halves(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """With ensure_weight_tying, what peft saves for one of two tied matrices is there for both."""
    config, tensors = plain_files({}, ensure_weight_tying=True, target_modules=["embed_tokens"])
    tensors[f"{EMBED}.lora_embedding_A"] = torch.randn(4, 304)
    tensors[f"{EMBED}.lora_embedding_B"] = torch.randn(64, 4)
    folder = write_files(tmp_path / "adapter", config, tensors)
    _refuses(folder, tiny_checkpoint("qwen2-tied"), "ensure_weight_tying", "lm_head")


# -- files ---------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_files(tmp_path / "adapter", *plain_files(MODULES))


def test_missing_files_are_named(good: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """And what there is instead: nothing, a whole model, a pickle."""
    tensors = good / "adapter_model.safetensors"
    tensors.rename(good / "adapter_model.bin")
    _refuses(good, tiny_llama, "adapter_model.safetensors", "safe_serialization", "unpickling")
    (good / "adapter_model.bin").unlink()
    _refuses(good, tiny_llama, "no adapter_model.safetensors", "it has: adapter_config.json")
    _refuses(tiny_llama, tiny_llama, "no adapter_config.json", "whole model", "model=")
    _refuses(tmp_path / "none", tiny_llama, "none", "folder")
    _refuses(good / "adapter_config.json", tiny_llama, "folder")


def test_links_in_circles_pipes_and_folders_are_refused(good: Path, tiny_llama: Path) -> None:
    """Nothing waits for a pipe that nobody writes to."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = good / name
        content = path.read_bytes()
        path.unlink()
        path.symlink_to(path)
        _refuses(good, tiny_llama, name, "cannot be read")
        path.unlink()
        os.mkfifo(path)
        _refuses(good, tiny_llama, name, "no regular file")
        path.unlink()
        path.mkdir()
        _refuses(good, tiny_llama, name)
        path.rmdir()
        path.write_bytes(content)
    assert read(tiny_llama, good)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"\xff\xfe\x00", "no valid JSON"),
        (b"[1]", "JSON object"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b" " * (9 << 20), "bytes"),
    ],
)
def test_a_damaged_configuration_is_refused(
    content: bytes, expected: str, good: Path, tiny_llama: Path
) -> None:
    """Whatever stands in the file, the error names it."""
    (good / "adapter_config.json").write_bytes(content)
    _refuses(good, tiny_llama, expected, "adapter_config.json")


def _with_header(content: bytes, header: object, tail: int | None = None) -> bytes:
    length = int.from_bytes(content[:8], "little")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :][:tail]


def test_damaged_tensors_are_refused(good: Path, tiny_llama: Path) -> None:
    """Truncated anywhere, with bytes too many, or with a header that claims what is not there."""
    path = good / "adapter_model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    huge = dict(header)
    name = next(name for name in header if name != "__metadata__")
    huge[name] = {"dtype": "F32", "shape": [1 << 40, 64], "data_offsets": [0, 1 << 48]}
    contents = [content[:size] for size in (0, 4, 8, 100, 8 + length, len(content) - 1)]
    contents += [
        content + b"\0",
        b"\xff" * 8 + content[8:],
        _with_header(content, huge),
        _with_header(content, [1]),
        _with_header(content, {name: 3}),
        _with_header(content, {**header, name: {**header[name], "dtype": "X7"}}),
        b"PK\x03\x04" + content,
    ]
    for each in contents:
        path.write_bytes(each)
        _refuses(good, tiny_llama, "adapter_model.safetensors")


def test_a_file_that_claims_much_takes_no_memory(good: Path, tiny_llama: Path) -> None:
    """A hole of a terabyte is refused by its header, before anything is allocated for it."""
    path = good / "adapter_model.safetensors"
    size = 1 << 40
    entry = {"dtype": "F32", "shape": [4, size // 16], "data_offsets": [0, size]}
    text = json.dumps({f"{Q}.lora_A.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    try:
        os.truncate(path, 8 + len(text) + size)
    except OSError:
        pytest.skip("the file system has no room for a hole of a terabyte")
    _refuses(good, tiny_llama, "lora_A")


# -- names ---------------------------------------------------------------------------------------


def test_names_that_lead_nowhere_say_what_to_do(tmp_path: Path) -> None:
    """Offline, a name on the hub, a file and a path that is not there."""
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE"):
        folder_of("some-org/some-adapter")
    with pytest.raises(AdapterError, match=re.escape("no such folder")):
        folder_of(str(tmp_path / "none"))
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file"):
        folder_of(str(tmp_path / "file"))
    assert folder_of(str(tmp_path)) == tmp_path.resolve()
