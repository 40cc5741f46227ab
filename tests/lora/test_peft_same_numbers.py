"""Adapters that peft made, read here and computed by the decoder, against peft itself."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import PagedRunner
from peft_adapters import (
    adapted_model,
    base_model,
    decoder_of,
    read,
    write_adapter,
    write_files,
)

from quire.kernels import get_backend

pytest.importorskip("peft")

Make = Callable[[str], Path]

LENGTH = 24
NUM_GREEDY = 16
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
TABLES = {"embed_tokens", "lm_head", "wte", "word_embeddings"}


def check(name: str, base: Path, folder: Path, config: dict[str, Any]) -> None:
    """Compare an adapter that peft makes from `config`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_adapter(base, folder, **config)
    compare(name, base, folder, config)


def compare(name: str, base: Path, folder: Path, config: dict[str, Any]) -> None:
    """Compare logits at each position, and greedy tokens, with peft, unmerged and merged."""
    rng = random.Random(0)
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(LENGTH)]
    model = adapted_model(base, folder)
    with torch.inference_mode():
        plain = base_model(base)(torch.tensor([prompt])).logits[0]
    found = []
    for backend in ("reference", None):  # None: the native kernels, where they are built
        logits, greedy = computed(base, folder, backend, prompt)
        found.append(logits)
        with torch.inference_mode():
            expected = model(torch.tensor([prompt + greedy])).logits[0]
        assert_same(logits, expected[:LENGTH])
        # If each token is the first choice after those before it, these are the greedy tokens.
        assert greedy == expected[LENGTH - 1 : -1].argmax(-1).tolist()
        assert (expected[:LENGTH] - plain).abs().max() > 1e-3  # the adapter was heard at all
    if not mergeable(name, model, config):
        return
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()(torch.tensor([prompt])).logits[0]
    for logits in found:
        assert_same(logits, merged)


def assert_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """To float32's rounding, which each CPU has its own of: against float64 both lose as much."""
    atol = max(1e-4, 3e-5 * float(expected.abs().max()))
    torch.testing.assert_close(logits, expected, atol=atol, rtol=0)


def computed(
    base: Path, folder: Path, backend: str | None, prompt: list[int]
) -> tuple[torch.Tensor, list[int]]:
    """Logits at each position of a prompt, and the greedy tokens after it."""
    decoder, kernels = decoder_of(base, backend), get_backend("cpu", backend)
    decoder.set_adapter(1, decoder.prepare_adapter(read(base, folder, decoder=decoder)))

    def runner() -> PagedRunner:
        length = LENGTH + NUM_GREEDY
        return PagedRunner(decoder, kernels, num_seqs=1, max_len=length, adapters=[1])

    return runner().prefill([prompt], seed=1)[0], runner().generate([prompt], NUM_GREEDY, seed=2)[0]


def mergeable(name: str, model: Any, config: dict[str, Any]) -> bool:
    """Whether peft's merged model is the unmerged one.

    It is not where the embedding is also the output matrix, as both then get what was meant for
    one; and biases of ``B`` need a bias to be merged into.
    """
    targets = config["target_modules"]
    tied = model.config.tie_word_embeddings and TABLES & set(targets)
    return not tied and not (config.get("lora_bias") and not name.startswith("gpt"))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": LLAMA}),
    ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "r": 7}),
    ("llama", {"target_modules": [*LLAMA, "embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": [*LLAMA, "lm_head"], "use_dora": True}),
    (
        "llama",
        {
            "target_modules": LLAMA,
            "rank_pattern": {"k_proj": 3, "layers.1.mlp.up_proj": 2, r"layers\.1\..*_proj": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3.5, "up_proj|down_proj": 20},
        },
    ),
    ("llama", {"target_modules": r".*\.1\..*(q|v)_proj"}),
    ("llama", {"target_modules": LLAMA, "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": LLAMA, "exclude_modules": ["self_attn.q_proj"]}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": LLAMA, "init_lora_weights": "gaussian"}),
    ("llama", {"target_modules": LLAMA, "init_lora_weights": "mica", "r": 4}),
    ("llama", {"target_modules": LLAMA, "velora_config": {"num_groups": 4}}),
    ("llama3.1", {"target_modules": ["gate_proj"], "lora_alpha": 32}),
    ("qwen2", {"target_modules": LLAMA, "bias": "all"}),
    ("qwen2", {"target_modules": LLAMA, "bias": "lora_only", "use_dora": True}),
    ("qwen2", {"target_modules": ["q_proj", "o_proj"], "lora_bias": True, "use_rslora": True}),
    ("qwen2", {"target_modules": ["v_proj"], "bias": "all"}),
    ("qwen2-tied", {"target_modules": ["embed_tokens"]}),
    ("qwen2-tied", {"target_modules": ["lm_head"], "use_dora": True}),
    ("qwen2-tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    ("qwen2-tied", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    ("qwen2-tied", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}),
    (
        "qwen2-tied",
        {
            "target_modules": ["v_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    ("gpt2", {"target_modules": GPT2, "fan_in_fan_out": True, "bias": "all"}),
    ("gpt2", {"target_modules": [*GPT2, "wte", "lm_head"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": GPT2, "use_dora": True, "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": GPT2, "lora_bias": True, "fan_in_fan_out": True}),
    ("gpt-neox", {"target_modules": [*FUSED, "embed_in", "embed_out"]}),
    ("gpt-neox", {"target_modules": FUSED, "use_dora": True, "bias": "all"}),
    ("falcon-40b", {"target_modules": [*FUSED, "word_embeddings"]}),
    ("llama", {"target_modules": LLAMA, "save_embedding_layers": True}),
    ("falcon-40b", {"target_modules": FUSED, "use_dora": True}),
    ("falcon-rw", {"target_modules": FUSED, "use_dora": True, "bias": "all"}),
    ("falcon-7b", {"target_modules": FUSED, "use_dora": True}),
    ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    ("gemma2", {"target_modules": [*LLAMA, "embed_tokens"]}),
    ("opt", {"target_modules": ["q_proj", "fc1", "out_proj"], "bias": "all"}),
    ("opt-350m", {"target_modules": ["k_proj", "fc2", "embed_tokens", "lm_head"]}),
    ("mpt", {"target_modules": ["Wqkv", "out_proj", "up_proj", "wte"]}),
]


@pytest.mark.parametrize(
    ("name", "config"), [pytest.param(*case, id=f"{i}-{case[0]}") for i, case in enumerate(CASES)]
)
def test_an_adapter_computes_what_peft_computes(
    name: str, config: dict[str, Any], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """Logits to 1e-4 and greedy tokens, for each kind of layout, bias and option."""
    check(name, tiny_checkpoint(name), tmp_path, config)


FAMILIES = {
    "llama": [*LLAMA, "embed_tokens", "lm_head"],
    "qwen2": [*LLAMA, "embed_tokens", "lm_head"],
    "gpt2": GPT2,
}


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A family, and a configuration that peft accepts for it."""
    name = draw(st.sampled_from(sorted(FAMILIES)))
    modules = FAMILIES[name]
    targets = draw(st.lists(st.sampled_from(modules), min_size=1, unique=True))
    config: dict[str, Any] = {
        "target_modules": targets,
        "r": draw(st.integers(1, 9)),
        "lora_alpha": draw(st.sampled_from([1, 4, 8, 2.5])),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "fan_in_fan_out": name == "gpt2",
    }
    patterns = st.sampled_from([*targets, r"\w+\.0\..*", "^model.layers.1.mlp.up_proj"])
    if "lm_head" not in targets and "embed_tokens" not in targets and name != "gpt2":
        tables = st.sampled_from(["embed_tokens", "lm_head"])
        config["modules_to_save"] = draw(st.none() | st.lists(tables, min_size=1, unique=True))
    if draw(st.booleans()) and "embed_tokens" not in targets:
        config["use_dora"] = True
    elif draw(st.booleans()) and "embed_tokens" not in targets:
        config["lora_bias"] = True
    for field in ("rank_pattern", "alpha_pattern"):
        drawn = draw(st.dictionaries(patterns, st.integers(1, 9), max_size=2))
        # The first that matches counts, and peft sorts them when it saves.
        config[field] = dict(sorted(drawn.items()))
    return name, config


@given(drawn=configs(), seed=st.integers(0, 100))
@settings(max_examples=settings.default.max_examples // 4)
def test_any_configuration_computes_what_peft_computes(
    drawn: tuple[str, dict[str, Any]],
    seed: int,
    tiny_checkpoint: Make,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The same for combinations of ranks, scales, patterns, targets, biases, DoRA and tables."""
    name, config = drawn
    folder = tmp_path_factory.mktemp("adapter")
    check(name, tiny_checkpoint(name), folder, {**config, "seed": seed})


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied"])
@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head", "embed_tokens lm_head"])
def test_an_embedding_that_was_saved_along_is_the_one_of_peft(
    name: str, kept: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """Tables that are no modules_to_save stand in for the model's own, of a tied model for both."""
    from safetensors.torch import load_file

    base, config = tiny_checkpoint(name), {"target_modules": ["v_proj"]}
    write_adapter(base, tmp_path, **config, save_embedding_layers=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for module in ("embed_tokens", "lm_head"):
        table = next(each for each in tensors if each.endswith(f"{module}.weight"))
        tensors[table] = tensors[table] + 0.2 * tensors[table].flip(0)
        if module not in kept:
            del tensors[table]
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    compare(name, base, write_files(tmp_path, settings, tensors), config)
