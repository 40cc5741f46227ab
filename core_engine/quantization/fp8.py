"""Fp8: weights as float8_e4m3fn under scales of blocks, of outputs, or of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.kernels.quantized import QuantizedWeight
from quire.quantization.format import Kinds
from quire.quantization.module_names import SkippedModules
from quire.quantization.module_tensors import (
    FLOATS,
    finite,
    no_nan_codes,
    over_blocks,
    positive_scalar,
    tensor_of,
)
from quire.utils.checks import shown

_SCALES = ("weight_scale_inv", "weight_scale")
"""One and the same, in spite of the name: codes are multiplied with it."""
_INPUT_SCALES = ("input_scale", "activation_scale")
_CACHE_KINDS = frozenset(("k_scale", "v_scale", "output_scale"))
"""Scales of a key/value cache, where they hang on a projection; they are not read."""


def from_config(config: Mapping[str, Any]) -> Fp8:
    """Return the format that a ``quantization_config`` describes.

    Its ``quant_method`` is ``fp8``, or ``fbgemm_fp8`` with a scale per output.

    Raises
    ------
    UnsupportedModelError
        It asks for what is not offered.
    ModelLoadError
        It makes no sense.
    """
    scheme = config.get("activation_scheme") or "dynamic"
    if not isinstance(scheme, str) or scheme.lower() not in ("dynamic", "static"):
        raise ModelLoadError(
            f"activation_scheme is {shown(scheme)}; it must be 'dynamic' or 'static'"
        )
    form = config.get("fmt") or "e4m3"
    if form not in ("e4m3", "float8_e4m3fn"):
        raise UnsupportedModelError(f"fmt is {shown(form)}; weights of the type e4m3 are offered")
    form = config.get("scale_fmt") or "float"
    if form not in ("float", "ue8m0"):
        raise UnsupportedModelError(f"scale_fmt is {shown(form)}; 'float' is offered")
    if config.get("modules_to_convert"):
        raise UnsupportedModelError(
            f"modules_to_convert is {shown(config['modules_to_convert'])}, which is not offered: "
            "embeddings of 8 bits have no kernel"
        )
    block = config.get("weight_block_size")
    if block is not None and (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(type(each) is int and each > 0 for each in block)
    ):
        raise ModelLoadError(
            f"weight_block_size is {shown(block)}; it must be two numbers, such as [128, 128]"
        )
    skipped = SkippedModules(
        {name: config.get(name) for name in ("modules_to_not_convert", "ignored_layers")}
    )
    return Fp8(None if block is None else (block[0], block[1]), skipped)


class Fp8:
    """See `quire.quantization.format.WeightFormat`.

    Parameters
    ----------
    block
        Outputs and inputs that share a scale; None: the shape of the scales says it.
    skipped
        Modules that are not quantized.
    """

    name = "fp8"

    def __init__(self, block: tuple[int, int] | None, skipped: SkippedModules) -> None:
        self._block = block
        self._skipped = skipped

    def kinds(self, module: str) -> Kinds | None:
        """See `WeightFormat.kinds`."""
        if module in self._skipped:
            return None
        required = {"weight"}
        optional = {*_INPUT_SCALES, *_CACHE_KINDS, *_SCALES}
        if self._block is not None:
            required.add(_SCALES[0])
        return Kinds(frozenset(required), frozenset(optional - required))

    def read(
        self, module: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> QuantizedWeight:
        """See `WeightFormat.read`."""
        codes = tensor_of(
            tensors,
            "weight",
            (torch.float8_e4m3fn,),
            shape,
            hint="a module that is not quantized must be under 'modules_to_not_convert' or "
            "'ignored_layers' in the configuration",
        )
        for kind in _INPUT_SCALES:  # checked, and not applied: inputs stay as they are
            if kind in tensors:
                positive_scalar(tensors, kind)
        given = [kind for kind in _SCALES if kind in tensors]
        if len(given) != 1:
            raise ModelLoadError(
                f"{' and '.join(_SCALES)} are both {'there' if given else 'missing'}; one of them "
                "is needed"
            )
        kind = given[0]
        scales = finite(kind, tensor_of(tensors, kind, FLOATS))
        group_size = shape[1]
        if self._block is not None:
            scales = over_blocks(kind, scales, shape, self._block)
            group_size = min(self._block[1], shape[1])
        else:
            scales = _per_output(module, kind, scales, shape[0])
        return QuantizedWeight("fp8", no_nan_codes("weight", codes), scales, shape[1], group_size)


def _per_output(module: str, kind: str, scales: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """Scales of the whole, of each output, or of the parts that a module was fused of."""
    values = scales.flatten()
    if values.numel() == 1 or bool((values == values[0]).all()):
        return values[:1, None].repeat(num_outputs, 1)
    if tuple(scales.shape) in ((num_outputs,), (num_outputs, 1)):
        return values[:, None].contiguous()
    if values.numel() == 2 and module.endswith("gate_up_proj") and num_outputs % 2 == 0:
        return values.repeat_interleave(num_outputs // 2)[:, None].contiguous()
    raise ModelLoadError(
        f"{kind} has the shape {list(scales.shape)}; [], [1] or [{num_outputs}, 1] is needed, or "
        "weight_block_size in the configuration"
    )
