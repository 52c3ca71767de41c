"""Names every request, and logs it once it is over."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxspec.metrics import Tell
from mlxspec.serve.core.call import Call, call_in


class Logbook:
    """Gives each request a name, which its answer has as `x-request-id`, and tells how it ended.

    Args:
        app: answers.
        ended: called with every call that is over.
        tell: called with the lines of a traceback, where the application failed.
    """

    def __init__(self, app: ASGIApp, ended: Callable[[Call], None], tell: Tell) -> None:
        self._app = app
        self._ended = ended
        self._tell = tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = call_in(scope)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = call.name
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception as error:
            for line in traceback.format_exception(error):
                self._tell(line.rstrip())
            if not call.status:
                raise
        finally:
            call.end()
            if (route := scope.get("route")) is not None:
                call.route = route.path
            self._ended(call)
