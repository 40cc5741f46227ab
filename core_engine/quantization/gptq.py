"""GPTQ: 2, 3, 4 or 8 bits with a scale and a zero point per group, as AutoGPTQ writes them.

``qweight`` is ``[words of in_features codes, out]``, ``qzeros`` ``[groups, words of out_features
codes]`` (see `quire.quantization.bits` for the words), ``scales`` ``[groups, out]``, and ``g_idx``
``[in]`` says of which group an input is, where that is not ``input // group_size``. The value is
``(code - zero) * scale``. What is stored of a zero is ``zero - 1`` where ``checkpoint_format`` is
"gptq", the zero itself where it is "gptq_v2". A zero of 0, which the first has no room for, wraps
around to the largest code there, and is read back as 0.

The method is Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quire.errors import ModelLoadError
from quire.kernels.quantized import QuantizedWeight
from quire.quantization.bits import PANEL, halves, num_words, unpack
from quire.quantization.config_fields import ConfigFields
from quire.quantization.format import Kinds
from quire.quantization.gptq_rules import GPTQRules, ModuleSettings
from quire.quantization.tensor_checks import FLOATS, finite, num_groups, taken


class GPTQ:
    """The format of one configuration.

    Parameters
    ----------
    rules
        Which modules are quantized, and how each is.
    zero_offset : {0, 1}
        What is added to a stored zero: 1 in the first version of the format.
    """

    name = "gptq"

    def __init__(self, rules: GPTQRules, zero_offset: int = 1) -> None:
        self.rules = rules
        self.zero_offset = zero_offset

    def kinds(self, module: str) -> Kinds | None:
        """See `quire.quantization.format.WeightFormat.kinds`."""
        settings = self.rules.settings(module)
        if settings is None:
            return None
        required, optional = {"qweight", "scales"}, set[str]()
        (optional if settings.sym else required).add("qzeros")
        (required if settings.needs_order else optional).add("g_idx")
        return Kinds(frozenset(required), frozenset(optional))

    def read(
        self, module: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> QuantizedWeight:
        """See `quire.quantization.format.WeightFormat.read`."""
        settings = self.rules.settings(module)
        if settings is None:
            raise ModelLoadError("the configuration says that it is not quantized")
        out_features, in_features = shape
        bits, groups = settings.bits, num_groups(in_features, settings.group_size)
        sizes = f"in_features {in_features}, out_features {out_features}, {bits} bits"
        deep = (num_words(in_features, bits), out_features)
        qweight = taken(tensors, "qweight", (torch.int32,), deep, sizes)
        scales = taken(
            tensors, "scales", FLOATS, (groups, out_features), f"{sizes}, {groups} groups"
        )
        order = _order(tensors, in_features, groups)
        zeros = self._zeros(tensors, settings, out_features, groups)
        codes = _codes(qweight, bits, in_features, order)
        turned = torch.empty(out_features, groups, dtype=torch.float32).copy_(scales.t())
        return QuantizedWeight(
            kind="int8" if bits == 8 else "int4",
            codes=codes,
            scales=finite("scales", turned),
            in_features=in_features,
            group_size=in_features // groups,
            zeros=_kept_zeros(zeros, codes, bits),
            order=order,
        )

    def _zeros(
        self,
        tensors: Mapping[str, torch.Tensor],
        settings: ModuleSettings,
        out_features: int,
        groups: int,
    ) -> torch.Tensor:
        """Return the zeros as they stand against codes from 0 on, ``[out, groups]``."""
        bits = settings.bits
        if "qzeros" not in tensors and settings.sym:
            return torch.full((out_features, groups), 1 << bits - 1, dtype=torch.int16)
        shape = (groups, num_words(out_features, bits))
        sizes = f"out_features {out_features}, {groups} groups, {bits} bits"
        qzeros = taken(tensors, "qzeros", (torch.int32,), shape, sizes)
        stored = unpack(qzeros, bits, out_features).to(torch.int16)
        mask = (1 << bits) - 1
        return (stored + self.zero_offset & mask).t().contiguous()


def _codes(
    qweight: torch.Tensor, bits: int, in_features: int, order: torch.Tensor | None
) -> torch.Tensor:
    if bits == 4 and order is None and in_features % 8 == 0:
        words = qweight.t().clone(memory_format=torch.contiguous_format)
        return words.view(torch.uint8)  # as they are
    out_features = qweight.shape[1]
    width, dtype = (in_features, torch.int8) if bits == 8 else ((in_features + 1) // 2, torch.uint8)
    result = torch.empty(out_features, width, dtype=dtype)
    for first in range(0, out_features, PANEL):
        panel = slice(first, first + PANEL)
        plain = unpack(qweight[:, panel].t(), bits, in_features)
        if order is not None:
            plain = plain[:, order]
        result[panel] = (plain ^ 128).view(torch.int8) if bits == 8 else halves(plain)
    return result


def _kept_zeros(zeros: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor | None:
    """Return zeros as `QuantizedWeight` has them; `codes` are moved where that saves them."""
    first = int(zeros[0, 0])
    uniform = bool((zeros == first).all())
    if bits == 8:
        return None if uniform and first == 128 else zeros - 128
    if uniform and (first == 8 or bits < 4):
        codes += (8 - first) * 0x11
        return None
    return zeros


def _order(
    tensors: Mapping[str, torch.Tensor], in_features: int, groups: int
) -> torch.Tensor | None:
    """Return the inputs sorted by their groups; None where they are so already."""
    if "g_idx" not in tensors:
        return None
    g_idx = taken(
        tensors, "g_idx", (torch.int32, torch.int64), (in_features,), f"in_features {in_features}"
    ).long()
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise ModelLoadError(
            f"g_idx has groups from {low} to {high}; with {in_features} inputs in groups of "
            f"{in_features // groups} they must be from 0 to {groups - 1}"
        )
    # Writers that know no order leave zeros.
    if high == 0 or bool((g_idx[1:] >= g_idx[:-1]).all()):
        order = None
    else:
        order = torch.argsort(g_idx, stable=True)
    if high:
        counts = torch.bincount(g_idx, minlength=groups)
        wrong = counts != in_features // groups
        if bool(wrong.any()):
            group = int(wrong.nonzero()[0])
            raise ModelLoadError(
                f"g_idx gives {int(counts[group])} inputs to group {group}; each of the {groups} "
                f"groups must have {in_features // groups}"
            )
    return order


def from_config(config: Mapping[str, Any]) -> GPTQ:
    """Return the format that a configuration describes.

    Parameters
    ----------
    config
        The ``quantization_config`` of a config.json, or a quantize_config.json of older tools.

    Raises
    ------
    ModelLoadError
        A field is missing or makes no sense.
    UnsupportedModelError
        Bits, words or a layout that cannot be read; the message says what would work.
    """
    fields = ConfigFields(config, "GPTQ's configuration")
    versions = ("checkpoint_format", "format")
    version = fields.word(*versions, default="gptq")
    if version not in ("gptq", "gptq_v2"):
        raise fields.unsupported(
            versions,
            "'gptq' and 'gptq_v2' can be read. The others are made for one kind of device: take "
            "the model as it was before it was repacked, or quantize it again",
        )
    if fields.flag("is_marlin_format", default=False):
        raise fields.unsupported(
            ("is_marlin_format",),
            "weights repacked for Marlin cannot be read; take the model's plain GPTQ version",
        )
    packed = fields.word("pack_dtype", default="int32").removeprefix("torch.")
    if packed != "int32":
        raise fields.unsupported(
            ("pack_dtype",), "words of int32 can be read: quantize it again with pack_dtype 'int32'"
        )
    if fields.value("adapter"):
        raise fields.unsupported(
            ("adapter",),
            "an adapter inside a quantized checkpoint cannot be read: quantize it without one",
        )
    return GPTQ(GPTQRules(fields), zero_offset=1 if version == "gptq" else 0)
