<<<<<<<< HEAD:tests/helpers/adapters.py
"""Random LoRA adapters in peft's format, and checkpoints into which one is merged.

``write_adapter(folder, checkpoint, seed=...)``
    ``adapter_config.json`` and ``adapter_model.safetensors``, written without peft.
``merge_adapter(folder, checkpoint, adapter)``
    The checkpoint with the adapter added to its weights: what an engine with the adapter has to
    equal.
"""
========
"""Adapters in peft's format: of peft's own making, or by hand; and decoders to read them for."""
>>>>>>>> lora-reader:tests/helpers/peft_adapters.py

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."


def linear_weights(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """Return the shapes ``(out_features, in_features)`` of a checkpoint's linear layers by module.

    Embeddings and the output matrix are left out.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                shape = tuple(file.get_slice(name).get_shape())
                module, _, kind = name.rpartition(".")
                if kind == "weight" and len(shape) == 2 and not _is_table(module):
                    shapes[module] = shape
    return shapes


def _is_table(module: str) -> bool:
    last = module.rpartition(".")[2]
    return "emb" in last or last in ("wte", "wpe", "lm_head")


def write_adapter(
    folder: Path,
    checkpoint: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: Iterable[str] | None = None,
    alpha: float | None = None,
    size: float = 0.4,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
<<<<<<<< HEAD:tests/helpers/adapters.py
    """Write a random adapter for a checkpoint's linear layers, large enough to change its tokens.
========
    """Have peft make an adapter with random values everywhere, and save it to `folder`.

    `config` goes to ``peft.LoraConfig``. What of the base model peft trains along with the
    adapter, biases and whole modules, is changed, too.
    """
    import peft

    model = base_model(model_folder)
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        # Of tied embeddings, of Conv1D and of biases that do not merge; the tests know.
        warnings.simplefilter("ignore")
        settings = {"task_type": "CAUSAL_LM", "init_lora_weights": False, **config}
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * noise)
                elif "lora_" in name:
                    parameter.copy_(size * noise)
                elif parameter.requires_grad and not _is_norm(name):
                    parameter.add_(size * noise)
        model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


def _is_norm(name: str) -> bool:
    return any(part in name for part in ("norm", "ln_"))


def adapted_model(model_folder: Path, folder: Path) -> Any:
    """The model with an adapter, as peft applies it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base_model(model_folder), folder).eval()


@functools.cache
def decoder_of(model_folder: Path, backend: str | None = "reference") -> Decoder:
    """A decoder with slots, float32; the same one for the same folder and backend."""
    return load_model(
        model_folder,
        read_config(model_folder),
        device=torch.device("cpu"),
        dtype=torch.float32,
        kernels=get_backend("cpu", backend),
        max_adapters=2,
    )


def read(
    model_folder: Path,
    folder: Path,
    *,
    max_rank: int = 64,
    dtype: torch.dtype = torch.float32,
    decoder: Decoder | None = None,
) -> Adapter:
    """Read an adapter for a model."""
    _, family = family_of(read_config(model_folder))
    decoder = decoder or decoder_of(model_folder)
    return read_adapter(folder, decoder, family, max_rank=max_rank, dtype=dtype)


def plain_files(
    modules: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0, **config: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of an adapter, without peft.
>>>>>>>> lora-reader:tests/helpers/peft_adapters.py

    Parameters
    ----------
    folder : Path
        Made where it is missing; an adapter in it is replaced.
    checkpoint : Path
        The folder of the model. Its linear layers must lie as ``[out_features, in_features]``,
        which they do everywhere but in GPT-2.
    seed : int
    rank : int
    targets : iterable of str, optional
        Last names of modules, such as ``q_proj``; all linear layers unless given.
    alpha : float, optional
        ``lora_alpha``; twice the rank unless given.
    size : float
        Spread of what is added to a weight, where 1 is about that of the weight itself.
    dtype : torch.dtype
    **config
        Further fields of ``adapter_config.json``.

    Returns
    -------
    Path
        The folder.
    """
    wanted = None if targets is None else set(targets)
    alpha = 2 * rank if alpha is None else alpha
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    names: set[str] = set()
    for module, (out_features, in_features) in sorted(linear_weights(checkpoint).items()):
        last = module.rpartition(".")[2]
        if wanted is not None and last not in wanted:
            continue
        names.add(last)
        # Each entry of scale * b @ a has a spread of about size / sqrt(in_features).
        spread = (size / (alpha / rank) / (rank * in_features) ** 0.5) ** 0.5
        a = torch.randn(rank, in_features, generator=generator) * spread
        b = torch.randn(out_features, rank, generator=generator) * spread
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.to(dtype).contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.to(dtype).contiguous()
    assert tensors, f"{checkpoint} has none of the modules {wanted}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS_FILE)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(names),
        "inference_mode": True,
        **config,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=1))
    return folder


def merge_adapter(folder: Path, checkpoint: Path, adapter: Path) -> Path:
    """Write the checkpoint with what :func:`write_adapter` wrote added to its weights."""
    fields = json.loads((adapter / CONFIG_FILE).read_text())
    root = fields["r"] ** 0.5 if fields.get("use_rslora") else fields["r"]
    scale = fields["lora_alpha"] / root
    deltas = load_file(adapter / TENSORS_FILE)
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    for path in sorted(folder.glob("*.safetensors")):
        weights = load_file(path)
        for name, weight in weights.items():
            module = _PREFIX + name.removesuffix(".weight")
            a = deltas.get(f"{module}.lora_A.weight")
            if a is not None:
                b = deltas[f"{module}.lora_B.weight"]
                weights[name] = (weight + scale * (b.double() @ a.double())).to(weight.dtype)
        save_file(weights, path, {"format": "pt"})
    return folder
