"""``/metrics``: for Prometheus."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client.exposition import choose_encoder

from quire.errors import EngineClosedError
from quire.server.service import Service, get_service

router = APIRouter()


@router.get("/metrics", response_class=Response)
async def metrics(request: Request, service: Annotated[Service, Depends(get_service)]) -> Response:
    """Tell what the server and its engine have done since they started."""
    try:
        service.metrics.engine = await service.llm.get_metrics()
        if service.llm.config.lora.enable_lora:
            service.metrics.adapters = await service.llm.count_lora_requests()
    except EngineClosedError:  # it broke down, and the rest is worth knowing then
        service.metrics.engine = service.metrics.adapters = None
    encode, kind = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service.metrics.registry), headers={"Content-Type": kind})
