"""Scheme: how compressed-tensors keeps the weights of some modules, as its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.kernels.quantized import Activations
from quire.quantization.module_names import Targets, names_in
from quire.utils.checks import shown

Strategy = Literal["tensor", "channel", "group", "block"]

_STRATEGIES: dict[str, Strategy] = {
    "tensor": "tensor", "channel": "channel", "group": "group", "block": "block"
}  # fmt: skip
_PACKED = "pack-quantized"
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
_MIXED = "mixed-precision"
_OFFERED = f"offered are {_PACKED}, {', '.join(_PLAIN)} and {_MIXED} of these"
_PACKED_BITS = (2, 4, 8)

_FIELDS = frozenset(
    ("config_groups", "dequantize", "format", "global_compression_ratio", "ignore",
     "kv_cache_scheme", "packed_modules_mapping", "quant_method", "quantization_status",
     "run_compressed", "sparsity_config", "transform_config", "version")
)  # fmt: skip
_GROUP_FIELDS = frozenset(
    ("format", "input_activations", "output_activations", "targets", "weights")
)
_ARGUMENTS = frozenset(
    ("actorder", "block_structure", "dynamic", "group_size", "num_bits", "observer",
     "observer_kwargs", "scale_dtype", "strategy", "symmetric", "type", "zp_dtype")
)  # fmt: skip
_SCALE_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some modules are kept.

    Attributes
    ----------
    packed
        Integers in as many bits as they have, beside each other in int32; else int8 or fp8 each.
    bits : int
    floating
        float8_e4m3fn, and not integers.
    strategy : {"tensor", "channel", "group", "block"}
        What shares a scale: the whole weight, an output, some inputs of an output, a block of both.
    group_size : int
        Of ``"group"``.
    block : tuple of int, optional
        Outputs and inputs of ``"block"``.
    symmetric
        No zero points are kept.
    ordered
        ``weight_g_idx`` says which group each input belongs to.
    activations : {"float", "int8"}
        See `quire.kernels.quantized.QuantizedWeight`.
    static
        Inputs have a fixed scale, ``input_scale``.
    """

    packed: bool
    bits: int
    floating: bool = False
    strategy: Strategy = "channel"
    group_size: int = 0
    block: tuple[int, int] | None = None
    symmetric: bool = True
    ordered: bool = False
    activations: Activations = "float"
    static: bool = False

    @property
    def format(self) -> str:
        """The format's name."""
        if self.packed:
            return _PACKED
        return "float-quantized" if self.floating else "int-quantized"

    def as_group(self, targets: list[str]) -> dict[str, Any]:
        """Return it as an entry of ``config_groups``."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "float" if self.floating else "int",
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": self.group_size or None,
            "dynamic": False,
        }
        inputs: dict[str, Any] | None = None
        if self.activations == "int8":
            inputs = {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "tensor" if self.static else "token",
                "group_size": None,
                "dynamic": not self.static,
            }
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }


class Schemes:
    """What each module's scheme is.

    Parameters
    ----------
    config
        The ``quantization_config`` of config.json.

    Raises
    ------
    UnsupportedModelError
        It asks for what is not offered.
    ModelLoadError
        It makes no sense.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        _check_rest("quantization_config", config, _FIELDS)
        for field in ("sparsity_config", "transform_config"):
            _refuse_unless_empty(config, field)
        form = _format("format", config.get("format", "dense"))
        groups = _object("config_groups", config.get("config_groups"))
        self._schemes: dict[str, Scheme | None] = {}
        for name, group in groups.items():
            where = f"config_groups.{str(name)[:100]}"
            group = _object(where, group)
            _check_rest(where, group, _GROUP_FIELDS)
            scheme = _scheme(where, group, _format(f"{where}.format", group.get("format") or form))
            for target in names_in(f"{where}.targets", group.get("targets")):
                self._schemes[target] = scheme
        if not self._schemes:
            raise ModelLoadError(
                "config_groups names no targets; it must say which modules are quantized, and how"
            )
        self._targets = Targets("targets of config_groups", self._schemes)
        self._ignored = Targets("ignore", names_in("ignore", config.get("ignore")))
        cache = config.get("kv_cache_scheme")
        if cache is not None:  # the scales of the cache's rows are the engine's own
            _object("kv_cache_scheme", cache)

    def of(self, module: str) -> Scheme | None:
        """Return a module's scheme; None: it is not quantized."""
        target = self._targets.match(module)
        if target is None or self._ignored.match(module) is not None:
            return None
        return self._schemes[target]


