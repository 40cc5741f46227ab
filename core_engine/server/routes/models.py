"""``/v1/models``: what is served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends

from quire.server.service import Service, get_service

if TYPE_CHECKING:
    from quire.server.adapters import AdapterCard

router = APIRouter()


@router.get("/v1/models")
async def list_models(service: Annotated[Service, Depends(get_service)]) -> dict[str, Any]:
    """List the names that requests may ask for: the model's, and those of adapters."""
    shapes = [_model_shape(service, name) for name in service.settings.served_model_names]
    shapes += [adapter_shape(service, card) for card in await service.adapters.cards()]
    return {"object": "list", "data": shapes}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, service: Annotated[Service, Depends(get_service)]) -> dict[str, Any]:
    """Describe one of them."""
    model = await service.find_model(name)
    if model.is_adapter:
        for card in await service.adapters.cards():
            if card.name == name:
                return adapter_shape(service, card)
    return _model_shape(service, name)


def _model_shape(service: Service, name: str) -> dict[str, Any]:
    return _shape(service, name, service.created, service.llm.config.model.model, None)


def adapter_shape(service: Service, card: AdapterCard) -> dict[str, Any]:
    """Return an adapter as it is described among the models."""
    return _shape(service, card.name, card.created, card.path, card.parent)


def _shape(
    service: Service, name: str, created: int, root: str, parent: str | None
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "quire",
        "root": root,
        "parent": parent,
        "max_model_len": service.limits.max_model_len,
    }
