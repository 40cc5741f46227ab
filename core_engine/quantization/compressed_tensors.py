"""CompressedTensors: the format of llm-compressor, in integers or floats of 8 bits or less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quire.errors import ModelLoadError
from quire.kernels.quantized import QuantizedWeight
from quire.quantization.bits import halves, num_words, unpack
from quire.quantization.compressed_tensors_config import Scheme, Schemes
from quire.quantization.format import Kinds
from quire.quantization.module_tensors import (
    FLOATS,
    INTEGERS,
    finite,
    is_zero,
    no_nan_codes,
    over_blocks,
    positive_scalar,
    tensor_of,
)

_CACHE_KINDS = frozenset(("k_scale", "v_scale", "k_zero_point", "v_zero_point", "output_scale"))
"""Scales of a key/value cache, where they hang on a projection; they are not read."""

_PLAIN_HINT = "a module that is not quantized must be under 'ignore' in the configuration"


def from_config(config: Mapping[str, Any]) -> CompressedTensors:
    """Return the format that a ``quantization_config`` describes.

    Raises
    ------
    UnsupportedModelError
        It asks for what is not offered.
    ModelLoadError
        It makes no sense.
    """
    return CompressedTensors(Schemes(config))


class CompressedTensors:
    """See `quire.quantization.format.WeightFormat`.

    Parameters
    ----------
    schemes
        Of the modules.
    """

    name = "compressed-tensors"

    def __init__(self, schemes: Schemes) -> None:
        self._schemes = schemes

    def kinds(self, module: str) -> Kinds | None:
        """See `WeightFormat.kinds`."""
        scheme = self._schemes.of(module)
        if scheme is None:
            return None
        required = {"weight_scale"}
        optional = {"weight_zero_point", "input_scale", "input_zero_point", *_CACHE_KINDS}
        if scheme.packed:
            required |= {"weight_packed", "weight_shape"}
            (required if scheme.ordered else optional).add("weight_g_idx")
        else:
            required.add("weight")
        if not scheme.symmetric:
            required.add("weight_zero_point")
        if scheme.static and scheme.activations == "int8":
            required.add("input_scale")
        return Kinds(frozenset(required), frozenset(optional - required))

    def read(
        self, module: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> QuantizedWeight:
        """See `WeightFormat.read`."""
        scheme = self._schemes.of(module)
        if scheme is None:
            raise ModelLoadError("is under 'ignore', or no target of the configuration")
        step = _input_scale(tensors, scheme)
        scales, group_size = _scales(tensors, scheme, shape)
        if scheme.floating:
            codes = tensor_of(tensors, "weight", (torch.float8_e4m3fn,), shape, hint=_PLAIN_HINT)
            _no_zeros(tensors, "weight_zero_point")
            return QuantizedWeight(
                "fp8", no_nan_codes("weight", codes), scales, shape[1], group_size
            )
        zeros = _zeros(tensors, scheme, scales.shape)
        order = None
        if scheme.ordered or (scheme.strategy == "group" and "weight_g_idx" in tensors):
            order = _order(tensors, shape[1], group_size)
        if scheme.bits == 8 or not scheme.packed:
            return QuantizedWeight(
                "int8",
                _in_order(_bytes(tensors, scheme, shape), order),
                scales,
                shape[1],
                group_size,
                zeros=zeros,
                order=order,
                activations=scheme.activations,
                activation_scale=step if scheme.activations == "int8" else None,
            )
        packed = _packed(tensors, scheme, shape)
        if scheme.bits == 4 and order is None:  # as they are kept here
            codes = packed.view(torch.uint8)[:, : (shape[1] + 1) // 2].clone()
        else:
            values = _in_order(unpack(packed, scheme.bits, shape[1]), order)
            codes = halves(values + 6 if scheme.bits == 2 else values)
        return QuantizedWeight(
            "int4", codes, scales, shape[1], group_size, zeros=zeros, order=order
        )


def _in_order(codes: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return codes if order is None else codes[:, order]


def _bytes(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]
) -> torch.Tensor:
    """Codes of a byte each."""
    if scheme.packed:
        return (unpack(_packed(tensors, scheme, shape), 8, shape[1]) ^ 0x80).view(torch.int8)
    codes = tensor_of(tensors, "weight", (torch.int8,), shape, hint=_PLAIN_HINT)
    return codes.clone(memory_format=torch.contiguous_format)


def _packed(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]
) -> torch.Tensor:
    """Codes from 0 on, which stand for the lowest value on; several to an int32."""
    told = tensor_of(tensors, "weight_shape", (torch.int64, torch.int32), (2,)).tolist()
    if told != list(shape):
        raise ModelLoadError(
            f"weight_shape says {told}, the model's configuration needs {list(shape)}"
        )
    words = num_words(shape[1], scheme.bits)
    return tensor_of(tensors, "weight_packed", (torch.int32,), (shape[0], words)).contiguous()


def _scales(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]
) -> tuple[torch.Tensor, int]:
    """One for each group of each output, and the groups' size."""
    num_outputs, num_inputs = shape
    kind = "weight_scale"
    scales = finite(kind, tensor_of(tensors, kind, FLOATS))
    if scheme.strategy == "block":
        assert scheme.block is not None
        return over_blocks(kind, scales, shape, scheme.block), min(scheme.block[1], num_inputs)
    if scheme.strategy == "tensor":
        if scales.numel() != 1:
            raise ModelLoadError(
                f"{kind} has the shape {list(scales.shape)}, [1] is needed: the strategy is tensor"
            )
        return scales.reshape(1, 1).repeat(num_outputs, 1), num_inputs
    num_groups, group_size = 1, num_inputs
    if scheme.strategy == "group":
        group_size = scheme.group_size
        if num_inputs % group_size:
            raise ModelLoadError(
                f"group_size {group_size} does not divide the {num_inputs} inputs; the format "
                "needs groups of one size"
            )
        num_groups = num_inputs // group_size
    allowed: list[tuple[int, ...]] = [(num_outputs, num_groups)]
    if num_groups == 1:
        allowed.append((num_outputs,))
    if tuple(scales.shape) not in allowed:
        raise ModelLoadError(
            f"{kind} has the shape {list(scales.shape)}, {list(allowed[0])} is needed: the "
            f"strategy is {scheme.strategy}"
            + (f" with {group_size} inputs each" if scheme.strategy == "group" else "")
        )
    return scales.reshape(num_outputs, num_groups).contiguous(), group_size


