"""AWQ: 4 bits with a scale and a zero point per group, as AutoAWQ writes them.

Two layouts are read, named by ``version``:

- ``gemm``: ``qweight`` ``[in, out / 8]``, ``qzeros`` ``[groups, out / 8]``, ``scales``
  ``[groups, out]``. Eight outputs are in a word, those of its halves of a byte from the lowest on
  being 0, 2, 4, 6, 1, 3, 5, 7.
- ``gemv``: ``qweight`` ``[out, in / 8]``, ``qzeros`` ``[out, width]``, ``scales``
  ``[out, 8 * width]``, in plain order, where ``width`` is the words that the groups take, rounded
  up (see `gemv_width`).

The value is ``(code - zero) * scale``. In some families the scales that make the method work sit
in the activation function before a layer instead of in that layer's weight: ``act_scales``
``[in]``, by which its inputs are divided first (see `owned_name`).

The method is Lin et al., "AWQ: Activation-aware Weight
Quantization for LLM Compression and Acceleration" (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quire.errors import UnsupportedModelError
from quire.kernels.quantized import QuantizedWeight
from quire.quantization.bits import unpack
from quire.quantization.config_fields import ConfigFields, group_size_of
from quire.quantization.format import Kinds
from quire.quantization.modules import in_block, is_head
from quire.quantization.tensor_checks import FLOATS, finite, num_groups, taken

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each half of a byte of a word is of, from the lowest on."""

_USUAL_ZERO = 8

_ACTIVATIONS = {
    ".ffn.act.scales": ".ffn.down_proj.act_scales",
    ".mlp.act.scales": ".mlp.dense_4h_to_h.act_scales",
}
"""Ends of the names of scales in activation functions, and of those under which they are read."""


