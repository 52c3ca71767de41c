"""From an application to a process that serves it, and ends in good order."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import contextmanager
from types import FrameType

import uvicorn

from mlxspec.errors import UsageError
from mlxspec.serve.app import make_served
from mlxspec.serve.core.service import Service


class Server(uvicorn.Server):
    """Serves until it is told to end; texts that are written then may end within `drain_s`.

    Args:
        service: answers. listening: the socket of its address. drain_s: seconds.
        begun: called once connections are taken.
    """

    def __init__(
        self,
        service: Service,
        listening: socket.socket,
        drain_s: float,
        begun: Callable[[], None] | None = None,
    ) -> None:
        config = uvicorn.Config(
            make_served(service),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_tells_a_fault)
        self._service = service
        self._listening = listening
        self._begun = begun

    def serve_until_told(self) -> None:
        """Serve in this thread; signals are the caller's, who calls `tell_to_end`."""
        self.run(sockets=[self._listening])

    def tell_to_end(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Take no more requests, and end once those that run are answered; twice is at once."""
        self.force_exit = self._service.draining
        self._service.draining = True
        self.should_exit = True

    @contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Leave signals to the caller."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.watch.listeners.close()  # they would listen for ever
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would break off what ends the application too
            await self.lifespan.shutdown()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._begun is not None:
            self._begun()


def _tells_a_fault(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's tells more than that the end has broken something off.

    It prints a traceback for every text that it breaks off, which the log tells by its request.
    """
    kind = record.exc_info[0] if record.exc_info else None
    ends = str(record.msg).startswith("Cancel ")
    return not ends and (kind is None or not issubclass(kind, asyncio.CancelledError))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 is any that is free.

    Raises:
        UsageError: the address is taken, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UsageError(
            f"The server cannot listen on {host}:{port}: {error.strerror}.",
            hint="Choose another with --host and --port; --port 0 takes any that is free.",
        ) from error
    return listening
