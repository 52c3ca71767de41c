"""One text of a server: asked for on the event loop, written on the device's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from mlxspec.decode.batch import Row
from mlxspec.decode.request import Request
from mlxspec.errors import MlxspecError
from mlxspec.metrics import Event, Generation
from mlxspec.serve.core.call import Call


class Ticket:
    """A text that was asked for.

    The event loop that makes it awaits `events`; the device's thread sets `row` and calls `tell`.
    Events wait in a queue without a bound: they are no more than the text has tokens, so that a
    client that reads slowly holds back nobody.

    Args:
        request: the request.
        cancel: called with the ticket when nobody awaits its text any more.
        call: the HTTP request that it belongs to.
    """

    def __init__(
        self, request: Request, cancel: Callable[[Ticket], None], call: Call | None = None
    ) -> None:
        self.request = request
        self.call = call or Call()
        self.asked_s = time.perf_counter()
        self.row: Row | None = None
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | MlxspecError] = asyncio.Queue()
        self._over = False

    # --- the device's thread ------------------------------------------------------------------

    def tell(self, event: Event | MlxspecError) -> None:
        """Hand on an event, or the reason why there will be none."""
        with suppress(RuntimeError):  # the loop is closed: nobody is there any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    # --- the event loop -----------------------------------------------------------------------

    async def events(self) -> AsyncIterator[Event]:
        """The events of the text; the last has a `finish_reason`.

        Raises:
            MlxspecError: the text ended with an error; events before it are valid.
        """
        while not self._over:
            event = await self._events.get()
            if isinstance(event, MlxspecError):
                self._over = True
                raise event
            self._over = event.finish_reason is not None
            if event.finish_reason == "error":
                assert self.row is not None
                assert self.row.error is not None
                raise self.row.error
            yield event

    def close(self) -> None:
        """End the text where it is, unless it has ended."""
        if not self._over:
            self._over = True
            self._cancel(self)

    @property
    def generation(self) -> Generation:
        """The result; whole once the last event was seen."""
        assert self.row is not None
        return self.row.generation
