"""What can be seen of the server: `/events`, `/stats` and `/metrics`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request as Http

from mlxspec.serve.core.broadcast import Broadcast
from mlxspec.serve.core.service import Asked
from mlxspec.serve.own.exposition import Exposition
from mlxspec.serve.own.stats import stats_of
from mlxspec.serve.protocol.listening import sse

router = APIRouter(tags=["The server"])

QUIET_S = 10.0  # after which a comment tells a listener that the server is there
AT_ONCE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@router.get("/events", response_class=StreamingResponse)
async def events(service: Asked) -> Response:
    """What happens to texts, as server-sent events: `join`, `read`, `round` and `end`.

    No prompt and no text is among them. A listener that is too slow is told by `lost` how many
    it has missed.
    """
    told = _told(service.watch.listeners)
    return StreamingResponse(told, media_type="text/event-stream", headers=AT_ONCE)


@router.get("/stats")
async def stats(service: Asked) -> Response:
    """How the server is set up, what it has done, and what its controller has learned."""
    return JSONResponse(stats_of(service))


@router.get("/metrics", response_class=Response)
async def metrics(service: Asked, http: Http) -> Response:
    """Counts and times for Prometheus."""
    encode, kind = choose_encoder(http.headers.get("accept", ""))
    exposition = Exposition(service.watch, service.settings.name)
    return Response(encode(exposition.registry), headers={"Content-Type": kind})


async def _told(broadcast: Broadcast) -> AsyncIterator[bytes]:
    with broadcast.listen() as listener:
        yield b": listening\n\n"
        while (news := await listener.heard(QUIET_S)) is not None:
            happenings, lost = news
            if lost:
                yield sse({"type": "lost", "count": lost}, "lost")
            for one in happenings:
                yield sse(one, one["type"])
            if not happenings:
                yield b": nothing\n\n"