def _scheme(where: str, group: Mapping[str, Any], form: str) -> Scheme | None:
    if group.get("output_activations") is not None:
        raise UnsupportedModelError(
            f"{where}.output_activations is not offered; only inputs of a projection are rounded"
        )
    if group.get("weights") is None:
        if group.get("input_activations") is not None:
            raise UnsupportedModelError(
                f"{where} rounds inputs of weights that it leaves as they are, which is not offered"
            )
        return None
    inner = f"{where}.weights"
    weights = _object(inner, group["weights"])
    _check_rest(inner, weights, _ARGUMENTS)
    bits, floating = _number_type(inner, weights)
    if _flag(f"{inner}.dynamic", weights.get("dynamic")):
        raise UnsupportedModelError(f"{inner}.dynamic must be false: weights have fixed scales")
    packed = form == _PACKED
    if form == _MIXED:
        packed = not floating and group.get("input_activations") is None
    if packed and (floating or bits not in _PACKED_BITS):
        raise UnsupportedModelError(
            f"{inner} has {bits} bits of type {'float' if floating else 'int'} packed, which is "
            "not offered; packed are integers of 2, 4 or 8 bits"
        )
    if floating and bits != 8:
        raise UnsupportedModelError(
            f"{inner} has floats of {bits} bits (NVFP4, MXFP4), which are not offered; floats have "
            "8 bits (e4m3), and integers of 4 bits are as small"
        )
    if form in ("int-quantized", "float-quantized") and floating != form.startswith("float"):
        raise ModelLoadError(f"{inner}.type is {weights.get('type')!r} in the format {form}")
    strategy, group_size, block = _strategy(inner, weights)
    symmetric = _flag(f"{inner}.symmetric", weights.get("symmetric", True))
    if floating and not symmetric:
        raise UnsupportedModelError(f"{inner}.symmetric must be true for floats")
    dtype = str(weights.get("scale_dtype") or "float32").removeprefix("torch.")
    if dtype not in _SCALE_DTYPES:
        raise UnsupportedModelError(
            f"{inner}.scale_dtype is {dtype:.100} (MXFP8), which is not offered; scales are "
            f"{', '.join(_SCALE_DTYPES)}"
        )
    ordered = _ordered(inner, weights)
    if ordered and (not packed or strategy != "group"):
        raise UnsupportedModelError(
            f"{inner}.actorder is offered for the format {_PACKED} and the strategy group"
        )
    activations, static = _inputs(where, group.get("input_activations"), floating, packed)
    return Scheme(
        packed, bits, floating, strategy, group_size, block, symmetric, ordered, activations, static
    )


def _number_type(where: str, arguments: Mapping[str, Any]) -> tuple[int, bool]:
    bits, kind = arguments.get("num_bits", 8), arguments.get("type", "int")
    if type(bits) is not int or not 1 <= bits <= 64:
        raise ModelLoadError(f"{where}.num_bits is {shown(bits)}; it must be a number of bits")
    if kind not in ("int", "float"):
        raise ModelLoadError(f"{where}.type is {shown(kind)}; it must be 'int' or 'float'")
    if bits > 8:
        raise UnsupportedModelError(f"{where}.num_bits is {bits}; at most 8 are offered")
    return bits, kind == "float"


