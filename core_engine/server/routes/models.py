"""``/v1/models``: what is served."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from quire.server.service import Service, get_service

router = APIRouter()


def _card(service: Service, name: str) -> dict[str, Any]:
    limits = service.limits
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "quire",
        "root": service.llm.config.model.model,
        "parent": None,
        "max_model_len": limits.max_model_len,
    }


@router.get("/v1/models")
async def list_models(service: Annotated[Service, Depends(get_service)]) -> dict[str, Any]:
    """List the names that requests may ask for."""
    names = service.settings.served_model_names
    return {"object": "list", "data": [_card(service, name) for name in names]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, service: Annotated[Service, Depends(get_service)]) -> dict[str, Any]:
    """Describe one of them."""
    return _card(service, service.check_model(name))
