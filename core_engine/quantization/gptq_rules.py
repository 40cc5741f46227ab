"""GPTQRules: which modules a GPTQ configuration quantizes, and how each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quire.errors import ModelLoadError
from quire.quantization.config_fields import ConfigFields, group_size_of
from quire.quantization.modules import has_part, in_block, is_head
from quire.utils.patterns import MOST_WAYS, compiled, num_ways

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class ModuleSettings:
    """How a module is quantized.

    Attributes
    ----------
    bits : {2, 3, 4, 8}
    group_size
        Inputs that share a scale; -1: all.
    sym
        Whether zeros are in the middle of the codes, and may be left out.
    needs_order
        Whether ``g_idx`` has to be there: inputs were quantized in another order than their own,
        and grouped in that.
    """

    bits: int
    group_size: int
    sym: bool
    needs_order: bool


class GPTQRules:
    """What a configuration says of modules.

    Fields are ``bits``, ``group_size``, ``sym``, ``desc_act`` and ``static_groups``, and for some
    modules other values of these in ``dynamic``: an object of settings by regular expression, of
    which the first that matches the beginning of a module's name counts. ``+:`` before it means
    nothing, ``-:`` that the module is not quantized.

    Parameters
    ----------
    fields

    Raises
    ------
    ModelLoadError
        A field is missing, or has a value that makes no sense or cannot be read.
    """

    def __init__(self, fields: ConfigFields) -> None:
        self._lm_head = fields.flag("lm_head", default=False)
        self._parts = fields.strings("modules_in_block_to_quantize")
        self._general = _settings(fields, None)
        self._rules: list[tuple[re.Pattern[str], ModuleSettings | None]] = []
        dynamic = fields.value("dynamic")
        if dynamic is None:
            return
        if not isinstance(dynamic, Mapping):
            raise fields.wrong(("dynamic",), "an object of settings by regular expression")
        ways = 0
        for key, settings in dynamic.items():
            where = f"dynamic of {fields.where}"
            if not isinstance(key, str):
                raise ModelLoadError(f"{where} has the key {key!r:.100}; it must be an expression")
            pattern = key[2:] if key.startswith(("+:", "-:")) else key
            found = compiled("{}", pattern, where, ModelLoadError)
            ways += num_ways(pattern)
            if ways > MOST_WAYS and num_ways(pattern) > 1:
                raise ModelLoadError(
                    f"{where} has too many expressions up to {pattern!r:.100}, which may take "
                    "forever to match; write plainer ones"
                )
            if key.startswith("-:"):
                self._rules.append((found, None))
            else:
                inner = ConfigFields(settings, f"dynamic[{key!r:.100}] of {fields.where}")
                self._rules.append((found, _settings(inner, self._general)))

    def settings(self, module: str) -> ModuleSettings | None:
        """Return how a module is quantized, None if it is not.

        Parameters
        ----------
        module
            The checkpoint's own name.
        """
        if in_block(module):
            if self._parts and not any(has_part(module, each) for each in self._parts):
                return None
        elif not (self._lm_head and is_head(module)):
            return None
        for pattern, settings in self._rules:
            if pattern.match(module):
                return settings
        return self._general


def _settings(fields: ConfigFields, general: ModuleSettings | None) -> ModuleSettings:
    expected = "one of 2, 3, 4 and 8 bits can be read"
    if general is None or fields.value("bits") is not None:
        bits = fields.integer("bits", expected=expected)
        if bits not in BITS:
            raise fields.unsupported(("bits",), expected)
    else:
        bits = general.bits
    if general is None or fields.value("group_size") is not None:
        expected = "how many inputs share a scale, such as 128, or -1 for all"
        size = fields.integer("group_size", expected=expected)
        size = group_size_of(size, "group_size", fields.where)
    else:
        size = general.group_size
    sym = fields.flag("sym", default=general.sym if general else False)
    default = general.needs_order if general else False
    ordered = fields.flag("desc_act", default=default)
    ordered = ordered and not fields.flag("static_groups", default=False)
    return ModuleSettings(bits, size, sym, ordered and size != -1)
