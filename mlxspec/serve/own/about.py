"""What the server says of itself: models, health, and whether it should be asked now."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from mlxspec.serve.core.service import Asked
from mlxspec.serve.protocol.answers import now

router = APIRouter(tags=["The server"])

_STARTED = now()


@router.get("/v1/models")
async def models(service: Asked) -> dict[str, Any]:
    """The one model that is loaded. A request may name any: it is always answered by this one."""
    model = _model(service)
    page = {"has_more": False, "first_id": model["id"], "last_id": model["id"]}  # Anthropic's
    return {"object": "list", "data": [model]} | page


@router.get("/v1/models/{name:path}")
async def model(name: str, service: Asked) -> dict[str, Any]:
    """The model that is loaded."""
    return _model(service)


@router.get("/health")
async def health() -> dict[str, str]:
    """200 as long as the process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(service: Asked) -> Response:
    """Whether a request would be taken now: 503 while loading, full, stuck or shutting down."""
    why, load = service.unready, service.worker.load._asdict()
    if why is not None:
        return JSONResponse({"ready": False, "reason": f"the server {why}", **load}, 503)
    return JSONResponse({"ready": True, **load})


def _model(service: Asked) -> dict[str, Any]:
    settings, engine = service.settings, service.worker.engine
    return {
        "id": settings.name,
        "object": "model",
        "type": "model",  # as Anthropic has it, and so has the moment as a date
        "display_name": settings.name,
        "created": _STARTED,
        "created_at": datetime.fromtimestamp(_STARTED, UTC).isoformat(),
        "owned_by": "mlxspec",
        "context_length": engine.context if engine is not None else None,
    }
