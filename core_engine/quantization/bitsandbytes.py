"""BitsAndBytes: NF4 and FP4 in blocks of the flattened weight, and int8 with a scale per output."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.kernels.quantized import QuantizedWeight
from quire.quantization.bits import halves
from quire.quantization.format import Kinds
from quire.quantization.module_names import SkippedModules
from quire.quantization.module_tensors import FLOATS, finite, name_of, tensor_of
from quire.utils.checks import shown

_STATE = "weight.quant_state.bitsandbytes__"
_MOST_STATE_BYTES = 1 << 16
_HINT = "a module that is not quantized must be under 'llm_int8_skip_modules' in the configuration"


def from_config(config: Mapping[str, Any]) -> BitsAndBytes:
    """Return the format that a ``quantization_config`` describes.

    Raises
    ------
    UnsupportedModelError
        It asks for what is not offered.
    ModelLoadError
        It makes no sense.
    """
    four, eight = (_flag(config, f"load_in_{bits}bit") for bits in (4, 8))
    if four == eight:
        raise ModelLoadError(
            f"load_in_4bit and load_in_8bit are both {'true' if four else 'false'}; one of them "
            "must be true"
        )
    skipped = SkippedModules({"llm_int8_skip_modules": config.get("llm_int8_skip_modules")})
    if eight:
        if _flag(config, "llm_int8_has_fp16_weight"):
            raise UnsupportedModelError(
                "llm_int8_has_fp16_weight is true; weights in int8 are offered, where it is false"
            )
        return BitsAndBytes(None, skipped)
    quant_type = config.get("bnb_4bit_quant_type") or "fp4"
    if quant_type not in ("nf4", "fp4"):
        raise UnsupportedModelError(
            f"bnb_4bit_quant_type is {shown(quant_type)}; 'nf4' and 'fp4' are offered"
        )
    return BitsAndBytes(quant_type, skipped)


def _flag(config: Mapping[str, Any], field: str) -> bool:
    # What transformers saves has each of them twice, once with an underscore.
    value = config.get(field, config.get(f"_{field}"))
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ModelLoadError(f"{field} is {shown(value)}; it must be true or false")


class BitsAndBytes:
    """See `quire.quantization.format.WeightFormat`.

    Parameters
    ----------
    quant_type : {"nf4", "fp4"}, optional
        Of codes of 4 bits; None: they have 8.
    skipped
        Modules that are not quantized.
    """

    name = "bitsandbytes"

    def __init__(self, quant_type: str | None, skipped: SkippedModules) -> None:
        self._quant_type = quant_type
        self._skipped = skipped

    def kinds(self, module: str) -> Kinds | None:
        """See `WeightFormat.kinds`."""
        if module in self._skipped:
            return None
        if self._quant_type is None:
            return Kinds(frozenset(("weight", "SCB")), frozenset(("weight_format",)))
        return Kinds(
            frozenset(("weight", "weight.absmax", "weight.quant_map", _STATE + self._quant_type)),
            frozenset(("weight.nested_absmax", "weight.nested_quant_map")),
        )

    def read(
        self, module: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> QuantizedWeight:
        """See `WeightFormat.read`."""
        if self._quant_type is None:
            return _read_int8(tensors, shape)
        state = _State.read(tensors, self._quant_type, shape)
        size = math.prod(shape)
        packed = _packed(tensors, size)
        table = finite("weight.quant_map", tensor_of(tensors, "weight.quant_map", FLOATS, (16,)))
        absmax = _absmax(tensors, state, -(-size // state.block_size))
        # A block may go on in the next row: groups are then what divides both.
        group_size = math.gcd(shape[1], state.block_size)
        groups = torch.arange(0, size, group_size) // state.block_size
        return QuantizedWeight(
            "table4",
            _codes(packed, shape),
            absmax[groups].view(shape[0], -1),
            shape[1],
            group_size,
            table=table,
        )


def _read_int8(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> QuantizedWeight:
    codes = tensor_of(tensors, "weight", (torch.int8,), shape, hint=_HINT)
    scales = finite("SCB", tensor_of(tensors, "SCB", FLOATS, (shape[0],), (shape[0], 1)))
    if "weight_format" in tensors:
        form = tensor_of(tensors, "weight_format", (torch.uint8,))
        if form.numel() != 1 or form.item() != 0:
            raise ModelLoadError(
                f"weight_format is {form.tolist()}, a layout of some GPU; 0, row by row, is "
                "needed, which newer versions of bitsandbytes save"
            )
    return QuantizedWeight(
        "int8",
        codes.clone(memory_format=torch.contiguous_format),
        scales.view(-1, 1) / 127,
        shape[1],
        shape[1],
    )


@dataclass(frozen=True, slots=True)
class _State:
    """What a weight's JSON says.

    Attributes
    ----------
    block_size : int
        Values that share a scale.
    nested_block_size : int
        Scales that share one, where they are codes themselves; 0: they are not.
    nested_offset : float
        Added to such scales.
    """

    block_size: int
    nested_block_size: int = 0
    nested_offset: float = 0.0

    @staticmethod
    def read(
        tensors: Mapping[str, torch.Tensor], quant_type: str, shape: tuple[int, int]
    ) -> _State:
        kind = _STATE + quant_type
        raw = tensor_of(tensors, kind, (torch.uint8,))
        if raw.dim() != 1 or len(raw) > _MOST_STATE_BYTES:
            raise ModelLoadError(
                f"{kind} has the shape {list(raw.shape)}; the bytes of a JSON object are needed"
            )
        try:
            state = json.loads(bytes(raw.tolist()))
        except (ValueError, RecursionError) as error:
            raise ModelLoadError(f"{kind} is not valid JSON: {error}") from error
        if not isinstance(state, dict):
            raise ModelLoadError(f"{kind} holds a JSON {type(state).__name__}, not an object")
        if state.get("quant_type") != quant_type:
            raise ModelLoadError(
                f"{kind} has the quant_type {shown(state.get('quant_type'))}, {quant_type!r} is "
                "needed"
            )
        if state.get("shape") != list(shape):
            raise ModelLoadError(
                f"{kind} has the shape {shown(state.get('shape'))}, the model's configuration "
                f"needs {list(shape)}"
            )
        block_size = _size(kind, state, "blocksize")
        if "weight.nested_absmax" not in tensors:
            return _State(block_size)
        offset = state.get("nested_offset", 0.0)
        if (
            isinstance(offset, bool)
            or not isinstance(offset, (int, float))
            or not abs(offset) <= torch.finfo(torch.float32).max
        ):
            raise ModelLoadError(f"{kind} has the nested_offset {shown(offset)}, no finite number")
        return _State(block_size, _size(kind, state, "nested_blocksize"), float(offset))


def _size(kind: str, state: Mapping[str, Any], field: str) -> int:
    value = state.get(field)
    if type(value) is not int or not 1 <= value <= 1 << 31:
        raise ModelLoadError(f"{kind} has the {field} {shown(value)}; it must be such as 64")
    return value


def _packed(tensors: Mapping[str, torch.Tensor], size: int) -> torch.Tensor:
    """Bytes with two codes each."""
    weight = tensors.get("weight")
    if weight is None:
        raise ModelLoadError(f"weight is missing; there are {', '.join(sorted(tensors))}")
    num_bytes = (size + 1) // 2
    # Of any type, `bnb_4bit_quant_storage`: what counts is the bytes.
    if weight.nbytes != num_bytes:
        raise ModelLoadError(
            f"weight has the shape {list(weight.shape)} and the dtype {name_of(weight.dtype)}, "
            f"which are {weight.nbytes} bytes; {num_bytes} are needed, two codes in each"
            + (f"; {_HINT}" if weight.numel() == size else "")
        )
    return weight.contiguous().flatten().view(torch.uint8)


def _codes(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """From the first code in the high half of a byte to the first in the low half, row by row."""
    if shape[1] % 2 == 0:
        return (packed << 4 | packed >> 4).view(shape[0], -1)
    flat = torch.stack((packed >> 4, packed & 15), dim=1).flatten()
    return halves(flat[: math.prod(shape)].view(shape))


def _absmax(tensors: Mapping[str, torch.Tensor], state: _State, num_blocks: int) -> torch.Tensor:
    """The scale of each block, which may be a code itself."""
    kind = "weight.absmax"
    if not state.nested_block_size:
        hint = "codes need weight.nested_absmax and weight.nested_quant_map"
        return finite(kind, tensor_of(tensors, kind, FLOATS, (num_blocks,), hint=hint))
    codes = tensor_of(tensors, kind, (torch.uint8,), (num_blocks,))
    kind = "weight.nested_quant_map"
    table = finite(kind, tensor_of(tensors, kind, FLOATS, (256,)))
    kind = "weight.nested_absmax"
    num_scales = -(-num_blocks // state.nested_block_size)
    scales = finite(kind, tensor_of(tensors, kind, FLOATS, (num_scales,)))
    scales = scales[torch.arange(num_blocks) // state.nested_block_size]
    # In the order in which the format rounds.
    return finite("weight.absmax", (table[codes.long()] * scales).add_(state.nested_offset))
