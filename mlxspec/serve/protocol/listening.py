"""A client may go away at any moment: what was asked for ends with it then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request

from mlxspec.errors import MlxspecError
from mlxspec.metrics import Event, Generation
from mlxspec.serve.core.wire import encoded

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
WAITING = b": the answer waits for a decision\n\n"


class Text(Protocol):
    """A text that is written: a ticket, or one that an upstream may give."""

    @property
    def generation(self) -> Generation:
        """The result; whole once the last event was seen."""

    def events(self) -> AsyncIterator[Event]:
        """The events of the text; the last has a `finish_reason`."""


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """A server-sent event; `event` names its kind."""
    name = f"event: {event}\n" if event is not None else ""
    return name.encode() + b"data: " + encoded(data) + b"\n\n"


def alive(event: Event) -> bytes:
    """A comment while a prompt is read: clients and proxies give up on silent streams."""
    assert event.prefill is not None
    return f": {event.prefill.read} of {event.prefill.total} tokens read\n\n".encode()


async def while_there(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled where the client goes away.

    Raises:
        ClientDisconnect: it did.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events_of(texts: Sequence[Text]) -> AsyncIterator[tuple[int, Event]]:
    """The events of several texts as they come, with the index of each text.

    Raises:
        MlxspecError: one of them ended with an error.
    """
    if len(texts) == 1:
        async for event in texts[0].events():
            yield 0, event
        return
    merged: asyncio.Queue[tuple[int, Event | MlxspecError]] = asyncio.Queue()

    async def follow(index: int, text: Text) -> None:
        try:
            async for event in text.events():
                merged.put_nowait((index, event))
        except MlxspecError as error:
            merged.put_nowait((index, error))

    following = [asyncio.create_task(follow(*one)) for one in enumerate(texts)]
    try:
        ended = 0
        while ended < len(texts):
            index, found = await merged.get()
            if isinstance(found, MlxspecError):
                raise found
            ended += found.finish_reason is not None
            yield index, found
    finally:
        for task in following:
            task.cancel()


async def whole(texts: Sequence[Text]) -> None:
    """Wait until all texts are written.

    Raises:
        MlxspecError: one of them ended with an error.
    """
    async for _ in events_of(texts):
        pass
