"""LoRA adapters, as users of other libraries' interfaces name them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from quire.lora_request import LoRARequest
from quire.utils.checks import refuse

if TYPE_CHECKING:
    from quire.llm import LLM
    from quire.models.adapter import PreparedAdapter

_EXPECTED = "a quire.LoRARequest, the name of an adapter that is loaded, or None"
_FIELDS = tuple(field.name for field in fields(LoRARequest))


@dataclass(frozen=True, eq=False)
class ReadAdapter:
    """An adapter as it was read for one call, whatever becomes of its files and its name.

    Attributes
    ----------
    request : LoRARequest or str
        What was asked for.
    prepared : PreparedAdapter
        What that was when the call began.
    """

    request: LoRARequest | str
    prepared: PreparedAdapter = field(repr=False)


Wanted = LoRARequest | str | ReadAdapter
"""The forms in which models of this package hold an adapter."""


def as_wanted(value: Any) -> Wanted | None:
    """Return what says which adapter is wanted.

    Parameters
    ----------
    value : LoRARequest, str, dict or None
        A name is one of an adapter that is loaded. A dict has the arguments of a LoRARequest, and
        an object that another library has for it their names as attributes.

    Raises
    ------
    TypeError
        A dict with an argument that there is not.
    InvalidRequestError
        For anything else.
    """
    if value is None or isinstance(value, (LoRARequest, ReadAdapter)):
        return value
    if isinstance(value, str):
        return LoRARequest(value).lora_name  # checked
    if isinstance(value, Mapping):
        return LoRARequest(**value)
    if hasattr(value, "lora_name") and not isinstance(value, type):
        return LoRARequest(**{n: getattr(value, n) for n in _FIELDS if hasattr(value, n)})
    raise refuse("lora_request", value, _EXPECTED)


def adapter_at(
    path: str | os.PathLike[str] | LoRARequest | None, name: str | None = None
) -> LoRARequest | None:
    """Return the request for the adapter at a place; for a name alone, for one that is loaded.

    Parameters
    ----------
    path : str, path or LoRARequest, optional
        A folder, or a name on the hub.
    name : str, optional
        What it is called; by default what its folder is.

    Raises
    ------
    InvalidRequestError
        A value is of the wrong kind.
    """
    if path is None:
        return None if name is None else LoRARequest(name)
    if isinstance(path, LoRARequest):
        if name is not None:
            raise refuse("name", name, "left out beside a LoRARequest, which has one")
        return path
    if not isinstance(path, (str, os.PathLike)):
        raise refuse("path", path, "a folder, a name on the hub, a quire.LoRARequest or None")
    place = os.fspath(path)
    if not isinstance(place, str) or not place.strip():
        raise refuse("path", path, "a folder or a name on the hub")
    return LoRARequest(
        os.path.basename(os.path.abspath(place)) if name is None else name, None, place
    )


def adapter_in(llm: LLM, path: str | os.PathLike[str] | LoRARequest | None) -> LoRARequest | None:
    """Return the request for the adapter at a place, which is there and fits the engine's model."""
    wanted = adapter_at(path)
    if wanted is not None:
        read_adapter(llm, wanted)
    return wanted


def read_adapter(llm: LLM, wanted: LoRARequest | str) -> PreparedAdapter:
    """Return the adapter as it is now, read unless the engine has it in memory.

    Raises
    ------
    InvalidRequestError
        The engine was made without adapters; or (AdapterError) there is no such adapter, or it
        does not fit the model.
    """
    return llm._read_adapter(wanted)


def for_engine(wanted: Wanted | None) -> Any:
    """Return what the engine takes as ``lora_request``."""
    return wanted.prepared if isinstance(wanted, ReadAdapter) else wanted


def plain_form(wanted: Wanted | None) -> dict[str, Any] | str | None:
    """Return what :func:`as_wanted` makes the same of, in the words of JSON."""
    if isinstance(wanted, ReadAdapter):
        wanted = wanted.request
    if not isinstance(wanted, LoRARequest):
        return wanted
    values = {item.name: (getattr(wanted, item.name), item.default) for item in fields(wanted)}
    return {name: value for name, (value, default) in values.items() if value != default}
