"""LoRAConfig: whether an engine takes adapters, how many, and which it begins with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.config import checks
from quire.config.checked import Checked, argument
from quire.errors import ConfigError, InvalidRequestError
from quire.lora_request import LoRARequest
from quire.utils.checks import shown
from quire.utils.suggest import nearest

_KEYS = {"name": "lora_name", "path": "lora_path", "base_model_name": "base_model_name"}
"""Fields of an entry of ``lora_modules``, and how :class:`LoRARequest` names them."""


def modules(name: str, value: Any) -> tuple[LoRARequest, ...]:
    """Take adapters to begin with, each by a name of its own and with a path."""
    if isinstance(value, Mapping):
        entries: list[Any] = [{"name": key, "path": path} for key, path in value.items()]
    elif isinstance(value, (list, tuple)):
        entries = list(value)
    else:
        raise checks.refuse(
            name, value, "a list of 'name=path', of dicts with name and path, or a dict of paths"
        )
    kept = tuple(_module(f"{name}[{i}]", entry) for i, entry in enumerate(entries))
    names = [module.lora_name for module in kept]
    for i, each in enumerate(names):
        if each in names[:i]:
            raise ConfigError(
                f"{name}[{i}] has the name {each!r}, which {name}[{names.index(each)}] has "
                "already: give each adapter a name of its own"
            )
    return kept


def _module(where: str, entry: Any) -> LoRARequest:
    right = "'name=path', a dict with 'name' and 'path', or a LoRARequest with a path"
    fields = entry
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        try:
            fields = json.loads(entry)
        except ValueError as error:
            raise ConfigError(f"{where} is {shown(entry)}, which is no JSON: {error}") from None
    elif isinstance(entry, str):
        name, equals, path = entry.partition("=")
        if not equals:
            raise checks.refuse(where, entry, right)
        fields = {"name": name, "path": path}
    if isinstance(fields, Mapping):
        for key in fields:
            if key not in _KEYS:
                guess = nearest(str(key), _KEYS)
                hint = "" if guess is None else f": did you mean {guess!r}?"
                raise ConfigError(
                    f"{where} is {shown(entry)}, and its keys are {', '.join(_KEYS)}; "
                    f"unknown key {key!r}{hint}"
                )
        try:
            fields = LoRARequest(**{_KEYS[key]: value for key, value in fields.items()})
        except (InvalidRequestError, TypeError) as error:
            raise ConfigError(f"{where} is {shown(entry)}: {error}; it must be {right}") from None
    if not isinstance(fields, LoRARequest) or not fields.lora_path.strip():
        raise checks.refuse(where, entry, right)
    return fields


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Checked):
    """Whether requests may ask for LoRA adapters, and how many are kept at hand.

    Attributes
    ----------
    enable_lora : bool
        Let requests ask for adapters. The other arguments here need it.
    max_loras : int
        Most different adapters in one step; requests for others wait for their turn.
    max_lora_rank : int
        Largest rank of an adapter.
    max_cpu_loras : int or None
        Adapters that are kept in memory for the next request, the least recently used leaving
        first; those of running requests stay until these end. None: all that were loaded by
        name, and as many as ``max_loras`` besides.
    lora_dtype : {"auto", "float16", "bfloat16", "float32"}
        What adapters are kept in; what they add is computed in float32. ``"auto"`` is the model's
        dtype.
    lora_modules : tuple of LoRARequest
        Adapters to load with the model, so that requests can ask for them by name. They are given
        as a list of ``"name=path"``, of dicts with ``name``, ``path`` and ``base_model_name``, of
        LoRARequest objects, or as a dict of paths by name.
    """

    enable_lora: bool = argument(False, checks.boolean)
    max_loras: int = argument(8, checks.integer(1, 65536))
    max_lora_rank: int = argument(64, checks.integer(1, 65536))
    max_cpu_loras: int | None = argument(None, checks.integer(1))
    lora_dtype: str = argument("auto", checks.dtype)
    lora_modules: tuple[LoRARequest, ...] = argument((), modules)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enable_lora:
            return
        for name, nothing in _NOTHING.items():
            value = getattr(self, name)
            if value not in nothing:
                raise ConfigError(
                    f"{name}={shown(value)} is about adapters, which this engine would not have: "
                    "set enable_lora=True, or leave it out"
                )


_NOTHING: dict[str, tuple[Any, ...]] = {
    # The default here and vLLM's.
    "max_loras": (LoRAConfig.max_loras, 1),
    "max_lora_rank": (LoRAConfig.max_lora_rank, 16),
    "max_cpu_loras": (None,),
    "lora_dtype": ("auto",),
    "lora_modules": ((),),
}
"""Values that ask for nothing where there are no adapters."""
