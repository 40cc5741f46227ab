"""LoRA adapters, as users of other libraries' interfaces name them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from quire.lora_request import LoRARequest
from quire.request_maker import FoundAdapter
from quire.utils.checks import refuse
from quire.utils.suggest import unexpected_argument

if TYPE_CHECKING:
    from quire.llm import LLM

_EXPECTED = "a quire.LoRARequest, the name of an adapter that is loaded, or None"
_FIELDS = tuple(field.name for field in fields(LoRARequest))

Wanted = LoRARequest | str | FoundAdapter
"""The forms in which models of this package hold an adapter. The last is one that was read for a
call, and stays what it is whatever becomes of its files and its name."""


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
        A dict with an argument that there is not; the message names the nearest that is.
    InvalidRequestError
        For anything else.
    """
    if value is None or isinstance(value, (LoRARequest, FoundAdapter)):
        return value
    if isinstance(value, str):
        return LoRARequest(value).lora_name  # checked
    if isinstance(value, Mapping):
        for name in value:
            if name not in _FIELDS:
                raise unexpected_argument("LoRARequest", str(name), _FIELDS)
        if "lora_name" not in value:
            raise refuse("lora_request", value, "a dict with a 'lora_name'")
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
    place = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(place, str) or not place.strip():
        raise refuse("path", path, "a folder, a name on the hub, a quire.LoRARequest or None")
    own = os.path.basename(os.path.abspath(place))
    here = os.path.expanduser(place)
    if os.path.isdir(here):  # and not what has this name from another working directory
        place = os.path.abspath(here)
    return LoRARequest(own if name is None else name, None, place)


def adapter_in(llm: LLM, path: str | os.PathLike[str] | LoRARequest | None) -> LoRARequest | None:
    """Return the request for the adapter at a place, which is there and fits the engine's model."""
    wanted = adapter_at(path)
    if wanted is not None:
        found_adapter(llm, wanted)
    return wanted


def found_adapter(llm: LLM, wanted: Wanted) -> FoundAdapter:
    """Return the adapter as it is now, read unless the engine has it in memory.

    It may be given to the engine in place of what was wanted.

    Raises
    ------
    InvalidRequestError
        (AdapterError) The engine was made without adapters, there is none such, or it does not
        fit the model.
    """
    [found] = llm._open_maker().find_adapters(wanted, 1)
    if found.error is not None:
        raise found.error
    return found


def plain_form(wanted: Wanted | None) -> Any:
    """Return what :func:`as_wanted` makes the same of, in the words of JSON."""
    if isinstance(wanted, FoundAdapter):
        wanted = wanted.named
    if not isinstance(wanted, LoRARequest):
        return wanted
    values = {item.name: (getattr(wanted, item.name), item.default) for item in fields(wanted)}
    return {name: value for name, (value, default) in values.items() if value != default}
