"""From requests to an answer, whole or streamed; every protocol gives its own form to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
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
from mlxspec.serve.core.ticket import Ticket
from mlxspec.serve.core.wire import Json
from mlxspec.serve.protocol.listening import alive, events_of, sse, while_there, whole
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
) -> Response:
    """Write the texts and answer with them.

    Args:
        http: the request as it came, which tells whether its client is still there.
        requests: one for each text.
        trace: whether a stream tells its rounds too; see `trace_of`.

    Raises:
        Refusal: there is no room, or a text failed before anything was sent.
    """
    if not stream:
        return await answer_whole(service, http, requests, form.whole)
    held = ExitStack()
    tickets = held.enter_context(service.written(requests, call_of(http)))
    return _Streamed(_stream(service, tickets, form, trace=trace), held)


async def answer_whole(
    service: Service,
    http: Http,
    requests: Sequence[Request],
    form: Callable[[list[Generation]], dict[str, Any]],
) -> Response:
    """Write the texts and answer once they are whole, with the arguments of `answer`."""
    with service.written(requests, call_of(http)) as tickets:
        try:
            await while_there(http, whole(tickets))
        except MlxspecError as error:
            raise refusal_of(error) from error
        except ClientDisconnect:
            return Response(status_code=GONE)
        return Json(form(_generations(service, tickets)))


async def _stream(
    service: Service, tickets: Sequence[Ticket], form: Form, *, trace: bool
) -> AsyncIterator[bytes]:
    for chunk in form.begin():
        yield chunk
    try:
        async for index, event in events_of(tickets):
            if event.prefill is not None:
                yield alive(event)
            else:
                if trace:
                    yield sse(trace_of(index, event))
                for chunk in form.event(index, event, tickets[index].generation):
                    yield chunk
    except MlxspecError as error:
        yield form.error(refusal_of(error))
        return
    for chunk in form.end(_generations(service, tickets)):
        yield chunk


def _generations(service: Service, tickets: Sequence[Ticket]) -> list[Generation]:
    generations = [ticket.generation for ticket in tickets]
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
