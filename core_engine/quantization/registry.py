"""Which quantizations there are, by name, and which of them a model folder has or is asked for.

Light on purpose: engine arguments are checked with it, so that torch is imported only where a
format or a quantizer is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError, ModelLoadError, UnsupportedModelError
from quire.quantization.beside import FILES, with_method
from quire.utils.suggest import nearest

if TYPE_CHECKING:
    from quire.quantization.format import Quantizer, WeightFormat

ENTRY_POINT_GROUP = "quire.quantizations"
"""A package offers quantizations by entry points of this group, each a `Quantization`."""


@dataclass(frozen=True)
class Quantization:
    """What a name in ``quantization=`` or ``quant_method`` stands for.

    Attributes
    ----------
    name
    read
        Makes the format of a checkpoint's ``quantization_config``; None: no checkpoint is in it.
    make
        Makes a quantizer of the engine argument ``quantization_config``; None: it is not for
        models that are quantized while they are loaded.
    """

    name: str
    read: Callable[[Mapping[str, Any]], WeightFormat] | None = None
    make: Callable[[Mapping[str, Any] | None], Quantizer] | None = None


_FORMATS = {
    "awq": "awq",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "fp8": "fp8",
    "gptq": "gptq",
    "squeezellm": "squeezellm",
}
"""Formats by their names, each with its module, which has a ``from_config``."""

_ON_LOAD = ("bitsandbytes", "fp8", "int4", "int8", "nf4", "w8a8")
"""Names in `quire.quantization.on_load.QUANTIZERS`."""

_ALIASES = {
    "auto-gptq": "gptq",
    "auto_gptq": "gptq",
    "awq_marlin": "awq",
    "bnb": "bitsandbytes",
    "compressed_tensors": "compressed-tensors",
    "fbgemm_fp8": "fp8",
    "gptq_bitblas": "gptq",
    "gptq_marlin": "gptq",
    "gptqmodel": "gptq",
    "ptpc_fp8": "fp8",
    "w8a16": "int8",
    "w4a16": "int4",
}
"""Other names: those of formats by a kernel elsewhere, and of their tools."""


def names() -> list[str]:
    """Names that ``quantization=`` takes, sorted; not the aliases."""
    return sorted({*_FORMATS, *_ON_LOAD, *_installed()})


def on_load_names() -> list[str]:
    """Those of `names` that quantize a plain model while it is loaded."""
    return [name for name in names() if _is_on_load(name)]


def full_name(name: str) -> str | None:
    """Return the name that an alias, or a name in another spelling, stands for; None: unknown."""
    plain = name.strip().lower()
    plain = _ALIASES.get(plain, plain)
    return plain if plain in names() else None


def check_name(field: str, value: str) -> str:
    """Return the full name for a value of an engine argument.

    Raises
    ------
    ConfigError
        Nothing has such a name.
    """
    known = full_name(value)
    if known is None:
        every = names()
        guess = nearest(value, [*every, *_ALIASES])
        hint = "" if guess is None else f"; did you mean {guess!r}?"
        raise ConfigError(
            f"{field} must be one of {', '.join(map(repr, every))}, not {value[:100]!r}{hint}"
        )
    return known


def format_of(config: Mapping[str, Any]) -> WeightFormat:
    """Return the format of a checkpoint.

    Parameters
    ----------
    config
        Its ``quantization_config``.

    Raises
    ------
    UnsupportedModelError
        It is in a format that is not known, or in a variety of one that is not.
    ModelLoadError
        The configuration makes no sense.
    """
    name = _method_of(config)
    known = full_name(name)
    if known is None or not _is_format(known):
        readable = ", ".join(each for each in names() if _is_format(each))
        raise UnsupportedModelError(
            f"quant_method in the checkpoint's quantization_config is {name[:100]!r}, which this "
            f"version of quire does not read; it reads {readable}. An unquantized version of the "
            "model can be quantized while it is loaded: quantization="
            + " or ".join(map(repr, on_load_names()))
        )
    installed = _installed().get(known)
    if installed is not None and installed.read is not None:
        return installed.read(config)
    module = import_module(f"quire.quantization.{_FORMATS[known]}")
    made: WeightFormat = module.from_config(config)
    return made


def quantizer_of(name: str, options: Mapping[str, Any] | None = None) -> Quantizer:
    """Return what makes codes of plain weights.

    Parameters
    ----------
    name
        One of `on_load_names`.
    options
        The engine argument ``quantization_config``.

    Raises
    ------
    ConfigError
        `name` is none of these, or does not take an option.
    """
    known = check_name("quantization", name)
    installed = _installed().get(known)
    if installed is not None and installed.make is not None:
        return installed.make(options)
    if known not in _ON_LOAD:
        raise ConfigError(
            f"quantization={name!r} is a format of checkpoints; while a model is loaded it can be "
            f"quantized to {', '.join(map(repr, on_load_names()))}"
        )
    from quire.quantization.on_load import QUANTIZERS

    return QUANTIZERS[known](options)


def config_of(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return how a checkpoint says that it is quantized; None: it does not.

    Parameters
    ----------
    folder
        The model's.
    config
        Its ``config.json``. Where that says nothing, an older tool's file beside it may.

    Raises
    ------
    ModelLoadError
        What it says is no JSON object.
    """
    given = config.get("quantization_config")
    if given is None:
        # Where compressed-tensors had it at first.
        given = config.get("compression_config")
    if given is not None and not isinstance(given, Mapping):
        raise ModelLoadError(
            f"quantization_config in config.json is {str(given)[:100]!r}; it must be an object"
        )
    if given:
        return given
    for name in FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ModelLoadError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ModelLoadError(f"{file} holds a JSON {type(content).__name__}, not an object")
        known = with_method(name, content)
        if known is not None:
            return known
    return None


