"""SqueezeLLM: codes of 3 or 4 bits into a table of each output's own, and a sparse part beside.

- ``qweight`` ``[words of in_features codes, out]``, see `quire.quantization.bits` for the words.
- ``lookup_table`` ``[out, 2**bits]``: what an output's codes mean.
- ``rows`` ``[out + 1]``, ``cols`` and ``vals``: values that are added to some places, in rows
  (CSR). ``startrows`` says where a GPU's threads begin in it, and is not read.
- ``full_rows`` ``[in, n]`` and ``full_row_indices`` ``[n]``: values that are added to all inputs of
  some outputs.

The method is Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization" (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quire.errors import ModelLoadError
from quire.kernels.quantized import Outliers, QuantizedWeight
from quire.quantization.bits import PANEL, halves, num_words, unpack
from quire.quantization.config_fields import ConfigFields
from quire.quantization.format import Kinds
from quire.quantization.modules import in_block
from quire.quantization.tensor_checks import FLOATS, finite, taken

_INTEGERS = (torch.int32, torch.int64)
_SPARSE = ("rows", "cols", "vals")
_FULL = ("full_rows", "full_row_indices")


class SqueezeLLM:
    """The format of one configuration.

    Parameters
    ----------
    bits : {3, 4}
    """

    name = "squeezellm"

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._kinds = Kinds(
            frozenset({"qweight", "lookup_table"}), frozenset({*_SPARSE, "startrows", *_FULL})
        )

    def kinds(self, module: str) -> Kinds | None:
        """See `quire.quantization.format.WeightFormat.kinds`."""
        return self._kinds if in_block(module) else None

    def read(
        self, module: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> QuantizedWeight:
        """See `quire.quantization.format.WeightFormat.read`."""
        out_features, in_features = shape
        bits = self.bits
        sizes = f"in_features {in_features}, out_features {out_features}, {bits} bits"
        deep = (num_words(in_features, bits), out_features)
        qweight = taken(tensors, "qweight", (torch.int32,), deep, sizes)
        lookup = taken(tensors, "lookup_table", FLOATS, (out_features, 1 << bits), sizes)
        codes = torch.empty(out_features, (in_features + 1) // 2, dtype=torch.uint8)
        for first in range(0, out_features, PANEL):
            panel = slice(first, first + PANEL)
            codes[panel] = halves(unpack(qweight[:, panel].t(), bits, in_features))
        table = torch.zeros(out_features, 16, dtype=torch.float32)
        table[:, : 1 << bits] = finite("lookup_table", lookup)
        return QuantizedWeight(
            kind="table4",
            codes=codes,
            scales=torch.ones(out_features, 1),
            in_features=in_features,
            group_size=in_features,
            table=table,
            outliers=_outliers(tensors, out_features, in_features),
        )


def _outliers(
    tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int
) -> Outliers | None:
    """Return both sparse parts as one, its places in order, and each once."""
    parts = []
    if _has(tensors, _SPARSE):
        parts.append(_sparse(tensors, out_features, in_features))
    if _has(tensors, _FULL):
        parts.append(_full(tensors, out_features, in_features))
    if not parts:
        return None
    places = torch.cat([part[0] for part in parts])
    values = torch.cat([part[1] for part in parts])
    if not len(places):
        return None
    places, index = torch.sort(places, stable=True)
    places, which = torch.unique_consecutive(places, return_inverse=True)
    sums = torch.zeros(len(places)).index_add_(0, which, values[index])
    rows = places // in_features
    first = torch.zeros(out_features + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(rows, minlength=out_features), 0, out=first[1:])
    return Outliers(first, (places % in_features).to(torch.int32), sums)


def _has(tensors: Mapping[str, torch.Tensor], kinds: tuple[str, ...]) -> bool:
    there = [kind for kind in kinds if kind in tensors]
    if there and len(there) < len(kinds):
        missing = ", ".join(kind for kind in kinds if kind not in tensors)
        raise ModelLoadError(f"{missing} missing; {', '.join(there)} mean nothing without")
    return bool(there)


_Entries = tuple[torch.Tensor, torch.Tensor]
"""Places ``row * in_features + column``, and their values."""


def _sparse(tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int) -> _Entries:
    count = tensors["vals"].numel()
    rows = taken(tensors, "rows", _INTEGERS, (out_features + 1,), f"out_features {out_features}")
    why = f"vals has {count} values"
    columns = taken(tensors, "cols", _INTEGERS, (count,), why).long()
    values = finite("vals", taken(tensors, "vals", FLOATS, (count,), why)).float()
    rows = rows.long()
    if int(rows[0]) != 0 or int(rows[-1]) != count or bool((rows[1:] < rows[:-1]).any()):
        raise ModelLoadError(
            f"rows goes from {int(rows[0])} to {int(rows[-1])}; it must ascend from 0 to the "
            f"{count} values that vals has"
        )
    _check_range("cols", columns, in_features, "inputs")
    row = torch.arange(out_features).repeat_interleave(rows.diff())
    return row * in_features + columns, values


def _full(tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int) -> _Entries:
    count = tensors["full_row_indices"].numel()
    why = f"in_features {in_features}, full_row_indices has {count}"
    indices = taken(tensors, "full_row_indices", _INTEGERS, (count,), why).long()
    full = taken(tensors, "full_rows", FLOATS, (in_features, count), why)
    _check_range("full_row_indices", indices, out_features, "outputs")
    values = finite("full_rows", full).t().flatten().float()
    places = (indices[:, None] * in_features + torch.arange(in_features)).flatten()
    kept = values != 0
    return places[kept], values[kept]


def _check_range(kind: str, values: torch.Tensor, size: int, what: str) -> None:
    if not len(values):
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= size:
        raise ModelLoadError(
            f"{kind} has values from {low} to {high}; with {size} {what} they must be from 0 to "
            f"{size - 1}"
        )


def from_config(config: Mapping[str, Any]) -> SqueezeLLM:
    """Return the format that a configuration describes.

    Parameters
    ----------
    config
        The ``quantization_config`` of a config.json, or a quant_config.json.

    Raises
    ------
    ModelLoadError
        A field is missing or makes no sense.
    UnsupportedModelError
        Other bits than can be read.
    """
    fields = ConfigFields(config, "SqueezeLLM's configuration")
    expected = "3 or 4 bits can be read"
    bits = fields.integer("wbits", "bits", expected=expected)
    if bits not in (3, 4):
        raise fields.unsupported(("wbits", "bits"), expected)
    return SqueezeLLM(bits)