def _zeros(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: torch.Size
) -> torch.Tensor | None:
    """As `QuantizedWeight` has them; None where all are the usual one."""
    kind = "weight_zero_point"
    if scheme.symmetric:
        _no_zeros(tensors, kind)
        return None
    usual = 8 if scheme.packed and scheme.bits != 8 else 0
    found = tensor_of(tensors, kind, INTEGERS)
    num_outputs, num_groups = shape
    # Packed only under these strategies, and by older writers not even there.
    packable = scheme.packed and scheme.strategy in ("channel", "group")
    if packable and found.dtype == torch.int32:
        words = num_words(num_outputs, scheme.bits)
        if tuple(found.shape) != (words, num_groups):
            raise ModelLoadError(
                f"{kind} has the shape {list(found.shape)}, {[words, num_groups]} is needed: "
                f"{scheme.bits} bits for each of {num_outputs} outputs, packed"
            )
        # A copy: one row turned counts as contiguous with strides that cannot be viewed as bytes.
        turned = found.t().clone(memory_format=torch.contiguous_format)
        zeros = unpack(turned, scheme.bits, num_outputs).t().to(torch.int16)
        zeros = zeros - (1 << (scheme.bits - 1))
    else:
        if scheme.strategy == "block":
            assert scheme.block is not None
            raise ModelLoadError(f"{kind} is not offered for blocks; symmetric ones have none")
        whole = scheme.strategy == "tensor" and found.numel() == 1
        allowed = [(num_outputs, num_groups), *([(num_outputs,)] if num_groups == 1 else [])]
        if not whole and tuple(found.shape) not in allowed:
            raise ModelLoadError(
                f"{kind} has the shape {list(found.shape)}, that of weight_scale is needed"
            )
        low, high = -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1
        if found.numel() and (found.min() < low or found.max() > high):
            raise ModelLoadError(
                f"{kind} has values from {int(found.min())} to {int(found.max())}; those of "
                f"{scheme.bits} bits are needed, {low} to {high}"
            )
        zeros = found.to(torch.int16).reshape(-1, num_groups).expand(num_outputs, num_groups)
    return None if is_zero(zeros) else (zeros + usual).contiguous()


def _no_zeros(tensors: Mapping[str, torch.Tensor], kind: str) -> None:
    """Some writers keep zero points that are 0."""
    if kind in tensors and not is_zero(tensors[kind]):
        raise ModelLoadError(
            f"{kind} has values other than 0, and the configuration says symmetric"
        )


def _order(
    tensors: Mapping[str, torch.Tensor], num_inputs: int, group_size: int
) -> torch.Tensor | None:
    kind = "weight_g_idx"
    groups = tensor_of(tensors, kind, (torch.int32, torch.int64), (num_inputs,)).long()
    if bool((groups == -1).all()):  # what it is made with: never set
        return None
    num_groups = num_inputs // group_size
    if groups.min() < 0 or groups.max() >= num_groups:
        raise ModelLoadError(
            f"{kind} has values from {int(groups.min())} to {int(groups.max())}; groups from 0 to "
            f"{num_groups - 1} are needed"
        )
    counts = groups.bincount(minlength=num_groups)
    if (counts != group_size).any():
        group = int((counts != group_size).nonzero()[0])
        raise ModelLoadError(
            f"{kind} gives group {group} {int(counts[group])} inputs, {group_size} are needed"
        )
    order = groups.argsort(stable=True)
    return None if torch.equal(order, torch.arange(num_inputs)) else order


def _input_scale(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> float | None:
    """Checked also where it is not used."""
    _no_zeros(tensors, "input_zero_point")
    if "input_scale" in tensors:
        return positive_scalar(tensors, "input_scale")
    if scheme.static and scheme.activations == "int8":
        tensor_of(tensors, "input_scale", FLOATS)
    return None
