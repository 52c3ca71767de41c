"""Between the routes and the worker: requests are made, admitted and counted here."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from statistics import fmean
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from starlette.requests import Request as Http

from mlxspec.conversations import begins_with_system
from mlxspec.decode.engine import Engine
from mlxspec.decode.request import Request
from mlxspec.errors import MlxspecError
from mlxspec.serve.core.call import Call
from mlxspec.serve.core.refusal import Refusal, full, refusal_of, unready
from mlxspec.serve.core.settings import Settings
from mlxspec.serve.core.ticket import Ticket
from mlxspec.serve.core.watch import Watch
from mlxspec.serve.core.worker import Worker
from mlxspec.spelling import Spelling

LONGEST_RETRY_S = 60

Result = TypeVar("Result")


class Service:
    """What routes ask for texts; for the event loop.

    Args:
        settings: the choices that the server was started with.
        worker: writes the texts.
        log: called with every request that is over, except such that only looked at something.
    """

    def __init__(
        self, settings: Settings, worker: Worker, log: Callable[[Call], None] | None = None
    ) -> None:
        self.settings = settings
        self.worker = worker
        self.watch = Watch(worker)
        self._log = log
        self.draining = False
        # Tokenizers of the hub may be used by one thread at a time.
        self._clerk = ThreadPoolExecutor(1, "clerk")
        self._lasted_s: deque[float] = deque(maxlen=16)  # of the latest texts

    @property
    def engine(self) -> Engine:
        """The engine; raises Refusal while it is being loaded."""
        if self.worker.engine is None:
            raise unready("is loading its models")
        return self.worker.engine

    @property
    def unready(self) -> str | None:
        """Why the server should be sent nothing now; None where it is ready."""
        if self.draining:
            return "is shutting down"
        if self.worker.engine is None:
            return "is loading its models"
        if (stuck := self._stuck()) is not None:
            return stuck
        if self._free() < 1:
            return "is full"
        return None

    def _stuck(self) -> str | None:
        still_s = self.worker.still_s
        if still_s > self.settings.stuck_s:
            return f"has not ended a round for {still_s:.0f} s"
        return None

    def _free(self) -> int:
        load = self.worker.load
        return self.settings.max_rows + self.settings.max_queue - load.running - load.waiting

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Run what takes a while and needs no device, such as a tokenizer.

        Raises:
            Refusal: it raised one of our errors.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._clerk, work)
        except MlxspecError as error:
            raise refusal_of(error) from error

    @cached_property
    def spelling(self) -> Spelling:
        """The text and the bytes of tokens."""
        return Spelling(self.engine.tokenizer)

    def with_usual(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options, and the server's own where they say nothing.

        Its system message goes before conversations that begin with none, and before no raw text.

        Raises:
            PromptError: the messages are no conversation.
        """
        own = {**self.settings.usual, **options}
        if own.get("raw") or begins_with_system(own.get("messages")):
            own.pop("system", None)
        return own

    async def request(self, notes: Sequence[str] = (), **options: Any) -> Request:
        """A request for one text; see `Engine.request`, with `prompt` among the options.

        Args:
            notes: what its answer tells a person beside.

        Raises:
            Refusal: it cannot be written as it is asked for.
        """
        engine, settings = self.engine, self.settings
        most = settings.max_tokens
        asked = options.setdefault("max_tokens", most)
        if most is not None and asked is not None and asked > most:
            raise Refusal(
                400,
                f"max_tokens is {asked:,}; this server writes {most:,} at most.",
                param="max_tokens",
            )
        request = await self.aside(lambda: engine.request(**self.with_usual(options)))
        request = replace(request, notes=(*request.notes, *notes))
        longest, length = settings.max_prompt_tokens, len(request.tokens)
        if longest is not None and length > longest:
            raise Refusal(
                400,
                f"The prompt has {length:,} tokens; this server reads {longest:,} at most.",
                code="context_length_exceeded",
            )
        return request

    def require_open(self) -> None:
        """Raise Refusal where the server takes no more requests."""
        if self.draining:
            raise unready("is shutting down")

    @contextmanager
    def written(
        self, requests: Sequence[Request], call: Call | None = None
    ) -> Iterator[list[Ticket]]:
        """Let texts be written, until the block ends.

        Args:
            call: the HTTP request that asked for them; see `call_of`.

        Raises:
            Refusal: too many wait, or the server is shutting down or stuck.
        """
        self.require_open()
        if (stuck := self._stuck()) is not None:
            raise unready(stuck)
        if self._free() < len(requests):
            raise full(self._retry_s())
        tickets = [Ticket(request, self.worker.cancel, call) for request in requests]
        if call is not None:
            call.texts += tickets
            tokenizer = self.engine.tokenizer
            if self.settings.log_texts and tokenizer is not None:
                call.decode = tokenizer.decode
        for ticket in tickets:
            self.worker.ask(ticket)
        try:
            yield tickets
        finally:
            for ticket in tickets:
                ticket.close()

    def ended(self, call: Call) -> None:
        """Count an HTTP request that is over, and log it unless it only looked at something."""
        self.watch.called(call)
        if self._log is not None and not (call.method == "GET" and call.status < 400):
            self._log(call)

    def lasted(self, seconds: Iterable[float]) -> None:
        """Note how long texts took, for those who are to come again later."""
        self._lasted_s.extend(seconds)

    def _retry_s(self) -> int:
        """Seconds until a place is likely to be free."""
        each_s = fmean(self._lasted_s) if self._lasted_s else 1.0
        return min(max(1, math.ceil(each_s / self.settings.max_rows)), LONGEST_RETRY_S)

    def close(self) -> None:
        self._clerk.shutdown(wait=False, cancel_futures=True)


async def service_of(http: Http) -> Service:
    """The service of the application that a request came to; a function would cost it a thread."""
    service: Service = http.app.state.service
    return service


Asked = Annotated[Service, Depends(service_of)]  # a route's parameter
