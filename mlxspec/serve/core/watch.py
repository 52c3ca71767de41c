"""Watches the worker: what it does is counted here, and told to those who listen."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

from mlxspec.cascade.decision import Decision
from mlxspec.decode.prefixes import PrefixStats
from mlxspec.metrics import TARGET, Event, RoundStats
from mlxspec.serve.core.broadcast import Broadcast, Happening
from mlxspec.serve.core.call import Call
from mlxspec.serve.core.counts import Counts
from mlxspec.serve.core.ticket import Ticket
from mlxspec.serve.core.worker import Step, Worker

RECENT_S = 5.0  # what a live line is about


@dataclass(frozen=True, kw_only=True)
class Live:
    """What a live line shows; of rates, those over the last seconds.

    acceptance_rate: None where nothing was proposed. cache: of prefixes; None before there are
        models.
    """

    running: int
    waiting: int
    tokens_per_second: float
    acceptance_rate: float | None
    cache: PrefixStats | None


class _Done(NamedTuple):
    """What one step brought."""

    at_s: float
    tokens: int
    drafted: int
    accepted: int


class Watch:
    """Counts what a worker does, and tells it to listeners.

    `step` is called on the worker's thread, everything else from any.

    Args:
        worker: is watched.

    `latest` is the latest round of any text.
    """

    def __init__(self, worker: Worker) -> None:
        self.listeners = Broadcast()
        self.latest: RoundStats | None = None
        self._worker = worker
        self._counts = Counts()
        self._written_s: dict[Ticket, float] = {}  # when each text got tokens, or 0 before
        self._longest: dict[int, int] = {}  # of the step before
        self._recent: deque[_Done] = deque()
        self._lock = threading.Lock()  # guards what is above
        worker.watchers.append(self.step)

    @property
    def counts(self) -> Counts:
        """What was counted so far; a copy."""
        with self._lock:
            return deepcopy(self._counts)

    def live(self) -> Live:
        """What happens at this moment."""
        load, prefixes, now_s = self._worker.load, self._worker.prefixes, time.perf_counter()
        with self._lock:
            recent = [one for one in self._recent if one.at_s > now_s - RECENT_S]
        drafted = sum(one.drafted for one in recent)
        accepted = sum(one.accepted for one in recent)
        return Live(
            running=load.running,
            waiting=load.waiting,
            tokens_per_second=_rate(recent, now_s),
            acceptance_rate=accepted / drafted if drafted else None,
            cache=prefixes.stats if prefixes is not None else None,
        )

    def plain_s(self) -> float | None:
        """Seconds of a plain round of one text: of the latest ones, or as measured at the start."""
        measured = self._worker.measured
        with self._lock:
            latest = self._counts.usual_s(1, 0)
        return latest or (measured.plain_s if measured is not None else None)

    def called(self, call: Call) -> None:
        """Count an HTTP request that is over."""
        with self._lock:
            self._counts.calls[call.route, call.status] += 1

    def decided(self, decision: Decision) -> None:
        """Count an answer that another host might have given."""
        with self._lock:
            self._counts.routed.add(decision)

    # --- the device's thread ------------------------------------------------------------------

    def step(self, step: Step) -> None:
        """Count what a step of the batch brought, and tell it."""
        now_s = time.perf_counter()
        longest = _longest(step)
        happenings: list[Happening] = []
        gaps_s = []
        with self._lock:
            for ticket, event in step.events:
                if ticket not in self._written_s and event.finish_reason is None:
                    self._written_s[ticket] = 0.0
                    self._counts.texts += 1
                    happenings.append(_joined(ticket))
                gaps_s += self._count(ticket, event, now_s)
            # Rounds overlap, so that the time of one is known beside others of its kind alone.
            if gaps_s and len(longest) == 1 and longest == self._longest and _is_fair(step):
                ((rows, draft_tokens),) = longest.items()
                self._counts.took(rows, draft_tokens, min(gaps_s))
            self._longest = longest
            self._note(step, now_s)
        if self.listeners:
            for ticket, event in step.events:
                happenings += _happenings(ticket, event, step.running, longest)
            self.listeners.say(happenings)

    def _count(self, ticket: Ticket, event: Event, now_s: float) -> list[float]:
        """Count an event; returns the seconds since the text got its last tokens, if it has any."""
        counts, gaps_s = self._counts, []
        if event.tokens:
            before_s = self._written_s.get(ticket, 0.0)
            if before_s:
                gaps_s.append(now_s - before_s)
                counts.between_s.add(now_s - before_s)
            else:
                counts.first_token_s.add(now_s - ticket.asked_s)
            self._written_s[ticket] = now_s
            counts.written_tokens += len(event.tokens)
        if event.round is not None and ticket.row is not None:
            self.latest = event.round
            counts.round(ticket.row.rows, event.round)
            for proposed in event.from_draft:
                counts.written_by[event.round.drafter if proposed else TARGET] += 1
        if event.finish_reason is not None:
            self._written_s.pop(ticket, None)
            counts.ended[event.finish_reason] += 1
            counts.whole_s.add(now_s - ticket.asked_s)
            if ticket.row is not None:
                counts.prompt_tokens += ticket.row.generation.prompt_tokens
                counts.cached_tokens += ticket.row.generation.cached_prompt_tokens
        return gaps_s

    def _note(self, step: Step, now_s: float) -> None:
        """Keep what a step brought, for as long as it is recent."""
        rounds = [event.round for _, event in step.events if event.round is not None]
        full = [one for one in rounds if one.full]
        tokens = sum(len(event.tokens) for _, event in step.events)
        drafted, accepted = sum(one.drafted for one in full), sum(one.accepted for one in full)
        self._recent.append(_Done(now_s, tokens, drafted, accepted))
        while self._recent[0].at_s < now_s - RECENT_S:
            self._recent.popleft()


def _rate(recent: list[_Done], now_s: float) -> float:
    """Tokens per second since the first of these steps."""
    if not recent:
        return 0.0
    # The first step's tokens came before the time that counts begins.
    since_s = max(now_s - recent[0].at_s, 1.0)
    return sum(one.tokens for one in recent) / since_s


def _longest(step: Step) -> dict[int, int]:
    """The longest proposal of a step's rounds, by their numbers of rows."""
    longest: dict[int, int] = {}
    for ticket, event in step.events:
        if event.round is not None and ticket.row is not None:
            rows = ticket.row.rows
            longest[rows] = max(longest.get(rows, 0), event.round.drafted)
    return longest


