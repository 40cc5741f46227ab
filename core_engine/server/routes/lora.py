"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``: there are no adapters yet."""

from __future__ import annotations

from typing import Any, NoReturn

from fastapi import APIRouter

from quire.server.body import JsonRoute
from quire.server.errors import ApiError
from quire.server.fields import Int, RequestBody
from quire.server.protocol.error import ERRORS

router = APIRouter(route_class=JsonRoute)


class LoadAdapter(RequestBody):
    """An adapter to be loaded."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None


class UnloadAdapter(RequestBody):
    """An adapter to be let go."""

    lora_name: str
    lora_int_id: Int | None = None


@router.post("/v1/load_lora_adapter", responses=ERRORS)
async def load_lora_adapter(body: LoadAdapter) -> dict[str, Any]:
    """Refuse: this version serves models without adapters."""
    _refuse(body.lora_name)


@router.post("/v1/unload_lora_adapter", responses=ERRORS)
async def unload_lora_adapter(body: UnloadAdapter) -> dict[str, Any]:
    """Refuse: this version serves models without adapters."""
    _refuse(body.lora_name)


def _refuse(name: str) -> NoReturn:
    raise ApiError(
        400,
        f"the adapter {name!r} cannot be loaded or unloaded: this version of quire serves models "
        "without adapters",
        param="lora_name",
        code="unsupported",
    )
