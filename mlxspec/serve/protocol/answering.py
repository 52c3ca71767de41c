"""From requests to an answer, whole or streamed; every protocol gives its own form to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.types import Receive, Scope, Send

from mlxspec.decode.request import Request
from mlxspec.errors import MlxspecError
from mlxspec.metrics import Event, Generation
from mlxspec.serve.core.call import call_of
from mlxspec.serve.core.refusal import Refusal, refusal_of
from mlxspec.serve.core.service import Service
from mlxspec.serve.core.wire import Json
from mlxspec.serve.protocol.listening import (
    WAITING,
    Text,
    alive,
    events_of,
    sse,
    while_there,
    whole,
)
from mlxspec.serve.protocol.routed import HELD, Routed
from mlxspec.serve.protocol.routing import Route
from mlxspec.serve.protocol.tracing import trace_of

GONE = 499  # the client closed the connection; nobody reads it but a log


class Form(Protocol):
    """How a protocol puts an answer."""

    def whole(self, generations: list[Generation]) -> dict[str, Any]:
        """The answer as one object."""

    def begin(self) -> Iterable[bytes]:
        """What a stream begins with."""

    def event(self, index: int, event: Event, generation: Generation) -> Iterable[bytes]:
        """What a round brings to one of the texts, whose result so far is `generation`."""

    def end(self, generations: list[Generation]) -> Iterable[bytes]:
        """What a stream ends with."""

    def error(self, refusal: Refusal) -> bytes:
        """An error in the middle of a stream."""


class _Streamed(StreamingResponse):
    """A stream of server-sent events; what it holds is let go whenever and however it ends."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], held: ExitStack) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:  # also where the client goes before the first event
            await super().__call__(scope, receive, send)


async def answer(
    service: Service,
    http: Http,
    requests: Sequence[Request],
    form: Form,
    *,
    stream: bool,
    trace: bool = False,
    route: Route | None = None,
) -> Response:
    """Write the texts and answer with them.

    Args:
        http: the request as it came, which tells whether its client is still there.
        requests: one for each text.
        trace: whether a stream tells its rounds too; see `trace_of`.
        route: of the one request, where an upstream may answer it.

    Raises:
        Refusal: there is no room, or a text failed before anything was sent.
    """
    if not stream:
        return await answer_whole(service, http, requests, form.whole, route)
    held = ExitStack()
    texts = held.enter_context(_texts(service, http, requests, route))
    return _Streamed(_stream(service, texts, form, trace=trace), held)


async def answer_whole(
    service: Service,
    http: Http,
    requests: Sequence[Request],
    form: Callable[[list[Generation]], dict[str, Any]],
    route: Route | None = None,
) -> Response:
    """Write the texts and answer once they are whole, with the arguments of `answer`."""
    with _texts(service, http, requests, route) as texts:
        try:
            await while_there(http, whole(texts))
        except MlxspecError as error:
            raise refusal_of(error) from error
        except ClientDisconnect:
            return Response(status_code=GONE)
        return Json(form(_generations(service, texts)))


@contextmanager
def _texts(
    service: Service, http: Http, requests: Sequence[Request], route: Route | None
) -> Iterator[Sequence[Text]]:
    """The texts of requests as they are written, until the block ends."""
    call = call_of(http)
    if route is None:
        with service.written(requests, call) as tickets:
            yield tickets
        return
    (request,) = requests
    with closing(Routed(service, request, route, call)) as routed:
        yield [routed]


async def _stream(
    service: Service, texts: Sequence[Text], form: Form, *, trace: bool
) -> AsyncIterator[bytes]:
    for chunk in form.begin():
        yield chunk
    try:
        async for index, event in events_of(texts):
            if event is HELD:
                yield WAITING
            elif event.prefill is not None:
                yield alive(event)
            else:
                if trace:
                    yield sse(trace_of(index, event))
                for chunk in form.event(index, event, texts[index].generation):
                    yield chunk
    except MlxspecError as error:
        yield form.error(refusal_of(error))
        return
    except Refusal as refusal:  # the upstream failed, and there is no room here
        yield form.error(refusal)
        return
    for chunk in form.end(_generations(service, texts)):
        yield chunk


def _generations(service: Service, texts: Sequence[Text]) -> list[Generation]:
    generations = [text.generation for text in texts]
    service.lasted(one.timing.prefill_s + one.timing.decode_s for one in generations)
    return generations


def choices(request: Request, count: int) -> Iterator[Request]:
    """The same request several times; every further one has the next seed."""
    for index in range(count):
        seed = request.sampling.seed
        if index and seed is not None:
            sampling = replace(request.sampling, seed=(seed + index) % 2**64)
            yield replace(request, sampling=sampling)
        else:
            yield request