def _is_fair(step: Step) -> bool:
    """Whether the time since the step before is that of a round: nothing was read beside it."""
    return all(event.round is not None for _, event in step.events)


def _joined(ticket: Ticket) -> Happening:
    request = ticket.request
    return _of(ticket, "join") | {
        "prompt_tokens": len(request.tokens),
        "draft_tokens": "auto" if request.auto else request.draft_tokens,
    }


def _happenings(
    ticket: Ticket, event: Event, running: int, longest: dict[int, int]
) -> Iterator[Happening]:
    """What an event of a text means to those who listen."""
    if event.prefill is not None:
        yield _of(ticket, "read") | event.prefill._asdict()
    if event.round is not None and ticket.row is not None:
        rows = ticket.row.rows
        yield _of(ticket, "round") | {
            "drafted": event.round.drafted,
            "accepted": event.round.accepted,
            "source": event.round.drafter,
            "draft_tokens": longest[rows],
            "tokens": len(event.tokens),
            "running": running,
            "bucket": rows,
        }
    if event.finish_reason is not None:
        written = len(ticket.row.generation.tokens) if ticket.row is not None else 0
        yield _of(ticket, "end") | {"finish_reason": event.finish_reason, "tokens": written}


def _of(ticket: Ticket, kind: str) -> Happening:
    return {
        "type": kind,
        "row": ticket.row.index if ticket.row is not None else None,
        "request": ticket.call.name,
        "path": ticket.call.path,
    }
