"""Random checkpoints of well-known dimensions: what a benchmark needs of a model."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

DIMENSIONS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": 151645,
    },
    "llama-small": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
    },
}
"""Configurations by the name that ``--random`` takes."""


def cache_folder() -> Path:
    """Return where random checkpoints are kept: ``QUIRE_BENCH_DIR`` or the user's cache."""
    asked = os.environ.get("QUIRE_BENCH_DIR")
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "quire" / "bench"


def made_from(folder: Path, kind: str) -> Path:
    """Return where what is made of a checkpoint is kept; the path is another for other files.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    kind : str
        What is made of it, with a suffix if it is a file.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        if path.exists():
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return cache_folder() / f"{folder.resolve().name}-{digest.hexdigest()[:12]}-{kind}"


def random_checkpoint(name: str, dtype: str) -> Path:
    """Return the folder of a random checkpoint, made at the first use.

    Parameters
    ----------
    name : str
        One of `DIMENSIONS`.
    dtype : {"float32", "bfloat16", "float16"}
        Of the stored weights.

    Raises
    ------
    ValueError
        For a name that is not among `DIMENSIONS`.
    """
    if name not in DIMENSIONS:
        raise ValueError(f"--random {name!r}: choose one of {', '.join(DIMENSIONS)}")
    folder = cache_folder() / f"{name}-{dtype}"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = {**DIMENSIONS[name], "dtype": dtype, "torch_dtype": dtype}
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        _write_weights(folder / "model.safetensors", config, dtype)
    return folder


def _write_weights(path: Path, config: dict[str, Any], dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    kind = getattr(torch, dtype)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).to(kind)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for part, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            tensors[f"{layer}self_attn.{part}.weight"] = matrix(rows, hidden)
            if config["model_type"] == "qwen2":
                tensors[f"{layer}self_attn.{part}.bias"] = matrix(1, rows)[0].clone()
        tensors[f"{layer}self_attn.o_proj.weight"] = matrix(hidden, hidden)
        tensors[f"{layer}mlp.gate_proj.weight"] = matrix(inner, hidden)
        tensors[f"{layer}mlp.up_proj.weight"] = matrix(inner, hidden)
        tensors[f"{layer}mlp.down_proj.weight"] = matrix(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{norm}.weight"] = torch.ones(hidden, dtype=kind)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=kind)
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(path)
