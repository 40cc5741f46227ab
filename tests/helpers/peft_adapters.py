"""Random adapters of peft's own making, and a decoder with one of them in a slot."""

from __future__ import annotations

import functools
import warnings
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
    """The model as transformers loads it, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_adapter(
    model_folder: Path, folder: Path, *, seed: int = 0, size: float = 0.1, **config: Any
) -> Path:
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
        model.save_pretrained(folder, save_embedding_layers=config.get("save_embedding", "auto"))
    return folder


def _is_norm(name: str) -> bool:
    return any(part in name for part in ("norm", "ln_"))


def adapted_model(model_folder: Path, folder: Path, *, merged: bool = False) -> Any:
    """The model with an adapter, as peft applies it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base_model(model_folder), folder).eval()
        return model.merge_and_unload() if merged else model


@functools.cache
def decoder_of(model_folder: Path, max_adapters: int = 2, backend: str = "reference") -> Decoder:
    """A decoder with slots, float32; the same one for the same folder."""
    return load_model(
        model_folder,
        read_config(model_folder),
        device=torch.device("cpu"),
        dtype=torch.float32,
        kernels=get_backend("cpu", backend),
        max_adapters=max_adapters,
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


class OneSlot:
    """A decoder that computes everything with the adapter of one slot, for `PagedRunner`."""

    def __init__(self, decoder: Decoder, slot: int) -> None:
        self.weights = decoder.weights
        self.kv_cache_layers = decoder.kv_cache_layers
        self._decoder = decoder
        self._slot = slot

    def forward(self, batch: Any, kv_caches: Any) -> torch.Tensor:
        """See `Decoder.forward`."""
        batch.adapter_slots = torch.full((len(batch.input_ids),), self._slot, dtype=torch.int32)
        return self._decoder.forward(batch, kv_caches)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Decoder.compute_logits`."""
        slots = torch.full((len(hidden),), self._slot, dtype=torch.int32)
        return self._decoder.compute_logits(hidden, slots)
