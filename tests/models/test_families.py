"""Every family and variant against transformers, on the same tiny random checkpoint."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIGS, VOCAB_SIZE
from paged import PagedRunner

from quire.kernels import get_backend
from quire.models.decoder import Decoder
from quire.models.hf_config import read_config
from quire.models.registry import build_spec, supported_architectures

Load = Callable[..., Decoder]
Make = Callable[[str], Path]

KERNELS = get_backend("cpu")
NUM_GREEDY = 64


def oracle(folder: Path) -> Any:
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def cases() -> list[Any]:
    """``(checkpoint, prompt lengths, max_model_len)``."""
    made = []
    for name in CONFIGS:
        if name == "phi3-longrope":
            # transformers chooses the factors by each call's length, quire by max_model_len; they
            # agree below the trained length of 64 and above it.
            made.append(pytest.param(name, [60, 23, 1], 64, id=f"{name}-short"))
            made.append(pytest.param(name, [97, 66], 256, id=f"{name}-long"))
        else:
            made.append(pytest.param(name, [75, 30, 1], None, id=name))
    return made


@pytest.mark.parametrize(("name", "lengths", "max_model_len"), cases())
def test_same_logits_and_greedy_tokens_as_transformers(
    name: str, lengths: list[int], max_model_len: int | None, tiny_checkpoint: Make, load: Load
) -> None:
    """Logits at every position within 1e-4 and float32's rounding, and 64 greedy tokens the same.

    Left to right, in chunks of random sizes, several sequences per batch, over shuffled blocks.
    """
    folder = tiny_checkpoint(name)
    model = oracle(folder)
    decoder = load(folder, max_model_len=max_model_len)
    prompts = prompts_of(lengths)
    runner = PagedRunner(decoder, KERNELS, num_seqs=len(prompts), max_len=max(lengths))
    for prompt, logits in zip(prompts, runner.prefill(prompts, seed=1), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    if max_model_len is not None and max(lengths) + NUM_GREEDY > max_model_len:
        return
    runner = PagedRunner(
        decoder, KERNELS, num_seqs=len(prompts), max_len=max(lengths) + NUM_GREEDY, block_size=16
    )
    seen: set[int] = set()
    for prompt, output in zip(prompts, runner.generate(prompts, NUM_GREEDY, seed=2), strict=True):
        # If each token is the model's first choice after those before it, then greedy decoding
        # by the model gives these tokens: one pass tells.
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output[:-1]])).logits[0]
        assert output == logits[len(prompt) - 1 :].argmax(-1).tolist()
        seen.update(output)
    assert len(seen) > 12, "text that only repeats itself would prove little"


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("falcon-40b", {"num_ln_in_parallel_attn": 2, "layer_norm_epsilon": 0.1}),
        ("falcon-rw", {"alibi": False}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"layer_types": ["full_attention"] * 4}),
        ("gemma2", {"query_pre_attn_scalar": 24}),
        ("gpt-neox", {"use_parallel_residual": False}),
        ("gpt-neox", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("gpt2-scaled", {"scale_attn_by_inverse_layer_idx": False}),
        ("gpt2-scaled", {"activation_function": "relu"}),
        ("llama", {"rope_parameters": {"rope_theta": 20000.0}}),
        ("llama", {"rms_norm_eps": 1e-2}),
        ("llama3.1", {"rope_parameters": {"factor": 2.0}}),
        ("mistral", {"sliding_window": 13}),
        ("mixtral", {"num_experts_per_tok": 3}),
        ("mixtral-window", {"sliding_window": 13}),
        ("mpt-6-heads", {"attn_config": {"clip_qkv": None}}),
        ("mpt-6-heads", {"attn_config": {"softmax_scale": None}}),
        ("mpt", {"attn_config": {"alibi_bias_max": 7}}),
        ("opt", {"activation_function": "gelu"}),
        ("qwen2-moe", {"norm_topk_prob": True}),
        ("qwen2-moe", {"num_experts_per_tok": 4}),
        ("qwen2-moe-normalized", {"layer_types": ["full_attention"] * 3}),
        ("qwen3-moe", {"norm_topk_prob": False}),
        ("qwen2-window", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}),
    ],
    ids=str,
)
def test_every_setting_reaches_the_logits(
    name: str, override: dict[str, Any], tiny_checkpoint: Make, load: Load
) -> None:
    """Changing a setting changes the logits by far more than the oracle test lets pass.

    So a setting that the decoder forgot could not have passed it.
    """
    folder = tiny_checkpoint(name)
    prompts = prompts_of([40])
    made = []
    for overrides in (None, override):
        runner = PagedRunner(load(folder, overrides), KERNELS, num_seqs=1, max_len=40)
        made.append(runner.prefill(prompts, seed=0)[0])
    assert (made[0] - made[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-350m", "falcon-rw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_close(
    name: str, dtype: torch.dtype, tiny_checkpoint: Make, load: Load
) -> None:
    """The same checkpoint in two bytes per weight gives logits near those of float32."""
    folder = tiny_checkpoint(name)
    prompts = prompts_of([33, 9])
    made = []
    for each in (torch.float32, dtype):
        runner = PagedRunner(load(folder, dtype=each), KERNELS, num_seqs=2, max_len=40)
        made.append(torch.cat(runner.prefill(prompts, seed=0)))
    assert made[1].dtype == torch.float32
    assert (made[0] - made[1]).std() < 0.1 * made[0].std()


def to_old_style(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as transformers before 5 wrote it."""
    old = dict(config)
    old["torch_dtype"] = old.pop("dtype")
    rope = old.pop("rope_parameters", None)
    if rope is None:
        return old
    neox = old["model_type"] == "gpt_neox"
    old["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        key = "rotary_pct" if neox else "partial_rotary_factor"
        old[key] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    if kind == "longrope":
        kind = "su"
        rope.pop("original_max_position_embeddings")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    old.pop("layer_types", None)
    return old


@pytest.mark.parametrize("name", CONFIGS)
def test_old_and_new_configurations_mean_the_same(
    name: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """A config.json of transformers 4 and one of transformers 5 lead to equal specs."""
    new = json.loads((tiny_checkpoint(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(to_old_style(json.loads(json.dumps(new)))))
    assert build_spec(read_config(tmp_path)) == build_spec(read_config(tiny_checkpoint(name)))


def test_every_family_is_tested(tiny_checkpoint: Make) -> None:
    """No architecture is supported without a checkpoint here (other spellings set aside).

    Those with a head for classes are in test_classifiers.py.
    """
    tested = set()
    for name in CONFIGS:
        tested.update(read_config(tiny_checkpoint(name))["architectures"])
    found = {n for n in supported_architectures() if not n.endswith("ForSequenceClassification")}
    assert found - tested == {"LLaMAForCausalLM", "MPTForCausalLM"}
