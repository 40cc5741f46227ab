"""``/health``, ``/ready``, ``/ping`` and ``/version``: for whoever watches over a server."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from quire import __version__
from quire.errors import EngineClosedError
from quire.server.errors import ApiError
from quire.server.service import Service, get_service

router = APIRouter()


@router.get("/health")
@router.get("/ping")
@router.post("/ping")
async def health(service: Annotated[Service, Depends(get_service)]) -> dict[str, str]:
    """Say whether the engine lives; one that drains or is busy does."""
    try:
        await service.llm.check_health()
    except EngineClosedError as error:
        raise ApiError(503, str(error), code="engine_closed") from error
    return {"status": "ok"}


@router.get("/ready")
async def ready(service: Annotated[Service, Depends(get_service)]) -> dict[str, str]:
    """Say whether requests are taken."""
    if service.life.ending is not None:
        raise ApiError(503, service.life.ending, code="shutting_down")
    if not service.llm.is_ready:
        raise ApiError(503, "the engine takes no requests", code="engine_closed")
    return {"status": "ready"}


@router.get("/version")
async def version() -> dict[str, str]:
    """Tell the version."""
    return {"version": __version__}
