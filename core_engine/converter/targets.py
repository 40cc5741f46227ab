"""Target: what a folder can be quantized to, and how each says so in tensors and config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quire.errors import ConfigError
from quire.kernels.quantized import QuantizedWeight
from quire.quantization.compressed_tensors_config import Scheme
from quire.quantization.pack import awq, compressed_tensors, gptq
from quire.quantization.rounding import Grid

NAMES = ("awq", "gptq", "int8", "w8a8", "int4", "fp8")
"""What ``--to`` takes."""

GROUP_SIZES = (128, 64, 32)
"""Columns that share a scale: what other engines have kernels for, as is one scale per output."""

WHOLE = -1
"""The group size that stands for one scale per output."""


@dataclass(frozen=True)
class Target:
    """What was asked for.

    Attributes
    ----------
    name
        One of `NAMES`.
    group_size
        For four bits; None: the largest of `GROUP_SIZES` that divides.
    symmetric
        For four bits; None: as is usual for the format.
    by_importance
        GPTQ's ``desc_act``.
    calibrated
        For int4: whether scales are to be activation-aware. AWQ and GPTQ always look at inputs.
    """

    name: str
    group_size: int | None = None
    symmetric: bool | None = None
    by_importance: bool = False
    calibrated: bool = False

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"--to must be one of {', '.join(NAMES)}, not {self.name!r:.100}")
        if not self.has_groups:
            for option, given in (
                ("--group-size", self.group_size is not None),
                ("--symmetric/--asymmetric", self.symmetric is not None),
                ("--calibration", self.calibrated),
            ):
                if given:
                    raise ConfigError(
                        f"{option} is for awq, gptq and int4; {self.name} is symmetric, with one "
                        "scale per output, and looks at no texts"
                    )
        if self.by_importance and self.name != "gptq":
            raise ConfigError(f"--desc-act is for gptq; {self.name} has columns in their own order")
        if self.group_size is not None and self.group_size not in (*GROUP_SIZES, WHOLE):
            raise ConfigError(
                f"--group-size must be one of {', '.join(map(str, GROUP_SIZES))}, or -1 for one "
                f"scale per output, not {self.group_size}"
            )

    @property
    def has_groups(self) -> bool:
        """Whether it has four bits."""
        return self.name in ("awq", "gptq", "int4")

    @property
    def needs_inputs(self) -> bool:
        """Whether the model has to be run."""
        return self.name in ("awq", "gptq") or self.calibrated

    @property
    def is_symmetric(self) -> bool:
        """Whether zeros are in the middle of the codes.

        Usual is what every reader of the format knows: transformers has no room for the zeros of
        compressed-tensors where they are packed (5.23 with compressed-tensors 0.20).
        """
        return self.name != "awq" if self.symmetric is None else self.symmetric

    def plain_dtype(self, source: torch.dtype) -> torch.dtype:
        """Return the type of matrices that stay as they are, where weights were of type `source`.

        Scales of AWQ and GPTQ are float16, and so is what their readers compute with.
        """
        return torch.float16 if self.name in ("awq", "gptq") else source

    def scale_dtype(self, source: torch.dtype) -> torch.dtype:
        """Return the type of scales, for weights that were of type `source`."""
        plain = self.plain_dtype(source)
        return torch.float32 if plain == torch.float64 else plain

    def grid(self, group_size: int, source: torch.dtype) -> Grid:
        """Return the meaning of four bits' codes; `group_size` may be `WHOLE`."""
        return Grid(
            group_size if group_size != WHOLE else 1 << 30,
            symmetric=self.is_symmetric,
            scale_dtype=self.scale_dtype(source),
            # The first version of GPTQ's format stores one less than a zero, in four bits.
            lowest_zero=1 if self.name == "gptq" else 0,
        )

    def tensors(self, weight: QuantizedWeight, source: torch.dtype) -> Mapping[str, torch.Tensor]:
        """Return a weight's tensors by what follows the module's name and a dot."""
        if self.name == "awq":
            return awq.awq_tensors(weight)
        if self.name == "gptq":
            return gptq.gptq_tensors(weight)
        return compressed_tensors.tensors_of(weight, self.scale_dtype(source))

    def config(
        self, schemes: Mapping[str, Scheme], group_size: int, plain: Sequence[str]
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` of config.json.

        Parameters
        ----------
        schemes
            Of the quantized modules, by the checkpoint's names.
        group_size
            Of four bits.
        plain
            Modules that stay as they are.
        """
        if self.name == "awq":
            # Also where all zeros are 8: they are written.
            return awq.awq_config(group_size, modules_to_not_convert=plain)
        if self.name == "gptq":
            return gptq.gptq_config(
                4, group_size, sym=self.is_symmetric, desc_act=self.by_importance
            )
        return compressed_tensors.quantization_config(schemes, plain)