class AWQ:
    """The format of one configuration.

    Parameters
    ----------
    group_size
        Inputs that share a scale; -1: all.
    version : {"gemm", "gemv"}
    zero_point
        Whether a module must have ``qzeros``. Without them, all zeros are 8.
    ignored
        Parts of names: a module whose name has one is not quantized.
    lm_head
        Whether the output layer is quantized, too.
    """

    name = "awq"

    def __init__(
        self,
        group_size: int,
        version: str = "gemm",
        zero_point: bool = True,
        ignored: tuple[str, ...] = (),
        lm_head: bool = False,
    ) -> None:
        self.group_size = group_size
        self.version = version
        self._ignored = ignored
        self._lm_head = lm_head
        required, optional = {"qweight", "scales"}, {"act_scales"}
        (required if zero_point else optional).add("qzeros")
        self._kinds = Kinds(frozenset(required), frozenset(optional))

    def kinds(self, module: str) -> Kinds | None:
        """See `quire.quantization.format.WeightFormat.kinds`."""
        if not in_block(module) and not (self._lm_head and is_head(module)):
            return None
        return None if any(part in module for part in self._ignored) else self._kinds

    def read(
        self, module: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> QuantizedWeight:
        """See `quire.quantization.format.WeightFormat.read`."""
        out_features, in_features = shape
        groups = num_groups(in_features, self.group_size)
        read = _read_gemv if self.version == "gemv" else _read_gemm
        codes, zeros, scales = read(tensors, out_features, in_features, groups)
        if zeros is not None and bool((zeros == _USUAL_ZERO).all()):
            zeros = None
        return QuantizedWeight(
            kind="int4",
            codes=codes,
            scales=finite("scales", scales),
            in_features=in_features,
            group_size=in_features // groups,
            zeros=zeros,
            input_factors=_input_factors(tensors, in_features),
        )


def owned_name(name: str) -> str | None:
    """Return under which name a tensor belongs to a quantized module, if not under its own.

    Parameters
    ----------
    name
        The checkpoint's, such as ``transformer.blocks.0.ffn.act.scales``: the layer after that
        activation function has it as its ``act_scales``.
    """
    for ending, owned in _ACTIVATIONS.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + owned
    return None


def _input_factors(tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor | None:
    if "act_scales" not in tensors:
        return None
    why = f"in_features {in_features}"
    factors = 1 / taken(tensors, "act_scales", FLOATS, (in_features,), why).float()
    return finite("1 / act_scales", factors)


_Parts = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


def _read_gemm(
    tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int, groups: int
) -> _Parts:
    if out_features % 8:
        raise UnsupportedModelError(
            f"a weight of {out_features} outputs cannot be in AWQ's gemm layout, which has eight "
            "in a word; leave the module unquantized (modules_to_not_convert), or take GPTQ"
        )
    sizes = f"in_features {in_features}, out_features {out_features}, {groups} groups"
    wide = (in_features, out_features // 8)
    qweight = taken(tensors, "qweight", (torch.int32,), wide, f"{sizes}, 8 outputs in a word")
    zeros = None
    if "qzeros" in tensors:
        shape = (groups, out_features // 8)
        qzeros = taken(tensors, "qzeros", (torch.int32,), shape, f"{sizes}, 8 outputs in a word")
        plain = unpack(qzeros, 4, out_features).reshape(groups, -1, 8)
        places = sorted(range(8), key=ORDER.__getitem__)
        zeros = plain[:, :, places].flatten(1).t().to(torch.int16).contiguous()
    scales = taken(tensors, "scales", FLOATS, (groups, out_features), sizes)
    return _gemm_codes(qweight), zeros, _turned(scales)


def _gemm_codes(qweight: torch.Tensor) -> torch.Tensor:
    words = qweight.t()
    if words.shape[1] % 2:
        words = torch.nn.functional.pad(words, (0, 1))
    # Each word has four bytes of two outputs; a byte of codes has two inputs of one output. All
    # four are taken at once.
    even, odd = words[:, 0::2].contiguous(), words[:, 1::2].contiguous()
    low = even & 0x0F0F0F0F | (odd & 0x0F0F0F0F) << 4
    high = even >> 4 & 0x0F0F0F0F | odd & -0x0F0F0F10
    codes = torch.empty(words.shape[0], 8, words.shape[1] // 2, dtype=torch.uint8)
    for byte in range(4):
        codes[:, ORDER[2 * byte]] = low.view(torch.uint8)[:, byte::4]
        codes[:, ORDER[2 * byte + 1]] = high.view(torch.uint8)[:, byte::4]
    return codes.flatten(0, 1)


def gemv_width(in_features: int, group_size: int) -> int:
    """Return the words that the zeros of an output take in the gemv layout.

    Its kernels read them in steps of 1, 2 or 4 words for groups of 128 or more, 64, and 32.
    """
    step = {32: 4, 64: 2}.get(group_size, 1)
    words = -(-(in_features // group_size) // 8)
    return -(-words // step) * step


def _read_gemv(
    tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int, groups: int
) -> _Parts:
    size = in_features // groups
    if in_features % 8 or (size not in (32, 64) and size < 128):
        raise UnsupportedModelError(
            f"a weight of {in_features} inputs in groups of {size} cannot be in AWQ's gemv "
            "layout, which has eight inputs in a word and groups of 32, 64, or 128 and more; take "
            "version 'gemm'"
        )
    width = gemv_width(in_features, size)
    sizes = f"out_features {out_features}, in_features {in_features}, groups of {size}"
    narrow = (out_features, in_features // 8)
    qweight = taken(tensors, "qweight", (torch.int32,), narrow, f"{sizes}, 8 inputs in a word")
    zeros = None
    if "qzeros" in tensors:
        shape = (out_features, width)
        qzeros = taken(tensors, "qzeros", (torch.int32,), shape, f"{sizes}, 8 groups in a word")
        zeros = unpack(qzeros, 4, groups).to(torch.int16)
    scales = taken(tensors, "scales", FLOATS, (out_features, width * 8), sizes)
    codes = qweight.contiguous().view(torch.uint8).clone()
    return codes, zeros, scales[:, :groups].to(torch.float32, copy=True).contiguous()


def _turned(values: torch.Tensor) -> torch.Tensor:
    """Return ``values.t()`` in float32, in memory of its own."""
    turned = torch.empty(values.shape[1], values.shape[0], dtype=torch.float32)
    return turned.copy_(values.t())


def from_config(config: Mapping[str, Any]) -> AWQ:
    """Return the format that a configuration describes.

    Parameters
    ----------
    config
        The ``quantization_config`` of a config.json, or a quant_config.json of older tools.

    Raises
    ------
    ModelLoadError
        A field is missing or makes no sense.
    UnsupportedModelError
        Other bits or another layout than can be read; the message says what would work.
    """
    fields = ConfigFields(config, "AWQ's configuration")
    bits = fields.integer("bits", "w_bit", expected="how many bits a weight has; 4 can be read")
    if bits != 4:
        raise fields.unsupported(("bits", "w_bit"), "AWQ is read in 4 bits; GPTQ in 2, 3, 4 or 8")
    sizes = ("group_size", "q_group_size")
    group_size = fields.integer(*sizes, expected="how many inputs share a scale, such as 128")
    layouts = ("version", "format", "checkpoint_format")
    version = fields.word(*layouts, default="gemm")
    if version not in ("gemm", "gemv"):
        raise fields.unsupported(
            layouts,
            "'gemm' and 'gemv' can be read. The others are made for one kind of device: take the "
            "model's gemm version, or quantize it again with version 'gemm'",
        )
    packed = fields.word("pack_dtype", default="int32")
    if packed != "int32":
        raise fields.unsupported(("pack_dtype",), "words of int32 can be read")
    return AWQ(
        group_size_of(group_size, "group_size", fields.where),
        version,
        zero_point=fields.flag("zero_point", default=True),
        ignored=fields.strings("modules_to_not_convert"),
        lm_head=fields.flag("lm_head", default=False),
    )
