"""Random adapters in peft's format: what a benchmark needs of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of attention and MLP, as most families call them."""
_SPREAD = 0.02


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What all random adapters of a run have in common.

    Attributes
    ----------
    base : Path
        The checkpoint that they are for.
    targets : dict of str to (int, int)
        Names of its modules, with their outputs and inputs.
    rank : int
    dtype : str
    """

    base: Path
    targets: dict[str, tuple[int, int]]
    rank: int
    dtype: str

    @classmethod
    def of(cls, base: Path, targets: Sequence[str], rank: int, dtype: str) -> AdapterShape:
        """Find the target modules in the headers of a checkpoint's safetensors files.

        Parameters
        ----------
        base : Path
        targets : sequence of str
            Last parts of modules' names.
        rank : int
        dtype : str

        Raises
        ------
        ValueError
            The checkpoint has no module of a name.
        """
        from safetensors import safe_open

        found: dict[str, tuple[int, int]] = {}
        for path in sorted(base.glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    module, _, kind = name.rpartition(".")
                    shape = file.get_slice(name).get_shape()
                    if kind == "weight" and len(shape) == 2 and module.split(".")[-1] in targets:
                        found[module] = (shape[0], shape[1])
        names = {module.split(".")[-1] for module in found}
        if missing := [target for target in targets if target not in names]:
            raise ValueError(f"{missing[0]!r}: {base} has no module of this name")
        return cls(base, dict(sorted(found.items())), rank, dtype)

    @property
    def num_bytes(self) -> int:
        """Of one adapter's matrices."""
        size = 4 if self.dtype == "float32" else 2
        return size * self.rank * sum(outs + ins for outs, ins in self.targets.values())

    def write(self, folder: Path, seed: int) -> Path:
        """Write one adapter; another seed is another content.

        Parameters
        ----------
        folder : Path
            Made if it is not there.
        seed : int

        Returns
        -------
        Path
            The folder.
        """
        import torch
        from safetensors.torch import save_file

        kind = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=generator) * _SPREAD).to(kind)

        tensors = {}
        for module, (outs, ins) in self.targets.items():
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = matrix(self.rank, ins)
            tensors[f"{key}.lora_B.weight"] = matrix(outs, self.rank)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self.base),
            "r": self.rank,
            "lora_alpha": 2 * self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": sorted({module.split(".")[-1] for module in self.targets}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        return folder
