"""Shard: a rank's part of a model, loaded, and the settings that another process loads its by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quire.engine.memory_profile import StepSize, TorchMemory, measure_step
from quire.errors import ConfigError
from quire.kernels import get_backend
from quire.kernels.attention.choice import with_attention
from quire.models.loader import load_model
from quire.parallel.place import Place
from quire.quantization import registry
from quire.utils.device import count_devices, make_current, memory_info
from quire.utils.out_of_memory import named_out_of_memory

if TYPE_CHECKING:
    from quire.kernels import Backend
    from quire.models.decoder import Decoder
    from quire.parallel.group import Group
    from quire.quantization.format import Quantizer, WeightFormat


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """Which model is loaded, and how: plain values, the same for all ranks.

    Attributes
    ----------
    path : str
        The model's folder.
    hf_config : dict
        Its configuration, overrides applied.
    dtype : str
    device_type : str
        ``"cpu"``, or what torch calls an accelerator; of several such devices each rank of a
        machine takes its own.
    quantization : str or None
    quantization_config : dict or None
    load_format : str
    max_model_len : int or None
    max_adapters : int
    num_threads : int
        Of each rank, on a CPU.
    tensor_size, num_stages : int
    expert_parallel : bool
    num_replicas : int
        Copies of the model that the machine's cores are divided among, of which this is the
        first; 1 where the process that starts the ranks keeps to its share already.
    step : dict or None
        The fields of the `StepSize` that an accelerator's memory must have room for.
    attention : str or None
        Who computes attention, where it is not the device's kernels.
    """

    path: str
    hf_config: dict[str, Any]
    dtype: str
    device_type: str
    quantization: str | None
    quantization_config: dict[str, Any] | None
    max_model_len: int | None
    max_adapters: int
    num_threads: int
    tensor_size: int
    num_stages: int
    expert_parallel: bool
    num_replicas: int = 1
    step: dict[str, Any] | None = None
    attention: str | None = None
    load_format: str = "auto"

    def to_message(self) -> dict[str, Any]:
        """Return the fields by their names."""
        return dataclasses.asdict(self)

    def place(self, rank: int) -> Place:
        """Return where a rank stands."""
        return Place.of_rank(rank, self.tensor_size, self.num_stages, self.expert_parallel)

    def device(self, rank: int) -> torch.device:
        """Return what a rank computes on.

        Raises
        ------
        ConfigError
            There are fewer devices than ranks.
        """
        if self.device_type == "cpu":
            return torch.device("cpu")
        count = count_devices(self.device_type)
        if rank >= count:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_size} times pipeline_parallel_size="
                f"{self.num_stages} need {self.tensor_size * self.num_stages} devices, and torch "
                f"finds {count} of type {self.device_type!r} here"
            )
        return torch.device(self.device_type, rank)

    def kernels(self, device: torch.device) -> Backend:
        """Return the operations that a rank computes by; always the same object."""
        kernels = get_backend(device)
        if self.attention is None:
            return kernels
        return with_attention(kernels, self.attention, device)

    def how_quantized(self) -> tuple[WeightFormat | None, Quantizer | None]:
        """Return the format of the checkpoint's codes, or what makes codes of plain weights."""
        return registry.choose(
            self.quantization,
            self.quantization_config,
            registry.config_of(Path(self.path), self.hf_config),
        )


def load_shard(
    settings: ShardSettings,
    place: Place,
    group: Group | None,
    device: torch.device,
    how: tuple[WeightFormat | None, Quantizer | None] | None = None,
) -> Decoder:
    """Load a rank's part of a model.

    Parameters
    ----------
    settings
    place
    group
        The stage's ranks; None where it has one.
    device
    how
        What `ShardSettings.how_quantized` returned; None: it is asked.

    Raises
    ------
    ConfigError
        The model cannot be divided so.
    ModelLoadError, OutOfMemoryError
        See `quire.models.loader.load_model`.
    """
    make_current(device)
    weight_format, quantizer = settings.how_quantized() if how is None else how
    with named_out_of_memory(
        "the model's weights",
        device,
        "take quantization=, a dtype of fewer bytes, a higher tensor_parallel_size, or end what "
        "else is on the device",
    ):
        return load_model(
            Path(settings.path),
            settings.hf_config,
            device=device,
            dtype=getattr(torch, settings.dtype),
            kernels=settings.kernels(device),
            max_model_len=settings.max_model_len,
            max_adapters=settings.max_adapters,
            weight_format=weight_format,
            quantizer=quantizer,
            load_format=settings.load_format,
            place=place,
            group=group,
        )


def describe(
    model: Decoder, device: torch.device, settings: ShardSettings | None = None
) -> dict[str, Any]:
    """Return what the engine's process must know of a rank's part of the model.

    On an accelerator, all ranks compute the largest step for that, if settings say which it is.
    """
    free = total = None
    step_bytes = 0
    if device.type != "cpu":
        step = None if settings is None else settings.step
        if settings is not None and step is not None:
            with named_out_of_memory(
                f"a step of {step['num_tokens']} tokens and {step['num_seqs']} sequences",
                device,
                f"lower max_num_batched_tokens={step['num_tokens']} or max_num_seqs="
                f"{step['num_seqs']}, or take quantization= or a higher tensor_parallel_size",
            ):
                step_bytes = measure_step(
                    model, settings.kernels(device), StepSize(**step), TorchMemory(device), device
                )
        free, total = memory_info(device)
    return {
        "weight_bytes": model.weight_bytes(),
        "kv_cache_layers": [list(each) for each in model.kv_cache_layers()],
        "free_bytes": free,
        "total_bytes": total,
        "step_bytes": step_bytes,
    }
