"""A text that an upstream may give in place of the local model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from mlxspec.cascade.cascade import Deciding, asked_for, judgeable
from mlxspec.cascade.client import Fault, Reply
from mlxspec.cascade.decision import Decision, sent
from mlxspec.decode.request import Request
from mlxspec.metrics import Event, Generation, Piece, SpeculationStats, Timing
from mlxspec.serve.core.call import Call
from mlxspec.serve.core.service import Service
from mlxspec.serve.core.ticket import Ticket
from mlxspec.serve.protocol.answers import Decided
from mlxspec.serve.protocol.routing import Route

HELD = Event()  # a round whose text waits for the decision
KEPT_EVERY_S = 5.0  # a sign of life while the upstream is awaited


class Routed:
    """A text as a ticket has it, whose events come once it is decided that they stay.

    Raises:
        Refusal: there is no room for the local answer, or the server is shutting down.
    """

    def __init__(self, service: Service, request: Request, route: Route, call: Call) -> None:
        self._service = service
        self._request = request
        self._route = route
        self._call = call
        self._begun_s = time.perf_counter()
        self._held = ExitStack()
        self._ticket: Ticket | None = None
        self._asked: Future[Reply] | None = None
        self._deciding: Deciding | None = None
        self._decided: Decided | None = None
        service.require_open()
        if route.strategy == "upstream":
            self._asked = route.policy.client.begin(route.question(request))
        else:
            self._deciding = self._judge_of(self._write())

    @property
    def generation(self) -> Generation:
        """The result; whole once the last event was seen."""
        if self._decided is not None:
            return self._decided
        assert self._ticket is not None, "there is a text that is decided on, or a local one"
        return self._ticket.generation

    async def events(self) -> AsyncIterator[Event]:
        """The events of the text; the last has a `finish_reason`. `HELD` stands for one that waits.

        Raises:
            MlxspecError: the local text ended with an error.
            Refusal: the upstream gave no answer, and there is no room for the local one.
        """
        steps = self._sent() if self._deciding is None else self._judged(self._deciding)
        async for event in steps:
            yield event

    def close(self) -> None:
        """Nobody awaits the text any more: neither the upstream nor the local model goes on."""
        self._held.close()
        for asked in (self._asked, self._deciding and self._deciding.asked):
            if asked is not None:
                asked.cancel()

    # --- the two ways ---------------------------------------------------------------------------

    async def _judged(self, deciding: Deciding) -> AsyncIterator[Event]:
        """The local text, held from where the rules ask for the upstream."""
        assert self._ticket is not None, "the local text is written first"
        held: list[Event] = []
        async for event in self._ticket.events():
            if event.prefill is not None:
                yield event
                continue
            generation, ended = self._ticket.generation, event.finish_reason is not None
            if deciding.is_due(generation, ended=ended):
                await self._service.aside(partial(deciding.judge, generation, ended=ended))
            held.append(self._told(event))
            if not deciding.stays or ended:
                yield HELD
                continue
            for one in held:
                yield one
            held.clear()
        reply = None
        if deciding.asked is not None:
            async for _ in _waiting(deciding.asked):
                yield HELD
            reply = _settled(deciding.asked)
        generation = self._ticket.generation
        decision = await self._service.aside(lambda: deciding.decide(generation, reply))
        for one in self._ended(decision, held, generation, reply):
            yield one

    async def _sent(self) -> AsyncIterator[Event]:
        """The upstream's answer; the local model's where there is none."""
        assert self._asked is not None, "the upstream is asked first"
        async for _ in _waiting(self._asked):
            yield HELD
        reply = _settled(self._asked)
        if isinstance(reply, Reply):
            for one in self._ended(self._decision(reply, None), [], None, reply):
                yield one
            return
        ticket = self._write()
        async for event in ticket.events():
            if event.finish_reason is None:
                yield event
                continue
            decision = self._decision(reply, ticket.generation)
            for one in self._ended(decision, [event], ticket.generation, reply):
                yield one

    def _write(self) -> Ticket:
        """Let the local model write."""
        request = self._request if self._route.strategy == "upstream" else judgeable(self._request)
        (self._ticket,) = self._held.enter_context(self._service.written([request], self._call))
        return self._ticket

    def _judge_of(self, ticket: Ticket) -> Deciding:
        tokenizer = self._service.engine.tokenizer
        assert tokenizer is not None, "a conversation needs one"
        route, name = self._route, self._service.settings.name
        return Deciding(
            route.policy, ticket.request, route.question(self._request), tokenizer, name
        )

    def _decision(self, reply: Reply | Fault, generation: Generation | None) -> Decision:
        took_s = time.perf_counter() - self._begun_s
        upstream = self._route.policy.client.upstream
        return sent(reply, generation, upstream, self._service.settings.name, took_s)

    # --- what is told ---------------------------------------------------------------------------

    def _told(self, event: Event) -> Event:
        """An event without the log-probabilities that the rules alone need."""
        return replace(event, logprobs=tuple(asked_for(event.logprobs, self._request.logprobs)))

    def _ended(
        self,
        decision: Decision,
        held: list[Event],
        generation: Generation | None,
        reply: Reply | Fault | None,
    ) -> list[Event]:
        """Count a decision; the events that are left, of the text that is used."""
        self._service.watch.decided(decision)
        self._call.decision = decision
        fields = decision.as_dict()
        told = {name: fields[name] for name in ("model_used", "speculative_decoding")}
        if decision.author == "upstream":
            assert isinstance(reply, Reply), "it has answered"
            self._decided = _of_upstream(reply, self._request, told, decision.line())
            piece = Piece(reply.text, from_draft=False, upstream=True)
            return [Event(pieces=(piece,), finish_reason=self._decided.finish_reason)]
        assert generation is not None, "the local text is whole"
        self._decided = Decided(**vars(generation), decision=told)
        self._decided.logprobs = asked_for(generation.logprobs, self._request.logprobs)
        self._decided.notes = [*generation.notes, decision.line()]
        return held


def _of_upstream(reply: Reply, request: Request, decision: dict[str, Any], note: str) -> Decided:
    """An upstream's answer as a result: its own counts, and no speculation."""
    return Decided(
        prompt_tokens=reply.tokens_in or 0,
        speculation=SpeculationStats(0, enabled=False),
        sampling=request.sampling,
        timing=Timing(time_to_first_token_s=reply.seconds, decode_s=reply.seconds),
        # Ids of another model's tokens would say nothing here: their number counts.
        tokens=[0] * (reply.tokens_out or 0),
        text=reply.text,
        finish_reason="length" if reply.finish_reason == "length" else "stop",
        notes=[*request.notes, note],
        decision=decision,
    )


async def _waiting(asked: Future[Reply]) -> AsyncIterator[None]:
    """A sign of life now and then until the upstream has answered or failed."""
    future = asyncio.wrap_future(asked)
    try:
        while not (await asyncio.wait({future}, timeout=KEPT_EVERY_S))[0]:
            yield
    finally:
        if not future.done():
            future.cancel()
        elif not future.cancelled():
            future.exception()  # it is looked at, so that nobody warns of it


def _settled(asked: Future[Reply]) -> Reply | Fault:
    try:
        return asked.result()
    except Fault as fault:
        return fault