def _strategy(
    where: str, weights: Mapping[str, Any]
) -> tuple[Strategy, int, tuple[int, int] | None]:
    size = weights.get("group_size")
    if size is not None and (type(size) is not int or (size < 1 and size != -1)):
        raise ModelLoadError(
            f"{where}.group_size is {shown(size)}; it must be a number of inputs, or -1 for all"
        )
    given = weights.get("strategy")
    if given is None:
        given = "tensor" if size is None else "channel" if size == -1 else "group"
    if not isinstance(given, str) or given not in _STRATEGIES:
        raise UnsupportedModelError(
            f"{where}.strategy is {shown(given)}; offered are {', '.join(_STRATEGIES)}"
        )
    strategy = _STRATEGIES[given]
    if strategy == "group":
        if size is None or size < 1:
            raise ModelLoadError(f"{where}.group_size is {shown(size)}; the strategy needs one")
        return strategy, size, None
    block = weights.get("block_structure")
    if strategy != "block":
        return strategy, 0, None
    if isinstance(block, str):
        block = [int(each) if each.isdecimal() else each for each in block[:40].split("x")]
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(each) is int and each > 0 for each in block)
    ):
        raise ModelLoadError(
            f"{where}.block_structure is {shown(block)}; the strategy block needs two numbers, "
            "such as [128, 128]"
        )
    return strategy, 0, (block[0], block[1])


def _ordered(where: str, weights: Mapping[str, Any]) -> bool:
    given = weights.get("actorder")
    if given in (None, False, "weight", "static"):
        return False
    if given in (True, "group", "dynamic"):
        return True
    raise ModelLoadError(
        f"{where}.actorder is {shown(given)}; it must be null, 'weight' or 'group'"
    )


def _inputs(where: str, given: Any, floating: bool, packed: bool) -> tuple[Activations, bool]:
    """How inputs are rounded, and whether by a fixed scale."""
    if given is None:
        return "float", False
    where = f"{where}.input_activations"
    inputs = _object(where, given)
    _check_rest(where, inputs, _ARGUMENTS)
    bits, floating_inputs = _number_type(where, inputs)
    dynamic = inputs.get("dynamic", False)
    if bits != 8 or dynamic == "local":
        raise UnsupportedModelError(
            f"{where} has {bits} bits{' and a local scale' if dynamic == 'local' else ''}; inputs "
            "of 8 bits are offered"
        )
    static = not _flag(f"{where}.dynamic", dynamic)
    symmetric = _flag(f"{where}.symmetric", inputs.get("symmetric", True))
    if floating_inputs:  # not applied: inputs stay in a finer type than the one they are meant for
        return "float", static
    if floating or packed:
        raise UnsupportedModelError(
            f"{where} rounds inputs to int8 for weights that are "
            f"{'floats' if floating else 'packed'}; it is offered for int-quantized ones"
        )
    if not symmetric:
        raise UnsupportedModelError(
            f"{where}.symmetric is false; inputs of 8 bits are offered without a zero point"
        )
    strategy = inputs.get("strategy") or "tensor"
    wanted = "tensor" if static else "token"
    if strategy != wanted:
        raise UnsupportedModelError(
            f"{where}.strategy is {shown(strategy)} with {'fixed' if static else 'dynamic'} "
            f"scales; {wanted!r} is offered"
        )
    return "int8", static


def _format(where: str, given: Any) -> str:
    if given in (_PACKED, _MIXED) or given in _PLAIN:
        return str(given)
    if not isinstance(given, str):
        raise ModelLoadError(f"{where} is {shown(given)}; it must be the name of a format")
    raise UnsupportedModelError(f"{where} is {given!r:.100}, which is not offered; {_OFFERED}")


def _object(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ModelLoadError(f"{where} is {shown(value)}; it must be an object")
    return value


def _flag(where: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ModelLoadError(f"{where} is {shown(value)}; it must be true or false")


def _refuse_unless_empty(config: Mapping[str, Any], field: str) -> None:
    value = config.get(field)
    if isinstance(value, Mapping) and (value.get("format") == "dense" or not any(value.values())):
        return
    if value:
        raise UnsupportedModelError(
            f"{field} is {shown(value)}, which is not offered; weights may be quantized, but "
            "neither sparse nor rotated"
        )


def _check_rest(where: str, given: Mapping[str, Any], known: frozenset[str]) -> None:
    for field, value in given.items():
        if field not in known and value not in (None, False, "", [], {}):
            raise UnsupportedModelError(
                f"{where}.{str(field)[:100]} is {shown(value)}; this field is unknown and may "
                "change the numbers"
            )
