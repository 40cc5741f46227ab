"""Adapters in peft's format: of peft's own making, or by hand; and decoders to read them for."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quire.kernels import get_backend
from quire.lora.peft_adapter import read_adapter
from quire.models.hf_config import read_config
from quire.models.loader import load_model
from quire.models.registry import family_of

if TYPE_CHECKING:
    from quire.models.adapter import Adapter
    from quire.models.decoder import Decoder


def base_model(folder: Path) -> Any:
    """A model of one's own, as transformers loads it, float32."""
    return copy.deepcopy(_base_model(folder))


@functools.cache
def _base_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_adapter(
    model_folder: Path,
    folder: Path,
    *,
    seed: int = 0,
    size: float = 0.1,
    save_embedding_layers: bool | str = "auto",
    **config: Any,
) -> Path:
    """Have peft make an adapter with random values everywhere, and save it to `folder`.

    `config` goes to ``peft.LoraConfig``. What of the base model peft trains along with the
    adapter, biases and whole modules, is changed, too.
    """
    import peft

    model = base_model(model_folder)
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(seed)  # DoRA's magnitudes come from peft's own random values
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

    Parameters
    ----------
    modules
        Name of a module -> its outputs and inputs.
    config
        Fields of the configuration on top of the usual ones.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in modules.items():
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": sorted(module.removeprefix("model.") for module in modules),
        **config,
    }
    return settings, tensors


def write_files(folder: Path, config: Any, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write the two files of an adapter."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder
