"""Quantizers: from plain weights to codes, while a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from quire.errors import ConfigError
from quire.kernels.quantized import QuantizedWeight
from quire.quantization import options as read
from quire.quantization.activation_aware import Found, search
from quire.quantization.format import Quantizer
from quire.quantization.rounding import Grid, round_fp8, round_int4, round_int8, round_nf4

HEAD = "lm_head"
"""The output matrix's name."""

_GROUP_SIZES = (128, 64, 32)


class CalibratedQuantizer(Quantizer, Protocol):
    """A quantizer that may look at what the projections' inputs are, before it is used.

    Attributes
    ----------
    prompts : tuple of str or of tuples of token ids
        What to run the plain model on, see `quire.models.calibration.calibrate`; none: no
        calibration was asked for.
    """

    @property
    def prompts(self) -> tuple[read.Prompt, ...]: ...  # noqa: D102

    def observe(self, name: str, weights: Sequence[torch.Tensor], inputs: torch.Tensor) -> None:
        """Take note of a projection's inputs; called before the first `quantize` of it.

        Parameters
        ----------
        name
            The decoder's, of the whole fused projection: ``layers.0.attention.qkv``.
        weights : sequence of Tensor[out_features, in_features]
            Of all its parts.
        inputs : Tensor[num_tokens, in_features], float32
        """


class Rounded:
    """Every weight by itself: ``"int8"``, ``"w8a8"``, ``"fp8"``, ``"nf4"`` and ``"bitsandbytes"``.

    Parameters
    ----------
    name
        The method's.
    round_weight
        What makes codes of a weight.
    heads
        What ``lm_head`` may be in the options, the default first: ``"int8"``, the method's own
        kind, or None, as it is. The output matrix's inputs are never rounded.
    options
        ``lm_head`` and ``ignore`` (see `Patterns`).
    """

    def __init__(
        self,
        name: str,
        round_weight: Callable[[torch.Tensor], QuantizedWeight],
        heads: tuple[str | None, ...],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._round = round_weight
        checked = read.check_names(name, options, ("lm_head", "ignore"))
        self._head = read.choice(checked, "lm_head", heads, heads[0])
        self.ignored = read.Patterns.read(checked)

    def quantize(self, name: str, weight: torch.Tensor) -> QuantizedWeight | None:
        """See `Quantizer.quantize`."""
        if self.ignored.match(name) or (name == HEAD and self._head is None):
            return None
        if name == HEAD and self._head == "int8":
            return round_int8(weight)
        return self._round(weight)


class Int4:
    """4 bits in groups of columns, each with a scale and a zero.

    Parameters
    ----------
    options
        ``group_size`` (None: 128, 64 or 32, whichever divides, or the largest that does),
        ``symmetric`` (False), ``clip`` (True: ranges are searched), ``lm_head`` (``"int8"``,
        ``"int4"`` or None: as it is), ``ignore`` (see `Patterns`), ``calibration`` (prompts for
        activation-aware scales; none by default).
    """

    name = "int4"

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        known = ("group_size", "symmetric", "clip", "lm_head", "ignore", "calibration")
        checked = read.check_names(self.name, options, known)
        self._group_size = read.group_size(checked)
        self._grid = Grid(
            _GROUP_SIZES[0],
            symmetric=read.flag(checked, "symmetric", False),
            clip=read.flag(checked, "clip", True),
        )
        self._head = read.choice(checked, "lm_head", ("int8", "int4", None), "int8")
        self.ignored = read.Patterns.read(checked)
        self.prompts = read.prompts(checked)
        self._found: dict[str, Found] = {}

    def observe(self, name: str, weights: Sequence[torch.Tensor], inputs: torch.Tensor) -> None:
        """See `CalibratedQuantizer.observe`."""
        if not self.ignored.match(name):
            grid = self._grid_of(name, inputs.shape[1])
            self._found[name] = search(list(weights), inputs, grid)

    def quantize(self, name: str, weight: torch.Tensor) -> QuantizedWeight | None:
        """See `Quantizer.quantize`."""
        if self.ignored.match(name) or (name == HEAD and self._head is None):
            return None
        if name == HEAD and self._head == "int8":
            return round_int8(weight)
        # A part of a fused projection has what was found for the whole: they share their input.
        found = self._found.get(name) or self._found.get(name.rpartition(".")[0])
        grid = self._grid_of(name, weight.shape[1])
        if found is None:
            return round_int4(weight, grid)
        return round_int4(weight, grid, found.factors, found.importance)

    def _grid_of(self, name: str, in_features: int) -> Grid:
        return replace(self._grid, group_size=fitting_group(name, in_features, self._group_size))


def fitting_group(name: str, in_features: int, asked: int | None) -> int:
    """Return the columns of a weight that share a scale.

    Parameters
    ----------
    name
        For the message.
    in_features
        Columns that there are.
    asked
        None: 128, 64 or 32, the largest multiple of 8 up to 128 that divides, or, where there is
        none, 128 with fewer columns in the last group.

    Raises
    ------
    ConfigError
        The size that was asked for does not divide.
    """
    sizes = [*_GROUP_SIZES, *range(_GROUP_SIZES[0], 15, -8)]
    fitting = [size for size in sizes if in_features % size == 0]
    if asked is None:
        return fitting[0] if fitting else _GROUP_SIZES[0]
    if in_features % asked:
        better = f"{fitting[0]} does" if fitting else "no size that is offered does"
        raise ConfigError(
            f"{read.FIELD}['group_size'] is {asked}, which does not divide the {in_features} "
            f"inputs of {name}; {better}. Leave it out, or name the module in "
            f"{read.FIELD}['ignore']"
        )
    return asked


QUANTIZERS: dict[str, Callable[[Mapping[str, Any] | None], Quantizer]] = {
    "int8": partial(Rounded, "int8", round_int8, ("int8", None)),
    "w8a8": partial(Rounded, "w8a8", partial(round_int8, activations="int8"), ("int8", None)),
    "int4": Int4,
    "fp8": partial(Rounded, "fp8", round_fp8, ("fp8", "int8", None)),
    # The 4-bit NormalFloat in blocks of 64: what bitsandbytes makes of a plain model.
    "nf4": partial(Rounded, "nf4", round_nf4, (None, "nf4", "int8")),
    "bitsandbytes": partial(Rounded, "bitsandbytes", round_nf4, (None, "nf4", "int8")),
}
"""What makes a quantizer of options (``quantization_config``), by what ``quantization=`` says.

Each raises ConfigError for options that it does not take.
"""
