"""Tiny random checkpoints, written by transformers itself: what quire's models are tested against.

A pytest plugin (registered in tests/conftest.py) with two fixtures:

``tiny_checkpoint(name) -> Path``
    The checkpoint folder of one entry of ``CONFIGS``; made once per session, float32.
``tiny_llama -> Path``
    The one that most tests want: Llama, GQA 4/2, two layers, with tokenizer and chat template.

Every folder has config.json, generation_config.json, model.safetensors and a byte-level BPE
tokenizer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 304
"""Rows of every tiny model's embedding; the tokenizer uses fewer of them."""

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "What is the capital of France ? The capital of France is Paris .",
    "hello world, this is a small tokenizer that merges a few pairs only",
]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
_LLAMA_LIKE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_MIXTURE: dict[str, Any] = {
    **_LLAMA_LIKE,
    "num_hidden_layers": 3,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}
_QWEN_MIXTURE: dict[str, Any] = {
    **_LLAMA_LIKE,
    "num_hidden_layers": 3,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
}
_NEOX_LIKE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.5 + 0.4 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "llama-mha-bias-tied": (
        "LlamaConfig",
        {
            **_LLAMA_LIKE,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama3.1": ("LlamaConfig", {**_LLAMA_LIKE, "rope_parameters": _LLAMA3_ROPE}),
    "llama-linear": (
        "LlamaConfig",
        {
            **_LLAMA_LIKE,
            "head_dim": 24,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        },
    ),
    "llama-dynamic": (
        "LlamaConfig",
        {
            **_LLAMA_LIKE,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "llama-yarn": (
        "LlamaConfig",
        {
            **_LLAMA_LIKE,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": 12, "head_dim": 16}),
    "mistral-full": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen2-tied": ("Qwen2Config", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {
            **_LLAMA_LIKE,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 10,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 32}),
    "mixtral": ("MixtralConfig", _MIXTURE),
    "mixtral-window": (
        "MixtralConfig",
        {**_MIXTURE, "num_experts_per_tok": 1, "sliding_window": 12, "head_dim": 24},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**_QWEN_MIXTURE, "shared_expert_intermediate_size": 80, "mlp_only_layers": [1]},
    ),
    "qwen2-moe-normalized": (
        "Qwen2MoeConfig",
        {
            **_QWEN_MIXTURE,
            "shared_expert_intermediate_size": 80,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 10,
            "max_window_layers": 2,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**_QWEN_MIXTURE, "head_dim": 32, "norm_topk_prob": True},
    ),
    "qwen3-moe-sparse": (
        "Qwen3MoeConfig",
        {
            **_QWEN_MIXTURE,
            "num_experts": 20,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 20,
            "attention_bias": True,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
            "mlp_only_layers": [3],
            "use_sliding_window": True,
            "sliding_window": 14,
        },
    ),
    "phi3": ("Phi3Config", {**_LLAMA_LIKE, "original_max_position_embeddings": 256}),
    "phi3-longrope": (
        "Phi3Config",
        {**_LLAMA_LIKE, "original_max_position_embeddings": 64, "rope_parameters": _LONGROPE},
    ),
    "phi3-partial": (
        "Phi3Config",
        {
            **_LLAMA_LIKE,
            "num_key_value_heads": 4,
            "sliding_window": 14,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {
            **_LLAMA_LIKE,
            "num_hidden_layers": 4,
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "sliding_window": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            **_NEOX_LIKE,
            "ffn_dim": 96,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 256,
        },
    ),
    "opt-350m": (
        "OPTConfig",
        {
            **_NEOX_LIKE,
            "ffn_dim": 96,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": False,
            "max_position_embeddings": 256,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {**_COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
    "gpt2-scaled": (
        "GPT2Config",
        {
            **_COMMON,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 2,
            "n_inner": 80,
            "n_positions": 256,
            "activation_function": "gelu",
            "scale_attn_by_inverse_layer_idx": True,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-neox": (
        "GPTNeoXConfig",
        {
            **_NEOX_LIKE,
            "intermediate_size": 96,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    "gpt-neox-serial": (
        "GPTNeoXConfig",
        {
            **_NEOX_LIKE,
            "intermediate_size": 96,
            "max_position_embeddings": 256,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "mpt": (
        "MptConfig",
        {**_COMMON, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    ),
    "mpt-6-heads": (
        "MptConfig",
        {
            **_COMMON,
            "d_model": 96,
            "n_heads": 6,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.3},
        },
    ),
    "falcon-7b": (
        "FalconConfig",
        {
            **_NEOX_LIKE,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "new_decoder_architecture": False,
            "alibi": False,
        },
    ),
    "falcon-40b": (
        "FalconConfig",
        {
            **_NEOX_LIKE,
            "num_kv_heads": 2,
            "parallel_attn": True,
            "bias": False,
            "new_decoder_architecture": True,
            "alibi": False,
        },
    ),
    "falcon-11b": (
        "FalconConfig",
        {
            **_NEOX_LIKE,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "parallel_attn": True,
            "bias": False,
            "new_decoder_architecture": True,
            "ffn_hidden_size": 96,
            "alibi": False,
        },
    ),
    "falcon-rw": (
        "FalconConfig",
        {
            **_NEOX_LIKE,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "new_decoder_architecture": False,
            "alibi": True,
        },
    ),
}
"""Name -> transformers config class and its arguments: one entry per family and variant."""


def build_config(name: str) -> PreTrainedConfig:
    """The transformers configuration of ``CONFIGS[name]``."""
    import transformers

    class_name, arguments = CONFIGS[name]
    config: PreTrainedConfig = getattr(transformers, class_name)(**arguments)
    return config


def build_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 model of random weights in which no parameter is at its neutral value.

    Biases are not 0, norms not 1, and logits spread far enough that the best token stands clear of
    the second: so a forgotten bias or a wrong norm shows, and greedy decoding has no near-ties.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # A model with a tied embedding tends to repeat its input, unless its layers drown it out.
    tied = config.tie_word_embeddings and getattr(config, "do_layer_norm_before", True)
    gemma = config.model_type == "gemma2"
    embedding_scale = 0.1 if gemma else 0.4
    layer_scale = 4.0 if tied else 1.2
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                if name.endswith("bias"):
                    parameter.copy_(0.2 * noise)
                else:
                    shift = 2.0 if gemma and "post_" in name else 0.0
                    parameter.copy_(parameter + shift + 0.2 * noise)
            elif "emb" in name or "wte" in name or "wpe" in name or "lm_head" in name:
                parameter.copy_(embedding_scale * noise)
            else:
                parameter.copy_(layer_scale * noise * max(parameter.shape) ** -0.5)
    model.eval()
    return model


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of about 300 tokens with a chat template into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 4,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "pad_token": SPECIAL_TOKENS[PAD_ID],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def write_checkpoint(folder: Path, name: str, *, seed: int = 0, **save_options: Any) -> Path:
    """Write ``CONFIGS[name]`` with random weights and a tokenizer to `folder`.

    `save_options` go to transformers' ``save_pretrained``: ``max_shard_size="40KB"`` makes a
    sharded checkpoint.
    """
    model = build_model(build_config(name), seed)
    model.save_pretrained(folder, **save_options)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_checkpoint(name)``: the folder of a tiny float32 checkpoint, made once per session."""

    @functools.cache
    def make(name: str) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp(name.replace(".", "_")), name)

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_checkpoint: Callable[[str], Path]) -> Path:
    """A Llama checkpoint: 2 layers, hidden 64, heads 4/2, vocabulary 304, 256 positions."""
    return tiny_checkpoint("llama")
