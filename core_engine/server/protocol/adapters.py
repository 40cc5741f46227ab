"""The bodies of ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""

from __future__ import annotations

from quire.server.fields import Int, RequestBody


class LoadAdapterRequest(RequestBody):
    """An adapter to be loaded."""

    lora_name: str
    """What requests call it, as their model."""
    lora_path: str
    """Its folder, in one of the directories that the server was started with."""
    load_inplace: bool | None = None
    """Take the place of the adapter that has the name; requests that run go on with that one."""


class UnloadAdapterRequest(RequestBody):
    """An adapter to be let go."""

    lora_name: str
    lora_int_id: Int | None = None
    """Changes nothing: an adapter is known by its name."""