def choose(
    asked: str | None,
    options: Mapping[str, Any] | None,
    found: Mapping[str, Any] | None,
) -> tuple[WeightFormat | None, Quantizer | None]:
    """Bring together what was asked for and what a checkpoint is.

    Parameters
    ----------
    asked, options
        The engine arguments ``quantization`` and ``quantization_config``.
    found
        What `config_of` returned.

    Returns
    -------
    WeightFormat or None
        Of the checkpoint; None: its weights are plain.
    Quantizer or None
        For plain weights.

    Raises
    ------
    ConfigError
        They contradict each other.
    UnsupportedModelError, ModelLoadError
        See `format_of`.
    """
    if found is not None:
        method = _method_of(found)
        has = full_name(method) or method
        if asked is not None and full_name(asked) != has:
            raise ConfigError(
                f"quantization={asked!r}, and the checkpoint is quantized as {method!r} by its "
                f"quantization_config: leave the argument out, or give quantization={has!r}; an "
                "unquantized version of the model can be quantized while it is loaded"
            )
        if options is not None:
            raise ConfigError(
                "quantization_config has the options of quantizing a plain model while it is "
                f"loaded, and the checkpoint is quantized as {method!r} already: leave it out. "
                "What the checkpoint says of itself is replaced by hf_overrides"
            )
        return format_of(found), None
    if asked is None:
        if options is not None:
            raise ConfigError(
                "quantization_config has options of quantization=, which is not given; it can be "
                + " or ".join(map(repr, on_load_names()))
            )
        return None, None
    if not _is_on_load(full_name(asked) or ""):
        raise ConfigError(
            f"quantization={asked!r}, and the checkpoint is not quantized: its config.json has no "
            f"quantization_config, and there is no {' or '.join(FILES)} beside it. A plain model "
            f"is quantized while it is loaded by quantization={_or(on_load_names())}"
        )
    return None, quantizer_of(asked, options)


def _or(every: list[str]) -> str:
    return " or ".join(map(repr, every))


def _is_format(name: str) -> bool:
    installed = _installed().get(name)
    return name in _FORMATS or (installed is not None and installed.read is not None)


def _is_on_load(name: str) -> bool:
    installed = _installed().get(name)
    return name in _ON_LOAD or (installed is not None and installed.make is not None)


def _method_of(config: Mapping[str, Any]) -> str:
    method = config.get("quant_method")
    if method is None and "quantization_status" in config:
        method = "compressed-tensors"
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or not method:
        raise ModelLoadError(
            f"quant_method in the checkpoint's quantization_config is {str(method)[:100]!r}; it "
            "must be the name of a format, such as 'awq' (hf_overrides can give it)"
        )
    return method


@cache
def _installed() -> dict[str, Quantization]:
    found: dict[str, Quantization] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            quantization = point.load()
        except Exception as error:
            raise ModelLoadError(
                f"the quantization {point.name!r} ({point.value}) of an installed package could "
                f"not be loaded: {error}"
            ) from error
        if not isinstance(quantization, Quantization):
            raise ModelLoadError(
                f"the entry point {point.name!r} of {ENTRY_POINT_GROUP!r} is a "
                f"{type(quantization).__name__}; it must be a "
                "quire.quantization.registry.Quantization"
            )
        found[quantization.name] = quantization
    return found
