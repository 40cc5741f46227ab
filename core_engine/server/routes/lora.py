"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``: adapters come and go."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from quire.server.body import JsonRoute
from quire.server.fields import accept_fields
from quire.server.protocol.adapters import LoadAdapterRequest, UnloadAdapterRequest
from quire.server.protocol.error import ERRORS
from quire.server.routes.models import adapter_shape
from quire.server.service import Service, get_service

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/load_lora_adapter", responses=ERRORS)
async def load_lora_adapter(
    body: LoadAdapterRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
) -> dict[str, Any]:
    """Load an adapter, which is a model of ``/v1/models`` from then on.

    Needs a server that was started with ``--allow-runtime-lora-updating``; the folder has to lie
    in one of its ``--allowed-lora-dirs``.
    """
    accept_fields(request, body, service)
    in_place = body.load_inplace is True
    card = await service.adapters.load(body.lora_name, body.lora_path, in_place=in_place)
    return adapter_shape(service, card)


@router.post("/v1/unload_lora_adapter", responses=ERRORS)
async def unload_lora_adapter(
    body: UnloadAdapterRequest,
    request: Request,
    service: Annotated[Service, Depends(get_service)],
) -> dict[str, Any]:
    """Let an adapter go; requests that run with it finish.

    Needs a server that was started with ``--allow-runtime-lora-updating``.
    """
    accept_fields(request, body, service)
    await service.adapters.unload(body.lora_name)
    return {"id": body.lora_name, "object": "model", "deleted": True}
